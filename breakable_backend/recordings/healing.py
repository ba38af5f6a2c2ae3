"""Which node of a segment makes its capture fail, and what becomes of the rest: it is captured around that node.

A capture that fails has had no effect on the device. So the program is cut anew, with the guilty node as an eager step, and
the recording goes on at the beginning of the segment that failed: what is before the node is captured again, the node runs,
what is behind it is captured next. Several guilty nodes are found one after the other, in the same call.
"""

from __future__ import annotations

import operator
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from breakable_backend import _torch
from breakable_backend.errors import CaptureError, Passing
from breakable_backend.ir.effects import (
    WAIT,
    is_asynchronous,
    is_getitem,
    is_number,
    is_somebodys,
    is_view,
    op_of,
    tensors_of,
)
from breakable_backend.ir.program import GraphSegment, Program, Reason, Segment

MAX_CUTS = 16
"""Times that a program is cut anew in one recording. Each failed capture leaves its memory behind; beyond that the segments
that fail are eager as a whole."""

PAUSE = 20
"""How many times as long as an op has taken the capture is looked at, to tell the op from another thread."""
MIN_PAUSE, MAX_PAUSE = 0.02, 1.0
"""Seconds of that."""

Recut = Callable[[Mapping[str, Reason], Collection[str]], Program]
"""Makes the program anew with more nodes that run eagerly, and with segments that begin at some nodes: see ``partition``."""


class NodeByNode:
    """A segment's module as a function that knows which node is under way.

    Values go after their last use, as in the module's own code: a capture is to have the memory that it has with that.

    Args:
        module: the segment's.
        progress: of the driver that captures; None where nothing is captured. See ``CaptureDriver.progress``.
        pauses: seconds to wait before some nodes, by name, with a look at the capture behind that.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        progress: Callable[[], Hashable] | None = None,
        pauses: Mapping[str, float] | None = None,
    ) -> None:
        self.module, self._progress, self._pauses = module, progress, pauses or {}
        self.node: fx.Node | None = None
        """The node under way; after a call that failed, the one at which it did. None before the first and behind the last."""
        self._since = 0.0
        self._before: Hashable = None
        """How far the capture was before that node."""

    @property
    def seconds(self) -> float:
        """For how long the node under way has been so."""
        return time.perf_counter() - self._since

    def __call__(self, *inputs: Any, begin: Callable[[fx.Node], None] | None = None) -> tuple[Any, ...]:
        """Run all nodes. ``begin`` is told of each, before it runs.

        Raises:
            CaptureError: the capture has become invalid without an error, or would lack what somebody's own op does.
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
        self.node = None
        return tuple(fx.node.map_arg(output.args[0], environment.__getitem__))

    def starts(self) -> None:
        """The nodes are run now: by a call of this, or by code that says of each when it begins and ends."""
        self.node, self._before = None, self._progress and self._progress()

    def begins(self, node: fx.Node) -> None:
        """``node`` is run now."""
        if node.name in self._pauses and self._progress is not None:
            self._before = self._wait(self._pauses[node.name], self._progress)
        self.node, self._since = node, time.perf_counter()

    def ends(self, node: fx.Node, result: Any) -> None:
        """``node`` has run. Raises as a call of this does."""
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
        """How far the capture is, if ``node`` has done its part."""
        results = tensors_of(result)
        if before == after and is_somebodys(node) and (not results or any(tensor.numel() for tensor in results)):
            name = _torch.schema_name(op_of(node))
            raise CaptureError(f"{name} adds nothing to the captured graph, so a replay would leave out its work")
        return after


def _last_uses(graph: fx.Graph) -> Mapping[fx.Node, Sequence[fx.Node]]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    last: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in order:
        last[max(node.users, key=order.__getitem__, default=node)].append(node)
    return last


def acts_outside(node: fx.Node) -> bool:
    """Whether a node takes part with other processes, or was registered with an effect: it is not captured just to see what comes of it."""
    op = op_of(node)
    return is_asynchronous(op) or _torch.schema_name(op) == WAIT or _torch.is_effectful(op)


