"""One suite for all drivers: what a capture is. The protocols' docstrings in ``drivers/__init__.py`` are its text.

The last section holds what only the tape driver promises, since a GPU cannot be asked or would crash.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import _torch
from breakable_backend.drivers import CapturedGraph, CaptureDriver
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.errors import CaptureError, ReplayError
from breakable_backend.ir.layout import non_owning


class Calls:
    """How often the Python of each custom op below ran."""

    python_op = 0
    writing_op = 0


@torch.library.custom_op("driver_contract::python_op", mutates_args=())
def python_op(x: Tensor) -> Tensor:
    """3x + 19, drawn out over two ATen ops."""
    Calls.python_op += 1
    return x * 3 + 19


@torch.library.custom_op("driver_contract::writing_op", mutates_args=("total",))
def writing_op(x: Tensor, total: Tensor) -> None:
    """Adds ``x`` to ``total``."""
    Calls.writing_op += 1
    total.add_(x)


@torch.library.custom_op("driver_contract::host_op", mutates_args=())
def host_op(x: Tensor) -> Tensor:
    """Goes through the host, as a Python body may."""
    return torch.stack([x.cpu(), x.cpu()]).to(x.device)


# The same ops with their Python in the dispatcher, without what ``custom_op`` adds.
library = torch.library.Library("driver_contract", "FRAGMENT")
library.define("plain_op(Tensor x) -> Tensor")
library.impl("plain_op", lambda x: x.sin() + x.cos(), "CompositeExplicitAutograd")
library.define("drawing_op(Tensor x) -> Tensor")
library.impl("drawing_op", lambda x: x + torch.rand_like(x), "CompositeExplicitAutograd")


class Session:
    """Captures and replays as a recording does: between begin and end, with the lock held."""

    def __init__(self, driver: CaptureDriver) -> None:
        self.driver = driver
        self.device = driver.device
        self.graphs: list[CapturedGraph] = []

    def capture(self, body: Callable[[], Any], fed: Sequence[tuple[Tensor, Tensor]] = ()) -> tuple[CapturedGraph, Any]:
        with self.driver.lock:
            stream = self.driver.begin()
            try:
                with self.driver.recording():
                    graph, result = self.driver.capture(body, fed)
            finally:
                self.driver.end(stream)
        self.graphs.append(graph)
        return graph, result

    def replay(self, *graphs: CapturedGraph) -> None:
        with self.driver.lock:
            stream = self.driver.begin()
            try:
                for graph in graphs:
                    graph.replay(stream)
            finally:
                self.driver.end(stream)

    def ramp(self, *shape: int) -> Tensor:
        """0, 1, 2 … in the given shape."""
        return torch.arange(float(torch.Size(shape).numel()), device=self.device).reshape(shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device)

    def random_state(self) -> Tensor:
        """A number that tells where the device's default generator stands, drawn from a copy of it."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return torch.rand(8, device=self.device)


@pytest.fixture
def session(driver: CaptureDriver) -> Iterator[Session]:
    """A session that releases what the test captured."""
    session = Session(driver)
    with torch.no_grad():
        yield session
    driver.release(session.graphs)


# --- copies out of a graph --------------------------------------------------------------------------------------------------


def test_a_graph_copies_a_result_out(session: Session) -> None:
    """Each launch copies to where the outlet was led last, what is in the result at that place of the body."""
    x, targets = session.normal(4, 3), [session.normal(4, 3) for _ in range(3)]
    before, found = [target.clone() for target in targets], []

    def body() -> Tensor:
        made = x * 2
        found.append(session.driver.on(x.device).let_out(made, targets[0]))
        return made.add_(1)

    graph, result = session.capture(body)
    (outlet,) = found
    assert outlet.target == targets[0].data_ptr()
    for target, old in zip(targets, before, strict=True):
        assert torch.equal(target, old)  # nothing has happened yet
        outlet.lead(target.data_ptr())
        session.replay(graph)
        assert torch.equal(target, x * 2)
        assert torch.equal(result, x * 2 + 1)
        x.normal_()
    first = targets[0].clone()
    session.replay(graph)
    assert torch.equal(targets[0], first)
    assert torch.equal(targets[2], x * 2)


def test_launches_under_way_copy_where_they_were_led(session: Session) -> None:
    """To lead an outlet elsewhere changes no launch that was issued before."""
    x, targets, found = session.normal(64), [session.normal(64) for _ in range(40)], []

    def body() -> None:
        found.append(session.driver.on(x.device).let_out(x * 2, targets[0]))

    graph, _ = session.capture(body)
    want = []
    for number, target in enumerate(targets):
        x.fill_(number)
        found[0].lead(target.data_ptr())
        session.replay(graph)
        want.append(number * 2)
    for target, number in zip(targets, want, strict=True):
        assert torch.equal(target, torch.full_like(x, number))


def test_no_copy_out_is_left_of_a_failed_capture(session: Session) -> None:
    """The next capture's outlets are its own."""
    x, target, found = session.normal(64), session.normal(64), []

    def fails() -> None:
        session.driver.on(x.device).let_out(x * 2, target)
        raise ValueError("as asked")

    def body() -> None:
        found.append(session.driver.on(x.device).let_out(x * 3, target))

    with pytest.raises(CaptureError, match="as asked"):
        session.capture(fails)
    graph, _ = session.capture(body)
    other = torch.zeros_like(target)
    found[0].lead(other.data_ptr())
    before = target.clone()
    session.replay(graph)
    assert torch.equal(other, x * 3)
    assert torch.equal(target, before)


# --- copies at the head of a graph ------------------------------------------------------------------------------------------


