"""Memory that another process shares with this one: two tensors over it, whatever their storages and addresses are."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.reductions import shared_cache

import fresh
from breakable_backend import capture, explain
from doors import MakeGraph

pytestmark = pytest.mark.usefixtures("no_grad")
SHARED = "arguments share memory, and one is written"
SIZE = 64


def send(device: str, tensors: Any, end: Any) -> None:
    """What the other process does: it sends one tensor twice, and a part of it, and lives as long as they are used."""
    mine = torch.arange(float(SIZE), device=device)
    for tensor in (mine, mine, mine[8:]):
        tensors.put(tensor)
    end.wait(120)


@pytest.fixture
def received(device: torch.device, tmp_path: Path) -> Iterator[Callable[[], Tensor]]:
    """Receives the next tensor of the other process, in a storage of its own."""
    context = get_context("spawn")
    tensors, end = context.Queue(), context.Event()
    arguments, on_cuda = (str(device), tensors, end), device.type == "cuda"
    process = fresh.process(send, *arguments, output=tmp_path / "output.txt", forked=not on_cuda)
    process.daemon = True
    process.start()

    def receive() -> Tensor:
        shared_cache.clear()  # otherwise a second tensor gets the storage of the first
        received: Tensor = tensors.get(timeout=120)
        return received

    yield receive
    gc.collect()
    end.set()
    process.join(60)


def mapped_twice() -> tuple[Tensor, Tensor]:
    """Two tensors at different addresses over one memory, as after an attachment by name in each of two places."""
    memory = shared_memory.SharedMemory(create=True, size=SIZE * 4)
    again = shared_memory.SharedMemory(memory.name)
    memory.unlink()
    first, second = (torch.frombuffer(each.buf, dtype=torch.float32) for each in (memory, again))
    for each in (memory, again):
        each.close = lambda: None  # type: ignore[method-assign]
    first.copy_(torch.arange(float(SIZE)))
    assert first.data_ptr() != second.data_ptr()
    return first, second


def write_and_read(first: Tensor, second: Tensor) -> Tensor:
    first.add_(1)
    return second * 2


def is_as_eager(first: Tensor, second: Tensor, offset: int, options: dict[str, Any]) -> Any:
    """Call it compiled; check what it returns and writes against eager; and return its report."""
    memory = first.clone()
    compiled = torch.compile(write_and_read, backend="breakable_cg", options={**options, "min_kernels": 1})
    for call in range(5):
        want = write_and_read(memory, memory[offset:])
        assert torch.equal(compiled(first, second), want), call
        assert torch.equal(first, memory) and torch.equal(second, memory[offset:]), call
    return explain(compiled)


@pytest.mark.parametrize("offset", [0, 8])
def test_received_twice(
    offset: int, received: Callable[[], Tensor], device: torch.device, options: dict[str, Any]
) -> None:
    """Two storages over a tensor of another process are found to overlap: the call is plain, and right."""
    first, same, part = received(), received(), received()
    second = part if offset else same
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    report = is_as_eager(first, second, offset, options)
    assert SHARED in str(report)
    # Without a write of theirs, they are captured.
    compiled = torch.compile(
        lambda a, b: a[: len(b)] + b, backend="breakable_cg", options={**options, "min_kernels": 1}
    )
    for _ in range(4):
        assert torch.equal(compiled(first, second), first[: len(second)] + second)
    assert any(program.replays for program in explain(compiled).programs)


def test_received_twice_at_the_second_door(
    received: Callable[[], Tensor], device: torch.device, make: MakeGraph
) -> None:
    """A capture reads and writes such memory at its addresses, as eager does."""
    first, second, _ = received(), received(), received()
    memory, graph = first.clone(), make()
    with capture(graph):
        result = write_and_read(first, second)
    assert torch.equal(result, write_and_read(memory, memory))
    for _ in range(3):
        graph.replay()
        assert torch.equal(result, write_and_read(memory, memory)) and torch.equal(second, memory)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no table of mappings on this system")
@pytest.mark.parametrize("made", ["attached", "mapped"])
def test_mapped_twice(made: str, make: MakeGraph, kind: str) -> None:
    """One memory that is mapped at two addresses is found on the host."""
    if kind == "cuda":
        pytest.skip("memory on the host is captured on the tape alone")
    first, second = mapped_twice() if made == "attached" else mapped_by_file()
    assert SHARED in str(is_as_eager(first, second, 0, {"driver": "tape"}))
    memory, graph = first.clone(), make()
    with capture(graph):
        result = write_and_read(first, second)
    graph.replay()
    write_and_read(memory, memory)
    assert torch.equal(result, write_and_read(memory, memory))


def mapped_by_file() -> tuple[Tensor, Tensor]:
    descriptor = os.memfd_create("shared")
    os.ftruncate(descriptor, SIZE * 4)
    first, second = (torch.frombuffer(mmap.mmap(descriptor, SIZE * 4), dtype=torch.float32) for _ in range(2))
    os.close(descriptor)
    first.copy_(torch.arange(float(SIZE)))
    return first, second


def test_mapped_apart(device: torch.device) -> None:
    """Two memories that are mapped, each at one address, are captured although one is written."""
    if device.type == "cuda":
        pytest.skip("memory on the host is captured on the tape alone")
    first, second = mapped_by_file()[0], mapped_by_file()[0]
    compiled = torch.compile(write_and_read, backend="breakable_cg", options={"driver": "tape", "min_kernels": 1})
    for _ in range(4):
        assert torch.equal(compiled(first, second), second * 2)
    report = explain(compiled)
    assert any(program.replays for program in report.programs) and SHARED not in str(report)