class Healing:
    """What one recording has found, and how it goes on."""

    def __init__(self, recut: Recut | None) -> None:
        self.eager: dict[str, Reason] = {}
        """The nodes that run eagerly from now on, by name."""
        self.again = False
        """Whether the segment that has just failed is to be captured once more as it is."""
        self._recut = recut
        self._apart: set[str] = set()
        self._blamed: tuple[fx.Node, ...] = ()
        self._suspects: dict[str, tuple[str, float]] = {}
        """By what segments begin with: the node at which something made the capture invalid, and for how long that ran."""
        self._times: Counter[Any] = Counter()
        """How often each op was guilty."""

    def pauses(self, segment: GraphSegment) -> dict[str, float]:
        """How long to wait before which node of a segment, while it is captured: see :meth:`judge`."""
        name, seconds = self._suspects.get(next(_calls(segment)).name, ("", 0.0))
        return {name: min(max(PAUSE * seconds, MIN_PAUSE), MAX_PAUSE)} if name else {}

    def judge(self, cause: Passing, body: NodeByNode | None, nodes: Sequence[fx.Node]) -> Passing:
        """What was in the way of the capture of ``nodes``, where ``cause`` is what the error says.

        An op that waits for the GPU and hides the error looks like another thread that did. So the segment is captured
        once more, with a pause before that op, many times as long as the op took: a thread that goes on disturbing
        does so in the pause. If the pause passes, and it happens again at the same node, it is the op. Where ops
        act outside of this process, nothing is captured again.
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
        """``nodes`` are eager from now on; ``blamed`` are those to blame, if that is known."""
        self.eager.update(nodes)
        self._blamed = tuple(blamed)

    def cut(self, program: Program, position: int) -> Program | None:
        """``program``, cut anew around what was found in segment ``position``. None: that segment is eager in this recording."""
        if not self._blamed or self._recut is None or len(self._apart) >= MAX_CUTS:
            return None
        for blamed in self._blamed:
            self._times[op_of(blamed)] += 1
            # An op of torch's own may well be captured elsewhere: all of a kind are eager only when a second one has failed.
            if is_somebodys(blamed) or self._times[op_of(blamed)] > 1:
                for node in _calls_behind(blamed, program, position):
                    if op_of(node) == op_of(blamed):
                        self.eager.setdefault(node.name, self.eager[blamed.name])
        self._apart.add(next(node.name for node in _calls(program.segments[position]) if _is_action(node)))
        cut = self._recut(self.eager, self._apart)
        if not _same_start(program, cut, position):
            return None
        if _names(cut.segments[position]) == _names(program.segments[position]):
            # Guilty is what the partition has added, such as a wait for a collective: no node of the graph.
            reason = self.eager[self._blamed[0].name]
            self.eager.update(dict.fromkeys((node.name for node in _calls(program.segments[position])), reason))
            return None
        return cut


def suspects_among(nodes: Sequence[fx.Node], body: NodeByNode | None) -> list[fx.Node]:
    """Which of a segment's ``nodes`` made its capture fail; empty where that is not known.

    ``body`` knows where it was. Where all nodes have run, and the capture fails at its end, somebody's op has forked a stream
    and did not join it: torch's own ops do no such thing.
    """
    if body is None:
        return []
    return [body.node] if body.node is not None else [node for node in nodes if is_somebodys(node)]


def _calls(segment: Segment) -> Iterator[fx.Node]:
    return (node for node in segment.module.graph.nodes if node.op == "call_function")


def _calls_behind(node: fx.Node, program: Program, position: int) -> Iterable[fx.Node]:
    found = False
    for segment in program.segments[position:]:
        for other in _calls(segment):
            found = found or other is node
            if found and isinstance(segment, GraphSegment):
                yield other


def _is_action(node: fx.Node) -> bool:
    return not (is_getitem(node) or is_view(node) or is_number(node))


def _same_start(one: Program, other: Program, length: int) -> bool:
    """Whether two programs have the same first segments, with the same names."""
    return len(other.segments) > length and (
        list(map(_names, one.segments[:length])) == list(map(_names, other.segments[:length]))
    )


def _names(segment: Segment) -> tuple[Any, ...]:
    return (type(segment), segment.outputs, *(node.name for node in segment.module.graph.nodes))
