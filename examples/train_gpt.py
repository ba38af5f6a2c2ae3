"""A small GPT trains on the documentation of this package, eagerly and compiled: both loss curves have the same bits.

Forward and backward are captured. The attention of each block is marked: it is plain Python that reads on the host where
sections of the text begin, since no character attends to another section. No CUDA graph can hold that. Dropout,
gradient clipping and AdamW are as in any training loop. Without a GPU the tape driver stands in for CUDA graphs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from breakable_backend import eager_on_graph, explain

DOCS = Path(__file__).parents[1] / "docs"
DROPOUT = 0.1


@dataclass(frozen=True)
class Sizes:
    blocks: int
    width: int
    heads: int
    length: int
    """Bytes of text in one sample."""
    batch: int
    steps: int


ON_GPU = Sizes(blocks=6, width=384, heads=6, length=256, batch=8, steps=200)
ON_CPU = Sizes(blocks=2, width=64, heads=2, length=64, batch=8, steps=30)


# --- the model ----------------------------------------------------------------------------------------------------------


@eager_on_graph
def attend(qkv: Tensor, begins: Tensor, heads: int, dropout: float) -> Tensor:
    """Causal attention inside of each section, of shape (batch, length, width).

    Args:
        qkv: queries, keys and values, of shape (batch, length, 3 * width).
        begins: true where a section begins, and at the first byte of each sample, of shape (batch, length).
        heads: a divisor of the width.
        dropout: the probability with which a weight is dropped.
    """
    starts = [*begins.flatten().nonzero().flatten().tolist(), begins.numel()]  # the host waits for the GPU here
    results = []
    for start, end in itertools.pairwise(starts):
        section = qkv.flatten(0, 1)[start:end]
        query, key, value = section.unflatten(-1, (3, heads, -1)).permute(1, 2, 0, 3)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=qkv.device).triu(1)
        weights = F.dropout(scores.masked_fill(later, -torch.inf).softmax(-1), dropout, training=dropout > 0)
        results.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat(results).unflatten(0, begins.shape)


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, begins: Tensor) -> Tensor:
        attended = attend(self.qkv(self.before(x)), begins, self.heads, DROPOUT if self.training else 0.0)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.down(F.gelu(self.up(self.between(x)))))


class Gpt(nn.Module):
    """Bytes, the bytes that follow them, and where sections begin; the loss out."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, sizes.width), nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, 256)

    def forward(self, text: Tensor, following: Tensor, begins: Tensor) -> Tensor:
        x = self.bytes(text) + self.places(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x, begins)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())


# --- the training -------------------------------------------------------------------------------------------------------


class Samples:
    """Parts of the text, drawn with a seed of their own."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        text = b"\n".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
        self.begins = F.pad((self.text[1:] == ord("#")) & (self.text[:-1] == ord("\n")), (1, 0))  # "\n# A headline"
        self.sizes, self.random = sizes, torch.Generator().manual_seed(0)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of one step."""
        starts = torch.randint(len(self.text) - self.sizes.length, (self.sizes.batch, 1), generator=self.random)
        where = (starts + torch.arange(self.sizes.length)).to(self.text.device)
        begins = self.begins[where]
        begins[:, 0] = True
        return self.text[where], self.text[where + 1], begins


