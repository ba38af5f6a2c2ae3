"""What a graph of the second door holds, and how long: what the body refers to lives, all else gives its memory away.

The tape overwrites a bridge that nobody refers to with each segment that was captured afterwards, as a GPU may.
"""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from breakable_backend import BreakableCUDAGraph, ReplayError, break_graph, capture, eager_on_graph, eager_region
from breakable_backend.drivers.tape import TapeDriver
from doors import MakeGraph

pytestmark = pytest.mark.usefixtures("no_grad")

SIZE = 1 << 16


@eager_on_graph
def bent(x: Tensor) -> Tensor:
    """An eager step whose result is a bridge to what comes after it."""
    return x.sin() * 2


@eager_on_graph
def looked_at(x: Tensor) -> None:
    """An eager step that reads what segments made."""
    seen.append(x.sum().item())


seen: list[float] = []


def random_body(seed: int, x: Tensor) -> list[Tensor]:
    """Ops and breaks in turns. Values cross one, two or many breaks, and are dropped, kept, viewed and written in between."""
    numbers = random.Random(seed)
    values, kept = [x + 1], []
    for _ in range(numbers.randrange(6, 24)):
        value = numbers.choice(values)
        what = numbers.choice(["op", "op", "two", "bent", "break", "look", "view", "write", "keep", "drop"])
        if what == "op":
            values.append(value.cos() + 0.5)
        elif what == "two":
            values.append(value * 0.5 + numbers.choice(values))
        elif what == "bent":
            values.append(bent(value))
        elif what == "break":
            break_graph()
        elif what == "look":
            looked_at(value)
        elif what == "view":
            values.append(value.view(2, -1).flip(0).view(-1))
        elif what == "write":
            value.mul_(0.5)
        elif what == "keep":
            kept.append(value)
        elif len(values) > 1:
            values.pop(numbers.randrange(len(values)))
        del value
        if len(values) > 5:
            values.pop(0)
    return [*kept, values[-1]]


@pytest.mark.parametrize("seed", range(12))
def test_random_bodies_replay_as_eager_runs(seed: int, make: MakeGraph, device: torch.device) -> None:
    """Whatever a body drops and keeps, each replay leaves in what it kept what eager computes."""
    graph, x = make(), torch.rand(64, device=device)
    with capture(graph):
        kept = random_body(seed, x)
    for call in range(3):
        torch.manual_seed(call)
        x.uniform_()
        seen.clear()
        graph.replay()
        replayed, told = [value.clone() for value in kept], list(seen)
        seen.clear()
        for got, want in zip(replayed, random_body(seed, x), strict=True):
            assert torch.equal(got, want)
        assert told == seen


def chain(x: Tensor, breaks: int) -> Tensor:
    """Each value is dropped once it has been read."""
    for _ in range(breaks):
        x = bent((x * 0.5).cos()) + 1
    return x


def test_memory_does_not_grow_with_breaks(make: MakeGraph, device: torch.device) -> None:
    """What a body has dropped makes room for what comes after it, bridges too."""
    needed, reserved = [], []
    for breaks in (3, 12):
        graph, x = make(), torch.rand(SIZE, device=device)
        with capture(graph):
            y = chain(x, breaks)
        assert torch.equal(y, chain(x, breaks))
        assert graph.recording is not None
        assert graph.driver is not None
        held = graph.recording.held
        needed.append((held.bridges, held.values if device.type == "cuda" else 0))
        reserved.append(graph.driver.pool_bytes())
        del y
    assert needed[0] == needed[1]
    assert needed[0][0] == 4 * SIZE
    if device.type == "cuda":  # a tape never gives away what segments made
        assert reserved[0] == reserved[1]


def test_what_the_body_keeps_lives(make: MakeGraph, device: torch.device) -> None:
    """Values that somebody still refers to hold what the last replay computed, those of every step."""
    graph, x = make(), torch.rand(64, device=device)
    with capture(graph):
        steps = [x]
        for _ in range(5):
            steps.append(bent(steps[-1] + 1))
            steps.append(steps[-1].cos())
    for _ in range(2):
        x.uniform_()
        graph.replay()
        want = [x]
        for _ in range(5):
            want.append(bent(want[-1] + 1))
            want.append(want[-1].cos())
        assert all(map(torch.equal, steps, want))


