"""Any Python in marked functions, without ``fake=``: values, side effects, counts and exceptions are eager's in each call."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from breakable_backend import eager_on_graph
from checks import assert_same

pytestmark = pytest.mark.usefixtures("no_grad")

Mark = Callable[[Any], Any]
Program = Callable[[Mark, list[Any]], Callable[[Tensor], Any]]
"""Makes a model whose functions ``mark`` marks, and that write down in the list what they do."""

PROGRAMS: dict[str, Program] = {}


def program(make: Program) -> Program:
    PROGRAMS[make.__name__] = make
    return make


@program
def a_closure_made_in_each_call(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    factor = [1.0]

    def model(x: Tensor) -> Tensor:
        @mark
        def inner(y: Tensor) -> Tensor:
            log.append(float(y.sum()))
            return y * factor[0]

        factor[0] += 1
        return inner(x.sin()).cos()

    return model


@program
def a_generator_inside(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def doubled(x: Tensor) -> Tensor:
        def values() -> Iterator[float]:
            for value in x.tolist():
                log.append(value)
                yield value * 2

        return torch.tensor(list(values()), device=x.device)

    return lambda x: doubled(x.sin()).cos()


@program
def a_generator_function(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def multiples(x: Tensor) -> Iterator[Tensor]:
        for number in range(3):
            log.append(number)
            yield x * number

    def model(x: Tensor) -> Tensor:
        total = x.sin()
        for part in multiples(total):
            total = total + part
        return total.cos()

    return model


@program
def methods_of_a_class(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    class Counter:
        count = 0

        @mark
        def method(self, x: Tensor) -> Tensor:
            self.count += 1
            log.append(self.count)
            return x * self.count

        @classmethod
        @mark
        def of_the_class(cls, x: Tensor) -> Tensor:
            cls.count += 1
            return x - cls.count

        @staticmethod
        @mark
        def static(x: Tensor) -> Tensor:
            return x + float(x.max())

        @property
        @mark
        def ones(self) -> int:
            return len(log)

    counter = Counter()
    return lambda x: counter.method(x.sin()).cos() + Counter.of_the_class(x) + Counter.static(x) + x * counter.ones


@program
def methods_of_a_base(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    class Base(nn.Module):
        @mark
        def scaled(self, x: Tensor) -> Tensor:
            log.append("base")
            return x * 2 + float(x.sum())

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(x.sin()).cos()

    class Derived(Base):
        @mark
        def scaled(self, x: Tensor) -> Tensor:
            log.append("derived")
            return super().scaled(x) + 1

    return Derived()


@program
def partials(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    def scaled(x: Tensor, by: int, *, more: int = 1) -> Tensor:
        log.append((by, more))
        return x * by + float(x.sum()) * more

    marked, other = functools.partial(mark(scaled), by=3), mark(functools.partial(scaled, more=2))
    return lambda x: marked(x.sin()).cos() + other(x, 4)


@program
def decorators_around_it(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    def noting(function: Any) -> Any:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            log.append("called")
            return function(*args, **kwargs)

        return noted

    @noting
    @mark
    @noting
    @mark
    def scaled(x: Tensor) -> Tensor:
        log.append(float(x[0]))
        return x * float(x[0])

    return lambda x: scaled(x.sin()).cos()


@program
def recursion(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def again(x: Tensor, times: int) -> Tensor:
        log.append(times)
        return x if times == 0 else again(x * 1.5, times - 1) + float(x.sum())

    return lambda x: again(x.sin(), 3).cos()


@program
def a_compiled_function_inside(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    inner = torch.compile(lambda x: x.sin() * 2 + 1, backend="eager")

    @mark
    def scaled(x: Tensor) -> Tensor:
        log.append(1)
        return inner(x) * float(x.sum())

    return lambda x: scaled(x.sin()).cos()


def raising(error: type[BaseException], at: Callable[[int], bool]) -> Program:
    def make(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
        @mark
        def scaled(x: Tensor) -> Tensor:
            log.append(1)
            if at(len(log)):
                try:
                    raise ZeroDivisionError
                except ZeroDivisionError as cause:
                    raise error(f"call {len(log)}") from cause
            return x * len(log)

        return lambda x: scaled(x.sin()).cos()

    return make


for name, error, at in (
    ("raises_when_it_records", KeyError, {3}),
    ("raises_when_it_replays", OSError, {5}),
    ("raises_in_each_other_call", ValueError, {1, 3, 5, 7}),
    ("ends_the_process", SystemExit, {1, 5}),
    ("is_interrupted", KeyboardInterrupt, {4}),
    ("stops_an_iteration", StopIteration, {5}),
):
    PROGRAMS[name] = raising(error, at.__contains__)


@program
def no_result_and_texts(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def noted(x: Tensor) -> None:
        log.append(x.tolist())

    named = mark(lambda x: "name")
    return lambda x: (noted(x.sin()), named(x), x.cos())


@program
def ints_that_vary(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def count(x: Tensor) -> int:
        log.append(1)
        return len(log)

    large = mark(lambda x: int(x.abs().sum() * 1e9))
    return lambda x: (x.cos() * count(x.sin()), large(x))


@program
def floats_that_vary(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def total(x: Tensor) -> float:
        log.append(1)
        return float(x.sum())

    return lambda x: x.cos() * total(x.sin())


@dataclasses.dataclass(frozen=True)
class Parts:
    """A result of several."""

    first: Tensor
    rest: Any


Pair = collections.namedtuple("Pair", "one other")


@program
def nests_of_containers(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def parts(given: Parts, *more: Any, **named: Any) -> Parts:
        log.append((len(more), sorted(named)))
        by = float(given.first.sum())
        return Parts(given.first * by, Pair([more[0] + 1, {"by": named["by"] * 2}], None))

    def model(x: Tensor) -> Any:
        made = parts(Parts(x.sin(), "text"), x, by=x.cos())
        return made.first.cos(), made.rest.one[0] * 2, made.rest.one[1]["by"], made.rest.other

    return model


@program
def ordered_and_other_containers(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    doubled = mark(lambda given: collections.OrderedDict((key, value * 2) for key, value in given.items()))
    last: collections.deque[float] = collections.deque(maxlen=3)

    @mark
    def kept(x: Tensor, where: collections.deque[float]) -> Tensor:
        where.append(float(x[0]))
        log.append(list(where))
        return x * len(where)

    def model(x: Tensor) -> Any:
        made = doubled(collections.OrderedDict(a=x.sin(), b=x))
        return kept(made["a"].cos() + made["b"], last)

    return model


@program
def defaults_and_caches(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def counted(x: Tensor, seen: list[float] = []) -> Tensor:  # noqa: B006 - that is what it is about
        seen.append(float(x.sum()))
        log.append(len(seen))
        return x * len(seen)

    @functools.cache
    def table(size: int) -> Tensor:
        log.append(size)
        return torch.arange(size).float()

    looked_up = mark(lambda x: x + table(x.shape[0]).to(x.device))
    own = mark(functools.cache(lambda size: torch.arange(size).float()))
    return lambda x: counted(x.sin()).cos() + looked_up(x) + own(x.shape[0]).to(x.device)


@program
def numbers_of_python_and_numpy(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    generator, other = random.Random(3), np.random.default_rng(3)

    @mark
    def scaled(x: Tensor) -> Tensor:
        log.append((generator.random(), float(other.random())))
        return torch.from_numpy(np.sort(x.cpu().numpy()) * log[-1][0]).to(x)

    return lambda x: scaled(x.sin()).cos()


@program
def objects_that_are_called(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    class Scale:
        count = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.count += 1
            log.append(self.count)
            return x * self.count

    scale = mark(Scale())
    return lambda x: scale(x.sin()).cos()


@program
def tasks_threads_and_contexts(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    async def noted(x: Tensor) -> Tensor:
        await asyncio.sleep(0)
        log.append(float(x[0]))
        return x * 2

    @contextlib.contextmanager
    def factor() -> Iterator[int]:
        log.append("in")
        yield 2
        log.append("out")

    @mark
    def in_a_task(x: Tensor) -> Tensor:
        with factor() as by:
            return asyncio.run(noted(x)) * by

    @mark
    def in_a_thread(x: Tensor) -> Tensor:
        made: list[Tensor] = []
        thread = threading.Thread(target=lambda: made.append(x * float(x.sum())))
        thread.start()
        thread.join()
        return made[0]

    return lambda x: in_a_thread(in_a_task(x.sin())).cos()


@program
def in_loops_and_as_keys(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def shifted(x: Tensor, by: int) -> Tensor:
        log.append(by)
        return x * by + float(x.sum())

    total = mark(lambda x: float(x.sum()))

    def model(x: Tensor) -> Any:
        parts = [shifted(x, number) for number in range(3)]
        stacked = torch.stack(list(map(lambda part: shifted(part, 2), parts)))  # noqa: C417 - that is what it is about
        return stacked.cos(), sorted([x.sin(), x.cos(), x], key=total)[0] * 2

    return model


@program
def as_a_hook(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 0.5)

    @mark
    def doubled(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        log.append(float(result.sum()))
        return result * 2

    layer.register_forward_hook(doubled)
    holder = nn.Sequential(layer)
    holder.forward = lambda x: layer(x).cos()  # type: ignore[method-assign]
    return holder


@program
def results_in_one_memory(mark: Mark, log: list[Any]) -> Callable[[Tensor], Any]:
    @mark
    def several(x: Tensor) -> Any:
        y = x * 2
        return y, y, y[1:], y.view(2, 2), x[:1].expand(4)

    def model(x: Tensor) -> Any:
        first, same, tail, square, wide = several(x.sin())
        first.add_(1)
        return same.cos(), tail, square, wide

    return model


def called(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a call returns, or raises."""
    try:
        return function(x)
    except BaseException as error:  # noqa: BLE001 - all kinds are compared
        return type(error), str(error), repr(error.__cause__)


