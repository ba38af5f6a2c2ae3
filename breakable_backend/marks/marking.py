"""Which nodes run eagerly, and why: marks that users make, and rules about what no CUDA graph can hold.

A rule is a function ``(node, scope) -> str``, which says why, or nothing; ``RULES`` lists them, first match wins. Which ops fail under
capture was measured on an H200 (torch 2.11).
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
from breakable_backend.errors import OptionsError
from breakable_backend.ir.effects import effective_ops
from breakable_backend.marks import modules, ops

OpT = TypeVar("OpT")
REGION_KEY = "breakable_cg_region"

# --- marks ------------------------------------------------------------------------------------------------------------

_marked: set[str] = set()
"""Names of ops marked by ``mark_eager``, as ``ns::op`` or ``ns::op.overload``: names outlive the op objects."""
_marked_functions: list[Any] = []
"""Functions of torch's marked by ``mark_eager``."""


def mark_eager(op: OpT) -> OpT:
    """Have ``op`` run eagerly in everything compiled from now on.

    An op that is made of others (``aten::softmax``, ``linear``) is marked as a whole, by whatever name it is called.

    >>> _ = mark_eager("aten::sort")
    >>> unmark_eager("aten::sort")

    Args:
        op: ``"ns::name"`` (all its overloads), ``"ns::name.overload"``, an op from ``torch.ops``, what
            ``torch.library.custom_op`` returns, or a function of torch's: ``torch.softmax``, ``torch.Tensor.softmax``,
            ``torch.nn.functional.softmax``. Or a class of modules, with its subclasses, or a single module: its call is
            then a marked function like those under :func:`eager_on_graph`, hooks included, whatever the backend, and
            under ``capture`` an eager step. Nothing keeps a single module alive.

    Returns:
        ``op`` itself, so that this also works as a decorator, above ``custom_op`` or a class.

    Raises:
        OptionsError: there is no such op; the text has the nearest names.
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
    """Undo :func:`mark_eager`, for what is compiled from now on; nothing happens if ``op`` is not marked.

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


def eager_region() -> AbstractContextManager[None]:
    """Have a block of traceable code run eagerly, without an op of its own.

    >>> def f(x):
    ...     with eager_region():
    ...         y = x.sort().values
    ...     return y + 1

    Every ATen op that the block is traced to runs on its own at each call; under ``capture`` each op of the block is an
    eager step. Elsewhere the block runs as if it were not marked.
    """
    return annotate({REGION_KEY: True})


def op_name(op: Any) -> str:
    """``op`` as ``ns::name`` or ``ns::name.overload``. Raises OptionsError if it is no op."""
    if isinstance(op, str):
        if not _torch.find_overloads(op):
            near = difflib.get_close_matches(op, list(dict.fromkeys(n.split(".")[0] for n in _torch.op_names())), 3)
            raise OptionsError(
                f"{op!r} is not a registered op" + (f"; the nearest names are {', '.join(near)}" if near else ""),
                fix="name it as 'namespace::op' or 'namespace::op.overload', after it is registered",
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
        f"{getattr(op, '__qualname__', repr(op))} is not an op",
        fix="pass 'namespace::op', an op from torch.ops, what torch.library.custom_op returned, or a module"
        + ("; for a function, put @eager_on_graph above it" if inspect.isfunction(op) else ""),
    )


def _is_torch_function(op: Any) -> bool:
    """Whether ``op`` is a function of torch's or of Python's operators: what a node of a Dynamo graph can call."""
    if isinstance(op, str | type | _torch.OpOverload | _torch.OpOverloadPacket) or hasattr(op, "_qualname"):
        return False
    module = getattr(op, "__module__", None) or getattr(getattr(op, "__self__", None), "__module__", None) or ""
    of_torch = module.split(".")[0] in ("torch", "_operator", "math")
    return callable(op) and (of_torch or type(op).__name__ in ("builtin_function_or_method", "method_descriptor"))


def _names_an_op(op: Any) -> bool:
    """Whether :func:`op_name` is to judge ``op``: a text, an op, or what is no function at all."""
    known = str | _torch.OpOverload | _torch.OpOverloadPacket
    return isinstance(op, known) or hasattr(op, "_qualname") or not callable(op)


def _op_of_function(function: Any) -> list[str]:
    """The op that a function of torch's calls: that of its name, if there is one."""
    name = f"aten::{getattr(function, '__name__', '')}"
    return [name] if _torch.find_overloads(name) else []


