"""What a replay and its call leave out on the host, because it does not change; and that nothing is left out which does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import breakable_backend
import silly
from breakable_backend.calling.keys import Entry
from breakable_backend.calling.registry import executors_of
from breakable_backend.compiling import lowering
from breakable_backend.marks import call_sites
from breakable_backend.recordings.recorder import MAX_FED
from breakable_backend.recordings.recording import EagerStep
from checks import assert_same, check, compile_both


def entry_of(compiled: Callable[..., Any]) -> Entry:
    """The one key of the one graph behind ``compiled``."""
    (executor,) = executors_of(compiled)
    (addresses,) = executor.keys.sets.values()
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


# --- copies -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bits_of_arguments_that_are_loaded_together(
    dtype: torch.dtype, device: torch.device, options: dict[str, Any]
) -> None:
    """Arguments that one launch brings to their bridges keep all bits, those of a signalling NaN too."""

    def f(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view(torch.int16) + 1 for x in given)

    compiled, eager = compile_both(f, options)
    bits = torch.tensor([0x7C01, 0x7F81, 0x7C15, 1], dtype=torch.int16, device=device)
    with torch.no_grad():
        for shift in range(5):
            given = [(bits * (-1) ** number + shift).view(dtype) for number in range(MAX_FED + 1)]
            assert_same(compiled(*given), eager(*given))
    replay = entry_of(compiled).replay
    assert replay is not None
    assert "copy_together" in replay.source


@pytest.mark.parametrize("kind", ["op", "function"])
def test_a_result_that_is_given_is_not_copied(kind: str, device: torch.device, options: dict[str, Any]) -> None:
    """What a marked op or function writes into memory of a captured segment is read there: no copy is left but the input's."""

    @breakable_backend.eager_on_graph(mutates_args=("target",), fake=lambda target, x: None)
    def add_into(target: Tensor, x: Tensor) -> None:
        target.add_(x)

    write = silly.add_into if kind == "op" else add_into

    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            target = torch.zeros_like(x)
            write(target, x.sin())
            x = target.cos() + 1
        return x

    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=4, eager=3, copies=1)


# --- marked functions -------------------------------------------------------------------------------------------------------


