"""Bound calls: what ``bind`` returns does what the compiled function does, without asking Dynamo's guards."""

from __future__ import annotations

import gc
import random
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import breakable_backend
import silly
from breakable_backend import BindError, OptionsError, ReplayError, bind, explain
from breakable_backend.calling.registry import executors_of
from checks import assert_same, compile_both, program_of


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """What is bound is inference."""
    with torch.no_grad():
        yield


class Scaled(nn.Module):
    """A module with parameters, a dropout, and a break."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Two segments around a break."""
        return silly.triple(self.dropout(self.linear(x)).sin() * scale).cos() + x


def replays(compiled: Any) -> int:
    """How many calls were replays, over all graphs."""
    return sum(program.replays for program in explain(compiled).programs)


# --- what a bound call does -----------------------------------------------------------------------------------------------


def test_equals_eager(device: torch.device, options: dict[str, Any]) -> None:
    """Each bound call computes on the tensors that it is given, and replays."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    bound = bind(compiled, torch.rand(3, 4, device=device))
    before = replays(compiled)
    for _ in range(4):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), eager(x))
    assert replays(compiled) == before + 4
    assert bound.why_not == ""
    assert not bound.misfits


def test_what_is_returned_is_the_callers(device: torch.device, options: dict[str, Any]) -> None:
    """A later bound call changes nothing that an earlier one returned."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    bound = bind(compiled, torch.zeros(3, 4, device=device))
    x = torch.rand(3, 4, device=device)
    first = bound(x)
    bound(torch.rand(3, 4, device=device))
    assert_same(first, eager(x))


def test_static_outputs(device: torch.device, options: dict[str, Any]) -> None:
    """With ``outputs="static"`` a bound call returns the graph's own memory."""
    compiled, eager = compile_both(Scaled().to(device).eval(), {**options, "outputs": "static"})
    bound = bind(compiled, torch.zeros(3, 4, device=device))
    x = torch.rand(3, 4, device=device)
    first = bound(x)
    assert_same(first, eager(x))
    assert bound(x).data_ptr() == first.data_ptr()


def test_calls_until_it_is_recorded(device: torch.device, options: dict[str, Any]) -> None:
    """Binding calls the function three times, and once where these inputs are recorded already."""
    compiled, _ = compile_both(lambda x: silly.triple(x.sin() + 1).cos(), options)
    x = torch.rand(4, device=device)
    bind(compiled, x)
    assert program_of(compiled).calls == 3
    bind(compiled, x)
    assert program_of(compiled).calls == 4


class Pair(NamedTuple):
    """Two tensors."""

    first: Tensor
    second: Tensor


@dataclass
class Result:
    """A class that pytree does not know."""

    value: Tensor
    count: int


def test_structures(device: torch.device, options: dict[str, Any]) -> None:
    """Arguments may be in lists, dicts and named tuples; results are in what eager returns, inputs and constants included."""

    def f(x: Tensor, more: list[Any], *rest: Tensor, named: dict[str, Any], **others: Pair) -> Any:
        y = x.sin() + more[0] * more[1]["n"] + rest[0]
        z = named["a"] * others["pair"].second
        return OrderedDict(y=y, pair=Pair(z, x), list=[y[0], None, 3, "text"]), Result(z + 1, more[1]["n"])

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, a, b, c, d, e = (torch.rand(4, device=device) for _ in range(6))
        return (x, [a, {"n": 2}], b), {"named": {"a": c}, "pair": Pair(d, e)}

    compiled, _ = compile_both(f, options)
    args, kwargs = make()
    bound = bind(compiled, *args, **kwargs)
    for _ in range(3):
        args, kwargs = make()
        (got, result), (want, wanted) = bound(*args, **kwargs), f(*args, **kwargs)
        assert_same(got, want)
        assert got["pair"].second is args[0]
        assert got["list"][0]._base is None or got["list"][0].untyped_storage() == got["y"].untyped_storage()
        assert isinstance(result, Result)
        assert_same((result.value, result.count), (wanted.value, wanted.count))
    assert not bound.misfits


def test_keywords_in_any_order(device: torch.device, options: dict[str, Any]) -> None:
    """The order of keyword arguments says nothing."""
    compiled, eager = compile_both(lambda *, a, b: (a - b) * 2, options)
    a, b = torch.rand(4, device=device), torch.rand(4, device=device)
    bound = bind(compiled, a=a, b=b)
    assert_same(bound(b=b, a=a), eager(a=a, b=b))
    assert not bound.misfits


