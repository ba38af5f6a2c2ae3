"""Failures that pass: the call runs plainly, what the capture took is given back, and recording is tried again later."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from test_executor import Make, entries, ways
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, CaptureError, ReplayError, capture, eager_on_graph, explain
from breakable_backend.calling import retries
from breakable_backend.calling.compiled_graph import PUT_OFF
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import LOCK_TIMEOUT, CaptureDriver, generator
from breakable_backend.failure_kinds import passing
from breakable_backend.recordings import epilogue
from breakable_backend.recordings.copies import Bridge
from gpu import limited


@pytest.fixture
def build(driver: CaptureDriver) -> Iterator[Make]:
    """Makes executors on each driver."""
    build = Make(driver)
    yield build
    for executor in build.made:
        executor.reset()
    build.made.clear()


CAUSES: dict[str, Callable[[], Exception]] = {
    "memory": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ..."
    ),
    "busy": lambda: RuntimeError("Only one capture at a time is allowed in a process."),
    "disturbed": lambda: torch.AcceleratorError(
        "CUDA error: operation failed due to a previous error during capture\nSearch for `cudaErrorStreamCaptureInvalidated'"
    ),
}
"""What comes out of a capture, by what was in the way."""
causes = pytest.mark.parametrize("cause", CAUSES)
NOT_ACTIVE = (
    'status == cudaStreamCaptureStatus::cudaStreamCaptureStatusActive INTERNAL ASSERT FAILED at "CUDAGraph.cpp":122'
)
"""What torch says where another thread has made a capture invalid right after it began."""


@contextmanager
def failing(driver: CaptureDriver, *captures: int, cause: str = "memory", made: Any = None) -> Iterator[list[int]]:
    """Have the captures with these numbers fail, from 0, once their code has run; yields how many began.

    ``made`` is given what the code has made.
    """
    real, count = driver.capture, [0]

    def counted(body: Callable[[], Any], *fed: Any) -> Any:
        number = count[0]
        count[0] += 1
        if number not in captures:
            return real(body, *fed)

        def fails(*args: Any) -> None:
            result = body()
            if made is not None:
                made(result)
            raise CAUSES[cause]()

        return real(fails, *fed)

    driver.capture = counted  # type: ignore[method-assign]
    try:
        yield count
    finally:
        del driver.capture  # type: ignore[method-assign]


def three(x: Tensor) -> Tensor:
    """Three segments with an eager step between each two; the second writes what the first made."""
    y = silly.triple(x.sin() * 2)
    z = silly.triple(y.cos() + 1) - y
    return z * x + 1


# --- the first door -----------------------------------------------------------------------------------------------------


@causes
def test_recorded_again_once_it_has_passed(build: Make, cause: str) -> None:
    """A call whose capture fails in passing returns what eager does, counts as plain with the cause, and the next records."""
    executor = build(three, build.ones(4))
    x = build.ones(4)
    assert ways(executor, [x]) == ["warm-up"]
    with failing(build.driver, 1, cause=cause):
        (got,) = executor([x])
    assert torch.equal(got, three(x))
    assert executor.statistics.plain[f"could not be recorded: {PUT_OFF[cause]}"] == 1  # type: ignore[index]
    assert executor.scope.forced == {} and executor.statistics.recordings == 0
    (entry,) = entries(executor)
    assert entry.trials.failures == 1 and entry.trials.cause == cause
    assert ways(executor, [x], [x]) == ["record", "replay"]
    y = build.ones(4) * 2
    assert torch.equal(executor([y])[0], three(y))
    assert [entry.captures for entry in entries(executor)] == [3]


@causes
def test_pauses(build: Make, cause: str) -> None:
    """While the cause lasts the key is recorded after 1, 2 and 4 calls, is plain in between, and right in all of them."""
    executor = build(three, build.ones(4))
    attempts = []
    with failing(build.driver, *range(100), cause=cause) as begun:
        for call in range(1, 13):
            x, before = build.ones(4) * call, begun[0]
            assert torch.equal(executor([x])[0], three(x))
            if begun[0] > before:
                attempts.append(call)
    assert attempts == [2, 3, 5, 9]
    plain = executor.statistics.plain
    assert plain[f"could not be recorded: {PUT_OFF[cause]}"] == 4  # type: ignore[index]
    assert plain[f"waits to be recorded again: {PUT_OFF[cause]}"] == 7  # type: ignore[index]
    found = [*ways(executor, *([build.ones(4)] for _ in range(6)))]
    assert found[4:] == ["record", "replay"] and set(found[:4]) == {f"waits to be recorded again: {PUT_OFF[cause]}"}  # type: ignore[index]


@pytest.mark.parametrize("position", range(3))
def test_everything_is_given_back(build: Make, position: int) -> None:
    """Whichever segment fails, graphs, bridges and pool are gone when the call is over, without the garbage collector."""
    executor = build(three, build.ones(4))
    made: list[weakref.ref[Any]] = []
    executor([build.ones(4)])
    gc.collect()
    gc.disable()
    try:
        with failing(build.driver, position, made=lambda results: made.extend(map(weakref.ref, results))):
            outputs = executor([build.ones(4)])
        assert [ref() for ref in made] == [None] * len(made) and made
        assert build.driver.live_blocks() == 0
        assert build.driver.pool_bytes() == 0
        assert torch.equal(outputs[0], three(build.ones(4)))
    finally:
        gc.enable()
    assert ways(executor, [build.ones(4)], [build.ones(4)]) == ["record", "replay"]


def test_the_rest_of_the_call_has_the_memory(build: Make) -> None:
    """What was captured is given back before the rest runs: its eager steps find no block that only a graph holds."""
    executor = build(lambda x: silly.fragile(silly.triple(x.sin() * 2).cos() + 1).sin() * 2, build.ones(4))
    executor([build.ones(4)])
    seen = []
    silly.hooks["fragile"] = lambda *args: seen.append(build.driver.live_blocks())
    try:
        with failing(build.driver, 1) as begun:
            executor([build.ones(4)])
    finally:
        silly.hooks.clear()
    assert seen == [0] and begun == [2]


def test_other_recordings_stay(build: Make) -> None:
    """A key whose recording fails takes nothing from the others, which share its pool."""
    executor = build(lambda x, n: (silly.triple(x + n).sin(),), build.ones(3), 5, mode="symbolic")
    assert ways(executor, *([build.ones(3), 5] for _ in range(3)))[-1] == "replay"
    held = build.driver.live_blocks()
    with failing(build.driver, 1, cause="busy"):
        ways(executor, *([build.ones(3), 6] for _ in range(2)))
    assert build.driver.live_blocks() == held
    assert ways(executor, [build.ones(3), 5]) == ["replay"]
    x = build.ones(3)
    assert torch.equal(executor([x, 5])[0], (x + 5).mul(3).sin())
    assert ways(executor, [build.ones(3), 6], [build.ones(3), 6]) == ["record", "replay"]


@pytest.mark.parametrize("position", range(3))
def test_draws_and_writes_happen_once(build: Make, position: int) -> None:
    """The call whose recording fails draws what eager draws, and writes its argument once, before and after the failure."""

    def f(x: Tensor) -> Tensor:
        x.add_(torch.rand_like(x))
        y = silly.triple(x * 2)
        x.mul_(y).add_(torch.rand_like(x))
        return silly.triple(x) + torch.rand_like(x)

    executor = build(f, build.ones(4))
    x, want = build.ones(4), build.ones(4)
    for call in range(5):
        torch.manual_seed(call)
        wanted, drawn = f(want), torch.rand_like(x)
        torch.manual_seed(call)
        with failing(build.driver, *([position] if call == 1 else [])):
            (got,) = executor([x])
        assert torch.equal(got, wanted) and torch.equal(x, want), call
        assert torch.equal(torch.rand_like(x), drawn), call
    (entry,) = entries(executor)
    assert (entry.trials.failures, entry.replays) == (1, 2)


def test_memory_that_runs_out_in_an_eager_step(build: Make) -> None:
    """It reaches the caller as it is; nothing is kept of the recording, and what fails again and again is tried less often."""
    executor = build(lambda x: silly.fragile(x.sin()) + 1, build.ones(3))
    assert ways(executor, [build.ones(3)]) == ["warm-up"]
    error = CAUSES["memory"]()

    def explode(*args: Any) -> None:
        raise error

    silly.hooks["fragile"] = explode
    try:
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError) as caught:
                executor([build.ones(3)])
            assert caught.value is error
            error.__traceback__ = None
    finally:
        silly.hooks.clear()
    del caught
    assert build.driver.live_blocks() == 0
    found = ways(executor, *([build.ones(3)] for _ in range(3)))
    assert found == [f"waits to be recorded again: {PUT_OFF['memory']}", "record", "replay"]


def test_no_memory_for_the_results(build: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all was captured, and only the copies of the results find no memory, they get what the graphs have."""
    executor = build(three, build.ones(4))
    executor([build.ones(4)])
    real, held = epilogue.clone_exact, []

    def clone(x: Tensor) -> Tensor:
        held.append(build.driver.live_blocks())
        if len(held) == 1:
            raise CAUSES["memory"]()
        return real(x)

    monkeypatch.setattr(epilogue, "clone_exact", clone)
    (got,) = executor([build.ones(4)])
    monkeypatch.undo()
    assert torch.equal(got, three(build.ones(4)))
    assert len(held) == 2 and held[1] < held[0]
    assert build.driver.live_blocks() == 0
    (entry,) = entries(executor)
    assert entry.trials.reason.startswith("results could not be copied: OutOfMemoryError: CUDA out of memory")
    assert ways(executor, [build.ones(4)], [build.ones(4)]) == ["record", "replay"]


