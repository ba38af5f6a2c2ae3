"""What only a GPU shows of threads: captures and draws that take turns, captures that others disturb, memory that leaves."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from breakable_backend import (
    BreakableCUDAGraph,
    BreakableError,
    CaptureError,
    breakable_cg,
    capture,
    eager_on_graph,
    explain,
    reset,
)
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import generator
from breakable_backend.drivers.cuda import CudaDriver
from crowd import Crowd
from gpu import compiled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]
CUDA = torch.device("cuda", 0)


def beside(work: Callable[[], None], main: Callable[[], None]) -> list[str]:
    """Run ``main`` while another thread does ``work`` over and over; what that raised, by its first line."""
    stop, raised = threading.Event(), []

    def loop() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)):
            while not stop.is_set():
                try:
                    work()
                except Exception as error:  # noqa: BLE001 - told
                    raised.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        main()
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive(), "the other thread hangs"
    return raised


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_a_crowd_that_captures_replays_and_drops() -> None:
    """Eight threads that capture, replay and drop graphs, of both doors, that draw and that do not, never disturb each other."""
    crowd = Crowd(CUDA, breakable_cg)
    crowd.run(10, rounds=4)
    assert not crowd.errors, crowd.errors.most_common(5)
    assert min(crowd.rounds.values()) > 3, crowd.rounds
    assert abs(crowd.kept / crowd.drawn - 0.5) < 5 * (0.25 / crowd.drawn) ** 0.5
    assert torch.rand(4, device=CUDA).unique().numel() == 4


def test_one_thread_that_draws_has_eagers_numbers() -> None:
    """While other threads capture and replay what does not draw, the one that draws gets the numbers that eager draws."""
    crowd = Crowd(CUDA, breakable_cg)
    x, graph = torch.ones(1024, device=CUDA), BreakableCUDAGraph(driver="cuda")
    drops = compiled(lambda x: functional.dropout(x.sin() + 1, 0.5) * 2)
    wanted = []
    for seed in range(50):
        torch.manual_seed(seed)
        wanted.append((functional.dropout(x * 3, 0.5), functional.dropout(x.sin() + 1, 0.5) * 2))
    with capture(graph):
        y = functional.dropout(x * 3, 0.5)
    for _ in range(3):
        drops(x)
    wrong: list[Any] = []

    def draws() -> None:
        seed = crowd.rounds["draws"] % 50
        torch.manual_seed(seed)
        graph.replay()
        got = y.clone(), drops(x)
        wrong.extend(seed for mine, eagers in zip(got, wanted[seed], strict=True) if not torch.equal(mine, eagers))

    crowd.run(10, [draws, crowd.captures, crowd.calls, crowd.captures], rounds=20)
    assert not crowd.errors, crowd.errors.most_common(5)
    assert wrong == [] and crowd.rounds["draws"] >= 20


def test_a_raw_draw_of_another_thread_spoils_nothing() -> None:
    """A draw that somebody else makes during a capture may fail there; ours succeeds, and all works afterwards."""
    x = torch.ones(1024, device=CUDA)

    def main() -> None:
        for _ in range(100):
            graph = BreakableCUDAGraph(driver="cuda")
            with capture(graph):
                y = functional.dropout(x, 0.5)
            graph.replay()
            assert set(y.tolist()) == {0.0, 2.0}

    raised = beside(lambda: torch.rand(16, device=CUDA), main)
    assert all("Offset increment outside graph capture" in text for text in raised), raised[:3]
    torch.manual_seed(3)
    want = torch.rand(4, device=CUDA)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device=CUDA), want)


def test_a_capture_that_waits_for_a_thread_that_draws_ends() -> None:
    """A body that waits for another thread's drawing replay, or its capture, gets an error in the end, and no deadlock."""
    x, graph = torch.ones(64, device=CUDA), BreakableCUDAGraph(driver="cuda")
    with capture(graph):
        y = functional.dropout(x, 0.5)
    told: list[str] = []

    def other() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)):
            for action in (graph.replay, lambda: capture(BreakableCUDAGraph(driver="cuda")).__enter__()):
                try:
                    action()
                    told.append("")
                except BreakableError as error:
                    told.append(str(error))

    began = time.monotonic()
    mine = BreakableCUDAGraph(driver="cuda")
    with capture(mine):
        z = x * 2
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(40)
    assert not thread.is_alive() and time.monotonic() - began < 30
    assert f"another thread's capture did not end within {generator.WAIT:g} s" in told[1]
    assert told[0] == "" or "a graph that draws random numbers cannot be replayed: another thread's capture" in told[0]
    mine.replay(), graph.replay()
    assert set(z.tolist()) == {2.0} and set(y.tolist()) == {0.0, 2.0}


