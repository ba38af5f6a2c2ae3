"""The partition: an ATen graph cut into segments, in program order."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.ir.program import EagerSegment, GraphSegment, Program, Reason, Segment
from breakable_backend.marks.marking import EagerOps
from breakable_backend.recordings.generated_code import with_code
from graphs import CUDA, SCOPE, cuda, golden, host, part, part_symbolic, trace

aten = torch.ops.aten


def kinds(program: Program) -> list[str]:
    return ["captured" if isinstance(segment, GraphSegment) else "eager" for segment in program.segments]


def ops(segment: Segment) -> list[str]:
    return [node.name for node in segment.module.graph.nodes if node.op == "call_function"]


def accesses(segment: Segment) -> tuple[list[str], list[str]]:
    return [str(access) for access in segment.reads], [str(access) for access in segment.writes]


# --- order and kinds --------------------------------------------------------------------------------------------------------


def test_docstring_example() -> None:
    """The example in the module's docstring is what happens."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin() + 1
        z = silly.triple(y.view(2, 2))
        return (z.cos().t(),)

    golden(
        str(part(f, cuda(4))),
        """\
program on cuda: 2 captured, 1 eager
  input arg0_1: tensor float32[4]
  segment 0: captured
    reads arg0_1@0
    sin = aten.sin.default(arg0_1)
    add = aten.add.Tensor(sin, 1)
    makes add
  segment 1: eager
    because silly::triple: tagged cudagraph_unsafe
    reads add@0
    view = aten.view.default(add, [2, 2])
    triple = silly.triple.default(view)
    makes triple
  segment 2: captured
    reads triple@0
    cos = aten.cos.default(triple)
    makes cos
  t = aten.t.default(cos)
  returns t""",
    )


def test_order_is_kept() -> None:
    """Nodes keep the order of the program, whatever their data says."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = x.sin()
        b = silly.triple(y)  # needs nothing of a
        c = y.cos()  # needs nothing of b
        d = silly.triple(x)
        return a, b, c, d

    program = part(f, cuda(4), cuda(4))
    assert [ops(segment) for segment in program.segments] == [["sin"], ["triple"], ["cos"], ["triple_1"]]


def test_mutation_is_kept_in_order() -> None:
    """Writes that nothing depends on by data stay between the segments where they stand."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x.add_(1)
        silly.add_into(x, y)
        x.mul_(2)
        silly.add_into(x, y)
        return (y + 1,)

    golden(
        str(part(f, cuda(4), cuda(4))),
        """\
program on cuda: 3 captured, 2 eager
  input arg0_1: tensor float32[4]
  input arg1_1: tensor float32[4]
  segment 0: captured
    reads arg0_1@0
    writes arg0_1@1
    add_ = aten.add_.Tensor(arg0_1, 1)
  segment 1: eager
    because silly::add_into: tagged cudagraph_unsafe
    reads arg0_1@1, arg1_1@0
    writes arg0_1@2
    add_into = silly.add_into.default(arg0_1, arg1_1)
  segment 2: captured
    reads arg0_1@2
    writes arg0_1@3
    mul_ = aten.mul_.Tensor(arg0_1, 2)
  segment 3: eager
    because silly::add_into: tagged cudagraph_unsafe
    reads arg0_1@3, arg1_1@0
    writes arg0_1@4
    add_into_1 = silly.add_into.default(arg0_1, arg1_1)
  segment 4: captured
    reads arg1_1@0
    add = aten.add.Tensor(arg1_1, 1)
    makes add
  returns add""",
    )


