"""Gradients at the second door: forward, backward and optimizer in one ``with capture(graph):``, with eager steps anywhere."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from breakable_backend import (
    BreakableError,
    CaptureError,
    EagerOutputError,
    ReplayError,
    capture,
    eager_on_graph,
    eager_region,
)
from doors import MakeGraph, bend, marked_bend, shape_of

Step = Callable[[nn.Module, Any, Tensor], Tensor]
WIDTH = 8


def scaled(x: Tensor, w: Tensor) -> Tensor:
    """Looks at values, and saves what it computes."""
    return x * w.exp() if x.sum() > 0 else (x * w).sin()


marked_scaled = eager_on_graph(scaled)


class Model(nn.Module):
    """Layers with a part in between that is ``part``, of a hidden state and a parameter."""

    def __init__(self, part: Callable[..., Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.dropout = nn.Dropout(dropout)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.part(self.first(x), self.weight).relu())
        hidden = hidden + self.part(hidden.cos(), self.weight * 2)
        return self.dropout(self.last(hidden)).square().mean()


def losses(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    """A whole step of training."""
    optimizer.zero_grad(set_to_none=False)
    loss = model(x)
    loss.backward()
    optimizer.step()
    return loss.detach() * 1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), 0.01, fused=True, capturable=on_gpu)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values have the same bits; None is like None alone."""
    if ours is None or theirs is None:
        return ours is theirs
    octets = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return torch.equal(*octets)


def assert_alike(ours: nn.Module, theirs: nn.Module, what: str) -> None:
    """Parameters, buffers and gradients of both have the same bits."""
    mine, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, parameter in mine.items():
        assert same(parameter, others[name]), f"{what}: {name}"
        assert same(parameter.grad, others[name].grad), f"{what}: the gradient of {name}"
    for (name, buffer), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert same(buffer, other), f"{what}: {name}"


def train(
    make: MakeGraph,
    device: torch.device,
    ours: nn.Module,
    theirs: nn.Module,
    step: Step = losses,
    optimizer: Callable[[nn.Module], Any] = sgd,
    replays: int = 4,
    debug: str | None = None,
    inputs: Callable[[int], Tensor] = lambda number: torch.randn(4, WIDTH),
) -> str:
    """One step as it is, one that is captured, and replays, against eager's steps; returns the shape of the graph."""
    ours, theirs = ours.to(device), theirs.to(device)
    theirs.load_state_dict(ours.state_dict())
    optimizers = optimizer(ours), optimizer(theirs)
    x, graph = inputs(0).to(device), make()
    for number in range(replays + 2):
        x.copy_(inputs(number))
        torch.manual_seed(number)
        want = step(theirs, optimizers[1], x.clone())
        torch.manual_seed(number)
        if number == 0:
            got = step(ours, optimizers[0], x)
        elif number == 1:
            with capture(graph, debug=debug):
                got = step(ours, optimizers[0], x)
        else:
            graph.replay()
        assert same(got, want), f"step {number}"
        assert_alike(ours, theirs, f"step {number}")
    return shape_of(graph)


# --- whole steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_of_training(make: MakeGraph, device: torch.device, dropout: float, optimizer: Any) -> None:
    """Forward, backward and optimizer with marked functions in it train as eager does, with draws too."""
    ours, theirs = Model(marked_scaled, dropout), Model(scaled, dropout)
    assert train(make, device, ours, theirs, optimizer=optimizer) == "GEGEGEGEG"


def every_other(x: Tensor, w: Tensor) -> Tensor:
    """A result with gaps in its memory."""
    return torch.stack([x * w.exp(), x], -1)[..., 0]


@pytest.mark.parametrize("part", [scaled, every_other])
def test_a_compiled_model(part: Any, make: MakeGraph, device: torch.device, options: dict[str, Any]) -> None:
    """A step that calls a compiled model: what is marked in it is an eager step, in the forward and in the backward."""
    ours, theirs = Model(eager_on_graph(part)).to(device), Model(part)
    compiled = torch.compile(ours, backend="breakable_cg", options=options)
    for _ in range(4):
        compiled(torch.randn(4, WIDTH, device=device)).backward()
    ours.zero_grad()

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (compiled if model is ours else model)(x)
        loss.backward()
        optimizer.step()
        return loss.detach() * 1

    assert train(make, device, ours, theirs, step) == "GEGEGEGEG"


