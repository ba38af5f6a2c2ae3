"""Modules marked by class or instance: the layer runs eagerly, once in each call, without a change of its code."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import BreakableCUDAGraph, PartitionError, capture, explain, mark_eager, reset, unmark_eager
from breakable_backend.calling.registry import executors_of
from breakable_backend.marks import modules
from checks import assert_same

Compile = Callable[..., Any]
Mark = Callable[[Any], Any]


class Route(nn.Module):
    """A layer that branches on a value, counts its calls, and keeps a sum in a buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        assert type(x) is Tensor
        self.calls += 1
        self.total += x.detach().sum()
        chosen = self.left if float(x.detach().sum()) > 0 else self.right
        return chosen(x) * scale


class Block(nn.Module):
    def __init__(self, route: type[nn.Module] = Route) -> None:
        super().__init__()
        self.up, self.route, self.down = nn.Linear(4, 4), route(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.route(self.up(x).sin(), scale=2.0).cos()).tanh() + x


class Model(nn.Module):
    def __init__(self, *routes: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(route) for route in (routes or (Route, Route, Route)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def compile_ours(options: dict[str, Any]) -> Compile:
    def compiled(model: Any, fullgraph: bool = True, **more: Any) -> Any:
        chosen = {"min_kernels": 1, **options, **more}
        return torch.compile(model, backend="breakable_cg", fullgraph=fullgraph, options=chosen)

    return compiled


@pytest.fixture
def marked() -> Iterator[Mark]:
    """:func:`mark_eager`, undone after the test."""
    things = []

    def mark(thing: Any) -> Any:
        things.append(thing)
        return mark_eager(thing)

    yield mark
    for thing in things:
        unmark_eager(thing)


def vectors(device: torch.device, count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, generator=generator).to(device) for _ in range(count)]


def check(compiled: Any, model: nn.Module, device: torch.device, count: int = 5) -> None:
    """Results and buffers are those of a copy that is not compiled, and marked layers were called as often."""
    other = copy.deepcopy(model)
    for number, x in enumerate(vectors(device, count)):
        with torch.no_grad():
            assert_same(compiled(x), other(x), f"call {number + 1}")
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        if isinstance(mine, Route):
            assert mine.calls == theirs.calls
    assert_same(dict(model.named_buffers()), dict(other.named_buffers()), "buffers")


def eager_steps(compiled: Any) -> list[tuple[str, str]]:
    return [(reason.op, reason.text) for program in explain(compiled).programs for reason in program.reasons]


class Otherwise(nn.Module):
    """A layer that is called with a mask only while it is traced, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.route = Masked()

    def forward(self, x: Tensor) -> Tensor:
        return self.route(x.sin(), mask=x > 0 if torch.compiler.is_compiling() else None).cos() * 2


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x * 2


def test_called_otherwise_while_it_is_traced(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """The report names the argument that differs, and what to do, and has no second line about the same mark."""
    marked(Masked)
    compiled = compile_ours(Otherwise(), fullgraph=False)
    for x in vectors(device, 8):
        compiled(x)
    report = str(explain(compiled))
    assert "is traced (mask is a tensor) than as Python (mask is None), so" in report.replace("\n", " ")
    assert "to keep one program: pass the same arguments in both" in report
    assert "no graph of this function calls it" not in report
    torch._dynamo.reset()
    whole = compile_ours(Otherwise())
    with pytest.raises(PartitionError, match=r"\n  pass the same arguments in both"):
        for x in vectors(device, 8):
            whole(x)
    assert "functions.py" not in str(explain(whole))


def test_a_child_that_was_compiled_before(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """Marking what torch.compile returned for a layer marks the layer."""
    child = torch.compile(nn.Linear(4, 4), backend="eager")
    marked(child)
    compiled = compile_ours(nn.Sequential(child, nn.Tanh(), nn.ReLU()).to(device))
    with torch.no_grad():
        for x in vectors(device, 4):
            compiled(x)
    assert eager_steps(compiled) == [("Linear", "marked by mark_eager")]
    unmark_eager(child)
    assert not modules.marked()


# --- what is marked -------------------------------------------------------------------------------------------------------


def test_a_class_is_marked(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """All layers of a marked class are eager steps of one program, each called once in each call, the first included."""
    assert marked(Route) is Route
    model = Model().to(device)
    compiled = compile_ours(model)
    check(compiled, model, device)
    assert eager_steps(compiled) == [("Route", "marked by mark_eager")] * 3
    (program,) = explain(compiled).programs
    assert (program.num_graph_segments, program.replays) == (4, 2)
    assert [step.module for step in program.steps if step.kind == "eager"] == [f"blocks.{n}.route" for n in range(3)]


class Other(Route):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) + 1


class Called(Route):
    """A layer with a ``__call__`` of its own, such as those of transformers that checkpoint."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 3


def test_subclasses_are_marked(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """A mark of a class is one of its subclasses, with a ``forward`` or ``__call__`` of their own too."""
    marked(Route)
    model = Model(Other, Called, Route).to(device)
    compiled = compile_ours(model)
    check(compiled, model, device)
    assert [op for op, _ in eager_steps(compiled)] == ["Other", "Called", "Route"]


class Traced(Route):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.left(x) * scale


def test_an_instance_is_marked(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """A mark of one layer leaves others of its class in the captured segments."""
    model = Model(Traced, Traced, Traced).to(device)
    marked(model.blocks[1].route)
    compiled = compile_ours(model)
    check(compiled, model, device)
    assert eager_steps(compiled) == [("Traced", "marked by mark_eager")]
    (program,) = explain(compiled).programs
    assert [step.module for step in program.steps if step.kind == "eager"] == ["blocks.1.route"]


@pytest.mark.parametrize("by", ["class", "instance"])
def test_the_option_is_for_one_function(compile_ours: Compile, device: torch.device, by: str) -> None:
    """What ``eager_ops`` names is eager in that function alone; others of the same class are compiled as before, and stay."""
    model, other = Model(Traced, Traced).to(device), Model(Traced, Traced).to(device)
    plain = compile_ours(other)
    check(plain, other, device)
    (before,) = executors_of(plain)
    replays = explain(plain).programs[0].replays
    compiled = compile_ours(model, eager_ops=[Traced] if by == "class" else [model.blocks[0].route])
    check(compiled, model, device)
    check(plain, other, device)
    # A report is of all that was compiled of the class's code, so of both.
    assert eager_steps(compiled) == [("Traced", "named in eager_ops")] * (2 if by == "class" else 1)
    assert len(executors_of(compiled)) == 2
    assert next(p.replays for p in explain(plain).programs if p.name == before.name) == replays + 5
    assert "__call__" not in vars(Traced)


def test_layers_that_share_code(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """Blocks that are compiled one by one share Dynamo's code; the one with the marked layer does not."""
    model = Model(Traced, Traced, Traced).to(device)
    marked(model.blocks[2].route)
    compiled = [compile_ours(block) for block in model.blocks]
    for x in vectors(device):
        with torch.no_grad():
            for block, ours in zip(model.blocks, compiled, strict=True):
                assert_same(ours(x), block(x))
    programs = explain(compiled[0]).programs
    assert sorted((len(program.reasons), program.replays) for program in programs) == [(0, 3), (0, 3), (1, 2)]


def test_a_mark_is_undone(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """What is compiled after a mark was undone has no eager step."""
    model = Model(Traced).to(device)
    marked(Traced)
    unmark_eager(Traced)
    unmark_eager(Traced)
    compiled = compile_ours(model)
    check(compiled, model, device)
    assert eager_steps(compiled) == []


def test_recording_again_after_a_reset(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """After a reset a model with marked layers is recorded again."""
    marked(Route)
    model = Model().to(device)
    compiled = compile_ours(model)
    check(compiled, model, device)
    reset(compiled)
    check(compiled, model, device)
    torch._dynamo.reset()
    check(compiled, model, device)
    assert explain(compiled).programs[0].replays > 0


def test_nothing_keeps_a_marked_module(marked: Mark) -> None:
    """A single module that is marked dies with its model; a copy of it is not marked."""
    model = Model(Traced)
    mark_eager(model.blocks[0].route)
    assert model.blocks[0].route in modules.marked()
    assert copy.deepcopy(model).blocks[0].route not in modules.marked()
    gone = weakref.ref(model.blocks[0].route)
    del model
    gc.collect()
    assert gone() is None


# --- what such a layer may do ---------------------------------------------------------------------------------------------


def test_hooks_run_once(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """Hooks of a marked layer are parts of its eager step: any Python, once in each call, on real tensors."""
    marked(Route)
    model, seen = Model().to(device), []
    for block in model.blocks:
        block.route.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].sum())))
        block.route.register_forward_hook(lambda _, args, result: result * (2 if float(result.sum()) > 0 else 3))
    compiled = compile_ours(model)
    for number, x in enumerate(vectors(device)):
        with torch.no_grad():
            seen.clear()
            result = compiled(x)
            ours = list(seen)
            seen.clear()
            assert_same(result, model(x), f"call {number + 1}")
            assert ours == seen
            assert len(seen) == 3


def test_captured_code_reads_its_buffers(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """What a marked layer writes into its buffers is what captured code behind it reads, and before it the old values."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route = Route()

        def forward(self, x: Tensor) -> Tensor:
            before = self.route.total.sin() + 1
            return self.route(x).cos() * before + self.route.total.exp().sin()

    marked(Route)
    model = Reader().to(device)
    check(compile_ours(model), model, device)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("backend", ["breakable_cg", "aot_eager", "inductor", "eager"])
def test_gradients(options: dict[str, Any], marked: Mark, device: torch.device, backend: str) -> None:
    """Gradients pass a marked layer, to its parameters and to what comes before, whatever the backend."""
    if backend == "inductor" and device.type == "cpu":
        pytest.skip("it compiles with a C++ compiler, for half a minute")
    marked(Route)
    model = Model(Route, Route).to(device)
    other = copy.deepcopy(model)
    more = {"options": options} if backend == "breakable_cg" else {}
    compiled = torch.compile(model, backend=backend, fullgraph=True, **more)
    for x in vectors(device, 3):
        for each, function in ((model, compiled), (other, other)):
            each.zero_grad()
            function(x).sum().backward()
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if theirs.grad is None:  # of the branch that was not taken: a compiler's backward has zeros
                assert mine.grad is None or not mine.grad.any()
            else:
                torch.testing.assert_close(mine.grad, theirs.grad)
    assert [block.route.calls for block in model.blocks] == [3, 3]


class Fills(nn.Module):
    """A layer that writes a tensor that it is given."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(x * 2)
        return x + float(cache.sum())


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fills = Fills()

    def forward(self, x: Tensor) -> Tensor:
        cache = x.sin() + 1
        return self.fills(x, cache).cos() + cache.cos()


@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_that_writes_its_argument(
    compile_ours: Compile, marked: Mark, device: torch.device, inference: bool
) -> None:
    """A marked layer that writes a tensor that it is given is a graph break, with what to do instead; results are right."""
    marked(Fills)
    model = Cached().to(device)
    compiled = compile_ours(model, fullgraph=False)
    for x in vectors(device):
        with torch.inference_mode(inference), torch.no_grad():
            assert_same(compiled(x), model(x))
    assert any(
        "Fills, marked by mark_eager, is no node: it wrote a tensor" in why for why in explain(compiled).graph_breaks
    )
    torch._dynamo.reset()
    whole = compile_ours(model)
    with torch.no_grad(), pytest.raises(PartitionError, match=r"mutates_args"):
        for x in vectors(device):
            whole(x)


def test_a_mark_without_effect_is_told(compile_ours: Compile, marked: Mark, device: torch.device) -> None:
    """The report names a class, and a module, that is marked or named and that no graph of the function calls."""
    model = Model(Traced).to(device)
    marked(Other)
    marked(model)
    compiled = compile_ours(model, eager_ops=[Called])
    check(compiled, model, device)
    notes = explain(compiled).programs[0].notes
    for name in ("Other is marked by mark_eager", "one Model is marked by mark_eager", "Called is named in eager_ops"):
        assert any(note.startswith(name) for note in notes)


def test_another_thread_is_not_watched(marked: Mark, device: torch.device) -> None:
    """While one thread learns or captures, calls of a marked layer in another thread are plain."""
    marked(Route)
    route, x, graph = Route().to(device), vectors(device, 1)[0], BreakableCUDAGraph(driver="tape")
    with torch.no_grad(), capture(graph):
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(route(x)))
        thread.start()
        thread.join()
        y = x + 1
    assert len(results) == 1
    assert [step.kind for step in explain(graph).programs[0].steps] == ["captured"]
    assert y.shape == x.shape
    assert "__call__" not in vars(Route)


# --- the second door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["class", "instance"])
def test_under_capture(marked: Mark, device: torch.device, options: dict[str, Any], by: str) -> None:
    """Under ``capture`` a marked layer is an eager step, which each replay calls once."""
    model = Model(Traced, Called).to(device)
    other = copy.deepcopy(model)
    marked(Called if by == "class" else model.blocks[1].route)
    graph, (x, *others) = BreakableCUDAGraph(driver=options["driver"]), vectors(device)
    with torch.no_grad():
        copy.deepcopy(model)(x)
        with capture(graph):
            y = model(x)
        assert_same(y, other(x))
        for values in others:
            x.copy_(values)
            graph.replay()
            assert_same(y, other(x))
    assert model.blocks[1].route.calls == other.blocks[1].route.calls
    reasons = [(reason.op, reason.text) for reason in explain(graph).programs[0].reasons]
    assert reasons == [("Called", "marked by mark_eager")]
