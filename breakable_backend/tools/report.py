"""``explain``: what was captured, what was not, why, at which line, how long it takes, and whether it pays.

A report is a frozen snapshot: records of plain values, the same in a terminal, as JSON, as a graph and as a page.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.callers import found_by
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.registry import EagerGraph, eager_graphs_of, executors_of
from breakable_backend.calling.snapshot import KeySnapshot, Slots, Snapshot
from breakable_backend.capturing.graph import BreakableCUDAGraph, GraphSnapshot
from breakable_backend.compiling.lowering import NEEDS_GRADIENTS
from breakable_backend.errors import OptionsError, shown
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.program import EagerSegment, Op, Segment, described, lines_of_segments
from breakable_backend.ir.source_lines import module_path, short_line
from breakable_backend.ir.views import is_view_op
from breakable_backend.marks.call_sites import learning
from breakable_backend.marks.functions import CURED, MARKED_ANEW
from breakable_backend.marks.marking import marked_names
from breakable_backend.marks.rules import label, user_line_of
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.recording import NOTHING, Copy, EagerStep, Recording, Step
from breakable_backend.recordings.replay import Replay
from breakable_backend.tools.advice import advice, to_capture, to_compile
from breakable_backend.tools.measure import Place, measure_compiled, measure_graph
from breakable_backend.tools.page import page
from breakable_backend.tools.records import BridgeReport, ProgramReport, RecordingReport, StepReport
from breakable_backend.tools.saved_reports import record_from
from breakable_backend.tools.text import Table, as_html, as_rich, as_text, program_lines
from breakable_backend.tools.varies import findings, of_one_function
from breakable_backend.tools.verdict import Measured

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = 1
"""The version of :meth:`Report.to_dict`. It changes when a field changes its meaning or is removed."""


@dataclass(frozen=True)
class Report:
    """The result of :func:`explain`. ``print`` shows it."""

    programs: tuple[ProgramReport, ...]
    eager_graphs: tuple[EagerGraph, ...]
    """Graphs that run as Dynamo traced them: those whose halves are not captured, or not yet, and those that AOTAutograd
    cannot trace."""
    graph_breaks: Mapping[str, int]
    """Dynamo's graph breaks in this process, by reason."""
    at_recompile_limit: tuple[str, ...]
    """Functions that Dynamo does not compile again. Calls that fit no compiled version run uncompiled."""
    skipped: Mapping[str, str]
    """Functions that were called and run uncompiled, since Dynamo skipped them, with the cause."""
    stance: str
    """The stance of ``torch.compiler.set_stance``: ``"default"``, or one that compiles less."""
    learning: Mapping[str, str]
    """Marked functions whose results are not known yet, each with the line of its definition. Calls run as plain Python
    until then."""

    def __str__(self) -> str:
        return as_text(_lines(self))

    def __rich__(self) -> Group:
        """For ``rich.print``: the same with colour."""
        return as_rich(_lines(self))

    def _repr_html_(self) -> str:
        """For a notebook: lines and tables in the order of the text."""
        return as_html(_lines(self))

    @property
    def advice(self) -> dict[str, str]:
        """What helps, by reason, where graphs are eager, where Dynamo broke a graph, and where it compiled nothing."""
        told = {graph.why: to_capture(graph.why) for graph in self.eager_graphs}
        told |= {why: advice(why) for why in self.graph_breaks}
        told |= {why: to_compile(why) for why in self.skipped.values()}
        return {why: text for why, text in told.items() if text}

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, with the version of the schema.

        Steps also have ``title``, ``module`` and ``source``, and measured recordings have ``verdict``. The
        report has :attr:`advice`.
        """
        return {"schema": SCHEMA, **_plain(self)}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that :meth:`to_json` wrote as ``text``, in this or another process.

        Raises:
            OptionsError: ``text`` is not JSON, or not a report of this schema.
        """
        try:
            saved = json.loads(text)
        except json.JSONDecodeError as error:
            is_path = text.endswith(".json") and "\n" not in text
            raise OptionsError(
                f"this is not JSON: {error}",
                fix="give the text of the file, and not its path: Report.from_json(Path(path).read_text())"
                if is_path
                else "give what Report.to_json() wrote, unchanged",
            ) from None
        schema = saved.get("schema") if isinstance(saved, dict) else None
        if schema != SCHEMA:
            raise OptionsError(
                f"this is not a report of schema {SCHEMA}: its schema is {schema!r}",
                fix="save the report again, with this version of the package",
            )
        return record_from(cls, saved)

    def to_dot(self) -> str:
        """The programs as a graph for Graphviz: steps in order, bridges between them."""
        return "\n".join(_dot(self)) + "\n"

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one page, which needs no network. Returns its path."""
        written = Path(path)
        written.write_text(page(self.to_dict()), encoding="utf-8")
        return written


def explain(
    compiled: Any = None,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    eager: Callable[[], Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What was captured of ``compiled``, or of everything that this backend compiled.

    >>> import torch
    >>> compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options={"driver": "tape"})
    >>> _ = [compiled(torch.zeros(2)) for _ in range(4)]
    >>> report = explain(compiled).programs[0]
    >>> report.num_graph_segments, report.replays
    (1, 2)

    Args:
        compiled: what ``torch.compile`` returned, or a :class:`BreakableCUDAGraph`; None for all functions of this
            backend. Or a function or module that is not compiled, with arguments: it is compiled with ``options`` and
            called once, plainly, and nothing is captured; up to two calls more if marked functions are learned first.
            If you compile it later in the same way, this compiled code is used.
        args: arguments for a call, which is made before the report.
        options: as for ``torch.compile``, for a function that is not compiled yet.
        measure: whether to time each step of each recording, and the whole against eager. With ``args`` that call is
            timed, recorded first if necessary, and eager is the uncompiled function. Without, the contents of the
            bridges are replayed, and eager is a plain call. Marked functions run some hundred times. The random state,
            and what the graphs write of the caller's, is restored afterwards.
        eager: what to compare with instead; for a :class:`BreakableCUDAGraph`, which has no other reference.
        kwargs: keyword arguments for the call.

    Returns:
        a frozen snapshot. It is empty before the first call, in which Dynamo compiles.

    Raises:
        OptionsError: nothing to measure, or no bridge keeps an input that a replay needs.
    """
    if options is not None and (compiled is None or not _is_plain(compiled)):
        raise OptionsError(
            "options apply to a function that is not compiled yet",
            fix="give them to torch.compile, or explain the plain function",
        )
    if eager is not None and not callable(eager):
        raise OptionsError(
            f"eager takes a function without arguments, got {shown(eager)}", fix="eager=lambda: model(x)"
        )
    if isinstance(compiled, BreakableCUDAGraph):
        timed = measure_graph(compiled, eager) if measure else None
        return Report((_captured(compiled.snapshot(), timed),), (), {}, (), {}, "default", {})
    measured: Mapping[Place, Measured] = {}
    if compiled is not None and _is_plain(compiled):
        if not (args or kwargs):
            raise OptionsError(
                f"{getattr(compiled, '__qualname__', type(compiled).__name__)} is not compiled",
                fix='explain what torch.compile(..., backend="breakable_cg") returned, or give arguments to try it with',
            )
        compiled = torch.compile(compiled, backend="breakable_cg", options=dict(options or {}))
    if measure:
        if compiled is None:
            raise OptionsError("measure=True needs the function to measure", fix="explain(compiled, measure=True)")
        measured = measure_compiled(compiled, args, kwargs, eager)
    elif args or kwargs:
        compiled(*args, **kwargs)
        for _ in range(2):  # a float or bool in a result is learned in two calls
            if found_by(_torch.subjects_of(compiled), learning()):
                compiled(*args, **kwargs)
    executors = executors_of(compiled)
    programs = [_program(executor.snapshot(), measured) for executor in executors]
    if executors:
        calls = [(executor.callers.whole, program.calls) for executor, program in zip(executors, programs, strict=True)]
        told = (*programs[0].findings, *of_one_function(calls))
        programs[0] = dataclasses.replace(programs[0], findings=told)
    breaks = _breaks()
    if compiled is not None and executors:
        notes = (*programs[0].notes, *_notes(compiled, executors, breaks))
        programs[0] = dataclasses.replace(programs[0], notes=notes)
    waiting = learning() if compiled is None else found_by(_torch.subjects_of(compiled), learning())
    codes = () if compiled is None else _torch.codes_of(compiled)
    learners = {id(item.callers.whole) for item in waiting}
    skipped = _torch.skipped(code for code in codes if id(code) not in learners)
    return Report(
        tuple(programs),
        tuple(eager_graphs_of(compiled)),
        breaks,
        tuple(_torch.at_recompile_limit(None if compiled is None else _codes(compiled))),
        {where: CURE.sub("", why) for where, why in skipped.items()},
        _torch.stance(),
        {item.mark.name: item.mark.source for item in waiting},
    )


