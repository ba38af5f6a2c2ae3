"""From an ATen graph to a program: classify each node, cut where the kind changes, and give each segment its inputs.

For ``y = (x.sin() + 1); z = attention(y.view(2, 2)); return z.cos().t()`` with attention marked::

    segment 0: captured          sin = sin(x); add = add(sin, 1)              makes add
    segment 1: eager             view = view(add, [2, 2]); attention(view)    makes attention
    segment 2: captured          cos = cos(attention)                         makes cos
    epilogue                     returns t(cos)

The original order is kept. The splitters of ``torch.fx`` follow only data dependencies, and so reorder or drop
mutations (pytorch#81244).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.ir.ambient_modes import ambient_of
from breakable_backend.ir.effects import (
    ALLOCATING,
    graphs_in,
    is_check,
    is_number,
    is_pure,
    late_values,
    producer_of,
    python_floats,
    schema_name,
    strays,
    symbols_of_inputs,
    tensors_of,
    unfinished,
    values_of,
    written_arguments,
)
from breakable_backend.ir.layout import STRIDED, has_gaps
from breakable_backend.ir.program import (
    TOO_FEW,
    Access,
    EagerSegment,
    Epilogue,
    GraphSegment,
    Input,
    InputKind,
    Program,
    Reason,
    Segment,
    causes_first,
    outputs_of,
    unused,
)
from breakable_backend.ir.source_lines import source_line
from breakable_backend.ir.views import alias_source, is_view, made_again
from breakable_backend.marks.rules import Scope, argument_of, classify, label, on_host, places_of

_NO_LAUNCH = ALLOCATING | _torch.aten("_assert_async")
"""ATen ops that allocate or check, and launch nothing."""


def partition(lowered: Lowered, scope: Scope, *, min_kernels: int, apart: Collection[str] = ()) -> Program:
    """Cut a lowered graph into the segments of a program.

    Args:
        lowered: the graph; not changed.
        scope: device, marks, and nodes that must run eagerly.
        min_kernels: captured segments with fewer launching ops become eager.
        apart: nodes that begin a new segment, even after one of the same kind, since everything before them has run.
    """
    graph = lowered.module.graph
    known = symbols_of_inputs(graph)
    floats = {node: held for node, held in python_floats(graph).items() if held.name in scope.host_scalars}
    known = known.union(*(_torch.free_symbols(node.meta["val"]) for node in floats))
    scope = replace(
        scope,
        symbols=known,
        late=late_values(graph, known, frozenset(floats)),
        strays=strays(graph),
        host_scalars=_host_scalars(graph, scope),
    )
    flow = _Flow.of(graph, scope.late, floats)
    reasons = {node: classify(node, scope) for node in flow.actions}
    whole = next((reason for reason in reasons.values() if reason is not None and reason.whole_program), None)
    whole = whole or _absolute_view(flow, reasons, lowered.static)
    if whole is not None:
        # If storages move, views cannot be made again later: keep every node at its place, in one segment.
        flow = flow.with_all_nodes_as_actions()
        runs = [_Run(flow.actions, (whole,), scope, scope.device)]
    else:
        runs = _runs(flow.actions, reasons, scope, min_kernels, apart)
    return _Builder(lowered, scope, flow).build(runs, apart)


def _absolute_view(flow: _Flow, reasons: Mapping[fx.Node, Reason | None], static: frozenset[int]) -> Reason | None:
    """Why the program has to run on its original memory.

    ``as_strided`` reaches into a storage that gets a bridge: by an offset from the storage's beginning, or between the
    elements that a bridge is loaded with.
    """
    for node in flow.all_nodes:
        if schema_name(node) in STRIDED and isinstance(node.args[0], fx.Node):
            offset = argument_of(node, "storage_offset")
            root = flow.root[node.args[0]]
            inputs = list(node.graph.find_nodes(op="placeholder"))
            moves = reasons.get(producer_of(root)) is not None or (root in inputs and inputs.index(root) not in static)
            if moves and (offset is not None or _may_have_gaps(root.meta["val"])):
                how = "by an absolute offset" if offset is not None else "between its elements"
                text = f"reaches into the memory of {root.name} {how}"
                return Reason("absolute_view", text, label(node), source_line(node), whole_program=True)
    return None


def _may_have_gaps(tensor: torch.Tensor) -> bool:
    """Whether memory lies between the elements of a tensor; if sizes vary, whether it may."""
    numbers = (*tensor.shape, *tensor.stride())
    if not any(isinstance(number, torch.SymInt) for number in numbers):
        return has_gaps(tensor)
    dense: Any = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if str(step) != str(dense):  # compared as text, since ``==`` would add a guard
            return True
        dense *= size
    return False


def _host_scalars(graph: fx.Graph, scope: Scope) -> frozenset[str]:
    """The host scalars of ``scope``, numbers in the code, and what PyTorch's own pure ops compute from them."""
    names = set(scope.host_scalars)
    if scope.device.type != "cpu":
        names |= _numbers_in_code(graph)
    for node in graph.nodes:
        inputs = [a.name for a in node.all_input_nodes if values_of(a)]
        if inputs and names.issuperset(inputs) and is_pure(node) and on_host(node):
            names.add(node.name)
    return frozenset(names)


