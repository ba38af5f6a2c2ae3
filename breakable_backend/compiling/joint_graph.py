"""From a graph that needs gradients to two ATen graphs: a forward, which saves what is needed, and a backward.

Both halves are traced at once, as eager runs them: the graph runs on fake tensors, and autograd computes the gradients
of its outputs. The part of the trace after that point is the backward. Nothing is moved, merged or computed a second
time, and mutations stay at their places, so the forward saves what eager's autograd saves. Only views are made again in
each half, from the value that made the storage, and they launch nothing.

A backward is for a *pattern* of incoming gradients: outputs that nobody uses get none, as in eager, and a gradient may
have another layout than its output. So there is one backward for each pattern.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.compiling.flat_inputs import PART, Wrapped
from breakable_backend.compiling.lowering import (
    CannotLower,
    Lowered,
    called_ops,
    kept_ops,
    note_ambient,
    note_outs,
    out_of_place_views,
)
from breakable_backend.compiling.traced import checkpointed
from breakable_backend.errors import EagerOutputError, first_line
from breakable_backend.ir.ambient_modes import AMBIENT_KEY
from breakable_backend.ir.effects import (
    BATCH_NORMS,
    bodies,
    draws,
    graphs_in,
    is_opaque,
    schema_name,
    storages_of,
    values_of,
    written_arguments,
)
from breakable_backend.ir.layout import STRIDED, TensorSpec
from breakable_backend.ir.views import alias_source, is_view, made_again
from breakable_backend.marks.call_ops import Absent, is_backward, is_call, site_of, unreached, without
from breakable_backend.marks.call_sites import Mark, Site, sites
from breakable_backend.marks.marking import EagerOps, Marks
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
class Forward:
    """The forward. It returns the outputs, and after them values that backwards need and that are no inputs or views."""

    lowered: Lowered
    num_outputs: int
    differentiable: tuple[int, ...]
    """The outputs that need gradients."""
    inner: tuple[int, ...]
    """Those from which others of them are computed, by their places among them."""
    saved: tuple[str, ...]
    """The names of the values after the outputs."""
    inputs: tuple[int, ...]
    """The inputs that backwards need."""
    written: tuple[int, ...]
    """Inputs whose version is counted up in a call, as in eager."""
    watched: tuple[int, ...]
    """Inputs that backwards need, and that may in some calls be views of written inputs."""
    once: str
    """Why it cannot run a second time unnoticed; empty if it can."""
    copied: tuple[int, ...]
    """The inputs that it writes, and of which a second run is given copies. Their values do not matter for it."""
    drawing: tuple[torch.device, ...]
    """The devices whose default generators its own ops draw from."""
    checked: tuple[int, ...]
    """The outputs whose memory a backward reads. A write to one invalidates the backward, in eager too."""
    aliases: tuple[Alias, ...]
    """Outputs in the place of which it returns None."""


@dataclass(frozen=True)
class Call:
    """The backward of a call of a marked function."""

    site: int
    handle: str
    """The name of the saved value that tells what the call has kept."""
    given: tuple[bool, ...]
    """Which results of the call are given gradients."""
    read: frozenset[int]
    """The places of the gradients that other ops read."""


@dataclass(frozen=True)
class Backward:
    """The backward for one pattern."""

    module: fx.GraphModule
    saved: tuple[str, ...]
    """Its first arguments: values that the forward saves."""
    inputs: tuple[int, ...]
    """Its next arguments: inputs of the forward."""
    gradients: tuple[int, ...]
    """Its last arguments: incoming gradients, by the places of their outputs among the differentiable ones."""
    checked: tuple[int, ...]
    """The outputs that it reads, by their places among those that the forward has checked."""
    sums: tuple[frozenset[int], ...]
    """For each gradient that it returns: the gradients of marked functions whose sum it is, if it is nothing else. They
    are numbered in the order of the backward."""
    needed: Mapping[int, Mark]
    """The marked functions of those of these gradients that other ops read, by number."""
    foreseen: tuple[Call, ...]
    """The calls that give these, where it can be told before whether they will."""
    absent: tuple[int, ...]
    """Those that it was traced without."""
    entangled: frozenset[int]
    """Gradients that share memory with its arguments, or with gradients before them."""
    wholes: tuple[Wrapped | None, ...]
    """For each gradient: the subclass of which it is a part, if it is one."""

    def lowered(self, static_inputs: frozenset[int], static_saved: frozenset[str]) -> Lowered:
        """The graph from which a program is made: inputs and saved values with fixed addresses are static."""
        places = [i for i, name in enumerate(self.saved) if name in static_saved]
        places += [len(self.saved) + i for i, index in enumerate(self.inputs) if index in static_inputs]
        return Lowered(self.module, frozenset(places))

    def absent_from(self, saved: Mapping[str, torch.Tensor]) -> Absent:
        """Gradients that other ops read, and that marked functions will not give in the backward of what was ``saved``."""
        return frozenset(
            (call.site, place)
            for call in self.foreseen
            for place in call.read & unreached(call.site, saved[call.handle], call.given)
        )

    def gradients_in(self, made: Sequence[Any]) -> list[Any]:
        """The gradients among its results. None for one to which no marked function gave anything.

        Raises:
            EagerOutputError: eager would not have run ops that read what was not given.
        """
        count = len(self.sums)
        came = [given for report in made[count:] for given in report.tolist()]
        if all(came):
            assert not self.absent
            return list(made[:count])
        assert not any(came[number] for number in self.absent)
        for number, mark in self.needed.items():
            if not came[number]:
                raise EagerOutputError(
                    f"the gradients of {mark.name} leave out one of its arguments, and did not when they were captured",
                    where=mark.source,
                    fix="have its backward return zeros in place of None, or compile with options={'training': False}",
                )
        return [
            None if terms and not any(came[number] for number in terms) else value
            for value, terms in zip(made[:count], self.sums, strict=True)
        ]


@dataclass(frozen=True)
class _Joint:
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

    def second(self) -> Iterator[fx.Node]:
        """The calls of the backward."""
        for node in self.module.graph.nodes:
            if node.op == "call_function" and node.name not in self.forward:
                yield node

    def used(self) -> Iterator[fx.Node]:
        """What the backward takes from the forward and from the inputs, with repetitions."""
        for node in self.second():
            yield from (argument for argument in node.all_input_nodes if self._is_before(argument))
        yield from (leaf for leaf in self.gradients if isinstance(leaf, fx.Node) and self._is_before(leaf))

    def calls(self) -> tuple[tuple[str, Any], ...]:
        """The calls of the forward. Values have the names that they have in another trace if these are the same there."""
        nodes = self.module.graph.nodes
        return tuple(
            (node.name, node.target) for node in nodes if node.op == "call_function" and node.name in self.forward
        )

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

    def foreseen(self) -> Iterator[Call]:
        """Backwards of marked functions that give what other ops read. Of each the forward has kept what it saved."""
        read: list[Any] = [result.args for result in self.sums()[1]]
        calls: list[Any] = [call for call in self.second() if is_backward(call.target)]
        numbers = [call.args[0] for call in calls]
        for call in calls:
            number, handle, grads, _ = call.args
            places = frozenset(place for maker, place in read if maker is call)
            if places and numbers.count(number) == 1 and handle.name in self.forward:
                yield Call(number, handle.name, tuple(grad is not None for grad in grads), places)

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
        found: dict[str, fx.Node] = {}
        for node in self.used():
            for root in _roots(node):
                if root.op == "call_function":
                    found[root.name] = root
        return found

    def inputs(self) -> tuple[int, ...]:
        """The inputs that the backward is made from."""
        roots = {root for node in self.used() for root in _roots(node)}
        count = len(self.placeholders) - len(self.given)
        return tuple(index for index, node in enumerate(self.placeholders[:count]) if node in roots)


@dataclass
class Halves:
    """Traces a graph of Dynamo's. Holds the graph and the layouts of its arguments, but no tensors.

    Raises:
        CannotLower: the graph is not supported; the text says why.
    """

    gm: fx.GraphModule
    eager_ops: EagerOps
    static: frozenset[int] = frozenset()
    """Inputs with fixed addresses."""
    inputs: tuple[tuple[TensorSpec, bool], ...] = ()
    """The layouts of the inputs, and whether they need gradients."""
    sites: tuple[Site, ...] = ()
    """Calls of marked functions that it owns."""
    forward: Forward | None = None
    backwards: dict[tuple[Pattern, Absent], Backward] = field(default_factory=dict)
    _calls: tuple[tuple[str, Any], ...] = ()
    """The calls of the forward, as its trace has them."""

    @classmethod
    def of(cls, gm: fx.GraphModule, eager_ops: EagerOps) -> Halves:
        """For a graph, made when Dynamo passes it on: the autocast around the call is then the caller's."""
        for module in graphs_in(gm):
            for node in module.graph.nodes:
                if why := _refused(module, node, inside=module is not gm):
                    raise CannotLower(why)
        note_ambient(gm)
        if note_outs(gm):
            raise CannotLower("it needs gradients, and calls ops with out=")
        made = cls._noted(gm, eager_ops)
        nodes = (node for module in graphs_in(gm) if module is not gm for node in module.graph.nodes)
        if made.varying and any(site_of(node.target, node.args) is not None for node in nodes):
            raise CannotLower("its sizes vary, and a marked function is called in a graph inside of it")
        return made

    @classmethod
    def _noted(cls, gm: fx.GraphModule, eager_ops: EagerOps) -> Halves:
        placeholders = gm.graph.find_nodes(op="placeholder")
        static = frozenset(index for index, node in enumerate(placeholders) if _torch.keeps_its_address(node))
        return cls(gm, eager_ops, static)

    @property
    def varying(self) -> tuple[int, ...]:
        """The inputs that are numbers, or tensors whose sizes vary."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        varies = (_varies(node.meta.get("example_value")) or _is_float(node) for node in placeholders)
        return tuple(index for index, does in enumerate(varies) if does)

    @property
    def floats(self) -> tuple[int, ...]:
        """Those of :attr:`varying` that are Python floats, each passed as a tensor of no dimensions."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        return tuple(index for index, node in enumerate(placeholders) if _is_float(node))

    @property
    def parts(self) -> tuple[int, ...]:
        """The inputs that are parts of subclasses: an attribute tells of which one."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        return tuple(index for index, node in enumerate(placeholders) if node.meta.get(PART))

    def at(self, numbers: Mapping[int, int | float]) -> Halves:
        """The same graph with constants for the inputs that are ``numbers``, which it does not take any more.

        A trace with symbols would have to guard on them, and Dynamo has installed its guards already.
        """
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        twins: dict[Site, Site] = {}
        for index, node in enumerate(self.gm.graph.find_nodes(op="placeholder")):
            copies[node] = numbers[index] if index in numbers else graph.node_copy(node)
        for node in self.gm.graph.nodes:
            if _is_item(node) and isinstance(number := copies[node.args[0]], float):
                copies[node] = number
            elif node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
                if (site := site_of(node.target, node.args)) is not None:
                    twins[site] = twins.get(site) or site.twin()
                    copies[node].args = (twins[site].number, *copies[node].args[1:])
        output = self.gm.graph.output_node()
        graph.output(fx.node.map_arg(output.args[0], copies.__getitem__)).meta.update(output.meta)
        made = self._noted(fx.GraphModule(self.gm, graph), self.eager_ops)
        made.sites = tuple(twins.values())
        return made

    @property
    def wanted(self) -> tuple[int, ...]:
        """The inputs that get gradients."""
        return tuple(index for index, (_, needs) in enumerate(self.inputs) if needs)

    def trace(self, args: Sequence[torch.Tensor], layouts: Mapping[int, TensorSpec]) -> Forward:
        """Make the forward, for arguments like ``args``, and the backward for gradients of outputs with these ``layouts``."""
        self.inputs = tuple((TensorSpec.of(value), value.requires_grad) for value in args)
        joint = self._joint(None)
        pattern = tuple(map(layouts.get, joint.differentiable))
        wanted = joint if len(joint.given) == len(pattern) and _pattern(joint) == pattern else self._joint(pattern)
        self._calls = joint.calls()
        known = {node.name: node for node in joint.module.graph.nodes}
        roots = {*joint.roots(), *wanted.roots()}
        inputs = tuple(sorted({*joint.inputs(), *wanted.inputs()}))
        if not set(joint.written).isdisjoint(self.parts):
            raise CannotLower("it writes an argument that is no plain tensor")
        self.forward = _forward(joint, self.static, tuple(name for name in known if name in roots), inputs)
        self.backwards[pattern, frozenset()] = self._backward(wanted)
        return self.forward

    def backward(self, pattern: Pattern, absent: Absent) -> Backward:
        """The backward for ``pattern`` without the ``absent`` gradients, which is traced if it is new."""
        if (pattern, absent) not in self.backwards:
            self.backwards[pattern, absent] = self._backward(self._joint(pattern, absent))
        return self.backwards[pattern, absent]

    def _backward(self, joint: _Joint) -> Backward:
        assert self.forward is not None
        if joint.calls() != self._calls:
            raise CannotLower("two traces of it are not the same")
        missing = joint.roots().keys() - set(self.forward.saved)
        if missing or not set(joint.inputs()) <= set(self.forward.inputs):
            raise CannotLower("its backward takes what the forward did not keep for it")
        return _backward(joint, self.forward)

    def _wholes(self) -> tuple[Wrapped | None, ...]:
        """For each gradient that was just traced: the subclass of which it is a part, if it is one."""
        made = (node for node in self.gm.graph.nodes if isinstance(node.target, Wrapped))
        wholes = {part.name: node.target.gradient for node in made for part in node.args}
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        return tuple(wholes.get(placeholders[index].name) for index in self.wanted)

    def _joint(self, pattern: Pattern | None, absent: Absent = frozenset()) -> _Joint:
        """Trace both halves for the gradients of ``pattern``. None: a gradient for each output, of the output's layout."""
        try:
            return self._traced(pattern, absent)
        except (CannotLower, _torch.dynamo_error()):
            raise
        except Exception as error:  # any exception of an op on fake tensors
            raise CannotLower(AT_RUN_TIME if _torch.is_about_numbers(error) else first_line(error)) from error

    def _traced(self, pattern: Pattern | None, absent: Absent) -> _Joint:
        for node in (node for module in graphs_in(self.gm) for node in module.graph.nodes):
            if isinstance(node.target, _torch.HigherOrderOperator) and node.target.name() not in KEPT:
                raise CannotLower(f"it calls {node.target.name()}")
        marks = Marks(self.eager_ops)
        marks.annotate(self.gm)
        kept, around = kept_ops(self.gm, self.eager_ops), marks.taken_apart(called_ops(self.gm))
        count = len(self.inputs)
        facts: dict[str, Any] = {}
        with _torch.tracing_both_halves(kept, around):
            values = [spec.empty().requires_grad_(needs) for spec, needs in self.inputs]
            if pattern is None:
                outputs = _Run(self.gm).run(*values)
                tangents: list[Any] = [TensorSpec.of(o).empty() for o in outputs if _needs(o)]
                values = [spec.empty().requires_grad_(needs) for spec, needs in self.inputs]
            else:
                tangents = [spec.empty() for spec in pattern if spec is not None]

            def both(*flat: Any) -> Any:
                primals, came = flat[:count], flat[count:]
                before = [(value.requires_grad, value._version) for value in primals]
                with without(absent):
                    outputs = _Run(self.gm).run(*primals)
                if any(map(_torch.is_traceable_wrapper_subclass, outputs)):
                    raise CannotLower("an output is no plain tensor")
                facts["forward"] = _torch.traced_so_far()
                for value, (needs, version) in zip(primals, before, strict=True):
                    if value.requires_grad is not needs or value.grad_fn is not None:
                        raise CannotLower("it writes a gradient's history into an argument")
                    if needs and value._version != version:
                        raise CannotLower("it writes an argument that needs gradients")
                facts["written"] = [i for i, value in enumerate(primals) if value._version != before[i][1]]
                facts["differentiable"] = [index for index, value in enumerate(outputs) if _needs(value)]
                differentiable = [outputs[index] for index in facts["differentiable"]]
                facts["given"] = [
                    place for place in range(len(differentiable)) if pattern is None or pattern[place] is not None
                ]
                if name := _torch.traced_otherwise(differentiable):
                    raise CannotLower(f"autograd traces another formula for {name} than it runs")
                facts["inner"] = _torch.inner_results(differentiable)
                taken = [differentiable[place] for place in facts["given"]]
                _torch.number_backward(taken)
                wanted = [value for value in primals if value.requires_grad]
                with _torch.autocast_off():
                    gradients = torch.autograd.grad(taken, wanted, list(came), allow_unused=True)
                return tuple(outputs), gradients

            module = _torch.trace_joint(both, [*values, *tangents])
            wholes = self._wholes()
        returned: Any = module.graph.output_node().args[0]
        outputs, gradients = returned
        placeholders = tuple(module.graph.find_nodes(op="placeholder"))
        renamed = _torch.name_inputs(placeholders[:count], self.gm)
        # The fake of a marked function writes nothing, and so counts no version.
        marked = [node for node in module.graph.nodes if is_call(node.target)]
        written_there = storages_of(*(argument for node in marked for argument in written_arguments(node)))
        written = [i for i, node in enumerate(placeholders[:count]) if not written_there.isdisjoint(storages_of(node))]
        joint = _Joint(
            module,
            frozenset(renamed.get(name, name) for name in facts["forward"]),
            tuple(outputs),
            tuple(gradients),
            tuple(facts["differentiable"]),
            tuple(facts["inner"]),
            placeholders,
            tuple(facts["given"]),
            tuple(sorted({*facts["written"], *written})),
            wholes,
            absent,
        )
        joint = replace(joint, aliases=tuple(_aliases(joint, self.inputs, self.parts)))
        _check(joint, count)
        if _has_checkpoint(self.gm) and any(_may_draw(node.target) for node in joint.second()):
            raise CannotLower("what a checkpoint computes again draws random numbers, or may")
        _attribute_backward(joint)
        return joint


