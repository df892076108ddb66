"""The book answers from what was recorded, without torch; and what recordings depend on is what finds them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_card

from memprof.bench import Bench
from memprof.environment import package_version
from memprof.errors import DoesNotFit
from memprof.families import FAMILIES
from memprof.forecasts import Setup, book
from memprof.forecasts.book import Book, Missing, depends
from memprof.models import find
from memprof.pruning import build_pruner
from memprof.records import RunSpec
from memprof.runner import Complete, complete_spec
from memprof.simulator.sizes import Sizes, packed

REFERENCE = Path(__file__).parent / "reference" / "recordings.json"
#: Families whose recordings are held: one that tiles, one that does not, and one with a vision tower of its own size.
RECORDED = ("internvl", "llava", "proving")
#: Every kind of program there is.
METHODS = (
    ("baseline", "paper"), ("fastv", "current"), ("fastv", "paper"), ("topv", "current"),
    ("fastv:drop=mask", "current"), ("pyramiddrop:keep=0.7", "current"), ("divprune", "current"),
    ("sparsevlm:keep=0.6", "current"), ("dart", "current"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("MEMPROF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def asked(monkeypatch: pytest.MonkeyPatch, method: str, stack: str, family: str = "internvl", **more: Any) -> Complete:
    """A question about a tiny model of eight decoder layers."""
    model = tiny_card(FAMILIES.load(family)()).of_depth(8)
    monkeypatch.setattr(find, "find", lambda *_: model)
    spec = RunSpec(model.name, method, "ai2d", "sim", stack, dtype="bfloat16", max_new_tokens=5, **more)
    return complete_spec(spec)


def asks_of(done: Complete, sizes: tuple[tuple[int, int, int], ...]) -> list[Any]:
    model = done.setup.model
    return [done.ask(model.family.shape(model, *size, 4), seed=0) for size in sizes]


SIZES = ((100, 100, 5), (400, 200, 9), (300, 300, 14), (400, 100, 30), (100, 300, 21), (200, 200, 17))


def recorded(done: Complete) -> Bench:
    bench = Bench(done.setup)
    bench.foresee(asks_of(done, SIZES))
    return bench


def assert_the_book_says_what_generate_does(done: Complete, bench: Bench) -> None:
    """A book that reads the file answers, and its first and last answer are what the model itself is found to do."""
    asks = asks_of(done, SIZES)
    said = [(ask, Book().forecast(done.setup, ask)) for ask in asks]
    known = [(ask, memory) for ask, memory in said if not isinstance(memory, Missing)]
    assert len(known) >= 4
    for ask, memory in (known[0], known[-1]):
        assert memory == bench.profile(ask).memory


#: Cards' own kernels, which a test below has, differ from those of no card in attention most of all.
@pytest.mark.parametrize(("method", "stack"), [
    ("baseline", "paper"), ("fastv:drop=mask", "current"), ("topv", "current"),
])  # fmt: skip
def test_it_says_what_generate_does_on_no_card(monkeypatch: pytest.MonkeyPatch, method: str, stack: str) -> None:
    done = asked(monkeypatch, method, stack)
    assert isinstance(Book().forecast(done.setup, asks_of(done, SIZES)[0]), Missing)
    assert_the_book_says_what_generate_does(done, recorded(done))


RUN = """
import dataclasses, json, sys
from pathlib import Path
from memprof.families import Model, FAMILIES
from memprof.forecasts import Ask, Setup
from memprof.forecasts.book import Book
from memprof.models.find import find
from memprof.prompts import Prompt
from memprof.pruning import build_pruner
setup = Setup(find("internvl2-2b").but(text={"num_hidden_layers": 4}, vision={"num_hidden_layers": 1}), "sim",
              "bfloat16", gpu="l4")
