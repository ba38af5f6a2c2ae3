"""The executor: what a key is, when a call is plain, recorded or replayed, and what is kept for how long.

Most tests call an executor directly, on a graph traced without Dynamo; what only ``torch.compile`` shows is at the end.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import breakable_backend
import silly
from breakable_backend import CaptureError, PartitionError
from breakable_backend.active import calling, in_call
from breakable_backend.calling import eviction
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry, scalar_bytes
from breakable_backend.calling.registry import executors_of
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.scope import scope_for
from breakable_backend.drivers import CaptureDriver
from breakable_backend.marks.rules import Scope
from breakable_backend.options import Options
from breakable_backend.recordings.observer import Observers, Subject, observers_of
from checks import compile_both
from gpu import settled
from graphs import cuda, host, trace

CPU = torch.device("cpu")


class Make:
    """Makes executors on one driver, and resets them when the test ends."""

    def __init__(self, driver: CaptureDriver) -> None:
        self.driver, self.device = driver, driver.device
        self.made: list[Executor] = []

    def __call__(
        self,
        function: Callable[..., Any],
        *examples: Any,
        static: Iterable[int] = (),
        mode: str = "fake",
        scope: Scope | None = None,
        **options: Any,
    ) -> Executor:
        def as_tuple(*args: Any) -> tuple[Any, ...]:
            result = function(*args)
            return result if isinstance(result, tuple) else (result,)

        gm = make_fx(as_tuple, tracing_mode=mode)(*examples)
        chosen = Options.parse({"min_kernels": 1, **options}, {})
        lowered = Lowered(gm, frozenset(static))
        scope = scope_for(lowered, Scope(self.device), chosen) if scope is None else scope
        observers = observers_of(Subject("graph 0", chosen, logging.getLogger(__name__)))
        executor = Executor(lowered, scope, chosen, self.driver, "graph 0", observers)
        self.made.append(executor)
        return executor

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, device=self.device)


@pytest.fixture
def make(driver: CaptureDriver) -> Iterator[Make]:
    """Makes executors on each driver."""
    make = Make(driver)
    yield make
    for executor in make.made:
        executor.reset()
    make.made.clear()


def entries(executor: Executor) -> list[Entry]:
    return [entry for addresses in executor.keys.sets.values() for entry in addresses.entries.values()]


def ways(executor: Executor, *calls: list[Any]) -> list[str]:
    """How each of several calls ran: why it was plain, or "record" or "replay"."""
    found = []
    for args in calls:
        plain = executor.statistics.plain.copy()
        recordings = executor.statistics.recordings
        executor(args)
        (new,) = [*(executor.statistics.plain - plain)] or [
            "record" if executor.statistics.recordings > recordings else "replay"
        ]
        found.append(new)
    return found


def sines(x: Tensor) -> Tensor:
    return x.sin() + 1


# --- calls ------------------------------------------------------------------------------------------------------------------


def test_calls_of_a_key(make: Make) -> None:
    """Call 1 of a key is plain, call 2 records, all others replay, and each returns what eager does."""
    executor = make(lambda x: silly.triple(x.sin()) + 1, make.ones(3))
    for number in range(5):
        x = torch.full((3,), float(number), device=make.device)
        args = [x]
        (result,) = executor(args)
        assert torch.equal(result, x.sin() * 3 + 1)
        assert args == []
    statistics = executor.statistics
    assert (statistics.calls, statistics.recordings, statistics.captures) == (5, 1, 2)
    assert dict(statistics.plain) == {"warm-up": 1}
    (entry,) = entries(executor)
    assert (entry.calls, entry.captures, entry.replays) == (5, 2, 3)


def test_a_copy_that_its_fake_takes_for_a_view(make: Make) -> None:
    """What is a view by its fake, and in truth a copy, is made in each call."""

    def copied(x: Tensor) -> tuple[Tensor]:
        return (silly.triple((x.sin() + 1).clone()) + 1,)

    gm = make_fx(copied, tracing_mode="fake")(make.ones(3))
    (clone,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    clone.meta["val"] = clone.args[0].meta["val"].view(3)
    executor = Executor(
        Lowered(gm, frozenset()),
        Scope(make.device),
        Options.parse({"min_kernels": 1}, {}),
        make.driver,
        "",
        Observers(),
    )
    make.made.append(executor)
    for number in range(4):
        x = make.ones(3) * number
        (result,) = executor([x])
        assert torch.equal(result, copied(x)[0])


def test_nothing_to_capture(make: Make) -> None:
    """A program without captured segments runs plainly and has no keys."""
    executor = make(lambda x: silly.triple(x), make.ones(3))
    assert ways(executor, *([make.ones(3)] for _ in range(3))) == ["nothing to capture"] * 3
    assert executor.keys.sets == {}


def test_inside_an_eager_step(make: Make) -> None:
    """A call made while a compiled function runs in the same context is plain."""
    executor = make(sines, make.ones(3))
    with calling():
        assert ways(executor, [make.ones(3)]) == ["called inside an eager step"]
    assert ways(executor, [make.ones(3)]) == ["warm-up"]
    assert not in_call()


def test_inside_another_capture(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside somebody else's capture a program without eager steps runs plainly; one with is refused."""
    plain = make(sines, make.ones(3))
    broken = make(lambda x: silly.triple(x.sin()) + 1, make.ones(3))
    monkeypatch.setattr(type(make.driver), "is_capturing", lambda self: True)
    assert ways(plain, [make.ones(3)]) == ["called inside another capture"]
    with pytest.raises(CaptureError, match="eager step: silly::triple"):
        broken([make.ones(3)])


