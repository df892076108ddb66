"""Known vulnerabilities of the versions in ``constraints.txt``, by pip-audit; what could not be asked about is said.

Ends with 1 where there are any. A service that is out of reach is no failure, and no clean bill either::

    python scripts/audit_constraints.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
#: Seconds for all packages together.
PATIENCE = 300


def report(dependencies: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """What is to be said of pip-audit's answer, and whether anything is vulnerable."""
    asked = [one for one in dependencies if "skip_reason" not in one]
    found = [(one["name"], one["version"], flaw) for one in asked for flaw in one["vulns"]]
    lines = [
        f"{name} {version}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for name, version, flaw in found
    ]
    unknown = [one["name"] for one in dependencies if "skip_reason" in one]
    if unknown:
        lines.append(f"not audited, as no service in reach knows them: {', '.join(unknown)}")
    lines.append(f"{len(asked)} of {len(dependencies)} packages audited, {len(found)} known vulnerabilities")
    return lines, bool(found)


def main() -> int:
    """Ask, print, and say by the exit code whether anything was found."""
    words = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        answer = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        print(f"nothing was audited: no answer within {PATIENCE} s")
        return 0
    except (ValueError, KeyError, TypeError):
        print(f"nothing was audited: {(done.stderr.strip() or 'pip-audit gave no answer').splitlines()[-1]}")
        return 0
    lines, vulnerable = report(answer)
    print("\n".join(lines))
    return int(vulnerable)


if __name__ == "__main__":
    sys.exit(main())
