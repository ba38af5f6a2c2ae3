"""Contract line 6: the same random numbers from the same seed; the generator ends where eager leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from checks import assert_same, check, compile_both, program_of


def dropouts(x: Tensor) -> Tensor:
    """Captured draws on both sides of an eager step that draws none."""
    y = nn.functional.dropout(x + 1, 0.5, training=True)
    y = silly.triple(y)
    return nn.functional.dropout(y, 0.5, training=True) + 1


def eager_draws(x: Tensor) -> Tensor:
    """Draws in a captured, an eager, a captured and an eager segment."""
    y = x + torch.rand_like(x)
    y = silly.noise(y) * 2
    y = y + torch.randn_like(x)
    return silly.noise(y)


def only_eager_draws(x: Tensor) -> Tensor:
    """Captured segments without a draw around an eager one with draws."""
    return silly.noise(silly.noise(x.sin() + 1)) * 2


def unused_draws(x: Tensor) -> Tensor:
    """Draws whose results nobody uses, before, in and after an eager step."""
    torch.rand_like(x)
    y = silly.triple(x + 1)
    torch.randn(3, device=x.device)
    silly.noise(y)
    z = y * torch.rand_like(x)
    torch.rand(2, device=x.device)
    return z


def of_many_kinds(x: Tensor) -> Any:
    """Several distributions in one segment."""
    return (
        torch.randint(0, 10, (4,), device=x.device) + 1,
        torch.bernoulli(x) + 1,
        torch.normal(x, 1.0) + 1,
        torch.empty_like(x).uniform_() * 2,
        torch.empty_like(x).exponential_() * 2,
        silly.triple(x),
    )


def permutation(x: Tensor) -> Any:
    """A draw that may be made of other ops."""
    return x[torch.randperm(4, device=x.device)] + 1, silly.triple(x)


@pytest.mark.parametrize(
    "function",
    [dropouts, eager_draws, only_eager_draws, unused_draws, of_many_kinds, permutation],
    ids=lambda function: function.__name__,
)
def test_draws(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 6: draws in captured and eager steps give eager's numbers, and leave the generator where eager does."""
    program = check(function, lambda _: (torch.rand(4, device=device),), device=device, options=options)
    assert program.num_graph_segments >= 1


def test_seeded_anew(device: torch.device, options: dict[str, Any]) -> None:
    """Line 6: a seed that the caller sets between calls counts."""
    compiled, _ = compile_both(dropouts, options)
    x = torch.rand(8, device=device)
    with torch.no_grad():
        results = []
        for _ in range(6):
            torch.manual_seed(7)
            results.append(compiled(x))
        torch.manual_seed(7)
        assert_same(results, [dropouts(x)] * 6)


def test_draws_between_calls(device: torch.device, options: dict[str, Any]) -> None:
    """Line 6: the caller's own draws between calls and the compiled ones are one sequence."""
    compiled, eager = compile_both(eager_draws, options)

    def numbers(function: Any) -> list[Tensor]:
        torch.manual_seed(3)
        found = []
        with torch.no_grad():
            for _ in range(6):
                found.append(function(torch.ones(4, device=device)))
                found.append(torch.rand(3, device=device))
        return found

    assert_same(numbers(compiled), numbers(eager))


def test_after_a_failed_capture(device: torch.device, options: dict[str, Any]) -> None:
    """Line 6: a capture that fails after a draw gives the draw back, and the segment draws once."""

    def f(x: Tensor) -> Tensor:
        y = x + torch.rand_like(x)
        y = silly.stubborn(y) + torch.rand_like(x)
        y = silly.noise(y)
        return y * torch.rand_like(x) + 1

    compiled, eager = compile_both(f, options)

    def numbers(function: Any) -> list[Any]:
        torch.manual_seed(3)
        found: list[Any] = []
        with torch.no_grad():
            for _ in range(6):
                found.append(function(torch.ones(4, device=device)))
                found.append(torch.get_rng_state())
                if device.type == "cuda":
                    found.append(torch.cuda.get_rng_state(device))
        return found

    assert_same(numbers(compiled), numbers(eager))
    assert program_of(compiled).captures >= 1  # the segment after noise


def test_generator_of_its_own(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 6 and 9: a model with dropout in eval mode draws nothing, in train mode what eager draws."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return silly.triple(self.dropout(x + 1)) + 1

    # add | triple | add in eval mode; copies = x and the eager result
    for model in (Model().eval(), Model().train()):
        check(
            model,
            lambda _: (torch.rand(6, device=device),),
            device=device,
            options=options,
            captured=2,
            eager=1,
            copies=2,
        )
        torch.compiler.reset()
