"""The report as one HTML page, with its style, script and data, and without any network access.

``page.html`` is the page. This module inserts the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = list[tuple[int, int]]
"""For each step its lines in a text: the first, and the one after the last."""

TEMPLATE = Path(__file__).with_name("page.html")
REPORT, LINES = "/*report*/null", "/*lines*/null"
"""Where ``page.html`` takes its data, in this order."""


def page(report: Mapping[str, Any]) -> str:
    """The result of ``Report.to_dict`` as a page. The data can be read from the page again, unchanged."""
    template = TEMPLATE.read_text(encoding="utf-8")
    before, rest = template.split(REPORT)
    between, behind = rest.split(LINES)
    lines = [_lines(program) for program in report["programs"]]
    return "".join((before, _embedded(report), between, _embedded(lines), behind))


def _embedded(data: Any) -> str:
    """``data`` as JSON in ASCII that contains no tag, comment or entity of HTML."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _lines(program: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": step_lines(program["steps"]),
        "sources": [step_lines(recording["steps"]) for recording in program["recordings"]],
    }


def step_lines(steps: Sequence[Mapping[str, Any]]) -> Lines:
    """The lines of each step in its text; empty if the report does not have them for all steps."""
    lines = [(step.get("first_line", -1), step.get("end_line", -1)) for step in steps]
    return [] if (-1, -1) in lines else lines
