"""The program: its records, what ``verify`` holds it to, and its printed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend.ir.last_uses import last_uses
from breakable_backend.ir.program import Access, EagerSegment, Epilogue, Program, Reason, describe, outputs_of, verify
from graphs import cuda, fakes, golden, host, part, part_symbolic

aten = torch.ops.aten


def example() -> Program:
    """Captured, eager, captured; ``x`` is written by the first and the eager segment."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x.add_(1)
        z = silly.triple(x + y)
        silly.add_into(x, z)
        return x * z, z.t()

    return part(f, cuda(4, 4), cuda(4, 4))


def with_segment(program: Program, position: int, **changes: Any) -> Callable[[], Program]:
    """``program`` with one segment changed, to be built."""
    segments = list(program.segments)
    segments[position] = dataclasses.replace(segments[position], **changes)
    return lambda: dataclasses.replace(program, segments=tuple(segments))


def breaks() -> dict[str, tuple[Callable[[], Program], str]]:
    """Programs broken by hand, each in one way, and what the assertion says."""
    program = example()
    first, second, third = program.segments
    return {
        "captured_segments_touch": (
            lambda: dataclasses.replace(program, segments=(first, third)),
            "segment 1: two GraphSegment touch",
        ),
        "eager_segments_touch": (
            lambda: dataclasses.replace(program, segments=(first, second, second)),
            "segment 2: two EagerSegment touch",
        ),
        "order": (
            lambda: dataclasses.replace(program, segments=(second, first, third)),
            "segment 0: takes {'add'}, made by nothing before it",
        ),
        "unknown_input": (
            with_segment(program, 1, inputs=("nobody",)),
            "segment 1: takes {'nobody'}, made by nothing before it",
        ),
        "made_twice": (with_segment(program, 2, outputs=("triple",)), "segment 2: makes {'triple'} a second time"),
        "other_arguments": (with_segment(program, 0, inputs=("arg0_1",)), "segment 0: module takes"),
        "stale_read": (
            with_segment(program, 2, reads=(Access("arg0_1", 1), Access("triple", 0))),
            "segment 2: reads a stale arg0_1@1",
        ),
        "early_read": (
            with_segment(program, 0, reads=(Access("arg0_1", 1), Access("arg1_1", 0))),
            "segment 0: reads a stale arg0_1@1",
        ),
        "skipped_version": (
            with_segment(program, 0, writes=(Access("arg0_1", 2),)),
            "segment 0: arg0_1@2 is not the next version",
        ),
        "forgotten_write": (with_segment(program, 0, writes=()), "segment 1: reads a stale arg0_1@1"),
        "no_kernels": (with_segment(program, 0, num_kernels=0), "segment 0: a graph without kernels"),
        "no_reason": (with_segment(program, 1, reasons=()), "segment 1: eager without a reason"),
        "unknown_result": (
            lambda: dataclasses.replace(program, epilogue=Epilogue(program.epilogue.module, ("nobody",))),
            "returns {'nobody'}, made by nothing",
        ),
    }


def test_example() -> None:
    """The printed form: inputs, segments with reasons, versions and calls, and what is returned."""
    golden(
        str(example()),
        """\
program on cuda: 2 captured, 1 eager
  input arg0_1: tensor float32[4, 4]
  input arg1_1: tensor float32[4, 4]
  segment 0: captured
    reads arg0_1@0, arg1_1@0
    writes arg0_1@1
    add_ = aten.add_.Tensor(arg0_1, 1)
    add = aten.add.Tensor(add_, arg1_1)
    makes add
  segment 1: eager
    because silly::triple: tagged cudagraph_unsafe
    because silly::add_into: tagged cudagraph_unsafe
    reads add@0, arg0_1@1
    writes arg0_1@2
    triple = silly.triple.default(add)
    add_into = silly.add_into.default(arg0_1, triple)
    makes triple
  segment 2: captured
    reads arg0_1@2, triple@0
    mul = aten.mul.Tensor(arg0_1, triple)
    makes mul
  t = aten.t.default(triple)
  returns mul, t""",
    )


def test_verify_accepts() -> None:
    """A program that was cut from a graph is right."""
    verify(example())


@pytest.mark.parametrize("name", breaks())
def test_verify_refuses(name: str) -> None:
    """A program that is wrong cannot be built: the assertion says which segment, and how."""
    build, text = breaks()[name]
    with pytest.raises(AssertionError) as caught:
        build()
    assert str(caught.value).startswith(text)


