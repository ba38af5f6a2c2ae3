"""Lowering: what survives AOTAutograd, what it may not do, and what is written down before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import _side_effectful_functions

import silly
from breakable_backend import _torch, mark_eager, unmark_eager
from breakable_backend.compiling.lowering import CannotLower, Lowered, lower, needs_gradients
from breakable_backend.ir.ambient_modes import Modes, ambient_of
from breakable_backend.ir.effects import schema_name
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.marking import REGION_KEY, EagerOps

BF16 = ("cpu", torch.bfloat16, True)
F16 = ("cpu", torch.float16, True)


def lowered(function: Callable[..., Any], *args: Any, eager_ops: Sequence[Any] = ()) -> Lowered:
    """What ``function`` is lowered to, on its way through Dynamo."""
    found: list[Lowered] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def compile_lowered(result: Lowered) -> Callable[[list[Any]], Any]:
            found.append(result)
            return lambda values: list(result.module(*values))

        return lower(gm, inputs, compile_lowered, EagerOps.resolve(eager_ops))

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    (result,) = found
    return result


def ops(result: Lowered) -> list[str]:
    """The ops of the lowered graph, in order."""
    return [schema_name(node) for node in result.module.graph.nodes if schema_name(node)]


def ambients(result: Lowered) -> list[Modes | None]:
    """The states noted for the calls of ``silly::marked_product``, in order."""
    nodes = result.module.graph.find_nodes(op="call_function", target=torch.ops.silly.marked_product.default)
    return [ambient_of(node) for node in nodes]


X = torch.rand(4, 4)


# --- what survives --------------------------------------------------------------------------------------------------------


def test_unused_marked_call() -> None:
    """A tagged op whose result nobody uses survives, at its place; an op without effects does not."""

    def f(x: Tensor) -> Tensor:
        x.cos()
        silly.triple(x.sin())
        return x + 1

    assert ops(lowered(f, X)) == ["aten::sin", "silly::triple", "aten::add"]


def test_unused_call_marked_by_name() -> None:
    """An op marked by ``mark_eager`` survives while it is marked."""

    def f(x: Tensor) -> Tensor:
        silly.double(x)
        return x + 1

    mark_eager("silly::double")
    try:
        assert ops(lowered(f, X)) == ["silly::double", "aten::add"]
    finally:
        unmark_eager("silly::double")
    torch.compiler.reset()
    assert ops(lowered(f, X)) == ["aten::add"]


@pytest.mark.parametrize("mark", ["silly::double", silly.double, silly.double.default], ids=str)
def test_unused_call_named_in_eager_ops(mark: Any) -> None:
    """An op named in ``eager_ops`` survives, in this function."""

    def f(x: Tensor) -> Tensor:
        silly.double(x)
        return x + 1

    assert ops(lowered(f, X, eager_ops=[mark])) == ["silly::double", "aten::add"]


@pytest.mark.parametrize(
    ("draw", "op"),
    [
        (lambda x: torch.rand(3), "aten::rand"),
        (lambda x: torch.randn_like(x), "aten::randn_like"),
        (lambda x: torch.bernoulli(x), "aten::bernoulli"),
        (lambda x: torch.nn.functional.dropout(x), ""),
        (lambda x: torch.randperm(4), "aten::randperm"),
        (lambda x: torch.multinomial(x, 1), "aten::multinomial"),
    ],
    ids=["rand", "randn_like", "bernoulli", "dropout", "randperm", "multinomial"],
)
def test_unused_draw(draw: Callable[[Tensor], Tensor], op: str) -> None:
    """A random draw whose result nobody uses survives: it moves the generator."""

    def f(x: Tensor) -> Tensor:
        draw(x)
        return x + 1

    found = ops(lowered(f, X))
    assert found[-1] == "aten::add"
    assert len(found) >= 2
    assert op in (*found, "")


def test_side_effects_are_undone() -> None:
    """What keeps marked ops alive is in force only while a graph is lowered."""
    before = set(_side_effectful_functions)
    lowered(lambda x: (silly.triple(x), x + 1)[1], X)
    assert set(_side_effectful_functions) == before


def test_kernels_are_put_back() -> None:
    """Decompositions that are taken away while a graph is lowered are back afterwards."""
    op = torch.ops.aten.native_batch_norm.default
    before = dict(op.py_kernels)
    norm = nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        lowered(norm.forward, X)
    assert dict(op.py_kernels) == before


def test_kernels_of_ops_that_were_asked_for_later() -> None:
    """No op of aten has a decomposition while something is traced, whenever Python registered it."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    keys = (torch._C.DispatchKey.Autograd, composite)

    def decomposed() -> set[Any]:
        overloads = [getattr(packet, name) for packet in aten_packets() for name in packet.overloads()]
        return {op for op in overloads for key in op.py_kernels if key in keys}

    def aten_packets() -> list[Any]:
        return [value for value in vars(torch.ops.aten).values() if isinstance(value, torch._ops.OpOverloadPacket)]

    with _torch.tracing_both_halves((), {}):
        replaced = decomposed()
    assert not {op for op in replaced if "linalg" not in op.name() and "matmul" not in op.name()}
    with torch.library._scoped_library("aten", "FRAGMENT") as library:
        library.define("asked_for_later(Tensor x) -> Tensor")
        op = torch.ops.aten.asked_for_later.default
        op.py_impl(composite)(torch.neg)
        assert op in decomposed()
        with _torch.tracing_both_halves((), {}):
            assert decomposed() == replaced
        assert op in decomposed()


