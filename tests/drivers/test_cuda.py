"""What only a GPU shows: pool reuse, memory returned, streams and threads, failed captures, kernels chosen as in eager."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import breakable_backend
from breakable_backend import (
    BreakableCUDAGraph,
    CaptureError,
    capture,
    eager_on_graph,
    explain,
    reset,
)
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers.cuda import CudaDriver, _Leaving
from gpu import compiled, limited, settled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]
CUDA = torch.device("cuda")


@torch.library.custom_op("test_cuda::double", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def double(x: torch.Tensor) -> torch.Tensor:
    """Twice ``x``: an eager step."""
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("test_cuda::waits", mutates_args=())
def waits(x: torch.Tensor) -> torch.Tensor:
    """One more than ``x``, after a synchronisation that no rule knows."""
    torch.cuda.synchronize()
    return x + 1


@waits.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Block(nn.Module):
    """Linear, an eager break, Linear: two captured segments for each block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.inner(x))
        return x + torch.tanh(self.outer(torch.ops.test_cuda.double(hidden)))


def stack(width: int = 64, depth: int = 3) -> nn.Module:
    return nn.Sequential(*[Block(width) for _ in range(depth)]).to(CUDA)


def churn() -> None:
    """Take and give back memory of many sizes, and fill it, so that whatever was freed too early changes."""
    held = [torch.full((size,), float("nan"), device=CUDA) for size in (7, 513, 4096, 70_000, 1_000_000)]
    del held[::2]
    held += [torch.full((size,), float("nan"), device=CUDA) for size in (11, 2048, 300_000)]


def test_memory_between_captures_is_not_filled() -> None:
    """Line 3: deterministic algorithms fill no memory of the pool on the capture stream, for which no launch waits."""
    driver, filled = CudaDriver(CUDA), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    stream = driver.begin()
    try:
        with driver.lock, driver.recording():
            with driver.allocating():
                first = torch.zeros(1 << 20, device=CUDA)
            place = first.data_ptr()
            torch.cuda.synchronize()
            del first
            with driver.allocating():
                second = torch.empty(1 << 20, device=CUDA)
            torch.cuda.synchronize()
            assert second.data_ptr() == place
            assert not second.isnan().any()
            del second
        assert torch.empty(4, device=CUDA).isnan().all()
    finally:
        torch.use_deterministic_algorithms(filled)
        driver.end(stream)
        driver.release(())


def test_pool_reuse_across_keys() -> None:
    """Keys recorded from large to small in one pool replay exactly, in any order, however the allocator is used between.

    The peers' open bug: a value that crosses an eager break was re-used by a smaller recording in the same pool.
    """
    model = stack()
    function = compiled(model)

    def batch(size: int) -> torch.Tensor:
        x = torch.randn(size, 64, device=CUDA)
        torch._dynamo.mark_dynamic(x, 0)
        return x

    sizes = [512, 256, 96, 32, 8]
    for size in sizes:
        for _ in range(2):
            x = batch(size)
            assert torch.equal(function(x), model(x))
            churn()
    for size in [8, 512, 32, 256, 8, 96, 512, 512, 8]:
        x = batch(size)
        want = model(x)
        churn()
        got = function(x)
        churn()
        assert torch.equal(got, want)
    (program,) = explain(function).programs
    assert len(program.recordings) == len(sizes)
    # what is before, between and behind the breaks of 3 blocks: depth + 1 captured segments for each key
    assert program.captures == len(sizes) * (3 + 1)


def test_no_leak_over_rounds() -> None:
    """Allocated and reserved bytes are the same after rounds 10 and 50 of compile, run and reset."""
    model = stack(32, 2)
    x = torch.randn(4, 32, device=CUDA)
    measured = {}
    for round_ in range(1, 51):
        function = compiled(model)
        for _ in range(3):
            function(x)
        (executor,) = executors_of(function)
        assert executor.driver.live_graphs() > 0
        driver = executor.driver
        del executor, function
        torch._dynamo.reset()
        gc.collect()
        assert driver.live_blocks() == 0 and driver.pool_bytes() == 0
        measured[round_] = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    assert measured[10] == measured[50]


