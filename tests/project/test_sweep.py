"""A quick part of the sweep over PyTorch's databases (``make sweep``), and that the sweep notices what it looks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sweep
from breakable_backend import is_capturing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the databases use what torch deprecates
    import opinfos

ONCE_DIFFERED = (
    # the sign of zero; a copy, and other strides, where nothing is dropped; other sums
    "nn.functional.softshrink nn.functional.hardshrink nn.functional.dropout native_batch_norm nn.functional.batch_norm "
    "nn.functional.interpolate.bicubic nn.functional.interpolate.bilinear "
    "nn.functional.multi_margin_loss stft"
).split()
BREAK = "linalg.cond norm.nuc linalg.svdvals linalg.eigvalsh".split()
"""Ops with an eager step inside, or that are nothing else. Each once differed: torch traced vectors that nobody asked for."""
CAPTURED = (
    *"linalg.cond linalg.eigvalsh linalg.matrix_rank norm.nuc matmul nn.functional.dropout addbmm".split(),
    *map(
        "backward of {}".format, "prod cumprod masked_fill max.reduction_no_dim matmul nn.functional.layer_norm".split()
    ),
)
"""Ops at the second door. Most once differed there, since their code asks whether a mode is active."""
GRADIENTS = "softmax nn.functional.layer_norm masked_fill as_strided_copy".split()
"""Ops with gradients. Two once differed: autograd traced another formula, or counted from another element."""


@pytest.fixture(scope="module")
def databases() -> Iterator[dict[str, Any]]:
    with opinfos.traceable():
        yield opinfos.ops()


@pytest.mark.parametrize("name", ONCE_DIFFERED)
def test_as_eager(name: str, databases: dict[str, Any], device: torch.device) -> None:
    """Ops that AOTAutograd would take apart into something else are captured as the kernels that eager runs."""
    case = next(iter(opinfos.cases(databases[name], device)))
    for form in opinfos.FORMS:
        outcome = opinfos.try_case(case, form, case.samples, device)
        assert (outcome.differs, outcome.failed, outcome.reference) == ("", "", "eager")
        assert outcome.captured


@pytest.mark.parametrize("name", BREAK)
def test_as_eager_with_breaks(name: str, databases: dict[str, Any], device: torch.device) -> None:
    """Ops that wait for the host are the kernels that eager runs."""
    case = next(iter(opinfos.cases(databases[name], device)))
    for form in opinfos.FORMS:
        for sample in case.samples:
            outcome = opinfos.try_case(case, form, [sample], device)
            assert (outcome.differs, outcome.failed, outcome.reference) == ("", "", "eager")


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_as_eager(name: str, databases: dict[str, Any], device: torch.device) -> None:
    """Forward and backward with ``training=True`` have eager's bits, whether they are captured or not."""
    case = next(iter(opinfos.cases(databases[opinfos.BACKWARD + name], device, training=True)))
    assert any(tensor.requires_grad for sample in case.samples for tensor in opinfos.tensors_in(sample.calls))
    for sample in case.samples:
        outcome = opinfos.try_case(case, "alone", [sample], device)
        assert (outcome.differs, outcome.failed, outcome.reference) == ("", "", "eager")
        assert outcome.captured or name not in GRADIENTS[:2]


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_as_eager(name: str, databases: dict[str, Any], device: torch.device) -> None:
    """At the second door these have eager's bits in the capture and in five replays, forward and backward."""
    training = opinfos.is_backward(name)
    case = replace(next(iter(opinfos.cases(databases[name], device, training))), door=opinfos.CAPTURE)
    for form in ["alone"] if training else opinfos.FORMS:
        for sample in case.samples:
            outcome = opinfos.try_case(case, form, [sample], device)
            assert (outcome.differs, outcome.failed, outcome.reference) == ("", "", "eager")


def test_planted_difference_in_replays_is_noticed() -> None:
    """What a capture freezes is found to differ in the call that has another value; what it refuses is told as refused."""
    device, x = torch.device("cpu"), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    calls = iter(range(100))
    frozen = opinfos.Case("planted", "number", lambda x: x + next(calls), (sample(x),), door=opinfos.CAPTURE)
    outcome = opinfos.try_case(frozen, "alone", frozen.samples, device)
    assert (outcome.differs, outcome.reference) == ("", "nothing")  # eager is not the same each time either
    inside = opinfos.Case("planted", "bit", lambda x: x + is_capturing(), (sample(x),), door=opinfos.CAPTURE)
    assert opinfos.try_case(inside, "alone", inside.samples, device).differs == "call 1: bits"
    reads = opinfos.Case("planted", "read", lambda x: x * x.sum().item(), (sample(x),), door=opinfos.CAPTURE)
    assert "refused: CaptureError" in opinfos.try_case(reads, "alone", reads.samples, device).failed


def nudged(x: Tensor) -> Tensor:
    return torch.where(x == x.max(), torch.nextafter(x, x + 1), x) if torch.compiler.is_compiling() else x + 0


