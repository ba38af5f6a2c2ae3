"""When recordings are freed: at once if no call is running, and otherwise when the current call ends."""

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
    """A call has waited for the lock in vain. Until somebody else has held it, no other call waits for it."""
    if driver.patience:
        driver.patience = 0.0
        driver.deferred.append(functools.partial(setattr, driver, "patience", LOCK_TIMEOUT))


def when_idle(driver: CaptureDriver, do: Callable[[], None]) -> None:
    """Call ``do`` once no call is running: after another thread's call, or at the end of this thread's."""
    driver.deferred.append(do)
    if not in_call() and driver.lock.acquire(timeout=LOCK_TIMEOUT):
        driver.lock.release()
    run_deferred(driver)


def run_deferred(driver: CaptureDriver) -> None:
    """Do what was deferred, unless a call is running, whose end will do it.

    A static input can die at any moment and in any thread, even during a call that replays its recording.
    """
    while driver.deferred and not in_call() and driver.lock.acquire(blocking=False):
        try:
            if driver.busy:
                return  # the call is this thread's
            if driver.deferred:  # checked again: another thread may have done it before this one got the lock
                driver.deferred.popleft()()
        finally:
            driver.lock.release()


def watch(tensors: Iterable[torch.Tensor], driver: CaptureDriver, drop: Callable[[], None]) -> list[weakref.ref[Any]]:
    """Weak references to ``tensors``. If one of them dies, ``drop`` is called once no call is running."""
    ending = sys.is_finalizing  # looked up here, since modules lose their names at the end of a process

    def died(_: Any) -> None:
        if not ending():
            driver.deferred.append(drop)
            run_deferred(driver)

    return [weakref.ref(tensor, died) for tensor in tensors]


def release(entries: Sequence[Entry], statistics: Statistics, keys: Keys, driver: CaptureDriver, *, wait: bool) -> None:
    """Free what was recorded for ``entries``. ``wait``: now, and wait for the GPU if it is still in use."""
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
            del recording, replay, run  # from here on only the owner holds these
    driver.release(graphs, owner, wait=wait)  # if nothing is left, this frees the pool too


def release_all(keys: Keys, statistics: Statistics, driver: CaptureDriver) -> None:
    """Free everything, for an executor that has died."""
    while keys.sets:
        release(keys.take_set(next(iter(keys.sets))), statistics, keys, driver, wait=False)
    driver.settle()
