"""CUDA graphs: one capture stream and one memory pool for each device, and what puts the process right after a failed capture.

Captures are begun and ended directly. ``torch.cuda.graph`` would synchronize, collect garbage and empty the caching
allocator each time, which takes seconds for many segments.
"""

from __future__ import annotations

import atexit
import logging
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch

from breakable_backend import _torch
from breakable_backend.drivers import CapturedGraph, Pairs
from breakable_backend.drivers.collector import held_off
from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.drivers.device import DeviceDriver, capture_body
from breakable_backend.drivers.generator import Draws, end, hold_for_ever, registry
from breakable_backend.drivers.graph_copies import Fed, LetOut, can_be_fed
from breakable_backend.drivers.graph_nodes import GraphNode, dot, dot_of_names, first_copies, nodes
from breakable_backend.drivers.ordering import REPLAY_OUTSIDE, Order, capture_end, relaxed
from breakable_backend.drivers.pool_size import PoolSize
from breakable_backend.drivers.streams import StreamOrder, Wait, explained
from breakable_backend.errors import CaptureError, OptionsError, Passing, ReplayError, first_line, user_line
from breakable_backend.failure_kinds import as_passing, passing

cudart = Bindings("cuda.bindings.runtime")

HEADROOM = 0.1
"""The share of a GPU's memory that recordings of training leave free, for the rest of the program: it could not get back
what is in a pool."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def require_cuda() -> None:
    """Raise unless this machine can capture CUDA graphs.

    Raises:
        OptionsError: no GPU, a ROCm build of torch, another allocator than torch's own, or no cuda-python.
    """
    if torch.version.hip is not None:
        raise OptionsError(
            "breakable_cg does not support ROCm builds of torch", fix="use driver='tape', or backend='inductor'"
        )
    if not torch.cuda.is_available():
        raise OptionsError("driver='cuda' needs a CUDA GPU, and torch sees none", fix="use driver='tape' or 'auto'")
    if torch.cuda.get_allocator_backend() != "native":
        raise OptionsError(
            "driver='cuda' needs PyTorch's own allocator: under backend:cudaMallocAsync a graph keeps no memory between launches",
            fix="take backend:cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF, or use driver='tape'",
        )
    if not cudart.found():
        raise OptionsError("driver='cuda' needs cuda-python, which cannot be imported", fix="pip install cuda-python")


class CudaGraph:
    """A captured segment, instantiated as an executable graph.

    The first replay, which a recording makes at once, goes through torch and shows whether the graph draws random
    numbers: then the generator moves. A graph that draws always has to be launched that way, since torch first sets its
    seed and offset. Others are launched directly, which takes 1.9 us of host time instead of 4.7 (H200, torch 2.11).

    torch keeps the ``cudaGraph_t``, in host memory, so that its nodes can be read later.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, draws: Draws) -> None:
        self._graph: torch.cuda.CUDAGraph | None = graph
        self.executable_bytes = 0
        """Free device memory that instantiating took. CUDA takes memory in large pieces, so this is 0 for most
        graphs."""
        self._draws = draws
        self._executable: Any = None
        """What is launched directly; None if launches go through torch."""
        self._handle: Any = None
        """The executable graph."""
        self._copies: list[_Copy] = []
        """Those whose addresses change between launches."""
        self._outdated = False
        """Whether CUDA has refused an address in the executable graph."""
        self._nodes: tuple[GraphNode, ...] | None = None
        self._hooks = _torch.launch_hooks(graph)
        self._replayed = False
        self.draws_random = False
        self._index = draws.index
        self.feeds: tuple[Fed, ...] = ()

    def instantiate(self) -> None:
        assert self._graph is not None
        self._graph.instantiate()
        self._handle = cudart.cudaGraphExec_t(self._graph.raw_cuda_graph_exec())

    def feed(self, fed: Pairs) -> None:
        """Note the copies at its head, which were captured first, one for each pair of bridge and value."""
        if fed:
            assert self._graph is not None
            copies = first_copies(self._graph.raw_cuda_graph(), len(fed))
            self.feeds = tuple(
                Fed(bridge, value, self._pointer(_Copy.of(node, bridge, value)))
                for node, (bridge, value) in zip(copies, fed, strict=True)
            )

    def _pointer(self, copy: _Copy) -> Callable[[int], None]:
        """Makes launches from the next on copy from another address."""
        self._copies.append(copy)
        return lambda source: self._move(copy, copy.target, source)

    def let_out(self, outlet: LetOut, copy: _Copy) -> None:
        """Have the outlet of a captured copy change the address to which the graph copies."""
        self._copies.append(copy)
        outlet.point = lambda target: self._move(copy, target, copy.source)

    def _move(self, copy: _Copy, target: int, source: int) -> None:
        """Have launches from the next on copy from ``source`` to ``target``, and not at all if these are the same."""
        assert self._graph is not None, "a copy was moved after its graph's release"
        if _torch.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self._move(copy, target, source)
        copy.target, copy.source = target, source
        if (source != target) is not copy.enabled:
            self._enable(copy, not copy.enabled)
            copy.enabled = not copy.enabled
        if copy.enabled:
            executable, kind = self._handle, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            set_addresses = cudart.cudaGraphExecMemcpyNodeSetParams1D
            (status,) = set_addresses(executable, copy.node, target, source, copy.size, kind)
            if status:
                cudart.cudaGetLastError()  # otherwise the next launch, whoever makes it, would report this error
                self._outdated, self._executable = True, None
        return None

    def _enable(self, copy: _Copy, enabled: bool) -> None:
        (status,) = cudart.cudaGraphNodeSetEnabled(self._handle, copy.node, int(enabled))
        if status:
            self._refuse(cudart.cudaGetErrorString(status)[1].decode())

    def _renew(self) -> None:
        """Instantiate the graph anew. Its copies may go from and to memory of any kind then.

        CUDA refuses a copy in an executable graph memory of another kind than it had before. torch's allocator gives both
        kinds once its settings have changed (``expandable_segments``).
        """
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for copy in self._copies:  # all of them, since the memory of earlier launches may be gone
            set_addresses = cudart.cudaGraphMemcpyNodeSetParams1D
            (status,) = set_addresses(copy.node, copy.target, copy.source, copy.size, kind)
            if status:
                self._refuse(cudart.cudaGetErrorString(status)[1].decode())
        try:
            self.instantiate()
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            self._refuse(first_line(error), passing(error))
        for copy in self._copies:
            if not copy.enabled:
                self._enable(copy, False)
        self._outdated = False
        if self._replayed and not self.draws_random:
            self._executable = self._handle

    @property
    def num_kernels(self) -> int:
        return len(self.kernels())

    def kernels(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes() if node.kind == "kernel")

    def nodes(self) -> tuple[GraphNode, ...]:
        """All nodes in the order of the capture, copies and fills included; read once. Empty after a release."""
        with registry:  # another thread may release the graph meanwhile
            if self._nodes is None and self._graph is not None:
                self._nodes = nodes(self._graph.raw_cuda_graph())
            return self._nodes or ()

    def dot(self) -> str:
        with registry:
            return dot(self._graph.raw_cuda_graph()) if self._graph is not None else dot_of_names(())

    def replay(self, stream: int) -> None:
        """Launch on ``stream``, which is the current stream of the graph's device."""
        # torch's own launch calls hooks, which may be added and removed at any time. Looking takes 0.1 us, and nothing
        # before torch 2.14.
        if self._executable is None or (self._hooks and any(self._hooks)):
            self._replay_through_torch(stream)
            return
        (status,) = cudart.cudaGraphLaunch(self._executable, stream)
        if status:
            self._refuse(cudart.cudaGetErrorString(status)[1].decode())

    def copier(self, like: torch.Tensor) -> Callable[[int, int, int], None] | None:
        size = like.numel() * like.element_size()
        if size == 0 or _torch.extent(like.shape, like.stride()) != like.numel() or like.device.index != self._index:
            return None
        memcpy, kind = cudart.cudaMemcpyAsync, cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice

        def copy(target: int, source: int, stream: int) -> None:
            (status,) = memcpy(target, source, size, kind, stream)
            if status:
                # If the device is lost, this raises as torch's own copy would.
                torch.cuda.current_stream().synchronize()
                torch.cuda.check_error(int(status))

        return copy

    def _refuse(self, why: str, passes: Passing = "") -> NoReturn:
        refused = ReplayError(
            f"cudaGraphLaunch failed: {why}", fix=REPLAY_OUTSIDE if "when stream is capturing" in why else ""
        )
        refused.passing = passes
        raise refused

    def _replay_through_torch(self, stream: int) -> None:
        assert self._graph is not None, "replayed after its release"
        if self._outdated:
            self._renew()
        if self._replayed and not self.draws_random:
            self._graph.replay()  # this calls the hooks, which are code of others
            return
        self._draws.begin_replay(stream)
        try:
            before = self._draws.generator.get_offset()
            self._graph.replay()
            if not self._replayed:
                self.draws_random = self._draws.generator.get_offset() != before
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            self._refuse(first_line(error), passing(error))
        finally:
            self._draws.end_replay(stream)
        self._replayed = True
        if not self.draws_random:
            self._executable = self._handle

    def release(self) -> None:
        """Destroy the executable graph. Its memory goes back to the pool."""
        self._executable = None
        self._hooks, self.feeds = (), ()
        with registry:
            graph, self._graph, self._nodes = self._graph, None, None
            if graph is not None:
                graph.reset()
                del graph  # the object's destructor removes it from torch's registry

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # a default argument, since modules lose their names at the end of a process
        if getattr(self, "_graph", None) is not None and not ending():
            self.release()


