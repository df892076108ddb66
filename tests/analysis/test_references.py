"""Predictions held to everything that cards measured; no card is needed. Each reference under the transformers it was
recorded with: `make test` runs this file a second time in a small environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memprof
from memprof.analysis import validate as module
from memprof.analysis.histories import set_against
from memprof.analysis.validate import foretell, validate
from memprof.environment import package_version
from memprof.gpus import CONTEXT_BYTES
from memprof.snapshots.history import HISTORY, read_history
from memprof.snapshots.lives import trace_lives
from memprof.snapshots.recording import ALLOC
from memprof.snapshots.trials import Trials
from memprof.units import MIB

ROOT = Path(__file__).parents[2]
REFERENCES = sorted((ROOT / "reference").glob("*/reference.json"))
#: Surgery and TopV make some small tensors in another order than when pruned runs were recorded: their peaks are held
#: to, unpruned histories to every event.
UNPRUNED = "baseline"
#: From how many bytes of the allocator on three prompts fit an H200 and at how many they fail, found by halving.
LIMITS = json.loads((ROOT / "reference" / "fits_from_h200.json").read_text(encoding="utf-8"))
#: What a small segment measures, and a large one is rounded up to.
STEP = 2 * MIB


def minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def of_this_version(path: Path) -> Path:
    recorded = json.loads(path.read_text(encoding="utf-8"))["environment"]["packages"]["transformers"]
    if minor(recorded) != minor(package_version("transformers")):
        pytest.skip(f"recorded under transformers {recorded}: make test runs it there, too")
    return path.parent


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, shared_book: Path) -> None:
    """Programs made for one reference serve the others."""
    monkeypatch.setenv("MEMPROF_CACHE", str(shared_book))


@pytest.mark.slow
@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.parent.name)
def test_predictions_hold_to_the_references(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = of_this_version(path)
    if path != REFERENCES[0]:
        # Two workers with a reference each begin at opposite ends, and meet: what one has recorded, the other finds.
        backwards = module._measured(folder)[::-1]
        monkeypatch.setattr(module, "_measured", lambda _: backwards)
    found = validate(folder)
    assert found.met, [score for score in found.totals if not score.met]
    kv, static = (next(score for score in found.totals if score.measure == name) for name in ("kv_cache", "static"))
    assert kv.equal == 1
    assert static.equal == 1 or abs(static.furthest) == 512


@pytest.mark.slow
@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.parent.name)
def test_recorded_histories_come_out_event_for_event(path: Path) -> None:
    """Every request and every end of a block, in order; which does not hang on addresses."""
    folder = of_this_version(path)
    benches, alike = {}, 0
    for file in sorted(folder.glob(f"*{HISTORY}")):
        about, measured = read_history(file)
        gap = set_against(file.name, measured, foretell(about, benches))
        assert gap.peak_predicted == pytest.approx(gap.peak_measured, rel=1e-3), file.name
        if UNPRUNED in file.name:
            assert gap.alike, (file.name, gap.sizes)
            alike += 1
    assert alike


def case_of(limit: dict[str, Any]) -> str:
    return f"{limit['method'].partition(':')[0]}-{limit['stack']}"


def fits(limit: dict[str, Any], n_bytes: int) -> bool:
    """Whether it is predicted to fit where the allocator may take ``n_bytes``."""
    width, height, text = limit["size"]
    (sample,) = memprof.predict(
        limit["model"], images=[(width, height)], text_tokens=text, method=limit["method"], stack=limit["stack"],
        new_tokens=limit["new_tokens"], card=f"{n_bytes + CONTEXT_BYTES}B",
    ).samples  # fmt: skip
    assert sample.status in ("ok", "oom"), sample.error
    return sample.ok


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS, ids=case_of)
def test_what_fits_is_what_fitted_on_the_card(limit: dict[str, Any]) -> None:
    """The least room, by halving as on the card: the same to the 2 MiB that it was measured to.

    TopV's is one small segment less. On the card 4 bytes of another package may have a segment to themselves, and what
    they need is not predicted: :func:`test_a_constant_beside_the_model_takes_a_segment`.
    """
    of_this_version(ROOT / "reference" / "h200" / "reference.json")
    high = limit["peak_reserved"] // STEP
    low = limit["peak_allocated"] // STEP  # below what is held at once nothing fits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(limit, middle * STEP) else (middle, high)
    missed = STEP if case_of(limit) == "topv-current" else 0
    assert limit["fails_at_bytes"] < high * STEP + missed <= limit["fits_from_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS, ids=case_of)
def test_a_prompt_that_fit_calls_fitting_fitted_on_the_card(limit: dict[str, Any]) -> None:
    """``memprof fit`` answers with what is reserved on a card without end, which is never below the least room."""
    of_this_version(ROOT / "reference" / "h200" / "reference.json")
    asked = {key: limit[key] for key in ("model", "method", "stack")}
    tiles = {1792: 13, 1344: 7}[limit["size"][0]]
    found = memprof.fits(
        "h200", tiles=tiles, question_tokens=limit["size"][2], max_new_tokens=limit["new_tokens"], **asked
    )
    assert found.need.reserved_bytes == limit["peak_reserved"]
    assert found.need.reserved_bytes > limit["fails_at_bytes"]


def test_a_constant_beside_the_model_takes_a_segment() -> None:
    """The vision tower over 7 tiles, which is what TopV's limit hangs on, as the card recorded it under another method.

    4 bytes that are none of the model's lie in a segment of their own there: with them it needs what was measured.
    """
    (limit,) = (limit for limit in LIMITS if case_of(limit) == "topv-current")
    about, recording = read_history(ROOT / "reference/h200/internvl2-2b_paper_fastv-map_1344x896_53.history.json.gz")
    assert [about["width"], about["height"]] == limit["size"][:2]
    lives = trace_lives(recording)
    segments = [block.address // STEP for block in lives.older if block.requested <= MIB]
    (alone,) = (block for block in lives.older if segments.count(block.address // STEP) == 1 and block.requested <= MIB)
    assert alone.requested == 4
    activations = np.nonzero((recording.actions == ALLOC) & (recording.sizes == 2 * 7 * 1025 * 4096))[0]
    tower = Trials(lives, stop=int(activations[-1]) + 1)
    room = (limit["fails_at_bytes"] // STEP + 1) * STEP
    assert tower.run(room=room, as_recorded=True).fits
    assert not tower.run(room=room - STEP, as_recorded=True).fits


def test_there_is_a_reference_for_this_version_or_it_is_said() -> None:
    assert REFERENCES
