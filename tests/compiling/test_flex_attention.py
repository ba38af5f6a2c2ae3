"""``flex_attention`` in compiled code: a higher-order op with bodies of the user's, eager, and run as traced for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import breakable_backend
import silly
from breakable_backend import explain
from checks import check

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),  # the reference is eager
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # Dynamo looks at all
]
HEADS, LENGTH, WIDTH = 2, 128, 16
Function = Callable[..., Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return flex_attention(q * 2, k, v).sin() + bias.sum()


def scored(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The score's function reads a tensor from outside."""
    return flex_attention(q * 2, k, v, score_mod=lambda score, b, h, i, j: score * 0.5 + bias[h]).sin() + 1


def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, LENGTH, LENGTH, device=q.device)
    return flex_attention(q + bias.sum(), k, v, block_mask=mask, enable_gqa=True).sin() + 1


def both_results(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The logarithms of the sums are a second result."""
    out, aux = flex_attention(
        q, k, v * 2, score_mod=lambda score, b, h, i, j: score - bias[h], return_aux=AuxRequest(lse=True)
    )
    return out.sin() * aux.lse.unsqueeze(-1)


def between_breaks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return silly.triple(scored(silly.triple(q.sin()), k, v, bias)) * 2


FUNCTIONS = [plain, scored, masked, both_results, between_breaks]
on_each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def arguments(device: torch.device, *, grad: bool = False) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(1, HEADS, LENGTH, WIDTH, device=device, requires_grad=grad) for _ in range(3))
    return q, k, v, torch.randn(HEADS, device=device, requires_grad=grad)


@on_each_function
def test_between_segments(function: Function, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 3: without gradients it is an eager step, which copies numbers from the host, and all around is captured."""
    steps = 3 if function is between_breaks else 1
    program = check(function, lambda _: arguments(device), device=device, options=options, eager=steps)
    assert program.num_graph_segments >= 1
    (why,) = (reason.text for reason in program.reasons if "flex_attention" in reason.op)
    assert why == "copies numbers from the host while it runs uncompiled"


@on_each_function
def test_gradients(function: Function, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 2: with gradients it runs as it was traced: results and gradients are eager's, or the refusal is."""
    function = scored if function is between_breaks else function  # the op of that one has no gradient
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(4):
        args = arguments(device, grad=True)
        if device.type == "cpu":  # torch's own limit, at each door
            for refused in (function, compiled):
                with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
                    refused(*args)
            continue
        want, got = function(*args), compiled(*args)
        assert torch.equal(got, want)
        theirs, mine = (torch.autograd.grad(result.square().sum(), args) for result in (want, got))
        assert [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)] == [True] * 4
    report = explain(compiled)
    assert not any("flex_attention" in program.text for program in report.programs)  # the mask has a graph of its own
    assert all("it needs gradients" in graph.why for graph in report.eager_graphs)
    assert report.eager_graphs or device.type == "cpu"
    breakable_backend.reset(compiled)