@dataclass
class _Copy:
    """A copy in a graph, from where, and to where, the next launch makes it."""

    node: Any
    target: int
    source: int
    size: int
    enabled: bool = True

    @classmethod
    def of(cls, node: int, target: torch.Tensor, source: torch.Tensor) -> _Copy:
        size = target.numel() * target.element_size()
        return cls(cudart.cudaGraphNode_t(node), target.data_ptr(), source.data_ptr(), size)


class CudaGraphAmongGPUs(CudaGraph):
    """A captured segment where there are several GPUs: a raw launch uses the current device, whose default stream is 0."""

    def replay(self, stream: int) -> None:
        # All in one method, since asking for the current device takes 0.05 us, and calling another method twice that.
        if self._executable is None or (self._hooks and any(self._hooks)) or _torch.current_device() != self._index:
            with torch.cuda.device(self._index):
                super().replay(stream)
            return
        (status,) = cudart.cudaGraphLaunch(self._executable, stream)
        if status:
            self._refuse(cudart.cudaGetErrorString(status)[1].decode())

    def copier(self, like: torch.Tensor) -> Callable[[int, int, int], None] | None:
        copy, index = super().copier(like), self._index
        if copy is None:
            return None

        def copy_there(target: int, source: int, stream: int) -> None:
            if _torch.current_device() == index:
                copy(target, source, stream)
            else:
                with torch.cuda.device(index):
                    copy(target, source, stream)

        return copy_there


