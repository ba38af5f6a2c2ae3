"""One model through both doors: compiled and called, or captured and replayed; the same bits as in eager each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import breakable_backend
import fresh
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import CaptureDriver
from breakable_backend.ir.program import GraphSegment
from breakable_backend.recordings.recording import GraphStep
from checks import assert_same, snapshot

Inputs = Callable[[int, torch.device], tuple[Any, ...]]
MakeGraph = Callable[..., BreakableCUDAGraph]
"""The fixture ``make``."""
CALLS = 6
seen: list[Any] = []
"""What eager functions of the cases say they saw; the same at both doors and in eager."""


def bend(x: Tensor) -> Tensor:
    """What no graph can hold: Python that looks at values."""
    return x * 2 if x.sum() > 0 else x - 1


marked_bend = eager_on_graph(bend)


def vectors(number: int, device: torch.device) -> tuple[Any, ...]:
    """One vector, of negative sum in the calls 1 and 2, of positive sum later."""
    return (torch.arange(4.0, device=device) + number * 3 - 4,)


@dataclass(frozen=True)
class Case:
    """A model with marked functions in it, how its inputs change, and what has to come of it."""

    build: Callable[[], Callable[..., Any]]
    """Makes the function; each side has one of its own, with its own state."""
    captured: str
    """Steps of the graph that ``capture`` makes: G for a segment, E for an eager step."""
    compiled: str
    """Segments of the compiled programs, which are set apart by a bar."""
    inputs: Inputs = vectors
    """The arguments of a call, by its number from 0: the same whenever they are asked for."""
    in_place: bool = False
    """Whether compiled calls get the same tensors each time, with new values."""
    stubbed: bool = False
    """Whether the function has a stub and a barrier for the capture, which say so."""
    looks: bool = True
    """Whether everything of the result is compared, or its bits alone: it may be conjugated otherwise."""


def compiled(case: Case, device: torch.device, kind: str) -> None:
    """Calls that learn, a plain one, one that records, and replays. No result may be changed by a later call."""
    mine, theirs = case.build(), case.build()
    options = {"driver": kind, "min_kernels": 1}
    function = torch.compile(mine, backend="breakable_cg", options=options)
    kept, learning = [], 0
    given = case.inputs(0, device)
    for number in range(CALLS):
        given = written(given, case.inputs(number, device)) if case.in_place else case.inputs(number, device)
        expected = case.inputs(number, device)
        got, saw = call(function, given, number)
        want, should = call(theirs, expected, number)
        same(case, got, want, f"call {number + 1}")
        assert saw == should, number
        assert_same(given, expected, f"call {number + 1}: inputs after it")
        kept.append((got, snapshot(got)))
        churn(device)
        learning += not executors_of(function)
    for number, (got, before) in enumerate(kept):
        assert snapshot(got) == before, f"the result of call {number + 1} was changed"
    assert learning <= 2
    executors = executors_of(function)
    assert segments(executors) == case.compiled, str(explain(function))
    replays = [program.replays for program in explain(function).programs if program.num_graph_segments]
    assert replays == [CALLS - 2 - learning] * len(replays), str(explain(function))
    breakable_backend.reset(function)
    assert all(executor.driver.live_blocks() == 0 for executor in executors if executor.driver is not None)


def captured(case: Case, device: torch.device, kind: str, **arguments: Any) -> None:
    """A capture, which runs for real, and replays with inputs that are written in place."""
    mine, theirs = case.build(), case.build()
    given = case.inputs(0, device)
    graph = BreakableCUDAGraph(driver=kind)
    seen.clear()
    torch.manual_seed(0)
    with capture(graph, **arguments):
        got = mine(*given)
    saw = list(seen)
    want, should = call(theirs, case.inputs(0, device), 0)
    if case.stubbed:
        assert saw == ["barrier", "stub"]
    else:
        same(case, got, want, "capture")
        assert saw == should
    assert shape_of(graph) == case.captured, str(explain(graph))
    for number in range(1, CALLS):
        churn(device)
        written(given, case.inputs(number, device))
        expected = case.inputs(number, device)
        seen.clear()
        torch.manual_seed(number)
        graph.replay()
        saw = list(seen)
        want, should = call(theirs, expected, number)
        same(case, got, want, f"replay {number}")
        assert saw == should, number
        assert_same(given, expected, f"replay {number}: inputs after it")
    driver = graph.driver
    del got
    graph.reset()
    assert driver is not None
    assert (driver.live_blocks(), driver.pool_bytes()) == (0, 0)


def call(function: Callable[..., Any], arguments: tuple[Any, ...], number: int) -> tuple[Any, list[Any]]:
    """Call with the seed of the call; returns the result, and what eager functions saw."""
    seen.clear()
    torch.manual_seed(number)
    result = function(*arguments)
    return result, list(seen)


def same(case: Case, got: Any, want: Any, what: str) -> None:
    """The same bits; and the same looks, where the case has them compared."""
    if case.looks:
        assert_same(got, want, what)
    else:
        plain = [pytree.tree_map_only(Tensor, lambda t: t.resolve_conj().resolve_neg(), tree) for tree in (got, want)]
        assert_same(*plain, what)


def written(targets: Any, values: Any) -> Any:
    """New values in the same tensors."""
    for target, value in zip(pytree.tree_leaves(targets), pytree.tree_leaves(values), strict=True):
        if isinstance(target, Tensor):
            target.copy_(value)
    return targets


def churn(device: torch.device) -> None:
    """Make and drop tensors full of NaN, which come to lie in any memory that is free by mistake."""
    for size in (1, 2, 4, 8, 64):
        kept = [torch.full((size,), math.nan, device=device) for _ in range(4)]
        del kept


def segments(executors: list[Any]) -> str:
    """The segments of compiled programs as letters."""
    programs = (executor.program.segments for executor in executors)
    return "|".join("".join("G" if isinstance(s, GraphSegment) else "E" for s in program) for program in programs)


def shape_of(graph: BreakableCUDAGraph) -> str:
    """The steps as letters: ``GEG`` is a segment, an eager step, a segment."""
    assert graph.recording is not None
    return "".join("G" if isinstance(step, GraphStep) else "E" for step in graph.recording.steps)


def replays_equal(
    graph: BreakableCUDAGraph, body: Callable[[Tensor], Any], x: Tensor, result: Any, times: int = 3
) -> None:
    """After new values in ``x``, ``graph.replay()`` brings ``result`` to what ``body`` gives, bit for bit."""
    for _ in range(times):
        x.copy_(torch.randn_like(x))
        want = body(x.clone())
        graph.replay()
        assert torch.equal(result, want)


class Opened:
    """A function that went through a door, and runs again on new values of its inputs."""

    def __init__(self, door: str, function: Callable[..., Any], inputs: tuple[Any, ...], kind: str) -> None:
        self.inputs = inputs
        self.function: Callable[..., Any] | None = None
        self.graph: BreakableCUDAGraph | None = None
        if door == "compile":
            options = {"driver": kind, "min_kernels": 1}
            self.function = torch.compile(function, backend="breakable_cg", options=options)
            self.result = self.function(*inputs)
            self.function(*inputs)  # records
        else:
            self.graph = BreakableCUDAGraph(driver=kind)
            with capture(self.graph, debug="eager" if door == "debug" else None):
                self.result = function(*inputs)

    def __call__(self, *values: Any) -> Any:
        """The result for new values: of a call with them, or of a replay after they were written in place."""
        if self.function is not None:
            return self.function(*values)
        assert self.graph is not None
        written(self.inputs, values)
        self.graph.replay()
        return self.result

    def free(self) -> list[CaptureDriver]:
        """Free everything; returns the drivers that captured it."""
        if self.function is not None:
            drivers = [executor.driver for executor in executors_of(self.function)]
            breakable_backend.reset(self.function)
        else:
            assert self.graph is not None
            drivers = [self.graph.driver]
            self.result = None
            self.graph.reset()
        return [driver for driver in drivers if driver is not None]


def close(*opened: Opened) -> None:
    """Free everything; no block of a pool may be left."""
    drivers = [driver for one in opened for driver in one.free()]
    assert [driver.live_blocks() for driver in drivers] == [0] * len(drivers)


def run_alone(code: str) -> None:
    """Run ``code`` in a process of its own, which has to end well and say nothing."""
    done = fresh.python(code)
    assert (done.returncode, done.stderr) == (0, ""), f"{done.returncode}: {done.stderr}"
