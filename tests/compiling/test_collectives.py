"""Functional collectives in compiled code: issued once for each call, and waited for in the segment that issues them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, ReplayError, _torch, capture
from breakable_backend.drivers import tape
from breakable_backend.ir.effects import WAIT
from checks import program_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
SIZE = 1 << 18
"""Elements, so many that a collective is under way for a while."""


def ops() -> Any:
    return torch.ops._c10d_functional


def gathered(x: Tensor, name: str) -> Tensor:
    """A collective and its wait, one behind the other."""
    return ops().wait_tensor(ops().all_gather_into_tensor(x * 2, 1, name)) + 1


def over_a_break(x: Tensor, name: str) -> Tensor:
    """An eager step between a collective and its wait."""
    y = ops().all_reduce(x * 2, "sum", name)
    z = silly.triple(x.sin())
    return ops().wait_tensor(y) + z.cos()


def several(x: Tensor, name: str) -> Tensor:
    """A collective with two results, one of which is waited for behind an eager step."""
    a, b = ops().all_reduce_coalesced([x * 2, x + 1], "sum", name)
    a = ops().wait_tensor(a)
    z = silly.triple(a.sin())
    return ops().wait_tensor(b) + z


def in_place(x: Tensor, name: str) -> Tensor:
    """A collective as torch.distributed has it, which writes its argument."""
    y = x * 2
    dist.all_reduce(y)
    return y + silly.triple(x.sin())


def of_an_eager_step(x: Tensor, name: str) -> Tensor:
    """A collective at the end of an eager segment, whose wait could be captured."""
    y = ops().all_reduce(silly.triple(x), "sum", name)
    return (ops().wait_tensor(y) + 1).sin() * 2


def not_waited(x: Tensor, name: str) -> Tensor:
    """A collective that is waited for by whoever takes the result."""
    return ops().all_reduce(x * 2, "sum", name)


FUNCTIONS = [gathered, over_a_break, several, in_place, of_an_eager_step, not_waited]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_collectives(
    function: Callable[..., Tensor], group: Any, device: torch.device, options: dict[str, Any]
) -> None:
    """Lines 1 and 3: a collective is issued once in each call, recording included, and what it makes is there when it is read."""
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    name, counts = group.group_name, []
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(SIZE, device=device)
            before = group._get_sequence_number_for_group()
            got = ops().wait_tensor(compiled(x, name))
            counts.append(group._get_sequence_number_for_group() - before)
            assert torch.equal(got, ops().wait_tensor(function(x, name)))
    program = program_of(compiled)
    assert program.replays == 6
    if device.type == "cpu":
        assert counts == [1] * 8
    else:
        assert counts == [1, 1] + [0] * 6  # NCCL counts what is issued, and not what a graph launches


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_segment_waits(
    function: Callable[..., Tensor], group: Any, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 3: each segment waits for what it issues, so that no graph ends, and no bridge is loaded, before it is there."""
    options = {**options, "min_kernels": 1, "eager_ops": ["_c10d_functional::all_reduce"]}
    for chosen in ({**options, "eager_ops": []}, options):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="breakable_cg", options=chosen)
        with torch.no_grad():
            for _ in range(4):
                x = torch.randn(SIZE, device=device)
                got, want = compiled(x, group.group_name), function(x, group.group_name)
                assert torch.equal(ops().wait_tensor(got), ops().wait_tensor(want))
        segments = program_of(compiled).text.split("  segment ")[1:]
        issuing = [text for text in segments if "_c10d_functional.all" in text]
        assert issuing
        assert all(WAIT.replace("::", ".") in text for text in issuing)


def test_the_tape_waits_for_each_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 3: the tape copies what a collective has made only after that was waited for, however quick the collective is."""
    waited: list[Tensor] = []
    monkeypatch.setattr(_torch, "wait_tensor", lambda: lambda tensor: waited.append(tensor) or tensor)
    made = [torch.ones(2), torch.zeros(2)]
    assert tape._Awaited(lambda: made)() == made  # type: ignore[arg-type]
    assert [id(tensor) for tensor in waited] == [id(tensor) for tensor in made]


def test_a_group_that_ends_releases(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """Line 10: before a group ends, all that holds its collectives is freed: NCCL waits for such graphs without end."""
    for number in range(2):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{tmp_path}/{number}",
            rank=0,
            world_size=1,
        )
        assert dist.group.WORLD is not None
        name = dist.group.WORLD.group_name
        torch.compiler.reset()
        compile_alike = functools.partial(torch.compile, backend="breakable_cg", options={**options, "min_kernels": 1})
        with_group, without = compile_alike(over_a_break), compile_alike(lambda x: x.sin() + 1)
        graphs = [BreakableCUDAGraph(driver=options["driver"]) for _ in range(2)]
        x = torch.randn(SIZE, device=device)
        with torch.no_grad():
            for _ in range(4):
                with_group(x, name), without(x)
            with capture(graphs[0]):
                gathered(x, name)
            with capture(graphs[1]):
                x.sin()
        assert len(program_of(with_group).recordings) == 1
        dist.destroy_process_group()
        assert program_of(with_group).recordings == ()
        assert len(program_of(without).recordings) == 1
        with pytest.raises(ReplayError, match="a process group ended; the graph was released"):
            graphs[0].replay()
        graphs[1].replay()
        graphs[1].reset()
