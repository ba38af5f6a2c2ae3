"""Several processes: wrappers that shard a model or average its gradients, and collectives between ranks.

Each test spawns its ranks, which compare with eager by themselves. On the CPU they talk over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import breakable_backend
import ranks
import silly
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain
from checks import assert_same, program_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")
Wrap = Callable[[nn.Module, torch.device], nn.Module]


def on_ranks(*sizes: int) -> pytest.MarkDecorator:
    """Groups of so many ranks on the CPU and on GPUs; four ranks on GPUs alone, since a CPU would be long at it."""
    on_gpus = [pytest.param(size, "cuda", marks=pytest.mark.gpu, id=f"{size}-cuda") for size in (*sizes, 4)]
    return pytest.mark.parametrize(
        ("size", "kind"), [*(pytest.param(size, "cpu", id=f"{size}-cpu") for size in sizes), *on_gpus]
    )


def spawn(body: ranks.Body, size: int, kind: str, folder: Path) -> None:
    if kind == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs: there is {torch.cuda.device_count()}")
    ranks.run(body, size, kind, folder)


def options_on(device: torch.device) -> dict[str, Any]:
    return {"driver": "cuda" if device.type == "cuda" else "tape", "min_kernels": 1}


# --- wrappers -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sin()


def in_buckets(model: nn.Module, device: torch.device) -> nn.Module:
    """Gradients are averaged in several buckets, and Dynamo cuts its graph at each."""
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)


def averaged(model: nn.Module, device: torch.device) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Each block by itself, and the root."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)


def sharded_root(model: nn.Module, device: torch.device) -> nn.Module:
    """The root alone."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def flat(model: nn.Module, device: torch.device, *, original: bool = True) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=device, use_orig_params=original)


def flat_alone(model: nn.Module, device: torch.device) -> nn.Module:
    """With flat parameters alone, of which Dynamo takes nothing."""
    return flat(model, device, original=False)


WRAPPERS: dict[Wrap, tuple[int, str]] = {
    averaged: (1, "Dynamo skips the file that it is in, and compiles what it calls"),
    in_buckets: (1, "Dynamo skips the file that it is in, and compiles what it calls"),
    fully_sharded: (1, "FSDP's hooks are not traced, and the modules between them are compiled one by one"),
    sharded_root: (1, ""),
    flat: (1, "Dynamo skips the file that it is in, and compiles what it calls"),
    flat_alone: (0, "FSDP with use_orig_params=False"),
}
"""How a model is wrapped: graphs at least, and what the report says of what Dynamo skips."""


def unwrapped(wrap: Wrap, device: torch.device) -> Net:
    torch.manual_seed(0)
    width = 40_000 if wrap is in_buckets else 16  # more than a megabyte for each weight, the least that a bucket takes
    return Net(width).to(device)


def wrapped(wrap: Wrap, device: torch.device) -> nn.Module:
    return wrap(unwrapped(wrap, device), device)


def without_gradients(device: torch.device) -> None:
    """Each wrapper, compiled around the model: results are eager's, and the report has a line for all that ran."""
    for wrap, (graphs, why) in WRAPPERS.items():
        torch.compiler.reset()
        reference, model = wrapped(wrap, device), wrapped(wrap, device)
        compiled = torch.compile(model, backend="breakable_cg", options=options_on(device))
        with torch.no_grad():
            for _ in range(6):
                x = torch.randn(4, 8, device=device)
                assert torch.equal(compiled(x), reference(x)), wrap.__name__
        report = explain(compiled)
        what = f"{wrap.__name__}: {report}"
        assert len(report.programs) >= graphs, what
        assert len(report.programs) == len(explain().programs), what
        assert report.eager_graphs == (), what
        assert all(program.replays >= 2 for program in report.programs), what
        told(report, wrap, why)
        breakable_backend.reset(compiled)


def compiled_inside(device: torch.device) -> None:
    """The wrapper around what is compiled: the model, or each block where blocks are sharded."""
    for wrap in (averaged, in_buckets, fully_sharded, flat):
        torch.compiler.reset()
        reference, net = wrapped(wrap, device), unwrapped(wrap, device)
        for part in net.blocks if wrap is fully_sharded else [net]:
            part.compile(backend="breakable_cg", options=options_on(device))
        model = wrap(net, device)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for _ in range(4):
                    x = torch.randn(4, 8, device=device)
                    results = [function(x) for function in (model, reference)]
                    assert torch.equal(*results), (wrap.__name__, grad)
                    if grad:
                        for result in results:
                            result.square().sum().backward()
        for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_same(local(mine.grad), local(theirs.grad), f"{wrap.__name__}, {name}")
        report = explain(model)
        what = f"{wrap.__name__}: {report}"
        halves = [program for program in report.programs if program.name.startswith(HALVES)]
        assert len(report.programs) > len(halves), what
        assert halves or report.eager_graphs, what
        assert report.programs == explain().programs, what
        assert report.eager_graphs == explain().eager_graphs, what
        assert "is not compiled itself" not in str(report), what
        breakable_backend.reset(model)


