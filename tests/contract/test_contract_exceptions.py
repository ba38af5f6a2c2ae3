"""Contract line 8: an error of a user's eager function reaches the caller as itself, and the next call is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend import EagerOutputError
from breakable_backend.calling.registry import executors_of
from checks import assert_same, compile_both, program_of


class Stop(Exception):
    """An error of the user's own."""


@pytest.fixture
def failing() -> Any:
    """``failing(error)`` lets the next calls of :func:`silly.fragile` raise ``error``; None lets them pass."""

    def choose(error: BaseException | None) -> None:
        def fail() -> None:
            if error is not None:
                raise error

        silly.hooks["fragile"] = fail

    yield choose
    silly.hooks.clear()


class Steps(nn.Module):
    """A captured write, a draw, the fragile op, another captured write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.zeros(3))
        self.register_buffer("after", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.before.add_(x)
        y = silly.fragile(x + torch.rand_like(x))
        self.after.add_(y)
        return y + torch.rand_like(x)


@pytest.mark.parametrize("call", [1, 2, 3, 5], ids=["plain", "recording", "first-replay", "replay"])
@pytest.mark.parametrize("kind", [Stop, ValueError, KeyboardInterrupt])
def test_error_in_an_eager_step(
    kind: type[BaseException], call: int, failing: Any, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 8: the same object; completed steps stay done, later ones did not happen; the next call is right."""
    compiled, eager = compile_both(Steps().to(device), options)

    def outcomes(model: Any, module: Any) -> list[Any]:
        torch.manual_seed(5)
        found: list[Any] = []
        for number in range(1, 9):
            error = kind("stop") if number == call else None
            failing(error)
            x = torch.full((3,), float(number), device=device)
            with torch.no_grad():
                if error is None:
                    found.append(model(x))
                else:
                    with pytest.raises(kind) as caught:
                        model(x)
                    assert caught.value is error
                    assert not caught.value.__cause__
            found += [module.before.clone(), module.after.clone(), torch.get_rng_state()]
            if device.type == "cuda":
                found.append(torch.cuda.get_rng_state(device))
        return found

    assert_same(outcomes(compiled, compiled._orig_mod), outcomes(eager, eager))
    program = program_of(compiled)
    # a recording that was dropped begins anew with the next call: at most one more set of captures is kept
    assert program.replays >= 8 - 2 - 2  # all but plain, recording, and what the error cost


def test_driver_is_clean_after_an_error(failing: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 8 and 10: an error while recording leaves no capture and no block of the pool."""
    compiled, eager = compile_both(Steps().to(device), options)
    x = torch.rand(3, device=device)
    with torch.no_grad():
        compiled(x)
        failing(Stop())
        with pytest.raises(Stop):
            compiled(x)
        failing(None)
        (executor,) = executors_of(compiled)
        assert executor.driver is not None
        assert not executor.driver.is_capturing()
        assert executor.driver.live_blocks() == 0
        for _ in range(4):
            compiled(x)
    assert program_of(compiled).captures == 2  # both segments, once
    del eager


def test_error_leaves_ambient_state(failing: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 7 and 8: an error inside a traced autocast leaves the caller's state as it was."""

    def f(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.enable_grad():
            return silly.fragile(x + 1) + 1

    compiled = torch.compile(f, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for number in range(6):
            failing(Stop() if number in (1, 3, 5) else None)
            before = silly.state(device.type)
            if number in (1, 3, 5):
                with pytest.raises(Stop):
                    compiled(torch.rand(3, device=device))
            else:
                compiled(torch.rand(3, device=device))
            assert silly.state(device.type) == before


def test_error_of_an_unmarked_op(device: torch.device, options: dict[str, Any]) -> None:
    """Line 8: an error inside what would be captured reaches the caller in the plain call, and the next call is right."""
    compiled = torch.compile(
        lambda x, i: x.index_select(0, i) * 2 + 1, backend="breakable_cg", options={**options, "min_kernels": 1}
    )
    if device.type == "cuda":
        pytest.skip("an index out of range is a device-side assertion there")
    x = torch.arange(3.0)
    with torch.no_grad():
        with pytest.raises((IndexError, RuntimeError)):
            compiled(x, torch.tensor([7]))
        for _ in range(5):
            assert compiled(x, torch.tensor([2])).tolist() == [5.0]


def test_wrong_fake_implementation(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 8 and 9: a result with other strides than the fake implementation promised is an error that says so."""
    compiled = torch.compile(
        lambda x: silly.liar(x + 1) * 2, backend="breakable_cg", options={**options, "min_kernels": 1}
    )
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(EagerOutputError, match=r"silly::liar.*stride \[1, 3\].*stride \[4, 1\]") as caught:
                compiled(torch.rand(3, 4, device=device))
            assert "register_fake" in str(caught.value)
            assert "test_contract_exceptions.py" in str(caught.value)
