"""Unmarked ops that no capture can hold: each costs itself and nothing else, and the report names it."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._library.effects import EffectType
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional

import silly
from breakable_backend import CaptureError, explain
from breakable_backend.backend import executors_of
from breakable_backend.drivers import tape
from breakable_backend.drivers.cuda import CudaDriver, CudaSession
from breakable_backend.recordings import recorder, repair
from checks import assert_same, program_of

pytestmark = pytest.mark.usefixtures("no_grad")

runs: Counter[str] = Counter()
"""How often the body of each op ran."""
failing: dict[str, Callable[[], Exception]] = {}
"""What :func:`fails` raises."""


def wait(x: Tensor) -> None:
    """What no capture allows, and nothing sees outside of one."""
    if silly.capturing():
        x.sum().item()


def op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A custom op of this module that counts its runs, and returns something like its first argument."""

    def made(body: Callable[..., Any]) -> Any:
        def counted(x: Tensor) -> Tensor:
            runs[name] += 1
            return body(x)  # type: ignore[no-any-return]

        custom = torch.library.custom_op(f"healing::{name}", counted, mutates_args=())
        custom.register_fake(torch.empty_like)
        return custom

    return made


@op("waits")
def waits(x: Tensor) -> Tensor:
    """``x * 2``."""
    wait(x)
    return x * 2


@op("waits_too")
def waits_too(x: Tensor) -> Tensor:
    """``x * 3``."""
    wait(x)
    return x * 3


@op("swallows")
def swallows(x: Tensor) -> Tensor:
    """``x * 2``; what the wait raises is caught, and no op comes after it."""
    y = x * 2
    with suppress(Exception):
        wait(x)
    return y


@op("fails")
def fails(x: Tensor) -> Tensor:
    """``x * 2``, or what ``failing`` says."""
    if "now" in failing:
        raise failing["now"]()
    return x * 2


