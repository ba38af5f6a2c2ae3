"""Anything that can be called may be marked: it is one node, with gradients, and an eager step of a capture; or an error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from breakable_backend import OptionsError, capture, eager_on_graph, explain
from checks import assert_same

Mark = Callable[[Any], Any]


class Scale:
    """A class whose call is marked, or is not."""

    by = 3.0

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by + float(x.detach().max())

    def method(self, x: Tensor) -> Tensor:
        return x * self.by + float(x.detach().sum())


def scaled(x: Tensor, by: float = 2.0) -> Tensor:
    return x * by + float(x.detach().max())


def adding_one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*args: Any) -> Tensor:
        return function(*args) + 1

    return inner


def class_method(mark: Mark, *, above: bool) -> Callable[[Tensor], Tensor]:
    class Base:
        by = 2.0

        def of_class(cls: Any, x: Tensor) -> Tensor:
            return scaled(x, cls.by)

        of_class = mark(classmethod(of_class)) if above else classmethod(mark(of_class))

    class Derived(Base):
        by = 5.0

    return lambda x: Base.of_class(x) + Derived().of_class(x)


def static_method(mark: Mark, *, above: bool) -> Callable[[Tensor], Tensor]:
    class Holder:
        static = mark(staticmethod(scaled)) if above else staticmethod(mark(scaled))

    return lambda x: Holder.static(x) + Holder().static(x)


CALLABLES: dict[str, Callable[[Mark], Callable[[Tensor], Tensor]]] = {
    "classmethod, below": functools.partial(class_method, above=False),
    "classmethod, above": functools.partial(class_method, above=True),
    "staticmethod, below": functools.partial(static_method, above=False),
    "staticmethod, above": functools.partial(static_method, above=True),
    "bound method": lambda mark: mark(Scale().method),
    "instance": lambda mark: mark(Scale()),
    "partial": lambda mark: mark(functools.partial(scaled, by=3.0)),
    "partial of a mark": lambda mark: functools.partial(mark(scaled), by=3.0),
    "wraps, above the mark": lambda mark: adding_one(mark(scaled)),
    "wraps, below the mark": lambda mark: mark(adding_one(scaled)),
    "singledispatch": lambda mark: mark(functools.singledispatch(scaled)),
    "a function of torch's": lambda mark: mark(torch.sigmoid),
}


def around(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (function(x.sin() + 1).cos() + 2) * x


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLABLES)
def test_one_node(name: str, grad: bool, device: torch.device, options: dict[str, Any]) -> None:
    """In compiled code it is a node of one graph, forward and backward."""
    model, eager = around(CALLABLES[name](eager_on_graph)), around(CALLABLES[name](lambda function: function))
    compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options}, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for _ in range(6):
            x = torch.rand(4, device=device, requires_grad=grad)
            twin = x.detach().clone().requires_grad_(grad)
            made, want = compiled(x), eager(twin)
            assert_same(made, want)
            if grad:
                made.sum().backward()
                want.sum().backward()
                assert_same(x.grad, twin.grad)
    report = explain(compiled)
    assert not report.graph_breaks
    assert all(program.num_eager_segments and program.replays for program in report.programs)
    assert len(report.programs) == 1 + grad


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLABLES)
def test_in_a_capture(name: str, grad: bool, device: torch.device, make: Callable[..., Any]) -> None:
    """In a capture it is an eager step."""
    model, eager = around(CALLABLES[name](eager_on_graph)), around(CALLABLES[name](lambda function: function))
    x, graph = torch.rand(4, device=device, requires_grad=grad), make()
    model(x.detach())
    with torch.set_grad_enabled(grad), capture(graph):
        made = model(x)
        gradient = torch.autograd.grad(made.sum(), x)[0] if grad else None
    assert len(explain(graph).programs[0].reasons) >= 1
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.rand(4, device=device))
        graph.replay()
        twin = x.detach().clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            want = eager(twin)
        assert_same(made.detach(), want.detach())
        if grad:
            assert_same(gradient, torch.autograd.grad(want.sum(), twin)[0])


@pytest.mark.usefixtures("no_grad")
def test_classes_as_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """A class is an argument like a string: another one is another program."""

    @eager_on_graph
    def by_class(x: Tensor, kind: type[Scale]) -> Tensor:
        return x * kind.by + float(x.detach().max())

    class Other(Scale):
        by = 7.0

    def model(x: Tensor, kind: type[Scale]) -> Tensor:
        return by_class(x.sin() + 1, kind).cos() + 2

    compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options}, fullgraph=True)
    for _ in range(4):
        for kind in (Scale, Other):
            x = torch.rand(4, device=device)
            assert_same(compiled(x, kind), model(x, kind))
    assert [program.num_eager_segments for program in explain(compiled).programs] == [1, 1]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("read", [True, False])
def test_a_class_method_that_changes_its_class(read: bool, device: torch.device, options: dict[str, Any]) -> None:
    """What it changes, the code around it may read: the call is a graph break."""

    def make(mark: Mark) -> Any:
        class Counter:
            count = 0

            @classmethod
            @mark
            def step(cls, x: Tensor) -> Tensor:
                cls.count += 1
                return x * cls.count

        return lambda x: Counter.step(x.sin()).cos() + (Counter.count if read else 0)

    model, eager = make(eager_on_graph), make(lambda function: function)
    compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options})
    # Dynamo of torch 2.11 compiles an old count into the code behind the break, also with backend="eager".
    for _ in range(7 if torch.__version__ >= "2.13" else 4):
        x = torch.rand(4, device=device)
        assert_same(compiled(x), eager(x))
    assert "it changes Counter.count, which the code around it reads" in str(explain(compiled).graph_breaks)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("result", [torch.float32, Scale, torch.device("cpu")], ids=str)
def test_classes_and_dtypes_as_results(result: Any, device: torch.device, options: dict[str, Any]) -> None:
    """As results they are a graph break, with that reason."""

    @eager_on_graph
    def told(x: Tensor) -> tuple[Tensor, Any]:
        return x * float(x.detach().max()), result

    compiled = torch.compile(lambda x: told(x.sin() + 1)[0].cos() + 2, backend="breakable_cg", options=options)
    for _ in range(4):
        x = torch.rand(4, device=device)
        assert_same(compiled(x), told(x.sin() + 1)[0].cos() + 2)
    assert "it returned an object that compiled code cannot hold" in str(explain(compiled).graph_breaks)


class Cached:
    @functools.lru_cache  # noqa: B019 - it is about that
    def method(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    "cached",
    [functools.lru_cache(scaled), functools.cache(scaled), Cached().method],
    ids=["lru_cache", "cache", "method"],
)
def test_a_cache_takes_no_tensors(cached: Any) -> None:
    """A cache that asks which tensors it is given would return an old result: they are the same in each replay."""
    marked = eager_on_graph(cached)
    with pytest.raises(OptionsError, match="keeps its results by its arguments") as caught:
        marked(torch.ones(3))
    assert "mark the function in the cache" in str(caught.value)
    assert "test_callables.py" in str(caught.value)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_mark_in_a_cache(device: torch.device, options: dict[str, Any]) -> None:
    """Below the cache the mark works."""
    model = around(functools.lru_cache(eager_on_graph(scaled)))
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.rand(4, device=device)
        assert_same(compiled(x), around(scaled)(x))


@pytest.mark.parametrize("kind", ["async function", "async generator"])
def test_what_has_to_be_awaited_is_refused(kind: str) -> None:
    """The mark of an asynchronous function is an error."""

    async def waits(x: Tensor) -> Tensor:
        return x

    async def yields(x: Tensor) -> Any:
        yield x

    with pytest.raises(OptionsError, match="is asynchronous"):
        eager_on_graph(waits if kind == "async function" else yields)


@pytest.mark.usefixtures("no_grad")
def test_a_generator_function(device: torch.device, options: dict[str, Any], make: Callable[..., Any]) -> None:
    """A generator is no result that a graph can hold: a graph break with that reason; in a capture an error."""

    @eager_on_graph
    def twice(x: Tensor) -> Iterator[Tensor]:
        yield x * 2
        yield x * float(x.detach().max())

    model = around(lambda x: sum(twice(x)))  # type: ignore[arg-type, return-value]
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.rand(4, device=device)
        assert_same(compiled(x), model(x))
    assert "cannot hold: generator" in str(explain(compiled).graph_breaks)
    with pytest.raises(Exception, match="its result is a generator"), capture(make()):
        model(x)
