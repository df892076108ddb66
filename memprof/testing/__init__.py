"""The pytest plug-in: tests that hold memory, measured or predicted, to a limit or to what it was.

pytest loads this file in every session of every project that has memprof installed, so it imports pytest alone: what a
test needs is imported when a test asks for it.

::

    @pytest.mark.gpu_memory(limit="1.2GiB", part="kv_cache")
    def test_answer(model, inputs):
        model.generate(**inputs, max_new_tokens=16)

    @pytest.mark.memory_prediction(model="internvl2-2b", card="l4", fits=True)
    def test_fits():
        pass
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memprof.testing.held import Session, Watched

MARKS = {
    "gpu_memory": "gpu_memory(limit=None, part=None, tolerance=None): hold every generate() of the test to a limit, "
    "else to its baseline",
    "memory_prediction": "memory_prediction(model=None, card=None, fits=None, limit=None, part=None, tolerance=None, "
    "**prompt): hold a prediction, which takes no card, to a card, a limit or a baseline",
}
_SESSION: pytest.StashKey[Session] = pytest.StashKey()
_WATCHED: pytest.StashKey[Watched] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--memprof-update`` and where baselines are."""
    group = parser.getgroup("memprof", "memory of vision-language models")
    group.addoption(
        "--memprof-update", action="store_true", help="write what tests take as their baselines, and hold them to none"
    )
    group.addoption("--memprof-baselines", metavar="DIR", help="folder of baselines; default: the ini's, see below")
    parser.addini("memprof_baselines", "folder of memory baselines, from the root folder", default="memory-baselines")
    parser.addini("memprof_tolerance", "what a baseline may be exceeded by, as 2% or 32MiB; the larger counts",
                  type="args", default=["2%", "32MiB"])  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Make the marks known."""
    for line in MARKS.values():
        config.addinivalue_line("markers", line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Watch a test that has a mark or asks for the fixture, and judge what it took."""
    marked = any(item.get_closest_marker(name) for name in MARKS)
    if not marked and "memory_profile" not in getattr(item, "fixturenames", ()):
        return (yield)
    watched = _watched(item)
    with watched.told():
        watched.prepare()
    with watched.watching():
        result = yield
    with watched.told():
        watched.judge()
    return result


@pytest.fixture
def memory_profile(request: pytest.FixtureRequest) -> Watched:
    """What this test's ``generate()`` calls took, so far: see :class:`memprof.testing.held.Watched`."""
    return _watched(request.node)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which baselines were written."""
    session = config.stash.get(_SESSION, None)
    if session is not None and session.written:
        for file, count in session.written.items():
            tests = f"{count} baseline{'s' * (count != 1)}"
            terminalreporter.write_line(f"memprof: {tests} written to {file}")


def _watched(item: pytest.Item) -> Watched:
    from memprof.testing.held import Session, Watched

    stash = item.config.stash
    if _SESSION not in stash:
        stash[_SESSION] = Session.of(item.config)
    if _WATCHED not in item.stash:
        item.stash[_WATCHED] = Watched(item, stash[_SESSION])
    return item.stash[_WATCHED]
