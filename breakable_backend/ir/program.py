"""The program: a lowered graph cut into segments, with the reason and the user's line of each break.

Nothing has run yet when a program is made.

::

    program  := inputs sizes segment* epilogue
    segment  := captured | eager                    in program order; kinds alternate
    captured := module inputs outputs reads writes  one CUDA graph once recorded
    eager    := module inputs outputs reads writes reasons
    epilogue := module inputs                       what the caller gets, as views of storages

Segments exchange *storages*, not views. What one segment passes to another is a *root*, the value that made its
storage, and each segment makes the views that it needs again. So each storage has one bridge, and aliases stay aliases.
Every write makes a new version of a storage, and a segment names the versions that it reads.

A program holds no tensors except constants of the traced code.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.ir.effects import calls_in, draws

InputKind = Literal["static", "tensor", "number", "ragged", "scalar", "constant"]
"""``ragged`` stands for the lengths of a jagged nested tensor. Each tensor has a new one, so it is not a number and in
no key."""

TOO_FEW = "min_kernels"
CAUSES = (TOO_FEW, "absolute_view", "capture_failed", "calls_such_an_op", "hands_back")
"""Why nodes run eagerly to which no rule applies. They could be captured, and are fewer than the option says; or
``as_strided`` reaches into memory that a bridge would move; or a capture failed; or a custom op calls an op that no
capture can hold, or returns its argument."""


@dataclass(frozen=True)
class Reason:
    """Why a node runs eagerly."""

    rule: str
    """The name of the rule in ``rules.RULES``, or one of :data:`CAUSES`."""
    text: str
    op: str
    source: str = ""
    """The user's line, as ``file.py:12 in forward: code``."""
    whole_program: bool = False
    """Whether nothing else in the program can be captured because of this node."""

    def __str__(self) -> str:
        return f"{self.op}: {self.text}" if self.op else self.text


@dataclass(frozen=True)
class Op:
    """One op, for display."""

    name: str
    """The name of the value that it makes."""
    op: str
    result: str
    """The type of that value, as ``f32[4, 8]``."""
    module: str
    """Path of the module that called it, as ``layers.3.attention``; empty if unknown."""
    source: str
    """The user's line, as ``file.py:12 in forward: code``."""


@dataclass(frozen=True)
class Input:
    """One argument of the lowered graph, or a constant that the traced code closed over.

    ``static``: a tensor whose address does not move by contract. ``tensor``: any other tensor on the capture device.
    ``number``: an int. ``scalar``: a 0-d tensor on the host, whose value captured kernels freeze.
    """

    name: str
    kind: InputKind
    index: int
    """Position among the arguments; -1 for a constant."""
    value: Any
    """The fake tensor or symbolic number; for a constant, the tensor itself."""


@dataclass(frozen=True)
class Access:
    """A storage, by the name of its root, at a version."""

    storage: str
    version: int

    def __str__(self) -> str:
        return f"{self.storage}@{self.version}"


