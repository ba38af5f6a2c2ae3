"""Reports, resets and exports reach every graph that came of calling a compiled function, however it was compiled."""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import breakable_backend
from breakable_backend import explain, export, reset
from breakable_backend.calling.registry import executors_of

Function = Callable[..., Any]
Build = Callable[..., Any]


def broken(x: Tensor) -> Tensor:
    """Two graphs, with a break between them."""
    y = x.sin() + 1
    torch._dynamo.graph_break()
    return y.cos() * 2


def smooth(x: Tensor) -> Tensor:
    return (x.sin() + 1).cos()


class Calls(nn.Module):
    """Calls ``layer``, whatever that is."""

    def __init__(self, layer: Any = broken) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Smooth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return smooth(x)

    def other(self, x: Tensor) -> Tensor:
        return x.cos() * 3


class Breaks(nn.Module):
    """Calls its layer between two graphs of its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin() * 2
        torch._dynamo.graph_break()
        x = self.layer(x)
        torch._dynamo.graph_break()
        return x.cos() * 2


def doubled(function: Function) -> Function:
    """A decorator that names what it wraps."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args) * 2

    return wrapper


def hidden(function: Function) -> Function:
    """A decorator that does not."""

    def wrapper(*args: Any) -> Any:
        return function(*args) * 2

    return wrapper


class Decorated(nn.Module):
    @hidden
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return smooth(x)


class Callable_:
    """An object that can be called, and is no module."""

    def __call__(self, x: Tensor) -> Tensor:
        return broken(x)

    def method(self, x: Tensor) -> Tensor:
        return smooth(x)


