"""When the values of a program are needed last, and so how much memory they take at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.program import GraphSegment, Program, outputs_of

if TYPE_CHECKING:
    import sympy


def last_uses(program: Program) -> list[tuple[str, ...]]:
    """For each segment, the values that no later segment and no output needs."""
    needed = set(program.epilogue.inputs)
    result: list[tuple[str, ...]] = []
    for segment in reversed(program.segments):
        names = dict.fromkeys((*segment.inputs, *segment.outputs))
        result.append(tuple(name for name in names if name not in needed))
        needed.update(names)
    return result[::-1]


@dataclass(frozen=True)
class Lifetimes:
    """When each value of a program is read last."""

    ends: Mapping[int, tuple[str, ...]]
    """Values that captured segments or eager steps make, by the position of the last segment that reads or makes
    them."""
    unloaded: Mapping[int, tuple[str, ...]]
    """Inputs, by the position of the last captured segment that reads them."""
    returned: frozenset[str]
    """The values that the outputs are made of."""

    @classmethod
    def of(cls, program: Program) -> Lifetimes:
        inputs = {value.name for value in program.inputs} | set(program.sizes)
        ends: dict[str, int] = {}
        unloaded: dict[str, int] = {}
        for position, segment in enumerate(program.segments):
            ends.update((name, position) for name in (*segment.inputs, *segment.outputs) if name not in inputs)
            if isinstance(segment, GraphSegment):
                unloaded.update((name, position) for name in segment.inputs if name in inputs)
        return cls(by_value(ends), by_value(unloaded), frozenset(program.epilogue.inputs))


def by_value(positions: Mapping[str, int]) -> dict[int, tuple[str, ...]]:
    """The names at each position."""
    names: dict[int, tuple[str, ...]] = {}
    for name, position in positions.items():
        names[position] = (*names.get(position, ()), name)
    return names


def needed(program: Program, symbols: Mapping[sympy.Symbol, int]) -> int:
    """The most bytes that bridges and values between segments take at the same time.

    What a segment allocates for itself is not included: the number only serves to compare two keys. Sizes that are
    known only at run time count as nothing.
    """
    lives = Lifetimes.of(program)
    inputs = {value.name: value.value for value in program.inputs if value.kind == "tensor"}
    alive: dict[str, int] = {}
    most = 0
    for position, segment in enumerate(program.segments):
        if isinstance(segment, GraphSegment):
            alive.update((name, _bytes(inputs[name], symbols)) for name in segment.inputs if name in inputs)
        made = zip(segment.outputs, outputs_of(segment.module), strict=True)
        alive.update((name, _bytes(node.meta.get("val"), symbols)) for name, node in made)
        most = max(most, sum(alive.values()))
        for name in (*lives.ends.get(position, ()), *lives.unloaded.get(position, ())):
            if name not in lives.returned or name in inputs:
                alive.pop(name, None)
    return most


def _bytes(fake: Any, symbols: Mapping[sympy.Symbol, int]) -> int:
    if not isinstance(fake, torch.Tensor) or fake.layout is not torch.strided:
        return 0
    try:
        sizes = [_torch.evaluate(size, symbols) for size in fake.shape]
    except TypeError:  # a symbol without a value yet
        return 0
    return int(torch.Size(sizes).numel() * fake.dtype.itemsize)