shape = setup.model.family.shape(setup.model, 900, 448, 40)
memory = Book().forecast(setup, Ask(build_pruner("topv"), "current", Prompt(shape), 4))
print(json.dumps(memory.to_json()))
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_torch_is_not_loaded_for_an_answer() -> None:
    model = find.find("internvl2-2b").but(text={"num_hidden_layers": 4}, vision={"num_hidden_layers": 1})
    setup = Setup(model, "sim", "bfloat16", gpu="l4")
    done = complete_spec(RunSpec("internvl2-2b", "topv", "ai2d", "sim", gpu="l4", max_new_tokens=4))
    shapes = [model.family.shape(model, 448 * n, 448, 40 + n) for n in range(1, 7)]
    asks = [done.ask(shape, seed=0) for shape in [*shapes, model.family.shape(model, 900, 448, 40)]]
    bench = Bench(setup)
    bench.foresee(asks)
    said = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == bench.outcome(asks[-1]).memory.to_json()


def test_titles_paths_and_other_families_find_the_same_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = asked(monkeypatch, "topv", "current")
    pruner, setup = build_pruner("topv"), done.setup
    same = depends(setup, pruner, "current")
    renamed = dataclasses.replace(
        setup.model, name=str(tmp_path), title="Mine", source="nowhere", hub="a/b", template=(9, 9)
    )
    assert depends(dataclasses.replace(setup, model=renamed, seed=7, weights="hub"), pruner, "current") == same
    assert depends(dataclasses.replace(setup, model=setup.model.but(image_token_id=11)), pruner, "current") == same
    assert depends(setup, build_pruner("topv:keep=0.1"), "current") == same
    for other in (
        depends(setup, build_pruner("topv:layer=3"), "current"), depends(setup, pruner, "paper"),
        depends(dataclasses.replace(setup, dtype="float32"), pruner, "current"),
        depends(dataclasses.replace(setup, attention="eager"), pruner, "current"),
        depends(dataclasses.replace(setup, gpu="t4"), pruner, "current"),
        depends(dataclasses.replace(setup, model=setup.model.but(text={"hidden_size": 64})), pruner, "current"),
    ):  # fmt: skip
        assert other != same


