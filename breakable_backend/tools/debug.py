"""The log of debug mode: a line for each step, and the user's line for exceptions in a step.

``logging.getLogger(__name__)`` has the lines at level DEBUG, and ``TORCH_LOGS=+breakable_backend.tools.debug`` shows
them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from breakable_backend._torch import pytree
from breakable_backend.ir.effects import calls_in
from breakable_backend.ir.program import describe
from breakable_backend.ir.source_lines import short_line, source_line
from breakable_backend.recordings.generated_code import with_code
from breakable_backend.recordings.observer import Observer
from breakable_backend.recordings.repair import NodeByNode

log = logging.getLogger(__name__)


class DebugLog(Observer):
    """Logs each step of a compiled graph, also in plain calls."""

    sees_plain_steps = True

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any]:
        return watched_segment(with_code(body.module), f"segment {position}")

    def eager(self, function: Callable[..., Any], label: str, source: str) -> Callable[..., Any]:
        return watched(function, f"eager {label}", source)


def watched(function: Callable[..., Any], name: str, source: str) -> Callable[..., Any]:
    """``function``, logged as a step called ``name``, from the user's line ``source``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            _note(error, source)
            raise
        _log(name, result, source)
        return result

    return call


def watched_segment(module: fx.GraphModule, name: str) -> Callable[..., Any]:
    """The module of a captured segment as such a step. An exception in it is traced back to the node."""
    sources = {node.name: source_line(node) for node in calls_in(module)}
    first = next(filter(None, sources.values()), "")

    def call(*inputs: Any) -> Any:
        try:
            results = module.forward(*inputs)  # calling the module itself would drop the traceback of an op's exception
        except Exception as error:
            _note(error, sources.get(_failed(module, error), first))
            raise
        _log(name, results, first)
        return results

    call.__wrapped__ = module  # type: ignore[attr-defined]
    return call


def _failed(module: fx.GraphModule, error: Exception) -> str:
    """The name of the node that raised: generated code has a line ``name = op(...)`` for each node."""
    file = module.forward.__code__.co_filename
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1].partition("=")[0].partition(":")[0].strip() if lines else ""


def _note(error: Exception, source: str) -> None:
    note = f"in a compiled graph, at {short_line(source)}"
    if source and note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def _log(name: str, result: Any, source: str) -> None:
    if log.isEnabledFor(logging.DEBUG):
        tensors = [describe(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        log.debug("%s -> %s%s", name, ", ".join(tensors) or "nothing", f" at {short_line(source)}" if source else "")
