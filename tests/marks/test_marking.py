"""Marks and rules: which nodes run eagerly, and why.

Graphs are traced on fake CUDA tensors, so that the rules about devices are tested without a GPU too.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_symbols

import breakable_backend
import silly
from breakable_backend import OptionsError, eager_region, mark_eager, unmark_eager
from breakable_backend.ir.program import Reason
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.marking import REGION_KEY, EagerOps, Marks, is_marked, op_name
from breakable_backend.marks.rules import (
    RULES,
    WHOLE_PROGRAM,
    LiveOp,
    Rule,
    boolean_index,
    classify,
    data_dependent,
    explicit_generator,
    higher_order,
    host_read,
    label,
    live_reason,
    marked,
    moves_storage,
    off_device,
    on_host,
    region,
    sparse,
    stream_operation,
    waits_for_host,
)
from graphs import CUDA, SCOPE, Maker, Node, by_hand, calls, cuda, fakes, host, last_call, sines, subgraph, t, trace

aten = torch.ops.aten


# --- graphs ---------------------------------------------------------------------------------------------------------------


# --- the rules ------------------------------------------------------------------------------------------------------------


def positional_generator() -> fx.Node:
    """A draw whose schema takes its generator among the positional arguments."""
    (x,) = fakes(cuda(4))
    return by_hand(aten.poisson.default, x, torch.Generator(), val=x)


def generator_by_keyword() -> fx.Node:
    (x,) = fakes(cuda(3))
    return by_hand(aten.rand.generator, [3], generator=torch.Generator(), device=CUDA, val=x)


def no_generator() -> fx.Node:
    (x,) = fakes(cuda(3))
    return by_hand(aten.rand.generator, [3], generator=None, device=CUDA, val=x)


def under_region() -> fx.Node:
    node = last_call(sines, cuda(4))
    node.meta["custom"] = {REGION_KEY: True}
    return node


def under_other_annotation() -> fx.Node:
    node = last_call(sines, cuda(4))
    node.meta["custom"] = {"somebody_elses": True}
    return node


def index_by(dtype: torch.dtype) -> fx.Node:
    x, index = fakes(cuda(4), cuda(4, dtype=dtype))
    return by_hand(aten.index.Tensor, x, [index], val=x)


def put_by(dtype: torch.dtype) -> fx.Node:
    x, index, value = fakes(cuda(4), cuda(4, dtype=dtype), cuda())
    return by_hand(aten.index_put_.default, x, [None, index], value, val=x)


def on_sparse() -> fx.Node:
    return by_hand(aten.sin.default, torch.eye(3).to_sparse(), val=torch.eye(3))


def makes_sparse() -> fx.Node:
    return by_hand(aten.sin.default, torch.eye(3), val=torch.eye(3).to_sparse())


def strided() -> fx.Node:
    return by_hand(aten.sin.default, torch.eye(3), val=torch.eye(3))


def branch(x: Tensor) -> Tensor:
    return torch.cond(aten.any.default(x), lambda t: t.sin(), lambda t: t.cos(), (x,))


def nested_branch() -> fx.Node:
    """A subgraph, itself harmless, with a branch in it."""
    (x,) = fakes(cuda(4))
    return by_hand(torch.ops.higher_order.invoke_subgraph, trace(branch, cuda(4)), "name", x, val=[x])


def stream_op() -> fx.Node:
    return by_hand(torch.ops.streams.record_event.default, 0, 1)


def unbacked_size(x: Tensor) -> Tensor:
    return aten.mul.Tensor(aten.nonzero.default(x), 2)


def unbacked_number(x: Tensor) -> Tensor:
    return aten.mul.Tensor(x, aten._local_scalar_dense.default(x))


CASES: dict[Rule, tuple[dict[str, Node], dict[str, Node]]] = {
    moves_storage: (
        {
            "resize_": t(lambda x: aten.resize_.default(x, [8]), cuda(4)),
            "set_": t(lambda x, y: aten.set_.source_Tensor(x, y), cuda(4), cuda(4)),
        },
        {"copy_": t(lambda x, y: aten.copy_.default(x, y), cuda(4), cuda(4))},
    ),
    stream_operation: ({"record_event": stream_op}, {"sin": t(sines, cuda(4))}),
    marked: (
        {
            "tagged": t(lambda x: silly.triple(x), cuda(4)),
            "tagged_writer": t(lambda x, y: silly.add_into(x, y), cuda(4), cuda(4)),
            "inside_a_subgraph": functools.partial(subgraph, lambda x: silly.triple(x), cuda(4)),
        },
        {
            "untagged": t(lambda x: silly.double(x), cuda(4)),
            "untagged_overload": t(lambda x: torch.ops.silly.triple.scaled(x, 2.0), cuda(4)),
            "subgraph": functools.partial(subgraph, sines, cuda(4)),
        },
    ),
    region: ({"in_a_region": under_region}, {"under_another_annotation": under_other_annotation}),
    higher_order: (
        {"cond": t(branch, cuda(4)), "cond_in_a_subgraph": nested_branch},
        {"subgraph": functools.partial(subgraph, sines, cuda(4)), "op": t(sines, cuda(4))},
    ),
    explicit_generator: (
        {"by_keyword": generator_by_keyword, "by_position": positional_generator},
        {"none": no_generator, "default": t(lambda: aten.rand.default([3], device="cuda"))},
    ),
    host_read: (
        {
            "item": t(lambda x: aten._local_scalar_dense.default(x), cuda()),
            "equal": functools.partial(by_hand, aten.equal.default, torch.ones(2), torch.ones(2), val=True),
        },
        {"eq": t(lambda x, y: aten.eq.Tensor(x, y), cuda(4), cuda(4))},
    ),
    boolean_index: (
        {
            "mask": functools.partial(index_by, torch.bool),
            "byte_mask": functools.partial(index_by, torch.uint8),
            "write_by_mask": functools.partial(put_by, torch.bool),
        },
        {"numbers": functools.partial(index_by, torch.int64), "write": functools.partial(put_by, torch.int64)},
    ),
    waits_for_host: (
        {
            "nonzero": t(lambda x: aten.nonzero.default(x), cuda(4)),
            "svd": t(lambda x: aten._linalg_svd.default(x), cuda(4, 4)),
            "histc": t(lambda x: aten.histc.default(x, 4), cuda(4)),
            "histc_of_one_value": t(lambda x: aten.histc.default(x, 4, min=1, max=1), cuda(4)),
            "fill": t(lambda x, m, v: aten.masked_fill.Tensor(x, m, v), cuda(4), cuda(4, dtype=torch.bool), cuda()),
            "fill_": t(
                lambda x, i, v: aten.index_fill_.int_Tensor(x, 0, i, v), cuda(4), cuda(2, dtype=torch.int64), cuda()
            ),
            "start": t(lambda x: aten.linspace.Tensor_Scalar(x, 1, 3), cuda()),
            "std": t(lambda x: aten.normal.float_Tensor(0.0, x), cuda(4)),
            "sorter": t(lambda x, s: aten.searchsorted.Tensor(x, x, sorter=s), cuda(4), cuda(4, dtype=torch.int64)),
        },
        {
            "sort": t(lambda x: aten.sort.default(x), cuda(4)),
            "histc_in_a_range": t(lambda x: aten.histc.default(x, 4, 0, 3), cuda(4)),
            "matmul": t(torch.mm, cuda(4, 4), cuda(4, 4)),
            "fill": t(lambda x, m: aten.masked_fill.Scalar(x, m, 2.5), cuda(4), cuda(4, dtype=torch.bool)),
            "host_value": t(
                lambda x, m, v: aten.masked_fill.Tensor(x, m, v), cuda(4), cuda(4, dtype=torch.bool), host()
            ),
            "unsorted": t(lambda x: aten.searchsorted.Tensor(x, x), cuda(4)),
        },
    ),
    data_dependent: (
        {
            "unbacked_size": t(unbacked_size, cuda(4)),
            "unbacked_number": t(unbacked_number, cuda()),
        },
        {"known_size": t(sines, cuda(4))},
    ),
    sparse: ({"argument": on_sparse, "result": makes_sparse}, {"strided": strided}),
    off_device: (
        {
            "to_the_host": t(lambda x: aten._to_copy.default(x, device="cpu"), cuda(4)),
            "to_the_device": t(lambda x: aten._to_copy.default(x, device="cuda"), host(4)),
            "on_the_host": t(sines, host(4)),
            "host_scalar": t(lambda x, s: aten.mul.Tensor(x, s), cuda(4), host()),
            "host_index": t(lambda x, i: aten.index.Tensor(x, [i]), cuda(4), host(2, dtype=torch.int64)),
            "other_gpu": t(lambda: aten.ones.default([2], device="cuda:1")),
        },
        {"here": t(sines, cuda(4)), "python_number": t(lambda x: aten.mul.Tensor(x, 2.5), cuda(4))},
    ),
}


def test_every_rule_has_cases() -> None:
    """The table of cases has the rules, each with one node that it is about and one that it is not."""
    assert set(CASES) == set(RULES)
    assert all(yes and no for yes, no in CASES.values())


def cases(kind: int) -> list[Any]:
    return [
        pytest.param(rule, case, id=f"{rule.__name__}-{name}")
        for rule, both in CASES.items()
        for name, case in both[kind].items()
    ]


@pytest.mark.parametrize(("rule", "case"), cases(0))
def test_rule_finds(rule: Rule, case: Node) -> None:
    """A rule has a reason against what it is about."""
    # The device of what is not on CUDA is the capture device, so that the rule in question is the one to speak.
    assert rule(case(), SCOPE)


@pytest.mark.parametrize(("rule", "case"), cases(1))
def test_rule_passes(rule: Rule, case: Node) -> None:
    """A rule has nothing against a node beside what it is about."""
    assert rule(case(), SCOPE) == ""


def test_host_scalar_in_the_key() -> None:
    """A host scalar whose value is in the key, or that has a bridge, may be read; other host tensors may not."""
    node = last_call(lambda x, s: aten.mul.Tensor(x, s), cuda(4), host())
    assert "reads the host scalar s_1" in off_device(node, SCOPE)
    assert off_device(node, replace(SCOPE, host_scalars=frozenset({"s_1"}))) == ""


def test_a_scalar_elsewhere_is_no_host_scalar() -> None:
    """A tensor without dimensions on another device is told as what it is: only one on the host has a value to freeze."""
    x, s = fakes(cuda(4), functools.partial(torch.empty, (), device="cuda:1"))
    assert off_device(by_hand(aten.mul.Tensor, x, s, val=x), SCOPE) == "reads arg1 on cuda:1, off the capture device"


@pytest.mark.parametrize(("maker", "expected"), [(host(), True), (host(2), False), (cuda(), False)])
def test_on_host(maker: Maker, expected: bool) -> None:
    """On the host are tensors without dimensions that lie there, and nothing else is."""
    (x,) = fakes(maker)
    assert on_host(by_hand(aten.sin.default, x, val=x)) == expected
    assert not on_host(by_hand(aten.sin.default, x))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_is_on_device(device: str) -> None:
    """An op is on the capture device if it takes a tensor that lies there, or makes one there."""
    x, capturing = torch.empty(2, device=device), torch.device("meta")
    for args, kwargs in (((x,), {}), (([x],), {}), (([2],), {"device": device}), ((x,), {"device": device})):
        assert LiveOp(aten.ones.default, args, kwargs, capturing).is_on_device == (device == "meta")
    assert not LiveOp(aten.ones.default, ([2],), {}, capturing).is_on_device


def test_live_ops_on_another_gpu() -> None:
    """Inside ``capture`` an op on another GPU is refused, since no graph would have it; a view there launches nothing."""
    x, y = fakes(cuda(4), functools.partial(torch.empty, 4, device="cuda:1"))
    for op, args, kwargs in (
        (aten.sin.default, (y,), {}),
        (aten._to_copy.default, (y,), {"device": "cuda:0"}),
        (aten._to_copy.default, (x,), {"device": "cuda:1"}),
        (aten.ones.default, ([2],), {"device": torch.device("cuda:1")}),
    ):
        reason = live_reason(op, args, kwargs, CUDA)
        assert reason is not None
        assert (reason.rule, reason.text, reason.refused) == (
            "off_device",
            "runs on cuda:1, and the capture is on cuda:0",
            True,
        )
    for op, args, kwargs in (
        (aten.view.default, (y, [2, 2]), {}),
        (aten.sin.default, (x,), {}),
        (aten.ones.default, ([2],), {"device": "cuda"}),
        (aten.ones.default, ([2],), {"device": "cpu"}),
    ):
        assert live_reason(op, args, kwargs, CUDA) is None


def test_device_without_index() -> None:
    """A tensor made on "cuda" is on the current CUDA device, where the others are."""
    node = last_call(lambda: aten.ones.default([2], device="cuda"))
    assert off_device(node, SCOPE) == ""


def test_known_symbols() -> None:
    """Sizes that follow from the inputs are no data dependence; those of ``scope.symbols`` are known."""
    (node,) = (node for node in calls(trace(unbacked_size, cuda(4))) if label(node) == "aten::mul")
    symbols = free_symbols(node.meta["val"])
    assert symbols
    assert data_dependent(node, SCOPE)
    assert data_dependent(node, replace(SCOPE, symbols=frozenset(symbols))) == ""


def test_classify() -> None:
    """The first rule that speaks gives the reason, with the op and the user's line."""
    node = last_call(lambda x: silly.triple(x), cuda(4))
    node.meta["stack_trace"] = '  File "model.py", line 12, in forward\n    y = triple(x)\n'
    assert classify(node, SCOPE) == Reason(
        "marked", "tagged cudagraph_unsafe", "silly::triple", "model.py:12 in forward: y = triple(x)"
    )
    assert classify(last_call(sines, cuda(4)), SCOPE) is None


