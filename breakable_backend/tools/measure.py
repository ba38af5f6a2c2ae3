"""Times of each step of a recording, on the host and on the GPU, and of the whole against eager: does it pay?"""

from __future__ import annotations

import bisect
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, TypeGuard, TypeVar

import torch
from torch import fx

from breakable_backend import active
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry, Key
from breakable_backend.calling.registry import executors_of
from breakable_backend.calling.release import run_deferred
from breakable_backend.calling.snapshot import KeySnapshot, Snapshot, uncounted
from breakable_backend.capturing.graph import BreakableCUDAGraph
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import under_ambient
from breakable_backend.drivers import CaptureDriver
from breakable_backend.errors import OptionsError
from breakable_backend.ir.source_lines import short_line
from breakable_backend.recordings import copies
from breakable_backend.recordings.copies import Bridge, clone_exact
from breakable_backend.recordings.recording import Call, EagerStep, GraphStep, Recording, Step
from breakable_backend.recordings.replay import Mark, emit
from breakable_backend.tools.progress import Progress

S = TypeVar("S", EagerStep, GraphStep)

PAYS, LOSES = 1.05, 0.95
"""Eager's time over the replay's from which on a recording pays, and below which it does not."""
BUSY = 0.9
"""If the GPU works for this share of a call or more, launches are not the bottleneck."""
OUTSIDE = 0.1
"""If the host spends this share of a call or more around the replay, the report mentions it."""
DEAR = 0.25
"""If an eager op takes this share of a call's host time or more, the report mentions it."""
SMALL = 8
"""In ops. Longer segments are not small."""
LOOPS = 15
BURST = 5
"""Calls issued to an idle GPU, so few that none of their launches waits for room in the queue."""
SECONDS = 1.0
"""About how long one loop of measurements may take, at most."""
STAGES = 4
"""The stages of the progress bar: the replays of a recording, its steps, whole calls, and the reference."""


@dataclass(frozen=True)
class StepTime:
    """The times of one step, medians of several replays."""

    host_us: float
    """Until the step was issued, with the copies into its bridges."""
    gpu_us: float | None
    """GPU time of its kernels and copies; None without a GPU, or if no profiler can tell."""


@dataclass(frozen=True)
class BreakCost:
    """The time of an eager step, with the copies of its results into captured segments."""

    step: int
    op: str
    """The op in it that takes longest."""
    source: str
    """The user's line that called that op."""
    host_us: float
    share: float
    """Its share of the host time of a call."""


@dataclass(frozen=True)
class Advice:
    """Something that would help, and the number that supports it."""

    what: str
    evidence: str
    saves_us: float
    """The host time of a call that it saves, at most."""


@dataclass(frozen=True)
class Measured:
    """Times of one recording, in microseconds a call."""

    eager_us: float | None
    """A call of what it is compared with; None if there is nothing."""
    eager_how: str
    """What it is compared with."""
    host_us: float
    """The time to issue a call."""
    total_us: float
    """The time of a call until the GPU is done, in a row of calls."""
    steps: tuple[StepTime, ...]
    breaks: tuple[BreakCost, ...]
    """The costliest first."""
    advice: tuple[Advice, ...]
    """The most helpful first."""
    note: str = ""
    """Why the figures do not tell whether it pays; empty if they do."""

    @property
    def busy(self) -> float | None:
        """The share of a call in which the GPU works; None without a GPU."""
        gpu = [step.gpu_us for step in self.steps if step.gpu_us is not None]
        return min(1.0, sum(gpu) / self.total_us) if gpu else None

    @property
    def verdict(self) -> str:
        """Whether it pays, in one line."""
        times = f"{self.total_us:,.0f} us a call, {self.host_us:,.0f} to issue it"
        if self.busy is not None:
            times += f", the GPU at work {self.busy:.0%} of it"
        if self.eager_us is None:
            return f"measured: {times}; nothing to compare with"
        ratio = self.eager_us / self.total_us
        if self.note:
            return f"measured: {times}; {self.eager_how} takes {self.eager_us:,.0f} us ({self.note})"
        says = "pays" if ratio >= PAYS else "does not pay" if ratio < LOSES else "about even"
        return f"{says}: {ratio:.2f} times as fast as {self.eager_how} ({self.eager_us:,.0f} us); {times}"

    def lines(self) -> Iterator[str]:
        """The costliest break, and what would help."""
        for cost in self.breaks[:1]:
            where = f" at {short_line(cost.source)}" if cost.source else ""
            yield f"costliest break: step {cost.step}, {cost.op}, {cost.host_us:.1f} us of host time ({cost.share:.0%}){where}"
        for advice in self.advice:
            yield f"{advice.what}: {advice.evidence}"


