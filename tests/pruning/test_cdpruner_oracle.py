"""CDPruner keeps what its published code keeps (../shared/data/oracles/cdpruner), and what it does beyond the rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from fixtures import Fixture, files
from tiny import families, tiny_model, tiny_prompt
from views import a_view

from memprof.errors import UsageError
from memprof.pruning.methods.cdpruner import CDPruner
from memprof.pruning.surgery import Surgery


@files("cdpruner")
def test_cdpruner_oracle(file: Path) -> None:
    fixture = Fixture(file)
    pruner = CDPruner(relevance="clip")
    view = a_view(
        source=fixture.tensor("projected_features"),
        clip_image=fixture.tensor("image_embeds"),
        clip_text=fixture.tensor("text_embeds"),
    )
    torch.testing.assert_close(pruner.relevance_of(view), fixture.tensor("relevance"), atol=1e-5, rtol=1e-5)
    for case in fixture.cases(r"T(\d+)_greedy_order"):
        chosen = pruner.select(view, int(case[1])).tolist()
        assert chosen == fixture.indices(case[0])
        assert sorted(chosen) == fixture.indices(f"T{case[1]}_kept_sorted")


def greedy(kernel: torch.Tensor, kept: int) -> list[int]:
    """The subset of largest determinant, one token after another, each determinant worked out whole."""
    chosen: list[int] = []
    for _ in range(kept):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    return chosen


@pytest.mark.parametrize("seed", range(3))
def test_cdpruner_maximises_the_determinant(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    view = a_view(source=torch.randn(30, 24, generator=draw), question=torch.randn(24, generator=draw))
    pruner = CDPruner()
    relevance, unit = pruner.relevance_of(view).double(), torch.nn.functional.normalize(view.source.double(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    assert pruner.select(view, 8).tolist() == greedy(kernel, 8)


@pytest.mark.parametrize(("rank", "kept"), [(16, 32), (4, 60), (1, 5)])
def test_cdpruner_beyond_the_rank_takes_no_token_twice(rank: int, kept: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    view = a_view(source=torch.randn(64, rank, generator=draw), question=torch.randn(rank, generator=draw))
    chosen = CDPruner().select(view, kept).tolist()
    assert len(set(chosen)) == kept
    assert chosen[:rank] == CDPruner().select(view, rank).tolist()


def test_cdpruner_conditions_on_what_it_is_told_to() -> None:
    source = torch.eye(6)
    liked = CDPruner().relevance_of(a_view(source=source, question=torch.tensor([0.0, 0, 0, 1, 0, 0])))
    assert liked.argmax() == 3
    assert liked.max() == pytest.approx(1, abs=1e-5)
    assert CDPruner(relevance="none").relevance_of(a_view(source=source)).tolist() == [1.0] * 6
    assert CDPruner(relevance="none").needs == {"source"}


@pytest.mark.parametrize("family", families())
def test_cdpruner_is_refused_where_there_is_no_clip_text_tower(family: str) -> None:
    kind, card, model = tiny_model(family)
    pruner = dataclasses.replace(CDPruner(), relevance="clip")
    with pytest.raises(UsageError, match="relevance=question"):
        Surgery(model, pruner, tiny_prompt(kind, card).places)
