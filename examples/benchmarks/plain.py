"""What is not captured, and what comes before a capture: each as a ratio, taken in turns where one process can hold both.

    PYTHONPATH=. python examples/benchmarks/plain.py                    # all of it
    PYTHONPATH=. python examples/benchmarks/plain.py calls compiling    # some parts
    PYTHONPATH=. python examples/benchmarks/plain.py --smoke            # few turns: does the script run?

- ``calls``: calls that run plainly, against ``aot_eager`` in turns: 100 small ops, and 60 marked ones, in programs without
  a segment, with one key too many, with arguments that overlap, and with a busy pool. The median of the turns' ratios; on a
  CPU, of the time that this thread had one.
- ``compiling``: a transformer of 16 blocks with 16 breaks, whose number of tokens varies, and does not. Milliseconds of this
  thread a node, for the partition and for the function of plain calls; milliseconds of a recording, from the second
  recording on.
- ``imports``: seconds that ``import breakable_backend`` adds to ``import torch``, and ``import torch`` itself, from compiled
  files as an installed package has them; medians of five fresh processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import breakable_backend
from breakable_backend.calling.registry import executors_of
from breakable_backend.compiling.partition import partition
from breakable_backend.recordings.plain import write_plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMOKE = "--smoke" in sys.argv
TURNS = 3 if SMOKE else 41
clock = time.perf_counter if DEVICE.type == "cuda" else time.thread_time


@torch.library.custom_op("plain::twice", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_fake(torch.empty_like)


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# --- calls ------------------------------------------------------------------------------------------------------------


def small(x: Tensor) -> Tensor:
    for _ in range(50):
        x = x.sin() + 1
    return x


def marked(x: Tensor) -> Tensor:
    for _ in range(60):
        x = twice(x)
    return x


def mixed(x: Tensor) -> Tensor:
    for _ in range(30):
        x = twice(twice(x) + 1)
    return x


def overlapping(a: Tensor, b: Tensor) -> Tensor:
    a.add_(1)
    return small(b) + a


def overlapping_marked(a: Tensor, b: Tensor) -> Tensor:
    a.add_(1)
    return mixed(b) + a


@contextmanager
def busy_pool(compiled: Any) -> Iterator[None]:
    """Another thread has the pool; the call that waits for it in vain comes before the clock starts."""
    (executor,) = executors_of(compiled)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with executor.driver.lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        compiled(torch.randn(4, device=DEVICE))
        yield
    finally:
        done.set()
        thread.join()


def calls() -> None:
    base = torch.zeros(16, device=DEVICE)
    sizes = iter(range(10**9))

    def one() -> tuple[Tensor, ...]:
        return (torch.randn(4, device=DEVICE),)

    def many() -> tuple[Tensor, ...]:
        return (torch.randn(3 + next(sizes) % 40, device=DEVICE),)

    def two() -> tuple[Tensor, ...]:
        return base[0:8], base[2:10]

    uncut, one_key = {"min_kernels": 1000}, {"max_recordings": 1, "min_kernels": 1}
    cases: list[tuple[str, Callable[..., Any], Callable[[], tuple[Tensor, ...]], dict[str, Any]]] = [
        ("100 small ops, no segment", small, one, uncut),
        ("60 marked ops, no segment", marked, one, {}),
        ("100 small ops, no segment, sizes vary", small, many, uncut),
        ("60 marked ops, no segment, sizes vary", marked, many, {}),
        ("100 small ops, too many keys", small, many, one_key),
        ("60 marked ops, too many keys", mixed, many, one_key),
        ("100 small ops, arguments overlap", overlapping, two, {"min_kernels": 1}),
        ("60 marked ops, arguments overlap", overlapping_marked, two, {"min_kernels": 1}),
        ("100 small ops, busy pool", small, one, {"min_kernels": 1}),
        ("60 marked ops, busy pool", mixed, one, {"min_kernels": 1}),
    ]
    for name, function, make, options in cases:
        torch.compiler.reset()
        dynamic = make is many
        theirs = torch.compile(function, backend="aot_eager", dynamic=dynamic)
        ours = torch.compile(function, backend="breakable_cg", options=options, dynamic=dynamic)
        taken: dict[Any, list[float]] = {theirs: [], ours: []}
        for compiled in taken:
            for _ in range(8):
                compiled(*make())
        with busy_pool(ours) if "busy" in name else torch.no_grad():
            for _ in range(TURNS):
                for compiled, times in taken.items():
                    arguments = [make() for _ in range(5)]
                    sync()
                    start = clock()
                    for args in arguments:
                        compiled(*args)
                    sync()
                    times.append((clock() - start) / 5e-6)
        (program,) = breakable_backend.explain(ours).programs
        assert sum(program.plain_calls.values()) >= 5 * TURNS, program
        ratio = median(mine / base for mine, base in zip(taken[ours], taken[theirs], strict=True))
        print(f"{name:40} aot_eager {median(taken[theirs]):7.0f} us, ours {ratio:5.2f} x", flush=True)


# --- before a capture -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
        x = x + self.out(twice(q * k + v))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def transformer() -> tuple[nn.Module, Tensor]:
    width = 64 if SMOKE else 512
    model = nn.Sequential(*[Block(width) for _ in range(4 if SMOKE else 16)]).to(DEVICE).eval()
    return model, torch.randn(1, 16, width, device=DEVICE)


def compiling() -> None:
    for sizes_vary in (True, False):
        torch.compiler.reset()
        compile_once(sizes_vary)


def compile_once(sizes_vary: bool) -> None:
    model, x = transformer()
    if sizes_vary:
        torch._dynamo.mark_dynamic(x, 1)
    compiled = torch.compile(model, backend="breakable_cg")
    compiled(x)
    (executor,) = executors_of(compiled)
    nodes = len(executor.lowered.module.graph.nodes)
    for name, make in (
        ("partition", lambda: partition(executor.lowered, executor.scope, min_kernels=executor.options.min_kernels)),
        ("plain call", lambda: write_plain(executor.lowered, executor.program, executor.driver.drawing, "plain")),
    ):
        taken = []
        for _ in range(25):
            start = time.thread_time()
            make()
            taken.append((time.thread_time() - start) * 1e3 / nodes)
        which = ", sizes vary" if sizes_vary else ""
        print(f"{name}{which}: {median(taken):.4f} ms a node, of {nodes}; the least {min(taken):.4f}", flush=True)
    taken = []
    for _ in range(6):
        compiled(x)
        ((entry,),) = (found.entries.values() for found in executor.keys.sets.values())
        taken.append(entry.record_seconds * 1e3)
        breakable_backend.reset(compiled)
        compiled(x)
    print(
        f"recording {entry.captures or len(executor.program.graph_segments)} segments: {taken[0]:.1f} ms, then {median(taken[1:]):.1f} ms",
        flush=True,
    )


def imports() -> None:
    program = """
import time
marks = [(time.perf_counter(), time.process_time())]
import torch
marks.append((time.perf_counter(), time.process_time()))
import breakable_backend
marks.append((time.perf_counter(), time.process_time()))
print(*[after - before for start, end in zip(marks, marks[1:]) for before, after in zip(start, end)])
"""
    with tempfile.TemporaryDirectory() as bytecode:  # as an installed package has it, made by the first process
        env = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        rows = [
            tuple(map(float, subprocess.check_output([sys.executable, "-c", program], env=env, text=True).split()))
            for _ in range(2 if SMOKE else 6)
        ][1:]
    torch_s, torch_cpu, ours, ours_cpu = (median(column) for column in zip(*rows, strict=True))
    print(
        f"import torch: {torch_s:.2f} s ({torch_cpu:.2f} s of a processor); "
        f"import breakable_backend adds {ours:.2f} s ({ours_cpu:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {part.__name__: part for part in (calls, compiling, imports)}
    named = [word for word in sys.argv[1:] if not word.startswith("--")]
    with torch.no_grad():
        for part in named or parts:
            parts[part]()