# --- what to replay -----------------------------------------------------------------------------------------------------

Place = tuple[str, Key]
"""A recording: the name of its graph, and its key."""


def measure_compiled(
    compiled: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    eager: Callable[[], Any] | None,
) -> dict[Place, Measured]:
    """Measure the recordings of a compiled function; with arguments, those that a call with them replays.

    Raises:
        OptionsError: nothing was recorded, or an input is not kept by a bridge.
    """
    debugged = next((executor for executor in executors_of(compiled) if executor.options.debug is not None), None)
    if debugged is not None:
        raise OptionsError(
            f"{debugged.name} is in debug mode, where times mean nothing", fix="measure without options={'debug': ...}"
        )
    call = functools.partial(compiled, *args, **kwargs)

    def uncompiled() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call()

    given = bool(args or kwargs)
    replayed = _replayed(compiled, call) if given else {}
    whole, reference = None, _Reference.given(eager)
    if len(replayed) == 1:
        whole, reference = call, reference or _Reference(uncompiled, "eager")
    elif given:
        reference = None  # a call is more than any one of them
    executors = executors_of(compiled)
    measured: dict[Place, Measured] = {}
    with Progress("measuring", STAGES * (len(replayed) or sum(map(_num_recordings, executors)))) as progress:
        for executor in executors:
            with executor.driver.lock:  # the recordings stay as they are
                snapshot = executor.snapshot()
                for key in snapshot.keys:
                    place = executor.name, key.key
                    if key.recording is not None and (not given or place in replayed):
                        values = replayed[place] if given else _kept_arguments(snapshot, key)
                        measured[place] = _measure_key(executor, snapshot, key, values, progress, whole, reference)
    if measured:
        return measured
    if not given:
        raise OptionsError(
            "there is nothing to measure: no call was recorded",
            fix="call the function three times first, or give arguments: explain(compiled, *args, measure=True)",
        )
    raise OptionsError(
        "there is nothing to measure: the call replays nothing",
        fix="call explain under torch.no_grad()" if torch.is_grad_enabled() else "explain(compiled) says why",
    )


def _replayed(compiled: Any, call: Callable[[], Any]) -> dict[Place, list[Any]]:
    """What ``call`` of ``compiled`` replays, with its arguments. A call that learns, runs plainly, or records, is repeated."""
    # Two calls that learn what marked functions return, a plain one, one that records, one that replays.
    for _ in range(5):
        found: dict[Place, list[Any]] = {}
        executors = executors_of(compiled)

        def spectator(name: str, entry: Entry, args: list[Any], found: Any = found) -> None:
            found[name, entry.key] = args

        calls = _num_calls(executors)
        with ExitStack() as stack:
            for executor in executors:
                stack.enter_context(executor.showing(functools.partial(spectator, executor.name)))
            call()
        if found and _num_calls(executors) - calls == len(found):
            break
    return found


def _num_recordings(executor: Executor) -> int:
    return sum(key.recording is not None for key in executor.snapshot().keys)


def _num_calls(executors: Sequence[Executor]) -> int:
    return sum(executor.snapshot().statistics.calls for executor in executors)


@dataclass(frozen=True)
class _Reference:
    """What times are compared with."""

    call: Callable[[], Any]
    how: str

    @classmethod
    def given(cls, call: Callable[[], Any] | None) -> _Reference | None:
        return cls(call, "what it is compared with") if call is not None else None


