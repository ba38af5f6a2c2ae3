"""Ops: their overloads and schemas, kernels in Python, what runs of them while tracing."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from breakable_backend._torch.modes import _HIDDEN_BY_MODES, _included_again
from breakable_backend._torch.tensors import storage_key

Op = OpOverload | HigherOrderOperator
"""What a node of a lowered graph can call, other than plain Python operators."""


def aten(names: str) -> frozenset[str]:
    """A table of ATen ops, as ``aten::name``. Tables hold names, so that a torch without one of the ops has the rest."""
    return frozenset(f"aten::{name}" for name in names.split())


def _aten_overloads() -> Iterator[OpOverload]:
    """The overloads of aten that anybody has asked for so far: only those can have kernels in Python."""
    for packet in list(vars(torch.ops.aten).values()):
        if isinstance(packet, OpOverloadPacket):
            for overload in list(vars(packet).values()):
                if isinstance(overload, OpOverload):
                    yield overload


def is_composite(op: Any) -> bool:
    """Whether an op is made of other ops, into which tracing takes it apart."""
    key = "CompositeImplicitAutograd"
    return _is_dispatched(op) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _is_dispatched(op: Any) -> bool:
    """Whether an op is the dispatcher's. Of some ops TorchScript has overloads of its own."""
    return isinstance(op, OpOverload) and bool(torch._C._dispatch_has_kernel(op.name()))


def is_composite_by_name(name: str) -> bool:
    """Whether all overloads that ``name`` stands for are composite, but for those with ``out=``."""
    ops = [op for op in find_overloads(name) if _is_dispatched(op)]
    ops = [op for op in ops if not any(argument.is_out for argument in op._schema.arguments)]
    return bool(ops) and all(map(is_composite, ops))


_TRACERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.proxy_tensor")


class _Tags(list[torch.Tag]):
    """Tags that say to tracers alone that the op draws: they run no such op on tensors whose values they know.

    Others would take the tag for more than that: AOTAutograd's partitioner saves random states around such an op.
    """

    def __contains__(self, tag: object) -> bool:
        drawn = tag is torch.Tag.nondeterministic_seeded or tag == torch.Tag.nondeterministic_seeded
        if drawn and sys._getframe(1).f_globals.get("__name__") in _TRACERS:
            return True
        return super().__contains__(tag)


def never_run_on_constants(op: OpOverload) -> None:
    """Have nobody run ``op`` for real while tracing, where its tensors are constants of the traced code."""
    op._tags = _Tags(op.tags)


def below_autograd(op: OpOverload, keys: Any, *args: Any) -> Any:
    """Call ``op`` as an autograd kernel does that is done with its part; ``keys`` is what it was given."""
    return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which has no types."""
    return function.apply(*args)


def apply_plainly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """:func:`apply_function` where no transform of ``torch.func`` is under way, and no argument is left over from one.

    ``apply`` asks each argument for that, in Python (1 us for each, H200 host, torch 2.11). Read on torch 2.11 to 2.15.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def overloads(target: Any) -> list[OpOverload]:
    """The overloads behind an op as it stands in a graph: an overload, or a packet of them."""
    if isinstance(target, OpOverload):
        return [target]
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return []


def schema_name(op: Any) -> str:
    """``ns::op`` of an overload, which tables of ops hold; empty for all else."""
    return op._overloadpacket._qualified_op_name if isinstance(op, OpOverload) else ""  # the schema's takes 1 us


def op_names() -> list[str]:
    """The qualified names, with overloads, of all registered ops."""
    return [str(name) for name in torch._C._dispatch_get_all_op_names()]


def find_overloads(name: str) -> list[OpOverload]:
    """The overloads named ``ns::op`` (all of them) or ``ns::op.overload`` (one); empty if there is no such op."""
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None) if namespace and packet_name else None
    if packet is None:
        return []
    if not overload:
        return overloads(packet)
    found = getattr(packet, overload, None) if overload in packet.overloads() else None
    return [found] if found is not None else []


def out_of_place(op: OpOverload) -> OpOverload | None:
    """The view that ``t_``, ``squeeze_`` and so on make in place; None for those that move storages."""
    name = op._schema.name.removeprefix("aten::")
    found = find_overloads(f"aten::{name.removesuffix('_')}") if name.endswith("_") else []
    return next((view for view in found if view.is_view and _arguments(view) == _arguments(op)), None)