@pytest.mark.filterwarnings("ignore:.* is marked inside of a compiled function")  # one of the programs does that
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_call_is_eagers(name: str, options: dict[str, Any], device: torch.device) -> None:
    """From the first call on, through recording and replays: results, exceptions and what was written down."""
    log: list[Any] = []
    wanted: list[Any] = []
    model, eager = PROGRAMS[name](eager_on_graph, log), PROGRAMS[name](lambda function: function, wanted)
    if isinstance(model, nn.Module) and isinstance(eager, nn.Module):
        nn.Module.to(eager, device).load_state_dict(nn.Module.to(model, device).state_dict())
    compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options})
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 8):
        x = torch.randn(4, generator=generator).to(device)
        assert_same(called(compiled, x), called(eager, x.clone()), f"call {number}")
        assert log == wanted, f"call {number}"


def test_the_body_is_never_traced(options: dict[str, Any], device: torch.device) -> None:
    """A frame that Dynamo leaves alone, beyond its recompile limit, calls marked functions that Dynamo leaves alone too."""
    traced: list[bool] = []

    class Scale:
        by = 2

        @property
        @eager_on_graph
        def more(self) -> int:
            traced.append(torch.compiler.is_compiling())
            return len(traced)

    def scaled(x: Tensor, scale: Scale) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return x * scale.by + float(x.sum())

    one, other = eager_on_graph(scaled), eager_on_graph(scaled)
    scale = Scale()
    model = lambda x: one(x.sin(), scale).cos() + other(x.cos(), scale) + 0 * scale.more  # noqa: E731
    compiled = torch.compile(model, backend="breakable_cg", options={"min_kernels": 1, **options})
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            x = torch.randn(4, device=device)
            assert_same(compiled(x), model(x))
    assert traced == [False] * 30
