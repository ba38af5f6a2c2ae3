"""Where the time of a call goes, in turns within one process: a host that slows down slows all contenders alike.

    PYTHONPATH=. python examples/benchmarks/turns.py                       # all of it
    PYTHONPATH=. python examples/benchmarks/turns.py transformer llama     # some parts
    PYTHONPATH=. python examples/benchmarks/turns.py llama --batches 1 --turns 6

- ``transformer`` and ``unbroken``: the transformer of ``replay.py`` with 16 breaks, and with none. The floor is the loop that a patient user
  writes: the same pieces captured by hand, launches, direct calls of the attention, a copy of each result, of the input
  and of the output. Above it the generated replay, the executor (the same with its key, lock and stream), a bound call, and
  what ``torch.compile`` returned, with fresh and with static outputs; then ``mode="reduce-overhead"``.
- ``llama``: a decode step of the Llama of ``replay.py``, batch 1, 8 and 64.
- ``bound``: two models without a break, one that takes long and one that takes nothing. The floor is a copy of the input, a
  ``CUDAGraph.replay()`` and a clone of the output; then bound calls with each ``check``, the compiled function, and
  ``mode="reduce-overhead"``. With ``outputs="static"`` and the input at its address the floor is the replay alone.
- ``table``: a model of 2, 64, 256 and 1,024 parameters with 0, 1, 16 and 64 breaks: what of the host's time is whose. The
  floor is a loop of the same launches, eager calls and copies; ``Dynamo`` is a backend that returns one result for ever.

Host: microseconds to issue a call, in 5 calls that start with an idle GPU. Total: until the GPU is done, in loops of 20.
Turns are short and many, since what slows the host down comes and goes within a second: each number is the median of the
turns, and a ratio the median of the turns' ratios to the floor.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, TypeVar

import replay  # from beside this file
import torch
from torch import Tensor, nn

from breakable_backend import bind
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers.cuda import CudaDriver
from breakable_backend.recordings.recording import EagerStep, GraphStep, Variable

TURNS = 60
Call = Callable[[Tensor], object]
T = TypeVar("T")


def host(call: Call, inputs: Sequence[Tensor]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for x in inputs:
        call(x)
    return (time.perf_counter() - start) / len(inputs) * 1e6


def total(call: Call, inputs: Sequence[Tensor], loops: int = 4) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(loops):
        for x in inputs:
            call(x)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / loops / len(inputs) * 1e6


def measured(
    inputs: Sequence[Tensor], rewind: Callable[[], None] = lambda: None
) -> Callable[[Call], tuple[float, float]]:
    """Measures host and total of a call."""

    def measure(call: Call) -> tuple[float, float]:
        rewind()
        call(inputs[0])
        issued = host(call, inputs)
        rewind()
        return issued, total(call, inputs)

    return measure


def in_turns(
    contenders: dict[str, T], measure: Callable[[T], tuple[float, float]], turns: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Host and total of each contender in each turn."""
    rows: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    gc.collect()
    gc.disable()  # a collection would fall to one of them
    for _ in range(turns):
        for name, contender in contenders.items():
            for times, time_of_turn in zip(rows[name], measure(contender), strict=True):
                times.append(time_of_turn)
    gc.enable()
    return rows


def show(title: str, rows: dict[str, tuple[list[float], list[float]]]) -> None:
    """A line for each contender, with ratios to the first."""
    floor = next(iter(rows.values()))
    for name, row in rows.items():
        ratios = [median(mine / base for mine, base in zip(row[i], floor[i], strict=True)) for i in (0, 1)]
        print(
            f"{title}: {name:26} host {median(row[0]):8.1f} us {ratios[0]:5.2f} x  total {median(row[1]):8.1f} us {ratios[1]:5.2f} x",
            flush=True,
        )


def inside(compiled: Callable[..., Any], call: Call, x: Tensor) -> tuple[Executor, Entry, list[Any]]:
    """The executor that ``call`` of ``compiled`` comes to, what it replays for ``x``, and with which arguments."""
    seen: list[tuple[Executor, Entry, list[Any]]] = []
    with ExitStack() as stack:
        for executor in executors_of(compiled):
            stack.enter_context(executor.showing(lambda entry, args, at=executor: seen.append((at, entry, args))))
        call(x)
    (found,) = seen
    return found


# --- whole models -----------------------------------------------------------------------------------------------------


def by_hand(work: replay.Workload) -> Call:
    """The floor: pieces of the model captured by hand, with a copy of its output."""
    pieces = replay.ByHand(work, whole=work.breaks == 0)
    launch, stream = pieces.runtime.cudaGraphLaunch, torch.cuda.current_stream().cuda_stream
    attend, steps, last, bridge, output = work.attend, pieces.eager_steps, pieces.last, pieces.input, pieces.output

    def call(x: Tensor, pieces: object = pieces) -> Tensor:
        bridge.copy_(x)
        for executable, arguments, result in steps:
            launch(executable, stream)
            result.copy_(attend(*arguments))
        launch(last, stream)
        return output.clone()  # type: ignore[no-any-return]

    return call