def test_under_a_dispatch_mode(make: Make) -> None:
    """Under a dispatch mode, which must see every op, calls are plain."""

    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    executor = make(sines, make.ones(3))
    ways(executor, *([make.ones(3)] for _ in range(3)))
    x = make.ones(3)
    with Counting():
        assert ways(executor, [x]) == ["a dispatch mode is active"]
    assert Counting.seen == 2


def test_error_while_recording(make: Make) -> None:
    """A recording that an eager step interrupts is dropped; the next call records."""
    executor = make(lambda x: silly.fragile(x.sin()) + 1, make.ones(3))
    assert ways(executor, [make.ones(3)]) == ["warm-up"]

    def explode(*args: Any) -> None:
        raise KeyError("mine")

    silly.hooks["fragile"] = explode
    try:
        with pytest.raises(KeyError):
            executor([make.ones(3)])
    finally:
        silly.hooks.clear()
    assert [entry.recording for entry in entries(executor)] == [None]
    assert make.driver.live_blocks() == 0
    assert ways(executor, [make.ones(3)], [make.ones(3)]) == ["record", "replay"]


def test_segment_that_cannot_be_captured(make: Make) -> None:
    """An op whose capture failed is eager for the keys that come after, and for nothing else."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple(x.sin())
        y = silly.stubborn(y) + 1
        return silly.triple(y) * 2

    executor = make(f, torch.ones(3, 2, device=make.device), mode="symbolic")
    assert len(executor.program.graph_segments) == 3
    assert ways(executor, *([make.ones(3, 2)] for _ in range(3))) == ["warm-up", "record", "replay"]
    (failed,) = [reason for reason in executor.program.reasons if reason.rule == "capture_failed"]
    assert failed.op == "silly::stubborn"
    assert ways(executor, *([make.ones(5, 2)] for _ in range(3))) == ["warm-up", "record", "replay"]
    assert [entry.captures for entry in entries(executor)] == [
        3,
        3,
    ]  # what is behind the op, in the middle segment, too
    assert ways(executor, [make.ones(3, 2)]) == ["replay"]


# --- keys -------------------------------------------------------------------------------------------------------------------


def test_scalar_bytes() -> None:
    """A host scalar's part of the key tells what ``==`` does not, and knows a NaN again."""
    of = scalar_bytes
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        zero, minus = torch.tensor(0.0, dtype=dtype), torch.tensor(-0.0, dtype=dtype)
        nan = torch.tensor(math.nan, dtype=dtype)
        assert of(zero) == of(zero.clone())
        assert of(zero) != of(minus)
        assert of(nan) == of(nan.clone())
        assert of(nan) != of(zero)
    assert of(torch.tensor(1)) != of(torch.tensor(1.0))
    assert of(torch.tensor(True)) != of(torch.tensor(1, dtype=torch.uint8))
    assert of(torch.tensor(1 + 2j)) != of(torch.tensor(1 - 2j))
    with torch.enable_grad():
        assert of(torch.tensor(2.0, requires_grad=True)) == of(torch.tensor(2.0))


