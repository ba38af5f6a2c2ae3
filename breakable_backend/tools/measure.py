"""``explain(..., measure=True)``: which recordings are replayed to be timed, with which arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from breakable_backend.calling.executor import Executor
from breakable_backend.calling.keys import Entry, Key
from breakable_backend.calling.registry import executors_of
from breakable_backend.calling.snapshot import KeySnapshot, Snapshot, uncounted
from breakable_backend.capturing.graph import BreakableCUDAGraph
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import under_ambient
from breakable_backend.errors import OptionsError
from breakable_backend.recordings import copies
from breakable_backend.recordings.copies import Bridge, clone_exact
from breakable_backend.recordings.recording import Recording
from breakable_backend.tools.progress import Progress
from breakable_backend.tools.timing import quiet_bench, time_recording
from breakable_backend.tools.verdict import Measured, Reference, judged

STAGES = 4
"""The stages of the progress bar: the replays of a recording, its steps, whole calls, and the reference."""


Place = tuple[str, Key]
"""A recording: the name of its graph, and its key."""


def measure_compiled(
    compiled: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], eager: Callable[[], Any] | None
) -> dict[Place, Measured]:
    """Measure the recordings of a compiled function; with arguments, those that a call with them replays.

    Raises:
        OptionsError: nothing was recorded, or an input is not kept by a bridge.
    """
    debugged = next((executor for executor in executors_of(compiled) if executor.options.debug is not None), None)
    if debugged is not None:
        raise OptionsError(
            f"{debugged.name} is in debug mode, where times mean nothing", fix="measure without options={'debug': ...}"
        )
    call = functools.partial(compiled, *args, **kwargs)

    def uncompiled() -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call()

    given = bool(args or kwargs)
    replayed = _replayed(compiled, call) if given else {}
    whole, reference = None, Reference.given(eager)
    if len(replayed) == 1:
        whole, reference = call, reference or Reference(uncompiled, "eager")
    elif given:
        reference = None  # a call is more than any one of them
    executors = executors_of(compiled)
    recorded = sum(key.recording is not None for executor in executors for key in executor.snapshot().keys)
    measured: dict[Place, Measured] = {}
    with Progress(STAGES * (len(replayed) or recorded)) as progress:
        for executor in executors:
            with executor.driver.lock:  # the recordings stay as they are
                snapshot = executor.snapshot()
                for key in [key for key in snapshot.keys if key.recording is not None]:
                    place = executor.name, key.key
                    values = replayed.get(place) if given else _kept_arguments(snapshot, key)
                    if values is not None:
                        measured[place] = _measure_key(executor, snapshot, key, values, progress, whole, reference)
    if measured:
        return measured
    if not given:
        raise OptionsError(
            "there is nothing to measure: no call was recorded",
            fix="call the function three times first, or give arguments: explain(compiled, *args, measure=True)",
        )
    raise OptionsError(
        "there is nothing to measure: the call replays nothing",
        fix="call explain under torch.no_grad()" if torch.is_grad_enabled() else "explain(compiled) says why",
    )


def _replayed(compiled: Any, call: Callable[[], Any]) -> dict[Place, list[Any]]:
    """What ``call`` of ``compiled`` replays, with its arguments. A call that learns, runs plainly, or records, is repeated."""
    # Two calls that learn what marked functions return, a plain one, one that records, one that replays.
    for _ in range(5):
        found: dict[Place, list[Any]] = {}
        executors = executors_of(compiled)

        def spectator(name: str, entry: Entry, args: list[Any], found: Any = found) -> None:
            found[name, entry.key] = args

        calls = _num_calls(executors)
        with ExitStack() as stack:
            for executor in executors:
                stack.enter_context(executor.showing(functools.partial(spectator, executor.name)))
            call()
        if found and _num_calls(executors) - calls == len(found):
            break
    return found


def _num_calls(executors: Sequence[Executor]) -> int:
    return sum(executor.snapshot().statistics.calls for executor in executors)


def _kept_arguments(snapshot: Snapshot, key: KeySnapshot) -> list[Any]:
    """Arguments like those of the last replay, from what the executor and the recording keep of them.

    The bridge of a large input shares its memory with other values. Zeros take its place, since they are valid indices.

    Raises:
        OptionsError: an input is read in place, or by eager steps only, and so is not kept.
    """
    assert key.recording is not None
    statics, numbers = iter(key.statics), iter(key.key.shapes)
    values: list[Any] = []
    for value in snapshot.program.inputs:
        if value.index < 0:
            continue
        bridge = key.recording.bridge_of(value.name)
        if value.kind == "static":
            values.append(next(statics))
        elif value.kind == "number" and value.name not in snapshot.program.passed_on:
            values.append(next(numbers))
        elif bridge is not None:
            kept = key.recording.most is None or bridge.num_bytes <= copies.KEPT_INPUT
            values.append(clone_exact(bridge.tensor) if kept else Bridge.zeros(bridge.tensor).tensor)
        else:
            raise OptionsError(
                f"the input {value.name} is not kept between calls, so there is nothing to replay",
                fix="give arguments: explain(compiled, *args, measure=True)",
            )
    return values


def _written(snapshot: Snapshot, recording: Recording, args: Sequence[Any]) -> list[torch.UntypedStorage]:
    """The storages that a call writes and that others read: the caller's, and what a pending forward saved."""
    program, slots = snapshot.program, snapshot.slots
    names = {access.storage for segment in program.segments for access in segment.writes}
    inputs = [args[v.index].untyped_storage() for v in program.inputs if v.index >= 0 and v.name in names]
    saved = recording.saved if slots is not None and slots.pending else ()
    return [*inputs, *(owner.untyped_storage() for owner in saved)]


