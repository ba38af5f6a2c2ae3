"""Whether a written argument of a call shares memory with another argument.

Dynamo does not guard on this. A bridge would not see a write through the other argument. Two static inputs may share
memory, since they are used at their addresses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from breakable_backend.calling.keys import AddressSet, is_open
from breakable_backend.ir.mappings import places_in_files
from breakable_backend.ir.overlap import Fixed, Region, any_clash, any_touch
from breakable_backend.ir.program import Program

NOWHERE: Mapping[int, int] = MappingProxyType({})


class SharedMemory:
    """Compares the arguments of one program, of which those named in ``written`` are written."""

    def __init__(self, program: Program, written: Collection[str]) -> None:
        self._static = [(value.index, value.name in written) for value in program.inputs if value.kind == "static"]
        moving = [v for v in program.inputs if v.kind == "tensor" and v.value.layout is torch.strided]
        moving = moving if any(value.name in written for value in program.inputs) else []
        self.moving = {value.index: value.name in written for value in moving}
        """Inputs that may lie elsewhere in each call, each with whether it is written; empty if no input is written."""
        self._on_host = any(value.value.device.type == "cpu" for value in moving)
        self._open = [value.index for value in moving if is_open(value.value)]
        self._lengths = [] if self._open else [Region.of(value.value, start=0).end for value in moving]

    def fixed(self, args: Sequence[Any], places: Mapping[int, int] = NOWHERE) -> Fixed:
        """The memory regions of the static inputs. ``places`` replaces addresses of memory that is mapped twice."""
        return Fixed(_region(args[index], written, places) for index, written in self._static)

    def is_written(self, args: Sequence[Any], addresses: AddressSet | None) -> bool:
        """Whether memory that two arguments share is written. Most calls find their arguments where the last one did."""
        data_ptr = torch.Tensor.data_ptr
        places = [data_ptr(args[index]) for index in self.moving]
        layouts = [(args[index].shape, args[index].stride()) for index in self._open]
        if addresses is not None and (places, layouts) == addresses.apart:
            return False
        in_files = self._places_in_files(args) if self._on_host else NOWHERE
        fixed = addresses.fixed if addresses is not None and not in_files else self.fixed(args, in_files)
        if in_files or self._open or any_touch(zip(places, self._lengths, strict=True), fixed):
            moving = (_region(args[index], written, in_files) for index, written in self.moving.items())
            if any_clash(moving, fixed):
                return True
        if addresses is not None:
            addresses.apart = places, layouts
        return False

    def _places_in_files(self, args: Sequence[Any]) -> Mapping[int, int]:
        """For arguments on the host in memory that may be mapped twice, their places in its file, by address.

        PyTorch's own memory, which it can resize, is mapped once. Other memory is rare.
        """
        inputs = (args[index] for index in (*self.moving, *(index for index, _ in self._static)))
        on_host = (tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu")
        foreign = [tensor.data_ptr() for tensor in on_host if not tensor.untyped_storage().resizable()]
        return places_in_files(foreign) if len(foreign) > 1 else NOWHERE


def _region(tensor: torch.Tensor, written: bool, places: Mapping[int, int]) -> Region:
    return Region.of(tensor, written, places.get(tensor.data_ptr()) if places else None)
