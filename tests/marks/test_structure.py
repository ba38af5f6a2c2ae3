"""Arguments and results taken apart, and put together again."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from breakable_backend.ir.layout import strided
from breakable_backend.marks.results import Unholdable, take_result
from breakable_backend.marks.structure import (
    foreign,
    put_together,
    take_apart,
    view_leaf,
    view_of,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass(frozen=True)
class Record:
    tensor: Tensor
    label: str = "x"


def test_round_trip() -> None:
    """What is taken apart is put together as it was, the very same tensors in it."""
    tensor = torch.ones(2)
    value = {"a": [tensor, 1, 2.5, None], 3: (True, "s", Pair(tensor * 2, -1)), "r": Record(tensor, "y")}
    tensors: list[Any] = []
    ints: list[Any] = []
    floats: list[Any] = []
    structure = take_apart(value, tensors, ints, floats)
    assert (len(tensors), ints, floats) == (3, [1, -1], [2.5])
    places = {"tensor": tensors, "int": ints, "float": floats}
    again = put_together(structure, lambda leaf: leaf[1] if leaf[0] == "plain" else places[leaf[0]][leaf[1]])
    assert again["a"][0] is tensor
    assert again["r"] == Record(tensor, "y")
    assert again[3][:2] == (True, "s")
    assert again[3][2].second == -1
    assert list(again) == list(value)


def test_foreign_values() -> None:
    """The type of what nothing can hold is named, however deep it lies."""
    assert foreign({"a": [1, (2.0, Record(torch.ones(1)))]}) == ""
    assert foreign([1, {"a": {1, 2}}]) == "set"
    assert foreign(object()) == "object"


def views(base: Tensor) -> list[Tensor]:
    """Many ways to look at a matrix or a cube."""
    found = [
        base,
        base.t() if base.dim() == 2 else base.permute(2, 0, 1),
        base[1],
        base[:, 1:],
        base[..., ::2],
        base[1:],
    ]
    found += [base.reshape(-1)[3:7], base[0, 1], base[:0], base.unsqueeze(1), base[:1].expand(3, *base.shape[1:])]
    found += [base[1:].unsqueeze(1).expand(-1, 3, *base.shape[1:]), base.reshape(-1)[3:7].expand(2, 4)]
    found += [view.transpose(0, -1) for view in list(found) if view.dim() > 1]
    return found


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4)])
def test_views(shape: tuple[int, ...]) -> None:
    """A view is made again with its geometry, from any base that holds it."""
    base = torch.arange(24.0).reshape(shape)
    for source, view in itertools.product((base, base.reshape(-1), base[1:], base.transpose(0, 1)), views(base)):
        leaf = view_leaf("argument", 0, strided(source), strided(view), detached=False)
        made = view_of(source, leaf)
        assert (made.shape, made.storage_offset()) == (
            view.shape,
            view.storage_offset() if view.numel() else made.storage_offset(),
        )
        assert torch.equal(made, view)
        assert made.untyped_storage()._cdata == base.untyped_storage()._cdata
    for view in (base[1:].transpose(0, 1), base[1:].unsqueeze(1).expand(-1, 3, *base.shape[1:])):
        assert view_leaf("argument", 0, strided(base), strided(view), detached=False)[4] is not None


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(2).to_sparse(), "a sparse tensor"),
        (torch.eye(2).to_mkldnn(), "a tensor of the layout torch._mkldnn"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged), "a nested tensor"),
        (torch.ones(2, device="meta"), "a tensor on the device meta"),
        (torch._efficientzerotensor((2,)), "a tensor of zeros for which autograd has no memory"),
        (torch.nn.Identity(), "Identity"),
        ([(y := torch.ones(2)), y.view(torch.int32)], "several dtypes"),
        ({"a": {1}}, "set"),
    ],
)
def test_what_no_result_can_be(value: Any, what: str) -> None:
    """Results that compiled code cannot hold are refused with what they are."""
    with pytest.raises(Unholdable, match=what) as caught:
        take_result([value], [], recording=False, exact=True)
    assert "return" in caught.value.fix


def test_a_result_is_taken_apart() -> None:
    """One root for each fresh storage; aliases of arguments have none."""
    argument, fresh = torch.ones(2, 2), torch.ones(3)
    result = take_result([(argument[0], fresh, fresh[1:], 7, float("nan"))], [argument], recording=False, exact=True)
    assert len(result.roots) == 1
    assert result.roots[0].numel() == 3
    assert result.ints == [7]
    again = take_result([(argument[0], fresh, fresh[1:], 8, float("nan"))], [argument], recording=False, exact=True)
    assert again.structure == result.structure
