"""Which call of a compiled function, and which capture, is running in this thread and context."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class Call:
    """A call of a compiled function. A context that is copied during the call (an asyncio task, ``to_thread``) outlives it."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False


call: ContextVar[Call | None] = ContextVar("breakable_backend.call", default=None)
"""The last call that began in this context. It is not removed at its end: ``over`` says that it has ended, and is
quicker."""


def in_call() -> bool:
    """Whether a call of this package runs in this context, or in the one from which this context was copied.

    A call that an eager step makes then runs plainly. Otherwise it would overwrite bridges and pool memory that the
    outer call still needs.
    """
    return (begun := call.get()) is not None and not begun.over


@contextmanager
def calling() -> Iterator[None]:
    """Mark a ``with`` block as a call."""
    begun = Call()
    call.set(begun)
    try:
        yield
    finally:
        begun.over = True


@dataclass(eq=False)
class Held(Generic[T]):
    """The value of a :class:`Scoped` in one block."""

    value: T
    thread: int
    """The thread that set it."""
    token: Token[Held[T] | None] | None = None


class Scoped(Generic[T]):
    """A value that holds inside one block, for the thread of that block.

    It is stored in a context variable. A context that was copied inside the block has the variable too, and may run
    later or in another thread. There :meth:`get` returns the default.
    """

    def __init__(self, name: str, default: T) -> None:
        self.default = default
        self.held: ContextVar[Held[T] | None] = ContextVar(name, default=None)
        """For code in which each microsecond counts: if this is None, the value is the default."""

    def get(self) -> T:
        """The value in this block and thread, or the default."""
        held = self.held.get()
        if held is None or held.thread != threading.get_ident():
            return self.default
        return held.value

    def set(self, value: T) -> Held[T]:
        """Begin a block. :meth:`reset` ends it, with the result of this call."""
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
"""Device types whose autocast is on for the op that runs now. PyTorch does not tell this below a dispatch mode."""


class BreakHandler(Protocol):
    """The capture in progress. A marked function asks it to run the function as an eager step."""

    def call(self, mark: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a marked function as an eager step between two segments.

        Returns the result as the captured code after it may use it.
        """


handler: Scoped[BreakHandler | None] = Scoped("breakable_backend.handler", None)
"""The capture that this code is in; None outside of a capture, and inside an eager step."""
