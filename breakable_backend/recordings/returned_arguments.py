"""Ops that return an argument against their schema, which promises a new tensor; found while a plain call runs them.

A program is cut by what schemas say. As long as nobody writes, it does not matter that the result is the argument. A
write to one of the two has to reach the other, but does not if one of them is copied for a captured segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.ir.effects import is_somebodys, storages_of, tensors_of, values_of, written_arguments
from breakable_backend.ir.overlap import Region
from breakable_backend.ir.program import Reason
from breakable_backend.ir.running_ops import has_memory
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.rules import label


def has_suspects(graph: fx.Graph) -> bool:
    """Whether a custom op comes before a write."""
    suspected = False
    for node in graph.nodes:
        if suspected and node.op == "call_function" and written_arguments(node):
            return True
        suspected = suspected or (is_somebodys(node) and bool(values_of(node)))
    return False


class ReturnedArguments:
    """Looks at the results of custom ops during one plain call."""

    def __init__(self) -> None:
        self._found: dict[fx.Node, list[tuple[int, int]]] = {}
        """For each op, pairs of storages that are two in the trace, by key, and were the same memory in the call."""

    def look(self, node: fx.Node, arguments: Any, result: Any) -> None:
        """A custom op, called for ``node`` with ``arguments``, has returned ``result``."""
        given = _pairs((node.args, node.kwargs), arguments)
        made = list(zip(values_of(node), tensors_of(result), strict=False))
        candidates = [*((one, other) for one in made for other in given), *combinations(made, 2)]
        shared = [(one[0], other[0]) for one, other in candidates if _share(one[1], other[1])]
        keys = [(_torch.storage_key(one), _torch.storage_key(other)) for one, other in shared]
        found = [(one, other) for one, other in keys if one != other]
        if found:
            self._found[node] = found

    def reasons(self, graph: fx.Graph) -> Mapping[str, Reason]:
        """Why the program runs eagerly, by the name of the op: something after it writes what it returned."""
        groups: list[frozenset[int]] = []
        for pair in (frozenset(pair) for pairs in self._found.values() for pair in pairs):
            groups = [*(group for group in groups if not group & pair), pair.union(*(g for g in groups if g & pair))]
        return dict(self._reasons(graph, groups))

    def _reasons(self, graph: fx.Graph, groups: list[frozenset[int]]) -> Iterator[tuple[str, Reason]]:
        order = {node: position for position, node in enumerate(graph.nodes)}
        for op, pairs in self._found.items():
            memory = frozenset[int]().union(*(group for group in groups for pair in pairs if pair[0] in group))
            for node in graph.nodes:
                if order[node] > order[op] and not memory.isdisjoint(_written(node)):
                    what = "returns its argument, or one tensor twice, although its schema promises a new one"
                    text = f"{what}, and {label(node)} writes it"
                    yield op.name, Reason("hands_back", text, label(op), source_line(op), whole_program=True)
                    break


def _pairs(nodes: Any, values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The fake tensors among the arguments of a node, each with its real tensor in this call."""
    leaves = zip(pytree.tree_leaves(nodes), pytree.tree_leaves(values), strict=True)
    fakes = ((leaf.meta.get("val") if isinstance(leaf, fx.Node) else None, value) for leaf, value in leaves)
    return [(fake, value) for fake, value in fakes if isinstance(fake, torch.Tensor) and has_memory(value)]


def _written(node: fx.Node) -> set[int]:
    return storages_of(*written_arguments(node)) if node.op == "call_function" else set()


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the two lie in the same memory, whatever their storages."""
    if not (has_memory(one) and has_memory(other)) or one.device != other.device:
        return False
    return Region.of(one).may_share(Region.of(other))
