"""The page: what it carries, where it says that a step stands, and what a real browser makes of it."""

from __future__ import annotations

import copy
import html
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, Report, capture, eager_on_graph, explain
from breakable_backend.calling.registry import executors_of
from breakable_backend.ir.program import lines_of_segments
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Replay, emit
from breakable_backend.tools.page import TEMPLATE, page, step_lines
from checks import entries_of
from reports import called, from_file

EMPTY: dict[str, Any] = {
    "schema": 1,
    "programs": [],
    "eager_graphs": [],
    "graph_breaks": {},
    "at_recompile_limit": [],
    "skipped": {},
    "stance": "default",
}

MODEL = """
def f(x, y):
    y = silly.triple(x.sin() + y)
    return (y.cos() + 1).relu()
"""


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """A report on two captured segments and a break, measured by hand."""
    torch._dynamo.utils.counters.clear()  # a report has the graph breaks of the whole process
    report = explain(called(from_file(MODEL), 5, torch.ones(3), torch.ones(3))).to_dict()
    recording = report["programs"][0]["recordings"][0]
    for step, host in zip(recording["steps"], (5.0, 40.0, 6.0), strict=True):
        step["host_us"], step["gpu_us"] = host, host / 2
    recording["measured"] = {
        "eager_us": 200.0,
        "eager_how": "eager",
        "host_us": 51.0,
        "total_us": 100.0,
        "steps": [{"host_us": host, "gpu_us": host / 2} for host in (5.0, 40.0, 6.0)],
        "breaks": [{"step": 1, "op": "silly::triple", "source": "model.py:3 in f", "host_us": 40.0, "share": 0.78}],
        "advice": [{"what": "write into a given buffer", "evidence": "12 B copied", "saves_us": 4.0}],
        "note": "",
        "verdict": "pays: 2.00 times as fast as eager (200 us); 100 us a call, 51 to issue it",
        "busy": 0.26,
    }
    return report


def repeated(report: dict[str, Any], times: int) -> dict[str, Any]:
    """The report with the steps of its program over and over, as of a model that much larger, and not measured."""
    report = copy.deepcopy(report)
    (program,) = report["programs"]
    (recording,) = program["recordings"]
    recording["measured"] = None
    first, last = recording["steps"][1:]  # eager, captured
    for position in range(3, 3 + 2 * times):
        recording["steps"].append({**(first if position % 2 else last), "position": position})
    for step in recording["steps"]:
        step["host_us"] = step["gpu_us"] = None
    head, *lines = program["text"].split("  segment ")
    lines[2], _, end = lines[2].partition("  returns")
    bodies = [line.partition(": ")[2] for line in lines]
    texts = [bodies[0], *(bodies[2 - number % 2] for number in range(1, 3 + 2 * times))]
    program["text"] = head + "".join(f"  segment {n}: {body}" for n, body in enumerate(texts)) + f"  returns{end}"
    recording["source"], segments, line = "", program["steps"], head.count("\n")
    program["steps"] = []
    for position, body in enumerate(texts):
        place = {"position": position, "first_line": line, "end_line": (line := line + body.count("\n"))}
        program["steps"].append({**segments[2 - position % 2 if position else 0], **place})
    return report


# --- what it carries ----------------------------------------------------------------------------------------------------


def carried(text: str, name: str = "report") -> Any:
    """The data of a page, taken out of it."""
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_carries_the_report(small: dict[str, Any]) -> None:
    """What ``to_dict`` returned is in the page, unchanged; so it is when the page is written to a file."""
    assert carried(page(small)) == small
    assert carried(page(EMPTY)) == EMPTY