CURE = re.compile(rf"{CURED}.*?(?=; graph break in loop$|$)")
"""What to do about a marked function that is no node: the line of the graph break says it."""


def _breaks() -> dict[str, int]:
    """Dynamo's graph breaks. A marked function's caller breaks there, and the wrapper of the mark breaks too."""
    found = {_with_cause(why): count for why, count in _torch.graph_breaks().items()}
    first = {why: why.partition("\n")[0] for why in found}
    return {
        why: count for why, count in found.items() if not any(other.startswith(f"{first[why]}, at ") for other in found)
    }


def _with_cause(graph_break: str) -> str:
    """Why Dynamo broke the graph; at a call of a marked function, why that call is a break."""
    told = re.search(rf"\(reason: (.*, is no node: .*|{re.escape(MARKED_ANEW)})\)$", graph_break, re.MULTILINE)
    if told is None:
        return graph_break
    _, at, place = graph_break.partition("\n")[0].partition(", at ")
    what, _, cure = told[1].partition(CURED)
    return what + at + place + (f"\n  {cure}" if cure else "")


def _is_plain(function: Any) -> bool:
    """Whether it is neither compiled nor captured."""
    return not (
        isinstance(function, BreakableCUDAGraph)
        or _torch.holds_compiled(function)
        or executors_of(function)
        or eager_graphs_of(function)
    )


