"""What users mark: ops, PyTorch functions and ``eager_region``; and how the marks reach the nodes of a graph.

The rules for unmarked nodes are in :mod:`breakable_backend.marks.rules`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx.traceback import annotate

from breakable_backend import _torch
from breakable_backend.errors import OptionsError, shown
from breakable_backend.ir.effects import calls_in, effective_ops, graphs_in
from breakable_backend.marks import call_ops, modules

OpT = TypeVar("OpT")
REGION_KEY = "breakable_cg_region"

# --- marks ------------------------------------------------------------------------------------------------------------

_marked: set[str] = set()
"""Names of ops marked by ``mark_eager``, as ``ns::op`` or ``ns::op.overload``. Names outlive the op objects."""
_marked_functions: list[Any] = []
"""PyTorch functions marked by ``mark_eager``."""


def mark_eager(op: OpT) -> OpT:
    """Have ``op`` run eagerly in everything that is compiled or captured from now on.

    >>> _ = mark_eager("aten::sort")
    >>> unmark_eager("aten::sort")

    Args:
        op: ``"ns::name"`` (all its overloads), ``"ns::name.overload"``, an op from ``torch.ops``, what
            ``torch.library.custom_op`` returns, or a PyTorch function: ``torch.softmax``, ``torch.Tensor.softmax``,
            ``torch.nn.functional.softmax``. An op that tracing decomposes (``aten::softmax``, ``linear``) is marked as
            a whole, by whatever name the code calls it. Or a class of modules, with its subclasses, or a single module:
            its call, hooks included, is then that of a marked function (:func:`eager_on_graph`), under every backend
            and under ``capture``. The mark does not keep a single module alive.

    Returns:
        ``op`` itself, so that this also works as a decorator, above ``custom_op`` or a class.

    Raises:
        OptionsError: there is no such op. The text has the nearest names.
    """
    if modules.is_module(op):
        modules.mark(op)
    elif _is_torch_function(op):
        if not any(op is known for known in _marked_functions):
            _marked_functions.append(op)
        _marked.update(_op_of_function(op))
    else:
        _marked.add(op_name(op))
    return op


def unmark_eager(op: Any) -> None:
    """Undo :func:`mark_eager` for everything that is compiled or captured from now on. Without a mark nothing happens.

    >>> unmark_eager(mark_eager(torch.ops.aten.sort))

    Raises:
        OptionsError: there is no such op.
    """
    if modules.is_module(op):
        modules.unmark(op)
    elif _is_torch_function(op):
        _marked_functions[:] = [known for known in _marked_functions if known is not op]
        _marked.difference_update(_op_of_function(op))
    else:
        _marked.discard(op_name(op))


def eager_region(misused: None = None, /) -> AbstractContextManager[None]:
    """Have a block of traceable code run eagerly, without an op of its own.

    >>> def f(x):
    ...     with eager_region():
    ...         y = x.sort().values
    ...     return y + 1

    Every ATen op that the block is traced to runs eagerly in each call. Under ``capture`` each op of the block is an
    eager step. Elsewhere the block runs as if it were not marked.

    Raises:
        OptionsError: it got an argument, as a decorator without parentheses does.
    """
    if misused is not None:
        raise OptionsError(
            "eager_region takes no argument, and was used without its parentheses",
            fix="@eager_region() above a function, or: with eager_region(): ...",
        )
    return annotate({REGION_KEY: True})


def op_name(op: Any) -> str:
    """``op`` as ``ns::name`` or ``ns::name.overload``. Raises OptionsError if it is not an op."""
    if isinstance(op, str):
        if not _torch.find_overloads(op):
            near = difflib.get_close_matches(op, list(dict.fromkeys(n.split(".")[0] for n in _torch.op_names())), 3)
            raise OptionsError(
                f"{op!r} is not a registered op" + (f"; the nearest names are {', '.join(near)}" if near else ""),
                fix="name it as 'namespace::op' or 'namespace::op.overload', after it is registered"
                + ("" if "::" in op else "; a layer or a function is passed itself, as in mark_eager(torch.nn.Linear)"),
            )
        return op
    if isinstance(op, _torch.OpOverload):
        return op.name() if "." in op.name() else f"{op.name()}.{op._overloadname}"
    if isinstance(op, _torch.OpOverloadPacket):
        return str(op._qualified_op_name)
    qualified = getattr(op, "_qualname", None)
    if isinstance(qualified, str) and _torch.find_overloads(qualified):
        return qualified
    raise OptionsError(
        f"{getattr(op, '__qualname__', shown(op))} is not an op",
        fix="pass 'namespace::op', an op from torch.ops, what torch.library.custom_op returned, or a module"
        + _instead(op),
    )


FOR_A_LAYER = "; for a layer, pass the module or its class in place of its forward"


def _instead(op: Any) -> str:
    """What to do with a function that is no op."""
    if hasattr(op, "run_eager"):
        return "; @eager_on_graph has marked it already"
    if modules.is_forward(op):
        return FOR_A_LAYER
    return "; for a function, put @eager_on_graph above it" if inspect.isfunction(op) else ""


def _is_torch_function(op: Any) -> bool:
    """Whether ``op`` is a function of PyTorch or of Python's ``operator``, which a node of a Dynamo graph can call."""
    if isinstance(op, str | type | _torch.OpOverload | _torch.OpOverloadPacket) or hasattr(op, "_qualname"):
        return False
    if modules.is_forward(op):  # that of torch's own layers too: Dynamo traces through it
        return False
    module = getattr(op, "__module__", None) or getattr(getattr(op, "__self__", None), "__module__", None) or ""
    if module == "builtins":  # len, print: aten::len is no op of theirs
        return False
    of_torch = module.split(".")[0] in ("torch", "_operator", "math")
    return callable(op) and (of_torch or type(op).__name__ in ("builtin_function_or_method", "method_descriptor"))


