"""The two halves of a joint trace: a forward, which saves what is needed, and a backward for a pattern of gradients.

Mutations stay at their places, so the forward saves what eager's autograd saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.compiling.flat_inputs import Wrapped
from breakable_backend.compiling.joint_graph import (
    Alias,
    Joint,
    MarkedBackward,
    again_in,
    is_tensor,
    is_unknown,
    site_of_gradient,
)
from breakable_backend.compiling.lowering import Lowered, out_of_place_views
from breakable_backend.errors import EagerOutputError
from breakable_backend.ir.effects import BATCH_NORMS, draws, schema_name, storages_of, values_of, written_arguments
from breakable_backend.marks.call_ops import Absent, unreached
from breakable_backend.marks.call_sites import Mark
from breakable_backend.marks.rules import argument_of


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
    foreseen: tuple[MarkedBackward, ...]
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


# --- how they are cut out of the trace ------------------------------------------------------------------------------------


def forward_of(joint: Joint, static: frozenset[int], saved: tuple[str, ...], inputs: tuple[int, ...]) -> Forward:
    aliased = {alias.output for alias in joint.aliases}
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    tangents = set(joint.placeholders[joint.num_inputs :])
    for node in joint.module.graph.nodes:
        if node not in tangents and (node.op == "get_attr" or node.name in joint.forward):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    by_name = {node.name: node for node in joint.module.graph.nodes}
    leaves = [None if index in aliased else leaf for index, leaf in enumerate(joint.outputs)]
    outputs = [copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    graph.output((*outputs, *(copies[by_name[name]] for name in saved)))
    module = fx.GraphModule(joint.module, graph)
    out_of_place_views(module)
    memory = {_torch.storage_key(by_name[name].meta["val"]) for name in saved if is_tensor(by_name[name])}
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
    if any(is_unknown(node.target) for node in calls):
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


def backward_of(joint: Joint, forward: Forward) -> Backward:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs, tangents = joint.placeholders[: joint.num_inputs], joint.placeholders[joint.num_inputs :]
    roots = joint.roots()
    taken = tuple(name for name in forward.saved if name in roots)
    indices = joint.inputs()
    for node in (*(roots[name] for name in taken), *(inputs[index] for index in indices), *tangents):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def again(node: fx.Node) -> fx.Node:
        return again_in(graph, copies, node)

    for node in joint.second():
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
        {number: site_of_gradient(node).mark for node, number in numbers.items() if node in needed},
        tuple(joint.foreseen()),
        tuple(
            number for node, number in numbers.items() if (site_of_gradient(node).number, node.args[1]) in joint.absent
        ),
        _entangled(module),
        joint.wholes,
    )


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
