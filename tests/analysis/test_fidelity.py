from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from tiny import families, state_of, tiny_card, tiny_model, tiny_prompt

from memprof.analysis.fidelity import (
    MEASURES,
    Judge,
    Reference,
    check_weights,
    compare,
    fidelity,
    reference,
)
from memprof.bench.generate import place
from memprof.errors import MemprofError, UsageError
from memprof.families import FAMILIES
from memprof.models.build import build_model
from memprof.pruning import build_pruner
from memprof.pruning.surgery import Surgery

NEW = 5


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_model_agrees_with_itself() -> None:
    p = logs([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    assert compare(Reference(torch.tensor([0, 1]), p), p) == {
        "agreement": 1.0, "kl": 0.0, "first_divergence": 2.0, "exact": 1.0,
    }  # fmt: skip


def test_measures_by_hand() -> None:
    p = logs([0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0])
    q = logs([0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [0.5, 0.5, 0.0])
    found = compare(Reference(torch.tensor([0, 1, 0]), p), q)
    kl = (0.1 * math.log(0.1 / 0.8) + 0.8 * math.log(0.8 / 0.1) + math.log(2)) / 3
    assert found == {
        "agreement": pytest.approx(2 / 3), "kl": pytest.approx(kl, rel=1e-5), "first_divergence": 1.0, "exact": 0.0,
    }  # fmt: skip
    assert set(found) == set(MEASURES)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["pruned", "unpruned"])
def test_logits_that_are_none_are_an_error_and_no_agreement(whose: str, bad: float) -> None:
    sound = torch.tensor([[0.1, 0.2, 0.3]]).log_softmax(-1)
    broken = torch.tensor([[0.1, bad, 0.3]]).log_softmax(-1)
    p, q = (broken, sound) if whose == "unpruned" else (sound, broken)
    with pytest.raises(MemprofError, match=f"the {whose} model's logits"):
        compare(Reference(torch.tensor([2]), p), q)


def test_a_divergence_without_end_is_an_error() -> None:
    with pytest.raises(MemprofError, match="infinite"):
        compare(Reference(torch.tensor([0]), logs([0.5, 0.5, 0.0])), logs([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("name", families())
def test_forced_distributions_are_those_of_a_step_by_step_run(name: str) -> None:
    family, card, model = tiny_model(name)
    prompt = tiny_prompt(family, card)
    pruner = build_pruner("uniform:keep=0.2,layer=1")
    inputs = place(prompt, model)
    before = state_of(model)
    against = reference(model, inputs, new_tokens=NEW)
    found = fidelity(model, inputs, pruner, prompt.places, against)
    assert state_of(model) == before
    rows = []
    with torch.no_grad(), Surgery(model, pruner, prompt.places):
        out = model(**inputs, use_cache=True)
        for token in against.tokens:
            rows.append(out.logits[0, -1].float().log_softmax(-1))
            length = prompt.shape.length + len(rows)
            steps = {"input_ids": token.view(1, 1), "attention_mask": torch.ones(1, length, dtype=torch.long)}
            deltas = getattr(model.model, "rope_deltas", None)
            if deltas is not None:  # what an image of three axes spans is not what it has of tokens
                steps["position_ids"] = (length - 1 + deltas).expand(3, 1, 1)
            out = model(**steps, past_key_values=out.past_key_values, use_cache=True)
    by_hand = compare(against, torch.stack(rows))
    assert found == {measure: pytest.approx(value, rel=1e-3, abs=1e-6) for measure, value in by_hand.items()}
    assert found["kl"] > 0


def test_up_to_the_first_divergence_the_free_run_writes_the_reference() -> None:
    family, card, model = tiny_model("internvl")
    for seed in range(4):
        prompt = tiny_prompt(family, card, seed=seed)
        pruner, inputs = build_pruner("random:keep=0.1,layer=0"), place(prompt, model)
        against = reference(model, inputs, new_tokens=NEW)
        first = int(fidelity(model, inputs, pruner, prompt.places, against)["first_divergence"])
        with Surgery(model, pruner, prompt.places):
            free = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, prompt.shape.length :]
        same = (free == against.tokens).tolist()
        assert all(same[:first])
        assert first == NEW or not same[first]


def test_nothing_pruned_is_nothing_lost() -> None:
    family, card, model = tiny_model("internvl")
    prompt = tiny_prompt(family, card)
    inputs = place(prompt, model)
    found = fidelity(model, inputs, build_pruner("baseline"), prompt.places, reference(model, inputs, new_tokens=NEW))
    assert found == {"agreement": 1.0, "kl": 0.0, "first_divergence": float(NEW), "exact": 1.0}


def test_the_judge_makes_a_reference_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import memprof.analysis.fidelity as module

    calls = []
    real = module.reference
    monkeypatch.setattr(module, "reference", lambda *a, **k: calls.append(1) or real(*a, **k))
    family, card, model = tiny_model("internvl")
    prompt = tiny_prompt(family, card)

    def ask(judge: Judge, **changes: Any) -> dict[str, float]:
        given = {"stack": "current", "sample": "a", "new_tokens": 2, "seed": 0} | changes
        return judge(model, prompt, build_pruner("topv:layer=1"), **given)

    judge = Judge()
    assert ask(judge) == ask(judge)
    assert len(calls) == 1
    ask(judge, sample="b")
    ask(judge, new_tokens=3)
    ask(judge, stack="paper")
    assert len(calls) == 4
    tight = Judge(room_bytes=0)
    ask(tight)
    ask(tight)
    assert len(calls) == 6


def test_the_judge_lets_a_model_go() -> None:
    """A bench frees one model before it builds the next; a card need not hold both."""
    family = FAMILIES.load("internvl")()
    card = tiny_card(family)
    model: Any = build_model(card, device="cpu", dtype="float32")
    judge, prompt = Judge(), tiny_prompt(family, card)
    judge(model, prompt, build_pruner("topv:layer=1"), "current", sample="a", new_tokens=1, seed=0)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


def test_random_weights_are_refused_in_one_line() -> None:
    check_weights("hub")
    with pytest.raises(UsageError, match="random weights learnt nothing") as error:
        check_weights("random")
    assert "\n" not in str(error.value)
