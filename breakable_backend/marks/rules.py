"""Rules: which nodes, and which running ops, no CUDA graph can hold, so that they run eagerly.

A rule has two forms, side by side. The form for nodes is a function ``(node, scope) -> str``, which returns the reason,
or an empty string. The live form answers the same for an op that is about to run inside ``capture``. ``RULES`` lists
the rules in order, and the first match wins. Which ops fail under capture was measured on an H200 (torch 2.11).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.traceback import get_current_meta

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.ir.effects import effective_ops, nodes_in, op_of, schema_name, tensors_of, values_of
from breakable_backend.ir.program import Reason
from breakable_backend.ir.source_lines import source_line
from breakable_backend.ir.views import is_view_op
from breakable_backend.marks import call_ops
from breakable_backend.marks.marking import REGION_KEY, EagerOps, is_marked


@dataclass(frozen=True)
class Scope:
    """What the rules need to know besides the node."""

    device: torch.device
    eager_ops: EagerOps = field(default_factory=EagerOps)
    others: tuple[torch.device, ...] = ()
    """Further devices of the capture besides ``device``, each with its own segments."""
    host_scalars: frozenset[str] = frozenset()
    """0-d host inputs whose value is in the key, or that have a bridge on the device; and nodes computed from them."""
    symbols: frozenset[Any] = frozenset()
    """The symbols of sizes that are known before anything runs. ``partition`` fills them in."""
    late: frozenset[fx.Node] = frozenset()
    """Numbers and shapes that are known only at run time (``effects.late_values``). ``partition`` fills them in."""
    strays: frozenset[fx.Node] = frozenset()
    """Calls with a result that is on the host although its fake is not (``effects.strays``). ``partition`` fills them
    in."""
    forced: Mapping[str, Reason] = field(default_factory=dict)
    """Nodes that run eagerly whatever the rules say, such as nodes of a segment whose capture failed."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices of the capture."""
        return (self.device, *self.others)


@dataclass(frozen=True)
class LiveOp:
    """An op that is about to run inside ``capture``, on real tensors."""

    op: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    device: torch.device

    @property
    def name(self) -> str:
        """``ns::op``; for a higher-order op its name."""
        return _torch.schema_name(self.op) or str(self.op)

    @functools.cached_property
    def is_on_device(self) -> bool:
        """Whether it takes or returns a tensor on the capture device. Work on the host happens once, at the capture."""
        tensors = tensors_of((self.args, self.kwargs))
        return self.goes_to_device or any(tensor.device == self.device for tensor in tensors)

    def argument(self, name: str) -> Any:
        """The value of an argument of the op's schema; None for the default."""
        return _argument(self.op, self.args, self.kwargs, name)

    @property
    def goes_to_device(self) -> bool:
        to = self.kwargs.get("device")
        return to is not None and torch.device(to).type == self.device.type

    @property
    def elsewhere(self) -> torch.device | None:
        """Another GPU on which it takes or makes tensors; None if it only makes a view there."""
        to = self.kwargs.get("device")
        devices = [tensor.device for tensor in tensors_of((self.args, self.kwargs))]
        devices += [torch.device(to)] if to is not None else []
        others = (d for d in devices if d.type == self.device.type and d.index not in (None, self.device.index))
        return None if is_view_op(self.op) else next(others, None)


class Refusal(str):
    """Why an op cannot be an eager step either: its result has another shape, or is another number, in each replay."""


class Rule:
    """Why a node runs eagerly; and, as the other form, why an op inside ``capture`` does."""

    def __init__(self, of_node: Callable[[fx.Node, Scope], str]) -> None:
        self.__name__, self.of_node = of_node.__name__, of_node
        self.of_op: Callable[[LiveOp], str] = lambda _: ""

    def __call__(self, node: fx.Node, scope: Scope) -> str:
        return self.of_node(node, scope)

    def live(self, of_op: Callable[[LiveOp], str]) -> Callable[[LiveOp], str]:
        """Use ``of_op`` as the form for running ops."""
        self.of_op = of_op
        return of_op


