"""Training with the default options: captured once a backward was seen, right before that too; and without, if asked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
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


library = torch.library.Library("contract_training", "FRAGMENT")
library.define("doubled(Tensor x) -> Tensor")


@torch.library.impl(library, "doubled", "CompositeExplicitAutograd")
@torch.library.register_fake("contract_training::doubled", lib=library)
def doubled(x: Tensor) -> Tensor:
    """An op without a kernel for autograd."""
    return x * 2


library.define("doubled_(Tensor(a!) x) -> ()")


@torch.library.impl(library, "doubled_", "CompositeExplicitAutograd")
def doubled_(x: Tensor) -> None:
    """The same in place."""
    x.mul_(2)


@torch.library.register_fake("contract_training::doubled_", lib=library)
def _(x: Tensor) -> None:
    return None


class Net(nn.Module):
    """Two linear layers, and a buffer that each call writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.second(nn.functional.dropout(self.first(x).relu(), 0.5, self.training))


def trained(function: Any, module: nn.Module, device: torch.device) -> list[Any]:
    """What five steps of training give."""
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


@pytest.mark.parametrize("training", [True, False], ids=["captured", "not captured"])
def test_training(training: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 6 and 9: training steps equal eager's bit for bit, without a warning; the report tells what is captured."""
    model = Net().to(device)
    reference = copy.deepcopy(model)
    options = options if training else {**options, "training": False}
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = trained(compiled, model, device)
    assert_same(got, trained(reference, reference, device))
    assert not [warning for warning in caught if "breakable_cg" in str(warning.message)]
    report = breakable_backend.explain(compiled)
    if training:
        assert {program.name.split()[0] for program in report.programs} == {"forward", "backward"}
        assert sum(program.replays for program in report.programs) >= 2
    else:
        assert report.programs == ()
        assert "because it needs gradients; call it under torch.no_grad()" in str(report)


@pytest.mark.parametrize("training", [True, False], ids=["captured", "not captured"])
def test_inference_after_training(training: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the same function is captured when it is called without gradients, and reads the trained weights."""
    model = Net().to(device).eval()
    reference = copy.deepcopy(model)
    options = options if training else {**options, "training": False}
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(3):
        x = torch.rand(3, 4, device=device)
        compiled(x).sum().backward()
        reference(x).sum().backward()
        with torch.no_grad():
            for module in (model, reference):
                for parameter in module.parameters():
                    parameter.sub_(parameter.grad)
            for _ in range(4):
                x = torch.rand(3, 4, device=device)
                assert_same(compiled(x), reference(x))
    (program,) = (program for program in breakable_backend.explain(compiled).programs if "ward of" not in program.name)
    assert program.replays == 3 * 4 - 2


def test_input_that_needs_a_gradient(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a gradient of an input alone makes it a training graph."""
    compiled = torch.compile(lambda x: (x.sin() + 1).sum(), backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.rand(3, device=device, requires_grad=True)
        compiled(x).backward()
        assert_same(x.grad, x.detach().cos())
    assert all(program.replays for program in breakable_backend.explain(compiled).programs)


def test_calls_without_a_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: results that nobody runs backward are eager's; one warning, at the user's line, and the report say what to do."""
    model = Net().to(device).eval()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            x = torch.rand(3, 4, device=device)
            assert_same(compiled(x), reference(x))
    (warning,) = [warning for warning in caught if "breakable_cg" in str(warning.message)]
    assert "torch.no_grad()" in str(warning.message)
    assert warning.filename == __file__
    report = breakable_backend.explain(compiled)
    assert report.programs == ()
    assert "no backward has been seen that tells how" in str(report)
    assert "in training it is captured once a call was run backward" in str(report)
    for _ in range(5):
        x = torch.rand(3, 4, device=device)
        compiled(x).sum().backward()
        reference(x).sum().backward()
        assert_same(*([parameter.grad for parameter in module.parameters()] for module in (model, reference)))
    assert all(program.replays for program in breakable_backend.explain(compiled).programs)


def test_many_forwards_before_the_first_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: results that are kept may still be run backward: nothing is said about them."""
    model = Net().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    results = [compiled(torch.rand(3, 4, device=device)) for _ in range(8)]  # a warning is an error in tests
    torch.stack(results).sum().backward()


Function = Callable[[Tensor], Tensor]


@pytest.mark.usefixtures("order_of_gradients")
@pytest.mark.parametrize("training", [True, False], ids=["captured", "not captured"])
def test_second_derivative(training: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a second derivative through a compiled training graph is eager's, in its first call and in later ones."""
    options = options if training else {**options, "training": False}
    compiled = torch.compile(lambda x: (x.sin() * x).sum(), backend="breakable_cg", options=options)

    def second(function: Function, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    for _ in range(4):
        x = torch.rand(3, device=device, requires_grad=True)
        assert_same(second(compiled, x), second(lambda x: (x.sin() * x).sum(), x))
    assert breakable_backend.explain(compiled).programs == ()


def test_detached_results(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: with grad mode on and parameters, but a detached result, nothing needs a gradient and it is captured."""
    model = nn.Linear(4, 4).to(device)
    compiled = torch.compile(lambda x: (model(x) + 1).detach() * 2, backend="breakable_cg", options=options)
    for _ in range(5):
        x = torch.rand(2, 4, device=device)
        assert_same(compiled(x), (model(x) + 1).detach() * 2)
    (program,) = breakable_backend.explain(compiled).programs
    assert program.replays == 3  # 5 - 2


@pytest.mark.filterwarnings(
    "ignore:contract_training..doubled_?. an autograd kernel was not registered"
)  # in eager too
@pytest.mark.parametrize("in_place", [False, True])
def test_ops_without_an_autograd_kernel(in_place: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Their gradients are those of the ops that their kernels call, which no trace shows: such graphs are eager."""

    def function(x: Tensor) -> Tensor:
        y = x.sin()
        if in_place:
            torch.ops.contract_training.doubled_(y)
        else:
            y = torch.ops.contract_training.doubled(y)
        return y.cos()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(4):
        x = torch.rand(3, device=device, requires_grad=True)
        gradients = [torch.autograd.grad(step(x).sum(), x)[0] for step in (compiled, function)]
        assert torch.equal(*gradients)
        with torch.no_grad():
            assert_same(compiled(x), function(x))
    report = breakable_backend.explain(compiled)
    assert [program.replays for program in report.programs] == [2]
    assert "an op without an autograd kernel" in report.eager_graphs[0].why
