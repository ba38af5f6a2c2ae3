"""Any Python function as an eager step: ``@eager_on_graph``.

Outside a capture a marked function is the function. Under ``capture`` it is a break. Under ``torch.compile``, whatever
the backend, it is one opaque node, which Dynamo does not look into.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import itertools
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch

from breakable_backend import _torch, active
from breakable_backend.errors import BreakableError, EagerOutputError, OptionsError, PartitionError
from breakable_backend.gradients import Member, Tape, recomputed, tape_of, with_backward
from breakable_backend.structure import (
    Geometry,
    Structure,
    extent,
    foreign,
    geometry,
    leaves_of,
    modules_in,
    put_together,
    take_apart,
    view_leaf,
    view_of,
    with_leaves,
)

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
    host_only: bool = False
    capture_stub: Callable[..., Any] | None = None
    barrier: Callable[[], None] | None = None
    recompute: bool = False
    backward: Callable[..., Any] | None = None
    original: Callable[..., Any] | None = None
    """What was marked, where ``function`` is that with ``recompute`` or ``backward`` around it."""
    sites: dict[int, Site] = field(default_factory=dict, repr=False)
    """The calls of it in compiled code."""
    known: dict[Any, dict[Any, Expected]] = field(default_factory=dict, repr=False)
    """What they return, by structure of the arguments, and by their layouts."""

    @property
    def body(self) -> Callable[..., Any]:
        return self.original or self.function


@overload
def eager_on_graph(function: F, /) -> F: ...
@overload
def eager_on_graph(
    *,
    enable: bool = True,
    mutates_args: tuple[str, ...] = (),
    fake: Callable[..., Any] | None = None,
    host_only: bool = False,
    capture_stub: Callable[..., Any] | None = None,
    barrier: Callable[[], None] | None = None,
    recompute: bool = False,
    backward: Callable[..., Any] | None = None,
) -> Callable[[F], F]: ...
def eager_on_graph(function: Any = None, /, *, enable: bool = True, **said: Any) -> Any:  # noqa: D417 - see overloads
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
            fake tensors, once for each shape.
        host_only: whether its plain results may change between replays of a ``capture``: nothing captured uses them.
        capture_stub: called instead of the function while capturing, with the same arguments.
        barrier: called before it runs while capturing, such as a barrier of ranks.
        recompute: whether it runs again in backward, from the same random state and autocast, so that nothing which it
            computes on the way is kept until then.
        backward: what computes its gradients, for a body that autograd cannot follow; see below.

    Under ``torch.compile``, whatever the backend, a call is one opaque node, with ``fullgraph=True`` too. Arguments and
    results are tensors and plain values (int, float, bool, str, None) in lists, tuples, dicts with string keys, named
    tuples, dataclasses and classes registered with pytree; arguments may be modules, as ``self`` of a method. A call with
    other arguments, and one that writes a tensor which needs gradients, is a graph break of Dynamo's, and a
    :class:`PartitionError` under fullgraph. An int that it returns is known at run time only; other plain values have to be
    the same at each call.

    Gradients flow to tensor arguments and to parameters of modules among the arguments. They do not flow to what the
    function closes over: under compilation that is an error. With ``backward`` the body runs without autograd, and
    ``backward(context, *grads)`` is called with ``context.args``, ``context.kwargs`` and ``context.result`` of that very
    call, and a gradient (or None) for each item of a result that is a tuple, or for the result. As with
    ``torch.library.register_autograd``, it returns one gradient (or None) for each argument: in the shape of a container,
    and by name of parameter for a module.

    A tensor argument that the function stores away is overwritten by a later replay: store a ``clone()``. A tensor that it
    keeps and returns reaches compiled code as a copy.

    Raises:
        OptionsError: not a function, ``mutates_args`` names no parameter of it, or both of ``recompute`` and ``backward``.
        PartitionError: from the compiled call, a function that cannot run on fake tensors and has no ``fake``, or whose
            arguments or result no graph can hold.
        EagerOutputError: from the compiled call, a result other than the one on fake tensors.
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
    _check_names(function, said.get("mutates_args", ()))
    code = getattr(function, "__code__", None)
    source = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}" if code is not None else ""
    name = getattr(function, "__qualname__", type(function).__name__)
    mark = Mark(_with_gradients(function, said), name, source, original=function, **said)
    function = mark.function
    why = f"{name}, marked by eager_on_graph, was called in a way that cannot be one node"
    uncompiled = torch.compiler.disable(functools.partial(_run_inline, function), reason=why)
    get = active.handler.get

    @_torch.constant_under_dynamo
    def site_number(structure: Structure) -> int:
        return _site(mark, structure)  # Dynamo passes no frozen dataclass to such a function (torch 2.11)

    @_torch.constant_under_dynamo
    def refuse(why: str) -> None:
        if _torch.refuses_graph_breaks():
            raise PartitionError(
                f"{name} cannot be one node: {why}",
                where=source,
                fix="pass tensors, modules and plain values, in containers that pytree knows; or compile without fullgraph=True",
            )

    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            why, call = _plan(site_number, args, kwargs)
            if why:
                refuse(why)
                return uncompiled(*args, **kwargs)
            return _opaque(call)
        handler = get()
        if handler is None:
            return function(*args, **kwargs)
        return handler.call(mark, args, kwargs)

    marked.run_eager = function  # type: ignore[attr-defined]
    marked.mark = mark  # type: ignore[attr-defined]
    return marked


def _with_gradients(function: Callable[..., Any], said: Mapping[str, Any]) -> Callable[..., Any]:
    recompute, backward = said.get("recompute", False), said.get("backward")
    if recompute and backward is not None:
        raise OptionsError("recompute and backward exclude each other", fix="let backward compute again what it needs")
    if backward is not None:
        return with_backward(function, backward)
    return recomputed(function) if recompute else function


def _check_names(function: Callable[..., Any], names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise OptionsError(f"mutates_args takes a tuple of names, got {names!r}")
    known = list(inspect.signature(function).parameters) if names else []  # builtins have no signature
    for name in names:
        if name not in known:
            raise OptionsError(f"mutates_args: there is no parameter {name!r}", fix=f"parameters: {', '.join(known)}")


def _run_inline(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Marked functions that ``function`` calls are part of its break."""
    token = active.handler.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        active.handler.reset(token)


