"""The whole contract on models and on the corners of torch: control flow, sizes known late, complex values, subgraphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import silly
from checks import assert_same, check, compile_both, sequence


@pytest.fixture
def late_sizes() -> Iterator[None]:
    """Dynamo traces ops whose size, or value, is known only at run time."""
    patch: Any = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with patch:
        yield


# --- modules --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Scaled dot product attention between two linear layers, with an eager step in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, silly.triple(v), is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, 8))


class Convolution(nn.Module):
    """Convolution, batch norm and pooling, with an eager step in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        y = nn.functional.max_pool2d(silly.triple(y), 2)
        return self.head(y.mean((2, 3)))


class Embedding(nn.Module):
    """Embedding, a gather and a sum by index, around an eager step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y = silly.triple(self.embedding(tokens))
        y = y.gather(1, tokens[:, :1, None].remainder(tokens.shape[1]).expand(-1, 1, 4))
        return torch.zeros(10, 4, device=y.device).index_add(0, tokens[:, 0], y[:, 0])


class Recurrent(nn.Module):
    """A cell in a loop, with an eager step in each turn."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        for row in x:
            state = silly.triple(self.cell(row, state))
        return state + 1


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("model", "shape", "captured", "eager"),
    [
        (Attention, (2, 5, 8), 2, 1),  # one eager step in the middle
        (Convolution, (2, 3, 8, 8), 2, 1),
        (Recurrent, (3, 2, 4), 4, 3),  # one eager step for each of the 3 rows, the last followed by an addition
    ],
)
def test_modules(
    model: Any,
    shape: tuple[int, ...],
    captured: int,
    eager: int,
    train: bool,
    device: torch.device,
    options: dict[str, Any],
) -> None:
    """Lines 1 to 6: a model gives eager's results and buffers, bit for bit, and breaks only where it is marked."""
    check(
        model().to(device).train(train),
        lambda _: (torch.rand(*shape, device=device),),
        device=device,
        options=options,
        captured=captured,
        eager=eager,
        copies=1 + eager,  # the input and the result of each eager step
    )


def test_embedding(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: integer inputs are read anew in each call."""
    # embedding | triple | the rest; copies = the tokens and the eager result
    check(
        Embedding().to(device),
        lambda _: (torch.randint(0, 10, (3, 5), device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
    )


def test_cache(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 2 and 5: an op that writes rows of a buffer writes the buffer itself, for graphs to read."""
    # add | write_row | mul, sum, mul, add; copies = x, which only graphs read: the buffer has a fixed address
    check(
        silly.Cache(7, 4).to(device),
        lambda call: (torch.rand(4, device=device), torch.tensor([call], device=device)),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=1,
    )


def test_blocks_in_a_row(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: N blocks with one eager step each are N + 1 segments."""
    # captured = blocks + 1; copies = the input and one eager result for each block
    model = nn.Sequential(*(silly.Block(4) for _ in range(4))).to(device)
    check(
        model,
        lambda _: (torch.rand(2, 4, device=device),),
        device=device,
        options=options,
        captured=5,
        eager=4,
        copies=5,
    )


def test_library_module_as_it_is(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a module of torch's own, whose code Dynamo compiles through a wrapper, is in the report."""
    # one segment; copies = the input
    check(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4)).to(device),
        lambda _: (torch.rand(2, 4, device=device),),
        device=device,
        options=options,
        captured=1,
        eager=0,
        copies=1,
    )


def test_counts_in_a_range(device: torch.device, options: dict[str, Any]) -> None:
    """``histc`` that is told its range is captured with what is around it, as a mixture of experts counts its tokens."""

    def counts(x: Tensor) -> Tensor:
        experts = (x.flatten().abs() * 3).long() % 4
        return torch.histc(experts.float(), bins=4, min=0, max=3).cumsum(0) * 2

    make = lambda _: (torch.randn(8, 4, device=device),)  # noqa: E731
    check(counts, make, device=device, options=options, captured=1, eager=0)


