"""Inputs that are not plain tensors: nested tensors, subclasses, lists and dicts of tensors, layouts without strides."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

import silly
from breakable_backend import breakable_cg, explain
from checks import assert_same, check, compile_both, program_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    # compiled autograd reads it
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

WEIGHT = torch.rand(8, 8)


def attention(ragged: Tensor) -> Tensor:
    """Attention over rows of several lengths."""
    heads = (ragged * 2).unflatten(-1, [2, 4]).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(-2)


RAGGED: dict[str, Callable[[Tensor], Any]] = {
    "pointwise": lambda ragged: torch.sigmoid(ragged) * 2,
    "linear": lambda ragged: nn.functional.linear(ragged, WEIGHT.to(ragged.device)).relu() + 1,
    "reduction": lambda ragged: ragged.sum(dim=1) * 2,
    "padded": lambda ragged: torch.nested.to_padded_tensor(ragged * 2, 0.0) + 1,
    "size": lambda ragged: (ragged * 2, ragged.size(1)),
    "attention": attention,
    "parts": lambda ragged: [row * 2 for row in ragged.unbind()],
}


def plain(result: Any) -> list[Any]:
    """The tensors of a result, nested ones and subclasses taken apart; and whether a number is that of a ragged dimension."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, TwoTensor):
            found += [leaf.a, leaf.b]
        elif isinstance(leaf, Tensor) and leaf.is_nested:
            found += [leaf.values(), leaf.offsets()]
        else:
            found.append("ragged" if isinstance(leaf, torch.SymInt) else leaf)
    return found


