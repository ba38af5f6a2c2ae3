"""How to avoid a graph break of Dynamo's, by the reason that Dynamo gives for it.

The texts of the reasons are the same in torch 2.11 to 2.15.
"""

from __future__ import annotations

SCALARS = "torch._dynamo.config.capture_scalar_outputs = True"
SHAPES = "torch._dynamo.config.capture_dynamic_output_shape_ops = True"

_BY_BEGINNING = {
    "Unsupported Tensor.item() call": f"set {SCALARS}, or {{mark}}",
    "Dynamic shape operator": f"set {SHAPES}, or {{mark}}",
    "Data-dependent branching": "{mark}; where both branches may be computed, torch.where needs no mark",
    "Skip calling `torch.compiler.disable()`d function": "put @eager_on_graph in the place of torch.compiler.disable",
    "Call to `torch._dynamo.graph_break()`": "take the call of torch._dynamo.graph_break() out",
}
"""What helps, by the beginning of a reason."""


def advice(graph_break: str) -> str:
    """How to keep one program at a break from :func:`breakable_backend._torch.graph_breaks`; empty if nothing helps.

    >>> print(advice("Data-dependent branching, at model.py:7 in forward: if x.sum() > 0: x = x + 1"))
    put `if x.sum() > 0: x = x + 1` into a function of its own under @eager_on_graph; where both branches may be computed, torch.where needs no mark
    """
    first = graph_break.strip().partition("\n")[0]
    if ", is no node: " in first:
        return ""  # it is a marked function already, and the reason says what is wrong with it
    _, found, place = first.rpartition(", at ")
    _, _, code = place.partition(": ") if found else ("", "", "")
    mark = f"put {f'`{code}`' if code else 'it'} into a function of its own under @eager_on_graph"
    helps = next((text for beginning, text in _BY_BEGINNING.items() if first.startswith(beginning)), "{mark}")
    return helps.format(mark=mark)
