"""What leaves a driver for CUDA while the GPU is at work: who waits for it, and when it goes. Without a GPU, but for one test."""

from __future__ import annotations

import gc
import threading
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import cuda
from gpu import compiled


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
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu.said.append("empties the cache"))
    return gpu


def driver_on(gpu: Gpu) -> Any:
    """A driver for CUDA with a pool, and no graphs."""
    driver: Any = cuda.CudaDriver.__new__(cuda.CudaDriver)
    driver.lock, driver.busy, driver._lost, driver._recordings = threading.RLock(), False, False, 0
    driver._leaving, driver._live, driver._order = deque(), set(), gpu
    driver._pool, driver._keeper, driver._kept = (0, 1), object(), None
    driver._draws = SimpleNamespace(leave=lambda pool, holder: None)
    driver.is_capturing = lambda: False
    return driver


class Graph(cuda.CudaGraph):
    """One that is captured already, of nothing."""

    def __init__(self) -> None:
        self._graph = None

    def release(self) -> None:
        """Nothing to give back."""


def test_what_dies_beside_others_is_waited_for_by_nobody(gpu: Gpu) -> None:
    """While others have graphs in the pool, what dies goes at the end of a call after the GPU is done; the pool stays."""
    driver, owner, mine, other = driver_on(gpu), [object()], Graph(), Graph()
    driver._live |= {mine, other}
    driver.release((mine,), owner, wait=False)
    driver.settle()
    driver._give_back()
    assert owner and mine in driver._live
    gpu.working = False
    driver._give_back()
    assert owner == [] and driver._live == {other} and driver._pool is not None and gpu.said == []


def test_the_last_that_dies_takes_the_pool_along(gpu: Gpu) -> None:
    """Where nothing else is captured the host waits, and memory is back at once."""
    driver, owner, mine = driver_on(gpu), [object()], Graph()
    driver._live |= {mine}
    driver.release((mine,), owner, wait=False)
    driver.settle()
    assert owner == [] and driver._pool is None and not driver._live
    assert gpu.said[-1] == "empties the cache"


@pytest.mark.parametrize("keeps", ["busy", "_recordings"])
def test_the_pool_stays_in_a_call(gpu: Gpu, keeps: str) -> None:
    """In a call, or a recording, the pool stays though nothing is captured in it."""
    driver = driver_on(gpu)
    setattr(driver, keeps, 1)
    driver.settle()
    assert driver._pool is not None and gpu.said == []


def test_a_reset_waits(gpu: Gpu) -> None:
    """Who asks for memory has it when the call returns."""
    driver, owner = driver_on(gpu), [object()]
    driver.release((), owner)
    assert gpu.said == ["waits", "empties the cache"] and owner == [] and driver._pool is None


@pytest.mark.gpu
def test_a_model_that_dies_while_the_gpu_is_busy(no_grad: None) -> None:
    """Dropping one of several models, whose call has not ended on the GPU, returns at once; later calls give its memory back."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).cuda()

    dies, stays = model(), model()
    function, other = compiled(dies), compiled(stays)
    x = torch.randn(4, 64, device="cuda")
    for _ in range(3):
        function(x), other(x)
    driver = executors_of(function)[0].driver
    torch.cuda.synchronize()
    before = driver.live_graphs()
    done = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)
    function(x)
    done.record()
    del dies, function
    gc.collect()
    assert not done.query() and driver.live_graphs() == before
    torch.cuda.synchronize()
    other(x)
    assert driver.live_graphs() < before
