"""What each of the other methods chooses, held to its own rule worked out the long way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_contract import generate
from tiny import families, several_images, tiny_model, tiny_prompt
from torch import nn
from views import a_view

from memprof.anatomy import anatomy
from memprof.errors import BadValue, UsageError
from memprof.families import find_model
from memprof.pruning import Pruner, Stage, build_pruner, pairs, visual_flops_cut, visual_tokens_per_layer
from memprof.pruning.methods.divprune import DivPrune
from memprof.pruning.methods.pyramiddrop import PyramidDrop
from memprof.pruning.surgery import Surgery
from memprof.pruning.view import View
from memprof.pruning.vision import patches_to_tokens, vision_attention
from memprof.runner import place

every_family = pytest.mark.parametrize("family", families())

# -- DivPrune ----------------------------------------------------------------------------------------------------------


def diverse(tokens: torch.Tensor, kept: int) -> list[int]:
    """Max-min diversity in float64 with the whole matrix of distances, in the order of choice."""
    unit = tokens.double() / tokens.double().norm(dim=1, keepdim=True)
    apart = 1 - unit @ unit.T
    apart.fill_diagonal_(0)
    chosen = [int(apart.clone().fill_diagonal_(torch.inf).amin(0).argmax())]
    while len(chosen) < kept:
        least = apart[chosen].amin(0)
        least[chosen] = -1
        chosen.append(int(least.argmax()))
    return chosen


@pytest.mark.parametrize(("n", "kept"), [(2, 1), (50, 49), (200, 80)])
def test_divprune_takes_the_farthest_each_time(n: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK_BYTES", 4 * 64 * 200)
    tokens = torch.randn(n, 12, generator=torch.Generator().manual_seed(n))
    assert DivPrune().select(a_view(source=tokens), kept).tolist() == diverse(tokens, kept)


def test_divprune_takes_no_copy_twice_and_copies_last() -> None:
    draw = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    tokens = draw.repeat(3, 1)
    chosen = DivPrune().select(a_view(source=tokens), 25).tolist()
    assert len(set(chosen)) == 25
    assert sorted(token % 10 for token in chosen[:10]) == list(range(10))


# -- VisionZip ---------------------------------------------------------------------------------------------------------


@every_family
def test_visionzip_reads_the_towers_own_attention(family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    tower = anatomy(model).vision[0][1]
    seen: list[torch.Tensor] = []

    class Probe(type(build_pruner("visionzip"))):  # type: ignore[misc]
        def select(self, view: View, kept: int) -> torch.Tensor:
            assert view.vision is not None
            seen.append(view.vision.clone())
            return view.vision.topk(kept).indices

    _, surgery, _ = generate(model, Probe(keep=0.4), prompt, tokens=1)
    config: Any = tower.config
    before = config._attn_implementation
    try:
        config._attn_implementation = "eager"
        maps = tower(place(prompt, model)["pixel_values"], output_attentions=True).attentions[
            -2
        ]  # (tiles, heads, N, N)
    finally:
        config._attn_implementation = before
    if family == "llava":
        expected = maps[:, :, 0, 1:].mean(1).flatten()
    else:
        patches = maps.mean((1, 2))[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        expected = patches.view(-1, side, side).unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten()
    assert len(seen[0]) == prompt.shape.visual_tokens
    torch.testing.assert_close(seen[0], expected, atol=1e-7, rtol=1e-4)
    assert surgery.kept() == [sorted(expected.topk(surgery.stages[0].kept).indices.tolist())]


def test_patch_scores_fold_as_the_pixel_shuffle_does() -> None:
    _, _, model = tiny_model("internvl")
    patches = torch.arange(2 * 64, dtype=torch.float32).view(2, 64)
    shuffled = model.model.pixel_shuffle(patches.view(2, 8, 8, 1).repeat(1, 1, 1, 4), scale_factor=0.5)
    torch.testing.assert_close(patches_to_tokens(patches, 32), shuffled.reshape(32, 16).mean(1))
    torch.testing.assert_close(patches_to_tokens(patches, 128), patches.flatten())


def test_a_tower_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UsageError, match="q_proj"):
        vision_attention([("visual", nn.ModuleList([nn.Identity(), nn.Identity()]))], -2)
    with pytest.raises(UsageError, match="q_proj"):
        vision_attention([], -2)


# -- PyramidDrop -------------------------------------------------------------------------------------------------------


def test_pyramiddrop_cuts_where_its_code_does() -> None:
    published = [Stage(8, 288), Stage(16, 144), Stage(24, 72)]
    assert list(PyramidDrop().stages(576, 32)) == published
    assert [s.layer for s in PyramidDrop().stages(576, 24)] == [6, 12, 18]
    assert [s.kept for s in PyramidDrop().stages(577, 32)] == [288, 144, 72]
    assert list(PyramidDrop().stages(1, 32)) == []
    assert list(PyramidDrop().stages(0, 32)) == []
    assert list(PyramidDrop().stages(2, 32)) == [Stage(8, 1)]
    with pytest.raises(BadValue, match="layers"):
        PyramidDrop(parts=6).stages(576, 5)


@dataclass(frozen=True)
class AheadAndRow(PyramidDrop):
    """PyramidDrop that writes down its scores."""

    seen: list[torch.Tensor] = field(default_factory=list, metadata={})

    def select(self, view: View, kept: int) -> torch.Tensor:
        self.seen.append(view.ahead().clone())
        return super().select(view, kept)


@every_family
def test_pyramiddrop_ranks_by_the_layer_behind_each_cut(family: str) -> None:
    kind, card, model = tiny_model(family, "eager")
    prompt = tiny_prompt(kind, card)
    probe = AheadAndRow()
    _, surgery, _ = generate(model, probe, prompt, tokens=1)
    kept = surgery.kept()
    assert kept is not None
    assert [s.layer for s in surgery.stages] == [1, 2, 3]
    # The k-th cut's scores: a run that makes the cuts before it, and looks at the whole map of the layer behind it.
    for number, stage in enumerate(surgery.stages):
        maps: list[torch.Tensor] = []
        hook = model.model.language_model.layers[stage.layer].self_attn.register_forward_hook(
            lambda _m, _a, out, maps=maps: maps.append(out[1])
        )
        try:
            generate(model, Replay(tuple(surgery.stages[:number]), tuple(map(tuple, kept))), prompt, tokens=1)
        finally:
            hook.remove()
        alive = kept[number - 1] if number else list(range(prompt.shape.visual_tokens))
        first = int(prompt.layout.index[0])
        row = maps[0][0, :, -1].float().mean(0)[first : first + len(alive)]
        torch.testing.assert_close(probe.seen[number], row, atol=1e-6, rtol=1e-4)


@dataclass(frozen=True)
class Replay(Pruner):
    """Makes given cuts with given choices."""

    title = "Replay"
    paper = "test"
    cuts: tuple[Stage, ...]
    kept: tuple[tuple[int, ...], ...]

    def stages(self, n_visual: int, n_layers: int) -> tuple[Stage, ...]:
        return self.cuts

    def select(self, view: View, kept: int) -> torch.Tensor:
        number = [len(k) for k in self.kept].index(kept)
        alive = self.kept[number - 1] if number else tuple(range(view.count))
        return torch.tensor([alive.index(token) for token in self.kept[number]])


# -- what the surgery refuses ------------------------------------------------------------------------------------------


def test_surgery_refuses_what_it_cannot_carry_out() -> None:
    kind, card, model = tiny_model("llava")
    prompt, other = tiny_prompt(kind, card), tiny_prompt(kind, card, text=9)
    inputs = place(prompt, model)
    with Surgery(model, build_pruner("uniform"), prompt.layout), pytest.raises(UsageError, match="use_cache"):
        model(**inputs, use_cache=False)
    with Surgery(model, build_pruner("uniform"), other.layout), pytest.raises(UsageError, match="layout"):
        model.generate(**inputs, max_new_tokens=1)
    twice = {name: torch.cat((t, t)) for name, t in inputs.items()}
    with Surgery(model, build_pruner("uniform"), prompt.layout), pytest.raises(UsageError, match="one prompt"):
        model.generate(**twice, max_new_tokens=1)


@every_family
@pytest.mark.parametrize("method", ["topv", "visionzip", "pyramiddrop"])
def test_one_surgery_serves_one_prompt_after_another(family: str, method: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = several_images(kind, card)
    with Surgery(model, build_pruner(method), prompt.layout) as surgery:
        runs = [model.generate(**place(prompt, model), max_new_tokens=3, do_sample=False) for _ in range(2)]
        assert torch.equal(*runs)
    assert len(surgery._chosen) == len(surgery.stages)


# -- the published shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "n_visual", "low", "high"),
    [("llava-1.5-7b", 576, 0.475, 0.477), ("internvl2-2b", 256, 0.455, 0.465), ("internvl2-2b", 3328, 0.50, 0.515)],
)
def test_pruning_half_at_layer_two_cuts_the_published_share_of_flops(
    model: str, n_visual: int, low: float, high: float
) -> None:
    text = find_model(model)[1].text
    layers = int(text["num_hidden_layers"])
    stages = dataclasses.replace(build_pruner("topv")).stages(n_visual, layers)
    seen = visual_tokens_per_layer(stages, n_visual, layers)
    assert low < visual_flops_cut(seen, n_visual, text["hidden_size"], text["intermediate_size"]) < high
