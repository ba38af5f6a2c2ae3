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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import GeneratorType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.capturing import gradients
from breakable_backend.capturing.eager_results import Parts, fields, on_known_memory, tensors_on
from breakable_backend.capturing.graph import Alive, BreakableCUDAGraph, Captured, OnlyUser, log
from breakable_backend.capturing.memory import FIX, CaptureMemory, op_label, resized
from breakable_backend.drivers import CaptureSession, SessionDriver, tape
from breakable_backend.drivers.cuda import CudaDriver
from breakable_backend.drivers.streams import explained
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.errors import (
    BreakableError,
    CaptureError,
    OptionsError,
    first_line,
    optimizer_runs,
    shown,
    user_line,
)
from breakable_backend.failure_kinds import as_passing
from breakable_backend.interception import without_autocast_cache
from breakable_backend.internal_errors import raise_if_ours
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.layout import Geometry
from breakable_backend.ir.overlap import Region
from breakable_backend.ir.program import Op, Reason, described
from breakable_backend.ir.running_ops import OpMode, has_memory, kernel_of_ops, memory_on
from breakable_backend.ir.views import is_view_op
from breakable_backend.marks import modules
from breakable_backend.marks.functions import Mark
from breakable_backend.marks.marking import marked_composites, marked_functions
from breakable_backend.marks.results import Unholdable
from breakable_backend.marks.rules import live_reason
from breakable_backend.marks.structure import LEAVE_IT_IN_PLACE, where_they_lie
from breakable_backend.options import Options
from breakable_backend.recordings.checks import places_of
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.observer import Issue, Subject, observers_of
from breakable_backend.recordings.recorder import MAX_FED
from breakable_backend.recordings.recording import Call, Copy, EagerStep, GraphStep, Recording, Step, Variable

NOT_RESIZABLE = "resize storage that is not resizable"
DURING_CAPTURE = "during CUDA graph capture"
"""Parts of PyTorch's own texts of errors."""
CAPTURABLE = (
    "give the optimizer {0}=True, as in Adam(..., {0}=True), so that Python does not read the count of its steps; if it has "
    "no such option, put opt.step() into a function marked with @eager_on_graph"
)
"""What helps where an optimizer reads its count of steps. On the CPU PyTorch's optimizers take no ``capturable=True``."""


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
                f"capture_error_mode does not take {shown(capture_error_mode)}", fix="global, thread_local or relaxed"
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
            raise OptionsError(
                f"barrier takes a function, got {shown(barrier)}", fix="for example barrier=torch.distributed.barrier"
            )
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
    """End the segment here, and begin another one: the code after it is launched as a separate graph.

    Outside of a capture it does nothing, except that in compiled code it breaks Dynamo's graph.

    >>> from breakable_backend import BreakableCUDAGraph, break_graph, capture
    >>> with capture(BreakableCUDAGraph(driver="tape")) as graph:
    ...     y = torch.ones(2) + 1
    ...     break_graph()
    ...     z = y * 2
    >>> graph
    BreakableCUDAGraph(segments=2, eager_steps=1, replays=0)
    """
    handler = active.handler.get()
    if handler is not None:
        handler.call(Mark(lambda: None, "break_graph", ""), (), {})


