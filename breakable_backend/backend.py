"""The backend, ``torch.compile(model, backend="breakable_cg")``: from Dynamo's graph to an executor.

A graph of Dynamo's is lowered to ATen ops, cut into segments, and given to an executor, which records and replays it.
Section 5 of ``docs/design.md`` says in which order to read the code.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch, locks
from breakable_backend.callers import Callers
from breakable_backend.calling import registry
from breakable_backend.calling.compiled_graph import log as executor_log
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.registry import EagerGraph, executors_of
from breakable_backend.calling.release import when_idle
from breakable_backend.calling.slots import ForwardExecutor
from breakable_backend.calling.training import Training
from breakable_backend.calling.training_by_size import BySize
from breakable_backend.compiling.flat_inputs import FlatGraph, PlainGraph
from breakable_backend.compiling.halves import Halves
from breakable_backend.compiling.lowering import NEEDS_GRADIENTS, CannotLower, Lowered, lower
from breakable_backend.compiling.regions import require_whole_regions
from breakable_backend.compiling.scope import scope_for
from breakable_backend.compiling.traced import as_eager, with_signs
from breakable_backend.drivers import CaptureDriver
from breakable_backend.drivers.cuda import CudaDriver, require_cuda
from breakable_backend.drivers.eager import EagerDriver
from breakable_backend.drivers.multi_device import DeviceGroup
from breakable_backend.drivers.process_groups import is_collective, leaves_with_groups
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.errors import OptionsError, PartitionError, warn_user
from breakable_backend.internal_errors import internal
from breakable_backend.ir.effects import schema_name, values_of
from breakable_backend.ir.source_lines import short_line, source_line
from breakable_backend.marks import changes
from breakable_backend.marks.call_ops import forget_shapes
from breakable_backend.marks.marking import EagerOps
from breakable_backend.marks.rules import Scope
from breakable_backend.options import Options
from breakable_backend.recordings.observer import Observers, Subject, observers_of

log = logging.getLogger(__name__)

_DRIVERS: Mapping[str, Callable[[torch.device], CaptureDriver]] = {
    "cuda": CudaDriver,
    "tape": TapeDriver,
    "eager": EagerDriver,
}

MODES = (None, "default", "reduce-overhead")
"""Modes of ``torch.compile`` that ask for nothing beyond what this backend does. The ``CompileConfig`` of transformers
passes ``"reduce-overhead"`` if its user passes none."""


class Backend:
    """What ``torch.compile`` calls, once for each graph that Dynamo makes.

    It owns one driver for each device, and so one memory pool for each.
    """

    __name__ = "breakable_cg"

    def __init__(self) -> None:
        self._drivers: dict[tuple[str, torch.device], CaptureDriver] = {}
        self._numbers = itertools.count()
        self._lock = locks.lock()
        self._warned: set[str] = set()

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph of Dynamo's. Users call ``torch.compile(..., backend="breakable_cg")``, which calls this.

        >>> compiled = torch.compile(lambda x: (x.sin() + 1).cos(), backend="breakable_cg", options={"driver": "tape"})
        >>> compiled(torch.zeros(2))
        tensor([0.5403, 0.5403])

        Args:
            gm: the graph.
            example_inputs: its arguments, as fake tensors and symbolic numbers.
            options: the options of ``torch.compile``, as in :class:`breakable_backend.options.Options`.
            mode: None, ``"default"`` or ``"reduce-overhead"``, which change nothing.

        Returns:
            a function of the graph's arguments.

        Raises:
            OptionsError: an unknown option or mode, or a driver that this machine lacks.
            PartitionError: a node that cannot be captured, with ``auto_break=False``.
            InternalError: a fault of this package.
        """
        try:
            return self._compile(gm, example_inputs, options, mode)
        except (_torch.dynamo_error(), Warning):  # our own errors are among the first, which Dynamo passes on
            raise
        except Exception as error:  # Dynamo would ask for a report to PyTorch
            told = internal(error, log)
            raise told from error

    def _compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None, mode: str | None
    ) -> Callable[..., Any]:
        started = time.perf_counter()
        again = _torch.recompile_reason()
        if mode not in MODES:
            raise OptionsError(
                f"mode={mode!r} is a mode of Inductor's, and this backend compiles no kernels",
                fix="leave mode out; 'default' and 'reduce-overhead' are accepted, and change nothing",
            )
        chosen = Options.parse(options)
        if chosen.driver == "cuda":  # not only where something is captured
            require_cuda()
        changes.heed(gm)
        eager_ops = EagerOps.resolve(chosen.eager_ops)
        number = next(self._numbers)
        name = f"graph {number}"

        observers = observers_of(Subject(name, chosen, executor_log))
        _torch.note_names(gm)
        observers.traced(gm, "dynamo")
        if again:
            log.info("%s: compiled again, because Dynamo says: %s", name, again)

        def make(
            kind: Callable[..., Executor], lowered: Lowered, name: str, *others: Any, observers: Observers | None = None
        ) -> Executor:
            observers = observers or observers_of(Subject(name, chosen, executor_log))
            forget_shapes(lowered.module)
            observers.traced(lowered.module, "aten")
            driver = self._driver(chosen, lowered, several=kind is not ForwardExecutor and chosen.scalars == "key")
            bare = Scope(driver.device, eager_ops, driver.devices[1:])
            require_whole_regions(lowered.module, bare)
            scope = scope_for(lowered, bare, chosen)
            made: Executor = kind(*(others or (lowered,)), scope, chosen, driver, name, observers)
            made.statistics.lowering_seconds = time.perf_counter() - started
            registry.executors.add(made, number)
            if any(is_collective(schema_name(node)) for node in lowered.module.graph.nodes):
                leaves_with_groups(made)
            return made

        def compile_lowered(lowered: Lowered) -> Executor:
            return make(Executor, lowered, name, observers=observers)

        flat = FlatGraph.of(gm, example_inputs)
        try:
            keep_floats = chosen.scalars == "key"
            function = lower(flat.module, flat.inputs, compile_lowered, eager_ops, keep_floats=keep_floats)
            return flat.around(with_signs(function, flat.module))
        except CannotLower as why:
            refused, source = str(why), why.source
        if refused == NEEDS_GRADIENTS and chosen.training and flat.stolen is None:
            try:
                plain = PlainGraph.of(gm, example_inputs)
                return plain.around(self._training(Halves.of(plain.module, eager_ops), make, number, chosen.auto_break))
            except CannotLower as why:
                refused, source = str(why), why.source
        return flat.around(self._eagerly(number, flat.module, refused, source or _last_line(gm), chosen))

    def _training(
        self, halves: Halves, make: Callable[..., Executor], number: int, auto_break: bool
    ) -> Callable[..., Any]:
        name, source = f"graph {number}", _last_line(halves.gm)
        file = functools.partial(registry.as_traced.add, number=number)

        def made(halves: Halves, name: str) -> Training:
            return Training(halves, as_eager(halves.gm), make, name, source, self._warn_once, auto_break)

        training: Training | BySize
        if halves.varying:
            training = BySize(halves, as_eager(halves.gm), made, name, source, file)
        else:
            file(training := made(halves, name))

        def train(*args: Any) -> Any:
            return training(*args)

        train.training = training  # type: ignore[attr-defined]
        return train

    def _eagerly(self, number: int, gm: fx.GraphModule, why: str, source: str, options: Options) -> Callable[..., Any]:
        name = f"graph {number}"
        if why != NEEDS_GRADIENTS and not options.auto_break:
            raise PartitionError(f"{name} cannot be captured: {why}", where=source, fix="let it run: auto_break=True")
        log.info(
            "%s: runs as Dynamo traced it, because %s%s", name, why, f", at {short_line(source)}" if source else ""
        )
        forward = as_eager(gm)

        def eager(*args: Any) -> Any:
            return forward(*args)

        eager.uncaptured, eager.callers = EagerGraph(name, why, source), Callers()  # type: ignore[attr-defined]
        registry.as_traced.add(eager, number)  # type: ignore[arg-type]
        return eager

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        """The same backend: a copy of a compiled module is compiled by the backend of the original."""
        return self

    def __reduce__(self) -> str:
        return "breakable_cg"

    def reset(self) -> None:
        """Free everything that was recorded, and forget everything that was compiled. ``torch._dynamo.reset()`` calls this."""
        for executor in executors_of():
            executor.reset()
            executor.callers.gone = True
        self.free()
        for function in registry.as_traced.behind():
            function.callers.gone = True

    def free(self) -> None:
        """Free memory that was released while the GPU may still have used it; this waits for the GPU."""
        with self._lock:
            drivers = list(self._drivers.values())
        for driver in drivers:
            when_idle(driver, functools.partial(driver.release, ()))

    def _driver(self, options: Options, lowered: Lowered, *, several: bool) -> CaptureDriver:
        """The driver for ``lowered``: for all its GPUs if ``several``, otherwise for the first of them."""
        kind, (device, *others) = options.driver, _capture_devices(lowered)
        debug = options.debug == "eager"
        if kind == "cuda" or (kind == "auto" and device.type == "cuda" and not debug):
            require_cuda()
            kind = "cuda"
            if device.type != "cuda":
                device = torch.device("cuda", torch.cuda.current_device())
        elif kind == "auto":
            kind = "tape"
            if not debug:
                self._warn_once(
                    f"breakable_cg found no CUDA tensor in the graph and uses the tape driver on {device}, which shows "
                    "what would be captured, not how fast. Say options={'driver': 'tape'} to choose that."
                )
        kind = "eager" if debug else kind
        first = self._driver_of(kind, device)
        if not (several and others):
            return first
        return DeviceGroup(first, [self._driver_of(kind, other) for other in others])

    def _driver_of(self, kind: str, device: torch.device) -> CaptureDriver:
        with self._lock:
            if (kind, device) not in self._drivers:
                self._drivers[kind, device] = _DRIVERS[kind](device)
            return self._drivers[kind, device]

    def _warn_once(self, text: str) -> None:
        """Warn once in the life of this backend, at the user's line."""
        if text not in self._warned:
            self._warned.add(text)
            warn_user(text)


