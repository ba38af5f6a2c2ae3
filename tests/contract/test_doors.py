"""The same models through both doors, ``torch.compile`` and ``capture``, on both drivers: bit for bit what eager gives.

What makes no sense at a door is in ``NOT_AT``, with the reason; docs/semantics.md has that list too.
"""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import doors
from breakable_backend import break_graph, eager_on_graph
from checks import assert_same
from doors import Case, Opened, close, seen, vectors

pytestmark = pytest.mark.usefixtures("no_grad")

# --- marked functions ---------------------------------------------------------------------------------------------------


def bend(x: Tensor) -> Tensor:
    """What no graph can hold: Python that looks at values, and tells what it saw."""
    seen.append(x.sum().item())
    return x * 2 if seen[-1] > 0 else x - 1


marked = eager_on_graph(fake=lambda x: torch.empty_like(x))(bend)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Routed:
    weights: Tensor
    experts: Tensor
    count: int


class Scores:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


# --- models ---------------------------------------------------------------------------------------------------------------


def of(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A model without state."""
    return lambda: function


def through(function: Callable[[Tensor], Any], use: Callable[[Any], Any]) -> Callable[[], Callable[[Tensor], Any]]:
    """A model whose marked function gives ``function(x + 1)``, which captured code uses."""
    broken = eager_on_graph(function)
    return of(lambda x: use(broken(x + 1)))


def chain(x: Tensor) -> Tensor:
    x = marked(x.cos())
    x = marked(marked(x + 1))
    return marked(x * 3) - 1


def ordered() -> Callable[[Tensor, Tensor], Tensor]:
    @eager_on_graph(mutates_args=("cache",), fake=lambda cache, x: None)
    def append(cache: Tensor, x: Tensor) -> None:
        cache[int(cache[0].item()) + 1] = x.sum()
        cache[0] += 1

    def model(cache: Tensor, x: Tensor) -> Tensor:
        cache.mul_(2)
        cache[0] /= 2
        append(cache, x)
        append(cache, x + cache[1])
        return cache * 1

    return model


def caches(number: int, device: torch.device) -> tuple[Any, ...]:
    return torch.zeros(8, device=device), torch.ones(2, device=device) * number


def drawing() -> Callable[[Tensor], Tensor]:
    noisy = eager_on_graph(lambda x: x * 2 + torch.rand_like(x))
    return lambda x: noisy(x + torch.rand_like(x)) + torch.rand_like(x)


def crossing(x: Tensor) -> Tensor:
    early = x.exp()
    return marked(early + 1) * 2 + early


def dropped(x: Tensor) -> Tensor:
    """The result of the break is used up at once, and its memory with it, if nobody holds it."""
    y = marked(x + 1) * 2
    z = marked(y.cos() + 1).sin()
    return z + 1


def unused(x: Tensor) -> Tensor:
    marked(x + 1)
    return x * 2


def arguments() -> Callable[[Tensor], Tensor]:
    @eager_on_graph(fake=lambda parts, view, scale: torch.empty_like(parts["b"]))
    def mixed(parts: dict[str, Any], view: Tensor, *, scale: float) -> Tensor:
        seen.append((parts["b"].stride(), view.stride(), view.shape))
        return (parts["a"][0] + parts["b"]) * scale + view.sum()

    def model(x: Tensor) -> Tensor:
        y = x + 1
        return mixed({"a": (x[::2],), "b": y[1::2]}, y.view(2, 2).t()[1:], scale=0.5) * 2

    return model


def complexes(number: int, device: torch.device) -> tuple[Any, ...]:
    return (torch.arange(4.0, device=device) * (1 + 2j) + number,)


def lazy() -> Callable[[Tensor], Tensor]:
    @eager_on_graph(fake=lambda a, b: torch.empty_like(b, dtype=a.dtype))
    def mixed(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.sum().item(), b.sum().item()))
        return a * 1 + b

    def model(x: Tensor) -> Tensor:
        y = x + 1
        return mixed(y.conj(), y.conj().imag) * 2

    return model


def lazy_aliases(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return y, y.conj(), y.conj().imag


def nested() -> Callable[[Tensor], Tensor]:
    outer = eager_on_graph(fake=lambda x: torch.empty_like(x))(lambda x: marked(x) + 1)
    return lambda x: outer(x + 1) * 2


def returned_argument() -> Callable[[Tensor], Tensor]:
    both = eager_on_graph(lambda x: (x, x[1:]))

    def model(x: Tensor) -> Tensor:
        inner = x + 1
        same, view = both(inner)
        view.mul_(2)
        return inner - same * 3

    return model


def returned_input() -> Callable[[Tensor, Tensor], Tensor]:
    same = eager_on_graph(lambda cache: cache)

    def model(cache: Tensor, x: Tensor) -> Tensor:
        same(cache).add_(x.sum())
        return cache * 2

    return model


def shared(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y[2:]


def write_shared(parts: tuple[Tensor, Tensor]) -> Tensor:
    whole, tail = parts
    tail.mul_(3)
    return whole + 1


def written_result() -> Callable[[Tensor], Tensor]:
    """Captured code writes into a result, which a later eager function and a later segment read."""
    double = eager_on_graph(lambda x: x * 2)

    def model(x: Tensor) -> Tensor:
        y = double(x + 1)
        y.add_(1)
        z = double(y)
        y.mul_(2)
        return double(y) + z

    return model


def keeping() -> Callable[[Tensor], Tensor]:
    """A function that keeps its result for itself: captured code writes to memory of its own."""
    kept: list[Tensor] = []

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def cached(x: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.zeros_like(x))
        seen.append(kept[0].tolist())  # what it was left with
        return kept[0].copy_(x)

    return lambda x: cached(x + 1) * 5


def cast() -> Callable[[Tensor, Tensor], Tensor]:
    @eager_on_graph(fake=lambda x, w: x.new_empty(x.shape, dtype=torch.float32))
    def project(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        seen.append(y.dtype)
        return y.float()

    def model(x: Tensor, w: Tensor) -> Tensor:
        a = project(x + 1, w)
        with torch.autocast(x.device.type, torch.bfloat16):
            b = project(x + 1, w)
        return a - b

    return model


def matrices(number: int, device: torch.device) -> tuple[Any, ...]:
    x = torch.arange(16.0, device=device).view(4, 4)
    return x / 7 + number, x.t() / 5


def moded() -> Callable[[Tensor], Tensor]:
    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def look(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x * 2

    return lambda x: look(x + 1) - 1


def stubbed() -> Callable[[Tensor], Tensor]:
    slow = eager_on_graph(
        fake=lambda x: torch.empty_like(x),
        capture_stub=lambda x: seen.append("stub") or x * 0,
        barrier=lambda: seen.append("barrier"),
    )(bend)
    return lambda x: slow(x + 1) * 2


def bare(x: Tensor) -> Tensor:
    y = x + 1
    break_graph()
    return y * 2


def disabled() -> Callable[[Tensor], Tensor]:
    plain = eager_on_graph(enable=False)(torch.sin)
    return lambda x: plain(x + 1) * 2


RESULTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "tuple": (lambda x: (x * 2, x + 1), lambda r: r[0] - r[1]),
    "list": (lambda x: [x * 2, [x + 1]], lambda r: r[0] - r[1][0]),
    "dict": (lambda x: {"a": x * 2, "b": {"c": x + 1}}, lambda r: r["a"] - r["b"]["c"]),
    "named tuple": (lambda x: Pair(x * 2, x + 1), lambda r: r.first - r.second),
    "dataclass": (lambda x: Routed(x * 2, x.argsort(), 3), lambda r: r.weights[r.experts] * r.count),
    "object": (lambda x: Scores(x * 2), lambda r: r.scores - 1),
    "plain values": (lambda x: (x * 2, 3, 0.5, "add", None, True), lambda r: r[0] * r[1] + r[2]),
    "half a tensor": (lambda x: torch.stack([x, x * 2])[1], lambda r: r - 1),
    "expanded": (lambda x: (x * 2)[:1].expand(4), lambda r: r + 1),
    "other dtypes": (lambda x: (x.half(), x > 0, x.long()), lambda r: r[0].float() * r[1] + r[2]),
    "empty": (lambda x: (x[:0] * 2, x * 2), lambda r: r[1] + r[0].sum()),
}

CASES: dict[str, Case] = {
    "no break": Case(of(lambda x: x.sin() + 1), "G", "G"),
    "one break": Case(of(lambda x: marked(x + 1) * 2), "GEG", "GEG"),
    "break first": Case(of(lambda x: marked(x) * 2), "GEG", "EG"),
    "break last": Case(of(lambda x: marked(x * 2)), "GEG", "GE"),
    "nothing but a break": Case(of(marked), "GEG", "E"),
    "breaks in a chain": Case(of(chain), "GEGEGEGEG", "GEGEGEG"),
    "bare break": Case(of(bare), "GEG", "G|G"),
    "mark that is disabled": Case(disabled, "G", "G"),
    "marked inside marked": Case(nested, "GEG", "GEG"),
    "unused result": Case(of(unused), "GEG", "GEG"),
    "result that is dropped": Case(of(dropped), "GEGEG", "GEGEG"),
    "value that crosses a break": Case(of(crossing), "GEG", "GEG"),
    "order of mutation": Case(ordered, "GEGEG", "GEGEG", caches, in_place=True),
    "random numbers": Case(drawing, "GEG", "GEG"),
    **{f"result: {name}": Case(through(*pair), "GEG", "GEG") for name, pair in RESULTS.items()},
    # The int is one that is known only at run time, and what uses it runs eagerly.
    "result: dataclass": Case(through(*RESULTS["dataclass"]), "GEG", "GEGE"),
    "results that share memory": Case(through(shared, write_shared), "GEG", "GEG"),
    "result that is written": Case(written_result, "GEGEGEG", "GEGEGEG"),
    "result that is an argument": Case(returned_argument, "GEG", "GEG"),
    "result that is an input": Case(returned_input, "GEG", "EG", caches, in_place=True),
    "result that is kept": Case(keeping, "GEG", "GEG"),
    "result that is conjugated": Case(through(lambda x: (x * 2).conj(), lambda r: r + 1), "GEG", "GEG", complexes),
    "results of one memory, conjugated": Case(
        through(lazy_aliases, lambda r: (r[0] + 1, r[1] + 1, r[2] + 1)), "GEG", "GEG", complexes
    ),
    "strided views in containers": Case(arguments, "GEG", "GEG"),
    "conjugated and negated views": Case(lazy, "GEG", "GEG", complexes),
    "autocast in the model": Case(cast, "GEGEG", "GEGEG", matrices),
    "grad mode": Case(moded, "GEG", "GEG"),
    "stub and barrier": Case(stubbed, "GEG", "GEG", stubbed=True),
}
"""The models. Where a mark stands at the edge of a model, or next to another, only ``capture`` has a segment there."""

ELSEWHERE = {
    "side streams": "test_capture.py::test_side_stream",
    "break on a side stream": "test_capture.py::test_break_on_a_side_stream",
    "nested captures": "test_capture.py::test_nested",
    "parameters that die": "test_capture.py::test_dropped_model",
    "inputs that the caller drops": "test_capture.py::test_inputs_are_kept",
    "arguments that are not kept": "test_contract_release.py::test_inputs_and_results_are_not_kept",
    "host reads outside of marked functions": "test_capture.py::test_host_read",
    "results that are the caller's to keep": "test_contract_aliases.py::test_",
    "sizes that vary": "test_functions.py::test_dynamic_shapes",
    "backwards outside of the captured code": "test_functions_gradients.py::test_two_forward_passes",
}
"""What is tested at one door, since it makes no sense at the other."""

NOT_AT: dict[tuple[str, str], str] = {
    (
        "result: object",
        "compile",
    ): "Traced code cannot make an object that it knows nothing of: a graph break, and an error under fullgraph.",
    (
        "results of one memory, conjugated",
        "compile",
    ): "Views of one memory with several dtypes cannot be made again in traced code: a graph break, and an error under fullgraph.",
    ("side streams", "compile"): "Stream operations in traced code make the whole program eager.",
    ("break on a side stream", "compile"): "Stream operations in traced code make the whole program eager.",
    ("nested captures", "compile"): "A compiled function that an eager step calls runs plainly, and records nothing.",
    (
        "parameters that die",
        "compile",
    ): "A compiled function keeps its module, so parameters die when they are replaced, which records anew.",
    ("inputs that the caller drops", "compile"): "Each call brings its arguments along.",
    ("arguments that are not kept", "capture"): "A replay brings no arguments: the graph has to keep what it reads.",
    ("host reads outside of marked functions", "compile"): "They run eagerly by themselves: no case for an error.",
    (
        "results that are the caller's to keep",
        "capture",
    ): "Results are the graph's own memory, and its next replay writes them.",
    ("sizes that vary", "capture"): "A graph has the sizes of its capture; other sizes are another graph.",
    (
        "backwards outside of the captured code",
        "capture",
    ): "The backward of a marked function is a step of the capture that its forward is in.",
}
"""What makes no sense at a door, and why."""


# --- every model at every door ----------------------------------------------------------------------------------------


@pytest.fixture(params=["compile", "capture", "debug"])
def door(request: pytest.FixtureRequest) -> str:
    """Each door; ``capture`` in the everything-eager debug mode too."""
    return str(request.param)


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str, door: str, device: torch.device, kind: str) -> None:
    """Each model gives what eager gives, bit for bit, at each call and replay; captured and eager are what was said."""
    if door != "compile":
        doors.captured(CASES[name], device, kind, debug="eager" if door == "debug" else None)
    elif (name, door) not in NOT_AT:
        doors.compiled(CASES[name], device, kind)


def test_table() -> None:
    """``NOT_AT`` names cases that are there, gives a sentence for each, and leaves each case one door; so does the page."""
    tests = Path(__file__).parents[1]
    for case, test in ELSEWHERE.items():
        file, _, function = test.partition("::")
        (path,) = tests.rglob(file)
        assert f"def {function}" in path.read_text(encoding="utf-8"), case
    assert {case for case, _ in NOT_AT} >= set(ELSEWHERE)
    for (case, where), reason in NOT_AT.items():
        assert case in CASES or case in ELSEWHERE, case
        assert where in ("compile", "capture")
        assert re.fullmatch(r"[A-Z].{20,}\.", reason), reason
        assert (case, {"compile": "capture", "capture": "compile"}[where]) not in NOT_AT
    page = (tests.parent / "docs" / "semantics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| `(compile|capture)` \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(case, where, reason) for (case, where), reason in NOT_AT.items()]


@pytest.mark.parametrize("name", [case for case, where in NOT_AT if where == "compile" and case in CASES])
def test_refused_when_compiled(name: str, device: torch.device, kind: str) -> None:
    """What compiled code does not take is a graph break, and under fullgraph an error that says so, once it is known."""
    function, inputs = CASES[name].build(), CASES[name].inputs(0, device)
    compiled = torch.compile(function, backend="breakable_cg", options={"driver": kind}, fullgraph=True)
    compiled(*inputs)
    with pytest.raises(Exception, match=r"cannot hold|share memory"):
        compiled(*inputs)


# --- over a life ------------------------------------------------------------------------------------------------------------


class Mine(Exception):
    pass


def failing(errors: list[Exception]) -> Callable[[Tensor], Tensor]:
    """Raises the error that is in the list, once."""

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def fails(x: Tensor) -> Tensor:
        if errors:
            raise errors.pop()
        return bend(x)

    return lambda x: fails(x + 1) * 2


def test_error(door: str, device: torch.device, kind: str) -> None:
    """Line 8: what an eager function raises, first or later, comes out as the same object, and then all is right."""
    errors: list[Exception] = []
    model, error = failing(errors), Mine("first")
    errors.append(error)
    with pytest.raises(Mine) as caught:
        Opened(door, model, vectors(0, device), kind)
    assert caught.value is error
    opened = Opened(door, model, vectors(0, device), kind)
    for number in range(1, 5):
        errors.append(error := Mine(str(number)))
        with pytest.raises(Mine) as caught:
            opened(*vectors(number, device))
        assert caught.value is error
        assert_same(opened(*vectors(number, device)), model(*vectors(number, device)))
    close(opened)


def test_autocast_around(door: str, device: torch.device, kind: str) -> None:
    """Line 7: opened and run under autocast, captured and eager parts have their casts."""
    model = cast()
    with torch.autocast(device.type, torch.bfloat16):
        opened = Opened(door, model, matrices(0, device), kind)
        for number in range(1, 4):
            seen.clear()
            got, saw = opened(*matrices(number, device)), list(seen)
            seen.clear()
            assert_same(got, model(*matrices(number, device)))
            assert saw == seen == [torch.bfloat16] * 2
    close(opened)


@pytest.mark.parametrize("inner", ["compile", "capture"])
def test_reentrance(door: str, inner: str, device: torch.device, kind: str) -> None:
    """Line 11: an eager function may itself run what went through either door."""
    within = Opened(inner, crossing, vectors(0, device), kind)

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def runs(x: Tensor) -> Tensor:
        return within(x) + 0

    opened = Opened(door, lambda x: runs(x + 1) * 2, vectors(0, device), kind)
    for number in range(1, 5):
        x = vectors(number, device)[0]
        assert_same(opened(x), crossing(x + 1) * 2)
    close(opened, within)


def test_pool_reuse(door: str, device: torch.device, kind: str) -> None:
    """Line 3: recordings of several sizes, run in turns and while the allocator churns, never see each other's memory."""

    def model(x: Tensor) -> Tensor:
        early = x.exp()
        late = marked(early.sin() + 1).cos()
        return marked(late + early) * 3 + early.sum()

    def values(size: int, number: int) -> Tensor:
        return torch.linspace(-number, 1, size, device=device)

    sizes = [64, 32, 128, 48]
    opened = [Opened(door, model, (values(size, 0),), kind) for size in sizes]
    for number in range(1, 4):
        for size, one in [*zip(sizes, opened, strict=True)][:: 1 if number % 2 else -1]:
            doors.churn(device)
            assert_same(one(values(size, number)), model(values(size, number)))
    opened.pop(1).free()
    sizes.pop(1)
    for size, one in zip(sizes, opened, strict=True):
        doors.churn(device)
        assert_same(one(values(size, 7)), model(values(size, 7)))
    close(*opened)


def test_memory_returned(door: str, device: torch.device, kind: str) -> None:
    """Line 10: rounds of opening, running and closing leave no memory behind."""
    used = []
    for number in range(4):
        opened = Opened(door, crossing, vectors(0, device), kind)
        opened(*vectors(number, device))
        close(opened)
        del opened
        torch.compiler.reset()
        gc.collect()
        used.append((torch.cuda.memory_allocated(), sum(type(thing) is Tensor for thing in gc.get_objects())))
    assert used[2:] == [used[1]] * 2