@pytest.mark.parametrize("check", ["inputs", "parameters", "nothing"])
def test_written_inputs(check: Any, device: torch.device, options: dict[str, Any]) -> None:
    """What the function writes is written once, at the caller's tensor, wherever that lies."""

    def f(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(x)
        return silly.triple(cache * 2) + 1

    compiled, eager = compile_both(f, options)
    caches = [torch.zeros(4, device=device) for _ in range(6)]
    bound = bind(compiled, torch.zeros(4, device=device), torch.ones(4, device=device), check=check)
    for cache in caches:
        x, other = torch.rand(4, device=device), cache.clone()
        assert_same(bound(cache, x), eager(other, x))
        assert_same(cache, other)


def test_arguments_that_share_memory(device: torch.device, options: dict[str, Any]) -> None:
    """Arguments that overlap where one is written are computed as eager does."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y * 2 + x

    compiled, _ = compile_both(f, options)
    bound = bind(compiled, torch.zeros(4, device=device), torch.ones(4, device=device))
    memory, again = torch.arange(6.0, device=device), torch.arange(6.0, device=device)
    assert_same(bound(memory[:4], memory[2:]), f(again[:4], again[2:]))
    assert_same(memory, again)


class Keeper:
    """Keeps what it computed last."""

    last: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """Set an attribute."""
        self.last = x.sin() + 1
        return self.last * 2


def test_what_python_code_does(device: torch.device, options: dict[str, Any]) -> None:
    """What the function does to Python objects is done in each bound call."""
    keeper = Keeper()
    compiled, _ = compile_both(keeper.keep, options)
    bound = bind(compiled, torch.zeros(4, device=device), misfit="raise")
    x = torch.rand(4, device=device)
    assert_same(bound(x), keeper.last * 2)
    assert_same(keeper.last, x.sin() + 1)


def test_random_numbers(device: torch.device, options: dict[str, Any]) -> None:
    """A bound call draws what eager draws."""
    compiled, eager = compile_both(lambda x: silly.triple(x + torch.rand_like(x)) + torch.rand_like(x), options)
    x = torch.zeros(4, device=device)
    bound = bind(compiled, x)
    torch.manual_seed(3)
    got = [bound(x) for _ in range(3)]
    torch.manual_seed(3)
    assert_same(got, [eager(x) for _ in range(3)])


def test_exceptions(device: torch.device, options: dict[str, Any]) -> None:
    """What an eager step raises reaches the caller as it is, and the next call is right."""

    def fail(x: Tensor) -> Tensor:
        if failing:
            raise failing[0]
        return x + 1

    failing: list[Exception] = []
    marked = breakable_backend.eager_on_graph(True)(fail)
    compiled, _ = compile_both(lambda x: marked(x.sin() * 2).cos() + 1, options)
    x = torch.rand(4, device=device)
    bound = bind(compiled, x)
    want = bound(x)
    failing.append(ValueError("no"))
    with pytest.raises(ValueError, match="no") as raised:
        bound(x)
    assert raised.value is failing[0]
    failing.clear()
    assert_same(bound(x), want)


# --- what does not fit ----------------------------------------------------------------------------------------------------

FITTING: tuple[Any, ...] = ({"a": None, "b": 1}, [1.5, True], "text")


def with_rest(
    x: Tensor, y: Tensor, settings: Any = FITTING[0], numbers: Any = FITTING[1], text: Any = FITTING[2]
) -> Tensor:
    """A function of two tensors and of values of all kinds."""
    scale = settings["b"] * numbers[0] * (2 if numbers[1] else 3) * len(text) * (1 if settings["a"] is None else 5)
    return (x.sin() + y) * scale


def inference_clone(x: Tensor) -> Tensor:
    """A copy that autograd knows nothing of."""
    with torch.inference_mode():
        return x.clone()


MISFITS: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Any, ...]], str]] = {
    "shape": (lambda x, y: (x[:2], y[:2]), "args[0] is a Tensor of float32[2, 4]"),
    "stride": (lambda x, y: (x.t().contiguous().t(), y), "with stride [1, 3]"),
    "dtype": (lambda x, y: (x.double(), y), "args[0] is a Tensor of float64"),
    "kind": (lambda x, y: (nn.Parameter(x, requires_grad=False), y), "args[0] is a Parameter"),
    "gradients": (lambda x, y: (x.clone().requires_grad_(), y), "requiring grad"),
    "inference tensor": (lambda x, y: (inference_clone(x), y), "of inference mode"),
    "no tensor": (lambda x, y: (x, 2.0), "args[1] is a float"),
    "one tensor twice": (lambda x, y: (x, x), "one tensor"),
    "an argument more": (lambda x, y: (x, y, *FITTING[:1]), "args is a tuple of 3"),
    "keys": (lambda x, y: (x, y, {"b": 1, "a": None}, *FITTING[1:]), "has the keys ['b', 'a']"),
    "int": (lambda x, y: (x, y, {"a": None, "b": 3}, *FITTING[1:]), "['b'] is 3, and was 1"),
    "an int that is a bool": (lambda x, y: (x, y, {"a": None, "b": True}, *FITTING[1:]), "['b'] is True"),
    "None": (lambda x, y: (x, y, {"a": 0, "b": 1}, *FITTING[1:]), "['a'] is 0, and was None"),
    "float": (lambda x, y: (x, y, FITTING[0], [2.5, True], "text"), "[0] is 2.5, and was 1.5"),
    "bool": (lambda x, y: (x, y, FITTING[0], [1.5, False], "text"), "[1] is False, and was True"),
    "length": (lambda x, y: (x, y, FITTING[0], [1.5, True, 0], "text"), "is a list of 3, and was a list of 2"),
    "container": (lambda x, y: (x, y, FITTING[0], (1.5, True), "text"), "is a tuple of 2, and was a list"),
    "text": (lambda x, y: (x, y, *FITTING[:2], "texts"), "is 'texts', and was 'text'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Arguments of another kind go to the compiled function, with the reason; or are an error, which tells it."""
    change, text = MISFITS[name]
    compiled, _ = compile_both(with_rest, options)
    x, y = torch.rand(3, 4, device=device), torch.rand(3, 4, device=device)
    fitting = () if name == "an argument more" else FITTING
    bound, strict = bind(compiled, x, y, *fitting), bind(compiled, x, y, *fitting, misfit="raise")
    args = change(x, y)
    args = (*args, *fitting[len(args) - 2 :])
    assert_same(bound(*args), with_rest(*args))
    (why,) = bound.misfits
    assert text in why
    with pytest.raises(ReplayError) as raised:
        strict(*args)
    assert text in raised.value.what
    assert_same(bound(x, y, *fitting), with_rest(x, y, *fitting))
    assert bound.misfits.total() == 1


@pytest.mark.parametrize("values", [(0.0, -0.0), (-0.0, 0.0), (1.0, 1), (float("nan"), 0.0)], ids=str)
def test_floats_are_compared_bit_for_bit(values: tuple[Any, Any]) -> None:
    """A zero of the other sign is another number, and so is an int; a NaN is itself."""
    compiled, _ = compile_both(lambda x, f: torch.copysign(x.exp() + 1, torch.full_like(x, f)) * 2, {"driver": "tape"})
    x = torch.rand(4)
    bound = bind(compiled, x, values[0])
    bound(x, values[0])
    assert not bound.misfits
    bound(x, values[1])
    assert bound.misfits.total() == 1


def test_one_tensor_for_two_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """Bound with one tensor for two arguments, it takes one tensor for both."""
    compiled, eager = compile_both(lambda x, y: (x * 2 + y).sin(), options)
    x, y = torch.rand(4, device=device), torch.rand(4, device=device)
    bound = bind(compiled, x, x)
    assert_same(bound(y, y), eager(y, y))
    assert not bound.misfits
    assert_same(bound(x, y), eager(x, y))
    assert list(bound.misfits) == ["args[1] is another tensor than an argument before it, and was the same"]


def test_misfits_are_told_within_bounds() -> None:
    """Texts of ever new misfits do not grow without bounds."""
    compiled, _ = compile_both(lambda x: x.sin() + 1, {"driver": "tape"})
    bound = bind(compiled, torch.zeros(1))
    for size in range(2, 50):
        bound(torch.zeros(size))
    assert len(bound.misfits) <= 33
    assert bound.misfits.total() == 48


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    """A forward hook, for a while."""
    handle = module.register_forward_hook(lambda _module, _args, result: result + 1)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Training mode of one child, for a while."""
    module.get_submodule("dropout").train()
    try:
        yield
    finally:
        module.eval()


class Passing(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the op."""
        return func(*args, **(kwargs or {}))


STATES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "gradients": (lambda _: torch.enable_grad(), "grad mode"),
    "autocast": (lambda _: torch.autocast("cpu"), "grad mode, autocast"),
    "inference mode": (lambda _: torch.inference_mode(), "inference mode is on"),
    "training": (training, "training mode"),
    "hooks": (hooked, "hooks"),
    "default device": (lambda _: torch.device("cpu"), "sees torch functions"),
    "stance": (lambda _: torch.compiler.set_stance("force_eager"), "force_eager"),
    "dispatch mode": (lambda _: Passing(), "a dispatch mode is active"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_around_it(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """A call under other modes, of a module in another mode, or with hooks, goes to the compiled function."""
    context, text = STATES[name]
    model = Scaled().to(device).eval()
    compiled, _ = compile_both(model, options)
    owner = compiled._orig_mod
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    with context(owner):
        torch.manual_seed(0)
        got = bound(x)
        torch.manual_seed(0)
        assert_same(got, compiled(x))
    (why,) = bound.misfits
    assert text in why
    assert_same(bound(x), model(x))
    assert bound.misfits.total() == 1


def test_in_a_compiled_function(device: torch.device, options: dict[str, Any]) -> None:
    """Called in a function that is compiled, it is a part of that."""
    compiled, eager = compile_both(lambda x: x.sin() * 2, options)
    x = torch.rand(4, device=device)
    bound = bind(compiled, x)
    outer = torch.compile(lambda x: bound(x) + 1, backend="breakable_cg", options=options)
    for _ in range(4):
        assert_same(outer(x), eager(x) + 1)


# --- what moves, and what goes --------------------------------------------------------------------------------------------


def moves_data(model: nn.Module) -> Any:
    """New memory for a parameter; the old stays alive."""
    old = model.linear.weight.data
    model.linear.weight.data = torch.rand_like(old)
    return old


def assigns(model: nn.Module) -> Any:
    """New parameters; the old stay alive."""
    old = list(model.parameters())
    model.load_state_dict({name: torch.rand_like(value) for name, value in model.state_dict().items()}, assign=True)
    return old


def replaces(model: nn.Module) -> Any:
    """A new child; the old one stays alive."""
    old, model.linear = model.linear, nn.Linear(4, 4, device=model.linear.weight.device)
    return old


def converts(model: nn.Module) -> Any:
    """Parameters of another dtype."""
    model.linear.to(torch.float64)
    model.linear.to(torch.float32)


@pytest.mark.parametrize("move", [moves_data, assigns, replaces, converts])
@pytest.mark.parametrize("check", ["inputs", "parameters"])
def test_parameters_that_move(move: Any, check: Any, device: torch.device, options: dict[str, Any]) -> None:
    """A parameter that is elsewhere is noticed by the next call, and bound anew once it is recorded anew."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    model = compiled._orig_mod
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x, check=check)
    kept = move(model)
    for _ in range(4):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), model(x))
    del kept
    assert 1 <= bound.misfits.total() <= 3
    before, count = bound.misfits.total(), replays(compiled)
    assert_same(bound(x), model(x))
    assert bound.misfits.total() == before
    assert replays(compiled) == count + 1


def test_order_of_keywords(device: torch.device, options: dict[str, Any]) -> None:
    """The order of keyword arguments counts where the function sees it."""

    def f(**named: Tensor) -> dict[str, Tensor]:
        return {name: value * 2 + number for number, (name, value) in enumerate(named.items())}

    compiled, _ = compile_both(f, options)
    a, b = torch.rand(2, 4, device=device)
    bound = bind(compiled, a=a, b=b)
    for named in ({"a": a, "b": b}, {"b": b, "a": a}):
        result = bound(**named)
        assert list(result) == list(named)
        assert all(map(torch.equal, result.values(), f(**named).values()))
    assert bound.misfits == {"kwargs has the keys ['b', 'a'], and had ['a', 'b']": 1}


def test_parameters_that_are_none(device: torch.device, options: dict[str, Any]) -> None:
    """A parameter that is None by now is noticed as one that moved."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    model = compiled._orig_mod
    bound = bind(compiled, torch.rand(3, 4, device=device))
    model.linear.bias = None
    for _ in range(4):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), model(x))
    assert 1 <= bound.misfits.total() <= 3


def test_parameters_that_ask_for_gradients(device: torch.device, options: dict[str, Any]) -> None:
    """With gradients on, a parameter that asks for one by now does not fit (Dynamo of torch 2.11 does not look itself)."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(device).requires_grad_(False)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    x = torch.rand(3, 4, device=device)
    with torch.enable_grad():
        bound = bind(compiled, x)
        assert not bound(x).requires_grad
        assert not bound.misfits
        model[0].bias.requires_grad_(True)
        assert bound(x).requires_grad is compiled(x).requires_grad
        model[0].bias.requires_grad_(False)
        assert not bound(x).requires_grad
    assert bound.misfits == {"a tensor that the graph reads is not like the one before": 1}


def test_parameters_of_another_dtype(device: torch.device, options: dict[str, Any]) -> None:
    """A model that is converted is compiled anew by the call that notices."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    model = compiled._orig_mod
    bound = bind(compiled, torch.rand(3, 4, device=device))
    model.to(torch.float64)
    x = torch.rand(3, 4, device=device, dtype=torch.float64)
    assert_same(bound(x), model(x))


@pytest.mark.parametrize("which", ["this", "all", "dynamo"])
def test_resets(which: str, device: torch.device, options: dict[str, Any]) -> None:
    """After a reset a bound call is right, and replays again once it is recorded."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    if which == "dynamo":
        torch._dynamo.reset()
    else:
        breakable_backend.reset(bound if which == "this" else None)
    assert program_of(compiled).recordings == () if which != "dynamo" else not explain(compiled).programs
    for _ in range(4):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), eager(x))
    before = replays(compiled)
    assert_same(bound(x), eager(x))
    assert replays(compiled) == before + 1


def test_eviction(device: torch.device, options: dict[str, Any]) -> None:
    """A bound call whose recording was evicted for another key is recorded again."""
    compiled, eager = compile_both(Scaled().to(device).eval(), {**options, "max_recordings": 1}, dynamic=True)
    x, y = torch.rand(3, 4, device=device), torch.rand(5, 4, device=device)
    bound = bind(compiled, x)
    for _ in range(12):
        assert_same(compiled(y), eager(y))
    assert explain(compiled).programs[-1].evictions == 1
    for _ in range(12):
        assert_same(bound(x), eager(x))
    assert not bound.misfits
    assert explain(compiled).programs[-1].evictions == 2


def test_other_calls_compile_anew(device: torch.device, options: dict[str, Any]) -> None:
    """That the function is compiled for other inputs changes nothing for what is bound."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    x, y = torch.rand(3, 4, device=device), torch.rand(5, 4, device=device)
    bound, other = bind(compiled, x), bind(compiled, y)
    for _ in range(3):
        assert_same(bound(x), eager(x))
        assert_same(other(y), eager(y))
    assert not bound.misfits
    assert not other.misfits


GLOBAL: list[Tensor] = []


def reads_global(x: Tensor) -> Tensor:
    """Reads a tensor that is no argument."""
    return (x + GLOBAL[0].sum()) * 2


def test_tensors_that_are_no_arguments(device: torch.device, options: dict[str, Any]) -> None:
    """A tensor that the function finds by itself is read anew, and goes to the compiled function where it is of another kind."""
    GLOBAL[:] = [torch.rand(3, device=device)]
    compiled, _ = compile_both(reads_global, options)
    x = torch.rand(4, device=device)
    bound = bind(compiled, x)
    GLOBAL[0] = torch.rand(3, device=device)
    assert_same(bound(x), reads_global(x))
    assert not bound.misfits
    GLOBAL[0] = torch.rand(5, device=device)
    assert_same(bound(x), reads_global(x))
    assert list(bound.misfits) == ["a tensor that the graph reads is not like the one before"]


class Cache:
    """An object that holds a tensor."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


def test_tensors_in_objects(device: torch.device, options: dict[str, Any]) -> None:
    """An object is itself; the tensors in it are read anew, and looked at."""
    compiled, eager = compile_both(lambda x, cache: (x + cache.keys.sum()).sin() * 2, options)
    x, cache = torch.rand(4, device=device), Cache(torch.rand(3, device=device))
    bound = bind(compiled, x, cache)
    cache.keys = torch.rand(3, device=device)
    assert_same(bound(x, cache), eager(x, cache))
    assert not bound.misfits
    cache.keys = torch.rand(5, device=device)
    assert_same(bound(x, cache), eager(x, cache))
    assert bound.misfits.total() == 1
    assert_same(bound(x, Cache(cache.keys)), eager(x, cache))
    assert bound.misfits.total() == 2


def test_binding_in_a_compiled_function(device: torch.device, options: dict[str, Any]) -> None:
    """Binding in a function that Dynamo runs breaks nothing: what comes of it is right."""
    compiled, eager = compile_both(lambda x: x.sin() * 2, options)
    x = torch.rand(4, device=device)

    def outer(x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return torch._dynamo.disable(bind)(compiled, x)

    bound = torch.compile(outer, backend="breakable_cg", options=options)(x)
    assert_same(bound(x), eager(x))


def test_the_model_goes(device: torch.device, options: dict[str, Any]) -> None:
    """A bound call keeps what is compiled, and leaves nothing behind when it goes itself."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    names = set(globals())
    bound = bind(compiled, x)
    parameter = weakref.ref(compiled._orig_mod.linear.weight)
    added = [name for name in set(globals()) - names if name.startswith("__") and "_bound_" in name]
    assert len(added) == 2
    del compiled
    bound(x)
    assert parameter() is not None
    del bound
    gc.collect()
    assert parameter() is None
    assert not [name for name in globals() if name.startswith("__") and "_bound_" in name]


# --- without a look ---------------------------------------------------------------------------------------------------------


def takes_fast_path(bound: Any) -> bool:
    """Whether no code of Dynamo's runs in a call."""
    return bound._binding.quick is not None


def test_nothing_is_looked_at(device: torch.device, options: dict[str, Any]) -> None:
    """With ``check="nothing"`` a call is the replay: each call computes on its arguments, wherever they are in containers."""

    def f(x: Tensor, more: list[Any], *rest: Tensor, named: dict[str, Any]) -> Any:
        y = silly.triple(x.sin() + more[0] * more[1]["n"]) + rest[0]
        return {"y": y, "pair": (y[0], x), "list": [named["a"] * y, None, 3, "text"]}

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, a, b, c = (torch.rand(4, device=device) for _ in range(4))
        return (x, [a, {"n": 2}], b), {"named": {"a": c}}

    compiled, _ = compile_both(f, options)
    args, kwargs = make()
    bound = bind(compiled, *args, **kwargs, check="nothing", misfit="raise")
    assert takes_fast_path(bound)
    before = replays(compiled)
    for _ in range(4):
        args, kwargs = make()
        got, want = bound(*args, **kwargs), f(*args, **kwargs)
        assert_same(got, want)
        assert got["pair"][1] is args[0]
    assert replays(compiled) == before + 4


@pytest.mark.parametrize("check", ["inputs", "parameters", "nothing"])
def test_dynamos_code_is_left_out(check: Any, device: torch.device, options: dict[str, Any]) -> None:
    """A module whose code only computes is called without Dynamo's code, whatever is looked at; torch's own containers too."""
    for model in (Scaled().to(device).eval(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(device)):
        compiled, eager = compile_both(model, options)
        bound = bind(compiled, torch.rand(3, 4, device=device), check=check)
        assert takes_fast_path(bound)
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), eager(x))


