"""Every error and warning of the package once, by its whole text, as the user receives it."""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import breakable_backend
import silly
from breakable_backend import (
    BindError,
    BreakableError,
    CaptureError,
    DivergenceError,
    EagerOutputError,
    InternalError,
    OptionsError,
    PartitionError,
    ReplayError,
    errors,
    mark_eager,
    unmark_eager,
)
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import cuda as cuda_driver
from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.drivers.tape import FIX, TapeDriver
from breakable_backend.options import Options
from reports import from_file

CPU = torch.device("cpu")
TAPE = {"driver": "tape", "min_kernels": 1}

PLAIN = """
def f(x):
    return x.sin() + 1
"""


CALLER = re.compile(r"\n  at test_messages\.py:\d+ in .*")


def text_of(error: BaseException) -> str:
    """The text of an error, without the line of this file that it happened at, where no line of the model is to blame.

    One of the two is in every error.
    """
    text = str(error)
    assert re.search(r"^  at \S+:\d+", text, re.MULTILINE), text
    return CALLER.sub("", text)


def message(
    kind: type[BreakableError], function: Callable[..., Any], *args: Any, calls: int = 1, **options: Any
) -> str:
    """The text of the error that a compiled function's last call raises; its type arrives unchanged."""
    compiled = torch.compile(function, backend="breakable_cg", options={**TAPE, **options})
    with torch.no_grad():
        for _ in range(calls - 1):
            compiled(*args)
        with pytest.raises(BreakableError) as caught:
            compiled(*args)
    assert type(caught.value) is kind
    assert isinstance(caught.value, ValueError) is (kind is OptionsError)
    return text_of(caught.value)


# --- options ------------------------------------------------------------------------------------------------------------------

