"""Compare mode: what is right passes, with everything done exactly once; each known cause is named when it is planted."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import BreakableCUDAGraph, DivergenceError, ReplayError, _torch, capture, eager_on_graph, reset
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import executors_of
from breakable_backend.errors import CAUSES
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.recording import GraphStep, Recording
from breakable_backend.tools.compare import Checker, ComparedSegment, Maker, Wrong
from breakable_backend.tools.difference import difference
from checks import check, entries_of
from silly import aliasing, mutating

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def compared(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "debug": "compare", "min_kernels": 1}


@pytest.fixture(autouse=True)
def clean_silly() -> Iterator[None]:
    yield
    silly.hooks.clear()
    silly.watched.clear()
    stored.clear()


# --- ops for this file ----------------------------------------------------------------------------------------------------

stored: dict[str, Any] = {}
"""What hostile ops keep between calls."""


@torch.library.custom_op("comparing::scale", mutates_args=())
def scale(x: Tensor) -> Tensor:
    """``x`` times ``stored["factor"]``: captured, so that the factor is frozen."""
    return x * stored.get("factor", 2.0)


@torch.library.custom_op("comparing::branch", mutates_args=())
def branch(x: Tensor) -> Tensor:
    """The sine of ``x``, or its cosine."""
    return x.cos() if stored.get("factor") else x.sin()


@torch.library.custom_op("comparing::peek", mutates_args=())
def peek(x: Tensor) -> Tensor:
    """``x`` plus a tensor that no graph knows of."""
    return x + silly.watched[0]


@torch.library.custom_op("comparing::previous", mutates_args=())
def previous(x: Tensor) -> Tensor:
    """``x`` plus the argument of the call before; captured."""
    arguments = stored.setdefault("arguments", [x])
    arguments.append(x)
    return x + arguments[-2]


@torch.library.custom_op("comparing::scratch", mutates_args=())
def scratch(x: Tensor) -> Tensor:
    """``2 x``, through a buffer that is made anew when ``stored["clear"]`` is set; captured."""
    if stored.pop("clear", False) or "buffer" not in stored:
        stored["old"], stored["buffer"] = stored.get("buffer"), torch.zeros_like(x)
    stored["buffer"].add_(x)
    return stored["buffer"] * 2


@torch.library.custom_op("comparing::reuse", mutates_args=(), tags=silly.UNSAFE)
def reuse(x: Tensor) -> Tensor:
    """``2 x`` in one and the same buffer at each call."""
    if "buffer" not in stored:
        stored["buffer"] = torch.empty_like(x)
    return torch.mul(x, 2, out=stored["buffer"])


@torch.library.custom_op("comparing::sneaky", mutates_args=(), tags=silly.UNSAFE)
def sneaky(x: Tensor) -> Tensor:
    """Writes its argument without a word."""
    x.add_(1)
    return x.clone()


@scale.register_fake
@branch.register_fake
@peek.register_fake
@previous.register_fake
@scratch.register_fake
@reuse.register_fake
@sneaky.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


# --- what is right passes -------------------------------------------------------------------------------------------------


def drawing(x: Tensor) -> Tensor:
    return silly.noise(x + torch.rand_like(x)) + torch.rand_like(x)


def several(x: Tensor) -> Tensor:
    a, b, c = silly.three(x.view(2, 2) + 1)
    a.mul_(2)
    return torch.where(c, a + b, a).sin()


def written_by_both(x: Tensor) -> Tensor:
    y = silly.triple(x + 1)
    z = y * 2
    silly.add_into(y, z)
    return y + z


def fresh_cache(x: Tensor) -> Tensor:
    y = torch.empty(6, device=x.device)
    y[:4] = x + 1
    return silly.triple(y[:4]) * 2


MODELS: dict[str, Any] = {f.__name__: f for f in (drawing, aliasing, several, written_by_both, fresh_cache)} | {
    "Silly": silly.Silly(),
    "Block": silly.Block(4),
    "Counting": silly.Counting(4),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(device: torch.device, compared: dict[str, Any], name: str) -> None:
    """Results, mutations, random draws and counts of calls are those of eager, and nothing is found to complain about."""
    model = MODELS[name]
    model = model.to(device) if isinstance(model, nn.Module) else model
    check(model, lambda number: (torch.randn(4, device=device),), device=device, options=compared)


def test_mutated_input(device: torch.device, compared: dict[str, Any]) -> None:
    """An input that segments write is written once, at its place."""
    compiled = torch.compile(mutating, backend="breakable_cg", options=compared)
    mine = torch.empty(4, device=device)
    with torch.no_grad():
        for number in range(5):
            theirs = mine.fill_(number / 3).clone()
            assert torch.equal(compiled(mine), mutating(theirs))
            assert torch.equal(mine, theirs)


def test_each_replay_is_compared(
    device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each segment of each replay is; no segment without the mode."""
    launched: list[int] = []
    replay = ComparedSegment.replay
    monkeypatch.setattr(
        ComparedSegment, "replay", lambda self, stream: (launched.append(self.position), replay(self, stream))[1]
    )
    for options, steps in ((compared, [0, 2] * 3), ({**compared, "debug": None}, [])):
        launched.clear()
        torch.compiler.reset()
        run(torch.compile(aliasing, backend="breakable_cg", options=options), device, 5)
        assert launched == steps


