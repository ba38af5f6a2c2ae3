"""What captures, and replays that draw random numbers, share in a process: the default generators of the GPUs.

torch 2.11 has one capture state for each generator. While any thread captures, the generator is in capture mode for all
threads: a replay that draws fails, and so does a second capture. The seed and the offset that replays read lie in
memory of their own, which is there only while a graph is registered, and which each capture and each replay that draws
writes. So there, these exclude each other, are ordered on the GPU whatever their streams, and one graph stays registered.
From torch 2.13 on each capture has a state of its own; what is left to guard is the offset on the host.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from breakable_backend import _torch, locks
from breakable_backend.drivers.bindings import Bindings
from breakable_backend.drivers.ordering import Order
from breakable_backend.errors import CaptureError, ReplayError, first_line
from breakable_backend.failures import as_passing, passing

cudart = Bindings("cuda.bindings.runtime")

WAIT = 15.0
"""Seconds that one capture may last while others wait for its end. Under ``with capture`` its code is the user's, and
may itself wait for the thread that waits here. On a busy machine the first capture of a process, which loads kernels,
takes longer than 5 s."""
RETRY = 2.0
"""Seconds for which an empty capture is tried again, while other threads synchronise all the time and make it invalid."""


class Turns:
    """A lock that is passed on: a wait ends without it only when one holder has kept it for ``WAIT`` seconds."""

    def __init__(self) -> None:
        self._lock = locks.lock()
        self._count = 0
        self._too_long = -1
        """The count of a holder for whom somebody has waited in vain."""

    def take(self, *, again: bool = True) -> bool:
        """Wait for the lock; False if it is not to be had. ``again``: wait for a holder for whom others have waited in vain."""
        while True:
            before = self._count
            in_vain = before == self._too_long and not again
            if self._lock.acquire(timeout=0.0 if in_vain else WAIT):
                self._count += 1
                return True
            if self._count == before:
                self._too_long = before
                return False

    def give(self) -> None:
        """Let the next have it."""
        self._lock.release()

    def hold(self) -> None:
        """Have it for ever, unless somebody is long about giving it."""
        self._lock.acquire(timeout=1.0)


captures = Turns()
"""Which capture a thread is in is torch's to know once in a process: there is one at a time, whatever the device."""
draws = captures if _torch.ONE_CAPTURE_STATE else Turns()
registry = locks.lock()
"""Held for as long as one call into torch takes that begins a capture or destroys a graph: torch keeps a set of all
graphs for each generator, and lets go of the GIL before it changes that. Never held while Python runs."""
_users: dict[int, Draws] = {}


def hold_for_ever() -> None:
    """The process ends: no other thread begins a capture, or a replay that draws."""
    captures.hold()
    draws.hold()
    for user in list(_users.values()):
        _torch.keep_for_ever(user._left)


