"""How arguments and results are put together from tensors, numbers and plain values.

A structure is a nest of tuples: what kind of container, and its children; or a leaf, which says where its value is.
Dynamo traces most of these functions: containers are gone from what it compiles, and only tensors and numbers are left.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import Geometry, Strided, strided
from breakable_backend.marks.tapes import Member

Structure = tuple[Any, ...]
LEAVES = ("tensor", "argument", "view", "plain", "int", "float", "module")


def children(value: Any) -> list[Any] | None:
    """What a container holds; None for a leaf, and for what no structure can hold."""
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return list(value)
    if type(value) is dict:
        return list(value.values()) if all([isinstance(key, (str, int)) for key in value]) else None  # noqa: C419 - Dynamo traces it
    if _is_data(value):
        return [getattr(value, part.name) for part in dataclasses.fields(value)]
    if type(value) in _torch.PYTREE_NODES:
        return list(_torch.PYTREE_NODES[type(value)].flatten_fn(value)[0])
    return None


def _is_data(value: Any) -> bool:
    """Whether ``value`` is made of a dataclass. Dynamo of torch 2.11 cannot ask that of a dict's subclass, which is none."""
    return not isinstance(value, (dict, type)) and dataclasses.is_dataclass(value)


def foreign(value: Any) -> str:
    """The type of what no structure can hold in ``value``; empty if there is none."""
    if value is None or isinstance(
        value, (torch.Tensor, bool, str, int, float, enum.Enum, torch.SymInt, torch.SymFloat, torch.nn.Module)
    ):
        return ""
    items = children(value)
    if items is None:
        return type(value).__name__
    for item in items:
        inner = foreign(item)
        if inner:
            return inner
    return ""


def modules_in(value: Any) -> Iterator[torch.nn.Module]:
    """The modules in ``value``."""
    if isinstance(value, torch.nn.Module):
        yield value
    elif not isinstance(value, torch.Tensor):
        for item in children(value) or ():
            yield from modules_in(item)


def _enums_in(value: Any) -> Iterator[enum.Enum]:
    if isinstance(value, enum.Enum):
        yield value
    elif not isinstance(value, torch.Tensor):
        for item in children(value) or ():
            yield from _enums_in(item)


def contents(value: Any) -> list[Any]:
    """What the containers in ``value`` hold, flat; to be compared by :func:`is_changed` later."""
    items = None if isinstance(value, (torch.Tensor, torch.nn.Module)) else children(value)
    if items is None:
        return [value]
    found: list[Any] = [len(items), *(value if type(value) is dict else ())]
    for item in items:
        found.extend(contents(item))
    return found


def is_changed(value: Any, before: list[Any]) -> bool:
    """Whether a container in ``value`` holds other things than before. The values of tensors do not count."""
    return not is_still(contents(value), before)