def _notes(compiled: Any, executors: Sequence[Executor], breaks: Iterable[str]) -> Iterator[str]:
    """Marks that no graph of ``compiled`` calls, or that came after its compilation; and whether it is compiled itself."""
    unmet = frozenset.intersection(*(executor.lowered.unmet for executor in executors))
    in_breaks = {mark.removeprefix("one ").replace(" is ", ", ", 1): mark for mark in unmet}
    unmet -= {mark for told, mark in in_breaks.items() if any(why.startswith(told) for why in breaks)}
    yield from (f"{mark}, and no graph of this function calls it" for mark in sorted(unmet))
    later = marked_names().difference(*(executor.lowered.marked for executor in executors))
    yield from map(LATER.format, sorted(later))
    if not _torch.holds_compiled(compiled):
        yield NOT_ITSELF.format(type(compiled).__name__)


def _codes(compiled: Any) -> list[CodeType]:
    """The code objects that Dynamo compiles for ``compiled``: functions, and their continuations after graph breaks."""
    found = (executor.callers.code for executor in executors_of(compiled))
    return [*_torch.codes_of(compiled), *(code for code in found if code is not None)]


# --- from executors and graphs ------------------------------------------------------------------------------------------


def _program(snapshot: Snapshot, measured: Mapping[Place, Measured]) -> ProgramReport:
    statistics, program, driver = snapshot.statistics, snapshot.program, snapshot.driver
    slots = snapshot.slots or Slots(count=0, pending=0, saved_bytes=0)
    recordings = tuple(
        _recording(key, position, measured.get((snapshot.name, key.key))) for position, key in enumerate(snapshot.keys)
    )
    replays = statistics.finished_replays + sum(recording.replays for recording in recordings)
    return ProgramReport(
        name=snapshot.name,
        driver=f"{driver.name} on {', '.join(map(str, driver.devices))}",
        num_graph_segments=len(program.graph_segments),
        num_eager_segments=len(program.eager_segments),
        reasons=program.reasons,
        steps=_with_lines(map(_segment, itertools.count(), program.segments), lines_of_segments(program)),
        text=str(program),
        calls=statistics.calls,
        captures=statistics.captures,
        replays=replays,
        copies=statistics.finished_copies + sum(recording.copies for recording in recordings),
        evictions=statistics.evictions,
        plain_calls=dict(statistics.plain),
        recorded=dict(statistics.recorded),
        notes=snapshot.notes,
        lowering_seconds=statistics.lowering_seconds,
        pool_bytes=driver.pool_bytes(),
        executable_bytes=driver.executable_bytes(),
        recordings=recordings,
        debug=snapshot.options.debug,
        bound_calls=statistics.bound,
        misfits=dict(statistics.misfits),
        findings=findings(snapshot, replays),
        slots=slots.count,
        pending=slots.pending,
        saved_bytes=slots.saved_bytes,
    )


