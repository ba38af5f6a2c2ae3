"""Composite ops that ask whether a tensor is a subclass, as they are for plain tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


@functools.cache
def as_for_plain_tensors() -> dict[OpOverload, Callable[..., Any]]:
    """Kernels for composite ops that call other ops while they are traced than in eager, and so round differently.

    Their C++ code asks whether a tensor is a subclass, and under a mode of Python's dispatcher each tensor counts as
    one. ``linalg_svdvals``, ``linalg_eigvalsh`` and ``linalg_eigvals`` then compute vectors as well, with another
    algorithm of LAPACK.
    ``linalg_cond`` and the nuclear norm call one of them. A ``matmul`` of batches, one of which has one matrix, is then
    one large product, and a batch in eager. (torch 2.11 to 2.15)
    """

    def svdvals(matrix: torch.Tensor, *, driver: str | None = None) -> Any:
        return torch.ops.aten._linalg_svd(matrix, False, _asks_for_gradients(matrix), driver=driver)[1]

    def eigvalsh(matrix: torch.Tensor, UPLO: str = "L") -> Any:
        return torch.ops.aten._linalg_eigh(matrix, UPLO, _asks_for_gradients(matrix))[0]

    def eigvals(matrix: torch.Tensor) -> Any:
        if _asks_for_gradients(matrix):
            return torch.ops.aten.linalg_eig(matrix)[0]
        return torch.ops.aten._linalg_eigvals(matrix)

    aten = torch.ops.aten
    return {
        aten.linalg_svdvals.default: svdvals,
        aten.linalg_eigvalsh.default: eigvalsh,
        aten.linalg_eigvals.default: eigvals,
        aten.matmul.default: functools.partial(_matmul, aten.matmul.default),
        aten.matmul.out: functools.partial(_matmul, aten.matmul.out),
    }


def _matmul(op: OpOverload, left: torch.Tensor, right: torch.Tensor, **out: torch.Tensor) -> Any:
    """``matmul`` by the op that eager calls: ``bmm``, or ``mm`` of one large matrix."""
    if left.dim() > 2 and right.dim() == 2 and not out and _is_large_matrix(left):
        product = torch.mm(left.reshape(-1, left.shape[-1]), right)
        return torch.ops.aten._unsafe_view(product, [*left.shape[:-1], right.shape[-1]])
    if left.dim() == right.dim() == 3 and left.shape[0] != right.shape[0]:
        if left.shape[0] == 1:
            left = _repeated(left, right)
        elif right.shape[0] == 1:
            right = _repeated(right, left)
    return run_composite(op, left, right, **out)


def run_composite(op: OpOverload, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the C++ code of a composite op, which calls other ops. Function modes do not see this call."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, first.device.type.upper()))
    return op.redispatch(keys, first, *args, **kwargs)


def _is_large_matrix(batch: torch.Tensor) -> bool:
    """Whether eager takes ``batch`` for one matrix, though the strides of the fake say no.

    The kernel of ``view`` gives a dimension of size 1 the stride that it has in contiguous memory. The fake of ``view``
    gives it another, so that a product after the attention of one token would be a ``bmm`` in the graph. (torch 2.11 to
    2.15)
    """
    shape, strides = batch.shape, list(batch.stride())
    if not _is_view(batch) or not all(isinstance(number, int) for number in (*shape[1:], *strides)):
        return False
    for at in range(batch.dim() - 2, -1, -1):
        if isinstance(shape[at], int) and shape[at] == 1:
            strides[at] = strides[at + 1] * shape[at + 1]
    return all(strides[at] == strides[at + 1] * shape[at + 1] for at in range(batch.dim() - 2))


def _is_view(tensor: torch.Tensor) -> bool:
    """Whether a ``view`` made ``tensor`` in the traced graph."""
    return (node := _node_of(tensor)) is not None and node.target is torch.ops.aten.view.default


def _repeated(one: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
    """A batch with one matrix, repeated to the length of ``many``, unless eager makes one large matrix too.

    It does if ``one`` needs a gradient, in whatever grad mode, or is a subclass.
    """
    needs_gradient = one.requires_grad and (torch.is_grad_enabled() or not _computed(one))
    if needs_gradient or is_traceable_wrapper_subclass(one):
        return one
    return one.expand(many.shape[0], -1, -1)


def _computed(tensor: torch.Tensor) -> bool:
    """Whether the traced graph computes ``tensor``. With gradients off it needs no gradient, whatever the fake says."""
    return (node := _node_of(tensor)) is not None and node.op not in ("placeholder", "get_attr")


def _node_of(tensor: torch.Tensor) -> fx.Node | None:
    """The node of the traced graph that has ``tensor`` as its value."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def _asks_for_gradients(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad
