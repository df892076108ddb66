"""Files of every kind, bent in every way: each ends in an answer or one line, soon, and within the memory there is.

A few thousand cases in CI; ``make fuzz`` asks for a hundred thousand (``MEMPROF_FUZZ``: cases a test). The harness
holds each case to :data:`SECONDS` of CPU, to :data:`WAITING` of waiting (a machine may be busy), and to :data:`BYTES`.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memprof.errors import MemprofError
from memprof.forecasts import Ask, Setup
from memprof.forecasts.book import Book
from memprof.models import find
from memprof.models.files import stored_tensors
from memprof.plugins import split_spec
from memprof.prompts import Prompt
from memprof.pruning import build_pruner
from memprof.records import RunRecord, RunSpec, SampleRecord, TokenColumns
from memprof.reports import render
from memprof.snapshots.report import analyse
from memprof.store import RunFolder, find_runs
from memprof.tasks import TASKS
from memprof.tuning.preset import read_preset
from memprof.units import parse_bytes

SECONDS, WAITING, BYTES = 5.0, 60.0, 2**30
CASES = int(os.environ.get("MEMPROF_FUZZ", "150"))

fuzzed = settings(
    max_examples=CASES, deadline=None, derandomize="MEMPROF_FUZZ" not in os.environ, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@contextmanager
def limits() -> Iterator[None]:
    """Hold what runs inside to :data:`SECONDS` and to :data:`BYTES` beyond what the process has already."""

    def late(*_: object) -> None:
        raise AssertionError(f"more than {SECONDS} s of CPU, or {WAITING} s of waiting")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)}
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def ends_well(work: Callable[[], Any]) -> None:
    """Whatever ``work`` does is done within the limits, or refused in one line."""
    with limits():
        try:
            work()
        except MemprofError as error:
            one_line(error)


def one_line(error: MemprofError) -> None:
    assert "\n" not in str(error).strip()


def test_what_never_ends_or_fills_the_memory_is_caught() -> None:
    def busy() -> None:
        while True:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SECONDS", 0.2)
        patch.setattr(sys.modules[__name__], "WAITING", 0.5)
        with pytest.raises(AssertionError, match="of CPU"), limits():
            busy()
        with pytest.raises(AssertionError, match="of waiting"), limits():
            signal.pause()
    with pytest.raises(MemoryError), limits():
        bytearray(2 * BYTES)


# -- what is bent ------------------------------------------------------------------------------------------------------

NASTY = st.sampled_from([
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\ud800",
    "\x1b[31m", "../../x", "/dev/zero", "=1+1", "nan", "1e999", "9" * 5000, [], [[]], [None], {}, {"a": {}}, [1, "a"],
    "topv:keep=nan", "baseline:x", "a:b=c,b=c", "$\\frac{", "i/n", "0/0", "3/2",
])  # fmt: skip


@st.composite
def bent(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with up to three of its values exchanged, dropped or doubled."""
    bending = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        node, key, parent = bending, None, None
        while isinstance(node, dict | list) and node and (parent is None or draw(st.integers(0, 4))):
            parent, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            node = parent[key]
        nasty = copy.deepcopy(draw(NASTY))  # bent further perhaps, which is nothing to the next document
        if parent is None:
            return nasty
        how = draw(st.integers(0, 5))
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = nasty
    return bending


PUT_IN = [b"[" * 2000, b'{"a":' * 2000, b"\x00", b"\n", b"\r", b'"', b"\xff", b"9" * 400]


#: One damage: where, to how many bytes, which kind, and what is written there.
Damage = tuple[int, int, int, bytes]


def damages(length: int) -> st.SearchStrategy[list[Damage]]:
    """A few damages to so many bytes; as they are drawn they are small, for hypothesis keeps what it draws."""
    kinds = st.one_of(
        st.tuples(st.integers(0, 2), st.just(b"")),
        st.tuples(st.just(3), st.binary(min_size=1, max_size=3)),
        st.tuples(st.just(4), st.sampled_from(PUT_IN)),
    )
    one = st.tuples(st.integers(0, length), st.integers(1, 40), kinds).map(lambda drawn: (*drawn[:2], *drawn[2]))
    return st.lists(one, min_size=1, max_size=4)


def damaged(whole: bytes, wounds: list[Damage]) -> bytes:
    """Bytes with a few of them changed, dropped, doubled or put in between."""
    data = bytearray(whole)
    for place, some, how, new in wounds:
        at = min(place, len(data))
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at : at + some]
        elif how == 2:
            data[at:at] = data[at : at + some]
        elif how == 3:
            data[at : at + 1] = new
        else:
            data[at:at] = new
    return bytes(data)


def cut(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few of them damaged."""
    return damages(len(whole)).map(lambda wounds: damaged(whole, wounds))


def written(path: Path, content: bytes | Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode(errors="backslashreplace"))
    return path


def either(document: Any) -> st.SearchStrategy[Any]:
    return st.one_of(bent(document), cut(json.dumps(document).encode()))


# -- run folders -------------------------------------------------------------------------------------------------------

SPEC = RunSpec(model="internvl2-2b", method="topv:keep=0.5,layer=2", task="ai2d", device="sim")
SAMPLE = SampleRecord(
    id="a", tokens=TokenColumns([150, 140], [120, 121], [200, 200], [10, 11], [None, 5], [None, 0.5]), visual_tokens=4,
    peak_parts={"mlp": 50}, token_parts={"mlp": [50, 40]}, dynamic_peak_bytes=50, kept_visual_tokens=[4, 2], score=0.5,
    fidelity={"kl": 0.1, "agreement": 1.0, "exact": 1.0, "first_divergence": 2.0}, answer="x", category="c",
)  # fmt: skip
RECORD = RunRecord(spec=SPEC, status="predicted", static_bytes=100, data_label="AI2D", samples_asked=2).to_json()


def read_and_show(folder: Path) -> None:
    runs = find_runs([folder])
    for form in ("table", "markdown", "csv", "json", "html", "chrome"):
        render(form, runs)


@fuzzed
@given(record=either(RECORD), sample=either(SAMPLE.to_json()))
def test_run_folders(tmp_path: Path, record: Any, sample: Any) -> None:
    for one, lines in ((record, SAMPLE.to_json()), (RECORD, sample)):
        written(tmp_path / "r" / "run.json", one)
        written(tmp_path / "r" / "samples.jsonl", lines)
        with (tmp_path / "r" / "samples.jsonl").open("ab") as file:
            file.write(b"\n")
        ends_well(lambda: read_and_show(tmp_path / "r"))


@fuzzed
@given(st.lists(st.integers(0, 3), max_size=12), st.binary(max_size=30))
def test_what_was_appended_is_read_whatever_is_torn(tmp_path: Path, numbers: list[int], torn: bytes) -> None:
    with RunFolder.open(tmp_path / "s", RunRecord(spec=SPEC, status="predicted"), force=True) as folder:
        for number in numbers:
            folder.append(SampleRecord(id=f"{number}\ud800"))
    with (tmp_path / "s" / "samples.jsonl").open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    (run,) = find_runs([tmp_path / "s"])
    assert [one.id for one in run.samples] == list(dict.fromkeys(f"{number}\ud800" for number in numbers))


# -- data --------------------------------------------------------------------------------------------------------------

ROW = {"image": "a.png", "question": "q", "options": ["x", "y"], "answer": "A", "text_tokens": 3}
ROWS = [{"id": name, **ROW} for name in "abc"]
CSV = b"width,height,text_tokens,id\n400,300,20,a\n10,20,5,\n"
TSV = b"index\timage\tquestion\tA\tB\tanswer\n1\taGFsbG8=\tq?\tx\ty\tA\n2\t1\tq?\tx\ty\tB\n"


def read_all(path: Path) -> None:
    for task in ("folder", "ai2d", "ocrbench"):
        try:
            samples = TASKS.build(task).samples(str(path))
        except MemprofError:
            continue
        for number in range(len(samples)):
            try:
                samples[number].image()
            except MemprofError as error:
                one_line(error)


@fuzzed
@given(rows=bent(ROWS), csv=cut(CSV), tsv=cut(TSV), jsonl=cut("\n".join(map(json.dumps, ROWS)).encode()))
def test_data(tmp_path: Path, rows: Any, csv: bytes, tsv: bytes, jsonl: bytes) -> None:
    lines = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode(errors="backslashreplace")
    for name, content in (("a.jsonl", lines), ("b.jsonl", jsonl), ("c.csv", csv), ("d.tsv", tsv)):
        path = written(tmp_path / name, content)
        ends_well(lambda path=path: read_all(path))  # type: ignore[misc]


@pytest.fixture(scope="module")
def table() -> bytes:
    """The rows as a parquet file, with the picture's bytes in them as the hub has it, read once: no case is timed with
    the reader's import.
    """
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{**row, "image": {"bytes": b"\x89PNG", "path": None}, "text_tokens": 3} for row in ROWS]
    whole = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist(rows), whole)
    return bytes(whole.getvalue())


@fuzzed
@given(data=st.data())
def test_parquet(table: bytes, tmp_path: Path, data: st.DataObject) -> None:
    read_all(written(tmp_path / "whole.parquet", table))
    path = written(tmp_path / "t.parquet", data.draw(cut(table)))
    ends_well(lambda: read_all(path))


# -- snapshots ---------------------------------------------------------------------------------------------------------


def _snapshot() -> dict[str, Any]:
    """Two devices, stacks, several streams, an out-of-memory event, and a segment with its blocks."""
    frames = [{"filename": "model.py", "line": 31, "name": "forward"}, {"filename": "run.py", "line": 4, "name": "f"}]
    events = [
        {"action": "segment_alloc", "addr": 2**31, "size": 2**21, "stream": 0, "frames": frames},
        {"action": "alloc", "addr": 2**31, "size": 1024, "stream": 0, "frames": frames, "time_us": 5},
        {"action": "alloc", "addr": 2**31 + 1024, "size": 4096, "stream": 3, "frames": frames[:1], "pool_id": [0, 1]},
        {"action": "free_requested", "addr": 2**31, "size": 1024, "stream": 0, "frames": []},
        {"action": "free_completed", "addr": 2**31, "size": 1024, "stream": 0, "frames": []},
        {"action": "oom", "size": 2**33, "device_free": 2**20, "stream": 0, "frames": frames},
    ]
    blocks = [
        {"address": 2**31, "size": 1024, "requested_size": 1000, "state": "inactive", "frames": []},
        {"address": 2**31 + 1024, "size": 4096, "requested_size": 4096, "state": "active_allocated", "frames": frames},
        {"address": 2**31 + 5120, "size": 2**21 - 5120, "requested_size": 0, "state": "inactive", "frames": []},
    ]
    segment = {
        "device": 0, "address": 2**31, "total_size": 2**21, "allocated_size": 4096, "active_size": 4096,
        "requested_size": 4096, "stream": 0, "segment_type": "small", "segment_pool_id": [0, 0],
        "is_expandable": False, "frames": frames, "blocks": blocks,
    }  # fmt: skip
    return {
        "segments": [segment], "device_traces": [events, [dict(event) for event in events[1:5]]],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "max_split_size": -1, "garbage_collection_threshold": 0.0,
                               "expandable_segments": False, "roundup_power2_divisions": {"1": 0}},
    }  # fmt: skip


SNAPSHOT = _snapshot()
PICKLED = [pickle.dumps(SNAPSHOT, protocol) for protocol in range(2, 6)]


@fuzzed
@given(
    document=bent(SNAPSHOT), pickled=st.sampled_from(PICKLED).flatmap(cut),
    packed=cut(gzip.compress(PICKLED[2], mtime=0)), protocol=st.integers(2, 5),
)  # fmt: skip
def test_snapshots(tmp_path: Path, document: Any, pickled: bytes, packed: bytes, protocol: int) -> None:
    """The values of a pickle exchanged, its bytes changed, the same packed, and as the viewer saves it."""
    for name, content in (
        ("bent.pickle", pickle.dumps(document, protocol)), ("cut.pickle", pickled), ("cut.pickle.gz", packed),
        ("bent.json", document),
    ):  # fmt: skip
        path = written(tmp_path / name, content)
        ends_well(lambda path=path: analyse(path, ("expandable_segments:True",)))  # type: ignore[misc]


@pytest.mark.parametrize("whole", [*PICKLED, gzip.compress(PICKLED[2]), json.dumps(SNAPSHOT).encode()])
def test_what_is_bent_is_sound(tmp_path: Path, whole: bytes) -> None:
    found = analyse(written(tmp_path / "whole", whole))
    assert found.out_of_memory is not None
    assert found.events == 6


# -- presets, words, configurations, weights, recorded programs --------------------------------------------------------

PRESET = {"schema": 1, "preset": {"method": ["topv:keep=0.4"], "stack": "paper", "max_new_tokens": 3}, "because": {}}


@fuzzed
@given(preset=either(PRESET), toml=cut(b'method = "topv:keep=0.4"\nmax_new_tokens = 2\n[preset]\nseed = 1\n'))
def test_presets(tmp_path: Path, preset: Any, toml: bytes) -> None:
    for name, content in (("p.json", preset), ("p.toml", toml)):
        path = written(tmp_path / name, content)
        ends_well(lambda path=path: read_preset(path))  # type: ignore[misc]


WORDS = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A(topv|fastv|dart|baseline|random|visionzip|x)(:(keep|layer|ratio|seed)=[-0-9a-z.e]{0,9}(,[a-z]+=.{0,9})?)?\Z"),
)


@fuzzed
@given(WORDS)
def test_spec_strings(text: str) -> None:
    ends_well(lambda: split_spec(text))
    ends_well(lambda: build_pruner(text, "current").stages(1000, 24))
    ends_well(lambda: parse_bytes(text))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What reads configurations is imported before a case is timed."""
    find.find(str(written(tmp_path_factory.mktemp("m") / "config.json", CONFIG).parent))


CONFIG = dict(find.find("internvl2-2b").config)


@settings(fuzzed, max_examples=max(CASES // 5, 1))
@given(either(CONFIG))
def test_configurations(warm: None, tmp_path: Path, config: Any) -> None:
    path = written(tmp_path / "m" / "config.json", config)
    ends_well(lambda: find.find(str(path.parent)))


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@fuzzed
@given(header=either(HEADER), whole=cut(struct.pack("<Q", 20) + b"{}" + b" " * 18 + bytes(32)))
def test_safetensors(tmp_path: Path, header: Any, whole: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode(errors="backslashreplace")
    for content in (struct.pack("<Q", len(text)) + text + bytes(32), whole):
        path = written(tmp_path / "w.safetensors", content)
        ends_well(lambda path=path: stored_tensors(path))  # type: ignore[misc]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Setup, Ask]:
    """An entry of the book, and what it answers for."""
    from memprof.bench import Bench
    from memprof.runner import complete_spec

    folder = tmp_path_factory.mktemp("book")
    asked = complete_spec(RunSpec("proving", "baseline", "ai2d", "sim", dtype="float32", max_new_tokens=2))
    ask = asked.ask(asked.setup.model.family.shape(asked.setup.model, 64, 64, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMPROF_CACHE", str(folder))
        bench = Bench(asked.setup)
        bench.foresee([ask])
        (file,) = (folder / "programs").glob("*.json")
    return file, file.read_bytes(), asked.setup, Ask(ask.pruner, ask.stack, Prompt(ask.shape), 2, 0)


@fuzzed
@given(data=st.data())
def test_programs_are_right_or_made_anew(recorded: tuple[Path, bytes, Setup, Ask], data: st.DataObject) -> None:
    file, whole, setup, ask = recorded
    file.write_bytes(whole)
    true = Book(file.parent).forecast(setup, ask)
    file.write_bytes(damaged(whole, data.draw(damages(len(whole)))))
    with limits():
        found = Book(file.parent).forecast(setup, ask)
    assert found == true or hasattr(found, "what")
