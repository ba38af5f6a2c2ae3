"""Names in a profile: of calls, captured steps and eager steps; only while a profiler looks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_debug_eager import MODELS
from torch import Tensor

import silly
from breakable_backend import BreakableCUDAGraph, capture, eager_on_graph, explain, reset
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings.replay import Replay
from breakable_backend.tools import profiling


def model(x: Tensor) -> Tensor:
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x


def ranges(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """The ranges of this package in a profile of ``function``, each with the range around it, in order of their begin."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        function()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    ours = [event for event in events if event.name.startswith("breakable_cg")]
    return [(event.name, event.cpu_parent.name if event.cpu_parent else "") for event in ours]


def entry_of(compiled: Any) -> Entry:
    (executor,) = executors_of(compiled)
    (addresses,) = executor.keys.sets.values()
    (entry,) = addresses.entries.values()
    return entry


def named(replay: Replay | None) -> Any:
    """The variant of a replay that names its steps; None as long as no profiler was active."""
    assert replay is not None and len(replay.variants) == 1
    return replay.variants[0].function.function  # type: ignore[attr-defined]


def call(compiled: Any, device: torch.device) -> Tensor:
    with torch.no_grad():
        result = compiled(torch.ones(4, device=device))
    assert torch.equal(result, model(torch.ones(4, device=device)))
    return result