def test_classify_forced() -> None:
    """A forced reason goes before all rules."""
    node = last_call(lambda x: silly.triple(x), cuda(4))
    reason = Reason("capture_failed", "could not be captured", "")
    assert classify(node, replace(SCOPE, forced={node.name: reason})) is reason


@pytest.mark.parametrize("rule", WHOLE_PROGRAM, ids=lambda rule: rule.__name__)
def test_whole_program(rule: Rule) -> None:
    """Where storages or streams change, the reason says that nothing around can be captured either."""
    for case in CASES[rule][0].values():
        reason = classify(case(), SCOPE)
        assert reason is not None and reason.whole_program and reason.rule == rule.__name__


def test_whole_program_goes_first() -> None:
    """A rule about the whole program is asked before those about one node."""
    assert RULES[: len(WHOLE_PROGRAM)] == WHOLE_PROGRAM


# --- marks ----------------------------------------------------------------------------------------------------------------


def test_is_marked_by_tag() -> None:
    """A tag belongs to an overload."""
    assert is_marked(silly.triple.default, EagerOps()) == "tagged cudagraph_unsafe"
    assert is_marked(silly.triple.scaled, EagerOps()) == ""
    assert is_marked(operator.add, EagerOps()) == ""


MARKS = {
    "name": ("silly::double", True),
    "name_of_overload": ("silly::double.default", True),
    "overload": (silly.double.default, True),
    "packet": (silly.double, True),
    "other_op": ("silly::wave", False),
}


