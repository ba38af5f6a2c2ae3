"""Graphs of Dynamo's that take lists and dicts of tensors, or tensor subclasses, changed to take the tensors in them.

Lists and dicts come from compiled autograd, subclasses from quantised weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.compiling.lowering import CannotLower

CONTAINERS = (list, tuple, dict)


@dataclass(frozen=True)
class FlatGraph:
    """A graph that takes the contents of containers in their place."""

    module: fx.GraphModule
    inputs: Sequence[Any]
    stolen: tuple[bool | None, ...] | None = None
    """For each argument of Dynamo's graph: None if it is not a container, or else whether Dynamo wants it emptied. None
    if no argument is a container."""

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> FlatGraph:
        """For Dynamo's graph and its arguments. With a container among these it is a new graph: Dynamo keeps its own."""
        if not any(isinstance(value, CONTAINERS) for value in inputs):
            return cls(gm, inputs)
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        containers: dict[fx.Node, Any] = {}
        flat: list[Any] = []
        stolen: list[bool | None] = []
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(value, CONTAINERS):
                leaves, spec = pytree.tree_flatten(value)
                inside = [graph.placeholder(f"{node.name}_{number}") for number in range(len(leaves))]
                containers[node] = pytree.tree_unflatten(inside, spec)
                flat += leaves
                stolen.append(bool(node.meta.get("steal_arg")))
            else:
                copies[node] = graph.node_copy(node)
                flat.append(value)
                stolen.append(None)
        for node, container in containers.items():
            copies[node] = graph.call_function(_as_it_is, (container,))
        graph.output(graph.graph_copy(gm.graph, copies))
        graph.output_node().meta.update(gm.graph.output_node().meta)
        return cls(fx.GraphModule(gm, graph), flat, tuple(stolen))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which takes flat arguments, as a function of Dynamo's arguments."""
        if self.stolen is None:
            return function
        stolen = self.stolen

        def flattening(*args: Any) -> Any:
            flat: list[Any] = []
            for argument, emptied in zip(args, stolen, strict=True):
                flat += [argument] if emptied is None else pytree.tree_leaves(argument)
                if emptied:
                    argument.clear()  # the caller does not hold the tensors any more
            return function(*flat)

        flattening.__dict__.update(function.__dict__)  # attributes that reports read
        return flattening


def _as_it_is(container: Any) -> Any:
    """A container of values, as a node."""
    return container


# --- tensor subclasses ----------------------------------------------------------------------------------------------------

PART = "breakable_cg_part"
"""Whether an input is a part of a subclass; in the ``meta`` of its node."""


@dataclass(frozen=True)
class PlainGraph:
    """A graph that takes the inner tensors of subclasses (quantised weights, DTensors) in their place.

    Device meshes and process groups are constants of it, since Dynamo guards on them (torch 2.11 to 2.15).
    """

    module: fx.GraphModule
    arguments: tuple[Wrapped | Constant | None, ...] | None = None
    """For each argument of Dynamo's graph what becomes of it, or None if it is plain. None for all if all are plain."""

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[Any]) -> PlainGraph:
        """For Dynamo's graph and its arguments. It puts the subclasses together by itself.

        Raises:
            CannotLower: the sizes of a subclass vary.
        """
        arguments = tuple(map(_what, inputs))
        if not any(arguments):
            return cls(gm)
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        made: list[tuple[fx.Node, Wrapped | Constant, list[fx.Node]]] = []
        for node, what in zip(gm.graph.find_nodes(op="placeholder"), arguments, strict=True):
            if what is None:
                copies[node] = graph.node_copy(node)
                continue
            if isinstance(what, Wrapped) and any(
                isinstance(size, torch.SymInt) for size in node.meta["example_value"].shape
            ):
                raise CannotLower(f"it needs gradients, and the sizes of a {what.kind.__name__} vary")
            parts = []
            for number, inner in enumerate(what.inner(node.meta["example_value"])):
                parts.append(graph.placeholder(f"{node.name}_{number}"))
                parts[-1].meta = {**node.meta, "example_value": inner, PART: True}
            made.append((node, what, parts))
        for node, what, parts in made:
            copies[node] = graph.call_function(what, tuple(parts))
            copies[node].meta = {"example_value": node.meta["example_value"]}
        graph.output(graph.graph_copy(gm.graph, copies))
        graph.output_node().meta.update(gm.graph.output_node().meta)
        return cls(fx.GraphModule(gm, graph), arguments)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which takes inner tensors, as a function of Dynamo's arguments."""
        if self.arguments is None:
            return function
        arguments = self.arguments
        differentiable = [index for index, what in enumerate(arguments) if isinstance(what, Wrapped) and what.needs]
        wrapped = tuple(arguments[index] for index in differentiable)

        def taking_apart(*args: Any) -> Any:
            needing = iter(_torch.apply_plainly(_Apart, wrapped, *[args[index] for index in differentiable]))
            plain: list[Any] = []
            for argument, what in zip(args, arguments, strict=True):
                if what is None:
                    plain.append(argument)
                    continue
                for inner in what.inner(argument):
                    part: Any = next(needing) if isinstance(what, Wrapped) and what.needs else inner.detach()
                    part.whole = Whole(inner, argument)
                    plain.append(part)
            return function(*plain)

        taking_apart.__dict__.update(function.__dict__)  # attributes that reports read
        return taking_apart


