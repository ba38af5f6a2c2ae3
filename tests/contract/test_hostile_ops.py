"""Ops of somebody's that no capture takes, that keep their arguments, or that raise."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from breakable_backend import DivergenceError, explain
from checks import assert_same, check

Body = Callable[[Tensor], Tensor]


def op(name: str, body: Body) -> Any:
    """An unmarked op of this name, whose result is like its argument."""
    made = torch.library.custom_op(f"hostile::{name}", body, mutates_args=(), schema="(Tensor x) -> Tensor")
    made.register_fake(torch.empty_like)
    return made


def around(hostile: Any) -> Callable[[Tensor], Tensor]:
    """A program with captured ops before and behind an op."""
    return lambda x: hostile(x.sin() + 1).cos() + x


def is_one_eager_step(hostile: Any, name: str, before: Callable[[int], None] = lambda number: None) -> None:
    """A program with an op in it is eager's in seven calls, and all of it but that op is captured.

    ``before`` is called before each compiled call, with its number from 1.
    """
    function, device = around(hostile), torch.device("cuda")
    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "cuda", "min_kernels": 1})
    with torch.no_grad():
        for number in range(1, 8):
            torch.manual_seed(number)
            x = torch.randn(2, 4, device=device)
            want = function(x)
            before(number)
            assert_same(compiled(x), want, f"call {number}")
    (program,) = explain(compiled).programs
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert [reason.op for reason in program.reasons] == [name]
    assert program.replays > 0


# --- ops that no capture takes ----------------------------------------------------------------------------------------------


def waits(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x * 2


def waits_for_its_stream(x: Tensor) -> Tensor:
    y = x * 2
    torch.cuda.current_stream().synchronize()
    return y


def reads(x: Tensor) -> Tensor:
    return x * float(x.max())


def branches(x: Tensor) -> Tensor:
    return x * 2 if bool(x.sum() > 0) else x * 3


def allocates(x: Tensor) -> Tensor:
    from cuda.bindings import runtime

    error, address = runtime.cudaMalloc(1 << 20)
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"CUDA error: {error.name}")
    runtime.cudaFree(address)
    return x * 2


def goes_through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.cpu().numpy() * 2).to(x.device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "body",
    [waits, waits_for_its_stream, reads, branches, allocates, goes_through_numpy],
    ids=lambda body: body.__name__,
)
def test_ops_that_no_capture_takes(body: Body) -> None:
    """Line 9: an op that waits, reads, or takes memory by itself is one eager step with its name; what is around it is captured."""
    if body is allocates:
        pytest.importorskip("cuda.bindings.runtime")
    name = f"{body.__name__}_alone"
    is_one_eager_step(op(name, body), f"hostile::{name}")


# --- ops in C++ -----------------------------------------------------------------------------------------------------------------

SOURCE = r"""
#include <torch/library.h>
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <vector>

using at::Tensor;

static cudaStream_t current() { return c10::cuda::getCurrentCUDAStream().stream(); }

static void check(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error)); }

static cudaStream_t made(unsigned flags) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, flags));
  return stream;
}

Tensor waits(const Tensor& x) {
  auto y = x * 2;
  check(cudaStreamSynchronize(current()));
  return y;
}

Tensor waits_for_all(const Tensor& x) {
  auto y = x * 2;
  check(cudaDeviceSynchronize());
  return y;
}

Tensor waits_and_hides_it(const Tensor& x) {
  auto y = x * 2;
  (void)cudaStreamSynchronize(current());
  (void)cudaGetLastError();
  return y;
}

Tensor reads(const Tensor& x) { return x * x.max().item().toDouble(); }

Tensor allocates(const Tensor& x) {
  void* place;
  check(cudaMalloc(&place, x.nbytes()));
  auto y = at::empty_like(x);
  check(cudaMemcpyAsync(place, x.data_ptr(), x.nbytes(), cudaMemcpyDeviceToDevice, current()));
  check(cudaMemcpyAsync(y.data_ptr(), place, x.nbytes(), cudaMemcpyDeviceToDevice, current()));
  check(cudaFree(place));
  return y * 2;
}

