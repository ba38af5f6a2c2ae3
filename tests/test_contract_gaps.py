"""Contract lines 1, 2 and 3 where a one-line fault would otherwise go unnoticed; see ``sabotage.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from checks import assert_same, check, compile_both, program_of


def test_eager_write_between_two_graphs(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 2 and 3: an input that an eager step writes between two graphs is read anew by the second."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        a = x + y
        silly.add_into(x, a)
        return x * 2 - a

    # add | add_into | mul, sub; copies = x and y, and x again: no graph writes it, so its address is not keyed
    check(
        f,
        lambda _: (torch.rand(4, device=device), torch.rand(4, device=device)),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=3,
    )


def test_first_call_that_raises_is_no_warm_up(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 8: after a first call that raised, the next one is plain and the one after it records."""
    compiled, eager = compile_both(lambda x: silly.fragile(x + 1) * 2, options)
    x = torch.rand(3, device=device)

    def fail() -> None:
        raise KeyError

    try:
        with torch.no_grad():
            silly.hooks["fragile"] = fail
            with pytest.raises(KeyError):
                compiled(x)
            silly.hooks.clear()
            captures = []
            for _ in range(3):
                assert_same(compiled(x), eager(x))
                captures.append(program_of(compiled).captures)
    finally:
        silly.hooks.clear()
    assert captures == [0, 2, 2]  # plain; both segments; a replay
