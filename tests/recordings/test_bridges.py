"""Buffers: storage that keeps its address, and copies into and out of it, whatever the strides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor, nn

from breakable_backend import _torch
from breakable_backend.ir.layout import TensorSpec, extent, flattened, overlaps
from breakable_backend.recordings.copies import Bridge, clone_exact, clones_exactly, load_all

LAYOUTS: dict[str, Callable[[torch.device], Tensor]] = {
    "dense": lambda device: torch.rand(3, 4, device=device),
    "transposed": lambda device: torch.rand(4, 3, device=device).t(),
    "with_gaps": lambda device: torch.rand(3, 8, device=device)[:, ::2],
    "misaligned": lambda device: torch.rand(13, device=device)[1:].view(3, 4),
    "misaligned_transposed": lambda device: torch.rand(13, device=device)[1:].view(4, 3).t(),
    "misaligned_expanded": lambda device: torch.rand(3, 2, device=device)[:, 1:].expand(3, 4),
    "with_offset": lambda device: torch.rand(5, 4, device=device)[2:],
    "row_of_larger": lambda device: torch.rand(3, 8, device=device)[:, :4],
    "channels_last": lambda device: torch.rand(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
    "expanded": lambda device: torch.rand(3, 1, device=device).expand(3, 4),
    "expanded_scalar": lambda device: torch.rand((), device=device).expand(3, 4),
    "windows": lambda device: torch.rand(8, device=device).unfold(0, 3, 2),
    "scalar": lambda device: torch.rand((), device=device),
    "one": lambda device: torch.rand(1, 1, device=device),
    "empty": lambda device: torch.empty(0, 4, device=device),
    "empty_inside": lambda device: torch.empty(3, 0, device=device),
    "half": lambda device: torch.rand(3, 4, device=device).to(torch.float16),
    "bool": lambda device: torch.rand(3, 4, device=device) > 0.5,
    "complex": lambda device: torch.rand(3, 4, device=device, dtype=torch.complex64),
    "integers": lambda device: torch.arange(12, device=device).view(3, 4).t(),
}


@pytest.fixture(params=LAYOUTS)
def value(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    """A tensor of each layout."""
    return LAYOUTS[request.param](device)


def changed(value: Tensor) -> Tensor:
    """Another value at another address, with the same layout: its first storage element is another."""
    other = torch.empty(0, dtype=value.dtype, device=value.device)
    other.set_(value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride())
    if value.numel():
        flat = flattened(other)
        flat.copy_(~flat if value.dtype is torch.bool else flat + 1)
    return other


# --- bridges --------------------------------------------------------------------------------------------------------------


def test_bridge_looks_like_its_value(value: Tensor) -> None:
    """A bridge has shape, stride, dtype and device of the value, and memory of its own."""
    bridge = Bridge.like(value, value.device)
    assert TensorSpec.of(bridge.tensor) == TensorSpec.of(value)
    assert _torch.storage_key(bridge.tensor) != _torch.storage_key(value)
    assert (bridge.flat is not None) is overlaps(value)


def test_bridge_loads(value: Tensor) -> None:
    """A load brings the value in, at the bridge's own address, and leaves the source alone."""
    bridge = Bridge.like(value, value.device)
    address, before = bridge.tensor.data_ptr(), value.clone()
    for source in (value, changed(value)):
        assert bridge.load(source) == (1 if value.numel() else 0)
        assert torch.equal(bridge.tensor, source)
        assert bridge.tensor.data_ptr() == address
    assert torch.equal(value, before)


def test_bridge_skips_itself(value: Tensor) -> None:
    """What is at the bridge's address already is not copied."""
    bridge = Bridge.like(value, value.device)
    bridge.load(value)
    assert bridge.load(bridge.tensor) == 0
    assert torch.equal(bridge.tensor, value)


def test_bridge_stores(value: Tensor) -> None:
    """A store brings what was written to the bridge back to the caller's tensor."""
    bridge = Bridge.like(value, value.device)
    wanted = changed(value)
    bridge.load(wanted)
    assert bridge.store(value) == 1
    assert torch.equal(value, wanted)


def test_store_leaves_gaps_alone(device: torch.device) -> None:
    """A store writes the elements of the caller's tensor, and nothing between them."""
    base = torch.zeros(3, 8, device=device)
    bridge = Bridge.like(base[:, ::2], device)
    bridge.tensor.fill_(1)
    bridge.store(base[:, ::2])
    assert torch.equal(base, torch.tensor([1.0, 0.0], device=device).repeat(3, 4))


def test_bridge_on_another_device(device: torch.device) -> None:
    """A host scalar's bridge is on the capture device."""
    bridge = Bridge.like(torch.tensor(2.5, dtype=torch.float64), device)
    assert bridge.load(torch.tensor(1.5, dtype=torch.float64)) == 1
    assert bridge.tensor.device.type == device.type
    assert bridge.tensor.item() == 1.5


