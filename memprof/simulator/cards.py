"""Graphics cards, as far as bytes follow from them: memory, architecture, and what PyTorch keeps for cuBLAS on each.

No torch here. Sizes are what CUDA reports to a process (``total_memory``), not what the box says; each has its source.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

from memprof.errors import BadValue, DataError
from memprof.units import GIB, KIB, MIB, parse_bytes

#: What a process takes from a card beside the caching allocator's segments: the context, and the code of the kernels it
#: has loaded. There is no one figure: it differs by driver, card and libraries. "Memory in use" less "allocated" and
#: "reserved but unallocated" in two out-of-memory messages of PyTorch on an RTX 4090 is 0.49 and 0.46 GiB
#: (3DTopia/Phidias-Diffusion#8, pinokiofactory/flux-webui#11). PyTorch's pull request 86509 measured 274 MiB with
#: lazily loaded modules (CUDA's default on Linux since 12.2) before any kernel ran, and 636 MiB with all of them.
#: So this may be wrong by 150 MiB either way: ``memprof run --device cuda`` records the true one
#: (``device_used_bytes``).
CONTEXT_BYTES = 500 * MIB
#: What stands behind a card's name where its kernels are meant and not its memory: ``h100@any``.
_ANY_MEMORY = "@any"


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: memprof's name for it.
        memory_bytes: What CUDA says it has; None: no limit.
        capability: Compute capability, ``(major, minor)``.
        processors: Streaming multiprocessors; 0 where they are not known, and then nothing that follows from them is
            modelled.
        source: Where the numbers come from.
        measured: Constants measured on this very device, by name: see :func:`load_calibration`.
    """

    name: str
    memory_bytes: int | None
    capability: tuple[int, int]
    processors: int
    source: str
    measured: Mapping[str, int] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """All that kernels depend on: two cards with the same word differ in memory only."""
        return f"{self.capability[0]}.{self.capability[1]}, {self.processors} SMs"

    @property
    def context_bytes(self) -> int:
        """What a process takes of it beside the allocator's segments: as measured, else :data:`CONTEXT_BYTES`."""
        return self.measured.get("context_bytes", CONTEXT_BYTES)

    @property
    def any_memory(self) -> str | None:
        """What :func:`find_card` takes for its kernels and workspaces without its limit; None: for no card at all."""
        return self.name + _ANY_MEMORY if self.name in CARDS else None


#: No card in particular: Ampere's choice of kernels, no limit, no workspaces.
ANY = Card("any", None, (8, 0), 0, "none: kernels as PyTorch chooses them from compute capability 8.0 on")

#: Capabilities and multiprocessors: NVIDIA's architecture white papers and data sheets.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("h200", 139 * GIB, (9, 0), 132, "141 GB on the data sheet; rounded down to what devices report"),
        Card("h100", int(79.11 * GIB), (9, 0), 132, "PyTorch's message in vllm-project/vllm#27508"),
        Card("a100", 81049 * MIB, (8, 0), 108, "mixbench on an A100 80GB PCIe, ekondis/mixbench#47"),
        Card("a100-40gb", 42_298_834_944, (8, 0), 108, "deviceQuery, bottlerocket-os/bottlerocket#3873"),
        Card("l4", 23034 * MIB, (8, 9), 58, "nvidia-smi, NVIDIA/TensorRT-LLM#2398"),
        Card("rtx4090", int(23.64 * GIB), (8, 9), 128, "PyTorch's message in ali-vilab/VGen#104"),
        Card("t4", int(14.56 * GIB), (7, 5), 40, "PyTorch's message in Zheng-Chong/CatVTON#133, ECC on"),
    )
}


