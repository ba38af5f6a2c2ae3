"""The function of plain calls: a program's graph, op by op, with nothing captured.

It runs AOTAutograd's own graph, call by call, in its order and with its names. The writer of replays writes it, once
for each program. It adds what the contract requires of a call: the modes under which an op was traced, the turn of a
random draw, and the check of a marked op's result. :func:`run_plain` does the same with the program's segments. It is
the specification against which tests compare this function. It also runs if each step has to be observed (debug mode),
or has to become a step of a ``with capture(graph)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.active import BreakHandler
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import runnable
from breakable_backend.ir.ambient_modes import ambient_of
from breakable_backend.ir.effects import draws, is_opaque, producer_of
from breakable_backend.ir.last_uses import last_uses
from breakable_backend.ir.layout import TensorSpec, numbers_in
from breakable_backend.ir.program import EagerSegment, GraphSegment, Program, outputs_of, unused
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.call_sites import Mark
from breakable_backend.marks.rules import label
from breakable_backend.recordings.checks import perform, reject
from breakable_backend.recordings.generated_code import with_code
from breakable_backend.recordings.host_syncs import Finder
from breakable_backend.recordings.observer import Observers
from breakable_backend.recordings.recording import Call, EagerStep, Recording, State, Variable
from breakable_backend.recordings.specialised import SpecialisedProgram, must_fit

if TYPE_CHECKING:
    import sympy

Drawing = Callable[[], AbstractContextManager[None]]
"""The context manager around ops that draw: :meth:`breakable_backend.drivers.CaptureDriver.drawing`."""


# --- written once -------------------------------------------------------------------------------------------------------


def plain_recording(lowered: Lowered, program: Program, drawing: Drawing, finder: Finder | None = None) -> Recording:
    """The graph of ``lowered``, from which ``program`` was cut, as a recording that consists of calls only.

    Args:
        lowered: the graph that a replay runs. It uses no stream.
        program: tells which ops run eagerly, and so are checked.
        drawing: see :data:`Drawing`.
        finder: observes custom ops while the function runs.
    """
    return _Graph(lowered, program, drawing, finder).recording()


class _Graph:
    """AOTAutograd's graph as a recording that consists of calls only."""

    def __init__(self, lowered: Lowered, program: Program, drawing: Drawing, finder: Finder | None) -> None:
        self.module, self.drawing, self.finder = lowered.module, drawing, finder
        self.names = {node.name for node in self.module.graph.nodes}
        self.eager = {node.name for segment in program.eager_segments for node in segment.module.graph.nodes}
        self.sources = _symbol_sources(self.module.graph)
        self.sizes: dict[sympy.Symbol, Variable] = {}
        """The variables of the symbols that a check needs."""
        self.layouts: dict[tuple[Any, ...], Variable] = {}
        """The variables of expected layouts, by sizes and strides as text, dtype and device."""
        self.reads: list[Call] = []
        """The calls that read the symbols, before everything else."""

    def recording(self) -> Recording:
        environment: dict[fx.Node, Any] = {}
        calls: list[Call] = []
        for node in self.module.graph.nodes:
            environment[node] = Variable(node.name)
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
                calls += self._calls(node, tuple(args), kwargs)
        returned = outputs_of(self.module)
        return Recording(
            arguments=tuple(node.name for node in self.module.graph.find_nodes(op="placeholder")),
            specs={},
            steps=(EagerStep((*self.reads, *calls), ()),),
            epilogue=(),
            returned=tuple(environment[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in returned),
            constants=self._constants(),
        )

    def _constants(self) -> dict[str, Any]:
        nodes = self.module.graph.find_nodes(op="get_attr")
        values = {node.name: getattr(self.module, str(node.target)) for node in nodes}
        return {name: runnable(v) if isinstance(v, fx.GraphModule) else v for name, v in values.items()}

    def _calls(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Call]:
        """The call of a node, and after it the check of its result, if sizes vary."""
        state: State | None = ambient_of(node)
        # A custom op that is eager gets no turn: it may wait for a thread that waits for one.
        if draws(node.target) and not (is_opaque(node.target) and node.name in self.eager):
            state = _Turn(self.drawing, state)
        maker = producer_of(node)
        function: Any = node.target
        if self.finder is not None:
            function = self.finder.around(node, captured=node.name not in self.eager)
        call = Call(node.name, function, args, kwargs, label(maker), source_line(maker), ambient=state)
        fake = node.meta.get("val")
        if node.name not in self.eager or not isinstance(fake, torch.Tensor) or not must_fit(maker):
            yield call
            return
        numbers = numbers_in(fake)
        symbols = sorted(_torch.free_symbols(numbers), key=str)
        if not symbols:
            # torch 2.11 leaves a ``SymInt`` for a number that a check has fixed.
            yield replace(call, spec=TensorSpec.of(fake, {}))
            return
        yield call
        if self.sources.keys() >= set(symbols):  # otherwise its size is known only at run time
            variables = (Variable(node.name), self._layout(fake, symbols))
            yield Call(self._free(f"{node.name}_fits"), _Look(call), variables, {}, "fits")

    def _layout(self, fake: torch.Tensor, symbols: list[sympy.Symbol]) -> Variable:
        """The layout of results like ``fake`` in this call."""
        numbers = numbers_in(fake)
        key = (*map(str, numbers), fake.dim(), fake.dtype, fake.device)
        if key not in self.layouts:
            self.layouts[key] = Variable(self._free(f"layout_{len(self.layouts)}"))
            layout = _Layout(_torch.numbers_of(numbers, symbols), fake)
            sizes = tuple(map(self._size, symbols))
            self.reads.append(Call(self.layouts[key].name, layout, sizes, {}, "layout"))
        return self.layouts[key]

    def _size(self, symbol: sympy.Symbol) -> Variable:
        """The value of ``symbol`` in this call."""
        if symbol not in self.sizes:
            name, read, dimension = self.sources[symbol]
            self.sizes[symbol] = Variable(name)
            if read is not None:
                made = self.sizes[symbol] = Variable(self._free(str(symbol)))
                self.reads.append(Call(made.name, read, (Variable(name), dimension), {}, read.__name__))
        return self.sizes[symbol]

    def _free(self, name: str) -> str:
        chosen = unused(name, self.names.__contains__)
        self.names.add(chosen)
        return chosen


def _symbol_sources(graph: fx.Graph) -> dict[sympy.Symbol, tuple[str, Callable[..., int] | None, int]]:
    """The argument that has each symbol's value: a number; or a tensor, whose size or stride in a dimension it is."""
    found: dict[sympy.Symbol, tuple[str, Callable[..., int] | None, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for read, numbers in ((torch.Tensor.size, value.shape), (torch.Tensor.stride, value.stride())):
                for dimension, number in enumerate(numbers):
                    if isinstance(number, torch.SymInt) and (symbol := _torch.symbol_of(number)) is not None:
                        found.setdefault(symbol, (node.name, read, dimension))
        elif isinstance(value, torch.SymInt) and not _torch.is_ragged(value) and (symbol := _torch.symbol_of(value)):
            found[symbol] = (node.name, None, 0)
    return found


@dataclass(frozen=True)
class _Turn:
    """The turn of a call that draws, together with the modes that it needs."""

    drawing: Drawing
    state: State | None

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A context manager for both."""
        with self.drawing(), self.state.enter() if self.state is not None else nullcontext():
            yield


class _Layout:
    """The layout of results whose sizes depend on those of the arguments."""

    MAX = 64
    """How many sets of sizes are remembered."""

    def __init__(self, numbers: Callable[..., tuple[int, ...]], like: torch.Tensor) -> None:
        self.numbers, self.dimensions, self.dtype, self.device = numbers, like.dim(), like.dtype, like.device
        self.known: dict[tuple[int, ...], _Expected] = {}

    def __call__(self, *symbols: int) -> _Expected:
        """The layout in a call in which the symbols have these values."""
        found = self.known.get(symbols)
        if found is None:
            numbers = self.numbers(*symbols)
            shape, stride = numbers[: self.dimensions], numbers[self.dimensions :]
            spec = TensorSpec(shape, stride, self.dtype, self.device)
            if len(self.known) >= self.MAX:
                self.known.clear()
            found = self.known[symbols] = spec.quick_check(), spec
        return found


_Expected = tuple[Callable[[Any], bool], TensorSpec]
"""A quick test that only tensors of the spec pass, and the spec."""


@dataclass(frozen=True)
class _Look:
    """Checks that the result of a call is what its fake promised."""

    call: Call

    def __call__(self, result: Any, expected: _Expected) -> None:
        fits, spec = expected
        if not fits(result):
            reject(replace(self.call, spec=spec), result)


# --- step by step -------------------------------------------------------------------------------------------------------


def run_plain(
    program: Program,
    args: Sequence[Any],
    handler: BreakHandler | None = None,
    *,
    observer: Observers | None = None,
    drawing: Drawing = nullcontext,
) -> list[Any]:
    """Run every segment as eager does, without capture and without bridges: the specification of :func:`plain_recording`.

    Under a ``handler``, a capture by ``with capture(graph)``, eager segments become eager steps of that capture.

    Raises:
        EagerOutputError: the result of a marked op differs from its fake implementation.
    """
    specialised = SpecialisedProgram.of(program, args, observer)
    values = dict(specialised.values)
    for position, (segment, dead) in enumerate(zip(program.segments, last_uses(program), strict=True)):
        if isinstance(segment, GraphSegment):
            with drawing() if segment.draws else nullcontext():
                results = specialised.captured(position, segment)(*(values[name] for name in segment.inputs))
            values.update(zip(segment.outputs, results, strict=True))
        else:
            calls = specialised.calls(segment, {name: Variable(name) for name in segment.inputs}, None)
            if handler is None:
                _run_calls(calls, values, segment.outputs)
            else:
                first, inputs = segment.reasons[0], [values[name] for name in segment.inputs]
                body = _SegmentBody(segment, tuple(calls))
                results = handler.call(Mark(body, first.op, first.source), tuple(inputs), {})
                values.update(zip(segment.outputs, results, strict=True))
        for name in dead:
            del values[name]
    return list(with_code(program.epilogue.module)(*(values[name] for name in program.epilogue.inputs)))


@dataclass(frozen=True)
class _SegmentBody:
    """An eager segment as a function of its inputs."""

    segment: EagerSegment
    calls: tuple[Call, ...]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        values = dict(zip(self.segment.inputs, inputs, strict=True))
        _run_calls(self.calls, values, self.segment.outputs)
        return tuple(values[name] for name in self.segment.outputs)


def _run_calls(calls: Sequence[Call], values: dict[str, Any], outputs: Sequence[str]) -> None:
    local = dict(values)
    for call in calls:
        local[call.result] = perform(call, local)
    values.update((name, local[name]) for name in outputs)
