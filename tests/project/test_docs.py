"""The documentation: its code runs, prints what it says, and names what is there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import doctest
import importlib
import inspect
import io
import linecache
import pkgutil
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import breakable_backend
from breakable_backend import errors
from breakable_backend.backend import EagerGraph
from breakable_backend.calling import eviction, executor, first_backwards, retries, slots, training, training_by_size
from breakable_backend.drivers import cuda, pool_size
from breakable_backend.errors import BreakableError
from breakable_backend.ir import program
from breakable_backend.marks.rules import RULES
from breakable_backend.options import Options
from breakable_backend.recordings import copies, large_results
from breakable_backend.tools import report, timing, verdict

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
README = (DOCS.parent / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The blocks of Python of a page, each with the ``text`` block right behind it, which is what it prints."""
    found: list[tuple[str, str | None]] = []
    end = -1
    for match in FENCE.finditer(page):
        language, body = match.groups()
        if language == "python":
            found.append((body, None))
            end = match.end()
        elif language == "text" and end >= 0 and not page[end : match.start()].strip():
            found[-1] = (found[-1][0], body)
    return found


def file_of(code: str) -> str:
    """The file that a block stands for: of its first line, as ``# layers.py``."""
    named = re.match(r"# (\w+\.py)\n", code)
    return named[1] if named else "model.py"


def printed(text: str) -> str:
    """What a block printed, without times, numbers of graphs and digits that machines differ in."""
    text = re.sub(r"\d+\.\d+ ([mu]?s)\b", r"0.0 \1", text)
    text = re.sub(r"^graph \d+:", "graph 0:", text, flags=re.MULTILINE)
    return re.sub(r"\d+\.\d{3,}", "0.0", text).strip()


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page)])
def test_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run, one after the other, and print the text behind them."""
    monkeypatch.setenv("BREAKABLE_CG_DRIVER", "tape")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = types.ModuleType(f"docs_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo looks modules up by name
    for code, expected in blocks(PAGES[name]):
        # Under a name that is the same everywhere, so that the source lines in messages can be written down.
        file = file_of(code)
        linecache.cache[file] = (len(code), None, code.splitlines(True), file)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, file, "exec"), vars(module))
        if expected is not None:
            assert printed(out.getvalue()) == printed(expected)


MODULES = [
    module.name.partition(".")[2]
    for module in pkgutil.walk_packages(breakable_backend.__path__, "breakable_backend.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    """The examples in the docstrings of a module print what stands behind them, with the tape."""
    module = importlib.import_module(f"breakable_backend.{name}")
    for found in doctest.DocTestFinder().find(module):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            failed = doctest.DocTestRunner(verbose=False).run(found, clear_globs=False).failed
        torch.compiler.reset()  # while the globals are there, in which Dynamo has left names of its own
        assert not failed, out.getvalue()


def test_public_names_have_examples() -> None:
    """What a user calls has an example in its docstring."""
    public = {name: getattr(breakable_backend, name) for name in breakable_backend.__all__}
    called = {name: value for name, value in public.items() if not (inspect.isclass(value) and is_record(value))}
    missing = [name for name, value in called.items() if ">>>" not in (inspect.getdoc(value) or "")]
    assert missing == ["breakable_cg"]  # the backend's is in the docstring of its call


def is_record(value: type) -> bool:
    """An error or a report: what a user is given."""
    return issubclass(value, BreakableError) or dataclasses.is_dataclass(value)


def test_blocks_are_found() -> None:
    """The pages that explain by examples have some."""
    assert len(blocks(PAGES["errors"])) >= 5
    assert len(blocks(PAGES["semantics"])) >= 5


def test_finds_blocks() -> None:
    """A text block belongs to the Python block right before it, and to no other."""
    page = "```python\na\n```\n\n```text\n1\n```\n\n```text\n2\n```\n\n```python\nb\n```\n\nsaid\n\n```text\n3\n```\n"
    assert blocks(page) == [("a\n", "1\n"), ("b\n", None)]


def test_errors_page() -> None:
    """Each class of error has its heading on the page of errors, in the order of ``errors.py``."""
    classes = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BreakableError) and value.__module__ == errors.__name__
    ]
    assert re.findall(r"^## `(\w+)`$", PAGES["errors"], re.MULTILINE) == classes


def test_rules_page() -> None:
    """Each rule has its line in the table of what runs eagerly by itself."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["semantics"], re.MULTILINE)
    assert [name for name in rows if name.islower()] == [rule.__name__ for rule in RULES]


