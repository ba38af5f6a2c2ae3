"""How a tensor lies in memory: the one description, used by the whole package.

A :class:`TensorSpec` describes a tensor wherever its memory is. A :class:`Geometry` adds the place in a storage. A
:data:`Strided` has the arguments of ``as_strided``, as plain tuples, for code that Dynamo traces: Dynamo takes tuples
for constants, and objects not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from breakable_backend import _torch

if TYPE_CHECKING:
    import sympy

ANY = -1
"""Stands for a size or stride that is a symbol, and may be any number."""


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like to take the place of another one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Empty for a tensor without strides (a sparse tensor)."""
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor, symbols: Mapping[sympy.Symbol, int] | None = None) -> TensorSpec:
        """The spec of a tensor. Symbols become their values in ``symbols``; without ``symbols`` they stay symbols."""
        shape = tuple(tensor.shape)
        stride = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
        if symbols is not None:
            shape, stride = (tuple(_torch.evaluate(size, symbols) for size in sizes) for sizes in (shape, stride))
        return cls(shape, stride, tensor.dtype, tensor.device)

    def without_symbols(self) -> TensorSpec:
        """The same spec with ``ANY`` for each symbol."""
        return replace(self, shape=_numbers_of(self.shape), stride=_numbers_of(self.stride))

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` fits this spec. The stride of a dimension with at most one element does not matter."""
        if not isinstance(value, torch.Tensor) or value.dtype is not self.dtype or value.device != self.device:
            return False
        if value.layout is not torch.strided:
            return False
        shape = value.shape
        if shape != self.shape and not _match(self.shape, shape):
            return False
        steps = zip(shape, self.stride, value.stride(), strict=True)
        return 0 in shape or all(mine in (theirs, ANY) or size == 1 for size, mine, theirs in steps)

    def quick_check(self) -> Callable[[Any], bool]:
        """A quick check that only tensors of this spec pass, but not all of them: 0.14 us (:meth:`accepts` takes 0.7).

        It refuses parameters, tensors of another mode, and those that are lazily conjugated.
        """
        inference = torch.is_inference_mode_enabled()
        memory = _torch.storage_at(0, 1 << 60, self.device)  # nobody reads an element of this memory
        return _torch.tensors_like([Geometry(self, 0, inference=inference).on(memory)])

    def empty(self) -> torch.Tensor:
        """A new tensor of this spec."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        shape, stride = (", ".join("?" if size == ANY else str(size) for size in s) for s in (self.shape, self.stride))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}] with stride [{stride}] on {self.device}"


def _numbers_of(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(size if type(size) is int else ANY for size in sizes)


def _match(wanted: Sequence[int], sizes: Sequence[int]) -> bool:
    return len(wanted) == len(sizes) and all(want in (ANY, size) for want, size in zip(wanted, sizes, strict=True))


@dataclass(frozen=True)
class Geometry:
    """How a tensor lies in its storage."""

    spec: TensorSpec
    offset: Any
    """Elements between the beginning of the storage and the first element of the tensor."""
    lazy: tuple[bool, bool] = (False, False)
    """Whether reading the tensor conjugates, and whether it negates, what is in memory."""
    inference: bool = False
    """Whether the tensor was made in inference mode."""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        """The geometry of a tensor with strides. The tensor is not kept."""
        return cls(TensorSpec.of(tensor), tensor.storage_offset(), _torch.lazy_bits(tensor), tensor.is_inference())

    @property
    def in_memory(self) -> tuple[Any, ...]:
        """What distinguishes it from others in the same storage: everything but the inference mode."""
        return self.spec, self.offset, self.lazy

    @property
    def read_as(self) -> tuple[Any, ...]:
        """How the elements in memory are read. A view has the same."""
        return self.spec.dtype, self.lazy

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """A tensor of this geometry on ``storage``."""
        spec = self.spec
        with torch.inference_mode(self.inference), torch.no_grad():
            made = torch.empty(0, dtype=spec.dtype, device=spec.device)
            return _torch.with_lazy_bits(made.set_(storage, self.offset, spec.shape, spec.stride), self.lazy)

    def whole(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """All of ``storage``, as one dimension of elements of this dtype."""
        count = storage.nbytes() // self.spec.dtype.itemsize
        return Geometry(replace(self.spec, shape=(count,), stride=(1,)), 0, inference=self.inference).on(storage)


def numbers_in(value: Any) -> tuple[Any, ...]:
    """The sizes and the strides of a tensor, or a number."""
    return (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)


Strided = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and storage offset, in elements: the arguments of ``as_strided``."""


def strided(tensor: torch.Tensor) -> Strided:
    """The :data:`Strided` of a tensor. A symbolic size becomes a number, and Dynamo guards on it."""
    return tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())), int(tensor.storage_offset())


def non_owning(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same geometry at the same address that does not keep the memory alive."""
    return Geometry.of(tensor).on(_torch.unowned_storage(tensor.untyped_storage()))


def dense_order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions from the outermost in memory to the innermost; None if there are gaps between elements."""
    order = sorted(range(len(shape)), key=lambda dim: (-stride[dim], shape[dim] == 1, dim))
    steps = dense_strides(shape, order)
    fits = all(shape[dim] == 1 or steps[dim] == stride[dim] for dim in order)
    return tuple(order) if fits or 0 in shape else None


def dense_strides(shape: Sequence[Any], order: Sequence[int] | None = None) -> tuple[Any, ...]:
    """The strides of a tensor without gaps, whose dimensions are in this order in memory; None: in their own."""
    steps, step = [1] * len(shape), 1
    for dim in reversed(range(len(shape)) if order is None else order):
        steps[dim] = step
        step = step * (1 if type(shape[dim]) is int and shape[dim] == 0 else shape[dim])
    return tuple(steps)


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: the step of some dimension is too short for the dimensions inside it."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < reach:
            return tensor.numel() > 0
        reach = stride * (size - 1) + reach
    return False


def extent(tensor: torch.Tensor) -> int:
    """How many elements lie between the first and the last element of a tensor, both included."""
    return int(_torch.extent(tensor.shape, tensor.stride()))


STRIDED = _torch.aten("as_strided as_strided_copy as_strided_scatter")
"""Ops that read memory by an offset from the beginning of a storage."""


def has_gaps(tensor: torch.Tensor) -> bool:
    """Whether memory lies between the elements of a tensor whose sizes are numbers."""
    return tensor.numel() < extent(tensor)


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that a tensor spans, as one dimension."""
    return tensor.as_strided((extent(tensor),), (1,), tensor.storage_offset())
