"""Autocast, grad mode and inference mode: the one description of the modes that Python code can see."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch, active
from breakable_backend.ir.effects import is_opaque

AMBIENT_KEY = "breakable_cg_ambient"
"""The key in a node's ``meta["custom"]`` for the modes that it was traced under."""
DEVICES = ("cpu", "cuda")
"""The device types whose autocast matters here."""

Cast = tuple[str, torch.dtype, bool]
"""An autocast that is on: device type, dtype, whether casts are cached."""


@dataclass(frozen=True)
class Modes:
    """The modes at one place. The default is that of compiled code: no autocast, no gradients."""

    autocast: tuple[Cast, ...] = ()
    grad: bool = False
    inference: bool | None = None
    """None: the mode of the caller."""

    @classmethod
    def current(cls) -> Modes:
        """The modes of this thread now."""
        casts = tuple(cast for device in DEVICES if (cast := _current_cast(device)) is not None)
        return cls(casts, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    @classmethod
    def traced(cls) -> Modes:
        """The modes of the code that is being traced now. It has no inference mode: the caller's is on when the code runs."""
        now = cls.current()
        return cls(now.autocast, now.grad)

    def are_current(self) -> bool:
        """Whether these modes are on in this thread now. Quick, since each replay asks."""
        if torch.is_grad_enabled() is not self.grad:
            return False
        if self.inference is not None and torch.is_inference_mode_enabled() is not self.inference:
            return False
        return Modes.current().autocast == self.autocast if self.autocast else not _torch.any_autocast_enabled()

    def enter(self) -> AbstractContextManager[None]:
        """A context manager that enters these modes. Modes that are on already are left alone."""
        return _Entered(self)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as the target of a graph's node, run in these modes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.enter():
                return function(*args, **kwargs)

        call.__name__ = re.sub(r"\W", "_", str(function))
        call.__wrapped__ = function  # type: ignore[attr-defined]
        return call


class _Entered:
    """A context manager for modes. Each eager step under an autocast has one, so it is quick."""

    __slots__ = ("left", "modes", "token")

    def __init__(self, modes: Modes) -> None:
        self.modes, self.left = modes, list[AbstractContextManager[Any]]()

    def __enter__(self) -> None:
        modes = self.modes
        self.token = active.autocast.set(tuple([device for device, _, _ in modes.autocast]))
        try:
            if modes.inference is not None and torch.is_inference_mode_enabled() is not modes.inference:
                self._enter(torch.inference_mode(modes.inference))
            for device in DEVICES:
                cast = next((cast for cast in modes.autocast if cast[0] == device), None)
                if cast != _current_cast(device):
                    dtype, cached = cast[1:] if cast is not None else (None, None)
                    self._enter(_torch.Autocast(device, dtype, cached))
            if torch.is_grad_enabled() is not modes.grad:
                self._enter(_torch.GradMode(modes.grad))
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def _enter(self, context: AbstractContextManager[Any]) -> None:
        context.__enter__()
        self.left.append(context)

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.left):
            context.__exit__(*error)
        active.autocast.reset(self.token)


def _current_cast(device: str) -> Cast | None:
    """The autocast of a device type that is on in this thread now."""
    if not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()


def ambient_of(node: fx.Node) -> Modes | None:
    """The modes that ``node`` needs when it runs; None if they are those of compiled code, or make no difference.

    They matter only to custom ops. PyTorch's own ops were traced below autocast and grad mode, so their casts are in
    the graph already.
    """
    return node.meta.get("custom", {}).get(AMBIENT_KEY) if is_opaque(node.target) else None
