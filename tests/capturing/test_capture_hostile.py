"""The second door under hostile use: a graph in use is reset, captured, copied; modes, threads and tasks; odd values."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.testing._internal.two_tensor
from torch import Tensor, nn

from breakable_backend import (
    BreakableCUDAGraph,
    CaptureError,
    DivergenceError,
    EagerOutputError,
    ReplayError,
    capture,
    eager_on_graph,
    is_capturing,
)
from breakable_backend.drivers import ordering
from breakable_backend.drivers.tape import TapeDriver
from doors import MakeGraph, bend, marked_bend, replays_equal, run_alone, shape_of
from gpu import settled

pytestmark = pytest.mark.usefixtures("no_grad")


# --- a graph in use -------------------------------------------------------------------------------------------------------


def test_reset_by_an_eager_step(make: MakeGraph, device: torch.device) -> None:
    """A reset during a replay frees the graph when the replay ends, which is right; one during the capture does nothing."""
    graph, x = make(), torch.randn(4, device=device)
    resetting = True

    @eager_on_graph
    def resets(x: Tensor) -> Tensor:
        if resetting:
            graph.reset()
        return bend(x)

    with capture(graph):
        y = resets(x + 1) * 3
    x.add_(2)
    graph.replay()
    assert torch.equal(y, bend(x + 1) * 3)
    assert graph.recording is None
    with pytest.raises(ReplayError, match="the graph was reset"):
        graph.replay()
    resetting = False
    with capture(graph):
        y = resets(x + 1) * 3
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)


def test_reset_by_another_thread(make: MakeGraph, device: torch.device) -> None:
    """Another thread's reset does not wait for the replay, and takes effect when that ends."""
    graph, x = make(), torch.randn(4, device=device)
    threads: list[threading.Thread] = []

    @eager_on_graph
    def slow(x: Tensor) -> Tensor:
        for thread in threads:
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        return bend(x)

    with capture(graph):
        y = slow(x + 1) * 3
    threads.append(threading.Thread(target=graph.reset))
    graph.replay()
    assert torch.equal(y, bend(x + 1) * 3)
    assert graph.recording is None


def test_captured_while_in_use(make: MakeGraph, device: torch.device) -> None:
    """A graph is not captured by an eager step of its own, at its capture or its replay; other use of it goes on."""
    graph, x = make(), torch.randn(4, device=device)
    capturing = True

    @eager_on_graph
    def captures(x: Tensor) -> Tensor:
        if capturing:
            with capture(graph):
                return x * 2
        return bend(x)

    with pytest.raises(CaptureError, match="being captured already"), capture(graph):
        captures(x + 1)
    capturing = False
    with capture(graph):
        y = captures(x + 1) * 3
    capturing = True
    with pytest.raises(CaptureError, match="being replayed already"):
        graph.replay()
    capturing = False
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)


def test_replay_that_could_not_begin(make: MakeGraph, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose replay failed before anything ran is not in use any more."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = marked_bend(x + 1) * 3

    def fails() -> int:
        raise RuntimeError("no stream")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no stream"):
        patch.setattr(graph.driver, "begin", fails)
        graph.replay()
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)


def test_capture_that_was_refused_changes_no_mode(make: MakeGraph, device: torch.device) -> None:
    """A graph that is in use stays in the debug mode that it was captured in."""
    graph, x = make(), torch.randn(4, device=device)
    capturing = False

    @eager_on_graph
    def captures(x: Tensor) -> Tensor:
        if capturing:
            with capture(graph, debug="compare"):
                pass
        return bend(x)

    with capture(graph):
        captures(x + 1)
    capturing = True
    with pytest.raises(CaptureError, match="being replayed already"):
        graph.replay()
    assert graph.debug is None


def test_captured_by_two_threads(make: MakeGraph, device: torch.device) -> None:
    """Two threads that capture the same graph do so one after the other: the last has it, and nothing of the first stays."""
    graph, x = make(), torch.randn(4, device=device)
    inside, outside = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.no_grad(), capture(graph):
                inside.set()
                outside.wait(10 if number == 0 else 0)
                marked_bend(x + number)
        except BaseException as error:  # noqa: BLE001 - the main thread asserts that there are none
            errors.append(error)

    first, second = (threading.Thread(target=work, args=(number,)) for number in range(2))
    first.start()
    inside.wait(10)
    second.start()
    outside.set()
    first.join(30)
    second.join(30)
    assert errors == []
    assert shape_of(graph) == "GEG"