def test_not_an_error_without_auto_break(build: Make) -> None:
    """``auto_break=False`` is about what can never be captured: a failure that passes is none of that."""
    executor = build(lambda x: (x.sin() + 1,), build.ones(3), auto_break=False)
    executor([build.ones(3)])
    with failing(build.driver, 0):
        executor([build.ones(3)])
    assert ways(executor, [build.ones(3)], [build.ones(3)]) == ["record", "replay"]


def test_what_is_always_disturbed_is_eager_for_good(build: Make) -> None:
    """After ``MAX_DISTURBED`` disturbed recordings the segment that is disturbed once more is left out, and the rest captured."""
    executor = build(three, build.ones(4))
    real = build.driver.capture
    calls = 2**retries.MAX_DISTURBED + 1

    def spoiling(body: Callable[[], Any], *fed: Any) -> Any:
        graph, results = real(body, *fed)
        if not spoilt or "cos" not in str(graph.kernels()):
            return graph, results
        spoilt.append(1)
        build.driver.release([graph])
        error = CaptureError("somebody synchronised")
        error.passing = "disturbed"
        raise error

    spoilt = [0]
    if build.device.type == "cuda":
        pytest.skip("kernels have no names of ops")
    build.driver.capture = spoiling  # type: ignore[method-assign]
    try:
        for _ in range(calls):
            executor([build.ones(4)])
        assert len(spoilt) == retries.MAX_DISTURBED + 2 and executor.statistics.recordings == 0
        assert ways(executor, [build.ones(4)], [build.ones(4)]) == ["record", "replay"]
    finally:
        del build.driver.capture  # type: ignore[method-assign]
    text = "could not be captured: somebody synchronised"
    assert [(reason.op, reason.text) for reason in executor.program.reasons if reason.rule == "capture_failed"] == [
        ("aten::cos", text),
        ("aten::add", text),
    ]
    assert len(executor.program.graph_segments) == 2


