"""Graphs that run as Dynamo traced them, changed to do what eager does.

Some of Dynamo's higher-order ops are meant for AOTAutograd to trace through. Run as they are, ``checkpoint`` restores
no random state, a compiled region draws and calls otherwise than its body, and a ``torch.autograd.Function`` has no
second derivative. Their behaviour was read in torch 2.13, 2.14.1 and 2.15. In torch 2.11 ``checkpoint`` is right by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from breakable_backend import _torch
from breakable_backend.errors import ReplayError
from breakable_backend.ir.effects import graphs_in


def as_eager(gm: fx.GraphModule) -> Callable[..., Any]:
    """A function that runs ``gm``, a graph of Dynamo's that is not lowered, as eager runs the code that it was traced from.

    The graph is changed in place: nobody else runs it.
    """
    for module in graphs_in(gm):
        changed = False
        for node in module.graph.nodes:
            name = node.target.name() if isinstance(node.target, _torch.HigherOrderOperator) else ""
            if name == "autograd_function_apply" and not _prepare_function(module, node):
                continue
            if name in _INSTEAD:
                node.target, changed = _INSTEAD[name], True
        if changed:
            module.recompile()
    return gm.forward


def with_signs(function: Callable[..., Any], gm: fx.GraphModule) -> Callable[..., Any]:
    """``function``, which was compiled from ``gm``, for all floats: if one that it takes for 0.0 is -0.0, ``gm`` itself runs."""
    if not (zeros := tuple(_torch.zero_floats(gm))):
        return function
    traced = as_eager(gm)

    def call(*args: Any) -> Any:
        negative = any(math.copysign(1, args[position]) < 0 for position in zeros)
        return traced(*args) if negative else function(*args)

    call.executor = function.executor  # type: ignore[attr-defined]
    return call


def checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint`` as the user called it. Dynamo has stored its ``context_fn`` separately."""
    if (context := body.meta.get("_checkpoint_context_fn")) is not None:
        kwargs["context_fn"] = context
    return checkpoint(body.forward, *args, **{"use_reentrant": False, **kwargs})


def region(body: Callable[..., Any], _identifier: str, *operands: Any) -> Any:
    """What ``torch.compiler.nested_compile_region`` does outside of compiled code: it calls the body."""
    return body(*operands)


def applied(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    *args: Any,
    non_differentiable_idx: Sequence[int],
    saved_for_backward_idx: Sequence[int],
    dirty_idx: Sequence[int] = (),
) -> Any:
    """``apply`` of a ``torch.autograd.Function`` that Dynamo decomposed. A second derivative is eager's, or an error."""
    kept: list[Any] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            outputs, saved = forward(*inputs)
            kept.extend(saved)
            return outputs

        @staticmethod
        def setup_context(ctx: Any, _inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple | list) else (output,)
            # Saved through the context, as in eager: a later write is noticed, and a result does not hold its own
            # history.
            ctx.save_for_backward(*(kept[i] for i in saved_for_backward_idx))
            ctx.others = [None if i in saved_for_backward_idx else value for i, value in enumerate(kept)]
            kept.clear()
            ctx.mark_dirty(*(outputs[i] for i in dirty_idx))
            ctx.mark_non_differentiable(*(outputs[i] for i in non_differentiable_idx))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            values = list(ctx.others)
            for i, value in zip(saved_for_backward_idx, ctx.saved_tensors, strict=True):
                values[i] = value
            result = backward(*grads, *values)
            return (
                result if backward.meta[_TWICE] else _torch.refuse_second(result, (*grads, *values), _switches_inside)
            )

    if backward.meta[_TWICE] is None:
        Function.backward = staticmethod(once_differentiable(Function.backward))  # type: ignore[assignment, method-assign]
    return _torch.apply_function(Function, *args)


def _switches_inside() -> ReplayError:
    return ReplayError(
        "a second derivative was asked for through a torch.autograd.Function whose backward turns gradients on or off, "
        "and Dynamo does not tell where",
        fix="put @torch.compiler.disable above the function that calls it",
    )


_TWICE = "breakable_cg_twice"
"""Whether a traced backward can be differentiated; None if eager refuses. In the ``meta`` of its graph."""


def _prepare_function(owner: fx.GraphModule, node: fx.Node) -> bool:
    """Remove the switches that turn gradients off around a traced backward; False for the op of another release.

    With other switches inside, or if eager would refuse (``once_differentiable``), a second derivative is an error.
    """
    if not {"non_differentiable_idx", "saved_for_backward_idx"} <= node.kwargs.keys() <= _KEYWORDS:
        return False
    backward = getattr(owner, str(node.args[1].target))  # type: ignore[union-attr]
    inside = [step for step in backward.graph.nodes if step.op not in ("placeholder", "output")]
    switches = [step for step in inside if step.target is _torch.SET_GRAD_ENABLED]
    around = len(switches) == 2 and switches == [inside[0], inside[-1]] and switches[0].args == (False,)
    refused = any(torch.autograd.function.__file__ in (step.stack_trace or "") for step in inside)
    backward.meta[_TWICE] = None if refused else around
    if backward.meta[_TWICE]:
        for step in switches:
            backward.graph.erase_node(step)
        backward.recompile()
    return True


_KEYWORDS = {"dirty_idx", "non_differentiable_idx", "saved_for_backward_idx"}

_INSTEAD: Mapping[str, Callable[..., Any]] = {
    "autograd_function_apply": applied,
    "invoke_subgraph": region,
    "tag_activation_checkpoint": checkpointed,
    "wrap_activation_checkpoint": checkpointed,
}
"""What runs in place of a higher-order op. The others behave as in eager; ``test_traced.py`` checks them all."""