def _numbers_in_code(graph: fx.Graph) -> set[str]:
    """Tensors on the host like ``torch.tensor(2.0)``, and values computed from them, if kernels take them by value.

    A number that is written, returned, passed to other ops, or copied to the device is not included.
    """
    names: set[str] = set()
    for node in reversed(graph.nodes):  # users first
        taken = all(user.name in names or _takes_by_value(user, node) for user in node.users)
        if taken and node.op == "call_function" and on_host(node) and is_pure(node):
            names.add(node.name)
    for node in graph.nodes:
        inputs = [argument for argument in node.all_input_nodes if values_of(argument)]
        constant = schema_name(node) == "aten::lift_fresh_copy" and all(made.op == "get_attr" for made in inputs)
        if not constant and not (inputs and all(argument.name in names for argument in inputs)):
            names.discard(node.name)
    return names


def _takes_by_value(user: fx.Node, number: fx.Node) -> bool:
    """Whether a kernel on the device takes a number on the host as an argument, and does nothing else with it."""
    position = _BY_VALUE.get(schema_name(user))
    return position is not None and number in user.args[position:] and number not in user.args[:position]


_BY_VALUE = {
    **dict.fromkeys(_torch.aten("add sub mul div rsub eq ne lt le gt ge maximum minimum"), 0),
    **dict.fromkeys(_torch.aten("fill fill_ add_ sub_ mul_ div_ copy_"), 1),
    **dict.fromkeys(_torch.aten("masked_fill masked_fill_"), 2),
}
"""Ops that take a number on the host by value, each with the position of the first argument that may be one."""


@dataclass(frozen=True)
class _Run:
    """Neighbouring nodes of one kind, which are captured if there is no reason against it."""

    nodes: tuple[fx.Node, ...]
    reasons: tuple[Reason, ...]
    scope: Scope
    device: torch.device

    def num_kernels(self) -> int:
        """How many of the ops launch, without those that only allocate and those on host scalars."""
        return sum(
            schema_name(node) not in _NO_LAUNCH and node.name not in self.scope.host_scalars for node in self.nodes
        )


