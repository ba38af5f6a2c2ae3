"""Graphs that need gradients: traced together with their backward; autograd functions, and what autograd says about a call."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as _fx_traceback
from torch.multiprocessing.reductions import StorageWeakRef

from breakable_backend._torch.aot import Regions, traced_as_eager
from breakable_backend._torch.as_python import hide_from_dynamo


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
    """The ATen graph of a function that computes gradients, which stand after the nodes that they are gradients of.

    Mutations stay in program order. Read in torch 2.11, 2.13 and 2.15.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # Without a table of decompositions torch 2.15 writes detach as an alias, which does not cut gradients off.
    with torch.enable_grad():
        return make_fx(function, decomposition_table={}, record_module_stack=True)(*arguments)


def traced_so_far() -> frozenset[str]:
    """The names of the nodes that :func:`trace_joint` has made so far."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None
    return frozenset(node.name for node in mode.tracer.graph.nodes)


def leaf_in_place_of(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf that :func:`trace_joint` takes for ``tensor``, so that no gradient gets to what made that. Read in torch 2.11 to 2.15."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

    mode = get_proxy_mode()
    assert mode is not None
    with disable_proxy_modes_tracing():
        leaf = tensor.detach().requires_grad_()
    mode.tracer.tensor_tracker[leaf] = mode.tracer.tensor_tracker[tensor]
    return leaf


@contextmanager
def autocast_cache(enabled: bool) -> Iterator[None]:
    """Whether autocast caches the casts of weights in a ``with`` statement. ``make_fx`` switches that off.

    With the cache a weight that is used twice is cast once, so its gradients are added up in the lower precision. After
    the statement the cache is empty, since a trace has put fakes into it.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def autocast_off() -> AbstractContextManager[None]:
    """No autocast during a ``with`` statement. A backward runs outside of autocast, and so does its trace."""
    return cast(AbstractContextManager[None], torch._C._DisableAutocast())


def number_backward(outputs: Sequence[torch.Tensor]) -> None:
    """Have nodes of the backward that is traced next carry the number of the op whose gradient they compute (``seq_nr``)."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    setup_stacktrace_preservation_hooks([output.grad_fn for output in outputs if output.grad_fn is not None])


def adds_gradients(node: fx.Node) -> bool:
    """Whether a node of a traced backward is autograd's own sum of two real gradients of one value.

    For complex ones ``add`` multiplies by ``alpha``, which may change the sign of a zero.
    """
    is_sum = node.target is torch.ops.aten.add.Tensor and bool(node.meta.get("is_gradient_acc"))
    return is_sum and not node.meta["val"].is_complex()


_OTHER_FOR_FAKES = {"ProdBackward0", "ProdBackward1", "CumprodBackward0", "OrmqrBackward0"}
_OTHER_FOR_FAKES_OF_THE_HOST = {
    "MaxBackward1",
    "MedianBackward0",
    "MinBackward1",
    "MkldnnRnnLayerBackward0",
    "NanmedianBackward0",
}


def traced_otherwise(outputs: Sequence[torch.Tensor]) -> str:
    """The first gradient behind ``outputs`` for which autograd has another formula for fake tensors; empty if there is none.

    ``prod`` and ``cumprod`` look for zeros in real tensors, and a fake one gets the slow formula, which rounds
    differently. The gradient of ``ormqr`` has another layout. The gradient of the value of ``masked_fill`` adds up what
    the mask selects, and for a fake tensor everything, with zeros in between. On the host, the gradient of a ``max`` of
    all elements is scattered, and for a fake tensor multiplied with a mask, which gives ``-0.0``. Found by ``make sweep``
    on torch 2.13. The kernel of an LSTM on the host makes what its gradient needs under grad mode only, and the two halves
    run outside of it. An op without a kernel for autograd has the gradients of the ops that its own kernel calls, and none
    for fake tensors.
    """
    for node in nodes_behind(output.grad_fn for output in outputs):
        name: str = node.name()
        on_host = any(data.device.type == "cpu" for data in node._input_metadata)
        of_a_value = name == "MaskedFillBackward1" and node.next_functions[1][0] is not None
        if name in _OTHER_FOR_FAKES or (name in _OTHER_FOR_FAKES_OF_THE_HOST and on_host) or of_a_value:
            return name
        if name == "torch::autograd::WarnNotImplemented":
            return "an op without an autograd kernel"
    return ""


def nodes_behind(starts: Iterable[Any], ends: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of autograd's graph that some nodes lead to, these included, each once; not ``ends``, nor what only they lead to."""
    left, visited = list(starts), {None, *ends}
    while left:
        if (node := left.pop()) not in visited:
            visited.add(node)
            yield node
            left += [before for before, _ in node.next_functions]


