"""Contract lines where a one-line fault in the package would otherwise go unnoticed; ``sabotage.py`` has the faults."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from checks import assert_same, check, compile_both, program_of

library = torch.library.Library("gaps", "FRAGMENT")
library.define("same(Tensor x) -> Tensor", tags=silly.UNSAFE)
library.impl("same", lambda x: x, "CompositeExplicitAutograd")


@torch.library.register_fake("gaps::same", lib=library)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


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


def test_eager_op_that_returns_its_argument(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: what an op hands out against its schema may be memory of the pool, and is copied then."""

    def f(x: Tensor) -> Tensor:
        return torch.ops.gaps.same(x + 1)

    # add | same; copies = x
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=1, eager=1, copies=1)


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


def test_keys_read_otherwise_after_a_failed_capture(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: where a failed capture changes what the key holds, what was recorded under the old key is released."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple((x + 1).sin().cos())
        x.add_(1)  # with two ops before the one that fails, it is eager too
        return silly.triple(silly.stubborn(x + y)).sin().cos() * 2

    compiled, eager = compile_both(f, {**options, "min_kernels": 3})
    mine, theirs = torch.zeros(3, device=device), torch.zeros(3, device=device)
    with torch.no_grad():
        for _ in range(6):
            assert_same(compiled(mine), eager(theirs))
            assert_same(mine, theirs)
    program = program_of(compiled)
    # its address was in the key only as long as a segment that writes it was to be captured
    assert len(program.recordings) == 1
    assert program.plain_calls == {"warm-up": 2}
    assert program.captures == 2 * 2  # the first and the last segment, under each of the two keys
    assert program.replays == 6 - 2 - 2


def test_lock_is_given_back(device: torch.device, options: dict[str, Any]) -> None:
    """Line 11: calls of another thread, after calls of this one, find the pool free."""
    compiled, eager = compile_both(silly.Silly(), options)
    x = torch.rand(4).to(device)
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(compiled(x))

    for _ in range(3):
        call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert_same(results, [eager(x)] * 4)
    assert program_of(compiled).plain_calls == {"warm-up": 1}


@pytest.mark.gpu
def test_streams_wait_for_each_other() -> None:
    """Line 11: a call on another stream waits on the GPU for the one before it, which is still between its segments."""
    compiled, _ = compile_both(lambda x: silly.visit(x + 1) + (x + 1), {})
    first, second = (torch.full((4,), value, device="cuda") for value in (1.0, 5.0))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with torch.no_grad():
        for _ in range(3):
            compiled(first)
        silly.hooks["visit"] = lambda y: (torch.cuda._sleep(1_000_000_000), y + 1)[1]  # half a second, for a busy host
        torch.cuda.synchronize()
        results = []
        try:
            for stream, x in zip(streams, (first, second), strict=True):
                with torch.cuda.stream(stream):
                    results.append(compiled(x))
        finally:
            silly.hooks.clear()
        torch.cuda.synchronize()
    assert [result.tolist() for result in results] == [[5.0] * 4, [13.0] * 4]  # 2 x + 3
