"""Names for ``torch.profiler``, and through ``emit_nvtx`` for Nsight: of calls, segments and eager steps.

They exist only while a profiler is active. A replay then runs a variant of its source that marks the beginning of each
step.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.profiler import record_function

from breakable_backend import _torch
from breakable_backend.recordings.observer import Observer, Subject
from breakable_backend.recordings.recording import EagerStep, Recording, Step
from breakable_backend.recordings.replay import Function, Tally, emit


class Profiling(Observer):
    """Names what a graph does while a profiler is active."""

    wanted = staticmethod(_torch.profiler_enabled)

    def __init__(self, subject: Subject) -> None:
        self.name = subject.name

    def span(self, what: str) -> AbstractContextManager[Any] | None:
        return record_function(_titled(f"{self.name}: {what}")) if self.wanted() else None

    def variant(self, recording: Recording, tally: Tally) -> Function:
        return _Named(self.name, recording, tally)


class _Named:
    """A replay with a range for each step. Its source is made when a profiler is first active.

    One call at a time runs it, as any recording.
    """

    def __init__(self, name: str, recording: Recording, tally: Tally) -> None:
        self._name, self._recording, self._tally = name, recording, tally
        self._ranges = _Ranges()
        self.function: Function | None = None

    def __call__(self, args: list[Any], stream: int) -> list[Any]:
        if self.function is None:
            self._ranges.titles = [_titled(f"{self._name}: {step}") for step in step_names(self._recording)]
            self.function = emit(self._recording, self._ranges.begin, tally=self._tally).function
        with record_function(_titled(self._name)):
            try:
                return self.function(args, stream)
            finally:
                self._ranges.end()  # also if it raises


class _Ranges:
    """The ranges of the steps, one after the other."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self._open: record_function | None = None

    def begin(self, step: int) -> None:
        """End the range before, and begin that of ``step``."""
        self.end()
        self._open = record_function(self.titles[step])
        self._open.__enter__()

    def end(self) -> None:
        ended, self._open = self._open, None
        if ended is not None:
            ended.__exit__(None, None, None)


def step_names(recording: Recording) -> list[str]:
    """The name of each step, and at the end that of the outputs."""
    return [*(f"step {position} {_kind(step)}" for position, step in enumerate(recording.steps)), "outputs"]


def _kind(step: Step) -> str:
    if not isinstance(step, EagerStep):
        count = len(step.graph.kernels())
        return f"captured, {count} kernel{'' if count == 1 else 's'}"
    ops = list(dict.fromkeys(reason.op for reason in step.reasons if reason.op))
    more = f" and {len(ops) - 1} more" if len(ops) > 1 else ""
    return f"eager {ops[0]}{more}" if ops else "eager"


def _titled(name: str) -> str:
    return f"breakable_cg {name}"