class WaitingGraph(CudaGraph):
    """A captured segment that waited for work from outside of the capture. Each launch waits in the same way."""

    def __init__(self, graph: torch.cuda.CUDAGraph, draws: Draws, waits: tuple[Wait, ...]) -> None:
        super().__init__(graph, draws)
        self._waits = waits

    def replay(self, stream: int) -> None:
        with torch.cuda.device(self._index):
            current = torch.cuda.current_stream()
            for wait in self._waits:
                wait.issue(current)
            super().replay(stream)

    def release(self) -> None:
        super().release()
        self._waits = ()


class _Kept:
    """Keeps the pools of a recording, in which nobody allocates any more: so all memory in them keeps its values."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self.graphs: list[tuple[Any, list[torch.cuda.CUDAGraph]]] = []
        """Pools, each with an empty graph in it."""
        _all_kept.add(self)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        while self.graphs and not ending():
            self._draws.leave(*self.graphs.pop())


_all_kept: weakref.WeakSet[_Kept] = weakref.WeakSet()


class _GraphInMemPool(torch.cuda.CUDAGraph):
    """A graph that keeps the caller's pool alive. If a ``MemPool`` dies before the graphs in it, the process aborts."""

    pool_of_the_caller: torch.cuda.MemPool

    def __del__(self) -> None:
        self.reset()  # while the pool is alive


_KEEPER = "breakable_backend_keeper"
"""An attribute of a caller's MemPool: an empty graph in it, which lives as long as the pool; None if a capture failed
there. torch 2.11 takes no graph into a pool again whose last graph was destroyed, nor into one in which a capture
failed, since its allocator for pinned memory remembers them."""


