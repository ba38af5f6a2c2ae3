"""What drivers have in common: a device, a lock, the users of the pool; and drivers that run op by op, without a pool."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, TypeVar

import torch

from breakable_backend import locks
from breakable_backend.drivers import LOCK_TIMEOUT, CapturedGraph, Feed, Pairs, SessionDriver, Tenant
from breakable_backend.drivers.graph_copies import Fed
from breakable_backend.drivers.graph_nodes import dot_of_names
from breakable_backend.drivers.pool_size import PoolSize
from breakable_backend.errors import CaptureError, ReplayError

T = TypeVar("T")


class DeviceDriver:
    """The state of :class:`breakable_backend.drivers.CaptureDriver` for one device."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.devices: tuple[torch.device, ...] = (device,)
        self.lock = locks.lock()
        self.patience = LOCK_TIMEOUT
        self.busy = False
        self.tenants: list[Callable[[], Tenant | None]] = []
        self.pool_size = PoolSize()
        self.deferred: deque[Callable[[], None]] = deque()
        locks.in_child(self, type(self)._forked)

    def on(self, device: torch.device) -> Self:
        """Itself: it has one device."""
        return self

    def _forked(self) -> None:
        """In a forked child the call of another thread is not running."""
        if not locks.is_ours(self.lock):
            self.busy = False

    def note_arguments(self, args: Sequence[Any]) -> None:
        """Nothing to do: a graph reads whatever is at its addresses."""

    def lend(self, made: torch.Tensor) -> torch.Tensor:
        """``made`` itself: whoever holds its storage holds the memory."""
        return made


def capture_body(
    driver: SessionDriver, body: Callable[[], T], fed: Pairs, failure: Callable[[Exception], CaptureError]
) -> tuple[CapturedGraph, T]:
    """:meth:`breakable_backend.drivers.CaptureDriver.capture` by a session. ``failure`` makes the error for an exception."""
    with driver.session() as session:
        session.begin(fed)
        try:
            result = body()
        except BaseException as error:
            session.abandon()
            if isinstance(error, Exception):
                raise failure(error) from error
            raise
        return session.end(), result


class GraphAround:
    """A captured graph whose launch is replaced. Everything else is the captured graph's."""

    def __init__(self, graph: CapturedGraph) -> None:
        self.graph = graph

    @property
    def draws_random(self) -> bool:
        return self.graph.draws_random

    @property
    def feeds(self) -> Sequence[Feed]:
        return self.graph.feeds

    @property
    def num_kernels(self) -> int:
        return self.graph.num_kernels

    def kernels(self) -> tuple[str, ...]:
        return self.graph.kernels()

    def dot(self) -> str:
        return self.graph.dot()


class OpByOpGraph:
    """A segment that :meth:`run` runs op by op, in memory that it owns until its release."""

    num_kernels = -1
    feeds: tuple[Fed, ...] = ()
    """The values to copy into bridges before each run."""

    def __init__(self, draws_random: bool, made: Mapping[int, torch.UntypedStorage]) -> None:
        self.draws_random = draws_random
        self.made = made
        """Memory that was allocated inside."""
        self.released = False

    def kernels(self) -> tuple[str, ...]:
        """The ops that it launches; nothing if it cannot tell."""
        return ()

    def dot(self) -> str:
        return dot_of_names(self.kernels())

    def copier(self, like: torch.Tensor) -> None:
        """None: torch's own copy is as quick."""

    def replay(self, stream: int) -> None:
        if self.released:
            raise ReplayError("a graph was replayed after its release", fix="capture it again")
        self.run()

    def run(self) -> None:
        """Run its ops."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop what it owns. Results that the caller holds keep their storage."""
        self.released, self.made, self.feeds = True, {}, ()


class OpByOpDriver(DeviceDriver):
    """A driver that runs op by op: it allocates as usual, is finished when it returns, and fails as the device does.

    Graphs live as long as the caller holds them. :meth:`release` empties them earlier.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._adopted: weakref.WeakSet[Any] = weakref.WeakSet()
        self._adopting = locks.lock()

    def adopt(self, graph: OpByOpGraph) -> None:
        """Count the memory that ``graph`` owns as the pool's."""
        with self._adopting:
            self._adopted.add(graph)

    def _live(self) -> list[OpByOpGraph]:
        with self._adopting:
            return [graph for graph in self._adopted if not graph.released]

    def allocating(self) -> AbstractContextManager[None]:
        """Nothing to do: there is only the device's memory."""
        return nullcontext()

    def drawing(self) -> AbstractContextManager[None]:
        """Nothing to do: no capture disturbs the generator."""
        return nullcontext()

    def has_room(self, _size: int) -> bool:
        """Yes: memory of the host is not counted."""
        return True

    def make_room(self) -> None:
        """Nothing to do: nobody holds free memory."""

    vacate = settle = make_room

    def give_up(self, why: str) -> None:
        """Nothing to do: later calls fail by themselves."""

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        """Free ``graphs`` at once."""
        for graph in graphs:
            assert graph in self._adopted, graph
            graph.release()  # type: ignore[attr-defined]
        if owner is not None:
            owner.clear()
        if not self._live():
            self.pool_size = PoolSize()

    def pool_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._made().values())

    def executable_bytes(self) -> int:
        return 0

    def live_blocks(self) -> int:
        return len(self._made())

    def live_graphs(self) -> int:
        return len(self._live())

    def _made(self) -> dict[int, torch.UntypedStorage]:
        return {int(storage._cdata): storage for graph in self._live() for storage in graph.made.values()}
