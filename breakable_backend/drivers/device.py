"""What each driver has, whatever it captures: a device, a lock, and who is in its pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from breakable_backend import locks
from breakable_backend.drivers import LOCK_TIMEOUT, Tenant
from breakable_backend.drivers.room import Room


class DeviceDriver:
    """The state that :class:`breakable_backend.drivers.CaptureDriver` asks for, of one device."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.lock = locks.lock()
        self.patience = LOCK_TIMEOUT
        self.busy = False
        self.tenants: list[Callable[[], Tenant | None]] = []
        self.room = Room()
        self.deferred: deque[Callable[[], None]] = deque()
        locks.in_child(self, type(self)._forked)

    def _forked(self) -> None:
        """In a forked child: a call that another thread was in is none there."""
        if not locks.is_ours(self.lock):
            self.busy = False
