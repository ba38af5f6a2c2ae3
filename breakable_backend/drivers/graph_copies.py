"""Copies at the head of a captured segment, by which the graph itself loads its bridges from wherever the values lie.

A copy in the graph takes no host time if the value lies where it lay in the call before, as results of eager steps
mostly do. Otherwise it takes one call that changes the address in the graph. A copy before the launch would take a call
each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import TensorSpec


def can_be_fed(bridge: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether ``value`` can be copied into ``bridge`` byte by byte: both are dense, on one device, and of one layout."""
    return (
        value.layout is torch.strided
        and bridge.numel() > 0
        and not _is_lazy(value)
        and not _is_lazy(bridge)
        and TensorSpec.of(bridge).accepts(value)
        and _torch.extent(bridge.shape, bridge.stride()) == bridge.numel()
    )


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


class Fed:
    """One such copy; see :class:`breakable_backend.drivers.Feed`. It holds neither the bridge nor a value.

    Args:
        bridge: the target.
        value: the source of the first launch.
        point: makes launches from the next on copy from an address; returns False if that is impossible.
    """

    def __init__(self, bridge: torch.Tensor, value: torch.Tensor, point: Callable[[int], bool]) -> None:
        self._spec, self._target, self._point = TensorSpec.of(bridge), bridge.data_ptr(), point
        self.source, self.copies = value.data_ptr(), 1

    def take(self, value: torch.Tensor) -> torch.Tensor | None:
        held = None
        self.source = 0  # if this fails half-way, the next value is taken in any case
        if _is_lazy(value) or not self._spec.accepts(value):
            held = value = self._laid_out(value)
        if not self._point(value.data_ptr()):  # the memory is of another kind than that of the first value
            held = value = self._laid_out(value)
            assert self._point(value.data_ptr()), "a graph takes no memory of torch's own to copy from"
        self.source = value.data_ptr()
        self.copies = int(self.source != self._target)
        return held

    def _laid_out(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of ``value`` in the bridge's layout."""
        return self._spec.empty().copy_(value)

    def copy(self) -> None:
        """Copy now, for drivers that run a graph op by op."""
        if self.copies:
            self._at(self._target).copy_(self._at(self.source))

    def _at(self, address: int) -> torch.Tensor:
        """The bytes at an address."""
        spec = self._spec
        size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        octets = torch.empty(0, dtype=torch.uint8, device=spec.device)
        return octets.set_(_torch.storage_at(address, size, spec.device))
