"""Methods of torch's own classes, seen for the time of a capture.

Events and autocast regions tell no dispatch mode that they are used, and under a mode for functions Dynamo would compile
everything anew. So their methods are replaced while a capture is under way, and call what the capture's thread gave;
in every other thread, and afterwards, they are what they were.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from breakable_backend import _torch, locks

Seer = Callable[..., Any]
"""Called with the method as it was, and with what the method was called with."""


class _Seen:
    """One method while somebody sees it."""

    def __init__(self, owner: type, name: str) -> None:
        self.seers: dict[int, list[Seer]] = defaultdict(list)
        """By thread; the innermost is the last."""
        self.method = method = vars(owner)[name]

        @functools.wraps(method)
        def seen(*args: Any, **kwargs: Any) -> Any:
            seers = self.seers.get(threading.get_ident())
            return seers[-1](method, *args, **kwargs) if seers else method(*args, **kwargs)

        self.seen = seen


_lock = locks.lock()
_methods: dict[tuple[type, str], _Seen] = {}
"""Empty unless a capture is under way."""


@contextmanager
def seen_by(seer: Seer, owner: type, name: str) -> Iterator[None]:
    """Have ``owner.name`` call ``seer`` in this thread, for a ``with`` statement."""
    key, thread = (owner, name), threading.get_ident()
    with _lock:
        if key not in _methods:
            _methods[key] = _Seen(owner, name)
            setattr(owner, name, _methods[key].seen)
        seen = _methods[key]
        seen.seers[thread].append(seer)
    try:
        yield
    finally:
        with _lock:
            seen.seers[thread].pop()
            _tidy()


def _tidy() -> None:
    """Give back the methods that nobody sees any more."""
    for (owner, name), seen in list(_methods.items()):
        for thread in [thread for thread, seers in seen.seers.items() if not seers]:
            del seen.seers[thread]
        if not seen.seers:
            del _methods[owner, name]
            if vars(owner)[name] is seen.seen:  # else somebody has replaced it in turn, and calls ours
                setattr(owner, name, seen.method)


def _in_child(_: Any) -> None:
    """Of all threads, a forked child has only the one that forked."""
    for seen in _methods.values():
        for thread in seen.seers.keys() - {threading.get_ident()}:
            del seen.seers[thread]
    _tidy()


locks.in_child(_lock, _in_child)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Have autocast cast a weight at each use, also in regions that are entered inside.

    Its cache holds casts from before a capture: they would be missing from the graph, and the weights frozen. What the
    caller has in it stays there. Where no autocast is on, the flag is left alone: Dynamo guards on it.
    """
    cached = torch.is_autocast_cache_enabled()
    if _torch.any_autocast_enabled():
        torch.set_autocast_cache_enabled(False)
    try:
        with seen_by(_enter_without_cache, torch.autocast, "__enter__"):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _enter_without_cache(enter: Callable[[Any], Any], region: Any) -> Any:
    entered = enter(region)
    torch.set_autocast_cache_enabled(False)
    return entered