@dataclass(frozen=True)
class _Nodes:
    """Some nodes of a program. ``module`` takes ``inputs`` by name and returns a tuple of ``outputs``."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]

    @property
    def calls(self) -> list[fx.Node]:
        """The nodes that call functions."""
        return calls_in(self.module)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return any(draws(node.target) for node in self.calls)


@dataclass(frozen=True)
class GraphSegment(_Nodes):
    """Nodes that are captured together."""

    num_kernels: int
    """The number of ATen ops that launch. One may launch several kernels."""
    device: torch.device
    """The device of its capture: that of the program, or another GPU."""

    def as_eager(self, reason: Reason) -> EagerSegment:
        """The same nodes, which run one by one."""
        return EagerSegment(self.module, self.inputs, self.outputs, self.reads, self.writes, (reason,))


@dataclass(frozen=True)
class EagerSegment(_Nodes):
    """Nodes that run one by one in every call."""

    reasons: tuple[Reason, ...]
    """The causes of the break; after them those of ops that are only too few to be captured beside it."""


Segment = GraphSegment | EagerSegment


@dataclass(frozen=True)
class Epilogue:
    """How the returned values are made from the roots in ``inputs``, by views only."""

    module: fx.GraphModule
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The program; see the docstring of the module. It is checked when built, and ``print`` shows it."""

    inputs: tuple[Input, ...]
    sizes: Mapping[str, Any]
    """Symbolic numbers that segments take, by name: functions of the number inputs, and Python floats."""
    segments: tuple[Segment, ...]
    epilogue: Epilogue
    device: torch.device
    floats: Mapping[str, str] = field(default_factory=dict)
    """Those of ``sizes`` that are Python floats, each with the host scalar that it is read from."""
    resumed: frozenset[int] = frozenset()
    """Positions at which a recording continues that had this program cut anew. The segment before has run, and may be
    eager too."""

    def __post_init__(self) -> None:
        verify(self)

    def __str__(self) -> str:
        return format_program(self)

    @property
    def graph_segments(self) -> tuple[GraphSegment, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, GraphSegment))

    @property
    def eager_segments(self) -> tuple[EagerSegment, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, EagerSegment))

    @property
    def reasons(self) -> tuple[Reason, ...]:
        return tuple(reason for segment in self.eager_segments for reason in segment.reasons)

    @functools.cached_property
    def passed_on(self) -> frozenset[str]:
        """Ints among the inputs that only eager steps take, as they come. No graph and no shape depends on them."""
        ints = {v.name: v.value for v in self.inputs if v.kind == "number" and v.index >= 0}
        if not ints:
            return frozenset()
        modules = [*(segment.module for segment in self.segments), self.epilogue.module]
        made = (node.meta.get("val") for module in modules for node in module.graph.nodes if node.op != "placeholder")
        others = (value.value for value in self.inputs if value.name not in ints)
        used = frozenset[Any]().union(*map(_torch.free_symbols, (*others, *self.sizes.values(), *made)))
        parts: list[GraphSegment | Epilogue] = [*self.graph_segments, self.epilogue]
        taken = {name for part in parts for name in part.inputs}
        return frozenset(
            name for name, value in ints.items() if name not in taken and used.isdisjoint(_torch.free_symbols(value))
        )

    def written_by_graphs(self) -> frozenset[str]:
        """Storages that captured segments write."""
        return frozenset(access.storage for segment in self.graph_segments for access in segment.writes)

    def read_by_graphs(self) -> frozenset[str]:
        """Storages that captured segments read or write."""
        return frozenset(access.storage for segment in self.graph_segments for access in segment.reads)


def verify(program: Program) -> None:
    """Check what every pass may rely on. A failure is a fault of this package, so these are assertions."""
    known = {value.name for value in program.inputs} | set(program.sizes)
    versions = dict.fromkeys(known, 0)
    previous: tuple[type[Segment], torch.device | None] | None = None
    for position, segment in enumerate(program.segments):
        where = f"segment {position}"
        kept_apart = isinstance(segment, EagerSegment) and position in program.resumed
        kind = type(segment), segment.device if isinstance(segment, GraphSegment) else None
        assert kept_apart or kind != previous, f"{where}: two {type(segment).__name__} touch"
        previous = kind
        assert set(segment.inputs) <= known, f"{where}: takes {set(segment.inputs) - known}, made by nothing before it"
        assert not known & set(segment.outputs), f"{where}: makes {known & set(segment.outputs)} a second time"
        placeholders = tuple(node.name for node in segment.module.graph.find_nodes(op="placeholder"))
        assert placeholders == segment.inputs, f"{where}: module takes {placeholders}, segment {segment.inputs}"
        returned = outputs_of(segment.module)
        assert len(returned) == len(segment.outputs), f"{where}: module returns {returned}, segment {segment.outputs}"
        for access in segment.reads:
            assert versions.get(access.storage) == access.version, f"{where}: reads a stale {access}"
        for name in segment.outputs:
            versions.setdefault(name, 0)
        for access in segment.writes:
            assert versions.get(access.storage, -2) + 1 == access.version, f"{where}: {access} is not the next version"
            versions[access.storage] = access.version
        if isinstance(segment, GraphSegment):
            assert segment.num_kernels > 0, f"{where}: a graph without kernels"
        else:
            assert segment.reasons, f"{where}: eager without a reason"
        known |= set(segment.outputs)
    assert set(program.epilogue.inputs) <= known, f"returns {set(program.epilogue.inputs) - known}, made by nothing"


