"""Ops: overloads, schemas, kernels in Python, and which ops run while tracing."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from breakable_backend._torch.modes import _HIDDEN_BY_MODES, _included_again
from breakable_backend._torch.observing import plain_kernel
from breakable_backend._torch.tensors import storage_key

Op = OpOverload | HigherOrderOperator
"""What a node of a lowered graph can call, besides plain Python operators."""


def aten(names: str) -> frozenset[str]:
    """A table of ATen ops, as ``aten::name``: names only, so that a torch that lacks one op can use the others."""
    return frozenset(f"aten::{name}" for name in names.split())


def _aten_overloads() -> tuple[OpOverload, ...]:
    """The overloads of aten that were asked for so far. Only those can have kernels in Python."""
    return _listed(sum(len(vars(packet)) for packet in _aten_packets()))


def _aten_packets() -> list[OpOverloadPacket]:
    return [packet for packet in list(vars(torch.ops.aten).values()) if isinstance(packet, OpOverloadPacket)]


@functools.lru_cache(maxsize=1)
def _listed(count: int) -> tuple[OpOverload, ...]:
    """The overloads, listed again when a packet holds more than before: ``count`` attributes in all."""
    found = (value for packet in _aten_packets() for value in list(vars(packet).values()))
    return tuple(value for value in found if isinstance(value, OpOverload))


def is_composite(op: Any) -> bool:
    """Whether an op is made of other ops, into which tracing decomposes it."""
    key = "CompositeImplicitAutograd"
    return _is_dispatched(op) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _is_dispatched(op: Any) -> bool:
    """Whether an op belongs to the dispatcher. Some ops have overloads of TorchScript's."""
    return isinstance(op, OpOverload) and bool(torch._C._dispatch_has_kernel(op.name()))


_TRACERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.proxy_tensor")


class _Tags(list[torch.Tag]):
    """Tags that tell only tracers that the op draws, so that they do not run it on tensors whose values they know.

    Other readers would draw further conclusions: AOTAutograd's partitioner saves random states around such an op.
    """

    def __contains__(self, tag: object) -> bool:
        drawn = tag is torch.Tag.nondeterministic_seeded or tag == torch.Tag.nondeterministic_seeded
        if drawn and sys._getframe(1).f_globals.get("__name__") in _TRACERS:
            return True
        return super().__contains__(tag)


def never_run_on_constants(op: OpOverload) -> None:
    """Have nobody run ``op`` for real while tracing, if its tensors are constants of the traced code."""
    op._tags = _Tags(op.tags)


def below_autograd(op: OpOverload, keys: Any, *args: Any) -> Any:
    """Call ``op`` as an autograd kernel does after its own work; ``keys`` are the dispatch keys that it got."""
    return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def overloads(target: Any) -> list[OpOverload]:
    """The overloads of an op as it stands in a graph: an overload, or a packet of them."""
    if isinstance(target, OpOverload):
        return [target]
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return []


def schema_name(op: Any) -> str:
    """``ns::op`` of an overload, as tables of ops have it; empty for anything else."""
    # The schema's own name takes 1 us.
    return op._overloadpacket._qualified_op_name if isinstance(op, OpOverload) else ""


_QUANTISERS = aten("quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel")


def makes_quantised(target: Any) -> bool:
    """Whether an op, or a function of torch's that stands in Dynamo's graph for one, makes quantised tensors."""
    if isinstance(target, BuiltinFunctionType):
        name = target.__name__
        return f"aten::{name}" in _QUANTISERS and getattr(torch, name, None) is target
    return any(schema_name(op) in _QUANTISERS for op in overloads(target))


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
    """The view op for ``t_``, ``squeeze_`` and so on; None for ops that move storages."""
    name = op._schema.name.removeprefix("aten::")
    found = find_overloads(f"aten::{name.removesuffix('_')}") if name.endswith("_") else []
    return next((view for view in found if view.is_view and _arguments(view) == _arguments(op)), None)