def test_what_is_freed_may_free_more() -> None:
    """What a recording owned may free another recording as it goes: all go, and nothing is raised."""
    driver = CudaDriver(torch.device("cuda", 0))

    class Frees:
        def __del__(self) -> None:
            driver.release(())

    driver._leaving.extend([_Leaving((), [Frees()], False), _Leaving((), [object()], False)])
    driver.release(())
    assert not driver._leaving


def test_dropping_a_model_frees_everything() -> None:
    """A dropped model takes its weights, its graphs and their pool with it, though Dynamo keeps the compiled function."""
    first = compiled(lambda x: x + 1)
    for _ in range(2):
        first(
            torch.zeros(4, device=CUDA)
        )  # the generator's seed and offset are there for ever once something is captured
    del first
    breakable_backend.reset()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = stack(256, 2)
    function = compiled(model)
    x = torch.randn(4, 256, device=CUDA)
    for _ in range(4):
        function(x)
    driver = executors_of(function)[0].driver
    weight = weakref.ref(model[0].inner.weight)
    assert driver.live_graphs() > 0
    del model, function, x
    gc.collect()
    assert weight() is None
    assert settled(driver)
    # What is left is what cuBLAS keeps for the default stream.
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("prepare", ["recorded", "cold"])
def test_threads_and_streams(prepare: str) -> None:
    """Eight threads on two streams with different keys and large intermediates get exact results, unsynchronised."""
    model = stack(256, 2)
    function = compiled(model)
    inputs = [torch.randn(256 * (1 + index % 4), 256, device=CUDA) for index in range(8)]
    wanted = [model(x) for x in inputs]
    for _ in range(3 if prepare == "recorded" else 1):
        for x in inputs[:4]:
            function(x)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(streams[index % 2]):
                for _ in range(25):
                    got = function(inputs[index])
                    if not torch.equal(got, wanted[index]):
                        wrong.append(index)
        except BaseException as error:  # noqa: BLE001 - a thread's error must reach the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert wrong == []


def test_streams_are_ordered_by_events() -> None:
    """A call on one stream waits on the GPU for the call before it on another, since both use the same memory."""
    model = stack(1024, 4)
    function = compiled(model)
    small = torch.randn(4096, 1024, device=CUDA)
    want = model(small)
    for _ in range(3):
        function(small)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(first):
            torch.cuda._sleep(2_000_000)
            one = function(small)
        with torch.cuda.stream(second):
            two = function(small)
        torch.cuda.synchronize()
        assert torch.equal(one, want) and torch.equal(two, want)


