"""What the report says against a break of Dynamo's: with it, there is one program, and it is replayed."""

from __future__ import annotations

import contextlib
import linecache
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import eager_on_graph, explain
from breakable_backend.tools.advice import MARK_THE_MODULE, SCALARS, SHAPES, advice
from checks import assert_same

pytestmark = pytest.mark.usefixtures("no_grad")


def item(x: Tensor) -> Tensor:
    y = x.sin() * 2
    n = y.sum().item()
    return y * n + 1


def mask(x: Tensor) -> Tensor:
    y = x.sin() * 2
    z = y[y > 0]
    return z * 2 + 1


def branch(x: Tensor) -> Tensor:
    y = x.sin() * 2
    y = y + 1 if y.sum() > 0 else y
    return y.cos() + 1


def block(x: Tensor) -> Tensor:
    y = x.sin() * 2
    if y.sum() > 0:
        y = y + 1
    return y.cos() + 1


def listed(x: Tensor) -> Tensor:
    y = x.sin() * 2
    n = max(y.tolist())
    return y.cos() + n


def printed(x: Tensor) -> Tensor:
    y = x.sin() * 2
    print(end="")  # noqa: T201 - what is compiled
    return y.cos() + 1


@torch.compiler.disable
def off(x: Tensor) -> Tensor:
    return x + 1


def disabled(x: Tensor) -> Tensor:
    y = off(x.sin() * 2)
    return y.cos() + 1


def asked(x: Tensor) -> Tensor:
    y = x.sin() * 2
    torch._dynamo.graph_break()
    return y.cos() + 1


@eager_on_graph
def chosen(y: Tensor) -> Tensor:
    return y + 1 if y.sum() > 0 else y + 0


@eager_on_graph
def largest(y: Tensor) -> Tensor:
    return torch.tensor(max(y.tolist()), device=y.device)


@eager_on_graph
def noted(y: Tensor) -> Tensor:
    print(end="")  # noqa: T201 - what is compiled
    return y * 1


on = eager_on_graph(lambda x: x + 1)


class Case(NamedTuple):
    """A function that Dynamo breaks, what is said against that, and the function or the setting that follows it."""

    function: Callable[[Tensor], Tensor]
    says: str
    cured: Callable[[Tensor], Tensor] | None = None
    setting: str = ""


CASES = {
    "item": Case(item, f"set {SCALARS}, or put `n = y.sum().item()` into a function", setting="capture_scalar_outputs"),
    "mask": Case(mask, f"set {SHAPES}, or put `z = y[y > 0]` into", setting="capture_dynamic_output_shape_ops"),
    "branch": Case(
        branch,
        "put `y = y + 1 if y.sum() > 0 else y` into a function of its own under @eager_on_graph; where both",
        lambda x: chosen(x.sin() * 2).cos() + 1,
    ),
    "block": Case(
        block,
        "put the block that begins with `if y.sum() > 0:` into a function of its own",
        lambda x: chosen(x.sin() * 2).cos() + 1,
    ),
    "where": Case(
        branch, "torch.where needs no mark", lambda x: torch.where((y := x.sin() * 2).sum() > 0, y + 1, y).cos() + 1
    ),
    "tolist": Case(
        listed,
        "put `n = max(y.tolist())` into a function of its own under @eager_on_graph",
        lambda x: (y := x.sin() * 2).cos() + largest(y),
    ),
    "print": Case(printed, "put `print(end=", lambda x: noted(x.sin() * 2).cos() + 1),
    "disable": Case(
        disabled,
        "put @eager_on_graph in the place of torch.compiler.disable",
        lambda x: on(x.sin() * 2).cos() + 1,
    ),
    "graph_break": Case(asked, "take the call of torch._dynamo.graph_break() out", lambda x: (x.sin() * 2).cos() + 1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_helps(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """The report has the line and what helps; who does that has one program, which is replayed, with the same values."""
    case = CASES[name]
    torch._dynamo.utils.graph_break_reasons.clear()
    x = torch.rand(8, device=device)
    compiled = torch.compile(case.function, backend="breakable_cg", options=options)
    want = case.function(x)
    assert_same(compiled(x), want)
    lines = str(explain(compiled)).splitlines()
    position = next(place for place, line in enumerate(lines) if line.startswith("Dynamo broke the graph"))
    assert lines[position + 1].startswith("  to keep one program: ") and case.says in lines[position + 1], lines

    torch._dynamo.reset()
    torch._dynamo.utils.graph_break_reasons.clear()
    setting = torch._dynamo.config.patch({case.setting: True}) if case.setting else contextlib.nullcontext()
    with setting:
        compiled = torch.compile(
            case.cured or case.function, backend="breakable_cg", options={**options, "min_kernels": 1}
        )
        for _ in range(6):
            assert_same(compiled(x), want)
    report = explain(compiled)
    assert not report.graph_breaks, report.graph_breaks
    best = max(report.programs, key=lambda program: program.replays)
    assert best.replays >= 3 and best.num_graph_segments >= 1, str(report)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.into(x).sin())[0].cos() * 2


def test_a_recurrent_module() -> None:
    """Dynamo compiles nothing of what calls a recurrent module, or breaks there; the report has the setting that helps.

    On the CPU: on a GPU (torch 2.11) nothing was compiled with the setting either.
    """
    options: dict[str, Any] = {"driver": "tape", "min_kernels": 1}
    model, x = Recurrent(), torch.rand(2, 3, 4)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    compiled(x)
    lines = str(explain(compiled)).splitlines()
    (place,) = (number for number, line in enumerate(lines) if "RNN, GRU, or LSTM, at test_advice.py" in line)
    assert lines[place].startswith(("Dynamo compiled nothing of forward", "Dynamo broke the graph 1x: Dynamo does not"))
    assert lines[place + 1].endswith(": set torch._dynamo.config.allow_rnn = True")

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="breakable_cg", options=options)
        for _ in range(4):
            assert_same(compiled(x), model(x))
    assert explain(compiled).programs[0].replays >= 2


def test_a_break_that_was_put_off() -> None:
    """A break that Dynamo puts off until the call has the reason that it was put off for."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        x.t_()
        return y + x

    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "tape"})
    compiled(torch.rand(3, 3))
    (why,) = explain(compiled).graph_breaks
    assert why.startswith("Getting an inplace view on a graph input is not supported, at "), why


def test_a_break_in_code_of_torch() -> None:
    """Where no line is the user's, the advice names no line to change."""
    told = advice("Failed to convert args/kwargs to proxy\n  Explanation: ...")
    assert told.startswith("put the call of what Dynamo could not trace into a function under @eager_on_graph")
    assert "mark_eager" in told


def test_a_break_in_a_package_whose_name_begins_with_torch() -> None:
    """Code of torchvision, which lies beside torch, has lines that can be changed: the reason has the innermost."""
    file, text = (
        f"{Path(torch.__file__).parent}vision/ops.py",
        "def inner(x):\n    return x.cpu() if x.sum() > 0 else -x\n",
    )
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    names: dict[str, Any] = {}
    exec(compile(text, file, "exec"), names)
    inner = names["inner"]

    def function(x: Tensor) -> Tensor:
        return inner(x * 2) + 1

    compiled = torch.compile(function, backend="breakable_cg", options={"driver": "tape"})
    compiled(torch.rand(3))
    (why,) = explain(compiled).graph_breaks
    assert why.partition("\n")[0].endswith(f", at {file}:2 in inner: return x.cpu() if x.sum() > 0 else -x"), why


def test_nothing_is_said_of_marked_functions() -> None:
    """A break at a marked function has its own reason, and an unknown one gets the advice that fits all."""
    assert advice("choose, is no node: it returned a Request, at model.py:3 in forward: choose(x)") == ""
    assert (
        advice("choose, is no node: it returned a Request, at model.py:3 in forward: choose(x)\n  return it")
        == "return it"
    )
    assert advice("Something new") == MARK_THE_MODULE


# --- graphs that run as Dynamo traced them ----------------------------------------------------------------------------------


@eager_on_graph(backward=lambda context, grad: (grad * float(context.args[0].abs().max()), None))
def one_of_two(x: Tensor, unused: Tensor) -> Tensor:
    return x * float(x.detach().abs().max())


def trained(case: str, model: Any, device: torch.device, options: dict[str, Any]) -> Any:
    """``model``, compiled and run forward and backward three times."""
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "training": True})
    for _ in range(3):
        x = torch.randn(3, device=device, requires_grad=True)
        with torch.enable_grad(), torch.autocast(device.type, enabled=case == "autocast"):
            y = compiled(x).sum()
            if case != "no backward":
                y.backward()
    return compiled


