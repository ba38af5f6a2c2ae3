"""Ops of somebody's that no capture takes, that keep their arguments, or that raise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from breakable_backend import explain
from checks import assert_same, check

Body = Callable[[Tensor], Tensor]


def op(name: str, body: Body) -> Any:
    """An unmarked op of this name, whose result is like its argument."""
    made = torch.library.custom_op(f"hostile::{name}", body, mutates_args=(), schema="(Tensor x) -> Tensor")
    made.register_fake(torch.empty_like)
    return made


def around(hostile: Any) -> Callable[[Tensor], Tensor]:
    """A program with captured ops before and behind an op."""
    return lambda x: hostile(x.sin() + 1).cos() + x


# --- ops that no capture takes ----------------------------------------------------------------------------------------------


def waits(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x * 2


def waits_for_its_stream(x: Tensor) -> Tensor:
    y = x * 2
    torch.cuda.current_stream().synchronize()
    return y


def reads(x: Tensor) -> Tensor:
    return x * float(x.max())


def branches(x: Tensor) -> Tensor:
    return x * 2 if bool(x.sum() > 0) else x * 3


def allocates(x: Tensor) -> Tensor:
    from cuda.bindings import runtime

    error, address = runtime.cudaMalloc(1 << 20)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA error: {error.name}")
    runtime.cudaFree(address)
    return x * 2


def goes_through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.cpu().numpy() * 2).to(x.device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "body",
    [waits, waits_for_its_stream, reads, branches, allocates, goes_through_numpy],
    ids=lambda body: body.__name__,
)
def test_ops_that_no_capture_takes(body: Body) -> None:
    """Line 9: an op that waits, reads, or takes memory by itself is one eager step with its name; what is around it is captured."""
    if body is allocates:
        pytest.importorskip("cuda.bindings.runtime")
    function, device = around(op(f"{body.__name__}_alone", body)), torch.device("cuda")
    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "cuda", "min_kernels": 1})
    with torch.no_grad():
        for call in range(7):
            torch.manual_seed(call)
            x = torch.randn(2, 4, device=device)
            assert_same(compiled(x), function(x), f"call {call + 1}")
    (program,) = explain(compiled).programs
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert [reason.op for reason in program.reasons] == [f"hostile::{body.__name__}_alone"]
    assert program.replays > 0


# --- ops that keep, and that raise ------------------------------------------------------------------------------------------


def test_an_op_that_keeps_its_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: what an op has kept of its arguments spoils no result, and lives as long as it is kept."""
    kept: list[Tensor] = []

    def keeps(x: Tensor) -> Tensor:
        kept.append(x)
        return x * 2

    check(around(op("keeps", keeps)), lambda _: (torch.randn(2, 4, device=device),), device=device, options=options)
    assert kept


@pytest.mark.parametrize("call", [1, 2], ids=["plain", "recording"])
def test_an_op_that_raises(device: torch.device, options: dict[str, Any], call: int) -> None:
    """Line 8: what an op raises while it runs, or is captured, reaches the caller; the next call is right, and replays follow."""
    failing = contextlib.nullcontext
    raised = KeyError("no such page")

    def raises(x: Tensor) -> Tensor:
        with failing():
            return x * 2

    @contextlib.contextmanager
    def fails() -> Iterator[None]:
        raise raised
        yield

    function = around(op(f"raises_{call}_{device.type}", raises))
    compiled = torch.compile(function, backend="breakable_cg", options={"min_kernels": 1, **options})
    inputs = [torch.randn(2, 4, device=device) for _ in range(8)]
    with torch.no_grad():
        for number, x in enumerate(inputs, start=1):
            if number == call:
                failing = fails
                with pytest.raises(KeyError, match="no such page"):
                    compiled(x)
                failing = contextlib.nullcontext
            assert_same(compiled(x), function(x), f"call {number}")
    assert sum(program.replays for program in explain(compiled).programs) > 0
