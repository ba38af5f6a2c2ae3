"""What happened, told once each: as log lines, and as artifacts of torch's structured trace, which ``tlparse`` shows.

``TORCH_LOGS=breakable_backend`` (or any module of the package) shows the lines; so does Python's own logging. Nothing is
told per call: what happens in each call is counted in the report.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from breakable_backend import _torch
from breakable_backend.ir.program import Program, Reason
from breakable_backend.tools.sources import title


@dataclass
class Journal:
    """The life of one compiled graph, or of one captured by hand."""

    log: logging.Logger
    name: str
    compile_id: Any = field(default_factory=_torch.current_compile_id)
    """Where ``tlparse`` puts what is told after the compilation."""
    _said: set[str] = field(default_factory=set)

    def once(self, what: str, level: int = logging.INFO) -> None:
        """A line, if it was not told before."""
        if what not in self._said:
            self._said.add(what)
            self.tell(what, level, 3)

    def tell(self, what: str, level: int = logging.INFO, depth: int = 2) -> None:
        """A line, as from the caller's caller at ``depth``."""
        self.log.log(level, "%s: %s", self.name, what, stacklevel=depth)

    def program(self, program: Program) -> None:
        """The graph was cut into segments, or cut anew."""
        self.tell(
            f"{len(program.graph_segments)} captured, {len(program.eager_segments)} eager"
            + "".join(f"\n  eager: {line}" for line in reason_lines(program.reasons)),
            depth=3,
        )
        self.artifact("program", lambda: str(program))
        self.artifact("reasons", lambda: [vars(reason) for reason in program.reasons])

    def recorded(self, number: int, why: str, steps: Callable[[], list[str]], source: str, **facts: Any) -> None:
        """A recording was made. What its ``steps`` are costs time to find out, and is asked for by a trace only."""
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
        self.tell(f"recording {number} ({why}): {details}", depth=3)
        self.artifact(f"recording {number}", lambda: {"why": why, **facts, "steps": steps()})
        self.artifact(f"replay {number}", lambda: source)

    def artifact(self, what: str, content: Callable[[], Any]) -> None:
        """Text, or what JSON can hold; ``content`` is asked only while there is a trace."""

        def payload() -> str:
            found = content()
            return found if isinstance(found, str) else json.dumps(found, indent=1, default=str)

        encoding = "string" if what.startswith(("program", "replay")) else "json"
        _torch.trace_artifact(title(self.name, what), encoding, payload, self.compile_id)


def reason_lines(reasons: Sequence[Reason]) -> list[str]:
    """Why nodes run eagerly and at which lines, each once."""
    lines = Counter(f"{reason}{f', at {reason.source}' if reason.source else ''}" for reason in reasons)
    return [f"{line} ({count}x)" if count > 1 else line for line, count in lines.items()]
