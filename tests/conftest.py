"""What all tests share: a clean start and end, and fixtures that run a test without a GPU and with one."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist

import breakable_backend
from breakable_backend import BreakableCUDAGraph, _torch
from breakable_backend.drivers import CaptureDriver
from breakable_backend.drivers.cuda import CudaDriver
from breakable_backend.drivers.tape import TapeDriver
from gpu import settled

NO_GPU = "needs a CUDA GPU: torch.cuda.is_available() is False"

# Compiling takes longer than any deadline, and a failure that comes and goes helps nobody.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

# What torch writes for whoever listens, a tenth of a compilation. Pytest listens to all loggers that do not propagate.
logging.getLogger("torch.__trace").propagate = True


def _check(guards: Any, values: dict[str, Any], times: int) -> float:
    """What torch does to say in its log how long the guards take, but without an empty cache of the processor."""
    guards.check(values)
    return 0.0


torch._dynamo.guards.profile_guard_manager = _check  # a tenth, too

# Without such a device torch keeps a seed for later, and formats the stack for it: a twentieth of the tests' time.
for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():
        devices.manual_seed_all = lambda seed: None  # type: ignore[assignment]

if _torch.may_use_freed_guards():  # else the process may crash as it ends, all tests passed
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_collection_finish() -> None:
    """What is imported by now is not garbage. Left out of each collection it saves a third of a second in each.

    What the first compilation imports belongs to it. The process that only hands out tests to workers does not need it.
    Nothing is frozen later: what a test leaves alive, and drops afterwards, would never be collected, nor its recordings.
    """
    importlib.import_module("preloaded")
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Each test starts from the same seed and leaves nothing compiled, recorded or marked behind."""
    random.seed(0)
    torch.manual_seed(0)
    grad = torch.is_grad_enabled()
    # What dynamic= sets while it compiles is one setting for all threads: two that compile at once may leave it behind.
    static = torch._dynamo.config.assume_static_by_default
    yield
    torch._dynamo.config.assume_static_by_default = static
    torch.set_grad_enabled(grad)
    torch.compiler.reset()
    torch._dynamo.pgo.reset_code_state()  # torch 2.11 keeps what it learned of sizes: the next test's would be dynamic
    breakable_backend.reset()


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For inference, but where a test says otherwise."""
    with torch.no_grad():
        yield


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request: pytest.FixtureRequest) -> Iterator[CaptureDriver]:
    """A driver of each kind. A test has to release what it captured: no block of the pool may be left."""
    driver = TapeDriver(torch.device("cpu")) if request.param == "tape" else CudaDriver(torch.device("cuda", 0))
    failed_before = request.session.testsfailed
    yield driver
    if request.session.testsfailed == failed_before:  # a failed test says what is wrong by itself
        gc.collect()
        assert driver.live_blocks() == 0, "the test left blocks allocated in the driver's pool"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that compiled functions run on."""
    return torch.device(request.param)


@pytest.fixture
def options(device: torch.device) -> dict[str, Any]:
    """The options for :func:`torch.compile` on ``device``."""
    return {"driver": "cuda" if device.type == "cuda" else "tape"}


@pytest.fixture
def for_inductor(request: pytest.FixtureRequest, device: torch.device) -> dict[str, Any]:
    """The options for ``backend="inductor"``: on the CPU it compiles C++ for tests marked ``kernels`` alone."""
    if device.type == "cuda":
        return {}
    if request.node.get_closest_marker("kernels") or "fallback_by_default" not in torch._inductor.list_options():
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            pytest.skip("Inductor needs a C++ compiler for the CPU: neither $CXX nor g++ is there")
        return {}
    return {"fallback_by_default": True}


@pytest.fixture
def order_of_gradients(device: torch.device) -> None:
    """Second derivatives of eager that do not depend on what the process did before.

    A backward adds up gradients in the order in which its nodes run: younger ones first, by a count that each thread has
    of the nodes that it made. On a GPU what ``create_graph=True`` makes is made in autograd's thread, and all else in
    this one. So eager has other bits once one count has overtaken the other. Here this thread's gets far ahead.
    """
    x = torch.ones(1, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad((x * x).sum(), x, create_graph=True)
    assert grad.grad_fn is not None
    aim, count = grad.grad_fn._sequence_nr() + 1000, 0
    while count < aim:
        count = (x * 1).grad_fn._sequence_nr()  # type: ignore[union-attr]


@pytest.fixture
def kind(device: torch.device) -> str:
    """The name of the driver for ``device``."""
    return "cuda" if device.type == "cuda" else "tape"


@pytest.fixture
def make(kind: str) -> Iterator[Callable[..., BreakableCUDAGraph]]:
    """Makes graphs for ``capture``, and checks at the end that no block of their pools is left."""
    made: list[BreakableCUDAGraph] = []

    def graph(**arguments: Any) -> BreakableCUDAGraph:
        made.append(BreakableCUDAGraph(driver=kind, **arguments))
        return made[-1]

    yield graph
    drivers = [graph._driver for graph in made if graph._driver is not None]
    for graph in made:
        graph.reset()
    gc.collect()
    assert all(map(settled, drivers))


@pytest.fixture
def group(device: torch.device, tmp_path: Path) -> Iterator[Any]:
    """A process group of one."""
    kind = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
