"""Capture a model that Dynamo cannot trace whole: a mixture of experts whose routing is plain Python.

    python examples/capture_by_hand.py

Each token goes to one expert, and only experts that got tokens run: Python reads the counts on the host, so no CUDA
graph can hold it. Marked with ``@eager_on_graph`` it runs between captured segments, and the rest is captured. Compares
with eager bit for bit, shows what was captured, and on a GPU the time per call. On a machine without one the tape
driver stands in, which shows what would be captured and not how fast.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain


class Experts(nn.Module):
    """Runs each expert on the tokens that chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / width**0.5)

    @eager_on_graph
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        counts = torch.bincount(chosen, minlength=len(self.up)).tolist()  # a host sync: what no graph can hold
        order = chosen.argsort(stable=True)
        result, start = torch.empty_like(x), 0
        for expert, count in enumerate(counts):
            if count:
                rows = order[start : start + count]
                result[rows] = torch.relu(x[rows] @ self.up[expert]) @ self.down[expert]
            start += count
        return result


class Block(nn.Module):
    """Attention, then a mixture of experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.experts = nn.Linear(width, experts), Experts(width, experts)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(0) for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(0))
        normed = self.norms[1](x)
        scores = self.gate(normed).softmax(-1)
        weight, chosen = scores.max(-1)
        return x + self.experts(normed, chosen) * weight.unsqueeze(-1)


def model(device: torch.device, *, layers: int, width: int, experts: int = 8) -> nn.Sequential:
    """Blocks with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, experts) for _ in range(layers))).to(device).eval()


def microseconds(call: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Median time of a call, until the device is done."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2] * 1e6


def main() -> int:
    """Capture, replay on new inputs, compare; 0 if all is equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers, tokens, width = (16, 16, 512) if device.type == "cuda" else (4, 16, 32)
    with torch.no_grad():
        moe = model(device, layers=layers, width=width)
        x = torch.randn(tokens, width, device=device)
        moe(x)  # loads kernels
        graph = BreakableCUDAGraph(driver="cuda" if device.type == "cuda" else "tape")
        with capture(graph):
            y = moe(x)

        equal = True
        for seed in range(5):
            torch.manual_seed(seed)
            x.copy_(torch.randn_like(x))
            graph.replay()
            equal &= torch.equal(y, moe(x))
        print(explain(graph))
        print(f"{graph!r} on {device}; equal to eager bit for bit: {equal}")
        if device.type == "cuda":
            eager, replay = microseconds(lambda: moe(x), device), microseconds(graph.replay, device)
            print(f"a call: {eager:,.0f} us in eager, {replay:,.0f} us replayed ({eager / replay:.2f}x)")
    recording = graph.recording
    as_expected = recording is not None and len(recording.graphs) == layers + 1
    return 0 if equal and as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
