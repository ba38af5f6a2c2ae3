"""What each call of a marked function saves for its backward."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.errors import ReplayError
from breakable_backend.ir.layout import Strided

Member = tuple[torch.Tensor, Strided | None]
"""A tensor in a function's result, and where its gradient lies in that of the root; None if it is the root's
gradient."""


def part_of(grad: torch.Tensor, where: Strided | None) -> torch.Tensor:
    """The gradient of a member, given that of the root."""
    if where is None:
        return grad
    flat = grad.contiguous()
    return flat.as_strided(*where[:2], flat.storage_offset() + where[2])


class SavedForBackward(bytearray):
    """What one call of a marked function keeps until its backward.

    It is the memory of a tensor, the *handle*. Compiled code saves the handle for the backward as it saves any tensor.
    So each call has its own object, which lives as long as the saved handle, and a call that is never run backward
    leaves nothing behind.
    """

    leaves: list[torch.Tensor]
    members: list[list[Member]]

    @classmethod
    def handle(cls, leaves: list[torch.Tensor], members: list[list[Member]]) -> torch.Tensor:
        """Make the handle, which is the only owner of this object."""
        number = next(_numbers)
        saved = cls(number.to_bytes(8, "little"))
        saved.leaves, saved.members = leaves, members
        _all_saved[number] = saved
        return torch.frombuffer(saved, dtype=torch.int64)

    def backward(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of the leaves; None for a leaf on which nothing depends."""
        outputs, given = [], []
        for members, grad in zip(self.members, grads, strict=True):
            for tensor, where in members if grad is not None else ():
                assert grad is not None
                outputs.append(tensor)
                given.append(part_of(grad, where))
        if not outputs:
            return [None] * len(self.leaves)
        # A parameter may come twice, through its module and by itself. It gets its gradient once.
        firsts = {id(leaf): place for place, leaf in reversed(list(enumerate(self.leaves)))}
        leaves = [self.leaves[place] for place in firsts.values()]
        # Nothing tells whether the caller retains its graph. This object dies with the handle.
        found = _torch.gradients(outputs, leaves, given, retain_graph=True, allow_unused=True)
        gradients: list[torch.Tensor | None] = [None] * len(self.leaves)
        for place, gradient in zip(firsts.values(), found, strict=True):
            gradients[place] = gradient
        return gradients

    def unreached(self, given: Sequence[bool]) -> set[int]:
        """The leaves without a way to them from the results that are ``given`` gradients. In eager no edge leads to them."""
        groups = (members for members, is_given in zip(self.members, given, strict=True) if is_given)
        behind = {id(leaf) for leaf in _torch.leaves_behind(tensor.grad_fn for group in groups for tensor, _ in group)}
        return {place for place, leaf in enumerate(self.leaves) if id(leaf) not in behind}


def no_second_derivative(name: str, why: str, where: str, fix: str) -> ReplayError:
    """The error for a second derivative through a call of the marked function ``name``."""
    return ReplayError(
        f"a second derivative (create_graph=True) passed through {name}, {why}",
        where=where,
        fix=f"{fix}, or leave the function unmarked",
    )


def nothing_like(leaf: torch.Tensor) -> torch.Tensor:
    """What stands for a gradient that ``leaf`` does not get: adding ``-0.0`` changes no bit."""
    return torch.full_like(leaf, -0.0)


_numbers = itertools.count(1)
_all_saved: weakref.WeakValueDictionary[int, SavedForBackward] = weakref.WeakValueDictionary()


def saved_behind(handle: torch.Tensor) -> SavedForBackward | None:
    """The object behind a handle, or behind a copy while the handle lives; None if only copies are left."""
    return _all_saved.get(int(handle.item()))


def reaches_others(members: Sequence[Sequence[Member]], ends: Sequence[Any]) -> bool:
    """Whether results need gradients of tensors other than the ends, which are leaves and nodes of autograd's graph."""
    known = {id(end) for end in ends if isinstance(end, torch.Tensor)}
    nodes = (end for end in ends if not isinstance(end, torch.Tensor))
    behind = _torch.leaves_behind((tensor.grad_fn for group in members for tensor, _ in group), nodes)
    return any(id(leaf) not in known for leaf in behind)