class Slotted:
    """An object that nobody can refer to weakly."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        return broken(x)

    def method(self, x: Tensor) -> Tensor:
        return smooth(x)


def plus(y: int, x: Tensor) -> Tensor:
    return x.sin() * 2 + y


def in_place(build: Build, module: nn.Module) -> nn.Module:
    """``module.compile()``, with the options of ``build``."""
    module.compile(backend="breakable_cg", options=build.keywords["options"])  # type: ignore[attr-defined]
    return module


def forward_replaced(build: Build) -> nn.Module:
    module = Smooth()
    module.forward = build(module.forward)  # type: ignore[method-assign]
    return module


def forward_marked(build: Build) -> nn.Module:
    class Marked(nn.Module):
        @build
        def forward(self, x: Tensor) -> Tensor:
            return smooth(x)

    return Marked()


def several(build: Build) -> nn.Module:
    module = Calls(lambda x: module.functions["b"](module.functions["a"](x)))
    module.functions = {"a": build(lambda x: x.sin() * 2), "b": build(lambda x: x.cos() * 2)}  # type: ignore[assignment]
    return module


def traced(build: Build) -> Any:
    return build(torch.fx.symbolic_trace(Smooth()))


def exported(build: Build) -> Any:
    return build(torch.export.export(Smooth(), (torch.ones(3),)).module())


WAYS: dict[str, tuple[Callable[[Build], Any], int]] = {
    "function": (lambda build: build(smooth), 1),
    "function with a break": (lambda build: build(broken), 2),
    "lambda around a module": (lambda build: build(functools.partial(lambda m, x: m(x), Calls())), 2),
    "module that calls a function with a break": (lambda build: build(Calls()), 2),
    "child with a break": (lambda build: build(Calls(Calls(Calls()))), 2),
    "compiled child of a compiled module": (lambda build: build(Calls(build(Smooth()))), 1),
    "compiled child between two breaks": (lambda build: build(Breaks(build(Smooth()))), 3),
    "child compiled in place between two breaks": (lambda build: build(Breaks(in_place(build, Smooth()))), 3),
    "compiled function between two breaks": (lambda build: build(Breaks(build(smooth))), 3),
    "compiled child of a plain module": (lambda build: Calls(build(Smooth())), 1),
    "child of a plain module, compiled in place": (lambda build: Calls(in_place(build, Smooth())), 1),
    "compiled functions in a dict of a plain module": (several, 2),
    "plain wrapper of a compiled module": (lambda build: Calls(Calls(build(Calls()))), 2),
    "in place": (lambda build: in_place(build, Calls()), 2),
    "module.__call__": (lambda build: build(Calls().__call__), 2),
    "module.forward": (lambda build: build(Smooth().forward), 1),
    "forward replaced by its compiled self": (forward_replaced, 1),
    "forward marked by torch.compile": (forward_marked, 1),
    "other method": (lambda build: build(Smooth().other), 1),
    "decorated forward": (lambda build: build(Decorated()), 1),
    "partial": (lambda build: build(functools.partial(plus, 3)), 1),
    "partial of a compiled function": (lambda build: functools.partial(build(plus), 3), 1),
    "callable object": (lambda build: build(Callable_()), 2),
    "method of an object": (lambda build: build(Callable_().method), 1),
    "callable object with slots": (lambda build: build(Slotted()), 2),
    "method of an object with slots": (lambda build: build(Slotted().method), 1),
    "module of torch": (lambda build: build(nn.Linear(3, 3)), 1),
    "modules of torch": (lambda build: build(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), 1),
    "traced by fx": (traced, 1),
    "exported": (exported, 1),
}


@pytest.fixture
def build(options: dict[str, Any]) -> Build:
    return functools.partial(torch.compile, backend="breakable_cg", options={**options, "min_kernels": 1})


def used(function: Function, device: torch.device, calls: int = 4) -> Function:
    """``function``, called without gradients."""
    if isinstance(function, nn.Module):
        function.to(device)
    with torch.no_grad():
        for _ in range(calls):
            function(torch.rand(3, device=device))
    return function


@pytest.mark.parametrize("way", WAYS)
def test_reached(way: str, build: Build, device: torch.device, tmp_path: Path) -> None:
    """The report has each graph, the export its files, and after a reset nothing of it is live."""
    gc.collect()  # what other tests compiled
    bystander = used(build(lambda x: x.exp() * 3), device)
    before = len(explain().programs)
    make, graphs = WAYS[way]
    function = used(make(build), device)
    programs = explain(function).programs
    assert len(programs) == graphs, [program.text for program in programs]
    assert all(program.replays >= 1 for program in programs)
    assert len(explain().programs) == before + graphs  # and no more than that was compiled
    export(function, tmp_path / "files")
    assert len(list((tmp_path / "files").glob("*program.py"))) == graphs
    reset(function)
    assert [len(program.recordings) for program in explain(function).programs] == [0] * graphs
    assert [program.replays for program in explain(bystander).programs] == [2]
    assert sum(len(program.recordings) for program in explain().programs) == 1


def test_two_wrappers_of_one_module(build: Build, device: torch.device) -> None:
    """A module that is compiled twice has its graphs once, behind both; so has a module of torch, which Dynamo wraps."""
    for module in (Calls(), nn.Linear(3, 3)):
        first = used(build(module), device)
        second = used(build(module), device)
        assert executors_of(first)
        assert executors_of(first) == executors_of(second)


def test_modules_of_torch_are_told_apart(build: Build, device: torch.device) -> None:
    """Dynamo compiles torch's own modules through one function that it wraps around all of them."""
    modules = [used(build(module), device) for module in (nn.Linear(3, 3), nn.Tanhshrink(), nn.LayerNorm(3))]
    found = [executors_of(module) for module in modules]
    assert [len(executors) for executors in found] == [1, 1, 1]
    assert len({executor for executors in found for executor in executors}) == 3


def test_a_callee_that_another_function_has_called_first(build: Build, device: torch.device) -> None:
    """Graphs of a global function belong to each compiled function that names it, whoever called it first."""
    first = used(build(lambda x: broken(x) + 1), device)
    second = used(build(lambda x: broken(x) + 2), device)
    shared = set(executors_of(first)) & set(executors_of(second))
    assert len(shared) == 2, (explain(first), explain(second))


def test_instances_that_share_their_code(build: Build, device: torch.device) -> None:
    """Layers that were compiled one by one share a graph, which the report of each shows, and that of the model once."""
    model = nn.Sequential(*(in_place(build, Calls(nn.Linear(3, 3))) for _ in range(3)))
    used(model, device, 5)
    (program,) = explain(model).programs
    assert [explain(layer).programs[0].name for layer in model] == [program.name] * 3
    assert program.replays == 9


