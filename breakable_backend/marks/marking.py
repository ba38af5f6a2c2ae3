"""Which nodes run eagerly, and why: marks that users make, and rules about what no CUDA graph can hold.

A rule is a function ``(node, scope) -> str``, which says why, or nothing; ``RULES`` lists them, first match wins. Which ops fail under
capture was measured on an H200 (torch 2.11).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx.traceback import annotate, get_current_meta

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.errors import OptionsError
from breakable_backend.ir.effects import effective_ops, op_of, schema_name, tensors_of
from breakable_backend.ir.program import Reason, source_line
from breakable_backend.marks import modules, ops

OpT = TypeVar("OpT")
REGION_KEY = "breakable_cg_region"

# --- marks ------------------------------------------------------------------------------------------------------------

_marked: set[str] = set()
"""Names of ops marked by ``mark_eager``, as ``ns::op`` or ``ns::op.overload``: names outlive the op objects."""
_marked_functions: list[Any] = []
"""Functions of torch's marked by ``mark_eager``."""


def mark_eager(op: OpT) -> OpT:
    """Have ``op`` run eagerly in everything compiled from now on.

    An op that is made of others (``aten::softmax``, ``linear``) is marked as a whole, by whatever name it is called.

    >>> _ = mark_eager("aten::sort")
    >>> unmark_eager("aten::sort")

    Args:
        op: ``"ns::name"`` (all its overloads), ``"ns::name.overload"``, an op from ``torch.ops``, what
            ``torch.library.custom_op`` returns, or a function of torch's: ``torch.softmax``, ``torch.Tensor.softmax``,
            ``torch.nn.functional.softmax``. Or a class of modules, with its subclasses, or a single module: its call is
            then a marked function like those under :func:`eager_on_graph`, hooks included, whatever the backend, and
            under ``capture`` an eager step. Nothing keeps a single module alive.

    Returns:
        ``op`` itself, so that this also works as a decorator, above ``custom_op`` or a class.

    Raises:
        OptionsError: there is no such op; the text has the nearest names.
    """
    if modules.is_module(op):
        modules.mark(op)
    elif _is_torch_function(op):
        if not any(op is known for known in _marked_functions):
            _marked_functions.append(op)
        _marked.update(_op_of_function(op))
    else:
        _marked.add(op_name(op))
    return op


def unmark_eager(op: Any) -> None:
    """Undo :func:`mark_eager`, for what is compiled from now on; nothing happens if ``op`` is not marked.

    >>> unmark_eager(mark_eager(torch.ops.aten.sort))

    Raises:
        OptionsError: there is no such op.
    """
    if modules.is_module(op):
        modules.unmark(op)
    elif _is_torch_function(op):
        _marked_functions[:] = [known for known in _marked_functions if known is not op]
        _marked.difference_update(_op_of_function(op))
    else:
        _marked.discard(op_name(op))


def eager_region() -> AbstractContextManager[None]:
    """Have a block of traceable code run eagerly, without an op of its own.

    >>> def f(x):
    ...     with eager_region():
    ...         y = x.sort().values
    ...     return y + 1

    Every ATen op that the block is traced to runs on its own at each call; under ``capture`` each op of the block is an
    eager step. Elsewhere the block runs as if it were not marked.
    """
    return annotate({REGION_KEY: True})


def op_name(op: Any) -> str:
    """``op`` as ``ns::name`` or ``ns::name.overload``. Raises OptionsError if it is no op."""
    if isinstance(op, str):
        if not _torch.find_overloads(op):
            near = difflib.get_close_matches(op, list(dict.fromkeys(n.split(".")[0] for n in _torch.op_names())), 3)
            raise OptionsError(
                f"{op!r} is not a registered op" + (f"; the nearest names are {', '.join(near)}" if near else ""),
                fix="name it as 'namespace::op' or 'namespace::op.overload', after it is registered",
            )
        return op
    if isinstance(op, _torch.OpOverload):
        return op.name() if "." in op.name() else f"{op.name()}.{op._overloadname}"
    if isinstance(op, _torch.OpOverloadPacket):
        return str(op._qualified_op_name)
    qualified = getattr(op, "_qualname", None)
    if isinstance(qualified, str) and _torch.find_overloads(qualified):
        return qualified
    raise OptionsError(
        f"{getattr(op, '__qualname__', repr(op))} is not an op",
        fix="pass 'namespace::op', an op from torch.ops, what torch.library.custom_op returned, or a module"
        + ("; for a function, put @eager_on_graph above it" if inspect.isfunction(op) else ""),
    )


