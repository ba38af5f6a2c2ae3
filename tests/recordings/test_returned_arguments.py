"""Ops that return an argument although their schema says that the result is new, where something writes one of the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import capture, explain
from breakable_backend._torch import twin_storage
from breakable_backend.ir.layout import Geometry
from checks import assert_same, compile_both

pytestmark = pytest.mark.usefixtures("no_grad")

library = torch.library.Library("handed", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], **tags: Any) -> None:
    name = schema.partition("(")[0]
    library.define(schema, **tags)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"handed::{name}", fake, lib=library)


define("back(Tensor x) -> Tensor", lambda x: x, torch.empty_like)
define("marked(Tensor x) -> Tensor", lambda x: x, torch.empty_like, tags=silly.UNSAFE)
define("view(Tensor x) -> Tensor", lambda x: x[1:], lambda x: torch.empty_like(x[1:]))
define("pair(Tensor x) -> (Tensor, Tensor)", lambda x: (x * 2, x), lambda x: (torch.empty_like(x), torch.empty_like(x)))
define(
    "twice(Tensor x) -> (Tensor, Tensor)",
    lambda x: (x * 2,) * 2,
    lambda x: (torch.empty_like(x), torch.empty_like(x)),
    tags=silly.UNSAFE,
)
define("all(Tensor[] x) -> Tensor[]", lambda x: list(x), lambda x: [torch.empty_like(t) for t in x])
define(
    "over(Tensor x) -> Tensor",
    lambda x: Geometry.of(x).on(twin_storage(x.untyped_storage())),
    torch.empty_like,
    tags=silly.UNSAFE,
)
define("new(Tensor x) -> Tensor", lambda x: x * 1, torch.empty_like)
define("when(Tensor x) -> Tensor", lambda x: x.contiguous(), lambda x: torch.empty_like(x.contiguous()))
ops = torch.ops.handed


def an_input(x: Tensor) -> Any:
    y = ops.back(x)
    y.add_(1)
    return y * 2


def an_intermediate(x: Tensor) -> Any:
    y = x.sin()
    z = ops.marked(y)
    z.add_(1)
    return y * 2, z


def the_argument(x: Tensor) -> Any:
    y = x.sin()
    z = ops.marked(y)
    y.mul_(3)
    return z.cos()


def a_view(x: Tensor) -> Any:
    y = x.sin()
    z = ops.view(silly.triple(y))
    z.neg_()
    return y, z * 1


def through_two(x: Tensor) -> Any:
    y = x.cos()
    z = ops.marked(ops.back(y))
    y.add_(1)
    return z * 1


def one_of_two(x: Tensor) -> Any:
    y = x.cos()
    made, same = ops.pair(y)
    u = silly.triple(made)
    same.add_(1)
    return y * u


def two_results(x: Tensor) -> Any:
    a, b = ops.twice(x)
    a.add_(1)
    return b * 2


def a_list(x: Tensor) -> Any:
    y = ops.all([x.sin(), x])[1]
    y.add_(1)
    return silly.triple(x) * 2


def by_an_eager_step(x: Tensor) -> Any:
    y = x.sin()
    z = ops.marked(y)
    u = z.cos()
    silly.add_into(z, x)
    return y + u


def over_the_same_memory(x: Tensor) -> Any:
    y = x.sin()
    z = ops.over(y)
    z.add_(1)
    return y * 2


WRITTEN = [
    an_input,
    an_intermediate,
    the_argument,
    a_view,
    through_two,
    one_of_two,
    two_results,
    a_list,
    by_an_eager_step,
    over_the_same_memory,
]


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_a_write_reaches_both(function: Callable[..., Any], device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: what an op hands back against its schema is the argument, also for who writes; the program is eager, and says so."""
    compiled, eager = compile_both(function, options)
    for call in range(5):
        x = torch.rand(4, device=device)
        mine, theirs = x.clone(), x.clone()
        assert_same(compiled(mine), eager(theirs), f"call {call + 1}")
        assert_same(mine, theirs, f"call {call + 1}: the argument")
    (program,) = explain(compiled).programs
    assert {reason.rule for reason in program.reasons} == {"hands_back"}
    assert "although its schema promises a new one" in program.reasons[0].text
    assert program.num_graph_segments == 0


def read_alone(x: Tensor) -> Any:
    y = x.sin()
    z = ops.marked(y)
    return y * 2, z * 3


def written_before(x: Tensor) -> Any:
    y = x.sin()
    y.add_(1)
    return y * 2, ops.back(y) * 3


def another_is_written(x: Tensor) -> Any:
    y = ops.marked(x.sin())
    z = x.cos()
    z.add_(1)
    return y * z


def a_new_result(x: Tensor) -> Any:
    y = x.sin()
    z = ops.new(y)
    z.add_(1)
    return y * z


@pytest.mark.parametrize(
    "function", [read_alone, written_before, another_is_written, a_new_result], ids=lambda f: f.__name__
)
def test_captured_where_it_does_not_matter(
    function: Callable[..., Any], device: torch.device, options: dict[str, Any]
) -> None:
    """Line 4: where nothing writes the one or the other behind the op, or the result is new, the program is captured."""
    compiled, eager = compile_both(function, options)
    for call in range(5):
        x = torch.rand(4, device=device)
        assert_same(compiled(x), eager(x), f"call {call + 1}")
    (program,) = explain(compiled).programs
    assert program.num_graph_segments > 0
    assert program.replays > 0


@pytest.mark.parametrize("auto_break", [True, False])
def test_found_for_a_key_that_comes_later(auto_break: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: an op that hands its argument back for some layouts alone is found in the plain call of such a key."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        z = ops.when(y)
        z.add_(1)
        return y * 1

    compiled, eager = compile_both(f, {**options, "auto_break": auto_break}, dynamic=True)
    for call in range(8):
        x = torch.rand(4, 6, device=device)
        x = x.t() if call < 4 else x
        assert_same(compiled(x), eager(x), f"call {call + 1}")


def test_said_under_capture(device: torch.device, make: Callable[..., Any]) -> None:
    """Line 4: by the second door what an op hands back is the argument itself, and a write reaches both."""
    graph, x = make(), torch.rand(4, device=device)
    with capture(graph):
        y = x.sin()
        z = ops.marked(y)
        z.add_(1)
        w = y * 2
    for _ in range(3):
        x.copy_(torch.rand(4, device=device))
        graph.replay()
        assert_same(w, (x.sin() + 1) * 2)
