"""Python's cycle collector, held off while graphs are recorded: it may free device memory in the middle of a capture.

It is held off through its threshold, and not through ``gc.disable()``: what anybody else enables or disables meanwhile
stays as they left it.
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
"""How often each thread holds it off, by the thread's number."""
_threshold = 0
"""What the first holder found, and the last one puts back."""


@contextmanager
def held_off() -> Iterator[None]:
    """No collection by itself, in any thread, until the last ``with`` block of all threads ends.

    A call of ``gc.collect()`` collects all the same.
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
    """Let it go when nobody holds it; a threshold that somebody set meanwhile stays."""
    for thread in [thread for thread, count in _holders.items() if count == 0]:
        del _holders[thread]
    if not _holders and gc.get_threshold()[0] == 0:
        gc.set_threshold(_threshold)


def _in_child(_: Any) -> None:
    """After a fork there is only the thread that forked; nobody else would end what he began."""
    if _holders:
        for thread in set(_holders) - {threading.get_ident()}:
            del _holders[thread]
        _settle()


locks.in_child(_lock, _in_child)
