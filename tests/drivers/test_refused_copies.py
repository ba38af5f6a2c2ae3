"""Copies at the head of a graph, where CUDA refuses them: who is told what, and what holds afterwards. Without a GPU."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from breakable_backend.drivers import cuda
from breakable_backend.drivers.graph_copies import Fed, LetOut
from breakable_backend.errors import CaptureError, ReplayError
from breakable_backend.internal_errors import raise_if_ours

INVALID = "operation failed due to a previous error during capture (901)"


class CudaError(int):
    """Stands for CUDA's numbers of errors."""

    success = 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver for CUDA in a recording, whose captures begin and end."""
    driver: Any = cuda.CudaDriver.__new__(cuda.CudaDriver)
    driver.lock, driver._recordings, driver._first, driver._pool = threading.RLock(), 1, False, (0, 1)
    driver._given_pool, driver.capture_error_mode, driver._index, driver._several = None, "thread_local", 0, False
    driver._live, driver._draws = set(), SimpleNamespace(index=0)
    driver.ended, graph = (
        [],
        SimpleNamespace(capture_begin=lambda **_: None, instantiate=lambda: None, reset=lambda: None),
    )
    driver._made, driver._end = lambda: graph, driver.ended.append
    monkeypatch.setattr(cuda._torch, "launch_hooks", lambda graph: ())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (0, 0))
    return driver


def test_a_capture_that_is_invalid_before_its_copies(driver: Any) -> None:
    """Where another thread has made a capture invalid before its copies, it is ended, and that is a failure that passes."""

    def invalid(bridge: torch.Tensor, value: torch.Tensor) -> None:
        raise RuntimeError(INVALID)

    driver.copy = invalid
    with pytest.raises(CaptureError, match="previous error during capture") as caught:
        driver.begin_capture([(torch.empty(2), torch.ones(2))])
    assert caught.value.passing == "disturbed"
    assert len(driver.ended) == 1


def test_copies_that_are_not_found_in_the_graph(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA does not tell the copies of a graph, that is a failed capture, which leaves no graph behind."""

    def untold(graph: Any, fed: Any) -> None:
        raise ReplayError("cuGraphGetNodes failed: planted")

    monkeypatch.setattr(cuda.CudaGraph, "feed", untold)
    graph = driver.begin_capture()
    with pytest.raises(CaptureError, match="cuGraphGetNodes failed"):
        driver.end_capture(graph, None, [(torch.empty(2), torch.ones(2))])
    assert not driver._live


def test_a_copy_that_could_not_be_patched() -> None:
    """Whatever comes after a value that could not be taken is taken anew, be it at the address of one before."""
    asked, refusing = [], [False]

    def point(address: int) -> bool:
        asked.append(address)
        if refusing[0]:
            raise ReplayError("cudaGraphLaunch failed: planted")
        return True

    bridge, first, second = torch.empty(3), torch.ones(3), torch.zeros(3)
    fed = Fed(bridge, first, point)
    refusing[0] = True
    with pytest.raises(ReplayError):
        fed.take(second)
    refusing[0] = False
    assert fed.source != first.data_ptr()
    fed.take(first)
    assert asked == [second.data_ptr(), first.data_ptr()]
    assert fed.source == first.data_ptr()


@pytest.mark.parametrize("kind", [Fed, LetOut])
def test_memory_of_another_kind(kind: type) -> None:
    """Where CUDA takes no memory that torch's allocator gives since its settings have changed, that is a typed error."""
    first = torch.ones(3)
    made = Fed(torch.empty(3), first, lambda address: False) if kind is Fed else LetOut(first)
    if isinstance(made, LetOut):
        made.point = lambda address: False
    with pytest.raises(ReplayError, match="expandable_segments"):
        made.take(torch.zeros(3)) if isinstance(made, Fed) else made.lead(torch.zeros(3).data_ptr())


def test_what_cuda_says_of_a_copy_in_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own error for a copy between launches is told as that, and not as a fault of the package."""
    told = SimpleNamespace(cudaError=CudaError, cudaGetErrorString=lambda code: "not permitted")
    kinds = SimpleNamespace(cudaMemcpyDeviceToDevice=3)
    monkeypatch.setattr(torch.cuda, "_cudart", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(cuda, "cudart", SimpleNamespace(cudaMemcpyAsync=lambda *_: (900,), cudaMemcpyKind=kinds))
    graph: Any = cuda.CudaGraph.__new__(cuda.CudaGraph)
    graph._graph = graph._index = None
    copy = graph.copier(torch.ones(3))
    with pytest.raises(torch.cuda.CudaError, match="not permitted") as caught:
        copy(1, 2, 0)
    raise_if_ours(caught.value, logging.getLogger("breakable_backend.test"))
