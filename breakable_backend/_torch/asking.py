"""Composite ops that ask whether a tensor is a subclass, as they are for plain tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from breakable_backend._torch.symbols import has_hint, hint_of


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
    if left.dim() > 2 and right.dim() == 2 and not out and (batch := _in_eager(left)) is not None:
        shape = [*left.shape[:-1], right.shape[-1]]
        if _is_large_matrix(batch):
            return torch.ops.aten._unsafe_view(torch.mm(left.reshape(-1, left.shape[-1]), right), shape)
        if not _keeps_whole(right):
            many = left.reshape(-1, *left.shape[-2:])
            return torch.ops.aten._unsafe_view(torch.bmm(many, right.expand(many.shape[0], -1, -1)), shape)
    if left.dim() == right.dim() == 3 and left.shape[0] != right.shape[0]:
        if left.shape[0] == 1:
            left = _repeated(left, right)
        elif right.shape[0] == 1:
            right = _repeated(right, left)
    return run_composite(op, left, right, **out)


def run_composite(op: OpOverload, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the C++ code of a composite op, which calls other ops. Function modes do not see this call."""
    key = torch._C._dispatch_key_for_device(first.device.type)  # fakes are on "meta" while a kernel runs with them
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return op.redispatch(keys, first, *args, **kwargs)


@contextmanager
def _outside_of_the_trace() -> Iterator[None]:
    with _disable_current_modes(), torch._C._DisablePythonDispatcher(), torch.inference_mode(False):
        yield


def _in_eager(view: torch.Tensor) -> torch.Tensor | None:
    """A tensor without memory that lies as ``view`` does in eager; None where the fake lies so too.

    The kernel of ``view`` gives a dimension of size 1 the stride that it has in contiguous memory. The fake of ``view``
    gives it another, so that a product after the attention of one token would be a ``bmm`` in the graph, and others
    would be an ``mm``. (torch 2.11 to 2.15)
    """
    node = _node_of(view)
    if node is None or not _has_hints(node):
        return None
    if not all(isinstance(number, int) for number in (*view.shape[1:], *view.stride())):
        return None
    with _outside_of_the_trace():
        made = _made_again(node)
    return None if made.stride() == view.stride() else made


def _made_again(node: fx.Node) -> torch.Tensor:
    """What ``node`` makes, without memory: views are made by their kernels."""

    def again(argument: fx.Node) -> Any:
        value = argument.meta["val"]
        return _made_again(argument) if isinstance(value, torch.Tensor) else hint_of(value)

    if isinstance(node.target, OpOverload) and node.target.is_view and all(map(_has_hints, node.all_input_nodes)):
        made: torch.Tensor = node.target(*fx.node.map_arg(node.args, again), **fx.node.map_arg(node.kwargs, again))
        return made
    value = node.meta["val"]
    shape, strides = map(hint_of, value.shape), map(hint_of, value.stride())
    return torch.empty_strided([*shape], [*strides], dtype=value.dtype, device="meta")


def _has_hints(node: fx.Node) -> bool:
    """Whether ``node`` is a number or a tensor whose size is known at the first call."""
    value = node.meta.get("val")
    numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
    return all(isinstance(number, int | torch.SymInt) and has_hint(number) for number in numbers)


def _is_large_matrix(batch: torch.Tensor) -> bool:
    """Whether eager takes a batch for one matrix: its kernel is asked, since the rule is another one from torch to torch."""
    with _outside_of_the_trace(), torch.enable_grad():
        asked = torch.empty_strided(batch.shape, batch.stride(), device="meta", requires_grad=True)
        product: Any = torch.matmul(asked, torch.empty(batch.shape[-1], 1, device="meta"))
    return bool(product.grad_fn.next_functions[0][0].name() == "MmBackward0")


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
