"""AOTAutograd without functionalisation, and what is known about the graph that it compiles now."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext
from torch._library import utils as library_utils
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import _side_effectful_functions
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from breakable_backend._torch.asking import as_for_plain_tensors
from breakable_backend._torch.ops import _aten_overloads, find_overloads, never_run_on_constants
from breakable_backend._torch.symbols import free_symbols
from breakable_backend._torch.tensors import extent, lazy_bits, storage_key, with_lazy_bits

Regions = Mapping[OpOverload, Callable[[], AbstractContextManager[None]]]
"""Contexts to enter around each call of certain composite ops, which are decomposed in a graph."""


def trace_inference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_inference: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    compile_training: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    keep_alive: Iterable[Any],
    around: Regions,
    keep_floats: bool,
) -> Callable[..., Any]:
    """AOTAutograd without functionalisation: mutations stay in program order, and nothing is cloned.

    ``keep_alive`` are ops whose calls must survive AOT's dead code elimination, even if their results are unused.
    Unused random draws survive too: AOT asks Inductor's ``fallback_random`` whether a draw is an effect. So do
    assertions: torch 2.13 to 2.15 know only one overload of ``_assert_async``.

    With ``keep_floats`` a Python float that varies stays a number; otherwise AOT computes with 0-d tensors in its
    place.
    """
    from torch._functorch.aot_autograd import aot_module_simplified

    with traced_as_eager(keep_alive, around), _real_first_call(), _python_floats() if keep_floats else nullcontext():
        return aot_module_simplified(
            gm,
            example_inputs,
            cast(Any, compile_training),
            inference_compiler=cast(Any, compile_inference),
            keep_inference_input_mutations=True,
            disable_functionalization=True,
        )


@contextmanager
def traced_as_eager(keep_alive: Iterable[Any], around: Regions) -> Iterator[None]:
    """What is traced inside calls the ops that eager calls: see :func:`trace_inference`."""
    from torch._inductor import config

    with ExitStack() as stack:
        stack.enter_context(_side_effects((*keep_alive, *find_overloads("aten::_assert_async"))))
        for op in keep_alive:
            if isinstance(op, OpOverload):
                stack.callback(setattr, op, "_tags", op._tags)
                never_run_on_constants(op)
        stack.enter_context(_eager_kernels())
        stack.enter_context(_entered_around(around))
        stack.enter_context(config.patch(fallback_random=True))
        yield


def written_without_wrappers(gm: fx.GraphModule, lowered: fx.GraphModule) -> tuple[int, ...] | None:
    """The inputs whose versions a call of ``lowered`` has to count up, if AOT's wrappers would do nothing else around it.

    None if they do more: take subclasses apart, make outputs again that alias inputs, mark sizes of outputs, leave
    another grad mode, fake a first call. (They always switch gradients off. Whether they switch off an autocast of the
    caller has to be checked by the caller of this function, since AOT has switched it off already here.) Call this
    while AOT compiles ``lowered``, which it made of ``gm``. Read in the wrappers of torch 2.11 to 2.15.
    """
    context = TracingContext.try_get()
    facts = context.fw_metadata if context is not None else None
    if context is None or facts is None or context.fakify_first_call:
        return None
    more = (
        *(facts.num_outputs_aliased, facts.num_mutated_inp_runtime_indices, facts.num_intermediate_bases),
        *(facts.dynamic_outputs, facts.is_rng_op_functionalized, len(facts.tokens)),
        facts.grad_enabled_mutation is not None,
    )
    ends = [*gm.graph.find_nodes(op="placeholder"), *gm.graph.output_node().all_input_nodes]
    tensors = (leaf for node in ends for leaf in pytree.tree_leaves(node.meta.get("example_value")))
    same = len(gm.graph.find_nodes(op="placeholder")) == len(lowered.graph.find_nodes(op="placeholder"))
    if any(more) or not same or any(map(is_traceable_wrapper_subclass, tensors)):
        return None
    return tuple(facts.mutated_graph_handled_indices_seen_by_autograd)


def forget_effect_tokens() -> None:
    """Have AOT pass no effect tokens to the graph that it compiles now, which takes none.

    Only torch 2.11 does: for each kind of effect among the ops it passes a None in front of the arguments, and drops as
    many results. torch 2.13 to 2.15 drop the tokens by themselves.
    """
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.tokens = {}


def apart(inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` of a graph that Dynamo traced, with fake tensors on separate storages for those that share one.

    If one of several arguments in one storage is written, AOT merges them into one base, with the offsets of the first
    call, on which Dynamo does not guard. (torch 2.11 to 2.15)
    """
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
    plain = [value for value in inputs if type(value) in kinds and value.layout is torch.strided]
    tenants = Counter(map(storage_key, plain))
    shared = {id(value) for value in plain if tenants[storage_key(value)] > 1}
    context = TracingContext.try_get()
    if not shared or context is None or context.fake_mode is None:
        return list(inputs)
    return [_stand_in(value, context) if id(value) in shared else value for value in inputs]


