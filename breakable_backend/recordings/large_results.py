"""Large results that leave the pool inside of the graph that makes them.

A result is the caller's, so it is copied to new memory. If that is done after the graph, each result exists twice until
then, and the pool has room for all of them: the gradients of a backward take as much as the parameters. So a graph
copies a large result by itself, right after the last op that touches it, and ops after it may get its memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.drivers import Capturing
from breakable_backend.ir.effects import calls_in, is_opaque, producer_of, storages_of
from breakable_backend.ir.layout import TensorSpec, has_gaps, non_owning
from breakable_backend.ir.program import GraphSegment, outputs_of
from breakable_backend.recordings.copies import clones_exactly
from breakable_backend.recordings.epilogue import inputs_behind
from breakable_backend.recordings.locations import Locations
from breakable_backend.recordings.recording import Out, Variable
from breakable_backend.recordings.repair import acts_outside
from breakable_backend.recordings.specialised import Plan, SpecialisedProgram

LARGE = 4 << 20
"""In bytes. Smaller results matter little for the pool, and are copied together, by one launch. With 1 MiB a GPT whose
gradients have 2 MiB and more reserves as much memory, and takes the same time (H200)."""


class LargeResults:
    """The results that one segment copies out by itself.

    Args:
        specialised: the program, with the arguments of this call.
        locations: where this call's values are.
        plan: whether the caller gets copies.
        driver: captures the segment.
        position: which segment it is.
        segment: the segment.
    """

    def __init__(
        self,
        specialised: SpecialisedProgram,
        locations: Locations,
        plan: Plan,
        driver: Capturing,
        position: int,
        segment: GraphSegment,
    ) -> None:
        self._driver, self._symbols = driver, specialised.symbols
        self._targets: dict[fx.Node, torch.Tensor] = {}
        self.made: list[Out] = []
        if plan.fresh_outputs and not locations.keep:
            returned = dict(_returned(specialised, plan.saved_from))
            ended = set(locations.lives.ends.get(position, ())) - set(locations.saved)
            for name, node in zip(segment.outputs, outputs_of(segment.module), strict=True):
                if name in ended and name in returned:
                    self._may_leave(node, returned[name])
        self.after: Mapping[fx.Node, list[fx.Node]] = _by_last_toucher(segment.module, self._targets)
        """The nodes of results that leave, by the last node that touches them."""

    def _may_leave(self, node: fx.Node, leaf: fx.Node) -> None:
        """Allocate memory for the output ``leaf``, which is made from ``node``, if it is large and can be copied as bytes."""
        value, maker = leaf.meta.get("val"), producer_of(node)
        if not isinstance(value, torch.Tensor) or value.device != self._driver.device:
            return
        if any(_torch.lazy_bits(value)) or is_opaque(maker.target) or acts_outside(maker):
            return
        try:
            spec = TensorSpec.of(value, self._symbols)
        except TypeError:  # a size that is known only at run time
            return
        if torch.Size(spec.shape).numel() * spec.dtype.itemsize >= LARGE:
            target = spec.empty()
            if clones_exactly(target) and not has_gaps(target):
                self._targets[node] = target

    def take(self, node: fx.Node, value: Any) -> bool:
        """Have the graph copy ``value`` out; False if the output is a part of it, or it is not laid out as its fake."""
        target = self._targets[node]
        is_whole = value.untyped_storage().nbytes() == target.untyped_storage().nbytes()
        if not is_whole or not TensorSpec.of(node.meta["val"], self._symbols).accepts(value):
            return False
        outlet = self._driver.let_out(value, target)
        if outlet is not None:
            self.made.append(Out(Variable(node.name), non_owning(target), outlet))
        return outlet is not None

    def targets(self) -> dict[str, torch.Tensor]:
        """The memory of the results that have left, by name."""
        made = {out.value.name for out in self.made}
        return {node.name: target for node, target in self._targets.items() if node.name in made}


def _returned(specialised: SpecialisedProgram, until: int | None) -> Iterator[tuple[str, fx.Node]]:
    """The values from which exactly one output is made, with that output."""
    module = specialised.program.epilogue.module
    behind = inputs_behind(module)
    outputs: dict[str, list[fx.Node]] = defaultdict(list)
    for leaf in outputs_of(module)[:until]:
        if isinstance(leaf, fx.Node):
            outputs[behind[leaf].name].append(leaf)
    yield from ((name, leaves[0]) for name, leaves in outputs.items() if len(leaves) == 1)


def _by_last_toucher(module: fx.GraphModule, wanted: Mapping[fx.Node, Any]) -> dict[fx.Node, list[fx.Node]]:
    """For each node after which nothing touches the memory of some of the ``wanted`` nodes any more, these nodes."""
    last = {node: node for node in wanted}
    makers = {storage: node for node in wanted for storage in storages_of(node)}
    if wanted:
        for node in calls_in(module):
            for storage in storages_of(node, *node.all_input_nodes) & makers.keys():
                last[makers[storage]] = node
    after: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for made, node in last.items():
        after[node].append(made)
    return after