def assert_the_products_of_eager(function: Callable[..., Tensor], *args: Tensor) -> None:
    """Without gradients ``function`` calls the same kinds of products in its graph as in eager."""
    products = {"aten::mm", "aten::bmm"}
    with torch.no_grad():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            function(*args)
        found = ops(lowered(function, *args))
    assert products.intersection(found) == products.intersection(event.name for event in profile.events())


MATMULS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.matmul,
    lambda left, right: torch.matmul(left, right, out=left.new_empty(4, 3, 3)),
)


@pytest.mark.parametrize("matmul", MATMULS, ids=["matmul", "out"])
@pytest.mark.parametrize("grads", [(False, False), (True, False), (False, True)], ids=["none", "left", "right"])
@pytest.mark.parametrize("batches", [(4, 1), (1, 4), (4, 4)], ids=["4x1", "1x4", "4x4"])
def test_products_of_batches(
    matmul: Callable[[Tensor, Tensor], Tensor], grads: tuple[bool, bool], batches: tuple[int, int]
) -> None:
    """A product of batches calls the op that eager calls, so it rounds alike: one of batches, or one large product."""
    left, right = (torch.randn(batch, 3, 3, requires_grad=grad) for batch, grad in zip(batches, grads, strict=True))
    assert_the_products_of_eager(matmul, left, right)


def one_token(x: Tensor, weight: Tensor) -> Tensor:
    """What stands behind the attention of one token."""
    return nn.functional.linear(x.transpose(1, 2).flatten(2), weight)