def _stand_in(tensor: torch.Tensor, context: TracingContext) -> torch.Tensor:
    """A fake tensor like ``tensor``, at its place in a storage of its own."""
    mode, symbols = context.fake_mode, context.tensor_to_context.get(tensor)
    assert mode is not None
    source = symbols.tensor_source if symbols is not None else None
    fake: torch.Tensor = tensor
    if not isinstance(tensor, FakeTensor):
        fake = mode.from_tensor(tensor, symbolic_context=symbols, source=source)
    with mode, torch.no_grad():
        length = fake.storage_offset() + extent(fake.shape, fake.stride())
        memory = torch.empty(length, dtype=fake.dtype, device=fake.device)
        placed = memory.as_strided(fake.shape, fake.stride(), fake.storage_offset())
    return with_lazy_bits(placed, lazy_bits(fake)).requires_grad_(fake.requires_grad)


@contextmanager
def _side_effects(ops: Iterable[Any]) -> Iterator[None]:
    """Have dead code elimination keep calls of ``ops``. Dynamo compiles in one thread at a time."""
    added = {op for op in ops if op not in _side_effectful_functions}
    asked = library_utils.is_impure
    _side_effectful_functions.update(added)
    if any(isinstance(op, HigherOrderOperator) and not asked(op) for op in added):  # torch 2.11

        def is_impure(op: Callable[..., Any], **context: Any) -> bool:
            return op in added or asked(op, **context)

        library_utils.is_impure = is_impure
    try:
        yield
    finally:
        library_utils.is_impure = asked
        _side_effectful_functions.difference_update(added)


_AUTOGRAD, _COMPOSITE = torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def _eager_kernels() -> Iterator[None]:
    """Trace ops as the kernels that eager runs, without the decompositions in Python's dispatcher, which eager never uses.

    They exist for export and for Inductor, and may differ from the kernels in the last bit (batch norm on CUDA, for
    which eager uses cuDNN), in the sign of zero (softshrink), in strides and in aliases (dropout that drops nothing).
    The tables belong to the process. They are restored exactly, and Dynamo compiles in one thread at a time.
    """
    # By identity: to compare two keys, or to look one up, takes 0.2 us, and there are 3,000 ops.
    tables = [(op, k) for op in _aten_overloads() for k in tuple(op.py_kernels) if k is _AUTOGRAD or k is _COMPOSITE]
    removed = [(op, key, op.py_kernels.pop(key)) for op, key in tables]
    as_plain = {op: kernel for op, kernel in as_for_plain_tensors().items() if _COMPOSITE not in op.py_kernels}
    for op, kernel in as_plain.items():
        op.py_kernels[_COMPOSITE] = kernel
    changed = {*as_plain, *(op for op, _, _ in removed)}
    for op in changed:
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op in as_plain:
            del op.py_kernels[_COMPOSITE]
        for op, key, kernel in removed:
            op.py_kernels[key] = kernel
        for op in changed:
            op._dispatch_cache.clear()


