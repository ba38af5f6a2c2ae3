"""One trace with both halves of a graph that needs gradients, and what its nodes are to each other.

The halves are traced at once, as eager runs them: the graph runs on fake tensors, and autograd computes the gradients of
its outputs. The part of the trace after that point is the backward. Nothing is moved, merged or computed a second time.
Only views are made again in each half, from the value that made the storage, and they launch nothing.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.compiling.flat_inputs import Wrapped
from breakable_backend.compiling.lowering import CannotLower
from breakable_backend.ir.ambient_modes import AMBIENT_KEY
from breakable_backend.ir.effects import calls_in, is_opaque, schema_name, storages_of, values_of, written_arguments
from breakable_backend.ir.layout import STRIDED, TensorSpec
from breakable_backend.ir.views import alias_source, is_view, made_again
from breakable_backend.marks.call_ops import Absent, is_backward, site_of
from breakable_backend.marks.call_sites import Site, sites
from breakable_backend.marks.rules import argument_of

AT_RUN_TIME = "it computes with numbers, or makes sizes, that are known only at run time"

Pattern = tuple[TensorSpec | None, ...]
"""For each output that can be differentiated: the layout of its gradient; None if it gets none."""


@dataclass(frozen=True)
class Alias:
    """An output without a gradient that is an argument or another output, or views one. It is made from that again."""

    output: int
    source: int
    """The position of the argument, or of the other output."""
    of_argument: bool
    views: Callable[[torch.Tensor], torch.Tensor]
    """Makes the output. An argument that was written in place is returned itself."""

    def made(self, args: Sequence[Any], results: Sequence[Any]) -> torch.Tensor:
        """The output of a call with ``args`` that has the other ``results``."""
        return self.views((args if self.of_argument else results)[self.source])


@dataclass(frozen=True)
class MarkedBackward:
    """The backward of a call of a marked function."""

    site: int
    handle: str
    """The name of the saved value that tells what the call has kept."""
    given: tuple[bool, ...]
    """Which results of the call are given gradients."""
    read: frozenset[int]
    """The places of the gradients that other ops read."""


@dataclass(frozen=True)
class Joint:
    """One trace with both halves."""

    module: fx.GraphModule
    forward: frozenset[str]
    """The names of the nodes of the forward."""
    outputs: tuple[Any, ...]
    gradients: tuple[Any, ...]
    differentiable: tuple[int, ...]
    inner: tuple[int, ...]
    placeholders: tuple[fx.Node, ...]
    """The inputs, and after them the incoming gradients."""
    given: tuple[int, ...]
    """The places of the incoming gradients among the differentiable outputs."""
    written: tuple[int, ...]
    """Inputs whose version is counted up."""
    wholes: tuple[Wrapped | None, ...]
    """For each gradient: the subclass of which it is a part, if it is one."""
    absent: Absent = frozenset()
    """Gradients that it was traced without."""
    aliases: tuple[Alias, ...] = ()

    @property
    def num_inputs(self) -> int:
        """How many of :attr:`placeholders` are inputs."""
        return len(self.placeholders) - len(self.given)

    def second(self) -> Iterator[fx.Node]:
        """The calls of the backward."""
        return (node for node in calls_in(self.module) if node.name not in self.forward)

    def used(self) -> Iterator[fx.Node]:
        """What the backward takes from the forward and from the inputs, with repetitions."""
        for node in self.second():
            yield from (argument for argument in node.all_input_nodes if self._is_before(argument))
        yield from (leaf for leaf in self.gradients if isinstance(leaf, fx.Node) and self._is_before(leaf))

    def calls(self) -> tuple[tuple[str, Any], ...]:
        """The calls of the forward. Values have the names that they have in another trace if these are the same there."""
        return tuple((node.name, node.target) for node in calls_in(self.module) if node.name in self.forward)

    def _is_before(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or node.name in self.forward

    def marked(self) -> dict[fx.Node, int]:
        """The gradients that marked functions give, numbered as in the reports."""
        given = (results[:-1] for results in self._results())
        return {node: number for number, node in enumerate(itertools.chain(*given))}

    def reports(self) -> list[fx.Node]:
        """The results that tell which of these gradients there were."""
        return [results[-1] for results in self._results()]

    def _results(self) -> Iterator[list[fx.Node]]:
        for call in self.second():
            if is_backward(call.target):
                assert len(call.users) == len(call.meta["val"]), "a trace takes each result out"
                yield list(call.users)

    def foreseen(self) -> Iterator[MarkedBackward]:
        """Backwards of marked functions that give what other ops read. Of each the forward has kept what it saved."""
        read: list[Any] = [result.args for result in self.sums()[1]]
        calls: list[Any] = [call for call in self.second() if is_backward(call.target)]
        numbers = [call.args[0] for call in calls]
        for call in calls:
            number, handle, grads, _ = call.args
            places = frozenset(place for maker, place in read if maker is call)
            if places and numbers.count(number) == 1 and handle.name in self.forward:
                yield MarkedBackward(number, handle.name, tuple(grad is not None for grad in grads), places)

    def sums(self) -> tuple[dict[fx.Node, frozenset[fx.Node]], set[fx.Node]]:
        """Values that are gradients of marked functions or sums of these alone, and those of them that other ops read.

        If one of several is not there, :func:`nothing_like` in its place changes no bit of their sum.
        """
        found = {node: frozenset((node,)) for node in self.marked()}
        needed: set[fx.Node] = set()
        for node in self.second():
            if not _torch.adds_gradients(node):
                needed.update(*(found.get(argument, ()) for argument in node.all_input_nodes))
            elif all(argument in found for argument in node.all_input_nodes):
                found[node] = frozenset().union(*(found[argument] for argument in node.all_input_nodes))
        return found, needed

    def roots(self) -> dict[str, fx.Node]:
        """The values of the forward that have to be kept, since the backward is made from them."""
        return {root.name: root for root in map(_root, self.used()) if root.op == "call_function"}

    def inputs(self) -> tuple[int, ...]:
        """The inputs that the backward is made from."""
        roots = set(map(_root, self.used()))
        return tuple(index for index, node in enumerate(self.placeholders[: self.num_inputs]) if node in roots)


KEPT = ("cond",)
"""Higher-order ops that stand in both halves. The backward of a branch is a branch, which computes the forward again."""


def is_unknown(op: Any) -> bool:
    """Whether nobody can tell what else an op does. A branch may draw, and may be another one than before."""
    return isinstance(op, _torch.HigherOrderOperator) or (is_opaque(op) and not is_backward(op))


def pattern_of(joint: Joint) -> Pattern:
    """The pattern of ``joint``, which was traced with a gradient for each output."""
    return tuple(TensorSpec.of(node.meta["val"]) for node in joint.placeholders[joint.num_inputs :])


# --- checks ---------------------------------------------------------------------------------------------------------------


def check(joint: Joint) -> None:
    """Refuse a graph that the two halves would not keep right."""
    if not joint.differentiable:
        raise CannotLower("none of its outputs needs gradients")
    graph = joint.module.graph
    for node in graph.nodes:
        if any(tensor.layout is not torch.strided for tensor in values_of(node)):
            raise CannotLower("it makes sparse tensors, or its gradients are sparse", node)
        if node.name in joint.forward and _reaches_absolutely(node):
            raise CannotLower("it reaches into the memory of an argument by an absolute offset", node)
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(joint.module, str(node.target))
        if isinstance(constant, fx.GraphModule):
            continue  # a branch
        if not isinstance(constant, torch.Tensor) or isinstance(constant, _torch.FakeTensor):
            raise CannotLower("it holds constants that cannot be traced")
    taken: dict[int, str] = {
        _torch.storage_key(node.meta["val"]): "an argument" for node in joint.placeholders[: joint.num_inputs]
    }
    aliased = {alias.output for alias in joint.aliases}
    for index, leaf in enumerate(joint.outputs):
        if isinstance(leaf, fx.Node) and isinstance(value := leaf.meta.get("val"), torch.Tensor):
            plain = type(value) is _torch.FakeTensor and value.layout is torch.strided
            if not plain or any(_torch.lazy_bits(value)):
                raise CannotLower("an output is no plain tensor", leaf)
            if index in aliased:
                continue
            if (of := taken.get(_torch.storage_key(value))) is not None:
                raise CannotLower(f"an output is, or views, {of}", leaf)
            taken[_torch.storage_key(value)] = "another output"
        elif isinstance(leaf, fx.Node):
            raise CannotLower("an output is a number", leaf)
    for index in joint.differentiable:
        if not isinstance(joint.outputs[index], fx.Node):
            raise CannotLower("an output is a constant that needs gradients")
    before = storages_of(*(node for node in graph.nodes if node.op == "placeholder" or node.name in joint.forward))
    for node in calls_in(joint.module):
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            raise CannotLower(AT_RUN_TIME, node)
        if isinstance(node.target, _torch.HigherOrderOperator) and node.target.name() not in KEPT:
            raise CannotLower(f"it calls {node.target.name()}", node)
        if node.target is torch.ops.aten._efficientzerotensor.default:
            raise CannotLower("one of its gradients is a zero that has no memory", node)
        if node.name not in joint.forward and not before.isdisjoint(storages_of(*written_arguments(node))):
            raise CannotLower("its backward writes what it is given", node)
    for node in graph.nodes:
        if (called := site_of(node.target, node.args)) is not None:
            called.is_captured = True
    needed, foreseen = joint.sums()[1], {call.site for call in joint.foreseen()}
    for node in filter(needed.__contains__, joint.marked()):
        site = site_of_gradient(node)
        if node.args[1] in (site.unforeseen if site.number in foreseen else site.left_out):
            raise CannotLower(f"{site.mark.name} gives one of its arguments no gradient", node)


def attribute_backward(joint: Joint) -> None:
    """Give nodes of the backward the user's line and the marks of the op whose gradient they compute."""
    first: dict[int, fx.Node] = {}
    for node in calls_in(joint.module):
        number = node.meta.get("seq_nr", -1)
        if node.name in joint.forward:
            first.setdefault(number, node)
            continue
        custom = {key: value for key, value in node.meta.get("custom", {}).items() if key != AMBIENT_KEY}
        if (of := first.get(number)) is not None:
            inherited = {key: value for key, value in of.meta.get("custom", {}).items() if key != AMBIENT_KEY}
            custom = {**inherited, **custom}
            for key in ("stack_trace", "nn_module_stack"):
                if of.meta.get(key) and not node.meta.get(key):
                    node.meta[key] = of.meta[key]
        node.meta["custom"] = custom


