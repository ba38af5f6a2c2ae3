"""Streams within a capture of several segments and eager steps: forks, joins and waits.

A wait for something that the same segment recorded is captured. What an earlier segment recorded is done already, since
that segment was launched. For all other work, from outside of the capture, the launch of the segment waits, in each
replay.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend.drivers.ordering import is_captured
from breakable_backend.errors import CaptureError, first_line
from breakable_backend.interception import intercepted_by


@dataclass(frozen=True)
class Wait:
    """Something that a launch waits for."""

    event: torch.cuda.Event
    stream: torch.cuda.Stream | None
    """The stream on which the event is first recorded again: the one that captured code waited for. None for an event
    that others record."""

    def issue(self, current: torch.cuda.Stream) -> None:
        """Have ``current`` wait."""
        if self.stream is not None:
            self.event.record(self.stream)
        self.event.wait(current)


class StreamOrder:
    """The streams of one capture, on ``main`` and in one thread, as seen through torch's classes for streams and events.

    Between segments it only watches: the code there runs for real.
    """

    def __init__(self, main: torch.cuda.Stream) -> None:
        self._main = main
        self._caller = main
        """The stream on which segments are launched. Code that names it means the capturing stream."""
        self._sides: dict[int, torch.cuda.Stream] = {}
        """Other streams of the capture. Each segment forks them at its beginning and joins them at its end."""
        self._segment = 0
        self._capturing = False
        # By id, and held: torch 2.11 does not clear weak references to an event when it dies.
        self._recorded: dict[int, tuple[torch.cuda.Event, int]] = {}
        """Events that were recorded in segments, and in which segment."""
        self._elsewhere: dict[int, tuple[torch.cuda.Event, torch.cuda.Stream]] = {}
        """Events that captured code recorded on streams outside of the capture."""
        self._waits: dict[int, Wait] = {}
        self._used: list[torch.cuda.Event] = []
        self._states: dict[int, tuple[torch.Tensor, int | None]] = {}
        """Random states that were read, held by id, and the segments that read them."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe this thread's events and random states. Afterwards the events can be waited for outside of the capture."""
        with ExitStack() as stack:
            stack.enter_context(intercepted_by(self._read_state, torch.cuda, "get_rng_state"))
            stack.enter_context(intercepted_by(self._set_state, torch.cuda, "set_rng_state"))
            stack.enter_context(intercepted_by(self._record, torch.cuda.Event, "record"))
            stack.enter_context(intercepted_by(self._wait, torch.cuda.Event, "wait"))
            yield
        for event, _ in self._recorded.values():
            event.record(self._caller)

    def begin(self, caller: torch.cuda.Stream) -> None:
        """A segment has begun, which will be launched on ``caller``."""
        for side in self._sides.values():
            side.wait_stream(self._main)  # forked before a break, and not joined by the caller yet
        self._caller, self._capturing = caller, True
        self._segment += 1

    def touch(self) -> None:
        """Call this before an op runs.

        Raises:
            CaptureError: the op's stream is not part of the capture.
        """
        stream = torch.cuda.current_stream(self._main.device)
        if stream == self._main or stream.cuda_stream in self._sides:
            return
        if not is_captured(stream.cuda_stream):
            raise CaptureError(
                f"an op ran on {stream}, which is not a part of the capture, so no graph would contain the op",
                fix="fork the stream first: side.wait_stream(torch.cuda.current_stream())",
            )
        self._sides[stream.cuda_stream] = stream

    def end(self) -> tuple[Wait, ...]:
        """End the segment: join its streams. Returns what its launch waits for."""
        self._capturing = False
        for side in self._sides.values():
            if is_captured(side.cuda_stream):
                self._main.wait_stream(side)
        waits, self._waits = tuple(self._waits.values()), {}
        return waits

    def explained(self, error: BaseException) -> tuple[str, str]:
        """:func:`explained`, with the streams that an unjoined one may be: those that are alive and not ours."""
        what, fix = explained(error)
        if UNJOINED in what:
            ours = {self._main.cuda_stream, self._caller.cuda_stream, *self._sides}
            alive = {stream.cuda_stream for stream in gc.get_objects() if issubclass(type(stream), torch.cuda.Stream)}
            what += "".join(f"; is it stream {stream:#x}?" for stream in sorted(alive - ours))
        return what, fix

    def used(self) -> tuple[torch.cuda.Event, ...]:
        """The events of segments for which code between segments has waited since the last call of this.

        Each replay has to record them before that code runs.
        """
        used, self._used = tuple(self._used), []
        return used

    def _read_state(self, read: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        state = read(*args, **kwargs)
        self._states[id(state)] = state, self._place()
        return state

    def _set_state(self, put: Callable[..., None], new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """A state that a segment has read counts from the segment's beginning. Elsewhere it is wrong, without an error."""
        if self._states.get(id(new_state), (new_state, None))[1] != self._place():
            raise CaptureError(
                "the body set the state of the random generator to one that another segment, or other code, had read",
                fix="checkpoint(..., preserve_rng_state=False), which may draw nothing; or set the state in a function "
                "marked with @eager_on_graph that has read it",
            )
        put(new_state, *args, **kwargs)

    def _place(self) -> int | None:
        """The number of the segment; None between segments."""
        return self._segment if self._capturing else None

    def _record(self, record: Callable[..., None], event: torch.cuda.Event, stream: Any = None) -> None:
        stream = self._meant(stream)
        record(event, stream)
        self._recorded.pop(id(event), None)
        self._elsewhere.pop(id(event), None)
        if self._capturing and is_captured(stream.cuda_stream):
            self._recorded[id(event)] = event, self._segment
        elif self._capturing:
            self._elsewhere[id(event)] = event, stream

    def _wait(self, wait: Callable[..., None], event: torch.cuda.Event, stream: Any = None) -> None:
        stream = self._meant(stream)
        _, segment = self._recorded.get(id(event), (event, None))
        if not self._capturing:
            if segment is not None:
                event.record(self._caller)  # a captured record has no effect outside of the capture
                self._used.append(event)
            wait(event, stream)
        elif segment is None:
            _, elsewhere = self._elsewhere.get(id(event), (event, None))
            self._waits[id(event)] = Wait(event, elsewhere)
            if not is_captured(stream.cuda_stream):
                wait(event, stream)
        elif is_captured(stream.cuda_stream):
            if segment == self._segment:
                wait(event, stream)
        else:
            self._fork(stream, event if segment == self._segment else None, wait)

    def _fork(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None, wait: Callable[..., None]) -> None:
        """Make ``stream`` part of the capture, after ``event``, or after everything that the segment did so far."""
        before = torch.cuda.Event()
        before.record(stream)
        wait(before, self._caller)  # the launch waits for what the stream did before
        if event is None:
            event = torch.cuda.Event()
            event.record(self._main)
        wait(event, stream)
        self._sides[stream.cuda_stream] = stream

    def _meant(self, stream: Any) -> Any:
        stream = torch.cuda.current_stream() if stream is None else stream
        return self._main if self._capturing and stream == self._caller else stream


UNJOINED = "unjoined work"
_MEANINGS = {
    "uncaptured work in another stream": (
        "captured code waited for work from outside of the capture, without torch.cuda.Stream and torch.cuda.Event",
        "wait with torch.cuda.Stream.wait_stream, wait_event or torch.cuda.Event.wait, or in an eager function",
    ),
    UNJOINED: (
        "a stream that was forked without torch.cuda.Stream and torch.cuda.Event was never joined",
        "join it before the segment ends: torch.cuda.current_stream().wait_stream(side)",
    ),
    "event last recorded in a capturing stream": (
        "code outside of the capture used an event that captured code recorded",
        "record it anew outside, or wait with torch.cuda.Stream.wait_event or torch.cuda.Event.wait",
    ),
    "legacy stream depend on a capturing": (
        "captured code made the default stream wait for it, as a gradient does whose parameter was first used there",
        "before the capture, drop what holds an earlier graph of autograd's, such as the loss of a call",
    ),
    "merge of separate capture sequences": (
        "captured code waited for a stream of another capture",
        "capture one after the other",
    ),
}
"""By the words of CUDA's error: what it means here, and what to do."""


def explained(error: BaseException) -> tuple[str, str]:
    """The first line of an exception from a capture, with its meaning if it is about streams; and what to do then."""
    first = first_line(error)
    for words, (meaning, fix) in _MEANINGS.items():
        if words in first:
            return f"{meaning}: {first}", fix
    return first, ""
