"""An immutable picture of an executor for tools, made under its lock while calls go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from breakable_backend.calling.keys import Entry, Key
from breakable_backend.calling.retries import Trials
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
    """Plain calls: a count for each reason."""
    recorded: Counter[str] = field(default_factory=Counter)
    """Recordings: a count for each reason why there was none before."""
    finished_replays: int = 0
    finished_copies: int = 0
    """Replays and copies of recordings that were freed."""
    lowering_seconds: float = 0.0
    bound: int = 0
    """Calls of bound functions, without Dynamo's guards."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Calls of bound functions that did not fit: a count for each reason."""

    def copy(self) -> Statistics:
        """A copy of these counts."""
        plain, recorded, misfits = Counter(self.plain), Counter(self.recorded), Counter(self.misfits)
        return replace(self, plain=plain, recorded=recorded, misfits=misfits)


@contextmanager
def uncounted(*counted: Any) -> Iterator[None]:
    """Leave the counts that are attributes of ``counted`` unchanged inside the block: measuring is not use."""
    before = [{name: count for name, count in vars(part).items() if type(count) is int} for part in counted]
    try:
        yield
    finally:
        for part, counts in zip(counted, before, strict=True):
            vars(part).update(counts)


@dataclass(frozen=True)
class KeySnapshot:
    """One key at one moment: the contents of an :class:`Entry`, mostly copied."""

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
    """Copies between bridges and memory outside so far, recording included."""
    statics: tuple[torch.Tensor | None, ...]
    """The static inputs that it belongs to, in order; None for one that was freed."""

    @classmethod
    def of(cls, entry: Entry, statics: tuple[torch.Tensor | None, ...]) -> KeySnapshot:
        copies = entry.record_copies + (entry.replay.tally.copies if entry.replay is not None else 0)
        copied = {part.name: getattr(entry, part.name) for part in fields(cls) if hasattr(entry, part.name)}
        return cls(**copied, copies=copies, statics=statics)


@dataclass(frozen=True)
class Slots:
    """The slots of a forward, with what they save for a backward."""

    count: int
    """The number of recordings with such memory."""
    pending: int
    """Forwards that may still be run backward."""
    saved_bytes: int
    """What the slots save, in bytes."""


@dataclass(frozen=True)
class Snapshot:
    """An executor at one moment. It keeps what was recorded alive, so do not keep it for long."""

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
    """For the forward of a graph that needs gradients."""
