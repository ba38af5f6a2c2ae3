"""What an op reads, writes and returns, for every kind of node that a lowered graph may have.

Nothing else answers that: which argument nodes a call writes, what it returns (new memory, aliases of which argument,
numbers), whether it can be made again, and whether it depends on more than its arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from breakable_backend import _torch
from breakable_backend._torch import pytree

# --- what a node calls --------------------------------------------------------------------------------------------------


def schema_name(node: fx.Node) -> str:
    """``ns::op`` of the overload that a node calls; empty if it calls none."""
    return _torch.schema_name(node.target)


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return schema_name(node) == "" and getattr(node.target, "__name__", "") == "getitem"


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's ``meta["val"]``, which may be one, a nest of them, or none."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order op is called with."""
    attributes = [a for a in node.all_input_nodes if a.op == "get_attr" and node.op == "call_function"]
    found = [getattr(node.graph.owning_module, str(attribute.target), None) for attribute in attributes]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def effective_ops(node: fx.Node) -> Iterator[Any]:
    """The ops that a call really runs, through the wrappers and bodies of higher-order ops."""
    yield node.target
    if not isinstance(node.target, _torch.HigherOrderOperator):
        return
    for argument in pytree.tree_leaves((node.args, node.kwargs)):
        if isinstance(argument, _torch.OpOverload | _torch.HigherOrderOperator):
            yield argument
    for body in bodies(node):
        for inner in body.graph.nodes:
            if inner.op == "call_function":
                yield from effective_ops(inner)


# --- what it writes -------------------------------------------------------------------------------------------------------


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose storage a call writes, by the op's schema.

    Of a higher-order op that runs anything mutable, all tensor arguments: their bodies are not matched to arguments.
    """
    if isinstance(node.target, _torch.HigherOrderOperator):
        mutable = "mutation" in str(node.target) or any(
            isinstance(op, _torch.OpOverload) and op._schema.is_mutable for op in effective_ops(node)
        )
        return [a for a in node.all_input_nodes if tensors_of(a.meta.get("val"))] if mutable else []
    if not isinstance(node.target, _torch.OpOverload):
        return []
    written = written_values(node.target, node.args, node.kwargs)
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, fx.Node)]


_WRITES_STATISTICS = _torch.aten("native_batch_norm cudnn_batch_norm miopen_batch_norm")


def written_values(op: _torch.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What is passed for the arguments that ``op`` writes, in the order of its schema.

    Batch norm writes its running statistics although its schema says nothing of it.
    """
    undeclared = ("running_mean", "running_var") if op._schema.name in _WRITES_STATISTICS else ()
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.name in undeclared or (argument.alias_info is not None and argument.alias_info.is_write)
    ]


def writes_inputs(module: fx.GraphModule) -> bool:
    """Whether an ATen graph writes the memory of an argument."""
    arguments = {
        _torch.storage_key(tensor)
        for node in module.graph.find_nodes(op="placeholder")
        for tensor in tensors_of(node.meta.get("val"))
    }
    return any(
        _torch.storage_key(tensor) in arguments
        for node in module.graph.nodes
        if node.op == "call_function"
        for argument in written_arguments(node)
        for tensor in tensors_of(argument.meta.get("val"))
    )


# --- what it returns ------------------------------------------------------------------------------------------------------

_CHECKS = _torch.aten("_assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size")
"""Ops that tell a compiler something and do nothing when run."""

_SHAPE_READS = _torch.aten("sym_size sym_stride sym_numel sym_storage_offset")


def is_check(node: fx.Node) -> bool:
    """Whether a call does nothing when it is run."""
    return schema_name(node) in _CHECKS


def is_size(node: fx.Node, known: frozenset[Any]) -> bool:
    """Whether a call makes a number that follows from the number inputs and the shapes of inputs."""
    value = node.meta.get("val")
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float):
        return False
    reads_data = any(tensors_of(argument.meta.get("val")) for argument in node.all_input_nodes)
    return free_symbols(value) <= known and (not reads_data or schema_name(node) in _SHAPE_READS)


def is_view(node: fx.Node) -> bool:
    """Whether a call does nothing but alias its arguments, and may be made again anywhere."""
    target = node.target
    if not isinstance(target, _torch.OpOverload) or target.namespace not in ("aten", "prims", "prim"):
        return False
    results = tensors_of(node.meta.get("val"))
    known = {_torch.storage_key(t) for a in node.all_input_nodes for t in tensors_of(a.meta.get("val"))}
    return bool(results) and not target._schema.is_mutable and all(_torch.storage_key(t) in known for t in results)


def alias_source(node: fx.Node, producer: Any, maker: fx.Node) -> fx.Node:
    """Which argument ``node`` is, or is a view of; ``maker`` made the storage, or was first to bring it in."""
    candidates: list[fx.Node] = []
    for call in (node, producer):
        if isinstance(call, fx.Node):
            candidates += [*written_arguments(call), *call.all_input_nodes]
    key = _torch.storage_key(node.meta["val"])
    for candidate in candidates:
        value = candidate.meta.get("val")
        if isinstance(value, torch.Tensor) and _torch.storage_key(value) == key:
            return candidate
    return maker


def is_pure(node: fx.Node) -> bool:
    """Whether a node calls an op of torch's own that depends on its arguments alone and writes nothing."""
    return (
        isinstance(node.target, _torch.OpOverload)
        and node.target.namespace in ("aten", "prims")
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
