"""Times of a recording: of a whole call and of each step, on the host and on the GPU."""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeGuard, TypeVar

import torch

from breakable_backend import active
from breakable_backend.calling.release import run_deferred
from breakable_backend.drivers import CaptureDriver
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.recording import Call, EagerStep, GraphStep, Recording, Step
from breakable_backend.recordings.replay import Mark, emit
from breakable_backend.tools.progress import Progress

S = TypeVar("S", EagerStep, GraphStep)

LOOPS = 15
BURST = 5
"""Calls issued to an idle GPU, so few that none of their launches waits for room in the queue."""
SECONDS = 1.0
"""About how long one loop of measurements may take, at most."""


@dataclass(frozen=True)
class StepTime:
    """The times of one step, medians of several replays."""

    host_us: float
    """Until the step was issued, with the copies into its bridges."""
    gpu_us: float | None
    """GPU time of its kernels and copies; None without a GPU, or if no profiler can tell."""


@dataclass(frozen=True)
class Times:
    host_us: float
    total_us: float


@dataclass(frozen=True)
class Timed:
    """A recording with its times."""

    driver: CaptureDriver
    recording: Recording
    times: Times
    steps: tuple[StepTime, ...]
    costliest: Mapping[int, Call]
    """By the position of an eager step, its call that takes longest."""

    def of_kind(self, kind: type[S]) -> Iterator[tuple[S, StepTime]]:
        """The steps of one kind with their times."""
        pairs = zip(self.recording.steps, self.steps, strict=True)
        return ((step, timed) for step, timed in pairs if isinstance(step, kind))

    def loads(self) -> Iterator[tuple[str, Bridge]]:
        """The values that are copied into bridges in each call, by name."""
        for step, _ in self.of_kind(GraphStep):
            for copy in step.loads:
                yield copy.value.name, self.recording.constants[copy.bridge.name]


def time_recording(
    bench: Bench,
    recording: Recording,
    run: Callable[[int], Any],
    args: Sequence[Any],
    modes: AbstractContextManager[None],
    progress: Progress,
) -> Timed:
    """The times of a recording, which ``run`` replays on a stream; ``modes`` are those of its steps."""
    with _alone(bench.driver) as stream:
        times = bench.times(lambda: run(stream))
        progress.advance()
        with modes:
            steps, costliest = _timed_steps(bench, recording, args, stream)
        progress.advance()
    return Timed(bench.driver, recording, times, steps, costliest)


@contextmanager
def quiet_bench(driver: CaptureDriver, written: Callable[[], Sequence[torch.UntypedStorage]]) -> Iterator[Bench]:
    """A bench that has the pool to itself: otherwise writes of another thread's call would be undone with ours.

    At the end what the calls wrote and drew is restored.
    """
    gpus = range(torch.cuda.device_count()) if driver.device.type == "cuda" else ()
    with driver.lock, torch.random.fork_rng(gpus):
        bench = Bench(driver, written())
        try:
            yield bench
        finally:
            bench.put_back()


@contextmanager
def _alone(driver: CaptureDriver) -> Iterator[int]:
    """The pool without other users, as in a call. What is to be released meanwhile is released at the end."""
    with driver.lock, active.calling():
        before, driver.busy = driver.busy, True
        try:
            stream = driver.begin()
            try:
                yield stream
            finally:
                driver.end(stream)
        finally:
            driver.busy = before
    run_deferred(driver)


class Bench:
    """Times calls that write ``storages``, and restores these after each call: a cache must not run past its end."""

    def __init__(self, driver: CaptureDriver, storages: Sequence[torch.UntypedStorage] = ()) -> None:
        self.driver = driver
        self._saved = [(storage, storage.clone()) for storage in storages]

    def wait(self) -> None:
        """Wait until the GPU is done."""
        for device in self.driver.devices if self.driver.device.type == "cuda" else ():
            torch.cuda.synchronize(device)

    def put_back(self) -> None:
        """Restore what calls wrote."""
        for storage, before in self._saved:
            storage.copy_(before)
        self.wait()

    def times(self, call: Callable[[], Any]) -> Times:
        """Host and total time of a call: medians over loops, after one that does not count.

        If nothing has to be restored, calls come in bursts: the GPU then works off a queue, as in a user's loop.
        """
        self._loop(call, 1)
        if self._saved:
            return Times(*self._median(call, 1))
        host, _ = self._median(call, BURST)
        _, total = self._median(call, 4 * BURST)
        return Times(host, total)

    def _median(self, call: Callable[[], Any], burst: int) -> tuple[float, float]:
        loops: list[tuple[float, float]] = []
        deadline = time.perf_counter() + SECONDS
        while len(loops) < LOOPS and (len(loops) < 3 or time.perf_counter() < deadline):
            loops.append(self._loop(call, burst))
        return median(host for host, _ in loops), median(total for _, total in loops)

    def _loop(self, call: Callable[[], Any], burst: int) -> tuple[float, float]:
        started = time.perf_counter_ns()
        for _ in range(burst):
            call()
        issued = time.perf_counter_ns()
        self.wait()
        done = time.perf_counter_ns()
        self.put_back()
        return (issued - started) / burst / 1e3, (done - started) / burst / 1e3


