"""Compare mode: every replay is checked against eager, step by step, and the first difference is explained.

Before a captured segment is launched, its ops run eagerly, on the tensors that eager would have there. Their results
are kept; their writes and random draws are undone. Then the segment is launched, and must give the same. An eager step
runs once, as always, on inputs that have been compared by then, and its result serves the eager run from there on.

A :class:`Witness` has observed how the recording was made. A :class:`Checker` compares its replays.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.capturing.trace import Change, Trace, Watch, first_change, run_module
from breakable_backend.drivers import CapturedGraph, Feed
from breakable_backend.drivers.device import GraphAround
from breakable_backend.errors import CAUSES, DivergenceError
from breakable_backend.ir.effects import is_somebodys, is_view_op
from breakable_backend.ir.program import EagerSegment, GraphSegment, Program, outputs_of
from breakable_backend.ir.running_ops import Undo, generators_of, has_memory
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.rules import label
from breakable_backend.recordings.binding import Binding
from breakable_backend.recordings.buffers import Bridge, clone_exact
from breakable_backend.recordings.checks import check_places
from breakable_backend.recordings.observer import Issue, Observer, Saved, Subject
from breakable_backend.recordings.recording import (
    Call,
    EagerStep,
    GraphStep,
    Recording,
    Step,
)
from breakable_backend.recordings.repair import NodeByNode
from breakable_backend.recordings.replay import Function
from breakable_backend.tools.difference import Difference, Tolerance, difference
from breakable_backend.tools.witness import Witness

KEEPS = "an op that keeps its buffers"
HALVES = "forward of ", "backward of "
"""The beginnings of the names of graphs that are the forward or backward of a graph which needs gradients."""
Run = Callable[[Watch], Any]
"""Runs the ops of a segment eagerly."""


@dataclass
class _Value:
    """A value that later steps may read."""

    name: str
    tensor: torch.Tensor
    """The tensor that eager would read."""
    snapshot: torch.Tensor
    """Its content, according to what was compared so far."""
    label: str = ""
    source: str = ""

    def look(self) -> None:
        self.snapshot = clone_exact(self.tensor)


@dataclass
class _Written:
    """Memory that a segment wrote and did not make, as eager would leave it."""

    where: torch.Tensor
    after: torch.Tensor
    name: str
    label: str
    source: str


@dataclass
class _Ran:
    """A segment that ran eagerly and was undone."""

    trace: Trace
    undo: Undo
    outputs: list[Any]
    written: list[_Written]
    random: list[torch.Tensor]


@dataclass(frozen=True)
class _Wrong:
    """A value that differs from eager."""

    position: int
    """The position of the op that made it, in the segment's trace."""
    name: str
    label: str
    source: str
    difference: Difference
    how: str = "made by"
    """How the op is related to it."""


class _Compared(GraphAround):
    """A graph that is compared in each launch."""

    def __init__(self, checker: Checker, position: int, graph: CapturedGraph) -> None:
        super().__init__(graph)
        self.checker, self.position = checker, position

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """None: copies are made before the launch."""
        return ()

    def copier(self, like: torch.Tensor) -> None:
        """None: comparing is slow in any case."""

    def replay(self, stream: int) -> None:
        self.checker.launch(self.position, self.graph, stream)


class Compare(Observer):
    """Observes recordings while they are made, and compares their replays."""

    reads_values = True

    def __init__(self, subject: Subject) -> None:
        self._tolerance = subject.options.tolerance
        self._name = subject.name

    def recording(self, device: torch.device) -> None:
        self._witness = Witness(device)

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any]:
        return self._witness.captured(position, body)

    def issuing(self, position: int) -> Issue:
        return self._witness.issuing(position)

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        return self._witness.attend(function, label, source)

    def instead(self, recording: Recording, program: Program | None) -> Recording:
        half = self._name if self._name.startswith(HALVES) else ""
        self._checker = Checker(recording, self._witness, self._tolerance, program, half)
        del self._witness
        return self._checker.recording

    def around(self, function: Function) -> Function:
        checker = self._checker
        del self._checker
        return checker.around(function)

    def saved(self, values: Sequence[Saved]) -> Callable[[], None]:
        before = [(value, clone_exact(value.tensor)) for value in values]

        def compare() -> None:
            for value, tensor in before:
                for now in (value.tensor, value.result):
                    if now is not None and (apart := difference(now, tensor, None)) is not None:
                        raise _spoilt(value, apart, now is value.result)

        return compare