def test_replay_inside_a_capture(make: MakeGraph, device: torch.device) -> None:
    """A graph that the body of another capture replays is an eager step of that, its own eager steps included."""
    inner, graph, x = make(), make(), torch.randn(4, device=device)
    with capture(inner):
        y = marked_bend(x + 1)

    with capture(graph):
        before = x * 3
        inner.replay()
        z = before + y

    assert shape_of(graph) == "GEG"
    replays_equal(graph, lambda x: x * 3 + bend(x + 1), x, z)


@pytest.mark.gpu
def test_replay_inside_a_foreign_capture() -> None:
    """Inside ``torch.cuda.graph`` a graph with eager steps is refused: they would be frozen in silence."""
    graph, x, outer = BreakableCUDAGraph(), torch.randn(4, device="cuda"), torch.cuda.CUDAGraph()
    with capture(graph):
        y = marked_bend(x + 1)
    with torch.cuda.graph(outer):
        with pytest.raises(ReplayError, match="somebody else's capture"):
            graph.replay()
        z = x + 1
    outer.replay()
    assert torch.equal(z, x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)
    del y, z
    graph.reset()


@pytest.mark.gpu
def test_replays_on_several_streams_and_a_foreign_capture() -> None:
    """A replay inside a foreign capture, after replays on several streams, is refused; that capture and later replays are right."""
    graph, x, streams = BreakableCUDAGraph(), torch.randn(4, device="cuda"), [torch.cuda.Stream() for _ in range(3)]
    with capture(graph):
        y = x.sin() + 1
    outer = torch.cuda.CUDAGraph()
    for value in (1.0, 2.0):
        x.fill_(value)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.current_stream().wait_stream(streams[-1])
        assert torch.equal(y, x.sin() + 1)
        if value == 1.0:
            with torch.cuda.graph(outer):
                with pytest.raises(ReplayError, match="inside somebody else's capture"):
                    graph.replay()
                z = x * 2
    outer.replay()
    assert torch.equal(z, x * 2)
    graph.reset()
    driver: Any = graph.driver
    assert not driver._leaving  # nothing waits for an event that is part of a capture


@pytest.mark.gpu
def test_the_only_stream_is_captured_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that would have to wait for a stream on which somebody captures is an error; that capture goes on, and ends well."""
    monkeypatch.setattr(ordering, "WAIT", 0.05)
    stream, outer = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    graph, x = BreakableCUDAGraph(), torch.randn(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), capture(graph):
        y = x + 1
    with torch.cuda.graph(outer, stream=stream):
        z = x * 2
        with (
            torch.cuda.stream(torch.cuda.Stream()),
            pytest.raises(ReplayError, match="capturing the stream of the last"),
        ):
            graph.replay()
    outer.replay()
    assert torch.equal(z, x * 2)
    replays_equal(graph, lambda x: x + 1, x, y)


@pytest.mark.parametrize("kind_of_graph", ["launches", "draws", "compares"])
def test_no_foreign_capture_holds_a_replay(make: MakeGraph, device: torch.device, kind_of_graph: str) -> None:
    """A graph without breaks is refused in a foreign capture too, and is right afterwards."""
    graph, x = make(), torch.ones(4, device=device)
    with capture(graph, debug="compare" if kind_of_graph == "compares" else None):
        y = x + torch.rand_like(x) if kind_of_graph == "draws" else x * 2

    def replay() -> None:
        with pytest.raises(ReplayError, match="inside somebody else's capture"):
            graph.replay()
        x + 1

    if device.type == "cuda":
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            replay()
    else:
        TapeDriver(device).capture(replay)
    graph.replay()
    assert y.unique().numel() == 4 if kind_of_graph == "draws" else torch.equal(y, x * 2)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(make: MakeGraph, device: torch.device, copying: Callable[[Any], Any]) -> None:
    """A graph is not copied: two owners of one memory would be one too many."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = marked_bend(x + 1)
    with pytest.raises(CaptureError, match="copied or pickled"):
        copying(graph)
    replays_equal(graph, lambda x: bend(x + 1), x, y)


