"""Marks without ``fake=``: the first call runs as Python, and what it returned is what compiled code expects from then on."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from breakable_backend import EagerOutputError, PartitionError, Report, eager_on_graph, explain
from breakable_backend.calling.registry import executors_of
from breakable_backend.marks import functions
from checks import assert_same

pytestmark = pytest.mark.usefixtures("no_grad")

Compile = Callable[..., Any]


@pytest.fixture
def compile_ours(options: dict[str, Any]) -> Compile:
    return lambda function, **kwargs: torch.compile(
        function, backend="breakable_cg", options={"min_kernels": 1, **options}, **kwargs
    )


@eager_on_graph
def clip(x: Tensor) -> Tensor:
    return x / x.norm() if float(x.norm()) > 1 else x + 0


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return clip(x.sin() * 3).cos()


class Stack(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def shape(compiled: Any) -> list[tuple[int, int, int]]:
    """Captured segments, eager ones and replays, program by program."""
    return [(p.num_graph_segments, p.num_eager_segments, p.replays) for p in explain(compiled).programs]


def vectors(device: torch.device, count: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device) * number for number in range(1, count + 1)]


@pytest.mark.parametrize("called", ["otherwise", "never"])
def test_code_that_is_traced_calls_it_otherwise(compile_ours: Compile, device: torch.device, called: str) -> None:
    """A function that only traced code calls, or calls with these arguments, is a graph break in the end, with the reason."""

    @eager_on_graph
    def scaled(x: Tensor, by: Any) -> Tensor:
        return x * float(x.sum()) if by is None else x * float(by)

    def model(x: Tensor) -> Tensor:
        y = x.sin()
        if torch.compiler.is_compiling():
            y = scaled(y, None)
        else:
            y = scaled(y, float(y.sum())) if called == "otherwise" else y * float(y.sum())
        return y.cos() + 1

    compiled = compile_ours(model)
    for x in vectors(device, 9):
        assert_same(compiled(x), model(x))
    report = explain(compiled)
    assert not report.learning
    assert [program.replays > 0 for program in report.programs] == [True, True]
    otherwise = "code calls it with other arguments while it is traced"
    whys = {"otherwise": " (by is None) than as Python (by is a float), so", "never": " than as Python, so"}
    assert any(otherwise + whys[called] in why for why in report.graph_breaks)
    assert any(cure.startswith("pass the same arguments in both") for cure in report.advice.values())
    torch._dynamo.reset()
    whole = compile_ours(model, fullgraph=True)
    with pytest.raises(PartitionError, match=r"fake="):
        for x in vectors(device, 9):
            assert_same(whole(x), model(x))


@eager_on_graph
def scaled(x: Tensor) -> Tensor:
    return x * float(x.detach().norm())


class Weighted(torch.autograd.Function):
    """A backward that calls a marked function, after the frame that ran as Python has ended."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return scaled(gradient) * x


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo instantiates an autograd.Function
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
@pytest.mark.parametrize("where", ["a checkpoint", "a backward"])
def test_bodies_that_are_traced_call_it_otherwise(compile_ours: Compile, device: torch.device, where: str) -> None:
    """A function that Python calls without gradients, or in the backward only, is a graph break in the end, too."""

    def model(x: Tensor) -> Tensor:
        if where == "a backward":
            return Weighted.apply(x * 2).tanh()  # type: ignore[no-any-return,no-untyped-call]
        return checkpoint(lambda x: scaled(x * 2).tanh(), x, use_reentrant=True)

    compiled = compile_ours(model)
    with torch.enable_grad():
        for x in vectors(device, 9):
            one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            results = compiled(one), model(other)
            for result in results:
                result.sum().backward()
            assert_same([results[0].detach(), one.grad], [results[1].detach(), other.grad])
    assert not explain(compiled).learning