def causes_first(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """The reasons of a break in another order: those of ops that would be captured if they were more come last."""
    return tuple(sorted(reasons, key=lambda reason: reason.rule == TOO_FEW))


def unused(name: str, taken: Callable[[str], bool]) -> str:
    """``name``, or ``name`` with the first number appended that makes it free."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(candidate for candidate in candidates if not taken(candidate))


def described(value: Any) -> str:
    """:func:`describe` for one value or several."""
    if isinstance(value, list | tuple):
        return ", ".join(map(described, value))
    return "" if value is None else describe(value)


def outputs_of(module: fx.GraphModule) -> tuple[Any, ...]:
    """What a module's graph returns: nodes, and constants such as None."""
    returned: Any = module.graph.output_node().args[0]
    return tuple(returned)


def describe(value: Any) -> str:
    """The type of a value as the program prints it: ``f32[4, s0]``, ``int s0``, ``cpu f64[]``."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        device = "" if value.device.type == "cuda" else f" {value.device.type}"
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]{device}"
    return str(value)


def format_program(program: Program) -> str:
    """The printed form, which tests, docs and bug reports show. It contains no addresses, and no paths but the user's."""
    segments = (line for position in range(len(program.segments)) for line in _segment(program, position))
    return "\n".join([*_head(program), *segments, *_tail(program)])


def lines_of_segments(program: Program) -> list[tuple[int, int]]:
    """For each segment its lines in the printed form, from 0: the first, and the one after the last."""
    end, found = _count(_head(program)), []
    for position in range(len(program.segments)):
        start, end = end, end + _count(_segment(program, position))
        found.append((start, end))
    return found


def _count(lines: Iterable[str]) -> int:
    return sum(line.count("\n") + 1 for line in lines)


def _head(program: Program) -> Iterator[str]:
    yield f"program on {program.device.type}: {len(program.graph_segments)} captured, {len(program.eager_segments)} eager"
    for value in program.inputs:
        yield f"  input {value.name}: {value.kind} {describe(value.value)}"
    for name, size in program.sizes.items():
        held = program.floats.get(name)
        yield f"  float {name} = {held}" if held else f"  size {name} = {size}"


def _segment(program: Program, position: int) -> Iterator[str]:
    segment = program.segments[position]
    elsewhere = ""
    if isinstance(segment, GraphSegment) and segment.device != program.device:
        elsewhere = f" on {segment.device}"
    yield f"  segment {position}: {'captured' if isinstance(segment, GraphSegment) else 'eager'}{elsewhere}"
    if isinstance(segment, EagerSegment):
        for reason in segment.reasons:
            yield f"    because {reason}"
    for label, accesses in (("reads", segment.reads), ("writes", segment.writes)):
        if accesses:
            yield f"    {label} {', '.join(map(str, accesses))}"
    for node in segment.module.graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            yield f"    {node.name} = {_call(node)}"
    if segment.outputs:
        yield f"    makes {', '.join(segment.outputs)}"


def _tail(program: Program) -> Iterator[str]:
    for node in program.epilogue.module.graph.nodes:
        if node.op not in ("placeholder", "output", "get_attr"):
            yield f"  {node.name} = {_call(node)}"
        if node.op == "output":
            yield f"  returns {', '.join(map(str, outputs_of(program.epilogue.module)))}"


def _call(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    # Calls of marked functions are shown without the number of the call.
    args = node.args[1:] if getattr(node.target, "namespace", "") == "breakable_cg" else node.args
    arguments = [str(argument) for argument in args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    name = str(node.target) if hasattr(node.target, "namespace") else target
    return f"{name}({', '.join(arguments)})"
