"""The seam between a recording and the machine that captures: protocols, and no code.

``cuda`` captures CUDA graphs. ``tape`` gives the same semantics on any device, by running and undoing ATen ops:
it shows what a capture would do, not how fast. One suite (``tests/drivers/test_driver_contract.py``) holds both to this text.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from breakable_backend.drivers.room import Room

T = TypeVar("T")

LOCK_TIMEOUT = 5.0
"""Seconds that a call waits for the pool before it runs plainly. An eager step that waits for another thread's call of
a compiled function would otherwise wait for ever."""


class Feed(Protocol):
    """A copy at the head of a captured segment, into a bridge, from wherever a value is in each call.

    A launch copies from :attr:`source`. That has to be the value's memory then, and somebody holds it until the launch is
    issued: whoever launches a graph sees to its feeds first.
    """

    source: int
    """The address that the next launch copies from."""
    copies: int
    """1; or 0 where that is the bridge itself, and nothing has to be copied."""

    def take(self, value: torch.Tensor) -> torch.Tensor | None:
        """Have the next launch copy ``value``.

        Returns the tensor that it copies in its place, where that one lies otherwise: to be held until the launch is issued.
        """


class CapturedGraph(Protocol):
    """One captured segment: launches what ran under the capture, on the addresses that it had then.

    It owns the memory that was allocated under the capture, and nothing else: tensors that came from outside are read
    and written at their address, and it is the caller who keeps them alive.
    """

    @property
    def draws_random(self) -> bool:
        """Whether a replay advances the device's default generator."""

    @property
    def feeds(self) -> Sequence[Feed]:
        """Its copies from outside, in the order in which :meth:`CaptureDriver.capture` was given them."""

    @property
    def num_kernels(self) -> int:
        """How many kernels a replay launches; -1 where the driver cannot tell. Read when it is asked for."""

    def kernels(self) -> tuple[str, ...]:
        """What a replay launches, by name and in order: kernels, or ops where there are none. None after a release."""

    def dot(self) -> str:
        """The graph in the DOT language."""

    def replay(self, stream: int) -> None:
        """Launch on ``stream``, which must be the current one (a raw handle from :meth:`CaptureDriver.begin`)."""

    def copier(self, like: torch.Tensor) -> Callable[[int, int, int], None] | None:
        """What copies as many bytes as ``like`` has from one address of its device to another: target, source, stream of a replay.

        None where torch's own copy is as quick, or ``like`` has gaps between its elements.
        """


