"""Measuring: what is timed, what is left as it was, what the times are taken to mean."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import (
    BreakableCUDAGraph,
    OptionsError,
    Report,
    capture,
    eager_on_graph,
    explain,
    mark_eager,
    unmark_eager,
)
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.recordings import copies
from breakable_backend.tools import progress, timing, verdict
from breakable_backend.tools.timing import StepTime, Timed, Times
from breakable_backend.tools.verdict import Advice, BreakCost, Measured


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not looked at here."""
    monkeypatch.setattr(timing, "LOOPS", 3)


class Counting(nn.Module):
    """Adds how often it was called; attention-like op in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.calls = nn.Linear(4, 4), nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = silly.triple(self.up(x) + self.calls)
        return (y + torch.rand_like(y)).relu() * 2


def compiled_and_called(model: Any, options: dict[str, Any], *args: Tensor, calls: int = 4) -> Any:
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "min_kernels": 1})
    for _ in range(calls):
        compiled(*args)
    return compiled


def test_measures_in_the_callers_grad_mode(device: torch.device, options: dict[str, Any]) -> None:
    """The call that is timed is of the program that the caller's grad mode has, and no other program is called."""

    def f(x: Tensor) -> Tensor:
        return silly.triple(x.sin() + 1).cos() * 2

    x = torch.randn(3, device=device)
    with torch.no_grad():
        compiled = compiled_and_called(f, options, x)
    before = explain(compiled).programs[0]
    measured, other = explain(compiled, x, measure=True).programs[::-1]
    assert measured.main is not None
    assert measured.main.measured is not None
    assert (other.calls, other.replays) == (before.calls, before.replays)
    assert (measured.calls, measured.replays) == (3, 1)


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "delay"), [(True, 0.0), (True, 1e9), (False, 0.0)], ids=["slow", "quick", "file"])
def test_progress(terminal: bool, delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long shows a bar on a terminal; a file gets none, and neither does what is quick."""
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "DELAY", delay)
    with progress.Progress(2) as bar:
        bar.advance()
        bar.advance()
    assert ("measuring" in shown.getvalue()) == (terminal and not delay)
    assert terminal or not shown.getvalue()


@torch.no_grad()
@pytest.mark.parametrize("with_arguments", [False, True])
def test_leaves_all_as_it_was(device: torch.device, options: dict[str, Any], with_arguments: bool) -> None:
    """Each step is timed; buffers, random state and counts are as without it, but for the one call that arguments ask for."""
    model, x = Counting().to(device), torch.randn(2, 4, device=device)
    compiled = compiled_and_called(model, options, x)
    calls = silly.calls["triple"]
    before = explain(compiled).programs[0]
    torch.manual_seed(5)
    report = explain(compiled, *((x,) if with_arguments else ()), measure=True)
    drawn = torch.rand(3, device=device)
    torch.manual_seed(5)
    if with_arguments:
        torch.rand_like(x)
    assert torch.equal(drawn, torch.rand(3, device=device))
    assert model.calls == 4 + with_arguments
    assert silly.calls["triple"] > calls + 10
    (program,) = report.programs
    (recording,) = program.recordings
    assert recording.measured is not None
    assert [step.kind for step in recording.steps] == ["captured", "eager", "captured"]
    assert all(step.host_us is not None and step.host_us > 0 for step in recording.steps)
    assert all((step.gpu_us is not None) == (device.type == "cuda") for step in recording.steps)
    assert recording.measured.eager_how == ("eager" if with_arguments else "its ATen ops, run eagerly")
    assert (recording.measured.busy is None) == (device.type == "cpu")
    if not with_arguments:
        assert (program.calls, program.copies, program.replays) == (before.calls, before.copies, before.replays)
    assert recording.measured.verdict in str(report)
    assert torch.equal(compiled(x).isnan(), torch.zeros(2, 4, device=device, dtype=torch.bool))
    assert model.calls == 5 + with_arguments


@torch.no_grad()
def test_a_cache_does_not_run_over(device: torch.device, options: dict[str, Any]) -> None:
    """State is put back after each call, not only at the end: a position may not leave its cache."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.cache = nn.Buffer(torch.zeros(1, dtype=torch.long)), nn.Buffer(torch.zeros(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.cache.index_copy_(0, self.position, x)
            self.position.add_(1)
            return silly.triple(self.cache.sum(0) + 1)

    model = Cache().to(device)
    compiled = compiled_and_called(model, options, torch.ones(1, 4, device=device))
    explain(compiled, torch.ones(1, 4, device=device), measure=True)
    assert model.position == 5


@torch.no_grad()
@torch.enable_grad()
@pytest.mark.parametrize("with_arguments", [False, True])
def test_a_pending_forward(device: torch.device, options: dict[str, Any], with_arguments: bool) -> None:
    """What a forward has saved for its backward is there afterwards, though measuring draws and computes other values."""
    weight, x = torch.rand(4, 4, device=device, requires_grad=True), torch.rand(3, 4, device=device)

    def function(x: Tensor) -> Tensor:
        return torch.dropout((x @ weight).sigmoid(), 0.5, True).exp()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(4):
        compiled(x).sum().backward()  # the gradient of the sum is expanded
    results = []
    for called in (compiled, function):
        torch.manual_seed(0)
        loss = called(x).sum()
        if called is compiled:
            explain(compiled, *((x,) if with_arguments else ()), measure=True)
        results.append(torch.autograd.grad(loss, weight))
    assert torch.equal(*(grad for (grad,) in results))


def test_records_first(device: torch.device, options: dict[str, Any]) -> None:
    """With arguments the call is made until it is a replay, also for a function that is not compiled yet."""

    def f(x: Tensor) -> Tensor:
        return silly.triple(x.sin() + 1).cos() + 1

    report = explain(f, torch.ones(3, device=device), options=options, measure=True)
    (recording,) = report.programs[0].recordings
    assert recording.measured is not None
    assert recording.calls >= 3


@torch.no_grad()
def test_graph_breaks(options: dict[str, Any], device: torch.device) -> None:
    """Of a function that Dynamo broke in two, each program is measured by itself."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        torch._dynamo.graph_break()
        return y.cos() * 2

    report = explain(f, torch.ones(3, device=device), options=options, measure=True)
    measured = [recording.measured for program in report.programs for recording in program.recordings]
    assert [m.eager_how for m in measured if m is not None] == ["its ATen ops, run eagerly"] * 2


@torch.no_grad()
def test_captured_graph(device: torch.device, options: dict[str, Any]) -> None:
    """A captured block is measured too, against what it is given, and what it writes is put back."""
    x, count = torch.ones(3, device=device), torch.zeros(3, device=device)

    @eager_on_graph
    def double(x: Tensor) -> Tensor:
        return x * 2

    def body() -> Tensor:
        count.add_(1)
        return double(x.sin()) + 1

    graph = BreakableCUDAGraph(driver=options["driver"])
    with capture(graph):
        body()
    copies = explain(graph).programs[0].copies
    (recording,) = explain(graph, measure=True, eager=body).programs[0].recordings
    assert recording.measured is not None
    assert recording.measured.eager_how == "what it is compared with"
    alone = explain(graph, measure=True).programs[0]
    (recording,) = alone.recordings
    assert recording.measured is not None
    assert recording.measured.verdict.startswith("measured: ")
    assert (alone.replays, alone.copies) == (0, copies)
    assert torch.equal(count, torch.ones(3, device=device))


def test_captured_graph_in_its_modes(device: torch.device, options: dict[str, Any]) -> None:
    """The steps of a captured block are timed in the modes of a replay, whatever the caller has on."""
    modes = []

    @eager_on_graph
    def double(x: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return x * 2

    x, graph = torch.ones(3, device=device), BreakableCUDAGraph(driver=options["driver"])
    with torch.no_grad(), capture(graph):
        double(x.sin()) + 1
    explain(graph, measure=True)
    assert len(modes) > 3
    assert not any(modes)
    graph.reset()


@torch.no_grad()
def test_nothing_to_measure(options: dict[str, Any], device: torch.device) -> None:
    """What cannot be measured is a typed error that says what to do."""
    compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options=options)
    compiled(torch.ones(3, device=device))
    with pytest.raises(OptionsError, match=r"no call was recorded\n.*\n.*call the function three times first"):
        explain(compiled, measure=True)
    with pytest.raises(OptionsError, match=r"needs the function to measure"):
        explain(measure=True)
    with pytest.raises(OptionsError, match="the graph is empty"):
        explain(BreakableCUDAGraph(driver=options["driver"]), measure=True)
    weight = torch.ones(3, device=device, requires_grad=True)
    training = torch.compile(lambda x: (x * weight).sin(), backend="breakable_cg", options=options)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # it is given once, to whichever test comes first
        with pytest.raises(OptionsError, match=r"the call replays nothing\n.*\n.*under torch.no_grad\(\)"):
            explain(training, torch.ones(3, device=device), measure=True)
    eager = torch.compile(lambda x: x + 1, backend="breakable_cg", options={**options, "min_kernels": 2})
    with torch.no_grad(), pytest.raises(OptionsError, match=r"the call replays nothing\n.*\n.*says why"):
        explain(eager, torch.ones(3, device=device), measure=True)
    with pytest.raises(OptionsError, match="f is not compiled"):

        def f() -> None: ...

        explain(f)


@torch.no_grad()
def test_input_that_nobody_keeps(options: dict[str, Any], device: torch.device) -> None:
    """An input that eager steps alone read is in no bridge: it has to be given."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return silly.triple(y) + (x.sin() + 1)

    x, y = torch.ones(3, device=device), torch.ones(3, device=device)
    compiled = compiled_and_called(f, options, x, y)
    with pytest.raises(OptionsError, match="is not kept between calls"):
        explain(compiled, measure=True)
    assert explain(compiled, x, y, measure=True).programs[0].recordings[0].measured is not None


@torch.no_grad()
def test_large_inputs_are_not_kept(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bridge of a large input is other values' memory after a call: zeros are measured, which no index fails on."""
    monkeypatch.setattr(copies, "KEPT_INPUT", 0)
    table = torch.arange(12.0, device=device).reshape(4, 3)

    def f(index: Tensor) -> Tensor:
        return silly.triple(table[index]).sin() + silly.triple(table[index] * 2)

    index = torch.tensor([3, 2, 1, 0], device=device)
    compiled = compiled_and_called(f, options, index)
    (program,) = explain(compiled, measure=True).programs
    assert program.recordings[0].measured is not None
    assert torch.equal(compiled(index), f(index))


@eager_on_graph
def brief(x: Tensor) -> Tensor:
    return x + 1


@eager_on_graph
def lengthy(x: Tensor) -> Tensor:
    time.sleep(0.005)
    return x + 1


@torch.no_grad()
def test_a_break_has_the_name_of_its_costliest_op(device: torch.device, options: dict[str, Any]) -> None:
    """A break is listed once, under the op in it that takes longest, whichever comes first."""

    def f(x: Tensor) -> Tensor:
        return lengthy(brief(x.sin() * 2)).cos() * 2

    compiled = compiled_and_called(f, options, torch.ones(3, device=device), calls=6)
    assert rows_of_breaks(explain(compiled)) == [["brief", "1"], ["with", "lengthy"]]
    report = explain(compiled, measure=True)
    (recording,) = report.programs[-1].recordings
    assert recording.measured is not None
    (cost,) = recording.measured.breaks
    assert (cost.step, cost.op) == (1, "lengthy")
    assert "return lengthy(brief(" in cost.source
    assert recording.steps[1].title == "lengthy, brief"
    assert rows_of_breaks(report) == [["lengthy", "1"], ["with", "brief"]]
    assert Report.from_json(report.to_json()) == report


def rows_of_breaks(report: Report) -> list[list[str]]:
    """The first two words of each row of the table of breaks."""
    return [line.split()[:2] for line in str(report).splitlines() if "marked by eager_on_graph" in line]


@torch.no_grad()
def test_no_verdict_without_a_gpu() -> None:
    """The tape shows no speed, so its times are told without a verdict, and nothing is said about small graphs."""
    compiled = compiled_and_called(lambda x: silly.triple(x.sin()).cos(), {"driver": "tape"}, torch.ones(3))
    (program,) = explain(compiled, measure=True).programs
    measured = program.recordings[0].measured
    assert measured is not None
    assert re.fullmatch(
        r"measured: [\d,]+ us a call, [\d,]+ to issue it; [\d,]+ us for its ATen ops, run eagerly "
        r"\(the tape driver runs on the CPU and shows no speed\)",
        measured.verdict,
    )
    assert not any("merge" in advice.what for advice in measured.advice)


@torch.no_grad()
def test_no_advice_about_inputs_behind_a_break_of_dynamos() -> None:
    """What Dynamo passes to the code behind its break is no tensor of the caller's, so it cannot be kept in place."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        torch._dynamo.graph_break()
        return y.cos() * 2

    compiled = compiled_and_called(f, {"driver": "tape"}, torch.ones(3))
    before, behind = (program.recordings[0].measured for program in explain(compiled, measure=True).programs)
    assert before is not None and any("one address" in advice.what for advice in before.advice)
    assert behind is not None and not any("one address" in advice.what for advice in behind.advice)


# --- advice -----------------------------------------------------------------------------------------------------------------


def advice_of(compiled: Any) -> list[Advice]:
    (program,) = explain(compiled, measure=True).programs
    measured = program.recordings[0].measured
    assert measured is not None
    return list(measured.advice)


@torch.no_grad()
def test_advice(options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks on torch's own ops, results and inputs that are copied: each advice rests on a number."""
    monkeypatch.setattr(verdict, "BUSY", 2.0)  # whatever the GPU does
    mark_eager("aten::sort")
    try:
        compiled = compiled_and_called(
            lambda x: (x.sin() + 1).sort().values.cos() + 1, options, torch.ones(9, device=device)
        )
        advice = advice_of(compiled)
    finally:
        unmark_eager("aten::sort")
    texts = [item.what.partition(":")[0] for item in advice]
    assert "mark fewer" in texts
    assert any("aten::sort's first, copied in each call: 36 B" in item.evidence for item in advice)
    assert any(item.what.startswith("keep the input") and "36 B" in item.evidence for item in advice)
    assert all(any(letter.isdigit() for letter in item.evidence) for item in advice)
    assert advice == sorted(advice, key=lambda item: -item.saves_us)


def test_no_advice_on_launches_where_the_gpu_is_busy() -> None:
    """Where the GPU works all the time, fewer launches would not help, and the advice says so alone."""
    from breakable_backend.recordings.recording import Recording

    recording = Recording((), {}, (), (), (), {})
    timed = Timed(TapeDriver(torch.device("cpu")), recording, Times(100.0, 100.0), (), {})
    (advice,) = verdict._advice(timed, (BreakCost(1, "op", "", 90.0, 0.9),), 0.95, 1.0)
    assert (advice.what, advice.evidence) == (
        "the GPU is what a call waits for: faster kernels would help, fewer launches would not",
        "it works 95% of a call",
    )


def test_advice_on_guards() -> None:
    """Where a call takes much of its time around the replay, the advice names what leaves Dynamo's guards out."""
    from breakable_backend.recordings.recording import Recording

    recording = Recording((), {}, (), (), (), {})
    timed = Timed(TapeDriver(torch.device("cpu")), recording, Times(100.0, 100.0), (), {})
    (advice,) = verdict.judged(timed, verdict.Bench(timed.driver), None, None, outside=60.0).advice
    assert "breakable_backend.bind(compiled, *args)" in advice.what
    assert advice.evidence == "guards, wrappers and the key take 60.0 of 100.0 us of host time"


@pytest.mark.parametrize(
    ("eager_us", "says"),
    [(200.0, "pays: 2.00 times"), (103.0, "about even: 1.03 times"), (50.0, "does not pay: 0.50 times")],
)
def test_verdict(eager_us: float, says: str) -> None:
    """The verdict is one line: whether it pays, against what, and what the GPU does meanwhile."""
    measured = Measured(eager_us, "eager", 80.0, 100.0, (StepTime(80.0, 40.0),), (), ())
    assert measured.verdict == (
        f"{says} as fast as eager ({eager_us:.0f} us); 100 us a call, 80 to issue it, the GPU at work 40% of it"
    )
    assert measured.busy == 0.4


def test_lines() -> None:
    """The costliest break alone, with its line; then all advice."""
    breaks = (BreakCost(3, "mylib::route", "model.py:3 in f", 40.0, 0.5), BreakCost(1, "aten::sort", "", 2.0, 0.02))
    measured = Measured(None, "", 80.0, 100.0, (), breaks, (Advice("do less", "9 of 10", 1.0),))
    assert list(measured.lines()) == [
        "costliest break: step 3, mylib::route, 40.0 us of host time (50%) at model.py:3 in f",
        "do less: 9 of 10",
    ]


@torch.no_grad()
def test_calls_of_another_thread(device: torch.device, options: dict[str, Any]) -> None:
    """What a call in another thread writes meanwhile is not put back with what measuring wrote."""
    model = Counting().to(device)
    x = torch.randn(2, 4, device=device)
    compiled = compiled_and_called(model, options, x)
    calls, done = 0, threading.Event()

    def work() -> None:
        nonlocal calls
        with torch.no_grad():
            while not done.is_set() or calls < 20:
                compiled(x)
                calls += 1

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        explain(compiled, measure=True)
    done.set()
    thread.join()
    assert model.calls == 4 + calls
