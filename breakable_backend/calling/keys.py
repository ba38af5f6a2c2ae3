"""What a key is, how it is read from a call's arguments, and which keys there are; weights that moved are noticed.

A key is everything that a recording depends on: the addresses of static inputs and of inputs that captured segments
write, numbers, layouts that Dynamo left open, and host scalars. Keys with the same addresses form a set. Each call
compares addresses (:meth:`KeyReader.are_at`). Weights that moved make another key.
"""

from __future__ import annotations

import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from breakable_backend import _torch, locks
from breakable_backend.calling import eviction
from breakable_backend.calling.retries import Trials
from breakable_backend.ir.layout import numbers_in
from breakable_backend.ir.overlap import Fixed
from breakable_backend.ir.program import Program
from breakable_backend.recordings import copies
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Function, Replay

ShapeKey = tuple[Any, ...]


class Alignments(tuple[int, ...]):
    """The address of each bridged input modulo ``copies.ALIGNMENT``. Part of a key only if one is not 0."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{', '.join(map(str, self))} bytes off {copies.ALIGNMENT}"


class Key(NamedTuple):
    """What a recording depends on. A named tuple, since each call makes one, and a frozen dataclass is slower."""

    addresses: tuple[int, ...]
    shapes: ShapeKey


Spectator = Callable[["Entry", list[Any]], None]
"""Called with an entry and the arguments of a call that replays it, before the replay."""


@dataclass(eq=False)
class Entry:
    """One key: what was recorded for it, and how often it was called."""

    key: Key
    recording: Recording | None = None
    replay: Replay | None = None
    run: Function | None = None
    """What a call runs. The first replay checks addresses first, so this is not always the generated function."""
    number: int = -1
    """The number of the recording in its program, from 0."""
    warmed_up: bool = False
    """Whether a plain call has succeeded."""
    calls: int = 0
    replays: int = 0
    captures: int = 0
    record_copies: int = 0
    warmup_seconds: float = 0.0
    record_seconds: float = 0.0
    why: str = ""
    """Why the key was new: how it differs from the keys before it."""
    last_call: int = 0
    trials: Trials = field(default_factory=Trials)
    """Recordings that failed for passing reasons."""
    refused: str = ""
    """Why this key is not recorded; empty if it may be."""

    @property
    def function(self) -> Function | None:
        """What :attr:`run` is while nobody is shown replays."""
        return self.run.run if isinstance(self.run, _Shown) else self.run

    def show(self, spectator: Spectator) -> None:
        """Have ``spectator`` called before each replay, until :meth:`hide`. Without one, a replay does not check for it."""
        if self.run is not None and not isinstance(self.run, _Shown):
            self.run = _Shown(self, self.run)
        if isinstance(self.run, _Shown):
            self.run.spectators = (*self.run.spectators, spectator)

    def hide(self, spectator: Spectator) -> None:
        """End :meth:`show`."""
        if isinstance(shown := self.run, _Shown):
            shown.spectators = tuple(other for other in shown.spectators if other is not spectator)
            if not shown.spectators:
                self.run = shown.run


class _Shown:
    """A replay that is shown to others before it runs."""

    def __init__(self, entry: Entry, run: Function) -> None:
        self.entry, self.run = entry, run
        self.spectators: tuple[Spectator, ...] = ()

    def __call__(self, args: list[Any], stream: int) -> list[Any]:
        for spectator in self.spectators:
            spectator(self.entry, list(args))
        return self.run(args, stream)


@dataclass
class AddressSet:
    """The keys that share a set of static addresses, the least recently used first."""

    pointers: list[int] = field(default_factory=list)
    """The addresses, each at the index of its argument."""
    entries: OrderedDict[ShapeKey, Entry] = field(default_factory=OrderedDict)
    guards: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    """Weak references to the static inputs, whose death drops the set."""
    storages: list[_torch.StorageWeakRef] = field(default_factory=list)
    """The storages of the static inputs."""
    fixed: Fixed = field(default_factory=Fixed)
    """The memory regions of the static inputs."""
    apart: tuple[list[int], list[Any]] = ([], [])
    """The addresses of the other tensors when they were last found to share no written memory."""
    last_call: int = 0


@dataclass(eq=False)
class KeyReader:
    """Reads a key from the arguments, as quickly as Python can. It holds the positions of those that are in the key."""

    addressed: list[int]
    numbers: Sequence[int]
    open_layouts: Sequence[int]
    scalars: Sequence[int]
    bridged: Sequence[int]

    @classmethod
    def of(cls, program: Program, keyed: frozenset[str], scalars_in_key: bool) -> KeyReader:
        inputs, read = [value for value in program.inputs if value.index >= 0], program.read_by_graphs()
        return cls(
            [value.index for value in inputs if value.kind == "static" or value.name in keyed],
            [value.index for value in inputs if value.kind == "number" and value.name not in program.passed_on],
            [value.index for value in inputs if isinstance(value.value, torch.Tensor) and is_open(value.value)],
            [value.index for value in inputs if value.kind == "scalar" and scalars_in_key],
            [value.index for value in inputs if value.kind == "tensor" and value.name in read - keyed],
        )

    def read(self, args: Sequence[Any]) -> Key:
        data_ptr = torch.Tensor.data_ptr
        return Key(tuple([data_ptr(args[index]) for index in self.addressed]), self.shapes(args))

    def pointers(self, key: Key) -> list[int]:
        """The addresses of ``key``, each at the index of its argument."""
        at = dict(zip(self.addressed, key.addresses, strict=True))
        return [at.get(index, 0) for index in range(max(at, default=-1) + 1)]

    def are_at(self, pointers: list[int], args: list[Any]) -> bool:
        """Whether the key of ``args`` has the addresses that ``pointers`` were made from."""
        return not self.addressed or _torch.are_at(args, pointers, self.addressed)

    def shapes(self, args: Sequence[Any]) -> ShapeKey:
        """The part of a key that is not addresses."""
        shapes: ShapeKey = tuple([args[index] for index in self.numbers]) if self.numbers else ()
        if self.open_layouts:
            shapes += tuple((args[i].shape, args[i].stride(), args[i].dtype, args[i].device) for i in self.open_layouts)
        if self.scalars:
            shapes += tuple(scalar_bytes(args[index]) for index in self.scalars)
        # A bridge has the alignment of the value that it was made for. Reading it takes 0.1 us for each bridged input.
        for index in self.bridged:
            if args[index].data_ptr() % copies.ALIGNMENT:
                begins = [args[index].data_ptr() % copies.ALIGNMENT for index in self.bridged]
                return (*shapes, Alignments(begins))
        return shapes


def is_open(tensor: torch.Tensor) -> bool:
    """Whether a fake tensor has symbolic sizes or strides."""
    return any(isinstance(size, torch.SymInt) for size in numbers_in(tensor))


def scalar_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    """The value of a host scalar, bit for bit: ``-0.0`` is not ``0.0``, and a NaN equals itself."""
    if tensor.dtype is torch.float64:
        return tensor.dtype, struct.pack("d", tensor.item())
    plain = tensor.detach().resolve_conj().resolve_neg()
    return tensor.dtype, bytes(plain.reshape(1).view(torch.uint8).tolist())


class Keys:
    """The existing keys. Changes need the driver's lock; tools read them under :attr:`changing`."""

    def __init__(self) -> None:
        self.changing = locks.lock()
        """Held while the dictionaries, or the contents of their entries, change. A replay does not take it."""
        self.sets: OrderedDict[tuple[int, ...], AddressSet] = OrderedDict()
        """The least recently used first."""
        self.last: AddressSet | None = None
        """The set that was replayed last."""
        self._dropped: OrderedDict[Key, str] = OrderedDict()
        """Why recordings were dropped, for the last ``eviction.MAX_DROPPED`` keys."""

    def entries(self) -> list[Entry]:
        """All entries, in the order in which they came, as reports show them.

        A replay moves its entry to the end without a lock. This changes the order of the ``OrderedDict``, and not that of
        its base class ``dict``.
        """
        return [entry for addresses in dict.values(self.sets) for entry in dict.values(addresses.entries)]

    def latest(self) -> list[Recording]:
        """The recordings of the last two entries that were used: the GPU may be that far behind."""
        entries = sorted(self.entries(), key=lambda entry: -entry.last_call)
        return [entry.recording for entry in entries if entry.recording is not None][:2]

    def is_there(self, entry: Entry) -> bool:
        """Whether ``entry`` still exists."""
        addresses = self.sets.get(entry.key.addresses)
        return addresses is not None and addresses.entries.get(entry.key.shapes) is entry

    def touch(self, entry: Entry, addresses: AddressSet, call: int) -> None:
        """Note that ``entry`` was used in ``call``, which makes it the most recently used."""
        addresses.last_call = call
        if len(addresses.entries) > 1:
            addresses.entries.move_to_end(entry.key.shapes)
        if addresses is not self.last:  # the last set is the most recently used already
            self.last = addresses
            self.sets.move_to_end(entry.key.addresses)

    def add_set(self, key: Key, addresses: AddressSet) -> None:
        with self.changing:
            self.sets[key.addresses] = addresses
        self.last = None

    def add(self, addresses: AddressSet, entry: Entry) -> None:
        with self.changing:
            addresses.entries[entry.key.shapes] = entry

    def take_set(self, addresses: tuple[int, ...]) -> list[Entry]:
        """Remove a set, and return its keys."""
        with self.changing:
            taken = self.sets.pop(addresses, None)
            if taken is self.last:
                self.last = None
        if taken is None:
            return []
        taken.guards.clear()
        return list(taken.entries.values())

    def take_oldest(self, addresses: AddressSet) -> Entry:
        """Remove the least recently used key."""
        with self.changing:
            return addresses.entries.popitem(last=False)[1]

    def remember(self, key: Key, why: str) -> None:
        """Note why the recording of a key is dropped."""
        self._dropped[key] = why
        if len(self._dropped) > eviction.MAX_DROPPED:
            self._dropped.popitem(last=False)

    def why_new(self, key: Key, *, first: bool) -> str:
        """How a new key differs from those before it. ``first``: there was none."""
        if key in self._dropped:
            return self._dropped.pop(key)
        if first:
            return "first of this program"
        if any(key.addresses != addresses and key.shapes in known.entries for addresses, known in self.sets.items()):
            return "static or written inputs at new addresses"
        return "new numbers, layouts, alignments or host scalars"


def occupancy(things: Mapping[Any, AddressSet | Entry]) -> eviction.Occupancy:
    """How many ``things`` there are, and the last use of the oldest."""
    oldest = next(iter(things.values()), None)
    return eviction.Occupancy(len(things), oldest.last_call if oldest is not None else 0)