def _kept_arguments(snapshot: Snapshot, key: KeySnapshot) -> list[Any]:
    """Arguments like those of the last replay, from what the executor and the recording keep of them.

    The bridge of a large input shares its memory with other values. Zeros take its place, since they are valid indices.

    Raises:
        OptionsError: an input is read in place, or by eager steps only, and so is not kept.
    """
    assert key.recording is not None
    statics, numbers = iter(key.statics), iter(key.key.shapes)
    values: list[Any] = []
    for value in snapshot.program.inputs:
        if value.index < 0:
            continue
        bridge = key.recording.bridge_of(value.name)
        if value.kind == "static":
            values.append(next(statics))
        elif value.kind == "number" and value.name not in snapshot.program.passed_on:
            values.append(next(numbers))
        elif bridge is not None:
            kept = key.recording.most is None or bridge.num_bytes <= copies.KEPT_INPUT
            values.append(clone_exact(bridge.tensor) if kept else Bridge.zeros(bridge.tensor).tensor)
        else:
            raise OptionsError(
                f"the input {value.name} is not kept between calls, so there is nothing to replay",
                fix="give arguments: explain(compiled, *args, measure=True)",
            )
    return values


def _written(snapshot: Snapshot, recording: Recording, args: Sequence[Any]) -> list[torch.UntypedStorage]:
    """The storages that a call writes and that others read: the caller's, and what a pending forward saved."""
    program, slots = snapshot.program, snapshot.slots
    names = {access.storage for segment in program.segments for access in segment.writes}
    inputs = [args[v.index].untyped_storage() for v in program.inputs if v.index >= 0 and v.name in names]
    saved = recording.saved if slots is not None and slots.pending else ()
    return [*inputs, *(owner.untyped_storage() for owner in saved)]


# --- timing -------------------------------------------------------------------------------------------------------------


def _measure_key(
    executor: Executor,
    snapshot: Snapshot,
    key: KeySnapshot,
    args: Sequence[Any],
    progress: Progress,
    whole: Callable[[], Any] | None,
    reference: _Reference | None,
) -> Measured:
    """Measure a recording; with ``whole``, as a part of that call, with Dynamo's guards."""
    recording, run = key.recording, key.run
    assert recording is not None
    assert run is not None
    module = _uncaptured(snapshot.lowered)
    plain = _Reference(torch.no_grad()(lambda: module.forward(*args)), "its ATen ops, run eagerly")
    with _bench(snapshot.driver, lambda: _written(snapshot, recording, args)) as bench, executor.uncounted():
        with torch.no_grad():
            timed = _timed(bench, recording, lambda stream: run(list(args), stream), args, nullcontext(), progress)
        outside = 0.0
        # In the caller's grad mode, on which Dynamo guards: in another one the call would run another program.
        if whole is not None:
            times = bench.times(whole)
            outside = max(0.0, times.host_us - timed.times.host_us)
            timed = replace(timed, times=times)
        progress.advance()
        judged = _judged(timed, bench, reference or plain, plain, outside)
        progress.advance()
        return judged


def measure_graph(graph: BreakableCUDAGraph, eager: Callable[[], Any] | None) -> Measured:
    """Measure what ``with capture(graph)`` captured.

    Raises:
        OptionsError: nothing was captured.
    """
    snapshot = graph.snapshot()
    recording, replay, driver = snapshot.recording, snapshot.replay, snapshot.driver
    if recording is None or replay is None or driver is None:
        raise OptionsError("there is nothing to measure: the graph is empty", fix="capture first")
    if snapshot.debug is not None:
        raise OptionsError("the graph is in debug mode, where times mean nothing", fix="capture without debug=...")
    progress = Progress("measuring", STAGES - 1)
    with _bench(driver, lambda: graph.written) as bench, uncounted(replay.tally), progress:
        timed = _timed(bench, recording, graph.run, (), graph.modes.enter(), progress)
        judged = _judged(timed, bench, _Reference.given(eager), None)
        progress.advance()
        return judged


def _timed(
    bench: _Bench,
    recording: Recording,
    run: Callable[[int], Any],
    args: Sequence[Any],
    modes: AbstractContextManager[None],
    progress: Progress,
) -> _Timed:
    """The times of a recording, which ``run`` replays on a stream; ``modes`` are those of its steps."""
    with _alone(bench.driver) as stream:
        times = bench.times(lambda: run(stream))
        progress.advance()
        with modes:
            steps, costliest = _timed_steps(bench, recording, args, stream)
        progress.advance()
    return _Timed(bench.driver, recording, times, steps, costliest)


