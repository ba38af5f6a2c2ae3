"""Does it pay? Each step of a recording timed, on the host and on the GPU, and the whole against eager."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch, active
from breakable_backend.buffers import Bridge
from breakable_backend.capture import BreakableCUDAGraph
from breakable_backend.drivers import CaptureDriver
from breakable_backend.errors import OptionsError
from breakable_backend.executor import Entry, Executor
from breakable_backend.partition import under_ambient
from breakable_backend.recording import EagerStep, GraphStep, Recording
from breakable_backend.replay import Tally, emit

PAYS, LOSES = 1.05, 0.95
"""Eager's time over the replay's from which on a recording pays, and below which it does not."""
BUSY = 0.9
"""Share of a call in which the GPU works, from which on launches are not what the call waits for."""
LOOPS = 15
BURST = 5
"""Calls issued to an idle GPU, so that none of their launches waits for room in the queue."""
SECONDS = 1.0
"""How long one loop of measurements may take, at most about that."""


@dataclass(frozen=True)
class StepTime:
    """One step, median of several replays."""

    host_us: float
    """Until the step was issued, the copies into its bridges included."""
    gpu_us: float | None
    """What the GPU was at work with it, while the host was ahead; None without a GPU."""


@dataclass(frozen=True)
class BreakCost:
    """What an eager step costs, and with it the copies of its results into captured segments."""

    step: int
    op: str
    source: str
    host_us: float
    share: float
    """Of the host time of a call."""


@dataclass(frozen=True)
class Advice:
    """Something that would help, and the number that says so."""

    what: str
    evidence: str
    saves_us: float
    """Host time of a call, at most."""


@dataclass(frozen=True)
class Measured:
    """Times of one recording, in microseconds a call."""

    eager_us: float | None
    """A call of what it is compared with; None if there is nothing."""
    eager_how: str
    """What that was."""
    host_us: float
    """To issue a call."""
    total_us: float
    """A call until the GPU is done, in a row of calls."""
    steps: tuple[StepTime, ...]
    breaks: tuple[BreakCost, ...]
    """Costliest first."""
    advice: tuple[Advice, ...]
    """Most helpful first."""
    note: str = ""
    """What to keep in mind."""

    @property
    def busy(self) -> float | None:
        """Share of a call in which the GPU works; None without one."""
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
        says = "pays" if ratio >= PAYS else "does not pay" if ratio < LOSES else "about even"
        note = f" ({self.note})" if self.note else ""
        return f"{says}: {ratio:.2f} times as fast as {self.eager_how} ({self.eager_us:,.0f} us); {times}{note}"

    def lines(self) -> Iterator[str]:
        """The costliest break, and what would help."""
        for cost in self.breaks[:1]:
            where = f" at {cost.source}" if cost.source else ""
            yield f"costliest break: step {cost.step}, {cost.op}, {cost.host_us:.1f} us of host time ({cost.share:.0%}){where}"
        for advice in self.advice:
            yield f"{advice.what}: {advice.evidence}"


# --- what to replay -----------------------------------------------------------------------------------------------------


def measure_compiled(
    compiled: Any,
    executors_of: Callable[[Any], Sequence[Executor]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    eager: Callable[[], Any] | None,
) -> dict[Entry, Measured]:
    """Measure the recordings behind a compiled function; with arguments, those that a call with them replays.

    Raises:
        OptionsError: nothing was recorded, or an input is kept by no bridge.
    """
    if not (args or kwargs):
        found = [
            (executor, entry)
            for executor in executors_of(compiled)
            for addresses in executor.sets.values()
            for entry in addresses.entries.values()
            if entry.recording is not None
        ]
        _require(found)
        return {
            entry: _measure_entry(executor, entry, _kept_arguments(executor, entry), eager) for executor, entry in found
        }
    tapped: dict[Entry, tuple[Executor, list[Any]]] = {}
    for _ in range(3):  # plain, recording, replay
        tapped.clear()
        with _tapped(executors_of(compiled), tapped):
            compiled(*args, **kwargs)
    _require(tapped)
    with _put_back([storage for executor, values in tapped.values() for storage in _written(executor, values)]):
        force_eager = eager is None

        def uncompiled() -> Any:
            with torch.compiler.set_stance("force_eager"):
                return compiled(*args, **kwargs)

        reference = _Reference(eager or uncompiled, "eager" if force_eager else "what it is compared with")
        return {
            entry: _measure_entry(executor, entry, values, None, reference if len(tapped) == 1 else None)
            for entry, (executor, values) in tapped.items()
        }


@dataclass(frozen=True)
class _Reference:
    call: Callable[[], Any]
    how: str


def _require(found: Any) -> None:
    if not found:
        raise OptionsError(
            "there is nothing to measure: no call was recorded",
            fix="call the function three times first, or give arguments: explain(compiled, *args, measure=True)",
        )


@contextmanager
def _tapped(executors: Sequence[Executor], into: dict[Entry, tuple[Executor, list[Any]]]) -> Iterator[None]:
    for executor in executors:
        executor.tap = lambda entry, args, executor=executor: into.__setitem__(entry, (executor, args))
    try:
        yield
    finally:
        for executor in executors:
            executor.tap = None


def _kept_arguments(executor: Executor, entry: Entry) -> list[Any]:
    """Arguments like those of the last replay, from what the executor and the recording keep of them.

    Raises:
        OptionsError: an input is read in place, or by eager steps alone, and so is kept nowhere.
    """
    assert entry.recording is not None
    statics = iter([ref() for ref in executor.sets[entry.key.addresses].guards])
    numbers = iter(entry.key.shapes)
    values: list[Any] = []
    for value in executor.program.inputs:
        if value.index < 0:
            continue
        bridge = entry.recording.constants.get(f"{value.name}.bridge")
        if value.kind == "static":
            values.append(next(statics))
        elif value.kind == "number":
            values.append(next(numbers))
        elif isinstance(bridge, Bridge):
            values.append(bridge.tensor.clone())
        else:
            raise OptionsError(
                f"the input {value.name} is not kept between calls, so there is nothing to replay",
                fix="give arguments: explain(compiled, *args, measure=True)",
            )
    return values


def _written(executor: Executor, args: Sequence[Any]) -> list[torch.UntypedStorage]:
    """Storages of the caller's that a call writes."""
    names = {access.storage for segment in executor.program.segments for access in segment.writes}
    return [args[v.index].untyped_storage() for v in executor.program.inputs if v.index >= 0 and v.name in names]