def with_gradients(device: torch.device) -> None:
    """The same without captured training: gradients are eager's, and each graph, which runs eagerly, has its line."""
    for wrap, (graphs, why) in WRAPPERS.items():
        torch.compiler.reset()
        reference, model = wrapped(wrap, device), wrapped(wrap, device)
        compiled = torch.compile(model, backend="breakable_cg", options={**options_on(device), "training": False})
        for _ in range(3):
            x = torch.randn(4, 8, device=device)
            for function in (compiled, reference):
                function(x).square().sum().backward()
            for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
                assert_same(local(mine.grad), local(theirs.grad), f"{wrap.__name__}, {name}")
        report = explain(compiled)
        what = f"{wrap.__name__}: {report}"
        assert (report.programs, explain().programs) == ((), ()), what
        assert len(report.eager_graphs) >= graphs, what
        assert len(report.eager_graphs) == len(explain().eager_graphs), what
        assert str(report).count("eager, because it needs gradients") == len(report.eager_graphs), what
        told(report, wrap, why)


def captured_training(device: torch.device) -> None:
    """Forward and backward are captured, where Dynamo hands over a graph: gradients and weights of all steps are eager's."""
    for wrap, (graphs, _) in WRAPPERS.items():
        torch.compiler.reset()
        reference, model = wrapped(wrap, device), wrapped(wrap, device)
        compiled = torch.compile(model, backend="breakable_cg", options=options_on(device))
        descend(((compiled, model), (reference, reference)), 8, device, wrap.__name__)
        report = explain(compiled)
        what = f"{wrap.__name__}: {report}"
        assert len(report.programs) + len(report.eager_graphs) >= graphs, what
        if wrap in CAPTURED:
            replays = {half: [p.replays for p in report.programs if p.name.startswith(half)] for half in HALVES}
            # Of weights that FSDP gathers anew too: the first backward shows which these are.
            assert all(min(replays[half], default=0) >= 8 - 4 for half in HALVES), what
        breakable_backend.reset(compiled)


HALVES = "forward", "backward"
CAPTURED: set[Wrap] = {averaged, in_buckets, fully_sharded, sharded_root}
"""Wrappers whose graphs are plain enough for both halves to be captured."""


def descend(pairs: Any, steps: int, device: torch.device, what: str) -> None:
    """Steps of gradient descent of two models, each called by a function; gradients and weights must be the same."""
    optimizers = [torch.optim.SGD(module.parameters(), lr=1e-5, momentum=0.9) for _, module in pairs]
    for step in range(steps):
        x = torch.randn(4, 8, device=device) + dist.get_rank()
        losses = []
        for (function, _), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(function(x).square().sum())
            losses[-1].backward()
        assert torch.equal(*losses), (what, step)
        (_, mine), (_, theirs) = pairs
        for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert_same(local(one.grad), local(other.grad), f"{what}, step {step}, {name}")
        for optimizer in optimizers:
            optimizer.step()


def local(gradient: Any) -> Tensor | None:
    """A rank's own part; None where it has none."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def told(report: breakable_backend.Report, wrap: Wrap, why: str) -> None:
    assert bool(report.skipped) == bool(why), (wrap.__name__, report.skipped)
    assert "at the first call" not in str(report), wrap.__name__
    if why:
        assert any(why in reason for reason in report.skipped.values()), (wrap.__name__, report.skipped)
        names = [where.partition("/")[0] for where in report.skipped]
        assert all(f"Dynamo compiled nothing of {name}" in str(report) for name in names)


@on_ranks(1, 2)
def test_wrappers(size: int, kind: str, tmp_path: Path) -> None:
    """Line 9: DDP and FSDP around a model: right, each graph has its line, and what Dynamo skips is told as that."""
    spawn(without_gradients, size, kind, tmp_path)


@on_ranks(1, 2)
def test_wrappers_in_training(size: int, kind: str, tmp_path: Path) -> None:
    """Line 9: the same where gradients are needed."""
    spawn(with_gradients, size, kind, tmp_path)


@on_ranks(1, 2)
def test_wrappers_with_captured_training(size: int, kind: str, tmp_path: Path) -> None:
    """Lines 1 and 3: the same where forward and backward are captured, over several steps; hooks' collectives keep their order."""
    spawn(captured_training, size, kind, tmp_path)