def test_dropped_while_capturing(kind: str, device: torch.device) -> None:
    """A graph that nobody but the capture holds lives until that ends, and goes then with all it has."""
    x, ref = torch.randn(4, device=device), None
    manager = capture(BreakableCUDAGraph(driver=kind))
    ref = weakref.ref(manager.graph)
    with manager as graph:
        y = marked_bend(x + 1)
    driver = graph.driver
    assert driver is not None
    del manager, graph, y
    gc.collect()
    assert ref() is None
    assert settled(driver)


def test_graph_held_by_its_own_function(kind: str, device: torch.device) -> None:
    """A cycle through an eager function does not keep a graph, nor the module that it is in."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.graph = nn.Linear(4, 4), BreakableCUDAGraph(driver=kind)

        @eager_on_graph
        def route(self, x: Tensor) -> Tensor:
            return bend(x) if self.graph is not None else x

        def record(self, x: Tensor) -> Tensor:
            with capture(self.graph):
                return self.route(self.linear(x)) * 2

    model, x = Model().to(device), torch.randn(4, device=device)
    y = model.record(x)
    model.graph.replay()
    driver, ref = model.graph.driver, weakref.ref(model)
    del model, y
    gc.collect()
    assert ref() is None
    assert driver is not None
    assert settled(driver)


# --- modes ------------------------------------------------------------------------------------------------------------------


def test_modes_of_the_capture(make: MakeGraph, device: torch.device) -> None:
    """Line 7: an eager function runs under the modes of its place at capture, whatever is on around a replay."""
    graph, x, seen = make(), torch.randn(4, 4, device=device), []

    @eager_on_graph
    def look(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), (x @ x).dtype))
        return x + 1

    with capture(graph):
        y = look(x)
        with torch.enable_grad():
            y = look(y)
        with torch.inference_mode():
            y = look(y)
        with torch.autocast(device.type, torch.bfloat16):
            y = look(y)
            with torch.autocast(device.type, enabled=False):
                y = look(y)
    at_capture = list(seen)
    assert len(set(at_capture)) == 4
    others = [torch.enable_grad(), torch.inference_mode(), torch.autocast(device.type, torch.float16), torch.no_grad()]
    for other in others:
        seen.clear()
        with other:
            graph.replay()
        assert seen == at_capture
        assert not y.requires_grad


def test_parameters_in_an_eager_function(make: MakeGraph, device: torch.device) -> None:
    """Captured under no_grad and replayed without it, the graph's memory does not become part of autograd."""
    linear = nn.Linear(4, 4).to(device)
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = eager_on_graph(lambda x: linear(x))(x + 1) * 2
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        with torch.enable_grad():
            graph.replay()
        assert torch.equal(y, linear(x + 1) * 2)


def test_parameter_as_a_result(make: MakeGraph, device: torch.device) -> None:
    """Under no_grad nothing needs gradients: a function may return a parameter."""
    weight = nn.Parameter(torch.randn(4, device=device))
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = eager_on_graph(lambda: weight)() * x
    replays_equal(graph, lambda x: weight * x, x, y)


def test_inference_mode(make: MakeGraph, device: torch.device) -> None:
    """Captured in inference mode, an eager function may write its arguments at replays outside of it."""
    graph = make()

    def body(x: Tensor, write: Callable[[Tensor], Any] = lambda x: x.add_(1).sum()) -> Tensor:
        y = x * 2
        return y + write(y)

    with torch.inference_mode():
        x = torch.randn(4, device=device)
        with capture(graph):
            y = body(x, eager_on_graph(lambda x: x.add_(1).sum()))
    for number in range(3):
        with torch.inference_mode():
            x.fill_(number)
        graph.replay()
        assert torch.equal(y, body(x.clone()))


# --- threads, tasks, generators -----------------------------------------------------------------------------------------------


