"""Recordings, interpreted step by step: the specification of what ``recordings.replay.emit`` generates.

Both must equal eager, and each other, on every test model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from breakable_backend.recordings.checks import check_argument, perform
from breakable_backend.recordings.recording import Copy, GraphStep, Recording, Variable
from breakable_backend.recordings.replay import Tally


def interpret(recording: Recording, args: Sequence[Any], stream: int, tally: Tally | None = None) -> list[Any]:
    """Replay step by step."""
    tally = tally or Tally()
    values = {**recording.constants, **dict(zip(recording.arguments, args, strict=True))}
    for name, spec in recording.specs.items():
        check_argument(name, spec, values[name])
    for call in recording.prologue:
        values[call.result] = perform(call, values)
    for step in recording.steps:
        if isinstance(step, GraphStep):
            held: list[Any] = []
            tally.copies += sum(_loaded(copy, values, held) for copy in step.loads)
            for out in step.outs:
                values[out.value.name] = torch.empty_like(out.like)
                out.outlet.lead(values[out.value.name].data_ptr())
            step.graph.replay(stream)
            tally.copies += sum(values[copy.bridge.name].store(values[copy.value.name]) for copy in step.stores)
        else:
            for call in step.calls:
                values[call.result] = perform(call, values)
    for call in recording.epilogue:
        values[call.result] = perform(call, values)
    return [values[leaf.name] if isinstance(leaf, Variable) else leaf for leaf in recording.returned]


def _loaded(copy: Copy, values: dict[str, Any], held: list[Any]) -> int:
    """Copy a value to its bridge, or have the graph do so, which needs what is ``held``. Returns the number of copies."""
    value = values[copy.value.name]
    if copy.feed is None:
        return int(values[copy.bridge.name].load(value))
    held.append(copy.feed.take(value))
    return copy.feed.copies
