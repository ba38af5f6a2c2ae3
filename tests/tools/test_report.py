"""The report: its text, and its numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import BreakableCUDAGraph, OptionsError, Report, capture, eager_on_graph, explain, reset
from graphs import golden
from reports import called, from_file

TAPE = {"driver": "tape"}


def text(report: Report) -> str:
    """What a report prints, without times and other files' line numbers, and with graphs numbered from 0."""
    printed = re.sub(r"\d+\.\d+ (m?s)\b", r"0.0 \1", str(report))
    printed = re.sub(r"silly\.py:\d+", "silly.py:0", printed)
    numbers = list(dict.fromkeys(re.findall(r"^graph (\d+)", printed, re.MULTILINE)))
    return re.sub(r"^graph (\d+)", lambda match: f"graph {numbers.index(match[1])}", printed, flags=re.MULTILINE)


# --- the text -----------------------------------------------------------------------------------------------------------------


def test_nothing_compiled() -> None:
    """Before the first call there is nothing to tell."""
    golden(
        str(explain(torch.compile(lambda x: x + 1, backend="breakable_cg"))),
        """nothing was compiled by breakable_cg yet: it compiles at the first call of a function that was compiled with backend='breakable_cg'""",
    )


def test_text() -> None:
    """Segments, counts, plain calls, reasons with the user's lines, and one line for each key."""
    f = from_file(
        """
def f(x, y):
    y = silly.triple(x.sin() + y)
    with torch.autocast("cpu", enabled=False):
        y = y + 1
    return silly.triple(y).cos(), silly.triple(y)
"""
    )
    golden(
        text(explain(called(f, 5, torch.ones(3), torch.ones(3)))),
        """\
replayed 3 of 5 calls (60%), recorded 1, ran plainly 1
graph 0: 3 captured, 3 eager (tape on cpu)
  calls 5, captures 3, replays 3, copies 16, plain 1, evictions 0, lowered in 0.0 s
  ran plainly 1x: warm-up
  recorded 1x: first of this program
    eager          times  because                  at
    silly::triple  1      tagged cudagraph_unsafe  model.py:3 in f: y = silly.triple(x.sin() + y)
    silly::triple  2      tagged cudagraph_unsafe  model.py:6 in f: return silly.triple(y).cos(), silly.triple(y)
    key  graphs  calls  captures  replays  copies/call  bridges  recorded in
    0    3       5      3         3        4            36 B     0.0 ms
    step            ops  kernels  bridges     module  what                     at
    0     captured  2    2        2 in, 24 B          aten::sin ... aten::add  model.py:3 in f
    1     eager     1                                 silly::triple            model.py:3 in f
    2     captured  1    1        1 in, 12 B          aten::add                model.py:5 in f
    3     eager     1                                 silly::triple            model.py:6 in f
    4     captured  1    1        1 in, 12 B          aten::cos                model.py:6 in f
    5     eager     1                                 silly::triple            model.py:6 in f""",
    )


def test_text_of_demoted_segments() -> None:
    """A segment that is too small, and one that could not be captured, say so."""
    f = from_file(
        """
def f(x):
    y = silly.triple(x.sin() + 1)
    y = silly.triple(y + 1)
    y = silly.stubborn(y.cos()) + 1
    y = silly.triple(y)
    return y.sin() + 1
"""
    )
    golden(
        text(explain(called(f, 4, torch.ones(3), min_kernels=2))),
        """\
replayed 2 of 4 calls (50%), recorded 1, ran plainly 1
graph 0: 2 captured, 1 eager (tape on cpu)
  calls 4, captures 2, replays 2, copies 6, plain 1, evictions 0, lowered in 0.0 s
  ran plainly 1x: warm-up
  recorded 1x: first of this program
    eager                   times  because                                                                   at
    silly::triple           1      tagged cudagraph_unsafe                                                   model.py:3 in f: y = silly.triple(x.sin() + 1)
      with silly::triple           tagged cudagraph_unsafe                                                   model.py:4 in f: y = silly.triple(y + 1)
      with silly::stubborn         could not be captured: aten._local_scalar_dense.default reads values on   silly.py:0 in stubborn: return x + x.max().item()
                                   the host, which no captured graph can do
      with silly::triple           tagged cudagraph_unsafe                                                   model.py:6 in f: y = silly.triple(y)
      with aten::add               1 op between eager breaks, fewer than min_kernels=2                       model.py:4 in f: y = silly.triple(y + 1)
      with aten::cos               1 op between eager breaks, fewer than min_kernels=2                       model.py:5 in f: y = silly.stubborn(y.cos()) + 1
      with aten::add               1 op between eager breaks, fewer than min_kernels=2                       model.py:5 in f: y = silly.stubborn(y.cos()) + 1
    key  graphs  calls  captures  replays  copies/call  bridges  recorded in
    0    2       4      2         2        2            24 B     0.0 ms
    step            ops  kernels  bridges     module  what                                                  at
    0     captured  2    2        1 in, 12 B          aten::sin ... aten::add                               model.py:3 in f
    1     eager     3                                 silly::triple, aten::add                              model.py:3 in f
    2     eager     4                                 silly::stubborn, silly::triple, aten::cos, aten::add  silly.py:0 in stubborn
    3     captured  2    2        1 in, 12 B          aten::sin ... aten::add                               model.py:7 in f""",
    )


