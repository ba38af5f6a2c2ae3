"""Threads that capture, replay and drop graphs at once: what the tests do for seconds, and a soak for minutes."""

from __future__ import annotations

import collections
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph

SIZE = 4096
KEYS = 80
"""Sizes that a crowd calls its functions with."""


@eager_on_graph
def shifted(x: torch.Tensor) -> torch.Tensor:
    """An eager step."""
    return x + 1


class Crowd:
    """Eight threads on one GPU. Each does one thing over and over, and writes down every error."""

    def __init__(self, device: torch.device, backend: Any, options: dict[str, Any] | None = None) -> None:
        self.device = device
        self.errors: collections.Counter[str] = collections.Counter()
        self.rounds: collections.Counter[str] = collections.Counter()
        self.kept = 0
        self.drawn = 0
        self._lock = threading.Lock()
        self.drops = torch.compile(
            lambda x: functional.dropout(x * 2, 0.5) + 0, backend=backend, options=options, dynamic=True
        )
        self.plain = torch.compile(lambda x: shifted(x * 3 - 1) * 6 - 9, backend=backend, options=options, dynamic=True)
        with torch.no_grad():
            for size in (SIZE, SIZE + 2):
                self.drops(torch.ones(size, device=device))
                self.plain(torch.ones(size, device=device))

    def run(self, seconds: float, works: list[Callable[[], None]] | None = None, rounds: int = 0) -> None:
        """Let the threads work; each on a stream of its own. Up to a minute longer where a busy host has not done ``rounds`` yet.

        What is compiled is compiled before: while one thread traces, torch refuses the calls of all others.
        """
        works = works or [self.captures_draws, self.captures, self.calls_draws, self.calls] * 2
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(self.device)):
            for thing in dict.fromkeys(works):
                thing()
        until = time.monotonic() + seconds

        def go_on() -> bool:
            now = time.monotonic()
            return now < until or (now < until + 60 and min(self.rounds[thing.__name__] for thing in works) < rounds)

        def work(thing: Callable[[], None]) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(self.device)):
                while go_on():
                    try:
                        thing()
                        self.rounds[thing.__name__] += 1
                    except Exception as error:  # noqa: BLE001 - counted
                        with self._lock:
                            self.errors[
                                f"{thing.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
                            ] += 1

        threads = [threading.Thread(target=work, args=(thing,)) for thing in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 180)
            assert not thread.is_alive(), "a thread hangs"
        gc.collect()

    def key(self, work: str) -> int:
        """Which of the sizes the next round of ``work`` has: each round another one."""
        return self.rounds[work] % KEYS

    def ones(self, size: int = SIZE) -> torch.Tensor:
        return torch.ones(size, device=self.device)

    def captures_draws(self) -> None:
        """By the second door: a graph that draws, with an eager step in it, replayed and dropped."""
        x, graph = self.ones(), BreakableCUDAGraph(driver="cuda")
        with capture(graph):
            y = functional.dropout(shifted(functional.dropout(x, 0.5) * 0) * x, 0.5)
        for value in (2.0, 3.0):
            x.fill_(value)
            graph.replay()
            self._count(y, 2 * value)

    def captures(self) -> None:
        """By the second door: a graph that does not draw."""
        x, graph = self.ones(), BreakableCUDAGraph(driver="cuda")
        with capture(graph):
            y = x * 3
        for value in (2.0, 3.0):
            x.fill_(value)
            graph.replay()
            self._equal(y, 3 * value)

    def calls_draws(self) -> None:
        """By the first door: new keys and old ones of a function that draws."""
        x = self.ones(SIZE + 2 * self.key("calls_draws"))
        for _ in range(3):
            self._count(self.drops(x), 4.0)

    def calls(self) -> None:
        """By the first door: new keys and old ones of a function with an eager step."""
        x = self.ones(SIZE + 2 * self.key("calls"))
        for _ in range(3):
            self._equal(self.plain(x), 9.0)

    def _equal(self, y: torch.Tensor, value: float) -> None:
        got = set(y.tolist())
        assert got == {value}, f"{sorted(got)[:3]} for {value}"

    def _count(self, y: torch.Tensor, value: float) -> None:
        values = y.tolist()
        kept = values.count(value)
        assert kept + values.count(0.0) == len(values), f"{sorted(set(values))[:3]} for 0 and {value}"
        # 4096 draws of one half: 0.5, give or take 0.0078; 8 of those come by chance never
        assert abs(kept / len(values) - 0.5) < 0.0625, f"kept {kept} of {len(values)}"
        with self._lock:
            self.kept += kept
            self.drawn += len(values)
