"""Python values that a marked function changes and that the code around its call may read.

Compiled code reads Python values when it begins: attributes, globals, closed-over values, and the contents of
containers. Eager code after a call would see what the call has changed. So a call that changes a value which the code
around it reads is a graph break, after which the value is read again. Values that no code around it reads, such as a
counter, may change.

Changes are looked for while a call runs as Python to be learned from: in the modules among its arguments, in the cells
and globals of the function and of functions found there, and in the attributes of objects found there.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import Place
from breakable_backend.marks.call_ops import sites_in
from breakable_backend.marks.structure import instances_in, is_still

ANYWHERE = 0
"""In the place of the identity of a class: guards on its attributes do not tell in all releases of torch which code reads
them, so any code may."""

DEPTH = 3
"""How many functions and objects may lie between a function and a value that is looked at."""

Changes = Mapping[Place, str]
"""What a call has changed, by place, in words."""


def looking_at(function: Callable[..., Any], arguments: Any) -> Callable[[], Changes]:
    """A function that returns what a call of ``function`` has changed since."""
    before = _State(function, arguments)

    def changes() -> Changes:
        after = _State(function, arguments)
        places = [*after.values, *(place for place in before.values if place not in after.values)]
        return {
            place: after.names.get(place) or before.names[place]
            for place in places
            if not is_still(before.values.get(place, _NOTHING), after.values.get(place, _NOTHING))
        }

    return changes


_NOTHING: tuple[Any, ...] = (object(), object())


class _State:
    """The Python values that a function can reach quickly."""

    def __init__(self, function: Callable[..., Any], arguments: Any) -> None:
        self.values: dict[Place, tuple[Any, ...]] = {}
        """The value at each place; for a container, all that it holds."""
        self.names: dict[Place, str] = {}
        self._met: dict[int, Any] = {}
        for module in instances_in(arguments, torch.nn.Module):
            for part in module.modules():
                self._look(part, type(part).__name__, 1)
        for kind in instances_in(arguments, type):
            for key, held in vars(kind).items():
                holds = (
                    (*held, *held.values()) if isinstance(held, dict) else held if isinstance(held, list | set) else ()
                )
                self._add((ANYWHERE, f"{kind.__name__}.{key}"), (held, *holds), f"{kind.__name__}.{key}")
        self._look(function, "", DEPTH)

    def _look(self, value: Any, name: str, depth: int) -> None:
        """Look at the parts of ``value`` that can change."""
        if id(value) in self._met:
            return
        self._met[id(value)] = value
        if isinstance(value, list | set | deque):
            self._add((id(value), None), tuple(value), f"a {type(value).__name__}, {name}")
        elif isinstance(value, dict):
            self._add((id(value), None), (*value, *value.values()), f"a {type(value).__name__}, {name}")
        elif depth and isinstance(value, functools.partial):
            self._look(value.func, name, depth)
        elif depth and isinstance(value, MethodType):
            self._look(value.__self__, type(value.__self__).__name__, depth)
            self._look(value.__func__, name, depth)
        elif depth and isinstance(value, FunctionType):
            self._function(getattr(getattr(value, "mark", None), "body", value), depth - 1)
        elif (
            depth
            and not isinstance(value, ModuleType | torch.Tensor | type)
            and isinstance(getattr(value, "__dict__", None), dict)
        ):
            self._attributes(value, name or type(value).__name__, depth - 1)

    def _function(self, function: Any, depth: int) -> None:
        if not isinstance(function, FunctionType) or (function.__module__ or "").split(".")[0] in _OF_OTHERS:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                held = cell.cell_contents
            except ValueError:  # not set yet
                continue
            self._add((id(cell), "cell_contents"), (held,), name)
            self._look(held, name, depth)
        for name in names_in(function.__code__):
            if name in function.__globals__:
                held = function.__globals__[name]
                self._add((id(function.__globals__), name), (held,), name)
                self._look(held, name, depth)

    def _attributes(self, value: Any, name: str, depth: int) -> None:
        groups = [vars(value)]
        if isinstance(value, torch.nn.Module):
            groups += [value._parameters, value._buffers]
        else:
            self._look(vars(type(value)).get("__call__"), name, depth)
        for group in groups:
            for key, held in list(group.items()):
                if key in _OF_MODULES:
                    continue
                self._add((id(value), key), (held,), f"{name}.{key}")
                self._add((id(group), key), (held,), f"{name}.{key}")
                self._look(held, f"{name}.{key}", depth)

    def _add(self, place: Place, value: tuple[Any, ...], name: str) -> None:
        self.values[place], self.names[place] = value, name


_OF_MODULES = ("_modules", "_parameters", "_buffers")
_OF_OTHERS = ("torch", "numpy", "builtins", "functools", "breakable_backend")


def names_in(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes that code, and functions in it, use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def heed(gm: fx.GraphModule) -> None:
    """Have a frame run once as Python, if it reads values that its marked functions change.

    A function that changes such a value again in that call is a graph break from then on. One that has set a value once
    is not. ``gm`` is Dynamo's graph of the frame, which Dynamo is still tracing.
    """
    changing = [site for site in sites_in(gm) if site.learned.changes]
    if not changing or not _torch.can_run_as_python():
        return
    read, last = _torch.places_read(), None
    for site in changing:
        learned = site.learned
        names = dict.fromkeys(name for place, name in learned.changes.items() if place in read or place[0] == ANYWHERE)
        if names:
            last = site
            if learned.changes_again:
                learned.why_not = f"it changes {', '.join(names)}, which the code around it reads"
                learned.cure = (
                    "return what it changes, and have the code around change it; or compile without fullgraph=True"
                )
            learned.changes_again = True
            learned.changes.clear()
    if last is not None:
        last.run_as_python("has changed what the code around it reads")
