"""``memprof audit``: did what was pruned leave the memory?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memprof.cli import _options as opt


def audit(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder, or a folder that holds run folders.", show_default=False)
    ] = None,
    model: opt.Model = "internvl2-2b",
    method: opt.Methods = [],  # noqa: B006 - typer copies it
    device: Annotated[str, typer.Option("--device", help="sim, cpu or cuda: where a method is tried.")] = "sim",
    stack: opt.StackName = "current",
    json: opt.AsJson = False,
) -> None:
    """Check that pruned tokens left: KV lengths against the plan, bytes by storage, kept attention maps, doubled KV.

    Ends with exit code 3 where the plan is not met. For a model of your own, call
    memprof.analysis.audit.audit_generate(model, inputs, planned=...).

    Examples:
    memprof audit runs/first

    memprof audit --model internvl2-2b --method topv:keep=0.25 --method fastv
    """
    from memprof.analysis.audit import audit_method, audit_run
    from memprof.errors import GateFailed, UsageError
    from memprof.store import find_runs

    if (run is None) == (not method):
        raise UsageError("give a run folder to audit, or --method to try one (and --model), and not both")
    if run is not None:
        reports = [audit_run(one) for one in find_runs([run])]
    else:
        reports = [audit_method(model, one, device, stack) for one in method]
    if json:
        import json as encoder

        document = {"schema": 1, "audits": [report.to_json() for report in reports]}
        sys.stdout.write(encoder.dumps(document, indent=1, ensure_ascii=False) + "\n")
    else:
        for report in reports:
            prompts = f"{report.prompts} prompt{'s' if report.prompts > 1 else ''}, {report.layers} layers"
            sys.stdout.write(f"{report.subject}: {'passed' if report.passed else 'FAILED'} ({prompts})\n")
            sys.stdout.writelines(f"  {finding.kind}: {finding.line}\n" for finding in report.findings)
    failed = [report.subject for report in reports if not report.passed]
    if failed:
        raise GateFailed(f"the pruning plan is not met by {'; '.join(failed)}")
