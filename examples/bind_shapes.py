"""Bind a compiled model to the shapes that an engine knows: each call is then without Dynamo's guards.

    python examples/bind_shapes.py

A serving engine pads its batches to a few sizes. For each it binds the model once, and calls what belongs to the batch.
What a bound call cannot take (here: weights of another dtype) is noticed, and goes to the compiled model.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from breakable_backend import bind, eager_on_graph, explain


def shape(scores: Tensor) -> Tensor:
    """What the result looks like."""
    return torch.empty_like(scores)


@eager_on_graph(fake=shape)
def keep_the_best(scores: Tensor) -> Tensor:
    """The scores above half of the best; reads it on the host."""
    return scores * (scores > float(scores.max()) / 2)


class Ranker(nn.Module):
    """Two layers with a step between them that no CUDA graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(keep_the_best(torch.relu(self.up(x)))) + x


def main() -> int:
    """Compare bound calls with eager bit for bit; 0 if all is equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Ranker().to(device).eval()
    options = {"driver": "cuda" if device.type == "cuda" else "tape"}
    compiled = torch.compile(model, backend="breakable_cg", options=options, dynamic=False)
    with torch.no_grad():
        bound = {size: bind(compiled, torch.zeros(size, 64, device=device), misfit="raise") for size in (1, 2, 4, 8)}
        equal = True
        for number in (1, 3, 8, 5, 2):
            requests = torch.rand(number, 64, device=device)
            size = min(size for size in bound if size >= number)
            batch = torch.cat([requests, requests.new_zeros(size - number, 64)])
            equal &= torch.equal(bound[size](batch), model(batch))
        tolerant = bind(compiled, torch.zeros(4, 64, device=device))
        model.double()
        batch = torch.rand(4, 64, device=device, dtype=torch.float64)
        equal &= torch.equal(tolerant(batch), model(batch))
    print(explain(compiled))
    print(f"went to the compiled model: {dict(tolerant.misfits)}")
    print("bitwise equal" if equal else "DIFFERENT")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