def test_copies_of_a_compiled_module(build: Build, device: torch.device) -> None:
    """A deep copy, and a pickled one, is compiled for itself: right, reported on, and freed by itself."""
    original = used(build(Calls(nn.Linear(3, 3))), device)
    twins = [copy.deepcopy(original)]
    file = io.BytesIO()
    pickle.dump(original._orig_mod, file)
    file.seek(0)
    twins.append(build(pickle.load(file)))
    x = torch.rand(3, device=device)
    for twin in twins:
        with torch.no_grad():
            twin.layer.weight.mul_(2)
        used(twin, device)
        with torch.no_grad():
            torch.testing.assert_close(twin(x), twin._orig_mod(x), rtol=0, atol=0)
        assert explain(twin).programs[0].replays >= 2
    reset(twins[0])
    with torch.no_grad():
        torch.testing.assert_close(original(x), original._orig_mod(x), rtol=0, atol=0)


class Broken(nn.Module):
    """A layer with a break, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return broken(x * self.weight)


def test_a_callee_of_two_models(build: Build, device: torch.device) -> None:
    """Models share the graphs of a layer's class; each report has them, though Dynamo compiled them for one of the two."""
    first = used(build(Calls(Broken())), device)
    second = used(build(Breaks(Broken())), device)
    shared = set(executors_of(first)) & set(executors_of(second))
    assert len(shared) == len(executors_of(first)) == 3
    assert len(executors_of(second)) == 5


def test_a_callee_behind_an_object(build: Build, device: torch.device) -> None:
    """So they do where only a call can tell what the function calls: with weights of its own it has a first call of its own."""

    def through(holder: SimpleNamespace) -> Function:
        holder.layer.to(device)

        def call(x: Tensor) -> Tensor:
            return holder.layer(x)

        return call

    functions = [used(build(through(SimpleNamespace(layer=Broken()))), device) for _ in range(2)]
    first, second = map(executors_of, functions)
    assert len(first) == 3
    assert first[0] in second


def test_nothing_is_left_after_dynamo_was_reset(build: Build, device: torch.device) -> None:
    """``torch._dynamo.reset()`` drops all graphs; the next call compiles anew, and the report has those alone."""
    function = used(build(Calls()), device)
    torch._dynamo.reset()
    assert explain(function).programs == explain().programs == ()
    assert "at the first call" in str(explain(function))
    used(function, device)
    assert len(explain(function).programs) == len(explain().programs) == 2


def test_a_dead_wrapper_keeps_nothing(build: Build, device: torch.device) -> None:
    """A graph does not keep alive what it was compiled for."""
    module = Calls(nn.Linear(3, 3))
    alive = [weakref.ref(module), weakref.ref(module.layer.weight)]
    compiled = used(build(module), device)
    explain(compiled)
    del module, compiled
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.filterwarnings("ignore")
def test_graphs_that_run_eagerly_are_reached(build: Build, device: torch.device) -> None:
    """So do graphs of callees that run as Dynamo traced them, of which a report has a line."""
    compiled = build(Calls())
    x = torch.rand(3, device=device, requires_grad=True)
    compiled(x)
    report = explain(compiled)
    assert len(report.eager_graphs) == 2
    assert str(report).count("eager, because") == 2
    breakable_backend.reset()
    assert len(explain(compiled).eager_graphs) == 2  # they run so still


# --- what Dynamo did not compile ------------------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """A dispatch mode, under which Dynamo compiles nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def looping(x: Tensor) -> Tensor:
    """Dynamo gives up a frame with a break in a loop."""
    for _ in range(3):
        x = torch.sin(x)
        torch._dynamo.graph_break()
    return x


def no_op(x: Tensor) -> Tensor:
    return x


def under_a_mode(function: Function, x: Tensor) -> Any:
    with Watching():
        return function(x)


SKIPS: dict[str, tuple[Function, Function, str]] = {
    "vmap": (smooth, lambda function, x: torch.func.vmap(function)(x), "compile what is around vmap"),
    "break in a loop": (looping, lambda function, x: function(x), "graph_break"),
    "no op": (no_op, lambda function, x: function(x), "no op on tensors"),
    "dispatch mode": (lambda x: x.sin() * 5, under_a_mode, "dispatch mode"),
    "vmap over a module": (Smooth(), lambda function, x: torch.func.vmap(function)(x), "compile what is around vmap"),
}


