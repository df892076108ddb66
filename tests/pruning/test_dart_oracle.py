"""DART keeps what its published code keeps (../shared/data/oracles/dart), its pivots taken in the fixture's turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, files
from views import a_view

from memprof.pruning.attention import sizes_of_keys
from memprof.pruning.methods.dart import DART, picked
from memprof.pruning.view import View


def view_of(fixture: Fixture) -> tuple[View, int, int]:
    """The view that the fixture's prompt gives, the place of its image and the number of its tokens."""
    start, n = fixture.number("image_start"), fixture.number("image_len")
    state, norms = fixture.tensor("last_layer_state"), sizes_of_keys(fixture.tensor("key_states").transpose(0, 1))
    visual, text = slice(start, start + n), slice(start + n, None)
    return (
        a_view(normed=state[visual], normed_text=state[text], key_norms=norms[visual], text_key_norms=norms[text]),
        start,
        n,
    )


@files("dart")
def test_dart_oracle(file: Path) -> None:
    fixture = Fixture(file)
    view, start, n = view_of(fixture)
    for case in fixture.cases(r"(\w+)_params"):
        name = case[1]
        ratio, budget, image_pivots, text_pivots = (float(x) for x in fixture.arrays[case[0]])
        share = 1 - ratio if budget < 0 else budget / n
        pruner = DART(keep=share, image_pivots=int(image_pivots), text_pivots=int(text_pivots))
        (stage,) = pruner.stages(n, 32)
        assert (stage.layer, stage.kept) == (2, len(fixture.indices(f"{name}_retained"))), name
        image, text = pruner.pivots(view, stage.kept)
        assert [start + i for i in image.tolist()] == fixture.indices(f"{name}_pivot_image")
        assert [start + n + i for i in text.tolist()] == fixture.indices(f"{name}_pivot_text")
        state, each = fixture.tensor("last_layer_state"), fixture.number(f"{name}_topk")
        order = fixture.indices(f"{name}_pivot_order")
        picks = picked(view.normed, image, [state[i] for i in order], [each] * len(order))
        assert [[start + i for i in row.tolist()] for row in picks] == fixture.arrays[f"{name}_picks"].tolist(), name
        kept = sorted({*image.tolist(), *(i for row in picks for i in row.tolist())})
        assert [start + i for i in kept] == sorted(fixture.indices(f"{name}_retained"))
        gone = set(range(start, start + n)) - {start + i for i in kept}
        everything = [i for i in range(len(state)) if i not in gone]
        assert everything == fixture.indices(f"{name}_keep_all")
        assert pruner.positions == "original", "keep_all are the code's position ids"
        chosen = pruner.select(view, stage.kept).tolist()
        assert len(set(chosen)) == stage.kept


@pytest.mark.parametrize(
    ("n", "text", "keep"), [(100, 3, 0.5), (100, 0, 0.5), (3, 5, 0.9), (16, 8, 0.4), (576, 40, 1 / 9)]
)
def test_dart_keeps_its_count_whatever_the_text(n: int, text: int, keep: float) -> None:
    draw = torch.Generator().manual_seed(n)
    view = a_view(
        normed=torch.randn(n, 8, generator=draw),
        normed_text=torch.randn(text, 8, generator=draw),
        key_norms=torch.rand(n, generator=draw),
        text_key_norms=torch.rand(text, generator=draw),
    )
    for stage in DART(keep=keep).stages(n, 8):
        chosen = DART(keep=keep).select(view, stage.kept).tolist()
        assert len(set(chosen)) == len(chosen) == stage.kept


def test_dart_takes_turns_by_norm_and_picks_what_is_least_alike() -> None:
    tokens = torch.eye(12)[:, :6] + torch.eye(12)[:, 6:] * -1.0
    view = a_view(
        normed=tokens, normed_text=torch.zeros(0, 6), key_norms=torch.arange(12.0), text_key_norms=torch.zeros(0)
    )
    pruner = DART(keep=0.5, image_pivots=1, text_pivots=0)
    chosen = pruner.select(view, 2).tolist()
    assert chosen == [11, 5], "the opposite of the last token"
