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
from typing import Any, NamedTuple

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.drivers import Feed
from breakable_backend.drivers.device import GraphAround
from breakable_backend.errors import CAUSES, DivergenceError
from breakable_backend.ir.effects import is_somebodys
from breakable_backend.ir.program import GraphSegment, Program, outputs_of
from breakable_backend.ir.running_ops import RandomStates, Undo, generators_of, has_memory
from breakable_backend.ir.source_lines import source_line
from breakable_backend.ir.views import is_view_op
from breakable_backend.marks.rules import label
from breakable_backend.recordings.checks import check_places
from breakable_backend.recordings.copies import Bridge, clone_exact
from breakable_backend.recordings.observer import Issue, Observer, Saved, Subject
from breakable_backend.recordings.recording import Call, EagerStep, GraphStep, Recording, Step
from breakable_backend.recordings.repair import NodeByNode
from breakable_backend.recordings.replay import Function
from breakable_backend.recordings.specialised import SpecialisedProgram
from breakable_backend.tools.difference import Difference, Tolerance, difference
from breakable_backend.tools.trace import Change, Issued, Trace, Watch, first_change, run_module
from breakable_backend.tools.witness import KeptArgument, Witness

KEEPS = "an op that keeps its buffers"
HALVES = "forward of ", "backward of "
"""The beginnings of the names of graphs that are the forward or backward of a graph which needs gradients."""


class Maker(NamedTuple):
    """What made or wrote a value: an op, and the user's line."""

    label: str = ""
    source: str = ""

    @classmethod
    def of(cls, op: Issued | Call | KeptArgument) -> Maker:
        return cls(op.label, op.source)


NOBODY = Maker()


@dataclass
class _Value:
    """A value that later steps may read."""

    name: str
    tensor: torch.Tensor
    """The tensor that eager would read."""
    snapshot: torch.Tensor
    """Its content, according to what was compared so far."""
    maker: Maker

    def look(self) -> None:
        self.snapshot = clone_exact(self.tensor)


@dataclass
class _Written:
    """Memory that a segment wrote and did not make, as eager would leave it."""

    where: torch.Tensor
    after: torch.Tensor
    name: str
    maker: Maker


@dataclass
class _Ran:
    """A segment that ran eagerly and was undone."""

    trace: Trace
    undo: Undo
    outputs: list[Any]
    written: list[_Written]
    drawn_from: RandomStates
    """The states of the random generators before it ran."""
    random: RandomStates
    """The states that it left."""


@dataclass(frozen=True)
class Wrong:
    """A value that differs from eager."""

    name: str
    maker: Maker
    difference: Difference
    position: int = 0
    """The position of the op that made it, in the segment's trace."""
    how: str = "made by"
    """How the op is related to it."""