def train(model: nn.Module, function: Any, sizes: Sizes, steps: int, title: str) -> tuple[list[float], float]:
    """Train ``model``, calling it by ``function``. Returns the loss of each step, and seconds a step of the second half."""
    device = next(model.parameters()).device
    samples, optimizer = Samples(sizes, device), torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(1)  # for dropout
    losses, half = [], time.perf_counter()
    for step in track(range(steps), title):
        if step == steps // 2:
            synchronize(device)
            half = time.perf_counter()
        loss = function(*samples.draw())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    synchronize(device)
    seconds = (time.perf_counter() - half) / (steps - steps // 2)
    return torch.stack(losses).tolist(), seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plot(eager: Sequence[float], compiled: Sequence[float], path: Path) -> None:
    """Both curves as an SVG: compiled is a thin line on eager's wide one."""
    left, top, width, height = 60, 20, 640, 320
    most, steps = max(*eager, *compiled), max(1, len(eager) - 1)

    def points(losses: Sequence[float]) -> str:
        return " ".join(
            f"{left + width * step / steps:.1f},{top + height * (1 - loss / most):.1f}"
            for step, loss in enumerate(losses)
        )

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" font-family="sans-serif" font-size="13">',
        '<rect width="720" height="390" fill="white"/>',
    ]
    for loss in range(int(most) + 1):
        y = top + height * (1 - loss / most)
        lines.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/><text x="40" y="{y + 4:.1f}">{loss}</text>')
    for part in range(5):
        x, step = left + width * part / 4, steps * part // 4 + 1
        lines.append(f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{step}</text>')
    lines += [
        f'<text x="{left + width // 2}" y="380" text-anchor="middle">step</text>',
        '<text x="14" y="180" transform="rotate(-90 14 180)" text-anchor="middle">loss (nats a byte)</text>',
        f'<polyline points="{points(eager)}" fill="none" stroke="#f0a040" stroke-width="6"/>',
        f'<polyline points="{points(compiled)}" fill="none" stroke="#103070" stroke-width="1.5"/>',
        '<path d="M540 50h40" stroke="#f0a040" stroke-width="6"/><text x="590" y="54">eager</text>',
        '<path d="M540 74h40" stroke="#103070" stroke-width="1.5"/><text x="590" y="78">compiled</text>',
        "</svg>\n",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] = ()) -> int:
    """Train twice and compare; 0 if all losses and weights have the same bits, and both halves were replayed."""
    on_gpu = torch.cuda.is_available()
    sizes = ON_GPU if on_gpu else ON_CPU
    parser = argparse.ArgumentParser(description="Trains a small GPT, eagerly and compiled.")
    parser.add_argument("--steps", type=int, default=sizes.steps, help="default: %(default)s")
    parser.add_argument("--plot", type=Path, help="an SVG to draw both curves in")
    chosen = parser.parse_args(arguments)
    if chosen.steps <= 10:
        parser.error("the curves begin to tell something at more than 10 steps")

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in one order then
    were = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return compare(torch.device("cuda" if on_gpu else "cpu"), sizes, chosen.steps, chosen.plot)
    finally:
        torch.use_deterministic_algorithms(were)


def compare(device: torch.device, sizes: Sizes, steps: int, path: Path | None) -> int:
    torch.manual_seed(0)
    model = Gpt(sizes).to(device)
    twin = copy.deepcopy(model)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)
    expected, eager_seconds = train(twin, twin, sizes, steps, "eager   ")
    losses, seconds = train(model, compiled, sizes, steps, "compiled")
    report = explain(compiled)
    print(report)
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps, on {device}")
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    print(f"eager    {eager_seconds * 1e3:7.1f} ms a step")
    print(f"compiled {seconds * 1e3:7.1f} ms a step{'' if device.type == 'cuda' else ' (tape: not a speed)'}")
    if path is not None:
        plot(expected, losses, path)

    wrong = [
        f"step {step}: loss {got!r} where eager has {want!r}"
        for step, (got, want) in enumerate(zip(losses, expected, strict=True))
        if got != want
    ]
    weights = zip(model.named_parameters(), twin.parameters(), strict=True)
    wrong += [
        f"{name}: another weight than eager's" for (name, mine), theirs in weights if not torch.equal(mine, theirs)
    ]
    halves = [
        program for program in report.programs if program.replays >= steps - 10
    ]  # the first steps learn and record
    if len(halves) != 2:
        wrong.append(f"{len(halves)} programs were replayed, where forward and backward are expected")
    for program in halves:
        if program.num_eager_segments < sizes.blocks or program.num_graph_segments <= sizes.blocks:
            wrong.append(f"{program.num_graph_segments} captured segments and {program.num_eager_segments} eager steps")
    print("\n".join(wrong) or "all losses and all weights are the same, bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
