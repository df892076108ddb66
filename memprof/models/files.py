"""Checkpoint files: where they are and which tensors stand in them. Only headers are read here; nothing loads torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memprof import files
from memprof.errors import DataError, WeightsError
from memprof.files import first_line

#: What is fetched from the hub: safetensors, configurations and tokenizers. Never a pickle, never code.
TOKENIZER_FILES = ("*.json", "tokenizer.model")
CHECKPOINT_FILES = ("*.safetensors", *TOKENIZER_FILES)

#: Formats that unpickle, which can run code; named only to say so.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: No header is longer; safetensors itself refuses more.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        name: Its name there.
        file: The safetensors file it stands in.
        dtype: Its dtype as safetensors spells it, e.g. ``BF16``.
        shape: Its shape.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


def locate(weights: str, hub: str, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The folder or file that ``weights`` means.

    Args:
        weights: ``hub``, or the path of a folder or of one ``.safetensors`` file.
        hub: The repository that ``hub`` means. ``HF_HOME``, ``HF_HUB_OFFLINE`` and the cache are honoured.
        files: Patterns of what is fetched from there.

    Raises:
        WeightsError: Nothing is there, or the hub cannot be reached and the cache does not hold it.
    """
    if weights != "hub":
        path = Path(weights).expanduser()
        if not path.exists():
            raise WeightsError(f"no checkpoint at {path}; --weights takes random, hub, a folder or a .safetensors file")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub, allow_patterns=list(files)))
    except LocalEntryNotFoundError:
        raise WeightsError(
            f"{hub} is not in the Hugging Face cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE is "
            "set); fetch it where there is a network, or give --weights PATH"
        ) from None
    except GatedRepoError:
        raise WeightsError(f"{hub} is gated: accept its terms on the hub, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise WeightsError(f"the hub has no repository {hub}, or your token may not read it") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{hub} could not be fetched: {first_line(error)}") from None


def locate_cached(hub: str) -> Path:
    """The folder in the local cache that holds ``hub``'s files; nothing is fetched.

    Raises:
        WeightsError: The cache does not hold it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise WeightsError(
            f"{hub} is neither a model that `memprof list` names, nor a folder, nor in the Hugging Face cache; fetch "
            f"its configuration with `hf download {hub} config.json`, or give a path"
        ) from None


def folder_of(where: Path) -> Path:
    """The folder a checkpoint's other files stand in."""
    return where if where.is_dir() else where.parent


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``, or None if there is no such file; raises WeightsError if it cannot be read."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except DataError as error:
        raise WeightsError(str(error)) from None


def stored_tensors(where: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint at ``where`` by name, file by file; no tensor is read.

    Raises:
        WeightsError: No safetensors file, a shard missing, truncated or foreign, or a tensor that stands twice.
    """
    listed, found = _listed(where), dict[str, Stored]()
    for file in _weight_files(where, listed):
        for tensor in _tensors_in(file):
            if tensor.name in found:
                raise WeightsError(f"tensor {tensor.name!r} stands twice: in {found[tensor.name].file} and in {file}")
            found[tensor.name] = tensor
    for name, shard in listed.items():
        if name not in found:
            raise WeightsError(f"tensor {name!r} is missing from {where / shard}, where the index says it is")
    return found


def _listed(where: Path) -> dict[str, str]:
    """The index of a folder of shards, tensor to file name; empty where there is none."""
    index = read_object(where / "model.safetensors.index.json") if where.is_dir() else None
    found = (index or {}).get("weight_map", {})
    if not isinstance(found, dict):
        raise WeightsError(f"the index in {where} is damaged: its weight_map is no object")
    for shard in found.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WeightsError(f"the index in {where} is damaged: {str(shard)[:60]!r} is no name of a file beside it")
    return found


def _weight_files(where: Path, listed: dict[str, str]) -> list[Path]:
    """The safetensors files of a checkpoint: those its index lists, else all there are."""
    if not where.is_dir():
        if where.suffix in _PICKLES:
            raise WeightsError(f"{where} is a pickle, which can run code; memprof reads safetensors only")
        return [where]
    if listed:
        first = {shard: name for name, shard in reversed(listed.items())}
        for shard, name in first.items():
            if not (where / shard).is_file():
                raise WeightsError(f"shard {where / shard} is missing; the index says tensor {name!r} is in it")
        return [where / shard for shard in sorted(first)]
    files = sorted(where.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in where.iterdir() if p.suffix in _PICKLES)
        held = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
        raise WeightsError(f"{where} holds {held}; memprof reads safetensors only")
    return files


def _tensors_in(file: Path) -> list[Stored]:
    """The header of one safetensors file (8 bytes of length, then JSON), held against the file's size."""
    try:
        if not file.is_file():
            raise WeightsError(f"{file} cannot be read: it is {files.kind_of(file)}")
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise WeightsError(f"{file} is a Git LFS pointer, not weights; fetch them with `git lfs pull`")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > _LONGEST_HEADER:
                raise WeightsError(f"{file} is not a safetensors file")
            if 8 + length > size:
                raise WeightsError(f"{file} is truncated: its header takes {8 + length} bytes and the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        for _, end, name in spans:
            if 8 + length + end > size:
                raise WeightsError(
                    f"{file} is truncated: tensor {name!r} ends at byte {8 + length + end} and the file has {size}"
                )
        return [Stored(n, file, str(header[n]["dtype"]), tuple(map(int, header[n]["shape"]))) for _, _, n in spans]
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {first_line(error)}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise WeightsError(f"{file} is not a safetensors file: its header is not what the format says") from None
