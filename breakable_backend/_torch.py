"""Every private torch name that this package uses, wrapped; nothing else in the package touches one.

Checked on torch 2.11.0 (CUDA 13.0 and CPU) and on 2.13.0, 2.14.1 and 2.15.0 (CPU), unless a line says otherwise: all names are at
the same place on these.

What ``import torch`` leaves out is imported where it is needed: Dynamo, AOTAutograd, Inductor and symbols take longer to
import than all else together, and a program that marks its functions may never compile them.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import math
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch._library import utils as library_utils
from torch._library.custom_ops import OPDEFS
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import traceback as _fx_traceback
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import _side_effectful_functions
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
    is_traceable_wrapper_subclass,
)
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    import sympy
    from torch._dynamo.symbolic_convert import InstructionTranslator

F = TypeVar("F", bound=Callable[..., Any])

Op = OpOverload | HigherOrderOperator
"""What a node of a lowered graph can call, other than plain Python operators."""

__all__ = [
    "CompileTimeError",
    "HigherOrderOperator",
    "Op",
    "OpOverload",
    "OpOverloadPacket",
    "StorageWeakRef",
    "pytree",
    "without_modes",
]

# --- errors -----------------------------------------------------------------------------------------------------------


def dynamo_error() -> type[Exception]:
    """What Dynamo raises to steer itself, such as a request to trace again: never to be caught. Our own errors are among it."""
    from torch._dynamo.exc import TorchDynamoException

    _passed_on_by_dynamo()
    return TorchDynamoException


def is_dynamos(error: Exception) -> bool:
    """Whether ``error`` is such a one."""
    return "torch._dynamo" in sys.modules and isinstance(error, dynamo_error())


class _Error(RuntimeError):
    """What errors are while Dynamo is not loaded."""


class CompileTimeError(_Error):
    """An exception that Dynamo hands to the caller unchanged.

    Whatever else a backend raises while compiling reaches the user as ``BackendCompilerFailed``. Dynamo lets a
    ``ShortenTraceback`` through; without a first useful frame it leaves the traceback alone. That is a class of Dynamo's: it
    becomes the base of this one before the first error that Dynamo could see.
    """

    first_useful_frame = None

    def __init__(self, *args: Any) -> None:
        if "torch._dynamo" in sys.modules:
            _passed_on_by_dynamo()
        self._text = str(args[0]) if args else ""
        super().__init__(*args, **({} if _Error in CompileTimeError.__bases__ else {"first_useful_frame": None}))

    def __str__(self) -> str:
        """The text as it was given, without Dynamo's notes below it, which ask for a report to PyTorch."""
        return self._text


def _passed_on_by_dynamo() -> None:
    """Make our errors such as Dynamo passes on."""
    from torch._dynamo.exc import ShortenTraceback

    CompileTimeError.__bases__ = (ShortenTraceback,)


# --- Dynamo and AOTAutograd -------------------------------------------------------------------------------------------

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_INFERENCE_MODE = torch.autograd.grad_mode._enter_inference_mode


def trace_inference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_inference: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    compile_training: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
    keep_alive: Iterable[Any],
    around: Mapping[OpOverload, Callable[[], AbstractContextManager[None]]],
    keep_floats: bool,
) -> Callable[..., Any]:
    """AOTAutograd without functionalization: mutation stays in program order, and nothing is cloned.

    ``keep_alive`` are ops whose calls must survive AOT's dead code elimination even when their results are unused.
    Unused random draws survive too: AOT asks Inductor's ``fallback_random`` whether a draw is an effect. So do assertions:
    of ``_assert_async`` torch 2.13 to 2.15 know that of one overload only.

    ``around`` has what to enter around each call of some composite ops, of which the graph will have the parts.
    With ``keep_floats`` a Python float that varies stays a number; else AOT computes with 0-d tensors in its place.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor import config

    kept = (*keep_alive, *find_overloads("aten::_assert_async"))
    with ExitStack() as stack:
        stack.enter_context(_side_effects(kept))
        for op in keep_alive:
            if isinstance(op, OpOverload):
                stack.callback(setattr, op, "_tags", op._tags)
                never_run_on_constants(op)
        stack.enter_context(_eager_kernels())
        stack.enter_context(_entered_around(around))
        stack.enter_context(config.patch(fallback_random=True))
        stack.enter_context(_real_first_call())
        if keep_floats:
            stack.enter_context(_python_floats())
        return aot_module_simplified(
            gm,
            example_inputs,
            cast(Any, compile_training),
            inference_compiler=cast(Any, compile_inference),
            keep_inference_input_mutations=True,
            disable_functionalization=True,
        )


def written_without_wrappers(gm: fx.GraphModule, lowered: fx.GraphModule) -> tuple[int, ...] | None:
    """Which inputs' versions a call of ``lowered`` has to count up, if that is all that AOT's wrappers would do around it.

    None where they do more: take subclasses apart, make outputs again that alias inputs, mark sizes of outputs, leave
    another grad mode, fake a first call. (They switch gradients off in each case. That they switch off an autocast of the
    caller is for the caller of this to know: AOT has switched it off by now.) To be asked while AOT compiles ``lowered``,
    which it made of ``gm``. Read in the wrappers of torch 2.11 to 2.15.
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