def test_a_graph_copies_what_it_is_fed(session: Session) -> None:
    """Each launch copies the value that the feed took last, before all else; the bridge itself is not copied."""
    bridge, first, second = session.normal(4, 3), session.normal(4, 3), session.normal(4, 3)
    assert session.driver.feeds(bridge, first)
    graph, result = session.capture(lambda: bridge + 1, [(bridge, first)])
    (feed,) = graph.feeds
    assert feed.source == first.data_ptr()
    session.replay(graph)
    assert torch.equal(result, first + 1)
    assert feed.take(second) is None
    assert (feed.source, feed.copies) == (second.data_ptr(), 1)
    session.replay(graph)
    assert torch.equal(result, second + 1)
    second.zero_()
    session.replay(graph)
    assert torch.equal(result, second + 1)
    bridge.fill_(5)
    assert feed.take(bridge) is None
    assert feed.copies == 0
    session.replay(graph)
    assert torch.equal(result, bridge + 1)
    assert feed.take(first) is None
    session.replay(graph)
    assert torch.equal(result, first + 1)


def test_a_feed_takes_what_lies_otherwise(session: Session) -> None:
    """What lies otherwise than the bridge, or is negated when it is read, is copied first; who launches holds the copy."""
    bridge, value = session.normal(4, 3), session.normal(4, 3)
    graph, result = session.capture(lambda: bridge + 1, [(bridge, value)])
    (feed,) = graph.feeds
    lazy = _torch.negated_view(session.normal(4, 3))
    assert lazy.is_neg()
    for other in (session.normal(3, 4).t(), session.normal(4, 6)[:, ::2], lazy):
        held = feed.take(other)
        assert held is not None
        session.replay(graph)
        assert torch.equal(result, other + 1)
    longer = session.normal(5, 4, 3)[2]
    assert feed.take(longer) is None
    session.replay(graph)
    assert torch.equal(result, longer + 1)


def test_launches_under_way_keep_what_they_copy(session: Session) -> None:
    """To take another value changes no launch that was issued before."""
    bridge, values = session.normal(64), [session.normal(64) for _ in range(40)]
    graph, result = session.capture(lambda: bridge * 2, [(bridge, values[0])])
    (feed,) = graph.feeds
    got = []
    for value in values:
        assert feed.take(value) is None
        session.replay(graph)
        got.append(result.clone())
    for mine, value in zip(got, values, strict=True):
        assert torch.equal(mine, value * 2)


def test_what_a_graph_cannot_be_fed(session: Session) -> None:
    """Bytes are copied: of what is dense, lies as the bridge does, and is read as it lies."""
    bridge = session.normal(4, 3)
    number = torch.complex(bridge, bridge)
    assert session.driver.feeds(bridge.t(), session.normal(4, 3).t())
    assert not session.driver.feeds(bridge, session.normal(3, 4).t())
    assert not session.driver.feeds(bridge, bridge.double())
    assert not session.driver.feeds(session.normal(4, 6)[:, ::2], session.normal(4, 6)[:, ::2])
    assert not session.driver.feeds(session.normal(0), session.normal(0))
    assert not session.driver.feeds(number, number.conj())


# --- capture and replay -----------------------------------------------------------------------------------------------


def test_capture_runs_the_python_once(session: Session) -> None:
    """The body's Python runs once, under the capture, and never at a replay."""
    calls = []
    x = session.ramp(4)
    graph, _ = session.capture(lambda: calls.append(1) or x + 1)
    session.replay(graph)
    assert calls == [1]


def test_capture_writes_nothing(session: Session) -> None:
    """No write of the body, by whatever kind of op, has happened when the capture returns."""
    x, y, z = session.ramp(4), session.ramp(4), session.ramp(2, 2)
    before = [t.clone() for t in (x, y, z)]

    def body() -> None:
        x.add_(1)
        x.mul_(2)
        torch.add(x, 1, out=y)
        z.t()[0].fill_(7)
        z.view(4).copy_(x)

    session.capture(body)
    assert all(torch.equal(now, then) for now, then in zip((x, y, z), before, strict=True))


def test_replay_computes(session: Session) -> None:
    """A replay gives the results of the body the values that eager gives."""
    x, w = session.normal(3, 5), session.normal(5, 2)
    expected = torch.relu(x @ w) + 1
    graph, y = session.capture(lambda: torch.relu(x @ w) + 1)
    session.replay(graph)
    assert torch.equal(y, expected)


def test_copies_bytes(session: Session) -> None:
    """A graph's way to copy, if it has one, copies all bytes of what has no gaps, and of nothing else."""
    graph, _ = session.capture(lambda: session.ramp(4) + 1)
    for like in (session.normal(3, 5), session.normal(5, 3).t(), session.normal(7).to(torch.bfloat16)):
        source, target = session.normal(*like.shape).to(like.dtype).as_strided_(like.shape, like.stride()), like.clone()
        copy = graph.copier(like)
        assert (copy is not None) == (session.device.type == "cuda")
        if copy is not None:
            with session.driver.lock:
                stream = session.driver.begin()
                copy(target.data_ptr(), source.data_ptr(), stream)
                session.driver.end(stream)
            assert torch.equal(target, source)
    for other in (session.normal(3, 8)[:, ::2], session.normal(3, 1).expand(3, 4), session.normal(0), torch.rand(3)):
        assert graph.copier(other) is None


def test_replay_reads_new_values(session: Session) -> None:
    """Each replay reads what its inputs hold by then, at the address of the capture, and writes the same results."""
    x = session.ramp(4)
    graph, y = session.capture(lambda: x * 2 + 1)
    address = y.data_ptr()
    for value in (3.0, -1.0, 0.5):
        y.zero_()
        x.fill_(value)
        session.replay(graph)
        assert y.tolist() == [2 * value + 1] * 4
    assert y.data_ptr() == address


def test_replay_reads_the_old_address(session: Session) -> None:
    """A parameter whose ``.data`` was replaced is read where it was, never at its new address."""
    w = nn.Parameter(session.ramp(4))
    old = w.data
    graph, y = session.capture(lambda: w + 1)
    w.data = torch.full((4,), 100.0, device=session.device)
    session.replay(graph)
    assert torch.equal(y, old + 1)


