"""Captured graphs with collectives, freed before their process group ends.

Before NCCL destroys a communicator, it waits for the graphs that contain its work, without a time limit. So the holders
of such graphs are told when a group is about to end.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from breakable_backend import _torch, locks


class Holder(Protocol):
    """A holder of captured graphs."""

    def leave(self, why: str) -> None:
        """Free them as soon as the GPU has finished with them, without waiting."""


_lock = locks.lock()
_holders: weakref.WeakSet[Holder] = weakref.WeakSet()
_watched = False
"""Whether torch calls this module when a group ends; true from the first holder on."""


def is_collective(name: str) -> bool:
    """Whether an op, as ``namespace::name``, is the work of a process group."""
    return name.partition("::")[0] in ("c10d", "_c10d_functional")


def leaves_with_groups(holder: Holder) -> None:
    """Have ``holder`` leave before a process group ends. It is held weakly."""
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
        holder.leave("a process group ended")  # do not wait: its last work may hang, and this end may be what stops it
