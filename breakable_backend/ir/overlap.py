"""Whether tensors share bytes of memory, whatever storages they have.

Two storages may lie over one memory (NumPy, DLPack, another process), and one storage may hold unrelated tensors
(``kv[0]`` and ``kv[1]``).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch

from breakable_backend import _torch


@dataclass(frozen=True)
class Region:
    """The memory that a tensor lies in, in bytes. It does not hold the tensor."""

    start: int
    end: int
    """The address after the last byte; equal to ``start`` if there are no elements."""
    width: int
    """The number of bytes in one contiguous piece."""
    period: int
    """The distance in bytes between the beginnings of two pieces; 0 if there is only one."""
    written: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, written: bool = False, start: int | None = None) -> Region:
        """The region of a tensor with strides. ``start`` replaces its address, which a fake tensor lacks."""
        begin = tensor.data_ptr() if start is None else start
        if tensor.numel() == 0:
            return cls(begin, begin, 0, 0, written)
        length = _torch.extent(tensor.shape, tensor.stride()) * tensor.itemsize
        width, period = tensor.itemsize, 0
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            step = stride * tensor.itemsize
            if size > 1 and period == 0 and step <= width:
                width += (size - 1) * step
            elif size > 1:
                period = math.gcd(period, step)
        return cls(begin, begin + length, width, period, written)

    def may_share(self, other: Region) -> bool:
        """Whether an element of one may lie where an element of the other does.

        Interleaved tensors are told apart if their pieces repeat with the same period, as the columns of a table do.
        Otherwise they count as sharing memory.
        """
        if self.end <= other.start or other.end <= self.start:
            return False
        period = math.gcd(self.period, other.period)
        behind = (other.start - self.start) % period if period else 0
        return period == 0 or behind < self.width or period - behind < other.width

    def clashes(self, other: Region) -> bool:
        """Whether the two may share memory, and one of them is written."""
        return (self.written or other.written) and self.may_share(other)


def known_apart(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors in one storage, which may be fake, share no memory. False if sizes are symbolic."""
    numbers = [(tensor.storage_offset(), *tensor.shape, *tensor.stride()) for tensor in (first, second)]
    if not all(type(number) is int for of in numbers for number in of):
        return False
    one, other = (Region.of(t, start=int(t.storage_offset()) * t.itemsize) for t in (first, second))
    return not one.may_share(other)


class Fixed:
    """Regions that do not move, in order of their addresses."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self.regions = sorted((region for region in regions if region.end > region.start), key=lambda r: r.start)
        self.starts = [region.start for region in self.regions]
        self.longest = max((region.end - region.start for region in self.regions), default=0)
        self.reach = list(accumulate((region.end for region in self.regions), max))
        """For each region, the highest end of it and those before it."""

    def touches(self, start: int, end: int) -> bool:
        """Whether the span from ``start`` to ``end`` meets the span of a region, written or not."""
        before = bisect_left(self.starts, end)
        return before > 0 and self.reach[before - 1] > start

    def clashes(self, region: Region) -> bool:
        """Whether ``region`` may share memory with one of them, and one of the two is written."""
        first = bisect_left(self.starts, region.start - self.longest)
        last = bisect_left(self.starts, region.end)
        return any(other.clashes(region) for other in self.regions[first:last])


def any_touch(spans: Iterable[tuple[int, int]], fixed: Fixed) -> bool:
    """Whether any of many spans, each an address and a number of bytes, meets another one or a fixed region. Quick."""
    done = 0
    for start, length in sorted(spans):
        end = start + length
        if start < done or fixed.touches(start, end):
            return True
        done = end
    return False


def any_clash(moving: Iterable[Region], fixed: Fixed) -> bool:
    """Whether one of ``moving`` may share memory with another one or with a fixed region, and one of the two is written."""
    begun: list[Region] = []
    for region in sorted((region for region in moving if region.end > region.start), key=lambda r: r.start):
        begun = [other for other in begun if other.end > region.start]
        if fixed.clashes(region) or any(other.clashes(region) for other in begun):
            return True
        begun.append(region)
    return False
