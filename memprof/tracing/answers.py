"""What operators give on tensors without storage, looked up instead of worked out anew.

Such a result follows from the form of what an operator is given: sizes, strides, dtypes, numbers. A model asks the same
of each of its layers, and torch's own cache (``FakeTensorMode``) spends more on the way to an entry than all else that
a run without storage does: with this table such a run takes less than half as long. What hangs on more than form stays
with torch: values, gradients, complex numbers, and results that share memory in a way that is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

#: Makes a result, given the mode whose tensors have no storage and the tensors of the call in their order.
Recipe = Callable[[FakeTensorMode, list[Tensor]], Any]
#: So many forms are kept for one model, some tens of megabytes; beyond that all are forgotten.
MOST = 50_000
#: What an operator is tagged with whose result hangs on values, or that gives its argument another form.
_NOT_BY_FORM = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
#: Tagged so for masks alone, which torch refuses: what is given places is of their form.
_BY_FORM_ALL_THE_SAME = {torch.ops.aten.index.Tensor}

_tables: WeakKeyDictionary[FakeTensorMode, dict[Any, Recipe | None]] = WeakKeyDictionary()
_by_form: dict[Any, bool] = {}


def answer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What ``func(*args, **kwargs)`` gives, where some argument is a tensor without storage; raises what it raises."""
    tensors: list[Tensor] = []
    form: list[Any] = [func, torch.get_default_dtype()]
    if _only_form_counts(func) and _describe(args, form, tensors) and _describe(kwargs.items(), form, tensors):
        mode = next((tensor.fake_mode for tensor in tensors if type(tensor) is FakeTensor), None)
        if mode is not None:
            recipe = _found(_tables.setdefault(mode, {}), tuple(form))
            if recipe is _not_seen:
                return _learnt(mode, tuple(form), tensors, func, args, kwargs)
            if recipe is not None:
                return recipe(mode, tensors)
    return func(*args, **kwargs)


def _only_form_counts(func: Any) -> bool:
    """Whether a result hangs on form alone, and nobody but the caller listens to operators: they shall hear of it."""
    special = torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not _goes_by_form(func)
    return not special and _get_current_dispatch_mode() is None


def _found(table: dict[Any, Recipe | None], form: tuple[Any, ...]) -> Recipe | None:
    try:
        return table.get(form, _not_seen)
    except TypeError:  # an argument without a hash
        return None


def _learnt(
    mode: FakeTensorMode, form: tuple[Any, ...], tensors: list[Tensor], func: Any, args: Any, kwargs: Any
) -> Any:
    """What torch gives, kept for the next time, and not in torch's own cache as well."""
    table, before = _tables[mode], mode.cache_enabled
    mode.cache_enabled = False
    try:
        out = func(*args, **kwargs)
    finally:
        mode.cache_enabled = before
    if len(table) >= MOST:
        table.clear()
    table[form] = _recipe(mode, out, tensors)
    return out


def _not_seen(mode: FakeTensorMode, tensors: list[Tensor]) -> Any:
    """Stands for no entry, where None stands for a form that is torch's."""


def _goes_by_form(func: Any) -> bool:
    if func not in _by_form:
        _by_form[func] = func in _BY_FORM_ALL_THE_SAME or not _NOT_BY_FORM & set(func.tags)
    return _by_form[func]


def _describe(args: Iterable[Any], form: list[Any], tensors: list[Tensor]) -> bool:
    """Add to ``form`` what ``args`` are, and to ``tensors`` those among them; False where form does not say all."""
    for arg in args:
        kind = type(arg)
        if kind is FakeTensor or kind is Tensor:
            if arg.dtype.is_complex or (kind is FakeTensor and arg.constant is not None):
                return False
            form += (kind, arg.shape, arg.stride(), arg.dtype, arg.storage_offset(), arg.device)
            tensors.append(arg)
        elif kind is list or kind is tuple:
            form += (kind, len(arg))
            if not _describe(arg, form, tensors):
                return False
        elif isinstance(arg, Tensor):
            return False
        else:  # with its type, since 1, 1.0 and True are equal
            form += (kind, arg)
    return True


def _recipe(mode: FakeTensorMode, out: Any, tensors: list[Tensor]) -> Recipe | None:
    """How ``out`` came from ``tensors``, or None where that is not seen."""
    kind = type(out)
    if kind is tuple or kind is list:
        parts = [_recipe(mode, one, tensors) for one in out]
        each = [part for part in parts if part is not None]
        return (lambda mode, given: kind(part(mode, given) for part in each)) if len(each) == len(parts) else None
    if kind is torch.device:
        return lambda mode, given: out
    for place, tensor in enumerate(tensors):
        if out is tensor:
            return lambda mode, given: given[place]
    if kind is not FakeTensor or out.constant is not None or out.requires_grad or out.dtype.is_complex:
        return None
    size, stride, dtype, device, offset = out.shape, out.stride(), out.dtype, out.fake_device, out.storage_offset()
    storage = out.untyped_storage()
    sharing = [place for place, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    if not sharing:
        same = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        if offset or same.untyped_storage().nbytes() != storage.nbytes():
            return None
        attributes = _attributes(mode, same, device)

        def new(mode: FakeTensorMode, _: list[Tensor]) -> FakeTensor:
            elem = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            return _without_storage(mode, elem, device, attributes)

        return new
    if any(tensors[place] is not tensors[sharing[0]] for place in sharing):
        return None
    attributes = _attributes(mode, torch.empty(0, dtype=dtype, device="meta"), device)

    def view(mode: FakeTensorMode, given: list[Tensor]) -> FakeTensor:
        elem = torch.empty(0, dtype=dtype, device="meta")
        elem.set_(given[sharing[0]].untyped_storage(), offset, size, stride)
        return _without_storage(mode, elem, device, attributes)

    return view


def _attributes(mode: FakeTensorMode, elem: Tensor, device: torch.device) -> dict[str, Any]:
    """What torch gives a tensor without storage beside its mode: every attribute, whatever they are in its version."""
    return {name: value for name, value in vars(FakeTensor(mode, elem, device)).items() if value is not mode}


def _without_storage(
    mode: FakeTensorMode, elem: Tensor, device: torch.device, attributes: dict[str, Any]
) -> FakeTensor:
    """What ``FakeTensor(mode, elem, device)`` makes, without its checks, which are a third of a run."""
    made: FakeTensor = Tensor._make_subclass(
        FakeTensor, elem, False, dispatch_device=True, device_for_backend_keys=device
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    vars(made).update(attributes)
    made.fake_mode = mode
    return made
