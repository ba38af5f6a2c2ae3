"""The records that a report is made of: plain values, frozen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from breakable_backend.ir.program import Op, Reason
from breakable_backend.tools.measure import Measured


@dataclass(frozen=True)
class BridgeReport:
    """A copy between a bridge and the outside."""

    value: str
    direction: Literal["in", "out"]
    bytes: int


@dataclass(frozen=True)
class StepReport:
    """A captured segment or an eager one, in its place; of a key that was recorded, with what came of it."""

    position: int
    kind: Literal["captured", "eager"]
    ops: tuple[Op, ...]
    reasons: tuple[Reason, ...]
    """Why it is eager."""
    kernels: tuple[str, ...]
    """Names of the kernels in the captured graph, in order; empty before it is recorded."""
    num_kernels: int
    """-1 before it is recorded, and where the driver cannot tell."""
    bridges: tuple[BridgeReport, ...]
    first_line: int = -1
    """Of its lines in the text or the source that it is a step of, counted from 0; -1: it has none there."""
    end_line: int = -1
    """The line behind the last of them."""
    host_us: float | None = None
    """Host time, measured; None if it was not."""
    gpu_us: float | None = None

    @property
    def title(self) -> str:
        """What it does, in a few words."""
        names = [op.op for op in self.ops] or [reason.op for reason in self.reasons]
        if self.kind == "eager":
            return ", ".join(dict.fromkeys(reason.op for reason in self.reasons if reason.op)) or ", ".join(names[:1])
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}" if names else "nothing"

    @property
    def module(self) -> str:
        """The path of the module that all its ops are in."""
        paths = [op.module.split(".") for op in self.ops if op.module]
        shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
        return ".".join(names[0] for names in shared)

    @property
    def source(self) -> str:
        """The user's line: of its first reason, else of its first op."""
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
    """Copies between bridges and the outside in one replay, at most."""
    copies: int
    """Copies that were made, recording included; one is left out where the value is in place already."""
    bridge_bytes: int
    held_bytes: int
    """Bytes of pool memory for what segments hand on, as much as is needed at once; bridges are not counted."""
    warmup_seconds: float = 0.0
    record_seconds: float
    why: str
    """Why the key was new when it came."""
    source: str
    """The generated replay function."""
    refused: str = ""
    """Why this key is not recorded; empty if it may be."""
    failures: int = 0
    """Recordings that failed for reasons that pass, since the key came."""
    last_failure: str = ""
    """Why the last of them failed."""
    steps: tuple[StepReport, ...]
    measured: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class ProgramReport:
    """One graph that Dynamo made, or one captured ``with`` block, and what became of it."""

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
    """Calls that ran plainly, by why."""
    recorded: Mapping[str, int]
    """Recordings, by why there was none for the key."""
    notes: tuple[str, ...] = ()
    lowering_seconds: float = 0.0
    pool_bytes: int
    """Device memory that the driver's pool holds reserved, for all programs that share it."""
    executable_bytes: int
    """Device memory that the driver's instantiated graphs take, likewise."""
    recordings: tuple[RecordingReport, ...]
    debug: str | None
    """The debug mode; with ``"eager"`` the captured segments run eagerly too."""
    bound_calls: int = 0
    """Calls of bound functions, which did not ask Dynamo's guards; among ``calls``."""
    misfits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Calls of bound functions that did not fit, by why."""
    findings: tuple[str, ...] = ()
    """Where few calls replay: what varies, its values, and the remedy."""
    slots: int = 0
    """Of the forward of a graph that needs gradients: recordings with memory for what a backward needs."""
    pending: int = 0
    """Forwards in them that may still be run backward."""
    saved_bytes: int = 0
    """Memory of the slots."""

    @property
    def main(self) -> RecordingReport | None:
        """The recorded key that was called most."""
        recorded = [recording for recording in self.recordings if recording.steps]
        return max(recorded, key=lambda recording: recording.calls, default=None)
