"""Symbolic sizes, and numbers that are known only at run time."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

from breakable_backend._torch.dynamo import names_of_callers, tracing

if TYPE_CHECKING:
    import sympy


def has_hint(number: Any) -> bool:
    """Whether the value of a symbolic number in the call that is being traced is known."""
    return isinstance(number, int | float) or number.node.hint is not None


def hint_of(number: Any) -> int:
    """The value of a symbolic int in the call that is being traced."""
    return number if type(number) is int else int(number.node.hint)


def name_of(number: Any) -> str:
    """Where Dynamo reads a symbolic number, as ``x.size()[1]`` or ``n``; empty if it computes it, or for no symbol."""
    if not isinstance(number, torch.SymInt) or not number.node.expr.is_symbol:
        return ""
    shape_env = number.node.shape_env
    sources = shape_env.var_to_sources.get(number.node.expr, ())
    return _as_written(sources[0], _called.get(shape_env, {})) if sources else ""


def _as_written(source: Any, called: Mapping[str, str]) -> str:
    """Where Dynamo reads an input, as users write it: ``x``, ``batch['ids']``, ``self.layers[0].weight``."""
    name = re.sub(r"\b[LG]\['(\w+)'\]", r"\1", str(source.name() if callable(source.name) else source.name))
    name = re.sub(
        r"\._(?:modules|parameters|buffers)\['(\w+)'\]",
        lambda found: f"[{found[1]}]" if found[1].isdigit() else f".{found[1]}",
        name,
    )
    argument = re.match(r"\w+(\['?\w+'?\])?", name)
    for taken in dict.fromkeys((argument[0], argument[0].partition("[")[0])) if argument else ():
        if taken in called:
            return called[taken] + name[len(taken) :]
    return name


NAME = "breakable_cg_name"

_called: weakref.WeakKeyDictionary[Any, Mapping[str, str]] = weakref.WeakKeyDictionary()
"""By the symbols of a compilation: what callers call the arguments that the code takes as ``*args`` and ``**kwargs``."""


def note_names(gm: fx.GraphModule) -> None:
    """Note for each input of Dynamo's graph what users call it. Dynamo forgets it when the graph is compiled."""
    called: Mapping[str, str] = {}
    if (root := tracing()) is not None:
        called = _called[root.output.shape_env] = names_of_callers(root)
    for node in gm.graph.find_nodes(op="placeholder"):
        if (source := getattr(node.meta.get("grapharg"), "source", None)) is not None:
            node.meta[NAME] = _as_written(source, called)


def name_inputs(nodes: Sequence[fx.Node], gm: fx.GraphModule) -> dict[str, str]:
    """Give ``nodes``, placeholders of a trace of ``gm``, the names that :func:`note_names` noted: ``self_layers_0_weight``.

    Returns the new name of each node, by its old one.
    """
    given, renamed = gm.graph.find_nodes(op="placeholder"), dict[str, str]()
    for place, node in enumerate(nodes):
        kind, parts = node.meta.get("desc"), list[str]()
        while (whole := getattr(kind, "base", None)) is not None:  # a part of a tensor subclass
            parts.insert(0, getattr(kind, "attr", "size"))
            kind = whole
        place = place if kind is None else getattr(kind, "idx", len(given))
        if place < len(given) and (name := given[place].meta.get(NAME)):
            before = node.name
            node._rename(as_identifier(".".join((name, *parts))))
            node.target = renamed[before] = node.name
    return renamed


def as_identifier(written: str) -> str:
    """The name of an input by what users write: ``self_layers_0_weight`` for ``self.layers[0].weight``."""
    return re.sub(r"\W+", "_", written).strip("_")


def fresh_int(tensor: Any) -> Any:
    """An int that is known only at run time, in the fake implementation of an op that takes ``tensor``.

    Raises what torch's own ops raise in a trace without symbols; see ``is_about_numbers``.
    """
    if tensor.fake_mode.shape_env is None:
        error = DataDependentOutputException(torch.ops.breakable_cg.number.default)
        raise error
    return tensor.fake_mode.shape_env.create_unbacked_symint()


def is_about_numbers(error: Exception) -> bool:
    """Whether a trace without symbols has met a number, or a size, that is known only at run time."""
    return isinstance(error, DataDependentOutputException | DynamicOutputShapeException)