def _names_an_op(op: Any) -> bool:
    """Whether :func:`op_name` decides about ``op``: a string, an op, or anything that is not a function."""
    known = str | _torch.OpOverload | _torch.OpOverloadPacket
    return isinstance(op, known) or hasattr(op, "_qualname") or not callable(op)


def _op_of_function(function: Any) -> list[str]:
    """The op that a PyTorch function calls: the op of the same name, if there is one."""
    name = f"aten::{getattr(function, '__name__', '')}"
    return [name] if _torch.find_overloads(name) else []


@dataclass(frozen=True)
class EagerOps:
    """The option ``eager_ops``, resolved to names of ops, PyTorch functions as nodes call them, and modules."""

    names: frozenset[str] = frozenset()
    functions: tuple[Any, ...] = ()
    modules: modules.Modules = field(default_factory=modules.Modules)

    @classmethod
    def resolve(cls, given: Iterable[Any]) -> EagerOps:
        """Sort ``given`` into names, functions and modules.

        Raises:
            OptionsError: an element is not an op, a PyTorch function, a module or a class of modules.
        """
        given = list(given)
        names: set[str] = set()
        functions: list[Any] = []
        for op in given:
            if modules.is_module(op):
                continue
            if _is_torch_function(op):
                functions.append(op)
                names.update(_op_of_function(op))
            elif _names_an_op(op):
                names.add(op_name(op))
            else:
                raise OptionsError(
                    f"eager_ops: {getattr(op, '__qualname__', op)!r} is a Python function, and Dynamo traces through it",
                    fix="mark it with @eager_on_graph, or put its body under eager_region()"
                    + (FOR_A_LAYER if modules.is_forward(op) else ""),
                )
        return cls(frozenset(names), tuple(functions), modules.Modules.of(given))


def is_marked(op: Any, eager_ops: EagerOps) -> str:
    """Why ``op`` (an overload) is marked; empty if it is not."""
    if not isinstance(op, _torch.OpOverload):
        return ""
    if call_ops.is_call(op):
        return "marked by eager_on_graph"
    if torch.Tag.cudagraph_unsafe in op.tags:
        return "tagged cudagraph_unsafe"
    qualified = {op.name(), op_name(op), str(op._schema.name)}
    if qualified & _marked:
        return "marked by mark_eager"
    return "named in eager_ops" if qualified & eager_ops.names else ""


