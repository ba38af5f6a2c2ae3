"""The bits at the second door are eager's, also of ops whose C++ code asks whether a dispatch mode is active."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import checks
from breakable_backend import (
    BreakableCUDAGraph,
    CaptureError,
    capture,
    eager_on_graph,
    explain,
    mark_eager,
    unmark_eager,
)
from breakable_backend.ir.running_ops import OpMode
from doors import MakeGraph, shape_of


def bits(tree: Any) -> list[bytes]:
    return [checks.bits(tensor) for tensor in pytree.tree_leaves(tree)]


def symmetric(x: Tensor) -> Tensor:
    return x + x.mT


ASKING: dict[str, Callable[[Tensor], Any]] = {
    "svdvals": torch.linalg.svdvals,
    "eigvalsh": lambda x: torch.linalg.eigvalsh(symmetric(x)),
    "eigvals": torch.linalg.eigvals,
    "cond": torch.linalg.cond,
    "matrix_rank": torch.linalg.matrix_rank,
    "matrix_norm 2": lambda x: torch.linalg.matrix_norm(x, 2),
    "matrix_norm -2": lambda x: torch.linalg.matrix_norm(x, -2),
    "nuclear": lambda x: torch.linalg.norm(x, "nuc", dim=(-2, -1)),
    "method": lambda x: x.norm("nuc", dim=(-2, -1)),
    "one matrix and many": lambda x: torch.matmul(x[:1], x),
    "many matrices and one": lambda x: torch.matmul(x, x[:1]),
    "into out=": lambda x: torch.matmul(x[:1], x, out=torch.empty_like(x)),
    "rank into out=": lambda x: torch.linalg.matrix_rank(
        x, out=torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    ),
}
"""Functions that call such an op. Each takes a batch of square matrices."""


@pytest.fixture
def matrices(device: torch.device) -> Tensor:
    return torch.randn(3, 33, 33, generator=torch.Generator().manual_seed(0)).to(device)


MODES = [torch.no_grad, torch.enable_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ASKING)
def test_ops_that_ask_for_modes(
    name: str, mode: Callable[[], AbstractContextManager[Any]], matrices: Tensor, make: MakeGraph
) -> None:
    """In the capture and in replays they have eager's bits, in a marked function as in the body."""
    function = ASKING[name]
    marked = eager_on_graph(lambda x: function(x).clone())
    with mode():
        given = matrices.clone()
        graph = make()
        with capture(graph):
            plain, inside = function(given), marked(given)
        for number in range(3):
            want = bits(function(given))
            assert bits(plain) == want and bits(inside) == want
            given.copy_(matrices.flip(number % 3) * (number + 1))
            graph.replay()
        assert bits(plain) == bits(function(given))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_marks_of_ops_that_ask(
    mode: Callable[[], AbstractContextManager[Any]], matrices: Tensor, make: MakeGraph
) -> None:
    """Such an op is an eager step as a whole if it is marked."""
    mark_eager("aten::matmul")
    try:
        with mode():
            graph = make()
            with capture(graph):
                y = torch.matmul(matrices[:1] * 2, matrices) + 1
            graph.replay()
            assert bits(y) == bits(torch.matmul(matrices[:1] * 2, matrices) + 1)
    finally:
        unmark_eager("aten::matmul")
    assert shape_of(graph) == "GEG" and "marked by mark_eager" in str(explain(graph))