@contextmanager
def ignore_fresh_symbols(tensors: Iterable[Any]) -> Iterator[None]:
    """Let code that reads values run on fake tensors, although no graph will contain the numbers that it makes."""
    modes = (getattr(tensor, "fake_mode", None) for tensor in tensors)
    env = next((mode.shape_env for mode in modes if mode is not None), None)
    if env is None:
        yield
    else:
        with env.ignore_fresh_unbacked_symbols():
            yield


_NO_SYMBOLS: frozenset[Any] = frozenset()


def free_symbols(value: Any) -> Any:
    """The symbols in a number, a fake tensor, or several of them."""
    if type(value) in (FakeTensor, torch.Tensor) and not value._has_symbolic_sizes_strides:
        return _NO_SYMBOLS  # the usual case, which is quick
    if type(value) is FakeTensor and value.layout is torch.strided:
        numbers = (*value.shape, *value.stride(), value.storage_offset())
        sizes = {number.node for number in numbers if type(number) is torch.SymInt}
        # Three times as quick as torch's own function.
        return _NO_SYMBOLS.union(*[node.expr.free_symbols for node in sizes])
    if type(value) in (list, tuple):
        return _NO_SYMBOLS.union(*map(free_symbols, value))
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.free_symbols(value)


def evaluate(value: Any, symbols: Mapping[sympy.Symbol, int]) -> Any:
    """The plain number of a backed ``SymInt``, ``SymFloat`` or ``SymBool`` under ``symbols``; other values unchanged."""
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value
    import sympy

    result = sympy.sympify(value.node.expr).xreplace({s: sympy.Integer(v) for s, v in symbols.items()})
    if isinstance(value, torch.SymInt):
        return int(result)
    if isinstance(value, torch.SymFloat) and not result.is_Number:  # ToFloat(True) stays as it is
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import PythonReferenceAnalysis

        result = sympy_interp(PythonReferenceAnalysis, dict(symbols), value.node.expr)
    return float(result) if isinstance(value, torch.SymFloat) else bool(result)


def numbers_of(values: Sequence[Any], symbols: Sequence[sympy.Symbol]) -> Callable[..., tuple[int, ...]]:
    """A function of the values of ``symbols`` that returns the numbers of ``values``, which are ints or ``SymInt``."""
    from torch.utils._sympy.printers import PythonPrinter

    texts = [PythonPrinter().doprint(v.node.expr) if isinstance(v, torch.SymInt) else str(v) for v in values]
    text = f"lambda {', '.join(map(str, symbols))}: ({''.join(f'{text}, ' for text in texts)})"
    function: Callable[..., tuple[int, ...]] = eval(text, {"math": math, "torch": torch})
    return function


def symbols_made(node: fx.Node) -> frozenset[sympy.Symbol]:
    """The unbacked symbols that the call of a node made when it was traced, even if they were replaced since."""
    return frozenset(node.meta.get("unbacked_bindings") or ())


def is_ragged(value: Any) -> bool:
    """Whether ``value`` stands for the lengths of a jagged nested tensor: an int that ``int()`` refuses."""
    return isinstance(value, torch.SymInt) and bool(value.node.is_nested_int())


def is_argument_float(value: Any) -> bool:
    """Whether a number is a float argument of the compiled function, as Dynamo passes it once it has varied.

    Its expression is a symbol, or a number if the trace has compared it with one: a guard holds it then.
    """
    if not isinstance(value, torch.SymFloat):
        return False
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    expr = value.node.expr
    return bool(expr.is_number) or (expr.is_Symbol and symbol_is_type(expr, SymT.FLOAT))


def zero_floats(gm: fx.GraphModule) -> dict[int, bool]:
    """The positions of the float arguments of a Dynamo graph that the trace holds at zero, and whether it computes with them.

    The guard lets 0.0 and -0.0 pass, and symbols have no sign for either: the trace takes both, and ``-scale``, for 0.0.
    """
    zeros = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        for read in (user for user in node.users if user.target == "item"):
            value = read.meta.get("example_value")
            if is_argument_float(value) and value.node.expr.is_number and float(value.node.expr) == 0:
                made = (user.meta.get("example_value") for user in read.users)
                zeros[position] = any(isinstance(number, float | torch.SymFloat) for number in made)
    return zeros


def symbol_of(value: torch.SymInt) -> sympy.Symbol | None:
    """The symbol that ``value`` consists of, if it is nothing else."""
    expr = value.node.expr
    return expr if expr.is_Symbol else None
