"""The second door: ``with capture(graph):``, marked functions and marked ops in it, and ``graph.replay()``.

Lines of the contract (docs/design.md) that hold at this door: 2, 3, 5, 6 and 8 to 11; 1 and 7 for marked calls.
"""

from __future__ import annotations

import contextvars
import functools
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import breakable_backend
import silly
from breakable_backend import (
    BreakableCUDAGraph,
    CaptureError,
    EagerOutputError,
    OptionsError,
    ReplayError,
    _torch,
    break_graph,
    capture,
    eager_on_graph,
    eager_region,
    explain,
    is_capturing,
    mark_eager,
    unmark_eager,
)
from breakable_backend.capturing.eager_results import Parts
from breakable_backend.recordings.recording import EagerStep
from doors import MakeGraph, bend, marked_bend, replays_equal, shape_of
from gpu import settled

pytestmark = pytest.mark.usefixtures("no_grad")


# --- segments and breaks ----------------------------------------------------------------------------------------------


def test_no_break(make: MakeGraph, device: torch.device) -> None:
    """Without a break there is one graph and nothing else."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = x.sin() + 1
    assert torch.equal(y, x.sin() + 1)
    assert shape_of(graph) == "G"
    replays_equal(graph, lambda x: x.sin() + 1, x, y)
    assert repr(graph) == "BreakableCUDAGraph(segments=1, eager_steps=0, replays=3)"
    break_graph()  # outside of a capture it does nothing


def test_is_capturing(make: MakeGraph, device: torch.device) -> None:
    """True in the body, False in an eager function, in another thread, and outside."""
    seen = []

    @eager_on_graph
    def look() -> None:
        seen.append(is_capturing())

    def elsewhere() -> None:
        seen.append(is_capturing())

    with capture(make()):
        seen.append(is_capturing())
        look()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    seen.append(is_capturing())
    assert seen == [True, False, False, False]


# --- what a marked function takes and returns ---------------------------------------------------------------------------


def test_function_that_keeps_its_result(make: MakeGraph, device: torch.device) -> None:
    """The captured code never writes into memory that the function keeps."""
    kept = torch.zeros(4, device=device)

    @eager_on_graph
    def through_a_buffer(x: Tensor) -> Tensor:
        kept.copy_(x)
        return kept

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = through_a_buffer(x + 1).mul_(5)
    assert torch.equal(kept, x + 1)
    for _ in range(2):
        x.add_(1)
        graph.replay()
        assert torch.equal(kept, x + 1)
        assert torch.equal(y, (x + 1) * 5)


class Named:
    """An object with some attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


BAD_RESULTS: dict[str, tuple[Callable[[int, Tensor], Any], str]] = {
    "shape": (lambda n, x: x[: 4 - n] * 2, r"result is float32\[3\]"),
    "dtype": (lambda n, x: x.half() if n else x * 1, r"result is float16\[4\]"),
    "stride": (
        lambda n, x: {"a": torch.stack([x] * 4).t() if n else torch.stack([x] * 4)},
        r"field \['a'\] of its result",
    ),
    "structure": (lambda n, x: (x * 2, x * 3) if n else (x * 2,), r"has the fields \[0\], \[1\], but was \[0\]"),
    "plain": (lambda n, x: (x * 2, n), r"field \[1\] of its result is 1, but was 0"),
    "kind of number": (lambda n, x: (x * 2, 0.0 if n else 0), r"field \[1\] of its result is 0\.0, but was 0"),
    "sign of a zero": (lambda n, x: (x * 2, (0.0, -0.0)[n]), r"field \[1\] of its result is -0\.0, but was 0\.0"),
    "dtype as a value": (lambda n, x: (x * 2, (torch.half, torch.float)[n]), r"\[1\] of its result is torch\.float32"),
    "field of an object": (lambda n, x: Named(state=x * 2, count=n), r"field \.count of its result is 1, but was 0"),
    "list in an object": (
        lambda n, x: Named(state=x * 2, counts=[3, n]),
        r"field \.counts\[1\] of its result is 1, but",
    ),
    "object without tensors": (lambda n, x: (x * 2, Named(name=f"call {n}")), r"field \[1\]\.name of its result is"),
    "no tensor": (lambda n, x: None if n else x * 2, "result is NoneType"),
    "alias lost": (lambda n, x: x * 1 if n else x, "result is new memory"),
    "alias apart": (lambda n, x: _pair(x, apart=bool(n)), r"field \[1\] of its result lies elsewhere"),
}


