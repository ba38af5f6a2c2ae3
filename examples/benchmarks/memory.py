"""Memory of a prefill, as it is taken: eager, one full graph, graphs by hand, reduce-overhead, and this backend.

    python examples/benchmarks/memory.py                      # the tables of docs/benchmarks.md
    python examples/benchmarks/memory.py --layers 4 --batch 1 --tokens 256   # something small

Each contender runs in a process of its own. *Peak* is the most that torch's allocator had handed out at once beyond what
the model takes; *steady* is what it keeps reserved after calls, once its cache was emptied, beyond the same. CUDA's own
memory for executable graphs is beside both, and is told apart: of what the device has less, where nothing else runs on it.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import breakable_backend
from breakable_backend import eager_on_graph

MIB = 2**20


# --- the model ------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention."""
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


marked_attend = eager_on_graph(attend)


class Layer(nn.Module):
    """A layer of a Llama, without rotary embeddings, which take no memory to speak of."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        x = x + self.out(attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        h = self.norms[1](x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Layers one after the other; returns the last token's hidden state of each sequence."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(32000, width)
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))

    def forward(self, ids: Tensor, attention: Callable[..., Tensor] = attend) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, attention)
        return x[:, -1] + 0


def make(args: argparse.Namespace) -> Llama:
    """The model on the GPU, in bf16."""
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Llama(args.layers, args.width, args.width // 128, 4 * args.width).eval()
        torch.set_default_dtype(torch.float32)
    return model


# --- the contenders: each returns a function of the ids ---------------------------------------------------------------------

Call = Callable[[Tensor], Any]


def eager(model: Llama) -> Call:
    return model


def full_graph(model: Llama) -> Call:
    """One graph for each shape, all in one pool; the capture is the second call."""
    graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph | None, Tensor | None, Tensor | None]] = {}
    pool = torch.cuda.graph_pool_handle()

    def call(ids: Tensor) -> Any:
        if ids.shape not in graphs:
            graphs[ids.shape] = None, None, None
            return model(ids)
        graph, given, result = graphs[ids.shape]
        if graph is None:
            given, graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = model(given)
            graphs[ids.shape] = graph, given, result
        assert given is not None
        assert result is not None
        given.copy_(ids)
        graph.replay()
        return result.clone()

    return call


def by_hand(model: Llama) -> Call:
    """Graphs with attention between them, in one pool; each hands over what the next needs, and no more."""
    recorded: dict[torch.Size, Any] = {}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(ids: Tensor) -> Any:
        steps: list[Callable[[], Any]] = []
        given, bridges = ids.clone(), dict[torch.Size, Tensor]()

        def captured(body: Callable[[], Any]) -> Any:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = body()
            graph.replay()
            steps.append(graph.replay)
            return result

        def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            bridge = bridges.setdefault(q.shape, torch.empty_like(q))  # free again when the next attention comes
            places = [_unowned(tensor) for tensor in (q, k, v)]

            def step() -> None:
                bridge.copy_(attend(*places))

            step()
            steps.append(step)
            return bridge

        result = _cut(model, given, captured, attended)
        return given, steps, result

    def call(ids: Tensor) -> Any:
        if ids.shape not in recorded:
            recorded[ids.shape] = None
            return model(ids)
        if recorded[ids.shape] is None:
            recorded[ids.shape] = record(ids)
            return recorded[ids.shape][2].clone()
        given, steps, result = recorded[ids.shape]
        given.copy_(ids)
        for step in steps:
            step()
        return result.clone()

    return call


def _unowned(tensor: Tensor) -> Tensor:
    storage = torch._C._construct_storage_from_data_pointer(
        tensor.untyped_storage().data_ptr(), tensor.device, tensor.untyped_storage().nbytes()
    )
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _cut(model: Llama, ids: Tensor, captured: Callable[..., Any], attended: Callable[..., Tensor]) -> Tensor:
    def before(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        parts = layer.qkv(layer.norms[0](x)).chunk(3, dim=-1)
        return tuple(part.view(batch, tokens, layer.heads, -1).transpose(1, 2) for part in parts)

    def after(layer: Any, x: Tensor, a: Tensor) -> Tensor:
        x = x + layer.out(a.transpose(1, 2).reshape(x.shape))
        h = layer.norms[1](x)
        return x + layer.down(functional.silu(layer.gate(h)) * layer.up(h))

    layers: Any = list(model.layers)

    def first() -> tuple[Tensor, tuple[Tensor, ...]]:
        x = model.embed(ids)
        return x, before(layers[0], x)

    x, qkv = captured(first)
    for number, layer in enumerate(layers):
        a = attended(*qkv)
        del qkv
        state = [x]
        del x

        def between(layer: Any = layer, number: int = number, a: Tensor = a, state: Any = state) -> Any:
            y = after(layer, state.pop(), a)
            return (y, before(layers[number + 1], y)) if number + 1 < len(layers) else (y[:, -1] + 0, ())

        x, qkv = captured(between)
        del between, a
    assert qkv == ()
    return x


def ours(model: Llama) -> Call:
    compiled = torch.compile(model, backend="breakable_cg", dynamic=True)
    return lambda ids: compiled(ids, marked_attend)


def ours_static(model: Llama) -> Call:
    compiled = torch.compile(model, backend="breakable_cg", dynamic=False)
    return lambda ids: compiled(ids, marked_attend)


def reduce_overhead(model: Llama) -> Call:
    compiled = torch.compile(model, mode="reduce-overhead")
    return lambda ids: compiled(ids, marked_attend)


CONTENDERS: dict[str, Callable[[Llama], Call]] = {
    "eager": eager,
    "full graph": full_graph,
    "by hand": by_hand,
    "reduce-overhead": reduce_overhead,
    "ours": ours_static,
}


# --- measuring --------------------------------------------------------------------------------------------------------------


@dataclass
class Taken:
    """MiB beyond what the model takes."""

    model: float
    peak: float
    """The most that was allocated at once, over all calls."""
    replay_peak: float
    """The most that was allocated or reserved for graphs at once, in calls that replay."""
    steady: float
    """What stays reserved after calls, the cache emptied."""
    executables: float
    notes: str = ""


def measure(name: str, args: argparse.Namespace) -> Taken:
    """One contender on all its batches, in this process."""
    model = make(args)
    sizes = batches(args)
    torch.manual_seed(0)
    largest = torch.randint(32000, (args.batch, max(sizes)), device="cuda")
    with torch.no_grad():
        model(largest[:1, :64])  # what libraries take once
        attend(*(torch.zeros(1, 1, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    base, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    reserved = torch.cuda.memory_reserved()
    call = (ours if name == "ours" and args.keys > 1 else CONTENDERS[name])(model)
    torch.cuda.reset_peak_memory_stats()
    wrong = 0.0
    with torch.no_grad():
        for round_ in range(args.rounds):
            for tokens in sizes:
                ids = largest[:, :tokens].contiguous()
                got = call(ids)
                if args.check and round_ == args.rounds - 1:
                    wrong = max(wrong, (got - model(ids)).abs().max().item())
                del got, ids
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    gc.collect()
    torch.cuda.empty_cache()
    steady = torch.cuda.memory_reserved() - reserved
    outside = free - torch.cuda.mem_get_info()[0] - steady
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for tokens in sizes:
            call(largest[:, :tokens].contiguous())
    torch.cuda.synchronize()
    replay_peak = torch.cuda.max_memory_reserved() - reserved
    notes = ""
    if name == "ours":
        report = breakable_backend.explain()
        programs = report.programs
        notes = (
            f"pool {programs[0].pool_bytes / MIB:,.0f} MiB, executables {programs[0].executable_bytes / MIB:,.0f} MiB, "
            f"programs {len(programs)}, captures {sum(p.captures for p in programs)}, "
            f"live keys {sum(r.num_graphs > 0 for p in programs for r in p.recordings)}, "
            f"moves {sum(p.recorded.get('moved to a larger pool', 0) for p in programs)}"
        )
        notes += "".join(f"; {note}" for note in programs[-1].notes)
    if args.check:
        notes = f"differs from eager by {wrong:g}{'; ' + notes if notes else ''}"
    return Taken(base / MIB, peak / MIB, replay_peak / MIB, steady / MIB, max(0, outside) / MIB, notes)


def batches(args: argparse.Namespace) -> list[int]:
    """Tokens of each key, in the order of the first calls."""
    sizes = [args.tokens * (number + 1) // args.keys for number in range(args.keys)]
    return sizes if args.order == "ascending" else sizes[::-1]


def table(names: list[str], args: argparse.Namespace, rest: list[str]) -> list[tuple[str, Taken | str]]:
    """A row for each contender, each from a process of its own."""
    rows: list[tuple[str, Taken | str]] = []
    for name in names:
        command = [sys.executable, __file__, "--one", name, *rest]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            rows.append((name, f"not done in {args.timeout:g} s"))
            continue
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            rows.append((name, f"failed: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}"))
        else:
            rows.append((name, Taken(**json.loads(lines[-1]))))
    return rows


def show(title: str, rows: list[tuple[str, Taken | str]]) -> None:
    """The table as Markdown, as multiples of the full graph's where there is one."""
    full = next((taken for name, taken in rows if name == "full graph" and isinstance(taken, Taken)), None)
    print(f"\n{title}\n")
    print("| MiB beyond the model | peak | in replays | steady | executables | of the full graph's, with the model |")
    print("|---|---|---|---|---|---|")
    for name, taken in rows:
        if isinstance(taken, str):
            print(f"| {name} | {taken} | | | | |")
            continue
        of = ""
        if full is not None:
            pairs = ((taken.peak, full.peak), (taken.replay_peak, full.replay_peak), (taken.steady, full.steady))
            of = ", ".join(f"{(mine + taken.model) / (its + full.model):.3f}" for mine, its in pairs)
        cells = (taken.peak, taken.replay_peak, taken.steady, taken.executables)
        print(f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} | {of} |")
    for name, taken in rows:
        if isinstance(taken, Taken) and taken.notes:
            print(f"\n{name}: {taken.notes}; model {taken.model:,.0f} MiB", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    torch._dynamo.config.recompile_limit = 64  # torch 2.11 compiles each size by itself
    parser.add_argument("--one", help="one contender, here; prints JSON")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--order", choices=("descending", "ascending"), default="descending")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--check", action="store_true", help="compare the last results with eager's")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(asdict(measure(args.one, args))))
        return
    rest = [f"--{key}={getattr(args, key)}" for key in "layers width batch tokens keys order rounds".split()]
    rest += ["--check"] if args.check else []
    title = f"{args.layers} layers of {args.width}, {args.batch} x {args.tokens} tokens, {args.keys} keys, {args.order}"
    show(title, table(args.only, args, rest))


if __name__ == "__main__":
    main()
