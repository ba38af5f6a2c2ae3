"""What an op reads, writes and returns, for every kind of node in a lowered graph.

This is the only module that answers these questions: which arguments a call writes, what it returns (a tensor, a
number, nothing), and whether it depends on more than its arguments. :mod:`breakable_backend.ir.views` tells views from
copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree

# --- what a node calls --------------------------------------------------------------------------------------------------


def schema_name(node: fx.Node) -> str:
    """``ns::op`` of the overload that a node calls; empty if it calls no overload."""
    return _torch.schema_name(node.target)


def op_of(node: fx.Node) -> Any:
    """The target of a node, without the wrapper that enters ambient modes (``ir.ambient_modes.around``)."""
    return getattr(node.target, "__wrapped__", node.target) if not isinstance(node.target, str) else node.target


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results of a call."""
    return schema_name(node) == "" and getattr(node.target, "__name__", "") == "getitem"


def producer_of(node: fx.Node) -> fx.Node:
    """The call whose result a node is a part of, also through several ``getitem``; any other node itself."""
    while is_getitem(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in a node's ``meta["val"]``, which may be one tensor, a nest of tensors, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)] if value is not None else []


def values_of(*nodes: fx.Node) -> list[torch.Tensor]:
    """The fake tensors of nodes, each of which has one, several or none."""
    return [tensor for node in nodes for tensor in tensors_of(node.meta.get("val"))]


def storages_of(*nodes: fx.Node) -> set[int]:
    """The keys of the storages of these nodes' tensors."""
    return set(map(_torch.storage_key, values_of(*nodes)))


def is_of_torch(target: Any) -> bool:
    """Whether ``target`` is one of torch's own ops."""
    return isinstance(target, _torch.OpOverload) and target.namespace in ("aten", "prims", "prim")


def is_opaque(target: Any) -> bool:
    """Whether ``target`` is a custom op: its code sees the modes around it, and its fake may be wrong."""
    return isinstance(target, _torch.OpOverload) and not is_of_torch(target)


_OF_TORCH = frozenset(
    "aten prims prim breakable_cg _c10d_functional _c10d_functional_autograd c10d c10d_functional _dtensor inductor profiler "
    "quantized rngprims streams symm_mem".split()
)
"""Namespaces of ops that come with PyTorch or with this package."""


def is_somebodys(node: fx.Node) -> bool:
    """Whether a node calls an op that somebody else has registered, and about which nothing is known."""
    op = op_of(node)
    return isinstance(op, _torch.OpOverload) and op.namespace not in _OF_TORCH


def graphs_in(module: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph and all graphs inside it."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def calls_in(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a graph that call functions."""
    return [node for node in module.graph.nodes if node.op == "call_function"]


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order op is called with."""
    attributes = [a for a in node.all_input_nodes if a.op == "get_attr" and node.op == "call_function"]
    found = [getattr(node.graph.owning_module, str(attribute.target), None) for attribute in attributes]
    return [body for body in found if isinstance(body, fx.GraphModule)]


def nodes_in(node: fx.Node) -> Iterator[fx.Node]:
    """The calls in the bodies of a higher-order op, at any depth."""
    for body in bodies(node):
        for inner in calls_in(body):
            yield inner
            yield from nodes_in(inner)


def effective_ops(node: fx.Node) -> Iterator[Any]:
    """The ops that a call runs, looking through the wrappers and bodies of higher-order ops."""
    yield node.target
    if not isinstance(node.target, _torch.HigherOrderOperator):
        return
    for argument in pytree.tree_leaves((node.args, node.kwargs)):
        if isinstance(argument, _torch.OpOverload | _torch.HigherOrderOperator):
            yield argument
    for body in bodies(node):
        for inner in calls_in(body):
            yield from effective_ops(inner)


# --- what it writes -------------------------------------------------------------------------------------------------------


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes whose storage a call writes.

    For an op its schema says this; for a higher-order op its bodies, whose inputs stand for operands; for a user's
    Triton kernel PyTorch's analysis of its code. If none of them can tell, all tensor arguments count as written.
    """
    if isinstance(node.target, _torch.HigherOrderOperator):
        written = _written_by_higher_order(node)
    elif isinstance(node.target, _torch.OpOverload):
        written = written_values(node.target, node.args, node.kwargs)
    else:
        return []
    leaves = pytree.tree_leaves(written) if written else ()
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))


_ON_COPIES = ("auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional")
"""Higher-order ops that pass copies to the op that writes."""

_OPERANDS: Mapping[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
    "invoke_subgraph": lambda args: args[2:],
    "cond": lambda args: args[3],
    "switch": lambda args: args[2],
    "while_loop": lambda args: (*args[2], *args[3]),
    "while_loop_stack_output": lambda args: (*args[2], *args[3]),
    "scan": lambda args: (*args[1], *args[2], *args[3]),
    "map_impl": lambda args: (*args[1], *args[2]),
    "strict_mode": lambda args: args[1],
    "hints_wrapper": lambda args: args[1],
}
"""For each higher-order op, which of its arguments are the inputs of each body. A body may get a slice of an
operand."""