@pytest.mark.parametrize(("mark", "expected"), MARKS.values(), ids=MARKS)
def test_mark_eager(mark: Any, expected: bool) -> None:
    """An op is marked by its name, its overload or its packet, and the mark is undone in the same way."""
    assert mark_eager(mark) is mark
    assert is_marked(silly.double.default, EagerOps()) == ("marked by mark_eager" if expected else "")
    unmark_eager(mark)
    assert is_marked(silly.double.default, EagerOps()) == ""


def test_mark_one_overload() -> None:
    """The name of one overload marks that overload only; the name of the op marks them all."""
    add, into = aten.sort.default, aten.sort.stable
    mark_eager("aten::sort.stable")
    assert (is_marked(add, EagerOps()), is_marked(into, EagerOps())) == ("", "marked by mark_eager")
    unmark_eager("aten::sort.stable")
    mark_eager("aten::sort")
    assert is_marked(add, EagerOps()) and is_marked(into, EagerOps())
    unmark_eager("aten::sort")


def test_mark_custom_op() -> None:
    """What ``torch.library.custom_op`` returns can be marked, also by a decorator above it."""
    assert mark_eager(silly.wave) is silly.wave
    assert is_marked(torch.ops.silly.wave.default, EagerOps()) == "marked by mark_eager"
    unmark_eager(silly.wave)
    assert is_marked(torch.ops.silly.wave.default, EagerOps()) == ""


