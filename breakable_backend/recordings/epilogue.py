"""The outputs of a recorded call, and the clones of those results that have to outlive the next call.

Written inputs are copied back elsewhere: by :mod:`breakable_backend.recordings.copies`, after the segment that wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.ir.program import EagerSegment, unused
from breakable_backend.recordings.checks import perform
from breakable_backend.recordings.copies import clone_exact
from breakable_backend.recordings.locations import Locations
from breakable_backend.recordings.recording import Call, EagerStep, GraphStep, Step, Variable
from breakable_backend.recordings.specialised import SpecialisedProgram


class Epilogue:
    """Runs the epilogue of a program, which makes the caller's results from the values of the segments.

    Args:
        specialised: the program, with the arguments of this call.
        locations: the places of this call's values. Views that are made once become constants there.
        fresh: whether results in memory of the recording, which the next call overwrites, are copied for the caller.
    """

    def __init__(self, specialised: SpecialisedProgram, locations: Locations, fresh: bool) -> None:
        self.specialised, self.locations, self.fresh = specialised, locations, fresh
        self.module = specialised.program.epilogue.module
        self.values = dict(locations.values)
        """All variables, with the values of this call."""
        self.calls: list[Call] = []
        """The calls that each replay repeats."""
        self._taken = {node.name for node in self.module.graph.nodes} | set(self.values)
        self._copies: dict[str, Variable] = {}

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        """Make ``leaves``, which are outputs of the epilogue. Returns their variables, or numbers."""
        inputs = self.specialised.program.epilogue.inputs
        places: dict[str, Any] = {}
        behind = _leaves_behind(self.module, leaves)
        for name in inputs:
            place = self.locations.intact.get(name, self.locations.read_from[name])
            # If several outputs share a storage of ours, copy the storage once, and make the views on the copy.
            places[name] = self._copied(place) if behind[name] > 1 else place
        out = {name: places[name] for name in inputs if name in self.locations.let_out}
        for call in self.specialised.calls(EagerSegment(self.module, inputs, (), (), (), ()), places, None):
            source = next((out[variable] for variable in call.variables if variable in out), None)
            if source is not None:  # it has the layout of the output already
                out[call.result] = source
            places[call.result] = source or self._make(call)
        return [self._copied(places[leaf.name]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]

    def _make(self, call: Call) -> Variable:
        made = self.values[call.result] = perform(call, self.values)
        if self.locations.is_constant_view(call, made):
            self.locations.constants[call.result] = made
        else:
            self.calls.append(call)
        return Variable(call.result)

    def _copied(self, place: Any) -> Any:
        """A copy of the value, if the caller would get memory of this recording; otherwise ``place``."""
        if not self._is_to_copy(place):
            return place
        if place.name not in self._copies:
            fresh = unused(f"{place.name.replace('.', '_')}_fresh", self._taken.__contains__)
            self._taken.add(fresh)
            self._copies[place.name] = self._make(Call(fresh, clone_exact, (place,), {}, "clone"))
        return self._copies[place.name]

    def _is_to_copy(self, place: Any) -> bool:
        if not (self.fresh and isinstance(place, Variable) and isinstance(self.values[place.name], torch.Tensor)):
            return False
        return place.name not in self.locations.inputs and self.locations.is_ours(self.values[place.name])


def _leaves_behind(module: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, int]:
    """For each input of the epilogue, how many of the returned ``leaves`` depend on it."""
    behind = inputs_behind(module)
    counts = dict.fromkeys((node.name for node in module.graph.find_nodes(op="placeholder")), 0)
    for leaf in leaves:
        if isinstance(leaf, fx.Node):
            counts[behind[leaf].name] += 1
    return counts


def inputs_behind(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each node of the epilogue, the input of which it is a view."""
    behind: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            behind[node] = node
        elif node.op == "call_function":
            behind[node] = next(behind[argument] for argument in node.all_input_nodes if argument in behind)
    return behind


def settled(specialised: SpecialisedProgram, locations: Locations, steps: Sequence[Step]) -> Iterator[Call]:
    """With static results, the calls that copy inputs before anything is launched.

    Such an input may be a result of the last call, in memory that this call overwrites. If only captured segments read
    it, its bridge is loaded early, which is enough. But an eager step may read it after a launch, and a write to it
    would change a result of this call.
    """
    launches = [at for at, step in enumerate(steps) if isinstance(step, GraphStep)]
    if not launches:
        return
    late = [step.segment for step in steps[launches[0] :] if isinstance(step, EagerStep) and step.segment]
    touched = {name for segment in late for name in segment.inputs}
    touched |= {access.storage for segment in specialised.program.segments for access in segment.writes}
    owned = locations.owned_storages()

    def copied(value: torch.Tensor) -> torch.Tensor:
        return clone_exact(value) if _torch.storage_key(value) in owned else value

    for value in specialised.program.inputs:
        if value.kind == "tensor" and value.name in touched & locations.outside:
            yield Call(value.name, copied, (Variable(value.name),), {}, "settled")