Verdict = tuple[str, str, Wrong]
"""What a difference looks like, the evidence, and the value to blame."""


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
        self, recorded: Recording, witness: Witness, tolerance: Tolerance, program: Program | None, half: str
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
        self.undeclared: dict[str, tuple[Maker, bool]] = {}
        """Values that an eager step changed without declaring it: the step, and whether the value is its own buffer."""
        self.late: dict[int, Wrong] = {}
        """Results that eager steps left unfinished on other streams, by the key of their storage."""
        self._remember_kept()

    @property
    def recording(self) -> Recording:
        """The recording with every step compared."""
        return replace(self.recorded, steps=tuple(map(self._compared, range(len(self.recorded.steps)))))

    def _compared(self, position: int) -> Step:
        step = self.recorded.steps[position]
        if isinstance(step, GraphStep):
            return replace(step, graph=ComparedSegment(self, position, step))
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
        self.truth = dict(SpecialisedProgram.of(self.program, args).values)
        written = {access.storage for segment in self.program.segments for access in segment.writes}
        made = self._made_storages()
        for value in self.program.inputs:
            tensor = self.truth[value.name]
            if has_memory(tensor) and _torch.storage_key(tensor) in made:
                # A result with outputs="static", which is overwritten next.
                self.truth[value.name] = clone_exact(tensor)
            elif has_memory(tensor) and (value.kind != "static" or value.name in written):
                self.add(value.name, tensor)

    def _finish(self, results: Sequence[Any]) -> None:
        self.settle(-1)
        if self.program is not None:
            self._compare_results(self.program, results)

    def _clear(self) -> None:
        for held in (self.values, self.truth, self.moved, self.bridged, self.undeclared, self.late):
            held.clear()
        self.witness.escaped.prune()
        self._remember_kept()

    def add(self, name: str, tensor: torch.Tensor, maker: Maker = NOBODY) -> None:
        self.values[name] = _Value(name, tensor, clone_exact(tensor), maker)

    def settle(self, position: int) -> None:
        """Note that everything was compared or copied back."""
        for value in self.values.values():
            if (apart := difference(value.tensor, value.snapshot, self.tolerance)) is not None:
                cause = "stale bridge" if value.name in self.bridged else "unknown"
                why = "what a captured segment wrote did not come to the tensor from which it had been copied"
                raise self.failure((cause, why, Wrong(value.name, value.maker, apart)), position)

    def _compare_results(self, program: Program, results: Sequence[Any]) -> None:
        epilogue = program.epilogue
        wanted = epilogue.module(*(self.truth[name] for name in epilogue.inputs))
        for got, want, leaf in zip(results, wanted, outputs_of(epilogue.module), strict=True):
            if (apart := _result_difference(got, want, self.tolerance)) is not None:
                wrong = Wrong(str(leaf), Maker(str(leaf), _maker(leaf).source), apart)
                raise self.failure(("unknown", "all steps agreed, and the result does not", wrong), -1)

    # eager steps

    def _watched(self, position: int, call: Call) -> Call:
        takes_apart = self.program is None and not call.source  # the result of a user's function, or an argument of one
        quiet = takes_apart or call.takes_part
        function = call.function

        def watched(*args: Any, **kwargs: Any) -> Any:
            if quiet:
                result = function(*args, **kwargs)
            else:
                self.settle(position)
                given = {_torch.storage_key(t): (t, clone_exact(t)) for t in _tensors((args, kwargs))}
                result = function(*args, **kwargs)
                self._synchronise(call, given, result)
                self._eager_ran(position, call, result, given)
            self.truth[call.result] = result
            if has_memory(result) and (not call.takes_part or call.function is operator.getitem):
                self.add(call.result, result, Maker.of(user))
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
        self.come_to_rest()
        for tensor, first in early:
            if (apart := difference(first, tensor)) is not None:
                what = f"what {call.label} made or wrote"
                self.late[_torch.storage_key(tensor)] = Wrong(what, Maker.of(call), apart)

    def _eager_ran(self, position: int, call: Call, result: Any, given: Mapping[int, Any]) -> None:
        """Take over what an eager step changed, since eager would see that too."""
        declared = {access.storage for access in self.program.segments[position].writes} if self.program else set()
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
                    self.undeclared[value.name] = Maker.of(call), own
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

    def overwritten(self) -> Wrong | None:
        """An argument that a function has kept since an earlier call and that has been overwritten."""
        changed = [(kept, apart) for kept in self.witness.kept if kept.alive and (apart := kept.changed()) is not None]
        if changed:
            gc.collect()  # objects that are only garbage do not count as kept
        for kept, apart in changed:
            if kept.alive:
                return Wrong(f"an argument of {kept.label}", Maker.of(kept), apart)
        return None

    # failures

    def _devices(self) -> list[torch.device]:
        """The devices of the segments; the first is the driver's."""
        return list(dict.fromkeys((self.device, *self.witness.places.values())))

    def come_to_rest(self) -> None:
        for device in self._devices():
            torch.cuda.synchronize(device)

    def failure(self, verdict: Verdict, position: int) -> DivergenceError:
        cause, why, wrong = verdict
        step = self.recorded.steps[position] if position >= 0 else None
        kind = {GraphStep: "captured", EagerStep: "eager"}.get(type(step), "result")
        at = f"step {position} ({kind})" if position >= 0 else "a gradient" if "backward" in self.half else "the result"
        at = f"{self.half}, {at}" if self.half else at
        maker, source = wrong.maker
        made = f", {wrong.how} {maker}," if maker and maker not in wrong.name else ""
        return DivergenceError(
            f"{at}: {wrong.name}{made} is not as in eager: {wrong.difference}; this looks like {cause}: {why}",
            where=source,
            fix=CAUSES[cause],
            cause=cause,
            step=position,
            kind=kind,
            op=maker,
            value=wrong.name,
            difference=wrong.difference,
        )

    # random numbers

    def random(self) -> RandomStates:
        host, *first = generators_of(self.device)
        return RandomStates.of((host, *first, *(generators_of(device)[-1] for device in self._devices()[1:])))


