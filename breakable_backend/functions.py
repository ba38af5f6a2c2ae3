"""Any Python function as an eager step: ``@eager_on_graph``.

Outside a capture a marked function is the function. Under ``capture`` it is a break. Under ``torch.compile``, whatever
the backend, it is one opaque node, which Dynamo does not look into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch

from breakable_backend import active
from breakable_backend.errors import OptionsError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Mark:
    """A marked function, and what its user said of it."""

    function: Callable[..., Any]
    name: str
    """As it stands in reports: the qualified name."""
    source: str
    """Where it is defined, as ``file.py:12``."""
    mutates_args: tuple[str, ...] = ()
    fake: Callable[..., Any] | None = None
    recompute: bool = False
    backward: Callable[..., Any] | None = None
    host_only: bool = False
    capture_stub: Callable[..., Any] | None = None
    barrier: Callable[[], None] | None = None


@overload
def eager_on_graph(function: F, /) -> F: ...
@overload
def eager_on_graph(
    *,
    enable: bool = True,
    mutates_args: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
    recompute: bool = False,
    backward: Callable[..., Any] | None = None,
    host_only: bool = False,
    capture_stub: Callable[..., Any] | None = None,
    barrier: Callable[[], None] | None = None,
) -> Callable[[F], F]: ...
def eager_on_graph(function: Any = None, /, *, enable: bool = True, **said: Any) -> Any:
    """Have a Python function run eagerly between captured segments, at every call and on real tensors.

    >>> @eager_on_graph
    ... def clip(x):
    ...     return x / x.norm() if x.norm() > 1 else x + 0
    >>> clip(torch.tensor([0.6, 0.8, 0.0]))
    tensor([0.6000, 0.8000, 0.0000])

    Args:
        function: a function, method, static method or lambda. A marked method is called without a break as
            ``Class.method.run_eager(instance, ...)``.
        enable: False returns ``function`` itself.
        mutates_args: names of tensor arguments that it writes, such as a cache.
        fake: what computes shapes under ``torch.compile``, with the same signature; by default the function itself, on
            fake tensors.
        recompute: run the function again in the backward pass, instead of keeping what the forward pass made.
        backward: ``backward(arguments, grads) -> gradients``, the user's own.
        host_only: whether its plain results may change between replays of a ``capture``: nothing captured uses them.
        capture_stub: called instead of the function while capturing, with the same arguments.
        barrier: called before it runs while capturing, such as a barrier of ranks.

    Raises:
        OptionsError: not a function, or ``mutates_args`` names no parameter of it.
    """
    if function is None:
        return functools.partial(_mark, enable=enable, said=said)
    return _mark(function, enable=enable, said=said)


def _mark(function: Any, *, enable: bool, said: dict[str, Any]) -> Any:
    if not enable:
        return function
    if isinstance(function, staticmethod | classmethod):
        return type(function)(_mark(function.__func__, enable=enable, said=said))
    if not callable(function) or isinstance(function, type):
        raise OptionsError(f"eager_on_graph marks functions, not {function!r}")
    code = getattr(function, "__code__", None)
    source = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}" if code is not None else ""
    name = getattr(function, "__qualname__", type(function).__name__)
    mark = Mark(function, name, source, **said)
    get = active.handler.get

    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)  # TODO: one opaque node
        handler = get()
        if handler is None:
            return function(*args, **kwargs)
        return handler.call(mark, args, kwargs)

    marked.run_eager = function  # type: ignore[attr-defined]
    marked.mark = mark  # type: ignore[attr-defined]
    return marked
