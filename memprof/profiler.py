"""The profiler: a context manager around any transformers ``generate()``; a meter answers, one entry a token.

::

    with Profiler(model) as profiler:
        model.generate(**inputs, max_new_tokens=16)
    print(profiler.reading.peak_allocated_bytes)

Everything is done with hooks, and every hook is gone when the window ends, also by an exception.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from memprof import scopes
from memprof.anatomy import Anatomy, anatomy
from memprof.errors import MemprofError
from memprof.files import first_line
from memprof.meters import Meter, meter_for
from memprof.records import Memory, TokenColumns
from memprof.simulator.replay import Reading, death


class Profiler:
    """Profiles one ``generate()`` call.

    Token 0 is prefill, from the window's start (inputs made inside it count) to the second forward; token t ends where
    forward t + 1 begins, and the last one where the window ends, its cache still held. The vision encoder is a phase of
    token 0 wherever ``generate()`` runs it.

    Args:
        model: A transformers model with a decoder and, if it sees, a vision tower.
        meter: Where bytes come from; by default the one that serves ``model`` (:func:`memprof.meters.meter_for`). A
            meter can be used for one window after another.
        given: What was made before the window and ``generate()`` is given: it counts to the window, as ``inputs``.
        refusing: Whether a generation that cannot be counted is ended, or goes on and is :attr:`refused`.

    Raises:
        MemprofError: If ``refusing``, from inside ``generate()``, where forwards are not tokens (chunked prefill,
            assisted decoding, prompt lookup), where operators cannot be seen (``torch.inference_mode()``), in another
            thread than the window's, or in a second call; at the window's end, where nothing was generated in it:
            refused by name, for what would be counted would be wrong.

    Attributes:
        reading: What the meter read, once the window has ended.
        tokens: The same as the columns of a record, with KV bytes and seconds.
        kv_tokens: KV length of each layer after prefill; 0 of a layer that keeps a state instead (Mamba).
        kv_bytes_per_layer: Bytes of each layer's KV storages after prefill, states, scales and what a decoder keeps of
            its encoder included; a view counts with its whole storage.
        failed: Whether the window ended by an exception.
        refused: Why what was read counts for nothing, or None.
        died: What was asked for where it ended so, and what was held then; None where it did not.
    """

    def __init__(
        self, model: nn.Module, meter: Meter | None = None, *, given: Iterable[torch.Tensor] = (),
        refusing: bool = True,
    ) -> None:  # fmt: skip
        self.model, self._given, self._refusing = model, list(given), refusing
        self.refused: str | None = None
        self.meter = meter or meter_for(model)
        self.anatomy: Anatomy = anatomy(model)
        self.reading = Reading()
        self.kv_tokens: list[int] = []
        self.kv_bytes_per_layer: list[int] = []
        self.failed = False
        self.died: Death | None = None
        self._kv_bytes: list[int] = []
        self._seconds: list[float] = []
        self._hooks: list[Any] = []
        self._prefill_hooks: list[Any] = []  # those that nobody needs once the ledger rests
        self._cache: Any = None
        self._inside: list[nn.Module] = []  # forwards under way; the outermost is the token's
        self._held: dict[int, int] = {}  # bytes of each storage of the cache, by address
        self._forwards = 0
        self._thread = 0

    @property
    def tokens(self) -> TokenColumns:
        """One entry a token in every column."""
        r = self.reading
        timed = self.meter.status == "measured"
        return TokenColumns(
            peak_allocated_bytes=r.peak_allocated_bytes,
            allocated_bytes=r.allocated_bytes,
            reserved_bytes=r.reserved_bytes,
            kv_bytes=self._kv_bytes,
            device_used_bytes=r.device_used_bytes,
            seconds=list(self._seconds) if timed else [None] * len(self._seconds),
        )

    def memory(self, visual_tokens: list[int], kv_planned: list[int], refused: str | None = None) -> Memory:
        """What the window took, once it has ended.

        Args:
            visual_tokens: Visual tokens that each decoder layer saw in prefill.
            kv_planned: KV length that each layer was to have after it.
            refused: What ended the window, where the card refused something.
        """
        reading = self.reading
        # Fewer than were made where a card would have refused one; the token in which one did is not done.
        done = len(reading.peak_allocated_bytes) if refused is None or self.died is None else self.died.token
        columns = {name: column[:done] for name, column in vars(self.tokens).items()}
        reading.token_parts = {part: column[:done] for part, column in reading.token_parts.items()}
        return Memory(
            [reading.memory(TokenColumns(**columns))],
            kept_visual_tokens=visual_tokens,
            kv_tokens_planned=kv_planned,
            kv_tokens_found=self.kv_tokens,
            kv_bytes_per_layer=self.kv_bytes_per_layer,
            refused=refused or reading.refused,
        )

    def __enter__(self) -> Profiler:
        self._depth, self._thread = scopes.depth(), threading.get_ident()
        _claim(self.model, self._thread)
        try:
            self.meter.open()
        except BaseException:
            _WINDOWS[self.model].remove(self._thread)
            raise
        try:
            self.meter.given(self._given)
            self._given.clear()
            self._place_hooks()
        except BaseException:
            self._leave()
            raise
        self.meter.phase("prefill")
        self._clock = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.failed = error is not None
        if error is not None:
            self.died = self._death()
        try:
            if self._forwards:
                self._end_token()
        finally:
            self._leave()
        if not self._forwards and not self.failed and self.refused is None:
            name = type(self.model).__name__
            self.refused = f"no forward of {name} ran inside the window: call generate() there, of this model"
            if self._refusing:
                raise MemprofError(self.refused)

    def _death(self) -> Death:
        """What is known where an exception ends the window: frames that hold tensors still stand, and so do scopes."""
        ledger, token = self.meter.ledger, max(0, self._forwards - 1)
        scope = scopes.current() if scopes.depth() > self._depth else scopes.Scope("something", "")
        held: dict[str, int] = {}
        if ledger is not None:
            ledger.claim(storages(self._cache), "kv_cache")  # as far as layers have filled it
            for slot in ledger.trace.live_after(len(ledger.trace.events)):
                part = ledger.trace.parts[slot]
                held[part] = held.get(part, 0) + ledger.trace.nbytes[slot]
        return Death(token, "decode" if token else "prefill", scope, self.meter.static_bytes, held)

    def _leave(self) -> None:
        """Take every hook back and let the meter finish."""
        for hook in (*self._hooks, *self._prefill_hooks):
            hook.remove()
        self._hooks.clear()
        self._prefill_hooks.clear()
        scopes.unwind(self._depth)
        self._cache = None
        self._inside.clear()
        _WINDOWS[self.model].remove(self._thread)
        self.reading = self.meter.close()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _place_hooks(self) -> None:
        for module in _generating(self.model):
            self._hooks.append(module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
        if self.anatomy.vision:
            first, last = self.anatomy.vision[0][1], self.anatomy.vision[-1][1]
            self._prefill_hooks.append(first.register_forward_pre_hook(self._phase("vision"), prepend=True))
            self._prefill_hooks.append(last.register_forward_hook(self._phase("prefill")))
        if self.meter.scoped:  # nobody else asks for scopes, and two hooks a module take time in every forward
            for name, module in self.anatomy.scoped(self.model):
                self._scope(module, self.anatomy.part_of(name), name)

    def _scope(self, module: nn.Module, part: str, name: str) -> None:
        """Everything ``module`` allocates while it runs belongs to ``part``."""

        def entering(*_: Any) -> None:
            scopes.push(part, name)

        def leaving(*_: Any) -> None:
            scopes.pop()

        self._prefill_hooks.append(module.register_forward_pre_hook(entering, prepend=True))
        self._prefill_hooks.append(module.register_forward_hook(leaving))

    def _phase(self, name: str) -> Callable[..., None]:
        def change(*_: Any) -> None:
            self.meter.phase(name)

        return change

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(model)
        if len(self._inside) > 1:
            return
        try:
            self._check(kwargs)
        except MemprofError as error:
            self.refused = self.refused or str(error)
            if self._refusing:
                raise
        if self._forwards:
            self._end_token()
            if self._forwards == 1:
                self._begin_decode()
        self._forwards += 1
        self._cache = kwargs.get("past_key_values", self._cache)
        scopes.unwind(self._depth)

    def _check(self, kwargs: Any) -> None:
        """Raise where what follows would be counted wrongly."""
        if threading.get_ident() != self._thread:
            raise MemprofError("generate() runs in another thread than the profiler's window: open the window there")
        if not self._forwards:
            if torch.is_inference_mode_enabled():
                raise MemprofError("operators cannot all be seen inside torch.inference_mode(); use torch.no_grad()")
            _check_generation()
        elif _begins(kwargs, self._cache):
            raise MemprofError("a second generation began inside the window: open one for each call of generate()")
        elif _new_positions(kwargs) > 1 and kwargs.get("use_cache") is not False:
            raise MemprofError(f"forward {self._forwards + 1} brought {_new_positions(kwargs)} tokens; {NOT_TOKENS}")

    def _begin_decode(self) -> None:
        """Nothing of prefill may slow down a decode step."""
        self.meter.phase("decode")
        if not self.meter.scoped:
            for hook in self._prefill_hooks:
                hook.remove()
            self._prefill_hooks.clear()

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        while self._inside and self._inside.pop() is not model:
            pass
        if self._inside or out is None:  # a part of a token's forward, or one that failed
            return
        self._cache = _cache_of(out, kwargs)
        self._held = storages(self._cache)
        if self.meter.ledger is not None:
            self.meter.ledger.claim(self._held, "kv_cache")
        # What follows until the next forward is the choice of a token.
        scopes.push("logits", "generate")

    def _end_token(self) -> None:
        self.meter.mark()
        now = time.perf_counter()
        self._seconds.append(now - self._clock)
        if not self._kv_bytes:
            layers = _layers(self._cache)
            self.kv_bytes_per_layer = [sum(storages(layer).values()) for layer in layers]
            self.kv_tokens = [_length(layer) for layer in layers]
        self._kv_bytes.append(sum(self._held.values()))
        self._clock = time.perf_counter()  # counting is no part of a token's time


class Death(NamedTuple):
    """Where a window ended by an exception.

    Attributes:
        token: The token it was about; those before are done.
        phase: ``prefill`` or ``decode``.
        scope: What was asked for; part ``something`` where nobody said (decode steps on a card).
        static_bytes: Bytes that were there before.
        held: Bytes asked for by part, of what the ledger saw and was held then.
    """

    token: int
    phase: str
    scope: scopes.Scope
    static_bytes: int
    held: dict[str, int]

    def words(self, error: torch.cuda.OutOfMemoryError) -> str:
        """On one line: the card's own words without its advice, where it was, and who held what."""
        said = first_line(error).partition(" If reserved but unallocated")[0].rstrip(". ")
        part, module = self.scope
        return f"{said}; {death(self.token, self.phase, part, module, self.static_bytes, self.held)}"