@Rule
def marked(node: fx.Node, scope: Scope) -> str:
    if call_ops.runs_function(node.target):
        return call_ops.why_marked(node.args)
    for inner in nodes_in(node):
        if call_ops.runs_function(inner.target):
            return f"calls {label(inner)}, which is {call_ops.why_marked(inner.args)}"
    for op in effective_ops(node):
        if why := is_marked(op, scope.eager_ops):
            return why if op is node.target else f"calls {op}, which is {why}"
    return ""


@marked.live
def _(call: LiveOp) -> str:
    return is_marked(call.op, EagerOps())


_IN_REGION = "inside eager_region"


@Rule
def region(node: fx.Node, scope: Scope) -> str:
    why = node.meta.get("custom", {}).get(REGION_KEY)
    return why if isinstance(why, str) else _IN_REGION if why else ""


@region.live
def _(call: LiveOp) -> str:
    inside = REGION_KEY in get_current_meta().get("custom", {}) and not is_view_op(call.op)
    return _IN_REGION if inside else ""


_HOST_DECIDES = "decides on the host what to run"
_HOST_NUMBERS = "copies numbers from the host while it runs uncompiled"
_CAPTURABLE_HIGHER_ORDER = ("invoke_subgraph", "triton_kernel_wrapper_mutation")
_FROM_THE_HOST = ("flex_attention", "flex_attention_backward")
"""When these are not compiled by Inductor, they make tensors from Python numbers, a copy that CUDA does not capture."""


@Rule
def higher_order(node: fx.Node, scope: Scope) -> str:
    if not isinstance(node.target, _torch.HigherOrderOperator):
        return ""
    for op in effective_ops(node):
        if not isinstance(op, _torch.HigherOrderOperator) or op.name() in _CAPTURABLE_HIGHER_ORDER:
            continue
        why = _HOST_NUMBERS if op.name() in _FROM_THE_HOST else _HOST_DECIDES
        return why if op is node.target else f"calls {op.name()}, which {why}"
    return ""


@higher_order.live
def _(call: LiveOp) -> str:
    return "" if isinstance(call.op, _torch.OpOverload) else _HOST_DECIDES


_OWN_GENERATOR = "draws from a generator of its own, which a graph would have to know before capture"


@Rule
def explicit_generator(node: fx.Node, scope: Scope) -> str:
    given = isinstance(node.target, _torch.OpOverload) and argument_of(node, "generator") is not None
    return _OWN_GENERATOR if given else ""


@explicit_generator.live
def _(call: LiveOp) -> str:
    return _OWN_GENERATOR if call.kwargs.get("generator") is not None else ""


_HOST_READ = "reads a value on the host"
READS_HOST = _torch.aten("_local_scalar_dense item is_nonzero equal _assert_scalar")


@Rule
def host_read(node: fx.Node, scope: Scope) -> str:
    return _HOST_READ if schema_name(node) in READS_HOST else ""


@host_read.live
def _(call: LiveOp) -> str:
    if call.name in READS_HOST:
        return Refusal(_HOST_READ)
    source, target = _copied(call)
    to_host = source != target and target != call.device.type
    return Refusal("copies to the host, which waits for the device") if to_host else ""


@Rule
def data_dependent(node: fx.Node, scope: Scope) -> str:
    nodes = [node, *node.all_input_nodes]
    values = [of.meta.get("val") for of in nodes]
    if any(
        _torch.free_symbols(value) - scope.symbols for value in values if value is not None
    ) or not scope.late.isdisjoint(nodes):
        return "has a size or number that is known only at run time"
    return ""


@data_dependent.live
def _(call: LiveOp) -> str:
    dynamic = torch.Tag.dynamic_output_shape in call.op.tags and call.name not in INDEXING
    return Refusal("makes a shape that depends on values") if dynamic else ""


INDEXING = _torch.aten("index index_put index_put_ _unsafe_index _unsafe_index_put _index_put_impl_")


def is_mask(index: torch.Tensor) -> bool:
    """Whether an index selects elements by values, so that the shape of the result depends on them."""
    return index.dtype in (torch.bool, torch.uint8)


_MASKED = "indexes with a mask, which waits for the host"