def test_causes() -> None:
    """Each reason in the package has the name of a rule or of a known cause, and the report's page has those causes."""
    named = [
        node.args[0]
        for path in Path(breakable_backend.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Reason"
    ]
    told = {cause.value for cause in named if isinstance(cause, ast.Constant)}
    told |= {getattr(program, cause.id) for cause in named if isinstance(cause, ast.Name)}
    assert told == {*program.CAUSES, "marked"}
    row = re.search(r"^\| `rule` \| (.*) \|$", PAGES["report"], re.MULTILINE)
    assert row is not None
    assert re.findall(r"`(\w+)`", row[1]) == list(program.CAUSES)


def literal(text: str) -> Any:
    """The value that ``text`` is written for; the text itself if it only describes values."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


@pytest.mark.parametrize("option", dataclasses.fields(Options), ids=lambda option: option.name)
def test_table_of_options(option: dataclasses.Field[Any]) -> None:
    """The README's table has each option, in their order, with its default first and then its other values."""
    table = README.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    assert list(rows) == [each.name for each in dataclasses.fields(Options)]
    told = [literal(text) for text in re.findall(r"`([^`]+)`", rows[option.name])]
    choices = option.metadata.get("choices", ())
    assert told[1 : len(choices)] == [value for value in choices if value != option.default]
    assert told[:1] == [option.default] or not told


def test_limits_page() -> None:
    """Each limit has its line, with its value."""
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d.]+)", PAGES["semantics"], re.MULTILINE))
    everything = {
        **vars(executor),
        **vars(eviction),
        **vars(retries),
        **vars(pool_size),
        "KEPT_INPUT": copies.KEPT_INPUT,
        "LARGE": large_results.LARGE,
        "HEADROOM": cuda.HEADROOM,
        "MAX_SLOTS": slots.MAX_SLOTS,
        "MAX_PATTERNS": training.MAX_PATTERNS,
        "MAX_SIZES": training_by_size.MAX_SIZES,
        "UNUSED": first_backwards.UNUSED,
    }
    limits = {name: value for name, value in everything.items() if name.isupper() and isinstance(value, int | float)}
    assert {name: float(value) for name, value in rows.items()} == limits


RECORDS = (
    *(report.Report, report.ProgramReport, report.RecordingReport, report.StepReport, report.BridgeReport),
    *(program.Op, program.Reason),
    *(verdict.Measured, timing.StepTime, verdict.BreakCost, verdict.Advice),
    EagerGraph,
)


def test_report_page() -> None:
    """Each record of a report has its heading, and each field its line, those that ``to_dict`` adds included."""
    tables = dict(re.findall(r"^### `(\w+)`\n\n(.*?)(?=\n\n|\Z)", PAGES["report"], re.MULTILINE | re.DOTALL))
    assert list(tables) == [record.__name__ for record in RECORDS]
    for record in RECORDS:
        cells = re.findall(r"^\| (`.*?) \|", tables[record.__name__], re.MULTILINE)
        fields = {field.name for field in dataclasses.fields(record)} | set(report.SHOWN.get(record, ()))
        assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == fields, record.__name__


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    """Each file that a page links to is there."""
    for target in re.findall(r"\]\(([^):#]+)[)#]", PAGES[name]):
        assert (DOCS / target).is_file(), target
