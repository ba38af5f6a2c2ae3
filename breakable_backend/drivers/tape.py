"""The tape: what a capture would do, on any device. It runs ATen ops, tapes and undoes them; a replay runs the tape.

A real capture runs no kernel: it notes launches and addresses. The tape driver has to run the ops, since the code that
it captures is Python that may look at shapes. So it undoes everything afterwards: written storages, the random state,
and the values of what was made inside, which become poison. A stale address, a missing replay or a host read therefore
fails here as it does on a GPU.

Memory that was lent, and that nobody holds any more, is overwritten by each segment that was captured later: any of
them may have got it. Memory that is still held is overwritten by each segment that was captured earlier: it may have
been free memory of that segment. The tape has no streams, and no kernels that allocate.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from breakable_backend import _torch, active
from breakable_backend.drivers import CapturedGraph, Pairs
from breakable_backend.drivers.collector import held_off
from breakable_backend.drivers.device import OpByOpDriver, OpByOpGraph, capture_body
from breakable_backend.drivers.graph_copies import Fed, LetOut, can_be_fed
from breakable_backend.errors import CaptureError, ReplayError, first_line, user_line
from breakable_backend.failure_kinds import as_passing
from breakable_backend.interception import intercepted_by
from breakable_backend.ir.effects import ALLOCATING, is_asynchronous, tensors_of, written_values
from breakable_backend.ir.layout import Geometry, non_owning
from breakable_backend.ir.running_ops import (
    OpMode,
    Ran,
    RandomStates,
    Undo,
    generators_of,
    has_memory,
    kernel_of_ops,
    memory_on,
)
from breakable_backend.marks.rules import INDEXING, MOVES_STORAGE, is_mask

T = TypeVar("T")
aten = torch.ops.aten

HOST_READ = "reads values on the host"
DATA_SHAPE = "makes a shape that depends on values"
SYNC = "waits for the device"
MOVES = "gives other memory to a tensor from outside"
FIX = "let it run eagerly: eager_region, mark_eager or options={'eager_ops': [...]}"

REFUSED = {
    **dict.fromkeys(_torch.aten("_local_scalar_dense equal allclose"), HOST_READ),
    # _linalg_check_errors: inv, solve and more
    **dict.fromkeys(_torch.aten("_linalg_check_errors _linalg_eigh _linalg_eigvals _linalg_svd linalg_eig"), SYNC),
    **dict.fromkeys(_torch.aten("cholesky _embedding_bag _embedding_bag_forward_only _ctc_loss _cudnn_ctc_loss"), SYNC),
}
"""Ops that a CUDA capture refuses, besides those that are known by their tags."""

HOST_READING_METHODS = "__array__", "__format__", "__reduce_ex__", "__repr__", "cpu", "numpy", "tolist"
"""Methods that copy to the host on a GPU, and that dispatch no copy, or nothing at all, for a CPU tensor."""

COPIES = _torch.aten("_to_copy copy_")

HIGHER_ORDER_OF_OPS = {
    *("auto_functionalized", "auto_functionalized_v2", "with_effects", "out_dtype"),
    *("flex_attention", "flex_attention_backward", "triton_kernel_wrapper_functional"),
}
"""Higher-order ops whose dense kernel only calls other ops, without looking at values."""

_active: active.Scoped[TapeDriver | None] = active.Scoped("breakable_backend.drivers.tape.active", None)


def _why_refused(func: _torch.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], tape: _Tape) -> str | None:
    name = _torch.schema_name(func)
    if name in REFUSED:
        return REFUSED[name]
    if name in INDEXING:
        # An index by integers has a static shape, whatever its tag says.
        masks = any(is_mask(index) for index in args[1] if index is not None)
        return DATA_SHAPE if masks else None
    if torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
        return DATA_SHAPE
    if name in MOVES_STORAGE and _torch.storage_key(args[0]) not in tape.made:
        return MOVES
    generator = kwargs.get("generator")
    if generator is None or generator.device.type != tape.device.type:
        return None
    own = _torch.same_generator(generator, tape.generator)
    return None if own else "draws from a generator that is not the device's default one"


@dataclass(frozen=True, slots=True)
class _Op:
    """One taped call. Its tensors alias the recorded addresses, with the geometry that they had in the call."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fresh: tuple[tuple[int, torch.UntypedStorage], ...]
    """Which leaves of the result are new memory, each with the storage where later readers expect its bytes."""
    grad_enabled: bool
    """The grad mode of the call, which some kernels read."""

    def run(self) -> None:
        with torch.set_grad_enabled(self.grad_enabled):
            leaves = _torch.pytree.tree_leaves(self.func(*self.args, **self.kwargs))
        for i, storage in self.fresh:
            result = leaves[i].untyped_storage()
            if result.nbytes() != storage.nbytes():
                raise ReplayError(
                    f"{self.func} made {result.nbytes()} bytes where it made {storage.nbytes()} when it was captured",
                    fix=FIX,
                )
            storage.copy_(result)


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A collective together with its wait, since a tape copies the result of an op."""

    func: _torch.OpOverload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.func(*args, **kwargs)
        return _torch.pytree.tree_map_only(torch.Tensor, _torch.wait_tensor(), result)

    def __str__(self) -> str:
        return str(self.func)


@dataclass(frozen=True, slots=True)
class _Outside:
    """Memory that a tape reads or writes and does not own."""

    ref: _torch.StorageWeakRef
    address: int
    num_bytes: int
    label: str

    def check(self, brought: Mapping[int, int]) -> None:
        """Raise if a CUDA graph would read freed memory, unless an argument lies there now."""
        storage = _torch.live_storage(self.ref)
        if brought.get(self.address, -1) >= self.num_bytes:
            return
        if storage is None or storage.data_ptr() != self.address:
            fate = "freed" if storage is None else "moved"
            raise ReplayError(
                f"{self.label} was {fate} after the capture, but the graph reads it at its address",
                fix="keep what goes into a captured graph alive, and write new values into it in place",
            )


@dataclass(frozen=True, slots=True)
class _Lent:
    """Pool memory that somebody holds through another storage, a twin, as long as it is needed."""

    twin: _torch.StorageWeakRef
    memory: _torch.StorageWeakRef
    dtype: torch.dtype
    pool: object
    made_by: float
    """The number of the graph in which, or after which, it was made."""

    @property
    def is_held(self) -> bool:
        return _torch.live_storage(self.twin) is not None

    def spoil(self) -> None:
        """Overwrite it, as its next owner does."""
        if (memory := _torch.live_storage(self.memory)) is not None:
            _poison(memory, self.dtype)


class TapeGraph(OpByOpGraph):
    """One captured segment as a tape of ATen calls.

    It owns the storages that were made inside, until it is released or dies. It does not own other storages.
    :meth:`replay` works on the addresses of the capture: it sees values that the caller has written there, but not a
    tensor that got other memory since (``param.data = ...``).

    Args:
        tape: the ops, and the memory that they made and used.
        draws_random: whether a replay advances the generator.
        brought: memory of the current call's arguments: addresses and bytes.
        free: memory that was free in the pool when this was captured, and so may be this graph's too.
        given: pool memory that was allocated for it between captures.
        later: returns held memory that was allocated after this graph, which it may use for itself while it runs.

    Raises:
        ReplayError: from :meth:`replay`, if memory from outside was freed, or the graph was released.
    """

    def __init__(
        self,
        tape: _Tape,
        draws_random: bool,
        brought: Mapping[int, int],
        free: Sequence[_Lent],
        given: Sequence[torch.UntypedStorage],
        later: Callable[[], Sequence[_Lent]],
    ) -> None:
        super().__init__(draws_random, {key: storage for key, (storage, _) in tape.made.items()})
        self._brought, self._free, self._given, self._later = brought, free, given, later
        self._device_type = tape.device.type
        self._ops, self._outside = tape.ops, list(tape.outside.values())
        self.num_kernels = len(self.kernels())

    def kernels(self) -> tuple[str, ...]:
        """The taped ops."""
        return tuple(str(op.func) for op in self._ops if not isinstance(op.func, LetOut))

    def feed(self, fed: Pairs) -> None:
        """Copy values into bridges at the beginning of each replay."""
        self.feeds = tuple(Fed(bridge, value, lambda _: None) for bridge, value in fed)

    def run(self) -> None:
        for memory in self._outside:
            memory.check(self._brought)
        for lent in (*self._free, *self._later()):
            lent.spoil()
        # The tape is below autograd and autocast: modes around a replay must not affect its calls.
        with torch.inference_mode(), torch.autocast(self._device_type, enabled=False):
            for feed in self.feeds:
                feed.copy()
            for op in self._ops:
                op.run()

    def release(self) -> None:
        super().release()
        self._ops, self._outside = [], []
        self._free, self._given, self._later = (), (), tuple


class _Tape:
    """Runs the ops that it gets, and keeps what is needed to undo them and to run them again."""

    def __init__(self, device: torch.device, generator: torch.Generator, lent: Mapping[int, _Lent]) -> None:
        self.device = device
        self.generator = generator
        self.lent = lent
        """What the driver has lent, by the key of the twin."""
        self.ops: list[_Op] = []
        self.made: dict[int, tuple[torch.UntypedStorage, torch.dtype | None]] = {}
        self.outside: dict[int, _Outside] = {}
        self.refusal: CaptureError | None = None
        self._drawn = RandomStates.of((generator,))
        self._undo = Undo()

    def refuse(self, what: str) -> CaptureError:
        """The error to raise. It is kept, since a capture that failed stays failed if the code swallows its error."""
        self.refusal = CaptureError(f"{what}, which no captured graph can do", fix=FIX)
        return self.refusal

    def issue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.refusal is not None:
            raise self.refusal
        # A graph would not run this kernel's Python again, so the ops that it calls belong on the tape.
        kernel = kernel_of_ops(func, args, self.device)
        if kernel is None and isinstance(func, _torch.HigherOrderOperator):
            if func.name() in HIGHER_ORDER_OF_OPS:
                kernel = _torch.dense_kernel(func)
            elif func.name() != "triton_kernel_wrapper_mutation":
                raise self.refuse(f"the higher-order op {func.name()} may choose by values on the host what to run")
        if kernel is None:
            return self._run(func, args, kwargs)
        with OpMode(self.issue):
            return kernel(*args, **kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.lift_fresh.default and args[0].device == self.device:
            # The tensor of a literal dies with the code that wrote it, so its value goes on the tape.
            func, args = aten.clone.default, (args[0].clone(),)
            self.made[_torch.storage_key(args[0])] = (args[0].untyped_storage(), None)
        inputs = tensors_of((args, kwargs))
        self.check_generator()
        on_device = not inputs or any(tensor.device == self.device for tensor in inputs)
        if on_device and isinstance(func, _torch.OpOverload):
            if why := _why_refused(func, args, kwargs, self):
                raise self.refuse(f"{func} {why}")
            self._check_layouts(func, inputs)
        for tensor in memory_on(self.device, written_values(func, args, kwargs)):
            if _torch.storage_key(tensor) not in self.made:
                self._undo.save(tensor)
        # A collective involves other ranks, so the replay alone issues it, once for each call.
        asynchronous = is_asynchronous(func)
        result = _torch.results_like(func, args, kwargs) if asynchronous else func(*args, **kwargs)
        self._drawn = RandomStates.of((self.generator,))
        outputs = tensors_of(result)
        if all(tensor.device != self.device for tensor in (*inputs, *outputs)):
            return result  # arithmetic on the host, which a capture does not affect
        ran = Ran.of(func, args, kwargs, result, self.device, self.made)
        self._check_after(func, [*inputs, *outputs], [*ran.written, *outputs])
        leaves = _torch.pytree.tree_leaves(result)
        self.made |= {key: (leaves[i].untyped_storage(), leaves[i].dtype) for key, i in ran.made.items()}
        if not ran.is_view and _torch.schema_name(func) not in ALLOCATING:
            # Aliases are taken after the call, which may have given an empty ``out=`` tensor its size.
            # A tensor that is passed twice stays one, since kernels ask whether it is: attention of a tensor to itself.
            aliases = {id(tensor): self._alias(func, tensor) for tensor in tensors_of((args, kwargs))}
            args, kwargs = _torch.pytree.tree_map_only(torch.Tensor, lambda t: aliases[id(t)], (args, kwargs))
            new_memory = tuple((i, self.made[key][0]) for key, i in ran.made.items())
            run = _Awaited(func) if asynchronous else func
            self.ops.append(_Op(run, args, kwargs, new_memory, torch.is_grad_enabled()))
        return result

    def check_generator(self) -> None:
        """Refuse a seed or a state that was set under the capture, since a replay would not set it again."""
        if not self._drawn.are_current():
            refused = self.refuse("the body set the state of the random generator")
            refused.passing = "disturbed"  # another thread may have drawn from it instead
            raise refused

    def _check_layouts(self, func: Any, tensors: Sequence[torch.Tensor]) -> None:
        if not all(map(has_memory, tensors)):
            raise self.refuse(f"{func} works on a tensor without strides")

    def _check_after(self, func: Any, tensors: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
        self._check_layouts(func, tensors)
        # A kernel takes a number on the host (a 0-d tensor) by value. A copy between devices does not.
        copies = _torch.schema_name(func) in COPIES
        devices = {tensor.device for tensor in tensors if copies or tensor.dim() > 0}
        devices |= {tensor.device for tensor in targets} | {self.device}
        if len(devices) > 1:
            raise self.refuse(f"{func} moves data between {' and '.join(sorted(map(str, devices)))}")
        if self._undo.any_moved():
            raise self.refuse(f"{func} {MOVES}")

    def let_out(self, value: torch.Tensor, target: torch.Tensor) -> LetOut:
        """Copy ``value`` to ``target`` in each replay, but not now."""
        outlet = LetOut(target)
        self.ops.append(_Op(outlet, (self._alias(outlet, value),), {}, (), grad_enabled=False))
        return outlet

    def _alias(self, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        """What the tape holds for ``tensor``: memory made inside strongly, memory from outside by its address."""
        if tensor.device != self.device:
            return tensor.clone()  # a number on the host, which kernels take by value
        key = _torch.storage_key(tensor)
        if key in self.made:
            return tensor.data
        storage = self._lender(tensor.untyped_storage())
        if key not in self.outside:
            label = f"the {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} tensor that {func} takes"
            self.outside[key] = _Outside(_torch.StorageWeakRef(storage), storage.data_ptr(), storage.nbytes(), label)
        return non_owning(tensor)

    def _lender(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The storage of a graph, if ``storage`` is its twin. The memory lives as long as the graph."""
        lent = self.lent.get(int(storage._cdata))
        memory = _torch.live_storage(lent.memory) if lent is not None else None
        return storage if memory is None else self._lender(memory)

    def undo(self) -> None:
        """Undo the effects of the ops."""
        self.refusal = None  # its traceback holds this tape
        self._undo.restore()
        for storage, dtype in self.made.values():
            if dtype is not None:
                _poison(storage, dtype)


