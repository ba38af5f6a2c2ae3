"""The text of a report: its lines and tables, for a terminal and for a notebook."""

from __future__ import annotations

import html
import io
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from breakable_backend.ir.program import Reason
from breakable_backend.ir.source_lines import short_line
from breakable_backend.tools.records import ProgramReport, StepReport

if TYPE_CHECKING:
    import rich.console
    import rich.table

ROWS = 40
"""How many steps of one program a terminal shows. The page shows all."""
WIDTH = 160
"""Columns of a text that does not go to a terminal."""


@dataclass(frozen=True)
class Table:
    """A table of strings."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> rich.table.Table:
        """The table as rich draws it."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self.columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for row in self.rows:
            # Cells contain lines of code. A Text has no markup and no emoji, so [mask] and :x: stay as they are.
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        return table

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


STYLES = {"captured": "green", "eager": "yellow"}
"""The colours of cells with these texts, if there is colour."""


def as_text(parts: Iterable[str | Table]) -> str:
    """Lines and tables as plain text: as wide as the terminal if standard output is one, else :data:`WIDTH` columns."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=max(width, 40 + INDENT), no_color=True)
    with console.capture() as printed:
        console.print(as_rich(parts), no_wrap=True, overflow="ignore", crop=False)  # a line may be longer
    return "\n".join(map(str.rstrip, printed.get().removesuffix("\n").split("\n")))


INDENT = 4
"""Columns before a table."""


def as_rich(parts: Iterable[str | Table]) -> rich.console.Group:
    """Lines and tables for a console of rich's, which knows its own width and colours."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    def shown(part: str | Table) -> Text | Padding:
        return Text(part) if isinstance(part, str) else Padding(part.rich(), (0, 0, 0, INDENT), expand=False)

    return Group(*map(shown, parts))


def as_html(parts: Iterable[str | Table]) -> str:
    """Lines and tables as HTML, for a notebook."""
    pieces, lines = [], []
    for part in parts:
        if isinstance(part, str):
            lines.append(part)
            continue
        pieces += [_lines_as_html(lines), part.html()]
        lines = []
    return f"<div>{''.join(pieces)}{_lines_as_html(lines)}</div>"


def _lines_as_html(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>" if lines else ""


# --- what is said of a program ------------------------------------------------------------------------------------------


DEBUG = {
    "eager": "debug mode: every op runs eagerly; nothing is captured",
    "compare": "debug mode: every replay is compared with eager, step by step",
}


def program_lines(program: ProgramReport) -> Iterator[str | Table]:
    """The lines of a report about one program."""
    yield f"{program.name}: {program.num_graph_segments} captured, {program.num_eager_segments} eager ({program.driver})"
    if program.debug is not None:
        yield f"  {DEBUG[program.debug]}"
    yield (
        f"  calls {program.calls}, captures {program.captures}, replays {program.replays}, copies {program.copies}, "
        f"plain {sum(program.plain_calls.values())}, evictions {program.evictions}, lowered in {program.lowering_seconds:.2f} s"
    )
    for why, count in program.plain_calls.items():
        yield f"  ran plainly {count}x: {why}"
    for why, count in program.recorded.items():
        yield f"  recorded {count}x: {why}"
    if program.slots:
        saved = program.saved_bytes / 2**20
        yield f"  slots {program.slots}, pending forwards {program.pending}, saved for backwards {saved:,.1f} MiB"
    if program.bound_calls or program.misfits:
        yield f"  bound calls {program.bound_calls}, calls that did not fit what was bound {sum(program.misfits.values())}"
    for why, count in program.misfits.items():
        yield f"  did not fit {count}x: {why}"
    for finding in program.findings:
        yield f"  few calls replay: {finding}"
    for note in program.notes:
        yield f"  note: {note}"
    main = program.main
    steps = main.steps if main is not None and main.measured is not None else program.steps
    if breaks := list(_breaks(steps)):
        yield Table(("eager", "times", "because", "at"), breaks)
    if program.recordings:
        yield Table(
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
    for recording in program.recordings:
        if recording.failures:
            yield f"  key {recording.key}: recording failed {recording.failures}x for reasons that pass; {recording.last_failure}"
    yield from _step_lines(main.steps if main is not None else program.steps)
    for recording in program.recordings:
        if recording.measured is not None:
            yield f"  key {recording.key}: {recording.measured.verdict}"
            yield from (f"    {line}" for line in recording.measured.lines())


def _breaks(steps: Sequence[StepReport]) -> Iterator[tuple[str, ...]]:
    """The rows of the breaks. Those that are alike are counted; what else runs in a break has rows below it."""
    counted = Counter(_because(step) for step in steps if step.kind == "eager")
    for (first, *others), count in counted.items():
        yield _row(first, "", str(count))
        yield from (_row(reason, "  with ", "") for reason in others[:ROWS])
        if len(others) > ROWS:
            yield f"  and {len(others) - ROWS} more", "", "", ""


def _row(reason: Reason, before: str, count: str) -> tuple[str, ...]:
    return f"{before}{reason.op}", count, reason.text, short_line(reason.source)


def _because(step: StepReport) -> tuple[Reason, ...]:
    """The different reasons of a break, that of its costliest op first."""
    return tuple(dict.fromkeys(sorted(step.reasons, key=lambda reason: reason.op != step.costliest)))


def _step_lines(steps: Sequence[StepReport]) -> Iterator[str | Table]:
    if not steps:
        return
    steps = [step for step in steps if step.kind == "eager" or step.ops or step.bridges or step.num_kernels]
    timed = any(step.host_us is not None for step in steps)
    measured = ("host us", "GPU us") if timed else ()
    columns = ("step", "", "ops", "kernels", "bridges", *measured, "module", "what", "at")
    rows = []
    for step in steps[:ROWS]:
        counts = Counter(bridge.direction for bridge in step.bridges)
        size = sum(bridge.bytes for bridge in step.bridges)
        bridges = [*(f"{count} {direction}" for direction, count in counts.items()), *([f"{size} B"] if size else ())]
        times = (_us(step.host_us), _us(step.gpu_us)) if timed else ()
        kernels = str(step.num_kernels) if step.num_kernels >= 0 else ""
        where = short_line(step.source).partition(": ")[0]
        facts = str(step.position), step.kind, str(len(step.ops)), kernels, ", ".join(bridges)
        rows.append((*facts, *times, step.module, step.title, where))
    yield Table(columns, rows)
    if len(steps) > ROWS:
        yield f"    ... {len(steps) - ROWS} more steps: report.to_html(path) shows all"


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
