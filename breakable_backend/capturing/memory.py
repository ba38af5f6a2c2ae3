"""The memory of a capture in progress: what the body of the ``with`` statement reads, makes and writes, and the bridges.

Memory that segments make belongs to the pool, and lives as long as the body refers to it. Memory from outside is held as
long as the graph lives, except that of parameters, which belong to the model. A replay finds a tensor from outside where
it was, and as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from breakable_backend import _torch
from breakable_backend.capturing.graph import Gradient, Outside
from breakable_backend.drivers import SessionDriver
from breakable_backend.errors import CaptureError, user_line
from breakable_backend.ir.effects import written_values
from breakable_backend.ir.layout import STRIDED, has_gaps
from breakable_backend.ir.running_ops import memory_on
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.recording import Held

REACHING = STRIDED | _torch.aten("as_strided_ resize_")
"""Ops that read memory beside the elements of their argument."""
FIX = "let it run between two segments: put it into a function marked with @eager_on_graph"


@dataclass(frozen=True)
class Written:
    """A tensor that an op writes, and its place before or after that."""

    tensor: torch.Tensor
    key: int
    memory: tuple[int, int]
    """The address and the size of its storage."""
    lies: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Written:
        storage = tensor.untyped_storage()
        lies = tensor.shape, tensor.stride(), tensor.storage_offset()
        return cls(tensor, _torch.storage_key(tensor), (storage.data_ptr(), storage.nbytes()), lies)


class CaptureMemory:
    """What the body of a capture has read, made and written so far.

    Args:
        driver: has the pool.
        keep: whether all that is made is held.
    """

    def __init__(self, driver: SessionDriver, keep: bool) -> None:
        self.driver, self.keep = driver, keep
        self.made: dict[int, _torch.StorageWeakRef] = {}
        """Storages in pool memory: made in segments, and bridges. The weak references keep the keys from being used again.

        Whoever refers to a storage keeps its memory. Once nobody does, segments that are captured later may get it, since
        each replay makes the value anew before it is read, in the same order.
        """
        self.bridges: set[int] = set()
        """Those among them that are bridges."""
        self.in_parts: dict[int, bool] = {}
        """Bridges of tensors that did not begin at the beginning of their storage, or that have memory between their
        elements; and whether they have that."""
        self.most = Held()
        """The most of their memory that is needed at the same time."""
        self.places: dict[int, torch.UntypedStorage] = {}
        """What replays have in place of those storages, so that aliases are aliases there too."""
        self.held: dict[int, Any] = {}
        """Storages from outside, which are held as long as the graph lives."""
        self.tensors: dict[int, torch.Tensor] = {}
        """A tensor in each of them, a parameter if there is one. Held while capturing. Afterwards its memory is watched."""
        self.reshaped: dict[int, tuple[Written, str, str]] = {}
        """Tensors from outside with other shapes or strides, by identity: how they were, the first such op, and its line."""
        self.written: dict[int, _torch.StorageWeakRef] = {}
        """Storages from outside that segments write."""
        self.outside: dict[int, Outside] = {}
        """Tensors whose memory is held or watched, by the key of their storage."""

    # what ops do

    def reads(self, tensor: torch.Tensor) -> None:
        """A segment takes ``tensor``."""
        key = _torch.storage_key(tensor)
        outside = key not in self.made
        if outside and key not in self.outside:
            address = tensor.untyped_storage().data_ptr()
            self.outside[key] = Outside(weakref.ref(tensor), address, user_line())
        if outside or self.keep:
            self.held[key] = tensor.untyped_storage()
        if outside and (isinstance(tensor, nn.Parameter) or (tensor.grad_fn is None and key not in self.tensors)):
            self.tensors[key] = tensor

    def makes(self, tensor: torch.Tensor) -> None:
        """A segment has made ``tensor``, or an alias of what it takes."""
        key = _torch.storage_key(tensor)
        if key not in self.made and key not in self.held:
            self.made[key] = _torch.StorageWeakRef(tensor.untyped_storage())

    def writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Written]:
        """What an op is about to write."""
        if not isinstance(func, _torch.OpOverload):
            return []
        written = [Written.of(t) for t in memory_on(self.driver.device, written_values(func, args, kwargs))]
        for before in written:
            if before.key not in self.made:
                self.written[before.key] = _torch.StorageWeakRef(before.tensor.untyped_storage())
        return written

    def refuse_reach(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise if ``as_strided`` may reach what the result of an eager step has beside its elements: a bridge has none."""
        if not self.in_parts or _torch.schema_name(func) not in REACHING:
            return
        gaps = self.in_parts.get(_torch.storage_key(args[0]))
        offset = args[-1] if isinstance(args[-1], int) else kwargs.get("storage_offset")
        if gaps or (gaps is not None and offset not in (None, args[0].storage_offset())):
            raise CaptureError(
                f"{op_label(func)} reaches into the memory around the result of an eager step, inside a capture",
                where=user_line(),
                fix="return a contiguous tensor from the eager step",
            )

    def refuse_other_place(self, func: Any, before: Written) -> None:
        """Raise if an op has given other memory to a tensor that each replay takes as it was; note another shape."""
        now = Written.of(before.tensor)
        if now.memory != before.memory:
            if before.key in self.bridges:
                error = resized(user_line())
                raise error
            if before.key not in self.made:
                raise CaptureError(
                    f"{op_label(func)} gives other memory to a tensor from outside, inside a capture",
                    where=user_line(),
                    fix=FIX,
                )
            self.places.pop(before.key, None)
        if now.lies != before.lies and before.key not in self.made and not before.tensor._is_view():
            self.reshaped.setdefault(id(before.tensor), (before, op_label(func), user_line()))

    def refuse_other_shapes(self) -> None:
        """Raise if the body has left a tensor from outside with another shape. In between it may have another one."""
        for before, op, where in self.reshaped.values():
            if Written.of(before.tensor).lies != before.lies:
                raise CaptureError(
                    f"{op} changes the shape or the strides of a tensor from outside, which a replay would not",
                    where=where,
                    fix="change a view of it: x = x.view_as(x)",
                )

    # bridges

    def bridge(self, source: torch.Tensor) -> Bridge:
        """A bridge with the content of ``source``, in pool memory that lives as long as somebody refers to it."""
        with torch.inference_mode(False), nullcontext() if self.keep else self.driver.allocating():
            bridge = Bridge.like(source, self.driver.device)
        if not self.keep and source.numel() > 0:
            bridge = bridge.on(self.driver.lend(bridge.tensor).untyped_storage())
        bridge.load(source)
        key, storage = _torch.storage_key(bridge.tensor), bridge.tensor.untyped_storage()
        self.made[key] = _torch.StorageWeakRef(storage)
        self.bridges.add(key)
        if (gaps := has_gaps(source)) or source.storage_offset():
            self.in_parts[key] = gaps
        if self.keep:
            self.held[key] = storage
        return bridge

    def place(self, tensor: torch.Tensor) -> torch.UntypedStorage:
        """What a replay takes for the storage of ``tensor``. It does not hold pool memory."""
        storage = tensor.untyped_storage()
        if self.keep or _torch.storage_key(tensor) not in self.made or storage.nbytes() == 0:
            return storage
        return self.places.setdefault(_torch.storage_key(tensor), _torch.unowned_storage(storage))

    # all of it

    def live(self) -> dict[int, torch.UntypedStorage]:
        """The storages in pool memory that somebody holds, by key."""
        return {key: storage for key, ref in self.made.items() if (storage := _torch.live_storage(ref)) is not None}

    def look(self) -> None:
        """Note between two segments how much pool memory is in use."""
        live = self.live()
        bridges = sum(storage.nbytes() for key, storage in live.items() if key in self.bridges)
        self.most = self.most.or_more(Held(bridges, sum(storage.nbytes() for storage in live.values()) - bridges))

    def gradients(self, others: Mapping[int, torch.Tensor]) -> Iterator[Gradient]:
        """Gradients that segments read or write, of autograd leaves that they read, and of ``others``, by identity."""
        read = (tensor for outside in self.outside.values() if (tensor := outside.ref()) is not None)
        leaves = {id(tensor): tensor for tensor in (*read, *self.tensors.values()) if tensor.is_leaf}
        for leaf in {**leaves, **others}.values():
            if not leaf.requires_grad or (grad := leaf.grad) is None or grad.layout is not torch.strided:
                continue
            key = _torch.storage_key(grad)
            if key in self.made:
                yield Gradient(weakref.ref(leaf), grad, True, "")
            elif key in self.outside:
                yield Gradient(weakref.ref(leaf), grad, False, self.outside[key].source)

    def watched(self) -> dict[int, torch.Tensor]:
        """What segments read, without tensors to which the body gave other memory: the graph keeps the memory of these."""
        return {key: value for key, value in self.tensors.items() if _torch.storage_key(value) == key}

    def forget(self) -> None:
        """Drop what is held."""
        self.held, self.tensors, self.outside = {}, {}, {}


def resized(where: str) -> CaptureError:
    """The error for a result of an eager step that was resized."""
    return CaptureError(
        "the result of an eager step was resized, and its memory belongs to the graph",
        where=where,
        fix="resize a clone of it",
    )


def op_label(func: Any) -> str:
    """The name of an op, as reports show it."""
    return str(func._schema.name) if isinstance(func, _torch.OpOverload) else str(func.name())