def test_writes_once_per_replay(session: Session) -> None:
    """An outside tensor is written at each replay, once."""
    counter = torch.zeros(3, device=session.device)
    graph, _ = session.capture(lambda: counter.add_(1))
    for count in range(1, 4):
        session.replay(graph)
        assert counter.tolist() == [count] * 3


def test_in_place_on_a_view(session: Session) -> None:
    """A write through a view reaches the base, of outside and of inside tensors."""
    x = torch.zeros(2, 3, device=session.device)

    def body() -> Tensor:
        x.view(-1)[1:3].add_(1)
        y = x.clone()
        y.t()[2].mul_(10).add_(5)
        return y

    graph, y = session.capture(body)
    session.replay(graph, graph)
    assert x.tolist() == [[0, 2, 2], [0, 0, 0]]
    assert y.tolist() == [[0, 2, 25], [0, 0, 5]]


def test_out_variants(session: Session) -> None:
    """An ``out=`` op writes its target at replay: one from outside, one from inside, and an empty one that it sizes."""
    x, target = session.ramp(4), torch.zeros(4, device=session.device)

    def body() -> tuple[Tensor, Tensor]:
        inside = torch.empty_like(x)
        sized = torch.empty(0, device=x.device)
        torch.mul(x, 3, out=target)
        torch.add(target, 1, out=inside)
        torch.sub(inside, 2, out=sized)
        return inside, sized

    graph, (inside, sized) = session.capture(body)
    assert target.tolist() == [0, 0, 0, 0]
    x.fill_(2)
    session.replay(graph, graph)
    assert (target.tolist(), inside.tolist(), sized.tolist()) == ([6.0] * 4, [7.0] * 4, [5.0] * 4)


def test_result_views_alias(session: Session) -> None:
    """Results that are views of inputs or of each other are so after the capture too."""
    x = session.ramp(2, 3)

    def body() -> tuple[Tensor, Tensor, Tensor]:
        y = x + 1
        return x.t(), y, y[1]

    graph, (view_of_input, y, row) = session.capture(body)
    session.replay(graph)
    assert view_of_input.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert row.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    y[1].fill_(50)
    assert row.tolist() == [50, 50, 50]


def test_geometry_changed_in_place(session: Session) -> None:
    """An op works on the geometry that its arguments had when it was called, although they changed theirs later."""
    x = session.ramp(2, 3)

    def body() -> tuple[Tensor, Tensor]:
        y = x + 1
        before = y.sum(0)
        y.t_()
        y.unsqueeze_(0)
        return before, y.sum(1)

    expected = body()
    graph, results = session.capture(body)
    session.replay(graph)
    assert [r.tolist() for r in results] == [e.tolist() for e in expected]


def test_intermediates_are_overwritten_in_order(session: Session) -> None:
    """An intermediate that is written again is read with the value of its time, at each replay."""
    x = session.ramp(3)

    def body() -> tuple[Tensor, Tensor]:
        buffer = torch.zeros_like(x)
        buffer.add_(x)
        first = buffer * 2
        buffer.add_(1)
        return first, buffer * 2

    graph, (first, second) = session.capture(body)
    session.replay(graph, graph)
    assert (first.tolist(), second.tolist()) == ([0, 2, 4], [2, 4, 6])


def test_literals(session: Session) -> None:
    """A number written in the body keeps the value that it had there, also if a result of it is written."""
    x = session.ramp(3)

    def body() -> Tensor:
        y = x * 2.5
        y[0].fill_(7.0)
        y[1] += 1
        return y

    graph, y = session.capture(body)
    session.replay(graph, graph)
    assert y.tolist() == [7.0, 3.5, 5.0]


def test_graphs_of_one_recording(session: Session) -> None:
    """Graphs captured one after the other read each other's results, with eager code between, in order."""
    x, bridge = session.ramp(3), torch.zeros(3, device=session.device)
    first, y = session.capture(lambda: x + 1)
    session.replay(first)
    bridge.copy_(y * 10)
    second, z = session.capture(lambda: y + bridge)
    session.replay(second)
    third, total = session.capture(lambda: z.sum())
    session.replay(third)
    assert total.item() == 66  # 11 * (1 + 2 + 3)
    x.fill_(1)
    session.replay(first)
    bridge.copy_(y * 10)
    session.replay(second, third)
    assert total.item() == 66  # 11 * (2 + 2 + 2)
    assert z.tolist() == [22, 22, 22]


def test_inference_mode(session: Session) -> None:
    """Captures and replays work in inference mode, on its tensors, and from outside it."""
    w = nn.Parameter(session.ramp(3))
    with torch.inference_mode():
        x = session.ramp(2, 3)
        graph, y = session.capture(lambda: nn.functional.linear(x, w).add_(1))
        session.replay(graph)
        assert y.tolist() == [6, 15]
        x.fill_(1)
    session.replay(graph)
    assert y.tolist() == [4, 4]


def test_grad_mode(session: Session) -> None:
    """Parameters that require grad are captured with grad mode on, and replayed in either mode."""
    layer = nn.Linear(3, 2).to(session.device)
    x = session.ramp(4, 3)
    expected = layer(x)
    with torch.enable_grad():
        graph, y = session.capture(lambda: layer(x).detach())
        session.replay(graph)
    assert torch.equal(y, expected)
    with torch.no_grad():
        y.zero_()
        session.replay(graph)
    assert torch.equal(y, expected)


def test_ambient_state_of_a_replay(session: Session) -> None:
    """A graph computes what was captured, whatever autocast or default dtype surrounds the replay."""
    x = session.normal(4, 4)
    expected = x @ x
    graph, y = session.capture(lambda: x @ x)
    with torch.autocast(session.device.type, dtype=torch.bfloat16):
        session.replay(graph)
    assert torch.equal(y, expected)


# --- models -----------------------------------------------------------------------------------------------------------


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return y + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


