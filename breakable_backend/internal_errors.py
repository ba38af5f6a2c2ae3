"""Faults of this package, raised as such and never as faults of PyTorch or of the user.

Nothing in here runs unless something has failed.
"""

from __future__ import annotations

import dis
import logging
from collections.abc import Iterator
from types import FrameType, TracebackType

import torch

from breakable_backend import _torch, files
from breakable_backend.errors import BreakableError, InternalError, without_advice

_OF_ITS_OWN = (
    *(BreakableError, Warning),
    *(torch.AcceleratorError, torch.cuda.CudaError, torch.OutOfMemoryError, MemoryError, RecursionError),
)
"""Exceptions that have a meaning of their own, wherever they are raised."""
FIX = (
    "that is a fault of the package breakable_backend, and not of PyTorch: please report it there, with the traceback. "
    "Until it is mended, run this function uncompiled or with backend='eager'"
)


def internal(error: Exception, log: logging.Logger) -> InternalError:
    """The :class:`InternalError` for ``error``, a fault of this package."""
    log.error("this is a fault of breakable_backend", exc_info=error)
    return InternalError(
        f"breakable_cg failed internally with {type(error).__name__}: {without_advice(str(error))}",
        original=error,
        fix=FIX,
    )


def raise_if_ours(error: Exception, log: logging.Logger) -> None:
    """Raise the exception of a call as a fault of this package, if it is one. The user's code runs in a call too.

    Raises:
        InternalError: it is a fault of this package.
    """
    if not (isinstance(error, _OF_ITS_OWN) or _torch.is_dynamos(error)) and is_ours(error):
        told = internal(error, log)
        raise told from error


def is_ours(error: BaseException) -> bool:
    """Whether an exception comes from the code of this package, or from PyTorch or Python code that this package called.

    Where this package passes on ``*args`` it calls code of others, which may be a builtin without a frame. So does
    generated code.
    """
    calls_others = "CALL_FUNCTION_EX"
    for frame, instruction in reversed(list(_frames(error.__traceback__))):
        file = frame.f_code.co_filename
        if file.startswith(files.PACKAGE):
            return dis.opname[frame.f_code.co_code[instruction]] != calls_others
        if not files.is_library(file):
            return False
    return False


def is_generated(error: BaseException) -> bool:
    """Whether an exception comes from generated code itself (a launch or copy), which has no frame of torch's below it."""
    innermost = [frame.f_code.co_filename for frame, _ in _frames(error.__traceback__)][-1:]
    return any(file.startswith("<breakable_cg") for file in innermost)


def _frames(entry: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while entry is not None:
        yield entry.tb_frame, entry.tb_lasti
        entry = entry.tb_next
