"""Python's garbage collector, held off while graphs are recorded: it may free device memory in the middle of a capture.

It is held off through its threshold, and not through ``gc.disable()``. So if somebody else enables or disables it
meanwhile, that stays.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from breakable_backend import locks

_lock = locks.lock()
_holders: Counter[int] = Counter()
"""How often each thread holds it off, by thread id."""
_threshold = 0
"""The threshold that the first holder found, and the last one restores."""


@contextmanager
def held_off() -> Iterator[None]:
    """No automatic collection, in any thread, until the last such ``with`` block of all threads ends.

    A call of ``gc.collect()`` still collects.
    """
    global _threshold
    thread = threading.get_ident()
    with _lock:
        if not _holders:
            _threshold = gc.get_threshold()[0]
            gc.set_threshold(0)
        _holders[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _holders[thread] -= 1
            _settle()


def _settle() -> None:
    """Restore the threshold if nobody holds it off, unless somebody has set another one meanwhile."""
    for thread in [thread for thread, count in _holders.items() if count == 0]:
        del _holders[thread]
    if not _holders and gc.get_threshold()[0] == 0:
        gc.set_threshold(_threshold)


def _in_child(_: Any) -> None:
    """A forked child has only the thread that forked. Nobody else would end what the others began."""
    if _holders:
        for thread in set(_holders) - {threading.get_ident()}:
            del _holders[thread]
        _settle()


locks.in_child(_lock, _in_child)
