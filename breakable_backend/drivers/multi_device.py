"""Several devices under one recording: a driver for each, and a group whose segments are captured by their own drivers.

Each segment is captured on one device, and launched on the current stream of that device. What goes from one device to
another is copied by an eager step, and torch orders both streams around a copy, as in eager. So nothing here orders
devices.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from breakable_backend import locks
from breakable_backend.drivers import CapturedGraph, CaptureDriver, Capturing, Pairs, Tenant
from breakable_backend.drivers.device import GraphAround
from breakable_backend.drivers.pool_size import PoolSize

T = TypeVar("T")


class GraphElsewhere(GraphAround):
    """A graph of another device than the first, launched on the current stream of its own device."""

    def __init__(self, graph: CapturedGraph, at: _Elsewhere) -> None:
        super().__init__(graph)
        self.at = at

    def replay(self, stream: int) -> None:
        self.graph.replay(self.at.stream)

    def copier(self, like: torch.Tensor) -> None:
        """None: the given stream would be one of the first device."""


class _Elsewhere:
    """Another device than the first; see :class:`breakable_backend.drivers.Capturing`."""

    def __init__(self, driver: CaptureDriver) -> None:
        self.driver, self.device, capturing = driver, driver.device, driver.on(driver.device)
        self.stream = 0
        """The raw handle of the device's current stream in this call."""
        self._capture = capturing.capture
        self.feeds, self.let_out, self.progress = capturing.feeds, capturing.let_out, capturing.progress
        self.allocating, self.lend = capturing.allocating, capturing.lend

    def begin(self) -> None:
        self.stream = self.driver.begin()

    def end(self) -> None:
        self.driver.end(self.stream)

    def capture(self, body: Callable[[], T], fed: Pairs = ()) -> tuple[CapturedGraph, T]:
        graph, result = self._capture(body, fed)
        return GraphElsewhere(graph, self), result


class _Locks:
    """Several locks as one, always taken in the same order."""

    def __init__(self, locks: Sequence[threading.RLock]) -> None:
        self._locks = locks

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        until = time.monotonic() + timeout
        for position, lock in enumerate(self._locks):
            left = timeout if timeout <= 0 else max(0.0, until - time.monotonic())
            if not (lock.acquire(True, left) if blocking else lock.acquire(False)):
                for taken in self._locks[:position]:
                    taken.release()
                return False
        return True

    def release(self) -> None:
        for lock in self._locks:
            lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Tenants:
    """An owner of recordings in the pools of several drivers is a tenant of each."""

    def __init__(self, drivers: Sequence[CaptureDriver]) -> None:
        self._drivers = drivers

    def append(self, tenant: Callable[[], Tenant | None]) -> None:
        for driver in self._drivers:
            driver.tenants.append(tenant)

    def remove(self, tenant: Callable[[], Tenant | None]) -> None:
        for driver in self._drivers:
            driver.tenants.remove(tenant)

    def __iter__(self) -> Iterator[Callable[[], Tenant | None]]:
        """The tenants of the first driver, whose pool size is the one that is asked for."""
        return iter(self._drivers[0].tenants)


class _Deferred(deque[Callable[[], None]]):
    """Functions to call once no call is running, even one on a single device. Whoever ends the last call does it."""

    def __init__(self, drivers: Sequence[CaptureDriver], run: Callable[[], None]) -> None:
        super().__init__()
        self._drivers, self._run = drivers, run

    def append(self, do: Callable[[], None]) -> None:
        super().append(do)
        for driver in self._drivers:
            driver.deferred.append(self._run)


class _Share(list[Any]):
    """One driver's share in an owner. Once each driver has cleared its share, the owner is cleared."""

    def __init__(self, owner: list[Any], shares: list[Any]) -> None:
        super().__init__()
        self._owner, self._shares = owner, shares
        shares.append(None)

    def clear(self) -> None:
        self._shares.pop()
        if not self._shares:
            self._owner.clear()


