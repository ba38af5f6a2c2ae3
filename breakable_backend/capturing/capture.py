"""``with capture(graph):`` around any code, while it captures.

The body runs once, for real. Each segment of it is captured, and launched as soon as its capture ends, so eager
functions see real data. The result is a :class:`Recording`, as for a compiled function.
"""

from __future__ import annotations

import keyword
import operator
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.capturing import gradients
from breakable_backend.capturing.eager_results import Parts, fields, tensors_on
from breakable_backend.capturing.graph import (
    Alive,
    BreakableCUDAGraph,
    Captured,
    Gradient,
    OnlyUser,
    Outside,
    log,
)
from breakable_backend.drivers import CaptureSession, SessionDriver, tape
from breakable_backend.drivers.cuda import CudaDriver
from breakable_backend.drivers.streams import explained
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.errors import BreakableError, CaptureError, OptionsError, first_line, optimizer_runs, user_line
from breakable_backend.failure_kinds import as_passing
from breakable_backend.interception import without_autocast_cache
from breakable_backend.internal_errors import raise_if_ours
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.effects import written_values
from breakable_backend.ir.layout import STRIDED, Geometry, has_gaps
from breakable_backend.ir.program import Op, Reason, described
from breakable_backend.ir.running_ops import OpMode, kernel_of_ops, memory_on
from breakable_backend.ir.views import is_view_op
from breakable_backend.marks import modules
from breakable_backend.marks.functions import Mark
from breakable_backend.marks.marking import marked_composites, marked_functions
from breakable_backend.marks.rules import live_reason
from breakable_backend.options import Options
from breakable_backend.recordings.checks import places_of
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.observer import Issue, Subject, observers_of
from breakable_backend.recordings.recorder import MAX_FED
from breakable_backend.recordings.recording import Call, Copy, EagerStep, GraphStep, Held, Recording, Step, Variable

REACHING = STRIDED | _torch.aten("as_strided_ resize_")
"""Ops that read memory beside the elements of their argument."""
NOT_RESIZABLE = "resize storage that is not resizable"
DURING_CAPTURE = "during CUDA graph capture"
"""Parts of PyTorch's own texts of errors."""
CAPTURABLE = (
    "give the optimizer capturable=True, as in Adam(..., capturable=True), so that it counts its steps on the device; if "
    "it has no such option, put opt.step() into a function marked with @eager_on_graph"
)
FIX = "let it run between two segments: put it into a function marked with @eager_on_graph"


