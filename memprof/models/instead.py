"""Somebody's script over models without weights: what it loads by ``from_pretrained`` has sizes, and no value.

The configuration is read as always, the checkpoint's weights never are. The script believes that there is a card, and
what it moves there stays where it is; what it does with tensors is done, as far as sizes decide it. Where it asks for a
value that a model would have computed it is refused (:func:`refusal`): a number made up would pass for an answer.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from memprof.errors import MemprofError, UsageError
from memprof.gpus import CARDS, DEFAULT, Card

#: What a tokenizer is asked to make of tokens that nobody chose becomes this.
NO_ANSWER = "[no answer: predicted]"
#: Packages whose own questions about the card get the true answer.
_LIBRARIES = {"torch", "transformers", "accelerate", "safetensors", "torchvision", "tokenizers", "memprof"}
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
#: What says how a checkpoint is read, and decides no size.
_READING = (
    "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage",
    "use_safetensors", "weights_only", "ignore_mismatched_sizes", "variant", "key_mapping", "disable_mmap",
    "tqdm_class", "_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name", "trust_remote_code",
    "state_dict", "mirror", "_fast_init",
)  # fmt: skip
#: What changes bytes in a way that nothing here models.
_UNKNOWN = (
    "quantization_config", "load_in_4bit", "load_in_8bit", "gguf_file", "tp_plan", "tp_size", "device_mesh",
    "distributed_config", "use_kernels", "kernel_config", "fusion_config",
)  # fmt: skip


class Instead:
    """Models without weights in place of those that a script loads.

    Attributes:
        card: What is predicted for.
        loaded: What each model was loaded from, as the script wrote it.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self.loaded: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self.told_no_answer = False

    def waiting(self) -> dict[str, Callable[[ModuleType], None]]:
        """What is to be done to which module once a script has loaded it (:func:`memprof.script.on_import`)."""
        return {
            "torch": self._card,
            "transformers.modeling_utils": self._models,
            "transformers.tokenization_utils_base": self._tokenizers,
        }

    # -- the model -----------------------------------------------------------------------------------------------------

    def _models(self, module: ModuleType) -> None:
        given = self

        def from_pretrained(
            cls: Any, /, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **asked: Any
        ) -> Any:
            return given._load(cls, pretrained_model_name_or_path, args, config, asked)

        functools.update_wrapper(from_pretrained, module.PreTrainedModel.from_pretrained.__func__)
        module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)

    def _load(self, cls: Any, name: Any, args: Any, config: Any, asked: dict[str, Any]) -> Any:
        """What ``cls.from_pretrained(name, *args, config=config, **asked)`` gives, without weights."""
        for word in _UNKNOWN:
            if asked.pop(word, None):
                raise UsageError(f"from_pretrained({word}=...) changes what weights take, and that is not predicted")
        with_info = asked.pop("output_loading_info", False)
        dtype = asked.pop("torch_dtype", None) or asked.pop("dtype", None) or "auto"
        asked.pop("dtype", None)
        own_generation = asked.pop("generation_config", None)
        hub = {key: asked.pop(key) for key in _HUB if key in asked}
        for word in _READING:
            asked.pop(word, None)
        attention = asked.pop("attn_implementation", None)
        config, rest = _configuration(cls, name, config, hub, asked)
        if getattr(config, "quantization_config", None):
            raise UsageError(f"{name} is quantized, and what its weights take is not predicted")
        if args:
            raise UsageError(f"{cls.__name__}.from_pretrained() with more than a name before keywords is not predicted")
        model = _without_weights(cls, name, config, dtype, attention, rest)
        if own_generation is not None:
            model.generation_config = own_generation
        elif model.can_generate():
            _read_generation(model, name, hub)
        model.config.name_or_path = model.name_or_path = str(name)
        self.loaded[model] = str(name)
        info: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        info["error_msgs"] = []
        return (model, info) if with_info else model

    @contextmanager
    def lending(self, model: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """For one ``generate()``: the model as on the card (:func:`memprof.models.weightless.lent`).

        Gives the arguments to call it with. A streamer hears the end and no token before it, for none was chosen.
        """
        from memprof.models.weightless import lent

        streamer = kwargs.get("streamer")
        with lent(model, self.card):
            yield {name: value for name, value in kwargs.items() if name != "streamer"}
        if streamer is not None:
            streamer.end()

    def outcome(self, model: Any, refused: str | None, out: Any) -> Any:
        """What ``generate()`` gave, its tokens without values; or the error of a card that is full.

        Raises:
            torch.OutOfMemoryError: The card would have ``refused`` an allocation.
        """
        import torch

        if refused is not None:
            raise torch.OutOfMemoryError(refused)
        mode = next(model.parameters()).fake_mode
        if isinstance(out, torch.Tensor):
            return mode.from_tensor(out)
        for key, value in list(out.items()):
            if type(value) is torch.Tensor:
                out[key] = mode.from_tensor(value)
        return out

    # -- what it is surrounded by --------------------------------------------------------------------------------------

    def _tokenizers(self, module: ModuleType) -> None:
        base = module.PreTrainedTokenizerBase
        for name in ("decode", "batch_decode"):
            setattr(base, name, self._decoding(getattr(base, name)))

    def _decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def decoded(tokenizer: Any, tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("token_ids", kwargs.get("sequences")) if tokens is None else tokens
            rows = _valueless_rows(ids)
            if rows is not None:
                self.told_no_answer = True
                return [NO_ANSWER] * rows if rows or decode.__name__ == "batch_decode" else NO_ANSWER
            return decode(tokenizer, *(() if tokens is None else (tokens,)), *args, **kwargs)

        return decoded

    def _card(self, torch: ModuleType) -> None:
        """Let the script's own code find a card, and leave what it moves there where it is."""
        card, cuda = self.card, torch.cuda
        name, capability = card.name, card.capability
        there = card.memory_bytes or CARDS.get(name, CARDS[DEFAULT]).memory_bytes  # of one without a limit, its own
        shown = SimpleNamespace(
            name=name, total_memory=there, major=capability[0], minor=capability[1],
            multi_processor_count=card.processors,
        )  # fmt: skip
        for what, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name,
            "get_device_capability": capability, "get_device_properties": shown, "is_bf16_supported": True,
            "synchronize": None, "set_device": None, "reset_peak_memory_stats": None, "empty_cache": None,
            "current_stream": Stream(), "default_stream": Stream(), "stream": nullcontext(),
        }.items():  # fmt: skip
            setattr(cuda, what, _answering(getattr(cuda, what), answer))
        for what in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
                     "mem_get_info", "memory_stats"):  # fmt: skip
            setattr(cuda, what, _refusing(getattr(cuda, what), what))
        cuda.Event, cuda.Stream = Event, Stream
        torch.autocast.__init__ = _not_autocast(torch.autocast.__init__)
        torch.nn.Module._apply = _applying(torch, torch.nn.Module._apply)
        _staying(torch).__enter__()


