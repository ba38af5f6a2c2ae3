"""When a recording that failed is tried again, by itself."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from breakable_backend.calling import retries
from breakable_backend.calling.retries import Trials
from breakable_backend.errors import Passing


def attempts(fails_until: int, calls: int, cause: Passing = "memory") -> list[int]:
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
    assert found[-1] - passes <= retries.MAX_PAUSE
    assert len(found) <= passes.bit_length() + passes // retries.MAX_PAUSE + 2


@pytest.mark.parametrize("cause", ["memory", "busy"])
def test_what_surely_passes_is_never_the_segments_fault(cause: Passing) -> None:
    """A segment is not eager for good because memory ran out, however often it did."""
    trials = Trials()
    for call in range(100):
        trials = trials.failed(call, cause, "why")
        assert not trials.blames_the_segment


def test_a_segment_that_is_always_disturbed_is_to_blame() -> None:
    """After ``MAX_DISTURBED`` disturbed recordings the next one that is disturbed blames the segment, and starts afresh."""
    trials = Trials()
    for call in range(retries.MAX_DISTURBED):
        trials = trials.failed(call, "disturbed", "why")
        assert not trials.blames_the_segment
    trials = trials.failed(100, "memory", "why").failed(101, "disturbed", "at last")
    assert trials.blames_the_segment
    settled = trials.settled()
    assert settled.is_due(102) and not settled.blames_the_segment
    assert (settled.failures, settled.reason) == (retries.MAX_DISTURBED + 2, "at last")
    assert settled.failed(102, "disturbed", "again").next_call == 103
