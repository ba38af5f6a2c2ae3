"""The nodes of a CUDA graph, the names of its kernels, and its drawing, read through cuda-python on request."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breakable_backend import _torch
from breakable_backend.drivers.cuda_api import Bindings
from breakable_backend.errors import ReplayError

cuda = Bindings("cuda.bindings.driver")


@dataclass(frozen=True)
class GraphNode:
    """One node of a CUDA graph."""

    kind: str
    """``kernel``, ``memcpy``, ``memset`` and so on, in CUDA's terms."""
    name: str
    """The short name of the kernel; empty for other kinds."""


def nodes(graph: int) -> tuple[GraphNode, ...]:
    """The nodes of the ``cudaGraph_t`` at ``graph``, in the order of the capture, those of child graphs included.

    Raises:
        ReplayError: CUDA reports an error.
    """
    return tuple(_nodes(cuda.CUgraph(graph)))


def first_copies(graph: int, count: int) -> list[int]:
    """The handles of the first ``count`` copies that were captured into the ``cudaGraph_t`` at ``graph``.

    Raises:
        ReplayError: CUDA reports an error.
    """
    kind = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY
    _, several = _ask(cuda.cuGraphGetNodes(cuda.CUgraph(graph)), "cuGraphGetNodes")
    found, _ = _ask(cuda.cuGraphGetNodes(cuda.CUgraph(graph), several), "cuGraphGetNodes")
    copies = [int(node) for node in found if _ask(cuda.cuGraphNodeGetType(node), "cuGraphNodeGetType") == (kind,)]
    assert len(copies) >= count, "a copy is no node"
    return copies[:count]


def dot(graph: int) -> str:
    """The ``cudaGraph_t`` at ``graph`` as CUDA draws it, with all parameters of each node.

    Raises:
        ReplayError: CUDA reports an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.dot")
        verbose = cuda.CUgraphDebugDot_flags.CU_GRAPH_DEBUG_DOT_FLAGS_VERBOSE
        _ask(cuda.cuGraphDebugDotPrint(cuda.CUgraph(graph), str(path).encode(), int(verbose)), "cuGraphDebugDotPrint")
        return path.read_text(encoding="utf-8", errors="replace")


def dot_of_names(names: Sequence[str]) -> str:
    """A chain of launches, for drivers that have no CUDA graph to draw."""
    labels = [name.replace('"', '\\"') for name in names]
    boxes = [f'  n{i} [label="{label}"];' for i, label in enumerate(labels)]
    arrows = [f"  n{i} -> n{i + 1};" for i in range(len(names) - 1)]
    return "\n".join(["digraph segment {", "  node [shape=box];", *boxes, *arrows, "}"]) + "\n"


def short_name(symbol: str) -> str:
    """The symbol of a kernel in short: no return type, no argument lists, no uninformative namespaces.

    >>> short_name("_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EEEEviT0_T1_")
    'vectorized_elementwise_kernel<4, CUDAFunctor_add<float>, std::array<char*, 3ul>>'
    """
    text = _torch.demangle(symbol).removeprefix("void ").replace("(anonymous namespace)::", "")
    inner = None
    while inner != text:
        inner, text = text, re.sub(r"\([^()]*\)", "", text)
    return re.sub(r"> +(?=>)", ">", text.replace("at::native::", ""))


def _nodes(graph: Any) -> Iterator[GraphNode]:
    _, count = _ask(cuda.cuGraphGetNodes(graph), "cuGraphGetNodes")
    if not count:
        return
    found, _ = _ask(cuda.cuGraphGetNodes(graph, count), "cuGraphGetNodes")
    for node in found:
        (kind,) = _ask(cuda.cuGraphNodeGetType(node), "cuGraphNodeGetType")
        if kind == cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_GRAPH:
            (child,) = _ask(cuda.cuGraphChildGraphNodeGetGraph(node), "cuGraphChildGraphNodeGetGraph")
            yield from _nodes(child)
        elif kind == cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            yield GraphNode("kernel", _kernel_name(node))
        else:
            yield GraphNode(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower(), "")


def _kernel_name(node: Any) -> str:
    """The name of a node's kernel, which is a function of one context, or of a library that is loaded in all contexts."""
    (params,) = _ask(cuda.cuGraphKernelNodeGetParams(node), "cuGraphKernelNodeGetParams")
    for handle, name_of in ((params.func, cuda.cuFuncGetName), (params.kern, cuda.cuKernelGetName)):
        if int(handle):
            status, name = name_of(handle)
            if not status:
                return short_name(name.decode(errors="replace"))
    return "unnamed kernel"


def _ask(answer: tuple[Any, ...], call: str) -> tuple[Any, ...]:
    """The results of a CUDA call without its status, which comes first."""
    status, *values = answer
    if status:
        raise ReplayError(f"{call} failed: {getattr(status, 'name', status)}")
    return tuple(values)