def contenders(work: replay.Workload, *, rival: bool = True) -> dict[str, Call]:
    """All that is compared on ``work``, warm, each checked against eager."""
    compiled = torch.compile(work.module, backend="breakable_cg")
    static = torch.compile(work.module, backend="breakable_cg", options={"outputs": "static"})
    calls = {"by hand": by_hand(work), "compiled": work.caller(compiled), "static outputs": work.caller(static)}
    if rival:
        torch._inductor.config.graph_partition = True
        calls["reduce-overhead"] = work.caller(torch.compile(work.module, mode="reduce-overhead"))
    eager = work.caller(work.module)
    for name, call in calls.items():
        for x in work.inputs:
            work.rewind()
            want = eager(x)
            work.rewind()
            got = call(x)
            assert name == "reduce-overhead" or torch.equal(got, want), f"{name} differs from eager"
    work.rewind()
    executor, entry, args = inside(compiled, calls["compiled"], work.inputs[0])
    assert entry.replay is not None
    function, stream = entry.replay.function, torch.cuda.current_stream().cuda_stream
    rest = {name: calls.pop(name) for name in [*calls] if name != "by hand"}
    calls["replay function"] = lambda _: function(list(args), stream)
    calls["executor"] = lambda _: executor(list(args))
    calls["bound"] = work.caller(bound(work, compiled))
    return {**calls, **rest, "eager": eager}


def bound(work: replay.Workload, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled`` without Dynamo's guards, for the inputs of ``work``."""
    made: list[Callable[..., Any]] = []

    def binding(*args: Any, **kwargs: Any) -> Any:
        made.append(bind(compiled, *args, misfit="raise", **kwargs))
        return compiled(*args, **kwargs)

    work.caller(binding)(work.inputs[0])
    work.rewind()
    return made[0]


def transformer(chosen: argparse.Namespace, breaks: int = 16) -> None:
    torch.compiler.reset()
    work = replay.workload(f"breaks-{breaks}", torch.device("cuda"))
    rows = in_turns(contenders(work), measured(work.inputs, work.rewind), chosen.turns or TURNS)
    show(f"transformer, {breaks} breaks", rows)


def unbroken(chosen: argparse.Namespace) -> None:
    transformer(chosen, breaks=0)


def llama(chosen: argparse.Namespace) -> None:
    for batch in chosen.batches:
        torch.compiler.reset()
        torch.manual_seed(0)
        work = replay.Llama(torch.device("cuda"), batch)
        rows = in_turns(contenders(work, rival=batch == 1), measured(work.inputs, work.rewind), chosen.turns or 12)
        show(f"llama, batch {batch}", rows)


def short(chosen: argparse.Namespace) -> None:
    """What a bound call adds where there is no break."""
    for layers, width in ((8, 2048), (2, 16)):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).cuda().eval()
        inputs = [torch.randn(4, width, device="cuda") for _ in range(5)]
        compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1})
        rival = torch.compile(model, mode="reduce-overhead")
        for call in (compiled, compiled, compiled, rival, rival, rival):
            call(inputs[0])
        bridge, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(bridge)

        def by_hand(x: Tensor, bridge: Tensor = bridge, graph: Any = graph, output: Tensor = output) -> Tensor:
            bridge.copy_(x)
            graph.replay()
            return output.clone()

        calls: dict[str, Call] = {"copy, replay, clone": by_hand}
        for check in ("inputs", "parameters", "nothing"):
            calls[f"bound, {check}"] = bind(compiled, inputs[0], check=check, misfit="raise")
        calls |= {"compiled": compiled, "reduce-overhead": rival}
        for call in calls.values():
            assert call is rival or torch.equal(call(inputs[1]), model(inputs[1]))  # type: ignore[arg-type]
        show(f"{layers} x Linear {width}", in_turns(calls, measured(inputs), chosen.turns or TURNS))

        static = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, "outputs": "static"})
        torch._dynamo.mark_static_address(bridge)
        for _ in range(3):
            static(bridge)
        calls = {"replay": lambda _, graph=graph: graph.replay()}  # type: ignore[misc]
        for check in ("inputs", "nothing"):
            short_call = bind(static, bridge, check=check, misfit="raise")
            calls[f"bound, {check}"] = lambda _, call=short_call, x=bridge: call(x)  # type: ignore[misc]
        show(f"{layers} x Linear {width}, static", in_turns(calls, measured(inputs), chosen.turns or TURNS))


# --- whose the host's time is --------------------------------------------------------------------------------------------


