"""Turns for captures, and for replays that draw random numbers: the default generators of the GPUs in this process.

torch 2.11 has one capture state for each generator. While any thread captures, the generator is in capture mode for all
threads: a replay that draws fails, and so does a second capture. The seed and the offset that replays read lie in
separate memory, which exists only while a graph is registered, and which each capture and each replay that draws
writes. So with torch 2.11 captures and such replays exclude each other, are ordered on the GPU on whatever streams they
are, and one graph stays registered. From torch 2.13 on each capture has its own state, and only the offset on the host
has to be guarded.
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
from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.drivers.ordering import Order
from breakable_backend.errors import CaptureError, ReplayError, first_line
from breakable_backend.failure_kinds import as_passing, passing

cudart = Bindings("cuda.bindings.runtime")

WAIT = 15.0
"""Seconds that one capture may last while others wait for its end. Under ``with capture`` its code is the user's, and
may itself wait for the thread that waits here. On a busy machine the first capture of a process, which loads kernels,
takes longer than 5 s."""
RETRY = 2.0
"""Seconds for which an empty capture is tried again while other threads keep synchronising and so invalidate it."""


class Turns:
    """A lock that is passed on. A wait for it fails only if a single holder has kept it for ``WAIT`` seconds."""

    def __init__(self) -> None:
        self._lock = locks.lock()
        self._count = 0
        self._too_long = -1
        """The count of a holder for which somebody has waited in vain."""

    def take(self, *, again: bool = True) -> bool:
        """Wait for the lock; False if it cannot be had. ``again``: wait even for a holder that others have given up."""
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
        """Pass the lock on."""
        self._lock.release()

    def hold(self) -> None:
        """Take it for ever, unless its holder keeps it for long."""
        self._lock.acquire(timeout=1.0)


captures = Turns()
"""torch knows only one capturing thread in a process, so there is one capture at a time, on whatever device."""
draws = captures if _torch.ONE_CAPTURE_STATE else Turns()
registry = locks.lock()
"""Held during each call into torch that begins a capture or destroys a graph. torch keeps a set of all graphs for each
generator, and releases the GIL before it changes that set. Never held while Python code runs."""
_users: dict[int, Draws] = {}


def hold_for_ever() -> None:
    """At the end of the process: from now on no other thread begins a capture, or a replay that draws."""
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
    """The default generator of one GPU, for graphs that may draw from it; and the stream of captures."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        self.index: int = device.index
        self.generator = torch.cuda.default_generators[device.index]
        self.device = device
        self._order = Order(device)
        self._registered = not _torch.ONE_CAPTURE_STATE
        self.stream = _new_stream(device)
        self._left: list[tuple[Any, torch.cuda.CUDAGraph]] = []
        """Pools in which no driver captures any more, and the graphs that keep them alive; see :meth:`leave`."""
        self.stuck = False
        """Whether a failed capture has left the generator in capture mode. It leaves that mode at the end of a
        successful capture."""

    @staticmethod
    def of(device: torch.device) -> Draws:
        """The instance for ``device`` in this process."""
        with registry:
            if device.index not in _users:
                _users[device.index] = Draws(device)
            return _users[device.index]

    def begin_capture(self) -> None:
        """Take the turn of a capture. Do nothing on the capture stream before: another thread may be capturing it.

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
        """Pass the turn on."""
        captures.give()

    @contextmanager
    def reset_on(self, stream: int) -> Iterator[None]:
        """Held around captures on ``stream``, the current one. Each capture resets the seed and the offset there."""
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
        """Take the turn of a replay on ``stream``, the current one, that draws or may draw.

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
        """Pass the turn on."""
        try:
            if _torch.ONE_CAPTURE_STATE:
                self._order.mark(stream)
        finally:
            draws.give()

    def _follow(self, stream: int) -> None:
        if stream != self._order.last:
            self._order.follow(stream)

    def capture_nothing(self, new_pool: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """An empty capture on the current stream into a new pool, in a capture's turn; returns the graph and the pool.

        After it the generator is out of capture mode. If another thread disturbs it, it is tried again for ``RETRY``
        seconds.
        """
        until = time.monotonic() + RETRY
        while True:
            graph, pool = torch.cuda.CUDAGraph(), new_pool()
            try:
                with registry:
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                end(graph)
            except Exception as error:
                # from now on torch's allocator of pinned memory asks this graph in every allocation
                _torch.keep_for_ever(graph)
                self.spoilt(pool, error)
                if passing(error) != "disturbed" or time.monotonic() > until:
                    raise
            else:
                self.stuck = False
                return graph, pool
            time.sleep(random.random() * 1e-3)  # a random time, so as not to stay in step with the other thread

    def spoilt(self, pool: Any, error: BaseException) -> None:
        """Clean up after a capture on the current stream into ``pool`` failed to begin or to end.

        torch may raise before it has ended a capture, or after it has begun one. Until this thread has ended it,
        nothing can be done on its stream.
        """
        self.stuck = _torch.ONE_CAPTURE_STATE
        stream = _torch.current_raw_stream(self.index)
        _, status = cudart.cudaStreamIsCapturing(stream)
        if status:
            _, left = cudart.cudaStreamEndCapture(stream)
            if left:
                cudart.cudaGraphDestroy(left)
        # If the pool routes memory of another capture, ours was refused, and there is nothing of ours to end.
        if "already recording" not in str(error) and _torch.stop_allocating_to_pool(self.index, pool):
            _torch.release_pool(self.index, pool)

    def leave(self, pool: Any, holder: list[torch.cuda.CUDAGraph]) -> None:
        """Give up ``pool``, and the graph in it that ``holder`` holds, once nothing in its expandable segments is alive.

        torch miscounts the mappings of such segments. The next ``empty_cache`` may free a pool that no graph uses while
        tensors in it are alive, and these write to freed memory when they die. This was seen with torch 2.11, where one
        mapping of several pages is unmapped page by page.
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
            ReplayError: other threads have disturbed this for ``RETRY`` seconds.
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
        """Keep the seed and the offset for ever, in the default stream's memory, and not as a fake of a dispatch mode."""
        default = torch.cuda.default_stream(self.device)
        with _torch.without_modes(), torch.cuda.device(self.device), torch.cuda.stream(default), registry:
            keeper = torch.cuda.CUDAGraph()
            keeper.register_generator_state(self.generator)
        _torch.keep_for_ever(keeper)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Held around random draws outside of graphs: no other thread captures, unless a capture lasts ``WAIT`` seconds."""
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
    """The pools with allocated memory that torch can unmap in pieces."""
    return {
        tuple(segment["segment_pool_id"])
        for segment in torch.cuda.memory_snapshot()
        if segment["is_expandable"]
        and segment["device"] == index
        and any(block["state"] != "inactive" for block in segment["blocks"])
    }


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, and that is never destroyed.

    ``torch.cuda.Stream`` gives out the same 32 streams again and again. Whatever any thread does on a stream under
    capture becomes part of the capture, so the capture stream must be none of those.
    """
    with torch.cuda.device(device):
        status, made = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)
    if status:
        raise CaptureError(f"CUDA cannot create a stream: {cudart.cudaGetErrorString(status)[1].decode()}")
    return torch.cuda.ExternalStream(int(made), device)
