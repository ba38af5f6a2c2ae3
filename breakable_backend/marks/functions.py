"""Any Python function as an eager step: ``@eager_on_graph``.

Outside of a capture a marked function is the function itself. Under ``capture`` a call is an eager step. Under
``torch.compile``, with any backend, a call is one opaque node, into which Dynamo does not look.
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, TypedDict, TypeVar, Unpack, overload

import torch

from breakable_backend import _torch, active
from breakable_backend.errors import OptionsError, PartitionError, defined_at, first_line, shown, warn_user
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.running_ops import has_memory
from breakable_backend.marks.backward import recomputed, with_backward
from breakable_backend.marks.call_ops import writing_op
from breakable_backend.marks.call_sites import (
    CHANGED_A_CONTAINER,
    GIVE_FAKE,
    WATCHED_AN_ARGUMENT,
    Site,
    learned_from,
    learned_of,
    numbers,
    run_inline,
    see_result,
    sites,
    why_a_break,
)
from breakable_backend.marks.call_sites import Mark as Mark
from breakable_backend.marks.changes import looking_at
from breakable_backend.marks.learning import WITHOUT_FULLGRAPH, Asked, Given
from breakable_backend.marks.structure import (
    LEAVE_IT_IN_PLACE,
    MOVED_AN_ARGUMENT,
    Structure,
    contents,
    differences,
    for_dynamo,
    foreign,
    instances_in,
    is_changed,
    leaves_of,
    module_leaves,
    places_of,
    put_together,
    taken_apart,
    view_of,
    where_they_lie,
    with_leaves,
)

CURED = "; to keep one program: "
"""Between the reason why a marked function is no node, which Dynamo is given, and what to do."""
BY_FUNCTION = "eager_on_graph"
"""The name of the mark for functions. Under other names modules are called."""
WROTE_AN_ARGUMENT = "it wrote a tensor that it was given, and nothing says which ones it writes"
NAME_THEM = "name them: @eager_on_graph(mutates_args=...)"
NAME_WHAT_IT_WRITES = "call it in a function that is marked by @eager_on_graph(mutates_args=...)"
CALLED_OTHERWISE = "code calls it with other arguments while it is traced"
PASS_THE_SAME = (
    "pass the same arguments in both, such as a mask that was made before the compiled call; for the attention of "
    "transformers that is an attention_mask of four dimensions"
)
MARKED_ANEW = "eager_on_graph marks a new function at each call of the code around it"
MARK_ONCE = (
    "use the decorator where it runs once, at the top of a module or in __init__, and not in code that is compiled"
)

IS_OF_TYPE = "is, or holds, an object of type"
"""Between the name of an argument that no graph can hold, and its type."""
WRITES_WHAT_NEEDS_GRADIENTS = "it writes a tensor that needs gradients"
UNDER_A_TRANSFORM = "it was called under a transform of torch.func, such as vmap or grad"

F = TypeVar("F", bound=Callable[..., Any])


class MarkOptions(TypedDict, total=False):
    """The options of :func:`eager_on_graph`, besides ``enable``."""

    mutates_args: tuple[str, ...]
    host_only: bool
    recompute: bool
    fake: Callable[..., Any] | None
    capture_stub: Callable[..., Any] | None
    barrier: Callable[[], None] | None
    backward: Callable[..., Any] | None


@overload
def eager_on_graph(function: F, /) -> F: ...
@overload
def eager_on_graph(enable: bool = True, /, **options: Unpack[MarkOptions]) -> Callable[[F], F]: ...
@overload
def eager_on_graph(*, enable: bool, **options: Unpack[MarkOptions]) -> Callable[[F], F]: ...
def eager_on_graph(function: Any = None, /, **options: Any) -> Any:  # noqa: D417 - see overloads
    """Have a Python function run eagerly between captured segments, in every call and on real tensors.

    >>> @eager_on_graph
    ... def clip(x):
    ...     return x / x.norm() if x.norm() > 1 else x + 0
    >>> clip(torch.tensor([0.6, 0.8, 0.0]))
    tensor([0.6000, 0.8000, 0.0000])

    Args:
        function: a function, method, static method or lambda. ``Class.method.run_eager(instance, ...)`` calls a marked
            method without a break.
        enable: False returns ``function`` itself. It may also stand alone in the place of ``function``, as in
            ``eager_on_graph(False)(f)``.
        mutates_args: names of the tensor arguments that it writes, such as a cache; for a module, its buffers.
        fake: a function with the same signature that runs on fake tensors under ``torch.compile`` and returns the
            layout of the result. Without it the first call runs as plain Python, and the layout is learned from it.
        host_only: whether plain values in its result, and plain attributes of objects in it, may change between replays
            of a ``capture``. Captured code does not use them then.
        capture_stub: called instead of the function while capturing, with the same arguments.
        barrier: called before the function while capturing, such as a barrier of ranks; after the barrier of
            ``capture``.
        recompute: whether the function runs again in the backward, from the same random state and autocast, so that its
            intermediate results are not kept until then.
        backward: computes its gradients, for a body that autograd cannot follow; see below.

    **Arguments and results** under ``torch.compile`` are tensors and plain values (int, float, bool, str, None), in
    lists, tuples, dicts with string keys, named tuples, dataclasses and classes registered with pytree. Arguments may
    also be modules, such as ``self`` of a method. A call with other arguments, or one that writes a tensor which needs
    gradients, is a graph break of Dynamo's, and with ``fullgraph=True`` a :class:`PartitionError`. An int in the result
    is known only at run time. Other plain values are constants. If they, or layouts, differ from call to call, the call
    is a graph break from then on.

    **Gradients** flow to tensor arguments, and to parameters of modules among the arguments. They do not flow to what
    the function closes over: in compiled code that is an error. With ``backward`` the body runs without autograd.
    ``backward(context, *grads)`` gets ``context.args``, ``context.kwargs`` and ``context.result`` of the same call, and
    a gradient (or None) for each item of a result that is a tuple, or for the result. As with
    ``torch.library.register_autograd``, it returns one gradient (or None) for each argument: for a container in the
    shape of the container, for a module a dict by the names of its parameters.

    **Lifetimes.** A later replay overwrites the tensor arguments, so a function that stores one has to store a
    ``clone()``. A tensor that the function keeps and also returns reaches compiled code as a copy.

    Raises:
        OptionsError: not a function, ``enable`` is not a bool or is passed twice, ``mutates_args`` names no parameter
            of the function, or both ``recompute`` and ``backward`` are passed.
        PartitionError: in the compiled call with ``fullgraph=True``: no graph can hold the arguments or the result, or
            the layout of the result differs from call to call. Also if ``fake`` reads values.
        EagerOutputError: in the compiled call: the result differs from what ``fake`` or earlier calls returned.
    """
    if isinstance(function, bool):
        if "enable" in options:
            raise OptionsError("eager_on_graph got enable twice", fix="eager_on_graph(True) or enable=True")
        function, options = None, {**options, "enable": function}
    enable = options.pop("enable", True)
    if not isinstance(enable, bool):
        raise OptionsError(f"enable takes True or False, got {shown(enable)}", fix="pass a bool")
    if function is None:
        return functools.partial(_mark, enable=enable, options=options)
    return _mark(function, enable=enable, options=options)


def marked_as(function: Callable[..., Any], by: str, **options: Any) -> Callable[..., Any]:
    """``function`` marked as by :func:`eager_on_graph`. Reports say that ``by`` has marked it."""
    made: Callable[..., Any] = _mark(function, enable=True, options=options, by=by)
    return made


@_torch.break_of_dynamo(MARKED_ANEW)
def _mark(function: Any, *, enable: bool, options: dict[str, Any], by: str = BY_FUNCTION) -> Any:
    if not enable:
        return function
    if isinstance(function, staticmethod | classmethod):
        return type(function)(_mark(function.__func__, enable=enable, options=options))
    _check_function(function)
    if hasattr(function, "cache_info"):  # of functools.lru_cache
        function = _asked_for_no_tensor(function)
    _check_options(options)
    _check_names(function, options.get("mutates_args", ()))
    source = defined_at(function)
    name = getattr(function, "__qualname__", type(function).__name__)
    if by == BY_FUNCTION and "<locals>" in name:
        _warn_if_marked_anew(function, name)
    mark = Mark(_with_gradients(function, options), name, source, original=function, by=by, **options)
    function = mark.function
    uncompiled: dict[str, Callable[..., Any]] = {}
    """The functions for Dynamo to call at a break, by the reason. One is made when Dynamo asks for it, since the import
    that it needs takes a second."""
    identity, parameters = f"marked function {next(_identities)}", _parameters(function)
    """Dynamo guards on this value. Of a function, also of one that it takes for a constant, Dynamo guards only the
    code, which two marked functions may share."""
    held, is_compiling = active.handler.held.get, torch.compiler.is_dynamo_compiling
    exporting, thread = torch.compiler.is_exporting, _torch.thread
    frame_callback, set_frame_callback = _torch.frame_callback, _torch.set_frame_callback

    if mark.fake is None:
        _torch.heed_requests_for_python()

    @_torch.constant_under_dynamo
    def site_number(structure: Structure, _identity: str) -> tuple[int, str]:
        return _site(mark, structure)  # Dynamo passes no frozen dataclass to such a function (torch 2.11)

    @_torch.constant_under_dynamo
    def refuse(why: str) -> None:
        learned = why_a_break(mark, why)
        if why not in uncompiled:
            reason = f"{name}, {mark.why}, is no node: {why}"
            if learned is not None:
                reason += CURED + learned.cure.removesuffix(WITHOUT_FULLGRAPH)
            uncompiled[why] = torch.compiler.disable(functools.partial(run_inline, function), reason=reason)
        if _torch.refuses_graph_breaks():
            cure = learned.cure if learned else CALL_IT_OUTSIDE if why == UNDER_A_TRANSFORM else PASS_WHAT_PYTREE_KNOWS
            refused = PartitionError(f"{name} cannot be one node: {why}", where=source, fix=cure)
            refused.__context__ = learned.error if learned else None  # Dynamo raises it again, without its cause
            raise refused

    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            why, call = _plan(site_number, identity, parameters, args, kwargs)
            if why:
                refuse(why)
                return uncompiled[why](*args, **kwargs)
            return _opaque(call)
        if held() is None or (handler := active.handler.get()) is None:
            if exporting():
                warn_user(
                    f"torch.export takes {name} apart, though it is {mark.why}: the exported program has no "
                    "mark; export with strict=True, which keeps it"
                )
            if thread.python:
                return _learn(mark, args, kwargs)
            if frame_callback() is None:
                return function(*args, **kwargs)
            before = set_frame_callback(None)  # a frame that Dynamo leaves alone: it would compile the body instead
            try:
                return function(*args, **kwargs)
            finally:
                set_frame_callback(before)
        return handler.call(mark, args, kwargs)

    marked.run_eager = function  # type: ignore[attr-defined]
    marked.mark = mark  # type: ignore[attr-defined]
    return marked


_identities = itertools.count()

_marked_anew: weakref.WeakSet[CodeType] = weakref.WeakSet()
"""The code of functions that a warning has named, so that each is named once."""


def _warn_if_marked_anew(function: Any, name: str) -> None:
    """Warn if a compiled function is running: it would mark another function at each call, and learn each from nothing."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None and code not in _marked_anew and next(_torch.running_compiled(), None) is not None:
        _marked_anew.add(code)
        warn_user(f"{name} is marked inside of a compiled function. {MARKED_ANEW}: {MARK_ONCE}")