def _judged(
    timed: _Timed, bench: _Bench, reference: _Reference | None, plain: _Reference | None, outside: float = 0.0
) -> Measured:
    """What the times of a recording mean, compared with ``reference``.

    ``plain``: its ops, run eagerly. ``outside``: microseconds of host time around the replay.
    """
    eager_us = bench.times(reference.call).total_us if reference is not None else None
    kind = timed.driver.name
    note = "" if kind == "cuda" else f"the {kind} driver runs on the CPU and shows no speed"
    per_op = None
    if plain is not None and not note:
        per_op = bench.times(plain.call).host_us / max(1, sum(map(_num_ops, timed.recording.steps)))
    breaks, host_us = _breaks(timed), timed.times.host_us
    measured = Measured(
        eager_us=eager_us,
        eager_how=reference.how if reference is not None else "",
        host_us=host_us,
        total_us=timed.times.total_us,
        steps=timed.steps,
        breaks=breaks,
        advice=(),
        note=note,
    )
    busy = measured.busy or 0.0
    advice = list(_advice(timed, breaks, busy, per_op))
    if outside >= OUTSIDE * host_us and busy < BUSY:
        advice.append(
            Advice(
                "skip Dynamo's guards, where you know that they hold: torch.compiler.set_stance(skip_guard_eval_unsafe=True)",
                f"guards, wrappers and the key take {outside:.1f} of {host_us:.1f} us of host time",
                outside,
            )
        )
    return replace(measured, advice=tuple(sorted(advice, key=lambda item: item.saves_us, reverse=True)))


@contextmanager
def _bench(driver: CaptureDriver, written: Callable[[], Sequence[torch.UntypedStorage]]) -> Iterator[_Bench]:
    """A bench that has the pool to itself: otherwise writes of another thread's call would be undone with ours.

    At the end what the calls wrote and drew is restored.
    """
    gpus = range(torch.cuda.device_count()) if driver.device.type == "cuda" else ()
    with driver.lock, torch.random.fork_rng(gpus):
        bench = _Bench(driver, written())
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


@dataclass(frozen=True)
class _Times:
    host_us: float
    total_us: float


@dataclass(frozen=True)
class _Timed:
    """A recording with its times."""

    driver: CaptureDriver
    recording: Recording
    times: _Times
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


class _Bench:
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

    def times(self, call: Callable[[], Any]) -> _Times:
        """Host and total time of a call: medians over loops, after one that does not count.

        If nothing has to be restored, calls come in bursts: the GPU then works off a queue, as in a user's loop.
        """
        self._loop(call, 1)
        if self._saved:
            return _Times(*self._median(call, 1))
        host, _ = self._median(call, BURST)
        _, total = self._median(call, 4 * BURST)
        return _Times(host, total)

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


def _uncaptured(lowered: Lowered) -> fx.GraphModule:
    """The whole graph as one module, with the modes of its eager steps: the least that eager could take."""
    module = lowered.module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    under_ambient(graph)
    return fx.GraphModule(module, graph)


