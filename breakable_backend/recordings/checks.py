"""Checks in a replay: the results of eager steps, the arguments, and the addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from breakable_backend.errors import CAUSES, DivergenceError, EagerOutputError, ReplayError
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.running_ops import has_memory
from breakable_backend.recordings.copies import Bridge, inside
from breakable_backend.recordings.recording import Call, Recording, fill


def perform(call: Call, values: Mapping[str, Any]) -> Any:
    """Make ``call`` with values from ``values``, and check its result."""
    args, kwargs = fill((call.args, call.kwargs), values)
    if call.ambient is None:
        result = call.function(*args, **kwargs)
    else:
        with call.ambient.enter():
            result = call.function(*args, **kwargs)
    if call.spec is not None and not call.spec.accepts(result):
        reject(call, result)
    return result


def reject(call: Call, result: Any) -> None:
    """Raise for a result that does not fit. The quick check before this one also refuses strides that do not matter."""
    assert call.spec is not None
    if call.spec.accepts(result):
        return
    got = TensorSpec.of(result) if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"
    raise EagerOutputError(
        f"{call.label} returned {got}, but was compiled for {call.spec}",
        where=call.source,
        fix="make its fake implementation (register_fake) return what the real one returns, strides included",
    )


def check_argument(name: str, spec: TensorSpec, value: Any) -> None:
    """Raise if an argument does not fit what was recorded."""
    if not spec.accepts(value):
        got = TensorSpec.of(value) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        raise ReplayError(
            f"argument {name} is {got}, but was recorded as {spec}",
            fix="Dynamo's guards recompile for such calls: do not filter them out (guard_filter_fn)",
        )


def places_of(constants: Mapping[str, Any]) -> dict[str, int]:
    """The addresses of the tensors and bridges among ``constants``."""
    tensors = {name: inside(value) for name, value in constants.items()}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if has_memory(tensor)}


def check_places(recording: Recording, args: Sequence[Any]) -> None:
    """Raise if a value that captured segments read is not at the address that it had when they were captured."""
    values = {**recording.constants, **dict(zip(recording.arguments, args, strict=True))}
    for name, address in recording.addresses.items():
        value = values[name]
        if (now := inside(value).data_ptr()) != address:
            refuse_place(f"{'the bridge ' if isinstance(value, Bridge) else ''}{name}", now == 0)


def refuse_place(what: str, freed: bool, where: str = "") -> NoReturn:
    """Raise for memory that a captured segment would read at a wrong address."""
    fate = "was freed" if freed else "is not where it was when they were captured"
    raise DivergenceError(
        f"captured segments read {what} at its address, but it {fate}: this looks like address moved",
        where=where,
        fix=CAUSES["address moved"],
        cause="address moved",
        kind="captured",
        value=what,
    )