def test_what_an_eager_step_keeps_lives(make: MakeGraph, device: torch.device) -> None:
    """An argument that an eager function kept at the capture holds what the last replay computed."""
    kept: list[Tensor] = []

    @eager_on_graph
    def keeping(x: Tensor) -> Tensor:
        kept[:] = kept or [x]
        return x * 3

    graph, x = make(), torch.rand(64, device=device)
    with capture(graph):
        y = chain(keeping(x.sin()), 4)
    for _ in range(2):
        x.uniform_()
        graph.replay()
        assert torch.equal(kept[0], x.sin())
    assert torch.equal(y, chain(x.sin() * 3, 4))


def test_aliases_of_an_argument_are_aliases_in_a_replay(make: MakeGraph, device: torch.device) -> None:
    """An eager function that writes one argument sees it in another that is a view of the first."""

    @eager_on_graph(mutates_args=("x",))
    def shift(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y * 2

    graph, x = make(), torch.rand(64, device=device)
    with capture(graph):
        inner = x.sin()
        y = shift(inner, inner[:8]) + 1
        del inner
    x.uniform_()
    graph.replay()
    assert torch.equal(y, (x.sin() + 1)[:8] * 2 + 1)


def test_nothing_that_was_dropped_is_held() -> None:
    """A graph holds no bridge whose value the body has dropped."""
    graph, x = BreakableCUDAGraph(driver="tape"), torch.rand(64)
    with capture(graph):
        y = chain(x, 4)
    gc.collect()
    driver: Any = graph.driver
    assert isinstance(driver, TapeDriver)
    assert len(driver.free()) == 4
    assert torch.equal(y, chain(x, 4))


def test_compare_mode_keeps_everything(make: MakeGraph, device: torch.device) -> None:
    """Compare mode looks at what segments made after they ran, and so holds it."""
    graph, x = make(), torch.rand(64, device=device)
    with capture(graph, debug="compare"):
        y = chain(x, 4)
    x.uniform_()
    graph.replay()
    assert torch.equal(y, chain(x, 4))
    assert graph.recording is not None
    assert graph.recording.most is None


def test_an_eager_region_reads_what_is_dropped_after_it(make: MakeGraph, device: torch.device) -> None:
    """What a region of eager ops reads is there when it runs, and may go behind it."""
    graph, x = make(), torch.rand(64, device=device)

    def body(x: Tensor) -> Tensor:
        a = x + 1
        with eager_region():
            b = a * 2
        del a
        return chain(b, 3)

    with capture(graph):
        y = body(x)
    x.uniform_()
    graph.replay()
    assert torch.equal(y, body(x))


@pytest.mark.parametrize("nested", ["replay", "capture"])
def test_graphs_of_one_pool_are_not_nested(nested: str, make: MakeGraph, device: torch.device) -> None:
    """An eager step cannot use another graph of the same pool, which is one graph's at a time."""
    outer, x = make(), torch.rand(64, device=device)
    inner, alone = make(pool=outer.pool()), make()
    nesting = [False]

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        if nesting[0]:
            if nested == "replay":
                inner.replay()
            else:
                with capture(inner):
                    x.cos()
        alone.replay()
        return x * 2

    with capture(alone):
        z = x.exp()
    with capture(inner):
        x.sin()
    with capture(outer):
        y = step(x + 1) - 1
    nesting[0] = True
    with pytest.raises(ReplayError, match="shares its pool"):
        outer.replay()
    with pytest.raises(ReplayError, match="shares its pool"), capture(outer):
        step(x + 1)
    nesting[0] = False
    with capture(inner):
        x.sin()
    with capture(outer):
        y = step(x + 1) - 1
    x.uniform_()
    outer.replay()
    inner.replay()
    assert torch.equal(y, (x + 1) * 2 - 1)
    assert torch.equal(z, x.exp())


@pytest.mark.parametrize("order", ["owner first", "owner last"])
def test_graphs_of_one_pool_keep_each_others_results(order: str, make: MakeGraph, device: torch.device) -> None:
    """What a graph returned is as its own last replay left it, though others of its pool were captured and replayed since."""
    owner, x = make(), torch.rand(64, device=device)
    graphs = [owner, *(make(pool=owner.pool()) for _ in range(2))]
    if order == "owner last":
        graphs.reverse()
    results = []
    for number, graph in enumerate(graphs):
        with capture(graph):
            results.append(((x + 1).exp() * 2).cos() + number)  # memory between two ops, which nobody holds afterwards
    x.uniform_()
    want = ((x + 1).exp() * 2).cos()
    for graph in (*graphs, *reversed(graphs)):
        graph.replay()
    for number, result in enumerate(results):
        assert torch.equal(result, want + number)
