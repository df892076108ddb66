"""What is looked up is what torch says: result by result, in its form and in whose memory it is."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import families, tiny_model, tiny_prompt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memprof.bench.generate import profile_prompt
from memprof.meters import meter_for
from memprof.pruning import METHODS, build_pruner
from memprof.tracing import answers, ledger

answer = answers.answer


def forms(out: Any, tensors: list[Tensor]) -> list[Any]:
    """What a result is: of each tensor its form, the bytes behind it, and which of ``tensors`` it shares them with."""
    if isinstance(out, tuple | list):
        return [type(out), *(forms(one, tensors) for one in out)]
    if not isinstance(out, Tensor):
        return [type(out), out]
    storage = out.untyped_storage()
    return [
        type(out), out.shape, out.stride(), out.dtype, out.device, out.layout, out.storage_offset(), storage.nbytes(),
        [tensor.untyped_storage()._cdata == storage._cdata for tensor in tensors], [out is one for one in tensors],
        out.requires_grad, out.is_conj(), out.is_neg(), str(torch._C._dispatch_keys(out)), vars(out),
    ]  # fmt: skip


class Both:
    """Takes the place of ``answer``: what is looked up is asked of torch, too, the first time of each form."""

    def __init__(self) -> None:
        self.calls = 0
        self.compared: dict[Any, int] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = answer(func, args, kwargs)
        self.calls += 1
        tensors: list[Tensor] = []
        form: list[Any] = [func]
        if answers._goes_by_form(func) and answers._describe([args, [*kwargs.items()]], form, tensors):
            times = self.compared[tuple(form)] = self.compared.get(tuple(form), 0) + 1
            if times == 2:
                assert forms(out, tensors) == forms(func(*args, **kwargs), tensors), func
        return out


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    made = Both()
    monkeypatch.setattr(ledger, "answer", made)
    return made


@pytest.mark.parametrize("method", METHODS.names())
def test_every_answer_of_a_method_is_torchs(both: Both, method: str) -> None:
    family, card, model = tiny_model("internvl", device="sim")
    for _ in range(2):  # what is seen first is torch's own
        profile_prompt(model, meter_for(model), build_pruner(method), "paper", tiny_prompt(family, card), new_tokens=2)
    assert len(both.compared) > 100
    assert sum(times > 1 for times in both.compared.values()) > 0.9 * len(both.compared)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", families())
def test_every_answer_of_a_family_is_torchs_and_most_are_looked_up(both: Both, name: str, attention: str) -> None:
    family, card, model = tiny_model(name, attention, device="sim")
    mode = next(model.parameters()).fake_mode
    answers._tables.pop(mode, None)
    for _ in range(2):
        profile_prompt(
            model, meter_for(model), build_pruner("baseline"), "current", tiny_prompt(family, card), new_tokens=2
        )
    recipes = [*answers._tables[mode].values()]
    assert len(recipes) < both.calls / 4
    assert recipes.count(None) <= len(recipes) / 20


def called(func: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Answers to the same call, twice."""
    with torch.no_grad():
        return [answer(func, args, kwargs) for _ in range(2)]


def test_what_does_not_go_by_form_is_left_to_torch() -> None:
    aten, mode = torch.ops.aten, FakeTensorMode()
    with mode:
        one, constant = torch.empty(4, 6), torch.tensor([1.0, 2.0])
        spun = torch.empty(4, dtype=torch.complex64)
    with torch.no_grad():
        turned = answer(aten.t_.default, (one,), {})
        assert turned is one
        assert one.shape == (6, 4), "its form is another after each call"
        assert answer(aten.t_.default, (one,), {}).shape == (4, 6)
    assert not answers._tables.get(mode)
    called(aten.mul.Tensor, constant, 2)
    called(aten.mul.Tensor, spun, 2)
    called(aten.mul.Tensor, one.requires_grad_(), 2)
    assert all(recipe is not None for recipe in answers._tables[mode].values())
    assert answer(aten.mul.Tensor, (one, 2), {}).shape == (4, 6)
    for given in (2, 2.0, True):
        assert [out.dtype for out in called(aten.mul.Tensor, torch.ops.aten.ones_like.default(one.long()), given)] == [
            torch.float32 if given.__class__ is float else torch.int64
        ] * 2


class Heard(TorchDispatchMode):
    """Keeps every operator that it hears of."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_who_else_listens_hears_the_operators_themselves() -> None:
    family, card, model = tiny_model("internvl", device="sim")
    heard = []
    for _ in range(2):
        with Heard() as mode:
            profile_prompt(
                model, meter_for(model), build_pruner("baseline"), "current", tiny_prompt(family, card), new_tokens=2
            )
        heard.append(mode.operators)
    assert torch.ops.aten.mm.default in heard[0]
    assert heard[0] == heard[1]


def test_tables_go_with_their_model_and_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST", 10)
    mode = FakeTensorMode()
    with mode:
        many = [torch.empty(n, 2) for n in range(1, 40)]
    for one in many:
        assert [out.shape for out in called(torch.ops.aten.neg.default, one)] == [one.shape] * 2
        assert len(answers._tables[mode]) <= 10
    gone = weakref.ref(mode)
    del mode, many, one
    gc.collect()
    assert gone() is None