def _pair(x: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    both = torch.cat([x, x])
    return both[:2], (both.clone() if apart else both)[2:6]


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_result_that_cannot_be_written_back(make: MakeGraph, device: torch.device, name: str) -> None:
    """A result that cannot take the place of the one at capture is an error that names function, field and line."""
    function, text = BAD_RESULTS[name]
    number = 0

    @eager_on_graph
    def changing(x: Tensor) -> Any:
        return function(number, x)

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        changing(x + 1)
    graph.replay()
    number = 1
    with pytest.raises(EagerOutputError, match=text) as caught:
        graph.replay()
    assert "changing" in str(caught.value)
    assert "changing(x + 1)" in caught.value.where
    number = 0
    graph.replay()


def test_values_on_the_host() -> None:
    """Tensors on the host in a result of a GPU's capture are compared bit for bit: NaN is the same, -0.0 is not 0.0."""
    nan, zero = torch.tensor(torch.nan), torch.zeros(2, 3).t()
    parts = Parts.of((nan, zero), (), torch.device("cuda", 0), "f", "", host_only=False)
    parts.check((nan, zero))
    with pytest.raises(EagerOutputError, match=r"field \[1\] of its result has other values on the host"):
        parts.check((nan, -zero))


def test_host_only(make: MakeGraph, device: torch.device) -> None:
    """Plain results that are declared host-only may change."""
    count = 0

    @eager_on_graph(host_only=True)
    def counted(x: Tensor) -> tuple[Tensor, int]:
        nonlocal count
        count += 1
        return bend(x), count

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y, number = counted(x + 1)
        y = y * 3
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)
    assert (number, count) == (1, 4)


def test_host_only_objects(make: MakeGraph, device: torch.device) -> None:
    """So may plain fields of objects; an object without tensors is handed on as it is, one with tensors as a copy."""
    made: list[Named] = []

    @eager_on_graph(host_only=True)
    def counted(x: Tensor) -> tuple[Named, Named]:
        made.append(Named(calls=len(made)))
        return Named(state=bend(x), calls=len(made)), made[-1]

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        result, plain = counted(x + 1)
        y = result.state * 3
    assert (result.calls, plain is made[0]) == (1, True)
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)
    assert len(made) == 4


def test_methods(make: MakeGraph, device: torch.device) -> None:
    """Methods, static methods, class methods and lambdas can be marked; keyword arguments, containers and objects pass."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 4)

        @eager_on_graph
        def route(self, x: Tensor, *, scale: float, extra: dict[str, Any]) -> Tensor:
            return bend(self.gate(x)) * scale + extra["bias"]

        @staticmethod
        @eager_on_graph
        def static(x: Tensor) -> Tensor:
            return bend(x)

        @eager_on_graph
        @classmethod
        def named(cls, x: Tensor) -> Tensor:
            return bend(x) * len(cls.__name__)

        def forward(self, x: Tensor) -> Tensor:
            x = self.route(x + 1, scale=0.5, extra={"bias": x})
            x = eager_on_graph(lambda x: bend(x) + 1)(x)
            return self.static(x) + self.named(x)

    router = Router().to(device)
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = router(x)
    assert shape_of(graph) == "GEGEGEGEG"
    replays_equal(graph, router, x, y)
    assert torch.equal(Router.route.run_eager(router, x, scale=1.0, extra={"bias": x}), bend(router.gate(x)) + x)


def test_enable(device: torch.device) -> None:
    """``enable=False`` returns the function itself; outside a capture a marked function is the function."""
    assert eager_on_graph(enable=False)(bend) is bend
    assert eager_on_graph(False)(bend) is bend
    assert eager_on_graph(False, mutates_args=("x",))(bend) is bend
    x = torch.randn(4, device=device)
    assert torch.equal(eager_on_graph(enable=True)(bend)(x), bend(x))
    assert marked_bend.__name__ == "bend"
    with pytest.raises(OptionsError, match="marks functions"):
        eager_on_graph(3)  # type: ignore[type-var]
    with pytest.raises(OptionsError, match="got enable twice"):
        eager_on_graph(True, enable=True)  # type: ignore[call-overload]
    with pytest.raises(OptionsError, match="enable takes True or False, got 1"):
        eager_on_graph(enable=1)  # type: ignore[call-overload]


def test_enable_by_position(make: MakeGraph, device: torch.device) -> None:
    """``eager_on_graph(True)`` marks as ``eager_on_graph`` does, and takes the same arguments."""
    log: list[str] = []
    marked = eager_on_graph(True, barrier=lambda: log.append("barrier"))(bend)
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = marked(x + 1) * 2
    assert shape_of(graph) == "GEG"
    assert log == ["barrier"]
    replays_equal(graph, lambda x: bend(x + 1) * 2, x, y)


def test_barrier_of_a_capture(make: MakeGraph, device: torch.device) -> None:
    """It is called before each eager step while capturing, marked or not, before a mark's own, and not at replay."""
    log: list[str] = []

    @eager_on_graph(barrier=lambda: log.append("of the mark"))
    def step(x: Tensor) -> Tensor:
        log.append("step")
        return bend(x)

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph, barrier=lambda: log.append("of the capture")):
        y = silly.triple(step(x + 1))
        break_graph()
    assert log == ["of the capture", "of the mark", "step", "of the capture", "of the capture"]
    log.clear()
    replays_equal(graph, lambda x: bend(x + 1) * 3, x, y)
    assert log == ["step"] * 3

    def fails() -> None:
        raise Mine

    with pytest.raises(Mine), capture(graph, barrier=fails):
        step(x)


