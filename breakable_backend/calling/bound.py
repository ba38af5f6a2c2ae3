"""Calls without Dynamo's guards, for engines that know their inputs: :func:`bind`.

A bound call runs the code that Dynamo compiled for the call with which it was bound. That code reads parameters where
they are now, calls the graph, puts the result together, and has the Python side effects that Dynamo saw. So a bound
call does what the compiled function does. Only the check whether Dynamo's code fits is shorter: it looks at the inputs,
the modes of torch, and the addresses of parameters.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Generic, Literal, TypeVar

import torch

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.callers import found_by
from breakable_backend.calling import fast_path
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.inputs import Inputs
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import eager_graphs_of, executors_of
from breakable_backend.errors import BindError, OptionsError, ReplayError
from breakable_backend.ir.effects import written_inputs
from breakable_backend.ir.program import outputs_of
from breakable_backend.marks.call_sites import learning

T = TypeVar("T")
Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""

CHECKS = ("inputs", "parameters", "nothing")
MISFITS = ("call", "raise")
MAX_CALLS = 6
"""Calls after which binding gives up: up to two learn, one runs plainly, one records, and one replay is observed."""
MAX_TOLD = 32
"""How many different reasons of calls that do not fit are counted separately. Each keeps a string."""

MOVED = "a parameter, or what else keeps its address, is not where it was"
GONE = "Dynamo was reset since it was bound"


def bind(
    compiled: Callable[..., T],
    *args: Any,
    check: Literal["inputs", "parameters", "nothing"] = "inputs",
    misfit: Literal["call", "raise"] = "call",
    **kwargs: Any,
) -> BoundCall[T]:
    """``compiled`` for calls with inputs like these, without Dynamo's guards.

    >>> import torch
    >>> compiled = torch.compile(lambda x: x.sin() + 1, backend="breakable_cg", options={"driver": "tape"})
    >>> bound = bind(compiled, torch.zeros(2))
    >>> bound(torch.zeros(2))
    tensor([1., 1.])

    A bound call does what ``compiled`` does. It does not check Python values that ``compiled`` reads by itself:
    attributes of modules other than ``training``, globals, and what functions close over. If you change one of these,
    bind again.

    Args:
        compiled: what ``torch.compile`` returned. Its whole call has to be one graph. The bound function keeps it
            alive.
        args: the arguments of a call. A tensor stands for all tensors of the same type, dtype, device, shape, strides
            and ``requires_grad``; a number or string for equal ones; a list, tuple or dict for those of the same
            structure; any other object for itself. Which arguments are the same tensor has to stay as it is here.
        check: ``"inputs"``: each call checks its arguments, grad mode, autocast, the other modes of torch, the
            ``training`` of modules, and the addresses of parameters. ``"parameters"``: each call checks only the
            addresses of parameters; other arguments are undefined behaviour. ``"nothing"``: no call checks these
            either, and parameters are not read where that is possible. Parameters that die, or whose memory is freed,
            are noticed; those that get other memory while somebody keeps the old memory are not.
        misfit: what happens to a call that does not fit, and to a function that cannot be bound. ``"call"``:
            ``compiled`` is called; :attr:`BoundCall.misfits` counts the call, and :attr:`BoundCall.why_not` says why
            nothing is bound. ``"raise"``: it is an error.
        kwargs: keyword arguments of the call. They cannot be named ``check`` or ``misfit``.

    Returns:
        a callable. ``bind`` calls ``compiled`` with the arguments until they are recorded, with all effects of a call:
            three times, or once if they are recorded already. Marked functions without ``fake=`` take one or two calls
            more.

    Raises:
        BindError: the function cannot be bound, with ``misfit="raise"``.
        OptionsError: ``check`` or ``misfit`` has another value, or ``compiled`` is not compiled.
    """
    if check not in CHECKS or misfit not in MISFITS:
        raise OptionsError(
            f"bind takes no check={check!r} with misfit={misfit!r}",
            fix=f"check is one of {', '.join(map(repr, CHECKS))}; misfit is one of {', '.join(map(repr, MISFITS))}",
        )
    if not _torch.holds_compiled(compiled):
        raise OptionsError(
            f"{getattr(compiled, '__qualname__', type(compiled).__name__)} is not compiled, so there is nothing to bind",
            fix='bind what torch.compile(..., backend="breakable_cg") returned',
        )
    return BoundCall(compiled, check, misfit == "raise", (args, kwargs))


class BoundCall(Generic[T]):
    """A compiled function for calls with inputs of one kind, made by :func:`bind`. Several threads may call it.

    >>> compiled = torch.compile(lambda x: x.cos() * 2, backend="breakable_cg", options={"driver": "tape"})
    >>> bound = bind(compiled, torch.zeros(2))
    >>> bound(torch.zeros(3)).tolist()
    [2.0, 2.0, 2.0]
    >>> bound.misfits.total()
    1
    """

    def __init__(self, compiled: Callable[..., T], check: str, raises: bool, given: Given) -> None:
        self.__wrapped__ = compiled
        self.check, self.raises = check, raises
        self.misfits = Counter[str]()
        """Calls that went to ``compiled``: a count for each reason why they did not fit."""
        self.why_not = ""
        """Why nothing is bound, so that all calls go to ``compiled``; empty if something is bound."""
        self._binding: _Binding | None = None
        for _ in range(MAX_CALLS):
            _, self._binding, self.why_not = _observed(compiled, given, check)
            if self._binding is not None or self.why_not:
                break
        else:
            self.why_not = _why_unrecorded(compiled)
        if self.why_not and raises:
            raise BindError(
                f"this call cannot be bound: {self.why_not}",
                fix='call the compiled function itself, or let bind do so: bind(..., misfit="call")',
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BindError(
            "a bound function was copied or pickled, but it is bound to the modules and the graphs of this process",
            fix="copy the module, compile the copy, and bind that",
        )

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Call once.

        Raises:
            ReplayError: the call does not fit, with ``misfit="raise"``.
            Exception: what a call of the compiled function raises.
        """
        binding = self._binding
        # Inside a function that is being compiled, the compiled function is traced in its place.
        if binding is None or torch.compiler.is_compiling():
            return self.__wrapped__(*args, **kwargs)
        if binding.quick is not None and (result := binding.quick(args, kwargs)) is not fast_path.NOT_NOW:
            return result  # type: ignore[no-any-return]
        if binding.fits is not None and not binding.fits(args, kwargs):
            return self._misfit(binding, binding.why(args, kwargs), (args, kwargs))
        binding.executor.statistics.bound += 1
        try:
            if binding.wanted():
                with binding.executor.observers.span("bound call"):
                    return binding.function(*binding.before, *args, **kwargs)  # type: ignore[no-any-return]
            return binding.function(*binding.before, *args, **kwargs)  # type: ignore[no-any-return]
        except _Misfit as misfit:
            why = misfit.why
        binding.executor.statistics.bound -= 1
        return self._misfit(binding, why, (args, kwargs))

    def _misfit(self, binding: _Binding, why: str, given: Given) -> T:
        """A call that does not fit. If no later call can fit either, it is bound again once it is recorded again."""
        counts = binding.executor.statistics.misfits
        told = why if why in counts or len(counts) < MAX_TOLD else "other reasons"
        for counted in (self.misfits, counts):
            counted[told] += 1
        if self.raises:
            raise ReplayError(
                f"this call does not fit what was bound: {why}",
                fix='bind again, or let such calls go to the compiled function: bind(..., misfit="call")',
            )
        if why not in (MOVED, GONE):
            return self.__wrapped__(*given[0], **given[1])
        result, found, why_not = _observed(self.__wrapped__, given, self.check)
        if found is not None:
            self._binding = found
        elif why_not:
            self._binding, self.why_not = None, why_not
        return result  # type: ignore[no-any-return]


