"""Graphs that need gradients run eagerly, say so once, and give right gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
from checks import assert_same


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    """Each test hears the warning, which is given once in a process."""
    breakable_backend.breakable_cg._warned.clear()


class Net(nn.Module):
    """Two linear layers, and a buffer that each call writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.second(nn.functional.dropout(self.first(x).relu(), 0.5, self.training))


def test_training(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 6 and 9: training steps equal eager's bit for bit; one warning names ``torch.no_grad()``."""
    model = Net().to(device)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="breakable_cg", options=options)

    def train(function: Any, module: nn.Module) -> list[Any]:
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found: list[Any] = []
        for _ in range(5):
            loss = function(torch.rand(3, 4, device=device)).square().sum()
            loss.backward()
            found += [loss.detach().clone(), *(parameter.grad.clone() for parameter in module.parameters())]
            optimizer.step()
            optimizer.zero_grad()
        return [*found, module.calls.clone(), torch.get_rng_state()]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(compiled, model)
    assert_same(got, train(reference, reference))
    texts = [str(warning.message) for warning in caught if "breakable_cg" in str(warning.message)]
    assert len(texts) == 1
    assert "torch.no_grad()" in texts[0]
    report = breakable_backend.explain(compiled)
    assert report.programs == ()
    assert len(report.eager_graphs) >= 1  # Dynamo compiles anew once parameters have a gradient
    assert "because it needs gradients" in str(report)


def test_inference_after_training(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the same function is captured when it is called without gradients, and reads the trained weights."""
    model = Net().to(device).eval()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(3):
        x = torch.rand(3, 4, device=device)
        with (
            pytest.warns(UserWarning, match="no_grad")
            if not breakable_backend.breakable_cg._warned
            else warnings.catch_warnings()
        ):
            compiled(x).sum().backward()
        reference(x).sum().backward()
        with torch.no_grad():
            for module in (model, reference):
                for parameter in module.parameters():
                    parameter.sub_(parameter.grad)
            for _ in range(4):
                x = torch.rand(3, 4, device=device)
                assert_same(compiled(x), reference(x))
    (program,) = breakable_backend.explain(compiled).programs
    assert program.replays == 3 * 4 - 2


def test_input_that_needs_a_gradient(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a gradient of an input alone makes it a training graph."""
    compiled = torch.compile(lambda x: (x.sin() + 1).sum(), backend="breakable_cg", options=options)
    x = torch.rand(3, device=device, requires_grad=True)
    with pytest.warns(UserWarning, match="no_grad") as warned:
        compiled(x).backward()
    assert_same(x.grad, x.detach().cos())
    assert {record.filename for record in warned} == {__file__}, "at the user's line"


@pytest.mark.usefixtures("order_of_gradients")
def test_second_derivative(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a second derivative through a compiled training graph is eager's."""
    compiled = torch.compile(lambda x: (x.sin() * x).sum(), backend="breakable_cg", options=options)
    x = torch.rand(3, device=device, requires_grad=True)

    def second(function: Any) -> Tensor:
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    with pytest.warns(UserWarning, match="no_grad"):
        got = second(compiled)
    assert_same(got, second(lambda x: (x.sin() * x).sum()))


def test_detached_results(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: with grad mode on and parameters, but a detached result, nothing needs a gradient and it is captured."""
    model = nn.Linear(4, 4).to(device)
    compiled = torch.compile(lambda x: (model(x) + 1).detach() * 2, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.rand(2, 4, device=device)
        assert_same(compiled(x), (model(x) + 1).detach() * 2)
    (program,) = breakable_backend.explain(compiled).programs
    assert program.replays == 3  # 5 - 2
