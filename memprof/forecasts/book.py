"""The book: recorded programs on disk, found by what bytes depend on, and read without torch.

An entry is a file. It is found by the configuration's numbers, the method, the stack, the versions of what runs, and
the version of the recorder; no title, path or other family has a part in it. It holds the sizes of the weights as well,
so that a prediction needs nothing but the file. A file that is damaged, or of another layout, is as good as none.

Behind the user's folder stands the book that ships with memprof (:data:`SHIPPED`), which is only read:
``scripts/record_book.py`` makes it.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import lzma
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memprof import files
from memprof.environment import package_version
from memprof.errors import MemprofError
from memprof.files import cache_folder
from memprof.forecasts import Ask, Setup
from memprof.forecasts.programs import Forecast, Lengths, Programs
from memprof.forecasts.windows import capped, windows_of
from memprof.gpus import calibrated, find_card
from memprof.pruning import Pruner, method_spec, visual_tokens_per_layer
from memprof.pruning.signals import signal_kind
from memprof.records import Memory, TokenColumns
from memprof.simulator.loaded import Loaded
from memprof.simulator.program import Program
from memprof.simulator.selection import Selections

#: Layout of a file; others are made anew.
SCHEMA = 5
#: What the recorder makes of a model. Count it up whenever a recording, or how one is folded, changes: entries made
#: before are then made anew. ``tests/test_book.py`` fails where recordings changed and this did not.
RECORDER = 4
#: Most programs of one prompt each that an entry keeps, the latest: many prompts come to share a program.
MOST_ALONE = 64
#: What was recorded before memprof was packed: entries as in a user's folder, each compressed.
SHIPPED = Path(__file__).parent / "shipped"
SUFFIX = ".json.xz"
#: What stands between an entry's body and its checksum.
_SEAL = ', "checksum": "'


@dataclass(frozen=True)
class Missing:
    """Why the book has no answer: ``what`` must be recorded first (:mod:`memprof.bench.recorder`)."""

    what: str


@dataclass(frozen=True)
class Resident:
    """What is on a card before the first prompt.

    Attributes:
        weights: Name and bytes of each of the model's storages, and what it counts to in a run's static parts.
        biased: Whether one of its linear layers has a bias (:class:`~memprof.simulator.loaded.Loaded`).
        attention: Attention that its language model runs.
    """

    weights: tuple[tuple[str, int, str], ...]
    biased: bool
    attention: str

    def loaded(self, gpu: str | None) -> Loaded:
        """The allocator once it is there; raises DoesNotFit where the card is too small."""
        sizes = [(name, n_bytes) for name, n_bytes, _ in self.weights]
        return Loaded(sizes, biased=self.biased, card=calibrated(find_card(gpu)))


@dataclass
class Entry:
    """One file.

    Attributes:
        programs: What was recorded.
        resident: The model it was recorded of; None where nothing was recorded yet.
    """

    programs: Programs
    resident: Resident | None = None


class Book:
    """The entries in a folder; ``folder`` None: the cache's (:func:`memprof.files.cache_folder`), if there is one.

    What was read or recorded stays in memory, also where nothing is kept on disk.
    """

    def __init__(self, folder: Path | None = None) -> None:
        cached = cache_folder()
        self.folder = folder or (cached / "programs" if cached is not None else None)
        self._loaded: dict[tuple[Resident, str | None], Loaded] = {}
        self._entries: dict[tuple[Setup, Pruner, str], Entry] = {}

    # -- answering -----------------------------------------------------------------------------------------------------

    def forecast(self, setup: Setup, ask: Ask) -> Memory | Missing:
        """What a prompt holds on the set-up's card, from what was recorded before; torch is not loaded.

        Raises:
            DoesNotFit: The weights alone do not fit on the card.
        """
        entry = self.entry(setup, ask.pruner, ask.manner)
        if entry.resident is None:
            return Missing("nothing was recorded of this model under this method and stack")
        loaded, programs = self.loaded(entry.resident, setup.gpu), entry.programs.under(ask.pruner)
        found = programs.forecast(ask.shape, ask.new_tokens, loaded.allocator, loaded.known)
        return Missing("no program answers for this prompt") if found is None else memory_of(found, setup, ask)

    def loaded(self, resident: Resident, gpu: str | None) -> Loaded:
        """The card ``gpu`` once a model is on it; readings that begin there learn from each other."""
        key = resident, gpu
        if key not in self._loaded:
            self._loaded[key] = resident.loaded(gpu)
        return self._loaded[key]

    # -- on disk -------------------------------------------------------------------------------------------------------

    def file(self, setup: Setup, pruner: Pruner, manner: str) -> Path | None:
        """The file of an entry; None where nothing is kept."""
        return None if self.folder is None else self.folder / f"{name_of(setup, pruner, manner)}.json"

    def entry(self, setup: Setup, pruner: Pruner, manner: str) -> Entry:
        """What is known: read once, and from then on whatever is added to it here."""
        key = setup, pruner.like, manner
        if key not in self._entries:
            name = name_of(*key)
            own = None if self.folder is None else _read(self.folder / f"{name}.json", setup, pruner)
            shipped = _read(SHIPPED / f"{name}{SUFFIX}", setup, pruner)
            self._entries[key] = _joined(own, shipped) or Entry(_nothing(setup, pruner))
        return self._entries[key]

    def write(self, setup: Setup, manner: str, entry: Entry) -> None:
        """Put an entry on disk, beside what others wrote there; a cache that cannot be written is no error."""
        pruner = entry.programs.pruner.like
        file = self.file(setup, pruner, manner)
        if file is None or entry.resident is None:
            return
        try:
            with _alone(file):
                programs = entry.programs
                shared, alone, filling = programs.shared, programs.alone, programs.filling
                if (there := _read(file, setup, pruner)) is not None:
                    shared = {**there.programs.shared, **shared}
                    alone = {**there.programs.alone, **alone}
                    filling = {**there.programs.filling, **filling}
                    programs.selections.join(there.programs.selections)
                body = {
                    "schema": SCHEMA, "depends": depends(setup, pruner, manner), **vars(entry.resident),
                    "programs": [[key, None if one is None else one.to_json()] for key, one in shared.items()],
                    "alone": _latest(alone),
                    "selections": programs.selections.to_json(),
                }  # fmt: skip
                if filling:
                    body["filling"] = _latest(filling)
                text = json.dumps(body, default=str)
                files.replace(file, f'{text[:-1]}{_SEAL}{_checksum(text)}"}}')
        except (OSError, MemprofError):
            return


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep other writers of the same file away."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(file.with_suffix(".lock")):
        yield


def _latest(programs: Mapping[Lengths, Program | None]) -> list[Any]:
    """The latest of programs that answer for one prompt each, as plain data."""
    return [[key, one.to_json()] for key, one in programs.items() if one is not None][-MOST_ALONE:]


def _frozen(key: Any) -> Any:
    """A key as it was before it was written: lists are tuples again, at every depth."""
    return tuple(map(_frozen, key)) if isinstance(key, list) else key


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _nothing(setup: Setup, pruner: Pruner) -> Programs:
    """No programs yet."""
    return Programs(setup.model.layers, pruner.like, windows_of(setup.model))


def _read(file: Path, setup: Setup, pruner: Pruner) -> Entry | None:
    """The entry in a file, or None where there is none that can be trusted."""
    try:
        text = lzma.decompress(files.read_bytes(file)).decode() if file.suffix == ".xz" else files.read_text(file)
        body, seal, rest = text.rpartition(_SEAL)
        body += "}"
        if not seal or rest != f'{_checksum(body)}"}}':
            return None
        data = files.parse_json(body, str(file))
        if data["schema"] != SCHEMA:
            return None
        programs = _nothing(setup, pruner)
        for key, program in data["programs"]:
            programs.shared[_frozen(key)] = None if program is None else Program.from_json(program)
        programs.alone = {_frozen(key): Program.from_json(program) for key, program in data["alone"]}
        programs.filling = {_frozen(key): Program.from_json(program) for key, program in data.get("filling", ())}
        programs.selections = Selections.from_json(data["selections"])
        weights = tuple((str(name), int(n), str(group)) for name, n, group in data["weights"])
        return Entry(programs, Resident(weights, bool(data["biased"]), str(data["attention"])))
    except (OSError, MemprofError, ValueError, KeyError, TypeError, IndexError, AttributeError, lzma.LZMAError):
        return None


def _joined(own: Entry | None, shipped: Entry | None) -> Entry | None:
    """A user's entry and the shipped one: of each program the one that has seen more."""
    if own is None or shipped is None:
        return own or shipped
    mine, theirs = own.programs, shipped.programs
    for key, program in theirs.shared.items():
        if key not in mine.shared or _seen(program) > _seen(mine.shared[key]):
            mine.shared[key] = program
    mine.alone = {**theirs.alone, **mine.alone}
    mine.filling = {**theirs.filling, **mine.filling}
    mine.selections.join(theirs.selections)
    return own