class BatchNorm(nn.Module):
    """Writes its running statistics: in training mode a call is not like the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(8, 4, 3, padding=1), nn.GELU(), nn.MaxPool1d(2), nn.Conv1d(4, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2))


class Lookup(nn.Module):
    """Integer indices, sorting and scatters: all of static shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        top = (x.abs() * 3).long().clamp(0, 15)[..., 0]
        y = self.embedding(top) + x[:, x[0, :, 0].argsort()]
        y = y.index_put((top % 2,), x[0, :4].sum(), accumulate=True)
        return y.masked_fill(y > 3, 0).cumsum(1).scatter(2, (top % 8)[..., None], 1.0)


@pytest.mark.parametrize("model", [Lstm, Attention, BatchNorm, Convolution, Lookup])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_models_equal_eager(session: Session, model: type[nn.Module], mode: Callable[[], Any]) -> None:
    """Replays of a model equal eager calls bit for bit, results and buffers."""
    torch.manual_seed(1)
    eager = model().to(session.device)
    captured = model().to(session.device)
    captured.load_state_dict(eager.state_dict())
    with mode():
        x = session.normal(2, 4, 8)
        model().to(session.device)(x)  # the libraries' handles and workspaces exist before a capture
        graph, y = session.capture(lambda: captured(x))
        for _ in range(3):
            x.copy_(session.normal(2, 4, 8))
            y.data.zero_()
            session.replay(graph)
            assert torch.equal(y, eager(x))
        states = zip(captured.state_dict().items(), eager.state_dict().values(), strict=True)
        assert [name for (name, ours), theirs in states if not torch.equal(ours, theirs)] == []


# --- random numbers ---------------------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(5, device=x.device) + torch.rand_like(x),
    "randn": lambda x: x + torch.randn(5, device=x.device),
    "dropout": lambda x: nn.functional.dropout(x + 1, 0.5),
    "normal_": lambda x: torch.empty_like(x).normal_() * x.clone().uniform_(),
    "randint": lambda x: x + torch.randint(100, (5,), device=x.device),
    "multinomial": lambda x: torch.multinomial(x + 1, 4, replacement=True),
    "in a custom op": lambda x: torch.ops.driver_contract.drawing_op(x),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_capture_leaves_the_generator(session: Session, draw: str) -> None:
    """A capture that draws leaves the generator where it was; its graph says, from the first replay on, that it draws."""
    x = session.ramp(5)
    before = session.random_state()
    graph, _ = session.capture(lambda: DRAWS[draw](x))
    assert torch.equal(session.random_state(), before)
    session.replay(graph)
    assert graph.draws_random


def test_says_that_it_draws_nothing(session: Session) -> None:
    """A graph without random ops says so, and moves no generator."""
    x = session.ramp(5)
    graph, _ = session.capture(lambda: x + 1)
    before = session.random_state()
    session.replay(graph)
    assert not graph.draws_random
    assert torch.equal(session.random_state(), before)


@pytest.mark.parametrize("draw", DRAWS)
def test_replay_draws_as_eager(session: Session, draw: str) -> None:
    """From the same seed, replays and eager calls between them draw eager's numbers, and end where eager ends."""
    x = session.ramp(5)
    graph, y = session.capture(lambda: DRAWS[draw](x))

    def run(step: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        results = []
        for _ in range(3):
            results += [step().clone(), torch.rand(2, device=session.device)]
        return [*results, session.random_state()]

    def replay() -> Tensor:
        session.replay(graph)
        return y

    for ours, eager in zip(run(replay), run(lambda: DRAWS[draw](x)), strict=True):
        assert torch.equal(ours, eager)


def test_draws_of_several_graphs(session: Session) -> None:
    """Segment, eager draw, segment: eager's numbers while recording and at replay."""
    x = session.ramp(5)

    def first() -> Tensor:
        return nn.functional.dropout(x + 1, 0.3)

    def eager() -> Tensor:
        return torch.rand(7, device=session.device)

    def second() -> Tensor:
        return torch.randn(5, device=session.device) * x

    torch.manual_seed(5)
    expected = [[first(), eager(), second()] for _ in range(3)]
    torch.manual_seed(5)
    graph, a = session.capture(first)
    session.replay(graph)
    ours = [[a.clone(), eager()]]
    other, b = session.capture(second)
    session.replay(other)
    ours[0].append(b.clone())
    for _ in range(2):
        session.replay(graph)
        middle = eager()
        session.replay(other)
        ours.append([a.clone(), middle, b.clone()])
    assert all(torch.equal(o, e) for os, es in zip(ours, expected, strict=True) for o, e in zip(os, es, strict=True))


# --- what no capture can hold -----------------------------------------------------------------------------------------

HOST_READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: 1 if x[0] > 0 else 2,
    "float": lambda x: float(x[0]),
    "index": lambda x: [1, 2, 3][x[1].long()],
    "repr": repr,
    "format": lambda x: f"{x}",
    "equal": lambda x: torch.equal(x, x + 0),
    "allclose": lambda x: torch.allclose(x, x),
    "narrow": lambda x: x[x[1].long() :],
    "in a custom op": lambda x: torch.ops.driver_contract.host_op(x),
}

DATA_DEPENDENT: dict[str, Callable[[Tensor], Any]] = {
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: torch.unique_consecutive(x),
    "masked_select": lambda x: torch.masked_select(x, x > 1),
    "boolean index": lambda x: x[x > 1],
    "boolean index_put": lambda x: x.clone().index_put_((x > 1,), x[:2]),
    "boolean assignment": lambda x: x.__setitem__(x > 1, x[:2] + 1),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long()),
    "bincount": lambda x: torch.bincount(x.long()),
}

SYNCHRONISING: dict[str, Callable[[Tensor], Any]] = {
    "eigh": lambda x: torch.linalg.eigh(x.diag() + 1),
    "inv": lambda x: torch.linalg.inv((x + 1).diag()),
    "cholesky": lambda x: torch.linalg.cholesky((x + 1).diag()),
}