class ComparedSegment(GraphAround):
    """A captured segment that is compared with eager in each launch."""

    def __init__(self, checker: Checker, position: int, step: GraphStep) -> None:
        super().__init__(step.graph)
        self.checker, self.position, self.step = checker, position, step
        segment = checker.program.segments[position] if checker.program is not None else None
        assert segment is None or isinstance(segment, GraphSegment)
        self.segment = segment
        self.captured = checker.witness.traces[position]
        """The ops that were captured."""

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """None: copies are made before the launch."""
        return ()

    def copier(self, like: torch.Tensor) -> None:
        """None: comparing is slow in any case."""

    def replay(self, stream: int) -> None:
        """Launch the segment between its loads and its stores, and compare it with eager."""
        checker = self.checker
        self._refuse_late()
        checker.settle(self.position)
        stale = self._stale()
        ran = self._run()
        self.graph.replay(stream)
        wrong = self._first_wrong(ran)
        if wrong is None and self.segment is None and stale:
            wrong = stale[1]  # the eager ops read the same bridge
        verdict = self._cause(ran, wrong, stale, stream) if wrong is not None else None
        if wrong is None and (overwritten := checker.overwritten()) is not None:
            verdict = KEEPS, f"{overwritten.maker.label} has kept it since an earlier call", overwritten
        if verdict is not None:
            self._take_back(ran)
            raise checker.failure(verdict, self.position)
        self._accept(ran)

    def _take_back(self, ran: _Ran) -> None:
        """Undo the segment, as after an error of the user's."""
        ran.undo.restore()
        _drawn_by(ran.trace, ran.drawn_from).restore()

    def _run(self) -> _Ran:
        """Run the segment eagerly, note its results, and undo it."""
        checker, segment = self.checker, self.segment
        witness, drawn_from = checker.witness, checker.random()
        undo, inputs = Undo(), [checker.truth[name] for name in segment.inputs] if segment else []
        watch = Watch(witness.places.get(self.position, checker.device), witness.escaped, inputs, undo, self.captured)
        watch.trace.draws_random = self.graph.draws_random
        try:
            outputs: list[Any] = []
            if segment is not None:
                results = run_module(NodeByNode(segment.module), inputs, watch)
                outputs = pytree.tree_map_only(torch.Tensor, clone_exact, list(results))
            else:
                witness.scripts[self.position].run(watch)
            return _Ran(watch.trace, undo, outputs, list(self._written(undo)), drawn_from, checker.random())
        finally:
            undo.restore()
            _drawn_by(watch.trace, drawn_from).restore()

    def _written(self, undo: Undo) -> Iterator[_Written]:
        """The memory of others that was written, and where a launch of the segment leaves it."""
        checker, inputs = self.checker, self.segment.inputs if self.segment else ()
        names = {_torch.address_of(t): name for name in inputs if has_memory(t := checker.truth[name])}
        for saved in undo.memories():
            name, op = names.get(saved.address, ""), saved.writer
            writer = Maker.of(op) if op is not None else NOBODY
            if name in checker.bridged and name not in checker.moved:
                yield _Written(checker.bridged[name], clone_exact(checker.truth[name]), name, writer)
            else:
                flat = saved.geometry.whole(saved.storage)
                yield _Written(flat, flat.clone(), name or f"the memory that {writer.label} writes", writer)

    def _stale(self) -> tuple[str, Wrong] | None:
        """The first bridge that the segment reads and that lacks the value that eager would read; and that value's name."""
        checker, segment = self.checker, self.segment
        for copy in self.step.loads:
            checker.bridged[copy.value.name] = checker.recorded.constants[copy.bridge.name].tensor
        reads = self.captured.addresses()
        for name, bridge in checker.bridged.items():
            read = name in segment.inputs if segment else bridge.untyped_storage().data_ptr() in reads
            truth = checker.truth.get(name)
            if read and name not in checker.moved and isinstance(truth, torch.Tensor):
                apart = difference(bridge, truth.to(bridge.device), checker.tolerance)
                if apart is not None:
                    return name, Wrong(f"the bridge of {name}", self._first_reader(name), apart, how="first read by")
        return None

    def _first_reader(self, name: str) -> Maker:
        """The first op that takes ``name``, or a view of it."""
        if self.segment is None:
            address = _torch.address_of(self.checker.bridged[name])
            return next(Maker.of(op) for op in self.captured.ops if any(m.address == address for m in op.outside))
        views = {node for node in self.segment.module.graph.find_nodes(op="placeholder") if node.name == name}
        for node in self.segment.module.graph.nodes:
            if node.op != "call_function" or views.isdisjoint(node.all_input_nodes):
                continue
            if not is_view_op(node.target):
                return _maker(node)
            views.add(node)
        return NOBODY

    def _first_wrong(self, ran: _Ran) -> Wrong | None:
        found = [*self._wrong_inside(ran), *self._wrong_outside(ran)]
        return min(found, key=lambda wrong: wrong.position, default=None)

    def _wrong_inside(self, ran: _Ran) -> Iterator[Wrong]:
        """A wrong value that the segment made, as far as it is still in the recording's memory, or that it passes on."""
        change = first_change(self.captured, ran.trace)
        end = change.position if change is not None and change.kind == "path" else len(ran.trace.ops)
        for was, root in zip(self.captured.roots, ran.trace.roots, strict=False):
            got, want = was.tensor(), root.tensor()
            if root.made_by >= end or got is None or want is None or was.geometry.in_memory != root.geometry.in_memory:
                continue
            if (apart := difference(got, want, self.checker.tolerance)) is not None:
                op = ran.trace.ops[root.written_by]
                yield Wrong(f"the result of {op.op}", Maker.of(op), apart, root.written_by)
        for (name, leaf), want in zip(self._outputs(), ran.outputs, strict=True):
            got = self.checker.recorded.constants[name]
            if has_memory(got) and (apart := difference(got, want, self.checker.tolerance)) is not None:
                yield Wrong(name, _maker(leaf), apart, len(ran.trace.ops))

    def _outputs(self) -> Iterator[tuple[str, Any]]:
        """The values that the segment passes on, by name, each with its node."""
        if self.segment is not None:
            yield from zip(self.segment.outputs, outputs_of(self.segment.module), strict=True)

    def _wrong_outside(self, ran: _Ran) -> Iterator[Wrong]:
        """A wrong value that the segment wrote, or changed without a write in eager."""
        checker, end = self.checker, len(ran.trace.ops)
        written = {_torch.address_of(memory.where) for memory in ran.written}
        for memory in ran.written:
            if (apart := difference(memory.where, memory.after, checker.tolerance)) is not None:
                at = next((i for i, op in enumerate(ran.trace.ops) if op.label == memory.maker.label), end)
                yield Wrong(memory.name, memory.maker, apart, at)
        for value in checker.values.values():
            apart = difference(value.tensor, value.snapshot, checker.tolerance)
            if apart is not None and _torch.address_of(value.tensor) not in written:
                yield Wrong(f"{value.name} (which the segment does not write)", value.maker, apart, end)
        for generator, want in _drawn_by(ran.trace, ran.random):
            if (apart := difference(generator.get_state(), want)) is not None:
                yield Wrong("the state of the random generator", NOBODY, apart, end)

    def _accept(self, ran: _Ran) -> None:
        """The segment was right: later steps are compared with what it made and wrote."""
        checker = self.checker
        for memory in ran.written:
            if memory.name in checker.bridged and memory.name not in checker.moved:
                self._wrote_bridge(memory)
        written = {_torch.address_of(memory.where) for memory in ran.written}
        for value in checker.values.values():
            if _torch.address_of(value.tensor) in written:
                value.look()
        for name, leaf in self._outputs():
            checker.truth[name] = tensor = checker.recorded.constants[name]
            if has_memory(tensor):
                checker.add(name, tensor, _maker(leaf))
        if self.segment is None:
            checker.moved |= {name for name, bridge in checker.bridged.items() if _torch.address_of(bridge) in written}
            for number, root in enumerate(self.captured.roots):
                if (tensor := root.tensor()) is not None:
                    maker = Maker.of(self.captured.ops[root.made_by])
                    checker.add(f"the result of {maker.label} ({self.position}.{number})", tensor, maker)

    def _wrote_bridge(self, memory: _Written) -> None:
        """A written argument is copied back next. A written result of an eager step lives in the bridge from now on."""
        checker = self.checker
        value = checker.values.get(memory.name)
        is_argument = memory.name in checker.recorded.arguments
        if not is_argument:
            checker.moved.add(memory.name)
            checker.truth[memory.name] = memory.where
        if value is not None:
            value.tensor = value.tensor if is_argument else memory.where
            value.snapshot = memory.after

    def _refuse_late(self) -> None:
        """Raise if the segment takes a value that an eager step still computes, on a stream that nobody has waited for."""
        checker = self.checker
        names = {copy.value.name for copy in self.step.loads} | set(self.segment.inputs if self.segment else ())
        for name in names:
            tensor: Any = checker.truth.get(name)
            if has_memory(tensor) and (wrong := checker.late.get(_torch.storage_key(tensor))) is not None:
                why = (
                    "read again after all streams had come to rest, it was another value: the segment does not wait for "
                    "the stream that it is made on"
                )
                raise checker.failure(("race between streams", why, wrong), self.position)

    def _cause(self, ran: _Ran, wrong: Wrong, stale: tuple[str, Wrong] | None, stream: int) -> Verdict:
        """What the difference looks like, the evidence, and the value to blame."""
        if stale is not None:
            return self._stale_cause(*stale)
        self._take_back(ran)
        change = first_change(self.captured, ran.trace)
        if change is not None:
            return self._change_cause(change, ran.trace, wrong)
        if (unsteady := _first_unlike(ran, self._run(), wrong)) is not None:
            return unsteady
        if self.checker.device.type == "cuda" and self._agrees_synchronised(ran, stream):
            why = "launched again after all streams had come to rest, the segment agrees with eager"
            return "race between streams", why, wrong
        if (outside := self._work_outside(wrong)) is not None:
            return outside
        return "unknown", f"it is none of: {', '.join(cause for cause in CAUSES if cause != 'unknown')}", wrong

    def _work_outside(self, wrong: Wrong) -> Verdict | None:
        """The cause if only custom ops, whose work without torch is not seen, can be to blame; None if there are none."""
        nodes = [node for node in self.segment.module.graph.nodes if is_somebodys(node)] if self.segment else []
        if not nodes:
            return None
        names = ", ".join(dict.fromkeys(map(label, nodes)))
        why = f"torch's own ops are captured whole; of {names}, a part that goes to another stream, or to the host, is not"
        return "work outside of the capture", why, replace(wrong, maker=_maker(nodes[0]), how="at or behind")

    def _stale_cause(self, name: str, stale: Wrong) -> Verdict:
        changer, own = self.checker.undeclared.get(name, (NOBODY, False))
        where = f" at {changer.source}" if changer.source else ""
        if own:
            why = f"{name} was overwritten by another call of {changer.label}{where}, which returned the same memory again"
            return KEEPS, why, replace(stale, maker=changer, how="of a result of")
        why = f"it does not hold what {name} is now"
        if changer.label:
            why += f": {changer.label}{where} wrote it, and does not declare so"
        return "stale bridge", why, stale

    def _change_cause(self, change: Change, trace: Trace, wrong: Wrong) -> Verdict:
        """The cause if the ops are not those that were captured."""
        op = change.op
        blamed = replace(wrong, maker=Maker.of(op))
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
        if any(memory.written or memory.key in self.checker.witness.escaped.storages for memory in op.outside):
            why = f"{op.op} takes memory that {op.label} has stored away, and took other memory when it was captured"
            return KEEPS, why, blamed
        return "address moved", f"{op.op} reads a tensor that lies elsewhere than when it was captured", blamed

    def _agrees_synchronised(self, ran: _Ran, stream: int) -> bool:
        self.checker.come_to_rest()
        self.graph.replay(stream)
        self.checker.come_to_rest()
        return self._first_wrong(ran) is None