@op("ghost")
def ghost(x: Tensor) -> Tensor:
    """A copy of ``x`` that no op makes: by the host, or on a stream of its own."""
    made = torch.empty_like(x)
    if x.is_cuda:
        side = torch.cuda.Stream()
        if not silly.capturing():
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made.copy_(x)
        if not silly.capturing():
            torch.cuda.current_stream().wait_stream(side)
    else:
        ctypes.memmove(made.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
    return made


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    runs.clear()
    failing.clear()
    yield
    failing.clear()


def check(
    function: Callable[..., Any],
    device: torch.device,
    options: dict[str, Any],
    graphs: int,
    eager: int,
    calls: int = 6,
    shape: tuple[int, ...] = (8,),
    recorded: int | None = None,
) -> Any:
    """Six calls are eager's, call 2 records, and what is captured are so many segments; the compiled function.

    ``recorded``: how many of them the first recording has, where that is another number.
    """
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for call in range(calls):
        x = torch.randn(shape, device=device)
        torch.manual_seed(call)
        want = function(x.clone())
        torch.manual_seed(call)
        assert_same(compiled(x), want, f"call {call}")
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (graphs, eager), program.reasons
    assert program.replays == calls - 2 or not graphs
    if graphs:
        assert [key.num_graphs for key in program.recordings] == [graphs if recorded is None else recorded]
    return compiled


def many(x: Tensor) -> Tensor:
    for _ in range(5):
        x = x.sin() + 1
    return x


# --- one op -------------------------------------------------------------------------------------------------------------


def test_only_the_guilty_op(device: torch.device, options: dict[str, Any]) -> None:
    """The ops around one that cannot be captured stay captured; its body runs once more, in the call that finds it."""

    def f(x: Tensor) -> Tensor:
        return many(waits(many(x)))

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    bodies = []
    for _ in range(6):
        x = torch.randn(8, device=device)
        before = runs["waits"]
        got = compiled(x)
        bodies.append(runs["waits"] - before)
        assert_same(got, f(x))
    assert bodies == [1, 2, 1, 1, 1, 1]
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (2, 1, 4)
    (reason,) = program.reasons
    assert (reason.rule, reason.op) == ("capture_failed", "healing::waits")
    assert "in wait: x.sum().item()" in reason.source
    assert "healing::waits" in str(explain(compiled)) and "could not be captured" in str(explain(compiled))


def test_each_place_in_a_segment(device: torch.device, options: dict[str, Any]) -> None:
    """The guilty op may be the first of a segment, behind an eager step or behind nothing, or the last."""
    check(lambda x: many(waits(x)), device, options, 1, 1)
    check(lambda x: waits(many(x)), device, options, 1, 1)
    check(lambda x: many(waits(silly.triple(many(x)))), device, options, 2, 1)
    check(lambda x: many(silly.triple(waits(many(x)))), device, options, 2, 1)
    check(lambda x: waits(x), device, options, 0, 1)


def test_too_little_around_it(device: torch.device, options: dict[str, Any]) -> None:
    """What is left of a segment is captured only if it launches ``min_kernels`` ops."""
    check(lambda x: many(waits(silly.triple(many(x)) + 1)), device, {**options, "min_kernels": 2}, 2, 1)
    check(lambda x: waits(x + 1) + 1, device, {**options, "min_kernels": 2}, 0, 1)


def test_several_in_one_segment(device: torch.device, options: dict[str, Any]) -> None:
    """Several guilty ops in one segment are all found in the call that records."""

    def f(x: Tensor) -> Tensor:
        y = many(swallows(waits(many(x))))
        z = many(waits_too(y + 1))
        return silly.triple(many(waits_too(z) + y))

    check(f, device, options, 4, 4)


def test_writes_and_draws_happen_once(device: torch.device, options: dict[str, Any]) -> None:
    """Writes and draws before a guilty op, in it and behind it happen once in each call, in order."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x)
            y = x + torch.rand_like(x)
            view = y[2:]
            view.mul_(2)
            y = waits(y) + self.total + torch.rand_like(x)
            self.total.mul_(2)
            return swallows(y) + self.total, view, torch.rand_like(y)

    mine, theirs = Model().to(device), Model().to(device)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    for call in range(6):
        x = torch.randn(8, device=device)
        torch.manual_seed(call)
        want = theirs(x)
        torch.manual_seed(call)
        assert_same(compiled(x), want, f"call {call}")
        assert_same(mine.total, theirs.total, f"call {call}")
    assert program_of(compiled).num_graph_segments == 3


# --- the same op in many places ---------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes at which captures fail from now on."""
    found: list[str] = []
    real = repair.Repair.cut

    def cut(self: repair.Repair, *args: Any) -> Any:
        found.extend(node.name for node in self._blamed)
        return real(self, *args)

    monkeypatch.setattr(repair.Repair, "cut", cut)
    return found


def test_one_op_in_every_layer(device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own op fails once, and is eager in every place behind that."""
    cuts = counting(monkeypatch)

    def f(x: Tensor) -> Tensor:
        for _ in range(4):
            x = waits(many(x))
        return x

    compiled = check(f, device, options, 4, 4)
    assert len(cuts) == 1
    assert {reason.op for reason in program_of(compiled).reasons} == {"healing::waits"}


def test_an_op_of_torch_in_every_layer(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op of torch's own is eager everywhere once it has failed in two places."""
    cuts = counting(monkeypatch)
    weight, places, offsets = torch.randn(8, 8), torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2])
    many_elements = torch.arange(1000.0, device=device)

    def bag(x: Tensor) -> Tensor:  # CUDA captures it, from torch 2.11 on
        return functional.embedding_bag(places, weight, offsets).sum(0)

    def among(x: Tensor) -> Tensor:  # it sorts what there is, and waits for how much that is
        return torch.isin(x, many_elements).to(x.dtype)

    op = among if device.type == "cuda" else bag

    def f(x: Tensor) -> Tensor:
        for _ in range(4):
            y = x.sin() * 2
            x = y + op(y).cos()
        return x

    compiled = check(f, device, options, 5, 4)
    assert len(cuts) == 2
    named = {reason.op for reason in program_of(compiled).reasons}
    assert named == {"aten::isin" if device.type == "cuda" else "aten::_embedding_bag_forward_only"}