def test_written_page_carries_the_report(tmp_path: Path) -> None:
    """``to_html`` writes the page of ``to_dict``."""
    report = explain(called(from_file(MODEL), 4, torch.ones(3), torch.ones(3)))
    assert carried(report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")) == report.to_dict()


def test_asks_the_network_for_nothing(small: dict[str, Any]) -> None:
    """No address is in the page, nothing is loaded, and its policy forbids both to whatever is in it."""
    text = page(small)
    assert "default-src 'none'" in text
    assert not re.search(
        r"https?:|//[a-z]|\b(src|href|srcset)\s*=|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(", text
    )


HOSTILE = "</script><script>document.documentElement.dataset.error = 'out'</script><!-- --><u class='planted'>u</u> &lt; \u2028 ' \" ${1} \\"


def hostile(report: dict[str, Any]) -> dict[str, Any]:
    """The report with a text that would break out, wherever a text is the user's."""
    report = copy.deepcopy(report)
    (program,) = report["programs"]
    (recording,) = program["recordings"]
    program["name"] = recording["key"] = recording["refused"] = HOSTILE
    program["text"] = program["text"].replace("relu = ", f"relu {HOSTILE} = ")
    program["notes"] = [HOSTILE]
    program["plain_calls"] = {HOSTILE: 2}
    recording["source"] += f"    # {HOSTILE}\n"
    for step in recording["steps"]:
        step["title"] = step["source"] = step["module"] = HOSTILE
        step["kernels"] = [HOSTILE]
        for op in step["ops"]:
            op["name"] = op["op"] = op["source"] = HOSTILE
        for reason in step["reasons"]:
            reason["text"] = reason["source"] = HOSTILE
    report["graph_breaks"] = {HOSTILE: 1}
    report["eager_graphs"] = [{"name": HOSTILE, "why": HOSTILE, "source": HOSTILE}]
    report["at_recompile_limit"] = [HOSTILE]
    report["skipped"], report["stance"] = {HOSTILE: HOSTILE}, HOSTILE
    return report


def test_data_cannot_break_out(small: dict[str, Any]) -> None:
    """Whatever a source line holds, the page has as many scripts as before, and the data is as it was."""
    report = hostile(small)
    text = page(report)
    assert text.count("<script") == text.count("</script>") == TEMPLATE.read_text(encoding="utf-8").count("</script>")
    assert "<!--" not in text
    assert carried(text) == report


# --- where a step stands ---------------------------------------------------------------------------------------------------


def test_lines_of_segments() -> None:
    """A segment has its heading and what is indented below it; what the program returns is of none."""
    compiled = torch.compile(several, backend="breakable_cg", options={"driver": "tape", "min_kernels": 1})
    with torch.no_grad():
        compiled(torch.ones(3), torch.ones(3))
    (executor,) = executors_of(compiled)
    program = executor.program
    lines, places = str(program).splitlines(), lines_of_segments(program)
    kinds = ["captured" if segment in program.graph_segments else "eager" for segment in program.segments]
    assert [lines[first] for first, _ in places] == [f"  segment {at}: {kind}" for at, kind in enumerate(kinds)]
    assert all(line.startswith("    ") for first, end in places for line in lines[first + 1 : end])
    assert not lines[places[-1][1]].startswith("    ")


def marked_lines(recording: Recording, like: Replay) -> tuple[str, list[tuple[int, int]]]:
    """The source of a replay, and where its steps stand: read off a replay that tells where it is."""
    replay = emit(recording, lambda position: None, variants=like.variants)
    lines, starts = [], []
    for line in replay.source.splitlines():
        if re.match(r"    mark\(\d+\)$", line):
            starts.append(len(lines))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n", list(itertools.pairwise(starts))


def several(x: Tensor, y: Tensor) -> Any:
    """Loads of one and of several bridges, parts of results, an unused result."""
    a, b, c = silly.three(x.sin() + y)
    silly.notice(a)
    return (a.cos() + b).relu() * y, c


def written(x: Tensor, y: Tensor) -> Tensor:
    """A captured segment that writes an argument."""
    x.add_(1)
    x.mul_(y)
    return silly.triple(x).cos() * 2


def failed(x: Tensor, y: Tensor) -> Tensor:
    """A segment that cannot be captured, so that eager steps touch."""
    z = silly.triple(x.sin() + y)
    z = silly.triple(silly.stubborn(z.cos()))
    return silly.triple(z + 1)


def eager_last(x: Tensor, y: Tensor) -> Any:
    """The program ends with an eager step, whose result is returned with a view of it."""
    z = silly.triple(x.sin() + y)
    return z, z.view(1, -1), x.cos() + 1, silly.triple(z)


def eager_first(x: Tensor, y: Tensor) -> Tensor:
    return silly.triple(silly.triple(x) + y) + 1


@pytest.mark.parametrize("function", [several, written, failed, eager_last, eager_first], ids=lambda f: f.__name__)
def test_source_lines(function: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> None:
    """Each step of a generated replay is found where the replay itself has it."""
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    # new addresses: what is written gets a bridge, and a store
    kept = [torch.ones(3, device=device) for _ in range(8)]
    with torch.no_grad():
        for x in kept:
            compiled(x, torch.ones(3, device=device))
    (program,) = explain(compiled).to_dict()["programs"]
    (executor,) = executors_of(compiled)
    checked = 0
    for entry, report in zip(entries_of(executor), program["recordings"], strict=True):
        if entry.recording is not None and entry.replay is not None:
            source, expected = marked_lines(entry.recording, entry.replay)
            assert source == report["source"]
            assert step_lines(report["steps"]) == expected
            checked += 1
    assert checked


def test_source_lines_of_a_captured_block() -> None:
    """So it is for a ``with`` block, in which one function may be called twice in a row."""

    @eager_on_graph
    def clip(x: Tensor) -> Tensor:
        return x / 2

    graph, x = BreakableCUDAGraph(driver="tape"), torch.randn(3)
    with torch.no_grad(), capture(graph):
        clip(clip(x.sin()) + 1) * 2
    snapshot = graph.snapshot()
    assert snapshot.recording is not None and snapshot.replay is not None
    source, expected = marked_lines(snapshot.recording, snapshot.replay)
    (program,) = explain(graph).to_dict()["programs"]
    assert source == program["text"]
    assert step_lines(program["recordings"][0]["steps"]) == expected
    assert step_lines(program["steps"]) == []
    del snapshot
    graph.reset()


def test_steps_without_lines() -> None:
    """A report that does not say where all its steps stand gets no lines, and the page shows it without."""
    assert step_lines([{"first_line": 1, "end_line": 2}, {}]) == []
    assert step_lines([{"first_line": 1, "end_line": 2}, {"first_line": 2, "end_line": 4}]) == [(1, 2), (2, 4)]
    assert step_lines([]) == []


# --- in a browser -----------------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, BROWSERS)), None)

browser = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: none of {', '.join(BROWSERS)} is on the path")


NARROWEST = 500
"""Pixels: no window of a browser is narrower. A phone's is a frame in one."""
TELLS_OF_ITS_FRAME = """<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  for (const { name, value } of frame.contentDocument.documentElement.attributes) document.documentElement.setAttribute(name, value);
});
</script>"""


def rendered(report: dict[str, Any], folder: Path, script: str = "", fragment: str = "", width: int = 1400) -> str:
    """The page's DOM once a headless browser, ``width`` pixels wide, has run it, and ``script`` after it."""
    assert BROWSER is not None
    file = folder / "page.html"
    text = page(report).replace("</body>", f"<script>{script}</script></body>")
    if width < NARROWEST:
        text = f'<iframe style="border: 0" width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>{TELLS_OF_ITS_FRAME}'
    file.write_text(text, encoding="utf-8")
    flags = f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size={width},1000"
    command = [
        BROWSER,
        *flags.split(),
        "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"{file.as_uri()}{fragment}"], capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def root(dom: str) -> str:
    """The root's tag, which tells whether the page's script came to its end, and what it says of errors."""
    match = re.search(r"<html[^>]*>", dom)
    assert match is not None
    return match[0]


def without_data(dom: str) -> str:
    """What is on the page, but for its scripts, data and style."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", dom, flags=re.DOTALL)


def asserted(*facts: str) -> str:
    """A script that does and asserts; what is not so is an error of the page."""
    return "\n".join(f"if (!({fact})) throw new Error({json.dumps('not so: ' + fact)});" for fact in facts)


@browser
@pytest.mark.parametrize("times", [0, 499], ids=["3 steps", "1001 steps"])
def test_renders(small: dict[str, Any], tmp_path: Path, times: int) -> None:
    """Steps, rows and the verdict are there, with no error in the script: for a small report, and for a large one."""
    report = repeated(small, times) if times else small
    steps = report["programs"][0]["recordings"][0]["steps"]
    assert len(steps) == 3 + 2 * times
    dom = rendered(report, tmp_path)
    assert 'data-ready="true"' in root(dom)
    assert "data-error" not in root(dom)
    shown = without_data(dom)
    for kind in ("captured", "eager"):
        count = sum(step["kind"] == kind for step in steps)
        assert len(re.findall(rf'<div class="step {kind}', shown)) == count
        assert len(re.findall(rf'<tr class="row {kind}', shown)) == count
        assert len(re.findall(rf'<div class="block {kind}', shown)) == count
    assert ("pays: 2.00 times as fast as eager" if not times else "Not measured.") in shown
    assert "tagged cudagraph_unsafe" in shown
    assert "model.py:3 in f" in shown


@browser
def test_everything_reacts(small: dict[str, Any], tmp_path: Path) -> None:
    """Clicks and keys choose a step everywhere at once; filter, order, scale, zoom, text and tooltip do what they say."""
    key = "timeline.dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}));"
    chosen = "[...document.querySelectorAll('.selected')].every(e => e.dataset.step == %d) && document.querySelectorAll('.selected').length == 3"
    rows = "document.querySelectorAll('tr.row')"
    script = "\n".join(
        (
            asserted(chosen % 1),  # the costliest break
            "document.querySelector('#step-2').click();",
            asserted(chosen % 2, "$('#step header').textContent.includes('Step 2')", "location.hash.endsWith('step=2')"),
            key % "ArrowUp",
            asserted(chosen % 1, "$('#step .body').textContent.includes('tagged cudagraph_unsafe')"),
            asserted("!$('.tip').hidden && $('.tip').textContent.includes('1: silly::triple')"),
            "timeline.dispatchEvent(new Event('blur'));",
            asserted("$('.tip').hidden"),
            key % "ArrowLeft",
            asserted(chosen % 0),
            "document.querySelectorAll('.block[data-step]')[2].click();",
            asserted(chosen % 2),
            f"{rows}[1].click();",
            asserted(chosen % 1, "$('.timeline').getAttribute('aria-activedescendant') == 'step-1'"),
            f"{rows}[2].querySelector('.fold').click();",
            asserted("$('tr.more').textContent.includes('aten::relu')", chosen % 1),
            "$('#filter').value = 'RELU'; $('#filter').dispatchEvent(new Event('input'));",
            asserted(f"{rows}.length == 1", "$('#shown').textContent == '1 of 3'"),
            "$('#filter').value = ''; $('#filter').dispatchEvent(new Event('input'));",
            "[...document.querySelectorAll('thead button')].find(b => b.textContent == 'host').click();",
            asserted(f"[...{rows}].map(r => r.dataset.step).join() == '1,2,0'", "$('[aria-sort=descending]').textContent == 'host'"),
            "$('#kinds button:last-child').click();",
            asserted(f"{rows}.length == 1"),
            # wide as it took long, and as many as its ops
            asserted("Math.abs(parseFloat($('#step-1').style.width) - 100 * 40 / 51) < 1e-3"),
            "[...document.querySelectorAll('#scales button')].find(b => b.textContent == 'Ops').click();",
            asserted("Math.abs(parseFloat($('#step-1').style.width) - 100 / 6) < 1e-3"),
            "$('#in').click(); $('#in').click();",
            asserted("timeline.scrollWidth > 2.5 * timeline.clientWidth"),
            "$('#fit').click();",
            asserted("timeline.scrollWidth == timeline.clientWidth"),
            "[...document.querySelectorAll('#views button')].find(b => b.textContent == 'Replay source').click();",
            asserted("listing.textContent.startsWith('def replay')", "$('.block.selected').textContent.includes('# eager: ')"),
            "$('#views button').click();",
            "const line = [...document.querySelectorAll('.block div')].find(e => e.textContent.includes('relu = '));",
            "line.dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));",
            asserted("!$('.tip').hidden && $('.tip').textContent.includes('model.py:4 in f: return (y.cos() + 1).relu()')"),
            "$('#step-1').dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));",
            asserted("$('.tip').textContent.includes('because silly::triple: tagged cudagraph_unsafe')"),
        )
    )  # fmt: skip
    assert "data-error" not in root(rendered(small, tmp_path, script))


@browser
def test_several_programs_and_keys(small: dict[str, Any], tmp_path: Path) -> None:
    """The program and the key that were called most come first; the address chooses others, and so do tabs and list."""
    report = copy.deepcopy(small)
    (program,) = report["programs"]
    other = copy.deepcopy(program)
    other["name"], other["calls"] = "graph of little use", 1
    never = {
        **program["recordings"][0],
        "key": "1: 7",
        "steps": [],
        "source": "",
        "refused": "too many keys",
        "measured": None,
    }
    busiest = {**program["recordings"][0], "key": "2: 8", "calls": 99}
    program["recordings"] += [{**never, "calls": 1000}, busiest]
    program["debug"] = "eager"
    report["programs"] = [other, program]
    script = asserted(
        "$('#programs [aria-selected=true]').textContent.startsWith('graph 0') || state.program == 1",
        "$('#keys select').value == '2'",
        "!$('#debug').hidden && $('#debug').textContent.startsWith('Debug mode')",
    )
    script += "$('#keys select').value = '1'; $('#keys select').dispatchEvent(new Event('change'));"
    script += asserted(
        "$('#verdict').textContent.includes('This key is not recorded: too many keys')", "steps.length == 3"
    )
    script += "$('#programs button').click();"
    script += asserted("state.program == 0", "$('#keys').hidden", "$('#debug').hidden")
    assert "data-error" not in root(rendered(report, tmp_path, script))
    chosen = asserted("state.program == 1", "state.key == 0", "state.step == 2")
    assert "data-error" not in root(rendered(report, tmp_path, chosen, "#program=1&key=0&step=2"))


@browser
def test_a_break_stands_once(small: dict[str, Any], tmp_path: Path) -> None:
    """A break is one entry, under its costliest op; what else is in it stands below, and what is not captured says what helps."""
    report = copy.deepcopy(small)
    step = report["programs"][0]["recordings"][0]["steps"][1]
    step["costliest"] = "silly::slow"
    step["reasons"] += [{**step["reasons"][0], "op": "silly::slow"}, dict(step["reasons"][0])]
    why, broken = (
        "it needs gradients, and no backward has been seen that tells how",
        "Dynamic shape operator, at /a/m.py:3 in f: x",
    )
    report["eager_graphs"] = [{"name": "graph 9", "why": why, "source": ""}]
    report["graph_breaks"] = {broken: 1}
    report["advice"] = {why: "under torch.no_grad()", broken: "mark it"}
    script = asserted(
        "$('#breaks ul').children.length == 1",
        "$('#breaks li').textContent.includes('1× silly::slow')",
        "$('#breaks li').textContent.includes('with silly::triple: tagged')",
        "$('#elsewhere').textContent.includes('what helps: under torch.no_grad()')",
        "$('#elsewhere').textContent.includes(', at m.py:3 in f: x') && $('#elsewhere').textContent.includes('what helps: mark it')",
    )
    assert "data-error" not in root(rendered(report, tmp_path, script))


@browser
@pytest.mark.parametrize("width", [390, 1400])
def test_thirty_programs(small: dict[str, Any], tmp_path: Path, width: int) -> None:
    """Many programs are a list, from which one is chosen; nothing is wider than the window, a phone's too."""
    report = copy.deepcopy(small)
    (program,) = report["programs"]
    report["programs"] = [{**copy.deepcopy(program), "name": f"graph {at}", "calls": 5 + at} for at in range(30)]
    script = asserted(
        "$('#programs').hidden && !$('#many').hidden && $('#keys').hidden",
        "$('#many select').options.length == 30 && $('#many select').value == '29'",
        f"innerWidth == {width}",
    )
    fits = asserted("document.documentElement.scrollWidth <= innerWidth")
    script += f"setTimeout(() => {{ {fits} }}, 100);"  # once the browser has laid the page out
    script += "$('#many select').value = '3'; $('#many select').dispatchEvent(new Event('change'));"
    script += asserted(
        "state.program == 3", "$('#many select').selectedOptions[0].textContent.startsWith('graph 3 (8 calls')"
    )
    tag = root(rendered(report, tmp_path, script, width=width))
    assert 'data-ready="true"' in tag
    assert "data-error" not in tag


@browser
def test_hostile_data_stays_text(small: dict[str, Any], tmp_path: Path) -> None:
    """No text of the user's is read as HTML, wherever it is shown."""
    script = "document.querySelectorAll('.fold').forEach(fold => fold.click());"
    script += "document.querySelectorAll('#views button')[1].click();"
    script += asserted("!$('.planted')")
    dom = rendered(hostile(small), tmp_path, script)
    assert "data-error" not in root(dom)
    assert without_data(dom).count("&lt;/script&gt;") > 10


@browser
def test_errors_show(small: dict[str, Any], tmp_path: Path) -> None:
    """An error of the page's script is on the page and in its root: the tests here could not fail otherwise."""
    dom = rendered(small, tmp_path, "throw new Error('planted')")
    assert "planted" in root(dom)
    assert "This page has a fault: Uncaught Error: planted" in dom
    assert "data-error" in root(rendered({**small, "programs": [{}] * 0, "eager_graphs": None}, tmp_path))


@browser
@pytest.mark.parametrize("what", ["nothing", "eager graphs", "skipped", "before the first call"])
def test_renders_without_steps(small: dict[str, Any], tmp_path: Path, what: str) -> None:
    """A report on nothing says so, and so does one on what was not captured, or not yet."""
    report: dict[str, Any] = {**EMPTY}
    expected = "Nothing was compiled by breakable_cg yet"
    if what == "eager graphs":
        report["eager_graphs"] = [{"name": "the eager graph", "why": "it needs gradients", "source": ""}]
        expected = "Nothing was captured: all graphs run as Dynamo traced them."
    if what == "skipped":
        report["skipped"] = {"f (model.py:3)": "it has no op on tensors"}
        expected = "Nothing was compiled: Dynamo skipped all calls."
    if what == "before the first call":
        report = copy.deepcopy(small)
        report["programs"][0]["recordings"] = []
        expected = "Not recorded yet: call 1 runs plainly, call 2 records."
    dom = rendered(report, tmp_path)
    assert "data-error" not in root(dom)
    assert expected in without_data(dom)
    assert ("the eager graph" in without_data(dom)) == (what == "eager graphs")


@browser
def test_renders_real_reports(tmp_path: Path) -> None:
    """What ``explain`` finds renders: several keys, notes, a failed capture, a ``with`` block."""

    def shown(report: Report) -> str:
        dom = rendered(report.to_dict(), tmp_path)
        assert 'data-ready="true"' in root(dom)
        assert "data-error" not in root(dom)
        return without_data(dom)

    assert "could not be captured" in shown(explain(called(failed, 4, torch.ones(3), torch.ones(3))))
    graph, x = BreakableCUDAGraph(driver="tape"), torch.randn(3)
    with torch.no_grad(), capture(graph):
        silly.triple(x.sin()) * 2
    assert "def replay" in shown(explain(graph))
    assert "graph that holds nothing" in shown(explain(BreakableCUDAGraph()))
    graph.reset()
