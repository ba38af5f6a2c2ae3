"""What compare mode notes while a recording is made: the ops of its segments, and arguments that functions keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.capturing.eager_results import fields, replaced
from breakable_backend.ir.effects import is_of_torch, values_of
from breakable_backend.ir.layout import Geometry
from breakable_backend.ir.running_ops import has_memory
from breakable_backend.recordings.observer import Issue
from breakable_backend.recordings.repair import NodeByNode
from breakable_backend.tools.difference import Difference, difference
from breakable_backend.tools.trace import Escaped, Script, Trace, Watch, run_module


@dataclass
class KeptArgument:
    """An argument that a function still held when it returned."""

    ref: _torch.StorageWeakRef
    """The storage that the function was given: a twin of the recording's own, over the same memory."""
    memory: torch.UntypedStorage
    geometry: Geometry
    label: str
    source: str
    before: torch.UntypedStorage | None = None
    """Its content at the end of the call that passed it."""

    @property
    def alive(self) -> bool:
        return _torch.live_storage(self.ref) is not None

    def changed(self) -> Difference | None:
        """How its present content differs from that."""
        if self.before is None:
            return None
        return difference(self.geometry.on(self.memory), self.geometry.on(self.before))


@dataclass
class Witness:
    """What was observed while a recording was made."""

    device: torch.device
    """The driver's device. Segments may be on others of its type."""
    places: dict[int, torch.device] = field(default_factory=dict)
    """The device of each captured segment, by the position of the step."""
    traces: dict[int, Trace] = field(default_factory=dict)
    """By the position of the step."""
    scripts: dict[int, Script] = field(default_factory=dict)
    """For ``with capture``, whose code cannot run again."""
    escaped: Escaped = field(default_factory=Escaped)
    kept: list[KeptArgument] = field(default_factory=list)

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any]:
        """The body of a segment as a function to capture."""
        values = values_of(*body.module.graph.nodes)
        devices = (value.device for value in values if value.device.type == self.device.type)
        self.places[position] = device = next(devices, self.device)

        def watched(*inputs: Any) -> Any:
            watch = Watch(device, self.escaped, inputs)
            results = run_module(body, inputs, watch)
            self.traces[position] = watch.trace
            return results

        return watched

    def issuing(self, position: int) -> Issue:
        """A segment of ``with capture`` begins. Returns the function that issues its ops."""
        watch, script = Watch(self.device, self.escaped), Script()
        self.traces[position], self.scripts[position] = watch.trace, script

        def issue(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], label: str, source: str) -> Any:
            watch.label, watch.source = label, source
            return script.issue(watch, func, args, kwargs)

        return issue

    def attend(self, function: Callable[..., Any], name: str, source: str) -> Callable[..., Any]:
        """``function``, observed for what it keeps, if it is the user's code."""
        if is_of_torch(function):
            return function

        def attended(*args: Any, **kwargs: Any) -> Any:
            twins = _Twins(self.device)
            args, kwargs = pytree.tree_map_only(torch.Tensor, twins.of, (args, kwargs))
            result = twins.returned(function(*args, **kwargs))
            del args, kwargs
            self.kept += twins.kept(name, source)
            return result

        return attended


class _Twins:
    """Other storages over the memory of arguments, which show what a function keeps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage, Geometry]] = {}
        self.originals: dict[int, torch.UntypedStorage] = {}
        self.tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Twins with their originals, by the twin's id."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad
        if not plain or tensor.device.type != self.device.type or tensor.untyped_storage().nbytes() == 0:
            return tensor
        key = _torch.storage_key(tensor)
        if key not in self.storages:
            storage = tensor.untyped_storage()
            twin = _torch.twin_storage(storage)
            self.storages[key] = storage, twin, Geometry.of(tensor)
            self.originals[int(twin._cdata)] = storage
        made = Geometry.of(tensor).on(self.storages[key][1])
        self.tensors[id(made)] = made, tensor
        return made

    def returned(self, result: Any) -> Any:
        """A result with the arguments themselves, and on their own storages, in place of twins."""
        if not any(self._is_twin(leaf) for _, leaf in fields(result)):
            return result
        return replaced(result, lambda leaf: self._original(leaf) if self._is_twin(leaf) else leaf)

    def _is_twin(self, leaf: Any) -> bool:
        return has_memory(leaf) and _torch.storage_key(leaf) in self.originals

    def _original(self, twin: torch.Tensor) -> torch.Tensor:
        if id(twin) in self.tensors:
            return self.tensors[id(twin)][1]
        return Geometry.of(twin).on(self.originals[_torch.storage_key(twin)])

    def kept(self, name: str, source: str) -> list[KeptArgument]:
        """Drop the twins. Returns those that somebody still holds."""
        found = [
            KeptArgument(_torch.StorageWeakRef(twin), storage, geometry, name, source)
            for storage, twin, geometry in self.storages.values()
        ]
        self.storages.clear()
        self.tensors.clear()
        return [kept for kept in found if kept.alive]
