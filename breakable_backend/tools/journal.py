"""Log lines for what happens to a graph, once each; and artifacts of torch's structured trace, for ``tlparse``.

``TORCH_LOGS=breakable_backend`` (or any module of the package) shows the lines, and so does Python's own logging.
Nothing is logged per call: the report counts what happens in each call.
"""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from breakable_backend import _torch
from breakable_backend.ir.program import Program, Reason
from breakable_backend.ir.source_lines import short_line
from breakable_backend.recordings import observer
from breakable_backend.recordings.observer import Observer, Subject
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Replay
from breakable_backend.tools.profiling import step_names
from breakable_backend.tools.sources import title


class Journal(Observer):
    """Logs what happens to a graph."""

    def __init__(self, subject: Subject) -> None:
        self.name, self.log = subject.name, subject.log
        self.compile_id = _torch.current_compile_id()
        """Where ``tlparse`` puts artifacts that come after the compilation."""
        self._whys: set[str] = set()
        """The reasons of plain calls that were logged."""

    def plain(self, why: str, level: int) -> None:
        if why not in self._whys:
            self._whys.add(why)
            self.noted(f"runs plainly: {why}", level)

    def noted(self, what: str, level: int = logging.INFO) -> None:
        self.log.log(level, "%s: %s", self.name, what, stacklevel=_frames_of_observers())

    def cut(self, program: Program) -> None:
        self.noted(
            f"{len(program.graph_segments)} captured, {len(program.eager_segments)} eager"
            + "".join(f"\n  eager: {line}" for line in reason_lines(program.reasons))
        )
        self.artifact("program", lambda: str(program))
        self.artifact("reasons", lambda: [vars(reason) for reason in program.reasons])

    def recorded(self, number: int, why: str, recording: Recording, replay: Replay, seconds: float) -> None:
        facts = {
            "graphs": len(recording.graphs),
            "eager_steps": len(recording.steps) - len(recording.graphs),
            "copies_per_call": recording.num_copies,
            "bridge_bytes": recording.held.bridges,
            "milliseconds": round(seconds * 1e3, 1),
        }
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
        self.noted(f"recording {number} ({why}): {details}")
        # Describing the steps takes time, so this is done for a trace only.
        self.artifact(f"recording {number}", lambda: {"why": why, **facts, "steps": step_names(recording)})
        self.artifact(f"replay {number}", lambda: replay.source)

    def artifact(self, what: str, content: Callable[[], Any]) -> None:
        """A text, or a value for JSON. ``content`` is called only while there is a trace."""

        def payload() -> str:
            found = content()
            return found if isinstance(found, str) else json.dumps(found, indent=1, default=str)

        encoding = "string" if what.startswith(("program", "replay")) else "json"
        _torch.trace_artifact(title(self.name, what), encoding, payload, self.compile_id)


def _frames_of_observers() -> int:
    """How many frames of the log's caller only pass an event on: a line names the place where it happened."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, observer.__file__):
        depth, frame = depth + 1, frame.f_back
    return depth


def reason_lines(reasons: Sequence[Reason]) -> list[str]:
    """Why nodes run eagerly and at which lines, each once."""
    lines = Counter(f"{reason}{f', at {short_line(reason.source)}' if reason.source else ''}" for reason in reasons)
    return [f"{line} ({count}x)" if count > 1 else line for line, count in lines.items()]
