"""The second door: ``with capture(graph):`` around any code, and ``graph.replay()``.

The body runs once, for real. Each stretch of it between two breaks is captured, and launched as soon as its capture
ends, so eager functions see real data. What comes of it is the same :class:`Recording` that a compiled function has.
"""

from __future__ import annotations

import linecache
import operator
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.buffers import Bridge
from breakable_backend.compare import Checker, Witness
from breakable_backend.difference import Tolerance
from breakable_backend.drivers import CaptureDriver, CaptureSession
from breakable_backend.drivers.cuda import CudaDriver, require_cuda
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.errors import BreakableError, CaptureError, OptionsError, ReplayError
from breakable_backend.functions import Mark
from breakable_backend.lowering import Ambient
from breakable_backend.marking import live_reason
from breakable_backend.options import Options
from breakable_backend.program import Reason
from breakable_backend.recording import (
    Call,
    Copy,
    EagerStep,
    GraphStep,
    Recording,
    Slot,
    Step,
    check_places,
    places_of,
    refuse_place,
)
from breakable_backend.replay import Replay, Tally, emit
from breakable_backend.results import Parts, tensors_on

FIX = "let it run between two segments: put it into a function marked with @eager_on_graph"


@dataclass(frozen=True)
class Pool:
    """Where captured memory lives. Graphs that share one are replayed one after the other, on whatever streams."""

    driver: CaptureDriver


@dataclass(frozen=True)
class _Outside:
    """A tensor that segments read at its address."""

    ref: weakref.ref[torch.Tensor]
    address: int
    source: str

    def check(self) -> None:
        """Raise if it has other memory now. One that is gone can tell nothing; the graph holds its memory."""
        tensor = self.ref()
        if tensor is not None and (address := tensor.untyped_storage().data_ptr()) != self.address:
            what = f"a {type(tensor).__name__} of shape {list(tensor.shape)}"
            refuse_place(what, freed=address == 0, where=self.source)


@dataclass
class _Captured:
    """What a graph owns."""

    driver: CaptureDriver
    recording: Recording
    replay: Replay
    held: list[Any]
    """Storages that segments read, other than parameters', which are the model's."""
    watched: list[weakref.ref[Any]]
    outside: tuple[_Outside, ...] = ()
    """Tensors from outside that segments read."""

    def check(self) -> None:
        """Raise if what segments read is not where it was when they were captured."""
        check_places(self.recording, ())
        for tensor in self.outside:
            tensor.check()

    def release(self) -> None:
        graphs = self.recording.graphs
        self.replay.forget()
        owner = [self.recording, self.replay, self.held]
        self.recording = self.replay = None  # type: ignore[assignment]
        self.held = []
        self.watched.clear()
        self.driver.release(graphs, owner)


