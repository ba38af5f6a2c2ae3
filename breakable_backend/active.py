"""What is going on in this thread and context: a call of a compiled function, a capture that a break would interrupt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from breakable_backend import _torch

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


@dataclass(frozen=True)
class Modes:
    """The modes of torch that Python code can see, as they are at one place."""

    autocast: tuple[tuple[str, torch.dtype, bool], ...] = ()
    """Enabled autocasts: device type, dtype, whether casts are cached."""
    grad: bool = False
    inference: bool = False

    @classmethod
    def current(cls) -> Modes:
        """Those of this thread, now."""
        return cls(
            tuple(
                (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
                for device in ("cpu", "cuda")
                if torch.is_autocast_enabled(device)
            ),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    def are_current(self) -> bool:
        """Whether they are on in this thread, now; quick, for each replay asks."""
        if torch.is_grad_enabled() is not self.grad or torch.is_inference_mode_enabled() is not self.inference:
            return False
        return Modes.current() == self if self.autocast else not _torch.any_autocast_enabled()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Exactly these modes, for a ``with`` statement; what is so already is left alone."""
        now = Modes.current()
        token = autocast.set(tuple(device for device, _, _ in self.autocast))
        try:
            with ExitStack() as stack:
                if now.inference != self.inference:
                    stack.enter_context(torch.inference_mode(self.inference))
                for device in {device for device, *_ in (*now.autocast, *self.autocast)}:
                    wanted = next((entry for entry in self.autocast if entry[0] == device), None)
                    if wanted is None:
                        stack.enter_context(torch.autocast(device, enabled=False))
                    elif wanted not in now.autocast:
                        stack.enter_context(torch.autocast(device, dtype=wanted[1], cache_enabled=wanted[2]))
                stack.enter_context(torch.set_grad_enabled(self.grad))
                yield
        finally:
            autocast.reset(token)
