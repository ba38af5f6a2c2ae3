"""The ops that stand for calls of marked functions in compiled code, and their gradients."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch, active, locks
from breakable_backend.errors import ReplayError
from breakable_backend.ir.effects import calls_in, graphs_in
from breakable_backend.ir.layout import Strided
from breakable_backend.marks.call_sites import Site, sites
from breakable_backend.marks.learning import Given
from breakable_backend.marks.saved_for_backward import (
    Member,
    SavedForBackward,
    no_second_derivative,
    nothing_like,
    part_of,
    saved_behind,
)

_REST = "Tensor[] tensors, SymInt[] ints, float[] floats"
_library = torch.library.Library("breakable_cg", "FRAGMENT")
_library.define(f"shapes(int site, bool[] needs, {_REST}) -> ()")
_torch.never_run_on_constants(torch.ops.breakable_cg.shapes.default)
_library.define("number(int site, Tensor numbers, int position) -> SymInt")
_library.define(
    "backward(int site, Tensor handle, Tensor?[] grads, SymInt[] sizes) -> Tensor[]", tags=(torch.Tag.cudagraph_unsafe,)
)
_calls: set[Any] = set()
"""The ops that run marked functions."""


Absent = frozenset[tuple[int, int]]
"""Gradients that calls of marked functions do not give: the number of the site, and the place among those of the call."""

_absent: ContextVar[Absent] = ContextVar("absent", default=frozenset())


@contextmanager
def without(absent: Absent) -> Iterator[None]:
    """Calls that are traced in a ``with`` statement have no edge in autograd's graph along which ``absent`` gradients would go."""
    token = _absent.set(absent)
    try:
        yield
    finally:
        _absent.reset(token)


def unreached(number: int, handle: torch.Tensor, given: Sequence[bool]) -> set[int]:
    """The places of gradients that a call will not give, if its results are ``given`` gradients."""
    return _saved(number, handle).unreached(given)


def _saved(number: int, handle: torch.Tensor) -> SavedForBackward:
    saved = saved_behind(handle)
    if saved is None:
        site = sites.get(number)
        raise ReplayError(
            f"what {site.mark.name if site is not None else 'a marked function'} saved for its backward is gone: "
            "saved_tensors_hooks kept only a copy of its handle",
            where=site.mark.source if site is not None else "",
            fix="have the hooks keep int64 tensors on the host as they are",
        )
    return saved


def _not_twice(ctx: Any) -> Callable[[], ReplayError]:
    mark = sites[ctx.site].mark
    fix = "call the code around it uncompiled where you differentiate twice"
    return functools.partial(no_second_derivative, mark.name, f"{mark.why}, in compiled code", mark.source, fix)