def test_key_reads_numbers(make: Make) -> None:
    """Every number among the arguments is in the key."""
    executor = make(lambda x, n: x + n, make.ones(3), 5, mode="symbolic")
    first, again, other = (executor.reader.read([make.ones(3), n]) for n in (5, 5, 6))
    assert first == again
    assert first != other
    assert first.addresses == ()


def test_key_reads_open_layouts(make: Make) -> None:
    """Shapes and strides that were left open are in the key, with dtype and device; others are Dynamo's to guard."""
    executor = make(lambda x: x + 1, make.ones(3, 4), mode="symbolic")
    read = executor.reader.read
    assert read([make.ones(3, 4)]) == read([make.ones(3, 4)])
    assert read([make.ones(3, 4)]) != read([make.ones(4, 3)])
    assert read([make.ones(3, 4)]) != read([make.ones(4, 3).t()])
    assert read([make.ones(3, 4)]) != read([make.ones(3, 4).double()])
    fixed = make(lambda x: x + 1, make.ones(3, 4))
    assert fixed.reader.read([make.ones(3, 4)]).shapes == ()


def test_key_reads_addresses(make: Make) -> None:
    """Addresses of static inputs, and of inputs that captured segments write, are in the key; others are not."""

    def f(w: Tensor, written: Tensor, x: Tensor, by_eager: Tensor) -> Tensor:
        written.add_(1)
        silly.add_into(by_eager, x)
        return w * x + by_eager

    executor = make(f, *(make.ones(3) for _ in range(4)), static=[0])
    args = [make.ones(3) for _ in range(4)]
    key = executor.reader.read(args)
    assert key.addresses == (args[0].data_ptr(), args[1].data_ptr())
    assert executor.reader.read([*args[:2], make.ones(3), make.ones(3)]) == key


def test_keys_are_recorded_each(make: Make) -> None:
    """Each key has its own recording, and all are replayed in any order."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic")
    for n in (5, 6, 7):
        assert ways(executor, *([make.ones(3), n] for _ in range(3))) == ["warm-up", "record", "replay"]
    for n in (6, 5, 7, 6):
        assert torch.equal(executor([make.ones(3), n])[0], (make.ones(3) + n).sin())
    # 1 in turn; then 6 twice, 5 and 7 once
    assert {entry.key.shapes[0]: entry.replays for entry in entries(executor)} == {5: 2, 6: 3, 7: 2}


# --- bounds -----------------------------------------------------------------------------------------------------------------


def test_more_keys_than_recordings(make: Make) -> None:
    """Beyond ``max_recordings`` a new key is plain while the others are in use, and the others keep their recordings."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic", max_recordings=2)
    for n in (5, 6):
        ways(executor, *([make.ones(3), n] for _ in range(2)))
    for _ in range(20):
        assert ways(executor, *([make.ones(3), n] for n in (5, 6, 7))) == [
            "replay",
            "replay",
            "more than max_recordings=2 keys in use",
        ]
    assert executor.statistics.recordings == 2
    assert executor.statistics.evictions == 0


