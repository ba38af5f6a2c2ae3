"""The oracle of the contract tests: a compiled function against eager, bit for bit, with exact counts."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import breakable_backend
import silly
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import executors_of
from breakable_backend.tools.report import ProgramReport
from interpreter import interpret

Function = Callable[..., Any]
WARM_UP = {"warm-up": 1}


# --- bits -----------------------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    """All the elements of a tensor, so that NaN equals NaN and 0.0 does not equal -0.0."""
    with torch.no_grad():
        plain = tensor.detach().resolve_conj().resolve_neg()
        plain = plain.to_dense() if plain.layout is not torch.strided else plain
        return plain.cpu().contiguous().reshape(-1).clone().view(torch.uint8).numpy().tobytes()


def looks(value: Any) -> Any:
    """What has to be the same of one result: for a tensor all but its bits."""
    if not isinstance(value, Tensor):
        return type(value).__name__, value
    strides = tuple(step if size > 1 else 0 for size, step in zip(value.shape, value.stride(), strict=True))
    return (
        type(value).__name__,
        value.dtype,
        value.device,
        tuple(value.shape),
        strides if value.numel() else (),
        value.is_conj(),
        value.is_neg(),
        value.requires_grad,
        value.is_inference(),
    )


def assert_same(got: Any, want: Any, what: str = "result") -> None:
    """The same tree of the same values, bit for bit."""
    got_leaves, got_tree = pytree.tree_flatten(got)
    want_leaves, want_tree = pytree.tree_flatten(want)
    assert got_tree == want_tree, f"{what}: {got_tree} where eager has {want_tree}"
    for position, (mine, theirs) in enumerate(zip(got_leaves, want_leaves, strict=True)):
        assert looks(mine) == looks(theirs), f"{what}, leaf {position}: {looks(mine)} where eager has {looks(theirs)}"
        if isinstance(mine, Tensor):
            assert bits(mine) == bits(theirs), f"{what}, leaf {position}: {mine} where eager has {theirs}"


def aliases(named: Sequence[tuple[str, Any]]) -> list[tuple[Any, ...]]:
    """Which tensors share a storage, and how far apart they begin in it."""
    firsts: dict[int, tuple[str, int]] = {}
    pattern = []
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.untyped_storage().nbytes():
            start = tensor.storage_offset() * tensor.element_size()
            first, offset = firsts.setdefault(tensor.untyped_storage()._cdata, (name, start))
            pattern.append((name, first, start - offset))
    return pattern


def state_of(function: Function) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a module, none for a function."""
    if not isinstance(function, nn.Module):
        return []
    return [*function.named_parameters(), *function.named_buffers()]


