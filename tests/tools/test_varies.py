"""What a report says where few calls replay: what varies, its values, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from breakable_backend import eager_on_graph, explain

pytestmark = pytest.mark.usefixtures("no_grad")


def told(function: Callable[..., Any], calls: list[tuple[Any, ...]], **options: Any) -> str:
    """All findings of a report on ``function``, compiled for any sizes and called so."""
    compiled = torch.compile(function, backend="breakable_cg", dynamic=True, options={"driver": "tape", **options})
    for arguments in calls:
        compiled(*arguments)
    return "\n".join(finding for program in explain(compiled).programs for finding in program.findings)


def test_a_size_that_varies() -> None:
    """A size is named as the user reads it, with its values, and padding as the remedy."""
    found = told(lambda x: x.sin() * 2 + x.shape[1], [(torch.ones(2, n),) for n in range(3, 15)])
    assert "x.size()[1] has had 3, 4, 5, 6, 7, 8, … 12 values" in found
    assert "torch.nn.functional.pad(x, (0, -x.size()[1] % 64))" in found


def test_a_size_before_the_last() -> None:
    """The remedy pads the dimension that varies, and names the tensor as the user writes it."""
    calls = [({"ids": torch.ones(n, 2, 3)},) for n in range(3, 15)]
    found = told(lambda batch: batch["ids"].sin() * 2 + batch["ids"].shape[0], calls)
    assert "torch.nn.functional.pad(batch['ids'], (0, 0, 0, 0, 0, -batch['ids'].size()[0] % 64))" in found


def test_a_size_of_a_keyword() -> None:
    """A tensor that code takes in ``**kwargs`` has the name that its callers gave it."""
    options = {"driver": "tape"}
    compiled = torch.compile(lambda **kw: kw["ids"].sin() * 2, backend="breakable_cg", dynamic=True, options=options)
    for n in range(3, 15):
        compiled(ids=torch.ones(n, 2))
    (found,) = explain(compiled).programs[0].findings
    assert found.startswith("ids.size()[0] has had 3, 4, 5")


def test_a_number_that_varies() -> None:
    """A Python number is named, with its values, and a tensor as the remedy."""
    found = told(lambda x, n: (x + n).sin() * 2, [(torch.ones(4), n) for n in range(2, 10)])
    assert "the number n has had 2, 3, 4, 5, 6, 7, … 8 values" in found
    assert "torch.tensor(n, device=...)" in found


@eager_on_graph(fake=lambda x, n: torch.empty_like(x))
def scaled(x: torch.Tensor, n: int) -> torch.Tensor:
    return x * n


def test_a_number_that_only_eager_steps_depend_on() -> None:
    """Where only eager steps read what is computed from a number, the remedy is to compute in them."""
    found = told(lambda x, n: scaled(x.sin() + 1, 2 * n).cos() * 2, [(torch.ones(4), n) for n in range(2, 10)])
    assert "the number n has had 2, 3, 4, 5, 6, 7, … 8 values" in found
    assert "only eager steps read what your code computes from it: pass them n as it is, and compute in them" in found
    assert "torch.tensor" not in found


def test_caches_that_are_replaced() -> None:
    """Inputs that are read in place and come at new addresses are told, with writing in place as the remedy."""

    def step(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return (x + cache).sin() * 2

    compiled = torch.compile(step, backend="breakable_cg", options={"driver": "tape"})
    caches = [torch.ones(4) for _ in range(8)]
    for cache in caches:
        torch._dynamo.mark_static_address(cache)
        compiled(torch.ones(4), cache)
    found = "\n".join(finding for program in explain(compiled).programs for finding in program.findings)
    assert "inputs that are read in place have been at 8 sets of addresses" in found
    assert "copy_" in found and "reset(compiled)" in found


def test_many_programs_of_one_function() -> None:
    """One function that was compiled for each value of a flag is one finding, which names it."""

    def scaled(x: torch.Tensor, name: str) -> torch.Tensor:
        return (x * len(name)).sin() + 1

    compiled = torch.compile(scaled, backend="breakable_cg", options={"driver": "tape"})
    for name in ("a", "b", "c", "d", "e"):
        compiled(torch.ones(4), name)
    first = explain(compiled).programs[0]
    assert any("5 programs are of one function, scaled at test_varies.py" in finding for finding in first.findings)


def test_nothing_where_calls_replay() -> None:
    """Where most calls replay there is nothing to tell."""
    calls = [(torch.ones(2, n),) for n in (3, 4, 5)] + [(torch.ones(2, 5),)] * 20
    assert told(lambda x: x.sin() * 2 + x.shape[1], calls) == ""