def apart(inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` of a graph that Dynamo traced, with fake tensors on storages of their own for those that share one.

    AOT merges arguments that overlap in one storage to one base, if any is written, with the offsets that they have in
    the first call; and Dynamo does not guard on those. (torch 2.11 to 2.15)
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
    """A fake tensor like ``tensor``, in its place in a storage of its own."""
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


def aten(names: str) -> frozenset[str]:
    """A table of ATen ops, as ``aten::name``. Tables hold names, so that a torch without one of the ops has the rest."""
    return frozenset(f"aten::{name}" for name in names.split())


_DECOMPOSED = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


@contextmanager
def _eager_kernels() -> Iterator[None]:
    """Trace ops as the kernels that eager runs: without the decompositions of Python's dispatcher, which eager never sees.

    They exist for export and for Inductor, and may differ from the kernels in the last bit (batch norm on CUDA, which
    is cuDNN's in eager), in the sign of zero (softshrink), in strides and in aliases (dropout that drops nothing).
    The tables are the process's: put back exactly, and Dynamo compiles in one thread at a time.
    """
    removed = [
        (op, key, op.py_kernels.pop(key)) for op in _aten_overloads() for key in _DECOMPOSED if key in op.py_kernels
    ]
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    values_only = {op: kernel for op, kernel in _values_only().items() if composite not in op.py_kernels}
    for op, kernel in values_only.items():
        op.py_kernels[composite] = kernel
    changed = {*values_only, *(op for op, _, _ in removed)}
    for op in changed:
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op in values_only:
            del op.py_kernels[composite]
        for op, key, kernel in removed:
            op.py_kernels[key] = kernel
        for op in changed:
            op._dispatch_cache.clear()


def _values_only() -> dict[OpOverload, Callable[..., Any]]:
    """Kernels of the two ops that compute vectors as well while they are traced, as if a subclass were to ask for them.

    LAPACK takes another way there, and rounds otherwise. ``linalg_cond`` and the nuclear norm call one of them.
    (torch 2.11 to 2.15)
    """

    def svdvals(matrix: torch.Tensor, *, driver: str | None = None) -> Any:
        return torch.ops.aten._linalg_svd(matrix, False, _asks_for_gradients(matrix), driver=driver)[1]

    def eigvalsh(matrix: torch.Tensor, UPLO: str = "L") -> Any:
        return torch.ops.aten._linalg_eigh(matrix, UPLO, _asks_for_gradients(matrix))[0]

    return {torch.ops.aten.linalg_svdvals.default: svdvals, torch.ops.aten.linalg_eigvalsh.default: eigvalsh}


def _asks_for_gradients(tensor: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


@contextmanager
def _real_first_call() -> Iterator[None]:
    """Have AOT compile for real tensors where Dynamo cuts a graph at DDP's buckets.

    There AOT's function is to return fake tensors once, to tell the next part its strides. But Dynamo makes that call only of
    the backends that are its own, and runs the parts of others on fake tensors; the first real call would return the fakes.
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
    """Leave floats numbers in the graph that AOT traces in this thread, as eager has them.

    Dynamo hands a float argument that varies over as a tensor whose value is read, and guards on nothing. AOT then
    turns arithmetic with the number into arithmetic with the tensor, which rounds otherwise, and has Dynamo compile
    again, for each value, where it cannot. Other threads' AOT does as always; checked on torch 2.11 to 2.15.
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
    """The symbols of floats that have to be constants: sizes hang on them, or what was computed from them was guarded.

    Such a guard computes in an order of its own, and might fail for the very value that it was made for.
    """
    import sympy
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    values = [value for node in module.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    guards = [guard.expr for guard in env.guards if isinstance(guard.expr, sympy.Eq)]
    symbols = {symbol for value in values for symbol in free_symbols(value)}
    symbols |= {
        symbol for guard in guards if not (guard.lhs.is_symbol or guard.rhs.is_symbol) for symbol in guard.free_symbols
    }
    return {str(symbol) for symbol in symbols if symbol_is_type(symbol, SymT.FLOAT)}


def _aten_overloads() -> Iterator[OpOverload]:
    """The overloads of aten that anybody has asked for so far: only those can have kernels in Python."""
    for packet in list(vars(torch.ops.aten).values()):
        if isinstance(packet, OpOverloadPacket):
            for overload in list(vars(packet).values()):
                if isinstance(overload, OpOverload):
                    yield overload


def is_composite(op: Any) -> bool:
    """Whether an op is made of other ops, into which tracing takes it apart."""
    key = "CompositeImplicitAutograd"
    return _is_dispatched(op) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key))


def _is_dispatched(op: Any) -> bool:
    """Whether an op is the dispatcher's. Of some ops TorchScript has overloads of its own."""
    return isinstance(op, OpOverload) and bool(torch._C._dispatch_has_kernel(op.name()))


def is_composite_by_name(name: str) -> bool:
    """Whether all overloads that ``name`` stands for are composite, but for those with ``out=``."""
    ops = [op for op in find_overloads(name) if _is_dispatched(op)]
    ops = [op for op in ops if not any(argument.is_out for argument in op._schema.arguments)]
    return bool(ops) and all(map(is_composite, ops))


@contextmanager
def _entered_around(ops: Mapping[OpOverload, Callable[[], AbstractContextManager[None]]]) -> Iterator[None]:
    """Enter a context around each call of a composite op while Python's dispatcher traces, by whatever name it is called."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    before = {op: op.py_kernels.get(key) for op in ops}

    def around(op: OpOverload, context: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
        kernel = before[op] or functools.partial(op._op_dk, key)

        def entered(*args: Any, **kwargs: Any) -> Any:
            with context():
                return kernel(*args, **kwargs)

        return entered

    for op, context in ops.items():
        op.py_kernels[key] = around(op, context)
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernel in before.items():
            del op.py_kernels[key]
            if kernel is not None:
                op.py_kernels[key] = kernel
            op._dispatch_cache.clear()


@contextmanager
def noted(key: str, value: Any) -> Iterator[None]:
    """Have nodes that are traced in here carry ``value`` in ``meta["custom"]``; those that are traced already do not change.

    ``torch.fx.traceback.annotate`` changes the dict, which the nodes before may share.
    """
    before = _fx_traceback.current_meta
    _fx_traceback.current_meta = {**before, "custom": {**before.get("custom", {}), key: value}}
    try:
        yield
    finally:
        _fx_traceback.current_meta = before


def static_input_indices() -> frozenset[int]:
    """Which inputs of the graph that AOT is compiling right now keep their address: parameters, buffers, marked tensors.

    Stock ``backend="cudagraphs"`` derives the list from a formula that gives nothing once modules are inlined; this is
    the list that Inductor uses.
    """
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None:
        return frozenset()
    return frozenset(context.fw_metadata.static_input_indices or ())


def is_static(tensor: torch.Tensor) -> bool:
    """Whether Dynamo takes an argument for static: a parameter, a buffer, a tensor marked with ``mark_static_address``."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def graph_breaks() -> dict[str, int]:
    """Dynamo's graph breaks since its last reset: how many, by reason. The user's line is in the reason's first line."""
    from torch._dynamo.utils import graph_break_reasons

    times: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for broken in graph_break_reasons:
        first, _, rest = broken.reason.strip().partition("\n")
        if first.startswith("generic_jump"):
            first = "Data-dependent branching"  # Dynamo's words for it in a function that it inlines
        if broken.user_stack:
            frame = broken.user_stack[-1]
            first += f", at {frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")
        times[first] += 1
        texts[first] = max(texts.get(first, ""), f"{first}\n{rest}".strip(), key=len)
    return {texts[first]: count for first, count in times.items()}


# What `torch.compile` returns is, or has in it, a function `compile_wrapper` of Dynamo's. It closes over `fn`, which was compiled,
# and over `callback`, which compiles the frames that run below it. Checked on torch 2.11, 2.13, 2.14.1 and 2.15.


@functools.cache
def _compile_wrapper() -> CodeType | None:
    from torch._dynamo.eval_frame import _TorchDynamoContext

    constants = _TorchDynamoContext.__call__.__code__.co_consts
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == "compile_wrapper"), None)


@functools.cache
def _inlined() -> CodeType:
    """Of what Dynamo wraps around functions in files that it skips, such as those of ``torch.nn``."""
    from torch._dynamo.external_utils import wrap_inline

    return wrap_inline(lambda: None).__code__


Subject = tuple[object, str]
"""What graphs are filed by: what compiles them, what was compiled, its code; of a method, the object and the method's name."""


def running_compiled() -> Iterator[Subject]:
    """The compiled functions that are running in this thread, from the innermost: twice each, as ``callback`` and as ``fn``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _compile_wrapper():
            yield from _subjects(frame.f_locals)
        frame = frame.f_back


def subjects_of(compiled: Any) -> list[Subject]:
    """What graphs of ``compiled`` are filed by, and those of all compiled functions in it."""
    wrappers = [subject for wrapper in _parts(compiled)[0] for subject in _subjects(_closure(wrapper))]
    return [*wrappers, *((code, "") for code in codes_of(compiled))]


def _subjects(names: Mapping[str, Any]) -> Iterator[Subject]:
    if callable(callback := names.get("callback")):
        yield callback, ""
    function = names.get("fn")
    while getattr(function, "__code__", None) is _inlined():
        function = function.__wrapped__  # type: ignore[union-attr]
    if isinstance(function, MethodType):
        owner = function.__self__
        yield owner, "" if isinstance(owner, torch.nn.Module) and function.__name__ in _CALLS else function.__name__
    elif function is not None:
        yield function, ""


_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
"""The methods by which a module is called."""


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: content for name, cell in cells if (content := _content(cell)) is not None}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__code__ is _compile_wrapper()


def _parts(compiled: Any) -> tuple[list[Any], list[Any]]:
    """The wrappers of ``torch.compile`` in ``compiled``, and the Python functions whose frames Dynamo compiles for them."""
    wrappers: list[Any] = []
    functions: list[Any] = []
    seen: set[int] = set()
    kept: list[Any] = []  # so that no number of an object comes twice
    pending = [compiled]
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        kept.append(thing)
        if _is_wrapper(thing):
            wrappers.append(thing)
            pending.append(_closure(thing).get("fn"))
        elif isinstance(thing, functools.partial):
            pending += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, torch.nn.Module):
            pending += [thing.forward, *_wrappers_of_module(thing), *_frames_of_module(thing)]
        elif isinstance(thing, MethodType):
            pending += [thing.__func__, thing.__self__]
        elif isinstance(thing, FunctionType):
            functions.append(thing)
            inner = getattr(thing, "_torchdynamo_orig_callable", None) or getattr(thing, "__wrapped__", None)
            pending += [inner, *_called_by(thing)]
        elif callable(thing) and not isinstance(thing, type):
            held = getattr(thing, "__dict__", {})
            pending += [type(thing).__call__, held.get("__wrapped__"), *filter(_is_wrapper, held.values())]
    return wrappers, functions


def _wrappers_of_module(module: torch.nn.Module) -> Iterator[Any]:
    """The compiled functions that a module and its children hold, as attributes or methods."""
    for child in torch.nn.Module.modules(module):
        classes = [kind for kind in type(child).__mro__ if kind not in (torch.nn.Module, object)]
        for value in (*list(vars(child).values()), *(value for kind in classes for value in vars(kind).values())):
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            )
            yield from filter(_is_wrapper, list(values))


def _frames_of_module(module: torch.nn.Module) -> Iterator[Any]:
    """The forwards of children, and functions that they hold, that Dynamo compiled, or gave up, as frames of their own."""
    for child in torch.nn.Module.modules(module):
        for function in (getattr(child.forward, "__func__", None), *list(vars(child).values())):
            if isinstance(function, FunctionType) and _is_frame(function.__code__):
                yield function


def _called_by(function: Any) -> Iterator[Any]:
    """What a function names that is compiled: compiled functions, modules that hold some, functions with frames of their own."""
    code = function.__code__
    named = [function.__globals__.get(name) for name in code.co_names]
    for value in (*_closure(function).values(), *named):
        if isinstance(value, torch.nn.Module):
            if any(True for _ in _wrappers_of_module(value)):
                yield value
        elif _is_wrapper(value) or (isinstance(value, FunctionType) and _is_frame(value.__code__)):
            yield value


def _is_frame(code: CodeType) -> bool:
    """Whether Dynamo has compiled ``code`` as a frame of its own, or has tried to and given it up."""
    from torch._dynamo.convert_frame import input_codes

    return bool(_entries(code)) or (code in input_codes and _failure(code) is not None)


def holds_compiled(function: Any) -> bool:
    """Whether ``function`` is what ``torch.compile`` returned, was compiled in place, or holds such a one."""
    return bool(_parts(function)[0])


def codes_of(compiled: Any) -> list[CodeType]:
    """The code of the functions behind ``compiled`` that Dynamo compiles, but for that which it wraps around all of torch's."""
    return [code for function in _parts(compiled)[1] if (code := function.__code__) is not _inlined()]


def code_under_compilation() -> tuple[CodeType, CodeType] | None:
    """What Dynamo is compiling, and the function's code that it is of, if it goes on behind a graph break; None: nothing.

    What Dynamo wraps around torch's own functions is one code for all: see :func:`is_shared`.
    """
    if current_compile_id() is None or (transaction := _tracing()) is None:
        return None
    from torch._dynamo.resume_execution import ContinueExecutionCache

    code = whole = transaction.f_code
    while (resumed := ContinueExecutionCache.generated_code_metadata.get(whole)) is not None:
        whole = resumed.code
    return code, whole


def _tracing() -> InstructionTranslator | None:
    """What Dynamo traces with in this thread; None: it does not."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return cast("InstructionTranslator | None", InstructionTranslator.current_tx())


def is_shared(code: CodeType) -> bool:
    """Whether it is the one code that Dynamo wraps around all of torch's own functions."""
    return code is _inlined()


def at_recompile_limit(codes: Iterable[CodeType] | None = None) -> list[str]:
    """Those of ``codes`` that Dynamo will not compile again, as ``name (file:line)``; None: of all."""
    from torch._dynamo import config
    from torch._dynamo.convert_frame import input_codes

    if codes is None:
        codes = [code for ref in list(input_codes.seen) if (code := ref()) is not None]
    limit = config.recompile_limit
    return [place_of(code) for code in dict.fromkeys(codes) if len(_entries(code)) >= limit]


def skipped(codes: Iterable[CodeType]) -> dict[str, str]:
    """Those of ``codes`` that Dynamo was asked to compile, and of which there is nothing, as ``name (file:line)``; and why."""
    from torch._dynamo.convert_frame import input_codes

    asked = [
        code
        for code in dict.fromkeys(codes)
        if code in input_codes and code not in _MODULE_CALLS and not _entries(code)
    ]
    return {place_of(code): _why_skipped(code) for code in asked}


_MODULE_CALLS = [getattr(torch.nn.Module, name).__code__ for name in ("_wrapped_call_impl", "_call_impl")]
"""Dynamo skips these, and compiles what they call."""


def _why_skipped(code: CodeType) -> str:
    if (failure := _failure(code)) is not None:
        return failure
    from torch._dynamo import trace_rules

    if trace_rules.check(code):
        return "Dynamo skips the file that it is in, and compiles what it calls"
    return "it has no op on tensors, or was called where Dynamo compiles nothing (inside of vmap or of a dispatch mode)"


def _failure(code: CodeType) -> str | None:
    """Why Dynamo gave ``code`` up when it last tried, as far as it remembers (64 attempts); None: it did not."""
    from torch._dynamo.utils import get_compilation_metrics

    place = (code.co_name, code.co_filename, code.co_firstlineno)
    for attempt in reversed(get_compilation_metrics()):
        if attempt.fail_reason and place == (attempt.co_name, attempt.co_filename, attempt.co_firstlineno):
            return _told(str(attempt.fail_reason), attempt.fail_user_frame_filename, attempt.fail_user_frame_lineno)
    return None


def _told(reason: str, file: str | None, line: int | None) -> str:
    """A reason of Dynamo's in one line: what it could not trace, at which line, and why it could not go on behind that."""
    first, *rest = (text.strip() for text in reason.splitlines() if text.strip())
    told = first + (f", at {file}:{line}" if file else "")
    behind = itertools.dropwhile(lambda text: "another graph break occurred" not in text, rest)
    told += "".join(f"; {text}" for text in itertools.islice(behind, 1, 2))
    if file and "fsdp" in Path(file).parts:
        told += "; FSDP's hooks are not traced, and the modules between them are compiled one by one"
    return f"{told}: compile what is around vmap and its like" if "functorch" in first else told


def stance() -> str:
    """What ``torch.compiler.set_stance`` has set, now: ``"default"``, ``"force_eager"`` and so on."""
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


def stance_is_default() -> Callable[[], bool]:
    """Asks whether no stance is set, in each call, without an import."""
    from torch._dynamo import eval_frame

    return lambda: eval_frame._stance.stance == "default"


def place_of(code: CodeType) -> str:
    """``name (file:line)``."""
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def _entries(code: CodeType) -> list[Any]:
    """Dynamo's versions of ``code``. They belong to C++, which may drop one at any moment, in any thread: only to be counted."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return _debug_get_cache_entry_list(code)


def constant_under_dynamo(function: F) -> F:
    """Have Dynamo call ``function`` while it traces, and take what it returns as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # all that torch.compiler.assume_constant_result does
    return function


def break_of_dynamo(reason: str) -> Callable[[F], F]:
    """Have Dynamo break its graph where ``function`` is called, and call it as it is.

    What ``torch.compiler.disable`` does, but that this imports Dynamo when there is something to compile, and not before.
    """
    frames: Any = torch._C._dynamo.eval_frame

    def around(function: F) -> F:
        uncompiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not uncompiled:
                uncompiled.append(torch.compiler.disable(function))
            return uncompiled[0](*args, **kwargs)

        told: Any = call
        told._torchdynamo_disable, told._torchdynamo_disable_msg = True, reason
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(told.__code__, skip)  # of this frame alone
        return cast(F, call)

    return around


def keep_with_code(thing: object) -> bool:
    """Keep ``thing`` alive as long as the code that Dynamo is making now; False where nobody keeps that code, as in an export."""
    from torch._dynamo import convert_frame

    transaction = _tracing()
    assert transaction is not None
    output = transaction.output
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not output.export:  # an export lets go of the code, and its graph goes on
        if frame.f_code.co_name == "_compile_inner" and frame.f_code.co_filename == convert_frame.__file__:
            # What Dynamo calls when the code dies, and keeps until then. There is nothing to call.
            output.cleanups.append(cast(Any, functools.partial(id, thing)))
            return True
        frame = frame.f_back
    return False


def forget_code_of(thing: object, reason: str) -> None:
    """Have Dynamo compile again what it made while ``thing`` was kept by :func:`keep_with_code`, and nothing else."""
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.guards import DeletedGuardManagerWrapper
    from torch._dynamo.utils import CleanupManager

    for code in [code for ref in list(input_codes.seen) if (code := ref()) is not None]:
        for entry in _entries(code):
            kept = CleanupManager.instance.get(entry.code) or ()
            if any(isinstance(hook, functools.partial) and thing in hook.args for hook in kept):
                guards = entry.guard_manager
                if (state := guards.extra_state) is not None:
                    state.invalidate(guards.cache_entry, DeletedGuardManagerWrapper(reason))
                return


# What has to be known of a call before Dynamo can trace it is learned by running the frame as Python, once. torch has nothing
# for that: a frame that is skipped is skipped for good, also for others that share its code, and what it calls is compiled.


class _Thread(threading.local):
    tracing = 0
    """How many frames Dynamo is converting, one in the other."""
    asked = False
    """Whether the frame that is being converted is to run as Python."""
    python = 0
    """How many frames are running as Python."""


thread = _Thread()


class _ThisOnce:
    """Is there while a frame runs as Python: Dynamo's C++ code keeps the answer that holds it until the frame returns."""

    def __init__(self) -> None:
        thread.python += 1

    def __del__(self) -> None:
        thread.python -= 1


def run_as_python(reason: str) -> NoReturn:
    """Have the frame that Dynamo is tracing run as Python this once, and all that it calls; see :func:`can_run_as_python`."""
    from torch._dynamo.exc import SkipFrame

    thread.asked = True
    skip = SkipFrame(reason)
    raise skip


def can_run_as_python() -> bool:
    """Whether what is being traced is the frame of a call: an export has none."""
    return thread.tracing > 0


def heed_requests_for_python() -> None:
    """Have Dynamo heed :func:`run_as_python`, from now on, or from when it is imported."""
    if "torch._dynamo.convert_frame" in sys.modules:
        _heed(sys.modules["torch._dynamo.convert_frame"])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Sees to what is to happen when Dynamo is imported: no frame can be converted before."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch._dynamo.convert_frame":
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _heed(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _heed(convert_frame: Any) -> None:
    """Wrap Dynamo's callback, such that the state of the code, which others may share, stays as it is."""
    plain = convert_frame.CatchErrorsWrapper.__call__
    if getattr(plain, "heeds_requests_for_python", False):
        return

    @functools.wraps(plain)
    def convert(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        outer, thread.asked = thread.asked, False
        state = dict(frame_state)
        thread.tracing += 1
        try:
            answer = plain(self, frame, cache_entry, frame_state)
        except Exception:
            if not thread.asked:
                raise
        finally:
            thread.tracing -= 1
            asked, thread.asked = thread.asked, outer
        if not asked:
            return answer
        frame_state.clear()
        frame_state.update(state)
        _count_as_compiled()
        return _this_once()

    # Dynamo looks past the frames of its own file for who called the frame that it is to convert.
    convert.__code__ = convert.__code__.replace(co_filename=plain.__code__.co_filename)  # type: ignore[attr-defined]
    convert.heeds_requests_for_python = True  # type: ignore[attr-defined]
    convert_frame.CatchErrorsWrapper.__call__ = convert


def _this_once() -> Any:
    """Tells Dynamo's C++ code to run a frame as it is, and to look at nothing that it calls."""
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.types import ConvertFrameReturn

    strategy = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.SKIP)
    answer = ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=False)
    answer.this_once = _ThisOnce()  # type: ignore[attr-defined]
    return answer


def _count_as_compiled() -> None:
    """Under ``fullgraph=True`` a call in which no frame was compiled is an error. torch 2.11 does not look."""
    count = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count is not None and (compiled := count(-1)) >= 0:
        count(compiled + 1)


def until_reset() -> dict[str, Any]:
    """A dictionary that ``torch._dynamo.reset()`` forgets."""
    from torch._dynamo.code_context import code_context

    return code_context.get_context(until_reset.__code__)


_TRACERS = ("torch._subclasses.fake_tensor", "torch.fx.experimental.proxy_tensor")


class _Tags(list[torch.Tag]):
    """Tags that say to tracers alone that the op draws: they run no such op on tensors whose values they know.

    Others would take the tag for more than that: AOTAutograd's partitioner saves random states around such an op.
    """

    def __contains__(self, tag: object) -> bool:
        drawn = tag is torch.Tag.nondeterministic_seeded or tag == torch.Tag.nondeterministic_seeded
        if drawn and sys._getframe(1).f_globals.get("__name__") in _TRACERS:
            return True
        return super().__contains__(tag)


def never_run_on_constants(op: OpOverload) -> None:
    """Have nobody run ``op`` for real while tracing, where its tensors are constants of the traced code."""
    op._tags = _Tags(op.tags)


def has_hint(number: Any) -> bool:
    """Whether one knows what a symbolic number is in the call that is being traced."""
    return isinstance(number, int | float) or number.node.hint is not None


def hint_of(number: Any) -> int:
    """The number that a symbolic int is in the call that is being traced."""
    return number if type(number) is int else int(number.node.hint)


def refuses_graph_breaks() -> bool:
    """Whether Dynamo, which is tracing the caller, was told ``fullgraph=True``."""
    transaction = _tracing()
    assert transaction is not None
    return bool(transaction.one_graph or transaction.error_on_graph_break)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler is tracing the op that takes ``tensor``: nothing is computed."""
    return isinstance(tensor, FakeTensor | FunctionalTensor)


def fresh_int(tensor: Any) -> Any:
    """An int that is known only at run time, in the fake implementation of an op that takes ``tensor``."""
    return tensor.fake_mode.shape_env.create_unbacked_symint()


PYTREE_NODES: Mapping[type, Any] = pytree.SUPPORTED_NODES
"""How classes that are registered with pytree are taken apart and put together: ``flatten_fn``, ``unflatten_fn``."""


@contextmanager
def ignore_fresh_symbols(tensors: Iterable[Any]) -> Iterator[None]:
    """Let code that reads values run on fake tensors, though no graph will hold the numbers that it makes."""
    modes = (getattr(tensor, "fake_mode", None) for tensor in tensors)
    env = next((mode.shape_env for mode in modes if mode is not None), None)
    if env is None:
        yield
    else:
        with env.ignore_fresh_unbacked_symbols():
            yield


# --- Dynamo's code, called without its guards -------------------------------------------------------------------------
# Checked on torch 2.11, 2.13, 2.14.1 and 2.15, Python 3.11 and 3.13.


def dynamo_frames(outer: FrameType) -> tuple[list[FrameType], list[FrameType]]:
    """The frames of code that Dynamo made, and those around the outermost of them: of what runs, up to ``outer``."""
    from torch._dynamo.convert_frame import output_codes

    made: list[FrameType] = []
    around: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not outer:
        if frame.f_code in output_codes:
            made.append(frame)
            around.clear()
        elif made:
            around.append(frame)
        frame = frame.f_back
    return made, around


def passes_on(frame: FrameType) -> bool:
    """Whether a frame belongs to what calls a module or a compiled function, and does nothing else unless there are hooks."""
    from torch._dynamo.eval_frame import OptimizedModule

    return frame.f_code in (_compile_wrapper(), OptimizedModule.__call__.__code__, *_MODULE_CALLS)


def owner_of_call(frame: FrameType) -> object:
    """Whose method runs in ``frame``, called by torch's own code: of a module, or of what was compiled; None if of nothing."""
    caller = frame.f_back
    if caller is None:
        return None
    if caller.f_code in _MODULE_CALLS:
        return caller.f_locals.get("self")
    return getattr(caller.f_locals.get("fn"), "__self__", None) if caller.f_code is _compile_wrapper() else None


def hooks_around(frames: Iterable[FrameType]) -> list[Mapping[Any, Any]]:
    """Where the hooks of the modules that ``frames`` call are kept, and those of all modules: empty while there are none."""
    called = [frame.f_locals["self"] for frame in frames if frame.f_code is not _compile_wrapper()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_all = torch.nn.modules.module
    return [
        *(getattr(module, kind) for module in dict.fromkeys(called) for kind in kinds),
        *(getattr(of_all, f"_global{kind}") for kind in kinds),
    ]


def graph_called_by(code: CodeType) -> str:
    """The global by which Dynamo's code calls its graph, if it calls one and nothing else that was compiled; else empty.

    Code that draws from Python's ``random`` before it calls the graph is no such code.
    """
    graphs = [name for name in code.co_names if name.startswith("__compiled_fn")]
    more = [name for name in code.co_names if name.startswith(("__resume_at", "__gen_rand"))]
    return graphs[0] if len(graphs) == 1 and not more else ""


def function_in(compiled: Any, frame: FrameType) -> FunctionType | None:
    """The function behind ``compiled`` whose code Dynamo made another of, which runs in ``frame``; None where that is not clear."""
    code = frame.f_code
    found = []
    for function in _parts(compiled)[1]:
        original = function.__code__
        same = all(getattr(original, name) == getattr(code, name) for name in _KEPT_OF_CODE)
        names = original.co_varnames[: argument_count(original)] == code.co_varnames[: argument_count(code)]
        cells = dict(zip(original.co_freevars, function.__closure__ or (), strict=True))
        closed = all(_content(cells[name]) is frame.f_locals.get(name) for name in original.co_freevars)
        if same and names and closed and function not in found:
            found.append(function)
    return found[0] if len(found) == 1 else None


_KEPT_OF_CODE = ("co_name", "co_qualname", "co_filename", "co_firstlineno", "co_freevars")
"""What Dynamo's code has of the code that it was made from."""


def argument_count(code: CodeType) -> int:
    """How many local variables of ``code`` are arguments, ``*args`` and ``**kwargs`` included."""
    star = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + star


def takes_any_keyword(code: CodeType) -> bool:
    """Whether ``code`` has a ``**kwargs``: it sees in which order a caller names arguments."""
    return bool(code.co_flags & inspect.CO_VARKEYWORDS)


def unguarded(function: FunctionType, code: CodeType, graph: Callable[..., Any]) -> FunctionType:
    """``function`` as Dynamo compiled it to ``code``, calling ``graph`` for its graph, and without guards.

    ``graph`` has a name among the globals of ``function``, as what Dynamo compiles has; it goes when the result does.
    """
    from torch._dynamo.eval_frame import skip_code

    name, suffix = graph_called_by(code), f"_bound_{next(_bound_numbers)}"
    others = {name: graph, "__import_torch_dot__dynamo_dot_utils": _UNRECORDED}
    code = code.replace(co_names=tuple(f"{known}{suffix}" if known in others else known for known in code.co_names))
    result = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    result.__kwdefaults__ = function.__kwdefaults__
    skip_code(code)  # it was compiled
    added = {f"{known}{suffix}": value for known, value in others.items()}
    function.__globals__.update(added)
    weakref.finalize(result, _take_out, function.__globals__, tuple(added)).atexit = False
    return result


def _take_out(names: dict[str, Any], added: Sequence[str]) -> None:
    for name in added:
        names.pop(name, None)


class _Unrecorded:
    """Dynamo's utilities, without the ranges that its code records around the reading of parameters: 3 us on torch 2.11."""

    @staticmethod
    def record_pregraph_bytecode_enter() -> None:
        """Begin no range."""

    @staticmethod
    def record_pregraph_bytecode_exit(_range: None) -> None:
        """End none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._dynamo.utils, name)


_UNRECORDED = _Unrecorded()
_bound_numbers = itertools.count()


def _reads_training(kind: type) -> bool:
    functions = [value for base in kind.__mro__ if base is not torch.nn.Module for value in vars(base).values()]
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    return any("training" in code.co_names for code in codes)


def may_read_training(module: torch.nn.Module) -> bool:
    """Whether it matters in which mode a module is: of torch's own, whether their code says ``training``; of others always."""
    kind = type(module)
    return not kind.__module__.startswith("torch.nn.modules.") or _reads_training(kind)


def graph_behind(function: FunctionType, code: CodeType) -> Callable[..., Any]:
    """What Dynamo's ``code`` of ``function`` calls for its graph, without what keeps Dynamo from tracing into it."""
    graph = function.__globals__[graph_called_by(code)]
    return cast(Callable[..., Any], getattr(graph, "_torchdynamo_orig_callable", graph))


def global_state() -> Callable[[], bool]:
    """Asks whether grad mode, autocast and torch's other global settings that Dynamo guards on are as they are now."""
    return torch._C._dynamo.guards.GlobalStateGuard().check


def tensors_like(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Asks, in one C++ call, whether tensors have the types, dtypes, devices, layouts and so on of ``tensors``, in order.

    They have to be different objects, as ``tensors`` are.
    """
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = torch._C._dynamo.guards.TensorGuards
    return cast(Callable[..., bool], guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check)


def function_modes() -> list[Any]:
    """The modes that see torch functions, as ``torch.set_default_device`` makes one."""
    return [torch._C._get_function_stack_at(number) for number in range(torch._C._len_torch_function_stack())]


number_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
number_of_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
frame_callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""What compiles the frames that run in this thread now; None: nothing."""


# --- tools ------------------------------------------------------------------------------------------------------------

profiler_enabled: Callable[[], bool] = torch._C._autograd._profiler_enabled
"""Whether a profiler, or ``emit_nvtx``, is active in this thread."""


def current_compile_id() -> Any:
    """Which compilation of Dynamo's is under way, for :func:`trace_artifact`; None outside of one."""
    return CompileContext.current_compile_id()


def current_compilation() -> object:
    """What stands for the compilation of Dynamo's that is under way, and dies with it."""
    return CompileContext.get()


def recompile_reason() -> str | None:
    """Why Dynamo compiles again what it compiled before; None for the first time, and outside of a compilation."""
    if current_compile_id() is None:
        return None
    from torch._dynamo.utils import get_metrics_context

    return cast(str | None, get_metrics_context()._metrics.get("recompile_reason"))


def trace_artifact(name: str, encoding: str, payload: Callable[[], str], compile_id: Any) -> None:
    """A file in the trace that ``TORCH_TRACE`` asks for; ``payload`` is not called where there is none."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        compile_id=compile_id,
        expect_trace_id=False,
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def below_autograd(op: OpOverload, keys: Any, *args: Any) -> Any:
    """Call ``op`` as an autograd kernel does that is done with its part; ``keys`` is what it was given."""
    return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, which has no types."""
    return function.apply(*args)


@contextmanager
def above_autograd() -> Iterator[None]:
    """Have ops run as from the user's code: also in the kernel of an op that autograd, or a dispatch mode, called."""
    with _seen_again("AutogradFunctionality", *_HIDDEN_BY_MODES):
        yield


@contextmanager
def composites_as_ops() -> Iterator[None]:
    """Have composite ops reach dispatch modes whole, as under inference mode: autograd, which takes them apart, is left out."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, True):
        yield


def with_autograd() -> AbstractContextManager[None]:
    """The way back, for code within that records gradients itself."""
    return _seen_again("AutogradFunctionality")


_HIDDEN_BY_MODES = ("ADInplaceOrView", "Conjugate", "Negative", "ZeroTensor")
"""What the dispatcher leaves out around a mode: a view is not known for one there, and a lazy ``conj()`` is read as it lies."""


@contextmanager
def _seen_again(*keys: str) -> Iterator[None]:
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(getattr(torch._C.DispatchKey, key), False))
        yield


def saves_through_hooks() -> bool:
    """Whether what is saved for backward passes ``saved_tensors_hooks`` now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether gradients of ``tensor`` pass somebody's hooks."""
    return bool(tensor._backward_hooks)


def owners_of_storage(tensor: torch.Tensor) -> int:
    """How many tensors lie in the storage of ``tensor``, views and detached ones that C++ keeps included."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) - 1  # one for the object that was asked


def base_of_view(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor that autograd takes ``tensor`` for a view of."""
    return tensor._base


def swapped(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """A module with other parameters and buffers, under all names that each has, for the time of a ``with`` statement."""
    return _reparametrize_module(module, dict(tensors), tie_weights=True)


# --- symbols ----------------------------------------------------------------------------------------------------------


_NO_SYMBOLS: frozenset[Any] = frozenset()


def free_symbols(value: Any) -> Any:
    """The symbols in a number, a fake tensor, or several."""
    if type(value) in (FakeTensor, torch.Tensor) and not value._has_symbolic_sizes_strides:
        return _NO_SYMBOLS  # nearly always, and told in no time
    if type(value) in (list, tuple):
        return _NO_SYMBOLS.union(*map(free_symbols, value))
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_symbols(value)


def evaluate(value: Any, symbols: Mapping[sympy.Symbol, int]) -> Any:
    """The plain number that a backed ``SymInt``, ``SymFloat`` or ``SymBool`` has under ``symbols``; others unchanged."""
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    import sympy

    result = sympy.sympify(value.node.expr).xreplace({s: sympy.Integer(v) for s, v in symbols.items()})
    if isinstance(value, torch.SymInt):
        return int(result)
    return float(result) if isinstance(value, torch.SymFloat) else bool(result)


def numbers_of(values: Sequence[Any], symbols: Sequence[sympy.Symbol]) -> Callable[..., tuple[int, ...]]:
    """A function that takes what ``symbols`` are and returns what ``values``, ints or ``SymInt`` of them, then are."""
    from torch.utils._sympy.printers import PythonPrinter

    texts = [PythonPrinter().doprint(v.node.expr) if isinstance(v, torch.SymInt) else str(v) for v in values]
    text = f"lambda {', '.join(map(str, symbols))}: ({''.join(f'{text}, ' for text in texts)})"
    function: Callable[..., tuple[int, ...]] = eval(text, {"math": math, "torch": torch})
    return function


def symbols_made(node: fx.Node) -> frozenset[sympy.Symbol]:
    """The unbacked symbols that the call of a node made when it was traced, replaced since or not."""
    return frozenset(node.meta.get("unbacked_bindings") or ())


def is_ragged(value: Any) -> bool:
    """Whether ``value`` stands for the lengths of a jagged nested tensor: an int that ``int()`` does not take."""
    return isinstance(value, torch.SymInt) and bool(value.node.is_nested_int())


def is_argument_float(value: Any) -> bool:
    """Whether a number is a float argument of the compiled function, as Dynamo hands it over once it has varied."""
    if not isinstance(value, torch.SymFloat):
        return False
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    return symbol_is_type(value.node.expr, SymT.FLOAT)


def lazy_module(attributes: Mapping[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module without code until somebody asks: see :func:`make_code`."""
    return _LazyGraphModule(dict(attributes), graph, name)


def make_code(module: fx.GraphModule) -> None:
    """Have ``module`` make its code, if it has none yet."""
    if isinstance(module, _LazyGraphModule):
        module.real_recompile()


def symbol_of(value: torch.SymInt) -> sympy.Symbol | None:
    """The symbol that ``value`` consists of, if it is nothing else."""
    expr = value.node.expr
    return expr if expr.is_Symbol else None


# --- tensors ----------------------------------------------------------------------------------------------------------

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Without the context manager that ``torch.set_grad_enabled`` makes."""


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also for fake tensors; valid while the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def extent(shape: Iterable[Any], stride: Iterable[Any]) -> Any:
    """How many elements lie between the first and the last of such a tensor, both included. A symbolic size is not 0."""
    length = 1
    for size, step in zip(shape, stride, strict=True):
        if type(size) is int and size == 0:
            return 0
        length += (size - 1) * step
    return length


def layout_check(like: torch.Tensor) -> Callable[[Any], bool] | None:
    """Whether a value is a plain tensor that lies as ``like`` does, asked in one call into C++: 0.14 us, where Python takes 0.7.

    It says no too often (a parameter, another mode, lazily conjugated), and yes only if it is so. None where this torch
    has no such check. Checked on torch 2.11 to 2.15.
    """
    guards = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if guards is None:
        return None
    shape, stride = list(like.shape), list(like.stride())
    check: Callable[[Any], bool] = guards(like, dynamic_dims_sizes=[shape], dynamic_dims_strides=[stride]).check
    return check


def _are_at(tensors: list[Any], pointers: list[int], indices: list[int]) -> bool:
    data_ptr = torch.Tensor.data_ptr
    return [data_ptr(tensors[index]) for index in indices] == [pointers[index] for index in indices]


are_at: Callable[[list[Any], list[int], list[int]], bool] = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", _are_at
)
"""Whether the tensors at ``indices`` of a list begin at the addresses at the same indices of the other list.

One call into C++, where torch is built for CUDA: 0.12 us for each (H100, torch 2.11).
"""


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def unowned_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Another storage over the same memory, which does not keep it alive."""
    return storage_at(storage.data_ptr(), storage.nbytes(), storage.device)


def storage_at(address: int, num_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """A storage over memory that it does not own."""
    return cast(torch.UntypedStorage, torch._C._construct_storage_from_data_pointer(address, device, num_bytes))


def twin_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Another storage over the same memory, which it keeps alive. So one can tell who holds on to which of the two."""
    with torch.inference_mode(False), torch.no_grad():
        return storage_of(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))


def storage_of(octets: torch.Tensor) -> torch.UntypedStorage:
    """A storage of its own that begins where ``octets``, a slice of some memory, does; it keeps that memory alive."""
    with torch.inference_mode(False), torch.no_grad():
        return from_dlpack(torch._C._to_dlpack(octets)).untyped_storage()


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for many, or for a derivative, under ``torch.func.vmap`` and its like."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def lazy_bits(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether reading ``tensor`` conjugates, and negates, what is in memory."""
    return tensor.is_conj(), tensor.is_neg()


def with_lazy_bits(tensor: torch.Tensor, bits: tuple[bool, bool]) -> torch.Tensor:
    """A view of ``tensor``, which has neither bit, with ``bits``."""
    conjugated, negated = bits
    tensor = tensor.conj() if conjugated else tensor
    return negated_view(tensor) if negated else tensor


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view with every value negated when it is read."""
    return torch._neg_view(tensor)


copy_together: Callable[[list[torch.Tensor], list[torch.Tensor]], None] = torch._foreach_copy_
"""One launch for many copies, bits kept or not: see ``buffers.fused_as``."""


def foreach_copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """One launch for many copies of one dtype and device."""
    if len(targets) == 1:
        targets[0].copy_(sources[0])  # which keeps all bits of all dtypes
    else:
        copy_together(targets, sources)


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


# --- ops --------------------------------------------------------------------------------------------------------------


def overloads(target: Any) -> list[OpOverload]:
    """The overloads behind an op as it stands in a graph: an overload, or a packet of them."""
    if isinstance(target, OpOverload):
        return [target]
    if isinstance(target, OpOverloadPacket):
        return [getattr(target, name) for name in target.overloads()]
    return []


def schema_name(op: Any) -> str:
    """``ns::op`` of an overload, which tables of ops hold; empty for all else."""
    return op._overloadpacket._qualified_op_name if isinstance(op, OpOverload) else ""  # the schema's takes 1 us


def op_names() -> list[str]:
    """The qualified names, with overloads, of all registered ops."""
    return [str(name) for name in torch._C._dispatch_get_all_op_names()]


def find_overloads(name: str) -> list[OpOverload]:
    """The overloads named ``ns::op`` (all of them) or ``ns::op.overload`` (one); empty if there is no such op."""
    namespace, _, rest = name.partition("::")
    packet_name, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), packet_name, None) if namespace and packet_name else None
    if packet is None:
        return []
    if not overload:
        return overloads(packet)
    found = getattr(packet, overload, None) if overload in packet.overloads() else None
    return [found] if found is not None else []


def out_of_place(op: OpOverload) -> OpOverload | None:
    """The view that ``t_``, ``squeeze_`` and so on make in place; None for those that move storages."""
    name = op._schema.name.removeprefix("aten::")
    found = find_overloads(f"aten::{name.removesuffix('_')}") if name.endswith("_") else []
    return next((view for view in found if view.is_view and _arguments(view) == _arguments(op)), None)


def _arguments(op: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


def python_implementation(op: OpOverload, device_type: str) -> Callable[..., Any] | None:
    """The Python function behind a ``torch.library.custom_op`` on ``device_type``.

    Calling it skips the dispatcher, 11 of 27 us a call (H200, torch 2.11). None where there is no such function, or
    where it is not the same thing. Ops made with ``Library.impl`` keep their function inside the dispatcher.
    """
    definition = OPDEFS.get(op._schema.name)
    if definition is None or op is not definition._opoverload:
        return None
    kernels = definition._backend_fns
    kernel = kernels.get(device_type, kernels.get(None))
    if kernel is None or definition._disabled_kernel:
        return None
    function = inspect.getclosurevars(inspect.unwrap(kernel)).nonlocals.get("fn")
    return function if callable(function) else None


# --- for the tape driver ----------------------------------------------------------------------------------------------


def kernel_made_of_ops(
    op: OpOverload, args: Sequence[Any], device_type: str, autocast: Sequence[str] = (), *, watching: bool = False
) -> Callable[..., Any] | None:
    """The kernel of ``op``, if all that it does is to call other ops: a composite, or Python registered by a library.

    Called so, and not through ``op``, it runs under the dispatch modes that are active, and they see those ops.
    Composites are taken apart above the modes, except under inference mode. Python for a GPU is not trusted to call ops
    only: what it launches by itself, as with Triton, no mode would see. ``autocast``: device types that Python for an op
    sees an autocast of; a mode runs with none. ``watching``: the caller runs the kernel whatever it launches.
    """
    name, key = op.name(), device_type.upper()
    kinds = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    kind = next((kind for kind in kinds if torch._C._dispatch_has_kernel_for_dispatch_key(name, kind)), None)
    registered = f"{op.namespace}/{name.partition('::')[2]}/{kind}" in torch.library._impls
    in_python = registered and op.namespace != "aten" and (device_type == "cpu" or watching)
    if kind != "CompositeImplicitAutograd" and not in_python:
        return None
    # A redispatch takes no number for a tensor, as a call does. Such a call has a number for its result: a constant.
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(argument.type, torch.TensorType) and isinstance(value, bool | int | float | complex):
            return None
    seen = [f"Autocast{kind.upper()}" for kind in autocast if in_python]
    return functools.partial(_run_kernel, op, torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), seen)


def _run_kernel(op: OpOverload, keys: Any, seen: Sequence[str], /, *args: Any, **kwargs: Any) -> Any:
    # The dispatcher excludes ADInplaceOrView around a mode, as eager does not around a kernel: without it a view of a
    # parameter requires no grad, and matmul takes another path.
    with _seen_again(*_HIDDEN_BY_MODES, *seen):
        return op.redispatch(keys, *args, **kwargs)


def written_by_kernel(kernel: Any, constants: Any, named: Mapping[str, Any], descriptors: Any) -> list[str]:
    """The names, among ``named``, of the tensors that a user's Triton kernel writes; all of them where nobody can tell.

    ``kernel`` and ``constants`` are numbers in torch's table of kernels, as they stand in a graph. What autotuning sets to
    zero is written too. Looked at on torch 2.11, 2.13, 2.14.1 and 2.15.
    """
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table

    tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    tuner = kernel_side_table.get_kernel(kernel)
    found = {
        *get_mutated_tensors(kernel, constants, dict(named), descriptors),
        *(getattr(tuner, "reset_to_zero", None) or ()),
    }
    return [name for name in tensors if name in found]


def wait_tensor() -> OpOverload:
    """The op that waits for what a collective makes."""
    (op,) = find_overloads("_c10d_functional::wait_tensor")
    return op


def before_groups_end(release: Callable[[], None]) -> None:
    """Have ``release`` called before a process group gives up its communicators.

    NCCL waits, without end, until all graphs that hold its work are gone. (torch 2.11 to 2.15)
    """
    group = torch.distributed.ProcessGroup
    shutdown = group.shutdown

    @functools.wraps(shutdown)
    def released(*args: Any, **kwargs: Any) -> Any:
        release()
        return shutdown(*args, **kwargs)

    group.shutdown = released  # type: ignore[method-assign]


def results_like(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call of ``op`` would return, without the call: its arguments where it returns those, else empty tensors."""
    mode = FakeTensorMode()
    given: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        made = mode.from_tensor(tensor)
        given[storage_key(made)] = tensor
        return made

    def real(made: torch.Tensor) -> torch.Tensor:
        if storage_key(made) in given:
            return given[storage_key(made)]
        return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)

    fakes = pytree.tree_map_only(torch.Tensor, fake, (tuple(args), dict(kwargs)))
    with mode:
        results = op(*fakes[0], **fakes[1])
    return pytree.tree_map_only(torch.Tensor, real, results)


def is_region(op: Any) -> bool:
    """Whether a higher-order op is a call of a region that is compiled once: ``invoke_subgraph``."""
    return isinstance(op, HigherOrderOperator) and op.name() == "invoke_subgraph"


def dense_kernel(op: HigherOrderOperator) -> Callable[..., Any]:
    """The Python function that runs a higher-order op on plain tensors."""
    return op.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]


def same_generator(a: torch.Generator, b: torch.Generator) -> bool:
    """Whether two objects are one generator: the dispatcher hands out a new Python object each time."""
    return bool(a._cdata == b._cdata)  # type: ignore[attr-defined]


def live_storage(ref: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage behind a weak reference, None once it was freed."""
    return torch.UntypedStorage._new_with_weak_ptr(ref.cdata)


# --- CUDA -------------------------------------------------------------------------------------------------------------

demangle: Callable[[str], str] = torch._C._demangle
"""A C++ symbol as C++ spells it; what is none comes back as it is."""

# A CPU build lacks these names; the CUDA driver is the only one to call them.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)
clear_cublas_workspaces: Callable[[], None] = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
is_stream_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)

ONE_CAPTURE_STATE: bool = torch.__version__ < "2.13"  # a TorchVersion, which compares as versions do
"""Whether a CUDA generator has one capture state for all graphs (torch 2.11), or one for each capture (2.13)."""


def keep_for_ever(thing: Any) -> None:
    """Never destroy ``thing``, not even at the end of the process: its destructor could fail there, or abort."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def launch_hooks(graph: torch.cuda.CUDAGraph) -> tuple[Mapping[int, Any], ...]:
    """Where hooks on launches of ``graph`` are kept, which ``CUDAGraph.replay`` calls. Read on 2.14.1 and 2.15.0; 2.13 has none."""
    module: Any = torch.cuda.graphs
    if not hasattr(module, "_global_replay_start_hooks"):
        return ()
    own: Any = graph
    return (
        *(module._global_replay_start_hooks, module._global_replay_end_hooks),
        *(own._replay_start_hooks, own._replay_end_hooks),
    )


def release_pool(device: int, pool: tuple[int, int]) -> None:
    """Give up one use of ``pool``: that of a graph whose ``capture_end`` failed, which will never give it up itself."""
    torch._C._cuda_releasePool(device, pool)


@contextmanager
def allocating_to_pool(device: int, pool: tuple[int, int]) -> Iterator[None]:
    """Have this thread allocate in ``pool``, which is in use and stays so. Read on 2.11, 2.13, 2.14.1 and 2.15."""
    torch._C._cuda_beginAllocateCurrentThreadToPool(device, pool)
    try:
        yield
    finally:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def stop_allocating_to_pool(device: int, pool: tuple[int, int]) -> bool:
    """End the routing of allocations into ``pool`` that a failed capture leaves behind; whether there was any."""
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError as error:
        if "not currently recording" not in str(error):
            raise
        return False
    return True
