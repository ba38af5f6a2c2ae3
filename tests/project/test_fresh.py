"""Programs in forks of a process that has torch run and end as those of ``python -c``."""

from __future__ import annotations

import subprocess

import pytest

import fresh


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; print('out'); print('error', file=sys.stderr)", (0, "out\n", "error\n")),
        ("import sys; print(sys.argv, __name__); sys.exit(3)", (3, "['-c'] __main__\n", "")),
        ("import sys; sys.exit('why')", (1, "", "why\n")),
        ("import sys; print('breakable_backend' in sys.modules)", (0, "False\n", "")),
        ("import atexit; atexit.register(print, 'at exit')", (0, "at exit\n", "")),
        (
            "import threading, time; threading.Thread(target=lambda: time.sleep(0.2) or print('thread')).start()",
            (0, "thread\n", ""),
        ),
        ("import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'finalizer')", (0, "finalizer\n", "")),
        ("class A:\n    def __del__(self): print('deleted')\na = A(); a.itself = a", (0, "deleted\n", "")),
        ("import os; os.abort()", (-6, "", "")),
    ],
    ids=["output", "code", "message", "imports", "atexit", "thread", "finalizer", "globals", "signal"],
)
def test_ends_as_python_does(code: str, expected: tuple[int, str, str]) -> None:
    """Its exit code, its output and its errors are those of the program, to the end of the interpreter."""
    ended = fresh.python(code)
    assert (ended.returncode, ended.stdout, ended.stderr) == expected


def test_an_error_is_shown() -> None:
    """What a program raises is in its errors, and the exit code is 1."""
    ended = fresh.python("def f(): raise KeyError('here')\nf()")
    assert ended.returncode == 1
    assert "in f\nKeyError: 'here'\n" in ended.stderr


def test_a_program_that_hangs_is_killed() -> None:
    """After the limit it is killed, which is an error."""
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.python("import time; time.sleep(60)", limit=0.5)