class _Misfit(Exception):
    """Raised between Dynamo's code and the graph, when nothing has been done yet."""

    def __init__(self, why: str) -> None:
        self.why = why


@dataclass(eq=False)
class _Binding:
    """What a bound call needs, resolved once."""

    executor: Executor
    inputs: Inputs
    state: _State
    before: tuple[Any, ...]
    """Arguments of Dynamo's code before the caller's, such as the module whose method it is."""
    code: CodeType
    """Dynamo's code. What it has installed among the globals lives as long."""
    function: Callable[..., Any]
    """Dynamo's code around the graph, with a check of what it passes to the graph."""
    fits: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None
    quick: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    """The whole call as one function, without Dynamo's code; see :func:`breakable_backend.calling.fast_path.generate`."""

    def __post_init__(self) -> None:
        self.wanted = self.executor.observers.wanted  # looked up here, and not in each call

    def why(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        return self.state.differs() or self.inputs.differs(args, kwargs) or "it has changed while it was looked at"


class _State:
    """What a call depends on besides its arguments, and what each call checks: it is as it was when this was made."""

    def __init__(
        self, executor: Executor, modules: Sequence[torch.nn.Module], hooks: Sequence[Mapping[Any, Any]]
    ) -> None:
        inference, function_modes = torch.is_inference_mode_enabled(), _torch.function_modes()
        modules = [module for module in modules if _torch.may_read_training(module)]
        self._names = {
            "settings": _torch.global_state(),
            "is_inference": torch.is_inference_mode_enabled,
            "function_modes": _torch.function_modes,
            "count_function_modes": _torch.number_of_function_modes,
            "modes_then": function_modes,
            "count_dispatch_modes": _torch.number_of_dispatch_modes,
            "frame_callback": _torch.frame_callback,
            "training_of": operator.attrgetter("training"),
            "modules": modules,
            "training": [module.training for module in modules],
            "hooks": tuple(hooks),
            "stance_is_default": _torch.stance_is_default(),
            "callers": executor.callers,
            "forward_ad": _torch.forward_ad_active,
        }
        self._checks: list[tuple[str, str | Callable[[], str]]] = [
            ("not callers.gone", GONE),
            ("settings()", "grad mode, autocast or another global setting of torch is not as it was"),
            ("not forward_ad()", "forward-mode AD is on"),
            (f"is_inference() is {inference}", f"inference mode is {'off' if inference else 'on'}"),
            (f"count_function_modes() == {len(function_modes)}", OTHER_MODE),
            *([("function_modes() == modes_then", OTHER_MODE)] if function_modes else ()),
            ("count_dispatch_modes() == 0", "a dispatch mode is active"),
            ("frame_callback() is None", "it was called by a function that Dynamo compiles"),
            *([("list(map(training_of, modules)) == training", OTHER_TRAINING)] if modules else ()),
            *([("not any(hooks)", "a module has hooks that it had not")] if hooks else ()),
            ("stance_is_default()", lambda: f"torch.compiler.set_stance({_torch.stance()!r}) is on"),
        ]
        """Source of each check, and what has changed if it does not hold."""

    def test(self) -> Callable[[], bool]:
        """A function that checks this in microseconds, without a look at this object; see :meth:`differs`."""
        names: dict[str, Any] = {}
        condition = self.condition(names)
        return eval(f"lambda: {condition}", names)  # type: ignore[no-any-return]

    def condition(self, names: dict[str, Any]) -> str:
        """The check as source. The names that it uses are added to ``names``."""
        names |= self._names
        return " and ".join(check for check, _ in self._checks)

    def differs(self) -> str:
        """What has changed; empty if nothing has."""
        whys = (why for check, why in self._checks if not eval(check, dict(self._names)))
        why = next(whys, "")
        return why if isinstance(why, str) else why()


OTHER_MODE = "another mode sees torch functions (torch.set_default_device is one)"
OTHER_TRAINING = "a module is in training mode that was in evaluation mode, or the reverse"


# --- binding --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Replayed:
    """A replay, observed while it ran."""

    executor: Executor
    entry: Entry
    args: tuple[Any, ...]
    """The arguments of the executor."""
    made: list[FrameType]
    around: list[FrameType]


def _observed(compiled: Callable[..., Any], given: Given, check: str) -> tuple[Any, _Binding | None, str]:
    """Call ``compiled``. Returns its result; what to bind, if it was one replay; and why it can never be bound."""
    found: list[_Replayed] = []
    here = sys._getframe()

    def spectator(executor: Executor, entry: Entry, args: list[Any]) -> None:
        """Note what is replayed, and the Python code that leads to it."""
        made, around = _torch.dynamo_frames(here)
        found.append(_Replayed(executor, entry, tuple(args), made, around))

    with ExitStack() as stack:
        for executor in executors_of(compiled):
            stack.enter_context(executor.showing(functools.partial(spectator, executor)))
        result = compiled(*given[0], **given[1])
    try:
        if not found:
            return result, None, _why_never(compiled)
        binding, why = _bound(compiled, found, given, check)
        return result, binding, why
    finally:
        found.clear()  # frames keep their local variables alive


def _bound(
    compiled: Callable[..., Any], found: list[_Replayed], given: Given, check: str
) -> tuple[_Binding | None, str]:
    replayed = found[0]
    executor = replayed.executor
    if _torch.frame_callback() is not None:
        return None, "it was bound in a function that Dynamo compiles"
    if len(found) > 1 or len(replayed.made) != 1:
        return None, "its call is several graphs"
    frame = replayed.made[0]
    code = frame.f_code
    if not _torch.graph_called_by(code):
        return None, "Dynamo broke its graph, or it draws from Python's random"
    if strange := [around.f_code.co_name for around in replayed.around if not _torch.passes_on(around)]:
        return None, f"Python code runs around what is compiled: {', '.join(strange)}"
    hooks = _torch.hooks_around(replayed.around)
    if any(hooks):
        return None, "a module has hooks that run around what is compiled"
    function = _torch.function_in(compiled, frame)
    before = _before(frame, given)
    if function is None or before is None:
        return None, "how its arguments reach what Dynamo compiled is not clear"
    inputs, why = Inputs.of(*given, ordered=_torch.takes_any_keyword(function.__code__))
    if inputs is None:
        return None, why
    handed = _handed(function, code, before, given)
    # Once more with tensors that nobody else has: the places where they arrive are those of the arguments.
    own = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, given)
    others = _handed(function, code, before, own)
    own_ids = {id(leaf) for leaf in pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)}
    arguments = frozenset(position for position, value in enumerate(others) if id(value) in own_ids)
    lean = _Graph.of(handed, arguments, replayed, _torch.graph_behind(function, code))
    if lean is None:
        return None, "a parameter does not reach the graph as it is"
    state = _State(executor, _modules_of(frame), hooks)
    fits = inputs.checker(state.test()) if check == "inputs" else None
    binding = _Binding(executor, inputs, state, before, code, _torch.unguarded(function, code, lean.checked()), fits)
    if lean.written == () and executor.options.debug is None:
        same = None
        if check != "nothing":
            cells = function.__closure__ or () if _torch.is_shared(function.__code__) else ()
            inlined = [cell.cell_contents for cell in cells]
            roots = [root for root in (*before, *inlined) if isinstance(root, torch.nn.Module)]
            same = fast_path.look(roots, [handed[at] for at in lean.static])
        if check == "nothing" or (same is not None and not lean.numbers):
            binding.quick = _fast_path(replayed, lean, binding, function, handed, others, own, same)
    return binding, ""


