"""Ops that wait for the host, found while they run in a plain call, before any capture is tried.

A dispatch mode of this thread observes what a custom op calls: Python that reads a value, copies to the host, or calls
a marked op. So nothing runs twice, and other threads are neither observed nor affected.
``torch.cuda.set_sync_debug_mode`` would also see waits in C++. But its mode, and the filter of warnings, apply to the
whole process, and it reports the waits of all threads. An op that launches and waits in C++ is found when it is
captured; see :mod:`breakable_backend.recordings.repair`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend.errors import user_line
from breakable_backend.ir.effects import is_somebodys, op_of, tensors_of
from breakable_backend.ir.program import Program, Reason
from breakable_backend.ir.running_ops import OpMode, kernel_of_ops
from breakable_backend.marks.rules import LiveReason, label, live_reason
from breakable_backend.recordings.returned_arguments import ReturnedArguments


def has_unknown_ops(program: Program) -> bool:
    """Whether captured segments contain custom ops, of which only their own code tells what they do."""
    return any(is_somebodys(node) for segment in program.graph_segments for node in segment.module.graph.nodes)


class Finder:
    """Observes custom ops during one plain call of a program, and their results.

    Args:
        devices: the capture devices.
        inside: whether to observe what they call. Their results are looked at in any case.
    """

    def __init__(self, devices: Sequence[torch.device], *, inside: bool) -> None:
        self.devices, self.inside = devices, inside
        self._returned = ReturnedArguments()
        self._found: dict[Any, Reason] = {}
        """Why an op has to run eagerly."""

    def around(self, node: fx.Node, *, captured: bool) -> Callable[..., Any]:
        """What to call for ``node``: its op, observed if it is a custom op."""
        op: Any = node.target
        if not is_somebodys(node):
            return op  # type: ignore[no-any-return]
        place, inside = self.place(node), self.inside and captured

        def watched(*args: Any, **kwargs: Any) -> Any:
            look = _Look(place)
            with look.watching() if inside else nullcontext():
                result = op(*args, **kwargs)
            if look.found is not None:
                inner, line = look.found
                what = f"calls {inner.op}, which {'is ' * (inner.rule == 'marked')}{inner.text}"
                self._found.setdefault(op, Reason("calls_such_an_op", what, label(node), line))
            self._returned.look(node, (args, kwargs), result)
            return result

        return watched

    def place(self, node: fx.Node) -> torch.device:
        """The capture device that ``node`` has tensors on; the first where it has none."""
        values = [node.meta.get("val"), *(argument.meta.get("val") for argument in node.all_input_nodes)]
        found = {tensor.device for tensor in tensors_of(values)}
        return next((device for device in self.devices if device in found), self.devices[0])

    def eager(self, program: Program, graph: fx.Graph) -> Mapping[str, Reason]:
        """The nodes of ``program``, cut from ``graph``, that are captured so far and call a found op, by name."""
        nodes = (node for segment in program.graph_segments for node in segment.module.graph.nodes)
        called = ((node.name, self._found.get(op_of(node))) for node in nodes)
        found = {name: reason for name, reason in called if reason is not None}
        return {**found, **self._returned.reasons(graph)}


class _Look:
    """Observes what one op calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: tuple[LiveReason, str] | None = None
        """Why no capture can hold the op, and the user's line."""
        self._inside = False

    def watching(self) -> OpMode:
        return OpMode(self._issue)

    def _issue(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(func, _torch.OpOverload):
            return func(*args, **kwargs)
        if self._inside and self.found is None and (why := live_reason(func, args, kwargs, self.device)) is not None:
            self.found = why, user_line()
        kernel = kernel_of_ops(func, args, self.device, watching=True)
        if kernel is None:
            return func(*args, **kwargs)
        outer, self._inside = self._inside, True
        try:
            with self.watching():
                return kernel(*args, **kwargs)
        finally:
            self._inside = outer
