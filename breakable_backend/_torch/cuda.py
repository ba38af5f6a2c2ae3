"""Pools, captures and streams of CUDA, and a callback before a process group ends."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def before_groups_end(release: Callable[[], None]) -> None:
    """Have ``release`` called before a process group destroys its communicators.

    NCCL waits without a time limit until all graphs that contain its work are destroyed. (torch 2.11 to 2.15)
    """
    group = torch.distributed.ProcessGroup
    shutdown = group.shutdown

    @functools.wraps(shutdown)
    def released(*args: Any, **kwargs: Any) -> Any:
        release()
        return shutdown(*args, **kwargs)

    group.shutdown = released  # type: ignore[method-assign]


demangle: Callable[[str], str] = torch._C._demangle
"""A C++ symbol in its C++ spelling. Other strings are returned unchanged."""

# A CPU build lacks these names. Only the CUDA driver calls them.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)

clear_cublas_workspaces: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)

is_stream_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)

ONE_CAPTURE_STATE: bool = torch.__version__ < "2.13"  # a TorchVersion, which compares as versions do
"""Whether a CUDA generator has one capture state for all graphs (torch 2.11), or one for each capture (from 2.13
on)."""


def keep_for_ever(thing: Any) -> None:
    """Never destroy ``thing``, not even at the end of the process: its destructor could fail there, or abort."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def launch_hooks(graph: torch.cuda.CUDAGraph) -> tuple[Mapping[int, Any], ...]:
    """Where hooks on launches of ``graph`` are kept, for ``CUDAGraph.replay``. Read in 2.14.1 and 2.15.0; 2.13 has none."""
    module: Any = torch.cuda.graphs
    if not hasattr(module, "_global_replay_start_hooks"):
        return ()
    own: Any = graph
    of_all = module._global_replay_start_hooks, module._global_replay_end_hooks
    return (*of_all, own._replay_start_hooks, own._replay_end_hooks)


def release_pool(device: int, pool: tuple[int, int]) -> None:
    """Give up one use of ``pool``, for a graph whose ``capture_end`` failed, and which will never give it up itself."""
    torch._C._cuda_releasePool(device, pool)


@contextmanager
def allocating_to_pool(device: int, pool: tuple[int, int]) -> Iterator[None]:
    """Route this thread's allocations to ``pool``, which is in use and stays so. Read in 2.11, 2.13, 2.14.1 and 2.15."""
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


@contextmanager
def memory_as_it_is() -> Iterator[None]:
    """Have ``torch.empty`` launch nothing. Under deterministic algorithms it fills memory with NaN, by a launch.

    The setting belongs to the process. Only one caller at a time may change it.
    """
    filled = torch.are_deterministic_algorithms_enabled() and torch._C._get_deterministic_fill_uninitialized_memory()
    if not filled:
        yield
        return
    torch._C._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_fill_uninitialized_memory(True)


def stop_allocating_to_pool(device: int, pool: tuple[int, int]) -> bool:
    """End the routing of allocations to ``pool`` that a failed capture has left behind. Returns whether there was any."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError as error:
        if "not currently recording" not in str(error):
            raise
        return False
    return True
