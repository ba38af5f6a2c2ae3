"""When a recording that failed is tried again, and when its segment is to blame."""

from __future__ import annotations

from dataclasses import dataclass

from breakable_backend.errors import Passing

MAX_DISTURBED = 7
"""How many recordings of a key that something invalidates, another thread or an op itself, are tried again. After that
the segment in question is eager for good."""
MAX_PAUSE = 1024
"""The largest number of calls of a key between two recordings that fail."""


@dataclass(frozen=True)
class Trials:
    """Recordings of one key that failed, and when to try again: after 1 call, after 2 more, after 4 more."""

    failures: int = 0
    reason: str = ""
    """The reason of the last failure; ``cause`` is its kind."""
    cause: Passing = ""
    row: int = 0
    """Failures in a row. Each pause between two of them is twice as long as the one before."""
    disturbed: int = 0
    """Those failures in which the capture became invalid and the cause is unknown."""
    next_call: int = 0
    """The first call of the key that may record again."""

    def is_due(self, call: int) -> bool:
        """Whether ``call``, counted in calls of the key, records."""
        return call >= self.next_call

    def failed(self, call: int, cause: Passing, reason: str) -> Trials:
        """The state after the recording in ``call`` has failed."""
        pause = min(2 ** min(self.row, MAX_PAUSE), MAX_PAUSE)
        disturbed = self.disturbed + (cause == "disturbed")
        return Trials(self.failures + 1, reason, cause, self.row + 1, disturbed, call + pause)

    @property
    def blames_the_segment(self) -> bool:
        """Whether it was disturbed so often that the segment itself must be the cause."""
        return self.cause == "disturbed" and self.disturbed > MAX_DISTURBED

    def settled(self) -> Trials:
        """The state after the segment to blame has become eager: the next call records."""
        return Trials(self.failures, self.reason)
