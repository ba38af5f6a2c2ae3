"""Arguments that lie in one memory: told by bytes, at compile time and in each call, whatever their storages are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend import _torch
from breakable_backend.ir.overlap import Fixed, Region, any_clash, any_touch
from checks import program_of

SHARED = "arguments share memory, and one is written"

# --- regions ----------------------------------------------------------------------------------------------------------------

LAYOUTS = strategies.lists(strategies.tuples(strategies.integers(0, 3), strategies.integers(0, 6)), max_size=3)
PLACES = strategies.tuples(LAYOUTS, strategies.integers(0, 12), strategies.sampled_from([torch.int8, torch.int16]))


def placed(base: Tensor, place: Any) -> Tensor:
    layout, offset, dtype = place
    shape, stride = [size for size, _ in layout], [step for _, step in layout]
    return base.view(dtype).as_strided(shape, stride, offset // dtype.itemsize)


def cells(tensor: Tensor) -> set[int]:
    """The addresses of all bytes of all elements."""
    offsets = [0]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = [offset + step * stride for offset in offsets for step in range(size)]
    begin, width = tensor.data_ptr(), tensor.itemsize
    return {begin + offset * width + byte for offset in offsets for byte in range(width)}


@hypothesis.given(PLACES, PLACES)
def test_what_shares_memory_is_found(first: Any, second: Any) -> None:
    """Two tensors with an element in one place are always found, in either order; what only looks so may be found, too."""
    base = torch.zeros(256, dtype=torch.int8)
    a, b = placed(base, first), placed(base, second)
    if cells(a) & cells(b):
        assert Region.of(a).may_share(Region.of(b))
        assert Region.of(b).may_share(Region.of(a))


@hypothesis.given(
    strategies.lists(strategies.tuples(PLACES, strategies.booleans()), max_size=5), strategies.integers(0, 5)
)
def test_clashes_are_found(places: list[tuple[Any, bool]], num_fixed: int) -> None:
    """Of many regions, those that stay and those that move, a clash is found as by asking each pair, but for two that stay."""
    base = torch.zeros(256, dtype=torch.int8)
    regions = [Region.of(placed(base, place), written) for place, written in places]
    fixed, moving = regions[:num_fixed], regions[num_fixed:]
    pairs = [(a, b) for position, a in enumerate(moving) for b in (*moving[:position], *fixed)]
    assert any_clash(moving, Fixed(fixed)) == any(a.clashes(b) for a, b in pairs)
    spans = [(region.start, region.end - region.start) for region in moving]
    if any_clash(moving, Fixed(fixed)):
        assert any_touch(spans, Fixed(fixed))


APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "rows": lambda base: (base[0], base[1]),
    "columns": lambda base: (base[:, :2], base[:, 2:4]),
    "every other": lambda base: (base[:, ::2], base[:, 1::2]),
    "three of one": lambda base: (base.view(4, 2, 4)[:, 0], base.view(4, 2, 4)[:, 1]),
    "empty": lambda base: (base[:0], base),
}


@pytest.mark.parametrize("make", APART.values(), ids=APART)
def test_what_lies_apart(make: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Slices of one allocation lie apart: rows, and columns with a common period."""
    a, b = make(torch.zeros(4, 8))
    assert not Region.of(a).may_share(Region.of(b))
    assert not Region.of(b).may_share(Region.of(a))


# --- slices of one allocation -------------------------------------------------------------------------------------------------


