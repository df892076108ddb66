"""``memprof tune`` and ``memprof fit`` as a user types them, on predictions made up where nothing hangs on them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typed import call

from memprof.analysis import fit as fits
from memprof.bench import Bench
from memprof.bench.outcome import Outcome, Standing
from memprof.errors import BadValue, DataError, DoesNotFit
from memprof.forecasts import Ask
from memprof.gpus import ANY, CONTEXT_BYTES, calibrated, find_card
from memprof.plugins import split_spec
from memprof.pruning import method_spec, visual_tokens_per_layer
from memprof.records import PARTS, CardMemory, Holder, Memory, RunSpec, TokenColumns
from memprof.tuning.preset import read_preset, write_preset
from memprof.units import GIB, MIB

pytest.importorskip("optuna")
STATIC = 4 * GIB


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Predictions by arithmetic: logits of what is kept, and a cache. Returns the methods that were asked for."""
    asked: list[str] = []

    def outcome(self: Bench, ask: Ask) -> Outcome:
        pruner, shape = ask.pruner, ask.shape
        asked.append(method_spec(pruner))
        layers = visual_tokens_per_layer(pruner.stages(shape.visual_tokens, 24), shape.visual_tokens, 24)
        tokens = [shape.batch * (shape.text_tokens + n) for n in layers]
        cache = [4096 * n for n in tokens]
        peak = STATIC + sum(cache) + (6 * 92553 * tokens[-1] if ask.stack == "paper" else 2**20)
        columns = TokenColumns([peak, STATIC + sum(cache) + 98304], [peak] * 2, [peak + 64 * MIB] * 2)
        parts = dict.fromkeys(PARTS, 0) | {"logits": peak - STATIC}
        holder = Holder(peak - STATIC, "logits", "lm_head", "_to_copy", [1, tokens[-1], 92553], "float32", "prefill")
        card = CardMemory(columns, 0, "prefill", 0, parts, {}, [holder], peak - STATIC)
        return Outcome(Memory([card], layers, tokens, tokens, cache), None)

    monkeypatch.setattr(Bench, "outcome", outcome)
    monkeypatch.setattr(Bench, "foresee", lambda *_: None)
    monkeypatch.setattr(Bench, "standing", lambda *_: Standing(STATIC, {}, "sdpa", {}))
    return asked


TUNE = ["tune", "--method", "topv", "--task", "ai2d", "--stack", "paper", "--device", "sim", "--limit", "8"]


def test_the_largest_keep_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path, made_up: list[str]) -> None:
    words = [*TUNE, "--budget", "5GiB", "--trials", "20", "--json", "-o", str(tmp_path / "t")]
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["schema"] == 1
    assert found["best"]["peak_allocated_bytes"] <= 5 * GIB
    assert 0.02 < found["best"]["params"]["keep"] < 1
    for row in found["all_trials"]:
        assert row["device_bytes"] == row["peak_reserved_bytes"] + calibrated(find_card(None)).context_bytes
    assert found["trials"] == len(found["all_trials"]) <= 10
    assert [row["peak_allocated_bytes"] for row in found["front"]] == sorted(
        row["peak_allocated_bytes"] for row in found["front"]
    )
    over = [r["params"]["keep"] for r in found["all_trials"] if r["peak_allocated_bytes"] > 5 * GIB]
    assert min(over) <= 1.005 * found["best"]["params"]["keep"] + 5e-4
    asked = len(made_up)
    assert json.loads(call(capsys, *words)[1])["best"] == found["best"]
    assert len(made_up) == asked  # the session was done: nothing is asked again
    preset = read_preset(Path(found["preset"]))
    assert preset["method"] == [found["best"]["method"]]
    assert preset["stack"] == "paper"


def test_an_impossible_budget_exits_4(capsys: pytest.CaptureFixture[str], tmp_path: Path, made_up: list[str]) -> None:
    code, out, err = call(capsys, *TUNE, "--budget", "4.1GiB", "--json", "-o", str(tmp_path / "t"))
    assert code == 4
    assert "the floor is" in err
    assert "keep=0.02" in err
    assert "fp32 logits of all positions" in err
    assert err.count("\n") == 1
    assert json.loads(out)["best"] is None


def test_a_table_and_a_figure_with_controls(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, made_up: list[str]
) -> None:
    code, out, _ = call(
        capsys, *TUNE, "--controls", "--budget", "5GiB", "-o", str(tmp_path / "t"), "--plot", str(tmp_path / "p")
    )
    assert code == 0
    assert "memprof run --preset" in out
    assert "total (GiB)" in out
    assert "as nvidia-smi shows it" in out
    assert "uniform" in out
    (data,) = (tmp_path / "p").glob("*.json")
    drawn = json.loads(data.read_text())
    assert {one["method"] for one in drawn["series"]} == {"topv", "random", "uniform"}
    assert drawn["budget_bytes"] == 5 * GIB
    assert data.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune"], "--budget"),
        (["tune", "--budget", "5G"], "5GiB"),
        (["tune", "--budget", "5GiB", "--search", "kep"], "keep"),
        (["tune", "--budget", "5GiB", "--method", "nope"], "topv"),
        (["tune", "--max-loss", "0.1", "--device", "sim"], "trained weights"),
        (["tune", "--budget", "5GiB", "--objective", "speed"], "flops"),
        (["fit"], "--gpu"),
        (["fit", "--gpu", "8"], "unit"),
        (["fit", "--gpu", "8GiB", "--model", "gpt"], "internvl2-2b"),
    ],
)
def test_mistakes_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], made_up: list[str], words: list[str], says: str
) -> None:
    code, out, err = call(capsys, *words)
    assert code == (4 if says == "alone" else 2)
    assert says in err
    assert (out, err.count("\n")) == ("", 1)