class DeviceGroup:
    """Drives ``first`` and ``others``, each on its own device; see :class:`breakable_backend.drivers.CaptureDriver`.

    It has no pool and no state of its own. A call holds the locks of all drivers, and runs in all of them. Programs on
    a single device share the pools, and use the same locks.
    """

    def __init__(self, first: CaptureDriver, others: Sequence[CaptureDriver]) -> None:
        self._drivers = (first, *others)
        self.name, self.device = first.name, first.device
        self.devices = tuple(driver.device for driver in self._drivers)
        self.reuses_memory = first.reuses_memory
        in_order = sorted(self._drivers, key=lambda driver: driver.device.index or 0)
        self._lock = _Locks([driver.lock for driver in in_order])
        self.lock: Any = self._lock
        self.tenants: Any = _Tenants(self._drivers)
        self.deferred: deque[Callable[[], None]] = _Deferred(self._drivers, self._run_deferred)
        self._elsewhere = {driver.device: _Elsewhere(driver) for driver in others}

    # state

    @property
    def busy(self) -> bool:
        return any(driver.busy for driver in self._drivers)

    @busy.setter
    def busy(self, busy: bool) -> None:
        for driver in self._drivers:
            driver.busy = busy

    @property
    def patience(self) -> float:
        return min(driver.patience for driver in self._drivers)

    @patience.setter
    def patience(self, patience: float) -> None:
        for driver in self._drivers:
            driver.patience = patience

    @property
    def pool_size(self) -> PoolSize:
        """The first driver's: what a program needs is not known by device, and the first has most of it or about half."""
        return self._drivers[0].pool_size

    @pool_size.setter
    def pool_size(self, pool_size: PoolSize) -> None:
        self._drivers[0].pool_size = pool_size

    def _run_deferred(self) -> None:
        """Called when a call on a single device has ended: do what waited for that call too.

        If another thread has one of the locks, the end of its call calls this again. It looks for that after it has
        released the lock, so it is told before the locks are tried a last time.
        """
        while self.deferred:
            if not self._lock.acquire(blocking=False):
                for driver in self._drivers:
                    if not locks.is_ours(driver.lock) and self._run_deferred not in driver.deferred:
                        driver.deferred.append(self._run_deferred)
                if not self._lock.acquire(blocking=False):
                    return
            try:
                if self.busy:
                    return
                if self.deferred:
                    self.deferred.popleft()()
            finally:
                self._lock.release()

    # calls

    def on(self, device: torch.device) -> Capturing:
        return self._elsewhere.get(device) or self._drivers[0].on(device)

    def begin(self) -> int:
        stream = self._drivers[0].begin()
        for elsewhere in self._elsewhere.values():
            elsewhere.begin()
        return stream

    def end(self, stream: int) -> None:
        self._drivers[0].end(stream)
        for elsewhere in self._elsewhere.values():
            elsewhere.end()

    def note_arguments(self, args: Sequence[Any]) -> None:
        for driver in self._drivers:
            driver.note_arguments(args)

    def is_capturing(self) -> bool:
        return any(driver.is_capturing() for driver in self._drivers)

    def give_up(self, why: str) -> None:
        for driver in self._drivers:
            driver.give_up(why)

    # captures

    @contextmanager
    def recording(self, apart: bool = False) -> Iterator[Any]:
        with ExitStack() as stack:
            kept = [stack.enter_context(driver.recording(apart)) for driver in self._drivers]
            yield kept if any(memory is not None for memory in kept) else None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        with ExitStack() as stack:
            for driver in self._drivers:
                stack.enter_context(driver.drawing())
            yield

    # release

    def has_room(self, size: int) -> bool:
        return all(driver.has_room(size) for driver in self._drivers)

    def make_room(self) -> None:
        for driver in self._drivers:
            driver.make_room()

    def vacate(self) -> None:
        for driver in self._drivers:
            driver.vacate()

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        mine: dict[torch.device, list[CapturedGraph]] = {device: [] for device in self.devices}
        for graph in graphs:
            if isinstance(graph, GraphElsewhere):
                mine[graph.at.device].append(graph.graph)
            else:
                mine[self.device].append(graph)
        shares: list[Any] = []
        owned = [_Share(owner if owner is not None else [], shares) for _ in self._drivers]
        for driver, share in zip(self._drivers, owned, strict=True):
            driver.release(mine[driver.device], share, wait=wait)
        for driver in self._drivers if wait else ():
            driver.release(())  # the owner still held memory in the first pools when they were to be freed

    def settle(self) -> None:
        for driver in self._drivers:
            driver.settle()

    def pool_bytes(self) -> int:
        return sum(driver.pool_bytes() for driver in self._drivers)

    def executable_bytes(self) -> int:
        return sum(driver.executable_bytes() for driver in self._drivers)

    def live_blocks(self) -> int:
        return sum(driver.live_blocks() for driver in self._drivers)

    def live_graphs(self) -> int:
        return sum(driver.live_graphs() for driver in self._drivers)
