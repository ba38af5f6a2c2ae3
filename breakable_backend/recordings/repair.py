"""A failed capture is repaired: which node of the segment made it fail, and how the rest is captured around that node.

A failed capture has had no effect on the device. So the program is cut anew with the guilty node as an eager step, and
the recording continues at the beginning of the segment that failed: the part before the node is captured again, the
node runs, and the part after it is captured next. Several guilty nodes are found one after the other, in the same
call.
"""

from __future__ import annotations

import operator
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from breakable_backend import _torch
from breakable_backend.errors import CaptureError, Passing
from breakable_backend.ir.effects import WAIT, is_asynchronous, is_getitem, is_number, is_somebodys, op_of, tensors_of
from breakable_backend.ir.program import GraphSegment, Program, Reason, Segment
from breakable_backend.ir.views import is_view

MAX_CUTS = 16
"""How many times a program is cut anew in one recording. Each failed capture leaves its memory behind. After that,
segments that fail are eager as a whole."""

PAUSE = 20
"""To tell an op from another thread, the capture is watched for this many times the time that the op took."""
MIN_PAUSE, MAX_PAUSE = 0.02, 1.0
"""The shortest and the longest such pause, in seconds."""

Recut = Callable[[Mapping[str, Reason], Collection[str]], Program]
"""Cuts the program anew, with more eager nodes, and with segments that begin at certain nodes; see ``partition``."""


class NodeByNode:
    """A segment's module as a function that knows which node is running.

    Values are deleted after their last use, as in the module's own code, so that the capture takes the same memory.

    Args:
        module: the module of the segment.
        progress: the driver's ``CaptureDriver.progress``; None if nothing is captured.
        pauses: seconds to wait before some nodes, by name, with a check of the capture after that.
        done: called with a node that makes an output, and its value, once the last node that touches it has run. If it
            returns True, the value is dropped, and the output is None.
        outputs: the nodes for which ``done`` is called, by the last node that touches them.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        progress: Callable[[], Hashable] | None = None,
        pauses: Mapping[str, float] | None = None,
        done: Callable[[fx.Node, Any], bool] | None = None,
        outputs: Mapping[fx.Node, Sequence[fx.Node]] | None = None,
    ) -> None:
        self.module, self._progress, self._pauses = module, progress, pauses or {}
        self._done, self._outputs = done, outputs or {}
        self.node: fx.Node | None = None
        """The running node; after a failed call, the node that failed. None before the first node and after the
        last."""
        self._since = 0.0
        self._before: Hashable = None
        """How far the capture was before :attr:`node`."""

    @property
    def seconds(self) -> float:
        """For how long the node has been running."""
        return time.perf_counter() - self._since

    def __call__(self, *inputs: Any, begin: Callable[[fx.Node], None] | None = None) -> tuple[Any, ...]:
        """Run all nodes, and call ``begin`` with each before it runs.

        Raises:
            CaptureError: the capture became invalid without an error, or lacks the work of a custom op.
        """
        environment: dict[fx.Node, Any] = {}
        *nodes, output = self.module.graph.nodes
        last, given = _last_uses(self.module.graph), iter(inputs)
        self.starts()
        for node in nodes:
            if node.op == "placeholder":
                environment[node] = next(given)
            elif node.op == "get_attr":
                environment[node] = operator.attrgetter(str(node.target))(self.module)
            else:
                assert node.op == "call_function", node.op
                self.begins(node)
                if begin is not None:
                    begin(node)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), environment.__getitem__)
                environment[node] = node.target(*args, **kwargs)
                del args, kwargs
                self.ends(node, environment[node])
            for dead in last[node]:
                del environment[dead]
            for made in self._outputs.get(node, ()):
                self._drop(made, environment)
        self.node = None
        return tuple(fx.node.map_arg(output.args[0], environment.__getitem__))

    def _drop(self, made: fx.Node, environment: dict[fx.Node, Any]) -> None:
        """Hand an output over that nothing touches any more."""
        assert self._done is not None
        if self._done(made, environment[made]):
            environment[made] = None
            self._before = self._progress and self._progress()

    def starts(self) -> None:
        """The nodes run from now on: by a call of this object, or by code that reports the beginning and end of each."""
        self.node, self._before = None, self._progress and self._progress()

    def begins(self, node: fx.Node) -> None:
        """``node`` begins to run."""
        if node.name in self._pauses and self._progress is not None:
            self._before = self._wait(self._pauses[node.name], self._progress)
        self.node, self._since = node, time.perf_counter()

    def ends(self, node: fx.Node, result: Any) -> None:
        """``node`` has run. Raises as a call of this object does."""
        if self._progress is not None and not is_getitem(node):
            self._before = self._look(node, result, self._before, self._progress())

    @staticmethod
    def _wait(seconds: float, progress: Callable[[], Hashable]) -> Hashable:
        """Wait until another thread has disturbed the capture, or the time is over."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            time.sleep(0.001)
            progress()
        return progress()

    def _look(self, node: fx.Node, result: Any, before: Hashable, after: Hashable) -> Hashable:
        """How far the capture is, checked for the work of ``node``."""
        results = tensors_of(result)
        if before == after and is_somebodys(node) and (not results or any(tensor.numel() for tensor in results)):
            name = _torch.schema_name(op_of(node))
            raise CaptureError(
                f"{name} adds nothing to the captured graph, so a replay would leave out its work",
                fix=f"mark it: mark_eager({name!r})",
            )
        return after


