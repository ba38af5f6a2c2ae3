"""What an eager function returns: taken apart into tensors, checked at replay, and put on memory that stays.

A result may be any structure: containers that pytree knows, dataclasses, objects with tensors in their attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.errors import CaptureError, EagerOutputError
from breakable_backend.ir.layout import TensorSpec, extent

ALIGNMENT = 256
"""Bytes: where views of one storage are kept together, they keep the alignment that the allocator gave them."""
PLAIN = (
    *(int, float, bool, str, type(None), complex, bytes, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What is compared by value."""


def tensors_on(device: torch.device, tree: Any) -> list[torch.Tensor]:
    """The tensors in ``tree`` that have memory on ``device``."""
    leaves = (leaf for _, leaf in fields(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if leaf.device == device and leaf.layout is torch.strided]


def fields(value: Any, path: str = "", met: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """The leaves of a result, each with the path that leads to it first (``[0].scores``)."""
    met = {} if met is None else met
    children = _children(value)
    if children is None:
        yield path, value
    elif isinstance(value, tuple) or id(value) not in met:
        met[id(value)] = value
        for step, child in children.items():
            yield from fields(child, path + step, met)


def replaced(value: Any, change: Callable[[Any], Any], met: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """``value`` with its leaves changed, in the order of :func:`fields`; what can be written is copied, once each."""
    met = {} if met is None else met
    children = _children(value)
    if children is None:
        return change(value)
    if isinstance(value, tuple):
        items = [replaced(child, change, met) for child in children.values()]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if id(value) not in met:
        twin = copy.copy(value) if _is_written(value) else value
        met[id(value)] = value, twin  # before its children, which may lead back here
        met[id(value)] = value, _filled(twin, [replaced(child, change, met) for child in children.values()])
    return met[id(value)][1]


def _children(value: Any) -> Mapping[str, Any] | None:
    """What ``value`` is made of, by the step that leads there; None for a leaf."""
    if isinstance(value, (torch.Tensor, type, *PLAIN)):
        return None
    if dataclasses.is_dataclass(value):
        return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {f".{name}": item for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, list | tuple):
        return {f"[{number}]": item for number, item in enumerate(value)}
    if isinstance(value, dict):
        return {f"[{key!r}]": item for key, item in value.items()}
    leaves, spec = pytree.tree_flatten(value)
    if not spec.is_leaf():
        return {f"<{number}>": leaf for number, leaf in enumerate(leaves)}
    return {f".{name}": item for name, item in _parts(value).items()} or None


def _parts(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that matter to captured code: with tensors in them, or plain, also in a container."""
    return {name: item for name, item in _attributes(value).items() if _is_plain(item) or _holds_tensors(item)}


def _is_plain(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(item, PLAIN) for item in items)


def _is_written(value: Any) -> bool:
    """Whether captured code gets a copy, with tensors of its own. An object without tensors it gets itself."""
    return not _attributes(value) or _holds_tensors(value) or dataclasses.is_dataclass(value)


def _attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of an object, as far as they are looked at."""
    attributes = getattr(value, "__dict__", None)
    skipped = isinstance(value, (torch.Tensor, torch.nn.Module, type, *PLAIN)) or callable(value)
    return attributes if isinstance(attributes, dict) and not skipped else {}


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether there are tensors in ``value``, no deeper than ``depth`` containers and objects."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0:
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_holds_tensors(item, depth - 1) for item in (*inside, *_attributes(value).values()))


def _filled(twin: Any, items: Sequence[Any]) -> Any:
    """A copy, with other children than it was copied with."""
    if dataclasses.is_dataclass(twin):
        for field, item in zip(dataclasses.fields(twin), items, strict=True):
            object.__setattr__(twin, field.name, item)
        return twin
    if isinstance(twin, list):
        twin[:] = items
        return twin
    if isinstance(twin, dict):
        twin.update(zip(list(twin), items, strict=True))
        return twin
    spec = pytree.tree_structure(twin)
    if not spec.is_leaf():
        return pytree.tree_unflatten(list(items), spec)
    if _is_written(twin):
        twin.__dict__.update(zip(list(_parts(twin)), items, strict=True))
    return twin


@dataclass(frozen=True)
class _Leaf:
    """What a leaf must be again at replay."""

    path: str
    spec: TensorSpec | None
    value: Any
    """Of a plain leaf, or of a tensor on the host; the address, of a tensor that stays where it is."""
    group: int
    """Which fresh storage the tensor lies in; -1 for one that stays where it is."""
    offset: int = 0
    """Bytes from the group's first."""
    bits: tuple[bool, bool] = (False, False)
    """Whether a tensor is lazily conjugated, and negated."""


@dataclass(frozen=True)
class _Span:
    start: int
    """First byte in the storage at capture."""
    size: int
    first: int
    """Position of the leaf that the others are measured from."""


@dataclass(frozen=True)
class Parts:
    """A result as it was at capture: what has to be there again, and what is to be copied where."""

    name: str
    source: str
    leaves: tuple[_Leaf, ...]
    groups: tuple[tuple[int, ...], ...]
    """Leaves that share a fresh storage, by position."""
    spans: tuple[_Span | None, ...]
    """Where several leaves share a storage, the bytes that they lie in; None for one leaf alone."""
    host_only: bool = False

    @classmethod
    def of(
        cls, result: Any, known: Iterable[int], device: torch.device, name: str, source: str, host_only: bool
    ) -> Parts:
        """Take ``result`` apart. Tensors in storages with ``known`` keys stay where they are: they are aliases.

        Raises:
            CaptureError: a sparse tensor, a wrapper of tensors, or a container that is not looked into.
        """
        known = set(known)
        by_storage: dict[int, list[int]] = {}
        found = list(fields(result))
        for position, (path, leaf) in enumerate(found):
            if why := _why_not_written(leaf):
                raise CaptureError(
                    f"{name}: {f'field {path} of its' if path else 'its'} result is {why}, which cannot be written back",
                    where=source,
                    fix="return dense tensors, in tuples, lists, dicts, dataclasses or attributes of objects",
                )
            if isinstance(leaf, torch.Tensor) and leaf.device == device and _torch.storage_key(leaf) not in known:
                by_storage.setdefault(_torch.storage_key(leaf), []).append(position)
        group_of = {position: number for number, group in enumerate(by_storage.values()) for position in group}
        spans = tuple(_span([found[p][1] for p in group], group) for group in by_storage.values())
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
        return cls(name, source, tuple(leaves), tuple(map(tuple, by_storage.values())), spans, host_only)

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to check: the function returned None."""
        return len(self.leaves) == 1 and self.leaves[0].spec is None and self.leaves[0].value is None

    @property
    def is_one_tensor(self) -> bool:
        """Whether the result is one fresh tensor, as most are."""
        return len(self.leaves) == len(self.groups) == 1 and not self.leaves[0].path

    def fresh(self, result: Any) -> list[torch.Tensor]:
        """One tensor for each fresh storage: the leaf, or the bytes that several leaves lie in."""
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
            view = torch.empty(0, dtype=value.dtype, device=value.device)
            offset = leaf.offset // value.element_size()
            return _torch.with_lazy_bits(
                view.set_(place.untyped_storage(), offset, value.shape, value.stride()), leaf.bits
            )

        return replaced(result, change)

    def check(self, result: Any) -> tuple[torch.Tensor, ...]:
        """The fresh tensors of a result at replay.

        Raises:
            EagerOutputError: it cannot take the place of the result at capture; the text names the field.
        """
        if self.is_one_tensor and self.leaves[0].spec.accepts(result):  # type: ignore[union-attr]
            return (result,)
        found = list(fields(result))
        if [path for path, _ in found] != [leaf.path for leaf in self.leaves]:
            paths = ", ".join(path or "the result" for path, _ in found)
            raise self._failure(
                "", f"has the fields {paths}", ", ".join(leaf.path or "the result" for leaf in self.leaves)
            )
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
            is_tensor = isinstance(value, torch.Tensor)
            raise self._failure(
                path, f"is {TensorSpec.of(value) if is_tensor else type(value).__name__}", str(leaf.spec)
            )
        if isinstance(leaf.value, torch.Tensor):
            if not (self.host_only or torch.equal(value, leaf.value)):
                raise self._failure(path, "has other values on the host", "frozen there")
            return
        if leaf.group < 0 and value.data_ptr() != leaf.value and value.numel():
            raise self._failure(path, "is new memory", "memory that it was given, or that the capture knew")
        is_view = leaf.group < 0 or self.spans[leaf.group] is not None  # all others are copied by value
        if is_view and _torch.lazy_bits(value) != leaf.bits:
            raise self._failure(path, "is lazily conjugated or negated otherwise", "as a view of the same memory")

    def _check_group(self, group: tuple[int, ...], span: _Span, found: Sequence[tuple[str, Any]]) -> None:
        base = found[span.first][1]
        for position in group:
            path, value = found[position]
            apart = _byte_offset(value) - _byte_offset(base)
            if (
                _torch.storage_key(value) != _torch.storage_key(base)
                or apart != self.leaves[position].offset - self.leaves[span.first].offset
            ):
                raise self._failure(path, "lies elsewhere", f"a view of the same memory as {found[span.first][0]}")

    def _failure(self, path: str, got: str, wanted: str) -> EagerOutputError:
        where = f"field {path} of its result " if path else "its result "
        return EagerOutputError(
            f"{self.name}: {where}{got}, but was {wanted} when it was captured",
            where=self.source,
            fix="return the same structure at each call, or capture again; host_only=True allows other plain values",
        )


def _why_not_written(leaf: Any) -> str:
    """What a leaf is that captured code could use and that no replay would renew; empty for all others."""
    if isinstance(leaf, Iterator):
        return f"a {type(leaf).__name__}"
    if not isinstance(leaf, torch.Tensor):
        inside = () if isinstance(leaf, (torch.nn.Module, type, *PLAIN)) else gc.get_referents(leaf)
        holds = any(_holds_tensors(item, 1) for item in inside)
        return f"a {type(leaf).__name__} with tensors in it" if holds else ""
    if leaf.layout is not torch.strided:
        return "a sparse tensor"
    if type(leaf).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a tensor of the class {type(leaf).__name__}, which wraps others"
    return ""


def _is_same(value: Any, recorded: Any) -> bool:
    """Whether a plain leaf is what it was; of other objects only the type is compared."""
    if not isinstance(value, PLAIN):
        return type(value) is recorded
    both_nan = value != value and recorded != recorded
    return type(value) is type(recorded) and (value == recorded or both_nan)


def _byte_offset(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _span(tensors: Sequence[torch.Tensor], positions: Sequence[int]) -> _Span | None:
    """The bytes that several tensors of one storage lie in, measured from the first of them."""
    if len(tensors) == 1:
        return None
    start = min(map(_byte_offset, tensors))
    start -= start % ALIGNMENT
    end = max(_byte_offset(t) + t.element_size() * extent(t) for t in tensors)
    return _Span(start, end - start, positions[0])


def _bytes(first: torch.Tensor, span: _Span, offset: int) -> torch.Tensor:
    """The span in the storage of ``first``, which lies ``offset`` bytes into it."""
    octets = torch.empty(0, dtype=torch.uint8, device=first.device)
    return octets.set_(first.untyped_storage(), _byte_offset(first) - offset, (span.size,), (1,))
