"""The modes of torch that Python code can see: autocast, grad mode and inference mode. The one description of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch, active
from breakable_backend.ir.effects import is_opaque

AMBIENT_KEY = "breakable_cg_ambient"
"""Where a node's ``meta["custom"]`` has the modes that it was traced under."""
DEVICES = ("cpu", "cuda")
"""The device types whose autocast is looked at."""

Cast = tuple[str, torch.dtype, bool]
"""An autocast that is enabled: device type, dtype, whether casts are cached."""


@dataclass(frozen=True)
class Modes:
    """The modes at one place. The default is what compiled code runs in: no autocast, no grad."""

    autocast: tuple[Cast, ...] = ()
    grad: bool = False
    inference: bool | None = None
    """None: that of whoever is there."""

    @classmethod
    def current(cls) -> Modes:
        """Those of this thread, now."""
        casts = tuple(cast for device in DEVICES if (cast := _current_cast(device)) is not None)
        return cls(casts, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    @classmethod
    def traced(cls) -> Modes:
        """Those of the code that is being traced now. It has no inference mode of its own: the caller's is on when it runs."""
        now = cls.current()
        return cls(now.autocast, now.grad)

    def are_current(self) -> bool:
        """Whether they are on in this thread, now; quick, for each replay asks."""
        if torch.is_grad_enabled() is not self.grad:
            return False
        if self.inference is not None and torch.is_inference_mode_enabled() is not self.inference:
            return False
        return Modes.current().autocast == self.autocast if self.autocast else not _torch.any_autocast_enabled()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Exactly these modes, for a ``with`` statement; what is so already is left alone."""
        token = active.autocast.set(tuple(device for device, _, _ in self.autocast))
        try:
            with ExitStack() as stack:
                if self.inference is not None and torch.is_inference_mode_enabled() is not self.inference:
                    stack.enter_context(torch.inference_mode(self.inference))
                wanted = {cast[0]: cast for cast in self.autocast}
                for device in DEVICES:
                    if (cast := wanted.get(device)) == _current_cast(device):
                        continue
                    if cast is None:
                        stack.enter_context(torch.autocast(device, enabled=False))
                    else:
                        stack.enter_context(torch.autocast(device, dtype=cast[1], cache_enabled=cast[2]))
                if torch.is_grad_enabled() is not self.grad:
                    stack.enter_context(torch.set_grad_enabled(self.grad))
                yield
        finally:
            active.autocast.reset(token)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as a target for a graph's node, run in these modes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.enter():
                return function(*args, **kwargs)

        call.__name__ = re.sub(r"\W", "_", str(function))
        call.__wrapped__ = function  # type: ignore[attr-defined]
        return call


def _current_cast(device: str) -> Cast | None:
    """The autocast of a device type that is enabled in this thread, now."""
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


def ambient_of(node: fx.Node) -> Modes | None:
    """The modes that ``node`` needs when it runs; None if those are what compiled code runs in, or cannot matter.

    They matter to ops that are not torch's own. Theirs were traced below autocast and grad mode: the casts are in the
    graph, and a second time would be one too many.
    """
    return node.meta.get("custom", {}).get(AMBIENT_KEY) if is_opaque(node.target) else None
