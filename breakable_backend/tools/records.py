"""The records of a report: frozen dataclasses of plain values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from breakable_backend.ir.program import Op, Reason
from breakable_backend.tools.verdict import Measured


@dataclass(frozen=True)
class BridgeReport:
    """A copy between a bridge and memory outside."""

    value: str
    direction: Literal["in", "out"]
    bytes: int


@dataclass(frozen=True)
class StepReport:
    """A captured or eager segment; in a recorded key, with its kernels and bridges."""

    position: int
    kind: Literal["captured", "eager"]
    ops: tuple[Op, ...]
    reasons: tuple[Reason, ...]
    """Why it is eager."""
    kernels: tuple[str, ...]
    """Names of the kernels in the captured graph, in order; empty before it is recorded."""
    num_kernels: int
    """-1 before it is recorded, and if the driver cannot tell."""
    bridges: tuple[BridgeReport, ...]
    first_line: int = -1
    """Its first line in the text or source that contains it, from 0; -1 if it has none there."""
    end_line: int = -1
    """The line after its last one."""
    host_us: float | None = None
    """Measured host time; None if it was not measured."""
    gpu_us: float | None = None
    costliest: str = ""
    """The op of an eager step that takes longest; empty if it was not measured."""

    @property
    def title(self) -> str:
        """What it does, in a few words; for an eager step the ops that make it one, its costliest op first."""
        names = [op.op for op in self.ops] or [reason.op for reason in self.reasons]
        if self.kind == "eager":
            because = (reason.op for reason in self.reasons)
            return ", ".join(dict.fromkeys(op for op in (self.costliest, *because) if op)) or ", ".join(names[:1])
        nothing = "copies of results" if self.bridges else "nothing"
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}" if names else nothing

    @property
    def module(self) -> str:
        """The path of the innermost module that contains all its ops."""
        paths = [op.module.split(".") for op in self.ops if op.module]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        return ".".join(names[0] for names in shared)

    @property
    def source(self) -> str:
        """The user's line: of its first reason, or else of its first op."""
        return next(filter(None, (*(r.source for r in self.reasons), *(op.source for op in self.ops))), "")


@dataclass(frozen=True, kw_only=True)
class RecordingReport:
    """One key of a program: what was recorded for it, and how often it was called."""

    key: str
    num_graphs: int
    """Captured graphs; 0 before the key was recorded."""
    calls: int
    captures: int
    """Segments captured for this key."""
    replays: int
    copies_per_call: int
    """Copies between bridges and memory outside in one replay, at most."""
    copies: int
    """Copies so far, recording included. A value that is in place already is not copied."""
    bridge_bytes: int
    held_bytes: int
    """Bytes of pool memory for values passed between segments, at most at the same time, without bridges."""
    warmup_seconds: float = 0.0
    record_seconds: float
    why: str
    """Why the key had no recording before."""
    source: str
    """The generated source of the replay."""
    refused: str = ""
    """Why this key is not recorded; empty if it may be."""
    failures: int = 0
    """Recordings of this key that failed for a passing reason."""
    last_failure: str = ""
    """The reason of the last failure."""
    steps: tuple[StepReport, ...]
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One graph of Dynamo's, or one captured ``with`` block, and what happened to it."""

    name: str
    driver: str
    num_graph_segments: int
    num_eager_segments: int
    reasons: tuple[Reason, ...]
    steps: tuple[StepReport, ...]
    """The segments in order, before anything is recorded."""
    text: str
    """The program, printed."""
    calls: int
    captures: int
    replays: int
    copies: int
    evictions: int = 0
    plain_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Plain calls: a count for each reason."""
    recorded: Mapping[str, int]
    """Recordings: a count for each reason why the key had none."""
    notes: tuple[str, ...] = ()
    lowering_seconds: float = 0.0
    pool_bytes: int
    """Device memory that the driver's pool reserves, for all programs that share it."""
    executable_bytes: int
    """Device memory of the driver's executable graphs, for all programs that share the pool."""
    recordings: tuple[RecordingReport, ...]
    debug: str | None
    """The debug mode. With ``"eager"`` the captured segments run eagerly too."""
    bound_calls: int = 0
    """Calls of bound functions, without Dynamo's guards; included in ``calls``."""
    misfits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Calls of bound functions that did not fit: a count for each reason."""
    findings: tuple[str, ...] = ()
    """If few calls replay: what varies, its values, and the remedy."""
    slots: int = 0
    """For the forward of a graph that needs gradients: recordings with memory for what a backward needs."""
    pending: int = 0
    """Forwards in these slots that may still be run backward."""
    saved_bytes: int = 0
    """Memory of the slots, in bytes."""

    @property
    def main(self) -> RecordingReport | None:
        """The recorded key with the most calls."""
        recorded = [recording for recording in self.recordings if recording.steps]
        return max(recorded, key=lambda recording: recording.calls, default=None)
