"""Processes for tests that start in a moment: forks of one that has ``preloaded``, but not the package.

A new Python needs three seconds of a core to import torch with Dynamo.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent


def process(
    target: Callable[..., None], *args: Any, output: Path, error: Path | None = None, forked: bool = True
) -> Any:
    """A process that calls ``target``, not started yet: with the environment, the folder and the path of this one.

    Args:
        target: a function of a module.
        args: what it is called with; they are pickled.
        output: the file that it writes to.
        error: the file for its errors, by default the same.
        forked: False where it uses CUDA, which does not survive a fork: it imports torch by itself.
    """
    context = _forking() if forked else multiprocessing.get_context("spawn")
    files = [str(output), str(error or output)]
    return context.Process(target=_call, args=(files, os.getcwd(), dict(os.environ), target, args))


def python(code: str, limit: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as ``python -c`` does, to the end of the interpreter. The package is not imported yet.

    Where there is a GPU it is a new Python.

    Raises:
        subprocess.TimeoutExpired: it takes more than ``limit`` seconds.
    """
    if torch.cuda.is_available():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit)
    with tempfile.TemporaryDirectory() as folder:
        output, error = Path(folder, "output"), Path(folder, "error")
        child = process(_program, code, output=output, error=error)
        child.start()
        child.join(limit)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(code, limit, output.read_bytes(), error.read_bytes())
        return subprocess.CompletedProcess(
            code, child.exitcode, output.read_text(encoding="utf-8"), error.read_text(encoding="utf-8")
        )


def _forking() -> Any:
    """The way to make processes by a fork of one that has ``preloaded``, which it finds by the environment alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _call(
    files: list[str], folder: str, environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()  # what was imported before the fork is not garbage, and is much to look through
    target(*args)


def _program(code: str) -> None:
    sys.argv[:] = ["-c"]
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined] # from Python 3.13 on a fork forgets it
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    status: object = 0  # what is raised is shown by multiprocessing, which ends the process with 1
    try:
        exec(compile(code, "<string>", "exec"), vars(main))
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        status = ended.code or 0
    del main
    if "triton" in sys.modules:
        gc.unfreeze()  # else what it has left is told as leaks; without it, freeing all of torch would take a second
    ctypes.pythonapi.Py_Exit(status)  # threads, atexit, modules: multiprocessing would leave without them
