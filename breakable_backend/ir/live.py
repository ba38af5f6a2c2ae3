"""Ops that run now: seen one by one under a dispatch mode, what each did to memory, and how to undo it.

:mod:`breakable_backend.ir.effects` answers the same of the nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.ir.effects import is_asynchronous, written_values
from breakable_backend.ir.layout import Geometry

Issue = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes an op and its arguments, and returns what the op returns."""


class OpMode(_torch.TorchDispatchMode):
    """Hands each op to ``issue``, below autograd and in program order."""

    supports_higher_order_operators = True

    def __init__(self, issue: Issue) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.issue = issue

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have Dynamo run compiled functions as such, and not uncompiled, as it does under other modes (torch 2.13)."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a tensor subclass unwraps itself, and its inner ops come back here
        return self.issue(func, args, kwargs or {})


def kernel_of_ops(op: Any, args: Sequence[Any], device: torch.device, *, watching: bool = False) -> Any:
    """What calls the ops that ``op`` is made of, in place of ``op``; None where its kernel is not Python that does.

    Args:
        op: an op, or a higher-order op.
        args: its positional arguments.
        device: where its tensors are.
        watching: whether the kernel is run whatever it launches.
    """
    if isinstance(op, _torch.OpOverload):
        return _torch.kernel_made_of_ops(op, args, device.type, active.autocast.get(), watching=watching)
    return (lambda body, _, *operands: body(*operands)) if _torch.is_region(op) else None


def generators_of(device: torch.device) -> list[torch.Generator]:
    """What ops on ``device``, or on the host, draw from by default; that of ``device`` comes last."""
    others = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *others]


def has_memory(leaf: Any) -> bool:
    """Whether ``leaf`` is a tensor in a storage of its own or another's: a strided one."""
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


def memory_on(device: torch.device, tree: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an op that have memory on ``device``."""
    return [leaf for leaf in pytree.tree_leaves(tree) if has_memory(leaf) and leaf.device == device]


@dataclass(frozen=True)
class Ran:
    """What an op that has just run did to the memory of one device."""

    written: tuple[torch.Tensor, ...]
    made: Mapping[int, int]
    """New storages by their keys, with the position of a leaf of the result that lies in each."""
    is_view: bool
    """Whether it launched nothing: it returned other views of its arguments."""

    @classmethod
    def of(
        cls,
        op: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        device: torch.device,
        known: Container[int],
    ) -> Ran:
        """Told by the storages of its arguments and results. Those with ``known`` keys are not new."""
        written = memory_on(device, written_values(op, args, kwargs))
        taken = {_torch.storage_key(tensor) for tensor in memory_on(device, (args, kwargs))}
        outputs = [
            (_torch.storage_key(leaf), position)
            for position, leaf in enumerate(pytree.tree_leaves(result))
            if has_memory(leaf) and leaf.device == device
        ]
        made: dict[int, int] = {}
        for key, position in outputs:
            if key not in taken and key not in known:
                made.setdefault(key, position)
        # An op without tensors for a result, such as an assertion, is there for its effect.
        only_aliases = bool(outputs) and not made and not written and not is_asynchronous(op)
        return cls(tuple(written), made, only_aliases or torch.Tag.inplace_view in getattr(op, "tags", ()))


_VIEW_NODES = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Alias AsStrided Diagonal Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose "
        "Unbind Unfold Unsafe Unsqueeze View ViewAsReal ViewAsComplex"
    ).split()
    for number in (0, 1, 2)
)


def is_view_to_autograd(tensor: torch.Tensor, arguments: Sequence[torch.Tensor]) -> bool:
    """Whether, for autograd too, a tensor in the memory of an argument is a view of it: traced code can make it again."""
    ends = [argument.grad_fn for argument in arguments]
    step = tensor.grad_fn
    while step is not None and step.name() in _VIEW_NODES and not any(step is end for end in ends):
        step = step.next_functions[0][0]
    leaf = step is None or step.name() == "torch::autograd::AccumulateGrad"
    return leaf or any(step is end for end in ends)


@dataclass
class Saved:
    """A storage as it was before it was written."""

    storage: torch.UntypedStorage
    address: int
    before: torch.UntypedStorage
    geometry: Geometry
    """Of the tensor that was about to be written."""
    writer: Any = None
    """Who was first to write it, as :meth:`Undo.wrote` was told."""


class Undo:
    """Storages as they were before they were written."""

    def __init__(self) -> None:
        self.saved: dict[int, Saved] = {}
        """By key, which is not used again while the storage is held here."""

    def save(self, tensor: torch.Tensor) -> None:
        """The storage of ``tensor`` is about to be written."""
        key = _torch.storage_key(tensor)
        if key not in self.saved:
            storage = tensor.untyped_storage()
            self.saved[key] = Saved(storage, storage.data_ptr(), storage.clone(), Geometry.of(tensor))

    def wrote(self, tensor: torch.Tensor, writer: Any) -> None:
        """``writer`` wrote the storage of ``tensor``, if that was saved."""
        saved = self.saved.get(_torch.storage_key(tensor))
        if saved is not None and saved.writer is None:
            saved.writer = writer

    def memories(self) -> list[Saved]:
        """One of each memory that was written: several storages may lie over one."""
        return [saved for saved in {s.address: s for s in reversed(self.saved.values())}.values() if saved.address]

    def any_moved(self) -> bool:
        """Whether a storage has other memory now than when it was saved."""
        return any(
            saved.storage.data_ptr() != saved.address or saved.storage.nbytes() != saved.before.nbytes()
            for saved in self.saved.values()
        )

    def restore(self) -> None:
        """Put everything back. Latest first: two storages may lie over the same memory."""
        for saved in reversed(self.saved.values()):
            if saved.storage.nbytes() != saved.before.nbytes():
                saved.storage.resize_(saved.before.nbytes())
            saved.storage.copy_(saved.before)
