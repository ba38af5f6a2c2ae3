"""``export``: every text behind a compiled function or a captured graph, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, BreakableError, OptionsError, capture, eager_on_graph, export, reset
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings.generated_code import with_code
from graphs import golden


def parts(error: BreakableError) -> str:
    """What and what to do, without the line of this file."""
    return f"{error.what}\n  {error.fix}"


def model(x: Tensor) -> Tensor:
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x


def test_compiled(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """The program, its segments, each replay and each graph are written; the index comes first and names them all."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(4, device=device))
    (executor,) = executors_of(compiled)
    executor.name = "graph 0"  # the number is that of the process
    index, *paths = export(compiled, tmp_path / "new" / "folder")
    assert index.name == "README.txt" and all(path.parent == tmp_path / "new" / "folder" for path in paths)
    golden(
        index.read_text(),
        """\
breakable_cg_graph_0_aten.py                graph 0, lowered to ATen
breakable_cg_graph_0_program.py             graph 0, cut into segments: 2 captured, 1 eager
breakable_cg_graph_0_segment_0_captured.py  graph 0, segment 0 captured
breakable_cg_graph_0_segment_1_eager.py     graph 0, segment 1 eager
breakable_cg_graph_0_segment_2_captured.py  graph 0, segment 2 captured
breakable_cg_graph_0_replay_0.py            graph 0 replay 0: what a replay does, step by step
breakable_cg_graph_0_replay_0_step_0.dot    graph 0 replay 0, step 0 captured, 2 kernels: the graph in the DOT language
breakable_cg_graph_0_replay_0_step_2.dot    graph 0 replay 0, step 2 captured, 3 kernels: the graph in the DOT language
""",
    )
    assert [path.name for path in paths] == [line.split()[0] for line in index.read_text().splitlines()]
    texts = {path.name: path.read_text() for path in paths}
    for name, text in texts.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
        else:
            assert text.startswith("digraph")
    ((entry,),) = (addresses.entries.values() for addresses in executor.keys.sets.values())
    assert entry.replay is not None
    assert texts["breakable_cg_graph_0_replay_0.py"].endswith(entry.replay.source)


def test_segments_stay_as_they_are(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """An export compiles nothing anew that recordings in other threads run meanwhile, bodies of regions included."""

    @torch.compiler.nested_compile_region
    def region(x: Tensor) -> Tensor:
        return x.sin() + 1

    compiled = torch.compile(lambda x: region(model(region(x))), backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(4, device=device))
    (executor,) = executors_of(compiled)
    program = executor.program
    modules = [module for segment in program.graph_segments for module in segment.module.modules()]
    before = [(type(with_code(module)).forward, type(module).forward.__code__) for module in modules]
    export(compiled, tmp_path)
    assert [(type(module).forward, type(module).forward.__code__) for module in modules] == before


def test_segment_runs(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """An exported segment is a module that computes what the segment does."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    with torch.no_grad():
        compiled(torch.ones(4, device=device))
    paths = export(compiled, tmp_path)
    (path,) = [path for path in paths if path.name.endswith("segment_2_captured.py")]
    scope: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    y, x = torch.randn(4, device=device), torch.randn(4, device=device)
    (result,) = scope["Segment"]()(y, x)
    assert torch.equal(result, (y * 2).cos() + x)


def test_every_recording(options: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    """Each key that is recorded has its replay; a released one has none."""
    compiled = torch.compile(model, backend="breakable_cg", options=options, dynamic=True)
    with torch.no_grad():
        for size in (4, 4, 8, 8, 4):
            compiled(torch.ones(size, device=device))
    names = [path.name for path in export(compiled, tmp_path / "two")]
    assert sum("replay" in name and name.endswith(".py") for name in names) == 2
    assert sum(name.endswith(".dot") for name in names) == 4
    reset(compiled)
    names = [path.name for path in export(compiled, tmp_path / "none")]
    assert not any("replay" in name for name in names)


def test_captured_by_hand(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """A captured graph gives its replay and its graphs."""

    @eager_on_graph
    def clip(x: Tensor) -> Tensor:
        return x.clamp(max=2)

    graph = BreakableCUDAGraph(driver=options["driver"])
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph):
        y = clip(x + 1) * 2
    index, source, *graphs = export(graph, tmp_path)
    assert source.read_text().endswith(graph.source)
    assert [path.suffix for path in graphs] == [".dot", ".dot"]
    assert "what a replay does" in index.read_text()
    del y
    graph.reset()


def test_graphs_that_run_as_traced(tmp_path: Path) -> None:
    """A graph of which nothing is captured is in the index, with why."""
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape", "training": False})
    compiled(torch.ones(4, requires_grad=True))
    (index,) = export(compiled, tmp_path)
    assert "runs as Dynamo traced it, because it needs gradients; nothing of it is captured" in index.read_text()


def test_again(tmp_path: Path) -> None:
    """What is there already stays: the same text goes to the same file, another to one beside it."""
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape"})
    with torch.no_grad():
        compiled(torch.ones(4))
    first = export(compiled, tmp_path)
    assert export(compiled, tmp_path) == first
    program = next(path for path in first if path.name.endswith("_program.py"))
    program.write_text("mine")
    again = export(compiled, tmp_path)
    assert program.read_text() == "mine"
    assert program.with_name(program.stem + ".1.py") in again


def test_errors(tmp_path: Path) -> None:
    """Nothing compiled, nothing captured, and a file for a folder are errors that say what to do."""
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape"})
    with pytest.raises(OptionsError) as caught:
        export(compiled, tmp_path / "folder")
    assert parts(caught.value) == (
        "export: nothing was compiled by breakable_cg yet\n  call the compiled function first, and do not reset Dynamo"
    )
    assert not (tmp_path / "folder").exists()
    with pytest.raises(OptionsError) as caught:
        export(BreakableCUDAGraph(driver="tape"), tmp_path)
    assert parts(caught.value) == "export: nothing was captured\n  capture first: with capture(graph): ..."
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionsError) as caught:
        export(compiled, tmp_path / "file")
    assert parts(caught.value) == (
        f"export: {tmp_path / 'file'} is not a directory\n  name a directory; it is made if it is not there"
    )
