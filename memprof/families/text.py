"""Text: every causal language model that transformers has. There is no image in its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memprof.errors import UsageError
from memprof.families import Family, Model, _pieces
from memprof.prompts import Image, Input

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from memprof.families._chat import Part


class Text(Family):
    """Causal language models (``*ForCausalLM``) of any maker."""

    title = "text"
    model_types = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
    sees = False
    template = (0, 0, 0)
    auto = "AutoModelForCausalLM"

    def knows(self, model_type: str) -> bool:
        """Whether transformers has a class called ``...ForCausalLM`` for it."""
        if super().knows(model_type):
            return True
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, "")
        return isinstance(found, str) and found.endswith("ForCausalLM")

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """As the base class has it; an encoder beside the decoder, or a tower before it, raises ValueError."""
        config = super().read(raw, special)
        if config.is_encoder_decoder:
            raise ValueError(
                f"a {raw['model_type']} reads with an encoder, and memprof run takes decoders alone; your own "
                "generate() of it is predicted inside memprof.weightless(config) and memprof.Profiler(model)"
            )
        if config.get_text_config() is not config:
            raise ValueError(
                f"a {raw['model_type']} is more than its language model, and memprof knows no family of it; your own "
                "generate() of it is predicted by memprof.predict(config, inputs)"
            )
        return config

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """None; raises UsageError."""
        raise UsageError(f"{model.title} is a language model and takes no images; ask it with text alone")

    def images(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> tuple[Image, ...]:
        """None of a sample's: its text alone is asked."""
        return ()

    def images_of(self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any]) -> list[Image]:
        """None."""
        return []

    def of_tiles(self, model: Model, tiles: int, images: int = 1) -> list[Image]:
        """None."""
        return []

    def lengths(self, images: Sequence[Image]) -> tuple[int, ...]:
        """Nothing beside the tokens."""
        return ()

    def inputs(self, model: Model, images: Sequence[Image], pictures: Any = None) -> dict[str, Input]:
        """Nothing beside ids and mask."""
        return {}

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """The text as it is: models without a chat template have none to be put in."""
        return [question]

    def pieces(self, stored: str, config: Any) -> list[_pieces.Piece]:
        """Transformers' own names."""
        return _pieces.plain(stored)