def _is_torch_function(op: Any) -> bool:
    """Whether ``op`` is a function of torch's or of Python's operators: what a node of a Dynamo graph can call."""
    if isinstance(op, str | type | _torch.OpOverload | _torch.OpOverloadPacket) or hasattr(op, "_qualname"):
        return False
    module = getattr(op, "__module__", None) or getattr(getattr(op, "__self__", None), "__module__", None) or ""
    of_torch = module.split(".")[0] in ("torch", "_operator", "math")
    return callable(op) and (of_torch or type(op).__name__ in ("builtin_function_or_method", "method_descriptor"))


def _names_an_op(op: Any) -> bool:
    """Whether :func:`op_name` is to judge ``op``: a text, an op, or what is no function at all."""
    known = str | _torch.OpOverload | _torch.OpOverloadPacket
    return isinstance(op, known) or hasattr(op, "_qualname") or not callable(op)


def _op_of_function(function: Any) -> list[str]:
    """The op that a function of torch's calls: that of its name, if there is one."""
    name = f"aten::{getattr(function, '__name__', '')}"
    return [name] if _torch.find_overloads(name) else []


@dataclass(frozen=True)
class EagerOps:
    """The option ``eager_ops``, resolved: names of ops, torch functions as they stand in a Dynamo graph, and modules."""

    names: frozenset[str] = frozenset()
    functions: tuple[Any, ...] = ()
    modules: modules.Modules = field(default_factory=modules.Modules)

    @classmethod
    def resolve(cls, given: Iterable[Any]) -> EagerOps:
        """Sort ``given`` into names, functions and modules.

        Raises:
            OptionsError: neither an op, nor a torch function, nor a module or a class of modules.
        """
        given = list(given)
        names: set[str] = set()
        functions: list[Any] = []
        for op in given:
            if modules.is_module(op):
                continue
            if _is_torch_function(op):
                functions.append(op)
                names.update(_op_of_function(op))
            elif _names_an_op(op):
                names.add(op_name(op))
            else:
                raise OptionsError(
                    f"eager_ops: {getattr(op, '__qualname__', op)!r} is a Python function, and Dynamo traces through it",
                    fix="mark it with @eager_on_graph, or put its body under eager_region()",
                )
        return cls(frozenset(names), tuple(functions), modules.Modules.of(given))


def is_marked(op: Any, eager_ops: EagerOps) -> str:
    """Why ``op`` (an overload) is marked; empty if it is not."""
    if not isinstance(op, _torch.OpOverload):
        return ""
    if ops.is_call(op):
        return "marked by eager_on_graph"
    if torch.Tag.cudagraph_unsafe in op.tags:
        return "tagged cudagraph_unsafe"
    qualified = {op.name(), op_name(op), str(op._schema.name)}
    if qualified & _marked:
        return "marked by mark_eager"
    return "named in eager_ops" if qualified & eager_ops.names else ""


class Marks:
    """The marks that a graph of Dynamo's is lowered with, and which of them it met."""

    def __init__(self, eager_ops: EagerOps) -> None:
        self.eager_ops = eager_ops
        self._functions: list[Any] = []
        self._ops: set[Any] = set()

    def annotate(self, gm: fx.GraphModule) -> None:
        """Put nodes that call a marked function of torch's under an eager region."""
        for module in gm.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                target = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
                if node.op.startswith("call_") and (why := _why_function(target, self.eager_ops)):
                    node.meta["custom"] = {**node.meta.get("custom", {}), REGION_KEY: why}
                    self._functions.append(target)

    def taken_apart(self, called: Iterable[Any]) -> dict[Any, Callable[[], AbstractContextManager[None]]]:
        """The marked ops that tracing takes apart, each with the region that its parts are to be in.

        Args:
            called: ops that may be tagged, beside those that are marked by their names.
        """
        named = (op for name in _marked | self.eager_ops.names for op in _torch.find_overloads(name))
        return {
            op: functools.partial(self._part_of, op, f"a part of {op._schema.name}, which is {why}")
            for op in {*called, *named}
            if _torch.is_composite(op) and (why := is_marked(op, self.eager_ops))
        }

    @contextmanager
    def _part_of(self, op: Any, why: str) -> Iterator[None]:
        """Have nodes that are traced in here say why they are eager."""
        self._ops.add(op)
        with _torch.noted(REGION_KEY, why):
            yield

    def unmet(self, module: fx.GraphModule) -> frozenset[str]:
        """What is marked, with how, and neither the lowered graph nor the one before it calls."""
        ops = {
            op for node in module.graph.nodes if node.op == "call_function" for op in effective_ops(node)
        } | self._ops
        overloads = [op for op in ops if isinstance(op, _torch.OpOverload)]
        met = {name for op in overloads for name in (op.name(), op_name(op), str(op._schema.name))}
        called = modules.called_in(module)
        named = self._missing(self.eager_ops.names - met, self.eager_ops.functions)
        named |= set(self.eager_ops.modules.unmet(module for _, module in called))
        marked = self._missing(_marked - met, _marked_functions)
        marked |= set(modules.marked().unmet(module for by, module in called if by == modules.MARK_EAGER))
        return frozenset(
            [f"{name} is named in eager_ops" for name in named] + [f"{name} is marked by mark_eager" for name in marked]
        )

    def _missing(self, names: Iterable[str], functions: Iterable[Any]) -> set[str]:
        """Those of ``names`` that are not there by a function's name, and the functions that are not there by theirs."""
        missing = set(names)
        for function in functions:
            ops_of_it = _op_of_function(function)
            if any(function is called for called in self._functions):
                missing.difference_update(ops_of_it)
            elif not ops_of_it:
                missing.add(getattr(function, "__name__", str(function)))
        return missing


