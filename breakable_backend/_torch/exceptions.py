"""Dynamo's exceptions, and exceptions of this package that Dynamo passes on."""

from __future__ import annotations

import sys
from typing import Any


def dynamo_error() -> type[Exception]:
    """The base of exceptions by which Dynamo steers itself, such as a request to trace again, and of ours. Not to be caught."""
    from torch._dynamo.exc import TorchDynamoException

    _passed_on_by_dynamo()
    return TorchDynamoException


def is_dynamos(error: Exception) -> bool:
    """Whether ``error`` is one of these."""
    return "torch._dynamo" in sys.modules and isinstance(error, dynamo_error())


class _Error(RuntimeError):
    """The base of this package's exceptions while Dynamo is not imported."""


class CompileTimeError(_Error):
    """An exception that Dynamo passes to the caller unchanged.

    Dynamo wraps any other exception of a backend in ``BackendCompilerFailed``. It passes on its own
    ``ShortenTraceback``, and without a first useful frame it does not change the traceback. That class becomes the base
    of this one before Dynamo can see the first exception.
    """

    first_useful_frame = None

    def __init__(self, *args: Any) -> None:
        if "torch._dynamo" in sys.modules:
            _passed_on_by_dynamo()
        self._text = str(args[0]) if args else ""
        super().__init__(*args, **({} if _Error in CompileTimeError.__bases__ else {"first_useful_frame": None}))

    def __str__(self) -> str:
        """The original text, without the notes that Dynamo adds, which ask for a report to PyTorch."""
        return self._text


def _passed_on_by_dynamo() -> None:
    """Give our exceptions the base class that Dynamo passes on."""
    from torch._dynamo.exc import ShortenTraceback

    CompileTimeError.__bases__ = (ShortenTraceback,)
