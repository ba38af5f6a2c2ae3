"""Dynamo: what it compiles, skips, breaks, keeps and reports."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch._guards import CompileContext
from torch._logging._internal import trace_structured

if TYPE_CHECKING:
    from torch._dynamo.symbolic_convert import InstructionTranslator


F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE, _TORCH = (os.path.join(path, "") for path in (Path(__file__).parent.parent, Path(torch.__file__).parent))
"""The folders of this package and of torch, in which no code is the user's; with a separator, as torchvision is another."""


def graph_breaks() -> dict[str, int]:
    """Dynamo's graph breaks since its last reset: a count for each reason. A reason's first line has the user's line."""
    from torch._dynamo.utils import graph_break_reasons

    times: Counter[tuple[str, str]] = Counter()
    texts: dict[tuple[str, str], str] = {}
    for broken in graph_break_reasons:
        first, _, rest = broken.reason.strip().partition("\n")
        if first.startswith("generic_jump"):
            first = "Data-dependent branching"  # Dynamo's words for this in a function that it inlines
        if first.endswith("(delayed)") and (delayed := re.search(r"Reason: (.*?)(?:\. |$)", rest, re.MULTILINE)):
            first = delayed[1]
        frames = [frame for frame in broken.user_stack or () if not frame.filename.startswith((_PACKAGE, _TORCH))]
        if frames:
            frame = frames[-1]
            first += f", at {frame.filename}:{frame.lineno} in {frame.name}" + (f": {frame.line}" if frame.line else "")
        told = re.search(r"\(reason: (.*)\)$", rest, re.MULTILINE)  # of what was disabled
        kind = first, told[1] if told else ""
        times[kind] += 1
        texts[kind] = max(texts.get(kind, ""), f"{first}\n{rest}".strip(), key=len)
    return {texts[kind]: count for kind, count in times.items()}


@functools.cache
def _inlined() -> CodeType:
    """Code that Dynamo wraps around functions in files that it skips, such as those of ``torch.nn``."""
    from torch._dynamo.external_utils import wrap_inline

    return wrap_inline(lambda: None).__code__


def code_under_compilation() -> tuple[CodeType, CodeType] | None:
    """What Dynamo is compiling; and the code of the function, if this is a continuation after a graph break. None: nothing.

    The wrapper around torch's own functions has one code for all of them; see :func:`is_shared`.
    """
    if current_compile_id() is None or (transaction := tracing()) is None:
        return None
    from torch._dynamo.resume_execution import ContinueExecutionCache

    code = whole = transaction.f_code
    while (resumed := ContinueExecutionCache.generated_code_metadata.get(whole)) is not None:
        whole = resumed.code
    return code, whole


def tracing() -> InstructionTranslator | None:
    """The object with which Dynamo traces in this thread; None if it does not."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return cast("InstructionTranslator | None", InstructionTranslator.current_tx())
    except AttributeError:  # this thread has traced nothing yet: a backward that compiled autograd runs (torch 2.13)
        return None


def names_of_callers(root: InstructionTranslator) -> dict[str, str]:
    """What callers call the arguments that the code under compilation takes as ``*args`` and ``**kwargs``.

    For example ``{"args[0]": "input_ids", "kwargs['position_ids']": "position_ids"}``. Names of ``args`` are known in
    the ``forward`` of a module and in torch's own functions.
    """
    code, scope = root.f_code, root.f_locals
    named = code.co_argcount + code.co_kwonlyargcount
    rest = list(code.co_varnames[named:])
    args = rest.pop(0) if code.co_flags & inspect.CO_VARARGS else ""
    kwargs = rest.pop(0) if code.co_flags & inspect.CO_VARKEYWORDS else ""
    found = {f"{kwargs}[{name!r}]": name for name in scope.get(kwargs, ())}
    first = next(
        iter([*(scope.get(name) for name in code.co_varnames[: code.co_argcount]), *scope.get(args, ())]), None
    )
    function = getattr(type(first), "forward", None)
    if is_shared(code):
        function = scope["fn"]
        if isinstance(function, torch.nn.Module):
            function, found["fn"] = function.forward, "self"
    elif getattr(function, "__code__", None) is not code:
        return found
    with suppress(ValueError):  # a function in C has no signature
        parameters = list(inspect.signature(cast("Callable[..., Any]", function)).parameters.values())
        names = [parameter.name for parameter in parameters if parameter.kind <= parameter.POSITIONAL_OR_KEYWORD]
        found |= {f"{args}[{place}]": name for place, name in enumerate(names[code.co_argcount :])}
    return found


def is_shared(code: CodeType) -> bool:
    """Whether it is the code of the wrapper that Dynamo puts around all of torch's own functions."""
    return code is _inlined()


