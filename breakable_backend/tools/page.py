"""The report as one HTML page: it carries its style, its script and its data, and asks the network for nothing.

``page.html`` is the page; here is what goes into it, and how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = list[tuple[int, int]]
"""For each step its lines of a text: the first, and the one behind the last."""

TEMPLATE = Path(__file__).with_name("page.html")
REPORT, LINES = "/*report*/null", "/*lines*/null"
"""Where ``page.html`` takes its data, in this order."""


def page(report: Mapping[str, Any]) -> str:
    """What ``Report.to_dict`` returned, as a page. The data can be read out of it again, unchanged."""
    template = TEMPLATE.read_text(encoding="utf-8")
    before, rest = template.split(REPORT)
    between, behind = rest.split(LINES)
    lines = [_lines(program) for program in report["programs"]]
    return "".join((before, _embedded(report), between, _embedded(lines), behind))


def _embedded(data: Any) -> str:
    """``data`` as JSON in ASCII that no tag, comment or entity of HTML can be read in."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _lines(program: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": text_lines(program["text"]),
        "sources": [source_lines(recording["source"], recording["steps"]) for recording in program["recordings"]],
    }


def text_lines(text: str) -> Lines:
    """Where each segment stands in a printed program; empty for a text that is none."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"  segment \d+: ", line)]
    if not starts:
        return []
    inside = range(starts[-1] + 1, len(lines))
    end = next((number for number in inside if not lines[number].startswith("    ")), len(lines))
    return list(zip(starts, [*starts[1:], end], strict=True))


# --- the generated replay ---------------------------------------------------------------------------------------------

_LAUNCH = re.compile(r"    graph_\d+(_\d+)?\(\w+\)$")
_REASON = re.compile(r"    # eager: ")
_LOAD = re.compile(r"    if \w+\.data_ptr\(\) != |    copied\w*\.copies \+= load_all")
_STORE = re.compile(r"    copied\w*\.copies \+= \w+\.store\(")
_DELETE = re.compile(r"    del ")
_CHECK = re.compile(r"    if not fits\w*\(")


def source_lines(source: str, steps: Sequence[Mapping[str, Any]]) -> Lines:
    """Where each step stands in the generated replay; empty for a source that does not have them all.

    The launch of a graph is a line of its own, with the loads of its bridges before it and its stores behind it. An
    eager step begins with its reasons and ends where the next step begins.
    """
    lines = source.splitlines()
    launches = [number for number, line in enumerate(lines) if _LAUNCH.match(line)]
    if not steps or len(launches) != sum(step["kind"] == "captured" for step in steps):
        return []
    starts: list[int] = []
    end, following = 0, iter(launches)
    for step in steps:
        if step["kind"] == "captured":
            launch = next(following)
            starts.append(_first_load(lines, launch))
            end = _behind(lines, launch + 1, _STORE, _DELETE)
        else:
            start = next((number for number in range(end, len(lines)) if _REASON.match(lines[number])), None)
            if start is None:
                return []
            starts.append(start)
            end = start + sum(len(_reason(reason).splitlines()) for reason in step["reasons"])
    if steps[-1]["kind"] == "eager":
        end = _behind_calls(lines, end, {op["name"] for op in steps[-1]["ops"]})
    return list(zip(starts, [*starts[1:], end], strict=True))


def _first_load(lines: Sequence[str], launch: int) -> int:
    """The line at which the loads for a launch begin: statements, each with perhaps a deletion behind it."""
    first = launch
    while True:
        start = first - 2 if _DELETE.match(lines[first - 1]) else first - 1
        while lines[start].startswith("        ") or lines[start] == "    else:":
            start -= 1
        if not _LOAD.match(lines[start]):
            return first
        first = start


def _behind(lines: Sequence[str], number: int, *patterns: re.Pattern[str]) -> int:
    while number < len(lines) and any(pattern.match(lines[number]) for pattern in patterns):
        number += 1
    return number


def _behind_calls(lines: Sequence[str], start: int, names: set[str]) -> int:
    """Behind the last line that makes one of ``names``, with the check of it and the deletions."""
    made = [n for n in range(start, len(lines)) if lines[n].strip().partition(" = ")[0] in names]
    if not made:
        return start
    number = made[-1] + 1
    if number < len(lines) and _CHECK.match(lines[number]):
        number += 2
    return _behind(lines, number, _DELETE)


def _reason(reason: Mapping[str, Any]) -> str:
    """A reason as the replay's comments have it."""
    text = f"{reason['op']}: {reason['text']}" if reason["op"] else reason["text"]
    return f"{text} at {reason['source']}" if reason["source"] else text
