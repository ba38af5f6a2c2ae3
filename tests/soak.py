"""Many minutes on a GPU: does anything grow, go wrong or get stuck? ``make soak MINUTES=8``.

In each phase twelve threads serve new models of changing sizes, capture and replay by hand, draw, evict, reset and churn the
allocator; then all of it dies. What is left is counted after each phase, and must not grow from the third phase on.
"""

from __future__ import annotations

import argparse
import gc
import json
import linecache
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from breakable_backend import breakable_cg, reset
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import cuda
from crowd import KEYS, Crowd, shifted

CHECKED = 7
"""Every how many results of a model one is compared with eager, bit for bit. What the crowd does is compared each time."""
SIZES = range(8, 80, 8)
"""Batch sizes of the models."""
ROOM = 2
"""``max_recordings``. So a key goes for a new one after eight calls without it."""
WARM_PHASES = 2
SLACK = 1 << 20
"""Bytes that may come and go: the allocator's and the libraries' own."""


@dataclass
class Left:
    """What is left after a phase."""

    phase: int
    seconds: float
    allocated: int
    reserved: int
    pool: int
    objects: int
    files: int
    lines: int
    threads: int

    @classmethod
    def after(cls, phase: int, began: float) -> Left:
        torch.compiler.reset()
        for _ in range(3):
            gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        ours = [thing for thing in gc.get_objects() if str(type(thing).__module__).startswith("breakable_backend")]
        return cls(
            phase,
            round(time.monotonic() - began, 1),
            torch.cuda.memory_allocated(),
            torch.cuda.memory_reserved(),
            sum(driver.pool_bytes() for driver in list(cuda._drivers)),
            len(ours),
            len(os.listdir("/proc/self/fd")),
            sum(name.startswith("<breakable_cg") for name in linecache.cache),
            threading.active_count(),
        )


class Block(nn.Module):
    """Linear, an eager step, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.outer(shifted(functional.gelu(self.inner(x)))))


class Phase(Crowd):
    """One generation of models, with those who use them."""

    def __init__(self, device: torch.device, checks: Counter[str]) -> None:
        options: Any = {"driver": "cuda", "max_recordings": ROOM}
        super().__init__(device, breakable_cg, options)
        self.checks = checks
        width = random.choice([64, 128, 192])
        self.model = nn.Sequential(Block(width), Block(width)).to(device)
        self.width = width
        self.served = torch.compile(self.model, backend=breakable_cg, options=options, dynamic=True)
        with torch.no_grad():
            # All is compiled before the threads start: Dynamo's compilations disturb calls in other threads.
            for size in SIZES:
                self.served(torch.randn(size, width, device=device))

    def works(self) -> list[Any]:
        crowd = [self.captures_draws, self.captures, self.calls_draws, self.calls]
        return [*crowd, *crowd, self.serves, self.serves, self.churns, self.resets]

    def key(self, work: str) -> int:
        """Two keys take turns: one is replayed while the other is new, waits for its place, and evicts the one before."""
        count = self.rounds[work]
        return (count // 4 + count % 2) % KEYS

    def serves(self) -> None:
        """A call with one of two sizes; every so often one of the two makes room for another."""
        count = self.rounds["serves"]
        size = SIZES[(count // 10 + count % 2) % len(SIZES)]
        x = torch.full((size, self.width), float(count % 7), device=self.device)
        got = self.served(x)
        with self._lock:
            self.checks["served"] += 1
            checked = self.checks["served"] % CHECKED == 0
        if checked:
            self.checks["compared"] += 1
            assert torch.equal(got, self.model(x)), "differs from eager"

    def churns(self) -> None:
        """Takes and gives back memory of all sizes, filled with what nobody wants to read."""
        sizes = [random.choice([1, 600, 70_000, 3_000_000]) for _ in range(20)]
        held = [torch.full((size,), float("nan"), device=self.device) for size in sizes]
        del held[::2]
        time.sleep(0.002)

    def resets(self) -> None:
        """Resets what the others are calling."""
        reset(random.choice([self.served, self.plain, self.drops]))
        time.sleep(2.0)  # time for some evictions


def soak(
    minutes: float, seconds: float, device: torch.device
) -> tuple[list[Left], Counter[str], Counter[str], Counter[str]]:
    """Phase after phase; what was left after each, the rounds, the checks and the errors."""
    began, left = time.monotonic(), []
    rounds: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    while time.monotonic() - began < 60 * minutes or len(left) <= WARM_PHASES:
        phase = Phase(device, checks)
        phase.run(seconds, phase.works())
        if phase.drawn and abs(phase.kept / phase.drawn - 0.5) > 5 * (0.25 / phase.drawn) ** 0.5:
            errors[f"kept {phase.kept} of {phase.drawn} draws"] += 1
        rounds += phase.rounds
        errors += phase.errors
        checks["recordings"] += sum(
            e.statistics.recordings for f in (phase.served, phase.drops, phase.plain) for e in executors_of(f)
        )
        checks["evictions"] += sum(
            e.statistics.evictions for f in (phase.served, phase.drops, phase.plain) for e in executors_of(f)
        )
        del phase
        left.append(Left.after(len(left) + 1, began))
        print(left[-1], dict(errors), flush=True)
    return left, rounds, checks, errors


def table(left: list[Left]) -> str:
    """The first phases, the first that counts, and the last, as Markdown."""
    rows = [*left[: WARM_PHASES + 1], *left[WARM_PHASES + 1 :: max(1, len(left) // 8)], left[-1]]
    head = list(asdict(left[0]))
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    shown = {row.phase: row for row in rows}
    lines += [f"| {' | '.join(str(value) for value in asdict(row).values())} |" for row in shown.values()]
    return "\n".join(lines)


def grown(left: list[Left]) -> list[str]:
    """What grew between the first phase that counts and the last."""
    first, last = left[WARM_PHASES], left[-1]
    found = []
    for name, slack in {
        "allocated": SLACK,
        "reserved": 32 * SLACK,
        "pool": 0,
        "objects": 50,
        "files": 2,
        "lines": 0,
    }.items():
        before, after = getattr(first, name), getattr(last, name)
        if after > before + slack:
            found.append(f"{name}: {before} -> {after}")
    return found


def main() -> int:
    """Print the table; the exit status says whether all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of one phase")
    parser.add_argument("--out", type=Path, default=None, help="where to write the figures, as JSON")
    chosen = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    left, rounds, checks, errors = soak(chosen.minutes, chosen.seconds, torch.device("cuda", 0))
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(table(left))
    print("rounds:", dict(rounds))
    print("checks:", dict(checks))
    print("errors:", dict(errors))
    print("grown:", grown(left))
    if chosen.out is not None:
        figures = {"left": [asdict(row) for row in left], "rounds": rounds, "checks": checks, "errors": errors}
        chosen.out.write_text(json.dumps(figures, indent=1))
    return 1 if errors or grown(left) else 0


if __name__ == "__main__":
    sys.exit(main())
