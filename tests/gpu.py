"""What the tests share for the sake of GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from breakable_backend import breakable_cg
from breakable_backend.drivers import CaptureDriver


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``function``, compiled to CUDA graphs by the one backend of this process."""
    return torch.compile(function, backend=breakable_cg, options={"driver": "cuda", **options})


def settled(driver: CaptureDriver) -> bool:
    """Whether a driver has nothing left, at once or soon."""
    until = time.monotonic() + 10
    while time.monotonic() < until and (driver.live_blocks() or driver.pool_bytes()):
        time.sleep(0.01)
    return driver.live_blocks() == driver.pool_bytes() == 0
