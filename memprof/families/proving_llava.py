"""The second proving model: a tiny LLaVA that was trained to count and compare solid things on a textured ground.

It differs from the first (:mod:`memprof.families.proving`) where a ranking of visual tokens could be tuned to one: its
pictures are like photographs, what it is asked after covers several tokens that say nearly the same, and its tower is
CLIP's, with a class token that sums the picture up. ``scripts/train_proving_llava.py`` makes its weights again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.families import Model
from memprof.families._chat import Special
from memprof.families._own import AsksItself
from memprof.families._proving_llava.scenes import COLOURS, KINDS, NUMBERS, SAME, OwnQuestion
from memprof.families.llava import Llava

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig

    from memprof.families._chat import Part

#: Tokens by id: special ones, the words of its questions and answers. Ids up to the image's are spare.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
VOCABULARY = (*SPECIALS, "how", "many", "more", "or", *COLOURS, *KINDS, *NUMBERS, SAME)


class ProvingLlava(AsksItself, Llava):
    """A LLaVA of about a million parameters that counts and compares things on a 64 x 64 picture."""

    title = "Proving (LLaVA)"
    model_types = ("proving_llava",)
    template = (2, 1, 1)
    folder = "_proving_llava"
    own_question = OwnQuestion
    own_kinds = ("things to compare", "things to count")

    def config(self, model: Model) -> PreTrainedConfig:
        """The ``LlavaConfig`` that it is."""
        return self.read(model.config, {})

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """The same."""
        from transformers import LlavaConfig

        del special
        found: PreTrainedConfig = LlavaConfig.from_dict({**raw, "model_type": "llava"})
        return found

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``<bos> <user>``, the image, the question, ``<assistant>``: LLaVA's template, a token a word."""
        return [
            Special("<bos>"), Special("<user>"), *(part for image in images for part in image), question,
            Special("<assistant>"),
        ]  # fmt: skip
