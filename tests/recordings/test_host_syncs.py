"""Ops that wait for the host, found in the plain call: nothing runs twice for it, and no capture is tried."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import explain
from breakable_backend.backend import executors_of
from breakable_backend.recordings.repair import Repair
from checks import assert_same, program_of

pytestmark = pytest.mark.usefixtures("no_grad")

runs: Counter[str] = Counter()


@torch.library.custom_op("finding::reads", mutates_args=())
def reads(x: Tensor) -> Tensor:
    """Branches on a value."""
    runs["reads"] += 1
    return x * (2.0 if float(x.sum()) > 0 else 3.0)


@torch.library.custom_op("finding::calls_marked", mutates_args=())
def calls_marked(x: Tensor) -> Tensor:
    """Calls an op that carries a tag."""
    runs["calls_marked"] += 1
    return silly.triple(x) + 1


@torch.library.custom_op("finding::deep", mutates_args=())
def deep(x: Tensor) -> Tensor:
    """Calls an op that branches on a value."""
    runs["deep"] += 1
    return torch.ops.finding.reads(x + 1) + 1


@torch.library.custom_op("finding::sometimes", mutates_args=())
def sometimes(x: Tensor, read: bool) -> Tensor:
    """Reads a value where it is told to."""
    return x * (1.0 + float(x.numel() if not read else x.sum()))


@torch.library.custom_op("finding::writes", mutates_args=("x",))
def writes(x: Tensor) -> None:
    """Writes its argument, by a value of it."""
    runs["writes"] += 1
    x.add_(float(x.sum()))


@torch.library.custom_op("finding::harmless", mutates_args=())
def harmless(x: Tensor) -> Tensor:
    """Another thread reads a value meanwhile; itself it only looks at a number that is on the host anyway."""
    runs["harmless"] += 1
    thread = threading.Thread(target=lambda: x.sum().item() if not silly.capturing() else None)
    thread.start()
    thread.join(60)
    return x * 2


@reads.register_fake
@calls_marked.register_fake
@deep.register_fake
@harmless.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@sometimes.register_fake
def _(x: Tensor, read: bool) -> Tensor:
    return torch.empty_like(x)


@writes.register_fake
def _(x: Tensor) -> None:
    pass


@pytest.fixture(autouse=True)
def no_capture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is found before: no recording has anything to heal."""

    def found(self: Repair, *args: Any) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(Repair, "found", found)
    runs.clear()


def around(function: Any) -> Any:
    """``function`` between ops that are captured."""
    return lambda x: function(x.sin() * 2).cos() + 1


OPS = {"reads": reads, "calls_marked": calls_marked, "deep": deep}
TEXTS = {
    "reads": "calls aten::item, which reads a value on the host",
    "calls_marked": "calls silly::triple, which is tagged cudagraph_unsafe",
    "deep": "calls aten::item, which reads a value on the host",
}
LINES = {
    "reads": "in reads: return x * (2.0",
    "calls_marked": "in calls_marked: return silly.triple(x) + 1",
    "deep": "in reads: return x * (2.0",
}