def _why_function(target: Any, eager_ops: EagerOps) -> str:
    name = getattr(target, "__name__", str(target))
    if any(target is function for function in _marked_functions):
        return f"a part of {name}, which is marked by mark_eager"
    return f"a part of {name}, which is named in eager_ops" if any(target is f for f in eager_ops.functions) else ""


def marked_composites(*, entirely: bool) -> list[str]:
    """The ops marked by ``mark_eager`` that autograd takes apart before a dispatch mode sees them: all, or some, overloads."""
    names = [name for name in sorted(_marked) if any(map(_torch.is_composite, _torch.find_overloads(name)))]
    return [name for name in names if _torch.is_composite_by_name(name)] if entirely else names


def marked_functions() -> tuple[Any, ...]:
    """The functions of torch's marked by ``mark_eager`` that are no op: Python calls them, and no dispatch mode sees that."""
    return tuple(function for function in _marked_functions if not _op_of_function(function))


# --- rules --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scope:
    """What the rules need to know besides the node."""

    device: torch.device
    eager_ops: EagerOps = field(default_factory=EagerOps)
    host_scalars: frozenset[str] = frozenset()
    """0-d host inputs whose value is in the key, or that have a bridge on the device; and what follows from them."""
    symbols: frozenset[Any] = frozenset()
    """The symbols of sizes that are known before anything runs; filled in by ``partition``."""
    late: frozenset[fx.Node] = frozenset()
    """Numbers, and shapes, that are known only at run time (``effects.late_values``); filled in by ``partition``."""
    strays: frozenset[fx.Node] = frozenset()
    """Calls that return, or read, what is on the host against its fake (``effects.strays``); filled in by ``partition``."""
    forced: Mapping[str, Reason] = field(default_factory=dict)
    """Nodes that must run eagerly whatever the rules say, such as those of a segment whose capture failed."""


Rule = Callable[[fx.Node, Scope], str]


def marked(node: fx.Node, scope: Scope) -> str:
    if ops.is_call(node.target):
        return ops.why_marked(node.args)
    for op in effective_ops(node):
        if why := is_marked(op, scope.eager_ops):
            return why if op is node.target else f"calls {op}, which is {why}"
    return ""


def region(node: fx.Node, scope: Scope) -> str:
    why = node.meta.get("custom", {}).get(REGION_KEY)
    return why if isinstance(why, str) else "inside eager_region" if why else ""


_CAPTURABLE_HIGHER_ORDER = ("invoke_subgraph", "triton_kernel_wrapper_mutation")
_FROM_THE_HOST = ("flex_attention", "flex_attention_backward")
"""What runs uncompiled here makes tensors of numbers that Python has, which CUDA captures no copy of."""


def higher_order(node: fx.Node, scope: Scope) -> str:
    if not isinstance(node.target, _torch.HigherOrderOperator):
        return ""
    for op in effective_ops(node):
        if not isinstance(op, _torch.HigherOrderOperator) or op.name() in _CAPTURABLE_HIGHER_ORDER:
            continue
        if op.name() in _FROM_THE_HOST:
            why = "copies numbers from the host while it runs uncompiled"
            return why if op is node.target else f"calls {op.name()}, which {why}"
        return (
            "decides on the host what to run" if op is node.target else f"calls {op.name()}, which the host decides on"
        )
    return ""


