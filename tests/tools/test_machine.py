"""``python -m breakable_backend``: whether a machine will work, and saved reports."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from breakable_backend import OptionsError, Report, explain
from breakable_backend.__main__ import main
from breakable_backend.tools import machine
from breakable_backend.tools.machine import Finding, examine, print_findings

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def report() -> Report:
    """Of a function with an eager step, recorded and measured."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + 1).sort().values * 2 + 1

    options = {"driver": "tape", "eager_ops": ["aten::sort"]}
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(3):
        compiled(torch.ones(4))
    return explain(compiled, measure=True)


def test_this_machine_works(capsys: pytest.CaptureFixture[str]) -> None:
    """The command looks at versions and extras, runs a model through the backend, and ends with what it found."""
    assert main([]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "self-test on the CPU 3 replays of a program with 2 captured segments" in printed
    assert torch.__version__ in printed
    assert ("with CUDA graphs" if torch.cuda.is_available() else "on the tape driver") in printed


@pytest.mark.gpu
def test_each_gpu_is_tested() -> None:
    """Each GPU captures, replays and compares a model of its own."""
    found = {finding.subject: finding.state for finding in examine()}
    for index in range(torch.cuda.device_count()):
        assert found[f"self-test on cuda:{index}"] == "good"


@pytest.mark.parametrize(
    ("version", "state"), [("2.9.1+cu128", "bad"), ("2.11.0", "good"), ("2.15.2+cpu", "good"), ("2.99.0", "note")]
)
def test_the_version_of_torch(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    """A torch that is too old is bad; one that is newer than what was tested is a note."""
    monkeypatch.setattr(torch, "__version__", version)
    (found,) = [finding for finding in machine._versions() if finding.subject == "torch"]
    assert found.state == state


def test_a_self_test_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What does not work is named, and the status of the process is 1."""

    def fails(device: torch.device) -> str:
        raise RuntimeError(f"no kernel image for {device}")

    monkeypatch.setattr(machine, "_self_test", fails)
    assert main([]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "RuntimeError: no kernel image for cpu" in printed
    assert "This does not work here: self-test on the CPU" in printed


def test_findings_that_are_notes_are_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """A limit is no failure."""
    assert print_findings((Finding("GPU", "note", "torch is a CPU build"),)) == 0
    assert "torch is a CPU build" in capsys.readouterr().out


# --- saved reports ------------------------------------------------------------------------------------------------------


def test_a_report_survives_json(report: Report) -> None:
    """``Report.from_json`` gives back what ``to_json`` wrote: the same records, and the same text."""
    again = Report.from_json(report.to_json())
    assert again == report
    assert str(again) == str(report) and again.to_dict() == report.to_dict()


def test_a_saved_report_is_shown(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a saved report, or writes it as a page."""
    saved = tmp_path / "report.json"
    saved.write_text(report.to_json(), encoding="utf-8")
    assert main([str(saved)]) == 0
    assert capsys.readouterr().out == f"{report}\n"  # not a terminal: as wide as print(report)
    assert main([str(saved), "--html", str(tmp_path / "page.html")]) == 0
    assert "aten::sort" in (tmp_path / "page.html").read_text(encoding="utf-8")


def changed(report: dict[str, Any], path: str, value: Any) -> str:
    """``report`` as JSON, with ``value`` at the place that ``path`` names."""
    *parents, last = path.split(".")
    place: Any = report
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(report)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("schema", 99, "not a report of schema 1: its schema is 99"),
        ("programs", None, "the saved report lacks report.programs"),
        ("programs", 3, "report.programs is '3', which is not a list"),
        ("programs.0.calls", "many", "report.programs[0].calls is 'many', which is not an int"),
        ("programs.0.steps.0.kind", "lost", "kind is 'lost', which is not one of 'captured', 'eager'"),
        ("programs.0.recorded", [], "recorded is '[]', which is not a dict"),
        ("programs.0", [], "report.programs[0] is '[]'"),
    ],
)
def test_what_is_no_report(report: Report, path: str, value: Any, told: str) -> None:
    """What is wrong in a saved report is named with its place."""
    if path == "programs.0":
        text = json.dumps({**report.to_dict(), "programs": [[]]})
    else:
        text = changed(report.to_dict(), path, value)
    with pytest.raises(OptionsError) as caught:
        Report.from_json(text)
    assert told in str(caught.value)


def test_a_file_that_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says so of a file that is missing, or no JSON; its status is 2."""
    missing = tmp_path / "none.json"
    assert main([str(missing)]) == 2
    assert capsys.readouterr().err == f"{missing}: No such file or directory\n"
    for number, content in enumerate((b"{", b"\x89PNG")):
        (tmp_path / f"{number}.json").write_bytes(content)
        assert main([str(tmp_path / f"{number}.json")]) == 2
        assert "this is not JSON" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command names the page's path, and why."""
    saved, page = tmp_path / "report.json", tmp_path / "nowhere" / "page.html"
    saved.write_text(report.to_json(), encoding="utf-8")
    assert main([str(saved), "--html", str(page)]) == 2
    assert capsys.readouterr().err == f"{page}: No such file or directory\n"


# --- where people look --------------------------------------------------------------------------------------------------


def test_a_notebook_shows_tables_in_order(report: Report) -> None:
    """In a notebook lines and tables come in the order of the text, and code in them is no HTML."""
    shown = report._repr_html_()
    places = [
        shown.index(text) for text in ("replayed ", "<th>eager</th>", "<th>key</th>", "<th>step</th>", "costliest")
    ]
    assert places == sorted(places)
    assert "<lambda>" not in shown and shown.count("<table>") == shown.count("</table>") == 3


def test_rich_shows_it(report: Report) -> None:
    """``rich.print`` and a console of rich's draw the tables at their own width."""
    from rich.console import Console

    console = Console(width=72, record=True, file=io.StringIO())
    console.print(report)
    lines = console.export_text().splitlines()
    assert any("aten::sort" in line for line in lines) and max(map(len, lines)) <= 72


def test_the_terminals_width(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as the terminal where there is one, and 160 columns where the text goes elsewhere."""
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    tables = [line for line in str(report).splitlines() if line.startswith("    ")]
    assert max(map(len, tables[:8])) <= 90
    assert str(report).startswith("replayed ")
