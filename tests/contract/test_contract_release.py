"""Contract lines 10 and 11: what is reset is freed at once, what is dropped soon; re-entrant and concurrent calls are right."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers import CaptureDriver
from checks import assert_same, compile_both, program_of
from gpu import settled


def driver_of(compiled: Any) -> CaptureDriver:
    """The driver behind a compiled function."""
    (executor,) = executors_of(compiled)
    assert executor.driver is not None
    return executor.driver


def warm(compiled: Any, device: torch.device, calls: int = 4) -> None:
    """Call until it replays."""
    with torch.no_grad():
        for _ in range(calls):
            compiled(torch.rand(2, 4, device=device))


def test_reset_of_one_function(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: ``reset(compiled)`` frees its graphs, and its next call is the first again."""
    first, eager = compile_both(silly.Block(4).to(device), options)
    second, _ = compile_both(lambda x: silly.triple(x + 1) * 2, options)
    warm(first, device)
    warm(second, device)
    driver = driver_of(first)
    both = driver.live_graphs()
    breakable_backend.reset(first)
    assert 0 < driver.live_graphs() < both
    captures = program_of(first).captures
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(2, 4, device=device)
            assert_same(first(x), eager(x))
    assert program_of(first).captures == 2 * captures
    breakable_backend.reset()
    assert driver.live_blocks() == driver.live_graphs() == 0


