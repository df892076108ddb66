"""Model families: one file each, which says all that must be known of a family's models.

A model is a configuration: the checkpoint's own ``config.json`` and a few facts. The family is found by its
``model_type``; it says how an image stands in a prompt, what ``generate()`` is given, and what a checkpoint calls its
tensors. Nothing here imports torch at module level: ``memprof list`` reads families without it. A package of somebody
else's adds one by the entry point ``memprof.families``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from memprof.errors import UsageError
from memprof.families._chat import Part, Special, encode_parts
from memprof.families._tiling import IMAGENET_MEAN, IMAGENET_STD, centres, denormalise
from memprof.plugins import Registry
from memprof.prompts import Image, Input, Places, Prompt, Shape

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedConfig

    from memprof.families._chat import Tokenizer
    from memprof.families._pieces import Piece


@dataclass(frozen=True)
class Model:
    """One model: what its bytes follow from.

    Attributes:
        name: What finds it again: memprof's name for it, a hub id, or a path.
        title: Its name in figures, e.g. ``InternVL2-2B``.
        family: What knows its kind.
        config: Its ``config.json`` as transformers lays it out, with every size in it.
        hub: Hub repository whose weights ``--weights hub`` loads.
        dtype: The dtype it was published in.
        source: Where the numbers of its configuration come from.
        template: Text tokens the chat template puts before the first image and behind the last; the question is none.
        max_tiles: Largest number of tiles without thumbnail, or 1 where the family does not tile.
    """

    name: str
    title: str
    family: Family
    config: Mapping[str, Any] = field(hash=False)
    hub: str = ""
    dtype: str = "bfloat16"
    source: str = ""
    template: tuple[int, int] = (0, 0)
    max_tiles: int = 1

    @property
    def text(self) -> Mapping[str, Any]:
        """The language model's part of the configuration; all of it where it has no parts."""
        found: Mapping[str, Any] = self.config.get("text_config", self.config)
        return found

    @property
    def vision(self) -> Mapping[str, Any]:
        """The vision tower's part of the configuration."""
        found: Mapping[str, Any] = self.config.get("vision_config", {})
        return found

    @property
    def layers(self) -> int:
        """Decoder layers of the language model."""
        return int(self.text[self._called("num_hidden_layers")])

    @property
    def hidden(self) -> int:
        """Numbers in a hidden state of the language model."""
        return int(self.text[self._called("hidden_size")])

    @property
    def ffn(self) -> int:
        """Width of its feed-forward network; four times a hidden state where nothing is said, as in GPT-2.

        Of a mixture: that of one expert, as often as a token is sent to one.
        """
        experts = int(self.text.get("num_experts_per_tok") or 1)
        own = self.text.get("moe_intermediate_size") or self.text.get(self._called("intermediate_size"))
        return int(own) * experts if own else 4 * self.hidden

    def _called(self, name: str) -> str:
        """What the configuration calls the number that most call ``name``."""
        return next((key for key in (name, *_ALSO[name]) if key in self.text), name)

    @property
    def kv_numbers(self) -> int:
        """Numbers that one token's keys take in one layer's cache; its values take as many."""
        heads = int(self.text[self._called("num_attention_heads")])
        head = self.text.get("head_dim") or self.hidden // heads
        return int(self.text.get("num_key_value_heads") or heads) * int(head)

    @property
    def positions(self) -> int:
        """Positions the language model has."""
        return int(self.text.get(self._called("max_position_embeddings"), 32768))

    @property
    def alike(self) -> bool:
        """Whether the configuration says the same of every decoder layer, so that a few of them may tell of all."""
        each = (said for said in self.text.values() if isinstance(said, list | tuple) and len(said) == self.layers)
        return not any(one != said[0] for said in each for one in said)

    def but(self, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **top: Any) -> Model:
        """This model with entries of its configuration replaced: the language model's, the tower's, those beside."""
        config = {**self.config, **top}
        for key, changes in (("text_config", text), ("vision_config", vision)):
            if changes and key in config:
                config[key] = {**config[key], **changes}
            elif key == "text_config":
                config |= changes or {}
        return dataclasses.replace(self, config=config)

    def of_depth(self, layers: int) -> Model:
        """This model with so many decoder layers."""
        text: dict[str, Any] = {self._called("num_hidden_layers"): layers}
        if "layer_types" in self.text:
            text["layer_types"] = self.text["layer_types"][:layers]
        return self if layers == self.layers else self.but(text=text)


#: What some configurations call the numbers that most call otherwise.
_ALSO: Mapping[str, Sequence[str]] = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}


