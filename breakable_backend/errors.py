"""Every error this package raises on purpose.

::

    BreakableError                what all of them are
    ├── OptionsError              an option, a mark or a driver that cannot be (also a ValueError)
    ├── PartitionError            a graph that cannot be cut into segments as asked
    ├── CaptureError              a segment, or a call, that cannot be captured
    └── ReplayError               a call that does not fit what was recorded
        └── EagerOutputError      an eager step returned something else than it was recorded with

Each message says what went wrong, where (the user's own source line, when there is one) and what to do about it.
An error raised by the user's own eager function is never wrapped: it reaches the caller as the same object.
"""

from __future__ import annotations

from breakable_backend import _torch


class BreakableError(_torch.CompileTimeError):
    """Base of all errors of this package.

    Parameters are keyword-only but for the first.

    Args:
        what: what went wrong, one sentence.
        where: the user's source line, as ``file.py:12 in forward: code``; empty if there is none.
        fix: what to do about it; empty if there is nothing to do.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(
            "\n".join(line for line in (what, f"  at {where}" if where else "", f"  {fix}" if fix else "") if line)
        )


class OptionsError(BreakableError, ValueError):
    """An unknown option, a value that is not allowed, a name that is no op, a driver that this machine lacks, or nothing to export.

    Raised when options are read (the first call of a compiled function) or when a mark is made.
    """


class PartitionError(BreakableError):
    """A graph that cannot be cut into segments as asked. Raised while compiling."""


class CaptureError(BreakableError):
    """A segment that cannot be captured, or a call made where its eager steps cannot run.

    With ``auto_break=True`` (the default) a segment that cannot be captured runs eagerly instead, and the report
    says so; the error then only reaches callers inside somebody else's capture.
    """


class ReplayError(BreakableError):
    """A call that does not fit what was recorded: another device, dtype or shape than the graph was compiled for."""


class EagerOutputError(ReplayError):
    """An eager step returned another shape, stride, dtype or device than it was recorded with.

    The usual cause is a fake implementation (``register_fake``) that does not match the real one.
    """