def end(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture, which may be empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")
        graph.capture_end()


class Draws:
    """The default generator of one GPU, for graphs that may draw from it, and the stream that captures are on."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        self.index: int = device.index
        self.generator = torch.cuda.default_generators[device.index]
        self.device = device
        self._order = Order(device)
        self._registered = not _torch.ONE_CAPTURE_STATE
        self.stream = _new_stream(device)
        self._left: list[tuple[Any, torch.cuda.CUDAGraph]] = []
        """Pools that no driver captures in any more, and the graphs that keep them: see :meth:`leave`."""
        self.stuck = False
        """Whether a capture has left the generator in capture mode. It leaves that at the end of one that succeeds."""

    @staticmethod
    def of(device: torch.device) -> Draws:
        """The one of ``device`` in this process."""
        with registry:
            if device.index not in _users:
                _users[device.index] = Draws(device)
            return _users[device.index]

    def begin_capture(self) -> None:
        """Take the turn of a capture. Before it nothing is done on the capture stream: another thread may capture there.

        Raises:
            CaptureError: another thread's capture did not end within ``WAIT`` seconds.
        """
        if not captures.take(again=False):
            busy = CaptureError(
                f"another thread's capture did not end within {WAIT:g} s",
                fix="do not wait, inside of `with capture`, for a thread that captures",
            )
            busy.passing = "busy"
            raise busy

    def end_capture(self) -> None:
        """Give the turn back."""
        captures.give()

    @contextmanager
    def reset_on(self, stream: int) -> Iterator[None]:
        """Held around captures on ``stream``, the current one: each of them resets the seed and the offset there."""
        if not self._registered:
            self._register()
            self._registered = True
        if not _torch.ONE_CAPTURE_STATE:
            yield
            return
        self._follow(stream)
        try:
            yield
        finally:
            self._order.mark(stream)

    def begin_replay(self, stream: int) -> None:
        """Take the turn of a replay that draws, or may draw, on ``stream``, the current one.

        Raises:
            ReplayError: another thread's capture did not end within ``WAIT`` seconds.
        """
        if not draws.take():
            busy = ReplayError(
                f"a graph that draws random numbers cannot be replayed: another thread's capture did not end within {WAIT:g} s",
                fix="do not wait, inside of `with capture`, for a thread that replays such graphs",
            )
            busy.passing = "busy"
            raise busy
        try:
            self.mend()
            if _torch.ONE_CAPTURE_STATE:
                self._follow(stream)
        except BaseException:
            draws.give()
            raise

    def end_replay(self, stream: int) -> None:
        """Give the turn back."""
        try:
            if _torch.ONE_CAPTURE_STATE:
                self._order.mark(stream)
        finally:
            draws.give()

    def _follow(self, stream: int) -> None:
        if stream != self._order.last:
            self._order.follow(stream)

    def capture_nothing(self, new_pool: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture nothing, on the current stream, into a new pool; returns the graph and the pool; in a capture's turn.

        The generator is out of capture mode then. What another thread disturbs is tried again, for ``RETRY`` seconds.
        """
        until = time.monotonic() + RETRY
        while True:
            graph, pool = torch.cuda.CUDAGraph(), new_pool()
            try:
                with registry:
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                end(graph)
            except Exception as error:
                # torch's allocator of pinned memory asks this graph from now on, with every allocation.
                _torch.keep_for_ever(graph)
                self.spoilt(pool, error)
                if passing(error) != "disturbed" or time.monotonic() > until:
                    raise
            else:
                self.stuck = False
                return graph, pool
            time.sleep(random.random() * 1e-3)  # not in step with the other thread

    def spoilt(self, pool: Any, error: BaseException) -> None:
        """A capture on the current stream into ``pool`` failed to begin, or to end: it is over, and nothing held for it.

        torch may raise before it comes to the end of a capture, or after it has begun one. Until that is ended, by this
        thread, nothing at all can be done on its stream.
        """
        self.stuck = _torch.ONE_CAPTURE_STATE
        stream = _torch.current_raw_stream(self.index)
        _, status = cudart.cudaStreamIsCapturing(stream)
        if status:
            _, left = cudart.cudaStreamEndCapture(stream)
            if left:
                cudart.cudaGraphDestroy(left)
        # A pool that takes another capture's memory refuses ours: then nothing of it is ours to end.
        if "already recording" not in str(error) and _torch.stop_allocating_to_pool(self.index, pool):
            _torch.release_pool(self.index, pool)

    def leave(self, pool: Any, holder: list[torch.cuda.CUDAGraph]) -> None:
        """Give up ``pool``, and the graph in it that ``holder`` alone holds, once nothing of it is alive in expandable segments.

        torch counts wrongly what is mapped of them. A pool that no graph uses may be gone then while tensors in it are
        alive (with the next ``empty_cache``), and these write to memory that is freed when they die: so it was with torch
        2.11, where one mapping of several pages is given back page by page.
        """
        with registry:
            self._left.append((pool, holder.pop()))
            left = [tuple(pool) for pool, _ in self._left]
        gone = set(left) - _alive_in_expandable_segments(self.index)
        with registry:
            self._left[:] = [kept for kept in self._left if tuple(kept[0]) not in gone]

    def mend(self) -> None:
        """Take the generator out of capture mode, if a capture has left it there; in a turn.

        Raises:
            ReplayError: other threads have disturbed that for ``RETRY`` seconds.
        """
        if self.stuck:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream), self.reset_on(self.stream.cuda_stream):
                try:
                    graph, _ = self.capture_nothing(torch.cuda.graph_pool_handle)
                except RuntimeError as error:
                    if passing(error) != "disturbed":
                        raise
                    raise as_passing(_still_capturing(error), error) from error
                with registry:
                    del graph

    def _register(self) -> None:
        """Have the seed and the offset for ever: among the default stream's memory, and no dispatch mode's fake."""
        default = torch.cuda.default_stream(self.device)
        with _torch.without_modes(), torch.cuda.device(self.device), torch.cuda.stream(default), registry:
            keeper = torch.cuda.CUDAGraph()
            keeper.register_generator_state(self.generator)
        _torch.keep_for_ever(keeper)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Held around raw draws: no capture of another thread is under way, unless one goes on for ``WAIT`` seconds."""
        taken = draws.take(again=False)
        try:
            if taken:
                self.mend()
            yield
        finally:
            if taken:
                draws.give()


def _still_capturing(error: RuntimeError) -> ReplayError:
    return ReplayError(
        f"no random numbers can be drawn: a failed capture left the generator in capture mode, and so did {RETRY:g} s of "
        f"empty ones: {first_line(error)}",
        fix="let other threads wait for streams or events, instead of torch.cuda.synchronize() all the time",
    )


def _alive_in_expandable_segments(index: int) -> set[tuple[int, int]]:
    """The pools in which memory is allocated that torch can unmap in pieces."""
    return {
        tuple(segment["segment_pool_id"])
        for segment in torch.cuda.memory_snapshot()
        if segment["is_expandable"]
        and segment["device"] == index
        and any(block["state"] != "inactive" for block in segment["blocks"])
    }


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, and that is never destroyed.

    ``torch.cuda.Stream`` hands out 32 streams again and again. Whatever any thread does on a stream that is captured
    becomes part of the capture: so it must be none of those.
    """
    with torch.cuda.device(device):
        status, made = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)
    if status:
        raise CaptureError(f"CUDA cannot create a stream: {cudart.cudaGetErrorString(status)[1].decode()}")
    return torch.cuda.ExternalStream(int(made), device)
