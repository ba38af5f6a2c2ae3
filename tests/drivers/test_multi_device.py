"""A program on several GPUs of one process: each segment is captured on one of them, and copies between them are eager."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import breakable_backend
import silly
from breakable_backend import BreakableCUDAGraph, CaptureError, capture, eager_on_graph, explain
from breakable_backend.calling.registry import executors_of
from breakable_backend.calling.release import run_deferred
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.drivers import CaptureDriver
from breakable_backend.drivers.multi_device import DeviceGroup
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.ir.program import GraphSegment, Program
from breakable_backend.marks.rules import Scope
from breakable_backend.recordings.host_syncs import Finder
from checks import assert_same, program_of
from gpu import compiled, settled
from graphs import trace

ONE, TWO = torch.device("cuda", 0), torch.device("cuda", 1)
on_two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def with_two_gpus(test: Callable[..., None]) -> Any:
    for mark in on_two_gpus:
        test = mark(test)
    return test


# --- how a program is cut -------------------------------------------------------------------------------------------------


on_both = [functools.partial(torch.empty, 4, device=device) for device in (ONE, TWO)]


def parted(function: Callable[..., Any], *, min_kernels: int = 1) -> Program:
    """``function`` of a tensor on each of two GPUs, both captured on; there need not be any."""
    lowered = Lowered(trace(function, *on_both), frozenset())
    return partition(lowered, Scope(ONE, others=(TWO,)), min_kernels=min_kernels)


def places(program: Program) -> list[str]:
    """Where each segment is captured; "eager" for the others."""
    return [str(s.device) if isinstance(s, GraphSegment) else "eager" for s in program.segments]


def test_segments_change_with_the_device() -> None:
    """A captured segment has ops of one device, and a copy between devices is eager, with that as its reason."""
    program = parted(lambda x, y: ((x.sin() + 1).to(TWO) * y.cos(),))
    assert places(program) == ["cuda:0", "eager", "cuda:1"]
    (reason,) = program.reasons
    assert str(reason).startswith("aten::_to_copy: moves data between cuda:0 and cuda:1")
    assert "segment 2: captured on cuda:1" in str(program)


def test_segments_of_two_devices_touch() -> None:
    """Where the device changes and nothing is copied, one captured segment follows the other."""
    program = parted(lambda x, y: (x.sin(), y.cos(), x + 1))
    assert places(program) == ["cuda:0", "cuda:1", "cuda:0"]


def test_few_ops_on_another_device() -> None:
    """``min_kernels`` holds for the segments of each device."""
    program = parted(lambda x, y: (x.sin() + 1, y.cos()), min_kernels=2)
    assert places(program) == ["cuda:0", "eager"]
    assert program.reasons[0].rule == "min_kernels"


def test_views_are_made_where_they_are_read() -> None:
    """A view of a tensor on another device launches nothing, and cuts nothing."""
    program = parted(lambda x, y: (x.sin() + y.view(2, 2).sum().to(ONE), y.view(2, 2) + 1))
    assert places(program) == ["cuda:0", "cuda:1", "eager", "cuda:0", "cuda:1"]


def test_custom_ops_are_observed_where_they_run() -> None:
    """A custom op on another GPU is observed as an op of that GPU, and not as one off the capture device."""
    graph = trace(lambda x, y: (silly.wave(x), silly.wave(y)), *on_both)
    finder = Finder((ONE, TWO), inside=True)
    found = [finder.place(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert found == [ONE, TWO]
    assert finder.place(trace(lambda: (torch.ones(2),)).graph.output_node()) == ONE


# --- the group, without a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> DeviceGroup:
    """Two drivers, for what a group does with them; both tapes are on the CPU."""
    return DeviceGroup(TapeDriver(torch.device("cpu")), [TapeDriver(torch.device("cpu"))])


def of(group: DeviceGroup) -> Sequence[CaptureDriver]:
    return group._drivers


def test_a_call_has_the_locks_of_all(group: DeviceGroup) -> None:
    """While a group is locked, no other thread has one of its drivers; where one is taken, it takes none."""
    got: list[bool] = []

    def elsewhere(do: Callable[[], Any]) -> None:
        thread = threading.Thread(target=do)
        thread.start()
        thread.join()

    def take(lock: Any) -> None:
        if taken := lock.acquire(blocking=False):
            lock.release()
        got.append(taken)

    with group.lock:
        for driver in of(group):
            elsewhere(lambda driver=driver: take(driver.lock))
    for driver in of(group):
        with driver.lock:
            elsewhere(lambda: take(group.lock))
            elsewhere(lambda: got.append(group.lock.acquire(timeout=0.01)))
    elsewhere(lambda: take(group.lock))
    assert got == [False] * 6 + [True]


def test_a_call_is_under_way_in_all(group: DeviceGroup) -> None:
    """A call of a group is one of each driver, and the other way round."""
    for driver in of(group):
        driver.busy = True
        assert group.busy
        driver.busy = False
    group.busy = True
    assert all(driver.busy for driver in of(group))
    group.busy = False
    assert not any(driver.busy for driver in of(group))


def test_what_waits_runs_when_any_call_ends(group: DeviceGroup) -> None:
    """What a group has deferred runs once, when a call ends on any of its devices, and not while one is busy."""
    done: list[int] = []
    for driver in of(group):
        group.deferred.append(lambda: done.append(1))
        group.busy = True
        while driver.deferred:
            driver.deferred.popleft()()
        assert not done
        group.busy = False
        group.deferred.append(lambda: done.append(2))
        while driver.deferred:
            driver.deferred.popleft()()
        assert done == [1, 2]
        done.clear()


def test_what_waits_is_not_forgotten(group: DeviceGroup) -> None:
    """What a group has deferred runs, even if each end of a call finds another device busy with a call of another thread."""

    def call(driver: CaptureDriver) -> Callable[[], None]:
        """Begin a call in another thread; returns what ends it."""
        begun, over = threading.Event(), threading.Event()

        def body() -> None:
            with driver.lock:
                begun.set()
                over.wait(20)
            run_deferred(driver)

        thread = threading.Thread(target=body)
        thread.start()
        begun.wait(20)

        def end() -> None:
            over.set()
            thread.join()

        return end

    one, other = of(group)
    done: list[int] = []
    ends = call(one), call(other)
    group.deferred.append(lambda: done.append(1))
    ends[1]()
    again = call(other)
    ends[0]()
    assert not done
    again()
    assert done == [1]


def test_tenants_of_all(group: DeviceGroup) -> None:
    """Who is in the pool of a group is in each of its pools until it goes."""
    tenant: Any = lambda: None  # noqa: E731
    group.tenants.append(tenant)
    assert [driver.tenants for driver in of(group)] == [[tenant], [tenant]]
    assert list(group.tenants) == [tenant]
    group.tenants.remove(tenant)
    assert [driver.tenants for driver in of(group)] == [[], []]


def test_owner_goes_with_the_last(group: DeviceGroup) -> None:
    """What graphs read is held until each driver is done with its own, and gone then."""

    class Held(list[Any]):
        cleared = 0

        def clear(self) -> None:
            Held.cleared += 1
            super().clear()

    shares: list[Any] = []

    def keep(graphs: Any, owner: Any = None, *, wait: bool = True) -> None:
        if owner is not None:
            shares.append(owner)

    owner = Held([object()])
    for driver in of(group):
        driver.release = keep  # type: ignore[method-assign]
    group.release((), owner, wait=False)
    first, second = shares
    first.clear()
    assert len(owner) == 1
    second.clear()
    assert (len(owner), Held.cleared) == (0, 1)


# --- two GPUs -------------------------------------------------------------------------------------------------------------


class Half(nn.Module):
    """Layers with a cache that they write."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        self.seen.add_(x.mean(0))
        return x + self.seen