def explicit_generator(node: fx.Node, scope: Scope) -> str:
    if not isinstance(node.target, _torch.OpOverload):
        return ""
    for position, argument in enumerate(node.target._schema.arguments):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.name == "generator" and given is not None:
            return "draws from a generator of its own, which a graph would have to know before capture"
    return ""


READS_HOST = _torch.aten("_local_scalar_dense item is_nonzero equal _assert_scalar")


def host_read(node: fx.Node, scope: Scope) -> str:
    return "reads a value on the host" if schema_name(node) in READS_HOST else ""


def data_dependent(node: fx.Node, scope: Scope) -> str:
    nodes = [node, *node.all_input_nodes]
    values = [of.meta.get("val") for of in nodes]
    if any(
        _torch.free_symbols(value) - scope.symbols for value in values if value is not None
    ) or not scope.late.isdisjoint(nodes):
        return "has a size or number that is known only at run time"
    return ""


INDEXING = _torch.aten("index index_put index_put_ _unsafe_index _unsafe_index_put")


def boolean_index(node: fx.Node, scope: Scope) -> str:
    if schema_name(node) in INDEXING and len(node.args) > 1:
        for index in pytree.tree_leaves(node.args[1]):
            if isinstance(index, fx.Node) and any(
                tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(index.meta.get("val"))
            ):
                return "indexes with a mask, which waits for the host"
    return ""


def sparse(node: fx.Node, scope: Scope) -> str:
    values = tensors_of([node.meta.get("val"), *(argument.meta.get("val") for argument in node.all_input_nodes)])
    return "a sparse tensor" if any(tensor.layout is not torch.strided for tensor in values) else ""


def on_host(node: fx.Node) -> bool:
    """Whether a node makes 0-d tensors on the host, and nothing else."""
    tensors = tensors_of(node.meta.get("val"))
    return bool(tensors) and all(tensor.device.type == "cpu" and tensor.dim() == 0 for tensor in tensors)


def off_device(node: fx.Node, scope: Scope) -> str:
    if node.name in scope.host_scalars:
        return ""
    if node in scope.strays:
        return "returns, or reads, a tensor on the host, off the capture device"
    for tensor in tensors_of(node.meta.get("val")):
        if tensor.device != scope.device:
            return f"makes a tensor on {tensor.device}, off the capture device"
    for argument in node.all_input_nodes:
        for tensor in tensors_of(argument.meta.get("val")):
            if tensor.device != scope.device and argument.name not in scope.host_scalars:
                if tensor.device.type == "cpu" and tensor.dim() == 0:
                    return f"reads the host scalar {argument.name}, which a graph would freeze"
                return f"reads {argument.name} on {tensor.device}, off the capture device"
    return ""


WAITS_FOR_HOST = _torch.aten(
    "_linalg_check_errors _linalg_eigh _linalg_eigvals _linalg_svd cholesky linalg_eig linalg_eigvals linalg_ldl_factor_ex "
    "linalg_ldl_solve linalg_lstsq linalg_matrix_exp linalg_pinv bincount _ctc_loss _cudnn_ctc_loss histc masked_select "
    "nonzero repeat_interleave segment_reduce unique_consecutive unique_dim _unique _unique2"
)
"""``linalg.inv``, ``linalg.cholesky``, ``solve`` and ``lu_factor`` are captured but for the check of their errors."""

READS_NUMBER = {
    "aten::masked_fill": "value",
    "aten::masked_fill_": "value",
    "aten::index_fill": "value",
    "aten::index_fill_": "value",
    "aten::linspace": "start end",
    "aten::logspace": "start end",
    "aten::normal": "std",
    "aten::searchsorted": "sorter",
}
"""Ops that read an argument on the host, to use it or to check it, where it is a tensor on the device."""