# --- timing -------------------------------------------------------------------------------------------------------------


def _measure_entry(
    executor: Executor,
    entry: Entry,
    args: Sequence[Any],
    eager: Callable[[], Any] | None,
    reference: _Reference | None = None,
) -> Measured:
    assert entry.recording is not None
    assert entry.replay is not None
    replay = entry.replay.function
    if eager is not None:
        reference = _Reference(eager, "what it is compared with")
    module = _uncaptured(executor)
    plain = _Reference(lambda: module.forward(*args), "its ATen ops, run eagerly")
    with _put_back(_written(executor, args)), _uncounted(entry.replay.tally), torch.no_grad():
        return _measure(
            executor.driver, entry.recording, lambda stream: replay(list(args), stream), args, reference or plain, plain
        )


def measure_graph(graph: BreakableCUDAGraph, eager: Callable[[], Any] | None) -> Measured:
    """Measure what was captured by ``with capture(graph)``.

    Raises:
        OptionsError: nothing was captured.
    """
    recording, driver = graph.recording, graph.driver
    if recording is None or driver is None:
        raise OptionsError("there is nothing to measure: the graph holds nothing", fix="capture first")
    reference = _Reference(eager, "what it is compared with") if eager is not None else None
    assert graph.tally is not None
    with _put_back(graph.written), _uncounted(graph.tally):
        return _measure(driver, recording, graph.run, (), reference, None)


def _measure(
    driver: CaptureDriver,
    recording: Recording,
    replay: Callable[[int], Any],
    args: Sequence[Any],
    reference: _Reference | None,
    plain: _Reference | None,
) -> Measured:
    wait = _wait(driver.device)
    with _alone(driver) as stream:
        host_us, total_us = _timed(lambda: replay(stream), wait)
        steps = _timed_steps(recording, args, stream, driver.device, host_us, wait)
        if reference is not None:
            token = active.in_call.set(False)
            try:
                _, eager_us = _timed(reference.call, wait)
            finally:
                active.in_call.reset(token)
        else:
            eager_us = None
        per_op = None
        if plain is not None:
            ops = sum(_num_ops(step) for step in recording.steps)
            per_op = _timed(plain.call, wait)[0] / max(ops, 1)
    breaks = _breaks(recording, steps, host_us)
    busy = sum(step.gpu_us for step in steps if step.gpu_us is not None) / total_us
    advice = tuple(
        sorted(_advice(recording, steps, breaks, host_us, busy, per_op), key=lambda item: item.saves_us, reverse=True)
    )
    how = reference.how if reference is not None else ""
    note = "" if driver.name == "cuda" else f"the {driver.name} driver shows no speed"
    return Measured(eager_us, how, host_us, total_us, steps, breaks, advice, note)


