"""Graphs of Dynamo's that take lists and dicts of tensors (from compiled autograd), changed to take the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from breakable_backend._torch import pytree

CONTAINERS = (list, tuple, dict)


@dataclass(frozen=True)
class FlatGraph:
    """A graph that takes the contents of containers in their place."""

    module: fx.GraphModule
    inputs: Sequence[Any]
    stolen: tuple[bool | None, ...] | None = None
    """For each argument of Dynamo's graph: None if it is not a container, or else whether Dynamo wants it emptied. None
    if no argument is a container."""

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> FlatGraph:
        """For Dynamo's graph and its arguments. With a container among these it is a new graph: Dynamo keeps its own."""
        if not any(isinstance(value, CONTAINERS) for value in inputs):
            return cls(gm, inputs)
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        containers: dict[fx.Node, Any] = {}
        flat: list[Any] = []
        stolen: list[bool | None] = []
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(value, CONTAINERS):
                leaves, spec = pytree.tree_flatten(value)
                inside = [graph.placeholder(f"{node.name}_{number}") for number in range(len(leaves))]
                containers[node] = pytree.tree_unflatten(inside, spec)
                flat += leaves
                stolen.append(bool(node.meta.get("steal_arg")))
            else:
                copies[node] = graph.node_copy(node)
                flat.append(value)
                stolen.append(None)
        for node, container in containers.items():
            copies[node] = graph.call_function(_as_it_is, (container,))
        graph.output(graph.graph_copy(gm.graph, copies))
        graph.output_node().meta.update(gm.graph.output_node().meta)
        return cls(fx.GraphModule(gm, graph), flat, tuple(stolen))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which takes flat arguments, as a function of Dynamo's arguments."""
        if self.stolen is None:
            return function
        stolen = self.stolen

        def flattening(*args: Any) -> Any:
            flat: list[Any] = []
            for argument, emptied in zip(args, stolen, strict=True):
                flat += [argument] if emptied is None else pytree.tree_leaves(argument)
                if emptied:
                    argument.clear()  # the caller does not hold the tensors any more
            return function(*flat)

        flattening.__dict__.update(function.__dict__)  # attributes that reports read
        return flattening


def _as_it_is(container: Any) -> Any:
    """A container of values, as a node."""
    return container
