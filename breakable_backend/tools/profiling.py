"""Names for ``torch.profiler``, and through ``emit_nvtx`` for Nsight: of calls, of segments and of eager steps.

Only while a profiler is active. A replay then runs a variant of its source, which says where each step begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.profiler import record_function

from breakable_backend import _torch
from breakable_backend.recordings.recording import EagerStep, Recording, Step

active = _torch.profiler_enabled


def span(name: str) -> AbstractContextManager[Any]:
    """A range named ``name`` in the profile, if there is one."""
    return record_function(_titled(name)) if active() else nullcontext()


def step_names(recording: Recording) -> list[str]:
    """What each step is, and in the end what makes the outputs."""
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


class Marks:
    """What a replay calls before each step, and once behind the last: ends the range before and begins the next.

    One call at a time, as is the rule for a recording.
    """

    def __init__(self, name: str, steps: Sequence[str]) -> None:
        self._name = name
        self._titles = [_titled(f"{name}: {step}") for step in steps]
        self._open: record_function | None = None

    def __call__(self, step: int) -> None:
        self._end()
        self._open = record_function(self._titles[step])
        self._open.__enter__()

    def run(self, function: Callable[[list[Any], int], list[Any]], args: list[Any], stream: int) -> list[Any]:
        """Call a replay that makes these marks. Its ranges end also where it raises."""
        with record_function(_titled(self._name)):
            try:
                return function(args, stream)
            finally:
                self._end()

    def _end(self) -> None:
        ended, self._open = self._open, None
        if ended is not None:
            ended.__exit__(None, None, None)