@Rule
def boolean_index(node: fx.Node, scope: Scope) -> str:
    if schema_name(node) in INDEXING and len(node.args) > 1:
        for index in pytree.tree_leaves(node.args[1]):
            if isinstance(index, fx.Node) and any(map(is_mask, values_of(index))):
                return _MASKED
    return ""


@boolean_index.live
def _(call: LiveOp) -> str:
    masked = call.name in INDEXING and any(map(is_mask, tensors_of(call.args[1])))
    return Refusal(_MASKED) if masked else ""


@Rule
def sparse(node: fx.Node, scope: Scope) -> str:
    values = values_of(node, *node.all_input_nodes)
    return "a sparse tensor" if any(tensor.layout is not torch.strided for tensor in values) else ""


@sparse.live
def _(call: LiveOp) -> str:
    frozen = _torch.makes_quantised(call.op) and not isinstance(call.args[1], float)
    return Refusal("makes a quantised tensor, and a replay would not renew its scale") if frozen else ""


def on_host(node: fx.Node) -> bool:
    """Whether a node makes 0-d tensors on the host, and nothing else."""
    tensors = values_of(node)
    return bool(tensors) and all(tensor.device.type == "cpu" and tensor.dim() == 0 for tensor in tensors)


@Rule
def off_device(node: fx.Node, scope: Scope) -> str:
    if node.name in scope.host_scalars:
        return ""
    if node in scope.strays:
        return "returns, or reads, a tensor on the host, off the capture device"
    for tensor in values_of(node):
        if tensor.device not in scope.devices:
            return f"makes a tensor on {tensor.device}, off the capture device"
    for argument in node.all_input_nodes:
        for tensor in values_of(argument):
            if tensor.device not in scope.devices and argument.name not in scope.host_scalars:
                if tensor.device.type == "cpu" and tensor.dim() == 0:
                    return f"reads the host scalar {argument.name}, which a graph would freeze"
                return f"reads {argument.name} on {tensor.device}, off the capture device"
    places = places_of(node, scope)
    return f"moves data between {' and '.join(map(str, places))}" if len(places) > 1 else ""


def places_of(node: fx.Node, scope: Scope) -> tuple[torch.device, ...]:
    """The devices of the capture on which a node takes, or makes, tensors."""
    found = {tensor.device for tensor in values_of(node, *node.all_input_nodes)}
    return tuple(device for device in scope.devices if device in found)


@off_device.live
def _(call: LiveOp) -> str:
    if (elsewhere := call.elsewhere) is not None:
        return Refusal(f"runs on {elsewhere}, and the capture is on {call.device}")
    source, target = _copied(call)
    from_host = source != target and target == call.device.type
    return "copies from the host, which waits for the device" if from_host else ""


def _copied(call: LiveOp) -> tuple[str, str]:
    """The types of the source and target device of a copy that waits; the same type twice for other ops."""
    args, kwargs = call.args, call.kwargs
    if call.name not in ("aten::copy_", "aten::_to_copy"):
        return "", ""
    if call.name == "aten::_to_copy":
        source, to = args[0].device, kwargs.get("device")
        return source.type, source.type if to is None else torch.device(to).type
    target, value = args[:2]
    asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    pinned = asynchronous and all(tensor.device == call.device or tensor.is_pinned() for tensor in args[:2])
    if pinned or (value.dim() == 0 and value.device.type == "cpu"):
        return "", ""
    return value.device.type, target.device.type


_HOST_WAIT = "waits for the host on CUDA"
WAITS_FOR_HOST = _torch.aten(
    "_linalg_check_errors _linalg_eigh _linalg_eigvals _linalg_svd cholesky linalg_eig linalg_eigvals linalg_ldl_factor_ex "
    "linalg_ldl_solve linalg_lstsq linalg_matrix_exp linalg_pinv bincount _ctc_loss _cudnn_ctc_loss histc masked_select "
    "nonzero repeat_interleave segment_reduce unique_consecutive unique_dim _unique _unique2"
)
"""``linalg.inv``, ``linalg.cholesky``, ``solve`` and ``lu_factor`` are captured, except for their check of errors."""

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
"""Ops that read an argument on the host, to use or to check it, if it is a tensor on the device."""


