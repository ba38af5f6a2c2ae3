"""Records read back from the plain values that they were saved as."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from breakable_backend.errors import OptionsError

T = TypeVar("T")


def record_from(kind: type[T], saved: Any, where: str = "report") -> T:
    """The record of class ``kind`` that was saved as ``saved``, the dict from the JSON.

    Args:
        kind: a dataclass whose fields are plain values, tuples, mappings and further such dataclasses.
        saved: a dict with its fields. Keys that are not fields are properties that were saved for other readers.
        where: the name of ``saved`` in error texts.

    Raises:
        OptionsError: ``saved`` does not fit such a record; the text names the field.
    """
    if not isinstance(saved, Mapping):
        raise _misfit(where, f"a dict for a {kind.__name__}", saved)
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(typing.cast(Any, kind)):
        if field.name in saved:
            values[field.name] = _value(hints[field.name], saved[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise OptionsError(
                f"the saved report lacks {where}.{field.name}", fix="save it again, with this version of the package"
            )
    return kind(**values)


def _value(kind: Any, saved: Any, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if saved is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _value(kind, saved, where)
    if origin is typing.Literal:
        if saved not in parts:
            raise _misfit(where, f"one of {', '.join(map(repr, parts))}", saved)
        return saved
    if dataclasses.is_dataclass(kind):
        return record_from(typing.cast(type, kind), saved, where)
    if origin is tuple:
        if not isinstance(saved, list | tuple):
            raise _misfit(where, "a list", saved)
        return tuple(_value(parts[0], item, f"{where}[{number}]") for number, item in enumerate(saved))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(saved, Mapping):
            raise _misfit(where, "a dict", saved)
        return {key: _value(parts[1], item, f"{where}[{key!r}]") for key, item in saved.items()}
    if kind is float and isinstance(saved, int):
        return float(saved)
    if isinstance(kind, type) and not isinstance(saved, kind):
        raise _misfit(where, _article(kind.__name__), saved)
    return saved


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _misfit(where: str, wanted: str, saved: Any) -> OptionsError:
    return OptionsError(
        f"the saved report does not fit: {where} is {str(saved)!r:.60}, which is not {wanted}",
        fix="give what Report.to_json() wrote, unchanged",
    )
