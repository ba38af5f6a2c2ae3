"""Plain calls: a program is one function, written once, and equal to its segments run one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import linecache
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import breakable_backend
import silly
from breakable_backend import EagerOutputError
from breakable_backend.calling import compiled_graph as compiled_module
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.registry import executors_of
from breakable_backend.recordings import plain as module
from breakable_backend.recordings.plain import plain_recording, run_plain
from breakable_backend.recordings.replay import emit
from checks import assert_same
from graphs import golden


def only_executor(
    function: Callable[..., Any], *args: Any, options: dict[str, Any], **compile_options: Any
) -> Executor:
    """What compiles ``function`` for ``args``."""
    compiled = torch.compile(function, backend="breakable_cg", options={"min_kernels": 1, **options}, **compile_options)
    with torch.no_grad():
        compiled(*args)
    (executor,) = executors_of(compiled)
    return executor


def chain(x: Tensor) -> Tensor:
    """Views, several results, breaks."""
    a, b = (silly.triple(x.sin()) + 1).chunk(2)
    return silly.triple(a.t()) + b.t()


def writes(x: Tensor) -> Tensor:
    """Writes through views, in the order that eager has, with an eager step between."""
    y = x * 2
    y[0].add_(1)
    z = silly.triple(y)
    y.mul_(z)
    return y + x


def random(x: Tensor) -> Tensor:
    """Draws on both sides of a break."""
    return silly.triple(torch.rand_like(x) + x) * torch.rand_like(x)


def constants(x: Tensor) -> Tensor:
    """A constant that the code makes."""
    return silly.triple(x + torch.tensor([1.0, 2.0], device=x.device)) * 2


def branches(x: Tensor) -> Tensor:
    """A body of a higher-order op."""
    return torch.cond(x.sum() > 0, lambda x: silly.triple(x), lambda x: x.cos(), (x * 2,)) + 1


def sizes(x: Tensor) -> Tensor:
    """Numbers that come from sizes."""
    n = x.shape[0]
    return silly.triple(x.reshape(-1)[: n + 1] * n).repeat(2) + n / 3


FUNCTIONS = [chain, writes, random, constants, branches, sizes]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_equals_the_segments(
    function: Callable[[Tensor], Tensor], dynamic: bool, device: torch.device, options: dict[str, Any]
) -> None:
    """The function that is written, the segments one after the other, and eager: one result, one random state."""
    x = torch.rand(4, 2, device=device)
    compiled = torch.compile(
        function, backend="breakable_cg", options={**options, "min_kernels": 1000}, dynamic=dynamic
    )
    with torch.no_grad():
        compiled(x)
    (executor,) = executors_of(compiled)

    def by_segments(args: list[Any], stream: int) -> list[Any]:
        return run_plain(executor.program, args, drawing=executor.driver.drawing)

    outcomes = []
    for run in (function, compiled, compiled):
        torch.manual_seed(0)
        with torch.no_grad():
            outcomes.append((run(x), torch.rand(1, device=device)))
        executor._plain_function = dataclasses.replace(executor.plain_function(), function=by_segments)
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])
    assert executor.statistics.plain == {"nothing to capture": 3}


def test_source(device: torch.device, options: dict[str, Any]) -> None:
    """Each op once and at its place, names deleted where they are used last, and the look at what is marked."""

    def f(x: Tensor) -> Tensor:
        return silly.triple(x.sin().view(2, 2)).cos()

    executor = only_executor(f, torch.ones(4, device=device), options=options, dynamic=False)
    source = emit(plain_recording(executor.lowered, executor.program, contextlib.nullcontext)).source
    golden(
        "\n".join(line.partition("  #")[0] for line in source.splitlines()),
        """\
