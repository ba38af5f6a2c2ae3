"""What is decided about keys, by itself: who gets a place, who goes, what is tried again and when."""

from __future__ import annotations

from collections import OrderedDict

import hypothesis
import pytest
from hypothesis import strategies

from breakable_backend.calling import policy
from breakable_backend.calling.policy import Admission, Held, Trials, Variety
from breakable_backend.drivers.room import SPARE, Room

BOUND = 3


def test_a_key_gets_a_free_place() -> None:
    """While there is room nothing goes and nothing is refused, for a key of a known set and for a new set."""
    full = Held(policy.MAX_ADDRESS_SETS, 99)
    assert policy.admit(100, full, Held(BOUND - 1, 99), BOUND) == Admission()
    assert policy.admit(100, Held(policy.MAX_ADDRESS_SETS - 1, 99), None, BOUND) == Admission()
    assert policy.admit(1, Held(0), None, BOUND) == Admission()


def test_the_oldest_goes_once_it_is_idle() -> None:
    """In a full set the oldest key goes after ``IDLE_FACTOR`` times the bound of calls without it, and not one before."""
    idle = policy.IDLE_FACTOR * BOUND
    assert policy.admit(10 + idle, Held(1), Held(BOUND, 10), BOUND) == Admission(evicts_key=True)
    refused = policy.admit(9 + idle, Held(1), Held(BOUND, 10), BOUND)
    assert refused == Admission(refused=f"more than max_recordings={BOUND} keys in use")


def test_the_oldest_set_goes_once_it_is_idle() -> None:
    """Of sets of addresses likewise, with their own bound; the keys of a set that is new need no place."""
    idle = policy.IDLE_FACTOR * policy.MAX_ADDRESS_SETS
    sets = Held(policy.MAX_ADDRESS_SETS, 10)
    assert policy.admit(10 + idle, sets, None, BOUND) == Admission(evicts_set=True)
    assert policy.admit(9 + idle, sets, None, BOUND).refused == "more than 256 sets of static addresses in use"


def served(calls: list[int], bound: int) -> tuple[list[str], int]:
    """What becomes of each of several calls of keys in one set, and the most keys that had a place at once."""
    places: OrderedDict[int, int] = OrderedDict()
    found, most = [], 0
    for now, key in enumerate(calls, 1):
        if key in places:
            places.move_to_end(key)
            places[key] = now
            found.append("known")
            continue
        oldest = next(iter(places.values()), 0)
        admission = policy.admit(now, Held(1, now), Held(len(places), oldest), bound)
        if admission.evicts_key:
            gone, last = places.popitem(last=False)
            assert now - last >= policy.IDLE_FACTOR * bound, gone
        if not admission.refused:
            places[key] = now
        found.append("refused" if admission.refused else "evicts" if admission.evicts_key else "new")
        most = max(most, len(places))
    return found, most


@hypothesis.given(strategies.lists(strategies.integers(0, 8), max_size=200), strategies.integers(1, 5))
def test_places_are_bounded(calls: list[int], bound: int) -> None:
    """Whatever the calls: never more keys than places, nothing goes before it is idle, and no key is refused with room left."""
    found, most = served(calls, bound)
    assert most <= bound
    if len(set(calls)) <= bound:
        assert set(found) <= {"new", "known"}


@hypothesis.given(strategies.integers(1, 6), strategies.integers(1, 6))
def test_a_working_set_that_is_too_large_does_not_record_for_ever(bound: int, more: int) -> None:
    """Keys that take turns, up to ``IDLE_FACTOR`` times as many as there are places, evict nothing."""
    keys = min(bound + more, policy.IDLE_FACTOR * bound - 1)
    found, _ = served(list(range(keys)) * 20, bound)
    assert "evicts" not in found


@hypothesis.given(strategies.integers(1, 4), strategies.integers(1, 10))
def test_a_working_set_that_moves_on_is_recorded(bound: int, key: int) -> None:
    """A key that is called again and again gets a place, whatever had one before."""
    before = list(range(100, 100 + bound))
    found, _ = served(before + [key] * (policy.IDLE_FACTOR * bound + 1), bound)
    assert found[-1] == "known" and "evicts" in found


