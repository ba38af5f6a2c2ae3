"""Times one call of a model with eager breaks: this backend, its rivals, and the floor.

    PYTHONPATH=. python examples/benchmarks/replay.py --markdown benchmarks.md --json benchmarks.json
    PYTHONPATH=. python examples/benchmarks/replay.py --smoke    # tiny models on a CPU: does the script run?

Models: a transformer of 16 blocks (batch 1, 16 tokens, width 512, 8 heads, bf16), whose attention is an op that no
graph may hold in the first 0, 1, 4 or 16 blocks and plain SDPA in the others; and a decode step of a Llama (16 layers
of width 2048, bf16, batch 1, static cache), whose attention never is in a graph. Weights are random.

Contenders, each in a fresh process with empty compile caches, one process at a time:

- ``eager``; ``default``, ``reduce-overhead`` (with graph partition) and ``cudagraphs`` are those of ``torch.compile``;
- ``by-hand`` is the floor: the model split by hand around each attention, each piece captured into one pool, and a
  plain loop of ``cudaGraphLaunch``, direct calls of the attention, and one copy of its result;
- ``full-graph`` holds the attention too: what there would be without breaks;
- ``constant`` compiles to a function that returns one result for ever: what Dynamo and AOTAutograd cost per call;
- ``ours`` is ``breakable_cg``.

Measures, all under ``torch.no_grad()``, with inputs at changing addresses:

- host: time to issue a call. Median over loops of 5 calls that start with an idle GPU, so that no launch waits for
  room in the queue;
- total: time per call until the GPU is done. Median over loops of 50 calls with one synchronization at the end;
- start-up: from after imports, with a CUDA context and the model on the GPU, to the end of the third call;
- pool and reserved: memory of private pools, and growth of what the allocator holds;
- difference: the largest from eager, over five inputs. Ours must be the same bit for bit.

``--rounds 3`` takes all rows three times, one round after the other, and shows medians over the rounds: on a shared
machine the host's speed changes within minutes.

What a contender needs is imported before the clock starts, as far as it can be named. A run that is cut short has
written what it has; ``--resume`` with the same ``--json`` measures the rest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

MODELS = {
    "breaks-0": "Transformer, 16 blocks, no break",
    "breaks-1": "Transformer, 16 blocks, 1 break",
    "breaks-4": "Transformer, 16 blocks, 4 breaks",
    "breaks-16": "Transformer, 16 blocks, 16 breaks",
    "llama": "Llama decode step, 16 layers of 2048, 16 breaks",
}
CONTENDERS = {
    "eager": "eager",
    "default": "torch.compile",
    "reduce-overhead": 'mode="reduce-overhead"',
    "cudagraphs": 'backend="cudagraphs"',
    "by-hand": "by hand",
    "full-graph": "one full graph",
    "constant": "constant",
    "ours": "breakable_cg",
}
IMPORTS = {  # before the clock of the start-up runs; the first call of a custom op imports Dynamo
    "default": ("torch._inductor.compile_fx",),
    "reduce-overhead": ("torch._inductor.compile_fx", "torch._inductor.cudagraph_trees"),
    "cudagraphs": ("torch._dynamo.backends.cudagraphs", "torch._inductor.cudagraph_trees"),
    "by-hand": ("cuda.bindings.runtime",),
    "full-graph": ("cuda.bindings.runtime",),
    "ours": ("breakable_backend",),
}
BY_IMPORTANCE = ("breaks-16", "breaks-0", "llama", "breaks-4", "breaks-1")
"""The order of measuring, for a run that is cut short."""
ROOT = Path(__file__).resolve().parents[2]
HOST_CALLS = 5
TOTAL_CALLS = 50
CALLS_BEFORE_TIMING = 10
NOTHING = "-"

Steps = Generator[tuple[Any, ...], Tensor, Tensor]
"""A model split by hand: yields the arguments of each attention, is sent its result, returns the output."""


@dataclass(frozen=True)
class Effort:
    """How often to measure."""

    host_loops: int
    total_loops: int
    total_calls: int
    seconds: float
    """After which a measurement ends early, with at least three loops."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> Effort:
        if options.smoke:
            return cls(3, 3, 2, 0.0)
        return cls(10, 5, TOTAL_CALLS, 0.8) if options.quick else cls(30, 15, TOTAL_CALLS, 1.5)


