"""SparseVLM and SparseVLM+ keep and merge what their published code does (../shared/data/oracles/sparsevlm)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from fixtures import Fixture, files
from views import a_view

from memprof.pruning import visual_tokens_per_layer
from memprof.pruning.methods.sparsevlm import SparseVLM, clustered, cut_layers, merged_from, rated, raters
from memprof.pruning.methods.sparsevlm_plus import SparseVLMPlus, rated_by_heads
from memprof.pruning.pairs import dots

#: The head size the fixtures' attention has, and the base of its rotary positions: neither is among the arrays.
DIM, BASE = 32, 10000.0


def of_plus(fixture: Fixture) -> bool:
    """Whether the fixture was made by SparseVLM+ (version 2_0), which merges nothing."""
    return not any(name.endswith("_merged") for name in fixture.arrays)


def matches(fixture: Fixture) -> torch.Tensor:
    """What the signal ``text_match`` is for the fixture's sequence."""
    embeds, start, n = fixture.tensor("input_embeds"), fixture.number("image_start"), fixture.number("image_len")
    return dots(embeds[start : start + n], embeds[start + n :]).softmax(1).mean(0)


@files("sparsevlm")
def test_sparsevlm_oracle_raters(file: Path) -> None:
    fixture = Fixture(file)
    match = matches(fixture)
    torch.testing.assert_close(match, fixture.tensor("rater_score"), atol=1e-6, rtol=1e-5)
    assert raters(match).nonzero()[:, 0].tolist() == fixture.indices("raters")


@files("sparsevlm")
def test_sparsevlm_oracle_cuts(file: Path) -> None:
    fixture = Fixture(file)
    if of_plus(fixture):
        pytest.skip("made by SparseVLM+, which the test below is of")
    match, start, n = matches(fixture), fixture.number("image_start"), fixture.number("image_len")
    budgets = sorted({case[1] for case in fixture.cases(r"T(\d+)_L\d+_kept")})
    for budget in budgets:
        visual = fixture.tensor("input_embeds")[start : start + n]  # the fixture's layers return their input
        counts = []
        for layer in fixture.indices("prune_layers"):
            name = f"T{budget}_L{layer}"
            rows = f"{name}_attn_text_to_visual"
            rows = rows if rows in fixture else f"L{layer}_attn_text_to_visual"
            assert len(visual) == fixture.number(f"{name}_visual_in")
            scores = rated(fixture.tensor(rows), match)
            torch.testing.assert_close(scores, fixture.tensor(f"{name}_relation"), atol=1e-7, rtol=1e-4)
            theirs, recycled = fixture.indices(f"{name}_kept"), fixture.indices(f"{name}_recycled")
            some, clusters = merged_from(len(visual) - len(theirs))
            assert (some, clusters) == (len(recycled), fixture.number(f"{name}_cluster_num"))
            view = a_view(merged=clusters, output=visual, text_rows=fixture.tensor(rows), text_match=match)
            choice = SparseVLM().select(view, len(theirs))
            assert sorted(choice.kept.tolist()) == theirs, name
            by_score = scores.argsort(descending=True, stable=True).tolist()
            assert by_score[len(theirs) : len(theirs) + some] == recycled
            found = clustered(visual[recycled], clusters, fixture.tensor(f"{name}_noise"))
            assert found.centres.tolist() == fixture.indices(f"{name}_cluster_centers")
            assert found.of.tolist() == fixture.indices(f"{name}_cluster_of")
            torch.testing.assert_close(found.merged, fixture.tensor(f"{name}_merged"), atol=1e-5, rtol=0)
            assert choice.merged is not None
            assert choice.at is not None
            assert choice.at.tolist() == [len(visual) - 1] * clusters
            if not fixture.number(f"{name}_noise_changes_merged"):
                torch.testing.assert_close(choice.merged, fixture.tensor(f"{name}_merged"), atol=1e-5, rtol=0)
            visual = torch.cat((visual[theirs], found.merged))
            counts.append(len(visual))
        text = len(fixture.arrays["input_embeds"]) - n
        assert fixture.number(f"T{budget}_final_len") == counts[-1] + text
        assert fixture.indices(f"T{budget}_position_ids_last") == list(range(counts[-1] + text)), "compact"
        sums = torch.cat((fixture.tensor("input_embeds")[:start], visual, fixture.tensor("input_embeds")[start + n :]))
        torch.testing.assert_close(sums.sum(1), fixture.tensor(f"T{budget}_final_row_sum"), atol=1e-4, rtol=0)


