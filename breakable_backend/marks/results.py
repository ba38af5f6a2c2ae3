"""Results of marked functions in compiled code, taken apart (flattened): aliases told from fresh memory.

A result is put together again from constants, which Dynamo traces, and from one root for each fresh storage.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import Geometry, Strided, TensorSpec, strided
from breakable_backend.ir.overlap import Region
from breakable_backend.ir.running_ops import has_memory, is_view_to_autograd, no_strided_memory
from breakable_backend.marks.saved_for_backward import Member
from breakable_backend.marks.structure import (
    CONSTANTS,
    Structure,
    foreign,
    instances_in,
    leaves_of,
    reach,
    remembers_code,
    taken_apart,
    view_leaf,
    with_leaves,
)


def fresh_groups(tensors: Iterable[tuple[int, torch.Tensor]], known: Collection[int]) -> list[list[int]]:
    """The positions of tensors, grouped by storage, without those in storages with ``known`` keys."""
    groups: dict[int, list[int]] = {}
    for position, tensor in tensors:
        if (key := _torch.storage_key(tensor)) not in known:
            groups.setdefault(key, []).append(position)
    return list(groups.values())


def in_memory_of(arguments: Sequence[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """A result in the storage of the argument in whose memory it lies. NumPy and DLPack make a storage of their own.

    Raises:
        Unholdable: it lies around the memory of an argument.
    """
    if _torch.is_traced(tensor) or tensor.untyped_storage().resizable():
        return tensor
    around = [other for other in arguments if has_memory(other) and other.device == tensor.device]
    around = [other for other in around if Region.of(other).may_share(Region.of(tensor))]
    if not around or any(_torch.storage_key(other) == _torch.storage_key(tensor) for other in around):
        return tensor
    storage, mine = around[0].untyped_storage(), Geometry.of(tensor)
    offset, rest = divmod(tensor.data_ptr() - storage.data_ptr(), tensor.itemsize)
    if rest or offset < 0 or (offset + reach(strided(tensor))) * tensor.itemsize > storage.nbytes():
        raise Unholdable("memory around that of an argument", "return a view of the argument, or a clone")
    return replace(mine, offset=offset).on(storage)


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
    refused = instances_in(result, (torch.nn.Module, *CONSTANTS))
    if other := foreign(result) or next((type(value).__name__ for value in refused), ""):
        raise Unholdable(f"an object that compiled code cannot hold: {other}", _CONTAINERS)
    structure, tensors, ints, floats = taken_apart(result)
    if remembers_code(structure):
        raise Unholdable("a container that holds a function or a class, such as a defaultdict", _CONTAINERS)
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
    # References to the tensors are counted below, so no name may be bound to one here.
    if what := next(filter(None, map(_why_not_held, tensors)), ""):
        raise Unholdable(
            f"{what}, which compiled code cannot hold", "return its parts (indices, values) as dense tensors"
        )
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


def _why_not_held(tensor: torch.Tensor) -> str:
    return "a tensor on the device meta" if tensor.is_meta else no_strided_memory(tensor)


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
        self.tensors = [in_memory_of(self.arguments, tensor) for tensor in self.tensors]
        given = {_torch.storage_key(argument): type(argument) for argument in self.arguments}
        for tensor in self.tensors:
            kind = type(tensor)
            plain = kind in (torch.Tensor, torch.nn.Parameter) or _torch.is_traced(tensor)
            if not plain and given.get(_torch.storage_key(tensor)) is not kind:
                raise Unholdable(f"a tensor of the class {kind.__name__}", "return a plain tensor")
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
        if (
            self.recording
            and _torch.num_watching(tensor)
            and not any(tensor is argument for argument in self.arguments)
        ):
            raise Unholdable("a view of an argument with a hook, or with its gradient retained", "return a clone")
        mine = Geometry.of(tensor)
        key = _torch.storage_key(tensor)
        bases = [(number, base) for number, base in enumerate(self.arguments) if _torch.storage_key(base) == key]
        # Of arguments in one memory the one that the function has returned: in another call they may lie apart.
        bases.sort(key=lambda place: place[1] is not tensor)
        leaves = []
        for number, base in bases:
            lies, detached = Geometry.of(base), base.requires_grad and not tensor.requires_grad
            if lies.in_memory == mine.in_memory:
                return ("argument", number, detached)
            if lies.read_as == mine.read_as:
                leaves.append(view_leaf("argument", number, strided(base), strided(tensor), detached))
        if Geometry.of(bases[0][1]).read_as != mine.read_as:
            raise Unholdable("a view of an argument with another dtype", "make that view outside, or return a clone")
        # Prefer an argument that contains it: in another call the arguments may lie apart.
        return next((leaf for leaf in leaves if leaf[4] is not None), leaves[0])

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
            root = TensorSpec.of(root).empty() if _torch.is_traced(root) else copy_of(root)
        elif self.copies and (copied or _is_kept(tensors, self.references, self.recording)):
            root = copy_of(root)
        self.roots.append(root)
        self.members.append(members)
        for place, tensor in zip(group, tensors, strict=True):
            detached = self.exact and bool(wanting) and not tensor.requires_grad
            view = None if where is None else view_leaf("root", number, where, strided(tensor), detached)
            self.places[place] = view or ("tensor", number, detached)


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
    if _torch.is_traced(group[0]):
        return False
    if not group[0].untyped_storage().resizable():  # memory of NumPy, or from DLPack: nobody counts who holds it
        return True
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
