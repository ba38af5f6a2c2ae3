"""A transformer whose weights are shared out over several GPUs decodes, with its collectives captured.

PyTorch's own tensor-parallel plans split each layer: the first matrices by columns, the second ones by rows, and an
all-reduce adds up what the ranks have. Started as it is, the program starts a rank for each GPU by ``torchrun``; without
GPUs, two ranks talk over gloo. ``torchrun --nproc-per-node 4 examples/tensor_parallel.py`` does it by hand. It needs
nothing but this package.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from breakable_backend import bind, eager_on_graph, explain

Step = Callable[[Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One token of each sequence attends to the whole cache: ``q`` is (batch, heads, 1, size)."""
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


attend_eagerly = eager_on_graph(attend)
"""Stands for an attention that no CUDA graph can hold, since it reads numbers on the host."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, batch: int, length: int, marked: bool) -> None:
        super().__init__()
        self.size, self.marked = width // heads, marked
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        cache = torch.zeros(2, batch, heads // dist.get_world_size(), length, self.size)  # of this rank's heads
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        keys, values = self.cache.unbind()
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        mask = torch.arange(keys.shape[2], device=x.device) <= position
        seen = (attend_eagerly if self.marked else attend)(q, keys, values, mask[None])
        return self.out(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, batch: int, length: int, marked: bool) -> None:
        super().__init__()
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, batch, length, marked)
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), position)
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Decodes one token of each sequence in each call, and keeps what it saw in caches."""

    def __init__(self, layers: int, width: int, heads: int, batch: int, length: int, marked: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, batch, length, marked) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, position)
        return self.norm(x)


PLAN = {
    **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
    "attention.out": RowwiseParallel(),
    "gate": ColwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}
"""How a block is shared out: each rank has some heads and some columns of the feed-forward; two all-reduces in a block."""


KINDS = ("dtensor", "marked", "plain")
"""As the plan leaves the model; with a marked attention; and without DTensor around each call."""


def build(mesh: DeviceMesh, device: torch.device, shape: argparse.Namespace, marked: bool) -> Decoder:
    torch.manual_seed(0)  # the same weights on all ranks, of which each keeps its part
    with device:
        model = Decoder(shape.layers, shape.width, shape.heads, shape.batch, shape.length, marked)
    model = model.to(shape.dtype).eval()
    for block in model.blocks:
        parallelize_module(block, mesh, PLAN)
    return model


class Summed(nn.Module):
    """A layer of which each rank has some rows."""

    def __init__(self, rows: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.rows, self.mesh = rows, mesh

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows(x)
        dist.all_reduce(y, group=self.mesh.get_group())
        return y


def unwrapped(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """The same weights and collectives in plain modules: what the plan has shared out, without DTensor around each call."""
    for block in model.blocks:
        for name, style in PLAN.items():
            local = block.get_submodule(name).weight.to_local()
            layer = nn.Linear(*reversed(local.shape), bias=False, device="meta")
            layer.weight = nn.Parameter(local)
            block.set_submodule(name, Summed(layer, mesh) if isinstance(style, RowwiseParallel) else layer)
    return model


def clear(model: Decoder) -> None:
    for block in model.blocks:
        block.attention.cache.zero_()


def decode(model: Decoder, step: Step, tokens: Tensor, calls: int) -> list[Tensor]:
    """``calls`` steps from an empty cache; what each gave."""
    clear(model)
    return [step(tokens[call], torch.tensor([call], device=tokens.device)).clone() for call in range(calls)]


def timed(step: Step, x: Tensor, position: Tensor, device: torch.device, calls: int) -> float:
    """Microseconds of one call, of ``calls`` in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    dist.all_reduce(torch.zeros((), device=device))  # all ranks begin together
    wait()
    began = time.perf_counter()
    for _ in range(calls):
        step(x, position)
    wait()
    return (time.perf_counter() - began) / calls * 1e6


def in_turns(
    steps: dict[str, Step], x: Tensor, position: Tensor, device: torch.device, rounds: int
) -> dict[str, float]:
    """The median of each, in microseconds: one after the other in each round, so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name].append(timed(step, x, position, device, 10))
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.no_grad()
def compare(mesh: DeviceMesh, device: torch.device, shape: argparse.Namespace, kind: str, times: bool) -> bool:
    """Decode eagerly and compiled; whether all bits are the same on this rank."""
    marked = kind == "marked"
    model = build(mesh, device, shape, marked)
    tokens = torch.randn(shape.length, shape.batch, 1, shape.width, device=device, dtype=shape.dtype)
    dist.broadcast(tokens, 0)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    model = unwrapped(model, mesh) if kind == "plain" else model
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)
    want, got = decode(model, model, tokens, 6), decode(model, compiled, tokens, 6)
    same = all(map(torch.equal, got, want))
    (program,) = explain(compiled).programs
    captured = program.replays >= 3 and program.num_eager_segments == (shape.layers if marked else 0)
    if dist.get_rank() == 0:
        print(explain(compiled) if not times else str(explain(compiled)).split("\n    key")[0])
        print(f"{kind}: {'same bits as eager' if same else 'OTHER BITS THAN EAGER'}")
    if times:
        theirs = torch.compile(model, mode="reduce-overhead")
        steps = {"eager": model, "reduce-overhead": theirs, "breakable_cg": compiled}
        x, position = tokens[0], torch.tensor([0], device=device)
        if kind == "plain":  # without Dynamo's guards; weights that are DTensors are not bound
            steps["bound"] = bind(compiled, x, position)
        for step in steps.values():
            for _ in range(5):
                step(x, position)
        medians = in_turns(steps, x, position, device, 9)
        if dist.get_rank() == 0:
            print(", ".join(f"{name} {took:.0f} us" for name, took in medians.items()))
    torch.compiler.reset()
    return same and captured


def rank(arguments: argparse.Namespace) -> int:
    """What each rank does."""
    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    size = int(os.environ["WORLD_SIZE"])
    arguments.dtype = torch.bfloat16 if on_gpu else torch.float32
    mesh = init_device_mesh(arguments.device, (size,))
    if on_gpu and dist.get_rank() == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    good = [compare(mesh, device, arguments, kind, arguments.time) for kind in arguments.only or KINDS]
    dist.destroy_process_group()
    return 0 if all(good) else 1


def main(argv: Sequence[str] = ()) -> int:
    """Decode eagerly and compiled, with captured attention and with marked; 0 if each rank has eager's bits."""
    parser = argparse.ArgumentParser()
    there = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if there else "cpu")
    parser.add_argument("--time", action="store_true", help="time it against eager and reduce-overhead, in turns")
    parser.add_argument("--only", choices=KINDS, action="append", help="leave out the other kinds")
    parser.add_argument("--layers", type=int, default=16 if there else 2)
    parser.add_argument("--width", type=int, default=2048 if there else 32)
    parser.add_argument("--heads", type=int, default=16 if there else 4)
    parser.add_argument("--batch", type=int, default=8 if there else 2)
    parser.add_argument("--length", type=int, default=512 if there else 8)
    arguments = parser.parse_args(list(argv))
    if "LOCAL_RANK" in os.environ:
        return rank(arguments)
    size = torch.cuda.device_count() if arguments.device == "cuda" else 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    given = [f"--{name}={value}" for name, value in vars(arguments).items() if name not in ("time", "only")]
    given += [f"--only={kind}" for kind in arguments.only or ()] + ["--time"] * arguments.time
    started = [*command, str(Path(__file__)), *given]
    return subprocess.run(started, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
