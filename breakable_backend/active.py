"""What is going on in this thread and context: whether a compiled function is running right now."""

from __future__ import annotations

from contextvars import ContextVar

in_call: ContextVar[bool] = ContextVar("breakable_backend.in_call", default=False)
"""True while a compiled function of this package runs. A call made then (by an eager step) runs plainly: it would write
the bridges, and take the pool, that the outer call still needs."""

autocast: ContextVar[tuple[str, ...]] = ContextVar("breakable_backend.autocast", default=())
"""Device types with an autocast that was entered for the op that runs now. Below a dispatch mode torch does not tell."""