def _refused(module: fx.GraphModule, node: fx.Node, *, inside: bool) -> str:
    """Why a node of Dynamo's graph keeps the graph eager."""
    if isinstance(node.target, _torch.HigherOrderOperator) and node.target.name() not in (*TRACED_THROUGH, *KEPT):
        return f"it needs gradients, and calls {node.target.name()}"
    if any("_checkpoint_context_fn" in body.meta for body in bodies(node)):
        return "it needs gradients, and has a selective checkpoint"
    is_graph = node.op == "get_attr" and isinstance(getattr(module, str(node.target), None), fx.GraphModule)
    if node.op in ("get_attr", "call_module") and not is_graph:
        return "it needs gradients, and holds tensors or modules of its own"
    if node.target is _torch.ENTER_INFERENCE_MODE:
        return "it enters or leaves inference mode"
    if node.op == "placeholder" and not inside:
        value: Any = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            return ""
        if type(value) not in _PLAIN or value.layout is not torch.strided:
            return "it needs gradients, and takes arguments that are no plain tensors"
        if any(_torch.lazy_bits(value)):
            return "it needs gradients, and takes a lazy conjugate"
    return ""


def _varies(value: Any) -> bool:
    """Whether a fake argument is a number, or has sizes that vary."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))
    return isinstance(value, torch.SymInt)


def _is_float(node: fx.Node) -> bool:
    """Whether an input is a Python float, which Dynamo passes as a tensor whose value is read."""
    read = [user.meta.get("example_value") for user in node.users if _is_item(user)]
    return bool(read) and len(read) == len(node.users) and all(map(_torch.is_argument_float, read))


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


KEPT = ("cond",)
"""Higher-order ops that stand in both halves. The backward of a branch is a branch, which computes the forward again."""

TRACED_THROUGH = (
    "autograd_function_apply",
    "invoke_subgraph",
    "tag_activation_checkpoint",
    "wrap_activation_checkpoint",
)
"""Higher-order ops that run as eager runs them (:mod:`breakable_backend.compiling.traced`), and so can be traced."""


class _Run(fx.Interpreter):
    """Runs a graph node by node, and the graphs in it too, so that each op is traced with the marks of its node."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _Body(value) if isinstance(value, fx.GraphModule) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is checkpointed:  # recomputed code draws nothing, and generators are not part of a trace
            kwargs = {**kwargs, "preserve_rng_state": False}
        return super().call_function(target, args, kwargs)


