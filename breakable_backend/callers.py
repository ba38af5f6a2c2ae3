"""Which compiled functions a graph belongs to: those that were running when it was compiled, or first called with a key.

A frame that Dynamo compiles for a callee, after a graph break say, is reached from no code object of the caller's. But it
is compiled while the caller runs, and the caller's wrapper is on the stack.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import CodeType
from typing import Protocol, TypeVar

from breakable_backend import _torch


class Callers:
    """The compiled functions that a graph ran for, known weakly."""

    def __init__(self) -> None:
        code = _torch.code_under_compilation()
        self._code = weakref.ref(code[0]) if code is not None else None
        self._whole = weakref.ref(code[1]) if code is not None and not _torch.is_shared(code[1]) else None
        self._running: tuple[tuple[weakref.ref[object], str], ...] = ()
        self.gone = False
        """Whether Dynamo was reset since: nobody can call the graph, though Dynamo may keep it (after a graph break, say)."""
        self.note()

    @property
    def code(self) -> CodeType | None:
        """What Dynamo compiled the graph for; None if it is gone."""
        return self._code() if self._code is not None else None

    @property
    def whole(self) -> CodeType | None:
        """The code of the user's function that the graph is of, on whichever side of a graph break; None if it is gone."""
        return self._whole() if self._whole is not None else None

    def note(self) -> None:
        """Add those that are running now. Takes microseconds: for first calls, and not for each."""
        self.gone = False
        alive = [(ref, name) for ref, name in self._running if ref() is not None]
        known = {(id(ref()), name) for ref, name in alive}
        for subject, name in _torch.running_compiled():
            if (id(subject), name) not in known and (ref := _weakly(subject)) is not None:
                known.add((id(subject), name))
                alive.append((ref, name))
        self._running = tuple(alive)

    def _include(self, subjects: set[tuple[int, str]]) -> bool:
        running = ((id(subject), name) for ref, name in self._running if (subject := ref()) is not None)
        return (id(self.whole), "") in subjects or any(subject in subjects for subject in running)


def _weakly(subject: object) -> weakref.ref[object] | None:
    """A weak reference; None where there can be none (``__slots__``): such a one is found by what compiles it, and its code."""
    try:
        return weakref.ref(subject)
    except TypeError:
        return None


class Filed(Protocol):
    """Something that is found by who calls it."""

    callers: Callers


T = TypeVar("T", bound=Filed)


def found_by(subjects: Iterable[tuple[object, str]], filed: Iterable[T]) -> list[T]:
    """What of ``filed`` ran for one of ``subjects``, or is of the same function as what did.

    Dynamo compiles a function for all that call it: a graph that is there is not compiled for another caller.
    """
    subjects = list(subjects)  # alive, so that their numbers are theirs
    numbers = {(id(subject), name) for subject, name in subjects}
    filed = list(filed)
    wholes = {item.callers.whole for item in filed if item.callers._include(numbers)} - {None}
    return [item for item in filed if item.callers._include(numbers) or item.callers.whole in wholes]