def test_fullgraph(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: eager breaks are none of Dynamo's: ``fullgraph=True`` holds."""
    check(
        silly.Silly(),
        lambda _: (torch.rand(3, device=device),),
        device=device,
        options=options,
        captured=3,
        eager=2,
        copies=3,
        fullgraph=True,
    )


# --- control flow and subgraphs -----------------------------------------------------------------------------------------------


def cond_pure(x: Tensor) -> Tensor:
    """``cond`` whose branches are pure."""
    y = (x + 1) * 2
    z = torch.cond(x.sum() > 2, lambda t: t.sin() + 1, lambda t: t.cos() - 1, (y,))
    return z * 2 + y


def cond_marked(x: Tensor) -> Tensor:
    """``cond`` with a marked op in a branch."""
    y = (x + 1) * 2
    z = torch.cond(x.sum() > 2, lambda t: silly.triple(t) + 1, lambda t: silly.triple(silly.triple(t)), (y,))
    return z * 2 + y


def loop(x: Tensor) -> Tensor:
    """``while_loop`` whose turns depend on the data."""

    def more(turn: Tensor, y: Tensor) -> Tensor:
        return turn < 3 + (y.sum() > 4).to(torch.int64)

    def body(turn: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return turn + 1, y * 1.5

    start = torch.zeros((), dtype=torch.int64, device=x.device)
    turns, y = torch._higher_order_ops.while_loop(more, body, (start, x + 1))
    return y * 2 + turns


def loop_marked(x: Tensor) -> Tensor:
    """``while_loop`` with a marked op in its body."""
    start = torch.zeros((), dtype=torch.int64, device=x.device)
    _, y = torch._higher_order_ops.while_loop(
        lambda turn, y: turn < 3, lambda turn, y: (turn + 1, silly.triple(y)), (start, x + 1)
    )
    return y * 2


def subgraph(x: Tensor) -> Tensor:
    """A region that is compiled once and used twice."""

    @torch.compiler.nested_compile_region
    def layer(t: Tensor) -> Tensor:
        return t.sin() * 2 + 1

    return layer(layer(x + 1)) * 2


def subgraph_marked(x: Tensor) -> Tensor:
    """A region with a marked op, used twice."""

    @torch.compiler.nested_compile_region
    def layer(t: Tensor) -> Tensor:
        return silly.triple(t.sin()) + 1

    return layer(layer(x + 1)) * 2


def subgraph_random(x: Tensor) -> Tensor:
    """A region with a draw, used twice."""

    @torch.compiler.nested_compile_region
    def layer(t: Tensor) -> Tensor:
        return t + torch.rand_like(t)

    return layer(layer(x + 1)) * 2


HIGHER_ORDER = {
    cond_pure: (2, 1),  # segments before and after the cond
    cond_marked: (2, 1),
    loop: (2, 1),
    loop_marked: (2, 1),
    subgraph: (1, 0),  # captured with what is around it
    subgraph_marked: (3, 2),  # each use is cut
    subgraph_random: (1, 0),
}


@pytest.mark.parametrize("function", HIGHER_ORDER, ids=lambda function: function.__name__)
def test_higher_order_ops(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 9: control flow runs eagerly where it looks at values, subgraphs are captured, marks in bodies count."""
    captured, eager = HIGHER_ORDER[function]
    check(
        function,
        lambda call: (torch.rand(3, device=device) * (call % 3),),
        device=device,
        options=options,
        captured=captured,
        eager=eager,
    )


# --- sizes and values that are known late -------------------------------------------------------------------------------------


def nonzero(x: Tensor) -> Tensor:
    """The indices of what is not zero."""
    y = (x - 0.5).relu() * 2
    z = y.nonzero().float() + 1
    return z.sum(0) * 2 + y.sum()


def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask leaves, returned and summed."""
    y = (x + 1).sin()
    z = y[x > 0.5]
    return z, y * 2 + z.sum()


def item(x: Tensor) -> Tensor:
    """A value read on the host, in pointwise arithmetic."""
    y = (x + 1) * 2
    return y * x.sum().item() + y


def item_as_int(x: Tensor) -> Tensor:
    """A value read on the host, as a size."""
    y = (x + 1) * 2
    count = (x > 0.5).sum().item()
    torch._check(count >= 0)
    return torch.ones(count, device=x.device).sum() * 2 + y


def custom_size(x: Tensor) -> Tensor:
    """A custom op of a size that depends on values, and ops on its result."""
    y = silly.positive((x - 0.5) * 2)
    return (y.sin() * 2).sum() + x


@pytest.mark.parametrize(
    "function", [nonzero, masked, item, item_as_int, custom_size], ids=lambda function: function.__name__
)
def test_late_sizes(function: Any, late_sizes: None, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 9: sizes and numbers known only at run time, and all that uses them, run eagerly; the rest is captured."""
    program = check(function, lambda _: (torch.rand(6, device=device),), device=device, options=options)
    assert program.num_graph_segments >= 1
    if function is not item:  # Dynamo turns a float that is only multiplied into a tensor again
        assert program.num_eager_segments >= 1


# --- values --------------------------------------------------------------------------------------------------------------------


def complex_numbers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Complex values, conjugated lazily, across a break."""
    z = torch.complex(x, x + 1)
    w = silly.triple(z.conj()) * z
    return w.conj(), w.real, w.imag + 1


def negated_view(x: Tensor) -> tuple[Tensor, Tensor]:
    """A lazily negated view."""
    z = torch.complex(x, x + 1) * 2
    y = z.conj().imag
    return y, silly.triple(y + 1) * 2


def fourier(x: Tensor) -> Tensor:
    """A transform and back."""
    z = torch.fft.rfft(silly.triple(x + 1))
    return torch.fft.irfft(z * 2, n=x.shape[-1]) + 1


@pytest.mark.parametrize("function", [complex_numbers, negated_view, fourier], ids=lambda function: function.__name__)
def test_complex(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: complex values, and lazily conjugated or negated ones, cross breaks and are returned as in eager."""
    program = check(function, lambda _: (torch.rand(6, device=device),), device=device, options=options)
    assert program.num_graph_segments >= 1


def test_conjugated_input(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an input that is lazily conjugated is read as such, also when its neighbour call's is not."""
    compiled, eager = compile_both(lambda z: silly.triple(z * 2) + z.conj(), options)
    make = lambda: torch.complex(torch.rand(4, device=device), torch.rand(4, device=device))  # noqa: E731
    with torch.no_grad():
        for number in range(10):
            z = make().conj() if number % 3 else make()
            assert_same(compiled(z), eager(z), f"call {number + 1}")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_tensors(shape: tuple[int, ...], device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: tensors without elements go through captured and eager steps."""
    check(
        silly.Silly(),
        lambda _: (torch.rand(shape, device=device),),
        device=device,
        options=options,
        captured=3,
        eager=2,
    )


def test_scalars(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: tensors of no dimension on the device are read anew in each call."""

    def f(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return silly.triple(x * scale) + scale, scale * 2

    # mul | triple | add, mul; copies = x, scale, the eager result
    check(
        f,
        lambda call: (torch.rand(4, device=device), torch.tensor(call + 0.5, device=device)),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=3,
    )


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64]
)
def test_dtypes(dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: values of each dtype cross breaks bit for bit."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = silly.pieces(x.clone(), 2)
        return first.clone(), second.clone().view(-1)

    # clone | pieces | two clones; copies = x and both results
    check(
        f,
        lambda _: (torch.randint(0, 2, (4,), device=device).to(dtype),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=3 if dtype is not torch.bool else None,  # a bool plus a number is of another dtype
    ) if dtype is not torch.bool else check(
        lambda x: ~silly.attention(x.logical_not(), x, x),
        lambda _: (torch.randint(0, 2, (4,), device=device).bool(),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,  # x and the eager result
    )


def test_special_values(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: NaN, infinities and the sign of zero survive."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45], device=device)
    check(
        lambda x: (silly.triple(x * 1) * 1, x.neg().clone()),
        lambda call: (values.roll(call),),
        device=device,
        options=options,
        captured=2,
        eager=1,
    )


def test_mixed_dtypes_in_one_load(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: bridges of several dtypes and layouts are loaded together."""

    def f(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        return silly.triple(a + 1) + 1, b * 2, c + 1, d.double() + a

    def make_args(call: int) -> tuple[Tensor, ...]:
        return (
            torch.rand(3, 4, device=device),
            torch.rand(4, device=device, dtype=torch.float64),
            torch.randint(0, 9, (2, 2), device=device),
            torch.rand(4, 3, device=device).t(),
        )

    check(f, make_args, device=device, options=options, captured=2, eager=1, copies=5)  # four inputs, one eager result


def test_arguments_in_nests(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: tensors in lists, dictionaries and data classes are inputs like others."""

    def f(x: dict[str, Any], *rest: Tensor, scale: Tensor) -> dict[str, Any]:
        y = silly.triple(x["a"] + x["b"][1]) * scale
        return {"sum": y + sum(rest), "same": x["b"][0]}

    compiled, eager = compile_both(f, options)

    def make() -> Tensor:
        return torch.rand(3, device=device)

    with torch.no_grad():
        for _ in range(6):
            nest = {"a": make(), "b": [make(), make()]}
            rest, scale = (make(), make()), make()
            got, want = compiled(nest, *rest, scale=scale), eager(nest, *rest, scale=scale)
            assert_same(got, want)
            assert got["same"] is nest["b"][0]


def test_several_functions_one_pool(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: functions whose recordings share a pool, called in mixed order, do not disturb each other."""
    functions = [lambda x, n=n: silly.triple(x * n + 1) * n - x for n in range(1, 5)]
    pairs = [compile_both(function, options) for function in functions]
    kept = []
    with torch.no_grad():
        for round_ in range(6):
            for position in range(4):
                compiled, eager = pairs[(position * 3 + round_) % 4]
                x = torch.rand(5 + position, device=device)
                got = compiled(x)
                kept.append((got, eager(x)))
    for got, want in kept:
        assert_same(got, want)


def test_large_then_small(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: keys recorded from large to small, with the allocator churned between, replay in mixed order."""
    compiled, eager = compile_both(silly.Silly(), options, dynamic=True)
    sizes = [4096, 512, 64, 8]
    sequence(compiled, eager, [(torch.rand(size, 3, device=device),) for size in sizes for _ in range(2)])
    for round_ in range(4):
        junk = [torch.full((size,), float("nan"), device=device) for size in range(1, 4096, 512)]
        del junk
        order = sizes[round_:] + sizes[:round_]
        sequence(compiled, eager, [(torch.rand(size, 3, device=device),) for size in order])


def test_tensor_subclass(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: a Parameter that is returned is the same object."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight, silly.triple(x + self.weight) * 2

    compiled, _ = compile_both(Model().to(device), options)
    with torch.no_grad():
        for _ in range(5):
            weight, _ = compiled(torch.rand(3, device=device))
            assert weight is compiled._orig_mod.weight


def test_dispatch_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the caller's dispatch mode sees every op of a call, captured ones too, and the result is right."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    compiled, eager = compile_both(silly.Silly(), options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
        with Watch():
            got = compiled(x)
        assert_same(got, eager(x))
    assert seen.count(torch.ops.aten.add.Tensor) == 3  # x + 1, x + 2, x + 1
