"""What a recording is.

A recording is a list of steps over *slots*. A slot is a name: of an argument, of what an eager call returned in this
call, or of a constant, which is a tensor that keeps its address (memory of the pool, a bridge) or a plain number.
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
from breakable_backend.drivers import CapturedGraph, Feed
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.program import EagerSegment, GraphSegment, Op, Reason
from breakable_backend.recordings.buffers import Bridge


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

    @property
    def slots(self) -> list[str]:
        """The slots that it takes, by name."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf.name for leaf in leaves if isinstance(leaf, Slot)]

    @property
    def takes_part(self) -> bool:
        """Whether it makes a view, or takes one of several results, and does nothing else."""
        return self.view or self.function is operator.getitem


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
    """What comes before the steps: see :func:`breakable_backend.recordings.outputs.settled`."""
    saved: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    """What holds the memory of values that are saved for a backward: see :attr:`breakable_backend.recordings.recorder.Plan.saved_from`."""

    @property
    def graphs(self) -> tuple[CapturedGraph, ...]:
        return tuple(step.graph for step in self.steps if isinstance(step, GraphStep))

    def bridge_of(self, name: str) -> Bridge | None:
        """The bridge of an input; None if it has none."""
        bridge = self.constants.get(bridge_name(name))
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


NOTHING = Recording((), {}, (), (), (), {})
"""A recording of which nothing is left."""


def fill(tree: Any, slots: Mapping[str, Any]) -> Any:
    """``tree`` with the value of each slot in its place."""
    return pytree.tree_map_only(Slot, lambda slot: slots[slot.name], tree)


def bridge_name(name: str) -> str:
    """The slot of the bridge of ``name``."""
    return f"{name}.bridge"  # no node has a dot in its name