def test_unmark_what_is_not_marked() -> None:
    """Taking away a mark that is not there does nothing."""
    unmark_eager("silly::wave")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("silly::tripel", "silly::triple"),
        ("aten::softmx", "aten::softmax"),
        ("silly::triple.scaledd", "silly::triple.scaled"),
        ("qqqq::zzzz", ""),
        ("", ""),
        ("::", ""),
    ],
)
def test_nearest_names(name: str, nearest: str) -> None:
    """A name that is no op is an error with the nearest names, if any is near."""
    with pytest.raises(OptionsError, match="is not a registered op") as caught:
        mark_eager(name)
    assert nearest in caught.value.what
    assert ("nearest" in caught.value.what) is bool(nearest)


@pytest.mark.parametrize(
    "value",
    [None, 3, sines, len, torch.Tensor, object()],
    ids=["none", "number", "function", "builtin", "class", "object"],
)
def test_no_op(value: Any) -> None:
    """What is no op cannot be marked."""
    with pytest.raises(OptionsError, match="is not an op"):
        mark_eager(value)


def test_op_name() -> None:
    """An overload has its name with the overload, a packet without."""
    assert op_name(aten.sort.default) == "aten::sort.default"
    assert op_name(aten.sort.stable) == "aten::sort.stable"
    assert op_name(aten.sort) == "aten::sort"
    assert op_name("aten::sort") == "aten::sort"


