"""Graphs that run as Dynamo traced them: values, gradients, draws and marked calls are eager's."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import silly
from breakable_backend import ReplayError, explain
from checks import assert_same, random_states

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo does
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),  # torch.func.jvp uses it
]

Function = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def options(kind: str) -> dict[str, Any]:
    """Graphs that need gradients are not captured."""
    return {"driver": kind, "training": False}


@torch.library.custom_op("test_traced::counted", mutates_args=(), tags=silly.UNSAFE)
def counted(x: Tensor) -> Tensor:
    """Twice ``x``; a marked op with a gradient."""
    silly.calls["counted"] += 1
    return x * 2


counted.register_fake(torch.empty_like)
counted.register_autograd(lambda ctx, grad: grad * 2)


def body(x: Tensor, w: Tensor) -> Tensor:
    """A layer whose gradient depends on what it draws."""
    return nn.functional.dropout((x @ w).relu(), 0.5)


def saved_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of matrix products."""
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def selective(x: Tensor, w: Tensor) -> Tensor:
    """Selective checkpoint."""
    contexts = functools.partial(create_selective_checkpoint_contexts, saved_products)
    return checkpoint(lambda x: body(x, w).sin(), x, use_reentrant=False, context_fn=contexts)


def nested(x: Tensor, w: Tensor) -> Tensor:
    """A checkpoint inside of one."""
    inner = lambda x: checkpoint(lambda x: body(x, w), x, use_reentrant=False) + nn.functional.dropout(x)  # noqa: E731
    return checkpoint(inner, x, use_reentrant=False)


def under_autocast(x: Tensor, w: Tensor) -> Tensor:
    """A checkpoint under autocast."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return checkpoint(lambda x: body(x, w), x, use_reentrant=False).float()


@torch.compiler.nested_compile_region
def drawing_region(x: Tensor, w: Tensor) -> Tensor:
    """A region that draws, and calls a marked op."""
    return counted(nn.functional.dropout(x @ w))


@torch.compiler.nested_compile_region
def checkpointed_region(x: Tensor, w: Tensor) -> Tensor:
    """A region that is recomputed."""
    return checkpoint(lambda x: body(x, w), x, use_reentrant=False)


class Square(torch.autograd.Function):
    """Saves an argument and a result, and keeps a number and an intermediate value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        result = x * x * factor + torch.rand_like(x)
        ctx.save_for_backward(x, result)
        ctx.factor, ctx.shift = factor, x.detach().cos()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, result = ctx.saved_tensors
        return grads[0] * (2 * ctx.factor * x + result + ctx.shift), None


class Once(torch.autograd.Function):
    """May not be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2 * ctx.saved_tensors[0]


class Switches(torch.autograd.Function):
    """Turns gradients on and off inside its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            double = ctx.saved_tensors[0] * 2
        return grads[0] * double


CASES: dict[str, Function] = {
    "checkpoint": lambda x, w: checkpoint(lambda x: body(x, w), x, use_reentrant=False),
    "checkpoint of a marked op": lambda x, w: checkpoint(
        lambda x: counted(body(counted(x), w)).sin(), x, use_reentrant=False
    ),
    "no early stop": lambda x, w: checkpoint(lambda x: counted(body(x, w)), x, use_reentrant=False, early_stop=False),
    "no random state": lambda x, w: checkpoint(
        lambda x: body(x, w), x, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    ),
    "arguments by name": lambda x, w: checkpoint(lambda x, v: body(x, v), x, v=w, use_reentrant=False),
    "several results": lambda x, w: torch.cat(checkpoint(lambda x: (body(x, w), x * 2), x, use_reentrant=False)),
    "reentrant": lambda x, w: checkpoint(lambda x, w: body(x, w), x, w, use_reentrant=True),
    "selective": selective,
    "nested": nested,
    "autocast": under_autocast,
    "region": lambda x, w: drawing_region(x, w) + drawing_region(x * 2, w),
    "checkpoint in a region": lambda x, w: checkpointed_region(x, w) + checkpointed_region(x * 2, w),
    "autograd.Function": lambda x, w: Square.apply(x @ w, 1.5),
    "cond": lambda x, w: torch.cond(x.sum() > 0, lambda x: (x @ w).sin(), lambda x: x @ w, (x,)),
    "vmap": lambda x, w: torch.vmap(lambda row: nn.functional.dropout(row @ w), randomness="different")(x),
    "grad": lambda x, w: torch.func.grad(lambda w: (x @ w).sin().sum())(w),
    "jvp": lambda x, w: torch.func.jvp(lambda w: (x @ w).sin(), (w,), (torch.ones_like(w),))[1],
    "jacrev": lambda x, w: torch.func.jacrev(lambda row: (row @ w).sin())(x[0]),
}