@on_ranks(2)
def test_wrappers_around_compiled_modules(size: int, kind: str, tmp_path: Path) -> None:
    """Line 9: a wrapper around a module that was compiled in place, without gradients and with them."""
    spawn(compiled_inside, size, kind, tmp_path)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch: DataParallel is deprecated
def test_data_parallel() -> None:
    """Line 11: replicas of the module in a compiled wrapper run in threads, a GPU each; torch makes none of a compiled module."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    device = torch.device("cuda", 0)
    reference = nn.DataParallel(unwrapped(averaged, device), [0, 1])
    model = torch.compile(reference, backend="breakable_cg", options=options_on(device))
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(8, 8, device=device)
            assert torch.equal(model(x), reference(x))
    assert "at the first call" not in str(explain(model))


@pytest.mark.filterwarnings("ignore:Profiler record function")  # Dynamo's, of a line of DDP's
def test_buckets(group: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: Dynamo cuts a graph at DDP's buckets; each part is captured, and gives real tensors from the first call on."""
    reference, model = wrapped(in_buckets, device), wrapped(in_buckets, device)
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 8, device=device)
            got, want = compiled(x), reference(x)
            assert type(got) is Tensor
            assert torch.equal(got, want)
    programs = explain(compiled).programs
    assert len(programs) >= 2
    assert [(program.num_graph_segments, program.replays) for program in programs] == [(1, 3)] * len(programs)


class Spread(nn.Module):
    """A weight that each rank has whole, and rows that are spread over the ranks: its gradients are partial sums."""

    def __init__(self, mesh: Any, device: torch.device) -> None:
        from torch.distributed.tensor import Replicate, distribute_tensor

        super().__init__()
        torch.manual_seed(0)
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(torch.randn(4, 4, device=device), mesh, [Replicate()]))

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        return (DTensor.from_local(x, self.mesh, [Shard(0)]) @ self.weight).relu().to_local()