REFUSED = {**HOST_READS, **DATA_DEPENDENT, **SYNCHRONISING}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_refuses(session: Session, what: str, mode: Callable[[], Any]) -> None:
    """Host reads, shapes that depend on values and ops that synchronise fail the capture; the next one works."""
    with mode():
        x = session.ramp(4)
        REFUSED[what](x.clone())  # eager code can, and the libraries are loaded by now
        with pytest.raises(CaptureError) as caught:
            session.capture(lambda: REFUSED[what](x.add_(1)))
        assert caught.value.__cause__ is not None
        assert x.tolist() == [0, 1, 2, 3]
        graph, y = session.capture(lambda: x + 1)
        session.replay(graph)
        assert y.tolist() == [1, 2, 3, 4]


def test_refuses_what_the_body_swallows(session: Session) -> None:
    """A capture that went wrong fails although the body caught the error."""
    x = session.ramp(4)

    def body() -> Tensor:
        y = x + 1
        with contextlib.suppress(RuntimeError):
            y[1].item()
        return y

    with pytest.raises(CaptureError):
        session.capture(body)


def test_body_raises(session: Session) -> None:
    """A body that raises fails the capture with its error as cause; storages, random state and the driver are clean."""
    x = session.ramp(4)
    error = KeyError("mine")

    def body() -> None:
        x.add_(torch.rand(4, device=session.device))
        raise error

    before = session.random_state()
    with pytest.raises(CaptureError) as caught:
        session.capture(body)
    assert caught.value.__cause__ is error
    assert "KeyError" in str(caught.value)
    assert x.tolist() == [0, 1, 2, 3]
    assert torch.equal(session.random_state(), before)
    assert not session.driver.is_capturing()

    torch.manual_seed(7)
    expected = x + torch.rand(4, device=session.device)
    torch.manual_seed(7)
    graph, y = session.capture(lambda: x + torch.rand(4, device=session.device))
    session.replay(graph)
    assert torch.equal(y, expected)


def test_earlier_graphs_survive_a_failure(session: Session) -> None:
    """A capture that fails leaves the graphs captured before it usable."""
    x = session.ramp(4)
    graph, y = session.capture(lambda: x + torch.zeros_like(x).bernoulli_())
    with pytest.raises(CaptureError):
        session.capture(lambda: (y * 2).tolist())
    torch.manual_seed(2)
    session.replay(graph)
    torch.manual_seed(2)
    assert torch.equal(y, x + torch.zeros_like(x).bernoulli_())


def test_refuses_a_capture_inside(session: Session) -> None:
    """A capture begun by the body of another fails both."""
    with pytest.raises(CaptureError):
        session.capture(lambda: session.driver.capture(lambda: None))
    x = session.ramp(2)
    graph, y = session.capture(lambda: x + 1)
    session.replay(graph)
    assert y.tolist() == [1, 2]


# --- ops implemented in Python ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_python_of_a_custom_op(session: Session, mode: Callable[[], Any]) -> None:
    """The Python of a custom op runs at capture and not at replay; its ATen ops run at replay."""
    with mode():
        x, total = session.ramp(3), torch.zeros(3, device=session.device)
        Calls.python_op = Calls.writing_op = 0

        def body() -> Tensor:
            y = python_op(x)
            writing_op(y, total)
            return y

        graph, y = session.capture(body)
        assert (Calls.python_op, Calls.writing_op) == (1, 1)
        assert total.tolist() == [0, 0, 0]
        session.replay(graph)
        assert (y.tolist(), total.tolist()) == ([19, 22, 25], [19, 22, 25])
        x.fill_(1)
        session.replay(graph)
        assert (y.tolist(), total.tolist()) == ([22, 22, 22], [41, 44, 47])
        assert (Calls.python_op, Calls.writing_op) == (1, 1)


def test_python_in_the_dispatcher(session: Session) -> None:
    """An op made with ``Library.define`` and ``impl`` is captured as the ops that it calls."""
    x = session.ramp(3)
    expected = torch.ops.driver_contract.plain_op(x)
    graph, y = session.capture(lambda: torch.ops.driver_contract.plain_op(x))
    session.replay(graph)
    assert torch.equal(y, expected)


# --- lifetimes --------------------------------------------------------------------------------------------------------


def capture_sum(session: Session, x: Tensor, total: Tensor, layer: nn.Module) -> tuple[CapturedGraph, Tensor]:
    """Apart from the test, so that no frame of it holds the tensors."""
    return session.capture(lambda: (total.add_(layer(x)), x.view(-1)[1:] + 1)[1])


def test_outside_memory_is_not_owned(session: Session) -> None:
    """A graph keeps no tensor alive that it did not make: neither input, nor written tensor, nor parameter."""
    x, total, layer = session.ramp(3), session.ramp(3), nn.Linear(3, 3).to(session.device)
    outside = [x, total, layer.weight, layer.bias]
    layer(x)

    graph, y = capture_sum(session, x, total, layer)
    session.replay(graph)
    storages = [_torch.StorageWeakRef(t.untyped_storage()) for t in outside]
    tensors = [weakref.ref(t) for t in outside]
    del x, total, layer, outside
    gc.collect()
    assert [ref() for ref in tensors] == [None] * 4
    assert all(storage.expired() for storage in storages)
    assert y.tolist() == [2, 3]


def test_inside_memory_is_owned(session: Session) -> None:
    """Memory made inside lives as long as its graph: a result that the caller dropped is still written and read."""
    x = session.ramp(3)
    results = []
    first, _ = session.capture(lambda: results.append(x * 2))
    second, z = session.capture(lambda: results.pop() + 1)
    gc.collect()
    session.replay(first, second)
    assert z.tolist() == [1, 3, 5]


def test_lent_memory_is_somebodys(driver: CaptureDriver) -> None:
    """What is lent is not given to later segments while somebody holds it."""
    session = Session(driver)
    x = session.ramp(1024)
    first, made = session.capture(lambda: x + 1)
    owner = driver.lend(made)
    del made
    second, _ = session.capture(lambda: (x * 7).sin() * 2)
    session.replay(first, second)
    assert torch.equal(owner, x + 1)
    del owner
    driver.release([first, second])