@contextmanager
def _real_first_call() -> Iterator[None]:
    """Have AOT compile for real tensors if Dynamo cuts a graph at DDP's buckets.

    There AOT's function should return fake tensors once, to give the next part its strides. But Dynamo makes that call
    only for its own backends, and runs the parts of others on fake tensors, so the first real call would return the
    fakes.
    """
    context = TracingContext.try_get()
    if context is None or not context.fakify_first_call:
        yield
        return
    context.fakify_first_call = False
    try:
        yield
    finally:
        context.fakify_first_call = True


@contextmanager
def _python_floats() -> Iterator[None]:
    """Keep floats as numbers in the graph that AOT traces in this thread, as in eager.

    Dynamo passes a float argument that varies as a tensor whose value is read, and guards on nothing. AOT then replaces
    arithmetic with the number by arithmetic with the tensor, which rounds differently, and where it cannot, it has
    Dynamo compile again for each value. AOT in other threads is not changed. Checked on torch 2.11 to 2.15.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch._functorch._aot_autograd import graph_compile

    scope, name, thread = vars(graph_compile), "tensorify_python_scalars", threading.get_ident()
    pass_of_aot = scope[name]

    def keep(module: fx.GraphModule, env: Any, *others: Any) -> None:
        if threading.get_ident() != thread:
            pass_of_aot(module, env, *others)
            return
        constant = {name for name in _floats_of_sizes(module, env) if not TensorifyState.should_specialize(name)}
        for name in constant:
            TensorifyState.specialize(name)
        if constant:
            raise TensorifyScalarRestartAnalysis

    scope[name] = keep
    try:
        yield
    finally:
        scope[name] = pass_of_aot


def _floats_of_sizes(module: fx.GraphModule, env: Any) -> set[str]:
    """The symbols of floats that have to be constants: sizes depend on them, or a guard uses a number computed from them.

    Such a guard computes in another order, and might fail for the very value that it was made for.
    """
    import sympy
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    values = [value for node in module.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    guards = [guard.expr for guard in env.guards if isinstance(guard.expr, sympy.Eq)]
    symbols = {symbol for value in values for symbol in free_symbols(value)}
    computed = (guard for guard in guards if not (guard.lhs.is_symbol or guard.rhs.is_symbol))
    symbols |= {symbol for guard in computed for symbol in guard.free_symbols}
    return {str(symbol) for symbol in symbols if symbol_is_type(symbol, SymT.FLOAT)}


@contextmanager
def _entered_around(ops: Regions) -> Iterator[None]:
    """Enter a context around each call of a composite op while Python's dispatcher traces, by whatever name it is called."""
    before = {op: op.py_kernels.get(_COMPOSITE) for op in ops}

    def around(op: OpOverload, context: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
        kernel = before[op] or functools.partial(op._op_dk, _COMPOSITE)

        def entered(*args: Any, **kwargs: Any) -> Any:
            with context():
                return kernel(*args, **kwargs)

        return entered

    for op, context in ops.items():
        op.py_kernels[_COMPOSITE] = around(op, context)
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernel in before.items():
            del op.py_kernels[_COMPOSITE]
            if kernel is not None:
                op.py_kernels[_COMPOSITE] = kernel
            op._dispatch_cache.clear()


def static_input_indices() -> frozenset[int]:
    """Which inputs of the graph that AOT compiles now have fixed addresses: parameters, buffers, marked tensors.

    The stock ``backend="cudagraphs"`` computes this list by a formula that finds nothing once modules are inlined. This
    is the list that Inductor uses.
    """
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return frozenset()
    return frozenset(context.fw_metadata.static_input_indices or ())