def test_a_spoiled_entry_is_none_and_is_made_anew(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    done = asked(monkeypatch, "baseline", "current")
    recorded(done)
    (file,) = cache.glob("*.json")
    good = file.read_text()
    for spoiled in (
        good[: len(good) // 2], "", "[]", good.replace("1", "2", 5), good.replace('"sha', "x") + " ",
        json.dumps({**json.loads(good), "weights": [["x", 1]]}),
    ):  # fmt: skip
        assert spoiled != good
        file.write_text(spoiled)
        assert isinstance(Book().forecast(done.setup, asks_of(done, SIZES)[0]), Missing), spoiled[:80]
    recorded(done)
    assert file.read_text() == good


def test_a_plug_ins_words_are_no_part_of_an_entry(tmp_path: Path) -> None:
    """What a file does is; comments, docstrings and empty lines are not."""
    code = '"""Doc."""\n\nKEEP = "0.5"  # half\n\n\ndef kept(n):\n    """Say.\n\n    More.\n    """\n    return KEEP\n'

    def sum_of(text: str) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        file.write_text(text)
        return book._source(str(file))

    for words in (
        code.replace("Doc.", "Other."), code.replace("half", "a half"), code.replace("More.\n", "More.\n\n    Yet.\n"),
        code.replace("# half", ""), code.replace('"""\n    return', '"""  # said\n    # so\n\n    return'),
    ):  # fmt: skip
        assert words != code
        assert sum_of(words) == sum_of(code), words
    for deeds in (code.replace("0.5", "0.6"), code.replace("return KEEP", "return n")):
        assert deeds != code
        assert sum_of(deeds) != sum_of(code), deeds


def test_two_writers_keep_each_others_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One knows prompts of one token, the other of two: the entry holds both, whoever wrote last."""
    done = asked(monkeypatch, "baseline", "current")
    asks = asks_of(done, SIZES)
    benches = [Bench(done.setup), Bench(done.setup)]
    for tokens, bench in enumerate(benches, start=1):
        mine = [dataclasses.replace(ask, new_tokens=tokens) for ask in asks]
        assert bench.book.entry(done.setup, done.pruner, "current")  # read before the other has written
        bench.foresee(mine)
    for tokens in (1, 2):
        said = Book().forecast(done.setup, dataclasses.replace(asks[0], new_tokens=tokens))
        assert not isinstance(said, Missing)


def test_many_writers_at_once_leave_a_whole_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    done = asked(monkeypatch, "baseline", "current")
    asks = asks_of(done, SIZES)
    Bench(done.setup).foresee(asks)
    entry = Book().entry(done.setup, done.pruner, "current")
    writers = [threading.Thread(target=Book().write, args=(done.setup, "current", entry)) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not isinstance(Book().forecast(done.setup, asks[0]), Missing)


def test_weights_that_do_not_fit_are_refused_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    done = asked(monkeypatch, "baseline", "current")
    asks = asks_of(done, SIZES)
    Bench(done.setup).foresee(asks)
    with pytest.raises(DoesNotFit, match="the weights do not fit on 8MiB"):
        Book().forecast(dataclasses.replace(done.setup, gpu="8MiB"), asks[0])


# -- the recorder's version --------------------------------------------------------------------------------------------


def sized(told: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """A program's plain data with its sizes as they are: how they are packed has no part in what was recorded."""
    rest = {name: value for name, value in told.items() if name not in packed(sizes.tables)}
    dims, growth = ([table[i].tolist() for table in sizes.tables] for i in range(2))
    return {**rest, "dims": dims, "growth": growth}


def digest(done: Complete, bench: Bench) -> str:
    """What was recorded, in short."""
    found = bench.book.entry(done.setup, done.pruner, done.spec.stack).programs
    programs: list[Any] = [[key, one and sized(one.to_json(), one.sizes)] for key, one in found.shared.items()]
    programs += [
        {**one.course._asdict(), "among": one.among, "seen": one.seen, "rows": [t.tolist() for t in one.sizes.tables]}
        for one in found.selections.known
    ]
    return hashlib.sha256(json.dumps(programs, default=str).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("method", "stack"), METHODS)
@pytest.mark.parametrize("family", RECORDED)
def test_recordings_that_change_count_up_the_recorders_version(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, family: str, method: str, stack: str
) -> None:
    """Entries on users' disks are found by ``RECORDER``: recordings that differ under one number would be mixed.

    Where this fails, count :data:`memprof.forecasts.book.RECORDER` up, and run
    ``python -m pytest tests/test_book.py -k count_up --record`` to write the file anew.
    """
    done = asked(monkeypatch, method, stack, family, gpu="h100")
    bench = recorded(done)
    if family == RECORDED[0]:
        assert_the_book_says_what_generate_does(done, bench)
    key, found = f"{family} {method} {stack}", digest(done, bench)
    there = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    now = {"recorder": book.RECORDER, **{name: package_version(name) for name in ("torch", "transformers")}}
    if request.config.getoption("--record"):
        programs = {**there.get("programs", {}), key: found}
        REFERENCE.write_text(json.dumps({**now, "programs": programs}, indent=1) + "\n")
        return
    assert there["recorder"] == book.RECORDER, "RECORDER was counted up: write the file anew"
    if {name: there[name] for name in now} != now:
        pytest.skip("recorded with other versions of torch or transformers, which have entries of their own")
    assert there["programs"][key] == found, "recordings changed, and RECORDER did not"


def test_every_recording_held_is_one_that_is_made() -> None:
    there = json.loads(REFERENCE.read_text())["programs"]
    assert set(there) == {f"{family} {method} {stack}" for family in RECORDED for method, stack in METHODS}