def test_nothing_of_a_call_is_held(device: torch.device, compared: dict[str, Any]) -> None:
    """Arguments and results go with their call, whether it went well or not; all else goes with the recording."""
    compiled = torch.compile(lambda x: silly.fragile(x.sin() + 1) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    (executor,) = executors_of(compiled)
    x = torch.ones(4, device=device)
    argument, result = weakref.ref(x), weakref.ref(compiled(x))
    silly.hooks["fragile"] = lambda: 1 / 0
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        compiled(x)
    del x
    gc.collect()
    assert argument() is None
    assert result() is None
    reset(compiled)
    assert executor.driver.live_blocks() == 0


def test_environment(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """``BREAKABLE_CG_DEBUG=compare`` turns it on, with ``BREAKABLE_CG_TOLERANCE`` beside it."""
    monkeypatch.setenv("BREAKABLE_CG_DEBUG", "compare")
    monkeypatch.setenv("BREAKABLE_CG_TOLERANCE", "1e-3,1e-5")
    monkeypatch.setenv("BREAKABLE_CG_DRIVER", "cuda" if device.type == "cuda" else "tape")
    compiled = torch.compile(aliasing, backend="breakable_cg")
    run(compiled, device, 3)
    (executor,) = executors_of(compiled)
    assert (executor.options.debug, executor.options.tolerance) == ("compare", (1e-3, 1e-5))


# --- helpers for what is wrong --------------------------------------------------------------------------------------------


def run(function: Callable[..., Any], device: torch.device, calls: int = 1, first: int = 0) -> Any:
    """Call with new values at a new address; returns the last result."""
    with torch.no_grad():
        for number in range(first, first + calls):
            result = function(torch.arange(4.0, device=device) + number)
    return result


def diverges(function: Callable[..., Any], device: torch.device, cause: str, call: int = 3) -> DivergenceError:
    """The error of the next call, which is to name ``cause``."""
    with pytest.raises(DivergenceError) as caught:
        run(function, device, first=call - 1)
    error = caught.value
    assert error.cause == cause, str(error)
    assert error.fix == CAUSES[cause]
    assert f"looks like {cause}" in error.what
    return error


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Recording], Recording]) -> None:
    """Have the replays of what is recorded from now on go wrong."""
    right = Checker.recording.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Checker, "recording", property(lambda self: change(right(self))))


def without_copies(which: str) -> Callable[[Recording], Recording]:
    def change(recording: Recording) -> Recording:
        steps = [
            dataclasses.replace(step, **{which: ()}) if isinstance(step, GraphStep) else step
            for step in recording.steps
        ]
        return dataclasses.replace(recording, steps=tuple(steps))

    return change


def behind(monkeypatch: pytest.MonkeyPatch, then: Callable[[Recording], Any], position: int = 0) -> None:
    """Have ``then`` happen after each launch of the step at ``position``."""
    look = ComparedSegment._first_wrong

    def looked(self: ComparedSegment, ran: Any) -> Any:
        if self.position == position:
            then(self.checker.recorded)
        return look(self, ran)

    monkeypatch.setattr(ComparedSegment, "_first_wrong", looked)


def in_steps(x: Tensor) -> Tensor:
    y = x.sin() + 1
    z = silly.triple(y)
    return z.cos() * 2


# --- the causes -----------------------------------------------------------------------------------------------------------


