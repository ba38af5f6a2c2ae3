"""Gradients of ``@eager_on_graph`` functions under ``torch.compile``: one opaque node, whatever the backend."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import EagerOutputError, OptionsError, PartitionError, ReplayError, eager_on_graph
from breakable_backend.errors import BreakableError
from breakable_backend.marks import saved_for_backward
from checks import assert_same
from gpu import soon

BACKENDS = ["breakable_cg", "eager", "aot_eager", "inductor"]

Function = Callable[..., Any]


@pytest.fixture(params=BACKENDS)
def compile_with(request: pytest.FixtureRequest, device: torch.device, options: dict[str, Any]) -> Function:
    """Compiles whole with each backend."""
    theirs = {"options": request.getfixturevalue("for_inductor")} if request.param == "inductor" else {}
    given = {"options": options} if request.param == "breakable_cg" else theirs
    return lambda function: torch.compile(function, backend=request.param, fullgraph=True, **given)


def learned(compiled: Function) -> Function:
    """The same, called once more before its first call: a first call runs as Python, and is of no interest here."""
    waiting = [compiled]

    def call(*args: Any, **kwargs: Any) -> Any:
        if waiting:
            waiting.pop()(*args, **kwargs)
            runs.clear()
        return compiled(*args, **kwargs)

    return call


@pytest.fixture(autouse=True)
def nothing_saved_is_left() -> Any:
    """What a call saved goes with its graph."""
    runs.clear()
    yield
    torch.compiler.reset()
    gc.collect()
    assert soon(lambda: not saved_for_backward._all_saved)


runs: list[Any] = []


def leaves(device: torch.device, *shapes: tuple[int, ...], number: int = 2) -> list[list[Tensor]]:
    """Equal leaves, as often as they are needed."""
    first = [torch.randn(shape, device=device) for shape in shapes]
    return [[tensor.clone().requires_grad_() for tensor in first] for _ in range(number)]


def close(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def same_gradients(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        a.grad is not None and b.grad is not None and close(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True)
    )


@eager_on_graph(fake=lambda x, w: torch.empty_like(x))
def branch(x: Tensor, w: Tensor) -> Tensor:
    """Saves what it computes, and takes a way that depends on values."""
    runs.append(bool(x.sum() > 0))
    return (x * w).exp() if x.sum() > 0 else (x - w).tanh() * x


def model(x: Tensor, w: Tensor) -> Tensor:
    return branch(x.sin(), w * 2).cos() * w + branch(x.sin(), w * 2)


def test_two_forward_passes(compile_with: Function, device: torch.device) -> None:
    """Passes that are pending together keep what they saved, and the body runs once for each call."""
    compiled = compile_with(model)
    for _ in range(2):
        x, y = leaves(device, (4,), (4,))
        u, v = leaves(device, (4,), (4,))
        runs.clear()
        got = compiled(*x), compiled(*(-t for t in u))
        assert len(runs) == 4
        want = model(*y), model(*(-t for t in v))
        assert all(map(close, got, want))
        runs.clear()
        for g, w in zip(reversed(got), reversed(want), strict=True):
            g.sum().backward()
            w.sum().backward()
        assert not runs
        assert same_gradients(x, y)
        assert same_gradients(u, v)


def test_backward_twice(compile_with: Function, device: torch.device) -> None:
    """A retained graph can be run again, gradients add up over passes, and a graph that is not retained is gone."""
    x, y = leaves(device, (4,), (4,))
    for function, args in ((compile_with(model), x), (model, y)):
        out = function(*args)
        (out.sum() * 3).backward(retain_graph=True)
        out.sum().backward()
        (function(*args) * 2).sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()
    assert same_gradients(x, y)


def test_nothing_is_left(compile_with: Function, device: torch.device) -> None:
    """A graph that is dropped, with its backward or without, takes along what the body kept."""
    kept: list[weakref.ref[Any]] = []

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def keeps(x: Tensor) -> Tensor:
        y = x * 2
        kept.append(weakref.ref(y))
        return (y * y).sin()

    compiled = compile_with(lambda x: keeps(x.sin()) * 2)
    for backward in (False, True):
        kept.clear()
        ((x,),) = leaves(device, (4,), number=1)
        out = compiled(x)
        assert len(saved_for_backward._all_saved) == 1
        assert all(ref() is not None for ref in kept)
        if backward:
            out.sum().backward()
        del out
        gc.collect()
        assert not saved_for_backward._all_saved
        assert kept
        assert all(ref() is None for ref in kept)


@pytest.mark.kernels
def test_memory_that_compiled_code_uses_again(compile_with: Function, device: torch.device) -> None:
    """What a call saved is not overwritten by compiled code that takes the memory for free: arguments and results."""

    @eager_on_graph(fake=lambda x, n: (torch.empty_like(x), torch.empty_like(x)))
    def holds(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x.gather(0, n) * x

    def whole(x: Tensor, n: Tensor) -> Tensor:
        a, b = holds(x * 2 + 1, n + 1)
        c, d = holds(x.cos(), n + 1)
        for _ in range(3):
            a, b = (a * 2 + b).sin(), (b - a).cos()
        return a + b + c * 3 + d * 5

    compiled = compile_with(whole)
    n = torch.tensor([2, 1, 0, -1], device=device)
    for _ in range(2):
        (x,), (y,) = leaves(device, (4,))
        compiled(x, n).sum().backward()
        whole(y, n).sum().backward()
        assert same_gradients([x], [y])


def test_bit_for_bit(options: dict[str, Any], device: torch.device) -> None:
    """With this backend gradients are eager's bit for bit, and None where eager has None."""

    @eager_on_graph(fake=lambda x, w, u: (torch.empty_like(x), x.new_empty(())))
    def some(x: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ w).softmax(-1), x.sum()

    def whole(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return some(x.sin(), w, u)[0].log().mean()

    compiled = torch.compile(whole, backend="breakable_cg", fullgraph=True, options=options)
    for _ in range(3):
        x, y = leaves(device, (4, 4), (4, 4), (2,))
        compiled(*x).backward()
        whole(*y).backward()
        for a, b in zip(x, y, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or torch.equal(a.grad, b.grad)


@eager_on_graph
def thrice(x: Tensor) -> Tensor:
    return x.sin() + x.exp() * 3 + x.cos() / 7


def test_arguments_in_use_elsewhere(options: dict[str, Any], device: torch.device) -> None:
    """Where an op stands before a function that uses its argument several times, gradients have eager's bits.

    Without that op the sum of four gradients is the same but for its order.
    """

    def between(x: Tensor) -> Tensor:
        y = x.tanh()
        return y + thrice(y * 1)

    def without(x: Tensor) -> Tensor:
        y = x.tanh()
        return y + thrice(y)

    for function, equal in ((between, torch.equal), (without, close)):
        compiled = torch.compile(function, backend="breakable_cg", options=options)
        for _ in range(6):
            (ours,), (theirs,) = leaves(device, (64,))
            compiled(ours).sum().backward()
            function(theirs).sum().backward()
            assert equal(ours.grad, theirs.grad)


def test_what_needs_none(compile_with: Function, device: torch.device) -> None:
    """Results need gradients where eager's do: not a mask, an index, a detached one, nor one made under no_grad."""

    @eager_on_graph
    def mixed(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            scale = x.abs().amax()
        y = x * scale
        return y, y.detach(), x.argsort(), scale, x, x.detach(), x[1:]

    def whole(x: Tensor) -> tuple[Tensor, ...]:
        return mixed(x * 2)

    compiled = learned(compile_with(whole))
    (x,), (y,) = leaves(device, (4,))
    got, want = compiled(x), whole(y)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in want]
    assert all(map(close, got, want))
    sum((t.sum() * n for n, t in enumerate(got) if t.requires_grad), x.sum()).backward()
    sum((t.sum() * n for n, t in enumerate(want) if t.requires_grad), y.sum()).backward()
    assert same_gradients([x], [y])


@pytest.mark.kernels
def test_shared_results(compile_with: Function, device: torch.device) -> None:
    """Gradients of results that share memory reach the function, each once."""

    @eager_on_graph
    def shared(x: Tensor) -> tuple[Tensor, ...]:
        y = x.repeat(2, 1) * 2
        z = x.repeat(2, 1).exp()
        return y, y[1], y.t(), z[0], z[1]

    def whole(x: Tensor) -> Tensor:
        a, b, c, d, e = shared(x.sin())
        return (a * 3).sum() + (b * b).sum() + c[2].sum() + (d * e).sum() + e.sum()

    compiled = compile_with(whole)
    for _ in range(2):
        (x,), (y,) = leaves(device, (4,))
        compiled(x).backward()
        whole(y).backward()
        assert same_gradients([x], [y])


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def test_view_with_a_gradient_of_its_own(compile_with: Function, device: torch.device) -> None:
    """A result in an argument's memory whose gradient is not that of a view keeps its gradient."""

    @eager_on_graph
    def reverse(x: Tensor) -> Tensor:
        return Reverse.apply(x)

    compiled = learned(compile_with(lambda x: reverse(x * 2) * 3))
    ((x,),) = leaves(device, (4,), number=1)
    compiled(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -6))


class Gate(nn.Module):
    """A marked method with parameters, one of them unused."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(1, 1)

    @eager_on_graph(fake=lambda self, x: torch.empty_like(x))
    def gate(self, x: Tensor) -> Tensor:
        runs.append("gate")
        y = self.linear(x)
        return y * y.sigmoid() if y.sum() > 0 else y * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x.sin()) + self.gate(x.cos())


def test_parameters_of_a_module(compile_with: Function, device: torch.device) -> None:
    """Parameters of a module among the arguments get their gradients; training gives what eager training gives."""
    ours = Gate().to(device)
    theirs = copy.deepcopy(ours)
    compiled = compile_with(ours)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, theirs)]
    for _ in range(4):
        x = torch.randn(3, 4, device=device)
        runs.clear()
        compiled(x).square().mean().backward()
        assert len(runs) == 2
        theirs(x).square().mean().backward()
        assert same_gradients(list(ours.linear.parameters()), list(theirs.linear.parameters()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(close, ours.parameters(), theirs.parameters()))


def test_hooks_run_once(compile_with: Function, device: torch.device) -> None:
    """A hook on a parameter sees its gradient once."""
    ours = Gate().to(device)
    theirs = copy.deepcopy(ours)
    for module in (ours, theirs):
        module.linear.weight.register_hook(lambda grad: grad * 0.5)
    x = torch.randn(3, 4, device=device)
    compile_with(ours)(x).sum().backward()
    theirs(x).sum().backward()
    assert same_gradients([ours.linear.weight], [theirs.linear.weight])


@pytest.mark.kernels
def test_writes_beside_gradients(compile_with: Function, device: torch.device) -> None:
    """A function may write one argument and need gradients of another."""

    @eager_on_graph(mutates_args=("count",))
    def counted(x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return x.exp()

    @eager_on_graph(mutates_args=("count",))
    def only_counts(x: Tensor, count: Tensor) -> None:
        count.add_(2)

    def whole(x: Tensor, count: Tensor) -> Tensor:
        only_counts(x, count)
        return counted(x.sin(), count) * count

    compiled = compile_with(whole)
    counts = [torch.zeros((), device=device) for _ in range(2)]
    for _ in range(3):
        (x,), (y,) = leaves(device, (4,))
        compiled(x, counts[0]).sum().backward()
        whole(y, counts[1]).sum().backward()
        assert torch.equal(*counts)
        assert same_gradients([x], [y])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_writing_what_needs_gradients(options: dict[str, Any], device: torch.device) -> None:
    """A call that writes a tensor which needs gradients cannot be a node: an error under fullgraph, else it runs by itself."""

    @eager_on_graph(mutates_args=("x",))
    def double(x: Tensor) -> Tensor:
        return x.mul_(2)

    def whole(x: Tensor) -> Tensor:
        return double(x.sin()) * 3

    ((x,), (y,)) = leaves(device, (4,))
    with pytest.raises(PartitionError, match="it writes a tensor that needs gradients"):
        torch.compile(whole, backend="breakable_cg", fullgraph=True, options=options)(x)
    torch.compile(whole, backend="breakable_cg", options=options)(x).sum().backward()
    whole(y).sum().backward()
    assert same_gradients([x], [y])


def test_values_are_read_where_gradients_are_needed(compile_with: Function, device: torch.device) -> None:
    """A branch on a value needs no ``fake``, whatever the arguments need."""

    @eager_on_graph
    def decided(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x + 1

    def whole(x: Tensor) -> Tensor:
        return decided(x.sin() * 3).cos()

    compiled = compile_with(whole)
    for sign in (1, -1, 1, -1):
        mine, theirs = (torch.full((4,), 0.5 * sign, device=device).requires_grad_() for _ in range(2))
        compiled(mine).sum().backward()
        whole(theirs).sum().backward()
        assert same_gradients([mine], [theirs])


def test_closures_are_refused(options: dict[str, Any], device: torch.device) -> None:
    """Gradients of what a function closes over would be lost: an error says what to do."""
    weight = torch.ones(4, device=device, requires_grad=True)

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def scaled(x: Tensor) -> Tensor:
        return x * weight

    compiled = torch.compile(lambda x: scaled(x + 1) * 2, backend="breakable_cg", fullgraph=True, options=options)
    with pytest.raises(EagerOutputError, match="gradients of what the function closes over") as caught:
        compiled(torch.ones(4, device=device))
    assert "pass that tensor or module as an argument" in caught.value.fix
    with pytest.raises(EagerOutputError, match="gradients of what the function closes over"):
        compiled(torch.ones(4, device=device, requires_grad=True))
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(4, device=device)), torch.full((4,), 4.0, device=device))


def test_second_derivatives_are_refused(options: dict[str, Any], device: torch.device) -> None:
    """A backward through the backward is an error and never a wrong number."""
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)
    (x,) = leaves(device, (4,), (4,), number=1)
    (first, _) = torch.autograd.grad(compiled(*x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative .* passed through branch"):
        first.sum().backward()


def test_errors_of_autograd_in_a_marked_function(options: dict[str, Any], device: torch.device) -> None:
    """An error that autograd raises by itself in the function's backward is the user's, as in eager, captured or not."""

    @eager_on_graph
    def reads_what_it_has_written(x: Tensor) -> Tensor:
        y = x.exp()
        z = y * 2
        return z + y.add_(1)

    def function(x: Tensor) -> Tensor:
        return reads_what_it_has_written(x * 1) * 2

    compiled = torch.compile(function, backend="breakable_cg", options={**options, "training": True})
    for _ in range(4):
        result = compiled(torch.ones(4, device=device, requires_grad=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            result.sum().backward()
        assert not isinstance(caught.value, BreakableError)
        del result, caught


def test_recompute(compile_with: Function, device: torch.device) -> None:
    """With ``recompute`` the body runs again in backward, from the same random state and autocast; the caller's is left alone."""
    masks: list[Tensor] = []
    dtypes: list[torch.dtype] = []

    @eager_on_graph(recompute=True, fake=lambda x, w: torch.empty_like(x))
    def noisy(x: Tensor, w: Tensor) -> Tensor:
        mask = torch.rand_like(x) > 0.5
        masks.append(mask)
        y = x @ w
        dtypes.append(y.dtype)
        return (y.float() * mask).exp()

    def whole(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            y = noisy(x.sin(), w)
        return y * 2 + 1

    compiled = compile_with(whole)
    for _ in range(2):
        x, y = leaves(device, (4, 4), (4, 4))
        results = []
        for function, args in ((compiled, x), (whole, y)):
            masks.clear()
            dtypes.clear()
            torch.manual_seed(3)
            out = function(*args)
            assert len(masks) == 1
            drawn = torch.rand(2, device=device)
            out.sum().backward()
            results.append((out, drawn, torch.rand(2, device=device)))
            assert len(masks) == 2
            assert torch.equal(*masks)
            assert dtypes == [torch.bfloat16] * 2
        assert all(map(close, *results))
        assert same_gradients(x, y)


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_keeps_nothing(options: dict[str, Any], device: torch.device, recompute: bool) -> None:
    """With ``recompute`` nothing that the body computed on its way is alive between forward and backward."""
    kept: list[weakref.ref[Any]] = []

    @eager_on_graph(recompute=recompute, fake=lambda x: torch.empty_like(x))
    def chain(x: Tensor) -> Tensor:
        y = x.exp()
        kept.append(weakref.ref(y))
        return y.sin().cos()

    compiled = torch.compile(lambda x: chain(x * 2), backend="breakable_cg", fullgraph=True, options=options)
    (x,), (y,) = leaves(device, (4,))
    out = compiled(x)
    gc.collect()
    assert [ref() is None for ref in kept] == [recompute]
    out.sum().backward()
    assert len(kept) == 1 + recompute
    (y * 2).exp().sin().cos().sum().backward()
    assert same_gradients([x], [y])


def test_backward_of_ones_own(compile_with: Function, device: torch.device) -> None:
    """With ``backward`` gradients are what that says, in eager code too: from the arguments and result of that very call."""

    def gradients(context: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        x, _parts = context.args
        result, _ = context.result
        assert context.kwargs == {"scale": 3.0}
        return grad * result * 10, {"w": grad * x, "n": None}, None

    @eager_on_graph(
        backward=gradients, fake=lambda x, parts, scale: (torch.empty_like(x), x.new_empty((), dtype=torch.long))
    )
    def foreign(x: Tensor, parts: dict[str, Tensor], *, scale: float) -> tuple[Tensor, Tensor]:
        runs.append(torch.is_grad_enabled())
        array = x.detach().cpu().numpy() * scale  # nothing that autograd could follow
        return torch.from_numpy(array).to(x.device) * parts["w"], parts["n"] + 1

    def whole(x: Tensor, w: Tensor, n: Tensor) -> Tensor:
        y, count = foreign(x.sin(), {"w": w, "n": n}, scale=3.0)
        return y * count

    compiled = compile_with(whole)
    n = torch.tensor(1, device=device)
    for _ in range(2):
        x, y = leaves(device, (4,), (4,))
        runs.clear()
        first, second = compiled(*x, n), compiled(x[0] * 2, x[1], n)
        assert runs == [False, False]
        (first.sum() + second.sum()).backward()
        (whole(*y, n).sum() + whole(y[0] * 2, y[1], n).sum()).backward()
        assert same_gradients(x, y)
    x[0].grad = None
    compiled(*x, n).sum().backward()
    with torch.no_grad():
        inner = x[0].sin()
        assert close(x[0].grad, 2 * inner * 3 * x[1] * 10 * x[0].cos())


def test_backward_for_a_module(compile_with: Function, device: torch.device) -> None:
    """For a module a backward returns gradients by the names of its parameters."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 2.0))

        @eager_on_graph(backward=lambda context, grad: ({"weight": grad * 7}, grad * context.args[0].weight))
        def scale(self, x: Tensor) -> Tensor:
            return x * self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x + 1) * 3

    model = Scale().to(device)
    compiled = learned(compile_with(model))
    ((x,),) = leaves(device, (4,), number=1)
    compiled(x).sum().backward()
    assert torch.equal(model.weight.grad, torch.full((4,), 21.0, device=device))
    assert torch.equal(x.grad, torch.full((4,), 6.0, device=device))


def test_backward_with_other_gradients(options: dict[str, Any], device: torch.device) -> None:
    """A backward that does not return one gradient for each argument is an error."""

    @eager_on_graph(backward=lambda context, grad: (grad, grad, grad))
    def bad(x: Tensor) -> Tensor:
        return x * 2

    compiled = torch.compile(lambda x: bad(x + 1), backend="breakable_cg", options=options)
    ((x,),) = leaves(device, (4,), number=1)
    compiled(x)
    with pytest.raises(EagerOutputError, match="3 gradients for 1 arguments"):
        compiled(x).sum().backward()


def test_not_both() -> None:
    """``recompute`` and ``backward`` exclude each other."""
    with pytest.raises(OptionsError, match="exclude each other"):
        eager_on_graph(recompute=True, backward=lambda context, grad: grad)(lambda x: x)


def test_dynamic_shapes(compile_with: Function, device: torch.device) -> None:
    """Sizes that vary are no obstacle to gradients."""
    compiled = compile_with(model)
    for size in (3, 5, 7):
        x, y = leaves(device, (size,), (size,))
        compiled(*x).sum().backward()
        model(*y).sum().backward()
        assert same_gradients(x, y)


def test_checkpoint_around(compile_with: Function, device: torch.device) -> None:
    """Under a checkpoint a marked call runs again in backward, as in eager code."""

    def whole(x: Tensor, w: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda a, b: branch(a.sin(), b).exp(), x, w, use_reentrant=False)

    compiled = compile_with(whole)
    x, y = leaves(device, (4,), (4,))
    compiled(*x).sum().backward()
    whole(*y).sum().backward()
    assert same_gradients(x, y)


def test_hook_on_a_tied_parameter(compile_with: Function, device: torch.device) -> None:
    """A parameter with two names and a hook has the gradients of both places, and the hook runs once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        @eager_on_graph
        def both(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x * 2) + 1

    mine = Tied().to(device)
    theirs = copy.deepcopy(mine)
    hooked: list[Tensor] = []
    for model, function in ((mine, learned(compile_with(mine))), (theirs, theirs)):
        hooked.clear()
        model.a.weight.register_hook(lambda grad: hooked.append(grad) or grad * 2)
        function(torch.ones(2, 3, device=device)).square().sum().backward()
        assert len(hooked) == 1
    assert same_gradients([mine.a.weight], [theirs.a.weight])


def test_result_that_the_caller_changes(compile_with: Function, device: torch.device) -> None:
    """A result that is the compiled function's may be changed in place, as in ``loss /= steps``."""
    triple = eager_on_graph(lambda x: x * 3)
    compiled = learned(compile_with(lambda x: triple(x.sin())))
    ((x,), (y,)) = leaves(device, (4,))
    for function, leaf in ((compiled, x), (lambda x: x.sin() * 3, y)):
        out = function(leaf)
        out.mul_(leaf)
        out.sum().backward()
    assert same_gradients([x], [y])


def test_backward_for_a_pytree_node(compile_with: Function, device: torch.device) -> None:
    """A gradient in a container that pytree knows reaches the tensors of the argument."""

    @eager_on_graph(backward=lambda context, grad: (OrderedDict((name, grad * 3) for name in context.args[0]),))
    def add(tensors: OrderedDict[str, Tensor]) -> Tensor:
        return tensors["a"] + tensors["b"]

    compiled = learned(compile_with(lambda x, y: add(OrderedDict(a=x * 2, b=y)) * 2))
    ((x, y),) = leaves(device, (4,), (4,), number=1)
    compiled(x, y).sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 12.0, device=device))
    assert torch.equal(y.grad, torch.full((4,), 6.0, device=device))


def test_views_in_the_body(compile_with: Function, device: torch.device) -> None:
    """A view that the body writes is one for autograd too, also in a first call, that AOT makes under a dispatch mode."""

    def body(x: Tensor) -> Tensor:
        y = x * 1
        y[0].mul_(2)
        return y * y

    compiled = learned(compile_with(lambda x: eager_body(x.sin()) * 2))
    eager_body = eager_on_graph(body)
    ((x,), (y,)) = leaves(device, (2, 2))
    compiled(x).sum().backward()
    (body(y.sin()) * 2).sum().backward()
    assert same_gradients([x], [y])


@pytest.mark.parametrize("own", [False, True], ids=["autograd", "own backward"])
def test_second_derivatives_are_an_error(own: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a second derivative through a marked function in compiled code is an error, also where its part alone would be lost."""
    backward = (lambda context, gradient: gradient * 2 * context.args[0]) if own else None
    square = eager_on_graph(backward=backward, fake=torch.empty_like)(lambda x: x * x)
    compiled = torch.compile(lambda x: square(x) + x.sin(), backend="breakable_cg", options=options)
    for _ in range(3):
        x = torch.rand(3, device=device, requires_grad=True)
        y = compiled(x).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        torch.testing.assert_close(first.detach(), (2 * x + x.cos()).detach())
        with pytest.raises(RuntimeError, match=r"second derivative .* passed through .*<lambda>"):
            torch.autograd.grad(first.sum(), x)


def test_saved_tensors_hooks(options: dict[str, Any], device: torch.device) -> None:
    """Hooks that keep copies of what is saved find what the call saved; where compiled code saves the handle, that is an error."""
    square = eager_on_graph(lambda x: x * x)

    def run(backend: str, **kwargs: Any) -> Tensor:
        ((x,),) = leaves(device, (4,), number=1)
        compiled = torch.compile(lambda x: square(x.sin()) * 2, backend=backend, **kwargs)
        compiled(x)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
            out = compiled(x)
        out.sum().backward()
        assert x.grad is not None
        return x.grad - 4 * x.detach().sin() * x.detach().cos()

    assert run("breakable_cg", options=options).abs().max() < 1e-5
    torch.compiler.reset()
    with pytest.raises(ReplayError, match="saved_tensors_hooks kept only a copy"):
        run("aot_eager")


def test_saved_tensors_hooks_see_what_the_body_saves(options: dict[str, Any], device: torch.device) -> None:
    """Line 6: a call under such hooks saves what eager does, in the body of a marked function too, and has its gradients."""
    square = eager_on_graph(lambda x, w: (x.sin() * w).chunk(2))

    def model(x: Tensor, w: Tensor) -> Tensor:
        first, second = square(x.cos(), w)
        return first.exp() * second

    compiled = learned(torch.compile(model, backend="breakable_cg", options=options))
    saved: dict[Any, list[torch.Size]] = {compiled: [], model: []}
    gradients = []
    for function, (x, w) in zip((compiled, model), leaves(device, (4,), (4,)), strict=True):
        function(x, w)

        def pack(tensor: Tensor, shapes: list[torch.Size] = saved[function]) -> Tensor:
            shapes.append(tensor.shape)
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x, w)
        out.sum().backward()
        gradients.append([out.detach(), x.grad, w.grad])
    assert saved[compiled] == saved[model]
    assert_same(*gradients)


def test_a_parameter_among_the_arguments_twice(compile_with: Function, device: torch.device) -> None:
    """By its module, by itself, by another module: its gradient is counted once for each use."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        @eager_on_graph
        def mix(self, inner: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
            return inner(x) * 2 + x @ weight.t() + self.inner(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.inner, self.inner.weight, x * 2) + 1

    mine = Layer().to(device)
    theirs = copy.deepcopy(mine)
    x = torch.randn(2, 3, device=device)
    learned(compile_with(mine))(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert same_gradients(list(mine.parameters()), list(theirs.parameters()))


def test_fake_that_reads_values(compile_with: Function, device: torch.device) -> None:
    """A ``fake`` that cannot run on fake tensors is an error that names it, also where gradients are wanted."""

    @eager_on_graph(fake=lambda x: x * 2 if x.sum() > 0 else x)
    def host(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x

    ((x,),) = leaves(device, (4,), number=1)
    with pytest.raises(PartitionError, match=r"fake= of .*host cannot run on fake tensors"):
        compile_with(lambda x: host(x.sin()))(x)


def test_parametrized_modules(compile_with: Function, device: torch.device) -> None:
    """Modules that refuse to be copied, as those with weight norm do, are arguments like others."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

        @eager_on_graph
        def apply_inner(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.apply_inner(x * 2) + 1

    torch.manual_seed(0)
    mine = Layer().to(device)
    torch.manual_seed(0)
    theirs = Layer().to(device)
    x = torch.randn(2, 3, device=device)
    learned(compile_with(mine))(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert same_gradients(list(mine.parameters()), list(theirs.parameters()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it behind a break
@pytest.mark.parametrize("backend", ["breakable_cg", "eager", "aot_eager"])
def test_closures_without_fake_are_a_break(options: dict[str, Any], device: torch.device, backend: str) -> None:
    """Where a call has shown that a function needs gradients of what it closes over, calls are breaks, and the gradients right."""
    weight = torch.full((4,), 2.0, device=device, requires_grad=True)

    @eager_on_graph
    def scaled(x: Tensor) -> Tensor:
        return x * weight

    ours = {"options": options} if backend == "breakable_cg" else {}
    compiled = torch.compile(lambda x: scaled(x.sin()) * 2, backend=backend, **ours)
    for _ in range(4):
        x = torch.randn(4, device=device, requires_grad=True)
        compiled(x).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, x.detach().sin() * 2)
        weight.grad = None


def _clamp(grad: Tensor) -> Tensor:
    return grad.clamp(max=0.5)


def hooked(x: Tensor, seen: list[Any]) -> Tensor:
    """``x`` itself, whose gradient is changed."""
    x.register_hook(_clamp)
    return x


def hooked_in_part(x: Tensor, seen: list[Any]) -> Tensor:
    """Twice ``x``, whose whole gradient is changed."""
    x.register_hook(_clamp)
    return x * 2


def hooked_view(x: Tensor, seen: list[Any]) -> Tensor:
    """A view, whose gradient is changed."""
    y = x.view_as(x)
    y.register_hook(_clamp)
    return y


def retained(x: Tensor, seen: list[Any]) -> Tensor:
    """Twice ``x``, which retains its gradient."""
    x.retain_grad()
    seen.append(x)
    return x * 2


NOT_LEAVES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""Behind a graph break Dynamo asks each argument for it."""

WATCHING = [hooked, hooked_in_part, hooked_view, retained]


def kept(x: Tensor, seen: list[Any]) -> Tensor:
    """Twice ``x``, which is kept."""
    seen.append(x)
    return x * 2


def kept_result(x: Tensor, seen: list[Any]) -> Tensor:
    """A sum, of which one term is kept."""
    seen.append(x * 2)
    return seen[-1] + 1


def own_backward(x: Tensor, seen: list[Any]) -> Tensor:
    """Twice ``x``, to which a gradient came already."""
    (x * x).sum().backward(retain_graph=True)
    return x * 2


def watched(
    body: Callable[[Tensor, list[Any]], Tensor],
    since: int,
    device: torch.device,
    options: dict[str, Any],
    **kwargs: Any,
) -> tuple[int, list[str]]:
    """How many steps through a marked ``body``, which is one from call ``since`` on, are eager's; and the errors of others."""
    calls: list[int] = []
    seen: list[Any] = []

    def watch(x: Tensor) -> Tensor:
        calls.append(1)
        return body(x, seen) if len(calls) > since else x * 2

    def model(function: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight
        return function(y).sin() + y

    def step(function: Callable[[Tensor, Tensor], Tensor], number: int) -> list[Any]:
        seen.clear()
        torch.manual_seed(number)
        x, weight = torch.rand(2, 3, device=device).unbind()
        weight.requires_grad_()
        y = function(x, weight)
        of_kept = [2 * one.sum() for one in seen if body in (kept, kept_result)]
        torch.stack([3 * y.sum(), *of_kept]).sum().backward()
        return [y.detach(), weight.grad, *(one.grad for one in seen if body is retained)]

    marked = eager_on_graph(watch)
    compiled = torch.compile(
        lambda x, weight: model(marked, x, weight), options=options, backend="breakable_cg", **kwargs
    )
    right, told = 0, []
    for number in range(since + 6):
        before = len(calls)
        try:
            got = step(compiled, number)
        except EagerOutputError as error:
            told.append(str(error))
            continue
        del calls[before:]
        assert_same(got, step(lambda x, weight: model(watch, x, weight), number), f"step {number}")
        right += 1
    return right, told


@NOT_LEAVES
@pytest.mark.parametrize("body", WATCHING)
def test_arguments_whose_gradients_are_watched(body: Any, device: torch.device, options: dict[str, Any]) -> None:
    """A hook on an argument sees, and changes, its whole gradient, as in eager: such a call is a graph break."""
    assert watched(body, 0, device, options) == (6, [])
    torch.compiler.reset()
    with pytest.raises(PartitionError, match=r"cannot be one node: it .*(hook|gradient)"):
        watched(body, 0, device, options, fullgraph=True)


@NOT_LEAVES
@pytest.mark.parametrize("body", [hooked, hooked_in_part, hooked_view])
def test_arguments_that_a_later_call_watches(body: Any, device: torch.device, options: dict[str, Any]) -> None:
    """A function that registers a hook for the first time in any call is told in that call, and a break from then on."""
    right, told = watched(body, 4, device, options)
    assert (right, len(told)) == (9, 1)
    assert "hook" in told[0]


@NOT_LEAVES
@pytest.mark.parametrize("body", [kept, kept_result, own_backward])
@pytest.mark.parametrize("since", [0, 4])
def test_arguments_that_are_differentiated_elsewhere(
    since: int, body: Any, device: torch.device, options: dict[str, Any]
) -> None:
    """A gradient that reaches an argument by another way than the result is never lost: it is an error once, then right."""
    right, told = watched(body, since, device, options)
    assert right == since + 5
    (error,) = told
    assert "a gradient came to an argument otherwise than through what it returned" in error