PASS_WHAT_PYTREE_KNOWS = f"pass tensors, modules and plain values, in containers that pytree knows{WITHOUT_FULLGRAPH}"
CALL_IT_OUTSIDE = f"call it outside of vmap and its like, on tensors{WITHOUT_FULLGRAPH}"


def _parameters(function: Any) -> tuple[str, ...]:
    """The names of the positional parameters; empty if they are not known, as for many builtins."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in found if parameter.kind in kinds)


def _with_gradients(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    recompute, backward = options.get("recompute", False), options.get("backward")
    if recompute and backward is not None:
        raise OptionsError("recompute and backward exclude each other", fix="compute again in backward what it needs")
    if backward is not None:
        return with_backward(function, backward)
    return recomputed(function) if recompute else function


_OPTIONS = tuple(MarkOptions.__annotations__)
_CALLED = ("fake", "capture_stub", "barrier", "backward")


def _check_function(function: Any) -> None:
    if not callable(function) or isinstance(function, type):
        raise OptionsError(
            f"eager_on_graph marks functions, not {shown(function)}",
            fix="mark a function or a method; all modules of a class are marked by mark_eager(TheClass)",
        )
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise OptionsError(
            f"eager_on_graph marks functions that return their result, and {function.__qualname__} is asynchronous",
            fix="mark a plain function, and await outside of it",
        )


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            nearest = "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, _OPTIONS, 1))
            fix = f"it takes: enable, {', '.join(_OPTIONS)}"
            raise OptionsError(f"eager_on_graph takes no {name!r}{nearest}", fix=fix)
        if name in _CALLED and value is not None and not callable(value):
            raise OptionsError(
                f"{name} takes a function, got {shown(value)}", fix=f"pass a function as {name}, or None"
            )


def _check_names(function: Callable[..., Any], names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise OptionsError(f"mutates_args takes a tuple of names, got {names!r}", fix=f"mutates_args=({names!r},)")
    known = list(inspect.signature(function).parameters) if names else []  # builtins have no signature
    for name in names:
        if name not in known:
            raise OptionsError(f"mutates_args: there is no parameter {name!r}", fix=f"parameters: {', '.join(known)}")


def _asked_for_no_tensor(cached: Callable[..., Any]) -> Callable[..., Any]:
    """``cached``, a function under a cache, which would return an old result for a tensor with new values."""

    @functools.wraps(cached)
    def asked(*args: Any, **kwargs: Any) -> Any:
        if next(instances_in((args, kwargs), torch.Tensor), None) is not None:
            raise OptionsError(
                f"{cached.__qualname__} keeps its results by its arguments, which are the same tensors in each replay",
                where=defined_at(cached),
                fix="mark the function in the cache: functools.lru_cache(eager_on_graph(function))",
            )
        return cached(*args, **kwargs)

    return asked


SiteNumber = Callable[[Structure, str], tuple[int, str]]
"""Given the structure of a call's arguments and its mark's identity, the number of its site, or why there is none."""

# --- one opaque node ----------------------------------------------------------------------------------------------------
# Dynamo traces `_opaque` and what it calls, down to the call of the op.


def _plan(
    site_number: SiteNumber, identity: str, parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any]:
    """Why a call cannot be one node, empty if it can; and the arguments of its op."""
    places: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        other = foreign(value)
        if other:
            name = place if isinstance(place, str) else parameters[place] if place < len(parameters) else place + 1
            return f"argument {name} {IS_OF_TYPE} {other}", None
    structure, given, ints, floats = taken_apart((args, kwargs))
    site, why = site_number(structure, identity)
    if why:
        return why, None
    order, num_written = _order(site)
    tensors = [given[place] for place in order]
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors[:num_written]]):  # noqa: C419 - traced
        return WRITES_WHAT_NEEDS_GRADIENTS, None
    return "", (site, num_written, tensors, ints, floats)


def _opaque(call: Any) -> Any:
    site, num_written, tensors, ints, floats = call
    if num_written == 0:
        made = torch.ops.breakable_cg.call(site, [], False, tensors, ints, floats)
    else:
        needs = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
        torch.ops.breakable_cg.shapes(site, needs if any(needs) else [], tensors, ints, floats)
        op = getattr(torch.ops.breakable_cg, _writer(site))
        made = op(site, [], False, *tensors[:num_written], tensors[num_written:], ints, floats)
        made = [made] if isinstance(made, torch.Tensor) else made
    structure = _result(site)

    def leaf(place: Structure) -> Any:
        kind = place[0]
        if kind == "plain":
            return place[1]
        if kind == "int":
            return torch.ops.breakable_cg.number(site, made[place[2]], place[1])
        if kind == "view":
            return view_of((tensors if place[1] == "argument" else made)[place[2]], place)
        tensor = (tensors if kind == "argument" else made)[place[1]]
        return tensor.detach() if place[2] else tensor

    return put_together(structure, leaf)


def _site(mark: Mark, structure: Structure) -> tuple[int, str]:
    """The number of the call of ``mark`` that Dynamo is tracing; or why the call cannot be one node."""
    if _torch.functorch_active():
        return 0, UNDER_A_TRANSFORM
    modules: dict[int, weakref.ref[torch.nn.Module]] = {}
    number = next(numbers)
    for leaf in module_leaves(structure):
        # Dynamo guards on the module's identity and holds it while it traces.
        module = ctypes.cast(leaf[1], ctypes.py_object).value
        modules[leaf[1]] = weakref.ref(module, lambda _: mark.sites.pop(number, None))
    arguments, order, num_written = _arranged(mark, structure)
    modes = Modes.traced()
    learned = learned_of(mark, (arguments, modes), modules.keys())
    raises = learned.raised and _torch.refuses_graph_breaks()  # eager raises too, so this is no other error
    if learned.in_vain >= MAX_IN_VAIN and not learned.why_not and not raises:
        learned.why_not = learned.raised or _called_otherwise(mark, arguments)
        learned.cure = GIVE_FAKE if mark.by == BY_FUNCTION else PASS_THE_SAME
    if learned.why_not:
        return 0, learned.why_not
    try:
        asked = mark.known.setdefault(_torch.current_compilation(), {})
        known = asked.setdefault((arguments, modes), {})
    except TypeError:  # a pytree node with a context that cannot be hashed
        known = {}
    site = Site(number, mark, arguments, order, num_written, modes, modules, known, learned)
    sites[number] = site
    if not _torch.keep_with_code(site):
        mark.sites[number] = site
    return number, ""


MAX_IN_VAIN = 4
"""After so many calls that ran as Python without any call of the function as in traced code, it is a graph break."""


def _called_otherwise(mark: Mark, arguments: Structure) -> str:
    """Why nothing was learned of a call; with what it was given, and what the most similar call as Python was given."""
    seen = [differences(arguments, other, _parameters(mark.body)) for other in learned_from(mark)]
    there = here = ""
    for name, traced, as_python in sorted(seen, key=len)[0][:1] if seen else ():
        there, here = f" ({name} is {traced})", f" ({name} is {as_python})"
    return f"{CALLED_OTHERWISE}{there} than as Python{here}, so what it returns cannot be learned"


def _arranged(mark: Mark, structure: Structure) -> tuple[Structure, tuple[int, ...], int]:
    """How the op's tensors form the arguments; the order in which the op takes them, and how many of them it writes."""
    written = _written(mark, structure)
    places = (place for leaf in leaves_of(structure) for place in places_of(leaf))
    order = (*written, *(place for place in places if place not in written))
    return with_leaves(structure, lambda leaf: _moved(leaf, order)), order, len(written)