@dataclass
class Row:
    """What was measured for one contender on one model; None where that has no meaning."""

    model: str
    contender: str
    host_us: float | None = None
    total_us: float | None = None
    replay_us: float | None = None
    """Total of the launch alone, without the copy of the input (one full graph)."""
    dynamo_us: float | None = None
    """Host time of a constant without AOTAutograd."""
    startup_s: float | None = None
    pool_bytes: int | None = None
    reserved_bytes: int | None = None
    graphs: int | None = None
    """Captured segments."""
    max_abs_diff: float | None = None
    bitwise: bool | None = None
    notes: list[str] = field(default_factory=list)
    error: str = ""
    log: str = ""
    """The end of what a failed process wrote to its standard error."""
    environment: dict[str, str] = field(default_factory=dict)
    rounds: int = 1
    """How many rows this one is the median of."""

    @property
    def failed(self) -> bool:
        return bool(self.error) or (self.contender == "ours" and not self.bitwise)


# --- models -----------------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention: heads in, one contiguous row of the model's width out for each token."""
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)


def attend_to_cache(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Attention of the tokens at ``positions`` over all of a static cache, filled or not."""
    mask = torch.arange(key.shape[2], device=key.device) <= positions[:, None, :, None]
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format)


eager_only = (torch.Tag.cudagraph_unsafe,)
attention = torch.library.custom_op("replay_benchmark::attention", attend, mutates_args=(), tags=eager_only)
cached_attention = torch.library.custom_op(
    "replay_benchmark::cached_attention", attend_to_cache, mutates_args=(), tags=eager_only
)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads * width)


@cached_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width)


class Workload(ABC):
    """A model with its inputs, whole and split by hand."""

    module: nn.Module
    inputs: list[Tensor]
    breaks: int
    attend: Callable[..., Tensor]
    """The attention as a plain Python function."""

    def caller(self, module: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        """One call of ``module``, which is this workload's or a compiled form of it."""
        return module

    @abstractmethod
    def steps(self, x: Tensor) -> Steps:
        """The forward pass, split by hand around each attention that is a break."""

    def rewind(self) -> None:  # noqa: B027 - most models have no state
        """Put back state that calls move on. Never inside a measurement."""


class Block(nn.Module):
    """A block of a pre-norm transformer, in two halves."""

    def __init__(self, width: int, heads: int, is_break: bool) -> None:
        super().__init__()
        self.heads, self.is_break = heads, is_break
        self.norm_before, self.norm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def before(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm_before(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = qkv.unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.projection(attended)
        change: Tensor = self.down(functional.gelu(self.up(self.norm_after(x))))
        return x + change

    def forward(self, x: Tensor) -> Tensor:
        attended = (attention if self.is_break else attend)(*self.before(x))
        return self.after(x, attended)


class Transformer(Workload):
    """Blocks, of which the first ``breaks`` have an attention that no graph may hold."""

    attend = staticmethod(attend)

    def __init__(self, breaks: int, device: torch.device) -> None:
        small = device.type == "cpu"
        num_blocks, tokens, width, heads = (4, 4, 32, 2) if small else (16, 16, 512, 8)
        dtype = torch.float32 if small else torch.bfloat16
        self.breaks = min(breaks, num_blocks)
        with device:
            blocks = [Block(width, heads, is_break=number < breaks) for number in range(num_blocks)]
            self.module: nn.Sequential = nn.Sequential(*blocks, nn.LayerNorm(width)).to(dtype).eval()
        self.inputs = [torch.randn(1, tokens, width, device=device, dtype=dtype) for _ in range(5)]

    def steps(self, x: Tensor) -> Steps:
        modules: list[Any] = list(self.module)
        *blocks, norm = modules
        for block in blocks[: self.breaks]:
            attended = yield block.before(x)
            x = block.after(x, attended)
        for block in blocks[self.breaks :]:
            x = block(x)
        return norm(x)  # type: ignore[no-any-return]


class Llama(Workload):
    """A decode step over a static cache that exists before anything is compiled."""

    attend = staticmethod(attend_to_cache)
    PROMPT = 16
    CACHE = 128
    """Longer than the prompt and the calls between two rewinds."""

    def __init__(self, device: torch.device, batch: int = 1) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, StaticCache

        AttentionInterface.register("replay_benchmark", _llama_attention)
        small = device.type == "cpu"
        layers, width, inner, heads = (4, 64, 128, 2) if small else (16, 2048, 5632, 16)
        self.config = LlamaConfig(
            vocab_size=1000 if small else 32000,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
        self.breaks = layers
        dtype = torch.float32 if small else torch.bfloat16
        with device:
            model: Any = AutoModelForCausalLM
            self.module = model.from_config(self.config, attn_implementation="replay_benchmark", dtype=dtype).eval()
        self.cache: Any = StaticCache(self.config, max_cache_len=self.CACHE)
        self.cache.early_initialization(batch, heads, width // heads, dtype, device)
        layers_of_cache: list[Any] = self.cache.layers
        for layer in layers_of_cache:  # a prompt, as it were
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()
        self.positions = torch.full((batch, 1), self.PROMPT, device=device)
        self.inputs = list(torch.randint(self.config.vocab_size, (5, batch, 1), device=device).unbind())
        self.inputs = [token.clone() for token in self.inputs]

    def caller(self, module: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        positions, cache = self.positions, self.cache

        def call(x: Tensor) -> Tensor:
            return module(input_ids=x, position_ids=positions, past_key_values=cache).logits  # type: ignore[no-any-return]

        return call

    def steps(self, x: Tensor) -> Steps:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        model: Any = self.module.model
        hidden = model.embed_tokens(x)
        cos, sin = model.rotary_emb(hidden, position_ids=self.positions)
        for number, layer in enumerate(model.layers):
            attn = layer.self_attn
            normed = layer.input_layernorm(hidden)
            heads = (*normed.shape[:-1], -1, attn.head_dim)
            query, key, value = (
                projection(normed).view(heads).transpose(1, 2) for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            key, value = self.cache.update(key, value, number)
            attended = yield query, key, value, self.positions, attn.scaling
            hidden = hidden + attn.o_proj(attended.reshape(*normed.shape[:-1], -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        head: Any = self.module.lm_head
        return head(model.norm(hidden))  # type: ignore[no-any-return]

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.PROMPT)


def _llama_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    return cached_attention(query, key, value, position_ids, scaling), None


def workload(model: str, device: torch.device) -> Workload:
    """A model of the table, on its device."""
    torch.manual_seed(0)
    return Llama(device) if model == "llama" else Transformer(int(model.removeprefix("breaks-")), device)


# --- contenders -------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A contender ready for its first call, and what it alone can tell once it ran."""

    call: Callable[[Tensor], Tensor]
    tell: Callable[[Row], None] | None = None


def prepare_eager(work: Workload, smoke: bool) -> Prepared:
    return Prepared(work.caller(work.module))


def prepare_default(work: Workload, smoke: bool) -> Prepared:
    return Prepared(work.caller(torch.compile(work.module)))


def prepare_reduce_overhead(work: Workload, smoke: bool) -> Prepared:
    torch._inductor.config.graph_partition = True
    tell = count_captures()
    return Prepared(work.caller(torch.compile(work.module, mode="reduce-overhead")), tell)


def prepare_cudagraphs(work: Workload, smoke: bool) -> Prepared:
    tell = count_captures()
    return Prepared(work.caller(torch.compile(work.module, backend="cudagraphs")), tell)


def prepare_by_hand(work: Workload, smoke: bool) -> Prepared:
    return ByHand(work, whole=False).prepared()


def prepare_full_graph(work: Workload, smoke: bool) -> Prepared:
    return ByHand(work, whole=True).prepared()


def without_aot(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend whose function returns one result for ever: what Dynamo costs."""
    result: Any = None

    def constant(*args: Any) -> Any:
        nonlocal result
        if result is None:
            result = gm(*args)
        return result

    return constant


def prepare_constant(work: Workload, smoke: bool) -> Prepared:
    """With the settings of AOTAutograd that this backend uses; the first call runs the model, later ones nothing."""
    from torch._dynamo.backends.common import aot_autograd

    def compiler(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        result: Any = None

        def boxed(args: list[Any]) -> Any:
            nonlocal result
            if result is None:
                result = list(gm(*args))
            args.clear()
            return result

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    def tell(row: Row) -> None:
        torch.compiler.reset()
        call = work.caller(torch.compile(work.module, backend=without_aot))
        row.dynamo_us = time_calls(work, call, HOST_CALLS, loops=30, seconds=1.0, synchronized=False)
        row.notes.append(f"Dynamo alone: {row.dynamo_us:.0f} us")

    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        keep_inference_input_mutations=True,
        disable_functionalization=True,
    )
    return Prepared(work.caller(torch.compile(work.module, backend=backend)), tell)


def prepare_ours(work: Workload, smoke: bool) -> Prepared:
    from breakable_backend import breakable_cg, explain
    from breakable_backend.calling.registry import executors_of

    compiled = torch.compile(work.module, backend=breakable_cg, options={"driver": "tape"} if smoke else {})

    def tell(row: Row) -> None:
        programs = explain(compiled).programs
        row.graphs = sum(program.num_graph_segments for program in programs)
        drivers = {id(executor.driver): executor.driver for executor in executors_of(compiled) if executor.driver}
        row.pool_bytes = sum(driver.pool_bytes() for driver in drivers.values())
        if len(programs) != 1 or row.graphs != work.breaks + 1:
            row.notes.append(f"{len(programs)} programs, {work.breaks + 1} segments expected in 1")
        for program in programs:
            if sum(program.plain_calls.values()) != 1:  # the first call is
                why = "; ".join(f"{count}x {reason}" for reason, count in program.plain_calls.items())
                row.notes.append(f"plain calls: {why}")
            row.notes += program.notes

    return Prepared(work.caller(compiled), tell)


PREPARE: dict[str, Callable[[Workload, bool], Prepared]] = {
    "eager": prepare_eager,
    "default": prepare_default,
    "reduce-overhead": prepare_reduce_overhead,
    "cudagraphs": prepare_cudagraphs,
    "by-hand": prepare_by_hand,
    "full-graph": prepare_full_graph,
    "constant": prepare_constant,
    "ours": prepare_ours,
}


def count_captures() -> Callable[[Row], None]:
    """Count what torch captures from now on; one graph does nothing but keep its pool alive."""
    begin = torch.cuda.CUDAGraph.capture_begin
    captures = 0

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal captures
        captures += 1
        begin(self, *args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counting  # type: ignore[method-assign]

    def tell(row: Row) -> None:
        row.graphs = max(0, captures - 1)
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        if skips or not row.graphs:
            row.notes.append("captures nothing" if not row.graphs else f"{skips} skipped")

    return tell


def drive(steps: Steps, attend: Callable[..., Tensor]) -> Tensor:
    """Run a split model to its end."""
    try:
        arguments = next(steps)
        while True:
            arguments = steps.send(attend(*arguments))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class ByHand:
    """What a patient user would write: captured pieces in one pool, and between them the attention as it is."""

    def __init__(self, work: Workload, *, whole: bool) -> None:
        from cuda.bindings import runtime

        self.runtime, self.work = runtime, work
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.pool = torch.cuda.graph_pool_handle()
        self.input = work.inputs[0].clone()
        self.eager_steps: list[tuple[Any, tuple[Any, ...], Tensor]] = []
        """Executable of the piece before, arguments of the attention, where the next piece wants its result."""
        drive(work.steps(self.input), work.attend)  # loads the kernels, makes the handles of the libraries
        work.rewind()
        steps = work.steps(self.input)
        if whole:
            executable, self.output = self._capture(lambda: drive(steps, work.attend))
        else:
            executable, self.output = self._capture_pieces(steps)
        self.last = executable

    def _capture(self, piece: Callable[[], Any]) -> tuple[Any, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = piece()
        graph.replay()
        self.graphs.append(graph)
        return self.runtime.cudaGraphExec_t(graph.raw_cuda_graph_exec()), result

    def _capture_pieces(self, steps: Steps) -> tuple[Any, Tensor]:
        sent: Any = None

        def piece() -> tuple[bool, Any]:
            try:
                return False, steps.send(sent)
            except StopIteration as end:
                return True, end.value

        while True:
            executable, (at_end, value) = self._capture(piece)
            if at_end:
                return executable, value
            sent = self.work.attend(*value).clone()
            self.eager_steps.append((executable, value, sent))

    def prepared(self) -> Prepared:
        launch, stream = self.runtime.cudaGraphLaunch, torch.cuda.current_stream().cuda_stream
        attend, eager_steps, last = self.work.attend, self.eager_steps, self.last
        static_input, output = self.input, self.output

        def call(x: Tensor) -> Tensor:
            static_input.copy_(x)
            for executable, arguments, result in eager_steps:
                launch(executable, stream)
                result.copy_(attend(*arguments))
            launch(last, stream)
            return output  # type: ignore[no-any-return]

        def replay(x: Tensor) -> Tensor:
            launch(last, stream)
            return output  # type: ignore[no-any-return]

        def tell(row: Row) -> None:
            row.graphs = len(self.graphs)
            if not eager_steps:
                row.replay_us = time_calls(self.work, replay, TOTAL_CALLS, loops=15, seconds=1.5, synchronized=True)

        return Prepared(call, tell)


# --- measuring, in the child ------------------------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_calls(
    work: Workload,
    call: Callable[[Tensor], Tensor],
    calls: int,
    *,
    loops: int,
    seconds: float,
    synchronized: bool,
) -> float:
    """Median microseconds a call, over loops that each start with an idle GPU."""
    inputs = [work.inputs[number % len(work.inputs)] for number in range(max(calls, CALLS_BEFORE_TIMING))]
    work.rewind()
    for x in inputs[:CALLS_BEFORE_TIMING]:
        call(x)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < loops and (len(times) < 3 or time.perf_counter() < end):
        work.rewind()
        synchronize()
        start = time.perf_counter()
        for x in inputs[:calls]:
            call(x)
        if synchronized:
            synchronize()
        times.append(time.perf_counter() - start)
    synchronize()
    return median(times) / calls * 1e6


def measure(row: Row, *, smoke: bool, effort: Effort) -> None:
    """Fill in ``row``."""
    device = torch.device("cpu" if smoke else "cuda")
    for name in (
        "torch._dynamo",
        *IMPORTS.get(row.contender, ()),
        *(("transformers",) if row.model == "llama" else ()),
    ):
        importlib.import_module(name)
    if row.model == "llama":
        importlib.import_module("transformers.models.llama.modeling_llama")
    row.environment = environment(device)
    work = workload(row.model, device)
    if not smoke:
        torch.cuda.empty_cache()
        synchronize()
        reserved = torch.cuda.memory_reserved()

    start = time.perf_counter()
    prepared = PREPARE[row.contender](work, smoke)
    for x in work.inputs[:3]:
        prepared.call(x)
    synchronize()
    row.startup_s = time.perf_counter() - start

    def timed(calls: int, loops: int, *, synchronized: bool) -> float:
        return time_calls(work, prepared.call, calls, loops=loops, seconds=effort.seconds, synchronized=synchronized)

    row.host_us = timed(HOST_CALLS, effort.host_loops, synchronized=False)
    row.total_us = timed(effort.total_calls, effort.total_loops, synchronized=True)
    if not smoke:
        row.reserved_bytes = torch.cuda.memory_reserved() - reserved
        row.pool_bytes = sum(
            s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)
        )
    if row.contender != "constant":
        compare(row, work, prepared.call)
    if prepared.tell is not None:
        prepared.tell(row)


def compare(row: Row, work: Workload, call: Callable[[Tensor], Tensor]) -> None:
    """Compare with eager on each input."""
    eager = work.caller(work.module)
    row.max_abs_diff, row.bitwise = 0.0, True
    for x in work.inputs:
        work.rewind()
        got = call(x).clone()
        work.rewind()
        want = eager(x)
        row.bitwise &= torch.equal(got, want)
        row.max_abs_diff = max(row.max_abs_diff, (got.double() - want.double()).abs().max().item())


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers hold for. Makes the CUDA context."""
    versions = {
        "GPU": "none (tape driver: no speeds)" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda or "none",
    }
    if device.type == "cuda":
        torch.zeros(1, device=device).add_(1).item()
    return versions


def child(options: argparse.Namespace) -> NoReturn:
    """Measure one row, and print it as the last line."""
    row = Row(*options.child)
    try:
        with torch.no_grad():
            measure(row, smoke=options.smoke, effort=Effort.of(options))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's result
        traceback.print_exc()
        row.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    print(json.dumps(asdict(row)), flush=True)
    os._exit(0)  # taking everything apart in order takes seconds, and nobody needs it


# --- collecting, in the parent ----------------------------------------------------------------------------------------


def run_child(model: str, contender: str, options: argparse.Namespace) -> Row:
    """Measure one row in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory(prefix="replay-benchmark-", ignore_cleanup_errors=True) as scratch:
        paths = {name: Path(scratch, name) for name in ("inductor", "triton", "out", "err")}
        variables = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(paths["inductor"]),
            "TRITON_CACHE_DIR": str(paths["triton"]),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--child", model, contender]
        if options.smoke:
            variables["OMP_NUM_THREADS"] = "1"
            command.append("--smoke")
        if options.quick:
            command.append("--quick")
        # Files and no pipes: compile workers inherit them, and may outlive the process by a little.
        with paths["out"].open("wb") as out, paths["err"].open("wb") as err:
            process = subprocess.Popen(command, stdout=out, stderr=err, env=variables, cwd=ROOT, start_new_session=True)
            try:
                status = process.wait(options.timeout)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with suppress(ProcessLookupError, PermissionError):  # and its compile workers
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = [line for line in paths["out"].read_text(errors="replace").splitlines() if line.startswith("{")]
        log = paths["err"].read_text(errors="replace").strip()
    if status is None:
        row = Row(model, contender, error=f"stopped after {options.timeout:g} s")
    elif lines:
        row = Row(**json.loads(lines[-1]))
    else:
        row = Row(model, contender, error=f"exit status {status}: {(log.splitlines() or ['no output'])[-1]}")
    row.log = log[-3000:] if row.error else ""
    return row


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row for each model and contender. A row that failed counts only where none did not."""
    pairs: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: bool(row.error)):
        same = pairs.setdefault((row.model, row.contender), [])
        if not (same and row.error):
            same.append(row)
    return [_median(same) for same in pairs.values()]


def _median(rows: list[Row]) -> Row:
    first = rows[0]
    if len(rows) == 1:
        return first
    measures: dict[str, Any] = {}
    for measure in fields(Row):
        values = [getattr(row, measure.name) for row in rows]
        if measure.name.endswith(("_us", "_s")) and None not in values:
            measures[measure.name] = median(values)
    totals = [row.total_us for row in rows if row.total_us is not None]
    spread = f"total {min(totals):,.0f} to {max(totals):,.0f} in {len(rows)} rounds"
    return replace(
        first,
        **measures,
        bitwise=all(row.bitwise for row in rows),
        max_abs_diff=max((row.max_abs_diff for row in rows if row.max_abs_diff is not None), default=None),
        notes=[*first.notes, spread],
        rounds=len(rows),
    )


@dataclass(frozen=True)
class Goal:
    """A ratio that should be at most, or at least, so much."""

    text: str
    model: str
    ratio: float | None
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not measured"
        excess = 1 - self.ratio / self.limit if self.at_least else self.ratio / self.limit - 1
        return "met" if excess <= 0 else f"missed by {excess:.1%}"

    def cells(self) -> tuple[str, str, str, str, str]:
        sign = "≥" if self.at_least else "≤"
        ratio = NOTHING if self.ratio is None else f"{self.ratio:.2f}"
        return self.text, self.model, ratio, f"{sign} {self.limit:.2f}", self.verdict


def goals(rows: Sequence[Row], models: Sequence[str]) -> list[Goal]:
    """What the project set itself, for the models that were measured."""
    found = {(row.model, row.contender): row for row in medians(rows) if not row.error}

    def value(model: str, contender: str, measure: str) -> float | None:
        row = found.get((model, contender))
        number = getattr(row, measure) if row is not None else None
        return None if number is None else float(number)

    def ratio(over: float | None, under: float | None) -> float | None:
        return None if over is None or not under else over / under

    result = []
    for model in models:
        ours = value(model, "ours", "total_us")
        if model in ("breaks-16", "llama"):
            floor, rival = value(model, "by-hand", "total_us"), value(model, "reduce-overhead", "total_us")
            result.append(Goal("16 breaks: total, breakable_cg / by hand", model, ratio(ours, floor), 1.15))
            result.append(
                Goal("16 breaks: total, reduce-overhead / breakable_cg", model, ratio(rival, ours), 2.0, True)
            )
        elif model == "breaks-0":
            replay, constant = value(model, "full-graph", "replay_us"), value(model, "constant", "host_us")
            limit = None if replay is None or constant is None else replay + constant
            text = "no break: total, breakable_cg / (raw replay + what Dynamo and AOTAutograd cost)"
            result.append(Goal(text, model, ratio(ours, limit), 1.10))
    for model in models:
        startups = value(model, "ours", "startup_s"), value(model, "reduce-overhead", "startup_s")
        result.append(Goal("start-up, breakable_cg / reduce-overhead", model, ratio(*startups), 1 / 3))
    return result


COLUMNS = (
    "contender",
    "host us",
    "total us",
    "start-up s",
    "graphs",
    "pool MiB",
    "reserved MiB",
    "difference",
    "notes",
)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return NOTHING if value is None else format(value / scale, form)

    notes = list(row.notes)
    if row.replay_us is not None:
        notes.append(f"the launch alone: {row.replay_us:.0f} us in total")
    if row.error:
        notes.insert(0, row.error if row.error.startswith("not run") else f"failed: {row.error}")
    elif row.contender == "ours" and not row.bitwise:
        notes.insert(0, "NOT bitwise equal to eager")
    return (
        CONTENDERS[row.contender],
        number(row.host_us, ",.0f"),
        number(row.total_us, ",.0f"),
        number(row.startup_s, ".2f"),
        number(row.graphs, "d") if row.graphs is None else str(row.graphs),
        number(row.pool_bytes, ".1f", 2**20),
        number(row.reserved_bytes, ".1f", 2**20),
        "0" if row.bitwise else number(row.max_abs_diff, ".2g"),
        "; ".join(notes),
    )


Shown = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns and rows of a table."""


def tables(rows: Sequence[Row], options: argparse.Namespace) -> list[Shown]:
    """One table for each model, and the goals."""
    in_order = sorted(medians(rows), key=lambda row: [*CONTENDERS].index(row.contender))
    stand_in = "A tiny stand-in for: " if options.smoke else ""
    shown: list[Shown] = [
        (stand_in + MODELS[model], COLUMNS, [cells(row) for row in in_order if row.model == model])
        for model in options.models
        if any(row.model == model for row in rows)
    ]
    if not options.smoke:
        columns = ("goal", "model", "measured", "wanted", "verdict")
        shown.append(("Goals", columns, [goal.cells() for goal in goals(rows, options.models)]))
    return shown


def markdown(rows: Sequence[Row], options: argparse.Namespace, facts: dict[str, str]) -> str:
    """The page."""

    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"

    lines = ["# Benchmarks", "", line(tuple(facts)), line(["---"] * len(facts)), line(tuple(facts.values())), ""]
    for title, columns, body in tables(rows, options):
        lines += [f"## {title}", "", line(columns), line(["---"] * len(columns)), *map(line, body), ""]
    return "\n".join([*lines, "## How", "", (__doc__ or "").split("\n", 1)[1].strip("\n"), ""])


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def read(path: Path) -> list[Row]:
    """The rows that an earlier run measured, and that did not fail."""
    if not path.exists():
        return []
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return [row for row in rows if not row.error]


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the files that were asked for; after each row, so that a run that is cut short leaves what it has."""
    facts = next((row.environment for row in rows if row.environment), {})
    facts = {**facts, "driver": options.driver, "date": datetime.now(UTC).date().isoformat()}
    if options.json:
        results = {
            "environment": facts,
            "rows": [asdict(row) for row in rows],
            "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in goals(rows, options.models)],
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(markdown(rows, options, facts), encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer loops, and by default 0 and 16 breaks only")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU with the tape driver: not a speed")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="CONTENDER", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=1, help="take each row so often, and show medians (1)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for each process (150)")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no process is started (420)")
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json holds, measure the rest")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    few = options.smoke or options.quick
    options.models = options.models or (
        ["breaks-16"] if options.smoke else ["breaks-0", "breaks-16"] if few else [*MODELS]
    )
    options.contenders = options.contenders or (["eager", "ours"] if options.smoke else [*CONTENDERS])
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write; 0 if breakable_cg ran everywhere and equals eager bit for bit."""
    options = parse(argv)
    if options.child:
        child(options)
    if not options.smoke and not torch.cuda.is_available():
        print(
            "this measures CUDA graphs and needs a CUDA GPU; --smoke only shows that the script runs", file=sys.stderr
        )
        return 2
    options.driver = "none" if options.smoke else driver_version()
    rows = read(options.json) if options.resume and options.json else []
    known = Counter((row.model, row.contender) for row in rows)
    pairs = [(m, c) for m in BY_IMPORTANCE for c in CONTENDERS if m in options.models and c in options.contenders]
    options.models = [m for m in MODELS if m in options.models or any(row.model == m for row in rows)]  # what is shown
    end = time.monotonic() + options.budget

    def run(pair: tuple[str, str]) -> Row:
        if time.monotonic() > end:
            return Row(*pair, error=f"not run: {options.budget:g} s are over (--resume goes on)")
        return run_child(*pair, options)

    # One at a time, as they share the GPU; a smoke test measures nothing, so there it does not matter.
    with ThreadPoolExecutor(max_workers=2 if options.smoke else 1) as pool:
        missing = [pair for number in range(options.rounds) for pair in pairs if known[pair] <= number]
        for row in pool.map(run, missing):
            rows.append(row)
            numbers = f"{row.total_us:,.0f} us" if row.total_us is not None and not row.error else row.error
            print(f"{row.model:10} {row.contender:16} {numbers}", file=sys.stderr, flush=True)
            write(rows, options)
    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, columns, body in tables(rows, options):
        table = Table(*columns, title=title, title_justify="left")
        for cell_texts in body:
            table.add_row(*cell_texts)
        console.print(table, markup=False)
    return int(any(row.failed for row in rows if row.contender == "ours"))


if __name__ == "__main__":
    sys.exit(main())
