"""Reports while others call, contexts that outlive a call, and processes forked in one."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import breakable_backend
import fresh
import silly
from breakable_backend import capture, eager_on_graph, explain, export, is_capturing
from breakable_backend.calling.registry import executors_of
from checks import assert_same, compile_both


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def visiting() -> Iterator[Callable[[Callable[[Tensor], Tensor]], None]]:
    """Sets what ``silly.visit``, an eager step, does."""
    yield lambda function: silly.hooks.__setitem__("visit", function)
    silly.hooks.clear()


# --- reports ------------------------------------------------------------------------------------------------------------


def test_reports_while_others_call(
    device: torch.device, options: dict[str, Any], quick_switches: None, tmp_path: Path
) -> None:
    """``explain``, ``export`` and ``reset`` may be called from any thread while others call, record and evict."""
    compiled = torch.compile(
        lambda x: (x.sin() + 1).cos() * 2,
        backend="breakable_cg",
        options={**options, "max_recordings": 64},
        dynamic=True,
    )
    looks: list[Callable[[], Any]] = [
        lambda: str(explain(compiled)),
        lambda: explain().to_json(),
        lambda: export(compiled, tmp_path / "files"),
        lambda: (time.sleep(0.3), breakable_backend.reset(compiled)),
    ]
    errors: list[BaseException] = []
    done = threading.Event()

    def look(how: Callable[[], Any]) -> None:
        while not done.is_set() and not errors:
            try:
                how()
            except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
                errors.append(error)

    def call(number: int) -> Tensor:
        with torch.no_grad():
            return compiled(torch.full((2 + number % 29,), 0.5, device=device))

    for number in range(29 * 3):
        call(number)
    (executor,) = executors_of(compiled)
    looks.append(lambda: [executor.snapshot() for _ in range(50)])
    threads = [threading.Thread(target=look, args=(how,)) for how in looks]
    for thread in threads:
        thread.start()
    try:
        for number in range(600):
            if errors:
                break
            assert call(number).shape == (2 + number % 29,)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    assert explain(compiled).programs[0].calls >= 600


def test_measuring_while_others_call(device: torch.device, options: dict[str, Any]) -> None:
    """``explain(measure=True)`` from another thread measures what is recorded, while calls go on."""
    compiled = torch.compile(lambda x: x.sin() * 2, backend="breakable_cg", options=options, dynamic=True)
    found: list[Any] = []

    def measure() -> None:
        try:
            found.append(explain(compiled, measure=True).programs[0].recordings[0].measured)
        except BaseException as error:  # noqa: BLE001 - told by the assertion
            found.append(error)

    def call(size: int) -> None:
        with torch.no_grad():
            compiled(torch.ones(size, device=device))

    for _ in range(3):
        call(3)
    thread = threading.Thread(target=measure)
    thread.start()
    size = 4
    while thread.is_alive():
        call(size)
        size = 4 + size % 7
    thread.join()
    (measured,) = found
    assert measured.total_us > 0, measured


def test_a_report_does_not_wait_for_a_call(
    device: torch.device, options: dict[str, Any], visiting: Callable[[Any], None]
) -> None:
    """A report is made while another thread is inside of a call, which may take as long as it likes."""
    compiled, _ = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    inside, over = threading.Event(), threading.Event()

    def visit(y: Tensor) -> Tensor:
        inside.set()
        assert over.wait(8)
        return y + 1

    def call() -> None:
        with torch.no_grad():
            compiled(torch.ones(3, device=device))

    over.set()
    visiting(visit)
    for _ in range(3):
        call()
    over.clear()
    inside.clear()
    thread = threading.Thread(target=call)
    thread.start()
    try:
        assert inside.wait(60)
        started = time.monotonic()
        assert explain(compiled).programs[0].replays >= 1
        assert time.monotonic() - started < 4
        assert thread.is_alive()
    finally:
        over.set()
        thread.join()


# --- contexts -----------------------------------------------------------------------------------------------------------


def test_a_context_copied_in_an_eager_step(
    device: torch.device, options: dict[str, Any], visiting: Callable[[Any], None]
) -> None:
    """Code that later runs in a context copied inside of an eager step is captured like other code."""
    compiled, _ = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    other, eager = compile_both(lambda x: (x.sin() + 1) * 2, options)
    kept: list[contextvars.Context] = []
    visiting(lambda y: (kept.append(contextvars.copy_context()), y + 1)[1])
    x = torch.ones(3, device=device)
    with torch.no_grad():
        for _ in range(4):
            compiled(x)
        for _ in range(5):
            assert_same(kept[-1].run(other, x), eager(x))
    assert explain(other).programs[0].replays == 3


def test_a_thread_with_the_context_of_an_eager_step(
    device: torch.device, options: dict[str, Any], visiting: Callable[[Any], None]
) -> None:
    """A call that an eager step waits for, in another thread with a copy of its context, runs plainly, at once."""
    compiled, _ = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    other, eager = compile_both(lambda x: (x.sin() + 1) * 2, options)
    x = torch.ones(3, device=device)
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(other(x))

    def visit(y: Tensor) -> Tensor:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(call,))
        thread.start()
        thread.join()
        return y + 1

    with torch.no_grad():
        other(x)
        visiting(visit)
        started = time.monotonic()
        for _ in range(3):
            compiled(x)
        assert time.monotonic() - started < 4 + 3  # less than it would wait for the pool, three times
        for result in results:
            assert_same(result, eager(x))
    assert explain(other).programs[0].plain_calls["called inside an eager step"] == 3


def test_another_context_in_an_eager_step(
    device: torch.device, options: dict[str, Any], visiting: Callable[[Any], None]
) -> None:
    """A call in an eager step that runs in a context of its own is plain too: the outer call's bridges keep what they hold."""
    level = [0]

    def visit(y: Tensor) -> Tensor:
        if level[0]:
            return y + 1
        level[0] = 1
        try:
            inner = contextvars.Context().run(compiled, y * 10)
        finally:
            level[0] = 0
        return y + 1 + 0 * inner

    compiled, eager = compile_both(lambda x: silly.visit(x + 1) * 2 + x, options)
    with torch.no_grad():
        visiting(lambda y: y + 1)
        for _ in range(3):
            compiled(torch.ones(3, device=device))
        for _ in range(3):
            x = torch.rand(3, device=device)
            visiting(visit)
            got = compiled(x)
            visiting(lambda y: y + 1)
            assert_same(got, eager(x))


