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

    def point(address: int) -> None:
        asked.append(address)
        if refusing[0]:
            raise ReplayError("cudaGraphLaunch failed: planted")

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


class Executables:
    """Stands for CUDA, whose executable graphs refuse a copy memory of another kind than it had in the graph."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToDevice=3)

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[int, int]] = {}
        """The source and the target of each copy in the graph. Memory from 1000 on is of another kind."""
        self.executable: dict[str, tuple[int, int]] = {}
        self.off: set[str] = set()
        self.launched: list[dict[str, tuple[int, int]]] = []
        self.instantiated = 0

    def instantiate(self) -> None:
        self.executable, self.off = dict(self.nodes), set()
        self.instantiated += 1

    def reset(self) -> None:
        pass

    def replay(self) -> None:
        self.launched.append({node: pair for node, pair in self.executable.items() if node not in self.off})

    def raw_cuda_graph_exec(self) -> int:
        return self.instantiated

    def cudaGraphExec_t(self, handle: int) -> int:
        return handle

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        assert executable == self.instantiated, "this one is gone"
        self.replay()
        return (0,)

    def cudaGraphNodeSetEnabled(self, executable: int, node: str, on: int) -> tuple[int]:
        assert executable == self.instantiated, "this one is gone"
        (self.off.discard if on else self.off.add)(node)
        return (0,)

    def cudaGraphMemcpyNodeSetParams1D(self, node: str, target: int, source: int, *_: int) -> tuple[int]:
        self.nodes[node] = source, target
        return (0,)

    def cudaGraphExecMemcpyNodeSetParams1D(
        self, executable: int, node: str, target: int, source: int, *_: int
    ) -> tuple[int]:
        assert executable == self.instantiated, "this one is gone"
        before = self.nodes[node]
        if (source < 1000, target < 1000) != (before[0] < 1000, before[1] < 1000):
            return (1,)
        self.executable[node] = source, target
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:
        return (0,)


def test_memory_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 4: where CUDA refuses a copy an address, the next launch instantiates the graph anew, with all of its copies."""
    cuda_now = Executables()
    monkeypatch.setattr(cuda, "cudart", cuda_now)
    monkeypatch.setattr(cuda._torch, "launch_hooks", lambda graph: ())
    monkeypatch.setattr(cuda._torch, "current_device", lambda: 0)
    draws: Any = SimpleNamespace(
        index=0,
        begin_replay=lambda stream: None,
        end_replay=lambda stream: None,
        generator=SimpleNamespace(get_offset=lambda: 0),
    )
    graph: Any = cuda.CudaGraph(cuda_now, draws)  # type: ignore[arg-type]
    cuda_now.nodes = {"in": (1, 10), "same": (2, 20), "out": (30, 3), "other": (40, 4)}
    graph.instantiate()
    pointers = [graph._pointer(cuda._Copy(node, cuda_now.nodes[node][1], 0, 8)) for node in ("in", "same")]
    outlets = [LetOut(torch.ones(3)), LetOut(torch.ones(3))]
    for outlet, node in zip(outlets, ("out", "other"), strict=True):
        graph.let_out(outlet, cuda._Copy(node, 0, cuda_now.nodes[node][0], 8))

    def launch(into: int, same: int, out: int, other: int) -> dict[str, tuple[int, int]]:
        pointers[0](into)
        outlets[0].lead(out)
        pointers[1](same)
        outlets[1].lead(other)
        graph.replay(0)
        return cuda_now.launched[-1]

    assert launch(1, 2, 3, 4) == {"in": (1, 10), "same": (2, 20), "out": (30, 3), "other": (40, 4)}
    assert launch(5, 20, 6, 4) == {"in": (5, 10), "out": (30, 6), "other": (40, 4)}
    assert cuda_now.instantiated == 1
    assert launch(5, 20, 1006, 7) == {"in": (5, 10), "out": (30, 1006), "other": (40, 7)}
    assert cuda_now.instantiated == 2
    assert launch(5, 2, 1007, 7) == {"in": (5, 10), "same": (2, 20), "out": (30, 1007), "other": (40, 7)}
    assert cuda_now.instantiated == 2
    assert launch(1001, 2, 3, 4) == {"in": (1001, 10), "same": (2, 20), "out": (30, 3), "other": (40, 4)}
    assert cuda_now.instantiated == 3
    assert graph._executable == 3, "the next launch is direct"


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