def _fast_path(
    replayed: _Replayed,
    lean: _Graph,
    binding: _Binding,
    function: Any,
    handed: tuple[Any, ...],
    others: tuple[Any, ...],
    own: Given,
    same: Callable[[], bool] | None,
) -> Callable[..., Any] | None:
    """The call without Dynamo's code, if that can be written down: for the arguments ``own`` it passes ``others``."""
    executor, entry = replayed.executor, replayed.entry
    written = written_inputs(executor.lowered.module)
    moves = any(value.kind == "tensor" and value.name in written for value in executor.program.inputs)
    if (run := entry.function) is None or lean.tensors or moves or not fast_path.is_pure(binding.code):
        return None
    leaves = {id(leaf): text for text, leaf in (*fast_path.paths(own[0], "args"), *fast_path.paths(own[1], "kwargs"))}
    placed = {at: leaves.get(id(value), "") for at, value in enumerate(others) if isinstance(value, torch.Tensor)}
    placed = {at: text for at, text in placed.items() if at not in lean.static}
    outputs = [torch.empty(0) for _ in outputs_of(executor.program.epilogue.module)]
    leaves |= {id(output): f"outputs[{number}]" for number, output in enumerate(outputs)}
    made = _torch.unguarded(function, binding.code, lambda *_: outputs)(*binding.before, *own[0], **own[1])
    result = fast_path.source_of(made, leaves)
    if result is None or not all(placed.values()):
        return None
    names: dict[str, Any] = {"wanted": binding.wanted}
    looks = ["if wanted(): return NOT_NOW"]  # with a profiler, the slower path names the call in the profile
    if binding.fits is not None:
        looks.append(f"if not ({binding.state.condition(names)}): return NOT_NOW")
        looks += binding.inputs.lines(names, "return NOT_NOW")
    return fast_path.generate(executor, entry, run, handed, placed, lean.static, result, same, looks, names)