def test_eager_ops_resolve() -> None:
    """The option takes names, ops, and torch functions as they stand in a Dynamo graph."""
    ops = EagerOps.resolve(
        [
            "aten::sort",
            aten.topk,
            aten.topk.default,
            silly.wave,
            torch.sin,
            torch.Tensor.cos,
            operator.add,
            math.floor,
            nn.functional.softmax,
        ]
    )
    named = {"aten::sort", "aten::topk", "aten::topk.default", "silly::wave"}
    assert ops.names == named | {"aten::sin", "aten::cos", "aten::add", "aten::floor", "aten::softmax"}
    assert ops.functions == (torch.sin, torch.Tensor.cos, operator.add, math.floor, nn.functional.softmax)
    assert is_marked(aten.sort.default, ops) == "named in eager_ops"
    assert is_marked(aten.sum.default, ops) == ""


class Model:
    def method(self) -> None:
        pass


@pytest.mark.parametrize(
    "value",
    [sines, Model, Model().method, lambda x: x, functools.partial(sines)],
    ids=["function", "class", "method", "lambda", "partial"],
)
def test_eager_ops_of_the_user(value: Any) -> None:
    """A Python function of the user's is an error that says what to do instead."""
    with pytest.raises(OptionsError, match=r"is a Python function, and Dynamo traces through it") as caught:
        EagerOps.resolve([value])
    assert "eager_region" in caught.value.fix