def rotation_of(text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Two vectors of ones at positions ``(t,)`` and ``(n,)``, turned, their product over the root of their length."""
    angles = BASE ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    apart = (text[:, None] - visual)[..., None].double() * angles
    return (2 * apart.cos().sum(-1) / DIM**0.5).float()


@files("sparsevlm")
def test_sparsevlm_plus_oracle_cuts(file: Path) -> None:
    fixture = Fixture(file)
    if not of_plus(fixture):
        pytest.skip("made by version 1_0, which the test above is of")
    match, start, n = matches(fixture), fixture.number("image_start"), fixture.number("image_len")
    for budget in sorted({case[1] for case in fixture.cases(r"T(\d+)_L\d+_kept")}):
        left = list(range(n))
        for layer in fixture.indices("prune_layers"):
            name = f"T{budget}_L{layer}"
            rows = f"{name}_attn_text_to_visual"
            rows = rows if rows in fixture else f"L{layer}_attn_text_to_visual"
            positions, theirs = fixture.tensor(f"{name}_position_ids"), fixture.indices(f"{name}_kept")
            assert positions[start : start + len(left)].tolist() == [start + token for token in left], "kept"
            rotation = rotation_of(positions[start + len(left) :], positions[start : start + len(left)])
            scores = rated_by_heads(fixture.tensor(rows), match, rotation)
            torch.testing.assert_close(scores, fixture.tensor(f"{name}_relation"), atol=1e-6, rtol=1e-4)
            view = a_view(text_rows=fixture.tensor(rows), text_match=match, text_rotation=rotation)
            assert sorted(SparseVLMPlus().select(view, len(theirs)).tolist()) == theirs, name
            left = [left[token] for token in theirs]
        last = fixture.indices(f"T{budget}_position_ids_last")
        assert last[start : start + len(left)] == [start + token for token in left]
        assert SparseVLMPlus().positions == "original"
        embeds = fixture.tensor("input_embeds")
        sums = torch.cat((embeds[:start], embeds[start : start + n][left], embeds[start + n :])).sum(1)
        torch.testing.assert_close(sums, fixture.tensor(f"T{budget}_final_row_sum"), atol=1e-4, rtol=0)


@files("sparsevlm")
def test_sparsevlm_oracle_counts_a_layer(file: Path) -> None:
    fixture = Fixture(file)
    n = fixture.number("image_len")
    method = SparseVLMPlus if of_plus(fixture) else SparseVLM
    if n != 576:
        pytest.skip("the code's tables are of 576 tokens; memprof takes shares of other numbers")
    for case in fixture.cases(r"T(\d+)_visual_per_layer"):
        theirs = fixture.indices(case[0])
        stages = method(keep=int(case[1]) / n).stages(n, len(theirs))
        ours = visual_tokens_per_layer(stages, n, len(theirs))
        # The code counts what leaves a layer, memprof what enters it.
        assert [*ours[1:], ours[-1]] == [*theirs[: len(theirs) - 1], theirs[-1]]


@files("sparsevlm")
def test_sparsevlm_oracle_of_the_first_release_ranks_alike(file: Path) -> None:
    """Its counts follow from the rank of a matrix; what it keeps is the best of the same scores."""
    fixture = Fixture(file)
    if "rank_value" not in fixture:
        pytest.skip("not run with the first release")
    scores = rated(fixture.tensor("L2_attn_text_to_visual"), matches(fixture))
    for case in fixture.cases(r"rank_T(\d+)_kept"):
        theirs = fixture.indices(case[0])
        scale, bias = fixture.arrays[f"rank_T{case[1]}_scale_bias"]
        assert len(theirs) == min(int(fixture.number("rank_value") * scale + bias), len(scores) - 1)
        assert sorted(scores.topk(len(theirs)).indices.tolist()) == theirs


@pytest.mark.parametrize("n", [1, 2, 3, 16, 100, 576, 3328])
@pytest.mark.parametrize("layers", [5, 24, 32, 40])
@pytest.mark.parametrize("keep", [0.01, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_sparsevlm_plans_what_can_be_done(n: int, layers: int, keep: float) -> None:
    left, before = n, 0
    for stage in SparseVLM(keep=keep).stages(n, layers):
        assert before < stage.layer < layers
        assert 1 <= stage.kept < left
        assert 1 <= stage.merged <= max(1, left - stage.kept)
        left, before = stage.tokens, stage.layer
    assert cut_layers(32) == cut_layers(40) == [3, 7, 16]
    assert SparseVLM(keep=1.0).stages(n, layers) == ()


@pytest.mark.parametrize("method", [SparseVLM, SparseVLMPlus])
def test_sparsevlm_keeps_more_where_it_is_asked_to(method: type[SparseVLM | SparseVLMPlus]) -> None:
    totals = [
        [sum(visual_tokens_per_layer(method(keep=k / 100).stages(n, 24), n, 24)) for k in range(1, 101)]
        for n in (256, 576, 3328)
    ]
    assert all(a <= b for row in totals for a, b in itertools.pairwise(row))


@pytest.mark.parametrize(("budget", "counts"), [(192, (300, 200, 118)), (128, (238, 108, 60)), (64, (66, 34, 20))])
def test_sparsevlm_plus_counts_are_the_codes_tables(budget: int, counts: tuple[int, ...]) -> None:
    stages = SparseVLMPlus(keep=budget / 576).stages(576, 32)
    assert [(stage.layer, stage.kept, stage.merged) for stage in stages] == [
        (layer, kept, 0) for layer, kept in zip((3, 7, 16), counts, strict=True)
    ]


def test_sparsevlm_plus_rates_by_the_heads_that_see_most() -> None:
    rows = torch.zeros(16, 1, 5)
    rows[:, 0, 0] = 1.0
    rows[3:5, 0] = torch.tensor([0.0, 0.2, 0.0, 0.0, 0.0])  # two heads that see little, and see something else
    scores = rated_by_heads(rows, torch.ones(1), torch.ones(1, 5))
    assert scores.tolist() == pytest.approx([1.0, 0, 0, 0, 0])
    fewer = rated_by_heads(rows[:5], torch.ones(1), torch.full((1, 5), 2.0))
    assert fewer.tolist() == pytest.approx([0.3, 0.04, 0, 0, 0])


def test_sparsevlm_rates_by_all_where_no_word_stands_out() -> None:
    assert raters(torch.full((4,), 0.25)).tolist() == [0.25] * 4
    assert raters(torch.tensor([1.0])).tolist() == [1.0]