def test_load_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bridges are loaded with one launch for each dtype and device; what is in place already is left out."""
    values = [layout(device) for layout in LAYOUTS.values() if layout(device).numel()]
    bridges = [Bridge.like(value, device) for value in values]
    in_place = Bridge.like(values[0], device)
    in_place.tensor.fill_(7)
    groups: list[int] = []
    copy = _torch.foreach_copy

    def counted(targets: list[Tensor], sources: list[Tensor]) -> None:
        groups.append(len(targets))
        copy(targets, sources)

    monkeypatch.setattr(_torch, "foreach_copy", counted)
    assert load_all([*bridges, in_place], [*values, in_place.tensor]) == len(values)
    assert len(groups) == len({value.dtype for value in values}) == 5
    assert sum(groups) == len(values)
    for bridge, value in zip(bridges, values, strict=True):
        assert torch.equal(bridge.tensor, value)
    assert in_place.tensor.unique().tolist() == [7]


def test_load_all_of_nothing() -> None:
    """No bridges, no launch."""
    assert load_all([], []) == 0


# --- copies ---------------------------------------------------------------------------------------------------------------


def test_clone_exact(value: Tensor) -> None:
    """A copy has the strides of what it copies, also where ``clone`` would give others, and a storage of its own."""
    copy = clone_exact(value)
    assert torch.equal(copy, value)
    assert copy.stride() == value.stride()
    assert copy.dtype is value.dtype
    assert _torch.storage_key(copy) != _torch.storage_key(value)


def test_clones_exactly(value: Tensor) -> None:
    """What clones exactly by itself has the strides of its value then; all that is dense does."""
    if clones_exactly(value):
        copy = value.clone()
        assert torch.equal(copy, value)
        assert copy.stride() == value.stride()
    else:
        assert value.clone().stride() != value.stride()


def test_clones_exactly_but_for_rare_kinds(device: torch.device) -> None:
    """What is lazily conjugated, or of a dtype that copies may not know, is cloned with care."""
    z = torch.zeros(3, dtype=torch.complex64, device=device)
    assert clones_exactly(z)
    assert not any(map(clones_exactly, [z.conj(), z.conj().imag, torch.zeros(3, dtype=torch.uint64, device=device)]))


def test_clone_exact_of_a_conjugate(device: torch.device) -> None:
    """A copy of a lazy conjugate, or of a lazy negation, has the value that eager would have."""
    base = torch.rand(3, 8, device=device, dtype=torch.complex64)
    for value in (base.conj(), base[:, ::2].conj(), base.conj().imag, base.conj().imag[:, ::2]):
        copy = clone_exact(value)
        assert torch.equal(copy, value)
        assert copy.stride() == value.stride()


RARE = "complex32 uint16 uint32 uint64 float8_e4m3fn float8_e5m2 uint4 int2 bool".split()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", RARE)
def test_copies_of_any_dtype(name: str, device: torch.device) -> None:
    """Whatever the dtype, and whether any kernel copies it: bits are loaded, stored and cloned as they are."""
    octets = torch.randint(0, 2, (2, 48), dtype=torch.uint8, device=device)
    first, second = octets.view(getattr(torch, name)).unbind()
    bridges = [Bridge.like(first, device), Bridge.like(second[:1].expand(3), device)]
    assert load_all(bridges, [first, second[:1].expand(3)]) == 2
    assert torch.equal(bridges[0].tensor.view(torch.uint8), octets[0])
    assert bridges[1].flat is not None
    assert torch.equal(bridges[1].flat.view(torch.uint8), second[:1].view(torch.uint8))
    assert bridges[0].load(second) == bridges[0].store(first) == 1
    assert torch.equal(octets[0], octets[1])
    assert torch.equal(clone_exact(first).view(torch.uint8), octets[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_signalling_nan(dtype: torch.dtype, device: torch.device) -> None:
    """A fused copy keeps all bits, those of a signalling NaN too."""
    bits = torch.tensor([0x7C01, 0x7F81, 0x7C15, 1], dtype=torch.int16, device=device)
    values = [bits.view(dtype), bits.flip(0).view(dtype)]
    bridges = [Bridge.like(value, device) for value in values]
    load_all(bridges, values)
    assert all(
        torch.equal(b.tensor.view(torch.int16), v.view(torch.int16)) for b, v in zip(bridges, values, strict=True)
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", ["complex32", "complex64"])
def test_copies_of_conjugates(name: str, device: torch.device) -> None:
    """What enters a bridge is what is read: a lazy conjugate is computed on its way, in and out."""
    x = torch.arange(8, dtype=torch.float32, device=device).to(torch.float16 if name == "complex32" else torch.float32)
    x = torch.view_as_complex(x.view(4, 2))
    bridge = Bridge.like(x.conj(), device)
    bridge.load(x.conj())
    assert load_all([bridge], [x.conj()]) == 1
    assert torch.equal(torch.view_as_real(bridge.tensor), torch.view_as_real(x.conj().resolve_conj()))
    target = torch.zeros_like(x)
    bridge.store(target.conj())
    assert torch.equal(torch.view_as_real(target), torch.view_as_real(x))


def test_flattened(device: torch.device) -> None:
    """All memory from a tensor's first element to its last, gaps included."""
    base = torch.arange(20.0, device=device)
    window = base[3:].as_strided((2, 3), (8, 2), 3)
    assert torch.equal(flattened(window), base[3:16])