def test_gradients_that_are_none_before(make: MakeGraph, device: torch.device) -> None:
    """``zero_grad(set_to_none=True)`` in the body gives gradients memory of the graph's, which replays write."""

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(x)
        loss.backward()
        optimizer.step()
        return loss.detach() * 1

    train(make, device, Model(marked_scaled), Model(scaled), step)


def test_gradients_between_replays(make: MakeGraph, device: torch.device) -> None:
    """A gradient that the body makes is back after each replay; one that it adds to has to stay where it is."""

    def step(model: nn.Module, x: Tensor, to_none: bool) -> None:
        model.zero_grad(set_to_none=to_none)
        model(x).backward()

    ours, theirs = Model(marked_scaled).to(device), Model(scaled).to(device)
    theirs.load_state_dict(ours.state_dict())
    x, graph = torch.randn(4, WIDTH, device=device), make()
    step(theirs, x, to_none=False)
    with capture(graph):
        step(ours, x, to_none=True)
    for _ in range(3):
        ours.zero_grad()
        graph.replay()
        assert_alike(ours, theirs, "made in the body")
    with capture(graph):
        step(ours, x, to_none=False)
    graph.replay()
    assert_alike(ours, theirs, "added to")
    ours.zero_grad()
    with pytest.raises(ReplayError, match="grad of a Parameter of shape"):
        graph.replay()


def test_a_graph_of_autograds_that_is_kept(make: MakeGraph, device: torch.device) -> None:
    """What is left of an earlier forward holds nodes that are for another stream: an error on a GPU that says so."""
    model, x, graph = Model(marked_scaled).to(device), torch.ones(4, WIDTH, device=device), make()
    kept = model(x)
    if device.type == "cpu":
        with capture(graph):
            model(x).backward()
        graph.replay()
    else:
        with pytest.raises(CaptureError, match="whose parameter was first used there") as caught, capture(graph):
            model(x).backward()
        assert "the loss of a call" in caught.value.fix
    del kept


def test_a_loss_of_the_capture_that_is_kept(make: MakeGraph, device: torch.device) -> None:
    """A result that keeps the graph of autograd's alive changes nothing of replays."""
    ours, theirs = Model(marked_scaled).to(device), Model(scaled).to(device)
    theirs.load_state_dict(ours.state_dict())
    x, graph = torch.randn(4, WIDTH, device=device), make()
    with capture(graph):
        ours.zero_grad()
        loss = ours(x)
        loss.backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
        for _ in range(3):
            x.copy_(torch.randn(4, WIDTH))
            theirs.zero_grad()
            want = theirs(x.clone())
            want.backward()
            graph.replay()
            assert same(loss, want)
            assert_alike(ours, theirs, "replay")


def test_two_micro_batches(make: MakeGraph, device: torch.device) -> None:
    """Gradients add up over two forwards and backwards of one capture; both forwards may be pending."""

    def one_by_one(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        total = x.new_zeros(())
        for part in x.chunk(2):
            loss = model(part)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    def together(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        first, second = (model(part) for part in x.chunk(2))
        second.backward()
        first.backward()
        optimizer.step()
        return (first + second).detach()

    for step in (one_by_one, together):
        assert train(make, device, Model(marked_scaled, 0.2), Model(scaled, 0.2), step).count("E") == 8


def test_a_graph_that_is_retained(make: MakeGraph, device: torch.device) -> None:
    """Two backwards through one forward, in each replay."""

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(x)
        (loss * 3).backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        return loss.detach() * 1

    assert train(make, device, Model(marked_scaled), Model(scaled), step).count("E") == 6


def test_a_learning_rate_that_changes(make: MakeGraph, device: torch.device) -> None:
    """A learning rate that is a tensor is read by each replay."""
    rates: list[Tensor] = []

    def with_rate(model: nn.Module) -> torch.optim.Optimizer:
        rates.append(torch.tensor(0.01, device=device))
        return torch.optim.AdamW(model.parameters(), rates[-1], fused=True, capturable=device.type == "cuda")

    def inputs(number: int) -> Tensor:
        for rate in rates:
            rate.fill_(0.01 / (number + 1))
        return torch.randn(4, WIDTH)

    train(make, device, Model(marked_scaled), Model(scaled), optimizer=with_rate, inputs=inputs)


def test_clipping_and_scaling(make: MakeGraph, device: torch.device) -> None:
    """With GradScaler a step whose gradients are infinite is left out, at replay too, and the scale goes down and up."""
    scalers: dict[int, torch.amp.GradScaler] = {}
    scales: list[float] = []
    ours, theirs = Model(marked_scaled), Model(scaled)

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        new = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2)
        scaler = scalers.setdefault(id(model), new)
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        scaler.step(optimizer)
        scaler.update()
        if model is theirs:
            scales.append(scaler.get_scale())
        return torch.stack([loss.detach(), scaler._scale.reshape(())])  # type: ignore[union-attr]

    def inputs(number: int) -> Tensor:
        return torch.randn(4, WIDTH) * (1e30 if number in (2, 4) else 1)

    train(make, device, ours, theirs, step, adamw, replays=6, inputs=inputs)
    assert sorted(scales) != scales


def test_an_optimizer_that_is_an_eager_step(make: MakeGraph, device: torch.device) -> None:
    """An optimizer that no capture can hold is a marked function: it finds parameters and gradients themselves."""

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        update = eager_on_graph(lambda parameters: (nn.utils.clip_grad_norm_(parameters, 0.1), optimizer.step())[1:])
        optimizer.zero_grad(set_to_none=False)
        loss = model(x)
        loss.backward()
        update(list(model.parameters()))
        return loss.detach() * 1

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), 0.01, foreach=False)

    shape = train(make, device, Model(marked_scaled), Model(scaled), step, adam)
    assert shape == "GEGEGEGEGEG"


