"""Each fault of ``sabotage.py`` turns its test red, and without a fault the same tests are green."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sabotage import FAULTS, Fault, copy_to, run

BROKEN = re.compile(r"^E +(?:\w+\.)*(ImportError|ModuleNotFoundError|SyntaxError|NameError|UnboundLocalError)\b", re.M)
"""Errors that tell of a fault which is badly made: it would turn any test red."""


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[pytest.mark.gpu] if f.gpu else [], id=f.name) for f in FAULTS]
)
def test_fault_is_noticed(fault: Fault, tmp_path: Path) -> None:
    """The named test fails by its own assertions, not because the package cannot be imported."""
    if torch.__version__ < fault.since:  # a TorchVersion, which compares as versions do
        pytest.skip(f"makes a difference from torch {fault.since} on")
    copy_to(tmp_path)
    fault.apply(tmp_path)
    code, output = run(tmp_path, [fault.test], gpu=fault.gpu)
    assert code == 1, output
    assert re.search(
        r"^(1 failed|1 passed.* 1 error)", output, re.M
    )  # an error: what a fixture asserts afterwards, output
    assert not BROKEN.search(output), output


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def test_green_without_a_fault(gpu: bool, tmp_path: Path) -> None:
    """An unchanged copy passes all the named tests, so that red means the fault."""
    copy_to(tmp_path)
    tests = sorted({fault.test for fault in FAULTS if fault.gpu == gpu})
    code, output = run(tmp_path, tests, gpu=gpu)
    assert code == 0, output
    assert re.search(rf"^{len(tests)} passed in", output, re.M), output


def test_faults_fit() -> None:
    """Each fault, those for a GPU too, has its place in the package of today, and leaves it Python; names differ."""
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        compile(fault.source(), fault.module, "exec")
