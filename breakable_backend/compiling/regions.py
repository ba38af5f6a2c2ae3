"""Compiled regions (``torch.compiler.nested_compile_region``) that have to be cut: their bodies replace their calls.

Dynamo traces a region once, and calls it wherever it is used, as a higher-order op with a graph in it. AOTAutograd
traces it once too, which takes a fifth of the time for 24 equal blocks. So a region that is captured as a whole stays
as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from breakable_backend import _torch
from breakable_backend.ir.effects import bodies, calls_in, graphs_in, is_getitem, is_opaque, symbols_of_inputs
from breakable_backend.marks.marking import REGION_KEY
from breakable_backend.marks.rules import Scope, classify


class CutsRegion(Exception):
    """An op in a region runs eagerly, or may have to: the bodies of the regions have to replace their calls."""


def inline_regions(gm: fx.GraphModule, wanted: Callable[[fx.GraphModule], bool] = lambda body: True) -> None:
    """Replace calls of regions by their bodies, in ``gm``, a graph of Dynamo's, and in the graphs in it.

    Args:
        gm: changed in place.
        wanted: which bodies; all by default. It is asked after the regions inside a body were handled.
    """
    for module in reversed(graphs_in(gm)):
        calls = [node for node in module.graph.nodes if _is_call(node)]
        wanted_calls = [node for node in calls if all(map(wanted, bodies(node)))]
        for node in wanted_calls:
            _inline(module, node)
        if wanted_calls:
            module.recompile()


def may_be_cut(body: fx.GraphModule) -> bool:
    """Whether a body of Dynamo's contains a custom op, which may not be capturable, a mark, or ops with bodies."""
    return any(
        REGION_KEY in node.meta.get("custom", {})
        or (isinstance(node.target, _torch.HigherOrderOperator) and not _is_call(node))
        or any(map(is_opaque, _torch.overloads(node.target)))
        for node in body.graph.nodes
    )


def require_whole_regions(module: fx.GraphModule, scope: Scope) -> None:
    """Look into the regions of an ATen graph.

    Raises:
        CutsRegion: an op in one of them runs eagerly, by a mark or a rule.
    """
    _require_whole(module, replace(scope, symbols=symbols_of_inputs(module.graph)))


def _require_whole(module: fx.GraphModule, scope: Scope) -> None:
    for body in [body for node in module.graph.nodes if _is_call(node) for body in bodies(node)]:
        for inner in calls_in(body):
            if not _is_call(inner) and (reason := classify(inner, scope)) is not None:
                raise CutsRegion(str(reason))
        _require_whole(body, scope)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and _torch.is_region(node.target)


def _inline(owner: fx.GraphModule, call: fx.Node) -> None:
    """Replace one call by the body."""
    region, _, *operands = call.args
    assert isinstance(region, fx.Node)
    body = getattr(owner, str(region.target))
    inside: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with owner.graph.inserting_before(call):
        returned: Any = owner.graph.graph_copy(body.graph, inside)
        for node in body.graph.find_nodes(op="get_attr"):
            name = f"{region.target}_{node.target}"
            inside[node].target = _adopted(owner, name, getattr(body, str(node.target)))
        for user in [user for user in call.users if is_getitem(user)]:
            user.replace_all_uses_with(returned[user.args[1]])
            owner.graph.erase_node(user)
        if call.users:
            call.replace_all_uses_with(owner.graph.call_function(_together, tuple(returned)))
    owner.graph.erase_node(call)
    if not region.users:
        owner.graph.erase_node(region)


def _together(*values: Any) -> tuple[Any, ...]:
    return values


def _adopted(owner: fx.GraphModule, name: str, value: Any) -> str:
    """The name of an attribute of ``owner`` that is ``value``: ``name``, or ``name`` with underscores appended."""
    while getattr(owner, name, value) is not value:
        name += "_"
    setattr(owner, name, value)
    return name
