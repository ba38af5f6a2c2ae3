"""What holds memory of the pool, and how long: each value until its last reader, and nothing between calls.

The tape overwrites what is not held any more with each segment that was captured afterwards. So a value that is given
up too early has other numbers there, as it may have on a GPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

import silly
from breakable_backend import _torch, eager_on_graph, explain, reset
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import CaptureDriver, pool_size
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.ir.last_uses import needed
from breakable_backend.ir.layout import Geometry
from breakable_backend.recordings import copies
from breakable_backend.recordings.recording import GraphStep
from checks import assert_same, check, compile_both, entries_of, program_of
from straight_line import SIDE, Straight, programs

ROWS = 64

library = torch.library.Library("lifetimes", "FRAGMENT")
library.define("handed_back(Tensor x) -> Tensor", tags=silly.UNSAFE)
library.impl("handed_back", lambda x: x, "CompositeExplicitAutograd")
library.impl("handed_back", torch.empty_like, "Meta")
library.define("over_the_same(Tensor x) -> Tensor", tags=silly.UNSAFE)
library.impl(
    "over_the_same",
    lambda x: Geometry.of(x).on(_torch.twin_storage(x.untyped_storage())),
    "CompositeExplicitAutograd",
)
library.impl("over_the_same", torch.empty_like, "Meta")
library.define("echo(Tensor x) -> Tensor")
library.impl("echo", lambda x: (x + 1, x)[1], "CompositeExplicitAutograd")  # one that launches nothing runs eagerly
library.impl("echo", torch.empty_like, "Meta")


@pytest.fixture(autouse=True)
def no_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridges of small inputs, too, are in the pool."""
    monkeypatch.setattr(copies, "KEPT_INPUT", 0)


def vectors(call: int, device: torch.device) -> tuple[Tensor, ...]:
    return (torch.rand(ROWS, device=device),)


def breaks(x: Tensor, times: int) -> Tensor:
    """Segments and eager steps in turns, which take memory and give it back."""
    for _ in range(times):
        x = silly.triple((x * 0.5).sin()).cos() + 1
    return x


# --- a value lives until its last reader ---------------------------------------------------------------------------------


def crosses(times: int) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        return breaks(y, times) * y

    return f


def read_twice(x: Tensor) -> Tensor:
    y = x.sin()
    return breaks(breaks(y, 1) + y, 2) * y


def read_by_eager_steps(x: Tensor) -> Tensor:
    y = x.sin() + 1
    return breaks(silly.attention(breaks(y, 2), y, y).cos() + 1, 1)


def written_in_between(x: Tensor) -> Tensor:
    y = x.sin()
    z = breaks(y, 1)
    y.add_(z)
    z = breaks(z, 1)
    silly.add_into(y, z)
    return breaks(z, 1) * y


def views_of_dead_roots(x: Tensor) -> Tensor:
    y = (x.sin() + 1).view(8, -1)
    row = y.t()[1]
    z = breaks(x.cos(), 2)
    return z[: row.numel()] * row


def an_input_twice(x: Tensor) -> Tensor:
    return breaks(breaks(x + 1, 1) * x, 2) * x


def an_input_written_by_an_eager_step(x: Tensor) -> Tensor:
    y = breaks(x * 2, 1)
    silly.add_into(x, y)
    return breaks(breaks(x * y, 1) + x, 1) * x


def bridged_twice(x: Tensor) -> Tensor:
    y = silly.triple(x.sin())
    return breaks(breaks(y + 1, 1) * y, 2) * y