def test_variety() -> None:
    """A name is given up at one value more than its bound, however often the others came, and for itself alone."""
    variety = Variety()
    for _ in range(3):
        assert not any(variety.is_too_much("a", value, 4) for value in range(4))
    assert not variety.is_too_much("b", 9, 4)
    assert variety.is_too_much("a", 9, 4)


def attempts(fails_until: int, calls: int, cause: policy.Passing = "memory") -> list[int]:
    """In which of so many calls a key is recorded, if each recording before call ``fails_until`` fails."""
    trials, found = Trials(), []
    for call in range(2, calls):
        if trials.is_due(call):
            found.append(call)
            if call >= fails_until:
                return found
            trials = trials.failed(call, cause, "why")
    return found


def test_pauses_double() -> None:
    """What fails in call 2 is tried again 1, 2, 4 calls later, and so on; the report has the count and the last reason."""
    assert attempts(1000, 70) == [2, 3, 5, 9, 17, 33, 65]
    trials = Trials().failed(2, "memory", "first").failed(3, "busy", "second")
    assert (trials.failures, trials.reason, trials.cause, trials.next_call) == (2, "second", "busy", 5)


@hypothesis.given(strategies.integers(2, 20_000))
def test_what_passes_is_recorded_soon_and_costs_little(passes: int) -> None:
    """Once the cause has passed, the next recording is at most as far away as the first failure; few fail until then."""
    found = attempts(passes, 10 * passes + 10)
    assert passes <= found[-1] <= 2 * passes
    assert found[-1] - passes <= policy.MAX_PAUSE
    assert len(found) <= passes.bit_length() + passes // policy.MAX_PAUSE + 2


@pytest.mark.parametrize("cause", ["memory", "busy"])
def test_what_surely_passes_is_never_the_segments_fault(cause: policy.Passing) -> None:
    """A segment is not eager for good because memory ran out, however often it did."""
    trials = Trials()
    for call in range(100):
        trials = trials.failed(call, cause, "why")
        assert not trials.blames_the_segment


def test_a_segment_that_is_always_disturbed_is_to_blame() -> None:
    """After ``MAX_DISTURBED`` disturbed recordings the next one that is disturbed blames the segment, and starts afresh."""
    trials = Trials()
    for call in range(policy.MAX_DISTURBED):
        trials = trials.failed(call, "disturbed", "why")
        assert not trials.blames_the_segment
    trials = trials.failed(100, "memory", "why").failed(101, "disturbed", "at last")
    assert trials.blames_the_segment
    settled = trials.settled()
    assert settled.is_due(102) and not settled.blames_the_segment
    assert (settled.failures, settled.reason) == (policy.MAX_DISTURBED + 2, "at last")
    assert settled.failed(102, "disturbed", "again").next_call == 103


# --- pools ----------------------------------------------------------------------------------------------------------------


def test_a_smaller_recording_finds_room() -> None:
    """One that needs no more than the largest takes nothing new of a pool, and is never too much for it."""
    room = Room(largest=100 << 20)
    assert room.having(99 << 20) == room.having(100 << 20) == room
    assert room.holds(1) and room.holds(100 << 20)


def test_a_pool_is_outgrown() -> None:
    """A larger one is recorded beside the others while a tenth of what it needs, or a little, would be wasted on it."""
    assert Room().holds(1 << 40)
    assert Room(largest=SPARE).holds(SPARE + 1) and not Room(largest=SPARE + 1).holds(SPARE + 2)
    assert Room(largest=100 << 20).holds(1000 << 20) and not Room(largest=101 << 20).holds(1000 << 20)
    # What was wasted before counts too.
    room = Room(largest=60 << 20).having(700 << 20)
    assert room == Room(700 << 20, 60 << 20) and not room.holds(7000 << 20)
