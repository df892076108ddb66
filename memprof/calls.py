"""A program's own ``generate()`` calls, each one sample of one run.

The model is the caller's, and so is every argument: nothing is asked of it but to call ``model.generate()``. The method
is wrapped on this one model while :class:`Calls` is entered; every call then has a profiler's window of its own, begins
from an emptied cache, and gives back what it would have given.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from memprof.anatomy import anatomy, attention_in
from memprof.bench.outcome import release
from memprof.environment import environment
from memprof.errors import MemprofError, UsageError
from memprof.families import Model
from memprof.files import first_line
from memprof.meters import METERS, meter_for, static_parts
from memprof.models.find import named, of_config, plain_config
from memprof.profiler import Profiler
from memprof.pruning import method_spec, visual_flops_cut
from memprof.pruning.surgery import Surgery, entered_on
from memprof.records import GIVEN, Run, RunRecord, RunSpec, SampleRecord, summarize

#: Stands where a run's task would.
TASK = "generate"
#: How its data are named.
LABEL = "calls of generate()"
#: The note of a window in which nothing was generated.
NOTHING = "generate() was not called while the window was open"
#: What the error of a call that could not be counted begins with; the reason follows.
NOT_PROFILED = "not profiled: "
#: The note of calls that did not all begin from the same static bytes.
GROWN = (
    "the program held more before some calls than before others (outputs kept, workspaces made by the first); each "
    "dynamic peak is above what was there before its own call"
)


class Calls:
    """Profiles every ``generate()`` of ``model`` while it is entered, which may be more than once.

    Args:
        model: A transformers model that generates: measured where its weights are, predicted where it has none
            (:func:`memprof.api.weightless`).
        refusing: Whether a call that cannot be profiled is ended (:class:`~memprof.profiler.Profiler`), or goes on and
            is a sample that failed.

    Raises:
        UsageError: ``model`` does not generate, or memprof finds no decoder layers in it.

    Attributes:
        run: What was found so far: a sample a call, also of a call that ended by an exception. Complete once the window
            has ended.
        refused: Why the last call counts for nothing, or None.
    """

    def __init__(self, model: nn.Module, *, refusing: bool = True) -> None:
        if not callable(getattr(model, "generate", None)):
            raise UsageError(f"{type(model).__name__} has no generate() to profile")
        self.model, self.meter, self._layers = model, meter_for(model), len(anatomy(model).layers)
        self._own: Any = None  # the generate() that stands on the model itself, as on a lent one
        self._inside, self._refusing, self.meter.lines = threading.local(), refusing, True
        self._statics, self._thread = set[int](), 0
        self.refused: str | None = None
        raw = plain_config(model)
        try:
            self._known: Model | None = of_config(raw)
        except MemprofError:
            self._known = None
        name = str(raw.get("_name_or_path") or type(model).__name__) if self._known is None else self._known.name
        weight, attention, there = next(model.parameters()), _attention_of(model), self.meter.environment()
        spec = RunSpec(
            model=name, method="baseline", task=TASK, device=METERS.name_of(type(self.meter)), data=GIVEN,
            weights=GIVEN, dtype=str(weight.dtype).removeprefix("torch."), attention=attention, max_new_tokens=0,
            warmup=0, gpu=there["gpu"] if self._predicts and there["gpu_memory_bytes"] is not None else None,
        )  # fmt: skip
        found = {"dtype": spec.dtype, "attention": {"asked": attention, "got": attention}, **there}
        record = RunRecord(
            spec, self.meter.status, environment() | found, layers=self._layers, data_label=LABEL,
            configuration=None if name in named() else raw,
        )  # fmt: skip
        self.run = Run(record, [])
        self._set_static(self.meter.static_bytes)

    @property
    def _predicts(self) -> bool:
        return self.meter.status == "predicted"

    def rest(self) -> None:
        """Let go of the model, which may be the last to hold it, until :meth:`resume`."""
        del self.model, self.meter

    def resume(self, model: nn.Module) -> Calls:
        """Go on with the same ``model``."""
        self.model, self.meter = model, meter_for(model)
        self.meter.lines = True
        return self

    def __enter__(self) -> Calls:
        model: Any = self.model
        self._own, self._thread = vars(model).get("generate"), threading.get_ident()
        model.generate = self._wrapped(model.generate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        model: Any = self.model
        vars(model).pop("generate", None)
        if self._own is not None:
            model.generate = self._own
        record = self.run.record
        record.complete, record.samples_asked = True, len(self.run.samples)
        record.notes = [note for note in record.notes if note != NOTHING] + [NOTHING] * (not self.run.samples)
        record.totals = summarize(self.run)

    def _wrapped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def profiled(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "open", False):  # a generate() that asks another of the same model is one call
                return generate(*args, **kwargs)
            if not self._refusing and threading.get_ident() != self._thread:  # not what was entered for
                return generate(*args, **kwargs)
            surgery = entered_on(self.model)
            self._set_method(surgery)
            sample = SampleRecord(f"call-{len(self.run.samples) + 1}", **self._sizes(args, kwargs))
            profiler = Profiler(
                self.model, self.meter, given=_tensors((args, kwargs)), refusing=self._refusing
            )
            release(self.run.record.spec.device)
            self._inside.open = True
            try:
                with _seen(), profiler:
                    self._set_static(self.meter.static_bytes)
                    return generate(*args, **kwargs)
            except BaseException as error:
                sample.status = "oom" if isinstance(error, torch.cuda.OutOfMemoryError) else "failed"
                sample.error = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
                if isinstance(error, torch.cuda.OutOfMemoryError) and profiler.died is not None:
                    sample.error = profiler.died.words(error)
                raise
            finally:
                self._inside.open = False
                self._note(sample, profiler, surgery)

        return profiled

    # -- what is noted -------------------------------------------------------------------------------------------------

    def _set_method(self, surgery: Surgery | None) -> None:
        """Note what prunes the model now; one run has one method."""
        record = self.run.record
        method = "baseline" if surgery is None else method_spec(surgery.pruner)
        if self.run.samples and method != record.spec.method:
            raise UsageError(
                f"the calls before ran under {record.spec.method} and this one runs under {method}; open a window for "
                "each method"
            )
        record.spec.method = method
        record.environment["positions"] = "original" if surgery is None else surgery.pruner.positions

    def _set_static(self, n_bytes: int) -> None:
        """Note what was allocated before a call, beside what it was given: of several, what was there in any case."""
        record, first = self.run.record, not self.run.samples
        self._statics = {n_bytes} if first else {*self._statics, n_bytes}
        if first or n_bytes < record.static_bytes:
            record.static_bytes = n_bytes
            rest = None if self._predicts else "workspaces, rounding and what the program holds"
            record.static_parts = static_parts(self.model, self.meter, rest)

    def _sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes of the prompt that a call is given, as far as its ids and its tensors tell them."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not isinstance(ids, torch.Tensor) or isinstance(ids, FakeTensor) or ids.ndim != 2 or not len(ids):
            embedded = kwargs.get("inputs_embeds")
            return {"text_tokens": int(embedded.shape[1])} if isinstance(embedded, torch.Tensor) else {}
        row = ids[0].tolist()
        if self._known is None:  # most of transformers' configurations name what stands for an image
            config = getattr(self.model, "config", None)
            token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
            return {"visual_tokens": row.count(token), "text_tokens": len(row) - row.count(token)}
        try:
            shape = self._known.family.given(self._known, row, kwargs).shape
        except (MemprofError, ArithmeticError, LookupError, TypeError, ValueError):
            visual = row.count(self._known.family.image_token(self._known))
            return {"visual_tokens": visual, "text_tokens": len(row) - visual}
        shape = dataclasses.replace(shape, batch=len(ids))
        return {"shape": shape, "tiles": shape.tiles, "visual_tokens": shape.visual_tokens,
                "text_tokens": shape.text_tokens}  # fmt: skip

    def _note(self, sample: SampleRecord, profiler: Profiler, surgery: Surgery | None) -> None:
        """Add what a call left to the run."""
        visual = [sample.visual_tokens] * self._layers if surgery is None else surgery.visual_tokens
        planned = profiler.kv_tokens if surgery is None else surgery.kv_tokens
        full = sample.error if sample.status == "oom" else None
        memory, self.refused = profiler.memory(visual, planned, full), profiler.refused
        if self.refused is None:
            sample = sample.with_memory(memory)
        else:
            sample.status, sample.error = "failed", f"{NOT_PROFILED}{self.refused}"
        if memory.refused is not None and sample.ok:
            sample.status, sample.error = "oom", memory.refused
        record, samples = self.run.record, self.run.samples
        samples.append(sample)
        record.spec.max_new_tokens = max(record.spec.max_new_tokens, len(sample.tokens))
        if self._known is not None:
            sizes = self._known.hidden, self._known.ffn
            cuts = [visual_flops_cut(s.kept_visual_tokens, s.visual_tokens, *sizes) for s in samples]
            record.visual_flops_cut = sum(cuts) / len(cuts)
        notes = [*record.notes, *self.meter.notes()]
        if len(self._statics) > 1:
            notes = [*(note for note in notes if note != GROWN), GROWN]
        record.notes = list(dict.fromkeys(notes))
        record.totals = summarize(self.run)


@contextmanager
def _seen() -> Iterator[None]:
    """Inside, operators can be seen: ``no_grad`` stands in for ``inference_mode``, and makes the same tokens."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _tensors(given: Any) -> list[torch.Tensor]:
    """Every tensor among the arguments of a call."""
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]


def _attention_of(model: nn.Module) -> str:
    """The attention that the language model runs, as transformers calls it."""
    configs = [getattr(model, "config", None)]
    with suppress(MemprofError):
        configs.insert(0, getattr(attention_in(anatomy(model).layers[0][1]), "config", None))
    return next((str(name) for one in configs if (name := getattr(one, "_attn_implementation", None))), "eager")
