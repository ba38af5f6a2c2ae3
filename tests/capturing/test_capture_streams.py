"""Streams, events and pools of the caller's at the second door; autocast's cache at both."""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import BreakableCUDAGraph, CaptureError, OptionsError, _torch, capture, eager_on_graph
from breakable_backend.drivers import cuda
from breakable_backend.interception import intercepted_by, without_autocast_cache
from doors import MakeGraph, bend, marked_bend, replays_equal, run_alone

pytestmark = pytest.mark.usefixtures("no_grad")


SIZE = 1 << 22
"""Elements: kernels that take a while, so that a wait that is missing shows."""


def late(stream: torch.cuda.Stream, x: Tensor, value: float) -> None:
    """Fill ``x`` on ``stream``, after a while."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(value)


# --- streams that overlap ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("breaks", [1, 3])
def test_break_while_streams_overlap(breaks: int) -> None:
    """A side stream is forked before breaks and joined after them, by events that were recorded before them."""
    graph, x, side = BreakableCUDAGraph(), torch.ones(SIZE, device="cuda"), torch.cuda.Stream()

    def body(step: object = bend) -> Tensor:
        current = torch.cuda.current_stream()
        forked, done = torch.cuda.Event(), torch.cuda.Event()
        forked.record(current)
        with torch.cuda.stream(side):
            forked.wait(side)
            torch.cuda._sleep(2_000_000)
            z = x * 5
            done.record(side)
        y = x * 2
        for _ in range(breaks):
            y = step(y)  # type: ignore[operator]
        done.wait(current)
        return y + z

    body()
    torch.cuda.synchronize()
    with capture(graph):
        out = body(marked_bend)
    for number in range(3):
        x.fill_(number - 1.0)
        graph.replay()
        got = out.clone()
        assert torch.equal(got, body())
    del out
    graph.reset()


@pytest.mark.gpu
def test_fork_from_an_event_of_an_earlier_segment() -> None:
    """A stream that waits, after a break, for what was recorded before it is part of the capture from there on."""
    graph, x, side = BreakableCUDAGraph(), torch.ones(SIZE, device="cuda"), torch.cuda.Stream()
    with capture(graph):
        y, ready = x * 2, torch.cuda.Event()
        ready.record()
        z = marked_bend(y)
        with torch.cuda.stream(side):
            ready.wait()
            w = y * 3
        torch.cuda.current_stream().wait_stream(side)
        out = z + w
    for number in range(3):
        x.fill_(number - 1.0)
        graph.replay()
        assert torch.equal(out, bend(x * 2) + x * 6)
    del y, z, w, out
    graph.reset()


@pytest.mark.gpu
def test_event_of_a_segment_in_an_eager_function() -> None:
    """What an eager function does on another stream, behind an event of a segment, is behind that segment at each replay."""
    x, seen = torch.ones(SIZE, device="cuda"), torch.zeros(SIZE, device="cuda")
    side, ready = torch.cuda.Stream(), torch.cuda.Event()

    @eager_on_graph(mutates_args=("y",))
    def beside(y: Tensor) -> None:
        side.wait_event(ready)
        with torch.cuda.stream(side):
            seen.copy_(y)
        torch.cuda.current_stream().wait_stream(side)

    graph = BreakableCUDAGraph()
    with capture(graph):
        torch.cuda._sleep(20_000_000)
        y = x * 3
        ready.record()
        beside(y)
    for number in range(3):
        x.fill_(float(number))
        graph.replay()
        assert torch.equal(seen, x * 3)
    ready.synchronize()  # outside of the capture it is an event like others
    del y
    graph.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["stream", "event"])
def test_wait_for_work_outside(by: str) -> None:
    """Captured code that waits for work of another stream has it done before its segment is launched, at each replay."""
    graph, x, w = BreakableCUDAGraph(), torch.ones(SIZE, device="cuda"), torch.zeros(SIZE, device="cuda")
    side, ready = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()

    def issue(value: float) -> None:
        late(side, w, value)
        ready.record(side)

    issue(7.0)
    with capture(graph):
        y = marked_bend(x + 1)
        if by == "stream":
            torch.cuda.current_stream().wait_stream(side)
        else:
            ready.wait()
        out = y + w
    assert torch.equal(out, bend(x + 1) + 7.0)
    for number in range(3):
        torch.cuda.synchronize()
        issue(float(number))
        graph.replay()
        assert torch.equal(out, bend(x + 1) + number)
        side.wait_stream(torch.cuda.current_stream())
    del y, out
    graph.reset()


@pytest.mark.gpu
def test_work_that_an_eager_function_leaves_behind() -> None:
    """An eager function may leave work on another stream behind, which a later segment waits for, at each replay."""
    x, w = torch.ones(SIZE, device="cuda"), torch.zeros(SIZE, device="cuda")
    side, ready = torch.cuda.Stream(), torch.cuda.Event()

    @eager_on_graph
    def prefetch(x: Tensor) -> None:
        side.wait_stream(torch.cuda.current_stream())
        late(side, w, 0.0)
        with torch.cuda.stream(side):
            w.add_(x)
        ready.record(side)

    graph = BreakableCUDAGraph()
    with capture(graph):
        prefetch(x * 2)
        y = x + 1
        ready.wait()
        out = y + w
    assert torch.equal(out, x * 3 + 1)
    for number in range(3):
        x.fill_(float(number))
        graph.replay()
        assert torch.equal(out, x * 3 + 1)
    del y, out
    graph.reset()


@pytest.mark.gpu
def test_fork_from_the_callers_stream() -> None:
    """In captured code the stream that was current before means the one that captures in its place."""
    graph, x, side = BreakableCUDAGraph(), torch.ones(SIZE, device="cuda"), torch.cuda.Stream()
    main = torch.cuda.current_stream()
    with capture(graph):
        y = x + 1
        side.wait_stream(main)
        with torch.cuda.stream(side):
            z = y * 2
        main.wait_stream(side)
        out = z + y
    for number in range(3):
        x.fill_(float(number))
        graph.replay()
        assert torch.equal(out, (x + 1) * 3)
    del y, z, out
    graph.reset()


@pytest.mark.gpu
def test_op_on_a_stream_that_was_not_forked() -> None:
    """It would run once and never again: an error with the user's line."""
    graph, x, side = BreakableCUDAGraph(), torch.ones(4, device="cuda"), torch.cuda.Stream()
    with pytest.raises(CaptureError, match="which is not a part of the capture") as caught, capture(graph):
        with torch.cuda.stream(side):
            x * 2  # the line
    assert "# the line" in caught.value.where
    with capture(graph):
        y = x + 1
    replays_equal(graph, lambda x: x + 1, x, y)
    del y
    graph.reset()