def test_a_plain_call_that_draws_waits_for_a_capture_that_draws() -> None:
    """A call that runs plainly draws when another thread's capture is over, though it came before."""
    drops = torch.compile(
        lambda x: functional.dropout(x.sin() + 1, 0.5) * 2, backend="breakable_cg", dynamic=True, fullgraph=True
    )
    drops(torch.ones(64, device=CUDA))
    x, results = torch.ones(48, device=CUDA), list[torch.Tensor]()

    def plain() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)):
            results.append(drops(x))

    graph = BreakableCUDAGraph(driver="cuda")
    with capture(graph):
        y = functional.dropout(x, 0.5)
        thread = threading.Thread(target=plain)
        thread.start()
        thread.join(1)
        waits = thread.is_alive()
        y = y + 0
    thread.join(60)
    assert waits and len(results) == 1 and len(set(results[0].tolist())) == 2
    graph.replay()
    assert set(y.tolist()) == {0.0, 2.0}
    assert sum(explain(drops).programs[0].plain_calls.values()) == 2


def test_an_eager_step_may_wait_for_a_thread_that_draws() -> None:
    """Between two segments nothing is held: an eager step of a capture waits for another thread's drawing replay, and gets it."""
    x, graph = torch.ones(64, device=CUDA), BreakableCUDAGraph(driver="cuda")
    with capture(graph):
        y = functional.dropout(x, 0.5)
    torch.cuda.synchronize()

    def replays() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)):
            graph.replay()

    @eager_on_graph
    def waits(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=replays)
        thread.start()
        thread.join(4)
        assert not thread.is_alive(), "the replay waits"
        return x + 1

    with capture(BreakableCUDAGraph(driver="cuda")):
        z = waits(x * 2) * 2
    assert set(z.tolist()) == {6.0} and set(y.tolist()) == {0.0, 2.0}


