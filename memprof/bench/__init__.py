"""The bench: a model on a device, and what prompts take there.

What is decided by the set-up, what is asked of it, how a prompt is generated and how predictions are recorded are kept
apart: :class:`~memprof.forecasts.Setup`, :class:`~memprof.forecasts.Ask`, :mod:`memprof.bench.generate`,
:mod:`memprof.bench.recorder`.

A predicting bench asks the book first (:mod:`memprof.forecasts.book`). Its model is built, and torch loaded, when
something must be recorded.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

from memprof.bench.outcome import Outcome, Standing, release
from memprof.environment import own_card
from memprof.errors import UsageError
from memprof.families import Model
from memprof.families._chat import Tokenizer
from memprof.forecasts import Ask, Setup
from memprof.forecasts.book import Book, Missing, Resident, memory_of
from memprof.forecasts.programs import Programs
from memprof.forks import forked
from memprof.meters import METERS, Meter, parts_of, static_parts
from memprof.meters.sim import SimMeter
from memprof.models.faults import CORRECT, runs
from memprof.models.tokenizer import load_tokenizer
from memprof.prompts import Image, Prompt, Shape
from memprof.pruning import Pruner
from memprof.tasks import Sample

if TYPE_CHECKING:
    from torch import nn

    from memprof.anatomy import Anatomy
    from memprof.bench.recorder import Head, Recorder

#: From so many distinct shapes on, copies of the process predict them side by side.
MANY = 16


def images_of(model: Model, sample: Sample, max_tiles: int | None = None) -> list[Sequence[Image]]:
    """What ``model`` is shown of each of a sample's pictures; nothing, where it sees none."""
    return [model.family.images(model, width, height, max_tiles) for width, height in sample.sizes()]


def shape_of(model: Model, sample: Sample, text_tokens: int, max_tiles: int | None = None) -> Shape:
    """Sizes of the prompt that asks ``text_tokens`` about a sample's pictures, as often as it runs side by side."""
    images = [image for own in images_of(model, sample, max_tiles) for image in own]
    return model.family.shape_of(model, images, text_tokens, sample.batch)



