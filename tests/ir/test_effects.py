"""What an op reads, writes and returns: of plain ops, higher-order ops, user Triton kernels, collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._library.effects import EffectType

import silly
from breakable_backend import _torch
from breakable_backend.ir.effects import effective_ops, strays, written_arguments
from breakable_backend.marks.rules import marked
from checks import check, program_of
from graphs import SCOPE, Node, by_hand, cuda, fakes, last_call, sines, subgraph, t, trace

aten = torch.ops.aten
higher_order = torch.ops.higher_order

# --- what runs --------------------------------------------------------------------------------------------------------------


def label_of(op: Any) -> str:
    return op.name() if hasattr(op, "name") else op.__name__


def test_effective_ops_of_a_call() -> None:
    """An op runs itself."""
    assert list(effective_ops(last_call(sines, cuda(4)))) == [aten.sin.default]


def test_effective_ops_of_a_branch() -> None:
    """A branch runs what its bodies call, to any depth."""

    def inner(x: Tensor) -> Tensor:
        return torch.cond(aten.any.default(x), lambda t: silly.triple(t), lambda t: t.exp(), (x,))

    def outer(x: Tensor) -> Tensor:
        return torch.cond(aten.any.default(x), inner, lambda t: t.tanh(), (x,))

    node = last_call(outer, cuda(4))
    found = {label_of(op) for op in effective_ops(node)}
    assert {"cond", "silly::triple", "aten::exp", "aten::tanh"} <= found
    assert "which is tagged cudagraph_unsafe" in marked(node, SCOPE)


def test_effective_ops_of_a_subgraph() -> None:
    """A subgraph runs what its body calls."""
    node = subgraph(lambda x: silly.triple(x).sin(), cuda(4))
    assert [label_of(op) for op in effective_ops(node)] == ["invoke_subgraph", "silly::triple", "aten::sin"]


def test_effective_ops_of_a_wrapper() -> None:
    """A higher-order op that takes an op runs that op."""
    target = torch.ops.higher_order.auto_functionalized
    x, y = fakes(cuda(4), cuda(4))
    node = by_hand(target, silly.add_into.default, target=x, x=y, val=(None, x))
    assert silly.add_into.default in list(effective_ops(node))
    assert "silly.add_into" in marked(node, SCOPE)


@pytest.mark.parametrize(
    ("node", "written"),
    [
        (t(lambda x, y: aten.add_.Tensor(x, y), cuda(4), cuda(4)), ["x_1"]),
        (t(lambda x, y: aten.add.Tensor(x, y), cuda(4), cuda(4)), []),
        (t(lambda x, y: silly.add_into(x, y), cuda(4), cuda(4)), ["x_1"]),
        (t(lambda x, y: torch.add(x, x, out=y), cuda(4), cuda(4)), ["y_1"]),
        (t(lambda x, y: torch._foreach_add_([x, y], 1), cuda(4), cuda(4)), ["x_1", "y_1"]),
    ],
    ids=["in_place", "pure", "custom", "out", "foreach"],
)
def test_written_arguments(node: Node, written: list[str]) -> None:
    """What a call writes is what its schema says."""
    assert [argument.name for argument in written_arguments(node())] == written


# --- what is written ---------------------------------------------------------------------------------------------------------


def names(nodes: list[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


BODIES: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "reads": (lambda x, y: (x + y).add_(1), []),
    "writes one": (lambda x, y: (x.add_(y), x * 2)[1], [0]),
    "writes a view": (lambda x, y: (y.view(2, 2).mul_(2), x * 2)[1], [1]),
    "writes both": (lambda x, y: (x.add_(1), y.add_(x), x + y)[2], [0, 1]),
}


@pytest.mark.parametrize(("body", "written"), BODIES.values(), ids=BODIES)
def test_written_operands_of_a_region(body: Callable[..., Any], written: list[int]) -> None:
    """A region writes the operands that its body writes, or a view of: those that are only read are not written."""
    node = subgraph(body, cuda(4), cuda(4))
    assert written_arguments(node) == [node.args[2 + position] for position in written]


def test_written_operands_of_regions_in_regions() -> None:
    """What a region in a region writes is written by the outer one."""
    inner = trace(lambda a, b: (b.add_(a), a * 2)[1], cuda(4), cuda(4))
    values = fakes(cuda(4), cuda(4))
    body = by_hand(higher_order.invoke_subgraph, inner, "inner", *values, val=[values[0].clone()]).meta["owner"]
    node = by_hand(higher_order.invoke_subgraph, body, "outer", *values, val=[values[0].clone()])
    assert written_arguments(node) == [node.args[3]]


def operands_of(op: str, body: fx.GraphModule, *values: Tensor) -> tuple[Any, ...]:
    """The arguments of higher-order ops with a body that takes two tensors."""
    a, b = values
    return {
        "cond": (True, body, body, (a, b)),
        "while_loop": (body, body, (a,), (b,)),
        "scan": (body, [a], [b], ()),
        "map_impl": (body, [a], [b]),
    }[op]


@pytest.mark.parametrize("op", ["cond", "while_loop", "scan", "map_impl"])
def test_written_operands_of_control_flow(op: str) -> None:
    """Bodies of control flow take operands in their op's own order; one that is only read is not written."""
    body = trace(lambda x, y: (y.add_(x), x * 2)[1], cuda(4), cuda(4))
    values = fakes(cuda(4), cuda(4))
    node = by_hand(getattr(higher_order, op), *operands_of(op, body, *values), val=[values[0].clone()])
    _, second = (a for a in node.all_input_nodes if "val" in a.meta)
    assert written_arguments(node) == [second]


