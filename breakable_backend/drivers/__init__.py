"""The seam between a recording and the machine that captures: protocols, and no code.

``cuda`` captures CUDA graphs. ``tape`` has the same semantics on any device, by running and undoing ATen ops: it shows
what a capture does, and not how fast. One test suite (``tests/drivers/test_driver_contract.py``) checks both against
this text.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from breakable_backend.drivers.pool_size import PoolSize

T = TypeVar("T")
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Bridges, each with the value that a graph copies there by itself."""

LOCK_TIMEOUT = 5.0
"""Seconds that a call waits for the pool's lock before it runs plainly. Without this limit, an eager step that waits
for another thread, which calls a compiled function, would wait for ever."""


class Feed(Protocol):
    """A copy at the head of a captured segment, into a bridge, from wherever the value lies in each call.

    A launch copies from :attr:`source`. That address has to be the value's then, and the value has to be held until the
    launch is issued. So whoever launches a graph updates its feeds first.
    """

    source: int
    """The address that the next launch copies from."""
    copies: int
    """1; or 0 if the source is the bridge itself, and nothing has to be copied."""

    def take(self, value: torch.Tensor) -> torch.Tensor | None:
        """Have the next launch copy ``value``.

        If ``value`` has another layout than the bridge, this returns the tensor that is copied in its place. Hold it
        until the launch is issued.
        """


class Outlet(Protocol):
    """A copy inside a captured segment, of a result to the caller's memory, wherever that lies in each call.

    A launch copies to :attr:`target`. Memory of the caller's has to be there, and to be held until the launch is issued.
    So whoever launches a graph updates its outlets first.
    """

    target: int
    """The address that the next launch copies to."""

    def lead(self, address: int) -> None:
        """Have the next launch, and those after it, copy to ``address``."""


class CapturedGraph(Protocol):
    """One captured segment. It launches what ran under the capture, on the addresses that it had then.

    It owns the memory that was allocated under the capture, and nothing else. Tensors from outside are read and written
    at their addresses, and the caller keeps them alive.
    """

    @property
    def draws_random(self) -> bool:
        """Whether a replay advances the device's default generator."""

    @property
    def feeds(self) -> Sequence[Feed]:
        """Its copies from outside, in the order in which :meth:`CaptureDriver.capture` got them."""

    @property
    def num_kernels(self) -> int:
        """How many kernels a replay launches; -1 if the driver cannot tell. Read on request."""

    def kernels(self) -> tuple[str, ...]:
        """The names of what a replay launches, in order: kernels, or ops if there are no kernels. Empty after a release."""

    def dot(self) -> str:
        """The graph in the DOT language."""

    def replay(self, stream: int) -> None:
        """Launch on ``stream``, which must be the current one (a raw handle from :meth:`CaptureDriver.begin`)."""

    def copier(self, like: torch.Tensor) -> Callable[[int, int, int], None] | None:
        """A function that copies the bytes of tensors like ``like`` on its device: target, source, stream of a replay.

        None if torch's own copy is as quick, or ``like`` has gaps between its elements.
        """


class CaptureSession(Protocol):
    """Segments captured one after the other in the middle of the caller's own code."""

    def begin(self, fed: Pairs = ()) -> None:
        """Capture from here on; ``fed`` as in :meth:`CaptureDriver.capture`.

        Raises:
            CaptureError: a capture is active already.
        """

    def touch(self) -> None:
        """Call this before an op on the device: its stream belongs to this capture, and is joined at the segment's end.

        Raises:
            CaptureError: its stream is not part of the capture.
        """

    def end(self) -> CapturedGraph:
        """End the segment since :meth:`begin`; it raises and repairs like :meth:`CaptureDriver.capture`."""

    def abandon(self) -> bool:
        """Drop the segment since :meth:`begin`, whose code raised. Returns whether the capture itself was invalid."""

    def events(self) -> Sequence[torch.cuda.Event]:
        """Events of segments for which the last eager step has waited. Each replay records them before that step."""


class Tenant(Protocol):
    """An owner of recordings in a driver's pool that can make them again."""

    def vacate(self, why: str) -> None:
        """Release them now, and note why. No call is replaying one, and the caller holds the driver's lock."""