def _configuration(
    cls: Any, name: Any, config: Any, hub: dict[str, Any], asked: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the arguments that were none of its fields."""
    from transformers import PreTrainedConfig

    if isinstance(config, PreTrainedConfig):
        return copy.deepcopy(config), asked
    read = cls.config_class.from_pretrained(
        name if config is None else config, return_unused_kwargs=True, **hub, **asked
    )
    return read[0], read[1]


def _without_weights(cls: Any, name: Any, config: Any, dtype: Any, attention: Any, rest: dict[str, Any]) -> Any:
    import torch

    from memprof.models.weightless import build_weightless

    if dtype == "auto":
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            raise UsageError(f"the configuration of {name} does not say its dtype; give from_pretrained(dtype=...)")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"from_pretrained(dtype={dtype}) is not predicted; give one dtype for all weights")
    asked = {} if attention is None else {"attn_implementation": attention}
    for one in (*_each(attention), *map(_attention_of, (config, *_parts_of(config)))):
        if one not in (None, "sdpa", "eager"):
            raise UsageError(f"from_pretrained(attn_implementation={one!r}) is not predicted; give sdpa or eager")

    def built() -> Any:
        made = cls._from_config(config, dtype=dtype, **asked, **rest)
        made.tie_weights()  # skipped together with the initialisation, and a tied head must count once
        return made

    return build_weightless(built)


def _each(attention: Any) -> list[Any]:
    return list(attention.values()) if isinstance(attention, dict) else [attention]


def _parts_of(config: Any) -> list[Any]:
    """The configurations inside one."""
    return [part for name in getattr(config, "sub_configs", ()) if (part := getattr(config, name, None)) is not None]


def _attention_of(config: Any) -> Any:
    return getattr(config, "_attn_implementation", None)  # where Auto classes put what they are asked for


def _read_generation(model: Any, name: Any, hub: dict[str, Any]) -> None:
    """The checkpoint's own ways to generate; no token ends it, as none was chosen."""
    from transformers import GenerationConfig

    with suppress(OSError, ValueError):
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0


def _valueless_rows(ids: Any) -> int | None:
    """Rows of tokens without values, 0 of one row alone; None where they have values."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(ids, FakeTensor):
        return int(ids.shape[0]) if ids.ndim > 1 else 0
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], FakeTensor):
        return len(ids) if ids[0].ndim else 0
    return None


def _answering(real: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    """``answer`` for the script, and the truth for libraries, which would begin to talk to a card."""

    @functools.wraps(real)
    def answered(*args: Any, **kwargs: Any) -> Any:
        asking = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        return real(*args, **kwargs) if asking in _LIBRARIES else answer

    return answered


def _refusing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(real)
    def refused(*args: Any, **kwargs: Any) -> Any:
        asking = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if asking in _LIBRARIES:
            return real(*args, **kwargs)
        raise Valueless(f"torch.cuda.{name}() is asked for what a card holds, and there is none")

    return refused


class Event:
    """An event of a card that is not there: it is over at once, and the time to another is not a number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def record(self, stream: Any = None) -> None:
        """Nothing is waited for."""

    wait = record

    def synchronize(self) -> None:
        """Nothing is waited for."""

    def query(self) -> bool:
        """All is done."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds: NaN, for nobody measured them, and a number made up would pass for a measurement."""
        del end
        return float("nan")


class Stream(Event):
    """A stream of a card that is not there."""

    wait_event = wait_stream = Event.record

    def record_event(self, event: Any = None) -> Any:
        """The event, which is over."""
        return Event() if event is None else event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _not_autocast(real: Callable[..., None]) -> Callable[..., None]:
    """Refuse autocast by name: torch would leave it out without a card, and the CPU's casts other operators."""

    @functools.wraps(real)
    def begun(self: Any, device_type: str, dtype: Any = None, enabled: bool = True, *args: Any, **kwargs: Any) -> None:
        asking = str(sys._getframe(1).f_globals.get("__name__", "")).partition(".")[0]
        if enabled and (device_type == "cuda" or asking not in _LIBRARIES):
            raise Valueless("torch.autocast is not predicted; load the model in its dtype, from_pretrained(dtype=...)")
        real(self, device_type, dtype, enabled, *args, **kwargs)

    return begun


def _applying(torch: ModuleType, real: Callable[..., Any]) -> Callable[..., Any]:
    """``Module.to`` and its like for weights without storage, which torch cannot exchange in place."""
    from torch._subclasses.fake_tensor import FakeTensor

    @functools.wraps(real)
    def applied(module: Any, fn: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(weight, FakeTensor) for weight in module.parameters()):
            return real(module, fn, *args, **kwargs)
        made: dict[int, Any] = {}  # tied weights stay one
        with torch.no_grad():
            for part in module.modules():
                for held in (part._parameters, part._buffers):
                    for name, tensor in held.items():
                        if tensor is not None:
                            new = made.setdefault(id(tensor), fn(tensor))
                            if new is not tensor and isinstance(tensor, torch.nn.Parameter):
                                new = made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad)
                            held[name] = new
        return module

    return applied


