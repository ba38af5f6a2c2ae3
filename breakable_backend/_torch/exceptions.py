"""Errors of Dynamo's, and errors of ours that Dynamo passes on."""

from __future__ import annotations

import sys
from typing import Any


def dynamo_error() -> type[Exception]:
    """What Dynamo raises to steer itself, such as a request to trace again: never to be caught. Our own errors are among it."""
    from torch._dynamo.exc import TorchDynamoException

    _passed_on_by_dynamo()
    return TorchDynamoException


def is_dynamos(error: Exception) -> bool:
    """Whether ``error`` is such a one."""
    return "torch._dynamo" in sys.modules and isinstance(error, dynamo_error())


class _Error(RuntimeError):
    """What errors are while Dynamo is not loaded."""


class CompileTimeError(_Error):
    """An exception that Dynamo hands to the caller unchanged.

    Whatever else a backend raises while compiling reaches the user as ``BackendCompilerFailed``. Dynamo lets a
    ``ShortenTraceback`` through; without a first useful frame it leaves the traceback alone. That is a class of Dynamo's: it
    becomes the base of this one before the first error that Dynamo could see.
    """

    first_useful_frame = None

    def __init__(self, *args: Any) -> None:
        if "torch._dynamo" in sys.modules:
            _passed_on_by_dynamo()
        self._text = str(args[0]) if args else ""
        super().__init__(*args, **({} if _Error in CompileTimeError.__bases__ else {"first_useful_frame": None}))

    def __str__(self) -> str:
        """The text as it was given, without Dynamo's notes below it, which ask for a report to PyTorch."""
        return self._text


def _passed_on_by_dynamo() -> None:
    """Make our errors such as Dynamo passes on."""
    from torch._dynamo.exc import ShortenTraceback

    CompileTimeError.__bases__ = (ShortenTraceback,)