def replay(args, stream):
    x = args[0]
    args.clear()
    sin = aten_sin_default(x)
    del x
    view = aten_view_default(sin, [2, 2])
    del sin
    triple = silly_triple_default(view)
    if not (triple_fits := fits(triple)):
        reject(triple_call, triple)
    del view
    cos = aten_cos_default(triple)
    del triple
    return [cos]""",
    )


def test_written_once(device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls are plain, and of however many keys, the graph is gone through once."""
    made = []
    write = module.plain_recording
    monkeypatch.setattr(compiled_module, "plain_recording", lambda *args: made.append(args) or write(*args))
    executor = only_executor(chain, torch.rand(4, 2, device=device), options={**options, "min_kernels": 1000})
    for _ in range(4):
        executor([torch.rand(4, 2, device=device)])
    assert executor.statistics.plain == {"nothing to capture": 5}
    assert len(made) == 1


def test_wrong_layout_where_sizes_vary(device: torch.device, options: dict[str, Any]) -> None:
    """A marked op whose result is not what its fake says, for sizes that vary, is an error of the plain call, with its line."""

    @torch.library.custom_op("plain::halves", mutates_args=(), tags=silly.UNSAFE)
    def halves(x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2 + (x.shape[0] > 8)].clone()

    halves.register_fake(lambda x: x.new_empty(x.shape[0] // 2, *x.shape[1:]))
    compiled = torch.compile(
        lambda x: halves(x * 2) + 1, backend="breakable_cg", options={**options, "min_kernels": 1000}, dynamic=True
    )
    with torch.no_grad():
        for size in (6, 8):
            assert compiled(torch.ones(size, 3, device=device)).shape == (size // 2, 3)
        with pytest.raises(
            EagerOutputError, match=r"plain::halves.*float32\[6, 3\].*compiled for float32\[5, 3\]"
        ) as raised:
            compiled(torch.ones(10, 3, device=device))
    assert f"{Path(__file__).name}:" in str(raised.value)


def test_draws_have_their_turn_and_eager_steps_do_not(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What draws waits for captures of other threads; a marked op does not run in that turn: it may wait for such a thread."""
    turns: list[str] = []

    @contextlib.contextmanager
    def drawing() -> Iterator[None]:
        turns.append("begin")
        yield
        turns.append("end")

    monkeypatch.setitem(silly.hooks, "visit", lambda x: turns.append("eager") or x)
    executor = only_executor(
        lambda x: silly.visit(torch.rand_like(x)) + torch.rand_like(x), torch.ones(3, device=device), options=options
    )
    turns.clear()
    emit(plain_recording(executor.lowered, executor.program, drawing)).function([torch.ones(3, device=device)], 0)
    assert turns == ["begin", "end", "eager", "begin", "end"]


def test_traceback_shows_the_users_line(device: torch.device, options: dict[str, Any]) -> None:
    """What an op raises in a plain call is traced back to the user's line."""

    def f(x: Tensor, i: Tensor) -> Tensor:
        return x.sin().index_select(0, i)  # the line that is asked for

    compiled = torch.compile(f, backend="breakable_cg", options={**options, "driver": "tape"})
    x, i = torch.ones(3), torch.tensor([7])
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError)) as raised:
        compiled(x, i)
    shown = "".join(traceback.format_exception(raised.value))
    assert f"{__file__}:" in shown
    assert "# the line that is asked for" in shown


def test_memory_goes_where_it_is_used_last(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that nothing reads any more is gone while later ops of the same segment run."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    @torch.library.custom_op("plain::note", mutates_args=())
    def note(x: Tensor) -> Tensor:
        alive.extend(ref() is not None for ref in seen)
        result = x + 1
        seen.append(weakref.ref(result))
        return result

    note.register_fake(torch.empty_like)
    executor = only_executor(lambda x: note(note(x).sin()).sin(), torch.ones(3, device=device), options=options)
    seen.clear(), alive.clear()
    executor.plain_function().function([torch.ones(3, device=device)], 0)
    assert alive == [False]


def test_source_goes_with_what_was_compiled(device: torch.device, options: dict[str, Any]) -> None:
    """The source of a plain function is in ``linecache`` as long as the function is there."""
    gc.collect()
    before = set(linecache.cache)
    executor = only_executor(chain, torch.rand(4, 2, device=device), options=options)
    new = {name for name in set(linecache.cache) - before if name.startswith("<breakable_cg")}
    assert len(new) == 1
    del executor
    torch._dynamo.reset()
    breakable_backend.reset()
    gc.collect()
    assert not new & set(linecache.cache)