class Split(nn.Module):
    """A half on each of two GPUs."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.second, self.between = Half(16).to(ONE), Half(16).to(TWO), between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.second(self.first(x).to(TWO)))
        return self.second(x).to(ONE).tanh() * 2 + 1


@eager_on_graph
def scaled(x: Tensor) -> Tensor:
    return x * float(x.abs().max())


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "mark": scaled,
    "draws": lambda x: functional.dropout(x, 0.5),
    "op": silly.triple,
    "captured_op": silly.wave,
    "back_and_forth": lambda x: (x.to(ONE).sin() + 1).to(TWO) * x,
    "both_at_once": lambda x: functional.dropout(x.to(ONE) + 1, 0.5).to(TWO) + functional.dropout(x, 0.5),
}
BOTH = {"cuda:0", "cuda:1"}


def same_calls(function: Callable[..., Any], reference: Callable[..., Any], calls: int = 7) -> None:
    for call in range(calls):
        x = torch.randn(4, 16, device=ONE)
        states = []
        results = []
        for each in (function, reference):
            torch.manual_seed(call)
            results.append(each(x))
            states.append([torch.cuda.get_rng_state(device).tolist() for device in (ONE, TWO)])
        assert_same(*results)
        assert states[0] == states[1], call


@with_two_gpus
@pytest.mark.parametrize("debug", [None, "compare", "eager"])
@pytest.mark.parametrize("between", BETWEEN)
@torch.no_grad()
def test_a_model_on_two_gpus(between: str, debug: str | None) -> None:
    """Lines 1 to 6: a model that is split over two GPUs is captured on both, and does what eager does."""
    torch.manual_seed(0)
    model, reference = Split(BETWEEN[between]), Split(BETWEEN[between])
    reference.load_state_dict(model.state_dict())
    ours = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, "debug": debug})
    same_calls(ours, reference)
    for (name, mine), theirs in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert_same(mine, theirs, name)
    program = program_of(ours)
    assert program.replays == (4 if between == "mark" else 5)  # call 1 learns what a marked function returns
    assert {reason.rule for reason in program.reasons} <= {"off_device", "marked"}
    (executor,) = executors_of(ours)
    assert {str(segment.device) for segment in executor.program.graph_segments} == BOTH
    assert " on cuda:0, cuda:1" in str(explain(ours))


@with_two_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("side", ["none", "one", "two", "both"])
@torch.no_grad()
def test_devices_and_streams_of_the_caller(current: int, side: str) -> None:
    """Line 11: whatever the current device is, and on whatever streams of both devices the caller is."""
    model, reference = Split(), Split()
    reference.load_state_dict(model.state_dict())
    ours = compiled(model, min_kernels=1)
    sides = {"none": [], "one": [ONE], "two": [TWO], "both": [ONE, TWO]}[side]
    streams = [torch.cuda.Stream(device) for device in sides]
    with torch.cuda.device(current):
        for call in range(12):
            x = torch.randn(4, 16, device=ONE)
            want = reference(x)
            for stream in streams if call % 3 else ():
                stream.wait_stream(torch.cuda.current_stream(stream.device))
                torch.cuda.set_stream(stream)
            torch.cuda.set_device(current)
            try:
                got = ours(x)
            finally:
                for device in (ONE, TWO):
                    torch.cuda.current_stream(device).synchronize()
                    torch.cuda.set_stream(torch.cuda.default_stream(device))
                torch.cuda.set_device(current)
            assert_same(got, want)
        assert torch.cuda.current_device() == current


@with_two_gpus
@pytest.mark.parametrize("outputs", ["fresh", "static"])
@torch.no_grad()
def test_results_on_the_second(outputs: str) -> None:
    """Line 4: a result that lies on the second GPU is the caller's to keep; a static one lasts until the next call."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = (x.sin() + 1).to(TWO) * y
        return z, z.view(2, 32), y.cos() + 1

    ours, kept = compiled(function, min_kernels=1, outputs=outputs), []
    for _ in range(6):
        x, y = torch.randn(4, 16, device=ONE), torch.randn(4, 16, device=TWO)
        got, want = ours(x, y), function(x, y)
        kept.append((got, want))
        for pair in kept if outputs == "fresh" else kept[-1:]:
            assert_same(*pair)
    assert program_of(ours).replays == 4


