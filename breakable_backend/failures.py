"""What kind of failure an error tells of: one that passes, one that comes again, or the end of the device.

What passes is told by type and by CUDA's number, and by text where torch raises a plain ``RuntimeError`` (texts checked on
torch 2.11 to 2.15).
"""

from __future__ import annotations

import threading
from typing import TypeVar

import torch

from breakable_backend.errors import BreakableError, Passing, ReplayError, message

E = TypeVar("E", bound=BreakableError)

OUT_OF_MEMORY = 2
"""``cudaErrorMemoryAllocation``."""
CAPTURE_INVALIDATED = 901
"""``cudaErrorStreamCaptureInvalidated``: the capture was invalid before the call that says so. Another thread's
synchronisation does that; so does an op whose library hides the error."""
_DISTURBED = (
    "due to a previous error during capture",
    "for a CUDA generator not in capture mode",  # somebody else's capture has ended, and took the generator out of it
    "Offset increment outside graph capture",
    "cudaStreamCaptureStatusInvalidated",  # torch's allocator has looked at the capture
    "status == cudaStreamCaptureStatus::cudaStreamCaptureStatusActive",  # so has torch, right after it began
    "_STATUS_ALLOC_FAILED",  # a library had no memory, or asked for it where a capture forbids that
)
_HIDDEN = "_STATUS_EXECUTION_FAILED"
"""What a library says of a launch that CUDA has refused. Why, it does not say: the capture may have been invalid before."""
_BUSY = ("Only one capture at a time is allowed",)
_LOST = (
    "assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "invalid address space",
    "invalid program counter",
    "unspecified launch failure",
    "launch timed out",
    "stack error",
    "uncorrectable ECC",
)
"""What CUDA calls the errors after which a device is lost to the process."""


def passing(error: BaseException) -> Passing:
    """What was in the way, if that passes and the same may succeed later; empty if the same will fail again."""
    if isinstance(error, BreakableError) and error.passing:
        return error.passing
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory"
    if isinstance(error, RuntimeError) and not isinstance(error, BreakableError):
        number, text = getattr(error, "error_code", None), message(error)
        if number == OUT_OF_MEMORY or text.startswith(("CUDA error: out of memory", "CUDA out of memory")):
            return "memory"
        if number == CAPTURE_INVALIDATED or any(part in text for part in _DISTURBED):
            return "disturbed"
        if _HIDDEN in text and threading.active_count() > 1:
            return "disturbed"
        if any(part in text for part in _BUSY):
            return "busy"
    # What an op says when memory runs out in it may be an error of its own.
    return passing(error.__cause__) if error.__cause__ is not None else ""


def as_passing(told: E, error: BaseException) -> E:
    """``told``, which passes if ``error`` does."""
    told.passing = passing(error)
    return told


def is_device_error(error: BaseException) -> bool:
    """Whether ``error`` says that the device is lost."""
    ours = isinstance(error, ReplayError) and error.what.startswith("cudaGraphLaunch failed")
    if not ours and not isinstance(error, torch.AcceleratorError):
        return False
    # The first line alone: below it torch advises on "device-side assertions", whatever the error is.
    return any(text in message(error) for text in _LOST)