class _Body:
    """A graph inside another one, as a function of its inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.meta = module, module.meta

    def __call__(self, *args: Any) -> Any:
        return _Run(self.module).run(*args)

    forward = __call__


def _may_draw(op: Any) -> bool:
    """Whether an op may draw random numbers, and so would need the random state of its first run. Custom ops may, and branches."""
    return draws(op) or _is_unknown(op)


def _is_unknown(op: Any) -> bool:
    """Whether nobody can tell what else an op does. A branch may draw, and may be another one than before."""
    return isinstance(op, _torch.HigherOrderOperator) or (is_opaque(op) and not is_backward(op))


def _has_checkpoint(gm: fx.GraphModule) -> bool:
    return any(node.target is checkpointed for module in graphs_in(gm) for node in module.graph.nodes)


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, _torch.FakeTensor)


def _needs(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _pattern(joint: _Joint) -> Pattern:
    """The pattern of ``joint``, which was traced with a gradient for each output."""
    count = len(joint.placeholders) - len(joint.given)
    return tuple(TensorSpec.of(node.meta["val"]) for node in joint.placeholders[count:])


# --- checks ---------------------------------------------------------------------------------------------------------------


def _check(joint: _Joint, num_inputs: int) -> None:
    """Refuse a graph that the two halves would not keep right."""
    if not joint.differentiable:
        raise CannotLower("none of its outputs needs gradients")
    graph = joint.module.graph
    if any(tensor.layout is not torch.strided for tensor in values_of(*graph.nodes)):
        raise CannotLower("it makes sparse tensors, or its gradients are sparse")
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(joint.module, str(node.target))
        if isinstance(constant, fx.GraphModule):
            continue  # a branch
        if not isinstance(constant, torch.Tensor) or isinstance(constant, _torch.FakeTensor):
            raise CannotLower("it holds constants that cannot be traced")
    if any(_reaches_absolutely(node) for node in graph.nodes if node.name in joint.forward):
        raise CannotLower("it reaches into the memory of an argument by an absolute offset")
    taken: dict[int, str] = {
        _torch.storage_key(node.meta["val"]): "an argument" for node in joint.placeholders[:num_inputs]
    }
    aliased = {alias.output for alias in joint.aliases}
    for index, leaf in enumerate(joint.outputs):
        if isinstance(leaf, fx.Node) and isinstance(value := leaf.meta.get("val"), torch.Tensor):
            if (
                type(value) is not _torch.FakeTensor
                or value.layout is not torch.strided
                or any(_torch.lazy_bits(value))
            ):
                raise CannotLower("an output is no plain tensor")
            if index in aliased:
                continue
            if (of := taken.get(_torch.storage_key(value))) is not None:
                raise CannotLower(f"an output is, or views, {of}")
            taken[_torch.storage_key(value)] = "another output"
        elif isinstance(leaf, fx.Node):
            raise CannotLower("an output is a number")
    for index in joint.differentiable:
        if not isinstance(joint.outputs[index], fx.Node):
            raise CannotLower("an output is a constant that needs gradients")
    before = storages_of(*(node for node in graph.nodes if node.op == "placeholder" or node.name in joint.forward))
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        if any(isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) for number in (value,)):
            raise CannotLower(AT_RUN_TIME)
        if isinstance(node.target, _torch.HigherOrderOperator) and node.target.name() not in KEPT:
            raise CannotLower(f"it calls {node.target.name()}")
        if node.target is torch.ops.aten._efficientzerotensor.default:
            raise CannotLower("one of its gradients is a zero that has no memory")
        if node.name not in joint.forward and not before.isdisjoint(storages_of(*written_arguments(node))):
            raise CannotLower("its backward writes what it is given")
    for node in graph.nodes:
        if (called := site_of(node.target, node.args)) is not None:
            called.is_captured = True
    needed, foreseen = joint.sums()[1], {call.site for call in joint.foreseen()}
    for node in filter(needed.__contains__, joint.marked()):
        site = _site(node)
        if node.args[1] in (site.unforeseen if site.number in foreseen else site.left_out):
            raise CannotLower(f"{site.mark.name} gives one of its arguments no gradient")


def _attribute_backward(joint: _Joint) -> None:
    """Give nodes of the backward the user's line and the marks of the op whose gradient they compute."""
    first: dict[int, fx.Node] = {}
    for node in joint.module.graph.nodes:
        number = node.meta.get("seq_nr", -1)
        if node.op != "call_function":
            continue
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
    return any(root.op == "placeholder" for root in _roots(node.all_input_nodes[0]))