def test_hidden_synchronisation_runs_eagerly() -> None:
    """An op that no rule knows and that fails under capture runs eagerly from then on; other segments stay captured."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.test_cuda.double((x.sin() + 1).cos() * 3)
        z = torch.ops.test_cuda.waits((y + torch.rand_like(y)).exp())
        return torch.ops.test_cuda.double(z * 2 - 1).sin() + torch.rand_like(x)

    ours = compiled(function)
    for call in range(6):
        x = torch.randn(16, device=CUDA)
        torch.manual_seed(call)
        want, state = function(x), torch.cuda.get_rng_state()
        torch.manual_seed(call)
        assert torch.equal(ours(x), want)
        assert torch.equal(torch.cuda.get_rng_state(), state)
    (program,) = explain(ours).programs
    assert program.num_graph_segments == 4  # around the two doubles, and around what waits between them
    assert [reason.rule for reason in program.reasons].count("capture_failed") == 1
    assert "capturing" in next(reason.text for reason in program.reasons if reason.rule == "capture_failed")
    assert program.replays == 4  # 6 calls less the plain one and the recording one
    later = compiled(lambda x: (x.cos() + 1) * torch.rand_like(x))
    for call in range(4):
        torch.manual_seed(call)
        got = later(x)
        torch.manual_seed(call)
        assert torch.equal(got, (x.cos() + 1) * torch.rand_like(x))


def test_random_graphs_survive_a_failed_capture() -> None:
    """What was recorded before a capture that fails draws eager's numbers afterwards, from any seed."""
    drops = compiled(lambda x: functional.dropout(x.sin() + 1, 0.5) * 2)
    x = torch.randn(64, device=CUDA)
    for _ in range(4):
        drops(x)
    fails = compiled(lambda x: torch.ops.test_cuda.waits(x.sin() + 1).cos() + torch.rand_like(x))
    for _ in range(3):
        fails(x)
    assert "capture_failed" in {reason.rule for reason in explain(fails).programs[0].reasons}
    for seed in range(4):
        torch.manual_seed(seed)
        want = [functional.dropout(x.sin() + 1, 0.5) * 2 for _ in range(2)]
        state = torch.cuda.get_rng_state()
        torch.manual_seed(seed)
        assert all(torch.equal(drops(x), one) for one in want)
        assert torch.equal(torch.cuda.get_rng_state(), state)


def test_random_offset_of_a_recording_is_ordered() -> None:
    """A recording call draws eager's numbers however late the capture stream gets to run."""
    ours = compiled(lambda x: functional.dropout(x.sin() + 1, 0.5) * 2)
    x = torch.randn(64, device=CUDA)
    ours(x)
    driver = executors_of(ours)[0].driver
    with torch.cuda.stream(driver.stream):  # type: ignore[attr-defined]
        torch.cuda._sleep(20_000_000)
    torch.manual_seed(7)
    torch.rand(3, device=CUDA)
    got = ours(x)
    torch.manual_seed(7)
    torch.rand(3, device=CUDA)
    assert torch.equal(got, functional.dropout(x.sin() + 1, 0.5) * 2)


def test_failed_capture_is_an_error_on_request() -> None:
    """With ``auto_break=False`` a capture that fails raises, and the next plain use of the GPU works."""
    ours = compiled(lambda x: torch.ops.test_cuda.waits(x.sin() + 1).cos(), auto_break=False)
    x = torch.randn(4, device=CUDA)
    ours(x)
    with pytest.raises(CaptureError, match="capturing"):
        ours(x)
    assert torch.rand(4, device=CUDA).sum().item() >= 0


def test_failed_captures_leave_no_memory() -> None:
    """The pool of a failed capture goes when nothing else uses it."""
    x = torch.randn(1000, 1000, device=CUDA)
    reserved = []
    for _ in range(4):
        ours = compiled(lambda x: torch.ops.test_cuda.waits((x + 1).cos()).sin() + 1)
        for _ in range(3):
            ours(x)
        del ours
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[3]


def test_out_of_memory_in_capture() -> None:
    """A segment that runs out of memory under capture runs eagerly in the same call, if eager has the memory."""
    total = 8 << 30
    width = int(total * 0.3 / 4)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.test_cuda.double((x.expand(width) + 1).sum() * 2 + x).cos() + 1

    ours = compiled(function)
    x = torch.randn(1, device=CUDA)
    with limited(total):
        want = function(x)
        torch.cuda.empty_cache()
        ours(x)
        hog = torch.empty(int(total * 0.55), dtype=torch.uint8, device=CUDA)
        del hog  # cached: eager may use it again, the pool may not, until it is given back
        for _ in range(3):
            assert torch.equal(ours(x), want)


