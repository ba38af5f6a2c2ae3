"""Graphs that need gradients: traced together with their backward; and what autograd says about a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as _fx_traceback
from torch.multiprocessing.reductions import StorageWeakRef

from breakable_backend._torch.aot import Regions, traced_as_eager


@contextmanager
def tracing_both_halves(keep_alive: Iterable[Any], around: Regions) -> Iterator[FakeTensorMode]:
    """The context for :func:`trace_joint`, and for making its fake arguments: as in :func:`trace_inference`.

    Dynamo compiles nothing meanwhile, since tables of the process are changed.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.convert_frame import compile_lock

    with ExitStack() as stack:
        stack.enter_context(compile_lock)
        # As while Dynamo compiles; otherwise FX would tell other threads that call compiled functions that they are
        # being traced.
        stack.callback(setattr, torch.compiler, "_is_compiling_flag", torch.compiler._is_compiling_flag)
        torch.compiler._is_compiling_flag = True
        stack.enter_context(traced_as_eager(keep_alive, around))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(_fx_traceback.preserve_node_meta())
        stack.enter_context(_without_sharding_rules())
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def _without_sharding_rules() -> Iterator[None]:
    """Keep out of a trace what a DTensor runs on fake tensors to know how a result is placed.

    It does that once for each op in each thread. From torch 2.13 on it keeps it out by itself; read in 2.11 to 2.15.
    """
    rules: Any = getattr(sys.modules.get("torch.distributed.tensor._sharding_prop"), "ShardingPropagator", None)
    if rules is None:
        yield
        return
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    method = rules._propagate_tensor_meta_non_cached

    @functools.wraps(method)
    def untraced(*args: Any) -> Any:
        with disable_proxy_modes_tracing():
            return method(*args)

    rules._propagate_tensor_meta_non_cached = untraced
    try:
        yield
    finally:
        rules._propagate_tensor_meta_non_cached = method


def trace_joint(function: Callable[..., Any], arguments: Sequence[Any]) -> fx.GraphModule:
    """The ATen graph of a function that computes gradients, which stand behind the nodes that they are gradients of.

    Mutations stay in program order. Read in torch 2.11 and 2.13.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.enable_grad():
        return make_fx(function, record_module_stack=True)(*arguments)


def traced_so_far() -> frozenset[str]:
    """The names of the nodes that :func:`trace_joint` has made so far."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None
    return frozenset(node.name for node in mode.tracer.graph.nodes)


def autocast_off() -> AbstractContextManager[None]:
    """No autocast during a ``with`` statement. A backward runs outside of autocast, and so does its trace."""
    return cast(AbstractContextManager[None], torch._C._DisableAutocast())


def number_backward(outputs: Sequence[torch.Tensor]) -> None:
    """Have nodes of the backward that is traced next carry the number of the op whose gradient they compute (``seq_nr``)."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    setup_stacktrace_preservation_hooks([output.grad_fn for output in outputs if output.grad_fn is not None])


_OTHER_FOR_FAKES = {"ProdBackward0", "ProdBackward1", "CumprodBackward0", "OrmqrBackward0"}
_OTHER_FOR_FAKES_OF_THE_HOST = {"MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0"}


def traced_otherwise(outputs: Sequence[torch.Tensor]) -> str:
    """The first gradient behind ``outputs`` for which autograd has another formula for fake tensors; empty if there is none.

    ``prod`` and ``cumprod`` look for zeros in real tensors, and a fake one gets the slow formula, which rounds
    differently. The gradient of ``ormqr`` has another layout. The gradient of the value of ``masked_fill`` adds up what
    the mask selects, and for a fake tensor everything, with zeros in between. On the host, the gradient of a ``max`` of
    all elements is scattered, and for a fake tensor multiplied with a mask, which gives ``-0.0``. Found by ``make sweep``
    on torch 2.13.
    """
    left, visited = [output.grad_fn for output in outputs], set()
    while left:
        node = left.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        name = node.name()
        on_host = any(data.device.type == "cpu" for data in node._input_metadata)
        of_a_value = name == "MaskedFillBackward1" and node.next_functions[1][0] is not None
        if name in _OTHER_FOR_FAKES or (name in _OTHER_FOR_FAKES_OF_THE_HOST and on_host) or of_a_value:
            return name
        left += [before for before, _ in node.next_functions]
    return ""


def functorch_active() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def compiled_autograd_active() -> bool:
    """Whether a backward that begins now would be compiled, or is being compiled."""
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    config: Any = sys.modules.get("torch._dynamo.config")
    if module is not None and (module.compiled_autograd_enabled or module.in_compiled_autograd_region):
        return True
    return config is not None and bool(config.compiled_autograd)


def retains(tensor: torch.Tensor) -> StorageWeakRef:
    """A weak reference that tells whether autograd, or anybody else, still has the storage of ``tensor``."""
    return StorageWeakRef(tensor.untyped_storage())


def keeps_its_address(node: fx.Node) -> bool:
    """Whether an input of a graph of Dynamo's is a parameter, a buffer or a marked tensor, as AOTAutograd sees it."""
    return bool((node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type"))


def gradients(*args: Any, **kwargs: Any) -> Any:
    """``torch.autograd.grad`` through what the user's code has recorded.

    An error that autograd raises there by itself has no frame of the user's. It is the user's all the same, and this call
    tells so: see :func:`breakable_backend.internal_errors.is_ours`.
    """
    return torch.autograd.grad(*args, **kwargs)


def graph_is_kept() -> bool:
    """Whether the backward that is under way was called with ``retain_graph=True``; asked in a node of it."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def current_backward() -> int:
    """A number of the backward that is under way; asked in a node of it."""
    return int(torch._C._current_graph_task_id())


def after_backward(do: Callable[[], None]) -> None:
    """Have ``do`` called at the end of the backward that is under way; asked in a node of it. Checked in 2.11 to 2.13."""
    torch.autograd.Variable._execution_engine.queue_callback(do)


def node_number(node: Any) -> int:
    """The number of a node of autograd's graph, but for leaves: nodes of one thread are numbered as they are made."""
    return int(node._sequence_nr())


def next_node_number() -> int:
    """A number that no later node of this thread is below."""
    with torch.enable_grad():
        return node_number(torch.empty(0, requires_grad=True).view(0).grad_fn)


@contextmanager
def without_hooks(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Without the hooks of some leaves, which are to see a gradient later, when it is accumulated."""
    with ExitStack() as stack:
        for leaf in leaves:
            if hooks := leaf._backward_hooks:
                stack.callback(setattr, leaf, "_backward_hooks", hooks)
                leaf._backward_hooks = None
        yield
