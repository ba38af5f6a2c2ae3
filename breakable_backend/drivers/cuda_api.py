"""CUDA's own functions, from the package ``cuda-bindings``, which is imported at the first use of one of them."""

from __future__ import annotations

import importlib
from typing import Any


class Bindings:
    """A module of ``cuda.bindings``. Each name becomes an attribute at its first use."""

    def __init__(self, module: str) -> None:
        self._module = module

    def found(self) -> bool:
        """Whether the module can be imported. It cannot on a machine without CUDA."""
        try:
            importlib.import_module(self._module)
        except ImportError:
            return False
        return True

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._module), name)
        setattr(self, name, value)
        return value
