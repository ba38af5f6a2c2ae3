"""What is going on in this thread and context: a call of a compiled function, a capture that a break would interrupt."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Call:
    """A call of a compiled function. A context copied in it (a task of asyncio, ``to_thread``) outlives it."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


call: ContextVar[Call | None] = ContextVar("breakable_backend.call", default=None)
"""The last call that began in this context. Nobody takes it out: that it is over is enough, and quicker."""


def in_call() -> bool:
    """Whether a compiled function of this package runs, in this context or in the one that it was copied from.

    A call made then (by an eager step) runs plainly: it would write the bridges, and take the pool, that the outer call
    still needs.
    """
    return (begun := call.get()) is not None and not begun.over


@contextmanager
def calling() -> Iterator[None]:
    """Be a call, for a ``with`` statement."""
    begun = Call()
    call.set(begun)
    try:
        yield
    finally:
        begun.over = True


@dataclass(eq=False)
class Held(Generic[T]):
    """What a :class:`Scoped` holds."""

    value: T
    thread: int
    """Which thread set it."""
    token: Token[Held[T] | None] | None = None


class Scoped(Generic[T]):
    """A value for code that runs inside of a block, in the thread of that block.

    It lies in a context variable. A context that was copied inside of the block has it too, and may run later, or in
    another thread: there it is the default.
    """

    def __init__(self, name: str, default: T) -> None:
        self.default = default
        self.held: ContextVar[Held[T] | None] = ContextVar(name, default=None)
        """For code in which each microsecond counts: if this is None, the value is the default."""

    def get(self) -> T:
        """The value, here and now."""
        held = self.held.get()
        if held is None or held.thread != threading.get_ident():
            return self.default
        return held.value

    def set(self, value: T) -> Held[T]:
        """Begin a block; the result ends it: :meth:`reset`."""
        held = Held(value, threading.get_ident())
        held.token = self.held.set(held)
        return held

    def reset(self, held: Held[T]) -> None:
        """End a block."""
        held.value = self.default  # in copied contexts too
        token, held.token = held.token, None
        assert token is not None, "ended twice"
        self.held.reset(token)


autocast: Scoped[tuple[str, ...]] = Scoped("breakable_backend.autocast", ())
"""Device types with an autocast that was entered for the op that runs now. Below a dispatch mode torch does not tell."""


class BreakHandler(Protocol):
    """The capture that is active: what a marked function asks to run it."""

    def call(self, mark: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a marked function as an eager step between two segments.

        Returns what the captured code after it may use.
        """


handler: Scoped[BreakHandler | None] = Scoped("breakable_backend.handler", None)
"""The capture that this code is in; None outside one, and inside a break."""