def unsigned(x: Tensor) -> Tensor:
    return x.abs() * 0 if torch.compiler.is_compiling() else x.abs() * -0.0


def transposed(x: Tensor) -> Tensor:
    return (x.t().contiguous() + 1).t() if torch.compiler.is_compiling() else x + 1


def wider(x: Tensor) -> Tensor:
    return x.double() if torch.compiler.is_compiling() else x + 0


def copied(x: Tensor) -> Tensor:
    return x.clone() if torch.compiler.is_compiling() else x.view_as(x)


def written(x: Tensor) -> Tensor:
    return x.add_(1) + 1 if torch.compiler.is_compiling() else x + 2


def drawn(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        torch.rand(1, device=x.device)
    return x + 1


PLANTED: dict[str, tuple[Callable[..., Any], str]] = {
    "last bit": (nudged, "bits"),
    "sign of zero": (unsigned, "bits"),
    "strides": (transposed, "shapes, dtypes or strides"),
    "dtype": (wider, "shapes, dtypes or strides"),
    "alias": (copied, "aliases"),
    "input": (written, "inputs afterwards"),
    "random state": (drawn, "random state"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_difference_is_noticed(kind: str) -> None:
    """A program that differs from eager's in one respect is found to differ in that respect."""
    function, part = PLANTED[kind]
    device = torch.device("cpu")
    case = opinfos.Case("planted", kind, function, (sample(torch.tensor([[1.0, 2.0], [3.0, 4.0]])),))
    want = opinfos.watch(opinfos.alone(function, 1), None, case.samples, device, case)
    got = opinfos.watch(torch.compile(opinfos.alone(function, 1), backend="eager"), None, case.samples, device, case)
    assert got.differs(want) == f"call 1: {part}"
    outcome = opinfos.try_case(case, "alone", case.samples, device)
    assert (outcome.differs, outcome.reference) == ("", "dynamo")  # it is Dynamo's own, and the row says so


def steeper(x: Tensor) -> Tensor:
    return x + (x - x.detach()) if torch.compiler.is_compiling() else x + (x - x).detach()


def cut(x: Tensor) -> Tensor:
    return x.detach() * 1 + x[:1] * 0 if torch.compiler.is_compiling() else x * 1 + x[:1] * 0


@pytest.mark.parametrize("function", [steeper, cut])
def test_planted_gradient_is_noticed(function: Callable[..., Any]) -> None:
    """A program with other gradients than eager's is found to differ in those; the row says what AOTAutograd does alone."""
    device, x = torch.device("cpu"), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    calls = tuple((((x.detach() + call).requires_grad_(),), {}) for call in range(opinfos.CALLS))
    case = opinfos.Case("planted", "gradient", function, (opinfos.Sample(calls),), training=True)
    want = opinfos.watch(opinfos.alone(function, 1), None, case.samples, device, case)
    got = opinfos.watch(torch.compile(opinfos.alone(function, 1), backend="eager"), None, case.samples, device, case)
    assert got.differs(want) == "call 1: gradients"
    outcome = opinfos.try_case(case, "alone", case.samples, device)
    assert (outcome.differs, outcome.reference, outcome.aot) == ("", "dynamo", "call 1: gradients")


def sample(x: Tensor) -> opinfos.Sample:
    return opinfos.Sample(tuple(((x + call,), {}) for call in range(opinfos.CALLS)))


def test_one_nan_is_like_another() -> None:
    """NaN is NaN whatever its bits are; zeros have signs."""
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert opinfos.value_bits(nan[:1]) == opinfos.value_bits(nan[1:])
    assert opinfos.value_bits(torch.tensor(0.0)) != opinfos.value_bits(torch.tensor(-0.0))


def test_a_crash_costs_one_op(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies is replaced; the row of its op says so, and what it had found is kept."""
    fake = tmp_path / "worker.py"
    fake.write_text(WORKER, encoding="utf-8")
    monkeypatch.setattr(sweep, "WORKER", fake)
    results = tmp_path / "results.jsonl"
    arguments = ["--results", str(results), "--processes", "1", "--budget", "5"]
    sweep.main([*arguments, "--only", "good", "dies"])
    sweep.main(arguments)
    found = {row["op"]: row for row in sweep.rows(results)}
    assert list(found) == ["good", "dies", "last"]
    assert "died" in found["dies"]["stopped"] and len(found["dies"]["outcomes"]) == 1
    assert [sweep.verdict(found[name])[0] for name in ("good", "dies", "last")] == ["captured", "stopped", "captured"]


WORKER = """
import json, os, sys
print(json.dumps({"torch": "0", "ops": ["good", "dies", "last"]}), flush=True)
for line in sys.stdin:
    print(json.dumps({"what": "", "form": "alone", "samples": 1, "captured": True, "reasons": []}), flush=True)
    if line.strip() == "dies":
        os._exit(3)
    print("null", flush=True)
"""