def _timed_steps(
    bench: _Bench, recording: Recording, args: Sequence[Any], stream: int
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


def _timed_one_by_one(bench: _Bench, recording: Recording, args: Sequence[Any], stream: int) -> tuple[StepTime, ...]:
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


def _gpu_times(bench: _Bench, recording: Recording, args: Sequence[Any], stream: int) -> list[float] | None:
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


def _replays(bench: _Bench, recording: Recording, mark: Mark, args: Sequence[Any], stream: int) -> Iterator[None]:
    """Replay again and again, with ``mark`` between the steps."""
    marked = emit(recording, mark)
    for _ in range(LOOPS):
        marked.function(list(args), stream)
        bench.wait()
        bench.put_back()
        yield


# --- what it means --------------------------------------------------------------------------------------------------------


def _num_ops(step: GraphStep | EagerStep) -> int:
    if step.segment is None:
        return len(step.calls) if isinstance(step, EagerStep) else len(step.ops)
    return sum(node.op == "call_function" for node in step.segment.module.graph.nodes)


def _breaks(timed: _Timed) -> tuple[BreakCost, ...]:
    costs: list[BreakCost] = []
    for position, (step, spent) in enumerate(zip(timed.recording.steps, timed.steps, strict=True)):
        if isinstance(step, EagerStep):
            call, first = timed.costliest.get(position), step.reasons[0]
            op, source = (call.label, call.source) if call is not None else (first.op, first.source)
            share = min(1.0, spent.host_us / timed.times.host_us)
            costs.append(BreakCost(position, op, source, spent.host_us, share))
    return tuple(sorted(costs, key=lambda cost: cost.host_us, reverse=True))


def _advice(timed: _Timed, breaks: Sequence[BreakCost], busy: float, per_op: float | None) -> Iterator[Advice]:
    if busy >= BUSY:
        yield Advice(
            "the GPU is what a call waits for: faster kernels would help, fewer launches would not",
            f"it works {busy:.0%} of a call",
            0.0,
        )
        return
    yield from _fewer_marks(timed)
    yield from _given_buffers(timed)
    yield from _in_place_inputs(timed)
    if per_op is not None:
        yield from _small_segments(timed, per_op)
    for op in dict.fromkeys(cost.op for cost in breaks):
        costs = [cost for cost in breaks if cost.op == op]
        share, us = sum(cost.share for cost in costs), sum(cost.host_us for cost in costs)
        if share >= DEAR:
            steps_take = f"its {len(costs)} steps take" if len(costs) > 1 else f"step {costs[0].step} takes"
            yield Advice(f"make {op} cheaper, or capturable", f"{steps_take} {min(share, 1):.0%} of the host time", us)


def _fewer_marks(timed: _Timed) -> Iterator[Advice]:
    """PyTorch's own ops that only a mark keeps out of the graphs."""
    found: dict[str, float] = {}
    for step, spent in timed.of_kind(EagerStep):
        ops = {reason.op for reason in step.reasons}
        if all(r.rule in ("marked", "region") for r in step.reasons) and all(op.startswith("aten::") for op in ops):
            for op in ops:
                found[op] = found.get(op, 0.0) + spent.host_us / len(ops)
    for op, us in found.items():
        yield Advice(
            f"mark fewer: {op} is eager only because it is marked", f"its steps take {us:.1f} us of host time", us
        )


def _given_buffers(timed: _Timed) -> Iterator[Advice]:
    """Results of eager steps that are copied into bridges."""
    made = {call.result: step.reasons[0].op for step, _ in timed.of_kind(EagerStep) for call in step.calls}
    copied = [(name, bridge) for name, bridge in timed.loads() if name in made]
    if copied:
        size = sum(bridge.tensor.untyped_storage().nbytes() for _, bridge in copied)
        us = sum(_copy_us(timed.driver, bridge) for _, bridge in copied)
        label = made[copied[0][0]]
        yield Advice(
            "let eager steps write into a tensor that they are given (mutates_args) instead of returning a new one",
            f"{len(copied)} result{'s' * (len(copied) != 1)}, {label}'s first, copied in each call: {size:,} B, {us:.1f} us of host time",
            us,
        )


def _in_place_inputs(timed: _Timed) -> Iterator[Advice]:
    names = set(timed.recording.arguments)
    for name, bridge in {name: bridge for name, bridge in timed.loads() if name in names}.items():
        size, us = bridge.tensor.untyped_storage().nbytes(), _copy_us(timed.driver, bridge)
        yield Advice(
            f"keep the input {name} at one address (torch._dynamo.mark_static_address), if it is written in place",
            f"it is copied in each call: {size:,} B, {us:.1f} us of host time",
            us,
        )


def _copy_us(driver: CaptureDriver, bridge: Bridge) -> float:
    # Copied to separate memory: another thread's call may use the bridge's memory for another value.
    source, target = clone_exact(bridge.tensor), Bridge.zeros(bridge.tensor)
    return _Bench(driver).times(lambda: target.load(source)).host_us


def _small_segments(timed: _Timed, per_op: float) -> Iterator[Advice]:
    """Captured segments that take more host time than their ops would."""
    losing = [
        (spent.host_us - per_op * _num_ops(step), step.segment.num_kernels)
        for step, spent in timed.of_kind(GraphStep)
        if step.segment is not None and step.segment.num_kernels <= SMALL and spent.host_us > per_op * _num_ops(step)
    ]
    if losing:
        saved, largest = sum(gain for gain, _ in losing), max(kernels for _, kernels in losing)
        yield Advice(
            f"merge: run small segments eagerly with options={{'min_kernels': {largest + 1}}}",
            f"{len(losing)} segment{'s' * (len(losing) != 1)} of at most {largest} ops cost {saved:.1f} us more than their ops would ({per_op:.1f} us each)",
            saved,
        )
