"""Modes that only look on: under them each op computes what it computes without a mode.

The C++ code of some ops, and of the gradients of others, asks whether a dispatch mode is active. If one is, it takes each
tensor for a subclass, and chooses other ops, which round differently. Such ops have kernels here, above autograd, for the
dispatch key ``PythonTLSSnapshot``, which PyTorch adds to each call of an op while a mode is active, and only then. Under
other modes than those of this package the kernels do what PyTorch does. Checked on torch 2.11 to 2.15.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from breakable_backend._torch.asking import as_for_plain_tensors, run_composite
from breakable_backend._torch.modes import forward_ad_active, number_of_dispatch_modes
from breakable_backend._torch.tensors import is_transformed

_KEY = "PythonTLSSnapshot"


class ObservingMode(TorchDispatchMode):
    """A dispatch mode under which each op computes what it computes without one."""

    def __enter__(self) -> Any:
        _install()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def with_other_gradient(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op whose gradient autograd computes by another formula under a mode. NotImplemented: as it is."""
        return NotImplemented


@contextmanager
def without_observers() -> Iterator[None]:
    """Leave the modes that only look on, and no others."""
    stack = _get_current_dispatch_mode_stack()
    others = [mode for mode in stack if not isinstance(mode, ObservingMode)]
    _exchange(len(stack), others)
    try:
        yield
    finally:
        _exchange(len(others), stack)


def _exchange(active: int, modes: list[Any]) -> None:
    for _ in range(active):
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


See = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], tuple[Any] | None]


@contextmanager
def composites_seen(ops: Sequence[OpOverload], device_type: str, see: See) -> Iterator[None]:
    """Have ``see(op, args, kwargs)`` called for each of these composite ops, from Python or C++, in the block.

    It is called in every thread, above autograd, which would decompose them. It returns None to have that done, or else
    a tuple with the result. If blocks of several threads are open, each is asked until one has a result. Under inference
    mode ops do not come to autograd: dispatch modes see them whole there. (torch 2.11 to 2.15)
    """
    with ExitStack() as stack:
        for op in dict.fromkeys(ops):
            stack.enter_context(_seen(op, device_type, see))
        yield


@contextmanager
def _seen(op: OpOverload, device_type: str, see: See) -> Iterator[None]:
    key = op, device_type
    with _changing:
        if key not in _kernels:  # one for all blocks: a second would take the place of the first
            library, asked = torch.library.Library(op.namespace, "IMPL"), list[See]()
            library.impl(op.name().partition("::")[2], _seen_by(asked, op), f"Autograd{device_type.upper()}")
            _kernels[key] = library, asked
        library, asked = _kernels[key]
        asked.append(see)
    try:
        yield
    finally:
        with _changing:
            asked.remove(see)
            if not asked:
                del _kernels[key]
                library._destroy()


_changing = threading.Lock()
_kernels: dict[tuple[OpOverload, str], tuple[torch.library.Library, list[See]]] = {}
"""By op and type of device: what keeps the kernel, and whom it asks. Empty unless a block is open."""


def _seen_by(asked: Sequence[See], op: OpOverload) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        for see in tuple(asked):
            if (seen := see(op, args, kwargs)) is not None:
                return seen[0]
        if (plain := plain_kernel(op, args)) is not None:
            return plain(*args, **kwargs)
        return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return kernel


_installing = threading.Lock()
_libraries: list[torch.library.Library] = []
"""Keeps the kernels, once the first mode was entered."""


def _install() -> None:
    if not _libraries:
        with _installing:
            if not _libraries:
                _libraries.append(_library())


def _library() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for op, plain in _plain_kernels().items():
        library.impl(op.name(), _as_without_modes(op, plain), _KEY, with_keyset=True)
    for name, which in _OTHER_GRADIENTS.items():
        packet, _, overload = name.partition(".")
        asked = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if asked is not None:
            library.impl(asked.name(), _with_other_gradient(asked, which), _KEY, with_keyset=True)
    return library


@functools.cache
def _plain_kernels() -> dict[OpOverload, Callable[..., Any]]:
    return {**as_for_plain_tensors(), **_ranks()}


