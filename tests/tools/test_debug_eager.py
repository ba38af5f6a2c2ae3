"""The everything-eager debug mode: the record and replay path, with each segment's Python run at each call."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import silly
from breakable_backend import explain
from breakable_backend.calling.registry import executors_of
from breakable_backend.drivers.eager import EagerDriver
from breakable_backend.recordings.generated_code import with_code
from silly import aliasing, mutating


@pytest.fixture
def debug(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "debug": "eager"}


def stepped(x: Tensor) -> Tensor:
    y = silly.triple(x.sin() + 1)
    return (y * 2).cos() + x


def drawing(x: Tensor) -> Tensor:
    return silly.triple(x + torch.rand_like(x)) + torch.rand_like(x)


MODELS: dict[str, Callable[[Tensor], Any]] = {f.__name__: f for f in (stepped, drawing, mutating, aliasing)}


@pytest.mark.parametrize("name", MODELS)
def test_equals_eager(device: torch.device, debug: dict[str, Any], name: str) -> None:
    """Bit for bit, over calls of all kinds and new inputs; with one recording and the same copies as a capture."""
    function = MODELS[name]
    compiled = torch.compile(function, backend="breakable_cg", options=debug)
    mine = torch.empty(4, device=device)  # one tensor for all calls: the address of a written input is in the key
    with torch.no_grad():
        for number in range(5):
            theirs = mine.fill_(number / 3).clone()
            torch.manual_seed(number)
            got = compiled(mine)
            torch.manual_seed(number)
            want = function(theirs)
            assert torch.equal(mine, theirs)
            for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
                assert torch.equal(a, b), number
    (program,) = explain(compiled).programs
    assert (program.num_graph_segments, program.num_eager_segments) == (2, 1)
    assert (program.captures, program.replays) == (2, 3)  # both segments in call 2; calls 3 to 5


def test_python_of_a_segment_runs(device: torch.device, debug: dict[str, Any]) -> None:
    """Each call runs the segments' Python, where a breakpoint is hit; without the mode none does: a capture runs op by op."""
    for options, runs in ((debug, [2, 2, 2, 2]), ({**debug, "debug": None}, [0, 0, 0, 0])):
        torch.compiler.reset()
        compiled = torch.compile(stepped, backend="breakable_cg", options=options)
        found = []
        with torch.no_grad():
            compiled(torch.ones(4, device=device))
            (executor,) = executors_of(compiled)
            codes = {with_code(segment.module).forward.__code__ for segment in executor.program.graph_segments}
            executor.reset()
            for _ in range(4):
                entered = []

                def trace(frame: Any, event: str, argument: Any, entered: list[Any] = entered) -> None:
                    if event == "call" and frame.f_code in codes:
                        entered.append(frame.f_code)

                before = sys.gettrace()
                sys.settrace(trace)
                try:
                    compiled(torch.ones(4, device=device))
                finally:
                    sys.settrace(before)
                found.append(len(entered))
        assert found == runs


def test_error_has_the_line_of_the_user(device: torch.device, debug: dict[str, Any]) -> None:
    """What an op in a segment raises comes out as it is, with a note of the user's line, and nothing is demoted."""

    def body(x: Tensor) -> Tensor:
        return silly.fragile(x.sin() + 1) * 2

    compiled = torch.compile(body, backend="breakable_cg", options=debug)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.ones(4, device=device))
        error = ValueError("mine")

        def fail(*_: Any) -> None:
            raise error

        silly.hooks["fragile"] = fail
        try:
            with pytest.raises(ValueError, match="mine") as caught:
                compiled(torch.ones(4, device=device))
        finally:
            silly.hooks.clear()
        assert caught.value is error
        assert torch.equal(compiled(torch.ones(4, device=device)), body(torch.ones(4, device=device)))


def test_log(device: torch.device, debug: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """On request there is a line for each step of each call, with shapes and the user's line."""
    compiled = torch.compile(stepped, backend="breakable_cg", options=debug)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="breakable_backend.tools.debug"):
        for number in range(4):
            caplog.clear()
            compiled(torch.ones(4, device=device))
            lines = [record.getMessage() for record in caplog.records if record.name == "breakable_backend.tools.debug"]
            assert len(lines) == 3, (number, lines)  # two segments and an eager step
            assert "test_debug_eager.py" in lines[1]
            assert "triple" in lines[1]
            assert "float32[4]" in lines[1]


def test_report(device: torch.device, debug: dict[str, Any]) -> None:
    """The report says that the mode is on."""
    compiled = torch.compile(stepped, backend="breakable_cg", options=debug)
    with torch.no_grad():
        compiled(torch.ones(4, device=device))
    report = explain(compiled)
    assert report.programs[0].debug
    assert "debug mode" in str(report)


def test_environment(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """``BREAKABLE_CG_DEBUG=eager`` turns it on, without a warning about the tape."""
    monkeypatch.setenv("BREAKABLE_CG_DEBUG", "eager")
    compiled = torch.compile(stepped, backend="breakable_cg")
    with torch.no_grad():
        for _ in range(3):
            x = torch.ones(4, device=device)
            assert torch.equal(compiled(x), stepped(x))
    assert explain(compiled).programs[0].driver.startswith("eager")


def test_names_its_ops(device: torch.device, debug: dict[str, Any]) -> None:
    """A segment that is run and not captured tells the ops that it launches, views left out."""
    compiled = torch.compile(stepped, backend="breakable_cg", options=debug)
    with torch.no_grad():
        for _ in range(2):
            compiled(torch.ones(4, device=device))
    (executor,) = executors_of(compiled)
    ((entry,),) = (addresses.entries.values() for addresses in executor.keys.sets.values())
    assert entry.recording is not None
    assert [graph.kernels() for graph in entry.recording.graphs] == [
        ("aten.sin.default", "aten.add.Tensor"),
        ("aten.mul.Tensor", "aten.cos.default", "aten.add.Tensor"),
    ]
    assert all("aten.add.Tensor" in graph.dot() for graph in entry.recording.graphs)


def test_a_lost_device_is_no_error_of_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is released is given up where CUDA fails too: nobody could catch an error of a finalizer."""

    class Lost:
        def synchronize(self) -> None:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    driver = EagerDriver(torch.device("cpu"))
    graph, _ = driver.capture(lambda: torch.ones(3))
    monkeypatch.setattr(driver, "_done", Lost())
    owner = [torch.ones(3)]
    driver.release([graph], owner)
    assert (owner, driver.live_blocks()) == ([], 0)