@with_two_gpus
@torch.no_grad()
def test_a_capture_that_fails_on_the_second() -> None:
    """Line 9: an op on the second GPU that no capture holds is eager from then on, and the report says so."""
    ours = compiled(lambda x: silly.stubborn((x.sin() + 1).to(TWO).cos() * 2).sin() + 1, min_kernels=1)
    for _ in range(6):
        x = torch.randn(4, 16, device=ONE)
        assert_same(ours(x), silly.stubborn((x.sin() + 1).to(TWO).cos() * 2).sin() + 1)
    assert "capture_failed" in {reason.rule for reason in program_of(ours).reasons}


@with_two_gpus
@torch.no_grad()
def test_a_block_captures_on_one() -> None:
    """Line 9: in a ``with capture`` block an op on another GPU is an error that names it; in a marked function it is right."""
    x = torch.randn(4, 16, device=ONE)
    with pytest.raises(CaptureError, match=r"aten::_to_copy runs on cuda:1, and the capture is on cuda:0"):
        with capture(BreakableCUDAGraph()):
            x.sin().to(TWO)

    @eager_on_graph
    def there_and_back(x: Tensor) -> Tensor:
        return x.to(TWO).cos().to(ONE)

    with capture(BreakableCUDAGraph()) as graph:
        y = there_and_back(x.sin() + 1) * 2
    for _ in range(4):
        x.normal_()
        graph.replay()
        assert_same(y, there_and_back(x.sin() + 1) * 2)
    graph.reset()


