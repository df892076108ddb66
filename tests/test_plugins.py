from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typed import call

from memprof import plugins
from memprof.errors import BadValue, UnknownName
from memprof.plugins import BrokenPlugin, check_settings, setting, spec_of, split_spec
from memprof.pruning import METHODS, build_pruner, method_spec


@dataclass(frozen=True)
class Plug:
    share: float = setting(0.5, "a share", origin="memprof", gt=0, le=1)
    count: int = setting(2, "a count", origin="memprof", ge=0)
    flag: bool = setting(False, "a flag", origin="memprof")
    word: str = setting("a", "a word", origin="memprof", choices=("a", "b"))


@pytest.mark.parametrize(
    ("spec", "name", "values"),
    [
        ("topv", "topv", {}),
        ("topv:keep=0.5,layer=2", "topv", {"keep": "0.5", "layer": "2"}),
        (" topv : keep = 0.5 , ", "topv", {"keep": "0.5"}),
    ],
)
def test_split_spec(spec: str, name: str, values: dict[str, str]) -> None:
    assert split_spec(spec) == (name, values)


@pytest.mark.parametrize("spec", ["topv:keep", "topv:=1", "topv:keep=", "topv:keep=1,keep=0.5"])
def test_a_spec_that_cannot_be_read_is_refused(spec: str) -> None:
    with pytest.raises(BadValue):
        split_spec(spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [("share", 0.0), ("share", 1.01), ("share", float("nan")), ("share", float("inf")), ("count", -1), ("word", "c")],
)
def test_ranges(field: str, value: object) -> None:
    with pytest.raises(BadValue, match=field):
        check_settings(dataclasses.replace(Plug(), **{field: value}))
    check_settings(Plug())


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'topv'.*baseline.*fastv"):
        METHODS.build("topvv")
    with pytest.raises(UnknownName, match=r"keepp.*keep"):
        METHODS.build("topv:keepp=1")
    with pytest.raises(UnknownName, match="has none"):
        METHODS.build("baseline:keep=1")


@pytest.mark.parametrize(
    "spec", ["topv:keep=0", "topv:keep=1.5", "topv:keep=half", "topv:layer=1.5", "fastv:drop=maybe"]
)
def test_bad_values_name_method_and_field(spec: str) -> None:
    with pytest.raises(BadValue, match=r"method \w+: (keep|layer|drop)"):
        METHODS.build(spec)


def test_specs_go_round() -> None:
    assert spec_of("plug", Plug(share=0.25, flag=True), always=("count",)) == "plug:share=0.25,count=2,flag=true"
    for spec in (
        "baseline",
        "topv:keep=0.5,layer=2",
        "fastv:keep=0.25,layer=3,scores=map",
        "random:keep=0.5,layer=2,seed=4",
    ):
        assert method_spec(build_pruner(spec)) == spec
    assert method_spec(build_pruner("fastv", "paper")) == "fastv:keep=0.5,layer=2,scores=map"
    assert method_spec(build_pruner("fastv", "current")) == "fastv:keep=0.5,layer=2,scores=row"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No module named 'broken_method'"), ("raise OSError('no\\nway')", "OSError: no;"),
        ("x = (", "SyntaxError"), ("x = 1", "exactly one public Pruner"),
    ],
)  # fmt: skip
def test_a_broken_plug_in_of_another_package_stops_no_other(
    content: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One line that names the package and the entry point; a refusal only where that very plug-in is asked for."""
    about = tmp_path / "some_thing-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[memprof.methods]\nbroken = broken_method\n")
    if content is not None:
        (tmp_path / "broken_method.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_method", raising=False)
    for remembered in (plugins._added, plugins._tell):
        remembered.cache_clear()
    try:
        code, out, _ = call(capsys, "list", "methods")
        assert code == 0
        assert "topv" in out
        (said,) = [record.getMessage() for record in caplog.records]
        assert "\n" not in said
        assert all(word in said for word in ("some-thing", "broken = broken_method", why))
        assert build_pruner("topv").title == "TopV"
        with pytest.raises(BrokenPlugin, match="some-thing"):
            build_pruner("broken")
        assert "broken" in METHODS.names()
    finally:
        plugins._added.cache_clear()


def test_a_long_list_of_names_says_how_many_it_leaves_out() -> None:
    names = [f"s{n:02}" for n in range(43)]
    error = UnknownName("sample", "s4", names, most=20)
    assert str(error).endswith("s18, s19, ... and 23 more")
    assert error.valid == names
    assert "more" not in str(UnknownName("sample", "s4", names[:20], most=20))