# --- marked ops and rules -----------------------------------------------------------------------------------------------


def test_marked_ops(make: MakeGraph, device: torch.device) -> None:
    """Tagged ops and ops marked by name become eager steps."""
    mark_eager("aten::sort")
    try:
        graph, x = make(), torch.randn(4, device=device)
        with capture(graph):
            y = silly.triple(x.sin()).sort().values + 1
        assert shape_of(graph) == "GEGEG"
        replays_equal(graph, lambda x: (x.sin() * 3).sort().values + 1, x, y)
        assert [
            reason.text for step in graph.recording.steps if isinstance(step, EagerStep) for reason in step.reasons
        ] == [
            "tagged cudagraph_unsafe",
            "marked by mark_eager",
        ]
    finally:
        unmark_eager("aten::sort")


def test_op_that_writes(make: MakeGraph, device: torch.device) -> None:
    """A marked op that mutates writes the caller's tensor, once a call."""
    graph, x, total = make(), torch.randn(4, device=device), torch.zeros(4, device=device)
    with capture(graph):
        silly.add_into(total, x + 1)
        y = total * 2
    want = x + 1
    for _ in range(3):
        graph.replay()
        want = want + (x + 1)
    assert torch.equal(total, want)
    assert torch.equal(y, want * 2)


def test_rule_makes_an_eager_step(make: MakeGraph, device: torch.device) -> None:
    """What waits for the host, and gives the same shapes each time, runs eagerly."""
    graph, x = make(), torch.randn(4, 4, device=device)

    def body(x: Tensor) -> Tensor:
        return torch.linalg.eigh(x @ x.t()).eigenvalues + 1

    with capture(graph):
        y = body(x)
    assert shape_of(graph) == "GEG"
    replays_equal(graph, body, x, y)


HOST_READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", HOST_READS)
def test_host_read(make: MakeGraph, device: torch.device, name: str) -> None:
    """A value read on the host is a typed error at the user's line; the same in a marked function just works."""
    read = HOST_READS[name]
    graph, x = make(), torch.randn(4, device=device)
    with pytest.raises(CaptureError, match="eager_on_graph") as caught, capture(graph):
        y = x + 1
        read(y)
    assert "test_capture.py" in caught.value.where
    assert graph.recording is None
    with capture(graph):
        y = x + 1
        eager_on_graph(lambda y: (read(y), None)[1])(y)
        z = y * 2
    assert shape_of(graph) == "GEG"
    replays_equal(graph, lambda x: (x + 1) * 2, x, z)


def test_compiled_function_inside(make: MakeGraph, device: torch.device, options: dict[str, Any]) -> None:
    """The eager steps of a compiled function become eager steps of the capture that calls it."""

    def body(x: Tensor) -> Tensor:
        x = silly.triple(x.sin() + 1).cos() * 2
        with eager_region():
            x = x.exp().sin()
        return x + 1

    compiled = torch.compile(body, backend="breakable_cg", options=options)
    x = torch.randn(4, device=device)
    for _ in range(3):
        compiled(x)
    graph = make()
    with capture(graph):
        y = compiled(x + 1) - 1
    replays_equal(graph, lambda x: body(x + 1) - 1, x, y)
    compiled_ran = any(program.plain_calls.get("called inside capture") for program in explain(compiled).programs)
    # A Dynamo that runs nothing compiled under a dispatch mode leaves the function as it is: each op of the region is
    # an eager step then.
    assert shape_of(graph) == ("GEGEG" if compiled_ran else "GEGEGEG")
    assert compiled_ran or not hasattr(_torch.TorchDispatchMode, "ignore_compile_internals")


