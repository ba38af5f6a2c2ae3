"""Calls on several streams that use one memory, ordered on the GPU one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.errors import CaptureError, ReplayError, user_line

cudart = Bindings("cuda.bindings.runtime")

IDLE = 64
"""After so many pieces of work in a row on one stream the other streams are forgotten."""
WAIT = 5.0
"""Seconds that a piece of work waits while somebody else captures the stream of the last piece."""


def is_captured(stream: int) -> bool:
    """Whether ``stream``, a raw handle, is part of a capture in progress."""
    _, status = cudart.cudaStreamIsCapturing(stream)
    return bool(status)


def capture_end(stream: int) -> tuple[int, ...] | None:
    """The nodes on which the next one on ``stream``, which is captured, will depend; None if CUDA does not tell.

    Raises:
        CaptureError: the capture is invalid, so that it will give no graph.
    """
    error, status = cudart.cudaStreamIsCapturing(stream)
    if error or status != cudart.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
        invalid = CaptureError("the capture became invalid, and no error was raised")
        invalid.passing = "disturbed"  # another thread may have done it
        raise invalid
    # In cuda-python 12 the function of this name reports no nodes; its next version does.
    error, _, *told = (getattr(cudart, "cudaStreamGetCaptureInfo_v2", None) or cudart.cudaStreamGetCaptureInfo)(stream)
    nodes = next((value for value in told if isinstance(value, list | tuple)), None)
    return None if error or nodes is None else tuple(map(int, nodes))


REPLAY_OUTSIDE = "replay it outside, or capture with `with capture(graph)`, where it becomes an eager step"


def replayed_inside() -> ReplayError:
    """The error of a replay on a stream that somebody else captures: a capture cannot contain the launch of a graph."""
    return ReplayError(
        "a graph was replayed inside somebody else's capture, which cannot contain the launch of a graph",
        where=user_line(),
        fix=REPLAY_OUTSIDE,
    )


@contextmanager
def relaxed() -> Iterator[None]:
    """Let this thread ask CUDA about events while another thread captures in "global" mode, without ending that capture."""
    mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    _, before = cudart.cudaThreadExchangeStreamCaptureMode(mode)
    try:
        yield
    finally:
        cudart.cudaThreadExchangeStreamCaptureMode(before)


class Order:
    """Orders each piece of work after the one before it, on the GPU; the host never waits.

    While all work is on one stream there are no events. From the second stream on each piece of work ends with an
    event, until one stream has had the last ``IDLE`` pieces to itself. The user of this object holds a lock.

    Nothing is recorded on a stream that somebody else captures, and nothing waits there: an event would belong to that
    capture, and a wait for an outside event would end it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.last: int | None = None
        """The raw handle of the stream with the last piece of work."""
        self.several = False
        """Whether more than one stream is in use, so that each piece of work ends with an event."""
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._end = torch.cuda.Event()
        self._alone = 0
        """How many pieces of work in a row were on the last stream."""

    def follow(self, stream: int) -> None:
        """Order ``stream``, which is current and not the last one, after the last one.

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
        """Work ends on ``stream``, which is now the last one."""
        # With one stream no event is recorded, and CUDA is not called.
        if (self.several or stream != self.last) and is_captured(stream):
            return
        self.last = stream
        if self.several:
            self._end.record(self._streams[stream])
            self._alone += 1
            self.several = self._alone < IDLE

    def is_open(self) -> bool:
        """Whether an event can be recorded after the last piece of work: its stream is not being captured."""
        return self.last is None or not is_captured(self.last)

    def is_idle(self) -> bool:
        """Whether all work so far is done, as far as the last stream tells. Only while :meth:`is_open`."""
        return self.last is None or self._streams[self.last].query()

    def event(self) -> torch.cuda.Event | None:
        """An event that completes when all work so far is done; None if there was none. Only while :meth:`is_open`."""
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
