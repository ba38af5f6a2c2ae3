"""Faults of this package in a call: told as its own at every door. What is the user's, or the device's, is left alone."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import InternalError, capture, eager_on_graph
from breakable_backend.calling import compiled_graph as compiled_graph
from breakable_backend.capturing import graph as graph_module
from breakable_backend.errors import first_line
from breakable_backend.internal_errors import internal, raise_if_ours
from breakable_backend.ir.ambient_modes import Modes
from checks import compile_both
from doors import MakeGraph, bend, marked_bend, replays_equal

pytestmark = pytest.mark.usefixtures("no_grad")
log = logging.getLogger("breakable_backend.test")
ASSERTION = '!capturing_ INTERNAL ASSERT FAILED at "CUDAGeneratorImpl.cpp":7, please report a bug to PyTorch. It is'


def told_as_ours(call: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """The error names this package and a way out, shows the user's line, and has what went wrong; so has the log."""
    caplog.clear()
    with caplog.at_level(logging.ERROR, "breakable_backend"), pytest.raises(InternalError) as caught:
        call()
    text = str(caught.value)
    assert "breakable_cg failed internally with TypeError: 'NoneType' object is not callable" in text
    assert "test_internal_errors.py" in text and "the package breakable_backend" in text and "backend='eager'" in text
    assert isinstance(caught.value.original, TypeError)
    assert [record.message for record in caplog.records] == ["this is a fault of breakable_backend"]


@pytest.mark.parametrize(("place", "calls"), [("Entry", 0), ("plain_recording", 0), ("record", 1), ("check_places", 2)])
def test_a_fault_in_a_call(
    device: torch.device,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    calls: int,
) -> None:
    """What fails in this package while it finds a key, runs plainly, records or replays is told; the next call is right."""
    compiled, eager = compile_both(lambda x: silly.triple(x + 1) * 2, options)
    x = torch.ones(3, device=device)
    if not calls:
        compiled(torch.ones(2, device=device))  # compiles, with another key
        torch._dynamo.mark_dynamic(x, 0)
    for _ in range(calls):
        compiled(x)
    monkeypatch.setattr(compiled_graph, place, None)
    told_as_ours(lambda: compiled(x), caplog)
    monkeypatch.undo()
    for _ in range(4):
        assert torch.equal(compiled(x), eager(x))


@pytest.mark.parametrize("place", ["EagerStep", "Captured"])
def test_a_fault_in_a_capture(
    make: MakeGraph, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """What fails in this package at a break, or at the end of a capture, is told; the next capture is right."""
    graph, x = make(), torch.randn(3, device=device)

    def body() -> Tensor:
        with capture(graph):
            return marked_bend(x + 1) * 2

    monkeypatch.setitem(capture.__init__.__globals__, place, None)
    told_as_ours(body, caplog)
    monkeypatch.undo()
    replays_equal(graph, lambda x: bend(x + 1) * 2, x, body())


def test_a_fault_in_a_replay(
    make: MakeGraph, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails in this package in a replay by hand is told; the next replay is right."""
    graph, x = make(), torch.randn(3, device=device)
    with capture(graph):
        y = marked_bend(x + 1) * 2
    monkeypatch.setattr(graph_module, "check_places", None)
    told_as_ours(graph.replay, caplog)
    monkeypatch.undo()
    replays_equal(graph, lambda x: bend(x + 1) * 2, x, y)


@pytest.mark.parametrize(
    "error", [KeyError("mine"), KeyboardInterrupt(), torch.OutOfMemoryError("mine"), RuntimeError(ASSERTION)]
)
def test_errors_of_eager_functions(
    make: MakeGraph, device: torch.device, options: dict[str, Any], error: BaseException
) -> None:
    """Whatever an eager function raises is the same object at both doors, in plain calls, recordings and replays."""
    planted: list[BaseException] = []

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        if planted:
            raise planted[0]
        return x + 1

    compiled, _ = compile_both(lambda x: step(x * 2) * 3, options)
    graph, x = make(), torch.ones(3, device=device)

    def body() -> None:
        with capture(graph):
            step(x * 2)

    compiled(x)
    for call in (lambda: compiled(x), lambda: compiled(x), lambda: compiled(x), body, graph.replay):
        planted[:] = [error]
        if call != graph.replay or graph.recording is not None:
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error
        planted.clear()
        call()


def test_errors_of_functions_without_a_frame(make: MakeGraph, device: torch.device) -> None:
    """An eager function that is written in C has no frame of its own; what it raises is the user's all the same."""
    with pytest.raises(ZeroDivisionError) as caught:
        Modes().around(operator.truediv)(1, 0)
    raise_if_ours(caught.value, log)
    graph, x = make(), torch.ones(3, device=device)
    with pytest.raises(TypeError, match="unsupported operand"), capture(graph):
        eager_on_graph(operator.truediv)(x + 1, "text")


def test_no_report_to_pytorch() -> None:
    """What torch says of an assertion of its own is told without the advice to report it to PyTorch."""
    said = first_line(RuntimeError(ASSERTION))
    assert said == 'RuntimeError: !capturing_ INTERNAL ASSERT FAILED at "CUDAGeneratorImpl.cpp":7 It is'
    told = str(internal(RuntimeError(ASSERTION), log))
    assert "report a bug" not in told and "INTERNAL ASSERT FAILED" in told
