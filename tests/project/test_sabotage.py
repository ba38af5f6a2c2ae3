"""Each fault of ``sabotage.py`` turns its test red, and without a fault the same tests are green."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sabotage import FAULTS, OPTIONS, ROOT, TIMEOUT, Fault, copy_to, path_of, planted, run
from warm import Warm, changes_between

BROKEN = re.compile(r"^E +(?:\w+\.)*(ImportError|ModuleNotFoundError|SyntaxError|NameError|UnboundLocalError)\b", re.M)
"""Errors that tell of a fault which is badly made: it would turn any test red."""

PARTS = 6
"""Of the tests without a fault, so that several workers of pytest's can share them."""


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests, in which one fault after the other is planted."""
    root = tmp_path_factory.mktemp("copy")
    copy_to(root)
    return root


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that has collected the files of all faults' tests."""
    with Warm(sorted({path_of(fault.test) for fault in FAULTS}), OPTIONS, tmp_path_factory.mktemp("warm")) as warm:
        yield warm


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.gpu] if f.gpu else [], id=f.name) for f in FAULTS]
)
def test_fault_is_noticed(fault: Fault, request: pytest.FixtureRequest) -> None:
    """The named test fails by its own assertions, not because the package cannot be imported."""
    if torch.__version__ < fault.since:  # a TorchVersion, which compares as versions do
        pytest.skip(f"makes a difference from torch {fault.since} on")
    if fault.changes is not None:
        code, output = request.getfixturevalue("warm").run([fault.test], TIMEOUT, fault.changes)
        assert code, (
            f"{fault.name}: unnoticed. If the test starts a process or reads the package, set anew=True.\n{output}"
        )
    else:
        copy = request.getfixturevalue("copy")
        with planted(copy, fault.file, fault.source()):
            code, output = run(copy, [fault.test], gpu=fault.gpu)
    assert code == 1, output
    assert re.search(
        r"^(1 failed|1 passed.* 1 error)", output, re.M
    )  # an error: what a fixture asserts afterwards, output
    assert not BROKEN.search(output), output


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_green_without_a_fault(part: int, warm: Warm) -> None:
    """Where faults change functions, all the named tests pass without a fault: red means the fault."""
    tests = sorted({fault.test for fault in FAULTS if fault.changes is not None})[part::PARTS]
    code, output = warm.run(tests, TIMEOUT)
    assert code == 0, output
    assert re.search(rf"^{len(tests)} passed(, \d+ skipped)? in", output, re.M), output  # files count as skipped


@pytest.mark.faults
@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def test_a_copy_is_green_without_a_fault(gpu: bool, tmp_path: Path) -> None:
    """So do they in a copy, laid out as faults leave modules."""
    faults = [fault for fault in FAULTS if fault.changes is None and fault.gpu == gpu]
    copy_to(tmp_path)
    for file in {fault.file for fault in faults}:
        (tmp_path / file).write_text(ast.unparse(_parsed(file)), encoding="utf-8")
    tests = sorted({fault.test for fault in faults})
    code, output = run(tmp_path, tests, gpu=gpu)
    assert code == 0, output
    assert re.search(rf"^{len(tests)} passed in", output, re.M), output


def test_faults_fit() -> None:
    """Each fault, those for a GPU too, has its place in the package of today, once, and a file of tests; names differ."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert all((ROOT / path_of(fault.test)).is_file() for fault in FAULTS)
    trees = {file: _parsed(file) for file in {fault.file for fault in FAULTS}}
    for fault in FAULTS:
        fault.place(trees[fault.file])


def test_each_fault_names_one_test(warm: Warm) -> None:
    """No fault names a test that is not there, or one that has parameters without naming them."""
    missing = {fault.test for fault in FAULTS} - warm.tests
    assert {test for test in missing if test.partition("::")[0] not in warm.skipped} == set()


def _parsed(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


CODE = """
import this

if True:
    TABLE = {"a": 1, "b": (f(1),)}

class A:
    def f(self):
        with self.lock:
            a = [1,
                 2]  # a comment
            del a
        return "x" "y"

    def f(self):  # the name's last definition counts
        pass
    def g(self):
        def f(x=None):
            x.a()
            x.b()
            x.a()
            return (x
                    if x else None)
"""


@pytest.mark.parametrize(
    ("where", "old", "new", "expected"),
    [
        ("", "import this", "import that", "import that"),
        ("TABLE", "f(1)", "g(1)", "(g(1),)"),
        ("TABLE", "(f(1),)", "()", "'b': ()"),
        ("A.g.f", "x if x else None", "x", "return x"),
        ("A.g.f", "x.b()\nx.a()", "pass", "x.a()\n            pass\n"),
        ("A.g", "x.b()", "pass", "x.a()\n            pass\n            x.a()"),
        ("A.g", "x.b()", "x.c()", "x.c()\n"),
        ("A.g", "x.b", "y.b", "y.b()\n"),
        ("A", "a = [1, 2]\ndel a", "a = [1]", "a = [1]\n        return"),
        ("A", "'xy'", "'yx'", "return 'yx'"),
        ("A.f", "pass", "return", "return"),
    ],
)
def test_code_is_found_by_its_syntax(where: str, old: str, new: str, expected: str) -> None:
    """A fault finds its code in the definition that it names, however the code is laid out."""
    tree = Fault("", f"module:{where}", old, new, "").put_into(ast.parse(CODE))
    assert expected in ast.unparse(tree)


@pytest.mark.parametrize(
    ("where", "old", "times"), [("A.g.f", "x.a()", 2), ("A.f", "del a", 0), ("A.g", "None", 2), ("A", "(1, 2)", 0)]
)
def test_code_is_there_once(where: str, old: str, times: int) -> None:
    """A fault whose code is not there, or is there several times, does not fit."""
    with pytest.raises(AssertionError, match=f"^name: {re.escape(repr(old))} is {times} times in module:{where}"):
        Fault("name", f"module:{where}", old, "0", "").place(ast.parse(CODE))


MODULE = """
TABLE = {"a": 1}

def outer(x, y=1):
    def inner():
        return x + 1
    return inner

class A:
    size = 3

    @property
    def f(self):
        return self.size
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("x + 1", "x - 1", ["outer", "inner"]),
        ("x + 1", "1", ["outer"]),
        ("return inner", "return other", ["outer"]),
        ("self.size", "self.site", ["f"]),
        ("y=1", "y=2", None),
        ("size = 3", "size = 4", None),
        ("@property", "@classmethod", None),
        ('"a": 1', '"a": 2', None),
    ],
)
def test_which_functions_change(old: str, new: str, expected: list[str] | None, tmp_path: Path) -> None:
    """A fault inside of functions is one of their code; what else it changes has to be imported."""
    file = tmp_path / "module.py"
    file.write_text(MODULE, encoding="utf-8")
    changes = changes_between(file, ast.parse(MODULE.replace(old, new)))
    assert (changes and [code.co_name for code, _ in changes]) == expected


def test_a_run_that_hangs_is_ended(warm: Warm) -> None:
    """Tests that take too long are killed, and the process that has collected them goes on."""
    some = sorted(fault.test for fault in FAULTS if fault.changes is not None)[0]
    assert warm.run([some], 0.0)[0] is None
    assert warm.run([some], TIMEOUT)[0] == 0
