"""``memprof harness``: another program's evaluation, with the memory of every sample beside its score."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

#: By what a user types: the adapter in :mod:`memprof.harness`, the package it needs, and how that is installed.
ADAPTERS = {
    "lmms-eval": ("lmms_eval", "lmms_eval", "pip install 'memprof-vlm[lmms-eval]'"),
    "vlmevalkit": ("vlmevalkit", "vlmeval", "pip install -e . in a clone of VLMEvalKit"),
}


def harness(
    name: Annotated[str, typer.Argument(help="lmms-eval or vlmevalkit.", show_default=False)],
    words: Annotated[list[str], typer.Argument(help="What the harness is given, after --.", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="A new folder; a run for each task goes below it.", show_default=False)
    ],
) -> None:
    """Run an evaluation of lmms-eval or VLMEvalKit, and measure every sample it asks of a transformers model.

    lmms-eval's --log_samples then hold a memory for each sample: peak, KV cache and parts, in bytes. VLMEvalKit's table
    of answers gets a table MODEL_DATASET_memory.csv beside it. The folder is read by memprof report, plot and diff.

    Examples:
    memprof harness lmms-eval -o runs/mine -- --model llava_hf --tasks ai2d --log_samples --output_path logs

    memprof harness vlmevalkit -o runs/mine -- run.py --model llava_v1.5_7b --data AI2D_TEST

    accelerate launch -m memprof harness lmms-eval -o runs/mine -- --model llava_hf --tasks ai2d
    """
    from memprof.errors import MemprofError, UnknownName
    from memprof.harness.watching import check_new
    from memprof.stopping import kept

    if name not in ADAPTERS:
        raise UnknownName("harness", name, ADAPTERS)
    module, package, install = ADAPTERS[name]
    if importlib.util.find_spec(package) is None:
        raise MemprofError(f"{name} is not installed here: {install}")
    check_new(out)
    adapter = importlib.import_module(f"memprof.harness.{module}")
    with kept(lambda: f"samples that were finished are kept below {out}"), adapter.watched(out):
        adapter.main(words)
    typer.echo(f"saved below {out}; next: memprof report {out}")
