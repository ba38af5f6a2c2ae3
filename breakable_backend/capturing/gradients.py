"""Gradients through the eager steps of ``with capture(graph)``.

Compiled code has its own modules for gradients: :mod:`breakable_backend.calling.training` for graphs, and
:mod:`breakable_backend.marks.saved_for_backward` for marked functions.

A marked function that is called under grad mode becomes two eager steps: the function itself, at its place in the
forward, and its gradients, at their place in the backward. It runs on detached tensors, so that it has a small autograd
graph of its own, which each replay makes anew. In the graph of the captured code one node stands for it.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NoReturn, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.capturing.eager_results import PLAIN, Parts, fields, replaced
from breakable_backend.capturing.graph import Alive
from breakable_backend.errors import CaptureError, EagerOutputError
from breakable_backend.ir.layout import Geometry, strided
from breakable_backend.ir.running_ops import is_view_to_autograd
from breakable_backend.marks.call_sites import DIFFERENTIATED_AN_ARGUMENT, Mark, history_used
from breakable_backend.marks.changes import names_in
from breakable_backend.marks.saved_for_backward import nothing_like
from breakable_backend.marks.structure import view_leaf, view_of

MOST_LOOKED_AT = 10_000
"""How many objects are searched for the leaves that a function closes over."""


@dataclass(frozen=True)
class Run:
    """One run of a marked function: the inputs and outputs of its autograd graph."""

    results: tuple[GradientEdge, ...]
    inputs: tuple[torch.Tensor, ...]
    """The detached tensors."""


Leaf = Callable[[], torch.Tensor]
"""Returns an autograd leaf that a marked function reads as it is. Parameters belong to the model and are not held."""


def leaf_of(tensor: torch.Tensor, source: str) -> Leaf:
    """A :data:`Leaf` for ``tensor``, for an eager step that is called at ``source``."""
    return Alive.of(tensor, source) if isinstance(tensor, nn.Parameter) else lambda: tensor


@dataclass(eq=False)
class Forward:
    """The eager step in the forward: calls a marked function with the leaves of its arguments."""

    function: Callable[..., Any]
    spec: Any
    name: str
    source: str
    first: Mapping[int, int]
    """For each tensor to be detached, by position, the first position of the same tensor."""
    leaves: tuple[Leaf, ...]
    """Those for which gradients are computed besides the detached tensors."""
    needing: tuple[bool, ...] = ()
    """Which leaves of the result need gradients."""
    run: Run | None = None
    """The last replay's, with what it has saved for its backward."""
    wanted: bool = False
    """Whether the capture contains a backward through it."""

    def __call__(self, *given: Any) -> Any:
        """Run it in a replay."""
        leaves, inputs = self.cut(given)
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        result = self.function(*args, **kwargs)
        self.look_at(inputs)
        self.run = self.seen(result, inputs) if self.wanted else None
        return result

    def cut(self, given: Sequence[Any]) -> tuple[list[Any], tuple[torch.Tensor, ...]]:
        """The leaves of the arguments, with tensors that need gradients as autograd leaves; and these tensors."""
        cut = {place: given[place].detach().requires_grad_() for place in dict.fromkeys(self.first.values())}
        return [cut[self.first[place]] if place in self.first else value for place, value in enumerate(given)], tuple(
            cut.values()
        )

    def look_at(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raise if gradients of the detached tensors were seen, or, later, if they are needed by another way than results."""
        if used := history_used(inputs, {0: functools.partial(self._refuse, *DIFFERENTIATED_AN_ARGUMENT)}):
            self._refuse(*used)

    def _refuse(self, why: str, fix: str, *_: Any) -> NoReturn:
        raise EagerOutputError(
            f"{self.name}: {why}, and in captured code arguments have no history", where=self.source, fix=fix
        )

    def seen(self, result: Any, inputs: tuple[torch.Tensor, ...]) -> Run:
        """The run of a replay, if its autograd graph is that of the capture."""
        needing, needs = differentiable(result)
        if needs != self.needing:
            raise EagerOutputError(
                f"{self.name} returned other tensors that need gradients than when it was captured",
                where=self.source,
                fix="have the same tensors need gradients in each call",
            )
        known = {id(leaf) for leaf in (*inputs, *self.all_leaves())}
        if any(id(leaf) not in known for leaf in leaves_behind(needing)):
            raise EagerOutputError(
                f"{self.name} returned a tensor with gradients of a tensor that had none when it was captured",
                where=self.source,
                fix="pass that tensor, or the module that it is in, as an argument",
            )
        return Run(tuple(map(get_gradient_edge, needing)), inputs)

    def all_leaves(self) -> list[torch.Tensor]:
        """The tensors behind :attr:`leaves`."""
        return [leaf() for leaf in self.leaves]


@dataclass(eq=False)
class Backward:
    """The eager step in the backward: gradients for the inputs of one run of a marked function."""

    forward: Forward
    last: bool
    """Whether nobody runs it backward again."""
    filled: tuple[bool, ...] = ()
    """Which leaves had a ``.grad`` at the capture. A leaf that gets no gradient is as it was then."""
    wanted: tuple[bool, ...] = ()
    """Which inputs got a gradient at the capture."""

    def first(self, run: Run, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients at the capture."""
        self.filled = tuple(leaf.grad is not None for leaf in self.forward.all_leaves())
        found = self.gradients(run, grads)
        self.wanted = tuple(gradient is not None for gradient in found)
        return found

    def __call__(self, *grads: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradients in a replay."""
        forward = self.forward
        run = forward.run
        assert run is not None, "its forward is an earlier step"
        if self.last:
            forward.run = None
        gradients = self.gradients(run, grads)
        came = tuple(gradient is not None for gradient in gradients)
        if came != self.wanted:
            raise EagerOutputError(
                f"a backward through {forward.name} has gradients of other tensors than when it was captured",
                where=forward.source,
                fix="let its result depend on the same tensors in each call (adding `x * 0` will do), "
                "or have .grad there before the capture",
            )
        return gradients

    def gradients(self, run: Run, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the detached tensors and of the leaves; None where nothing depends on one."""
        leaves = self.forward.all_leaves()
        inputs = [*run.inputs, *leaves]
        pairs = [(end, grad) for end, grad in zip(run.results, grads, strict=True) if grad is not None]
        if not pairs or not inputs:
            return [None] * len(inputs)
        # In this thread: what autograd's own thread calls would wait for the lock that a replay holds.
        with torch.autograd.set_multithreading_enabled(False), _torch.without_hooks(leaves):
            found: list[torch.Tensor | None] = list(
                _torch.gradients(
                    [end for end, _ in pairs],
                    inputs,
                    [grad for _, grad in pairs],
                    retain_graph=not self.last,
                    allow_unused=True,
                )
            )
        for number, (leaf, filled) in enumerate(zip(leaves, self.filled, strict=True), len(run.inputs)):
            if found[number] is None and filled:
                found[number] = nothing_like(leaf)
        return found


def differentiable(result: Any) -> tuple[list[torch.Tensor], tuple[bool, ...]]:
    """The leaves of a result that need gradients; and which of all leaves these are."""
    leaves = [leaf for _, leaf in fields(result)]
    needs = tuple(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)
    return list(itertools.compress(leaves, needs)), needs


def leaves_behind(tensors: Sequence[torch.Tensor], since: int | None = None) -> Iterator[torch.Tensor]:
    """The autograd leaves that some tensors depend on.

    Raises:
        LookupError: they depend on something that was computed before the node number ``since`` was made.
    """
    yield from (tensor for tensor in tensors if tensor.grad_fn is None)
    for node in _torch.nodes_behind(tensor.grad_fn for tensor in tensors):
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        elif since is not None and _torch.node_number(node) < since:
            raise LookupError


# --- while capturing ----------------------------------------------------------------------------------------------------


class Captures(active.BreakHandler, Protocol):
    """The capture in progress, as a backward sees it."""

    def backward(self, step: Backward, run: Run, grads: Sequence[torch.Tensor | None]) -> Sequence[Any]:
        """Run the backward of a marked function as an eager step. Returns its gradients as captured code may use them."""


@dataclass(frozen=True)
class Reach:
    """The autograd leaves for which a marked function may need gradients.

    It is made while a segment is captured. Autograd makes the node of a leaf at its first use, for the stream of that
    use. If that were the stream of eager steps, a backward in the capture could not continue on it.
    """

    own: tuple[torch.Tensor, ...]
    """Those among the arguments, parameters of modules included."""
    others: Mapping[int, torch.Tensor]
    """Those that the function closes over, by their identities."""
    nodes: tuple[GradientEdge, ...]
    """Keeps their nodes alive."""

    @classmethod
    def of(cls, mark: Mark, given: Sequence[Any], made: Collection[int]) -> Reach:
        """The leaves from outside of the capture that ``mark`` reaches.

        Args:
            mark: of the function.
            given: the leaves of its arguments.
            made: the keys of storages that were made inside the capture.
        """
        own: dict[int, torch.Tensor] = {}
        for value in given:
            if isinstance(value, nn.Module):
                own |= {id(p): p for p in value.parameters() if p.requires_grad}
            elif _is_leaf(value) and _torch.storage_key(value) not in made:
                own[id(value)] = value
        others = {id(leaf): leaf for leaf in leaves_in((mark.body, given)) if id(leaf) not in own}
        with _torch.without_modes():
            nodes = tuple(map(get_gradient_edge, (*own.values(), *others.values())))
        return cls(tuple(own.values()), others, nodes)

    def all(self) -> list[torch.Tensor]:
        """All of them."""
        return [*self.own, *self.others.values()]


def leaves_in(value: Any, depth: int = 8, met: dict[int, Any] | None = None) -> Iterator[torch.Tensor]:
    """The autograd leaves that Python reaches from ``value``, through containers, objects, modules and functions."""
    met = {} if met is None else met
    if id(value) in met or depth == 0 or len(met) > MOST_LOOKED_AT:
        return
    met[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield from (value,) if _is_leaf(value) else ()
    elif isinstance(value, nn.Module):
        yield from (parameter for parameter in value.parameters() if parameter.requires_grad)
    elif not isinstance(value, (type, ModuleType, *PLAIN)):
        for item in _inside(value):
            yield from leaves_in(item, depth - 1, met)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        read = [value.__globals__[name] for name in names_in(value.__code__) if name in value.__globals__]
        return [*cells, *read, value.__defaults__, value.__kwdefaults__, vars(value)]
    return list(getattr(value, "__dict__", {}).values())


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf


@dataclass(eq=False)
class Call:
    """A call of a marked function under grad mode, while it is captured."""

    mark: Mark
    reach: Reach
    step: Forward
    given: Sequence[Any]
    """The leaves of its arguments, as captured code has them."""
    leaves: list[Any]
    """The same leaves, detached, as the function gets them."""
    inputs: tuple[torch.Tensor, ...]
    since: int
    grads: Sequence[torch.Tensor | None]
    """The ``.grad`` of its autograd leaves before it runs."""
    nodes: tuple[GradientEdge, ...]
    """Keeps the nodes of the detached tensors alive, which are made for the stream of the capture as those of a reach are."""

    @classmethod
    def of(
        cls, mark: Mark, reach: Reach, function: Callable[..., Any], given: Sequence[Any], spec: Any, source: str
    ) -> Call:
        """Detach the arguments, except autograd leaves from outside of the capture. It is made while a segment is captured.

        Args:
            mark: of the function.
            reach: its autograd leaves.
            function: what is called.
            given: the leaves of the arguments.
            spec: the structure of the arguments.
            source: the line of the call.
        """
        known: dict[int, int] = {}
        first = {
            place: known.setdefault(id(value), place)
            for place, value in enumerate(given)
            if isinstance(value, torch.Tensor) and value.requires_grad and not any(value is leaf for leaf in reach.own)
        }
        step = Forward(function, spec, mark.name, source, first, tuple(leaf_of(leaf, source) for leaf in reach.own))
        with _torch.without_modes():
            leaves, inputs = step.cut(given)
            nodes = tuple(map(get_gradient_edge, inputs))
        grads = [leaf.grad for leaf in reach.all()]
        return cls(mark, reach, step, given, leaves, inputs, _torch.next_node_number(), grads, nodes)

    def check(self) -> None:
        """Raise if the gradients would not be those of eager."""
        self._refuse_writes()
        self._refuse_stub()

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the function."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.step.spec)
        return args, kwargs

    @property
    def takes_part(self) -> bool:
        """Whether autograd is involved."""
        return bool(self.inputs or self.step.leaves or any(self.step.needing))

    def _refuse_writes(self) -> None:
        if not self.mark.mutates_args or not self.inputs:
            return
        args, kwargs = self.arguments()
        cut = {id(tensor) for tensor in self.inputs}
        for name, value in inspect.signature(self.mark.body).bind(*args, **kwargs).arguments.items():
            if name in self.mark.mutates_args and any(id(leaf) in cut for _, leaf in fields(value)):
                raise CaptureError(
                    f"{self.mark.name} writes {name}, an argument that needs gradients",
                    where=self.step.source,
                    fix="return the new value, and write it outside of the function",
                )

    def _refuse_stub(self) -> None:
        if self.mark.capture_stub is not None and (self.inputs or self.step.leaves):
            raise CaptureError(
                f"{self.mark.name} has a capture_stub, which has no gradients, and an argument that needs some",
                where=self.step.source,
                fix="capture under torch.no_grad(), or leave the stub out",
            )

    def take(self, result: Any, device: torch.device) -> Run:
        """Look at the result of the function."""
        step = self.step
        needing, step.needing = differentiable(result)
        step.look_at(self.inputs)
        self._refuse_taken_gradients()
        other = next((tensor.device for tensor in needing if tensor.device != device), None)
        if other is not None:
            raise CaptureError(
                f"{step.name} returned a tensor on {other}, which needs gradients that no replay would renew",
                where=step.source,
                fix="return it on the device of the capture, or detached",
            )
        known = {id(leaf) for leaf in (*self.inputs, *step.all_leaves())}
        try:
            behind = {id(leaf): leaf for leaf in leaves_behind(needing, self.since) if id(leaf) not in known}
            if not behind.keys() <= self.reach.others.keys():
                raise LookupError
        except LookupError:
            raise CaptureError(
                f"{step.name} returned a tensor with gradients of a tensor that is not an argument",
                where=step.source,
                fix="pass tensors that need gradients, and their modules, as arguments, in containers that pytree knows",
            ) from None
        step.leaves = (*step.leaves, *(leaf_of(leaf, step.source) for leaf in behind.values()))
        return Run(tuple(map(get_gradient_edge, needing)), self.inputs)

    def _refuse_taken_gradients(self) -> None:
        """Raise if it removed a ``.grad``: in a replay captured code would not set it again."""
        for leaf, before in zip(self.reach.all(), self.grads, strict=True):
            if before is not None and leaf.grad is not before:
                raise CaptureError(
                    f"{self.mark.name} removed the .grad of a {type(leaf).__name__} of shape {list(leaf.shape)}",
                    where=self.step.source,
                    fix="zero_grad(set_to_none=False), or zero gradients outside of marked functions",
                )

    def through(self, capture: Captures, run: Run, result: Any, placed: Any, parts: Parts) -> Any:
        """``placed``, the result on memory of the capture, as a part of the captured code's autograd graph."""
        mine = [leaf for _, leaf in fields(result)]
        theirs = [leaf for _, leaf in fields(placed)]
        outputs = [number for number, needing in enumerate(self.step.needing) if needing]
        fresh = [number for number in outputs if parts.leaves[number].group >= 0]
        final: dict[int, Any] = {n: self._again(mine[n]) for n in outputs if n not in fresh}
        node = _Node(weakref.ref(capture), self.step, run, outputs, fresh, lambda: _on_shared(theirs, fresh, parts))
        originals = [self.given[place] for place in dict.fromkeys(self.step.first.values())]
        if fresh:
            made = _torch.apply_function(_Through, node, *originals, *self.step.all_leaves())
            final |= dict(zip(fresh, made, strict=True))
        numbers = iter(range(len(theirs)))
        return replaced(placed, lambda value: final.get(next(numbers), value))

    def _again(self, result: torch.Tensor) -> torch.Tensor:
        """A result in the memory of an argument, as captured code makes it from the argument."""
        cut = dict(zip(map(id, self.inputs), dict.fromkeys(self.step.first.values()), strict=True))
        if result.is_leaf:
            return self.given[cut[id(result)]] if id(result) in cut else result
        for base in self.inputs if not _torch.num_watching(result) else ():
            same_memory = _torch.storage_key(base) == _torch.storage_key(result)
            read_alike = Geometry.of(base).read_as == Geometry.of(result).read_as
            if same_memory and read_alike and is_view_to_autograd(result, [base]):
                leaf = view_leaf("argument", 0, strided(base), strided(result), False)
                return view_of(self.given[cut[id(base)]], leaf)
        raise CaptureError(
            f"{self.mark.name} returned existing memory with a gradient of its own",
            where=self.step.source,
            fix="return a clone()",
        )


def _on_shared(placed: Sequence[torch.Tensor], numbers: Sequence[int], parts: Parts) -> tuple[torch.Tensor, ...]:
    """Fresh results. Autograd knows that those which share memory are views, and refuses writes to them."""
    flat: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    made = []
    for number in numbers:
        tensor, group = placed[number], parts.leaves[number].group
        if parts.sizes[group] is not None:
            key = group, tensor.dtype
            if key not in flat:
                flat[key] = Geometry.of(tensor).whole(tensor.untyped_storage())
            view = flat[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            tensor = _torch.with_lazy_bits(view, _torch.lazy_bits(tensor))
        made.append(tensor)
    return tuple(made)


@dataclass(eq=False)
class _Node:
    """The autograd node."""

    capture: weakref.ref[Captures]
    step: Forward
    run: Run | None
    outputs: Sequence[int]
    """The leaves of the result that need gradients, as the run has them."""
    fresh: Sequence[int]
    """Those whose gradients come to this node."""
    make: Callable[[], tuple[torch.Tensor, ...]] | None

    def backward(self, grads: Sequence[torch.Tensor | None]) -> Sequence[Any]:
        capture, run = self.capture(), self.run
        if capture is None or run is None or active.handler.get() is not capture:
            raise CaptureError(
                f"a backward through {self.step.name} ran outside of the capture of its forward, or a second time",
                where=self.step.source,
                fix="run the backward in the same capture; with retain_graph=True if it is run again",
            )
        if torch.is_grad_enabled():
            raise CaptureError(
                f"a second derivative (create_graph=True) was taken through {self.step.name}, an eager step",
                where=self.step.source,
                fix="leave the function unmarked, or run this outside of the capture",
            )
        came = dict(zip(self.fresh, grads, strict=True))
        last = not _torch.graph_is_kept()
        if last:
            self.run = None
        self.step.wanted = True
        return capture.backward(Backward(self.step, last), run, [came.get(number) for number in self.outputs])


class _Through(torch.autograd.Function):
    """Stands for a marked function in the autograd graph of captured code."""

    @staticmethod
    def forward(ctx: Any, node: _Node, *_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.node, make, node.make = node, node.make, None
        ctx.set_materialize_grads(False)
        assert make is not None
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, *ctx.node.backward(grads)