class capture:
    """Capture the body of a ``with`` statement into ``graph``. The body runs once, for real.

    >>> from breakable_backend import BreakableCUDAGraph, capture
    >>> x, graph = torch.zeros(2), BreakableCUDAGraph(driver="tape")
    >>> with capture(graph):
    ...     y = x + 1
    >>> _ = x.fill_(4)
    >>> graph.replay(); y
    tensor([5., 5.])

    Tensors made inside are the graph's own, and valid until its next replay. Inputs are read at their addresses in each
    replay. Marked functions, marked ops and ops that no capture can hold run eagerly between segments, on real data.

    Args:
        graph: the graph to capture into. What it had before is released.
        stream: a CUDA stream to capture on, instead of the graph's own.
        capture_error_mode: as in ``torch.cuda.graph``.
        barrier: called before each eager step while capturing, such as a barrier of ranks. A rank that is ahead then
            waits between two segments, and not within one. It is called before a mark's own ``barrier``, and not in
            replays.
        debug: ``"eager"``: nothing is captured; the ops are taped, and issued one by one in each replay. ``"compare"``:
            each replay of a segment is compared with its ops, issued one by one.
        tolerance: how far ``debug="compare"`` lets floats differ, as ``(rtol, atol)``; bit for bit by default.
        pool: not taken here, as by ``torch.cuda.graph``, but by :class:`BreakableCUDAGraph`.

    Raises:
        OptionsError: an argument with a value that is not allowed.
        CaptureError: a capture is active already. Or, at a line of the body: something that can neither be captured nor
            run eagerly, such as a value read on the host.
    """

    def __init__(
        self,
        graph: BreakableCUDAGraph,
        stream: torch.cuda.Stream | None = None,
        capture_error_mode: str = "thread_local",
        *,
        barrier: Callable[[], None] | None = None,
        debug: str | None = None,
        tolerance: tuple[float, float] | None = None,
        pool: None = None,
    ) -> None:
        if not isinstance(graph, BreakableCUDAGraph):
            raise OptionsError(
                f"capture takes a BreakableCUDAGraph, got {type(graph).__name__}",
                fix="graph = BreakableCUDAGraph(), then: with capture(graph): ...",
            )
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise OptionsError(
                f"capture_error_mode does not take {capture_error_mode!r}", fix="global, thread_local or relaxed"
            )
        if pool is not None:
            raise OptionsError(
                "capture takes no pool: a graph has its pool from the start",
                fix="BreakableCUDAGraph(pool=other.pool())",
            )
        if stream is not None and not isinstance(stream, torch.Stream | torch.cuda.Stream):
            raise OptionsError(
                f"stream takes a torch.cuda.Stream, got {type(stream).__name__}", fix="stream=torch.cuda.Stream()"
            )
        if barrier is not None and not callable(barrier):
            raise OptionsError(f"barrier takes a function, got {barrier!r}")
        self.graph, self.stream, self.mode, self.barrier = graph, stream, capture_error_mode, barrier
        given = {"debug": debug, "tolerance": tolerance}
        self.options = Options.parse({name: value for name, value in given.items() if value is not None})
        self._under_way: _OngoingCapture | None = None

    def __enter__(self) -> BreakableCUDAGraph:
        if active.handler.get() is not None:
            raise CaptureError(
                "a capture was started inside another capture", where=user_line(), fix="captures do not nest"
            )
        if any(isinstance(mode, _Watcher) and mode.under_way.capturing for mode in _torch.dispatch_modes()):
            error = _other_context(user_line())
            raise error
        driver = self.graph._made_driver()
        if self.options.debug == "eager":
            driver = TapeDriver(driver.device)
        if driver.is_capturing():
            raise CaptureError("another CUDA graph capture is active", where=user_line(), fix="captures do not nest")
        self._under_way = _OngoingCapture(self.graph, driver, self.options, self.stream, self.mode, self.barrier)
        self._under_way.open()
        return self.graph

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        under_way, self._under_way = self._under_way, None
        assert under_way is not None
        try:
            under_way.close(error)
        except Exception as fault:
            raise_if_ours(fault, log)
            raise
        if isinstance(error, Exception):
            raise_if_ours(error, log)


def is_capturing() -> bool:
    """Whether :class:`capture` is capturing this code. False in an eager function, which is not captured.

    >>> from breakable_backend import BreakableCUDAGraph, capture, is_capturing
    >>> with capture(BreakableCUDAGraph(driver="tape")):
    ...     inside = is_capturing()
    >>> inside, is_capturing()
    (True, False)
    """
    return active.handler.get() is not None


# Dynamo of torch 2.15 would trace this function, and freeze its answer. Older versions cannot.
@_torch.break_of_dynamo("break_graph() ends a segment of the capture that it is called in")
def break_graph() -> None:
    """End the segment here, and begin another one: the code behind is launched as a separate graph.

    Outside of a capture it does nothing, except that in compiled code it breaks Dynamo's graph.

    >>> from breakable_backend import BreakableCUDAGraph, break_graph, capture
    >>> with capture(BreakableCUDAGraph(driver="tape")) as graph:
    ...     y = torch.ones(2) + 1
    ...     break_graph()
    ...     z = y * 2
    >>> graph
    BreakableCUDAGraph(2 segments, 1 eager steps, 0 replays)
    """
    handler = active.handler.get()
    if handler is not None:
        handler.call(Mark(_nothing, "break_graph", ""), (), {})


def _nothing() -> None:
    pass


