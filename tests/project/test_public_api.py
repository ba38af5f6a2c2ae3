"""The public face: a change here is a change for users, and belongs in CHANGELOG.md."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from importlib.metadata import entry_points

import torch

import breakable_backend

EXPORTS = [
    "BindError",
    "BoundCall",
    "BreakableCUDAGraph",
    "BreakableError",
    "CaptureError",
    "DivergenceError",
    "EagerOutputError",
    "InternalError",
    "OptionsError",
    "PartitionError",
    "ReplayError",
    "Report",
    "bind",
    "break_graph",
    "breakable_cg",
    "capture",
    "eager_on_graph",
    "eager_region",
    "explain",
    "export",
    "is_capturing",
    "mark_eager",
    "reset",
    "unmark_eager",
]


def test_exports() -> None:
    """``__all__`` is exactly this, and each name is there."""
    assert sorted(breakable_backend.__all__) == EXPORTS
    assert [name for name in EXPORTS if not hasattr(breakable_backend, name)] == []


def test_entry_point() -> None:
    """The backend is found by its name, without an import."""
    (entry,) = entry_points(group="torch_dynamo_backends", name="breakable_cg")
    assert entry.load() is breakable_backend.breakable_cg
    assert "breakable_cg" in torch.compiler.list_backends()


def test_typed() -> None:
    """The package tells type checkers that it is typed."""
    assert importlib.resources.files(breakable_backend).joinpath("py.typed").is_file()


def printed_by(program: str) -> str:
    """What a new Python process prints that runs ``program``."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_brings_no_compiler() -> None:
    """Importing the package, and marking and calling functions, loads none of what only compiling needs."""
    program = """
import sys, torch
before = set(sys.modules)
import breakable_backend
@breakable_backend.eager_on_graph
def f(x):
    return x + 1
@breakable_backend.eager_on_graph(mutates_args=("x",), recompute=True)
def g(x):
    return x.add_(1)
f(torch.ones(2)), breakable_backend.break_graph(), breakable_backend.is_capturing()
heavy = "torch._dynamo torch._inductor torch._functorch.aot_autograd torch.distributed.fsdp sympy networkx rich cuda.bindings.runtime cuda.bindings.driver"
print(*(name for name in heavy.split() if name in set(sys.modules) - before))
"""
    assert printed_by(program) == ""


def test_errors_pass_through_dynamo_whenever_it_was_imported() -> None:
    """An error of ours is no ``BackendCompilerFailed``, though Dynamo, and its base class, came after it was first made."""
    program = """
import sys, torch, breakable_backend
from breakable_backend import BreakableError, OptionsError, PartitionError, eager_on_graph
early = OptionsError("early")
assert "torch._dynamo" not in sys.modules
def failed(function, **how):
    try:
        torch.compile(function, **how)(torch.ones(2))
    except Exception as error:
        return f"{type(error).__name__} {isinstance(error, BreakableError)}"
marked, other = eager_on_graph(lambda x, what: x + 1), type("Other", (), {})()
print(
    failed(torch.sin, backend="breakable_cg", options={"driver": "none"}),
    failed(lambda x: marked(x.sin(), other) + 1, backend="eager", fullgraph=True),
    early,
    sep="; ",
)
"""
    assert printed_by(program) == "OptionsError True; PartitionError True; early"
