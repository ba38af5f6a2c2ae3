"""Run a program once under a driver and keep what replay needs.

A recording is a list of steps over *slots*. A slot is a name: of an argument, of what an eager call returned in this
call, or of a constant, which is a tensor that keeps its address (memory of the pool, a bridge) or a plain number.

Who owns what: memory that captured segments read or make is the pool's. While a recording is made, each value and each
bridge holds its part of the pool until its last reader was recorded; then later segments may get it, and so may later
recordings. Replays keep the order, and so do calls. The recording itself knows addresses. What it does hold: results that
are static, bridges of small inputs, and everything where a tool asks for that. Arguments, static inputs too, belong to the
caller and are in no constant, not even as a view.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.drivers import CapturedGraph, CaptureDriver, Feed
from breakable_backend.drivers.interception import without_autocast_cache
from breakable_backend.errors import (
    CAUSES,
    BreakableError,
    CaptureError,
    DivergenceError,
    EagerOutputError,
    Passing,
    ReplayError,
    first_line,
)
from breakable_backend.failures import passing
from breakable_backend.ir.effects import draws, is_checked_by_nobody, is_opaque, is_view, producer_of, tensors_of
from breakable_backend.ir.layout import Geometry, TensorSpec, extent
from breakable_backend.ir.lifetimes import Lifetimes, by_value
from breakable_backend.ir.modes import ambient_of
from breakable_backend.ir.program import (
    EagerSegment,
    GraphSegment,
    Input,
    Op,
    Program,
    Reason,
    Segment,
    last_uses,
    outputs_of,
    source_line,
)
from breakable_backend.marks.ops import direct, is_call
from breakable_backend.marks.rules import label
from breakable_backend.recordings import buffers
from breakable_backend.recordings.buffers import Bridge, clone_exact, load_all
from breakable_backend.recordings.code import with_code
from breakable_backend.recordings.healing import Healing, NodeByNode, Recut, suspects_among

if TYPE_CHECKING:
    import sympy

# --- what a recording is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """A place that a step reads or writes."""

    name: str


@dataclass(frozen=True)
class Copy:
    """Between a bridge (a constant) and the value outside."""

    bridge: Slot
    value: Slot
    device: torch.device | None = None
    """Where the value is, in each call; None where nobody can tell."""
    feed: Feed | None = None
    """What copies it in each launch of the graph; None: it is copied before."""


class State(Protocol):
    """What holds while a call is made."""

    def enter(self) -> AbstractContextManager[None]:
        """For a ``with`` statement."""


@dataclass(frozen=True)
class Call:
    """One call of an eager step: ``result = function(*args, **kwargs)`` under ``ambient``."""

    result: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    label: str
    source: str = ""
    spec: TensorSpec | None = None
    """What the result must look like; None if it is no tensor, or of a size known only at run time."""
    ambient: State | None = None
    view: bool = False
    """Whether it does nothing but alias its arguments."""


@dataclass(frozen=True)
class GraphStep:
    """Load bridges, launch one captured graph, store what it wrote of the caller's."""

    graph: CapturedGraph
    loads: tuple[Copy, ...] = ()
    stores: tuple[Copy, ...] = ()
    segment: GraphSegment | None = None
    """What was captured, of a compiled function; a ``with`` block has the ops that it ran instead."""
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True)
class EagerStep:
    """Calls, one by one."""

    calls: tuple[Call, ...]
    reasons: tuple[Reason, ...]
    segment: EagerSegment | None = None


Step = GraphStep | EagerStep


@dataclass(frozen=True)
class Held:
    """Bytes that are needed at once, at most."""

    bridges: int = 0
    values: int = 0
    """What captured segments hand on, to other steps or to the caller."""

    @classmethod
    def by(cls, constants: Iterable[Any], others: Collection[int] = ()) -> Held:
        """What tensors and bridges hold; storages with keys in ``others`` hold nothing."""
        sizes: dict[int, int] = {}
        bridges: set[int] = set()
        for value in constants:
            tensor = value.tensor if isinstance(value, Bridge) else value
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                key = _torch.storage_key(tensor)
                sizes[key] = 0 if key in others else tensor.untyped_storage().nbytes()
                if isinstance(value, Bridge):
                    bridges.add(key)
        bridged = sum(sizes[key] for key in bridges)
        return cls(bridged, sum(sizes.values()) - bridged)

    def or_more(self, other: Held) -> Held:
        """The most of both."""
        return Held(max(self.bridges, other.bridges), max(self.values, other.values))

    def __add__(self, other: Held) -> Held:
        return Held(self.bridges + other.bridges, self.values + other.values)