def _recording(key: KeySnapshot, position: int, measured: Measured | None) -> RecordingReport:
    # Objects such as a device mesh, which torch 2.13 passes once for each distributed tensor, are left out.
    parts = [_part(part) for part in key.key.shapes if isinstance(part, bool | int | float | str | tuple)]
    numbers = ", ".join(parts)
    return RecordingReport(
        key=f"{position}: {numbers}" if numbers else str(position),
        calls=key.calls,
        captures=key.captures,
        replays=key.replays,
        copies=key.copies,
        warmup_seconds=key.warmup_seconds,
        record_seconds=key.record_seconds,
        why=key.why,
        refused=key.refused,
        failures=key.trials.failures,
        last_failure=key.trials.reason,
        **_recorded(key.recording, key.replay, measured),
    )


def _part(part: Any) -> str:
    """A part of a key: a number, a layout as ``float32[2, 4]``, or the value of a host scalar."""
    match part:
        case [torch.Size() as shape, tuple() as stride, torch.dtype() as dtype, torch.device() as device]:
            spec = TensorSpec(tuple(shape), stride, dtype, device)
            dense = torch.empty_strided(shape, stride, device="meta").is_contiguous()
            return f"{str(dtype).removeprefix('torch.')}{list(shape)}" if dense else str(spec)
        case [torch.dtype() as dtype, bytes() as held]:
            return str(torch.frombuffer(bytearray(held), dtype=dtype).item())
    return str(part)


def _recorded(recording: Recording | None, replay: Replay | None, measured: Measured | None) -> dict[str, Any]:
    """The fields of a :class:`RecordingReport` for a recording."""
    made = recording or NOTHING
    return {
        "num_graphs": made.num_segments,
        "copies_per_call": made.num_copies,
        "bridge_bytes": made.held.bridges,
        "held_bytes": made.held.values,
        "source": replay.source if replay else "",
        "steps": _timed(_steps(recording, replay), measured),
        "measured": measured,
    }


def _captured(graph: GraphSnapshot, measured: Measured | None) -> ProgramReport:
    recording, replay, driver = graph.recording, graph.replay, graph.driver
    num_graphs, copies = (recording or NOTHING).num_segments, replay.tally.copies if replay is not None else 0
    steps = _steps(recording, replay)
    eager = [step for step in steps if step.kind == "eager"]
    recordings: tuple[RecordingReport, ...] = ()
    if recording is not None:
        made = RecordingReport(
            key="0",
            calls=graph.replays + 1,
            captures=num_graphs,
            replays=graph.replays,
            copies=copies,
            record_seconds=graph.record_seconds,
            why="captured",
            **_recorded(recording, replay, measured),
        )
        recordings = (made,)
    return ProgramReport(
        name="captured graph" if recording else "graph that holds nothing",
        driver=f"{driver.name} on {driver.device}" if driver else "no driver yet",
        num_graph_segments=num_graphs,
        num_eager_segments=len(eager),
        reasons=tuple(reason for step in eager for reason in step.reasons),
        steps=tuple(dataclasses.replace(step, first_line=-1, end_line=-1) for step in steps),
        text=replay.source if replay else "",
        calls=graph.replays + (recording is not None),
        captures=num_graphs,
        replays=graph.replays,
        copies=copies,
        recorded={"captured": 1} if recording else {},
        pool_bytes=driver.pool_bytes() if driver else 0,
        executable_bytes=driver.executable_bytes() if driver else 0,
        recordings=recordings,
        debug=graph.debug,
    )