def test_text_of_several_keys() -> None:
    """Each key has its line; calls beyond the bound are counted with why."""
    f = from_file(
        """
def f(x, n):
    return (x + n).sin() * 2
"""
    )
    compiled = torch.compile(f, backend="breakable_cg", options={**TAPE, "max_recordings": 2}, dynamic=True)
    with torch.no_grad():
        for n in (3, 4, 3, 4, 3, 4, 5):
            compiled(torch.ones(3), n)
    printed = text(explain(compiled))
    assert "  ran plainly 1x: more than max_recordings=2 keys in use\n" in printed
    assert "  ran plainly 2x: warm-up\n" in printed
    keys = [line.split() for line in printed.splitlines() if re.match(r"    [01]: ", line)]
    assert len(keys) == 2


def test_text_of_a_note() -> None:
    """What the executor changed its mind about is a note."""
    f = from_file(
        """
def f(x):
    x.add_(1)
    return x.sin() * 2
"""
    )
    compiled = torch.compile(f, backend="breakable_cg", options=TAPE)
    kept = [torch.ones(3) for _ in range(5)]
    with torch.no_grad():
        for x in kept:
            compiled(x)
    assert "  note: x is written by captured segments and came at more than 4 addresses: copied in and back\n" in text(
        explain(compiled)
    )


@pytest.mark.parametrize(
    ("training", "why", "cure"),
    [
        (False, "it needs gradients; call it under torch.no_grad() to have it captured", ""),
        (
            True,
            "it needs gradients, and no backward has been seen that tells how",
            "\n  to have it captured: for inference call it under torch.no_grad()",
        ),
    ],
)
def test_text_of_training(training: bool, why: str, cure: str) -> None:
    """A graph that needs gradients says so, with the line that returns from it, and what to do."""
    weight = torch.ones(3, requires_grad=True)
    f = from_file(
        """
def f(x):
    y = x.sin() * weight
    return y.cos()
""",
        weight=weight,
    )
    compiled = torch.compile(f, backend="breakable_cg", options={**TAPE, "training": training})
    compiled(torch.ones(3))
    printed, _, _ = text(explain(compiled)).partition(";") if cure else (text(explain(compiled)), "", "")
    golden(printed, f"graph 0: eager, because {why}\n  at model.py:4 in f: return y.cos(){cure}")


def test_text_of_graph_breaks() -> None:
    """Dynamo's own graph breaks are counted, and each part is a program."""
    f = from_file(
        """
def f(x):
    y = x.sin() + 1
    torch._dynamo.graph_break()
    return y.cos() * 2
"""
    )
    printed = text(explain(called(f, 3, torch.ones(3))))
    assert re.findall(r"^graph \d+", printed, re.MULTILINE) == ["graph 0", "graph 1"]
    assert printed.startswith("replayed 2 of 6 calls of 2 graphs (33%), ")
    where = "model.py:4 in f: torch._dynamo.graph_break()"
    assert f"Dynamo broke the graph 1x: Call to `torch._dynamo.graph_break()`, at {where}" in printed


