"""Graphs that need gradients, captured: results, gradients, draws and buffers as eager gives them, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import breakable_backend
import fresh
from breakable_backend import DivergenceError, EagerOutputError, ReplayError, _torch, eager_on_graph, eager_region
from breakable_backend.backend import breakable_cg, executors_of
from breakable_backend.calling.compiled_graph import REFILLED
from breakable_backend.calling.slots import MAX_SLOTS, ForwardExecutor
from breakable_backend.calling.training import MAX_PATTERNS
from breakable_backend.calling.training_by_size import MAX_SIZES
from breakable_backend.compiling.halves import Halves
from breakable_backend.compiling.lowering import CannotLower
from breakable_backend.drivers.cuda import CudaDriver
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.marks.saved_for_backward import nothing_like
from checks import assert_same, random_states, refill
from gpu import soon


@pytest.fixture
def options(device: torch.device) -> dict[str, Any]:
    """The options of every compiled function here."""
    return {"driver": "cuda" if device.type == "cuda" else "tape"}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Some backward kernels add in an order of their own, unless they are told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Block(nn.Module):
    """A block of a transformer, with dropout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.drop(self.out((scores @ v).transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.between(x)))))


class Gpt(nn.Module):
    """Tokens in, loss and logits out; batch norm between, which writes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(16, 20)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, 20), targets.view(-1)), logits


class Mlp(nn.Module):
    """Two linear layers with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x).relu(), 0.5, self.training))


Step = Callable[[Any, nn.Module], Any]


def state_of(module: nn.Module) -> list[Any]:
    """What training changes of a module: copies."""
    found: list[Any] = []
    for tensor in (*module.parameters(), *module.buffers()):
        found += [tensor.detach().clone(), None if tensor.grad is None else tensor.grad.clone()]
    return found


def trained(function: Any, module: nn.Module, step: Step, steps: int) -> list[Any]:
    """What ``step(function, module)`` returned, and left in ``module``, time after time."""
    torch.manual_seed(3)
    found: list[Any] = []
    for _ in range(steps):
        found += [step(function, module), state_of(module)]
    device = next(module.parameters()).device
    return [*found, torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()]


def assert_trains(
    model: nn.Module, step: Step, device: torch.device, options: dict[str, Any], steps: int = 8, **kwargs: Any
) -> list[breakable_backend.tools.report.ProgramReport]:
    """``step`` does to a compiled copy of ``model`` what it does to another in eager. Returns the programs."""
    torch.manual_seed(0)
    model = model.to(device)
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(mine, backend="breakable_cg", options=options, **kwargs)
    got = trained(compiled, mine, step, steps)
    want = trained(theirs, theirs, step, steps)
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_same(one, other, f"part {number}")
    return list(breakable_backend.explain(compiled).programs)


def assert_replays(programs: Any, at_least: int) -> None:
    """Both halves were replayed."""
    halves = {program.name.split()[0]: program for program in programs if program.replays}
    assert set(halves) >= {"forward", "backward"}, [str(program) for program in programs]
    assert all(halves[half].replays >= at_least for half in ("forward", "backward")), halves


def descend(module: nn.Module) -> None:
    """One step of gradient descent."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)


def mlp_step(device: torch.device) -> Step:
    """A forward, a backward, and a descent."""

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        loss = function(torch.rand(3, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    return step


# --- steps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_transformer_trains(kind: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 5 and 6: loss, logits, gradients, weights, buffers and draws of 20 steps are eager's, from replays."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step(function: Any, module: nn.Module) -> Any:
        if id(module) not in optimizers:
            optimizers[id(module)] = getattr(torch.optim, kind)(module.parameters(), lr=0.01)
        tokens = torch.randint(0, 20, (2, 6), device=device)
        loss, logits = function(tokens, tokens.roll(1, 1))
        loss.backward()
        optimizers[id(module)].step()
        optimizers[id(module)].zero_grad()
        return loss.detach(), logits.detach()

    assert_replays(assert_trains(Gpt(), step, device, options, 20), 14)


def test_an_mlp_trains(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: a loss that is computed outside sends its gradient in."""
    assert_replays(assert_trains(Mlp(), mlp_step(device), device, options), 3)