def _ranks() -> dict[OpOverload, Callable[..., Any]]:
    """``linalg.matrix_rank`` with ``out=``, which under a mode returns another tensor and leaves that one as it is."""
    packet = torch.ops.aten.linalg_matrix_rank

    def kernel(op: OpOverload, without_out: OpOverload) -> Callable[..., Any]:
        def into_out(*args: Any, out: torch.Tensor, **kwargs: Any) -> Any:
            if not torch.can_cast(torch.int64, out.dtype):
                return run_composite(op, *args, out=out, **kwargs)  # raises
            rank = without_out(*args, **kwargs)
            return (out if out.shape == rank.shape else out.resize_(rank.shape)).copy_(rank)

        return into_out

    return {
        packet.out: kernel(packet.out, packet.default),
        packet.out_tol_tensor: kernel(packet.out_tol_tensor, packet.tol_tensor),
        packet.atol_rtol_float_out: kernel(packet.atol_rtol_float_out, packet.atol_rtol_float),
        packet.atol_rtol_tensor_out: kernel(packet.atol_rtol_tensor_out, packet.atol_rtol_tensor),
    }


def _as_without_modes(op: OpOverload, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that runs ``plain`` under modes that only look on."""
    otherwise = torch.library.get_kernel(op.name(), _KEY)
    # Autocast comes first where it casts the arguments of this op; it calls the op again.
    casts = [
        getattr(torch._C.DispatchKey, key)
        for key in ("AutocastCPU", "AutocastCUDA")
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)
    ]

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if not any(map(keys.has, casts)) and _only_observed(args) and not _is_seen(op, args):
            return plain(*args, **kwargs)
        return otherwise.call_boxed(keys, *args, **kwargs)

    return kernel


def _is_seen(op: OpOverload, args: Sequence[Any]) -> bool:
    """Whether :func:`composites_seen` has put a kernel below this one."""
    key = f"Autograd{args[0].device.type.upper()}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _with_other_gradient(op: OpOverload, which: Callable[..., bool]) -> Callable[..., Any]:
    """A kernel that asks the mode what to do, if autograd will compute a gradient of which ``which`` is true."""
    otherwise = torch.library.get_kernel(op.name(), _KEY)

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and which(*args, **kwargs) and _only_observed(args):
            for mode in _observers():
                if (result := mode.with_other_gradient(op, args, kwargs)) is not NotImplemented:
                    return result
        return otherwise.call_boxed(keys, *args, **kwargs)

    return kernel


def plain_kernel(op: OpOverload, args: Sequence[Any]) -> Callable[..., Any] | None:
    """What ``op`` computes without a mode; None if its own kernel does that."""
    return _plain_kernels().get(op) if _only_observed(args) else None


def _observers() -> list[ObservingMode]:
    """The active modes that only look on, the innermost first."""
    return [mode for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, ObservingMode)]


def _only_observed(args: Sequence[Any]) -> bool:
    """Whether without our modes the op's own code would find neither a mode nor a subclass."""
    return (
        len(_observers()) == number_of_dispatch_modes()
        and all(_is_plain(value) for value in args if isinstance(value, torch.Tensor))
        and not forward_ad_active()
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and not is_transformed(tensor)


def _of_input(tensor: torch.Tensor, *_: Any, **__: Any) -> bool:
    return tensor.requires_grad


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.device.type == "cpu"


def _of_any(*args: Any, **_: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)


def _of_value(_: torch.Tensor, __: torch.Tensor, value: torch.Tensor) -> bool:
    return value.requires_grad


_OTHER_GRADIENTS: dict[str, Callable[..., bool]] = {
    "prod": _of_input,
    "prod.dim_int": _of_input,
    "cumprod": _of_input,
    "ormqr": _of_any,
    "masked_fill.Tensor": _of_value,
    "max": _on_host,
    "min": _on_host,
    "median": _on_host,
    "nanmedian": _on_host,
}
"""Ops with such a gradient, each with whether it is asked for. :func:`~._torch.autograd.traced_otherwise` says why."""