@pytest.mark.parametrize("skip", SKIPS)
def test_what_dynamo_skips(skip: str, build: Build, device: torch.device) -> None:
    """A function that was called and of which nothing is compiled is told as that, by name and line, with why."""
    function, call, why = SKIPS[skip]
    compiled = build(function)
    assert "at the first call" in str(explain(compiled))
    with torch.no_grad():
        for _ in range(3):
            call(compiled, torch.rand(2, 3, device=device))
    report = explain(compiled)
    assert "at the first call" not in str(report)
    where, *callees = report.skipped
    code = function.forward.__func__.__code__ if isinstance(function, nn.Module) else function.__code__
    assert where == f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    assert all(callee.startswith("smooth (") for callee in callees)  # what the module calls
    assert all(why in reason for reason in report.skipped.values()), report.skipped
    assert f"Dynamo compiled nothing of {shown(where)}" in str(report)


def shown(where: str) -> str:
    """The name and the place of a function as a text shows them: with the name of the file alone."""
    name, _, place = where.partition(" (")
    return f"{name} ({os.path.basename(place)}"


class Looping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return looping(x)


class LoopingItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.sin(x)
            torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize(
    ("make", "given_up"),
    [
        (lambda: lambda x: looping(x + 1) * 2, looping.__code__),
        (lambda: Calls(Looping()), looping.__code__),
        (lambda: Calls(Calls(LoopingItself())), LoopingItself.forward.__code__),
    ],
    ids=["function", "function of a child", "child"],
)
def test_what_dynamo_gives_up_in_a_callee(make: Any, given_up: Any, build: Build, device: torch.device) -> None:
    """A callee that Dynamo gave up, while its caller is compiled around it, is told by name and line, with both causes."""
    report = explain(used(build(make()), device))
    where = f"{given_up.co_name} ({given_up.co_filename}:{given_up.co_firstlineno})"
    assert report.skipped[where].startswith("Call to `torch._dynamo.graph_break()`, at ")
    assert report.skipped[where].endswith("; graph break in loop")
    assert f"Dynamo compiled nothing of {shown(where)}" in str(report)


def test_what_is_compiled_is_not_skipped(build: Build, device: torch.device) -> None:
    """A function whose ops all stand in its callees has a frame of its own too, and is compiled."""
    assert explain(used(build(Calls()), device)).skipped == {}
    assert explain(used(build(nn.Linear(3, 3)), device)).skipped == {}


@pytest.mark.parametrize(
    ("stance", "line"),
    [
        ("force_eager", "all calls run uncompiled"),
        ("eager_on_recompile", "another compilation run uncompiled"),
        ("fail_on_recompile", "another compilation are an error"),
        ("eager_then_compile", "the first call of a function runs uncompiled"),
    ],
)
def test_stances(stance: str, line: str, build: Build, device: torch.device) -> None:
    """Under each stance of torch's calls are right, what is recorded stays, and the report says what the stance is."""
    compiled = used(build(smooth, dynamic=False), device)
    with torch.compiler.set_stance(stance), torch.no_grad():
        for size in (3, 3, 4):
            x = torch.rand(size, device=device)
            if stance == "fail_on_recompile" and size == 4:
                with pytest.raises(RuntimeError, match="recompile"):
                    compiled(x)
                continue
            assert torch.equal(compiled(x), smooth(x))
        report = explain(compiled)
        fresh = explain(build(lambda x: x + 1))
    assert (report.stance, report.programs[0].num_graph_segments) == (stance, 1)
    assert line in str(report)
    assert line in str(fresh)
    used(compiled, device)
    assert explain(compiled).stance == "default"
    assert line not in str(explain(compiled))
    assert max(program.replays for program in explain(compiled).programs) >= 4


def test_a_reached_recompile_limit(build: Build, device: torch.device) -> None:
    """Calls beyond the limit run uncompiled and are right, and the report names the function."""
    compiled = build(lambda x, n: x * n + 1, dynamic=False)
    x = torch.rand(3, device=device)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for n in (2.0, 3.0, 4.0, 5.0, 2.0, 2.0):
            assert torch.equal(compiled(x, n), x * n + 1)
        report = explain(compiled)
    assert len(report.programs) == len(report.at_recompile_limit) * 2 == 2
    assert "Dynamo will not recompile <lambda>" in str(report)
