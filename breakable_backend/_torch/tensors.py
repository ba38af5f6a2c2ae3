"""Tensors and storages: addresses, layouts, copies, owners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils.dlpack import from_dlpack


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler is tracing the op that takes ``tensor``, so that nothing is computed."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def is_mesh_or_group(value: Any) -> bool:
    """Whether ``value`` is a device mesh or a process group. From torch 2.13 on they are arguments of Dynamo's graphs."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, DeviceMesh | torch.distributed.ProcessGroup)


PYTREE_NODES: Mapping[type, Any] = pytree.SUPPORTED_NODES
"""How classes that are registered with pytree are flattened and unflattened: ``flatten_fn``, ``unflatten_fn``."""


def saves_through_hooks() -> bool:
    """Whether ``saved_tensors_hooks`` are active for values that are saved for a backward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether somebody's hooks see gradients of ``tensor``."""
    return bool(tensor._backward_hooks)


def num_watching(tensor: torch.Tensor) -> int:
    """How many hooks see gradients of ``tensor``; one more if it keeps its gradient though it is no leaf."""
    return len(tensor._backward_hooks or ()) + len(tensor._post_accumulate_grad_hooks or ()) + tensor.retains_grad


def watch_accumulation(leaf: torch.Tensor, hooks: dict[int, Callable[[torch.Tensor], None]]) -> None:
    """Have ``hooks`` called when a gradient of ``leaf``, which has none of these yet, is accumulated. Not if it is asked for."""
    leaf._post_accumulate_grad_hooks = hooks


def owners_of_storage(tensor: torch.Tensor) -> int:
    """How many tensors own the storage of ``tensor``, with views and detached tensors that C++ keeps."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # minus one for the object asked here


def is_sole_owner(tensor: torch.Tensor) -> bool:
    """Whether nobody else owns the memory of ``tensor``. Who owns memory of NumPy, or from DLPack, nobody knows."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) == 2 and storage.resizable()  # the tensor, and the object here


def base_of_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor of which ``tensor`` is a view, for autograd."""
    return tensor._base


def swapped(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """A module with other parameters and buffers, under all names of each, during a ``with`` statement."""
    return _reparametrize_module(module, dict(tensors), tie_weights=True)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage, also for fake tensors; valid while the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def extent(shape: Iterable[Any], stride: Iterable[Any]) -> Any:
    """How many elements lie between the first and the last of such a tensor, both included. A symbolic size is not 0."""
    length = 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is int and size == 0:
            return 0
        length += (size - 1) * step
    return length


def _are_at(tensors: list[Any], pointers: list[int], indices: list[int]) -> bool:
    data_ptr = torch.Tensor.data_ptr
    return [data_ptr(tensors[index]) for index in indices] == [pointers[index] for index in indices]


are_at: Callable[[list[Any], list[int], list[int]], bool] = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", _are_at
)
"""Whether the tensors at ``indices`` of a list begin at the addresses at the same indices of the other list.

One call into C++, where torch is built for CUDA: 0.12 us for each (H100, torch 2.11).
"""


def address_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def unowned_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Another storage over the same memory that does not keep it alive."""
    return storage_at(storage.data_ptr(), storage.nbytes(), storage.device)


def storage_at(address: int, num_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage over memory that it does not own."""
    return cast(torch.UntypedStorage, torch._C._construct_storage_from_data_pointer(address, device, num_bytes))


def twin_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Another storage over the same memory that keeps it alive. So one can tell who holds which of the two."""
    with torch.inference_mode(False), torch.no_grad():
        return storage_of(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))


def storage_of(octets: torch.Tensor) -> torch.UntypedStorage:
    """A storage that begins where ``octets``, a slice of some memory, begins; it keeps that memory alive."""
    with torch.inference_mode(False), torch.no_grad():
        return from_dlpack(torch._C._to_dlpack(octets)).untyped_storage()


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for a batch, or for a derivative, under ``torch.func.vmap`` and similar transforms.

    Gradients of ``torch.autograd.grad(..., is_grads_batched=True)`` are another such kind. Checked on torch 2.11 to
    2.15.
    """
    functorch = torch._C._functorch
    return bool(functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def lazy_bits(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether reading ``tensor`` conjugates, and whether it negates, what is in memory."""
    return tensor.is_conj(), tensor.is_neg()


def with_lazy_bits(tensor: torch.Tensor, bits: tuple[bool, bool]) -> torch.Tensor:
    """A view of ``tensor``, which has neither bit, with ``bits``."""
    conjugated, negated = bits
    tensor = tensor.conj() if conjugated else tensor
    return negated_view(tensor) if negated else tensor


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view with every value negated when it is read."""
    return torch._neg_view(tensor)


def clones_together(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Clones of several dense tensors of float32 or float64 on one device, by one launch.

    The maximum of a number and minus infinity is that number, NaN with its bits and ``-0.0`` included (H200, torch
    2.11). PyTorch has no op that clones a list. Allocating in Python and copying takes a third longer (150 gradients).
    """
    made: Sequence[torch.Tensor] = torch._foreach_clamp_min(tensors, -math.inf)
    return made


copy_together: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_copy_
"""One launch for many copies, bits kept or not: see ``copies.fused_as``."""


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One launch for many copies of one dtype and device."""
    if len(targets) == 1:
        targets[0].copy_(sources[0])  # this keeps all bits of all dtypes
    else:
        copy_together(targets, sources)


def same_generator(a: torch.Generator, b: torch.Generator) -> bool:
    """Whether two objects are the same generator: the dispatcher makes a new Python object each time."""
    return bool(a._cdata == b._cdata)  # type: ignore[attr-defined]


def live_storage(ref: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage behind a weak reference; None once it was freed."""
    return torch.UntypedStorage._new_with_weak_ptr(ref.cdata)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written; a tensor made under inference mode has no count."""
    return 0 if tensor.is_inference() else tensor._version
