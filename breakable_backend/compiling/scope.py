"""What is known about a lowered graph before it is cut: which inputs are host scalars, and whether it may be cut."""

from __future__ import annotations

from dataclasses import replace

import torch

from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.errors import PartitionError
from breakable_backend.ir.effects import python_floats
from breakable_backend.marks.rules import Scope
from breakable_backend.options import Options


def scope_for(lowered: Lowered, scope: Scope, options: Options) -> Scope:
    """``scope`` with the host scalars of ``lowered``: 0-d inputs on the host if the capture device is another, and floats.

    Raises:
        PartitionError: with ``auto_break=False``, a node that cannot be captured and is not marked.
    """
    if scope.device.type != "cpu":
        scalars = [
            node.name
            for node in lowered.module.graph.find_nodes(op="placeholder")
            if isinstance(value := node.meta.get("val"), torch.Tensor)
            and value.device.type == "cpu"
            and value.dim() == 0
        ]
        scope = replace(scope, host_scalars=frozenset(scalars))
    elif options.scalars == "key":
        floats = python_floats(lowered.module.graph).values()
        scope = replace(scope, host_scalars=frozenset(held.name for held in floats))
    if not options.auto_break:
        program = partition(lowered, scope, min_kernels=options.min_kernels)
        for reason in program.reasons:
            if reason.rule not in ("marked", "region", "min_kernels"):
                raise PartitionError(
                    f"{reason.op} cannot be captured: {reason.text}",
                    where=reason.source,
                    fix="mark it (mark_eager, eager_region), or let it run eagerly: auto_break=True",
                )
    return scope
