"""Options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help="Model; `memprof list` names them.", show_default=True)]
Methods = Annotated[
    list[str], typer.Option("--method", help="Pruning method, as topv or topv:keep=0.25,layer=3. Repeat to compare.")
]
TaskName = Annotated[str, typer.Option("--task", help="Task: ai2d, ocrbench, folder.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cuda, sim or cpu; auto: cuda if there is one, else sim (proving: cpu).")
]
StackName = Annotated[
    str, typer.Option("--stack", help="current: as transformers runs today; paper: fp32 logits of all positions.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="First N samples only.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens to make; default: the task's.")]
MaxTiles = Annotated[
    int | None, typer.Option("--max-tiles", help="Most tiles an image is cut into; default: the model's.")
]
Data = Annotated[str, typer.Option("--data", help="bundled, hub, or a file: .csv of shapes, .tsv, .parquet, a folder.")]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="Card to predict for: h100, a100, l4, ..., or its memory, as 8GiB.")
]
Weights = Annotated[str, typer.Option("--weights", help="random, hub, or the path of a checkpoint.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; default: as published.")]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights, prompts and draws.")]
Unit = Annotated[str, typer.Option("--unit", help="GiB, GB, MiB or MB.")]
FittingUnit = Annotated[
    str | None, typer.Option("--unit", help="GiB, GB, MiB or MB; default: GiB, or MiB where all is small.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line a finished sample on stderr.")]
Folder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; with several methods, one in it each.")
]


Fidelity = Annotated[
    bool | None,
    typer.Option(
        "--fidelity/--no-fidelity",
        help="Compare each answer with the unpruned one's; default: where weights are real and run.",
    ),
]


def resolve_device(name: str, model: str = "", gpu: str | None = None) -> str:
    """``auto`` is CUDA where there is a card, else sim; for a ``model`` whose weights come with memprof, else cpu.

    Where a card to predict for is named, it is sim.
    """
    if name != "auto":
        return name
    if gpu is not None:
        return "sim"
    import torch

    from memprof.families import find_model
    from memprof.families._proving import SelfContained

    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if model and isinstance(find_model(model)[0], SelfContained) else "sim"