def test_steps_are_named(device: torch.device, options: dict[str, Any]) -> None:
    """In a replay each step is a range with its kind and op, one after the other, inside of the range of the call."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(3):
        call(compiled, device)
    name = f"breakable_cg {executors_of(compiled)[0].name}"
    for _ in range(2):
        found = ranges(lambda: call(compiled, device))
        assert found[0][0] == name
        assert found[1:] == [
            (f"{name}: step 0 captured, 2 kernels", name),
            (f"{name}: step 1 eager silly::triple", name),
            (f"{name}: step 2 captured, 3 kernels", name),
            (f"{name}: outputs", name),
        ]


def test_eager_ops_lie_in_their_step(device: torch.device, options: dict[str, Any]) -> None:
    """What an eager step calls is inside of its range, and of no other."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(3):
        call(compiled, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call(compiled, device)
    triples = [event for event in profile.events() if event.name == "silly::triple"]
    ours, eagers = sorted(triples, key=lambda event: event.time_range.start)
    assert ours.cpu_parent.name.endswith("step 1 eager silly::triple")
    assert eagers.cpu_parent is None


def test_plain_calls_and_recordings_are_named(device: torch.device, options: dict[str, Any]) -> None:
    """A plain call is a range that says why it is plain; a recording is a range."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    call(compiled, device)
    (executor,) = executors_of(compiled)
    executor.reset()
    names = [name for name, _ in ranges(lambda: [call(compiled, device) for _ in range(2)])]
    assert names == [f"breakable_cg {executor.name}: plain, warm-up", f"breakable_cg {executor.name}: record"]


def test_nothing_without_a_profiler(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a profiler no range is opened and no second variant is made; a profile does not slow down later calls."""
    opened = []
    real = profiling.record_function

    def counting(name: str) -> Any:
        opened.append(name)
        return real(name)

    monkeypatch.setattr(profiling, "record_function", counting)
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(4):
        call(compiled, device)
    entry = entry_of(compiled)
    assert opened == [] and named(entry.replay) is None
    assert entry.replay is not None and "mark" not in entry.replay.source
    ranges(lambda: call(compiled, device))
    assert len(opened) == 5 and named(entry.replay) is not None
    call(compiled, device)
    assert len(opened) == 5


@pytest.mark.gpu
def test_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``emit_nvtx``, which is how Nsight gets to know names, steps are ranges as under the profiler."""
    opened = []
    real = profiling.record_function
    monkeypatch.setattr(profiling, "record_function", lambda name: opened.append(name) or real(name))
    device = torch.device("cuda")
    compiled = torch.compile(model, backend="breakable_cg", options={"driver": "cuda"})
    for _ in range(3):
        call(compiled, device)
    with torch.autograd.profiler.emit_nvtx():
        call(compiled, device)
    assert [name.rpartition(": ")[2] for name in opened[1:]] == [
        "step 0 captured, 2 kernels",
        "step 1 eager silly::triple",
        "step 2 captured, 3 kernels",
        "outputs",
    ]


def test_one_tally(device: torch.device, options: dict[str, Any]) -> None:
    """Copies and replays under a profiler count like others."""
    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(3):
        call(compiled, device)
    before = explain(compiled).programs[0]
    call(compiled, device)
    plain = explain(compiled).programs[0]
    ranges(lambda: call(compiled, device))
    profiled = explain(compiled).programs[0]
    assert profiled.copies - plain.copies == plain.copies - before.copies > 0
    assert profiled.replays - plain.replays == 1


def test_an_error_ends_its_range(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an eager step raises arrives as it is, its ranges end, and those of the next call begin anew."""
    compiled = torch.compile(lambda x: silly.fragile(x.sin() + 1).cos() * 2, backend="breakable_cg", options=options)
    x = torch.ones(4, device=device)
    error = KeyError("mine")
    with torch.no_grad():
        for _ in range(3):
            compiled(x)

        def fails() -> None:
            raise error

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            monkeypatch.setitem(silly.hooks, "fragile", fails)
            with pytest.raises(KeyError) as caught:
                compiled(x)
            assert caught.value is error
            monkeypatch.delitem(silly.hooks, "fragile")
            with torch.profiler.record_function("behind"):
                pass
            compiled(x)
    (behind,) = [event for event in profile.events() if event.name == "behind"]
    assert behind.cpu_parent is None
    calls = [event for event in profile.events() if event.name.endswith(": outputs")]
    assert len(calls) == 1


def test_captured_by_hand(device: torch.device) -> None:
    """The second door's replays are named like those of compiled functions, and so is the capture."""

    @eager_on_graph
    def clip(x: Tensor) -> Tensor:
        return x.clamp(max=2)

    x = torch.ones(4, device=device)
    graph = BreakableCUDAGraph(driver="cuda" if device.type == "cuda" else "tape")

    def body() -> Tensor:
        with torch.no_grad(), capture(graph):
            return clip(x + 1) * 2

    found: list[Tensor] = []
    name = f"breakable_cg {graph.name}"
    assert ranges(lambda: found.append(body())) == [(f"{name}: capture", "")]
    names = [title for title, _ in ranges(graph.replay)]
    assert names == [
        name,
        f"{name}: step 0 captured, 1 kernel",
        f"{name}: step 1 eager {graph.recording.steps[1].reasons[0].op}",
        f"{name}: step 2 captured, 1 kernel",
        f"{name}: outputs",
    ]
    assert torch.equal(found[0], torch.full_like(x, 4))
    graph.reset()


@pytest.mark.parametrize("door", ["compile", "capture"])
def test_released_with_the_rest(device: torch.device, options: dict[str, Any], door: str) -> None:
    """The variant for profiles goes with its recording, and leaves nothing allocated."""
    if door == "compile":
        compiled = torch.compile(model, backend="breakable_cg", options=options)
        for _ in range(3):
            call(compiled, device)
        ranges(lambda: call(compiled, device))
        entry = entry_of(compiled)
        made, driver = weakref.ref(named(entry.replay)), executors_of(compiled)[0].driver
        reset(compiled)
    else:
        x = torch.ones(4, device=device)
        graph = BreakableCUDAGraph(driver=options["driver"])
        with capture(graph):
            y = x + 1
        ranges(graph.replay)
        del y
        captured, driver = graph._captured, graph.driver
        assert captured is not None and driver is not None
        made = weakref.ref(named(captured.replay))
        del captured
        graph.reset()
    gc.collect()
    assert made() is None
    assert driver.live_blocks() == 0


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(device: torch.device, options: dict[str, Any], name: str) -> None:
    """Mutation, random draws and aliases are as in eager under a profiler, which comes and goes between the calls."""
    function = MODELS[name]
    compiled = torch.compile(function, backend="breakable_cg", options=options)
    mine = torch.empty(4, device=device)  # one tensor for all calls: the address of a written input is in the key

    def call_both(number: int) -> None:
        theirs = mine.fill_(number / 3).clone()
        torch.manual_seed(number)
        got = compiled(mine)
        torch.manual_seed(number)
        want = function(theirs)
        leaves = torch.utils._pytree.tree_leaves
        for a, b in zip(leaves((got, mine)), leaves((want, theirs)), strict=True):
            assert torch.equal(a, b), number

    with torch.no_grad():
        for number in range(8):
            if number % 2:
                ranges(lambda: call_both(number))
            else:
                call_both(number)
    assert explain(compiled).programs[0].replays == 6
