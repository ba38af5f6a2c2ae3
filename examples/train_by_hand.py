"""Capture a whole step of training: forward, backward, clipping, GradScaler and optimizer, with eager steps in it.

    python examples/train_by_hand.py

The model has a mixture of experts in each block, whose routing is plain Python: it reads on the host how many rows each
expert got. Marked with ``@eager_on_graph`` it runs between captured segments, in the forward, and so do its gradients in the
backward. A step adds up the gradients of two micro batches under autocast. Compares losses and weights with eager's, bit
for bit, and on a GPU the time of a step. Without one the tape driver stands in, which shows no speed.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain

STEPS = 20


class Experts(nn.Module):
    """Runs each expert on the rows that chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / width**0.5)

    @eager_on_graph
    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        counts = torch.bincount(chosen, minlength=len(self.up)).tolist()  # the host waits for the GPU here
        order = chosen.argsort(stable=True)
        parts = [
            torch.relu(rows @ self.up[expert]) @ self.down[expert] for expert, rows in enumerate(x[order].split(counts))
        ]
        return torch.cat(parts)[order.argsort()]


class Block(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts, self.dropout = Experts(width, experts), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        weight, chosen = self.gate(normed).softmax(-1).max(-1)
        return x + self.dropout(self.experts(normed, chosen) * weight.unsqueeze(-1))


@dataclass
class Training:
    """A model, and what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @classmethod
    def of(cls, model: nn.Module) -> Training:
        device = next(model.parameters()).device.type
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True, capturable=device == "cuda")
        return cls(model, optimizer, torch.amp.GradScaler(device, init_scale=2.0**8))

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step, which the loss comes of. Nothing in it reads on the host, but for the marked experts."""
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay where they are
        total = torch.zeros((), device=x.device)
        for part, label in zip(x.chunk(2), labels.chunk(2), strict=True):
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.model(part), label) / 2
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total


def batch(number: int, x: Tensor, labels: Tensor, teacher: Tensor) -> None:
    """New values in the same tensors: what a graph reads stays at its address."""
    torch.manual_seed(number)
    x.normal_()
    labels.copy_((x @ teacher).argmax(-1))


def main() -> int:
    """Train twice and compare; 0 if all losses and weights have the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order then
    were = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return compare(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        torch.use_deterministic_algorithms(were)


def compare(device: torch.device) -> int:
    blocks, width, rows = (12, 256, 128) if device.type == "cuda" else (2, 16, 32)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, 4) for _ in range(blocks)), nn.Linear(width, 10)).to(device)
    theirs, ours = Training.of(copy.deepcopy(model)), Training.of(model)
    teacher = torch.randn(width, 10, device=device)
    x, labels = torch.empty(rows, width, device=device), torch.empty(rows, dtype=torch.long, device=device)

    expected, taken = [], time.perf_counter()
    for number in range(STEPS):
        batch(number, x, labels, teacher)
        expected.append(theirs.step(x, labels))
    eager_seconds = (synchronized(device) - taken) / STEPS

    batch(0, x, labels, teacher)
    losses = [ours.step(x, labels)]  # makes gradients, the state of the optimizer and the scale, and loads kernels
    graph = BreakableCUDAGraph(driver="cuda" if device.type == "cuda" else "tape")
    batch(1, x, labels, teacher)
    with capture(graph):
        loss = ours.step(x, labels)
    losses.append(loss.clone())
    taken = time.perf_counter()
    for number in range(2, STEPS):
        batch(number, x, labels, teacher)
        graph.replay()
        losses.append(loss.clone())
    seconds = (synchronized(device) - taken) / (STEPS - 2)

    print(explain(graph))
    print(f"{graph!r} on {device}: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if device.type == "cuda":
        print(f"a step: {eager_seconds * 1e3:.1f} ms in eager, {seconds * 1e3:.1f} ms replayed")
    same = all(map(torch.equal, losses, expected))
    same &= all(map(torch.equal, model.parameters(), theirs.model.parameters()))
    print("all losses and all weights are the same, bit for bit" if same else "not as in eager")
    recording = graph.recording
    breaks = 2 * 2 * blocks  # for each micro batch, forward and backward
    as_expected = recording is not None and len(recording.graphs) == breaks + 1
    return 0 if same and as_expected else 1


def synchronized(device: torch.device) -> float:
    """The time, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
