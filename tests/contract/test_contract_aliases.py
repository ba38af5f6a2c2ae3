"""Contract lines 4 and 5: results are the caller's to keep, and alias what they alias in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from checks import aliases, assert_same, check, compile_both, program_of


def view_of_input(x: Tensor) -> Any:
    """A view of the input, and the input itself."""
    return (silly.triple(x + 1) + 1), x.view(2, 8), x


def views_of_one_result(x: Tensor) -> Any:
    """Several views of one storage of the pool."""
    y = silly.triple(x + 1).cos() + 1
    return y, y[0], y.t(), y.view(-1)[3:7]


def views_without_their_base(x: Tensor) -> Any:
    """Two views of a storage that is not returned itself."""
    y = x * 2 + silly.triple(x)
    return y[0], y[2:]


def expanded(x: Tensor) -> Any:
    """An expanded result."""
    y = silly.triple(x.sum(0, keepdim=True) + 1) * 2
    return y.expand(5, 4)


def expanded_twice(x: Tensor) -> Any:
    """An expanded result and its base."""
    y = silly.triple(x.sum(0, keepdim=True) + 1) * 2
    return y.expand(5, 4), y


def transposed(x: Tensor) -> Any:
    """A transposed result."""
    return (silly.triple(x) + x).t()


def of_an_in_place_op(x: Tensor) -> Any:
    """What an in-place op returns, and its argument."""
    y = silly.triple(x) + 1
    z = y.mul_(2)
    return y, z


def of_an_in_place_op_on_a_view(x: Tensor) -> Any:
    """What an in-place op on a view returns, and the whole."""
    y = silly.triple(x) + 1
    z = y[1].mul_(2)
    return z, y


def eager_result(x: Tensor) -> Any:
    """The result of an eager step, as it is."""
    return silly.triple(x + 1)


def eager_result_that_a_graph_reads(x: Tensor) -> Any:
    """The result of an eager step, returned and read by a graph."""
    y = silly.triple(x + 1)
    return y, y * 2


def eager_result_that_a_graph_writes(x: Tensor) -> Any:
    """The result of an eager step, returned, and read and written by a graph."""
    y = silly.triple(x + 1)
    z = y * 2
    y.add_(z)
    return y, z, y[0]


def eager_result_that_eager_writes(x: Tensor) -> Any:
    """The result of an eager step, read by a graph, then written by another eager step, then returned."""
    y = silly.triple(x + 1)
    z = y * 2
    silly.add_into(y, z)
    return y, z + 1, y.t()


def same_twice(x: Tensor) -> Any:
    """One tensor as two results."""
    y = silly.triple(x) + 1
    return y, y


def same_result_of_eager_twice(x: Tensor) -> Any:
    """The result of an eager step as two results, and a view of it."""
    y = silly.triple(x)
    return y, y, y.t(), x + 1


def nested(x: Tensor) -> Any:
    """Results in a nest, with what is no tensor."""
    y = silly.triple(x) + 1
    return {"a": y, "b": [y[0], None, 3, "text"], "c": (y.t(), x)}


def detached(x: Tensor) -> Any:
    """Aliases that are no views of a part."""
    y = silly.triple(x) + 1
    return y.detach(), y, y.view_as(y)


def with_gaps(x: Tensor) -> Any:
    """Results with gaps in memory, and with a dimension of no step."""
    y = silly.triple(x) + 1
    return y[:, ::2], y.unsqueeze(1).expand(4, 3, 4)


def view_that_eager_reads_too(x: Tensor) -> Any:
    """A view of a view, read by an eager step, returned beside its base."""
    y = x + x
    row = y[0].expand(4, 4)
    silly.notice(row)
    return row, y


def split(x: Tensor) -> Any:
    """What an op that returns several views returns."""
    y = silly.triple(x) + 1
    first, *_, last = y.unbind(0)
    return first, last, *y.chunk(2, 1)


def real_of_complex(x: Tensor) -> Any:
    """A view of another dtype."""
    y = torch.complex(silly.triple(x) + 1, x)
    return y, torch.view_as_real(y)


def bits_of_float(x: Tensor) -> Any:
    """A view by another dtype of the same size."""
    y = silly.triple(x) + 1
    return y.view(torch.int32), y


def empty(x: Tensor) -> Any:
    """Results without elements."""
    y = silly.triple(x) + 1
    return y[:0], y[:, 4:], x[:0]


FUNCTIONS = [
    view_of_input,
    views_of_one_result,
    views_without_their_base,
    expanded,
    expanded_twice,
    transposed,
    of_an_in_place_op,
    of_an_in_place_op_on_a_view,
    eager_result,
    eager_result_that_a_graph_reads,
    eager_result_that_a_graph_writes,
    eager_result_that_eager_writes,
    same_twice,
    same_result_of_eager_twice,
    nested,
    detached,
    with_gaps,
    view_that_eager_reads_too,
    split,
    real_of_complex,
    bits_of_float,
    empty,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_aliases(function: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 4 and 5: results alias each other and the inputs as in eager, and no later call changes them."""
    program = check(function, lambda _: (torch.rand(4, 4, device=device),), device=device, options=options)
    assert program.num_graph_segments >= 1
    assert program.num_eager_segments >= 1


