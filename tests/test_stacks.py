from __future__ import annotations

import pytest
import torch
from tiny import families, state_of, tiny_card, tiny_model, tiny_prompt

from memprof.bench.generate import place, profile_prompt
from memprof.errors import UnknownName
from memprof.families import FAMILIES
from memprof.meters import meter_for
from memprof.models.build import build_model
from memprof.pruning import build_pruner
from memprof.stacks import Stack


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_paper_stack_makes_the_logits_of_all_positions_twice(family: str, device: str) -> None:
    """In bfloat16 with a large vocabulary the peak is the logits: 2 bytes a number, and 4 more of their copy."""
    kind = FAMILIES.load(family)()
    card = tiny_card(kind)
    card = card.but(text={"vocab_size": 20_000})
    model = build_model(card, device=device, dtype="bfloat16")
    prompt = tiny_prompt(kind, card)
    meter = meter_for(model)
    outcomes = {
        stack: profile_prompt(model, meter, build_pruner("baseline"), stack, prompt, new_tokens=2).memory
        for stack in ("current", "paper")
    }
    expected = prompt.shape.length * 20_000 * 6
    slack = 2 * 2**20 if device == "sim" else 0  # a block keeps a rest of up to 1 MiB, too little to split off
    assert expected <= outcomes["paper"].fullest.peak_parts["logits"] <= expected + slack
    assert outcomes["current"].fullest.peak_parts["logits"] < expected / 3


def test_hooks_are_taken_back() -> None:
    kind, card, model = tiny_model("internvl")
    before = state_of(model)
    with Stack(model, "paper"):
        model.generate(**place(tiny_prompt(kind, card), model), max_new_tokens=1, do_sample=False)
    assert state_of(model) == before
    with pytest.raises(ZeroDivisionError), Stack(model, "paper"):
        raise ZeroDivisionError
    assert state_of(model) == before


def test_stacks_make_the_same_tokens() -> None:
    kind, card, model = tiny_model("internvl")
    prompt = tiny_prompt(kind, card)
    made = []
    for stack in ("current", "paper"):
        with Stack(model, stack):
            made.append(model.generate(**place(prompt, model), max_new_tokens=5, do_sample=False))
    assert torch.equal(*made)


def test_unknown_stack() -> None:
    with pytest.raises(UnknownName, match="current, paper"):
        Stack(tiny_model("internvl")[2], "old")
