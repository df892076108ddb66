"""HoloV keeps what its published code keeps (../shared/data/oracles/holov), and tokens where that has zero vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import Fixture, files
from views import a_view

from memprof.pruning.methods.holov import HoloV, quotas


@files("holov")
def test_holov_oracle(file: Path) -> None:
    fixture = Fixture(file)
    vision = fixture.tensor("cls_attention_heads").mean(0)
    torch.testing.assert_close(vision, fixture.tensor("cls_attention_mean"))
    view = a_view(source=fixture.tensor("projected_features"), vision=vision)
    for case in fixture.cases(r"P(\d+)_K(\d+)_kept"):
        crops, budget, name = int(case[1]), int(case[2]), case[0].removesuffix("_kept")
        pruner = HoloV(crops=crops)
        scores, sizes, crop = pruner._runs(view, budget)
        torch.testing.assert_close(scores, fixture.tensor(f"{name}_crop_score"), atol=1e-5, rtol=1e-5)
        assert sizes.tolist() == fixture.indices(f"{name}_crop_size")
        assert torch.bincount(crop).tolist() == sizes.tolist()
        weight = scores / (scores.sum() + 1e-6)
        assert quotas(weight, budget).tolist() == fixture.indices(f"{name}_alloc")
        chosen, theirs = pruner.select(view, budget).tolist(), fixture.indices(case[0])
        tokens = [token for token in theirs if token >= 0]
        assert theirs == tokens + [-1] * (budget - len(tokens)), "zero vectors stand at the end"
        assert chosen[: len(tokens)] == tokens
        # In place of zero vectors: what receives most of what is left.
        rest = [token for token in vision.argsort(descending=True).tolist() if token not in set(tokens)]
        assert chosen[len(tokens) :] == rest[: budget - len(tokens)]


@pytest.mark.parametrize(("n", "budget"), [(576, 64), (576, 128), (576, 192), (16, 1), (17, 6), (2, 1), (3328, 832)])
def test_holov_has_as_many_runs_as_the_code_for_qwen(n: int, budget: int) -> None:
    crops = HoloV().number_of_crops(n, budget)
    assert crops == min(n, max(1, int(1024 * n / 576 / budget)))
    assert HoloV(crops=5).number_of_crops(n, budget) == min(5, n)
    draw = torch.Generator().manual_seed(n)
    view = a_view(source=torch.randn(n, 8, generator=draw), vision=torch.rand(n, generator=draw))
    chosen = HoloV().select(view, budget).tolist()
    assert len(set(chosen)) == len(chosen) == budget


def test_holov_overflow_is_filled_with_tokens() -> None:
    """A run that draws everything holds less than its quota: the rest goes to the best of the others."""
    vision = torch.full((32,), 1e-4)
    vision[8:16] = 1.0
    vision[20] = 0.5
    view = a_view(source=torch.randn(32, 4, generator=torch.Generator().manual_seed(1)), vision=vision)
    chosen = HoloV(crops=4).select(view, 16).tolist()
    assert len(set(chosen)) == 16
    assert set(range(8, 16)) <= set(chosen)
    assert 20 in chosen
