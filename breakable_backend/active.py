"""What is going on in this thread and context: a call of a compiled function, a capture that a break would interrupt."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

in_call: ContextVar[bool] = ContextVar("breakable_backend.in_call", default=False)
"""True while a compiled function of this package runs. A call made then (by an eager step) runs plainly: it would write
the bridges, and take the pool, that the outer call still needs."""

autocast: ContextVar[tuple[str, ...]] = ContextVar("breakable_backend.autocast", default=())
"""Device types with an autocast that was entered for the op that runs now. Below a dispatch mode torch does not tell."""


class BreakHandler(Protocol):
    """The capture that is active: what a marked function asks to run it."""

    def call(self, mark: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a marked function as an eager step between two segments.

        Returns what the captured code after it may use.
        """


handler: ContextVar[BreakHandler | None] = ContextVar("breakable_backend.handler", default=None)
"""The capture of this context; None outside one, and inside a break."""
