"""The zoo (``make zoo``): that it notices what it looks for, goes on where it stopped, and tells what was in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sweep
import zoo
import zoo_models


class Reads(nn.Module):
    """A layer with a branch on a value, between two that can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        if x.sum() > -1:
            x = x * 2
        return self.after(x).relu()


class Nudged(nn.Module):
    """A layer of another result while Dynamo traces."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin().cos() + (1 if torch.compiler.is_compiling() else 0)


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such layer")


def entry(model: type[nn.Module]) -> zoo_models.Entry:
    return zoo_models.Entry(model.__name__, "torch", "test", model, zoo_models.each(x=zoo_models.floats(2, 4)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Any:
    """Runs a model of these tests, in this process."""

    def run(model: type[nn.Module]) -> dict[str, Any]:
        made = entry(model)
        monkeypatch.setitem(zoo_models.zoo, made.key, made)
        with torch.no_grad():
            return zoo.work(made.key, device.type)

    return run


def test_a_break_has_its_reason_and_line(ran: Any) -> None:
    """A model that breaks is as eager, and its row has the reason with the line."""
    row = ran(Reads)
    assert zoo.verdict(row) == "as eager"
    assert row["programs"] == 2
    assert any("Data-dependent" in why and "test_zoo.py" in why for why in zoo.in_the_way(row))


def test_what_dynamo_does_is_told_from_what_we_do(ran: Any) -> None:
    """A model that differs with ``backend="eager"`` as well is compared with that, and its row says so."""
    assert zoo.verdict(ran(Nudged)) == "as Dynamo"


def test_what_eager_raises_is_told(ran: Any) -> None:
    """A model that eager cannot run is a row that says so."""
    row = ran(Raising)
    assert row["failed"].startswith("eager: KeyError")
    assert zoo.verdict(row) == "failed"


def test_differences_are_found() -> None:
    """Other bits, other layouts and another number of results are differences."""
    same = [[("layout", b"1"), 3]]
    assert zoo.difference(same, [[("layout", b"1"), 3]]) == ""
    assert zoo.difference(same, [[("layout", b"2"), 3]]) == "call 1: bits of result 0"
    assert zoo.difference(same, [[("other", b"1"), 3]]) == "call 1: layout of result 0"
    assert zoo.difference(same, [[("layout", b"1")]]) == "call 1: 2 results, and eager has 1"


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the results have is not run again, and a model that its process does not survive is a row."""
    results = tmp_path / "zoo.jsonl"
    monkeypatch.setattr(zoo.Lane, "run", lambda lane, key, budget: {"op": key, "device": "cpu", "stopped": "it died"})
    names = list(zoo.in_turns(zoo_models.zoo))[:3]
    for _ in range(2):
        zoo.main(["--results", str(results), "--processes", "1", "--only", *names])
    found = list(sweep.rows(results))
    assert sorted(row["op"] for row in found) == sorted(names)
    assert all(zoo.verdict(row) == "stopped" for row in found)
    assert all(name in zoo.table(found) for name in names)


def test_sources_take_turns() -> None:
    """A run that is stopped early has tried models of each source; each has ten and more, and there are sixty and more."""
    keys = zoo.in_turns(zoo_models.zoo)
    counts = {source: sum(key.startswith(source) for key in keys) for source in zoo.SOURCES}
    assert min(counts.values()) >= 10
    assert sum(counts.values()) == len(keys) >= 60
    assert {key.split("/")[0] for key in keys[:8]} == set(zoo.SOURCES)


def test_shares_are_of_kernels_in_graphs() -> None:
    """A kernel is in a graph if its launch is that of a graph."""
    profile = zoo.Profile(torch.device("cuda"))
    launch = {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "args": {"correlation": 1}}
    other = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "args": {"correlation": 2}}
    kernels = [{"cat": "kernel", "name": "k", "args": {"correlation": number}} for number in (1, 1, 1, 2)]
    profile.events = json.loads(json.dumps([launch, other, *kernels]))
    counts = profile.counts(None)
    assert (counts["kernels"], counts["in_graphs"], counts["graph_launches"]) == (4, 3, 1)
    assert zoo.share(counts) == 0.75