def _handed(function: Any, code: CodeType, before: tuple[Any, ...], given: Given) -> tuple[Any, ...]:
    """What Dynamo's code passes to the graph for these arguments. The graph is not called."""
    found: list[tuple[Any, ...]] = []

    def graph(*handed: Any) -> Any:
        found.append(handed)
        raise _Handed

    with suppress(_Handed):
        _torch.unguarded(function, code, graph)(*before, *given[0], **given[1])
    (handed,) = found
    return handed


class _Handed(Exception):
    """Raised where the graph would be called."""


def _before(frame: FrameType, given: Given) -> tuple[Any, ...] | None:
    """The arguments of the code in ``frame`` before those of the caller; None if it was not called with these."""
    (args, kwargs), code, values = given, frame.f_code, frame.f_locals
    names = code.co_varnames[: _torch.argument_count(code)]
    plain = code.co_argcount + code.co_kwonlyargcount
    positional = [values.get(name) for name in names[: code.co_argcount]]
    named = {name: values.get(name) for name in names[:plain]}
    for more in (values.get(name) for name in names[plain:]):
        if isinstance(more, dict):
            named |= more
        elif isinstance(more, tuple):
            positional += more
    owner = _torch.owner_of_call(frame)
    before = tuple(positional[:1]) if positional and owner is not None and positional[0] is owner else ()
    taken = positional[len(before) : len(before) + len(args)]
    same = len(taken) == len(args) and all(map(operator.is_, taken, args))
    return before if same and all(key in named and named[key] is value for key, value in kwargs.items()) else None


