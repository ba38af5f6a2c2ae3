"""Runs tests in forks of a process that has collected them, each with a fault in the functions of the package.

Such a run starts and imports nothing. The process is a session of pytest's that has imported torch, the package and the
tests, and waits for requests where pytest would run the tests. For each request it makes a fork. The fork changes the
code of the functions that a fault is in, and goes on with the session: it runs the tests that the request names.

What runs on import has run before, without the fault. So the fault is not in the tables of the package, in the processes
that a test starts, or in the files of the package that a test reads.
"""

from __future__ import annotations

import ast
import gc
import marshal
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from inspect import CO_OPTIMIZED
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
START = 300.0
"""Seconds that the collection may take, or a fork."""

Changes = Sequence[tuple[CodeType, CodeType]]
"""The code of functions, and what takes its place."""


class Warm:
    """The process, for the one that started it. It ends with the ``with`` statement."""

    def __init__(self, files: Iterable[Path], options: Iterable[str], folder: Path) -> None:
        """Collect ``files`` with ``options`` of pytest's. The tests write to ``folder``."""
        self._output = folder / "output.txt"
        self._answers, its = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        # CUDA does not survive a fork.
        environment = os.environ | {
            "PYTHONPATH": path,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment.pop("PYTEST_ADDOPTS", None)
        arguments = [*options, "--capture=sys", f"--basetemp={folder / 'temporary'}", *map(str, files)]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "import warm; warm.serve()", str(its.fileno()), *arguments],
                cwd=ROOT,
                env=environment,
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        its.close()
        collected = self._answer(START)
        assert collected is not None, self._output.read_text(encoding="utf-8")
        self.tests = frozenset[str](collected[0])
        """The ids of the tests, without the folders that their files lie in."""
        self.skipped = frozenset[str](collected[1])
        """The names of the files that are skipped as a whole."""

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *exception: object) -> None:
        self._answers.close()
        self._process.wait(60)

    def run(self, tests: Iterable[str], limit: float, changes: Changes = ()) -> tuple[int | None, str]:
        """Run ``tests`` with ``changes`` in the package; returns pytest's exit code, and its output.

        The code is None if they ran for more than ``limit`` seconds.
        """
        self._answers.send((list(tests), marshal.dumps(list(changes)), str(self._output)))
        fork = self._answer(START)
        assert fork is not None, "the process that has collected the tests has ended"
        ended = self._answer(limit)
        if ended is None:
            os.killpg(fork, signal.SIGKILL)
            self._answer(START)
        return ended, self._output.read_text(encoding="utf-8")

    def _answer(self, limit: float) -> Any:
        """What the process says next. None: it says nothing for ``limit`` seconds, or has ended."""
        try:
            return self._answers.recv() if self._answers.poll(limit) else None
        except EOFError:
            return None


def serve() -> None:
    """What the process does: a session of pytest's."""
    _, answers, *arguments = sys.argv
    code = pytest.main(arguments, plugins=[_Forks(Connection(int(answers)))])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # for a fork, Python's end would be the most of its work: it touches all that is shared


class _Forks:
    """A plugin that waits for requests where pytest would run the tests. A fork runs those of its request."""

    def __init__(self, answers: Connection) -> None:
        self._answers = answers
        self._skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._skipped.append(Path(report.nodeid).name)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # a file cannot be imported: pytest ends with that
        items = {f"{item.path.name}{item.nodeid[item.nodeid.index('::') :]}": item for item in session.items}
        functions = _functions_below(ROOT)
        self._answers.send((list(items), self._skipped))
        while True:
            try:
                tests, changes, output = self._answers.recv()
            except EOFError:
                return True
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                self._answers.close()
                os.setpgid(0, 0)  # the processes that tests start are killed with this one
                file = os.open(output, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                _plant(functions, marshal.loads(changes))
                session.items[:] = [items[test] for test in tests]
                session.testscollected = len(session.items)
                return None  # pytest runs them, and ends
            os.setpgid(pid, pid)  # here too, since the fork may not have begun when it is to be killed
            self._answers.send(pid)
            _, status = os.waitpid(pid, 0)
            self._answers.send(os.waitstatus_to_exitcode(status))


def _functions_below(folder: Path) -> list[FunctionType]:
    """All functions whose code lies in a file below ``folder``."""
    gc.unfreeze()  # the collector does not tell of frozen objects
    every = [thing for thing in gc.get_objects() if type(thing) is FunctionType]
    gc.collect()
    gc.freeze()
    return [function for function in every if function.__code__.co_filename.startswith(f"{folder}{os.sep}")]


def _plant(functions: Sequence[FunctionType], changes: Changes) -> None:
    """Change the code of those ``functions`` that have it."""
    changed = 0
    for old, new in changes:
        for function in functions:
            code = function.__code__
            if code == old and code.co_filename == old.co_filename:
                function.__code__ = new
                changed += 1
    assert changed or not changes, f"no function has the code of {changes[0][0]}"


def changes_between(file: Path, tree: ast.Module) -> Changes | None:
    """The functions of the module ``file`` that are others in its changed ``tree``, inner ones too.

    None: other things are changed, such as a default value, a decorator, a base class, a table.
    """
    old, new = (compile(source, str(file), "exec", dont_inherit=True) for source in (file.read_bytes(), tree))
    try:
        return list(_changes(old, new))
    except ValueError:
        return None


def _changes(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    if old == new:
        return
    if old.co_flags & CO_OPTIMIZED:  # of a function
        if old.co_freevars == new.co_freevars:  # else an inner one, which the outer one makes
            yield old, new
    elif _outside_of_functions(old) != _outside_of_functions(new):
        raise ValueError("a module or a class is another")
    olds, news = _inner(old), _inner(new)
    if len(olds) == len(news):  # else inner functions were made or taken away: those of a changed function
        for pair in zip(olds, news, strict=True):
            yield from _changes(*pair)


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _outside_of_functions(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple("code" if isinstance(c, CodeType) else c for c in code.co_consts))
