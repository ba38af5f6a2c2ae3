"""``export``: graphs, programs and replays of a model, as files to read, to run and to compare."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breakable_backend.calling.registry import EagerGraph, eager_graphs_of, executors_of
from breakable_backend.calling.snapshot import Snapshot
from breakable_backend.capturing.graph import BreakableCUDAGraph, GraphSnapshot
from breakable_backend.errors import OptionsError
from breakable_backend.recordings.recording import GraphStep, Recording
from breakable_backend.tools.profiling import step_names
from breakable_backend.tools.sources import file_name, module_text, place, segment_name, segment_text, whole_text


@dataclass(frozen=True)
class _File:
    name: str
    text: str
    about: str


def export(compiled: Any, folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write the programs, segments, replays and graphs of ``compiled`` to files. Existing files stay.

    >>> import tempfile, torch
    >>> compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options={"driver": "tape"})
    >>> _ = [compiled(torch.zeros(2)) for _ in range(3)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     paths = export(compiled, folder)
    >>> [path.suffix for path in paths]
    ['.txt', '.py', '.py', '.py', '.py', '.dot']

    ``README.txt`` says what each file is. The file of a segment is Python that runs. A replay needs its graphs, so its
    file is only for reading.

    Args:
        compiled: what ``torch.compile`` returned, or a :class:`BreakableCUDAGraph`.
        folder: the directory; made if it does not exist.

    Returns:
        the paths of the written files, the index first.

    Raises:
        OptionsError: nothing was compiled or captured yet, or ``folder`` is a file or no path.
    """
    if not isinstance(folder, str | os.PathLike):
        raise OptionsError(
            f"export takes a directory as its second argument, got {type(folder).__name__}",
            fix="export(compiled, 'folder')",
        )
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OptionsError(
            f"export: {target} is not a directory", fix="name a directory; it is made if it is not there"
        )
    if isinstance(compiled, BreakableCUDAGraph):
        files, eager = list(_captured(compiled.snapshot())), []
    else:
        files = [file for executor in executors_of(compiled) for file in _compiled(executor.snapshot())]
        eager = eager_graphs_of(compiled)
        if not files and not eager:
            raise OptionsError(
                "export: nothing was compiled by breakable_cg yet",
                fix="call the compiled function first, and do not reset Dynamo",
            )
    target.mkdir(parents=True, exist_ok=True)
    paths = [place(target, file.name, file.text) for file in files]
    index = _index([(path.name, file.about) for path, file in zip(paths, files, strict=True)], eager)
    return (place(target, "README.txt", index), *paths)


def _compiled(snapshot: Snapshot) -> Iterator[_File]:
    program, name = snapshot.program, snapshot.name
    yield _File(
        file_name(name, "aten"),
        module_text(snapshot.lowered.module, f"{name}: what AOTAutograd made of it"),
        f"{name}, lowered to ATen",
    )
    counts = f"{len(program.graph_segments)} captured, {len(program.eager_segments)} eager"
    yield _File(file_name(name, "program"), whole_text(program, name), f"{name}, cut into segments: {counts}")
    for position, segment in enumerate(program.segments):
        title = segment_name(position, segment)
        yield _File(file_name(name, title), segment_text(program, position), f"{name}, {title.replace('_', ' ')}")
    for key in snapshot.keys:
        if key.recording is not None and key.replay is not None:
            yield from _recorded(f"{name} replay {key.number}", key.recording, key.replay.source)


def _captured(graph: GraphSnapshot) -> Iterator[_File]:
    if graph.recording is None or graph.replay is None:
        raise OptionsError("export: nothing was captured", fix="capture first: with capture(graph): ...")
    yield from _recorded(f"{graph.name} replay", graph.recording, graph.replay.source)


def _recorded(name: str, recording: Recording, source: str) -> Iterator[_File]:
    steps = step_names(recording)
    comments = "".join(f"# {step}\n" for step in steps)
    yield _File(file_name(name), comments + source, f"{name}: what a replay does, step by step")
    for step, title, position in zip(recording.steps, steps, range(len(steps)), strict=False):
        if isinstance(step, GraphStep):
            about = f"{name}, {title}: the graph in the DOT language"
            yield _File(file_name(name, "step", position, suffix="dot"), step.graph.dot(), about)


def _index(files: list[tuple[str, str]], eager: list[EagerGraph]) -> str:
    width = max((len(name) for name, _ in files), default=0)
    lines = [f"{name:{width}}  {about}" for name, about in files]
    lines += [
        f"{graph.name} runs as Dynamo traced it, because {graph.why}; nothing of it is captured" for graph in eager
    ]
    return "\n".join(lines) + "\n"