def test_written_operands_of_what_nobody_knows() -> None:
    """Of a higher-order op whose body writes, and whose operands nobody can tell, every tensor argument counts as written."""
    body = trace(lambda x, y: (y.add_(x), x * 2)[1], cuda(4), cuda(4))
    node = by_hand(higher_order.flex_attention, body, *fakes(cuda(4), cuda(4)))
    assert len(written_arguments(node)) == 2
    pure = by_hand(higher_order.flex_attention, trace(lambda x, y: x * y, cuda(4), cuda(4)), *fakes(cuda(4), cuda(4)))
    assert not written_arguments(pure)


def test_written_arguments_of_wrappers() -> None:
    """A wrapper that hands out copies writes nothing; one that orders an op writes what the op writes."""
    x, y = fakes(cuda(4), cuda(4))
    assert not written_arguments(by_hand(higher_order.auto_functionalized, silly.add_into.default, target=x, x=y))
    node = by_hand(higher_order.with_effects, None, silly.add_into.default, x, y)
    assert written_arguments(node) == [node.args[2]]
    leaf = by_hand(higher_order.invoke_leaf_function, None, None, None, "1", x, y)
    assert written_arguments(leaf) == [leaf.args[5]]


def triton_call(x: Tensor, y: Tensor) -> fx.Node:
    return by_hand(
        higher_order.triton_kernel_wrapper_mutation,
        kernel_idx=0,
        constant_args_idx=0,
        grid=[(1, 1, 1)],
        tma_descriptor_metadata={},
        kwargs={"source": x, "target": y, "n": 4},
    )


def test_written_arguments_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's Triton kernel writes what torch's analysis of its code finds; it is analysed once."""
    asked = []

    def written_by_kernel(*given: Any) -> list[str]:
        asked.append(given)
        return ["target"]

    monkeypatch.setattr(_torch, "written_by_kernel", written_by_kernel)
    node = triton_call(*fakes(cuda(4), cuda(4)))
    assert written_arguments(node) == written_arguments(node) == [node.kwargs["kwargs"]["target"]]  # type: ignore[index]
    ((kernel, constants, named, descriptors),) = asked
    assert (kernel, constants, descriptors) == (0, 0, {})
    assert {name: type(value).__name__ for name, value in named.items()} == {
        "source": "FakeTensor",
        "target": "FakeTensor",
        "n": "int",
    }


# --- programs ----------------------------------------------------------------------------------------------------------------


@torch.compiler.nested_compile_region
def region(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1)
    return y.sin()


def test_a_region_reads(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an argument that a region only reads is never written, not even with its own values."""
    compiled = torch.compile(lambda x: region(x) + region(x + 1), backend="breakable_cg", options=options)
    for _ in range(8):
        x = torch.randn(4, device=device)
        with torch.no_grad():
            assert torch.equal(compiled(x), (x * 2 + 1).sin() + ((x + 1) * 2 + 1).sin())
        assert x._version == 0


@torch.compiler.nested_compile_region
def writing_region(x: Tensor, y: Tensor) -> Tensor:
    y.view(-1).add_(1)
    return x * y