def test_tasks(make: MakeGraph, device: torch.device) -> None:
    """A task that runs while another one's capture waits is told so: its ops would be captured. Afterwards all is well."""

    async def captures(graph: BreakableCUDAGraph) -> None:
        x = torch.randn(4, device=device)
        with torch.no_grad(), capture(graph):
            y = x + 1
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            marked_bend(y)

    async def both() -> list[Any]:
        return await asyncio.gather(*(captures(make()) for _ in range(2)), return_exceptions=True)

    found = asyncio.run(both())
    assert all(isinstance(error, CaptureError) for error in found), found
    assert "another context" in str(found[1])
    assert not is_capturing()
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = marked_bend(x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)


def test_generators(make: MakeGraph, device: torch.device) -> None:
    """A capture may span a generator's yields; a generator that is closed inside of one leaves nothing behind."""
    graph, x = make(), torch.randn(4, device=device)

    def steps(x: Tensor) -> Iterator[Tensor]:
        with capture(graph):
            y = x + 1
            yield y
            yield marked_bend(y)

    *_, y = steps(x)
    assert shape_of(graph) == "GEG"
    replays_equal(graph, lambda x: bend(x + 1), x, y)
    del y
    running = steps(x)
    next(running)
    assert is_capturing()
    running.close()
    assert not is_capturing()
    assert graph.recording is None


def test_body_that_starts_a_thread(make: MakeGraph, device: torch.device) -> None:
    """Another thread's marked functions and host work are its own, though the body waits for it."""
    graph, x, found = make(), torch.randn(4, device=device), []
    other = torch.arange(4.0)

    def work() -> None:
        found.append(bend(other).sum().item())

    with capture(graph):
        y = x + 1
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        y = y * 2
    assert found == [12.0]
    assert shape_of(graph) == "G"
    replays_equal(graph, lambda x: (x + 1) * 2, x, y)


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exits(make: MakeGraph, device: torch.device, kind_of_error: type[BaseException]) -> None:
    """What ends a program goes through, in a segment and in an eager function, and leaves no capture behind."""
    graph, x = make(), torch.randn(4, device=device)

    def leave(x: Tensor) -> None:
        raise kind_of_error

    for function in (leave, eager_on_graph(leave)):
        with pytest.raises(kind_of_error), capture(graph):
            function(x + 1)
        assert not is_capturing()
    with pytest.raises(kind_of_error), capture(graph):
        eager_on_graph(barrier=lambda: leave(x))(bend)(x + 1)
    with capture(graph):
        y = marked_bend(x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)


ENDS = {
    "graph": "graph.replay()",
    "replay in a thread": "threading.Thread(target=lambda: time.sleep(0.1) or graph.replay()).start()",
    "open capture": "open_one = capture(graph); open_one.__enter__(); z = x + 1",
}


@pytest.mark.parametrize("end", ENDS)
def test_interpreter_exit(end: str, kind: str, device: torch.device) -> None:
    """A process that ends with a live graph, or in the middle of a capture, ends cleanly."""
    code = f"""
import threading, time, torch
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph
torch.set_grad_enabled(False)
model, x = torch.nn.Linear(4, 4).to("{device}"), torch.randn(4, device="{device}")
graph = BreakableCUDAGraph(driver="{kind}")
with capture(graph):
    y = eager_on_graph(lambda x: model(x))(model(x)) + 1
{ENDS[end]}
"""
    run_alone(code)


def test_fork() -> None:
    """A forked process replays, and captures, on the tape; a CUDA context does not survive a fork."""
    run_alone(
        """
import os, torch
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph
torch.set_grad_enabled(False)
graph, x = BreakableCUDAGraph(driver="tape"), torch.ones(4)
def bend(x): return x * 2 if x.sum() > 0 else x - 1
def body(x): return eager_on_graph(bend)(x + 1) * 2
with capture(graph):
    y = body(x)
child = os.fork()
if child == 0:
    x.fill_(3)
    graph.replay()
    same = torch.equal(y, bend(x + 1) * 2)
    with capture(graph):
        y = body(x)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
x.fill_(-3)
graph.replay()
assert torch.equal(y, bend(x + 1) * 2)
"""
    )


# --- odd values ---------------------------------------------------------------------------------------------------------------


