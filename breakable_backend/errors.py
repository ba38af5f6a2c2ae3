"""Every error that this package raises on purpose.

::

    BreakableError                the base class
    ├── OptionsError              an option, a mark or a driver that is not valid (also a ValueError)
    ├── PartitionError            a graph that cannot be cut into segments as asked
    ├── CaptureError              a segment, or a call, that cannot be captured
    ├── BindError                 a function that cannot be bound
    ├── ReplayError               a call that does not fit what was recorded
    │   ├── EagerOutputError      an eager step returned something else than it was recorded with
    │   └── DivergenceError       a replay that differs from eager, or would
    └── InternalError             a fault of this package itself

Each message says what went wrong, where (the user's source line, if there is one) and what to do about it. An exception
of the user's own eager function is never wrapped: it reaches the caller as the same object.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Literal

from breakable_backend import _torch, files

Passing = Literal["", "memory", "busy", "disturbed"]
"""What made a capture fail, if that may pass: memory ran out; somebody else held what it needs; something invalidated
it, most likely another thread. Empty: the same will fail again."""


class BreakableError(_torch.CompileTimeError):
    """Base class of all errors of this package. It is never raised itself.

    Args:
        what: what went wrong, in one sentence.
        where: the user's source line, as ``file.py:12 in forward: code``; by default the innermost line of the user's
            that runs now.
        fix: what to do about it; empty if nothing can be done.
    """

    passing: Passing = ""
    """What was in the way, if the same may succeed later; otherwise empty."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, files.short_line(where) or user_line(), fix
        self.blamed = where
        """The line that is to blame; empty if ``where`` is only the line that was running."""
        super().__init__(
            "\n".join(
                line for line in (what, f"  at {self.where}" if self.where else "", f"  {fix}" if fix else "") if line
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, also in another process, keep the text and the attributes; the error is not built anew."""
        return _remade, (type(self), self.args, vars(self).copy())


def _remade(kind: type[BreakableError], args: tuple[Any, ...], attributes: dict[str, Any]) -> BreakableError:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class OptionsError(BreakableError, ValueError):
    """An option, a mark or a driver that is not valid, an op name that is unknown, or nothing to export.

    Options are checked in the first call of a compiled function, and marks where they are made. Also a ``ValueError``.
    """


class PartitionError(BreakableError):
    """A graph that cannot be cut into segments as asked. Raised while compiling."""


class CaptureError(BreakableError):
    """A segment that cannot be captured, or a call where its eager steps cannot run.

    With ``auto_break=True`` (the default) an op that cannot be captured runs eagerly instead, and the report says so.
    Then only a call inside somebody else's capture raises this error.
    """


class BindError(BreakableError):
    """A compiled function that cannot be bound: its call is not one captured graph, or Python code runs around the graph."""


class ReplayError(BreakableError):
    """A call that does not fit what was recorded or bound: another device, dtype or shape, or memory that was freed."""


class EagerOutputError(ReplayError):
    """An eager step returned a result of another shape, stride, dtype or device than it was recorded with.

    The usual cause is a fake implementation (``register_fake``) that does not match the real one.
    """


_NOT_FILES = ("<breakable_cg", "<eval_with_key>", "<string>", "<frozen")


def user_line(trace: TracebackType | None = None) -> str:
    """The innermost line of the user's, as ``file.py:12 in forward: code``, in a traceback or in what runs now."""
    return next((_line(*frame) for frame in _frames(trace) if _is_users(frame[0])), "")


def warn_user(text: str) -> None:
    """Warn at the user's innermost running line. A number of frames cannot lead there: Dynamo's are in between."""
    for file, line, _ in _frames(None):
        if _is_users(file):
            warnings.warn_explicit(text, UserWarning, file, line)
            return
    warnings.warn(text, stacklevel=2)


def shown(value: Any) -> str:
    """``value`` as the text of an error shows it: a tensor by its class and shape, anything else by its first line."""
    if (shape := getattr(value, "shape", None)) is not None and not isinstance(value, type):
        return f"a {type(value).__name__} of shape {list(shape)}"
    first, *more = repr(value).splitlines() or [""]
    return f"{first} ..." if more else first


def optimizer_runs() -> bool:
    """Whether a step of an optimizer of ``torch.optim`` is running in this thread."""
    folder = os.path.join(files.TORCH, "optim", "")
    return any(name == "step" and file.startswith(folder) for file, _, name in _frames(None))


def _is_users(file: str) -> bool:
    return not (file.startswith(_NOT_FILES) or files.is_library(file))


def defined_at(function: Any) -> str:
    """The line on which a Python function, behind its wrappers, begins, in the same form; empty for other callables."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return _line(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else ""


def message(error: BaseException) -> str:
    """The first line of an error's text; empty if it has none."""
    return without_advice((str(error).strip().splitlines() or [""])[0])


def first_line(error: BaseException) -> str:
    """The class and the first line of an error: ``ValueError: too small``."""
    return f"{type(error).__name__}: {message(error)}"


def without_advice(text: str) -> str:
    """The text without PyTorch's advice to report a bug to PyTorch."""
    return re.sub(r",? ?please report a bug to PyTorch\.?", "", text)


def _line(file: str, line: int, function: str) -> str:
    code = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}:{line} in {function}" + (f": {code}" if code else "")


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, int, str]]:
    if trace is not None:
        for frame, line in reversed(list(traceback.walk_tb(trace))):
            yield frame.f_code.co_filename, line, frame.f_code.co_name
        return
    running: FrameType | None = sys._getframe(1)
    while running is not None:
        yield running.f_code.co_filename, running.f_lineno, running.f_code.co_name
        running = running.f_back