@dataclass(frozen=True)
class Recording:
    """What is left of a program for one key: nothing to decide, everything to do."""

    arguments: tuple[str, ...]
    """Slots of the arguments, in order."""
    specs: Mapping[str, TensorSpec]
    """What arguments that captured segments read must look like."""
    steps: tuple[Step, ...]
    epilogue: tuple[Call, ...]
    returned: tuple[Any, ...]
    constants: Mapping[str, Any] = field(repr=False)
    addresses: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Where captured segments expect static inputs, bridges and what else they take, by slot."""
    most: Held | None = None
    """What is needed at once, at most; None if everything is held as long as the recording lives."""
    prologue: tuple[Call, ...] = ()
    """What comes before the steps: see :meth:`_Recorder._settled`."""
    saved: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    """What holds the memory of values that are saved for a backward: see :attr:`Plan.saved_from`."""

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        return tuple(step.graph for step in self.steps if isinstance(step, GraphStep))

    def bridge_of(self, name: str) -> Bridge | None:
        """The bridge of an input; None if it has none."""
        bridge = self.constants.get(_bridge_name(name))
        return bridge if isinstance(bridge, Bridge) else None

    @property
    def num_copies(self) -> int:
        """Copies between bridges and the outside in one call, at most."""
        return sum(len(step.loads) + len(step.stores) for step in self.steps if isinstance(step, GraphStep))

    @property
    def held(self) -> Held:
        """Memory that it needs at once, at most: of the pool, and what it holds as long as it lives."""
        return self.most if self.most is not None else Held.by(self.constants.values())

    @property
    def bridge_bytes(self) -> int:
        """Memory of the bridges that are needed at once, at most."""
        return self.held.bridges

    @property
    def held_bytes(self) -> int:
        """Memory of what segments hand on that is needed at once, at most; bridges are not counted."""
        return self.held.values


# --- calls ----------------------------------------------------------------------------------------------------------------


def perform(call: Call, slots: Mapping[str, Any]) -> Any:
    """Make ``call``, with values from ``slots``, and check its result."""
    args, kwargs = _fill((call.args, call.kwargs), slots)
    if call.ambient is None:
        result = call.function(*args, **kwargs)
    else:
        with call.ambient.enter():
            result = call.function(*args, **kwargs)
    if call.spec is not None and not call.spec.accepts(result):
        reject(call, result)
    return result


def reject(call: Call, result: Any) -> None:
    """Raise for a result that does not fit; the strict check that comes first lets harmless strides through to here."""
    assert call.spec is not None
    if call.spec.accepts(result):
        return
    got = TensorSpec.of(result) if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"
    raise EagerOutputError(
        f"{call.label} returned {got}, but was compiled for {call.spec}",
        where=call.source,
        fix="make its fake implementation (register_fake) return what the real one returns, strides included",
    )


def check_argument(name: str, spec: TensorSpec, value: Any) -> None:
    """Raise if an argument does not fit what was recorded."""
    if not spec.accepts(value):
        got = TensorSpec.of(value) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ReplayError(
            f"argument {name} is {got}, but was recorded as {spec}",
            fix="Dynamo's guards recompile for such calls: do not filter them out (guard_filter_fn)",
        )


def places_of(constants: Mapping[str, Any]) -> dict[str, int]:
    """Where the tensors and bridges among ``constants`` lie."""
    tensors = {name: value.tensor if isinstance(value, Bridge) else value for name, value in constants.items()}
    return {
        name: tensor.data_ptr()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    }


def check_places(recording: Recording, args: Sequence[Any]) -> None:
    """Raise if what captured segments take is not where it was when they were captured."""
    slots = {**recording.constants, **dict(zip(recording.arguments, args, strict=True))}
    for name, address in recording.addresses.items():
        value = slots[name]
        tensor = value.tensor if isinstance(value, Bridge) else value
        if tensor.data_ptr() != address:
            refuse_place(f"{'the bridge ' if isinstance(value, Bridge) else ''}{name}", tensor.data_ptr() == 0)


def refuse_place(what: str, freed: bool = False, where: str = "") -> NoReturn:
    """Raise for memory that a captured segment would look for in vain."""
    fate = "was freed" if freed else "is not where it was when they were captured"
    raise DivergenceError(
        f"captured segments take {what} at its address, and it {fate}: this looks like address moved",
        where=where,
        fix=CAUSES["address moved"],
        cause="address moved",
        kind="captured",
        value=what,
    )


def _fill(tree: Any, slots: Mapping[str, Any]) -> Any:
    return pytree.tree_map_only(Slot, lambda slot: slots[slot.name], tree)


# --- running a program ----------------------------------------------------------------------------------------------------


class StepObserver(Protocol):
    """What the steps of a program ask of a :class:`breakable_backend.recordings.observer.Observer`."""

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any]:
        """What is captured in place of a segment's body."""

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        """What an eager step calls in place of ``function``."""


