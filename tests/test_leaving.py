"""What leaves a driver for CUDA while the GPU is at work: nobody waits for it, and it goes in time. Without a GPU, but for one."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from breakable_backend import BreakableCUDAGraph, capture
from breakable_backend.backend import executors_of
from breakable_backend.drivers import cuda
from gpu import compiled, settled


class Gpu:
    """Stands for what a driver asks of a GPU: whether it is at work still, and events that come when it is not."""

    def __init__(self) -> None:
        self.working = True
        self.said: list[str] = []

    def is_open(self) -> bool:
        return True

    def is_idle(self) -> bool:
        return not self.working

    def event(self) -> Any:
        return SimpleNamespace(query=self.is_idle, synchronize=lambda: self.said.append("waits"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU, with as much of CUDA as a release uses."""
    gpu = Gpu()
    monkeypatch.setattr(cuda, "relaxed", nullcontext)
    monkeypatch.setattr(cuda, "SETTLE", 0.001)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu.said.append("empties the cache"))
    return gpu


def driver_on(gpu: Gpu) -> Any:
    """A driver for CUDA with a pool, and no graphs."""
    driver: Any = cuda.CudaDriver.__new__(cuda.CudaDriver)
    driver.lock, driver.busy, driver._lost, driver._recordings = threading.RLock(), False, False, 0
    driver._leaving, driver._live, driver._order = deque(), set(), gpu
    driver._pool, driver._keeper, driver._settler, driver._unreturned = (0, 1), object(), None, False
    driver._given_pool = None
    driver.is_capturing = lambda: False
    return driver


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not happened():
        time.sleep(0.002)
    return happened()


def test_what_dies_goes_when_the_gpu_is_done(gpu: Gpu) -> None:
    """What dies while the GPU is at work goes as soon as that is done, with the pool, though no call comes; nobody waits."""
    driver, owner = driver_on(gpu), [object()]
    driver.release((), owner, wait=False)
    driver.settle()
    assert owner and driver._pool is not None and gpu.said == []
    gpu.working = False
    assert within(5, lambda: gpu.said == ["empties the cache"])
    assert owner == [] and driver._pool is None and driver._keeper is None
    assert within(5, lambda: driver._settler is None)


def test_what_dies_while_the_gpu_is_idle_goes_at_once(gpu: Gpu) -> None:
    """Where the GPU is done already, memory is given back at once; the cache is emptied in a thread, since that waits."""
    gpu.working = False
    driver, owner = driver_on(gpu), [object()]
    driver.release((), owner, wait=False)
    driver.settle()
    assert owner == [] and driver._pool is None
    assert within(5, lambda: gpu.said == ["empties the cache"])


def test_the_pool_of_others_stays(gpu: Gpu) -> None:
    """While others have graphs in the pool, or a call is under way, it stays, and no cache is emptied."""
    gpu.working = False
    driver = driver_on(gpu)
    for keeps in ("_live", "busy", "_recordings"):
        before, _ = getattr(driver, keeps), setattr(driver, keeps, {object()} if keeps == "_live" else 1)
        driver.settle()
        setattr(driver, keeps, before)
    time.sleep(0.02)
    assert driver._pool is not None and driver._settler is None and gpu.said == []


def test_a_pool_of_the_callers_is_waited_for(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What dies in a ``MemPool`` is waited for: the pool may die with it, and must not do so in another thread."""
    monkeypatch.setattr(torch.cuda, "MemPool", type("MemPool", (), {}))
    driver, owner = driver_on(gpu), [object()]
    driver._given_pool = torch.cuda.MemPool()
    driver.release((), owner, wait=False)
    driver.settle()
    assert gpu.said == ["waits", "waits", "empties the cache"] and owner == [] and driver._settler is None


def test_no_cache_is_emptied_beside_a_capture(gpu: Gpu) -> None:
    """While another thread captures, nothing is given back in the background; it is afterwards."""
    gpu.working = False
    driver, owner = driver_on(gpu), [object()]
    assert cuda.captures.take()
    driver.release((), owner, wait=False)
    driver.settle()
    time.sleep(0.05)
    assert gpu.said == []
    cuda.captures.give()
    assert within(5, lambda: gpu.said == ["empties the cache"])


def test_a_reset_waits(gpu: Gpu) -> None:
    """Who asks for memory has it when the call returns."""
    driver, owner = driver_on(gpu), [object()]
    driver.release((), owner)
    assert gpu.said == ["waits", "empties the cache"] and owner == [] and driver._pool is None


@pytest.mark.gpu
@pytest.mark.parametrize("door", ["compile", "capture"])
def test_a_model_that_dies_while_the_gpu_is_busy(no_grad: None, door: str) -> None:
    """Dropping a model whose call has not ended on the GPU returns at once, and its memory comes back a little later."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).cuda(), torch.randn(4, 64, device="cuda")
    graph, function = BreakableCUDAGraph(driver="cuda"), compiled(model)
    for _ in range(3):
        function(x)
    if door == "capture":
        with capture(graph):
            y = model(x)
        del y
    driver = graph.driver if door == "capture" else executors_of(function)[0].driver
    assert driver is not None
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)
    graph.replay() if door == "capture" else function(x)
    done.record()
    del model, function
    gc.collect()
    assert not done.query() and driver.live_graphs() > 0
    assert settled(driver)
    assert done.query()
