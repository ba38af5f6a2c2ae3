"""A progress bar for measurements that take more than a second, on standard error if that is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

DELAY = 1.0
"""Seconds before a bar appears."""


class Progress:
    """A progress bar of ``stages`` stages, which disappears at its end. A file or a pipe gets none."""

    def __init__(self, stages: int) -> None:
        self._stages, self._done = stages, 0
        self._started = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """A stage is done."""
        self._done += 1
        if self._bar is None and time.monotonic() - self._started >= DELAY and _on_terminal():
            self._bar = self._shown()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, refresh=True)

    def _shown(self) -> rich.progress.Progress:
        from rich.console import Console
        from rich.progress import Progress as Bar

        # No separate thread draws the bar: it would take time from what is measured.
        bar = Bar(console=Console(stderr=True), transient=True, auto_refresh=False)
        bar.add_task("measuring", total=self._stages)
        bar.start()
        return bar


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