@dataclass(frozen=True)
class Binding:
    """A program together with the arguments of one call: every number is known."""

    program: Program
    values: Mapping[str, Any]
    """Arguments, constants of the traced code and sizes, by name."""
    symbols: Mapping[sympy.Symbol, int]
    observer: StepObserver | None = None

    @classmethod
    def of(cls, program: Program, args: Sequence[Any], observer: StepObserver | None = None) -> Binding:
        values = {value.name: value.value if value.index < 0 else args[value.index] for value in program.inputs}
        symbols: dict[sympy.Symbol, int] = {}
        for value in program.inputs:
            _bind(value, values[value.name], symbols)
        return cls(program, values | cls._sizes(program, values, symbols), symbols, observer)

    def recut(self, program: Program) -> Binding:
        """The same arguments for ``program``, which is made of the same graph."""
        values = {name: self.values[name] for name in self.values if name not in self.program.sizes}
        return Binding(program, values | self._sizes(program, values, self.symbols), self.symbols, self.observer)

    @staticmethod
    def _sizes(program: Program, values: Mapping[str, Any], symbols: Mapping[sympy.Symbol, int]) -> dict[str, Any]:
        return {
            name: values[program.floats[name]].item() if name in program.floats else _torch.evaluate(size, symbols)
            for name, size in program.sizes.items()
        }

    def captured(self, position: int, segment: GraphSegment) -> Callable[..., Any]:
        """A captured segment as a function of its inputs."""
        if self.observer is None:
            return with_code(segment.module)
        return self.observer.captured(position, NodeByNode(segment.module))

    def calls(self, segment: EagerSegment, slots: Mapping[str, Any], device_type: str | None) -> list[Call]:
        """The calls of an eager segment. ``slots`` maps its inputs; ``device_type`` asks for direct functions."""
        environment: dict[fx.Node, Any] = {}
        calls: list[Call] = []
        for node in segment.module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = slots[node.name]
            elif node.op == "get_attr":
                environment[node] = getattr(segment.module, node.target)
            elif node.op == "call_function":
                calls.append(self._call(node, environment, device_type))
                environment[node] = Slot(node.name)
        return calls

    def _call(self, node: fx.Node, environment: Mapping[fx.Node, Any], device_type: str | None) -> Call:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
        function: Any = node.target
        if device_type is not None and isinstance(function, _torch.OpOverload):
            if is_call(function):
                site, args = args[0], args[1:]
                assert isinstance(site, int)
                function = direct(function, site)
            else:
                function = _torch.python_implementation(function, device_type) or function
        producer = producer_of(node)
        value = node.meta.get("val")
        checked = isinstance(value, torch.Tensor) and must_fit(producer) and self._known(value)
        view = is_view(node)
        if self.observer is not None and not (view or function is operator.getitem):
            function = self.observer.eager(function, label(producer), source_line(producer))
        return Call(
            result=node.name,
            function=function,
            args=tuple(args),
            kwargs=kwargs,
            label=label(producer),
            source=source_line(producer),
            spec=TensorSpec.of(value, self.symbols) if checked and value is not None else None,
            ambient=ambient_of(node),
            view=view,
        )

    def _known(self, value: torch.Tensor) -> bool:
        return all(
            not isinstance(size, torch.SymInt) or size.node.expr.free_symbols <= set(self.symbols)
            for size in (*value.shape, *value.stride())
        )


def must_fit(maker: fx.Node) -> bool:
    """Whether the results of an eager call may be other than its fake says, and nobody else would notice."""
    return is_opaque(maker.target) or is_checked_by_nobody(maker)


def _bind(value: Input, actual: Any, symbols: dict[sympy.Symbol, int]) -> None:
    fake = value.value
    if value.kind == "ragged":
        return
    pairs = (
        zip((*fake.shape, *fake.stride()), (*actual.shape, *actual.stride()), strict=True)
        if isinstance(fake, torch.Tensor)
        else [(fake, actual)]
    )
    for symbolic, number in pairs:
        if isinstance(symbolic, torch.SymInt) and (symbol := _torch.symbol_of(symbolic)) is not None:
            symbols[symbol] = int(number)


MAX_FED = 4
"""Copies that a graph makes by itself. More are launched together, before it."""

# --- recording ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How arguments enter captured segments, beyond what the program says."""

    keyed: frozenset[str] = frozenset()
    """Tensor inputs whose address is in the key, so that captured segments use it directly."""
    device_scalars: bool = False
    """Whether host scalars have a bridge on the device instead of being in the key."""
    fresh_outputs: bool = True
    saved_from: int | None = None
    """From this output on, outputs are what a backward needs, each a value of its own. They are handed out as they lie, and the
    recording holds their memory."""
    observer: StepObserver | None = None
    keep: bool = False
    """Whether every value and bridge is held as long as the recording lives."""


@dataclass
class Recorded:
    """What came of recording one call."""

    recording: Recording
    outputs: list[Any]
    failed: Mapping[str, Reason]
    """Nodes that could not be captured and ran eagerly instead, by name; and others that are eager with them from now on."""
    copies: int
    program: Program
    """What was recorded: the program, cut anew around those nodes."""
    put_off: PutOff | None = None
    """Why nothing is recorded this time; None if all went well. There is nothing in the recording then."""


@dataclass(frozen=True)
class PutOff:
    """A capture failed for a reason that passes. What came after it, and the segment itself, ran plainly."""

    cause: Passing
    reason: Reason
    suspects: Mapping[str, Reason]
    """The nodes that did it, if nobody else has; all of the segment where nobody knows which."""