class Family:
    """Base of the families.

    A subclass names its :attr:`model_types`, says how an image stands in a prompt (:meth:`image`), what a picture
    becomes (:meth:`pixels`), and how a question is put (:meth:`parts`). Everything else has a default that holds for
    most: one placeholder a visual token, one ``pixel_values``, transformers' own names.
    """

    title: ClassVar[str]
    #: What ``model_type`` in a ``config.json`` may be.
    model_types: ClassVar[tuple[str, ...]]
    #: Whether the whole image follows its tiles once more.
    thumbnails: ClassVar[bool] = False
    #: Text tokens of the chat template before the first image, between two, and behind the last.
    template: ClassVar[tuple[int, int, int]] = (0, 1, 0)
    #: Mean and deviation, in RGB from 0 to 1, that :meth:`pixels` normalises by.
    normalised_by: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]] = (IMAGENET_MEAN, IMAGENET_STD)
    #: Most images of a prompt, and prompts side by side, that a search for what fits looks at: fewer where a prediction
    #: of many takes long, as a model goes through each in steps of its own, or looks at their numbers.
    searched_images: ClassVar[int] = 128
    searched_prompts: ClassVar[int] = 256
    #: Types of vision towers whose tokens it counts, beside the one that transformers has where none is named.
    towers: ClassVar[tuple[str, ...]] = ()
    #: Whether its models take images.
    sees: ClassVar[bool] = True
    #: Transformers' class that builds them.
    auto: ClassVar[str] = "AutoModelForImageTextToText"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def knows(self, model_type: str) -> bool:
        """Whether models of this ``model_type`` are of the family."""
        return model_type in self.model_types

    # -- its configuration ---------------------------------------------------------------------------------------------

    def read(self, raw: Mapping[str, Any], special: Mapping[str, int]) -> PreTrainedConfig:
        """What a checkpoint's ``config.json`` says, as transformers has it.

        Args:
            raw: The file.
            special: Ids of the tokenizer's special tokens, where the checkpoint has one.

        Raises:
            ValueError: A variant memprof does not run.
            KeyError: The file lacks an entry.
        """
        del special
        return _transformers_config(raw)

    def of_processor(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint's ``preprocessor_config.json`` adds to its configuration."""
        del raw
        return {}

    def config(self, model: Model) -> PreTrainedConfig:
        """The transformers configuration of ``model``."""
        return _transformers_config(model.config)

    def max_tiles(self, raw: Mapping[str, Any]) -> int:
        """Most tiles, thumbnail excluded, that an image of a model with the ``config.json`` in ``raw`` is cut into."""
        del raw
        return 1

    # -- its prompts ---------------------------------------------------------------------------------------------------

    def image(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> Image:
        """How an image of ``width`` x ``height`` pixels stands in a prompt; ``max_tiles`` None: the model's own."""
        raise NotImplementedError

    def images(self, model: Model, width: int, height: int, max_tiles: int | None = None) -> tuple[Image, ...]:
        """What is shown of a sample's picture: one image, or nothing where the model sees none."""
        return (self.image(model, width, height, max_tiles),)

    def pixels(self, model: Model, image: Image, picture: Picture | None) -> npt.NDArray[np.float32] | tuple[int, ...]:
        """What the tower is given of one image, ``(tiles, 3, height, width)``; its shape where ``picture`` is None."""
        raise NotImplementedError

    def parts(self, model: Model, question: str, images: Sequence[Sequence[Part]]) -> list[Part]:
        """A whole prompt in the model's chat template: ``images`` as :meth:`placeholders` writes them, and the text."""
        raise NotImplementedError

    def image_token(self, model: Model) -> int:
        """Id of the placeholder of a visual token."""
        found = model.config.get("image_token_id", model.config.get("image_token_index"))
        return int(found if found is not None else -1)

    def placeholders(self, model: Model, image: Image) -> Sequence[Part]:
        """How an image stands in a prompt."""
        return [Special(self.image_token(model), image.tokens)]

    def ids(self, model: Model, image: Image) -> list[int]:
        """The same as ids, where there is no tokenizer: each visual token, and what :attr:`Image.marks` counts."""
        return [self.image_token(model)] * image.tokens + [MARK] * image.marks

    def inputs(
        self, model: Model, images: Sequence[Image], pictures: Sequence[Picture] | None = None
    ) -> dict[str, Input]:
        """What ``generate()`` is given beside ids and mask; without ``pictures`` only the sizes."""
        if not images:
            return {}
        found = [self.pixels(model, one, pictures[i] if pictures else None) for i, one in enumerate(images)]
        known = [values for values in found if isinstance(values, np.ndarray)]
        if known:
            return {"pixel_values": Input.of(np.concatenate(known))}
        sizes = [size for size in found if isinstance(size, tuple)]
        return {"pixel_values": Input((sum(size[0] for size in sizes), *sizes[0][1:]))}

    def of_ids(self, model: Model, ids: Sequence[int]) -> dict[str, Input]:
        """What ``generate()`` is given that is read off a prompt's ids."""
        del model, ids
        return {}

    def lengths(self, images: Sequence[Image]) -> tuple[int, ...]:
        """What sizes grow with beside the tokens: the number of tiles, unless the family knows more."""
        return (sum(image.tiles for image in images),)

    def seen(self, model: Model, image: Image, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """One image as the model is given it, from its ``pixel_values``: RGB views, ``(views, height, width, 3)``."""
        return denormalise(pixels.reshape(-1, *pixels.shape[-3:])[: image.tiles], *self.normalised_by)

    def positions(self, image: Image) -> npt.NDArray[np.float32]:
        """Centre of each visual token on the whole image, ``(tokens, 2)`` as x, y in units of the image's edges.

        Tokens of a tile run row by row. The thumbnail's tokens lie over the same image at a coarser pitch. The TopV
        paper leaves images of several tiles open: memprof chose one coordinate system for all of them, so that
        neighbours across a tile's edge are neighbours.
        """
        grid, found = np.array([image.columns, image.rows], dtype=np.float32), []
        for number, (across, down) in enumerate(image.grids):
            view = centres(across, down)
            row, column = divmod(number, image.columns)
            whole = number >= image.columns * image.rows
            found.append(view if whole else (view + np.array([column, row], dtype=np.float32)) / grid)
        return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.float32)

    def tiled(self, model: Model, tiles: int) -> Image:
        """An image of so many tiles in all, however they lie: what a question about sizes asks for."""
        one = self.image(model, 1, 1, 1)
        return dataclasses.replace(one, grids=one.grids * tiles, columns=tiles, rows=1, width=0, height=0)

    def of_tiles(self, model: Model, tiles: int, images: int = 1) -> list[Image]:
        """What a prompt of so many images shows, each of so many tiles: one image of all, as they are one batch."""
        return [self.tiled(model, tiles * images)]

    def one_batch(self, model: Model) -> bool:
        """Whether the tiles of several images are one batch, as those of one image are."""
        return len(self.of_tiles(model, 1, 2)) == 1

    def most_tiles(self, model: Model) -> int:
        """Views of the image that is cut into the most."""
        return model.max_tiles + (self.thumbnails and model.max_tiles > 1)

    def images_of(self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any]) -> list[Image]:
        """How the images of a prompt stand in it, as far as its ids and a processor's tensors tell.

        Bytes follow from what they tell. How the tiles of an image lie does not always: such an image has no width and
        no height.

        Args:
            model: The model.
            ids: The prompt's.
            inputs: What a processor made beside them, by name; arrays of numpy or torch.

        Raises:
            UsageError: The visual tokens are those of no images of this family.
        """
        del inputs
        one, found = self.image(model, 1, 1, 1), list[Image]()
        for tokens in runs_of(ids, self.image_token(model)):
            views, rest = divmod(tokens, one.tokens)
            if rest:
                raise UsageError(f"{tokens} visual tokens stand together, and a view of {model.title} has {one.tokens}")
            found += [self.tiled(model, views)] if model.max_tiles > 1 else [one] * views
        return found

    # -- put together --------------------------------------------------------------------------------------------------

    def shape_of(self, model: Model, images: Sequence[Image], question_tokens: int, batch: int = 1) -> Shape:
        """Sizes of the prompt that asks ``question_tokens`` about ``images``, of which there may be none."""
        before, behind = model.template
        text = (before, *[self.template[1]] * (len(images) - 1), behind) if images else (before + behind,)
        return Shape(tuple(images), text, self.lengths(images), batch).longer(question_tokens)

    def shape(self, model: Model, width: int, height: int, question_tokens: int, max_tiles: int | None = None) -> Shape:
        """Sizes of the prompt that asks ``question_tokens`` about one image of ``width`` x ``height`` pixels."""
        return self.shape_of(model, self.images(model, width, height, max_tiles), question_tokens)

    def written(
        self,
        model: Model,
        question: str,
        images: Sequence[Image],
        tokenizer: Tokenizer,
        pictures: Sequence[Picture] | None = None,
    ) -> Prompt:
        """The prompt that asks ``question`` about ``images``, by the checkpoint's own tokenizer.

        Tokens can merge across the template's edges, so how long its texts are is counted in the whole prompt.
        """
        ids = encode_parts(self.parts(model, question, [self.placeholders(model, one) for one in images]), tokenizer)
        return self._placed(model, images, ids, self.inputs(model, images, pictures))

    def drawn(self, model: Model, shape: Shape, seed: int = 0, pictures: Sequence[Picture] | None = None) -> Prompt:
        """A prompt of the sizes in ``shape``, its text drawn at random: bytes follow from lengths alone."""
        last = int(model.text["vocab_size"])
        highest = min(self.image_token(model) if shape.images else last, last)
        draw = np.random.default_rng(seed)
        text = iter([int(token) for token in draw.integers(10, highest - 10, sum(shape.text))])
        ids = [next(text) for _ in range(shape.text[0])]
        for image, behind in zip(shape.images, shape.text[1:], strict=True):
            ids += [*self.ids(model, image), *(next(text) for _ in range(behind))]
        inputs = self.inputs(model, shape.images, pictures)
        return dataclasses.replace(self._placed(model, shape.images, ids, inputs), shape=shape)

    def given(
        self, model: Model, ids: Sequence[int], inputs: Mapping[str, Any], sizes: Sequence[tuple[int, int]] = ()
    ) -> Prompt:
        """The prompt that somebody's processor made.

        Args:
            model: The model.
            ids: Its tokens.
            inputs: What stands beside them, by name; arrays of numpy or torch.
            sizes: Width and height of its images in pixels, which are then cut into as many tiles as there are; where
                there are none, images are as the inputs tell (:meth:`images_of`).

        Raises:
            UsageError: The prompt has other visual tokens than its images.
        """
        there = list(ids).count(self.image_token(model))
        ways: Iterable[list[Image]] = [self.images_of(model, ids, inputs)] if not sizes else (
            [self.image(model, *size, most) for size in sizes] for most in (None, *range(model.max_tiles, 0, -1))
        )  # fmt: skip
        told = dict[int, list[Image]]()
        for images in ways:
            told.setdefault(sum(image.tokens for image in images), images)
            if there in told:
                found = self._placed(model, told[there], list(ids), {})
                known = all(image.tiles == 1 or image.width for image in told[there])
                assert found.places is not None
                return found if known else dataclasses.replace(found, places=found.places.unplaced())
        raise UsageError(f"the prompt has {there} visual tokens, and its images {next(iter(told))}")

    def _placed(self, model: Model, images: Sequence[Image], ids: list[int], inputs: Mapping[str, Input]) -> Prompt:
        """The prompt of these ids: where its visual tokens are, and so how long its texts are."""
        index = np.flatnonzero(np.asarray(ids) == self.image_token(model)).astype(np.int64)
        whose = np.repeat(np.arange(len(images)), [image.tokens for image in images]).astype(np.int64)
        at = [self.positions(image) for image in images]
        by_view = not any(image.views for image in images)
        positions = np.concatenate(at) if at else np.zeros((0, 2), dtype=np.float32)
        places = Places(len(ids), index, positions, whose, by_view)
        text, end = list[int](), 0
        for number, image in enumerate(images):
            own = index[whose == number]
            text.append(int(own[0]) - end)
            end = int(own[0]) + image.tokens + image.marks
        shape = Shape(tuple(images), (*text, len(ids) - end), self.lengths(images))
        return Prompt(shape, ids, {**inputs, **self.of_ids(model, ids)}, places)

    # -- its checkpoints -----------------------------------------------------------------------------------------------

    def pieces(self, stored: str, config: Any) -> list[Piece]:
        """The parameters that the tensor called ``stored`` holds; none for a buffer the model makes for itself."""
        from memprof.families import _pieces

        return _pieces.plain(_pieces.renamed(stored, _pieces.HF))

    def shipped(self, model: Model) -> Path | None:
        """The folder of the weights that come with memprof, or None."""
        del model
        return None

    def own_questions(self, task: str, limit: int | None = None) -> Sequence[Any]:
        """What stands in for the bundled sample of ``task`` where weights are shipped that know nothing else."""
        del task, limit
        return ()

    def own_label(self, task: str) -> str:
        """How :meth:`own_questions` are to be named wherever a number from them is shown."""
        return task


def runs_of(ids: Sequence[int], token: int) -> list[int]:
    """How many of ``token`` stand together, for each time that they do, in order."""
    return [len(list(run)) for own, run in groupby(ids, key=lambda one: one == token) if own]


#: Stands for a text token of which only the count is known.
MARK = 10


def _transformers_config(raw: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration in ``raw`` by transformers' own class for its ``model_type``."""
    from transformers import AutoConfig

    kind = AutoConfig.for_model(raw["model_type"])
    found: PreTrainedConfig = type(kind).from_dict(dict(raw))
    return found


FAMILIES: Registry[Family] = Registry("memprof.families", Family, "family", entry_points="memprof.families")
