"""Graph modules, and what their nodes carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.fx import traceback as _fx_traceback
from torch.fx._lazy_graph_module import _LazyGraphModule


@contextmanager
def noted(key: str, value: Any) -> Iterator[None]:
    """Have nodes that are traced inside carry ``value`` in ``meta["custom"]``. Nodes that are traced already do not change.

    ``torch.fx.traceback.annotate`` changes the dict itself, which earlier nodes may share.
    """
    before = _fx_traceback.current_meta
    _fx_traceback.current_meta = {**before, "custom": {**before.get("custom", {}), key: value}}
    try:
        yield
    finally:
        _fx_traceback.current_meta = before


def lazy_module(attributes: Mapping[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module without code until somebody needs it; see :func:`make_code`."""
    return _LazyGraphModule(dict(attributes), graph, name)


def make_code(module: fx.GraphModule) -> None:
    """Have ``module`` generate its code, if it has none yet."""
    if isinstance(module, _LazyGraphModule):
        module.real_recompile()