def test_lazy_views(make: MakeGraph, device: torch.device) -> None:
    """Results of one memory are conjugated and negated as they were at capture, or it is an error; arguments always are."""
    graph, x = make(), torch.randn(4, dtype=torch.complex64, device=device)
    conjugate, seen = True, []

    @eager_on_graph
    def both(x: Tensor, view: Tensor) -> tuple[Tensor, ...]:
        seen.append((view.is_conj(), view.is_neg()))
        y = x * 2
        return y, y.conj() if conjugate else y, y.conj().imag

    def body(x: Tensor) -> Tensor:
        y, z, part = both(x + 1, (x + 1).conj().imag)
        return y + z * 1j + part

    with capture(graph):
        y = body(x)
    assert torch.equal(y, body(x))
    replays_equal(graph, body, x, y)
    assert seen == [(False, True)] * len(seen)
    conjugate = False
    with pytest.raises(EagerOutputError, match=r"field \[1\] of its result is lazily conjugated or negated otherwise"):
        graph.replay()


def test_results_over_the_memory_of_an_argument(make: MakeGraph, device: torch.device) -> None:
    """A result that another library made over an argument's memory is a view of the argument."""
    graph, x = make(), torch.randn(4, device=device)

    def body(x: Tensor) -> Tensor:
        y = x + 1
        part = eager_on_graph(lambda y: torch.from_dlpack(y)[1:])(y)
        y.mul_(2)
        return part + 0

    with capture(graph):
        y = body(x)
    assert torch.equal(y, body(x))
    replays_equal(graph, body, x, y)


def test_a_result_around_an_argument(make: MakeGraph, device: torch.device) -> None:
    """One that reaches beyond the argument, in a storage of its own, is an error."""
    whole = torch.randn(6, device=device)
    with pytest.raises(CaptureError, match="its result is memory around that of an argument"), capture(make()):
        eager_on_graph(lambda x: torch.from_dlpack(whole))(torch.from_dlpack(whole[2:]))


@pytest.mark.parametrize(
    ("first", "later", "what"),
    [
        (lambda x: x * 2, lambda x: x, "is memory that it was given, but was new memory"),
        (lambda x: (x * 2, 1), lambda x: (x[:], 1), r"\[0\] of its result is memory that it was given, but was new"),
        (
            lambda x: (x * 2, x * 3),
            lambda x: (y := x * 2, y),
            "is tensors that share memory, but was tensors that did not",
        ),
    ],
    ids=["an argument", "a view in a tuple", "one tensor twice"],
)
def test_results_that_share_memory_later(
    first: Callable[[Tensor], Any],
    later: Callable[[Tensor], Any],
    what: str,
    make: MakeGraph,
    device: torch.device,
) -> None:
    """Results that share no memory at the capture, and do in a replay, are an error: no write to one would be in the other."""
    graph, x, function = make(), torch.randn(4, device=device), first
    with capture(graph):
        eager_on_graph(lambda x: function(x))(x + 1)
    graph.replay()
    function = later
    with pytest.raises(EagerOutputError, match=what):
        graph.replay()


def test_a_result_in_the_old_memory_of_an_argument(make: MakeGraph, device: torch.device) -> None:
    """Where an argument has got other memory since the capture, an allocator may give its old memory to a new result."""
    graph, x, free = make(), torch.randn(4, device=device), list[Tensor]()
    with capture(graph):
        y = eager_on_graph(lambda x: torch.mul(x, 2, out=free.pop()) if free else x * 2)(x) + 1
    for number in range(3):
        free.append(x.data)
        x.data = torch.full((4,), float(number), device=device)
        graph.replay()
        assert torch.equal(y, x * 2 + 1) and not free


def test_containers_are_as_they_were(make: MakeGraph, device: torch.device) -> None:
    """A list or dict that a function is given is made anew at each replay, of what was in it before the call at capture."""
    graph, x, log = make(), torch.randn(4, device=device), ["first"]
    lengths = []

    @eager_on_graph
    def appends(x: Tensor, log: list[Any]) -> Tensor:
        log.append(x)
        lengths.append(len(log))
        return x * len(log)

    with capture(graph):
        y = appends(x + 1, log)
    assert len(log) == 2  # the body ran for real
    replays_equal(graph, lambda x: (x + 1) * 2, x, y)
    assert lengths == [2] * 4


