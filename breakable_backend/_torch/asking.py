"""Composite ops that ask whether a tensor is a subclass, as they are for plain tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass


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
    if left.dim() > 2 and right.dim() == 2 and not out and (strides := _strides_in_eager(left)) is not None:
        shape = [*left.shape[:-1], right.shape[-1]]
        if _is_large_matrix(left.shape, strides):
            return torch.ops.aten._unsafe_view(torch.mm(left.reshape(-1, left.shape[-1]), right), shape)
        if not _keeps_whole(right):
            batch = left.reshape(-1, *left.shape[-2:])
            return torch.ops.aten._unsafe_view(torch.bmm(batch, right.expand(batch.shape[0], -1, -1)), shape)
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


def _strides_in_eager(batch: torch.Tensor) -> list[int] | None:
    """The strides that a view has in eager, where those of the fake may differ; None elsewhere.

    The kernel of ``view`` gives a dimension of size 1 the stride that it has in contiguous memory. The fake of ``view``
    gives it another, so that a product after the attention of one token would be a ``bmm`` in the graph, and others
    would be an ``mm``. (torch 2.11 to 2.15)
    """
    shape, strides = batch.shape, list(batch.stride())
    if not _is_view(batch) or not all(isinstance(number, int) for number in (*shape[1:], *strides)):
        return None
    for at in range(batch.dim() - 2, -1, -1):
        if isinstance(shape[at], int) and shape[at] == 1:
            strides[at] = strides[at + 1] * shape[at + 1]
    return strides


def _is_large_matrix(shape: Sequence[Any], strides: Sequence[int]) -> bool:
    """Whether eager takes a batch for one matrix: its kernel is asked, since the rule is another one from torch to torch."""
    rows = [number if isinstance(number, int) else 2 for number in shape]
    with (
        _disable_current_modes(),
        torch._C._DisablePythonDispatcher(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        batch = torch.empty_strided(rows, strides, device="meta", requires_grad=True)
        product: Any = torch.matmul(batch, torch.empty(rows[-1], 1, device="meta"))
    return bool(product.grad_fn.next_functions[0][0].name() == "MmBackward0")


def _is_view(tensor: torch.Tensor) -> bool:
    """Whether a ``view`` made ``tensor`` in the traced graph."""
    return (node := _node_of(tensor)) is not None and node.target is torch.ops.aten.view.default


def _repeated(one: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
    """A batch with one matrix, repeated to the length of ``many``, unless eager makes one large matrix too.

    It does if ``one`` needs a gradient, in whatever grad mode, or is a subclass.
    """
    return one if _keeps_whole(one) else one.expand(many.shape[0], -1, -1)


def _keeps_whole(matrix: torch.Tensor) -> bool:
    """Whether eager repeats ``matrix`` for no batch."""
    needs_gradient = matrix.requires_grad and (torch.is_grad_enabled() or not _computed(matrix))
    return needs_gradient or is_traceable_wrapper_subclass(matrix)


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
