"""A hook of mkdocs: what pages in docs/ link to outside of it is part of the site too.

On GitHub ``docs/pruning.md`` shows ``../plots/ask/ask-topv.png`` and links to ``../ARCHITECTURE.md``; on the site both
lie below the root. Pages stay as they are on disk, each once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Pages of the root that the site has too.
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(\]\()((?:\.\./)*)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and every picture that a page shows from beside docs/."""
    wanted = {*PAGES, *(f"plots/{path}" for page in _texts() for path in re.findall(r"\.\./plots/([^)#\s]+)", page))}
    for name in sorted(wanted):
        files.append(File(name, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def _texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links from docs/ to the root at the same file of the site, and the other way round."""
    folder, own = Path(page.file.src_uri).parent, page.file.src_uri in PAGES

    def moved(found: re.Match[str]) -> str:
        start, up, rest = found.groups()
        if "://" in rest:
            return found[0]
        if own:  # in the root a link says docs/usage.md; the site has usage.md
            return f"{start}{up}{rest.removeprefix('docs/')}"
        outside = up.count("../") > len(folder.parts)
        return f"{start}{up.removeprefix('../') if outside else up}{rest}"

    return _LINK.sub(moved, markdown)
