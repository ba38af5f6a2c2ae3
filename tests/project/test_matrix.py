"""The torches and Pythons that are supported: said once in the Makefile, and told by the README and pyproject.toml."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import matrix

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def variable(name: str) -> list[str]:
    found = re.search(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)
    assert found is not None
    return " ".join(variable(word[2:-1])[0] if word.startswith("$(") else word for word in found[1].split()).split()


def pin() -> str:
    found = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_the_readme_has_a_row_for_each_torch() -> None:
    """The README's table has the pin and the torches of the Makefile in order, and each cell says a date or ``not tested``."""
    table = re.findall(r"^\| (2\.\d+\.\d+)\b[^|]*\|([^|]*)\|([^|]*)\|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert [row[0] for row in table] == sorted([*variable("TORCHES"), pin()], key=numbers)
    assert max(variable("TORCHES"), key=numbers) == variable("NEWEST")[0]
    for cell in (cell for _, *cells in table for cell in cells):
        assert cell.strip() == "not tested" or re.search(r"\d{4}-\d\d-\d\d, Python 3\.\d+: [\d,]+ passed", cell), cell


def test_pyproject_says_the_same() -> None:
    """The oldest torch is the requirement's bound, and each Python of the Makefile has its classifier."""
    (bound,) = (line.removeprefix("torch>=") for line in PROJECT["dependencies"] if line.startswith("torch>="))
    assert min([*variable("TORCHES"), pin()], key=numbers).startswith(f"{bound}.")
    said = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")]
    assert said == ["3", *variable("PYTHONS")]
    assert PROJECT["requires-python"] == f">={variable('PYTHONS')[0]}"


def test_the_core_is_there() -> None:
    """Each file of the core of the suite is a file of the suite."""
    assert [path.stem for path in map(Path, matrix.files(matrix.CORE))] == matrix.CORE


def test_a_python_that_is_missing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing interpreter is a row that says so; it is no failure, and where nothing else ran there is no success."""
    monkeypatched = ["matrix.py", "2.15.0", "--pythons", "3.999"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", monkeypatched)
        assert matrix.main() == 1
    assert "2.15.0  3.999   not tested: no Python 3.999 here  not tested\n" in capsys.readouterr().out


@pytest.mark.parametrize(("newer", "code"), [(True, 0), (False, 1)])
def test_a_torch_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], newer: bool, code: int
) -> None:
    """Where the newest torch cannot be installed, the newest beyond the pin is run, and the table says both; else it fails."""
    monkeypatch.setattr(matrix, "install", lambda venv, interpreter, torch: newer and torch == "torch>2.13.0")
    monkeypatch.setattr(matrix, "version_in", lambda venv: "2.14.1")
    monkeypatch.setattr(matrix, "test", lambda venv, torch, python, core: matrix.Row(torch, python, "9 passed"))
    monkeypatch.setattr(sys, "argv", ["matrix.py", "2.15.0", "--core", "--or-newer-than", "2.13.0"])
    assert matrix.main() == code
    out = capsys.readouterr().out
    assert re.search(r"^2\.15\.0 .* NOT TESTED: it could not be installed", out, re.MULTILINE)
    assert bool(re.search(r"^2\.14\.1 .* 9 passed", out, re.MULTILINE)) == newer


def test_what_fails_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A red suite on one torch is a failure of the whole."""
    monkeypatch.setattr(matrix, "install", lambda venv, interpreter, torch: True)
    rows = iter([matrix.Row("2.11.0", "3.11", "9 passed"), matrix.Row("2.15.0", "3.11", "1 failed", good=False)])
    monkeypatch.setattr(matrix, "test", lambda venv, torch, python, core: next(rows))
    monkeypatch.setattr(sys, "argv", ["matrix.py", "2.11.0", "2.15.0"])
    assert matrix.main() == 1