def _steps(recording: Recording | None, replay: Replay | None) -> tuple[StepReport, ...]:
    if recording is None or replay is None:
        return ()
    steps = (_step(recording, position, step) for position, step in enumerate(recording.steps))
    return _with_lines(steps, replay.steps)


def _with_lines(steps: Iterable[StepReport], lines: Sequence[tuple[int, int]]) -> tuple[StepReport, ...]:
    placed = zip(steps, lines, strict=True)
    return tuple(dataclasses.replace(step, first_line=first, end_line=end) for step, (first, end) in placed)


def _timed(steps: tuple[StepReport, ...], measured: Measured | None) -> tuple[StepReport, ...]:
    if measured is None:
        return steps
    costliest = {cost.step: cost.op for cost in measured.breaks}
    return tuple(
        dataclasses.replace(step, host_us=time.host_us, gpu_us=time.gpu_us, costliest=costliest.get(step.position, ""))
        for step, time in zip(steps, measured.steps, strict=True)
    )


def _step(recording: Recording, position: int, step: Step) -> StepReport:
    if isinstance(step, EagerStep):
        called = tuple(Op(call.result, call.label, "", "", call.source) for call in step.calls if call.source)
        ops = ops_of(step.segment.module) if step.segment is not None else called
        return StepReport(position, "eager", ops, step.reasons, (), -1, ())
    bridges = [_bridge(recording, copy, "in") for copy in step.loads]
    bridges += [_bridge(recording, copy, "out") for copy in step.stores]
    ops = ops_of(step.segment.module) if step.segment is not None else step.ops
    kernels = step.graph.kernels()
    return StepReport(position, "captured", ops, (), kernels, step.graph.num_kernels, tuple(bridges))


def _bridge(recording: Recording, copy: Copy, direction: Literal["in", "out"]) -> BridgeReport:
    bridge = recording.constants[copy.bridge.name]
    assert isinstance(bridge, Bridge)
    return BridgeReport(copy.value.name, direction, bridge.tensor.untyped_storage().nbytes())


def _segment(position: int, segment: Segment) -> StepReport:
    reasons = segment.reasons if isinstance(segment, EagerSegment) else ()
    return StepReport(position, "eager" if reasons else "captured", ops_of(segment.module), reasons, (), -1, ())


def ops_of(module: fx.GraphModule) -> tuple[Op, ...]:
    """What a segment's module does, in order, without views and parts of results."""
    return tuple(
        Op(node.name, label(node), described(node.meta.get("val")), module_path(node), user_line_of(node))
        for node in module.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem and not is_view_op(node.target)
    )


# --- the text -------------------------------------------------------------------------------------------------------------


def _lines(report: Report) -> Iterator[str | Table]:
    if not (report.programs or report.eager_graphs or report.skipped or report.learning):
        yield f"nothing was compiled by breakable_cg yet: {STANCES.get(report.stance, FIRST_CALL)}"
    elif report.stance in STANCES:
        yield STANCES[report.stance]
    calls = sum(program.calls for program in report.programs)
    if calls:
        yield _share(report.programs, calls)
    for program in report.programs:
        yield from program_lines(program)
    for graph in report.eager_graphs:
        cure = "; call it under torch.no_grad() to have it captured" if graph.why == NEEDS_GRADIENTS else ""
        yield f"{graph.name}: eager, because {graph.why}{cure}"
        if graph.source:
            yield f"  at {short_line(graph.source)}"
        if helps := to_capture(graph.why):
            yield f"  to have it captured: {helps}"
    for why, count in report.graph_breaks.items():
        yield f"Dynamo broke the graph {count}x: {_short(why.strip().splitlines()[0])}"
        if helps := advice(why):
            yield f"  to keep one program: {helps}"
    for name, source in report.learning.items():
        yield f"learning what {name} returns: its caller ran as plain Python, and is compiled at a later call"
        yield f"  at {short_line(source)}"
    for where, why in report.skipped.items():
        yield f"Dynamo compiled nothing of {_short(where)}, which runs uncompiled: {_short(why)}"
        if helps := to_compile(why):
            yield f"  to have it compiled: {helps}"
    for where in report.at_recompile_limit:
        yield f"Dynamo will not recompile {_short(where)} again (torch._dynamo.config.recompile_limit): other calls run uncompiled"


