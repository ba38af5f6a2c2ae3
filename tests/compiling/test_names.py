"""Inputs have the names that the user's code has for them, in programs, sources, notes and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import silly
from breakable_backend.calling.registry import executors_of

TAPE = {"driver": "tape"}
TABLE = torch.ones(4)


def names(compiled: Callable[..., Any]) -> list[list[str]]:
    """The names of the inputs of each program."""
    return [[value.name for value in executor.program.inputs] for executor in executors_of(compiled)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.register_buffer("cache", torch.zeros(4))

    def forward(self, x: Tensor, batch: dict[str, Any], pair: tuple[int, Tensor]) -> Tensor:
        return self.layers(x).sin() + self.cache + batch["ids"][0] * pair[1] + TABLE


def test_names_of_inputs() -> None:
    """Parameters, buffers, arguments, what lies in them, and globals."""
    compiled = torch.compile(Model(), backend="breakable_cg", options=TAPE)
    ones = [torch.ones(4) for _ in range(3)]
    with torch.no_grad():
        compiled(ones[0], {"ids": ones[1:2]}, (1, ones[2]))
    (found,) = names(compiled)
    assert sorted(found) == [
        "TABLE",
        "batch_ids_0",
        "pair_1",
        "self_cache",
        "self_layers_0_bias",
        "self_layers_0_weight",
        "self_layers_1_bias",
        "self_layers_1_weight",
        "x",
    ]


def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    @passing_on
    def forward(self, ids: Tensor, positions: Tensor, *, mask: Tensor, **more: Tensor) -> Tensor:
        return (ids + positions).sin() * mask + more["scale"]


def test_names_behind_a_decorator() -> None:
    """A wrapper that takes *args and **kwargs hides no names: inputs have those that a caller knows, as in transformers."""
    compiled = torch.compile(Decorated(), backend="breakable_cg", options=TAPE)
    ids, positions, mask, scale = (torch.rand(4) for _ in range(4))
    compiled(ids, positions=positions, mask=mask, scale=scale)
    assert sorted(names(compiled)[0]) == ["ids", "mask", "positions", "scale"]
    compiled(ids, positions, mask=mask, scale=scale)
    assert sorted(names(compiled)[1]) == ["ids", "mask", "positions", "scale"]


def test_names_of_torchs_own_modules() -> None:
    """Dynamo wraps what torch itself defines, and its wrapper hides no names either."""
    compiled = torch.compile(nn.Linear(4, 4), backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        compiled(torch.rand(2, 4))
    assert sorted(names(compiled)[0]) == ["input_1", "self_bias", "self_weight"]  # fx keeps the names of builtins


def test_a_dict_called_kwargs() -> None:
    """An argument that only has such a name is named as it is."""
    compiled = torch.compile(lambda kwargs: kwargs["x"].sin(), backend="breakable_cg", options=TAPE)
    compiled({"x": torch.rand(4)})
    assert names(compiled) == [["kwargs_x"]]


def test_numbers() -> None:
    """Sizes and floats that vary have names too."""

    def f(x: Tensor, scale: float, count: int) -> Tensor:
        return x.sin() * scale + count

    compiled = torch.compile(f, backend="breakable_cg", options=TAPE, dynamic=True)
    for number in range(2, 5):
        x = torch.rand(number + 1)
        assert torch.equal(compiled(x, number / 4, number), f(x, number / 4, number))
    assert sorted(names(compiled)[-1]) == ["count", "scale", "x", "x_size_0"]


def test_both_halves_of_training() -> None:
    """The backward has the names of the inputs that it takes."""
    weight = torch.rand(4, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return (x * weight).sin() * x

    compiled = torch.compile(f, backend="breakable_cg", options=TAPE)
    for _ in range(4):
        compiled(torch.rand(4)).sum().backward()
    forward, backward = names(compiled)
    assert sorted(forward) == ["weight", "x"]
    assert "x" in backward


@pytest.mark.parametrize("varies", [False, True])
def test_names_that_generated_code_has_taken(varies: bool) -> None:
    """An argument may be called as an op is, as a name in the generated functions, or as a module."""

    def f(args: Tensor, stream: Tensor, fits: Tensor, sin: Tensor, clear: Tensor, torch: Tensor) -> Tensor:
        return silly.triple(args.sin() + stream) * fits + sin * clear - torch.add_(1).cos()

    compiled = torch.compile(f, backend="breakable_cg", options=TAPE, dynamic=varies or None)
    for number in range(4):
        given = [torch.rand(4 + number * varies) for _ in range(6)]
        copies = [value.clone() for value in given]
        assert torch.equal(compiled(*given), f(*copies))
        assert torch.equal(given[5], copies[5])
    (found,) = names(compiled)
    assert {"args", "stream", "fits"} <= set(found)


def test_parts_of_subclasses() -> None:
    """Tensors inside of a subclass have its name, and that of the attribute."""
    whole = torch.nested.nested_tensor([torch.rand(2, 4), torch.rand(3, 4)], layout=torch.jagged)
    compiled = torch.compile(lambda whole: (whole.sin() * 2).values() + 1, backend="breakable_cg", options=TAPE)
    with torch.no_grad():
        compiled(whole)
    (found,) = names(compiled)
    assert {"whole__values", "whole__offsets"} <= set(found)