def _first_unlike(ran: _Ran, again: _Ran, wrong: Wrong) -> Verdict | None:
    """The first value in which two eager runs on the same inputs differ."""
    change = first_change(ran.trace, again.trace)
    if change is not None:
        blamed = replace(wrong, maker=Maker.of(change.op))
        cause = KEEPS if change.kind == "memory" else "frozen scalar"
        what = "other memory" if change.kind == "memory" else "other numbers"
        return cause, f"run twice on the same inputs, {change.op.label} takes {what} the second time", blamed
    cause, why = "a nondeterministic op", "run twice on the same inputs, {} differs from itself"
    for first, second in zip(ran.trace.roots, again.trace.roots, strict=True):
        mine, theirs = first.tensor(), second.tensor()
        if mine is not None and theirs is not None and (apart := difference(theirs, mine)) is not None:
            op = ran.trace.ops[first.written_by]
            blamed = Wrong(f"the result of {op.op}", Maker.of(op), apart, first.written_by)
            return cause, why.format(op.label), blamed
    for one, two in zip(ran.written, again.written, strict=True):
        if (apart := difference(two.after, one.after)) is not None:
            return cause, why.format(one.maker.label), Wrong(one.name, one.maker, apart)
    return None


def _drawn_by(trace: Trace, states: RandomStates) -> RandomStates:
    """The states of generators that ``trace`` may have drawn from. Other threads draw from the host's."""
    return RandomStates(pair for pair in states if trace.draws_random or pair[0].device.type == "cuda")


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


def _maker(leaf: Any) -> Maker:
    return Maker(label(leaf), source_line(leaf)) if isinstance(leaf, fx.Node) else NOBODY