def test_memory_between_captures(driver: CaptureDriver) -> None:
    """What is allocated in the pool between two captures is memory that segments read at its address, held or not."""
    session = Session(driver)
    stream = driver.begin()
    with driver.lock, driver.recording():
        with driver.allocating():
            made = torch.empty(1024, device=session.device)
        owner = driver.lend(made)
        del made
        place = non_owning(owner)
        place.fill_(3)
        graph, result = driver.capture(functools.partial(torch.mul, owner, 2))
        del owner
        gc.collect()
        place.fill_(4)
        graph.replay(stream)
        assert torch.equal(result, torch.full_like(result, 8))
    driver.end(stream)
    del result
    driver.release([graph])


def test_a_recording_apart(driver: CaptureDriver) -> None:
    """What is held of a recording apart keeps its values while graphs are replayed that were captured before and behind it."""
    session = Session(driver)
    x = session.ramp(1024)
    stream = driver.begin()
    graphs = []

    def capture(apart: bool, body: Callable[[], torch.Tensor]) -> torch.Tensor:
        with driver.lock, driver.recording(apart=apart):
            graph, result = driver.capture(body)
            graphs.append(graph)
            return driver.lend(result)

    before = capture(False, lambda: (x + 1).sin() * 2)
    del before
    held = capture(True, lambda: (x * 3).cos() + 1)
    behind = capture(False, lambda: (x - 1).exp() / 3)
    del behind
    gc.collect()
    for graph in (graphs[1], graphs[0], graphs[2], graphs[0]):
        graph.replay(stream)
    driver.end(stream)
    assert torch.equal(held, (x * 3).cos() + 1)
    del held
    driver.release(graphs)


def test_release_frees(driver: CaptureDriver) -> None:
    """Released graphs give back what they made: no live block is left."""
    session = Session(driver)
    x = session.ramp(1024)
    results = []
    first, _ = session.capture(lambda: results.append((x * 2).relu_() + 1))
    second, _ = session.capture(lambda: results.append(results[0].sum()))
    session.replay(first, second)
    assert driver.live_blocks() > 0
    assert driver.pool_bytes() >= results[0].nbytes
    results.clear()
    driver.release([first, second])
    gc.collect()
    assert driver.live_blocks() == 0


def test_release_in_the_middle_of_a_recording(driver: CaptureDriver) -> None:
    """What an eager step releases, be it the last graph, leaves the recording that is under way what it needs."""
    session = Session(driver)
    x = session.ramp(8)
    older, _ = session.capture(lambda: x + 1)
    with driver.lock:
        stream = driver.begin()
        try:
            with driver.recording():
                driver.release([older])
                graph, result = driver.capture(lambda: x * 2)
                graph.replay(stream)
        finally:
            driver.end(stream)
    assert torch.equal(result, x * 2)
    del result
    driver.release([graph])


def test_recording_holds_off_the_collector(driver: CaptureDriver) -> None:
    """Python's cycle collector does not run by itself during a recording, and as before after it, also if that raised."""
    assert collections() > 0
    with driver.lock, driver.recording():
        assert collections() == 0
    assert collections() > 0
    with driver.lock, pytest.raises(KeyError), driver.recording():
        raise KeyError
    assert collections() > 0


def test_recordings_in_two_threads_hold_off_the_collector(driver: CaptureDriver) -> None:
    """The collector runs again when the last recording of all threads ends, in whatever order they began."""
    other = TapeDriver(torch.device("cpu"))
    begun, over = threading.Event(), threading.Event()

    def record() -> None:
        with other.lock, other.recording():
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=record)
    try:
        with driver.lock, driver.recording():
            thread.start()
            assert begun.wait(60)
        assert collections() == 0
    finally:
        over.set()
        thread.join()
    assert collections() > 0


def test_recording_respects_who_disables_the_collector(driver: CaptureDriver) -> None:
    """What code enables, disables or sets of the collector while a recording is under way stays; none runs meanwhile."""
    threshold = gc.get_threshold()
    try:
        with driver.lock, driver.recording():
            gc.disable()
        assert not gc.isenabled()
        with driver.lock, driver.recording():
            gc.enable()
            assert collections() == 0
        assert gc.isenabled() and gc.get_threshold() == threshold
        with driver.lock, driver.recording():
            gc.set_threshold(50_000)
        assert gc.get_threshold()[0] == 50_000
    finally:
        gc.enable()
        gc.set_threshold(*threshold)


def collections() -> int:
    """How often Python's cycle collector runs while many containers are made."""
    runs: list[str] = []

    def ran(phase: str, _: object) -> None:
        runs.append(phase)

    gc.callbacks.append(ran)
    try:
        kept = [[number] for number in range(20_000)]
    finally:
        gc.callbacks.remove(ran)
    del kept
    return runs.count("start")


# --- the tape driver alone --------------------------------------------------------------------------------------------


@pytest.fixture
def tape() -> Iterator[Session]:
    """A session of a tape driver."""
    with torch.no_grad():
        yield Session(TapeDriver(torch.device("cpu")))


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_poison_is_not_a_number(tape: Session, dtype: torch.dtype) -> None:
    """What a capture made holds NaN until the first replay."""
    x = tape.ramp(5).to(dtype)
    graph, (y, view) = tape.capture(lambda: ((z := x + 1), z[2:]))
    assert y.isnan().all()
    assert view.isnan().all()
    tape.replay(graph)
    assert torch.equal(y, x + 1)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_poison_of_integers(tape: Session, dtype: torch.dtype) -> None:
    """Integers hold the largest of their dtype, which is odd, and which no index survives."""
    x = tape.ramp(5).to(dtype)
    _, y = tape.capture(lambda: x + 1)
    assert y.tolist() == [torch.iinfo(dtype).max] * 5


