"""How to avoid a graph break of Dynamo's, and how to have a graph captured that is not, by the reason in the report.

The texts of Dynamo's reasons are the same in torch 2.11 to 2.15, but for recurrent modules.
"""

from __future__ import annotations

from breakable_backend.marks.functions import (
    CALLED_OTHERWISE,
    IS_OF_TYPE,
    MARK_ONCE,
    MARKED_ANEW,
    PASS_THE_SAME,
    UNDER_A_TRANSFORM,
    WRITES_WHAT_NEEDS_GRADIENTS,
)

SCALARS = "torch._dynamo.config.capture_scalar_outputs = True"
SHAPES = "torch._dynamo.config.capture_dynamic_output_shape_ops = True"

_BY_BEGINNING = {
    "Unsupported Tensor.item() call": f"set {SCALARS}, or {{mark}}",
    "Dynamic shape operator": f"set {SHAPES}, or {{mark}}",
    "Data-dependent branching": "{mark}; where both branches may be computed, torch.where needs no mark",
    "Skip calling `torch.compiler.disable()`d function": "put @eager_on_graph in the place of torch.compiler.disable",
    "Attempted to wrap RNN, GRU, or LSTM": "set torch._dynamo.config.allow_rnn = True",
    "Dynamo does not support RNN, GRU, or LSTM": "set torch._dynamo.config.allow_rnn = True",
    "Call to `torch._dynamo.graph_break()`": "take the call of torch._dynamo.graph_break() out",
}
"""What helps, by the beginning of a reason."""

MARK_THE_MODULE = "put the call of what Dynamo could not trace into a function under @eager_on_graph, or mark its module by mark_eager"

_OF_MARKED = {
    IS_OF_TYPE: "pass tensors, modules and plain values, alone or in lists, tuples, dicts and dataclasses; an object of "
    "another class is better closed over, or, for self, made a torch.nn.Module",
    WRITES_WHAT_NEEDS_GRADIENTS: "return a new tensor in place of the write, or write into x.detach()",
    CALLED_OTHERWISE: f"{PASS_THE_SAME}; or give a marked function its layout: @eager_on_graph(fake=...)",
    UNDER_A_TRANSFORM: "call it outside of the transform",
}
"""What helps where a marked function is no node, by a part of the reason."""


def advice(graph_break: str) -> str:
    """How to keep one program at a break from :func:`breakable_backend._torch.graph_breaks`; empty if nothing helps.

    >>> print(advice("Data-dependent branching, at model.py:7 in forward: if x.sum() > 0: x = x + 1"))
    put `if x.sum() > 0: x = x + 1` into a function of its own under @eager_on_graph; where both branches may be computed, torch.where needs no mark
    """
    first = graph_break.strip().partition("\n")[0]
    if first.startswith(MARKED_ANEW):
        return MARK_ONCE
    if ", is no node: " in first:  # it is a marked function already, and the reason says what is wrong with it
        told = graph_break.strip().partition("\n")[2].strip()
        return next((cure for what, cure in _OF_MARKED.items() if what in first), told)
    _, found, place = first.rpartition(", at ")
    _, _, code = place.partition(": ") if found else ("", "", "")
    block = "the block that begins with " if code.endswith(":") else ""
    mark = f"put {block}`{code}` into a function of its own under @eager_on_graph" if code else MARK_THE_MODULE
    return _known(first, mark) or mark


def to_compile(why: str) -> str:
    """How to have a function compiled that Dynamo left alone; empty for a reason that is not known here."""
    return _known(why, MARK_THE_MODULE)


def _known(why: str, mark: str) -> str:
    return next((text for beginning, text in _BY_BEGINNING.items() if why.startswith(beginning)), "").format(mark=mark)


_TO_CAPTURE = {
    "no backward has been seen": "for inference call it under torch.no_grad(); in training it is captured once a call was run "
    "backward; a smaller last batch has a graph of its own, and is left out by DataLoader(..., drop_last=True)",
    "a backward was run under autocast": "end the torch.autocast block before loss.backward(), then torch.compiler.reset()",
    "gives one of its arguments no gradient": "have its backward return zeros in place of None, or pass that argument as "
    "x.detach()",
    "gradients came in batches": "call torch.autograd.grad without is_grads_batched, then torch.compiler.reset()",
    "are run backward one after the other": "call backward once, for the sum of both, or the first time with "
    "retain_graph=True, then torch.compiler.reset()",
    "sets of sizes": "pad to a few sizes; leave a smaller last batch out: DataLoader(..., drop_last=True)",
    "it writes an argument that needs gradients": "return a new tensor in place of the write",
    "sets of them were missing": "have the results of marked functions depend on the same arguments in each step; a term "
    "that is multiplied by 0 will do",
    "sets of its results": "have each loss use the same results; a term that is multiplied by 0 will do",
    "an output is, or views, an argument": "return a clone() of that argument, or detach() it",
    "an output is, or views, another output": "return a clone() of one of the two, or detach() one",
    "an output that needs some has no history": "return a detach() of it",
    "calls ops with out=": "use what the op returns, without out=",
    "known only at run time": "keep the number in a tensor (x.max() in place of x.max().item()), or read it in a function "
    "under @eager_on_graph that returns a tensor",
    "inference mode": "enter torch.inference_mode() outside of the compiled function",
    "what a checkpoint computes again draws": "draw nothing inside of the checkpoint: take its dropout out, or use no "
    "checkpoint",
}
"""What helps where a graph runs as Dynamo traced it, by a part of the reason."""


def to_capture(why: str) -> str:
    """How to have a graph captured that runs as Dynamo traced it, by the reason in the report; empty if nothing helps.

    >>> print(to_capture("it needs gradients, and a backward was run under autocast"))
    end the torch.autocast block before loss.backward(), then torch.compiler.reset()
    """
    return next((cure for part, cure in _TO_CAPTURE.items() if part in why), "")
