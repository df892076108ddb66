"""Graphics cards, as far as bytes follow from them: memory, architecture, and what PyTorch keeps for cuBLAS on each.

No torch here. Sizes are what CUDA reports to a process (``total_memory``), not what the box says; each has its source.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import pairwise
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

    def environment(self) -> dict[str, Any]:
        """What a prediction's record says of it."""
        return {
            "gpu": self.name,
            "gpu_memory_bytes": self.memory_bytes,
            "gpu_context_bytes": self.context_bytes,
            "compute_capability": ".".join(map(str, self.capability)),
            "gpu_source": self.source,
        }

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
        Card("h200", 150_109_880_320, (9, 0), 132, "torch.cuda.get_device_properties on the one of reference/h200"),
        Card("h100", 85_017_493_504, (9, 0), 132, "the same on the H100 80GB HBM3 of reference/h100"),
        Card("a100", 81049 * MIB, (8, 0), 108, "mixbench on an A100 80GB PCIe, ekondis/mixbench#47"),
        Card("a100-40gb", 42_298_834_944, (8, 0), 108, "deviceQuery, bottlerocket-os/bottlerocket#3873"),
        Card("l4", 23034 * MIB, (8, 9), 58, "nvidia-smi, NVIDIA/TensorRT-LLM#2398"),
        Card("rtx4090", int(23.64 * GIB), (8, 9), 128, "PyTorch's message in ali-vilab/VGen#104"),
        Card("t4", int(14.56 * GIB), (7, 5), 40, "PyTorch's message in Zheng-Chong/CatVTON#133, ECC on"),
    )
}


#: The card that is predicted for where none is named: its kernels and workspaces are those of the H200 too, and both
#: were measured.
DEFAULT = "h100"


def find_card(text: str | None) -> Card:
    """The card called ``text``.

    A number that one card alone has in its name will do: ``4090``. ``h100@any`` is an H100 that never runs out of
    memory, and so is no name at all. A size such as ``8GiB`` is an H100's kernels with so much memory; it needs its
    unit, and may be as small as the proving model's (``--gpu`` takes none below 1 GiB).

    Raises:
        BadValue: Neither a name nor a size.
    """
    if text is None:
        return replace(CARDS[DEFAULT], memory_bytes=None)
    name = text.lower().replace(" ", "").replace("_", "-")
    if name in CARDS:
        return CARDS[name]
    if (unlimited := CARDS.get(name.removesuffix(_ANY_MEMORY))) is not None:
        return replace(unlimited, memory_bytes=None)
    if not _looks_like_a_size(text):
        ends = [known for known in CARDS if name and known.lstrip("abcdefghijklmnopqrstuvwxyz-") == name]
        if len(ends) == 1:
            return CARDS[ends[0]]
        near = get_close_matches(name, CARDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise BadValue(f"unknown card {text!r}{hint}; valid: {', '.join(CARDS)}, or a size with its unit, as 8GiB")
    size = parse_bytes(text)
    if size < 1:
        raise BadValue(f"a card of {text!r} has no memory")
    return replace(CARDS[DEFAULT], name=text, memory_bytes=size, source=f"as asked for; kernels of the {DEFAULT}")


def card_of(gpu: str | None) -> str | None:
    """The name memprof has for what torch calls ``gpu``: ``'NVIDIA H100 80GB HBM3'`` -> ``'h100'``; None if none."""
    words = re.split(r"[\s-]+", (gpu or "").lower())
    said = {*words, *(a + b for a, b in pairwise(words))}
    return max((name for name in CARDS if set(name.split("-")) <= said), key=len, default=None)


def _looks_like_a_size(text: str) -> bool:
    """A number with a unit. One without is the number of a card, as 4090, and never so many bytes."""
    return re.fullmatch(r"\s*[0-9.]+\s*[A-Za-z]+\s*", text) is not None


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
