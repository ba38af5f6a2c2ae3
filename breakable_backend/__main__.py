"""``python -m breakable_backend``: whether this machine works; with a file, the saved report in it.

``python -m breakable_backend report.json`` prints what ``Report.to_json()`` wrote. With ``--html page.html`` it also
writes the report as a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from breakable_backend.errors import OptionsError
from breakable_backend.tools.machine import examine, print_findings
from breakable_backend.tools.report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments``, by default those of the process, and return its exit status.

    The status is 0 if all is well, 1 if the backend does not work on this machine, and 2 if the file is not a saved
    report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m breakable_backend",
        description="Say whether this machine will work: versions, GPUs, extras, and a small model that is captured. "
        "With a file, show the report that Report.to_json() wrote there.",
    )
    parser.add_argument("report", nargs="?", type=Path, help="a report as JSON, to be shown instead")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write the report as one HTML page there")
    given = parser.parse_args(arguments)
    if given.report is None:
        if given.html is not None:
            parser.error("--html needs the file of a report")
        return print_findings(examine())
    try:
        report = Report.from_json(given.report.read_text(encoding="utf-8", errors="replace"))
        if given.html is not None:
            print(f"written: {report.to_html(given.html)}")  # noqa: T201 - what a command says
            return 0
    except (OSError, OptionsError) as error:
        file, what = (error.filename, error.strerror) if isinstance(error, OSError) else (given.report, error)
        print(f"{file}: {what}", file=sys.stderr)  # noqa: T201
        return 2
    console = Console()
    console.print(report) if console.is_terminal else print(report)  # noqa: T201 - as wide as print(report) elsewhere
    return 0


if __name__ == "__main__":
    sys.exit(main())
