"""Any Python function as an eager step: ``@eager_on_graph``.

Outside a capture a marked function is the function. Under ``capture`` it is a break. Under ``torch.compile``, whatever
the backend, it is one opaque node, which Dynamo does not look into.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import torch

from breakable_backend import _torch, active
from breakable_backend.errors import EagerOutputError, OptionsError, PartitionError

F = TypeVar("F", bound=Callable[..., Any])
Structure = tuple[Any, ...]
"""A nest of tuples: what kind of container, and its children; or a leaf."""


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
    sites: dict[Any, Site] = field(default_factory=dict, repr=False)
    """Ways in which compiled code calls it."""


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

    Under ``torch.compile``, whatever the backend, a call is one opaque node, with ``fullgraph=True`` too, if arguments and
    results are tensors and plain values (int, float, bool, str, None) in lists, tuples, dicts with string keys, named
    tuples or dataclasses. A call with other arguments (a module, as ``self``), one that needs gradients, and one of a
    function with ``mutates_args`` is a graph break of Dynamo's: it runs as it is, and fullgraph refuses it.

    A tensor argument that the function stores away is overwritten by a later replay: store a ``clone()``.

    Raises:
        OptionsError: not a function, or ``mutates_args`` names no parameter of it.
        PartitionError: from the compiled call, a function that cannot run on fake tensors and has no ``fake``, or whose
            result no graph can hold.
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
    mark = Mark(function, getattr(function, "__qualname__", type(function).__name__), source, **said)
    uncompiled = torch.compiler.disable(functools.partial(_run_inline, function))
    get, writes = active.handler.get, bool(mark.mutates_args)

    @_torch.constant_under_dynamo
    def site_number(structure: Structure) -> int:
        return _site(mark, structure)  # Dynamo passes no frozen dataclass to such a function (torch 2.11)

    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if writes or not _is_opaque_call((args, kwargs)):
                return uncompiled(*args, **kwargs)
            return _opaque(site_number, args, kwargs)
        handler = get()
        if handler is None:
            return function(*args, **kwargs)
        return handler.call(mark, args, kwargs)

    marked.run_eager = function  # type: ignore[attr-defined]
    marked.mark = mark  # type: ignore[attr-defined]
    return marked


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
# Dynamo traces the functions of this part, down to the call of the op. Its `site` says which function, and how its
# arguments are put together from tensors and numbers.

PLAIN = (bool, str, type(None))


def _is_opaque_call(value: Any) -> bool:
    """Whether a value consists of what an op can take; no tensor in it may need gradients here."""
    if isinstance(value, torch.Tensor):
        return not (torch.is_grad_enabled() and value.requires_grad)
    if value is None or isinstance(value, (bool, str, int, float)):
        return True
    if type(value) in (list, tuple):
        return all([_is_opaque_call(item) for item in value])  # noqa: C419 - Dynamo traces it
    if type(value) is dict:
        return all([isinstance(key, str) and _is_opaque_call(item) for key, item in value.items()])  # noqa: C419
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return all([_is_opaque_call(item) for item in value])  # noqa: C419 - Dynamo traces it
    if dataclasses.is_dataclass(value):
        return all([_is_opaque_call(getattr(value, part.name)) for part in dataclasses.fields(value)])  # noqa: C419 - Dynamo traces it
    return False


def _opaque(site_number: Callable[[Structure], int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    structure = _take_apart((args, kwargs), tensors, ints, floats)
    site = site_number(structure)
    results = torch.ops.breakable_cg.call(site, tensors, ints, floats)
    return _put_together(_result(site), results, ints, floats, tensors)


def _take_apart(value: Any, tensors: list[Any], ints: list[Any], floats: list[Any]) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    if value is None or isinstance(value, (bool, str)):
        return ("plain", value)
    if isinstance(value, int):
        ints.append(value)
        return ("int", len(ints) - 1)
    if isinstance(value, float):
        floats.append(value)
        return ("float", len(floats) - 1)
    if type(value) is list:
        return ("list", tuple([_take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is tuple:
        return ("tuple", tuple([_take_apart(item, tensors, ints, floats) for item in value]))
    if type(value) is dict:
        items = tuple([_take_apart(item, tensors, ints, floats) for item in value.values()])
        return ("dict", tuple(value.keys()), items)
    if isinstance(value, tuple):
        return ("named", type(value), tuple([_take_apart(item, tensors, ints, floats) for item in value]))
    names = tuple([part.name for part in dataclasses.fields(value)])
    return ("data", type(value), names, tuple([_take_apart(getattr(value, n), tensors, ints, floats) for n in names]))


def _put_together(structure: Structure, tensors: Any, ints: Any, floats: Any, arguments: Any) -> Any:
    kind = structure[0]
    if kind == "tensor":
        return tensors[structure[1]]
    if kind == "argument":
        return arguments[structure[1]]
    if kind == "view":
        return arguments[structure[1]].as_strided(structure[2], structure[3], structure[4])
    if kind == "plain":
        return structure[1]
    if kind == "int":
        return ints[structure[1]]
    if kind == "float":
        return floats[structure[1]]
    items = [_put_together(item, tensors, ints, floats, arguments) for item in structure[-1]]
    if kind == "list":
        return items
    if kind == "tuple":
        return tuple(items)
    if kind == "dict":
        return dict(zip(structure[1], items))  # noqa: B905 - Dynamo traces this
    if kind == "named":
        return tuple.__new__(structure[1], items)  # calling it needs a guard, and a result's class has no source
    return structure[1](**dict(zip(structure[2], items)))  # noqa: B905


def _site(mark: Mark, structure: Structure) -> int:
    """The number of the way in which ``mark`` is called here, where Dynamo is tracing."""
    autocast = tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
    key = structure, autocast, torch.is_grad_enabled()
    if key not in mark.sites:
        mark.sites[key] = Site(next(_numbers), mark, structure, autocast, torch.is_grad_enabled())
        _sites[mark.sites[key].number] = mark.sites[key]
    return mark.sites[key].number


@_torch.constant_under_dynamo
def _result(number: int) -> Structure:
    """How the result of a call that was just traced is put together."""
    site = _sites[number]
    if site.error is not None:
        raise site.error
    return site.result


Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@dataclass(eq=False)
class Site:
    """One way in which compiled code calls a marked function. The mark owns it."""

    number: int
    mark: Mark
    arguments: Structure
    autocast: tuple[tuple[str, torch.dtype], ...]
    grad: bool
    result: Structure = ("plain", None)
    error: PartitionError | None = None
    specs: dict[Any, tuple[Structure, list[Spec]]] = field(default_factory=dict)
    """Results by the layouts of the arguments, from runs on fake tensors."""

    def fake(self, tensors: list[Any], ints: list[Any], floats: list[Any]) -> list[torch.Tensor]:
        """Run the function on fake tensors, unless that was done for these layouts."""
        key = _layouts(tensors, ints, floats)
        if key not in self.specs:
            try:
                with _torch.ignore_fresh_symbols(tensors):
                    result = self._call(self.mark.fake or self.mark.function, tensors, ints, floats)
                    self.result, fresh = self._of_result(result, tensors)
            except _torch.DynamoError:
                raise
            except PartitionError as error:
                self.error = error
                return []
            except Exception as error:  # noqa: BLE001 - whatever the function raises on tensors without values
                self.error = self._needs_fake(error)
                return []
            if key is None:
                return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in fresh]
            self.specs[key] = self.result, list(map(_spec, fresh))
        self.result, specs = self.specs[key]
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in specs
        ]

    def run(self, tensors: list[Any], ints: list[int], floats: list[float]) -> list[torch.Tensor]:
        """Call the function on real tensors, once.

        Raises:
            EagerOutputError: the result is not what the run on fake tensors said.
        """
        with self._ambient():
            result = self._call(functools.partial(_run_inline, self.mark.function), tensors, ints, floats)
        structure, fresh = self._of_result(result, tensors)
        known = self.specs.get(_layouts(tensors, ints, floats))
        wanted = known[0] if known is not None else self.result
        if structure != wanted:
            raise self._failure(f"put together as {structure}", str(wanted))
        for got, want in zip(map(_spec, fresh), known[1] if known is not None else (), strict=known is not None):
            if got != want:
                raise self._failure(_describe(got), _describe(want))
        return fresh

    def _call(self, function: Callable[..., Any], tensors: Any, ints: Any, floats: Any) -> Any:
        args, kwargs = _put_together(self.arguments, tensors, ints, floats, ())
        return function(*args, **kwargs)

    def _of_result(self, result: Any, arguments: Sequence[torch.Tensor]) -> tuple[Structure, list[torch.Tensor]]:
        """How a result is put together, with aliases of arguments told from new memory."""
        if not _is_result(result):
            raise PartitionError(
                f"{self.mark.name} returns what compiled code cannot hold: {type(result).__name__}",
                where=self.mark.source,
                fix="return tensors and plain values, in lists, tuples, dicts, named tuples or dataclasses",
            )
        tensors: list[torch.Tensor] = []
        numbers: list[Any] = []
        structure = _take_apart(result, tensors, numbers, numbers)
        owners = {_torch.storage_key(argument): number for number, argument in reversed(list(enumerate(arguments)))}
        fresh: list[torch.Tensor] = []
        leaves: list[Structure] = []
        for tensor in tensors:
            owner = owners.get(_torch.storage_key(tensor))
            if owner is None:
                if any(_torch.storage_key(tensor) == _torch.storage_key(other) for other in fresh):
                    raise PartitionError(
                        f"{self.mark.name} returns tensors that share memory",
                        where=self.mark.source,
                        fix="return one of them and make the views outside, or return clones",
                    )
                leaves.append(("tensor", len(fresh)))
                fresh.append(tensor)
            else:
                leaves.append(_alias(tensor, owner, arguments))
        return _with_leaves(structure, leaves, numbers), fresh

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

    def _needs_fake(self, error: Exception) -> PartitionError:
        try:
            signature = str(inspect.signature(self.mark.function))
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

    def _failure(self, got: str, wanted: str) -> EagerOutputError:
        return EagerOutputError(
            f"{self.mark.name} returned {got}, but was compiled for {wanted}",
            where=self.mark.source,
            fix="return the same structure and plain values at each call, and the layouts that fake= tells",
        )


def _is_result(value: Any) -> bool:
    with torch.no_grad():
        return _is_opaque_call(value)


def _alias(tensor: torch.Tensor, owner: int, arguments: Sequence[torch.Tensor]) -> Structure:
    for number, argument in enumerate(arguments):
        same_memory = _torch.storage_key(argument) == _torch.storage_key(tensor)
        if same_memory and _spec(argument) == _spec(tensor) and argument.storage_offset() == tensor.storage_offset():
            return ("argument", number)
    return ("view", owner, tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())


def _with_leaves(structure: Structure, leaves: Sequence[Structure], numbers: Sequence[Any]) -> Structure:
    kind = structure[0]
    if kind == "tensor":
        return leaves[structure[1]]
    if kind in ("int", "float"):
        return ("plain", numbers[structure[1]])
    if kind == "plain":
        return structure
    return (*structure[:-1], tuple(_with_leaves(item, leaves, numbers) for item in structure[-1]))


def _spec(tensor: torch.Tensor) -> Spec:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device


def _describe(spec: Spec) -> str:
    shape, stride, dtype, device = spec
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} with stride {list(stride)} on {device}"


def _layouts(tensors: Sequence[torch.Tensor], ints: Sequence[Any], floats: Sequence[Any]) -> Any:
    """What results are looked up by; None where a size or number is symbolic."""
    specs = tuple(map(_spec, tensors))
    numbers = [*ints, *floats, *(size for shape, stride, _, _ in specs for size in (*shape, *stride))]
    return (specs, *ints, *floats) if all(type(number) in (int, float) for number in numbers) else None


_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
"""Sites by their number, which is what a graph can hold."""

_library = torch.library.Library("breakable_cg", "FRAGMENT")
_library.define(
    "call(int site, Tensor[] tensors, SymInt[] ints, float[] floats) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),
)
OP = torch.ops.breakable_cg.call.default
"""The one op that all marked functions are in compiled graphs."""
torch.fx.has_side_effect(OP)  # two equal calls are two, and one whose result is unused is one


@torch.library.impl(_library, "call", "CompositeExplicitAutograd")
def _run(site: int, tensors: list[Any], ints: list[int], floats: list[float]) -> list[torch.Tensor]:
    return _sites[site].run(tensors, ints, floats)


@torch.library.register_fake("breakable_cg::call", lib=_library)  # type: ignore[untyped-decorator]
def _fake(site: int, tensors: list[Any], ints: list[Any], floats: list[Any]) -> list[torch.Tensor]:
    return _sites[site].fake(tensors, ints, floats)


def direct(site: int) -> Callable[..., Any]:
    """What a call of :data:`OP` runs, without the dispatcher: takes all of its arguments but the site."""
    return _sites[site].run


def name_of(op: Any, args: Sequence[Any]) -> str:
    """The name of the marked function that a call of :data:`OP` runs; empty for other ops."""
    site = _sites.get(args[0]) if op is OP and args else None
    return site.mark.name if site is not None else ""