@hypothesis.settings(max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=strategies.data())
def test_any_failures(build: Make, data: strategies.DataObject) -> None:
    """Whatever fails in whichever call: every result is eager's, and the key is recorded within twice its calls so far."""
    executor = build(three, build.ones(4))
    calls = data.draw(strategies.integers(1, 12))
    for call in range(calls):
        x = build.ones(4) * call
        fails = data.draw(strategies.sets(strategies.integers(0, 2)))
        with failing(build.driver, *fails, cause=data.draw(strategies.sampled_from(sorted(CAUSES)))):
            assert torch.equal(executor([x])[0], three(x))
    later = ways(executor, *([build.ones(4)] for _ in range(calls + 2)))
    assert later[-1] == "replay"
    executor.reset()
    assert build.driver.live_blocks() == 0


def test_reported(device: torch.device, options: dict[str, Any]) -> None:
    """The report counts the recordings of a key that failed, with the last reason and its line, as text too."""
    compiled = torch.compile(three, backend="breakable_cg", options=options)
    x = torch.ones(4, device=device)
    with torch.no_grad():
        compiled(x)
        (executor,) = executors_of(compiled)
        for _ in range(2):
            with failing(executor.driver, 1):
                assert torch.equal(compiled(x), three(x))
        report = explain(compiled)
        (recording,) = report.programs[0].recordings
        assert (recording.failures, recording.num_graphs, recording.refused) == (2, 0, "")
        assert "cos" in recording.last_failure and "CUDA out of memory" in recording.last_failure
        assert report.programs[0].plain_calls == {"warm-up": 1, "could not be recorded: too little memory is free": 2}
        assert "key 0: recording failed 2x for reasons that pass; aten::cos: could not be captured" in str(report)
        for _ in range(4):
            assert torch.equal(compiled(x), three(x))
        (recording,) = explain(compiled).programs[0].recordings
        assert (recording.failures, recording.num_graphs, recording.replays) == (2, 3, 2)