@torch.library.custom_op("turns::step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def step(x: Tensor) -> Tensor:
    """What no graph may hold, and takes little."""
    return x + 1


@step.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Layers(nn.Module):
    """Layers of two parameters each, and breaks spread over them."""

    def __init__(self, parameters: int, breaks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(parameters // 2))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        made = 0
        for number, layer in enumerate(self.layers, 1):
            x = layer(x).relu()
            while made * len(self.layers) < number * self.breaks:
                x = step(x).tanh() * 0.5
                made += 1
        return x


def floor_of(entry: Entry, bridge: Tensor) -> Call:
    """A loop of the launches, eager calls and copies of a recording, whose graphs copy nothing by themselves."""
    from cuda.bindings import runtime

    assert entry.recording is not None
    constants = entry.recording.constants
    pieces: list[tuple[Any, Any, Any, Any]] = []
    pending: list[tuple[Callable[..., Any], Any, Any]] = []
    for part in entry.recording.steps:
        if isinstance(part, EagerStep):
            (call,) = part.calls
            (argument,) = call.args
            pending = [(call.function, constants[argument.name], None)]
        elif isinstance(part, GraphStep):
            target = constants[part.loads[0].bridge.name].tensor
            function, argument, _ = pending.pop() if pending else (None, None, None)
            executable = runtime.cudaGraphExec_t(part.graph._graph.raw_cuda_graph_exec())  # type: ignore[attr-defined]
            pieces.append((executable, function, argument, target))
    (output,) = entry.recording.epilogue
    (place,) = output.args
    assert isinstance(place, Variable)
    result, launch, stream = constants[place.name], runtime.cudaGraphLaunch, torch.cuda.current_stream().cuda_stream
    (first, *_), *rest = pieces

    def call(x: Tensor) -> Tensor:
        bridge.copy_(x)
        launch(first, stream)
        for executable, function, argument, target in rest:
            target.copy_(function(argument))
            launch(executable, stream)
        return result.clone()  # type: ignore[no-any-return]

    return call


def recorded_without_feeds(model: nn.Module, inputs: Sequence[Tensor]) -> Entry:
    """A recording of ``model`` whose bridges are loaded before each launch, as by hand."""
    feeds, CudaDriver.feeds = CudaDriver.feeds, lambda *_: False  # type: ignore[method-assign, assignment]
    try:
        compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1})
        for x in inputs:
            compiled(x)
    finally:
        CudaDriver.feeds = feeds  # type: ignore[method-assign]
    _, entry, _ = inside(compiled, compiled, inputs[0])
    return entry


def table(chosen: argparse.Namespace) -> None:
    print(
        "host us a call: all | by hand + replay's own + executor's own + torch.compile's own (Dynamo alone) | bound | total"
    )
    for parameters in (2, 64, 256, 1024):
        for breaks in (0, 1, 16, 64):
            torch.compiler.reset()
            torch.manual_seed(0)
            model = Layers(parameters, breaks).cuda().eval()
            inputs = [torch.randn(4, 16, device="cuda") for _ in range(5)]
            compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1})
            for x in inputs:
                assert torch.equal(compiled(x), model(x))
            executor, entry, args = inside(compiled, compiled, inputs[0])
            by_hand = recorded_without_feeds(model, inputs)
            constant = torch.compile(model, backend=replay.without_aot)
            constant(inputs[0])
            assert entry.recording is not None
            assert entry.replay is not None
            function, stream = entry.replay.function, torch.cuda.current_stream().cuda_stream
            assert by_hand.recording is not None
            first = by_hand.recording.steps[0]
            assert isinstance(first, GraphStep)
            bridge = by_hand.recording.constants[first.loads[0].bridge.name].tensor
            calls: dict[str, Call] = {
                "floor": floor_of(by_hand, bridge),
                "replay": lambda _, f=function, a=args, s=stream: f(list(a), s),  # type: ignore[misc]
                "executor": lambda _, e=executor, a=args: e(list(a)),  # type: ignore[misc]
                "compiled": compiled,
                "dynamo": constant,
                "bound": bind(compiled, inputs[0], misfit="raise"),
            }
            rows = in_turns(calls, measured(inputs), chosen.turns or 25)
            floor, replayed, executed, whole, dynamo, short = (median(host) for host, _ in rows.values())
            print(
                f"{parameters:5} parameters, {breaks:2} breaks: {whole:7.1f} | {floor:7.1f} + {replayed - floor:6.1f} + "
                f"{executed - replayed:6.1f} + {whole - executed:6.1f} ({dynamo:6.1f}) | bound {short:7.1f} | "
                f"{median(rows['compiled'][1]):7.1f}",
                flush=True,
            )


PARTS = {"transformer": transformer, "unbroken": unbroken, "llama": llama, "bound": short, "table": table}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Times calls in turns.")
    parser.add_argument("parts", nargs="*", default=[*PARTS])
    parser.add_argument("--turns", type=int, help="how many, in place of each part's own number")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of llama; default: 1 8 64")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("needs a GPU")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with torch.no_grad():
        for name in chosen.parts:
            PARTS[name](chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
