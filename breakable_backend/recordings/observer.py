"""What the engine tells tools: it calls an :class:`Observer`, and imports no tool.

A tool registers a function that returns an observer for the graphs that it observes (:func:`register`). The engine asks
these functions when it compiles or captures a graph (:func:`observers_of`). Generated code contains only what an
observer has asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from breakable_backend.ir.program import Program
from breakable_backend.options import Options
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.repair import NodeByNode
from breakable_backend.recordings.replay import Function, Replay, Tally, Variant, emit

Issue = Callable[[Any, tuple[Any, ...], dict[str, Any], str, str], Any]
"""Issues an op: the op, its arguments, its label, and the user's line."""


@dataclass(frozen=True)
class Subject:
    """A graph that is observed."""

    name: str
    options: Options
    log: logging.Logger
    """The log of the module that handles the graph."""
    compiled: bool = True
    """Whether the graph comes from ``torch.compile``, and not from ``with capture(...)``."""


@dataclass(frozen=True)
class Saved:
    """A value that a backward will read."""

    name: str
    tensor: torch.Tensor
    """It owns no memory. An observer may read it until the backward has run."""
    maker: fx.Node
    result: torch.Tensor | None = None
    """The caller's copy of the same value, if it is a result. In eager both are the same memory."""


class Observer:
    """Observes one graph, from its compilation to its last call. A tool overrides what it needs; these do nothing."""

    reads_values = False
    """Whether its replays read the values of all steps. Then a recording holds these values, and each replay may be
    slow."""
    sees_plain_steps = False
    """Whether it observes the segments of plain calls, which otherwise run as one function."""

    wanted: Callable[[], bool] = staticmethod(bool)
    """Called in each call: whether the observer wants its variant of this call. By default it never does."""

    # the graph

    def traced(self, module: fx.GraphModule, stage: str) -> None:
        """``module`` is the graph as Dynamo (``"dynamo"``) or AOTAutograd (``"aten"``) made it."""

    def cut(self, program: Program) -> None:
        """The graph was cut into segments, for the first time or anew."""

    def plain(self, why: str, level: int) -> None:
        """A call is plain; ``level`` is that of a log line."""

    def noted(self, what: str, level: int) -> None:
        """Something was given up, put off or released."""

    def span(self, what: str) -> AbstractContextManager[Any] | None:
        """A context manager around ``what``: a plain call, a recording, a capture."""
        return None

    # its recordings

    def recording(self, device: torch.device) -> None:
        """A recording begins. What is captured, called and emitted from now on belongs to it."""

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any] | None:
        """The function to capture in place of the body of segment ``position``; None for the body."""
        return None

    def issuing(self, position: int) -> Issue | None:
        """Segment ``position`` of a ``with`` block begins. The function that issues its ops; None if they run as usual."""
        return None

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        """The function that an eager step calls in place of ``function``. Not asked for functions that only make a view."""
        return function

    def recorded(self, number: int, why: str, recording: Recording, replay: Replay, seconds: float) -> None:
        """A recording was made."""

    def saved(self, values: Sequence[Saved]) -> Callable[[], None] | None:
        """A forward has saved ``values`` for its backward. Returns a function to call when that begins, or None."""
        return None

    # their replays

    def instead(self, recording: Recording, program: Program | None) -> Recording:
        """The recording to emit in place of ``recording``, which was made of ``program`` (None: of a ``with`` block)."""
        return recording

    def around(self, function: Function) -> Function:
        """The function that a call runs in place of the generated ``function``."""
        return function

    def variant(self, recording: Recording, tally: Tally) -> Function | None:
        """Another function for the same replay, which runs while it is :attr:`wanted`, as generated code checks."""
        return None

    def file(self, source: str, name: str) -> str | None:
        """The path of a file with the generated ``source``, under which it is compiled; None for no file."""
        return None


_NOTHING = nullcontext()


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._all = tuple(observers)
        self.reads_values = any(observer.reads_values for observer in observers)
        self.sees_plain_steps = any(observer.sees_plain_steps for observer in observers)
        asked = [observer.wanted for observer in observers if observer.wanted is not Observer.wanted]
        self.wanted = asked[0] if len(asked) == 1 else lambda: any(ask() for ask in asked)

    def _first(self, event: str, *args: Any) -> Any:
        """The first result that is not None."""
        answers = (getattr(observer, event)(*args) for observer in self._all)
        return next((answer for answer in answers if answer is not None), None)

    def _chained(self, event: str, value: Any, *args: Any) -> Any:
        """``value``, changed by each observer in turn."""
        return functools.reduce(lambda made, observer: getattr(observer, event)(made, *args), self._all, value)

    def _tell(self, event: str, *args: Any) -> None:
        for observer in self._all:
            getattr(observer, event)(*args)

    def traced(self, module: fx.GraphModule, stage: str) -> None:
        self._tell("traced", module, stage)

    def cut(self, program: Program) -> None:
        self._tell("cut", program)

    def plain(self, why: str, level: int = logging.INFO) -> None:
        self._tell("plain", why, level)

    def noted(self, what: str, level: int = logging.INFO) -> None:
        self._tell("noted", what, level)

    def span(self, what: str) -> AbstractContextManager[Any]:
        spans = [span for observer in self._all if (span := observer.span(what)) is not None]
        if not spans:
            return _NOTHING
        with ExitStack() as stack:
            for span in spans:
                stack.enter_context(span)
            return stack.pop_all()

    def recording(self, device: torch.device) -> None:
        self._tell("recording", device)

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any]:
        return self._first("captured", position, body) or body

    def issuing(self, position: int) -> Issue | None:
        return self._first("issuing", position)  # type: ignore[no-any-return]

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        return self._chained("eager", function, label, source)  # type: ignore[no-any-return]

    def recorded(self, number: int, why: str, recording: Recording, replay: Replay, seconds: float) -> None:
        self._tell("recorded", number, why, recording, replay, seconds)

    def saved(self, values: Sequence[Saved]) -> Callable[[], None] | None:
        return self._first("saved", values)  # type: ignore[no-any-return]

    def file(self, source: str, name: str) -> str | None:
        return self._first("file", source, name)  # type: ignore[no-any-return]

    def replay(self, recording: Recording, name: str, program: Program | None = None) -> Replay:
        """The replay of ``recording``, as the observers want it."""
        tally = Tally()
        recording = self._chained("instead", recording, program)
        others = ((observer.wanted, observer.variant(recording, tally)) for observer in self._all)
        variants = [Variant(wanted, function) for wanted, function in others if function is not None]
        made = emit(recording, name=name, tally=tally, variants=variants, file=self.file)
        return replace(made, function=self._chained("around", made.function))


_factories: list[Callable[[Subject], Observer | None]] = []


def register(factory: Callable[[Subject], Observer | None]) -> None:
    """Call ``factory`` for an observer of each graph that is compiled or captured from now on."""
    _factories.append(factory)


def observers_of(subject: Subject) -> Observers:
    """The observers of ``subject``."""
    return Observers([observer for make in _factories if (observer := make(subject)) is not None])
