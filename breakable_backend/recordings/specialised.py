"""A program with the arguments of one call, to which its sizes are bound, and the plan by which it is recorded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.ir.ambient_modes import ambient_of
from breakable_backend.ir.effects import is_checked_by_nobody, is_opaque, producer_of
from breakable_backend.ir.layout import TensorSpec, numbers_in
from breakable_backend.ir.program import EagerSegment, GraphSegment, Input, Program
from breakable_backend.ir.source_lines import source_line
from breakable_backend.ir.views import is_view
from breakable_backend.marks.call_ops import direct, is_call
from breakable_backend.marks.rules import label
from breakable_backend.recordings.generated_code import with_code
from breakable_backend.recordings.observer import Observers
from breakable_backend.recordings.recording import Call, Variable
from breakable_backend.recordings.repair import NodeByNode, Recut

if TYPE_CHECKING:
    import sympy


@dataclass(frozen=True)
class Plan:
    """How a program is recorded, beyond what it says itself: how arguments enter captured segments, what is held."""

    keyed: frozenset[str] = frozenset()
    """Tensor inputs whose address is part of the key, so that captured segments use them directly."""
    device_scalars: bool = False
    """Whether host scalars have a bridge on the device instead of being part of the key."""
    fresh_outputs: bool = True
    saved_from: int | None = None
    """From this output on, the outputs are values that a backward needs. They are not copied, and the recording holds
    their memory."""
    observer: Observers | None = None
    keep: bool = False
    """Whether every value and bridge is held as long as the recording lives."""
    auto_break: bool = True
    """Whether a node that cannot be captured becomes eager. Otherwise it is an error."""
    recut: Recut | None = None
    """Cuts the program anew around nodes that cannot be captured. Without it the whole segment becomes eager."""

    def has_bridge(self, value: Input) -> bool:
        """Whether captured segments reach an input only through a bridge."""
        return (
            self.device_scalars if value.kind == "scalar" else value.kind == "tensor" and value.name not in self.keyed
        )

    @property
    def apart(self) -> bool:
        """Whether the recording has its own memory, since later calls read values that are returned without a copy."""
        return self.saved_from is not None or not self.fresh_outputs


@dataclass(frozen=True)
class SpecialisedProgram:
    """A program with the arguments of one call: every number is known."""

    program: Program
    values: Mapping[str, Any]
    """Arguments, constants of the traced code, and sizes, by name."""
    symbols: Mapping[sympy.Symbol, int]
    observer: Observers | None = None

    @classmethod
    def of(cls, program: Program, args: Sequence[Any], observer: Observers | None = None) -> SpecialisedProgram:
        values = {value.name: value.value if value.index < 0 else args[value.index] for value in program.inputs}
        symbols: dict[sympy.Symbol, int] = {}
        for value in program.inputs:
            _bind(value, values[value.name], symbols)
        return cls(program, values | cls._sizes(program, values, symbols), symbols, observer)

    def recut(self, program: Program) -> SpecialisedProgram:
        """The same arguments for ``program``, which was cut from the same graph."""
        values = {name: self.values[name] for name in self.values if name not in self.program.sizes}
        return SpecialisedProgram(
            program, values | self._sizes(program, values, self.symbols), self.symbols, self.observer
        )

    @staticmethod
    def _sizes(program: Program, values: Mapping[str, Any], symbols: Mapping[sympy.Symbol, int]) -> dict[str, Any]:
        sizes = {
            name: _torch.evaluate(size, symbols) for name, size in program.sizes.items() if name not in program.floats
        }
        return sizes | {name: values[held].item() for name, held in program.floats.items()}

    def captured(self, position: int, segment: GraphSegment) -> Callable[..., Any]:
        """A captured segment as a function of its inputs."""
        if self.observer is None:
            return with_code(segment.module)
        return self.observer.captured(position, NodeByNode(segment.module))

    def calls(self, segment: EagerSegment, inputs: Mapping[str, Any], device_type: str | None) -> list[Call]:
        """The calls of an eager segment.

        Args:
            segment: the segment.
            inputs: what the calls take for each input, by name.
            device_type: asks for functions to call directly.
        """
        environment: dict[fx.Node, Any] = {}
        calls: list[Call] = []
        for node in segment.module.graph.nodes:
            if node.op == "placeholder":
                environment[node] = inputs[node.name]
            elif node.op == "get_attr":
                environment[node] = getattr(segment.module, node.target)
            elif node.op == "call_function":
                calls.append(self._call(node, environment, device_type))
                environment[node] = Variable(node.name)
        return calls

    def _call(self, node: fx.Node, environment: Mapping[fx.Node, Any], device_type: str | None) -> Call:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
        function: Any = node.target
        if device_type is not None and isinstance(function, _torch.OpOverload):
            if is_call(function):
                site, args = args[0], args[1:]
                assert isinstance(site, int)
                function = direct(function, site)
            else:
                function = _torch.python_implementation(function, device_type) or function
        producer = producer_of(node)
        value = node.meta.get("val")
        checked = isinstance(value, torch.Tensor) and must_fit(producer) and self._known(value)
        view = is_view(node)
        if self.observer is not None and not (view or function is operator.getitem):
            function = self.observer.eager(function, label(producer), source_line(producer))
        return Call(
            result=node.name,
            function=function,
            args=tuple(args),
            kwargs=kwargs,
            label=label(producer),
            source=source_line(producer),
            spec=TensorSpec.of(value, self.symbols) if checked and value is not None else None,
            ambient=ambient_of(node),
            view=view,
        )

    def _known(self, value: torch.Tensor) -> bool:
        return bool(_torch.free_symbols(numbers_in(value)) <= self.symbols.keys())


def must_fit(maker: fx.Node) -> bool:
    """Whether the results of an eager call may differ from its fake without anybody else noticing."""
    return is_opaque(maker.target) or is_checked_by_nobody(maker)


def _bind(value: Input, actual: Any, symbols: dict[sympy.Symbol, int]) -> None:
    fake = value.value
    if value.kind == "ragged":
        return
    for symbolic, number in zip(numbers_in(fake), numbers_in(actual), strict=True):
        if isinstance(symbolic, torch.SymInt) and (symbol := _torch.symbol_of(symbolic)) is not None:
            symbols[symbol] = int(number)