def leaves_behind(starts: Iterable[Any], ends: Iterable[Any] = ()) -> Iterator[torch.Tensor]:
    """The leaves among :func:`nodes_behind`."""
    leaves = (getattr(node, "variable", None) for node in nodes_behind(starts, ends))
    return (leaf for leaf in leaves if leaf is not None)


def functorch_active() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outside_of_vmap() -> AbstractContextManager[None]:
    """Random draws as outside of the vmap of ``is_grads_batched``, which refuses them. Checked in torch 2.11 and 2.13."""
    mode: Any = torch._C._parse_dispatch_key("VmapMode")
    return cast(AbstractContextManager[None], torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(mode)))


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


Backward = Callable[..., tuple[Any, ...]]
"""The ``backward`` of a ``torch.autograd.Function``."""


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which has no type annotations."""
    return function.apply(*args)


def apply_plainly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """:func:`apply_function` if no transform of ``torch.func`` is active, and no argument comes from one.

    ``apply`` checks each argument for this, in Python (1 us for each, H200 host, torch 2.11). Read in torch 2.11 to
    2.15.
    """
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_about_leaves(error: Exception) -> bool:
    """Whether autograd refused the write of a leaf, as the arguments of a trace are. Seen in torch 2.13 and 2.15."""
    return isinstance(error, RuntimeError) and "leaf Variable that requires grad" in str(error)


def once_differentiable(error: Callable[[Any], Callable[[], Exception]]) -> Callable[[Backward], Backward]:
    """Have a second derivative through the gradients that a ``backward`` returns be ``error(ctx)()``, whatever came in.

    torch's decorator of this name does that only where a gradient that comes in needs gradients, and where all of a graph
    is run backward. But those that go out depend on what the forward saved as well, and ``torch.autograd.grad`` asks for
    some leaves: that part of a second derivative would be left out without a word. So these gradients depend on all
    leaves behind the node.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return gradients
            return refuse_second(gradients, (*grads, *leaves_behind([ctx])), error(ctx))

        hide_from_dynamo(cast(FunctionType, wrapper).__code__)  # a backward may run in a function that is compiled
        return wrapper

    return decorate


def refuse_second(gradients: Sequence[Any], behind: Sequence[Any], error: Callable[[], Exception]) -> tuple[Any, ...]:
    """``gradients``, with ``error`` raised where they are differentiated by anything that ``behind`` depends on."""
    return cast(tuple[Any, ...], apply_function(_Refusal, error, len(gradients), *gradients, *behind))


class _Refusal(torch.autograd.Function):
    """Returns the first ``count`` of its arguments."""

    @staticmethod
    def forward(ctx: Any, error: Callable[[], Exception], count: int, *args: Any) -> Any:
        ctx.error = error
        return tuple(value.view_as(value) if isinstance(value, torch.Tensor) else value for value in args[:count])

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        error: Exception = ctx.error()
        raise error


@contextmanager
def without_hooks(leaves: Iterable[torch.Tensor]) -> Iterator[None]:
    """Without the hooks of some leaves, which are to see a gradient later, when it is accumulated."""
    with ExitStack() as stack:
        for leaf in leaves:
            if hooks := leaf._backward_hooks:
                stack.callback(setattr, leaf, "_backward_hooks", hooks)
                leaf._backward_hooks = None
        yield


def spare_hooks(edges: Sequence[tuple[Any, int]], gradients: Sequence[Any]) -> None:
    """Have hooks of a leaf not be called in the backward under way, if it gets no gradient. Asked in a node of that backward.

    Autograd calls them with None. In eager there would be no edge to the leaf.

    Args:
        edges: from the node that asks.
        gradients: what it gives along each. None may still become a gradient by what another node gives.
    """
    without = [node for (node, _), gradient in zip(edges, gradients, strict=True) if gradient is None]
    for node in nodes_behind(without):
        leaf = getattr(node, "variable", None)
        if leaf is not None and (leaf._backward_hooks or leaf._post_accumulate_grad_hooks):
            _spare(node, leaf)