def record(
    program: Program,
    driver: CaptureDriver,
    args: Sequence[Any],
    plan: Plan,
    stream: int,
    *,
    auto_break: bool,
    recut: Recut | None = None,
) -> Recorded:
    """Run ``program`` once on ``args`` and record it: each segment is captured, then launched at once.

    The caller holds the driver's lock and is between ``driver.begin`` (which gave ``stream``) and ``driver.end``.
    Eager steps see real data. If this raises, everything that was captured is given back. So it is once a capture fails
    for a reason that passes, before the rest of the program runs plainly.

    A segment that cannot be captured heals: the node that made its capture fail becomes eager, the program is cut anew,
    and goes on from the beginning of that segment, of which nothing has happened. Without ``recut`` all of it is eager.

    Raises:
        CaptureError: a segment cannot be captured, and ``auto_break`` is off.
        Exception: whatever an eager step raised, unchanged.
    """
    recorder = _Recorder(Binding.of(program, args, plan.observer), driver, plan, stream, auto_break, recut)
    try:
        with driver.recording(apart=plan.saved_from is not None):  # what is saved lives on between calls
            position = 0
            while position < len(recorder.segments):
                segment = recorder.segments[position]
                if isinstance(segment, GraphSegment):
                    if not recorder.capture(position, segment):
                        continue  # the program was cut anew, and has another segment there
                else:
                    recorder.eager(segment)
                recorder.retire(position)
                position += 1
            try:
                return recorder.finish()
            except torch.OutOfMemoryError as error:
                if recorder.put_off is not None:
                    raise
                recorder.give_up(error)
            return recorder.finish()
    except BaseException:
        graphs = recorder.graphs()
        recorder.forget()
        driver.release(graphs)
        raise


