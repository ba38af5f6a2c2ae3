"""Copies into bridges, which are storages with a fixed address, and back to inputs that a captured segment has written.

:mod:`breakable_backend.recordings.recorder` says which inputs have a bridge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import Geometry, TensorSpec, extent, flattened, overlaps

KEPT_INPUT = 1 << 16
"""In bytes. The bridge of an input up to this size keeps its memory between calls. So it holds the input of the last
call, with which measurements replay."""


ALIGNMENT = 16
"""In bytes. Libraries choose kernels by whether an address is a multiple of this, as cuDNN does for convolutions of a
slice. The sums of these kernels differ in the last bits. Addresses from the allocator are multiples of more."""


@dataclass(frozen=True)
class Bridge:
    """Storage of this package through which a value enters captured segments from outside.

    It has the shape and strides of the value that it was made for. Its address does not change as long as the recording
    that owns it lives.
    """

    tensor: torch.Tensor
    flat: torch.Tensor | None
    """The whole memory as one dimension, if elements of ``tensor`` share memory (an expanded value)."""
    bits: torch.dtype | None = None
    """The dtype that copies use for the elements, if they may not support the real one."""

    @classmethod
    def like(cls, value: torch.Tensor, device: torch.device) -> Bridge:
        """An empty bridge for ``value``, with its alignment; see :data:`ALIGNMENT`."""
        begin = value.data_ptr() % ALIGNMENT if value.numel() else 0
        octets = torch.empty(begin + extent(value) * value.element_size(), dtype=torch.uint8, device=device)
        # The storage itself begins there, without an offset, since views inside of segments count from its beginning.
        storage = _torch.storage_of(octets[begin:]) if begin else octets.untyped_storage()
        lies = Geometry(replace(TensorSpec.of(value), device=octets.device), 0)
        return cls(lies.on(storage), lies.whole(storage) if overlaps(value) else None, copied_as(value))

    @classmethod
    def zeros(cls, value: torch.Tensor) -> Bridge:
        """A bridge for ``value`` on the same device, filled with zeros."""
        bridge = cls.like(value, value.device)
        (bridge.tensor if bridge.flat is None else bridge.flat).zero_()
        return bridge

    @property
    def num_bytes(self) -> int:
        """Bytes of memory from the first element to the last."""
        return extent(self.tensor) * self.tensor.element_size()

    def on(self, storage: torch.UntypedStorage) -> Bridge:
        """The same bridge on another storage over its memory."""
        tensor, flat = (t if t is None else Geometry.of(t).on(storage) for t in (self.tensor, self.flat))
        assert tensor is not None
        return Bridge(tensor, flat, self.bits)

    def load(self, source: torch.Tensor) -> int:
        """Copy ``source`` in, unless it lies at the bridge's address already. Returns the number of copies, 0 or 1."""
        if source.data_ptr() == self.tensor.data_ptr():
            return 0
        if self.bits is not None:
            _copy(*self._ends(source))
        elif self.flat is None:
            self.tensor.copy_(source)
        else:
            self.flat.copy_(flattened(source))
        return 1

    def store(self, target: torch.Tensor) -> int:
        """Copy the bridge back to ``target``, the tensor that it was loaded from."""
        if self.bits is not None:
            _copy(*reversed(self._ends(target)))
        elif self.flat is None:
            target.copy_(self.tensor)
        else:
            flattened(target).copy_(self.flat)
        return 1

    def _ends(self, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bridge and the tensor that it is loaded from, as a copy takes them."""
        return (self.tensor, other) if self.flat is None else (self.flat, flattened(other))


def inside(value: Any) -> Any:
    """The tensor of a bridge; any other value itself."""
    return value.tensor if isinstance(value, Bridge) else value


_COPIED = frozenset(
    getattr(torch, name)
    for name in "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128".split()
)
"""Dtypes that each copy supports. Fused copies do not support ``complex32`` and ``uint64`` (torch 2.11, CUDA)."""
_ROUNDED = frozenset({torch.float16, torch.bfloat16})
"""Dtypes that a fused copy converts to float32 and back. The bits of a signalling NaN change (torch 2.11, CUDA)."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copied_as(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that copies use for the elements of ``tensor``; None for its own."""
    return None if tensor.dtype in _COPIED else _BITS[tensor.element_size()]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """``target.copy_(source)`` for all dtypes."""
    if target.is_conj() or source.is_conj() or target.is_neg() or source.is_neg():
        target.copy_(source)
    else:
        bits = _BITS[target.element_size()]
        target.view(bits).copy_(source.view(bits))


def fused_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a fused copy uses for elements, so that all bits are kept."""
    return torch.int16 if dtype in _ROUNDED else dtype


def load_all(bridges: Sequence[Bridge], sources: Sequence[torch.Tensor]) -> int:
    """Load several bridges, with one launch for each dtype and pair of devices. Returns the number of copies."""
    groups: dict[tuple[Any, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    rare = 0
    for bridge, source in zip(bridges, sources, strict=True):
        if bridge.bits is not None:
            rare += bridge.load(source)
        elif source.data_ptr() != bridge.tensor.data_ptr():
            targets, values = groups[source.dtype, source.device]
            targets.append(bridge.tensor if bridge.flat is None else bridge.flat)
            values.append(source if bridge.flat is None else flattened(source))
    for (dtype, _), (targets, values) in groups.items():
        if (bits := fused_as(dtype)) is not dtype and len(targets) > 1:  # this takes 2 us more for each tensor (H100)
            targets = [target.view(bits) for target in targets]
            values = [value.view(bits) for value in values]
        _torch.foreach_copy(targets, values)
    return rare + sum(len(targets) for targets, _ in groups.values())


def clones_exactly(tensor: torch.Tensor) -> bool:
    """Whether ``tensor.clone()`` equals :func:`clone_exact`, for all tensors of this layout."""
    lazy = tensor.is_neg() or tensor.is_conj()
    if lazy or tensor.dtype not in _COPIED or overlaps(tensor) or tensor.layout is not torch.strided:
        return False
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def clone_exact(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in its own storage, with the same strides. ``clone`` keeps strides only if the memory has no gaps."""
    if tensor.is_neg():  # lazily negated, or conjugated: copy the memory, and set the same bits on the copy
        return _torch.negated_view(clone_exact(_torch.negated_view(tensor)))
    if tensor.is_conj():
        return clone_exact(tensor.conj()).conj()
    if tensor.dtype not in _COPIED:
        return clone_exact(tensor.view(_BITS[tensor.element_size()])).view(tensor.dtype)
    if overlaps(tensor):
        return flattened(tensor).clone().as_strided(tensor.shape, tensor.stride())
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)