@pytest.mark.parametrize(
    ("case", "model", "why", "cure"),
    [
        ("autocast", lambda x: x.sin() * 2, "a backward was run under autocast", "end the torch.autocast block before"),
        ("no backward", lambda x: x.sin() * 2, "no backward has been seen", "DataLoader(..., drop_last=True)"),
        (
            "no gradient",
            lambda x: one_of_two(x.sin(), x.cos()) * 2,
            "one_of_two gives one of its arguments no gradient",
            "return zeros in place of None",
        ),
        (
            "alias",
            lambda x: x.view(3),
            "an output is, or views, an argument",
            "clone()",
        ),
        (
            "number",
            lambda x: x.sin() * x.detach().abs().max().item(),
            "known only at run time",
            "keep the number in a tensor",
        ),
    ],
    ids=["autocast", "no backward", "no gradient", "alias", "number"],
)
def test_graphs_with_gradients(
    case: str, model: Any, why: str, cure: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Where a graph that needs gradients is not captured, the report says why, and what would have it captured."""
    with torch._dynamo.config.patch(capture_scalar_outputs=case == "number"):
        compiled = trained(case, model, device, options)
    lines = str(explain(compiled)).splitlines()
    (at,) = (number for number, line in enumerate(lines) if why in line and "eager, because" in line)
    assert any(line.startswith("  to have it captured: ") and cure in line for line in lines[at + 1 : at + 3])
    assert [cure in text for told, text in explain(compiled).to_dict()["advice"].items() if why in told] == [True]


@pytest.mark.parametrize("model", [lambda x: x.sin() * x.detach().abs().max(), lambda x: one_of_two(x.sin(), x) * 2])
@torch.enable_grad()
def test_numbers_in_tensors_train(model: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Both cures of a graph with a number that is read on the host: a tensor, and a marked function that reads it."""
    compiled = torch.compile(model, backend="breakable_cg", options={**options, "min_kernels": 1})
    for _ in range(7):
        ours = torch.randn(3, device=device).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        compiled(ours).sum().backward()
        model(theirs).sum().backward()
        assert ours.grad is not None and theirs.grad is not None
        assert_same(ours.grad, theirs.grad)
    assert all(program.replays for program in explain(compiled).programs)


def test_the_gradients_of_a_marked_function_have_its_name(device: torch.device, options: dict[str, Any]) -> None:
    """In a report the step that makes the gradients of a marked function is called after it."""

    def model(x: Tensor) -> Tensor:
        return one_of_two(x.sin() * 2, x.detach()).cos() * 2

    told = str(explain(trained("", model, device, options)))
    assert "backward of one_of_two" in told
    assert "breakable_cg::" not in told
    assert "tagged cudagraph_unsafe" not in told