def test_last_uses() -> None:
    """A value's last use is the last segment that takes or makes it, unless the caller gets it."""
    program = example()
    assert [segment.inputs for segment in program.segments] == [
        ("arg0_1", "arg1_1"),
        ("add", "arg0_1"),
        ("arg0_1", "triple"),
    ]
    # "triple" is returned (as a view), and so is "mul"
    assert last_uses(program) == [("arg1_1",), ("add",), ("arg0_1",)]


def test_last_uses_of_what_nobody_needs() -> None:
    """What a segment makes and nobody takes goes with that segment; an unused input is in none of them."""
    program = part(lambda x, y: (silly.triple(x + 1), x)[1:], cuda(4), cuda(4))
    assert last_uses(program) == [(), ("add",)]
    assert program.epilogue.inputs == ("arg0_1",)


def test_properties() -> None:
    """Segments by kind, reasons in order, and what captured segments touch."""
    program = example()
    assert program.graph_segments == (program.segments[0], program.segments[2])
    assert program.eager_segments == (program.segments[1],)
    assert [reason.op for reason in program.reasons] == ["silly::triple", "silly::add_into"]
    assert program.written_by_graphs() == {"arg0_1"}
    assert program.read_by_graphs() == {"arg0_1", "arg1_1", "triple"}


def test_holds_no_tensors() -> None:
    """A program holds fake tensors, and real ones only for constants of the traced code."""
    table = torch.arange(4.0)
    program = part(lambda x: x + table, host(4))
    assert [value.value is table for value in program.inputs] == [False, True]


def test_printed_numbers() -> None:
    """Numbers among the inputs, and sizes, are printed by the symbols that Dynamo gave them."""
    program = part_symbolic(lambda x, n: (silly.triple(x + n) * (x.shape[0] * n),), torch.empty(4, 3), 5)
    rows, number = program.inputs[0].value.shape[0], program.inputs[1].value
    assert f": number number {number}\n" in str(program) or f": number {number}\n" in str(program)
    (size,) = program.sizes.values()
    assert f" = {size}\n" in str(program)
    assert str(rows) in str(size) and str(number) in str(size)


def test_printed_by_branches() -> None:
    """Calls of higher-order ops, keywords and constants are printed."""

    def f(x: Tensor) -> tuple[Any, ...]:
        y = torch.cond(aten.any.default(x), lambda t: t.sin(), lambda t: t.cos(), (x,))
        return y.sum(dim=0, dtype=torch.float64), None

    golden(
        str(part(f, cuda(2, 2))),
        """\
program on cuda: 2 captured, 1 eager
  input arg0_1: tensor float32[2, 2]
  segment 0: captured
    reads arg0_1@0
    any_1 = aten.any.default(arg0_1)
    makes any_1
  segment 1: eager
    because cond: decides on the host what to run
    reads any_1@0, arg0_1@0
    cond = cond(any_1, true_graph_0, false_graph_0, (arg0_1,))
    getitem = getitem(cond, 0)
    makes getitem
  segment 2: captured
    reads getitem@0
    sum_1 = aten.sum.dim_IntList(getitem, [0], dtype=torch.float64)
    makes sum_1
  returns sum_1, None""",
    )


@pytest.mark.parametrize(
    ("maker", "text"),
    [
        (cuda(4, 3), "float32[4, 3]"),
        (cuda(dtype=torch.bool), "bool[]"),
        (host(2, dtype=torch.float16), "float16[2] cpu"),
    ],
)
def test_describe(maker: Any, text: str) -> None:
    """A tensor is its dtype and shape, and its device where that is not CUDA."""
    assert describe(fakes(maker)[0]) == text


def test_reason_text() -> None:
    """A reason is the op and why; one about no single op is the why alone."""
    assert str(Reason("marked", "tagged", "aten::sin")) == "aten::sin: tagged"
    assert str(Reason("capture_failed", "could not be captured", "")) == "could not be captured"
    assert str(Access("x", 3)) == "x@3"


def test_outputs_of() -> None:
    """What a module returns, constants included."""
    program = part(lambda x: (x.sin(), None, 3), cuda(4))
    node, *rest = outputs_of(program.epilogue.module)
    assert (node.name, rest) == ("sin", [None, 3])


def test_records_are_frozen() -> None:
    """No pass changes a program: it makes another."""
    program = example()
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.device = torch.device("cpu")  # type: ignore[misc]
    eager = program.segments[1]
    assert isinstance(eager, EagerSegment)
    with pytest.raises(dataclasses.FrozenInstanceError):
        eager.reasons = ()  # type: ignore[misc]