def woven(x: Tensor) -> tuple[Tensor, ...]:
    """Values that cross one break, two and three; a view of one, a write to another, results of each kind."""
    a = x.sin() * 2
    b = silly.triple(a)
    c = b.cos() + a
    d = silly.triple(c[1:])
    b.add_(c)
    e = (a + 1) * c
    f = silly.triple(e.view(-1)) + d.sum()
    return f * b + 1, c * 2, a, d, b


@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    calls=strategies.lists(
        strategies.tuples(
            strategies.integers(2, 4), strategies.sets(strategies.integers(0, 3), max_size=2), strategies.booleans()
        ),
        max_size=20,
    )
)
def test_any_failures_among_keys(build: Make, calls: list[tuple[int, set[int], bool]]) -> None:
    """Keys that share a pool, some of whose recordings fail, and now and then all have to go: results are eager's, and stay so."""
    executor = build(woven, build.ones(7), mode="symbolic", max_recordings=2)
    kept: list[Any] = []
    got: Any
    want: Any
    for number, (size, fails, vacates) in enumerate(calls):
        x = build.ones(size) * (number + 1)
        with failing(build.driver, *fails):
            got = executor([x.clone()])
        kept.append((got, woven(x)))
        if vacates and number % 3 == 0:
            executor.vacate("memory ran out in another recording")
    for got, want in kept:
        assert all(torch.equal(mine, eagers) for mine, eagers in zip(got, want, strict=True))
    kept.clear()
    executor.reset()
    got = want = None
    assert build.driver.live_blocks() == 0


# --- what passes ----------------------------------------------------------------------------------------------------------


