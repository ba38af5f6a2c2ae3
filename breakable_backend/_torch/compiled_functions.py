"""What ``torch.compile`` returned, and which code it compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

import torch

from breakable_backend._torch.dynamo import _entries, _failure, _inlined


# What `torch.compile` returns is, or contains, a function `compile_wrapper` of Dynamo's. It closes over `fn`, which was
# compiled, and over `callback`, which compiles the frames that run below it. Checked on torch 2.11, 2.13, 2.14.1 and
# 2.15.
@functools.cache
def _compile_wrapper() -> CodeType | None:
    from torch._dynamo.eval_frame import _TorchDynamoContext

    constants = _TorchDynamoContext.__call__.__code__.co_consts
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == "compile_wrapper"), None)


Subject = tuple[object, str]
"""What graphs are filed under: what compiles them, what was compiled, its code; for a method, the object and the
method's name."""


def running_compiled() -> Iterator[Subject]:
    """The compiled functions that are running in this thread, the innermost first, each as ``callback`` and as ``fn``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _compile_wrapper():
            yield from _subjects(frame.f_locals)
        frame = frame.f_back


def subjects_of(compiled: Any) -> list[Subject]:
    """What graphs of ``compiled``, and of all compiled functions in it, are filed under."""
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
    except ValueError:  # the cell has no value yet
        return None


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, FunctionType) and value.__code__ is _compile_wrapper()


def _parts(compiled: Any) -> tuple[list[Any], list[Any]]:
    """The wrappers of ``torch.compile`` in ``compiled``, and the Python functions whose frames Dynamo compiles for them."""
    wrappers: list[Any] = []
    functions: list[Any] = []
    visited: dict[int, Any] = {}  # it holds the objects: no number comes twice
    pending = [compiled]
    while pending:
        thing = pending.pop()
        if id(thing) in visited:
            continue
        visited[id(thing)] = thing
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
    """The compiled functions that a module and its children have as attributes or methods."""
    for child in torch.nn.Module.modules(module):
        classes = [kind for kind in type(child).__mro__ if kind not in (torch.nn.Module, object)]
        for value in (*list(vars(child).values()), *(value for kind in classes for value in vars(kind).values())):
            values = value.values() if isinstance(value, dict) else value
            yield from filter(_is_wrapper, list(values) if isinstance(value, dict | list | tuple) else [value])


def _frames_of_module(module: torch.nn.Module) -> Iterator[Any]:
    """The forwards of children, and functions in them, that Dynamo compiled, or gave up, as separate frames."""
    for child in torch.nn.Module.modules(module):
        for function in (getattr(child.forward, "__func__", None), *list(vars(child).values())):
            if isinstance(function, FunctionType) and _is_frame(function.__code__):
                yield function


def _called_by(function: Any) -> Iterator[Any]:
    """Compiled objects that a function names: compiled functions, modules with some, separately compiled functions."""
    code = function.__code__
    named = [function.__globals__.get(name) for name in code.co_names]
    for value in (*_closure(function).values(), *named):
        if isinstance(value, torch.nn.Module):
            if any(True for _ in _wrappers_of_module(value)):
                yield value
        elif _is_wrapper(value) or (isinstance(value, FunctionType) and _is_frame(value.__code__)):
            yield value


def _is_frame(code: CodeType) -> bool:
    """Whether Dynamo has compiled ``code`` as a separate frame, or has tried to."""
    from torch._dynamo.convert_frame import input_codes

    return bool(_entries(code)) or (code in input_codes and _failure(code) is not None)


def holds_compiled(function: Any) -> bool:
    """Whether ``function`` is what ``torch.compile`` returned, was compiled in place, or contains such an object."""
    return bool(_parts(function)[0])


def original_of(thing: Any) -> Any:
    """The module that was compiled, for what ``torch.compile`` returned for it; ``thing`` itself otherwise."""
    return getattr(thing, "_orig_mod", thing)


def codes_of(compiled: Any) -> list[CodeType]:
    """The code of the functions behind ``compiled`` that Dynamo compiles, without its wrapper around torch's functions."""
    return [code for function in _parts(compiled)[1] if (code := function.__code__) is not _inlined()]