def test_idle_key_is_evicted(make: Make) -> None:
    """The least recently used key goes for a new one after ``IDLE_FACTOR * max_recordings`` calls without it."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic", max_recordings=2)
    for n in (5, 6):
        ways(executor, *([make.ones(3), n] for _ in range(2)))  # calls 1 to 4; the last of key 5 is call 2
    idle = eviction.IDLE_FACTOR * 2
    # calls 5 to 9: fewer than 8 since call 2; call 10 is the 8th
    for call in range(5, 2 + idle):
        assert ways(executor, [make.ones(3), 7]) == ["more than max_recordings=2 keys in use"], call
    assert ways(executor, *([make.ones(3), 7] for _ in range(3))) == ["warm-up", "record", "replay"]
    assert executor.statistics.evictions == 1
    assert [entry.key.shapes[0] for entry in entries(executor)] == [6, 7]
    assert len(entries(executor)) == 2
    assert ways(executor, [make.ones(3), 6]) == ["replay"]


def test_use_keeps_a_key(make: Make) -> None:
    """A replay makes a key the most recently used: the other one goes."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic", max_recordings=2)
    for n in (5, 6):
        ways(executor, *([make.ones(3), n] for _ in range(2)))
    ways(executor, *([make.ones(3), 5] for _ in range(20)))
    assert ways(executor, [make.ones(3), 7]) == ["warm-up"]
    assert [entry.key.shapes[0] for entry in entries(executor)] == [5, 7]


def test_new_key_is_younger_than_the_last_replay(make: Make) -> None:
    """A key that was recorded and never replayed is not younger for ever than one that replays again and again."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic", max_recordings=2)
    ways(executor, *([make.ones(3), 5] for _ in range(3)))
    ways(executor, *([make.ones(3), 6] for _ in range(2)))
    ways(executor, *([make.ones(3), 5] for _ in range(20)))
    assert ways(executor, [make.ones(3), 7]) == ["warm-up"]
    assert [entry.key.shapes[0] for entry in entries(executor)] == [5, 7]


def test_evicted_counts_stay(make: Make) -> None:
    """Replays and copies of a recording that is gone stay in the statistics."""
    executor = make(lambda x, n: (x + n).sin(), make.ones(3), 5, mode="symbolic", max_recordings=1)
    ways(executor, *([make.ones(3), 5] for _ in range(4)))
    ways(executor, *([make.ones(3), 6] for _ in range(8)))
    assert executor.statistics.evictions == 1
    assert executor.statistics.finished_replays == 2
    assert executor.statistics.finished_copies == 3  # x, once in recording and in each replay


def test_address_sets_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond ``MAX_ADDRESS_SETS`` a new set of addresses is plain, until the oldest was idle for long enough."""
    monkeypatch.setattr(eviction, "MAX_ADDRESS_SETS", 2)
    executor = make(lambda w, x: (w * x).sin(), make.ones(3), make.ones(3), static=[0])
    weights = [torch.full((3,), float(n), device=make.device) for n in range(3)]
    for w in weights[:2]:
        assert ways(executor, *([w, make.ones(3)] for _ in range(3))) == ["warm-up", "record", "replay"]
    assert ways(executor, [weights[2], make.ones(3)]) == ["more than 2 sets of static addresses in use"]
    ways(executor, *([weights[1], make.ones(3)] for _ in range(eviction.IDLE_FACTOR * 2)))
    assert ways(executor, *([weights[2], make.ones(3)] for _ in range(3))) == ["warm-up", "record", "replay"]
    assert len(executor.keys.sets) == 2
    assert executor.statistics.evictions == 1
    assert ways(executor, [weights[1], make.ones(3)]) == ["replay"]


def test_sets_stand_in_order_of_use(make: Make) -> None:
    """Sets of addresses stand in the order in which they were used last, whether by a replay or as new ones."""
    executor = make(lambda x, w: (w * x).sin(), make.ones(3), make.ones(3), static=[1])
    first, second, third = (torch.full((3,), float(n), device=make.device) for n in range(3))
    for used in (first, second):
        ways(executor, *([make.ones(3), used] for _ in range(3)))
    for used in (first, first, third, first, second, second):
        executor([make.ones(3), used])
        assert next(reversed(executor.keys.sets)) == (used.data_ptr(),)


