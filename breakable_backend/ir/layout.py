"""How tensors lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from breakable_backend import _torch

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like to take the place of a recorded one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor, symbols: Mapping[sympy.Symbol, int] | None = None) -> TensorSpec:
        """The spec of a real tensor, or of a fake one whose symbols have the given values."""
        known = symbols or {}
        return cls(
            tuple(_torch.evaluate(size, known) for size in tensor.shape),
            tuple(_torch.evaluate(stride, known) for stride in tensor.stride()),
            tensor.dtype,
            tensor.device,
        )

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is such a tensor. The stride of a dimension with at most one element says nothing."""
        if not isinstance(value, torch.Tensor) or value.dtype is not self.dtype or value.device != self.device:
            return False
        if tuple(value.shape) != self.shape or 0 in self.shape:
            return tuple(value.shape) == self.shape
        return all(
            mine == theirs or size == 1
            for size, mine, theirs in zip(self.shape, self.stride, value.stride(), strict=True)
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.shape)} with stride {list(self.stride)} on {self.device}"


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: some dimension is too short a step for those inside it."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < reach:
            return tensor.numel() > 0
        reach = stride * (size - 1) + reach
    return False


def extent(tensor: torch.Tensor) -> int:
    """How many elements lie between a tensor's first and last element, both included."""
    return int(_torch.extent(tensor.shape, tensor.stride()))


def flattened(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that a tensor spans, as one dimension."""
    return tensor.as_strided((extent(tensor),), (1,), tensor.storage_offset())