# --- geometry -------------------------------------------------------------------------------------------------------------


def offsets(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Where each element lies, by brute force."""
    indices = itertools.product(*map(range, shape))
    return [sum(i * step for i, step in zip(index, stride, strict=True)) for index in indices]


geometries = strategies.lists(
    strategies.tuples(strategies.integers(0, 4), strategies.integers(0, 9)), min_size=0, max_size=4
).map(lambda dims: (tuple(size for size, _ in dims), tuple(step for _, step in dims)))


def at(geometry: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return torch.zeros(200).as_strided(*geometry)


@hypothesis.given(geometries)
def test_extent(geometry: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The extent is the distance from the first element to the last, both included."""
    where = offsets(*geometry)
    assert extent(at(geometry)) == (max(where) + 1 if where else 0)


@hypothesis.given(geometries)
def test_overlaps(geometry: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Tensors whose elements share memory are always found; what is said to overlap needlessly still copies right."""
    where = offsets(*geometry)
    if len(set(where)) < len(where):
        assert overlaps(at(geometry))
    if not where:
        assert not overlaps(at(geometry))


@hypothesis.given(
    strategies.permutations(range(3)), strategies.lists(strategies.integers(1, 4), min_size=3, max_size=3)
)
def test_dense_tensors_do_not_overlap(order: list[int], sizes: list[int]) -> None:
    """A dense tensor, its dimensions in any order, is copied as a whole and needs no flat bridge."""
    assert not overlaps(torch.zeros(sizes).permute(order))


@hypothesis.given(geometries)
def test_copies_of_any_geometry(geometry: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Bridge and clone hold the same elements at the same strides, for any geometry."""
    value = torch.arange(200.0).as_strided(*geometry)
    bridge = Bridge.like(value, value.device)
    bridge.load(value)
    load_all([again := Bridge.like(value, value.device)], [value])
    for copy in (bridge.tensor, again.tensor, clone_exact(value)):
        assert torch.equal(copy, value)
        assert copy.stride() == value.stride() or not value.numel()


# --- specs ----------------------------------------------------------------------------------------------------------------


def test_spec_text() -> None:
    """A spec prints all that it holds a tensor to."""
    spec = TensorSpec.of(torch.empty(2, 3, dtype=torch.float16).t())
    assert str(spec) == "float16[3, 2] with stride [1, 3] on cpu"


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        (torch.empty(2, 3), True),
        (torch.empty(3, 2).t(), False),  # other strides
        (torch.empty(2, 6)[:, ::2], False),
        (torch.empty(2, 4), False),
        (torch.empty(2, 3, 1), False),
        (torch.empty(2, 3, dtype=torch.float64), False),
        (torch.empty(2, 3, device="meta"), False),
        (None, False),
        ((2, 3), False),
        (torch.empty(3, 3)[1:], True),  # an offset does not matter
        (torch.nn.Parameter(torch.empty(2, 3)), True),
    ],
    ids=[
        "same",
        "transposed",
        "with_gaps",
        "other_size",
        "other_rank",
        "other_dtype",
        "other_device",
        "none",
        "tuple",
        "with_offset",
        "parameter",
    ],
)
def test_spec_accepts(value: Any, accepted: bool) -> None:
    """Shape, stride, dtype and device have to fit; where in its storage a tensor begins has not."""
    assert TensorSpec.of(torch.empty(2, 3)).accepts(value) is accepted


def test_quick_check(value: Tensor) -> None:
    """The quick check passes what lies alike, and nothing that the spec would not accept."""
    spec = TensorSpec.of(value)
    quick = spec.quick_check()
    assert quick(changed(value))
    others = [make(value.device) for make in LAYOUTS.values()]
    others += [
        torch.empty_like(value, dtype=torch.int16),
        value.to("meta"),
        value[None],
        nn.Parameter(value, requires_grad=False),
        None,
        [value],
    ]
    assert all(spec.accepts(other) for other in others if quick(other))


def test_strides_that_say_nothing() -> None:
    """The stride of a dimension with one element, and of a tensor with none, says nothing."""
    assert TensorSpec.of(torch.empty(4, 1)).accepts(torch.empty(4, 1).as_strided((4, 1), (1, 77)))
    assert TensorSpec.of(torch.empty(0, 4)).accepts(torch.empty(4, 0).t())
    assert not TensorSpec.of(torch.empty(0, 4)).accepts(torch.empty(4, 0))
    assert not TensorSpec.of(torch.empty(4, 2)).accepts(torch.empty(4, 2).as_strided((4, 2), (1, 4)))


def test_bridge_is_aligned_as_its_value(value: Tensor) -> None:
    """A bridge lies to 16 bytes as the value that it was made for, in a storage that begins where it does."""
    bridge = Bridge.like(value, torch.device(value.device.type))  # without a number, as callers may say it
    assert bridge.tensor.data_ptr() % 16 == value.data_ptr() % 16
    assert bridge.tensor.storage_offset() == 0
    assert bridge.tensor.untyped_storage().nbytes() == extent(value) * value.element_size()