class BreakableCUDAGraph:
    """A captured piece of code, with eager steps in it.

    >>> @eager_on_graph
    ... def double_if_positive(x):
    ...     return x * 2 if x.sum() > 0 else x + 0
    >>> x = torch.ones(3)
    >>> graph = BreakableCUDAGraph(driver="tape")
    >>> with capture(graph):
    ...     y = double_if_positive(x + 1) - 1
    >>> y
    tensor([3., 3., 3.])
    >>> _ = x.fill_(-5)
    >>> graph.replay(); y
    tensor([-5., -5., -5.])

    It owns the memory of its segments, the bridges of its eager steps, and every tensor from outside that its segments
    read, but for parameters: when one of those dies, the graph releases all it has.

    Args:
        pool: what :meth:`pool` of another graph returned, to share its memory; or a handle from
            ``torch.cuda.graph_pool_handle()``.
        driver: ``"auto"`` (CUDA if there is a GPU, else the tape, which shows semantics and not speed), ``"cuda"`` or
            ``"tape"``; by default what ``BREAKABLE_CG_DRIVER`` says, else ``"auto"``.

    Raises:
        OptionsError: no such driver, or no GPU for it.
    """

    def __init__(self, pool: Any = None, driver: str | None = None) -> None:
        self._choice = Options.parse({} if driver is None else {"driver": driver}).driver
        self._given_pool = pool
        self._driver: CaptureDriver | None = pool.driver if isinstance(pool, Pool) else None
        self._captured: _Captured | None = None
        self._release: weakref.finalize[..., BreakableCUDAGraph] | None = None
        """Frees what was captured when the graph is dropped."""
        self._gone = ""
        self._busy = False
        self.debug: str | None = None
        self.replays = 0

    def replay(self) -> None:
        """Run it again on the current stream: what is at the addresses of the inputs now is read.

        Raises:
            ReplayError: nothing was captured, or what it reads is gone; or it is being replayed already.
            EagerOutputError: an eager function returned what cannot take the place of its result at capture.
        """
        captured = self._captured
        if captured is None:
            raise ReplayError(self._gone or "nothing was captured", fix="capture first: with capture(graph): ...")
        driver = captured.driver
        with driver.lock:
            if self._busy:
                raise ReplayError(
                    "the graph is being replayed already", fix="an eager step cannot replay its own graph"
                )
            self._busy = True
            stream = driver.begin()
            try:
                captured.replay.function([], stream)
                self.replays += 1
            finally:
                driver.end(stream)
                self._busy = False
                if self._gone:
                    self.reset()

    def reset(self) -> None:
        """Free graphs and buffers; the graph can be captured again."""
        self._captured = None
        if self._release is not None:
            self._release()
            self._release = None

    def pool(self) -> Pool:
        """The pool, for ``BreakableCUDAGraph(pool=...)``."""
        return Pool(self._made_driver())

    @property
    def recording(self) -> Recording | None:
        """The steps, once captured."""
        return self._captured.recording if self._captured is not None else None

    @property
    def driver(self) -> CaptureDriver | None:
        """What captured it, or will; None before that is known."""
        return self._captured.driver if self._captured is not None else self._driver

    @property
    def tally(self) -> Tally | None:
        """What replays counted; None before a capture."""
        return self._captured.replay.tally if self._captured is not None else None

    @property
    def source(self) -> str:
        """The generated replay, as Python; empty before a capture."""
        return self._captured.replay.source if self._captured is not None else ""

    def __repr__(self) -> str:
        recording = self.recording
        if recording is None:
            return "BreakableCUDAGraph(nothing captured)"
        breaks = sum(isinstance(step, EagerStep) for step in recording.steps)
        return f"BreakableCUDAGraph({len(recording.graphs)} segments, {breaks} eager steps, {self.replays} replays)"

    def _made_driver(self) -> CaptureDriver:
        if self._driver is None:
            self._driver = _driver(self._choice, self._given_pool)
        return self._driver

    def _take(self, captured: _Captured) -> None:
        self._captured, self._gone, self.replays = captured, "", 0
        self._release = weakref.finalize(self, captured.release)
        self._release.atexit = False

    def _expire(self, what: str) -> None:
        self._gone = f"{what} died, which the graph reads; the graph was released"
        if not self._busy:
            self.reset()


def _driver(choice: str, pool: Any = None) -> CaptureDriver:
    if choice == "cuda" or (choice == "auto" and torch.cuda.is_available()):
        require_cuda()
        return CudaDriver(torch.device("cuda", torch.cuda.current_device()), pool)
    if choice == "auto":
        warnings.warn(
            "there is no GPU: the tape driver shows what would be captured, not how fast; driver='tape' chooses that",
            stacklevel=4,
        )
    return TapeDriver(torch.device("cpu"))


class capture:
    """Capture the body of a ``with`` statement into ``graph``. The body runs once, for real.

    Tensors made inside are the graph's own, and valid until its next replay. Inputs are read at their address at each
    replay. Marked functions, marked ops and what no capture can hold run eagerly, between segments, on real data.

    Args:
        graph: what to capture into; what it held before is released.
        stream: where to capture, instead of a stream of the graph's own; of CUDA.
        capture_error_mode: as in ``torch.cuda.graph``.
        debug: ``"eager"``: nothing is captured; the ops are taped, and issued one by one at each replay. ``"compare"``: each
            replay of a segment is compared with its ops, issued one by one.
        tolerance: how far ``debug="compare"`` lets floats differ, as ``(rtol, atol)``; bit for bit by default.

    Raises:
        CaptureError: a capture is active already; or, at the line of the body that is to blame, what can be neither
            captured nor run eagerly, such as a value read on the host.
    """

    def __init__(
        self,
        graph: BreakableCUDAGraph,
        stream: torch.cuda.Stream | None = None,
        capture_error_mode: str = "thread_local",
        *,
        debug: str | None = None,
        tolerance: tuple[float, float] | None = None,
    ) -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise OptionsError(
                f"capture_error_mode does not take {capture_error_mode!r}", fix="global, thread_local or relaxed"
            )
        self.graph, self.stream, self.mode = graph, stream, capture_error_mode
        said = {"debug": debug, "tolerance": tolerance}
        self.options = Options.parse({name: value for name, value in said.items() if value is not None})
        self._door: _Door | None = None

    def __enter__(self) -> BreakableCUDAGraph:
        if active.handler.get() is not None:
            raise CaptureError("a capture was begun inside a capture", where=user_line(), fix="captures do not nest")
        self.graph.reset()
        driver = self.graph._made_driver()
        if self.options.debug == "eager":
            driver = TapeDriver(driver.device)
        if isinstance(driver, CudaDriver):
            driver.capture_error_mode = self.mode
            if self.stream is not None:
                driver.stream = self.stream
        if driver.is_capturing():
            raise CaptureError("another CUDA graph capture is active", where=user_line(), fix="captures do not nest")
        self.graph.debug = self.options.debug
        witness = Witness(driver.device) if self.options.debug == "compare" else None
        self._door = _Door(self.graph, driver, witness, self.options.tolerance)
        self._door.open()
        return self.graph

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        door, self._door = self._door, None
        assert door is not None
        door.close(error)


