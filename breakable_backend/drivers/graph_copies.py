"""Copies that a captured graph makes by itself: into its bridges, at its head, and of large results to the caller.

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
    """Whether the elements are not what lies in memory."""
    return tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor()


class Fed:
    """One such copy; see :class:`breakable_backend.drivers.Feed`. It holds neither the bridge nor a value.

    Args:
        bridge: the target.
        value: the source of the first launch.
        point: makes launches from the next on copy from an address.
    """

    def __init__(self, bridge: torch.Tensor, value: torch.Tensor, point: Callable[[int], None]) -> None:
        self._spec, self._target, self._point = TensorSpec.of(bridge), bridge.data_ptr(), point
        self.source, self.copies = value.data_ptr(), 1

    def take(self, value: torch.Tensor) -> torch.Tensor | None:
        held = None
        self.source = 0  # if this fails half-way, the next value is taken in any case
        if _is_lazy(value) or not self._spec.accepts(value):
            held = value = self._spec.empty().copy_(value)  # in the bridge's layout
        self._point(value.data_ptr())
        self.source = value.data_ptr()
        self.copies = int(self.source != self._target)
        return held

    def copy(self) -> None:
        """Copy now, for drivers that run a graph op by op."""
        if self.copies:
            self._at(self._target).copy_(self._at(self.source))

    def _at(self, address: int) -> torch.Tensor:
        """The bytes at an address."""
        spec = self._spec
        return _bytes_at(address, torch.Size(spec.shape).numel() * spec.dtype.itemsize, spec.device)


class LetOut:
    """A copy of a result to the caller's memory; see :class:`breakable_backend.drivers.Outlet`.

    Args:
        target: where the first launch copies to. It is not held.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self.target, self._size = target.data_ptr(), target.numel() * target.element_size()
        self.point: Callable[[int], None] = lambda _: None
        """Makes launches from the next on copy to an address."""

    def lead(self, address: int) -> None:
        self.target = 0  # if this fails half-way, the next address is set in any case
        self.point(address)
        self.target = address

    def __call__(self, value: torch.Tensor) -> None:
        """Copy now, for drivers that run a graph op by op."""
        octets = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
        _bytes_at(self.target, self._size, value.device).copy_(octets[: self._size])


def _bytes_at(address: int, size: int, device: torch.device) -> torch.Tensor:
    octets = torch.empty(0, dtype=torch.uint8, device=device)
    return octets.set_(_torch.storage_at(address, size, device))
