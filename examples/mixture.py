"""A mixture of experts whose routing is plain Python: it reads counts, loops, and skips experts that nobody chose.

No CUDA graph can hold the routing, and Dynamo would break its graph there. ``@eager_on_graph`` marks it: all around it is
captured, and the layer runs as it stands, on real tensors. Training goes the same way: an expert that nobody chose has no
gradient in that step, as in eager. It needs nothing but this package.
"""

from __future__ import annotations

import copy
import os
import sys

import torch
from torch import Tensor, nn

from breakable_backend import eager_on_graph, explain

WIDTH, EXPERTS, CHOSEN, LAYERS, STEPS = 64, 8, 2, 4, 20


class Experts(nn.Module):
    """Feed-forward experts, of which each token uses :data:`CHOSEN`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )
        self.calls_of_experts = 0

    @eager_on_graph
    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (tokens, width): the weighted sum of what the chosen experts make of each token."""
        weights, chosen = self.router(x).softmax(-1).topk(CHOSEN)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if len(token) == 0:  # a size that is known on the GPU alone: the host waits here
                continue
            self.calls_of_experts += 1  # happens in each call, as in eager
            result.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.mix(self.norm(x)))
        return x + self.experts(self.norm(x))


def main() -> int:
    """Calls and steps of training, eagerly and compiled; 0 if all have the same bits, from replays of whole programs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order then
    were = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        model = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)).to(device)
        return infer(model.eval(), device) or train(model.train(), device)
    finally:
        torch.use_deterministic_algorithms(were)


def compiled_by_us(model: nn.Module, device: torch.device) -> nn.Module:
    options = {} if device.type == "cuda" else {"driver": "tape"}
    return torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)  # type: ignore[return-value]


def train(eager: nn.Module, device: torch.device) -> int:
    """Steps of AdamW, which moves a weight that has a gradient of zeros, and leaves one alone that has none."""
    model = copy.deepcopy(eager)
    compiled = compiled_by_us(model, device)
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (model, eager)]
    without = 0
    for number in range(STEPS):
        x = torch.randn(8, WIDTH, device=device)
        for function, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            (function(x) - x).square().mean().backward()
            optimizer.step()
        for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            without += theirs.grad is None
            if (mine.grad is None) != (theirs.grad is None) or not torch.equal(mine, theirs):
                print(f"step {number}: other bits than eager's")
                return 1
    halves = [program for program in explain(compiled).programs if program.replays]
    for half in halves:
        print(f"{half.name}: {half.num_graph_segments} captured segments, replayed in {half.replays} of {STEPS} steps")
    print(f"{without} times a weight had no gradient; same bits as eager")
    return 0 if len(halves) == 2 and without else 1


@torch.no_grad()
def infer(model: nn.Module, device: torch.device) -> int:
    """Six calls of one program."""
    compiled = compiled_by_us(model, device)
    for number in range(6):
        x = torch.randn(16, WIDTH, device=device)
        if not torch.equal(compiled(x), model(x)):
            print(f"call {number}: other bits than eager's")
            return 1
    report = explain(compiled)
    print(report)
    (program,) = report.programs
    print(
        f"\n{program.num_graph_segments} captured segments, {program.num_eager_segments} eager steps; same bits as eager"
    )
    learned = not report.learning  # call 1 learned what the marked method returns, call 2 compiled
    return 0 if learned and program.num_eager_segments == LAYERS and program.replays >= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
