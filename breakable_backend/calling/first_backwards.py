"""What the first backwards of a graph tell, while its calls run as Dynamo traced them.

Hooks on the autograd nodes of the outputs observe which gradients come in, with which layouts, and whether only eager can
run such a backward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.ir.layout import TensorSpec

UNUSED = 3
"""How many forwards may go by without a backward until a warning says so."""

CALLED_IN_VAIN = (
    "breakable_cg captures a graph that needs gradients once one of its calls was run backward, and the results of "
    f"{UNUSED} calls are gone without that: it runs eagerly. For inference call the compiled function under "
    "torch.no_grad() or torch.inference_mode()."
)

WATCHED = "a result from which another one is computed has a hook, or retains its gradient"

IN_PARTS = "its results are run backward one after the other, without retain_graph=True"

BATCHED = "gradients came in batches"


@dataclass
class FirstBackwards:
    """What was seen of backwards while the graph was eager."""

    storages: dict[int, _torch.StorageWeakRef]
    """The storages of the first call's static inputs, if they have memory, by index."""
    layouts: dict[int, TensorSpec] = field(default_factory=dict)
    """The layouts of the gradients that came in, by output. In some calls fewer outputs may need gradients than in others."""
    came: bool = False
    refused: str = ""
    calls: int = 0
    pending: weakref.WeakSet[_Looked] = field(default_factory=weakref.WeakSet)
    """Calls that may still be run backward."""
    refilled: set[int] = field(default_factory=set)
    """Static inputs whose memory is freed between calls."""

    def observe(self, differentiable: dict[int, torch.Tensor], warn: Callable[[str], None]) -> None:
        """Observe the backward of a call whose outputs, by index, are ``differentiable``."""
        if self.calls - len(self.pending) >= UNUSED:
            warn(CALLED_IN_VAIN)
        looked = _Looked()
        for place in _torch.inner_results(results := [*differentiable.values()]):
            looked.inner.append(weakref.ref(results[place]))
            _torch.hear_of_hooks(results[place], functools.partial(_refuse, self, WATCHED))
        self.pending.add(looked)
        self.calls += 1
        for index, value in differentiable.items():
            assert value.grad_fn is not None
            value.grad_fn.register_prehook(functools.partial(_look, self, looked, index, value.output_nr))


class _Looked:
    """A call whose backward is observed. It lives as long as somebody may run that backward."""

    backward: int | None = None
    """The backward that has freed what a part of the call had saved."""
    last: int | None = None
    """The last backward that has reached it."""

    def __init__(self) -> None:
        self.inner: list[weakref.ref[torch.Tensor]] = []
        """Its results from which others are computed."""


def _look(seen: FirstBackwards, looked: _Looked, index: int, number: int, grads: tuple[Any, ...]) -> None:
    """A backward has reached an output of an eager call."""
    grad, backward = grads[number], _torch.current_backward()
    if looked.last != backward:
        looked.last = backward
        _torch.after_backward(functools.partial(_look_behind, seen))
    if looked.backward not in (None, backward):
        _refuse(seen, IN_PARTS)
    if not _torch.graph_is_kept():
        looked.backward = backward
    if any(result is not None and result.retains_grad for result in alive(looked.inner)):
        _refuse(seen, WATCHED)
    if why := refusal(grads):
        _refuse(seen, why)
    elif grad is not None:
        seen.layouts[index], seen.came = TensorSpec.of(grad), True


def _refuse(seen: FirstBackwards, why: str) -> None:
    seen.refused = f"it needs gradients, and {why}"


def _look_behind(seen: FirstBackwards) -> None:
    """A backward has ended. FSDP has freed the weights that it gathers anew for the next call."""
    for index, ref in seen.storages.items():
        if (storage := _torch.live_storage(ref)) is not None and not storage.nbytes():
            seen.refilled.add(index)


# A function that runs a backward may be compiled itself. Dynamo would then compile what this calls.
_torch.hide_from_dynamo(_look.__code__)


def alive(results: Sequence[weakref.ref[torch.Tensor]]) -> Iterator[torch.Tensor | None]:
    """The results that somebody holds; None for the others."""
    return (ref() for ref in results)


def refusal(grads: Sequence[Any]) -> str:
    """Why only eager can run a backward that begins now."""
    if torch.is_grad_enabled():
        return "a backward was run with create_graph=True"
    if _torch.any_autocast_enabled():
        return "a backward was run under autocast"
    for grad in grads:
        if grad is None:
            continue
        if _torch.is_transformed(grad):
            return BATCHED
        if type(grad) not in (torch.Tensor, torch.nn.Parameter) or grad.layout is not torch.strided:
            return f"a gradient that came in is a {type(grad).__name__} of layout {grad.layout}"
        if any(_torch.lazy_bits(grad)):
            return "a gradient that came in is conjugated lazily"
    return ""
