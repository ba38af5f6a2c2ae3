"""Generated code: graph modules get theirs when it is needed, and source is compiled as a file for tracebacks."""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from breakable_backend import _torch, locks

printing = locks.lock()
"""Held while a graph is printed. fx stores the names of a printed text at the graph's nodes, so two texts would mix
their names."""
_numbers = itertools.count()


def with_code(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with generated code. A segment has none before it is recorded or printed."""
    with printing:
        _torch.make_code(module)
    return module


def defined(source: str, name: str, names: dict[str, Any], file: str | None = None) -> tuple[Callable[..., Any], str]:
    """The function ``name`` that ``source`` defines, with ``names`` as its globals; and the file name it is compiled under.

    Without a ``file`` the source lies in ``linecache`` for tracebacks and debuggers, as long as the function lives.
    """
    where = file or f"<breakable_cg {name} {next(_numbers)}>"
    exec(compile(source, where, "exec"), names)
    # The function is not among its own globals, so it is no reference cycle: its constants are freed with its last
    # reference.
    function: Callable[..., Any] = names.pop(name)
    if file is None:
        linecache.cache[where] = (len(source), None, source.splitlines(True), where)
        weakref.finalize(function, linecache.cache.pop, where, None).atexit = False
    return function, where


def spelled(value: Any, leaf: Callable[[Any], str | None]) -> str:
    """``value`` as source. ``leaf`` returns the source of a part; None for a container that is written part by part."""
    if (text := leaf(value)) is not None:
        return text
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {spelled(item, leaf)}' for key, item in value.items())}}}"
    texts = [spelled(item, leaf) for item in value]
    if isinstance(value, list):
        return f"[{', '.join(texts)}]"
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"