def test_poison_of_booleans(tape: Session) -> None:
    """Booleans hold True."""
    x = tape.ramp(2)
    _, y = tape.capture(lambda: x > 5)
    assert y.tolist() == [True, True]


def test_freed_memory_is_not_read(tape: Session) -> None:
    """A replay that would read memory from outside that was freed raises, and says which."""
    x = tape.ramp(2, 3)
    outside = [x]
    graph, _ = tape.capture(lambda: outside[0].t() + 1)
    outside.clear()
    del x
    with pytest.raises(ReplayError, match=r"the float32\[3, 2\] tensor that aten\.add\.Tensor takes was freed"):
        tape.replay(graph)


def test_memory_of_a_released_graph_is_not_read(tape: Session) -> None:
    """A graph that reads what another made cannot be replayed once that one was released."""
    x = tape.ramp(3)
    results = []
    first, _ = tape.capture(lambda: results.append(x + 1))
    second, _ = tape.capture(lambda: results.pop() + 1)
    tape.driver.release([first])
    with pytest.raises(ReplayError, match="was freed"):
        tape.replay(second)


def test_moved_memory_is_not_read(tape: Session) -> None:
    """A replay that would read memory from outside that was given other memory raises."""
    x = tape.ramp(2, 3)
    graph, _ = tape.capture(lambda: x + 1)
    x.untyped_storage().resize_(1 << 20)
    with pytest.raises(ReplayError, match="was moved after the capture"):
        tape.replay(graph)


def test_released_graph_refuses(tape: Session) -> None:
    """A released graph is not replayed."""
    x = tape.ramp(3)
    graph, _ = tape.capture(lambda: x + 1)
    tape.driver.release([graph])
    with pytest.raises(ReplayError, match="replayed after its release"):
        tape.replay(graph)


def test_num_kernels(tape: Session) -> None:
    """Ops that launch are counted, views and allocations are not."""
    x = tape.ramp(2, 3)

    def body() -> Tensor:
        y = torch.empty_like(x).copy_(x)
        return (y.t().contiguous()[0] * 2).view(-1).unsqueeze_(0)

    graph, _ = tape.capture(body)
    assert graph.num_kernels == 3  # copy_, contiguous, mul
    views, _ = tape.capture(lambda: x.t()[0].view(-1))
    assert views.num_kernels == 0


EMPTY = torch.empty(0)


def test_tells_its_kernels(session: Session) -> None:
    """A graph names what it launches, in order, and as many as it counts; released, it has nothing to tell."""
    x = session.ramp(4)
    graph, _ = session.capture(lambda: (x + 1).exp())
    add, exp = graph.kernels()
    assert "add" in add.lower() and "exp" in exp.lower()
    assert graph.num_kernels == 2
    assert graph.kernels() == (add, exp)
    session.replay(graph)
    session.driver.release([graph])
    session.graphs.clear()
    assert graph.kernels() == ()


def test_draws_itself(session: Session) -> None:
    """The picture of a graph is in the DOT language and has what it launches."""
    x = session.ramp(4)
    graph, _ = session.capture(lambda: (x + 1).exp())
    picture = graph.dot()
    assert re.match(r"(strict )?digraph \S+ *\{", picture)
    assert all(name in picture for name in (("Self_add", "exp_kernel") if x.is_cuda else graph.kernels()))
    assert picture.rstrip().endswith("}")
    session.driver.release([graph])
    session.graphs.clear()
    assert re.match(r"digraph \w+ *\{", graph.dot())


def test_executables_are_counted(session: Session) -> None:
    """What graphs take beside the pool is never below nothing, and is nothing once they are released."""
    x = session.ramp(4)
    for _ in range(64):
        session.capture(lambda: x + 1)
    assert session.driver.executable_bytes() >= 0
    session.driver.release(session.graphs)
    session.graphs.clear()
    assert session.driver.executable_bytes() == 0


TAPE_REFUSES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "another device": (lambda x: x.to("meta"), r"aten\._to_copy\.default moves data between cpu and meta"),
    "boolean write": (lambda x: x.__setitem__(x > 1, x[0]), r"aten\.index_put_\.default makes a shape that depends on"),
    "resize_": (lambda x: x.resize_(8), r"aten\.resize_\.default gives other memory to a tensor from outside"),
    "out= that resizes": (
        lambda x: torch.add(x, 1, out=EMPTY),
        r"aten\.add\.out gives other memory to a tensor",
    ),
    "set_": (lambda x: x.set_(x.clone().untyped_storage()), r"aten\.set_\.\w+ gives other memory to a tensor"),
    "own generator": (
        lambda x: torch.rand(2, generator=torch.Generator()),
        r"aten\.rand\.generator draws from a generator that is not the device's default one",
    ),
    "seed": (lambda x: (torch.manual_seed(1), x + 1), "the body set the state of the random generator"),
    "numpy": (lambda x: x.numpy(), r"Tensor\.numpy reads values on the host"),
    "sparse": (lambda x: x.to_sparse(), "a shape that depends on values|a tensor without strides"),
    "cond": (
        lambda x: torch.ops.higher_order.cond(x[0] > 0, lambda x: (x + 1,), lambda x: (x - 1,), (x,)),
        "the higher-order op cond may choose by values on the host",
    ),
    "ctc_loss": (
        lambda x: nn.functional.ctc_loss(x.reshape(4, 1, 1).expand(4, 1, 2), x[None, 1:2].long(), (4,), (1,)),
        r"aten\._ctc_loss\.\w+ waits for the device",
    ),
}


