"""The catalogue of errors: whatever the package raises shows the user's own line, and has its row in ``docs/errors.md``.

The places that make an error are found in the source of the package. Each has a case here: a file of a user's, ``model.py``,
that runs into it. The line that the error has to show ends in ``# here``. What only a GPU can bring about is planted.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import breakable_backend
import silly
from breakable_backend import BreakableError, ReplayError, _torch, backend, errors
from breakable_backend.calling import device_errors
from breakable_backend.compiling import halves
from breakable_backend.compiling.lowering import CannotLower
from breakable_backend.drivers import cuda, generator, graph_nodes, ordering, streams, tape
from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.drivers.eager import EagerDriver
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.marks import call_sites
from breakable_backend.marks.results import Unholdable

ROOT = Path(breakable_backend.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
OWN = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, BreakableError) and value is not BreakableError
}


# --- the places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """An expression in the package that makes an error."""

    file: str
    function: str
    piece: str
    """The longest piece of text that is in all its errors."""
    kind: str
    """The class; empty where the caller chooses it."""
    cured: bool
    """Whether it says what to do."""
    lines: range


def pieces(text: ast.expr) -> Iterator[str]:
    """The literal pieces of a text that is put together."""
    match text:
        case ast.Constant(value=str(piece)):
            yield piece
        case ast.JoinedStr(values=parts) | ast.BoolOp(values=parts):
            for part in parts:
                yield from pieces(part)
        case ast.BinOp(left=part):
            yield from pieces(part)


def chosen(function: ast.FunctionDef) -> set[str]:
    """Parameters that are a class of errors."""
    return {
        argument.arg
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and re.fullmatch(r"type\[\w+Error\]", ast.unparse(argument.annotation))
    }


def places_in(source: str, file: str) -> Iterator[Place]:
    """Where an error is made: by the name of its class, or of a parameter that is one; or as what becomes one."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    seen: set[tuple[int, int]] = set()
    for function in sorted(functions, key=lambda node: -node.lineno):  # the innermost first
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and node.args) or (node.lineno, node.col_offset) in seen:
                continue
            made = ast.unparse(node.func).rpartition(".")[2]
            if made not in OWN | {"Unholdable"} | chosen(function):
                continue
            seen.add((node.lineno, node.col_offset))
            piece = max(pieces(node.args[0]), key=len, default="").strip(" ,:.")
            assert node.end_lineno is not None
            kind = made if made in OWN else ""
            cured = any(keyword.arg in ("fix", None) for keyword in node.keywords)
            yield Place(file, function.name, piece, kind, cured, range(node.lineno, node.end_lineno + 1))


ALL_PLACES = [
    place
    for path in sorted(ROOT.rglob("*.py"))
    for place in places_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
]


def name_of(place: Place) -> str:
    """The text, so that code may move; with the file, where two say the same, and of the function, where none is its own."""
    alone = sum(place.piece == other.piece for other in ALL_PLACES) == 1
    return place.piece if alone else f"{place.file}: {place.piece or place.function}"


PLACES = {name_of(place): place for place in ALL_PLACES}


# --- the cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """How a user comes to an error."""

    code: str
    """``model.py``."""
    plant: Callable[[pytest.MonkeyPatch], Any] = lambda patch: None
    """Makes this machine another one; what it returns is ``planted`` in the code."""


PRELUDE = """\
import os, warnings
from unittest import mock
from breakable_backend import *

TAPE = {"driver": "tape", "min_kernels": 1}
MASKS = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
x = torch.ones(3)
graph = BreakableCUDAGraph(driver="tape")
def plain(x): return x.sin() + 1
def fails(): raise KeyError("mine")
def compile(function, **options): return torch.compile(function, backend="breakable_cg", options={**TAPE, **options})
def call_as_one_node(marked, dynamic=None):
    compiled = torch.compile(lambda x: marked(x + 1), backend="breakable_cg", fullgraph=True, dynamic=dynamic, options=TAPE)
    compiled(x), compiled(x)
def leaf(): return torch.ones(3, requires_grad=True)
"""
"""What every ``model.py`` begins with."""


def machine(
    *, hip: str | None = None, gpu: bool = True, allocator: str = "native"
) -> Callable[[pytest.MonkeyPatch], None]:
    """What the module of the CUDA driver sees; cuda-python is missing."""
    told = SimpleNamespace(is_available=lambda: gpu, get_allocator_backend=lambda: allocator)
    seen = SimpleNamespace(version=SimpleNamespace(hip=hip), cuda=told)

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(cuda, "torch", seen)
        patch.setattr(cuda, "cudart", Bindings("cuda.bindings.missing"))

    return plant


def refused_launch(patch: pytest.MonkeyPatch) -> cuda.CudaGraph:
    """A graph of CUDA's whose launch fails."""
    told = lambda status: (0, b"invalid resource handle")  # noqa: E731
    bindings = SimpleNamespace(cudaGraphLaunch=lambda graph, stream: (400,), cudaGetErrorString=told)
    patch.setattr(cuda, "cudart", bindings)
    graph = cuda.CudaGraph.__new__(cuda.CudaGraph)
    graph._executable, graph._hooks = object(), ()
    return graph