class Capturing(Protocol):
    """Captures on one device, within :meth:`CaptureDriver.recording`."""

    device: torch.device

    def feeds(self, bridge: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether graphs can copy ``value``, and tensors of its layout, into ``bridge`` by themselves."""

    def capture(self, body: Callable[[], T], fed: Pairs = ()) -> tuple[CapturedGraph, T]:
        """Run ``body`` under a capture; returns the graph and the result of ``body``.

        The graph has one of its :attr:`~CapturedGraph.feeds` for each pair in ``fed``. A launch copies these values
        before anything else. The first launch copies the given ones.

        When this returns, no effect of ``body`` on the device has happened: written storages and the random state are
        as before, and tensors made inside have no values until :meth:`CapturedGraph.replay`. Effects on the host have
        happened.

        Raises:
            CaptureError: ``body`` did something that no capture can hold, or raised; ``__cause__`` is its exception.
                The process is repaired: no capture is active, the random state is as before, no storage was written,
                and the next capture works.
        """

    def let_out(self, value: torch.Tensor, target: torch.Tensor) -> Outlet | None:
        """Within a body: copy the bytes of ``value`` from here to ``target``, which is dense and not in the pool.

        None if the graph could not copy elsewhere later. Then nothing is copied.
        """

    def progress(self) -> Hashable:
        """How far the current capture has come: another value once something was added. For use within a body.

        Raises:
            CaptureError: the capture cannot succeed any more, even if the body has caught the exception that said so.
        """

    def allocating(self) -> AbstractContextManager[None]:
        """Inside, this thread's allocations on the device are pool memory, without a capture. Within ``recording``.

        Raises:
            CaptureError: there is no pool, and none can be opened.
        """

    def lend(self, made: torch.Tensor) -> torch.Tensor:
        """``made``, from the last capture or from :meth:`allocating`, as the tensor that holds its memory.

        Once nothing refers to the storage of the result, later captures may get the memory. What was captured before
        goes on using its address. Called only if :attr:`~CaptureDriver.reuses_memory`.
        """


class CaptureDriver(Protocol):
    """Captures and replays on one device, in one memory pool; or on several devices, with a pool on each."""

    name: str
    device: torch.device
    devices: tuple[torch.device, ...]
    """All devices of the driver. The first is :attr:`device`."""
    lock: threading.RLock
    """Held by every call that uses the pool."""
    patience: float
    """Seconds that a call waits for the lock: ``LOCK_TIMEOUT``, or none while one holder keeps it for longer than
    that."""
    busy: bool
    """Whether a call of a compiled function is running. A thread that got the lock and finds this True is inside that
    call."""
    tenants: list[Callable[[], Tenant | None]]
    """Weak references."""
    deferred: deque[Callable[[], None]]
    """Functions to call once no call is running. Whoever ends a call does it."""
    pool_size: PoolSize
    """The memory that recordings in the pool need. Those that record write it, and it is empty again when the pool is
    freed."""
    reuses_memory: bool
    """Whether later captures may get pool memory to which nothing refers any more."""

    def begin(self) -> int:
        """Order this call after the last one that used the pool; returns the raw handle of the current stream.

        Raises:
            ReplayError: the device is lost; see :meth:`give_up`.
        """

    def note_arguments(self, args: Sequence[Any]) -> None:
        """Called with the arguments of a call. A recorded graph may find one at an address that was another tensor's."""

    def end(self, stream: int) -> None:
        """Mark on ``stream`` the end of this call's use of the pool. Called even if the call raised."""

    def recording(self, apart: bool = False) -> AbstractContextManager[Any]:
        """Held around one recording, with all its segments and the eager steps between them.

        While they run, graphs that were captured earlier may use pool memory that a recording lends. So this memory keeps
        its values within one call only, even if it is held. With ``apart`` the recording gets memory that no other
        recording gets, before or after. Held memory then keeps its values from call to call. If an object is yielded,
        all memory of the recording, held or not, keeps its values as long as that object lives.
        """

    def on(self, device: torch.device) -> Capturing:
        """The part that captures on ``device``; on the first device if it is none of :attr:`devices`."""

    def drawing(self) -> AbstractContextManager[None]:
        """Held around ops that run by themselves and may draw from the device's default generator."""

    def has_room(self, size: int) -> bool:
        """Whether a pool may take ``size`` bytes, and a share of the device's memory is left for what others run."""

    def make_room(self) -> None:
        """Return the allocator's unused memory to the device, after a capture ran out of memory and before the next begins.

        During a capture the allocator cannot do this itself.
        """

    def vacate(self) -> None:
        """Release all recordings in the pool, after one ran out of memory, so that the pool's free memory can be returned.

        A pool returns no memory while there is a graph in it, and the plain call that follows may need that memory.
        """

    def is_capturing(self) -> bool:
        """Whether somebody else's capture is active on the current stream."""

    def give_up(self, why: str) -> None:
        """The device is lost to this process: from now on :meth:`begin` raises, with this reason."""

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        """Free the memory of ``graphs``, which are not replayed again. The pool is freed with its last graph.

        ``owner`` holds the tensors that the graphs read and write, and is cleared once their last launches are over.
        Nobody else may hold these tensors, or their memory stays. Without ``wait`` the host does not wait for the
        launches: what is still in use is freed at the end of a later call, and the pool stays for calls to come.
        """

    def settle(self) -> None:
        """Called after a release without a wait, since perhaps no call comes any more.

        If nothing else is captured here, the host waits after all, and the pool is freed. Otherwise the memory is freed
        at the end of a later call.
        """

    def pool_bytes(self) -> int:
        """Bytes of device memory that the pool reserves."""

    def executable_bytes(self) -> int:
        """Bytes of device memory that the executable graphs take besides the pool, as far as the driver can tell."""

    def live_blocks(self) -> int:
        """The number of allocated blocks in the pool: 0 after everything was released."""

    def live_graphs(self) -> int:
        """The number of graphs that were captured and not released."""


class SessionDriver(CaptureDriver, Capturing, Protocol):
    """A driver of one device that can also capture in the middle of the caller's own code, which cannot run again."""

    def session(self) -> AbstractContextManager[CaptureSession]:
        """For captures that begin and end in the middle of a ``with`` block. Within :meth:`CaptureDriver.recording`."""
