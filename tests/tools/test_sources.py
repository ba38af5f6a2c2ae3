"""Graphs, programs and replays as files: what each says, and that a debugger steps through them under depyf."""

from __future__ import annotations

import bdb
import linecache
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, capture
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings.generated_code import with_code
from breakable_backend.tools import sources
from graphs import golden

# depyf says at each use that all branches should be run, and leaves the files that it reads to the collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*You are trying to debug `torch.compile`", "ignore:unclosed file:ResourceWarning"
)


def model(x: Tensor) -> tuple[Tensor, Tensor]:
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x, y.view(2, -1)


def compiled_model(options: dict[str, Any], **more: Any) -> Any:
    return torch.compile(model, backend="breakable_cg", options=options, **more)


def executor_of(compiled: Any) -> Executor:
    (executor,) = executors_of(compiled)
    return executor


def call(compiled: Any, device: torch.device, times: int = 1) -> None:
    """Call with new inputs and compare with eager."""
    with torch.no_grad():
        for _ in range(times):
            x = torch.randn(4, device=device)
            for mine, theirs in zip(compiled(x), model(x), strict=True):
                assert torch.equal(mine, theirs)


@contextmanager
def depyf(folder: Path) -> Iterator[None]:
    module = pytest.importorskip("depyf")
    with module.prepare_debug(str(folder)):
        yield


class Breakpoints(bdb.Bdb):
    """Breaks at lines of one file, counts the stops, and goes on."""

    def __init__(self, file: Path, marks: Sequence[str] = (" = torch.ops", "graph_")) -> None:
        super().__init__()
        self.stops: Counter[int] = Counter()
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if any(mark in line for mark in marks):
                assert self.set_break(str(file), number) is None

    def user_line(self, frame: FrameType) -> None:
        if self.break_here(frame):
            self.stops[frame.f_lineno] += 1
        self.set_continue()

    def count(self, function: Callable[[], None]) -> int:
        """Stops during ``function``."""
        before, tracing = self.stops.total(), sys.gettrace()
        try:
            self.runcall(function)
        finally:
            sys.settrace(tracing)
        return self.stops.total() - before


# --- depyf ------------------------------------------------------------------------------------------------------------


