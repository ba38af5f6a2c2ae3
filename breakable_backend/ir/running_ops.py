"""Ops as they run: each is observed under a dispatch mode, with what it did to memory, and how to undo it.

:mod:`breakable_backend.ir.effects` answers the same questions for the nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from breakable_backend import _torch, active
from breakable_backend._torch import pytree
from breakable_backend.ir.effects import is_asynchronous, written_values
from breakable_backend.ir.layout import Geometry

Issue = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""Runs an op with its arguments, and returns its result."""


class OpMode(_torch.ObservingMode):
    """A dispatch mode that passes each op to ``issue``, below autograd and in program order."""

    supports_higher_order_operators = True

    def __init__(self, issue: Issue) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.issue = issue

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo run compiled code under this mode. Under other modes it runs the uncompiled code (torch 2.13)."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a tensor subclass unwraps itself, and its inner ops come back here
        return self.issue(func, args, kwargs or {})


def kernel_of_ops(op: Any, args: Sequence[Any], device: torch.device, *, watching: bool = False) -> Any:
    """A function that calls the ops of which ``op`` is made; None if its kernel is not Python code made of ops.

    Args:
        op: an op, or a higher-order op.
        args: its positional arguments.
        device: where its tensors are.
        watching: whether to take the kernel even if it may launch by itself.
    """
    if isinstance(op, _torch.OpOverload):
        return _torch.kernel_made_of_ops(op, args, device.type, active.autocast.get(), watching=watching)
    return (lambda body, _, *operands: body(*operands)) if _torch.is_region(op) else None


def generators_of(device: torch.device) -> list[torch.Generator]:
    """What ops on ``device``, or on the host, draw from by default; that of ``device`` comes last."""
    others = [torch.cuda.default_generators[device.index]] if device.type == "cuda" else []
    return [torch.default_generator, *others]


class RandomStates(list[tuple[torch.Generator, torch.Tensor]]):
    """Random generators, each with its state when this was made."""

    @classmethod
    def of(cls, generators: Iterable[torch.Generator]) -> RandomStates:
        return cls((generator, generator.get_state()) for generator in generators)

    def are_current(self) -> bool:
        """Whether nobody has drawn from them since, or set their states."""
        return all(torch.equal(generator.get_state(), state) for generator, state in self)

    def restore(self) -> None:
        """Set the generators to these states."""
        for generator, state in self:
            generator.set_state(state)


def has_memory(leaf: Any) -> bool:
    """Whether ``leaf`` is a tensor with strides, and so has a storage. Some zeros of autograd's have one without memory."""
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf._is_zerotensor()


def no_strided_memory(tensor: torch.Tensor) -> str:
    """What a tensor is whose elements cannot be read by address and strides; empty if they can."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.layout is not torch.strided:
        return "a sparse tensor" if "sparse" in str(tensor.layout) else f"a tensor of the layout {tensor.layout}"
    return "" if has_memory(tensor) else "a tensor of zeros for which autograd has no memory"


def memory_on(device: torch.device, tree: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an op that have memory on ``device``."""
    return [leaf for leaf in pytree.tree_leaves(tree) if has_memory(leaf) and leaf.device == device]


@dataclass(frozen=True)
class Ran:
    """What an op that has just run did to the memory of one device."""

    written: tuple[torch.Tensor, ...]
    made: Mapping[int, int]
    """New storages, by their keys, each with the position of a leaf of the result that lies in it."""
    is_view: bool
    """Whether it launched nothing and only returned views of its arguments."""

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
        """Find this out by the storages of arguments and results. Storages with ``known`` keys are not new."""
        written = memory_on(device, written_values(op, args, kwargs))
        taken = {_torch.storage_key(tensor) for tensor in memory_on(device, (args, kwargs))}
        made: dict[int, int] = {}
        returned = False
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if has_memory(leaf) and leaf.device == device:
                returned, key = True, _torch.storage_key(leaf)
                if key not in taken and key not in known:
                    made.setdefault(key, position)
        # An op without tensors in its result, such as an assertion, runs for its effect.
        only_aliases = returned and not made and not written and not is_asynchronous(op)
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
    """Whether a result in the memory of an argument is a view of it for autograd too, so that traced code can make it again."""
    ends = [argument.grad_fn for argument in arguments]
    step = tensor.grad_fn
    while step is not None and step.name() in _VIEW_NODES and not any(step is end for end in ends):
        step = step.next_functions[0][0]
    leaf = step is None or step.name() == "torch::autograd::AccumulateGrad"
    return leaf or any(step is end for end in ends)


@dataclass
class Saved:
    """The content of a storage before it was written."""

    storage: torch.UntypedStorage
    address: int
    before: torch.UntypedStorage
    geometry: Geometry
    """The geometry of the tensor that was about to be written."""
    writer: Any = None
    """The first that wrote the storage, as passed to :meth:`Undo.wrote`."""

    @property
    def has_moved(self) -> bool:
        return self.storage.data_ptr() != self.address or self.storage.nbytes() != self.before.nbytes()


class Undo:
    """Contents of storages before they were written, to undo the writes."""

    def __init__(self) -> None:
        self.saved: dict[int, Saved] = {}
        """By storage key. A key is not used again while its storage is held here."""

    def save(self, tensor: torch.Tensor) -> None:
        """Call this before the storage of ``tensor`` is written."""
        key = _torch.storage_key(tensor)
        if key not in self.saved:
            storage = tensor.untyped_storage()
            self.saved[key] = Saved(storage, storage.data_ptr(), storage.clone(), Geometry.of(tensor))

    def wrote(self, tensor: torch.Tensor, writer: Any) -> None:
        """Note that ``writer`` wrote the storage of ``tensor``, if that was saved."""
        saved = self.saved.get(_torch.storage_key(tensor))
        if saved is not None and saved.writer is None:
            saved.writer = writer

    def memories(self) -> list[Saved]:
        """One entry for each memory that was written, since several storages may lie over the same memory."""
        return [saved for saved in {s.address: s for s in reversed(self.saved.values())}.values() if saved.address]

    def any_moved(self) -> bool:
        """Whether a storage has other memory now than when it was saved."""
        return any(saved.has_moved for saved in self.saved.values())

    def restore(self) -> None:
        """Undo all writes, the latest first, since two storages may lie over the same memory."""
        for saved in reversed(self.saved.values()):
            if saved.storage.nbytes() != saved.before.nbytes():
                saved.storage.resize_(saved.before.nbytes())
            saved.storage.copy_(saved.before)