class Marked:
    """Functions to mark. What the last one returned is kept by those that say so."""

    kept: Any = None

    @staticmethod
    def one(x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def several(x: Tensor, *, by: float, twice: list[Tensor]) -> tuple[Tensor, Tensor]:
        return x * by, twice[0] + twice[1]

    @staticmethod
    def listed(x: Tensor) -> list[Tensor]:
        return [x + 1, x + 2]

    @staticmethod
    def nothing(x: Tensor) -> None:
        Marked.kept = None

    @staticmethod
    def keeps(x: Tensor) -> Tensor:
        Marked.kept = x + 1
        return Marked.kept

    @staticmethod
    def keeps_a_view(x: Tensor) -> Tensor:
        result = x + 1
        Marked.kept = result.data[1:]
        return result

    @staticmethod
    def keeps_the_list(x: Tensor) -> list[Tensor]:
        Marked.kept = [x + 1, x + 2]
        return Marked.kept

    @staticmethod
    def argument(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def nested(x: Tensor) -> dict[str, tuple[Tensor]]:
        return {"x": (x + 1,)}


STRAIGHT = {"one", "several", "listed", "nothing"}


@pytest.mark.parametrize("name", [name for name, value in vars(Marked).items() if isinstance(value, staticmethod)])
def test_marked_functions_are_called_straight(
    name: str, device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a marked function returns is taken apart only where it may be shared, kept or nested; it is right in each case."""
    function = getattr(Marked, name)
    marked = breakable_backend.eager_on_graph(function)

    def f(x: Tensor, call: Callable[..., Any]) -> tuple[Any, Tensor]:
        y = x.sin() + 1
        result = call(y, by=2.0, twice=[y, y]) if name == "several" else call(y)
        last = result["x"][0] if name == "nested" else result[-1] if isinstance(result, tuple | list) else result
        return result, (y if last is None else last).cos() + 1

    taken = []
    real = call_sites.take_result
    monkeypatch.setattr(call_sites, "take_result", lambda *args, **how: (taken.append(1), real(*args, **how))[1])
    compiled = torch.compile(lambda x: f(x, marked), backend="breakable_cg", options=options)
    with torch.no_grad():
        for number in range(6):
            taken.clear()
            x = torch.rand(3, device=device)
            assert_same(compiled(x), f(x, function))
            assert bool(taken) == (name not in STRAIGHT) or number < 3
    assert entry_of(compiled).replays == 3


@pytest.mark.parametrize("name", ["keeps", "keeps_a_view"])
def test_a_result_that_its_function_keeps_is_the_callers(
    name: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 4: a marked function that keeps its result, by whatever handle, and writes it again changes no result of a replay."""
    function = getattr(Marked, name)
    marked = breakable_backend.eager_on_graph(function)
    compiled = torch.compile(lambda x: marked(x.sin() + 1), backend="breakable_cg", options=options)
    with torch.no_grad():
        compiled(torch.rand(3, device=device))  # runs as Python: its result is the function's too, as in eager
        for _ in range(5):
            x = torch.rand(3, device=device)
            result = compiled(x)
            Marked.kept.zero_()
            assert torch.equal(result, x.sin() + 1 + 1)


def test_a_result_that_does_not_fit_is_an_error(device: torch.device, options: dict[str, Any]) -> None:
    """A marked function that returns what it did not return when it was compiled is an error, from a replay too."""
    wrong: list[Callable[[], Any]] = []

    @breakable_backend.eager_on_graph(fake=lambda x: torch.empty_like(x))
    def f(x: Tensor) -> Any:
        return wrong[0]() if wrong else x + 1

    compiled = torch.compile(lambda x: f(x.sin() + 1).cos() + 1, backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.rand(3, device=device))
        for bad in (
            lambda: torch.rand(4, device=device),
            lambda: torch.rand(3, device=device).double(),
            lambda: (torch.rand(3, device=device),),
            lambda: None,
        ):
            wrong[:] = [bad]
            with pytest.raises(breakable_backend.EagerOutputError, match="returned"):
                compiled(torch.rand(3, device=device))
        wrong.clear()
        x = torch.rand(3, device=device)
        assert torch.equal(compiled(x), (x.sin() + 1 + 1).cos() + 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.t(),
    "with gaps": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(4, 6),
    "behind an offset": lambda x: x[1:],
    "off 16 bytes": lambda x: x.view(-1)[1:13].view(3, 4),
    "two bytes": lambda x: x.to(torch.bfloat16),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_arguments_and_results_of_any_layout(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an argument, the result of an eager step and an output are the same bits as in eager, whatever their layout."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = silly.fragile(x + 1)
        return y + x, (y * 2)[..., :1]

    def argument(_: int) -> tuple[Tensor]:
        return (LAYOUTS[name](torch.randn(4, 6, device=device)),)

    check(f, argument, device=device, options=options)


# --- AOTAutograd's wrappers ---------------------------------------------------------------------------------------------------


def wrappers_around(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *args: Any, **how: Any) -> bool:
    """Whether a call of compiled ``function`` still goes through AOTAutograd's wrappers."""
    skipped = []
    real = lowering.without_wrappers
    monkeypatch.setattr(lowering, "without_wrappers", lambda *given: (skipped.append(1), real(*given))[1])
    torch.compile(function, backend="breakable_cg", **how)(*args)
    return not skipped


def leaves_gradients_off(x: Tensor) -> Tensor:
    y = x + 1
    torch.set_grad_enabled(False)
    return y


@pytest.mark.parametrize(
    ("function", "around"),
    [
        (lambda x: x.sin() + 1, False),
        (lambda x: (x + 1, x.t()), True),
        (lambda x: x.mul_(2).sum(), False),
        (leaves_gradients_off, True),
    ],
    ids=["fresh results", "a view of an argument", "a written argument", "another grad mode"],
)
def test_wrappers_run_where_they_do_something(
    function: Callable[..., Any],
    around: bool,
    device: torch.device,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AOTAutograd's wrappers run around a call only where there is something for them to do."""
    assert wrappers_around(monkeypatch, function, torch.rand(3, 3, device=device), options=options) == around


def test_wrappers_run_for_subclasses(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor subclasses are taken apart by AOTAutograd's wrappers."""
    x = TwoTensor(torch.rand(3, device=device), torch.rand(3, device=device))
    assert wrappers_around(monkeypatch, lambda x: x.sin() + 1, x, options=options)


def test_wrappers_run_for_sizes_that_vary(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTAutograd's wrappers mark what is of varying size for whoever compiles what comes next."""
    x = torch.rand(3, device=device)
    assert wrappers_around(monkeypatch, lambda x: x.sin() + 1, x, options=options, dynamic=True)


def test_version_of_a_written_argument(device: torch.device, options: dict[str, Any]) -> None:
    """A replay counts up the version of an argument that it writes, so that autograd sees the write."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        return x.sum()

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    x, y = torch.zeros(3, device=device), torch.ones(3, device=device)
    for _ in range(3):
        compiled(x, y)
    before = x._version
    compiled(x, y)
    assert entry_of(compiled).replays == 2
    assert x._version > before


def test_gradients_are_on_behind_a_call(
    device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients on, captured code runs with gradients off, and they are on behind each call, also where it raised."""

    def f(x: Tensor) -> Tensor:
        return silly.fragile(x.sin() + 1) + 1

    compiled = torch.compile(f, backend="breakable_cg", options=options)
    x = torch.rand(3, device=device)
    for _ in range(3):
        compiled(x)
        assert torch.is_grad_enabled()
    (executor,) = executors_of(compiled)
    modes: list[bool] = []
    monkeypatch.setitem(silly.hooks, "fragile", lambda: 1 // 0)
    with executor.showing(lambda *_: modes.append(torch.is_grad_enabled())), pytest.raises(ZeroDivisionError):
        compiled(x)
    assert modes == [False]
    assert torch.is_grad_enabled()
