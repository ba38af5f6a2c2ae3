"""What tools see of the engine: it calls an :class:`Observer`, and knows no tool.

A tool registers a function that says for which graphs it has an observer (:func:`register`). The engine asks for them when
it compiles or captures a graph (:func:`observers_of`). What nobody asked for is in no generated code.
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
from breakable_backend.recordings.healing import NodeByNode
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Function, Replay, Tally, Variant, emit

Issue = Callable[[Any, tuple[Any, ...], dict[str, Any], str, str], Any]
"""Issues an op: the op, its arguments, its label, and the user's line."""


@dataclass(frozen=True)
class Subject:
    """A graph that is observed."""

    name: str
    options: Options
    log: logging.Logger
    """Of the module whose concern the graph is."""
    compiled: bool = True
    """Whether the graph comes from ``torch.compile``, and not from a ``with capture(...)`` block."""


@dataclass(frozen=True)
class Saved:
    """A value that a backward will read."""

    name: str
    tensor: torch.Tensor
    """It holds no memory: whoever is shown it may read it until the backward has run."""
    maker: fx.Node
    result: torch.Tensor | None = None
    """The caller's copy of the same value, where it is a result: to eager both are one memory."""


class Observer:
    """Sees one graph, from its compilation to its last call. A tool overrides what it needs; here nothing happens."""

    reads_values = False
    """Whether its replays read the values of all steps. A recording then holds them, and each replay may take its time."""
    sees_plain_steps = False
    """Whether it wants to see the segments of plain calls, which are one function otherwise."""

    wanted: Callable[[], bool] = staticmethod(bool)
    """Asked in each call: whether it wants to see more of this one. By default it never does."""

    # the graph

    def traced(self, module: fx.GraphModule, stage: str) -> None:
        """``module`` is what Dynamo (``"dynamo"``) or AOTAutograd (``"aten"``) made of it."""

    def cut(self, program: Program) -> None:
        """It was cut into segments, or cut anew."""

    def plain(self, why: str, level: int) -> None:
        """A call is plain; ``level`` is that of a log line."""

    def noted(self, what: str, level: int) -> None:
        """Something was given up, put off or released."""

    def span(self, what: str) -> AbstractContextManager[Any] | None:
        """Held around ``what``: a plain call, a recording, a capture."""
        return None

    # its recordings

    def recording(self, device: torch.device) -> None:
        """A recording begins. What is captured, called and emitted from here on belongs to it."""

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any] | None:
        """What is captured in place of the body of segment ``position``; None: that body."""
        return None

    def issuing(self, position: int) -> Issue | None:
        """Segment ``position`` of a ``with`` block begins. What its ops are issued through; None: they run as they are."""
        return None

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        """What an eager step calls in place of ``function``. Nobody is asked about a function that only makes a view."""
        return function

    def recorded(self, number: int, why: str, recording: Recording, replay: Replay, seconds: float) -> None:
        """A recording was made."""

    def saved(self, values: Sequence[Saved]) -> Callable[[], None] | None:
        """A forward has saved ``values`` for its backward. What is called as that begins; None: nothing."""
        return None

    # their replays

    def instead(self, recording: Recording, program: Program | None) -> Recording:
        """What is emitted in place of ``recording``, which was made of ``program``; None: of a ``with`` block."""
        return recording

    def around(self, function: Function) -> Function:
        """What a call runs in place of the generated ``function``."""
        return function

    def variant(self, recording: Recording, tally: Tally) -> Function | None:
        """Another function for the same replay, which runs while it is :attr:`wanted`. The generated function asks."""
        return None

    def file(self, source: str, name: str) -> str | None:
        """The path of the file that generated ``source`` is compiled as; None: it has none."""
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
        """What the first observer says that says something."""
        answers = (getattr(observer, event)(*args) for observer in self._all)
        return next((answer for answer in answers if answer is not None), None)

    def _chained(self, event: str, value: Any, *args: Any) -> Any:
        """``value`` as all observers want it."""
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
        other = self._first("variant", recording, tally)
        variant = Variant(self.wanted, other) if other is not None else None
        made = emit(recording, name=name, tally=tally, variant=variant, file=self.file)
        return replace(made, function=self._chained("around", made.function))


_factories: list[Callable[[Subject], Observer | None]] = []


def register(factory: Callable[[Subject], Observer | None]) -> None:
    """Have ``factory`` asked for an observer of each graph that is compiled or captured from here on."""
    _factories.append(factory)


def observers_of(subject: Subject) -> Observers:
    """Who observes ``subject``."""
    return Observers([observer for make in _factories if (observer := make(subject)) is not None])