def _seen(program: Program | None) -> int:
    return 0 if program is None else program.recordings


# -- what it depends on ------------------------------------------------------------------------------------------------


def name_of(setup: Setup, pruner: Pruner, manner: str) -> str:
    """What an entry's file is called, without its suffix: a checksum of all that it depends on."""
    text = json.dumps(depends(setup, pruner, manner), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def depends(setup: Setup, pruner: Pruner, manner: str) -> dict[str, Any]:
    """All that a recording depends on, as plain data; ``manner`` as :attr:`memprof.forecasts.Ask.manner`.

    What the files of the method, of the signals it looks at and of the family do is in it, as somebody may be writing
    them; memprof's own common code is :data:`RECORDER`. A version's build (``2.13.0+cpu``) has no part in it: what is
    recorded are operators on tensors without storage, which are no device's.
    """
    like, model = pruner.like, setup.model
    return {
        "recorder": RECORDER, "torch": _release("torch"), "transformers": _release("transformers"),
        "config": _numbers(model.config), "dtype": setup.dtype, "attention": setup.attention,
        "kernels": calibrated(find_card(setup.gpu)).architecture, "stack": manner, "method": method_spec(like),
        "files": [
            _source(inspect.getfile(one))
            for one in (type(like), type(model.family), *(signal_kind(name) for name in sorted(like.needs)))
        ],
    }  # fmt: skip


def _release(package: str) -> str:
    """The version of an installed package, without the part that names a build."""
    return (package_version(package) or "").partition("+")[0]


def _numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what moves no byte: ids of tokens, and names."""
    return {
        key: _numbers(value) if isinstance(value, Mapping) else value
        for key, value in sorted(config.items(), key=lambda item: str(item[0]))
        if not str(key).endswith(("_token_id", "_token_index"))
        and key not in ("_name_or_path", "architectures", "chat")
    }


@cache
def _source(file: str) -> str:
    """A checksum of what a plug-in's file does, in which comments, docstrings and empty lines have no part."""
    text = Path(file).read_text(encoding="utf-8")
    lines, tokens = text.splitlines(), [*tokenize.generate_tokens(io.StringIO(text).readline)]
    silent = [token for token in tokens if token.type == tokenize.COMMENT]
    tokens = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    ends = (None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for before, token, after in zip([None, *tokens], tokens, tokens[1:], strict=False):
        if token.type == tokenize.STRING and after.type == tokenize.NEWLINE and (before and before.type) in ends:
            silent.append(token)
    for token in sorted(silent, key=lambda token: token.start, reverse=True):
        (first, start), (last, end) = token.start, token.end
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    code = "\n".join(filter(None, map(str.rstrip, lines)))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def memory_of(forecast: Forecast, setup: Setup, ask: Ask) -> Memory:
    """A forecast as a record has it."""
    reading, shape, layers = forecast.reading, ask.shape, setup.model.layers
    columns = TokenColumns(
        reading.peak_allocated_bytes, reading.allocated_bytes, reading.reserved_bytes, forecast.kv_bytes,
        reading.device_used_bytes, [None] * len(reading.allocated_bytes),
    )  # fmt: skip
    visual = visual_tokens_per_layer(ask.pruner.stages(shape.visual_tokens, layers), shape.visual_tokens, layers)
    if ask.pruner.mask_only:
        visual = [shape.visual_tokens] * layers
    return Memory(
        [reading.memory(columns)],
        kept_visual_tokens=visual,
        kv_tokens_planned=capped([shape.text_tokens + each for each in visual], windows_of(setup.model)),
        kv_tokens_found=forecast.kv_tokens,
        kv_bytes_per_layer=forecast.kv_bytes_per_layer,
        refused=reading.refused,
    )
