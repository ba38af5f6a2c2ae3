"""The executors of a graph's forward and of its backward, and the *slots* of the forward.

A slot is a recording of the forward with its own memory for what it saves. A forward takes one, and it is free again
when autograd has dropped what that forward saved. So several forwards may be pending, each in its own slot.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.calling.compiled_graph import PUT_OFF
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import AddressSet, Entry, Key, KeyReader, ShapeKey
from breakable_backend.calling.snapshot import Slots, Snapshot
from breakable_backend.compiling.forward_and_backward import Forward
from breakable_backend.drivers import CaptureDriver
from breakable_backend.ir.last_uses import needed
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.specialised import Plan, SpecialisedProgram

MAX_SLOTS = 16
"""How many captured forwards of one graph, with the same parameters, may be pending: the microbatches of a pipeline. Each
is recorded only if the GPU has room, and only once so many are pending."""

ALL_TAKEN = f"{MAX_SLOTS} forwards are pending, one in each slot"

NO_ROOM = "it would leave too little of the GPU's memory for the rest of the program"


class Number(int):
    """The number of a slot, in a key."""

    def __repr__(self) -> str:
        return f"slot {int(self)}"


class Outputs(list[Any]):
    """The results of a forward: its outputs, and after them what it saved."""

    saved: list[torch.Tensor] | None = None
    """For a captured forward, everything that was saved: constants of the recording, and values that move. They do not
    own their memory."""
    owners: tuple[Any, ...] = ()
    """The owners of the memory of :attr:`saved`."""
    static: frozenset[str] = frozenset()
    """The names of the values that do not move."""


@dataclass(frozen=True)
class Lease:
    """The saved values that lie in memory of a recording, the same in each of its calls."""

    recording: weakref.ref[Recording]
    constants: tuple[torch.Tensor | None, ...]
    """None for a value that moves. These tensors own no memory."""
    static: frozenset[str]
    """The names of the values that do not move."""
    first: tuple[int, int] | None
    """The position of the first of these that is not empty, and its address. All empty tensors are at address 0."""

    @classmethod
    def of(cls, recording: Recording, forward: Forward) -> Lease:
        leaves = recording.returned[forward.num_outputs :]
        constants = tuple(recording.constants.get(leaf.name) for leaf in leaves)
        there = [(place, constant) for place, constant in enumerate(constants) if constant is not None]
        static = frozenset(forward.saved[place] for place, _ in there)
        first = next(((place, constant.data_ptr()) for place, constant in there if constant.numel()), None)
        return cls(weakref.ref(recording), constants, static, first)


class _WithSlot(KeyReader):
    """Reads keys that end with the number of a slot."""

    slot = Number(0)
    """The slot of the current call."""

    def shapes(self, args: Sequence[Any]) -> ShapeKey:
        return (*super().shapes(args), self.slot)

    def without_slot(self, args: Sequence[Any]) -> ShapeKey:
        return super().shapes(args)


class HalfExecutor(Executor):
    """The executor of a half. It records only where enough memory is left for the rest of the program.

    What a half needs is held between its calls too, where eager would give it back. Results and gradients are fresh
    under ``outputs="static"`` too: autograd keeps them beyond the next call.
    """

    def plan(self) -> Plan:
        return replace(super().plan(), fresh_outputs=True)

    def record(self, entry: Entry, args: list[Any], stream: int) -> list[Any]:
        if self.driver.has_room(needed(self.program, SpecialisedProgram.of(self.program, args).symbols)):
            return super().record(entry, args, stream)
        self._put_off(entry, "memory", NO_ROOM)
        return self._plain(args, f"could not be recorded: {PUT_OFF['memory']}", logging.WARNING)


class ForwardExecutor(HalfExecutor):
    """The executor of the forward. Each call takes a slot, whose number is part of its key."""

    reader: _WithSlot
    reads_keys = _WithSlot

    def __init__(self, forward: Forward, *args: Any) -> None:
        self.forward = forward
        self.taken: weakref.WeakKeyDictionary[Entry, _torch.StorageWeakRef] = weakref.WeakKeyDictionary()
        """For each key, an object that lives as long as what its last call saved."""
        self.leases: weakref.WeakKeyDictionary[Entry, Lease] = weakref.WeakKeyDictionary()
        super().__init__(forward.lowered, *args)

    def pending(self) -> int:
        """Forwards that may still be run backward."""
        return sum(not ref.expired() for ref in list(self.taken.values()))

    def snapshot(self) -> Snapshot:
        made = super().snapshot()
        recorded = [key.recording for key in made.keys if key.recording is not None]
        owners = {_torch.storage_key(owner): owner for recording in recorded for owner in recording.saved}
        size = sum(owner.untyped_storage().nbytes() for owner in owners.values())
        return replace(made, slots=Slots(len(recorded), self.pending(), size))

    def run(self, args: list[Any], token: torch.Tensor) -> Outputs:
        """Run once. The slot is taken as long as ``token`` lives."""
        made = self(args, token)  # type: ignore[arg-type]
        return made if isinstance(made, Outputs) else Outputs(made)

    def _locked(self, args: list[Any], stream: int, driver: CaptureDriver, known: Any = None, *_: Any) -> Any:
        reader, keys = self.reader, self.keys
        addresses = keys.last if keys.last is not None and reader.are_at(keys.last.pointers, args) else None
        if addresses is None:
            addresses = keys.sets.get(reader.read(args).addresses)
        slot = self._free(reader.without_slot(args), addresses)
        if slot is None:
            return self._plain(args, ALL_TAKEN, logging.WARNING)
        reader.slot = slot
        shapes = reader.shapes(args)
        made = super()._locked(args, stream, driver)
        entry = addresses.entries.get(shapes) if addresses is not None else None
        return made if entry is None else self._leased(entry, made, known)

    def has_slot(self, args: Sequence[Any]) -> bool:
        """Whether a slot is free for a call. Taken ones are counted first, which takes less than reading a key.

        Another thread may take it before this one has the pool's lock, so :meth:`_locked` looks once more.
        """
        if len(self.taken) < MAX_SLOTS or self.pending() < MAX_SLOTS:
            return True
        reader = self.reader
        return self._free(reader.without_slot(args), self.keys.sets.get(reader.read(args).addresses)) is not None

    def _free(self, shapes: ShapeKey, addresses: AddressSet | None) -> Number | None:
        """The first free slot."""
        for number in map(Number, range(MAX_SLOTS)):
            entry = addresses.entries.get((*shapes, number)) if addresses is not None else None
            ref = self.taken.get(entry) if entry is not None else None
            if ref is None or ref.expired():
                return number
        return None

    def _leased(self, entry: Entry, made: list[Any], token: torch.Tensor) -> list[Any]:
        """The results of a call of ``entry``. The slot is taken if they lie in memory of its recording."""
        recording, count = entry.recording, self.forward.num_outputs
        if recording is None:
            return made
        lease = self.leases.get(entry)
        if lease is None or lease.recording() is not recording:
            lease = self.leases[entry] = Lease.of(recording, self.forward)
        if lease.first is not None and made[count + lease.first[0]].data_ptr() != lease.first[1]:
            return made  # this call was plain
        self.taken[entry] = _torch.retains(token)
        outputs = Outputs(made[:count])
        outputs.saved = [
            value if constant is None else constant
            for constant, value in zip(lease.constants, made[count:], strict=True)
        ]
        outputs.owners, outputs.static = recording.kept, lease.static
        return outputs

    def plan(self) -> Plan:
        return replace(super().plan(), saved_from=self.forward.num_outputs)

    def new_entry(self, key: Key, args: Sequence[Any]) -> Entry:
        entry = super().new_entry(key, args)
        entry.warmed_up = entry.warmed_up or bool(entry.key.shapes[-1])  # the first slot's warm-up counts for all
        return entry

    def why_new(self, key: Key) -> str:
        why, slot = super().why_new(key), key.shapes[-1]
        return f"{int(slot)} more forward{'s' * (slot != 1)} pending" if slot and "new" in why else why


class BackwardExecutor(HalfExecutor):
    """The executor of a backward. Each slot of the forward has a set of addresses here."""

    def new_entry(self, key: Key, args: Sequence[Any]) -> Entry:
        warm = any(entry.warmed_up and entry.key.shapes == key.shapes for entry in self.keys.entries())
        entry = super().new_entry(key, args)
        entry.warmed_up = entry.warmed_up or warm  # the same kernels, on what another slot saved
        return entry
