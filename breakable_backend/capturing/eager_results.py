"""Results of eager steps under ``capture``: objects of any kind, taken apart into their fields.

At the capture the fresh tensors of a result are copied to memory with a fixed address, and the result is put together
again on that memory. Each replay checks its result, and copies it there. In compiled code results are of fewer kinds, and
Dynamo traces how they are put together: :mod:`breakable_backend.marks.results`.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.errors import CaptureError, EagerOutputError
from breakable_backend.ir.layout import TensorSpec, extent
from breakable_backend.ir.overlap import Fixed, Region
from breakable_backend.ir.running_ops import has_memory, no_strided_memory
from breakable_backend.marks.results import fresh_groups, in_memory_of

ALIGNMENT = 256
"""In bytes. Views of one storage that are kept together keep the alignment that the allocator gave them."""


PLAIN = (
    *(int, float, bool, str, type(None), complex, bytes, enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""The types that are compared by value."""


# --- the fields of a result ---------------------------------------------------------------------------------------------


def fields(value: Any, path: str = "", met: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """The leaves of a result, each with its path first (``[0].scores``)."""
    met = {} if met is None else met
    children = _children(value)
    if children is None:
        yield path, value
    elif isinstance(value, tuple) or id(value) not in met:
        met[id(value)] = value
        for step, child in children.items():
            yield from fields(child, path + step, met)


def replaced(value: Any, change: Callable[[Any], Any], met: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """``value`` with other leaves, in the order of :func:`fields`. Containers that can be written are copied, once each."""
    met = {} if met is None else met
    children = _children(value)
    if children is None:
        return change(value)
    if isinstance(value, tuple):
        items = [replaced(child, change, met) for child in children.values()]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if id(value) not in met:
        twin = copy.copy(value) if _is_written(value) else value
        met[id(value)] = value, twin  # stored before the children, which may lead back here
        met[id(value)] = value, _filled(twin, [replaced(child, change, met) for child in children.values()])
    return met[id(value)][1]


def _children(value: Any) -> Mapping[str, Any] | None:
    """The parts of ``value``, each with the step that leads to it; None for a leaf."""
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
    """The attributes of an object that matter to captured code: those with tensors or plain values in them."""
    return {name: item for name, item in _attributes(value).items() if _is_plain(item) or holds_tensors(item)}


def _is_plain(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(item, PLAIN) for item in items)


def _is_written(value: Any) -> bool:
    """Whether captured code gets a copy with other tensors. It gets an object without tensors itself."""
    return not _attributes(value) or holds_tensors(value) or dataclasses.is_dataclass(value)


def _attributes(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that are looked at."""
    attributes = getattr(value, "__dict__", None)
    skipped = isinstance(value, (torch.Tensor, torch.nn.Module, type, *PLAIN)) or callable(value)
    return attributes if isinstance(attributes, dict) and not skipped else {}


def holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether ``value`` contains tensors, at most ``depth`` containers and objects deep."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0:
        return False
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(holds_tensors(item, depth - 1) for item in (*inside, *_attributes(value).values()))


def _filled(twin: Any, items: Sequence[Any]) -> Any:
    """A copy with other children."""
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


def tensors_on(device: torch.device, tree: Any) -> list[torch.Tensor]:
    """The tensors in ``tree`` that have memory on ``device``."""
    leaves = (leaf for _, leaf in fields(tree) if isinstance(leaf, torch.Tensor))
    return [leaf for leaf in leaves if leaf.device == device and leaf.layout is torch.strided]


def on_known_memory(result: Any, given: Sequence[torch.Tensor]) -> Any:
    """``result`` with the tensors that lie in the memory of an argument in that argument's storage.

    Raises:
        Unholdable: one lies around the memory of an argument.
    """
    tensors = [leaf for _, leaf in fields(result) if has_memory(leaf)]
    placed = {id(tensor): in_memory_of(given, tensor) for tensor in tensors}
    if all(placed[id(tensor)] is tensor for tensor in tensors):
        return result
    return replaced(result, lambda leaf: placed.get(id(leaf), leaf))


# --- a result at the capture, and in replays -----------------------------------------------------------------------------


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
class Parts:
    """A result at the capture: what a replay has to return again, and what is copied where."""

    name: str
    source: str
    leaves: tuple[_Leaf, ...]
    groups: tuple[tuple[int, ...], ...]
    """For each fresh storage, the positions of the leaves in it."""
    sizes: tuple[int | None, ...]
    """If several leaves share a storage, how many bytes they lie in; None for a single leaf."""
    host_only: bool = False
    apart: bool = False
    given: tuple[torch.Tensor | Region, ...] = ()
    """The arguments, or where they lie. A fresh result lies elsewhere than these, unless each is copied by itself."""
    places: Fixed = field(default_factory=Fixed)
    """Where the arguments lay at the capture."""

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
        given: Sequence[torch.Tensor | Region] = (),
    ) -> Parts:
        """Take ``result`` apart. Tensors in storages with ``known`` keys are aliases, and are not copied.

        ``given``: what the function is called with in each replay. Of a tensor whose memory does not move, its region.

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
        spans = [_span([found[p][1] for p in group]) for group in groups]
        leaves = []
        for position, (path, leaf) in enumerate(found):
            if not isinstance(leaf, torch.Tensor):
                leaves.append(_Leaf(path, None, leaf if isinstance(leaf, PLAIN) else type(leaf), -1))
                continue
            group = group_of.get(position, -1)
            value: Any = leaf.data_ptr() if leaf.device == device else leaf.clone()
            start, size = spans[group] if group >= 0 else (0, None)
            offset = _byte_offset(leaf) - start if size is not None else 0
            leaves.append(_Leaf(path, TensorSpec.of(leaf), value, group, offset, _torch.lazy_bits(leaf)))
        given, places = ((), Fixed()) if apart else (tuple(given), _places(given))
        sizes = tuple(size for _, size in spans)
        return cls(name, source, tuple(leaves), tuple(map(tuple, groups)), sizes, host_only, apart, given, places)

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
            tensors[first] if size is None else _bytes(tensors[first], size, self.leaves[first].offset)
            for (first, *_), size in zip(self.groups, self.sizes, strict=True)
        ]

    def on(self, result: Any, places: Sequence[torch.Tensor]) -> Any:
        """``result`` with its fresh tensors on ``places``, aliases kept."""
        numbers = iter(self.leaves)

        def change(value: Any) -> Any:
            leaf = next(numbers)
            if leaf.group < 0 or not isinstance(value, torch.Tensor):
                return value
            place = places[leaf.group]
            if self.sizes[leaf.group] is None:
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
        if self.is_one_tensor and self.leaves[0].spec.accepts(result) and not self._is_given(result):  # type: ignore[union-attr]
            return (result,)
        found = list(fields(result))
        if [path for path, _ in found] != [leaf.path for leaf in self.leaves]:
            got = ", ".join(path or "the result" for path, _ in found)
            wanted = ", ".join(leaf.path or "the result" for leaf in self.leaves)
            raise self._failure("", f"has the fields {got}", wanted)
        for leaf, (path, value) in zip(self.leaves, found, strict=True):
            self._check_leaf(leaf, path, value)
        for group in self.groups:
            if len(group) > 1:
                self._check_group(group, found)
        fresh = tuple(self.fresh(result))
        if not self.apart and len(set(map(_torch.storage_key, fresh))) < len(fresh):
            raise self._failure("", "is tensors that share memory", "tensors that did not")
        return fresh

    def _is_given(self, value: torch.Tensor) -> bool:
        """Whether a result lies in the memory of an argument."""
        start = value.data_ptr()
        # An argument may have got other memory since the capture (x.data = ...), and the result the old memory.
        return self.places.touches(start, start + 1) and _places(self.given).touches(start, start + 1)

    def _check_leaf(self, leaf: _Leaf, path: str, value: Any) -> None:
        if leaf.spec is None:
            if not (self.host_only or _is_same(value, leaf.value)):
                raise self._failure(path, f"is {value!r}", repr(leaf.value))
            return
        if not leaf.spec.accepts(value):
            got = TensorSpec.of(value) if isinstance(value, torch.Tensor) else type(value).__name__
            raise self._failure(path, f"is {got}", str(leaf.spec))
        if isinstance(leaf.value, torch.Tensor):
            if not (self.host_only or value.is_meta or torch.equal(_octets(value), _octets(leaf.value))):
                raise self._failure(path, "has other values on the host", "frozen there")
            return
        if leaf.group < 0 and value.data_ptr() != leaf.value and value.numel():
            raise self._failure(path, "is new memory", "memory that it was given, or that the capture knew")
        if leaf.group >= 0 and self._is_given(value):
            raise self._failure(path, "is memory that it was given", "new memory")
        is_view = leaf.group < 0 or self.sizes[leaf.group] is not None  # other tensors are copied by value
        if is_view and _torch.lazy_bits(value) != leaf.bits:
            raise self._failure(path, "is lazily conjugated or negated otherwise", "as a view of the same memory")

    def _check_group(self, group: tuple[int, ...], found: Sequence[tuple[str, Any]]) -> None:
        """Raise if tensors that share memory lie otherwise, measured from the first of them."""
        first_path, base = found[group[0]]
        for position in group[1:]:
            path, value = found[position]
            apart = self.leaves[position].offset - self.leaves[group[0]].offset
            is_together = _torch.storage_key(value) == _torch.storage_key(base)
            if not is_together or _byte_offset(value) - _byte_offset(base) != apart:
                raise self._failure(path, "lies elsewhere", f"a view of the same memory as {first_path}")

    def _failure(self, path: str, got: str, wanted: str) -> EagerOutputError:
        where = f"field {path} of its result " if path else "its result "
        return EagerOutputError(
            f"{self.name}: {where}{got}, but was {wanted} when it was captured",
            where=self.source,
            fix="return the same structure at each call, or capture again; host_only=True allows other plain values",
        )


def _places(given: Iterable[torch.Tensor | Region]) -> Fixed:
    """Where the arguments lie now."""
    return Fixed(Region.of(one) if isinstance(one, torch.Tensor) else one for one in given)


def _why_not_written(leaf: Any) -> str:
    """What a leaf is if captured code could use it and no replay would renew it; otherwise empty."""
    if isinstance(leaf, Iterator):
        return f"a {type(leaf).__name__}"
    if not isinstance(leaf, torch.Tensor):
        inside = () if isinstance(leaf, (torch.nn.Module, type, *PLAIN)) else gc.get_referents(leaf)
        holds = any(holds_tensors(item, 1) for item in inside)
        return f"a {type(leaf).__name__} with tensors in it" if holds else ""
    if what := no_strided_memory(leaf):
        return what
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


def _span(tensors: Sequence[torch.Tensor]) -> tuple[int, int | None]:
    """The bytes that several tensors of one storage lie in: the first, and how many. None for a single tensor."""
    if len(tensors) == 1:
        return 0, None
    start = min(map(_byte_offset, tensors))
    start -= start % ALIGNMENT
    end = max(_byte_offset(t) + t.element_size() * extent(t) for t in tensors)
    return start, end - start


def _bytes(first: torch.Tensor, size: int, offset: int) -> torch.Tensor:
    """The ``size`` bytes in the storage of ``first`` that begin ``offset`` bytes before it."""
    octets = torch.empty(0, dtype=torch.uint8, device=first.device)
    return octets.set_(first.untyped_storage(), _byte_offset(first) - offset, (size,), (1,))
