"""What has to go before a process group may end.

NCCL waits for the graphs that hold its work before it gives up a communicator, and it waits without end: so whoever holds
such graphs is told when a group is about to end.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from breakable_backend import _torch, locks


class Holder(Protocol):
    """What holds captured graphs."""

    def leave(self, why: str) -> None:
        """Give them back, as soon as the GPU is done with them, and wait for nothing."""


_lock = locks.lock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_watched = False
"""Whether torch tells of the end of groups: from the first holder on."""


def is_collective(name: str) -> bool:
    """Whether an op, ``namespace::name``, is work of a process group."""
    return name.partition("::")[0] in ("c10d", "_c10d_functional")


def leaves_with_groups(holder: Holder) -> None:
    """Have ``holder`` leave before a process group ends. It is known weakly."""
    global _watched
    with _lock:
        _holders.add(holder)
        watched, _watched = _watched, True
    if not watched:
        _torch.before_groups_end(_all_leave)


def _all_leave() -> None:
    with _lock:
        holders = list(_holders)
    for holder in holders:
        holder.leave("a process group ended")  # its last work may hang, and be given up by this very end