@pytest.mark.parametrize("case", RAGGED)
def test_jagged_nested_tensors(case: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 9: jagged nested tensors are as in eager, and captured: what stands for their lengths is in no key."""
    compiled, eager = compile_both(RAGGED[case], options)
    with torch.no_grad():
        for call in range(8):
            rows = [torch.rand(2, 8, device=device), torch.rand(4 + call % 2, 8, device=device)]
            ragged = torch.nested.nested_tensor(rows, layout=torch.jagged)
            assert_same(plain(compiled(ragged)), plain(eager(ragged)))
    assert sum(program.replays for program in explain(compiled).programs) >= 3


def test_ragged_sizes_are_this_calls(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a result has the ragged dimension of this call's argument, so that the two go together."""
    compiled, _ = compile_both(lambda ragged: ragged.sin() * 2, options)
    with torch.no_grad():
        for _ in range(5):
            ragged = torch.nested.nested_tensor(
                [torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged, device=device
            )
            assert compiled(ragged).size(1) == ragged.size(1)
            compiled(ragged) + ragged  # an error where they are not the same


def test_subclass_is_taken_apart(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: the tensors inside of a wrapper subclass are arguments as others are."""
    compiled, eager = compile_both(lambda pair, x: pair.sin() * x + 1, options)
    with torch.no_grad():
        for _ in range(6):
            pair, x = (
                TwoTensor(torch.rand(3, device=device), torch.rand(3, device=device)),
                torch.rand(3, device=device),
            )
            assert_same(plain(compiled(pair, x)), plain(eager(pair, x)))
    assert program_of(compiled).replays == 4


def test_subclass_over_an_arguments_memory(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 2 and 3: a write through a subclass is seen by an argument that lies in the same memory."""

    def f(pair: Tensor, x: Tensor) -> Tensor:
        pair.mul_(2)
        return x * 3 + 1

    compiled, eager = compile_both(f, options)
    with torch.no_grad():
        for _ in range(5):
            mine = torch.rand(3, device=device)
            theirs = mine.clone()
            got = compiled(TwoTensor(mine, torch.ones_like(mine)), mine)
            assert_same((got, mine), (eager(TwoTensor(theirs, torch.ones_like(theirs)), theirs), theirs))


def test_layout_without_strides(options: dict[str, Any]) -> None:
    """Line 9: a tensor that has no memory addressed by strides makes its graph eager, and the report says so."""
    compiled = torch.compile(lambda x: x.to_dense() + 1, backend="breakable_cg", options=options)
    x = torch.rand(3, 3)
    with torch.no_grad():
        for _ in range(3):
            assert_same(compiled(x.to_mkldnn()), x + 1)
    assert "torch._mkldnn, which is not addressed by strides" in str(explain(compiled))


def containers(inputs: list[Tensor], x: Tensor, named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Takes a list, and a dict with a tuple in it."""
    inputs[0].add_(1)
    return inputs[0] * x + named["two"][1], inputs[1].sin()


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_lists_and_dicts(needs_gradients: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a graph that takes lists and dicts of tensors, captured or not, takes new tensors in each call."""
    gm = fx.symbolic_trace(containers)
    gm.graph.find_nodes(op="placeholder")[0].meta["steal_arg"] = True
    example = torch.rand(3, device=device)
    if needs_gradients:
        gm.graph.output_node().all_input_nodes[0].meta["example_value"] = example.clone().requires_grad_()

    def arguments() -> tuple[list[Tensor], Tensor, dict[str, Any]]:
        first, second, x, y = torch.rand(4, 3, device=device).unbind()
        return [first.clone(), second.clone()], x.clone(), {"two": (None, y.clone()), "one": y.sin()}

    shown = str(gm.graph)
    with torch.set_grad_enabled(needs_gradients):
        compiled = breakable_cg(gm, arguments(), options={"min_kernels": 1, **options})
    assert str(gm.graph) == shown  # Dynamo looks at its graph again
    assert hasattr(compiled, "uncaptured") == needs_gradients
    for _ in range(5):
        torch.manual_seed(0)
        inputs, x, named = arguments()
        first, gone = inputs[0], weakref.ref(inputs[1])
        got = compiled(inputs, x, named)
        assert inputs == []  # stolen
        assert gone() is None
        torch.manual_seed(0)
        theirs = arguments()
        assert_same((*got, first), (*containers(*theirs), theirs[0][0]))
    if not needs_gradients:
        executor = compiled.executor  # type: ignore[attr-defined]
        assert executor.program.graph_segments
        executor.reset()


def test_compiled_autograd(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: compiled autograd, whose graphs take a list, gives eager's gradients in each call."""
    model = nn.Linear(10, 10, bias=False).to(device)
    compiled = torch.compile(
        lambda loss: loss.backward(), backend="breakable_cg", options={"min_kernels": 1, **options}
    )
    gradients = []
    for call in range(5):
        x = torch.rand(10, 10, device=device)
        with torch._dynamo.config.patch(compiled_autograd=True):
            compiled(model(x).square().sum())
        mine, model.weight.grad = model.weight.grad, None
        model(x).square().sum().backward()
        theirs, model.weight.grad = model.weight.grad, None
        gradients.append((mine, mine.clone(), theirs))
        assert_same(mine, theirs, f"call {call}")
    for mine, copy, _ in gradients:
        assert_same(mine, copy)


# --- dtypes and lazy bits -------------------------------------------------------------------------------------------------

RARE = "complex32 uint16 uint32 uint64 float8_e4m3fn float8_e5m2 float8_e8m0fnu".split()
"""Dtypes that a fused copy may not know."""


def of_dtype(dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Elements of any dtype, from random bytes."""
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * size,), dtype=torch.uint8, device=device).view(dtype)


def inverted(x: Tensor) -> Tensor:
    """Each bit the other way."""
    return x.view(torch.uint8).bitwise_not().view(x.dtype)


def octets(tree: Any) -> Any:
    """The bytes of all tensors."""
    return pytree.tree_map(lambda tensor: tensor.contiguous().view(torch.uint8), tree)


@pytest.mark.parametrize("name", RARE)
def test_rare_dtypes(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: what enters, stays and leaves a captured segment may have any dtype, expanded and with gaps too."""
    dtype = getattr(torch, name)
    compiled, eager = compile_both(
        lambda x, spread, gaps: (inverted(x), x[1:], inverted(spread[0]), gaps.view(torch.uint8) + 1), options
    )
    with torch.no_grad():
        for _ in range(6):
            x, gaps = of_dtype(dtype, 4, device), of_dtype(dtype, 8, device).view(4, 2)[:, :1]
            args = x, x[:1].clone().expand(3, 1), gaps
            assert_same(octets(compiled(*args)), octets(eager(*args)))
    assert program_of(compiled).replays == 4


@pytest.mark.parametrize("name", RARE)
def test_rare_dtypes_that_are_written(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: a written argument of any dtype is written at the caller's, also where it is copied in and back."""
    dtype = getattr(torch, name)
    compiled, eager = compile_both(lambda x, y: (x.copy_(y), inverted(x))[1], options)
    with torch.no_grad():
        for _ in range(12):  # beyond four addresses
            x, y = of_dtype(dtype, 4, device), of_dtype(dtype, 4, device)
            theirs = inverted(inverted(x))
            assert_same(octets((compiled(x, y), x)), octets((eager(theirs, y), theirs)))
    assert program_of(compiled).replays >= 1  # how many addresses there are is the allocator's affair


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "conjugate": torch.conj,
    "negated": torch._neg_view,
    "both": lambda x: torch._neg_view(x.conj()),
    "imaginary part of a conjugate": lambda x: x.conj().imag,
}


@pytest.mark.parametrize("shape", ["whole", "gaps", "expanded"])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_arguments(name: str, shape: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: lazily conjugated and negated arguments are read, written, and returned as they are."""

    def f(x: Tensor, y: Tensor, written: Tensor) -> Any:
        written.mul_(2)
        return x * 2 + y, x, x[1:], x.clone(), written.sum()

    compiled, eager = compile_both(f, options)

    def arguments(call: int) -> tuple[Tensor, ...]:
        torch.manual_seed(call)
        x, y, written = torch.randn(3, 8, dtype=torch.complex64, device=device).unbind()
        shaped = {"whole": x, "gaps": x[::2], "expanded": x[:1].expand(4)}[shape]
        return LAZY[name](shaped), y[: shaped.numel()], kept.setdefault(call % 2, LAZY[name](written.clone()))

    with torch.no_grad():
        results = []
        for function in (compiled, eager):
            kept: dict[int, Tensor] = {}
            results.append([(function(*(args := arguments(call))), args) for call in range(8)])
    assert_same(results[0], results[1])
    assert program_of(compiled).replays == 4


def scaled(x: Tensor) -> Any:
    scale = torch.sqrt(torch.tensor(16, dtype=torch.float) * 3)
    y = silly.triple(x.sin() / scale)
    return (y * scale).cos() + 1


def masked(x: Tensor) -> Any:
    return x.sin().masked_fill(x > 0, torch.tensor(2.0)) + torch.full_like(x, 3).fill_(torch.tensor(4.0))


def counted(x: Tensor) -> Any:
    count = torch.tensor(1.0)
    count.add_(1)
    return x.sin() * count + 1


def returned(x: Tensor) -> Any:
    count = torch.tensor(3.0)
    return x.sin() * count + 1, count


def copied(x: Tensor) -> Any:
    return x.sin() * torch.tensor(3.0).to(x.device) + torch.where(x > 0, x.cos(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "function", [scaled, masked, counted, returned, copied], ids=lambda function: function.__name__
)
def test_numbers_in_the_code(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a number on the host that the code makes is eager's in each call, whatever is done with it."""
    eager = 1 if function is scaled else None
    check(function, lambda _: (torch.randn(2, 4, device=device),), device=device, options=options, eager=eager)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["complex32", "uint16", "uint64", "bool", "float8_e4m3fn", "conjugate", "negated"])
def test_host_scalars_of_rare_kinds(name: str) -> None:
    """Line 3: a number on the host of any dtype, lazily conjugated or negated too, belongs to the key bit for bit."""
    compiled, eager = compile_both(lambda number, x: x * number.to(x.dtype) + 1, {"driver": "cuda"})
    values: dict[int, Tensor] = {}
    for value in range(2):
        if name in LAZY:
            values[value] = LAZY[name](torch.randn(1, dtype=torch.complex64))[0]
        else:
            values[value] = torch.tensor(float(value), dtype=torch.float32).to(getattr(torch, name))
    with torch.no_grad():
        for call in range(8):
            x = torch.randn(4, dtype=torch.complex64, device="cuda")
            assert_same(compiled(values[call % 2], x), eager(values[call % 2], x))
