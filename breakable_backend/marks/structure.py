"""Nested arguments and results, flattened to tensors, numbers and plain values, and put together again (unflattened).

A structure is a nest of tuples. A node is a kind of container with its children, or a leaf that says where its value
is. Dynamo traces most of these functions, so that compiled code contains tensors and numbers, and no containers.
:mod:`breakable_backend.marks.results` tells which tensors of a result are aliases.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import Geometry, Strided, dense_strides
from breakable_backend.ir.running_ops import has_memory

T = TypeVar("T")
Structure = tuple[Any, ...]
CONSTANTS = (enum.Enum, type)
"""Objects that may be arguments, and on whose identity Dynamo guards. As results they cannot be guarded."""

LEAVES = ("tensor", "argument", "view", "plain", "int", "float", "module")


def children(value: Any) -> list[Any] | None:
    """The children of a container; None for a leaf, and for an object that no structure can hold."""
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
    """Whether ``value`` is an instance of a dataclass. Dynamo of torch 2.11 cannot check this for a subclass of dict."""
    return not isinstance(value, (dict, type)) and dataclasses.is_dataclass(value)


def foreign(value: Any) -> str:
    """The type of an object in ``value`` that no structure can hold; empty if there is none."""
    if value is None or isinstance(
        value, (torch.Tensor, bool, str, int, float, torch.SymInt, torch.SymFloat, torch.nn.Module, *CONSTANTS)
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


def instances_in(value: Any, kind: type[T] | tuple[type[T], ...]) -> Iterator[T]:
    """The instances of ``kind`` in ``value``."""
    if isinstance(value, kind):
        yield value
    elif not isinstance(value, (torch.Tensor, torch.nn.Module)):
        for item in children(value) or ():
            yield from instances_in(item, kind)


def contents(value: Any) -> list[Any]:
    """The contents of the containers in ``value``, flat, for :func:`is_changed` to compare later."""
    items = None if isinstance(value, (torch.Tensor, torch.nn.Module)) else children(value)
    if items is None:
        return [value]
    found: list[Any] = [len(items), *(value if type(value) is dict else ())]
    for item in items:
        found.extend(contents(item))
    return found


def is_changed(value: Any, before: list[Any]) -> bool:
    """Whether a container in ``value`` contains other objects than before. The values of tensors do not count."""
    return not is_still(contents(value), before)


def where_they_lie(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Where each of some tensors lies, and how, to be compared later. Those without strides do not count."""
    return [(_torch.storage_key(one), Geometry.of(one).in_memory) for one in tensors if has_memory(one)]


MOVED_AN_ARGUMENT = "it changed the shape, the strides or the memory of a tensor that it was given"
"""Why a call is no eager step."""
LEAVE_IT_IN_PLACE = (
    "return a view in its place, such as x.t() for x.t_(), or write values, such as x.copy_(y) for x.data = y"
)
"""What to do about it."""


