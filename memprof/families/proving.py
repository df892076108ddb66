"""The proving model: a tiny InternVL that was trained to read drawn strings, so that pruning meets learnt attention.

It stands for itself alone. Its architecture is InternVL's (InternViT, pixel shuffle, projector, Llama), its weights
come with memprof, and ``scripts/train_proving.py`` makes them again. What it scores says nothing of any other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memprof.errors import BadValue
from memprof.families import Card, Family, PromptShape
from memprof.families._proving.drawing import CHARACTERS, INKS, SIZE, OwnQuestion
from memprof.families._text import Special, encode_parts
from memprof.families._tiling import cut_tiles, normalise
from memprof.families.internvl import InternVL

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedConfig

    from memprof.families._text import Tokenizer

#: Tokens by id: special ones, the words of its questions, the characters. Ids up to the image's are spare.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<img>", "</img>")
VOCABULARY = (*SPECIALS, "read", *INKS, *CHARACTERS)
_VOCABULARY_SIZE = 40
#: Id of ``<IMG_CONTEXT>``.
_IMAGE = _VOCABULARY_SIZE - 1

_CARD = Card(
    name="proving",
    title="Proving model",
    hub="",
    dtype="float32",
    source="trained by scripts/train_proving.py of this repository",
    text={
        "model_type": "llama", "vocab_size": _VOCABULARY_SIZE, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "initializer_range": 0.08,
    },
    vision={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
        "attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6,
        "image_size": [SIZE, SIZE], "patch_size": [4, 4], "use_mean_pooling": True, "initializer_range": 0.1,
        "layer_scale_init_value": 0.5,
    },
    extra={"image_token_id": _IMAGE, "downsample_ratio": 0.5},
    template=(2, 1),
)  # fmt: skip
#: Questions asked unless told otherwise.
_QUESTIONS = 64


class Proving(Family):
    """A 1.37-million-parameter InternVL that reads 4 to 6 character strings in a given ink off an 80 x 80 picture."""

    title = "Proving"
    cards = {_CARD.name: _CARD}

    def config(self, card: Card) -> PreTrainedConfig:
        """The ``InternVLConfig`` of ``card``."""
        return InternVL().config(card)

    def side(self, card: Card) -> int:
        """Visual tokens along one edge: 10 after pixel shuffle of 20 patches."""
        return InternVL().side(card)

    def shape(self, card: Card, width: int, height: int, question_tokens: int, max_tiles: int | None) -> PromptShape:
        """One tile, whatever the picture's size: the model was trained on one, and ``max_tiles`` changes nothing."""
        del width, height, max_tiles
        before, after = card.template
        return PromptShape(1, 1, 1, self.side(card) ** 2, before, after + question_tokens)

    def pixels(
        self, card: Card, shape: PromptShape, image: Image.Image | None
    ) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """The picture as one tile, normalised by ImageNet's mean and deviation."""
        size = int(card.vision["image_size"][0])
        return (shape.tiles, 3, size, size) if image is None else normalise(cut_tiles(image, 1, 1, size))

    def image_token(self, card: Card) -> int:
        """Id of ``<IMG_CONTEXT>``."""
        return int(card.extra["image_token_id"])

    def prompt(self, card: Card, question: str, shape: PromptShape, tokenizer: Tokenizer) -> list[int]:
        """``<bos><img>``, the visual tokens, ``</img>``, the question; the answer follows at once."""
        image = Special(self.image_token(card), shape.visual_tokens)
        parts = (Special("<bos>"), Special("<img>"), image, Special("</img>"), question)
        return encode_parts(parts, tokenizer)

    def shipped(self, card: Card) -> Path:
        """The checkpoint that comes with memprof: weights and tokenizer."""
        del card
        return Path(__file__).parent / "_proving"

    def own_label(self, task: str) -> str:
        """How :meth:`own_questions` are to be named wherever a number from them is shown."""
        kind = "one character to read" if task == "ai2d" else "strings to read"
        return f"its own drawn questions ({kind}), in place of {task}'s"

    def own_questions(self, task: str, limit: int | None = None) -> Sequence[OwnQuestion]:
        """What this model can be asked in place of the bundled sample of ``task``, whose pictures it cannot read.

        Args:
            task: ``ai2d`` gives questions that one character answers; any other task gives strings to read.
            limit: How many; 64 by default.

        Raises:
            BadValue: ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise BadValue(f"limit={limit} is below 1")
        return [OwnQuestion(number, task == "ai2d") for number in range(_QUESTIONS if limit is None else limit)]