@pytest.mark.parametrize(
    "shape", [(2, 4, 1, 8), (1, 4, 1, 8), (2, 4, 3, 8), (1, 4, 3, 8), (2, 1, 3, 32), (2, 1, 1, 32)]
)
@pytest.mark.parametrize(
    "function",
    [
        one_token,
        lambda x, weight: one_token(x.relu(), weight),
        lambda x, weight: one_token(x.transpose(1, 2).contiguous().transpose(1, 2), weight),
        lambda x, weight: one_token(x.expand(2, *x.shape)[1], weight),
        lambda x, weight: nn.functional.linear(x.flatten(1)[:, None].expand(-1, 2, -1)[:, :1], x.new_ones(5, x[0].numel())),
        lambda x, weight: torch.matmul(x.transpose(1, 2).reshape(2, -1, 1, 32) if x.numel() % 64 == 0 else x[..., :1], x.new_ones(32 if x.numel() % 64 == 0 else 1, 2)),
    ],
    ids=["attention", "relu", "made contiguous", "expanded", "sliced", "four dimensions"],
)  # fmt: skip
def test_products_of_one_row(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """A product whose rows have a dimension of size 1 calls the op that eager calls, whatever strides a fake has there."""
    x, weight = torch.randn(shape), torch.randn(32, 32)
    assert_the_products_of_eager(function, x, weight)


@pytest.mark.parametrize("needs", [False, True], ids=["plain", "needs a gradient"])
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
@pytest.mark.parametrize("shape", [(6, 1, 4), (2, 3, 1, 4), (3, 2, 4), (1, 6, 4), (1, 1, 24)], ids=str)
def test_products_of_views_with_a_matrix(shape: tuple[int, ...], turned: bool, needs: bool) -> None:
    """Whether a view is one matrix to eager, or is a batch for which the other matrix is repeated, it is so in the graph."""

    def function(x: Tensor, weight: Tensor) -> Tensor:
        rows = x[..., None].permute(1, 0, 3, 2) if len(shape) == 4 else x.view(4, 6, 1).permute(1, 2, 0)
        if shape[-1] == 24:
            rows = x.view(24, 1).t()
        view = rows.view(shape)
        return torch.matmul(view.transpose(0, 1) if turned else view, weight)

    x, weight = torch.randn(3, 2, 4), nn.Parameter(torch.randn(shape[-1], 5), requires_grad=needs)
    assert_the_products_of_eager(function, x, weight)


def test_product_with_a_part_of_a_parameter() -> None:
    """With gradients off what is computed from a parameter needs none: a batch of one of them is no large matrix."""
    weight = nn.Parameter(torch.randn(1, 5, 3))

    def f(x: Tensor) -> Tensor:
        return torch.matmul(x, nn.functional.pad(weight, [0, 0, 1, 1])[:, 1:5])

    with torch.no_grad():
        assert "aten::bmm" in ops(lowered(f, torch.randn(4, 3, 4)))


def test_mutation_stays_at_its_place() -> None:
    """Writes are in place and in program order: no functional wrapper, no write-back at the end."""

    def f(x: Tensor) -> Tensor:
        x.add_(1)
        silly.add_into(x, x * 2)
        x.view(-1)[2:].mul_(3)
        return x.sum()

    found = [name for name in ops(lowered(f, X.clone())) if name not in ("aten::view", "aten::slice")]
    assert found == ["aten::add_", "aten::mul", "silly::add_into", "aten::mul_", "aten::sum"]


def test_source_lines_survive() -> None:
    """Each ATen node knows the user's line."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return silly.triple(y)  # this line

    (node,) = lowered(f, X).module.graph.find_nodes(op="call_function", target=silly.triple.default)
    lines, first = inspect.getsourcelines(f)
    number = first + next(i for i, line in enumerate(lines) if "# this line" in line)
    assert source_line(node).startswith(f"{__file__}:{number} in f: return silly.triple(y)")


def test_torch_functions_in_eager_ops() -> None:
    """Every ATen op that a named torch function becomes is under a region."""

    def f(x: Tensor) -> Tensor:
        return nn.functional.gelu(x.sin()).cos()

    nodes = lowered(f, X, eager_ops=[nn.functional.gelu, torch.Tensor.cos]).module.graph.find_nodes
    regions = {
        name: REGION_KEY in node.meta.get("custom", {})
        for name in ("sin", "gelu", "cos")
        for node in nodes(op="call_function", target=getattr(torch.ops.aten, name).default)
    }
    assert regions == {"sin": False, "gelu": True, "cos": True}


# --- static inputs ----------------------------------------------------------------------------------------------------------


def test_static_inputs() -> None:
    """Parameters, buffers and tensors marked static are static inputs; arguments are not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 4))
            self.register_buffer("table", torch.rand(4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ self.weight + self.table + y

    marked = torch.rand(4, 4)
    torch._dynamo.mark_static_address(marked)
    with torch.no_grad():
        result = lowered(Model(), X, marked)
    values = [node.meta["val"] for node in result.module.graph.find_nodes(op="placeholder")]
    static = [tuple(value.shape) for position, value in enumerate(values) if position in result.static]
    assert sorted(static) == [(4,), (4, 4), (4, 4)]
    assert len(values) == 4


# --- ambient state ----------------------------------------------------------------------------------------------------------


def test_ambient_of_nothing() -> None:
    """Under no autocast and no grad nothing is noted."""
    with torch.no_grad():
        assert ambients(lowered(silly.marked_product, X, X)) == [None]


def test_ambient_autocast() -> None:
    """An opaque op keeps the autocast that is traced around it; nested ones replace it, and end with their block."""

    def f(x: Tensor) -> Tensor:
        total = silly.marked_product(x, x).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = total + silly.marked_product(x, x)
            with torch.autocast("cpu", enabled=False):
                total = total + silly.marked_product(x, x)
            with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
                total = total + silly.marked_product(x, x)
            total = total + silly.marked_product(x, x)
        return total + silly.marked_product(x, x)

    with torch.no_grad():
        assert ambients(lowered(f, X)) == [
            None,
            Modes((BF16,)),
            None,
            Modes((("cpu", torch.float16, False),)),
            Modes((BF16,)),
            None,
        ]


def test_ambient_autocast_of_the_caller() -> None:
    """An opaque op keeps the autocast that the caller has around the compiled call."""

    def f(x: Tensor) -> Tensor:
        total = silly.marked_product(x, x)
        with torch.autocast("cpu", enabled=False):
            total = total + silly.marked_product(x, x)
        with torch.autocast("cpu", dtype=torch.float16):
            return total + silly.marked_product(x, x)

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ambients(lowered(f, X)) == [Modes((BF16,)), None, Modes((F16,))]


def test_ambient_grad_mode() -> None:
    """An opaque op keeps the grad mode that is traced around it, also where no output needs a gradient."""

    def f(x: Tensor) -> Tensor:
        total = silly.marked_product(x, x)
        with torch.no_grad():
            total = total + silly.marked_product(x, x)
        with torch.enable_grad():
            return total + silly.marked_product(x, x)

    assert ambients(lowered(f, X)) == [Modes(grad=True), None, Modes(grad=True)]
    torch.compiler.reset()
    with torch.no_grad():
        assert ambients(lowered(f, X)) == [None, None, Modes(grad=True)]


def test_ambient_both() -> None:
    """Autocast and grad mode are noted together."""

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return silly.marked_product(x, x)

    assert ambients(lowered(f, X)) == [Modes((BF16,), grad=True)]


def test_ambient_of_torch_ops() -> None:
    """Torch's own ops need no note: their casts are in the graph."""

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    result = lowered(f, X)
    assert ops(result).count("aten::_to_copy") >= 1
    assert {ambient_of(node) for node in result.module.graph.nodes} == {None}


def test_ambient_enter() -> None:
    """An ambient state is in force inside its block, and as before behind it, also after an error."""
    ambient = Modes((BF16,), grad=True)
    with torch.no_grad():
        with pytest.raises(KeyError), ambient.enter():
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") is torch.bfloat16
            assert torch.is_grad_enabled()
            raise KeyError
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


def test_ambient_around() -> None:
    """A function in an ambient state is called in it, under a name that generated code can hold."""
    function = Modes((BF16,)).around(torch.mm)
    assert function.__name__.isidentifier()
    assert function(X, X).dtype is torch.bfloat16


# --- gradients --------------------------------------------------------------------------------------------------------------


def test_needs_gradients() -> None:
    """A graph with an output that needs a gradient is refused, unless grad mode is off."""
    weight = torch.rand(4, 4, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return x @ weight

    with pytest.raises(CannotLower):
        _raising(f, X)
    torch.compiler.reset()
    with torch.no_grad():
        assert ops(lowered(f, X))


def test_no_output_needs_gradients() -> None:
    """A graph whose outputs need no gradient is an inference graph, although a parameter requires one."""
    weight = torch.rand(4, 4, requires_grad=True)
    assert ops(lowered(lambda x: (x @ weight).detach().sum(), X))
    assert ops(lowered(lambda x: (x @ weight).argmax(), X))


def test_needs_gradients_asks_dynamo() -> None:
    """Whether a graph needs gradients is read off the fake outputs and the grad mode of the moment."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = torch.rand(2, requires_grad=True)
    graph.output((node,))
    gm = fx.GraphModule({}, graph)
    assert needs_gradients(gm)
    with torch.no_grad():
        assert not needs_gradients(gm)


def _raising(function: Callable[..., Any], *args: Any) -> None:
    """Lower, and raise what ``lower`` raised and not what Dynamo makes of it."""
    caught: list[Exception] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return lower(gm, inputs, lambda result: result.module, EagerOps())
        except CannotLower as error:
            caught.append(error)
            return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    for error in caught:
        raise error


def test_python_implementation_is_the_users() -> None:
    """The direct function of a custom op is the one that its author wrote, for the device asked for."""
    found = _torch.python_implementation(torch.ops.silly.attention.default, "cpu")
    assert found is not None
    assert found.__name__ == "attention"
    assert torch.equal(found(X, X, X), X + X + X)
    assert _torch.python_implementation(torch.ops.silly.triple.default, "cpu") is None
