"""Modes of a thread: grad, inference, autocast, dispatch, functions, forward AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch._guards import TracingContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode_temporarily

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast

EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast

SET_GRAD_ENABLED = torch._C._set_grad_enabled

ENTER_INFERENCE_MODE = torch.autograd.grad_mode._enter_inference_mode


def function_modes() -> list[Any]:
    """The modes that see torch functions, as ``torch.set_default_device`` makes one."""
    return [torch._C._get_function_stack_at(number) for number in range(torch._C._len_torch_function_stack())]


number_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack

number_of_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
"""Whether a profiler, or ``emit_nvtx``, is active in this thread."""


@contextmanager
def above_autograd() -> Iterator[None]:
    """Have ops run as from the user's code: also in the kernel of an op that autograd, or a dispatch mode, called."""
    with _included_again("AutogradFunctionality", *_HIDDEN_BY_MODES):
        yield


@contextmanager
def composites_as_ops() -> Iterator[None]:
    """Have composite ops reach dispatch modes whole, as under inference mode: autograd, which takes them apart, is left out."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, True):
        yield


def with_autograd() -> AbstractContextManager[None]:
    """The way back, for code within that records gradients itself."""
    return _included_again("AutogradFunctionality")


_HIDDEN_BY_MODES = ("ADInplaceOrView", "Conjugate", "Negative", "ZeroTensor")
"""What the dispatcher leaves out around a mode: a view is not known for one there, and a lazy ``conj()`` is read as it lies."""


@contextmanager
def _included_again(*keys: str) -> Iterator[None]:
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        yield


set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Without the context manager that ``torch.set_grad_enabled`` makes."""


@contextmanager
def without_alias_check() -> Iterator[None]:
    """Step out of the dispatch mode under which AOT makes its first call, to check custom ops for undeclared aliases.

    Under a dispatch mode an op does not see the caller's autocast, so that call would not be like eager.
    """
    from torch._functorch._aot_autograd.runtime_wrappers import _AnalyzeCustomOpInputOutputMode

    stack = _get_current_dispatch_mode_stack()
    if stack and isinstance(stack[-1], _AnalyzeCustomOpInputOutputMode):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def forward_ad_active() -> bool:
    """Whether forward-mode AD is on (torch 2.11 to 2.15): tensors may carry tangents, which eager alone computes."""
    return torch.autograd.forward_ad._current_level >= 0


def guard_on_forward_ad() -> None:
    """Have Dynamo compile anew where forward-mode AD is entered or left, which it asks inside of ``torch.func`` alone."""
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import GlobalStateSource

    if (context := TracingContext.try_get()) is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))


any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on, for whatever device."""


def dispatch_modes() -> list[Any]:
    """The ``TorchDispatchMode`` objects that this thread runs under, outermost first."""
    return list(_get_current_dispatch_mode_stack())


def dispatch_mode_active() -> bool:
    """Whether the caller runs under a ``TorchDispatchMode``, which must see every op."""
    return torch._C._len_torch_dispatch_stack() > 0