class DivergenceError(ReplayError):
    """A replay that differs from eager, found by ``debug="compare"``; or memory that is not at its recorded address.

    The addresses are checked at the first replay of every recording, in all modes. Each argument is also an attribute,
    for tools.

    Args:
        what: which value differs, by how much, and what that looks like.
        where: the user's line that made the value.
        fix: what to do about the cause.
        cause: one of :data:`CAUSES`.
        step: position of the step in the recording; -1 for a result, after all steps.
        kind: ``"captured"``, ``"eager"``, ``"result"``, or ``"saved"`` for what a forward saved for its backward.
        op: the op that made the first wrong value, or the op that is to blame for it.
        value: the name of the value in the program; for a value inside a segment, the op that made it.
        difference: how far off the value is; None if only an address is wrong.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        fix: str = "",
        cause: str = "unknown",
        step: int = -1,
        kind: str = "result",
        op: str = "",
        value: str = "",
        difference: Any = None,
    ) -> None:
        assert cause in CAUSES, cause
        self.cause, self.step, self.kind, self.op, self.value = cause, step, kind, op, value
        self.difference = difference
        super().__init__(what, where=where, fix=fix)


class InternalError(BreakableError):
    """A fault of this package itself, and not of PyTorch or of the user's code.

    Args:
        what: as for all errors, and so are ``where`` and ``fix``.
        original: the exception, with its traceback. It is an attribute, since Dynamo removes the cause of an error.
    """

    def __init__(self, what: str, *, original: Exception, where: str = "", fix: str = "") -> None:
        self.original = original
        super().__init__(what, where=where, fix=fix)


CAUSES = {
    "stale bridge": "declare what the op writes (mutates_args); if nothing writes it, this is a bug of this package",
    "address moved": "keep the tensor, and write new values into it in place (copy_), or pass it as an argument",
    "frozen scalar": "pass the number as an argument of the compiled function, or let the op run eagerly: mark_eager",
    "race between streams": "join the side stream before the function returns: current_stream().wait_stream(side)",
    "an op that keeps its buffers": "have it store a clone() of what it gets, and return new memory at each call",
    "a nondeterministic op": "make it deterministic, or compare with a tolerance: options={'tolerance': (rtol, atol)}",
    "work outside of the capture": "let the op run eagerly (mark_eager), or have it work on the current stream alone",
    "unknown": "replay with debug='eager': what is right there is wrong in the capture, the rest in the path around it",
}
"""The likely causes of a divergence, each with its remedy."""
