"""VisPruner keeps what its code keeps (../shared/data/oracles/vispruner), and goes on where that code fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, files
from views import a_view

from memprof.pruning.methods.vispruner import VisPruner


@files("vispruner")
def test_vispruner_oracle(file: Path) -> None:
    fixture = Fixture(file)
    view = a_view(vision=fixture.tensor("cls_attention_heads").mean(0), patches=fixture.tensor("features"))
    for case in fixture.cases(r"T(\d+)_r(\d+)_selected"):
        budget, share, name = int(case[1]), int(case[2]) / 100, case[0].removesuffix("_selected")
        chosen = VisPruner(important=share).select(view, budget).tolist()
        important = len(fixture.indices(f"{name}_important"))
        assert chosen[:important] == fixture.indices(f"{name}_important"), name
        assert chosen[important:] == fixture.indices(f"{name}_residual"), name
        assert chosen == fixture.indices(case[0])
        assert sorted(chosen) == fixture.indices(f"{name}_kept_sorted")


@pytest.mark.parametrize(
    ("n", "budget", "share"), [(576, 63, 0.5), (576, 8, 0.5), (576, 192, 0.3), (576, 64, 0.3), (5, 1, 0.0), (3, 2, 0.0)]
)
def test_vispruner_goes_on_where_its_code_fails(n: int, budget: int, share: float) -> None:
    draw = torch.Generator().manual_seed(n + budget)
    view = a_view(vision=torch.rand(n, generator=draw), patches=torch.randn(n, 16, generator=draw))
    chosen = VisPruner(important=share).select(view, budget).tolist()
    assert len(set(chosen)) == len(chosen) == budget
    important = int(budget * share)
    assert chosen[:important] == view.vision.topk(important).indices.tolist()


def test_vispruner_thins_out_copies_first() -> None:
    """Of tokens that come in pairs of copies, a budget of one each keeps no pair."""
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(40, 64, generator=draw).repeat_interleave(2, 0)
    attention = torch.linspace(1, 0, 80)  # copies stand side by side, so each half has one of them
    chosen = VisPruner(important=0.0).select(a_view(vision=attention, patches=patches), 72).tolist()
    assert len({token // 2 for token in chosen}) == 40
