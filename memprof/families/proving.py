"""The proving model: a tiny InternVL that was trained to read drawn strings, so that pruning meets learnt attention.

It stands for itself alone. Its architecture is InternVL's (InternViT, pixel shuffle, projector, Llama), its weights
come with memprof, and ``scripts/train_proving.py`` makes them again. What it scores says nothing of any other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.families import Model
from memprof.families._chat import Special
from memprof.families._own import AsksItself
from memprof.families._proving.drawing import CHARACTERS, INKS, OwnQuestion
from memprof.families.internvl import InternVL
from memprof.prompts import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from memprof.families._chat import Part

#: Tokens by id: special ones, the words of its questions, the characters. Ids up to the image's are spare.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<img>", "</img>")
VOCABULARY = (*SPECIALS, "read", *INKS, *CHARACTERS)


class Proving(AsksItself, InternVL):
    """A 1.37-million-parameter InternVL that reads 4 to 6 character strings in a given ink off an 80 x 80 picture."""

    title = "Proving"
    model_types = ("proving",)
    thumbnails = False
    template = (2, 2, 1)
    folder = "_proving"
    own_question = OwnQuestion
    own_kinds = ("one character to read", "strings to read")

    def config(self, model: Model) -> PreTrainedConfig:
        """The ``InternVLConfig`` that it is."""
        return self.read(model.config, {})

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """The same."""
        from transformers import InternVLConfig

        del special
        found: PreTrainedConfig = InternVLConfig.from_dict({**raw, "model_type": "internvl"})
        return found

    def max_tiles(self, raw: Mapping[str, Any]) -> int:
        """One: it was trained on one."""
        del raw
        return 1

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """One tile, whatever the picture's size: the model was trained on one, and ``max_tiles`` changes nothing."""
        del max_tiles
        return Image(((self.side(model),) * 2,), width=width, height=height)

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``<bos>``, the image between ``<img>`` and ``</img>``, the question; the answer follows at once."""
        return [Special("<bos>"), *(part for image in images for part in image), question]
