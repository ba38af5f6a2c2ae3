"""The modes of a thread: grad, inference, autocast, dispatch modes, function modes, forward AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._guards import TracingContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode_temporarily

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast

EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast

SET_GRAD_ENABLED = torch._C._set_grad_enabled

ENTER_INFERENCE_MODE = torch.autograd.grad_mode._enter_inference_mode


def function_modes() -> list[Any]:
    """The active function modes; ``torch.set_default_device`` makes one."""
    return [torch._C._get_function_stack_at(number) for number in range(torch._C._len_torch_function_stack())]


number_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack

number_of_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
"""Whether a profiler, or ``emit_nvtx``, is active in this thread."""


def above_autograd() -> AbstractContextManager[None]:
    """Have ops run as from the user's code, even in the kernel of an op that autograd or a dispatch mode called."""
    return _included_again("AutogradFunctionality", *_HIDDEN_BY_MODES)


_HIDDEN_BY_MODES = ("ADInplaceOrView", "Conjugate", "Negative", "ZeroTensor")
"""What the dispatcher leaves out around a mode: views are not known as views there, and a lazy ``conj()`` is read
without it."""


def _included_again(*keys: str) -> AbstractContextManager[None]:
    """One guard for all keys. A guard takes a microsecond, and marked functions under autograd have several keys."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for key in keys:
        left_out = left_out.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out)


set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Without the context manager that ``torch.set_grad_enabled`` makes."""


class GradMode:
    """``torch.set_grad_enabled(...)`` in a ``with`` statement, without the code that makes it a decorator."""

    __slots__ = ("before", "enabled")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self.enabled)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self.before)


class Autocast:
    """``torch.autocast`` of a device type, without the checks of its arguments, which a former autocast has passed.

    It does what ``torch.autocast`` does on torch 2.11 to 2.15. A new ``torch.autocast`` takes 25 us on a slow host.

    Args:
        device: the device type.
        dtype: the dtype that it casts to; None: autocast is switched off.
        cached: whether casts are cached; None: as before.
    """

    __slots__ = ("before", "cached", "device", "dtype")

    def __init__(self, device: str, dtype: torch.dtype | None, cached: bool | None) -> None:
        self.device, self.dtype, self.cached = device, dtype, cached

    def __enter__(self) -> None:
        device, cached = self.device, torch.is_autocast_cache_enabled()
        self.before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), cached
        torch.set_autocast_enabled(device, self.dtype is not None)
        if self.dtype is not None:
            torch.set_autocast_dtype(device, self.dtype)
        torch.autocast_increment_nesting()
        torch.set_autocast_cache_enabled(cached if self.cached is None else self.cached)

    def __exit__(self, *error: object) -> None:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        enabled, dtype, cached = self.before
        torch.set_autocast_enabled(self.device, enabled)
        torch.set_autocast_dtype(self.device, dtype)
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def without_alias_check() -> Iterator[None]:
    """Leave the dispatch mode under which AOT makes its first call, to check custom ops for undeclared aliases.

    Under a dispatch mode an op does not see the caller's autocast, so that call would differ from eager.
    """
    from torch._functorch._aot_autograd.runtime_wrappers import _AnalyzeCustomOpInputOutputMode

    stack = _get_current_dispatch_mode_stack()
    if stack and isinstance(stack[-1], _AnalyzeCustomOpInputOutputMode):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def forward_ad_active() -> bool:
    """Whether forward-mode AD is on (torch 2.11 to 2.15). Tensors may then carry tangents, which only eager computes."""
    return torch.autograd.forward_ad._current_level >= 0


def guard_on_forward_ad() -> None:
    """Have Dynamo compile again when forward-mode AD is entered or left, which it checks only inside ``torch.func``."""
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import GlobalStateSource

    if (context := TracingContext.try_get()) is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))


any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any device."""


def dispatch_modes() -> list[Any]:
    """The ``TorchDispatchMode`` objects of this thread, the outermost first."""
    return list(_get_current_dispatch_mode_stack())


def dispatch_mode_active() -> bool:
    """Whether the caller runs under a ``TorchDispatchMode``, which has to see every op."""
    return torch._C._len_torch_dispatch_stack() > 0
