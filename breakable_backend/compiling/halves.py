"""From a graph that needs gradients to two ATen graphs: a forward, which saves what is needed, and a backward.

A backward is for a *pattern* of incoming gradients: outputs that nobody uses get none, as in eager, and a gradient may
have another layout than its output. So there is one backward for each pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.compiling.flat_inputs import PART, Wrapped
from breakable_backend.compiling.forward_and_backward import Backward, Forward, backward_of, forward_of
from breakable_backend.compiling.joint_graph import (
    AT_RUN_TIME,
    KEPT,
    Joint,
    Pattern,
    aliases_in,
    attribute_backward,
    check,
    is_unknown,
    pattern_of,
)
from breakable_backend.compiling.lowering import CannotLower, called_ops, kept_ops, note_ambient, note_outs
from breakable_backend.compiling.traced import checkpointed
from breakable_backend.errors import first_line
from breakable_backend.ir.effects import bodies, draws, graphs_in, storages_of, written_arguments, written_values
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.marks.call_ops import Absent, is_call, site_of, without
from breakable_backend.marks.call_sites import Site
from breakable_backend.marks.marking import EagerOps, Marks


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
    forward: Forward = field(init=False, repr=False)
    """Made by :meth:`trace`."""
    backwards: dict[tuple[Pattern, Absent], Backward] = field(default_factory=dict)
    _calls: tuple[tuple[str, Any], ...] = ()
    """The calls of the forward, as its trace has them."""

    @classmethod
    def of(cls, gm: fx.GraphModule, eager_ops: EagerOps) -> Halves:
        """For a graph, made when Dynamo passes it on: the autocast around the call is then the caller's."""
        for module in graphs_in(gm):
            for node in module.graph.nodes:
                if why := _refused(module, node, inside=module is not gm):
                    raise CannotLower(why, node)
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
    def _placeholders(self) -> list[fx.Node]:
        return self.gm.graph.find_nodes(op="placeholder")

    @property
    def varying(self) -> tuple[int, ...]:
        """The inputs that are numbers, or tensors whose sizes vary."""
        varies = (_varies(node.meta.get("example_value")) or _is_float(node) for node in self._placeholders)
        return tuple(index for index, does in enumerate(varies) if does)

    @property
    def floats(self) -> tuple[int, ...]:
        """Those of :attr:`varying` that are Python floats, each passed as a tensor of no dimensions."""
        return tuple(index for index, node in enumerate(self._placeholders) if _is_float(node))

    @property
    def parts(self) -> tuple[int, ...]:
        """The inputs that are parts of subclasses: an attribute tells of which one."""
        return tuple(index for index, node in enumerate(self._placeholders) if node.meta.get(PART))

    def at(self, numbers: Mapping[int, int | float]) -> Halves:
        """The same graph with constants for the inputs that are ``numbers``, which it does not take any more.

        A trace with symbols would have to guard on them, and Dynamo has installed its guards already.
        """
        graph, copies = fx.Graph(), dict[fx.Node, Any]()
        twins: dict[Site, Site] = {}
        for index, node in enumerate(self._placeholders):
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
        wanted = joint if len(joint.given) == len(pattern) and pattern_of(joint) == pattern else self._joint(pattern)
        self._calls = joint.calls()
        known = {node.name: node for node in joint.module.graph.nodes}
        roots = {*joint.roots(), *wanted.roots()}
        inputs = tuple(sorted({*joint.inputs(), *wanted.inputs()}))
        if not set(joint.written).isdisjoint(self.parts):
            raise CannotLower("it writes an argument that is no plain tensor")
        self.forward = forward_of(joint, self.static, tuple(name for name in known if name in roots), inputs)
        self.backwards[pattern, frozenset()] = self._backward(wanted)
        return self.forward

    def backward(self, pattern: Pattern, absent: Absent) -> Backward:
        """The backward for ``pattern`` without the ``absent`` gradients, which is traced if it is new."""
        if (pattern, absent) not in self.backwards:
            self.backwards[pattern, absent] = self._backward(self._joint(pattern, absent))
        return self.backwards[pattern, absent]

    def _backward(self, joint: Joint) -> Backward:
        if joint.calls() != self._calls:
            raise CannotLower("two traces of it are not the same")
        missing = joint.roots().keys() - set(self.forward.saved)
        if missing or not set(joint.inputs()) <= set(self.forward.inputs):
            raise CannotLower("its backward takes what the forward did not keep for it")
        return backward_of(joint, self.forward)

    def _wholes(self) -> tuple[Wrapped | None, ...]:
        """For each gradient that was just traced: the subclass of which it is a part, if it is one."""
        made = (node for node in self.gm.graph.nodes if isinstance(node.target, Wrapped))
        wholes = {part.name: node.target.gradient for node in made for part in node.args}
        placeholders = self._placeholders
        return tuple(wholes.get(placeholders[index].name) for index in self.wanted)

    def _joint(self, pattern: Pattern | None, absent: Absent = frozenset()) -> Joint:
        """Trace both halves for the gradients of ``pattern``. None: a gradient for each output, of the output's layout."""
        try:
            return self._traced(pattern, absent)
        except (CannotLower, _torch.dynamo_error()):
            raise
        except Exception as error:  # any exception of an op on fake tensors
            known = AT_RUN_TIME if _torch.is_about_numbers(error) else _WRITES if _torch.is_about_leaves(error) else ""
            raise CannotLower(known or first_line(error)) from error

    def _traced(self, pattern: Pattern | None, absent: Absent) -> Joint:
        for node in (node for module in graphs_in(self.gm) for node in module.graph.nodes):
            if isinstance(node.target, _torch.HigherOrderOperator) and node.target.name() not in KEPT:
                raise CannotLower(f"it calls {node.target.name()}", node)
        marks = Marks(self.eager_ops)
        marks.annotate(self.gm)
        kept, around = kept_ops(self.gm, self.eager_ops), marks.taken_apart(called_ops(self.gm))
        count = len(self.inputs)
        facts: dict[str, Any] = {}
        cached = torch.is_autocast_cache_enabled()
        with _torch.tracing_both_halves(kept, around):
            values = [spec.empty().requires_grad_(needs) for spec, needs in self.inputs]
            if pattern is None:
                with _torch.autocast_cache(cached):
                    outputs = _Run(self.gm).run(*values)
                tangents: list[Any] = [TensorSpec.of(o).empty() for o in outputs if _needs(o)]
                values = [spec.empty().requires_grad_(needs) for spec, needs in self.inputs]
            else:
                tangents = [spec.empty() for spec in pattern if spec is not None]

            def both(*flat: Any) -> Any:
                primals, came = flat[:count], flat[count:]
                before = [(value.requires_grad, value._version) for value in primals]
                with without(absent), _torch.autocast_cache(cached):
                    outputs = _Run(self.gm).run(*primals)
                if any(map(_torch.is_traceable_wrapper_subclass, outputs)):
                    raise CannotLower("an output is no plain tensor")
                facts["forward"] = _torch.traced_so_far()
                for value, (needs, version) in zip(primals, before, strict=True):
                    if value.requires_grad is not needs or value.grad_fn is not None:
                        raise CannotLower("it writes a gradient's history into an argument")
                    if needs and value._version != version:
                        raise CannotLower(_WRITES)
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
                with _torch.autocast_off(), _torch.autocast_cache(False):  # checkpoints enter regions of their own
                    gradients = torch.autograd.grad(taken, wanted, list(came), allow_unused=True)
                return tuple(outputs), gradients

            module = _torch.trace_joint(both, [*values, *tangents])
            facts["wholes"] = self._wholes()
        joint = self._joint_of(module, facts, absent)
        attribute_backward(joint)
        check(joint)
        # What may draw, as custom ops and branches may, would need the random state of its first run.
        called = (node.target for part in graphs_in(self.gm) for node in part.graph.nodes)
        for node in joint.second() if checkpointed in called else ():
            if draws(node.target) or is_unknown(node.target):
                raise CannotLower("what a checkpoint computes again draws random numbers, or may", node)
        return joint

    def _joint_of(self, module: fx.GraphModule, facts: Mapping[str, Any], absent: Absent) -> Joint:
        """The trace in ``module``, with the ``facts`` that were found while it was made."""
        count = len(self.inputs)
        returned: Any = module.graph.output_node().args[0]
        outputs, gradients = returned
        placeholders = tuple(module.graph.find_nodes(op="placeholder"))
        renamed = _torch.name_inputs(placeholders[:count], self.gm)
        # The fake of a marked function writes nothing, and so counts no version.
        marked = [node for node in module.graph.nodes if is_call(node.target)]
        written_there = storages_of(*(argument for node in marked for argument in written_arguments(node)))
        written = [i for i, node in enumerate(placeholders[:count]) if not written_there.isdisjoint(storages_of(node))]
        joint = Joint(
            module,
            frozenset(renamed.get(name, name) for name in facts["forward"]),
            tuple(outputs),
            tuple(gradients),
            tuple(facts["differentiable"]),
            tuple(facts["inner"]),
            placeholders,
            tuple(facts["given"]),
            tuple(sorted({*facts["written"], *written})),
            facts["wholes"],
            absent,
        )
        return replace(joint, aliases=tuple(aliases_in(joint, self.inputs, self.parts)))


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


_WRITES = "it writes an argument that needs gradients"
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
        written = (
            [written_values(op, args, kwargs) for op in _torch.overloads(target)] if torch.is_grad_enabled() else []
        )
        before = [(value, value.grad_fn) for value in pytree.tree_leaves(written) if _needs(value)]
        result = super().call_function(target, args, kwargs)
        if any(value.grad_fn is node for value, node in before):
            raise CannotLower("an op without an autograd kernel writes what needs gradients")
        return result


class _Body:
    """A graph inside another one, as a function of its inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.meta = module, module.meta

    def __call__(self, *args: Any) -> Any:
        return _Run(self.module).run(*args)

    forward = __call__


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, _torch.FakeTensor)


def _needs(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
