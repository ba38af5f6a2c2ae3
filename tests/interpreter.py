"""Recordings, interpreted step by step: the specification of what ``recordings.replay.emit`` generates.

Both must equal eager, and each other, on every test model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from breakable_backend.recordings.checks import check_argument, perform
from breakable_backend.recordings.recording import Copy, GraphStep, Recording, Slot
from breakable_backend.recordings.replay import Tally


def interpret(recording: Recording, args: Sequence[Any], stream: int, tally: Tally | None = None) -> list[Any]:
    """Replay step by step."""
    tally = tally or Tally()
    slots = {**recording.constants, **dict(zip(recording.arguments, args, strict=True))}
    for name, spec in recording.specs.items():
        check_argument(name, spec, slots[name])
    for call in recording.prologue:
        slots[call.result] = perform(call, slots)
    for step in recording.steps:
        if isinstance(step, GraphStep):
            held: list[Any] = []
            tally.copies += sum(_loaded(copy, slots, held) for copy in step.loads)
            step.graph.replay(stream)
            tally.copies += sum(slots[copy.bridge.name].store(slots[copy.value.name]) for copy in step.stores)
        else:
            for call in step.calls:
                slots[call.result] = perform(call, slots)
    for call in recording.epilogue:
        slots[call.result] = perform(call, slots)
    return [slots[leaf.name] if isinstance(leaf, Slot) else leaf for leaf in recording.returned]


def _loaded(copy: Copy, slots: dict[str, Any], held: list[Any]) -> int:
    """Copy a value to its bridge, or have the graph do so, which needs what is ``held``. Returns the number of copies."""
    value = slots[copy.value.name]
    if copy.feed is None:
        return int(slots[copy.bridge.name].load(value))
    held.append(copy.feed.take(value))
    return copy.feed.copies
