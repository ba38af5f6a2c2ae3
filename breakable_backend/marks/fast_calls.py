"""The shortest way to call a marked function in a replay, for tensors and plain values in, and fresh tensors out.

Everything else is left to :meth:`breakable_backend.marks.call_sites.Site.run`, which handles every case and takes ten times
as long.
"""

from __future__ import annotations

import keyword
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import ANY, TensorSpec

Structure = tuple[Any, ...]
"""As in :mod:`breakable_backend.marks.structure`."""
Run = Callable[[list[bool], bool, list[Any], list[int], list[float]], list[Any]]
"""Takes the arguments of a marked function's op, without the site."""
Take = Callable[[list[Any], list[Any], list[int], list[float]], list[Any]]
"""Takes a result apart, given its only holder and the tensors and numbers that the function was called with."""
Look = Callable[[Sequence[Any], Sequence[Any]], None]
"""Takes what a container holds now, and what it held before."""


def fast_call(
    function: Callable[..., Any],
    arguments: Structure,
    result: Structure,
    layouts: Sequence[TensorSpec],
    capture: Callable[[], Any],
    run: Run,
    take: Take,
    look: Look,
) -> Run:
    """``run`` by the shortest way if a call goes as expected; ``run`` itself if there is no short way.

    A result is fresh, and no longer the function's, if only the caller refers to it, in Python and by its memory.

    Args:
        function: the marked function.
        arguments: the structure of its arguments.
        result: the structure of its result.
        layouts: specs of the fresh tensors in the result; sizes that vary are ``ANY``.
        capture: returns the capture in progress; None if there is none.
        run: for calls that need gradients, that are traced, or that are inside a capture.
        take: for results that are not as expected.
        look: raises if a list or dict among the arguments has changed.
    """
    call = caller(function, arguments, look)
    kind = _kind(result, len(layouts))
    if call is None or kind is None or any(ANY in (*spec.shape, *spec.stride) for spec in layouts):
        return run
    checks: list[Callable[[Any], bool]] = []
    """Made in the first call, under the modes of all calls."""

    def parts(returned: Any) -> list[Any]:
        return [returned] if kind is torch.Tensor else [] if returned is None else [*returned]

    def check(made: list[Any]) -> bool:
        if not checks:
            checks.extend(spec.quick_check() for spec in layouts)
        if len(made) != len(checks):
            return False
        for place, fits in enumerate(checks):  # each expression as in ``_references``
            if not fits(made[place]) or sys.getrefcount(made[place]) != _ALONE or not _torch.is_sole_owner(made[place]):
                return False
        return True

    def run_fast(
        needs: list[bool], traced: bool, tensors: list[Any], ints: list[int], floats: list[float]
    ) -> list[Any]:
        if needs or traced or capture() is not None:
            return run(needs, traced, tensors, ints, floats)
        returned = call(tensors, ints, floats)
        if kind is not torch.Tensor and type(returned) is not kind:
            holder = [returned]
            del returned
            return take(holder, tensors, ints, floats)
        made = parts(returned)
        del returned  # the function may have kept the container of the result
        if check(made):
            return made
        holder = made if kind is torch.Tensor else [kind(made) if made else None]
        del made
        return take(holder, tensors, ints, floats)

    return run_fast


def _references() -> int:
    made = [torch.empty(0)]
    place = 0
    return sys.getrefcount(made[place])


_ALONE = _references()
"""The count of ``sys.getrefcount`` for a tensor that only one list holds."""


def _kind(result: Structure, count: int) -> type | None:
    """The kind of result: a tensor, a tuple or list of tensors, or None; None if it is anything else."""
    tensors = tuple(("tensor", number, False) for number in range(count))
    if count == 1 and result == tensors[0]:
        return torch.Tensor
    if count and result[0] in ("tuple", "list") and result[-1] == tensors:
        return tuple if result[0] == "tuple" else list
    return type(None) if not count and result == ("plain", None) else None


_GIVEN = {"tensor": "tensors", "int": "ints", "float": "floats"}


class _Rare(Exception):
    """A container for which no source is written."""


def caller(function: Callable[..., Any], arguments: Structure, look: Look) -> Callable[[Any, Any, Any], Any] | None:
    """``function`` as a call with tensors, ints and floats, put together to its arguments; None for rare containers.

    After the call ``look`` compares what lists and dicts contain with what they were made of.
    """
    names: dict[str, Any] = {"function": function, "look": look}
    made: list[str] = []
    """Statements that make the containers, the inner ones first."""
    looks: list[str] = []
    """Statements that compare them after the call."""

    def bound(value: Any) -> str:
        name = f"plain_{len(names)}"
        names[name] = value
        return name

    def watched(text: str, values: str, items: str) -> str:
        name = f"given_{len(made)}"
        made.append(f"{name} = {text}")
        looks.append(f"look({values.format(name)}, ({items}))")
        return name

    def text(structure: Structure) -> str:
        kind = structure[0]
        if kind in _GIVEN:
            return f"{_GIVEN[kind]}[{structure[1]}]"
        if kind == "plain":
            return bound(structure[1])
        if kind not in ("list", "tuple", "dict"):
            raise _Rare
        items = [text(item) for item in structure[-1]]
        listed = "".join(f"{item}, " for item in items)
        if kind == "tuple":  # made once: it is looked for, as an object, in the list or dict that holds it
            made.append(f"given_{len(made)} = ({listed})")
            return f"given_{len(made) - 1}"
        if kind == "list":
            return watched(f"[{listed}]", "{}", listed)
        keys = [bound(key) for key in structure[1]]
        pairs = ", ".join(f"{key}: {item}" for key, item in zip(keys, items, strict=True))
        return watched(f"{{{pairs}}}", "(*{0}, *{0}.values())", "".join(f"{key}, " for key in keys) + listed)

    positional, named = arguments[-1]
    if not all(name.isidentifier() and not keyword.iskeyword(name) for name in named[1]):
        return None
    try:
        given = [text(item) for item in positional[-1]]
        given += [f"{name}={text(item)}" for name, item in zip(named[1], named[-1], strict=True)]
    except _Rare:
        return None
    call = f"function({', '.join(given)})"
    lines = [*made, f"returned = {call}", *looks, "return returned"] if made else [f"return {call}"]
    exec("def call(tensors, ints, floats):\n" + "".join(f"    {line}\n" for line in lines), names)
    run: Callable[[Any, Any, Any], Any] = names["call"]
    return run
