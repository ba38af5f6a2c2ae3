"""Steps of training, in turns within one process: this backend, its rivals, and graphs that are captured by hand.

    PYTHONPATH=. python examples/benchmarks/training.py                          # all of it; rivals compile for minutes
    PYTHONPATH=. python examples/benchmarks/training.py gpt --without-rivals     # one part
    PYTHONPATH=. python examples/benchmarks/training.py memory                   # each contender in a process of its own

- ``gpt``: a GPT of 91 M parameters, batch 2 x 256, bf16 autocast, AdamW (fused).
- ``breaks``: the same, with an op that no graph may hold in each of its 12 blocks.
- ``marked``: the same, whose attention is a marked function, which the rivals take as one opaque op.
- ``resnet50`` and ``vit``: models of timm, batch 8, bf16 autocast, SGD.
- ``memory``: the most that torch's allocator handed out at once in steps of ``gpt``, and what it keeps reserved.

Contenders: eager; by hand, which without breaks is one graph of forward and backward, and with breaks the pieces between
them under ``torch.cuda.make_graphed_callables``; this backend; and ``torch.compile`` with Inductor, with
``mode="reduce-overhead"`` (and graph partition) and with ``backend="cudagraphs"``. All run the same optimizer, outside.
``step by hand`` and ``step captured`` have the optimizer in the graph too: such a whole step is captured once by
``torch.cuda.graph``, and once by ``with capture(graph)`` of this package.

A turn is ten steps of one contender, until the GPU is done. Each number is the median of the turns; a ratio is the median of
the turns' ratios to the contender by hand. Host is the time in which ten steps are issued.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from turns import in_turns  # from beside this file

from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain

MIB = 2**20
STEPS = 10
LAYERS, WIDTH, HEADS, VOCABULARY, BATCH, LENGTH = 12, 768, 12, 8192, 2, 256

Step = Callable[[], object]


# --- the GPT ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("training_benchmark::step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def step(x: Tensor) -> Tensor:
    """What no graph may hold, and takes little."""
    return x.tanh()


@step.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("training_benchmark::step_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def step_backward(gradient: Tensor, y: Tensor) -> Tensor:
    """Its gradient, which no graph may hold either."""
    return gradient * (1 - y * y)


@step_backward.register_fake
def _(gradient: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


step.register_autograd(
    lambda ctx, gradient: step_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)


def attend(qkv: Tensor) -> Tensor:
    """Causal attention, of shape (batch, length, width)."""
    query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


marked_attend = eager_on_graph(attend)


class Block(nn.Module):
    """A block in two parts: what comes before the op that no graph may hold, and what comes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.attention: Callable[[Tensor], Tensor] = attend

    def before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.out(self.attention(self.qkv(self.norms[0](x))))
        return x, self.up(self.norms[1](x))

    def behind(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + self.down(F.gelu(hidden))


class Piece(nn.Module):
    """What lies between two ops that no graph may hold."""

    def __init__(self, parts: nn.ModuleList, first: Block | None, second: Block | None) -> None:
        super().__init__()
        self.parts, self.first, self.second = parts, first, second

    def forward(self, *inputs: Tensor) -> Any:
        if self.first is None:
            (tokens,) = inputs
            x = self.parts[0](tokens) + self.parts[1].weight
        else:
            x = self.first.behind(*inputs[:2])
        if self.second is not None:
            return self.second.before(x)
        return F.cross_entropy(self.parts[3](self.parts[2](x)).flatten(0, 1), inputs[2].flatten())


class Gpt(nn.Module):
    """Tokens and those that follow them in, the loss out."""

    def __init__(self, breaks: bool, marked: bool) -> None:
        super().__init__()
        self.breaks = breaks
        embeddings = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        parts = nn.ModuleList([*embeddings, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)])
        blocks = [Block() for _ in range(LAYERS)]
        for block in blocks:
            block.attention = marked_attend if marked else attend
        self.pieces = nn.ModuleList(
            Piece(parts, first, second) for first, second in itertools.pairwise([None, *blocks, None])
        )

    def forward(self, tokens: Tensor, following: Tensor) -> Tensor:
        inputs: Any = (tokens,)
        for piece in self.pieces[:-1]:
            x, hidden = piece(*inputs)
            inputs = x, (step(hidden) if self.breaks else hidden)
        loss: Tensor = self.pieces[-1](*inputs, following)
        return loss


# --- what is trained ------------------------------------------------------------------------------------------------------


