"""LLaVA-NeXT (LLaVA-1.6): CLIP over the whole image and its tiles, an MLP projector, and Vicuna or Mistral."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memprof.families import Model, _pieces
from memprof.families._anyres import AnyRes
from memprof.families._tiling import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from memprof.families._chat import Part


class LlavaNext(AnyRes):
    """LLaVA-NeXT (llava-hf)."""

    title = "LLaVA-NeXT"
    model_types = ("llava_next",)
    normalised_by = (CLIP_MEAN, CLIP_STD)
    # As LLaVA-1.5's: "USER: " with its BOS is 5 tokens of Llama's tokenizer; a newline (2) and " ASSISTANT:" (5) follow
    # the image. Mistral's "[INST] " and " [/INST]" are taken to be as long; Vicuna's system line, some 30 tokens more,
    # is counted where a tokenizer writes the prompt.
    template = (5, 2, 7)

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """``[INST] <image>``, a newline, the question, ``[/INST]`` over Mistral; else Vicuna's chat and system line.

        Source: the model cards of llava-hf/llava-v1.6-mistral-7b-hf and llava-hf/llava-v1.6-vicuna-7b-hf.
        """
        asked = [*(part for image in images for part in (*image, "\n")), question]
        if model.text["model_type"] == "mistral":
            return ["[INST] ", *asked, " [/INST]"]
        return [_SYSTEM, "USER: ", *asked, " ASSISTANT:"]

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' names, old and new; the tower's are one level flatter."""
        return _pieces.plain(_pieces.renamed(stored, _pieces.WITH_LINES))


_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
