"""How a process ends: with graphs alive, threads in a replay, a capture that failed; and what an error of the device says.

Each is a process of its own, since one of them is all that a lost device leaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, ReplayError, capture, eager_on_graph
from breakable_backend.calling.device_errors import blame, segments
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.failure_kinds import is_device_error
from checks import compile_both

ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
"""What torch says below the first line, whatever the error is."""
ASSERTED = "CUDA error: device-side assert triggered" + ADVICE

HEAD = """
import logging, sys, threading, time
import torch
from torch.nn.functional import dropout
import breakable_backend as bb
torch.set_grad_enabled(False)
logging.disable(logging.WARNING)
D = torch.device("cuda")

@torch.library.custom_op("end::twice", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@torch.library.custom_op("end::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.synchronize()
    return x + 1

twice.register_fake(torch.empty_like)
waits.register_fake(torch.empty_like)

def compiled(f):
    return torch.compile(f, backend="breakable_cg", options={"driver": "cuda"})

x = torch.randn(64, 64, device=D)
f = compiled(lambda x: twice((x @ x).sin() + 1).cos() * 2 + dropout(x, 0.5))
for _ in range(4):
    f(x)

def in_threads(work):
    def loop():
        with torch.no_grad():
            while True:
                work()
    for _ in range(3):
        threading.Thread(target=loop, daemon=True).start()
    time.sleep(1)

def by_hand():
    graph = bb.BreakableCUDAGraph()
    with bb.capture(graph):
        y = dropout(x, 0.5)
    graph.replay()
"""

ENDS = {
    "a capture of a compiled function failed": """
g = compiled(lambda x: waits(x.sin() + 1).cos() + torch.rand_like(x))
for _ in range(4):
    g(x), f(x)
""",
    "a capture by hand failed": """
graph = bb.BreakableCUDAGraph()
try:
    with bb.capture(graph):
        y = x + 1
        torch.cuda.synchronize()
except bb.CaptureError:
    f(x), by_hand()
""",
    "graphs are alive": """
graph = bb.BreakableCUDAGraph()
with bb.capture(graph):
    y = dropout(x, 0.5)
""",
    "daemon threads replay": "in_threads(lambda: f(x))",
    "daemon threads capture": "in_threads(by_hand)",
    "it ends inside a capture": """
with bb.capture(bb.BreakableCUDAGraph()):
    y = dropout(x, 0.5)
    sys.exit()
""",
}


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` after :data:`HEAD` in a process of its own."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEAD + code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("how", ENDS)
def test_ends_quietly(how: str) -> None:
    """A process ends with status 0 and without a word, whatever its graphs and daemon threads are at."""
    done = process(ENDS[how])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


LOST = """
table, good = torch.randn(8, 4, device=D), torch.zeros(4, dtype=torch.long, device=D)
bad = good + 100

def gathered(index):
    return twice(table[index] * 2 + 1) + 1

g = compiled(gathered)
for _ in range(4):
    g(good)
texts = []
for call in range(4):
    try:
        g(bad if call == 0 else good)
    except Exception as error:
        texts.append(type(error).__name__ + ": " + str(error) + " ".join(getattr(error, "__notes__", [])))
    time.sleep(0.5)
print(texts[0])
print("-----")
print(texts[-1])
"""


@pytest.mark.gpu
def test_a_lost_device_names_the_segments() -> None:
    """An assertion that fails in a replay names the segments that were launched and the way to find it; later calls say why."""
    done = process(LOST)
    assert done.returncode == 0, done.stderr
    first, later = done.stdout.split("-----\n")
    assert "the GPU is lost to this process" in first and "device-side assert triggered" in first
    assert "graph 1 launched" in first and "step 0: aten::index, aten::mul, aten::add" in first
    assert "CUDA_LAUNCH_BLOCKING=1" in first and "compute-sanitizer" in first
    assert later.startswith("ReplayError: the GPU is lost to this process")


def test_device_errors_are_told_from_others() -> None:
    """Only what loses the device to the process counts, be it torch's error or that of a launch."""
    lost = ReplayError("cudaGraphLaunch failed: an illegal memory access was encountered")
    assert is_device_error(torch.AcceleratorError(ASSERTED)) and is_device_error(lost)
    others = [
        torch.AcceleratorError("CUDA error: invalid configuration argument" + ADVICE),
        ReplayError("cudaGraphLaunch failed: invalid resource handle"),
        ReplayError("an assert"),
        AssertionError("device-side assert triggered"),
    ]
    assert not any(map(is_device_error, others))


def test_an_eager_steps_error_of_the_device_is_the_same_object() -> None:
    """What an eager step raises stays the object that it is; a note names the segments before it, and the debug mode."""
    planted: list[Exception] = []

    @eager_on_graph
    def step(x: Tensor) -> Tensor:
        if planted:
            raise planted[0]
        return x + 1

    def function(x: Tensor) -> Tensor:
        return step(x.sin() * 2) * 3

    compiled, _ = compile_both(function, {"driver": "tape"})
    graph, x = BreakableCUDAGraph(driver="tape"), torch.ones(4)
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        with capture(graph):
            function(x)
        for call in (lambda: compiled(x), graph.replay):
            planted[:] = [torch.AcceleratorError(ASSERTED)]
            with pytest.raises(torch.AcceleratorError) as caught:
                call()
            assert caught.value is planted[0]
            (note,) = caught.value.__notes__
            assert "the GPU is lost to this process" in note and "CUDA_LAUNCH_BLOCKING=1" in note
            assert "aten::sin" in note and "return step(x.sin() * 2) * 3" in note
            planted[:] = [KeyError("mine")]
            with pytest.raises(KeyError) as other:
                call()
            assert other.value is planted[0] and not hasattr(other.value, "__notes__")


def test_a_launch_that_fails_is_a_typed_error() -> None:
    """A launch on a lost device is a ReplayError with the segments of the recording, and the driver is told."""
    graph = BreakableCUDAGraph(driver="tape")
    with torch.no_grad(), capture(graph):
        silly.triple(torch.ones(3) + 1)
    assert graph.recording is not None
    told: list[str] = []
    driver = TapeDriver(torch.device("cpu"))
    driver.give_up = told.append  # type: ignore[method-assign]
    error = ReplayError("cudaGraphLaunch failed: unspecified launch failure")
    with pytest.raises(
        ReplayError, match=r"(?s)the GPU is lost.*capture 7 launched.*step 0: aten::ones.*at "
    ) as caught:
        blame(error, driver, "capture 7", [graph.recording])
    assert caught.value.__cause__ is error
    assert told == ["the GPU is lost to this process: cudaGraphLaunch failed: unspecified launch failure"]
    assert len(list(segments(graph.recording))) == 2


FREED = """
import ctypes, gc, weakref
import torch
from breakable_backend import _torch
if _torch.may_use_freed_guards():
    torch._dynamo.config.use_recursive_dict_tags_for_guards = False
libc = ctypes.CDLL(None)
libc.calloc.restype, libc.calloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2

class Inner(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

class Outer(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.inner = Inner(factor)
    def forward(self, x):
        return x * self.inner.factor

one, other = Outer(1), Outer(2)
compiled = torch.compile(lambda module, x: module(x), backend="eager")
for module in (one, one, one, other, other):
    compiled(module, torch.ones(2))
torch._dynamo.reset()
del compiled
weakref.finalize._exitfunc()  # as Python does at its end
gc.collect()
held = [(libc.calloc(1, size), size) for size in range(64, 1100, 8) for _ in range(60)]
one.factor = one.inner.factor = 3
print([size for memory, size in held if any(ctypes.string_at(memory, size))])
"""


def test_no_guards_are_used_that_are_freed() -> None:
    """With what the tests set, Dynamo writes to no guards that it has freed: else processes crash as they end, on torch 2.11."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FREED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
