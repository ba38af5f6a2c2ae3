"""Calls of modules in code that Dynamo traces: what is called instead.

Checked on torch 2.11, 2.13, 2.14.1 and 2.15.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from breakable_backend._torch import as_python

Instead = Callable[[torch.nn.Module, Mapping[str, Any]], tuple[Callable[..., Any] | None, bool]]


def heed_calls_of_modules(instead: Instead, watch: Callable[[Mapping[str, Any]], Callable[[], None]]) -> None:
    """Have Dynamo ask about modules that traced code calls, from now on, or from its import on.

    Args:
        instead: given a module and the backend's options, what to call with the module and its arguments, or None; and
            whether the compiled code is for this module only.
        watch: called with the options before a frame runs as Python. Returns a function that is called at its end.
    """
    as_python.watch.append(watch)
    as_python.heed_requests_for_python()  # this has to be in place before the first frame is converted
    as_python.when_imported("torch._dynamo.variables.nn_module", functools.partial(_ask, instead))


def _ask(instead: Instead, nn_module: Any) -> None:
    kind = nn_module.UnspecializedNNModuleVariable
    plain = kind.call_function

    @functools.wraps(plain)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.source is None or nn_module.is_lazy_module(self.value):
            return plain(self, tx, args, kwargs)
        function, alone = instead(self.value, as_python.options_of_backend())
        if alone:
            from torch._dynamo.guards import GuardBuilder, install_guard

            install_guard(self.source.make_guard(GuardBuilder.ID_MATCH))
        if function is None:
            return plain(self, tx, args, kwargs)
        from torch._dynamo.source import GlobalSource
        from torch._dynamo.variables.base import VariableTracker

        name = tx.output.install_global_by_id("marked_module", function)
        called = VariableTracker.build(tx, function, source=GlobalSource(name))
        stack = nn_module.record_nn_module_stack
        with stack(str(id(self.value)), self.get_nn_module_stack_source(), tx, self.value):
            return called.call_function(tx, [self, *args], kwargs)

    kind.call_function = call_function
