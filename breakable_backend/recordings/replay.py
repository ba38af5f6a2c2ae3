"""A recording as a function: generated straight-line source.

The source has the graph's own names, and the reason of each break as a comment. It is filed in ``linecache``, so that
debuggers step through it and tracebacks show it. Tests compare it, on every test model, with an interpreter of
recordings (``tests/interpreter.py``), which is its specification.
"""

from __future__ import annotations

import itertools
import keyword
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.drivers import CapturedGraph
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.program import unused
from breakable_backend.recordings.checks import check_argument, reject
from breakable_backend.recordings.copies import Bridge, clone_exact, clones_exactly, fused_as, load_all
from breakable_backend.recordings.generated_code import defined, spelled
from breakable_backend.recordings.recording import Call, Copy, EagerStep, GraphStep, Out, Recording, Variable

FUSED_FROM = 4
"""From this number on, copies of results are made by one launch. Fewer copies are quicker one by one."""

Function = Callable[[list[Any], int], list[Any]]
"""A replay: ``function(args, stream) -> outputs``, which clears ``args``."""


@dataclass
class Tally:
    """Counts of replays, updated while they run."""

    copies: int = 0
    """Copies between bridges and memory outside that were needed."""


@dataclass(frozen=True)
class Variant:
    """Another function for a replay, which runs while it is wanted."""

    wanted: Callable[[], bool]
    function: Function


@dataclass(frozen=True)
class Replay:
    """Generated source and the function that it defines."""

    source: str
    function: Function
    tally: Tally
    file: str
    steps: tuple[tuple[int, int], ...]
    """For each step its lines in the source, from 0: the first, and the one after the last."""
    variants: Sequence[Variant] = ()
    """Functions that run in place of this one: the first that is wanted."""


File = Callable[[str, str], str | None]
"""Takes source and a name, and returns the path of a file with that source; None for no file."""
Mark = Callable[[int], None]
"""Called with the position of each step as it begins, and with the number of steps after the last one."""


def emit(
    recording: Recording,
    mark: Mark | None = None,
    *,
    name: str = "replay",
    tally: Tally | None = None,
    variants: Sequence[Variant] = (),
    file: File | None = None,
) -> Replay:
    """Generate, compile and file the source of a recording; with ``mark``, of a replay that reports where it is.

    Args:
        recording: what to replay.
        mark: see :data:`Mark`.
        name: passed to ``file``.
        tally: counts to continue, instead of beginning at 0.
        variants: the first that is wanted runs instead.
        file: see :data:`File`.
    """
    writer = _Writer(recording, mark, tally or Tally())
    source, steps = writer.source(variants)
    function, path = defined(source, "replay", writer.names, file(source, name) if file is not None else None)
    return Replay(source, function, writer.tally, path, steps, variants)


@dataclass(frozen=True)
class _Statement:
    lines: tuple[str, ...]
    uses: frozenset[str] = frozenset()
    defines: str = ""
    step: int | None = None
    """The position of the step that it belongs to."""