ALL_OPTIONS = ", ".join(option.name for option in dataclasses.fields(Options))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"min_kernel": 2},
            f"unknown option 'min_kernel'; did you mean 'min_kernels'?\n  options are: {ALL_OPTIONS}",
        ),
        ({"zzz": 1}, f"unknown option 'zzz'\n  options are: {ALL_OPTIONS}"),
        ({"driver": "gpu"}, "option 'driver' does not take 'gpu'\n  allowed: 'auto', 'cuda', 'tape'"),
        ({"auto_break": 1}, "option 'auto_break' does not take 1\n  allowed: True, False"),
        ({"outputs": "mine"}, "option 'outputs' does not take 'mine'\n  allowed: 'fresh', 'static'"),
        ({"scalars": None}, "option 'scalars' does not take None\n  allowed: 'key', 'device'"),
        (
            {"tolerance": 0.1},
            "option 'tolerance' does not take 0.1\n  give (rtol, atol), two numbers of at least 0, or None",
        ),
        ({"inner": "nothing"}, "option 'inner' does not take 'nothing'\n  allowed: 'eager'"),
        ({"inner": "inductor"}, "option inner='inductor' does not exist yet\n  use inner='eager'"),
        (
            {"min_kernels": 0},
            "option 'min_kernels' takes an integer of at least 1, got 0\n  for example options={'min_kernels': 1}",
        ),
        (
            {"max_recordings": "8"},
            "option 'max_recordings' takes an integer of at least 1, got '8'\n  for example options={'max_recordings': 1}",
        ),
        (
            {"eager_ops": "aten::sin"},
            "option 'eager_ops' takes a list of ops, got 'aten::sin'\n  eager_ops=['aten::sin']",
        ),
        (
            {"eager_ops": ["silly::tripel"]},
            (
                "'silly::tripel' is not a registered op; the nearest names are silly::triple, silly::triple.scaled, "
                "profiler::_nothing\n"
                "  name it as 'namespace::op' or 'namespace::op.overload', after it is registered"
            ),
        ),
        (
            {"eager_ops": [3]},
            (
                "3 is not an op\n"
                "  pass 'namespace::op', an op from torch.ops, what torch.library.custom_op returned, or a module"
            ),
        ),
        (
            {"eager_ops": [from_file(PLAIN)]},
            (
                "eager_ops: 'f' is a Python function, and Dynamo traces through it\n"
                "  mark it with @eager_on_graph, or put its body under eager_region()"
            ),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options(options: dict[str, Any], text: str) -> None:
    """A wrong option is an error of the first call, and says what is allowed."""
    got = message(OptionsError, from_file(PLAIN), torch.ones(3), **options)
    if "nearest" in text:  # which names are third nearest depends on what is registered
        assert got.startswith("'silly::tripel' is not a registered op; the nearest names are silly::triple, ")
        assert got.splitlines()[1] == text.splitlines()[1]
    else:
        assert got == text


def test_mode() -> None:
    """A ``mode`` of Inductor's that this backend has no like of is an error, and says which modes are taken."""
    compiled = torch.compile(from_file(PLAIN), backend="breakable_cg", mode="max-autotune")
    with pytest.raises(OptionsError) as caught:
        compiled(torch.ones(3))
    assert text_of(caught.value) == (
        "mode='max-autotune' is a mode of Inductor's, and this backend compiles no kernels\n"
        "  leave mode out; 'default' and 'reduce-overhead' are accepted, and change nothing"
    )


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value or name in the environment reads like a wrong option, and says where it is from."""
    monkeypatch.setenv("BREAKABLE_CG_OUTPUTS", "mine")
    assert message(OptionsError, from_file(PLAIN), torch.ones(3)) == (
        "option 'outputs' does not take 'mine' (from BREAKABLE_CG_OUTPUTS in the environment)\n"
        "  allowed: 'fresh', 'static'"
    )
    monkeypatch.delenv("BREAKABLE_CG_OUTPUTS")
    monkeypatch.setenv("BREAKABLE_CG_OUTPUT", "static")
    assert message(OptionsError, from_file(PLAIN), torch.ones(3)).startswith(
        "unknown option 'output'; did you mean 'outputs'? (from BREAKABLE_CG_OUTPUT in the environment)"
    )


@pytest.mark.parametrize("mark", [mark_eager, unmark_eager])
def test_marks(mark: Callable[[Any], Any]) -> None:
    """A mark on what is no op is an error where the mark is made."""
    with pytest.raises(OptionsError) as caught:
        mark("nowhere::qqqqqqqq")
    assert text_of(caught.value) == (
        "'nowhere::qqqqqqqq' is not a registered op\n"
        "  name it as 'namespace::op' or 'namespace::op.overload', after it is registered"
    )
    with pytest.raises(OptionsError) as caught:
        mark(None)
    assert text_of(caught.value) == (
        "None is not an op\n  pass 'namespace::op', an op from torch.ops, what torch.library.custom_op returned, or a module"
    )
    with pytest.raises(OptionsError) as caught:
        mark(torch.nn.Linear(99, 99).weight)
    assert caught.value.what == "a Parameter of shape [99, 99] is not an op"
    with pytest.raises(OptionsError, match="for a function, put @eager_on_graph above it"):
        mark(test_marks)
    for forward in (torch.nn.Linear.forward, torch.nn.Linear(2, 2).forward):
        with pytest.raises(
            OptionsError, match=r"Linear\.forward is not an op(?s:.*); for a layer, pass the module or its class"
        ):
            mark(forward)
    with pytest.raises(OptionsError, match="@eager_on_graph has marked it already"):
        mark(breakable_backend.eager_on_graph(test_marks))


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (
            {"mutate_args": ("x",)},
            (
                "eager_on_graph takes no 'mutate_args'; did you mean 'mutates_args'?\n"
                "  it takes: enable, mutates_args, host_only, recompute, fake, capture_stub, barrier, backward"
            ),
        ),
        ({"fake": 3}, "fake takes a function, got 3\n  pass a function as fake, or None"),
        ({"barrier": "all"}, "barrier takes a function, got 'all'\n  pass a function as barrier, or None"),
        ({"mutates_args": "x"}, "mutates_args takes a tuple of names, got 'x'\n  mutates_args=('x',)"),
        ({"mutates_args": ("y",)}, "mutates_args: there is no parameter 'y'\n  parameters: x"),
    ],
)
def test_marks_of_functions(said: dict[str, Any], text: str) -> None:
    """What ``eager_on_graph`` does not take is told where the mark is made."""
    with pytest.raises(OptionsError) as caught:
        breakable_backend.eager_on_graph(**said)(lambda x: x)
    assert text_of(caught.value) == text


def test_no_graph_to_capture_into() -> None:
    """Another object than a graph, such as torch's own, is told before anything is captured."""
    with pytest.raises(OptionsError) as caught:
        breakable_backend.capture(object())  # type: ignore[arg-type]
    assert text_of(caught.value) == (
        "capture takes a BreakableCUDAGraph, got object\n  graph = BreakableCUDAGraph(), then: with capture(graph): ..."
    )


# --- machines -----------------------------------------------------------------------------------------------------------------


MISSING = Bindings("cuda.bindings.missing")
"""As on a machine without cuda-python."""


def machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    hip: str | None = None,
    gpu: bool = True,
    allocator: str = "native",
    bindings: Any = MISSING,
) -> None:
    """Have the CUDA driver's module see such a machine; the rest of torch is left alone."""
    cuda = types.SimpleNamespace(is_available=lambda: gpu, get_allocator_backend=lambda: allocator)
    seen = types.SimpleNamespace(version=types.SimpleNamespace(hip=hip), cuda=cuda)
    monkeypatch.setattr(cuda_driver, "torch", seen)
    monkeypatch.setattr(cuda_driver, "cudart", bindings)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``driver="cuda"`` without a GPU."""
    machine(monkeypatch, gpu=False)
    assert message(OptionsError, from_file(PLAIN), torch.ones(3), driver="cuda") == (
        "driver='cuda' needs a CUDA GPU, and torch sees none\n  use driver='tape' or 'auto'"
    )


def test_no_gpu_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """``driver="cuda"`` without a GPU is an error of the first call, of a graph too that needs gradients."""
    machine(monkeypatch, gpu=False)
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="breakable_cg", options={"driver": "cuda"})
    with torch.enable_grad(), pytest.raises(OptionsError, match="driver='cuda' needs a CUDA GPU"):
        compiled(torch.ones(3, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_here() -> None:
    """``driver="cuda"`` on a machine that has none, with nothing replaced."""
    assert message(OptionsError, from_file(PLAIN), torch.ones(3), driver="cuda").startswith(
        "driver='cuda' needs a CUDA GPU"
    )


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """``driver="cuda"`` with a GPU and without cuda-python."""
    machine(monkeypatch)
    assert message(OptionsError, from_file(PLAIN), torch.ones(3), driver="cuda") == (
        "driver='cuda' needs cuda-python, which cannot be imported\n  pip install cuda-python"
    )


def test_other_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """``driver="cuda"`` where CUDA's allocator was chosen, whose memory a captured graph cannot keep."""
    machine(monkeypatch, allocator="cudaMallocAsync")
    assert message(OptionsError, from_file(PLAIN), torch.ones(3), driver="cuda") == (
        "driver='cuda' needs PyTorch's own allocator: under backend:cudaMallocAsync a graph keeps no memory between launches\n"
        "  take backend:cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF, or use driver='tape'"
    )


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """``driver="cuda"`` on a ROCm build, which calls its GPUs "cuda" too."""
    machine(monkeypatch, hip="6.2")
    assert message(OptionsError, from_file(PLAIN), torch.ones(3), driver="cuda") == (
        "breakable_cg does not support ROCm builds of torch\n  use driver='tape', or backend='inductor'"
    )