def _short(text: str) -> str:
    """A reason of Dynamo's with the names of files in place of their paths."""
    return re.sub(r"(?:(?<=, at )|(?<=\())\S+(?=:\d+\b)", lambda path: os.path.basename(path[0]), text)


def _share(programs: Sequence[ProgramReport], calls: int) -> str:
    """How many calls were replays, on which the other figures depend."""
    replays = sum(program.replays for program in programs)
    recorded = sum(sum(program.recorded.values()) for program in programs)
    plain = sum(sum(program.plain_calls.values()) for program in programs)
    graphs = f" of {len(programs)} graphs" if len(programs) > 1 else ""
    return f"replayed {replays:,} of {calls:,} calls{graphs} ({replays / calls:.0%}), recorded {recorded:,}, ran plainly {plain:,}"


FIRST_CALL = "it compiles at the first call of a function that was compiled with backend='breakable_cg'"
LATER = (
    "{} was marked by mark_eager after this was compiled, which the mark does not change: mark before the first call, "
    "or compile again (torch.compiler.reset())"
)
NOT_ITSELF = (
    "the {} that was asked for is not compiled itself: this is of its code, compiled for what calls it or for another "
    "object (a copy of a module that was compiled in place is not compiled)"
)
STANCES = {
    stance: f"torch.compiler.set_stance({stance!r}) is on, {what}"
    for stance, what in (
        ("force_eager", "so all calls run uncompiled"),
        ("eager_on_recompile", "so calls that need another compilation run uncompiled"),
        ("fail_on_recompile", "so calls that need another compilation are an error"),
        ("eager_then_compile", "so the first call of a function runs uncompiled"),
        ("aot_eager_then_compile", "so the first call of a function runs by another backend, aot_eager"),
    )
}


# --- other forms ----------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; records with those properties that describe them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        names += SHOWN.get(type(value), ())
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


SHOWN: Mapping[type, tuple[str, ...]] = {
    Report: ("advice",),
    StepReport: ("title", "module", "source"),
    Measured: ("verdict", "busy"),
}


def _dot(report: Report) -> Iterator[str]:
    yield "digraph breakable_cg {"
    yield "  node [shape=box, style=filled, fontname=monospace]; rankdir=TB;"
    for number, program in enumerate(report.programs):
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={_quoted(f'{program.name} ({program.driver})')};"
        steps = program.main.steps if program.main is not None else program.steps
        for step in steps:
            because = "\n".join(dict.fromkeys(reason.text for reason in step.reasons))
            size = f"{len(step.ops)} op{'s' * (len(step.ops) != 1)}" if step.kind == "captured" else because
            text = "\n".join(line for line in (f"{step.position}: {step.title}", size, step.source) if line)
            color = "#cfe8cf" if step.kind == "captured" else "#f6d5a8"
            yield f'    p{number}_{step.position} [label={_quoted(text)}, fillcolor="{color}"];'
        for before, after in itertools.pairwise(steps):
            bridges = ", ".join(f"{bridge.value} {bridge.bytes} B" for bridge in after.bridges)
            yield f"    p{number}_{before.position} -> p{number}_{after.position} [label={_quoted(bridges)}];"
        yield "  }"
    yield "}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\\n", "\\l")