def step(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Writes a row of two caches."""
    k[0].copy_(x.sin())
    v[0].copy_(x.cos())
    return silly.triple((k + v).sum(0) * 2) + 1


SLICES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "halves": lambda kv: (kv[:8], kv[8:]),
    "columns": lambda kv: (kv[:, :8], kv[:, 8:]),
    "turned": lambda kv: (kv[:8].t()[:8], kv[8:].t()[:8]),
}


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("take", SLICES.values(), ids=SLICES)
def test_slices_of_one_allocation(
    take: Callable[[Tensor], tuple[Tensor, Tensor]],
    dynamic: bool | None,
    device: torch.device,
    options: dict[str, Any],
) -> None:
    """Slices of one allocation that do not overlap are captured and replayed, also where they are written."""
    mine, theirs = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device)
    (k, v), (k2, v2) = take(mine), take(theirs)
    compiled = torch.compile(step, backend="breakable_cg", options={**options, "min_kernels": 1}, dynamic=dynamic)
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(k.shape[1], device=device)
            assert torch.equal(compiled(x, k, v), step(x, k2, v2))
            assert torch.equal(mine, theirs)
    program = program_of(compiled)
    assert program.replays >= 3
    assert SHARED not in program.plain_calls


def test_slices_that_move(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: slices may lie elsewhere in their allocation in each call, which Dynamo does not guard on."""
    mine, theirs = torch.zeros(6, 4, 8, device=device), torch.zeros(6, 4, 8, device=device)
    compiled = torch.compile(step, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for call in range(9):
            x, at = torch.randn(8, device=device), call % 3
            assert torch.equal(compiled(x, mine[at], mine[5 - at]), step(x, theirs[at], theirs[5 - at]))
            assert torch.equal(mine, theirs)
    assert program_of(compiled).replays == 3


def test_slices_as_buffers(device: torch.device, options: dict[str, Any]) -> None:
    """Buffers of a module may be slices of one allocation, and stay static inputs."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kv = torch.zeros(2, 4, 8, device=device)
            self.register_buffer("k", kv[0])
            self.register_buffer("v", kv[1])

        def forward(self, x: Tensor) -> Tensor:
            return step(x, self.k, self.v)

    module, reference = Cache(), Cache()
    compiled = torch.compile(module, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(8, device=device)
            assert torch.equal(compiled(x), reference(x))
            assert torch.equal(module.k, reference.k)
            assert torch.equal(module.v, reference.v)
    program = program_of(compiled)
    assert program.replays == 4
    assert program.text.count(": static ") == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "breakable_cg"])
def test_slices_in_a_marked_function(backend: str, device: torch.device, options: dict[str, Any]) -> None:
    """A marked function may write one slice and read another, also where a backend parts the two."""

    @breakable_backend.eager_on_graph(mutates_args=("k",))
    def update(k: Tensor, v: Tensor) -> Tensor:
        k.add_(v)
        return k * 2

    def function(k: Tensor, v: Tensor) -> Tensor:
        return update(k, v).sin() + 1

    mine, theirs = torch.ones(2, 4, device=device), torch.ones(2, 4, device=device)
    compiled = torch.compile(function, backend=backend, options=options if backend == "breakable_cg" else None)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(compiled(mine[0], mine[1]), function(theirs[0], theirs[1]))
            assert torch.equal(mine, theirs)


# --- one memory --------------------------------------------------------------------------------------------------------------


def own_storage(tensor: Tensor) -> Tensor:
    """``tensor`` on a storage of its own over the same memory, as numpy and DLPack make them."""
    storage = _torch.storage_at(tensor.data_ptr(), tensor.numel() * tensor.itemsize, tensor.device)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, tensor.shape, tensor.stride())


def write_and_read(a: Tensor, b: Tensor) -> Tensor:
    """Writes one argument and reads another."""
    a.add_(1)
    return silly.triple(b * 2) + a.sum()


PAIRS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "one storage": lambda base, call: (base[:6], base[2:8]),
    "two storages": lambda base, call: (own_storage(base[:6]), own_storage(base[2:8])),
    "apart at first": lambda base, call: (own_storage(base[:6]), own_storage(base[2:8] if call else base[8:14])),
    "apart later": lambda base, call: (base[:6], base[8:14] if call else base[2:8]),
    "by turns": lambda base, call: (base[:6], base[2:8] if call % 3 == 2 else base[8:14]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_memory(name: str, device: torch.device, options: dict[str, Any]) -> None:
    """Lines 3 and 5: what is written through one argument is read through another; calls in which none is are captured."""
    mine, theirs = torch.zeros(16, device=device), torch.zeros(16, device=device)
    compiled = torch.compile(write_and_read, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for call in range(9):
            assert torch.equal(compiled(*PAIRS[name](mine, call)), write_and_read(*PAIRS[name](theirs, call)))
            assert torch.equal(mine, theirs)
    program = program_of(compiled)
    overlapping = {"one storage": 9, "two storages": 9, "apart at first": 8, "apart later": 1, "by turns": 3}[name]
    assert program.plain_calls[SHARED] == overlapping
    assert program.replays == max(0, 9 - overlapping - 2)
    assert SHARED in str(breakable_backend.explain(compiled))


def test_a_parameter_by_another_storage(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an argument over the memory of a buffer that is written is seen, whatever storage it has."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(8, device=device))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return silly.triple(x.sin()) + self.count.sum()

    module, reference = Counter(), Counter()
    compiled = torch.compile(module, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for call in range(8):
            arguments = [
                own_storage(m.count[2:6]) if call % 2 else torch.ones(4, device=device) for m in (module, reference)
            ]
            assert torch.equal(compiled(arguments[0]), reference(arguments[1]))
    assert program_of(compiled).plain_calls[SHARED] == 4


def test_arguments_that_are_only_read(device: torch.device, options: dict[str, Any]) -> None:
    """Arguments may overlap as they like where no one that lies there is written."""

    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        c.add_(1)
        return silly.triple(a * b) + c

    base, c = torch.rand(8, device=device), torch.zeros(6, device=device)
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for _ in range(6):
            want = function(base[:6], base[2:], c.clone())
            assert torch.equal(compiled(base[:6], base[2:], c), want)
    assert SHARED not in program_of(compiled).plain_calls
    assert program_of(compiled).replays == 4