def test_text_of_a_branch() -> None:
    """A branch on a tensor's value is a graph break that Dynamo itself does not count; also in a function that it inlines."""
    f = from_file(
        """
def double(y):
    if y.sum() > 0:
        y = y * 2
    return y + 1

def f(x):
    y = double(x.sin() + 1)
    if y.sum() < 0:
        y = y * 2
    return y.cos() + 1
"""
    )
    printed = text(explain(called(f, 3, torch.ones(3))))
    told = [line for line in printed.splitlines() if line.startswith("Dynamo")]
    assert told == [  # twice: where it inlines, and in the function by itself
        "Dynamo broke the graph 2x: Data-dependent branching, at model.py:3 in double: if y.sum() > 0:",
        "Dynamo broke the graph 1x: Data-dependent branching, at model.py:9 in torch_dynamo_resume_in_f_at_8: if y.sum() < 0:",
    ]


def test_text_of_a_marked_function_by_itself() -> None:
    """Where Dynamo compiles nothing of what calls a marked function, the place is the function's definition."""
    f = from_file(
        """
@eager_on_graph
def doubled(y):
    return y * 2

def f(x):
    for size in range(2):
        if x.sum() > size:
            x = doubled(x)
    return x
""",
        eager_on_graph=eager_on_graph,
    )
    printed = text(explain(called(f, 3, torch.ones(3))))
    lines = [line.split() for line in printed.splitlines()]
    where = "model.py:2 in doubled"
    assert f"doubled 1 marked by eager_on_graph {where}: @eager_on_graph".split() in lines, printed
    assert f"0 eager 1 doubled {where}".split() in lines, printed


def test_text_of_brackets() -> None:
    """Code is shown as it is, also where it looks like markup or the name of an emoji."""
    f = from_file(
        """
def f(x, heart=3):
    x[:heart:][x > 1] = x[0]
    return x.sin() + 1
"""
    )
    printed = text(explain(called(f, 3, torch.ones(3))))
    assert "model.py:3 in f: x[:heart:][x > 1] = x[0]" in printed


def test_options_of_what_is_compiled() -> None:
    """Options for what has its own already are refused; they would be ignored."""
    compiled = torch.compile(torch.sin, backend="breakable_cg", options=TAPE)
    for what in (compiled, BreakableCUDAGraph(driver="tape"), None):
        with pytest.raises(OptionsError, match="options apply to a function that is not compiled yet"):
            explain(what, options=TAPE)


