"""Work on one memory that comes from several streams, done one piece after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from breakable_backend.drivers.bindings import Bindings
from breakable_backend.errors import CaptureError, ReplayError, user_line

cudart = Bindings("cuda.bindings.runtime")

IDLE = 64
"""Pieces of work on one stream, one after the other, until the other streams are forgotten."""
WAIT = 5.0
"""Seconds for which a piece of work waits for somebody else's capture of the stream that the last piece is on."""


def is_captured(stream: int) -> bool:
    """Whether ``stream``, a raw handle, is part of a capture that is under way."""
    _, status = cudart.cudaStreamIsCapturing(stream)
    return bool(status)


def capture_end(stream: int) -> tuple[int, ...] | None:
    """The nodes that the next one on ``stream``, which is captured, will come after; None where CUDA does not tell.

    Raises:
        CaptureError: the capture is invalid, so that no graph comes of it.
    """
    error, status = cudart.cudaStreamIsCapturing(stream)
    if error or status != cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
        invalid = CaptureError("the capture became invalid, and no error was raised")
        invalid.passing = "disturbed"  # another thread may have done it
        raise invalid
    # In cuda-python 12 the function of this name tells no nodes, and the next version of it does.
    error, _, *told = (getattr(cudart, "cudaStreamGetCaptureInfo_v2", None) or cudart.cudaStreamGetCaptureInfo)(stream)
    nodes = next((value for value in told if isinstance(value, list | tuple)), None)
    return None if error or nodes is None else tuple(map(int, nodes))


REPLAY_OUTSIDE = "replay it outside, or capture with `with capture(graph)`, where it becomes an eager step"


def replayed_inside() -> ReplayError:
    """What a replay on a stream that somebody else captures is told: CUDA takes no launch of a graph into a capture."""
    return ReplayError(
        "a graph was replayed inside somebody else's capture, which cannot contain the launch of a graph",
        where=user_line(),
        fix=REPLAY_OUTSIDE,
    )


@contextmanager
def relaxed() -> Iterator[None]:
    """Have this thread ask CUDA about events while somebody else's thread captures in "global" mode, without an end to that."""
    mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    _, before = cudart.cudaThreadExchangeStreamCaptureMode(mode)
    try:
        yield
    finally:
        cudart.cudaThreadExchangeStreamCaptureMode(before)


class Order:
    """Orders each piece of work behind the one before it, on the GPU; the host never waits.

    While all work comes on one stream there are no events. From the second stream on each piece ends with one, until
    one stream has had the last ``IDLE`` pieces to itself. Whoever uses it holds a lock.

    Nothing is recorded on a stream that somebody else captures, and nothing waits there: an event would belong to that
    capture, and a wait for one from outside would end it.
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
        """Order ``stream``, which is the current one and not the last, behind the last.

        Raises:
            ReplayError: somebody else captures ``stream``, or has captured the last one for ``WAIT`` seconds.
        """
        if is_captured(stream):
            refused = replayed_inside()
            raise refused
        if stream not in self._streams:
            self._streams[stream] = torch.cuda.current_stream(self.device)
        if self.last is not None:
            if not self.several:
                self._wait_for_capture_of(self.last)
                self._end.record(self._streams[self.last])
                self.several = True
            self._streams[stream].wait_event(self._end)
        self.last = stream
        self._alone = 0

    def mark(self, stream: int) -> None:
        """Work ends on ``stream``, which is now the last."""
        # With one stream alone no event is recorded, and nobody is asked.
        if (self.several or stream != self.last) and is_captured(stream):
            return
        self.last = stream
        if self.several:
            self._end.record(self._streams[stream])
            self._alone += 1
            self.several = self._alone < IDLE

    def is_open(self) -> bool:
        """Whether an event can be recorded behind the last piece of work: its stream is not being captured."""
        return self.last is None or not is_captured(self.last)

    def is_idle(self) -> bool:
        """Whether all work so far is done, as far as the last stream tells. While :meth:`is_open`."""
        return self.last is None or self._streams[self.last].query()

    def event(self) -> torch.cuda.Event | None:
        """An event that comes when all work so far is done; None if there was none. While :meth:`is_open`."""
        if self.last is None:
            return None
        event = torch.cuda.Event()
        event.record(self._streams[self.last])
        return event

    def _wait_for_capture_of(self, stream: int) -> None:
        until = time.monotonic() + WAIT
        while is_captured(stream):
            if time.monotonic() > until:
                raise ReplayError(
                    f"somebody else has been capturing the stream of the last replay for {WAIT:g} s, so no replay can be ordered behind it",
                    where=user_line(),
                    fix="replay after that capture, or on a stream that nobody captures on",
                )
            time.sleep(1e-3)
