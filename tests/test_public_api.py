"""The public face: a change here is a change for users, and belongs in CHANGELOG.md."""

from __future__ import annotations

import dataclasses
import importlib.resources
from importlib.metadata import entry_points

import torch

import breakable_backend
from breakable_backend.options import Options

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

OPTIONS = [
    "driver",
    "debug",
    "tolerance",
    "eager_ops",
    "auto_break",
    "outputs",
    "scalars",
    "max_recordings",
    "min_kernels",
    "inner",
]


def test_exports() -> None:
    """``__all__`` is exactly this, and each name is there."""
    assert sorted(breakable_backend.__all__) == EXPORTS
    assert [name for name in EXPORTS if not hasattr(breakable_backend, name)] == []


def test_options() -> None:
    """The options are exactly these, in the order of the README's table."""
    assert [field.name for field in dataclasses.fields(Options)] == OPTIONS


def test_entry_point() -> None:
    """The backend is found by its name, without an import."""
    (entry,) = entry_points(group="torch_dynamo_backends", name="breakable_cg")
    assert entry.load() is breakable_backend.breakable_cg
    assert "breakable_cg" in torch.compiler.list_backends()


def test_typed() -> None:
    """The package tells type checkers that it is typed."""
    assert importlib.resources.files(breakable_backend).joinpath("py.typed").is_file()