def test_no_more_cuts_than_a_bound(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a number of failures in one recording what still fails is eager as a whole, and right."""
    monkeypatch.setattr(repair, "MAX_CUTS", 1)
    check(lambda x: many(waits_too(many(waits(many(x))))), device, options, 3, 2, recorded=1)


def test_later_keys(device: torch.device, options: dict[str, Any]) -> None:
    """What failed for one key is eager for the next from the start; the first key's recording stays."""
    compiled = torch.compile(lambda x: many(waits(many(x))), backend="breakable_cg", options=options, dynamic=True)
    for size in (4, 4, 4, 5, 5, 5, 4, 4):
        x = torch.randn(size, device=device)
        assert_same(compiled(x), many(waits(many(x))))
    program = program_of(compiled)
    assert (program.captures, program.replays) == (4, 4)
    assert program.plain_calls == {"warm-up": 2}


# --- hostile ops ------------------------------------------------------------------------------------------------------------


def test_an_op_that_hides_its_error(device: torch.device, options: dict[str, Any]) -> None:
    """An op that catches what its wait raises is found too, in the same call."""
    compiled = check(lambda x: many(swallows(many(x))), device, options, 2, 1)
    (reason,) = program_of(compiled).reasons
    assert (reason.rule, reason.op) == ("capture_failed", "healing::swallows")


def test_an_op_that_adds_nothing(device: torch.device, options: dict[str, Any]) -> None:
    """An op of somebody's that adds nothing to the captured graph runs eagerly, since a replay would not do what it does."""
    compiled = check(lambda x: many(ghost(many(x))), device, options, 2, 1)
    (reason,) = program_of(compiled).reasons
    assert reason.op == "healing::ghost" and "adds nothing to the captured graph" in reason.text


left_open: list[bool] = []


@op("forks")
def forks(x: Tensor) -> Tensor:
    """``x * 2``; under a capture it leaves something behind with which that cannot be ended."""
    if silly.capturing():
        left_open.append(True)
    return x * 2


def test_a_capture_that_fails_at_its_end(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a capture cannot be ended, the ops of somebody's in it are eager, and torch's own stay captured."""
    session: Any = CudaSession if device.type == "cuda" else tape.TapeSession
    real = session.end

    def end(self: Any) -> Any:
        if left_open:
            self.abandon()
            raise CaptureError("a stream was never joined")
        return real(self)

    monkeypatch.setattr(session, "end", end)
    driver: Any = CudaDriver if device.type == "cuda" else tape.TapeDriver
    capture = driver.capture

    def captured(self: Any, *arguments: Any) -> Any:
        left_open.clear()
        return capture(self, *arguments)

    monkeypatch.setattr(driver, "capture", captured)
    compiled = check(lambda x: many(forks(many(forks(many(x))))), device, options, 3, 2)
    assert {reason.op for reason in program_of(compiled).reasons} == {"healing::forks"}


@op("allocates")
def allocates(x: Tensor) -> Tensor:
    """``x * 2``, with memory that it has of CUDA itself."""
    from cuda.bindings import runtime

    error, address = runtime.cudaMalloc(1 << 10)
    if error:
        raise RuntimeError(f"cudaMalloc failed: {error}")
    runtime.cudaFree(address)
    return x * 2


@op("allocates_in_silence")
def allocates_in_silence(x: Tensor) -> Tensor:
    """The same, and what CUDA says of it goes unheard."""
    from cuda.bindings import runtime

    y = x * 2
    error, address = runtime.cudaMalloc(1 << 10)
    if not error:
        runtime.cudaFree(address)
    return y


@op("synchronises")
def synchronises(x: Tensor) -> Tensor:
    """``x * 2``, and waits for all that the GPU does."""
    torch.cuda.synchronize()
    return x * 2


@pytest.mark.gpu
@pytest.mark.parametrize("hostile", [allocates, allocates_in_silence, synchronises], ids=lambda op: op._name)
def test_hostile_ops_on_cuda(hostile: Any) -> None:
    """An op that takes memory from another allocator, or waits for the whole GPU, heals under its name."""
    compiled = check(lambda x: many(hostile(many(x))), torch.device("cuda", 0), {}, 2, 1)
    (reason,) = program_of(compiled).reasons
    assert reason.op == f"healing::{hostile._name}"


class Mine(Exception):
    """An error of the user's."""


def test_an_op_that_raises(device: torch.device, options: dict[str, Any]) -> None:
    """What an op raises when it runs by itself reaches the caller as the same object; such an op stays captured afterwards."""
    raised: list[Exception] = []

    def error() -> Exception:
        raised.append(Mine("no"))
        return raised[-1]

    compiled = torch.compile(lambda x: many(fails(many(x))), backend="breakable_cg", options=options)
    x = torch.randn(8, device=device)
    want = many(many(x) * 2)
    assert_same(compiled(x), want)
    failing["now"] = error
    for _ in range(2):
        with pytest.raises(Mine) as caught:
            compiled(x)
        assert caught.value is raised[-1]
    failing.clear()
    for _ in range(4):
        assert_same(compiled(x), want)
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (1, 0)


def test_an_op_that_raises_once(device: torch.device, options: dict[str, Any]) -> None:
    """An op that raises in the capture alone runs again by itself, and is eager from then on."""

    def error() -> Exception:
        del failing["now"]
        return Mine("at call 2")

    compiled = torch.compile(lambda x: many(fails(many(x))), backend="breakable_cg", options=options)
    x = torch.randn(8, device=device)
    want = many(many(x) * 2)
    for call in range(6):
        if call == 1:
            failing["now"] = error
        assert_same(compiled(x), want)
    (reason,) = program_of(compiled).reasons
    assert reason.op == "healing::fails" and "Mine" in reason.text and "at call 2" in reason.text


def test_auto_break_off(device: torch.device, options: dict[str, Any]) -> None:
    """With ``auto_break=False`` the error tells of the guilty op's line, also if the op hides it or adds nothing."""
    for name, function in {"waits": waits, "swallows": swallows, "ghost": ghost}.items():
        compiled = torch.compile(
            lambda x, function=function: many(function(many(x))),
            backend="breakable_cg",
            options={**options, "auto_break": False},
        )
        x = torch.randn(8, device=device)
        compiled(x)
        with pytest.raises(CaptureError) as caught:
            compiled(x)
        assert "test_repair.py" in caught.value.where, name
        assert executors_of(compiled)[-1].driver.live_blocks() == 0


# --- with other modes ---------------------------------------------------------------------------------------------------------


def test_under_compare_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Compare mode heals as replays do, and compares what came of it."""
    check(lambda x: many(waits(silly.triple(many(x)))), device, {**options, "debug": "compare"}, 2, 1)


def test_under_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """An op that enters the autocast it was traced under is named all the same."""

    def f(x: Tensor) -> Tensor:
        y = many(x)
        with torch.autocast(device.type, torch.bfloat16):
            y = waits(y)
        return many(y)

    compiled = check(f, device, options, 2, 1)
    assert {reason.op for reason in program_of(compiled).reasons} == {"healing::waits"}


# --- an op, or another thread -------------------------------------------------------------------------------------------------

disturbed: list[str] = []
"""Set by an op: something has made the capture invalid, and has raised nothing."""
disturbs_in: set[int] = set()
"""The captures in which :func:`disturbs` does so; all if empty."""


@op("disturbs")
def disturbs(x: Tensor) -> Tensor:
    """``x * 2``."""
    if silly.capturing() and (not disturbs_in or runs["disturbs"] in disturbs_in):
        disturbed.append("disturbs")
    return x * 2


@op("effectful")
def effectful(x: Tensor) -> Tensor:
    """``x * 2``; a test says that it acts outside of the process."""
    return x * 2


def test_what_acts_outside() -> None:
    """Collectives, and ops that were registered with an effect, act outside of the process."""
    registered = torch.library.custom_op(
        "healing::registered", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    registered.register_fake(torch.empty_like)
    registered.register_effect(EffectType.ORDERED)
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = {
        "registered": graph.call_function(torch.ops.healing.registered.default, (x,)),
        "collective": graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0")),
        "wait": graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (x,)),
        "other": graph.call_function(torch.ops.healing.waits.default, (x,)),
        "torch's": graph.call_function(torch.ops.aten.sin.default, (x,)),
    }
    found = {name for name, node in nodes.items() if repair.acts_outside(node)}
    assert found == {"registered", "collective", "wait"}


@pytest.fixture
def disturbable(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Captures fail, as if another thread had made them invalid, once ``disturbed`` is set."""
    driver: Any = CudaDriver if device.type == "cuda" else tape.TapeDriver
    progress, capture = driver.progress, driver.capture

    def looked_at(self: Any) -> Any:
        if disturbed:
            error = CaptureError("the capture became invalid, and no error was raised")
            error.passing = "disturbed"
            raise error
        return progress(self)

    def captured(self: Any, *arguments: Any) -> Any:
        disturbed.clear()
        return capture(self, *arguments)

    monkeypatch.setattr(driver, "progress", looked_at)
    monkeypatch.setattr(driver, "capture", captured)
    disturbs_in.clear()
    yield
    disturbed.clear()
    disturbs_in.clear()


@pytest.mark.usefixtures("disturbable")
def test_disturbed_twice_at_one_op(device: torch.device, options: dict[str, Any]) -> None:
    """An op at which the capture becomes invalid twice in a row is to blame, in the call that records."""
    compiled = check(lambda x: many(disturbs(many(x))), device, options, 2, 1)
    (reason,) = program_of(compiled).reasons
    assert reason.op == "healing::disturbs"
    assert program_of(compiled).plain_calls == {"warm-up": 1}


@pytest.mark.usefixtures("disturbable")
def test_disturbed_once(device: torch.device, options: dict[str, Any]) -> None:
    """What happens once is nobody's fault: the second capture is the recording."""
    disturbs_in.add(3)  # eager, warm-up, and the first capture
    compiled = check(lambda x: many(disturbs(many(x))), device, options, 1, 0)
    assert program_of(compiled).plain_calls == {"warm-up": 1}


@pytest.mark.usefixtures("disturbable")
def test_disturbed_in_the_pause(device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that goes on disturbing does so in the pause before the op, which is then not to blame: the call is plain."""
    wait = repair.NodeByNode._wait

    def disturbed_meanwhile(seconds: float, progress: Callable[[], Any]) -> Any:
        disturbed.append("another thread")
        return wait(seconds, progress)

    monkeypatch.setattr(repair.NodeByNode, "_wait", staticmethod(disturbed_meanwhile))
    disturbs_in.update((3, 4))
    compiled = torch.compile(lambda x: many(disturbs(many(x))), backend="breakable_cg", options=options)
    x = torch.randn(8, device=device)
    want = many(disturbs(many(x)))
    for _ in range(5):
        assert_same(compiled(x), want)
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (1, 0)
    assert sum(count for why, count in program.plain_calls.items() if why.startswith("could not be recorded")) == 1


@pytest.mark.usefixtures("disturbable")
def test_nothing_is_captured_again_behind_an_effect(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an op acts outside of the process, its segment is not captured a second time just to see what comes of it."""
    monkeypatch.setattr(repair, "acts_outside", lambda node: "effectful" in str(node.target))
    disturbs_in.update((3, 4))
    compiled = torch.compile(lambda x: many(disturbs(effectful(many(x)))), backend="breakable_cg", options=options)
    x = torch.randn(8, device=device)
    want = many(disturbs(effectful(many(x))))
    bodies = []
    for _ in range(5):
        before = runs["effectful"]
        assert_same(compiled(x), want)
        bodies.append(runs["effectful"] - before)
    # plain; a capture that fails and a plain run; then a capture that fails and one more plain call; the capture; a replay
    assert bodies[:2] == [1, 2], bodies
    assert (program_of(compiled).num_graph_segments, program_of(compiled).num_eager_segments) == (1, 0)


def test_what_the_partition_has_added(
    device: torch.device, options: dict[str, Any], group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a capture fails at a wait that was added behind a collective, its segment is eager, and the call is right."""

    class Failing(repair.NodeByNode):
        def _look(self, node: Any, *rest: Any) -> Any:
            if node.name.endswith("_wait"):
                raise CaptureError("no")
            return super()._look(node, *rest)

    monkeypatch.setattr(recorder, "NodeByNode", Failing)

    def f(x: Tensor) -> Tensor:
        y = collectives.all_reduce(x.sin() * 2, "sum", group)
        return silly.triple(y).cos() + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.randn(8, device=device)
        assert_same(compiled(x), f(x))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (1, 1, 3)