def _arguments(op: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


def python_implementation(op: OpOverload, device_type: str) -> Callable[..., Any] | None:
    """The Python function behind a ``torch.library.custom_op`` on ``device_type``.

    Calling it skips the dispatcher, 11 of 27 us a call (H200, torch 2.11). None where there is no such function, or
    where it is not the same thing. Ops made with ``Library.impl`` keep their function inside the dispatcher.
    """
    definition = OPDEFS.get(op._schema.name)
    if definition is None or op is not definition._opoverload:
        return None
    kernels = definition._backend_fns
    kernel = kernels.get(device_type, kernels.get(None))
    if kernel is None or definition._disabled_kernel:
        return None
    function = inspect.getclosurevars(inspect.unwrap(kernel)).nonlocals.get("fn")
    return function if callable(function) else None


def kernel_made_of_ops(
    op: OpOverload, args: Sequence[Any], device_type: str, autocast: Sequence[str] = (), *, watching: bool = False
) -> Callable[..., Any] | None:
    """The kernel of ``op``, if all that it does is to call other ops: a composite, or Python registered by a library.

    Called so, and not through ``op``, it runs under the dispatch modes that are active, and they see those ops.
    Composites are taken apart above the modes, except under inference mode. Python for a GPU is not trusted to call ops
    only: what it launches by itself, as with Triton, no mode would see. ``autocast``: device types that Python for an op
    sees an autocast of; a mode runs with none. ``watching``: the caller runs the kernel whatever it launches.
    """
    name, key = op.name(), device_type.upper()
    kinds = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    kind = next((kind for kind in kinds if torch._C._dispatch_has_kernel_for_dispatch_key(name, kind)), None)
    registered = f"{op.namespace}/{name.partition('::')[2]}/{kind}" in torch.library._impls
    in_python = registered and op.namespace != "aten" and (device_type == "cpu" or watching)
    if kind != "CompositeImplicitAutograd" and not in_python:
        return None
    # A redispatch takes no number for a tensor, as a call does. Such a call has a number for its result: a constant.
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(argument.type, torch.TensorType) and isinstance(value, bool | int | float | complex):
            return None
    casts = [f"Autocast{kind.upper()}" for kind in autocast if in_python]
    return functools.partial(_run_kernel, op, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), casts)


def _run_kernel(op: OpOverload, keys: Any, casts: Sequence[str], /, *args: Any, **kwargs: Any) -> Any:
    # The dispatcher excludes ADInplaceOrView around a mode, as eager does not around a kernel: without it a view of a
    # parameter requires no grad, and matmul takes another path.
    # narrow and chunk, which have a kernel of their own there, have run it above the mode, and it refuses a view twice.
    is_view = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "ADInplaceOrView")
    with _included_again(*(key for key in _HIDDEN_BY_MODES if not is_view or key != "ADInplaceOrView"), *casts):
        return op.redispatch(keys, *args, **kwargs)


def written_by_kernel(kernel: Any, constants: Any, named: Mapping[str, Any], descriptors: Any) -> list[str]:
    """The names, among ``named``, of the tensors that a user's Triton kernel writes; all of them where nobody can tell.

    ``kernel`` and ``constants`` are numbers in torch's table of kernels, as they stand in a graph. What autotuning sets to
    zero is written too. Looked at on torch 2.11, 2.13, 2.14.1 and 2.15.
    """
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

    tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    tuner = kernel_side_table.get_kernel(kernel)
    found = {
        *get_mutated_tensors(kernel, constants, dict(named), descriptors),
        *(getattr(tuner, "reset_to_zero", None) or ()),
    }
    return [name for name in tensors if name in found]


def is_effectful(op: Any) -> bool:
    """Whether an op was registered with an effect (``register_effect``), which is ordered among others and is kept.

    Checked on torch 2.11, 2.13, 2.14.1 and 2.15.
    """
    from torch._higher_order_ops.effects import has_effects

    return isinstance(op, OpOverload) and bool(has_effects(op))


def wait_tensor() -> OpOverload:
    """The op that waits for what a collective makes."""
    (op,) = find_overloads("_c10d_functional::wait_tensor")
    return op


def results_like(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of ``op`` would return, without the call: its arguments where it returns those, else empty tensors."""
    mode = FakeTensorMode()
    given: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        made = mode.from_tensor(tensor)
        given[storage_key(made)] = tensor
        return made

    def real(made: torch.Tensor) -> torch.Tensor:
        if storage_key(made) in given:
            return given[storage_key(made)]
        return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)

    fakes = pytree.tree_map_only(torch.Tensor, fake, (tuple(args), dict(kwargs)))
    with mode:
        results = op(*fakes[0], **fakes[1])
    return pytree.tree_map_only(torch.Tensor, real, results)


def is_region(op: Any) -> bool:
    """Whether a higher-order op is a call of a region that is compiled once: ``invoke_subgraph``."""
    return isinstance(op, HigherOrderOperator) and op.name() == "invoke_subgraph"


def dense_kernel(op: HigherOrderOperator) -> Callable[..., Any]:
    """The Python function that runs a higher-order op on plain tensors."""
    return op.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