def _written_by_higher_order(node: fx.Node) -> Sequence[Any]:
    name = node.target.name()  # type: ignore[union-attr]
    if name == "triton_kernel_wrapper_mutation":
        return _written_by_kernel(node)
    if name == "with_effects" and isinstance(op := node.args[1], _torch.OpOverload):
        return written_values(op, node.args[2:], node.kwargs)
    if name == "invoke_leaf_function":
        return [node.args[4 + int(position)] for position in str(node.args[3]).split(",") if position]
    if name in _ON_COPIES or not _may_write(node):
        return []
    graphs, operands = bodies(node), _OPERANDS[name](node.args) if name in _OPERANDS else ()
    if not graphs or any(len(graph.graph.find_nodes(op="placeholder")) != len(operands) for graph in graphs):
        return [argument for argument in node.all_input_nodes if values_of(argument)]
    written = [zip(operands, _written(graph), strict=True) for graph in graphs]
    return [operand for pairs in written for operand, place in pairs if place]


def _may_write(node: fx.Node) -> bool:
    """Whether any of the ops that a call runs writes one of its arguments."""
    return "mutation" in str(node.target) or any(
        op.name() in _WRITERS if isinstance(op, _torch.HigherOrderOperator) else op._schema.is_mutable
        for op in effective_ops(node)
        if isinstance(op, _torch.HigherOrderOperator | _torch.OpOverload)
    )


_WRITERS = ("triton_kernel_wrapper_mutation", "invoke_leaf_function")
"""Higher-order ops without a body that may write."""


def _written(body: fx.GraphModule) -> list[bool]:
    """For each input of a graph, whether the graph writes it or a view of it."""
    written = _written_nodes(body)
    memory = storages_of(*written)
    known = {*written, *(place for node in written if "val" not in node.meta for place in _behind(node))}
    inputs = body.graph.find_nodes(op="placeholder")
    return [place in known or not memory.isdisjoint(storages_of(place)) for place in inputs]


def _written_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """What the calls in a graph write."""
    return [argument for node in calls_in(module) for argument in written_arguments(node)]


def _behind(node: fx.Node) -> set[fx.Node]:
    """All nodes that ``node`` was computed from."""
    found, pending = {node}, [node]
    while pending:
        new = [argument for argument in pending.pop().all_input_nodes if argument not in found]
        found.update(new)
        pending += new
    return found


_KERNEL_KEY = "breakable_cg_kernel_writes"


def _written_by_kernel(node: fx.Node) -> list[Any]:
    """What a Triton kernel writes, by PyTorch's analysis of its code, which is slow and is stored at the node."""
    named: Mapping[str, Any] = node.kwargs["kwargs"]  # type: ignore[assignment]
    if _KERNEL_KEY not in node.meta:
        values = {name: value.meta.get("val") if isinstance(value, fx.Node) else value for name, value in named.items()}
        node.meta[_KERNEL_KEY] = _torch.written_by_kernel(
            node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"], values, node.kwargs["tma_descriptor_metadata"]
        )
    return [named[name] for name in node.meta[_KERNEL_KEY]]


BATCH_NORMS = _torch.aten("native_batch_norm cudnn_batch_norm miopen_batch_norm")
"""Ops that write their running statistics if they train, and read them if they do not."""

WRITES_UNDECLARED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(BATCH_NORMS, ("running_mean", "running_var")),
    "_c10d_functional::irecv": ("tensor",),
    "_c10d_functional::batch_p2p_ops": ("tensors",),
}
"""Arguments that ops write although their schema does not say so."""


