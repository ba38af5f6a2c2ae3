"""A user's Triton kernels in compiled code: what they only read is not written, and what they write is."""

from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend.calling.registry import executors_of
from breakable_backend.ir import effects
from checks import program_of

triton: Any = pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for CUDA")
tl: Any = pytest.importorskip("triton.language")
pytestmark = pytest.mark.gpu
OPTIONS = {"driver": "cuda", "min_kernels": 1}
DEVICE = torch.device("cuda", 0)


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(source, target, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``target += source``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    total = tl.load(target + at, mask=inside) + tl.load(source + at, mask=inside)
    tl.store(target + at, total, mask=inside)


def add_into(source: Tensor, target: Tensor) -> None:
    add_kernel[(triton.cdiv(target.numel(), 64),)](source, target, target.numel(), BLOCK=64)


def reads(x: Tensor) -> Tensor:
    """A kernel that reads an argument and writes memory of the graph's own."""
    y = torch.zeros_like(x)
    add_into(x, y)
    return silly.triple(y).sin() + x


def writes(x: Tensor, y: Tensor) -> Tensor:
    """A kernel that reads one argument and writes another."""
    add_into(x, y)
    return silly.triple(y * 2).sin() + x


def test_a_kernel_reads() -> None:
    """Line 3: an argument that a kernel only reads is never written, not even with its own values."""
    compiled = torch.compile(reads, backend="breakable_cg", options=OPTIONS)
    for _ in range(8):
        x = torch.randn(100, device=DEVICE)
        with torch.no_grad():
            assert torch.equal(compiled(x), reads(x))
        assert x._version == 0
    assert program_of(compiled).replays == 6


def test_a_kernel_writes() -> None:
    """Line 5: an argument that a kernel writes is written, at the caller's storage, also at a new address in each call."""
    compiled = torch.compile(writes, backend="breakable_cg", options=OPTIONS)
    with torch.no_grad():
        for _ in range(12):
            x, y = torch.randn(100, device=DEVICE), torch.randn(100, device=DEVICE)
            mine, theirs = y.clone(), y.clone()
            assert torch.equal(compiled(x, mine), writes(x, theirs))
            assert torch.equal(mine, theirs)
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert program.replays >= 3


def test_what_a_kernel_writes() -> None:
    """Torch's analysis of a kernel's code tells the tensor that is stored to from the one that is loaded."""
    compiled = torch.compile(writes, backend="breakable_cg", options=OPTIONS)
    with torch.no_grad():
        compiled(torch.randn(100, device=DEVICE), torch.randn(100, device=DEVICE))
    (executor,) = executors_of(compiled)
    (node,) = [node for node in executor.lowered.module.graph.nodes if "triton" in str(node.target)]
    assert effects.written_arguments(node) == [node.kwargs["kwargs"]["target"]]
