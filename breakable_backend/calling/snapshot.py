"""What tools read of an executor: one immutable picture of a moment, made under its lock, while calls go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from breakable_backend.calling.keys import Entry, Key
from breakable_backend.calling.policy import Trials
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.drivers import CaptureDriver
from breakable_backend.ir.program import Program
from breakable_backend.options import Options
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Function, Replay


@dataclass
class Statistics:
    """Counts since the function was compiled."""

    calls: int = 0
    captures: int = 0
    recordings: int = 0
    evictions: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    """Plain calls, by why they were plain."""
    recorded: Counter[str] = field(default_factory=Counter)
    """Recordings, by why there was none."""
    finished_replays: int = 0
    finished_copies: int = 0
    """Replays and copies of recordings that are gone."""
    lowering_seconds: float = 0.0
    bound: int = 0
    """Calls of bound functions, which did not ask Dynamo's guards."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Calls of bound functions that did not fit, by why."""

    def copy(self) -> Statistics:
        """These counts, which do not go on."""
        plain, recorded, misfits = Counter(self.plain), Counter(self.recorded), Counter(self.misfits)
        return replace(self, plain=plain, recorded=recorded, misfits=misfits)


@contextmanager
def uncounted(*counted: Any) -> Iterator[None]:
    """Leave the counts that are attributes of ``counted`` as they are: to measure is no use."""
    before = [{name: count for name, count in vars(part).items() if type(count) is int} for part in counted]
    try:
        yield
    finally:
        for part, counts in zip(counted, before, strict=True):
            vars(part).update(counts)


@dataclass(frozen=True)
class KeySnapshot:
    """One key, as it was at one moment: what an :class:`Entry` has, of which most is copied as it is."""

    key: Key
    number: int
    recording: Recording | None
    replay: Replay | None
    run: Function | None
    calls: int
    replays: int
    captures: int
    warmup_seconds: float
    record_seconds: float
    why: str
    refused: str
    trials: Trials
    copies: int
    """Copies between bridges and the outside that were made, recording included."""
    statics: tuple[torch.Tensor | None, ...]
    """The static inputs that it belongs to, in order; None for one that is gone."""

    @classmethod
    def of(cls, entry: Entry, statics: tuple[torch.Tensor | None, ...]) -> KeySnapshot:
        copies = entry.record_copies + (entry.replay.tally.copies if entry.replay is not None else 0)
        copied = {part.name: getattr(entry, part.name) for part in fields(cls) if hasattr(entry, part.name)}
        return cls(**copied, copies=copies, statics=statics)


@dataclass(frozen=True)
class Slots:
    """What forwards have saved for their backwards."""

    count: int
    """Recordings with memory for that."""
    pending: int
    """Forwards that may still be run backward."""
    saved_bytes: int
    """Memory of all slots together."""


@dataclass(frozen=True)
class Snapshot:
    """What an executor had at one moment. It keeps what was recorded alive: it is not to be kept."""

    name: str
    options: Options
    driver: CaptureDriver
    lowered: Lowered
    program: Program
    statistics: Statistics
    notes: tuple[str, ...]
    keys: tuple[KeySnapshot, ...]
    """In the order in which they came."""
    slots: Slots | None = None
    """Of the forward of a graph that needs gradients."""