def test_inside_a_foreign_capture() -> None:
    """Inside somebody else's capture a program without eager steps is captured along; one with is an error."""
    plain, broken = compiled(lambda x: (x.sin() + 1).cos()), compiled(stack(64, 1))
    x, y = torch.randn(8, device=CUDA), torch.randn(4, 64, device=CUDA)
    for _ in range(3):
        plain(x), broken(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plain(x)
    x.fill_(2.0)
    graph.replay()
    assert torch.equal(out, (x.sin() + 1).cos())
    other = torch.cuda.CUDAGraph()
    with pytest.raises(
        CaptureError, match=r"inside another CUDA graph capture, but has an eager step: test_cuda::double"
    ):
        with torch.cuda.graph(other):
            x + 1
            broken(y)
    assert explain(plain).programs[0].plain_calls["called inside another capture"] == 1


def test_random_graphs_go_through_torch() -> None:
    """A segment that draws random numbers is replayed by torch; the others are launched directly."""
    ours = compiled(lambda x: torch.ops.test_cuda.double(functional.dropout(x.sin(), 0.5) + 1).cos() * 2 + 1)
    x = torch.randn(64, device=CUDA)
    for _ in range(3):
        ours(x)
    (executor,) = executors_of(ours)
    (entry,) = next(iter(executor.keys.sets.values())).entries.values()
    assert entry.recording is not None
    assert [graph.draws_random for graph in entry.recording.graphs] == [True, False]


def test_workspaces_cleared_by_others() -> None:
    """Replays stay exact when somebody else clears cuBLAS's workspaces and the memory is used again."""
    model = stack(512, 2).bfloat16()
    ours = compiled(model)
    x = torch.randn(64, 512, device=CUDA, dtype=torch.bfloat16)
    want = model(x)
    for _ in range(3):
        ours(x)
    torch._C._cuda_clearCublasWorkspaces()
    churn()
    for _ in range(3):
        assert torch.equal(ours(x), want)


def pools_in_use() -> set[tuple[int, int]]:
    """The pools of the allocator in which memory is allocated."""
    segments = torch.cuda.memory_snapshot()
    return {tuple(s["segment_pool_id"]) for s in segments if any(b["state"] == "active_allocated" for b in s["blocks"])}


def test_workspaces_of_a_failed_capture() -> None:
    """What is captured after a failed capture uses no workspace in the pool of that one: its memory goes."""
    driver, weight = CudaDriver(CUDA), torch.randn(512, 512, device=CUDA, dtype=torch.bfloat16)
    before = pools_in_use()
    with driver.lock, driver.recording():
        with pytest.raises(CaptureError):
            driver.capture(lambda: (weight @ weight).sum().item())
        graph, _ = driver.capture(lambda: weight @ weight)
        assert pools_in_use() - before == {driver._pool}
    driver.release([graph])


VISION: dict[str, Callable[[], nn.Module]] = {
    "conv batchnorm eval": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    ).eval(),
    "conv batchnorm train": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    "bicubic": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode="bicubic")),
    "bilinear": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode="bilinear")),
    "groupnorm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VISION)
def test_kernels_as_in_eager(name: str, dtype: torch.dtype) -> None:
    """Convolutions, norms and resampling run the kernels that eager runs, bit for bit, running statistics included."""
    torch.manual_seed(0)
    model = VISION[name]().to(CUDA, dtype)
    torch.manual_seed(0)
    twin = VISION[name]().to(CUDA, dtype)
    twin.load_state_dict(model.state_dict())
    ours = compiled(twin)
    for _ in range(5):
        x = torch.randn(2, 3, 16, 16, device=CUDA, dtype=dtype)
        assert torch.equal(ours(x), model(x))
    for mine, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert explain(ours).programs[0].replays == 3