class Work:
    """A model with its batches. Each contender trains a copy of its own."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.breaks = name, name == "breaks"
        if name in ("gpt", "breaks", "marked"):
            with torch.device("cuda"):
                self.model: nn.Module = Gpt(self.breaks, name == "marked")
                self.batches = [torch.randint(VOCABULARY, (2, BATCH, LENGTH)).unbind() for _ in range(STEPS)]
        else:
            import timm

            self.model = timm.create_model("resnet50" if name == "resnet50" else "vit_small_patch16_224").cuda()
            self.batches = [
                (torch.randn(8, 3, 224, 224, device="cuda"), torch.randint(1000, (8,), device="cuda"))
                for _ in range(STEPS)
            ]

    def whole(self, model: nn.Module) -> Callable[..., Tensor]:
        """Forward up to the loss."""
        if isinstance(model, Gpt):
            return model
        return lambda images, labels: F.cross_entropy(model(images), labels)

    def optimizer(self, model: nn.Module, *, capturable: bool = False) -> torch.optim.Optimizer:
        if isinstance(model, Gpt):
            return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=capturable)
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)


def autocast() -> Any:
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def loop(work: Work, model: nn.Module, forward: Callable[..., Tensor]) -> Step:
    """A usual training step: what the loss was is returned."""
    optimizer, batches = work.optimizer(model), itertools.cycle(work.batches)

    def train() -> Tensor:
        with autocast():
            loss = forward(*next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def eager(work: Work) -> Step:
    model = copy.deepcopy(work.model)
    return loop(work, model, work.whole(model))


def compiled(work: Work, **options: Any) -> Step:
    model = copy.deepcopy(work.model)
    function = torch.compile(work.whole(model), **options)
    made = loop(work, model, function)
    made.function = function  # type: ignore[attr-defined]
    return made


def ours(work: Work) -> Step:
    return compiled(work, backend="breakable_cg")


def by_hand(work: Work) -> Step:
    model = copy.deepcopy(work.model)
    return by_hand_in_pieces(work, model) if work.breaks else by_hand_whole(work, model)


def by_hand_whole(work: Work, model: nn.Module) -> Step:
    """One graph of forward and backward; gradients stay in its memory."""
    forward, optimizer = work.whole(model), work.optimizer(model)
    given = [value.clone() for value in work.batches[0]]

    def halves() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = forward(*given)
        loss.backward()
        return loss.detach()

    warm_up(halves)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = halves()
    return replayed(work, given, graph.replay, loss, behind=optimizer.step)


def warm_up(body: Callable[[], object]) -> None:
    """What PyTorch asks for before a capture: some runs on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(stream)


def replayed(
    work: Work,
    given: list[Tensor],
    replay: Callable[[], None],
    loss: Tensor,
    *,
    behind: Callable[[], object] = lambda: None,
    keep: object = None,
) -> Step:
    """A step that copies a batch to where the graph reads it, and replays the graph, whose model ``keep`` keeps alive."""
    batches = itertools.cycle(work.batches)

    def train(keep: object = keep) -> Tensor:
        for place, value in zip(given, next(batches), strict=True):
            place.copy_(value)
        replay()
        behind()
        return loss.clone()

    return train


