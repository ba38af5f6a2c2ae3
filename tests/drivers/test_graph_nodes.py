"""Reading a CUDA graph: names of kernels, and the calls to CUDA, which a stand-in answers here (``test_cuda.py`` asks CUDA)."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from breakable_backend.drivers import graph_nodes
from breakable_backend.errors import ReplayError

MULTIPLY = (
    "_ZN2at6native18elementwise_kernelILi128ELi4EZNS0_22gpu_kernel_impl_nocastINS0_13BinaryFunctorIfff"
    "NS0_15binary_internal10MulFunctorIfEEEEEEvRNS_18TensorIteratorBaseERKT_EUliE_EEviT1_"
)
SHORT_MULTIPLY = (
    "elementwise_kernel<128, 4, "
    "gpu_kernel_impl_nocast<BinaryFunctor<float, float, float, binary_internal::MulFunctor<float>>>::{lambda#1}>"
)


@pytest.mark.parametrize(
    ("symbol", "short"),
    [
        (MULTIPLY, SHORT_MULTIPLY),
        ("_ZN12_GLOBAL__N_16kernelEPf", "kernel"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0"),
        ("", ""),
    ],
)
def test_short_names(symbol: str, short: str) -> None:
    """Symbols of C++ lose return types, argument lists and empty namespaces; other names stay as they are."""
    assert graph_nodes.short_name(symbol) == short


def test_dot_of_names() -> None:
    """Launches are boxes in a chain; none is an empty graph; a quote in a name stays a quote."""
    assert graph_nodes.dot_of_names(["a", 'b"']) == (
        'digraph segment {\n  node [shape=box];\n  n0 [label="a"];\n  n1 [label="b\\""];\n  n0 -> n1;\n}\n'
    )
    assert graph_nodes.dot_of_names([]) == "digraph segment {\n  node [shape=box];\n}\n"


class Kind(enum.IntEnum):
    CU_GRAPH_NODE_TYPE_KERNEL = 0
    CU_GRAPH_NODE_TYPE_MEMCPY = 1
    CU_GRAPH_NODE_TYPE_GRAPH = 4


class Cuda:
    """Answers as cuda-python does: a status first. A graph is a list of nodes."""

    CUgraphNodeType = Kind
    CUgraphDebugDot_flags = SimpleNamespace(CU_GRAPH_DEBUG_DOT_FLAGS_VERBOSE=1)

    def __init__(self, graph: list[Any], status: int = 0) -> None:
        self.graph, self.status = graph, status

    def CUgraph(self, address: int) -> list[Any]:
        return self.graph

    def cuGraphGetNodes(self, graph: list[Any], count: int = 0) -> tuple[Any, ...]:
        return self.status, graph[:count], len(graph)

    def cuGraphNodeGetType(self, node: tuple[Kind, Any]) -> tuple[Any, ...]:
        return self.status, node[0]

    def cuGraphChildGraphNodeGetGraph(self, node: tuple[Kind, Any]) -> tuple[Any, ...]:
        return self.status, node[1]

    def cuGraphKernelNodeGetParams(self, node: tuple[Kind, Any]) -> tuple[Any, ...]:
        return self.status, SimpleNamespace(func=node[1][0], kern=node[1][1])

    def cuFuncGetName(self, handle: int) -> tuple[Any, ...]:
        return (1, None) if handle < 0 else (0, b"function_%d" % handle)

    def cuKernelGetName(self, handle: int) -> tuple[Any, ...]:
        return 0, b"kernel_%d" % handle

    def cuGraphDebugDotPrint(self, graph: list[Any], path: bytes, flags: int) -> tuple[Any, ...]:
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"digraph dot {{ {len(graph)} {flags} }}")
        return (self.status,)


def test_reads_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes come in order, with those of a child graph in its place; a kernel has one of two kinds of handle, or no name."""
    child = [(Kind.CU_GRAPH_NODE_TYPE_KERNEL, (0, 7))]
    graph = [
        (Kind.CU_GRAPH_NODE_TYPE_KERNEL, (3, 0)),
        (Kind.CU_GRAPH_NODE_TYPE_GRAPH, child),
        (Kind.CU_GRAPH_NODE_TYPE_MEMCPY, None),
        (Kind.CU_GRAPH_NODE_TYPE_KERNEL, (-1, 8)),
        (Kind.CU_GRAPH_NODE_TYPE_KERNEL, (0, 0)),
    ]
    monkeypatch.setattr(graph_nodes, "cuda", Cuda(graph))
    assert [(node.kind, node.name) for node in graph_nodes.nodes(1)] == [
        ("kernel", "function_3"),
        ("kernel", "kernel_7"),
        ("memcpy", ""),
        ("kernel", "kernel_8"),
        ("kernel", "unnamed kernel"),
    ]
    monkeypatch.setattr(graph_nodes, "cuda", Cuda([]))
    assert graph_nodes.nodes(1) == ()


def test_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA wrote to its file comes back, asked for with all details."""
    monkeypatch.setattr(graph_nodes, "cuda", Cuda([1, 2]))
    assert graph_nodes.dot(1) == "digraph dot { 2 1 }"


def test_says_which_call_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status that is not success is an error that names the call."""
    monkeypatch.setattr(graph_nodes, "cuda", Cuda([], status=700))
    with pytest.raises(ReplayError, match="cuGraphGetNodes failed: 700"):
        graph_nodes.nodes(1)
    with pytest.raises(ReplayError, match="cuGraphDebugDotPrint failed: 700"):
        graph_nodes.dot(1)