# --- the calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [False, True])
def test_calls_of_a_loop_over_layers(compile_ours: Compile, device: torch.device, fullgraph: bool) -> None:
    """Call 1 learns, call 2 is plain, call 3 records, call 4 replays: one program, captured around each eager step."""
    model = Stack()
    compiled = compile_ours(model, fullgraph=fullgraph)
    seen = []
    for x in vectors(device, 5):
        assert torch.equal(compiled(x), model(x))
        seen.append([(*counts, executors_of(compiled)[0].snapshot().statistics.captures) for counts in shape(compiled)])
    captured = 4 if device.type == "cuda" else 3
    assert [len(programs) for programs in seen] == [0, 1, 1, 1, 1]
    assert seen[1][0][:2] == (seen[4][0][0], 3)
    assert seen[1][0][0] >= captured - 1
    assert [programs[0][2] for programs in seen[1:]] == [0, 0, 1, 2]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_every_call_is_eagers(compile_ours: Compile, device: torch.device, fullgraph: bool) -> None:
    """The body runs once per call, on real tensors: appends, counters and values are eager's from the first call on."""

    def run(wrap: Compile) -> Any:
        kept: list[Tensor] = []
        notes: list[Any] = []

        @eager_on_graph
        def remember(x: Tensor) -> Tensor:
            kept.append(x.clone())
            notes.append((type(x), x.tolist(), float(x.cpu().numpy().sum())))
            return x + len(kept)

        function = wrap(lambda x: remember(x * 2) * 2)
        return [function(x).tolist() for x in vectors(device, 6)], [k.tolist() for k in kept], notes

    assert run(lambda function: compile_ours(function, fullgraph=fullgraph)) == run(lambda function: function)


def test_exceptions_of_a_call_that_learns(compile_ours: Compile, device: torch.device) -> None:
    """What the body raises reaches the caller as the same object, also while it learns; the next call learns."""
    error = ValueError("mine")
    errors = [error]

    @eager_on_graph
    def fails(x: Tensor) -> Tensor:
        if errors:
            raise errors.pop()
        return x * 2 if x.sum() > 0 else x

    compiled = compile_ours(lambda x: fails(x.sin()) + 1, fullgraph=True)
    x = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="mine") as caught:
        compiled(x)
    assert caught.value is error
    for _ in range(4):
        assert torch.equal(compiled(x), x.sin() * 2 + 1)
    assert shape(compiled)[0][2] == 1