def _runs(
    actions: Iterable[fx.Node],
    reasons: Mapping[fx.Node, Reason | None],
    scope: Scope,
    min_kernels: int,
    apart: Collection[str],
) -> list[_Run]:
    where = "between eager breaks" if any(reasons.values()) else "in all"
    runs: list[_Run] = []
    begun, device = 0, scope.device

    def kind(node: fx.Node) -> tuple[bool, int, torch.device | None]:
        nonlocal begun, device
        begun += node.name in apart
        if reasons[node] is not None:
            return False, begun, None
        device = next(iter(places_of(node, scope)), device)
        return True, begun, device

    for (captured, _, place), group in groupby(actions, key=kind):
        nodes = tuple(group)
        why = tuple(dict.fromkeys(reason for node in nodes if (reason := reasons[node])))
        run = _Run(nodes, why, scope, place or scope.device)
        count = run.num_kernels()
        if captured and count < max(min_kernels, 1):
            text = f"{count} op{'s' * (count != 1)} {where}, fewer than min_kernels={min_kernels}"
            run = replace(run, reasons=(Reason(TOO_FEW, text, label(nodes[0]), source_line(nodes[0])),))
        if runs and runs[-1].reasons and run.reasons and nodes[0].name not in apart:
            runs[-1] = replace(run, nodes=runs[-1].nodes + run.nodes, reasons=runs[-1].reasons + run.reasons)
        else:
            runs.append(run)
    return runs


@dataclass(frozen=True)
class _Flow:
    """How the nodes of a graph depend on each other through memory.

    ``root`` maps each tensor to the value that made its storage. ``source`` maps a tensor that is no root to the
    argument that it is, or is a view of (in-place ops return their argument). Nodes that do something are ``actions``.
    Views and sizes are made again wherever they are needed.
    """

    actions: tuple[fx.Node, ...]
    root: Mapping[fx.Node, fx.Node]
    source: Mapping[fx.Node, fx.Node]
    views: frozenset[fx.Node]
    attached: Mapping[fx.Node, tuple[fx.Node, ...]]
    """For an action with several results, the ``getitem`` nodes that stay with it."""
    sizes: frozenset[fx.Node]
    floats: Mapping[fx.Node, fx.Node]
    """Those of the sizes that are Python floats, each with its input."""
    all_nodes: tuple[fx.Node, ...] = field(repr=False)

    @classmethod
    def of(cls, graph: fx.Graph, late: frozenset[fx.Node], floats: Mapping[fx.Node, fx.Node]) -> _Flow:
        roots: dict[int, fx.Node] = {}
        root: dict[fx.Node, fx.Node] = {}
        source: dict[fx.Node, fx.Node] = {}
        views: set[fx.Node] = set()
        sizes: set[fx.Node] = set()
        attached: dict[fx.Node, list[fx.Node]] = {}
        actions: list[fx.Node] = []
        needless = {node for node in graph.nodes if is_check(node) and late.isdisjoint(node.all_input_nodes)}
        everything = tuple(node for node in graph.nodes if node.op == "call_function" and node not in needless)
        for node in graph.nodes:
            if node.op == "output" or node in needless:
                continue
            value = node.meta.get("val")
            call = producer_of(node)
            if node.op == "call_function" and call is node:
                if is_number(node) and node not in late:
                    # Values computed from floats are computed again in Python, whose rounding symbols do not have.
                    of_floats = any(of in floats or (is_number(of) and of in views) for of in node.all_input_nodes)
                    (views if of_floats else sizes).add(node)
                    continue
                if is_view(node):
                    views.add(node)
                else:
                    actions.append(node)
            elif call is not node:
                if call in views:
                    views.add(node)
                else:
                    attached.setdefault(call, []).append(node)
            if isinstance(value, torch.Tensor):
                # An argument is a root even if it shares a storage with another one: each enters segments by itself.
                maker = roots.get(_torch.storage_key(value)) if node.op == "call_function" else None
                if maker is None:
                    roots[_torch.storage_key(value)] = root[node] = node
                else:
                    source[node] = alias_source(node, maker)
                    root[node] = root[source[node]]
            elif node in views:
                viewed = [argument for argument in node.all_input_nodes if argument in root]
                if viewed:  # a number has no storage
                    source[node] = viewed[0]
        return cls(
            tuple(actions),
            root,
            source,
            frozenset(views),
            {node: tuple(items) for node, items in attached.items()},
            frozenset(sizes),
            floats,
            everything,
        )

    def with_all_nodes_as_actions(self) -> _Flow:
        """This flow with every node as an action at its own place, so that nothing is made again."""
        own = {node: node for node in self.root}
        return _Flow(self.all_nodes, own, {}, frozenset(), {}, frozenset(), {}, self.all_nodes)