def test_a_context_copied_inside_a_capture(make: Callable[..., Any], device: torch.device) -> None:
    """After a capture, a context that was copied in it knows nothing of it: what runs there is plain, or captured anew."""
    contexts = []

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        contexts.append(contextvars.copy_context())
        return x + 1

    x, graph, later = torch.ones(3, device=device), make(), make()
    with capture(graph):
        y = step(x * 2) * 3
        contexts.append(contextvars.copy_context())

    def run() -> Tensor:
        assert not is_capturing()
        assert_same(step(x), x + 1)
        with capture(later):
            return step(x * 5) * 2

    for context in contexts[:2]:
        assert_same(context.run(run), torch.full((3,), 12.0, device=device))
    x.fill_(2)
    graph.replay()
    assert_same(y, torch.full((3,), 15.0, device=device))


def test_a_thread_with_the_context_of_a_capture(make: Callable[..., Any], device: torch.device) -> None:
    """Another thread is not in the capture whose context it runs in: a marked function there is the function."""
    seen: list[Any] = []

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        return x + 1

    def run() -> None:
        seen.append(is_capturing())
        seen.append(step(1.0))

    x, graph = torch.ones(3, device=device), make()
    with capture(graph):
        y = x * 2
        thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
        thread.start()
        thread.join()
        y = y + 1
    assert seen == [False, 2.0]
    graph.replay()
    assert_same(y, torch.full((3,), 3.0, device=device))


# --- forks --------------------------------------------------------------------------------------------------------------