def test_static_input_at_another_address(make: Make) -> None:
    """A static input whose memory was swapped is another key, also where somebody keeps the memory of before."""
    executor = make(lambda x, w: (w * x).sin(), make.ones(3), make.ones(3), static=[1])
    weight = make.ones(3)
    before = weight.data
    assert ways(executor, *([make.ones(3), weight] for _ in range(3))) == ["warm-up", "record", "replay"]
    weight.data = make.ones(3) * 2
    assert ways(executor, *([make.ones(3), weight] for _ in range(3))) == ["warm-up", "record", "replay"]
    assert torch.equal(executor([make.ones(3), weight])[0], weight.sin())
    weight.data = before
    assert ways(executor, [make.ones(3), weight]) == ["replay"]
    assert torch.equal(executor([make.ones(3), weight])[0], before.sin())


def test_shape_keys_are_bounded_for_each_set(make: Make) -> None:
    """``max_recordings`` counts the keys of one set of addresses."""
    executor = make(
        lambda w, x, n: (w * x + n).sin(), make.ones(3), make.ones(3), 5, static=[0], mode="symbolic", max_recordings=1
    )
    weights = [make.ones(3), make.ones(3)]
    for w in weights:
        assert ways(executor, *([w, make.ones(3), 5] for _ in range(3))) == ["warm-up", "record", "replay"]
        assert ways(executor, [w, make.ones(3), 6]) == ["more than max_recordings=1 keys in use"]


def test_set_goes_with_its_static_input(make: Make) -> None:
    """When a static input dies, what was recorded for its address goes at once."""
    executor = make(lambda w, x: (w * x).sin(), make.ones(3), make.ones(3), static=[0])
    first, second = make.ones(3), make.ones(3)
    for w in (first, second):
        ways(executor, *([w, make.ones(3)] for _ in range(3)))
    del w, first
    assert len(executor.keys.sets) == 1
    assert len(entries(executor)) == 1
    assert ways(executor, [second, make.ones(3)]) == ["replay"]


def test_written_input_at_many_addresses(make: Make) -> None:
    """An input that captured segments write is keyed at ``MAX_ADDRESSES`` addresses, and bridged from then on."""

    def f(x: Tensor) -> Tensor:
        x.add_(1)
        return x.sin()

    executor = make(f, make.ones(3))
    kept = []
    for number in range(eviction.MAX_ADDRESSES):
        kept.append(torch.full((3,), float(number), device=make.device))
        executor([kept[-1]])
        assert torch.equal(kept[-1], torch.full_like(kept[-1], number + 1.0))
    assert executor.notes == []
    assert len(executor.keys.sets) == eviction.MAX_ADDRESSES
    kept += [make.ones(3) for _ in range(3)]
    assert ways(executor, *([x] for x in kept[-3:])) == ["warm-up", "record", "replay"]
    assert all(torch.equal(x, make.ones(3) * 2) for x in kept[-3:])
    assert executor.notes == [
        "arg0_1 is written by captured segments and came at more than 4 addresses: copied in and back"
    ]
    assert len(executor.keys.sets) == 1
    (entry,) = entries(executor)
    assert entry.recording is not None
    assert entry.recording.num_copies == 2