def _poison(storage: torch.UntypedStorage, dtype: torch.dtype) -> None:
    """Fill with NaN, or with a number that is odd and so large that it is no valid index."""
    octets = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    octets.fill_(1 if dtype == torch.bool else 0xFF)
    if dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        octets[dtype.itemsize - 1 :: dtype.itemsize] = 0x7F  # the byte with the sign, on a little-endian machine


def _failure(error: Exception) -> CaptureError:
    """The error of a capture for an exception of its body, with the user's innermost line."""
    where = user_line(error.__traceback__)
    if isinstance(error, CaptureError):
        failed = CaptureError(error.what, where=error.blamed or where, fix=error.fix)
    else:
        failed = CaptureError(f"the captured code raised {first_line(error)}", where=where, fix=FIX)
    return as_passing(failed, error)


class TapeDriver(OpByOpDriver):
    """Captures by running and undoing, and replays by running again, on one device of any type.

    Only the modes of the calling thread see ops, so threads may capture side by side as far as :attr:`lock` allows.

    Raises:
        CaptureError: from :meth:`capture`; see the protocol.
    """

    name = "tape"
    reuses_memory = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._brought: dict[int, int] = {}
        self._lent: dict[int, _Lent] = {}
        """What is lent, by the key of its twin. The weak reference keeps that key from being used again."""
        self._given: list[torch.UntypedStorage] = []
        """Memory that was allocated between captures, for the next graph to own."""
        self._last: weakref.ref[OpByOpGraph] | None = None
        self.pool = object()
        """Identifies the memory of a recording."""
        self._captured = 0
        """How many graphs were captured so far."""
        self._session: TapeSession | None = None
        """The session of the running :meth:`capture`."""

    def begin(self) -> int:
        return 0

    def note_arguments(self, args: Sequence[Any]) -> None:
        storages = [arg.untyped_storage() for arg in args if has_memory(arg)]
        self._brought.update((storage.data_ptr(), storage.nbytes()) for storage in storages)

    def end(self, stream: int) -> None:
        self._brought.clear()

    @contextmanager
    def recording(self, apart: bool = False) -> Iterator[None]:
        before = self.pool
        if apart:
            self.pool = object()
        try:
            with held_off():
                yield
        finally:
            self.pool = before

    def feeds(self, bridge: torch.Tensor, value: torch.Tensor) -> bool:
        return can_be_fed(bridge, value)

    def capture(self, body: Callable[[], T], fed: Pairs = ()) -> tuple[CapturedGraph, T]:
        return capture_body(self, body, fed, _failure)

    @contextmanager
    def session(self) -> Iterator[TapeSession]:
        session = TapeSession(self)
        # Not a function mode: under one, library code takes other branches, and Dynamo compiles everything again.
        with ExitStack() as stack:
            for name in HOST_READING_METHODS:
                stack.enter_context(intercepted_by(session.read, torch.Tensor, name))
            stack.enter_context(OpMode(session.issue))
            yield session

    def let_out(self, value: torch.Tensor, target: torch.Tensor) -> LetOut:
        return self._tape().let_out(value, target)

    def _tape(self) -> _Tape:
        tape = self._session._tape if self._session is not None else None
        assert tape is not None, "no capture is under way"
        return tape

    def progress(self) -> Hashable:
        """How many calls are on the tape."""
        tape = self._tape()
        if tape.refusal is not None:
            raise tape.refusal
        return len(tape.ops)

    def is_capturing(self) -> bool:
        return _active.get() not in (None, self)

    def adopt(self, graph: OpByOpGraph) -> None:
        super().adopt(graph)
        with self._adopting:
            self._last = weakref.ref(graph)
            self._captured += 1

    def lend(self, made: torch.Tensor) -> torch.Tensor:
        """A tensor on a twin storage, which shows when nobody needs the memory any more. The tape still uses the memory."""
        storage = made.untyped_storage()
        if storage.nbytes() == 0:
            return made
        last = self._last() if self._last is not None else None
        made_by: float = self._captured
        if last is None or _torch.storage_key(made) not in last.made:
            self._given.append(storage)
            made_by += 0.5
        twin = _torch.twin_storage(storage)
        refs = _torch.StorageWeakRef(twin), _torch.StorageWeakRef(storage)
        self._lent[int(twin._cdata)] = _Lent(*refs, made.dtype, self.pool, made_by)
        return Geometry.of(made).on(twin)

    def free(self) -> tuple[_Lent, ...]:
        """Memory that was lent and is not held any more."""
        self._lent = {key: lent for key, lent in self._lent.items() if _torch.live_storage(lent.memory) is not None}
        free = (lent for lent in self._lent.values() if not lent.is_held)
        return tuple(lent for lent in free if lent.pool is self.pool)

    def held_behind(self, number: int, pool: object) -> tuple[_Lent, ...]:
        """Held memory of a recording in ``pool`` that was allocated after the graph of that number."""
        lent = tuple(self._lent.values())
        return tuple(some for some in lent if some.made_by > number and some.pool is pool and some.is_held)

    def taken(self) -> tuple[torch.UntypedStorage, ...]:
        """Memory that was allocated between captures, removed from the driver."""
        given, self._given = tuple(self._given), []
        return given