#: How many windows are open on a model, by their threads.
_WINDOWS: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()
_CLAIMING = threading.Lock()
#: What a user is told who asked for a generation whose forwards are not its tokens.
NOT_TOKENS = (
    "in chunked prefill (prefill_chunk_size), assisted decoding and prompt lookup a forward is not a token; profile "
    "generate() without them"
)


def watched(model: nn.Module) -> bool:
    """Whether this thread has a window open on ``model``."""
    return threading.get_ident() in _WINDOWS.get(model, ())


def _claim(model: nn.Module, thread: int) -> None:
    """Note a window of ``thread`` on ``model``; raise MemprofError where another thread has one."""
    with _CLAIMING:
        there = _WINDOWS.setdefault(model, [])
        if any(other != thread for other in there):
            raise MemprofError("another thread profiles this model; one at a time, or a model for each thread")
        there.append(thread)


def _check_generation() -> None:
    """Raise where the ``generate()`` around this forward was asked for forwards that are not tokens."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_assisted_decoding":
            raise MemprofError(NOT_TOKENS)
        if frame.f_code.co_name == "_prefill":
            config = frame.f_locals.get("generation_config")
            if getattr(config, "prefill_chunk_size", None) is not None:
                raise MemprofError(NOT_TOKENS)
        frame = frame.f_back  # type: ignore[assignment]


def _generating(model: nn.Module) -> list[nn.Module]:
    """``model``, and what in it generates by itself: some (BLIP-2, Kosmos-2, a PEFT wrapper) hand ``generate()`` on."""
    return [module for module in model.modules() if module is model or hasattr(type(module), "generate")]


def _new_positions(kwargs: Any) -> int:
    """How many tokens a forward is given."""
    given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids")]
    return max((int(t.shape[1]) for t in given if isinstance(t, torch.Tensor) and t.ndim > 1), default=1)


#: What the cache is called in a forward's arguments and in what it returns; states of models without attention too.
_CACHES = ("past_key_values", "cache_params", "state", "mems")


def _cache_of(out: Any, kwargs: Any) -> Any:
    """The cache that a forward returned; else the one it was given, which it may have filled."""
    found = (getattr(out, name, None) for name in _CACHES)
    return next((cache for cache in (*found, *map(kwargs.get, _CACHES)) if cache is not None), None)


def _begins(kwargs: Any, before: Any) -> bool:
    """Whether a forward begins another prompt: its cache is another one than ``before``, and empty."""
    cache = next((cache for name in _CACHES if (cache := kwargs.get(name)) is not None), None)
    return cache is not None and cache is not before and not storages(cache)


def _length(layer: Any) -> int:
    """How many positions a layer of a cache holds: of one made in advance those that are filled, not its room."""
    layer = layer[0] if isinstance(layer, tuple) else layer
    room = max((int(t.shape[-2]) for t in cache_tensors(layer)), default=0)
    if hasattr(layer, "max_cache_len"):
        return min(room, int(layer.get_seq_length()))
    return max(room, int(layer.get_seq_length())) if hasattr(layer, "_quantized_keys") else room


def _layers(cache: Any) -> list[Any]:
    """A cache layer by layer; what a decoder layer keeps of itself and of its encoder is a pair."""
    if hasattr(cache, "self_attention_cache"):
        own, other = (_layers(getattr(cache, f"{which}_attention_cache")) for which in ("self", "cross"))
        return list(zip(own, other, strict=False)) if len(own) == len(other) else own
    return list(getattr(cache, "layers", None) or ()) if cache is not None else []


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Key and value tensors of a transformers cache, or of one layer of it."""
    layers = _layers(cache) or ([cache] if cache is not None else [])
    found = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return [t for t in found if isinstance(t, torch.Tensor) and t.numel()]


def storages(cache: Any) -> dict[int, int]:
    """Bytes of each storage of a cache, or of one layer of it, by address: a view counts with all it holds on to.

    Whatever form it has: keys and values, states by number, quantised parts with their scales, caches of caches. Called
    at every token: the one walk over the layers there is.
    """
    found, seen = dict[int, int](), set[int]()
    waiting = [cache]
    while waiting:
        held = waiting.pop()
        if isinstance(held, torch.Tensor):
            inner = getattr(held, "__tensor_flatten__", None)  # one made of others has no storage of its own
            if inner is not None:
                waiting += [getattr(held, name) for name in inner()[0]]
            elif held.numel():
                storage = held.untyped_storage()
                found[storage._cdata] = storage.nbytes()
        elif isinstance(held, list | tuple):
            waiting += held
        elif isinstance(held, dict):
            waiting += held.values()
        elif id(held) not in seen and hasattr(held, "__dict__") and not isinstance(held, type | nn.Module):
            seen.add(id(held))
            waiting += vars(held).values()
    return found


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once: a sliced view counts with all it holds on to."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