@dataclass(frozen=True)
class EagerOps:
    """The option ``eager_ops``, resolved: names of ops, torch functions as they stand in a Dynamo graph, and modules."""

    names: frozenset[str] = frozenset()
    functions: tuple[Any, ...] = ()
    modules: modules.Modules = field(default_factory=modules.Modules)

    @classmethod
    def resolve(cls, given: Iterable[Any]) -> EagerOps:
        """Sort ``given`` into names, functions and modules.

        Raises:
            OptionsError: neither an op, nor a torch function, nor a module or a class of modules.
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
                    fix="mark it with @eager_on_graph, or put its body under eager_region()",
                )
        return cls(frozenset(names), tuple(functions), modules.Modules.of(given))


def is_marked(op: Any, eager_ops: EagerOps) -> str:
    """Why ``op`` (an overload) is marked; empty if it is not."""
    if not isinstance(op, _torch.OpOverload):
        return ""
    if ops.is_call(op):
        return "marked by eager_on_graph"
    if torch.Tag.cudagraph_unsafe in op.tags:
        return "tagged cudagraph_unsafe"
    qualified = {op.name(), op_name(op), str(op._schema.name)}
    if qualified & _marked:
        return "marked by mark_eager"
    return "named in eager_ops" if qualified & eager_ops.names else ""


class Marks:
    """The marks that a graph of Dynamo's is lowered with, and which of them it met."""

    def __init__(self, eager_ops: EagerOps) -> None:
        self.eager_ops = eager_ops
        self._functions: list[Any] = []
        self._ops: set[Any] = set()

    def annotate(self, gm: fx.GraphModule) -> None:
        """Put nodes that call a marked function of torch's under an eager region."""
        for module in gm.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                target = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
                if node.op.startswith("call_") and (why := _why_function(target, self.eager_ops)):
                    node.meta["custom"] = {**node.meta.get("custom", {}), REGION_KEY: why}
                    self._functions.append(target)

    def taken_apart(self, called: Iterable[Any]) -> dict[Any, Callable[[], AbstractContextManager[None]]]:
        """The marked ops that tracing takes apart, each with the region that its parts are to be in.

        Args:
            called: ops that may be tagged, beside those that are marked by their names.
        """
        named = (op for name in _marked | self.eager_ops.names for op in _torch.find_overloads(name))
        return {
            op: functools.partial(self._part_of, op, f"a part of {op._schema.name}, which is {why}")
            for op in {*called, *named}
            if _torch.is_composite(op) and (why := is_marked(op, self.eager_ops))
        }

    @contextmanager
    def _part_of(self, op: Any, why: str) -> Iterator[None]:
        """Have nodes that are traced in here say why they are eager."""
        self._ops.add(op)
        with _torch.noted(REGION_KEY, why):
            yield

    def unmet(self, module: fx.GraphModule) -> frozenset[str]:
        """What is marked, with how, and neither the lowered graph nor the one before it calls."""
        ops = {
            op for node in module.graph.nodes if node.op == "call_function" for op in effective_ops(node)
        } | self._ops
        overloads = [op for op in ops if isinstance(op, _torch.OpOverload)]
        met = {name for op in overloads for name in (op.name(), op_name(op), str(op._schema.name))}
        called = modules.called_in(module)
        named = self._missing(self.eager_ops.names - met, self.eager_ops.functions)
        named |= set(self.eager_ops.modules.unmet(module for _, module in called))
        marked = self._missing(_marked - met, _marked_functions)
        marked |= set(modules.marked().unmet(module for by, module in called if by == modules.MARK_EAGER))
        return frozenset(
            [f"{name} is named in eager_ops" for name in named] + [f"{name} is marked by mark_eager" for name in marked]
        )

    def _missing(self, names: Iterable[str], functions: Iterable[Any]) -> set[str]:
        """Those of ``names`` that are not there by a function's name, and the functions that are not there by theirs."""
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


def marked_composites(*, entirely: bool) -> list[str]:
    """The ops marked by ``mark_eager`` that autograd takes apart before a dispatch mode sees them: all, or some, overloads."""
    names = [name for name in sorted(_marked) if any(map(_torch.is_composite, _torch.find_overloads(name)))]
    return [name for name in names if _torch.is_composite_by_name(name)] if entirely else names


def marked_functions() -> tuple[Any, ...]:
    """The functions of torch's marked by ``mark_eager`` that are no op: Python calls them, and no dispatch mode sees that."""
    return tuple(function for function in _marked_functions if not _op_of_function(function))
