"""``recompute=`` and ``backward=`` of marked functions: a second run in the backward, or the user's own backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import checkpoint

from breakable_backend import _torch
from breakable_backend.errors import EagerOutputError, ReplayError, defined_at
from breakable_backend.marks.saved_for_backward import no_second_derivative
from breakable_backend.marks.structure import Structure, instances_in, put_together, take_apart


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, run again in the backward from the same random state instead of keeping intermediate results."""

    def packed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with checkpoint.set_checkpoint_early_stop(False):  # the body has to run to its end
            return checkpoint.checkpoint(packed, args, kwargs, use_reentrant=False)

    return run


@dataclass(frozen=True)
class Context:
    """The context that a user's backward gets: the arguments and the result of the call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def with_backward(function: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with gradients that ``backward(context, *grads)`` computes."""
    name = getattr(function, "__qualname__", type(function).__name__)

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        numbers: list[Any] = []
        structure = take_apart((args, kwargs), tensors, numbers, numbers)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return function(*args, **kwargs)
        results: list[Any] = []
        call = _DeclaredCall(name, function, backward, args, kwargs, structure, numbers, results)
        made = _torch.apply_function(_Declared, call, *tensors)
        numbers, returned = results
        return put_together(returned, _reader(made, numbers))

    return run


@dataclass(frozen=True)
class _DeclaredCall:
    name: str
    function: Callable[..., Any]
    backward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    structure: Structure
    numbers: list[Any]
    """The numbers among the arguments."""
    results: list[Any]


def _not_twice(ctx: Any) -> Callable[[], ReplayError]:
    name, backward = ctx.given[:2]
    why, fix = "whose backward= gives first derivatives alone", "leave out backward= where autograd can follow it"
    return functools.partial(no_second_derivative, name, why, defined_at(backward), fix)


class _Declared(torch.autograd.Function):
    """The autograd node of a call whose backward the user wrote."""

    @staticmethod
    def forward(ctx: Any, call: _DeclaredCall, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made: list[torch.Tensor] = []
        numbers: list[Any] = []
        result = call.function(*call.args, **call.kwargs)
        returned = take_apart(result, made, numbers, numbers)
        call.results.extend((numbers, returned))
        ctx.save_for_backward(*tensors, *made)
        modules = {id(module): module for module in instances_in((call.args, call.kwargs), torch.nn.Module)}
        others = call.numbers, modules
        ctx.given = (call.name, call.backward, call.structure, others, returned, numbers, len(tensors))
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @_torch.once_differentiable(_not_twice)
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        name, backward, structure, others, returned, numbers, count = ctx.given
        saved = ctx.saved_tensors
        args, kwargs = put_together(structure, _reader(saved[:count], *others))
        result = put_together(returned, _reader(saved[count:], numbers))
        tree = put_together(returned, lambda leaf: grads[leaf[1]] if leaf[0] == "tensor" else None)
        got = backward(Context(args, kwargs, result), *(tree if isinstance(tree, tuple) else (tree,)))
        arguments = [*structure[-1][0][-1], *structure[-1][1][-1]]
        per_argument = got if isinstance(got, tuple) else (got,)
        if len(per_argument) != len(arguments):
            raise EagerOutputError(
                f"the backward of {name} returned {len(per_argument)} gradients for {len(arguments)} arguments",
                where=defined_at(backward),
                fix="return one, or None, for each argument of the call",
            )
        gradients: list[Any] = [None] * count
        for argument, gradient in zip(arguments, per_argument, strict=True):
            _spread(argument, gradient, gradients)
        return None, *gradients


def _reader(tensors: Sequence[Any], numbers: Sequence[Any], modules: Any = None) -> Callable[[Structure], Any]:
    def leaf(structure: Structure) -> Any:
        kind, place = structure[0], structure[1]
        if kind == "tensor":
            return tensors[place]
        if kind == "module":
            return modules[place]
        return numbers[place] if kind in ("int", "float") else place

    return leaf


def _spread(structure: Structure, gradient: Any, into: list[Any]) -> None:
    """Assign what a backward returned for one argument to the tensors of that argument."""
    if gradient is None:
        return
    kind = structure[0]
    if kind == "tensor":
        into[structure[1]] = gradient
    elif kind == "module":
        for name, place in zip(structure[2], structure[3], strict=True):
            into[place] = gradient.get(name)
    elif kind == "dict":
        for key, item in zip(structure[1], structure[-1], strict=True):
            _spread(item, gradient.get(key), into)
    elif kind == "data":
        for name, item in zip(structure[2], structure[-1], strict=True):
            _spread(item, getattr(gradient, name), into)
    elif kind in ("list", "tuple", "named", "size", "node"):
        parts = gradient if kind != "node" else _torch.PYTREE_NODES[structure[1]].flatten_fn(gradient)[0]
        for item, part in zip(structure[-1], parts, strict=True):
            _spread(item, part, into)