@pytest.mark.gpu
def test_wait_that_only_cuda_sees() -> None:
    """A wait for work from outside that does not go through torch.cuda's classes is an error that says so."""
    graph, x, side, ready = BreakableCUDAGraph(), torch.ones(4, device="cuda"), torch.cuda.Stream(), torch.Event("cuda")
    with torch.cuda.stream(side):
        x * 2
        ready.record()
    with pytest.raises(CaptureError, match="waited for work from outside of the capture") as caught, capture(graph):
        y = x + 1
        torch.accelerator.current_stream().wait_event(ready)
    assert "wait_event(ready)" in caught.value.where
    assert "torch.cuda" in caught.value.fix
    torch.rand(3, device="cuda")
    with capture(graph):
        y = x + 1
    replays_equal(graph, lambda x: x + 1, x, y)
    del y
    graph.reset()


@pytest.mark.gpu
def test_stream_that_only_cuda_sees() -> None:
    """A stream that something else than torch.cuda's classes forked, and nobody joined, is an error that says so."""
    from cuda.bindings import runtime

    graph, x, side, forked = BreakableCUDAGraph(), torch.ones(4, device="cuda"), torch.cuda.Stream(), torch.cuda.Event()
    spare = torch.empty(4, device="cuda")
    forked.record()
    torch.cuda.synchronize()
    with pytest.raises(CaptureError, match="was never joined") as caught, capture(graph):
        x + 1
        runtime.cudaEventRecord(forked.cuda_event, torch.cuda.current_stream().cuda_stream)
        runtime.cudaStreamWaitEvent(side.cuda_stream, forked.cuda_event, 0)
        runtime.cudaMemsetAsync(spare.data_ptr(), 0, 16, side.cuda_stream)
    assert hex(side.cuda_stream) in caught.value.what
    with capture(graph):
        y = x + 1
    replays_equal(graph, lambda x: x + 1, x, y)
    del y
    graph.reset()