def test_object_that_a_function_changes(make: MakeGraph, device: torch.device) -> None:
    """New memory in an argument's attribute is a result like any other."""

    class State:
        hidden = torch.zeros(4, device=device)

    graph, x, state = make(), torch.randn(4, device=device), State()
    state.hidden = x

    @eager_on_graph
    def step(x: Tensor, state: State) -> State:
        state.hidden = bend(x)
        return state

    with capture(graph):
        y = step(x + 1, state).hidden * 2
    replays_equal(graph, lambda x: bend(x + 1) * 2, x, y)


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


HIDING: dict[str, Callable[[Tensor], Any]] = {
    "set": lambda x: {x * 2},
    "slots": lambda x: [Slotted(x * 2)],
    "iterator": lambda x: iter([x * 2]),
    "generator": lambda x: (x * number for number in range(2)),
}


@pytest.mark.parametrize("name", HIDING)
def test_containers_that_are_not_looked_into(make: MakeGraph, device: torch.device, name: str) -> None:
    """Tensors in a result that no replay could renew are an error, and never stale."""
    graph, x = make(), torch.randn(4, device=device)
    with (
        pytest.raises(CaptureError, match=r"is a \w+( with tensors in it)?, which cannot be written back"),
        capture(graph),
    ):
        eager_on_graph(HIDING[name])(x + 1)


def test_transforms(make: MakeGraph, device: torch.device) -> None:
    """Under ``vmap`` a segment is captured as ever; a marked function, which would see no real tensor, is an error."""
    graph, x = make(), torch.randn(4, 3, device=device)
    with capture(graph):
        y = marked_bend(torch.func.vmap(lambda row: row.sin() * 2)(x))
    replays_equal(graph, lambda x: bend(x.sin() * 2), x, y)
    with pytest.raises(CaptureError, match="bend was called under a transform") as caught, capture(graph):
        torch.func.vmap(lambda row: marked_bend(row + 1))(x)
    assert "lambda row" in caught.value.where


def test_backward_in_a_segment(make: MakeGraph, device: torch.device) -> None:
    """Without a break in between, forward and backward passes can be captured."""
    linear = nn.Linear(4, 4).to(device)
    for parameter in linear.parameters():
        parameter.grad = torch.zeros_like(parameter)
    twin = copy.deepcopy(linear)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            model.zero_grad(set_to_none=False)
            model(x).pow(2).sum().backward()
        return x * 1

    graph, x = make(), torch.randn(3, 4, device=device)
    step(linear, x)  # the threads of autograd have their cuBLAS handles then
    with capture(graph):
        y = step(linear, x)
    for _ in range(3):
        replays_equal(graph, lambda x: step(twin, x), x, y, times=1)
        for mine, theirs in zip(linear.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


def test_objects_in_objects(make: MakeGraph, device: torch.device) -> None:
    """Tensors in the attributes of an object are results, also inside containers and other objects; no object is written."""

    class Layer:
        def __init__(self, keys: Tensor) -> None:
            self.keys, self.others = keys, {"values": [keys * 3]}

    class Cache:
        def __init__(self, x: Tensor) -> None:
            self.layers, self.length, self.me = [Layer(x * 2), Layer(x * 5)], 4, self
            self.again, self.sum = list(self.layers), x.sum()

    made = []

    @eager_on_graph
    def prefill(x: Tensor) -> Cache:
        made.append(Cache(x))
        return made[-1]

    def body(cache: Cache) -> Tensor:
        again = cache.me.me.again[1]
        assert again is cache.layers[1]
        return cache.layers[0].keys + again.others["values"][0] * cache.length + cache.me.sum

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = body(prefill(x + 1))
    kept = made[0].layers[0].keys.clone()
    replays_equal(graph, lambda x: body(Cache(x + 1)), x, y)
    assert torch.equal(made[0].layers[0].keys, kept)


def test_objects_that_know_each_other(make: MakeGraph, device: torch.device) -> None:
    """Each object is looked at once, however many ways lead there."""

    class Request:
        def __init__(self, x: Tensor, others: list[Request]) -> None:
            self.state, self.others = x, others

    graph, x = make(), torch.randn(4, device=device)
    others: list[Request] = []
    others += [Request(x * number, others) for number in range(30)]

    @eager_on_graph
    def step(x: Tensor, request: Request) -> Request:
        for number, other in enumerate(request.others):
            other.state = x * number
        return request.others[3]

    with capture(graph):
        y = step(x + 1, others[0]).others[7].state * 2
    replays_equal(graph, lambda x: (x + 1) * 14, x, y)


def test_names_of_arguments(make: MakeGraph, device: torch.device) -> None:
    """Keyword arguments may have any name: keywords of Python, names with spaces, names that the replay uses itself."""
    graph, x = make(), torch.randn(4, device=device)
    add = eager_on_graph(lambda *args, **named: sum(args) + sum(named.values()))

    def body(x: Tensor, add: Callable[..., Tensor]) -> Tensor:
        return add(x, x + 1, **{"class": x * 2, "a b": x, "stream": x, "args": x}) + 1

    with capture(graph):
        y = body(x, add)
    replays_equal(graph, lambda x: body(x, add.run_eager), x, y)  # type: ignore[attr-defined]


def test_subclasses(make: MakeGraph, device: torch.device) -> None:
    """A result of a subclass of Tensor keeps its class; one that wraps other tensors is an error that names it."""

    class Named(Tensor):
        pass

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = eager_on_graph(lambda x: (x * 2).as_subclass(Named))(x + 1)
        assert type(y) is Named
        y = (y + 1).as_subclass(Tensor)
    replays_equal(graph, lambda x: (x + 1) * 2 + 1, x, y)
    wrapper = torch.testing._internal.two_tensor.TwoTensor
    with pytest.raises(CaptureError, match="a tensor of the class TwoTensor, which wraps others"), capture(graph):
        eager_on_graph(lambda x: wrapper(x * 2, x * 3))(x + 1)


HOST_METHODS: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.cpu().numpy(),
    "repr": lambda x: repr(x),
    "format": lambda x: f"{x[0]:.2f}",
    "index": lambda x: range(9)[x.argmax()],
}


