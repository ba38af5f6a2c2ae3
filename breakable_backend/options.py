"""The user's options, parsed and checked once into one frozen value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from breakable_backend.errors import OptionsError, shown

ENVIRONMENT_PREFIX = "BREAKABLE_CG_"


def _choice(*values: Any, planned: tuple[Any, ...] = ()) -> Any:
    """An option that takes one of ``values``, the first by default; ``planned`` are values that are to come."""
    return field(default=values[0], metadata={"choices": values, "planned": planned})


def _count(default: int) -> Any:
    """An option that takes an integer of at least 1."""
    return field(default=default, metadata={"smallest": 1})


@dataclass(frozen=True)
class Options:
    """The options of one compiled function.

    >>> Options.parse({"min_kernels": 4}).min_kernels
    4

    Every option also has an environment form (``BREAKABLE_CG_MIN_KERNELS=4``), which is read when the function is
    compiled, at its first call. Options that are passed to ``torch.compile`` take precedence.
    """

    driver: str = _choice("auto", "cuda", "tape")
    """``"auto"``: CUDA if the inputs are on a GPU, and otherwise the tape, which has the semantics of CUDA graphs
    without the speed."""

    debug: str | None = _choice(None, "eager", "compare")
    """``"eager"``: every op runs eagerly, through the same record and replay path. ``"compare"``: every replay is
    compared with eager, step by step."""

    tolerance: tuple[float, float] | None = None
    """How far ``debug="compare"`` lets floats differ, as ``(rtol, atol)``. None: bit for bit, where NaN equals NaN."""

    eager_ops: tuple[Any, ...] = ()
    """What runs eagerly in this function: names of ops, overloads, torch functions, modules, classes of modules."""

    auto_break: bool = _choice(True, False)
    """Whether an op that cannot be captured runs eagerly, with a reason, or is an error."""

    outputs: str = _choice("fresh", "static")
    """``"fresh"``: returned tensors belong to the caller. ``"static"``: they are the graph's own memory, without a
    copy, and are valid until the next call of any function that was compiled for the same device."""

    scalars: str = _choice("key", "device")
    """``"key"``: a host scalar is part of the key, so results equal eager bit for bit. ``"device"``: it is copied to
    the device, so that one recording serves all values; in bf16 and fp16 a few results then differ in the last bit."""

    max_recordings: int = _count(64)
    """How many recordings are kept for each set of addresses."""

    min_kernels: int = _count(2)
    """Captured segments with fewer ATen ops that launch a kernel run eagerly."""

    training: bool = _choice(True, False)
    """Whether graphs that need gradients are captured, forward and backward, or run as Dynamo traced them."""

    inner: str = _choice("eager", planned=("inductor",))
    """What compiles the captured segments."""

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Options:
        """Check ``given`` and the environment.

        Raises:
            OptionsError: an unknown option, or a value that is not allowed. The text lists what is allowed.
        """
        if not isinstance(given, Mapping | None):
            raise OptionsError(
                f"options takes a dictionary, got {shown(given)}",
                fix="options={'driver': 'tape'}: names of options, with values",
            )
        declared = _declared()
        values: dict[str, Any] = {}
        for key, text in (os.environ if environment is None else environment).items():
            if key.startswith(ENVIRONMENT_PREFIX):
                name = key.removeprefix(ENVIRONMENT_PREFIX).lower()
                values[name] = _from_text(name, text, declared[name]) if name in declared else text
        values.update(given or {})
        for name, value in values.items():
            try:
                values[name] = _checked(name, value)
            except OptionsError as error:
                if name in (given or {}):
                    raise
                variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
                raise OptionsError(f"{error.what} (from {variable} in the environment)", fix=error.fix) from None
        return cls(**values)


def _declared() -> dict[str, Mapping[str, Any]]:
    """The options by name, each with what it takes."""
    return {option.name: option.metadata for option in dataclasses.fields(Options)}


def _from_text(name: str, text: str, takes: Mapping[str, Any]) -> Any:
    """The value of an option in the environment. Text of another kind stays text, which is then refused by name."""
    text = text.strip()
    choices = takes.get("choices", ())
    if name == "eager_ops":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name == "tolerance":
        return _numbers(text)
    if "smallest" in takes:
        return int(text) if text.lstrip("-").isdigit() else text
    if None in choices and text.lower() in ("", "none"):
        return None
    if True in choices:
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    return text


def _numbers(text: str) -> Any:
    """``"1e-3, 1e-5"`` as numbers. Other text stays text, which is then refused by name."""
    if text.strip().lower() in ("", "none"):
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def _checked(name: str, value: Any) -> Any:
    declared = _declared()
    if name not in declared:
        near = difflib.get_close_matches(str(name), declared, 1)
        raise OptionsError(
            f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            fix=f"options are: {', '.join(declared)}",
        )
    if name == "tolerance":
        return _tolerance(value)
    if name == "eager_ops":
        if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
            raise OptionsError(
                f"option 'eager_ops' takes a list of ops, got {shown(value)}", fix=f"eager_ops=[{shown(value)}]"
            )
        return tuple(value)
    takes = declared[name]
    if "smallest" in takes:
        if isinstance(value, bool) or not isinstance(value, int) or value < takes["smallest"]:
            raise OptionsError(
                f"option {name!r} takes an integer of at least {takes['smallest']}, got {shown(value)}",
                fix=f"for example options={{{name!r}: {takes['smallest']}}}",
            )
        return value
    allowed = takes["choices"]
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        if isinstance(value, str) and value in takes["planned"]:
            raise OptionsError(f"option {name}={value!r} does not exist yet", fix=f"use {name}={allowed[0]!r}")
        raise OptionsError(
            f"option {name!r} does not take {shown(value)}",
            fix=f"allowed: {', '.join(repr(choice) for choice in allowed)}",
        )
    return value


def _tolerance(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 2 or not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
        raise OptionsError(
            f"option 'tolerance' does not take {shown(value)}",
            fix="give (rtol, atol), two numbers of at least 0, or None",
        )
    return float(numbers[0]), float(numbers[1])