def test_adjacent_eager_nodes_are_one_segment() -> None:
    """Eager nodes side by side are one segment, with a reason each; a view between them does not part them."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = silly.triple(x + 1)
        z = aten.nonzero.default(y.view(2, 2))
        return y.sin(), z

    program = part(f, cuda(4))
    assert kinds(program) == ["captured", "eager", "captured"]
    assert [reason.rule for reason in program.eager_segments[0].reasons] == ["marked", "waits_for_host"]


def test_equal_reasons_are_one() -> None:
    """A reason that several neighbours share, source line included, stands there once."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (silly.triple(silly.triple(x + 1)),)

    assert [reason.op for reason in part(f, cuda(4)).reasons] == ["silly::triple"]


def test_getitem_stays_with_its_producer() -> None:
    """All results of an op with several are made by its segment, and cross by themselves."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = silly.three(x.sin())
        values, order = aten.sort.default(a + 1)
        return values * 2, b * 2, c, order

    program = part(f, cuda(4, 4))
    assert kinds(program) == ["captured", "eager", "captured"]
    assert ops(program.segments[1]) == ["three", "getitem", "getitem_1", "getitem_2"]
    assert program.segments[1].outputs == ("getitem", "getitem_1", "getitem_2")
    assert program.segments[2].inputs == ("getitem", "getitem_1")
    assert ops(program.segments[2]) == ["add", "sort", "getitem_3", "getitem_4", "mul", "mul_1"]


def test_unused_results_do_not_cross() -> None:
    """A segment hands on only what a later one, or the caller, needs."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        z = y.cos()
        return (silly.triple(z) + 1,)

    assert part(f, cuda(4)).segments[0].outputs == ("cos",)


def test_only_views() -> None:
    """A graph of views has no segments: the epilogue makes them."""
    program = part(lambda x: (x.t(), x.view(-1).narrow(0, 2, 3)), cuda(4, 4))
    assert program.segments == ()
    assert program.epilogue.inputs == ("arg0_1",)


def test_nothing_at_all() -> None:
    """A graph that returns its arguments has no segments, also with numbers and None among them."""
    program = part(lambda x: (x, None, 3), cuda(4))
    assert program.segments == ()
    golden(
        str(program),
        """\
program on cuda: 0 captured, 0 eager
  input arg0_1: tensor float32[4]
  returns arg0_1, None, 3""",
    )


# --- too small --------------------------------------------------------------------------------------------------------------


def three_runs(x: Tensor) -> tuple[Tensor, ...]:
    """Two ops, an eager one, one op, an eager one, three ops."""
    a = (x + 1) * 2
    b = silly.triple(a) + 1
    c = silly.triple(b.view(2, 2))
    return (c.sin() + c.cos(),)


@pytest.mark.parametrize(
    ("min_kernels", "captured", "eager"),
    [(1, 3, 2), (2, 2, 1), (3, 1, 1), (4, 0, 1)],  # runs of 2, 1 and 3 ops
)
def test_min_kernels(min_kernels: int, captured: int, eager: int) -> None:
    """Runs with fewer ops that launch become eager, and merge with their neighbours."""
    program = part(three_runs, cuda(4), min_kernels=min_kernels)
    assert (len(program.graph_segments), len(program.eager_segments)) == (captured, eager)
    assert [segment.num_kernels for segment in program.graph_segments] == [
        count for count in (2, 1, 3) if count >= min_kernels
    ]


def test_min_kernels_reason() -> None:
    """A run that is too small says how small, behind the reasons of its neighbours, which caused the break."""
    reasons = part(three_runs, cuda(4), min_kernels=2).reasons
    assert [reason.op for reason in reasons] == ["silly::triple", "silly::triple", "aten::add"]
    assert reasons[2] == Reason("min_kernels", "1 op between eager breaks, fewer than min_kernels=2", "aten::add")


def test_everything_too_small() -> None:
    """A program that is too small altogether has one reason that counts all its ops."""
    (reason,) = part(lambda x: (x + 1) * 2, cuda(4), min_kernels=3).reasons
    assert (reason.rule, reason.text) == ("min_kernels", "2 ops in all, fewer than min_kernels=3")
    (reason,) = part(lambda x: x + 1, cuda(4), min_kernels=2).reasons
    assert reason.text == "1 op in all, fewer than min_kernels=2"


