"""Random programs without control flow: pure, in-place, view, eager and random ops, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies
from torch import Tensor

import silly

SIDE = 3

Op = Callable[..., Any]


@torch.compiler.nested_compile_region
def region(a: Tensor) -> Tensor:
    """Writes its own memory only."""
    return (a * 2).add_(1).sin()


@torch.compiler.nested_compile_region
def writing_region(a: Tensor, b: Tensor) -> Tensor:
    """Writes a view of its first argument, and reads the second."""
    a.t().add_(b)
    return b * 2


OPS: dict[str, tuple[int, Op]] = {
    # pure
    "sin": (1, torch.sin),
    "add": (2, torch.add),
    "mul": (2, torch.mul),
    "mm": (2, lambda a, b: (a @ b) * 0.25),
    "sum": (1, lambda a: a.sum(0, keepdim=True).expand(SIDE, SIDE) + 0),
    "where": (2, lambda a, b: torch.where(a > b, a, b)),
    # in place; results are new names for the same tensor
    "add_": (2, lambda a, b: a.add_(b)),
    "mul_": (1, lambda a: a.mul_(0.5)),
    "copy_row_": (2, lambda a, b: (a[0].copy_(b[1]), None)[1]),
    "sin_of_t_": (1, lambda a: a.t().sin_().t()),
    "fill_": (1, lambda a: (a[:, 1].fill_(0.25), None)[1]),
    # regions
    "region": (1, region),
    "writing_region": (2, lambda a, b: (writing_region(a, b), None)[1]),
    # views
    "t": (1, lambda a: a.t()),
    "flip_view": (1, lambda a: a.view(-1).view(SIDE, SIDE) if a.is_contiguous() else a.t()),
    "rows": (1, lambda a: a[0].expand(SIDE, SIDE)),
    "detach": (1, lambda a: a.detach()),
    # eager
    "triple": (1, lambda a: silly.triple(a)),
    "attention": (2, lambda a, b: silly.attention(a, b, b)),
    "add_into": (2, lambda a, b: silly.add_into(a, b)),
    "notice": (1, lambda a: silly.notice(a)),
    "unused": (1, lambda a: (silly.triple(a), None)[1]),
    "split": (1, lambda a: silly.split(a)[1][1]),
    "three": (1, lambda a: silly.three(a)[0]),
    "look": (1, lambda a: silly.visit(a)),
    # random
    "rand": (1, lambda a: a + torch.rand_like(a)),
    "noise": (1, lambda a: silly.noise(a)),
    "unused_draw": (1, lambda a: (torch.rand_like(a), None)[1]),
    "uniform_": (1, lambda a: a.uniform_()),
}
WRITES = {"add_": 0, "mul_": 0, "copy_row_": 0, "sin_of_t_": 0, "fill_": 0, "add_into": 0, "uniform_": 0}
WRITES["writing_region"] = 0


@dataclasses.dataclass(frozen=True)
class Straight:
    """Lines ``(op, arguments)`` over a growing list of values, of which some are returned."""

    inputs: int
    lines: tuple[tuple[str, tuple[int, ...]], ...]
    returned: tuple[int, ...]

    def __call__(self, *args: Tensor) -> list[Tensor]:
        values = list(args)
        for name, positions in self.lines:
            result = OPS[name][1](*(values[position] for position in positions))
            if isinstance(result, Tensor):
                values.append(result)
        return [values[position] for position in self.returned]


@strategies.composite
def programs(draw: strategies.DrawFn) -> Straight:
    """A program in which no op writes a tensor whose elements share memory."""
    inputs = draw(strategies.integers(1, 2))
    shared = [False] * inputs  # whether elements of the value share memory
    lines = []
    for _ in range(draw(strategies.integers(2, 9))):
        name = draw(strategies.sampled_from(sorted(OPS)))
        arity, _ = OPS[name]
        positions = [draw(strategies.integers(0, len(shared) - 1)) for _ in range(arity)]
        if name in WRITES and (shared[positions[0]] or len(set(positions)) < arity):
            name, positions = "sin", positions[:1]
        if name in ("add_", "add_into", "copy_row_", "writing_region") and len(positions) == 2:
            # what is added must not overlap what is written
            lines.append(("sin", (positions[1],)))
            shared.append(False)
            positions[1] = len(shared) - 1
        lines.append((name, tuple(positions)))
        if name not in ("copy_row_", "fill_", "add_into", "writing_region", "notice", "unused", "unused_draw"):
            aliased = {"rows": True}.get(name, shared[positions[0]] if name in ("t", "flip_view", "detach") else False)
            shared.append(aliased)
    count = draw(strategies.integers(1, 4))
    returned = tuple(draw(strategies.integers(0, len(shared) - 1)) for _ in range(count))
    return Straight(inputs, tuple(lines), returned)
