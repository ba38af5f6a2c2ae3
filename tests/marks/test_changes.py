"""Python values that a marked function changes: code behind its call sees them, as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import PartitionError, eager_on_graph, explain
from checks import assert_same

pytestmark = pytest.mark.usefixtures("no_grad")

Mark = Callable[[Any], Any]
Made = tuple[Callable[[Tensor], Any], list[Any]]
"""A model, and what its functions write down."""


def plain(function: Any) -> Any:
    return function


class Counts(nn.Module):
    def __init__(self, mark: Mark, log: list[Any]) -> None:
        super().__init__()
        self.steps, self.log, self.last = 0, log, None
        self.register_buffer("sums", torch.zeros(4))
        self.note = mark(self._note)

    def _note(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.last, self.sums = x * 2, self.sums.to(x) + x
        self.log.append(self.steps)
        return x * self.steps


class ReadsAttributes(Counts):
    def forward(self, x: Tensor) -> Any:
        return self.note(x.sin()).cos() * self.steps


class ReadsTensors(Counts):
    def forward(self, x: Tensor) -> Any:
        before = self.sums + 1
        return self.note(x.sin()).cos() + self.last, self.sums * 2, before


def attributes(mark: Mark) -> Made:
    log: list[Any] = []
    return ReadsAttributes(mark, log), log


def tensors(mark: Mark) -> Made:
    log: list[Any] = []
    return ReadsTensors(mark, log), log


def a_cell(mark: Mark) -> Made:
    count, log = 0, []

    def advance() -> None:
        nonlocal count
        count += 1

    @mark
    def step(x: Tensor) -> Tensor:
        advance()
        log.append(count)
        return x * count

    return lambda x: step(x.sin()).cos() * count, log


def an_item(mark: Mark) -> Made:
    held, log = [torch.zeros(4)], []

    @mark
    def add(x: Tensor) -> None:
        held[0] = held[0].to(x) + x

    def model(x: Tensor) -> Tensor:
        add(x.sin())
        return held[0] * 2

    return model, log


class Holder:
    """A class of the user's."""


def an_object(mark: Mark) -> Made:
    holder, log = Holder(), []
    holder.count, holder.by_name = 0, {"sum": 0.0}

    @mark
    def note(x: Tensor) -> None:
        holder.count += 1
        holder.by_name["sum"] += float(x.sum())

    def model(x: Tensor) -> Tensor:
        note(x.sin())
        return x.cos() * holder.count + holder.by_name["sum"]

    return model, log


state = {"count": 0}


def a_global(mark: Mark) -> Made:
    state["count"] = 0

    @mark
    def note(x: Tensor) -> None:
        state["count"] += 1

    def model(x: Tensor) -> Tensor:
        note(x.sin())
        return x.cos() * state["count"]

    return model, []


def a_list_that_both_write(mark: Mark) -> Made:
    log: list[Any] = []

    @mark
    def note(x: Tensor) -> Tensor:
        log.append(float(x.sum()))
        return x * 2

    def model(x: Tensor) -> Tensor:
        log.append("before")
        x = note(x.sin())
        log.append("behind")
        return x.cos()

    return model, log


READ = [attributes, tensors, a_cell, an_item, an_object, a_global, a_list_that_both_write]


def vectors(device: torch.device, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, generator=generator).to(device) for _ in range(count)]


def runs(make: Callable[[Mark], Made], mark: Mark, compile_with: Mark, inputs: list[Tensor]) -> tuple[Any, Any]:
    """What each call returns and what was written down by then; and the function that was called."""
    model, log = make(mark)
    function = compile_with(model.to(inputs[0].device) if isinstance(model, nn.Module) else model)
    return [(function(x), list(log)) for x in inputs], function


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_code_behind_sees_what_was_changed(
    make: Callable[[Mark], Made], options: dict[str, Any], device: torch.device
) -> None:
    """A function that changes what the code around it reads is a break for that reason, and each call is eager's."""
    inputs = vectors(device, 7)
    compiled = lambda model: torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options})  # noqa: E731
    got, function = runs(make, eager_on_graph, compiled, inputs)
    want, _ = runs(make, plain, plain, inputs)
    for number, (mine, theirs) in enumerate(zip(got, want, strict=True), start=1):
        assert_same(mine, theirs, f"call {number}")
    assert any(", which the code around it reads, at" in why for why in explain(function).graph_breaks)


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_one_graph_cannot_see_it(make: Callable[[Mark], Made], options: dict[str, Any], device: torch.device) -> None:
    """Under ``fullgraph=True`` calls are eager's as long as the function runs as Python, and an error from then on."""
    inputs = vectors(device, 7)
    whole = lambda model: torch.compile(model, backend="breakable_cg", options=options, fullgraph=True)  # noqa: E731
    want, _ = runs(make, plain, plain, inputs)
    model, _ = make(eager_on_graph)
    function = whole(model.to(device) if isinstance(model, nn.Module) else model)
    with pytest.raises(PartitionError, match="which the code around it reads"):
        for x, (theirs, _) in zip(inputs, want, strict=True):
            assert_same(function(x), theirs)


def counted(mark: Mark) -> Made:
    log: list[Any] = []
    model = Counts(mark, log)
    return lambda x: model.note(x.sin()).cos() + x, log


def set_once(mark: Mark) -> Made:
    log: list[Any] = []
    holder = Holder()
    holder.is_ready, holder.table = False, None

    @mark
    def look_up(x: Tensor) -> Tensor:
        if holder.table is None:
            holder.is_ready, holder.table = True, torch.arange(4, device=x.device)
        log.append(float(x.sum()))
        return x + holder.table

    return lambda x: look_up(x.sin()).cos() if holder.is_ready else look_up(x.sin()).cos() + 0, log


@pytest.mark.parametrize("make", [counted, set_once], ids=lambda make: make.__name__)
def test_one_program_where_nothing_reads_it(
    make: Callable[[Mark], Made], options: dict[str, Any], device: torch.device
) -> None:
    """Counters and logs that no code around reads, and what is set once, leave one program."""
    inputs = vectors(device, 8)
    compiled = lambda model: torch.compile(  # noqa: E731
        model, backend="breakable_cg", options={"min_kernels": 1, **options}, fullgraph=True
    )
    got, function = runs(make, eager_on_graph, compiled, inputs)
    want, _ = runs(make, plain, plain, inputs)
    assert_same(got, want)
    (program,) = explain(function).programs
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert program.replays >= 4