def test_segment_without_kernels() -> None:
    """What allocates and launches nothing is no graph, whatever ``min_kernels`` says."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        fresh = aten.empty.memory_format([4], device=CUDA)
        silly.add_into(fresh, x)
        return (fresh,)

    program = part(f, cuda(4))
    assert kinds(program) == ["eager"]
    assert [reason.rule for reason in program.reasons] == ["marked", "min_kernels"]


def test_kernels_are_counted_without_allocations() -> None:
    """Views and allocations do not count as kernels."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        fresh = aten.empty.memory_format([4], device=CUDA)
        aten.copy_.default(fresh, x.view(4))
        return (fresh.view(2, 2),)

    assert part(f, cuda(2, 2)).graph_segments[0].num_kernels == 1


# --- storages and versions ------------------------------------------------------------------------------------------------


def test_views_are_made_again() -> None:
    """A view never crosses: each segment makes it again from the value that made its storage."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = (x + 1).view(2, 2)
        z = silly.triple(y)
        y.mul_(2)
        w = silly.triple(y.t())
        return w + y, z

    golden(
        str(part(f, cuda(4))),
        """\
program on cuda: 3 captured, 2 eager
  input arg0_1: tensor float32[4]
  segment 0: captured
    reads arg0_1@0
    add = aten.add.Tensor(arg0_1, 1)
    makes add
  segment 1: eager
    because silly::triple: tagged cudagraph_unsafe
    reads add@0
    view = aten.view.default(add, [2, 2])
    triple = silly.triple.default(view)
    makes triple
  segment 2: captured
    reads add@0
    writes add@1
    view_1 = aten.view.default(add, [2, 2])
    mul_ = aten.mul_.Tensor(view_1, 2)
  segment 3: eager
    because silly::triple: tagged cudagraph_unsafe
    reads add@1
    view_2 = aten.view.default(add, [2, 2])
    t = aten.t.default(view_2)
    triple_1 = silly.triple.default(t)
    makes triple_1
  segment 4: captured
    reads triple_1@0, add@1
    view_3 = aten.view.default(add, [2, 2])
    add_1 = aten.add.Tensor(triple_1, view_3)
    makes add_1
  returns add_1, triple""",
    )


def test_views_of_several_results() -> None:
    """A view op with several results is made again where any of them is used."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        first, second = aten.split.Tensor(x.sin(), 2)
        z = silly.triple(second)
        return first + 1, z

    program = part(f, cuda(4))
    assert [segment.outputs for segment in program.segments] == [("sin",), ("triple",), ("add",)]
    assert ops(program.segments[1]) == ["split", "getitem_1", "triple"]
    assert ops(program.segments[2]) == ["split_1", "getitem", "add"]  # a name of its own in each segment


def test_views_of_inputs() -> None:
    """An input is its own root: its views are made from it wherever they are needed, and by the epilogue."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        row = x.select(0, 1)
        row.add_(1)
        return silly.triple(row), x.t()

    program = part(f, cuda(4, 4))
    assert [segment.inputs for segment in program.segments] == [("arg0_1",), ("arg0_1",)]
    assert [accesses(segment) for segment in program.segments] == [(["arg0_1@0"], ["arg0_1@1"]), (["arg0_1@1"], [])]
    assert program.epilogue.inputs == ("triple", "arg0_1")


def test_writes_make_versions() -> None:
    """Each segment that writes a storage makes its next version, however often it writes; readers name what they read."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        x.add_(1)
        x.mul_(y)
        z = silly.triple(x)
        silly.add_into(x.view(2, 2), z.view(2, 2))
        aten.copy_.default(y, x)
        return (y * 2,)

    program = part(f, cuda(4), cuda(4))
    assert [accesses(segment) for segment in program.segments] == [
        (["arg0_1@0", "arg1_1@0"], ["arg0_1@1"]),
        (["arg0_1@1"], ["arg0_1@2"]),
        (["arg1_1@0", "arg0_1@2"], ["arg1_1@1"]),
    ]