def lost_device(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What follows a launch on a device that is in error."""
    error = ReplayError("cudaGraphLaunch failed: unspecified launch failure")
    return functools.partial(device_errors.blame, error, TapeDriver(torch.device("cpu")), "graph 0", [])


def given_up(patch: pytest.MonkeyPatch) -> Any:
    """A driver for CUDA whose device is lost."""
    driver: Any = cuda.CudaDriver.__new__(cuda.CudaDriver)
    driver.give_up("the GPU is lost to this process: CUDA error: device-side assert triggered")
    return driver


def unreadable(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """Reads the nodes of a graph that CUDA does not give."""
    patch.setattr(
        graph_nodes, "cuda", SimpleNamespace(CUgraph=int, cuGraphGetNodes=lambda graph, count=0: (700, [], 0))
    )
    return graph_nodes.nodes


def cuda_driver(patch: pytest.MonkeyPatch) -> Any:
    """A driver for CUDA in whose sessions nothing is captured."""
    driver: Any = cuda.CudaDriver.__new__(cuda.CudaDriver)
    driver.device, driver.stream, driver._pool = torch.device("cuda", 0), "the driver's stream", object()
    patch.setattr(driver, "abandon_capture", lambda graph: False, raising=False)
    patch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    patch.setattr(torch.cuda, "current_stream", lambda device: "another stream")
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(cuda.CudaSession, "begin", lambda session, fed=(): setattr(session, "_graph", object()))
    return driver


def failing_end(patch: pytest.MonkeyPatch) -> Any:
    """A driver for CUDA that cannot end a capture."""
    driver = cuda_driver(patch)

    def invalidated(graph: Any) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    patch.setattr(driver, "_end", invalidated, raising=False)
    return driver


def no_stream(patch: pytest.MonkeyPatch) -> Callable[[torch.device], Any]:
    """Asks for the stream of captures, where CUDA has none to give."""
    told = lambda status: (0, b"out of memory")  # noqa: E731
    none = SimpleNamespace(
        cudaStreamCreateWithFlags=lambda flags: (2, None), cudaStreamNonBlocking=1, cudaGetErrorString=told
    )
    patch.setattr(generator, "cudart", none)
    patch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    return generator._new_stream


def failing_begin(patch: pytest.MonkeyPatch) -> Any:
    """A driver for CUDA that cannot open a pool."""
    driver = cuda_driver(patch)
    driver._recordings, driver._pool, driver._first = 1, None, False

    def full() -> None:
        raise RuntimeError("CUDA error: out of memory")

    patch.setattr(driver, "_open_pool", full, raising=False)
    return driver


def failing_allocation(patch: pytest.MonkeyPatch) -> Any:
    """The same, which has its turn."""
    driver = failing_begin(patch)
    patch.setattr(driver, "turn", contextlib.nullcontext, raising=False)
    turns = SimpleNamespace(begin_capture=lambda: None, end_capture=lambda: None)
    patch.setattr(driver, "_draws", turns, raising=False)
    return driver


def long_capture(patch: pytest.MonkeyPatch) -> generator.Draws:
    """The generator of a GPU while another thread captures, and does not end."""
    patch.setattr(generator.Turns, "take", lambda turns, again=True: False)
    return generator.Draws.__new__(generator.Draws)


def stuck_generator(patch: pytest.MonkeyPatch) -> generator.Draws:
    """The generator of a GPU that a failed capture has left in capture mode, while another thread synchronises."""

    def disturbed(graph: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    draws = generator.Draws.__new__(generator.Draws)
    draws.stuck, draws.device, draws.stream = True, torch.device("cuda", 0), SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    for name in ("device", "stream"):
        patch.setattr(torch.cuda, name, lambda _: torch.no_grad())
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    patch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {"capture_begin": disturbed}))
    patch.setattr(_torch, "keep_for_ever", lambda kept: None)
    patch.setattr(draws, "spoilt", lambda pool, error: None, raising=False)
    patch.setattr(draws, "reset_on", lambda stream: torch.no_grad(), raising=False)
    patch.setattr(generator, "RETRY", 0.01)
    return draws


def capturing_stream(patch: pytest.MonkeyPatch) -> Any:
    """A session for CUDA, where a capture is active."""
    return cuda.CudaSession(SimpleNamespace(stream=None, is_capturing=lambda: True))  # type: ignore[arg-type]


def invalid_capture(patch: pytest.MonkeyPatch) -> Any:
    """What asks how far a capture has come, of one that is invalid."""
    status = SimpleNamespace(cudaStreamCaptureStatusActive=1)
    bindings = SimpleNamespace(cudaStreamCaptureStatus=status, cudaStreamIsCapturing=lambda stream: (0, 2))
    patch.setattr(ordering, "cudart", bindings)
    return ordering.capture_end


def captured_stream(patch: pytest.MonkeyPatch) -> ordering.Order:
    """The order of two streams, of which somebody captures the first and does not end."""
    patch.setattr(torch.cuda, "Event", lambda: None)
    patch.setattr(torch.cuda, "current_stream", lambda device: None)
    patch.setattr(ordering, "is_captured", lambda stream: stream == 1)
    patch.setattr(ordering, "WAIT", 0.01)
    order = ordering.Order(torch.device("cuda", 0))
    order.last = 1
    return order


def unknown_stream(patch: pytest.MonkeyPatch) -> Any:
    """The streams of a capture that does not know the current one."""
    patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    patch.setattr(streams, "is_captured", lambda stream: False)
    return streams.StreamOrder(SimpleNamespace(device=torch.device("cuda", 0)))  # type: ignore[arg-type]


def open_segment(patch: pytest.MonkeyPatch) -> Any:
    """The streams of a capture, in a segment."""
    order = unknown_stream(patch)
    order._capturing = True
    return order


def growing_op(patch: pytest.MonkeyPatch) -> Any:
    """An op with a kernel that the tape does not look into, which makes more memory each time."""
    sizes = iter([2, 3])
    patch.setattr(_torch, "kernel_made_of_ops", lambda *args, **watching: None)
    patch.setitem(silly.hooks, "visit", lambda x: torch.ones(next(sizes)))
    return silly.visit


def losing(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call of this on, no graph can be traced with its backward."""

    def backward(halves: Any, *_: Any) -> Any:
        raise CannotLower("planted")

    return lambda: patch.setattr(halves.Halves, "backward", backward)


def parting(patch: pytest.MonkeyPatch) -> None:
    """A backend that hands each tensor on as a copy, as one that functionalises may."""
    run = call_sites.Site.run

    def parted(site: Any, call: Any, *rest: Any, **said: Any) -> Any:
        return run(site, call._replace(tensors=[tensor.clone() for tensor in call.tensors]), *rest, **said)

    patch.setattr(call_sites.Site, "run", parted)


def broken_partition(patch: pytest.MonkeyPatch) -> None:
    """A fault of this package: an executor that cannot be made."""

    def fails(*args: Any) -> None:
        raise KeyError("segment 3")

    patch.setattr(backend, "Executor", fails)


def foreign_capture(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begins what looks like somebody else's capture."""
    return lambda: patch.setattr(tape.TapeDriver, "is_capturing", lambda driver: True)


def unchecked_tape(patch: pytest.MonkeyPatch) -> None:
    """A tape that, as a GPU, does not see that a tensor gets other memory."""
    patch.setattr(tape._Tape, "_check_after", lambda *_: None)


def in_body(code: str) -> str:
    """``code`` under a capture."""
    return f"with capture(graph):\n    {code}"


def with_gradients(code: str) -> str:
    """``code`` under a capture in grad mode, with a leaf ``y``."""
    return f"y = leaf()\nwith torch.enable_grad(), capture(graph):\n    {code}"


def returns(result: str, **said: str) -> str:
    """A marked function with such a result, in compiled code."""
    marked = ", ".join(f"{name}={value}" for name, value in said.items())
    return f"call_as_one_node(eager_on_graph({marked})(lambda x: ({result})))  # here"


CASES: dict[str, Case] = {
    # options, marks and machines
    "options takes a dictionary, got": Case(
        "torch.compile(plain, backend='breakable_cg', options=['static'])(x)  # here"
    ),
    "unknown option": Case("compile(plain, output=1)(x)  # here"),
    "does not take": Case("compile(plain, outputs='mine')(x)  # here"),
    "option 'tolerance' does not take": Case("compile(plain, tolerance=0.1)(x)  # here"),
    "option 'eager_ops' takes a list of ops, got": Case("compile(plain, eager_ops='aten::sin')(x)  # here"),
    "is a mode of Inductor's, and this backend compiles no kernels": Case(
        "torch.compile(plain, backend='breakable_cg', mode='max-autotune')(x)  # here"
    ),
    "takes an integer of at least": Case("compile(plain, max_recordings='8')(x)  # here"),
    "does not exist yet": Case("compile(plain, inner='inductor')(x)  # here"),
    "is not a registered op": Case("mark_eager('aten::softmx')  # here"),
    "is not an op": Case("mark_eager(None)  # here"),
    "is a Python function, and Dynamo traces through it": Case("compile(plain, eager_ops=[plain])(x)  # here"),
    "breakable_cg does not support ROCm builds of torch": Case(
        "compile(plain, driver='cuda')(x)  # here", machine(hip="6.2")
    ),
    "driver='cuda' needs a CUDA GPU, and torch sees none": Case(
        "compile(plain, driver='cuda')(x)  # here", machine(gpu=False)
    ),
    "driver='cuda' needs PyTorch's own allocator: under backend:cudaMallocAsync a graph keeps no memory between launches": Case(
        "compile(plain, driver='cuda')(x)  # here", machine(allocator="cudaMallocAsync")
    ),
    "driver='cuda' needs cuda-python, which cannot be imported": Case(
        "compile(plain, driver='cuda')(x)  # here", machine()
    ),
    "eager_on_graph marks functions, not": Case("eager_on_graph(3)  # here"),
    "eager_on_graph got enable twice": Case("eager_on_graph(True, enable=True)  # here"),
    "enable takes True or False, got": Case("eager_on_graph(enable=1)  # here"),
    "pool takes a torch.cuda.MemPool, a handle or another graph's pool(), got": Case(
        "BreakableCUDAGraph(pool=3)  # here"
    ),
    "barrier takes a function, got": Case("capture(graph, barrier=3)  # here"),
    "eager_on_graph takes no": Case("eager_on_graph(mutate_args=('x',))(plain)  # here"),
    "takes a function, got": Case("eager_on_graph(fake=3)(plain)  # here"),
    "capture takes a BreakableCUDAGraph, got": Case("capture(plain)  # here"),
    "eager_on_graph marks functions that return their result, and": Case(
        "async def wait(x):\n    return x\neager_on_graph(wait)  # here"
    ),
    "keeps its results by its arguments, which are the same tensors in each replay": Case(
        "import functools\n@eager_on_graph  # here\n@functools.lru_cache\ndef cached(x): return x * 2\n\ncached(x)"
    ),
    "eager_region takes no argument, and was used without its parentheses": Case("eager_region(plain)  # here"),
    "eager takes a function without arguments, got": Case("explain(graph, measure=True, eager=3)  # here"),
    "reset takes what torch.compile returned, got": Case("reset(graph)  # here"),
    "export takes a directory as its second argument, got": Case("export('folder', compile(plain))  # here"),
    "capture takes no pool: a graph has its pool from the start": Case("capture(graph, pool=graph.pool())  # here"),
    "stream takes a torch.cuda.Stream, got": Case("capture(graph, stream=3)  # here"),
    "options apply to a function that is not compiled yet": Case("explain(compile(plain), options={})  # here"),
    "recompute and backward exclude each other": Case("eager_on_graph(recompute=True, backward=plain)(plain)  # here"),
    "mutates_args takes a tuple of names, got": Case("eager_on_graph(mutates_args='x')(plain)  # here"),
    "mutates_args: there is no parameter": Case("eager_on_graph(mutates_args=('y',))(plain)  # here"),
    "bind takes no check=": Case("bind(compile(plain), x, check='all')  # here"),
    "is not compiled, so there is nothing to bind": Case("bind(plain, x)  # here"),
    "this call cannot be bound": Case("f = compile(lambda x: silly.triple(x))\nbind(f, x, misfit='raise')  # here"),
    "a bound function was copied or pickled, but it is bound to the modules and the graphs of this process": Case(
        "import copy\nf = bind(compile(plain), x)\ncopy.deepcopy(f)  # here"
    ),
    "this call does not fit what was bound": Case("f = bind(compile(plain), x, misfit='raise')\nf(x[:1])  # here"),
    # reports
    "is not a directory": Case("open(folder / 'a', 'w').close()\nexport(graph, folder / 'a')  # here"),
    "export: nothing was compiled by breakable_cg yet": Case("export(compile(plain), folder)  # here"),
    "export: nothing was captured": Case("export(graph, folder)  # here"),
    "is not compiled": Case("explain(plain)  # here"),
    "this is not JSON": Case("Report.from_json('{')  # here"),
    "this is not a report of schema": Case("Report.from_json('{}')  # here"),
    "the saved report lacks": Case("Report.from_json('{\"schema\": 1}')  # here"),
    "the saved report does not fit": Case('Report.from_json(\'{"schema": 1, "programs": 3}\')  # here'),
    "measure=True needs the function to measure": Case("explain(measure=True)  # here"),
    "in the environment)": Case(
        "with mock.patch.dict(os.environ, BREAKABLE_CG_OUTPUTS='mine'): compile(plain)(x)  # here"
    ),
    "is in debug mode, where times mean nothing": Case(
        "f = compile(plain, debug='eager')\nf(x), f(x), f(x)\nexplain(f, measure=True)  # here"
    ),
    "there is nothing to measure: no call was recorded": Case(
        "f = compile(plain)\nf(x)\nexplain(f, measure=True)  # here"
    ),
    "there is nothing to measure: the call replays nothing": Case(
        "torch.set_grad_enabled(True)\nweight = leaf()\nwith warnings.catch_warnings(action='ignore'):\n"
        "    explain(lambda x: x * weight, x, measure=True, options=TAPE)  # here"
    ),
    "is not kept between calls, so there is nothing to replay": Case(
        "f = compile(lambda x, y: silly.triple(y) + (x.sin() + 1))\n"
        "for _ in range(3): f(x, x + 1)\n"
        "explain(f, measure=True)  # here"
    ),
    "there is nothing to measure: the graph is empty": Case("explain(graph, measure=True)  # here"),
    "the graph is in debug mode, where times mean nothing": Case(
        "with capture(graph, debug='eager'): x + 1\nexplain(graph, measure=True)  # here"
    ),
    # compiling
    "backend.py: cannot be captured": Case(
        "def inferred(x):\n    with torch.inference_mode(): return x * 2  # here\n\n"
        "compile(inferred, auto_break=False)(x)"
    ),
    "calling/training.py: cannot be captured": Case(
        "torch.set_grad_enabled(True)\n"
        "def product(x): return (x * 2).prod()  # here\n\n"
        "f = compile(product, auto_break=False)\nf(leaf()).backward()\nf(leaf())"
    ),
    "compiling/scope.py: cannot be captured": Case(
        "def masked(x):\n    y = x + 1\n    return y[y > 0]  # here\n\nwith MASKS: compile(masked, auto_break=False)(x)"
    ),
    "saved for its backward is gone: saved_tensors_hooks kept only a copy of its handle": Case(
        "@eager_on_graph  # here\ndef square(x): return x * x\n\ntorch.set_grad_enabled(True)\n"
        "f = torch.compile(lambda x: square(x.sin()) * 2, backend='aot_eager')\nf(leaf())\n"
        "with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor): out = f(leaf())\nout.sum().backward()"
    ),
    "writes a tensor and reads memory around it, but the backend passed a copy of the tensor alone": Case(
        "@eager_on_graph(mutates_args=('a',), fake=lambda a, b: torch.empty_like(b))  # here\n"
        "def write(a, b): return a.add_(1) + b\n\n"
        "compile(lambda x: write((y := x * 2)[:2], y[1:]))(x)",
        parting,
    ),
    "cannot be one node": Case(
        "@eager_on_graph  # here\ndef unwrap(thing): return x + 1\n\nthing = object()\ncall_as_one_node(lambda x: unwrap(thing))"
    ),
    "and in compiled code that is a copy": Case(
        "@eager_on_graph(fake=lambda x, kept: x * 2)  # here\n"
        "def keep(x, kept):\n    kept.append(x)\n    return x * 2\n\n"
        "compile(lambda x: keep(x + 1, []))(x)"
    ),
    "and in compiled code arguments have no history": Case(
        "torch.set_grad_enabled(True)\n@eager_on_graph(fake=torch.empty_like)  # here\n"
        "def watch(x):\n    x.register_hook(print)\n    return x * 2\n\n"
        "compile(lambda x: watch(x.sin()) + 1)(leaf())"
    ),
    "a view of an argument with a hook, or with its gradient retained": Case(
        "with torch.enable_grad():\n    x = leaf()\n    " + returns("(y := x.view_as(x), y.register_hook(print))[0]")
    ),
    "does not take the arguments of the call": Case(returns("x * 2", fake="lambda: None")),
    "cannot run on fake tensors, which have no values": Case(
        returns("x * 2", fake="lambda x: x * 2 if x.sum() > 0 else x")
    ),
    "returned": Case(returns("x[:2] * 2", fake="lambda x: x * 2")),
    "a tensor with gradients of what the function closes over, which compiled code does not support": Case(
        "with torch.enable_grad():\n    weight = leaf()\n    "
        + returns("x * weight", fake="lambda x: torch.empty_like(x)")
    ),
    "an object that compiled code cannot hold": Case(returns("object()")),
    "a container that holds a function or a class, such as a defaultdict": Case(
        returns("__import__('collections').defaultdict(list, a=x * 2)")
    ),
    "a number or string of a subclass, which compiled code cannot hold": Case(
        returns("__import__('numpy').float64(1.5)")
    ),
    "an int of more than 64 bits": Case(returns("2**63")),
    "a float that depends on values": Case(
        "call_as_one_node(eager_on_graph(fake=lambda x: x.shape[0] / 3)(lambda x: x.shape[0] / 3), dynamic=True)  # here"
    ),
    "which compiled code cannot hold": Case(returns("x.to_sparse()")),
    "a tensor of the class": Case("class Mine(torch.Tensor): pass\n" + returns("(x * 2).as_subclass(Mine)")),
    "memory around that of an argument": Case(
        "whole = torch.ones(4)\nx = torch.from_dlpack(whole[1:])\n"
        "mark = eager_on_graph(fake=lambda x: x.new_empty(4))\n"
        "compile(mark(lambda x: torch.from_dlpack(whole)))(x)  # here"
    ),
    "a view of an argument with another dtype": Case(returns("x.view(torch.int32)")),
    "tensors of several dtypes that share memory": Case(returns("(y := x * 2, y.view(torch.int32))")),
    "tensors that partly overlap and need gradients": Case(
        "with torch.enable_grad():\n    x = leaf()\n    " + returns("(lambda x: [x[:2], x[1:]])(x * 2)")
    ),
    "breakable_cg failed internally with": Case("compile(plain)(x)  # here", broken_partition),
    # capturing
    "recordings/recorder.py: _capture_failed": Case(
        "def item(x):\n    return x * x.max().item()  # here\n\n"
        "op = torch.library.custom_op('catalogue::item', item, mutates_args=(), schema='(Tensor x) -> Tensor')\n"
        "op.register_fake(torch.empty_like)\n"
        "f = compile(lambda x: op(x + 1) * 2, auto_break=False)\n"
        "f(x), f(x)"
    ),
    "adds nothing to the captured graph, so a replay would leave out its work": Case(
        "@torch.library.custom_op('catalogue::ghost', mutates_args=())\n"
        "def ghost(x: torch.Tensor) -> torch.Tensor:\n    return torch.empty_like(x)\n\n"
        "ghost.register_fake(torch.empty_like)\n"
        "def f(x):\n    return ghost(x + 1) * 2  # here\n\n"
        "f = compile(f, auto_break=False)\n"
        "f(x), f(x)"
    ),
    "was called inside another CUDA graph capture, but has an eager step": Case(
        "def f(x):\n    return silly.triple(x + 1)  # here\n\nf = compile(f)\nf(x), planted(), f(x)", foreign_capture
    ),
    "capture_error_mode does not take": Case("capture(graph, capture_error_mode='mine')  # here"),
    "capturing/capture.py: a capture was started inside another capture": Case(
        in_body("with capture(graph): pass  # here")
    ),
    "another CUDA graph capture is active": Case("planted()\nwith capture(graph):  # here\n    pass", foreign_capture),
    "a graph was used in an eager step of another graph that shares its pool": Case(
        "other = BreakableCUDAGraph(pool=graph.pool())\nwith capture(other):\n    x + 1\n"
        "with capture(graph):\n    eager_on_graph(other.replay)()  # here"
    ),
    "the graph is being": Case(in_body("eager_on_graph(lambda: capture(graph).__enter__())()  # here")),
    "code of another context (an asyncio task?) ran during a capture in this thread": Case(
        "import contextvars\n" + in_body("contextvars.Context().run(torch.sin, x)  # here")
    ),
    "a BreakableCUDAGraph was copied or pickled, but its graphs read memory at fixed addresses": Case(
        "import copy\ncopy.deepcopy(graph)  # here"
    ),
    "inside a capture": Case(in_body("x.sum().item()  # here")),
    "gives other memory to a tensor from outside, inside a capture": Case(
        "y, many = torch.ones(1), torch.ones(2, 5, 5)\n" + in_body("y.addbmm_(many, many)  # here"), unchecked_tape
    ),
    "reaches into the memory around the result of an eager step, inside a capture": Case(
        in_body("eager_on_graph(lambda x: (x + 1)[::2])(x).as_strided((2,), (1,))  # here")
    ),
    "the result of an eager step was resized, and its memory belongs to the graph": Case(
        in_body("torch.add(torch.ones(9), 1, out=eager_on_graph(lambda: torch.ones(1))())  # here")
    ),
    "changes the shape or the strides of a tensor from outside, which a replay would not": Case(
        in_body("x.unsqueeze_(0)  # here")
    ),
    "changed the shape, the strides or the memory of a tensor that it was given": Case(
        in_body("eager_on_graph(mutates_args=('y',))(lambda y: y.unsqueeze_(0))(x + 1)  # here")
    ),
    "which each replay would find empty": Case(in_body("eager_on_graph(sum)(iter([x, x]))  # here")),
    "was called under a transform of torch.func, inside a capture": Case(
        in_body("torch.func.vmap(eager_on_graph(plain))(x)  # here")
    ),
    "an argument that needs gradients": Case(
        "double = eager_on_graph(mutates_args=('x',))(lambda x: x.mul_(2))\n" + with_gradients("double(y * 1)  # here")
    ),
    "has a capture_stub, which has no gradients, and an argument that needs some": Case(
        with_gradients("eager_on_graph(capture_stub=plain)(plain)(y)  # here")
    ),
    "which needs gradients that no replay would renew": Case(
        with_gradients("eager_on_graph(lambda x: x.to('meta'))(y)  # here")
    ),
    "returned a tensor with gradients of a tensor that is not an argument": Case(
        with_gradients("z = y * 1; eager_on_graph(lambda: z * 2)()  # here")
    ),
    "and in captured code arguments have no history": Case(
        "def watch(x):\n    x.register_hook(print)\n    return x * 2\n\n"
        + with_gradients("eager_on_graph(watch)(y * 1)  # here")
    ),
    "returned existing memory with a gradient of its own": Case(
        "class Same(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x): return x.view_as(x)\n"
        "    @staticmethod\n    def backward(ctx, g): return -g\n"
        + with_gradients("eager_on_graph(lambda x: Same.apply(x))(y * 1)  # here")
    ),
    "ran outside of the capture of its forward, or a second time": Case(
        with_gradients("z = eager_on_graph(plain)(y)  # here") + "\nz.backward(x)"
    ),
    "a second derivative (create_graph=True) was taken through": Case(
        with_gradients("z = eager_on_graph(plain)(y)  # here\n    torch.autograd.grad(z.sum(), y, create_graph=True)")
    ),
    "removed the .grad of a": Case(
        "y = leaf()\ny.grad = x\nclear = eager_on_graph(lambda y: setattr(y, 'grad', None))\n"
        "with torch.enable_grad(), capture(graph):\n    clear(y)  # here"
    ),
    "is another tensor than when it was captured": Case(
        "y = leaf()\ny.grad = x\n"
        "with torch.enable_grad(), capture(graph):\n    (y * 2).sum().backward()  # here\n\n"
        "graph.replay()\ny.grad = None\ngraph.replay()"
    ),
    "returned other tensors that need gradients than when it was captured": Case(
        "cut = []\n"
        + with_gradients("eager_on_graph(lambda x: x.detach() * 1 if cut else x * 1)(y).sum().backward()  # here")
        + "\ncut.append(1)\ngraph.replay()"
    ),
    "returned a tensor with gradients of a tensor that had none when it was captured": Case(
        "other, used = leaf(), []\n"
        + with_gradients("eager_on_graph(lambda x: x * other if used else x * 1)(y).sum().backward()  # here")
        + "\nused.append(1)\ngraph.replay()"
    ),
    "has gradients of other tensors than when it was captured": Case(
        "cut = []\n"
        + with_gradients("eager_on_graph(lambda x, z: z * 2 + (0 if cut else x))(y, y * 2).sum().backward()  # here")
        + "\ncut.append(1)\ngraph.replay()"
    ),
    "nothing was captured, since the body caught an error": Case(
        "@eager_on_graph\ndef fails():\n    raise KeyError('mine')  # here\n\n"
        + in_body("try: fails()\n    except KeyError: pass")
    ),
    "capturing/capture.py: close": Case(
        in_body("try: x.tolist()\n    except CaptureError: pass\n    raise KeyError('mine')  # here")
    ),
    "capturing/capture.py: _placed": Case(in_body("x.tolist()  # here")),
    "its result is": Case(
        "whole = x; x = torch.from_dlpack(x[1:])\n"
        + in_body("eager_on_graph(lambda x: torch.from_dlpack(whole))(x)  # here")
    ),
    "which cannot be written back": Case(in_body("eager_on_graph(lambda x: {x + 1})(x)  # here")),
    "which no captured graph can do": Case(in_body("x.tolist()  # here")),
    "the captured code raised": Case(
        "def fails(): raise KeyError('mine')  # here\nTapeDriver(x.device).capture(fails)"
    ),
    "drivers/tape.py: _failure": Case("TapeDriver(x.device).capture(lambda: x.tolist())  # here"),
    "drivers/tape.py: a capture was started inside another capture": Case(
        "driver = TapeDriver(x.device)\ndriver.capture(lambda: driver.capture(fails))  # here"
    ),
    "drivers/cuda.py: _failure": Case(
        "def fails(): raise RuntimeError('CUDA error')  # here\nplanted.capture(fails)", cuda_driver
    ),
    "the capture became invalid, and no error was raised": Case("planted(7)  # here", invalid_capture),
    "drivers/cuda.py: end_capture": Case("planted.end_capture(object())  # here", failing_end),
    "drivers/cuda.py: begin_capture": Case("planted.begin_capture()  # here", failing_begin),
    "drivers/cuda.py: allocating": Case("with planted.allocating():  # here\n    pass", failing_allocation),
    "another thread's capture did not end within": Case("planted.begin_capture()  # here", long_capture),
    "CUDA cannot create a stream": Case("planted(torch.device('cuda', 9))  # here", no_stream),
    "a CUDA graph capture is active already": Case("planted.begin()  # here", capturing_stream),
    "which is not a part of the capture, so no graph would contain the op": Case(
        "planted.touch()  # here", unknown_stream
    ),
    "the body set the state of the random generator to one that another segment, or other code, had read": Case(
        "planted._set_state(print, None)  # here", open_segment
    ),
    "is the current stream": Case("planted.capture(lambda: None)  # here", cuda_driver),
    # replaying
    "nothing was captured": Case("graph.replay()  # here"),
    "somebody else has been capturing the stream of the last replay for": Case(
        "planted.follow(2)  # here", captured_stream
    ),
    "a graph was replayed inside somebody else's capture, which cannot contain the launch of a graph": Case(
        in_body("eager_on_graph(plain)(x)") + "\nplanted()\ngraph.replay()  # here", foreign_capture
    ),
    "that an eager function takes no longer exists": Case(
        "model = torch.nn.Linear(3, 3)\n"
        + in_body("eager_on_graph(lambda model, x: x + 1)(model, x)  # here")
        + "\ndel model\ngraph.replay()"
    ),
    "but was recorded as": Case(
        "def f(x): return x.sin() + 1  # here\n"
        "f = compile(f, guard_filter_fn=lambda guards: [False for _ in guards])\n"
        "f(x), f(x), f(x), f(torch.ones(4))"
    ),
    "this looks like address moved": Case(
        "weight = torch.nn.Parameter(x.clone())\n"
        + in_body("y = x * weight  # here")
        + "\nold, weight.data = weight.data, torch.ones(3)\ngraph.replay()"
    ),
    "but was compiled for": Case(
        "def lies(x):\n    return silly.liar(x.sin() + 1) * 2  # here\n\ncompile(lies)(torch.ones(2, 3))"
    ),
    "when it was captured": Case(
        "sizes = iter([2, 3])\n"
        + in_body("eager_on_graph(lambda: torch.ones(next(sizes)))()  # here")
        + "\ngraph.replay()"
    ),
    "the backward of": Case(
        "def backward(context, grad): return grad, grad  # here\n"
        "with torch.enable_grad(): eager_on_graph(backward=backward)(lambda x: x * 2)(leaf()).sum().backward()"
    ),
    "code calls a marked function that this process does not know: it contains the number of the call, and not the function": Case(
        "torch.ops.breakable_cg.call(3, [False], False, [x], [], [])  # here"
    ),
    "a second derivative (create_graph=True) passed through": Case(
        "@eager_on_graph  # here\ndef square(a): return a * a\nf, y = compile(lambda x: square(x).sin()), leaf()\n"
        "with torch.enable_grad():\n    f(y)\n"
        "    (first,) = torch.autograd.grad(f(y).sum(), y, create_graph=True)\n    torch.autograd.grad(first.sum(), y)"
    ),
    "a second derivative was asked for through a torch.autograd.Function whose backward turns gradients on or off, and Dynamo"
    " does not tell where": Case(
        "class Square(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        ctx.save_for_backward(x)\n        return x * x\n"
        "    @staticmethod\n    def backward(ctx, grad):\n"
        "        with torch.enable_grad(): return grad * 2 * ctx.saved_tensors[0]\n\n"
        "with torch.enable_grad(), warnings.catch_warnings(action='ignore'):\n"
        "    (first,) = torch.autograd.grad(compile(lambda x: Square.apply(x))(y := leaf()).sum(), y, create_graph=True)\n"
        "    torch.autograd.grad(first.sum(), y)  # here"
    ),
    "only a call that ran eagerly supports that": Case(
        "y, n = leaf(), torch.zeros(1)\ndef f(x):\n    n.add_(1)\n    return (x.sin() * n).exp()  # here\n\nf = compile(f)\n"
        "with torch.enable_grad():\n    for _ in range(3): f(y).sum().backward()\n"
        "    torch.autograd.grad(f(y).sum(), y, create_graph=True)"
    ),
    "returned a tensor that needs gradients, and needed none in the calls before it was compiled": Case(
        "y = leaf()\nuses = [False]\n@eager_on_graph  # here\ndef add(a): return a * 2 if uses[0] else torch.zeros_like(a)\n"
        "f = compile(lambda x: (add(x) + x.sin() * 2).exp())\n"
        "with torch.enable_grad():\n    for _ in range(7): f(y).sum().backward()\n"
        "    uses[0] = True\n    f(y).sum().backward()"
    ),
    "leave out one of its arguments, and did not when they were captured": Case(
        "y = leaf()\ngives = [True]\n"
        "@eager_on_graph(backward=lambda _, grad: (grad, grad if gives[0] else None))  # here\ndef add(a, b): return a + b\n"
        "f = compile(lambda x: (add(x.sin() * 2, x.cos() * 3) * 2).exp())\n"
        "with torch.enable_grad():\n    for _ in range(7): f(y).sum().backward()\n"
        "    gives[0] = False\n    f(y).sum().backward()"
    ),
    "got gradients that it was not traced for": Case(
        "y = leaf()\nf = compile(lambda x: ((x.sin() * 2).exp(), x.cos() * 3))  # here\n"
        "with torch.enable_grad():\n    for _ in range(3): f(y)[0].sum().backward()\n"
        "    planted()\n    f(y)[1].sum().backward()",
        losing,
    ),
    "is not as in eager": Case(
        "shift = torch.library.custom_op('catalogue::shift', lambda x: x.add_(1) + 1, mutates_args=(), schema='(Tensor x) -> Tensor')\n"
        "shift.register_fake(torch.empty_like)\n"
        "def shifted(x):\n    y = x.relu() + 1\n    z = shift(x)\n    return x * 2 + y + z  # here\n\n"
        "f = compile(shifted, debug='compare', eager_ops=['catalogue::shift'])\n"
        "for _ in range(3): f(torch.ones(1))"
    ),
    "is not what the forward saved": Case(
        "y = leaf()\ndef act(x):\n    return (x.sin() + 1).tanh()  # here\n\n"
        "f = compile(act, debug='compare')\n"
        "with torch.enable_grad():\n    for _ in range(5): f(y).sum().backward()\n"
        "    z = f(y)\n    z.data.mul_(2)\n    z.sum().backward()"
    ),
    "drivers/tape.py: bytes where it made": Case(
        "made, _ = TapeDriver(x.device).capture(lambda: planted(x))\nmade.replay(0)  # here", growing_op
    ),
    "after the capture, but the graph reads it at its address": Case(
        "made, _ = TapeDriver(x.device).capture(lambda: x + 1)\nx.data = torch.ones(5)\nmade.replay(0)  # here"
    ),
    "a graph was replayed after its release": Case(
        "driver = TapeDriver(x.device)\nmade, _ = driver.capture(lambda: x + 1)\ndriver.release([made])\nmade.replay(0)  # here"
    ),
    "drivers/eager.py: bytes where it made": Case(
        "sizes = iter([2, 3])\nmade, _ = EagerDriver(x.device).capture(lambda: torch.ones(next(sizes)))\n"
        "made.replay(0), made.replay(0)  # here"
    ),
    "a graph that draws random numbers cannot be replayed: another thread's capture did not end within": Case(
        "planted.begin_replay(0)  # here", long_capture
    ),
    "no random numbers can be drawn: a failed capture left the generator in capture mode, and so did": Case(
        "planted.mend()  # here", stuck_generator
    ),
    "the GPU is lost to this process": Case("planted()  # here", lost_device),
    "drivers/cuda.py: refuse": Case("planted.begin()  # here", given_up),
    "cudaGraphLaunch failed": Case("planted.replay(0)  # here", refused_launch),
    "CUDA does not work in a process that was forked from one that uses it": Case(
        "planted._forked()\nplanted.begin()  # here", cuda_driver
    ),
    "failed": Case("planted(1)  # here", unreadable),
}


# --- the tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[str, int]]:
    """Where each error was made, by its ``id``. Below ``__init__``, which must see the stack as it is."""
    found: dict[int, tuple[str, int]] = {}
    kept = []

    def new(kind: Any, /, *args: Any, **said: Any) -> Any:
        frame = sys._getframe(1)
        error = Exception.__new__(kind, *args)
        kept.append(error)  # no other may get its id
        found[id(error)] = (frame.f_code.co_filename, frame.f_lineno)
        return error

    for kind in (BreakableError, Unholdable):
        monkeypatch.setattr(kind, "__new__", new)
    return found


def line_of(where: str, source: str) -> str:
    """The line of ``model.py`` that ``where`` tells."""
    told = re.match(r"model\.py:(\d+) in [\w<>]+: (.+)", where)
    assert told, where
    line = source.splitlines()[int(told[1]) - 1].strip()
    assert line == told[2]
    return line


def run_into(case: Case, patch: pytest.MonkeyPatch, folder: Path) -> tuple[BreakableError, str]:
    """The error that a ``model.py`` runs into, and its source."""
    source = PRELUDE + case.code
    linecache.cache["model.py"] = (len(source), None, source.splitlines(True), "model.py")
    names = {"TapeDriver": tape.TapeDriver, "EagerDriver": EagerDriver, "folder": folder, "planted": case.plant(patch)}
    scope = {"torch": torch, "silly": silly, "__name__": "model", **names}
    with torch.no_grad(), pytest.raises(BreakableError) as caught:
        exec(compile(source, "model.py", "exec"), scope)
    for name in [name for name in scope if not name.startswith("__")]:  # the others are Dynamo's
        del scope[name]  # Dynamo's guards hold the scope for ever, and would hold the tensors in it
    return caught.value, source


@pytest.mark.parametrize("name", PLACES)
def test_every_error_shows_the_users_line(
    name: str, made: dict[int, tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever is raised was made at the place that the case is for, says its text, and shows the line to look at."""
    place = PLACES[name]
    error, source = run_into(CASES[name], monkeypatch, tmp_path)
    chain: list[BaseException | None] = [error]
    while (last := chain[-1]) is not None:
        chain.append(last.__cause__ or last.__context__)
    makers = [made[id(link)] for link in chain if id(link) in made]
    assert any(Path(file) == ROOT / place.file and line in place.lines for file, line in makers), makers
    assert place.kind in ("", type(error).__name__)
    assert place.piece in error.what
    assert line_of(error.where, source).endswith("# here"), str(error)
    assert str(error).startswith(f"{error.what}\n  at {error.where}")


def test_every_error_says_what_to_do() -> None:
    """Errors in the words of CUDA's driver are excepted: for those the page has the cure."""
    silent = {place.file for place in ALL_PLACES if place.kind and not place.cured}
    assert silent <= {f"drivers/{name}.py" for name in ("cuda", "generator", "graph_nodes", "ordering")}


def test_every_error_has_a_case() -> None:
    """No place is without a case, and no case without its place; no two places have one name."""
    assert sorted(map(name_of, ALL_PLACES)) == sorted(CASES)


def test_finds_places() -> None:
    """A place is found by the class, by a parameter that is a class, and in a function within another."""
    source = """
def a(kind: type[BreakableError]):
    def b():
        return CaptureError(f"it {x}, so" + y, fix="z")
    raise kind(f"{x} is wrong: {b}")

def c():
    raise errors.OptionsError(str(x))
"""
    found = [(place.function, place.piece, place.kind, place.lines[0]) for place in places_in(source, "f.py")]
    assert found == [
        ("c", "", "OptionsError", 8),
        ("b", "so", "CaptureError", 4),
        ("a", "is wrong", "", 5),
    ]


@pytest.mark.gpu
def test_a_capture_that_fails_on_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA's own error shows the line inside of the op that did what no capture can do, as the tape does."""
    code = CASES["recordings/recorder.py: _capture_failed"].code.replace("catalogue::item", "catalogue::item_on_cuda")
    error, source = run_into(Case('x, TAPE["driver"] = x.cuda(), "cuda"\n' + code), monkeypatch, tmp_path)
    assert isinstance(error, breakable_backend.CaptureError)
    assert "capturing" in error.what
    assert line_of(error.where, source).endswith("# here"), str(error)


# --- the page -------------------------------------------------------------------------------------------------------------


def rows() -> dict[str, list[list[str]]]:
    """The tables of ``docs/errors.md`` that say ``text | cause | cure``, by the class of their section."""
    found: dict[str, list[list[str]]] = {}
    for section in re.split(r"^## ", (DOCS / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name = section.partition("\n")[0].strip("`")
        for table in re.findall(r"^\| text \| cause \| cure \|\n\|.*\n((?:\|.*\n)+)", section, re.MULTILINE):
            lines = [re.split(r" \| ", line.strip("| \n")) for line in table.splitlines()]
            found.setdefault(name, []).extend(lines)
    return found


REPEATS = {
    "recordings/recorder.py: _capture_failed": "which no captured graph can do",
    "capturing/capture.py: close": "CUDA error",
    "capturing/capture.py: _placed": "which no captured graph can do",
    "drivers/tape.py: _failure": "which no captured graph can do",
    "drivers/cuda.py: _failure": "CUDA error",
    "drivers/cuda.py: end_capture": "CUDA error",
    "drivers/cuda.py: refuse": "the GPU is lost to this process",
    "drivers/cuda.py: begin_capture": "CUDA error",
    "drivers/cuda.py: allocating": "CUDA error",
}
"""Places with no text of their own: they say what another error, or CUDA, has said. A row has this in its place."""


@pytest.mark.parametrize("name", PLACES)
def test_every_error_is_on_the_page(name: str) -> None:
    """Each error has a row with cause and cure under its class; under any, where the caller chooses that."""
    place, tables = PLACES[name], rows()
    candidates = tables[place.kind] if place.kind else [row for table in tables.values() for row in table]
    found = [row for row in candidates if (place.piece or REPEATS[name]) in row[0]]
    assert found, place
    for row in found:
        assert len(row) == 3, row
        assert all(cell.strip() for cell in row), row


def test_the_page_tells_no_other() -> None:
    """No row is left of an error that is gone."""
    known = [(place.kind, place.piece or REPEATS[name]) for name, place in PLACES.items()]
    for kind, table in rows().items():
        for row in table:
            assert any(piece in row[0] and made in ("", kind) for made, piece in known), row
