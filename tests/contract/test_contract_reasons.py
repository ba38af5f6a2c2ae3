"""Contract line 9: what is not captured runs eagerly with a reason and a source line, or is a typed error."""

from __future__ import annotations

import contextvars
import inspect
import operator
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import (
    BreakableCUDAGraph,
    CaptureError,
    OptionsError,
    PartitionError,
    capture,
    eager_region,
    explain,
    mark_eager,
    unmark_eager,
)
from breakable_backend.calling.registry import executors_of
from checks import assert_same, check, compile_both, program_of


def masked(x: Tensor) -> Tensor:
    """Indexing with a mask."""
    y = (x + 1) * 2
    z = y[y > 2]  # here
    return z * 2


def masked_write(x: Tensor) -> Tensor:
    """Writing where a mask says so, from a tensor."""
    y = (x + 1) * 2
    y[y > 2] = x[0, :1]  # here
    return y * 2


def indices_of_nonzero(x: Tensor) -> Tensor:
    """An op whose size depends on values."""
    y = (x - 0.5).relu()
    z = y.nonzero()  # here
    return z * 2


def decomposition(x: Tensor) -> Tensor:
    """An op that waits for the host on CUDA."""
    y = (x + 1) * 2
    z = torch.linalg.svd(y).S  # here
    return z * 2


def repeated(x: Tensor) -> Tensor:
    """Repeats whose size depends on values."""
    y = (x + 1).to(torch.int64)
    z = y[0].repeat_interleave(y[1], output_size=None)  # here
    return z * 2


def of_a_tagged_op(x: Tensor) -> Tensor:
    """A tagged op."""
    y = (x + 1) * 2
    z = silly.triple(y)  # here
    return z * 2


def of_a_region(x: Tensor) -> Tensor:
    """A block under ``eager_region``."""
    y = (x + 1) * 2
    with eager_region():
        z = y.sort().values  # here
    return z * 2


def data_dependent(x: Tensor) -> Tensor:
    """A custom op of a size that depends on values."""
    y = (x + 1) * 2
    z = silly.positive(y)  # here
    return z * 2


def branch(x: Tensor) -> Tensor:
    """A choice by a value."""
    y = (x + 1) * 2
    z = torch.cond(y.sum() > 1, lambda t: t.sin(), lambda t: t.cos(), (y,))  # here
    return z * 2


RULES = {
    masked: ("boolean_index", "mask", 1),
    masked_write: ("boolean_index", "mask", 2),
    indices_of_nonzero: ("waits_for_host", "waits for the host", 1),
    decomposition: ("waits_for_host", "waits for the host", 2),
    repeated: ("waits_for_host", "waits for the host", 1),
    of_a_tagged_op: ("marked", "tagged cudagraph_unsafe", 2),
    of_a_region: ("region", "inside eager_region", 2),
    data_dependent: ("data_dependent", "known only at run time", 1),
    branch: ("higher_order", "decides on the host", 2),
}