@pytest.mark.parametrize("what", TAPE_REFUSES)
def test_tape_refuses(tape: Session, what: str) -> None:
    """What a capture on a GPU refuses, or what the tape cannot undo, is refused by its name."""
    run, message = TAPE_REFUSES[what]
    x = tape.ramp(4)
    address = x.data_ptr()
    with pytest.raises(CaptureError, match=message) as caught:
        tape.capture(lambda: run(x.mul_(2)))
    assert "test_driver_contract.py" in caught.value.where
    assert "run it eagerly" in caught.value.fix or "run eagerly" in caught.value.fix
    assert x.tolist() == [0, 1, 2, 3] or what == "set_"
    assert x.data_ptr() == address or what == "set_"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(tape: Session, error: type[BaseException]) -> None:
    """An interrupt goes through a capture as it is, which is undone."""
    x = tape.ramp(4)

    def body() -> None:
        x.add_(1)
        raise error

    with pytest.raises(error):
        tape.capture(body)
    assert x.tolist() == [0, 1, 2, 3]
    assert not TapeDriver(torch.device("cpu")).is_capturing()


def test_foreign_capture(tape: Session) -> None:
    """A capture of another tape driver is foreign, in its own thread only."""
    other = TapeDriver(torch.device("cpu"))
    seen = []

    def body() -> None:
        seen.append(other.is_capturing())
        thread = threading.Thread(target=lambda: seen.append(other.is_capturing()))
        thread.start()
        thread.join()

    tape.capture(body)
    assert seen == [True, False]
    tape.capture(lambda: seen.append(tape.driver.is_capturing()))
    assert seen == [True, False, False]


def test_other_threads_are_not_taped(tape: Session) -> None:
    """What another thread does during a capture happens at once, and is not replayed."""
    x, y = tape.ramp(3), tape.ramp(3)

    def body() -> None:
        thread = threading.Thread(target=lambda: y.add_(1))
        thread.start()
        thread.join()
        x.add_(1)

    graph, _ = tape.capture(body)
    assert (x.tolist(), y.tolist()) == ([0, 1, 2], [1, 2, 3])
    tape.replay(graph)
    assert (x.tolist(), y.tolist()) == ([1, 2, 3], [1, 2, 3])


def test_what_nobody_holds_is_overwritten(tape: Session) -> None:
    """A segment may get memory that nobody held any more when it was captured: its replay overwrites that."""
    x = tape.ramp(4)
    first, made = tape.capture(lambda: x + 1)
    owner = tape.driver.lend(made)
    del made
    place = non_owning(owner)
    between, _ = tape.capture(lambda: x * 2)
    del owner
    after, _ = tape.capture(lambda: x * 3)
    tape.replay(first, between)
    assert torch.equal(place, x + 1)
    tape.replay(after)
    assert place.isnan().all()
    tape.replay(first)
    assert torch.equal(place, x + 1)


def test_memory_between_captures_is_the_next_graphs(tape: Session) -> None:
    """What was allocated between captures is there as long as the graph that was captured next, held or not."""
    made = torch.zeros(4)
    memory = _torch.StorageWeakRef(made.untyped_storage())
    owner = tape.driver.lend(made)
    del made
    graph, _ = tape.capture(functools.partial(torch.mul, owner, 2))
    del owner
    gc.collect()
    assert _torch.live_storage(memory) is not None
    tape.driver.release([graph])
    assert _torch.live_storage(memory) is None


def test_dropped_graphs_free(tape: Session) -> None:
    """A graph that nobody holds frees what it made, without a release."""
    x = tape.ramp(8)
    graph, y = tape.capture(lambda: x + 1)
    assert (tape.driver.live_blocks(), tape.driver.pool_bytes()) == (1, y.nbytes)
    tape.graphs.clear()
    del graph
    gc.collect()
    assert tape.driver.live_blocks() == 0


def test_backward_is_taped(tape: Session) -> None:
    """A forward with its backward is a segment like any other."""
    w = nn.Parameter(tape.ramp(3))
    x = tape.ramp(3)

    def body() -> Tensor:
        (grad,) = torch.autograd.grad((w * x).pow(2).sum(), w)
        return grad

    with torch.enable_grad():
        graph, grad = tape.capture(body)
    x.fill_(2)
    tape.replay(graph)
    assert torch.equal(grad, 2 * w * x * x)


def test_says_where_the_body_raised(tape: Session) -> None:
    """A failed capture names the innermost line that is the user's own."""

    def body() -> None:
        nn.functional.linear(tape.ramp(3), tape.ramp(2))

    with pytest.raises(CaptureError) as caught:
        tape.capture(body)
    assert "test_driver_contract.py" in caught.value.where
    assert caught.value.where.endswith(" in body: nn.functional.linear(tape.ramp(3), tape.ramp(2))")
    assert caught.value.what.startswith("the captured code raised RuntimeError: ")


def test_effects_without_results(tape: Session) -> None:
    """An op that returns nothing, such as an assertion on the device, runs at each replay."""
    x = torch.ones(())
    graph, _ = tape.capture(lambda: torch.ops.aten._assert_async.msg(x, "x is zero"))
    tape.replay(graph)
    x.zero_()
    with pytest.raises(RuntimeError, match="x is zero"):
        tape.replay(graph)


def test_empty_tensors(tape: Session) -> None:
    """Tensors without elements are captured like others."""
    x = torch.empty(0, 3)
    graph, y = tape.capture(lambda: torch.cat([x + 1, torch.ones(1, 3)]).sum(0))
    tape.replay(graph)
    assert y.tolist() == [1, 1, 1]


class Tagged(Tensor):
    """A subclass that only says so."""


def test_subclasses(tape: Session) -> None:
    """Subclasses without a dispatch of their own are captured like tensors."""
    x = tape.ramp(3).as_subclass(Tagged)
    graph, y = tape.capture(lambda: x + 1)
    tape.replay(graph)
    assert y.tolist() == [1, 2, 3]


def test_conjugates_and_negatives(tape: Session) -> None:
    """Lazy conjugation and negation of what comes from outside or inside are kept."""
    x = torch.randn(3, dtype=torch.complex64)
    graph, (y, z) = tape.capture(lambda: (x.conj() * 2, (x + 1).conj().imag + 1))
    x.copy_(torch.randn(3, dtype=torch.complex64))
    tape.replay(graph)
    assert torch.equal(y, x.conj() * 2)
    assert torch.equal(z, (x + 1).conj().imag + 1)
