"""The graphs that were compiled in this process, by weak references; and which of them belong to a compiled function."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from breakable_backend import _torch, locks
from breakable_backend.callers import Filed, found_by
from breakable_backend.calling.executor import Executor


@dataclass(frozen=True)
class EagerGraph:
    """A graph that runs eagerly as a whole."""

    name: str
    why: str
    source: str
    """The user's line that is to blame, or else the last one in it."""


class AsTraced(Filed, Protocol):
    """A function that runs a graph as Dynamo traced it."""

    @property
    def uncaptured(self) -> EagerGraph | None:
        """Why it is not captured; None once something of it is captured."""


T = TypeVar("T", bound=Filed)


class Registry(Generic[T]):
    """Graphs of one kind, each with the number under which it was compiled."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[T, int] = weakref.WeakKeyDictionary()
        self._lock = locks.lock()

    def add(self, graph: T, number: int) -> None:
        with self._lock:
            self._numbers[graph] = number

    def behind(self, compiled: Any = None) -> list[T]:
        """The graphs that can be called and that calls of ``compiled`` led to, oldest first; for None all graphs."""
        with self._lock:
            numbered = [(number, graph) for graph, number in self._numbers.items() if not graph.callers.gone]
        found = [graph for _, graph in sorted(numbered, key=lambda pair: pair[0])]
        return found if compiled is None else found_by(_torch.subjects_of(compiled), found)


executors: Registry[Executor] = Registry()
as_traced: Registry[AsTraced] = Registry()


def executors_of(compiled: Any = None) -> list[Executor]:
    """The executors of a compiled function or module, one for each graph that its calls led to, oldest first; for None all.

    These are the graphs that were compiled while it ran, or for compiled functions in it; and graphs of code that it
    shares with others, since Dynamo compiles for all instances of a class at once.
    """
    return executors.behind(compiled)


def eager_graphs_of(compiled: Any) -> list[EagerGraph]:
    """The graphs of ``compiled`` that run as Dynamo traced them, oldest first; for None all."""
    found = (function.uncaptured for function in as_traced.behind(compiled))
    return [graph for graph in found if graph is not None]