def test_region(make: MakeGraph, device: torch.device) -> None:
    """Under ``eager_region`` each op that launches something is an eager step, and a host read is an error as elsewhere."""

    def body(x: Tensor) -> Tensor:
        x = x + 1
        with eager_region():
            x = x.sin().view(2, 2).cos()
        return x.view(4) * 2

    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = body(x)
    assert shape_of(graph) == "GEGEG"
    assert [reason.text for reason in explain(graph).programs[0].reasons] == ["inside eager_region"] * 2
    replays_equal(graph, body, x, y)
    with pytest.raises(CaptureError, match="reads a value"), capture(graph), eager_region():
        x.sum().item()


def test_marked_for_the_prototype_too(make: MakeGraph, device: torch.device) -> None:
    """A function marked for PyTorch's prototype, which calls it as it is outside of its own capture, can be marked here too."""
    in_prototype = contextvars.ContextVar("in_prototype", default=False)
    breaks = []

    def no_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        """Stands for the prototype's decorator."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if in_prototype.get():
                breaks.append(function)
            return function(*args, **kwargs)

        return wrapper

    x = torch.randn(4, device=device)
    both = eager_on_graph(no_graph(bend))
    for function in (both, no_graph(marked_bend)):
        graph = make()
        with capture(graph):
            y = function(x + 1) * 2
        assert shape_of(graph) == "GEG"
        replays_equal(graph, lambda x: bend(x + 1) * 2, x, y)
        assert breaks == []
        in_prototype.set(True)
        assert torch.equal(function(x), bend(x))  # outside of our capture it is the prototype's
        in_prototype.set(False)
        assert len(breaks) == 1
        breaks.clear()
    with pytest.raises(CaptureError, match="reads a value"), capture(make()):
        no_graph(bend)(x + 1)  # marked for the prototype alone: no mark here, and an error instead of a frozen branch


def test_names_of_the_prototype() -> None:
    """No name here is one of the prototype's functions: what looks the same would mean less there."""
    theirs = {"breakable_graph", "no_graph", "force_no_graph", "is_in_breakable_graph"}
    assert not theirs & set(dir(breakable_backend))


# --- errors ---------------------------------------------------------------------------------------------------------------


class Mine(Exception):
    pass


def test_error_in_an_eager_function(make: MakeGraph, device: torch.device) -> None:
    """Line 8: the same object reaches the caller; nothing is recorded, and the same graph can be captured again."""
    error: Exception | None = Mine("no")

    @eager_on_graph
    def fails(x: Tensor) -> Tensor:
        if error is not None:
            raise error
        return bend(x)

    graph, x = make(), torch.randn(4, device=device)
    torch.manual_seed(5)
    with pytest.raises(Mine) as caught, capture(graph):
        fails(x + torch.rand_like(x))
    assert caught.value is error
    state = torch.rand(3, device=device)
    torch.manual_seed(5)
    torch.rand_like(x)
    assert torch.equal(state, torch.rand(3, device=device))
    with pytest.raises(ReplayError, match="nothing was captured"):
        graph.replay()
    error = None
    with capture(graph):
        y = fails(x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)
    error = Mine("later")
    with pytest.raises(Mine) as caught:
        graph.replay()
    assert caught.value is error
    error = None
    replays_equal(graph, lambda x: bend(x + 1), x, y)


