"""Runs a program once under a driver, and keeps what a replay needs: steps, bridges, and the copies in and back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from breakable_backend.drivers import CapturedGraph, CaptureDriver, Capturing
from breakable_backend.errors import BreakableError, CaptureError, Passing, ReplayError, first_line
from breakable_backend.failure_kinds import passing
from breakable_backend.interception import without_autocast_cache
from breakable_backend.ir.last_uses import by_value
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.program import EagerSegment, GraphSegment, Program, Reason, Segment, outputs_of
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.rules import label
from breakable_backend.recordings.checks import perform, places_of
from breakable_backend.recordings.copies import load_all
from breakable_backend.recordings.epilogue import Epilogue, settled
from breakable_backend.recordings.large_results import LargeResults
from breakable_backend.recordings.locations import Locations
from breakable_backend.recordings.recording import (
    NOTHING,
    Call,
    Copy,
    EagerStep,
    GraphStep,
    Recording,
    Step,
    Variable,
    bridge_name,
    fill,
)
from breakable_backend.recordings.repair import NodeByNode, Repair, suspects_among
from breakable_backend.recordings.specialised import Plan, SpecialisedProgram

MAX_FED = 4
"""How many copies a graph makes by itself. If a segment has more, all of them are launched together before it."""


@dataclass
class Recorded:
    """The result of recording one call."""

    recording: Recording
    outputs: list[Any]
    failed: Mapping[str, Reason]
    """Nodes that could not be captured and ran eagerly instead, by name; and others that are eager with them from now
    on."""
    copies: int
    program: Program
    """The recorded program, cut anew around those nodes."""
    put_off: PutOff | None = None
    """Why nothing was recorded this time, and the recording is empty; None if all went well."""


@dataclass(frozen=True)
class PutOff:
    """A capture failed for a passing reason. The segment, and what came after it, ran plainly."""

    cause: Passing
    reason: Reason
    suspects: Mapping[str, Reason]
    """The nodes that are to blame, unless another thread is; all nodes of the segment if the node is not known."""


def record(program: Program, driver: CaptureDriver, args: Sequence[Any], plan: Plan, stream: int) -> Recorded:
    """Run ``program`` once on ``args`` and record it: each segment is captured, then launched at once.

    The caller holds the driver's lock and is between ``driver.begin`` (which returned ``stream``) and ``driver.end``.
    Eager steps see real data. If this raises, everything that was captured is freed. It is also freed if a capture
    fails for a passing reason, before the rest of the program runs plainly.

    If a segment cannot be captured, the node that made its capture fail becomes eager, the program is cut anew, and the
    recording continues at the beginning of that segment, nothing of which has happened. Without ``plan.recut`` the whole
    segment is eager.

    Raises:
        CaptureError: a segment cannot be captured, and ``plan.auto_break`` is off.
        Exception: what an eager step raised, unchanged.
    """
    recorder = _Recorder(SpecialisedProgram.of(program, args, plan.observer), driver, plan, stream)
    try:
        with driver.recording(apart=plan.apart) as memory:
            position = 0
            while position < len(recorder.segments):
                segment = recorder.segments[position]
                if isinstance(segment, EagerSegment):
                    recorder.eager(segment)
                elif not recorder.capture(position, segment):
                    continue  # the program was cut anew, and has another segment at this position
                recorder.locations.retire(position)
                position += 1
            try:
                return recorder.finish(memory)
            except torch.OutOfMemoryError as error:
                if recorder.put_off is not None:
                    raise
                recorder.give_up(error)
            return recorder.finish(memory)
    except BaseException:
        graphs = recorder.graphs()
        recorder.forget()
        driver.release(graphs)
        raise


class _Recorder:
    def __init__(self, specialised: SpecialisedProgram, driver: CaptureDriver, plan: Plan, stream: int) -> None:
        self.specialised, self.driver, self.plan, self.stream = specialised, driver, plan, stream
        self.repair = Repair(plan.recut)
        self.locations = Locations(specialised, driver, plan)
        self.fixed = plan.keyed | {value.name for value in specialised.program.inputs if value.kind == "static"}
        """Inputs that captured segments use at their addresses."""
        self.addresses: dict[str, int] = {}
        self.steps: list[Step] = []
        self.copies = 0
        self.put_off: PutOff | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.specialised.program.segments

    # captured segments

    def capture(self, position: int, segment: GraphSegment) -> bool:
        """Capture a segment, or run it. False if none of it has run, and the program was cut anew from there on."""
        if self.put_off is None:
            failed = self._capture(position, segment)
            if failed is None:
                return True
            if self.put_off is not None:
                self._give_back(position, self.put_off.cause)
            elif self.repair.again or self._cut_around(position):
                return False
        else:
            failed = self.put_off.reason
        with self.driver.drawing() if segment.draws else nullcontext():
            self.eager(segment.as_eager(failed))
        return True

    def _cut_around(self, position: int) -> bool:
        """Cut the program anew around nodes that could not be captured. Returns whether the recording can continue so."""
        program = self.repair.cut(self.specialised.program, position)
        if program is None:
            return False
        self.specialised = self.specialised.recut(program)
        self.locations.follow(self.specialised)
        return True

    def _capture(self, position: int, segment: GraphSegment) -> Reason | None:
        """Capture a segment and launch it. Returns why it could not be captured and has to run eagerly.

        When this returns, the exception is gone, and with it what its frames held of the capture.
        """
        loads: list[Copy] = []
        locations, values, driver = self.locations, self.locations.values, self.driver.on(segment.device)
        try:
            for name in (*segment.inputs, *self._early()):
                if (copy := locations.bridge(name, position)) is not None:
                    loads.append(copy)
            outs = LargeResults(self.specialised, locations, self.plan, driver, position, segment)
            feeding = self._fed(loads, driver)
            before = [copy for copy in loads if copy not in feeding]
            sources = [values[copy.value.name] for copy in before]
            self.copies += load_all([values[copy.bridge.name] for copy in before], sources)
        except (CaptureError, torch.OutOfMemoryError) as error:
            return self._capture_failed(position, segment, loads, error)
        inputs = [locations.inside(name) for name in segment.inputs]
        observer = self.plan.observer
        body = NodeByNode(segment.module, driver.progress, self.repair.pauses(segment), outs.take, outs.after)
        captured = body if observer is None else observer.captured(position, body)
        fed = [(values[copy.bridge.name].tensor, values[copy.value.name]) for copy in feeding]
        try:
            with without_autocast_cache():
                graph, results = driver.capture(functools.partial(captured, *inputs), fed)
        except CaptureError as error:
            return self._capture_failed(position, segment, loads, error, body)
        self.copies += len(feeding)
        feeds = {copy.bridge.name: feed for copy, feed in zip(feeding, graph.feeds, strict=True)}
        loads = [replace(copy, feed=feeds.get(copy.bridge.name)) for copy in loads]
        for name, value in zip(segment.inputs, inputs, strict=True):
            if name in self.fixed and isinstance(value, torch.Tensor):
                self.addresses[name] = value.data_ptr()
        written = [access.storage for access in segment.writes if access.storage not in segment.outputs]
        copied_back = [name for name in written if name in locations.outside and name in locations.inputs]
        stores = tuple(Copy(Variable(bridge_name(name)), Variable(name)) for name in copied_back)
        self.steps.append(GraphStep(graph, tuple(loads), stores, tuple(outs.made), segment))
        locations.captured(segment.outputs, results, inputs, outs.targets())
        try:
            graph.replay(self.stream)
        except ReplayError as error:
            if not error.passing:
                raise
            return self._capture_failed(position, segment, loads, error)
        locations.written(segment)
        for copy in stores:
            self.copies += values[copy.bridge.name].store(values[copy.value.name])
        for copy in loads:
            if copy.value.name not in locations.inputs and copy.value.name not in locations.lives.returned:
                del values[copy.value.name]  # from here on the value lives in the bridge
        return None

    def _fed(self, loads: Sequence[Copy], driver: Capturing) -> list[Copy]:
        """The copies that the graph makes by itself: only a few, since they run one after the other."""
        if self.plan.keep:  # for observers, which read bridges before a launch
            return []
        fed = []
        for copy in loads:
            bridge, value = self.locations.values[copy.bridge.name], self.locations.values[copy.value.name]
            plain = bridge.flat is None and copy.device == driver.device
            if plain and driver.feeds(bridge.tensor, value):
                fed.append(copy)
        return fed if len(fed) <= MAX_FED else []

    def _early(self) -> Iterator[str]:
        """With static results, the inputs that are loaded before anything is launched.

        Such an input may be a result of the last call, in memory that a segment before its first reader writes.
        """
        if not self.plan.fresh_outputs and not any(isinstance(step, GraphStep) for step in self.steps):
            for names in self.locations.lives.unloaded.values():
                yield from names

    def _capture_failed(
        self,
        position: int,
        segment: GraphSegment,
        loads: Sequence[Copy],
        error: Exception,
        body: NodeByNode | None = None,
    ) -> Reason:
        """Why a segment cannot be captured: for good, because of ``body``'s node; or only now, if the reason passes."""
        for copy in loads:
            self.locations.unbridge(copy, position)
        self.locations.uncaptured(segment.outputs)
        nodes = segment.calls
        ours = error if isinstance(error, BreakableError) else None
        what = ours.what if ours is not None else first_line(error)
        line = ours.blamed if ours is not None else ""
        blamed, text = suspects_among(nodes, body), f"could not be captured: {what}"
        reasons: dict[str, Reason] = {}
        for node in blamed or nodes:
            reasons[node.name] = Reason("capture_failed", text, label(node), line or source_line(node))
        reason = next(iter(reasons.values()), Reason("capture_failed", text, "", line))
        cause = self.repair.judge(passing(error), body, nodes)
        if not cause and not self.plan.auto_break and not self.repair.again:
            fix = (ours.fix if ours is not None else "") or "let it run eagerly: auto_break=True"
            raise CaptureError(what, where=reason.source, fix=fix) from error.__cause__
        if cause:
            self.put_off = PutOff(cause, reason, reasons)
        elif not self.repair.again:
            self.repair.found(reasons, blamed)
        return reason

    def give_up(self, error: Exception) -> None:
        """All segments have run, but no memory is free for copies of the results: free the graphs, and record later."""
        behind = len(self.specialised.program.segments)
        reason = Reason("capture_failed", f"results could not be copied: {first_line(error)}", "")
        self.put_off = PutOff("memory", reason, {})
        self._give_back(behind, "memory")

    def _give_back(self, position: int, cause: Passing) -> None:
        """Free what was captured before segment ``position``, since the rest of the program may need the memory."""
        graphs = self.graphs()
        self.steps.clear()
        self.locations.keep_nothing(self.specialised.program, position)
        self.driver.release(graphs)
        if cause == "memory":
            self.driver.vacate()

    def graphs(self) -> list[CapturedGraph]:
        """The graphs captured so far."""
        return [step.graph for step in self.steps if isinstance(step, GraphStep)]

    # eager segments

    def eager(self, segment: EagerSegment) -> None:
        locations = self.locations
        places = {name: locations.read_from[name] for name in segment.inputs}
        calls = self.specialised.calls(segment, places, self.driver.device.type)
        local = dict(locations.values)
        kept = []
        for call, dead in zip(calls, _dead_after(calls, segment.outputs), strict=True):
            local[call.result] = perform(call, local)
            if locations.is_constant_view(call, local[call.result]):
                locations.constants[call.result] = local[call.result]
            else:
                kept.append(call)
            for name in dead:
                del local[name]
        self.steps.append(EagerStep(tuple(kept), segment.reasons, segment))
        locations.written(segment, outside=True)
        for name in segment.outputs:
            locations.returned(name, local[name])

    def finish(self, memory: Any) -> Recorded:
        """The recording. ``memory``: what keeps all of its memory; None if tensors have to do that."""
        program, locations = self.specialised.program, self.locations
        epilogue = Epilogue(self.specialised, locations, self.plan.fresh_outputs)
        returned = epilogue.run(outputs_of(program.epilogue.module)[: self.plan.saved_from])
        outputs = [fill(place, epilogue.values) for place in returned]
        held = [locations.holder(name) for name in locations.saved]
        saved = [locations.read_from[name] for name in locations.saved]
        owned = tuple(zip(saved, held, strict=True))
        outputs += [locations.values[place.name] if owner is None else owner for place, owner in owned]
        if self.put_off is not None:
            return Recorded(NOTHING, outputs, self.repair.eager, self.copies, program, self.put_off)
        recording = Recording(
            arguments=tuple(value.name for value in program.inputs if value.index >= 0),
            specs={
                value.name: TensorSpec.of(locations.values[value.name])
                for value in program.inputs
                if value.kind in ("tensor", "scalar") and value.name in program.read_by_graphs()
            },
            steps=tuple(self.steps),
            epilogue=tuple(epilogue.calls),
            returned=(*returned, *saved),
            constants=locations.constants,
            addresses=self.addresses | places_of(locations.constants),
            most=locations.needed(),
            prologue=() if self.plan.fresh_outputs else tuple(settled(self.specialised, locations, self.steps)),
            saved=tuple(locations.values[place.name] for place, owner in owned if owner is not None),
            kept=(*locations.handed_back(), *locations.kept(memory)),
        )
        return Recorded(recording, outputs, self.repair.eager, self.copies, program)

    def forget(self) -> None:
        """Drop what the pool owns."""
        self.steps.clear()
        self.locations.forget()


def _dead_after(calls: Sequence[Call], outputs: Sequence[str]) -> list[tuple[str, ...]]:
    """For each call, results of these calls that no later call takes, and that do not leave the segment."""
    last = {call.result: position for position, call in enumerate(calls)}
    for position, call in enumerate(calls):
        last.update((name, position) for name in call.variables if name in last)
    dead = by_value({name: position for name, position in last.items() if name not in outputs})
    return [dead.get(position, ()) for position in range(len(calls))]
