"""CUDA's own functions, from the package ``cuda-bindings``, which is imported when one of them is first asked for."""

from __future__ import annotations

import importlib
from typing import Any


class Bindings:
    """A module of ``cuda.bindings``. What was asked for once is an attribute, as in a module."""

    def __init__(self, module: str) -> None:
        self._module = module

    def found(self) -> bool:
        """Whether it can be imported: not on a machine without CUDA."""
        try:
            importlib.import_module(self._module)
        except ImportError:
            return False
        return True

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)
        return value