def test_stale_bridge(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that is left out: the error has the first wrong op, its line, and how far off it is."""
    with monkeypatch.context() as patch:
        plant(patch, without_copies("loads"))
        compiled = torch.compile(in_steps, backend="breakable_cg", options=compared)
        run(compiled, device, 2)
    error = diverges(compiled, device, "stale bridge")
    assert (error.step, error.kind, error.op) == (0, "captured", "aten::sin")
    assert "in in_steps: y = x.sin() + 1" in error.where
    assert error.value == "the bridge of x"
    assert (error.difference.count, error.difference.total, error.difference.first) == (4, 4, (0,))
    assert (error.difference.max_abs, error.difference.got, error.difference.want) == (1.0, "1.0", "2.0")


def test_stale_bridge_by_a_write_that_is_not_declared(device: torch.device, compared: dict[str, Any]) -> None:
    """The error says which op wrote the value."""

    def twice(x: Tensor) -> Tensor:
        y = x.relu() + 1
        z = sneaky(x)
        return x * 2 + y + z

    compiled = torch.compile(twice, backend="breakable_cg", options=compared)
    with torch.no_grad():
        compiled(torch.ones(4, device=device))
        compiled(torch.ones(4, device=device))
    error = diverges(compiled, device, "stale bridge")
    assert error.step == 2
    assert "comparing::sneaky" in error.what
    assert "z = sneaky(x)" in error.what
    assert "x * 2" in error.where


def test_copy_back_left_out(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that captured segments write by way of a bridge has to be written in the end."""
    plant(monkeypatch, without_copies("stores"))
    compiled = torch.compile(mutating, backend="breakable_cg", options=compared)
    kept = [torch.ones(4, device=device) for _ in range(9)]
    with torch.no_grad(), pytest.raises(DivergenceError, match="did not come to the tensor") as caught:
        for x in kept:
            compiled(x)
    assert caught.value.cause == "stale bridge"


def test_address_moved_of_a_tensor_behind_an_op(device: torch.device, compared: dict[str, Any]) -> None:
    """Captured code reads a tensor that is no argument, and another one has taken its place."""
    old = torch.ones(4, device=device)
    silly.watched[:] = [old]
    compiled = torch.compile(lambda x: peek(x + 1) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    silly.watched[:] = [torch.full((4,), 5.0, device=device)]
    error = diverges(compiled, device, "address moved", call=4)
    assert error.op == "comparing::peek"
    assert "lambda x: peek(x + 1) * 2" in error.where
    silly.watched[:] = [old]
    assert torch.equal(run(compiled, device, first=4), (torch.arange(4.0, device=device) + 4 + 1 + 1) * 2)


def test_address_moved_of_a_static_input(device: torch.device, compared: dict[str, Any]) -> None:
    """A parameter whose storage was swapped under the recording."""
    model = nn.Linear(4, 4).to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    (executor,) = executors_of(compiled)
    (addresses,) = executor.keys.sets
    executor.reader.read = lambda args, read=executor.reader.read: read(args)._replace(addresses=addresses)  # type: ignore[assignment, misc]
    model.weight.data = model.weight.data.clone()
    error = diverges(compiled, device, "address moved", call=4)
    assert error.kind == "captured"


@pytest.mark.parametrize("op", [scale, branch], ids=lambda op: op._qualname)
def test_frozen_scalar(device: torch.device, compared: dict[str, Any], op: Any) -> None:
    """A number of Python's, or the path that it chose, is another now than when it was captured."""
    compiled = torch.compile(lambda x: op(x + 1).tanh(), backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    stored["factor"] = 3.0
    error = diverges(compiled, device, "frozen scalar", call=4)
    assert error.op == op._qualname
    assert "lambda x: op(x + 1).tanh()" in error.where
    if op is scale:
        assert "takes 3.0 now, and took 2.0 when it was captured" in error.what
    del stored["factor"]
    run(compiled, device, 2, first=4)


def test_frozen_number_of_the_key(device: torch.device, compared: dict[str, Any]) -> None:
    """An int that is part of the key, and that a fault has left out of it."""
    compiled = torch.compile(lambda x, n: (x + n) * 2, backend="breakable_cg", options=compared, dynamic=True)
    x = torch.ones(4, device=device)
    with torch.no_grad():
        for _ in range(3):
            compiled(x, 5)
        (executor,) = executors_of(compiled)
        key = next(entries_of(executor)).key
        executor.reader.read = lambda args: key  # type: ignore[assignment, misc]
        with pytest.raises(DivergenceError, match="takes 7 now, and took 5 when") as caught:
            compiled(x, 7)
    assert (caught.value.cause, caught.value.op) == ("frozen scalar", "aten::add")


@eager_on_graph
def keeps_first(x: Tensor) -> Tensor:
    """``x`` plus the argument of the first call that it was kept from."""
    if stored.get("on"):
        stored.setdefault("kept", x)
    return x + stored.get("kept", x)


def test_marked_function_that_keeps_an_argument(device: torch.device, compared: dict[str, Any]) -> None:
    """A tensor that a marked function stores away is overwritten by a later replay: found when that happens."""
    compiled = torch.compile(lambda x: keeps_first(x + 1) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    stored["on"] = True
    run(compiled, device, 1, first=3)
    error = diverges(compiled, device, "an op that keeps its buffers", call=5)
    assert str(error) == (
        "step 0 (captured): an argument of keeps_first is not as in eager: 4 of 4 elements differ, by at most 1 (relative "
        "0.25); the first at [0] is 5.0 instead of 4.0; this looks like an op that keeps its buffers: keeps_first has kept "
        f"it since an earlier call\n  at {error.where}\n  have it store a clone() of what it gets, and return new memory at each call"
    )
    assert error.where.endswith('lambda x: keeps_first(x + 1) * 2, backend="breakable_cg", options=compared)')
    assert error.op == "keeps_first"
    stored.clear()
    gc.collect()
    assert torch.equal(run(compiled, device, 2, first=5), (torch.arange(4.0, device=device) + 6 + 1) * 4)


def test_argument_kept_while_recording(device: torch.device, compared: dict[str, Any]) -> None:
    """The call that records hands out the same memory, and counts too; a clone is nothing to complain about."""
    compiled = torch.compile(lambda x: keeps_first(x + 1) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 2)
    stored["on"] = True
    run(compiled, device, 1, first=2)
    diverges(compiled, device, "an op that keeps its buffers", call=4)
    stored["kept"] = stored["kept"].clone()
    run(compiled, device, 2, first=4)


def test_function_that_keeps_what_is_its_callers(device: torch.device, compared: dict[str, Any]) -> None:
    """A tensor from outside that a function keeps is the caller's in eager too."""

    @eager_on_graph
    def hold(x: Tensor) -> Tensor:
        stored.setdefault("held", []).append(x)
        return x + 1

    compiled = torch.compile(lambda x: (hold(x) * 2).sin(), backend="breakable_cg", options=compared)
    run(compiled, device, 5)
    assert [float(x[0]) for x in stored["held"][-3:]] == [2.0, 3.0, 4.0]


def test_op_that_returns_one_buffer(device: torch.device, compared: dict[str, Any]) -> None:
    """In eager the second call overwrites what the first returned; a bridge that was loaded between does not show it."""

    def both(x: Tensor) -> Tensor:
        a = reuse(x)
        b = a + 1
        c = reuse(b)
        return a * c + b

    compiled = torch.compile(both, backend="breakable_cg", options=compared)
    run(compiled, device, 2)
    error = diverges(compiled, device, "an op that keeps its buffers")
    assert error.op == "comparing::reuse"
    assert "c = reuse(b)" in error.where


@pytest.mark.parametrize("op", [previous, scratch], ids=lambda op: op._qualname)
def test_captured_op_that_keeps_buffers(device: torch.device, compared: dict[str, Any], op: Any) -> None:
    """An op in a segment that stores its argument, or has a buffer of its own, and takes it at a later call."""
    compiled = torch.compile(lambda x: op(x.sin()) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 2)
    if op is scratch:
        run(compiled, device, 1, first=2)  # eager's sums, so far
        stored["clear"] = True
    error = diverges(compiled, device, "an op that keeps its buffers", call=4)
    assert error.op == op._qualname
    assert "lambda x: op(x.sin()) * 2" in error.where


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_nondeterministic_op(device: torch.device, compared: dict[str, Any]) -> None:
    """Eager, run twice on the same inputs, differs from itself: that op is named, not those behind it."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("erfinv", lambda x: x * 0 + random.random(), device.type.upper())
    try:
        compiled = torch.compile(lambda x: (x.sin().erfinv() + 1).cos(), backend="breakable_cg", options=compared)
        run(compiled, device, 2)
        error = diverges(compiled, device, "a nondeterministic op")
        assert error.op == "aten::erfinv"
        torch.compiler.reset()
        tolerant = {**compared, "tolerance": (0.0, 1.0)}
        run(torch.compile(lambda x: x.sin().erfinv(), backend="breakable_cg", options=tolerant), device, 5)
    finally:
        library._destroy()


@torch.library.custom_op("comparing::beside", mutates_args=())
def beside(x: Tensor) -> Tensor:
    y = x * 2
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.element_size())  # which no driver sees
    return y


beside.register_fake(torch.empty_like)


def test_work_outside_of_the_capture() -> None:
    """A custom op that does a part of its work where no capture has it is named, where all else is right."""
    device = torch.device("cpu")
    options = {"driver": "tape", "debug": "compare", "min_kernels": 1}
    compiled = torch.compile(lambda x: beside(x.sin()).cos(), backend="breakable_cg", options=options)
    run(compiled, device, 2)
    error = diverges(compiled, device, "work outside of the capture")
    assert error.op == "comparing::beside"
    assert "beside(x.sin())" in error.where


@pytest.mark.gpu
def test_race_between_streams() -> None:
    """An eager function that works on a stream of its own, which nothing waits for."""
    side = torch.cuda.Stream()

    @eager_on_graph
    def unjoined(x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(stored.get("cycles", 0))
            result.copy_(x)
            result.add_(1)
        if stored.get("joined", True):
            torch.cuda.current_stream().wait_stream(side)
        return result

    device = torch.device("cuda", 0)
    options = {"debug": "compare", "min_kernels": 1}
    compiled = torch.compile(lambda x: unjoined(x * 2).sin(), backend="breakable_cg", options=options)
    stored["cycles"] = 200_000_000
    run(compiled, device, 3)
    stored["joined"] = False
    error = diverges(compiled, device, "race between streams", call=4)
    assert "unjoined" in error.op
    stored["joined"] = True
    run(compiled, device, 2, first=4)


@pytest.mark.gpu
def test_two_halves_of_an_asynchronous_call() -> None:
    """What one eager function begins on another stream, and the next one waits for, is no race."""
    side = torch.cuda.Stream()

    @eager_on_graph
    def begin(x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            result.copy_(x)
        return result

    @eager_on_graph
    def wait(x: Tensor) -> Tensor:
        torch.cuda.current_stream().wait_stream(side)
        return x + 0

    compiled = torch.compile(
        lambda x: wait(begin(x * 2)).sin(), backend="breakable_cg", options={"debug": "compare", "min_kernels": 1}
    )
    got = run(compiled, torch.device("cuda", 0), 5)
    assert torch.equal(got, ((torch.arange(4.0, device="cuda") + 4) * 2).sin())


@pytest.mark.parametrize("joined", [False, True])
def test_late_values(
    device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    """What decides, with streams made up: a segment that takes an unfinished value, with no eager step in between."""

    def synchronise(self: Checker, call: Any, given: Any, result: Tensor) -> None:
        for key in given:
            self.late.pop(key, None)
        if call.label == "silly::triple":
            apart = difference(result + 1, result)
            assert apart is not None
            self.late[_torch.storage_key(result)] = Wrong("what it made", Maker.of(call), apart)

    monkeypatch.setattr(Checker, "_synchronise", synchronise)

    def body(x: Tensor) -> Tensor:
        y = silly.triple(x.sin())
        return (silly.noise(y) if joined else y) * 2

    compiled = torch.compile(body, backend="breakable_cg", options=compared)
    run(compiled, device, 2)
    if joined:
        run(compiled, device, 1)
    else:
        error = diverges(compiled, device, "race between streams")
        assert (error.step, error.op) == (2, "silly::triple")


def test_unknown(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like none of these says so, with what was ruled out; the next call, without the fault, is right."""
    compiled = torch.compile(in_steps, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    with monkeypatch.context() as patch:
        behind(patch, lambda recording: made(recording, "add").add_(1e-3))
        error = diverges(compiled, device, "unknown", call=4)
    assert error.op == "aten::add"
    assert "y = x.sin() + 1" in error.where
    for cause in CAUSES:
        assert cause in error.what
    got = run(compiled, device, 2, first=4)
    assert torch.equal(got, in_steps(torch.arange(4.0, device=device) + 5))


def made(recording: Recording, name: str) -> Tensor:
    """What a captured segment made."""
    tensor = recording.constants[name]
    assert isinstance(tensor, Tensor)
    return tensor


def test_wrong_mutation(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that a segment writes; it is as before the segment after the error."""
    model = silly.Counting(4).to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    before = model.total.clone()
    with monkeypatch.context() as patch:
        behind(patch, lambda _: model.total.add_(1))
        error = diverges(compiled, device, "unknown", call=4)
    assert "self.total.add_(1)" in error.where
    assert torch.equal(model.total, before)


def test_wrong_place_is_written(
    device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that a segment has no business with is looked at too."""
    compiled = torch.compile(in_steps, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    behind(monkeypatch, lambda recording: made(recording, "add").add_(1), position=2)
    error = diverges(compiled, device, "unknown", call=4)
    assert error.step == 2
    assert "which the segment does not write" in error.what


def test_wrong_draw(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The random generator has to end where eager leaves it."""
    compiled = torch.compile(drawing, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    behind(monkeypatch, lambda _: torch.rand(1, device=device))
    with torch.no_grad(), pytest.raises(DivergenceError, match="the state of the random generator"):
        compiled(torch.ones(4, device=device))


def test_wrong_result(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps agree, and the caller gets something else."""

    def change(recording: Recording) -> Recording:
        calls = [dataclasses.replace(call, function=lambda x: x.clone().add_(1)) for call in recording.epilogue]
        return dataclasses.replace(recording, epilogue=tuple(calls))

    plant(monkeypatch, change)
    compiled = torch.compile(in_steps, backend="breakable_cg", options=compared)
    run(compiled, device, 2)
    error = diverges(compiled, device, "unknown")
    assert (error.step, error.kind) == (-1, "result")
    assert "return z.cos() * 2" in error.where


def test_wrong_number(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A number among the results is looked at too."""
    plant(monkeypatch, lambda recording: dataclasses.replace(recording, returned=(*recording.returned[:-1], 99)))
    compiled = torch.compile(
        lambda x, n: (x[:n].sin() + 1, x.shape[0] * 2 + n), backend="breakable_cg", options=compared, dynamic=True
    )
    x = torch.ones(4, device=device)
    with torch.no_grad(), pytest.raises(DivergenceError, match="is 99 instead of 11"):
        for _ in range(3):
            compiled(x, 3)


@pytest.mark.gpu
def test_frozen_host_scalar() -> None:
    """A 0-d tensor on the host, which kernels take by value, and that a fault has left out of the key."""
    compiled = torch.compile(
        lambda x, s: (x.sin() * s).cos(), backend="breakable_cg", options={"debug": "compare", "min_kernels": 1}
    )
    x = torch.ones(4, device="cuda")
    with torch.no_grad():
        for _ in range(3):
            compiled(x, torch.tensor(2.0))
        (executor,) = executors_of(compiled)
        key = next(entries_of(executor)).key
        executor.reader.read = lambda args: key  # type: ignore[assignment, misc]
        with pytest.raises(DivergenceError, match=r"takes 3\.0 now, and took 2\.0 when") as caught:
            compiled(x, torch.tensor(3.0))
    assert (caught.value.cause, caught.value.op) == ("frozen scalar", "aten::mul")


def test_after_a_divergence(device: torch.device, compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 8: steps that were right stay done, the wrong one did not run, random state is as before it, and it goes on."""
    compiled = torch.compile(drawing, backend="breakable_cg", options=compared)
    x = torch.ones(4, device=device)
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        torch.manual_seed(7)
        with monkeypatch.context() as patch:
            behind(patch, lambda recording: made(recording, "add_1").add_(1), position=2)
            with pytest.raises(DivergenceError):
                compiled(x)
        calls = silly.calls["noise"]
        got = torch.rand(4, device=device)
        torch.manual_seed(7)
        silly.noise(x + torch.rand_like(x))
        assert torch.equal(got, torch.rand(4, device=device))
        assert silly.calls["noise"] == calls + 1
        torch.manual_seed(8)
        got = compiled(x)
        torch.manual_seed(8)
        assert torch.equal(got, drawing(x))
    reset(compiled)


def test_error_of_the_users(device: torch.device, compared: dict[str, Any]) -> None:
    """What an eager function raises comes out as it is."""
    compiled = torch.compile(lambda x: silly.fragile(x.sin() + 1) * 2, backend="breakable_cg", options=compared)
    run(compiled, device, 3)
    error = ValueError("mine")

    def fail() -> None:
        raise error

    silly.hooks["fragile"] = fail
    with pytest.raises(ValueError, match="mine") as caught:
        run(compiled, device)
    assert caught.value is error
    silly.hooks.clear()
    run(compiled, device, 2)


# --- captured by hand ---------------------------------------------------------------------------------------------------


@pytest.fixture
def graph(device: torch.device) -> Iterator[BreakableCUDAGraph]:
    graph = BreakableCUDAGraph(driver="cuda" if device.type == "cuda" else "tape")
    yield graph
    graph.reset()


def test_capture_equals_eager(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """Segments that draw, write what they read and what eager functions made, with results in structures."""

    @eager_on_graph
    def split(x: Tensor) -> dict[str, Any]:
        silly.calls["split"] += 1
        return {"a": x + torch.rand_like(x), "b": [x * 2, x]}

    def body(x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total.add_(x)
        parts = split((x + torch.rand_like(x)).sin())
        parts["a"].mul_(2)
        parts["b"][1].add_(1)
        return parts["a"] + parts["b"][0] + total, parts["b"][1] * 2

    x, total = torch.ones(4, device=device), torch.zeros(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare"):
        results = body(x, total)
    assert graph.debug == "compare"
    for number in range(4):
        theirs, calls = total.clone(), silly.calls["split"]
        x.fill_(number / 3)
        torch.manual_seed(number)
        graph.replay()
        assert silly.calls["split"] == calls + 1
        torch.manual_seed(number)
        with torch.no_grad():
            wanted = body(x, theirs)
        for got, want in zip((*results, total), (*wanted, theirs), strict=True):
            assert torch.equal(got, want)


@dataclasses.dataclass
class Pair:
    """A result that pytree does not know."""

    new: Tensor
    same: Tensor


def test_capture_with_arguments_in_a_result(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """An argument that comes back, in whatever structure, is itself, and is not kept by anybody."""

    @eager_on_graph
    def pair(x: Tensor, y: Tensor) -> Pair:
        return Pair(y * 2, x[1:])

    x, y = torch.ones(4, device=device), torch.ones(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare"):
        inner = x + 1
        result = pair(inner, y)
        total = result.new + result.same.sum()
    assert result.same.untyped_storage().data_ptr() == inner.untyped_storage().data_ptr()
    for number in range(3):
        x.fill_(number)
        graph.replay()
        assert torch.equal(total, y * 2 + 3 * (number + 1))


def test_capture_finds_what_a_segment_makes_wrong(
    device: torch.device, graph: BreakableCUDAGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each replayed segment is compared with its ops, and an error has the user's line."""
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare"):
        y = x.sin() + 1
        z = keeps_first(y) * 2
    graph.replay()
    with monkeypatch.context() as patch:
        behind(patch, lambda _: z.add_(1), position=2)
        with pytest.raises(DivergenceError) as caught:
            graph.replay()
    error = caught.value
    assert (error.cause, error.step, error.kind, error.op) == ("unknown", 2, "captured", "aten::mul")
    assert "z = keeps_first(y) * 2" in error.where
    graph.replay()


def test_capture_with_a_tolerance(
    device: torch.device, graph: BreakableCUDAGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is near enough passes."""
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare", tolerance=(1e-2, 0.0)):
        y = x.sin() + 1
    behind(monkeypatch, lambda _: y.mul_(1.001))
    graph.replay()
    behind(monkeypatch, lambda _: y.mul_(1.1))
    with pytest.raises(DivergenceError, match="4 of 4 elements differ"):
        graph.replay()


def test_capture_with_a_function_that_keeps(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """What a marked function stores away at capture is overwritten by the first replay with other values."""
    x = torch.ones(4, device=device)
    stored["on"] = True
    with torch.no_grad(), capture(graph, debug="compare"):
        y = keeps_first(x + 1) * 2
    graph.replay()  # the same values
    x.fill_(3)
    with pytest.raises(DivergenceError) as caught:
        graph.replay()
    assert caught.value.cause == "an op that keeps its buffers"
    assert "y = keeps_first(x + 1) * 2" in caught.value.where
    stored["kept"] = stored["kept"].clone()
    graph.replay()
    assert torch.equal(y, (x + 1 + stored["kept"]) * 2)


def test_capture_with_a_function_that_returns_one_buffer(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """The bridge of its first result is not what eager code would read behind its second call."""

    @eager_on_graph
    def doubled(x: Tensor) -> Tensor:
        return torch.mul(x, 2, out=stored.setdefault("buffer", torch.empty_like(x)))

    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare"):
        a = doubled(x)
        b = a + 1
        c = doubled(b)
        _ = a * c + b
    with pytest.raises(DivergenceError) as caught:
        graph.replay()
    assert caught.value.cause == "an op that keeps its buffers"
    assert "c = doubled(b)" in caught.value.where


def test_capture_with_a_frozen_number(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """Python inside an op is run again for comparison."""
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph, debug="compare"):
        _ = scale(x + 1) * 2
    graph.replay()
    stored["factor"] = 3.0
    with pytest.raises(DivergenceError) as caught:
        graph.replay()
    assert (caught.value.cause, caught.value.op) == ("frozen scalar", "comparing::scale")


# --- the first replay -----------------------------------------------------------------------------------------------------


def entry_of(compiled: Any) -> Entry:
    (executor,) = executors_of(compiled)
    (entry,) = entries_of(executor)
    return entry


@pytest.mark.parametrize("fault", ["moved", "freed"])
def test_first_replay_looks_at_bridges(device: torch.device, options: dict[str, Any], fault: str) -> None:
    """A bridge that was moved or freed since the recording is found before anything is launched, without any mode."""
    compiled = torch.compile(in_steps, backend="breakable_cg", options=options)
    run(compiled, device, 2)
    recording = entry_of(compiled).recording
    assert recording is not None
    (bridge,) = (value for name, value in recording.constants.items() if name == "x.bridge")
    if fault == "moved":
        bridge.tensor.set_(torch.zeros(4, device=device))
    else:
        bridge.tensor.untyped_storage().resize_(0)
    error = diverges(compiled, device, "address moved")
    fate = "was freed" if fault == "freed" else "is not where it was when they were captured"
    assert str(error) == (
        f"captured segments read the bridge x.bridge at its address, but it {fate}: this looks like address moved\n"
        f"  at {error.where}\n"
        "  keep the tensor, and write new values into it in place (copy_), or pass it as an argument"
    )
    assert isinstance(error, ReplayError)


def test_first_replay_looks_at_static_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """So is a parameter that lies elsewhere, where no key tells."""
    model = nn.Linear(4, 4).to(device)
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "min_kernels": 1})
    run(compiled, device, 2)
    (executor,) = executors_of(compiled)
    (addresses,) = executor.keys.sets
    executor.reader.read = lambda args, read=executor.reader.read: read(args)._replace(addresses=addresses)  # type: ignore[assignment, misc]
    model.weight.data = model.weight.data.clone()
    diverges(compiled, device, "address moved")


def test_later_replays_do_not_look(device: torch.device, options: dict[str, Any]) -> None:
    """From the second replay on a call is the generated function and nothing else."""
    compiled = torch.compile(in_steps, backend="breakable_cg", options=options)
    run(compiled, device, 3)
    entry = entry_of(compiled)
    replay = entry.replay
    assert replay is not None
    assert entry.run is replay.function
    assert replay.function.__code__.co_filename == replay.file
    assert "Checker" not in replay.source


@pytest.mark.parametrize("fault", ["moved", "freed"])
def test_first_replay_of_a_capture(device: torch.device, graph: BreakableCUDAGraph, fault: str) -> None:
    """Through the second door: an input that got other memory, with the line where it was read."""
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph):
        _ = x.sin() + 1
    if fault == "moved":
        _old, x.data = x.data, torch.zeros(4, device=device)  # once the old memory is free, the graph is released
    else:
        x.untyped_storage().resize_(0)
    with pytest.raises(DivergenceError) as caught:
        graph.replay()
    assert caught.value.cause == "address moved"
    assert "_ = x.sin() + 1" in caught.value.where


def test_first_replay_of_a_capture_looks_at_bridges(device: torch.device, graph: BreakableCUDAGraph) -> None:
    """And the bridges of eager functions."""
    x = torch.ones(4, device=device)
    with torch.no_grad(), capture(graph):
        _ = keeps_first(x.sin()) + 1
    assert graph.recording is not None
    (bridge,) = (value for name, value in graph.recording.constants.items() if "_bridge_" in name)
    bridge.tensor.set_(torch.zeros(4, device=device))
    with pytest.raises(DivergenceError, match="the bridge"):
        graph.replay()


@pytest.mark.parametrize("door", ["compile", "capture"])
def test_first_replay_under_a_profiler(
    device: torch.device, options: dict[str, Any], graph: BreakableCUDAGraph, door: str
) -> None:
    """A profiler, which has a replay of its own, takes no look away."""
    x = torch.ones(4, device=device)
    if door == "compile":
        compiled = torch.compile(in_steps, backend="breakable_cg", options=options)
        run(compiled, device, 2)
        recording = entry_of(compiled).recording
    else:
        with torch.no_grad(), capture(graph):
            _ = keeps_first(x.sin()) + 1
        recording = graph.recording
    assert recording is not None
    bridge = next(value for value in recording.constants.values() if isinstance(value, Bridge))
    bridge.tensor.set_(torch.zeros(4, device=device))
    for _ in range(2):
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True),
            pytest.raises(DivergenceError, match="the bridge"),
        ):
            run(compiled, device) if door == "compile" else graph.replay()


# --- differences ----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_difference_of_bits(device: torch.device, dtype: torch.dtype) -> None:
    """NaN equals NaN, and -0.0 does not equal 0.0 unless there is a tolerance."""
    want = torch.tensor([1.0, NAN, 0.0, 3.0], device=device).to(dtype)
    got = want.clone()
    assert difference(got, want) is None
    got[2] = -0.0
    found = difference(got, want)
    assert found is not None
    assert (found.count, found.total, found.max_abs, found.max_rel, found.first) == (1, 4, 0.0, 0.0, (2,))
    assert difference(got, want, (0.0, 0.0)) is None
    got[1] = 1.0
    found = difference(got, want)
    assert found is not None
    assert (found.count, found.max_abs, found.first) == (2, INF, (1,))


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_difference_of_quantised(device: torch.device) -> None:
    """Quantised tensors are compared by the values that they stand for."""
    want = torch.quantize_per_tensor(torch.tensor([1.0, 2.0], device=device), 0.5, 0, torch.qint8)
    got = torch.quantize_per_tensor(torch.tensor([1.0, 3.0], device=device), 0.5, 0, torch.qint8)
    assert difference(want.clone(), want) is None
    assert str(difference(got, want)).startswith("1 of 2 elements differ, by at most 1 ")


def test_difference_of_others(device: torch.device) -> None:
    """Integers and bools by value, whatever the tolerance; another layout of the same values is no difference."""
    want = torch.tensor([[1, 2], [3, 4]], device=device)
    got = want.clone()
    got[1, 0] = 6
    found = difference(got, want, (1.0, 1.0))
    assert str(found) == ("1 of 4 elements differ, by at most 3 (relative 1); the first at [1, 0] is 6 instead of 3")
    assert difference(want.t().contiguous().t(), want) is None
    assert difference(want > 2, want > 1) is not None
    assert difference(want[:0], want[:0]) is None
    assert difference(want.float(), want) is not None