def _takes_graphs(pool: torch.cuda.MemPool, draws: Draws) -> bool:
    """Whether captures may allocate in ``pool``. Called in a capture's turn."""
    if _KEEPER not in vars(pool):
        try:
            vars(pool)[_KEEPER], _ = draws.capture_nothing(lambda: pool.id)
        except RuntimeError:
            vars(pool)[_KEEPER] = None
    return vars(pool)[_KEEPER] is not None


class CudaDriver(DeviceDriver):
    """Captures CUDA graphs on one device. See :class:`breakable_backend.drivers.CaptureDriver`."""

    name = "cuda"
    reuses_memory = True

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.capture_error_mode = "thread_local"  # other threads may go on to allocate, query events and pin memory
        self._given_pool = pool
        """The caller's pool, until a capture fails in it: a ``MemPool``, or a handle from
        ``torch.cuda.graph_pool_handle()``, which dies with its last graph."""
        super().__init__(device)
        self._index: int = self.device.index
        self._draws = Draws.of(self.device)
        self.stream = self._draws.stream
        """The stream of all captures. There is only one, since the allocator never gives a block of one stream to
        another stream."""
        self._pool: Any = None
        self._pools_apart: list[Any] = []
        """The pools of recordings that are apart, while there is memory in them."""
        self._keeper: torch.cuda.CUDAGraph | None = None
        """A graph that keeps the pool alive between recordings. A pool dies with its last graph, and using its handle
        then fails an internal assertion of torch."""
        self._kept: _Kept | None = None
        """What keeps the pools of the current recording, if it is apart."""
        self._live: set[CudaGraph] = set()
        self._several = torch.cuda.device_count() > 1
        self._order = Order(self.device)
        self._leaving: deque[_Leaving] = deque()
        self._lost = False
        """Whether the device is in an error state, which lasts until the process ends."""
        self._first = False
        """Whether the next capture is the first of a recording."""
        _drivers.add(self)
        self._let_out: list[tuple[LetOut, _Copy]] = []
        """Copies of results in the capture in progress."""
        self._recordings = 0
        """How many recordings are in progress."""

    def _forked(self) -> None:
        """In a forked child CUDA does not work. A call says so, and nothing is freed when it dies."""
        self.busy = False
        mine: Any = self
        mine.begin, mine.release, mine.is_capturing = _refuse_in_child, lambda *_, **__: None, lambda: False
        mine.settle = lambda: None

    # ordering

    def begin(self) -> int:
        """Order this call after the last one that used the pool; returns the raw handle of the current stream."""
        stream = _torch.current_raw_stream(self._index)
        if stream != self._order.last:
            self._order.follow(stream)
        return stream

    def give_up(self, why: str) -> None:
        def refuse() -> int:
            raise ReplayError(why, fix="restart the process")

        # These replace the methods, so that a call has no additional work while the device is not lost.
        self.begin, self.end = refuse, lambda stream: None  # type: ignore[method-assign]
        self._lost = True

    def end(self, stream: int) -> None:
        """Mark on ``stream`` the end of this call's use of the pool."""
        order = self._order
        if order.several or stream != order.last:  # with one stream, the usual case, nothing is called (0.05 us)
            order.mark(stream)
        if self._leaving and not self.is_capturing():
            self._give_back()

    def drawing(self) -> AbstractContextManager[None]:
        """The generator, while no other thread captures. After a long wait it is used anyway."""
        return self._draws.at_rest()

    def has_room(self, size: int) -> bool:
        """What torch's allocator holds unused, outside of pools, counts as free: it is returned before memory runs out."""
        free, total = torch.cuda.mem_get_info(self._index)
        ordinary = [
            s
            for s in torch.cuda.memory_snapshot()
            if s["device"] == self._index and tuple(s["segment_pool_id"]) == (0, 0)
        ]
        unused = sum(segment["total_size"] - segment["active_size"] for segment in ordinary)
        return bool(free + unused - size >= HEADROOM * total)

    def make_room(self) -> None:
        """Return the unused memory of torch's allocator to the device."""
        torch.cuda.empty_cache()

    def vacate(self) -> None:
        blocks = (block for segment in self._segments() for block in segment["blocks"])
        if self._live and any(block["state"] == "inactive" for block in blocks):
            for tenant in [tenant() for tenant in list(self.tenants)]:
                if tenant is not None:
                    tenant.vacate("memory ran out in another recording")
        torch.cuda.empty_cache()

    def is_capturing(self) -> bool:
        """Whether somebody else's capture is active on the current stream; False if the device is lost."""
        try:
            if self._several and _torch.current_device() != self._index:
                with torch.cuda.device(self._index):
                    return _torch.is_stream_capturing()
            return _torch.is_stream_capturing()
        except torch.AcceleratorError:
            return False

    # capture

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Make the capture stream current, in the turn of one capture among all threads and drivers of the process."""
        self._draws.begin_capture()
        try:
            with self.on_capture_stream(), self._draws.reset_on(self.stream.cuda_stream):
                yield
        finally:
            self._draws.end_capture()

    @contextmanager
    def capturing_on(self, stream: torch.cuda.Stream | None, error_mode: str) -> Iterator[None]:
        """Another stream (None: the driver's own) and error mode, for captures inside a ``with`` statement.

        The caller holds :attr:`lock`, since graphs of others are captured in this pool too.
        """
        before = self.stream, self.capture_error_mode
        self.stream, self.capture_error_mode = stream or self.stream, error_mode
        try:
            yield
        finally:
            self.stream, self.capture_error_mode = before

    @contextmanager
    def recording(self, apart: bool = False) -> Iterator[_Kept | None]:
        """Hold off Python's gc, which may free CUDA memory during a capture, and keep cuBLAS's workspaces in the pool.

        cuBLAS allocates a workspace for each pair of handle and stream at its first use. Handles have to exist before a
        capture. A workspace has to be allocated inside the capture: one from outside the pool could be freed while our
        graphs use it, by anybody who clears workspaces, as torch's CUDA graph trees do. At the end the workspace goes
        back to the pool, and later graphs may get its memory, since replays in one pool run one after the other.
        ``apart``: a pool of its own, in which nobody captures afterwards, and which is freed with the last of its
        graphs.
        """
        self._recordings += 1
        self._first = True
        try:
            # The first handle takes seconds on a busy machine, so it is made before a capture's turn. If there is none,
            # the capture will say why.
            with torch.cuda.device(self.device), relaxed(), suppress(RuntimeError):
                if not _torch.is_stream_capturing():
                    torch.cuda.current_blas_handle()
            with held_off(), self._apart() if apart else nullcontext() as kept:
                try:
                    yield kept
                finally:
                    _torch.clear_cublas_workspaces()
        finally:
            self._recordings -= 1

    @contextmanager
    def _apart(self) -> Iterator[_Kept]:
        """Use another pool during a recording. What is yielded keeps it; after a failed capture there are several."""
        before = self._pool, self._keeper
        self._pool = self._keeper = None
        self._kept = kept = _Kept(self._draws)
        try:
            yield kept
        finally:
            if self._pool is not None:
                self._pools_apart.append(self._pool)
            self._drop_keeper()
            self._kept = None
            self._pool, self._keeper = before

    def feeds(self, bridge: torch.Tensor, value: torch.Tensor) -> bool:
        return can_be_fed(bridge, value)

    def capture(self, body: Callable[[], T], fed: Pairs = ()) -> tuple[CapturedGraph, T]:
        """Run ``body`` under a capture on the driver's own stream, after the copies of what is ``fed``."""
        return capture_body(self, body, fed, _failure)

    def progress(self) -> Hashable:
        """The nodes on which the next node of the capture stream will depend, as CUDA reports them."""
        return capture_end(self.stream.cuda_stream)

    def let_out(self, value: torch.Tensor, target: torch.Tensor) -> LetOut | None:
        if self.progress() is None:  # CUDA would not tell the node of the copy
            return None
        self.copy(target, value)
        end = capture_end(self.stream.cuda_stream)
        assert end is not None
        (node,) = end
        outlet = LetOut(target)
        self._let_out.append((outlet, _Copy.of(node, target, value)))
        return outlet

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes on the capture stream, by a call that makes exactly one node."""
        size, kind = target.numel() * target.element_size(), cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        stream = self.stream.cuda_stream
        (status,) = cudart.cudaMemcpyAsync(target.data_ptr(), source.data_ptr(), size, kind, stream)
        torch.cuda.check_error(int(status))

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Route this thread's allocations to the pool, as blocks of the capture stream, as captures get them.

        This is done in a capture's turn. All drivers capture on that stream. While another thread captured, such
        allocations would go to its pool, and be freed with it.
        """
        assert self._recordings, "allocating outside recording()"
        self._draws.begin_capture()
        try:
            if self._pool is None:
                try:
                    with self.turn():
                        self._open_pool()
                except Exception as error:
                    raise as_passing(CaptureError(first_line(error)), error) from error
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),
                _torch.allocating_to_pool(self._index, self._pool),
                _torch.memory_as_it_is(),
            ):
                yield
        finally:
            self._draws.end_capture()

    @contextmanager
    def session(self) -> Iterator[CudaSession]:
        """Captures segment after segment."""
        session = CudaSession(self)
        with session.order.watching():
            yield session

    def begin_capture(self, fed: Pairs = ()) -> torch.cuda.CUDAGraph:
        """Begin to capture the current stream into the pool, in :meth:`turn`, after the copies of what is ``fed``.

        It raises and repairs like :meth:`capture`.
        """
        assert self._recordings, "capture outside recording()"
        try:
            self._let_out = []
            if self._first:
                _torch.clear_cublas_workspaces()
                self._first = False
            if self._pool is None or (
                isinstance(self._given_pool, torch.cuda.MemPool) and not _takes_graphs(self._given_pool, self._draws)
            ):
                self._open_pool()
            graph = self._made()
            try:
                with registry:
                    graph.capture_begin(pool=self._pool, capture_error_mode=self.capture_error_mode)
            except Exception as error:
                self._repair(graph, error)
                raise
            try:
                for bridge, value in fed:  # before other streams fork
                    self.copy(bridge, value)
            except BaseException:  # another thread may have invalidated the capture
                self.abandon_capture(graph)
                raise
        except Exception as error:
            raise as_passing(CaptureError(first_line(error)), error) from error
        return graph

    def _made(self) -> torch.cuda.CUDAGraph:
        if not isinstance(self._given_pool, torch.cuda.MemPool):
            return torch.cuda.CUDAGraph(keep_graph=True)
        graph = _GraphInMemPool(keep_graph=True)
        graph.pool_of_the_caller = self._given_pool
        return graph

    def end_capture(self, graph: torch.cuda.CUDAGraph, order: StreamOrder | None = None, fed: Pairs = ()) -> CudaGraph:
        """The captured graph, with its streams as ``order`` says. After an error the process is repaired."""
        try:
            try:
                waits = order.end() if order is not None else ()
            except Exception:
                self.abandon_capture(graph)  # the capture has to end, whatever happens with the streams
                raise
            self._end(graph)
            captured = self._instantiated(graph, waits, fed)
        except Exception as error:
            what, fix = (order.explained if order is not None else explained)(error)
            raise as_passing(CaptureError(what, fix=fix), error) from error
        self._live.add(captured)
        return captured

    def _instantiated(self, graph: torch.cuda.CUDAGraph, waits: tuple[Wait, ...], fed: Pairs) -> CudaGraph:
        kind = CudaGraphAmongGPUs if self._several else CudaGraph
        captured = WaitingGraph(graph, self._draws, waits) if waits else kind(graph, self._draws)
        free, _ = torch.cuda.mem_get_info(self._index)
        try:
            captured.feed(fed)
            for outlet, copy in self._let_out:
                captured.let_out(outlet, copy)
            captured.instantiate()
        except Exception:
            captured.release()
            raise
        captured.executable_bytes = max(0, free - torch.cuda.mem_get_info(self._index)[0])
        return captured

    def abandon_capture(self, graph: torch.cuda.CUDAGraph) -> bool:
        """End a capture whose body raised. Returns whether it could not even be ended."""
        try:
            self._end(graph)
        except Exception:  # noqa: BLE001 - what made the capture invalid is on its way to the caller already
            return True
        CudaGraph(graph, self._draws).release()
        return False

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            end(graph)
        except Exception as error:
            self._repair(graph, error)
            raise

    def _repair(self, graph: torch.cuda.CUDAGraph, error: BaseException) -> None:
        """Restore the process after the capture of ``graph`` failed to begin or to end.

        torch 2.11 leaves the pool recording and in use, and the generator in capture mode. The pool is not used again.
        The generator leaves that mode at the end of the next successful capture, the first in the new pool. Giving it a
        saved state instead would separate it from the graphs that draw from it already, which fail from then on. The
        graph's destructor may abort the process, so it never runs.
        """
        _torch.keep_for_ever(graph)
        if isinstance(self._given_pool, torch.cuda.MemPool):
            vars(self._given_pool)[_KEEPER] = None
        self._draws.spoilt(self._pool, error)
        self._open_pool()

    def _open_pool(self) -> None:
        """Open a new pool, in :meth:`turn`, with an empty graph that keeps it alive."""
        # A workspace in the pool before would still be used by later segments, and be freed with that pool.
        _torch.clear_cublas_workspaces()
        self._drop_keeper()
        self._pool = None
        if isinstance(self._given_pool, torch.cuda.MemPool):
            if _takes_graphs(self._given_pool, self._draws):
                self._pool = self._given_pool.id
                return
            log.warning("graphs go to a pool of their own: the MemPool takes no more, since a capture failed in it")
        try:
            self._keeper, self._pool = self._draws.capture_nothing(self._new_pool)
        except Exception:
            with suppress(Exception):  # if the pool is to blame, the generator works with another one
                self._draws.mend()
            raise

    def _new_pool(self) -> Any:
        given, self._given_pool = self._given_pool, None
        return given if isinstance(given, tuple) else torch.cuda.graph_pool_handle()

    def _drop_keeper(self) -> None:
        if self._keeper is not None:
            holder, self._keeper = [self._keeper], None
            if self._kept is not None:
                self._kept.graphs.append((self._pool, holder))
            else:
                self._draws.leave(self._pool, holder)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if getattr(self, "_keeper", None) is not None and not ending():
            self._drop_keeper()

    @contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        """Make the capture stream current, ordered on the GPU after the caller's stream, and the caller's after it.

        ``capture_begin`` resets the random offset, which all graphs of a generator share, by a kernel on the capture
        stream. It has to run after the replays that still read the offset, and before the next replay sets it.
        """
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                caller.wait_stream(self.stream)

    # release

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        """Free ``graphs``: at once, or when another thread's current call, or a capture, is over."""
        self._leaving.append(_Leaving(tuple(graphs), owner if owner is not None else [], wait))
        if self._lost:
            return
        if not self.is_capturing() and self.lock.acquire(blocking=False):
            try:
                self._give_back()
            finally:
                self.lock.release()

    def settle(self) -> None:
        if self._lost or self.is_capturing() or not self.lock.acquire(blocking=False):
            return  # the end of the current call does it
        try:
            leaving = {graph for leaving in self._leaving for graph in leaving.graphs}
            if not (self.busy or self._recordings) and self._live <= leaving:
                self.release(())  # nothing is left here, so waiting disturbs nobody
        finally:
            self.lock.release()

    def _give_back(self) -> None:
        """Free what leaves, if its last launches are over. The bridges go back to the allocator with their owner."""
        wait = any(leaving.wait for leaving in self._leaving)
        with relaxed():
            for _ in range(len(self._leaving)):
                if not self._leaving:  # what an owner held has freed more, and came here before
                    break
                leaving = self._leaving.popleft()
                if not self._is_over(leaving, wait):
                    self._leaving.append(leaving)  # the end of a later call tries again
                    continue
                for graph in leaving.graphs:
                    assert isinstance(graph, CudaGraph)
                    graph.release()
                    self._live.discard(graph)
                leaving.owner.clear()
        if wait and not self._live and not self._leaving:
            self._close_pool()

    def _is_over(self, leaving: _Leaving, wait: bool) -> bool:
        """Whether the last launches are over; False also if CUDA does not tell, as on a lost device."""
        try:
            if leaving.done is None:
                if not self._order.is_open():
                    return False
                if self._order.is_idle():
                    return True
                leaving.done = self._order.event()
            if leaving.done is not None and wait:
                leaving.done.synchronize()
            return leaving.done is None or wait or leaving.done.query()
        except torch.AcceleratorError:
            return False

    def _close_pool(self) -> None:
        self._drop_keeper()
        self._pool = None
        self.pool_size = PoolSize()
        torch.cuda.empty_cache()

    def pool_bytes(self) -> int:
        """Bytes of device memory that the pool reserves."""
        return sum(segment["total_size"] for segment in self._segments())

    def executable_bytes(self) -> int:
        """Free device memory that instantiating the live graphs took."""
        return sum(graph.executable_bytes for graph in list(self._live))

    def live_blocks(self) -> int:
        """Allocated blocks in the pool."""
        return sum(block["state"] == "active_allocated" for segment in self._segments() for block in segment["blocks"])

    def live_graphs(self) -> int:
        return len(self._live)

    def _segments(self) -> list[dict[str, Any]]:
        pool, apart = self._pool, list(self._pools_apart)  # copies, since other threads may open and close pools
        pools = {tuple(pool) for pool in (pool, *apart) if pool is not None}
        if not pools:
            return []
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) in pools]
        alive = {tuple(segment["segment_pool_id"]) for segment in segments}
        for gone in [pool for pool in apart if tuple(pool) not in alive]:
            self._pools_apart.remove(gone)
        return segments