def _roots(node: fx.Node) -> Iterator[fx.Node]:
    """The values of the forward from which ``node`` is made, if views are made again."""
    source = _source(node)
    if source is None:
        yield node
    else:
        yield from _roots(source)


def _source(node: fx.Node) -> fx.Node | None:
    """What ``node`` is, or is a view of; None if it made, or first brought in, its storage."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and is_view(node.args[0]):
        node = node.args[0]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) and not is_view(node):
        return None
    if is_view(node):
        keys = storages_of(node)
        return next(argument for argument in node.all_input_nodes if not keys.isdisjoint(storages_of(argument)))
    for written in written_arguments(node):
        mine = written.meta.get("val")
        assert isinstance(value, torch.Tensor)
        if isinstance(mine, torch.Tensor) and _torch.storage_key(mine) == _torch.storage_key(value):
            return alias_source(node, written)
    return None


def _again(graph: fx.Graph, copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """A value of the forward in another ``graph``: what ``copies`` has, or a view of that."""
    if node in copies:
        return copies[node]
    if node.op == "get_attr" or is_view(node) or (node.target is operator.getitem and is_view(_maker(node))):
        copies[node] = graph.node_copy(node, lambda argument: _again(graph, copies, argument))
    else:  # an in-place op: its argument has the result already
        source = _source(node)
        assert source is not None, node
        if node.meta["val"].dtype is not source.meta["val"].dtype:
            raise CannotLower("it writes through a view of another dtype what its backward reads")
        copies[node] = made_again(graph, node, _again(graph, copies, source), source)
    return copies[node]


def _aliases(joint: _Joint, inputs: Sequence[tuple[TensorSpec, bool]], parts: Sequence[int]) -> Iterator[Alias]:
    """Outputs without a gradient that are, or view, another output, or an argument that is not one of ``parts``."""
    arguments = {node: index for index, node in enumerate(joint.placeholders[: len(inputs)]) if index not in parts}
    outputs = {leaf: index for index, leaf in enumerate(joint.outputs) if isinstance(leaf, fx.Node)}
    for index, leaf in enumerate(joint.outputs):
        if index in joint.differentiable or not isinstance(leaf, fx.Node) or not _is_tensor(leaf):
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
        graph.output(_again(graph, {source: graph.placeholder("source")}, leaf))
        of_argument = source in arguments
        place = arguments[source] if of_argument else outputs[source]
        needs = inputs[place][1] if of_argument else place in joint.differentiable
        called = {made.target for made in graph.nodes}
        if torch.ops.aten.as_strided.default in called:
            continue  # it counts from where a storage begins
        if needs and torch.ops.aten.detach.default not in called:
            continue
        yield Alias(index, place, of_argument, fx.GraphModule(joint.module, graph).forward)


def _forward(joint: _Joint, static: frozenset[int], saved: tuple[str, ...], inputs: tuple[int, ...]) -> Forward:
    aliased = {alias.output for alias in joint.aliases}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    count = len(joint.placeholders) - len(joint.given)
    tangents = set(joint.placeholders[count:])
    for node in joint.module.graph.nodes:
        if node not in tangents and (node.op == "get_attr" or node.name in joint.forward):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    by_name = {node.name: node for node in joint.module.graph.nodes}
    leaves = [None if index in aliased else leaf for index, leaf in enumerate(joint.outputs)]
    outputs = [copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    graph.output((*outputs, *(copies[by_name[name]] for name in saved)))
    module = fx.GraphModule(joint.module, graph)
    out_of_place_views(module)
    memory = {_torch.storage_key(by_name[name].meta["val"]) for name in saved if _is_tensor(by_name[name])}
    drawn = [node for node in module.graph.nodes if draws(node.target)]
    once, copied = _second_run(module, [outputs[index] for index in joint.differentiable])
    return Forward(
        Lowered(module, static),
        len(outputs),
        joint.differentiable,
        joint.inner,
        saved,
        inputs,
        joint.written,
        _watched(inputs, joint.written, static),
        once,
        copied,
        tuple(dict.fromkeys(value.device for value in values_of(*drawn))),
        tuple(
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, fx.Node) and _torch.storage_key(leaf.meta["val"]) in memory
        ),
        joint.aliases,
    )


def _second_run(module: fx.GraphModule, results: Sequence[Any]) -> tuple[str, tuple[int, ...]]:
    """Why a forward cannot run a second time for the gradients of ``results``, and the inputs that it then needs copies of.

    Counters and running statistics are written, and no result depends on what they were.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    if any(_is_unknown(node.target) for node in calls):
        return "it calls marked functions, or ops that are not torch's own", ()
    memory = storages_of(*(argument for node in calls for argument in _updated(node)))
    copied = tuple(index for index, node in enumerate(inputs) if not memory.isdisjoint(storages_of(node)))
    of_inputs = storages_of(*(inputs[index] for index in copied))
    depending = {inputs[index] for index in copied}
    for node in calls:
        statistics = _updated(node) if schema_name(node) in BATCH_NORMS else ()
        if not depending.isdisjoint(set(node.all_input_nodes).difference(statistics)):
            depending.add(node)
            if not storages_of(*_updated(node)) <= of_inputs:
                return DEPENDS, ()
    return (DEPENDS, ()) if not depending.isdisjoint(results) else ("", copied)