def test_no_memory_of_another_threads_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording allocates in its pool is in its pool, though another thread captures meanwhile, which it waits for."""
    monkeypatch.setattr(generator, "WAIT", 0.2)
    driver, began, done = CudaDriver(CUDA), threading.Event(), threading.Event()

    def captures() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)), capture(BreakableCUDAGraph(driver="cuda")):
            torch.ones(4, device=CUDA) + 1
            began.set()
            done.wait(60)

    stream = driver.begin()
    with driver.lock, driver.recording():
        with driver.allocating():
            first = torch.empty(1024, device=CUDA)
        thread = threading.Thread(target=captures)
        thread.start()
        began.wait(60)
        with pytest.raises(CaptureError, match="another thread's capture did not end") as caught, driver.allocating():
            torch.empty(1024, device=CUDA)
        assert caught.value.passing == "busy"
        done.set()
        thread.join(60)
        with driver.allocating():
            second = torch.empty(1024, device=CUDA)
        assert driver.live_blocks() == 2
    driver.end(stream)
    del first, second
    driver.release(())
    assert driver.pool_bytes() == 0


def test_no_stream_of_torchs_is_captured() -> None:
    """Whatever runs on any stream that torch hands out, in any thread, is in no capture, however many there are."""
    x = torch.ones(16, device=CUDA)
    graphs = [BreakableCUDAGraph(driver="cuda") for _ in range(3)]
    results = []
    for graph in graphs:
        with capture(graph):
            captured = torch.cuda.current_stream().cuda_stream
            results.append(x + 1)
        assert captured not in {torch.cuda.Stream().cuda_stream for _ in range(64)}
    assert captured not in {torch.cuda.Stream(priority=-1).cuda_stream for _ in range(64)}


# --- captures that others disturb -------------------------------------------------------------------------------------


def test_another_threads_synchronisation_leaves_all_right() -> None:
    """``torch.cuda.synchronize()`` of another thread may fail during a capture; calls, pool and generator stay right.

    Not while a capture begins: there CUDA crashes by itself (docs/reliability.md), and an error of torch's is planted below.
    """
    x = torch.randn(64, 64, device=CUDA)

    @eager_on_graph
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def function(x: torch.Tensor) -> torch.Tensor:
        return step((x @ x).sin() * 2) * 3 + torch.rand_like(x) * 0

    def main() -> None:
        for _ in range(40):
            ours = compiled(function)
            for _ in range(4):
                assert torch.equal(ours(x), want)
            torch._dynamo.reset()

    def synchronise() -> None:
        time.sleep(1e-4)  # else the other thread hardly ever gets the lock
        with generator.registry:
            torch.cuda.synchronize()

    want = function(x)
    beside(synchronise, main)
    drops = compiled(lambda x: functional.dropout(x.sin() + 1, 0.5) * 2)
    for seed in range(4):
        torch.manual_seed(seed)
        eagers = functional.dropout(x.sin() + 1, 0.5) * 2
        torch.manual_seed(seed)
        assert torch.equal(drops(x), eagers)
    assert explain(drops).programs[0].replays == 2
    driver = executors_of(drops)[0].driver
    breakable_cg.reset()
    gc.collect()
    assert driver.pool_bytes() == 0
    torch.cuda.synchronize()


NOT_ACTIVE = (
    'status == cudaStreamCaptureStatus::cudaStreamCaptureStatusActive INTERNAL ASSERT FAILED at "CUDAGraph.cpp":122'
)
"""What torch says where another thread has made a capture invalid right after it began."""


@pytest.mark.parametrize("error", [["planted"], [NOT_ACTIVE] * 3], ids=["some error", "made invalid by another thread"])
@pytest.mark.parametrize("which", ["the pool's first", "a segment's"])
def test_a_capture_that_torch_fails_to_begin_is_ended(
    monkeypatch: pytest.MonkeyPatch, which: str, error: list[str]
) -> None:
    """Where torch raises although a capture has begun, that is ended: the call is right, draws too, and the next capture works."""
    x = torch.randn(16, device=CUDA)
    others = compiled(lambda x: (x.cos() + 1) * 2)
    if which == "a segment's":
        for _ in range(3):
            others(x)
    planted, begin = [RuntimeError(text) for text in error], torch.cuda.CUDAGraph.capture_begin

    def begins_and_raises(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        begin(graph, *args, **kwargs)
        if planted:
            raise planted.pop()

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begins_and_raises)
    ours = compiled(lambda x: functional.dropout(x.sin() + 1, 0.5) * 2)
    for seed in range(6):
        torch.manual_seed(seed)
        want = functional.dropout(x.sin() + 1, 0.5) * 2
        torch.manual_seed(seed)
        assert torch.equal(ours(x), want)
    assert not planted and not torch.cuda.is_current_stream_capturing()
    for _ in range(4):
        assert torch.equal(others(x), (x.cos() + 1) * 2)
    assert explain(others).programs[0].replays > 0


# --- streams and memory -----------------------------------------------------------------------------------------------


def test_streams_that_are_idle_are_forgotten() -> None:
    """Events are recorded while two streams are in use, and no more once one has had all calls to itself for a while."""
    ours = compiled(lambda x: x.sin() + 1)
    x = torch.randn(64, device=CUDA)
    for _ in range(100):  # other functions of the process have called on other streams
        ours(x)
    order = executors_of(ours)[0].driver._order  # type: ignore[attr-defined]
    assert not order.several
    with torch.cuda.stream(torch.cuda.Stream()):
        ours(x)
        assert order.several
    for _ in range(100):
        ours(x)
    assert not order.several
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.randn(64, device=CUDA)
        assert torch.equal(ours(x), x.sin() + 1)


def test_eviction_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a key makes room for another the host waits for no stream, no event and no device, and memory comes back later."""
    ours = compiled(lambda x: (x @ x.T).sin() + 1, max_recordings=2)

    def batch(size: int) -> torch.Tensor:
        x = torch.randn(size, 64, device=CUDA)
        torch._dynamo.mark_dynamic(x, 0)
        return x

    def calls() -> None:
        for size in range(64, 1024, 64):
            for _ in range(12):
                x = batch(size)
                ours(x)

    calls()
    (executor,) = executors_of(ours)
    before, evicted = executor.driver.pool_bytes(), executor.statistics.evictions
    waits: list[str] = []
    for owner, name in (
        (torch.cuda, "synchronize"),
        (torch.cuda, "empty_cache"),
        (torch.cuda.Event, "synchronize"),
        (torch.cuda.Stream, "synchronize"),
    ):
        monkeypatch.setattr(owner, name, lambda *args, name=name: waits.append(name))
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        torch.ones(1, device=CUDA)
        with torch.profiler.record_function("serving"):
            calls()
        waited = list(waits)  # the profiler waits for the device when it ends
    assert executor.statistics.evictions > evicted + 5
    assert waited == []
    events = profile.events()
    (serving,) = [e for e in events if e.name == "serving" and e.device_type == torch.autograd.DeviceType.CPU]
    within = [e.name for e in events if serving.time_range.start <= e.time_range.start <= serving.time_range.end]
    assert not [name for name in within if "Synchronize" in name and name.startswith("cuda")], set(within)
    assert "cudaFree" not in within
    assert executor.driver.pool_bytes() <= 2 * before
    monkeypatch.undo()
    reset(ours)
    assert executor.driver.pool_bytes() == 0 and executor.driver.live_blocks() == 0