def test_what_is_bound_is_in_use(device: torch.device, options: dict[str, Any]) -> None:
    """A bound call keeps its recording from looking idle: it is the youngest afterwards."""
    compiled, eager = compile_both(lambda x: x.sin() + 1, options)
    memory = torch.rand(13, device=device)
    x, y = memory[:12], memory[1:]  # of another alignment, and so another key
    bound = bind(compiled, x, check="nothing")
    assert takes_fast_path(bound)
    for _ in range(3):
        compiled(y)
    assert_same(bound(x), eager(x))
    (executor,) = executors_of(compiled)
    (addresses,) = executor.keys.sets.values()
    assert addresses.last_call == executor.statistics.calls
    assert [entry.calls for entry in addresses.entries.values()] == [3, 4]


class Weighted(nn.Module):
    """An eager step reads a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """A segment on each side."""
        return silly.attention(x.sin() + 1, self.weight, self.weight).cos() * 2


def test_what_needs_dynamos_code(device: torch.device, options: dict[str, Any]) -> None:
    """Where Dynamo's code changes Python objects, or an eager step takes a parameter, that code runs, and all is right."""
    keeper = Keeper()
    compiled, _ = compile_both(keeper.keep, options)
    x = torch.rand(4, device=device)
    bound = bind(compiled, x, check="nothing")
    assert not takes_fast_path(bound)
    keeper.last = x
    assert_same(bound(x), keeper.last * 2)
    assert_same(keeper.last, x.sin() + 1)

    model = Weighted().to(device)
    compiled, eager = compile_both(model, options)
    bound = bind(compiled, x, check="nothing")
    assert not takes_fast_path(bound)
    compiled._orig_mod.weight.data = torch.rand(4, device=device)
    assert_same(bound(x), compiled._orig_mod(x))
    assert not torch.equal(bound(x), eager(x))


