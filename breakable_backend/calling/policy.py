"""What is decided about keys: which get a place, which go for others, what is given up, what is tried again and when.

Counts and numbers of calls go in, decisions come out. Nothing here knows a tensor, a graph or a driver.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from breakable_backend.errors import Passing

MAX_ADDRESS_SETS = 256
"""Sets of static addresses with recordings of their own: instances of a module, caches of requests."""
MAX_ADDRESSES = 4
"""Addresses of one input that captured segments write, before it gets a bridge and is copied back."""
MAX_SCALAR_VALUES = 4
"""Values of one host scalar, before the ops that read it run eagerly."""
IDLE_FACTOR = 4
"""A recording is evicted for a new key only after this many times ``max_recordings`` calls without it. So a working set
that is too large runs plainly in part, and does not record for ever."""
MAX_DROPPED = 1024
"""Keys whose recordings went that are remembered, so that the report can say why they were recorded again."""
MAX_DISTURBED = 7
"""Recordings of a key that something disturbs, be it another thread or an op itself, and that are tried again; the segment
that is disturbed then is eager for good."""
MAX_PAUSE = 1024
"""Calls of a key, at most, between two recordings that fail."""


# --- admission ----------------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """Things that have a place."""

    number: int
    oldest_call: int = 0
    """The last call of the one that would go first."""


@dataclass(frozen=True)
class Admission:
    """Whether a new key gets a place, and what goes for it."""

    refused: str = ""
    """Why it gets none."""
    evicts_set: bool = False
    """Whether the oldest set of addresses goes."""
    evicts_key: bool = False
    """Whether the oldest key of the same set goes."""


def admit(now: int, sets: Held, keys: Held | None, max_recordings: int) -> Admission:
    """Whether a key that is new in call ``now`` gets a place.

    Args:
        now: the number of this call.
        sets: the sets of static addresses.
        keys: the keys of its set; None if the set is new too.
        max_recordings: places for keys in a set.
    """
    if keys is None:
        if sets.number < MAX_ADDRESS_SETS:
            return Admission()
        if now - sets.oldest_call < IDLE_FACTOR * MAX_ADDRESS_SETS:
            return Admission(refused=f"more than {MAX_ADDRESS_SETS} sets of static addresses in use")
        return Admission(evicts_set=True)
    if keys.number < max_recordings:
        return Admission()
    if now - keys.oldest_call < IDLE_FACTOR * max_recordings:
        return Admission(refused=f"more than max_recordings={max_recordings} keys in use")
    return Admission(evicts_key=True)


# --- giving up ----------------------------------------------------------------------------------------------------------


class Variety:
    """The values that each name has had in keys."""

    def __init__(self) -> None:
        self._values: dict[str, set[Hashable]] = {}

    def is_too_much(self, name: str, value: Hashable, bound: int) -> bool:
        """Count ``value``; whether ``name`` has had more than ``bound`` of them."""
        values = self._values.setdefault(name, set())
        values.add(value)
        return len(values) > bound


# --- trying again -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trials:
    """Recordings of one key that failed, and may succeed another time: after 1 call, after 2 more, after 4 more."""

    failures: int = 0
    reason: str = ""
    """Of the last failure, and so is the cause."""
    cause: Passing = ""
    row: int = 0
    """Failures in a row, each pause between two of them twice as long as the one before."""
    disturbed: int = 0
    """Those among them by which nobody knows who was to blame."""
    next_call: int = 0
    """The call of the key that records again, or a later one."""

    def is_due(self, call: int) -> bool:
        """Whether ``call``, counted in calls of the key, records."""
        return call >= self.next_call

    def failed(self, call: int, cause: Passing, reason: str) -> Trials:
        """What there is to know once the recording in ``call`` has failed."""
        pause = min(2 ** min(self.row, MAX_PAUSE), MAX_PAUSE)
        disturbed = self.disturbed + (cause == "disturbed")
        return Trials(self.failures + 1, reason, cause, self.row + 1, disturbed, call + pause)

    @property
    def blames_the_segment(self) -> bool:
        """Whether it was disturbed so often that the segment itself must have done it."""
        return self.cause == "disturbed" and self.disturbed > MAX_DISTURBED

    def settled(self) -> Trials:
        """What is left once the segment that was to blame runs eagerly: the next call records."""
        return Trials(self.failures, self.reason)
