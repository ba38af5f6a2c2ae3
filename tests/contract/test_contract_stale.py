"""Contract line 3: a captured segment never reads an old value, and no call writes where eager would not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from checks import assert_same, check, compile_both, program_of


def test_fresh_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: each of several inputs is read anew in each call."""

    def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return silly.triple(x * y) + z.exp() * x

    # mul | triple | exp, mul, add; copies = x, y, z, the eager result
    check(
        f,
        lambda _: tuple(torch.rand(4, device=device) for _ in range(3)),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=4,
    )


def test_same_input_again(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an input written in place by the caller between calls is read anew."""
    compiled, eager = compile_both(silly.Silly(), options)
    x = torch.zeros(4, device=device)
    with torch.no_grad():
        for number in range(6):
            x.fill_(number)
            assert_same(compiled(x), eager(x))


def test_eager_result_is_bridged(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: the result of an eager step, at a new address in each call, is read anew by all later segments."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple(x + 1)
        z = silly.triple(y + 1)
        return z * y + x

    # copies = x, y, z, each once although y is read by two segments
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=2, copies=3)


def test_value_for_eager_steps_only(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a value that only eager steps use is never copied."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        first = silly.attention(x, y, y)
        return silly.attention(first, x, x), (x + 1) * 2

    # both eager calls are neighbours and y and their results stay outside: copies = x
    check(
        f,
        lambda _: (torch.rand(4, device=device), torch.rand(4, device=device)),
        device=device,
        options=options,
        captured=1,
        eager=1,
        copies=1,
    )


def test_view_across_a_break(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: views of captured memory cross breaks in both directions."""

    def f(x: Tensor) -> Tensor:
        y = (x + 1).view(2, 6).t()
        z = silly.triple(y)
        w = z[1:4].reshape(-1)
        return w.sin() + y.reshape(-1)[:6]

    check(f, lambda _: (torch.rand(12, device=device),), device=device, options=options, captured=2, eager=1, copies=2)


def test_value_and_its_view_both_cross(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: where ``y`` and ``y[0]`` both cross a break they stay one storage, with one bridge."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = silly.triple(x + 1)
        first = y[0]
        a = first.cos() + y
        y.mul_(2)
        silly.add_into(first, a[0])
        return first + 1, y + a

    # add | triple | cos, add, mul_ | add_into | two adds; copies = x and y
    check(
        f, lambda _: (torch.rand(3, 3, device=device),), device=device, options=options, captured=3, eager=2, copies=2
    )


@pytest.mark.parametrize("written", [False, True])
def test_view_that_two_eager_steps_read(written: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a view of an eager result is read by eager steps before and after a graph that takes the result in."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = silly.triple(x + 1)
        view = y.t()
        before = silly.triple(view)
        z = y.mul_(2) if written else y * 2
        return before, silly.triple(view), z + 1

    # add | triple, triple | mul (or mul_), add | triple, or with the last two in one segment; copies = x and y
    program = check(f, lambda _: (torch.rand(3, 3, device=device),), device=device, options=options, copies=2)
    assert program.num_graph_segments >= 2


def test_inputs_are_not_written(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an input that eager does not mutate keeps its value and is not used as a bridge, view or not."""
    compiled, eager = compile_both(lambda x: silly.triple(x + 1) * x, options)
    kept = [torch.rand(4, device=device) for _ in range(6)]
    before = [x.clone() for x in kept]
    with torch.no_grad():
        for x in kept:
            assert_same(compiled(x), eager(x))
    assert_same(kept, before)


def test_views_of_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: inputs that are views of one storage, overlapping, are each read as they are."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return silly.triple(x + y) + x

    def make_args(call: int) -> tuple[Tensor, Tensor]:
        base = torch.rand(10, device=device)
        return base[1:5], base[3:7]

    # copies = x, y, the eager result
    check(f, make_args, device=device, options=options, captured=2, eager=1, copies=3)


def test_views_of_inputs_inside_one_another(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: of two inputs, one a part of the other and both with an offset, each is read as it is."""

    def make_args(call: int) -> tuple[Tensor, Tensor]:
        base = torch.rand(12, device=device)
        return base[2:10], base[4:8]

    # copies = x, y, the eager result
    check(
        lambda x, y: silly.triple(x[4:] + y) * y,
        make_args,
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=3,
    )


def test_inputs_that_overlap_only_at_first(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: inputs that overlapped when the function was compiled and do not later, for which Dynamo has no guard."""
    compiled, eager = compile_both(lambda x, y: silly.triple(x[4:] + y) * y, options)
    with torch.no_grad():
        for call in range(7):
            base = torch.rand(12, device=device)
            x, y = base[2:10], base[4:8] if call == 0 else torch.rand(4, device=device)
            assert_same(compiled(x, y), eager(x, y), f"call {call + 1}")


def test_input_given_twice(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: one tensor as two arguments."""

    def make_args(call: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(4, device=device)
        return x, x

    check(lambda x, y: silly.triple(x + y) + x, make_args, device=device, options=options, captured=2, eager=1)


def test_aliased_inputs_one_mutated(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: writing one of two overlapping inputs is seen through the other."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        z = silly.triple(y + 1)
        x.add_(z[:4])
        return y + z

    def make_args(call: int) -> tuple[Tensor, Tensor]:
        base = torch.rand(10, device=device)
        return base[1:5], base[2:7]

    compiled, eager = compile_both(f, options)
    for call in range(7):
        torch.manual_seed(call)
        mine = make_args(call)
        torch.manual_seed(call)
        theirs = make_args(call)
        with torch.no_grad():
            assert_same(compiled(*mine), eager(*theirs), f"call {call + 1}")
        assert_same(mine, theirs, f"inputs after call {call + 1}")


def test_expanded_and_transposed_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: inputs whose elements share memory, or lie in another order, or have gaps, keep their strides inside."""

    def f(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return silly.triple(x + y) + z, x * 2, y.contiguous() + 1

    def make_args(call: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.rand(1, 4, device=device).expand(4, 4),
            torch.rand(4, 4, device=device).t(),
            torch.rand(4, 8, device=device)[:, ::2],
        )

    check(f, make_args, device=device, options=options, captured=2, eager=1, copies=4)  # three inputs, one eager result


def test_mutated_input(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: an input that eager mutates is mutated once, at the caller's storage, and seen by the next eager step.

    With more addresses than are keyed it gets a bridge and is copied back before the eager step.
    """

    def f(x: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        y = silly.triple(x)
        x.sub_(y)
        return x + y

    compiled, eager = compile_both(f, options)
    kept = []
    for call in range(12):
        mine = torch.full((3,), float(call), device=device)
        theirs = mine.clone()
        with torch.no_grad():
            assert_same(compiled(mine), eager(theirs), f"call {call + 1}")
        assert_same(mine, theirs, f"input after call {call + 1}")
        kept.append(mine)
    program = program_of(compiled)
    assert any("more than 4 addresses" in note for note in program.notes)
    # the 5th address gives the bridge: calls 1-5 plain, call 6 records, calls 7-12 replay
    assert program.replays == 6
    assert program.captures == program.num_graph_segments
    # the bridge is loaded before and stored after each of the two segments that write x; the eager result is copied in
    assert program.recordings[-1].copies_per_call >= 3


def test_constants_of_the_code(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: tensors that the code closes over are read where they are, as they are now."""
    table = torch.rand(4, device=device)

    def f(x: Tensor) -> Tensor:
        return silly.triple(x * table) + table

    compiled, eager = compile_both(f, options)
    with torch.no_grad():
        for call in range(6):
            table.fill_(call)
            x = torch.rand(4, device=device)
            assert_same(compiled(x), eager(x))
    assert program_of(compiled).replays == 4  # 6 - 2


def test_literals_in_the_code(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a tensor made from numbers in the code has its value in every call, although a call may write it."""

    def f(x: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0, 3.0], device=x.device)
        weights.mul_(2)
        return silly.triple(x * weights) + weights

    check(f, lambda _: (torch.rand(3, device=device),), device=device, options=options)


def test_parameters_updated_in_place(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an optimiser's in-place update of parameters is seen by the next call, without a new recording."""
    model = silly.Block(4).to(device)
    compiled, _ = compile_both(model, options)
    with torch.no_grad():
        for _ in range(6):
            x = torch.rand(2, 4, device=device)
            assert_same(compiled(x), model(x))
            for mine, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
                mine.add_(0.5)
                theirs.add_(0.5)
    program = program_of(compiled)
    assert (program.captures, program.replays) == (2, 4)  # two segments, once; 6 - 2


def test_attribute_that_changes(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a Python number that the code reads is guarded by Dynamo: another value is another program or key."""

    class Model(nn.Module):
        scale = 2

        def forward(self, x: Tensor) -> Tensor:
            return silly.triple(x * self.scale) + self.scale

    compiled, eager = compile_both(Model(), options)
    with torch.no_grad():
        for scale in (2, 2, 2, 3, 3, 3, 4, 4, 4, 2):
            compiled._orig_mod.scale = eager.scale = scale
            x = torch.rand(3, device=device)
            assert_same(compiled(x), eager(x))
