"""What a replay and its call leave out on the host, because it does not change; and that nothing is left out which does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import silly
from breakable_backend.backend import executors_of
from breakable_backend.executor import Entry
from breakable_backend.recording import EagerStep
from checks import compile_both


def entry_of(compiled: Callable[..., Any]) -> Entry:
    """The one key of the one graph behind ``compiled``."""
    (executor,) = executors_of(compiled)
    (addresses,) = executor.sets.values()
    (entry,) = addresses.entries.values()
    return entry


def eager_calls(entry: Entry) -> list[str]:
    """What a replay of ``entry`` calls: in its eager steps, and to make its outputs."""
    assert entry.recording is not None
    steps = [step for step in entry.recording.steps if isinstance(step, EagerStep)]
    return [call.label for step in steps for call in step.calls] + [call.label for call in entry.recording.epilogue]


# --- views ------------------------------------------------------------------------------------------------------------------


def test_views_of_captured_memory_are_made_once(device: torch.device, options: dict[str, Any]) -> None:
    """A replay makes no view of memory that stays where it is, also behind a view that is none by its schema."""
    linear = nn.Linear(8, 24, bias=False).to(device)

    def f(x: Tensor) -> Tensor:
        q, k, v = linear(x.sin()).view(1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return silly.attention(q, k, v).cos() + v

    compiled, _ = compile_both(f, options)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 4, 8, device=device)
            assert torch.equal(compiled(x), f(x))
    assert eager_calls(entry_of(compiled)) == ["silly::attention", "clone"]


def test_a_marked_op_that_returns_a_view_runs_in_each_call(device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: a marked op that returns an alias of captured memory, and says so, runs as often as in eager."""
    ran = []
    with torch.library._scoped_library("views", "DEF") as library:
        library.define("seen(Tensor(a) x) -> Tensor(a)", tags=silly.UNSAFE)
        library.impl("seen", lambda x: (ran.append(1), x.view(x.shape))[1], "CompositeExplicitAutograd")
        library.impl("seen", lambda x: x.view(x.shape), "Meta")

        def f(x: Tensor) -> Tensor:
            y = x.sin() + 1
            return torch.ops.views.seen(y).cos() + 1

        compiled, _ = compile_both(f, options)
        with torch.no_grad():
            for _ in range(3):
                compiled(torch.rand(3, device=device))
            before = len(ran)
            compiled(torch.rand(3, device=device))
        assert len(ran) == before + 1
        torch._dynamo.reset()
