"""How large a pool of captured memory gets: what recordings in it need, and when it is made anew."""

from __future__ import annotations

from dataclasses import dataclass

SPARE = 16 << 20
"""Bytes of a pool that may be of no use to its largest recording before all are made anew in another pool."""
WASTE = 0.1
"""The same as a share of what the largest recording needs."""


@dataclass(frozen=True)
class Room:
    """What recordings in one pool need at once, each by itself.

    A smaller one finds room in memory that a larger one has left. A larger one does not: blocks do not grow, since their
    addresses are in graphs. So the pool grows by about what it needs, and what the largest before it took is wasted on it.
    """

    largest: int = 0
    """Bytes that the largest recording needs."""
    outgrown: int = 0
    """Bytes that those needed which were the largest before it."""

    def holds(self, need: int) -> bool:
        """Whether one that needs ``need`` bytes is recorded beside the others, and not alone, and they anew behind it."""
        return need <= self.largest or self.outgrown + self.largest <= max(SPARE, int(WASTE * need))

    def having(self, need: int) -> Room:
        """With one more recording."""
        return self if need <= self.largest else Room(need, self.outgrown + self.largest)