def _capture_devices(lowered: Lowered) -> list[torch.device]:
    """The CUDA devices in the graph, in order; otherwise the device of its first tensor, or the CPU."""
    tensors = values_of(*lowered.module.graph.nodes)
    devices = list(dict.fromkeys(tensor.device for tensor in tensors)) or [torch.device("cpu")]
    return [device for device in devices if device.type == "cuda"] or devices[:1]


breakable_cg = Backend()
"""The backend that ``backend="breakable_cg"`` names (entry point group ``torch_dynamo_backends``)."""


def reset(compiled: Any = None) -> None:
    """Free the graphs, bridges and pool memory of ``compiled``, or of all functions of this backend.

    >>> compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options={"driver": "tape"})
    >>> _ = [compiled(torch.zeros(2)) for _ in range(3)]
    >>> reset(compiled)
    >>> compiled(torch.zeros(2))
    tensor([1., 1.])

    Memory is freed at once, after a wait for the GPU; if another thread's call is running, this waits for it, and in a
    call of this thread (from an eager step) it takes effect when that call ends. The function stays compiled: its next
    call is call 1 of its key, which is plain. Results under ``outputs="fresh"`` stay valid; results under
    ``outputs="static"`` must not be used any more.

    Args:
        compiled: what ``torch.compile`` returned, or an object that contains it: a module, a partial. None for all
            functions of this backend.

    Raises:
        OptionsError: an object that cannot be called, and so was not compiled.
    """
    if compiled is not None and not callable(compiled):
        raise OptionsError(
            f"reset takes what torch.compile returned, got {type(compiled).__name__}",
            fix="reset(compiled); a BreakableCUDAGraph has a method for this: graph.reset()",
        )
    if not (compiled is None or _torch.holds_compiled(compiled) or executors_of(compiled)):
        warn_user(
            f"reset freed nothing: nothing in this {type(compiled).__name__} is compiled, or it was not called yet. "
            "Pass what torch.compile returned."
        )
    for executor in executors_of(compiled):
        executor.reset()
    if compiled is None:
        breakable_cg.free()


def _last_line(gm: fx.GraphModule) -> str:
    """The user's last line in a graph."""
    return next(filter(None, map(source_line, reversed(gm.graph.nodes))), "")
