"""Options: what may be chosen, from ``options=``, ``mode=`` and the environment."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from breakable_backend.errors import OptionsError
from breakable_backend.options import Options

NAN = float("nan")

ALLOWED: dict[str, tuple[Any, ...]] = {
    "driver": ("auto", "cuda", "tape"),
    "debug": (None, "eager", "compare"),
    "tolerance": (None, (1e-3, 1e-5), (0.0, 0.0)),
    "eager_ops": ([], ["aten::sort"], ("aten::sort",), {"aten::sort"}),
    "auto_break": (True, False),
    "outputs": ("fresh", "static"),
    "scalars": ("key", "device"),
    "max_recordings": (1, 64),
    "min_kernels": (1, 2),
    "training": (True, False),
    "inner": ("eager",),
}

REFUSED: list[tuple[Any, Any]] = [
    ("driver", "gpu"),
    ("driver", None),
    ("driver", 0),
    ("eager_ops", "aten::sort"),
    ("eager_ops", None),
    ("auto_break", 1),
    ("auto_break", 0),
    ("auto_break", "yes"),
    ("auto_break", torch.tensor(True)),
    ("outputs", "fast"),
    ("outputs", ["fresh"]),
    ("scalars", True),
    ("max_recordings", 0),
    ("max_recordings", 1.0),
    ("max_recordings", "64"),
    ("min_kernels", True),
    ("min_kernels", -1),
    ("training", 1),
    ("training", "on"),
    ("inner", "nvfuser"),
    ("inner", torch.ones(2)),
    (1, 2),
    ("debug", True),
    ("tolerance", 1e-3),
    ("tolerance", (1e-3,)),
    ("tolerance", (1e-3, -1.0)),
    ("tolerance", (NAN, 0.0)),
    ("tolerance", (True, 0.0)),
    ("tolerance", "1e-3,1e-5"),
    ("debug", "everything"),
]


def test_defaults() -> None:
    """Nothing given gives the defaults, and those are what the class says."""
    assert Options.parse(None, {}) == Options.parse({}, {}) == Options()


@pytest.mark.parametrize("given", [["static"], [("outputs", "static")], "static", 3])
def test_no_dictionary(given: Any) -> None:
    """Options that are no dictionary are an error that says so, and are not read as pairs."""
    with pytest.raises(OptionsError, match=f"options takes a dictionary, got {re.escape(repr(given))}"):
        Options.parse(given, {})


def test_every_option_has_a_case() -> None:
    """The table of this test has all options, so that a new one is tested."""
    assert list(ALLOWED) == [field.name for field in dataclasses.fields(Options)]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values])
def test_allowed(name: str, value: Any) -> None:
    """An allowed value is taken; a list of ops becomes a tuple."""
    got = getattr(Options.parse({name: value}, {}), name)
    assert got == (tuple(value) if name == "eager_ops" else value)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refused(name: str, value: Any) -> None:
    """Any other value is an error that names the option; nothing that merely equals an allowed value passes for it."""
    with pytest.raises(OptionsError, match=f"option {name!r}"):
        Options.parse({name: value}, {})


def test_not_yet() -> None:
    """A value that is to come is told from one that will never be."""
    with pytest.raises(OptionsError, match="does not exist yet"):
        Options.parse({"inner": "inductor"}, {})


@pytest.mark.parametrize(
    ("name", "near"), [("ouputs", "outputs"), ("eager_op", "eager_ops"), ("min_kernel", "min_kernels"), ("qqq", None)]
)
def test_unknown_name(name: str, near: str | None) -> None:
    """An unknown name is an error that lists all names, and the nearest where one is near."""
    with pytest.raises(OptionsError) as caught:
        Options.parse({name: 1}, {})
    assert caught.value.what == f"unknown option {name!r}" + (f"; did you mean {near!r}?" if near else "")
    assert caught.value.fix == f"options are: {', '.join(ALLOWED)}"


def test_error_is_a_value_error() -> None:
    """Code that catches ValueError catches a wrong option."""
    with pytest.raises(ValueError, match="unknown option"):
        Options.parse({"nope": 1}, {})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BREAKABLE_CG_DRIVER": " tape "}, {"driver": "tape"}),
        ({"BREAKABLE_CG_EAGER_OPS": "aten::sort, aten::topk,"}, {"eager_ops": ("aten::sort", "aten::topk")}),
        ({"BREAKABLE_CG_EAGER_OPS": ""}, {"eager_ops": ()}),
        ({"BREAKABLE_CG_AUTO_BREAK": "0"}, {"auto_break": False}),
        ({"BREAKABLE_CG_AUTO_BREAK": "False"}, {"auto_break": False}),
        ({"BREAKABLE_CG_AUTO_BREAK": "true"}, {"auto_break": True}),
        ({"BREAKABLE_CG_OUTPUTS": "static"}, {"outputs": "static"}),
        ({"BREAKABLE_CG_SCALARS": "device"}, {"scalars": "device"}),
        ({"BREAKABLE_CG_MAX_RECORDINGS": "8"}, {"max_recordings": 8}),
        ({"BREAKABLE_CG_MIN_KERNELS": " 3 "}, {"min_kernels": 3}),
        ({"BREAKABLE_CG_INNER": "eager"}, {"inner": "eager"}),
        ({"BREAKABLE_CG_DEBUG": "compare"}, {"debug": "compare"}),
        ({"BREAKABLE_CG_TOLERANCE": "1e-3, 1e-5"}, {"tolerance": (1e-3, 1e-5)}),
        ({"BREAKABLE_CG_TOLERANCE": "none"}, {"tolerance": None}),
        ({"OTHER": "1", "breakable_cg_driver": "cuda"}, {}),
    ],
)
def test_environment(environment: Mapping[str, str], expected: dict[str, Any]) -> None:
    """Each option has an environment form; other variables are left alone."""
    assert Options.parse(None, environment) == dataclasses.replace(Options(), **expected)


@pytest.mark.parametrize(
    "environment",
    [
        {"BREAKABLE_CG_DRIVER": "gpu"},
        {"BREAKABLE_CG_AUTO_BREAK": "perhaps"},
        {"BREAKABLE_CG_MIN_KERNELS": "many"},
        {"BREAKABLE_CG_MIN_KERNELS": "-1"},
        {"BREAKABLE_CG_MAX_RECORDINGS": "1.5"},
        {"BREAKABLE_CG_NOPE": "1"},
        {"BREAKABLE_CG_TOLERANCE": "little"},
        {"BREAKABLE_CG_TOLERANCE": "1e-3"},
    ],
)
def test_environment_is_checked(environment: Mapping[str, str]) -> None:
    """What stands in the environment is checked as strictly as what is passed."""
    with pytest.raises(OptionsError):
        Options.parse(None, environment)


def test_passed_wins_over_environment() -> None:
    """An option that is passed wins over the environment, for itself only."""
    environment = {"BREAKABLE_CG_MIN_KERNELS": "5", "BREAKABLE_CG_OUTPUTS": "static"}
    assert Options.parse({"min_kernels": 3}, environment) == Options(min_kernels=3, outputs="static")


def test_environment_is_read_when_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment counts as it is at the first call, not as it was at the import or at ``torch.compile``."""
    compiled = torch.compile(lambda x: x + 1, backend="breakable_cg")
    monkeypatch.setenv("BREAKABLE_CG_DRIVER", "wheel")
    with pytest.raises(OptionsError, match="'wheel'"):
        compiled(torch.zeros(2))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_that_change_nothing(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """A mode that asks for what this backend does anyway passes: transformers gives one that its user did not choose."""
    monkeypatch.setenv("BREAKABLE_CG_DRIVER", "tape")
    compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", mode=mode)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


def test_other_mode() -> None:
    """A mode of Inductor's is an error that says so."""
    with pytest.raises(OptionsError, match="mode='max-autotune' is a mode of Inductor's"):
        torch.compile(lambda x: x + 1, backend="breakable_cg", mode="max-autotune")(torch.zeros(2))