@pytest.mark.parametrize("function", RULES, ids=lambda function: function.__name__)
def test_rule(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: what no graph can hold runs eagerly, for a reason that names the user's line; the rest is captured."""
    rule, text, captured = RULES[function]
    # the segment before the line marked "here", and the one after it where that has a size known before the run
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        program = check(
            function, lambda _: (torch.rand(3, 3, device=device),), device=device, options=options, captured=captured
        )
    reason = next(reason for reason in program.reasons if reason.rule == rule)
    assert text in reason.text
    lines, first = inspect.getsourcelines(function)
    line = next(number for number, code in enumerate(lines) if "# here" in code)
    assert reason.source.startswith(f"{__file__}:{first + line} in {function.__name__}"), reason
    assert reason.source in str(program.reasons)


def test_min_kernels(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a segment with too few kernels runs eagerly, and the reason says how many it had."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple((x + 1) * 2)
        y = silly.triple(y + 1)
        return (y + 1) * 2

    # add, mul | triple, add, triple | add, mul
    program = check(
        f,
        lambda _: (torch.rand(3, device=device),),
        device=device,
        options={**options, "min_kernels": 2},
        captured=2,
        eager=1,
    )
    assert "1 op between eager breaks, fewer than min_kernels=2" in [reason.text for reason in program.reasons]


def test_everything_too_small(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a function with too few kernels runs plainly, and the report says why."""
    program = check(
        lambda x: x + 1,
        lambda _: (torch.rand(3, device=device),),
        device=device,
        options={**options, "min_kernels": 2},
        captured=0,
        eager=1,
    )
    assert [reason.rule for reason in program.reasons] == ["min_kernels"]


def test_views_alone_are_no_segment(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a function of views has no segments at all."""
    check(
        lambda x: (x.t(), x.view(-1)[2:]),
        lambda _: (torch.rand(3, 3, device=device),),
        device=device,
        options=options,
        captured=0,
        eager=0,
    )


def stubborn_between(x: Tensor) -> Tensor:
    """A captured segment, an eager step, a segment with an op that cannot be captured, an eager step, a captured segment."""
    y = silly.triple(x + 1)
    y = silly.stubborn(y * 2) + 1
    y = silly.triple(y)
    return y * 2


def test_capture_that_fails(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 8 and 9: an op that no rule knew about runs eagerly with a reason, its effects once; what is around it is captured."""
    compiled, eager = compile_both(stubborn_between, options)
    runs = []
    with torch.no_grad():
        for _ in range(7):
            x = torch.rand(4, device=device)
            before = silly.bodies["stubborn"]
            got = compiled(x)
            runs.append(silly.bodies["stubborn"] - before)
            assert_same(got, eager(x))
    # plain; a capture that fails and a run; then as an eager step
    assert runs == [1, 2, 1, 1, 1, 1, 1]
    program = program_of(compiled)
    assert program.num_graph_segments == 4  # of three, one is in two parts
    assert program.captures == 4
    assert program.replays == 5  # 7 - 2
    (reason,) = [reason for reason in program.reasons if reason.rule == "capture_failed"]
    assert "could not be captured" in reason.text
    assert "silly.py" in reason.source or "stubborn_between" in reason.source


def test_capture_that_fails_after_a_write(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 6 and 8: writes and draws that were undone with a failed capture happen once."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(1)
            y = silly.triple(x + self.total)
            self.total.mul_(2)
            silly.stubborn_into(self.total, y)
            z = silly.triple(self.total)
            return z * 2 + torch.rand_like(z)

    compiled, eager = compile_both(Model().to(device), options)

    def outcomes(model: Any, module: Any) -> list[Any]:
        torch.manual_seed(9)
        found: list[Any] = []
        with torch.no_grad():
            for number in range(6):
                found += [
                    model(torch.full((4,), float(number), device=device)),
                    module.total.clone(),
                    torch.get_rng_state(),
                ]
        return found

    assert_same(outcomes(compiled, compiled._orig_mod), outcomes(eager, eager))
    assert program_of(compiled).captures == 3  # of three segments, the middle one failed at its end


def test_failed_capture_for_later_keys(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: what failed for one key is eager for the next from the start."""
    compiled, eager = compile_both(stubborn_between, options, dynamic=True)
    with torch.no_grad():
        for size in (4, 4, 4, 5, 5, 5, 4):
            x = torch.rand(size, device=device)
            assert_same(compiled(x), eager(x))
    program = program_of(compiled)
    assert program.captures == 4 * 2  # four segments x two keys
    assert program.plain_calls == {"warm-up": 2}


def test_nothing_can_be_captured(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: where the only op cannot be captured, the function runs plainly from then on."""
    compiled, eager = compile_both(silly.stubborn, options)
    with torch.no_grad():
        for _ in range(6):
            x = torch.rand(4, device=device)
            assert_same(compiled(x), eager(x))
    program = program_of(compiled)
    assert (program.num_graph_segments, program.captures, program.replays) == (0, 0, 0)
    assert [reason.rule for reason in program.reasons] == ["capture_failed"]


def test_auto_break_off_and_a_rule(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: with ``auto_break=False`` what a rule finds is a PartitionError with the user's line."""
    compiled = torch.compile(masked, backend="breakable_cg", options={**options, "auto_break": False})
    dynamic = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with dynamic, torch.no_grad(), pytest.raises(PartitionError, match="indexes with a mask") as caught:
        compiled(torch.rand(3, 3, device=device))
    assert "in masked: z = y[y > 2]" in str(caught.value)
    assert "auto_break=True" in str(caught.value)


def test_auto_break_off_and_a_mark(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: with ``auto_break=False`` what the user marked still runs eagerly."""
    check(
        silly.Silly(),
        lambda _: (torch.rand(3, device=device),),
        device=device,
        options={**options, "auto_break": False},
        captured=3,
        eager=2,
        copies=3,
    )


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("late", [0, 4])
@pytest.mark.parametrize("why", ["another formula for ProdBackward0", "create_graph=True"])
def test_auto_break_off_and_what_a_backward_shows(
    why: str, late: int, dynamic: bool | None, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: with ``auto_break=False`` a training graph that has to stay eager is a PartitionError of each call from then on.

    The backward that shows it is eager's, and right.
    """

    def f(x: Tensor, weight: Tensor) -> Tensor:
        made = (x * weight).sin()
        return made.prod() if "Prod" in why else made.cos() + 1

    if late and "Prod" in why:
        pytest.skip("the trace shows it at once")
    compiled = torch.compile(f, backend="breakable_cg", options={**options, "auto_break": False}, dynamic=dynamic)
    weights = [torch.rand(4, device=device, requires_grad=True) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    weights[1] = weights[1].detach().requires_grad_()
    for number in range(late + 1):
        x, again = torch.rand(4, device=device), number == late and "create_graph" in why
        for function, weight in zip((compiled, f), weights, strict=True):
            (gradient,) = torch.autograd.grad(function(x, weight).sum(), weight, create_graph=again)
            weight.data.sub_(gradient.detach())
        assert torch.equal(*weights)
    for _ in range(3):
        with pytest.raises(PartitionError, match=f"cannot be captured: it needs gradients, .*{why}") as caught:
            compiled(x, weights[0])
        assert "in f: return made.prod()" in str(caught.value)
        assert "options={'training': False}" in str(caught.value)


def test_auto_break_off_and_no_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: ``auto_break=False`` does not ask for a backward. Calls that cannot be captured as they are made are eager."""
    compiled = torch.compile(f_of_weight, backend="breakable_cg", options={**options, "auto_break": False})
    weight = torch.rand(4, device=device, requires_grad=True)
    for number in range(6):
        x = torch.rand(4, device=device)
        made = compiled(x, weight)
        assert_same(made, f_of_weight(x, weight))
        if number > 2:
            made.sum().backward()
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
                assert_same(compiled(x, weight), made)


def f_of_weight(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sin() + 1


def test_auto_break_off_and_a_failure(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 8 and 9: with ``auto_break=False`` a capture that fails is a CaptureError, and leaves the driver clean."""
    compiled = torch.compile(
        stubborn_between, backend="breakable_cg", options={**options, "auto_break": False, "min_kernels": 1}
    )
    x = torch.rand(4, device=device)
    with torch.no_grad():
        assert_same(compiled(x), stubborn_between(x))
        with pytest.raises(CaptureError):
            compiled(x)
        with pytest.raises(CaptureError):
            compiled(x)
    (executor,) = executors_of(compiled)
    assert executor.driver is not None
    assert not executor.driver.is_capturing()
    assert executor.driver.live_blocks() == 0


# --- marks --------------------------------------------------------------------------------------------------------------


def doubled(x: Tensor) -> Tensor:
    """An op that carries no tag."""
    return silly.double(x + 1) + 1


@pytest.mark.parametrize(
    "op",
    ["silly::double", "silly::double.default", torch.ops.silly.double, torch.ops.silly.double.default],
    ids=["name", "overload-name", "packet", "overload"],
)
def test_mark_eager(op: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 9: an op marked by name or by object runs eagerly, once a call; unmarked again it is captured."""
    make_args = lambda _: (torch.rand(3, device=device),)  # noqa: E731
    mark_eager(op)
    try:
        # add | double | add; copies = x and the eager result
        program = check(doubled, make_args, device=device, options=options, captured=2, eager=1, copies=2)
        assert [reason.text for reason in program.reasons] == ["marked by mark_eager"]
    finally:
        unmark_eager(op)
    torch.compiler.reset()
    compiled, eager = compile_both(doubled, options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
    assert (program_of(compiled).num_graph_segments, program_of(compiled).num_eager_segments) == (1, 0)


def test_unused_call_of_an_op_marked_by_name(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a call that is marked by name only happens although its result is unused."""

    def f(x: Tensor) -> Tensor:
        silly.double(x + 1)
        return (x + 2) * 2

    check(
        f,
        lambda _: (torch.rand(3, device=device),),
        device=device,
        options={**options, "eager_ops": ["silly::double"]},
        captured=2,
        eager=1,
        copies=1,
    )


@pytest.mark.parametrize(
    ("op", "eager"),
    [
        ("silly::double", 1),
        ("aten::sort", 1),
        ("aten::sort.stable", 0),
        (torch.sort, 1),
        (torch.Tensor.sort, 1),
        (torch.ops.aten.sort, 1),
        (torch.ops.aten.sort.default, 1),
    ],
)
def test_eager_ops(op: Any, eager: int, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: ``eager_ops`` takes names, overloads, and torch functions, by which an op may be called or not."""

    def f(x: Tensor) -> Tensor:
        y = torch.sort(x + 1).values
        return y * 2

    def g(x: Tensor) -> Tensor:
        return silly.double(x + 1) * 2

    function = g if op == "silly::double" else f
    compiled, reference = compile_both(function, {**options, "eager_ops": [op]})
    with torch.no_grad():
        for _ in range(5):
            x = torch.rand(6, device=device)
            assert_same(compiled(x), reference(x))
    assert program_of(compiled).num_eager_segments == eager
    assert program_of(compiled).num_graph_segments == 1 + eager


functional = torch.nn.functional

TAKEN_APART: dict[str, tuple[list[Any], list[Any]]] = {
    "softmax": (
        [
            lambda x: functional.softmax(x, -1),
            lambda x: torch.softmax(x, -1),
            lambda x: x.softmax(-1),
            torch.nn.Softmax(-1).forward,
            lambda x: torch.ops.aten.softmax.int(x, -1),
        ],
        [
            "aten::softmax",
            torch.ops.aten.softmax,
            torch.ops.aten.softmax.int,
            functional.softmax,
            torch.softmax,
            torch.Tensor.softmax,
        ],
    ),
    "linear": ([lambda x: functional.linear(x, x)], ["aten::linear", functional.linear, torch.ops.aten.linear.default]),
    "matmul": (
        [lambda x: x @ x, lambda x: torch.matmul(x, x)],
        ["aten::matmul", torch.matmul, torch.Tensor.matmul, operator.matmul],
    ),
    "einsum": ([lambda x: torch.einsum("ab,bc->ac", x, x)], ["aten::einsum", torch.einsum]),
    "layer_norm": ([lambda x: functional.layer_norm(x, [8])], ["aten::layer_norm", functional.layer_norm]),
    "dropout": ([functional.dropout], ["aten::dropout", functional.dropout, torch.dropout]),
    "attention": (
        [lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]],
        ["aten::scaled_dot_product_attention", functional.scaled_dot_product_attention],
    ),
    "no op": ([lambda x: functional.interpolate(x[None], 8)[0]], [functional.interpolate]),
}
SPELLED = [
    (case, function, mark)
    for case, (functions, marks) in TAKEN_APART.items()
    for function in range(len(functions))
    for mark in range(len(marks))
]


@pytest.mark.parametrize("by", ["eager_ops", "mark_eager"])
@pytest.mark.parametrize(("case", "function", "mark"), SPELLED)
def test_marks_of_what_is_taken_apart(
    case: str, function: int, mark: int, by: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: an op that tracing takes apart is marked as a whole: by any of its names, however it is called."""
    call, marked = TAKEN_APART[case][0][function], TAKEN_APART[case][1][mark]
    if by == "mark_eager":
        mark_eager(marked)
    else:
        options = {**options, "eager_ops": [marked]}
    compiled, eager = compile_both(lambda x: call((x + 1) * 2) * 3 + 1, options)
    try:
        with torch.no_grad():
            for seed in range(4):
                results = []
                for side in (compiled, eager):
                    torch.manual_seed(seed)
                    results.append(side(torch.rand(8, 8, device=device)))
                assert_same(*results)
    finally:
        if by == "mark_eager":
            unmark_eager(marked)
    program = program_of(compiled)
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert all("a part of" in reason.text and by in reason.text for reason in program.reasons), program.reasons
    assert program.notes == ()


def test_a_mark_ends(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: what is no longer marked is captured, and torch's tables are as they were."""
    kernels = dict(torch.ops.aten.softmax.int.py_kernels)
    for by in (functional.softmax, "aten::softmax"):
        for eager in (1, 0):
            torch.compiler.reset()
            if eager:
                mark_eager(by)
            compiled, _ = compile_both(lambda x: (x + 1).softmax(-1) * 2, options)
            with torch.no_grad():
                compiled(torch.rand(3, 3, device=device))
            unmark_eager(by)
            assert program_of(compiled).num_eager_segments == eager
            assert torch.ops.aten.softmax.int.py_kernels == kernels


def test_marks_without_effect_are_told(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: what ``eager_ops`` names, or ``mark_eager`` was given, and no graph of the function calls is in the report."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        torch._dynamo.graph_break()
        return y.softmax(0) * 2

    marks = ["aten::sin", "aten::sort", functional.softmax, functional.interpolate, torch.ops.aten.topk.default]
    compiled = torch.compile(f, backend="breakable_cg", options={**options, "eager_ops": marks})
    ours = ["aten::cos", "aten::add", functional.pixel_shuffle, functional.fold, torch.Tensor.softmax]
    try:
        for mark in ours:
            mark_eager(mark)
        with torch.no_grad():
            compiled(torch.rand(3, device=device))
    finally:
        for mark in ours:
            unmark_eager(mark)
    notes = [note for program in explain(compiled).programs for note in program.notes]
    told = [
        "aten::cos is marked by mark_eager",
        "aten::pixel_shuffle is marked by mark_eager",
        "aten::sort is named in eager_ops",
        "aten::topk.default is named in eager_ops",
        "fold is marked by mark_eager",
        "interpolate is named in eager_ops",
    ]
    assert notes == [f"{mark}, and no graph of this function calls it" for mark in told]
    assert notes[0] in str(explain(compiled))


def test_marks_that_came_too_late(device: torch.device, options: dict[str, Any]) -> None:
    """A mark that is made after a function was compiled changes nothing of it, which the report says, and the remedy."""
    relu = nn.ReLU()
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3), relu).to(device), backend="breakable_cg", options=options)

    def notes() -> list[str]:
        return [note for program in explain(compiled).programs for note in program.notes if "mark_eager" in note]

    x = torch.rand(2, 3, device=device)
    marks = ["aten::relu", functional.fold, relu]
    with torch.no_grad():
        compiled(x)
        assert not notes()
        try:
            for mark in marks:
                mark_eager(mark)
            compiled(x)
            assert [note.partition(" was")[0] for note in notes()] == ["aten::relu", "fold", "one ReLU"]
            assert all("torch.compiler.reset()" in note for note in notes())
            torch.compiler.reset()
            for _ in range(2):  # the first call learns what the layer returns
                compiled(x)
            assert [note.partition(" is")[0] for note in notes()] == ["aten::relu", "fold"]  # the op is in the layer
        finally:
            for mark in marks:
                unmark_eager(mark)


WHOLE = {
    "linear": (lambda x: functional.linear(x, x), "aten::linear"),
    "matmul": (lambda x: x @ x, torch.matmul),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), "aten::einsum"),
    "layer_norm": (lambda x: functional.layer_norm(x, (8,)), functional.layer_norm),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), functional.scaled_dot_product_attention),
    "dropout": (lambda x: functional.dropout(x, 0.5), torch.ops.aten.dropout.default),
    "a method": (lambda x: x.softmax(-1), functional.softmax),
    "inside a loss": (lambda x: functional.cross_entropy(x, x), "aten::log_softmax"),
    "a function that is no op": (lambda x: functional.gumbel_softmax(x), functional.gumbel_softmax),
}
"""Calls, and marks of what they call that reach a dispatch mode in parts."""


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", WHOLE)
def test_marks_of_composite_ops_in_a_capture(
    kind: str, device: torch.device, case: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    """Line 9: by the second door too what is made of other ops is marked as a whole: one eager step, and eager's bits."""
    call, marked = WHOLE[case]
    graph, x = BreakableCUDAGraph(driver=kind), torch.rand(8, 8, device=device)
    mark_eager(marked)
    try:
        with mode():
            torch.manual_seed(0)
            with capture(graph):
                y = call((x + 1) * 2) * 3
            torch.manual_seed(0)
            assert_same(y, call((x + 1) * 2) * 3)
            for seed in range(3):
                x.copy_(torch.rand(8, 8, device=device))
                torch.manual_seed(seed)
                graph.replay()
                torch.manual_seed(seed)
                assert_same(y, call((x + 1) * 2) * 3)
    finally:
        unmark_eager(marked)
    program = explain(graph).programs[0]
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1), str(explain(graph))
    assert [reason.text for reason in program.reasons] == ["marked by mark_eager"]
    graph.reset()


def test_marks_of_parts_in_a_capture(kind: str, device: torch.device) -> None:
    """Line 9: a mark of an op that another is made of holds under inference mode too, where the other comes as a whole."""
    graph, x = BreakableCUDAGraph(driver=kind), torch.rand(8, 8, device=device)
    mark_eager("aten::mm")
    try:
        with torch.inference_mode(), capture(graph):
            functional.linear(x, x) + 1
    finally:
        unmark_eager("aten::mm")
    assert explain(graph).programs[0].num_eager_segments == 1
    graph.reset()


@pytest.mark.parametrize("case", WHOLE)
def test_marks_of_composite_ops_with_gradients(kind: str, device: torch.device, case: str) -> None:
    """Line 9: where gradients are recorded such an op is one eager step too, and its gradients are another."""
    call, marked = WHOLE[case]
    graph, leaf = BreakableCUDAGraph(driver=kind), torch.rand(8, 8, device=device, requires_grad=True)

    def step() -> tuple[Tensor, Tensor]:
        y = call((leaf + 1) * 2) * 3
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        return y.detach(), gradient

    mark_eager(marked)
    try:
        step()
        with capture(graph):
            captured = step()
        for seed in range(3):
            with torch.no_grad():
                leaf.copy_(torch.rand(8, 8, device=device))
            torch.manual_seed(seed)
            graph.replay()
            torch.manual_seed(seed)
            assert_same(captured, step())
    finally:
        unmark_eager(marked)
    program = explain(graph).programs[0]
    assert (program.num_graph_segments, program.num_eager_segments) == (3, 2), str(explain(graph))
    assert [reason.text for reason in program.reasons] == ["marked by mark_eager", "the gradients of an eager step"]
    graph.reset()


def test_gradients_that_are_turned_on_in_a_capture(kind: str, device: torch.device) -> None:
    """Line 9: the same where the body turns gradients on, and calls the op in C++, below another op, or with ``out=``."""
    graph, leaf = BreakableCUDAGraph(driver=kind), torch.rand(8, 8, device=device, requires_grad=True)
    weight = torch.rand(8, 8, 8, device=device)

    def step() -> list[Tensor]:
        with torch.enable_grad():
            y = functional.bilinear(leaf * 2, leaf, weight)  # linear is among its ops
            (gradient,) = torch.autograd.grad(y.sum(), leaf)
        return [y.detach(), gradient, torch.matmul(leaf, leaf, out=torch.empty(8, 8, device=device))]

    marked = "aten::linear", "aten::matmul"
    for name in marked:
        mark_eager(name)
    try:
        with torch.no_grad():
            step()
            with capture(graph):
                captured = step()
            for _ in range(2):
                leaf.copy_(torch.rand(8, 8, device=device))
                graph.replay()
                assert_same(captured, step())
    finally:
        for name in marked:
            unmark_eager(name)
    assert {reason.op for reason in explain(graph).programs[0].reasons} >= {"aten::matmul"}
    graph.reset()


def test_marks_of_composite_ops_in_other_threads(kind: str, device: torch.device) -> None:
    """Line 11: meanwhile other threads call the op as ever, and the capture does not see it."""
    graph, x, found = BreakableCUDAGraph(driver=kind), torch.rand(8, 8, device=device), list[Tensor]()
    other = torch.rand(8, 8, requires_grad=True)

    def called() -> None:
        y = functional.linear(other, other)
        found.extend((y.detach(), *torch.autograd.grad(y.sum(), other)))

    called()
    expected, found = found, []
    mark_eager("aten::linear")
    try:
        with capture(graph):
            x + 1
            thread = threading.Thread(target=contextvars.copy_context().run, args=(called,))
            thread.start()
            thread.join()
    finally:
        unmark_eager("aten::linear")
    assert_same(found, expected)
    assert explain(graph).programs[0].num_eager_segments == 0
    graph.reset()


def test_eager_ops_by_method(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a method of a tensor as an eager op."""
    check(
        lambda x: (x + 1).softmax(0) * 2,
        lambda _: (torch.rand(6, device=device),),
        device=device,
        options={**options, "eager_ops": [torch.Tensor.softmax]},
        captured=2,
        eager=1,
        copies=2,
    )


def test_functional_as_eager_op(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a function of ``torch.nn.functional`` that is made of several ops, all of which run eagerly."""

    def f(x: Tensor) -> Tensor:
        y = x + 1
        return torch.nn.functional.scaled_dot_product_attention(y, y, y) * 2

    check(
        f,
        lambda _: (torch.rand(1, 2, 4, 8, device=device),),
        device=device,
        options={**options, "eager_ops": [torch.nn.functional.scaled_dot_product_attention]},
        captured=2,
        eager=1,
    )


def test_overloads_are_marked_apart(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the tag of one overload says nothing of another."""
    compiled, eager = compile_both(lambda x: silly.triple(silly.triple(x + 1, 2.0)) + 1, options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
    # add, scaled | triple | add
    assert (program_of(compiled).num_graph_segments, program_of(compiled).num_eager_segments) == (2, 1)


@pytest.mark.parametrize("name", ["silly::doubel", "nonsense", "silly::double.nothing"])
def test_no_such_op(name: str) -> None:
    """Line 9: a mark for what is no op is an OptionsError, also when it is to be undone."""
    for act in (mark_eager, unmark_eager):
        with pytest.raises(OptionsError, match="is not a registered op"):
            act(name)


def test_users_function_as_eager_op(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a user's own function as an eager op is an OptionsError that says what to do."""

    def own(x: Tensor) -> Tensor:
        return x + 1

    compiled = torch.compile(lambda x: own(x) * 2, backend="breakable_cg", options={**options, "eager_ops": [own]})
    with torch.no_grad(), pytest.raises(OptionsError, match="eager_region"):
        compiled(torch.rand(3, device=device))


def test_whole_function_in_a_region(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: with all of it in an eager region nothing is captured."""

    def f(x: Tensor) -> Tensor:
        with eager_region():
            y = (x + 1) * 2
            return y.t()

    check(f, lambda _: (torch.rand(3, 3, device=device),), device=device, options=options, captured=0, eager=1)


def test_region_as_a_decorator(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: two regions with captured code between, and a marked op inside one, are two eager segments."""

    def f(x: Tensor) -> Tensor:
        with eager_region():
            y = silly.triple(x) + 1
        y = (y * 2).sin()
        with eager_region():
            return y.cos() + x

    # triple, add | mul, sin | cos, add; copies = y
    check(f, lambda _: (torch.rand(3, device=device),), device=device, options=options, captured=1, eager=2, copies=1)


# --- the report -----------------------------------------------------------------------------------------------------------


def test_report_before_the_first_call(options: dict[str, Any]) -> None:
    """Line 9: before the first call the report is empty and says so."""
    report = explain(torch.compile(silly.Silly(), backend="breakable_cg", options=options))
    assert report.programs == ()
    assert "nothing was compiled by breakable_cg yet" in str(report)


def test_report_text(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the printed report has counts, reasons and source lines."""
    compiled, _ = compile_both(silly.Silly(), options)
    with torch.no_grad():
        for _ in range(5):
            compiled(torch.rand(3, device=device))
    text = str(explain(compiled))
    for part in (
        "3 captured, 2 eager",
        "calls 5, captures 3, replays 3, copies 12, plain 1",  # copies = 3 x 4 calls
        "silly::attention",
        "tagged cudagraph_unsafe",
        "silly.py",
    ):
        assert part in " ".join(text.split()), text


def test_report_of_everything(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: ``explain()`` has what each compiled function has."""
    first, _ = compile_both(lambda x: silly.triple(x + 1) + 1, options)
    second, _ = compile_both(lambda x: silly.triple(x * 2) * 2, options)
    with torch.no_grad():
        first(torch.rand(3, device=device))
        second(torch.rand(3, device=device))
    names = {program.name for program in explain().programs}
    assert {program_of(first).name, program_of(second).name} <= names
    assert program_of(first).name != program_of(second).name


def test_dynamos_graph_breaks(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph break of Dynamo's makes two programs, and is in the report."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple(x + 1)
        torch._dynamo.graph_break()
        return silly.triple(y * 2) + 1

    compiled, eager = compile_both(f, options)
    with torch.no_grad():
        for _ in range(5):
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
    report = explain(compiled)
    assert len(report.programs) == 2  # before and after the break
    assert [program.replays for program in report.programs] == [3, 3]  # 5 - 2 each
    assert sum(report.graph_breaks.values()) >= 1
    assert "Dynamo broke the graph" in str(report)


def test_recompile_limit(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a function that Dynamo will not compile again is named in the report, and its calls are right."""
    compiled, eager = compile_both(lambda x, n: silly.triple(x + len(n)) + 1, options, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=3):
        for length in range(1, 6):
            for _ in range(3):
                x = torch.rand(3, device=device)
                assert_same(compiled(x, "n" * length), eager(x, "n" * length))
        report = explain(compiled)
    assert len(report.programs) == 3  # the limit
    assert len(report.at_recompile_limit) == 1
    with torch._dynamo.config.patch(recompile_limit=3):
        assert explain().at_recompile_limit == report.at_recompile_limit
    assert "will not recompile" in str(report)