def test_in_place_results_are_their_argument() -> None:
    """What an in-place op returns is its argument, not a second value with a bridge of its own."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        z = silly.triple(y)
        w = y.mul_(2)
        return silly.triple(w), y, z

    program = part(f, cuda(4))
    assert [segment.outputs for segment in program.segments] == [("add",), ("triple",), (), ("triple_1",)]
    assert program.segments[3].inputs == ("add",)
    assert program.epilogue.inputs == ("triple_1", "add", "triple")


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)], ids=str)
def test_a_view_that_an_op_returns(shape: tuple[int, int]) -> None:
    """What an op returns of its argument's memory, laid out otherwise, is made again so in a later segment."""
    with torch.library._scoped_library("partitioned", "DEF") as library:
        library.define("turned(Tensor(a) x) -> Tensor(a)")
        library.impl("turned", lambda x: x.t(), "Meta")

        def f(x: Tensor) -> tuple[Tensor, ...]:
            y = torch.ops.partitioned.turned(x + 1)
            return silly.triple(x), y * 2

        last = part(f, cuda(*shape)).segments[2]
    assert ops(last) == ["turned_view", "mul"]
    view = next(node for node in last.module.graph.nodes if node.name == "turned_view")
    assert view.args[1:] == ([*reversed(shape)], [1, shape[1]], 0)


def test_out_variant() -> None:
    """An ``out=`` argument is written."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        torch.sin(x, out=y)
        return silly.triple(y), y

    program = part(f, cuda(4), cuda(4))
    assert accesses(program.segments[0])[1] == ["arg1_1@1"]
    assert program.segments[1].inputs == ("arg1_1",)


def test_foreach_writes() -> None:
    """An op that writes a list of tensors writes each."""
    program = part(lambda x, y: (torch._foreach_add_([x, y], 1), silly.triple(x))[1], cuda(4), cuda(4))
    assert accesses(program.segments[0])[1] == ["arg0_1@1", "arg1_1@1"]


def test_arguments_that_share_a_storage() -> None:
    """Two arguments are two roots, also where they shared a storage when the graph was traced."""
    base: list[Tensor] = []

    def first() -> Tensor:
        base.append(cuda(10)())
        return base[0].narrow(0, 0, 4)

    program = part(lambda x, y: silly.triple(x + y) + y, first, lambda: base[0].narrow(0, 2, 4))
    assert program.segments[0].inputs == ("arg0_1", "arg1_1")


def test_memory_made_by_a_segment_and_written_there() -> None:
    """A storage that a segment makes, and does not hand on, is nobody else's: no version is noted."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        y.mul_(2)
        return (y + x,)

    assert accesses(part(f, cuda(4)).segments[0]) == (["arg0_1@0"], [])


# --- inputs and sizes -----------------------------------------------------------------------------------------------------