def whole_step(work: Work, *, keep: bool) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Where a batch is read, and a step in which nothing reads on the host. ``keep``: gradients are set to zero, not None."""
    model = copy.deepcopy(work.model)
    forward, optimizer = work.whole(model), work.optimizer(model, capturable=True)
    given = [value.clone() for value in work.batches[0]]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=not keep)
        with autocast():
            loss = forward(*given)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return given, step


def step_by_hand(work: Work, *, keep: bool = False) -> Step:
    """A whole step under ``torch.cuda.graph``."""
    given, step = whole_step(work, keep=keep)
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return replayed(work, given, graph.replay, loss, keep=step)


def step_captured(work: Work, *, keep: bool = False) -> Step:
    """The same step under ``with capture(graph)``, with eager steps in it where the model has marked functions."""
    given, step = whole_step(work, keep=keep)
    step()
    graph = BreakableCUDAGraph()
    with capture(graph):
        loss = step()
    return replayed(work, given, graph.replay, loss, keep=step)


def by_hand_in_pieces(work: Work, model: nn.Module) -> Step:
    """Forward and backward of each piece are graphs; the ops between them run eagerly, under autograd."""
    assert isinstance(model, Gpt)
    samples: list[tuple[Tensor, ...]] = []
    tokens, following = work.batches[0]
    inputs: Any = (tokens,)
    with autocast(), torch.no_grad():  # autograd would remember the stream
        for piece in model.pieces:
            inputs = (*inputs, following) if piece is model.pieces[-1] else inputs
            samples.append(tuple(value.detach().clone().requires_grad_(value.is_floating_point()) for value in inputs))
            inputs = piece(*inputs)
    with autocast():
        graphed = torch.cuda.make_graphed_callables(tuple(model.pieces), tuple(samples), allow_unused_input=True)
    for parameter in model.parameters():
        parameter.grad = None

    def forward(tokens: Tensor, following: Tensor) -> Tensor:
        inputs: Any = (tokens,)
        for piece in graphed[:-1]:
            x, hidden = piece(*inputs)
            inputs = x, step(hidden)
        loss: Tensor = graphed[-1](*inputs, following)
        return loss

    return loop(work, model, forward)


CONTENDERS: dict[str, Callable[[Work], Step]] = {"by hand": by_hand, "ours": ours, "eager": eager}
STEP_CONTENDERS: dict[str, Callable[[Work], Step]] = {"step by hand": step_by_hand, "step captured": step_captured}
RIVALS: dict[str, Callable[[Work], Step]] = {
    "cudagraphs": lambda work: compiled(work, backend="cudagraphs"),
    "reduce-overhead": lambda work: compiled(work, mode="reduce-overhead"),
    "torch.compile": compiled,
}


NOT_WITH = {"marked": ("by hand", "step by hand"), "breaks": ("step by hand", "step captured")}

# --- measuring ------------------------------------------------------------------------------------------------------------


def measure(train: Step) -> tuple[float, float]:
    """Milliseconds a step: to issue it, and until the GPU is done."""
    train()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        train()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (issued - start) / STEPS * 1e3, (time.perf_counter() - start) / STEPS * 1e3


def run(part: str, rivals: bool, turns: int, budget: float) -> None:
    torch.compiler.reset()
    work, steps, end = Work(part), dict[str, Step](), time.monotonic() + budget
    for name, make in {**CONTENDERS, **STEP_CONTENDERS, **(RIVALS if rivals else {})}.items():
        if name in NOT_WITH.get(part, ()):
            continue
        if name in RIVALS and time.monotonic() > end:
            print(f"{part}: {name:16} not run: {budget:g} s are over", flush=True)
            continue
        start = time.perf_counter()
        try:
            train = make(work)
            losses = [float(train()) for _ in range(7)]  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - a rival may not take the model
            print(f"{part}: {name:16} failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        steps[name] = train
        print(
            f"{part}: {name:16} first steps {time.perf_counter() - start:6.1f} s, losses {losses[0]:.4f} to {losses[-1]:.4f}"
        )
        if name == "ours":
            programs = explain(train.function).programs  # type: ignore[attr-defined]
            halves = [f"{p.num_graph_segments} + {p.num_eager_segments}" for p in programs]
            print(f"{part}: captured segments and eager steps: {', '.join(halves)}", flush=True)
    rows = in_turns(steps, measure, turns)
    floor = rows.get("by hand", rows["eager"])
    for name, row in rows.items():
        ratio = median(mine / base for mine, base in zip(row[1], floor[1], strict=True))
        print(
            f"{part}: {name:16} host {median(row[0]):7.2f} ms, total {median(row[1]):7.2f} ms "
            f"({min(row[1]):.2f} to {max(row[1]):.2f}), {ratio:5.2f} x, {1e3 / median(row[1]):6.1f} steps a second",
            flush=True,
        )


MEMORY_OF: dict[str, tuple[str, Callable[[Work], Step]]] = {
    **{name: ("gpt", make) for name, make in {**CONTENDERS, **STEP_CONTENDERS}.items()},
    "step by hand, gradients kept": ("gpt", functools.partial(step_by_hand, keep=True)),
    "step captured, gradients kept": ("gpt", functools.partial(step_captured, keep=True)),
    "step captured, marked attention": ("marked", step_captured),
}


def memory() -> None:
    """Each contender's memory, of a process of its own."""
    for name in MEMORY_OF:
        subprocess.run([sys.executable, __file__, "memory-of", name], check=True)


def memory_of(name: str) -> None:
    part, make = MEMORY_OF[name]
    work = Work(part)
    train = make(work)
    for _ in range(8):
        train()
    work.model.cpu()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):
        train()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / MIB
    torch.cuda.empty_cache()
    print(f"memory: {name:32} peak {peak:8.0f} MiB, reserved {torch.cuda.memory_reserved() / MIB:8.0f} MiB", flush=True)


PARTS = ("gpt", "breaks", "marked", "resnet50", "vit")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Times training steps in turns.")
    parser.add_argument("parts", nargs="*", default=[*PARTS, "memory"])
    parser.add_argument("--without-rivals", action="store_true", help="what compiles quickly alone")
    parser.add_argument("--turns", type=int, default=15, help="default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=600, help="seconds of a part after which no rival is begun (600)"
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("needs a GPU")
        return 1
    if chosen.parts[0] == "memory-of":
        memory_of(chosen.parts[1])
        return 0
    torch._inductor.config.graph_partition = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for part in chosen.parts:
        memory() if part == "memory" else run(part, not chosen.without_rivals, chosen.turns, chosen.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
