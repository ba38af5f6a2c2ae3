"""The ops that a piece of code runs on a device, in order, with their numbers and their memory; and how to undo them.

Compare mode traces a segment when it is captured, and again when it runs eagerly for comparison. The two traces show
what a capture has frozen. A trace owns no memory, unless it is asked to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.ir.effects import ALLOCATING, draws, written_values
from breakable_backend.ir.layout import Geometry
from breakable_backend.ir.running_ops import OpMode, Ran, Undo, kernel_of_ops, memory_on
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.rules import label
from breakable_backend.recordings.repair import NodeByNode


@dataclass(frozen=True)
class Memory:
    """A storage that an op took, and that is neither an input of the code nor made in it."""

    key: int
    address: int
    written: bool


@dataclass(frozen=True)
class Issued:
    """One op."""

    op: str
    label: str
    """What the user called: the op of the graph, whose Python may have called this one."""
    source: str
    numbers: tuple[str, ...]
    """Arguments that are not tensors, and the values of tensors on the host."""
    outside: tuple[Memory, ...]


@dataclass
class Root:
    """A storage that was made in the code."""

    ref: _torch.StorageWeakRef
    num_bytes: int
    geometry: Geometry
    """The geometry of the tensor that it was made for."""
    made_by: int
    """Position of the op that made it."""
    written_by: int
    """Position of the last op that wrote it."""
    storage: torch.UntypedStorage | None
    """The storage itself, if the trace keeps it."""

    def tensor(self) -> torch.Tensor | None:
        """The tensor that lies there now; None if the storage was freed."""
        storage = self.storage if self.storage is not None else _torch.live_storage(self.ref)
        if storage is None or storage.nbytes() != self.num_bytes:
            return None
        return self.geometry.on(storage)


@dataclass
class Trace:
    """The ops that were issued."""

    ops: list[Issued] = field(default_factory=list)
    roots: list[Root] = field(default_factory=list)
    draws_random: bool = False

    def addresses(self) -> set[int]:
        """The addresses of the storages from outside that it takes."""
        return {memory.address for op in self.ops for memory in op.outside}


@dataclass(frozen=True)
class Change:
    """A difference between two traces."""

    kind: str
    """``"path"``: another op; ``"number"``; ``"memory"``."""
    position: int
    op: Issued
    """The op of the second trace; or of the first, if the second has ended."""
    was: Issued | None


def first_change(before: Trace, now: Trace) -> Change | None:
    """The first op of ``now`` that differs from ``before``."""
    for position, (was, op) in enumerate(zip(before.ops, now.ops, strict=False)):
        if was.op != op.op:
            return Change("path", position, op, was)
        if was.numbers != op.numbers:
            return Change("number", position, op, was)
        if [memory.address for memory in was.outside] != [memory.address for memory in op.outside]:
            return Change("memory", position, op, was)
    if len(before.ops) == len(now.ops):
        return None
    position = min(len(before.ops), len(now.ops))
    longer = now if len(now.ops) > position else before
    return Change("path", position, longer.ops[position], None)


@dataclass
class Escaped:
    """Memory that ops in Python got, or made and did not return, and so may have stored."""

    storages: dict[int, _torch.StorageWeakRef] = field(default_factory=dict)
    """By key. The weak references keep the keys from being used again."""

    def add(self, storage: torch.UntypedStorage) -> None:
        """Note a storage."""
        self.storages.setdefault(int(storage._cdata), _torch.StorageWeakRef(storage))

    def prune(self) -> None:
        """Forget storages that nobody has stored."""
        self.storages = {key: ref for key, ref in self.storages.items() if _torch.live_storage(ref) is not None}


class Watch:
    """Issues ops one by one and notes them. With ``undo``, memory of others that they write is saved first."""

    def __init__(
        self,
        device: torch.device,
        escaped: Escaped,
        inputs: Sequence[Any] = (),
        undo: Undo | None = None,
        like: Trace | None = None,
    ) -> None:
        self.device, self.escaped, self.undo, self.like = device, escaped, undo, like
        self.trace = Trace()
        self.made: dict[int, int] = {}
        """Storages made in the code, by key, with the number of the root."""
        self.inputs = {_torch.storage_key(tensor) for tensor in inputs if isinstance(tensor, torch.Tensor)}
        self.label, self.source = "", ""
        """What the user's code is at."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every op inside the block."""
        with OpMode(self.issue):
            yield

    def issue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op, or the ops that it is made of."""
        kernel = kernel_of_ops(func, args, self.device, watching=True)
        if kernel is None:
            return self._run(func, args, kwargs)
        escapes = isinstance(func, _torch.OpOverload)  # nobody stores what the body of a graph makes
        if escapes:
            for tensor in memory_on(self.device, (args, kwargs)):
                self.escaped.add(tensor.untyped_storage())
        first = len(self.trace.roots)
        with self.watching():
            result = kernel(*args, **kwargs)
        if escapes:
            self._stored(first, result)
        return result

    def _stored(self, first: int, result: Any) -> None:
        returned = {_torch.storage_key(tensor) for tensor in memory_on(self.device, result)}
        for root in self.trace.roots[first:]:
            storage = _torch.live_storage(root.ref)
            if storage is not None and int(storage._cdata) not in returned:
                self.escaped.add(storage)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.undo is not None:
            for tensor in self._others(memory_on(self.device, written_values(func, args, kwargs))):
                self.undo.save(tensor)
        self.trace.draws_random |= draws(func)
        result = func(*args, **kwargs)
        ran = Ran.of(func, args, kwargs, result, self.device, self.made)
        if not ran.is_view:
            self._note(func, (args, kwargs), pytree.tree_leaves(result), ran)
        return result

    def _others(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those of ``tensors`` whose storages were not made in the code."""
        return [tensor for tensor in tensors if _torch.storage_key(tensor) not in self.made]

    def _note(self, func: Any, arguments: Any, leaves: Sequence[Any], ran: Ran) -> None:
        position = len(self.trace.ops)
        for place in ran.made.values():
            self._root(leaves[place], position, _torch.schema_name(func) in ALLOCATING)
        for tensor in ran.written:
            if (number := self.made.get(_torch.storage_key(tensor))) is not None:
                self.trace.roots[number].written_by = position
        outside = self._outside(memory_on(self.device, arguments), ran.written)
        op = Issued(str(func), self.label, self.source, self._numbers(arguments), outside)
        self.trace.ops.append(op)
        if self.undo is not None:
            for tensor in self._others(ran.written):
                self.undo.wrote(tensor, op)

    def _root(self, tensor: torch.Tensor, position: int, empty: bool) -> None:
        storage = tensor.untyped_storage()
        number = self.made[_torch.storage_key(tensor)] = len(self.trace.roots)
        if empty and self.undo is not None:
            self._fill(storage, number)
        self.trace.roots.append(
            Root(
                _torch.StorageWeakRef(storage),
                storage.nbytes(),
                Geometry.of(tensor),
                position,
                position,
                storage if self.undo is not None else None,
            )
        )

    def _fill(self, storage: torch.UntypedStorage, number: int) -> None:
        """New memory that nothing writes has undefined content: give it the content that it has in the recording."""
        roots = self.like.roots if self.like is not None else []
        there = _torch.live_storage(roots[number].ref) if number < len(roots) else None
        if there is not None and there.nbytes() == storage.nbytes():
            storage.copy_(there)
        else:
            storage.fill_(0)  # type: ignore[attr-defined]

    def _outside(self, taken: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> tuple[Memory, ...]:
        ours = self.made.keys() | self.inputs
        wrote = {_torch.storage_key(tensor) for tensor in written}
        storages = {_torch.storage_key(tensor): tensor.untyped_storage().data_ptr() for tensor in taken}
        return tuple(Memory(key, address, key in wrote) for key, address in storages.items() if key not in ours)

    def _numbers(self, arguments: Any) -> tuple[str, ...]:
        numbers = []
        for leaf in pytree.tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                if leaf.device != self.device and leaf.device.type == "cpu" and leaf.numel() == 1:
                    numbers.append(repr(leaf.item()))
            elif not isinstance(leaf, torch.Generator):
                numbers.append(repr(leaf))
        return tuple(numbers)


# --- code that can be watched -------------------------------------------------------------------------------------------


def run_module(body: NodeByNode, inputs: Sequence[Any], watch: Watch) -> tuple[Any, ...]:
    """Run the body of a segment. Each op is noted with the node that issued it."""

    def begin(node: fx.Node) -> None:
        watch.label, watch.source = label(node), source_line(node)

    with watch.watching():
        return body(*inputs, begin=begin)


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor among the arguments of a taped op."""

    geometry: Geometry
    root: int
    """The number of its storage, if the script made it; otherwise -1."""
    address: int = 0
    num_bytes: int = 0

    def tensor(self, storages: Mapping[int, torch.UntypedStorage]) -> torch.Tensor:
        if self.root >= 0:
            return self.geometry.on(storages[self.root])
        return self.geometry.on(_torch.storage_at(self.address, self.num_bytes, self.geometry.spec.device))


@dataclass(frozen=True)
class _Line:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fresh: tuple[tuple[int, int], ...]
    """Leaves of the result that are new memory, with the numbers of their storages."""
    label: str
    source: str
    grad: bool


@dataclass
class Script:
    """Ops that were issued once and can be issued again, on what is at their addresses then.

    Memory from outside is read at its address, and not owned. What the ops made is made anew.
    """

    lines: list[_Line] = field(default_factory=list)
    made: dict[int, tuple[int, _torch.StorageWeakRef]] = field(default_factory=dict)

    def issue(self, watch: Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op under ``watch``, and note it."""
        if func is torch.ops.aten.lift_fresh.default and args[0].device == watch.device:
            with _torch.without_modes():
                constant = args[0].clone()  # the tensor of a literal dies with the line that wrote it
            result, owned = watch.issue(func, args, kwargs), frozenset((_torch.storage_key(constant),))
            self._write(watch, torch.ops.aten.clone.default, (constant,), {}, result, owned)
            return result
        result = watch.issue(func, args, kwargs)
        self._write(watch, func, args, kwargs, result)
        return result

    def _write(
        self, watch: Watch, func: Any, args: Any, kwargs: Any, result: Any, owned: frozenset[int] = frozenset()
    ) -> None:
        fresh = []
        leaves = pytree.tree_leaves(result)
        for key, position in Ran.of(func, args, kwargs, result, watch.device, self.made).made.items():
            self.made[key] = (len(self.made), _torch.StorageWeakRef(leaves[position].untyped_storage()))
            fresh.append((position, self.made[key][0]))
        taken, named = pytree.tree_map_only(
            torch.Tensor, lambda tensor: self._place(watch, tensor, owned), (args, kwargs)
        )
        self.lines.append(_Line(func, taken, named, tuple(fresh), watch.label, watch.source, torch.is_grad_enabled()))

    def _place(self, watch: Watch, tensor: torch.Tensor, owned: frozenset[int]) -> Any:
        if tensor.device != watch.device:
            return tensor.clone()  # a number on the host, which kernels take by value
        key, storage = _torch.storage_key(tensor), tensor.untyped_storage()
        if key in owned:
            return tensor
        root = self.made[key][0] if key in self.made else -1
        return _Place(Geometry.of(tensor), root, storage.data_ptr(), storage.nbytes())

    def run(self, watch: Watch) -> None:
        """Issue all ops again."""
        storages: dict[int, torch.UntypedStorage] = {}
        # The ops were seen below autograd and autocast, so modes around a replay must not affect them.
        with torch.inference_mode(), torch.autocast(watch.device.type, enabled=False):
            for line in self.lines:
                args, kwargs = pytree.tree_map_only(_Place, lambda p: p.tensor(storages), (line.args, line.kwargs))
                watch.label, watch.source = line.label, line.source
                with torch.set_grad_enabled(line.grad), watch.watching():
                    leaves = pytree.tree_leaves(line.func(*args, **kwargs))
                for position, number in line.fresh:
                    storages[number] = leaves[position].untyped_storage()