FORKED = """
import gc, os, sys, threading, time, warnings
import torch
import breakable_backend
from breakable_backend import eager_on_graph, explain

# Python 3.12 warns of every fork in a process with threads, which is what is tried here.
warnings.filterwarnings("ignore", "This process", DeprecationWarning)
inside, over = threading.Event(), threading.Event()


@eager_on_graph(fake=lambda x: x + 1)
def pause(x):
    if over.is_set():
        return x + 1
    inside.set()
    over.wait(30)
    return x + 1


@eager_on_graph(fake=lambda x: x + 1)
def fork(x):
    global child
    if child is None:
        child = os.fork()
    return x + 1


def compiled(function):
    return torch.compile(function, backend="breakable_cg", options={"driver": "tape", "min_kernels": 1})


def call(function, times):
    with torch.no_grad():
        return [function(torch.ones(3)).tolist() for _ in range(times)]


child = None
threshold = gc.get_threshold()
slow, forking, other = compiled(lambda x: pause(x.sin() * 2) * 2), compiled(lambda x: fork(x * 2) * 2), compiled(lambda x: x * 3 + 1)
call(other, 3)
over.set()
call(slow, CALLS_BEFORE)
over.clear()
thread = threading.Thread(target=call, args=(slow, 1))
if WHERE == "while another thread calls":
    thread.start()
    inside.wait(30)
    child = os.fork()
else:
    assert call(forking, 3) == [[6.0] * 3] * 3
if child == 0:
    over.set()
    started = time.monotonic()
    assert call(other, 4) == [[4.0] * 3] * 4
    assert call(forking, 3) == [[6.0] * 3] * 3
    assert explain(other).programs[0].replays >= 2
    assert gc.get_threshold() == threshold
    breakable_backend.reset()
    assert time.monotonic() - started < 4.5, "it waited for a lock that nobody releases"
    sys.exit(0)
over.set()
if thread.ident is not None:
    thread.join()
_, status = os.waitpid(child, 0)
assert call(other, 2) == [[4.0] * 3] * 2
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    ("where", "calls_before"),
    [("in an eager step", 0), ("while another thread calls", 1), ("while another thread calls", 2)],
    ids=["in a step", "in a recording", "in a replay"],
)
def test_a_forked_child(where: str, calls_before: int) -> None:
    """A child that was forked during a plain call, a recording or a replay calls and resets without waiting, and ends quietly."""
    source = FORKED.replace("CALLS_BEFORE", str(calls_before)).replace("WHERE", repr(where))
    ended = fresh.python(source)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr


# --- the end of a process -----------------------------------------------------------------------------------------------

ENDING = """
import threading
import torch
from breakable_backend import BreakableCUDAGraph, CaptureError, capture, eager_on_graph, explain


@eager_on_graph
def plus_one(x):
    return x + 1


def call(times):
    with torch.no_grad():
        while times:
            compiled(torch.ones(3))
            times -= 1


model = torch.nn.Linear(3, 3)
compiled = torch.compile(lambda x: plus_one(model(x)) * 2, backend="breakable_cg", options={"driver": "tape"})
call(4)
graph = BreakableCUDAGraph(driver="tape")
with torch.no_grad(), capture(graph):
    y = plus_one(model(torch.ones(3))) * 2
graph.replay()
str(explain(compiled))
"""

ENDS = {
    "all alive": "",
    "a cycle around all": "compiled.itself, graph.itself = [compiled, graph], [compiled, graph]",
    "daemon threads that have called": (
        "called = threading.Barrier(3)\n"
        "def idle(): call(3); called.wait(); threading.Event().wait()\n"
        "[threading.Thread(target=idle, daemon=True).start() for _ in range(2)]\n"
        "called.wait()"
    ),
    "a failed capture": (
        "broken = BreakableCUDAGraph(driver='tape')\n"
        "try:\n    with capture(broken): (torch.ones(3) * 2).sum().item()\n"
        "except CaptureError: pass"
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_ends_quietly(how: str) -> None:
    """A process that ends with compiled functions, captures and threads alive says nothing, and its exit code is 0."""
    ended = fresh.python(ENDING + ENDS[how])
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", ""), ended.stderr
