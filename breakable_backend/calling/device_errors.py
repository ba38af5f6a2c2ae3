"""An error of the GPU that comes up in a call: of a kernel that was launched before, in this call or an earlier one.

CUDA tells of an assertion or an illegal address at whatever it is asked next. So nobody knows which kernel it was; what
is known is what was launched. From then on every use of the device in this process fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from breakable_backend.drivers import CaptureDriver
from breakable_backend.errors import ReplayError, message
from breakable_backend.failures import is_device_error
from breakable_backend.faults import is_generated, is_ours
from breakable_backend.ir.program import source_line
from breakable_backend.marks.rules import label
from breakable_backend.recordings.recording import GraphStep, Recording

LOST = "the GPU is lost to this process"
FIX = (
    "run with options={'debug': 'eager'} (BREAKABLE_CG_DEBUG=eager) and CUDA_LAUNCH_BLOCKING=1, or under "
    "compute-sanitizer: they name the kernel; this process has to be started anew"
)
MAX_SHOWN = 8
"""Segments, and ops of a segment, that a message names."""


def blame(error: Exception, driver: CaptureDriver, name: str, recordings: Iterable[Recording]) -> None:
    """Say with ``error`` which segments of ``name`` were launched, if it is an error of the device; return if not.

    An error that came up in an eager step stays the object that it is, with a note.

    Raises:
        ReplayError: the error came up in what is not the user's.
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
            nodes = () if step.segment is None else tuple(step.segment.module.graph.nodes)
            calls = [node for node in nodes if node.op == "call_function"]
            ops = [*map(label, calls), *(op.op for op in step.ops)]
            sources = [*map(source_line, calls), *(op.source for op in step.ops)]
            text = ", ".join(ops[:MAX_SHOWN]) + (f" and {len(ops) - MAX_SHOWN} more" if len(ops) > MAX_SHOWN else "")
            where = next(filter(None, sources), "")
            yield f"step {position}: {text or 'no ops'}" + (f", at {where}" if where else "")
