"""What the times of a recording mean: whether it pays, what its breaks cost, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from breakable_backend.drivers import CaptureDriver
from breakable_backend.ir.source_lines import short_line, source_line
from breakable_backend.recordings.copies import Bridge, clone_exact
from breakable_backend.recordings.recording import EagerStep, GraphStep
from breakable_backend.tools.timing import Bench, StepTime, Timed

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
RESUMED = "torch_dynamo_resume_in_"
"""The beginning of the names that Dynamo gives to code after its breaks."""


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
            return f"measured: {times}; {self.eager_us:,.0f} us for {self.eager_how} ({self.note})"
        says = "pays" if ratio >= PAYS else "does not pay" if ratio < LOSES else "about even"
        return f"{says}: {ratio:.2f} times as fast as {self.eager_how} ({self.eager_us:,.0f} us); {times}"

    def lines(self) -> Iterator[str]:
        """The costliest break, and what would help."""
        for cost in self.breaks[:1]:
            where = f" at {short_line(cost.source)}" if cost.source else ""
            yield f"costliest break: step {cost.step}, {cost.op}, {cost.host_us:.1f} us of host time ({cost.share:.0%}){where}"
        for advice in self.advice:
            yield f"{advice.what}: {advice.evidence}"


@dataclass(frozen=True)
class Reference:
    """What times are compared with."""

    call: Callable[[], Any]
    how: str

    @classmethod
    def given(cls, call: Callable[[], Any] | None) -> Reference | None:
        return cls(call, "what it is compared with") if call is not None else None


def judged(
    timed: Timed, bench: Bench, reference: Reference | None, plain: Reference | None, outside: float = 0.0
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
                "leave out Dynamo's guards: in inference call breakable_backend.bind(compiled, *args), which has checks of its own; "
                "torch.compiler.set_stance(skip_guard_eval_unsafe=True) is for where you know that all guards hold",
                f"guards, wrappers and the key take {outside:.1f} of {host_us:.1f} us of host time",
                outside,
            )
        )
    return replace(measured, advice=tuple(sorted(advice, key=lambda item: item.saves_us, reverse=True)))


def _num_ops(step: GraphStep | EagerStep) -> int:
    if step.segment is None:
        return len(step.calls) if isinstance(step, EagerStep) else len(step.ops)
    return len(step.segment.calls)


def _breaks(timed: Timed) -> tuple[BreakCost, ...]:
    costs: list[BreakCost] = []
    for position, (step, spent) in enumerate(zip(timed.recording.steps, timed.steps, strict=True)):
        if isinstance(step, EagerStep):
            call, first = timed.costliest.get(position), step.reasons[0]
            op, source = (call.label, call.source) if call is not None else (first.op, first.source)
            share = min(1.0, spent.host_us / timed.times.host_us)
            costs.append(BreakCost(position, op, source, spent.host_us, share))
    return tuple(sorted(costs, key=lambda cost: cost.host_us, reverse=True))


def _advice(timed: Timed, breaks: Sequence[BreakCost], busy: float, per_op: float | None) -> Iterator[Advice]:
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


def _fewer_marks(timed: Timed) -> Iterator[Advice]:
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


def _given_buffers(timed: Timed) -> Iterator[Advice]:
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


def _in_place_inputs(timed: Timed) -> Iterator[Advice]:
    nodes = (n for step, _ in timed.of_kind(GraphStep) if step.segment for n in step.segment.module.graph.nodes)
    if any(f" in {RESUMED}" in source_line(node) for node in nodes):
        return  # after a break of Dynamo's inputs are mostly values that the code before it made
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
    return Bench(driver).times(lambda: target.load(source)).host_us


def _small_segments(timed: Timed, per_op: float) -> Iterator[Advice]:
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