class Marks:
    """The marks with which a graph of Dynamo's is lowered, and which of them the graph contained."""

    def __init__(self, eager_ops: EagerOps) -> None:
        self.eager_ops = eager_ops
        self._functions: list[Any] = []
        self._ops: set[Any] = set()

    def annotate(self, gm: fx.GraphModule) -> None:
        """Put nodes that call a marked PyTorch function under an eager region."""
        for module in graphs_in(gm):
            for node in module.graph.nodes:
                target = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
                if node.op.startswith("call_") and (why := _why_function(target, self.eager_ops)):
                    node.meta["custom"] = {**node.meta.get("custom", {}), REGION_KEY: why}
                    self._functions.append(target)

    def taken_apart(self, called: Iterable[Any]) -> dict[Any, Callable[[], AbstractContextManager[None]]]:
        """The marked ops that tracing decomposes, each with the region for its parts.

        Args:
            called: ops that may be tagged, in addition to those that are marked by name.
        """
        named = (op for name in _marked | self.eager_ops.names for op in _torch.find_overloads(name))
        return {
            op: functools.partial(self._part_of, op, f"a part of {op._schema.name}, which is {why}")
            for op in {*called, *named}
            if _torch.is_composite(op) and (why := is_marked(op, self.eager_ops))
        }

    @contextmanager
    def _part_of(self, op: Any, why: str) -> Iterator[None]:
        """Have nodes that are traced inside this block carry the reason why they are eager."""
        self._ops.add(op)
        with _torch.noted(REGION_KEY, why):
            yield

    def unmet(self, module: fx.GraphModule) -> frozenset[str]:
        """The marks, each with its kind, that neither Dynamo's graph nor the lowered graph contains a call of."""
        ops = self._ops.union(*map(effective_ops, calls_in(module)))
        overloads = [op for op in ops if isinstance(op, _torch.OpOverload)]
        met = {name for op in overloads for name in (op.name(), op_name(op), str(op._schema.name))}
        called = modules.called_in(module)
        named = self._missing(self.eager_ops.names - met, self.eager_ops.functions)
        named |= set(self.eager_ops.modules.unmet(module for _, module in called))
        marked = self._missing(_marked - met, _marked_functions)
        marked |= set(modules.marked().unmet(module for by, module in called if by == modules.MARK_EAGER))
        unmet = [f"{name} is named in eager_ops" for name in named]
        return frozenset(unmet + [f"{name} is marked by mark_eager" for name in marked])

    def _missing(self, names: Iterable[str], functions: Iterable[Any]) -> set[str]:
        """Those of ``names`` that occur under no function's name, and the functions that occur under no name of theirs."""
        missing = set(names)
        for function in functions:
            ops_of_it = _op_of_function(function)
            if any(function is called for called in self._functions):
                missing.difference_update(ops_of_it)
            elif not ops_of_it:
                missing.add(getattr(function, "__name__", str(function)))
        return missing


def _why_function(target: Any, eager_ops: EagerOps) -> str:
    name = getattr(target, "__name__", str(target))
    if any(target is function for function in _marked_functions):
        return f"a part of {name}, which is marked by mark_eager"
    return f"a part of {name}, which is named in eager_ops" if any(target is f for f in eager_ops.functions) else ""


def marked_names() -> frozenset[str]:
    """What ``mark_eager`` has marked so far: ops, PyTorch functions, classes of modules; a single module by its class."""
    functions = (getattr(function, "__name__", str(function)) for function in marked_functions())
    return frozenset([*_marked, *functions, *modules.marked().unmet(())])


def marked_composites() -> list[_torch.OpOverload]:
    """Ops marked by ``mark_eager`` that autograd decomposes before a dispatch mode sees them."""
    return [op for name in sorted(_marked) for op in _torch.find_overloads(name) if _torch.is_composite(op)]


def marked_functions() -> tuple[Any, ...]:
    """PyTorch functions marked by ``mark_eager`` that are not ops. No dispatch mode sees their calls."""
    return tuple(function for function in _marked_functions if not _op_of_function(function))