def find_card(text: str | None) -> Card:
    """The card called ``text``; a size such as ``8GiB`` is no card in particular with so much memory.

    ``h100@any`` is an H100 that never runs out of memory.

    Raises:
        BadValue: Neither a name nor a size.
    """
    if text is None:
        return ANY
    name = text.lower().replace(" ", "").replace("_", "-")
    if name in CARDS:
        return CARDS[name]
    if (unlimited := CARDS.get(name.removesuffix(_ANY_MEMORY))) is not None:
        return replace(unlimited, memory_bytes=None)
    if not re.match(r"\s*[0-9.]", text):
        near = get_close_matches(name, CARDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise BadValue(f"unknown card {text!r}{hint}; valid: {', '.join(CARDS)}, or a size such as 8GiB")
    size = parse_bytes(text)
    if size < 1:
        raise BadValue(f"a card of {text!r} has no memory")
    return Card(text, size, ANY.capability, ANY.processors, "as asked for")


def cublas_workspace_bytes(card: Card, environment: Mapping[str, str] = os.environ) -> int:
    """What cuBLAS keeps from the first matrix product on: one for each handle and stream, so one here.

    ``CUBLAS_WORKSPACE_CONFIG`` (``:SIZE:COUNT`` in KiB, any number of pairs), else 32 MiB on Hopper and
    ``:4096:2:16:8`` (8.125 MiB) elsewhere. Source: ``parseChosenWorkspaceSize`` in
    ``aten/src/ATen/cuda/CublasHandlePool.cpp``. None is kept for :data:`ANY` card.
    """
    if card.capability == ANY.capability and not card.processors:
        return 0
    pairs = re.findall(r":([0-9]+):([0-9]+)", environment.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if pairs:
        return sum(int(size) * KIB * int(count) for size, count in pairs)
    return 32 * MIB if card.capability == (9, 0) else 2 * 4096 * KIB + 8 * 16 * KIB


def cublaslt_workspace_bytes(card: Card, environment: Mapping[str, str] = os.environ) -> int:
    """What cuBLASLt keeps from the first linear layer with a bias on (such a layer is one fused product).

    ``CUBLASLT_WORKSPACE_SIZE`` in KiB, else 1 MiB, and no more than cuBLAS' own. Source: ``getCUDABlasLtWorkspaceSize``
    in the same file.
    """
    asked = environment.get("CUBLASLT_WORKSPACE_SIZE", "")
    size = int(asked) * KIB if asked.isdecimal() else MIB
    return min(size, cublas_workspace_bytes(card, environment))


def flash_splits(batch_heads_blocks: int, processors: int, key_blocks: int, most: int = 128) -> int:
    """In how many parts FlashAttention-2 cuts the keys, to fill a card with few queries.

    Source: ``num_splits_heuristic`` in ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``.
    """
    if batch_heads_blocks >= 0.8 * processors:
        return 1
    best, efficiency = 0.0, dict[int, float]()
    for splits in range(1, min(most, processors, key_blocks) + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = batch_heads_blocks * splits / processors
            efficiency[splits] = waves / -(-batch_heads_blocks * splits // processors)
            best = max(best, efficiency[splits])
    return next((splits for splits, value in efficiency.items() if value >= 0.85 * best), 1)


def _split_sums(lengths: Sequence[int], head: bool) -> int:
    """Bytes of the partial results of split keys, from ``(processors, batch, heads, queries, keys, head dim)``."""
    processors, batch, heads, queries, keys, dim = lengths
    if not processors:
        return 0
    wide = 256 if dim <= 64 else 128 if dim <= 128 else 64
    splits = flash_splits(batch * heads * -(-queries // 64), 2 * processors, -(-keys // wide))
    rounded = -(-dim // 32) * 32 if dim <= 192 else 256
    return 0 if splits == 1 else 4 * splits * batch * heads * queries * (rounded if head else 1)


def _padded_mask(lengths: Sequence[int]) -> int:
    """Bytes of an attention mask copied to rows of a multiple of 8 numbers, from ``(bytes of one, ..., columns)``; none
    where the rows are one already.
    """
    columns = lengths[-1]
    return 0 if columns % 8 == 0 else prod(lengths[:-1]) * (columns + 8 - columns % 8)


#: Bytes of the temporaries whose size is no product of lengths, from the lengths that stand for their shape.
RULES: dict[str, Callable[[Sequence[int]], int]] = {
    "cuda:pad_bias": _padded_mask,
    "cuda:flash split logsumexp": lambda lengths: _split_sums(lengths, head=False),
    "cuda:flash split output": lambda lengths: _split_sums(lengths, head=True),
}


def load_calibration(path: Path, card: Card) -> Card:
    """``card`` with the constants that were measured on a device of its kind.

    The file is one JSON object: ``{"schema": 1, "card": "h100", "torch": "2.13.0", "driver": "...", "measured":
    {"context_bytes": {"bytes": 0, "how": "..."}}}``. Every constant says how it was measured. memprof ships none: no
    number is in it that was not measured.

    Raises:
        DataError: The file cannot be read, is of another schema or card, or a constant does not say how it was got.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != 1 or data["card"] != card.name:
            raise DataError(f"{path} was measured on {data['card']}, schema {data['schema']}; wanted {card.name}, 1")
        measured = {name: int(entry["bytes"]) for name, entry in data["measured"].items() if entry["how"].strip()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read {path} as a calibration: {error!r}") from None
    if len(measured) != len(data["measured"]):
        raise DataError(f"{path} has constants that do not say how they were measured")
    return replace(card, source=f"{card.source}; {path.name}", measured=measured)


def calibrated(card: Card) -> Card:
    """``card`` with the constants memprof ships for it, if there are any."""
    path = Path(__file__).parent / "calibration" / f"{card.name}.json"
    return load_calibration(path, card) if path.exists() else card
