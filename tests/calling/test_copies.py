"""Copies of compiled modules: ``copy``, ``deepcopy``, ``pickle`` and ``torch.save``, in this process and in another."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend import BindError, bind, eager_on_graph, explain, reset
from doors import run_alone

Make = Callable[[dict[str, Any]], nn.Module]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return silly.triple(self.linear(x)).sin() + 1


class Marked(nn.Module):
    """One whose own method is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    @eager_on_graph
    def bend(self, x: Tensor) -> Tensor:
        return x * self.linear.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(self.linear(x)).sin() + 1


class Holds(nn.Module):
    """A plain module that holds a compiled one."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def compiled(module: Any, options: dict[str, Any], backend: Any = "breakable_cg") -> Any:
    return torch.compile(module, backend=backend, options={**options, "min_kernels": 1})


def smooth(x: Tensor) -> Tensor:
    return (x.sin() + 1).cos()


@torch.compile(backend="breakable_cg", options={"driver": "tape"})
def decorated(x: Tensor) -> Tensor:
    return (x.cos() + 1).sin()


def in_place(options: dict[str, Any]) -> nn.Module:
    module = Layer()
    module.compile(backend="breakable_cg", options={**options, "min_kernels": 1})
    return module


def forward_replaced(options: dict[str, Any]) -> nn.Module:
    module = Layer()
    module.forward = compiled(module.forward, options)  # type: ignore[method-assign]
    return module


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Make] = {
    "module": lambda options: compiled(Layer(), options),
    "modules of torch": lambda options: compiled(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), options),
    "module with a marked method": lambda options: compiled(Marked(), options),
    "compiled by the object": lambda options: compiled(Layer(), options, breakable_backend.breakable_cg),
    "held by a plain module": lambda options: Holds(compiled(Layer(), options)),
    "in place": in_place,
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "save": saved,
}


def used(module: nn.Module, device: torch.device) -> nn.Module:
    with torch.no_grad():
        for _ in range(4):
            module(torch.rand(2, 3, device=device))
    return module


def plainly(module: Any, x: Tensor) -> Tensor:
    """What the module makes of ``x``, uncompiled."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        result: Tensor = module(x)
        return result


@pytest.mark.parametrize("after", [False, True], ids=["before its first call", "after some"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("way", WAYS)
def test_copies(way: str, how: str, after: bool, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3, 9 and 10: a copy is right with weights of its own, is reported on, and can be freed; so can the original."""
    original = WAYS[way](options).to(device)
    if after:
        used(original, device)
    twin = COPIES[how](original)
    if how != "copy":  # whose weights are the original's
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
    x = torch.rand(2, 3, device=device)
    for module in (used(twin, device), used(original, device)):
        with torch.no_grad():
            assert torch.equal(module(x), plainly(module, x))
    report = explain(twin)
    assert sum(program.replays for program in report.programs) >= 1
    assert ("is not compiled itself" in str(report)) == (way == "in place"), report
    assert "is not compiled itself" not in str(explain(original))
    for module, other in ((twin, original), (original, twin)):
        reset(module)
        with torch.no_grad():
            assert torch.equal(other(x), plainly(other, x))


def test_a_copy_of_what_was_compiled_in_place_can_be_compiled(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: PyTorch leaves the compiled call out of a copy; the report says so, until the copy is compiled too."""
    twin = copy.deepcopy(used(in_place(options).to(device), device))
    assert twin._compiled_call_impl is None
    assert "the Layer that was asked for is not compiled itself" in str(explain(twin))
    twin.compile(backend="breakable_cg", options={**options, "min_kernels": 1})
    used(twin, device)
    assert "is not compiled itself" not in str(explain(twin))


@pytest.mark.parametrize("how", ["pickle", "save"])
@pytest.mark.parametrize(
    "make", [lambda options: compiled(smooth, options), forward_replaced], ids=["function", "forward"]
)
def test_functions_are_not_pickled(make: Any, how: str, options: dict[str, Any]) -> None:
    """A limit of Python's: a function is pickled by its name, and that is the uncompiled function's."""
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        COPIES[how](make(options))


@pytest.mark.parametrize("how", COPIES)
def test_a_decorated_function_is_itself(how: str) -> None:
    """A function that was compiled where it is defined has the name, so its copies are the function itself."""
    assert COPIES[how](decorated) is decorated  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_a_copied_forward_is_the_originals(how: str, device: torch.device, options: dict[str, Any]) -> None:
    """A limit of Python's: a function is never copied, so an attribute ``forward`` of a copy still has the original's weights."""
    original = used(forward_replaced(options).to(device), device)
    twin, x = COPIES[how](original), torch.rand(2, 3, device=device)
    assert twin.forward is original.forward
    with torch.no_grad():
        assert torch.equal(twin(x), original(x))


def test_in_another_process(tmp_path: Path, device: torch.device, options: dict[str, Any]) -> None:
    """A compiled module that was pickled here is compiled there by its first call, without an import of this package."""
    x = torch.rand(2, 3, device=device)
    for backend in ("breakable_cg", breakable_backend.breakable_cg):
        module = compiled(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), options, backend).to(device)
        torch.save((used(module, device), x, plainly(module, x)), tmp_path / "module.pt")
        run_alone(
            f"""
import sys, torch
module, x, want = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
with torch.no_grad():
    for _ in range(4):
        assert torch.equal(module(x), want)
(program,) = sys.modules["breakable_backend"].explain(module).programs
assert (program.num_graph_segments, program.replays) == (1, 2), program
"""
        )


@pytest.mark.parametrize("thing", [Marked.bend, breakable_backend.breakable_cg, breakable_backend.eager_region])
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_what_is_there_once(thing: Any, how: str) -> None:
    """Marked functions, the backend and regions are the same objects in a copy."""
    assert COPIES[how](thing) is thing


def test_reports_and_errors_travel(options: dict[str, Any]) -> None:
    """A report, and an error with its text, come out of a pickle as they went in: they may go to another process."""
    module = used(compiled(Layer(), options), torch.device("cpu")) if options["driver"] == "tape" else None
    report = explain(module)
    assert pickle.loads(pickle.dumps(report)) == report
    for error in (
        breakable_backend.OptionsError("wrong", where="here", fix="mend it"),
        breakable_backend.DivergenceError("wrong", cause="stale bridge", step=3),
        breakable_backend.InternalError("wrong", original=ValueError("why"), fix="report it"),
    ):
        twin = pickle.loads(pickle.dumps(error))
        assert (type(twin), str(twin), twin.fix) == (type(error), str(error), error.fix)


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_bound_functions(how: str, options: dict[str, Any], device: torch.device) -> None:
    """A bound function is bound to modules and graphs of this process: a copy of it is an error that says so."""
    bound = bind(compiled(lambda x: x.sin() + 1, options), torch.ones(3, device=device))
    with pytest.raises(BindError) as caught:
        COPIES[how](bound)
    assert caught.value.what == (
        "a bound function was copied or pickled, but it is bound to the modules and the graphs of this process"
    )
    assert caught.value.fix == "copy the module, compile the copy, and bind that"
