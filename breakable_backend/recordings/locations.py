"""Where each value of a call is while the call is recorded: outside, in a bridge, or in pool memory; and who owns it.

Memory that captured segments read or make belongs to the pool. While a recording is made, each value and each bridge
holds its part of the pool until its last reader was recorded. Then later segments, and later recordings, may get that
memory, since replays and calls keep this order. The finished recording knows addresses only. It holds what a backward
needs, static results, bridges of small inputs, and everything if a tool asks for that. Arguments, static inputs
included, belong to the caller and are in no constant, not even as a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.drivers import CaptureDriver
from breakable_backend.ir.effects import tensors_of
from breakable_backend.ir.last_uses import Lifetimes, last_uses
from breakable_backend.ir.layout import Geometry, extent
from breakable_backend.ir.program import Program, Segment, outputs_of
from breakable_backend.recordings import copies
from breakable_backend.recordings.copies import Bridge
from breakable_backend.recordings.recording import Call, Copy, Held, Variable, bridge_name
from breakable_backend.recordings.specialised import Plan, SpecialisedProgram


class Locations:
    """Where the variables of one recording are, and their values in this call.

    Args:
        specialised: the program, with the arguments of this call.
        driver: has the pool.
        plan: which inputs have a bridge, and what is held as long as the recording lives.
    """

    def __init__(self, specialised: SpecialisedProgram, driver: CaptureDriver, plan: Plan) -> None:
        program, self.driver = specialised.program, driver
        leaves = outputs_of(program.epilogue.module)
        self.saved = tuple(leaf.name for leaf in leaves[plan.saved_from :]) if plan.saved_from is not None else ()
        """The values among the outputs that a backward needs."""
        self.keep, self.static = plan.keep or not driver.reuses_memory, not plan.fresh_outputs
        self.values: dict[str, Any] = dict(specialised.values)
        """All variables, with the values of this call."""
        self.constants: dict[str, Any] = {v.name: self.values[v.name] for v in program.inputs if v.kind == "constant"}
        numbers = {v.name for v in program.inputs if v.kind == "number" and v.name not in program.passed_on}
        self.read_from: dict[str, Any] = {value.name: Variable(value.name) for value in program.inputs}
        self.read_from |= {name: self.values[name] for name in numbers}
        """Where later readers find a value that segments exchange: a variable, or the number itself."""
        self.outside = {value.name for value in program.inputs if plan.has_bridge(value)}
        """Storages that captured segments reach only through a bridge: unkeyed inputs, and results of eager steps."""
        self.loaded: set[str] = set()
        """Inputs whose bridge holds their present version."""
        self.intact: dict[str, Variable] = {}
        """Bridged results of eager steps that nothing has written since, with the variable of the result itself."""
        self.owners: dict[str, torch.Tensor | Bridge] = {}
        """The owners of pool memory, by variable. Constants lie at the same addresses, and own nothing."""
        self.most = Held()
        """The most that was held at the same time, besides what is held for good."""
        self.let_out: set[str] = set()
        """Values that a graph copies to the caller's memory by itself, in the layout of the output that they become."""
        self._lent: set[int] = set()
        """Constants lie on storages over the memory of their owners: the keys of these storages."""
        self._pinned: set[str] = set()
        """Variables whose memory an eager step has also returned. It is held, since that result may be read later."""
        self._made_for: dict[str, int] = {}
        """The segment that each bridge was made for, by variable."""
        self._dead: list[tuple[str, ...]] = []
        """For each segment, the names that nobody reads after it; empty until :meth:`keep_nothing`."""
        self.follow(specialised)

    def follow(self, specialised: SpecialisedProgram) -> None:
        """The rest of the call belongs to ``specialised``, whose program was cut anew."""
        self.inputs = specialised.values.keys()
        self.lives = Lifetimes.of(specialised.program)
        for name in specialised.program.sizes:
            self.read_from[name] = self.values[name] = specialised.values[name]

    # bridges

    def bridge(self, name: str, position: int) -> Copy | None:
        """Make ``name`` reachable for segment ``position``. Returns the copy that each call needs for this, if any."""
        if name not in self.outside or name in self.loaded:
            return None
        bridge = Variable(bridge_name(name))
        if bridge.name not in self.values:
            self.values[bridge.name] = self.constants[bridge.name] = self._made_bridge(name, bridge.name)
            self._made_for[bridge.name] = position
        self.loaded.add(name)
        if name not in self.inputs:
            # From here on this value lives in the bridge, for eager steps too.
            self.intact[name] = Variable(name)
            inside = Variable(_inside_name(name))
            self.values[inside.name] = self.constants[inside.name] = self.values[bridge.name].tensor
            self.read_from[name] = inside
        return Copy(bridge, Variable(name), self.values[name].device)

    def _made_bridge(self, name: str, variable: str) -> Bridge:
        """A bridge for ``name`` in pool memory, which it holds until its last captured reader is recorded."""
        value = self.values[name]
        driver = self.driver.on(value.device)
        small = name in self.inputs and extent(value) * value.element_size() <= copies.KEPT_INPUT
        if self._is_kept(name) or small or value.numel() == 0:
            return Bridge.like(value, driver.device)
        with driver.allocating():
            made = Bridge.like(value, driver.device)
        owner = made.on(driver.lend(made.tensor).untyped_storage())
        place = _torch.unowned_storage(owner.tensor.untyped_storage())
        self._hold(variable, owner, place)
        return made.on(place)

    def unbridge(self, copy: Copy, position: int) -> None:
        """Undo :meth:`bridge`: segment ``position``, which asked for it, is no graph, so no replay loads the bridge."""
        name = copy.value.name
        self.loaded.discard(name)
        if name not in self.inputs:
            self.intact.pop(name)
            self.read_from[name] = Variable(name)
            self.constants.pop(_inside_name(name))
        if self._made_for.get(copy.bridge.name) == position:  # no graph before it knows the bridge's address
            for held in (self.values, self.constants, self.owners):
                held.pop(copy.bridge.name, None)

    def inside(self, name: str) -> Any:
        """``name`` as a captured segment sees it."""
        if name in self.outside:
            bridge = bridge_name(name)
            return self.owners.get(bridge, self.values[bridge]).tensor
        place = self.read_from[name]
        # The tensor that owns the memory, since a segment's result may be an alias of it.
        return self.owners.get(place.name, self.values[place.name]) if isinstance(place, Variable) else place

    # what steps make and change

    def captured(
        self, names: Sequence[str], results: Sequence[Any], inputs: Sequence[Any], out: Mapping[str, torch.Tensor]
    ) -> None:
        """Note the ``results`` of a captured segment. Each holds its memory until its last reader is recorded.

        The graph has copied those in ``out`` there by itself, and they are the caller's.
        """
        with_memory = [tensor for tensor in tensors_of(inputs) if tensor.layout is torch.strided]
        lent: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage | None]]
        lent = {_torch.storage_key(tensor): (tensor.untyped_storage(), None) for tensor in with_memory}
        for name, result in zip(names, results, strict=True):
            self.read_from[name] = Variable(name)
            if name in out:
                self.values[name] = out[name]
                self.let_out.add(name)
                continue
            self.values[name] = self.constants[name] = result
            if self._is_kept(name) or not self._is_memory(result):
                continue
            key = _torch.storage_key(result)
            if key not in lent:
                lent[key] = self.driver.on(result.device).lend(result).untyped_storage(), None
            owner, place = lent[key]
            place = place if place is not None else _torch.unowned_storage(owner)
            lent[key] = owner, place
            geometry = Geometry.of(result)
            self._hold(name, geometry.on(owner), place)
            self.values[name] = self.constants[name] = geometry.on(place)
        self.most = self.most.or_more(Held.by(self.owners.values()))

    def uncaptured(self, names: Sequence[str]) -> None:
        """Undo :meth:`captured`: the graph could not be launched."""
        self.let_out.difference_update(names)
        for name in names:
            self.owners.pop(name, None)
            self.constants.pop(name, None)

    def _is_memory(self, value: Any) -> bool:
        """Whether ``value`` is a tensor in pool memory."""
        is_plain = type(value) is torch.Tensor and value.layout is torch.strided
        return is_plain and value.device in self.driver.devices and value.untyped_storage().nbytes() > 0

    def returned(self, name: str, value: Any) -> None:
        """Note an eager step's result, for later segments."""
        self.values[name] = value
        self.read_from[name] = Variable(name)
        if isinstance(value, torch.Tensor):
            self.outside.add(name)
        self._pinned.update(self._behind(value))

    def written(self, segment: Segment, *, outside: bool = False) -> None:
        """Note what a segment has written; ``outside``: the bridges of inputs do not have the new values."""
        for access in segment.writes:
            self.intact.pop(access.storage, None)
            if outside and access.storage in self.inputs:
                self.loaded.discard(access.storage)

    # lifetimes

    def _is_kept(self, name: str) -> bool:
        """Whether the recording holds a value, and its bridge, as long as it lives."""
        return self.keep or (self.static and name in self.lives.returned)

    def handed_back(self) -> Iterator[torch.Tensor]:
        """With static results, the owners of pool memory: a result may be an alias that an eager step has returned."""
        for owner in self.owners.values() if self.static else ():
            yield copies.inside(owner)

    def kept(self, memory: Any) -> Iterator[Any]:
        """The owners of saved values' memory: ``memory`` for what the pool has lent, and tensors for the rest."""
        lent = set(map(id, map(copies.inside, self.owners.values()))) if memory is not None else set()
        if memory is not None and self.saved:
            yield memory
        for name in self.saved:
            if (owner := self.holder(name)) is not None and id(owner) not in lent:
                yield owner

    def _hold(self, variable: str, owner: torch.Tensor | Bridge, place: torch.UntypedStorage) -> None:
        """Have ``owner`` hold the memory behind ``place``, on which the constants of ``variable`` lie."""
        self.owners[variable] = owner
        self._lent.add(int(place._cdata))

    def retire(self, position: int) -> None:
        """Drop the memory of values that no step after ``position`` reads."""
        for name in self.lives.ends.get(position, ()):
            if name not in self.lives.returned:
                self._give_up(name)
                self.values.pop(name, None)
                self.read_from.pop(name, None)
            if name not in self.saved and (name not in self.lives.returned or name in self.intact):
                self._give_up(bridge_name(name))
        for name in self.lives.unloaded.get(position, ()):
            self._give_up(bridge_name(name))
        # If nothing is kept, constants and arguments are dropped as early as in a plain call.
        for name in self._dead[position] if self._dead else ():
            for held in (name, bridge_name(name), _inside_name(name)):
                self.values.pop(held, None)
                self.constants.pop(held, None)

    def keep_nothing(self, program: Program, position: int) -> None:
        """The rest of the call is not recorded: drop what only segments before ``position`` and replays would read."""
        self._dead = last_uses(program)
        for before in range(position):
            self.retire(before)

    def _give_up(self, variable: str) -> None:
        if variable not in self._pinned:
            self.owners.pop(variable, None)

    def forget(self) -> None:
        """Drop what the pool owns."""
        self.constants.clear()
        self.values.clear()
        self.owners.clear()

    def needed(self) -> Held | None:
        """The most that the recording needs at the same time; None if everything is held as long as the recording lives."""
        return None if self.keep else self.most + Held.by(self.constants.values(), self._lent)

    # whose memory a value lies in

    def is_constant_view(self, call: Call, made: Any) -> bool:
        """Whether a call only makes a view of memory with a fixed address, so that it need not be made again.

        The fake does not prove this: if ``made`` were a copy, later calls would get the values of this call.
        """
        if not call.takes_part:
            return False
        variables = call.variables
        if not variables or not all(variable in self.constants for variable in variables):
            return False
        memory = {
            _torch.storage_key(tensor) for variable in variables for tensor in tensors_of(self.constants[variable])
        }
        return all(_torch.storage_key(tensor) in memory for tensor in tensors_of(made))

    def holder(self, name: str) -> torch.Tensor | None:
        """The owner of a saved value's memory, if the pool has it."""
        place = self.read_from[name].name
        owner = self.owners.get(bridge_name(name) if place == _inside_name(name) else place)
        if owner is None and place in self.constants:
            owner = self.constants[place]
        return copies.inside(owner)  # type: ignore[no-any-return]

    def is_ours(self, value: torch.Tensor) -> bool:
        """Whether ``value`` lies in memory of ours, judged by memory: an op may return its argument against its schema."""
        return _torch.storage_key(value) in self.owned_storages() or any(True for _ in self._behind(value))

    def owned_storages(self) -> frozenset[int]:
        """The keys of the storages that constants lie on."""
        owned = (value for name, value in self.constants.items() if name not in self.inputs)
        tensors = map(copies.inside, owned)
        return frozenset(_torch.storage_key(value) for value in tensors if isinstance(value, torch.Tensor))

    def _behind(self, value: Any) -> Iterator[str]:
        """The variables in whose memory ``value`` lies, by address: DLPack makes several storages over one memory."""
        for tensor in tensors_of(value):
            if tensor.layout is torch.strided and tensor.device in self.driver.devices:
                address = tensor.untyped_storage().data_ptr()
                for variable, owner in self.owners.items():
                    memory = copies.inside(owner).untyped_storage()
                    if memory.data_ptr() <= address < memory.data_ptr() + memory.nbytes():
                        yield variable


def _inside_name(name: str) -> str:
    return f"{name}.inside"
