"""What a recording is: a list of steps, which are graph launches and eager calls, over *variables*.

A variable is a name: of an argument, of an eager call's result in this call, or of a constant. A constant is a plain
number, or a tensor with a fixed address (pool memory, a bridge).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.drivers import CapturedGraph, Feed, Outlet
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.program import EagerSegment, GraphSegment, Op, Reason
from breakable_backend.ir.running_ops import has_memory
from breakable_backend.recordings.copies import Bridge, inside


@dataclass(frozen=True)
class Variable:
    """What a step reads or writes, by name."""

    name: str


@dataclass(frozen=True)
class Copy:
    """A copy between a bridge (a constant) and the value outside."""

    bridge: Variable
    value: Variable
    device: torch.device | None = None
    """The value's device, the same in each call; None if it is not known."""
    feed: Feed | None = None
    """Makes the copy in each launch of the graph; None if it is made before the launch."""


@dataclass(frozen=True)
class Out:
    """A result that a graph copies by itself to new memory, which each call allocates for the caller."""

    value: Variable
    like: torch.Tensor
    """A tensor of the result's layout, without memory."""
    outlet: Outlet


class State(Protocol):
    """A state that holds during a call."""

    def enter(self) -> AbstractContextManager[None]:
        """A context manager for it."""


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
    """What the result has to look like; None if it is not a tensor, or its size is known only at run time."""
    ambient: State | None = None
    view: bool = False
    """Whether it only aliases its arguments."""

    @property
    def variables(self) -> list[str]:
        """The variables that it takes, by name."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf.name for leaf in leaves if isinstance(leaf, Variable)]

    @property
    def takes_part(self) -> bool:
        """Whether it only makes a view, or takes one of several results."""
        return self.view or self.function is operator.getitem


@dataclass(frozen=True)
class GraphStep:
    """Load bridges, launch one captured graph, and copy written inputs back to the caller's tensors."""

    graph: CapturedGraph
    loads: tuple[Copy, ...] = ()
    stores: tuple[Copy, ...] = ()
    outs: tuple[Out, ...] = ()
    segment: GraphSegment | None = None
    """What was captured, for a compiled function. For a ``with`` block, the ops that it ran."""
    ops: tuple[Op, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it holds no work: a ``with`` block has such a segment where nothing runs before or after a break."""
        return self.segment is None and not self.ops and self.graph.num_kernels == 0


@dataclass(frozen=True)
class EagerStep:
    """Calls, one by one."""

    calls: tuple[Call, ...]
    reasons: tuple[Reason, ...]
    segment: EagerSegment | None = None


Step = GraphStep | EagerStep


@dataclass(frozen=True)
class Held:
    """Bytes that are needed at the same time, at most."""

    bridges: int = 0
    values: int = 0
    """Bytes of values that captured segments pass to other steps or to the caller."""

    @classmethod
    def by(cls, constants: Iterable[Any], others: Collection[int] = ()) -> Held:
        """The bytes that tensors and bridges hold. Storages with keys in ``others`` do not count."""
        sizes: dict[int, int] = {}
        bridges: set[int] = set()
        for value in constants:
            tensor = inside(value)
            if has_memory(tensor):
                key = _torch.storage_key(tensor)
                sizes[key] = 0 if key in others else tensor.untyped_storage().nbytes()
                if isinstance(value, Bridge):
                    bridges.add(key)
        bridged = sum(sizes[key] for key in bridges)
        return cls(bridged, sum(sizes.values()) - bridged)

    def or_more(self, other: Held) -> Held:
        """The maximum of both."""
        return Held(max(self.bridges, other.bridges), max(self.values, other.values))

    def __add__(self, other: Held) -> Held:
        return Held(self.bridges + other.bridges, self.values + other.values)


@dataclass(frozen=True)
class Recording:
    """A recorded program for one key. Nothing is left to decide."""

    arguments: tuple[str, ...]
    """The variables of the arguments, in order."""
    specs: Mapping[str, TensorSpec]
    """What arguments that captured segments read have to look like."""
    steps: tuple[Step, ...]
    epilogue: tuple[Call, ...]
    returned: tuple[Any, ...]
    constants: Mapping[str, Any] = field(repr=False)
    addresses: Mapping[str, int] = field(default_factory=dict, repr=False)
    """The addresses that captured segments expect of static inputs, bridges and other values, by variable."""
    most: Held | None = None
    """Memory that is needed at the same time, at most; None if everything is held as long as the recording lives."""
    prologue: tuple[Call, ...] = ()
    """Calls before the steps; see :func:`breakable_backend.recordings.epilogue.settled`."""
    saved: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    """Values that are saved for a backward, in memory of the recording; see
    :attr:`breakable_backend.recordings.specialised.Plan.saved_from`."""
    kept: tuple[Any, ...] = field(default=(), repr=False)
    """The owners of the memory of :attr:`saved`, and of static results."""

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        return tuple(step.graph for step in self.steps if isinstance(step, GraphStep))

    @property
    def num_segments(self) -> int:
        """Captured segments that hold work."""
        return sum(isinstance(step, GraphStep) and not step.is_empty for step in self.steps)

    def bridge_of(self, name: str) -> Bridge | None:
        """The bridge of an input; None if it has none."""
        bridge = self.constants.get(bridge_name(name))
        return bridge if isinstance(bridge, Bridge) else None

    @property
    def num_copies(self) -> int:
        """Copies between bridges and memory outside in one call, at most."""
        return sum(len(step.loads) + len(step.stores) for step in self.steps if isinstance(step, GraphStep))

    @property
    def held(self) -> Held:
        """Memory that it needs at the same time, at most: from the pool, and what it holds itself."""
        return self.most if self.most is not None else Held.by(self.constants.values())


NOTHING = Recording((), {}, (), (), (), {})
"""An empty recording."""


def fill(tree: Any, values: Mapping[str, Any]) -> Any:
    """``tree`` with the value of each variable in its place."""
    return pytree.tree_map_only(Variable, lambda variable: values[variable.name], tree)


def bridge_name(name: str) -> str:
    """The variable of the bridge of ``name``."""
    return f"{name}.bridge"  # the name of a node has no dot