DEPENDS = "its results may depend on what an argument was before it is written"


def _updated(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a call writes, without the statistics of a batch norm that does not train."""
    reads = schema_name(node) in BATCH_NORMS and not argument_of(node, "training")
    return [] if reads else written_arguments(node)


def _watched(inputs: tuple[int, ...], written: tuple[int, ...], static: frozenset[int]) -> tuple[int, ...]:
    """Which of ``inputs`` may be views of ``written`` ones in some calls only. Two static ones always are, or never."""
    if not written:
        return ()
    return inputs if not static.issuperset(written) else tuple(index for index in inputs if index not in static)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _backward(joint: _Joint, forward: Forward) -> Backward:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    count = len(joint.placeholders) - len(joint.given)
    inputs, tangents = joint.placeholders[:count], joint.placeholders[count:]
    roots = joint.roots()
    taken = tuple(name for name in forward.saved if name in roots)
    indices = joint.inputs()
    for node in (*(roots[name] for name in taken), *(inputs[index] for index in indices), *tangents):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def again(node: fx.Node) -> fx.Node:
        return _again(graph, copies, node)

    for node in joint.module.graph.nodes:
        if node.op == "call_function" and node.name not in joint.forward:
            copies[node] = graph.node_copy(node, again)
    gradients = [again(leaf) if isinstance(leaf, fx.Node) else None for leaf in joint.gradients]
    graph.output((*gradients, *(copies[report] for report in joint.reports())))
    module = fx.GraphModule(joint.module, graph)
    out_of_place_views(module)
    numbers, (sums, needed) = joint.marked(), joint.sums()
    checked: list[Any] = [joint.outputs[index] for index in forward.checked]
    read = storages_of(*(roots[name] for name in taken))
    return Backward(
        module,
        taken,
        indices,
        joint.given,
        tuple(place for place, leaf in enumerate(checked) if not read.isdisjoint(storages_of(leaf))),
        tuple(frozenset(numbers[node] for node in sums.get(leaf, ())) for leaf in joint.gradients),
        {number: _site(node).mark for node, number in numbers.items() if node in needed},
        tuple(joint.foreseen()),
        tuple(number for node, number in numbers.items() if (_site(node).number, node.args[1]) in joint.absent),
        _entangled(module),
        joint.wholes,
    )


def _site(gradient: fx.Node) -> Site:
    """The call of a marked function that gives a gradient."""
    number: Any = _maker(gradient).args[0]
    return sites[number]


def _maker(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _entangled(module: fx.GraphModule) -> frozenset[int]:
    """Gradients that share memory with what comes in, or with others before them. They are copied for their receivers."""
    taken, found = storages_of(*module.graph.find_nodes(op="placeholder")), set()
    gradients: Any = module.graph.output_node().args[0]
    for place, leaf in enumerate(gradients):
        keys = storages_of(leaf) if isinstance(leaf, fx.Node) else set()
        if not taken.isdisjoint(keys):
            found.add(place)
        taken |= keys
    return frozenset(found)
