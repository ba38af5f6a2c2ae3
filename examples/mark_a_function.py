"""Mark a Python function: it runs eagerly in a compiled model, and all around it is captured.

    python examples/mark_a_function.py

The function draws each sequence's next token by nucleus sampling, with a loop in Python that looks at values. Nothing
is registered and no schema is written. The same function works in eager code, and under any other backend.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from breakable_backend import eager_on_graph, explain


def shapes(probabilities: Tensor, nucleus: float) -> tuple[Tensor, dict[str, Tensor]]:
    """What the results look like: asked once for each shape, since the function looks at values."""
    tokens = probabilities.new_empty(len(probabilities), dtype=torch.long)
    return tokens, {"kept": probabilities.new_empty(len(probabilities), dtype=torch.long)}


@eager_on_graph(fake=shapes)
def sample(probabilities: Tensor, nucleus: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The likeliest tokens that make up ``nucleus`` of the probability, and one of them by chance."""
    tokens, kept = [], []
    for row in probabilities:
        values, order = row.sort(descending=True)
        count = max(1, int((values.cumsum(0) < nucleus).sum().item()))
        tokens.append(order[torch.multinomial(values[:count], 1)].squeeze(0))
        kept.append(count)
    return torch.stack(tokens), {"kept": torch.tensor(kept, device=probabilities.device)}


class Sampler(nn.Module):
    """Two layers, a choice of token, and the embedding of what was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.embedding = nn.Linear(64, 256), nn.Linear(256, 100), nn.Embedding(100, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.down(torch.relu(self.up(x))).softmax(-1)
        tokens, facts = sample(probabilities, 0.8)
        return x + self.embedding(tokens) * 0.1, facts["kept"] * 100 // 100


def main() -> int:
    """Compare compiled with eager bit for bit, from the same seeds; 0 if all is equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Sampler().to(device).eval()
    options = {"driver": "cuda" if device.type == "cuda" else "tape"}
    compiled = torch.compile(model, backend="breakable_cg", options=options, fullgraph=True)
    equal = True
    with torch.no_grad():
        for seed in range(5):
            results = []
            for call in (compiled, model):
                torch.manual_seed(seed)
                x = torch.randn(8, 64, device=device)
                results.append(call(x))
            equal &= all(map(torch.equal, *results))
    report = explain(compiled)
    print(report)
    print(f"equal to eager bit for bit: {equal}")
    (program,) = report.programs
    return 0 if equal and (program.num_graph_segments, program.num_eager_segments) == (2, 1) else 1


if __name__ == "__main__":
    sys.exit(main())