def test_eager_ops_of_no_kind() -> None:
    """What cannot be called at all is no op."""
    with pytest.raises(OptionsError, match="is not an op"):
        EagerOps.resolve([3])


def test_annotate_functions() -> None:
    """Functions and methods that are marked are put under a region, which says why, and keep what else is noted on them."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x).cos() + nn.functional.softmax(x, 0) + nn.functional.interpolate(x, 2)

    gm = fx.symbolic_trace(Module())
    next(iter(gm.graph.find_nodes(op="call_function", target=torch.sin))).meta["custom"] = {"mine": 1}
    mark_eager(nn.functional.interpolate)
    try:
        Marks(EagerOps.resolve([torch.sin, torch.Tensor.cos])).annotate(gm)
    finally:
        unmark_eager(nn.functional.interpolate)
    noted = {node.name: node.meta["custom"] for node in gm.graph.nodes if "custom" in node.meta}
    assert noted == {
        "sin": {"mine": 1, REGION_KEY: "a part of sin, which is named in eager_ops"},
        "cos": {REGION_KEY: "a part of cos, which is named in eager_ops"},
        "interpolate": {REGION_KEY: "a part of interpolate, which is marked by mark_eager"},
    }
    Marks(EagerOps()).annotate(second := fx.symbolic_trace(Module()))
    assert not any("custom" in node.meta for node in second.graph.nodes)


def test_eager_region_outside_compile() -> None:
    """Outside ``torch.compile`` a region does nothing."""
    with eager_region():
        assert torch.ones(2).sum() == 2


def test_eager_region_in_a_program(device: torch.device, options: dict[str, Any]) -> None:
    """Every op of a region runs on its own, with the user's line as reason; a region may be in a function called."""

    def inside(x: Tensor) -> Tensor:
        with eager_region():
            return x.exp().sum()

    def f(x: Tensor) -> Tensor:
        return inside(x.sin() + 1) * 2 + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    compiled(torch.ones(3, device=device))
    (program,) = breakable_backend.explain(compiled).programs
    assert [(reason.rule, reason.op) for reason in program.reasons] == [
        ("region", "aten::exp"),
        ("region", "aten::sum"),
    ]
    assert all(reason.source.endswith("return x.exp().sum()") for reason in program.reasons)


def test_mark_counts_for_what_is_compiled_later(device: torch.device, options: dict[str, Any]) -> None:
    """A mark acts on what is compiled after it, and stays in what was compiled under it."""

    def f(x: Tensor) -> Tensor:
        return silly.double(x.sin() + 1).cos() + 1

    def reasons(compiled: Any) -> list[str]:
        compiled(torch.ones(3, device=device))
        return [reason.rule for reason in breakable_backend.explain(compiled).programs[0].reasons]

    before = torch.compile(f, backend="breakable_cg", options=options)
    assert reasons(before) == []
    mark_eager("silly::double")
    try:
        assert reasons(before) == []
        torch.compiler.reset()
        marked_now = torch.compile(f, backend="breakable_cg", options=options)
        assert reasons(marked_now) == ["marked"]
    finally:
        unmark_eager("silly::double")
    assert reasons(marked_now) == ["marked"]


# --- source lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace_text", "expected"),
    [
        ("", ""),
        (None, ""),
        ('File "a.py", line 3, in f\n  x + 1', "a.py:3 in f: x + 1"),
        ('File "a.py", line 3, in f\n  g(x)\nFile "b.py", line 9, in g\n  x + 1\n', "b.py:9 in g: x + 1"),
        ('File "with, comma.py", line 3, in f', "with, comma.py:3 in f"),
        ("nonsense", ""),
    ],
)
def test_source_line(trace_text: str | None, expected: str) -> None:
    """The innermost frame is the user's line."""
    node = last_call(sines, cuda(4))
    node.meta["stack_trace"] = trace_text
    assert source_line(node) == expected