@pytest.mark.parametrize("debug", ["eager", "compare"])
def test_debug_modes(make: MakeGraph, device: torch.device, debug: str) -> None:
    """With every op eager, and with each segment compared with its ops, a step is the same."""
    assert train(make, device, Model(marked_scaled), Model(scaled), debug=debug) == "GEGEGEGEG"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(make: MakeGraph, device: torch.device, reentrant: bool) -> None:
    """A checkpoint of either kind around a marked function trains as in eager; a reentrant one runs it twice."""

    def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def part(x: Tensor, w: Tensor) -> Tensor:
            made = checkpoint(function, x, w, use_reentrant=reentrant, preserve_rng_state=False)
            assert isinstance(made, Tensor)
            return made

        return part

    ours, theirs = Model(checkpointed(marked_scaled)), Model(checkpointed(scaled))
    assert train(make, device, ours, theirs).count("E") == (6 if reentrant else 4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_checkpoint_that_keeps_the_random_state(make: MakeGraph, device: torch.device) -> None:
    """On a GPU a random state of one segment that is set in another one is an error: it would draw something else."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH)).to(device)
    weight, x = torch.rand(WIDTH, device=device), torch.rand(4, WIDTH, device=device)

    def step() -> None:
        made = checkpoint(lambda x: marked_scaled(model(x), weight), x, use_reentrant=False)
        assert isinstance(made, Tensor)
        made.square().mean().backward()

    step()
    model.zero_grad(set_to_none=False)
    with pytest.raises(CaptureError, match="set the state of the random generator"), capture(make()):
        step()


def test_ops_that_are_eager_in_both(make: MakeGraph, device: torch.device) -> None:
    """Ops that no graph can hold are eager steps in the forward, and their gradients pass."""

    def part(x: Tensor, w: Tensor) -> Tensor:
        with eager_region():
            y = x.tanh() * w
        values = torch.linalg.eigvalsh(y.t() @ y + torch.eye(WIDTH, device=x.device))
        return y * values.log().mean()

    train(make, device, Model(part), Model(part))


# --- marked functions ---------------------------------------------------------------------------------------------------


def several(x: Tensor, w: Tensor) -> Tensor:
    made = two_results(x, w)
    return made["a"] * made["others"][0] + made["others"][1].float() + made["plain"]


def two_results(x: Tensor, w: Tensor) -> dict[str, Any]:
    y = x * w
    return {"a": y.exp(), "others": [y.sin(), y.argsort(-1)], "unused": y.cos(), "cut": y.detach(), "plain": 3}


def shared(x: Tensor, w: Tensor) -> Tensor:
    a, b = parts_of_one(x, w)
    return torch.cat([a * 2, b.sin()], -1)


def parts_of_one(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (x * w).chunk(2, -1)


def handed_back(x: Tensor, w: Tensor) -> Tensor:
    a, b, c = back(x, w)
    return a.sin() * c + torch.cat([b, b.exp()], -1)


def back(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert bool((x == x).all())
    return x, x[:, 4:], w


def twice_the_same(x: Tensor, w: Tensor) -> Tensor:
    return products([x, w, x], scale=w * 1)


def products(given: list[Tensor], scale: Tensor) -> Tensor:
    assert given[0] is given[2]
    return given[0] * given[1] + given[2] * scale if bool(given[0].sum() > 0) else given[2].sin() * scale


def drawing(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.dropout(x.tanh() * w, 0.5) * x.exp()


def for_nothing(x: Tensor, w: Tensor) -> Tensor:
    return mostly_cut(x, w) + x


def mostly_cut(x: Tensor, w: Tensor) -> Tensor:
    return x.detach() * w


def mixed(x: Tensor, w: Tensor) -> Tensor:
    y = scaled(x, w)
    y.mul_(2)  # captured code writes what it was given
    return y


PARTS: dict[str, tuple[Callable[..., Any], str]] = {
    "several results": (several, "two_results"),
    "results of one memory": (shared, "parts_of_one"),
    "arguments that are results": (handed_back, "back"),
    "containers, the same twice": (twice_the_same, "products"),
    "cut off": (for_nothing, "mostly_cut"),
    "written by captured code": (mixed, "scaled"),
}


@pytest.mark.parametrize("name", PARTS)
def test_marked_functions(make: MakeGraph, device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Gradients pass whatever a marked function takes and returns."""
    outer, inner = PARTS[name]
    plain = globals()[inner]
    marked = eager_on_graph(plain)

    def part(x: Tensor, w: Tensor) -> Tensor:
        monkeypatch.setitem(globals(), inner, marked)
        try:
            return outer(x, w)
        finally:
            monkeypatch.setitem(globals(), inner, plain)

    assert "E" in train(make, device, Model(part), Model(outer))


def test_run_again_in_backward(make: MakeGraph, device: torch.device) -> None:
    """With ``recompute`` the function runs twice in each replay, the second time from the same random state."""
    runs = []

    def drawn(x: Tensor, w: Tensor) -> Tensor:
        runs.append(1)
        return drawing(x, w)

    train(make, device, Model(eager_on_graph(recompute=True)(drawn)), Model(drawing), replays=2)
    assert len(runs) == 4 * 4


def test_a_backward_of_its_own(make: MakeGraph, device: torch.device) -> None:
    """With ``backward`` that function computes the gradients, in each replay."""
    seen = []

    def way_back(context: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = context.args
        seen.append(context.result.shape)
        return grad * w, (grad * x).sum(0)

    marked = eager_on_graph(backward=way_back)(lambda x, w: torch.mul(x, w))
    train(make, device, Model(marked), Model(torch.mul), replays=2)
    assert len(seen) == 2 * 4


class Gate(nn.Module):
    """A marked method: its parameters are those of a module among the arguments."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.run = Gate.gate if marked else Gate.gate.run_eager  # type: ignore[attr-defined]

    @eager_on_graph
    def gate(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        return y * y.sigmoid() if y.sum() > 0 else y * 2

    def forward(self, x: Tensor) -> Tensor:
        return (self.run(self, x.sin()) + self.run(self, x.cos())).square().mean()


def test_parameters_of_a_module(make: MakeGraph, device: torch.device) -> None:
    """Parameters of a module among the arguments get their gradients, and None where eager gives none."""
    assert train(make, device, Gate(True), Gate(False)) == "GEGEGEGEG"


def test_hooks_on_parameters_run_once(make: MakeGraph, device: torch.device) -> None:
    """A hook on a parameter sees the whole gradient, once; what it does is captured."""
    ours, theirs = Gate(True), Gate(False)
    for module in (ours, theirs):
        module.linear.weight.register_hook(lambda grad: grad * 0.5)
    train(make, device, ours, theirs)


def test_what_a_function_closes_over(make: MakeGraph, device: torch.device) -> None:
    """Parameters that a function closes over get gradients too."""

    def closing(mark: Callable[..., Any]) -> nn.Module:
        model: nn.Module = Model(lambda x, w: closed(x))
        closed = mark(lambda x: scaled(x, model.weight))
        return model

    train(make, device, closing(eager_on_graph), closing(lambda function: function))


class Experts(nn.Module):
    """Which expert computes depends on values."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.run = eager_on_graph(Experts.choose) if marked else Experts.choose

    def choose(self, x: Tensor) -> Tensor:
        return self.experts[int(x.abs().sum() * 7) % 3](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x * 2).square().mean()


def test_gradients_that_come_and_go(make: MakeGraph, device: torch.device) -> None:
    """Where a gradient is there already, a parameter that a call does not use keeps its bits, and gets some in another call."""

    def filled(model: nn.Module) -> torch.optim.Optimizer:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, -0.0)
        return sgd(model)

    def adds_up(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        loss = model(x)
        loss.backward()
        return loss.detach() * 1

    train(make, device, Experts(True), Experts(False), adds_up, filled, replays=8)


def test_gradients_to_inputs(make: MakeGraph, device: torch.device) -> None:
    """A tensor from outside that is a leaf gets its gradient, be it an argument of a marked function or not."""
    for function in (lambda x: marked_bend(x), lambda x: marked_bend(x * 2)):
        x = torch.randn(4, device=device, requires_grad=True)
        x.grad = torch.zeros_like(x)
        graph = make()
        with capture(graph):
            x.grad.zero_()
            function(x).square().sum().backward()
        for sign in (1, -1, 1):
            twin = (torch.rand(4, device=device) * sign).requires_grad_()
            with torch.no_grad():
                x.copy_(twin)
            graph.replay()
            marked = function.__code__.co_consts[1:] == (2,)
            bend(twin * 2 if marked else twin).square().sum().backward()
            assert same(x.grad, twin.grad)


def test_a_leaf_of_the_body(make: MakeGraph, device: torch.device) -> None:
    """``autograd.grad`` in the body, with respect to a tensor that the body has made."""
    x, graph = torch.randn(4, device=device), make()

    def body(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = (x + 1).requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf).exp().sum(), leaf)
        return grad * 2

    with capture(graph):
        y = body(x, marked_bend)
    for number in range(3):
        x.copy_(torch.randn(4) - number)
        graph.replay()
        assert same(y, body(x.clone(), bend))


def test_nothing_is_kept_behind_the_backward(make: MakeGraph, device: torch.device) -> None:
    """What a function saves lives from its forward to its backward, in each replay, and no longer."""
    kept: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    @eager_on_graph
    def saves(x: Tensor) -> Tensor:
        y = x * 2
        kept[:] = [weakref.ref(y)]
        return (y * y).sin() * 1

    @eager_on_graph
    def look() -> None:
        alive.append(kept[0]() is not None)

    graph = make()
    x, weight = torch.randn(4, device=device), torch.ones(4, device=device, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    with capture(graph):
        loss = saves(x * weight).sum()
        look()
        loss.backward()
        look()
    graph.replay()
    gc.collect()
    assert alive == [True, False, True, False]
    with capture(graph):
        saves(x * weight)  # nobody runs this backward
        look()
    alive.clear()
    graph.replay()
    assert alive == [False]


# --- what is refused ----------------------------------------------------------------------------------------------------


class OfItsOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@eager_on_graph(mutates_args=("x",))
def writes(x: Tensor) -> Tensor:
    return x.mul_(2)


def test_refused_while_capturing(make: MakeGraph, device: torch.device) -> None:
    """What would lose a gradient, or give a wrong one, is an error that says where and what to do."""
    x, hidden = torch.ones(4, device=device), []
    weight = torch.ones(4, device=device, requires_grad=True)

    def own(y: Tensor) -> Tensor:
        return OfItsOwn.apply(y)  # type: ignore[no-any-return]

    def clears(y: Tensor) -> None:
        weight.grad = None

    def double(y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(marked_bend(y).pow(3).sum(), y, create_graph=True)
        return grad.sum()

    def closes(y: Tensor) -> Tensor:
        hidden[:] = [y]
        return eager_on_graph(lambda: hidden[0] * 2)()  # type: ignore[no-any-return]

    cases: dict[str, Callable[[Tensor], Any]] = {
        "writes x, an argument that needs gradients": writes,
        "with a gradient of its own": eager_on_graph(own),
        "a second derivative": double,
        r"the \.grad of a Tensor of shape": eager_on_graph(clears),
        "gradients of a tensor that is not an argument": closes,
        "a capture_stub, which has no gradients": eager_on_graph(capture_stub=torch.empty_like)(bend),
    }
    for text, function in cases.items():
        weight.grad = torch.ones(4, device=device)
        with pytest.raises(CaptureError, match=text) as caught, capture(make()):
            function(x * weight)
            pytest.fail(text)
        assert "test_capture_gradients.py" in caught.value.where, text
        assert caught.value.fix, text


def test_gradients_of_arguments_that_go_elsewhere(make: MakeGraph, device: torch.device) -> None:
    """A hook on an argument, and a gradient that comes to one otherwise than through the result, are errors: in a replay too."""
    weight, kept = torch.ones(4, device=device, requires_grad=True), list[Tensor]()

    def hooked(x: Tensor) -> Tensor:
        x.register_hook(torch.neg)
        return x * 2

    def hooked_view(x: Tensor) -> Tensor:
        y = x.view_as(x)
        y.register_hook(torch.neg)
        return y

    def keeps(x: Tensor) -> Tensor:
        kept[:] = [x]
        return x * 2

    def differentiates(x: Tensor) -> Tensor:
        x.sum().backward()
        return x * 2

    cases: list[tuple[Callable[[Tensor], Tensor], str, type[BreakableError]]] = [
        (hooked, "registered a hook on an argument", EagerOutputError),
        (hooked_view, "with a gradient of its own", CaptureError),
        (keeps, "otherwise than through what it returned", EagerOutputError),
        (differentiates, "otherwise than through what it returned", EagerOutputError),
    ]
    for function, text, kind in cases:
        kept.clear()
        marked = eager_on_graph(function)
        with pytest.raises(kind, match=text) as caught, capture(make()):
            made = marked(weight * 2).sum()
            (made + sum(one.sum() for one in kept)).backward()
        assert "test_capture_gradients.py" in caught.value.where
        if function is hooked or function is differentiates:
            x, graph, later = torch.ones(4, device=device), make(), function
            marked = eager_on_graph(lambda x, y, later=later: later(y) if x.sum() < 0 else y * 2)
            with capture(graph):
                marked(x, weight * 2).sum().backward()
            graph.replay()
            x.fill_(-1)
            with pytest.raises(EagerOutputError, match=text):
                graph.replay()


def test_refused_behind_the_capture(make: MakeGraph, device: torch.device) -> None:
    """A backward that comes when the capture is over would use what another replay has left: an error."""
    x, weight = torch.ones(4, device=device), torch.ones(4, device=device, requires_grad=True)
    with capture(make()):
        loss = marked_bend(x * weight).sum()
    with pytest.raises(CaptureError, match="outside of the capture"):
        loss.backward()


def test_refused_at_replay(make: MakeGraph, device: torch.device) -> None:
    """A replay whose gradients are others than those that were captured is an error, and no silent loss."""
    weight, other = (torch.ones(4, device=device, requires_grad=True) for _ in range(2))
    cases: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "other tensors that need gradients": lambda x, y: y * 2 if x.sum() > 0 else y.detach() * 3,
        "gradients of other tensors than": lambda x, y: (y * x if x.sum() > 0 else y * 2) + weight,
        "gradients of a tensor that had none": lambda x, y: y * 2 if x.sum() > 0 else y * other,
    }
    for text, function in cases.items():
        x, graph, marked = torch.ones(4, device=device), make(), eager_on_graph(function)
        with capture(graph):
            marked(x.clone().requires_grad_(), x * weight).sum().backward()
        graph.replay()
        x.fill_(-1)
        with pytest.raises(EagerOutputError, match=text):
            graph.replay()


def test_errors_of_the_users_own(make: MakeGraph, device: torch.device) -> None:
    """An error in a backward comes out as it is, and the next capture works."""

    def fails(context: Any, grad: Tensor) -> Tensor:
        raise ValueError("no gradient today")

    x, weight = torch.ones(4, device=device), torch.ones(4, device=device, requires_grad=True)
    bad = eager_on_graph(backward=fails)(lambda x: x * 2)
    with pytest.raises(ValueError, match="no gradient today") as caught, capture(make()):
        bad(x * weight).sum().backward()
    assert not isinstance(caught.value, BreakableError)
    train(make, device, Model(marked_scaled), Model(scaled), replays=1)


def test_errors_of_autograd_in_the_users_code(make: MakeGraph, device: torch.device) -> None:
    """An error that autograd raises by itself in a marked function's backward is the user's, as in eager."""
    marked = eager_on_graph(exp_that_is_written)
    weight = torch.ones(4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught, capture(make()):
        marked(weight * 1).sum().backward()
    assert not isinstance(caught.value, BreakableError)


def exp_that_is_written(x: Tensor) -> Tensor:
    """Reads in its backward what it has overwritten."""
    y = x.exp()
    z = y * 2
    return z + y.add_(1)