@pytest.mark.parametrize("name", HOST_METHODS)
def test_host_reads_by_methods(make: MakeGraph, device: torch.device, name: str) -> None:
    """Methods that copy to the host are an error with the user's line, and with what to do at this door."""
    graph, x = make(), torch.randn(4, device=device)
    with pytest.raises(CaptureError) as caught, capture(graph):
        HOST_METHODS[name](x + 1)
    assert "test_capture_hostile.py" in caught.value.where
    assert "lambda x: " in caught.value.where
    assert "@eager_on_graph" in caught.value.fix


def test_seed_in_the_body() -> None:
    """A seed that is set inside of a segment is an error with a line: a replay would not set it again."""
    graph = BreakableCUDAGraph(driver="tape")
    with pytest.raises(CaptureError, match="state of the random generator") as caught, capture(graph):
        torch.manual_seed(7)
        torch.rand(4)
    assert "torch.rand(4)" in caught.value.where


def test_parameter_that_moves(make: MakeGraph, device: torch.device) -> None:
    """A parameter whose memory is freed because it gets other (``param.data = ...``, ``to``) is noticed by the next replay."""
    linear = nn.Linear(4, 4).to(device)
    graph, x = make(), torch.randn(4, device=device)

    def double_and_back() -> None:
        linear.to(torch.float64).to(torch.float32)

    def other_data() -> None:
        linear.weight.data = torch.zeros_like(linear.weight)

    def asleep() -> None:
        linear.weight.data = torch.empty(0, device=device)

    for move in (double_and_back, other_data, asleep):
        for replays in (0, 2):
            with capture(graph):
                y = linear(x) + 1
            for _ in range(replays):
                graph.replay()
            weight = linear.weight.data.clone()
            move()
            with pytest.raises(ReplayError, match="a Parameter was given other memory, and the graph reads the old"):
                graph.replay()
            linear.weight.data = weight
    with capture(graph):
        y = linear(x) + 1
    replays_equal(graph, lambda x: linear(x) + 1, x, y)


