"""What the tests share for the sake of GPUs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from breakable_backend import breakable_cg
from breakable_backend.drivers import CaptureDriver


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``function``, compiled to CUDA graphs by the one backend of this process."""
    return torch.compile(function, backend=breakable_cg, options={"driver": "cuda", **options})


def soon(condition: Callable[[], bool]) -> bool:
    """Whether something holds, at once or within ten seconds: autograd's thread lets go of a backward a little later."""
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def settled(driver: CaptureDriver) -> bool:
    """Whether a driver has nothing left, at once or soon."""
    return soon(lambda: driver.live_blocks() == driver.pool_bytes() == 0)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Have this process no more than ``size`` bytes of the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
