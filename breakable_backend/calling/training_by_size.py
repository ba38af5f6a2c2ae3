"""Training with sizes and floats that vary: each set of them is captured by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from breakable_backend import locks
from breakable_backend.callers import Callers
from breakable_backend.calling.keys import scalar_bytes
from breakable_backend.calling.registry import EagerGraph
from breakable_backend.calling.training import Training
from breakable_backend.compiling.halves import Halves
from breakable_backend.ir.ambient_modes import Modes

log = logging.getLogger(__name__)

MAX_SIZES = 8
"""How many sets of sizes and floats of one graph are captured."""

TOO_MANY_SIZES = f"it needs gradients, and came with more than {MAX_SIZES} sets of sizes and floats"


class BySize:
    """A graph that needs gradients, with sizes and floats that vary, as Dynamo calls it: a :class:`Training` for each set.

    Args:
        halves: the graph.
        eager: runs it as Dynamo traced it.
        train: makes a :class:`Training` for a graph, under a name.
        name: the name of the graph.
        source: the user's last line in it.
        file: called with all that is made.
    """

    def __init__(
        self,
        halves: Halves,
        eager: Callable[..., Any],
        train: Callable[[Halves, str], Training],
        name: str,
        source: str,
        file: Callable[[Any], None],
    ) -> None:
        self.halves, self.eager, self.train = halves, eager, train
        self.name, self.source, self.file = name, source, file
        self.callers, self._modes = Callers(), Modes.current()
        self.known: dict[tuple[Any, ...], Training] = {}
        self.others: Others | None = None
        """What the report says about further sizes."""
        self._floats = halves.floats
        self._sizes = tuple(index for index in halves.varying if index not in self._floats)
        self._lock = locks.lock()

    def __call__(self, *args: Any) -> Any:
        values = [args[index] for index in self._sizes]
        sizes = [value if type(value) is int else (value.shape, value.stride()) for value in values]
        key = (*sizes, *[scalar_bytes(args[index]) for index in self._floats])
        training = self.known.get(key)
        if training is None:
            numbers = {index: args[index] for index in self._sizes if isinstance(args[index], int)}
            floats = {index: args[index].item() for index in self._floats}
            with self._lock:
                training = self.known.get(key) or self._made(key, numbers, floats)
            if training is None:
                return self.eager(*args)
        constant = self._floats
        return training(
            *[value for index, value in enumerate(args) if type(value) is not int and index not in constant]
        )

    def _made(self, key: tuple[Any, ...], numbers: dict[int, int], floats: dict[int, float]) -> Training | None:
        if len(self.known) >= MAX_SIZES:
            if self.others is None:
                self.others = Others(EagerGraph(f"{self.name}, other sizes", TOO_MANY_SIZES, self.source), self.callers)
                self.file(self.others)
                log.warning("%s: %s", self.name, TOO_MANY_SIZES)
            return None
        of = [
            f"{what} {', '.join(map(str, dict.fromkeys(values.values())))}"
            for what, values in (("sizes", numbers), ("floats", floats))
            if values
        ]
        name = f"{self.name} for {' and '.join(of)}" if of else self.name
        training = self.train(self.halves.at({**numbers, **floats}), name)
        training.callers, training._modes = self.callers, self._modes
        self.known[key] = training
        self.file(training)
        return training


@dataclass(frozen=True, eq=False)
class Others:
    """Calls of a graph that are not captured."""

    uncaptured: EagerGraph
    callers: Callers
