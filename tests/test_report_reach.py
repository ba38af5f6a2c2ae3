"""Reports, resets and exports reach every graph that came of calling a compiled function, however it was compiled."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
from breakable_backend import explain, export, reset
from breakable_backend.backend import executors_of

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
    make, graphs = WAYS[way]
    function = used(make(build), device)
    programs = explain(function).programs
    assert len(programs) == graphs, [program.text for program in programs]
    assert all(program.replays >= 1 for program in programs)
    assert len(explain().programs) == graphs + 1  # and no more than that was compiled
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