def test_no_orphans_after_a_failed_capture(make: Make) -> None:
    """When a segment becomes eager and keys are read in another way, what was recorded under the old keys is released."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        y = silly.triple(y.sin())
        x.add_(1)
        z = silly.stubborn(x + y)
        return silly.triple(z) * 2

    executor = make(f, make.ones(3), make.ones(3))
    ways(executor, *([make.ones(3), make.ones(3)] for _ in range(8)))
    recorded = [entry for entry in entries(executor) if entry.recording is not None]
    assert {len(entry.key.addresses) for entry in recorded} == {len(executor.reader.read([make.ones(3)] * 2).addresses)}


def test_scalar_with_many_values(make: Make) -> None:
    """A host scalar is keyed for ``MAX_SCALAR_VALUES`` values; then what reads it is for the rules to judge again."""
    scope = Scope(make.device, host_scalars=frozenset({"arg1_1"}))
    executor = make(lambda x, s: (x.sin() * s).cos() + 1, make.ones(3), torch.tensor(1.0), scope=scope)
    values = [torch.tensor(float(n)) for n in range(eviction.MAX_SCALAR_VALUES + 1)]
    for s in values[:-1]:
        assert ways(executor, *([make.ones(3), s] for _ in range(2))) == ["warm-up", "record"]
    assert ways(executor, [make.ones(3), torch.tensor(0.0)], [make.ones(3), torch.tensor(-0.0)])[0] == "replay"
    (note,) = executor.notes
    assert note == (
        "host scalar arg1_1 had more than 4 values: the ops that read it run eagerly; pass it as a tensor on "
        f"{executor.driver.device}, or compile with options={{'scalars': 'device'}}"
    )
    assert executor.scope.host_scalars == frozenset()
    assert make.driver.live_blocks() == 0
    for number in range(6):
        x, s = make.ones(3), torch.tensor(float(number))
        assert torch.equal(executor([x, s])[0], (x.sin() * s).cos() + 1)
    assert len(entries(executor)) == 1


# --- release ----------------------------------------------------------------------------------------------------------------


def test_reset(make: Make) -> None:
    """After a reset nothing is kept, and the next call of a key is its first."""
    executor = make(sines, make.ones(3))
    ways(executor, *([make.ones(3)] for _ in range(4)))
    assert make.driver.live_graphs() > 0
    executor.reset()
    assert executor.keys.sets == {}
    assert make.driver.live_blocks() == 0
    assert executor.statistics.finished_replays == 2
    assert ways(executor, *([make.ones(3)] for _ in range(3))) == ["warm-up", "record", "replay"]


def test_reset_during_a_call(make: Make) -> None:
    """A reset by an eager step takes effect when the call is over; the call returns what eager does."""
    executor = make(lambda x: silly.fragile(x.sin()) + 1, make.ones(3))
    x = make.ones(3)
    want = executor([x])[0]
    executor([x])
    silly.hooks["fragile"] = lambda *args: executor.reset()
    try:
        assert torch.equal(executor([x])[0], want)
    finally:
        silly.hooks.clear()
    assert executor.keys.sets == {}
    assert make.driver.live_blocks() == 0


def test_eviction_does_not_wait(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes room for another key is released without a wait; a reset waits, and gives up the pool with it."""
    executor = make(lambda x: x.sin() + 1, make.ones(4), mode="symbolic", max_recordings=1)
    waits, real = [], make.driver.release

    def release(graphs: Any, owner: Any = None, *, wait: bool = True) -> None:
        waits.append(wait)
        real(graphs, owner, wait=wait)

    monkeypatch.setattr(make.driver, "release", release)
    for size in (2, 3, 5):
        for _ in range(6):
            executor([make.ones(size)])
    assert executor.statistics.evictions == 2 and waits == [False, False]
    executor.reset()
    assert set(waits[2:]) == {True}
    assert make.driver.live_blocks() == 0 and make.driver.pool_bytes() == 0