class _Writer:
    """Writes the function. Variables keep their names; helpers and constants get names that are still free."""

    def __init__(self, recording: Recording, mark: Mark | None, tally: Tally) -> None:
        self.recording, self.mark, self.tally = recording, mark, tally
        self.names: dict[str, Any] = {}
        """Globals of the generated function."""
        self.bound: dict[int, str] = {}
        self.quick: dict[TensorSpec, Callable[[Any], bool]] = {}
        """Quick tests of layouts, one for all values of a layout."""
        self.answers: dict[str, tuple[TensorSpec, str]] = {}
        """For a variable, a layout and the name of the flag that says whether it fits; until a call takes the variable."""
        calls = [call for step in recording.steps if isinstance(step, EagerStep) for call in step.calls]
        self.variables = {*recording.arguments, *(call.result for call in (*calls, *recording.epilogue))}
        self.variables |= {
            out.value.name for step in recording.steps if isinstance(step, GraphStep) for out in step.outs
        }
        self.args, self.stream = self._free("args"), self._free("stream")
        self.variables |= {self.args, self.stream}

    def source(self, variants: Sequence[Variant] = ()) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The source, and the lines of each step."""
        statements = list(self._statements())
        returned, uses = self._text(list(self.recording.returned))
        statements.append(_Statement((f"return {returned}",), uses))
        used = frozenset[str]().union(*(statement.uses for statement in statements))
        lines = [f"def replay({self.args}, {self.stream}):"]
        for variant in variants:
            wanted, other = self._bind("variant_is_wanted", variant.wanted), self._bind("variant", variant.function)
            lines += [f"if {wanted}():", f"    return {other}({self.args}, {self.stream})"]
        arguments = enumerate(self.recording.arguments)
        lines += (f"{name} = {self.args}[{index}]" for index, name in arguments if name in used)
        lines.append(f"{self.args}.clear()")
        spans: dict[int | None, tuple[int, int]] = {}
        for statement, deletion in zip(statements, _deletions(statements), strict=True):
            start, _ = spans.get(statement.step, (len(lines), 0))
            lines += (*statement.lines, *deletion)
            spans[statement.step] = start, len(lines)
        steps: list[tuple[int, int]] = []
        for position in range(len(self.recording.steps)):  # a step whose calls are all constant views has no lines
            end = steps[-1][1] if steps else 0
            steps.append(spans.get(position, (end, end)))
        return "\n    ".join(lines) + "\n", tuple(steps)

    def _statements(self) -> Iterator[_Statement]:
        for name, spec in self.recording.specs.items():
            check, whole = self._bind("check_argument", check_argument), self._bind(f"{name}_spec", spec)
            lines = (f"if not {self._fits_first(name, spec)}:", f"    {check}({name!r}, {whole}, {name})")
            yield _Statement(lines, frozenset((name,)))
        for call in self.recording.prologue:
            yield self._call(call)
        numbers = itertools.count()
        for position, step in enumerate(self.recording.steps):
            yield from self._marked(position)
            statements = self._launch(step, next(numbers)) if isinstance(step, GraphStep) else self._eager(step)
            yield from (replace(statement, step=position) for statement in statements)
        yield from self._marked(len(self.recording.steps))
        yield from self._epilogue()

    def _epilogue(self) -> Iterator[_Statement]:
        """The returned values. Consecutive copies are one launch for each dtype, since a backward has hundreds."""
        for copies, calls in itertools.groupby(self.recording.epilogue, self._is_launched_copy):
            groups: dict[Any, list[Call]] = defaultdict(list)
            for call in calls:
                groups[self._source(call).dtype if copies else len(groups)].append(call)
            for group in groups.values():
                if len(group) < FUSED_FROM:
                    yield from map(self._call, group)
                else:
                    yield from self._copies_together(group)

    def _is_launched_copy(self, call: Call) -> bool:
        """Whether it copies pool memory, which the driver can do without torch's dispatcher."""
        if call.function is not clone_exact or (source := self._clones_exactly(call.args[0])) is None:
            return False
        return bool(self.recording.graphs) and self.recording.graphs[-1].copier(source) is not None

    def _source(self, call: Call) -> torch.Tensor:
        source: torch.Tensor = self.recording.constants[call.args[0].name]
        return source

    def _copies_together(self, calls: Sequence[Call]) -> Iterator[_Statement]:
        names = [call.result for call in calls]
        if self._source(calls[0]).dtype in (torch.float32, torch.float64):
            results = self._bind("results", [self._source(call) for call in calls])
            yield _Statement((f"{', '.join(names)} = {self._bind('clones', _torch.clones_together)}({results})",))
            return
        empty = self._bind("empty_like", torch.empty_like)
        for call in calls:
            text, uses = self._text(call.args[0])
            yield _Statement((f"{call.result} = {empty}({text})",), uses, call.result)
        sources, targets = self._as_bits([self._source(call) for call in calls], names)
        fused = self._bind("copy_together", _torch.copy_together)
        line = f"{fused}([{', '.join(targets)}], {self._bind('results', sources)})"
        yield _Statement((line,), frozenset(names))

    def _launch(self, step: GraphStep, number: int) -> Iterator[_Statement]:
        yield from self._loads(step)
        for out in step.outs:
            yield self._out(out)
        launch = f"{self._bind(f'graph_{number}', step.graph.replay)}({self.stream})"
        fed = [copy for copy in step.loads if copy.feed is not None]
        copies = " + ".join(f"{self._bind(f'{copy.bridge.name}_feed', copy.feed)}.copies" for copy in fed)
        # The graph reads the values that it is fed, so they are deleted after the launch.
        yield _Statement((launch, *([self._counted(copies)] if fed else ())), frozenset(c.value.name for c in fed))
        for copy in step.stores:
            line = self._counted(f"{self._constant(copy.bridge)}.store({copy.value.name})")
            yield _Statement((line,), frozenset((copy.value.name,)))

    def _eager(self, step: EagerStep) -> Iterator[_Statement]:
        for reason in step.reasons:
            where = f" at {reason.source}" if reason.source else ""
            yield _Statement(tuple(f"# eager: {line}" for line in f"{reason}{where}".splitlines()))
        yield from map(self._call, step.calls)

    def _marked(self, position: int) -> Iterator[_Statement]:
        if self.mark is not None:
            yield _Statement((f"{self._bind('mark', self.mark)}({position})",))

    def _loads(self, step: GraphStep) -> Iterator[_Statement]:
        """The copies into bridges, one launch for each dtype and device. A bridge of an unusual kind is loaded alone."""
        groups: dict[Any, list[Copy]] = defaultdict(list)
        for copy in step.loads:
            if copy.feed is not None:
                yield self._feed(copy)
                continue
            bridge: Bridge = self.recording.constants[copy.bridge.name]
            plain = bridge.flat is None and bridge.bits is None
            groups[(bridge.tensor.dtype, copy.device) if plain else None].append(copy)
        for group, copies in groups.items():
            if group is None or (len(copies) > 1 and copies[0].device is None):
                yield _Statement((self._load_all(copies),), frozenset(copy.value.name for copy in copies))
            elif len(copies) == 1:
                yield self._load(copies[0], step.graph)
            else:
                yield self._load_together(copies)

    def _elsewhere(self, copy: Copy) -> str:
        """Whether a value does not lie in its bridge."""
        address = self.recording.constants[copy.bridge.name].tensor.data_ptr()
        return f"{copy.value.name}.data_ptr() != {self._bind(f'{copy.bridge.name}_address', address)}"

    def _counted(self, copies: int | str) -> str:
        return f"{self._bind('copied', self.tally)}.copies += {copies}"

    def _load_all(self, copies: Sequence[Copy]) -> str:
        bridges, values = ", ".join(self._constant(c.bridge) for c in copies), ", ".join(c.value.name for c in copies)
        return self._counted(f"{self._bind('load_all', load_all)}(({bridges},), ({values},))")

    def _load(self, copy: Copy, graph: CapturedGraph) -> _Statement:
        tensor: torch.Tensor = self.recording.constants[copy.bridge.name].tensor
        target, value = self._bind(copy.bridge.name, tensor), copy.value.name
        short = graph.copier(tensor) if copy.device == tensor.device else None
        lines = [f"if {self._elsewhere(copy)}:"]
        if short is None:
            lines += [f"    {target}.copy_({value})"]
        else:
            address, raw = self._bind(f"{copy.bridge.name}_address", tensor.data_ptr()), self._bind("copy_bytes", short)
            lines += [f"    if {self._fits_still(value, TensorSpec.of(tensor))}:"]
            lines += [f"        {raw}({address}, {value}.data_ptr(), {self.stream})"]
            lines += ["    else:", f"        {target}.copy_({value})"]
        return _Statement((*lines, f"    {self._counted(1)}"), frozenset((value,)))

    def _feed(self, copy: Copy) -> _Statement:
        """The graph copies by itself from the value's last address. If the value lies elsewhere, the address is set."""
        feed, value = self._bind(f"{copy.bridge.name}_feed", copy.feed), copy.value.name
        fits = self._fits_still(value, TensorSpec.of(self.recording.constants[copy.bridge.name].tensor))
        held = self._free(f"{value}_held")
        lines = (f"if not {fits} or {value}.data_ptr() != {feed}.source:", f"    {held} = {feed}.take({value})")
        return _Statement(lines, frozenset((value,)))

    def _out(self, out: Out) -> _Statement:
        """New memory for a result, to which the graph copies by itself. If it lies elsewhere, the address is set."""
        name, outlet = out.value.name, self._bind(f"{out.value.name}_outlet", out.outlet)
        made = f"{name} = {self._bind('empty_like', torch.empty_like)}({self._bind(f'{name}_like', out.like)})"
        lines = (f"if {name}.data_ptr() != {outlet}.target:", f"    {outlet}.lead({name}.data_ptr())")
        return _Statement((made, *lines), defines=name)

    def _load_together(self, copies: Sequence[Copy]) -> _Statement:
        values = [copy.value.name for copy in copies]
        targets, texts = self._as_bits([self.recording.constants[c.bridge.name].tensor for c in copies], values)
        fused = self._bind("copy_together", _torch.copy_together)
        lines = (
            f"if {' and '.join(map(self._elsewhere, copies))}:",
            f"    {fused}({self._bind('bridges', targets)}, [{', '.join(texts)}])",
            f"    {self._counted(len(copies))}",
            "else:",
            f"    {self._load_all(copies)}",
        )
        return _Statement(lines, frozenset(values))

    def _as_bits(self, tensors: list[torch.Tensor], names: list[str]) -> tuple[list[torch.Tensor], list[str]]:
        """Tensors, and source of others like them, in the dtype in which a fused copy keeps all bits."""
        if (bits := fused_as(tensors[0].dtype)) is tensors[0].dtype:
            return tensors, names
        name = self._bind(str(bits), bits)
        return [tensor.view(bits) for tensor in tensors], [f"{text}.view({name})" for text in names]

    def _call(self, call: Call) -> _Statement:
        name = call.result
        arguments, uses = [], frozenset[str]()
        for key, argument in (*((None, argument) for argument in call.args), *call.kwargs.items()):
            text, used = self._text(argument)
            arguments.append(f"{key}={text}" if key else text)
            uses |= used
        for used_name in uses:
            self.answers.pop(used_name, None)  # the call may change the layout of its arguments
        if call.function is operator.getitem:
            line = f"{name} = {arguments[0]}[{arguments[1]}]"
        elif call.function is clone_exact and (source := self._clones_exactly(call.args[0])) is not None:
            short = self.recording.graphs[-1].copier(source) if self.recording.graphs else None
            if short is not None:
                empty, address = self._bind("empty_like", torch.empty_like), source.data_ptr()
                place = self._bind(f"{arguments[0]}_address", address)
                line = f"{self._bind('copy_bytes', short)}({name}.data_ptr(), {place}, {self.stream})"
                return _Statement((f"{name} = {empty}({arguments[0]})", line), uses, name)
            line = f"{name} = {arguments[0]}.clone()"
        else:
            line = f"{name} = {self._function(call)}({', '.join(arguments)})"
        if call.source:  # for tracebacks
            line += f"  # {call.source}"
        lines = [line]
        if call.ambient is not None:
            lines = [f"with {self._bind(f'{name}_ambient', call.ambient)}.enter():", f"    {line}"]
        if call.spec is not None:
            refuse, whole = self._bind("reject", reject), self._bind(f"{name}_call", call)
            lines += [f"if not {self._fits_first(name, call.spec)}:", f"    {refuse}({whole}, {name})"]
        return _Statement(tuple(lines), uses, name)

    def _fits(self, name: str, spec: TensorSpec) -> str:
        """A quick test that only tensors of ``spec`` pass. It refuses some of them too, which a slower one then accepts."""
        quick = self.quick.get(spec)
        if quick is None:
            quick = self.quick[spec] = spec.quick_check()
        return f"{self._bind('fits', quick)}({name})"

    def _fits_first(self, name: str, spec: TensorSpec) -> str:
        """:meth:`_fits`, whose answer is kept in a variable for :meth:`_fits_still`."""
        answer = self._free(f"{name}_fits")
        self.variables.add(answer)
        self.answers[name] = spec, answer
        return f"({answer} := {self._fits(name, spec)})"

    def _fits_still(self, name: str, spec: TensorSpec) -> str:
        """:meth:`_fits`, without a call if nothing has had access to the tensor since the first test."""
        first, answer = self.answers.get(name, (None, ""))
        return answer if first == spec else self._fits(name, spec)

    def _clones_exactly(self, place: Variable) -> torch.Tensor | None:
        value = self.recording.constants.get(place.name)
        return value if isinstance(value, torch.Tensor) and clones_exactly(value) else None

    def _function(self, call: Call) -> str:
        if call.function is clone_exact:
            return self._bind("clone_exact", clone_exact)
        if isinstance(call.function, _torch.OpOverload):
            return self._bind(str(call.function), call.function)
        return self._bind(call.label or getattr(call.function, "__name__", "function"), call.function)

    def _text(self, value: Any) -> tuple[str, frozenset[str]]:
        """``value`` as source, and the variables of this call that it uses."""
        uses: set[str] = set()

        def leaf(part: Any) -> str | None:
            if isinstance(part, Variable):
                if part.name in self.recording.constants:
                    return self._constant(part)
                uses.add(part.name)
                return part.name
            if isinstance(part, list | tuple | dict):
                return None
            # Exactly these types: an enum's member, or NumPy's float, does not print as source.
            if part is None or type(part) in (bool, int, str) or (type(part) is float and math.isfinite(part)):
                return repr(part)
            assert not any(isinstance(inside, Variable) for inside in pytree.tree_leaves(part)), part
            return self._bind(str(part), part)

        return spelled(value, leaf), frozenset(uses)

    def _constant(self, variable: Variable) -> str:
        return self._bind(variable.name, self.recording.constants[variable.name])

    def _bind(self, name: str, value: Any) -> str:
        """A global name for ``value``."""
        known = self.bound.get(id(value))
        if known is not None and self.names[known] is value:
            return known
        chosen = self._free(name)
        self.names[chosen] = value
        self.bound[id(value)] = chosen
        return chosen

    def _free(self, name: str) -> str:
        """``name`` as an identifier, with a number appended if the name is taken."""
        base = re.sub(r"\W+", "_", name).strip("_") or "value"
        base = base if base.isidentifier() and not keyword.iskeyword(base) else f"value_{base}"
        return unused(base, lambda name: name in self.names or name in self.variables or name == "replay")


def _deletions(statements: Sequence[_Statement]) -> list[tuple[str, ...]]:
    """Statements that delete each name after its last use, so that memory is freed as early as in eager."""
    names = [{*statement.uses, statement.defines} - {""} for statement in statements]
    last = {name: position for position, used in enumerate(names) for name in used}
    dead = [sorted(name for name in used if last[name] == position) for position, used in enumerate(names)]
    return [*((f"del {', '.join(gone)}",) if gone else () for gone in dead[:-1]), ()]
