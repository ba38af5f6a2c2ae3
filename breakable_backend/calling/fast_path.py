"""Bound calls without Dynamo's code: little besides the replay is left.

If Dynamo's code only passes arguments and parameters to the graph and puts the result together, both can be written
down once: which argument goes where, and what the result consists of.
"""

from __future__ import annotations

import dis
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from types import CodeType
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry
from breakable_backend.recordings.generated_code import defined, spelled
from breakable_backend.recordings.replay import Function

_PURE = (
    "RESUME NOP CACHE EXTENDED_ARG COPY_FREE_VARS MAKE_CELL PUSH_NULL PRECALL KW_NAMES CALL COPY SWAP POP_TOP "
    "STORE_FAST DELETE_FAST BINARY_SUBSCR RETURN_VALUE RETURN_CONST LIST_EXTEND LIST_TO_TUPLE CALL_INTRINSIC_1 "
    "STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST NOT_TAKEN"
).split()
"""Instructions that code may consist of, besides ``LOAD_...`` and ``BUILD_...``: it changes no existing object."""
_GATES = "POP_JUMP_FORWARD_IF_FALSE POP_JUMP_FORWARD_IF_TRUE POP_JUMP_IF_FALSE POP_JUMP_IF_TRUE JUMP_FORWARD IS_OP TO_BOOL".split()
"""Instructions that code may also consist of on torch 2.15: the jumps around a range in a profile."""
_CALLS = 3
"""Calls of the graph, and of the two functions that open and close a range in a profile."""


def is_pure(code: CodeType) -> bool:
    """Whether Dynamo's code only reads, calls its graph, and makes new lists, tuples and dicts."""
    instructions = list(dis.get_instructions(code))
    calls = sum(i.opname in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "CALL_METHOD") for i in instructions)
    known = {*_PURE, *(_GATES if "_is_profiler_enabled" in code.co_names else ())}
    return calls <= _CALLS and all(
        i.opname in known or i.opname.startswith(("LOAD_", "BUILD_")) or (i.opname == "BINARY_OP" and i.argrepr == "[]")
        for i in instructions
    )


def source_of(value: Any, leaves: dict[int, str]) -> str | None:
    """Source that makes ``value`` again from ``leaves`` (by ``id``); None if it is more than a plain structure."""

    def leaf(part: Any) -> str | None:
        if (text := leaves.get(id(part))) is not None:
            return text
        if part is None or type(part) in (bool, int, str):
            return repr(part)
        if type(part) in (list, tuple) or (type(part) is dict and all(type(key) in (str, int) for key in part)):
            return None
        raise _NotPlain

    try:
        return spelled(value, leaf)
    except _NotPlain:
        return None


class _NotPlain(Exception):
    """A part of a result for which no source is written."""


def paths(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors in lists, tuples and dicts, each with the source that reads it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        for number, item in enumerate(value):
            yield from paths(item, f"{name}[{number}]")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) in (str, int):
                yield from paths(item, f"{name}[{key!r}]")


class Memory:
    """Whether the memory of tensors still exists. It does not hold the tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.freed: list[bool] = []
        """Not empty once a tensor, or its memory, was freed."""
        freed = self.freed

        def gone(_: Any) -> None:
            freed.append(True)

        self._watched = [weakref.ref(thing, gone) for t in tensors for thing in (t, t.untyped_storage())]


def look(roots: Sequence[torch.nn.Module], tensors: Sequence[torch.Tensor]) -> Callable[[], bool] | None:
    """A check that ``tensors`` are where they are now: below ``roots``, and in memory; None if one is in no module.

    It covers every place of a tensor, and the identities of the modules.
    """
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    wanted = {id(tensor) for tensor in tensors}
    every = [held for module in modules for held in (module._parameters, module._buffers)]
    holders = [held for held in every if any(id(tensor) in wanted for tensor in held.values())]
    held_now = [tensor for held in holders for tensor in held.values()]
    if {id(tensor) for tensor in held_now} & wanted != wanted:
        return None
    addresses = [tensor.data_ptr() if id(tensor) in wanted and tensor is not None else 0 for tensor in held_now]
    places, number = [at for at, tensor in enumerate(held_now) if id(tensor) in wanted], len(held_now)
    parents = [module._modules for module in modules if module._modules]
    children = [child for parent in parents for child in parent.values()]
    values: Any = dict.values
    of, are_at, is_same = chain.from_iterable, _torch.are_at, operator.is_
    del held_now, wanted

    def same() -> bool:
        # Whole dictionaries at once, since looking up each name takes longer than everything else.
        found, modules = [*of(map(values, holders))], [*of(map(values, parents))]
        if len(found) != number or len(modules) != len(children):
            return False
        try:
            return all(map(is_same, modules, children)) and are_at(found, addresses, places)
        except (RuntimeError, TypeError):  # a parameter that has become None
            return False

    return same


NOT_NOW = object()
"""The result of a call that did nothing: the call has to take another path."""


def generate(
    executor: Executor,
    entry: Entry,
    run: Function,
    handed: Sequence[Any],
    placed: dict[int, str],
    static: Sequence[int],
    result: str,
    same: Callable[[], bool] | None,
    looks: Sequence[str],
    names: dict[str, Any],
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any] | None:
    """A function of the caller's ``args`` and ``kwargs`` that replays; None if an eager step takes a static input.

    It returns ``NOT_NOW`` if there is no such replay now. It is a single function, since each further function call
    takes 0.1 us, and more if a launch has emptied the CPU's caches.

    Args:
        executor: the executor of the replay.
        entry: its key.
        run: what calls of the key run, and still have to run.
        handed: what the executor is given.
        placed: which argument is at which position in it, as source.
        static: the positions of the static inputs.
        result: what is returned, as source over ``outputs`` and the arguments.
        same: checks in each call whether static inputs have moved; None for no check.
        looks: source that returns ``NOT_NOW`` for a call that does not fit.
        names: the names that it uses.
    """
    named = run.__code__.co_varnames  # the generated function's variables have the names of the recording's
    names_at = {value.index: value.name for value in executor.program.inputs}
    if any(names_at[at] in named for at in static):
        return None
    template = [None if at in placed or at in static else value for at, value in enumerate(handed)]
    memory = Memory([handed[at] for at in static])
    names |= {
        "NOT_NOW": NOT_NOW,
        "template": template,
        "freed": memory.freed,
        "memory": memory,
        "call": executor.__call__,
        "statistics": executor.statistics,
        "entry": weakref.ref(entry),
        "run": weakref.ref(run),
        "same": same,
    }
    lines = [
        *looks,
        f"if freed{'' if same is None else ' or not same()'}: return NOT_NOW",
        "values = template.copy()",
        *(f"values[{at}] = {text}" for at, text in placed.items()),
        "key, known = entry(), run()",
        "if key is None or known is None or (outputs := call(values, None, key, known)) is None: return NOT_NOW",
        "statistics.bound += 1",
        f"return {result}",
    ]
    body = "\n    ".join(lines)
    return defined(f"def fast_path(args, kwargs):\n    {body}\n", "fast_path", names)[0]