class _Watcher(OpMode):
    """A dispatch mode that sees every op of the body."""

    def __init__(self, under_way: _OngoingCapture) -> None:
        super().__init__(under_way.op)
        self.under_way = under_way

    def with_other_gradient(self, op: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.under_way.capturing:
            return NotImplemented
        mark = Mark(op, op_label(op), "")
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
    ops: list[Op] = field(default_factory=list)
    """The ops of the current segment so far."""
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
        keep = self.observers.reads_values or not self.driver.reuses_memory
        self.memory = CaptureMemory(self.driver, keep)

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
                    self.memory.refuse_other_shapes()
                    self._keep()
                    kept = True
                elif self.capturing:
                    self.capturing = False
                    spoilt = self.session.abandon()
                    if isinstance(error, CaptureError) and not error.blamed:
                        error = _placed(error, user_line(error.__traceback__))
                        raise error
                    if isinstance(error, RuntimeError) and NOT_RESIZABLE in str(error):
                        raise as_passing(resized(user_line(error.__traceback__)), error) from error
                    spoilt = spoilt or DURING_CAPTURE in str(error)
                    if spoilt and isinstance(error, Exception) and not isinstance(error, BreakableError):
                        where = user_line(error.__traceback__)
                        what, fix = explained(error)
                        raise as_passing(CaptureError(what, where=where, fix=fix or FIX), error) from error
        finally:
            if not kept:
                graphs = [step.graph for step in self.steps if isinstance(step, GraphStep)]
                self.driver.release(graphs, [*self.steps, self.constants, self.memory.held])
                self.steps.clear()
            self.constants, self.leaves = {}, {}
            self.memory.forget()
        if error is None and self.failed is not None:
            nothing = CaptureError(
                f"nothing was captured, since the body caught an error: {first_line(self.failed)}",
                where=user_line(self.failed.__traceback__),
                fix="catch it outside of the capture",
            )
            raise as_passing(nothing, self.failed) from self.failed

    def _keep(self) -> None:
        bridges = {name: value for name, value in self.constants.items() if isinstance(value, Bridge)}
        memory, most = self.memory, None if self.memory.keep else self.memory.most
        recording = Recording((), {}, tuple(self.steps), (), (), self.constants, places_of(bridges), most)
        watched = memory.watched()
        captured = Captured(
            self.driver,
            recording,
            held=[
                *(storage for key, storage in memory.held.items() if key not in watched),
                *(tensor for tensor in watched.values() if not isinstance(tensor, nn.Parameter)),
            ],
            written=list(memory.written.values()),
            outside=tuple(memory.outside.values()),
            modes=self.modes,
            name=self.graph.name,
            observers=self.observers,
            gradients=tuple(memory.gradients(self.leaves)),
        )
        self.graph.record_seconds = time.perf_counter() - self.started
        self.graph._take(captured, list(watched.values()))

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
                flag = "fused" if self.driver.device.type == "cpu" else "capturable"
                fix = CAPTURABLE.format(flag) if optimizer_runs() else FIX
                raise CaptureError(f"{found.op} {found.text}, inside a capture", where=user_line(), fix=fix)
            reason = Reason(found.rule, found.text, found.op, user_line())
            return self._break(Mark(func, found.op, ""), reason, args, kwargs)
        self.memory.refuse_reach(func, args, kwargs)
        if _torch.is_composite(func) and (kernel := kernel_of_ops(func, args, self.driver.device)):
            with self.watcher:
                return kernel(*args, **kwargs)
        taken = memory_on(self.driver.device, (args, kwargs))
        if taken or getattr(kwargs.get("device"), "type", "") == self.driver.device.type:
            self.session.touch()
        for tensor in taken:
            self.memory.reads(tensor)
        written = self.memory.writes(func, args, kwargs)
        if self.issue is None:
            result = func(*args, **kwargs)
        else:
            result = self.issue(func, args, kwargs, op_label(func), user_line())
        for before in written:
            self.memory.refuse_other_place(func, before)
        for tensor in memory_on(self.driver.device, result):
            self.memory.makes(tensor)
        if not is_view_op(func):
            self.ops.append(Op(f"op_{len(self.ops)}", op_label(func), described(result), "", user_line()))
        return result

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
        differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return self._break(mark, reason, args, kwargs, differentiable=differentiable)

    def _composite(self, op: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """Run a marked op that autograd would decompose as an eager step. None: it is no call of the body."""
        if not self.capturing or active.handler.get() is not self:
            return None
        return (self.call(Mark(op, str(op._schema.name), "", by="mark_eager"), args, kwargs),)

    def _break(
        self,
        mark: Mark,
        reason: Reason,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        differentiable: bool = False,
        replayed: Callable[..., Any] | None = None,
    ) -> Any:
        """Run the function of ``mark`` as an eager step; ``differentiable``: gradients may flow through it.

        A replay calls ``replayed`` in its place, with the leaves of the arguments.
        """
        name = mark.name
        # Before the call, since it may change the containers and objects that it gets.
        given = pytree.tree_flatten((args, dict(kwargs)))
        function = self.observers.eager(mark.function, name, reason.source)
        iterators = [leaf for leaf in given[0] if isinstance(leaf, Iterator) and not _is_spent(leaf)]
        call = None
        if differentiable:
            reach = gradients.Reach.of(mark, given[0], self.memory.made)
            call = gradients.Call.of(mark, reach, function, *given, reason.source)
        self._end()
        known = self.memory.live().keys() | self.memory.held.keys()
        taken = tensors_on(self.driver.device, (args, kwargs))  # kept alive until their keys are compared
        known |= set(map(_torch.storage_key, taken))
        token = active.handler.set(None)
        try:
            try:
                for barrier in (self.barrier, mark.barrier):
                    if barrier is not None:
                        barrier()
                run = mark.capture_stub or function
                if call is not None:
                    call.check()
                    args, kwargs = call.arguments()
                leaves = pytree.tree_leaves((args, dict(kwargs)))
                # An op may resize an empty tensor that it gets as out=.
                filled = [leaf for leaf in leaves if has_memory(leaf) and leaf.numel()]
                lying = where_they_lie(filled)
                with _torch.without_observers():
                    result = run(*args, **kwargs)
            finally:
                active.handler.reset(token)
            apart = isinstance(replayed, gradients.Backward)
            if lying != where_they_lie(filled):
                raise CaptureError(
                    f"{name} changed the shape, the strides or the memory of a tensor that it was given",
                    where=reason.source,
                    fix=LEAVE_IT_IN_PLACE,
                )
            for kind in (type(one).__name__ for one in iterators if _is_spent(one)):
                raise CaptureError(
                    f"{name} used up an argument, a {kind}, which each replay would find empty",
                    where=reason.source,
                    fix="pass a list or a tuple",
                )
            try:
                result = on_known_memory(result, taken)
            except Unholdable as error:
                raise CaptureError(f"{name}: its result is {error.what}", where=reason.source, fix=error.fix) from None
            # What else an argument holds may be gone, and its memory used again. The graph keeps these themselves.
            kept = [leaf for leaf in memory_on(self.driver.device, given[0]) if not isinstance(leaf, nn.Parameter)]
            moves = [leaf.is_leaf and _torch.storage_key(leaf) not in self.memory.made for leaf in kept]
            places = [leaf if move else Region.of(leaf) for leaf, move in zip(kept, moves, strict=True)]
            parts = Parts.of(result, known, self.driver.device, name, reason.source, mark.host_only, apart, places)
            del taken, kept, leaves, filled
            way_back = None
            if call is not None:
                way_back = call.take(result, self.driver.device)
                self.leaves |= {id(leaf): leaf for leaf in call.step.all_leaves()}
                replayed = call.step if call.takes_part else None
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
            bridge = self.memory.bridge(source)
            bridges.append(bridge.tensor)
            value, place = f"{base}_{number}", f"{base}_bridge_{number}"
            calls.append(Call(value, operator.getitem, (Variable(f"{base}_parts"), number), {}, "part"))
            self.constants[place] = bridge.on(self.memory.place(bridge.tensor))
            loads.append(Copy(Variable(place), Variable(value), source.device))
            if not self.memory.keep and bridge.flat is None and self.driver.feeds(bridge.tensor, source):
                fed.append((loads[-1], source))
        self.steps.append(EagerStep(tuple(calls), (reason,)))
        self.loads, self.fed = tuple(loads), fed if len(fed) <= MAX_FED else ()
        self.memory.look()
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
        made: Sequence[Any] = self._break(Mark(first, name, source), reason, tuple(grads), {}, replayed=step)
        return made

    def _argument(self, leaf: Any, name: str, calls: list[Call], source: str) -> Any:
        """What stands for an argument in the recorded call: parameters and modules weakly, other objects themselves."""
        if leaf is None or type(leaf) in (int, float, bool, str):
            return leaf
        if isinstance(leaf, nn.Module | nn.Parameter):
            calls.append(Call(name, Alive.of(leaf, source), (), {}, "alive"))
        else:
            strided = type(leaf) is torch.Tensor and leaf.layout is torch.strided
            ours = strided and _torch.storage_key(leaf) in self.memory.made
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and (ours or not leaf.is_leaf):
                leaf = leaf.detach()
            self.constants[name] = Geometry.of(leaf).on(self.memory.place(leaf)) if ours else leaf
        return Variable(name)


def _back_on(stream: torch.cuda.Stream) -> None:
    """Make ``stream`` current again.

    If a segment ends inside ``with torch.cuda.stream(side)``, that statement restores the capture stream.
    """
    if torch.cuda.current_stream(stream.device) != stream:
        with torch.cuda.device(stream.device):
            torch.cuda.set_stream(stream)


def _record(event: torch.cuda.Event) -> None:
    """Let code outside of a capture see, by an event that a segment recorded, when the segment is done."""
    event.record()


def _is_spent(iterator: Iterator[Any]) -> bool:
    """Whether a generator, or an iterator over a list or its like, has come to its end."""
    if isinstance(iterator, GeneratorType):
        return iterator.gi_frame is None
    return type(iterator).__module__ == "builtins" and operator.length_hint(iterator, 1) == 0


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
