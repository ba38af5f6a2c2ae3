"""Contract line 7: an eager step runs under the state that it would have in eager, traced and the caller's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import breakable_backend
import silly
from checks import check


def bfloat16(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def matrices(device: torch.device) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Two square matrices."""
    return lambda _: (torch.rand(4, 4, device=device), torch.rand(4, 4, device=device))


def with_caller(device: torch.device, *contexts: Any) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The caller's contexts, entered anew for each call."""

    @contextlib.contextmanager
    def enter() -> Any:
        with contextlib.ExitStack() as stack:
            for make in (torch.no_grad, *contexts):
                stack.enter_context(make())
            yield

    return enter


def test_plain_state(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: without any context an eager step sees grad mode off under ``no_grad``."""
    # add | ambient | add; copies = x and the eager result
    check(
        lambda x: silly.ambient(x + 1) + x,
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
    )


@pytest.mark.parametrize("enabled", [True, False])
def test_traced_autocast(enabled: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: a marked op inside a traced autocast runs under it, one before or after does not."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = silly.ambient(x + 1)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
            inside = silly.ambient(x + 2)
        after = silly.ambient(x + 3)
        return before, inside, after

    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=3, copies=1)


def test_nested_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: nested autocasts, one of which switches it off."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            outer = silly.ambient(x + 1)
            with torch.autocast(x.device.type, enabled=False):
                inner = silly.ambient(x + 2)
            again = silly.ambient(x + 3)
        return outer, inner, again

    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=3, copies=1)


def test_callers_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: a marked op runs under the autocast that the caller has around the call."""
    check(
        lambda x: silly.ambient(x + 1) + x,
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
        under=with_caller(device, lambda: bfloat16(device)),
    )


def test_autocast_switched_off_inside_the_callers(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: where a graph switches off the autocast that the caller has around the call, products stay as exact as eager's."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            y = silly.marked_product(x @ w, w)
            z = (y + 1) @ w
        return y, z

    under = with_caller(device, lambda: bfloat16(device))
    check(f, matrices(device), device=device, options=options, captured=2, eager=1, under=under)


def test_marked_matmul_under_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: a marked op that multiplies rounds to bfloat16 where eager does."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with bfloat16(x.device):
            y = silly.marked_product(x + 1, w)
        return y, y * 2

    check(f, matrices(device), device=device, options=options, captured=2, eager=1)


def test_captured_op_under_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: an opaque op that is captured gives what eager gives under a traced autocast, when plain and when replayed."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with bfloat16(x.device):
            y = silly.product(x + 1, w)
        return y, y * 2

    check(f, matrices(device), device=device, options=options)


def test_captured_op_under_the_callers_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: the same under an autocast of the caller's."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return silly.product(x + 1, w) * 2

    check(f, matrices(device), device=device, options=options, under=with_caller(device, lambda: bfloat16(device)))


def test_captured_op_in_a_warm_autocast_region(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a weight is cast anew by each replay, though autocast's cache held a cast of it when it was recorded."""
    weight, x = torch.nn.Parameter(torch.rand(4, 4, device=device)), torch.rand(4, 4, device=device)

    def f(x: Tensor) -> Tensor:
        return silly.product(x + 1, weight) * 2

    compiled = torch.compile(f, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        with bfloat16(device):
            stale = x @ weight
            for _ in range(3):
                compiled(x)
            weight.mul_(2)
            assert torch.equal(x @ weight, stale)  # the caller's cast holds until the region ends
            got = compiled(x)
            assert torch.is_autocast_cache_enabled()
        with bfloat16(device):
            assert torch.equal(got, f(x))
    (program,) = breakable_backend.explain(compiled).programs
    assert (program.num_graph_segments, program.replays) == (1, 2)


def test_torch_ops_under_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: torch's own ops, captured and in an eager region, are cast as in eager."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        with bfloat16(x.device):
            y = (x + 1) @ w
            with breakable_backend.eager_region():
                z = y @ w
            return y @ z, z

    check(f, matrices(device), device=device, options=options, captured=2, eager=1)


def test_cond_body_under_autocast(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: an opaque op in a branch of ``cond`` runs under the autocast around the ``cond``."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        with bfloat16(x.device):
            y = torch.cond(
                x.sum() > 100,
                lambda x, w: silly.marked_product(x, w),
                lambda x, w: silly.marked_product(x, w) * 2,
                (x, w),
            )
        return y * 2 + 1

    check(f, matrices(device), device=device, options=options)


def test_traced_grad_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: a marked op sees the grad mode that the traced code set around it."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = silly.ambient(x + 1)
        with torch.enable_grad():
            inside = silly.ambient(x + 2)
            with torch.no_grad():
                inner = silly.ambient(x + 3)
        return before, inside, inner

    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=3, copies=1)


def test_callers_grad_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: with grad mode on and nothing that needs a gradient, a marked op sees grad mode on."""
    check(
        lambda x: silly.ambient(x + 1) + x,
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        under=torch.enable_grad,
    )


def test_inference_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: under ``inference_mode`` a marked op sees it, and results are inference tensors as in eager."""
    check(
        lambda x: (silly.ambient(x + 1) + x, x.t()),
        lambda _: (torch.rand(4, 4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        under=torch.inference_mode,
    )


def test_states_in_turn(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 7: one function called under several states gives each its own results, in any order."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x + 1) @ w
        return silly.ambient(x + 1), y * 2

    compiled = torch.compile(f, backend="breakable_cg", options={**options, "min_kernels": 1})
    states = [torch.no_grad, torch.inference_mode, torch.enable_grad, with_caller(device, lambda: bfloat16(device))]
    for round_ in range(4):
        for enter in states:
            torch.manual_seed(round_)
            args = matrices(device)(0)
            with enter():
                got, want = compiled(*args), f(*args)
            for mine, theirs in zip(got, want, strict=True):
                assert mine.dtype == theirs.dtype
                assert mine.tolist() == theirs.tolist()
                assert mine.is_inference() == theirs.is_inference()


def test_state_is_put_back(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: after a call the caller's state is as before."""

    def f(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16), torch.enable_grad():
            return silly.ambient(x + 1) + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    for _ in range(5):
        with torch.no_grad():
            before = silly.state(device.type)
            compiled(torch.rand(4, device=device))
            assert silly.state(device.type) == before


def test_default_dtype(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 7: another default dtype is another program."""
    compiled = torch.compile(
        lambda x: silly.triple(x) + torch.ones(3, device=x.device) * 2, backend="breakable_cg", options=options
    )
    try:
        for dtype in (torch.float32, torch.float64) * 4:
            torch.set_default_dtype(dtype)
            with torch.no_grad():
                assert compiled(torch.zeros(3, device=device, dtype=torch.float32)).dtype is dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")  # torch's own, which it imports for the first dual tensor
def test_forward_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: where forward-mode AD is on, nothing is captured, so tangents are as in eager; before it and behind it all is."""
    forward_ad = torch.autograd.forward_ad

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin() * 2, x.detach() + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    with torch.no_grad():
        bound = breakable_backend.bind(compiled, torch.rand(4, device=device))
        assert not bound.why_not
        for _ in range(3):
            x = torch.rand(4, device=device)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x, torch.rand(4, device=device))
                expected = list(map(forward_ad.unpack_dual, f(dual)))
                for call in (compiled, bound):
                    got = list(map(forward_ad.unpack_dual, call(dual)))
                    assert torch.equal(got[0].tangent, expected[0].tangent)
                    assert got[1].tangent is expected[1].tangent is None
            for call in (compiled, bound):
                assert all(map(torch.equal, call(x), f(x)))
    assert bound.misfits == {"forward-mode AD is on": 3}
