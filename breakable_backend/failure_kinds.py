"""Which kind of failure an error is: one that passes, one that lasts, or the loss of the device.

A failure that passes is recognised by its type and by CUDA's error number, and by its text where torch raises a plain
``RuntimeError`` (texts checked on torch 2.11 to 2.15).
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
"""``cudaErrorStreamCaptureInvalidated``: the capture was invalid before the call that reports it. A synchronisation in
another thread does that, and so does an op whose library hides the error."""
_DISTURBED = (
    "due to a previous error during capture",
    "for a CUDA generator not in capture mode",  # somebody else's capture has ended, and the generator has left capture mode
    "Offset increment outside graph capture",
    "cudaStreamCaptureStatusInvalidated",  # torch's allocator has asked about the capture
    "status == cudaStreamCaptureStatus::cudaStreamCaptureStatusActive",  # so has torch, right after it began
    "_STATUS_ALLOC_FAILED",  # a library had no memory, or asked for memory where a capture forbids it
)
_HIDDEN = "_STATUS_EXECUTION_FAILED"
"""What a library reports of a launch that CUDA has refused. It does not say why: the capture may have been invalid
before."""
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
"""CUDA's names of the errors after which a device is lost to the process."""


def passing(error: BaseException) -> Passing:
    """What was in the way, if the same may succeed later; empty if it will fail again."""
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
    # An op may raise its own exception if memory runs out in it.
    return passing(error.__cause__) if error.__cause__ is not None else ""


def as_passing(told: E, error: BaseException) -> E:
    """``told``, marked as passing if ``error`` is."""
    told.passing = passing(error)
    return told


def is_device_error(error: BaseException) -> bool:
    """Whether ``error`` says that the device is lost."""
    ours = isinstance(error, ReplayError) and error.what.startswith("cudaGraphLaunch failed")
    if not ours and not isinstance(error, torch.AcceleratorError):
        return False
    # Only the first line: in later lines torch advises on "device-side assertions", whatever the error is.
    return any(text in message(error) for text in _LOST)