def test_a_bare_break_in_compiled_code() -> None:
    """It breaks Dynamo's graph at the user's line, once, and Dynamo compiles nothing of ours; outside of a capture too."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        break_graph()
        return y.cos()

    counter = CompileCounter()
    compiled, x = torch.compile(f, backend=counter), torch.ones(3)
    for _ in range(2):
        assert torch.equal(compiled(x), f(x))
    assert counter.frame_count == 2
    ((reason, times),) = _torch.graph_breaks().items()
    assert times == 1
    assert f"{__file__}:" in reason and "break_graph()" in reason.splitlines()[0]


def test_error_in_a_segment(make: MakeGraph, device: torch.device) -> None:
    """An error of the body's own leaves as it is, captured ops did not run, and the next capture works."""
    graph, x = make(), torch.zeros(4, device=device)
    error = Mine("no")
    with pytest.raises(Mine) as caught, capture(graph):
        x.add_(1)
        break_graph()
        x.add_(10)
        raise error
    assert caught.value is error
    assert torch.equal(x, torch.ones(4, device=device))
    assert not is_capturing()
    with capture(graph):
        y = x + 1
    replays_equal(graph, lambda x: x + 1, x, y)


def test_error_that_is_caught_inside(make: MakeGraph, device: torch.device) -> None:
    """Code that swallows an eager function's error gets through, and is then told that nothing was captured."""

    @eager_on_graph
    def fails() -> None:
        raise Mine("no")

    graph, x = make(), torch.zeros(4, device=device)
    with pytest.raises(CaptureError, match="the body caught an error: Mine: no"), capture(graph):
        try:
            fails()
        except Mine:
            x.add_(1)
        assert torch.equal(x, torch.ones(4, device=device))
    assert graph.recording is None


def test_sparse_result(make: MakeGraph, device: torch.device) -> None:
    """A sparse result has no memory to write to: an error that names the field and what to do."""
    graph, x = make(), torch.randn(4, device=device)
    with pytest.raises(CaptureError, match="field \\[0\\] of its result is a sparse tensor") as caught, capture(graph):
        eager_on_graph(lambda x: [x.to_sparse()])(x + 1)
    assert "eager_on_graph(lambda x: [x.to_sparse()])(x + 1)" in caught.value.where


def test_result_without_values(make: MakeGraph, device: torch.device) -> None:
    """A result on the device meta has no values that could differ in a replay."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        _, y = eager_on_graph(lambda x: (x.to("meta"), x * 2))(x + 1)
    replays_equal(graph, lambda x: (x + 1) * 2, x, y)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: torch.nested.nested_tensor([x, x[1:]], layout=torch.jagged), "a nested tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda x: torch._efficientzerotensor(x.shape, device=x.device), "a tensor of zeros for which autograd has no"),
    ],
)
def test_results_without_strides_or_memory(
    function: Callable[[Tensor], Tensor], what: str, make: MakeGraph, device: torch.device
) -> None:
    """A result that no copy by address and strides could renew is an error that says what it is."""
    with pytest.raises(CaptureError, match=f"its result is {what}"), capture(make()):
        eager_on_graph(function)(torch.randn(4, device=device) + 1)


def test_builtin(make: MakeGraph, device: torch.device) -> None:
    """A function of torch itself, which has no Python signature, can be marked."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = eager_on_graph(torch.sin)(x + 1) * 2
    replays_equal(graph, lambda x: torch.sin(x + 1) * 2, x, y)


def test_nested(make: MakeGraph, device: torch.device) -> None:
    """Captures do not nest, and the outer one is none the worse if its body catches that."""
    graph, inner, x = make(), make(), torch.randn(4, device=device)
    with capture(graph):
        with pytest.raises(CaptureError, match="do not nest"), capture(inner):
            pass
        y = x + 1
    replays_equal(graph, lambda x: x + 1, x, y)


def test_capture_in_a_break(make: MakeGraph, device: torch.device) -> None:
    """Another graph can be captured, and replayed, by an eager function; a graph cannot replay itself."""
    graph, inner, x = make(), make(), torch.randn(4, device=device)
    results = []

    @eager_on_graph
    def twice(x: Tensor) -> Tensor:
        if inner.recording is None:
            with capture(inner):
                results.append(x * 2)
        inner.replay()
        return results[0] + 0

    with capture(graph):
        y = twice(x + 1) - 1
    replays_equal(graph, lambda x: (x + 1) * 2 - 1, x, y)

    @eager_on_graph
    def again() -> None:
        if graph.recording is not None:
            graph.replay()

    with capture(graph):
        again()
    with pytest.raises(ReplayError, match="being replayed already"):
        graph.replay()


