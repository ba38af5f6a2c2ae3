"""What is told: log lines, once for each cause and never for each call, and the artifacts of torch's structured trace."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fresh
import silly
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, reset
from breakable_backend.calling import eviction

TESTS = Path(__file__).parents[1]


def model(x: Tensor) -> Tensor:
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x


class Scale(nn.Module):
    """One parameter, two segments."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return silly.triple(x * self.scale + 1).sin() * 2


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """What the package logged since it was last asked, as (level, concern, text) with the graph's number left out."""
    caplog.set_level(logging.INFO, logger="breakable_backend")

    def take() -> list[tuple[str, str, str]]:
        found = [
            (record.levelname, record.name.rpartition(".")[2], record.getMessage().partition(": ")[2])
            for record in caplog.records
            if record.name.startswith("breakable_backend")
        ]
        caplog.clear()
        return found

    return take


def told(lines: Any) -> list[str]:
    """The texts, without what recordings cost."""
    return [text.partition(": graphs")[0] for _, _, text in lines()]


def test_life_of_a_graph(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """Compiled with its reasons, warmed up, recorded: a line each. Replays tell nothing."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    with torch.no_grad():
        compiled(torch.ones(4, device=device))
        (_, _, cut), warm = lines()
        first, *eager = cut.splitlines()
        assert first == "2 captured, 1 eager"
        (reason,) = eager
        assert reason.startswith("  eager: silly::triple: tagged cudagraph_unsafe, at ")
        assert reason.endswith("in model: y = silly.triple(x.sin() + 1)")
        assert warm == ("INFO", "executor", "runs plainly: warm-up")
        compiled(torch.ones(4, device=device))
        ((level, concern, text),) = lines()
        assert (level, concern) == ("INFO", "executor")
        assert text.startswith(
            "recording 0 (first of this program): graphs 2, eager steps 1, copies per call 2, bridge bytes "
        )
        for _ in range(10):
            compiled(torch.ones(4, device=device))
        assert lines() == []


def test_line_of_a_log_record(caplog: pytest.LogCaptureFixture) -> None:
    """A record comes from the module whose concern it is, and not from the one that writes it down."""
    caplog.set_level(logging.INFO, logger="breakable_backend")
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape"})
    with torch.no_grad():
        for _ in range(2):
            compiled(torch.ones(4))
    reset(compiled)
    files = {record.filename for record in caplog.records if record.name == "breakable_backend.calling.executor"}
    assert files == {"compiled_graph.py"}


def test_why_it_is_recorded_again(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """A recording beyond the first says why: other sizes, other addresses, or what became of the one before."""
    first, second = Scale().to(device), Scale().to(device)
    compiled = torch.compile(lambda module, x: module(x), backend="breakable_cg", options=options, dynamic=True)

    def call(module: nn.Module, size: int) -> list[str]:
        with torch.no_grad():
            for _ in range(3):
                compiled(module, torch.ones(size, 4, device=device))
        return [text for text in told(lines) if "recording" in text]

    assert call(first, 2) == ["recording 0 (first of this program)"]
    assert call(first, 3) == ["recording 1 (new numbers, layouts, alignments or host scalars)"]
    assert call(second, 2) == ["recording 2 (static or written inputs at new addresses)"]
    reset(compiled)
    assert told(lines) == [f"recording {number} goes: reset was called" for number in range(3)]
    assert call(first, 2) == ["recording 3 (reset was called)"]
    del second
    assert call(first, 3) == ["recording 4 (reset was called)"]
    del first
    assert told(lines) == [f"recording {number} goes: a static input had died" for number in (3, 4)]


def test_limits_are_warned_of_once(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """Keys beyond the limit cost the user speed: a warning, once, however many calls there are."""
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "max_recordings": 1}, dynamic=True)
    with torch.no_grad():
        for _ in range(4):
            for size in (4, 6):
                compiled(torch.ones(size, device=device))
    warned = [(concern, text) for level, concern, text in lines() if level == "WARNING"]
    assert warned == [("executor", "runs plainly: more than max_recordings=1 keys in use")]


def test_evictions(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """An eviction is told with its cause, and so is the recording that follows it."""
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "max_recordings": 1}, dynamic=True)
    with torch.no_grad():
        for size in (4, 4, 6, *[6] * eviction.IDLE_FACTOR, 4, *[4] * eviction.IDLE_FACTOR):
            compiled(torch.ones(size, device=device))
    found = [text for text in told(lines) if text.startswith("recording")]
    assert found == [
        "recording 0 (first of this program)",
        "recording 0 goes: it was evicted for other keys",
        "recording 1 (new numbers, layouts, alignments or host scalars)",
        "recording 1 goes: it was evicted for other keys",
        "recording 2 (it was evicted for other keys)",
    ]


def test_failed_captures_are_warned_of(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """An op that could not be captured is a warning with its name and the user's line, once."""

    def reads(x: Tensor) -> Tensor:
        return silly.stubborn(x.sin() + 1).cos() * 2

    compiled = torch.compile(reads, backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(5):
            compiled(torch.ones(4, device=device))
    (warning,) = [text for level, _, text in lines() if level == "WARNING"]
    assert warning.startswith("runs eagerly from now on: silly::stubborn: could not be captured")
    # The tape sees the very line; CUDA may tell nothing, and the line is that of the call.
    assert "in stubborn: return x + x.max().item()" in warning or "in reads" in warning


def test_graphs_that_run_as_traced(lines: Any) -> None:
    """A graph of which nothing is captured says why."""
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape", "training": False})
    compiled(torch.ones(4, requires_grad=True))
    ((level, concern, text),) = lines()
    assert (level, concern) == ("INFO", "backend")
    assert text.startswith("runs as Dynamo traced it, because it needs gradients, at ")


def test_recompiles(lines: Any) -> None:
    """The second graph of the same code says why Dynamo made it."""
    compiled = torch.compile(lambda x, flag: x.sin() + flag, backend="breakable_cg", options={"driver": "tape"})
    with torch.no_grad():
        compiled(torch.ones(4), True)
        assert not any("again" in text for _, _, text in lines())
        compiled(torch.ones(4), False)
    (again,) = [(concern, text) for _, concern, text in lines() if "compiled again" in text]
    assert again[0] == "backend"
    assert again[1].startswith("compiled again, because Dynamo says: ") and "flag" in again[1]


def test_captured_by_hand(device: torch.device, options: dict[str, Any], lines: Any) -> None:
    """A captured graph tells of its capture, its release, and of what died under it; its replays tell nothing."""

    @eager_on_graph
    def clip(x: Tensor) -> Tensor:
        return x.clamp(max=2)

    scale = nn.Parameter(torch.ones(4, device=device))
    graph = BreakableCUDAGraph(driver=options["driver"])

    def body(scale: nn.Parameter) -> None:
        with torch.no_grad(), capture(graph):
            clip(torch.ones(4, device=device) * scale) * 2

    body(scale)
    graph.replay()
    assert told(lines) == ["recording 0 (captured)"]
    graph.reset()
    assert told(lines) == ["released"]
    body(scale)
    lines()
    del scale
    assert told(lines) == ["released: a Parameter died, which the graph reads; the graph was released"]


# --- in processes of their own ----------------------------------------------------------------------------------------

PROGRAM = """
import torch
import silly

def model(x):
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x

compiled = torch.compile(model, backend="breakable_cg", options={"driver": "tape"})
with torch.no_grad():
    for _ in range(4):
        compiled(torch.ones(4))
"""


def run(**environment: str) -> str:
    """What the program says on its standard error, in a new Python: torch reads these variables on import."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the program says with ``TORCH_LOGS``, and the folder of its trace."""
    folder = tmp_path_factory.mktemp("trace")
    return run(TORCH_LOGS="+breakable_backend", TORCH_TRACE=str(folder)), folder


def test_torch_logs(watched_run: tuple[str, Path]) -> None:
    """``TORCH_LOGS`` shows the lines, each once."""
    said, _ = watched_run
    assert "graph 0: 2 captured, 1 eager" in said
    assert said.count("graph 0: recording 0 (first of this program)") == 1


def test_torch_logs_of_one_module() -> None:
    """``TORCH_LOGS`` takes the name of one module of the package too."""
    assert (
        run(TORCH_LOGS="breakable_backend.calling.executor").count("graph 0: recording 0 (first of this program)") == 1
    )


def test_silent_without_torch_logs() -> None:
    """A program that loses nothing says nothing."""
    ended = fresh.python(PROGRAM)
    assert ended.returncode == 0, ended.stderr
    assert "graph 0" not in ended.stderr


def traced(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """The artifacts of this package in a trace, by name: the record and the payload."""
    (file,) = folder.glob("*.log")
    found: dict[str, tuple[dict[str, Any], str]] = {}
    name, record, payload = "", {}, list[str]()
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            payload.append(line[1:])
            continue
        if name:
            found[name] = record, "\n".join(payload)
        record, payload = json.loads(line[line.index("{") :]), []
        name = record.get("artifact", {}).get("name", "")
    if name:
        found[name] = record, "\n".join(payload)
    return {name: value for name, value in found.items() if name.startswith("breakable_cg")}


def test_trace(watched_run: tuple[str, Path]) -> None:
    """The structured trace has the program, the reasons, and each recording with its steps and its source."""
    _, folder = watched_run
    found = traced(folder)
    stem = "breakable_cg_graph_0_"
    assert list(found) == [stem + name for name in ("program", "reasons", "recording_0", "replay_0")]
    assert all((record["frame_id"], record["frame_compile_id"]) == (0, 0) for record, _ in found.values())
    texts = {name.removeprefix(stem): text for name, (_, text) in found.items()}
    assert texts["program"].startswith("program on cpu: 2 captured, 1 eager")
    (reason,) = json.loads(texts["reasons"])
    assert (reason["op"], reason["rule"]) == ("silly::triple", "marked")
    recording = json.loads(texts["recording_0"])
    assert recording["why"] == "first of this program" and recording["graphs"] == 2
    assert recording["steps"] == [
        "step 0 captured, 2 kernels",
        "step 1 eager silly::triple",
        "step 2 captured, 3 kernels",
        "outputs",
    ]
    assert texts["replay_0"].startswith("def replay(args, stream):")


def test_tlparse(watched_run: tuple[str, Path], tmp_path: Path) -> None:
    """``tlparse`` shows the artifacts beside Dynamo's own."""
    program = shutil.which("tlparse", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("needs tlparse")
    _, folder = watched_run
    (log,) = folder.glob("*.log")
    out = tmp_path / "out"
    subprocess.run([program, str(log), "-o", str(out), "--no-browser"], check=True, capture_output=True)
    names = sorted(path.name for path in out.rglob("breakable_cg*"))
    assert [name.rpartition("_")[0] for name in names] == [
        f"breakable_cg_graph_0_{name}" for name in ("program", "reasons", "recording_0", "replay_0")
    ]
    assert all(name in (out / "index.html").read_text() for name in names)
