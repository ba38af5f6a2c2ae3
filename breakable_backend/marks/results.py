"""Results of marked functions, taken apart (flattened): aliases told from fresh memory, storage by storage.

In compiled code (:func:`take_result`) a result is put together again from constants, which Dynamo traces, and from one
root for each fresh storage. Under ``capture`` (:class:`Parts`) a result may be any object. Each replay checks it, and
copies it to memory with a fixed address.
"""

from __future__ import annotations

import enum
import gc
import itertools
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.errors import CaptureError, EagerOutputError
from breakable_backend.ir.layout import Geometry, Strided, TensorSpec, extent, strided
from breakable_backend.ir.running_ops import is_view_to_autograd
from breakable_backend.marks.saved_for_backward import Member
from breakable_backend.marks.structure import (
    PLAIN,
    Structure,
    fields,
    foreign,
    holds_tensors,
    instances_in,
    leaves_of,
    reach,
    replaced,
    taken_apart,
    view_leaf,
    with_leaves,
)

ALIGNMENT = 256
"""In bytes. Views of one storage that are kept together keep the alignment that the allocator gave them."""


def tensors_on(device: torch.device, tree: Any) -> list[torch.Tensor]:
    """The tensors in ``tree`` that have memory on ``device``."""
    leaves = (leaf for _, leaf in fields(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if leaf.device == device and leaf.layout is torch.strided]


def fresh_groups(tensors: Iterable[tuple[int, torch.Tensor]], known: Collection[int]) -> list[list[int]]:
    """The positions of tensors, grouped by storage, without those in storages with ``known`` keys."""
    groups: dict[int, list[int]] = {}
    for position, tensor in tensors:
        if (key := _torch.storage_key(tensor)) not in known:
            groups.setdefault(key, []).append(position)
    return list(groups.values())


# --- in compiled code -------------------------------------------------------------------------------------------------


class Unholdable(Exception):
    """A part of a result that compiled code cannot hold, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Result:
    """A result, taken apart."""

    structure: Structure
    roots: list[torch.Tensor]
    """For each fresh storage one tensor that owns it. Other tensors in the storage are made again from it."""
    members: list[list[Member]]
    """For each root, the tensors that autograd knows, if it is recording."""
    ints: list[Any]


def take_result(
    holder: list[Any], arguments: Sequence[torch.Tensor], *, recording: bool, exact: bool, copies: bool = True
) -> Result:
    """Take a result apart: tell aliases of arguments from fresh memory, and find one root for each fresh storage.

    Args:
        holder: a list with the result as its only element. Nothing else may hold the result, so that references that
            the function kept can be counted.
        arguments: the tensors that the function was called with.
        recording: whether autograd was recording, so that results know whether they need gradients.
        exact: whether it is noted separately, for each of several results that share memory, which need no gradient.
        copies: whether to copy what the function kept. A caller that only asks for the layout needs no copies.

    Raises:
        Unholdable: a part of the result that compiled code cannot hold.
    """
    result = holder[0]
    # Dynamo's guards on enums fail.
    refused = (*instances_in(result, torch.nn.Module), *instances_in(result, enum.Enum))
    if other := foreign(result) or next((type(value).__name__ for value in refused), ""):
        raise Unholdable(f"an object that compiled code cannot hold: {other}", _CONTAINERS)
    structure, tensors, ints, floats = taken_apart(result)
    kinds = {float: floats, int: ints, str: [leaf[1] for leaf in leaves_of(structure) if leaf[0] == "plain"]}
    for kind, values in kinds.items():
        strange = next((v for v in values if isinstance(v, kind) and type(v) is not kind), None)
        if strange is not None:  # such as numpy.float64, a subclass of float
            raise Unholdable(
                "a number or string of a subclass, which compiled code cannot hold", f"return it as {kind.__name__}"
            )
    if any(type(value) is int and not -(2**63) <= value < 2**63 for value in ints):
        raise Unholdable("an int of more than 64 bits", "return it as a string, or in parts")
    if not all(isinstance(value, float) for value in floats):
        raise Unholdable("a float that depends on values", "return it as a tensor, or as an int if it is whole")
    if any(tensor.layout is not torch.strided for tensor in tensors):
        raise Unholdable("a sparse tensor, which compiled code cannot hold", "return its parts (indices, values)")
    del result
    taker = _Taker(tensors, arguments, _references(tensors), recording, exact, copies)
    taker.take()

    def leaf(structure: Structure) -> Structure:
        if structure[0] == "tensor":
            return taker.places[structure[1]]
        if structure[0] == "int":
            return ("int", structure[1], len(taker.roots))
        if structure[0] == "float":
            value = floats[structure[1]]
            value = math.nan if value != value else value  # so that a NaN equals itself
            return ("plain", value, value.hex())  # so that 0.0 does not equal -0.0
        return structure

    return Result(with_leaves(structure, leaf), taker.roots, taker.members, ints)


@dataclass(eq=False)
class _Taker:
    """Sorts the tensors of a result by their memory."""

    tensors: Sequence[torch.Tensor]
    arguments: Sequence[torch.Tensor]
    references: Mapping[int, int]
    recording: bool
    exact: bool
    copies: bool

    def __post_init__(self) -> None:
        self.places: list[Structure] = [()] * len(self.tensors)
        """The leaf for each tensor."""
        self.roots: list[torch.Tensor] = []
        self.members: list[list[Member]] = []

    def take(self) -> None:
        given = {_torch.storage_key(argument) for argument in self.arguments}
        for group in fresh_groups(enumerate(self.tensors), given):
            self._take_group(group, copied=False)
        for number, tensor in enumerate(self.tensors):
            if _torch.storage_key(tensor) not in given:
                continue
            if self.recording and not is_view_to_autograd(tensor, self.arguments):
                self._take_group([number], copied=True)  # traced code cannot make a view with this gradient
            else:
                self.places[number] = self._alias(tensor)

    def _alias(self, tensor: torch.Tensor) -> Structure:
        """The leaf for a result that lies in the memory of an argument."""
        mine = Geometry.of(tensor)
        key = _torch.storage_key(tensor)
        bases = [(number, base) for number, base in enumerate(self.arguments) if _torch.storage_key(base) == key]
        leaves = []
        for number, base in bases:
            lies, detached = Geometry.of(base), self._is_detached(tensor, base.requires_grad)
            if lies.in_memory == mine.in_memory:
                return ("argument", number, detached)
            if lies.read_as == mine.read_as:
                leaves.append(view_leaf("argument", number, strided(base), strided(tensor), detached))
        if Geometry.of(bases[0][1]).read_as != mine.read_as:
            raise Unholdable("a view of an argument with another dtype", "make that view outside, or return a clone")
        # Prefer an argument that contains it: in another call the arguments may lie apart.
        return next((leaf for leaf in leaves if leaf[4] is not None), leaves[0])

    def _is_detached(self, tensor: torch.Tensor, base_needs: bool) -> bool:
        return self.recording and base_needs and not tensor.requires_grad

    def _take_group(self, group: list[int], copied: bool) -> None:
        """Find a tensor that owns the memory of several results, and how each is made again from it."""
        tensors = [self.tensors[number] for number in group]
        first, number = tensors[0], len(self.roots)
        lies = [Geometry.of(tensor) for tensor in tensors]
        wanting = [tensor for tensor in tensors if self.recording and tensor.requires_grad]
        where: Strided | None = None
        """The geometry of the root, if the results are views of it."""
        if all(other.in_memory == lies[0].in_memory for other in lies[1:]):
            root = first.detach() if self.recording else first
            members: list[Member] = [(tensor, None) for tensor in wanting[:1]]
        else:
            if any(other.read_as != lies[0].read_as for other in lies):
                raise Unholdable("tensors of several dtypes that share memory", "return clones")
            where = _span(tensors)
            root = first.detach().as_strided(*where)
            members = _shares([(tensor, _apart(strided(tensor), where[2])) for tensor in wanting], where[0][0])
        if root.is_conj() or root.is_neg():
            root = root.resolve_conj().resolve_neg()
        elif self.copies and (copied or self._has_other_holders(tensors)):
            root = copy_of(root)
        self.roots.append(root)
        self.members.append(members)
        for place, tensor in zip(group, tensors, strict=True):
            detached = self._is_detached(tensor, self.exact and bool(wanting))
            view = None if where is None else view_leaf("root", number, where, strided(tensor), detached)
            self.places[place] = view or ("tensor", number, detached)

    def _has_other_holders(self, group: Sequence[torch.Tensor]) -> bool:
        return not _torch.is_traced(group[0]) and _is_kept(group, self.references, self.recording)


def _span(tensors: Sequence[torch.Tensor]) -> Strided:
    """The geometry of a flat tensor that contains several tensors."""
    wheres = [strided(tensor) for tensor in tensors]
    start = min(where[2] for where in wheres)
    return (max(where[2] + reach(where) for where in wheres) - start,), (1,), start


def _shares(wanting: list[Member], length: int) -> list[Member]:
    """Which of several results that share memory takes the gradient of which part of it. Each part is taken once."""
    for tensor, where in wanting:
        assert where is not None
        if tensor.numel() == reach(where) == length:
            return [(tensor, where)]
    spans = sorted((where[2], where[2] + reach(where)) for _, where in wanting if where is not None)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise Unholdable("tensors that partly overlap and need gradients", "return clones")
    return wanting


_CONTAINERS = "return tensors and plain values, in lists, tuples, dicts, named tuples, dataclasses or pytree nodes"


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same geometry in new memory. It is not a view, so its owner may change it in place."""
    where = strided(tensor)
    length = reach(where)
    made = torch.empty_strided(where[0], where[1], dtype=tensor.dtype, device=tensor.device)
    made.as_strided((length,), (1,), 0).copy_(tensor.detach().as_strided((length,), (1,), where[2]))
    return made


def _apart(where: Strided, start: int) -> Strided:
    return where[0], where[1], where[2] - start


def _references(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """How often Python refers to each of some tensors, by identity."""
    return {id(tensor): sys.getrefcount(tensor) for tensor in tensors}


_ALONE = _references([torch.empty(0)]).popitem()[1]
"""The count of :func:`_references` for a tensor that only the list holds."""


def _is_kept(group: Sequence[torch.Tensor], references: Mapping[int, int], recording: bool) -> bool:
    """Whether anything besides the result holds its memory: the function, which may write it in a later call.

    A false alarm costs a copy. Autograd holds memory too, so while it records only Python references are counted.
    """
    for tensor in group:
        if references[id(tensor)] > _ALONE + 2 * sum(other is tensor for other in group) - 1:
            return True
    if recording:
        return False
    holders = {id(tensor) for tensor in group}
    bases = [base for base in map(_torch.base_of_view, group) if base is not None and id(base) not in holders]
    distinct = list({id(base): base for base in bases}.values())
    of_bases = _references(distinct)  # counted by one piece of code: Python 3.14 counts no argument that it borrows
    for base in distinct:
        holders.add(id(base))
        if of_bases[id(base)] > _ALONE + 1 + sum(other is base for other in bases):
            return True
    return _torch.owners_of_storage(group[0]) > len(holders)


# --- under ``capture`` ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """What a leaf of the result has to be in a replay."""

    path: str
    spec: TensorSpec | None
    value: Any
    """The value of a plain leaf or of a tensor on the host; for a tensor that is not copied, its address."""
    group: int
    """The index of the fresh storage that the tensor lies in; -1 for a tensor that is not copied."""
    offset: int = 0
    """In bytes, from the first tensor of the group."""
    bits: tuple[bool, bool] = (False, False)
    """Whether a tensor is lazily conjugated, and whether it is lazily negated."""


@dataclass(frozen=True)
class _Span:
    start: int
    """The first byte in the storage, at the capture."""
    size: int
    first: int
    """The position of the leaf from which the others are measured."""


@dataclass(frozen=True)
class Parts:
    """A result at the capture: what a replay has to return again, and what is copied where."""

    name: str
    source: str
    leaves: tuple[_Leaf, ...]
    groups: tuple[tuple[int, ...], ...]
    """For each fresh storage, the positions of the leaves in it."""
    spans: tuple[_Span | None, ...]
    """If several leaves share a storage, the bytes that they lie in; None for a single leaf."""
    host_only: bool = False

    @classmethod
    def of(
        cls,
        result: Any,
        known: Iterable[int],
        device: torch.device,
        name: str,
        source: str,
        host_only: bool,
        apart: bool = False,
    ) -> Parts:
        """Take ``result`` apart. Tensors in storages with ``known`` keys are aliases, and are not copied.

        ``apart``: each tensor is copied by itself, whatever memory it shares.

        Raises:
            CaptureError: a sparse tensor, a tensor subclass that wraps others, or a container of an unknown kind.
        """
        found = list(fields(result))
        for path, leaf in found:
            if why := _why_not_written(leaf):
                raise CaptureError(
                    f"{name}: {f'field {path} of its' if path else 'its'} result is {why}, which cannot be written back",
                    where=source,
                    fix="return dense tensors, in tuples, lists, dicts, dataclasses or attributes of objects",
                )
        tensors = ((position, leaf) for position, (_, leaf) in enumerate(found) if isinstance(leaf, torch.Tensor))
        on_device = [(position, leaf) for position, leaf in tensors if leaf.device == device]
        groups = [[position] for position, _ in on_device] if apart else fresh_groups(on_device, set(known))
        group_of = {position: number for number, group in enumerate(groups) for position in group}
        spans = tuple(_span_of_bytes([found[p][1] for p in group], group) for group in groups)
        leaves = []
        for position, (path, leaf) in enumerate(found):
            if not isinstance(leaf, torch.Tensor):
                leaves.append(_Leaf(path, None, leaf if isinstance(leaf, PLAIN) else type(leaf), -1))
                continue
            group = group_of.get(position, -1)
            value: Any = leaf.data_ptr() if leaf.device == device else leaf.clone()
            span = spans[group] if group >= 0 else None
            offset = _byte_offset(leaf) - span.start if span is not None else 0
            leaves.append(_Leaf(path, TensorSpec.of(leaf), value, group, offset, _torch.lazy_bits(leaf)))
        return cls(name, source, tuple(leaves), tuple(map(tuple, groups)), spans, host_only)

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to check: the function returned None."""
        return len(self.leaves) == 1 and self.leaves[0].spec is None and self.leaves[0].value is None

    @property
    def is_one_tensor(self) -> bool:
        """Whether the result is one fresh tensor, as most are."""
        return len(self.leaves) == len(self.groups) == 1 and not self.leaves[0].path

    def fresh(self, result: Any) -> list[torch.Tensor]:
        """One tensor for each fresh storage: its leaf, or the bytes that several leaves lie in."""
        tensors = [leaf for _, leaf in fields(result)]
        return [
            tensors[group[0]] if span is None else _bytes(tensors[span.first], span, self.leaves[span.first].offset)
            for group, span in zip(self.groups, self.spans, strict=True)
        ]

    def on(self, result: Any, places: Sequence[torch.Tensor]) -> Any:
        """``result`` with its fresh tensors on ``places``, aliases kept."""
        numbers = iter(self.leaves)

        def change(value: Any) -> Any:
            leaf = next(numbers)
            if leaf.group < 0 or not isinstance(value, torch.Tensor):
                return value
            place = places[leaf.group]
            if self.spans[leaf.group] is None:
                return place if type(value) in (torch.Tensor, torch.nn.Parameter) else place.as_subclass(type(value))
            view, offset = torch.empty(0, dtype=value.dtype, device=value.device), leaf.offset // value.element_size()
            view.set_(place.untyped_storage(), offset, value.shape, value.stride())
            return _torch.with_lazy_bits(view, leaf.bits)

        return replaced(result, change)

    def check(self, result: Any) -> tuple[torch.Tensor, ...]:
        """The fresh tensors of a result in a replay.

        Raises:
            EagerOutputError: it cannot take the place of the result at the capture. The text names the field.
        """
        if self.is_one_tensor and self.leaves[0].spec.accepts(result):  # type: ignore[union-attr]
            return (result,)
        found = list(fields(result))
        if [path for path, _ in found] != [leaf.path for leaf in self.leaves]:
            got = ", ".join(path or "the result" for path, _ in found)
            wanted = ", ".join(leaf.path or "the result" for leaf in self.leaves)
            raise self._failure("", f"has the fields {got}", wanted)
        for leaf, (path, value) in zip(self.leaves, found, strict=True):
            self._check_leaf(leaf, path, value)
        for group, span in zip(self.groups, self.spans, strict=True):
            if span is not None:
                self._check_group(group, span, found)
        return tuple(self.fresh(result))

    def _check_leaf(self, leaf: _Leaf, path: str, value: Any) -> None:
        if leaf.spec is None:
            if not (self.host_only or _is_same(value, leaf.value)):
                raise self._failure(path, f"is {value!r}", repr(leaf.value))
            return
        if not leaf.spec.accepts(value):
            got = TensorSpec.of(value) if isinstance(value, torch.Tensor) else type(value).__name__
            raise self._failure(path, f"is {got}", str(leaf.spec))
        if isinstance(leaf.value, torch.Tensor):
            if not (self.host_only or torch.equal(_octets(value), _octets(leaf.value))):
                raise self._failure(path, "has other values on the host", "frozen there")
            return
        if leaf.group < 0 and value.data_ptr() != leaf.value and value.numel():
            raise self._failure(path, "is new memory", "memory that it was given, or that the capture knew")
        is_view = leaf.group < 0 or self.spans[leaf.group] is not None  # other tensors are copied by value
        if is_view and _torch.lazy_bits(value) != leaf.bits:
            raise self._failure(path, "is lazily conjugated or negated otherwise", "as a view of the same memory")

    def _check_group(self, group: tuple[int, ...], span: _Span, found: Sequence[tuple[str, Any]]) -> None:
        base = found[span.first][1]
        for position in group:
            path, value = found[position]
            apart = self.leaves[position].offset - self.leaves[span.first].offset
            is_together = _torch.storage_key(value) == _torch.storage_key(base)
            if not is_together or _byte_offset(value) - _byte_offset(base) != apart:
                raise self._failure(path, "lies elsewhere", f"a view of the same memory as {found[span.first][0]}")

    def _failure(self, path: str, got: str, wanted: str) -> EagerOutputError:
        where = f"field {path} of its result " if path else "its result "
        return EagerOutputError(
            f"{self.name}: {where}{got}, but was {wanted} when it was captured",
            where=self.source,
            fix="return the same structure at each call, or capture again; host_only=True allows other plain values",
        )


def _why_not_written(leaf: Any) -> str:
    """What a leaf is if captured code could use it and no replay would renew it; otherwise empty."""
    if isinstance(leaf, Iterator):
        return f"a {type(leaf).__name__}"
    if not isinstance(leaf, torch.Tensor):
        inside = () if isinstance(leaf, (torch.nn.Module, type, *PLAIN)) else gc.get_referents(leaf)
        holds = any(holds_tensors(item, 1) for item in inside)
        return f"a {type(leaf).__name__} with tensors in it" if holds else ""
    if leaf.layout is not torch.strided:
        return "a sparse tensor"
    if type(leaf).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a tensor of the class {type(leaf).__name__}, which wraps others"
    return ""


def _is_same(value: Any, recorded: Any) -> bool:
    """Whether a plain leaf has not changed. Of other objects only the type is compared."""
    if not isinstance(value, PLAIN):
        return type(value) is recorded
    if isinstance(value, float | complex):
        return type(value) is type(recorded) and repr(value) == repr(recorded)  # NaN equals NaN, and -0.0 is not 0.0
    return type(value) is type(recorded) and bool(value == recorded)


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as bytes. In these a NaN equals itself, and -0.0 is not 0.0."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)


def _byte_offset(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _span_of_bytes(tensors: Sequence[torch.Tensor], positions: Sequence[int]) -> _Span | None:
    """The bytes that several tensors of one storage lie in, measured from the first of them."""
    if len(tensors) == 1:
        return None
    start = min(map(_byte_offset, tensors))
    start -= start % ALIGNMENT
    end = max(_byte_offset(t) + t.element_size() * extent(t) for t in tensors)
    return _Span(start, end - start, positions[0])


def _bytes(first: torch.Tensor, span: _Span, offset: int) -> torch.Tensor:
    """The span in the storage of ``first``, which begins ``offset`` bytes into it."""
    octets = torch.empty(0, dtype=torch.uint8, device=first.device)
    return octets.set_(first.untyped_storage(), _byte_offset(first) - offset, (span.size,), (1,))