class _Node(torch.autograd.Function):
    """The autograd node of a call. What it saves lies behind a handle, a tensor that autograd saves like any other."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], Any], number: int, needs: list[bool], *tensors: torch.Tensor) -> Any:
        *results, handle = run()
        site = sites[number]
        if _torch.is_traced(handle):
            members: Sequence[Any] = site.traced_as()
        else:
            members = _saved(number, handle).members
            site.saw(members)
        ctx.mark_non_differentiable(*(result for result, some in zip(results, members, strict=False) if not some))
        ctx.save_for_backward(handle)
        ctx.set_materialize_grads(False)
        ctx.site, ctx.needs, ctx.num_roots = number, needs, len(members)
        ctx.sizes = [size for tensor, need in zip(tensors, needs, strict=True) if need for size in tensor.shape]
        return tuple(results)

    @staticmethod
    @_torch.once_differentiable(_not_twice)
    def backward(ctx: Any, *grads: Any) -> Any:
        (handle,) = ctx.saved_tensors
        given = list(grads[: ctx.num_roots])
        made: Sequence[Any] = ()
        if any(grad is not None for grad in given):
            if _torch.is_traced(handle):
                *made, _came = torch.ops.breakable_cg.backward(ctx.site, handle, given, ctx.sizes)
            else:
                saved = _saved(ctx.site, handle)
                made = saved.backward(given)
                if missing := {place for place, gradient in enumerate(made) if gradient is None}:
                    sites[ctx.site].left_out |= missing
                    sites[ctx.site].unforeseen |= missing - saved.unreached([grad is not None for grad in given])
        left = iter(made or [None] * sum(ctx.needs))
        gradients = [next(left) if need else None for need in ctx.needs]
        if not _torch.is_traced(handle):
            _torch.spare_hooks(ctx.next_functions, gradients)
        return *(None,) * 3, *gradients


class _Joined(torch.autograd.Function):
    """A root of a call that autograd recorded as it does in eager. Its gradient is that of the results in its memory.

    So hooks see what the body saves, and a checkpoint finds the same in a call that runs as Python and in this one.
    """

    @staticmethod
    def forward(ctx: Any, holder: list[torch.Tensor], places: list[Strided | None], *_: torch.Tensor) -> torch.Tensor:
        ctx.places = places
        return holder[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return None, None, *(part_of(grad, where) for where in ctx.places)


def _joined(root: torch.Tensor, members: Sequence[Member]) -> Any:
    if not members:
        return root
    return _torch.apply_function(_Joined, [root], [where for _, where in members], *(member for member, _ in members))


def _define(name: str, num_written: int, num_results: int | None) -> Any:
    """An op that runs marked functions and writes their first tensors. Without a number of results it returns a list.

    AOTAutograd functionalises no op that both writes and returns a list.
    """
    written = "".join(f"Tensor(a{number}!) written_{number}, " for number in range(num_written))
    returns = "Tensor[]" if num_results is None else f"({', '.join(['Tensor'] * num_results)})"
    schema = f"{name}(int site, bool[] needs, bool traced, {written}{_REST}) -> {returns}"
    _library.define(schema.replace("-> (Tensor)", "-> Tensor"), tags=(torch.Tag.cudagraph_unsafe,))
    op = getattr(torch.ops.breakable_cg, name).default
    _torch.never_run_on_constants(op)

    def packed(made: list[torch.Tensor]) -> Any:
        if num_results is None:
            return made
        return tuple(made) if num_results > 1 else made[0] if made else None

    def run(site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        return packed(sites[site].run(Given(needs, tensors, *rest[num_written + 1 :]), traced))

    def fake(site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        return packed(sites[site].fake(Given(needs, tensors, *rest[num_written + 1 :])))

    def differentiate(keys: Any, site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        if needs or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return _torch.below_autograd(op, keys, site, needs, traced, *rest)
        capture = active.handler.get()
        if (capture is not None or _torch.saves_through_hooks()) and not any(map(_torch.is_traced, tensors)):
            call = Given([], tensors, *rest[num_written + 1 :])
            return packed(list(itertools.starmap(_joined, sites[site].record(call, capture))))
        taping = op if num_results is None else _overload(writing_op(num_written, num_results + 1))
        needs, traced = [tensor.requires_grad for tensor in tensors], any(map(_torch.is_traced, tensors))
        needing = [place for place, need in enumerate(needs) if need]

        def run_below() -> list[torch.Tensor]:
            made = _torch.below_autograd(taping, keys, site, needs, traced, *rest)
            return [made] if isinstance(made, torch.Tensor) else list(made)

        run = run_below
        if traced:  # in the node, since ops of a trace have the number of the node that was made last
            for place in (needing[place] for number, place in _absent.get() if number == site):
                tensors[place] = _torch.leaf_in_place_of(tensors[place])
        else:
            made = run_below()
            saved = _saved(site, made[-1])
            for place in saved.unreached([True] * len(saved.members)):
                tensors[needing[place]] = tensors[needing[place]].detach()
            run = functools.partial(list, made)
        return packed(list(_torch.apply_function(_Node, run, site, needs, *tensors)))

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_fake(f"breakable_cg::{name}", fake, lib=_library)
    torch.fx.has_side_effect(op)  # two equal calls stay two, and a call with an unused result stays
    _calls.add(op)
    return op


def _overload(name: str) -> Any:
    return getattr(torch.ops.breakable_cg, name).default


OP = _define("call", 0, None)
"""The op for calls of marked functions in compiled graphs, unless they write arguments."""


def writing_op(num_written: int, num_results: int) -> str:
    """The name of the op for functions that write and return these numbers of tensors."""
    name = f"call_{num_written}_{num_results}"
    with _defining:
        if not any(op._schema.name == f"breakable_cg::{name}" for op in _calls):
            _define(name, num_written, num_results)
    return name


_defining = locks.lock()


@torch.library.impl(_library, "shapes", "CompositeExplicitAutograd")
def _shapes(site: int, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> None:
    """Does nothing in compiled code. The call reads what the fake of this op found."""


@torch.library.register_fake("breakable_cg::shapes", lib=_library)  # type: ignore[untyped-decorator]
def _shapes_fake(site: int, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> None:
    sites[site].look_for_overlaps(tensors)
    sites[site].learn(Given(needs, tensors, ints, floats))


def forget_shapes(module: fx.GraphModule) -> None:
    """Take those ops out of a graph that was traced: nothing else of it needs them, and their tensors would be copied."""
    for part in graphs_in(module):
        found = part.graph.find_nodes(op="call_function", target=torch.ops.breakable_cg.shapes.default)
        for node in found:
            part.graph.erase_node(node)
        if found:
            part.recompile()


@torch.library.impl(_library, "number", "CompositeExplicitAutograd")
def _number(site: int, numbers: torch.Tensor, position: int) -> int:
    return int(numbers[position].item())


@torch.library.register_fake("breakable_cg::number", lib=_library)  # type: ignore[untyped-decorator]
def _number_fake(site: int, numbers: torch.Tensor, position: int) -> Any:
    return _torch.fresh_int(numbers)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(site: int, handle: torch.Tensor, grads: list[Any], sizes: list[int]) -> list[torch.Tensor]:
    """A gradient for each argument that needs one, and after them which of these autograd gave."""
    saved = _saved(site, handle)
    with _torch.above_autograd():
        made = saved.backward(grads)
    taken = {_torch.storage_key(grad) for grad in grads if grad is not None}
    results = []
    for gradient, leaf in zip(made, saved.leaves, strict=True):
        result = (nothing_like(leaf) if gradient is None else gradient).contiguous()
        if _torch.storage_key(result) in taken or _torch.owners_of_storage(result) > 1:
            # An op may not return memory that something else owns.
            result = result.clone(memory_format=torch.contiguous_format)
        taken.add(_torch.storage_key(result))
        results.append(result)
    came = [gradient is not None for gradient in made]
    return [*results, torch.frombuffer(bytearray(came), dtype=torch.bool)]


@torch.library.register_fake("breakable_cg::backward", lib=_library)  # type: ignore[untyped-decorator]
def _backward_fake(site: int, handle: torch.Tensor, grads: list[Any], sizes: list[Any]) -> list[torch.Tensor]:
    left = iter(sizes)
    shapes = [(tuple(itertools.islice(left, dim)), dtype, device) for dim, dtype, device in sites[site].gradients]
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
    return [*made, torch.empty(len(made), dtype=torch.bool, device="cpu")]


def is_backward(op: Any) -> bool:
    """Whether an op computes the gradients of a call of a marked function."""
    return op is torch.ops.breakable_cg.backward.default


def is_call(op: Any) -> bool:
    """Whether an op runs marked functions."""
    return op in _calls


def runs_function(op: Any) -> bool:
    """Whether an op runs a marked function, or computes the gradients of such a call."""
    return is_call(op) or is_backward(op)


def why_marked(args: Sequence[Any]) -> str:
    """Why the function that a call with these arguments runs is eager."""
    site = sites.get(args[0]) if args else None
    return site.mark.why if site is not None else "marked by eager_on_graph"


def direct(op: Any, site: int) -> Callable[..., Any]:
    """The function behind a call of ``op``, to be called without the dispatcher. It takes all arguments but the site."""
    run = sites[site].fast_run()
    if op is OP:
        return run
    num_written = sites[site].num_written
    num_results = len(op._schema.returns)

    def writing(needs: list[bool], traced: bool, *rest: Any) -> Any:
        made = run(needs, traced, [*rest[:num_written], *rest[num_written]], *rest[num_written + 1 :])
        return tuple(made) if num_results > 1 else made[0] if made else None

    return writing


def site_of(op: Any, args: Sequence[Any]) -> Site | None:
    """The call of a marked function that a node belongs to; None if it belongs to none."""
    name = op._qualified_op_name if isinstance(op, _torch.OpOverloadPacket) else getattr(op, "namespace", "")
    return sites.get(args[0]) if name.startswith("breakable_cg") and args and isinstance(args[0], int) else None


def sites_in(module: fx.GraphModule) -> Iterator[Site]:
    """The calls of marked functions in a graph, and in the graphs in it. One with several nodes comes several times."""
    found = (site_of(node.target, node.args) for part in graphs_in(module) for node in calls_in(part))
    return (site for site in found if site is not None)


def name_of(op: Any, args: Sequence[Any]) -> str:
    """The name of the marked function that a node runs, or whose number or gradients it makes; empty for other ops."""
    site = site_of(op, args)
    if site is None:
        return ""
    return f"backward of {site.mark.name}" if is_backward(op) else site.mark.name


def definition_of(op: Any, args: Sequence[Any]) -> str:
    """The line on which that marked function is defined; empty for other ops."""
    site = site_of(op, args)
    return site.mark.source if site is not None else ""
