"""Calls of marked functions in compiled code: what they return, told by a run on fake tensors, and their run on real ones."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from breakable_backend import _torch, active, locks
from breakable_backend.errors import BreakableError, EagerOutputError, PartitionError, ReplayError, first_line
from breakable_backend.overlap import known_apart
from breakable_backend.straight import Run, straight
from breakable_backend.structure import (
    Result,
    Structure,
    Unholdable,
    copy_of,
    leaves_of,
    put_together,
    take_result,
)
from breakable_backend.tapes import Tape, reaches_others


@dataclass(frozen=True, eq=False)
class Mark:
    """A marked function, and what its user said of it."""

    function: Callable[..., Any]
    name: str
    """As it stands in reports: the qualified name."""
    source: str
    """Where it is defined, as ``file.py:12 in name: code``."""
    mutates_args: tuple[str, ...] = ()
    fake: Callable[..., Any] | None = None
    host_only: bool = False
    capture_stub: Callable[..., Any] | None = None
    barrier: Callable[[], None] | None = None
    recompute: bool = False
    backward: Callable[..., Any] | None = None
    original: Callable[..., Any] | None = None
    """What was marked, where ``function`` is that with ``recompute`` or ``backward`` around it."""
    sites: dict[int, Site] = field(default_factory=dict, repr=False)
    """The calls of it in graphs that outlive Dynamo's code, such as exported ones. Others live as long as the code."""
    known: weakref.WeakKeyDictionary[Any, dict[Any, dict[Any, Expected]]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    """What they return, by structure of the arguments, and by their layouts; for each compilation. In the next one, modules
    and what the function closes over may be others."""

    @property
    def body(self) -> Callable[..., Any]:
        return self.original or self.function


def run_inline(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Marked functions that ``function`` calls are part of its break."""
    if active.handler.held.get() is None:
        return function(*args, **kwargs)
    token = active.handler.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        active.handler.reset(token)


# --- a call -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a tensor that an op returns looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def without_symbols(self) -> Spec:
        """The same with ``ANY`` for each symbol, which a site outlives."""
        return replace(self, shape=_numbers_of(self.shape), stride=_numbers_of(self.stride))

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor looks so."""
        return (
            tensor.dtype is self.dtype
            and tensor.device == self.device
            and _match(self.shape, tensor.shape)
            and _match(self.stride, tensor.stride())
        )

    def empty(self) -> torch.Tensor:
        """A new tensor that looks so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        shape, stride = (", ".join("?" if size == ANY else str(size) for size in s) for s in (self.shape, self.stride))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}] with stride [{stride}] on {self.device}"


ANY = -1
"""In place of a size that is a symbol."""


def _numbers_of(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(size if type(size) is int else ANY for size in sizes)


def _match(wanted: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return wanted == sizes or (
        len(wanted) == len(sizes) and all(want in (ANY, size) for want, size in zip(wanted, sizes, strict=True))
    )


@dataclass(frozen=True)
class Expected:
    """What a call returns, as the run on fake tensors told."""

    result: Structure = ("plain", None)
    specs: tuple[Spec, ...] = ()
    """Of the roots: the tensors that own the memory of the fresh results."""
    differentiable: tuple[bool, ...] = ()
    num_ints: int = 0


@dataclass(eq=False)
class Site:
    """A call of a marked function in compiled code, which owns it. Graphs know its number."""

    number: int
    mark: Mark
    arguments: Structure
    order: tuple[int, ...]
    num_written: int
    autocast: tuple[tuple[str, torch.dtype], ...]
    grad: bool
    modules: dict[int, weakref.ref[torch.nn.Module]]
    known: dict[Any, Expected]
    """What calls like this one return, by the layouts of the arguments. Sites that differ in nothing share it."""
    expected: Expected = Expected()
    gradients: tuple[tuple[int, torch.dtype, torch.device], ...] = ()
    """Dimensions, dtype and device of the gradients that the backward computes."""
    error: PartitionError | None = None
    overlaps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tensors that are read and lie in the memory of one that is written: which one, and how many elements after it."""

    @property
    def declared(self) -> bool:
        """Whether the run on fake tensors is not the function's own, so that it cannot tell what needs gradients."""
        return self.mark.fake is not None or self.mark.backward is not None

    # on fake tensors

    def fake(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> list[torch.Tensor]:
        """What the op returns, as fake tensors."""
        expected = self.learn(needs, tensors, ints, floats)
        if self.error is not None:
            return [torch.empty(1, dtype=torch.int64, device="cpu")] if needs else []  # autograd wants its handle
        made = [spec.empty() for spec in expected.specs]
        if expected.num_ints:
            made.append(torch.empty(expected.num_ints, dtype=torch.int64, device="cpu"))
        if needs:
            made.append(torch.empty(1, dtype=torch.int64, device="cpu"))
        return made

    def learn(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> Expected:
        """Run the function on fake tensors, unless that was done for these layouts."""
        if needs:
            wanting = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            self.gradients = tuple((tensor.dim(), tensor.dtype, tensor.device) for tensor in wanting)
        key = _layouts(needs, tensors, ints, floats)
        if key is None or key not in self.known:
            try:
                with _torch.ignore_fresh_symbols(tensors), self._ambient():
                    expected = self._ask(needs, tensors, ints, floats)
            except PartitionError as error:
                self.error = error
                return Expected()
            except _torch.dynamo_error():
                raise
            except Exception as error:  # noqa: BLE001 - whatever the function raises on tensors without values
                self.error = self._needs_fake(error)
                return Expected()
            if key is None:
                self.expected = replace(expected, specs=tuple(spec.without_symbols() for spec in expected.specs))
                return expected
            self.known[key] = expected
        self.expected = self.known[key]
        return self.expected

    def _ask(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> Expected:
        given = [tensor.detach() for tensor in tensors]
        modules = {}
        with _torch.above_autograd():
            for tensor, need in zip(given, needs, strict=False):
                tensor.requires_grad_(need)
            for leaf in leaves_of(self.arguments):
                if leaf[0] == "module":
                    modules[leaf[1]] = _twin(
                        self._module(leaf[1]), dict(zip(leaf[2], (given[p] for p in leaf[3]), strict=True))
                    )
            holder = [self._call(self.mark.fake or self.mark.body, given, ints, floats, modules)]
            taken = self._take(holder, given, bool(needs), PartitionError)
        if self.declared:
            differentiable = tuple(root.is_floating_point() or root.is_complex() for root in taken.roots)
        else:
            differentiable = tuple(map(bool, taken.members))
        return Expected(taken.structure, tuple(map(Spec.of, taken.roots)), differentiable, len(taken.ints))

    def look_for_overlaps(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note which tensors share memory with one that is written. A compiler that functionalises parts them later."""
        for written, target in enumerate(tensors[: self.num_written]):
            for place, tensor in enumerate(tensors[self.num_written :], self.num_written):
                apart = tensor.storage_offset() - target.storage_offset()
                together = _torch.storage_key(tensor) == _torch.storage_key(target) and not known_apart(tensor, target)
                if together and type(apart) is int:
                    self.overlaps[place] = written, apart

    # on real ones

    def run(
        self,
        needs: list[bool],
        traced: bool,
        tensors: list[Any],
        ints: list[int],
        floats: list[float],
        *,
        own: bool = False,
    ) -> list[torch.Tensor]:
        """Call the function on real tensors, once.

        Args:
            needs: which tensors need gradients; empty: none, and there will be no backward.
            tensors: all tensors that the call takes, the written ones first.
            ints: its ints.
            floats: its floats.
            traced: whether what runs before and after was compiled: it may use memory again that a tape still reads.
            own: whether the caller sees to autocast and grad mode, and passes modules' own tensors: a replay does.

        Raises:
            EagerOutputError: the result is not what the run on fake tensors said.
        """
        if own and not needs:
            modules = {address: self._module(address) for address in self.modules}
            given, holder = tensors, [self._call(self._function, tensors, ints, floats, modules)]
            taken = self._take(holder, given, False, EagerOutputError)
        else:
            with (
                self._ambient(),
                self._modules(needs, traced, tensors, own) as (given, modules),
                _torch.above_autograd(),
            ):
                holder = [self._call(self._function, given, ints, floats, modules)]
                taken = self._take(holder, given, bool(needs), EagerOutputError)
        made = self._made(taken, traced)
        if needs:
            leaves = [tensor for tensor, need in zip(given, needs, strict=True) if need]
            made = [*made, Tape.handle(leaves, taken.members)]
        return made

    def straight(self) -> Run:
        """:meth:`run` as a replay calls it, by a short way where there is one."""
        run = functools.partial(self.run, own=True)

        def take(holder: list[Any], tensors: list[Any]) -> list[Any]:
            return self._made(self._take(holder, tensors, False, EagerOutputError), False)

        layouts = [(spec.shape, spec.stride, spec.dtype, spec.device) for spec in self.expected.specs]
        capture = active.handler.held.get
        return straight(self.mark.function, self.arguments, self.expected.result, layouts, capture, run, take)

    def _made(self, taken: Result, traced: bool) -> list[torch.Tensor]:
        """What the op returns of a result: its roots, and behind them its ints."""
        self._check(taken)
        made = [copy_of(root) for root in taken.roots] if traced else taken.roots
        if taken.ints:
            made = [*made, torch.tensor(taken.ints, dtype=torch.int64, device="cpu")]
        return made

    def _check(self, taken: Result) -> None:
        if taken.structure != self.expected.result:
            raise self._mismatch(f"put together as {taken.structure}", str(self.expected.result))
        for root, want in zip(taken.roots, self.expected.specs, strict=True):
            if not want.fits(root):
                raise self._mismatch(str(Spec.of(root)), str(want))

    def _function(self, *args: Any, **kwargs: Any) -> Any:
        return run_inline(self.mark.function, *args, **kwargs)

    def _module(self, address: int) -> torch.nn.Module:
        module = self.modules[address]()
        assert module is not None, "Dynamo guards on the module"
        return module

    @contextmanager
    def _modules(
        self, needs: list[bool], traced: bool, tensors: list[Any], own: bool
    ) -> Iterator[tuple[list[Any], dict[int, Any]]]:
        """The tensors and modules to call the function with."""
        given = list(tensors)
        for place, (written, apart) in self.overlaps.items():
            tensor, target = given[place], given[written]
            if _torch.storage_key(tensor) != _torch.storage_key(target) and tensor.dtype is target.dtype:
                try:
                    given[place] = target.as_strided(tensor.shape, tensor.stride(), target.storage_offset() + apart)
                except RuntimeError:
                    raise ReplayError(
                        f"{self.mark.name} reads memory around a tensor that it writes, which the backend has copied without that",
                        where=self.mark.source,
                        fix="pass the whole tensor, and name it in mutates_args; or make clones of the parts before",
                    ) from None
        tensors = list(given)
        if needs:
            parts = {place for leaf in leaves_of(self.arguments) if leaf[0] == "module" for place in leaf[3]}
            for place, (tensor, need) in enumerate(zip(tensors, needs, strict=True)):
                copied = traced and place >= self.num_written and place not in parts and place not in self.overlaps
                given[place] = (copy_of(tensor) if copied else tensor).detach().requires_grad_(need)
        modules = {address: self._module(address) for address in self.modules}
        with ExitStack() as stack:
            if needs or not own:
                for leaf in leaves_of(self.arguments):
                    if leaf[0] == "module":
                        self._settle(leaf, modules[leaf[1]], tensors, given, bool(needs), stack)
            yield given, modules

    def _settle(
        self, leaf: Structure, module: Any, tensors: list[Any], given: list[Any], recording: bool, stack: ExitStack
    ) -> None:
        """Have a module use the tensors that the op was given: its own, unless a compiler put others in their place."""
        other = {}
        for name, place in zip(leaf[2], leaf[3], strict=True):
            mine = operator.attrgetter(name)(module)
            same = mine.data_ptr() == tensors[place].data_ptr() and mine.shape == tensors[place].shape
            if same and not (recording and _torch.has_hooks(mine)):
                given[place] = mine
            else:
                other[name] = given[place]
        if other:
            stack.enter_context(_swapping)
            stack.enter_context(_torch.swapped(module, other))

    # either

    def _call(self, function: Callable[..., Any], tensors: Any, ints: Any, floats: Any, modules: Any) -> Any:
        places = {"tensor": tensors, "int": ints, "float": floats, "module": modules}

        def leaf(structure: Structure) -> Any:
            kind, place = structure[0], structure[1]
            return place if kind == "plain" else places[kind][place]

        args, kwargs = put_together(self.arguments, leaf)
        return function(*args, **kwargs)

    def _take(
        self, holder: list[Any], arguments: Sequence[torch.Tensor], recording: bool, kind: type[BreakableError]
    ) -> Result:
        try:
            taken = take_result(holder, arguments, recording=recording, exact=not self.declared)
            leaves = [tensor for tensor in arguments if tensor.requires_grad] if recording else []
            if self._loses_gradients(taken, leaves, recording):
                raise Unholdable(
                    "a tensor that needs gradients of what the function closes over, which compiled code cannot give",
                    "pass that tensor or module as an argument, or compute under torch.no_grad()",
                )
        except Unholdable as error:
            raise self._failure(error.what, error.fix, kind) from None
        return taken

    def _loses_gradients(self, taken: Result, leaves: list[torch.Tensor], recording: bool) -> bool:
        """Whether a result needs gradients of what is no argument; a run on fake tensors would have failed on that."""
        if recording:
            return self.mark.fake is not None and reaches_others(taken.members, leaves)
        return self.grad and any(root.requires_grad for root in taken.roots)

    @contextmanager
    def _ambient(self) -> Iterator[None]:
        token = active.autocast.set(tuple(device for device, _ in self.autocast))
        try:
            with ExitStack() as stack:
                for device, dtype in self.autocast:
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                stack.enter_context(torch.set_grad_enabled(self.grad))
                yield
        finally:
            active.autocast.reset(token)

    # errors

    def _needs_fake(self, error: Exception) -> PartitionError:
        try:
            signature = str(inspect.signature(self.mark.body))
        except ValueError:  # a builtin
            signature = "(...)"
        failed = PartitionError(
            f"{self.mark.name} cannot run on fake tensors, which tell the shapes of its result: {first_line(error)}",
            where=self.mark.source,
            fix=f"give the shapes: @eager_on_graph(fake=shapes), def shapes{signature}: return torch.empty_like(...)",
        )
        failed.__cause__ = error
        return failed

    def _mismatch(self, got: str, wanted: str) -> BreakableError:
        fix = "return the same structure and plain values at each call, and the layouts that fake= tells"
        return self._failure(f"{got}, but was compiled for {wanted}", fix, EagerOutputError)

    def _failure(self, what: str, fix: str, kind: type[BreakableError]) -> BreakableError:
        return kind(f"{self.mark.name} returned {what}", where=self.mark.source, fix=fix)


_swapping = locks.lock()
"""Held while a module has tensors that are not its own."""


def _twin(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A copy of a module, its submodules included, with other parameters and buffers; what it holds besides is shared."""
    twins: dict[int, torch.nn.Module] = {}

    def copied(original: torch.nn.Module) -> torch.nn.Module:
        if id(original) not in twins:
            kind = type(original)
            made = twins[id(original)] = kind.__new__(kind)  # __getstate__, as copy.copy has it, may leave things out
            made.__dict__.update(original.__dict__)
            for name in ("_parameters", "_buffers"):
                made.__dict__[name] = {
                    key: other.get(id(value), value) for key, value in original.__dict__[name].items()
                }
            made.__dict__["_modules"] = {
                name: child and copied(child) for name, child in original.__dict__["_modules"].items()
            }
        return twins[id(original)]

    other = {id(operator.attrgetter(name)(module)): tensor for name, tensor in tensors.items()}
    return copied(module)


def _layouts(needs: Sequence[bool], tensors: Sequence[torch.Tensor], ints: Sequence[Any], floats: Sequence[Any]) -> Any:
    """What results are looked up by; None where a size or number is symbolic."""
    specs = tuple(map(Spec.of, tensors))
    numbers = [*ints, *floats, *(size for spec in specs for size in (*spec.shape, *spec.stride))]
    if not all(type(number) in (int, float) for number in numbers):
        return None
    return (tuple(needs), specs, *ints, *(value.hex() for value in floats))  # -0.0 is not 0.0


numbers = itertools.count(int.from_bytes(os.urandom(4), "little") << 24)
"""No number comes again in another process, so that code which Inductor keeps on disk is never found for another site."""


class _Sites(weakref.WeakValueDictionary[int, Site]):
    def __getitem__(self, number: int) -> Site:
        try:
            return super().__getitem__(number)
        except KeyError:
            raise ReplayError(
                "code has a call of a marked function that this process does not know: it has the number of the call, and not "
                "the function",
                fix="an exported program that was saved cannot hold marked functions: export in the process that runs it",
            ) from None


sites: weakref.WeakValueDictionary[int, Site] = _Sites()
"""Sites by their number, which is what a graph can hold."""