def reads_and_writes(x: Tensor, y: Tensor) -> Tensor:
    """A region that reads one argument and writes the other, twice."""
    return writing_region(x + 0, y) + writing_region(x, y) * silly.triple(y)


def writes_only(x: Tensor, y: Tensor) -> Tensor:
    """A region that is called for what it writes, and whose result nobody takes."""
    writing_region(x, y)
    writing_region(x, y)
    return silly.triple(x.sin()) + 1


@pytest.mark.parametrize("function", [reads_and_writes, writes_only], ids=lambda function: function.__name__)
def test_a_region_writes(function: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 5: an argument that a region writes is written each time, at the caller's storage, its result used or not."""
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for _ in range(12):
            x, y = torch.randn(2, 2, device=device), torch.randn(2, 2, device=device)
            mine, theirs = y.clone(), y.clone()
            assert torch.equal(compiled(x, mine), function(x, theirs))
            assert torch.equal(mine, theirs)
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert program.replays >= 3


def nested_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An op that returns a tensor and a list of two, before and after a break."""
    a, (b, c) = silly.split(x.sin() * 2)
    y = silly.triple(a + b)
    d, (e, f) = silly.split(y)
    return y + c, d, (e * f).add_(b)


@pytest.mark.parametrize("marked", [False, True], ids=["captured", "eager"])
def test_nested_results(marked: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: an op may return tensors and lists of tensors together, captured or not, and segments exchange each of them."""
    options = {**options, "eager_ops": ["silly::split"] if marked else []}
    counts = (3, 2) if marked else (2, 1)
    check(
        nested_results,
        lambda _: (torch.randn(3, device=device),),
        device=device,
        options=options,
        captured=counts[0],
        eager=counts[1],
    )


def seeds(q: Tensor) -> tuple[Tensor, ...]:
    """An op that returns a seed and an offset on the host, with something made of the seed."""
    out, _, seed, offset, *_ = aten._efficient_attention_forward(
        q * 1, q, q, None, None, None, None, None, 0.0, 0, False
    )
    return out + 1, seed, offset, seed.new_zeros(2)


def test_results_on_the_host() -> None:
    """An op that returns tensors on the host, whatever its fake says, runs eagerly where they are taken."""
    gm = trace(seeds, cuda(1, 8, 2, 16))
    found = {node.name for node in strays(gm.graph)}
    assert found == {"_efficient_attention_forward", "getitem_2", "getitem_3", "new_zeros"}
    only = trace(lambda q: seeds(q)[0], cuda(1, 8, 2, 16))
    only.graph.eliminate_dead_code()
    assert not strays(only.graph)


@pytest.mark.gpu
def test_results_on_the_host_of_a_gpu() -> None:
    """Line 9: they are where eager has them, and the rest is captured."""
    q = torch.randn(1, 8, 2, 16, device="cuda")
    compiled = torch.compile(seeds, backend="breakable_cg", options={"min_kernels": 1})
    with torch.no_grad():
        for _ in range(5):
            got, want = compiled(q), seeds(q)
            assert [tensor.device for tensor in got] == [tensor.device for tensor in want]
            assert torch.equal(got[0], want[0])
    assert program_of(compiled).replays == 3
    assert "on the host, off the capture device" in program_of(compiled).text


# --- what is known before the run ---------------------------------------------------------------------------------------------


@pytest.fixture
def late() -> Iterator[None]:
    """Dynamo traces ops whose size, or value, is known only at run time."""
    patch: Any = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with patch:
        yield


def equals(x: Tensor, n: Tensor) -> Tensor:
    """A value that is checked to be a constant."""
    k = n.item()
    torch._check(k == 3)
    return (x.sin() + k) * 2


def equals_a_size(x: Tensor, n: Tensor) -> Tensor:
    """A value that is checked to be a size of an argument."""
    k = n.item()
    torch._check(k == x.shape[0])
    return (x.sin() + k) * 2


def follows(x: Tensor, n: Tensor) -> Tensor:
    """A number that follows from a value, checked to be a constant."""
    k = n.item()
    torch._check(k * 2 == 6)
    return x.cos() * torch.ones(k, device=x.device) * 2


def between(x: Tensor, n: Tensor) -> Tensor:
    """A value between bounds that leave one."""
    k = n.item()
    torch._check(k > 2)
    torch._check(k < 4)
    return (x.sin() + k) * 2


def at_most(x: Tensor, n: Tensor) -> Tensor:
    """A value that is a length, within a size of an argument."""
    k = n.item()
    torch._check(k >= 0)
    torch._check(k <= x.shape[0])
    return x.sin()[:k] * 2


def counted(x: Tensor, n: Tensor) -> Tensor:
    """A size that hangs on values, checked to be a constant."""
    found = (torch.arange(5, device=x.device) < n).nonzero()
    torch._check(found.shape[0] == 3)
    return (found * 2 + x.sin().sum()).cos()


def asserted(x: Tensor, n: Tensor) -> Tensor:
    """An assertion on the device, without a text."""
    torch._assert_async((n == 3).all())
    return (x.sin() + 1) * 2


def asserted_in_words(x: Tensor, n: Tensor) -> Tensor:
    """An assertion on the device, with a text."""
    torch._assert_async((n == 3).all(), "not three")
    return (x.sin() + 1) * 2


CHECKS = [equals, equals_a_size, follows, between, at_most, counted]


def runs_then_raises(function: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> None:
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    said = r"assertion failed|single nonzero|not three"
    if torch.__version__.startswith("2.11"):
        said += r"|was compiled for"  # its AOTAutograd leaves no assertion about a size
    good, bad = torch.tensor([3], device=device), torch.tensor([4], device=device)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, device=device)
            assert torch.equal(compiled(x, good), function(x, good))
        for _ in range(2):
            with pytest.raises(RuntimeError):
                function(torch.randn(3, device=device), bad)
            with pytest.raises(RuntimeError, match=said):
                compiled(torch.randn(3, device=device), bad)
        x = torch.randn(3, device=device)
        assert torch.equal(compiled(x, good), function(x, good))


@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_checks(function: Callable[..., Any], late: None, device: torch.device, options: dict[str, Any]) -> None:
    """Line 8: a check of a value raises in each call where it fails, whatever a compiler learned from it."""
    runs_then_raises(function, device, options)


@pytest.mark.parametrize("function", [asserted, asserted_in_words], ids=lambda function: function.__name__)
def test_assertions(function: Callable[..., Any]) -> None:
    """Line 1: an assertion on the device is an effect, and happens once per call; a failed one would end the use of a GPU."""
    runs_then_raises(function, torch.device("cpu"), {"driver": "tape"})


noted: list[float] = []


@torch.library.custom_op("effects::note", mutates_args=())
def note(x: Tensor) -> None:
    """Keeps the value."""
    noted.append(float(x.sum()))


@note.register_fake
def _(x: Tensor) -> None:
    pass


def test_ops_without_a_result(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: an op that returns nothing is there for its effect, marked or not: it happens once per call."""

    def function(x: Tensor) -> Tensor:
        y = x.sin() * 2
        torch.ops.effects.note(y)
        return y + 1

    compiled = torch.compile(function, backend="breakable_cg", options={**options, "eager_ops": ["effects::note"]})
    noted.clear()
    values = [torch.randn(3, device=device) for _ in range(5)]
    with torch.no_grad():
        for x in values:
            compiled(x)
    assert noted == [float((x.sin() * 2).sum()) for x in values]
    torch.compiler.reset()
    unmarked = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        unmarked(values[0])
    assert "effects.note" in program_of(unmarked).text


counts: list[int] = []


@torch.library.custom_op("effects::counts", mutates_args=())
def counts_calls(x: Tensor) -> Tensor:
    """``x * 2``, and counts its calls."""
    counts.append(1)
    return x * 2


counts_calls.register_fake(torch.empty_like)
counts_calls.register_effect(EffectType.ORDERED)


@pytest.mark.parametrize("marked", [True, False])
def test_ops_registered_with_an_effect(device: torch.device, options: dict[str, Any], marked: bool) -> None:
    """Line 1: two results of a graph with ops that have a registered effect are eager's, and a marked op runs once per call."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.effects.counts(x.sin() + 1).cos()
        return y, torch.ops.effects.counts(y) + 1

    marks = {"eager_ops": ["effects::counts"]} if marked else {}
    compiled = torch.compile(function, backend="breakable_cg", options={**options, **marks})
    ran = []
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, device=device)
            want = function(x)
            counts.clear()
            assert all(map(torch.equal, compiled(x), want))
            ran.append(len(counts))
    assert ran == ([2, 2, 2, 2] if marked else [2, 2, 0, 0])
    assert program_of(compiled).replays >= 2