def is_capturing() -> bool:
    """Whether this code is being captured by :class:`capture`; False in an eager function, which is not."""
    return active.handler.get() is not None


def break_graph() -> None:
    """End the segment here, and begin another: what comes after is launched by a graph of its own."""
    handler = active.handler.get()
    if handler is not None:
        handler.call(Mark(_nothing, "break_graph", ""), (), {})


def _nothing() -> None:
    pass


class _Watcher(_torch.TorchDispatchMode):
    """Sees every op of the body, below autograd, in program order."""

    supports_higher_order_operators = True

    def __init__(self, door: _Door) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.door = door

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have Dynamo run compiled functions as such, and not uncompiled, as it does under other modes (torch 2.13)."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a tensor subclass unwraps itself, and its inner ops come back here
        return self.door.op(func, args, kwargs or {})


@dataclass
class _Door:
    """One capture under way: implements :class:`active.BreakHandler`."""

    graph: BreakableCUDAGraph
    driver: CaptureDriver
    witness: Witness | None = None
    tolerance: Tolerance = None
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    loads: tuple[Copy, ...] = ()
    """Copies of the last eager step's results, which the next segment begins with."""
    made: dict[int, tuple[_torch.StorageWeakRef, int]] = field(default_factory=dict)
    """Storages made in segments, and in which. The weak references keep the keys from being used again."""
    held: dict[int, Any] = field(default_factory=dict)
    parameters: dict[int, Any] = field(default_factory=dict)
    """Held while capturing, and watched later."""
    outside: dict[int, _Outside] = field(default_factory=dict)
    """Tensors whose memory is held or watched, by the key of their storage."""
    failed: BaseException | None = None
    capturing: bool = False

    def open(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.driver.lock)
            self.stream = self.driver.begin()
            stack.callback(self.driver.end, self.stream)
            stack.enter_context(self.driver.recording())
            self.session: CaptureSession = stack.enter_context(self.driver.session())
            token = active.handler.set(self)
            stack.callback(active.handler.reset, token)
            self._begin()
            stack.enter_context(_Watcher(self))
            self.stack = stack.pop_all()

    def close(self, error: BaseException | None) -> None:
        kept = False
        try:
            with self.stack:
                if error is None and self.failed is None:
                    self._end()
                    self._keep()
                    kept = True
                elif self.capturing:
                    self.capturing = False
                    if (
                        self.session.abandon()
                        and isinstance(error, Exception)
                        and not isinstance(error, BreakableError)
                    ):
                        where = user_line(error.__traceback__)
                        raise CaptureError(_says(error), where=where, fix=FIX) from error
        finally:
            if not kept:
                graphs = [step.graph for step in self.steps if isinstance(step, GraphStep)]
                self.driver.release(graphs, [*self.steps, self.constants, self.held])
                self.steps.clear()
            self.constants, self.held, self.parameters, self.outside = {}, {}, {}, {}
        if error is None and self.failed is not None:
            raise CaptureError(
                f"nothing was captured, since an error was caught inside: {_says(self.failed)}",
                fix="catch it outside of the capture",
            ) from self.failed

    def _keep(self) -> None:
        bridges = {name: value for name, value in self.constants.items() if isinstance(value, Bridge)}
        recording = Recording((), {}, tuple(self.steps), (), (), self.constants, places_of(bridges))
        checker = Checker(recording, self.witness, self.tolerance) if self.witness is not None else None
        replay = emit(recording if checker is None else checker.recording)
        captured = _Captured(self.driver, recording, replay, [self.held], [], tuple(self.outside.values()))
        captured.replay = _checked_once(captured) if checker is None else _compared(captured, checker)
        me = weakref.ref(self.graph)
        for parameter in self.parameters.values():
            what = f"a {type(parameter).__name__}"

            def died(_: Any, what: str = what) -> None:
                if (graph := me()) is not None and not sys.is_finalizing():
                    graph._expire(what)

            captured.watched.append(weakref.ref(parameter, died))
        self.graph._take(captured)

    # segments

    def _begin(self) -> None:
        self.session.begin()
        self.capturing = True
        if self.witness is not None:
            self.watch, self.script = self.witness.begin(len(self.steps))

    def _end(self) -> None:
        self.capturing = False
        try:
            graph = self.session.end()
        except CaptureError as error:
            self.failed = error
            raise CaptureError(error.what, where=error.where or user_line(), fix=error.fix or FIX) from error.__cause__
        self.steps.append(GraphStep(graph, self.loads))
        self.loads = ()
        graph.replay(self.stream)

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.capturing:
            return func(*args, **kwargs)
        if found := live_reason(func, args, kwargs, self.driver.device):
            if found.refused:
                raise CaptureError(f"{found.op} {found.text}, inside a capture", where=user_line(), fix=FIX)
            return self._break(func, found.op, Reason(found.rule, found.text, found.op, user_line()), args, kwargs)
        self.session.touch()
        for tensor in tensors_on(self.driver.device, (args, kwargs)):
            self._reads(tensor)
        result = func(*args, **kwargs) if self.witness is None else self._issue(func, args, kwargs)
        for tensor in tensors_on(self.driver.device, result):
            self._makes(tensor)
        return result

    def _issue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op, and write it down for compare mode."""
        self.watch.label = func._schema.name if isinstance(func, _torch.OpOverload) else func.name()
        self.watch.source = user_line()
        return self.script.issue(self.watch, func, args, kwargs)

    def _reads(self, tensor: torch.Tensor) -> None:
        key = _torch.storage_key(tensor)
        if key not in self.made and key not in self.outside:
            address = tensor.untyped_storage().data_ptr()
            self.outside[key] = _Outside(weakref.ref(tensor), address, user_line())
        if key in self.made:
            if self.made[key][1] != len(self.steps):
                self.held[key] = tensor.untyped_storage()  # it crosses a break: nobody else may have its memory
        elif isinstance(tensor, nn.Parameter):
            self.parameters[key] = tensor
        elif key not in self.parameters:
            self.held[key] = tensor.untyped_storage()

    def _makes(self, tensor: torch.Tensor) -> None:
        key = _torch.storage_key(tensor)
        if key not in self.made and key not in self.held and key not in self.parameters:
            self.made[key] = (_torch.StorageWeakRef(tensor.untyped_storage()), len(self.steps))

    # breaks

    def call(self, mark: Mark, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a marked function as an eager step."""
        if not self.capturing:
            return mark.function(*args, **kwargs)
        reason = Reason("marked", "marked by eager_on_graph", mark.name, user_line())
        return self._break(mark.function, mark.name, reason, args, kwargs, mark)

    def _break(
        self,
        function: Callable[..., Any],
        name: str,
        reason: Reason,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        mark: Mark | None = None,
    ) -> Any:
        self._end()
        token = active.handler.set(None)
        try:
            if mark is not None and mark.barrier is not None:
                mark.barrier()
            run = (mark.capture_stub if mark is not None else None) or function
            if self.witness is not None:
                run = self.witness.attend(run, name, reason.source)
            result = run(*args, **kwargs)
        except BaseException as error:
            self.failed = error
            raise
        finally:
            active.handler.reset(token)
        try:
            if mark is not None and any(tensor.requires_grad for tensor in tensors_on(self.driver.device, result)):
                raise CaptureError(
                    f"the result of {name} needs gradients, which do not pass a break",
                    where=reason.source,
                    fix="capture under torch.no_grad(), or compile with torch.compile, where they pass",
                )
            known = {key for key, (ref, _) in self.made.items() if _torch.live_storage(ref) is not None}
            known |= {*self.held, *self.parameters}
            known |= set(map(_torch.storage_key, tensors_on(self.driver.device, (args, kwargs))))
            parts = Parts.of(
                result, known, self.driver.device, name, reason.source, mark is not None and mark.host_only
            )
            returned = self._note(function, name, reason, args, kwargs, parts, result)
            self._begin()
        except BaseException as error:
            self.failed = error
            raise
        return returned

    def _note(
        self,
        function: Callable[..., Any],
        name: str,
        reason: Reason,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parts: Parts,
        result: Any,
    ) -> Any:
        """Write the eager step down; returns the result as captured code may use it: on bridges."""
        base = re.sub(r"\W+", "_", re.split(r"::|\.", name)[-1]).strip("_") + f"_{len(self.steps)}"
        calls: list[Call] = []
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        slots = [self._argument(leaf, f"{base}_argument_{number}", calls) for number, leaf in enumerate(leaves)]
        given: tuple[Any, ...] = pytree.tree_unflatten(slots, spec)
        if _is_plain((args, dict(kwargs))):
            calls.append(Call(base, function, tuple(given[0]), given[1], name, reason.source, ambient=_ambient()))
        else:
            packed = _Packed(function, spec)
            calls.append(Call(base, packed, tuple(slots), {}, name, reason.source, ambient=_ambient()))
        fresh = parts.fresh(result)
        if not parts.is_trivial:
            calls.append(Call(f"{base}_parts", parts.check, (Slot(base),), {}, "check"))
        bridges, loads = [], []
        for number, source in enumerate(fresh):
            with torch.inference_mode(False):
                bridge = Bridge.like(source, self.driver.device)
            bridge.load(source)
            bridges.append(bridge.tensor)
            self.held[_torch.storage_key(bridge.tensor)] = bridge.tensor.untyped_storage()
            value, place = f"{base}_{number}", f"{base}_bridge_{number}"
            calls.append(Call(value, operator.getitem, (Slot(f"{base}_parts"), number), {}, "part"))
            self.constants[place] = bridge
            loads.append(Copy(Slot(place), Slot(value)))
        self.steps.append(EagerStep(tuple(calls), (reason,)))
        self.loads = tuple(loads)
        return parts.on(result, bridges)

    def _argument(self, leaf: Any, name: str, calls: list[Call]) -> Any:
        """What stands for an argument in the recorded call: parameters and modules weakly, all else as it is."""
        if leaf is None or type(leaf) in (int, float, bool, str):
            return leaf
        if isinstance(leaf, nn.Module | nn.Parameter):
            calls.append(Call(name, _Alive(weakref.ref(leaf), type(leaf).__name__), (), {}, "alive"))
        else:
            tensor = isinstance(leaf, torch.Tensor)
            self.constants[name] = leaf.detach() if tensor and leaf.requires_grad else leaf
        return Slot(name)


