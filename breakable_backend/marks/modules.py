"""Modules as eager steps: ``mark_eager(model.moe)``, ``mark_eager(MoE)``, ``eager_ops=[MoE]``.

The call of such a module is the call of a marked function that takes the module and its arguments. Where traced code
calls a module, Dynamo asks this module what to call instead. Plain Python does not ask. So while a frame runs as Python
to be learned from, and in a ``with capture``, the classes of such modules get another ``__call__``, which acts only in
threads that watch it.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from breakable_backend import _torch, locks
from breakable_backend.interception import intercepted_by
from breakable_backend.marks.call_ops import sites_in
from breakable_backend.marks.functions import marked_as

MARK_EAGER, EAGER_OPS = "mark_eager", "eager_ops"
"""The ways to mark a module."""


def is_module(thing: Any) -> bool:
    """Whether ``thing`` is a module or a class of modules."""
    return isinstance(thing, nn.Module) or (isinstance(thing, type) and issubclass(thing, nn.Module))


def is_forward(function: Any) -> bool:
    """Whether ``function`` is the ``forward`` of a module, or of a class of modules."""
    if inspect.ismethod(function):
        return isinstance(function.__self__, nn.Module) and function.__name__ == "forward"
    return inspect.isfunction(function) and function.__qualname__.endswith(".forward")


@dataclass(frozen=True)
class Modules:
    """Classes of modules, with their subclasses, and single modules."""

    classes: tuple[type[nn.Module], ...] = ()
    instances: tuple[weakref.ref[nn.Module], ...] = ()

    @classmethod
    def of(cls, things: Iterable[Any]) -> Modules:
        """The modules and classes among ``things``."""
        things = [_torch.original_of(thing) for thing in things if is_module(thing)]
        classes = tuple(thing for thing in things if isinstance(thing, type))
        return cls(classes, tuple(weakref.ref(thing) for thing in things if not isinstance(thing, type)))

    def __contains__(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes) or any(reference() is module for reference in self.instances)

    def __bool__(self) -> bool:
        return bool(self.classes or self.instances)

    def without(self, thing: Any) -> Modules:
        """A copy without one."""
        thing = _torch.original_of(thing)
        return Modules.of(other for other in (*self.classes, *self.alive()) if other is not thing)

    def with_(self, thing: Any) -> Modules:
        """A copy with one more."""
        return Modules.of([*self.without(thing).classes, *self.without(thing).alive(), thing])

    def alive(self) -> list[nn.Module]:
        """The single modules."""
        return [module for reference in self.instances if (module := reference()) is not None]

    def kinds(self) -> set[type[nn.Module]]:
        """The classes whose ``__call__`` calls one of these modules."""
        found = {type(module) for module in self.alive()}
        for kind in self.classes:
            found |= {kind, *(below for below in _subclasses(kind) if "__call__" in vars(below))}
        return found

    def unmet(self, calls: Iterable[nn.Module]) -> Iterator[str]:
        """The names of those that no module in ``calls`` belongs to."""
        called = list(calls)
        for kind in self.classes:
            if not any(isinstance(module, kind) for module in called):
                yield kind.__qualname__
        for module in self.alive():
            if not any(module is other for other in called):
                yield f"one {type(module).__qualname__}"


def _subclasses(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


class _Marked:
    """The modules and classes that ``mark_eager`` has marked."""

    modules = Modules()


_marked = _Marked()
_marking = locks.lock()


def marked() -> Modules:
    """The modules and classes that are marked by ``mark_eager`` now."""
    return _marked.modules


def mark(thing: Any) -> None:
    """Have a module, or all modules of a class, run eagerly in what is compiled and captured from now on."""
    with _marking:
        _marked.modules = _marked.modules.with_(thing)


def unmark(thing: Any) -> None:
    """Undo :func:`mark`."""
    with _marking:
        _marked.modules = _marked.modules.without(thing)


# --- the marked function ------------------------------------------------------------------------------------------------


def _how(module: nn.Module, named: Modules) -> str:
    """How a module is marked; empty if it is not."""
    return MARK_EAGER if module in _marked.modules else EAGER_OPS if module in named else ""


def _function(kind: type[nn.Module], how: str) -> Callable[..., Any]:
    """The marked function that calls modules of a class."""
    with _marking:
        made = _functions.setdefault(kind, {})
        if how not in made:
            made[how] = _made(kind, how)
        return made[how]


_functions: weakref.WeakKeyDictionary[type, dict[str, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def _made(kind: type[nn.Module], how: str) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside = _inside.modules
        inside.append(self)
        try:
            return self(*args, **kwargs)
        finally:
            inside.pop()

    call.__qualname__ = kind.__qualname__
    call.__signature__ = _SIGNATURE  # type: ignore[attr-defined] # not that of forward, which hooks may call otherwise
    return marked_as(call, how, mutates_args=("self",))  # its buffers may be written


def _takes(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The signature of what calls a module."""


_SIGNATURE = inspect.signature(_takes)


class _Inside(threading.local):
    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        """Marked modules whose marked functions are running in this thread."""


_inside = _Inside()


# --- under Dynamo -------------------------------------------------------------------------------------------------------


def _instead(module: nn.Module, options: Mapping[str, Any]) -> tuple[Callable[..., Any] | None, bool]:
    """What Dynamo has to call with a module and its arguments; and whether the compiled code is for this module only."""
    marks, named = _marked.modules, _named(options)
    if not (marks or named):
        return None, False
    how = _how(module, named)
    if how:
        return _function(type(module), how), True
    return None, any(type(other) is type(module) for other in (*marks.alive(), *named.alive()))


def _named(options: Mapping[str, Any]) -> Modules:
    given = options.get("eager_ops")
    return Modules.of(given) if isinstance(given, list | tuple | set | frozenset) else Modules()


def _watch(options: Mapping[str, Any]) -> Callable[[], None]:
    """Watch the modules in a call that is learned from. The result ends this."""
    stack = ExitStack()
    stack.enter_context(watching(_named(options)))
    return stack.close


_torch.heed_calls_of_modules(_instead, _watch)


# --- under Python -------------------------------------------------------------------------------------------------------


@contextmanager
def watching(named: Modules | None = None) -> Iterator[None]:
    """Have calls of marked modules, and of the ``named`` ones, go through their marked functions in this thread."""
    named = named or Modules()
    with ExitStack() as stack:
        for kind in _marked.modules.kinds() | named.kinds():
            stack.enter_context(intercepted_by(functools.partial(_called, named), kind, "__call__"))
        yield


def _called(named: Modules, plain: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the module's marked function if it has one, and else ``plain``, the class's own ``__call__``."""
    how = "" if any(self is module for module in _inside.modules) else _how(self, named)
    return _function(type(self), how)(self, *args, **kwargs) if how else plain(self, *args, **kwargs)


# --- in graphs ----------------------------------------------------------------------------------------------------------


def called_in(graph: fx.GraphModule) -> list[tuple[str, nn.Module]]:
    """The modules that marked functions in a graph call, each with how it is marked."""
    found = (site for site in sites_in(graph) if site.mark.by in (MARK_EAGER, EAGER_OPS))
    return [(site.mark.by, site.module(site.arguments[-1][0][-1][0][1])) for site in found]