def test_gradients_that_are_placed_otherwise(group: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 3: gradients of DTensors are placed as in eager, and a write before the backward is eager's error."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (1,))
    models = [Spread(mesh, device) for _ in range(2)]
    compiled = torch.compile(models[0], backend="breakable_cg", options={**options, "min_kernels": 1})
    functions = compiled, models[1]

    def is_noticed() -> None:
        for function, model in zip(functions, models, strict=True):
            y = function(torch.randn(3, 4, device=device, requires_grad=True))
            with torch.no_grad():
                model.weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()

    is_noticed()
    for _ in range(8):
        x = torch.randn(3, 4, device=device, requires_grad=True)
        found = []
        for function, model in zip(functions, models, strict=True):
            y = function(x)
            backward = threading.Thread(target=y.square().sum().backward)  # as autograd does on a GPU
            backward.start()
            backward.join()
            assert [str(p) for p in model.weight.grad.placements] == ["P(sum)"]  # type: ignore[union-attr]
            found.append((y.detach(), x.grad, local(model.weight.grad)))
            x.grad = model.weight.grad = None
        assert_same(*found)
    assert [program.replays >= 3 for program in explain(compiled).programs] == [True, True]
    is_noticed()


@pytest.mark.parametrize("kind", ["sizes", "output"])
def test_distributed_tensors_that_stay_eager(
    kind: str, group: Any, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: a DTensor whose sizes vary, or that is returned, keeps a graph eager, and the report says so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    model = Spread(init_device_mesh(device.type, (1,)), device)

    def called(x: Any) -> Any:
        y = x @ model.weight
        return y.relu() if kind == "output" else y.to_local().relu()

    compiled = torch.compile(
        called, backend="breakable_cg", options={**options, "training": True}, dynamic=kind == "sizes"
    )
    for rows in (3, 3, 5, 5, 5):
        x = torch.randn(rows, 4, device=device)
        found = []
        for function in (compiled, called):
            y = function(DTensor.from_local(x, model.mesh, [Shard(0)]))
            y.square().sum().backward()
            found.append((local(y.detach()), local(model.weight.grad)))
            model.weight.grad = None
        assert_same(*found)
    report = explain(compiled)
    assert not report.programs
    why = "the sizes of a DTensor vary" if kind == "sizes" else "DTensor"
    assert why in str(report), str(report)


# --- collectives ----------------------------------------------------------------------------------------------------------

SIZE = 1 << 16
"""Elements, so many that a collective is under way for a while."""


def ops() -> Any:
    return torch.ops._c10d_functional


def all_reduce(x: Tensor, name: str) -> Tensor:
    return ops().wait_tensor(ops().all_reduce(x * 2, "sum", name)) + 1


def all_gather(x: Tensor, name: str) -> Tensor:
    return ops().wait_tensor(ops().all_gather_into_tensor(x * 2, dist.get_world_size(), name)) + 1


def reduce_scatter(x: Tensor, name: str) -> Tensor:
    return ops().wait_tensor(ops().reduce_scatter_tensor(x * 2, "sum", dist.get_world_size(), name)) + 1


def broadcast(x: Tensor, name: str) -> Tensor:
    return ops().wait_tensor(ops().broadcast(x * 2, 0, name)) + 1


def late(x: Tensor, name: str) -> Tensor:
    """Two collectives under way at once, which are waited for in the other order."""
    first, second = ops().all_reduce(x * 2, "sum", name), ops().all_reduce(x + 1, "max", name)
    return ops().wait_tensor(second) * 3 + ops().wait_tensor(first)


def chain(x: Tensor, name: str) -> Tensor:
    """One collective takes the result of another, over an eager step."""
    return all_gather(silly.triple(reduce_scatter(x, name)), name)


COLLECTIVES = (all_reduce, all_gather, reduce_scatter, broadcast, late, chain)


def between(function: Callable[[Tensor, str], Tensor]) -> Callable[[Tensor, str], Tensor]:
    """``function`` between two eager steps."""

    def call(x: Tensor, name: str) -> Tensor:
        return silly.triple(function(silly.triple(x.sin()), name).cos()) + 1

    return call


def values(device: torch.device) -> Tensor:
    """Other values in each rank."""
    return torch.randn(SIZE, device=device) + dist.get_rank()


def world() -> Any:
    group = dist.group.WORLD
    assert group is not None
    return group


def replayed(device: torch.device) -> None:
    """Each collective, alone and between two eager steps, over several calls."""
    group = world()
    for function in (*COLLECTIVES, *map(between, COLLECTIVES)):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="breakable_cg", options=options_on(device))
        issued = []
        with torch.no_grad():
            for _ in range(7):
                x = values(device)
                before = group._get_sequence_number_for_group()
                got = compiled(x, group.group_name)
                issued.append(group._get_sequence_number_for_group() - before)
                assert torch.equal(got, function(x, group.group_name)), function
        program = program_of(compiled)
        assert program.replays == 5
        assert program.num_graph_segments >= 1
        assert not any("collective" in reason.op or "wait" in reason.op for reason in program.reasons)
        # each is issued once in each call; of what a graph launches NCCL's group counts nothing
        assert issued == [issued[0]] * 7 if device.type == "cpu" else issued == [*issued[:1] * 2, 0, 0, 0, 0, 0], issued
        breakable_backend.reset(compiled)


def apart(device: torch.device) -> None:
    """While one rank replays, another runs plainly, or records, or is not compiled at all."""
    group, rank = world(), dist.get_rank()
    for function in (all_reduce, between(all_gather), chain):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="breakable_cg", options=options_on(device))
        with torch.no_grad():
            for call in range(14):
                if call == 4 + 4 * rank:
                    breakable_backend.reset(compiled)
                x = values(device)
                mine = function if call == 10 + rank else compiled
                assert torch.equal(mine(x, group.group_name), function(x, group.group_name)), (function, call)
        assert program_of(compiled).replays >= 3


def delayed(device: torch.device) -> None:
    """In each call one rank comes a while after the other, and each records while the other replays or waits for it."""
    group, rank = world(), dist.get_rank()
    for function in (all_reduce, between(all_gather)):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="breakable_cg", options=options_on(device))
        with torch.no_grad():
            for call in range(10):
                if call == 3 + 3 * rank:
                    breakable_backend.reset(compiled)
                if (call + rank) % 2:
                    time.sleep(0.15)
                x = values(device)
                assert torch.equal(compiled(x, group.group_name), function(x, group.group_name)), (function, call)
        assert program_of(compiled).replays >= 3