class Bench:
    """A model on a device, kept from one method to the next.

    Attributes:
        setup: What it is made for; :meth:`set_up` changes it.
        on_recording: Told of the prompts that predictions are made from: how many are recorded, and of how many.
    """

    def __init__(self, setup: Setup) -> None:
        self.on_recording: Callable[[int, int], None] = lambda done, total: None
        METERS.load(setup.device).check()
        if setup.device == "cuda":
            import torch

            if (card := own_card(torch.cuda.device_count())) is not None:
                torch.cuda.set_device(card)
        self.setup, self.book = setup, Book()
        self._models: dict[int, tuple[nn.Module, Meter]] = {}
        self._recorders: dict[Any, Recorder] = {}
        self._heads: dict[Setup, Head] = {}
        self._predicted: dict[Any, Outcome] = {}
        self._coming: dict[Any, Iterator[Outcome | None]] = {}  # what copies of this process are predicting, in order

    @property
    def model(self) -> Model:
        """What is known of the model."""
        return self.setup.model

    @property
    def predicts(self) -> bool:
        """Whether nothing runs here."""
        return METERS.load(self.setup.device).status == "predicted"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own; random weights bring none, so theirs is the one on the hub."""
        return load_tokenizer(self.model, "hub" if self.setup.weights == "random" else self.setup.weights)

    def set_up(self, setup: Setup) -> Bench:
        """This bench for another set-up; what was built for the one before is let go of."""
        if setup != self.setup:
            for kept in (self._models, self._recorders, self._predicted):
                kept.clear()
            if (setup.model, setup.weights) != (self.setup.model, self.setup.weights):
                vars(self).pop("tokenizer", None)
            gc.unfreeze()
            release(self.setup.device)
            self.setup = setup
        return self

    def prompt(self, sample: Sample, max_tiles: int | None = None) -> Prompt:
        """What ``sample`` asks: its question and pictures where weights are real and run, else its sizes alone."""
        tokens, family = sample.text_tokens, self.model.family
        asked = bool(sample.question) and self.setup.weights != "random" and not self.predicts
        shown = images_of(self.model, sample, max_tiles)
        if asked:
            images = [image for own in shown for image in own]
            pictures = [one.image() for one, own in zip(sample.pictures, shown, strict=True) for _ in own]
            prompt = family.written(self.model, sample.question, images, self.tokenizer, pictures)
            return dataclasses.replace(prompt, shape=dataclasses.replace(prompt.shape, batch=sample.batch))
        if tokens is None:
            tokens = len(self.tokenizer.encode(sample.question))
        return Prompt(shape_of(self.model, sample, tokens, max_tiles))

    def ready(self) -> tuple[nn.Module, Meter]:
        """The model and its meter."""
        depth = self.model.layers
        if depth not in self._models:
            self._of_depth(depth)
            gc.freeze()  # garbage is collected before every sample: it need not walk through all of transformers
        return self._models[depth]

    def _of_depth(self, depth: int) -> tuple[nn.Module, Meter]:
        """The model with ``depth`` decoder layers, and its meter."""
        if depth not in self._models:
            from memprof.models.build import build_model

            setup = self.setup
            built = build_model(
                self.model.of_depth(depth), device=setup.device, dtype=setup.dtype, weights=setup.weights,
                attention=setup.attention, seed=setup.seed,
            )  # fmt: skip
            self._models[depth] = built, METERS.load(setup.device).on(built, setup.gpu)
        return self._models[depth]

    # -- what stands before the first prompt ---------------------------------------------------------------------------

    def standing(self, pruner: Pruner, manner: str) -> Standing:
        """What is there before a prompt is generated from; in a prediction from the book, if it knows.

        Raises:
            DoesNotFit: The weights alone do not fit on the card that is predicted for.
        """
        if not self.predicts:
            model, meter = self.ready()
            return Standing(
                meter.static_bytes, static_parts(model, meter), self._built().attention, meter.environment()
            )
        resident = self._resident(pruner, manner)
        loaded = self.book.loaded(resident, self.setup.gpu)
        total = loaded.allocator.allocated
        weights = [(group, n_bytes) for _, n_bytes, group in resident.weights]
        parts = parts_of(weights, loaded.workspace_bytes, total, "rounding")
        return Standing(total, parts, resident.attention, loaded.card.environment())

    def notes(self) -> list[str]:
        """What a reader must know of how it was measured; nothing of a prediction."""
        return [] if self.predicts else self.ready()[1].notes()

    def _resident(self, pruner: Pruner, manner: str) -> Resident:
        """The model as a prediction needs it; it is built where the book does not know it."""
        entry = self.book.entry(self.setup, pruner, manner)
        if entry.resident is None:
            entry.resident = self._built()
        return entry.resident

    def _built(self) -> Resident:
        """The model as it was built."""
        from memprof.anatomy import anatomy
        from memprof.meters import weights_of

        model, meter = self.ready()
        where = anatomy(model)
        weights = [(name, weight.untyped_storage().nbytes()) for name, weight in weights_of(model)]
        return Resident(
            tuple((name, n_bytes, where.weight_group(name)) for name, n_bytes in weights),
            isinstance(meter, SimMeter) and meter.biased,
            _attention_of(where),
        )

    # -- what is asked -------------------------------------------------------------------------------------------------

    def foresee(self, asks: Iterable[Ask]) -> None:
        """Be told what will be asked: where predicting, a few recordings then answer for all of it."""
        alike: dict[tuple[Pruner, str, int], list[Ask]] = {}
        for ask in asks if self.predicts else ():
            alike.setdefault((ask.pruner, ask.manner, ask.new_tokens), []).append(ask)
        for (_, manner, new_tokens), like in alike.items():
            shapes, programs = [ask.shape for ask in like], self._programs(like[0])
            if all(programs.answer(shape, new_tokens) for shape in dict.fromkeys(shapes)):
                continue
            if self._recorder(like[0]).foresee(shapes, new_tokens):
                self._resident(like[0].pruner, manner)
                self.book.write(self.setup, manner, self.book.entry(self.setup, like[0].pruner, manner))

    @contextmanager
    def ahead(self, asks: Sequence[Ask]) -> Iterator[None]:
        """:meth:`foresee`, and, inside, copies of this process predict what will be asked for, in that order."""
        self.foresee(asks)
        missing = {key: ask for ask in asks if (key := ask.key) not in self._predicted}
        if len(missing) < MANY or not self.predicts:
            yield
            return
        with closing(forked(self._predict, list(missing.values()), chunk=4)) as predictions:
            self._coming = dict(zip(missing, repeat(predictions)))
            try:
                yield
            finally:
                self._coming.clear()

    def _await(self, key: Any) -> None:
        """Take in what the copies predicted, up to ``key``."""
        try:
            while key in self._coming:
                first = next(iter(self._coming))
                prediction = next(self._coming.pop(first))
                if prediction is not None:
                    self._predicted[first] = prediction
        except Exception:  # whatever it is about, that sample will meet it here, and say so
            self._coming.clear()

    def knows(self, ask: Ask) -> bool:
        """Whether nothing need be recorded, or run, to answer."""
        return self.predicts and self._programs(ask).answer(ask.shape, ask.new_tokens)

    def outcome(self, ask: Ask) -> Outcome:
        """Profile a prompt, or random text of its sizes: on a predicting meter once for each distinct shape."""
        if not self.predicts:
            return self.profile(ask)
        key = ask.key
        self._await(key)
        if key not in self._predicted:
            self.foresee([ask])  # so that the book knows it next time
            self._predicted[key] = self._predict(ask) or self.profile(ask)
        return self._predicted[key]

    def written(self, ask: Ask) -> Prompt:
        """What is generated from: the prompt as it is, or random text of its sizes."""
        if ask.prompt.ids is not None:
            return ask.prompt
        return self.model.family.drawn(self.model, ask.shape, ask.seed)

    def profile(self, ask: Ask, built: tuple[nn.Module, Meter] | None = None) -> Outcome:
        """Generate and watch, whether or not programs could answer; ``built`` None: with the whole model."""
        from memprof.bench.generate import profile_prompt

        model, meter = built or self.ready()
        prompt = self.written(ask)
        with ExitStack() as entered:
            if self.predicts:
                entered.enter_context(runs(f"{self.model.title}'s configuration", CORRECT))
            for around in ask.around:
                entered.enter_context(around.enter(model))
            return profile_prompt(model, meter, ask.pruner, ask.stack, prompt, new_tokens=ask.new_tokens, seed=ask.seed)

    # -- predicted -----------------------------------------------------------------------------------------------------

    def _predict(self, ask: Ask) -> Outcome | None:
        """What a program says of a shape, or None where none answers for it, nor can be made to."""
        said = self.book.forecast(self.setup, ask)
        if isinstance(said, Missing):
            forecast = self._recorder(ask).forecast(ask.shape, ask.new_tokens)
            if forecast is None:
                return None
            said = memory_of(forecast, self.setup, ask)
        return Outcome(said, None)

    def _programs(self, ask: Ask) -> Programs:
        """What the book knows of a method."""
        return self.book.entry(self.setup, ask.pruner, ask.manner).programs.under(ask.pruner)

    def _recorder(self, ask: Ask) -> Recorder:
        """What makes the programs of a method, and adds to those of the book; the model is built for it."""
        from memprof.bench.recorder import Head, Recorder

        key = ask.pruner.like, ask.manner  # what is kept is a length, not another program
        if key not in self._recorders:
            from memprof.anatomy import anatomy, same_form

            (model, meter), seed = self.ready(), self.setup.seed
            assert isinstance(meter, SimMeter)
            self._recorders[key] = Recorder(
                self.book.entry(self.setup, *key).programs, meter, self._of_depth,
                lambda model, meter, pruner, shape, new_tokens: self.profile(
                    Ask(pruner, ask.stack, Prompt(shape), new_tokens, seed, ask.around), (model, meter)
                ),
                lambda done, total: self.on_recording(done, total),
                self._heads.setdefault(self.setup, Head()),
                alike=self.setup.model.alike and same_form([layer for _, layer in anatomy(model).layers]),
            )  # fmt: skip
        return self._recorders[key].under(ask.pruner)


def _attention_of(where: Anatomy) -> str:
    """Attention that the language model runs: layers without any may stand beside those that have it, or be all."""
    from memprof.anatomy import attention_in

    for _, layer in where.layers:
        with suppress(UsageError):
            return str(getattr(getattr(attention_in(layer), "config", None), "_attn_implementation", "none"))
    return "none"
