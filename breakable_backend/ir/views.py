"""Views told from copies: which calls only make a view, what it is a view of, and how it is made again elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.ir.effects import is_of_torch, producer_of, storages_of, written_arguments
from breakable_backend.ir.layout import Geometry


def is_view_op(op: Any) -> bool:
    """Whether an op returns views by its schema. :func:`is_view` knows more, since it looks at a call."""
    return isinstance(op, _torch.OpOverload) and op.is_view


def is_view(node: fx.Node) -> bool:
    """Whether a call only aliases its arguments, so that it can be made again anywhere."""
    target = node.target
    if not is_of_torch(target) or target._schema.is_mutable:  # type: ignore[union-attr]
        return False
    results = storages_of(node)
    return bool(results) and results <= storages_of(*node.all_input_nodes)


def alias_source(node: fx.Node, maker: fx.Node) -> fx.Node:
    """The argument that ``node`` is, or is a view of; else ``maker``, which made or first brought in the storage."""
    candidates: list[fx.Node] = []
    for call in dict.fromkeys((node, producer_of(node))):
        candidates += [*written_arguments(call), *call.all_input_nodes]
    key = _torch.storage_key(node.meta["val"])
    for candidate in candidates:
        value = candidate.meta.get("val")
        if isinstance(value, torch.Tensor) and _torch.storage_key(value) == key:
            return candidate
    return maker


def made_again(graph: fx.Graph, node: fx.Node, copied: fx.Node, source: fx.Node) -> fx.Node:
    """``node``, an alias of ``source`` that an op returned, as a view of ``copied``, which is ``source`` in ``graph``."""
    mine, theirs = node.meta["val"], source.meta["val"]
    if repr(Geometry.of(mine)) == repr(Geometry.of(theirs)):  # as text, since ``==`` would guard on symbols
        return copied
    arguments = (copied, list(mine.shape), list(mine.stride()), mine.storage_offset())
    view = graph.call_function(torch.ops.aten.as_strided.default, arguments)
    view.meta = dict(node.meta)
    return view
