"""The properties of a call's arguments, and a quick test whether another call has arguments of the same kind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.recordings.generated_code import defined

_ATOMS = (int, str, bytes, slice, range, torch.Size, torch.device, torch.dtype)
"""Types whose values are compared, and not their identities."""
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

Test = Callable[[tuple[Any, ...], dict[str, Any]], bool]


@dataclass(frozen=True)
class Inputs:
    """The properties of a call's arguments, without its tensors. Objects of other kinds are held."""

    args: _Like
    kwargs: _Like
    alike: Callable[..., bool]
    """Checks whether the tensors, each taken once, are like those of the call."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, ordered: bool = False) -> tuple[Inputs | None, str]:
        """For the arguments of a call. ``ordered``: the function sees the order of keyword arguments.

        None, with the reason, if a tensor is of a kind that cannot be compared in microseconds.
        """
        tensors: list[torch.Tensor] = []
        likes = _like(args, tensors), _like(kwargs if ordered else _Keywords(kwargs), tensors)
        for tensor in tensors:
            if type(tensor) not in _TENSORS or tensor.layout is not torch.strided:
                return None, f"an argument is a {type(tensor).__name__} of layout {tensor.layout}"
        return cls(*likes, _torch.tensors_like(tensors)), ""

    def checker(self, first: Callable[[], bool]) -> Test:
        """A generated function of ``args`` and ``kwargs``: whether ``first()`` holds and they are like the call's."""
        names: dict[str, Any] = {"first": first}
        body = "\n    ".join(["if not first(): return False", *self.lines(names, "return False"), "return True"])
        return defined(f"def fits(args, kwargs):\n    {body}\n", "fits", names)[0]

    def lines(self, names: dict[str, Any], otherwise: str) -> list[str]:
        """Source that runs ``otherwise`` unless the variables ``args`` and ``kwargs`` are like the arguments of the call.

        The names that it uses are added to ``names``.
        """
        names["alike"] = self.alike
        places: dict[int, str] = {}
        kwargs = (_source_of_kwargs if self.kwargs.kind is _Keywords else _source)(self.kwargs, "kwargs", names, places)
        lines = [*_source(self.args, "args", names, places), *kwargs]
        lines.append(f"if not alike({', '.join(places[number] for number in sorted(places))}): return False")
        return [line.replace(": return False", f": {otherwise}") for line in lines]

    def differs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Which argument is not like that of the call, and how; empty if all are."""
        met: dict[int, Any] = {}
        keywords = _Keywords(kwargs) if self.kwargs.kind is _Keywords else kwargs
        for name, like, value in (("args", self.args, args), ("kwargs", self.kwargs, keywords)):
            if why := next(_differences(like, value, name, met), ""):
                return why
        if len({id(tensor) for tensor in met.values()}) != len(met):
            return "two arguments are one tensor"
        return ""


@dataclass(frozen=True)
class _Like:
    """The properties of one argument, or of a part of one."""

    kind: type
    parts: tuple[_Like, ...] | None = None
    """The parts of a container."""
    keys: tuple[Any, ...] | None = None
    """The keys of a container that has keys."""
    value: Any = None
    """The value, if it is neither a container nor a tensor."""
    number: int = -1
    """The number of a tensor; the same tensor has the same number."""
    tensor: _Tensor | None = None


@dataclass(frozen=True)
class _Tensor:
    """The properties of a tensor."""

    kind: type
    spec: TensorSpec
    requires_grad: bool
    lazy: str
    """Other properties, in words: a lazy conjugate, an inference tensor."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Tensor:
        kinds = {"conjugated": tensor.is_conj(), "negated": tensor.is_neg(), "of inference mode": tensor.is_inference()}
        lazy = "".join(f", {word}" for word, true in kinds.items() if true)
        return cls(type(tensor), TensorSpec.of(tensor), tensor.requires_grad, lazy)

    def __str__(self) -> str:
        more = f"{', requiring grad' if self.requires_grad else ''}{self.lazy}"
        return f"a {self.kind.__name__} of {self.spec}{more}"


class _Keywords(dict[str, Any]):
    """Keyword arguments, whose order does not matter."""


