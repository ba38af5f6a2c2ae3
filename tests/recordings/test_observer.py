"""Observers: what a tool sees of a graph, without the engine knowing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings import observer
from breakable_backend.recordings.observer import Observer, Subject


class Told(Observer):
    """Writes events down."""

    def __init__(self, subject: Subject, events: list[str]) -> None:
        self.subject, self.events = subject, events

    def traced(self, module: Any, stage: str) -> None:
        self.events.append(f"traced: {stage}")

    def cut(self, program: Any) -> None:
        self.events.append(f"cut into {len(program.segments)}")

    def plain(self, why: str, level: int) -> None:
        self.events.append(f"plain: {why}")

    def recording(self, device: torch.device) -> None:
        self.events.append("recording")

    def captured(self, position: int, body: Any) -> None:
        self.events.append(f"captured {position}")

    def issuing(self, position: int) -> None:
        self.events.append(f"issuing {position}")

    def eager(self, function: Any, label: str, source: str) -> Any:
        self.events.append(f"eager {label}")
        return function

    def recorded(self, number: int, why: str, recording: Any, replay: Any, seconds: float) -> None:
        self.events.append(f"recorded {number}: {len(recording.steps)} steps")

    def noted(self, what: str, level: int) -> None:
        self.events.append(what)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(observer, "_factories", [*observer._factories, lambda subject: Told(subject, found)])
    return found


def test_life_of_a_graph(device: torch.device, options: dict[str, Any], events: list[str]) -> None:
    """An observer sees a graph traced, cut, run plainly, recorded and released; a replay is no event."""

    def f(x: Tensor) -> Tensor:
        return silly.triple(x.sin() + 1).cos() * 2

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.ones(3, device=device))
    assert events[:4] == ["traced: dynamo", "traced: aten", "cut into 3", "plain: warm-up"]
    assert events[4:] == ["recording", "captured 0", "eager silly::triple", "captured 2", "recorded 0: 3 steps"]


def test_one_set_for_each_graph(device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph has one set of observers for its whole life; the forward and the backward of one that learns have their own."""
    names: list[str] = []
    monkeypatch.setattr(observer, "_factories", [lambda subject: names.append(subject.name)])
    compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options=options)
    with torch.no_grad():
        compiled(torch.ones(3, device=device))
    assert len(names) == 1
    for _ in range(3):
        compiled(torch.ones(3, device=device, requires_grad=True)).sum().backward()
    _, name, *halves = names
    assert halves == [f"forward of {name}", f"backward of {name}"]


def test_each_observer_has_its_variant(device: torch.device, options: dict[str, Any], events: list[str]) -> None:
    """If two observers want another function for a replay, each gets its own in the calls that it wants."""
    wanted: list[str] = []

    class Other(Observer):
        def __init__(self, name: str) -> None:
            self.name, self.wanted = name, lambda: name in wanted

        def variant(self, recording: Any, tally: Any) -> Any:
            return lambda args, stream: events.append(self.name) or [torch.zeros(())]

    observer._factories.extend([lambda subject: Other("one"), lambda subject: Other("other")])
    compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options=options)
    x = torch.ones(3, device=device)
    with torch.no_grad():
        for name in ("", "", "other", "one", "other", ""):
            wanted[:] = [name]
            got = compiled(x)
    assert events[-3:] == ["other", "one", "other"]
    assert torch.equal(got, x.sin() + 1)


def test_life_of_a_block(kind: str, events: list[str], device: torch.device) -> None:
    """So it does of a ``with`` block."""
    graph, step = BreakableCUDAGraph(driver=kind), eager_on_graph(lambda x: x + 1)
    x = torch.ones(3, device=device)
    with torch.no_grad(), capture(graph):
        y = step(x + 1) * 2
    graph.replay()
    del y
    graph.reset()
    assert events[0] == "recording"
    assert [event for event in events if event.startswith("issuing")] == ["issuing 0", "issuing 2"]
    assert events[-2:] == ["recorded 0: 3 steps", "released"]


def test_replays_are_as_without(device: torch.device, options: dict[str, Any], events: list[str]) -> None:
    """Who only looks on is in no generated code."""

    def source() -> str:
        torch.compiler.reset()
        compiled = torch.compile(lambda x: silly.triple(x.sin() + 1).cos() * 2, backend="breakable_cg", options=options)
        with torch.no_grad():
            for _ in range(3):
                compiled(torch.ones(3, device=device))
        (executor,) = executors_of(compiled)
        (entry,) = executor.keys.entries()
        assert entry.replay is not None
        return entry.replay.source

    seen = source()
    observer._factories.pop()
    assert source() == seen