class _Builder:
    """Copies nodes into one graph for each segment. The core of this is :meth:`_Draft.resolve`."""

    def __init__(self, lowered: Lowered, scope: Scope, flow: _Flow) -> None:
        self.lowered, self.scope, self.flow = lowered, scope, flow
        self.names = {node.name for node in lowered.module.graph.nodes if node not in flow.views}

    def unique(self, name: str) -> str:
        """``name``, with a number appended if a segment has that name already."""
        chosen = unused(name, self.names.__contains__)
        self.names.add(chosen)
        return chosen

    def build(self, runs: list[_Run], apart: Collection[str]) -> Program:
        drafts = [self._draft(run) for run in runs]
        returned = _Draft(self)
        returned.graph.output(
            tuple(
                returned.resolve(leaf) if isinstance(leaf, fx.Node) else leaf
                for leaf in outputs_of(self.lowered.module)
            )
        )
        needed = {node for draft in (*drafts, returned) for node in draft.placeholders}
        versions: dict[str, int] = {}
        segments = tuple(self._segment(draft, run, needed, versions) for draft, run in zip(drafts, runs, strict=True))
        numbers = {node for draft in (*drafts, returned) for node in draft.placeholders if node in self.flow.sizes}
        return Program(
            inputs=tuple(self._inputs()),
            sizes={node.name: node.meta["val"] for node in self.lowered.module.graph.nodes if node in numbers},
            floats={node.name: held.name for node, held in self.flow.floats.items() if node in numbers},
            segments=segments,
            epilogue=Epilogue(returned.module(), tuple(node.name for node in returned.placeholders)),
            device=self.scope.device,
            resumed=frozenset(position for position, run in enumerate(runs) if run.nodes[0].name in apart),
        )

    def _inputs(self) -> Iterable[Input]:
        index = 0
        for node in self.lowered.module.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                yield Input(node.name, self._kind(node, value, index), index, value)
                index += 1
            elif node.op == "get_attr" and not isinstance(getattr(self.lowered.module, node.target), fx.GraphModule):
                constant = getattr(self.lowered.module, node.target)
                yield Input(node.name, "constant", -1, constant)

    def _kind(self, node: fx.Node, value: Any, index: int) -> InputKind:
        if not isinstance(value, torch.Tensor):
            return "ragged" if _torch.is_ragged(value) else "number"
        if node.name in self.scope.host_scalars:
            return "scalar"
        return "static" if index in self.lowered.static else "tensor"

    def _draft(self, run: _Run) -> _Draft:
        draft = _Draft(self)
        for node in run.nodes:
            draft.add(node)
        for node in unfinished(run.nodes):
            draft.wait_for(node)
        return draft

    def _segment(self, draft: _Draft, run: _Run, needed: set[fx.Node], versions: dict[str, int]) -> Segment:
        if not run.reasons:
            under_ambient(draft.graph)
        outputs = tuple(node for node in draft.made if node in needed)
        draft.graph.output(tuple(draft.local[node] for node in outputs))
        storages = [node for node in draft.placeholders if node in self.flow.root]
        reads = tuple(Access(node.name, versions.get(node.name, 0)) for node in storages)
        written = dict.fromkeys(
            self.flow.root[argument]
            for node in run.nodes
            for argument in written_arguments(node)
            if argument in self.flow.root
        )
        writes = []
        for root in written:
            if root in draft.placeholders or root in outputs:
                versions[root.name] = versions.get(root.name, 0) + 1
                writes.append(Access(root.name, versions[root.name]))
        common = (
            draft.module(),
            tuple(node.name for node in draft.placeholders),
            tuple(node.name for node in outputs),
            reads,
            tuple(writes),
        )
        if run.reasons:
            return EagerSegment(*common, causes_first(run.reasons))
        return GraphSegment(*common, run.num_kernels(), run.device)