def written_values(op: _torch.Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The values that are passed for the arguments which ``op`` writes, in the order of its schema.

    For a higher-order op that is called now, all arguments: this is for callers that want to undo the call.
    """
    if isinstance(op, _torch.HigherOrderOperator):
        return [args, kwargs]
    undeclared = WRITES_UNDECLARED.get(op._schema.name, ())
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(op._schema.arguments)
        if argument.name in undeclared or (argument.alias_info is not None and argument.alias_info.is_write)
    ]


def written_inputs(module: fx.GraphModule) -> frozenset[str]:
    """The inputs of an ATen graph whose memory it writes, by name."""
    memory = storages_of(*_written_nodes(module))
    inputs = module.graph.find_nodes(op="placeholder")
    return frozenset(node.name for node in inputs if not memory.isdisjoint(storages_of(node)))


# --- what it leaves unfinished --------------------------------------------------------------------------------------------

WAIT = "_c10d_functional::wait_tensor"
"""The op that waits for the result of a collective. A second wait for the same result does nothing."""


def is_asynchronous(op: Any) -> bool:
    """Whether a call only starts its work. Its result is there after ``WAIT``, which finds the work by the storage."""
    return isinstance(op, _torch.OpOverload) and op.namespace == "_c10d_functional" and op._schema.name != WAIT


def unfinished(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls among ``nodes`` with a result that no other of them waits for."""
    waited = storages_of(*(node for node in nodes if schema_name(node) == WAIT))
    return [node for node in nodes if is_asynchronous(node.target) and not storages_of(node) <= waited]


# --- what it returns ------------------------------------------------------------------------------------------------------

_CHECKS = _torch.aten("_assert_tensor_metadata sym_constrain_range sym_constrain_range_for_size")
"""Ops that tell a compiler something about a number, and check it when they run. Known numbers need no check."""

_SHAPE_READS = _torch.aten("sym_size sym_stride sym_numel sym_storage_offset")


def is_check(node: fx.Node) -> bool:
    """Whether a call only tells a compiler something about numbers, and does nothing if all are known before the run."""
    return schema_name(node) in _CHECKS


def is_number(node: fx.Node) -> bool:
    """Whether a node is an int, a float or a bool, symbolic or not."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def python_floats(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes that read a float argument of the compiled function, each with the graph input that it is read from.

    Dynamo passes a float that varies as a 0-d float64 tensor on the host, and its value has a symbol with guards.
    """
    return {
        node: node.args[0]
        for node in graph.nodes
        if schema_name(node) == "aten::_local_scalar_dense"
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "placeholder"
        and _torch.is_argument_float(node.meta.get("val"))
    }


def is_pinned(node: fx.Node) -> bool:
    """Whether a call made a size that depends on values, and a check has since fixed that size for the compiler."""
    made = _torch.symbols_made(node)
    return bool(made) and not _torch.free_symbols(node.meta.get("val")) >= made


def is_checked_by_nobody(node: fx.Node) -> bool:
    """Whether a call made such a fixed size, and the graph does not read it: a compiler has dropped the check."""
    return is_pinned(node) and not any(schema_name(user) in _SHAPE_READS for user in node.users)


def symbols_of_inputs(graph: fx.Graph) -> frozenset[Any]:
    """The symbols of the sizes, strides and numbers that a lowered graph takes."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    return frozenset().union(*(_torch.free_symbols(value) for value in values if not _torch.is_ragged(value)))


def late_values(graph: fx.Graph, known: frozenset[Any], floats: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The numbers that are known only at run time, and the tensors whose shape depends on one although no symbol says so.

    ``torch._check(n == 3)`` replaces an unbacked symbol by 3 everywhere. Then no symbol is left in what follows from
    it, and ``n == 3`` is True. So this function asks where a number came from: the data of a tensor, or another late
    number.

    Args:
        graph: the whole lowered graph.
        known: the symbols of its inputs.
        floats: the nodes that read a Python float whose value is part of the key.
    """
    late: set[fx.Node] = set()
    replaced: set[fx.Node] = set()
    """Those of them that have no unbacked symbol, or have one no longer."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        symbols = _torch.free_symbols(node.meta.get("val"))
        if is_number(node):
            of_data = bool(values_of(*node.all_input_nodes))
            comes_late = of_data and schema_name(node) not in _SHAPE_READS and node not in floats
            if comes_late or not symbols <= known or not late.isdisjoint(node.all_input_nodes):
                late.add(node)
        elif not replaced.isdisjoint(node.all_input_nodes) or is_pinned(node):
            late.add(node)
        if node in late and symbols <= known:
            replaced.add(node)
    return frozenset(late)


def draws(op: Any) -> bool:
    """Whether an op draws random numbers, by its tags."""
    return torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())


ALLOCATING = _torch.aten("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
"""Ops that allocate memory and launch nothing."""


_ON_THE_HOST = _torch.aten("_efficient_attention_forward _scaled_dot_product_efficient_attention")
"""CUDA ops whose third and fourth result, the seed and offset of dropout, are on the host although their fake is
not."""


def strays(graph: fx.Graph) -> frozenset[fx.Node]:
    """Calls with a result in use that is on the host although its fake is not, and the nodes that depend on such a result.

    In a capture such a result may be on the device, as the fake says; in eager it is on the host.
    """
    found: set[fx.Node] = set()
    following: set[fx.Node] = set()
    for node in graph.nodes:
        call = producer_of(node)
        if is_getitem(node) and schema_name(call) in _ON_THE_HOST and node.args[1] in (2, 3):
            if any(tensor.is_cuda for tensor in values_of(node)):
                found.add(call)
                following.add(node)
        elif node.op == "call_function" and not following.isdisjoint(node.all_input_nodes):
            following.add(node)
    return frozenset(found | following)


def is_pure(node: fx.Node) -> bool:
    """Whether a node calls an op of PyTorch's own that depends on its arguments only and writes nothing."""
    op = node.target
    of_torch = isinstance(op, _torch.OpOverload) and op.namespace in ("aten", "prims")
    return of_torch and not op._schema.is_mutable and not draws(op)  # type: ignore[union-attr]
