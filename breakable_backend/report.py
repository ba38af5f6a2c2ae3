"""What was captured, what was not, why, and how often it ran."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from breakable_backend import _torch
from breakable_backend.backend import EagerGraph, breakable_cg, eager_graphs_of, executors_of
from breakable_backend.capture import BreakableCUDAGraph
from breakable_backend.executor import Entry, Executor
from breakable_backend.lowering import NEEDS_GRADIENTS
from breakable_backend.program import Reason
from breakable_backend.recording import EagerStep


@dataclass(frozen=True)
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
    record_seconds: float
    source: str
    """The generated replay function."""
    refused: str
    """Why this key is not recorded; empty if it may be."""


@dataclass(frozen=True)
class ProgramReport:
    """One graph that Dynamo made, and what became of it."""

    name: str
    driver: str
    num_graph_segments: int
    num_eager_segments: int
    reasons: tuple[Reason, ...]
    text: str
    """The program, printed."""
    calls: int
    captures: int
    replays: int
    copies: int
    evictions: int
    plain_calls: Mapping[str, int]
    """Calls that ran plainly, by why."""
    notes: tuple[str, ...]
    lowering_seconds: float
    recordings: tuple[RecordingReport, ...]
    debug: str | None
    """The debug mode; with ``"eager"`` the captured segments run eagerly too."""


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found; ``print`` shows it."""

    programs: tuple[ProgramReport, ...]
    eager_graphs: tuple[EagerGraph, ...]
    """Graphs that run as Dynamo traced them: those that need gradients, and what AOTAutograd does not take."""
    graph_breaks: Mapping[str, int]
    """Dynamo's graph breaks in this process, by reason."""
    at_recompile_limit: tuple[str, ...]
    """Functions that Dynamo has compiled as often as it will; what the compiled versions do not fit runs uncompiled."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if not self.programs and not self.eager_graphs:
            yield "nothing was compiled by breakable_cg yet: it compiles at the first call"
        for program in self.programs:
            yield f"{program.name}: {program.num_graph_segments} captured, {program.num_eager_segments} eager ({program.driver})"
            if program.debug == "eager":
                yield "  debug mode: every op runs eagerly; nothing is captured"
            yield (
                f"  calls {program.calls}, captures {program.captures}, replays {program.replays}, copies {program.copies}, "
                f"plain {sum(program.plain_calls.values())}, evictions {program.evictions}, lowered in {program.lowering_seconds:.2f} s"
            )
            for why, count in program.plain_calls.items():
                yield f"  ran plainly {count}x: {why}"
            for note in program.notes:
                yield f"  note: {note}"
            if program.reasons:
                counted = Counter((reason.op, reason.text, reason.source) for reason in program.reasons)
                yield _table(
                    ("eager", "times", "because", "at"),
                    [(op, str(count), text, source) for (op, text, source), count in counted.items()],
                )
            if program.recordings:
                yield _table(
                    ("key", "graphs", "calls", "captures", "replays", "copies/call", "bridges", "recorded in"),
                    [
                        (
                            recording.refused or recording.key,
                            str(recording.num_graphs),
                            str(recording.calls),
                            str(recording.captures),
                            str(recording.replays),
                            str(recording.copies_per_call),
                            f"{recording.bridge_bytes} B",
                            f"{recording.record_seconds * 1e3:.1f} ms",
                        )
                        for recording in program.recordings
                    ],
                )
        for graph in self.eager_graphs:
            cure = "; call it under torch.no_grad() to have it captured" if graph.why == NEEDS_GRADIENTS else ""
            yield f"{graph.name}: eager, because {graph.why}{cure}"
            if graph.source:
                yield f"  at {graph.source}"
        for why, count in self.graph_breaks.items():
            yield f"Dynamo broke the graph {count}x: {why.strip().splitlines()[0]}"
        for where in self.at_recompile_limit:
            yield f"Dynamo will not recompile {where} again (torch._dynamo.config.recompile_limit): other calls run uncompiled"


def explain(compiled: Any = None) -> Report:
    """What was captured of ``compiled``, or of everything that this backend compiled.

    >>> import torch
    >>> compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options={"driver": "tape"})
    >>> _ = [compiled(torch.zeros(2)) for _ in range(4)]
    >>> report = explain(compiled).programs[0]
    >>> report.num_graph_segments, report.replays
    (1, 2)

    Args:
        compiled: what ``torch.compile`` returned, or a :class:`BreakableCUDAGraph`; None for all functions of this
            backend.

    Returns:
        a frozen snapshot. It is empty before the first call, which is when Dynamo compiles.
    """
    if isinstance(compiled, BreakableCUDAGraph):
        return Report((_captured(compiled),), (), {}, ())
    executors = list(breakable_cg.executors) if compiled is None else executors_of(compiled)
    executors.sort(key=lambda executor: int(executor.name.split()[-1]))
    return Report(
        tuple(_program(executor) for executor in executors),
        tuple(breakable_cg.uncaptured.values() if compiled is None else eager_graphs_of(compiled)),
        _torch.dynamo_counters("graph_break"),
        tuple(_torch.at_recompile_limit(compiled)),
    )


def _program(executor: Executor) -> ProgramReport:
    statistics = executor.statistics
    entries = [entry for addresses in executor.sets.values() for entry in addresses.entries.values()]
    recordings = tuple(_recording(entry, position) for position, entry in enumerate(entries))
    return ProgramReport(
        name=executor.name,
        driver=f"{executor.driver.name} on {executor.driver.device}",
        num_graph_segments=len(executor.program.graph_segments),
        num_eager_segments=len(executor.program.eager_segments),
        reasons=executor.program.reasons,
        text=str(executor.program),
        calls=statistics.calls,
        captures=statistics.captures,
        replays=statistics.finished_replays + sum(recording.replays for recording in recordings),
        copies=statistics.finished_copies + sum(recording.copies for recording in recordings),
        evictions=statistics.evictions,
        plain_calls=dict(statistics.plain),
        notes=tuple(executor.notes),
        lowering_seconds=statistics.lowering_seconds,
        recordings=recordings,
        debug=executor.options.debug,
    )


def _captured(graph: BreakableCUDAGraph) -> ProgramReport:
    recording, tally = graph.recording, graph.tally
    eager = [step for step in recording.steps if isinstance(step, EagerStep)] if recording else []
    driver = graph.driver
    return ProgramReport(
        name="captured graph" if recording else "graph that holds nothing",
        driver=f"{driver.name} on {driver.device}" if driver else "no driver yet",
        num_graph_segments=len(recording.graphs) if recording else 0,
        num_eager_segments=len(eager),
        reasons=tuple(reason for step in eager for reason in step.reasons),
        text=graph.source,
        calls=graph.replays + (recording is not None),
        captures=len(recording.graphs) if recording else 0,
        replays=graph.replays,
        copies=tally.copies if tally else 0,
        evictions=0,
        plain_calls={},
        notes=(),
        lowering_seconds=0.0,
        recordings=(),
        debug=graph.debug,
    )


def _recording(entry: Entry, position: int) -> RecordingReport:
    recording, replay = entry.recording, entry.replay
    numbers = ", ".join(str(part) for part in entry.key.shapes)
    return RecordingReport(
        key=f"{position}: {numbers}" if numbers else str(position),
        num_graphs=len(recording.graphs) if recording else 0,
        calls=entry.calls,
        captures=entry.captures,
        replays=entry.replays,
        copies_per_call=recording.num_copies if recording else 0,
        copies=entry.record_copies + (replay.tally.copies if replay else 0),
        bridge_bytes=recording.bridge_bytes if recording else 0,
        record_seconds=entry.record_seconds,
        source=replay.source if replay else "",
        refused=entry.refused,
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=160, no_color=True).print(table)
    return "\n".join(f"    {line}".rstrip() for line in out.getvalue().splitlines())
