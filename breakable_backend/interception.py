"""Methods of classes, intercepted in one thread: of PyTorch's own classes during a capture, and calls of marked modules.

Events and autocast regions are invisible to dispatch modes, and under a function mode Dynamo would compile everything
again. So their methods are replaced for a while, and call an interceptor in the thread that asked for it. In every
other thread, in traced code, and afterwards, they do what they did before.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from breakable_backend import _torch, locks

Interceptor = Callable[..., Any]
"""Called with the original method and its arguments."""


class _Intercepted:
    """One method while somebody intercepts it."""

    def __init__(self, owner: type | ModuleType, name: str) -> None:
        self.interceptors: dict[int, list[Interceptor]] = defaultdict(list)
        """By thread; the innermost is the last."""
        self.method = method = getattr(owner, name)
        self.inherited = name not in vars(owner)

        @functools.wraps(method)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(*args, **kwargs)
            interceptors = self.interceptors.get(threading.get_ident())
            return interceptors[-1](method, *args, **kwargs) if interceptors else method(*args, **kwargs)

        self.replacement = replacement


_lock = locks.lock()
_methods: dict[tuple[type | ModuleType, str], _Intercepted] = {}
"""Empty unless a capture is running."""


@contextmanager
def intercepted_by(interceptor: Interceptor, owner: type | ModuleType, name: str) -> Iterator[None]:
    """Have ``owner.name``, of a class or a module, call ``interceptor`` in this thread, for a ``with`` statement."""
    key, thread = (owner, name), threading.get_ident()
    with _lock:
        if key not in _methods:
            _methods[key] = _Intercepted(owner, name)
            setattr(owner, name, _methods[key].replacement)
        intercepted = _methods[key]
        intercepted.interceptors[thread].append(interceptor)
    try:
        yield
    finally:
        with _lock:
            intercepted.interceptors[thread].pop()
            _tidy()


def _tidy() -> None:
    """Restore the methods that nobody intercepts any more."""
    for (owner, name), intercepted in list(_methods.items()):
        for thread in [thread for thread, interceptors in intercepted.interceptors.items() if not interceptors]:
            del intercepted.interceptors[thread]
        if not intercepted.interceptors:
            del _methods[owner, name]
            if vars(owner)[name] is not intercepted.replacement:
                continue  # somebody has replaced it too, and calls ours
            if intercepted.inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, intercepted.method)


def _in_child(_: Any) -> None:
    """A forked child has only the thread that forked."""
    for intercepted in _methods.values():
        for thread in intercepted.interceptors.keys() - {threading.get_ident()}:
            del intercepted.interceptors[thread]
    _tidy()


locks.in_child(_lock, _in_child)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Have autocast cast a weight at each use, also in regions that are entered inside.

    The cache may contain casts from before a capture. They would be missing from the graph, and the weights would be
    frozen. What the caller has in the cache stays there. If no autocast is on, the flag is left alone, since Dynamo
    guards on it.
    """
    cached = torch.is_autocast_cache_enabled()
    if _torch.any_autocast_enabled():
        torch.set_autocast_cache_enabled(False)
    try:
        with (
            intercepted_by(_enter_without_cache, torch.autocast, "__enter__"),
            intercepted_by(_enter_without_cache, _torch.Autocast, "__enter__"),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _enter_without_cache(enter: Callable[[Any], Any], region: Any) -> Any:
    entered = enter(region)
    torch.set_autocast_cache_enabled(False)
    return entered