def trained(function: Callable[..., Any], device: torch.device) -> list[Any]:
    """What three calls give: values, gradients, second derivatives where there are any, draws, marked calls."""
    found: list[Any] = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = (torch.rand(2, 3, device=device) + 0.1).requires_grad_()
        w = (torch.rand(3, 3, device=device) + 0.1).requires_grad_()
        before = silly.calls["counted"]
        value = function(x, w).sum()
        states = random_states(device)
        value.backward()
        calls = silly.calls["counted"] - before
        found.append([value.detach(), x.grad, w.grad, states, random_states(device), calls, _second(function, x, w)])
    return found


def _second(function: Callable[..., Any], x: Tensor, w: Tensor) -> Any:
    """Second derivatives; or, where there are none, what the error says first."""
    try:
        (first,) = torch.autograd.grad(function(x, w).sum(), w, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, w), allow_unused=True) if first.requires_grad else "none"
    except RuntimeError as error:
        return str(error)[:60]


@pytest.mark.usefixtures("order_of_gradients")
@pytest.mark.parametrize("case", CASES)
def test_trains_as_eager(case: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 2 and 6: values, gradients, second derivatives, draws and the number of marked calls are eager's."""
    compiled = torch.compile(CASES[case], backend="breakable_cg", options=options)
    assert_same(trained(compiled, device), trained(CASES[case], device))
    report = explain(compiled)
    assert report.programs == ()
    assert {graph.why for graph in report.eager_graphs} == {"it needs gradients"}


def test_selective_checkpoint_saves(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: what a selective checkpoint keeps is not computed again in backward."""

    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op is torch.ops.test_traced.counted.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def f(x: Tensor) -> Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, keep)
        return checkpoint(lambda x: counted(x).sin().cos(), x, use_reentrant=False, context_fn=contexts).sum()

    counts = []
    for function in (f, torch.compile(f, backend="breakable_cg", options=options)):
        x = torch.rand(3, device=device, requires_grad=True)
        function(x).backward()
        before = silly.calls["counted"]
        function(x).backward()
        counts.append(silly.calls["counted"] - before)
    assert counts == [1, 1]


def test_once_differentiable(device: torch.device, options: dict[str, Any]) -> None:
    """Line 8: a backward that is marked ``once_differentiable`` is differentiated once, and a second time is eager's error."""

    def f(x: Tensor) -> Tensor:
        return Once.apply(x.sin()).square().sum()

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    x = torch.rand(3, device=device, requires_grad=True)
    for function in (f, compiled):
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(
            RuntimeError, match="differentiate twice a function that was marked with @once_differentiable"
        ):
            first.sum().backward()


def test_second_derivative_past_switches(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: where Dynamo does not tell what a backward is differentiated by, a second derivative is an error, never a zero."""
    compiled = torch.compile(lambda x: Switches.apply(x.sin()).sum(), backend="breakable_cg", options=options)
    x = torch.rand(3, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    assert_same(first.detach(), (2 * x.sin() * x.cos()).detach())
    with pytest.raises(ReplayError, match="second derivative"):
        torch.autograd.grad(first.sum(), x)


def test_saved_values_go_with_the_result(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: a result that a ``torch.autograd.Function`` saved goes when the caller lets it go."""
    compiled = torch.compile(lambda x: Square.apply(x, 2.0), backend="breakable_cg", options=options)
    result = compiled(torch.rand(3, device=device, requires_grad=True))
    gone = weakref.ref(result)
    del result
    assert gone() is None


def test_saved_values_are_watched(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: writing what a ``torch.autograd.Function`` saved is an error in backward, as in eager."""
    compiled = torch.compile(lambda x: Square.apply(x, 2.0), backend="breakable_cg", options=options)
    x = torch.rand(3, device=device, requires_grad=True)
    result = compiled(x)
    result.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
