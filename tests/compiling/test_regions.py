"""Regions of ``torch.compiler.nested_compile_region``: one that an eager step lies in is cut as other code is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import eager_on_graph, eager_region, explain, mark_eager, unmark_eager
from breakable_backend.backend import executors_of
from checks import assert_same, program_of

pytestmark = pytest.mark.usefixtures("no_grad")


def check(function: Any, device: torch.device, options: dict[str, Any], graphs: int, eager: int, **more: Any) -> Any:
    """Six calls are eager's, and what is captured are so many segments; the compiled function."""
    compiled = torch.compile(function, backend="breakable_cg", options={"min_kernels": 1, **options}, **more)
    for call in range(6):
        x = torch.randn(8, 8, device=device)
        torch.manual_seed(call)
        want = function(x.clone())
        torch.manual_seed(call)
        assert_same(compiled(x), want, f"call {call}")
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (graphs, eager), program.reasons
    assert program.replays == 4
    return compiled


def regions_in(compiled: Any) -> int:
    """How many calls of regions are left in the lowered graph."""
    (executor,) = executors_of(compiled)
    return sum("invoke_subgraph" in str(node.target) for node in executor.lowered.module.graph.nodes)


@eager_on_graph
def doubled(x: Tensor) -> Tensor:
    """A marked function."""
    return x * 2


@torch.compiler.nested_compile_region
def tagged(x: Tensor) -> Tensor:
    """A region with a tagged op."""
    return silly.triple(x.sin() + 1).cos() * 2


@torch.compiler.nested_compile_region
def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """A region with nothing but torch's own ops, and two results."""
    return x.sin() + 1, x.cos()


@torch.compiler.nested_compile_region
def whole(x: Tensor) -> Tensor:
    """A region in which torch's own ops wait for the host."""
    return torch.linalg.svdvals(x.cos()).sum() + x.sin() * 2


@torch.compiler.nested_compile_region
def sorted_there(x: Tensor) -> Tensor:
    """A region with an eager region."""
    y = x.sin() * 2
    with eager_region():
        y = y.sort().values
    return y.cos() + 1


@torch.compiler.nested_compile_region
def function_in(x: Tensor) -> Tensor:
    """A region that calls a marked function."""
    return doubled(x.sin() + 1).cos() + 1


@torch.compiler.nested_compile_region
def outer(x: Tensor) -> Tensor:
    """A region in a region."""
    return tagged(x.exp()) - x


@torch.compiler.nested_compile_region
def drawing(x: Tensor) -> Tensor:
    """A region that writes, draws, and has a step between the two."""
    y = x.clone()
    y.add_(1)
    z = silly.triple(y)
    y.mul_(2)
    return z + y + torch.rand_like(y)


@torch.compiler.nested_compile_region
def stubborn(x: Tensor) -> Tensor:
    """A region with an op that no rule knows."""
    return silly.stubborn(x.sin() + 1).cos() * 2


def test_a_region_of_torchs_ops(device: torch.device, options: dict[str, Any]) -> None:
    """A region of which all is captured stays one node in each place, and so costs what it costs to trace once."""
    compiled = check(lambda x: plain(plain(x)[0] + 1)[0], device, options, 1, 0)
    assert regions_in(compiled) == 2


REGIONS = {
    "tagged": tagged,
    "eager_region": sorted_there,
    "marked function": function_in,
    "nested": outer,
    "writes and draws": drawing,
    "cannot be captured": stubborn,
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_cut_through_regions(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """A mark in a region, or an op that cannot be captured, costs itself in each place; the rest of the region is captured."""
    region = REGIONS[name]
    compiled = torch.compile(lambda x: region(region(x)), backend="breakable_cg", options=options)
    for call in range(8):
        x = torch.randn(8, 8, device=device)
        torch.manual_seed(call)
        want = region(region(x))
        torch.manual_seed(call)
        assert_same(compiled(x), want, f"call {call}")
    program = max(explain(compiled).programs, key=lambda program: program.replays)  # a marked function learns first
    assert program.replays >= 4
    assert (program.num_graph_segments, program.num_eager_segments) == (3, 2), program.reasons


def test_rules_look_into_regions(device: torch.device, options: dict[str, Any]) -> None:
    """What a rule finds among torch's own ops in a region is eager alone."""
    compiled = check(lambda x: whole(whole(x)), device, options, 3, 2)
    assert {reason.op for reason in program_of(compiled).reasons} == {"aten::_linalg_svd"}


def test_only_regions_with_a_cut(device: torch.device, options: dict[str, Any]) -> None:
    """A region without a cut stays a node beside one with a cut."""
    compiled = check(lambda x: tagged(plain(tagged(plain(x)[0]))[0]), device, options, 3, 2)
    assert regions_in(compiled) == 2


def test_ops_marked_by_name(device: torch.device, options: dict[str, Any]) -> None:
    """An op of torch's that is marked is found in regions, also one that tracing takes apart."""

    @torch.compiler.nested_compile_region
    def soft(x: Tensor) -> Tensor:
        return torch.softmax(x.sin() + 1, -1).cos()

    mark_eager("aten::softmax")
    try:
        check(lambda x: soft(soft(x)), device, options, 3, 2)
    finally:
        unmark_eager("aten::softmax")


def test_regions_of_modules(device: torch.device, options: dict[str, Any]) -> None:
    """Layers that are compiled as regions, as diffusers has them, each with its own weights."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(8))

        @torch.compiler.nested_compile_region
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return silly.triple(self.inner(x).relu() + 1) + self.count

    mine, theirs = nn.Sequential(*(Block() for _ in range(3))).to(device), nn.Sequential(*(Block() for _ in range(3)))
    theirs.load_state_dict(mine.state_dict())
    theirs.to(device)
    compiled = torch.compile(mine, backend="breakable_cg", options={"min_kernels": 1, **options})
    for call in range(6):
        x = torch.randn(4, 8, device=device)
        assert_same(compiled(x), theirs(x), f"call {call}")
        assert_same(list(mine.buffers()), list(theirs.buffers()))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (4, 3, 4)


def test_sizes_that_vary(device: torch.device, options: dict[str, Any]) -> None:
    """Regions with a cut work where sizes vary."""
    compiled = torch.compile(lambda x: tagged(tagged(x)), backend="breakable_cg", options=options, dynamic=True)
    for size in (2, 2, 2, 3, 3, 3, 2):
        x = torch.randn(size, 8, device=device)
        assert_same(compiled(x), tagged(tagged(x)))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.replays) == (3, 3)