def test_bad_arguments() -> None:
    """Unknown drivers, capture modes and debug modes are typed errors."""
    with pytest.raises(OptionsError, match="driver"):
        BreakableCUDAGraph(driver="gpu")
    with pytest.raises(OptionsError, match="capture_error_mode"):
        capture(BreakableCUDAGraph(driver="tape"), capture_error_mode="none")
    with pytest.raises(OptionsError, match="debug"):
        capture(BreakableCUDAGraph(driver="tape"), debug="everything")
    with pytest.raises(OptionsError, match="barrier takes a function, got 3"):
        capture(BreakableCUDAGraph(driver="tape"), barrier=3)  # type: ignore[arg-type]


# --- ownership --------------------------------------------------------------------------------------------------------------


def test_inputs_are_kept(make: MakeGraph, device: torch.device) -> None:
    """Line 3: a tensor that segments or eager functions read lives as long as the graph, whoever drops it."""
    graph, x = make(), torch.randn(4, device=device)
    one, two = torch.full((4,), 3.0, device=device), torch.full((4,), 5.0, device=device)
    with capture(graph):
        y = marked_bend(x * one) + two
    del one, two
    churn = [torch.full((4,), math.nan, device=device) for _ in range(50)]
    replays_equal(graph, lambda x: bend(x * 3) + 5, x, y)
    del churn


def test_values_cross_breaks(make: MakeGraph, device: torch.device) -> None:
    """What a later segment reads keeps its memory, though other graphs in the pool come and go."""
    graph, x = make(), torch.randn(64, device=device)

    def body(x: Tensor) -> Tensor:
        early = x.exp()
        late = marked_bend(early + 1)
        return late + early

    with capture(graph):
        y = body(x)
    others = []
    for size in (64, 32, 128):
        other = make(pool=graph.pool())
        z = torch.randn(size, device=device)
        with capture(other):
            w = body(z)
        others.append((other, z, w))
    for other, z, w in others:
        replays_equal(other, body, z, w, times=1)
        replays_equal(graph, body, x, y, times=1)


def test_dropped_model(make: MakeGraph, device: torch.device) -> None:
    """Line 10: a graph holds parameters and modules weakly, and releases all it has when one dies."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        @eager_on_graph
        def bend(self, x: Tensor) -> Tensor:
            return bend(x) + self.linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.bend(self.linear(x)) + 1

    model = Model().to(device)
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = model(x)
    replays_equal(graph, model, x, y)
    refs = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model, y
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert graph.recording is None
    with pytest.raises(ReplayError, match="Parameter died"):
        graph.replay()


def test_dropped_graph(make: MakeGraph, device: torch.device, kind: str) -> None:
    """A graph that is dropped frees its memory, and what its eager functions took."""

    class Held:
        pass

    held = Held()
    graph, x = BreakableCUDAGraph(driver=kind), torch.randn(4, device=device)
    with capture(graph):
        y = eager_on_graph(lambda x, held: bend(x))(x + 1, held)
    driver, ref = graph._driver, weakref.ref(held)
    assert driver is not None
    assert driver.live_blocks() > 0
    del held, y
    gc.collect()
    assert ref() is not None
    del graph
    gc.collect()
    assert ref() is None
    assert settled(driver)


def test_who_waits_for_the_last_launch(
    make: MakeGraph, device: torch.device, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset waits for it; a graph that is dropped, or whose parameter dies, does not."""
    waits: list[bool] = []
    x = torch.randn(4, device=device)
    for how in ("reset", "parameter", "graph"):
        graph, weight = BreakableCUDAGraph(driver=kind), nn.Parameter(torch.ones(4, device=device))
        with capture(graph):
            y = marked_bend(x * weight)
        driver = graph.driver
        assert driver is not None

        def release(graphs: Any, *given: Any, wait: bool = True, real: Callable[..., None] = driver.release) -> None:
            waits.extend([wait] if graphs else [])
            real(graphs, *given, wait=wait)

        monkeypatch.setattr(driver, "release", release)
        if how == "reset":
            graph.reset()
        elif how == "parameter":
            del weight
        del graph, y
        gc.collect()
        assert settled(driver)
    assert waits == [True, False, False]


def test_reset(make: MakeGraph, device: torch.device) -> None:
    """A reset frees the graph, and it can be captured anew, as can one that holds something already."""
    graph, x = make(), torch.randn(4, device=device)
    for factor in (2, 3):
        with capture(graph):
            y = marked_bend(x) * factor
        replays_equal(graph, lambda x, factor=factor: bend(x) * factor, x, y)
    del y
    graph.reset()
    with pytest.raises(ReplayError, match="nothing was captured"):
        graph.replay()


