"""Which new keys are admitted, which keys are evicted for them, and what is no longer keyed.

Counts and numbers of calls go in, and decisions come out. Nothing here knows a tensor, a graph or a driver.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

MAX_ADDRESS_SETS = 256
"""How many sets of static addresses have recordings: instances of a module, caches of requests."""
MAX_ADDRESSES = 4
"""How many addresses of an input that captured segments write are keyed, before it gets a bridge and is copied back.
Also how many addresses of one static tensor are keyed, before its input gets a bridge."""
MAX_SCALAR_VALUES = 4
"""How many values of a host scalar are keyed, before the ops that read it run eagerly."""
IDLE_FACTOR = 4
"""A recording is evicted for a new key only if it was not used in this many times ``max_recordings`` calls. So if more
keys are used than fit, a part of the calls is plain, and the function does not record for ever."""
MAX_DROPPED = 1024
"""How many dropped keys are remembered, so that the report can say why they are recorded again."""


class Occupancy(NamedTuple):
    """How many keys, or sets of keys, there are. Their number is bounded."""

    number: int
    oldest_call: int = 0
    """The last call that used the one that would be evicted first."""


@dataclass(frozen=True)
class Admission:
    """Whether a new key is admitted, and what is evicted for it."""

    refused: str = ""
    """Why it is not admitted; empty if it is."""
    evicts_set: bool = False
    """Whether the least recently used set of addresses is evicted."""
    evicts_key: bool = False
    """Whether the least recently used key of the same set is evicted."""


def admit(now: int, sets: Occupancy, keys: Occupancy | None, max_recordings: int) -> Admission:
    """Whether a key that is new in call ``now`` is admitted.

    Args:
        now: the number of this call.
        sets: the sets of static addresses.
        keys: the keys of its set; None if the set is new too.
        max_recordings: how many keys of a set are kept.
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


class Variety:
    """The values that each name has had in keys."""

    def __init__(self) -> None:
        self._values: dict[str, set[Hashable]] = {}

    def is_too_much(self, name: str, value: Hashable, bound: int) -> bool:
        """Count ``value``. Returns whether ``name`` has had more than ``bound`` different values."""
        values = self._values.setdefault(name, set())
        values.add(value)
        return len(values) > bound
