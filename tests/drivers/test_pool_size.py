"""How large a pool gets, by itself."""

from __future__ import annotations

from breakable_backend.drivers.pool_size import SPARE, PoolSize


def test_a_smaller_recording_finds_room() -> None:
    """One that needs no more than the largest takes nothing new of a pool, and is never too much for it."""
    size = PoolSize(largest=100 << 20)
    assert size.having(99 << 20) == size.having(100 << 20) == size
    assert size.holds(1) and size.holds(100 << 20)


def test_a_pool_is_outgrown() -> None:
    """A larger one is recorded beside the others while a tenth of what it needs, or a little, would be wasted on it."""
    assert PoolSize().holds(1 << 40)
    assert PoolSize(largest=SPARE).holds(SPARE + 1) and not PoolSize(largest=SPARE + 1).holds(SPARE + 2)
    assert PoolSize(largest=100 << 20).holds(1000 << 20) and not PoolSize(largest=101 << 20).holds(1000 << 20)
    # What was wasted before counts too.
    size = PoolSize(largest=60 << 20).having(700 << 20)
    assert size == PoolSize(700 << 20, 60 << 20) and not size.holds(7000 << 20)
