"""What tools read of an executor: one immutable picture of a moment, made under its lock, while calls go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from breakable_backend.calling.keys import Entry, Key
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


@dataclass(frozen=True)
class KeySnapshot:
    """One key, as it was at one moment."""

    key: Key
    number: int
    """Which recording of its program it has, from 0; -1: none yet."""
    recording: Recording | None
    replay: Replay | None
    run: Function | None
    """What a call does; with ``recording`` and ``replay`` all three, or none."""
    statics: tuple[torch.Tensor | None, ...]
    """The static inputs that it belongs to, in order; None for one that is gone."""
    calls: int
    replays: int
    captures: int
    copies: int
    """Copies between bridges and the outside that were made, recording included."""
    warmup_seconds: float
    record_seconds: float
    why: str
    refused: str
    failures: int
    """Recordings that failed for reasons that pass."""
    last_failure: str

    @classmethod
    def of(cls, entry: Entry, statics: tuple[torch.Tensor | None, ...]) -> KeySnapshot:
        return cls(
            entry.key,
            entry.number,
            entry.recording,
            entry.replay,
            entry.run,
            statics,
            entry.calls,
            entry.replays,
            entry.captures,
            entry.record_copies + (entry.replay.tally.copies if entry.replay is not None else 0),
            entry.warmup_seconds,
            entry.record_seconds,
            entry.why,
            entry.refused,
            entry.trials.failures,
            entry.trials.reason,
        )


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
