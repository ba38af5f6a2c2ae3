"""Dynamo's code, called without its guards."""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, cast

import torch

from breakable_backend._torch.compiled_functions import _compile_wrapper, _content, _parts
from breakable_backend._torch.dynamo import _MODULE_CALLS


# Checked on torch 2.11, 2.13, 2.14.1 and 2.15, Python 3.11 and 3.13.
def dynamo_frames(outer: FrameType) -> tuple[list[FrameType], list[FrameType]]:
    """The running frames with code that Dynamo made, and those around the outermost of them, up to ``outer``."""
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
    """Whether a frame only calls a module or a compiled function, unless there are hooks."""
    from torch._dynamo.eval_frame import OptimizedModule

    return frame.f_code in (_compile_wrapper(), OptimizedModule.__call__.__code__, *_MODULE_CALLS)


def owner_of_call(frame: FrameType) -> object:
    """The module or compiled object whose method runs in ``frame``, called by torch's own code; None if there is none."""
    caller = frame.f_back
    if caller is None:
        return None
    if caller.f_code in _MODULE_CALLS:
        return caller.f_locals.get("self")
    return getattr(caller.f_locals.get("fn"), "__self__", None) if caller.f_code is _compile_wrapper() else None


def hooks_around(frames: Iterable[FrameType]) -> list[Mapping[Any, Any]]:
    """The dictionaries of hooks of the modules that ``frames`` call, and of all modules. Empty ones mean no hooks."""
    called = [frame.f_locals["self"] for frame in frames if frame.f_code is not _compile_wrapper()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_all = torch.nn.modules.module
    hooks = [getattr(module, kind) for module in dict.fromkeys(called) for kind in kinds]
    return hooks + [getattr(of_all, f"_global{kind}") for kind in kinds]


def graph_called_by(code: CodeType) -> str:
    """The global by which Dynamo's code calls its graph, if it calls only one compiled object; otherwise empty.

    Code that draws from Python's ``random`` before it calls the graph does not count.
    """
    graphs = [name for name in code.co_names if name.startswith("__compiled_fn")]
    more = [name for name in code.co_names if name.startswith(("__resume_at", "__gen_rand"))]
    return graphs[0] if len(graphs) == 1 and not more else ""


def function_in(compiled: Any, frame: FrameType) -> FunctionType | None:
    """The function behind ``compiled`` whose code, remade by Dynamo, runs in ``frame``; None if that is not clear."""
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
"""What Dynamo's code has in common with the code that it was made from."""


def argument_count(code: CodeType) -> int:
    """How many local variables of ``code`` are arguments, ``*args`` and ``**kwargs`` included."""
    star = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + star


def takes_any_keyword(code: CodeType) -> bool:
    """Whether ``code`` has ``**kwargs``, and so sees the order of keyword arguments."""
    return bool(code.co_flags & inspect.CO_VARKEYWORDS)


def unguarded(function: FunctionType, code: CodeType, graph: Callable[..., Any]) -> FunctionType:
    """``function`` as Dynamo compiled it to ``code``, without guards, and with ``graph`` in the place of its graph.

    ``graph`` has a name among the globals of ``function``, as compiled objects have. The name is removed when the
    result dies.
    """
    from torch._dynamo.eval_frame import skip_code

    name, suffix = graph_called_by(code), f"_bound_{next(_bound_numbers)}"
    others = {name: graph, "__import_torch_dot__dynamo_dot_utils": _UNRECORDED}
    code = code.replace(co_names=tuple(f"{known}{suffix}" if known in others else known for known in code.co_names))
    result = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    result.__kwdefaults__ = function.__kwdefaults__
    skip_code(code)  # it is compiled already
    added = {f"{known}{suffix}": value for known, value in others.items()}
    function.__globals__.update(added)
    weakref.finalize(result, _take_out, function.__globals__, tuple(added)).atexit = False
    return result


def _take_out(names: dict[str, Any], added: Sequence[str]) -> None:
    for name in added:
        names.pop(name, None)


class _Unrecorded:
    """Dynamo's utilities without the profiler ranges around the reading of parameters, which take 3 us on torch 2.11."""

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
    """Whether a module's mode matters: for torch's own, if their code contains ``training``; for others always."""
    kind = type(module)
    return not kind.__module__.startswith("torch.nn.modules.") or _reads_training(kind)


def graph_behind(function: FunctionType, code: CodeType) -> Callable[..., Any]:
    """What Dynamo's ``code`` of ``function`` calls for its graph, without the wrapper that Dynamo does not trace into."""
    graph = function.__globals__[graph_called_by(code)]
    return cast(Callable[..., Any], getattr(graph, "_torchdynamo_orig_callable", graph))