def _staying(torch: ModuleType) -> Any:
    """A mode under which what is moved to, or made on, a card is on the CPU."""
    from torch.overrides import TorchFunctionMode

    def here(value: Any) -> Any:
        if isinstance(value, str):
            return "cpu" if re.fullmatch(r"cuda(:\d+)?", value) else value
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

    class Staying(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to and len(args) > 1 and type(args[1]) is int:
                args = (args[0], "cpu", *args[2:])
            named = {key: here(value) for key, value in (kwargs or {}).items()}
            return func(*map(here, args), **named)

    return Staying()


class Valueless(MemprofError):
    """Something was asked for that only a run has."""

    exit_code = 2


def refusal(error: BaseException, script: str) -> str | None:
    """One line where ``error`` comes from a value that nothing computed, with the script's own line; else None."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        UnsupportedFakeTensorException,
    )

    where = _line_of(error.__traceback__, script)
    if isinstance(error, Valueless | UsageError):
        return f"{where}: {error}; run it without --predict"
    if isinstance(error, MemprofError):
        return f"{where}: {error}"
    if isinstance(error, ImportError) and "FlashAttention" in str(error):  # of a model that is there already
        return f"{where}: FlashAttention is not predicted; give sdpa or eager, or run it without --predict"
    of_values = isinstance(
        error, DataDependentOutputException | DynamicOutputShapeException | UnsupportedFakeTensorException
    ) or ("tensor subclass" in str(error) or FakeTensor.__name__ in str(error))
    if not of_values:
        return None
    return (
        f"{where} needs the value of a tensor that a model computes, and a model without weights has none; run it "
        "without --predict, where its weights and a card are"
    )


def _line_of(trace: TracebackType | None, script: str) -> str:
    """The last line of the script's own folder that the error went through."""
    own, found = Path(script).resolve().parent, f"{script}"
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if (file.is_relative_to(own) and "site-packages" not in file.parts) or str(file) == script:
            found = f"{file.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