def _like(value: Any, tensors: list[torch.Tensor]) -> _Like:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        number = next((number for number, known in enumerate(tensors) if known is value), len(tensors))
        if number == len(tensors):
            tensors.append(value)
        return _Like(kind, number=number, tensor=_Tensor.of(value))
    if kind in (list, tuple) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return _Like(kind, tuple(_like(item, tensors) for item in value))
    if kind in (dict, OrderedDict, _Keywords):
        return _Like(kind, tuple(_like(item, tensors) for item in value.values()), tuple(value))
    return _Like(kind, value=value)


def _source(like: _Like, name: str, names: dict[str, Any], places: dict[int, str]) -> Iterator[str]:
    """Lines that return False unless the variable ``name`` is like ``like``. ``places`` has the variables of tensors."""

    def constant(value: Any) -> str:
        chosen = f"c{len(names)}"
        names[chosen] = value
        return chosen

    if like.tensor is not None:
        if like.number in places:
            yield f"if {name} is not {places[like.number]}: return False"
        else:
            places[like.number] = name
    elif like.parts is not None:
        kind, parts = constant(like.kind), [f"{name}_{number}" for number in range(len(like.parts))]
        yield f"if type({name}) is not {kind} or len({name}) != {len(parts)}: return False"
        if like.keys:
            yield f"if tuple({name}) != {constant(like.keys)}: return False"
            yield f"if tuple(map(type, {name})) != {constant(tuple(map(type, like.keys)))}: return False"
        if parts:
            yield f"{', '.join(parts)}, = {name}{'.values()' if like.keys is not None else ''}"
        for part, inner in zip(parts, like.parts, strict=True):
            yield from _source(inner, part, names, places)
    elif like.kind in (float, complex):
        yield f"if type({name}) is not {constant(like.kind)} or repr({name}) != {repr(like.value)!r}: return False"
    elif like.kind in _ATOMS:
        yield f"if type({name}) is not {constant(like.kind)} or {name} != {constant(like.value)}: return False"
    else:
        yield f"if {name} is not {constant(like.value)}: return False"


def _source_of_kwargs(like: _Like, name: str, names: dict[str, Any], places: dict[int, str]) -> Iterator[str]:
    """:func:`_source` for keyword arguments, whose order does not matter."""
    assert like.parts is not None
    assert like.keys is not None
    yield f"if len({name}) != {len(like.keys)}: return False"
    for number, (key, part) in enumerate(zip(like.keys, like.parts, strict=True)):
        yield f"if {key!r} not in {name}: return False"
        yield f"{name}_{number} = {name}[{key!r}]"
        yield from _source(part, f"{name}_{number}", names, places)


def _differences(like: _Like, value: Any, name: str, met: dict[int, Any]) -> Iterator[str]:
    """The same check as :func:`_source`, slowly, with the differences as text."""
    if like.tensor is not None:
        if not isinstance(value, torch.Tensor):
            yield f"{name} is a {type(value).__name__}, and was {like.tensor}"
        elif _Tensor.of(value) != like.tensor:
            yield f"{name} is {_Tensor.of(value)}, and was {like.tensor}"
        elif met.setdefault(like.number, value) is not value:
            yield f"{name} is another tensor than an argument before it, and was the same"
    elif like.parts is not None:
        same: Any = value
        if type(value) is not like.kind or len(same) != len(like.parts):
            yield f"{name} is a {type(value).__name__}{_length(value)}, and was a {like.kind.__name__} of {len(like.parts)}"
        elif (keys := _keys(like, same)) is None:
            yield f"{name} has the keys {list(same)}, and had {list(like.keys or ())}"
        else:
            for key, part in zip(keys, like.parts, strict=True):
                yield from _differences(part, same[key], f"{name}[{key!r}]", met)
    elif type(value) is not like.kind or (
        repr(value) != repr(like.value) if _by_text(like) else value is not like.value
    ):
        yield f"{name} is {value!r}, and was {like.value!r}"


def _keys(like: _Like, value: Any) -> Any:
    """The keys of the parts of ``value``; None if they are not those of ``like``."""
    if like.keys is None:
        return range(len(value))
    if isinstance(value, _Keywords):
        return like.keys if set(value) == set(like.keys) else None
    same = tuple(value) == like.keys and tuple(map(type, value)) == tuple(map(type, like.keys))
    return like.keys if same else None


def _length(value: Any) -> str:
    return f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""


def _by_text(like: _Like) -> bool:
    """Whether two values are compared by their text: ``-0.0`` is not ``0.0``, and a NaN is like another NaN."""
    return like.kind in (float, complex, *_ATOMS)
