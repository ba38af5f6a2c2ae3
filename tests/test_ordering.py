"""Work of several streams, one piece after the other: when an event is recorded, and who waits for it; without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from breakable_backend.drivers.ordering import IDLE, Order


@dataclass
class Streams:
    """Stands for the streams of a GPU, and writes down what is asked of them."""

    current: int = 0
    said: list[str] = field(default_factory=list)

    def piece(self, order: Order, stream: int) -> list[str]:
        """A piece of work on ``stream``; what it recorded and waited for."""
        self.current = stream
        self.said.clear()
        if stream != order.last:
            order.follow(stream)
        order.mark(stream)
        return list(self.said)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Fakes in the place of CUDA's streams and events."""
    streams = Streams()

    class Stream:
        def __init__(self, number: int) -> None:
            self.number = number

        def wait_event(self, event: object) -> None:
            streams.said.append(f"{self.number} waits")

    class Event:
        def record(self, stream: Stream) -> None:
            streams.said.append(f"event on {stream.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(streams.current))
    return streams


def test_one_stream_has_no_events(streams: Streams) -> None:
    """While all work comes on one stream, nothing is recorded and nobody waits."""
    order = Order(torch.device("cuda", 0))
    assert [streams.piece(order, 1) for _ in range(3)] == [[], [], []]


def test_a_second_stream_waits_for_the_first(streams: Streams) -> None:
    """From the second stream on each piece ends with an event, which the next one on another stream waits for."""
    order = Order(torch.device("cuda", 0))
    streams.piece(order, 1)
    assert streams.piece(order, 2) == ["event on 1", "2 waits", "event on 2"]
    assert streams.piece(order, 2) == ["event on 2"]
    assert streams.piece(order, 1) == ["1 waits", "event on 1"]


def test_streams_that_are_idle_are_forgotten(streams: Streams) -> None:
    """Once a stream has had the last pieces to itself there are no events, until another stream comes: it waits as ever."""
    order = Order(torch.device("cuda", 0))
    streams.piece(order, 1)
    said = [streams.piece(order, 2) for _ in range(IDLE + 5)]
    assert said[IDLE - 1] == ["event on 2"] and said[IDLE:] == [[]] * 5
    assert streams.piece(order, 1) == ["event on 2", "1 waits", "event on 1"]
