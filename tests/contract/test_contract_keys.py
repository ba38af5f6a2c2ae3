"""Contract line 3 and its bounds: whatever a recording depends on is in its key; keys are bounded, and steady once seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend import eager_on_graph
from checks import assert_same, compile_both, program_of, refill


def calls_of(program: Any) -> tuple[int, int, int]:
    """Plain calls, captures, replays."""
    return sum(program.plain_calls.values()), program.captures, program.replays


def test_ints(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an int argument is part of the key."""
    compiled, eager = compile_both(lambda x, n: silly.triple(x + n) * n, options, dynamic=True)
    with torch.no_grad():
        for _ in range(4):
            for n in (2, 3, 5, 7):
                x = torch.rand(3, device=device)
                assert_same(compiled(x, n), eager(x, n), f"n = {n}")
    # 4 ints: each plain once, recorded once (2 segments), and replayed 4 - 2 times
    assert calls_of(program_of(compiled)) == (4, 4 * 2, 4 * 2)


@torch.library.custom_op("keys::scaled", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def scaled(x: Tensor, n: int) -> Tensor:
    """An eager step that takes an int."""
    return x * n


@torch.library.custom_op("keys::stubborn_by", mutates_args=())
def stubborn_by(x: Tensor, n: int) -> Tensor:
    """``n`` times ``x`` plus its own maximum, read on the host where that is not allowed."""
    return x * n + (x.max().item() if silly.capturing() else x.max())


@scaled.register_fake
@stubborn_by.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return torch.empty_like(x)


@eager_on_graph(fake=lambda x, given: torch.empty_like(x))
def scaled_by_first(x: Tensor, given: list[int]) -> Tensor:
    return x * given[0] + given[1]


@eager_on_graph(fake=lambda x, n: x.new_empty(n))
def repeated(x: Tensor, n: int) -> Tensor:
    return x.sum() * torch.arange(n, device=x.device)


@pytest.mark.parametrize("debug", [None, "compare"])
def test_ints_of_eager_steps(debug: str | None, device: torch.device, options: dict[str, Any]) -> None:
    """An int that only eager steps take, as it comes, is in no key: one recording serves all its values."""

    def f(x: Tensor, n: int, m: int) -> Tensor:
        return scaled_by_first(scaled(x.sin() + 1, n).cos() * 2, [n, m]).sin() + 1

    compiled, eager = compile_both(f, {**options, "debug": debug}, dynamic=True)
    with torch.no_grad():
        for n in range(2, 9):
            x = torch.rand(3, device=device)
            assert_same(compiled(x, n, n * n + 3), eager(x, n, n * n + 3), f"n = {n}")
    program = program_of(compiled)
    assert calls_of(program) == (1, 3, 5)
    assert "few calls replay" not in str(breakable_backend.explain(compiled))


@pytest.mark.parametrize("of", ["captured", "shape", "computed"])
def test_ints_that_more_depends_on(of: str, device: torch.device, options: dict[str, Any]) -> None:
    """An int that an eager step takes stays in the key if a captured op, a shape or another number depends on it too."""
    functions: dict[str, Callable[..., Any]] = {
        "captured": lambda x, n: scaled(x.sin() + 1, n).cos() + n,
        "shape": lambda x, n: repeated(x.sin() + 1, n).cos() + 1,
        "computed": lambda x, n: scaled(x.sin() + 1, 2 * n + 1).cos() + 1,
    }
    compiled, eager = compile_both(functions[of], options, dynamic=True)
    with torch.no_grad():
        for n in (2, 5, 2, 5, 2, 5, 7):
            x = torch.rand(3, device=device)
            assert_same(compiled(x, n), eager(x, n), f"n = {n}")
    assert calls_of(program_of(compiled)) == (3, 4, 2)


def test_an_int_of_an_op_that_cannot_be_captured(device: torch.device, options: dict[str, Any]) -> None:
    """Once the op that takes an int is known to be eager, the int leaves the key, and results stay right."""
    compiled, eager = compile_both(lambda x, n: stubborn_by(x.sin() + 1, n).cos() + 1, options, dynamic=True)
    with torch.no_grad():
        for n in (2, 2, 2, 3, 4, 5, 6):
            x = torch.rand(3, device=device)
            assert_same(compiled(x, n), eager(x, n), f"n = {n}")
    program = program_of(compiled)
    assert program.num_eager_segments == 1
    assert program.replays >= 3


def test_floats_of_conditions(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a float that is computed from a condition on an int is that of each call."""
    compiled, eager = compile_both(lambda x, n: torch.lerp(x, x * 2, float(n % 2 == 0)).sin(), options)
    with torch.no_grad():
        for n in (3, 4, 4, 4, 5, 5, 5):
            x = torch.rand(3, device=device)
            assert_same(compiled(x, n), eager(x, n), f"n = {n}")
    assert breakable_backend.explain(compiled).programs[-1].replays >= 2


def test_floats(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a float that varies is right for every value, before and after there are more than are keyed."""
    compiled, eager = compile_both(lambda x, scale: silly.triple(x * scale) + scale, options)
    with torch.no_grad():
        for scale in (
            0.5,
            0.5,
            0.5,
            1.5,
            1.5,
            1.5,
            2.5,
            3.5,
            4.5,
            5.5,
            6.5,
            7.5,
            8.5,
            8.5,
            8.5,
            -0.0,
            0.0,
            float("inf"),
        ):
            x = torch.rand(4, device=device)
            assert_same(compiled(x, scale), eager(x, scale), f"scale = {scale}")
            half = x.to(torch.bfloat16)
            assert_same(compiled(half, scale), eager(half, scale), f"scale = {scale}, bfloat16")
    recordings = sum(program.captures for program in breakable_backend.explain(compiled).programs)
    assert recordings <= 2 * 2 * (
        1 + 5
    )  # two dtypes x two segments x (the first constant, then four values and the rest)


@pytest.mark.parametrize("computed", [False, True])
def test_floats_that_are_held_at_zero(computed: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: where a float is a constant, one program serves 0.0 and -0.0, whose symbols have no sign. Each has its own."""
    times = eager_on_graph(lambda x, scale: x * scale)

    def function(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
        y = x.sin() + 1
        return times(y, scale), y / (-scale if computed else scale), (y * scale).cos()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    with torch.no_grad():
        for scale in (0.5, 0.7, 0.0, 0.0, 0.0, -0.0, 0.0, -0.0):
            x = torch.rand(4, device=device)
            assert_same(compiled(x, scale), function(x, scale), f"scale = {scale}")
    report = breakable_backend.explain(compiled)
    held = [graph.why for graph in report.eager_graphs]
    if computed:
        assert held == ["a float that tracing takes for a constant is zero, and Python computes with it"]
    else:
        assert (held, report.programs[-1].replays) == ([], 2)


ARITHMETIC: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "mul": lambda x, s: x * s,
    "add": lambda x, s: x + s,
    "rsub": lambda x, s: s - x,
    "div": lambda x, s: x / s,
    "rdiv": lambda x, s: s / x,
    "pow": lambda x, s: x**s,
    "rpow": lambda x, s: s**x,
    "gt": lambda x, s: x > s,
    "div_": lambda x, s: x.clone().div_(s),
    "alpha": lambda x, s: torch.add(x, x, alpha=s),
    "clamp": lambda x, s: x.clamp(max=s),
    "softplus": lambda x, s: torch.nn.functional.softplus(x, beta=s),
    "in Python": lambda x, s: x / (s * 3 + 0.1 + s),
}


ORDERED = ("gt", "clamp", "softplus")
"""Complex numbers have no order."""


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64], ids=str
)
def test_floats_are_numbers(dtype: torch.dtype, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a float that varies is the number that each of eager's ops gets, with eager's rounding; one program serves it."""
    x = (torch.randn(256, device=device).abs() * 4 + 0.1).to(dtype)
    ops = {name: op for name, op in ARITHMETIC.items() if not (dtype.is_complex and name in ORDERED)}
    compiled, eager = compile_both(lambda x, s: tuple(op(x, s) for op in ops.values()), options)
    with torch.no_grad():
        for scale in (1.5, 1 / 3, 1 / 3, 1 / 3, 0.7, 0.7, 0.7, 1 / 3, 3.3, 3.3, 0.1, 7.7, 0.3, 0.3):
            for name, got, want in zip(ops, compiled(x, scale), eager(x, scale), strict=True):
                assert_same(got, want, f"{name}, scale = {scale}")
    if not dtype.is_complex:  # of which each float is a constant
        first, later = breakable_backend.explain(compiled).programs
        assert first.captures == 0
        assert later.captures >= 3  # those of the four values in the key that came twice
        assert any("more than 4 values" in note for note in later.notes)


def test_floats_of_sizes(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a float that a size depends on is a constant of its program."""
    compiled, eager = compile_both(
        lambda x, s: torch.nn.functional.interpolate(x, scale_factor=s) + x.new_ones(int(8 * s)) * s, options
    )
    with torch.no_grad():
        for scale in (2.0, 2.0, 0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 0.5, 2.0):
            x = torch.rand(1, 1, 8, device=device)
            assert_same(compiled(x, scale), eager(x, scale), f"scale = {scale}")


def test_other_compilers_keep_their_floats(device: torch.device, options: dict[str, Any]) -> None:
    """What Python floats become under other backends is as before."""
    table = vars(torch._functorch._aot_autograd.graph_compile)
    before = table["tensorify_python_scalars"]
    compiled, _ = compile_both(lambda x, s: x * s, options)
    with torch.no_grad():
        for scale in (1.5, 2.5, 3.5):
            compiled(torch.ones(2, device=device), scale)
    assert table["tensorify_python_scalars"] is before


@pytest.mark.gpu
def test_scalars_on_the_device() -> None:
    """Line 3: with ``scalars="device"`` one recording serves all values of a float; in float64 the result is exact."""
    options = {"scalars": "device", "min_kernels": 1}
    f = lambda x, scale: silly.triple(x * scale) + scale  # noqa: E731
    compiled = torch.compile(f, backend="breakable_cg", options=options)
    with torch.no_grad():
        for number in range(10):
            x = torch.rand(4, device="cuda", dtype=torch.float64)
            assert_same(compiled(x, number + 0.5), f(x, number + 0.5))
    last = breakable_backend.explain(compiled).programs[-1]
    assert (last.captures, last.num_eager_segments) == (2, 1)
    # the first value is a constant of its own program; of the nine others one is plain and one records
    assert last.replays == 9 - 2


def test_dynamic_shapes(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: each shape has its key, in any order, and no shape is recorded twice."""
    compiled, eager = compile_both(silly.Silly(), options, dynamic=True)
    sizes = (8, 3, 5)
    with torch.no_grad():
        for _ in range(5):
            for size in sizes:
                x = torch.rand(size, 2, device=device)
                assert_same(compiled(x), eager(x), f"size {size}")
    # 3 shapes: each plain once, recorded once (3 segments), replayed 5 - 2 times
    assert calls_of(program_of(compiled)) == (3, 3 * 3, 3 * 3)


def test_automatic_dynamic_shapes(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: shapes that Dynamo finds to vary by itself, sizes 0 and 1 among them."""
    compiled, eager = compile_both(lambda x: silly.triple(x.sum(1) + 1) * x.shape[0], options)
    with torch.no_grad():
        for size in (4, 4, 4, 5, 5, 5, 6, 6, 6, 0, 0, 0, 1, 1, 1, 4, 5, 6, 0, 1):
            x = torch.rand(size, 3, device=device)
            assert_same(compiled(x), eager(x), f"size {size}")


def test_strides(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: other strides and other dtypes are other programs or keys."""
    compiled, eager = compile_both(silly.Silly(), options, dynamic=True)
    with torch.no_grad():
        for _ in range(4):
            base = torch.rand(4, 6, device=device)
            for x in (base, base.t(), base[:, ::2], base.double(), base.to(torch.bfloat16), base[1:], base.long()):
                assert_same(compiled(x), eager(x), f"{x.dtype} {x.shape} {x.stride()}")


def test_symbolic_strides(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: of two inputs of one shape under a dynamic program, one with gaps, then the other."""
    compiled, eager = compile_both(lambda x, y: silly.triple(x + y) * y, options, dynamic=True)
    with torch.no_grad():
        for gap in (7, 9, 7, 9, 7, 9, 11):
            x, y = torch.rand(4, gap, device=device)[:, :5], torch.rand(4, 6, device=device)[:, :5]
            assert_same(compiled(x, y), eager(x, y), f"gap {gap}")


def test_instances_of_one_class(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: instances compiled one by one, which Dynamo lets share a compiled function, each use their own weights."""
    blocks = [silly.Block(4).to(device) for _ in range(4)]
    references = copy.deepcopy(blocks)
    for block in blocks:
        block.compile(backend="breakable_cg", options={"min_kernels": 1, **options})
    with torch.no_grad():
        for _ in range(5):
            x = torch.rand(2, 4, device=device)
            for block, reference in zip(blocks, references, strict=True):
                assert_same(block(x), reference(x))
    programs = breakable_backend.explain(blocks[0]).programs  # those of all instances: they share the code
    # 4 instances, each: two segments captured once, 5 - 2 replays
    assert sum(program.captures for program in programs) == 4 * 2
    assert sum(program.replays for program in programs) == 4 * 3


def test_swapped_parameter_data(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: ``param.data = other`` is seen by the next call."""
    model = silly.Block(4).to(device)
    compiled, eager = compile_both(model, options)
    kept = []
    with torch.no_grad():
        for number in range(12):
            if number % 4 == 3:
                for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
                    value = torch.rand_like(mine)
                    kept += [mine.data, theirs.data]
                    mine.data, theirs.data = value, value.clone()
            x = torch.rand(2, 4, device=device)
            assert_same(compiled(x), eager(x), f"call {number + 1}")


def test_assigned_state_dict(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: ``load_state_dict(assign=True)`` is seen by the next call."""
    compiled, eager = compile_both(silly.Block(4).to(device), options)
    with torch.no_grad():
        for number in range(12):
            if number % 4 == 3:
                state = silly.Block(4).to(device).state_dict()
                compiled._orig_mod.load_state_dict(copy.deepcopy(state), assign=True)
                eager.load_state_dict(state, assign=True)
            x = torch.rand(2, 4, device=device)
            assert_same(compiled(x), eager(x), f"call {number + 1}")


@pytest.mark.parametrize("static", [False, True], ids=["unmarked", "marked"])
def test_fresh_cache_for_each_request(static: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: a cache made anew for each request, marked static or not, is written where it is."""

    def step(cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
        silly.write_row(cache, x[None] + 1, position)
        cache.mul_(2)
        return cache.sum(0) + x

    compiled, eager = compile_both(step, options)
    for request in range(9):
        mine = torch.zeros(6, 3, device=device)
        if static:
            torch._dynamo.mark_static_address(mine, guard=False)
        theirs = torch.zeros(6, 3, device=device)
        for position in range(6):
            at = torch.tensor([position], device=device)
            x = torch.rand(3, device=device)
            with torch.no_grad():
                assert_same(compiled(mine, x, at), eager(theirs, x, at), f"request {request}, position {position}")
            assert_same(mine, theirs, "cache")
    program = breakable_backend.explain(compiled).programs[-1]
    assert program.replays >= 6 * 4 - 8  # a working set of few addresses, or bridges after the fourth


def test_mutated_input_at_many_addresses(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a mutated input at ever new addresses gets a bridge, and there is no more recording then."""
    compiled, eager = compile_both(lambda x: silly.triple(x.add_(1)) + x.mul_(2), options)
    kept = []
    captures = []
    for call in range(20):
        mine = torch.full((3,), float(call), device=device)
        theirs = mine.clone()
        with torch.no_grad():
            assert_same(compiled(mine), eager(theirs))
        assert_same(mine, theirs)
        kept.append(mine)
        captures.append(program_of(compiled).captures)
    # 4 addresses are keyed and each is seen once; the 5th gives the bridge, the 6th records its segments, and that is all
    assert captures[:5] == [0] * 5
    assert captures[5:] == [program_of(compiled).num_graph_segments] * 15


def test_mutated_input_at_few_addresses(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a mutated input that comes at few addresses is used where it is, without copies."""
    compiled, eager = compile_both(lambda x: silly.triple(x.add_(1)) + 1, options)
    mine = [torch.zeros(3, device=device) for _ in range(3)]
    theirs = [torch.zeros(3, device=device) for _ in range(3)]
    with torch.no_grad():
        for call in range(15):
            assert_same(compiled(mine[call % 3]), eager(theirs[call % 3]))
            assert_same(mine, theirs)
    program = program_of(compiled)
    # 3 addresses: each plain once, recorded once (two segments), then replayed 5 - 2 times
    assert calls_of(program) == (3, 3 * 2, 3 * 3)
    assert program.copies == 3 * 4  # the eager result, in each call that is not plain


class Weighed(nn.Module):
    """An eager step between two uses of a weight, the last of which writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3))
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y = silly.triple(x @ self.weight) @ self.weight
        self.total.add_(y.sum(0))
        return y + self.total


@pytest.mark.parametrize("moved", [("weight",), ("weight", "total")], ids=["read", "written"])
def test_static_inputs_at_many_addresses(moved: tuple[str, ...], device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a parameter that is given other memory again and again is copied in; one that is written is copied back."""
    mine = Weighed().to(device)
    theirs = copy.deepcopy(mine)
    compiled, kept = torch.compile(mine, backend="breakable_cg", options=options), []
    with torch.no_grad():
        for _ in range(16):
            for name in moved:
                new = torch.rand_like(getattr(mine, name))
                kept.append(new)
                getattr(mine, name).data, getattr(theirs, name).data = new, new.clone()
            x = torch.rand(2, 3, device=device)
            assert_same(compiled(x), theirs(x))
            assert_same(mine.total, theirs.total)
    program = program_of(compiled)
    # 4 addresses are keyed and each is seen once; what is written is then keyed at 4 addresses again, and bridged behind them
    assert program.replays >= 16 - 5 - 1 - (5 if "total" in moved else 0), str(program)
    assert "a tensor came at more than 4 addresses: copied in" in program.notes[0]
    with torch.no_grad():
        bound = breakable_backend.bind(compiled, x)
        theirs.total.copy_(mine.total)
        for _ in range(3):
            mine.weight.data = theirs.weight.data = torch.rand(3, 3, device=device)
            assert_same(bound(x), theirs(x))


@pytest.mark.parametrize("every", [1, 4])
def test_static_inputs_that_are_freed_and_filled_again(
    every: int, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 3: a parameter in the same storage at another address is copied in, unless its recording was of use first."""
    mine = Weighed().to(device)
    theirs = copy.deepcopy(mine)
    compiled, others = torch.compile(mine, backend="breakable_cg", options=options), list[Tensor]()
    with torch.no_grad():
        for call in range(12):
            if call % every == 0:
                refill(mine.weight, theirs.weight, others)
            x = torch.rand(2, 3, device=device)
            assert_same(compiled(x), theirs(x))
            assert_same(mine.total, theirs.total)
    program = program_of(compiled)
    copied = ["read in place, and memory was freed and filled again between calls: copied in"]
    # at once: two warm-ups, then a recording; at times: each address is warmed up and recorded, and replayed twice
    assert program.replays == (12 - 3 if every == 1 else 3 * 2), str(program)
    assert [note.partition(": ")[2] for note in program.notes] == copied[: every == 1]


def test_many_instances(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: instances of a module have other weights, each at its own place: each is recorded for itself, without copies."""
    models = [Weighed().to(device) for _ in range(6)]
    twins = copy.deepcopy(models)
    compiled, x = (
        torch.compile(Weighed.forward, backend="breakable_cg", options=options),
        torch.rand(2, 3, device=device),
    )
    with torch.no_grad():
        for _ in range(4):
            for model, twin in zip(models, twins, strict=True):
                assert_same(compiled(model, x), twin(x))
    program = program_of(compiled)
    assert (program.replays, program.notes) == (6 * 2, ())


def test_few_recordings_and_many_keys(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: with more keys in turn than recordings, some run plainly; what is kept is bounded and not recorded for ever."""
    compiled, eager = compile_both(silly.Silly(), {**options, "max_recordings": 2}, dynamic=True)
    captures = []
    with torch.no_grad():
        for _ in range(12):
            for size in (3, 4, 5, 6):
                x = torch.rand(size, 9, device=device)
                assert_same(compiled(x), eager(x), f"size {size}")
                assert len(program_of(compiled).recordings) <= 2
            captures.append(program_of(compiled).captures)
    assert captures[1:] == [3 * 2] * 11  # three segments x two keys, recorded in the second round
    assert program_of(compiled).evictions == 0
    assert "more than max_recordings=2 keys in use" in program_of(compiled).plain_calls


def test_keys_that_are_no_longer_used(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a key that is not called any more makes room for a new one."""
    compiled, eager = compile_both(silly.Silly(), {**options, "max_recordings": 1}, dynamic=True)
    with torch.no_grad():
        for size in (4, 5, 6):
            for _ in range(12):
                x = torch.rand(size, 9, device=device)
                assert_same(compiled(x), eager(x), f"size {size}")
            assert len(program_of(compiled).recordings) == 1
    program = program_of(compiled)
    assert program.evictions == 2  # for sizes 5 and 6
    assert program.captures == 3 * 3  # three segments x three keys


def test_requires_grad_of_an_input(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an input that requires grad under ``no_grad`` is another program, with the same results."""
    compiled, eager = compile_both(silly.Silly(), options)
    with torch.no_grad():
        for number in range(8):
            x = torch.rand(4, device=device).requires_grad_(number % 2 == 0)
            assert_same(compiled(x), eager(x))


class Switch(nn.Module):
    """Takes another path by a Python flag and by a string."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, mode: str = "a", *, flag: bool = False) -> Tensor:
        y = self.linear(x) + 1
        y = silly.triple(y) if flag else y * 5
        return y.sin() * 2 if mode == "a" else y.cos() * 3


def test_python_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: arguments that are no tensors choose the program."""
    compiled, eager = compile_both(Switch().to(device), options)
    with torch.no_grad():
        for _ in range(4):
            for mode in "ab":
                for flag in (True, False):
                    x = torch.rand(2, 3, device=device)
                    assert_same(compiled(x, mode, flag=flag), eager(x, mode, flag=flag))
    programs = breakable_backend.explain(compiled).programs
    assert [program.replays for program in programs] == [2] * 4  # 4 programs, 4 - 2 each


def test_alignments(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: how a bridged input lies to 16 bytes is in the key, since libraries choose kernels by that."""
    compiled, eager = compile_both(lambda x: silly.triple(x.sin() + 1).cos() * 2, options)
    with torch.no_grad():
        for _ in range(4):
            for begin in (0, 1, 2, 3, 4, 5):
                x = torch.rand(16, device=device)[begin : begin + 8]
                assert_same(compiled(x), eager(x), f"begins at element {begin}")
    # 4 alignments of float32, of which two come twice as often: each plain once, recorded once, and replayed else
    assert calls_of(program_of(compiled)) == (4, 4 * 2, 4 * 6 - 4 * 2)


@pytest.mark.gpu
def test_a_library_that_looks_at_alignment() -> None:
    """Bit for bit: cuDNN takes another kernel where a convolution's weight begins at 4 bytes."""
    compiled, eager = compile_both(
        lambda x, w, b: torch.nn.functional.conv3d(x, w, b, padding="same"), {"driver": "cuda", "min_kernels": 1}
    )
    with torch.no_grad():
        for _ in range(5):
            x, w, b = (torch.randn(2 * n + 1, device="cuda")[1::2] for n in (64, 1, 1))
            args = (x.as_strided((1, 1, 4, 4, 4), (128, 128, 32, 8, 2)), w.view(1, 1, 1, 1, 1), b)
            assert_same(compiled(*args), eager(*args))