def test_without_optuna_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\nimport importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'optuna' else find(name, *a)\n"
        "from memprof.cli import main\nmain(['tune', '--budget', '5GiB', '--device', 'sim'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "memprof: memprof tune needs Optuna: pip install 'memprof-vlm[tune]'\n"


def test_what_fits_on_a_card(capsys: pytest.CaptureFixture[str], made_up: list[str]) -> None:
    code, out, _ = call(capsys, "fit", "--gpu", "6GiB", "--method", "topv", "--stack", "paper", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["context_bytes"] == CONTEXT_BYTES == 500 * MIB
    assert found["gpu"] == "6GiB"
    need = found["need"]
    assert need["device_bytes"] == need["allocated_bytes"] + 64 * MIB + 500 * MIB
    limits = {limit["name"]: limit for limit in found["limits"]}
    assert set(limits) == {"tiles", "images", "new tokens", "keep", "batch"}
    for name in ("tiles", "images", "new tokens", "keep"):
        assert limits[name]["largest"] is not None
        assert limits[name]["device_bytes"] <= 6 * GIB
    assert limits["tiles"]["asked"] == 13
    table = call(capsys, "fit", "--gpu", "6GiB", "--method", "topv")[1]
    assert "new tokens" in table
    assert "predicted" in table
    assert "on 6.000 GiB: fits" in table
    named = call(capsys, "fit", "--gpu", "T4", "--context", "600MiB")[1]
    assert "on t4 of 14.560 GiB: fits" in named
    assert "4.000 GiB of weights and workspaces" in named
    assert "0.586 GiB of CUDA context" in named


def test_the_largest_batch(made_up: list[str]) -> None:
    spec = RunSpec(model="internvl2-2b", method="baseline", task="ai2d", device="sim", stack="paper")
    gpu = 12 * GIB
    card = find_card(f"{gpu}B")
    batch = {limit.name: limit for limit in fits.fit(spec, card, tiles=4).limits}["batch"]
    a_token = 24 * 4096 + 6 * 92553
    room = gpu - STATIC - 64 * MIB - 500 * MIB
    assert batch.largest == room // (a_token * (4 * 256 + 48 + 53))
    assert batch.device_bytes is not None
    assert batch.device_bytes <= gpu
    pruned = fits.fit(dataclasses.replace(spec, method="topv"), card, tiles=4)
    assert {limit.name: limit.largest for limit in pruned.limits}["batch"] == 1


def test_what_would_have_to_give(made_up: list[str]) -> None:
    spec = RunSpec(model="internvl2-2b", method="topv:keep=1", task="ai2d", device="sim", stack="paper")
    card = find_card("5.6GiB")
    found = fits.fit(spec, card)
    assert not found.fits
    assert any("keep" in one for one in found.give)
    assert any("stack current" in one for one in found.give)
    assert found.give[-1].startswith("a card of")
    assert fits.fit(dataclasses.replace(spec, stack="current"), card).fits
    with pytest.raises(DoesNotFit, match=r"weights of internvl2-2b alone, 4\.000 GiB .* 4-bit"):
        fits.fit(spec, find_card("2GiB"))
    with pytest.raises(DoesNotFit, match="not even one tile"):
        fits.fit(spec, find_card(f"{STATIC + 501 * MIB}B"))
    with pytest.raises(BadValue, match="tiles=0 is below 1"):
        fits.fit(spec, find_card("8GiB"), tiles=0)
    with pytest.raises(BadValue, match="no limit"):
        fits.fit(spec, ANY)


def test_presets_in_both_spellings(tmp_path: Path) -> None:
    write_preset(tmp_path / "a.json", {"method": ["topv:keep=0.4,layer=2"], "stack": "paper"}, {"trials": 3})
    assert read_preset(tmp_path / "a.json") == {"method": ["topv:keep=0.4,layer=2"], "stack": "paper"}
    (tmp_path / "b.toml").write_text('method = "topv:keep=0.4"\nmax_new_tokens = 2\n')
    assert read_preset(tmp_path / "b.toml") == {"method": ["topv:keep=0.4"], "max_new_tokens": 2}
    for name, text, says in (
        ("c.json", '{"metod": "topv"}', "metod"),
        ("d.json", "[1]", "no preset"),
        ("later.json", '{"schema": 99, "preset": {}}', "later memprof"),
        ("e.toml", "= 3", "cannot read"),
        ("f.json", '{"method": {"a": 1}}', "number or a text"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=says):
            read_preset(tmp_path / name)


def test_run_takes_a_preset_and_options_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("width,height,text_tokens\n448,448,20\n")
    preset = {"method": ["topv:keep=0.25,layer=2"], "data": str(tmp_path / "one.csv"), "max_new_tokens": 3}
    write_preset(tmp_path / "p.json", preset, {})
    code, out, _ = call(
        capsys, "run", "--preset", str(tmp_path / "p.json"), "--device", "sim", "--max-new-tokens", "1", "--json",
        "-o", str(tmp_path / "r"),
    )  # fmt: skip
    assert code == 0
    (one,) = json.loads(out)["runs"]
    assert split_spec(one["method"]) == ("topv", {"keep": "0.25", "layer": "2"})
    assert (one["samples"], one["tokens"]) == (1, 1)