def test_others_vacate_a_pool(build: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short and the pool holds some, what other functions recorded goes, and comes again at their next call."""
    first, second = build(three, build.ones(4)), build(lambda x: x.cos() * 2 + 1, build.ones(3))
    ways(first, [build.ones(4)]), ways(second, *([build.ones(3)] for _ in range(3)))

    def vacate() -> None:
        for tenant in build.driver.tenants:
            if (found := tenant()) is not None:
                found.vacate("memory ran out in another recording")

    monkeypatch.setattr(build.driver, "vacate", vacate)
    with failing(build.driver, 1):
        (got,) = first([build.ones(4)])
    assert torch.equal(got, three(build.ones(4)))
    assert build.driver.live_blocks() == 0 and build.driver.pool_bytes() == 0
    assert second.statistics.finished_replays == 1
    assert ways(second, [build.ones(3)], [build.ones(3)]) == ["record", "replay"]
    assert second.statistics.recorded == {"first of this program": 1, "memory ran out in another recording": 1}
    assert ways(first, [build.ones(4)], [build.ones(4)]) == ["record", "replay"]
    monkeypatch.undo()
    build.made.remove(first)
    held = len(build.driver.tenants)
    del first
    gc.collect()
    assert len(build.driver.tenants) == held - 1


@causes
def test_causes_are_told(cause: str) -> None:
    """Type, CUDA's number or text tell what passes, also of an error that was raised from another; all else does not."""
    error = CAUSES[cause]()
    assert passing(error) == cause
    assert passing(RuntimeError(NOT_ACTIVE)) == "disturbed"
    wrapped = ValueError("an op says it otherwise")
    wrapped.__cause__ = error
    assert passing(wrapped) == cause
    others = [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
        CaptureError("reads values on the host"),
        KeyError("CUDA out of memory"),
    ]
    assert [passing(other) for other in others] == [""] * len(others)


def test_what_libraries_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that a library could not make may be another thread's fault, if there is one; alone it is the op's."""
    error = RuntimeError(
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n)`"
    )
    for threads, cause in ((1, ""), (2, "disturbed")):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        assert passing(error) == cause
    refused = (
        "info.status != cudaStreamCaptureStatusInvalidated INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1768"
    )
    assert passing(RuntimeError(refused)) == "disturbed"


def test_numbers_tell() -> None:
    """An error of CUDA has its number, whatever it says."""
    for number, cause in ((2, "memory"), (901, "disturbed"), (900, "")):
        error = torch.AcceleratorError("CUDA error: whatever")
        error.error_code = number  # type: ignore[attr-defined]
        assert passing(error) == cause
    assert passing(MemoryError()) == "memory"


# --- the second door ------------------------------------------------------------------------------------------------------


@eager_on_graph
def doubled(x: Tensor) -> Tensor:
    """An eager step."""
    return x * 2


def block(x: Tensor, fails: Callable[[int], None] = lambda position: None) -> Tensor:
    """Three segments."""
    for position in range(3):
        x = x.sin() + 1
        fails(position)
        x = doubled(x.cos()) if position < 2 else x * 3
    return x


@causes
@pytest.mark.parametrize("position", range(3))
def test_a_block_can_be_captured_again(
    make: Callable[..., BreakableCUDAGraph], device: torch.device, position: int, cause: str
) -> None:
    """What is raised in a block reaches the caller as it is; nothing is left of the capture, and another one works."""
    graph, x = make(), torch.ones(4, device=device)
    error = CAUSES[cause]()

    def fails(at: int) -> None:
        if at == position:
            raise error

    with torch.no_grad():
        with pytest.raises(type(error)) as caught, capture(graph):
            block(x, fails)
        assert caught.value is error
        error.__traceback__ = None
        del caught
        driver = graph._made_driver()
        assert not driver.is_capturing() and not driver.busy
        assert driver.live_blocks() == 0 and driver.pool_bytes() == 0
        with capture(graph):
            y = block(x)
        x.fill_(3.0)
        graph.replay()
        assert torch.equal(y, block(x))


@pytest.mark.parametrize("where", ["in an eager function", "for the bridge of its result"])
def test_a_block_that_fails_between_segments(
    make: Callable[..., BreakableCUDAGraph], device: torch.device, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out between two segments reaches the caller; nothing is left, and another capture works."""
    graph, x = make(), torch.ones(4, device=device)

    def refuse(*args: Any) -> None:
        raise CAUSES["memory"]()

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        if fails and where == "in an eager function":
            refuse()
        return x * 2

    fails = [1]
    with torch.no_grad():
        with monkeypatch.context() as patch:
            if where != "in an eager function":
                patch.setattr(Bridge, "like", refuse)
            with pytest.raises(torch.OutOfMemoryError), capture(graph):
                step(x.sin() + 1).cos() + 1
        fails.clear()
        driver = graph._made_driver()
        gc.collect()  # the error that pytest has kept
        assert not driver.is_capturing() and driver.live_blocks() == 0 and driver.pool_bytes() == 0
        with capture(graph):
            y = step(x.sin() + 1).cos() + 1
        x.fill_(3.0)
        graph.replay()
        assert torch.equal(y, (x.sin() + 1).mul(2).cos() + 1)


@pytest.mark.parametrize("begins", range(4))
def test_a_block_that_could_not_begin(
    make: Callable[..., BreakableCUDAGraph], device: torch.device, begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that cannot begin, or end, is a typed error; nothing is left of the capture, and another one works."""
    graph, x = make(), torch.ones(4, device=device)
    with torch.no_grad(), pytest.raises(CaptureError, match="out of memory") as caught:
        with sessions_failing(graph._made_driver(), begins):
            with capture(graph):
                block(x)
    assert caught.value.passing == "memory"
    del caught
    driver = graph._made_driver()
    gc.collect()  # the error that pytest has kept
    assert not driver.is_capturing() and driver.live_blocks() == 0 and driver.pool_bytes() == 0
    with torch.no_grad():
        with capture(graph):
            y = block(x)
        x.fill_(3.0)
        graph.replay()
        assert torch.equal(y, block(x))


def test_a_launch_that_fails(make: Callable[..., BreakableCUDAGraph], device: torch.device) -> None:
    """A segment that is captured and cannot be launched ends the capture, though its error is caught inside; another works."""
    graph, x = make(), torch.ones(4, device=device)
    driver = graph._made_driver()
    real = driver.session

    def refuse(stream: int) -> None:
        busy = ReplayError("somebody else has the generator")
        busy.passing = "busy"
        raise busy

    @contextmanager
    def session() -> Iterator[Any]:
        with real() as made:
            end = made.end

            def ends() -> Any:
                captured = end()
                captured.replay = refuse  # type: ignore[method-assign]
                return captured

            made.end = ends  # type: ignore[method-assign]
            yield made

    driver.session = session  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        with pytest.raises(CaptureError, match="nothing was captured, since the body caught an error") as caught:
            with capture(graph), suppress(ReplayError):
                block(x)
        assert caught.value.passing == "busy"
        del caught, driver.session  # type: ignore[method-assign]
        gc.collect()
        assert not driver.is_capturing() and driver.live_blocks() == 0 and driver.pool_bytes() == 0
        with capture(graph):
            y = block(x)
        x.fill_(3.0)
        graph.replay()
        assert torch.equal(y, block(x))


@contextmanager
def sessions_failing(driver: CaptureDriver, position: int) -> Iterator[None]:
    """Have a session of ``driver`` run out of memory: 0 and 1 when its first and second segment begin, 2 and 3 when they end."""
    real = driver.session

    @contextmanager
    def session() -> Iterator[Any]:
        with real() as made:
            for name, numbers in (("begin", (0, 1)), ("end", (2, 3))):
                if position in numbers:
                    setattr(made, name, refusing(getattr(made, name), position % 2, made))
            yield made

    def refusing(method: Callable[..., Any], at: int, made: Any) -> Callable[..., Any]:
        count = [0]

        def refuse(*args: Any) -> Any:
            count[0] += 1
            if count[0] - 1 != at:
                return method(*args)
            if method.__name__ == "end":
                made.abandon()
            error = CaptureError("OutOfMemoryError: CUDA out of memory")
            error.passing = "memory"
            raise error

        return refuse

    driver.session = session  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del driver.session  # type: ignore[method-assign]


# --- other threads -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("passing::beside", mutates_args=())
def beside(x: Tensor) -> Tensor:
    """``x + 1``, while another thread does once what ``meanwhile`` says; what that raises is its own."""
    if meanwhile:
        todo = meanwhile.pop()

        def work() -> None:
            stream = torch.cuda.stream(torch.cuda.Stream(x.device)) if x.is_cuda else nullcontext()
            with stream, suppress(RuntimeError):
                todo()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    return x + 1


@beside.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


meanwhile: list[Callable[[], Any]] = []


def test_another_threads_draw(device: torch.device, options: dict[str, Any]) -> None:
    """Another thread that draws in the middle of a capture costs a second capture at most; then all is captured."""
    compiled = torch.compile(lambda x: beside(x.sin()).cos() * 2 + 1, backend="breakable_cg", options=options)
    x = torch.ones(8, device=device)
    with torch.no_grad():
        for number in range(6):
            if number == 1:
                meanwhile.append(lambda: torch.rand(4, device=device))
            assert torch.equal(compiled(x), (x.sin() + 1).cos() * 2 + 1), number
            assert not meanwhile
    (executor,) = executors_of(compiled)
    (entry,) = entries(executor)
    assert (
        entry.trials.failures == 0
    )  # the tape, whose generator is that of all threads, has captured the segment twice
    assert entry.replays >= 3 and executor.scope.forced == {}


# --- a pool that is busy --------------------------------------------------------------------------------------------------


class Seen:
    """A lock, with the times that others were ready to wait for it."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.waits: list[float] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking:
            return bool(self.lock.acquire(blocking=False))
        if timeout < 0:  # the tape's own
            return bool(self.lock.acquire())
        self.waits.append(timeout)
        return bool(self.lock.acquire(timeout=min(timeout, 0.01)))

    def release(self) -> None:
        self.lock.release()


@contextmanager
def held_by_another_thread(lock: Any) -> Iterator[None]:
    """Have another thread hold ``lock``."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_one_call_waits_for_a_busy_pool(build: Make) -> None:
    """A call that cannot have the pool in time runs plainly; those after it do not wait again, of other functions too."""
    first, second = build(lambda x: x.sin() + 1, build.ones(3)), build(lambda x: x.cos() + 1, build.ones(3))
    lock, reason = build.driver.lock, f"the pool was busy for {LOCK_TIMEOUT:g} s"
    seen: Any = Seen(lock)
    build.driver.lock = seen
    try:
        with held_by_another_thread(lock):
            assert ways(first, *([build.ones(3)] for _ in range(3))) == [reason] * 3
            assert ways(second, [build.ones(3)]) == [reason]
        assert seen.waits == [LOCK_TIMEOUT, 0.0, 0.0, 0.0]
        assert ways(first, [build.ones(3)]) == ["warm-up"]
        assert ways(first, [build.ones(3)], [build.ones(3)]) == ["record", "replay"]
        assert len(seen.waits) == 4 and build.driver.patience == LOCK_TIMEOUT  # a free lock is not waited for
    finally:
        build.driver.lock = lock


# --- on a GPU, for real -----------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)
GIB = 1 << 30


def cached(size: int) -> None:
    """Have torch's allocator hold ``size`` bytes for nobody. A capture cannot use them, nor give them back."""
    hog = torch.empty(size, dtype=torch.uint8, device=CUDA)
    del hog


@pytest.mark.gpu
@pytest.mark.parametrize("others", [False, True])
def test_memory_that_a_capture_cannot_have(others: bool) -> None:
    """A capture that runs out of memory costs one plain call and no memory; the next recording has what nobody uses."""

    def function(x: Tensor, n: int) -> Tensor:
        y = silly.triple(x.sin() * 2)
        return silly.triple((y.expand(n) + 1).cos().sum() * 2 + x).cos() + 1

    ours = torch.compile(function, backend="breakable_cg", options={"driver": "cuda"}, dynamic=True)
    x = torch.ones(1, device=CUDA)
    n = int(0.6 * GIB / 4)
    with torch.no_grad(), limited(4 * GIB):
        for _ in range(3):
            ours(x, 1000)
        (executor,) = executors_of(ours)
        driver = executor.driver
        if not others:
            executor.reset()
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        want = function(x, n)
        assert torch.equal(ours(x, n), want)
        torch.cuda.empty_cache()
        cached(int(3.2 * GIB))
        assert torch.equal(ours(x, n), want)
        assert executor.statistics.plain[f"could not be recorded: {PUT_OFF['memory']}"] == 1
        assert driver.live_blocks() == 0 and driver.pool_bytes() == 0  # the other key's recording went too
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= reserved + (64 << 20)
        cached(int(3.2 * GIB))
        assert torch.equal(ours(x, n), want)
        assert torch.equal(ours(x, n), want)
        assert [entry.replays for entry in entries(executor) if entry.trials.failures] == [1]
        for _ in range(2):
            assert torch.equal(ours(x, 1000), function(x, 1000))


@pytest.mark.gpu
def test_the_plain_rest_has_the_memory_that_a_capture_took() -> None:
    """What a failed capture has taken of the device is back before the rest runs, with the recordings of others if need be."""

    def function(x: Tensor, n: int) -> Tensor:
        y = silly.triple(x.sin() * 2)
        a = y.expand(n) + 1
        b = a.cos()
        return silly.triple((a * b).sum() + x).cos() + 1

    ours = torch.compile(function, backend="breakable_cg", options={"driver": "cuda"}, dynamic=True)
    x = torch.ones(1, device=CUDA)
    with torch.no_grad(), limited(4 * GIB):
        for _ in range(3):
            ours(x, 1000)
        n = int(1.2 * GIB / 4)  # three of them at once: 3.6 GiB
        torch.cuda.empty_cache()
        want = function(x, n)
        torch.cuda.empty_cache()
        ours(x, n)
        torch.cuda.empty_cache()
        hog = torch.empty(int(0.8 * GIB), dtype=torch.uint8, device=CUDA)

        (executor,) = executors_of(ours)
        captures = executor.driver.capture

        def fails(body: Callable[[], Any], *fed: Any) -> Any:
            nonlocal hog
            try:
                return captures(body, *fed)
            except CaptureError:
                hog = hog[:0].clone()  # as if somebody else had given memory back by then: two fit, and the third does
                raise

        executor.driver.capture = fails  # type: ignore[method-assign]
        try:
            assert torch.equal(ours(x, n), want)
        finally:
            del executor.driver.capture  # type: ignore[method-assign]
        assert entries(executor)[-1].trials.failures == 1
        for _ in range(3):
            assert torch.equal(ours(x, n), want)
            assert torch.equal(ours(x, 1000), function(x, 1000))
        assert [entry.replays > 0 for entry in entries(executor)] == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("work", [torch.cuda.synchronize, lambda: torch.rand(16, device=CUDA)], ids=["waits", "draws"])
def test_what_another_thread_does_in_a_capture(work: Callable[[], Any]) -> None:
    """Another thread's ``synchronize()`` or draw, in the middle of a capture, costs one plain call at most; then all is captured."""

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(torch.ops.passing.beside(x.sin()) * 2, 0.5).cos() + 1

    ours = torch.compile(function, backend="breakable_cg", options={"driver": "cuda"})
    x = torch.ones(64, device=CUDA)
    with torch.no_grad():
        ours(x)
        for number in range(6):
            if number == 0:
                meanwhile.append(work)
            torch.manual_seed(number)
            got = ours(x)
            assert not meanwhile
            torch.manual_seed(number)
            assert torch.equal(got, function(x)), number
        (executor,) = executors_of(ours)
        assert executor.statistics.recordings == 1 and executor.scope.forced == {}
        (entry,) = entries(executor)
        assert entry.replays >= 4 and entry.trials.failures <= 1
        drawn = torch.rand(4, device=CUDA)  # the generator works
        assert drawn.unique().numel() > 1


@pytest.mark.gpu
def test_a_capture_of_another_thread_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """While another thread's ``with capture`` goes on, one call waits for it, all are plain, and later ones are recorded."""
    monkeypatch.setattr(generator, "WAIT", 0.2)
    ours = torch.compile(
        lambda x: silly.triple(x.sin() * 2).cos() + 1, backend="breakable_cg", options={"driver": "cuda"}
    )
    x, began, done = torch.ones(64, device=CUDA), threading.Event(), threading.Event()

    def captures() -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(CUDA)), capture(BreakableCUDAGraph(driver="cuda")):
            torch.ones(4, device=CUDA) + 1
            began.set()
            done.wait(60)

    thread = threading.Thread(target=captures)
    with torch.no_grad():
        want = ours(x)
        thread.start()
        began.wait(60)
        taken = []
        for _ in range(6):
            started = time.monotonic()
            assert torch.equal(ours(x), want)
            taken.append(time.monotonic() - started)
        done.set()
        thread.join(60)
        for _ in range(8):
            assert torch.equal(ours(x), want)
    (executor,) = executors_of(ours)
    plain = executor.statistics.plain
    assert plain[f"could not be recorded: {PUT_OFF['busy']}"] == 3, plain
    assert sum(seconds > 0.15 for seconds in taken) == 1, taken
    assert [entry.replays for entry in entries(executor)] == [6]


@pytest.mark.gpu
def test_a_thread_that_synchronises_all_the_time() -> None:
    """While another thread synchronises in a loop calls are right; once it has stopped, all is captured in a few calls."""
    ours = torch.compile(lambda x: silly.triple((x @ x).sin() * 2).cos() + 1, backend="breakable_cg")
    x, done = torch.randn(64, 64, device=CUDA), threading.Event()

    def synchronises() -> None:
        while not done.is_set():
            with suppress(RuntimeError):
                torch.cuda.synchronize()

    thread = threading.Thread(target=synchronises)
    with torch.no_grad():
        want = ours(x)
        thread.start()
        try:
            for _ in range(8):
                assert torch.equal(ours(x), want)
        finally:
            done.set()
            thread.join(60)
        for _ in range(10):
            assert torch.equal(ours(x), want)
    (executor,) = executors_of(ours)
    (entry,) = entries(executor)
    assert entry.replays >= 1 and executor.scope.forced == {} and entry.captures == 2


@pytest.mark.gpu
def test_failed_recordings_leave_no_memory() -> None:
    """However often memory runs out under a capture, at either door: nothing of it stays with the device or the allocator."""
    n, x = int(0.6 * GIB / 4), torch.ones(1, device=CUDA)
    graph = BreakableCUDAGraph(driver="cuda")
    ours = torch.compile(lambda x: silly.triple((x.expand(n) + 1).cos().sum() * 2).sin() + x, backend="breakable_cg")
    left = []
    with torch.no_grad(), limited(4 * GIB):
        for _ in range(6):
            cached(int(3.2 * GIB))
            ours(x)
            cached(int(3.2 * GIB))
            ours(x)
            (executor,) = executors_of(ours)
            assert entries(executor)[0].trials.failures == 1
            executor.reset()
            cached(int(3.2 * GIB))
            with pytest.raises(torch.OutOfMemoryError), capture(graph):
                doubled(x)
                (x.expand(n) + 1).cos()
            gc.collect()
            torch.cuda.empty_cache()
            left.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
            with capture(graph):
                y = doubled(x) + 1
            graph.replay()
            assert y.item() == 3
            graph.reset()
    assert left[1] == left[-1], left