def _waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return name in WAITS_FOR_HOST and not (name == "aten::histc" and _has_range(args, kwargs))


def _has_range(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``histc`` gets a range. Without one it reads the values on the host."""
    least = args[2] if len(args) > 2 else kwargs.get("min", 0)
    most = args[3] if len(args) > 3 else kwargs.get("max", 0)
    return all(isinstance(number, int | float) for number in (least, most)) and least < most


@Rule
def waits_for_host(node: fx.Node, scope: Scope) -> str:
    name = schema_name(node)
    if _waits(name, node.args, node.kwargs):
        return _HOST_WAIT
    for read in READS_NUMBER.get(name, "").split():
        tensors = tensors_of(getattr(argument_of(node, read), "meta", {}).get("val"))
        if any(tensor.device in scope.devices for tensor in tensors):
            return f"reads its argument {read!r} on the host, where that is a tensor on the device"
    return ""


@waits_for_host.live
def _(call: LiveOp) -> str:
    for read in READS_NUMBER.get(call.name, "").split():
        if isinstance(value := call.argument(read), torch.Tensor) and value.device == call.device:
            return f"reads its argument {read!r} on the host, where that is a tensor on the device"
    if not _waits(call.name, call.args, call.kwargs):
        return ""
    dynamic = torch.Tag.dynamic_output_shape in call.op.tags or call.name == "aten::nonzero"
    return Refusal(_HOST_WAIT) if dynamic else _HOST_WAIT


def argument_of(node: fx.Node, name: str) -> Any:
    """The value that a node passes for an argument of its op's schema; None for the default."""
    return _argument(node.target, node.args, node.kwargs, name)


def _argument(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    names = [argument.name for argument in op._schema.arguments]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else kwargs.get(name)


MOVES_STORAGE = _torch.aten("resize_ resize_as_ set_") | {"inductor::resize_storage_bytes_"}


@Rule
def moves_storage(node: fx.Node, scope: Scope) -> str:
    return "moves the storage of a tensor" if schema_name(node) in MOVES_STORAGE else ""


@Rule
def stream_operation(node: fx.Node, scope: Scope) -> str:
    return "orders streams" if schema_name(node).startswith("streams::") else ""


WHOLE_PROGRAM: tuple[Rule, ...] = (moves_storage, stream_operation)
"""Rules for nodes because of which nothing in the program can be captured: they change addresses or streams of other
segments."""
RULES: tuple[Rule, ...] = (
    *WHOLE_PROGRAM,
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


def classify(node: fx.Node, scope: Scope) -> Reason | None:
    """The reason why ``node`` runs eagerly; None if it may be captured."""
    if node.name in scope.forced:
        return scope.forced[node.name]
    for rule in RULES:
        if text := rule(node, scope):
            return Reason(rule.__name__, text, label(node), user_line_of(node), rule in WHOLE_PROGRAM)
    return None


def label(node: fx.Node) -> str:
    """The name of what a node calls, as reports show it."""
    op = op_of(node)
    return call_ops.name_of(op, node.args) or _torch.schema_name(op) or getattr(op, "__name__", str(op))


def user_line_of(node: fx.Node) -> str:
    """The user's line that made ``node``. Where Dynamo compiled nothing that calls a marked function, its definition."""
    return source_line(node) or call_ops.definition_of(op_of(node), node.args)


@dataclass(frozen=True)
class LiveReason:
    """Why an op that is about to run inside ``capture`` is not captured."""

    rule: str
    text: str
    op: str
    refused: bool = False
    """Whether it cannot be an eager step either; see :class:`Refusal`."""


_OF_ALL_OPS = (marked, higher_order, off_device)
"""Rules whose live form is also asked about ops off the capture device."""


def live_reason(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> LiveReason | None:
    """Why ``op``, called with real tensors, is not captured on ``device``; None if it can be."""
    call = LiveOp(op, args, kwargs, device)
    # The region is asked last, since it does not help an op that is refused.
    for rule in (*(rule for rule in RULES if rule is not region), region):
        if (rule in _OF_ALL_OPS or call.is_on_device) and (text := rule.of_op(call)):
            return LiveReason(rule.__name__, text, call.name, isinstance(text, Refusal))
    return None
