"""How arguments and results are put together from tensors, numbers and plain values.

A structure is a nest of tuples: what kind of container, and its children; or a leaf, which says where its value is.
Dynamo traces most of these functions: containers are gone from what it compiles, and only tensors and numbers are left.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from breakable_backend import _torch

Structure = tuple[Any, ...]
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides, and how many elements into its storage a tensor begins."""

LEAVES = ("tensor", "argument", "view", "plain", "int", "float", "module")


def children(value: Any) -> list[Any] | None:
    """What a container holds; None for a leaf, and for what no structure can hold."""
    if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return list(value)
    if type(value) is dict:
        return list(value.values()) if all([isinstance(key, (str, int)) for key in value]) else None  # noqa: C419 - Dynamo traces it
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, part.name) for part in dataclasses.fields(value)]
    if type(value) in _torch.PYTREE_NODES:
        return list(_torch.PYTREE_NODES[type(value)].flatten_fn(value)[0])
    return None


def foreign(value: Any) -> str:
    """The type of what no structure can hold in ``value``; empty if there is none."""
    if value is None or isinstance(value, (torch.Tensor, bool, str, int, float, torch.SymInt, torch.SymFloat, torch.nn.Module)):
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


def take_apart(value: Any, tensors: list[Any], ints: list[Any], floats: list[Any]) -> Structure:
    """The structure of ``value``, whose tensors and numbers go to the lists; of a module, its parameters and buffers."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if value is None or isinstance(value, (bool, str)):
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple([part.name for part in dataclasses.fields(value)])
        return ("data", type(value), names, tuple([take_apart(getattr(value, n), tensors, ints, floats) for n in names]))
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
        return structure[1](*items)
    if kind == "node":
        return _torch.PYTREE_NODES[structure[1]].unflatten_fn(items, structure[2])
    return structure[1](**dict(zip(structure[2], items)))  # noqa: B905


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


def geometry(tensor: torch.Tensor) -> Geometry:
    """The geometry of a tensor. A size that is symbolic becomes the number that it is: a structure is a constant."""
    return tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), int(tensor.storage_offset())


def extent(where: Geometry) -> int:
    """How many elements of its storage a tensor spans."""
    shape, stride, _ = where
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def view_leaf(kind: str, number: int, base: Geometry, where: Geometry, detached: bool) -> Structure:
    """The leaf for a tensor at ``where`` that is made again from one at ``base``, without ``as_strided`` if that can be."""
    order = sorted(range(len(where[0])), key=lambda position: (-where[1][position], position))
    dense = tuple(where[0][position] for position in order)
    back = tuple(order.index(position) for position in range(len(order)))
    plain = _is_contiguous(base) and tuple(where[1][position] for position in order) == _steps(dense)
    inside = 0 <= where[2] - base[2] and where[2] - base[2] + extent(where) <= extent(base)
    if not (plain and inside):
        return ("view", kind, number, detached, None, where)
    return ("view", kind, number, detached, (where[2] - base[2], extent(where), dense, back), where)


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = [max(size, 1) for size in shape]
    return tuple(itertools.accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1] if sizes else ()


def _is_contiguous(where: Geometry) -> bool:
    pairs = zip(where[0], where[1], _steps(where[0]), strict=True)
    return all(size == 1 or step == wanted for size, step, wanted in pairs) or 0 in where[0]


def view_of(base: torch.Tensor, leaf: Structure) -> torch.Tensor:
    """What a leaf of :func:`view_leaf` stands for. Dynamo traces it."""
    _, _, _, detached, steps, where = leaf
    if steps is None:
        made = base.as_strided(where[0], where[1], where[2])
    else:
        start, length, dense, back = steps
        made = base.view(-1).narrow(0, start, length).view(dense)
        if back != tuple(range(len(back))):
            made = made.permute(back)
    return made.detach() if detached else made