def _last_uses(graph: fx.Graph) -> Mapping[fx.Node, Sequence[fx.Node]]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    last: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in order:
        last[max(node.users, key=order.__getitem__, default=node)].append(node)
    return last


def acts_outside(node: fx.Node) -> bool:
    """Whether a node is a collective or was registered with an effect. It is not captured again just for a check."""
    op = op_of(node)
    return is_asynchronous(op) or _torch.schema_name(op) == WAIT or _torch.is_effectful(op)


class Repair:
    """What one recording has found out, and how it continues."""

    def __init__(self, recut: Recut | None) -> None:
        self.eager: dict[str, Reason] = {}
        """The nodes that run eagerly from now on, by name."""
        self.again = False
        """Whether the segment that has just failed is captured once more as it is."""
        self._recut = recut
        self._apart: set[str] = set()
        self._blamed: tuple[fx.Node, ...] = ()
        self._suspects: dict[str, tuple[str, float]] = {}
        """By the first node of a segment: the node at which the capture became invalid, and how long it ran."""
        self._times: Counter[Any] = Counter()
        """How often each op was guilty."""

    def pauses(self, segment: GraphSegment) -> dict[str, float]:
        """How long to wait before which node of a segment while it is captured; see :meth:`judge`."""
        name, seconds = self._suspects.get(segment.calls[0].name, ("", 0.0))
        return {name: min(max(PAUSE * seconds, MIN_PAUSE), MAX_PAUSE)} if name else {}

    def judge(self, cause: Passing, body: NodeByNode | None, nodes: Sequence[fx.Node]) -> Passing:
        """Find out what made the capture of ``nodes`` fail, where ``cause`` is the kind of the error.

        An op that waits for the GPU and hides the error looks like another thread that waited. So the segment is
        captured once more, with a pause before that op, many times as long as the op took. A thread that goes on
        disturbing does so during the pause. If the pause passes without a disturbance, and the capture becomes invalid
        at the same node again, the op is guilty. If ops act outside of this process, nothing is captured again.
        """
        self.again = False
        if cause != "disturbed" or body is None or body.node is None:
            return cause
        before, _ = self._suspects.get(nodes[0].name, ("", 0.0))
        if before:
            return "" if before == body.node.name else cause
        self._suspects[nodes[0].name] = body.node.name, body.seconds
        self.again = not any(map(acts_outside, nodes[: nodes.index(body.node) + 1]))
        return "" if self.again else cause

    def found(self, nodes: Mapping[str, Reason], blamed: Sequence[fx.Node]) -> None:
        """Make ``nodes`` eager from now on; ``blamed`` are the guilty ones, if they are known."""
        self.eager.update(nodes)
        self._blamed = tuple(blamed)

    def cut(self, program: Program, position: int) -> Program | None:
        """``program``, cut anew around what was found in segment ``position``; None if the whole segment becomes eager."""
        if not self._blamed or self._recut is None or len(self._apart) >= MAX_CUTS:
            return None
        for blamed in self._blamed:
            self._times[op_of(blamed)] += 1
            # An op of PyTorch's own may be capturable elsewhere. All calls of it become eager only after a second one
            # has failed.
            if is_somebodys(blamed) or self._times[op_of(blamed)] > 1:
                for node in _calls_behind(blamed, program, position):
                    if op_of(node) == op_of(blamed):
                        self.eager.setdefault(node.name, self.eager[blamed.name])
        self._apart.add(next(node.name for node in program.segments[position].calls if _is_action(node)))
        cut = self._recut(self.eager, self._apart)
        if not _same_start(program, cut, position):
            return None
        if _names(cut.segments[position]) == _names(program.segments[position]):
            # The guilty node was added by the partition, such as a wait for a collective, and is no node of the graph.
            reason = self.eager[self._blamed[0].name]
            self.eager.update(dict.fromkeys((node.name for node in program.segments[position].calls), reason))
            return None
        return cut


def suspects_among(nodes: Sequence[fx.Node], body: NodeByNode | None) -> list[fx.Node]:
    """Which of a segment's ``nodes`` made its capture fail; empty if that is not known.

    ``body`` knows how far it came. If all nodes have run and the capture fails at its end, a custom op has forked a
    stream and not joined it. PyTorch's own ops do not do that.
    """
    if body is None:
        return []
    return [body.node] if body.node is not None else [node for node in nodes if is_somebodys(node)]


def _calls_behind(node: fx.Node, program: Program, position: int) -> Iterable[fx.Node]:
    found = False
    for segment in program.segments[position:]:
        for other in segment.calls:
            found = found or other is node
            if found and isinstance(segment, GraphSegment):
                yield other


def _is_action(node: fx.Node) -> bool:
    return not (is_getitem(node) or is_view(node) or is_number(node))


def _same_start(one: Program, other: Program, length: int) -> bool:
    """Whether two programs have the same first segments, with the same names."""
    starts = [list(map(_names, program.segments[:length])) for program in (one, other)]
    return len(other.segments) > length and starts[0] == starts[1]


def _names(segment: Segment) -> tuple[Any, ...]:
    return (type(segment), segment.outputs, *(node.name for node in segment.module.graph.nodes))
