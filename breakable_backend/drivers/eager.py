"""The driver of ``debug="eager"``: a replay runs the segment's Python again, so that debuggers and error lines work in it.

Everything around a segment is as with a capture: addresses, bridges, order, outputs. So a result that is wrong here too
is wrong because of that code. A result that is right here is wrong because of the capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.drivers import CapturedGraph, Pairs
from breakable_backend.drivers.device import OpByOpDriver, OpByOpGraph
from breakable_backend.errors import ReplayError
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.effects import calls_in
from breakable_backend.ir.layout import non_owning
from breakable_backend.ir.running_ops import RandomStates, generators_of
from breakable_backend.ir.views import is_view_op

T = TypeVar("T")


class RerunGraph(OpByOpGraph):
    """A segment that runs again in each replay but the first, which stands for the run under the capture.

    Later segments read results at their recorded addresses, so the new memory of each run is copied there: ``made`` has
    it by the first leaf of the result that lies in it. Arguments are read and written at their addresses, and not
    owned, as by a captured graph.
    """

    def __init__(
        self, body: Callable[[], Any], made: Mapping[int, torch.UntypedStorage], draws_random: bool, modes: Modes
    ) -> None:
        super().__init__(draws_random, made)
        self._body: Callable[[], Any] | None = body
        self._modes = modes
        self._ran = True

    def kernels(self) -> tuple[str, ...]:
        """The ops of a segment that launch something; nothing for other code."""
        function = self._body.func if isinstance(self._body, functools.partial) else None
        module = getattr(function, "__wrapped__", function)
        return _launching(module) if isinstance(module, fx.GraphModule) else ()

    def run(self) -> None:
        if self._ran:
            self._ran = False
            return
        assert self._body is not None
        with self._modes.enter():
            leaves = pytree.tree_leaves(self._body())
        for position, storage in self.made.items():
            _move(leaves[position].untyped_storage(), storage)

    def release(self) -> None:
        super().release()
        self._body = None


class EagerDriver(OpByOpDriver):
    """Runs what other drivers capture, on a device of any type. See :class:`breakable_backend.drivers.CaptureDriver`.

    Unlike under a capture, the effects of a body have happened when :meth:`capture` returns, and the first replay does
    nothing: the two together are one run. Exceptions of a body are not wrapped.
    """

    name = "eager"
    reuses_memory = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    def begin(self) -> int:
        if self._done is None:
            return 0
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._done)
        return stream.cuda_stream

    def end(self, stream: int) -> None:
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self.device))

    def recording(self, apart: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def feeds(self, bridge: torch.Tensor, value: torch.Tensor) -> bool:
        """False: copies are made before a segment runs."""
        return False

    def capture(self, body: Callable[[], T], fed: Pairs = ()) -> tuple[CapturedGraph, T]:
        """Run ``body``, and keep it for replays. If it is a ``partial``, its arguments are kept by their addresses."""
        args = body.args if isinstance(body, functools.partial) else ()
        arguments = {_torch.storage_key(arg) for arg in args if isinstance(arg, torch.Tensor)}
        states = RandomStates.of(generators_of(self.device)[-1:])
        result = body()
        made: dict[int, torch.UntypedStorage] = {}
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, torch.Tensor) and (key := _torch.storage_key(leaf)) not in arguments:
                arguments.add(key)
                made[position] = leaf.untyped_storage()
        if isinstance(body, functools.partial):
            body = functools.partial(body.func, *map(self._unowned, args))
        graph = RerunGraph(body, made, not states.are_current(), Modes.current())
        self.adopt(graph)
        return graph, result

    def _unowned(self, argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        if argument.device != self.device:
            return argument.clone()  # a host number, whose value is part of the key
        return non_owning(argument)

    def let_out(self, value: torch.Tensor, target: torch.Tensor) -> None:
        """None: results keep their memory."""

    def progress(self) -> Hashable:
        """A new object in each call: every op counts as progress, since it has run."""
        return object()

    def is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def release(self, graphs: Sequence[CapturedGraph], owner: list[Any] | None = None, *, wait: bool = True) -> None:
        # Whoever releases a model can do nothing about a lost device.
        with suppress(torch.AcceleratorError):
            if self._done is not None and not self.is_capturing():
                # The last call may have run on another stream than the one that allocated the memory.
                self._done.synchronize()
        super().release(graphs, owner, wait=wait)


def _launching(module: fx.GraphModule) -> tuple[str, ...]:
    targets = [node.target for node in calls_in(module)]
    return tuple(str(op) for op in targets if isinstance(op, _torch.Op) and not is_view_op(op))


def _move(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    if source.nbytes() != target.nbytes():
        raise ReplayError(
            f"a segment made {source.nbytes()} bytes where it made {target.nbytes()} when it was recorded",
            fix="mark the op whose result varies in size: the ops after it have memory for the first size only",
        )
    if source.data_ptr() != target.data_ptr():
        target.copy_(source)