@dataclass(frozen=True)
class Whole:
    """What a plain tensor is a part of. It is at the attribute ``whole`` of the tensor, which lives as long as a call."""

    inner: torch.Tensor
    """The tensor that the subclass holds, over the same memory. It lives as long as the subclass."""
    outer: torch.Tensor
    """The subclass, whose version counts writes."""


class Constant:
    """An argument, or a part of one, that is a device mesh or a process group."""

    count = 0
    """How many plain tensors it consists of."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.__name__ = self.__qualname__ = type(value).__name__

    def inner(self, _value: Any) -> list[torch.Tensor]:
        return []

    def made(self, _plain: Iterator[torch.Tensor]) -> Any:
        return self.value

    def __call__(self) -> Any:
        return self.value


class Wrapped:
    """A subclass of tensors, and how one is put together of plain tensors. Dynamo guards on its context."""

    def __init__(self, example: torch.Tensor) -> None:
        self.needs, example = example.requires_grad, example.detach() if example.requires_grad else example
        self.kind, self.size, self.stride = type(example), example.size(), example.stride()
        names, self.context = example.__tensor_flatten__()  # type: ignore[attr-defined]
        self.parts = {name: _what(getattr(example, name)) for name in names}
        self.count: int = sum(1 if part is None else part.count for part in self.parts.values())
        """How many plain tensors it consists of."""
        self.gradient: Wrapped | None = None
        """How the gradient of the last trace is put together: that of a DTensor may be placed otherwise than itself."""
        self.__name__ = self.__qualname__ = self.kind.__name__

    def inner(self, tensor: Any) -> list[torch.Tensor]:
        """The plain tensors that ``tensor`` consists of."""
        found: list[torch.Tensor] = []
        for name, part in self.parts.items():
            value = getattr(tensor, name)
            found += [value] if part is None else part.inner(value)
        return found

    def made(self, plain: Iterator[torch.Tensor]) -> Any:
        """A subclass that is made of the next tensors of ``plain``."""
        inner = {name: next(plain) if part is None else part.made(plain) for name, part in self.parts.items()}
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)  # type: ignore[attr-defined]

    def __call__(self, *plain: torch.Tensor) -> Any:
        """What a node of the graph calls. Returns the subclass that was given; in a trace, one made of ``plain``."""
        if (whole := getattr(plain[0], "whole", None)) is not None:
            return whole.outer
        return _torch.apply_function(_Together, self, *plain) if self.needs else self.made(iter(plain))

    def take(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """The plain tensors of a gradient.

        Raises:
            CannotLower: it is no such subclass.
        """
        if type(gradient) is not self.kind:
            raise CannotLower(f"the gradient of a {self.kind.__name__} is a {type(gradient).__name__}")
        self.gradient = Wrapped(gradient)
        return self.gradient.inner(gradient)


def _what(example: Any) -> Wrapped | Constant | None:
    """What becomes of an argument. None: it stays as it is."""
    if isinstance(example, torch.Tensor):
        return Wrapped(example) if _torch.is_traceable_wrapper_subclass(example) else None
    return Constant(example) if _torch.is_mesh_or_group(example) else None


class _Apart(torch.autograd.Function):
    """The inner tensors of subclasses that need gradients.

    The attribute ``gradient_of`` of a gradient is the :class:`Wrapped` of which it is a part: each backward has its own.
    """

    @staticmethod
    def forward(ctx: Any, wrapped: Sequence[Wrapped], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.wrapped = wrapped
        ctx.set_materialize_grads(False)
        return tuple(
            inner.detach() for what, tensor in zip(wrapped, tensors, strict=True) for inner in what.inner(tensor)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        left, made = iter(grads), list[Any]()
        for what in ctx.wrapped:
            plain = list(itertools.islice(left, what.count))
            made.append(None if None in plain else plain[0].gradient_of.made(iter(plain)))
        return None, *made


class _Together(torch.autograd.Function):
    """A subclass that needs gradients, made of its inner tensors."""

    @staticmethod
    def forward(ctx: Any, what: Wrapped, *plain: torch.Tensor) -> Any:
        ctx.what = what
        ctx.set_materialize_grads(False)
        return what.made(inner.detach() for inner in plain)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        return None, *([None] * ctx.what.count if grad is None else ctx.what.take(grad))