def planned(device: torch.device) -> None:
    """A model that is shared out by a plan of DTensor's: its collectives are in the one captured graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    reference = unwrapped(averaged, device)
    model = unwrapped(averaged, device)
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options_on(device))
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(4, 8, device=device)
            dist.broadcast(x, 0)
            got = compiled(x)
            assert torch.equal(got, model(x))
            torch.testing.assert_close(got, reference(x))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (1, 0, 4)
    assert [recording.key for recording in program.recordings] == ["0"]


def planned_training(device: torch.device) -> None:
    """The same in training: parameters are DTensors, whose gradients are DTensors, and the collectives are in both halves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    models = [unwrapped(averaged, device) for _ in range(2)]
    for block in (block for model in models for block in model.blocks):
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    torch.compiler.reset()
    options = options_on(device)
    compiled = torch.compile(models[0], backend="breakable_cg", fullgraph=True, options=options)
    descend(((compiled, models[0]), (models[1], models[1])), 8, device, "planned")
    assert [p.grad.placements for p in models[0].parameters()] == [p.grad.placements for p in models[1].parameters()]  # type: ignore[union-attr]
    programs = explain(compiled).programs
    assert [(p.num_graph_segments, p.num_eager_segments) for p in programs] == [(1, 0), (1, 0)], programs
    assert [p.replays >= 4 for p in programs] == [True, True], programs


def placed(device: torch.device) -> None:
    """Results whose backwards place a weight's gradient otherwise: a part of a sum on each rank, or the same on all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    torch.manual_seed(0)
    weight = distribute_tensor(torch.randn(4, 4, device=device), mesh, [Replicate()]).requires_grad_()
    same = torch.randn(4, 4, device=device)

    def both(rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        first = DTensor.from_local(rows, mesh, [Shard(0)]) @ weight
        second = DTensor.from_local(whole, mesh, [Replicate()]) @ weight
        return first.to_local().sin(), second.to_local().cos()

    compiled = torch.compile(both, backend="breakable_cg", options=options_on(device))
    seen = []
    for step in range(15):
        rows = torch.randn(3, 4, device=device) + dist.get_rank()
        taken, found = ((0,), (1,), (0, 1))[step % 3], []
        for function in (compiled, both):
            results = function(rows, same)
            sum(results[number].square().sum() for number in taken).backward()
            found.append((results[0].detach(), weight.grad.placements, local(weight.grad)))
            weight.grad = None
        assert_same(*found, f"step {step}")
        seen.append(found[0][1])
    assert len(set(seen)) == 2, seen
    programs = explain(compiled).programs
    assert [program.replays >= 2 for program in programs] == [True] * 4, programs


def by_hand(device: torch.device) -> None:
    """Collectives under ``capture``, with an eager step between them."""
    group, x = world(), values(device)
    name, triple = group.group_name, eager_on_graph(lambda x: x * 3)

    def function(x: Tensor) -> Tensor:
        return all_gather(triple(all_reduce(x, name)), name)

    with torch.no_grad():
        function(x)
        graph = BreakableCUDAGraph(driver=options_on(device)["driver"])
        with capture(graph):
            y = function(x)
        assert torch.equal(y, function(x))
        for call in range(6):
            x.copy_(values(device))
            if call == 2 + dist.get_rank():
                y.copy_(function(x))  # this rank does by hand what the others replay
            else:
                graph.replay()
            assert torch.equal(y, function(x)), call
    assert graph.replays == 5
    ALIVE.append(graph)


ALIVE: list[BreakableCUDAGraph] = []
"""Graphs that are alive when their group ends."""


def left_alone(device: torch.device) -> None:
    """The group ends while recordings with its collectives are alive, and they after it."""
    group = world()
    compiled = torch.compile(between(all_reduce), backend="breakable_cg", options=options_on(device))
    with torch.no_grad():
        for _ in range(4):
            compiled(values(device), group.group_name)
    assert program_of(compiled).replays == 2


@on_ranks(1, 2)
def test_plans_in_training(size: int, kind: str, tmp_path: Path) -> None:
    """Lines 1 and 3: a model of DTensors trains as in eager, with forward and backward captured, and notices writes."""
    spawn(planned_training, size, kind, tmp_path)


@on_ranks(2)
def test_gradients_that_are_placed_by_result(size: int, kind: str, tmp_path: Path) -> None:
    """Line 1: a gradient of a DTensor is placed as in eager, whichever results of a graph a step runs backward."""
    spawn(placed, size, kind, tmp_path)


@on_ranks(2)
@pytest.mark.parametrize(
    "body", [replayed, apart, delayed, planned, by_hand, left_alone], ids=lambda body: body.__name__
)
def test_collectives(body: ranks.Body, size: int, kind: str, tmp_path: Path) -> None:
    """Lines 1 and 3: the ranks' collectives in captured segments: eager's results, and no rank waits for ever."""
    spawn(body, size, kind, tmp_path)