def test_kinds_of_inputs() -> None:
    """Static inputs, tensors, host scalars of the scope and constants of the code are told apart."""
    table = torch.arange(4.0)

    def f(x: Tensor, w: Tensor, s: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return x * w * s, h + table

    scope = dataclasses.replace(SCOPE, host_scalars=frozenset({"arg2_1"}))
    program = part(f, cuda(4), cuda(4), host(), host(4), static=[1], scope=scope)
    assert [(value.kind, value.index) for value in program.inputs] == [
        ("tensor", 0),
        ("static", 1),
        ("scalar", 2),
        ("tensor", 3),
        ("constant", -1),
    ]
    assert program.inputs[-1].value is table


def test_host_scalar() -> None:
    """What reads a host scalar is captured where its value is known before, and eager where it is not."""

    def f(x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return ((x.sin() * s).cos(),)

    known = dataclasses.replace(SCOPE, host_scalars=frozenset({"arg1_1"}))
    assert kinds(part(f, cuda(4), host(), scope=known)) == ["captured"]
    program = part(f, cuda(4), host())
    assert kinds(program) == ["captured", "eager", "captured"]
    assert [reason.text for reason in program.reasons] == ["reads the host scalar arg1_1, which a graph would freeze"]


def test_numbers_in_the_code() -> None:
    """A number on the host that the code has, and what is computed of it, is as constant as the code."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        scale = torch.sqrt(torch.tensor(16, dtype=torch.float) * 3)
        return ((x.sin() / scale).masked_fill(x > 0, torch.tensor(2.0)).cos(),)

    assert kinds(part(f, cuda(4))) == ["captured"]


def test_numbers_that_are_no_constants() -> None:
    """A number in the code that is written, returned or given to other ops is made anew in each call."""

    def written(x: Tensor) -> tuple[Tensor, ...]:
        count = torch.tensor(1.0)
        count.add_(1)
        return ((x.sin() * count).cos(),)

    def returned(x: Tensor) -> tuple[Tensor, ...]:
        count = torch.tensor(1.0)
        return (x.sin() * count).cos(), count

    def chosen(x: Tensor) -> tuple[Tensor, ...]:
        return (aten.where.self(x > 0, x.sin(), torch.tensor(1.0)).cos(),)

    for function in (written, returned, chosen):
        assert "eager" in kinds(part(function, cuda(4))), function.__name__


def test_sizes_are_no_segments() -> None:
    """Arithmetic on sizes is done once, outside all segments, and reaches each segment as a number."""

    def f(x: Tensor, n: int) -> tuple[Any, ...]:
        y = silly.triple(x.sin() + n)
        return y * (x.shape[0] * n), x.shape[1] + 1

    program = part_symbolic(f, torch.empty(4, 3), 5)
    assert kinds(program) == ["captured", "eager", "captured"]
    assert [segment.num_kernels for segment in program.graph_segments] == [2, 1]
    assert len(program.sizes) == 2  # the factor, and what is returned
    assert [value.kind for value in program.inputs] == ["tensor", "number"]


def test_size_of_an_intermediate() -> None:
    """The size of a value that an eager op made, where it follows from the inputs, is a size as well."""

    def f(x: Tensor) -> tuple[Any, ...]:
        y = silly.triple(x + 1)
        return (y * y.shape[0],)

    program = part_symbolic(f, torch.empty(4, 3))
    assert kinds(program) == ["captured", "eager", "captured"]
    assert all(name in program.sizes for name in program.segments[2].inputs if "size" in name)


def test_unbacked_sizes() -> None:
    """Sizes known only at run time, and all that uses them, stay in eager segments; what does not is captured."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        found = aten.nonzero.default(x)
        doubled = found * 2
        return doubled.view(-1), x.cos() + 1, doubled.sum()

    program = part(f, cuda(4))
    assert kinds(program) == ["eager", "captured", "eager"]
    assert [reason.rule for reason in program.reasons] == ["waits_for_host", "data_dependent", "data_dependent"]


def test_unbacked_number() -> None:
    """A number read on the host crosses from one eager segment to the next as itself."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        number = aten._local_scalar_dense.default(x.sum())
        y = x.sin() + 1
        return (y * number,)

    program = part(f, cuda(4))
    assert kinds(program) == ["captured", "eager", "captured", "eager"]
    assert program.segments[1].outputs == ("_local_scalar_dense",)
    assert "_local_scalar_dense" in program.segments[3].inputs
    assert "_local_scalar_dense" not in program.sizes


def test_view_at_an_unbacked_offset() -> None:
    """A view whose place is known only at run time is made in eager segments only."""

    def f(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        row = x.select(0, aten._local_scalar_dense.default(i))
        return (row.sin() + x.cos().sum(),)

    program = part(f, cuda(4, 4), cuda(dtype=torch.int64))
    for segment in program.graph_segments:
        assert "select" not in ops(segment)


# --- reasons about everything -----------------------------------------------------------------------------------------------


def test_whole_program() -> None:
    """Where storages move, the whole program is one eager segment, every node at its place."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = aten.resize_.default(x.clone().view(-1), [8])
        return (silly.triple(y) + 1,)

    program = part(f, cuda(4))
    assert kinds(program) == ["eager"]
    assert [(reason.rule, reason.whole_program) for reason in program.reasons] == [("moves_storage", True)]
    assert ops(program.segments[0]) == ["clone", "view", "resize_", "triple", "add"]


def test_forced() -> None:
    """Nodes that are forced to run eagerly do, with the reason that they were given."""
    reason = Reason("capture_failed", "could not be captured", "")
    program = part(
        lambda x: ((x + 1).sin() * 2).cos(),
        cuda(4),
        scope=dataclasses.replace(SCOPE, forced={"sin": reason, "mul": reason}),
    )
    assert [ops(segment) for segment in program.segments] == [["add"], ["sin", "mul"], ["cos"]]
    assert program.reasons == (reason,)


def test_eager_ops() -> None:
    """Ops named in the scope are eager."""
    scope = dataclasses.replace(SCOPE, eager_ops=EagerOps.resolve(["aten::sin"]))
    assert kinds(part(lambda x: (x + 1).sin() + 1, cuda(4), scope=scope)) == ["captured", "eager", "captured"]


def test_graph_is_not_changed() -> None:
    """Cutting leaves the lowered graph as it was."""
    gm = trace(lambda x: (silly.triple(x.sin()) + 1,), cuda(4))
    before = str(gm.graph)
    first = partition(Lowered(gm, frozenset()), SCOPE, min_kernels=1)
    assert str(gm.graph) == before
    assert str(partition(Lowered(gm, frozenset()), SCOPE, min_kernels=1)) == str(first)


def test_subgraphs_go_with_their_call() -> None:
    """The bodies of a branch are in the segment that calls it."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.cond(aten.any.default(x), lambda t: t.sin(), lambda t: t.cos(), (x + 1,))
        return (y * 2,)

    program = part(f, cuda(4))
    assert kinds(program) == ["captured", "eager", "captured"]
    eager = program.segments[1]
    assert isinstance(eager, EagerSegment)
    assert str(eager.reasons[0]) == "cond: decides on the host what to run"
    assert len([name for name, _ in eager.module.named_children()]) == 2


# --- how long it takes --------------------------------------------------------------------------------------------------


def test_takes_as_long_as_the_graph_is_long() -> None:
    """A partition makes a bounded number of calls for each node, however many nodes there are."""

    def of(blocks: int) -> Lowered:
        def f(x: Tensor) -> tuple[Tensor]:
            for _ in range(blocks):
                x = silly.triple((x.sin() + 1).view(2, 2)).view(4) * 2
            return (x,)

        return Lowered(trace(f, cuda(4)), frozenset())

    calls = []
    for blocks in (20, 80):
        lowered = of(blocks)
        nodes = len(lowered.module.graph.nodes)
        made = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            partition(lowered, SCOPE, min_kernels=1)
        finally:
            sys.setprofile(None)
        calls.append(made / nodes)
    assert calls[1] < 1.2 * calls[0]
    assert max(calls) < 600  # today some 400, of 0.1 us each


def test_segments_have_no_code_before_they_are_recorded() -> None:
    """Nothing is generated for a segment that may never run as a module."""
    program = part(lambda x: silly.triple(x.sin() + 1).cos(), cuda(4))
    forwards = {type(segment.module).forward for segment in program.segments}
    assert len(forwards) == 1  # of the module that has none
    assert "sin = torch.ops.aten.sin" in with_code(program.segments[0].module).code