@pytest.mark.parametrize("causal", [False, True])
def test_captured_attention(causal: bool) -> None:
    """Attention that is not marked is captured, and picks the kernel that eager picks."""
    ours = compiled(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=causal) + 1)
    for _ in range(5):
        q, k, v = (torch.randn(1, 8, 16, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
        want = functional.scaled_dot_product_attention(q, k, v, is_causal=causal) + 1
        assert torch.equal(ours(q, k, v), want)


def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    y = (x * scale + 1).sin()
    return torch.ops.test_cuda.double(y).cos() * 2 + x


def test_host_scalars_are_keyed_then_eager() -> None:
    """A float that varies is part of the key for a few values, then the ops that read it run eagerly: exact throughout."""
    ours = compiled(scaled)
    x = torch.randn(64, device=CUDA, dtype=torch.bfloat16)
    for scale in [1 / 3, 0.7, 0.7, 0.7, 1 / 3, 2.5, -1.25, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5]:
        assert torch.equal(ours(x, scale), scaled(x, scale))
    last = explain(ours).programs[-1]
    assert any("more than 4 values" in note for note in last.notes)
    assert {"host_read", "data_dependent"} <= {reason.rule for reason in last.reasons}


def test_host_scalars_on_the_device() -> None:
    """With ``scalars="device"`` one recording serves every value of a float."""
    ours = compiled(scaled, scalars="device")
    x = torch.randn(64, device=CUDA)
    for scale in [1 / 3, 0.7, 0.9, 2.5, -1.25, 0.1, 0.2]:
        torch.testing.assert_close(ours(x, scale), scaled(x, scale))
    last = explain(ours).programs[-1]
    assert len(last.recordings) == 1 and last.notes == ()


def test_capture_leaves_no_trace() -> None:
    """Recording leaves the current stream, Python's gc and the random state as they were."""
    ours = compiled(stack(32, 1))
    x = torch.randn(2, 32, device=CUDA)
    ours(x)
    stream, state, threshold = torch.cuda.current_stream(), torch.cuda.get_rng_state(), gc.get_threshold()
    ours(x)
    assert torch.cuda.current_stream() == stream and gc.isenabled() and gc.get_threshold() == threshold
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert not torch.cuda.is_current_stream_capturing()


def test_side_stream_of_the_caller() -> None:
    """A caller on a stream of its own needs no synchronisation with the stream of the recording."""
    model = stack(128, 2)
    ours = compiled(model)
    x = torch.randn(64, 128, device=CUDA)
    for _ in range(3):
        ours(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            x = torch.randn(64, 128, device=CUDA)
            assert torch.equal(ours(x), model(x))


def test_capture_on_a_stream_of_the_caller() -> None:
    """``stream`` is where that one capture happens; the next is on the graph's own again."""
    graph, x, side = BreakableCUDAGraph(driver="cuda"), torch.ones(4, device=CUDA), torch.cuda.Stream()
    seen = []
    for stream in (side, None):
        with torch.no_grad(), capture(graph, stream=stream):
            seen.append(torch.cuda.current_stream())
            y = x + 1
    assert seen[0] == side
    assert seen[1] != side
    x.fill_(3)
    graph.replay()
    assert torch.equal(y, x + 1)
    del y
    graph.reset()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_model_on_another_device_than_the_current() -> None:
    """A model on the second GPU replays there while the first is the current device, also with random draws."""
    other = torch.device("cuda", 1)
    model = stack(64, 2).to(other)

    def function(x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(model(x).sin() + 1, 0.5)

    ours = compiled(function)
    for call in range(5):
        x = torch.randn(4, 64, device=other)
        torch.manual_seed(call)
        want = function(x)
        torch.manual_seed(call)
        assert torch.equal(ours(x), want)
    assert torch.cuda.current_device() == 0
    assert explain(ours).programs[0].replays == 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("door", ["compile", "capture"])
def test_launches_are_for_the_graphs_device(door: str) -> None:
    """A model of wide layers on the second GPU is right in a thousand calls that are made while the first is current."""
    other = torch.device("cuda", 1)
    model = stack(2048, 2).to(other)
    x = torch.randn(256, 2048, device=other)
    if door == "compile":
        ours = compiled(model)
    else:
        graph, place = BreakableCUDAGraph(driver="cuda"), x.clone()
        with torch.cuda.device(other):
            model(place)
            with capture(graph):
                y = model(place)

        def ours(x: torch.Tensor) -> torch.Tensor:
            place.copy_(x)
            graph.replay()
            return y

    for call in range(1000):
        x.mul_(0.999).add_(0.001)
        got = ours(x)
        if call % 50 < 3:
            assert torch.equal(got, model(x)), call
    assert torch.cuda.current_device() == 0
    current: list[int] = []

    @eager_on_graph
    def step(x: torch.Tensor) -> torch.Tensor:
        current.append(torch.cuda.current_device())
        return x + 1

    looks = compiled(lambda x: step(x.sin() * 2) * 3)
    for _ in range(4):
        assert torch.equal(looks(x), (x.sin() * 2 + 1) * 3)
    assert current[-4:] == [0] * 4


def test_reset_gives_memory_back() -> None:
    """``reset(compiled)`` frees graphs, bridges and pool at once, and the function works again afterwards."""
    model = stack(256, 2)
    ours = compiled(model)
    x = torch.randn(512, 256, device=CUDA)
    want = model(x)
    ours(x)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        ours(x)
    driver = executors_of(ours)[0].driver
    assert torch.cuda.memory_reserved() > before
    reset(ours)
    assert driver.live_blocks() == 0 and driver.pool_bytes() == 0
    assert torch.cuda.memory_reserved() <= before
    for _ in range(4):
        assert torch.equal(ours(x), want)
    breakable_backend.reset()
    assert driver.live_blocks() == 0


def test_nodes_of_a_segment() -> None:
    """A captured segment tells its kernels by name, and its copies and fills by kind; only kernels are counted."""
    model = stack(64, 1)
    ours = compiled(lambda x: model(x).sin().cumsum(0))
    for _ in range(3):
        ours(torch.randn(4, 64, device=CUDA))
    (executor,) = executors_of(ours)
    (addresses,) = executor.keys.sets.values()
    (entry,) = addresses.entries.values()
    assert entry.recording is not None
    before, after = entry.recording.graphs
    assert before.num_kernels == len(before.kernels()) > 1  # a linear layer and gelu
    assert any("Gelu" in name or "gelu" in name for name in before.kernels())
    assert any("sin_kernel" in name for name in after.kernels())
    assert not any("(" in name or name.startswith("void ") for name in before.kernels() + after.kernels())
    assert before.dot().startswith("digraph")
    assert executor.driver.executable_bytes() >= 0


def test_nodes_that_are_no_kernels() -> None:
    """Fills and copies are nodes, in the order of the capture, and no kernels."""
    driver = CudaDriver(CUDA)
    x, y = torch.randn(1024, device=CUDA), torch.empty(1024, device=CUDA)

    def body() -> None:
        y.zero_()
        y.add_(1)
        y.copy_(x)

    with driver.lock:
        stream = driver.begin()
        with driver.recording():
            graph, _ = driver.capture(body)
        graph.replay(stream)
        driver.end(stream)
    assert torch.equal(y, x)
    assert [node.kind for node in graph.nodes()] == ["kernel", "kernel", "memcpy"]
    assert graph.num_kernels == 2
    driver.release([graph])
    assert driver.live_blocks() == 0


def test_executables_take_memory() -> None:
    """Many instantiated graphs take device memory beside the pool, and the driver counts it until they go."""
    driver = CudaDriver(CUDA)
    x = torch.zeros(16, device=CUDA)
    torch.cuda.synchronize()
    with driver.lock:
        stream = driver.begin()
        with driver.recording():
            graphs = [driver.capture(lambda: [x.add_(1) for _ in range(64)])[0] for _ in range(64)]
        driver.end(stream)
    # 64 graphs of 64 nodes: well over a page of CUDA's, whatever its size
    assert driver.executable_bytes() > 0
    assert [graph.num_kernels for graph in graphs] == [64] * 64
    driver.release(graphs)
    assert driver.executable_bytes() == 0
