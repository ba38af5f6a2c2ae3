"""Work on one memory that comes from several streams, done one piece after the other."""

from __future__ import annotations

import torch

IDLE = 64
"""Pieces of work on one stream, one after the other, until the other streams are forgotten."""


class Order:
    """Orders each piece of work behind the one before it, on the GPU; the host never waits.

    While all work comes on one stream there are no events. From the second stream on each piece ends with one, until
    one stream has had the last ``IDLE`` pieces to itself. Whoever uses it holds a lock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last: int | None = None
        """The raw handle of the stream that the last piece of work is on."""
        self.several = False
        """Whether more than one stream is in use, so that each piece of work ends with an event."""
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._end = torch.cuda.Event()
        self._alone = 0
        """How many pieces of work the last stream has had to itself."""

    def follow(self, stream: int) -> None:
        """Order ``stream``, which is the current one and not the last, behind the last."""
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.current_stream(self.device)
        if self.last is not None:
            if not self.several:
                self._end.record(self._streams[self.last])
                self.several = True
            self._streams[stream].wait_event(self._end)
        self.last = stream
        self._alone = 0

    def mark(self, stream: int) -> None:
        """Work ends on ``stream``, which is now the last."""
        self.last = stream
        if self.several:
            self._end.record(self._streams[stream])
            self._alone += 1
            self.several = self._alone < IDLE

    def event(self) -> torch.cuda.Event | None:
        """An event that comes when all work so far is done; None if there was none."""
        if self.last is None:
            return None
        event = torch.cuda.Event()
        event.record(self._streams[self.last])
        return event