def at_recompile_limit(codes: Iterable[CodeType] | None) -> list[str]:
    """Those of ``codes`` that Dynamo will not compile again, as ``name (file:line)``; for None, of all."""
    from torch._dynamo import config
    from torch._dynamo.convert_frame import input_codes

    if codes is None:
        codes = [code for ref in list(input_codes.seen) if (code := ref()) is not None]
    limit = config.recompile_limit
    return [place_of(code) for code in dict.fromkeys(codes) if len(_entries(code)) >= limit]


def skipped(codes: Iterable[CodeType]) -> dict[str, str]:
    """Those of ``codes`` that Dynamo was asked to compile and has compiled nothing of, as ``name (file:line)``; and why."""
    from torch._dynamo.convert_frame import input_codes

    asked = [code for code in dict.fromkeys(codes) if code in input_codes and code not in _MODULE_CALLS]
    return {place_of(code): _why_skipped(code) for code in asked if not _entries(code)}


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
    """Why Dynamo gave up ``code`` in its last attempt, if it remembers (64 attempts); None if it did not."""
    from torch._dynamo.utils import get_compilation_metrics

    place = (code.co_name, code.co_filename, code.co_firstlineno)
    for attempt in reversed(get_compilation_metrics()):
        if attempt.fail_reason and place == (attempt.co_name, attempt.co_filename, attempt.co_firstlineno):
            return _told(str(attempt.fail_reason), attempt.fail_user_frame_filename, attempt.fail_user_frame_lineno)
    return None


def _told(reason: str, file: str | None, line: int | None) -> str:
    """A reason of Dynamo's in one line: what it could not trace, at which line, and why it could not go on after it."""
    first, *rest = (text.strip() for text in reason.splitlines() if text.strip())
    if file and file.startswith(_PACKAGE):  # no line of the user's; what this package has disabled has its reason
        disabled = re.search(r"\(reason: (.*)\)$", reason, re.MULTILINE)
        first, file = disabled[1] if disabled else first, None
    told = first + (f", at {file}:{line}" if file else "")
    behind = itertools.dropwhile(lambda text: "another graph break occurred" not in text, rest)
    told += "".join(f"; {text}" for text in itertools.islice(behind, 1, 2))
    if file and "fsdp" in Path(file).parts:
        told += "; FSDP's hooks are not traced, and the modules between them are compiled one by one"
    return f"{told}: compile what is around vmap and its like" if "functorch" in first else told


def stance() -> str:
    """The present stance of ``torch.compiler.set_stance``: ``"default"``, ``"force_eager"`` and so on."""
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


def stance_is_default() -> Callable[[], bool]:
    """A function that checks in each call, without an import, that no stance is set."""
    from torch._dynamo import eval_frame

    return lambda: eval_frame._stance.stance == "default"


def place_of(code: CodeType) -> str:
    """``name (file:line)``."""
    return f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def _entries(code: CodeType) -> list[Any]:
    """Dynamo's compiled versions of ``code``. C++ owns them and may drop one at any moment, so they can only be counted."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return _debug_get_cache_entry_list(code)


def constant_under_dynamo(function: F) -> F:
    """Have Dynamo call ``function`` while it traces, and take its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # all that torch.compiler.assume_constant_result does
    return function


def break_of_dynamo(reason: str) -> Callable[[F], F]:
    """Have Dynamo break its graph at calls of ``function``, and call it unchanged.

    ``torch.compiler.disable`` does this too, but imports Dynamo at once. This imports it when there is something to
    compile.
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
        frames.set_code_exec_strategy(told.__code__, skip)  # for this frame only
        return cast(F, call)

    return around


def keep_with_code(thing: object) -> bool:
    """Keep ``thing`` alive as long as the code that Dynamo is making; False if nobody keeps that code, as in an export."""
    from torch._dynamo import convert_frame

    transaction = tracing()
    assert transaction is not None
    output = transaction.output
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not output.export:  # an export drops the code and keeps its graph
        if frame.f_code.co_name == "_compile_inner" and frame.f_code.co_filename == convert_frame.__file__:
            # Dynamo calls this when the code dies, and keeps it until then. The call does nothing.
            output.cleanups.append(cast(Any, functools.partial(id, thing)))
            return True
        frame = frame.f_back
    return False


Place = tuple[int, Any]
"""The place of a Python value: the identity of an object, with an attribute of it, a key, or None for all that a
container holds. A cell has ``"cell_contents"``."""


def places_read() -> set[Place]:
    """The places of the Python values that the code which Dynamo is compiling reads, as far as it guards on them.

    A guard names its value by an expression, and each part of the expression is such a place. Checked on torch 2.11 to
    2.15.
    """
    from torch._dynamo.guards import _get_closure_vars

    transaction = tracing()
    assert transaction is not None
    output, root = transaction.output, transaction.output.root_tx
    scope = {"L": output.local_scope, "G": output.global_scope}
    cells = dict(zip(root.f_code.co_freevars, root.closure or (), strict=False))
    values: dict[Any, Any] = {}

    def value_of(source: Any) -> Any:
        if source not in values:
            name = source.name() if callable(source.name) else source.name
            try:
                values[source] = eval(name, scope, _get_closure_vars())
            except Exception:  # noqa: BLE001 - some are no expressions
                values[source] = None
        return values[source]

    found: set[Place] = set()
    met: set[Any] = set()
    for guard in output.guards:
        source: Any = guard.originating_source
        while source is not None and source not in met:
            met.add(source)
            found.add((id(value_of(source)), None))
            base, name = getattr(source, "base", None), getattr(source, "local_name", None)
            if base is not None:
                for key in (getattr(source, "member", None), getattr(source, "index", None)):
                    if isinstance(key, str | int):
                        found.add((id(value_of(base)), key))
            elif name in cells:
                found.add((id(cells[name]), "cell_contents"))
            elif (name := getattr(source, "global_name", None)) is not None:
                found.add((id(output.global_scope), name))
            source = base
    return found


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


def in_a_body() -> bool:
    """Whether Dynamo is tracing the body of a higher-order op that cannot break, such as a branch of ``torch.cond``."""
    transaction = tracing()
    tracer = None if transaction is None else transaction.output.current_tracer
    while tracer is not None and tracer.parent is not None:
        if str(tracer.source_target) not in _MAY_BREAK:
            return True
        tracer = tracer.parent
    return False


_MAY_BREAK = ("tag_activation_checkpoint", "autograd.Function")
"""Bodies in which a graph break has Dynamo call the function around them as Python: checkpoints, and a backward of the
user's. Read in torch 2.13 and 2.15."""