def test_reset_of_what_is_not_compiled(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: ``reset`` of the module that was compiled frees nothing, and says so."""
    model = silly.Block(4).to(device)
    compiled, _ = compile_both(model, options)
    with pytest.warns(UserWarning, match=r"reset freed nothing: nothing in this Block is compiled"):
        breakable_backend.reset(model)
    breakable_backend.reset(compiled)


@pytest.mark.parametrize("reset", [torch._dynamo.reset, torch.compiler.reset, breakable_backend.reset])
def test_reset_frees_at_once(reset: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: each of the resets frees graphs, buffers and pool at once, without a garbage collection."""
    compiled, eager = compile_both(silly.Block(4).to(device), options)
    warm(compiled, device)
    driver = driver_of(compiled)
    assert driver.live_graphs() > 0
    gc.disable()
    try:
        reset()
        assert driver.live_blocks() == driver.live_graphs() == 0
    finally:
        gc.enable()
    with torch.no_grad():
        for _ in range(4):
            x = torch.rand(2, 4, device=device)
            assert_same(compiled(x), eager(x))


def test_dropped_model(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: dropping a model frees its weights, graphs and pool, while Dynamo keeps the compiled function."""
    model = silly.Block(4).to(device)
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "min_kernels": 1})
    warm(compiled, device)
    driver = driver_of(compiled)
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, compiled
    gc.collect()
    assert [parameter() for parameter in parameters] == [None] * 4  # weight and bias, twice
    assert settled(driver)


def test_one_of_several_instances_dropped(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: dropping one instance frees what belongs to it, and the others go on replaying."""
    blocks = [silly.Block(4).to(device) for _ in range(3)]
    for block in blocks:
        block.compile(backend="breakable_cg", options={"min_kernels": 1, **options})
    for block in blocks:
        warm(block, device)
    (driver,) = {executor.driver for executor in executors_of()}
    assert driver is not None
    before = driver.live_graphs()
    captures = sum(program.captures for program in breakable_backend.explain().programs)
    weight = weakref.ref(blocks[0].linear.weight)
    if device.type == "cuda":
        torch.cuda.synchronize()  # what dies while the GPU is busy goes later
    del block, blocks[0]
    gc.collect()
    assert weight() is None
    assert driver.live_graphs() == before * 2 // 3  # two of three are left
    for block in blocks:
        warm(block, device)
    assert sum(program.captures for program in breakable_backend.explain().programs) == captures


def test_inputs_and_results_are_not_kept(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: no call keeps its inputs or its results."""
    compiled, _ = compile_both(silly.Block(4).to(device), options)
    with torch.no_grad():
        for _ in range(5):
            x = torch.rand(2, 4, device=device)
            y = compiled(x)
            refs = weakref.ref(x), weakref.ref(y)
            del x, y
            assert [ref() for ref in refs] == [None, None]


def test_reset_inside_a_call(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 10 and 11: an eager step that resets while its function records leaves nothing behind and a right result."""
    compiled, eager = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    x = torch.rand(3, device=device)
    try:
        with torch.no_grad():
            want = (x + 2) * 2
            compiled(x)
            silly.hooks["visit"] = lambda y: (breakable_backend.reset(), y + 1)[1]
            assert_same(compiled(x), want)
            silly.hooks.clear()
            for _ in range(4):
                assert_same(compiled(x), want)
    finally:
        silly.hooks.clear()
    driver = driver_of(compiled)
    breakable_backend.reset()
    assert driver.live_blocks() == driver.live_graphs() == 0
    del eager


def test_reset_inside_a_replay(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 10 and 11: an eager step that resets while its function replays: the call is right or a typed error, the next is right."""
    compiled, _ = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    x = torch.rand(3, device=device)
    try:
        with torch.no_grad():
            want = (x + 2) * 2
            for _ in range(4):
                compiled(x)
            silly.hooks["visit"] = lambda y: (breakable_backend.reset(), y + 1)[1]
            with contextlib.suppress(breakable_backend.BreakableError):
                assert_same(compiled(x), want)
            silly.hooks.clear()
            for _ in range(4):
                assert_same(compiled(x), want)
    finally:
        silly.hooks.clear()


@pytest.mark.parametrize("depth", [1, 2])
def test_reentrance(depth: int, device: torch.device, options: dict[str, Any]) -> None:
    """Line 11: an eager step that calls the same compiled function has that call run plainly, and both are right."""
    compiled, eager = compile_both(lambda x: silly.visit(x + 1) * 2, options)
    level = [0]

    def through(function: Any) -> Any:
        def visit(y: Tensor) -> Tensor:
            if level[0] >= depth:
                return y + 1
            level[0] += 1
            try:
                return function(y)
            finally:
                level[0] -= 1

        return visit

    calls = 6
    try:
        with torch.no_grad():
            for _ in range(calls):
                x = torch.rand(3, device=device)
                silly.hooks["visit"] = through(compiled)
                got = compiled(x)
                silly.hooks["visit"] = through(eager)
                assert_same(got, eager(x))
    finally:
        silly.hooks.clear()
    # Dynamo may compile anew for the state inside an op, so there may be two programs
    programs = breakable_backend.explain(compiled).programs
    plain = sum((Counter(program.plain_calls) for program in programs), Counter())
    assert sum(program.calls for program in programs) == calls * (1 + depth)
    assert plain == {"warm-up": 1, "called inside an eager step": calls * depth}
    assert sum(program.replays for program in programs) == calls - 2


def test_another_compiled_function_inside(device: torch.device, options: dict[str, Any]) -> None:
    """Line 11: an eager step may call another compiled function."""
    inner, inner_eager = compile_both(lambda x: silly.triple(x + 1) * 2, options)
    outer, outer_eager = compile_both(lambda x: silly.visit(x + 1) - 2, options)
    try:
        with torch.no_grad():
            for _ in range(6):
                x = torch.rand(3, device=device)
                silly.hooks["visit"] = inner
                got = outer(x)
                silly.hooks["visit"] = inner_eager
                assert_same(got, outer_eager(x))
    finally:
        silly.hooks.clear()


def test_threads(device: torch.device, options: dict[str, Any]) -> None:
    """Line 11: several threads call one function with several shapes, and each gets its own results."""
    compiled, eager = compile_both(silly.Silly(), options, dynamic=True)
    with torch.no_grad():
        compiled(torch.rand(2, 3, device=device))
    errors: list[BaseException] = []

    def work(size: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    # drawn on the host: torch refuses draws on a GPU while another thread captures there
                    x = torch.rand(size, 3).to(device)
                    assert_same(compiled(x), eager(x))
        except BaseException as error:  # noqa: BLE001 - it is looked at below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(2 + number % 4,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


class Late(nn.Module):
    """A buffer that is made at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = silly.triple(x + 1) + 1
        if self.seen is None:
            self.seen = y
        else:
            self.seen = self.seen + y
        return self.seen * 2


def test_state_kept_from_results(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: a tensor that the model keeps from one call and reads in the next is not overwritten between."""
    compiled, eager = compile_both(Late(), options)
    with torch.no_grad():
        for _ in range(6):
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
