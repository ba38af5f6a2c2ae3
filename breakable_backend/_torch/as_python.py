"""Frames that run once as Python, instead of being compiled."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any, NoReturn

import torch

from breakable_backend._torch.dynamo import tracing


# What has to be known about a call before Dynamo can trace it is learned by running the frame once as Python. torch has
# no function for this: a frame that is skipped is skipped for good, even for other frames with the same code, and what
# it calls is compiled.
class _Thread(threading.local):
    tracing = 0
    """How many frames Dynamo is converting, one inside the other."""
    asked: Mapping[str, Any] | None = None
    """The options of the backend, if the frame that is being converted has to run as Python."""
    python = 0
    """How many frames are running as Python."""


thread = _Thread()


class _ThisOnce:
    """Exists while a frame runs as Python: Dynamo's C++ code keeps the answer that holds it until the frame returns."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        thread.python += 1
        self.ends = [begin(options) for begin in watch]

    def __del__(self) -> None:
        thread.python -= 1
        for end in self.ends:
            end()


watch: list[Callable[[Mapping[str, Any]], Callable[[], None]]] = []
"""Called with the options of the backend before a frame runs as Python. Each returns a function that is called at its
end."""


def hide_from_dynamo(code: CodeType) -> None:
    """Have Dynamo ignore frames of ``code``, and everything that they call."""
    frames: Any = torch._C._dynamo.eval_frame
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(code, strategy)


hide_from_dynamo(_ThisOnce.__del__.__code__)


def run_as_python(reason: str) -> NoReturn:
    """Have the frame that Dynamo is tracing, and what it calls, run as Python once; see :func:`can_run_as_python`."""
    from torch._dynamo.exc import SkipFrame

    thread.asked = options_of_backend()
    skip = SkipFrame(reason)
    raise skip


def options_of_backend() -> Mapping[str, Any]:
    """The options that ``torch.compile`` got for what Dynamo is tracing."""
    transaction = tracing()
    backend: Any = transaction.output.compiler_fn if transaction is not None else None
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "kwargs", {}).get("options") or {}


def can_run_as_python() -> bool:
    """Whether the frame of a call is being traced. An export has none."""
    return thread.tracing > 0


def heed_requests_for_python() -> None:
    """Have Dynamo obey :func:`run_as_python`, from now on, or from its import on."""
    when_imported("torch._dynamo.convert_frame", _heed)


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call ``then`` with a module of Dynamo's, now or at its import, before any frame can be converted."""
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Calls the functions that wait for the import of a module."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _heed(convert_frame: Any) -> None:
    """Wrap Dynamo's callback so that the state of the code, which other frames may share, does not change."""
    plain = convert_frame.CatchErrorsWrapper.__call__
    if getattr(plain, "heeds_requests_for_python", False):
        return

    @functools.wraps(plain)
    def convert(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        outer, thread.asked = thread.asked, None
        state = dict(frame_state)
        thread.tracing += 1
        try:
            answer = plain(self, frame, cache_entry, frame_state)
        except Exception:
            if thread.asked is None:
                raise
        finally:
            thread.tracing -= 1
            asked, thread.asked = thread.asked, outer
        if asked is None:
            return answer
        frame_state.clear()
        frame_state.update(state)
        _count_as_compiled()
        return _this_once(asked)

    # To find the caller of the frame that it converts, Dynamo skips the frames of its own file.
    convert.__code__ = convert.__code__.replace(co_filename=plain.__code__.co_filename)  # type: ignore[attr-defined]
    convert.heeds_requests_for_python = True  # type: ignore[attr-defined]
    convert_frame.CatchErrorsWrapper.__call__ = convert


def _this_once(options: Mapping[str, Any]) -> Any:
    """The answer by which Dynamo's C++ code runs a frame as it is, and ignores everything that it calls."""
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.types import ConvertFrameReturn

    strategy = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.SKIP)
    answer = ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=False)
    answer.this_once = _ThisOnce(options)  # type: ignore[attr-defined]
    return answer


def _count_as_compiled() -> None:
    """Under ``fullgraph=True`` a call in which no frame was compiled is an error. torch 2.11 does not check this."""
    count = getattr(torch._C._dynamo.eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count is not None and (compiled := count(-1)) >= 0:
        count(compiled + 1)
