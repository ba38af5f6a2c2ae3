"""Graphs to test with: traced on fake tensors, also CUDA's without a GPU, and cut into programs; texts compared inline."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.ir.program import Program
from breakable_backend.marks.rules import Scope

CUDA = torch.device("cuda", 0)
SCOPE = Scope(CUDA)
Maker = Callable[[], Tensor]
Node = Callable[[], fx.Node]


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Maker:
    """An argument of :func:`trace`: a tensor on the capture device."""
    return functools.partial(torch.empty, shape, dtype=dtype, device="cuda")


def host(*shape: int, dtype: torch.dtype = torch.float32) -> Maker:
    """An argument of :func:`trace`: a tensor on the host."""
    return functools.partial(torch.empty, shape, dtype=dtype, device="cpu")


def trace(function: Callable[..., Any], *makers: Maker) -> fx.GraphModule:
    """The ATen graph of ``function``, mutation at its place, on fake tensors: a CUDA graph without a GPU.

    Ops whose Python binding would start CUDA have to be called as ``torch.ops.aten.…``.
    """
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        return make_fx(function)(*(maker() for maker in makers))


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]


def last_call(function: Callable[..., Any], *makers: Maker) -> fx.Node:
    """The last node of :func:`trace` that calls something."""
    gm = trace(function, *makers)
    node = calls(gm)[-1]
    node.meta["owner"] = gm  # a graph knows its module weakly
    return node


def by_hand(target: Any, /, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
    """A node that calls ``target``; tensors and generators become placeholders, modules become bodies."""
    graph, root = fx.Graph(), nn.Module()

    def argument(value: Any) -> Any:
        number = len(graph.nodes)
        if isinstance(value, Tensor | torch.Generator):
            node = graph.placeholder(f"arg{number}")
            node.meta["val"] = value
            return node
        if isinstance(value, nn.Module):
            root.add_module(f"body{number}", value)
            return graph.get_attr(f"body{number}")
        if isinstance(value, list | tuple):
            return type(value)(argument(item) for item in value)
        if isinstance(value, dict):
            return {key: argument(item) for key, item in value.items()}
        return value

    node = graph.call_function(target, tuple(map(argument, args)), {k: argument(v) for k, v in kwargs.items()})
    node.meta["val"] = val
    graph.output(node)
    owner = fx.GraphModule(root, graph)
    found = next(found for found in owner.graph.nodes if found.name == node.name)
    found.meta["owner"] = owner  # a graph knows its module weakly
    return found


def subgraph(function: Callable[..., Any], *makers: Maker) -> fx.Node:
    values = fakes(*makers)
    return by_hand(
        torch.ops.higher_order.invoke_subgraph, trace(function, *makers), "name", *values, val=[values[0].clone()]
    )


def fakes(*makers: Maker) -> list[Tensor]:
    with FakeTensorMode():
        return [maker() for maker in makers]


def sines(x: Tensor) -> Tensor:
    return x.sin()


def t(function: Callable[..., Any], *makers: Maker) -> Node:
    return functools.partial(last_call, function, *makers)


def golden(actual: str, expected: str) -> None:
    """Compare printed text with the text inline; ``EXPECTTEST_ACCEPT=1`` rewrites that."""
    expecttest = pytest.importorskip("expecttest")
    expecttest.TestCase().assertExpectedInline(actual, expected, skip=1)


def part(
    function: Callable[..., Any],
    *makers: Maker,
    static: Iterable[int] = (),
    min_kernels: int = 1,
    scope: Scope = SCOPE,
) -> Program:
    """The program of ``function``, traced on fake CUDA tensors."""

    def as_tuple(*args: Tensor) -> tuple[Any, ...]:
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    return partition(Lowered(trace(as_tuple, *makers), frozenset(static)), scope, min_kernels=min_kernels)


def part_symbolic(function: Callable[..., Any], *examples: Any) -> Program:
    """The program of ``function``, traced on the CPU with every size left open."""
    gm = make_fx(function, tracing_mode="symbolic")(*examples)
    return partition(Lowered(gm, frozenset()), Scope(torch.device("cpu")), min_kernels=1)
