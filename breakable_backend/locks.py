"""Locks that a forked child process can take.

If a process forks while one of its threads holds a lock, nobody releases that lock in the child: only the thread that
forked exists there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_cleanups: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()


def lock() -> threading.RLock:
    """A reentrant lock that is free in a forked child, unless the thread that forked holds it."""
    made = threading.RLock()
    _locks.add(made)
    return made


def is_ours(lock: threading.RLock) -> bool:
    """Whether this thread holds ``lock``."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def in_child(owner: Any, cleanup: Callable[[Any], None]) -> None:
    """Call ``cleanup(owner)`` in each forked child, after all locks were freed, as long as ``owner`` lives."""
    _cleanups[owner] = cleanup


def _forked() -> None:
    for held in list(_locks):
        if held.acquire(blocking=False):
            held.release()
        else:
            held._at_fork_reinit()  # as Python's own modules do: logging, threading, concurrent.futures
    for owner, cleanup in list(_cleanups.items()):
        cleanup(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