class _Draft:
    """The graph of one segment while it is made."""

    def __init__(self, builder: _Builder) -> None:
        self.builder = builder
        self.graph = fx.Graph()
        self.local: dict[fx.Node, fx.Node] = {}
        self.placeholders: dict[fx.Node, fx.Node] = {}
        self.made: list[fx.Node] = []
        self.attributes: dict[str, Any] = {}

    def add(self, node: fx.Node) -> None:
        """Run ``node`` in this segment."""
        for item in (node, *self.builder.flow.attached.get(node, ())):
            self._copy(item)
            if self.builder.flow.root.get(item, item) is item:
                self.made.append(item)

    def wait_for(self, node: fx.Node) -> None:
        """Wait here for the result of a collective: a graph ends all work that it begins, and bridges copy finished values.

        The graph's own wait in a later segment then finds nothing to wait for.
        """
        made = self.local[node]
        results = [made]
        if not isinstance(node.meta["val"], torch.Tensor):
            results = [self.graph.call_function(operator.getitem, (made, i)) for i in range(len(node.meta["val"]))]
        for result, value in zip(results, tensors_of(node.meta["val"]), strict=True):
            wait = self.graph.call_function(_torch.wait_tensor(), (result,))
            wait.name = self.builder.unique(f"{node.name}_wait")
            result.meta.setdefault("val", value)
            wait.meta = {**node.meta, "val": value}

    def resolve(self, node: fx.Node) -> fx.Node:
        """``node`` of the whole graph as a node of this segment."""
        flow = self.builder.flow
        if node not in self.local:
            if node.op == "get_attr" and isinstance(self._attribute(node), fx.GraphModule):
                self._copy(node)
                self.attributes[str(node.target)] = runnable(self._attribute(node))
            elif node in flow.views:
                self._copy(node)
            elif node in flow.source:
                copied = self.resolve(flow.source[node])
                self.local[node] = made = made_again(self.graph, node, copied, flow.source[node])
                if made is not copied:
                    made.name = self.builder.unique(f"{node.name}_view")
            else:
                self.local[node] = self.placeholders[node] = self._placeholder(node)
        return self.local[node]

    def _attribute(self, node: fx.Node) -> Any:
        return getattr(self.builder.lowered.module, str(node.target))

    def _copy(self, node: fx.Node) -> None:
        self.local[node] = self.graph.node_copy(node, self.resolve)
        # A view that several segments make has another name in each, since it may be constant in one and not in
        # another.
        _rename(self.local[node], self.builder.unique(node.name) if node in self.builder.flow.views else node.name)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        before = next(iter(self.graph.nodes), None)
        last = next(reversed(self.placeholders.values()), None)
        with self.graph.inserting_after(last) if last else self.graph.inserting_before(before):
            placeholder = self.graph.placeholder(node.name)
        _rename(placeholder, node.name)
        placeholder.meta = dict(node.meta)
        return placeholder

    def module(self) -> fx.GraphModule:
        return _torch.lazy_module(self.attributes, self.graph, "Segment")


def _rename(node: fx.Node, name: str) -> None:
    if node.name != name:  # setting it takes as long as making the node
        node.name = name


def under_ambient(graph: fx.Graph) -> None:
    """Have custom ops in ``graph``, which runs as a whole, enter the modes that they were traced under."""
    for node in graph.nodes:
        if (ambient := ambient_of(node)) is not None:
            node.target = ambient.around(node.target)


def runnable(body: fx.GraphModule) -> fx.GraphModule:
    """A body of a higher-order op, as it runs."""
    copied = copy.deepcopy(body)
    for module in graphs_in(copied):
        under_ambient(module.graph)
        module.recompile()
    return copied