def _arguments(op: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


def python_implementation(op: OpOverload, device_type: str) -> Callable[..., Any] | None:
    """The Python function behind a ``torch.library.custom_op`` on ``device_type``.

    Calling it skips the dispatcher, 11 of 27 us a call (H200, torch 2.11). None if there is no such function, or if it
    does not do the same. For ops made with ``Library.impl`` the function is inside the dispatcher.
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
    op: OpOverload, args: Sequence[Any], device_type: str, autocast: Sequence[str], *, watching: bool
) -> Callable[..., Any] | None:
    """The kernel of ``op``, if it only calls other ops: a composite, or Python registered by a library.

    Called directly, and not through ``op``, it runs under the active dispatch modes, and they see those ops. Composites
    are decomposed above the modes, except under inference mode. Python for a GPU is not trusted to call ops only: no
    mode would see what it launches by itself, as with Triton. ``autocast``: device types with an autocast that the
    Python of an op sees; a mode runs with none. ``watching``: the caller runs the kernel even if it launches.
    """
    name, key = op.name(), device_type.upper()
    kinds = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    kind = next((kind for kind in kinds if torch._C._dispatch_has_kernel_for_dispatch_key(name, kind)), None)
    registered = f"{op.namespace}/{name.partition('::')[2]}/{kind}" in torch.library._impls
    in_python = registered and op.namespace != "aten" and (device_type == "cpu" or watching)
    if kind != "CompositeImplicitAutograd" and not in_python:
        return None
    # A redispatch does not take a number for a tensor, as a call does. Such a call has a number as its result: a
    # constant.
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(argument.type, torch.TensorType) and isinstance(value, bool | int | float | complex):
            return None
    casts = [f"Autocast{kind.upper()}" for kind in autocast if in_python]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(_run_kernel, op, plain_kernel(op, args) or functools.partial(op.redispatch, keys), casts)


def _run_kernel(op: OpOverload, kernel: Callable[..., Any], casts: Sequence[str], /, *args: Any, **kwargs: Any) -> Any:
    # Around a mode the dispatcher excludes ADInplaceOrView, which eager does not do around a kernel. Without it a view
    # of a parameter requires no grad, and matmul takes another path.
    is_view = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "ADInplaceOrView")
    with _included_again(*(key for key in _HIDDEN_BY_MODES if not is_view or key != "ADInplaceOrView"), *casts):
        return kernel(*args, **kwargs)


def written_by_kernel(kernel: Any, constants: Any, named: Mapping[str, Any], descriptors: Any) -> list[str]:
    """The names, among ``named``, of the tensors that a user's Triton kernel writes; all of them if that is not known.

    ``kernel`` and ``constants`` are numbers in torch's table of kernels, as they stand in a graph. What autotuning sets
    to zero is written too. Read in torch 2.11, 2.13, 2.14.1 and 2.15.
    """
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

    tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    tuner = kernel_side_table.get_kernel(kernel)
    found = {*get_mutated_tensors(kernel, constants, dict(named), descriptors)}
    return [name for name in tensors if name in found or name in (getattr(tuner, "reset_to_zero", None) or ())]


def is_effectful(op: Any) -> bool:
    """Whether an op was registered with an effect (``register_effect``), so that it is ordered and never removed.

    Checked on torch 2.11, 2.13, 2.14.1 and 2.15.
    """
    from torch._higher_order_ops.effects import has_effects

    return isinstance(op, OpOverload) and bool(has_effects(op))


def wait_tensor() -> OpOverload:
    """The op that waits for the result of a collective."""
    (op,) = find_overloads("_c10d_functional::wait_tensor")
    return op


def results_like(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The results of a call of ``op`` without making it: its arguments if it returns those, otherwise empty tensors."""
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
    """Whether a higher-order op calls a region that is compiled once: ``invoke_subgraph``."""
    return isinstance(op, HigherOrderOperator) and op.name() == "invoke_subgraph"


def dense_kernel(op: HigherOrderOperator) -> Callable[..., Any]:
    """The Python function that runs a higher-order op on plain tensors."""
    return op.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]