def test_a_death_does_not_wait(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was recorded for a static input that dies, or for a function that is dropped, is released without a wait."""
    executor = make(lambda x, w: (x @ w).sin() + 1, make.ones(2, 2), make.ones(2, 2), static={1})
    waits, settles, real, settle = [], [], make.driver.release, make.driver.settle

    def release(graphs: Any, owner: Any = None, *, wait: bool = True) -> None:
        waits.extend([wait] if graphs else [])
        real(graphs, owner, wait=wait)

    monkeypatch.setattr(make.driver, "release", release)
    monkeypatch.setattr(make.driver, "settle", lambda: (settles.append(len(waits)), settle()))
    weights = [make.ones(2, 2), make.ones(2, 2)]
    for weight in weights:
        assert ways(executor, *([make.ones(2, 2), weight] for _ in range(3)))[-1] == "replay"
    del weight, weights[0]
    assert (waits, settles) == ([False], [1])
    make.made.clear()
    del executor
    gc.collect()
    assert (waits, settles) == ([False, False], [1, 2])
    assert settled(make.driver)


def test_a_reset_waits_for_what_was_dropped(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reset of everything nothing is left, of functions that were dropped before either, whatever the GPU is at."""
    compiled, _ = compile_both(lambda x: silly.triple(x.sin() + 1) + 1, options)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(4, device=device))
    (driver,) = {executor.driver for executor in executors_of(compiled)}
    waits, real = [], driver.release

    def release(graphs: Any, owner: Any = None, *, wait: bool = True) -> None:
        waits.append(wait)
        real(graphs, owner, wait=wait)

    monkeypatch.setattr(driver, "release", release)
    del compiled
    torch._dynamo.reset()
    assert waits[-1] and driver.live_blocks() == 0
    waits.clear()
    breakable_backend.reset()
    assert waits == [True]


def test_executor_that_is_dropped(make: Make) -> None:
    """What an executor recorded goes with it, and the pool with its last recording."""
    executor = make(sines, make.ones(3))
    ways(executor, *([make.ones(3)] for _ in range(3)))
    assert make.driver.pool_bytes() > 0
    make.made.clear()
    del executor
    gc.collect()
    assert settled(make.driver)


# --- scope ------------------------------------------------------------------------------------------------------------------


def test_host_scalars_of_a_graph() -> None:
    """0-d inputs on the host are host scalars where the capture device is another."""
    gm = trace(lambda x, s, i, v: (x * s, v), cuda(4), host(), cuda(), host(1))
    lowered = Lowered(gm, frozenset())
    assert scope_for(lowered, Scope(torch.device("cuda", 0)), Options()).host_scalars == {"s_1"}
    assert scope_for(lowered, Scope(CPU), Options()).host_scalars == frozenset()


def test_auto_break_off() -> None:
    """With ``auto_break=False`` what a rule refuses is an error, and what is marked or too small is not."""
    options = Options.parse({"auto_break": False}, {})
    scope = Scope(torch.device("cuda", 0))

    def check(function: Callable[..., Any]) -> None:
        scope_for(Lowered(trace(function, cuda(4)), frozenset()), scope, options)

    check(lambda x: (silly.triple(x) + 1,))
    check(lambda x: (silly.triple((x + 1) * 2),))
    with pytest.raises(PartitionError, match="aten::nonzero cannot be captured: waits for the host on CUDA"):
        check(lambda x: (torch.ops.aten.nonzero.default(x),))


# --- through torch.compile --------------------------------------------------------------------------------------------------


def test_instances_of_one_class(device: torch.device, options: dict[str, Any]) -> None:
    """Instances of one class share a compiled function, and each has its own set of addresses."""
    blocks = [silly.Block(4).to(device) for _ in range(3)]
    for block in blocks:
        block.compile(backend="breakable_cg", options=options)
    with torch.no_grad():
        for number in range(4):
            for block in blocks:
                x = torch.full((2, 4), float(number), device=device)
                y = torch.nn.functional.gelu(block.linear(block.norm(x)))
                assert torch.equal(block(x), y + (y + y + y))
    (executor,) = executors_of(blocks[0])
    assert len(executor.keys.sets) == 3
    assert [entry.replays for entry in entries(executor)] == [2, 2, 2]


def test_dynamic_shapes(device: torch.device, options: dict[str, Any]) -> None:
    """Under ``dynamic=True`` each size is a key of one program."""
    compiled = torch.compile(sines, backend="breakable_cg", options=options, dynamic=True)
    with torch.no_grad():
        for size in (3, 4, 5):
            for number in range(3):
                x = torch.full((size,), float(number), device=device)
                assert torch.equal(compiled(x), sines(x))
    (executor,) = executors_of(compiled)
    assert [entry.replays for entry in entries(executor)] == [1, 1, 1]