// Copies what it is given on a stream of its own, which nobody waits for.
Tensor forks(const Tensor& x) {
  static cudaStream_t side = made(cudaStreamNonBlocking);
  static Tensor copy = at::empty({1 << 10}, x.options());
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  check(cudaEventRecord(event, current()));
  check(cudaStreamWaitEvent(side, event, 0));
  check(cudaMemcpyAsync(copy.data_ptr(), x.data_ptr(), x.nbytes(), cudaMemcpyDeviceToDevice, side));
  check(cudaEventDestroy(event));
  return x * 2;
}

Tensor keeps(const Tensor& x) {
  static std::vector<Tensor> kept;
  kept.push_back(x);
  return x * 2;
}

static int64_t times = 0;

void throws_next(int64_t number) { times = number; }

Tensor throws(const Tensor& x) {
  TORCH_CHECK(times == 0 || times-- == 0, "no such page");
  return x * 2;
}

// The half of the result comes from a stream of its own, which CUDA itself orders with the default stream.
Tensor partly(const Tensor& x) {
  static cudaStream_t side = made(cudaStreamDefault);
  auto y = x * 2;
  auto half = x.nbytes() / 2;
  auto to = static_cast<char*>(y.data_ptr()) + half;
  auto from = static_cast<const char*>(x.const_data_ptr()) + half;
  check(cudaMemcpyAsync(to, from, half, cudaMemcpyDeviceToDevice, side));
  return y;
}

TORCH_LIBRARY(hostile_cpp, m) {
  for (auto name : {"waits", "waits_for_all", "waits_and_hides_it", "reads", "allocates", "forks", "keeps", "throws", "partly"})
    m.def((std::string(name) + "(Tensor x) -> Tensor").c_str());
  m.def("throws_next(int number) -> ()", &throws_next);
}

TORCH_LIBRARY_IMPL(hostile_cpp, CUDA, m) {
  m.impl("waits", &waits);
  m.impl("waits_for_all", &waits_for_all);
  m.impl("waits_and_hides_it", &waits_and_hides_it);
  m.impl("reads", &reads);
  m.impl("allocates", &allocates);
  m.impl("forks", &forks);
  m.impl("keeps", &keeps);
  m.impl("throws", &throws);
  m.impl("partly", &partly);
}
"""


@pytest.fixture(scope="session")  # a process can register them once
def in_cpp(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ops of :data:`SOURCE`, built."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        pytest.skip("needs a compiler: nvcc and ninja")
    folder = str(tmp_path_factory.mktemp("ops"))
    cpp_extension.load_inline(
        "hostile_cpp", SOURCE, with_cuda=True, is_python_module=False, build_directory=folder, extra_cflags=["-O0"]
    )
    for name in "waits waits_for_all waits_and_hides_it reads allocates forks keeps throws partly".split():
        torch.library.register_fake(f"hostile_cpp::{name}", torch.empty_like)
    return torch.ops.hostile_cpp


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["waits", "waits_for_all", "waits_and_hides_it", "reads", "allocates", "forks"])
def test_ops_in_cpp_that_no_capture_takes(in_cpp: Any, name: str) -> None:
    """Line 9: what C++ does that no capture takes is one eager step with the op's name; what is around it is captured."""
    is_one_eager_step(getattr(in_cpp, name), f"hostile_cpp::{name}")


@pytest.mark.gpu
def test_an_op_in_cpp_that_keeps_its_arguments(in_cpp: Any) -> None:
    """Line 4: what C++ keeps of its arguments spoils no result."""
    device, options = torch.device("cuda"), {"driver": "cuda", "min_kernels": 1}
    check(around(in_cpp.keeps), lambda _: (torch.randn(2, 4, device=device),), device=device, options=options)


