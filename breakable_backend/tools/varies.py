"""What varies from call to call if few calls replay, and what to do about it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from types import CodeType

import torch

from breakable_backend import _torch
from breakable_backend.calling.snapshot import Snapshot
from breakable_backend.ir.program import Input, Program

FEW = 0.5
"""If a smaller share of calls replays, a report says what varies."""
MANY = 3
"""From this number of values, or sets of addresses, on a line mentions them."""
SHOWN = 6
"""How many values a line shows."""


def findings(snapshot: Snapshot, replays: int) -> tuple[str, ...]:
    """For a program of which few calls were replays: what varies, its values, and the remedy.

    Args:
        snapshot: of the program's executor.
        replays: how many of its calls were replays.
    """
    calls = snapshot.statistics.calls
    if calls < 2 * MANY or replays >= FEW * calls:
        return ()
    return (*_numbers(snapshot), *_addresses(snapshot))


def of_one_function(calls: Sequence[tuple[CodeType | None, int]]) -> tuple[str, ...]:
    """If one function was compiled into many programs that are called once or twice each: one finding that says so.

    Args:
        calls: for each program what it was compiled from, and how often it was called.
    """
    told = []
    for code in dict.fromkeys(code for code, _ in calls if code is not None):
        counts = [count for other, count in calls if other is code]
        seldom = sum(count <= 2 for count in counts)
        if len(counts) > MANY and seldom > len(counts) / 2:
            where = f"{code.co_name} at {os.path.basename(code.co_filename)}:{code.co_firstlineno}"
            told.append(
                f"{len(counts)} programs are of one function, {where}, and {seldom} of them were called once or twice: "
                "Dynamo compiles it anew where a Python value, a flag or an object differs (TORCH_LOGS=recompiles says "
                "which); pass it as a tensor, or say torch.compile(..., dynamic=True) if it is a size"
            )
    return tuple(told)


def _numbers(snapshot: Snapshot) -> Iterator[str]:
    program = snapshot.program
    numbers = [v for v in program.inputs if v.kind == "number" and v.index >= 0 and v.name not in program.passed_on]
    for place, value in enumerate(numbers):
        found = sorted({key.key.shapes[place] for key in snapshot.keys})
        if len(found) < MANY:
            continue
        name = _torch.name_of(value.value) or value.name
        had = f"{name} has had {_listed(found)}, and each is recorded for itself"
        if (size := re.fullmatch(r"(.*)\.size\(\)\[(\d+)\]", name)) is not None:
            tensor, padded = size[1], _torch.as_identifier(size[1])
            last = next((value.value.dim() - 1 for value in program.inputs if value.name == padded), int(size[2]))
            behind = "0, 0, " * (last - int(size[2]))  # pad takes the last dimension first
            yield (
                f"{had}: pad {tensor} to a few sizes, for example "
                f"to multiples of 64: torch.nn.functional.pad({tensor}, ({behind}0, -{name} % 64))"
            )
        elif _is_only_computed_with(value, program):
            yield (
                f"the number {had}, although only eager steps read what your code computes from it: pass them {name} "
                "as it is, and compute in them"
            )
        else:
            yield (
                f"the number {had}: where no shape depends on it, pass torch.tensor({name}, device=...) instead, whose "
                "value a graph reads anew; a marked function gets its value by .item()"
            )


def _is_only_computed_with(number: Input, program: Program) -> bool:
    """Whether only eager steps depend on a number, through other numbers that are computed from it."""
    symbols = _torch.free_symbols(number.value)
    return all(
        symbols.isdisjoint(_torch.free_symbols(node.meta.get("val")))
        for module in (*(segment.module for segment in program.graph_segments), program.epilogue.module)
        for node in module.graph.nodes
    )


def _addresses(snapshot: Snapshot) -> Iterator[str]:
    sets = dict.fromkeys(key.key.addresses for key in snapshot.keys)
    if len(sets) < MANY:
        return
    statics = [value for value in snapshot.program.inputs if value.kind == "static" and value.index >= 0]
    places = list(zip(*sets, strict=False))
    if len(statics) != len(places):
        statics = []  # written inputs have addresses too, and a snapshot does not tell them apart: no input is named
    moved = [value for value, found in zip(statics, places, strict=False) if len(set(found)) >= MANY]
    shown = ", ".join(_described(value) for value in moved[:MANY]) or "some of them written"
    more = f" and {len(moved) - MANY} more" if len(moved) > MANY else ""
    yield (
        f"inputs that are read in place have been at {len(sets)} sets of addresses ({shown}{more}), and each set is "
        "recorded for itself: write new values into the same tensor, with copy_; if weights moved for good, call "
        "breakable_backend.reset(compiled)"
    )


def _described(value: Input) -> str:
    return f"{value.name}, {list(value.value.shape)}" if isinstance(value.value, torch.Tensor) else value.name


def _listed(values: Sequence[int]) -> str:
    more = f", … {len(values)} values" if len(values) > SHOWN else f": {len(values)} values"
    return ", ".join(map(str, values[:SHOWN])) + more