def _learn(mark: Mark, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function in a frame that runs as Python, so that the next call of its compiled caller knows its result."""
    if mark.fake is not None or _torch.functorch_active() or foreign((args, kwargs)):
        return mark.function(*args, **kwargs)
    structure, given, ints, floats = taken_apart((args, kwargs))
    arguments, order, _ = _arranged(mark, structure)
    modules = [leaf[1] for leaf in module_leaves(structure)]
    learned = learned_of(mark, (arguments, Modes.traced()), modules)
    tensors = [given[place] for place in order]
    needs = [tensor.requires_grad for tensor in tensors] if torch.is_grad_enabled() else []
    try:
        call = Given(needs if any(needs) else [], tensors, ints, floats)
        asked = Asked.of(call)
    except Exception as error:  # noqa: BLE001 - some tensors, such as sparse ones, cannot be asked how they lie
        learned.why_not = f"nobody can tell how an argument is laid out: {first_line(error)}"
        return mark.function(*args, **kwargs)
    before = contents((args, kwargs))
    passed = _passed(structure, given)
    lying = where_they_lie(passed)
    written = _writes_to(_not_declared(structure, given, _written(mark, structure)))
    watching = [*map(_torch.num_watching, passed)]
    changes = looking_at(mark.body, (args, kwargs))
    try:
        holder = [mark.function(*args, **kwargs)]
    except BaseException as error:
        learned.raised = f"each call so far raised, the last one {type(error).__name__}: {first_line(error)}"
        raise
    learned.changes.update(changes())
    if is_changed((args, kwargs), before):
        learned.why_not = CHANGED_A_CONTAINER
        return holder[0]
    if lying != where_they_lie(passed):
        learned.why_not, learned.cure = MOVED_AN_ARGUMENT, LEAVE_IT_IN_PLACE
        return holder[0]
    if written():
        learned.why_not = WROTE_AN_ARGUMENT
        learned.cure = NAME_THEM if mark.by == BY_FUNCTION else NAME_WHAT_IT_WRITES
        return holder[0]
    if watching != [*map(_torch.num_watching, passed)]:
        learned.why_not, learned.cure = WATCHED_AN_ARGUMENT
        return holder[0]
    see_result(mark, learned, call, asked, holder)
    return holder[0]


def _not_declared(structure: Structure, given: Sequence[torch.Tensor], written: Sequence[int]) -> list[torch.Tensor]:
    """The tensors among the arguments that are not declared as written, without those that modules hold."""
    declared = {_torch.storage_key(given[place]) for place in written}
    passed = _passed(structure, given)
    return [tensor for tensor in passed if not has_memory(tensor) or _torch.storage_key(tensor) not in declared]


def _passed(structure: Structure, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors among the arguments, without those that modules hold."""
    return [given[leaf[1]] for leaf in leaves_of(structure) if leaf[0] == "tensor"]


def _writes_to(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """Whether one of these was written since. A tensor made in inference mode has no version: its values are compared."""
    versions = [_torch.version_of(tensor) for tensor in tensors]
    copies = [tensor.clone() if tensor.is_inference() else None for tensor in tensors]

    def written() -> bool:
        return any(
            _torch.version_of(tensor) != version
            or (copy is not None and not bool(((tensor == copy) | (copy != copy)).all()))
            for tensor, version, copy in zip(tensors, versions, copies, strict=True)
        )

    return written


def _written(mark: Mark, structure: Structure) -> list[int]:
    """The positions of the tensors that ``mark`` declares as written; for a module, its buffers."""
    if not mark.mutates_args:
        return []
    args, kwargs = structure[-1]
    bound = inspect.signature(mark.body).bind(*args[-1], **dict(zip(kwargs[1], kwargs[-1], strict=True))).arguments
    found: list[int] = []
    for name in mark.mutates_args:
        for leaf in leaves_of(bound[name]) if name in bound else ():
            found += places_of(leaf)[leaf[4] :] if leaf[0] == "module" else places_of(leaf)
    return list(dict.fromkeys(found))


def _moved(leaf: Structure, order: Sequence[int]) -> Structure:
    if leaf[0] == "tensor":
        return ("tensor", order.index(leaf[1]))
    if leaf[0] == "module":
        return (*leaf[:3], tuple(order.index(place) for place in leaf[3]), leaf[4])
    return leaf


@_torch.constant_under_dynamo
def _order(number: int) -> tuple[tuple[int, ...], int]:
    """The order in which the op takes the tensors of a call; and how many of them, the first ones, are written."""
    return sites[number].order, sites[number].num_written


@_torch.constant_under_dynamo
def _result(number: int) -> Structure:
    """How the result of the call that was just traced is put together."""
    return for_dynamo(sites[number].settle().result)


@_torch.constant_under_dynamo
def _writer(number: int) -> str:
    """The name of the op for a call that writes arguments, whose tracing has come this far."""
    expected = sites[number].settle()
    return writing_op(sites[number].num_written, len(expected.specs) + bool(expected.num_ints))
