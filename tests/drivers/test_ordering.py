"""Work of several streams and threads, one piece after the other: who waits for whom, and how long; without a GPU."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest
import torch

from breakable_backend import ReplayError
from breakable_backend.drivers import generator, ordering
from breakable_backend.drivers.generator import Turns
from breakable_backend.drivers.ordering import IDLE, Order


@dataclass
class Streams:
    """Stands for the streams of a GPU, and writes down what is asked of them."""

    current: int = 0
    captured: set[int] = field(default_factory=set)
    """Those that somebody else captures on."""
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

    monkeypatch.setattr(ordering, "is_captured", lambda stream: stream in streams.captured)
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


def test_work_in_somebody_elses_capture_is_in_no_order(streams: Streams) -> None:
    """What would go into a foreign capture is refused: it waits for nothing there, and leaves no event behind."""
    order = Order(torch.device("cuda", 0))
    streams.piece(order, 1)
    streams.captured = {3}
    with pytest.raises(ReplayError, match="inside somebody else's capture"):
        streams.piece(order, 3)
    assert streams.said == []
    assert streams.piece(order, 2) == ["event on 1", "2 waits", "event on 2"]
    with pytest.raises(ReplayError, match="inside somebody else's capture"):
        streams.piece(order, 3)
    assert streams.said == []
    assert streams.piece(order, 1) == ["1 waits", "event on 1"]


def test_a_capture_of_the_last_stream_gets_no_event(streams: Streams) -> None:
    """Where the last stream itself is captured, other streams wait for what was there before the capture."""
    order = Order(torch.device("cuda", 0))
    streams.piece(order, 1), streams.piece(order, 2)
    streams.captured = {2}
    assert streams.piece(order, 2) == []
    assert streams.piece(order, 1) == ["1 waits", "event on 1"]


def test_a_capture_of_the_only_stream_is_waited_for(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one stream there was no event, and there is no place for one until its capture ends: a bounded wait."""
    order = Order(torch.device("cuda", 0))
    streams.piece(order, 1)
    streams.captured = {1}
    assert not order.is_open()
    monkeypatch.setattr(ordering, "WAIT", 0.01)
    with pytest.raises(ReplayError, match=r"capturing the stream of the last replay for 0\.01 s"):
        streams.piece(order, 2)
    monkeypatch.setattr(time, "sleep", lambda seconds: streams.captured.clear())
    assert streams.piece(order, 2) == ["event on 1", "2 waits", "event on 2"]
    assert order.is_open()


# --- turns ------------------------------------------------------------------------------------------------------------


def holds(turns: Turns, seconds: float) -> threading.Thread:
    """A thread that has the turn for a while, and has it when this returns."""
    has = threading.Event()

    def work() -> None:
        assert turns.take()
        has.set()
        time.sleep(seconds)
        turns.give()

    thread = threading.Thread(target=work)
    thread.start()
    assert has.wait(10)
    return thread


def test_a_turn_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread waits for another's turn to end, and has the next; its own it may take again."""
    monkeypatch.setattr(generator, "WAIT", 5.0)
    turns = Turns()
    thread = holds(turns, 0.05)
    assert turns.take() and turns.take()
    turns.give(), turns.give()
    thread.join(10)


def test_one_long_turn_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread gives up on a turn that goes on for ``WAIT`` seconds, since it may be waited for itself."""
    monkeypatch.setattr(generator, "WAIT", 0.05)
    turns = Turns()
    thread = holds(turns, 1.0)
    assert not turns.take()
    thread.join(10)
    assert turns.take()
    turns.give()


def test_a_long_turn_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who need not wait for a turn that others have waited for in vain does not; the next holder is waited for again."""
    turns, waited = Turns(), []

    class Lock:
        def acquire(self, timeout: float) -> bool:
            waited.append(timeout)
            return free

    monkeypatch.setattr(turns, "_lock", Lock())
    free = False
    assert not turns.take(again=False) and not turns.take(again=False) and not turns.take()
    free = True
    assert turns.take(again=False)
    free = False
    assert not turns.take(again=False)
    assert waited == [generator.WAIT, 0.0, generator.WAIT, 0.0, generator.WAIT]


def test_many_short_turns_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that pass from one to the next are waited for, however long all of them take together."""
    monkeypatch.setattr(generator, "WAIT", 0.1)
    turns = Turns()
    busy = [True, True, True, False]

    class Lock:
        def acquire(self, timeout: float) -> bool:
            turns._count += busy[0]  # others had their turns meanwhile
            return not busy.pop(0)

    monkeypatch.setattr(turns, "_lock", Lock())
    assert turns.take() and not busy