def may_use_freed_guards() -> bool:
    """Whether Dynamo may write to guards that it has freed, which can crash the process, with any backend.

    This is a fault of 2.11 on Python 3.12 and newer. A guard that has failed stays among the watchers of a module's
    dictionary, and is not removed when it is freed. Such a dictionary is often freed at the end of the process. Read
    and tried on 2.11; 2.13 has fixed it, and has the option off by default.
    """
    return may_keep_stale_graphs() and sys.version_info >= (3, 12)


def may_keep_stale_graphs() -> bool:
    """Whether Dynamo may not notice what is done to a parameter in place: ``requires_grad_``, ``to(memory_format=...)``.

    Where no dictionary of a module has changed, it skips the guards of the tensors in it (pytorch/pytorch#139476, #163064).
    2.13 has fixed it, and has the option off by default. Seen on 2.11.
    """
    return _BEFORE_2_13 and bool(getattr(torch._dynamo.config, "use_recursive_dict_tags_for_guards", False))


_BEFORE_2_13: bool = torch.__version__ < "2.13"  # each comparison takes 11 us, and training asks in each call


def until_reset() -> dict[str, Any]:
    """A dictionary that ``torch._dynamo.reset()`` drops."""
    from torch._dynamo.code_context import code_context

    return code_context.get_context(until_reset.__code__)


def refuses_graph_breaks() -> bool:
    """Whether Dynamo, which is tracing the caller, was called with ``fullgraph=True``."""
    transaction = tracing()
    assert transaction is not None
    return bool(transaction.one_graph or transaction.error_on_graph_break)


def global_state() -> Callable[[], bool]:
    """A check that grad mode, autocast and torch's other global settings that Dynamo guards on are as they are now."""
    return torch._C._dynamo.guards.GlobalStateGuard().check


def tensors_like(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A check, by one C++ call, that tensors have the types, dtypes, devices, layouts and so on of ``tensors``, in order.

    They have to be different objects, as ``tensors`` are.
    """
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = torch._C._dynamo.guards.TensorGuards
    return cast(Callable[..., bool], guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check)


set_frame_callback: Callable[[Any], Any] = torch._C._dynamo.eval_frame.set_eval_frame
"""Sets what compiles the functions that this thread calls from now on, None: nothing; returns what did so far."""
frame_callback: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback
"""Compiles the frames that run in this thread now; None if nothing does."""


def current_compile_id() -> Any:
    """The id of Dynamo's current compilation, for :func:`trace_artifact`; None outside of one."""
    return CompileContext.current_compile_id()


def current_compilation() -> object:
    """An object for Dynamo's current compilation, which dies with it."""
    return CompileContext.get()


def recompile_reason() -> str | None:
    """Why Dynamo compiles a function again; None for its first compilation, and outside of a compilation."""
    if current_compile_id() is None:
        return None
    from torch._dynamo.utils import get_metrics_context

    return cast(str | None, get_metrics_context()._metrics.get("recompile_reason"))


def trace_artifact(name: str, encoding: str, payload: Callable[[], str], compile_id: Any) -> None:
    """A file in the trace of ``TORCH_TRACE``. Without a trace ``payload`` is not called."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        compile_id=compile_id,
        expect_trace_id=False,
    )
