"""What the tests of ``memprof ask`` share: a throw-away checkpoint with a tokenizer, and answers as if they had run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memprof.asked import Answer, Asked, Cut, Grid
from memprof.records import Run, RunRecord, RunSpec, SampleRecord, TokenColumns

sys.path.insert(0, str(Path(__file__).parent / "families"))

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
WORDS = ["user", "assistant", "\n", " ", "what", "is", "this", "?", *(f"w{number}" for number in range(24))]
#: By id; the image's token comes last, as in the models themselves.
VOCABULARY = [*SPECIAL[:-1], *WORDS, SPECIAL[-1]]


def checkpoint(folder: Path) -> Path:
    """A tiny InternVL3 with a tokenizer: 2 x 2 visual tokens a tile of 56 pixels, three decoder layers."""
    from layouts import model_of, tiny, write

    card = tiny("internvl3-1b", vocab_size=len(VOCABULARY))
    model = model_of(card.but(text={"eos_token_id": 2}, image_token_id=len(VOCABULARY) - 1), seed=5)
    write(folder, model.state_dict(), model.config.to_dict())
    (folder / "tokenizer.json").write_text(_words())
    return folder


def _words() -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), "isolated")
    library.decoder = decoders.Fuse()
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return str(library.to_str())


def picture(width: int = 200, height: int = 100, seed: int = 0) -> Image.Image:
    """A picture of smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height))


def answered(
    method: str = "baseline",
    text: str | None = "a cat",
    cuts: list[Cut] | None = None,
    *,
    grid: Grid,
    status: str = "measured",
    dynamic: int = 100 << 20,
) -> Answer:
    """An answer as if it had been run."""
    sample = SampleRecord(
        "cat.png", visual_tokens=grid.tokens, answer=text, dynamic_peak_bytes=dynamic, peak_parts={"mlp": dynamic},
        tokens=TokenColumns([dynamic + (1 << 30)] * 3, [0] * 3, [0] * 3, [1 << 20] * 3, [None] * 3, [None] * 3),
    )  # fmt: skip
    spec = RunSpec("internvl2-2b", method, "folder", "cpu" if status == "measured" else "sim", weights="hub")
    record: Any = RunRecord(spec, status, static_bytes=1 << 30, visual_flops_cut=0.5, complete=True)
    return Answer(Run(record, [sample]), cuts or [])


def asked(grid: Grid, *answers: Answer, question: str = "what is this?", notes: list[str] | None = None) -> Asked:
    """A question about a picture of ``grid``, whose tiles are grey squares of 8 pixels a token."""
    ran = answers[0].run.record.status == "measured"
    edge = 8 * grid.across
    tiles = np.full((grid.tiles, edge, edge, 3), 200, dtype=np.uint8) if ran else None
    return Asked(
        question, "cat.png", picture(), "InternVL2-2B", "weights of here", grid, tiles, list(answers), notes or []
    )
