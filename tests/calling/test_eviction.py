"""What is decided about keys, by itself: which gets a place, and which goes."""

from __future__ import annotations

from collections import OrderedDict

import hypothesis
from hypothesis import strategies

from breakable_backend.calling import eviction
from breakable_backend.calling.eviction import Admission, Occupancy, Variety

BOUND = 3


def test_a_key_gets_a_free_place() -> None:
    """While there is room nothing goes and nothing is refused, for a key of a known set and for a new set."""
    full = Occupancy(eviction.MAX_ADDRESS_SETS, 99)
    assert eviction.admit(100, full, Occupancy(BOUND - 1, 99), BOUND) == Admission()
    assert eviction.admit(100, Occupancy(eviction.MAX_ADDRESS_SETS - 1, 99), None, BOUND) == Admission()
    assert eviction.admit(1, Occupancy(0), None, BOUND) == Admission()


def test_the_oldest_goes_once_it_is_idle() -> None:
    """In a full set the oldest key goes after ``IDLE_FACTOR`` times the bound of calls without it, and not one before."""
    idle = eviction.IDLE_FACTOR * BOUND
    assert eviction.admit(10 + idle, Occupancy(1), Occupancy(BOUND, 10), BOUND) == Admission(evicts_key=True)
    refused = eviction.admit(9 + idle, Occupancy(1), Occupancy(BOUND, 10), BOUND)
    assert refused == Admission(refused=f"more than max_recordings={BOUND} keys in use")


def test_the_oldest_set_goes_once_it_is_idle() -> None:
    """Of sets of addresses likewise, with their own bound; the keys of a set that is new need no place."""
    idle = eviction.IDLE_FACTOR * eviction.MAX_ADDRESS_SETS
    sets = Occupancy(eviction.MAX_ADDRESS_SETS, 10)
    assert eviction.admit(10 + idle, sets, None, BOUND) == Admission(evicts_set=True)
    assert eviction.admit(9 + idle, sets, None, BOUND).refused == "more than 256 sets of static addresses in use"


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
        admission = eviction.admit(now, Occupancy(1, now), Occupancy(len(places), oldest), bound)
        if admission.evicts_key:
            gone, last = places.popitem(last=False)
            assert now - last >= eviction.IDLE_FACTOR * bound, gone
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
    keys = min(bound + more, eviction.IDLE_FACTOR * bound - 1)
    found, _ = served(list(range(keys)) * 20, bound)
    assert "evicts" not in found


@hypothesis.given(strategies.integers(1, 4), strategies.integers(1, 10))
def test_a_working_set_that_moves_on_is_recorded(bound: int, key: int) -> None:
    """A key that is called again and again gets a place, whatever had one before."""
    before = list(range(100, 100 + bound))
    found, _ = served(before + [key] * (eviction.IDLE_FACTOR * bound + 1), bound)
    assert found[-1] == "known" and "evicts" in found


def test_variety() -> None:
    """A name is given up at one value more than its bound, however often the others came, and for itself alone."""
    variety = Variety()
    for _ in range(3):
        assert not any(variety.is_too_much("a", value, 4) for value in range(4))
    assert not variety.is_too_much("b", 9, 4)
    assert variety.is_too_much("a", 9, 4)