class CaptureSession(Protocol):
    """Segments captured one after the other in the middle of the caller's own code."""

    def begin(self, fed: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        """Capture from here on; ``fed`` as in :meth:`CaptureDriver.capture`. Raises CaptureError where a capture is active already."""

    def touch(self) -> None:
        """An op on the device is about to run: its stream belongs to this capture, and is joined when the segment ends.

        Raises:
            CaptureError: its stream is not part of the capture.
        """

    def end(self) -> CapturedGraph:
        """The segment since :meth:`begin`; raises and repairs like :meth:`CaptureDriver.capture`."""

    def abandon(self) -> bool:
        """Drop the segment since :meth:`begin`, whose code raised; whether that had spoilt the capture itself."""

    def events(self) -> Sequence[torch.cuda.Event]:
        """Events of segments that the eager step just run has waited for: to be recorded before it at each replay."""


class Tenant(Protocol):
    """Who has recordings in a driver's pool, and can make them anew."""

    def vacate(self, why: str) -> None:
        """Release them now, and say why. No call is replaying one, and the driver's lock is the caller's."""


class Capturing(Protocol):
    """What captures on one device, within :meth:`CaptureDriver.recording`."""

    device: torch.device

    def feeds(self, bridge: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether graphs can copy ``value``, and what lies like it, into ``bridge`` by themselves."""

    def capture(
        self, body: Callable[[], T], fed: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    ) -> tuple[CapturedGraph, T]:
        """Run ``body`` under a capture; returns the graph and what ``body`` returned.

        ``fed``: bridges and values, one of the graph's :attr:`~CapturedGraph.feeds` for each pair. Before anything else a
        launch copies those values; the first one copies these.

        No device effect of ``body`` has happened when this returns: written storages and the random state are as
        before, and tensors made inside hold no values until :meth:`CapturedGraph.replay`. Host effects have.

        Raises:
            CaptureError: ``body`` did what no capture can hold, or raised; ``__cause__`` is what came out of it. The
                process is repaired: no capture is active, the random state is as before, no storage was written, and
                the next capture works.
        """

    def progress(self) -> Hashable:
        """How far the capture under way has come: another value once something was added to the graph. Within a body.

        Raises:
            CaptureError: the capture cannot succeed any more, be it that the body has caught the error that said so.
        """

    def allocating(self) -> AbstractContextManager[None]:
        """What this thread allocates on the device in it, outside of a capture, is memory of the pool. Within :meth:`recording`.

        Raises:
            CaptureError: there is no pool, and none can be opened.
        """

    def lend(self, made: torch.Tensor) -> torch.Tensor:
        """``made``, which the last capture returned or :meth:`allocating` made, as the tensor that holds its memory.

        Once nothing refers to the storage of what this returns, later captures may get the memory. What was captured
        before reads and writes it on at its address. Only where memory is reused.
        """


class CaptureDriver(Capturing, Protocol):
    """Captures and replays on one device, in one memory pool; or on several, with a pool on each."""

    name: str
    devices: tuple[torch.device, ...]
    """All that it captures on. The first is :attr:`~Capturing.device`."""
    lock: threading.RLock
    """Held around every call that uses the pool."""
    patience: float
    """Seconds that a call waits for the lock: ``LOCK_TIMEOUT``, or none, while one holder has it for longer than that."""
    busy: bool
    """Whether a call of a compiled function is under way. Who has got the lock, and finds this, is inside of that call."""
    tenants: list[Callable[[], Tenant | None]]
    """Weak references."""
    deferred: deque[Callable[[], None]]
    """What is to be done once no call is under way, by whoever ends one."""
    room: Room
    """What recordings in the pool need; written by who records, and empty again when the pool goes."""
    reuses_memory: bool
    """Whether later captures may get memory of the pool that nothing refers to any more."""

    def begin(self) -> int:
        """Order this call behind the last one that used the pool; returns the current stream's raw handle.

        Raises:
            ReplayError: the device is lost: see :meth:`give_up`.
        """

    def note_arguments(self, args: Sequence[Any]) -> None:
        """The arguments of this call. Recorded graphs may find memory of theirs at an address that was another's."""

    def end(self, stream: int) -> None:
        """Mark on ``stream`` where this call's use of the pool ends. Called also when the call raised."""

    def recording(self, apart: bool = False) -> AbstractContextManager[None]:
        """Held around one recording, all its segments and the eager steps between them.

        Memory of the pool that a recording lends and somebody holds may be memory that graphs before it use for themselves
        while they run: it keeps its values within a call. ``apart``: the recording gets memory that no other recording
        gets, before or after; what is held keeps its values from call to call.
        """

    def on(self, device: torch.device) -> Capturing:
        """What captures on ``device``; on the first where that is none of :attr:`devices`."""

    def drawing(self) -> AbstractContextManager[None]:
        """Held around ops that run by themselves and may draw from the device's default generator."""

    def make_room(self) -> None:
        """A capture ran out of memory, and another begins: give the device what the allocator holds for nobody.

        Under a capture the allocator cannot do that itself.
        """

    def vacate(self) -> None:
        """Memory ran out in a recording, whose graphs are released: free memory in the pool goes back, with all its tenants.

        A pool gives nothing back while there is a graph in it, and what a plain call needs may be there.
        """

    def is_capturing(self) -> bool:
        """Whether a capture that is not ours is active on the current stream."""

    def give_up(self, why: str) -> None:
        """The device is lost to this process: every later :meth:`begin` raises, and says why."""

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        """Give back the memory of ``graphs``, which are not replayed again. The pool goes with its last graph.

        ``owner`` holds the tensors that the graphs read and write, and is cleared once their last launches are over.
        Nobody else may hold those tensors, or their memory stays. Without ``wait`` the host does not wait for that: what
        is still in use goes at the end of a later call, and the pool stays for the calls to come.
        """

    def settle(self) -> None:
        """After a release without a wait: no call may come.

        Where nothing else is captured here the host waits after all, and the pool goes. Else what leaves goes at the end
        of a later call.
        """

    def pool_bytes(self) -> int:
        """Bytes of device memory that the pool holds reserved."""

    def executable_bytes(self) -> int:
        """Bytes of device memory that the instantiated graphs take beside the pool, as far as the driver can tell."""

    def live_blocks(self) -> int:
        """Allocated blocks in the pool: 0 after everything was released."""

    def live_graphs(self) -> int:
        """Graphs that were captured and not released."""


class SessionDriver(CaptureDriver, Protocol):
    """Captures in the middle of the caller's own code too, which cannot be run again."""

    def session(self) -> AbstractContextManager[CaptureSession]:
        """For captures that begin and end in the middle of a ``with`` block. Within :meth:`CaptureDriver.recording`."""
