"""Functions to report on."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import silly


def from_file(source: str, **names: Any) -> Callable[..., Any]:
    """The function ``f`` of ``source``, as if it stood in ``model.py``: so the report's lines are the same everywhere."""
    linecache.cache["model.py"] = (len(source), None, source.splitlines(True), "model.py")
    scope = {"torch": torch, "silly": silly, "__name__": "model", **names}
    exec(compile(source, "model.py", "exec"), scope)
    return scope["f"]


def called(function: Callable[..., Any], calls: int, *args: Any, **options: Any) -> Any:
    """``function``, compiled and called that often without gradients."""
    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "tape", "min_kernels": 1, **options})
    with torch.no_grad():
        for _ in range(calls):
            compiled(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
    return compiled