@pytest.mark.parametrize("move", [moves_data, assigns, replaces, converts])
def test_memory_that_goes_is_noticed(move: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Without a look, parameters that die or whose memory is freed are noticed, and it is bound anew."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    model = compiled._orig_mod
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x, check="nothing")
    assert takes_fast_path(bound)
    move(model)
    gc.collect()
    for _ in range(5):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), model(x))
    assert bound.misfits.total() >= 1
    before, count = bound.misfits.total(), replays(compiled)
    assert_same(bound(x), model(x))
    assert (bound.misfits.total(), replays(compiled)) == (before, count + 1)
    assert takes_fast_path(bound)


@pytest.mark.parametrize("what", ["reset", "eager step", "profile", "alignment", "dispatch mode", "capture"])
def test_no_plain_replay(what: str, device: torch.device, kind: str, options: dict[str, Any]) -> None:
    """Without a look, what is no plain replay of this recording goes the longer way, and is right."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x, check="nothing")
    assert takes_fast_path(bound)
    if what == "reset":
        breakable_backend.reset(compiled)
        assert_same([bound(x) for _ in range(4)], [eager(x) for _ in range(4)])
    elif what == "eager step":
        step = breakable_backend.eager_on_graph(fake=torch.empty_like)(lambda x: bound(x) + 1)
        outer, _ = compile_both(lambda x: step(x.sin() + 1).exp() * 2, options)
        for _ in range(4):
            assert_same(outer(x), (eager(x.sin() + 1) + 1).exp() * 2)
    elif what == "profile":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
            assert_same(bound(x), eager(x))
    elif what == "alignment":
        memory = torch.rand(13, device=device)
        for start in (0, 1, 0, 1, 1):
            part = memory[start : start + 12].view(3, 4)
            assert_same(bound(part), eager(part))
    elif what == "dispatch mode":
        with Passing():
            got = bound(x)
        assert_same(got, eager(x))
    else:
        graph = breakable_backend.BreakableCUDAGraph(driver=kind)
        with breakable_backend.capture(graph):
            result = bound(x)
        graph.replay()
        assert_same(result, eager(x))
        graph.reset()
    assert_same(bound(x), eager(x))


# --- what cannot be bound -------------------------------------------------------------------------------------------------


def breaks_the_graph(x: Tensor) -> Tensor:
    """Two graphs of Dynamo's."""
    y = x.sin() + 1
    torch._dynamo.graph_break()
    return y.cos() * 2