def _timed_steps(
    bench: Bench, recording: Recording, args: Sequence[Any], stream: int
) -> tuple[tuple[StepTime, ...], dict[int, Call]]:
    """The times of the steps; and for each eager step its call that takes longest."""
    parts = [(position, part) for position, step in enumerate(recording.steps) for part in _parts(step)]
    pieces = tuple(part for _, part in parts)
    times = _timed_one_by_one(bench, replace(recording, steps=pieces), args, stream)
    steps: list[StepTime] = []
    costliest: dict[int, Call] = {}
    for position, group in itertools.groupby(zip(parts, times, strict=True), key=lambda timed: timed[0][0]):
        of_step = [(part, spent) for (_, part), spent in group]
        gpu = [spent.gpu_us for _, spent in of_step if spent.gpu_us is not None]
        steps.append(StepTime(sum(spent.host_us for _, spent in of_step), sum(gpu) if gpu else None))
        calls = [(part.calls[0], spent) for part, spent in of_step if _calls_an_op(part)]
        if calls:
            costliest[position] = max(calls, key=lambda call: max(call[1].host_us, call[1].gpu_us or 0.0))[0]
    return tuple(steps), costliest


def _parts(step: Step) -> list[Step]:
    """A step; an eager one call by call."""
    if isinstance(step, EagerStep) and step.calls:
        return [replace(step, calls=(call,)) for call in step.calls]
    return [step]


def _calls_an_op(step: Step) -> TypeGuard[EagerStep]:
    return isinstance(step, EagerStep) and any(not call.takes_part for call in step.calls)


def _timed_one_by_one(bench: Bench, recording: Recording, args: Sequence[Any], stream: int) -> tuple[StepTime, ...]:
    stamps = [0] * (len(recording.steps) + 1)

    def stamp(position: int) -> None:
        stamps[position] = time.perf_counter_ns()

    loops = [
        [(after - before) / 1e3 for before, after in itertools.pairwise(stamps)]
        for _ in _replays(bench, recording, stamp, args, stream)
    ]
    gpu = _gpu_times(bench, recording, args, stream)
    return tuple(
        StepTime(median(loop[i] for loop in loops), gpu[i] if gpu is not None else None)
        for i in range(len(recording.steps))
    )


def _gpu_times(bench: Bench, recording: Recording, args: Sequence[Any], stream: int) -> list[float] | None:
    """Time in kernels and copies, by step: what a profiler sees while each step waits for the one before.

    The time between events would include the GPU's waits for the host.
    """
    if bench.driver.device.type != "cuda":
        return None
    steps = range(len(recording.steps))
    window = ExitStack()

    def mark(position: int) -> None:
        bench.wait()
        window.close()
        if position in steps:
            window.enter_context(torch.profiler.record_function(f"{_WINDOW}{position}"))

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        loops = sum(1 for _ in _replays(bench, recording, mark, args, stream))
    windows, work = [], []
    for event in profile.events():
        on_gpu = event.device_type == torch.profiler.DeviceType.CUDA
        if event.name.startswith(_WINDOW) and not on_gpu:
            windows.append((event.time_range.start, event.time_range.end, int(event.name.removeprefix(_WINDOW))))
        elif on_gpu and not event.is_user_annotation:
            work.append((event.time_range.start, event.time_range.elapsed_us()))
    windows.sort()
    spent = [0.0] * len(steps)
    starts = [start for start, _, _ in windows]
    for start, us in work:
        at = bisect.bisect_right(starts, start) - 1
        if at >= 0 and start <= windows[at][1]:
            spent[windows[at][2]] += us
    return [us / loops for us in spent] if work else None


_WINDOW = "breakable_cg measures step "


def _replays(bench: Bench, recording: Recording, mark: Mark, args: Sequence[Any], stream: int) -> Iterator[None]:
    """Replay again and again, with ``mark`` between the steps."""
    marked = emit(recording, mark)
    for _ in range(LOOPS):
        marked.function(list(args), stream)
        bench.wait()
        bench.put_back()
        yield