def _spoilt(value: Saved, apart: Difference, is_result: bool) -> DivergenceError:
    """The error for a value that a backward reads and that is not what its forward saved."""
    maker, source = _maker(value.maker)
    cause = "stale bridge" if is_result else "unknown"
    told = (
        "the result was written since, by somebody who hides that from autograd (.data), and eager's backward would read that"
        if is_result
        else "something wrote the memory that the forward saved it in"
    )
    return DivergenceError(
        f"before step 0 of a backward: {value.name}, made by {maker}, is not what the forward saved: {apart}; "
        f"this looks like {cause}: {told}",
        where=source,
        fix="write it under torch.no_grad(), so that autograd can tell" if is_result else CAUSES[cause],
        cause=cause,
        kind="saved",
        op=maker,
        value=value.name,
        difference=apart,
    )


class Checker:
    """Compares the replays of one recording.

    ``recording`` is emitted in place of the original, and ``around`` wraps the emitted function. Between calls nothing
    of a call is held.

    Args:
        recorded: the recording.
        witness: what was observed when it was made.
        tolerance: how far floats may differ.
        program: what was recorded; None for ``with capture``.
        half: the name of a forward or backward; empty for other graphs.
    """

    def __init__(
        self,
        recorded: Recording,
        witness: Witness,
        tolerance: Tolerance,
        program: Program | None = None,
        half: str = "",
    ) -> None:
        self.half = half
        self.recorded, self.witness, self.tolerance, self.program = recorded, witness, tolerance, program
        self.device = witness.device
        self.values: dict[str, _Value] = {}
        self.truth: dict[str, Any] = {}
        """The tensor that eager would read for each value of the program in this call."""
        self.moved: set[str] = set()
        """Values whose bridge was written since, so that eager would read the bridge."""
        self.bridged: dict[str, torch.Tensor] = {}
        """Bridges that were loaded in this call, by the name of the value."""
        self.undeclared: dict[str, tuple[str, str, bool]] = {}
        """Values that an eager step changed without declaring it: the step, its line, and whether the value is its own
        buffer."""
        self.late: dict[int, _Wrong] = {}
        """Results that eager steps left unfinished on other streams, by the key of their storage."""
        self._remember_kept()

    @property
    def recording(self) -> Recording:
        """The recording with every step compared."""
        return replace(self.recorded, steps=tuple(map(self._compared, range(len(self.recorded.steps)))))

    def _compared(self, position: int) -> Step:
        step = self.recorded.steps[position]
        if isinstance(step, GraphStep):
            return replace(step, graph=_Compared(self, position, step.graph))
        return replace(step, calls=tuple(self._watched(position, call) for call in step.calls))

    def around(self, function: Function) -> Function:
        """The function emitted for :attr:`recording`, with the comparisons at its beginning and end."""

        def compared(args: list[Any], stream: int) -> list[Any]:
            try:
                self._start(args)
                results = function(args, stream)
                self._finish(results)
                return results
            finally:
                self._clear()

        return compared

    # a call

    def _start(self, args: Sequence[Any]) -> None:
        check_places(self.recorded, args)
        if self.program is None:
            return
        self.truth = dict(Binding.of(self.program, args).values)
        written = {access.storage for segment in self.program.segments for access in segment.writes}
        made = self._made_storages()
        for value in self.program.inputs:
            tensor = self.truth[value.name]
            if has_memory(tensor) and _torch.storage_key(tensor) in made:
                # A result with outputs="static", which is overwritten next.
                self.truth[value.name] = clone_exact(tensor)
            elif has_memory(tensor) and (value.kind != "static" or value.name in written):
                self._add(value.name, tensor)

    def _finish(self, results: Sequence[Any]) -> None:
        self._settle(-1)
        if self.program is not None:
            self._compare_results(self.program, results)

    def _clear(self) -> None:
        for held in (self.values, self.truth, self.moved, self.bridged, self.undeclared, self.late):
            held.clear()
        self.witness.escaped.prune()
        self._remember_kept()

    def _add(self, name: str, tensor: torch.Tensor, label: str = "", source: str = "") -> None:
        self.values[name] = _Value(name, tensor, clone_exact(tensor), label, source)

    def _settle(self, position: int) -> None:
        """Note that everything was compared or copied back."""
        for value in self.values.values():
            if (apart := difference(value.tensor, value.snapshot, self.tolerance)) is not None:
                raise self._failure(
                    "stale bridge" if value.name in self.bridged else "unknown",
                    _Wrong(0, value.name, value.label, value.source, apart),
                    position,
                    "what a captured segment wrote did not come to the tensor from which it had been copied",
                )

    def _compare_results(self, program: Program, results: Sequence[Any]) -> None:
        epilogue = program.epilogue
        wanted = epilogue.module(*(self.truth[name] for name in epilogue.inputs))
        for got, want, leaf in zip(results, wanted, outputs_of(epilogue.module), strict=True):
            if (apart := _result_difference(got, want, self.tolerance)) is not None:
                name, source = (leaf.name, source_line(leaf)) if isinstance(leaf, fx.Node) else (str(leaf), "")
                raise self._failure(
                    "unknown", _Wrong(0, name, name, source, apart), -1, "all steps agreed, and the result does not"
                )

    # captured segments

    def launch(self, position: int, graph: CapturedGraph, stream: int) -> None:
        """Launch a segment between its loads and its stores, and compare it with eager."""
        self._refuse_late(position)
        self._settle(position)
        stale = self._stale(position)
        before = self._random()
        ran = self._run(position, graph, before)
        graph.replay(stream)
        wrong = self._first_wrong(position, ran)
        if wrong is None and self.program is None and stale:
            wrong = next(iter(stale.values()))  # the eager ops read the same bridge
        if wrong is not None:
            cause, why, blamed = self._cause(position, ran, wrong, stale, before, graph, stream)
            self._take_back(ran, before)
            raise self._failure(cause, blamed, position, why)
        if (overwritten := self._overwritten()) is not None:
            self._take_back(ran, before)
            raise self._failure(KEEPS, overwritten, position, f"{overwritten.label} has kept it since an earlier call")
        self._accept(position, ran)

    def _take_back(self, ran: _Ran, random: Sequence[torch.Tensor]) -> None:
        """Undo the segment that went wrong, as after an error of the user's."""
        ran.undo.restore()
        self._set_random(random, ran.trace)

    def _segment(self, position: int) -> GraphSegment | EagerSegment | None:
        return self.program.segments[position] if self.program is not None else None

    def _runner(self, position: int) -> tuple[Run, list[Any]]:
        segment = self._segment(position)
        if segment is None:
            return self.witness.scripts[position].run, []
        module, inputs = segment.module, [self.truth[name] for name in segment.inputs]
        return lambda watch: run_module(NodeByNode(module), inputs, watch), inputs

    def _run(self, position: int, graph: CapturedGraph, random: Sequence[torch.Tensor]) -> _Ran:
        """Run a segment eagerly, note its results, and undo it."""
        run, inputs = self._runner(position)
        undo = Undo()
        device = self.witness.places.get(position, self.device)
        watch = Watch(device, self.witness.escaped, inputs, undo, self.witness.traces.get(position))
        watch.trace.draws_random = graph.draws_random
        try:
            outputs = pytree.tree_map_only(torch.Tensor, clone_exact, run(watch))
            written = list(self._written(position, undo))
            after = self._random()
        finally:
            undo.restore()
            self._set_random(random, watch.trace)
        return _Ran(watch.trace, undo, list(outputs or ()), written, after)

    def _written(self, position: int, undo: Undo) -> Iterator[_Written]:
        """The memory of others that was written, and where a launch of the segment leaves it."""
        segment = self._segment(position)
        names = {_torch.address_of(t): n for n in (segment.inputs if segment else ()) if has_memory(t := self.truth[n])}
        for saved in undo.memories():
            name, op = names.get(saved.address, ""), saved.writer
            writer, source = (op.label, op.source) if op is not None else ("", "")
            if name in self.bridged and name not in self.moved:
                yield _Written(self.bridged[name], clone_exact(self.truth[name]), name, writer, source)
            else:
                flat = saved.geometry.whole(saved.storage)
                yield _Written(flat, flat.clone(), name or f"the memory that {writer} writes", writer, source)

    def _stale(self, position: int) -> dict[str, _Wrong]:
        """Bridges that this segment reads and that lack the values that eager would read, by the name of the value."""
        step, segment = self.recorded.steps[position], self._segment(position)
        assert isinstance(step, GraphStep)
        for copy in step.loads:
            bridge = self.recorded.constants[copy.bridge.name].tensor
            self.bridged[copy.value.name] = bridge
        trace = self.witness.traces.get(position)
        reads = trace.addresses() if trace is not None else set()
        found = {}
        for name, bridge in self.bridged.items():
            read = name in segment.inputs if segment else bridge.untyped_storage().data_ptr() in reads
            truth = self.truth.get(name)
            if read and name not in self.moved and isinstance(truth, torch.Tensor):
                apart = difference(bridge, truth.to(bridge.device), self.tolerance)
                if apart is not None:
                    reader, source = self._first_reader(position, name)
                    found[name] = _Wrong(0, f"the bridge of {name}", reader, source, apart, "first read by")
        return found

    def _first_reader(self, position: int, name: str) -> tuple[str, str]:
        """The first op of a segment that takes ``name``, or a view of it."""
        segment = self._segment(position)
        if segment is None:
            address = _torch.address_of(self.bridged[name])
            ops = self.witness.traces[position].ops
            return next((op.label, op.source) for op in ops if any(m.address == address for m in op.outside))
        views = {node for node in segment.module.graph.find_nodes(op="placeholder") if node.name == name}
        for node in segment.module.graph.nodes:
            if node.op != "call_function" or views.isdisjoint(node.all_input_nodes):
                continue
            if not is_view_op(node.target):
                return _maker(node)
            views.add(node)
        return "", ""

    def _first_wrong(self, position: int, ran: _Ran) -> _Wrong | None:
        found = [*self._wrong_inside(position, ran), *self._wrong_outside(position, ran)]
        return min(found, key=lambda wrong: wrong.position, default=None)

    def _wrong_inside(self, position: int, ran: _Ran) -> Iterator[_Wrong]:
        """A wrong value that the segment made, as far as it is still in the recording's memory, or that it passes on."""
        recorded = self.witness.traces.get(position, Trace())
        change = first_change(recorded, ran.trace)
        end = change.position if change is not None and change.kind == "path" else len(ran.trace.ops)
        for was, root in zip(recorded.roots, ran.trace.roots, strict=False):
            got, want = was.tensor(), root.tensor()
            if root.made_by >= end or got is None or want is None or was.geometry.in_memory != root.geometry.in_memory:
                continue
            if (apart := difference(got, want, self.tolerance)) is not None:
                op = ran.trace.ops[root.written_by]
                yield _Wrong(root.written_by, f"the result of {op.op}", op.label, op.source, apart)
        segment = self._segment(position)
        if not isinstance(segment, GraphSegment):
            return
        for name, leaf, want in zip(segment.outputs, outputs_of(segment.module), ran.outputs, strict=True):
            got = self.recorded.constants[name]
            if has_memory(got) and (apart := difference(got, want, self.tolerance)) is not None:
                yield _Wrong(len(ran.trace.ops), name, *_maker(leaf), apart)

    def _wrong_outside(self, position: int, ran: _Ran) -> Iterator[_Wrong]:
        """A wrong value that the segment wrote, or changed without a write in eager."""
        end = len(ran.trace.ops)
        written = {_torch.address_of(memory.where) for memory in ran.written}
        for memory in ran.written:
            if (apart := difference(memory.where, memory.after, self.tolerance)) is not None:
                at = next((i for i, op in enumerate(ran.trace.ops) if op.label == memory.label), end)
                yield _Wrong(at, memory.name, memory.label, memory.source, apart)
        for value in self.values.values():
            apart = difference(value.tensor, value.snapshot, self.tolerance)
            if apart is not None and _torch.address_of(value.tensor) not in written:
                name = f"{value.name} (which the segment does not write)"
                yield _Wrong(end, name, value.label, value.source, apart)
        for generator, want in self._of_generators(ran.random, ran.trace):
            got = generator.get_state()
            if (apart := difference(got, want)) is not None:
                yield _Wrong(end, "the state of the random generator", "", "", apart)

    def _accept(self, position: int, ran: _Ran) -> None:
        """The segment was right: later steps are compared with what it made and wrote."""
        segment = self._segment(position)
        for memory in ran.written:
            if memory.name in self.bridged and memory.name not in self.moved:
                self._wrote_bridge(memory)
        written = {_torch.address_of(memory.where) for memory in ran.written}
        if segment is None:
            self.moved |= {name for name, bridge in self.bridged.items() if _torch.address_of(bridge) in written}
        for value in self.values.values():
            if _torch.address_of(value.tensor) in written:
                value.look()
        if segment is None:
            for number, root in enumerate(self.witness.traces[position].roots):
                if (tensor := root.tensor()) is not None:
                    op = self.witness.traces[position].ops[root.made_by]
                    self._add(f"the result of {op.label} ({position}.{number})", tensor, op.label, op.source)
            return
        assert isinstance(segment, GraphSegment)
        for name, leaf in zip(segment.outputs, outputs_of(segment.module), strict=True):
            self.truth[name] = tensor = self.recorded.constants[name]
            if has_memory(tensor):
                self._add(name, tensor, *_maker(leaf))

    def _wrote_bridge(self, memory: _Written) -> None:
        """A written argument is copied back next. A written result of an eager step lives in the bridge from now on."""
        value = self.values.get(memory.name)
        is_argument = memory.name in self.recorded.arguments
        if not is_argument:
            self.moved.add(memory.name)
            self.truth[memory.name] = memory.where
        if value is not None:
            value.tensor = value.tensor if is_argument else memory.where
            value.snapshot = memory.after

    # eager steps

    def _watched(self, position: int, call: Call) -> Call:
        takes_apart = self.program is None and not call.source  # the result of a user's function, or an argument of one
        quiet = takes_apart or call.takes_part
        function = call.function

        def watched(*args: Any, **kwargs: Any) -> Any:
            if quiet:
                result = function(*args, **kwargs)
            else:
                self._settle(position)
                given = {_torch.storage_key(t): (t, clone_exact(t)) for t in _tensors((args, kwargs))}
                result = function(*args, **kwargs)
                self._synchronise(call, given, result)
                self._eager_ran(position, call, result, given)
            self.truth[call.result] = result
            if has_memory(result) and (not call.takes_part or call.function is operator.getitem):
                self._add(call.result, result, user.label, user.source)
            return result

        user = self._user_call(position, call) if takes_apart else call
        return replace(call, function=watched)

    def _user_call(self, position: int, call: Call) -> Call:
        """The call of the user's function whose result ``call`` takes apart."""
        step = self.recorded.steps[position]
        assert isinstance(step, EagerStep)
        return next((other for other in step.calls if other.source), call)

    def _synchronise(self, call: Call, given: Mapping[int, Any], result: Any) -> None:
        """Note which values change after a synchronisation of all streams: a reader before that reads too early.

        A later eager step that takes such a value is assumed to wait for it, as the second half of an asynchronous call
        does.
        """
        if self.device.type != "cuda":
            return
        for key in given:
            self.late.pop(key, None)
        early = [
            (tensor, clone_exact(tensor)) for tensor in _tensors((result, [tensor for tensor, _ in given.values()]))
        ]
        self._come_to_rest()
        for tensor, first in early:
            if (apart := difference(first, tensor)) is not None:
                what = f"what {call.label} made or wrote"
                self.late[_torch.storage_key(tensor)] = _Wrong(0, what, call.label, call.source, apart)

    def _refuse_late(self, position: int) -> None:
        """Raise if a segment takes a value that an eager step still computes, on a stream that nobody has waited for."""
        step, segment = self.recorded.steps[position], self._segment(position)
        assert isinstance(step, GraphStep)
        names = {copy.value.name for copy in step.loads} | set(segment.inputs if segment is not None else ())
        for name in names:
            tensor = self.truth.get(name)
            if not isinstance(tensor, torch.Tensor) or not has_memory(tensor):
                continue
            if (wrong := self.late.get(_torch.storage_key(tensor))) is not None:
                why = "read again after all streams had come to rest, it was another value: the segment does not wait for the "
                raise self._failure("race between streams", wrong, position, why + "stream that it is made on")

    def _eager_ran(self, position: int, call: Call, result: Any, given: Mapping[int, Any]) -> None:
        """Take over what an eager step changed, since eager would see that too."""
        segment = self._segment(position)
        declared = {access.storage for access in segment.writes} if segment is not None else set()
        changed = {key for key, (tensor, before) in given.items() if difference(tensor, before) is not None}
        results = {_torch.storage_key(tensor) for tensor in _tensors(result)}
        for name, bridge in self.bridged.items():
            if name not in self.recorded.arguments and _torch.storage_key(bridge) in changed:
                self.moved.add(name)
                self.truth[name] = bridge
                if name in self.values:
                    self.values[name].tensor = bridge
        for value in self.values.values():
            if difference(value.tensor, value.snapshot) is not None:
                if value.name not in declared:
                    own = _torch.storage_key(value.tensor) in results
                    self.undeclared[value.name] = call.label, call.source, own
                value.look()

    # what stays with others

    def _remember_kept(self) -> None:
        """At the end of a call: note which memory of ours functions hold, and its content."""
        ours = self._made_storages()
        held = []
        for kept in self.witness.kept:
            if kept.alive and int(kept.memory._cdata) in ours:
                kept.before = kept.memory.clone()
                held.append(kept)
        self.witness.kept = held

    def _made_storages(self) -> set[int]:
        roots = (root for trace in self.witness.traces.values() for root in trace.roots)
        storages = (storage for root in roots if (storage := _torch.live_storage(root.ref)) is not None)
        bridges = (value.tensor for value in self.recorded.constants.values() if isinstance(value, Bridge))
        return {int(storage._cdata) for storage in storages} | set(map(_torch.storage_key, bridges))

    def _overwritten(self) -> _Wrong | None:
        """An argument that a function has kept since an earlier call and that has been overwritten."""
        changed = [(kept, apart) for kept in self.witness.kept if kept.alive and (apart := kept.changed()) is not None]
        if changed:
            gc.collect()  # objects that are only garbage do not count as kept
        for kept, apart in changed:
            if kept.alive:
                return _Wrong(0, f"an argument of {kept.label}", kept.label, kept.source, apart)
        return None

    # causes

    def _cause(
        self,
        position: int,
        ran: _Ran,
        wrong: _Wrong,
        stale: Mapping[str, _Wrong],
        random: Sequence[torch.Tensor],
        graph: CapturedGraph,
        stream: int,
    ) -> tuple[str, str, _Wrong]:
        """What the difference looks like, the evidence, and the op to blame."""
        if stale:
            return self._stale_cause(*next(iter(stale.items())))
        self._take_back(ran, random)
        change = first_change(self.witness.traces[position], ran.trace)
        if change is not None:
            return self._change_cause(change, ran.trace, wrong)
        again = self._run(position, graph, random)
        if (unsteady := _first_unlike(ran, again, wrong)) is not None:
            return unsteady
        if self.device.type == "cuda" and self._agrees_synchronised(position, ran, graph, stream):
            why = "launched again after all streams had come to rest, the segment agrees with eager"
            return "race between streams", why, wrong
        if (outside := self._work_outside(position, wrong)) is not None:
            return outside
        return "unknown", f"it is none of: {', '.join(cause for cause in CAUSES if cause != 'unknown')}", wrong

    def _work_outside(self, position: int, wrong: _Wrong) -> tuple[str, str, _Wrong] | None:
        """The cause if only custom ops, whose work without torch is not seen, can be to blame; None if there are none."""
        segment = self._segment(position)
        nodes = [node for node in segment.module.graph.nodes if is_somebodys(node)] if segment is not None else []
        if not nodes:
            return None
        names = ", ".join(dict.fromkeys(map(label, nodes)))
        why = f"torch's own ops are captured whole; of {names}, a part that goes to another stream, or to the host, is not"
        return (
            "work outside of the capture",
            why,
            replace(wrong, label=label(nodes[0]), source=source_line(nodes[0]), how="at or behind"),
        )

    def _stale_cause(self, name: str, stale: _Wrong) -> tuple[str, str, _Wrong]:
        changer, source, own = self.undeclared.get(name, ("", "", False))
        where = f" at {source}" if source else ""
        if own:
            why = f"{name} was overwritten by another call of {changer}{where}, which returned the same memory again"
            return KEEPS, why, replace(stale, label=changer, source=source, how="of a result of")
        why = f"it does not hold what {name} is now"
        if changer:
            why += f": {changer}{where} wrote it, and does not declare so"
        return "stale bridge", why, stale

    def _change_cause(self, change: Change, trace: Trace, wrong: _Wrong) -> tuple[str, str, _Wrong]:
        """The cause if the ops are not those that were captured."""
        op = change.op
        blamed = replace(wrong, label=op.label, source=op.source)
        if change.kind == "number":
            assert change.was is not None
            pair = next((a, b) for a, b in zip(op.numbers, change.was.numbers, strict=False) if a != b)
            return "frozen scalar", f"{op.op} takes {pair[0]} now, and took {pair[1]} when it was captured", blamed
        if change.kind == "path":
            if _stays(trace, change.position):
                why = f"{op.label} makes memory that it stores away, and took what it had stored when it was captured"
                return KEEPS, why, blamed
            was = change.was.op if change.was is not None else "nothing more"
            return "frozen scalar", f"its Python took another path: {op.op} now, {was} when it was captured", blamed
        if any(memory.written or memory.key in self.witness.escaped.storages for memory in op.outside):
            why = f"{op.op} takes memory that {op.label} has stored away, and took other memory when it was captured"
            return KEEPS, why, blamed
        return "address moved", f"{op.op} reads a tensor that lies elsewhere than when it was captured", blamed

    def _agrees_synchronised(self, position: int, ran: _Ran, graph: CapturedGraph, stream: int) -> bool:
        self._come_to_rest()
        graph.replay(stream)
        self._come_to_rest()
        return self._first_wrong(position, ran) is None

    def _devices(self) -> list[torch.device]:
        """The devices of the segments; the first is the driver's."""
        return list(dict.fromkeys((self.device, *self.witness.places.values())))

    def _come_to_rest(self) -> None:
        for device in self._devices():
            torch.cuda.synchronize(device)

    def _failure(self, cause: str, wrong: _Wrong, position: int, why: str) -> DivergenceError:
        step = self.recorded.steps[position] if position >= 0 else None
        kind = {GraphStep: "captured", EagerStep: "eager"}.get(type(step), "result")
        at = f"step {position} ({kind})" if position >= 0 else "a gradient" if "backward" in self.half else "the result"
        at = f"{self.half}, {at}" if self.half else at
        made = f", {wrong.how} {wrong.label}," if wrong.label and wrong.label not in wrong.name else ""
        return DivergenceError(
            f"{at}: {wrong.name}{made} is not as in eager: {wrong.difference}; this looks like {cause}: {why}",
            where=wrong.source,
            fix=CAUSES[cause],
            cause=cause,
            step=position,
            kind=kind,
            op=wrong.label,
            value=wrong.name,
            difference=wrong.difference,
        )

    # random numbers

    def _generators(self) -> list[torch.Generator]:
        host, *first = generators_of(self.device)
        return [host, *first, *(generators_of(device)[-1] for device in self._devices()[1:])]

    def _random(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _of_generators(
        self, states: Sequence[torch.Tensor], trace: Trace
    ) -> Iterator[tuple[torch.Generator, torch.Tensor]]:
        """Generators that ``trace`` may have drawn from, with their states. Other threads draw from the host's."""
        for generator, state in zip(self._generators(), states, strict=True):
            if trace.draws_random or generator.device.type == "cuda":
                yield generator, state

    def _set_random(self, states: Sequence[torch.Tensor], trace: Trace) -> None:
        for generator, state in self._of_generators(states, trace):
            generator.set_state(state)


def _first_unlike(ran: _Ran, again: _Ran, wrong: _Wrong) -> tuple[str, str, _Wrong] | None:
    """The first value in which two eager runs on the same inputs differ."""
    change = first_change(ran.trace, again.trace)
    if change is not None:
        blamed = replace(wrong, label=change.op.label, source=change.op.source)
        cause = KEEPS if change.kind == "memory" else "frozen scalar"
        what = "other memory" if change.kind == "memory" else "other numbers"
        return cause, f"run twice on the same inputs, {change.op.label} takes {what} the second time", blamed
    for first, second in zip(ran.trace.roots, again.trace.roots, strict=True):
        mine, theirs = first.tensor(), second.tensor()
        if mine is not None and theirs is not None and (apart := difference(theirs, mine)) is not None:
            op = ran.trace.ops[first.written_by]
            blamed = _Wrong(first.written_by, f"the result of {op.op}", op.label, op.source, apart)
            return "a nondeterministic op", f"run twice on the same inputs, {op.label} differs from itself", blamed
    for one, two in zip(ran.written, again.written, strict=True):
        if (apart := difference(two.after, one.after)) is not None:
            blamed = _Wrong(0, one.name, one.label, one.source, apart)
            return "a nondeterministic op", f"run twice on the same inputs, {one.label} differs from itself", blamed
    return None


def _stays(trace: Trace, position: int) -> bool:
    """Whether somebody still holds the result of an op after its segment has run."""
    roots = [root for root in trace.roots if root.made_by == position]
    for root in roots:
        root.storage = None
    gc.collect()
    return any(_torch.live_storage(root.ref) is not None for root in roots)


def _result_difference(got: Any, want: Any, tolerance: Tolerance) -> Difference | None:
    if type(got) in (int, float, bool) and type(want) is type(got):
        got, want = torch.tensor(got), torch.tensor(want)
    return difference(got, want, tolerance) if has_memory(got) and has_memory(want) else None


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if has_memory(leaf)]


def _maker(leaf: Any) -> tuple[str, str]:
    return (label(leaf), source_line(leaf)) if isinstance(leaf, fx.Node) else ("", "")