def test_files(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """Every text has its file under a name that says what it is, and the files say the same as the program and the replay."""
    compiled = compiled_model(options)
    with depyf(tmp_path):
        call(compiled, device, 4)
    executor = executor_of(compiled)
    stem = f"breakable_cg_{executor.name.replace(' ', '_')}"
    texts = {path.name.removeprefix(stem): path.read_text() for path in tmp_path.glob(f"{stem}*")}
    assert sorted(texts) == [
        "_aten.py",
        "_dynamo.py",
        "_plain.py",
        "_program.py",
        "_replay_0.py",
        "_segment_0_captured.py",
        "_segment_1_eager.py",
        "_segment_2_captured.py",
    ]
    assert "x_.sin()" in texts["_dynamo.py"]
    assert "torch.ops.aten.sin.default" in texts["_aten.py"]
    assert "class segment_1_eager(torch.nn.Module):" in texts["_program.py"]
    assert "because silly::triple: tagged cudagraph_unsafe" in texts["_segment_1_eager.py"]
    ((entry,),) = (addresses.entries.values() for addresses in executor.keys.sets.values())
    assert entry.replay is not None
    assert texts["_replay_0.py"] == entry.replay.source
    call(compiled, device, 2)


def test_files_of_a_graph_that_learns(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """The forward and the backward have their own files, named after them, from what AOTAutograd made to the replay."""
    compiled = torch.compile(
        lambda x: (x.sin() + 1).sum(), backend="breakable_cg", options={**options, "training": True}
    )
    with depyf(tmp_path):
        for _ in range(4):
            compiled(torch.ones(3, device=device, requires_grad=True)).backward()
    names = {re.sub(r"graph_\d+", "graph", path.name) for path in tmp_path.glob("breakable_cg*")}
    for half in ("forward", "backward"):
        assert {f"breakable_cg_{half}_of_graph_{what}.py" for what in ("aten", "program", "replay_0")} <= names
    assert "breakable_cg_graph_dynamo.py" in names and "breakable_cg_graph_aten.py" not in names


def test_replay_runs_from_its_file(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """A breakpoint in the file of a replay is hit once in each later call, and not before the recording."""
    compiled = compiled_model(options)
    with depyf(tmp_path):
        call(compiled, device, 2)
        (file,) = tmp_path.glob("breakable_cg_*_replay_0.py")
        breakpoints = Breakpoints(file)
        assert breakpoints.count(lambda: call(compiled, device)) == 2  # two captured segments
    assert breakpoints.count(lambda: call(compiled, device)) == 2
    assert linecache.getline(str(file), 1).startswith("def replay(")


def test_plain_calls_run_from_their_file(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """A breakpoint in the file of plain calls is hit in a key's first call, and in no replay."""
    compiled = compiled_model(options)
    with depyf(tmp_path):
        call(compiled, device)
        executor_of(compiled).reset()
        (file,) = tmp_path.glob("breakable_cg_*_plain.py")
        breakpoints = Breakpoints(file, (" = aten_", " = silly_"))
        counts = [breakpoints.count(lambda: call(compiled, device)) for _ in range(3)]
    assert counts == [7, 0, 0]  # sin, add | triple | mul, cos, add | view


@pytest.mark.parametrize(("debug", "hits"), [("eager", [3, 3, 3, 3]), (None, [0, 3, 0, 0])])
def test_segment_runs_from_its_file(
    device: torch.device, options: dict[str, Any], tmp_path: Path, debug: str | None, hits: list[int]
) -> None:
    """Breakpoints in a segment's file are hit while its Python runs: in every call with ``debug="eager"``, replays too."""
    compiled = compiled_model({**options, "debug": debug})
    with depyf(tmp_path):
        call(compiled, device)
        executor_of(compiled).reset()
        (file,) = tmp_path.glob("breakable_cg_*_segment_2_captured.py")
        breakpoints = Breakpoints(file)
        counts = [breakpoints.count(lambda: call(compiled, device)) for _ in range(4)]
    assert counts == hits  # mul, cos and add


@torch.library.custom_op("sources::ghost", mutates_args=())
def ghost(x: Tensor) -> Tensor:
    """A copy of ``x``, which no op makes under a capture."""
    return torch.empty_like(x) if silly.capturing() else x.clone()


ghost.register_fake(torch.empty_like)


def test_a_capture_from_files_finds_the_guilty_op(
    device: torch.device, options: dict[str, Any], tmp_path: Path
) -> None:
    """Where segments are captured from their files, an op that adds nothing to the graph is found as it is without."""

    def with_a_ghost(x: Tensor) -> Tensor:
        return torch.ops.sources.ghost((x.sin() + 1).cos()).sin() * 2 + x

    compiled = torch.compile(with_a_ghost, backend="breakable_cg", options=options)
    with depyf(tmp_path), torch.no_grad():
        for _ in range(4):
            x = torch.randn(8, device=device)
            assert torch.equal(compiled(x), with_a_ghost(x))
    (reason,) = executor_of(compiled).program.reasons
    assert reason.op == "sources::ghost" and "adds nothing to the captured graph" in reason.text
    assert len(executor_of(compiled).program.graph_segments) == 2


def test_error_in_a_file_names_the_users_line(tmp_path: Path) -> None:
    """What raises in a segment that runs from its file is still traced to the user's line.

    On the CPU: an index out of range leaves no CUDA context to go on with.
    """

    def indexing(x: Tensor, at: Tensor) -> Tensor:
        return (x.sin() + 1).index_select(0, at)

    compiled = torch.compile(indexing, backend="breakable_cg", options={"driver": "tape", "debug": "eager"})
    with depyf(tmp_path), torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(4), torch.tensor([1]))
        with pytest.raises(IndexError) as caught:
            compiled(torch.ones(4), torch.tensor([9]))
    (note,) = caught.value.__notes__
    assert "in a compiled graph, at" in note and "index_select(0, at)" in note


def test_ambient_state_in_a_file(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """A segment whose op enters an autocast runs from its file as it did without."""

    def cast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return silly.double(x @ x).sin() + 1

    compiled = torch.compile(cast, backend="breakable_cg", options=options)
    with depyf(tmp_path), torch.no_grad():
        for _ in range(4):
            x = torch.randn(4, 4, device=device)
            assert torch.equal(compiled(x), cast(x))
    assert list(tmp_path.glob("breakable_cg_*_segment_0_captured.py"))


def test_captured_by_hand(device: torch.device, options: dict[str, Any], tmp_path: Path) -> None:
    """The replay of a graph that was captured by hand is filed and stepped through as well."""
    x = torch.ones(4, device=device)
    graph = BreakableCUDAGraph(driver=options["driver"])
    with depyf(tmp_path):
        with torch.no_grad(), capture(graph):
            y = x.sin() + 1
    (file,) = tmp_path.glob("breakable_cg_capture_*_replay.py")
    assert file.read_text() == graph.source
    assert Breakpoints(file).count(graph.replay) == 1
    assert torch.equal(y, x.sin() + 1)
    graph.reset()


def test_nothing_outside_of_depyf(
    device: torch.device, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and behind the context no file is written, though depyf is imported."""
    with depyf(tmp_path / "depyf"):
        pass
    monkeypatch.chdir(tmp_path)
    compiled = compiled_model(options)
    call(compiled, device, 3)
    assert list(tmp_path.rglob("breakable_cg*")) == []
    module = with_code(executor_of(compiled).program.segments[0].module)
    assert module.forward.__code__.co_filename.startswith("<eval_with_key>")


# --- texts ------------------------------------------------------------------------------------------------------------


def test_segment_runs_alone(device: torch.device, options: dict[str, Any]) -> None:
    """The text of a segment is Python that needs nothing else, and computes what the segment does."""
    compiled = compiled_model(options)
    call(compiled, device)
    program = executor_of(compiled).program
    scope: dict[str, Any] = {}
    exec(compile(sources.segment_text(program, 2), "segment.py", "exec"), scope)
    triple, x = torch.randn(4, device=device), torch.randn(4, device=device)
    assert program.segments[2].inputs == ("triple", "x")
    for mine, theirs in zip(scope["Segment"]()(triple, x), program.segments[2].module(triple, x), strict=True):
        assert torch.equal(mine, theirs)


def test_whole_program_runs(device: torch.device, options: dict[str, Any]) -> None:
    """The module of the whole computes what the compiled function does: it takes the inputs, then the sizes."""
    compiled = torch.compile(lambda x: (silly.triple(x.sin() + 1).cos() + x).view(-1), backend="breakable_cg", options=options, dynamic=True)  # fmt: skip
    with torch.no_grad():
        x = torch.randn(3, 5, device=device)
        want = compiled(x)
        program = executor_of(compiled).program
        numbers = {str(s): int(n) for s, n in zip(program.inputs[-1].value.shape, x.shape, strict=True)}
        given = [x if isinstance(value.value, Tensor) else numbers[str(value.value)] for value in program.inputs]
        sizes = [int(eval(str(size), {}, numbers)) for size in program.sizes.values()]
        (got,) = sources.whole(program)(*given, *sizes)
    assert torch.equal(got, want)


def test_whole_text() -> None:
    """The text of the whole: how the program is printed, and below it the segments in the code that calls them."""

    def with_constant(x: Tensor) -> tuple[Tensor, Tensor]:
        y = silly.triple(x.sin() + torch.tensor(2.0))
        return (y * 2).cos() + x, y.view(2, -1)

    compiled = torch.compile(with_constant, backend="breakable_cg", options={"driver": "tape"})
    with torch.no_grad():
        compiled(torch.ones(4))
    text = sources.whole_text(executor_of(compiled).program, "graph 0")
    here = Path(__file__)
    text = "\n".join(line for line in text.splitlines() if "# File:" not in line and line.strip())
    golden(
        text.replace(str(here), here.name),
        """\
# graph 0
# program on cpu: 2 captured, 1 eager
#   input x: tensor float32[4] cpu
#   input _tensor_constant0: constant float32[] cpu
#   segment 0: captured
#     reads x@0, _tensor_constant0@0
#     sin = aten.sin.default(x)
#     lift_fresh_copy = aten.lift_fresh_copy.default(_tensor_constant0)
#     add = aten.add.Tensor(sin, lift_fresh_copy)
#     makes add
#   segment 1: eager
#     because silly::triple: tagged cudagraph_unsafe
#     reads add@0
#     triple = silly.triple.default(add)
#     makes triple
#   segment 2: captured
#     reads triple@0, x@0
#     mul = aten.mul.Tensor(triple, 2)
#     cos = aten.cos.default(mul)
#     add_1 = aten.add.Tensor(cos, x)
#     makes add_1
#   view = aten.view.default(triple, [2, -1])
#   returns add_1, view
from __future__ import annotations
from math import inf, nan
import torch
from torch import device
class Program(torch.nn.Module):
    def forward(self, x: "f32[4]"):
        # No stacktrace found for following nodes
        _tensor_constant0 = self._tensor_constant0
        segment_0_captured = self.segment_0_captured(x, _tensor_constant0);  _tensor_constant0 = None
        add = segment_0_captured[0];  segment_0_captured = None
        segment_1_eager = self.segment_1_eager(add);  add = None
        triple = segment_1_eager[0];  segment_1_eager = None
        segment_2_captured = self.segment_2_captured(triple, x);  x = None
        add_1 = segment_2_captured[0];  segment_2_captured = None
        outputs = self.outputs(add_1, triple);  add_1 = triple = None
        return outputs
    class segment_0_captured(torch.nn.Module):
        def forward(self, x: "f32[4]", _tensor_constant0: "f32[]"):
            sin: "f32[4]" = torch.ops.aten.sin.default(x);  x = None
            lift_fresh_copy: "f32[]" = torch.ops.aten.lift_fresh_copy.default(_tensor_constant0);  _tensor_constant0 = None
            add: "f32[4]" = torch.ops.aten.add.Tensor(sin, lift_fresh_copy);  sin = lift_fresh_copy = None
            return (add,)
    class segment_1_eager(torch.nn.Module):
        def forward(self, add: "f32[4]"):
            triple: "f32[4]" = torch.ops.silly.triple.default(add);  add = None
            return (triple,)
    class segment_2_captured(torch.nn.Module):
        def forward(self, triple: "f32[4]", x: "f32[4]"):
            mul: "f32[4]" = torch.ops.aten.mul.Tensor(triple, 2);  triple = None
            cos: "f32[4]" = torch.ops.aten.cos.default(mul);  mul = None
            add_1: "f32[4]" = torch.ops.aten.add.Tensor(cos, x);  cos = x = None
            return (add_1,)
    class outputs(torch.nn.Module):
        def forward(self, add_1: "f32[4]", triple: "f32[4]"):
            view: "f32[2, 2]" = torch.ops.aten.view.default(triple, [2, -1]);  triple = None
            return (add_1, view)""",
    )


def test_place(tmp_path: Path) -> None:
    """A file keeps its text: another text goes to the next name, the same to the same."""
    first = sources.place(tmp_path, "a.b.py", "1")
    assert first == tmp_path / "a.b.py"
    assert sources.place(tmp_path, "a.b.py", "2") == tmp_path / "a.b.1.py"
    assert sources.place(tmp_path, "a.b.py", "3") == tmp_path / "a.b.2.py"
    assert sources.place(tmp_path, "a.b.py", "1") == first
    assert sources.place(tmp_path, "a.b.py", "2").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 3


def test_names() -> None:
    """Names of files are words of letters and digits."""
    assert sources.file_name("graph 0", "replay", 2) == "breakable_cg_graph_0_replay_2.py"
    assert sources.file_name("a::b/c", suffix="dot") == "breakable_cg_a_b_c.dot"


def test_text_that_is_no_python(tmp_path: Path) -> None:
    """A module whose text does not compile runs as before; the file is there to be read."""
    module = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    before = module.forward.__code__
    sources._run_from(module, "class Linear(:", tmp_path / "file.py")
    assert module.forward.__code__ is before