@pytest.mark.gpu
@pytest.mark.parametrize("call", [1, 2, 3], ids=["plain", "recording", "replay"])
def test_an_op_in_cpp_that_throws(in_cpp: Any, call: int) -> None:
    """Line 8: what C++ throws reaches the caller; the next call is right, and replays follow."""
    device, function = torch.device("cuda"), around(in_cpp.throws)
    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "cuda", "min_kernels": 1})
    with torch.no_grad():
        for number in range(1, 8):
            x = torch.randn(2, 4, device=device)
            want = function(x)
            if number == call:
                in_cpp.throws_next(9)
                if call < 3:  # a replay does not call it
                    with pytest.raises(RuntimeError, match="no such page"):
                        compiled(x)
                in_cpp.throws_next(0)
            assert_same(compiled(x), want, f"call {number}")
    assert sum(program.replays for program in explain(compiled).programs) > 0


@pytest.mark.gpu
def test_an_op_in_cpp_that_throws_under_capture_alone(in_cpp: Any) -> None:
    """Line 9: an op that throws while it is captured, and not when it runs by itself behind that, is one eager step."""
    is_one_eager_step(in_cpp.throws, "hostile_cpp::throws", lambda number: in_cpp.throws_next(number == 2))


def partly_elsewhere(x: Tensor) -> Tensor:
    """``partly`` of :data:`SOURCE`."""
    from cuda.bindings import runtime

    (_, side) = runtime.cudaStreamCreate()
    y, half = x * 2, x.nbytes // 2
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    (error,) = runtime.cudaMemcpyAsync(y.data_ptr() + half, x.data_ptr() + half, half, kind, side)
    assert error == runtime.cudaError_t.cudaSuccess, error
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("made", ["cpp", "python"])
def test_comparing_finds_work_on_another_stream(made: str, request: pytest.FixtureRequest) -> None:
    """A part of an op that no capture has, since it goes to a stream of the op's own, is found by ``debug="compare"``."""
    if made == "cpp":
        hostile = request.getfixturevalue("in_cpp").partly
    else:
        pytest.importorskip("cuda.bindings.runtime")
        hostile = op("partly_elsewhere", partly_elsewhere)
    device = torch.device("cuda")
    options = {"driver": "cuda", "min_kernels": 1, "debug": "compare"}
    compiled = torch.compile(around(hostile), backend="breakable_cg", options=options)
    with torch.no_grad(), pytest.raises(DivergenceError, match="partly") as raised:
        for _ in range(5):
            compiled(torch.randn(2, 4, device=device))
    assert raised.value.cause == "work outside of the capture"


# --- ops that keep, and that raise ------------------------------------------------------------------------------------------


def test_an_op_that_keeps_its_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: what an op has kept of its arguments spoils no result, and lives as long as it is kept."""
    kept: list[Tensor] = []

    def keeps(x: Tensor) -> Tensor:
        kept.append(x)
        return x * 2

    check(around(op("keeps", keeps)), lambda _: (torch.randn(2, 4, device=device),), device=device, options=options)
    assert kept


@pytest.mark.parametrize("call", [1, 2], ids=["plain", "recording"])
def test_an_op_that_raises(device: torch.device, options: dict[str, Any], call: int) -> None:
    """Line 8: what an op raises while it runs, or is captured, reaches the caller; the next call is right, and replays follow."""
    failing = contextlib.nullcontext
    raised = KeyError("no such page")

    def raises(x: Tensor) -> Tensor:
        with failing():
            return x * 2

    @contextlib.contextmanager
    def fails() -> Iterator[None]:
        raise raised
        yield

    function = around(op(f"raises_{call}_{device.type}", raises))
    compiled = torch.compile(function, backend="breakable_cg", options={"min_kernels": 1, **options})
    inputs = [torch.randn(2, 4, device=device) for _ in range(8)]
    with torch.no_grad():
        for number, x in enumerate(inputs, start=1):
            if number == call:
                failing = fails
                with pytest.raises(KeyError, match="no such page"):
                    compiled(x)
                failing = contextlib.nullcontext
            assert_same(compiled(x), function(x), f"call {number}")
    assert sum(program.replays for program in explain(compiled).programs) > 0
