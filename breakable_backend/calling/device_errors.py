"""What an exception says when the GPU is lost: which segments were launched before.

CUDA reports a failed assertion or an illegal address at the next call of its API. So nothing tells which kernel it was;
only what was launched is known. From then on every use of the device in this process fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from breakable_backend.drivers import CaptureDriver
from breakable_backend.errors import ReplayError, message
from breakable_backend.failure_kinds import is_device_error
from breakable_backend.internal_errors import is_generated, is_ours
from breakable_backend.ir.source_lines import short_line, source_line
from breakable_backend.marks.rules import label
from breakable_backend.recordings.recording import GraphStep, Recording

LOST = "the GPU is lost to this process"
FIX = (
    "run with options={'debug': 'eager'} (BREAKABLE_CG_DEBUG=eager) and CUDA_LAUNCH_BLOCKING=1, or under "
    "compute-sanitizer: they name the kernel; this process has to be started anew"
)
MAX_SHOWN = 8
"""How many segments, and ops of a segment, a message names."""


def blame(error: Exception, driver: CaptureDriver, name: str, recordings: Iterable[Recording]) -> None:
    """Add to ``error`` which segments of ``name`` were launched, if it is an error of the device; otherwise return.

    The exception of an eager step stays the same object, and gets a note.

    Raises:
        ReplayError: the exception did not come from the user's code.
    """
    if not is_device_error(error):
        return
    shown = list(dict.fromkeys(segment for recording in recordings for segment in segments(recording)))
    more = f"\n    and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
    listed = "".join(f"\n    {segment}" for segment in shown[:MAX_SHOWN]) + more
    why = message(error)
    driver.give_up(f"{LOST}: {why}")
    suspects = f"{name} launched these segments, one of which may have done it:{listed}"
    if isinstance(error, ReplayError) or is_generated(error) or is_ours(error):
        raise ReplayError(f"the GPU is lost to this process: {why}\n  {suspects}", fix=FIX) from error
    error.add_note(f"{LOST}: {why}\n  {suspects}\n  {FIX}")


def segments(recording: Recording) -> Iterator[str]:
    """The captured segments of a recording: their ops, and the user's first line in each."""
    for position, step in enumerate(recording.steps):
        if isinstance(step, GraphStep):
            calls = [] if step.segment is None else step.segment.calls
            ops = [*map(label, calls), *(op.op for op in step.ops)]
            sources = [*map(source_line, calls), *(op.source for op in step.ops)]
            text = ", ".join(ops[:MAX_SHOWN]) + (f" and {len(ops) - MAX_SHOWN} more" if len(ops) > MAX_SHOWN else "")
            where = next(filter(None, sources), "")
            yield f"step {position}: {text or 'no ops'}" + (f", at {short_line(where)}" if where else "")