def test_batch_norm_and_convolution(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: buffers that the forward writes are written once, in channels-last too."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * 16, 2)).to(memory_format=torch.channels_last)

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        loss = function(torch.rand(2, 3, 8, 8, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(model, step, device, options), 3)


def test_gradients_come_in_as_they_are(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a gradient that is expanded, transposed or has gaps is what the backward is traced for."""

    def step(function: Any, module: nn.Module) -> None:
        module.zero_grad()
        for ends in (
            lambda y: y.sum(),
            lambda y: (y * torch.arange(12.0, device=device).view(4, 3).t()).sum(),
            lambda y: y[:, ::2].square().sum(),
        ):
            ends(function(torch.rand(3, 4, device=device))).backward()
        descend(module)

    assert_replays(assert_trains(Mlp(), step, device, options, 8), 3)


def test_outputs_without_a_gradient(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: what hangs on an unused output alone gets no gradient, in whatever order outputs are used."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.other, self.unused = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.body(x).tanh()
            return self.one(x), self.other(x)

    turns = iter([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1] * 2)

    def step(function: Any, module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        one, other = function(torch.rand(3, 4, device=device))
        turn = next(turns)
        (one if turn == 0 else other if turn == 1 else one + other).square().sum().backward()
        descend(module)

    assert_replays(assert_trains(Heads(), step, device, options, 12), 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_gradients_of_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: leaves and results of other code get their gradients, by backward and by ``torch.autograd.grad``."""

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        x = torch.rand(3, 4, device=device, requires_grad=True)
        loss = function(x.exp()).square().sum()
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        return grad, x.grad

    assert_replays(assert_trains(Mlp(), step, device, options), 3)


def test_one_gradient_of_two_inputs(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: a gradient that two inputs get is no one memory: writing one ``.grad`` leaves the other alone."""
    compiled = torch.compile(lambda a, b, w: (a + b.view(4)) * 2 + w.exp() * 0, backend="breakable_cg", options=options)
    for _ in range(5):
        a, b, w = (torch.rand(shape, device=device, requires_grad=True) for shape in (4, (2, 2), 4))
        compiled(a, b, w).sum().backward()
        a.grad.zero_()
        assert_same(b.grad, torch.full((2, 2), 2.0, device=device))


# --- slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_pending(order: tuple[int, int], device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: each backward finds what its own forward saved, in whatever order they run."""

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        losses = [function(torch.rand(3, 4, device=device)).square().sum() for _ in order]
        for place in order:
            losses[place].backward()
        descend(module)
        return [loss.detach() for loss in losses]

    assert_replays(assert_trains(Mlp(), step, device, options, 10), 8)


def test_a_contrastive_pair(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: one loss of two forwards of one model."""

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        one, other = (function(torch.rand(3, 4, device=device)) for _ in range(2))
        loss = F.cross_entropy(one @ other.t(), torch.arange(3, device=device))
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(Mlp(), step, device, options, 10), 8)


def test_more_forwards_pending_than_slots(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: beyond the slots a forward runs plainly, the report says why, and its gradients are right."""

    def step(function: Any, module: nn.Module) -> None:
        module.zero_grad()
        losses = [function(torch.rand(3, 4, device=device)).square().sum() for _ in range(MAX_SLOTS + 2)]
        for loss in losses:
            loss.backward()
        descend(module)

    programs = assert_trains(Mlp(), step, device, options, 6)
    assert_replays(programs, 8)
    (forward,) = [program for program in programs if program.name.startswith("forward")]
    assert forward.plain_calls[f"{MAX_SLOTS} forwards are pending, one in each slot"] >= 2
    assert len(forward.recordings) == MAX_SLOTS


def test_accumulated_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 4: gradients add up over micro batches, and a kept ``.grad`` is nobody else's memory."""

    def step(function: Any, module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        seen = []
        for _ in range(4):
            function(torch.rand(3, 4, device=device)).square().mean().backward()
            seen.append(next(module.parameters()).grad.clone())
        descend(module)
        return seen

    assert_replays(assert_trains(Mlp(), step, device, options, 6), 12)


def test_gradients_are_fresh(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: with ``outputs="static"`` too a gradient is the caller's, and later steps leave it alone."""

    def function(x: Tensor) -> Tensor:
        return (x.sin() * 2).exp()

    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(function, device, {**options, "outputs": "static"}, x)
    found: dict[Any, list[Tensor]] = {compiled: [], function: []}
    for number in range(3):
        for called, gradients in found.items():
            gradients += torch.autograd.grad(called(x).sum() * number, x)
    assert_same(found[compiled], found[function])


def test_a_retained_graph(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a graph that is retained is run backward again after other forwards, and once more is an error."""

    def step(function: Any, module: nn.Module) -> None:
        module.zero_grad()
        first = function(torch.rand(3, 4, device=device)).square().sum()
        first.backward(retain_graph=True)
        for _ in range(2):
            function(torch.rand(3, 4, device=device)).square().sum().backward()
        first.backward()
        with pytest.raises(RuntimeError, match="second time"):
            first.backward()
        descend(module)

    assert_replays(assert_trains(Mlp(), step, device, options, 6), 8)


def test_a_forward_that_is_never_run_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a result that is dropped, and one that is kept, cost no later step its gradients."""
    kept: list[Tensor] = []
    turns = itertools.cycle(range(12))

    def step(function: Any, module: nn.Module) -> Tensor:
        function(torch.rand(3, 4, device=device))
        if (turn := next(turns)) in (3, 7):
            kept.append(function(torch.rand(3, 4, device=device)))
        elif turn == 10:
            kept.clear()
        return mlp_step(device)(function, module)

    assert_replays(assert_trains(Mlp(), step, device, options, 12), 4)


def test_inference_between_forward_and_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: validation, in the middle of a step too, leaves what is saved alone, and reads the weights of its time."""

    def step(function: Any, module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        loss = function(torch.rand(3, 4, device=device)).square().sum()
        with torch.no_grad():
            seen = [function(torch.rand(3, 4, device=device))]
        with torch.inference_mode():
            seen.append(function(torch.rand(3, 4, device=device)).clone())
        loss.backward()
        descend(module)
        module.eval()
        with torch.no_grad():
            seen.append(function(torch.rand(3, 4, device=device)))
        module.train()
        return [value.detach().clone() for value in seen]

    assert_replays(assert_trains(Mlp(), step, device, options, 10), 5)


def test_the_first_slot_warms_up_for_all(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a forward, and a backward, is plain once after the one that learns, however many slots there are."""
    model = Mlp().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(7):
        found = []
        for function in (compiled, model):
            torch.manual_seed(3)
            model.zero_grad()
            losses = [function(torch.rand(3, 4, device=device)).square().mean() for _ in range(4)]
            for loss in losses:
                loss.backward()
            found.append([*losses, *state_of(model)])
        assert_same(*found)
    forward, backward, *others = breakable_backend.explain(compiled).programs
    assert not [program for program in others if program.calls]
    assert forward.plain_calls == {"warm-up": 1}
    assert backward.plain_calls == {"warm-up": 1, "its forward ran plainly": 1}, backward.plain_calls
    assert len(backward.recordings) == len(forward.recordings) == 4


def test_slots_are_free_after_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: a loss that the caller still has takes no slot once it was run backward; one slot serves a usual loop."""
    model = Mlp().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(6):
        loss = compiled(torch.rand(3, 4, device=device)).square().sum()
        loss.backward()
    (forward,) = [executor for executor in executors_of(compiled) if isinstance(executor, ForwardExecutor)]
    assert forward.pending() == 0
    (recording,) = [key for key in forward.snapshot().keys if key.recording is not None]
    assert recording.replays == 3  # 6 calls: eager, warm-up, recorded
    loss = compiled(torch.rand(3, 4, device=device))
    assert forward.pending() == 1
    del loss
    gc.collect()
    assert forward.pending() == 0


def test_reset_between_forward_and_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 10: what a forward saved outlives a reset, and its backward is right."""

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        losses = [function(torch.rand(3, 4, device=device)).square().sum() for _ in range(2)]
        if function is not module:
            breakable_backend.reset(function)
        others = [torch.rand(64, 64, device=device) for _ in range(8)]
        for loss in losses:
            loss.backward()
        descend(module)
        return others[0] * 0

    assert_trains(Mlp(), step, device, options, 6)


# --- eager's errors ---------------------------------------------------------------------------------------------------------


def warmed_up(function: Callable[..., Tensor], device: torch.device, options: dict[str, Any], *args: Any) -> Any:
    """``function`` compiled, and both its halves replayed."""
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(5):
        compiled(*args).sum().backward()
    assert_replays(breakable_backend.explain(compiled).programs, 1)
    return compiled


def test_what_was_written_since(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a weight, an input or a result that the backward needs, and that was written since, is eager's error."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)
    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(lambda x: (x @ weight).exp(), device, options, x)
    for spoil in (
        lambda _: weight.detach().mul_(2) if False else weight.data.add_(0) if False else _bump(weight),
        lambda _: _bump(x),
        lambda y: y.detach().mul_(2),
    ):
        y = compiled(x)
        spoil(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    weight.grad = x.grad = None
    compiled(x).sum().backward()
    want = [tensor.grad.clone() for tensor in (weight, x)]
    weight.grad = x.grad = None
    (x @ weight).exp().sum().backward()
    assert_same(want, [weight.grad, x.grad])


def _bump(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1)


def test_what_was_written_for_another_result(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: what this backward does not read may be written, and weights get other memory; what it reads is eager's error."""

    def written(module: nn.Module, what: str, y: Tensor) -> None:
        if what == "memory":
            module.right.weight.data = module.right.weight.detach().clone()
        elif what == "result":
            y.detach().mul_(2)
        elif what:
            _bump(getattr(module, what).weight)

    def step_of(before: str, between: str, kept: bool) -> Step:
        def step(function: Any, module: nn.Module) -> Any:
            module.zero_grad()
            x = torch.rand(3, 4, device=device, requires_grad=True)
            left, right = function(x)
            written(module, before, right)
            left.sum().backward(retain_graph=kept)
            if kept:
                descend(module)  # the weights of the other part have no gradient
                written(module, between, left)
                right.square().sum().backward()
            return left.detach(), x.grad

        return step

    for before, between, kept in (
        ("", "left", True),
        ("", "result", True),
        ("right", "", False),
        ("memory", "", False),
        ("result", "", False),
    ):
        programs = assert_trains(Halved(), step_of(before, between, kept), device, options)
        assert sum(program.replays for program in programs if "for result 1" in program.name) >= 2 * kept, programs
        if before != "memory":  # else it never has an address twice
            assert_replays(programs, 2)
    module = Halved().to(device)
    compiled = torch.compile(module, backend="breakable_cg", options=options)
    for _ in range(4):
        step_of("", "left", True)(compiled, module)
    for before, between in (("", "right"), ("left", ""), ("", "memory")):
        error = (ReplayError, "given other memory") if between == "memory" else (RuntimeError, "inplace operation")
        with pytest.raises(error[0], match=error[1]):
            step_of(before, between, True)(compiled, module)


def test_results_may_be_written(device: torch.device, options: dict[str, Any]) -> None:
    """Line 4: a result that no backward needs is written in place, and differentiated, as in eager."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)
    x = torch.rand(3, 4, device=device)
    compiled = warmed_up(lambda x: (x.tanh() @ weight * 2).view(2, 6), device, options, x)

    def gradient(function: Any) -> Tensor:
        weight.grad = None
        y = function(x)
        y.mul_(3)
        y.square().sum().backward()
        return weight.grad

    assert_same(gradient(compiled), gradient(lambda x: (x.tanh() @ weight * 2).view(2, 6)))


# --- marks ------------------------------------------------------------------------------------------------------------------


def test_marked_functions_in_both_halves(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 2: a marked function runs once in a forward, its backward once in a backward, on the values of its call."""
    calls: list[str] = []

    @eager_on_graph
    def attend(x: Tensor, weight: Tensor) -> Tensor:
        calls.append("forward")
        y = (x @ weight).softmax(-1)
        if y.requires_grad:
            y.register_hook(lambda _: calls.append("backward"))
        return y

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.rand(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(attend(self.first(x).tanh() + 1, self.weight).exp() * 2)

    counted: list[list[str]] = []

    def step(function: Any, module: nn.Module) -> Any:
        calls.clear()
        result = mlp_step(device)(function, module)
        counted.append([call for call in calls if call])
        return result

    programs = assert_trains(Marked(), step, device, options, 10)
    assert_replays(programs, 4)
    assert counted[4:10] == counted[14:]
    assert all("marked" in str(program.reasons) for program in programs if program.replays)


def test_a_marked_function_that_gives_no_gradient(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an argument of a marked function that gets no gradient in eager gets none, not zeros, and the report says why."""

    @eager_on_graph
    def first(x: Tensor, _unused: Tensor) -> Tensor:
        return x * 2

    class Unused(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.rand(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(first(self.first(x).relu(), self.unused.exp()))

    assert_trains(Unused(), mlp_step(device), device, options)


TAKEN: dict[str, Callable[[int], tuple[bool, bool, bool]]] = {
    "at first": lambda step: (step > 3, step > 3, step % 2 == 0),
    "at last": lambda step: (step < 6 or step % 4 > 1, step < 9 or step % 3 == 0, step < 5),
    "none or all": lambda step: (step % 2 == 0,) * 3,
}
"""On which of their arguments the marked functions depend in a step."""


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize(
    ("how", "taken"),
    [*(("once", when) for when in TAKEN), *((how, "at last") for how in ("sizes", "compare", "retained", "pending"))],
)
def test_layers_without_a_gradient(how: str, taken: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 3: where a marked function takes no notice of an argument, nothing before it has a gradient or runs backward.

    That is captured. Captured code computes the arguments, one of them from another marked function.
    """
    now, ran = [True, True, True], list[str]()

    @eager_on_graph(backward=lambda context, grad: (ran.append("scaled"), grad * context.args[0].cos())[1])
    def scaled(x: Tensor) -> Tensor:
        return x.sin()

    @eager_on_graph
    def chosen(x: Tensor, y: Tensor, always: Tensor) -> Tensor:
        result = (x if now[0] else x.detach()) * always
        return result * y if now[1] else result

    @eager_on_graph
    def split(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 3, y * 2 if now[2] else torch.ones_like(y)

    class Layers(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.other = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
            self.always, self.between = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)
            self.outside = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.between(scaled(self.first(x).relu()).exp())
            x, other = split(chosen(x + 1, self.expert.exp(), self.always) * 2, self.other.exp() * 3)
            return self.second(x + self.second.bias.sum()), other.exp()

    counts = {True: itertools.count(), False: itertools.count()}

    def step(function: Any, module: Any) -> Any:
        if not module.expert._backward_hooks:
            for name in ("expert", "other", "outside"):
                parameter = getattr(module, name)
                parameter.register_hook(lambda grad, name=name: ran.append(name) or grad * 2)
                parameter.register_post_accumulate_grad_hook(lambda p: ran.append(str(p.shape)))
        number = next(counts[function is module])
        ran.clear()
        module.zero_grad()
        losses = []
        for place in range(2 if how == "pending" else 1):
            now[:] = TAKEN[taken](number + place)
            x, other = function(
                module.outside.exp() * torch.rand(3 + (number % 2) * (how == "sizes"), 4, device=device)
            )
            losses.append(x.square().mean() * (place + 1) + (other.sum() if how != "once" or number % 5 else 0))
        for loss in losses:
            loss.backward(retain_graph=how == "retained")
            if how == "retained":
                loss.backward()
        descend(module)
        return [loss.detach() for loss in losses], sorted(ran)

    if how == "compare":
        options = {**options, "debug": "compare"}
    programs = assert_trains(Layers(), step, device, options, 32, dynamic=how == "sizes" or None)
    replays = {program.name: program.replays for program in programs}
    assert sum(replays[name] for name in replays if name.startswith("forward")) >= 20, replays
    assert sum(replays[name] for name in replays if "of marked functions" in name) >= 4, replays


def test_a_backward_that_gives_no_gradient_at_last(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a backward of the user's that returns None first in a later step is an error, and steps after it are eager, and right."""
    gives_both = True

    @eager_on_graph(backward=lambda _, grad: (grad * 2, grad.sum(0) if gives_both else None))
    def chosen(x: Tensor, y: Tensor) -> Tensor:
        return x * 2 + y

    class Experts(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(chosen(self.first(x).relu(), self.expert.exp()))

    torch.manual_seed(0)
    mine = Experts().to(device)
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    step = mlp_step(device)
    assert_same(trained(compiled, mine, step, 8), trained(theirs, theirs, step, 8))
    assert_replays(breakable_backend.explain(compiled).programs, 1)
    gives_both = False
    with pytest.raises(EagerOutputError, match="leave out one of its arguments"):
        step(compiled, mine)
    assert_same(trained(compiled, mine, step, 3), trained(theirs, theirs, step, 3))
    assert "leave out one of its arguments" in str(breakable_backend.explain(compiled))


class Mixture(nn.Module):
    """A mixture of experts whose routing is Python. Its experts are parameters; rows of :attr:`absent` ones keep their values."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.router, self.absent = nn.Linear(width, 4), frozenset[int]()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])

    @eager_on_graph
    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        chosen, result = weights.argmax(-1), x * 1
        for number, expert in enumerate(self.experts):
            (rows,) = (chosen == number).nonzero(as_tuple=True)
            if len(rows) and number not in self.absent:
                result = result.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        return result


class Mixtures(nn.Module):
    """Two mixtures, of which one is called twice. A weight of the other is read by captured code, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.twice, self.once = Mixture(), Mixture()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for mixture in (self.twice, self.once, self.twice):
            x = x + mixture(self.norm(x).relu())
        return self.last(x + self.once.experts[2].bias)


Absent = Callable[[int], tuple[set[int], set[int]]]

ABSENT: dict[str, Absent] = {
    "at first": lambda step: ({0}, {1, 2}) if step < 5 or step % 4 else (set(), set()),
    "at last": lambda step: ({0, 3}, {2}) if step > 8 and step % 3 else (set(), set()),
}
"""Which experts of both mixtures get no rows in a step."""


def train_mixtures(device: torch.device, absent: Absent) -> Step:
    """Steps in which experts are absent. Each second one adds to the gradients of the last. Half the parameters have hooks."""
    optimizers: dict[int, torch.optim.Optimizer] = {}
    steps, called = dict.fromkeys((True, False), -1), list[Any]()

    def step(function: Any, module: Any) -> Any:
        if id(module) not in optimizers:
            optimizers[id(module)] = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
            for name, parameter in module.twice.named_parameters():
                parameter.register_hook(lambda grad, name=name: called.append(name) or grad * 2)
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: called.append((name, p.grad.clone())))
        steps[function is module] += 1
        number = steps[function is module]
        module.twice.absent, module.once.absent = map(frozenset, absent(number))
        if number % 2:
            optimizers[id(module)].zero_grad()
        called.clear()
        loss = function(torch.randn(32, 4, device=device)).square().mean()
        loss.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        optimizers[id(module)].step()
        return loss.detach(), grads, sorted(called, key=str)

    return step


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_a_mixture_of_experts_trains(absent: Absent, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an expert without rows has no gradient, its hooks are not called, and all others have eager's bits."""
    programs = assert_trains(Mixtures(), train_mixtures(device, absent), device, options, 20)
    assert_replays(programs, 13)


@pytest.mark.parametrize("how", ["sizes", "compare", "checkpoint", "declared", "retained", "plain"])
def test_missing_gradients_everywhere(how: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: the same with sizes that vary, in compare mode, in a checkpoint, for a backward of the user's own, and run twice."""

    @eager_on_graph(backward=lambda context, grad: (grad * 2, None))
    def declared(x: Tensor, _unused: Tensor) -> Tensor:
        return x * 2

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mixture, self.last = nn.Linear(4, 8), Mixture(), nn.Linear(8, 4)
            self.unused = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh() * 2
            if how == "declared":
                x = declared(x, self.unused)
            mixed = checkpoint(self.mixture, x, use_reentrant=False) if how == "checkpoint" else self.mixture(x)
            return self.last((mixed * 2).sin())

    counts = {True: itertools.count(), False: itertools.count()}

    def step(function: Any, module: Any) -> Any:
        number = next(counts[function is module])
        module.mixture.absent = frozenset({number % 5})
        module.zero_grad()
        losses = []
        for place in range(6 if how == "plain" else 1):  # more than there are slots
            x = torch.randn(32 + (number % 2) * (how == "sizes"), 4, device=device)
            losses.append(function(x).square().mean() * (place + 1))
        for loss in losses:
            loss.backward(retain_graph=how == "retained")
            if how == "retained":
                loss.backward()
        descend(module)
        return losses[0].detach()

    if how == "compare":
        options = {**options, "debug": "compare"}
    programs = assert_trains(Skips(), step, device, options, 16, dynamic=how == "sizes" or None)
    if how != "checkpoint":
        assert_replays(programs, 2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo instantiates an autograd.Function
def test_a_gradient_of_two_functions_that_one_leaves_out(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: where captured code reads a sum, a part of it may be missing; and no sum of the user's is taken for one."""
    gives = [True, True]

    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 3

        @staticmethod
        def backward(ctx: Any, one: Tensor, two: Tensor) -> Tensor:
            return one + two

    @eager_on_graph
    def some(x: Tensor, y: Tensor, number: int) -> Tensor:
        return x * y if gives[number] else x * 2

    class Sums(Mlp):
        def __init__(self, split: bool) -> None:
            super().__init__()
            self.weight, self.split = nn.Parameter(torch.rand(8)), split

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            one, two = Halves.apply(self.weight) if self.split else (weight := self.weight.exp(), weight)
            return self.second(some(some(x, one, 0) + 1, two, 1) * (1 if self.split else two))

    step = mlp_step(device)
    for split in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        mine = Sums(split).to(device)
        theirs = copy.deepcopy(mine)
        compiled = torch.compile(mine, backend="breakable_cg", options=options)
        for gives[:] in ([False, False], [True, True], [True, True], [False, True], [True, False], [False, False]):
            assert_same(trained(compiled, mine, step, 3), trained(theirs, theirs, step, 3))
        programs = breakable_backend.explain(compiled).programs
        assert_replays(programs, 1 if split else 10)
        # Captured code reads both gradients, or a sum that has a further term.
        assert any("of marked functions" in program.name for program in programs) is split


def test_results_that_need_gradients_in_some_calls_only(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: gradients of a result that needed none at first are eager's; an error, once, if it needed none until captured."""
    silent = [True]

    @eager_on_graph
    def at_times(x: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros_like(x) if silent[0] else x * weight

    class AtTimes(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.second(x + at_times(x, self.weight))

    step = mlp_step(device)
    for first in (1, 2, 8):
        silent[0] = True
        torch._dynamo.reset()
        torch.manual_seed(0)
        mine = AtTimes().to(device)
        theirs = copy.deepcopy(mine)
        compiled = torch.compile(mine, backend="breakable_cg", options=options)
        assert_same(trained(compiled, mine, step, first), trained(theirs, theirs, step, first))
        silent[0] = False
        if first > 1:
            with pytest.raises(
                EagerOutputError, match="a tensor that needs gradients, and needed none in the calls before"
            ):
                step(compiled, mine)
        for silent[0] in (False, True, False):
            assert_same(trained(compiled, mine, step, 8), trained(theirs, theirs, step, 8))
        assert_replays(breakable_backend.explain(compiled).programs, 10)


def test_hooks_are_left_as_they_were(device: torch.device, options: dict[str, Any]) -> None:
    """Hooks of a parameter that a marked function gives nothing see what others give, and are the user's own behind it."""
    torch.manual_seed(0)
    mixtures = Mixtures().to(device)
    mixtures.twice.absent = frozenset({0})
    compiled = torch.compile(mixtures, backend="breakable_cg", options=options)
    weight, seen = mixtures.twice.experts[0].weight, list[Any]()
    weight.register_hook(seen.append)
    weight.register_post_accumulate_grad_hook(seen.append)
    for number in range(9):
        handle = weight.register_hook(seen.append)
        loss = compiled(torch.randn(32, 4, device=device)).square().mean()
        if elsewhere := number % 3 == 2:
            loss = loss + weight.sum()
        loss.backward()
        handle.remove()
        hooks = [*weight._backward_hooks.values(), *weight._post_accumulate_grad_hooks.values()]
        assert hooks == [seen.append] * 2
        assert len(seen) == 3 * elsewhere
        seen.clear()
    assert_replays(breakable_backend.explain(compiled).programs, 3)


def test_hooks_behind_a_backward_that_raises(device: torch.device, options: dict[str, Any]) -> None:
    """Hooks of parameters that get nothing in a backward that another hook ends are called in later ones, as in eager."""
    raising: set[int] = set()
    seen: list[Any] = []

    def refuse(grad: Tensor) -> None:
        if raising:
            raise ValueError("refused")

    def step(function: Any, module: nn.Module) -> Any:
        if not module.left.weight._backward_hooks:
            module.left.weight.register_hook(refuse)
            module.right.weight.register_hook(lambda grad: seen.append(grad.clone()))
            module.right.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
        for number in range(6):
            module.zero_grad()
            raising.update({number} if number == 3 else ())
            left, right = function(torch.rand(3, 4, device=device))
            loss = (left if number % 2 else right).sum()
            with pytest.raises(ValueError, match="refused") if raising else contextlib.nullcontext():
                loss.backward()
            raising.clear()
            del left, right, loss
            gc.collect()
        result, seen[:] = list(seen), []
        return result

    assert_replays(assert_trains(Halved(), step, device, options, 3), 4)


def test_hooks_for_several_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: ``register_multi_grad_hook`` waits for no parameter that gets no gradient, and sees all that get one."""
    seen: dict[str, Any] = {}
    hooked: set[int] = set()

    def step(function: Any, module: nn.Module) -> Any:
        if id(module) not in hooked:
            hooked.add(id(module))
            every = list(module.parameters())
            for name, some in (("all", every), ("right", list(module.right.parameters())), ("two", every[1:3])):
                torch.autograd.graph.register_multi_grad_hook(some, functools.partial(seen.__setitem__, name))
            torch.autograd.graph.register_multi_grad_hook(
                every[:1], functools.partial(seen.__setitem__, "any"), mode="any"
            )
        results = []
        for which in ("left", "right", "both", "some"):
            module.zero_grad()
            left, right = function(torch.rand(3, 4, device=device))
            y = {"left": left, "right": right}.get(which, left + right)
            y.sum().backward(inputs=[module.left.weight] if which == "some" else None)
            results.append(sorted(seen.items()))
            seen.clear()
        return results

    assert_replays(assert_trains(Halved(), step, device, options, 5), 2)


class Features(nn.Module):
    """Features, and scores that are computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.first(x).tanh()
        return features, self.second(features)


@pytest.mark.parametrize("how", ["retained", "hooked"])
def test_gradients_of_results_that_others_are_computed_from(
    how: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Lines 3 and 9: whoever looks at such a gradient sees the whole of it: in eager steps, and after an error once."""

    def watch(features: Tensor) -> None:
        if how == "retained":
            features.retain_grad()
        else:
            features.register_hook(lambda grad: grad.clamp(max=0.1))

    watched = True

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        features, scores = function(torch.rand(3, 4, device=device))
        if watched:
            watch(features)
        kept = features if how == "retained" else None
        del features
        scores.square().sum().backward()
        descend(module)
        return kept.grad if watched and kept is not None else scores.detach()

    assert assert_trains(Features(), step, device, options, 4) == []
    torch.compiler.reset()
    watched = False
    assert_replays(assert_trains(Features(), step, device, options, 6), 2)
    torch.compiler.reset()
    model = Features().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    trained(compiled, model, step, 5)
    watched = True
    with pytest.raises(ReplayError, match="a result from which another one is computed"):
        step(compiled, model)
    other = copy.deepcopy(model)
    assert_same(trained(compiled, model, step, 3), trained(other, other, step, 3))


def test_hooks_of_results_without_a_gradient(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a hook of a result that gets no gradient is not called, and one for several results sees those that get some."""
    seen: list[Any] = []

    def step(function: Any, module: nn.Module) -> Any:
        for which in ("left", "right", "both"):
            module.zero_grad()
            left, right = function(torch.rand(3, 4, device=device))
            left.register_hook(lambda grad: grad * 2)
            right.register_hook(lambda grad: grad.clamp(max=0.5))
            right.register_hook(torch.neg).remove()
            torch.autograd.graph.register_multi_grad_hook([left, right], seen.append)
            {"left": left, "right": right}.get(which, left + right).square().sum().backward()
        result, seen[:] = list(seen), []
        return result

    assert_replays(assert_trains(Halved(), step, device, options, 5), 2)


def test_nothing_changes_no_bit(device: torch.device) -> None:
    """What stands for a missing gradient leaves both zeros as they are."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        zeros = torch.tensor([0.0, -0.0, 1.0], device=device).to(dtype)
        assert_same([nothing_like(zeros) + zeros, zeros + nothing_like(zeros)], [zeros, zeros])


def test_marked_ops_in_both_halves(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: an op that is marked, or that no graph can hold, is eager in the forward, and its gradient is right."""

    class Sorting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh() * 2
            x = x.sort(-1).values.exp() + 1
            return self.second(x).tanh()

    programs = assert_trains(Sorting(), mlp_step(device), device, {**options, "eager_ops": ["aten::sort"]}, 10)
    assert_replays(programs, 4)
    (forward,) = [program for program in programs if program.name.startswith("forward")]
    assert forward.num_eager_segments == 1


def test_an_eager_region_is_eager_in_its_backward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the gradients of ops of an eager region are eager steps too."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh() * 2
            with breakable_backend.eager_region():
                x = x.cumsum(-1)
            return self.second(x.tanh()).tanh()

    programs = assert_trains(Region(), mlp_step(device), device, options, 10)
    assert_replays(programs, 4)
    assert all(program.num_eager_segments for program in programs if program.replays)


def test_equal_calls_are_not_merged(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: two equal marked calls are two, an unused one is one, and so it is with draws."""
    calls: list[int] = []

    @eager_on_graph
    def note(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    class Twice(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            note(x)
            torch.rand(3, device=x.device)
            return self.second(note(x) + note(x) + F.dropout(x, 0.5) + F.dropout(x, 0.5))

    counted: list[int] = []

    def step(function: Any, module: nn.Module) -> Any:
        calls.clear()
        result = mlp_step(device)(function, module)
        counted.append(len(calls))
        return result

    assert_replays(assert_trains(Twice(), step, device, options, 9), 3)
    assert set(counted[3:]) == {3}


# --- mixed precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [True, False])
def test_autocast(around: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 7: autocast around the call, and inside it, as eager has it."""

    class Cast(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            if around:
                return super().forward(x)
            with torch.autocast(device.type, torch.bfloat16):
                return super().forward(x)

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=around):
            loss = function(torch.rand(3, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(Cast(), step, device, options, 10), 4)


@pytest.mark.parametrize("where", ["around", "inside", "cache off", "checkpoints"])
def test_autocast_of_a_weight_that_is_used_twice(where: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 7: autocast casts such a weight once for each region, so its gradients add up in the lower precision."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def both(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

        def forward(self, x: Tensor) -> Tensor:
            if where == "inside":
                with torch.autocast(device.type, torch.bfloat16):
                    return self.both(x)
            if where == "checkpoints":
                x = checkpoint(self.both, x, use_reentrant=False, preserve_rng_state=False)
                return checkpoint(self.both, x, use_reentrant=False, preserve_rng_state=False)
            return self.both(x)

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        x = torch.rand(16, 4, device=device, requires_grad=True)
        cache = where != "cache off"
        with torch.autocast(device.type, torch.bfloat16, enabled=where != "inside", cache_enabled=cache):
            loss = function(x).float().square().mean()
        loss.backward()
        return loss.detach(), x.grad, [parameter.grad for parameter in module.parameters()]

    assert_replays(assert_trains(Twice(), step, device, options, 8), 4)


def test_a_scaled_loss(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a GradScaler's scale comes in with the gradient, and its steps are eager's."""
    scalers: dict[int, Any] = {}

    def step(function: Any, module: nn.Module) -> Any:
        if id(module) not in scalers:
            scalers[id(module)] = (
                torch.amp.GradScaler(device.type, init_scale=2.0**30, growth_interval=2),
                torch.optim.SGD(module.parameters(), lr=0.1),
            )
        scaler, optimizer = scalers[id(module)]
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = function(torch.rand(3, 4, device=device)).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), scaler.get_scale()

    assert_replays(assert_trains(Mlp(), step, device, options, 10), 4)


# --- parameters ---------------------------------------------------------------------------------------------------------------


def test_frozen_tied_and_added_weights(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a frozen weight gets no gradient, a tied one gets both, a low-rank addition trains beside it."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(4, 4).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
            self.tokens = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.tokens(x)
            return self.head(self.base(x) + self.up(self.down(x)))

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        tokens = torch.randint(0, 5, (6,), device=device)
        loss = F.cross_entropy(function(tokens), tokens)
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(Adapted(), step, device, options, 10), 4)


def test_hooks(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: hooks on parameters, on what they accumulate and on results see and change what they do in eager."""
    seen: list[Tensor] = []
    hooked: set[int] = set()

    def step(function: Any, module: nn.Module) -> Any:
        if id(module) not in hooked:
            hooked.add(id(module))
            first, second = module.first.weight, module.second.weight
            first.register_hook(lambda grad: grad * 2)
            second.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
        seen.clear()
        module.zero_grad()
        y = function(torch.rand(3, 4, device=device))
        y.register_hook(lambda grad: grad.clamp(max=0.1))
        y.square().sum().backward()
        descend(module)
        return list(seen)

    assert_trains(Mlp(), step, device, options, 8)


COMPILED_BACKWARDS = """
import contextlib, copy, torch, warnings
import breakable_backend
warnings.simplefilter("ignore")
eager = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(device)
model = copy.deepcopy(eager)
compiled = torch.compile(model, backend="breakable_cg", options=options)
for step in range(7):
    x = torch.rand(3, 4, device=device)
    for function, module in ((compiled, model), (eager, eager)):
        module.zero_grad()
        loss = function(x).square().sum()
        backwards = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
        with backwards if function is compiled else contextlib.nullcontext():
            loss.backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(map(torch.equal, model.parameters(), eager.parameters())), step
replays = {program.name.split()[0]: program.replays for program in breakable_backend.explain(compiled).programs}
assert replays["forward"] and replays["backward"], replays
print("right")
"""


def test_backwards_that_are_compiled(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 3: backwards under compiled autograd, of forwards that were not, are right, and captured.

    In a process of its own: compiled autograd holds what the first forwards saved for good, in plain eager too.
    """
    done = fresh.python(
        f"import torch\ndevice, options = torch.device({str(device)!r}), {options!r}\n{COMPILED_BACKWARDS}"
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


# --- what stays eager -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("order_of_gradients")
def test_second_derivatives(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph whose first backward is differentiated stays eager, and the report says why."""

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        x = torch.rand(3, 4, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (grad.norm() - 1).square().backward()
        descend(module)
        return grad.detach()

    class Smooth(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    model = Smooth().to(device)
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    assert_same(trained(compiled, mine, step, 5), trained(theirs, theirs, step, 5))
    report = breakable_backend.explain(compiled)
    assert report.programs == ()
    assert "create_graph=True" in str(report)


def run_backward(how: str, y: Tensor, x: Tensor) -> list[Tensor]:
    """A backward that eager's autograd has to see; what comes of it."""
    if how == "create_graph":
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), x)]
    if how == "batches":
        tangents = torch.linspace(0, 1, 2 * y.numel(), device=y.device).view(2, *y.shape)
        return list(torch.autograd.grad(y, x, tangents, is_grads_batched=True))
    with torch.autocast(x.device.type, torch.bfloat16):
        return list(torch.autograd.grad(y.sum(), x))


@torch.library.custom_op("training::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An op of others: nobody can tell what else it does."""
    return x * 2


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, gradient: gradient * 2)


@pytest.mark.parametrize("how", ["autocast", "batches"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "result"])
def test_a_backward_of_a_second_forward(how: str, leaf: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 9: once captured, a backward that eager's autograd has to see is that of a second, eager forward, and is right."""
    weight, bias = (torch.rand(*size, device=device, requires_grad=True) for size in ((4, 4), (4,)))

    def function(x: Tensor) -> Tensor:
        return (x @ weight + bias).sin() * x

    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(function, device, options, x)
    before = breakable_backend.explain(compiled).programs[0].replays
    for _ in range(2):  # and what is captured stays so
        results = []
        for called in (compiled, function):
            found = run_backward(how, called(x if leaf else x * 2), x)
            found += torch.autograd.grad(called(x if leaf else x * 2).sum(), (x, weight, bias))
            results.append(found)
        assert_same(*results)
    forward = breakable_backend.explain(compiled).programs[0]
    assert forward.replays == before + 4
    assert any("is run once more" in note for note in forward.notes)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "result"])
@pytest.mark.usefixtures("order_of_gradients")
def test_a_second_derivative_of_what_was_captured(leaf: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 9 and 10: it is right, for pending forwards too; later calls are eager, and what was recorded is freed."""
    weight, bias = (torch.rand(*size, device=device, requires_grad=True) for size in ((4, 4), (4,)))

    def function(x: Tensor) -> Tensor:
        return (x @ weight + bias).sin() * x

    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(function, device, options, x)
    pending = [called(x * 3) for called in (compiled, function)]
    before = breakable_backend.explain(compiled).programs[0].replays
    for _ in range(3):
        results = []
        for called in (compiled, function):
            found = run_backward("create_graph", called(x if leaf else x * 2), x)
            results.append([*found, *torch.autograd.grad(called(x if leaf else x * 2).sum(), (x, weight, bias))])
        assert_same(*results)
    assert_same(*(torch.autograd.grad(y.sum(), (x, weight, bias)) for y in pending))
    report = breakable_backend.explain(compiled)
    assert report.programs[0].replays == before
    assert "eager, because it needs gradients, and a backward was run with create_graph=True" in str(report)
    pending.clear()
    results.clear()
    gc.collect()
    breakable_cg.free()
    assert soon(lambda: all(executor.driver.live_blocks() == 0 for executor in executors_of(compiled)))


@pytest.mark.parametrize("how", ["create_graph", "autocast", "batches"])
@pytest.mark.usefixtures("order_of_gradients")
def test_a_second_forward_that_draws(how: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: it draws what the first one drew, whatever was drawn since, and nothing else moves."""
    x = torch.rand(3, 4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return F.dropout(x.sin(), 0.5) * x

    compiled = warmed_up(function, device, options, x)
    results = []
    for called in (compiled, function):
        torch.manual_seed(0)
        found = []
        for _ in range(3):
            y, between = called(x), torch.rand(3, device=device)
            found += [y.detach(), between, *run_backward(how, y, x), torch.rand(3, device=device)]
        results.append([*found, *random_states(device)])
    assert_same(*results)


@pytest.mark.parametrize("how", ["create_graph", "autocast", "batches"])
@pytest.mark.parametrize("kind", ["module", "function", "evaluated"])
@pytest.mark.usefixtures("order_of_gradients")
def test_a_second_forward_with_statistics(kind: str, how: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 4: a second forward writes no counter and no statistics of a batch norm again, and gives eager's gradients."""
    x = torch.rand(6, 4, device=device, requires_grad=True)
    norm = nn.BatchNorm1d(4).to(device)
    norm.train(kind != "evaluated")

    def function(x: Tensor) -> Tensor:
        if kind != "function":
            return norm(x.sin()) * x
        return F.batch_norm(x.sin(), norm.running_mean, norm.running_var, norm.weight, norm.bias, True) * x

    compiled, results = warmed_up(function, device, options, x), []
    for called in (compiled, function):
        norm.reset_running_stats()
        found = []
        for _ in range(2):
            y, later = called(x), called(x * 2)  # behind which the statistics are others
            found += [y.detach(), *run_backward(how, y, x), torch.autograd.grad(later.sum(), x)]
            found += [buffer.clone() for buffer in norm.buffers()]
        results.append(found)
    assert_same(*results)
    assert any("is run once more" in note for note in breakable_backend.explain(compiled).programs[0].notes)


def test_a_second_forward_whose_statistics_are_read(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: if a call of a graph got its statistics through another argument too, it has no second forward."""
    x, both = torch.rand(3, 4, device=device, requires_grad=True), torch.zeros(2, 4, device=device)
    views = both[0], both[1]

    def function(x: Tensor, seen: Tensor, read: Tensor) -> Tensor:
        seen.add_(1)
        return x.sin() * x + read

    compiled = torch.compile(function, backend="breakable_cg", options={**options, "training": True})
    for _ in range(4):
        compiled(x, *views).sum().backward()
    y = compiled(x, *views)
    with pytest.raises(ReplayError, match="shares memory with another"):
        run_backward("batches", y, x)


@pytest.mark.parametrize("how", ["create_graph", "autocast", "batches"])
@pytest.mark.parametrize("what", ["writes", "reads", "calls"])
@pytest.mark.usefixtures("order_of_gradients")
def test_a_backward_that_eager_alone_can_run(
    what: str, how: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: what cannot run once more is an error that says what to do; later calls are eager, and right."""
    x, written = torch.rand(3, 4, device=device, requires_grad=True), torch.zeros((), device=device)
    mean, variance = torch.zeros(4, device=device), torch.ones(4, device=device)

    def writes(x: Tensor) -> Tensor:
        written.add_(1)
        return x.sin() * x * written

    def calls(x: Tensor) -> Tensor:
        return twice(x).sin() * x

    def reads(x: Tensor) -> Tensor:
        y = F.batch_norm(x, mean, variance, training=True)
        return F.batch_norm(y, mean, variance, training=False) * x

    depends = "its results may depend on what an argument was before it is written"
    function, why = {
        "writes": (writes, depends),
        "reads": (reads, depends),
        "calls": (calls, "it calls marked functions, or ops that are not torch's own"),
    }[what]
    compiled = warmed_up(function, device, options, x)
    with pytest.raises(ReplayError, match=why) as caught:
        run_backward(how, compiled(x), x)
    assert "call it again" in caught.value.fix
    results = []
    for called in (compiled, function):
        written.zero_()
        mean.zero_()
        variance.fill_(1)
        results.append([*run_backward(how, called(x), x), written.clone(), mean.clone(), variance.clone()])
    assert_same(*results)


class Halved(nn.Module):
    """Two parts that share nothing but the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x).tanh(), self.right(x).tanh()


def in_parts(device: torch.device, parts: Callable[[], bool]) -> Step:
    """A step that runs both results backward, one after the other if ``parts``."""

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        left, right = function(torch.rand(3, 4, device=device))
        if parts():
            left.sum().backward()
            right.square().sum().backward()
        else:
            (left.sum() + right.square().sum()).backward()
        descend(module)
        return left.detach()

    return step


def test_results_that_are_run_backward_in_parts(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph whose results are run backward one after the other stays eager, and the report says why."""
    torch.manual_seed(0)
    mine = Halved().to(device)
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    step = in_parts(device, lambda: True)
    assert_same(trained(compiled, mine, step, 5), trained(theirs, theirs, step, 5))
    report = breakable_backend.explain(compiled)
    assert report.programs == ()
    assert "its results are run backward one after the other" in str(report)


def test_results_that_are_run_backward_in_parts_at_last(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: where it was captured by then that is an error that says what to do; later calls are eager, and right."""
    torch.manual_seed(0)
    mine = Halved().to(device)
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    parts = False
    step = in_parts(device, lambda: parts)
    assert_same(trained(compiled, mine, step, 6), trained(theirs, theirs, step, 6))
    parts = True
    with pytest.raises(ReplayError, match="one after the other, without retain_graph=True") as raised:
        step(compiled, mine)
    assert "call it again" in raised.value.fix
    theirs.load_state_dict(mine.state_dict())
    assert_same(trained(compiled, mine, step, 3), trained(theirs, theirs, step, 3))
    y, _ = compiled(torch.rand(3, 4, device=device))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):  # as in eager
        y.sum().backward()


def test_a_second_forward_where_somebody_else_drew(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If another thread drew between the reading of the random state and the forward, no second forward draws the same."""
    compiled = torch.compile(
        lambda x: F.dropout(x.sin(), 0.5), backend="breakable_cg", options={**options, "training": True}
    )
    x = torch.randn(8, 8, device=device, requires_grad=True)
    for _ in range(5):
        compiled(x).sum().backward()
    run = ForwardExecutor.run

    def late(*args: Any) -> Any:
        torch.rand(3, device=device)
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardExecutor, "run", late)
        y = compiled(x)
    with pytest.raises(ReplayError, match="another thread drew random numbers"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_second_forward_whose_argument_was_written(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a backward that needs a second forward, one of whose arguments has been written since, is an error."""
    bias = torch.rand(4, device=device, requires_grad=True)
    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(lambda x: (x + bias).sin(), device, options, x)
    y = compiled(x)
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(ReplayError, match="gone or was written"):
        run_backward("create_graph", y, x)


def test_an_argument_made_in_inference_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 9: a teacher's result may come in if no backward needs it; a second forward of it is an error."""
    bias = torch.rand(4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x + bias).sin()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for step in range(7):
        with torch.inference_mode():
            x = torch.rand(3, 4, device=device)
        y = compiled(x)
        if step < 6:
            assert_same(torch.autograd.grad(y.sum(), bias), torch.autograd.grad(function(x).sum(), bias))
    assert_replays(breakable_backend.explain(compiled).programs, 2)
    with torch.inference_mode():
        x.add_(1)
    with pytest.raises(ReplayError, match="made in inference mode, where nothing counts writes"):
        torch.autograd.grad(y.sum(), bias, create_graph=True)


def test_a_second_forward_whose_argument_has_other_memory(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 9: a backward that needs a second forward, one of whose arguments got other memory since, is an error."""
    bias = torch.rand(4, device=device, requires_grad=True)
    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = warmed_up(lambda x: (x + bias).relu(), device, options, x)
    y = compiled(x)
    bias.data = -2 * torch.ones_like(bias)
    with pytest.raises(ReplayError, match="an argument was given other memory"):
        run_backward("create_graph", y, x)


def test_each_backward_behind_the_next_forward(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: what is always run backward behind a later forward, as in a pipeline, is captured too."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ weight).tanh()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    results: list[list[Tensor]] = [[], []]
    for called, found in zip((compiled, function), results, strict=True):
        pending = None
        for number in range(10):
            y = called(torch.full((3, 4), number / 10, device=device))
            if pending is not None:
                found += torch.autograd.grad(pending.sum(), weight)
            pending = y
    assert_same(*results)
    assert breakable_backend.explain(compiled).programs[0].replays > 0


def test_a_plain_forward_behind_captured_ones(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: the backward of a plain forward reads what that one saved, even if the first saved value is empty."""

    def function(x: Tensor, written: Tensor, read: Tensor) -> Tensor:
        nothing, y = x[:0].exp(), (x * 2).exp()
        written.add_(1)
        return (y * 3 + read).sum() + nothing.sum()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    written = torch.zeros(4, device=device)
    for number in range(8):
        shared = number in (5, 7)  # then the call is plain, since a written argument shares memory with another
        results = []
        for called in (compiled, function):
            x = torch.linspace(number, number + 1, 4, device=device, requires_grad=True)
            loss = called(x, written.zero_(), written[:] if shared else torch.ones(4, device=device))
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
        assert_same(*results)
    (forward,) = [executor for executor in executors_of(compiled) if isinstance(executor, ForwardExecutor)]
    assert forward.statistics.plain["arguments share memory, and one is written"] == 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(inside: bool, reentrant: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: a block that is computed again is eager's, be the checkpoint inside of the graph or around it."""

    class Checked(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant) if inside else super().forward(x)

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        x = torch.rand(3, 4, device=device, requires_grad=True)
        y = function(x) if inside else checkpoint(function, x, use_reentrant=reentrant)
        loss = y.square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    assert_trains(Checked(), step, device, options, 6)


@eager_on_graph
def halves_and_whole(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A marked function with several tensors to save, and with results that share memory, one of which is its argument."""
    first, second = (x.sigmoid() * x).chunk(2)
    return first, second, x


class PartsJoined(Mlp):
    """A block whose marked function is learned in its first call, which then ran as Python."""

    def forward(self, x: Tensor) -> Tensor:
        first, second, whole = halves_and_whole(self.first(x))
        return self.second(torch.cat([first.exp(), second]) + whole)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
def test_checkpoints_of_blocks_with_marks(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: a block is computed again by compiled code where its first call ran as Python: both save the same."""
    blocks = nn.ModuleList([PartsJoined(), PartsJoined()]).to(device)

    def trained(functions: Any, module: nn.Module) -> list[Any]:
        found: list[Any] = []
        torch.manual_seed(0)
        for _ in range(4):
            x = torch.rand(6, 4, device=device)
            for function in functions:
                x = checkpoint(function, x, use_reentrant=False)
            x.square().mean().backward()
            found += [x.detach(), state_of(module)]
            module.zero_grad()
        return found

    theirs = copy.deepcopy(blocks)
    compiled = [torch.compile(block, backend="breakable_cg", options=options) for block in blocks]
    assert_same(trained(compiled, blocks), trained(theirs, theirs))


@eager_on_graph
def noisy(x: Tensor) -> Tensor:
    """A marked function that draws, which nobody can tell from outside."""
    return x * torch.rand_like(x)


class Cubed(torch.autograd.Function):
    """A function with a backward of its own, which is twice eager's, so that it is seen to run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x**3 * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient * x * x * (6 * ctx.scale), None


def in_an_eager_region(x: Tensor) -> Tensor:
    with eager_region():
        y = x.sin()
    return (y * 2).tanh()


@torch.compiler.nested_compile_region
def in_a_region(x: Tensor) -> Tensor:
    return scaled_by(x.sin(), 3).cos()


GRAPHS_INSIDE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "checkpoint": (lambda x: checkpoint(lambda x: (x.sin() * 2).tanh(), x, use_reentrant=False).cos(), ""),
    "checkpoints in one": (
        lambda x: checkpoint(lambda x: checkpoint(torch.tanh, x, use_reentrant=False) * x, x, use_reentrant=False),
        "",
    ),
    "draws outside": (lambda x: F.dropout(checkpoint(lambda x: x.sin() * 2, x, use_reentrant=False), 0.5), ""),
    "draws inside": (lambda x: checkpoint(lambda x: F.dropout(x.sin(), 0.5), x, use_reentrant=False) * 2, "draws"),
    "may draw": (lambda x: checkpoint(lambda x: noisy(x.sin()).tanh(), x, use_reentrant=False) * 2, "or may"),
    "marked outside": (lambda x: scaled_by(checkpoint(lambda x: x.sin().tanh(), x, use_reentrant=False), 3).tanh(), ""),
    "marked inside": (lambda x: checkpoint(in_an_eager_region, x, use_reentrant=False).cos(), ""),
    "autograd.Function": (lambda x: Cubed.apply(x.sin(), 1.5).tanh(), ""),
    "region": (lambda x: in_a_region(x) + in_a_region(x * 2), ""),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo instantiates an autograd.Function
@pytest.mark.parametrize("name", GRAPHS_INSIDE)
def test_graphs_inside(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1, 2 and 6: checkpoints, custom gradients and regions are captured; a draw that would come again keeps eager."""
    function, why = GRAPHS_INSIDE[name]
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    for number in range(8):
        results = []
        for called in (compiled, function):
            torch.manual_seed(number)
            x = torch.rand(3, 4, device=device, requires_grad=True)
            y = called(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, torch.rand(2, device=device)))
        assert_same(*results)
    report = breakable_backend.explain(compiled)
    if why:
        assert any(why in graph.why for graph in report.eager_graphs)
    else:
        assert_replays(report.programs, 3)
    if name in ("region", "marked outside", "marked inside"):
        assert all(program.num_eager_segments >= 1 for program in report.programs)


def test_other_memory_between_the_two(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a weight that is given other memory between forward and backward is an error, and later calls are eager."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)
    x = torch.rand(3, 4, device=device, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return (x @ weight * 2).tanh()

    def moved(function: Any) -> tuple[Tensor, ...]:
        y, kept = function(x).sum(), weight.data
        weight.data = weight.data * 2
        try:
            return torch.autograd.grad(y, (weight, x))
        finally:
            weight.data = kept

    compiled = warmed_up(function, device, options, x)
    weight.data = weight.data.clone()  # between two steps it may
    got = torch.autograd.grad(compiled(x).sum(), (weight, x))
    assert_same(got, torch.autograd.grad(function(x).sum(), (weight, x)))
    with pytest.raises(ReplayError, match="given other memory"):
        moved(compiled)
    assert_same(moved(compiled), moved(function))


def test_memory_that_is_freed_between_the_two(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: parameters whose storages are freed behind a forward and filled again before its backward are read there."""

    def step(function: Any, module: nn.Module) -> Any:
        loss = function(torch.rand(3, 4, device=device)).square().sum()
        kept, others = [parameter.detach().clone() for parameter in module.parameters()], []
        for parameter, value in zip(module.parameters(), kept, strict=True):
            storage = parameter.untyped_storage()
            size = storage.nbytes()
            storage.resize_(0)
            others.append(torch.full_like(value, torch.nan))  # where it was
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                storage.resize_(size)
                parameter.copy_(value)
        loss.backward()
        found = state_of(module)
        descend(module)
        module.zero_grad()
        return loss.detach(), found

    assert_trains(Mlp(), step, device, options)


@pytest.mark.parametrize("within", [True, False])
def test_memory_that_is_freed_between_steps(within: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a weight that is freed between steps and filled again elsewhere is copied in, and others are not.

    If it is freed within the backward, as FSDP does, both halves replay as early as those of weights that stay. If it is
    freed later, each notices it when the weight has moved.
    """
    module = Mlp().to(device)
    gathered = next(module.parameters())
    kept, others, places = gathered.detach().clone(), list[Any](), set[int]()
    compiled = torch.compile(module, backend="breakable_cg", options=options)

    def free(weight: Tensor) -> None:
        weight.untyped_storage().resize_(0)

    if within:
        gathered.register_post_accumulate_grad_hook(free)

    def step(function: Any) -> Any:
        with torch.autograd._unsafe_preserve_version_counter(gathered):
            refill(gathered, kept, others)
            while gathered.data_ptr() in places:
                refill(gathered, kept, others)
        places.add(gathered.data_ptr())
        x = torch.rand(3, 4, device=device, requires_grad=True)
        loss = function(x).square().sum()
        loss.backward()
        free(gathered)
        found = loss.detach(), x.grad, [parameter.grad for parameter in module.parameters()]
        module.zero_grad()
        return found

    for number in range(8):
        torch.manual_seed(number)
        got = step(compiled)
        torch.manual_seed(number)
        assert_same(got, step(module), f"step {number}")
    programs = breakable_backend.explain(compiled).programs
    assert [program.replays for program in programs] == ([5, 4] if within else [4, 3])
    assert [len(program.recordings) for program in programs] == [1, 1]
    weights = [p.shape for p in module.parameters()]
    for executor in executors_of(compiled):
        of_weights = [v for v in executor.program.inputs if v.name.startswith("self_") and v.value.shape in weights]
        moving = [value.name for value in of_weights if value.kind != "static"]
        assert executor.notes == [f"{moving[0]}: read in place, and {REFILLED}: copied in"], executor.notes
        assert (len(moving), len(of_weights)) in [(1, 4), (1, 2)], of_weights


def test_memory_that_goes_from_one_weight_to_another(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: blocks that share a graph may have their weights at the same address in turn, as FSDP gathers them."""
    # malloc maps a piece above 32 MiB by itself and unmaps it when it is freed, so the next one lies at the same address
    rows = 140_000 if device.type == "cpu" else 64
    blocks = [nn.Linear(64, rows, bias=False, device=device) for _ in range(2)]
    kept, others = [block.weight.detach().clone() for block in blocks], list[Tensor]()
    compiled = torch.compile(nn.Linear.forward, backend="breakable_cg", options=options)
    places: list[int] = []

    def fill(number: int, elsewhere: bool) -> None:
        weight = blocks[number].weight
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.untyped_storage().resize_(kept[number].untyped_storage().nbytes())
            weight.copy_(kept[number])
            places.append(weight.data_ptr())
            if elsewhere:
                refill(weight, kept[number], others)
                assert weight.data_ptr() != places[-1]

    def step(function: Any) -> Any:
        xs = [torch.rand(3, 64, device=device, requires_grad=True) for _ in blocks]
        results = []
        for block in blocks:
            block.weight.untyped_storage().resize_(0)
        for number, (block, x) in enumerate(zip(blocks, xs, strict=True)):
            fill(number, False)
            results.append(function(block, x).square().sum())
            block.weight.untyped_storage().resize_(0)
        for number in (1, 0):
            fill(number, True)
            results[number].backward()
        found = [result.detach() for result in results], [x.grad for x in xs], [block.weight.grad for block in blocks]
        for block in blocks:
            block.weight.grad = None
        return found

    for number in range(8):
        torch.manual_seed(number)
        got = step(compiled)
        torch.manual_seed(number)
        assert_same(got, step(nn.Linear.forward), f"step {number}")
        others.clear()
    assert any(places[turn] == places[turn + 1] for turn in range(len(places) // 2, len(places), 4)), places


@pytest.mark.parametrize("kind", ["input", "buffer", "marked"])
def test_an_argument_written_through_another(kind: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: what the backward needs, and the forward writes through another argument, is eager's error."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)
    count = torch.zeros(4, device=device)

    @eager_on_graph(mutates_args=("seen",))
    def count_up(seen: Tensor) -> None:
        seen.add_(1)

    def function(x: Tensor, seen: Tensor) -> Tensor:
        y = (x @ weight) * x
        if kind == "marked":
            count_up(seen)
        else:
            seen.add_(1)
        return y

    module = nn.Module()
    module.register_buffer("count", count)
    module.forward = lambda x: function(x, module.count)
    x = torch.rand(4, 4, device=device)
    options = {**options, "min_kernels": 1}
    compiled = torch.compile(module if kind == "buffer" else function, backend="breakable_cg", options=options)
    for _ in range(6):
        y = compiled(x) if kind == "buffer" else compiled(x, count)
        y.sum().backward()
    programs = breakable_backend.explain(compiled).programs
    y = compiled(count.expand(4, 4)) if kind == "buffer" else compiled(x, x[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert_replays(programs, 1)
    weight.grad = None
    (compiled(x) if kind == "buffer" else compiled(x, count)).sum().backward()
    got, weight.grad = weight.grad, None
    ((x @ weight) * x).sum().backward()
    assert_same(got, weight.grad)


@pytest.mark.parametrize(
    "op", [torch.prod, lambda x: x.cumprod(1), torch.max, torch.median], ids=["prod", "cumprod", "max", "median"]
)
def test_formulas_that_are_traced_otherwise(
    op: Callable[[Tensor], Tensor], device: torch.device, options: dict[str, Any]
) -> None:
    """Line 1: gradients whose formula depends on what is in a tensor are eager's, bit for bit."""
    x = torch.randn(5, 7, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: op(x * 1.5), backend="breakable_cg", options=options)
    for _ in range(5):
        grad = -torch.rand_like(op(x))
        (got,) = torch.autograd.grad(compiled(x), x, grad)
        (want,) = torch.autograd.grad(op(x * 1.5), x, grad)
        assert_same(got, want)
        assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")  # torch, once traced
@torch._dynamo.config.patch(allow_rnn=True)
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers(kind: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: recurrent layers train as in eager. On the host, an LSTM saves nothing for its gradient without grad mode."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = getattr(nn, kind)(4, 3, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0].sin()

    def step(function: Any, module: nn.Module) -> Tensor:
        module.zero_grad()
        loss = function(torch.rand(2, 5, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    programs = assert_trains(Recurrent(), step, device, options)
    if kind != "LSTM" and device.type == "cpu":  # AOTAutograd does not take those of cuDNN
        assert_replays(programs, 3)


@eager_on_graph
def halved(x: Tensor) -> tuple[Tensor, int]:
    return x / 2, len(x)


def _times_an_int(x: Tensor) -> Tensor:
    half, number = halved(x * 2)
    return half * number


@torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.sum().item(), _times_an_int, lambda x: x[x > 0.5].exp()],
    ids=["item", "marked", "size"],
)
def test_numbers_known_at_run_time(
    function: Callable[[Tensor], Tensor], device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: a graph that needs gradients, with numbers known only at run time, stays eager, and the report says why."""
    x = torch.rand(3, 4, device=device, requires_grad=True)
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(3):
        results = []
        for called in (compiled, function):
            y = called(x)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        assert_same(*results)
    assert "known only at run time" in str(breakable_backend.explain(compiled))


def test_sparse_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph with sparse gradients stays eager, and the report says why."""
    tokens = nn.Embedding(5, 4, sparse=True, device=device)
    compiled = torch.compile(lambda x: tokens(x).sin() * 2, backend="breakable_cg", options=options)
    x = torch.tensor([0, 1, 1], device=device)
    for _ in range(4):
        tokens.weight.grad = None
        compiled(x).sum().backward()
    got, tokens.weight.grad = tokens.weight.grad, None
    (tokens(x).sin() * 2).sum().backward()
    assert_same(got.to_dense(), tokens.weight.grad.to_dense())
    assert "sparse" in str(breakable_backend.explain(compiled))


def test_the_line_that_keeps_a_graph_eager(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the report names the line of the op to blame, and not the last one."""

    def function(x: Tensor) -> Tensor:
        y = x.as_strided((2,), (1,), 1)
        return y.sin() * 2

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(4):
        pair = [torch.ones(4, device=device, requires_grad=True) for _ in range(2)]
        for called, x in zip((compiled, function), pair, strict=True):
            called(x).sum().backward()
        assert_same(*(x.grad for x in pair))
    (graph,) = breakable_backend.explain(compiled).eager_graphs
    assert "by an absolute offset" in graph.why
    assert graph.source.endswith("in function: y = x.as_strided((2,), (1,), 1)")


def test_zeros_without_memory(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph in whose backward autograd makes zeros that have no memory stays eager, and the report says why."""
    x = torch.rand(5, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: torch.sgn(x * 2), backend="breakable_cg", options={**options, "min_kernels": 1})
    for _ in range(4):
        (got,) = torch.autograd.grad(compiled(x).sum(), x)
        assert_same(got, torch.zeros_like(x))
    assert "no memory" in str(breakable_backend.explain(compiled))


def test_saved_tensors_hooks(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: under hooks on saved tensors a call is eager's, hooks and all; without them it is replayed again."""
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(1)
        return tensor.cpu()

    turns = iter([False] * 5 + [True, False] * 4 + [False] * 5 + [True, False] * 4)

    def step(function: Any, module: nn.Module) -> Any:
        packed.clear()
        if next(turns):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.to(device)):
                return mlp_step(device)(function, module), len(packed) > 2
        return mlp_step(device)(function, module), len(packed)

    assert_replays(assert_trains(Mlp(), step, device, options, 13), 4)


class Ragged(nn.Module):
    """An MLP over rows whose number varies, in which a marked function is given that number, and halves are sized by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        rows = x.shape[0]
        hidden = F.dropout(scaled_by(self.first(x).relu(), rows), 0.5, self.training)
        left, right = hidden.view(rows, 2, 6).unbind(1)
        return self.second(left) * torch.arange(rows, device=x.device).unsqueeze(1) + right / rows, rows * 2


@eager_on_graph
def scaled_by(x: Tensor, number: int) -> Tensor:
    return x * number


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_sizes_that_vary(dynamic: bool | None, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 4: each size is captured by itself, steps of all of them in turns are eager's, and numbers are returned."""
    sizes = itertools.cycle((8, 8, 5, 7))

    def step(function: Any, module: nn.Module) -> Any:
        rows = next(sizes)
        y, twice = function(torch.randn(rows, 4, device=device))
        assert twice == 2 * rows
        y.square().sum().backward()
        found = state_of(module)
        descend(module)
        return y.detach(), found

    programs = assert_trains(Ragged(), step, device, options, steps=32, dynamic=dynamic)
    for rows in (8, 5, 7):
        mine = [p for p in programs if p.name.endswith(f"for sizes {rows}")]
        assert {p.num_eager_segments for p in mine} == {1}
        assert_replays(mine, 2)


class Scaled(nn.Module):
    """Batch norm, dropout, and a number that the caller passes; with ``dynamic=True`` all their floats vary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.2), nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.drop(self.norm(self.first(x)).exp()) / scale + 2 * scale


def test_floats_that_vary(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 4: the floats of modules, and those of callers, are constants: each set is captured by itself."""
    scales = itertools.cycle((0.5, 0.0, 0.5, -0.0))

    def step(function: Any, module: nn.Module) -> Tensor:
        y: Tensor = function(torch.rand(3, 4, device=device), next(scales))
        torch.where(y.isfinite(), y, y.sign()).sum().backward()
        module.zero_grad()
        return y.detach()

    programs = assert_trains(Scaled(), step, device, options, steps=28, dynamic=True)
    assert_replays(programs, 2)
    assert len({program.name for program in programs if program.replays}) == 2 * len(("0.5", "0.0", "-0.0"))


class Branching(nn.Module):
    """Two branches with weights of their own, one of which draws, and one of which branches again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, flags: Tensor) -> Tensor:
        def left(y: Tensor) -> Tensor:
            return F.dropout(self.left(y), 0.5, self.training).relu()

        def right(y: Tensor) -> Tensor:
            return torch.cond(flags[1], lambda y: self.right(y).exp(), lambda y: self.right(y.cos()).tanh(), (y,))

        y: Tensor = torch.cond(flags[0], left, right, (self.first(x).sin(),))
        return self.left(y) * 2


def test_branches(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 4: ``torch.cond`` is an eager step in both halves, whichever branch each step takes."""
    torch.manual_seed(0)
    model = Branching().to(device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)
    eager = torch.compile(twin, backend="eager", fullgraph=True)  # uncompiled, torch.cond compiles itself like that
    for step in range(12):
        x, flags = torch.randn(3, 4, device=device), torch.tensor([step % 2 == 0, step % 3 == 0], device=device)
        found = []
        for function, module in ((compiled, model), (eager, twin)):
            torch.manual_seed(step)
            y = function(x, flags)
            y.square().sum().backward()
            found.append((y.detach(), state_of(module), torch.rand(1, device=device)))
            module.zero_grad()
        assert_same(*found)
    report = breakable_backend.explain(compiled)
    assert_replays(report.programs, 4)
    assert {program.num_eager_segments for program in report.programs} == {1}, str(report)


class Quantised(Tensor):
    """Small integers times a scale, which may be quantised again: each op computes with their product."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Quantised:
        made = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)
        made.numbers, made.scale = numbers, scale
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Quantised:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls(
            (weight / scale).round().to(torch.int8), cls((scale * 1000).round().to(torch.int8), scale * 0 + 1e-3)
        )

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, _size: Any, _stride: Any) -> Quantised:
        return Quantised(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            kwargs = {name: value for name, value in (kwargs or {}).items() if name == "device"}
            return cls(func(args[0].numbers, **kwargs), func(args[0].scale, **kwargs))
        return func(*pytree.tree_map_only(cls, lambda x: x.numbers * x.scale, args), **(kwargs or {}))


class Adapted(nn.Module):
    """Quantised weights, which are frozen, and adapters that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(Quantised.of(torch.randn(6, 4)), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base).relu() + F.linear(F.linear(x, self.down), self.up)


@pytest.mark.parametrize("dynamic", [True, False])
def test_frozen_weights_of_a_subclass(dynamic: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 6: inner tensors of frozen quantised weights are inputs at fixed addresses; adapters get gradients."""
    torch.manual_seed(0)
    model = Adapted().to(device)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="breakable_cg", options=options, dynamic=dynamic)
    for _ in range(8):
        x, found = torch.randn(3, 4, device=device, requires_grad=True), []
        for function, module in ((compiled, model), (twin, twin)):
            x.grad = None
            y = function(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, module.down.grad, module.up.grad))
            descend(module)
            module.zero_grad()
        assert_same(*found)
    programs = breakable_backend.explain(compiled).programs
    assert_replays(programs, 2)
    forward = next(program for program in programs if program.name.startswith("forward"))
    assert [len(step.bridges) for step in forward.recordings[0].steps] == [1], "weights are copied in each call"


def test_gradients_that_are_placed_otherwise_by_result(
    device: torch.device, options: dict[str, Any], group: Any
) -> None:
    """Line 1: each backward places a DTensor's gradient as eager does, whichever results it is for, and is captured."""
    mesh = init_device_mesh(device.type, (1,))

    def both(x: Tensor, weight: DTensor) -> tuple[Tensor, Tensor]:
        rows, whole = DTensor.from_local(x, mesh, [Shard(0)]), DTensor.from_local(x, mesh, [Replicate()])
        return (rows @ weight).to_local().sin(), (whole @ weight).to_local().cos()

    compiled = torch.compile(both, backend="breakable_cg", options={**options, "training": True})
    weight = distribute_tensor(torch.randn(4, 4, device=device), mesh, [Replicate()]).requires_grad_()

    def grads(function: Callable[..., Any], *numbers: int) -> list[DTensor]:
        results = function(torch.ones(4, 4, device=device), weight)
        return [torch.autograd.grad(results[n].sum(), weight, retain_graph=True)[0] for n in numbers]

    placements = set()
    for numbers in ((0, 1), (0,), (1,), (0,), (1,), (0, 1), (1, 0), (0,), (1,), (1, 0, 1)):
        for mine, theirs in zip(grads(compiled, *numbers), grads(both, *numbers), strict=True):
            assert mine.placements == theirs.placements
            assert_same(mine.to_local(), theirs.to_local())
            placements.add(mine.placements)
    assert len(placements) == 2
    programs = breakable_backend.explain(compiled).programs
    assert [program.replays >= 3 for program in programs] == [True] * 3, programs


def test_gradients_that_cannot_be_traced(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line 9: gradients for which no backward can be traced are an error once, and the graph is eager from then on."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.sin() * 2).exp(), x.cos() * 3

    compiled, x = torch.compile(both, backend="breakable_cg", options=options), torch.rand(4, device=device)
    x.requires_grad_()

    def grad(function: Callable[..., Any], number: int) -> Tensor:
        return torch.autograd.grad(function(x)[number].sum(), x)[0]

    for _ in range(3):
        assert_same(grad(compiled, 0), grad(both, 0))

    def refused(halves: Halves, joint: Any) -> Any:
        raise CannotLower("no reason")

    monkeypatch.setattr(Halves, "_backward", refused)
    with pytest.raises(ReplayError, match="not traced for: no reason") as caught:
        grad(compiled, 1)
    assert "it is eager from now on" in str(caught.value)
    for number in (1, 0, 1):
        assert_same(grad(compiled, number), grad(both, number))


def test_too_many_sizes(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 9 and 10: sizes beyond a bound run eagerly, right, and with a line in the report."""
    model = Mlp().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options, dynamic=True)
    for rows in range(2, 2 + MAX_SIZES + 2):
        for _ in range(5):
            x = torch.randn(rows, 4, device=device, requires_grad=True)
            results = []
            for function in (compiled, model):
                torch.manual_seed(rows)
                results.append(torch.autograd.grad(function(x).square().sum(), (x, *model.parameters())))
            assert_same(*results)
    report = breakable_backend.explain(compiled)
    assert len([p for p in report.programs if p.replays and p.name.startswith("forward")]) == MAX_SIZES
    (graph,) = report.eager_graphs
    assert "more than 8 sets of sizes" in graph.why


class Noting(nn.Module):
    """Counts in buffers, and returns what shares memory with arguments, parameters and other results, without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.steps: Tensor
        self.mean: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        y = self.layer(x)
        self.mean *= 0.9
        self.mean[:2] += 0.1 * y.detach().mean()
        loss = (y.square() * self.mean.clone()).mean()
        self.last = loss.detach()
        views = {"row": x[0], "weight": self.layer.weight.detach(), "values": y.detach(), "part": y.detach()[1:].t()}
        return {"loss": loss, "log": loss.detach(), "y": y, **views}


def test_outputs_that_share_memory(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: written buffers stay what they are; detached results and views of arguments are eager's aliases."""
    turns = iter([*range(9)] * 2)

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        turn, x, steps = next(turns), torch.rand(3, 4, device=device), module.steps
        got = function(x)
        assert module.steps is steps
        assert got["row"]._base is x
        for one, other in (("log", "loss"), ("values", "y"), ("part", "y")):
            assert _torch.storage_key(got[one]) == _torch.storage_key(got[other])
        assert _torch.storage_key(got["weight"]) == _torch.storage_key(module.layer.weight)
        loss = got["loss"] + got["y"].sum()
        if turn > 6:
            got["values"].mul_(2)  # a backward reads these values
        with pytest.raises(RuntimeError, match="by an inplace operation") if turn > 6 else contextlib.nullcontext():
            loss.backward()
        descend(module)
        return {key: value.detach().clone() for key, value in got.items()}, module.last

    assert_replays(assert_trains(Noting(), step, device, options, 9), 3)


def test_an_output_without_history(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a view made under ``no_grad`` needs a gradient and has no history, so its graph is eager, with the reason."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        with torch.no_grad():
            return y, y.view(-1)

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(3):
        x = torch.rand(3, 4, device=device, requires_grad=True)
        got, want = compiled(x), function(x)
        assert_same(got, want)
        assert_same(torch.autograd.grad(got[0].sum(), x), torch.autograd.grad(want[0].sum(), x))
    assert "an output that needs some has no history" in str(breakable_backend.explain(compiled))


@pytest.mark.parametrize("change", ["frozen", "unfrozen", "transposed"])
def test_parameters_that_dynamo_does_not_look_at(
    change: str, device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line 3: on a torch whose Dynamo does not notice what is done to a parameter in place, a captured graph looks itself."""
    monkeypatch.setattr(_torch, "may_keep_stale_graphs", lambda: True)
    options |= {"guard_filter_fn": lambda guards: [False] * len(guards)}

    def step(function: Any, module: nn.Module) -> Tensor:
        turn = next(turns)
        if turn in (0, 5):
            module.first.requires_grad_((turn == 0) is (change != "unfrozen"))
        if turn == 5 and change == "transposed":
            module.first.requires_grad_()
            module.first.weight.data = module.first.weight.detach().t().contiguous().t()
        module.zero_grad()
        loss = function(torch.rand(3, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    turns = iter([*range(8)] * 2)
    programs = assert_trains(Mlp(), step, device, options)
    assert_replays(programs, 1)
    (forward,) = (program for program in programs if program.name.startswith("forward"))
    assert [why for why in forward.plain_calls if "Dynamo has not noticed" in why] and forward.replays < 5


def test_too_many_patterns(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 9 and 10: no more backwards are kept than a bound allows, however many sets of results are run backward."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 2) for _ in range(5))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.body(x).tanh()
            return [head(x) for head in self.heads]

    model = Heads().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    sets = [[number for number in range(5) if kind >> number & 1] for kind in range(1, 32)]
    for wanted in (sets[-1], sets[-1], *sets[: MAX_PATTERNS + 3]):
        x = torch.rand(3, 4, device=device)
        found = []
        for function in (compiled, model):
            model.zero_grad()
            results, pending = function(x), function(x)
            for each in (results, pending):
                torch.stack([each[number] for number in wanted]).square().sum().backward()
            found.append(state_of(model))
        assert_same(*found)
        assert len(executors_of(compiled)) <= 1 + MAX_PATTERNS + 1, "a forward, its backwards, and the one too many"
    report = breakable_backend.explain(compiled)
    assert "more than 16 sets of its results" in str(report)
    assert not any(program.recordings for program in report.programs)


def test_too_many_sets_of_missing_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 9 and 10: the same for sets of arguments on which no result of a marked function depends."""
    taken: list[int] = [*range(5)]

    @eager_on_graph
    def some(x: Tensor, *others: Tensor) -> Tensor:
        return x * sum(others[number] for number in taken)

    class Gated(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.ParameterList(torch.rand(8) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(some(self.first(x).relu(), *(gate.exp() for gate in self.gates)))

    counts = {True: itertools.count(), False: itertools.count()}

    def step(function: Any, module: Any) -> Any:
        number = max(0, next(counts[function is module]) - 6)
        taken[:] = [place for place in range(5) if 31 - number >> place & 1]
        return mlp(function, module)

    torch.manual_seed(0)
    mlp, mine = mlp_step(device), Gated().to(device)
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    assert_same(trained(compiled, mine, step, 20), trained(theirs, theirs, step, 20))
    assert_replays(breakable_backend.explain(compiled).programs, 0)
    assert_same(trained(compiled, mine, step, 6), trained(theirs, theirs, step, 6))
    assert len(executors_of(compiled)) <= 1 + MAX_PATTERNS + 1, "a forward, its backwards, and the one too many"
    assert "more than 16 sets of them were missing" in str(breakable_backend.explain(compiled))


def test_graphs_that_are_not_taken(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: an output that views an argument, and a written leaf's history are eager, with the reason."""
    weight = torch.rand(4, device=device, requires_grad=True)

    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight, x.view(2, 2)

    for function, why in ((views, "views, an argument"), (lambda x: (x * weight).view(2, 2)[0], "")):
        compiled = torch.compile(function, backend="breakable_cg", options=options)
        for _ in range(5):
            x = torch.rand(4, device=device, requires_grad=True)
            got, want = compiled(x), function(x)
            assert_same(got, want)
            first = got[0] if isinstance(got, tuple) else got
            first.sum().backward()
        if why:
            assert why in str(breakable_backend.explain(compiled))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
@pytest.mark.parametrize("part", [lambda x: x, lambda x: x[0]], ids=["whole", "a view"])
def test_arguments_with_a_history_that_are_written(
    part: Callable[[Tensor], Tensor], device: torch.device, options: dict[str, Any]
) -> None:
    """Line 9: a graph that writes such an argument is eager. The reason is not autograd's error about the trace's leaves."""

    def function(x: Tensor) -> Tensor:
        part(x).relu_()
        return (x * 2).sin()

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    for _ in range(4):
        one = torch.randn(2, 3, device=device, requires_grad=True)
        other = one.detach().clone().requires_grad_()
        got, want = compiled(one * 1), function(other * 1)
        for result in (got, want):
            result.sum().backward()
        assert_same([got, one.grad], [want, other.grad])
    report = str(breakable_backend.explain(compiled))
    assert "it writes an argument that needs gradients" in report
    assert "return a new tensor in place of the write" in report


def test_threads(device: torch.device, options: dict[str, Any]) -> None:
    """Line 11: threads that train models of one class at once get their own gradients."""
    torch.manual_seed(0)
    models = [Mlp().to(device).eval() for _ in range(3)]
    inputs = [torch.rand(3, 4, device=device) for _ in range(6)]
    found: dict[int, list[Any]] = {}
    compiled = [torch.compile(model, backend="breakable_cg", options=options) for model in models]
    for function in compiled:
        function(inputs[0]).sum().backward()

    def run(number: int) -> None:
        for x in inputs * 3:
            models[number].zero_grad()
            compiled[number](x).square().sum().backward()
            found.setdefault(number, []).append([parameter.grad.clone() for parameter in models[number].parameters()])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, model in enumerate(models):
        want = []
        for x in inputs * 3:
            model.zero_grad()
            model(x).square().sum().backward()
            want.append([parameter.grad.clone() for parameter in model.parameters()])
        assert_same(found[number], want)


def test_everything_is_released(device: torch.device, options: dict[str, Any]) -> None:
    """Line 10: after a reset nothing of both halves is left in the pool."""
    compiled = torch.compile(Mlp().to(device), backend="breakable_cg", options=options)
    for _ in range(6):
        compiled(torch.rand(3, 4, device=device)).square().sum().backward()
    (driver,) = {executor.driver for executor in executors_of(compiled)}
    assert driver.live_graphs() == 2
    breakable_backend.reset(compiled)
    gc.collect()
    breakable_cg.free()
    assert driver.live_graphs() == 0
    assert driver.live_blocks() == 0


def test_a_pending_forward_outlives_its_recording(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 10: what a forward saved stays until nobody can run it backward; then its memory is freed too."""
    model = Mlp().to(device).eval()
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(6):
        compiled(torch.rand(3, 4, device=device)).square().sum().backward()
    (driver,) = {executor.driver for executor in executors_of(compiled)}
    x, parameters = torch.rand(3, 4, device=device), list(model.parameters())
    pending = compiled(x).square().sum()
    breakable_backend.reset(compiled)
    gc.collect()
    breakable_cg.free()
    taken = [torch.full((1 << 10,), torch.nan, device=device) for _ in range(256)]
    mine = torch.autograd.grad(pending, parameters)
    assert_same(mine, torch.autograd.grad(model(x).square().sum(), parameters))
    del pending, taken, mine
    gc.collect()
    breakable_cg.free()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    assert (driver.live_graphs(), driver.live_blocks(), driver.pool_bytes()) == (0, 0, 0)


@pytest.mark.gpu
def test_what_was_saved_takes_no_block() -> None:
    """What a forward saves is in the pool of its slot, of which nothing is allocated between calls, as by hand."""
    device = torch.device("cuda")
    compiled = torch.compile(Mlp().to(device), backend="breakable_cg", options={"driver": "cuda"})
    for _ in range(8):
        compiled(torch.rand(3, 4, device=device)).square().sum().backward()
    (driver,) = {executor.driver for executor in executors_of(compiled)}
    assert driver.live_graphs() == 2
    assert driver.live_blocks() == 0
    assert driver.pool_bytes() > 0


# --- what loops do around it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused", "capturable", "compiled", "momentum"])
def test_optimizers(kind: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 1 and 3: each kind of optimizer, a compiled one in the same loop too, finds eager's gradients and leaves its weights."""
    if kind == "capturable" and device.type != "cuda":
        pytest.skip("torch's capturable optimizers need a GPU")
    made: dict[nn.Module, Any] = {}

    def optimizer_of(function: Any, module: nn.Module) -> Any:
        if kind == "momentum":
            return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        chosen = {kind: True} if kind in ("foreach", "fused", "capturable") else {"foreach": False}
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, **chosen)
        if kind == "compiled":  # torch's AdamW computes otherwise while it is compiled, so eager's is traced too
            chosen = {"backend": "eager"} if function is module else {"backend": "breakable_cg", "options": options}
            optimizer.step = torch.compile(optimizer.step, **chosen)
        return optimizer

    def step(function: Any, module: nn.Module) -> Any:
        optimizer = made.get(module) or made.setdefault(module, optimizer_of(function, module))
        loss = function(torch.rand(3, 4, device=device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        return loss.detach(), norm

    assert_replays([p for p in assert_trains(Mlp(), step, device, options, 9) if "of graph" in p.name], 3)


def test_gradients_that_are_kept_in_another_dtype(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: what a hook adds to a sum in float32 of gradients in bfloat16, which it lets go of, is eager's sum."""
    sums: dict[nn.Module, dict[str, Tensor]] = {}

    def watch(module: nn.Module) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in module.named_parameters()}
        for name, parameter in module.named_parameters():

            def add(parameter: Tensor, name: str = name) -> None:
                assert parameter.grad is not None
                found[name].add_(parameter.grad)
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(add)
        return found

    def step(function: Any, module: nn.Module) -> Any:
        found = sums.get(module) or sums.setdefault(module, watch(module))
        for _ in range(2):
            function(torch.rand(3, 4, device=device, dtype=torch.bfloat16)).square().mean().backward()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.sub_(found[name].to(parameter.dtype), alpha=0.1)
        return [value.clone() for value in found.values()]

    assert_replays(assert_trains(Mlp().to(torch.bfloat16), step, device, options), 6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo asks an argument that is no leaf for it
def test_hooks_on_modules(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: hooks on the compiled module, and on a module inside of it, see and change what they do in eager."""
    told: list[Any] = []

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Mlp(), nn.Linear(4, 4)
            self.inner.first.register_forward_hook(lambda _module, _args, result: result * 1.5)
            self.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
            self.register_full_backward_hook(
                lambda _module, inputs, outputs: told.append([value.detach() for value in (*inputs, *outputs)])
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x).tanh())

    def step(function: Any, module: nn.Module) -> Any:
        told.clear()
        module.zero_grad()
        x = torch.rand(3, 4, device=device, requires_grad=True)
        loss = function(x).square().mean()
        loss.backward()
        descend(module)
        return loss.detach(), x.grad, list(told)

    assert_trains(Outer(), step, device, options)


def test_saved_tensors_on_the_host(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: steps whose saved tensors are offloaded are eager's, between others that are replayed."""
    numbers = itertools.cycle(range(3))

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        offload = torch.autograd.graph.save_on_cpu() if next(numbers) == 2 else contextlib.nullcontext()
        with offload:
            loss = function(torch.rand(3, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(Mlp(), step, device, options, 12), 3)


def test_parts_without_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: parts under no_grad, detached values, and weights that are frozen and thawed between steps."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student, self.head = Mlp(), Mlp(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self.teacher(x).tanh()
            made = self.student(x)
            return F.mse_loss(made, wanted) + F.mse_loss(self.head(made.detach()), wanted)

    calls = itertools.count()

    def step(function: Any, module: Any) -> Any:
        module.zero_grad()
        for parameter in module.head.parameters():
            parameter.requires_grad_(next(calls) // 24 % 2 == 0)
        loss = function(torch.rand(3, 4, device=device))
        loss.backward()
        descend(module)
        return loss.detach()

    assert_replays(assert_trains(Parts(), step, device, options, 24), 6)


def test_an_ensemble_and_a_pipeline(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: one compiled module trains with two sets of weights, and micro batches come back in the order of a pipeline."""
    model = Mlp().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(6):
        results = []
        for function in (compiled, model):
            torch.manual_seed(1)
            waiting, found = [], []
            for place in range(5):  # two forwards ahead of the backwards
                waiting.append(function(torch.rand(3, 4, device=device)).square().sum())
                if place >= 2:
                    waiting.pop(0).backward()
            for loss in waiting:
                loss.backward()
            found += [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            results.append(found)
        assert_same(*results)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
    assert_replays(breakable_backend.explain(compiled).programs, 6)


# --- memory -----------------------------------------------------------------------------------------------------------------


def test_too_little_memory(device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines 9 and 10: halves that would leave too little memory are plain and right, the report says so, and they are tried again."""
    room = False
    kind = CudaDriver if device.type == "cuda" else TapeDriver
    monkeypatch.setattr(kind, "has_room", lambda *_: room)
    mine = Mlp().to(device)
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="breakable_cg", options=options)
    step = mlp_step(device)
    assert_same(trained(compiled, mine, step, 6), trained(theirs, theirs, step, 6))
    report = breakable_backend.explain(compiled)
    assert not any(program.captures for program in report.programs)
    assert "could not be recorded: too little memory is free" in str(report)
    room = True
    assert_same(trained(compiled, mine, step, 10), trained(theirs, theirs, step, 10))
    assert_replays(breakable_backend.explain(compiled).programs, 1)


@pytest.mark.gpu
def test_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 10: room is what is free, and what the allocator holds unused, without a share for the rest of the program."""
    driver = CudaDriver(torch.device("cuda", 0))
    free, total = torch.cuda.mem_get_info(0)
    assert driver.has_room(0) is (free > 0.1 * total)
    monkeypatch.setattr("breakable_backend.drivers.cuda.HEADROOM", 0.0)
    assert driver.has_room(1024)
    assert not driver.has_room(2 * total)


@pytest.mark.gpu
def test_free_memory_of_a_pool_is_no_room() -> None:
    """Line 9: the rest of the program cannot get back what graphs have used for themselves."""
    driver = CudaDriver(torch.device("cuda", 0))
    with driver.lock:
        stream = driver.begin()
        with driver.recording():
            graph, _ = driver.capture(lambda: torch.ones(1 << 28, device=driver.device).sum())
        driver.end(stream)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(0)
    assert driver.pool_bytes() >= 1 << 30
    assert not driver.has_room(int(free - 0.1 * total) + (1 << 29))
    driver.release([graph])


# --- compare mode and the report --------------------------------------------------------------------------------------------

factor = [2.0]
"""What a hostile op reads behind the back of all graphs."""


@torch.library.custom_op("training::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    """``x`` times a number that a capture freezes."""
    return x * factor[0]


@torch.library.custom_op("training::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    """``x``, whose gradient is scaled."""
    return x * 1


scaled.register_fake(torch.empty_like)
kept.register_fake(torch.empty_like)
kept.register_autograd(lambda ctx, gradient: scaled(gradient))


@pytest.fixture
def compared(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compare mode for training."""
    yield {**options, "debug": "compare", "min_kernels": 1}
    factor[0] = 2.0


@pytest.mark.parametrize("model", [Gpt, Mlp])
def test_compared(model: type[nn.Module], device: torch.device, compared: dict[str, Any]) -> None:
    """Line 9: in compare mode steps of training are eager's, from replays of both halves that were compared."""

    def step(function: Any, module: nn.Module) -> Any:
        module.zero_grad()
        if model is Gpt:
            loss = function(*torch.randint(20, (2, 3, 6), device=device).unbind())[0]
        else:
            loss = function(torch.rand(3, 4, device=device)).square().mean()
        loss.backward()
        descend(module)
        return loss.detach()

    programs = assert_trains(model(), step, device, compared)
    assert_replays(programs, 3)
    assert {program.debug for program in programs} == {"compare"}


def test_compare_names_a_wrong_gradient(device: torch.device, compared: dict[str, Any]) -> None:
    """Line 9: the first wrong gradient is named with the half, the step, the op, the user's line and the likely cause."""
    model = Mlp().to(device)
    compiled = torch.compile(lambda x: kept(model(x)).sum(), backend="breakable_cg", options=compared)
    x = torch.rand(3, 4, device=device)
    for _ in range(5):
        compiled(x).backward()
    factor[0] = 3.0
    with pytest.raises(DivergenceError, match=r"backward of graph .*, step 0 .captured.: .* frozen scalar") as caught:
        compiled(x).backward()
    error = caught.value
    assert (error.cause, error.kind, error.op) == ("frozen scalar", "captured", "training::scaled")


def test_compare_sees_what_is_saved(device: torch.device, compared: dict[str, Any]) -> None:
    """Line 9: a result that eager's backward would read, written where autograd cannot see it, is named before the backward."""
    weight = torch.rand(4, 4, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: (x @ weight + 1).tanh(), backend="breakable_cg", options=compared)
    for _ in range(5):
        compiled(torch.rand(4, 4, device=device)).sum().backward()
    y = compiled(torch.rand(4, 4, device=device))
    y.data.mul_(2)
    with pytest.raises(DivergenceError, match=r"tanh, made by .*tanh, is not what the forward saved.*\.data") as caught:
        y.sum().backward()
    assert (caught.value.kind, caught.value.cause) == ("saved", "stale bridge")
    weight.grad = None
    compiled(torch.rand(4, 4, device=device)).sum().backward()  # the next step is right again


def test_report_of_slots(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: the report tells slots, forwards that are pending, and the bytes that are saved for backwards."""
    model = Mlp().to(device)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(4):
        compiled(torch.rand(3, 4, device=device)).sum().backward()
    for pending in (1, 2):
        losses = [compiled(torch.rand(3, 4, device=device)).sum() for _ in range(pending)]
        (forward,) = [p for p in breakable_backend.explain(compiled).programs if p.name.startswith("forward")]
        assert (forward.slots, forward.pending) == (pending, pending)
        assert forward.saved_bytes >= pending * 3 * 8 * 4
        assert f"slots {pending}, pending forwards {pending}, saved for backwards" in str(
            breakable_backend.explain(compiled)
        )
        sum(losses).backward()  # type: ignore[union-attr]
    del losses
    (forward,) = [p for p in breakable_backend.explain(compiled).programs if p.name.startswith("forward")]
    assert (forward.slots, forward.pending) == (2, 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of Dynamo, with every backend
def test_a_step_that_is_compiled_whole(device: torch.device, options: dict[str, Any]) -> None:
    """Where a compiled function runs the backward itself, Dynamo compiles no code of this package, and nothing again."""
    model, eager = Mlp().to(device), Mlp().to(device)
    eager.load_state_dict(model.state_dict())

    def step(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    compiled = torch.compile(step, backend="breakable_cg", options=options)
    for call in range(6):
        x = torch.randn(3, 4, device=device)
        torch.manual_seed(call)
        want = step(eager, x)
        torch.manual_seed(call)
        assert_same(compiled(model, x), want)
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert_same(ours.grad, theirs.grad)
    forwards = [executor for executor in executors_of() if isinstance(executor, ForwardExecutor)]
    assert len(forwards) == 1
    assert len(executors_of()) <= 3  # and the loss on its way back, where torch's grad mode differs
