"""Large results, which a graph copies to the caller's memory by itself, right behind the last op that touches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings import large_results
from breakable_backend.recordings.recording import GraphStep
from checks import assert_same, compile_both, entries_of

SIDE = 8


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of any size leave by themselves."""
    monkeypatch.setattr(large_results, "LARGE", 1)


def left(compiled: Any) -> list[int]:
    """How many results of each recording leave by themselves."""
    entries = [entry for executor in executors_of(compiled) for entry in entries_of(executor)]
    recordings = [entry.recording for entry in entries if entry.recording is not None]
    return [sum(len(step.outs) for step in r.steps if isinstance(step, GraphStep)) for r in recordings]


def plain(x: Tensor) -> Tensor:
    return x.sin() + 1


def several(x: Tensor) -> tuple[Tensor, ...]:
    return x.sin(), x @ x, (x @ x.cos()).t(), x.topk(2)[0]


def written_through_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    """What is copied is what the last op has left, which does not name the result."""
    y = x.sin()
    row = y.t()[1]
    z = x @ x
    row.mul_(z[0])
    return y, z


def written_in_place(x: Tensor) -> Tensor:
    y = x.sin()
    z = y.add_(1)
    return z.mul_(x)


def between_breaks(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each segment makes a result."""
    y = x.sin()
    z = silly.triple(x.cos())
    return y, z @ x


def read_later(x: Tensor) -> tuple[Tensor, Tensor]:
    """A later step reads the result."""
    y = x.sin()
    return y, silly.triple(y) + 1


def read_by_a_later_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    return y, silly.triple(x) + y


def in_one_storage(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.sin()
    return y, y[1]


def a_part(x: Tensor) -> Tensor:
    return (x @ x)[1]


def the_first_part(x: Tensor) -> Tensor:
    return (x @ x)[:2]


def every_second(x: Tensor) -> Tensor:
    return x.sin()[:, ::2]


def repeated(x: Tensor) -> Tensor:
    return x.sin()[0].expand(3, SIDE)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (plain, 1),
        (several, 4),
        (written_through_a_view, 2),
        (written_in_place, 1),
        (between_breaks, 2),
        (read_later, 1),
        (read_by_a_later_graph, 1),
        (in_one_storage, 0),
        (a_part, 0),
        (the_first_part, 0),
        (every_second, 0),
        (repeated, 0),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
@torch.no_grad()
def test_results_that_leave_by_themselves(
    function: Callable[[Tensor], Any], count: int, device: torch.device, options: dict[str, Any]
) -> None:
    """Lines 4 and 5: they are eager's, no later call changes them, and they share what eager's share."""
    compiled, _ = compile_both(function, options)
    kept = []
    for call in range(6):
        x = torch.rand(SIDE, SIDE, device=device)
        mine, theirs = compiled(x), function(x)
        assert_same(mine, theirs)
        if call != 3:
            kept.append((mine, theirs))
    for mine, theirs in kept:
        assert_same(mine, theirs)
    assert left(compiled) == [count]


@torch.no_grad()
def test_results_of_a_call_that_failed(device: torch.device, options: dict[str, Any]) -> None:
    """Line 8: memory that a failed call has allocated is written by no later one."""
    fails = False

    def step(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("as asked")
        return x * 3

    marked = breakable_backend.eager_on_graph(step)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), marked(x + 1) * 2

    compiled, _ = compile_both(function, options)
    x = torch.rand(SIDE, SIDE, device=device)
    for _ in range(4):
        compiled(x)
    fails = True
    with pytest.raises(ValueError, match="as asked"):
        compiled(x)
    fails = False
    others = [torch.zeros(SIDE, SIDE, device=device) for _ in range(8)]
    held = [compiled(x) for _ in range(4)]
    assert not any(other.any() for other in others)
    for mine in held:
        assert_same(mine, function(x))


class Deep(nn.Sequential):
    """Layers of one size."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def trained(device: torch.device, options: dict[str, Any], width: int, layers: int, steps: int) -> Any:
    """A compiled model, trained without an optimizer. Gradients are compared with eager's, also when they are old."""
    model = Deep(width, layers).to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    parameters, old = list(model.parameters()), list[tuple[Any, Any]]()
    for step in range(steps):
        x = torch.randn(4, width, device=device)
        theirs = torch.autograd.grad(model(x).square().sum(), parameters)
        for parameter in parameters:
            if step % 3:  # otherwise they are added up
                parameter.grad = None
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        compiled(x).square().sum().backward()
        mine = [parameter.grad for parameter in parameters]
        want = [new if b is None else b + new for b, new in zip(before, theirs, strict=True)]
        assert_same(mine, want)
        if step % 3 == 2:
            old.append((mine, want))
            for parameter in parameters:
                parameter.grad = None
    for mine, want in old:
        assert_same(mine, want)
    return compiled


def test_gradients_leave_by_themselves(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: gradients are added up and kept as eager's are."""
    compiled = trained(device, options, SIDE, 3, 12)
    assert left(compiled) == [1, 3]


@pytest.mark.gpu
def test_a_pool_without_gradients() -> None:
    """The pool of a backward has room for a few gradients, and not for all of them at once."""
    width, layers = 2048, 24
    compiled = trained(torch.device("cuda"), {"driver": "cuda"}, width, layers, 8)
    (driver,) = {executor.driver for executor in executors_of(compiled)}
    assert driver.pool_bytes() < 4 * width * width * layers / 2


def test_compare_mode_lets_nothing_out(device: torch.device, options: dict[str, Any]) -> None:
    """Compare mode reads the results of a graph at their addresses."""
    with torch.no_grad():
        compiled, _ = compile_both(several, {**options, "debug": "compare"})
        for _ in range(4):
            x = torch.rand(SIDE, SIDE, device=device)
            assert_same(compiled(x), several(x))
    assert left(compiled) == [0]