# --- taking the trace apart -----------------------------------------------------------------------------------------------


def _reaches_absolutely(node: fx.Node) -> bool:
    """Whether it counts from where the storage of an argument begins. Fakes begin there: gradients would be of other elements."""
    if schema_name(node) not in STRIDED or argument_of(node, "storage_offset") is None:
        return False
    return _root(node.all_input_nodes[0]).op == "placeholder"


def _root(node: fx.Node) -> fx.Node:
    """The value of the forward from which ``node`` is made, if views are made again."""
    while (source := _source(node)) is not None:
        node = source
    return node


def _source(node: fx.Node) -> fx.Node | None:
    """What ``node`` is, or is a view of; None if it made, or first brought in, its storage."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_view(node.args[0]):
        node = node.args[0]
    if is_view(node):
        keys = storages_of(node)
        return next(argument for argument in node.all_input_nodes if not keys.isdisjoint(storages_of(argument)))
    for written in written_arguments(node) if is_tensor(node) else ():
        if is_tensor(written) and storages_of(written) == storages_of(node):
            return alias_source(node, written)
    return None


def again_in(graph: fx.Graph, copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """A value of the forward in another ``graph``: what ``copies`` has, or a view of that."""
    if node in copies:
        return copies[node]
    if node.op == "get_attr" or is_view(node) or (node.target is operator.getitem and is_view(_maker(node))):
        copies[node] = graph.node_copy(node, lambda argument: again_in(graph, copies, argument))
    else:  # an in-place op: its argument has the result already
        source = _source(node)
        assert source is not None, node
        if node.meta["val"].dtype is not source.meta["val"].dtype:
            raise CannotLower("it writes through a view of another dtype what its backward reads", node)
        copies[node] = made_again(graph, node, again_in(graph, copies, source), source)
    return copies[node]


def aliases_in(joint: Joint, inputs: Sequence[tuple[TensorSpec, bool]], parts: Sequence[int]) -> Iterator[Alias]:
    """Outputs without a gradient that are, or view, another output, or an argument that is not one of ``parts``."""
    arguments = {node: index for index, node in enumerate(joint.placeholders[: len(inputs)]) if index not in parts}
    outputs = {leaf: index for index, leaf in enumerate(joint.outputs) if isinstance(leaf, fx.Node)}
    for index, leaf in enumerate(joint.outputs):
        if index in joint.differentiable or not isinstance(leaf, fx.Node) or not is_tensor(leaf):
            continue
        node: fx.Node | None = leaf
        source = None
        while node is not None:
            if node in arguments or (node in outputs and outputs[node] != index):
                source = node
            node = _source(node)
        if source is None:
            continue
        graph = fx.Graph()
        graph.output(again_in(graph, {source: graph.placeholder("source")}, leaf))
        of_argument = source in arguments
        place = arguments[source] if of_argument else outputs[source]
        needs = inputs[place][1] if of_argument else place in joint.differentiable
        called = {made.target for made in graph.nodes}
        if torch.ops.aten.as_strided.default in called:
            continue  # it counts from where a storage begins
        if needs and torch.ops.aten.detach.default not in called:
            continue
        yield Alias(index, place, of_argument, fx.GraphModule(joint.module, graph).forward)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def site_of_gradient(gradient: fx.Node) -> Site:
    """The call of a marked function that gives a gradient."""
    number: Any = _maker(gradient).args[0]
    return sites[number]


def _maker(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]