@pytest.mark.parametrize("name", OPS)
def test_found_in_the_first_call(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Python in an op that waits for the host, or calls a marked op, is seen in call 1; the body runs once in each call."""
    function = around(OPS[name])
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    bodies = []
    for _ in range(5):
        x = torch.randn(8, device=device)
        want, before = function(x), runs[name]
        assert_same(compiled(x), want)
        bodies.append(runs[name] - before)
    assert bodies == [1] * 5
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (2, 1, 3)
    assert program.plain_calls == {"warm-up": 1}
    (reason,) = program.reasons
    assert (reason.op, reason.text.replace("_local_scalar_dense", "item")) == (f"finding::{name}", TEXTS[name])
    assert LINES[name] in reason.source
    assert reason.text.split(",")[0] in str(explain(compiled))


def test_what_writes(device: torch.device, options: dict[str, Any]) -> None:
    """An op that writes is found too, and has written once."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() * 2
        writes(y)
        return y.cos() + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.randn(8, device=device)
        assert_same(compiled(x), f(x))
    assert (program_of(compiled).num_graph_segments, program_of(compiled).replays) == (2, 3)


def test_another_threads_wait(device: torch.device, options: dict[str, Any]) -> None:
    """A wait of another thread, during an op, is not the op's."""
    compiled = torch.compile(around(harmless), backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.randn(8, device=device)
        assert_same(compiled(x), around(harmless)(x))
    assert (program_of(compiled).num_graph_segments, program_of(compiled).num_eager_segments) == (1, 0)


@torch.library.custom_op("finding::warns", mutates_args=())
def warns(x: Tensor) -> Tensor:
    """Warns of what it reads."""
    warnings.warn(f"{float(x[0]):.1f} is no page", stacklevel=1)
    return x * float(x.sum())


warns.register_fake(torch.empty_like)


def test_warnings_of_an_op_are_the_users(device: torch.device, options: dict[str, Any]) -> None:
    """While an op is watched its warnings reach the user as ever, and no filter and no mode of the process is changed."""
    compiled = torch.compile(around(warns), backend="breakable_cg", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters), torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        for number in range(1, 6):
            compiled(torch.full((8,), float(number), device=device))
            told = [str(warning.message) for warning in caught if "is no page" in str(warning.message)]
            assert len(told) == number
        assert before == (list(warnings.filters), torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0)
    assert program_of(compiled).num_eager_segments == 1


def test_known_in_every_place(device: torch.device, options: dict[str, Any]) -> None:
    """An op that waits in one place is eager in every place of the program."""

    def f(x: Tensor) -> Tensor:
        y = sometimes(x.sin() * 2, False)
        return sometimes(y.cos() + 1, True).sin() + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    for _ in range(4):
        x = torch.randn(8, device=device)
        assert_same(compiled(x), f(x))
    assert (program_of(compiled).num_graph_segments, program_of(compiled).num_eager_segments) == (3, 2)


def test_a_later_key(device: torch.device, options: dict[str, Any]) -> None:
    """An op that waits only for some sizes is found in the plain call of that key; what was recorded before stays."""

    @torch.library.custom_op("finding::long", mutates_args=())
    def long(x: Tensor) -> Tensor:
        return x * (2.0 if x.numel() < 5 or float(x.sum()) > 0 else 3.0)

    long.register_fake(torch.empty_like)
    compiled = torch.compile(around(long), backend="breakable_cg", options=options, dynamic=True)
    for size in (4, 4, 4, 6, 6, 6, 4, 4):
        x = torch.randn(size, device=device)
        assert_same(compiled(x), around(long)(x))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert [recording.num_graphs for recording in program.recordings] == [1, 2]
    assert program.replays == 4


def test_an_error_of_the_op(device: torch.device, options: dict[str, Any]) -> None:
    """What an op raises while it is watched reaches the caller, and the next call is right."""
    compiled = torch.compile(lambda x: silly.fragile(x.sin() * 2).cos() + 1, backend="breakable_cg", options=options)
    x = torch.randn(8, device=device)

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    silly.hooks["fragile"] = fail
    try:
        with pytest.raises(KeyError, match="mine"):
            compiled(x)
    finally:
        silly.hooks.clear()
    assert_same(compiled(x), compiled(x))
    assert not any(executor.driver.busy for executor in executors_of(compiled))


@torch.library.custom_op("finding::views", mutates_args=())
def views(x: Tensor, weight: Tensor) -> Tensor:
    """Makes views in every way that reaches a mode as one op."""
    first, second = weight.chunk(2)
    return (x @ weight.t() + weight.narrow(0, 0, 1)) * first[0] + second.reshape(-1)[:4] + weight.movedim(0, 1)[0]


views.register_fake(lambda x, weight: torch.empty_like(x))


@pytest.mark.parametrize("learns", [False, True])
def test_views_in_the_body_of_an_op(learns: bool, device: torch.device, options: dict[str, Any]) -> None:
    """An op whose Python makes views, also of a parameter, runs as in eager while it is watched."""
    weight = torch.rand(4, 4, device=device, requires_grad=learns)
    compiled = torch.compile(lambda x: views(x.sin(), weight).cos() + 1, backend="breakable_cg", options=options)
    for _ in range(4):
        x = torch.rand(3, 4, device=device)
        assert_same(compiled(x), views(x.sin(), weight).cos() + 1)
