"""How large a pool of captured memory gets: what its recordings need, and when a new pool is made."""

from __future__ import annotations

from dataclasses import dataclass

SPARE = 16 << 20
"""Bytes of a pool that its largest recording may leave unused. If it would leave more, all are recorded again in a new
pool."""
WASTE = 0.1
""":data:`SPARE`, as a share of what the largest recording needs. The greater of the two counts."""


@dataclass(frozen=True)
class PoolSize:
    """The memory that the recordings in one pool need, each by itself.

    A smaller recording fits into memory that a larger one has left. A larger one does not fit, since blocks cannot
    grow: their addresses are in graphs. So the pool grows by about what the larger one needs, and the memory of the
    former largest is of no use to it.
    """

    largest: int = 0
    """Bytes that the largest recording needs."""
    outgrown: int = 0
    """Bytes that the former largest recordings needed, in total."""

    def holds(self, need: int) -> bool:
        """Whether a recording of ``need`` bytes goes into this pool. If not, it begins a new one, for all recordings."""
        return need <= self.largest or self.outgrown + self.largest <= max(SPARE, int(WASTE * need))

    def having(self, need: int) -> PoolSize:
        """The size with one more recording."""
        return self if need <= self.largest else PoolSize(need, self.outgrown + self.largest)