class _Recorder:
    def __init__(
        self,
        binding: Binding,
        driver: CaptureDriver,
        plan: Plan,
        stream: int,
        auto_break: bool,
        recut: Recut | None,
    ) -> None:
        self.binding, self.driver, self.plan, self.stream, self.auto_break = binding, driver, plan, stream, auto_break
        self.healing = Healing(recut)
        self.values: dict[str, Any] = dict(binding.values)
        """All slots, with this call's values."""
        self.constants: dict[str, Any] = {}
        self.home: dict[str, Any] = {}
        """Where later readers find a value that segments exchange: a slot, or the number itself."""
        self.outside: set[str] = set()
        """Storages that captured segments reach only through a bridge: unkeyed inputs, and what eager steps made."""
        self.loaded: set[str] = set()
        """Inputs whose bridge holds their present version."""
        self.intact: dict[str, Slot] = {}
        """Bridged results of eager steps that nothing has written since, with the slot of the result itself."""
        # A static result may be an argument of the next call: no step may get its memory before that has been read.
        self.keep = plan.keep or not plan.fresh_outputs or not driver.reuses_memory
        self.owners: dict[str, torch.Tensor | Bridge] = {}
        """What holds memory of the pool, by slot. Constants lie at the same addresses, and hold nothing."""
        self.owner_of: dict[int, str] = {}
        """Whose memory the storage of a constant lies over, by the key of that storage."""
        self.pinned: set[str] = set()
        """Slots of values that an eager step has returned an alias of: it may be read when they are not any more."""
        self.made_for: dict[str, int] = {}
        """The segment that each bridge was made for, by slot."""
        self.lives = Lifetimes.of(binding.program)
        leaves = outputs_of(binding.program.epilogue.module)
        self.saved = tuple(leaf.name for leaf in leaves[plan.saved_from :]) if plan.saved_from is not None else ()
        """The values among the outputs that a backward needs."""
        self.most = Held()
        self.steps: list[Step] = []
        self.addresses: dict[str, int] = {}
        static = {value.name for value in binding.program.inputs if value.kind == "static"}
        self.fixed = plan.keyed | static
        """Inputs that captured segments use at their address."""
        self.put_off: PutOff | None = None
        self.dead: list[tuple[str, ...]] = []
        """What nobody reads behind each segment; known once nothing is kept."""
        self.copies = 0
        for value in binding.program.inputs:
            self._introduce(value)
        self.home.update((name, binding.values[name]) for name in binding.program.sizes)

    def _introduce(self, value: Input) -> None:
        self.home[value.name] = self.values[value.name] if value.kind == "number" else Slot(value.name)
        if value.kind == "constant":
            self.constants[value.name] = self.values[value.name]
        bridged_scalar = value.kind == "scalar" and self.plan.device_scalars
        if bridged_scalar or (value.kind == "tensor" and value.name not in self.plan.keyed):
            self.outside.add(value.name)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.binding.program.segments

    # captured segments

    def capture(self, position: int, segment: GraphSegment) -> bool:
        """Capture a segment, or run it. False: nothing of it has happened, and the program is another from there on."""
        if self.put_off is None:
            failed = self._capture(position, segment)
            if failed is None:
                return True
            if self.put_off is not None:
                self._give_back(position, self.put_off.cause)
            elif self.healing.again or self._heal(position):
                return False
        else:
            failed = self.put_off.reason
        with self.driver.drawing() if any(draws(node.target) for node in segment.module.graph.nodes) else nullcontext():
            self.eager(
                EagerSegment(segment.module, segment.inputs, segment.outputs, segment.reads, segment.writes, (failed,))
            )
        return True

    def _heal(self, position: int) -> bool:
        """Cut the program anew around what cannot be captured; whether the recording can go on with that."""
        program = self.healing.cut(self.binding.program, position)
        if program is None:
            return False
        self.binding = self.binding.recut(program)
        self.lives = Lifetimes.of(program)
        for name in program.sizes:
            self.home[name] = self.values[name] = self.binding.values[name]
        return True

    def _capture(self, position: int, segment: GraphSegment) -> Reason | None:
        """Capture a segment and launch it; why it could not be, and has to run eagerly.

        The error is gone when this returns, and with it what its frames held of the capture.
        """
        loads: list[Copy] = []
        try:
            for name in (*segment.inputs, *self._early()):
                if (copy := self._bridge(name, position)) is not None:
                    loads.append(copy)
            feeding = self._fed(loads)
            before = [copy for copy in loads if copy not in feeding]
            self.copies += load_all(
                [self.values[copy.bridge.name] for copy in before], [self.values[copy.value.name] for copy in before]
            )
        except (CaptureError, torch.OutOfMemoryError) as error:
            return self._capture_failed(position, segment, loads, error)
        inputs = [self._inside(name) for name in segment.inputs]
        observer = self.plan.observer
        body = NodeByNode(segment.module, self.driver.progress, self.healing.pauses(segment))
        captured = body if observer is None else observer.captured(position, body)
        fed = [(self.values[copy.bridge.name].tensor, self.values[copy.value.name]) for copy in feeding]
        try:
            with without_autocast_cache():
                graph, results = self.driver.capture(functools.partial(captured, *inputs), fed)
        except CaptureError as error:
            return self._capture_failed(position, segment, loads, error, body)
        self.copies += len(feeding)
        feeds = {copy.bridge.name: feed for copy, feed in zip(feeding, graph.feeds, strict=True)}
        loads = [replace(copy, feed=feeds.get(copy.bridge.name)) for copy in loads]
        self.addresses.update(
            (name, value.data_ptr())
            for name, value in zip(segment.inputs, inputs, strict=True)
            if name in self.fixed and isinstance(value, torch.Tensor)
        )
        stores = tuple(
            Copy(Slot(_bridge_name(access.storage)), Slot(access.storage))
            for access in segment.writes
            if access.storage in self.outside
            and access.storage not in segment.outputs
            and self._is_input(access.storage)
        )
        self.steps.append(GraphStep(graph, tuple(loads), stores, segment))
        self._take(segment.outputs, results, inputs)
        try:
            graph.replay(self.stream)
        except ReplayError as error:
            if not error.passing:
                raise
            return self._capture_failed(position, segment, loads, error)
        for access in segment.writes:
            self.intact.pop(access.storage, None)
        for copy in stores:
            self.copies += self.values[copy.bridge.name].store(self.values[copy.value.name])
        for copy in loads:
            if not self._is_input(copy.value.name) and copy.value.name not in self.lives.returned:
                del self.values[copy.value.name]  # the bridge is where it lives from here on
        return None

    def _fed(self, loads: Sequence[Copy]) -> list[Copy]:
        """Those that the graph makes by itself: few, since one is done after the other."""
        if self.plan.keep:  # for somebody who looks at bridges before a launch
            return []
        fed = []
        for copy in loads:
            bridge = self.values[copy.bridge.name]
            plain = bridge.flat is None and copy.device == self.driver.device
            if plain and self.driver.feeds(bridge.tensor, self.values[copy.value.name]):
                fed.append(copy)
        return fed if len(fed) <= MAX_FED else []

    def _early(self) -> Iterator[str]:
        """Inputs that are loaded before anything is launched, with static results.

        They may be such results, in memory that segments before their first reader use for themselves.
        """
        if not self.plan.fresh_outputs and not any(isinstance(step, GraphStep) for step in self.steps):
            for names in self.lives.unloaded.values():
                yield from names

    def _take(self, names: Sequence[str], results: Sequence[Any], inputs: Sequence[Any]) -> None:
        """What a captured segment made. It holds its memory until its last reader is recorded."""
        with_memory = [tensor for tensor in tensors_of(inputs) if tensor.layout is torch.strided]
        lent: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage | None]]
        lent = {_torch.storage_key(tensor): (tensor.untyped_storage(), None) for tensor in with_memory}
        for name, result in zip(names, results, strict=True):
            self.home[name] = Slot(name)
            self.values[name] = self.constants[name] = result
            if self.keep or not self._is_memory(result):
                continue
            key = _torch.storage_key(result)
            owner, place = lent[key] if key in lent else (self.driver.lend(result).untyped_storage(), None)
            place = place if place is not None else _torch.unowned_storage(owner)
            lent[key] = owner, place
            geometry = Geometry.of(result)
            self._hold(name, geometry.on(owner), place)
            self.values[name] = self.constants[name] = geometry.on(place)
        self._look()

    def _is_memory(self, value: Any) -> bool:
        """Whether ``value`` is a tensor in memory of the pool."""
        return (
            type(value) is torch.Tensor
            and value.layout is torch.strided
            and value.device == self.driver.device
            and value.untyped_storage().nbytes() > 0
        )

    def _hold(self, slot: str, owner: torch.Tensor | Bridge, place: torch.UntypedStorage) -> None:
        """Have ``owner`` hold the memory behind ``place``, on which the constants of ``slot`` lie."""
        self.owners[slot] = owner
        self.owner_of[int(place._cdata)] = slot

    def _look(self) -> None:
        """Note how much memory is needed now, beside what is held for good."""
        self.most = self.most.or_more(Held.by(self.owners.values()))

    def retire(self, position: int) -> None:
        """Give up the memory of what no step behind ``position`` reads."""
        for name in self.lives.ends.get(position, ()):
            if name not in self.lives.returned:
                self._give_up(name)
                self.values.pop(name, None)
                self.home.pop(name, None)
            if name not in self.saved and (name not in self.lives.returned or name in self.intact):
                self._give_up(_bridge_name(name))
        for name in self.lives.unloaded.get(position, ()):
            self._give_up(_bridge_name(name))
        # Where nothing is kept, constants and arguments go as early as in a plain call.
        for name in self.dead[position] if self.put_off is not None else ():
            for held in (name, _bridge_name(name), _inside_name(name)):
                self.values.pop(held, None)
                self.constants.pop(held, None)

    def _give_up(self, slot: str) -> None:
        if slot not in self.pinned:
            self.owners.pop(slot, None)

    def _is_input(self, name: str) -> bool:
        return name in self.binding.values

    def _bridge(self, name: str, position: int) -> Copy | None:
        """Make ``name`` reachable for segment ``position``; returns the copy that this takes on each call, if any."""
        if name not in self.outside or name in self.loaded:
            return None
        bridge = Slot(_bridge_name(name))
        if bridge.name not in self.values:
            self.values[bridge.name] = self.constants[bridge.name] = self._made_bridge(name, bridge.name)
            self.made_for[bridge.name] = position
        self.loaded.add(name)
        if not self._is_input(name):
            # From here on the bridge is where this value lives, for eager steps too.
            self.intact[name] = Slot(name)
            inside = Slot(_inside_name(name))
            self.values[inside.name] = self.constants[inside.name] = self.values[bridge.name].tensor
            self.home[name] = inside
        return Copy(bridge, Slot(name), self.values[name].device)

    def _made_bridge(self, name: str, slot: str) -> Bridge:
        """A bridge for ``name``, in memory of the pool that it holds until its last captured reader is recorded."""
        value = self.values[name]
        small = self._is_input(name) and extent(value) * value.element_size() <= buffers.KEPT_INPUT
        if self.keep or small or value.numel() == 0:
            return Bridge.like(value, self.driver.device)
        with self.driver.allocating():
            made = Bridge.like(value, self.driver.device)
        owner = made.on(self.driver.lend(made.tensor).untyped_storage())
        place = _torch.unowned_storage(owner.tensor.untyped_storage())
        self._hold(slot, owner, place)
        return made.on(place)

    def _unbridge(self, copy: Copy, position: int) -> None:
        """Undo ``_bridge``: segment ``position``, which asked for it, is no graph, so no replay loads this bridge there."""
        name = copy.value.name
        self.loaded.discard(name)
        if not self._is_input(name):
            self.intact.pop(name)
            self.home[name] = Slot(name)
            self.constants.pop(_inside_name(name))
        if self.made_for.get(copy.bridge.name) == position:  # and no graph before it knows the bridge's address
            for slots in (self.values, self.constants, self.owners):
                slots.pop(copy.bridge.name, None)

    def _inside(self, name: str) -> Any:
        """``name`` as a captured segment sees it."""
        if name in self.outside:
            bridge = _bridge_name(name)
            owner = self.owners.get(bridge, self.values[bridge])
            return owner.tensor
        home = self.home[name]
        # The tensor that holds the memory, not the one that only lies there: what a segment makes may be an alias of it.
        return self.owners.get(home.name, self.values[home.name]) if isinstance(home, Slot) else home

    def _capture_failed(
        self,
        position: int,
        segment: GraphSegment,
        loads: Sequence[Copy],
        error: Exception,
        body: NodeByNode | None = None,
    ) -> Reason:
        """Why a segment cannot be captured: for good, because of the node that ``body`` was at; or, if it passes, now."""
        for copy in loads:
            self._unbridge(copy, position)
        for name in segment.outputs:  # of a graph that could not be launched
            self.owners.pop(name, None)
            self.constants.pop(name, None)
        nodes = [node for node in segment.module.graph.nodes if node.op == "call_function"]
        ours = error if isinstance(error, BreakableError) else None
        what = ours.what if ours is not None else first_line(error)
        line = ours.blamed if ours is not None else ""
        blamed = suspects_among(nodes, body)
        reasons = {
            node.name: Reason(
                "capture_failed", f"could not be captured: {what}", label(node), line or source_line(node)
            )
            for node in blamed or nodes
        }
        reason = next(iter(reasons.values()), Reason("capture_failed", f"could not be captured: {what}", "", line))
        cause = self.healing.judge(passing(error), body, nodes)
        if not cause and not self.auto_break and not self.healing.again:
            fix = (ours.fix if ours is not None else "") or "let it run eagerly: auto_break=True"
            raise CaptureError(what, where=reason.source, fix=fix) from error.__cause__
        if cause:
            self.put_off = PutOff(cause, reason, reasons)
        elif not self.healing.again:
            self.healing.found(reasons, blamed)
        return reason

    def give_up(self, error: Exception) -> None:
        """All went well, but there is no memory for copies of the results: they get that of the graphs."""
        behind = len(self.binding.program.segments)
        reason = Reason("capture_failed", f"results could not be copied: {first_line(error)}", "")
        self.put_off = PutOff("memory", reason, {})
        self._give_back(behind, "memory")

    def _give_back(self, position: int, cause: Passing) -> None:
        """Give back what was captured before segment ``position``: the rest of the program may need the memory."""
        graphs = self.graphs()
        self.steps.clear()
        self.dead = last_uses(self.binding.program)
        for before in range(position):
            self.retire(before)
        self.driver.release(graphs)
        if cause == "memory":
            self.driver.vacate()

    def graphs(self) -> list[CapturedGraph]:
        """What was captured so far."""
        return [step.graph for step in self.steps if isinstance(step, GraphStep)]

    # eager segments

    def eager(self, segment: EagerSegment) -> None:
        calls = self.binding.calls(segment, {name: self.home[name] for name in segment.inputs}, self.driver.device.type)
        local = dict(self.values)
        kept = []
        for call, dead in zip(calls, _dead_after(calls, segment.outputs), strict=True):
            local[call.result] = perform(call, local)
            if self._is_constant_view(call, local[call.result]):
                self.constants[call.result] = local[call.result]
            else:
                kept.append(call)
            for name in dead:
                del local[name]
        self.steps.append(EagerStep(tuple(kept), segment.reasons, segment))
        for access in segment.writes:
            if self._is_input(access.storage):
                self.loaded.discard(access.storage)
            self.intact.pop(access.storage, None)
        for name in segment.outputs:
            self.values[name] = local[name]
            self.home[name] = Slot(name)
            if isinstance(local[name], torch.Tensor):
                self.outside.add(name)
            self.pinned.update(self._behind(local[name]))

    def _behind(self, value: Any) -> Iterator[str]:
        """Slots whose memory tensors in ``value`` lie in, on whatever storage: DLPack makes others over the same memory."""
        for tensor in tensors_of(value):
            if tensor.layout is torch.strided and tensor.device == self.driver.device:
                address = tensor.untyped_storage().data_ptr()
                for slot, owner in self.owners.items():
                    memory = (owner.tensor if isinstance(owner, Bridge) else owner).untyped_storage()
                    if memory.data_ptr() <= address < memory.data_ptr() + memory.nbytes():
                        yield slot

    def _is_constant_view(self, call: Call, made: Any) -> bool:
        """Whether a call only makes a view of memory that stays where it is, so that it need not be made again.

        What a fake says is not enough: were ``made`` a copy, later calls would get the values of this one.
        """
        if not is_view_call(call):
            return False
        slots = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Slot)]
        if not slots or not all(slot.name in self.constants for slot in slots):
            return False
        memory = {_torch.storage_key(t) for slot in slots for t in tensors_of(self.constants[slot.name])}
        return all(_torch.storage_key(tensor) in memory for tensor in tensors_of(made))

    # outputs

    def finish(self) -> Recorded:
        program = self.binding.program
        epilogue = program.epilogue
        local = dict(self.values)
        calls: list[Call] = []

        def make(call: Call) -> Slot:
            made = local[call.result] = perform(call, local)
            if self._is_constant_view(call, made):
                self.constants[call.result] = made
            else:
                calls.append(call)
            return Slot(call.result)

        taken = {node.name for node in epilogue.module.graph.nodes} | set(local)
        clones: dict[str, Slot] = {}

        def copied(place: Slot) -> Slot:
            if place.name not in clones:
                fresh = f"{place.name.replace('.', '_')}_fresh"
                while fresh in taken:
                    fresh += "_"
                taken.add(fresh)
                clones[place.name] = make(Call(fresh, clone_exact, (place,), {}, "clone"))
            return clones[place.name]

        places: dict[str, Any] = {}
        leaves = outputs_of(epilogue.module)[: self.plan.saved_from]
        behind = _outputs_behind(epilogue.module, leaves)
        for name in epilogue.inputs:
            home = self.intact.get(name, self.home[name])
            # Several outputs on one storage of ours: copy the storage once, and make the views on the copy.
            places[name] = copied(home) if self._to_copy(home, local) and behind[name] > 1 else home
        for call in self.binding.calls(EagerSegment(epilogue.module, epilogue.inputs, (), (), (), ()), places, None):
            places[call.result] = make(call)
        returned = []
        for leaf in leaves:
            place = places[leaf.name] if isinstance(leaf, fx.Node) else leaf
            returned.append(copied(place) if self._to_copy(place, local) else place)
        outputs = list(_fill(tuple(returned), local))
        returned += [self.home[name] for name in self.saved]
        held = [self._holder(name) for name in self.saved]
        outputs += [
            self.values[self.home[name].name] if owner is None else owner
            for name, owner in zip(self.saved, held, strict=True)
        ]
        if self.put_off is not None:
            nothing = Recording((), {}, (), (), (), {})
            return Recorded(nothing, outputs, self.healing.eager, self.copies, program, self.put_off)
        recording = Recording(
            arguments=tuple(value.name for value in program.inputs if value.index >= 0),
            specs={
                value.name: TensorSpec.of(self.values[value.name])
                for value in program.inputs
                if value.kind in ("tensor", "scalar") and value.name in program.read_by_graphs()
            },
            steps=tuple(self.steps),
            epilogue=tuple(calls),
            returned=tuple(returned),
            constants=self.constants,
            addresses=self.addresses | places_of(self.constants),
            most=None if self.keep else self.most + Held.by(self.constants.values(), self.owner_of),
            prologue=tuple(self._settled()),
            saved=tuple(owner for owner in held if owner is not None),
        )
        return Recorded(recording, outputs, self.healing.eager, self.copies, program)

    def _settled(self) -> Iterator[Call]:
        """With static results: inputs that may be such results, copied before anything is launched.

        For captured segments that read an input :meth:`_early` is enough. An eager step may read it behind a launch, and what
        is written to it would be written to a result of this call.
        """
        launches = [at for at, step in enumerate(self.steps) if isinstance(step, GraphStep)]
        if self.plan.fresh_outputs or not launches:
            return
        late = [step.segment for step in self.steps[launches[0] :] if isinstance(step, EagerStep) and step.segment]
        touched = {name for segment in late for name in segment.inputs}
        touched |= {access.storage for segment in self.binding.program.segments for access in segment.writes}
        owned = self._owned_storages()

        def settled(value: torch.Tensor) -> torch.Tensor:
            return clone_exact(value) if _torch.storage_key(value) in owned else value

        for value in self.binding.program.inputs:
            if value.kind == "tensor" and value.name in touched & self.outside:
                yield Call(value.name, settled, (Slot(value.name),), {}, "settled")

    def _holder(self, name: str) -> torch.Tensor | None:
        """What holds the memory of a value that is saved, if the pool has it."""
        home = self.home[name].name
        owner = self.owners.get(_bridge_name(name) if home == _inside_name(name) else home)
        if owner is None and home in self.constants:
            owner = self.constants[home]
        return owner.tensor if isinstance(owner, Bridge) else owner

    def _to_copy(self, place: Any, local: Mapping[str, Any]) -> bool:
        """Whether the caller would get memory of this recording, which the next call changes."""
        if not (self.plan.fresh_outputs and isinstance(place, Slot) and isinstance(local[place.name], torch.Tensor)):
            return False
        return not self._is_input(place.name) and self._is_ours(local[place.name])

    def _is_ours(self, value: torch.Tensor) -> bool:
        """Whether ``value`` lies in our memory. Not by its name: an op that returns its argument, against its schema, hands it out."""
        return _torch.storage_key(value) in self._owned_storages() or any(True for _ in self._behind(value))

    def _owned_storages(self) -> frozenset[int]:
        owned = (value for name, value in self.constants.items() if not self._is_input(name))
        tensors = (value.tensor if isinstance(value, Bridge) else value for value in owned)
        return frozenset(_torch.storage_key(value) for value in tensors if isinstance(value, torch.Tensor))

    def forget(self) -> None:
        """Drop what the pool owns."""
        self.steps.clear()
        self.constants.clear()
        self.values.clear()
        self.owners.clear()