def random_states(device: torch.device) -> list[bytes]:
    """Where the default generators stand."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [bits(state) for state in states]


def refill(tensor: Tensor, values: Tensor, others: list[Tensor]) -> None:
    """Free the memory of a tensor and fill it with ``values`` at another address. ``others`` keeps the memory in between."""
    storage, before = tensor.untyped_storage(), [tensor.data_ptr(), *[other.data_ptr() for other in others]]
    storage.resize_(0)
    storage.resize_(values.untyped_storage().nbytes())
    while tensor.data_ptr() in before:
        storage.resize_(0)
        others.append(torch.full_like(values, torch.nan))
        storage.resize_(values.untyped_storage().nbytes())
    with torch.no_grad():
        tensor.copy_(values)


# --- what happened in a run -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """All that one side did, call by call."""

    results: list[Any] = dataclasses.field(default_factory=list)
    """What the calls returned: the tensors themselves, which later calls must leave alone."""
    snapshots: list[Any] = dataclasses.field(default_factory=list)
    """Copies of the same, made at once."""
    inputs: list[Any] = dataclasses.field(default_factory=list)
    states: list[Any] = dataclasses.field(default_factory=list)
    aliases: list[Any] = dataclasses.field(default_factory=list)
    counts: list[dict[str, int]] = dataclasses.field(default_factory=list)
    random: list[list[bytes]] = dataclasses.field(default_factory=list)


def snapshot(tree: Any) -> Any:
    """The tree with a copy of each tensor, made on the host and without its aliases."""
    return pytree.tree_map_only(Tensor, lambda tensor: (looks(tensor), bits(tensor)), tree)


def run(
    function: Function,
    owner: Function,
    arguments: Sequence[tuple[Any, ...]],
    device: torch.device,
    under: Callable[[], contextlib.AbstractContextManager[Any]],
    before_call: Callable[[int], None],
) -> Run:
    """Call ``function`` on all ``arguments`` and write down what happened."""
    record = Run()
    torch.manual_seed(1234)
    for position, args in enumerate(arguments):
        before_call(position)
        before = silly.calls.copy()
        with under():
            result = function(*args)
        record.counts.append({name: silly.calls[name] - before[name] for name in silly.calls} | {})
        record.random.append(random_states(device))
        record.results.append(result)
        record.snapshots.append(snapshot(result))
        record.inputs.append(snapshot(args))
        record.states.append(snapshot(dict(state_of(owner))))
        leaves = [(f"output {i}", leaf) for i, leaf in enumerate(pytree.tree_leaves(result))]
        leaves += [(f"input {i}", leaf) for i, leaf in enumerate(pytree.tree_leaves(args))]
        record.aliases.append(aliases([*leaves, *state_of(owner)]))
    return record


def entries_of(executor: Executor) -> Iterator[Entry]:
    """The keys of an executor."""
    for addresses in executor.keys.sets.values():
        yield from addresses.entries.values()


def poison(executor: Executor, entry: Entry) -> None:
    """Overwrite what captured segments make, so that a replay which leaves one out is seen."""
    assert entry.recording is not None
    made = {name for segment in executor.program.graph_segments for name in segment.outputs}
    for name in made & entry.recording.constants.keys():
        tensor = entry.recording.constants[name]
        octets = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        if tensor.dtype is torch.bool:
            octets.bitwise_xor_(1)
        else:
            octets.fill_(0xFF if tensor.is_floating_point() or tensor.is_complex() else 0x5B)  # NaN, or odd and large


def instrument(compiled: Function, *, interpreted: bool) -> None:
    """Poison before each replay; with ``interpreted``, replay by the interpreter instead of the generated function."""
    for executor in executors_of(compiled):
        for entry in entries_of(executor):
            if entry.run is not None:
                entry.run = _replayer(executor, entry, interpreted=interpreted)


def _replayer(executor: Executor, entry: Entry, *, interpreted: bool) -> Callable[[list[Any], int], list[Any]]:
    assert entry.run is not None
    emitted = getattr(entry.run, "emitted", entry.run)

    def replay(args: list[Any], stream: int) -> list[Any]:
        assert entry.recording is not None
        assert entry.replay is not None
        poison(executor, entry)
        if not interpreted:
            return emitted(args, stream)
        values = list(args)
        args.clear()
        return interpret(entry.recording, values, stream, entry.replay.tally)

    replay.emitted = emitted  # type: ignore[attr-defined]
    return replay


# --- the oracle -----------------------------------------------------------------------------------------------------------


def check(
    function: Function,
    make_args: Callable[[int], tuple[Any, ...]],
    *,
    device: torch.device,
    options: dict[str, Any],
    captured: int | None = None,
    eager: int | None = None,
    copies: int | None = None,
    calls: int = 7,
    recordings: int = 1,
    under: Callable[[], contextlib.AbstractContextManager[Any]] = torch.no_grad,
    prepare: Callable[[Any], None] = lambda module: None,
    aliased: bool = True,
    **compile_options: Any,
) -> ProgramReport:
    """Compare ``function`` compiled with itself uncompiled, and return what the report says of its one program.

    Each side has a copy of a module, equal inputs at addresses of their own (fresh ones for each call, none reused), and
    the same seed. Call 1 is plain, call 2 records, then calls replay by the generated function, and the last two by the
    interpreter. ``min_kernels`` is 1 unless ``options`` has it.

    Args:
        function: a module, which is copied; or a function, which must not have state.
        make_args: the arguments of a call, by its number from 0, on ``device``.
        device: where the arguments are.
        options: for ``torch.compile``.
        captured: captured segments of the program.
        eager: eager segments.
        copies: between bridges and the outside, in one call; each is made on every call but the first.
        calls: how many calls, at least 5 for all ways to run to have their turn.
        recordings: keys that are recorded.
        under: the context around each call.
        prepare: called with each side's module (or the function) before its calls.
        aliased: whether the aliases of the two sides are compared.
        compile_options: for ``torch.compile``.
    """
    owner = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    compiled = torch.compile(owner, backend="breakable_cg", options={"min_kernels": 1, **options}, **compile_options)
    arguments = [arguments_of(make_args, position) for position in range(calls)]
    theirs = [arguments_of(make_args, position) for position in range(calls)]

    prepare(function)
    want = run(function, function, theirs, device, under, lambda position: None)
    prepare(owner)
    got = run(
        compiled,
        owner,
        arguments,
        device,
        under,
        lambda position: instrument(compiled, interpreted=position >= calls - 2),
    )
    compare(got, want, aliased=aliased)
    report = breakable_backend.explain(compiled)
    assert len(report.programs) == 1, report
    (program,) = report.programs
    check_counts(program, captured=captured, eager=eager, copies=copies, calls=calls, recordings=recordings)

    executors = executors_of(compiled)
    breakable_backend.reset(compiled)
    for executor in executors:
        assert executor.driver is not None
        assert executor.driver.live_blocks() == 0, "blocks of the pool are left after reset()"
    return program


def arguments_of(make_args: Callable[[int], tuple[Any, ...]], position: int) -> tuple[Any, ...]:
    """The arguments of a call, the same whenever they are asked for."""
    torch.manual_seed(100 + position)
    return make_args(position)


def compare(got: Run, want: Run, *, aliased: bool = True) -> None:
    """All that two runs did, call by call."""
    for position in range(len(want.results)):
        call = f"call {position + 1}"
        assert_same(got.results[position], want.results[position], f"{call}: result (as it is at the end)")
        assert got.snapshots[position] == want.snapshots[position], f"{call}: result (when it came)"
        assert got.inputs[position] == want.inputs[position], f"{call}: inputs after it"
        assert got.states[position] == want.states[position], f"{call}: parameters and buffers after it"
        assert got.counts[position] == want.counts[position], f"{call}: calls of eager ops"
        assert got.random[position] == want.random[position], f"{call}: state of the random generators"
        if aliased:
            assert got.aliases[position] == want.aliases[position], f"{call}: aliases"


def check_counts(
    program: ProgramReport,
    *,
    captured: int | None,
    eager: int | None,
    copies: int | None,
    calls: int,
    recordings: int = 1,
) -> None:
    """What the report counts, where every key was called often enough to be recorded."""
    if captured is not None:
        assert program.num_graph_segments == captured, program.text
    if eager is not None:
        assert program.num_eager_segments == eager, program.text
    assert program.calls == calls
    if program.num_graph_segments == 0:
        assert dict(program.plain_calls) == {"nothing to capture": calls}
        assert (program.captures, program.replays, program.copies) == (0, 0, 0)
        return
    recorded = [recording for recording in program.recordings if recording.captures]
    assert len(recorded) == recordings, program.recordings
    # captures = segments x recordings; of each key call 1 is plain and call 2 records, the others replay
    assert program.captures == program.num_graph_segments * recordings
    assert dict(program.plain_calls) == {"warm-up": recordings}
    assert program.replays == calls - 2 * recordings
    if copies is not None:
        assert [recording.copies_per_call for recording in recorded] == [copies] * recordings, program.text
        assert program.copies == copies * (calls - recordings)


def sequence(
    compiled: Function, reference: Function, calls: Sequence[tuple[Any, ...]], under: Any = torch.no_grad
) -> None:
    """Call both on each element, and compare results at once and at the end. For what :func:`check` is too strict for."""
    kept = []
    for position, args in enumerate(calls):
        mine, theirs = copy.deepcopy(args), copy.deepcopy(args)
        with under():
            got, want = compiled(*mine), reference(*theirs)
        assert_same(got, want, f"call {position + 1}")
        assert_same(mine, theirs, f"call {position + 1}: inputs after it")
        kept.append((got, want, mine))
    for position, (got, want, _) in enumerate(kept):
        assert_same(got, want, f"call {position + 1}, at the end")


def compile_both(function: Function, options: dict[str, Any], **compile_options: Any) -> tuple[Any, Any]:
    """A compiled copy of a module (or the compiled function), and the module itself."""
    owner = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    compiled = torch.compile(owner, backend="breakable_cg", options={"min_kernels": 1, **options}, **compile_options)
    return compiled, function


def program_of(compiled: Function) -> ProgramReport:
    """The one program of a compiled function."""
    (program,) = breakable_backend.explain(compiled).programs
    return program