def test_marks_in_captures_of_two_threads() -> None:
    """Each of two captures that overlap sees the marked ops of its own body, whichever of them ends first."""
    graphs = [BreakableCUDAGraph(driver="tape") for _ in range(2)]
    inside, ended = (threading.Barrier(2) for _ in range(2))
    wrong: list[Any] = []

    def work(number: int) -> None:
        x = torch.randn(3, 3, generator=torch.Generator().manual_seed(number))
        try:
            with torch.no_grad(), capture(graphs[number]):
                inside.wait(30)
                y = torch.matmul(x, x) + 1
                if number == 1:
                    ended.wait(30)
                y = torch.matmul(y, x) + 1
            if number == 0:
                ended.wait(30)
            x.mul_(2)
            graphs[number].replay()
            if not torch.equal(y, torch.matmul(torch.matmul(x, x) + 1, x) + 1):
                wrong.append(number)
        except Exception as error:  # noqa: BLE001 - the main thread asserts that there are none
            wrong.append(error)

    mark_eager("aten::matmul")
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        unmark_eager("aten::matmul")
    assert wrong == []
    assert [shape_of(graph) for graph in graphs] == ["GEGEG", "GEGEG"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_comes_first(dtype: torch.dtype, matrices: Tensor, make: MakeGraph) -> None:
    """Such an op casts its arguments as in eager."""
    given = matrices.to(dtype)

    def function() -> tuple[Tensor, ...]:
        products = torch.matmul(given[:1], given), torch.matmul(given, given)
        on_host = given.device.type == "cpu" or dtype is torch.float32
        return (*products, torch.linalg.svdvals(given)) if on_host else products

    with torch.no_grad(), torch.autocast(given.device.type, dtype=torch.bfloat16):
        want = function()
        graph = make()
        with capture(graph):
            got = function()
    assert [result.dtype for result in got] == [result.dtype for result in want]
    assert bits(got) == bits(want)
    graph.replay()
    assert bits(got) == bits(want)


def test_gradients_of_ops_that_ask(matrices: Tensor, make: MakeGraph) -> None:
    """Under grad mode they have eager's gradients."""
    leaf = matrices.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = torch.linalg.svdvals(leaf).sum() + torch.linalg.eigvalsh(symmetric(leaf)).prod(0).sum()
        return loss.detach(), *torch.autograd.grad(loss + torch.matmul(leaf[:1], leaf).sum(), leaf)

    want = step()
    graph = make()
    with capture(graph):
        got = step()
    assert bits(got) == bits(want)
    with torch.no_grad():
        leaf.copy_(matrices.flip(0))
    graph.replay()
    assert bits(got) == bits(step())


OTHERWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "prod": lambda x, _: x.prod(),
    "prod of a dimension": lambda x, _: x.prod(1).sum(),
    "cumprod": lambda x, _: x.cumprod(1).sum(),
    "masked_fill": lambda x, value: x.masked_fill(x > 0, value).sum(),
    "max": lambda x, _: x.max(),
    "min": lambda x, _: x.min(),
    "median": lambda x, _: x.median(),
    "nanmedian": lambda x, _: x.nanmedian(),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_gradients_by_another_formula(name: str, device: torch.device, make: MakeGraph) -> None:
    """If autograd would compute the gradient of an op by another formula in a capture, the op and its gradient are eager steps."""
    function = OTHERWISE[name]
    values = torch.randn(30, 30, generator=torch.Generator().manual_seed(1)).to(device)
    leaf, value = values.clone().requires_grad_(), torch.ones((), device=device, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(function(leaf * 1.5, value * 2), (leaf, value), allow_unused=True)
        return tuple(grad for grad in grads if grad is not None)

    want = step()
    graph = make()
    with capture(graph):
        got = step()
    assert bits(got) == bits(want)
    for number in range(2):
        with torch.no_grad():
            leaf.copy_(values.roll(number + 1, 0))
        graph.replay()
        assert bits(got) == bits(step())
    eager = "another formula" in str(explain(graph))
    assert eager or (device.type == "cuda" and name in ("max", "min", "median", "nanmedian"))


def test_no_break_without_gradients(make: MakeGraph, device: torch.device) -> None:
    """Where no gradient is asked for such an op is captured, also in grad mode."""
    graph, x = make(), torch.randn(4, 4, device=device)
    with capture(graph):
        y = x.prod(1) + x.cumprod(0).sum(0) + x.masked_fill(x > 0, 1.0).max()
    assert shape_of(graph) == "G"
    graph.replay()
    assert bits(y) == bits(x.prod(1) + x.cumprod(0).sum(0) + x.masked_fill(x > 0, 1.0).max())


def test_other_modes_are_as_before(matrices: Tensor) -> None:
    """Under modes of others these ops call what they called before, and so do the graphs that are traced."""
    counted, traced = [], []
    for _ in range(2):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.matmul(matrices[:1], matrices)
            torch.linalg.svdvals(matrices)
        counted.append(counter.get_flop_counts())
        for tracing in ("fake", "symbolic", "real"):
            for function in (torch.linalg.svdvals, torch.linalg.cond, lambda x: torch.matmul(x[:1], x), torch.prod):
                with torch.no_grad():
                    traced.append(make_fx(function, tracing_mode=tracing)(matrices).code)
        with OpMode(lambda op, args, kwargs: op(*args, **kwargs)):
            torch.linalg.svdvals(matrices)
    half = len(traced) // 2
    assert counted[0] == counted[1] and traced[:half] == traced[half:]


def test_under_a_mode_of_the_user(matrices: Tensor, make: MakeGraph) -> None:
    """A mode of the user's changes these ops in a capture as it does in eager."""

    class Looking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Looking():
        want = torch.linalg.svdvals(matrices)
    graph = make()
    with torch.no_grad(), capture(graph), Looking():
        got = torch.linalg.svdvals(matrices)
    assert bits(got) == bits(want)


def test_compiled_functions_are_not_compiled_again(device: torch.device, make: MakeGraph) -> None:
    """A function that was compiled in one body is used in the next."""
    counter = CompileCounter()
    compiled = torch.compile(lambda x: torch.matmul(x[:1], x), backend=counter)
    x = torch.randn(3, 5, 5, device=device)
    with torch.no_grad():
        for _ in range(2):
            with capture(make()):
                compiled(x)
    assert counter.frame_count == 1


def test_eager_steps_see_no_mode(device: torch.device, make: MakeGraph) -> None:
    """In the capture a marked function runs without the modes of this package, and with the caller's."""
    seen: list[list[str]] = []

    class Callers(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    @eager_on_graph
    def look(x: Tensor) -> Tensor:
        seen.append([type(mode).__name__ for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack()])
        return x + 1

    x, graph = torch.zeros(2, device=device), make()
    with torch.no_grad(), Callers():
        with capture(graph):
            y = look(x * 2) * 3
        graph.replay()
    assert seen == [["Callers"], ["Callers"]]
    assert bits(y) == bits(torch.full((2,), 3.0, device=device))


def test_memory_beside_a_result(device: torch.device, make: MakeGraph) -> None:
    """An op that reaches what an eager step's result has beside its elements is an error; within them it is captured."""

    @eager_on_graph
    def every_second(x: Tensor, begin: int) -> Tensor:
        return (x + 1)[begin::2]

    @eager_on_graph
    def behind(x: Tensor) -> Tensor:
        return (x + 1)[4:]

    x = torch.arange(12.0, device=device)
    with torch.no_grad():
        for offset in (None, 2):
            with pytest.raises(CaptureError, match="around the result of an eager step"), capture(make()):
                every_second(x, 1).as_strided((2, 2), (1, 2), offset)
        with pytest.raises(CaptureError, match="around the result of an eager step"), capture(make()):
            behind(x).as_strided((2, 2), (1, 2), 2)
        graph = make()
        with capture(graph):
            y = behind(x).as_strided((2, 2), (1, 2))
            y = y + every_second(x, 0).contiguous().as_strided((2, 2), (1, 2), 2)
        x += 5
        graph.replay()
        assert bits(y) == bits(
            behind(x).as_strided((2, 2), (1, 2)) + every_second(x, 0).contiguous().as_strided((2, 2), (1, 2), 2)
        )


def test_a_result_that_is_resized(device: torch.device, make: MakeGraph) -> None:
    """An op that resizes the result of an eager step is an error that says so."""
    x, many = torch.ones(1, device=device), torch.ones(2, 5, 5, device=device)
    plain = eager_on_graph(lambda x: x + 1)
    with torch.no_grad(), pytest.raises(CaptureError, match="was resized, and its memory belongs to the graph"):
        with capture(make()):
            plain(x).addbmm_(many, many)


def test_a_tensor_that_gets_other_memory(device: torch.device, make: MakeGraph) -> None:
    """An op that gives other memory to a tensor from outside is an error; to one of the body a GPU captures it."""
    x, many = torch.ones(1, device=device), torch.ones(2, 5, 5, device=device)
    with torch.no_grad():
        with pytest.raises(CaptureError, match="gives other memory to a tensor from outside"), capture(make()):
            x.addbmm_(many, many)
        if device.type == "cpu":
            return
        x, graph = torch.ones(1, device=device), make()
        with capture(graph):
            grown = (x * 2).addbmm_(many, many)
            result = eager_on_graph(lambda x: x + 1)(grown) + grown
        x += 1
        graph.replay()
        assert bits(result) == bits((x * 2).addbmm_(many, many) * 2 + 1)


def test_numbers_that_are_read_on_the_host(device: torch.device, make: MakeGraph) -> None:
    """An op that reads a number from the device is an eager step."""
    x, value, graph = torch.randn(4, 4, device=device), torch.ones((), device=device), make()
    with torch.no_grad():
        with capture(graph):
            y = (x * 2).masked_fill(x > 0, value) + 1
        value += 1
        graph.replay()
        assert bits(y) == bits((x * 2).masked_fill(x > 0, value) + 1)
    assert shape_of(graph) == "GEG" and "reads its argument 'value' on the host" in str(explain(graph))


def test_host_data_in_the_body(device: torch.device, make: MakeGraph) -> None:
    """A literal that is copied to the device is an error of this package's on a GPU, with a way out; the tape captures it."""
    graph = make()
    refused = pytest.raises(CaptureError, match=r"during CUDA graph capture[^@]*@eager_on_graph")
    with refused if device.type == "cuda" else nullcontext():
        with torch.no_grad(), capture(graph):
            y = torch.tensor([1.0, 2.0], device=device) * 2
        graph.replay()
        assert y.tolist() == [2.0, 4.0]


def test_a_tensor_from_outside_keeps_its_shape(device: torch.device, make: MakeGraph) -> None:
    """An op that changes the shape of a tensor from outside in place is an error, unless another one undoes that."""
    x = torch.randn(2, 3, device=device)
    changes = (Tensor.t_, lambda x: x.unsqueeze_(0), lambda x: x.transpose_(0, 1))
    with torch.no_grad():
        for change in changes:
            with pytest.raises(CaptureError, match="changes the shape or the strides of a tensor from outside"):
                with capture(make()):
                    change(x)
            x = torch.randn(2, 3, device=device)
        graph = make()
        with capture(graph):
            mine, view, same = (x + 1).t_(), x.view_as(x).t_(), x.unsqueeze_(0).squeeze_(0)
            result = mine * 2 + view
        x += 1
        graph.replay()
        assert same is x and bits(result) == bits((x + 1).t() * 2 + x.t())


def test_a_tensor_that_is_passed_twice(device: torch.device, make: MakeGraph) -> None:
    """It is one object in a replay too: for an eager step, and for an op, as for attention of a tensor to itself."""
    attention = torch.nn.MultiheadAttention(4, 2, batch_first=True, device=device).eval()
    seen: list[bool] = []

    @eager_on_graph
    def look(query: Tensor, key: Tensor, other: Tensor, *, value: Tensor) -> Tensor:
        seen.append(query is key is value and query is not other)
        return query + other

    x, graph = torch.randn(2, 3, 4, device=device), make()

    def function() -> Tensor:
        y = x * 2
        z = look(y, y, y.view_as(y), value=y)
        return attention(z, z, z, need_weights=False)[0] + attention(x, x, x, need_weights=False)[0]

    with torch.no_grad():
        want = function()
        with capture(graph):
            got = function()
        assert bits(got) == bits(want)
        x += 1
        graph.replay()
        assert bits(got) == bits(function())
    assert seen == [True] * 4


def test_zeros_without_memory(device: torch.device, make: MakeGraph) -> None:
    """A gradient of zeros, for which autograd has no memory, is captured on a GPU; the tape refuses it."""
    x, graph = torch.randn(3, device=device, requires_grad=True), make()
    with pytest.raises(CaptureError, match="_efficientzerotensor") if device.type == "cpu" else nullcontext():
        with capture(graph):
            y = x * 2
            (grad,) = torch.autograd.grad(torch.sgn(x).sum(), x)
        graph.replay()
        assert not grad.any() and bits(y) == bits(x * 2)