def _dead_after(calls: Sequence[Call], outputs: Sequence[str]) -> list[tuple[str, ...]]:
    """For each call, results of these calls that no later one takes, and that do not leave the segment."""
    last = {call.result: position for position, call in enumerate(calls)}
    for position, call in enumerate(calls):
        slots = [leaf.name for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Slot)]
        last.update((name, position) for name in slots if name in last)
    dead = by_value({name: position for name, position in last.items() if name not in outputs})
    return [dead.get(position, ()) for position in range(len(calls))]


def is_view_call(call: Call) -> bool:
    """Whether a call makes a view, or takes one of several results, and does nothing else."""
    return call.view or call.function is operator.getitem


def _outputs_behind(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, int]:
    """How many of ``leaves``, which are returned, each input of the epilogue is behind."""
    behind: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            behind[node] = node
        elif node.op == "call_function":
            behind[node] = next(behind[argument] for argument in node.all_input_nodes if argument in behind)
    counts = dict.fromkeys((node.name for node in module.graph.find_nodes(op="placeholder")), 0)
    for leaf in leaves:
        if isinstance(leaf, fx.Node):
            counts[behind[leaf].name] += 1
    return counts


def _bridge_name(name: str) -> str:
    return f"{name}.bridge"  # no node has a dot in its name


def _inside_name(name: str) -> str:
    return f"{name}.inside"
