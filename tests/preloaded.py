"""What takes seconds to import or to set up, for processes that are forked from one that has it: ``sabotage.py``."""

from __future__ import annotations

import hypothesis.strategies
import pytest
import rich.table
import torch
import torch._dynamo.testing

__all__ = ["hypothesis", "pytest", "rich"]


def _compile() -> None:
    """Have torch import what it does not import before the first compilation."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + x.sum(0)

    with torch.no_grad():
        for dynamic in (False, True):
            torch.compile(function, backend="aot_eager", dynamic=dynamic)(torch.ones(3, 3))
    if torch.version.cuda is None:  # in other builds the first backward starts threads, and then forks can run none
        torch.compile(function, backend="aot_eager")(torch.ones(3, 3, requires_grad=True)).sum().backward()
    torch.compiler.reset()


_compile()