# --- one opaque node ----------------------------------------------------------------------------------------------------
# Dynamo traces `_opaque` and what it calls, down to the call of the op.


def _plan(site_number: Callable[[Structure], int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Why a call cannot be one node, empty if it can; and what the op is called with."""
    other = foreign((args, kwargs))
    if other:
        return f"an argument is, or holds, a {other}", None
    given: list[torch.Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    site = site_number(take_apart((args, kwargs), given, ints, floats))
    order, num_written = _order(site)
    tensors = [given[place] for place in order]
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors[:num_written]]):  # noqa: C419 - traced
        return "it writes a tensor that needs gradients", None
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


def _site(mark: Mark, structure: Structure) -> int:
    """A number for the call of ``mark`` that Dynamo is tracing."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    modules: dict[int, weakref.ref[torch.nn.Module]] = {}
    number = next(_numbers)
    for leaf in leaves_of(structure):
        if leaf[0] == "module":
            # Dynamo guards on the module's identity and holds it while it traces.
            module = ctypes.cast(leaf[1], ctypes.py_object).value
            modules[leaf[1]] = weakref.ref(module, lambda _: mark.sites.pop(number, None))
    written = _written(mark, structure)
    rest = [place for place in _places(structure) if place not in written]
    order = (*written, *rest)
    arguments = with_leaves(structure, lambda leaf: _moved(leaf, order))
    try:
        known = mark.known.setdefault((arguments, autocast, torch.is_grad_enabled()), {})
    except TypeError:  # somebody's pytree node with a context that cannot be hashed
        known = {}
    site = Site(number, mark, arguments, order, len(written), autocast, torch.is_grad_enabled(), modules, known)
    mark.sites[number] = _sites[number] = site
    return number


def _places(structure: Structure) -> list[int]:
    """The positions of the tensors in ``structure``."""
    found: list[int] = []
    for leaf in leaves_of(structure):
        if leaf[0] == "tensor":
            found.append(leaf[1])
        elif leaf[0] == "module":
            found.extend(leaf[3])
    return found


def _written(mark: Mark, structure: Structure) -> list[int]:
    """The positions of the tensors that ``mark`` says it writes; of a module, its buffers."""
    if not mark.mutates_args:
        return []
    args, kwargs = structure[-1]
    bound = inspect.signature(mark.body).bind(*args[-1], **dict(zip(kwargs[1], kwargs[-1], strict=True))).arguments
    found: list[int] = []
    for name in mark.mutates_args:
        for leaf in leaves_of(bound[name]) if name in bound else ():
            if leaf[0] == "tensor":
                found.append(leaf[1])
            elif leaf[0] == "module":
                found.extend(leaf[3][leaf[4] :])
    return list(dict.fromkeys(found))


def _moved(leaf: Structure, order: Sequence[int]) -> Structure:
    if leaf[0] == "tensor":
        return ("tensor", order.index(leaf[1]))
    if leaf[0] == "module":
        return (*leaf[:3], tuple(order.index(place) for place in leaf[3]), leaf[4])
    return leaf


@_torch.constant_under_dynamo
def _order(number: int) -> tuple[tuple[int, ...], int]:
    """The order in which the op takes the tensors of a call, and how many of them, the first, it writes."""
    return _sites[number].order, _sites[number].num_written


@_torch.constant_under_dynamo
def _result(number: int) -> Structure:
    """How the result of a call that was just traced is put together."""
    site = _sites[number]
    if site.error is not None:
        raise site.error
    return site.expected.result


@_torch.constant_under_dynamo
def _writer(number: int) -> str:
    """The name of the op for a call that writes arguments and was just run on fake tensors."""
    site = _sites[number]
    if site.error is not None:
        raise site.error
    expected = site.expected
    return writing_op(site.num_written, len(expected.specs) + bool(expected.num_ints))


# --- a call -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What a tensor that an op returns looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def __str__(self) -> str:
        shape, stride = list(self.shape), list(self.stride)
        return f"{str(self.dtype).removeprefix('torch.')}{shape} with stride {stride} on {self.device}"


@dataclass(frozen=True)
class Expected:
    """What a call returns, as the run on fake tensors told."""

    result: Structure = ("plain", None)
    specs: tuple[Spec, ...] = ()
    """Of the roots: the tensors that own the memory of the fresh results."""
    differentiable: tuple[bool, ...] = ()
    num_ints: int = 0


@dataclass(frozen=True)
class _Outcome:
    """A result, taken apart."""

    structure: Structure
    roots: list[torch.Tensor]
    members: list[list[Member]]
    """For each root, the tensors that autograd knows, where it is recording."""
    ints: list[Any]


@dataclass(eq=False)
class Site:
    """A call of a marked function in compiled code. The mark owns it, and graphs know its number."""

    number: int
    mark: Mark
    arguments: Structure
    order: tuple[int, ...]
    num_written: int
    autocast: tuple[tuple[str, torch.dtype], ...]
    grad: bool
    modules: dict[int, weakref.ref[torch.nn.Module]]
    known: dict[Any, Expected]
    """What calls like this one return, by the layouts of the arguments. Sites that differ in nothing share it."""
    expected: Expected = Expected()
    gradients: tuple[tuple[int, torch.dtype, torch.device], ...] = ()
    """Dimensions, dtype and device of the gradients that the backward computes."""
    error: PartitionError | None = None

    @property
    def declared(self) -> bool:
        """Whether the run on fake tensors is not the function's own, so that it cannot tell what needs gradients."""
        return self.mark.fake is not None or self.mark.backward is not None

    # on fake tensors

    def fake(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> list[torch.Tensor]:
        """What the op returns, as fake tensors."""
        self.learn(needs, tensors, ints, floats)
        if self.error is not None:
            return []
        made = [spec.empty() for spec in self.expected.specs]
        if self.expected.num_ints:
            made.append(torch.empty(self.expected.num_ints, dtype=torch.int64, device="cpu"))
        if needs:
            made.append(torch.empty(1, dtype=torch.int64, device="cpu"))
        return made

    def learn(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> None:
        """Run the function on fake tensors, unless that was done for these layouts."""
        if needs:
            wanting = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
            self.gradients = tuple((tensor.dim(), tensor.dtype, tensor.device) for tensor in wanting)
        key = _layouts(needs, tensors, ints, floats)
        if key is None or key not in self.known:
            try:
                with _torch.ignore_fresh_symbols(tensors), self._ambient():
                    expected = self._ask(needs, tensors, ints, floats)
            except PartitionError as error:
                self.error = error
                return
            except _torch.DynamoError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the function raises on tensors without values
                self.error = self._needs_fake(error)
                return
            if key is None:
                self.expected = expected
                return
            self.known[key] = expected
        self.expected = self.known[key]

    def _ask(self, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> Expected:
        given = [tensor.detach() for tensor in tensors]
        modules = {}
        with _torch.above_autograd():
            for tensor, need in zip(given, needs, strict=False):
                tensor.requires_grad_(need)
            for leaf in leaves_of(self.arguments):
                if leaf[0] == "module":
                    modules[leaf[1]] = _twin(self._module(leaf[1]), dict(zip(leaf[2], (given[p] for p in leaf[3]), strict=True)))
            holder = [self._call(self.mark.fake or self.mark.body, given, ints, floats, modules)]
            outcome = self._take(holder, given, bool(needs), PartitionError)
        if self.declared:
            differentiable = tuple(root.is_floating_point() or root.is_complex() for root in outcome.roots)
        else:
            differentiable = tuple(map(bool, outcome.members))
        return Expected(outcome.structure, tuple(map(Spec.of, outcome.roots)), differentiable, len(outcome.ints))

    # on real ones

    def run(
        self,
        needs: list[bool],
        traced: bool,
        tensors: list[Any],
        ints: list[int],
        floats: list[float],
        *,
        own: bool = False,
    ) -> list[torch.Tensor]:
        """Call the function on real tensors, once.

        Args:
            needs: which tensors need gradients; empty: none, and there will be no backward.
            traced: whether what runs before and after was compiled: it may use memory again that a tape still reads.
            own: whether the tensors of modules are known to be the modules' own.

        Raises:
            EagerOutputError: the result is not what the run on fake tensors said.
        """
        key = _layouts(needs, tensors, ints, floats)
        with self._ambient(), self._modules(needs, traced, tensors, own) as (given, modules), _torch.above_autograd():
            holder = [self._call(self._function, given, ints, floats, modules)]
            outcome = self._take(holder, given, bool(needs), EagerOutputError)
        self._check(outcome, self.known.get(key) if key is not None else None)
        made = outcome.roots
        if traced:
            made = [_copy(root) for root in made]
        if outcome.ints:
            made = [*made, torch.tensor(outcome.ints, dtype=torch.int64)]
        if needs:
            leaves = [tensor for tensor, need in zip(given, needs, strict=True) if need]
            made = [*made, Tape.handle(leaves, outcome.members)]
        return made

    def _check(self, outcome: _Outcome, known: Expected | None) -> None:
        wanted = known if known is not None else self.expected
        if outcome.structure != wanted.result:
            raise self._failure(f"put together as {outcome.structure}", str(wanted.result))
        for root, want in zip(outcome.roots, known.specs if known is not None else (), strict=known is not None):
            if (got := Spec.of(root)) != want:
                raise self._failure(str(got), str(want))

    def _function(self, *args: Any, **kwargs: Any) -> Any:
        return _run_inline(self.mark.function, *args, **kwargs)

    def _module(self, address: int) -> torch.nn.Module:
        module = self.modules[address]()
        assert module is not None, "Dynamo guards on the module"
        return module

    @contextmanager
    def _modules(
        self, needs: list[bool], traced: bool, tensors: list[Any], own: bool
    ) -> Iterator[tuple[list[Any], dict[int, Any]]]:
        """The tensors and modules to call the function with."""
        given = list(tensors)
        if needs:
            parts = {place for leaf in leaves_of(self.arguments) if leaf[0] == "module" for place in leaf[3]}
            for place, (tensor, need) in enumerate(zip(tensors, needs, strict=True)):
                copied = traced and place >= self.num_written and place not in parts
                given[place] = (_copy(tensor) if copied else tensor).detach().requires_grad_(need)
        modules = {address: self._module(address) for address in self.modules}
        with ExitStack() as stack:
            if needs or not own:
                for leaf in leaves_of(self.arguments):
                    if leaf[0] == "module":
                        self._settle(leaf, modules[leaf[1]], tensors, given, bool(needs), stack)
            yield given, modules

    def _settle(
        self, leaf: Structure, module: Any, tensors: list[Any], given: list[Any], recording: bool, stack: ExitStack
    ) -> None:
        """Have a module use the tensors that the op was given: its own, unless a compiler put others in their place."""
        other = {}
        for name, place in zip(leaf[2], leaf[3], strict=True):
            mine = operator.attrgetter(name)(module)
            same = mine.data_ptr() == tensors[place].data_ptr() and mine.shape == tensors[place].shape
            if same and not (recording and _torch.has_hooks(mine)):
                given[place] = mine
            else:
                other[name] = given[place]
        if other:
            stack.enter_context(_swapping)
            stack.enter_context(_torch.swapped(module, other))

    # either

    def _call(self, function: Callable[..., Any], tensors: Any, ints: Any, floats: Any, modules: Any) -> Any:
        places = {"tensor": tensors, "int": ints, "float": floats, "module": modules}

        def leaf(structure: Structure) -> Any:
            kind, place = structure[0], structure[1]
            return place if kind == "plain" else places[kind][place]

        args, kwargs = put_together(self.arguments, leaf)
        return function(*args, **kwargs)

    def _take(
        self, holder: list[Any], arguments: Sequence[torch.Tensor], recording: bool, kind: type[BreakableError]
    ) -> _Outcome:
        """Take a result apart: aliases of arguments told from fresh memory, of which there is one root for each storage.

        ``holder`` is all that holds the result, so that what the function kept is seen.
        """
        other = foreign(holder[0]) or next((type(module).__name__ for module in modules_in(holder[0])), "")
        if other:
            raise self._refusal(f"what compiled code cannot hold: {other}", _CONTAINERS, kind)
        tensors: list[torch.Tensor] = []
        ints: list[Any] = []
        floats: list[Any] = []
        structure = take_apart(holder[0], tensors, ints, floats)
        references = _references(tensors)
        owners: dict[int, int] = {}
        for number, argument in enumerate(arguments):
            owners.setdefault(_torch.storage_key(argument), number)
        places: list[Structure] = [()] * len(tensors)
        groups: dict[int, list[int]] = {}
        for number, tensor in enumerate(tensors):
            if tensor.layout is not torch.strided:
                raise self._refusal("a sparse tensor, which compiled code cannot hold", "return its parts", kind)
            owner = owners.get(_torch.storage_key(tensor))
            if owner is not None and (not recording or _is_view_of(tensor, arguments[owner])):
                places[number] = self._alias(tensor, owner, arguments, recording, kind)
            else:
                groups.setdefault(-1 - number if owner is not None else _torch.storage_key(tensor), []).append(number)
        roots: list[torch.Tensor] = []
        members: list[list[Member]] = []
        for group in groups.values():
            self._root(group, tensors, recording, roots, members, places, references, kind)
        if not all(isinstance(value, float) for value in floats):
            raise self._refusal("a float that depends on values", "return it as a tensor, or in whole numbers as an int", kind)

        def leaf(structure: Structure) -> Structure:
            if structure[0] == "tensor":
                return places[structure[1]]
            if structure[0] == "int":
                return ("int", structure[1], len(roots))
            return ("plain", floats[structure[1]]) if structure[0] == "float" else structure

        return _Outcome(with_leaves(structure, leaf), roots, members, ints)

    def _alias(
        self,
        tensor: torch.Tensor,
        owner: int,
        arguments: Sequence[torch.Tensor],
        recording: bool,
        kind: type[BreakableError],
    ) -> Structure:
        """The leaf for a result that lies in the memory of an argument."""
        for number, argument in enumerate(arguments):
            if _torch.storage_key(argument) == _torch.storage_key(tensor) and _looks(argument) == _looks(tensor):
                return ("argument", number, recording and argument.requires_grad and not tensor.requires_grad)
        base = arguments[owner]
        if _bits(base) != _bits(tensor):
            raise self._refusal("a view of an argument as another dtype", "make that view outside, or return a clone", kind)
        detached = recording and base.requires_grad and not tensor.requires_grad
        return view_leaf("argument", owner, geometry(base), geometry(tensor), detached)

    def _root(
        self,
        group: list[int],
        tensors: Sequence[torch.Tensor],
        recording: bool,
        roots: list[torch.Tensor],
        members: list[list[Member]],
        places: list[Structure],
        references: Mapping[int, int],
        kind: type[BreakableError],
    ) -> None:
        """Find one tensor that owns the memory of a group of results, and say how each is made again from it."""
        first = tensors[group[0]]
        wanting = [tensors[n] for n in group if recording and tensors[n].requires_grad]
        number, exact = len(roots), not self.declared
        kept = not _torch.is_traced(first) and _is_kept([tensors[n] for n in group], references, recording)
        if all(_looks(tensors[n]) == _looks(first) for n in group):
            root = first.detach() if recording else first
            for n in group:
                places[n] = ("tensor", number, bool(wanting) and exact and not tensors[n].requires_grad)
            mine: list[Member] = [(tensor, None) for tensor in wanting[:1]]
            where = geometry(first)
        else:
            if any(_bits(tensors[n]) != _bits(first) for n in group):
                raise self._refusal("tensors of several dtypes that share memory", "return clones", kind)
            wheres = {n: geometry(tensors[n]) for n in group}
            start = min(where[2] for where in wheres.values())
            length = max(where[2] + extent(where) for where in wheres.values()) - start
            where = ((length,), (1,), start)
            for n in group:
                detached = bool(wanting) and exact and not tensors[n].requires_grad
                places[n] = view_leaf("root", number, where, wheres[n], detached)
            root = first.detach().as_strided(*where)
            mine = self._shares([(tensor, _apart(geometry(tensor), start)) for tensor in wanting], length, kind)
        if root.is_conj() or root.is_neg():
            root = root.resolve_conj().resolve_neg()
        elif kept:
            root = _copy(root)
        if not recording and self.grad and root.requires_grad and not _torch.is_traced(root):
            raise self._refusal(
                "a tensor that needs gradients of what the function closes over, which compiled code cannot give",
                "pass that tensor or module as an argument, or compute under torch.no_grad()",
                kind,
            )
        roots.append(root)
        members.append(mine)

    def _shares(self, wanting: list[Member], length: int, kind: type[BreakableError]) -> list[Member]:
        """Which of several results that share memory take the gradient of which part of it: each part once."""
        for tensor, where in wanting:
            assert where is not None
            if tensor.numel() == extent(where) == length:
                return [(tensor, where)]
        spans = sorted((where[2], where[2] + extent(where)) for _, where in wanting if where is not None)
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise self._refusal("tensors that overlap in part and need gradients", "return clones", kind)
        return wanting

    @contextmanager
    def _ambient(self) -> Iterator[None]:
        token = active.autocast.set(tuple(device for device, _ in self.autocast))
        try:
            with ExitStack() as stack:
                for device, dtype in self.autocast:
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                stack.enter_context(torch.set_grad_enabled(self.grad))
                yield
        finally:
            active.autocast.reset(token)

    # errors

    def _needs_fake(self, error: Exception) -> PartitionError:
        try:
            signature = str(inspect.signature(self.mark.body))
        except ValueError:  # a builtin
            signature = "(...)"
        failed = PartitionError(
            f"{self.mark.name} cannot run on fake tensors, which tell the shapes of its result: "
            f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            where=self.mark.source,
            fix=f"give the shapes: @eager_on_graph(fake=shapes), def shapes{signature}: return torch.empty_like(...)",
        )
        failed.__cause__ = error
        return failed

    def _refusal(self, what: str, fix: str, kind: type[BreakableError]) -> BreakableError:
        return kind(f"{self.mark.name} returns {what}", where=self.mark.source, fix=fix)

    def _failure(self, got: str, wanted: str) -> EagerOutputError:
        return EagerOutputError(
            f"{self.mark.name} returned {got}, but was compiled for {wanted}",
            where=self.mark.source,
            fix="return the same structure and plain values at each call, and the layouts that fake= tells",
        )


_CONTAINERS = "return tensors and plain values, in lists, tuples, dicts, named tuples, dataclasses or pytree nodes"
_swapping = threading.RLock()
"""Held while a module has tensors that are not its own."""


def _twin(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A copy of a module, its submodules included, with other parameters and buffers; what it holds besides is shared."""
    twins: dict[int, torch.nn.Module] = {}

    def copied(original: torch.nn.Module) -> torch.nn.Module:
        if id(original) not in twins:
            made = twins[id(original)] = copy.copy(original)
            for name in ("_parameters", "_buffers"):
                made.__dict__[name] = {key: other.get(id(value), value) for key, value in original.__dict__[name].items()}
            made.__dict__["_modules"] = {
                name: child and copied(child) for name, child in original.__dict__["_modules"].items()
            }
        return twins[id(original)]

    other = {id(operator.attrgetter(name)(module)): tensor for name, tensor in tensors.items()}
    return copied(module)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """New memory of the same geometry."""
    where = geometry(tensor)
    flat = tensor.detach().as_strided((extent(where),), (1,), where[2]).clone()
    return flat.as_strided(where[0], where[1], 0)


def _apart(where: Geometry, start: int) -> Geometry:
    return where[0], where[1], where[2] - start


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, bool, bool]:
    """How the memory of a tensor is to be read."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), _bits(tensor)


_VIEWS = frozenset(
    f"{name}Backward{number}"
    for name in (
        "Alias AsStrided Diagonal Expand Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose "
        "Unbind Unfold Unsafe Unsqueeze View ViewAsReal ViewAsComplex"
    ).split()
    for number in (0, 1, 2)
)


def _is_view_of(tensor: torch.Tensor, argument: torch.Tensor) -> bool:
    """Whether, for autograd too, a tensor in the memory of an argument is a view of it: traced code can make it again."""
    step = tensor.grad_fn
    while step is not None and step.name() in _VIEWS:
        step = step.next_functions[0][0]
    return step is None or step.name() == "torch::autograd::AccumulateGrad"


def _references(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """How often Python refers to each of some tensors, by identity."""
    return {id(tensor): sys.getrefcount(tensor) for tensor in tensors}


_ALONE = _references([torch.empty(0)]).popitem()[1]
"""What :func:`_references` counts for a tensor that only the list holds."""


def _is_kept(group: Sequence[torch.Tensor], references: Mapping[int, int], recording: bool) -> bool:
    """Whether somebody else than the result holds its memory: the function, which may write it in a later call.

    A false alarm costs a copy. Autograd holds memory too, so while it records only Python is asked.
    """
    for tensor in group:
        if references[id(tensor)] > _ALONE + 2 * sum(other is tensor for other in group) - 1:
            return True
    if recording:
        return False
    holders = {id(tensor) for tensor in group}
    bases = [base for tensor in group if (base := _torch.base_of_view(tensor)) is not None and id(base) not in holders]
    for base in {id(base): base for base in bases}.values():
        holders.add(id(base))
        if sys.getrefcount(base) > _ALONE + 1 + sum(other is base for other in bases):
            return True
    return _torch.owners_of_storage(group[0]) > len(holders)


def _layouts(needs: Sequence[bool], tensors: Sequence[torch.Tensor], ints: Sequence[Any], floats: Sequence[Any]) -> Any:
    """What results are looked up by; None where a size or number is symbolic."""
    specs = tuple(map(Spec.of, tensors))
    numbers = [*ints, *floats, *(size for spec in specs for size in (*spec.shape, *spec.stride))]
    if not all(type(number) in (int, float) for number in numbers):
        return None
    return (tuple(needs), specs, *ints, *floats)


# --- the ops ------------------------------------------------------------------------------------------------------------

_numbers = itertools.count(int.from_bytes(os.urandom(4), "little") << 24)
"""No number comes again in another process, so that code which Inductor keeps on disk is never found for another site."""
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
"""Sites by their number, which is what a graph can hold."""

_REST = "Tensor[] tensors, SymInt[] ints, float[] floats"
_library = torch.library.Library("breakable_cg", "FRAGMENT")
_library.define(f"shapes(int site, bool[] needs, {_REST}) -> ()")
_library.define("number(int site, Tensor numbers, int position) -> SymInt")
_library.define(
    "backward(int site, Tensor handle, Tensor?[] grads, SymInt[] sizes) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),
)
_calls: set[Any] = set()
"""The ops that run marked functions."""


class _Node(torch.autograd.Function):
    """A call that will run backward. Its tape is per call, behind a handle that is saved like any tensor."""

    @staticmethod
    def forward(
        ctx: Any, op: Any, keys: Any, number: int, num_written: int, ints: Any, floats: Any, *tensors: torch.Tensor
    ) -> Any:
        needs = [tensor.requires_grad for tensor in tensors]
        ctx.traced = any(map(_torch.is_traced, tensors))
        written, rest = tensors[:num_written], list(tensors[num_written:])
        made = _torch.below_autograd(op, keys, number, needs, ctx.traced, *written, rest, ints, floats)
        *results, handle = [made] if isinstance(made, torch.Tensor) else made
        site = _sites[number]
        members = site.expected.differentiable if _torch.is_traced(handle) else tape_of(handle).members
        ctx.mark_non_differentiable(*(result for result, some in zip(results, members, strict=False) if not some))
        ctx.save_for_backward(handle)
        ctx.set_materialize_grads(False)
        ctx.site, ctx.needs, ctx.num_roots = number, needs, len(members)
        ctx.sizes = [size for tensor, need in zip(tensors, needs, strict=True) if need for size in tensor.shape]
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (handle,) = ctx.saved_tensors
        given = list(grads[: ctx.num_roots])
        made: Sequence[Any] = ()
        if any(grad is not None for grad in given):
            if _torch.is_traced(handle):
                made = torch.ops.breakable_cg.backward(ctx.site, handle, given, ctx.sizes)
            else:
                made = tape_of(handle).backward(given)
        gradients = iter(made or [None] * sum(ctx.needs))
        return *(None,) * 6, *(next(gradients) if need else None for need in ctx.needs)


def _define(name: str, num_written: int, num_results: int | None) -> Any:
    """An op that runs marked functions, and writes the first of their tensors. Without a number of results it returns a list.

    AOTAutograd functionalises no op that writes and returns a list.
    """
    written = "".join(f"Tensor(a{number}!) written_{number}, " for number in range(num_written))
    returns = "Tensor[]" if num_results is None else f"({', '.join(['Tensor'] * num_results)})"
    schema = f"{name}(int site, bool[] needs, bool traced, {written}{_REST}) -> {returns}"
    _library.define(schema.replace("-> (Tensor)", "-> Tensor"), tags=(torch.Tag.cudagraph_unsafe,))
    op = getattr(torch.ops.breakable_cg, name).default

    def packed(made: list[torch.Tensor]) -> Any:
        if num_results is None:
            return made
        return tuple(made) if num_results > 1 else made[0] if made else None

    def run(site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        return packed(_sites[site].run(needs, traced, tensors, *rest[num_written + 1 :]))

    def fake(site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        made = _sites[site].fake(needs, tensors, *rest[num_written + 1 :])
        return packed(made)

    def differentiate(keys: Any, site: int, needs: list[bool], traced: bool, *rest: Any) -> Any:
        tensors = [*rest[:num_written], *rest[num_written]]
        if needs or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return _torch.below_autograd(op, keys, site, needs, traced, *rest)
        taping = op if num_results is None else _overload(writing_op(num_written, num_results + 1))
        return packed(list(_Node.apply(taping, keys, site, num_written, *rest[num_written + 1 :], *tensors)))

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_fake(f"breakable_cg::{name}", fake, lib=_library)
    torch.fx.has_side_effect(op)  # two equal calls are two, and one whose result is unused is one
    _calls.add(op)
    return op


def _overload(name: str) -> Any:
    return getattr(torch.ops.breakable_cg, name).default


OP = _define("call", 0, None)
"""The op that marked functions are in compiled graphs, unless they write arguments."""


def writing_op(num_written: int, num_results: int) -> str:
    """The name of the op for functions that write so many tensors and return so many."""
    name = f"call_{num_written}_{num_results}"
    with _defining:
        if not any(op._schema.name == f"breakable_cg::{name}" for op in _calls):
            _define(name, num_written, num_results)
    return name


_defining = threading.RLock()


@torch.library.impl(_library, "shapes", "CompositeExplicitAutograd")
def _shapes(site: int, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> None:
    """Tells compiled code nothing; :func:`_writer` reads what its fake found."""


@torch.library.register_fake("breakable_cg::shapes", lib=_library)  # type: ignore[untyped-decorator]
def _shapes_fake(site: int, needs: list[bool], tensors: list[Any], ints: list[Any], floats: list[Any]) -> None:
    _sites[site].learn(needs, tensors, ints, floats)


@torch.library.impl(_library, "number", "CompositeExplicitAutograd")
def _number(site: int, numbers: torch.Tensor, position: int) -> int:
    return int(numbers[position].item())


@torch.library.register_fake("breakable_cg::number", lib=_library)  # type: ignore[untyped-decorator]
def _number_fake(site: int, numbers: torch.Tensor, position: int) -> Any:
    return _torch.fresh_int(numbers)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(site: int, handle: torch.Tensor, grads: list[Any], sizes: list[int]) -> list[torch.Tensor]:
    tape = tape_of(handle)
    with _torch.above_autograd():
        made = tape.backward(grads)
    taken = {_torch.storage_key(grad) for grad in grads if grad is not None}
    results = []
    for gradient, leaf in zip(made, tape.leaves, strict=True):
        result = torch.zeros_like(leaf, memory_format=torch.contiguous_format) if gradient is None else gradient.contiguous()
        if _torch.storage_key(result) in taken or _torch.owners_of_storage(result) > 1:
            result = result.clone(memory_format=torch.contiguous_format)  # an op may not return memory that others have
        taken.add(_torch.storage_key(result))
        results.append(result)
    return results


@torch.library.register_fake("breakable_cg::backward", lib=_library)  # type: ignore[untyped-decorator]
def _backward_fake(site: int, handle: torch.Tensor, grads: list[Any], sizes: list[Any]) -> list[torch.Tensor]:
    left = iter(sizes)
    return [
        torch.empty(tuple(itertools.islice(left, dim)), dtype=dtype, device=device)
        for dim, dtype, device in _sites[site].gradients
    ]


def is_call(op: Any) -> bool:
    """Whether an op runs marked functions."""
    return op in _calls


def direct(op: Any, site: int) -> Callable[..., Any]:
    """What a call of ``op`` runs, without the dispatcher: takes all of its arguments but the site."""
    run = functools.partial(_sites[site].run, own=True)
    if op is OP:
        return run
    num_written = _sites[site].num_written
    num_results = len(op._schema.returns)

    def writing(needs: list[bool], traced: bool, *rest: Any) -> Any:
        made = run(needs, traced, [*rest[:num_written], *rest[num_written]], *rest[num_written + 1 :])
        return tuple(made) if num_results > 1 else made[0] if made else None

    return writing


def name_of(op: Any, args: Sequence[Any]) -> str:
    """The name of the marked function that a call in a graph runs, or whose number it reads; empty for other ops."""
    ours = op in _calls or op is torch.ops.breakable_cg.number.default
    site = _sites.get(args[0]) if ours and args else None
    return site.mark.name if site is not None else ""
