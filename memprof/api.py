"""memprof from Python: what the command line does, as functions. The command line goes through here as well.

::

    import memprof

    with memprof.profile(model) as run:
        model.generate(**inputs, max_new_tokens=16)
    print(run.peak, run.table())

    run = memprof.predict("internvl2-2b", images=[(1600, 1200)], method="topv:keep=0.25", card="l4")

Everything heavy is imported where it is used: ``import memprof`` loads no torch, and a prediction that was made before
is answered without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memprof.limits import check_sizes
from memprof.profiles import Profile

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from memprof.analysis.fit import Fit
    from memprof.families import Model
    from memprof.profiler import Profiler as Profiler
    from memprof.pruning.surgery import Surgery
    from memprof.records import RunSpec

#: What ``memprof`` offers by name.
__all__ = ["Profile", "Profiler", "fits", "predict", "profile", "prune", "read", "run", "spec", "weightless"]


def __getattr__(name: str) -> Any:
    """The profiler of one call, which needs torch, when it is asked for."""
    if name == "Profiler":
        from memprof.profiler import Profiler

        return Profiler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def spec(
    model: str,
    method: str = "baseline",
    task: str = "ai2d",
    device: str = "auto",
    *,
    dtype: str | None = None,
    max_new_tokens: int | None = None,
    **fields: Any,
) -> RunSpec:
    """A run, its gaps filled: the model's own dtype, the task's number of tokens, the device there is.

    Args:
        model: A name of ``memprof list``, a hub id in the local cache, a folder, or a ``config.json``.
        method: A method's spec, as ``topv:keep=0.25``.
        task: A task of ``memprof list``.
        device: ``auto``, ``cuda``, ``sim`` or ``cpu``.
        dtype: None: as published.
        max_new_tokens: None: the task's.
        fields: More of :class:`~memprof.records.RunSpec`.

    Raises:
        UsageError: An unknown name, or an option that this model cannot heed.
        WeightsError: A configuration that cannot be read.
    """
    from memprof.models.find import find
    from memprof.models.heeding import check_heeded
    from memprof.records import RunSpec
    from memprof.tasks import TASKS

    known = find(model, fields.get("weights", "random"))
    check_heeded(known, images=fields.get("images"), max_tiles=fields.get("max_tiles"))
    return RunSpec(
        model=known.name, method=method, task=task, device=resolve_device(device, known, fields.get("gpu")),
        dtype=dtype or known.dtype,
        max_new_tokens=TASKS.load(task).max_new_tokens if max_new_tokens is None else max_new_tokens, **fields,
    )  # fmt: skip


def resolve_device(name: str, model: Model | None = None, gpu: str | None = None) -> str:
    """``auto`` is CUDA where there is a card, else sim; for a ``model`` whose weights come with memprof, else cpu.

    Where a card to predict for is named, it is sim.
    """
    if name != "auto":
        return name
    if gpu is not None:
        return "sim"
    if has_cuda():
        return "cuda"
    return "cpu" if model is not None and model.family.shipped(model) is not None else "sim"


def has_cuda() -> bool:
    """Whether torch has a card to run on. It is loaded, and asked, only where there is a driver to ask."""
    from memprof.environment import may_have_cuda

    if not may_have_cuda():
        return False
    import torch

    return torch.cuda.is_available()


def run(asked: RunSpec, folder: Path | str, **how: Any) -> Profile:
    """Make the run ``asked`` describes (:func:`spec`) in ``folder``, measured or predicted.

    ``how`` is as in :func:`memprof.runner.run`: ``resume``, ``force``, ``progress`` and so on.
    """
    from memprof.errors import RunExists
    from memprof.runner import run as make

    try:
        return Profile.of(make(asked, Path(folder), **how))
    except RunExists:
        raise RunExists(f"{folder} already holds a run; resume=True finishes it, force=True replaces it") from None


@contextmanager
def profile(model: nn.Module) -> Iterator[Profile]:
    """Profile every ``generate()`` of ``model`` inside the window; each is a sample of the one result.

    ::

        with memprof.profile(model) as run:
            model.generate(**inputs, max_new_tokens=16)
        run.peak, run.tokens, run.parts
        print(run.table())

    On a card the allocator's counters are read, on the CPU storages are counted, and a model without weights
    (:func:`weightless`) is predicted. What a call is given counts as ``inputs``, whoever made it when; each call begins
    from an emptied cache. No token is changed. A window that ends by an exception leaves the model as it was, and the
    result keeps what was measured until then.

    Args:
        model: A transformers model that generates.

    Raises:
        UsageError: It does not generate, or memprof finds no decoder layers in it; in the window, where calls run under
            several methods (:func:`prune`).
        MemprofError: From inside ``generate()``, where forwards are not tokens or operators cannot be seen
            (:class:`memprof.profiler.Profiler`).
    """
    from memprof.calls import Calls

    calls = Calls(model)
    found = Profile.of(calls.run)
    with calls:
        yield found


def predict(
    model: str | PreTrainedConfig | nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    images: Sequence[tuple[int, int]] = (),
    text_tokens: int = 53,
    method: str = "baseline",
    stack: str = "current",
    new_tokens: int = 16,
    card: str | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    max_tiles: int | None = None,
    batch: int = 1,
) -> Profile:
    """What one prompt takes on a card; nothing of it runs, and where it was recorded before torch is not even loaded.

    Args:
        model: A name of ``memprof list``, a hub id in the local cache, a folder, a ``config.json``, a transformers
            configuration, or a model, of which only the configuration, dtype and attention count.
        inputs: What ``generate()`` would be given, ordinary tensors on the CPU: of any model that transformers has.
            None: a prompt of the sizes below, of a model whose family memprof knows.
        images: Width and height of each image in pixels; none for a prompt of text alone. Beside ``inputs`` it says
            what they leave open, for methods that look at where tokens lie.
        text_tokens: Tokens of the question, without a chat template.
        method: A method's spec, as ``topv:keep=0.25``.
        stack: Which logits are made: ``current`` (the last position's) or ``paper`` (all, and a copy in float32).
        new_tokens: Tokens of the answer.
        card: The card, or its memory as ``8GiB``; None: an H100's kernels, and no limit.
        dtype: None: as published, or as the configuration says, else bfloat16.
        attention: Of the language model, ``sdpa`` or ``eager``; None: the method's, else ``sdpa`` where the model has
            it (Mamba has not).
        max_tiles: Most tiles an image is cut into; None: the model's own.
        batch: Prompts of these sizes side by side.

    Returns:
        One sample. Where the card would refuse an allocation, the sample is not ``ok`` and its ``error`` says which.

    Raises:
        UsageError: An unknown name, or a value outside its range.
        WeightsError: A configuration that cannot be read, or of a family that memprof does not know (give ``inputs``).
        DoesNotFit: The weights alone do not fit on the card.
    """
    check_sizes(images)
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if inputs is not None:
        return _generated(model, inputs, images, method, stack, new_tokens, card, dtype, attention)
    from memprof import predicted

    return Profile.of(
        predicted.predict(
            model, images, text_tokens=text_tokens, method=method, stack=stack, new_tokens=new_tokens, card=card,
            dtype=dtype, attention=attention, max_tiles=max_tiles, batch=batch,
        )
    )  # fmt: skip


def _generated(
    model: str | PreTrainedConfig | nn.Module, inputs: Mapping[str, Any], images: Sequence[tuple[int, int]],
    method: str, stack: str, new_tokens: int, card: str | None, dtype: str | None, attention: str | None,
) -> Profile:  # fmt: skip
    """:func:`predict` of given inputs: the model's own ``generate()``, without weights."""
    from memprof.gpus import DEFAULT, find_card
    from memprof.predicted import config_of, dtype_of
    from memprof.pruning import build_pruner
    from memprof.stacks import Stack

    described = model if isinstance(model, str) else config_of(model)
    dtype = dtype or (None if isinstance(model, str) else dtype_of(model))
    eager = build_pruner(method, stack).eager
    on = card or find_card(DEFAULT).any_memory or DEFAULT
    kind = "eager" if eager else attention
    with ExitStack() as entered:
        module = entered.enter_context(weightless(described, dtype=dtype, card=on, attention=kind))
        entered.enter_context(Stack(module, stack))
        if method != "baseline":
            entered.enter_context(prune(module, method, inputs, images=images, stack=stack))
        found = entered.enter_context(profile(module))
        found.record.spec.stack = stack
        module.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return found


def fits(card: str, model: str, *, context: str | None = None, **asked: Any) -> Fit:
    """How many tiles, images and new tokens fit on a card, or which share of the visual tokens; all predicted.

    Args:
        card: The card, or its memory as ``8GiB``.
        model: As in :func:`spec`.
        context: What the CUDA context takes, as ``600MiB``.
        asked: ``tiles``, ``images`` and ``text_tokens`` (or ``question_tokens``) as in
            :func:`memprof.analysis.fit.answer`; the rest as in :func:`spec`.

    Returns:
        The answer. Where nothing fits, the weights alone not or not the least prompt, its ``fits`` is False, and its
        ``refusal`` says why and what would help.

    Raises:
        UsageError: An unknown name, or a value outside its range.
    """
    from memprof.analysis.fit import answer
    from memprof.gpus import find_card
    from memprof.units import parse_size

    if "text_tokens" in asked:  # what it is called everywhere else
        asked["question_tokens"] = asked.pop("text_tokens")
    sizes = {key: asked.pop(key) for key in ("tiles", "images", "question_tokens") if key in asked}
    wanted = spec(model, device="sim", **{"max_new_tokens": 16, **asked})
    return answer(wanted, find_card(card), context_bytes=None if context is None else parse_size(context), **sizes)


@contextmanager
def weightless(
    model: str | PreTrainedConfig, *, dtype: str | None = None, card: str = "h100", attention: str | None = None
) -> Iterator[Any]:
    """The model with every parameter there and no byte behind it, on which your own ``generate()`` call is predicted.

    ::

        with memprof.weightless(config, card="h200") as model, memprof.profile(model) as run:
            model.generate(**inputs, max_new_tokens=16)

    Tensors you give to ``generate()`` are ordinary ones on the CPU; inside the window each is one allocation, as if it
    were moved to the card there. Tokens are picked from scores that are all zero.

    Args:
        model: As in :func:`spec`, or a transformers configuration object, of whatever model transformers has.
        dtype: None: as published, or as the configuration says, else bfloat16.
        card: The card that is predicted for, or its memory as ``8GiB``.
        attention: Of the language model: ``sdpa`` or ``eager``; None: SDPA, where the model has it.

    Raises:
        UsageError: An unknown name, or a configuration of a model that does not generate, or not with this attention.
    """
    from memprof.gpus import calibrated, find_card
    from memprof.models.build import build_model, build_weightless_from
    from memprof.models.find import find
    from memprof.models.weightless import lent

    on = calibrated(find_card(card))
    if isinstance(model, str | os.PathLike):
        known = find(model)
        module = build_model(known, device="sim", dtype=dtype or known.dtype, attention=attention)
        config: Any = module.config
        config.name_or_path = known.hub or known.name  # who looks at the model learns what it is
    else:
        module = build_weightless_from(model, dtype=dtype, attention=attention)
    with lent(module, on) as given:
        yield given


def prune(
    model: nn.Module,
    method: str,
    inputs: Mapping[str, Any],
    *,
    images: Sequence[tuple[int, int]] = (),
    stack: str = "current",
    seed: int = 0,
) -> Surgery:
    """Prunes the prompt of your own ``generate()`` while it is entered; ``model`` is left as it was.

    ::

        with memprof.prune(model, "topv:keep=0.5", inputs):
            model.generate(**inputs, max_new_tokens=16)

    Args:
        model: A transformers model of a family that memprof knows (``memprof list``).
        method: A method's spec; ``memprof list methods`` names them.
        inputs: What ``generate()`` is given, as a processor made it: one prompt. Its ids, and the tables that say how
            images are cut, are read; nothing is changed.
        images: Width and height of each picture in pixels, where the inputs do not say how tiles lie and the method
            looks at it.
        stack: What the method leaves to the stack is filled in for this one.
        seed: For methods that draw.

    Raises:
        UsageError: The prompt's visual tokens are none of this family's images, there are several prompts, or the
            method looks at something that the model does not have.
        WeightsError: No family knows the model.
    """
    check_sizes(images)
    from memprof.errors import UsageError
    from memprof.models.find import of_config, plain_config
    from memprof.pruning import build_pruner
    from memprof.pruning.surgery import Surgery

    known = of_config(plain_config(model))
    ids: Any = inputs.get("input_ids")
    mask: Any = inputs.get("attention_mask")
    if getattr(ids, "ndim", 0) != 2 or len(ids) != 1:
        raise UsageError("pruning works on one prompt at a time, and needs its input_ids: a tensor, shape (1, tokens)")
    if mask is not None and not bool(mask.all()):
        raise UsageError("the prompt is padded, and methods would rank by the padding: hand it over without padding")
    prompt = known.family.given(known, ids[0].tolist(), inputs, images)
    assert prompt.places is not None
    return Surgery(model, build_pruner(method, stack), prompt.places, seed)


def read(*paths: Path | str) -> list[Profile]:
    """The runs in folders that :meth:`Profile.save`, :func:`run` or ``memprof run`` wrote; shards of a run become one.

    Raises:
        DataError: A path holds no run, or one that is damaged.
    """
    from memprof.store import find_runs

    return [Profile.of(found) for found in find_runs(paths)]