def returned_early(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    z = silly.triple(y)
    return y, z, breaks(z * 2, 2)


def a_bridge_that_was_written(x: Tensor) -> tuple[Tensor, Tensor]:
    y = silly.triple(x.sin())
    y.mul_(2)
    return y, breaks(x.cos() + 1, 2)


def handed_back(x: Tensor) -> Tensor:
    """An eager step returns its argument, against its schema, and the argument is not read any more."""
    y = torch.ops.lifetimes.handed_back(x.sin())
    return breaks(x.cos(), 2) * y


def over_the_same(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same on another storage over the memory, as DLPack makes one."""
    y = torch.ops.lifetimes.over_the_same(x.sin())
    z = torch.ops.lifetimes.over_the_same(x.cos())
    return breaks(x.cos(), 2) * y, z


def echoed(x: Tensor) -> Tensor:
    """An op in a captured segment returns what another segment made, against its schema, and that is not read any more."""
    y = x.sin()
    z = breaks(y, 1)
    y = torch.ops.lifetimes.echo(y)
    return breaks(z * 2, 2) * y


def echoed_bridge(x: Tensor) -> Tensor:
    """The same, of what an eager step made: its bridge is handed back."""
    y = torch.ops.lifetimes.echo(silly.triple(x.sin()))
    return breaks(x.cos(), 2) * y


VALUES = [
    *(pytest.param(crosses(times), id=f"crosses-{times}") for times in (1, 2, 9)),
    read_twice,
    read_by_eager_steps,
    views_of_dead_roots,
    an_input_twice,
    bridged_twice,
    returned_early,
    a_bridge_that_was_written,
    handed_back,
    over_the_same,
    echoed,
    echoed_bridge,
]
WRITING = [written_in_between, an_input_written_by_an_eager_step]


def named(case: Any) -> str | None:
    return getattr(case, "__name__", None)


@pytest.mark.parametrize("outputs", ["fresh", "static"])
@pytest.mark.parametrize("function", [*VALUES, *WRITING], ids=named)
def test_a_value_lives_until_its_last_reader(
    function: Callable[..., Any], outputs: str, device: torch.device, options: dict[str, Any]
) -> None:
    """What a later step reads, or the caller gets, is not given to the segments in between."""
    compiled, _ = compile_both(function, {**options, "outputs": outputs})
    for call in range(6):
        (x,) = vectors(call, device)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            got = compiled(mine)
            assert_same(got, function(theirs), f"call {call + 1}")
            assert_same(mine, theirs, f"call {call + 1}: input")


@pytest.mark.parametrize("function", VALUES, ids=named)
def test_aliases_are_as_before(function: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> None:
    """What a call returns is the caller's, however its memory is used again."""
    if function in (handed_back, over_the_same, echoed, echoed_bridge):
        pytest.skip("what an op returns against its schema is a copy")
    check(function, lambda call: vectors(call, device), device=device, options=options)


@eager_on_graph
def doubled(x: Tensor) -> Tensor:
    return x * 2


def test_a_bridge_that_a_backward_reads_lives(device: torch.device, options: dict[str, Any]) -> None:
    """What an eager step made, and a backward reads, is there until the backward has run."""

    def f(x: Tensor, weight: Tensor) -> Tensor:
        y = doubled(x * weight).sin()  # whose backward reads what it was made of
        for _ in range(3):
            y = doubled(y.cos() + 1).sin()
        return y.sum()

    compiled, _ = compile_both(f, options)
    for call in range(6):
        (x,) = vectors(call, device)
        mine, theirs = (torch.full((ROWS,), 0.5, device=device, requires_grad=True) for _ in range(2))
        got, want = compiled(x, mine), f(x, theirs)
        got.backward()
        want.backward()
        assert_same((got, mine.grad), (want, theirs.grad), f"call {call + 1}")
    assert any(program.replays for program in explain(compiled).programs)


# --- and no longer ---------------------------------------------------------------------------------------------------------


def held(compiled: Any) -> float:
    """What a recording needs at once, in vectors."""
    (made,) = program_of(compiled).recordings
    return (made.held_bytes + made.bridge_bytes) / (4 * ROWS)


@pytest.mark.parametrize("outputs", ["fresh", "static"])
@pytest.mark.parametrize("function", [crosses, lambda times: lambda x: breaks(x, times)], ids=["crossing", "chain"])
def test_memory_does_not_grow_with_breaks(
    function: Callable[[int], Any], outputs: str, device: torch.device, options: dict[str, Any]
) -> None:
    """What a recording needs at once does not depend on how many breaks there are."""
    needed = []
    for times in (3, 12):
        torch.compiler.reset()
        compiled, _ = compile_both(function(times), {**options, "outputs": outputs})
        with torch.no_grad():
            for call in range(4):
                compiled(*vectors(call, device))
        needed.append(held(compiled))
    assert needed[0] == needed[1] <= 4


def bulges(x: Tensor) -> Tensor:
    """More is alive in the middle than at either end."""
    x = breaks(x, 1)
    y, z, w = x.sin(), x.cos(), x.exp()
    return breaks(silly.triple(y) * z + w, 2)


def read_late_by_an_eager_step(x: Tensor) -> Tensor:
    y = x.sin()
    return silly.attention(bulges(y), x, x)


def test_the_bridge_of_an_input_goes_with_its_last_captured_reader(
    device: torch.device, options: dict[str, Any]
) -> None:
    """An eager step reads the argument itself: for that the bridge is not held."""
    needed = []
    for function in (read_late_by_an_eager_step, lambda x: bulges(x.sin())):
        torch.compiler.reset()
        compiled, _ = compile_both(function, options)
        with torch.no_grad():
            for _ in range(3):
                x = torch.rand(8, ROWS // 8, device=device)
                assert_same(compiled(x), function(x))
        needed.append(held(compiled))
    assert needed[0] == needed[1]


def blocks(driver: CaptureDriver) -> int:
    """Parts of the pool that somebody holds."""
    if isinstance(driver, TapeDriver):
        return sum(lent.is_held for lent in driver._lent.values())
    return driver.live_blocks()


def driver_behind(compiled: Any) -> CaptureDriver:
    (executor,) = executors_of(compiled)
    assert executor.driver is not None
    return executor.driver


@pytest.mark.parametrize("function", VALUES, ids=named)
def test_nothing_is_held_between_calls(
    function: Callable[..., Any], device: torch.device, options: dict[str, Any]
) -> None:
    """Between calls the whole pool is free for whatever is captured next, also where eager steps kept their arguments."""
    kept: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        results = function(x * 2)
        return silly.visit(results if isinstance(results, Tensor) else results[1]) + 1

    silly.hooks["visit"] = lambda x: (kept.append(x), x)[1]
    compiled, _ = compile_both(f, options)
    try:
        with torch.no_grad():
            for call in range(4):
                compiled(*vectors(call, device))
    finally:
        silly.hooks.clear()
    driver = driver_behind(compiled)
    assert driver.live_graphs() > 0
    assert blocks(driver) == 0
    kept.clear()


def test_static_results_are_held(device: torch.device, options: dict[str, Any]) -> None:
    """With ``outputs="static"`` a recording holds what it returns, as it lies: a result may be the next call's argument."""
    compiled, _ = compile_both(returned_early, {**options, "outputs": "static"})
    with torch.no_grad():
        for call in range(4):
            results = compiled(*vectors(call, device))
    (executor,) = executors_of(compiled)
    (entry,) = entries_of(executor)
    assert entry.recording is not None and executor.driver is not None
    if isinstance(executor.driver, TapeDriver):
        memory = {key for graph in entry.recording.graphs for key in graph.made}  # type: ignore[attr-defined]
        assert _torch.storage_key(results[0]) in memory and _torch.storage_key(results[2]) in memory
    else:
        del results
        assert executor.driver.live_blocks() == 2  # and what an eager step made, which is the caller's


def test_static_results_fed_back_to_a_late_reader(device: torch.device, options: dict[str, Any]) -> None:
    """An argument that may be a static result is read before anything is launched, however late its first reader is."""

    def f(x: Tensor, state: Tensor) -> Tensor:
        return breaks((x.sin() * 2).cos() + x, 2) * state + state.sin()

    compiled, _ = compile_both(f, {**options, "outputs": "static"})
    mine = theirs = torch.rand(ROWS, device=device)
    with torch.no_grad():
        for call in range(8):
            (x,) = vectors(call, device)
            mine, theirs = compiled(x, mine), f(x, theirs)
            assert_same(mine, theirs, f"call {call + 1}")
    (executor,) = executors_of(compiled)
    (entry,) = entries_of(executor)
    assert entry.recording is not None
    loads = [len(step.loads) for step in entry.recording.steps if isinstance(step, GraphStep)]
    assert loads == [2, 1, 1]


def late_step(x: Tensor, state: Tensor) -> Tensor:
    y = breaks(x, 1)
    return silly.triple(state) + y.sum()


def late_segment(x: Tensor, state: Tensor) -> Tensor:
    y = breaks(x, 1)
    return (state * 2 + y.sum()).sin()


@pytest.mark.gpu
@pytest.mark.parametrize("function", [late_step, late_segment])
@pytest.mark.parametrize("reader", ["same", "static", "fresh"])
def test_a_static_result_is_in_nobody_elses_memory(function: Callable[..., Tensor], reader: str) -> None:
    """A recording that was there before, of another key or function, reads a static result as it was, however late."""
    device, size = torch.device("cuda"), 1 << 18

    def other(x: Tensor, state: Tensor) -> Tensor:
        return function(x, state) + 1

    static = {"driver": "cuda", "outputs": "static"}
    made, _ = compile_both(function, static, dynamic=True)
    takes, wants = made, function
    if reader != "same":
        takes, wants = compile_both(other, {**static, "outputs": reader}, dynamic=True)
    state = torch.rand(size, device=device)
    with torch.no_grad():
        for _ in range(3):
            takes(torch.rand(size, device=device), state)
        for call in range(5):
            small, large = torch.rand(1000, device=device), torch.rand(size, device=device)
            want = wants(large, function(small, state))
            assert_same(takes(large, made(small, state)), want, f"call {call + 1}")


def read_late(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() * 2
    return silly.triple(state) + 1, y.cos(), y


def written_early(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() * 2
    state.add_(breaks(y, 1))
    return y.cos(), state + breaks(y, 1), y


def written_by_a_step(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    y = x.sin() * 2
    torch.ops.silly.add_into(state, y)
    return silly.triple(state) + 1, y.cos(), y


@pytest.mark.parametrize("function", [read_late, written_early, written_by_a_step])
def test_static_results_fed_back_to_an_eager_step(
    function: Callable[..., tuple[Tensor, ...]], device: torch.device, options: dict[str, Any]
) -> None:
    """An argument that is a static result is read right by late eager steps, and what is written to it spoils no result."""
    compiled, _ = compile_both(function, {**options, "outputs": "static", "min_kernels": 1})
    mine, theirs = torch.ones(ROWS, device=device), torch.ones(ROWS, device=device)
    with torch.no_grad():
        for call in range(14):
            (x,) = vectors(call, device)
            made, wanted = compiled(x, mine), function(x, theirs)
            assert_same(made, wanted, f"call {call + 1}")
            mine, theirs = made[2], wanted[2]


def test_compare_mode_keeps_everything(device: torch.device, options: dict[str, Any]) -> None:
    """Compare mode looks at what segments made when later ones have run: there each keeps its memory."""
    needed = []
    for debug in ({}, {"debug": "compare"}):
        torch.compiler.reset()
        compiled, _ = compile_both(crosses(9), {**options, **debug})
        with torch.no_grad():
            for call in range(4):
                (x,) = vectors(call, device)
                assert_same(compiled(x), crosses(9)(x))
        needed.append(held(compiled))
    assert needed[0] <= 4 and needed[1] > 2 * 9


def test_results_of_eager_steps_go_during_a_recording(device: torch.device, options: dict[str, Any]) -> None:
    """A recording holds what an eager step made no longer than a replay does."""
    made: list[Any] = []
    alive: list[int] = []

    @torch.library.custom_op("lifetimes::watched", mutates_args=(), tags=silly.UNSAFE)
    def watched(x: Tensor) -> Tensor:
        alive.append(sum(_torch.live_storage(ref) is not None for ref in made))
        result = x * 3
        made.append(_torch.StorageWeakRef(result.untyped_storage()))
        return result

    watched.register_fake(torch.empty_like)

    def f(x: Tensor) -> Tensor:
        first = watched(x.sin())
        for _ in range(3):
            x = watched((x + first).sin())
        return watched(watched(watched(x))).cos() + first

    compiled, _ = compile_both(f, options)
    counts = []
    with torch.no_grad():
        for call in range(4):
            made.clear()
            alive.clear()
            compiled(*vectors(call, device))
            counts.append(list(alive))
    # A captured segment reads the first from its bridge, and so does all that comes after it. The last but one takes the
    # result of the one before it.
    assert counts[1] == counts[2] == counts[3] == [0, 0, 0, 0, 1, 1, 1]


# --- many programs and keys in one pool ------------------------------------------------------------------------------------


def churn(device: torch.device, numbers: random.Random) -> None:
    """Allocate and free on the device, as other code does between calls."""
    blocks = [torch.full((numbers.randrange(1, 1 << 16),), 7.0, device=device) for _ in range(4)]
    del blocks[:: numbers.randrange(1, 3)]
    if device.type == "cuda" and numbers.random() < 0.3:
        torch.cuda.empty_cache()


@strategies.composite
def long_programs(draw: strategies.DrawFn) -> Straight:
    """Two of the contract's random programs, one behind the other, with values of the first read in the second."""
    first, second = draw(programs()), draw(programs())
    count = first.inputs + sum(_makes(name) for name, _ in first.lines)
    shift = {position: draw(strategies.integers(0, count - 1)) for position in range(second.inputs)}
    lines = list(first.lines)
    # what the second takes for inputs is fresh: no element of them shares memory
    starts = {position: count + position for position in range(second.inputs)}
    lines += [("triple" if position else "sin", (shift[position],)) for position in range(second.inputs)]
    base = count + second.inputs
    moved = {p: starts[p] if p < second.inputs else base + p - second.inputs for p in range(200)}
    lines += [(name, tuple(moved[p] for p in positions)) for name, positions in second.lines]
    return Straight(first.inputs, tuple(lines), (*first.returned, *(moved[p] for p in second.returned)))


def _makes(name: str) -> bool:
    return name not in ("copy_row_", "fill_", "add_into", "writing_region", "notice", "unused", "unused_draw")


def in_one_pool(
    functions: list[Straight], order: list[int], device: torch.device, options: dict[str, Any], seed: int
) -> None:
    """Each call, in ``order``, does what eager does; results stay as they were returned."""
    torch.compiler.reset()
    numbers = random.Random(seed)
    compiled = [
        torch.compile(f.__call__, backend="breakable_cg", options={"min_kernels": 1, **options}) for f in functions
    ]
    kept = []
    for call, which in enumerate(order):
        torch.manual_seed(call)
        args = tuple(torch.rand(SIDE, SIDE, device=device) for _ in range(functions[which].inputs))
        mine, theirs = (tuple(arg.clone() for arg in args) for _ in range(2))
        churn(device, numbers)
        with torch.no_grad():
            torch.manual_seed(call)
            got = compiled[which](*mine)
            torch.manual_seed(call)
            want = functions[which](*theirs)
        assert_same(got, want, f"call {call + 1}, of program {which}")
        assert_same(mine, theirs, f"call {call + 1}: inputs")
        kept.append((got, want))
    for call, (got, want) in enumerate(kept):
        assert_same(got, want, f"call {call + 1}, at the end")


FEW = hypothesis.settings(
    max_examples=8, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
"""For programs that are compiled, several in each example."""


@pytest.mark.parametrize("part", range(3))
def test_random_programs_in_one_pool(part: int, device: torch.device, options: dict[str, Any]) -> None:
    """Random programs that share a pool, called in mixed order, do what eager does."""

    @FEW
    @hypothesis.seed(part)
    @hypothesis.given(
        strategies.lists(long_programs(), min_size=2, max_size=3),
        strategies.lists(strategies.integers(0, 2), min_size=8, max_size=14),
    )
    def run_examples(functions: list[Straight], order: list[int]) -> None:
        turns = [which % len(functions) for which in order]
        in_one_pool(functions, [*range(len(functions)), *turns], device, options, part)

    run_examples()


def fed_back(functions: list[Straight], order: list[int], device: torch.device, options: dict[str, Any]) -> None:
    """Results of each call, of whichever program, are arguments of the next one, as they lie."""
    torch.compiler.reset()
    numbers = random.Random(0)
    static = {"min_kernels": 1, "outputs": "static", **options}
    compiled = [torch.compile(f.__call__, backend="breakable_cg", options=static) for f in functions]
    results: list[Tensor] = []
    for call, which in enumerate(order):
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in results if tensor.is_contiguous()}
        given = [*storages.values()][: functions[which].inputs]
        args = [*given, *(torch.rand(SIDE, SIDE, device=device) for _ in range(functions[which].inputs - len(given)))]
        numbers.shuffle(args)
        copies = [arg.clone() for arg in args]
        with torch.no_grad():
            torch.manual_seed(call)
            results = [*compiled[which](*args)]
            torch.manual_seed(call)
            wanted = functions[which](*copies)
        # An argument that is returned may be memory that has a new result in it.
        memory = {copied.untyped_storage().data_ptr() for copied in copies}
        made = [at for at, value in enumerate(wanted) if value.untyped_storage().data_ptr() not in memory]
        results, wanted = ([values[at] for at in made] for values in (results, wanted))
        assert_same(results, wanted, f"call {call + 1}, of program {which}")


@pytest.mark.parametrize("part", range(3))
def test_random_static_results_fed_back(part: int, device: torch.device, options: dict[str, Any]) -> None:
    """Random programs take each other's static results as arguments, and write them, and compute what eager does."""

    @FEW
    @hypothesis.seed(part)
    @hypothesis.given(
        strategies.lists(long_programs(), min_size=2, max_size=2),
        strategies.lists(strategies.integers(0, 1), min_size=8, max_size=14),
    )
    def run_examples(functions: list[Straight], order: list[int]) -> None:
        fed_back(functions, [0, 1, *order], device, options)

    run_examples()


@pytest.mark.parametrize("spare", [0, pool_size.SPARE])
def test_keys_of_one_program_share_the_pool(
    spare: int, device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of all sizes, largest first and smallest first, are exact in whatever order they are called."""
    monkeypatch.setattr(pool_size, "SPARE", spare)
    numbers = random.Random(0)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        z = silly.triple(y)
        return breaks(z + y, 3) * y, y

    for sizes in (range(2, 12), range(12, 2, -1)):
        torch.compiler.reset()
        compiled, _ = compile_both(f, options, dynamic=True)
        order = [size for size in sizes for _ in range(3)] + numbers.choices(list(sizes), k=40)
        with torch.no_grad():
            for size in order:
                churn(device, numbers)
                x = torch.rand(size * 7, device=device)
                assert_same(compiled(x), f(x), f"size {size}")


# --- a larger key ------------------------------------------------------------------------------------------------------------


def grows(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    z = silly.triple(y)
    return breaks(z + y, 3) * y, y


@pytest.mark.parametrize("sizes", [range(1, 9), range(8, 0, -1)], ids=["ascending", "descending"])
def test_smaller_keys_move_to_the_pool_of_a_larger_one(
    sizes: range, device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that outgrows the pool has a new one to itself; the smaller are recorded anew in that, and then all replay."""
    monkeypatch.setattr(pool_size, "SPARE", 0)
    compiled, _ = compile_both(grows, options, dynamic=True)

    def calls(times: int) -> None:
        for _ in range(times):
            for size in sizes:
                x = torch.rand(size * 100, device=device)
                assert_same(compiled(x), grows(x), f"size {size}")

    with torch.no_grad():
        calls(3)
        settled = program_of(compiled)
        calls(3)
    after = program_of(compiled)
    assert after.captures == settled.captures
    assert [recording.num_graphs for recording in after.recordings] == [settled.num_graph_segments] * 8
    moves = 7 if sizes[0] == 1 else 0
    assert dict(after.recorded).get("moved to a larger pool", 0) == moves
    assert [note.partition(", out")[0] for note in after.notes] == ["moved to a larger pool: 7 times"][:moves]
    (executor,) = executors_of(compiled)
    assert executor.driver is not None
    assert executor.driver.live_graphs() == 8 * settled.num_graph_segments


def test_other_programs_move_too(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever recorded in a pool that is outgrown leaves it; a key that needs no more than the largest leaves all as it is."""
    monkeypatch.setattr(pool_size, "SPARE", 0)
    small, large, middle = (torch.rand(size, device=device) for size in (300, 900, 500))
    one, _ = compile_both(lambda x: breaks(x, 2), options)
    other, _ = compile_both(lambda x: breaks(x + 1, 2) * x, options)
    with torch.no_grad():
        for _ in range(3):
            one(small)
        for _ in range(3):
            other(large)
        assert [recording.num_graphs for recording in program_of(one).recordings] == [0]
        for _ in range(2):
            assert_same(one(small), breaks(small, 2))
            assert_same(other(large), breaks(large + 1, 2) * large)
        third, _ = compile_both(lambda x: breaks(x - 1, 2), options)
        for _ in range(3):
            assert_same(third(middle), breaks(middle - 1, 2))
    assert dict(program_of(one).recorded) == {"first of this program": 1, "moved to a larger pool": 1}
    assert dict(program_of(other).recorded) == {"first of this program": 1}


def test_what_is_spared_makes_no_move(device: torch.device, options: dict[str, Any]) -> None:
    """A pool may waste a little: small keys stay where they are, whatever comes."""
    compiled, _ = compile_both(grows, options, dynamic=True)
    with torch.no_grad():
        for size in range(1, 6):
            for _ in range(3):
                compiled(torch.rand(size * 100, device=device))
    after = program_of(compiled)
    assert "moved to a larger pool" not in after.recorded and after.notes == ()


def test_an_empty_pool_has_no_room(device: torch.device, options: dict[str, Any]) -> None:
    """Where nothing is recorded any more, nothing is remembered of how large the pool was."""
    compiled, _ = compile_both(grows, options)
    with torch.no_grad():
        for call in range(3):
            compiled(*vectors(call, device))
    driver = driver_behind(compiled)
    assert driver.pool_size.largest
    reset(compiled)
    assert driver.pool_size == pool_size.PoolSize()


@pytest.mark.gpu
@torch.no_grad()
def test_a_pool_is_as_large_as_its_largest_key() -> None:
    """Keys that come one after the other, each larger, take no more in the end than the largest alone."""
    sizes, taken = [(number + 1) << 20 for number in range(8)], []
    for order in (sizes[-1:], sizes[::-1], sizes):
        torch.compiler.reset()
        compiled, _ = compile_both(grows, {"driver": "cuda"}, dynamic=True)
        for _ in range(4):
            for size in order:
                x = torch.rand(size, device="cuda")
                assert_same(compiled(x), grows(x))
        taken.append(driver_behind(compiled).pool_bytes())
    assert max(taken) <= 1.1 * taken[0], taken


def test_what_is_needed_at_once(device: torch.device, options: dict[str, Any]) -> None:
    """What a key needs is told from its program before it is recorded, as it is counted after it."""
    for function in (crosses(1), crosses(9), read_twice, bridged_twice, an_input_twice, bulges):
        torch.compiler.reset()
        compiled, _ = compile_both(function, options)
        with torch.no_grad():
            for call in range(3):
                compiled(*vectors(call, device))
        (executor,) = executors_of(compiled)
        assert needed(executor.program, {}) == held(compiled) * 4 * ROWS


# --- threads -----------------------------------------------------------------------------------------------------------------


def test_threads_that_share_a_pool(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of several threads, with keys that move to larger pools, do what eager does."""
    monkeypatch.setattr(pool_size, "SPARE", 0)
    compiled, _ = compile_both(grows, options, dynamic=True)
    with torch.no_grad():
        for size in (10, 20):
            compiled(torch.rand(size, device=device))
    errors: list[BaseException] = []
    inputs = [torch.rand(10 * size, device=device) for size in range(1, 9)]  # a draw while others capture would fail

    def calls(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            with torch.no_grad():
                for call in range(30):
                    x = numbers.choice(inputs)
                    assert_same(compiled(x), grows(x), f"thread {seed}, call {call + 1}")
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert errors == []
    (executor,) = executors_of(compiled)
    assert executor.driver is not None and executor.driver.live_graphs() > 0
