"""A family takes the vision towers whose tokens it counts; others are refused in one line, never counted as those."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import families, tiny_card

import memprof
from memprof.errors import WeightsError
from memprof.families import FAMILIES, Model
from memprof.families._towers import check_tower
from memprof.models.find import named, of_config

CARDS = {name: tiny_card(FAMILIES.load(name)()) for name in families()}
#: Those that transformers builds with whichever tower is named.
OPEN = [name for name, card in CARDS.items() if card.vision.get("model_type", "").startswith(("clip", "siglip"))]
#: Those whose configuration says which of the tower's tokens are taken.
CHOOSING = [name for name in OPEN if "vision_feature_select_strategy" in CARDS[name].config]


def with_tower(card: Model, kind: str, choice: str | None = None) -> dict[str, Any]:
    """The configuration of ``card`` with a tower of this kind, of which ``choice`` of its tokens are taken."""
    vision = {key: value for key, value in card.vision.items() if key in _SIZES}
    more = {} if choice is None else {"vision_feature_select_strategy": choice}
    return {**card.config, "vision_config": {**vision, "model_type": kind}, **more}


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


@pytest.mark.parametrize("name", named())
def test_every_named_model_has_one_that_its_family_counts(name: str) -> None:
    model = named()[name]
    check_tower(model.family, model.family.config(model))


@pytest.mark.parametrize("name", OPEN)
def test_another_tower_is_refused(name: str) -> None:
    assert OPEN
    with pytest.raises(WeightsError, match=r"'pixtral'.*memprof.predict"):
        of_config(with_tower(CARDS[name], "pixtral"))


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize(("kind", "choice"), [("clip_vision_model", "default"), ("siglip_vision_model", "full")])
def test_patches_alone_are_counted(name: str, kind: str, choice: str) -> None:
    card = CARDS[name]
    found = of_config(with_tower(card, kind, choice))
    assert found.family.image(found, 100, 60).tokens == card.family.image(card, 100, 60).tokens
    other = {"default": "full", "full": "default"}[choice]
    with pytest.raises(WeightsError, match=f"vision_feature_select_strategy is '{other}' over a {kind}"):
        of_config(with_tower(card, kind, other))


def test_what_is_counted_is_what_the_model_takes() -> None:
    """Transformers raises where a prompt has another number of visual tokens than the tower gives."""
    card = CARDS[CHOOSING[0]]
    raw = with_tower(card, "siglip_vision_model", "full")
    config = card.family.config(of_config(raw))
    assert memprof.predict(config, images=[(100, 60)], new_tokens=1, dtype="float32").samples[0].ok