def test_rounds_leave_nothing(make: MakeGraph, device: torch.device) -> None:
    """Line 10: memory after ten rounds of capture, replay and reset is what it was after two."""
    graph, x = make(), torch.randn(64, 64, device=device)
    used = []
    for _ in range(10):
        with capture(graph):
            y = marked_bend(x @ x) @ x
        graph.replay()
        del y
        graph.reset()
        gc.collect()
        driver = graph._driver
        assert driver is not None
        on_gpu = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        used.append((driver.live_blocks(), driver.pool_bytes(), on_gpu))
    assert used[2:] == [used[1]] * 8
    assert used[-1][0] == 0


# --- threads ------------------------------------------------------------------------------------------------------------------


def test_threads(make: MakeGraph, device: torch.device) -> None:
    """Line 11: threads capture and replay graphs of their own at the same time, and share a pool if they like."""
    first = make()
    graphs = [first, *(make(pool=first.pool()) for _ in range(2)), make(), make()]
    errors: list[BaseException] = []

    def work(graph: BreakableCUDAGraph, number: int) -> None:
        try:
            with torch.no_grad():
                x = torch.full((64, 64), float(number), device=device)
                with capture(graph):
                    y = marked_bend(x + 1) * number
                for step in range(20):
                    x.fill_(step)
                    graph.replay()
                    assert torch.equal(y, bend(x + 1) * number), (number, step)
        except BaseException as error:  # noqa: BLE001 - the main thread asserts that there are none
            errors.append(error)

    threads = [threading.Thread(target=work, args=(graph, number)) for number, graph in enumerate(graphs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


# --- the everything-eager debug mode ----------------------------------------------------------------------------------------


# --- report -----------------------------------------------------------------------------------------------------------------


def test_report(make: MakeGraph, device: torch.device) -> None:
    """``explain(graph)`` tells what was captured, what not and why, and at which line."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        marked_bend(silly.triple(x + 1)) * 2
    graph.replay()
    (program,) = explain(graph).programs
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (2, 2, 1)
    assert [reason.op for reason in program.reasons] == ["silly::triple", "bend"]
    assert all("marked_bend(silly.triple(x + 1))" in reason.source for reason in program.reasons)
    assert "graph_0(stream)" in graph.source
    assert "marked by eager_on_graph" in str(explain(graph))


@torch.no_grad()
@pytest.mark.parametrize(
    ("body", "segments", "shown"),
    [
        (lambda x: marked_bend(x).sin(), 1, ["1 eager", "2 captured"]),
        (lambda x: marked_bend(x.sin()), 1, ["0 captured", "1 eager", "2 captured"]),
        (lambda x: marked_bend(marked_bend(x.sin())).cos(), 2, [f"{i} {'ce'[i % 2]}" for i in range(5)]),
    ],
    ids=["before", "behind", "between"],
)
def test_empty_segments(body: Any, segments: int, shown: list[str], make: MakeGraph, device: torch.device) -> None:
    """A segment in which nothing runs does not count; the report shows it only if it copies the result of a break."""
    graph, x = make(), torch.randn(4, device=device)
    with capture(graph):
        y = body(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, body(x))
    assert repr(graph).startswith(f"BreakableCUDAGraph({segments=}, ")
    (program,) = explain(graph).programs
    assert (program.num_graph_segments, program.captures, program.recordings[0].num_graphs) == (segments,) * 3
    rows = [line.split() for line in str(explain(graph)).splitlines()]
    steps = rows[next(number for number, row in enumerate(rows) if row[:1] == ["step"]) + 1 :]
    assert [
        f"{position} {kind[: len(wanted) - 2]}" for (position, kind, *_), wanted in zip(steps, shown, strict=True)
    ] == shown


@torch.enable_grad()
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_that_counts_on_the_host(optimizer: Any) -> None:
    """An optimizer that reads its count of steps on the host is an error whose cure is an option that works there."""
    layer, x, graph = nn.Linear(4, 4), torch.randn(2, 4), BreakableCUDAGraph(driver="tape")

    def step(steps: torch.optim.Optimizer) -> None:
        layer(x).sum().backward()
        steps.step()

    step(steps := optimizer(layer.parameters()))
    with pytest.raises(CaptureError, match=r"reads a value on the host(.*\n)*.*fused=True.*opt\.step\(\)"):
        with capture(graph):
            step(steps)
    step(steps := optimizer(layer.parameters(), fused=True))
    with capture(graph):
        step(steps)


def test_an_average_of_weights_that_counts_on_the_device() -> None:
    """No optimizer runs where an average of weights reads its count: the cure is not an option of the optimizer."""
    layer, graph = nn.Linear(4, 4), BreakableCUDAGraph(driver="tape")
    average = torch.optim.swa_utils.AveragedModel(layer)
    with pytest.raises(CaptureError, match=r"reads a value on the host") as raised, capture(graph):
        average.update_parameters(layer)
    assert "eager_on_graph" in str(raised.value) and "give the optimizer" not in str(raised.value)


# --- streams, on a GPU only -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("joined", ["before", "after", "never"])
def test_side_stream(joined: str) -> None:
    """A stream forked inside a segment is joined by the caller, before or after a break, or else at the segment's end."""
    device = torch.device("cuda")
    graph, x, side = BreakableCUDAGraph(), torch.randn(1 << 16, device=device), torch.cuda.Stream()
    with capture(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            a = x * 2
        b = x + 1
        if joined == "before":
            torch.cuda.current_stream().wait_stream(side)
        c = marked_bend(b)
        if joined == "after":
            torch.cuda.current_stream().wait_stream(side)
        y = a + c
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, x * 2 + bend(x + 1))
    del a, b, c, y
    graph.reset()


@pytest.mark.gpu
def test_break_on_a_side_stream() -> None:
    """A break inside ``with torch.cuda.stream`` is an error that names the stream; the process stays clean."""
    graph, x, side = BreakableCUDAGraph(), torch.randn(4, device="cuda"), torch.cuda.Stream()
    with pytest.raises(CaptureError, match="is the current stream"), capture(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            marked_bend(x + 1)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with capture(graph):
        y = marked_bend(x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)
    del y
    graph.reset()


@pytest.mark.gpu
def test_capture_that_cuda_refuses() -> None:
    """What CUDA refuses in mid-capture is a typed error at the user's line, and the next capture works."""
    graph, x = BreakableCUDAGraph(), torch.randn(4, device="cuda")
    torch.rand(3, device="cuda")
    with pytest.raises(CaptureError) as caught, capture(graph):
        y = x + torch.rand_like(x)
        torch.cuda.synchronize()
    assert "torch.cuda.synchronize()" in caught.value.where
    torch.rand(3, device="cuda")
    with capture(graph):
        y = marked_bend(x + 1)
    replays_equal(graph, lambda x: bend(x + 1), x, y)
    del y
    graph.reset()


@pytest.mark.gpu
def test_inside_another_capture() -> None:
    """Inside ``torch.cuda.graph`` there is no second capture."""
    x, outer = torch.randn(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        with pytest.raises(CaptureError, match="another CUDA graph capture is active"), capture(BreakableCUDAGraph()):
            pass
        y = x + 1
    outer.replay()
    assert torch.equal(y, x + 1)


@pytest.mark.gpu
def test_on_a_stream_of_the_caller() -> None:
    """Captured and replayed on other streams than the default one, results are right without a synchronization."""
    graph, x = BreakableCUDAGraph(), torch.randn(1 << 20, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]), capture(graph, stream=torch.cuda.Stream()):
        y = marked_bend(x + 1) * 2
    for number in range(6):
        with torch.cuda.stream(streams[number % 2]):
            streams[number % 2].wait_stream(streams[1 - number % 2])
            x.fill_(number)
            graph.replay()
            got = y.clone()
        streams[number % 2].synchronize()
        assert torch.equal(got, torch.full_like(x, (number + 1) * 4.0))
    del y, got
    graph.reset()


def test_a_result_off_16_bytes_outlives_its_graph(
    make: Callable[..., BreakableCUDAGraph], device: torch.device
) -> None:
    """A result that begins between two multiples of 16 bytes is the caller's memory when the graph is gone, as any other."""

    @eager_on_graph
    def part(x: Tensor) -> Tensor:
        return (x * 2)[1:]

    x, graph = torch.arange(64.0, device=device), make()
    with torch.no_grad(), capture(graph):
        y = part(x)
        z = y + 1
    x.neg_()
    graph.replay()
    assert y.data_ptr() % 16 == 4
    assert torch.equal(y, (x * 2)[1:]) and torch.equal(z, y + 1)
    graph.reset()
    others = [torch.full((64,), 7.0, device=device) for _ in range(64)]
    assert torch.equal(y, (x * 2)[1:]) and len(others) == 64
