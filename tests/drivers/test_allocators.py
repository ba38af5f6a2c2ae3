"""The settings of torch's allocator: which of them graphs work under, and which are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAD = """
import breakable_backend as bb, torch
"""
PROGRAM = """
torch.set_grad_enabled(False)
@torch.library.custom_op("allocators::triple", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3
triple.register_fake(torch.empty_like)
if fraction:
    torch.cuda.set_per_process_memory_fraction(fraction)
model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)).cuda()
def function(x):
    return model(triple(model(x))) + torch.nn.functional.dropout(x, 0.5)
compiled = torch.compile(function, backend="breakable_cg", dynamic=True, options={"max_recordings": 3})
churn = []
for size in [2, 3, 4, 5] * 3 + [6] * 9 + [2, 6, 3] * 4:
    x = torch.randn(size * 100, 512, device="cuda")
    churn = [*churn[-20:], torch.full((size * 10_000,), float("nan"), device="cuda")]
    seed = size
    torch.manual_seed(seed); got = compiled(x)
    torch.manual_seed(seed); want = function(x)
    assert torch.equal(got, want), size
    if size == 5:
        del churn[:]
        torch.cuda.empty_cache()
(program,) = bb.explain(compiled).programs
assert program.replays >= 10 and program.num_graph_segments == 2, program
graph, y = bb.BreakableCUDAGraph(), torch.randn(100, 512, device="cuda")
with bb.capture(graph):
    z = triple(model(y)) + 1
for _ in range(4):
    y.normal_()
    graph.replay()
    assert torch.equal(z, triple(model(y)) + 1)
graph.reset()
bb.reset(compiled)
assert bb.explain(compiled).programs[0].pool_bytes == 0
print("right")
"""


def process(code: str, setting: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process whose allocator has ``setting``."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
    environment = {**{key: value for key, value in os.environ.items() if key not in names}, "PYTHONPATH": path}
    if setting:
        environment[names[1]] = setting
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HEAD + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "fraction"),
    [
        ("", 0),
        ("expandable_segments:True", 0),
        ("max_split_size_mb:32,garbage_collection_threshold:0.6", 0),
        ("roundup_power2_divisions:4", 0),
        ("expandable_segments:True", 0.1),
        ("", 0.1),
    ],
)
def test_settings(setting: str, fraction: float) -> None:
    """Lines 3 and 10: results are eager's, and the memory of pools comes back, under each setting of torch's allocator."""
    done = process(f"fraction = {fraction}\n{PROGRAM}", setting)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.gpu
def test_the_asynchronous_allocator_is_refused() -> None:
    """Line 9: under CUDA's own allocator a compiled function is a typed error that says what to take out."""
    setting = "backend:cudaMallocAsync"
    code = """
x = torch.ones(2, device="cuda")
try:
    torch.compile(lambda x: x.sin() + 1, backend="breakable_cg")(x)
except bb.OptionsError as error:
    print(error.fix)
"""
    done = process(code, setting)
    assert (done.returncode, done.stdout.partition(" of")[0]) == (0, f"take {setting} out"), done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["", "expandable_segments:True"])
def test_results_outlive_their_pool(setting: str) -> None:
    """Line 10: a static result that outlives all graphs of its pool, and each cached block, is memory until it dies."""
    code = """
import gc
torch.set_grad_enabled(False)
compiled = torch.compile(lambda x: x.sin().sum().expand(4_500_000) * 2, backend="breakable_cg", options={"outputs": "static"})
x = torch.rand(25_000_000, device="cuda")
for _ in range(4):
    result = compiled(x)
want = result.clone()
bb.reset(compiled)
torch.compiler.reset()
torch.cuda.empty_cache()
junk = [bytearray(size) for size in range(100, 600, 8) for _ in range(200)]
assert torch.equal(result, want)
del result
gc.collect()
x = [torch.ones(2_000_000, device="cuda") for _ in range(20)]
del x
torch.cuda.empty_cache()
reserved = torch.cuda.memory_reserved()
again = bb.BreakableCUDAGraph()
with bb.capture(again):
    y = want * 2
again.reset()
del y
gc.collect()
torch.cuda.empty_cache()
assert torch.cuda.memory_reserved() <= reserved
print("right")
"""
    done = process(code, setting)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


TRAINING = """
import gc
from breakable_backend.recordings import large_results
large_results.LARGE = 1  # results of any size leave their graph by themselves
model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)).cuda()
compiled, parameters, kept = torch.compile(model, backend="breakable_cg"), list(model.parameters()), []
def same(x, loss):
    mine, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(model(x).square().sum(), parameters)
    kept[:] = [*kept[-2:], (mine, theirs)]
    assert all(torch.equal(one, other) for pair in kept for one, other in zip(*pair))
for step in range(20):
    if step == 9 and switch:
        torch.cuda.empty_cache()
        torch.cuda.memory._set_allocator_settings(switch)
    x = torch.randn(64, 512, device="cuda")
    same(x, compiled(x).square().sum())
backward = bb.explain(compiled).programs[1]
assert backward.replays >= 12, backward
pending = compiled(x).square().sum()
bb.reset(compiled)
gc.collect()
torch.cuda.empty_cache()
junk = [torch.full((1 << 18,), torch.nan, device="cuda") for _ in range(64)]
same(x, pending)
print("right")
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("setting", "switch"),
    [
        ("", ""),
        ("expandable_segments:True", ""),
        ("", "expandable_segments:True"),
        ("expandable_segments:True", "expandable_segments:False"),
    ],
)
def test_training(setting: str, switch: str) -> None:
    """Lines 3, 4 and 9: what leaves a graph is right, and stays, also where the settings change."""
    done = process(f"switch = {switch!r}\n{TRAINING}", setting)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["expandable_segments:True", "expandable_segments:False"])
def test_eager_results_of_another_kind(setting: str) -> None:
    """Line 4: graphs copy what eager steps give them, of whatever kind, and from where it lies already."""
    code = f"""
torch.set_grad_enabled(False)
@bb.eager_on_graph
def turned(x, y):
    return x.flip(0), y.mul_(2)
def model(x):
    a, b = turned(x * 2, x * 3)
    return (a + b).sin()
compiled = torch.compile(model, backend="breakable_cg")
for step in range(20):
    if step == 9:
        torch.cuda.empty_cache()
        torch.cuda.memory._set_allocator_settings({setting!r})
    x = torch.rand(300 + step % 3, 2000, device="cuda")[:300]
    held = torch.rand(300, 2000, device="cuda") if step % 2 else None
    assert torch.equal(compiled(x), model(x)), step
assert bb.explain(compiled).programs[0].replays >= 12
print("right")
"""
    other = "False" if setting.endswith("True") else "True"
    done = process(code, f"expandable_segments:{other}")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
