"""All lines at once: random straight-line programs equal eager, bit for bit, with their aliases, writes and draws."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

import breakable_backend
from checks import arguments_of, check, compare, instrument, run
from straight_line import SIDE, WRITES, Straight, programs


def holds(program: Straight, device: torch.device, options: dict[str, Any]) -> None:
    """The program compiled equals the program, with its counts where it writes none of its inputs."""

    def make_args(call: int) -> tuple[Tensor, ...]:
        return tuple(torch.rand(SIDE, SIDE, device=device) for _ in range(program.inputs))

    writes = any(name in WRITES for name, _ in program.lines)
    torch.compiler.reset()
    if not writes:
        check(program.__call__, make_args, device=device, options=options, calls=5)
    else:
        behaves(program, make_args, device=device, options=options)


def behaves(program: Straight, make_args: Any, *, device: torch.device, options: dict[str, Any]) -> None:
    """As ``check``, without its counts: a written input at ever new addresses is recorded late."""
    compiled = torch.compile(program.__call__, backend="breakable_cg", options={"min_kernels": 1, **options})
    mine, theirs = ([arguments_of(make_args, call) for call in range(10)] for _ in range(2))
    want = run(program, program, theirs, device, torch.no_grad, lambda call: None)
    got = run(
        compiled, program, mine, device, torch.no_grad, lambda call: instrument(compiled, interpreted=call % 2 == 0)
    )
    compare(got, want)
    breakable_backend.reset(compiled)


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part: int, device: torch.device, options: dict[str, Any]) -> None:
    """All lines: a random program of pure, in-place, view, eager and random ops does what eager does."""

    @hypothesis.settings(
        max_examples=20,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(part)
    @hypothesis.given(programs())
    def run_examples(program: Straight) -> None:
        holds(program, device, options)

    run_examples()