def test_a_buffer_or_an_input_that_moves(make: MakeGraph, device: torch.device) -> None:
    """Any other tensor from outside that gets other memory is noticed as a parameter is: the graph holds the tensor."""
    model, x = nn.BatchNorm1d(4).to(device).eval(), torch.randn(4, 4, device=device)
    moved = model.running_mean, x
    assert all(isinstance(tensor, Tensor) for tensor in moved)
    for tensor in moved:
        for move in (lambda: setattr(tensor, "data", tensor + 1), lambda: tensor.set_(tensor + 1)):
            graph = make()
            with torch.no_grad(), capture(graph):
                y = marked_bend(model(x)) + 1
            for _ in range(2):
                graph.replay()
                assert torch.equal(y, bend(model(x)) + 1)
            move()
            with pytest.raises(ReplayError, match="a Tensor was given other memory, and the graph reads the old"):
                graph.replay()


def test_parameter_that_moves_in_an_eager_step(make: MakeGraph, device: torch.device) -> None:
    """Nothing is freed under the replay that is under way; the next one tells."""
    linear = nn.Linear(4, 4).to(device)
    graph, x, moves = make(), torch.randn(4, device=device), [False]

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        if moves[0]:
            linear.weight.data = linear.weight.data.clone()
        return x * 2

    with capture(graph):
        y = step(linear(x)) + 1
    moves[0] = True
    x.add_(1)
    graph.replay()
    assert torch.equal(y, linear(x) * 2 + 1)
    with pytest.raises(ReplayError, match="was given other memory"):
        graph.replay()


def test_parameter_that_is_swapped(make: MakeGraph, device: torch.device) -> None:
    """While somebody keeps the old memory the first replay notices, and ``check`` at any time; others do not look."""
    linear = nn.Linear(4, 4).to(device)
    graph, x, old = make(), torch.randn(4, device=device), linear.weight.data
    with capture(graph):
        y = linear(x) + 1
    linear.weight.data = torch.ones_like(old)
    with pytest.raises(DivergenceError, match="address moved"):
        graph.replay()
    linear.weight.data = old
    graph.check()
    replays_equal(graph, lambda x: linear(x) + 1, x, y)
    linear.weight.data = torch.ones_like(old)
    graph.replay()
    with pytest.raises(DivergenceError, match="a Parameter of shape") as caught:
        graph.check()
    assert "y = linear(x) + 1" in caught.value.where
    linear.weight.data = old
    graph.check()
    graph.reset()
    with pytest.raises(ReplayError, match="nothing was captured"):
        graph.check()


def test_an_argument_that_lies_otherwise(make: MakeGraph, device: torch.device) -> None:
    """An eager function that gives an argument another shape or other strides is an error: a replay would do so again."""

    @eager_on_graph(mutates_args=("x",))
    def first_column(x: Tensor) -> None:
        x.t_()
        x[0] = 5

    @eager_on_graph(mutates_args=("x",))
    def first_column_and_back(x: Tensor) -> None:
        first_column.run_eager(x)
        x.t_()

    x = torch.randn(2, 3, device=device)
    with pytest.raises(CaptureError, match="first_column changed the shape, the strides"), capture(make()):
        first_column(x.sin())
    graph = make()
    with capture(graph):
        y = x.sin()
        first_column_and_back(y)
        z = y * 2
    for _ in range(3):
        want = x.copy_(torch.randn(2, 3)).sin()
        want[:, 0] = 5
        graph.replay()
        assert torch.equal(z, want * 2)


@pytest.mark.parametrize("iterating", [iter, lambda parts: (part for part in parts)])
def test_an_iterator_that_is_used_up(
    make: MakeGraph, device: torch.device, iterating: Callable[[list[Tensor]], Iterator[Tensor]]
) -> None:
    """An iterator that its eager function uses up is an error: a replay would find nothing in it."""

    @eager_on_graph
    def added(x: Tensor, parts: Iterator[Tensor]) -> Tensor:
        return x + sum(parts)

    @eager_on_graph
    def next_of(parts: Iterator[Tensor]) -> Tensor:
        return next(parts).clone()

    x = torch.randn(3, device=device)
    with pytest.raises(CaptureError, match="added used up an argument, a "), capture(make()):
        added(x, iterating([x.sin(), x.cos()]))
    batches, graph = [torch.full_like(x, number) for number in range(4)], make()
    given = iterating(batches)
    with capture(graph):
        y = next_of(given) * 2
    for batch in batches[1:]:
        graph.replay()
        assert torch.equal(y, batch * 2)
