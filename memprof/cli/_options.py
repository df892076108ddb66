"""Options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: The least that ``--gpu`` takes for a card. Less is a slip of a unit, as 8MiB; Python takes any size.
LEAST_CARD = "1GiB"


def card_or_size(text: str | None) -> str | None:
    """``text``, where it names a card or the size of one.

    Raises:
        BadValue: Neither, or a size below :data:`LEAST_CARD`.
    """
    if text is not None:
        from memprof.errors import BadValue
        from memprof.gpus import find_card
        from memprof.units import parse_bytes

        memory = find_card(text).memory_bytes
        if memory is not None and memory < parse_bytes(LEAST_CARD):
            raise BadValue(f"--gpu {text} is less than {LEAST_CARD}, the least that is taken for a card; as --gpu 8GiB")
    return text


RUN_HELP = "A run folder, a folder of run folders, latest, or part of a name that `memprof runs` lists."
ARun = Annotated[Path, typer.Argument(help=RUN_HELP, metavar="RUN", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        "--model", help="A name of `memprof list models`, a hub id in the cache, a folder, or a config.json.",
        show_default=True,
    ),
]  # fmt: skip
Methods = Annotated[
    list[str], typer.Option("--method", help="Pruning method, as topv or topv:keep=0.25,layer=3. Repeat to compare.")
]
TaskName = Annotated[str, typer.Option("--task", help="Task: ai2d, ocrbench, folder.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cuda, sim or cpu; auto: cuda if there is one, else sim (proving*: cpu).")
]
StackName = Annotated[
    str, typer.Option("--stack", help="current: as transformers runs today; paper: fp32 logits of all positions.")
]
TextTokens = Annotated[
    int | None,
    typer.Option("--text-tokens", min=0, help="Tokens of every question; default: as counted, else the task's usual."),
]
Images = Annotated[
    int | None,
    typer.Option("--images", min=1, help="Pictures in a prompt: each sample's own in turn; default: as the data say."),
]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Prompts side by side, unpruned; default: as the data say.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="First N samples only.")]
NewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens to make; default: the task's.")]
MaxTiles = Annotated[
    int | None, typer.Option("--max-tiles", help="Most tiles an image is cut into; default: the model's.")
]
Attention = Annotated[str, typer.Option("--attention", help="Attention of the language model: sdpa or eager.")]
Data = Annotated[
    str, typer.Option("--data", help="bundled, hub, a .csv of sizes, .jsonl, .tsv, .parquet, or a folder of pictures.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", help="Card to predict for, as 4090 (see `list cards`), or its memory, as 8GiB.", callback=card_or_size
    ),
]
Weights = Annotated[str, typer.Option("--weights", help="random, hub, or the path of a checkpoint.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; default: as published.")]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights, prompts and draws.")]
Unit = Annotated[str, typer.Option("--unit", help="GiB, GB, MiB, MB or KiB.")]
FittingUnit = Annotated[str | None, typer.Option("--unit", help="GiB, GB, MiB, MB or KiB; default: by size.")]
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