def _has_range(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``histc`` is told its range: without one it asks the values, on the host."""
    least = args[2] if len(args) > 2 else kwargs.get("min", 0)
    most = args[3] if len(args) > 3 else kwargs.get("max", 0)
    return all(isinstance(number, int | float) for number in (least, most)) and least < most


def waits_for_host(node: fx.Node, scope: Scope) -> str:
    name = schema_name(node)
    if name in WAITS_FOR_HOST and not (name == "aten::histc" and _has_range(node.args, node.kwargs)):
        return "waits for the host on CUDA"
    for read in READS_NUMBER.get(name, "").split():
        tensors = tensors_of(getattr(argument_of(node, read), "meta", {}).get("val"))
        if any(tensor.device == scope.device for tensor in tensors):
            return f"reads its argument {read!r} on the host, where that is a tensor on the device"
    return ""


def argument_of(node: fx.Node, name: str) -> Any:
    """What a node passes for an argument of its op's schema; None for its default."""
    assert isinstance(node.target, _torch.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    position = names.index(name) if name in names else len(node.args)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def moves_storage(node: fx.Node, scope: Scope) -> str:
    if schema_name(node) in ("aten::resize_", "aten::set_", "aten::resize_as_", "inductor::resize_storage_bytes_"):
        return "moves the storage of a tensor"
    return ""


def stream_operation(node: fx.Node, scope: Scope) -> str:
    return "orders streams" if schema_name(node).startswith("streams::") else ""


RULES: tuple[Rule, ...] = (
    moves_storage,
    stream_operation,
    marked,
    region,
    higher_order,
    explicit_generator,
    host_read,
    boolean_index,
    waits_for_host,
    data_dependent,
    sparse,
    off_device,
)

WHOLE_PROGRAM: frozenset[Rule] = frozenset({moves_storage, stream_operation})
"""Rules for what makes all of a program uncapturable: addresses or streams that change under the other segments."""


def classify(node: fx.Node, scope: Scope) -> Reason | None:
    """Why ``node`` runs eagerly; None if it may be captured."""
    if node.name in scope.forced:
        return scope.forced[node.name]
    for rule in RULES:
        if text := rule(node, scope):
            return Reason(rule.__name__, text, label(node), source_line(node), rule in WHOLE_PROGRAM)
    return None


def label(node: fx.Node) -> str:
    """What a node calls, as reports show it."""
    op = op_of(node)
    return ops.name_of(op, node.args) or _torch.schema_name(op) or getattr(op, "__name__", str(op))


# --- ops that run now -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LiveReason:
    """Why an op that is about to run inside ``capture`` is not captured."""

    rule: str
    text: str
    op: str
    refused: bool = False
    """Whether it cannot be an eager step either: its result has another shape, or is another number, at each replay."""


def live_reason(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> LiveReason | None:
    """Why ``op``, called with real tensors, is not captured on ``device``; None if it can be."""
    found = _live_rule(op, args, kwargs, device)
    if found is None and REGION_KEY in get_current_meta().get("custom", {}) and not op.is_view:
        on_device = any(tensor.device == device for tensor in tensors_of((args, kwargs)))
        if on_device or _goes_to(kwargs, device):
            return LiveReason("region", "inside eager_region", str(op._schema.name))
    return found


def _live_rule(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> LiveReason | None:
    if not isinstance(op, _torch.OpOverload):
        return LiveReason("higher_order", "decides on the host what to run", str(op))
    name = str(op._schema.name)

    def eager(rule: str, text: str) -> LiveReason:
        return LiveReason(rule, text, name)

    if why := is_marked(op, EagerOps()):
        return eager("marked", why)
    tensors = tensors_of((args, kwargs))
    if all(tensor.device != device for tensor in tensors) and not _goes_to(kwargs, device):
        return None  # arithmetic of the host, which happens once
    if name in READS_HOST:
        return LiveReason("host_read", "reads a value on the host", name, refused=True)
    if name in WAITS_FOR_HOST and not (name == "aten::histc" and _has_range(args, kwargs)):
        dynamic = torch.Tag.dynamic_output_shape in op.tags or name == "aten::nonzero"
        return LiveReason("waits_for_host", "waits for the host", name, refused=dynamic)
    if name in INDEXING:
        masks = [i for i in tensors_of(args[1]) if i.dtype in (torch.bool, torch.uint8)]
        return (
            LiveReason("boolean_index", "indexes with a mask, which waits for the host", name, True) if masks else None
        )
    if torch.Tag.dynamic_output_shape in op.tags:
        return LiveReason("data_dependent", "makes a shape that depends on values", name, refused=True)
    if name in ("aten::_to_copy", "aten::copy_"):
        return _live_copy(op, args, kwargs, device)
    if kwargs.get("generator") is not None:
        return eager("explicit_generator", "draws from a generator of its own")
    return None


def _goes_to(kwargs: Mapping[str, Any], device: torch.device) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == device.type


def _live_copy(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> LiveReason | None:
    name = str(op._schema.name)
    if name == "aten::copy_":
        source, target = args[1].device, args[0].device
        pinned = (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and all(
            tensor.device == device or tensor.is_pinned() for tensor in args[:2]
        )
    else:
        source = args[0].device
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source
        pinned = False
    if source.type == target.type or pinned or (name == "aten::copy_" and args[1].dim() == 0 and source.type == "cpu"):
        return None
    if target.type != device.type:
        return LiveReason("host_read", "copies to the host, which waits for the device", name, refused=True)
    return LiveReason("off_device", "copies from the host, which waits for the device", name)