def is_still(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects one by one; numbers and texts may be equal ones."""
    if len(now) != len(before):
        return False
    for one, other in zip(now, before, strict=True):
        if one is not other and not (isinstance(one, (bool, int, float, str)) and one == other):
            return False
    return True


def take_apart(value: Any, tensors: list[Any], ints: list[Any], floats: list[Any]) -> Structure:
    """The structure of ``value``, whose tensors and numbers go to the lists; of a module, its parameters and buffers."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if value is None or isinstance(value, (bool, str, enum.Enum)):  # an IntEnum is no number
        return ("plain", value)
    if isinstance(value, (int, torch.SymInt)):
        ints.append(value)
        return ("int", len(ints) - 1)
    if isinstance(value, (float, torch.SymFloat)):
        floats.append(value)
        return ("float", len(floats) - 1)
    if isinstance(value, torch.nn.Module):
        return _take_module(value, tensors)
    if type(value) is list:
        return ("list", tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is tuple:
        return ("tuple", tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is dict:
        items = tuple([take_apart(item, tensors, ints, floats) for item in value.values()])
        return ("dict", tuple(value.keys()), items)
    if isinstance(value, tuple):
        return ("named", type(value), tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if _is_data(value):
        names = tuple([part.name for part in dataclasses.fields(value)])
        return (
            "data",
            type(value),
            names,
            tuple([take_apart(getattr(value, n), tensors, ints, floats) for n in names]),
        )
    if type(value) in _torch.PYTREE_NODES:
        children, context = _torch.PYTREE_NODES[type(value)].flatten_fn(value)
        return ("node", type(value), context, tuple([take_apart(item, tensors, ints, floats) for item in children]))
    return ("plain", value)


def _take_module(module: torch.nn.Module, tensors: list[Any]) -> Structure:
    names, places = [], []
    parameters = list(module.named_parameters())
    for name, tensor in parameters + list(module.named_buffers()):
        names.append(name)
        places.append(len(tensors))
        tensors.append(tensor)
    return ("module", id(module), tuple(names), tuple(places), len(parameters))


def put_together(structure: Structure, leaf: Callable[[Structure], Any]) -> Any:
    """The value that a structure describes, with ``leaf`` called for its leaves."""
    kind = structure[0]
    if kind in LEAVES:
        return leaf(structure)
    items = [put_together(item, leaf) for item in structure[-1]]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    if kind == "dict":
        return dict(zip(structure[1], items))  # noqa: B905 - Dynamo traces this
    if kind == "named":
        return _named(structure[1], items)
    if kind == "node":
        return _torch.PYTREE_NODES[structure[1]].unflatten_fn(items, structure[2])
    return _dataclass(structure[1], structure[2], items)


def _named(kind: Any, items: Sequence[Any]) -> Any:
    """A named tuple, a result of torch's (``torch.return_types.topk``), or a size."""
    if kind is torch.Size:
        return torch.Size(items)
    if torch.compiler.is_dynamo_compiling() or hasattr(kind, "_fields"):
        return tuple.__new__(kind, items)  # calling it needs a guard, and a result's class has no source
    return kind(items)  # torch's are made in no other way


def _dataclass(kind: type, names: Sequence[str], items: Sequence[Any]) -> Any:
    """A dataclass with these fields. What its ``__init__`` and ``__post_init__`` did to them is done already."""
    if issubclass(kind, dict):  # such as those of transformers: a field is an item too
        return kind(**dict(zip(names, items)))  # noqa: B905 - Dynamo traces this
    made = object.__new__(kind)
    for name, item in zip(names, items):  # noqa: B905
        object.__setattr__(made, name, item)
    return made


def with_leaves(structure: Structure, leaf: Callable[[Structure], Structure]) -> Structure:
    """The same structure with other leaves."""
    if structure[0] in LEAVES:
        return leaf(structure)
    return (*structure[:-1], tuple(with_leaves(item, leaf) for item in structure[-1]))


def leaves_of(structure: Structure) -> Iterator[Structure]:
    """The leaves, in order."""
    if structure[0] in LEAVES:
        yield structure
    else:
        for item in structure[-1]:
            yield from leaves_of(item)


# --- views --------------------------------------------------------------------------------------------------------------


def extent(where: Strided) -> int:
    """How many elements of its storage a tensor spans."""
    return int(_torch.extent(where[0], where[1]))


def view_leaf(kind: str, number: int, base: Strided, where: Strided, detached: bool) -> Structure:
    """The leaf for a tensor at ``where`` that is made again from one at ``base``, without ``as_strided`` if that can be."""
    order = sorted(range(len(where[0])), key=lambda position: (-where[1][position], position))
    dense = tuple(where[0][position] for position in order)
    back = tuple(order.index(position) for position in range(len(order))) if order != sorted(order) else None
    plain = _is_contiguous(base) and tuple(where[1][position] for position in order) == _steps(dense)
    start = where[2] - base[2]
    inside = start >= 0 and start + extent(where) <= extent(base)
    steps: Structure | None = ("flat", start, extent(where), dense, back) if plain else _slices(base, where)
    if steps is None or not inside:
        return ("view", kind, number, detached, None, where)
    # Where the base itself lies is no part of the leaf: an argument may lie elsewhere in its storage in another call.
    return ("view", kind, number, detached, steps, (where[0], where[1], start))


def _slices(base: Strided, where: Strided) -> Structure | None:
    """A view as a slice of each dimension of its base, the order of those that stay, and new ones of size 1; None if it is none."""
    if 0 in base[0] or 0 in where[0]:
        return None
    rest, left = where[2] - base[2], [dim for dim, size in enumerate(where[0]) if size > 1]
    cuts: dict[int, tuple[int, int, int]] = dict.fromkeys(range(len(base[0])), (0, 1, 0))
    taken: dict[int, int] = {}
    outermost_first = sorted((dim for dim, size in enumerate(base[0]) if size > 1), key=lambda dim: -base[1][dim])
    for dim in outermost_first:
        step = base[1][dim]
        if step <= sum((base[0][d] - 1) * base[1][d] for d in outermost_first[outermost_first.index(dim) + 1 :]):
            return None  # its elements overlap
        begin, rest = divmod(rest, step)
        mine = next((one for one in left if where[1][one] % step == 0), None)
        count, by = (1, 0) if mine is None else (where[0][mine], where[1][mine] // step)
        cuts[dim] = begin, begin + (count - 1) * by + 1, by
        if rest < 0 or cuts[dim][1] > base[0][dim] or (mine is not None and by < 1):
            return None
        if mine is not None:
            left.remove(mine)
            taken[dim] = mine
    if left or rest:
        return None
    stay = sorted(taken)
    order = tuple(sorted(range(len(stay)), key=lambda position: taken[stay[position]]))
    return ("cut", tuple(cuts.values()), order, tuple(dim for dim, size in enumerate(where[0]) if size == 1))


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = [max(size, 1) for size in shape]
    return tuple(itertools.accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1] if sizes else ()


def _is_contiguous(where: Strided) -> bool:
    pairs = zip(where[0], where[1], _steps(where[0]), strict=True)
    return all(size == 1 or step == wanted for size, step, wanted in pairs) or 0 in where[0]


def view_of(base: torch.Tensor, leaf: Structure) -> torch.Tensor:
    """What a leaf of :func:`view_leaf` stands for. Dynamo traces it."""
    _, _, _, detached, steps, where = leaf
    if steps is None:
        made = base.as_strided(where[0], where[1], where[2])
    elif steps[0] == "flat":
        _, start, length, dense, back = steps
        made = base.view(-1).narrow(0, start, length).view(dense)
        if back is not None:
            made = made.permute(back)
    else:
        _, cuts, order, new = steps
        made = base[tuple([slice(begin, end, by) if by else begin for begin, end, by in cuts])].permute(order)
        for dim in new:
            made = made.unsqueeze(dim)
    return made.detach() if detached else made


def is_the_same(one: Structure, other: Structure, arguments: Sequence[torch.Tensor]) -> bool:
    """Whether two structures put the same together of these arguments, which may be, or lie in, each other."""

    def place(leaf: Structure) -> Structure:
        if leaf[0] != "argument" and leaf[:2] != ("view", "argument"):
            return leaf
        whole = leaf[0] == "argument"
        tensor = arguments[leaf[1]] if whole else view_of(arguments[leaf[2]], leaf)
        return ("argument", (_torch.storage_key(tensor), *Geometry.of(tensor).in_memory), leaf[2 if whole else 3])

    try:
        return bool(with_leaves(one, place) == with_leaves(other, place))
    except (RuntimeError, IndexError):  # there is no such part of an argument
        return False


# --- results ------------------------------------------------------------------------------------------------------------


class Unholdable(Exception):
    """What compiled code cannot hold of a result, and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Result:
    """A result, taken apart."""

    structure: Structure
    roots: list[torch.Tensor]
    """Of each fresh storage one tensor that owns it; what else lies in it is made again from that."""
    members: list[list[Member]]
    """For each root, the tensors that autograd knows, where it is recording."""
    ints: list[Any]


def take_result(
    holder: list[Any], arguments: Sequence[torch.Tensor], *, recording: bool, exact: bool, copies: bool = True
) -> Result:
    """Take a result apart: aliases of arguments told from fresh memory, of which there is one root for each storage.

    Args:
        holder: all that holds the result, so that what the function kept is seen.
        arguments: the tensors that the function was called with.
        recording: whether autograd was recording, so that results know what they need.
        exact: whether what needs no gradient is said of each of several results that share memory.
        copies: whether what the function kept is copied. Who wants to know the layout alone needs no copies.

    Raises:
        Unholdable: what compiled code cannot hold.
    """
    result = holder[0]
    other = foreign(result) or next((type(module).__name__ for module in modules_in(result)), "")
    other = other or next((type(value).__name__ for value in _enums_in(result)), "")  # Dynamo's guards on one fail
    if other:
        raise Unholdable(f"what compiled code cannot hold: {other}", _CONTAINERS)
    tensors: list[torch.Tensor] = []
    ints: list[Any] = []
    floats: list[Any] = []
    structure = take_apart(result, tensors, ints, floats)
    kinds = {float: floats, int: ints, str: [leaf[1] for leaf in leaves_of(structure) if leaf[0] == "plain"]}
    for kind, values in kinds.items():
        strange = next((v for v in values if isinstance(v, kind) and type(v) is not kind), None)
        if strange is not None:  # such as numpy.float64, which is a float
            raise Unholdable(
                "a number or text of a class of its own, which compiled code cannot hold",
                f"return it as {kind.__name__}",
            )
    if any(type(value) is int and not -(2**63) <= value < 2**63 for value in ints):
        raise Unholdable("an int of more than 64 bits", "return it as a string, or in parts")
    if not all(isinstance(value, float) for value in floats):
        raise Unholdable("a float that depends on values", "return it as a tensor, or in whole numbers as an int")
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
            value = math.nan if value != value else value  # so that it equals itself
            return ("plain", value, value.hex())  # so that 0.0 does not equal -0.0
        return structure

    return Result(with_leaves(structure, leaf), taker.roots, taker.members, ints)


class _Taker:
    """Sorts the tensors of a result by the memory that they lie in."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        arguments: Sequence[torch.Tensor],
        references: Mapping[int, int],
        recording: bool,
        exact: bool,
        copies: bool,
    ) -> None:
        self.tensors, self.arguments, self.references = tensors, arguments, references
        self.recording, self.exact, self.copies = recording, exact, copies
        self.places: list[Structure] = [()] * len(tensors)
        """The leaf for each tensor."""
        self.roots: list[torch.Tensor] = []
        self.members: list[list[Member]] = []

    def take(self) -> None:
        given = {_torch.storage_key(argument) for argument in self.arguments}
        groups: dict[int, list[int]] = {}
        for number, tensor in enumerate(self.tensors):
            key = _torch.storage_key(tensor)
            if key not in given:
                groups.setdefault(key, []).append(number)
            elif self.recording and not _is_view(tensor, self.arguments):
                groups[-1 - number] = [number]  # a copy: traced code could not make a view with that gradient
            else:
                self.places[number] = self._alias(tensor)
        for key, group in groups.items():
            self._take_group(group, copied=key < 0)

    def _alias(self, tensor: torch.Tensor) -> Structure:
        """The leaf for a result that lies in the memory of an argument."""
        mine = Geometry.of(tensor)
        bases = [
            (number, base, Geometry.of(base), self._is_detached(tensor, base.requires_grad))
            for number, base in enumerate(self.arguments)
            if _torch.storage_key(base) == _torch.storage_key(tensor)
        ]
        for number, _, lies, detached in bases:
            if lies.in_memory == mine.in_memory:
                return ("argument", number, detached)
        leaves = [
            view_leaf("argument", number, strided(base), strided(tensor), detached)
            for number, base, lies, detached in bases
            if lies.read_as == mine.read_as
        ]
        if bases[0][2].read_as != mine.read_as:
            raise Unholdable("a view of an argument as another dtype", "make that view outside, or return a clone")
        # Rather of one that it lies in: in another call the arguments may lie apart.
        return next((leaf for leaf in leaves if leaf[4] is not None), leaves[0])

    def _is_detached(self, tensor: torch.Tensor, base_needs: bool) -> bool:
        return self.recording and base_needs and not tensor.requires_grad

    def _take_group(self, group: list[int], copied: bool) -> None:
        """Find a tensor that owns the memory of some results, and say how each is made again from it."""
        tensors = [self.tensors[number] for number in group]
        first, number = tensors[0], len(self.roots)
        lies = [Geometry.of(tensor) for tensor in tensors]
        wanting = [tensor for tensor in tensors if self.recording and tensor.requires_grad]
        if all(other.in_memory == lies[0].in_memory for other in lies[1:]):
            root = first.detach() if self.recording else first
            leaves = [("tensor", number, self._is_detached(tensor, self.exact and bool(wanting))) for tensor in tensors]
            members: list[Member] = [(tensor, None) for tensor in wanting[:1]]
        else:
            if any(other.read_as != lies[0].read_as for other in lies):
                raise Unholdable("tensors of several dtypes that share memory", "return clones")
            where = _span(tensors)
            root = first.detach().as_strided(*where)
            leaves = [
                view_leaf("root", number, where, strided(t), self._is_detached(t, self.exact and bool(wanting)))
                for t in tensors
            ]
            members = _shares([(tensor, _apart(strided(tensor), where[2])) for tensor in wanting], where[0][0])
        if root.is_conj() or root.is_neg():
            root = root.resolve_conj().resolve_neg()
        elif self.copies and (
            copied or (not _torch.is_traced(first) and _is_kept(tensors, self.references, self.recording))
        ):
            root = copy_of(root)
        self.roots.append(root)
        self.members.append(members)
        for place, leaf in zip(group, leaves, strict=True):
            self.places[place] = leaf


def _span(tensors: Sequence[torch.Tensor]) -> Strided:
    """The geometry of a flat tensor that several lie in."""
    wheres = [strided(tensor) for tensor in tensors]
    start = min(where[2] for where in wheres)
    return (max(where[2] + extent(where) for where in wheres) - start,), (1,), start


def _shares(wanting: list[Member], length: int) -> list[Member]:
    """Which of several results that share memory take the gradient of which part of it: each part once."""
    for tensor, where in wanting:
        assert where is not None
        if tensor.numel() == extent(where) == length:
            return [(tensor, where)]
    spans = sorted((where[2], where[2] + extent(where)) for _, where in wanting if where is not None)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise Unholdable("tensors that overlap in part and need gradients", "return clones")
    return wanting


_CONTAINERS = "return tensors and plain values, in lists, tuples, dicts, named tuples, dataclasses or pytree nodes"


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """New memory of the same geometry. The copy is no view, so it may be changed in place by those who get it."""
    where = strided(tensor)
    length = extent(where)
    made = torch.empty_strided(where[0], where[1], dtype=tensor.dtype, device=tensor.device)
    made.as_strided((length,), (1,), 0).copy_(tensor.detach().as_strided((length,), (1,), where[2]))
    return made


def _apart(where: Strided, start: int) -> Strided:
    return where[0], where[1], where[2] - start


_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Alias AsStrided Diagonal Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose "
        "Unbind Unfold Unsafe Unsqueeze View ViewAsReal ViewAsComplex"
    ).split()
    for number in (0, 1, 2)
)


def _is_view(tensor: torch.Tensor, arguments: Sequence[torch.Tensor]) -> bool:
    """Whether, for autograd too, a tensor in the memory of an argument is a view of it: traced code can make it again."""
    ends = [argument.grad_fn for argument in arguments]
    step = tensor.grad_fn
    while step is not None and step.name() in _VIEWS and not any(step is end for end in ends):
        step = step.next_functions[0][0]
    leaf = step is None or step.name() == "torch::autograd::AccumulateGrad"
    return leaf or any(step is end for end in ends)


def _references(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """How often Python refers to each of some tensors, by identity."""
    return {id(tensor): sys.getrefcount(tensor) for tensor in tensors}


_ALONE = _references([torch.empty(0)]).popitem()[1]
"""What :func:`_references` counts for a tensor that only the list holds."""


def _is_kept(group: Sequence[torch.Tensor], references: Mapping[int, int], recording: bool) -> bool:
    """Whether somebody else than the result holds its memory: the function, which may write it in a later call.

    A false alarm costs a copy. Autograd holds memory too, so while it records only Python is asked.
    """
    for tensor in group:
        if references[id(tensor)] > _ALONE + 2 * sum(other is tensor for other in group) - 1:
            return True
    if recording:
        return False
    holders = {id(tensor) for tensor in group}
    bases = [base for tensor in group if (base := _torch.base_of_view(tensor)) is not None and id(base) not in holders]
    for base in {id(base): base for base in bases}.values():
        holders.add(id(base))
        if sys.getrefcount(base) > _ALONE + 1 + sum(other is base for other in bases):
            return True
    return _torch.owners_of_storage(group[0]) > len(holders)