def test_report_says_that_it_learns(compile_ours: Compile, device: torch.device) -> None:
    """Until compiled code is there, the report names the function that it waits for."""

    @eager_on_graph
    def routed(x: Tensor) -> Tensor:
        return x[: int(x.numel() // 2)] * float(x.max())

    compiled, other = compile_ours(lambda x: routed(x + 1) * 2), compile_ours(lambda x: x + 1)
    x = torch.ones(4, device=device)
    compiled(x)
    other(x)
    report = explain(compiled)
    assert list(report.learning) == ["test_report_says_that_it_learns.<locals>.routed"]
    assert "test_learning.py" in str(report)
    assert "learning what" in str(report)
    assert not report.skipped
    assert not explain(other).learning
    compiled(x)
    assert not explain(compiled).learning
    assert "learning what" not in str(explain(compiled))


# --- what others have stays ---------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class Marked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return clip(x * 2)


def test_models_that_share_code_keep_what_they_have(compile_ours: Compile, device: torch.device) -> None:
    """While one model learns, another one of the same classes neither recompiles nor loses its recording."""
    first = compile_ours(Plain(nn.Tanh(), nn.Tanh()))
    x = torch.ones(4, device=device)
    for _ in range(4):
        first(x)
    before = shape(first)
    second_model = Plain(nn.Tanh(), Marked())
    second = compile_ours(second_model)
    second(x)
    first(x)
    assert shape(first) == [(*before[0][:2], before[0][2] + 1)]
    for _ in range(4):
        assert torch.equal(second(x), second_model(x))
    first(x)
    report = explain(first).programs[0]
    assert (report.replays, dict(report.recorded)) == (
        before[0][2] + 2,
        {"first": 1} if "first" in report.recorded else dict(report.recorded),
    )
    assert sum(report.recorded.values()) == 1


def test_the_second_model_of_a_class(compile_ours: Compile, device: torch.device) -> None:
    """A second model of the same class, on other layouts, learns on its own; the first one replays on."""
    one, two = compile_ours(Stack()), compile_ours(Stack())
    a, b = torch.ones(4, device=device), torch.ones(2, 3, device=device)
    for _ in range(4):
        one(a)
    replays = sum(counts[2] for counts in shape(one))
    two(b)
    one(a)
    assert sum(counts[2] for counts in shape(one)) == replays + 1
    for _ in range(4):
        assert torch.equal(two(b), Stack()(b))
    one(a)
    assert sum(counts[2] for counts in shape(one)) >= replays + 2


def test_learning_in_threads(compile_ours: Compile, device: torch.device) -> None:
    """A model learns in one thread while another one of its classes is called in others."""
    base = compile_ours(Stack(2))
    x = torch.ones(4, device=device)
    for _ in range(4):
        base(x)
    wrong: list[Any] = []
    stop = threading.Event()

    def call() -> None:
        want = Stack(2)(x)
        while not stop.is_set():
            with torch.no_grad():
                try:
                    right = torch.equal(base(x), want)
                except RuntimeError as error:  # torch 2.11 takes another thread's tracing for this one's
                    right = "FX to symbolically trace" in str(error)
                if not right:
                    wrong.append("base")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            model = Plain(nn.Tanh(), Marked(), Layer())
            y = torch.ones(number + 2, device=device)
            compiled = compile_ours(model)
            for _ in range(4):
                if not torch.equal(compiled(y), model(y)):
                    wrong.append(number)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert sum(sum(p.recorded.values()) for p in explain(base).programs if p.num_graph_segments) >= 1


# --- results that vary --------------------------------------------------------------------------------------------------------


def test_varying_layouts_are_a_break(compile_ours: Compile, device: torch.device) -> None:
    """A result whose layout varies costs one error at most, and is a break from then on, with that as the reason."""

    @eager_on_graph
    def positive(x: Tensor) -> Tensor:
        return x[x > 0]

    def model(x: Tensor) -> Tensor:
        return positive(x.sin()).cos() * 2

    compiled = compile_ours(model)
    errors = []
    for number in range(8):
        x = torch.arange(8.0, device=device) - number
        try:
            assert torch.equal(compiled(x), model(x))
        except EagerOutputError as error:
            errors.append(str(error))
    assert all("positive returned" in error for error in errors)
    assert len(errors) <= 1
    assert any("differs from call to call" in why for why in explain(compiled).graph_breaks)


def test_varying_layouts_in_one_call(compile_ours: Compile, device: torch.device) -> None:
    """Two calls in the frame that learns, with results of other layouts: a break at once, and an error under fullgraph."""

    @eager_on_graph
    def positive(x: Tensor) -> Tensor:
        return x[x > 0]

    def model(x: Tensor) -> Tensor:
        return positive(x.sin()).sum() + positive(x.cos()).sum()

    x = torch.arange(8.0, device=device)
    compiled = compile_ours(model)
    for _ in range(4):
        assert torch.equal(compiled(x), model(x))
    strict = compile_ours(lambda x: model(x) + 1, fullgraph=True)
    with pytest.raises(PartitionError, match="differs from call to call"):
        strict(x)


@pytest.mark.parametrize("kind", ["float", "bool", "in a tuple"])
def test_varying_values(compile_ours: Compile, device: torch.device, kind: str) -> None:
    """A float or bool in the result that depends on values is right in every call."""

    @eager_on_graph
    def measured(x: Tensor) -> Any:
        if kind == "in a tuple":
            return x * 2, {"norm": float(x.norm())}
        return float(x.norm()) if kind == "float" else bool(x.sum() > 0)

    def model(x: Tensor) -> Tensor:
        found = measured(x.sin())
        return found[0] * found[1]["norm"] if kind == "in a tuple" else x.cos() * found

    compiled = compile_ours(model)
    for number, x in enumerate(vectors(device, 6)):
        x = x * (-1) ** number
        assert torch.equal(compiled(x), model(x))
    assert any("differs from call to call" in why for why in explain(compiled).graph_breaks)


@pytest.mark.parametrize("what", [0.5, True, "name", None])
def test_values_that_stay(compile_ours: Compile, device: torch.device, what: Any) -> None:
    """A plain value that is the same in each call is a constant, and no break."""
    marked = eager_on_graph(lambda x: (x * 2 if float(x.sum()) > 0 else x * 1, what))

    def model(x: Tensor) -> Tensor:
        y, value = marked(x.sin())
        return y.cos() * (2 if value else 3)

    compiled = compile_ours(model, fullgraph=True)
    for x in vectors(device, 6):
        assert torch.equal(compiled(x), model(x))
    assert shape(compiled)[0][2] >= 2


# --- sizes that change ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_sizes(compile_ours: Compile, device: torch.device, dynamic: bool | None) -> None:
    """Shapes of results follow those of the arguments, also where Dynamo leaves sizes open."""

    @eager_on_graph
    def halves(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        low = float(x.min())
        return x.reshape(-1)[: n * 2].reshape(n, 2) + low, x.t().contiguous().t() * scale

    def model(x: Tensor) -> Tensor:
        a, b = halves(x.sin(), 0.5)
        return (a.sum(1, keepdim=True) + b).cos()

    compiled = compile_ours(model, dynamic=dynamic, fullgraph=True)
    for n in (3, 3, 4, 4, 5, 5, 6, 6, 3, 4, 5, 6):
        x = torch.randn(n, 4, device=device)
        assert torch.equal(compiled(x), model(x))
    if dynamic is not False:
        assert len(explain(compiled).programs) <= 3


def test_an_int_that_counts_up(compile_ours: Compile, device: torch.device) -> None:
    """A position that is another one in each call is learned from two calls, and not in each."""
    seen = []

    @eager_on_graph
    def shifted(x: Tensor, position: int) -> Tensor:
        seen.append(position)
        return x + position * float(x.sum() > 0)

    compiled = compile_ours(lambda x, position: shifted(x.sin(), position).cos(), fullgraph=True)
    x = torch.ones(3, device=device)
    for position in range(2, 10):
        compiled(x, position)
    assert seen == list(range(2, 10))
    report = explain(compiled)
    assert not report.learning
    assert sum(sum(p.plain_calls.values()) + p.replays + p.captures for p in report.programs) >= 5


@pytest.mark.parametrize("fake", [None, lambda y: torch.empty_like(y)], ids=["learned", "fake"])
@pytest.mark.parametrize("backend", ["breakable_cg", "eager", "aot_eager"])
def test_constant_tensors(
    backend: str, fake: Callable[..., Any] | None, device: torch.device, options: dict[str, Any]
) -> None:
    """A function whose arguments are constants runs once per call: no compiler runs it while it traces."""
    seen: list[type] = []

    def host(y: Tensor) -> Tensor:
        seen.append(type(y))
        return y * 2

    marked = eager_on_graph(fake=fake)(host)

    def model(x: Tensor) -> Tensor:
        return (x.sin() + marked(torch.tensor(2.0))).cos()

    ours = {"options": options} if backend == "breakable_cg" else {}
    compiled, x = torch.compile(model, backend=backend, fullgraph=True, **ours), torch.ones(3, device=device)
    for number in range(5):
        assert torch.equal(compiled(x), (x.sin() + 4).cos())
        assert seen == [Tensor] * (number + 1)


# --- the rest of a mark -----------------------------------------------------------------------------------------------------------


def test_written_arguments(compile_ours: Compile, device: torch.device) -> None:
    """A function that writes an argument is learned like another one, and writes once in each call."""

    @eager_on_graph(mutates_args=("cache",))
    def append(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x if float(x.sum()) > 0 else -x)
        return cache * 2

    def model(cache: Tensor, x: Tensor) -> Tensor:
        return append(cache, x.sin()).cos() + cache

    compiled = compile_ours(model, fullgraph=True)
    mine, theirs = torch.zeros(4, device=device), torch.zeros(4, device=device)
    for x in vectors(device, 6):
        assert torch.equal(compiled(mine, x), model(theirs, x))
        assert torch.equal(mine, theirs)
    assert shape(compiled)[0][2] >= 2


@pytest.mark.parametrize("backend", ["breakable_cg", "eager", "aot_eager"])
def test_gradients(backend: str, device: torch.device, options: dict[str, Any]) -> None:
    """Gradients are eager's in the call that learns, and in those after it."""
    more = {"options": options} if backend == "breakable_cg" else {}

    @eager_on_graph
    def gated(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w if float(x.detach().sum()) > 0 else x - w.sum()
        return y, x[:1]

    def model(x: Tensor, w: Tensor) -> Tensor:
        a, b = gated(x.sin(), w)
        return a.cos().sum() + (b * 2).sum()

    compiled = torch.compile(model, backend=backend, fullgraph=True, **more)
    with torch.enable_grad():
        for number in range(4):
            x = (torch.randn(3, 3, device=device) + number - 1).requires_grad_()
            w = torch.randn(3, 3, device=device, requires_grad=True)
            got, want = torch.autograd.grad(compiled(x, w), (x, w)), torch.autograd.grad(model(x, w), (x, w))
            assert all(torch.allclose(g, t) for g, t in zip(got, want, strict=True)), number


def test_behind_a_graph_break(compile_ours: Compile, device: torch.device) -> None:
    """What goes on behind a graph break learns too; what is before it is compiled at once."""

    def model(x: Tensor) -> Tensor:
        y = x.sin() * 2
        torch._dynamo.graph_break()
        return clip(y + 1).cos()

    compiled = compile_ours(model)
    for x in vectors(device, 6):
        assert torch.equal(compiled(x), model(x))
    assert len(explain(compiled).programs) == 2


@torch._dynamo.disable(recursive=False)
def outside(x: Tensor) -> Tensor:
    return inside(x) + 1


def inside(x: Tensor) -> Tensor:
    return x * 2


def test_dynamo_sees_who_called(compile_ours: Compile, device: torch.device) -> None:
    """What only the called frames of are compiled stays uncompiled: Dynamo finds the frame that says so on the stack."""
    compiled = compile_ours(lambda x: outside(x.sin()).cos())
    for x in vectors(device, 4):
        assert torch.equal(compiled(x), (x.sin() * 2 + 1).cos())
    text = "".join(program.text for program in explain(compiled).programs)
    assert "mul" in text
    assert "add" not in text


def test_marks_before_dynamo_is_imported(tmp_path: Path) -> None:
    """A function that is marked before anybody imports Dynamo learns as others do."""
    code = """
import sys
from breakable_backend import eager_on_graph
import torch
log = []
@eager_on_graph
def host(x):
    log.append(type(x))
    return x * x.max().item()
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(lambda x: host(x + 1) * 2, backend="eager", fullgraph=True)
for _ in range(3):
    compiled(torch.ones(2))
assert log == [torch.Tensor] * 3, log
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


def test_an_export_needs_fake(device: torch.device) -> None:
    """An export runs nothing for real, so it is told what to write."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return clip(x.sin() * 2)

    with pytest.raises(Exception, match="its result is not known before its first call"):
        torch.export.export(Module(), (torch.ones(3, device=device),), strict=True)


def test_objects_are_a_break(compile_ours: Compile, device: torch.device) -> None:
    """A result that no graph can hold is a break, and an error under fullgraph once it is known."""

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    boxed = eager_on_graph(lambda x: Box(x * 2))

    def model(x: Tensor) -> Tensor:
        return boxed(x.sin()).tensor.cos()

    compiled, strict = compile_ours(model), compile_ours(lambda x: model(x) + 1, fullgraph=True)
    x = torch.ones(3, device=device)
    for _ in range(4):
        assert torch.equal(compiled(x), model(x))
    with pytest.raises(PartitionError, match="Box"):
        strict(x)


def test_arguments_that_nobody_can_describe(compile_ours: Compile, device: torch.device) -> None:
    """A sparse argument has no strides: the call that would learn is right all the same, and so are those after it."""
    total = eager_on_graph(lambda x: x.to_dense() * 2)
    compiled = compile_ours(lambda x, y: total(x) + y.sin())
    x, y = torch.eye(3, device=device).to_sparse(), torch.ones(3, device=device)
    for _ in range(4):
        assert torch.equal(compiled(x, y), torch.eye(3, device=device) * 2 + y.sin())


def test_measuring_with_arguments(device: torch.device, compile_ours: Compile) -> None:
    """What was not called yet is called until it replays, and measured then."""
    report = explain(compile_ours(Stack()), torch.ones(4, device=device), measure=True)
    assert report.programs[0].recordings[0].measured is not None


def test_explaining_with_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """A function that is explained with arguments is called until it is compiled."""
    report = explain(Stack(), torch.ones(4, device=device), options=options)
    assert len(report.programs) == 1
    assert not report.learning


runs: list[int] = []


@torch.library.custom_op("learning::twice", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def twice(x: Tensor) -> Tensor:
    runs.append(1)
    return x * 2


twice.register_fake(lambda x: torch.empty_like(x))


def test_marked_ops_on_constant_tensors(compile_ours: Compile, device: torch.device) -> None:
    """A marked op whose argument is a constant runs once per call; in call 1 as often as Dynamo itself has it."""

    def count(compiled: Compile) -> list[int]:
        counts = []
        for _ in range(4):
            runs.clear()
            compiled(torch.ones(3, device=device))
            counts.append(len(runs))
        return counts

    def model(x: Tensor) -> Tensor:
        return (x.sin() + twice(torch.tensor(2.0, device=device))).cos()

    dynamos = count(torch.compile(model, backend="eager"))
    torch.compiler.reset()
    assert count(compile_ours(model)) == [dynamos[0], 1, 1, 1]


@pytest.mark.parametrize("value", [np.float64(1.5), 2**63, -(2**63) - 1], ids=["numpy", "large", "small"])
def test_numbers_that_no_graph_can_hold(compile_ours: Compile, device: torch.device, value: Any) -> None:
    """A number of a class of its own, or one of more than 64 bits, is a break, and reaches the caller as it is."""

    @eager_on_graph
    def with_number(x: Tensor) -> tuple[Tensor, Any]:
        return x * 2, value

    compiled = compile_ours(lambda x: with_number(x.sin()))
    for x in vectors(device, 5):
        made, number = compiled(x)
        assert torch.equal(made, x.sin() * 2)
        assert (type(number), number) == (type(value), value)


def test_containers_that_a_call_changes(compile_ours: Compile, device: torch.device) -> None:
    """A function that puts something into a list that it is given is a break: its caller has it there, in each call."""

    @eager_on_graph
    def keep(x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(x.clone())
        return x * len(kept)

    def model(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        kept = [x]
        return keep(x * 2, kept) + 1, kept

    compiled = compile_ours(model)
    for x in vectors(device, 5):
        (made, kept), (wanted, other) = compiled(x), model(x)
        assert torch.equal(made, wanted)
        assert [one.tolist() for one in kept] == [one.tolist() for one in other]


CHANGES: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "a list": lambda kept, named: kept.append(kept[0]),
    "an item": lambda kept, named: kept.__setitem__(0, kept[0].clone()),
    "a list in a dict": lambda kept, named: named["in"].pop(),
    "a dict": lambda kept, named: named.update(more=1),
    "a value": lambda kept, named: named.update(by=3),
    "the order": lambda kept, named: named.update(by=named.pop("by"), other=named.pop("other")),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("first", [1, 5])
def test_containers_that_a_later_call_changes(
    name: str, first: int, compile_ours: Compile, device: torch.device
) -> None:
    """A function that changes a container for the first time in any call is told in that call, and a break from then on."""
    calls = []

    @eager_on_graph
    def change(kept: list[Tensor], named: dict[str, Any]) -> Tensor:
        calls.append(1)
        if len(calls) > first:
            CHANGES[name](kept, named)
        return kept[0] * named["by"]

    def model(x: Tensor) -> tuple[Any, ...]:
        kept, named = [x.sin() + 1, x], {"other": "text", "by": 2, "in": [x], "pair": (x, [x], (2, None))}
        made = change(kept, named)
        return made.cos(), kept, named["by"], list(named), len(named["in"])

    compiled = compile_ours(model)
    told: list[str] = []
    for x in vectors(device, 8):
        at = len(calls)
        try:
            got = compiled(x)
        except EagerOutputError as error:
            told.append(str(error))
            continue
        calls[:] = calls[:at]
        assert_same(got, model(x))
    assert len(told) == 1 and "changed a list or dict among its arguments" in told[0]


def test_arguments_that_are_written_unsaid(compile_ours: Compile, device: torch.device) -> None:
    """A function that writes an argument, and does not say so, is a break with that reason; what it says is none."""

    @eager_on_graph
    def double(x: Tensor) -> Tensor:
        return x.mul_(2).sum()

    @eager_on_graph(mutates_args=("x",))
    def triple(x: Tensor, part: Tensor) -> Tensor:
        return x.mul_(3).sum() + part[0]

    def model(x: Tensor) -> Tensor:
        y = x.sin()
        return double(x) + triple(y, y[1:]) + x.cos() + y

    compiled = compile_ours(model)
    for x in vectors(device, 6):
        other = x.clone()
        assert_same((compiled(x), x), (model(other), other))
    (why,) = explain(compiled).graph_breaks
    assert "double" in why and "it wrote a tensor that it was given" in why
    torch._dynamo.reset()
    whole = compile_ours(model, fullgraph=True)
    whole(vectors(device, 1)[0])
    with pytest.raises(PartitionError, match="mutates_args"):
        whole(vectors(device, 1)[0])


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_function_that_always_raises(compile_ours: Compile, device: torch.device, fullgraph: bool) -> None:
    """What it raises reaches the caller in each call, and is caught where eager catches it; a break has that reason."""
    calls = []

    @eager_on_graph
    def fail(x: Tensor) -> Tensor:
        calls.append(1)
        raise KeyError(len(calls))

    def model(x: Tensor) -> Tensor:
        y = x.sin()
        try:
            return fail(y)
        except KeyError as error:
            return y.cos() * error.args[0]

    compiled = compile_ours(model, fullgraph=fullgraph)
    for number, x in enumerate(vectors(device, 7), start=1):
        assert_same(compiled(x), x.sin().cos() * number)
    assert len(calls) == 7
    told = [why for why in explain(compiled).graph_breaks if "each call so far raised, the last one KeyError" in why]
    assert bool(told) is not fullgraph


@eager_on_graph(fake=torch.empty_like)
def told(x: Tensor) -> Tensor:
    return x * 2 + 1


@eager_on_graph
def seen(x: Tensor) -> Tensor:
    return x * 2 + 1


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "vmap": lambda f, x: torch.vmap(f)(x.sin()).cos(),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y.sin()).sum())(x).cos(),
    "jvp": lambda f, x: torch.func.jvp(lambda y: f(y.sin()), (x,), (x,))[1].cos(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which jvp calls on torch 2.15
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("function", [told, seen], ids=["told", "seen"])
def test_under_a_transform(
    compile_ours: Compile, device: torch.device, function: Callable[[Tensor], Tensor], name: str
) -> None:
    """Under a transform of torch.func a marked function is a graph break with that reason, and eager's; else an error."""
    model = lambda x: TRANSFORMS[name](function, x)  # noqa: E731
    compiled = compile_ours(model)
    for x in vectors(device, 5):
        assert_same(compiled(x), model(x))
    assert any(
        "is no node: it was called under a transform of torch.func" in why for why in explain(compiled).graph_breaks
    )
    torch._dynamo.reset()
    with pytest.raises(PartitionError, match="under a transform"):
        compile_ours(model, fullgraph=True)(vectors(device, 1)[0])


def test_a_break_says_what_is_no_node(compile_ours: Compile, device: torch.device) -> None:
    """Each break at a marked function has its own reason in the report, which names the argument, and its own advice."""

    @eager_on_graph
    def scaled(x: Tensor, by: Any) -> Tensor:
        return x * 2

    class Request:
        pass

    request = Request()
    for model in (lambda x: scaled(x.sin(), b"1").cos(), lambda x: scaled(x.sin(), by=[{"a": request}]).cos()):
        compiled = compile_ours(model)
        compiled(vectors(device, 1)[0])
    name = "test_a_break_says_what_is_no_node.<locals>.scaled, marked by eager_on_graph, is no node"
    report = explain(compiled)
    of_type = f"{name}: argument by is, or holds, an object of type"
    told = [f"{of_type} {kind}, at {__file__}:" for kind in ("bytes", "Request")]
    assert [why.startswith(begin) for why, begin in zip(report.graph_breaks, told, strict=True)] == [True, True]
    assert "in the place of torch.compiler.disable" not in str(report)
    assert str(report).count("to keep one program: pass tensors, modules and plain values") == 2


@pytest.mark.parametrize(
    ("body", "cure"),
    [
        (lambda x: x.add_(1), "name them: @eager_on_graph(mutates_args=...)"),
        (lambda x: x.cpu().numpy(), "return tensors and plain values, in lists, tuples, dicts, named tuples"),
        (
            lambda x: float(x.sum()),
            "return the same structure, layout and plain values wherever the arguments are laid out alike; a number that varies",
        ),
    ],
    ids=["writes", "numpy", "float"],
)
def test_a_break_says_what_to_do(
    body: Callable[[Tensor], Any], cure: str, compile_ours: Compile, device: torch.device
) -> None:
    """What a call has shown against one node has its cure in the report, which is that of the error."""
    marked = eager_on_graph(body)
    compiled = compile_ours(lambda x: (marked(x.sin()), x.cos() * 2))
    for x in vectors(device, 5):
        compiled(x)
    report = explain(compiled)
    assert f"\n  to keep one program: {cure}" in str(report)
    assert "fullgraph" not in str(report)
    assert str(Report.from_json(report.to_json())) == str(report)


def test_a_function_that_such_a_break_leaves_uncompiled(compile_ours: Compile, device: torch.device) -> None:
    """Where Dynamo gives up the whole function at a break, the report has the mark's reason, and blames nothing else."""

    @eager_on_graph
    def scaled(x: Tensor, by: Any) -> Tensor:
        return x * 2

    def model(x: Tensor) -> Tensor:
        for _ in range(2):
            x = scaled(x.sin(), b"1")
        return x.cos()

    compiled = compile_ours(model)
    compiled(vectors(device, 1)[0])
    report = explain(compiled)
    (why,) = report.skipped.values()
    assert why.endswith(
        "scaled, marked by eager_on_graph, is no node: argument by is, or holds, an object of type bytes; graph break in loop"
    )
    assert "torch.compiler.disable" not in str(report)
    assert "functions.py" not in str(report)


def marks_in_its_body(x: Tensor) -> Tensor:
    @eager_on_graph
    def clip(t: Tensor) -> Tensor:
        return t * float(t.abs().max())

    return clip(x.sin() * 2).cos() + 1


def marks_with_options(x: Tensor) -> Tensor:
    clip = eager_on_graph(fake=torch.empty_like)(lambda t: t * float(t.abs().max()))
    result: Tensor = clip(x.sin() * 2).cos() + 1
    return result


@pytest.mark.parametrize("model", [marks_in_its_body, marks_with_options])
def test_a_mark_inside_of_compiled_code(
    model: Any, compile_ours: Compile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decorator in code that is compiled marks another function at each call: one warning and the report say so."""
    monkeypatch.setattr(functions, "_marked_anew", weakref.WeakSet())
    compiled = compile_ours(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = [(compiled(x), model(x)) for x in vectors(device, 3)]
    assert all(torch.equal(result, expected) for result, expected in results)
    (warning,) = warned
    assert warning.filename == __file__
    assert f"{model.__name__}.<locals>." in str(warning.message)
    assert "is marked inside of a compiled function" in str(warning.message)
    assert "use the decorator where it runs once" in str(warning.message)
    lines = str(explain(compiled)).splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("Dynamo broke the graph"))
    assert "eager_on_graph marks a new function at each call of the code around it, at test_learning.py:" in lines[at]
    assert "to keep one program: use the decorator where it runs once, at the top of a module" in lines[at + 1]


def test_a_handler_inside_of_a_marked_function(compile_ours: Compile, device: torch.device) -> None:
    """What a step raises leaves compiled code, past handlers of traced code; a marked function has its own handlers."""
    calls: list[int] = []
    raised = ValueError("no such page")

    def fail(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) % 5 == 0:
            raise raised
        return x * 2

    def attempt(x: Tensor) -> Tensor:
        try:
            return fail(x)
        except ValueError:
            return x + 1

    marked, failing = eager_on_graph(attempt), eager_on_graph(fail)
    compiled = compile_ours(lambda x: marked(x.sin()).cos())
    for number, x in enumerate(vectors(device, 8), start=1):
        y = x.sin()
        assert_same(compiled(x), (y + 1 if number == 5 else y * 2).cos())
    calls.clear()

    def around(x: Tensor) -> Tensor:
        try:
            y = failing(x.sin())
        except ValueError:
            y = x.sin() + 1
        return y.cos()

    compiled = compile_ours(around)
    for number, x in enumerate(vectors(device, 8), start=1):
        if number == 5:
            with pytest.raises(ValueError, match="no such page") as caught:
                compiled(x)
            assert caught.value is raised
        else:
            assert_same(compiled(x), (x.sin() * 2).cos())


def test_in_a_branch_that_comes_late(compile_ours: Compile, device: torch.device) -> None:
    """In a branch of ``torch.cond`` that is not taken in the first calls a function is learned when it is taken."""

    @eager_on_graph
    def clipped(x: Tensor) -> Tensor:
        return x / x.norm() if float(x.norm()) > 1 else x + 0

    def model(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: clipped(x).sin(), lambda x: x.cos(), (x * 2,)).cos()

    compiled = compile_ours(model)
    for number in range(1, 12):
        x = torch.full((4,), 1.0 if number > 6 else -1.0, device=device) * number
        want = (clipped(x * 2).sin() if number > 6 else (x * 2).cos()).cos()
        assert_same(compiled(x), want, f"call {number}")
    (program,) = explain(compiled).programs
    assert program.replays > 0
    (reason,) = (reason for reason in program.reasons if reason.op == "cond")
    assert "calls" in reason.text and "clipped, which is marked by eager_on_graph" in reason.text
