"""What each of the other methods chooses, held to its own rule worked out the long way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import pytest
import torch
from by_hand import embedded, recorded
from test_contract import generate
from tiny import families, several_images, tiny_model, tiny_prompt
from torch import nn
from views import a_view

from memprof.anatomy import anatomy
from memprof.bench.generate import place
from memprof.errors import BadValue, UsageError
from memprof.models.find import find
from memprof.pruning import METHODS, Pruner, Stage, build_pruner, pairs, visual_flops_cut, visual_tokens_per_layer
from memprof.pruning.methods.divprune import DivPrune
from memprof.pruning.methods.pyramiddrop import PyramidDrop
from memprof.pruning.signals import SIGNALS
from memprof.pruning.surgery import Surgery
from memprof.pruning.view import View
from memprof.pruning.vision import patches_to_tokens, vision_attention

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
        def select(self, view: View, kept: int) -> Any:
            seen.append(view.vision.clone())
            return super().select(view, kept)

    _, surgery, _ = generate(model, Probe(keep=0.4), prompt, tokens=1)
    config: Any = tower.config
    before = config._attn_implementation
    try:
        config._attn_implementation = "eager"
        pixels = place(prompt, model)["pixel_values"]
        pixels = pixels.flatten(0, -4)  # some families have a dimension for the prompt
        maps = tower(pixels, output_attentions=True).attentions[-2]  # (tiles, heads, N, N)
    finally:
        config._attn_implementation = before
    if config.model_type == "clip_vision_model":  # it has a class token
        expected = maps[:, :, 0, 1:].mean(1).flatten()
    else:
        side = isqrt(maps.shape[-1])
        patches = maps.mean((1, 2))[:, int(side**2 != maps.shape[-1]) :]
        fold = side // isqrt(prompt.shape.visual_tokens // len(pixels))
        expected = patches.view(-1, side, side).unfold(1, fold, fold).unfold(2, fold, fold).mean((-1, -2)).flatten()
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
        self.seen.append(view.ahead.clone())
        return super().select(view, kept)


@every_family
def test_pyramiddrop_ranks_by_the_layer_behind_each_cut(family: str) -> None:
    kind, card, model = tiny_model(family, "eager")
    prompt = tiny_prompt(kind, card)
    probe = AheadAndRow(positions="original")  # as Replay, which makes the cuts before each
    _, surgery, _ = generate(model, probe, prompt, tokens=1)
    kept = surgery.kept()
    assert kept is not None
    assert [s.layer for s in surgery.stages] == [1, 2, 3]
    # The k-th cut's scores: a run that makes the cuts before it, and looks at the whole map of the layer behind it.
    for number, stage in enumerate(surgery.stages):
        maps: list[torch.Tensor] = []
        hook = (
            anatomy(model)
            .decoder.layers[stage.layer]
            .self_attn.register_forward_hook(lambda _m, _a, out, maps=maps: maps.append(out[1]))
        )
        try:
            generate(model, Replay(tuple(surgery.stages[:number]), tuple(map(tuple, kept))), prompt, tokens=1)
        finally:
            hook.remove()
        alive = kept[number - 1] if number else list(range(prompt.shape.visual_tokens))
        index = prompt.places.index.tolist()
        gone = set(index) - {index[token] for token in alive}
        left = [place for place in range(prompt.shape.length) if place not in gone]
        row = maps[0][0, :, -1].float().mean(0)[[left.index(index[token]) for token in alive]]
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
    with Surgery(model, build_pruner("uniform"), prompt.places), pytest.raises(UsageError, match="use_cache"):
        model(**inputs, use_cache=False)
    with Surgery(model, build_pruner("uniform"), other.places), pytest.raises(UsageError, match="layout"):
        model.generate(**inputs, max_new_tokens=1)
    twice = {name: torch.cat((t, t)) for name, t in inputs.items()}
    with Surgery(model, build_pruner("uniform"), prompt.places), pytest.raises(UsageError, match="one prompt"):
        model.generate(**twice, max_new_tokens=1)


@every_family
@pytest.mark.parametrize("method", ["topv", "visionzip", "pyramiddrop"])
def test_one_surgery_serves_one_prompt_after_another(family: str, method: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = several_images(kind, card)
    if method == "visionzip" and not prompt.places.by_view:
        pytest.skip("refused, as tests/pruning/test_contract.py shows")
    with Surgery(model, build_pruner(method), prompt.places) as surgery:
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
    text = find(model).text
    layers = int(text["num_hidden_layers"])
    stages = dataclasses.replace(build_pruner("topv")).stages(n_visual, layers)
    seen = visual_tokens_per_layer(stages, n_visual, layers)
    assert low < visual_flops_cut(seen, n_visual, text["hidden_size"], text["intermediate_size"]) < high


# -- VisionZip's other half --------------------------------------------------------------------------------------------


def contextual(model: Any, prompt: Any, dominant: list[int], count: int) -> torch.Tensor:
    """The contextual tokens of a LLaVA, one after another, off the tower's own hidden states and keys."""
    tower, core = anatomy(model).vision[0][1], model.model
    layer = tower.encoder.layers[-2]
    keys: list[torch.Tensor] = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda _m, _a, out: keys.append(out))
    try:
        states = tower(place(prompt, model)["pixel_values"], output_hidden_states=True).hidden_states[-2][0, 1:]
    finally:
        hook.remove()
    heads = layer.self_attn.num_heads
    by_head = keys[0][0, 1:].view(len(states), heads, -1).double().mean(1)
    metric = by_head / by_head.norm(dim=1, keepdim=True)
    rest = [i for i in range(len(states)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // count)][:count]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            assigned[max(targets, key=lambda t: float(metric[i] @ metric[t]))].append(i)
    merged = [states[t] + (states[own].mean(0) if own else 0) for t, own in assigned.items()]
    return core.multi_modal_projector(torch.stack(merged)[None])[0]


@torch.no_grad()
@pytest.mark.parametrize("class_token", [False, True])
def test_visionzip_merges_what_is_not_dominant(class_token: bool) -> None:
    kind, card, model = tiny_model("llava")
    prompt = tiny_prompt(kind, card)
    pruner, choices = recorded(build_pruner(f"visionzip:keep=0.75,contextual=0.4,class_token={class_token}".lower()))
    _, surgery, _ = generate(model, pruner, prompt, tokens=1)
    (stage,), (choice,), kept = surgery.stages, choices, surgery.kept()
    assert kept is not None
    budget = round(0.75 * prompt.shape.visual_tokens)
    assert (stage.kept, stage.merged) == (budget - round(0.4 * budget) - class_token, round(0.4 * budget) + class_token)
    assert choice.merged is not None
    assert choice.at is not None
    last = prompt.shape.visual_tokens - 1
    assert choice.at.tolist() == [-1] * class_token + [last] * round(0.4 * budget)
    expected = contextual(model, prompt, kept[0], round(0.4 * budget))
    torch.testing.assert_close(choice.merged[int(class_token) :], expected, atol=1e-5, rtol=1e-4)
    if class_token:
        tower = anatomy(model).vision[0][1]
        state = tower(place(prompt, model)["pixel_values"], output_hidden_states=True).hidden_states[-2][:, :1]
        torch.testing.assert_close(choice.merged[:1], model.model.multi_modal_projector(state)[0], atol=1e-5, rtol=1e-4)


def test_visionzip_shares_its_budget_as_published() -> None:
    for budget, merged in ((64, 10), (128, 20), (192, 30)):
        (stage,) = build_pruner(f"visionzip:keep={budget / 576}").stages(576, 32)
        assert (stage.layer, stage.kept, stage.merged) == (0, budget - merged, merged)
        (stage,) = build_pruner(f"visionzip:keep={budget / 576},class_token=true").stages(576, 32)
        assert (stage.kept, stage.merged) == (budget - merged - 1, merged + 1)
    (stage,) = build_pruner("visionzip:keep=0.25,contextual=0").stages(576, 32)
    assert (stage.kept, stage.merged) == (144, 0)


def test_a_class_token_that_is_not_in_use_is_refused() -> None:
    kind, card, model = tiny_model("internvl")
    with pytest.raises(UsageError, match="class_token=false"):
        Surgery(model, build_pruner("visionzip:class_token=true"), tiny_prompt(kind, card).places)


@every_family
def test_a_vision_layer_beyond_the_tower_is_refused(family: str) -> None:
    kind, card, model = tiny_model(family)
    places = dataclasses.replace(tiny_prompt(kind, card).places, by_view=True)
    parts = anatomy(model).vision
    refusal, says = (BadValue, "vision_layer") if len(parts) > 1 else (UsageError, "before the projector")
    with pytest.raises(refusal, match=says):
        Surgery(model, build_pruner("vispruner:vision_layer=-99"), places)


# -- signals -----------------------------------------------------------------------------------------------------------


def test_every_signal_says_what_it_is_and_no_method_names_another() -> None:
    known = {name.replace("-", "_") for name in SIGNALS.names()}
    for _, kind in SIGNALS:
        assert kind.__doc__
        assert set(kind.leads) <= {"visual", "text", "tiles", None}
    for _, method in METHODS:
        assert method().needs <= known


def test_a_view_refuses_what_was_not_asked_for() -> None:
    view = a_view(source=torch.zeros(3, 2))
    assert view.source.shape == (3, 2)
    with pytest.raises(AttributeError, match="'vision'"):
        _ = view.vision


@every_family
@torch.no_grad()
def test_text_rows_are_the_whole_maps_own(family: str) -> None:
    kind, card, model = tiny_model(family, "eager")
    prompt = tiny_prompt(kind, card)
    seen: list[View] = []
    pruner = build_pruner("sparsevlm:keep=0.5")
    select = pruner.select

    def watched(view: View, kept: int) -> Any:
        seen.append(view)
        return select(view, kept)

    object.__setattr__(pruner, "select", watched)
    maps: list[torch.Tensor] = []
    layer = anatomy(model).decoder.layers[pruner.stages(prompt.shape.visual_tokens, 5)[0].layer - 1]
    hook = layer.self_attn.register_forward_hook(lambda _m, _a, out: maps.append(out[1]))
    try:
        generate(model, pruner, prompt, tokens=1)
    finally:
        hook.remove()
    index, after = torch.tensor(prompt.places.index), prompt.shape.text[-1]
    torch.testing.assert_close(seen[0].text_rows, maps[0][0, :, -after:][:, :, index], atol=1e-6, rtol=1e-4)
    # The raters' softmax, of what enters layer 0.
    tokens = torch.tensor(prompt.ids)
    embeds = embedded(model, prompt, tokens)[0]
    expected = (embeds[index] @ embeds[len(embeds) - after :].T).softmax(1).mean(0)
    torch.testing.assert_close(seen[0].text_match, expected, atol=1e-6, rtol=1e-4)


@every_family
@torch.no_grad()
def test_text_rotation_is_of_the_layers_own_positions(family: str) -> None:
    """Ones turned by the tables that a layer is given, read behind the second cut, where positions have gaps."""
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    pruner = build_pruner("sparsevlm-plus:keep=0.3")
    seen: list[View] = []
    select = pruner.select

    def watched(view: View, kept: int) -> Any:
        seen.append(view)
        return select(view, kept)

    object.__setattr__(pruner, "select", watched)
    tables: list[Any] = []
    stages = pruner.stages(prompt.shape.visual_tokens, 5)
    assert len(stages) > 1
    layer = anatomy(model).decoder.layers[stages[0].layer]
    hook = layer.self_attn.register_forward_pre_hook(
        lambda _m, _a, kwargs: tables.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    try:
        _, surgery = generate(model, pruner, prompt, tokens=1)[:2]
    finally:
        hook.remove()
    kept = surgery.kept()
    assert kept is not None
    index = torch.tensor(prompt.places.index)
    gone = set(index.tolist()) - set(index[torch.tensor(kept[0])].tolist())
    left = torch.tensor([row for row in range(prompt.shape.length) if row not in gone])
    cos, sin = (table[0].double() for table in tables[0])
    half = cos.shape[1] // 2
    row = torch.cat(((cos - sin)[:, :half], (cos + sin)[:, half:]), dim=1)
    visual = row[torch.isin(left, index)]
    expected = row[-prompt.shape.text[-1] :] @ visual.T / cos.shape[1] ** 0.5
    torch.testing.assert_close(seen[1].text_rotation.double(), expected, atol=1e-5, rtol=1e-4)


@every_family
@torch.no_grad()
def test_darts_signals_are_the_layers_own(family: str) -> None:
    kind, card, model = tiny_model(family)
    prompt = tiny_prompt(kind, card)
    seen: list[View] = []
    pruner = build_pruner("dart:keep=0.6,image_pivots=2,text_pivots=2")
    select = pruner.select

    def watched(view: View, kept: int) -> Any:
        seen.append(view)
        return select(view, kept)

    object.__setattr__(pruner, "select", watched)
    generate(model, pruner, prompt, tokens=1)
    caught: dict[str, Any] = {}
    core = anatomy(model).decoder
    hooks = [
        core.layers[1].register_forward_hook(lambda _m, _a, out: caught.update(out=out)),
        core.register_forward_hook(lambda _m, _a, out: caught.update(cache=out.past_key_values)),
    ]
    try:
        generate(model, build_pruner("baseline"), prompt, tokens=1)  # up to the cut nothing differs
    finally:
        for hook in hooks:
            hook.remove()
    index, after = torch.tensor(prompt.places.index), prompt.shape.text[-1]
    whole = caught["out"][0] if isinstance(caught["out"], tuple) else caught["out"]
    normed = core.norm(whole)[0]
    torch.testing.assert_close(seen[0].normed, normed[index])
    torch.testing.assert_close(seen[0].normed_text, normed[-after:])
    norms = caught["cache"].layers[1].keys[0].abs().sum((0, 2))
    torch.testing.assert_close(seen[0].key_norms, norms[index])
    torch.testing.assert_close(seen[0].text_key_norms, norms[-after:])