def draws_in_python(x: Tensor) -> Tensor:
    """A number of Python's, anew in each call."""
    return x.sin() * random.randint(1, 1000) + 1


class Hooked(Scaled):
    """A module with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda _module, _args, result: result + 1)


CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "graph break": (lambda: breaks_the_graph, "several graphs|Dynamo broke its graph"),
    # On CUDA each number is a key of its own, and so there is no replay to bind.
    "Python's random": (lambda: draws_in_python, "random|another key"),
    "nothing to capture": (lambda: silly.triple, "nothing"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_bound(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """What is not one captured graph is called as it is compiled, and the reason told; or binding it is an error."""
    make, text = CANNOT[name]
    random.seed(5)
    compiled, eager = compile_both(make(), options)
    x = torch.rand(4, device=device)
    bound = bind(compiled, x)
    assert re.search(text, bound.why_not)
    random.seed(6)
    got = bound(x)
    random.seed(6)
    assert_same(got, eager(x))
    with pytest.raises(BindError) as raised:
        bind(compiled, x, misfit="raise")
    assert re.search(text, raised.value.what)


def test_gradients_cannot_be_bound(device: torch.device, options: dict[str, Any]) -> None:
    """A graph that needs gradients is not captured, so it cannot be bound."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    with torch.enable_grad(), pytest.raises(BindError) as raised:
        bind(compiled, torch.rand(3, 4, device=device), misfit="raise")
    assert "it needs gradients" in raised.value.what