def _spare(node: Any, leaf: torch.Tensor) -> None:
    before: dict[Any, Any] = leaf._backward_hooks or {}
    after: dict[Any, Any] = leaf._post_accumulate_grad_hooks or {}
    backward = current_backward()
    held = [(hooks, key, hook) for hooks in (before, after) for key, hook in hooks.items()]
    if any(isinstance(hook, _Spared) and hook.backward == backward for _, _, hook in held):
        return  # another node of this backward gives nothing either
    came: list[bool] = []

    def look(grads: Sequence[Any]) -> None:
        came[:] = [grads[0] is not None]

    handle = node.register_prehook(look)
    for hooks, key, hook in held:
        hooks[key] = _Spared(hook, came if hooks is after else None, backward)

    def restore() -> None:
        handle.remove()
        originals = [(hooks, key, _original(hook)) for hooks, key, hook in held]
        for hooks, key, hook in originals:
            if key in hooks:
                hooks[key] = hook
        for hooks, key, hook in originals:
            if came == [False] and hooks is before and key in hooks and backward in _counts_of(hook):
                hook(None)

    after_backward(restore)


def inner_results(results: Sequence[torch.Tensor]) -> list[int]:
    """The places of ``results`` from which others of them are computed: their gradients come from these too."""
    edges = {edge for node in nodes_behind(result.grad_fn for result in results) for edge in node.next_functions}
    return [place for place, result in enumerate(results) if (result.grad_fn, result.output_nr) in edges]


def hear_of_hooks(result: torch.Tensor, hear: Callable[[], None] | None) -> None:
    """Have ``hear`` called before a hook is registered on ``result``. None: have no hook be called without a gradient.

    The result is no leaf. Read in torch 2.11 to 2.15.
    """
    if result._backward_hooks is None:
        result._backward_hooks = _Hooks(hear)
        result.grad_fn._register_hook_dict(result)  # type: ignore[union-attr] # as register_hook does


class _Hooks(OrderedDict[int, Any]):
    """The hooks of a result. Autograd calls them with None if another result of the same node has a gradient, and this none."""

    def __init__(self, hear: Callable[[], None] | None) -> None:
        super().__init__()
        self.hear = hear

    def __setitem__(self, key: int, hook: Callable[[Any], Any]) -> None:
        if self.hear is not None:
            self.hear()
        elif not _counts_its_calls(hook):
            hook = functools.partial(_call_with_gradient, hook)
        super().__setitem__(key, hook)


def _call_with_gradient(hook: Callable[[Any], Any], grad: Any) -> Any:
    return None if grad is None else hook(grad)


def _original(hook: Any) -> Any:
    """What was wrapped. Nothing is called after a backward that raises, so a hook may still be wrapped for that one."""
    return _original(hook.hook) if isinstance(hook, _Spared) else hook


def _counts_of(hook: Any) -> Collection[int]:
    """The backwards in which a hook of ``register_multi_grad_hook`` still waits for some of its tensors.

    It counts those that have a gradient until it has counted every one that a node of the backward leads to. So it is told
    of the others too, unless none of them has one. Empty for other hooks. Read in torch 2.11 to 2.15.
    """
    if not _counts_its_calls(hook):
        return ()
    counts: Mapping[int, int] = hook.__closure__[hook.__code__.co_freevars.index("count")].cell_contents
    return counts


def _counts_its_calls(hook: Any) -> bool:
    code = getattr(hook, "__code__", None)
    return code is not None and code.co_filename == torch.autograd.graph.__file__ and "count" in code.co_freevars


class _Spared(NamedTuple):
    """A hook, called only where there is a gradient."""

    hook: Callable[[Any], Any]
    came: list[bool] | None
    """After the gradient's accumulation: whether it came. Before that None, as the hook is given the gradient."""
    backward: int
    """The number of the backward in which it is asked for. Others call the hook as ever."""

    def __call__(self, given: Any) -> Any:
        here = current_backward() == self.backward
        return self.hook(given) if not here or (given is not None if self.came is None else self.came[0]) else None