_drivers: weakref.WeakSet[CudaDriver] = weakref.WeakSet()


def _leave() -> None:
    """At the end of the process: no thread is in a launch, and no graph is destroyed after CUDA's library is gone.

    Daemon threads that call from now on wait for a lock that is never released.
    """
    until = time.monotonic() + 2.0
    hold_for_ever()
    for kept in list(_all_kept):
        _torch.keep_for_ever(kept)
    for driver in list(_drivers):
        driver.lock.acquire(timeout=max(0.0, until - time.monotonic()))
        for graph in [*driver._live, *(graph for leaving in driver._leaving for graph in leaving.graphs)]:
            _torch.keep_for_ever(graph)
        _torch.keep_for_ever((driver._keeper, driver._given_pool))


atexit.register(_leave)


@dataclass(eq=False)
class _Leaving:
    """Graphs and tensors that a driver frees once their last launches are over."""

    graphs: tuple[CapturedGraph, ...]
    owner: list[Any]
    wait: bool
    """Whether the host waits for the launches."""
    done: torch.cuda.Event | None = None
    """An event after the last launches; made when no call is running any more."""


class CudaSession:
    """Captures on the driver's stream, which is the current one between ``begin`` and ``end``."""

    def __init__(self, driver: CudaDriver) -> None:
        self.driver = driver
        self.order = StreamOrder(driver.stream)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stack = ExitStack()
        self._fed: Pairs = ()

    def begin(self, fed: Pairs = ()) -> None:
        if self.driver.is_capturing():
            raise CaptureError("a CUDA graph capture is active already", fix="captures do not nest")
        caller = torch.cuda.current_stream(self.driver.device)
        with ExitStack() as stack:
            stack.enter_context(self.driver.turn())
            self._graph = self.driver.begin_capture(fed)
            self._stack = stack.pop_all()
        try:
            self._fed = fed
            self.order.begin(caller)
        except BaseException:
            self.abandon()
            raise

    def touch(self) -> None:
        self.order.touch()

    def end(self) -> CudaGraph:
        current = torch.cuda.current_stream(self.driver.device)
        if current != self.driver.stream:
            self.abandon()
            raise CaptureError(
                f"a segment ends while {current} is the current stream",
                fix="leave `with torch.cuda.stream(...)` before the break, or put the break outside",
            )
        graph, fed = self._taken()
        with self._stack:
            return self.driver.end_capture(graph, self.order, fed)

    def abandon(self) -> bool:
        graph, _ = self._taken()
        with self._stack, torch.cuda.stream(self.driver.stream):  # a capture has to end on the stream on which it began
            with suppress(RuntimeError):  # the exception that made the capture invalid reaches the caller already
                self.order.end()
            return self.driver.abandon_capture(graph)

    def events(self) -> Sequence[torch.cuda.Event]:
        return self.order.used()

    def _taken(self) -> tuple[torch.cuda.CUDAGraph, Pairs]:
        """The graph and its fed copies, removed from the session."""
        assert self._graph is not None, "ended without a beginning"
        graph, fed = self._graph, self._fed
        self._graph, self._fed = None, ()
        return graph, fed


def _failure(error: Exception) -> CaptureError:
    """The error of a capture for an exception of its body."""
    return as_passing(CaptureError(first_line(error), where=user_line(error.__traceback__)), error)


def _refuse_in_child() -> NoReturn:
    raise ReplayError(
        "CUDA does not work in a process that was forked from one that uses it",
        fix="start the process otherwise: torch.multiprocessing.set_start_method('spawn')",
    )