class Tied(nn.Module):
    """Returns parameters and buffers, and views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.register_buffer("total", torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Any:
        self.total.add_(x)
        y = silly.triple(x @ self.weight) + self.total
        return y, self.weight, self.total, self.total[0], self.weight.t(), self.total.view(-1)


def test_results_that_are_parameters(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: results that are parameters or buffers, or views of them, are so, and go on changing with them."""
    # add_, mm | triple | add; copies = x and the eager result
    check(
        Tied().to(device),
        lambda _: (torch.rand(4, 4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
    )


def test_mutated_input_returned(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: a mutated input that is returned, whole and in part, is the caller's tensor."""

    def f(x: Tensor) -> Any:
        x.add_(1)
        y = silly.triple(x)
        return x, x[0], y * 2

    compiled, eager = compile_both(f, options)
    for call in range(8):  # 5 addresses until there is a bridge, then plain, recording, replay
        mine = torch.full((3, 2), float(call), device=device)
        theirs = mine.clone()
        with torch.no_grad():
            got, want = compiled(mine), eager(theirs)
        assert_same(got, want, f"call {call + 1}")
        pattern = [("x", mine), *((str(i), value) for i, value in enumerate(got))]
        expected = [("x", theirs), *((str(i), value) for i, value in enumerate(want))]
        assert aliases(pattern) == aliases(expected)


def test_caller_writes_a_result(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: what the caller writes into a result changes no later call."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = silly.triple(x + 1)
        return y, y * 2, (x + 1) * 2

    compiled, eager = compile_both(f, options)
    x = torch.rand(4, device=device)
    with torch.no_grad():
        for _ in range(6):
            got = compiled(x)
            assert_same(got, eager(x))
            for tensor in got:
                tensor.fill_(float("nan"))


def test_result_fed_back(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: a result of one call as the input of the next."""
    compiled, eager = compile_both(silly.Silly(), options)
    mine = theirs = torch.rand(4, device=device)
    with torch.no_grad():
        for _ in range(6):
            mine, theirs = compiled(mine), eager(theirs)
            assert_same(mine, theirs)


def test_static_outputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: with ``outputs="static"`` replays return the same memory again, with the values of the call."""
    compiled, eager = compile_both(lambda x: (silly.triple(x + 1) + 1, x * 2), {**options, "outputs": "static"})
    addresses = []
    with torch.no_grad():
        for _ in range(6):
            x = torch.rand(4, device=device)
            got = compiled(x)
            assert_same(got, eager(x))
            addresses.append([tensor.data_ptr() for tensor in got])
    assert addresses[1:] == [addresses[1]] * 5  # the recording call and all replays
    assert program_of(compiled).replays == 4  # 6 - 2


def test_static_outputs_fed_back(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: with ``outputs="static"`` a result may be the next call's input."""
    compiled, eager = compile_both(lambda x: silly.triple(x + 1) - x * 2, {**options, "outputs": "static"})
    mine = theirs = torch.rand(4, device=device)
    with torch.no_grad():
        for _ in range(6):
            mine, theirs = compiled(mine), eager(theirs)
            assert_same(mine, theirs)


@pytest.mark.parametrize("late", [lambda x: x, lambda x: x[1:]], ids=["whole", "view"])
def test_static_outputs_that_are_read_late(
    device: torch.device, options: dict[str, Any], late: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Lines 3 and 4: an eager step behind the segment that makes a static result reads the one of the call before."""
    body = lambda x: (x * 2 + 1, silly.triple(late(x)), (silly.triple(late(x)) + 1).sin())  # noqa: E731
    compiled, eager = compile_both(body, {**options, "outputs": "static"})
    mine = theirs = torch.rand(4, device=device)
    with torch.no_grad():
        for _ in range(7):
            got, want = compiled(mine), eager(theirs)
            assert_same(got, want)
            mine, theirs = got[0], want[0].clone()
    assert program_of(compiled).replays == 5


def test_results_outlive_reset(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 4 and 10: results that the caller holds are unchanged after ``reset``."""
    compiled, eager = compile_both(silly.Silly(), options)
    inputs = [torch.rand(4, device=device) for _ in range(4)]
    with torch.no_grad():
        results = [compiled(x) for x in inputs]
        breakable_backend.reset(compiled)
        junk = [torch.full((4,), -1.0, device=device) for _ in range(50)]
        assert_same(results, [eager(x) for x in inputs])
    del junk