def is_still(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects, one by one. Numbers and strings need only be equal."""
    if len(now) != len(before):
        return False
    for one, other in zip(now, before, strict=True):
        if one is not other and not (isinstance(one, (bool, int, float, str)) and one == other):
            return False
    return True


def taken_apart(value: Any) -> tuple[Structure, list[Any], list[Any], list[Any]]:
    """The structure of ``value``, with its tensors, ints and floats; see :func:`take_apart`."""
    tensors: list[Any] = []
    ints: list[Any] = []
    floats: list[Any] = []
    return take_apart(value, tensors, ints, floats), tensors, ints, floats


def take_apart(value: Any, tensors: list[Any], ints: list[Any], floats: list[Any]) -> Structure:
    """The structure of ``value``. Its tensors and numbers go to the lists; of a module, its parameters and buffers."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if value is None or isinstance(value, (bool, str, enum.Enum)):  # an IntEnum does not count as a number
        return ("plain", value)
    if isinstance(value, (int, torch.SymInt)):
        ints.append(value)
        return ("int", len(ints) - 1)
    if isinstance(value, (float, torch.SymFloat)):
        floats.append(value)
        return ("float", len(floats) - 1)
    if isinstance(value, torch.nn.Module):
        return _take_module(value, tensors)
    # Containers are told apart here, and not in a function: Dynamo of torch 2.11 then fails on ``torch.return_types``.
    if type(value) is list:
        return ("list", tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is tuple:
        return ("tuple", tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is dict:
        items = tuple([take_apart(item, tensors, ints, floats) for item in value.values()])
        return ("dict", tuple(value.keys()), items)
    if type(value) is torch.Size:
        return ("size", tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if isinstance(value, tuple):
        return ("named", type(value), tuple([take_apart(item, tensors, ints, floats) for item in value]))
    if _is_data(value):
        names = tuple([part.name for part in dataclasses.fields(value)])
        items = tuple([take_apart(getattr(value, name), tensors, ints, floats) for name in names])
        return ("data", type(value), names, items)
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
    """The value of a structure, with ``leaf`` called for its leaves."""
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
    if kind == "size":
        return torch.Size(items)
    if kind == "node":
        return _torch.PYTREE_NODES[structure[1]].unflatten_fn(items, structure[2])
    if kind == "made":
        return getattr(makers, structure[1])(items, structure[2])
    return _dataclass(structure[1], structure[2], items)


class _Makers:
    """How nodes of pytree are put together, by a name for each class."""


makers = _Makers()


def remembers_code(structure: Structure) -> bool:
    """Whether a node of pytree has a function or a class besides its children, as a ``defaultdict`` has."""
    if structure[0] in LEAVES:
        return False
    code = (FunctionType, BuiltinFunctionType, type)
    if structure[0] == "node" and next(instances_in(structure[2], code), None) is not None:
        return True
    return any(map(remembers_code, structure[-1]))


def for_dynamo(structure: Structure) -> Structure:
    """The same structure without the classes of pytree's nodes.

    Dynamo guards on a class with which it looks something up, and a class that only a result has brought cannot be
    guarded.
    """
    if structure[0] in LEAVES:
        return structure
    inner = tuple([for_dynamo(item) for item in structure[-1]])
    if structure[0] != "node":
        return (*structure[:-1], inner)
    name = f"of_{id(structure[1])}"
    setattr(makers, name, _torch.PYTREE_NODES[structure[1]].unflatten_fn)
    return ("made", name, structure[2], inner)


def _named(kind: Any, items: Sequence[Any]) -> Any:
    """A named tuple, or a ``torch.return_types`` result such as that of ``topk``."""
    if torch.compiler.is_dynamo_compiling() or hasattr(kind, "_fields"):
        return tuple.__new__(kind, items)  # calling the class needs a guard, and the class of a result has no source
    return kind(items)  # torch's classes can only be made like this


def _dataclass(kind: type, names: Sequence[str], items: Sequence[Any]) -> Any:
    """An instance of a dataclass with these fields. Its ``__init__`` and ``__post_init__`` do not run again."""
    if issubclass(kind, dict):  # such as those of transformers, in which a field is also an item
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


def module_leaves(structure: Structure) -> list[Structure]:
    """The leaves that stand for modules."""
    return [leaf for leaf in leaves_of(structure) if leaf[0] == "module"]


def places_of(leaf: Structure) -> tuple[int, ...]:
    """The positions of a leaf's tensors; for a module those of its parameters and buffers."""
    return (leaf[1],) if leaf[0] == "tensor" else leaf[3] if leaf[0] == "module" else ()


def in_words(structure: Structure) -> str:
    """A structure as a reader knows it: ``(a tensor, 3)``."""
    kind = structure[0]
    if kind == "plain":
        return repr(structure[1])
    if kind == "view":
        _, of, _, _, _, (shape, *_), _ = structure
        return f"a view of {'an argument' if of == 'argument' else 'another tensor'} with shape {list(shape)}"
    if kind in LEAVES:
        return {"argument": "an argument itself", "int": "an int"}.get(kind, f"a {kind}")
    items = [in_words(item) for item in structure[-1]]
    if kind == "list":
        return f"[{', '.join(items)}]"
    if kind in ("tuple", "size"):
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if kind == "dict":
        return f"{{{', '.join(f'{key!r}: {item}' for key, item in zip(structure[1], items, strict=True))}}}"
    return f"{structure[1].__name__}({', '.join(items)})"


def differences(one: Structure, other: Structure, parameters: Sequence[str]) -> list[tuple[str, str, str]]:
    """The arguments that two calls were not given alike: the name of each, and what it was in either call.

    Args:
        one: positional and keyword arguments, as a structure.
        other: those of the other call.
        parameters: names of positional arguments.
    """
    first, second = _by_name(one, parameters), _by_name(other, parameters)
    told = [(name, first.get(name, "missing"), second.get(name, "missing")) for name in {**first, **second}]
    return [(name, here, there) for name, here, there in told if here != there]


def _by_name(arguments: Structure, parameters: Sequence[str]) -> dict[str, str]:
    (*_, positional), (_, keywords, named) = arguments[-1]
    places = [*parameters, *(f"argument {place + 1}" for place in range(len(parameters), len(positional)))]
    values = {**dict(zip(places, positional, strict=False)), **dict(zip(keywords, named, strict=True))}
    return {name: in_words(value) for name, value in values.items()}


# --- views --------------------------------------------------------------------------------------------------------------


def reach(where: Strided) -> int:
    """How many elements of its storage a tensor spans."""
    return int(_torch.extent(where[0], where[1]))


def view_leaf(kind: str, number: int, base: Strided, where: Strided, detached: bool) -> Structure:
    """The leaf for a tensor at ``where`` as a view of the one at ``base``, without ``as_strided`` if possible."""
    whole, spread = where, tuple(dim for dim, size in enumerate(where[0]) if size > 1 and where[1][dim] == 0)
    if spread:  # dimensions that ``expand`` makes
        shape, stride = (tuple(n for dim, n in enumerate(of) if dim not in spread) for of in where[:2])
        where = shape, stride, where[2]
    order = sorted(range(len(where[0])), key=lambda position: (-where[1][position], position))
    dense = tuple(where[0][position] for position in order)
    back = tuple(order.index(position) for position in range(len(order))) if order != sorted(order) else None
    plain = _is_contiguous(base) and tuple(where[1][position] for position in order) == dense_strides(dense)
    start = where[2] - base[2]
    inside = start >= 0 and start + reach(where) <= reach(base)
    steps: Structure | None = ("flat", start, reach(where), dense, back) if plain else _slices(base, where)
    if steps is None or not inside:
        return ("view", kind, number, detached, None, whole, ())
    # The leaf does not say where the base lies: an argument may lie elsewhere in its storage in another call.
    return ("view", kind, number, detached, steps, (whole[0], whole[1], start), spread)


def _slices(base: Strided, where: Strided) -> Structure | None:
    """A view as slices of its base, the order of the remaining dimensions, and new ones of size 1; None if it is none."""
    if 0 in base[0] or 0 in where[0]:
        return None
    rest, left = where[2] - base[2], [dim for dim, size in enumerate(where[0]) if size > 1]
    cuts: dict[int, tuple[int, int, int]] = dict.fromkeys(range(len(base[0])), (0, 1, 0))
    taken: dict[int, int] = {}
    outermost_first = sorted((dim for dim, size in enumerate(base[0]) if size > 1), key=lambda dim: -base[1][dim])
    for dim in outermost_first:
        step = base[1][dim]
        if step <= sum((base[0][d] - 1) * base[1][d] for d in outermost_first[outermost_first.index(dim) + 1 :]):
            return None  # the elements of the view overlap
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


def _is_contiguous(where: Strided) -> bool:
    pairs = zip(where[0], where[1], dense_strides(where[0]), strict=True)
    return all(size == 1 or step == wanted for size, step, wanted in pairs) or 0 in where[0]


def view_of(base: torch.Tensor, leaf: Structure) -> torch.Tensor:
    """The view that a leaf of :func:`view_leaf` stands for. Dynamo traces this."""
    _, _, _, detached, steps, where, spread = leaf
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
    if spread:
        for dim in spread:
            made = made.unsqueeze(dim)
        made = made.expand(where[0])
    return made.detach() if detached else made


def is_the_same(one: Structure, other: Structure, arguments: Sequence[torch.Tensor], recording: bool) -> bool:
    """Whether two structures give the same for these arguments, some of which may be equal or share memory.

    ``recording``: whether it counts what is detached.
    """

    def place(leaf: Structure) -> Structure:
        if leaf[0] != "argument" and leaf[:2] != ("view", "argument"):
            return leaf
        whole = leaf[0] == "argument"
        tensor = arguments[leaf[1]] if whole else view_of(arguments[leaf[2]], leaf)
        detached = recording and leaf[2 if whole else 3]
        return ("argument", (_torch.storage_key(tensor), *Geometry.of(tensor).in_memory), detached)

    try:
        return bool(with_leaves(one, place) == with_leaves(other, place))
    except (RuntimeError, IndexError):  # the argument has no such part
        return False
