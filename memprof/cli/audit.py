"""``memprof audit``: did what was pruned leave the memory?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memprof.cli import _options as opt

#: What a method is tried on where no model is named.
MODEL = "internvl2-2b"


def audit(
    run: Annotated[
        Path | None, typer.Argument(help=opt.RUN_HELP, show_default=False)
    ] = None,
    model: opt.Model = MODEL,
    method: opt.Methods = [],  # noqa: B006 - typer copies it
    device: Annotated[str, typer.Option("--device", help="sim, cpu or cuda: where a method is tried.")] = "sim",
    stack: opt.StackName = "current",
    published: Annotated[
        str | None, typer.Option("--published", help="A published KV figure, as '31.5 MB': which definition gives it.")
    ] = None,
    dtype: opt.Dtype = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=0, help="With --published: of the question.")] = 30,
    json: opt.AsJson = False,
) -> None:
    """Check that pruned tokens left: KV lengths against the plan, bytes by storage, kept attention maps, doubled KV.

    Ends with exit code 3 where the plan is not met. For a model of your own, call
    memprof.analysis.audit.audit_generate(model, inputs, planned=...).

    Examples:
    memprof audit runs/first

    memprof audit --model internvl2-2b --method topv:keep=0.25 --method fastv

    memprof audit --published "31.5 MB" --model llava-1.5-7b --method divprune:keep=0.104
    """
    from memprof.analysis.audit import audit_method, audit_run
    from memprof.cli._runs import find
    from memprof.errors import GateFailed, UsageError

    if published is not None:
        if run is not None or not method:
            raise UsageError("--published is a figure of a method on a model: give --method (and --model), no folder")
        _explain(published, model, method, stack, dtype, text_tokens, as_json=json)
        return
    if (run is None) == (not method):
        raise UsageError("give a run folder to audit, or --method to try one (and --model), and not both")
    if run is not None:
        usual = {
            "model": (model, MODEL), "device": (device, "sim"), "stack": (stack, "current"), "dtype": (dtype, None),
        }  # fmt: skip
        if beside := [f"--{name}" for name, (given, default) in usual.items() if given != default]:
            raise UsageError(f"{', '.join(beside)} {'goes' if len(beside) == 1 else 'go'} with --method; a run says it")
        reports = [audit_run(one) for one in find([run])]
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


def _explain(
    figure: str, model: str, methods: list[str], stack: str, dtype: str | None, text_tokens: int, *, as_json: bool
) -> None:
    """Print what a published figure may count under each of ``methods``, for one square picture."""
    from memprof.analysis.published import explain, told
    from memprof.models.find import find

    known = find(model)
    shape = known.family.shape(known, 448, 448, text_tokens)
    found = [explain(figure, known, method, shape, dtype or known.dtype, stack) for method in methods]
    if as_json:
        import json

        sys.stdout.write(json.dumps({"schema": 1, "published": found}, indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("".join(told(one) for one in found))
