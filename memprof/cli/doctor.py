"""``memprof doctor``: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import typer

from memprof.cli import _options as opt


def doctor(json: opt.AsJson = False) -> None:
    """Check this machine: versions, devices, optional parts, allocator settings.

    Examples:
    memprof doctor

    memprof doctor --json
    """
    from memprof.environment import environment, package_version
    from memprof.errors import DeviceUnavailable
    from memprof.meters import METERS

    devices = {}
    for name, meter in METERS:
        try:
            meter.check()
            devices[name] = "ready"
        except DeviceUnavailable as error:
            devices[name] = str(error)
    optional = {
        "nvidia-ml-py": "what the driver says a process uses; pip install 'memprof-vlm[cuda]'",
        "optuna": "memprof tune; pip install 'memprof-vlm[tune]'",
        "datasets": "--data hub; pip install 'memprof-vlm[hub]'",
        "sentencepiece": "tokenizers of InternVL2; pip install 'memprof-vlm[hub]'",
    }
    parts = {name: package_version(name) for name in optional}
    if json:
        import json as _json

        typer.echo(
            _json.dumps({"schema": 1, "environment": environment(), "devices": devices, "optional": parts}, indent=1)
        )
        return
    from rich.markup import escape
    from rich.table import Table

    from memprof.reports._paper import Screen

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    here = environment()
    table.add_row("memprof", f"{here['memprof']} ({here['git_commit'] or 'not a checkout'})")
    table.add_row("python", f"{here['python']}, {here['platform']}")
    for name, found in here["packages"].items():
        table.add_row(name, found)
    for name, state in devices.items():
        table.add_row(f"device {name}", "[green]ready[/green]" if state == "ready" else escape(state))
    for name, found in parts.items():
        if name not in here["packages"]:
            table.add_row(name, found or f"[yellow]absent[/yellow]: {escape(optional[name])}")
    settings = here["allocator_settings"]
    table.add_row("allocator", ", ".join(f"{k}={v}" for k, v in settings.items()) or "default settings")
    Screen().print(table)
