"""Faults of this package that come up while it works: told as such, and never as PyTorch's or the user's.

Nothing of this runs while all is well.
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
"""What has a meaning of its own, wherever it comes up."""
FIX = (
    "that is a fault of the package breakable_backend, and not of PyTorch: please report it there, with the traceback. "
    "Until it is mended, run this function uncompiled or with backend='eager'"
)


def internal(error: Exception, log: logging.Logger) -> InternalError:
    """What ``error``, a fault of this package, is told as."""
    log.error("this is a fault of breakable_backend", exc_info=error)
    return InternalError(
        f"breakable_cg failed internally with {type(error).__name__}: {without_advice(str(error))}",
        original=error,
        fix=FIX,
    )


def raise_if_ours(error: Exception, log: logging.Logger) -> None:
    """Raise an error of a call, in which the user's code runs too, as a fault of this package, if it is one.

    Raises:
        InternalError: it is.
    """
    if not (isinstance(error, _OF_ITS_OWN) or _torch.is_dynamos(error)) and is_ours(error):
        told = internal(error, log)
        raise told from error


def is_ours(error: BaseException) -> bool:
    """Whether an error came up in the code of this package, or in what that called of torch's or Python's.

    Wherever this package passes on ``*args`` it calls what others wrote, be it a function without a frame; so does the
    code that it generates.
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
    """Whether an error came up in generated code itself, in a launch or a copy without a frame. An eager op has one of torch's."""
    innermost = [frame.f_code.co_filename for frame, _ in _frames(error.__traceback__)][-1:]
    return any(file.startswith("<breakable_cg") for file in innermost)


def _frames(entry: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while entry is not None:
        yield entry.tb_frame, entry.tb_lasti
        entry = entry.tb_next