def _checked_once(captured: _Captured) -> Replay:
    """The graph's replay. The first call looks whether all that it reads is in its place."""
    replay = captured.replay

    def first(args: list[Any], stream: int) -> list[Any]:
        captured.check()
        captured.replay = replay
        return replay.function(args, stream)

    return replace(replay, function=first)


def _compared(captured: _Captured, checker: Checker) -> Replay:
    """The graph's replay, with each step compared."""
    compared = checker.around(captured.replay.function)

    def checked(args: list[Any], stream: int) -> list[Any]:
        captured.check()
        return compared(args, stream)

    return replace(captured.replay, function=checked)


@dataclass(frozen=True)
class _Packed:
    """Calls a function with arguments in containers that source text does not spell."""

    function: Callable[..., Any]
    spec: Any

    def __call__(self, *leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class _Alive:
    """An argument that the graph does not own."""

    ref: weakref.ref[Any]
    kind: str

    def __call__(self) -> Any:
        value = self.ref()
        if value is None:
            raise ReplayError(f"a {self.kind} that an eager function takes is gone", fix="keep the model alive")
        return value


def _is_plain(tree: Any) -> bool:
    if type(tree) in (tuple, list):
        return all(map(_is_plain, tree))
    if type(tree) is dict:
        return all(type(key) in (str, int) and _is_plain(value) for key, value in tree.items())
    return bool(pytree.tree_structure(tree).is_leaf())


def _ambient() -> Ambient | None:
    """Autocast and grad mode here, where they are not what a replay runs in."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    )
    grad = torch.is_grad_enabled()
    return Ambient(autocast, grad) if autocast or grad else None


_NOT_THE_USERS = tuple(
    os.path.join(os.path.dirname(path), "") for path in (torch.__file__, _torch.__file__, linecache.__file__)
)


def user_line(trace: TracebackType | None = None) -> str:
    """The innermost line that is the user's, as ``file.py:12 in forward: code``; of an error's traceback, or from here."""
    frames = list(_frames(trace))
    for file, line, function in frames:
        if not file.startswith((*_NOT_THE_USERS, "<")):
            text = linecache.getline(file, line).strip()
            return f"{os.path.basename(file)}:{line} in {function}" + (f": {text}" if text else "")
    return ""


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    if trace is not None:
        found = []
        step: TracebackType | None = trace
        while step is not None:
            found.append((step.tb_frame.f_code.co_filename, step.tb_lineno, step.tb_frame.f_code.co_name))
            step = step.tb_next
        yield from reversed(found)
        return
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def _says(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