class _Watcher(OpMode):
    """A dispatch mode that sees every op of the body."""

    def __init__(self, under_way: _OngoingCapture) -> None:
        super().__init__(under_way.op)
        self.under_way = under_way

    def with_other_gradient(self, op: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.under_way.capturing:
            return NotImplemented
        mark = Mark(op, _op_label(op), "")
        return self.under_way.call(
            mark, args, kwargs, why="a captured backward would have another formula for its gradient"
        )


class _MarkedFunctions(TorchFunctionMode):
    """A function mode that sees calls of marked PyTorch functions which are not ops, made by the body's own code."""

    def __init__(self, under_way: _OngoingCapture, functions: tuple[Any, ...]) -> None:
        super().__init__()
        self.under_way, self.functions = under_way, functions

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(func is function for function in self.functions):
            mark = Mark(func, func.__name__, "")
            return self.under_way.call(mark, args, kwargs or {}, why="marked by mark_eager")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Written:
    """A tensor that an op writes, and its place before or after that."""

    tensor: torch.Tensor
    key: int
    memory: tuple[int, int]
    """The address and the size of its storage."""
    lies: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Written:
        storage = tensor.untyped_storage()
        lies = tensor.shape, tensor.stride(), tensor.storage_offset()
        return cls(tensor, _torch.storage_key(tensor), (storage.data_ptr(), storage.nbytes()), lies)


def _resized(where: str) -> CaptureError:
    return CaptureError(
        "the result of an eager step was resized, and its memory belongs to the graph",
        where=where,
        fix="resize a clone of it",
    )


@dataclass
class _OngoingCapture:
    """A capture in progress. It implements :class:`active.BreakHandler`."""

    graph: BreakableCUDAGraph
    driver: SessionDriver
    options: Options
    capture_stream: torch.cuda.Stream | None
    error_mode: str
    barrier: Callable[[], None] | None
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    loads: tuple[Copy, ...] = ()
    """Copies of the last eager step's results, with which the next segment begins."""
    fed: Sequence[tuple[Copy, torch.Tensor]] = ()
    """Those that its graph makes by itself, each with the tensor that it copies. The tensor is held until the graph
    exists and can copy from other addresses."""
    made: dict[int, _torch.StorageWeakRef] = field(default_factory=dict)
    """Storages in pool memory: made in segments, and bridges. The weak references keep the keys from being used again.

    Whoever refers to a storage keeps its memory. Once nobody does, segments that are captured later may get it, since
    each replay makes the value anew before it is read, in the same order.
    """
    bridges: set[int] = field(default_factory=set)
    """Those among them that are bridges."""
    in_parts: dict[int, bool] = field(default_factory=dict)
    """Bridges of tensors that did not begin at the beginning of their storage, or that have memory between their
    elements; and whether they have that."""
    most: Held = field(default_factory=Held)
    """The most of their memory that is needed at the same time."""
    places: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    """What replays have in place of those storages, so that aliases are aliases there too."""
    held: dict[int, Any] = field(default_factory=dict)
    """Storages from outside, which are held as long as the graph lives."""
    parameters: dict[int, Any] = field(default_factory=dict)
    """Held while capturing. Afterwards they, and their memory, are watched."""
    reshaped: dict[int, tuple[_Written, str, str]] = field(default_factory=dict)
    """Tensors from outside with other shapes or strides, by identity: how they were, the first such op, and its line."""
    written: dict[int, _torch.StorageWeakRef] = field(default_factory=dict)
    """Storages from outside that segments write."""
    ops: list[Op] = field(default_factory=list)
    """The ops of the current segment so far."""
    outside: dict[int, Outside] = field(default_factory=dict)
    """Tensors whose memory is held or watched, by the key of their storage."""
    leaves: dict[int, torch.Tensor] = field(default_factory=dict)
    """Autograd leaves that marked functions take, by identity."""
    failed: BaseException | None = None
    capturing: bool = False
    started: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)

    def __post_init__(self) -> None:
        self.observers = observers_of(Subject(self.graph.name, self.options, log, compiled=False))
        self.issue: Issue | None = None
        """The function that issues ops of the current segment."""
        self.keep = self.observers.reads_values or not self.driver.reuses_memory
        """Whether all that is made is held."""

    def open(self) -> None:
        with ExitStack() as stack:
            if self.driver.device.type == "cuda":
                stack.callback(_back_on, torch.cuda.current_stream(self.driver.device))
            stack.enter_context(self.driver.lock)
            stack.enter_context(self.observers.span("capture"))
            stack.enter_context(without_autocast_cache())
            # A backward stays in this thread: CUDA ends a capture in the thread that began it, and eager steps end
            # segments.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(self.graph.being_captured())
            self.graph._free()
            self.graph.debug = self.options.debug
            self.modes = replace(Modes.current(), autocast=(), grad=False)
            self.stream = self.driver.begin()
            stack.callback(self.driver.end, self.stream)
            stack.enter_context(OnlyUser(self.driver))
            if isinstance(self.driver, CudaDriver):
                stack.enter_context(self.driver.capturing_on(self.capture_stream, self.error_mode))
            stack.enter_context(self.driver.recording(apart=self.graph.shares_pool))
            self.observers.recording(self.driver.device)
            self.session: CaptureSession = stack.enter_context(self.driver.session())
            token = active.handler.set(self)
            stack.callback(active.handler.reset, token)
            stack.enter_context(modules.watching())
            self._begin()
            self.watcher = stack.enter_context(_Watcher(self))
            if composites := marked_composites():
                stack.enter_context(_torch.composites_seen(composites, self.driver.device.type, self._composite))
            if functions := marked_functions():
                stack.enter_context(_MarkedFunctions(self, functions))
            self.stack = stack.pop_all()

    def close(self, error: BaseException | None) -> None:
        kept = False
        try:
            with self.stack:
                if error is None and self.failed is None:
                    self._end()
                    self._refuse_other_shapes()
                    self._keep()
                    kept = True
                elif self.capturing:
                    self.capturing = False
                    spoilt = self.session.abandon()
                    if isinstance(error, CaptureError) and not error.blamed:
                        error = _placed(error, user_line(error.__traceback__))
                        raise error
                    if isinstance(error, RuntimeError) and NOT_RESIZABLE in str(error):
                        raise as_passing(_resized(user_line(error.__traceback__)), error) from error
                    spoilt = spoilt or DURING_CAPTURE in str(error)
                    if spoilt and isinstance(error, Exception) and not isinstance(error, BreakableError):
                        where = user_line(error.__traceback__)
                        what, fix = explained(error)
                        raise as_passing(CaptureError(what, where=where, fix=fix or FIX), error) from error
        finally:
            if not kept:
                graphs = [step.graph for step in self.steps if isinstance(step, GraphStep)]
                self.driver.release(graphs, [*self.steps, self.constants, self.held])
                self.steps.clear()
            self.constants, self.held, self.parameters, self.outside, self.leaves = {}, {}, {}, {}, {}
        if error is None and self.failed is not None:
            nothing = CaptureError(
                f"nothing was captured, since the body caught an error: {first_line(self.failed)}",
                where=user_line(self.failed.__traceback__),
                fix="catch it outside of the capture",
            )
            raise as_passing(nothing, self.failed) from self.failed

    def _keep(self) -> None:
        bridges = {name: value for name, value in self.constants.items() if isinstance(value, Bridge)}
        most = None if self.keep else self.most
        recording = Recording((), {}, tuple(self.steps), (), (), self.constants, places_of(bridges), most)
        # Parameters to which the body gave other memory are not among them: the graph keeps the memory that it reads.
        watched = {key: value for key, value in self.parameters.items() if _torch.storage_key(value) == key}
        captured = Captured(
            self.driver,
            recording,
            held=[storage for key, storage in self.held.items() if key not in watched],
            written=list(self.written.values()),
            outside=tuple(self.outside.values()),
            modes=self.modes,
            name=self.graph.name,
            observers=self.observers,
            gradients=tuple(self._gradients()),
        )
        self.graph.record_seconds = time.perf_counter() - self.started
        self.graph._take(captured, list(watched.values()))

    def _gradients(self) -> Iterator[Gradient]:
        """Gradients that segments read or write."""
        read = (tensor for outside in self.outside.values() if (tensor := outside.ref()) is not None)
        leaves = {id(tensor): tensor for tensor in (*read, *self.parameters.values()) if tensor.is_leaf}
        for leaf in (leaves | self.leaves).values():
            if not leaf.requires_grad or (grad := leaf.grad) is None or grad.layout is not torch.strided:
                continue
            key = _torch.storage_key(grad)
            if key in self.made:
                yield Gradient(weakref.ref(leaf), grad, True, "")
            elif key in self.outside:
                yield Gradient(weakref.ref(leaf), grad, False, self.outside[key].source)

    # segments

    def _begin(self) -> None:
        self.session.begin([(self.constants[copy.bridge.name].tensor, value) for copy, value in self.fed])
        self.capturing = True
        self.issue = self.observers.issuing(len(self.steps))

    def _end(self) -> None:
        self.capturing = False
        try:
            graph = self.session.end()
        except CaptureError as error:
            self.failed = error
            placed = _placed(error, error.blamed or user_line())
            raise placed from error.__cause__
        feeds = {copy.bridge.name: feed for (copy, _), feed in zip(self.fed, graph.feeds, strict=True)}
        for name, feed in feeds.items():
            feed.take(self.constants[name].tensor)  # the bridge is loaded already
        loads = tuple(replace(copy, feed=feeds.get(copy.bridge.name)) for copy in self.loads)
        self.steps.append(GraphStep(graph, loads, ops=tuple(self.ops)))
        self.loads = self.fed = ()
        self.ops.clear()
        try:
            graph.replay(self.stream)
        except Exception as error:
            self.failed = error
            raise

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.capturing:
            return func(*args, **kwargs)
        if active.handler.get() is not self and threading.get_ident() == self.thread:
            self.failed = _other_context(user_line())  # autograd's threads have no context, and belong to the body
            raise self.failed
        if found := live_reason(func, args, kwargs, self.driver.device):
            if found.refused:
                fix = CAPTURABLE if optimizer_runs() else FIX
                raise CaptureError(f"{found.op} {found.text}, inside a capture", where=user_line(), fix=fix)
            return self._break(func, found.op, Reason(found.rule, found.text, found.op, user_line()), args, kwargs)
        self._refuse_reach(func, args, kwargs)
        if _torch.is_composite(func) and (kernel := kernel_of_ops(func, args, self.driver.device)):
            with self.watcher:
                return kernel(*args, **kwargs)
        taken = memory_on(self.driver.device, (args, kwargs))
        if taken or getattr(kwargs.get("device"), "type", "") == self.driver.device.type:
            self.session.touch()
        for tensor in taken:
            self._reads(tensor)
        written: list[_Written] = []
        if isinstance(func, _torch.OpOverload):
            written = [_Written.of(t) for t in memory_on(self.driver.device, written_values(func, args, kwargs))]
            for before in written:
                if before.key not in self.made:
                    self.written[before.key] = _torch.StorageWeakRef(before.tensor.untyped_storage())
        if self.issue is None:
            result = func(*args, **kwargs)
        else:
            result = self.issue(func, args, kwargs, _op_label(func), user_line())
        for before in written:
            self._refuse_other_place(func, before)
        for tensor in memory_on(self.driver.device, result):
            self._makes(tensor)
        if not is_view_op(func):
            self.ops.append(Op(f"op_{len(self.ops)}", _op_label(func), described(result), "", user_line()))
        return result

    def _refuse_reach(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise if ``as_strided`` may reach what the result of an eager step has beside its elements: a bridge has none."""
        if not self.in_parts or _torch.schema_name(func) not in REACHING:
            return
        gaps = self.in_parts.get(_torch.storage_key(args[0]))
        offset = args[-1] if isinstance(args[-1], int) else kwargs.get("storage_offset")
        if gaps or (gaps is not None and offset not in (None, args[0].storage_offset())):
            raise CaptureError(
                f"{_op_label(func)} reaches into the memory around the result of an eager step, inside a capture",
                where=user_line(),
                fix="return a contiguous tensor from the eager step",
            )

    def _refuse_other_place(self, func: Any, before: _Written) -> None:
        """Raise if an op has given other memory to a tensor that each replay takes as it was; note another shape."""
        now = _Written.of(before.tensor)
        if now.memory != before.memory:
            if before.key in self.bridges:
                resized = _resized(user_line())
                raise resized
            if before.key not in self.made:
                raise CaptureError(
                    f"{_op_label(func)} gives other memory to a tensor from outside, inside a capture",
                    where=user_line(),
                    fix=FIX,
                )
            self.places.pop(before.key, None)
        if now.lies != before.lies and before.key not in self.made and not before.tensor._is_view():
            self.reshaped.setdefault(id(before.tensor), (before, _op_label(func), user_line()))

    def _refuse_other_shapes(self) -> None:
        """Raise if the body has left a tensor from outside with another shape. In between it may have another one."""
        for before, op, where in self.reshaped.values():
            if _Written.of(before.tensor).lies != before.lies:
                raise CaptureError(
                    f"{op} changes the shape or the strides of a tensor from outside, which a replay would not",
                    where=where,
                    fix="change a view of it: x = x.view_as(x)",
                )

    def _reads(self, tensor: torch.Tensor) -> None:
        key = _torch.storage_key(tensor)
        if key not in self.made and key not in self.outside:
            address = tensor.untyped_storage().data_ptr()
            self.outside[key] = Outside(weakref.ref(tensor), address, user_line())
        if self.keep or key not in self.made:
            self.held[key] = tensor.untyped_storage()
        if key not in self.made and isinstance(tensor, nn.Parameter):
            self.parameters[key] = tensor

    def _makes(self, tensor: torch.Tensor) -> None:
        key = _torch.storage_key(tensor)
        if key not in self.made and key not in self.held:
            self.made[key] = _torch.StorageWeakRef(tensor.untyped_storage())

    def _look(self) -> None:
        """Note between two segments how much pool memory is in use."""
        live = {key: storage for key, ref in self.made.items() if (storage := _torch.live_storage(ref)) is not None}
        bridges = sum(storage.nbytes() for key, storage in live.items() if key in self.bridges)
        self.most = self.most.or_more(Held(bridges, sum(storage.nbytes() for storage in live.values()) - bridges))

    # breaks

    def call(self, mark: Mark, args: tuple[Any, ...], kwargs: Mapping[str, Any], why: str = "") -> Any:
        """Run a marked function as an eager step."""
        if not self.capturing:
            return mark.function(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) and _torch.is_transformed(leaf) for _, leaf in fields((args, kwargs))):
            raise CaptureError(
                f"{mark.name} was called under a transform of torch.func, inside a capture",
                where=user_line(),
                fix="call it outside of vmap and its like, on tensors",
            )
        reason = Reason("marked", why or mark.why, mark.name, user_line())
        return self._break(mark.function, mark.name, reason, args, kwargs, mark)

    def _composite(self, op: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Run a marked op that autograd would decompose as an eager step. None: it is no call of the body."""
        if not self.capturing or active.handler.get() is not self:
            return None
        return (self.call(Mark(op, str(op._schema.name), "", by="mark_eager"), args, kwargs),)

    def _break(
        self,
        function: Callable[..., Any],
        name: str,
        reason: Reason,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        mark: Mark | None = None,
        replayed: Callable[..., Any] | None = None,
    ) -> Any:
        """Run ``function`` as an eager step.

        A replay calls ``replayed`` in its place, with the leaves of the arguments.
        """
        # Before the call, since it may change the containers and objects that it gets.
        given = pytree.tree_flatten((args, dict(kwargs)))
        reach = gradients.Reach.of(mark, given[0], self.made) if mark is not None and _records_gradients() else None
        self._end()
        known = {key for key, ref in self.made.items() if _torch.live_storage(ref) is not None} | set(self.held)
        taken = tensors_on(self.driver.device, (args, kwargs))  # kept alive until their keys are compared
        known |= set(map(_torch.storage_key, taken))
        token = active.handler.set(None)
        try:
            for barrier in (self.barrier, mark.barrier if mark is not None else None):
                if barrier is not None:
                    barrier()
            function = self.observers.eager(function, name, reason.source)
            run = (mark.capture_stub if mark is not None else None) or function
            call = None
            if mark is not None and reach is not None:
                call = gradients.Call.of(mark, reach, function, *given, reason.source)
                args, kwargs = call.arguments()
            with _torch.without_observers():
                result = run(*args, **kwargs)
        except BaseException as error:
            self.failed = error
            raise
        finally:
            active.handler.reset(token)
        try:
            host_only, apart = mark is not None and mark.host_only, isinstance(replayed, gradients.Backward)
            parts = Parts.of(result, known, self.driver.device, name, reason.source, host_only, apart)
            del taken
            way_back = call.take(result, self.driver.device) if call is not None else None
            if call is not None:
                self.leaves |= {id(leaf): leaf for leaf in call.step.all_leaves()}
            if call is not None and call.takes_part:
                replayed = call.step
            returned = self._note(function, name, reason, given, parts, result, replayed)
            self._begin()
            if call is not None and way_back is not None:
                returned = call.through(self, way_back, result, returned, parts)
        except BaseException as error:
            self.failed = error
            raise
        return returned

    def _note(
        self,
        function: Callable[..., Any],
        name: str,
        reason: Reason,
        flat: tuple[list[Any], pytree.TreeSpec],
        parts: Parts,
        result: Any,
        replayed: Callable[..., Any] | None,
    ) -> Any:
        """Note the eager step. Returns its result as captured code may use it, on bridges."""
        base = re.sub(r"\W+", "_", re.split(r"::|\.", name)[-1]).strip("_") + f"_{len(self.steps)}"
        calls: list[Call] = []
        for number, event in enumerate(self.session.events()):
            name_of_event = f"{base}_event_{number}"
            self.constants[name_of_event] = event
            calls.append(Call(f"{name_of_event}_recorded", _record, (Variable(name_of_event),), {}, "event"))
        leaves, spec = flat
        passed: dict[int, Any] = {}  # by identity: what is passed twice stays one object
        for number, leaf in enumerate(leaves):
            if id(leaf) not in passed:
                passed[id(leaf)] = self._argument(leaf, f"{base}_argument_{number}", calls, reason.source)
        places = [passed[id(leaf)] for leaf in leaves]
        given: tuple[Any, ...] = pytree.tree_unflatten(places, spec)
        modes = Modes.current()
        ambient = modes if modes != self.modes else None
        if replayed is None and _is_plain(given) and all(map(_is_name, given[1])):
            calls.append(Call(base, function, tuple(given[0]), given[1], name, reason.source, ambient=ambient))
        else:
            packed = replayed or _Packed(function, spec)
            calls.append(Call(base, packed, tuple(places), {}, name, reason.source, ambient=ambient))
        fresh = [tensor.detach() if tensor.requires_grad else tensor for tensor in parts.fresh(result)]
        if not parts.is_trivial:
            calls.append(Call(f"{base}_parts", parts.check, (Variable(base),), {}, "check"))
        bridges: list[torch.Tensor] = []
        loads: list[Copy] = []
        fed: list[tuple[Copy, torch.Tensor]] = []
        for number, source in enumerate(fresh):
            bridge = self._bridge(source)
            bridges.append(bridge.tensor)
            value, place = f"{base}_{number}", f"{base}_bridge_{number}"
            calls.append(Call(value, operator.getitem, (Variable(f"{base}_parts"), number), {}, "part"))
            self.constants[place] = bridge.on(self._place(bridge.tensor))
            loads.append(Copy(Variable(place), Variable(value), source.device))
            if not self.keep and bridge.flat is None and self.driver.feeds(bridge.tensor, source):
                fed.append((loads[-1], source))
        self.steps.append(EagerStep(tuple(calls), (reason,)))
        self.loads, self.fed = tuple(loads), fed if len(fed) <= MAX_FED else ()
        self._look()
        return parts.on(result, bridges)

    def backward(
        self, step: gradients.Backward, run: gradients.Run, grads: Sequence[torch.Tensor | None]
    ) -> Sequence[Any]:
        """Run the backward of a marked function as an eager step."""

        def first(*grads: torch.Tensor | None) -> Sequence[Any]:
            # The nodes of leaves are made for the capture stream, so no other thread may capture there now. Autograd warns.
            with self.driver.drawing(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
                return step.first(run, grads)

        name, source = f"backward of {step.forward.name}", step.forward.source
        reason = Reason("marked", "the gradients of an eager step", name, source)
        made: Sequence[Any] = self._break(first, name, reason, tuple(grads), {}, replayed=step)
        return made

    def _bridge(self, source: torch.Tensor) -> Bridge:
        """A bridge with the content of ``source``, in pool memory that lives as long as somebody refers to it."""
        with torch.inference_mode(False), nullcontext() if self.keep else self.driver.allocating():
            bridge = Bridge.like(source, self.driver.device)
        if not self.keep and source.numel() > 0:
            bridge = bridge.on(self.driver.lend(bridge.tensor).untyped_storage())
        bridge.load(source)
        key, storage = _torch.storage_key(bridge.tensor), bridge.tensor.untyped_storage()
        self.made[key] = _torch.StorageWeakRef(storage)
        self.bridges.add(key)
        if (gaps := has_gaps(source)) or source.storage_offset():
            self.in_parts[key] = gaps
        if self.keep:
            self.held[key] = storage
        return bridge

    def _place(self, tensor: torch.Tensor) -> torch.UntypedStorage:
        """What a replay takes for the storage of ``tensor``. It does not hold pool memory."""
        storage = tensor.untyped_storage()
        if self.keep or _torch.storage_key(tensor) not in self.made or storage.nbytes() == 0:
            return storage
        return self.places.setdefault(_torch.storage_key(tensor), _torch.unowned_storage(storage))

    def _argument(self, leaf: Any, name: str, calls: list[Call], source: str) -> Any:
        """What stands for an argument in the recorded call: parameters and modules weakly, other objects themselves."""
        if leaf is None or type(leaf) in (int, float, bool, str):
            return leaf
        if isinstance(leaf, nn.Module | nn.Parameter):
            calls.append(Call(name, Alive.of(leaf, source), (), {}, "alive"))
        else:
            strided = type(leaf) is torch.Tensor and leaf.layout is torch.strided
            ours = strided and _torch.storage_key(leaf) in self.made
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and (ours or not leaf.is_leaf):
                leaf = leaf.detach()
            self.constants[name] = Geometry.of(leaf).on(self._place(leaf)) if ours else leaf
        return Variable(name)


def _back_on(stream: torch.cuda.Stream) -> None:
    """Make ``stream`` current again.

    If a segment ends inside ``with torch.cuda.stream(side)``, that statement restores the capture stream.
    """
    if torch.cuda.current_stream(stream.device) != stream:
        with torch.cuda.device(stream.device):
            torch.cuda.set_stream(stream)


def _records_gradients() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _record(event: torch.cuda.Event) -> None:
    """Let code outside of a capture see, by an event that a segment recorded, when the segment is done."""
    event.record()


@dataclass(frozen=True)
class _Packed:
    """Calls a function with arguments in containers that cannot be written as source."""

    function: Callable[..., Any]
    spec: Any

    def __call__(self, *leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return self.function(*args, **kwargs)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _is_plain(tree: Any) -> bool:
    if type(tree) in (tuple, list):
        return all(map(_is_plain, tree))
    if type(tree) is dict:
        return all(type(key) in (str, int) and _is_plain(value) for key, value in tree.items())
    return bool(pytree.tree_structure(tree).is_leaf())


def _placed(error: CaptureError, where: str) -> CaptureError:
    """A driver's error, with the user's line, and with advice for ``with capture``."""
    placed = CaptureError(error.what, where=where, fix=FIX if error.fix in ("", tape.FIX) else error.fix)
    return as_passing(placed, error)


def _other_context(where: str) -> CaptureError:
    return CaptureError(
        "code of another context (an asyncio task?) ran during a capture in this thread",
        where=where,
        fix="do not await inside of a capture",
    )


def _op_label(func: Any) -> str:
    return str(func._schema.name) if isinstance(func, _torch.OpOverload) else str(func.name())