@contextmanager
def _alone(driver: CaptureDriver) -> Iterator[int]:
    """The pool for ourselves, as in a call."""
    with driver.lock:
        token = active.in_call.set(True)
        stream = driver.begin()
        try:
            yield stream
        finally:
            driver.end(stream)
            active.in_call.reset(token)


@contextmanager
def _put_back(storages: Sequence[torch.UntypedStorage]) -> Iterator[None]:
    """Restore ``storages`` and the random state, whatever happens inside."""
    saved = [(storage, storage.clone()) for storage in storages]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for storage, before in saved:
            storage.copy_(before)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _uncounted(tally: Tally) -> Iterator[None]:
    """Leave the counts of replays as they are."""
    copies = tally.copies
    try:
        yield
    finally:
        tally.copies = copies


def _uncaptured(executor: Executor) -> fx.GraphModule:
    """The whole graph as one module, with the ambient state of its eager steps: the least that eager could cost."""
    module = executor.lowered.module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    under_ambient(graph)
    return fx.GraphModule(module, graph)


def _wait(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _timed(call: Callable[[], Any], wait: Callable[[], None]) -> tuple[float, float]:
    """Host and total time of a call in microseconds: medians over loops."""
    call()
    wait()
    host, total = [], []
    deadline = time.perf_counter() + SECONDS
    for loop in range(LOOPS):
        started = time.perf_counter_ns()
        for _ in range(BURST):
            call()
        issued = time.perf_counter_ns()
        wait()
        host.append((issued - started) / BURST)
        if loop >= 2 and time.perf_counter() > deadline:
            break
    deadline = time.perf_counter() + SECONDS
    for loop in range(LOOPS):
        started = time.perf_counter_ns()
        for _ in range(4 * BURST):
            call()
        wait()
        total.append((time.perf_counter_ns() - started) / (4 * BURST))
        if loop >= 2 and time.perf_counter() > deadline:
            break
    return median(host) / 1e3, median(total) / 1e3


def _timed_steps(
    recording: Recording,
    args: Sequence[Any],
    stream: int,
    device: torch.device,
    host_us: float,
    wait: Callable[[], None],
) -> tuple[StepTime, ...]:
    """Times of each step. On the GPU they are taken while it works off a queue, so that it waits for nobody."""
    count = len(recording.steps)
    stamps: list[int] = []
    marked = emit(recording, lambda _: stamps.append(time.perf_counter_ns()))
    host: list[list[float]] = []
    try:
        for _ in range(LOOPS):
            stamps.clear()
            marked.function(list(args), stream)
            wait()
            host.append([(after - before) / 1e3 for before, after in itertools.pairwise(stamps)])
    finally:
        marked.forget()
    gpu: list[list[float]] = []
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marked = emit(recording, lambda position: events[position].record())
        try:
            for _ in range(LOOPS):
                _torch.keep_gpu_busy(3 * host_us + 20 * count)
                marked.function(list(args), stream)
                wait()
                gpu.append([before.elapsed_time(after) * 1e3 for before, after in itertools.pairwise(events)])
        finally:
            marked.forget()
    return tuple(
        StepTime(median(loop[i] for loop in host), median(loop[i] for loop in gpu) if gpu else None)
        for i in range(count)
    )


# --- what it means --------------------------------------------------------------------------------------------------------


def _num_ops(step: GraphStep | EagerStep) -> int:
    if step.segment is None:
        return len(step.calls) if isinstance(step, EagerStep) else len(step.ops)
    return sum(node.op == "call_function" for node in step.segment.module.graph.nodes)


def _breaks(recording: Recording, steps: Sequence[StepTime], host_us: float) -> tuple[BreakCost, ...]:
    costs = [
        BreakCost(i, step.reasons[0].op, step.reasons[0].source, time.host_us, min(1.0, time.host_us / host_us))
        for i, (step, time) in enumerate(zip(recording.steps, steps, strict=True))
        if isinstance(step, EagerStep)
    ]
    return tuple(sorted(costs, key=lambda cost: cost.host_us, reverse=True))


def _advice(
    recording: Recording,
    steps: Sequence[StepTime],
    breaks: Sequence[BreakCost],
    host_us: float,
    busy: float,
    per_op: float | None,
) -> Iterator[Advice]:
    if busy >= BUSY:
        yield Advice(
            "the GPU is what a call waits for: faster kernels would help, fewer launches would not",
            f"it works {busy:.0%} of a call",
            0.0,
        )
        return
    yield from _fewer_marks(recording, steps)
    yield from _given_buffers(recording)
    yield from _in_place_inputs(recording)
    if per_op is not None:
        yield from _small_segments(recording, steps, per_op)
    if breaks and breaks[0].share >= 0.25:
        cost = breaks[0]
        yield Advice(
            f"make {cost.op} cheaper, or capturable",
            f"step {cost.step} takes {cost.share:.0%} of the host time of a call",
            cost.host_us,
        )


def _fewer_marks(recording: Recording, steps: Sequence[StepTime]) -> Iterator[Advice]:
    """Ops of torch's own that nothing but a mark keeps out of the graphs."""
    found: dict[str, float] = {}
    for step, timed in zip(recording.steps, steps, strict=True):
        if isinstance(step, EagerStep):
            ops = {reason.op for reason in step.reasons}
            if all(r.rule in ("marked", "region") for r in step.reasons) and all(op.startswith("aten::") for op in ops):
                for op in ops:
                    found[op] = found.get(op, 0.0) + timed.host_us / len(ops)
    for op, us in found.items():
        yield Advice(
            f"mark fewer: {op} is eager only because it is marked", f"its steps take {us:.1f} us of host time", us
        )


def _given_buffers(recording: Recording) -> Iterator[Advice]:
    """Results of eager steps that are copied into bridges."""
    eager = [step for step in recording.steps if isinstance(step, EagerStep)]
    made = {call.result: step.reasons[0].op for step in eager for call in step.calls}
    copied = [
        (copy, recording.constants[copy.bridge.name])
        for step in recording.steps
        if isinstance(step, GraphStep)
        for copy in step.loads
        if copy.value.name in made
    ]
    if copied:
        size = sum(bridge.tensor.untyped_storage().nbytes() for _, bridge in copied)
        us = sum(_copy_us(bridge) for _, bridge in copied)
        label = made[copied[0][0].value.name]
        yield Advice(
            "let eager steps write into a tensor that they are given (mutates_args) instead of returning a new one",
            f"{len(copied)} result{'s' * (len(copied) != 1)}, {label}'s first, copied in each call: {size:,} B, {us:.1f} us of host time",
            us,
        )


def _in_place_inputs(recording: Recording) -> Iterator[Advice]:
    names = set(recording.arguments)
    copied = {
        copy.value.name: recording.constants[copy.bridge.name]
        for step in recording.steps
        if isinstance(step, GraphStep)
        for copy in step.loads
        if copy.value.name in names
    }
    for name, bridge in copied.items():
        size, us = bridge.tensor.untyped_storage().nbytes(), _copy_us(bridge)
        yield Advice(
            f"keep the input {name} at one address (torch._dynamo.mark_static_address), if it is written in place",
            f"it is copied in each call: {size:,} B, {us:.1f} us of host time",
            us,
        )


def _copy_us(bridge: Bridge) -> float:
    source = bridge.tensor.clone()
    wait = _wait(source.device)
    kept = bridge.tensor.clone()
    host, _ = _timed(lambda: bridge.load(source), wait)
    bridge.load(kept)
    return host


def _small_segments(recording: Recording, steps: Sequence[StepTime], per_op: float) -> Iterator[Advice]:
    """Captured segments that cost the host more than their ops would."""
    losing = [
        (timed.host_us - per_op * _num_ops(step), step.segment.num_kernels)
        for step, timed in zip(recording.steps, steps, strict=True)
        if isinstance(step, GraphStep) and step.segment is not None and timed.host_us > per_op * _num_ops(step)
    ]
    if losing:
        saved, largest = sum(gain for gain, _ in losing), max(kernels for _, kernels in losing)
        yield Advice(
            f"merge: run small segments eagerly with options={{'min_kernels': {largest + 1}}}",
            f"{len(losing)} segment{'s' * (len(losing) != 1)} of at most {largest} ops cost {saved:.1f} us more than their ops would ({per_op:.1f} us each)",
            saved,
        )