# --- partition ------------------------------------------------------------------------------------------------------------------


def test_partition() -> None:
    """With ``auto_break=False``, a node that a rule refuses is an error with the user's line."""
    f = from_file(
        """
def f(x):
    y = x.sin() + 1
    return y[y > 0]
"""
    )
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        text = message(PartitionError, f, torch.ones(3), auto_break=False)
    assert text == (
        "aten::index cannot be captured: indexes with a mask, which waits for the host\n"
        "  at model.py:4 in f: return y[y > 0]\n"
        "  mark it (mark_eager, eager_region), or let it run eagerly: auto_break=True"
    )


# --- capture ------------------------------------------------------------------------------------------------------------------


def test_capture() -> None:
    """With ``auto_break=False``, a segment whose capture fails is an error of the call that records, with its cause."""
    f = from_file(
        """
def f(x):
    y = x.sin() + 1
    return silly.stubborn(y)
"""
    )
    compiled = torch.compile(f, backend="breakable_cg", options={**TAPE, "auto_break": False})
    with torch.no_grad():
        compiled(torch.ones(3))
        for _ in range(2):
            with pytest.raises(CaptureError) as caught:
                compiled(torch.ones(3))
            lines = str(caught.value).splitlines()
            assert lines[0] == (
                "aten._local_scalar_dense.default reads values on the host, which no captured graph can do"
            )
            assert lines[1].startswith("  at silly.py:")
            assert lines[1].endswith(" in stubborn: return x + x.max().item()")
            assert lines[2:] == [f"  {FIX}"]


