"""Which compiled functions a graph belongs to: those that ran when it was compiled, or first called with a key.

Dynamo may compile a frame separately, for example after a graph break. No code object of the caller leads to such a
frame. But it is compiled while the caller runs, when the wrapper of ``torch.compile`` around the caller is on the
stack.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import CodeType
from typing import Protocol, TypeVar

from breakable_backend import _torch


class Callers:
    """The compiled functions that a graph ran for, by weak references."""

    def __init__(self) -> None:
        code = _torch.code_under_compilation()
        self._code = weakref.ref(code[0]) if code is not None else None
        self._whole = weakref.ref(code[1]) if code is not None and not _torch.is_shared(code[1]) else None
        self._running: tuple[tuple[weakref.ref[object], str], ...] = ()
        self.gone = False
        """Whether Dynamo was reset since. Then nobody can call the graph, although Dynamo may keep it."""
        self.note()

    @property
    def code(self) -> CodeType | None:
        """The code object that Dynamo compiled the graph for; None if it was freed."""
        return self._code() if self._code is not None else None

    @property
    def whole(self) -> CodeType | None:
        """The code of the user's function, on whichever side of a graph break the graph is; None if it was freed."""
        return self._whole() if self._whole is not None else None

    def note(self) -> None:
        """Add the compiled functions that are running now. This takes microseconds, so only first calls do it."""
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
    """A weak reference; None if the object allows none (``__slots__``), and is found by its compiler and code."""
    try:
        return weakref.ref(subject)
    except TypeError:
        return None


class Filed(Protocol):
    """An object that is found by the functions that called it."""

    callers: Callers


T = TypeVar("T", bound=Filed)


def found_by(subjects: Iterable[tuple[object, str]], filed: Iterable[T]) -> list[T]:
    """Those of ``filed`` that ran for one of ``subjects``, or that are of the same function as one that did.

    Dynamo compiles a function once for all its callers, so an existing graph is not compiled again for another caller.
    """
    subjects = list(subjects)  # keeps them alive, so that their ids stay theirs
    numbers = {(id(subject), name) for subject, name in subjects}
    filed = list(filed)
    wholes = {item.callers.whole for item in filed if item.callers._include(numbers)} - {None}
    return [item for item in filed if item.callers._include(numbers) or item.callers.whole in wholes]