def _measure_key(
    executor: Executor,
    snapshot: Snapshot,
    key: KeySnapshot,
    args: Sequence[Any],
    progress: Progress,
    whole: Callable[[], Any] | None,
    reference: Reference | None,
) -> Measured:
    """Measure a recording; with ``whole``, as a part of that call, with Dynamo's guards."""
    recording, run = key.recording, key.run
    assert recording is not None
    assert run is not None
    module = _uncaptured(snapshot.lowered)
    plain = Reference(torch.no_grad()(lambda: module.forward(*args)), "its ATen ops, run eagerly")
    with quiet_bench(snapshot.driver, lambda: _written(snapshot, recording, args)) as bench, executor.uncounted():
        with torch.no_grad():
            timed = time_recording(
                bench, recording, lambda stream: run(list(args), stream), args, nullcontext(), progress
            )
        outside = 0.0
        # In the caller's grad mode, on which Dynamo guards: in another one the call would run another program.
        if whole is not None:
            times = bench.times(whole)
            outside = max(0.0, times.host_us - timed.times.host_us)
            timed = replace(timed, times=times)
        progress.advance()
        measured = judged(timed, bench, reference or plain, plain, outside)
        progress.advance()
        return measured


def measure_graph(graph: BreakableCUDAGraph, eager: Callable[[], Any] | None) -> Measured:
    """Measure what ``with capture(graph)`` captured.

    Raises:
        OptionsError: nothing was captured.
    """
    snapshot = graph.snapshot()
    recording, replay, driver = snapshot.recording, snapshot.replay, snapshot.driver
    if recording is None or replay is None or driver is None:
        raise OptionsError("there is nothing to measure: the graph is empty", fix="capture first")
    if snapshot.debug is not None:
        raise OptionsError("the graph is in debug mode, where times mean nothing", fix="capture without debug=...")
    progress = Progress(STAGES - 1)
    with quiet_bench(driver, lambda: graph.written) as bench, uncounted(replay.tally), progress:
        timed = time_recording(bench, recording, graph.run, (), graph.modes.enter(), progress)
        measured = judged(timed, bench, Reference.given(eager), None)
        progress.advance()
        return measured


def _uncaptured(lowered: Lowered) -> fx.GraphModule:
    """The whole graph as one module, with the modes of its eager steps: the least that eager could take."""
    module = lowered.module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    under_ambient(graph)
    return fx.GraphModule(module, graph)