@with_two_gpus
@torch.no_grad()
def test_measuring() -> None:
    """A measured report has times for the steps of both GPUs."""
    ours, x = compiled(Split(), min_kernels=1), torch.randn(4, 16, device=ONE)
    for _ in range(4):
        ours(x)
    (recording,) = explain(ours, x, measure=True).programs[0].recordings
    assert recording.measured is not None
    assert all(step.host_us for step in recording.steps)


@with_two_gpus
@torch.no_grad()
def test_memory_of_both_goes() -> None:
    """Line 10: ``reset`` frees graphs and pools on both GPUs at once; so does the death of a weight on the second."""
    breakable_backend.reset()
    ours = compiled(model := Split(), min_kernels=1)
    alone = compiled(lambda x: x.sin() * 2 + 1)
    x, y = torch.randn(4, 16, device=ONE), torch.randn(4, 16, device=TWO)

    def warm() -> None:
        for _ in range(4):
            ours(x)
            alone(y)

    warm()
    (executor,), (single,) = executors_of(ours), executors_of(alone)
    breakable_backend.reset(ours)
    assert executor.driver.live_graphs() == 1
    assert single.driver.live_graphs() == 1
    warm()
    assert program_of(ours).replays >= 4
    for device in (ONE, TWO):
        torch.cuda.synchronize(device)  # a weight's death waits for no launch: what still runs is freed by a later call
    replaced = nn.Parameter(model.second.up.weight.clone())
    model.second.up.weight = replaced
    gc.collect()
    assert executor.driver.live_graphs() == 1
    breakable_backend.reset()
    assert settled(executor.driver)


@with_two_gpus
@torch.no_grad()
def test_threads_with_one_gpu_and_with_both() -> None:
    """Line 11: calls on both GPUs, and calls on one alone, from several threads at once: each is right, and none waits for ever."""
    wrong: list[Any] = []
    functions: list[tuple[Callable[..., Any], torch.device]] = [
        (lambda x: ((x.sin() + 1).to(TWO).cos() * 2).to(ONE) + 1, ONE),
        (lambda x: ((x.sin() + 1).to(ONE).cos() * 2).to(TWO) + 1, TWO),
        (lambda x: (x.sin() + 1) * 2, ONE),
        (lambda x: (x.cos() + 1) * 2, TWO),
    ]

    def work(function: Callable[..., Any], ours: Any, device: torch.device) -> None:
        try:
            with torch.no_grad(), torch.cuda.device(device):
                for _ in range(40):
                    x = torch.randn(8, 16).to(device)  # torch 2.11 takes no draw on a GPU while another thread captures
                    assert_same(ours(x), function(x))
        except BaseException as error:  # noqa: BLE001 - told below
            wrong.append(error)

    made = [(function, compiled(function, min_kernels=1), device) for function, device in functions]
    for _, ours, device in made:
        ours(torch.randn(8, 16, device=device))
    threads = [threading.Thread(target=work, args=each) for each in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong, wrong
    assert all(program_of(ours).replays for _, ours, _ in made)
