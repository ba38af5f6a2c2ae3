"""Contract line 1: marked calls and random draws happen exactly as often as in eager, all else once per call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from checks import check, compile_both, program_of, sequence


def test_the_closed_form(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: the model with two eager calls is ``9 x + 19``, in each kind of call."""
    compiled, _ = compile_both(silly.Silly(), options)
    for number in range(5):
        with torch.no_grad():
            assert compiled(torch.full((3,), float(number), device=device)).tolist() == [9.0 * number + 19] * 3


def test_counts_of_the_silly_model(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: two eager calls make three captured segments."""
    # captured = eager calls + 1; copies = x and the result of each eager call
    check(
        silly.Silly(),
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=3,
        eager=2,
        copies=3,
    )


def test_unused_marked_call(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a marked call happens although nobody uses its result."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        silly.attention(y, y, y)
        return y.cos() + 1

    # the one eager call stands between two captured segments; copies = x
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=2, eager=1, copies=1)


def test_two_equal_calls(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: two equal calls are two calls."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        return silly.triple(y) + silly.triple(y)

    before = silly.calls["triple"]
    # adjacent eager calls are one segment between two captured ones; copies = x and two results
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=2, eager=1, copies=3)
    assert silly.calls["triple"] - before == 2 * 2 * 7  # 2 calls x 2 sides x 7 calls of each


def test_marked_call_that_returns_none(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a marked op without result and without mutation happens."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 1
        silly.notice(y)
        return y * 2

    # segments sin-add and mul around one eager call; copies = x
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=2, eager=1, copies=1)


def test_only_unused_calls(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: marked calls happen although the function returns nothing."""

    def f(x: Tensor) -> None:
        silly.notice(x)
        silly.triple(x)

    # nothing is captured; both calls are one eager segment
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=0, eager=1)


@pytest.mark.parametrize("draw", [torch.rand_like, torch.randn_like], ids=["rand", "randn"])
def test_unused_random_draw(draw: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: a random draw happens although nobody uses it."""

    def f(x: Tensor) -> Tensor:
        draw(x)
        return x + torch.rand_like(x)

    # one captured segment; copies = x
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=1, eager=0, copies=1)


def test_unused_batch_norm(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 5: a batch norm writes its statistics although nobody uses its result."""
    mine, theirs = ((torch.zeros(3, device=device), torch.ones(3, device=device)) for _ in range(2))

    def f(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        torch.nn.functional.batch_norm(x, mean, variance, training=True)
        return x + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    for number in range(4):
        x = torch.rand(5, 3, device=device) + number
        assert torch.equal(compiled(x, *mine), f(x, *theirs))
        assert all(map(torch.equal, mine, theirs))
    assert program_of(compiled).replays == 2


def test_two_equal_draws(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: two equal random draws are two draws."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand_like(x) + x, torch.rand_like(x) + x

    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=1, eager=0, copies=1)


def test_body_of_a_captured_op(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: the Python body of a captured op runs in call 1 and at capture, and never again."""
    compiled, _ = compile_both(lambda x: silly.wave(x + 1) + 1, options)
    runs = []
    for _ in range(5):
        before = silly.bodies["wave"]
        with torch.no_grad():
            compiled(torch.rand(3, device=device))
        runs.append(silly.bodies["wave"] - before)
    assert runs == [1, 1, 0, 0, 0]  # plain, capture, then replays
    assert program_of(compiled).replays == 3  # 5 calls - plain - recording


def test_body_of_an_eager_op(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: the Python body of a marked op runs once in every call, the recording one too."""
    compiled, _ = compile_both(lambda x: silly.triple(x + 1) + 1, options)
    runs = []
    for _ in range(5):
        before = silly.calls["triple"]
        with torch.no_grad():
            compiled(torch.rand(3, device=device))
        runs.append(silly.calls["triple"] - before)
    assert runs == [1] * 5


def test_every_call_returns_real_values(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: the plain call, the recording one and replays all return what eager returns."""
    compiled, eager = compile_both(silly.Silly(), options)
    sequence(compiled, eager, [(torch.rand(5, device=device),) for _ in range(4)])


def test_device_effects_once(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a mutation happens once in each call, the recording one too."""
    compiled, _ = compile_both(silly.Counting(2).to(device), options)
    for number in range(1, 7):
        with torch.no_grad():
            y = compiled(torch.zeros(2, device=device))
        assert y.tolist() == [3.0 * number - 2] * 2
        assert compiled._orig_mod.total.tolist() == [3.0 * number] * 2


@pytest.mark.parametrize("count", [1, 3])
def test_list_result(count: int, device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: an op that returns a list is called once, and all its parts cross."""

    def f(x: Tensor) -> Tensor:
        parts = silly.pieces(x + 1, count)
        return torch.stack(parts).sum(0) + 1

    # copies = x and each part
    check(
        f,
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=1 + count,
    )


def test_tuple_result_partly_used(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: an op that returns several tensors, one read by a graph, one returned, one unused."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        first, sums, _ = silly.three(x * 2)
        return first.cos() + 1, sums

    # copies = x and the one result that a graph reads
    check(
        f, lambda _: (torch.rand(3, 4, device=device),), device=device, options=options, captured=2, eager=1, copies=2
    )
