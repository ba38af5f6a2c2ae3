"""Nothing grows: rounds of compiling, capturing, failing and reporting leave as many objects of the package as fewer do."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import breakable_backend
from breakable_backend import BreakableCUDAGraph, CaptureError, capture, eager_on_graph, explain, export
from breakable_backend.marks.call_sites import sites


@eager_on_graph
def plus_one(x: Tensor) -> Tensor:
    return x + 1


@eager_on_graph(mutates_args=("cache",))
def writes(cache: Tensor, x: Tensor) -> Tensor:
    cache.copy_(x)
    return x * 2


@eager_on_graph(fake=lambda x: x + 1)
def fails(x: Tensor) -> Tensor:
    raise KeyError("mine")


def compiled_round(device: torch.device, kind: str, *functions: Callable[[Tensor], Any]) -> list[Any]:
    made = []
    for function in functions:
        compiled = torch.compile(function, backend="breakable_cg", options={"driver": kind, "min_kernels": 1})
        with torch.no_grad():
            for _ in range(4):
                with contextlib.suppress(KeyError):
                    compiled(torch.rand(3, device=device))
        made.append(compiled)
    return made


def marked(device: torch.device, kind: str, folder: Path) -> None:
    """Marked functions, with a reset of Dynamo's behind each round."""
    cache = torch.zeros(3, device=device)
    compiled_round(device, kind, lambda x: plus_one(x.sin()) * 2, lambda x: writes(cache, x.sin()) + cache)
    torch._dynamo.reset()


def dropped(device: torch.device, kind: str, folder: Path) -> None:
    """Compiled functions that are dropped, and nothing reset: Dynamo's code goes with the function's."""
    compiled_round(device, kind, lambda x: plus_one(x.sin()) * 2)


def failing(device: torch.device, kind: str, folder: Path) -> None:
    """Marked functions that raise."""
    compiled_round(device, kind, lambda x: fails(x.sin()) * 2)
    torch._dynamo.reset()


def needing_gradients(device: torch.device, kind: str, folder: Path) -> None:
    """Graphs that run as Dynamo traced them."""
    compiled = torch.compile(lambda x: (x.sin() * 2).sum(), backend="breakable_cg", options={"driver": kind})
    compiled(torch.rand(3, device=device, requires_grad=True)).backward()
    assert len(explain(compiled).eager_graphs) == 1
    torch._dynamo.reset()


def told_of(device: torch.device, kind: str, folder: Path) -> None:
    """Reports and exports."""
    (compiled,) = compiled_round(device, kind, lambda x: plus_one(x.sin()) * 2)
    str(explain(compiled))
    export(compiled, folder)
    breakable_backend.reset(compiled)
    torch._dynamo.reset()


def captured(device: torch.device, kind: str, folder: Path) -> None:
    """The second door: captures that are replayed, that fail, and that are captured anew."""
    x = torch.rand(3, device=device)
    graph = BreakableCUDAGraph(driver=kind)
    for _ in range(2):
        with capture(graph):
            y = plus_one(x * 2) * 3
        graph.replay()
    str(explain(graph))
    with pytest.raises(CaptureError), capture(graph):
        (y * 2).sum().item()
    with pytest.raises(KeyError), capture(graph):
        fails(x * 2)


def census() -> int:
    """How many objects of the package there are."""
    for _ in range(2):
        gc.collect()
    return sum(
        str(getattr(type(thing), "__module__", "")).startswith("breakable_backend") for thing in gc.get_objects()
    )


@pytest.mark.parametrize("once", [marked, dropped, failing, needing_gradients, told_of, captured])
def test_no_object_stays(once: Callable[..., None], device: torch.device, kind: str, tmp_path: Path) -> None:
    """After six rounds more there are no more objects of the package than before them."""
    for _ in range(2):
        once(device, kind, tmp_path / "files")
    before = census()
    for _ in range(6):
        once(device, kind, tmp_path / "files")
    assert census() <= before


def test_sites_go_with_what_was_compiled(device: torch.device, kind: str) -> None:
    """A call of a marked function in compiled code lives as long as that code."""

    def calls() -> int:
        return sum(site.mark is plus_one.mark for site in sites.values())  # type: ignore[attr-defined]

    torch.compiler.reset()
    gc.collect()
    before = calls()
    compiled = compiled_round(device, kind, lambda x: plus_one(x.sin()) * 2)
    assert calls() == before + 1
    torch._dynamo.reset()
    gc.collect()
    assert calls() == before
    with torch.no_grad():
        for _ in range(2):
            compiled[0](torch.rand(3, device=device))
    assert calls() == before + 1


def exported_by_torch(module: torch.nn.Module, x: Tensor) -> Any:
    return torch.export.export(module, (x,), strict=True).module()


def exported_by_dynamo(module: torch.nn.Module, x: Tensor) -> Any:
    return torch._dynamo.export(module)(x).graph_module


@pytest.mark.parametrize("how", [exported_by_torch, exported_by_dynamo])
@pytest.mark.filterwarnings("ignore")  # Dynamo's export is to go
def test_exported_graphs_outlive_dynamos_code(how: Callable[..., Any], device: torch.device) -> None:
    """A marked call in an exported graph works when the code that Dynamo made for the export is gone."""

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def mine(x: Tensor) -> Tensor:
        return x + 1

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mine(x.sin()) * 2

    x = torch.rand(3, device=device)
    with torch.no_grad():
        graph = how(Module(), x)
        torch._dynamo.reset()
        gc.collect()
        assert torch.equal(graph(x), (x.sin() + 1) * 2)
