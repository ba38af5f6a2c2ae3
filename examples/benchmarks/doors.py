"""What a break costs through each door, in turns within one process, and what a capture without one does.

    PYTHONPATH=. python examples/benchmarks/doors.py

- no break: 30 small kernels; ``graph.replay()`` against ``torch.cuda.CUDAGraph.replay()``: host time. Goal: at most 1.05;
- the same with ``torch.profiler`` active, when segments have names in the profile; without one a call reads one flag;
- 16 breaks: the transformer of ``replay.py``; captured by hand (the floor), by ``capture``, by ``torch.compile`` with this
  backend and with ``mode="reduce-overhead"``.

Host: microseconds to issue a call, in loops of 5 calls that start with an idle GPU. Total: until the GPU is done, in
loops of 50. Each number is the median of the turns; a ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import replay  # from beside this file
import torch

from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph

TURNS = 9
Call = Callable[[], object]


def host(call: Call, calls: int = 5, loops: int = 20) -> float:
    taken = []
    for _ in range(loops):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return median(taken)


def total(call: Call, calls: int = 50) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def compare(title: str, floor: str, **contenders: Call) -> None:
    """Time the contenders in turns; prints medians, and ratios to the floor."""
    for call in contenders.values():
        for _ in range(10):
            call()
    for what, measure in (("host", host), ("total", total)):
        turns = [{name: measure(call) for name, call in contenders.items()} for _ in range(TURNS)]
        for name in contenders:
            ratio = median(turn[name] / turn[floor] for turn in turns)
            print(f"{title}: {what:5} {name:20} {median(turn[name] for turn in turns):8.1f} us  {ratio:5.2f} x {floor}")


def no_break(device: torch.device) -> None:
    x = torch.randn(64, device=device)

    def body() -> torch.Tensor:
        y = x
        for _ in range(30):
            y = y + 1
        return y

    body()
    plain, ours = torch.cuda.CUDAGraph(), BreakableCUDAGraph()
    with torch.cuda.graph(plain):
        kept = [body()]
    with capture(ours):
        kept.append(body())
    contenders: dict[str, Call] = {"CUDAGraph.replay": plain.replay, "graph.replay": ours.replay}
    compare("no break", "CUDAGraph.replay", **contenders)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        compare("no break, profiled", "CUDAGraph.replay", **contenders)


def breaks(device: torch.device) -> None:
    work = replay.Transformer(16, device)
    x = work.inputs[0].clone()
    by_hand = replay.prepare_by_hand(work, smoke=False)
    compiled = torch.compile(work.module, backend="breakable_cg")
    torch._inductor.config.graph_partition = True
    rival = torch.compile(work.module, mode="reduce-overhead")
    graph, marked = BreakableCUDAGraph(), eager_on_graph(replay.attend)
    with capture(graph):
        result = replay.drive(work.steps(x), marked)

    def captured() -> torch.Tensor:
        x.copy_(work.inputs[1])
        graph.replay()
        return result

    captured()
    assert torch.equal(result, work.module(work.inputs[1]))
    contenders: dict[str, Call] = {
        "by hand": lambda: by_hand.call(work.inputs[1]),
        "capture": captured,
        "torch.compile": lambda: compiled(work.inputs[1]),
        "reduce-overhead": lambda: rival(work.inputs[1]),
    }
    compare("16 breaks", "by hand", **contenders)


def main() -> int:
    if not torch.cuda.is_available():
        print("this measures CUDA graphs and needs a CUDA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), torch.__version__)
    with torch.no_grad():
        no_break(device)
        breaks(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