@pytest.mark.gpu
def test_error_while_streams_overlap() -> None:
    """An exception of the body's while a side stream is not joined reaches the caller as the same object."""
    graph, x, side = BreakableCUDAGraph(), torch.ones(4, device="cuda"), torch.cuda.Stream()
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, capture(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x * 2
        raise error
    assert caught.value is error
    graph.reset()


# --- what is seen, and for how long -----------------------------------------------------------------------------------------


class Owner:
    def method(self, number: int) -> int:
        return number


def test_methods_are_seen_in_one_thread() -> None:
    """A method is seen in the thread that asked, by the innermost seer, and is what it was afterwards."""
    before = vars(Owner)["method"]
    seen: list[int] = []

    def doubled(method: object, owner: Owner, number: int) -> int:
        return 2 * method(owner, number)  # type: ignore[operator, no-any-return]

    def elsewhere() -> None:
        seen.append(Owner().method(1))

    with intercepted_by(doubled, Owner, "method"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert Owner().method(1) == 2
        with intercepted_by(lambda method, owner, number: 7, Owner, "method"):
            assert Owner().method(1) == 7
        assert Owner().method(1) == 2
    assert seen == [1]
    assert vars(Owner)["method"] is before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # as the test wants it
def test_forked_while_another_thread_captures() -> None:
    """A forked child, which has one thread of all, has torch's own methods where another thread's capture saw them."""
    before = vars(Owner)["method"]
    inside, done = threading.Event(), threading.Event()

    def look() -> None:
        with intercepted_by(lambda method, owner, number: 7, Owner, "method"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=look)
    thread.start()
    assert inside.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if vars(Owner)["method"] is before else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0
    assert vars(Owner)["method"] is before


def test_nothing_is_left_of_a_capture(make: MakeGraph, device: torch.device) -> None:
    """After a capture, also one that failed, torch's classes have their own methods."""
    events, regions = dict(vars(torch.cuda.Event)), dict(vars(torch.autocast))
    x = torch.ones(3, device=device)
    with capture(make()):
        x + 1
    with pytest.raises(KeyError), capture(make()):
        raise KeyError
    assert dict(vars(torch.cuda.Event)) == events
    assert dict(vars(torch.autocast)) == regions


# --- torch's hooks on launches ------------------------------------------------------------------------------------------------


class Launched:
    """Stands for a graph of torch's, which tells how often torch launched it."""

    def __init__(self) -> None:
        self.launches = 0
        self._replay_start_hooks: dict[int, object] = {}
        self._replay_end_hooks: dict[int, object] = {}

    def replay(self) -> None:
        self.launches += 1

    def reset(self) -> None:
        pass


@pytest.mark.parametrize("whose", ["own", "all"])
def test_hooks_on_launches(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """While a hook on launches is registered, of one graph or of all, torch launches it and calls the hook; else we do."""
    for name in ("_global_replay_start_hooks", "_global_replay_end_hooks"):  # what torch 2.14 and later have
        monkeypatch.setattr(torch.cuda.graphs, name, {}, raising=False)
    raw: list[object] = []
    bindings = SimpleNamespace(cudaGraphLaunch=lambda executable, stream: (raw.append(executable) or 0,))
    monkeypatch.setattr(cuda, "cudart", bindings)
    theirs: Any = Launched()
    no_draws: Any = SimpleNamespace(index=0)
    graph = cuda.CudaGraph(theirs, no_draws)
    graph._replayed, graph._executable = True, "executable"
    hooks = theirs._replay_end_hooks if whose == "own" else torch.cuda.graphs._global_replay_start_hooks  # type: ignore[attr-defined]
    for count in (1, 2):
        graph.replay(0)
        assert (theirs.launches, len(raw)) == (count - 1, count)
        hooks[0] = print
        graph.replay(0)
        assert (theirs.launches, len(raw)) == (count, count)
        del hooks[0]


def test_hooks_are_where_they_are_looked_for() -> None:
    """What torch's own functions register is found, where torch has them."""
    register = getattr(torch.cuda.graphs, "register_graph_replay_start_hook", None)
    theirs: Any = Launched()
    if register is None:
        assert _torch.launch_hooks(theirs) == ()
        return
    for registered in (register, torch.cuda.graphs.register_graph_replay_end_hook):  # type: ignore[attr-defined]
        handle = registered(print)
        assert any(_torch.launch_hooks(theirs))
        handle.remove()
        assert not any(_torch.launch_hooks(theirs))


# --- autocast -----------------------------------------------------------------------------------------------------------------


def test_warm_autocast_cache(make: MakeGraph, device: torch.device) -> None:
    """Weights are read at each replay, also where autocast's cache held their casts; what is in it stays, and the flag."""
    linear, x = nn.Linear(4, 4).to(device), torch.randn(2, 4, device=device)
    graph = make()
    region = torch.autocast(device.type, torch.bfloat16)

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        return linear(x).float()

    def model(x: Tensor) -> Tensor:
        with region:
            x = linear(x) + 1
        return step(linear(x).float()) + 1

    with torch.autocast(device.type, torch.bfloat16):
        stale = linear(x)  # casts, and keeps the casts
        with capture(graph):
            y = model(x)
        assert torch.is_autocast_cache_enabled()
        linear.weight.mul_(2)
        assert torch.equal(linear(x), stale)  # torch's own rule: they hold until the region ends
        graph.replay()
        got = y.clone()
    with torch.autocast(device.type, torch.bfloat16):
        want = model(x)
    assert torch.equal(got, want)
    assert not torch.equal(got, stale)


def test_compiled_function_is_not_compiled_again(device: torch.device) -> None:
    """A capture on a GPU changes nothing that Dynamo guards on; under autocast that takes a call without its cache before."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        compiled.append(graph.code)
        return graph.forward

    function, x = torch.compile(lambda x: x @ x + 1, backend=backend), torch.randn(4, 4, device=device)
    for region in (nullcontext(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False)):
        compiled.clear()
        with region:
            function(x)
        assert len(compiled) == 1
        with without_autocast_cache() if device.type == "cpu" else capture(BreakableCUDAGraph()), region:
            function(x)
        assert len(compiled) == 1


def test_autocast_cache_after_an_error(make: MakeGraph, device: torch.device) -> None:
    """A capture that failed leaves autocast's cache as it was, on or off."""
    for cached in (True, False):
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=cached):
            with pytest.raises(KeyError), capture(make()):
                assert not torch.is_autocast_cache_enabled()
                raise KeyError
            assert torch.is_autocast_cache_enabled() is cached


# --- pools of the caller's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [3, "mine", (1,), torch.device("cpu")])
def test_what_is_no_pool(pool: object) -> None:
    """What is no pool is a typed error where it is given."""
    with pytest.raises(OptionsError, match=r"pool takes a torch\.cuda\.MemPool"):
        BreakableCUDAGraph(pool=pool)


@pytest.mark.gpu
def test_mem_pool() -> None:
    """Captured memory lies in a ``MemPool`` of the caller's, after a reset and a drop too, until a capture fails in it."""
    run_alone("""
import gc, logging, torch
from breakable_backend import BreakableCUDAGraph, CaptureError, capture
torch.set_grad_enabled(False)
logging.disable(logging.WARNING)  # a line says so
pool, x = torch.cuda.MemPool(), torch.randn(1 << 20, device="cuda")
graph, other = BreakableCUDAGraph(pool=pool), BreakableCUDAGraph(pool=pool)

def inside(y):
    return any(s["address"] <= y.data_ptr() < s["address"] + s["total_size"] for s in pool.snapshot())

def right(captured, y, times):
    for _ in range(2):
        x.add_(1)
        captured.replay()
        assert torch.equal(y, x * times)
    return True

for _ in range(2):
    with capture(graph):
        y = x * 2
    with capture(other):
        z = x * 3
    assert inside(y) and inside(z) and right(graph, y, 2) and right(other, z, 3)
    del y, z
    graph.reset(), other.reset()
del graph, other
graph, other = BreakableCUDAGraph(pool=pool), BreakableCUDAGraph(pool=pool)
with capture(graph):
    y = x * 2
assert inside(y)
try:
    with capture(other):
        torch.cuda.synchronize()
except CaptureError:
    pass
with capture(other):
    z = x * 3
assert not inside(z) and right(graph, y, 2) and right(other, z, 3)
with capture(graph):
    y = x * 2
assert not inside(y) and right(graph, y, 2)
torch.rand(3, device="cuda")
del y, z, graph, other
gc.collect()
assert pool.use_count() == 1  # its own: the graph that kept it open went when the capture failed
del pool
gc.collect()
""")


@pytest.mark.gpu
def test_mem_pool_is_kept_alive() -> None:
    """A ``MemPool`` that the caller drops lives as long as what was captured in it; else the process would end."""
    run_alone("""
import gc, torch
from breakable_backend import BreakableCUDAGraph, capture
torch.set_grad_enabled(False)
x = torch.randn(1 << 20, device="cuda")
for end in ("reset", "drop", "exit"):
    graph = BreakableCUDAGraph(pool=torch.cuda.MemPool())
    for _ in range(2):
        with capture(graph):
            y = x + 1
        x.add_(1)
        graph.replay()
        assert torch.equal(y, x + 1)
    if end == "reset":
        del y
        graph.reset()
    if end != "exit":
        del graph
        gc.collect()
""")