def test_hooks_of_a_compiled_module(device: torch.device, options: dict[str, Any]) -> None:
    """A module with hooks of its own is bound where Dynamo compiles these, and else not; what is called is right."""
    compiled, eager = compile_both(Hooked().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    assert_same(bound(x), eager(x))


def test_code_around_a_compiled_function(device: torch.device, options: dict[str, Any]) -> None:
    """A function that calls a compiled one has code of its own, which a bound call would leave out."""

    class Engine:
        def __init__(self) -> None:
            self.compiled, _ = compile_both(lambda x: x.sin() * 2, options)
            self.calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            result: Tensor = self.compiled(x) + 1
            return result

    engine = Engine()
    x = torch.rand(4, device=device)
    bound = bind(engine, x)
    assert "Python code runs around what is compiled: __call__" in bound.why_not
    before = engine.calls
    assert_same(bound(x), x.sin() * 2 + 1)
    assert engine.calls == before + 1


@pytest.mark.parametrize("what", ["function", "method", "partial", "in place", "a module of torch"])
def test_kinds_of_callables(what: str, device: torch.device, options: dict[str, Any]) -> None:
    """Functions, methods and modules can be bound, in whatever way they were compiled."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sin() * 2

        def method(self, x: Tensor) -> Tensor:
            return self.linear(x).cos() * 3

    model = Model().to(device)
    wrap = partial(torch.compile, backend="breakable_cg", options={"min_kernels": 1, **options})
    compiled: Any
    eager: Any
    if what == "function":
        compiled, eager = wrap(lambda x: model(x) + 1), lambda x: model(x) + 1
    elif what == "method":
        compiled, eager = wrap(model.method), model.method
    elif what == "partial":
        compiled, eager = wrap(partial(lambda y, x: model(x) + y, 2)), lambda x: model(x) + 2
    elif what == "in place":
        eager = Model().to(device)
        eager.load_state_dict(model.state_dict())
        model.compile(backend="breakable_cg", options={"min_kernels": 1, **options})
        compiled = model
    else:
        eager = nn.Sequential(model, nn.ReLU())
        compiled = wrap(eager)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    assert what == "partial" or bound.why_not == ""
    for _ in range(3):
        x = torch.rand(3, 4, device=device)
        assert_same(bound(x), eager(x))


def test_wrong_options() -> None:
    """Options that there are not, and functions that are not compiled, are errors."""
    compiled, eager = compile_both(lambda x: x.sin() + 1, {"driver": "tape"})
    with pytest.raises(OptionsError, match="check is one of 'inputs', 'parameters', 'nothing'"):
        bind(compiled, torch.zeros(2), check="everything")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="misfit is one of"):
        bind(compiled, torch.zeros(2), misfit="ignore")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="is not compiled"):
        bind(eager, torch.zeros(2))


# --- where it is seen -----------------------------------------------------------------------------------------------------


def test_report(device: torch.device, options: dict[str, Any]) -> None:
    """The report tells how many calls were bound, and why others did not fit."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    for _ in range(3):
        bound(x)
    bound(x, 2.0)
    report = explain(bound)
    assert report.programs[0].bound_calls == 3
    assert list(report.programs[0].misfits) == ["args is a tuple of 2, and was a tuple of 1"]
    assert "bound calls 3, calls that did not fit what was bound 1" in str(report)


def test_profile(device: torch.device, options: dict[str, Any]) -> None:
    """A profile names bound calls."""
    compiled, _ = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        bound(x)
    names = [event.name for event in profile.events()]
    assert [name for name in names if name.startswith("breakable_cg") and name.endswith("bound call")]
    assert [name for name in names if "step 1 eager" in name]


def test_compare_mode(device: torch.device, options: dict[str, Any]) -> None:
    """Bound calls are compared with eager where the compiled function is."""
    compiled, eager = compile_both(Scaled().to(device).eval(), {**options, "debug": "compare"})
    bound = bind(compiled, torch.rand(3, 4, device=device))
    x = torch.rand(3, 4, device=device)
    assert_same(bound(x), eager(x))


def test_in_an_eager_step(device: torch.device, options: dict[str, Any]) -> None:
    """A bound call that an eager step of another call makes is right."""
    inner, _ = compile_both(lambda x: x.cos() * 3, options)
    bound = bind(inner, torch.rand(4, device=device))
    step = breakable_backend.eager_on_graph(fake=torch.empty_like)(lambda x: bound(x) + 1)
    outer, _ = compile_both(lambda x: step(x.sin() + 1).exp() * 2, options)
    for _ in range(4):
        x = torch.rand(4, device=device)
        assert_same(outer(x), ((x.sin() + 1).cos() * 3 + 1).exp() * 2)
    whole = bind(outer, torch.rand(4, device=device), misfit="raise")
    assert_same(whole(x), ((x.sin() + 1).cos() * 3 + 1).exp() * 2)


def test_under_capture(device: torch.device, kind: str, options: dict[str, Any]) -> None:
    """In ``with capture(graph)`` a bound call becomes a part of the graph, as a compiled one does."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    graph = breakable_backend.BreakableCUDAGraph(driver=kind)
    with breakable_backend.capture(graph):
        result = bound(x)
    x.copy_(torch.rand(3, 4, device=device))
    graph.replay()
    assert_same(result, eager(x))
    graph.reset()


# --- threads and streams --------------------------------------------------------------------------------------------------


def test_threads(device: torch.device, options: dict[str, Any]) -> None:
    """Several threads may call what is bound, and bind at once."""
    compiled, eager = compile_both(Scaled().to(device).eval(), options)
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    wrong: list[Any] = []

    def work(number: int) -> None:
        mine = torch.full((3, 4), float(number), device=device)
        with torch.no_grad():
            want = eager(mine)
            own = bind(compiled, mine)
            for _ in range(20):
                if not (torch.equal(bound(mine), want) and torch.equal(own(mine), want)):
                    wrong.append(number)
            if own.why_not or own.misfits:
                wrong.append((own.why_not, own.misfits))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not bound.misfits
    (executor,) = executors_of(compiled)
    (entry,) = executor.keys.entries()
    assert entry.replay is not None and entry.run is entry.replay.function, "nobody is shown replays any more"


@pytest.mark.gpu
def test_streams(options: dict[str, Any]) -> None:
    """Bound calls on another stream are ordered behind those before them."""
    device = torch.device("cuda")
    compiled, eager = compile_both(Scaled().to(device).eval(), {"driver": "cuda"})
    x = torch.rand(3, 4, device=device)
    bound = bind(compiled, x)
    side = torch.cuda.Stream()
    for number in range(6):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side) if number % 2 else nullcontext():
            x = torch.rand(3, 4, device=device)
            got, want = bound(x), eager(x)
            torch.cuda.synchronize()
            assert_same(got, want)
    assert not bound.misfits


def test_binding_learns(device: torch.device, options: dict[str, Any]) -> None:
    """A function whose marked functions have not run yet is called until it is recorded, and then bound."""

    @breakable_backend.eager_on_graph
    def scaled(x: Tensor) -> Tensor:
        return x * float(x.abs().max())

    def f(x: Tensor) -> Tensor:
        return scaled(x.sin() + 1).cos() * 2

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    x = torch.randn(3, device=device)
    bound = bind(compiled, x, misfit="raise")
    for _ in range(3):
        x = torch.randn(3, device=device)
        assert_same(bound(x), f(x))