class TapeSession:
    """Captures segment after segment. Its modes stay active between segments, below those that the caller enters there."""

    def __init__(self, driver: TapeDriver) -> None:
        self.driver = driver
        self._generators = generators_of(driver.device)
        self._states = RandomStates()
        self._free: tuple[_Lent, ...] = ()
        self._fed: Pairs = ()
        self._tape: _Tape | None = None
        self._token: active.Held[TapeDriver | None] | None = None

    def begin(self, fed: Pairs = ()) -> None:
        if _active.get() is not None:
            raise CaptureError("a capture was started inside another capture", fix="end the outer one first")
        for bridge, value in fed:  # the code runs for real, and may look at values
            bridge.copy_(value)
        self._fed = fed
        self.driver.lock.acquire()
        self._token = _active.set(self.driver)
        self._states = RandomStates.of(self._generators)
        self._free = self.driver.free()
        self._tape = _Tape(self.driver.device, self._generators[-1], self.driver._lent)
        self.driver._session = self

    def issue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass an op to the tape; between segments, run it as usual."""
        return func(*args, **kwargs) if self._tape is None else self._tape.issue(func, args, kwargs)

    def read(self, method: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse a read on the host that dispatches nothing for a CPU tensor."""
        if self._tape is not None and tensor.device == self.driver.device:
            raise self._tape.refuse(f"Tensor.{method.__name__} {HOST_READ}")
        return method(tensor, *args, **kwargs)

    def end(self) -> CapturedGraph:
        tape = self._ended()
        try:
            tape.check_generator()
            if tape.refusal is not None:
                raise tape.refusal
            drew = not RandomStates(self._states[-1:]).are_current()
            given = self.driver.taken()
            later = functools.partial(self.driver.held_behind, self.driver._captured + 1, self.driver.pool)
            graph = TapeGraph(tape, drew, self.driver._brought, self._free, given, later)
            graph.feed(self._fed)
        except Exception as error:
            raise _failure(error) from error
        finally:
            self._undo(tape)
        self.driver.adopt(graph)
        return graph

    def abandon(self) -> bool:
        tape = self._ended()
        spoilt = tape.refusal is not None
        self._undo(tape)
        return spoilt

    def touch(self) -> None:
        """Nothing to do: there are no streams."""

    def events(self) -> Sequence[torch.cuda.Event]:
        """None: the code in between has waited for real, and so does each replay."""
        return ()

    def _ended(self) -> _Tape:
        """The tape, which gets no more ops."""
        tape, self._tape = self._tape, None
        assert tape is not None, "ended without a beginning"
        return tape

    def _undo(self, tape: _Tape) -> None:
        token, self._token, self.driver._session = self._token, None, None
        assert token is not None
        self._free, self._fed = (), ()
        self.driver.taken()  # nobody reads the memory of a failed capture
        _active.reset(token)
        try:
            tape.undo()
            self._states.restore()
        finally:
            self.driver.lock.release()
