"""When what was recorded goes: at once where no call is under way, else when that call ends."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from breakable_backend.active import in_call
from breakable_backend.calling.keys import Entry, Keys
from breakable_backend.calling.snapshot import Statistics
from breakable_backend.drivers import LOCK_TIMEOUT, CapturedGraph, CaptureDriver


def lose_patience(driver: CaptureDriver) -> None:
    """A call has waited for the lock in vain: until somebody has had it, no other call waits for it at all."""
    if driver.patience:
        driver.patience = 0.0
        driver.deferred.append(functools.partial(setattr, driver, "patience", LOCK_TIMEOUT))


def when_idle(driver: CaptureDriver, do: Callable[[], None]) -> None:
    """Do something once no call is under way: wait for another thread's; a call of this thread does it when it ends."""
    driver.deferred.append(do)
    if not in_call() and driver.lock.acquire(timeout=LOCK_TIMEOUT):
        driver.lock.release()
    run_deferred(driver)


def run_deferred(driver: CaptureDriver) -> None:
    """Release what waits to be released, unless a call is under way: then the end of that call does it.

    A static input can die at any moment and in any thread, also in the middle of a call that replays its recording.
    """
    while driver.deferred and not in_call() and driver.lock.acquire(blocking=False):
        try:
            if driver.busy:
                return  # with this thread
            if driver.deferred:  # still: before the lock was ours, another thread may have done it
                driver.deferred.popleft()()
        finally:
            driver.lock.release()


def watch(tensors: Iterable[torch.Tensor], driver: CaptureDriver, drop: Callable[[], None]) -> list[weakref.ref[Any]]:
    """Weak references to ``tensors``. Once one of them has died, and no call is under way, ``drop`` is called."""
    ending = sys.is_finalizing  # at the end of a process modules lose their names

    def died(_: Any) -> None:
        if not ending():
            driver.deferred.append(drop)
            run_deferred(driver)

    return [weakref.ref(tensor, died) for tensor in tensors]


def release(entries: Sequence[Entry], statistics: Statistics, keys: Keys, driver: CaptureDriver, *, wait: bool) -> None:
    """Free what was recorded for ``entries``. ``wait``: now, and wait for the GPU where it is still in use."""
    graphs: list[CapturedGraph] = []
    owner: list[Any] = []
    with keys.changing:
        for entry in entries:
            recording, replay, run = entry.recording, entry.replay, entry.run
            entry.recording = entry.replay = entry.run = None
            if recording is not None and replay is not None:
                statistics.finished_replays += entry.replays
                statistics.finished_copies += entry.record_copies + replay.tally.copies
                graphs += recording.graphs
                owner += recording, replay, run
            del recording, replay, run  # the owner's alone from here on
    driver.release(graphs, owner, wait=wait)  # with nothing left, the pool goes too


def release_all(keys: Keys, statistics: Statistics, driver: CaptureDriver) -> None:
    """Free everything; for an executor that is gone."""
    while keys.sets:
        release(keys.take_set(next(iter(keys.sets))), statistics, keys, driver, wait=False)
    driver.settle()