def test_text_at_the_recompile_limit() -> None:
    """A function that Dynamo will not compile again is named, with where it stands."""
    f = from_file(
        """
def f(x, flag):
    return x.sin() * 2 if flag else x
"""
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled = torch.compile(f, backend="breakable_cg", options=TAPE, dynamic=False)
        with torch.no_grad():
            for size in (2, 3, 4):
                compiled(torch.ones(size), True)
        printed = text(explain(compiled))
    assert (
        "Dynamo will not recompile f (model.py:2) again (torch._dynamo.config.recompile_limit): "
        "other calls run uncompiled" in printed
    )


# --- the numbers ----------------------------------------------------------------------------------------------------------------


def test_numbers(device: torch.device, options: dict[str, Any]) -> None:
    """Every count, with the formula that gives it."""
    calls = 6

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = silly.triple(x.sin() + 1)
        return y.cos(), y

    compiled = torch.compile(f, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for _ in range(calls):
            compiled(torch.ones(4, device=device))
    report = explain(compiled)
    (program,) = report.programs
    assert program.driver == f"{options['driver']} on {torch.empty(0, device=device).device}"
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert program.calls == calls
    assert program.captures == 2  # one for each captured segment
    assert program.replays == calls - 2  # all but the plain one and the recording one
    assert program.copies == 2 * (calls - 1)  # x and the eager result, in each call but the plain one
    assert program.plain_calls == {"warm-up": 1}
    assert program.evictions == 0
    assert program.notes == ()
    assert program.lowering_seconds > 0
    (recording,) = program.recordings
    assert (recording.num_graphs, recording.calls, recording.captures, recording.replays) == (2, calls, 2, calls - 2)
    assert (recording.copies_per_call, recording.copies) == (2, 2 * (calls - 1))
    assert recording.bridge_bytes == 2 * 4 * 4  # two bridges of four floats
    assert recording.record_seconds > 0
    assert recording.source.startswith("def replay(args, stream):\n")
    assert recording.refused == ""
    assert report.eager_graphs == ()
    assert report.at_recompile_limit == ()


def test_copies_that_are_left_out(device: torch.device, options: dict[str, Any]) -> None:
    """What is in place already is not copied and not counted: here, a static output that is handed in again."""
    compiled = torch.compile(
        lambda x: x.sin() + 1, backend="breakable_cg", options={**options, "min_kernels": 1, "outputs": "static"}
    )
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.ones(4, device=device))
        copies = explain(compiled).programs[0].copies
        compiled(torch.ones(4, device=device))
    assert (copies, explain(compiled).programs[0].copies) == (3, 4)


def test_snapshot() -> None:
    """A report is a snapshot: it does not change with later calls, nor with a reset."""
    compiled = called(lambda x: x.sin() + 1, 3, torch.ones(3))
    before = explain(compiled)
    printed = str(before)
    with torch.no_grad():
        compiled(torch.ones(3))
    reset(compiled)
    assert str(before) == printed
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.programs = ()  # type: ignore[misc]


def test_counts_after_a_reset() -> None:
    """Counts go on over a reset; what was recorded is gone."""
    compiled = called(lambda x: x.sin() + 1, 4, torch.ones(3))
    reset(compiled)
    (program,) = explain(compiled).programs
    assert (program.calls, program.captures, program.replays, program.copies) == (4, 1, 2, 3)
    assert program.recordings == ()


def test_everything() -> None:
    """Without an argument all programs are in the report, in the order in which they were compiled."""
    first = called(lambda x: x.sin() + 1, 1, torch.ones(3))
    second = called(lambda x: x.cos() + 1, 1, torch.ones(3))
    mine = [program.name for function in (first, second) for program in explain(function).programs]
    everything = [program.name for program in explain().programs]
    assert [name for name in everything if name in mine] == mine


@pytest.mark.parametrize("kind", ["function", "module", "method", "forward", "decorated", "sequential"])
def test_what_can_be_explained(kind: str) -> None:
    """Whatever ``torch.compile`` takes can be explained."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + 1

    model = Model()
    if kind == "function":
        compiled: Any = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options=TAPE)
    elif kind == "module":
        compiled = torch.compile(model, backend="breakable_cg", options=TAPE)
    elif kind == "method":
        model.compile(backend="breakable_cg", options=TAPE)
        compiled = model
    elif kind == "forward":
        compiled = torch.compile(model.forward, backend="breakable_cg", options=TAPE)
    elif kind == "decorated":
        compiled = torch.compile(torch.no_grad()(lambda x: x.sin() + 1), backend="breakable_cg", options=TAPE)
    else:
        compiled = torch.compile(nn.Sequential(Model(), nn.ReLU()), backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(3))
    (program,) = explain(compiled).programs
    assert program.replays == 1


# --- the steps, and other forms -------------------------------------------------------------------------------------------------


STEPS = """
def f(x):
    y = silly.triple(x.sin() + 1)
    return y.cos() + 1
"""


def test_steps(device: torch.device, options: dict[str, Any]) -> None:
    """Each step has its ops with the user's lines, its reasons, kernels, and bridges with their bytes."""
    f = from_file(STEPS)
    compiled = torch.compile(f, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        compiled(torch.ones(4, device=device))
        before = explain(compiled).programs[0]
        for _ in range(3):
            compiled(torch.ones(4, device=device))
    (program,) = explain(compiled).programs
    assert [(step.kind, step.num_kernels, step.bridges) for step in before.steps] == [
        ("captured", -1, ()),
        ("eager", -1, ()),
        ("captured", -1, ()),
    ]
    first, second, third = program.recordings[0].steps
    assert [op.op for op in first.ops] == ["aten::sin", "aten::add"]
    assert [op.source for op in first.ops] == ["model.py:3 in f: y = silly.triple(x.sin() + 1)"] * 2
    assert first.title == "aten::sin ... aten::add"
    assert len(first.kernels) == first.num_kernels == 2
    assert [(bridge.direction, bridge.bytes) for bridge in first.bridges] == [("in", 16)]
    assert (second.kind, second.title, second.reasons[0].text) == ("eager", "silly::triple", "tagged cudagraph_unsafe")
    assert second.source == "model.py:3 in f: y = silly.triple(x.sin() + 1)"
    assert [(bridge.value, bridge.bytes) for bridge in third.bridges] == [("triple", 16)]
    assert program.recorded == {"first of this program": 1}
    assert program.recordings[0].held_bytes > 0
    assert program.recordings[0].warmup_seconds > 0


def test_module_paths() -> None:
    """A step knows the path of the module that all its ops are in, and its ops know theirs."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = silly.triple(layer(x))
            return x

    compiled = called(Block(), 3, torch.ones(2, 3))
    steps = explain(compiled).programs[0].recordings[0].steps
    assert [step.module for step in steps if step.kind == "captured"] == ["layers.0", "layers.1"]
    assert [op.module for op in steps[0].ops] == ["layers.0.0", "layers.0.1"]


def test_one_key_is_the_first_of_its_program() -> None:
    """Of keys that come by turns, before any of them is recorded, one is the first."""
    compiled = torch.compile(lambda x, n: (x + n).sin() * 2, backend="breakable_cg", dynamic=True, options=TAPE)
    for n in (3, 4, 3, 4):
        compiled(torch.ones(2), n)
    (program,) = explain(compiled).programs
    assert program.recorded == {"first of this program": 1, "new numbers, layouts, alignments or host scalars": 1}


def test_why_recorded_again() -> None:
    """Recordings are counted by why there was none: new numbers, new addresses, a reset, an eviction, a death."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, n: int) -> Tensor:
            return (x * self.weight + n).sin()

    first, second = Scale(), Scale()
    for model in (first, second):
        model.compile(backend="breakable_cg", options=TAPE, dynamic=True)
    with torch.no_grad():
        for n in (3, 3, 4, 4):
            first(torch.ones(3), n)
        for _ in range(2):
            second(torch.ones(3), 3)
        counts = dict(explain(first).programs[-1].recorded)
        assert counts["first of this program"] == 1
        assert counts["new numbers, layouts, alignments or host scalars"] == 1
        assert counts["static or written inputs at new addresses"] == 1
        reset(first)
        for _ in range(2):
            first(torch.ones(3), 4)
        assert explain(first).programs[-1].recorded["reset was called"] == 1


def test_before_anything_is_captured() -> None:
    """A function that is not compiled is, once, and called plainly: its program is told, and nothing is captured."""
    f = from_file(STEPS)
    with torch.no_grad():
        report = explain(f, torch.ones(3), options={**TAPE, "min_kernels": 1})
        golden(
            text(report),
            """\
replayed 0 of 1 calls (0%), recorded 0, ran plainly 1
graph 0: 2 captured, 1 eager (tape on cpu)
  calls 1, captures 0, replays 0, copies 0, plain 1, evictions 0, lowered in 0.0 s
  ran plainly 1x: warm-up
    eager          times  because                  at
    silly::triple  1      tagged cudagraph_unsafe  model.py:3 in f: y = silly.triple(x.sin() + 1)
    key  graphs  calls  captures  replays  copies/call  bridges  recorded in
    0    0       1      0         0        0            0 B      0.0 ms
    step            ops  kernels  bridges  module  what                     at
    0     captured  2                              aten::sin ... aten::add  model.py:3 in f
    1     eager     1                              silly::triple            model.py:3 in f
    2     captured  2                              aten::cos ... aten::add  model.py:4 in f""",
        )
        compiled = torch.compile(f, backend="breakable_cg", options={**TAPE, "min_kernels": 1})
        compiled(torch.ones(3))
    assert [program.name for program in explain(compiled).programs] == [report.programs[0].name]


def test_programs_behind_a_break_in_a_closure() -> None:
    """What Dynamo goes on with after a graph break is found, also where the function has a closure."""

    @torch.compiler.disable
    def host(x: Tensor) -> Tensor:
        return x + 1

    def f(x: Tensor) -> Tensor:
        y = host(x.sin() * 2)
        y = host(y.cos() * 2)
        return y.sin() * 2

    assert len(explain(called(f, 3, torch.ones(3))).programs) == 3


def test_dict_and_json() -> None:
    """The report as plain values: all its fields, what steps say of themselves, and a version."""
    report = explain(called(from_file(STEPS), 4, torch.ones(3)))
    made = report.to_dict()
    assert json.loads(report.to_json()) == made
    assert made["schema"] == 1
    (program,) = made["programs"]
    assert set(program) == {field.name for field in dataclasses.fields(report.programs[0])}
    (recording,) = program["recordings"]
    assert [step["title"] for step in recording["steps"]] == [
        "aten::sin ... aten::add",
        "silly::triple",
        "aten::cos ... aten::add",
    ]
    assert recording["steps"][1]["reasons"][0]["rule"] == "marked"
    assert recording["steps"][2]["bridges"] == [{"value": "triple", "direction": "in", "bytes": 12}]
    assert recording["measured"] is None


@torch.no_grad()
def test_keys_are_readable() -> None:
    """A key is shown by its numbers, layouts and values, and not by how they are kept."""
    compiled = torch.compile(lambda x, s: (x.sin() * s).cos() + 1, backend="breakable_cg", options=TAPE, dynamic=True)
    for x in (torch.ones(2, 3), torch.ones(3, 4).t()):
        for scale in (0.5, 1.5, -0.0):
            compiled(x, scale)
    keys = [recording.key for program in explain(compiled).programs for recording in program.recordings]
    assert any(key.endswith("float32[2, 3], 1.5") for key in keys), keys
    assert any(key.endswith("float32[4, 3] with stride [1, 4] on cpu, -0.0") for key in keys), keys
    assert not any("torch." in key or "\\x" in key for key in keys), keys


def test_a_path_in_place_of_a_report() -> None:
    """The path of a saved report is not its text, and the error says how to read it."""
    with pytest.raises(OptionsError, match=r"not JSON(.*\n)*.*Report\.from_json\(Path\(path\)\.read_text\(\)\)"):
        Report.from_json("reports/llama.json")


def test_dot() -> None:
    """The steps in order, with what crosses between them."""
    golden(
        re.sub(r"graph \d+ ", "graph 0 ", explain(called(from_file(STEPS), 4, torch.ones(3))).to_dot()),
        """\
digraph breakable_cg {
  node [shape=box, style=filled, fontname=monospace]; rankdir=TB;
  subgraph cluster_0 {
    label="graph 0 (tape on cpu)";
    p0_0 [label="0: aten::sin ... aten::add\\l2 ops\\lmodel.py:3 in f: y = silly.triple(x.sin() + 1)", fillcolor="#cfe8cf"];
    p0_1 [label="1: silly::triple\\ltagged cudagraph_unsafe\\lmodel.py:3 in f: y = silly.triple(x.sin() + 1)", fillcolor="#f6d5a8"];
    p0_2 [label="2: aten::cos ... aten::add\\l2 ops\\lmodel.py:4 in f: return y.cos() + 1", fillcolor="#cfe8cf"];
    p0_0 -> p0_1 [label=""];
    p0_1 -> p0_2 [label="triple 12 B"];
  }
}
""",
    )


def test_captured_graph() -> None:
    """What a ``with`` block ran is told like a compiled function, op by op."""
    f, x = from_file(STEPS), torch.ones(3)
    graph = BreakableCUDAGraph(driver="tape")
    with torch.no_grad(), capture(graph):
        f(x)
    graph.replay()
    golden(
        text(explain(graph)),
        """\
replayed 1 of 2 calls (50%), recorded 1, ran plainly 0
captured graph: 2 captured, 1 eager (tape on cpu)
  calls 2, captures 2, replays 1, copies 1, plain 0, evictions 0, lowered in 0.0 s
  recorded 1x: captured
    eager          times  because                  at
    silly::triple  1      tagged cudagraph_unsafe  model.py:3 in f: y = silly.triple(x.sin() + 1)
    key  graphs  calls  captures  replays  copies/call  bridges  recorded in
    0    2       2      2         1        1            12 B     0.0 ms
    step            ops  kernels  bridges     module  what                     at
    0     captured  2    2                            aten::sin ... aten::add  model.py:3 in f
    1     eager     1                                 silly::triple            model.py:3 in f
    2     captured  2    2        1 in, 12 B          aten::cos ... aten::add  model.py:4 in f""",
    )
    (recording,) = explain(graph).programs[0].recordings
    assert [op.op for op in recording.steps[0].ops] == ["aten::sin", "aten::add"]
    assert recording.record_seconds > 0


def test_many_steps() -> None:
    """A terminal shows the first steps of a long program, and says where the others are."""

    def f(x: Tensor) -> Tensor:
        for _ in range(30):
            x = silly.triple(x) + 1
        return x

    printed = str(explain(called(f, 3, torch.ones(3))))
    assert "    ... 20 more steps: report.to_html(path) shows all" in printed


def test_html(tmp_path: Path) -> None:
    """The page is written where it is asked for."""
    report = explain(called(from_file(STEPS), 4, torch.ones(3)))
    path = report.to_html(tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert "silly::triple" in path.read_text(encoding="utf-8")