def _modules_of(frame: FrameType) -> list[torch.nn.Module]:
    """The modules that code can read, with their children: from its arguments, what it closes over, and its globals."""
    named = (frame.f_globals.get(name) for name in frame.f_code.co_names)
    leaves = pytree.tree_leaves([*frame.f_locals.values(), *named])
    roots = [leaf for leaf in leaves if isinstance(leaf, torch.nn.Module)]
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


@dataclass(frozen=True)
class _Graph:
    """Stands for the graph in Dynamo's code: checks what is passed, and calls the graph."""

    graph: Callable[..., Any]
    executor: Executor
    written: tuple[int, ...] | None
    """If the executor takes what is passed unchanged: the inputs whose versions are counted up before the call."""
    static: list[int]
    """The positions of static inputs among what is passed."""
    addresses: list[int]
    """The addresses of the static inputs, each at its position."""
    tensors: tuple[int, ...]
    """The positions of tensors that the code reads by itself. Arguments were checked before; static inputs are included
    with gradients on."""
    like: Callable[..., bool]
    """Checks whether the tensors at these positions are like those of the call that was bound."""
    numbers: tuple[tuple[int, Any], ...]

    @classmethod
    def of(
        cls, handed: tuple[Any, ...], arguments: frozenset[int], replayed: _Replayed, graph: Callable[..., Any]
    ) -> _Graph | None:
        """For what Dynamo's code passes; ``arguments``: where arguments are in it. None if a static input is missing."""
        args, executor = replayed.args, replayed.executor
        known = {id(args[value.index]) for value in executor.program.inputs if value.kind == "static"}
        static = [position for position, value in enumerate(handed) if id(value) in known]
        if known != {id(handed[position]) for position in static}:
            return None
        pairs = zip(handed, args, strict=False)
        alike = all(one is other if isinstance(one, torch.Tensor) else one == other for one, other in pairs)
        same = alike and len(handed) == len(args)
        rest = [(position, value) for position, value in enumerate(handed) if position not in static]
        # With gradients on, it is noticed if a parameter requires a gradient now and did not before.
        looked_at = [*enumerate(handed)] if torch.is_grad_enabled() else rest
        tensors = [(position, value) for position, value in looked_at if isinstance(value, torch.Tensor)]
        tensors = [(position, value) for position, value in tensors if position not in arguments]
        places = range(max(static, default=-1) + 1)
        return cls(
            graph,
            executor,
            getattr(graph, "written", None) if same and not torch.is_grad_enabled() else None,
            static,
            [handed[position].data_ptr() if position in static else 0 for position in places],
            tuple(position for position, _ in tensors),
            _torch.tensors_like([value for _, value in tensors]),
            tuple((position, value) for position, value in rest if not isinstance(value, torch.Tensor)),
        )

    def checked(self) -> Callable[..., Any]:
        """This as a function. Where possible it calls the executor so that addresses are not compared twice."""
        graph, executor, written = self.graph, self.executor, self.written
        static, addresses = self.static, self.addresses
        are_at, like, tensors = _torch.are_at, self.like, _picker(self.tensors)
        numbers, expected = _picker([at for at, _ in self.numbers]), tuple(value for _, value in self.numbers)
        count_up, found = torch.autograd.graph.increment_version, bool(self.tensors)
        known = None

        def checked(*handed: Any) -> Any:
            nonlocal known
            args = [*handed]
            try:
                moved = static and not are_at(args, addresses, static)
            except (TypeError, RuntimeError):  # a parameter that has become None
                moved = True
            if moved:
                raise _Misfit(MOVED)
            if found and not like(*tensors(handed)):
                raise _Misfit("a tensor that the graph reads is not like the one before")
            if expected and numbers(handed) != expected:
                raise _Misfit("a number that the graph reads is another")
            if written is None:
                return graph(*handed)
            del handed
            if written:
                count_up([args[position] for position in written])
            if (last := executor.keys.last) is not known:
                known = last if last is not None and last.pointers == addresses else None
            return executor(args, known)

        return checked


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the values at ``positions``."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return (lambda values: (values[positions[0]],)) if positions else (lambda _: ())


# --- why not --------------------------------------------------------------------------------------------------------------


def _why_never(compiled: Callable[..., Any]) -> str:
    """Why nothing of the last call can ever be replayed; empty if something may be."""
    executors = executors_of(compiled)
    if not executors:
        if found_by(_torch.subjects_of(compiled), learning()):
            return ""  # the call learned what marked functions return
        graphs = eager_graphs_of(compiled)
        return f"nothing of it is captured: {graphs[-1].why}" if graphs else "breakable_cg compiled nothing of it"
    return "" if any(executor.capturable for executor in executors) else "it has nothing to capture"


def _why_unrecorded(compiled: Callable[..., Any]) -> str:
    plain = {why for executor in executors_of(compiled) for why in executor.snapshot().statistics.plain}
    whys = ", ".join(sorted(plain - {"warm-up"})) or "each call made another key"
    return f"it was not replayed in {MAX_CALLS} calls: {whys}"