def test_capture_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call inside somebody else's capture names the first eager step."""
    f = from_file(
        """
def f(x):
    y = x.sin() + 1
    return silly.triple(y) + silly.attention(y, y, y)
"""
    )
    compiled = torch.compile(f, backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        compiled(torch.ones(3))
        monkeypatch.setattr(TapeDriver, "is_capturing", lambda self: True)
        with pytest.raises(CaptureError) as caught:
            compiled(torch.ones(3))
    (name,) = [program.name for program in breakable_backend.explain(compiled).programs]
    assert text_of(caught.value) == (
        f"{name} was called inside another CUDA graph capture, but has an eager step: silly::triple: tagged cudagraph_unsafe\n"
        "  at model.py:4 in f: return silly.triple(y) + silly.attention(y, y, y)\n"
        "  call it outside that capture, or capture the parts around it"
    )


def explode() -> None:
    raise KeyError("mine")


REFUSALS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "aten._local_scalar_dense.default reads values on the host"),
    "cpu": (lambda x: x.cpu(), "Tensor.cpu reads values on the host"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist reads values on the host"),
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero.default makes a shape that depends on values"),
    "mask": (lambda x: x[x > 0], "aten.index.Tensor makes a shape that depends on values"),
    "svd": (lambda x: torch.linalg.svd(x), "aten._linalg_svd.default waits for the device"),
    "resize": (lambda x: x.resize_(9), "aten.resize_.default gives other memory to a tensor from outside"),
    "generator": (
        lambda x: torch.rand(3, generator=torch.Generator()),
        "aten.rand.generator draws from a generator that is not the device's default one",
    ),
    "seed": (lambda x: torch.manual_seed(1), "the body set the state of the random generator"),
    "sparse": (lambda x: x.to_sparse(), "aten._to_sparse.default works on a tensor without strides"),
    "device": (lambda x: x.to("meta"), "aten._to_copy.default moves data between cpu and meta"),
    "branch": (
        lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
        "the higher-order op cond may choose by values on the host what to run",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_tape_refuses(name: str) -> None:
    """What no CUDA graph could hold is an error of the tape driver: what it is, in which line, and what to do."""
    body, what = REFUSALS[name]
    x = torch.ones(2, 2)
    with pytest.raises(CaptureError) as caught:
        TapeDriver(CPU).capture(lambda: body(x))
    first, *rest = str(caught.value).splitlines()
    assert first == f"{what}, which no captured graph can do"
    assert rest[-1] == f"  {FIX}"
    assert all(line.startswith("  at test_messages.py:") for line in rest[:-1])


def test_cure_exists() -> None:
    """What the cure for a failed capture names is there to be used."""
    names = re.findall(r"\b\w+_\w+\b", FIX)
    missing = {name for name in names if not hasattr(breakable_backend, name)} - {"eager_ops"}
    assert not missing


def test_tape_passes_on() -> None:
    """What the captured code raises by itself is named in the error, and is its cause."""
    with pytest.raises(CaptureError) as caught:
        TapeDriver(CPU).capture(explode)
    what, where, fix = str(caught.value).splitlines()
    assert what == "the captured code raised KeyError: 'mine'"
    assert where.startswith("  at test_messages.py:")
    assert where.endswith('in explode: raise KeyError("mine")')
    assert fix == f"  {FIX}"
    assert isinstance(caught.value.__cause__, KeyError)


def test_capture_in_a_capture() -> None:
    """Captures do not nest."""
    driver = TapeDriver(CPU)
    with pytest.raises(CaptureError) as caught:
        driver.capture(lambda: driver.capture(lambda: None))
    assert str(caught.value).startswith("a capture was started inside another capture\n")
    assert str(caught.value).endswith("\n  end the outer one first")


# --- replay ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unguarded() -> Iterator[Callable[..., Any]]:
    """A compiled function without Dynamo's guards, recorded for one shape."""
    options = {**TAPE, "guard_filter_fn": lambda guards: [False for _ in guards]}
    compiled = torch.compile(from_file(PLAIN), backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(3))
        yield compiled


@pytest.mark.parametrize(
    ("wrong", "described"),
    [
        (torch.ones(4), "float32[4] with stride [1] on cpu"),
        (torch.ones(3, dtype=torch.float64), "float64[3] with stride [1] on cpu"),
        (torch.ones(3, device="meta"), "float32[3] with stride [1] on meta"),
        (torch.ones(1, 3), "float32[1, 3] with stride [3, 1] on cpu"),
    ],
    ids=["shape", "dtype", "device", "rank"],
)
def test_argument(unguarded: Callable[..., Any], wrong: Tensor, described: str) -> None:
    """An argument of another shape, dtype or device than recorded, where Dynamo's guards were skipped."""
    with pytest.raises(ReplayError) as caught:
        unguarded(wrong)
    assert type(caught.value) is ReplayError
    assert text_of(caught.value) == (
        f"argument x is {described}, but was recorded as float32[3] with stride [1] on cpu\n"
        "  at model.py:2 in f: def f(x):\n"
        "  Dynamo's guards recompile for such calls: do not filter them out (guard_filter_fn)"
    )
    assert torch.equal(unguarded(torch.ones(3)), torch.ones(3).sin() + 1)


def captured(body: Callable[[], Any]) -> Any:
    graph, _ = TapeDriver(CPU).capture(body)
    return graph


def test_memory_that_is_gone() -> None:
    """A graph that reads memory which was freed, or moved, since its capture."""
    x = torch.ones(3)
    graph = captured(lambda: x + 1)
    x.data = torch.ones(5)
    with pytest.raises(ReplayError) as caught:
        graph.replay(0)
    assert text_of(caught.value) == (
        "the float32[3] tensor that aten.add.Tensor takes was freed after the capture, but the graph reads it at its address\n"
        "  keep what goes into a captured graph alive, and write new values into it in place"
    )
    y = torch.ones(3)
    graph = captured(lambda: y + 1)
    storage = y.untyped_storage()
    storage.resize_(4096)
    with pytest.raises(ReplayError, match="was moved after the capture"):
        graph.replay(0)


def test_released_graph() -> None:
    """A graph that is replayed after its release."""
    driver = TapeDriver(CPU)
    x = torch.ones(3)
    graph, _ = driver.capture(lambda: x + 1)
    driver.release([graph])
    with pytest.raises(ReplayError) as caught:
        graph.replay(0)
    assert text_of(caught.value) == "a graph was replayed after its release\n  capture it again"


def test_launch_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that CUDA refuses, with CUDA's own words."""
    monkeypatch.setattr(
        cuda_driver,
        "cudart",
        types.SimpleNamespace(
            cudaGraphLaunch=lambda graph, stream: (400,),
            cudaGetErrorString=lambda status: (0, b"invalid resource handle"),
        ),
    )
    graph = cuda_driver.CudaGraph.__new__(cuda_driver.CudaGraph)
    graph._executable, graph._hooks = object(), ()
    with pytest.raises(ReplayError) as caught:
        graph.replay(0)
    assert text_of(caught.value) == "cudaGraphLaunch failed: invalid resource handle"


# --- eager results ------------------------------------------------------------------------------------------------------------


LIAR = """
def f(x):
    y = x.sin() + 1
    return silly.liar(y) * 2
"""
LIAR_TEXT = (
    "silly::liar returned float32[2, 3] with stride [1, 2] on cpu, "
    "but was compiled for float32[2, 3] with stride [3, 1] on cpu\n"
    "  at model.py:4 in f: return silly.liar(y) * 2\n"
    "  make its fake implementation (register_fake) return what the real one returns, strides included"
)


def test_eager_output() -> None:
    """A fake implementation with other strides is found at the first call: both descriptions, the line and the cure."""
    assert message(EagerOutputError, from_file(LIAR), torch.ones(2, 3)) == LIAR_TEXT


def test_eager_output_later() -> None:
    """So is an op that returns something else only when replayed."""
    f = from_file(
        """
def f(x):
    y = x.sin() + 1
    return silly.visit(y) * 2
"""
    )
    compiled = torch.compile(f, backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(3))
        silly.hooks["visit"] = lambda x: torch.ones(4, dtype=torch.float64)
        try:
            with pytest.raises(EagerOutputError) as caught:
                compiled(torch.ones(3))
        finally:
            silly.hooks.clear()
        assert text_of(caught.value) == (
            "silly::visit returned float64[4] with stride [1] on cpu, "
            "but was compiled for float32[3] with stride [1] on cpu\n"
            "  at model.py:4 in f: return silly.visit(y) * 2\n"
            "  make its fake implementation (register_fake) return what the real one returns, strides included"
        )
        assert torch.equal(compiled(torch.ones(3)), f(torch.ones(3)))


# --- warnings -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that has not warned of anything yet."""
    monkeypatch.setattr(breakable_backend.breakable_cg, "_warned", set())


def said(function: Callable[..., Any], *args: Any, calls: int = 1, **options: Any) -> list[str]:
    """What the first calls of two compiled functions warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.compiler.reset()
            compiled = torch.compile(function, backend="breakable_cg", options=options)
            for _ in range(calls):
                compiled(*args)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def test_tape_is_said_once(unsaid: None) -> None:
    """The choice of the tape driver is said, once, unless it was asked for."""
    assert said(from_file(PLAIN), torch.ones(3)) == [
        (
            "breakable_cg found no CUDA tensor in the graph and uses the tape driver on cpu, which shows what would be "
            "captured, not how fast. Say options={'driver': 'tape'} to choose that."
        )
    ]
    assert said(from_file(PLAIN), torch.ones(3), driver="tape") == []


def test_calls_without_a_backward_are_said_once(unsaid: None) -> None:
    """That results need gradients, and go without a backward, is said, once, with the way out, unless it was asked for."""
    weight = torch.ones(3, requires_grad=True)
    assert said(lambda x: x * weight, torch.ones(3), driver="tape", calls=3) == []
    assert said(lambda x: x * weight, torch.ones(3), driver="tape", calls=6) == [
        (
            "breakable_cg captures a graph that needs gradients once one of its calls was run backward, and the results of "
            "3 calls are gone without that: it runs eagerly. For inference call the compiled function under "
            "torch.no_grad() or torch.inference_mode()."
        )
    ]
    assert said(lambda x: x * weight, torch.ones(3), driver="tape", training=False, calls=6) == []


# --- the second door ------------------------------------------------------------------------------------------------------------

DOOR: dict[str, tuple[str, str]] = {
    "in a capture": (
        "with capture(graph):\n        pass",
        "a capture was started inside another capture\n  at model.py:7 in f: with capture(graph):\n  captures do not nest",
    ),
    "in use": (
        "eager_on_graph(lambda: capture(graph).__enter__())()",
        (
            "the graph is being captured already\n"
            "  at model.py:7 in <lambda>: eager_on_graph(lambda: capture(graph).__enter__())()\n"
            "  an eager step neither replays nor captures its own graph"
        ),
    ),
    "another context": (
        "contextvars.Context().run(torch.sin, x)",
        (
            "code of another context (an asyncio task?) ran during a capture in this thread\n"
            "  at model.py:7 in f: contextvars.Context().run(torch.sin, x)\n"
            "  do not await inside of a capture"
        ),
    ),
    "copied": (
        "copy.copy(graph)",
        (
            "a BreakableCUDAGraph was copied or pickled, but its graphs read memory at fixed addresses\n"
            "  at model.py:7 in f: copy.copy(graph)\n"
            "  make a new graph, and capture into it"
        ),
    ),
    "transform": (
        "torch.func.vmap(eager_on_graph(lambda x: x + 1))(x)",
        (
            "f.<locals>.<lambda> was called under a transform of torch.func, inside a capture\n"
            "  at model.py:7 in f: torch.func.vmap(eager_on_graph(lambda x: x + 1))(x)\n"
            "  call it outside of vmap and its like, on tensors"
        ),
    ),
    "set": (
        "eager_on_graph(lambda x: [{x + 1}])(x)",
        (
            "f.<locals>.<lambda>: field [0] of its result is a set with tensors in it, which cannot be written back\n"
            "  at model.py:7 in f: eager_on_graph(lambda x: [{x + 1}])(x)\n"
            "  return dense tensors, in tuples, lists, dicts, dataclasses or attributes of objects"
        ),
    ),
    "method": (
        "x.tolist()",
        (
            "Tensor.tolist reads values on the host, which no captured graph can do\n"
            "  at model.py:7 in f: x.tolist()\n"
            "  let it run between two segments: put it into a function marked with @eager_on_graph"
        ),
    ),
    "host read": (
        "x.sum().item()",
        (
            "aten::_local_scalar_dense reads a value on the host, inside a capture\n"
            "  at model.py:7 in f: x.sum().item()\n"
            "  let it run between two segments: put it into a function marked with @eager_on_graph"
        ),
    ),
}


@pytest.mark.parametrize("name", DOOR)
def test_capture_door(name: str) -> None:
    """What a body under ``capture`` may not do is an error with its line."""
    code, text = DOOR[name]
    f = from_file(f"\nimport contextvars, copy\nfrom breakable_backend import *\n\n\ndef f(graph, x):\n    {code}\n")
    graph = breakable_backend.BreakableCUDAGraph(driver="tape")
    with torch.no_grad(), pytest.raises(CaptureError) as caught, breakable_backend.capture(graph):
        f(graph, torch.ones(2))
    assert str(caught.value) == text


def test_replay_door() -> None:
    """A graph that cannot be replayed says why."""
    graph, x = breakable_backend.BreakableCUDAGraph(driver="tape"), torch.ones(2)
    fix = "\n  capture first: with capture(graph): ..."
    for _ in range(2):
        with pytest.raises(ReplayError) as caught:
            graph.replay()
        assert text_of(caught.value) == "nothing was captured" + fix
    weight = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad(), breakable_backend.capture(graph):
        x * weight
    del weight
    with pytest.raises(ReplayError) as caught:
        graph.replay()
    fix = "\n  capture again: with capture(graph): ..."
    assert text_of(caught.value) == "a Parameter died, which the graph reads; the graph was released" + fix
    graph.reset()
    with pytest.raises(ReplayError) as caught:
        graph.replay()
    assert text_of(caught.value) == "nothing was captured: the graph was reset" + fix


# --- all of them --------------------------------------------------------------------------------------------------------------


def test_parts() -> None:
    """An error keeps its parts: what, where and what to do; the line that is running stands in for one that is not told."""
    error = ReplayError("what", where="model.py:1", fix="do")
    assert (error.what, error.where, error.fix) == ("what", "model.py:1", "do")
    assert str(error) == "what\n  at model.py:1\n  do"
    here = ReplayError("what", fix="do")
    assert str(here) == f"what\n  at {here.where}\n  do"
    assert here.where.endswith(' in test_parts: here = ReplayError("what", fix="do")')


def test_tree() -> None:
    """The tree of errors is the one in the docstring of ``errors.py``."""
    bases = {
        kind: kind.__bases__
        for kind in (OptionsError, PartitionError, CaptureError, ReplayError, BindError, InternalError)
    }
    assert bases == {
        OptionsError: (BreakableError, ValueError),
        PartitionError: (BreakableError,),
        CaptureError: (BreakableError,),
        ReplayError: (BreakableError,),
        BindError: (BreakableError,),
        InternalError: (BreakableError,),
    }
    assert EagerOutputError.__bases__ == DivergenceError.__bases__ == (ReplayError,)


def test_every_raise_is_typed() -> None:
    """The package raises its own errors only, or passes on what it was given."""
    own = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, BreakableError)}
    inside = {"CannotLower", "CutsRegion", "Unholdable", "_Misfit"}  # never seen by users
    root = Path(breakable_backend.__file__).parent
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # A name may be that of several functions: it counts if one of them makes an error of ours.
    makers = {node.name for node in functions if node.returns is not None and ast.unparse(node.returns) in own | inside}
    makers |= {"as_passing"}  # returns what it was given, by a type variable
    arguments = [argument for node in functions for argument in node.args.args if argument.annotation is not None]
    makers |= {argument.arg for argument in arguments if _made_by(argument.annotation) in own}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised = ast.unparse(node.exc.func)
                assert raised in own | inside or raised.split(".")[-1] in makers, f"{path.name}:{node.lineno} {raised}"


def _made_by(annotation: ast.expr | None) -> str:
    """What a function that is annotated as ``Callable[..., Result]`` returns."""
    text = ast.unparse(annotation) if annotation is not None else ""
    return text.removesuffix("]").rpartition(", ")[2] if text.startswith("Callable[") else ""


def test_nothing_catches_everything() -> None:
    """A wrong option leaves nothing behind: the next function compiles."""
    message(OptionsError, from_file(PLAIN), torch.ones(3), nope=1)
    compiled = torch.compile(from_file(PLAIN), backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        assert torch.equal(compiled(torch.ones(3)), torch.ones(3).sin() + 1)
    assert all(isinstance(executor, Executor) for executor in executors_of())
