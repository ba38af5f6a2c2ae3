"""Whether two tensors are equal, bit for bit or within a tolerance, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tolerance = tuple[float, float] | None
"""``(rtol, atol)``; None: bit for bit."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """How far a value is from eager's."""

    count: int
    """The number of elements that differ."""
    total: int
    max_abs: float
    """Infinite if one of the two values is NaN."""
    max_rel: float
    first: tuple[int, ...]
    """The index of the first element that differs."""
    got: str
    want: str

    def __str__(self) -> str:
        where = f" at {list(self.first)}" if self.first else ""
        return (
            f"{self.count} of {self.total} elements differ, by at most {self.max_abs:.6g} (relative {self.max_rel:.6g}); "
            f"the first{where} is {self.got} instead of {self.want}"
        )


def difference(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance = None) -> Difference | None:
    """The difference of ``got``; None if there is none. NaN equals NaN, and -0.0 does not equal 0.0."""
    if got.shape != want.shape or got.dtype is not want.dtype or got.device != want.device:
        return Difference(got.numel(), got.numel(), float("inf"), float("inf"), (), _layout_of(got), _layout_of(want))
    if got.numel() == 0:
        return None
    with torch.no_grad():
        got, want = _plain(got), _plain(want)
        differs = _differs(got, want, tolerance)
        if not bool(differs.any()):
            return None
        first = tuple(int(index) for index in differs.nonzero()[0])
        wide = torch.complex128 if got.is_complex() else torch.float64
        mine, theirs = got.to(wide)[differs], want.to(wide)[differs]
        apart = (mine - theirs).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        relative = (apart / theirs.abs()).nan_to_num(nan=0.0 if float(apart.max()) == 0 else float("inf"))
        return Difference(
            count=int(differs.sum()),
            total=got.numel(),
            max_abs=float(apart.max()),
            max_rel=float(relative.max()),
            first=first,
            got=str(got[first].item()),
            want=str(want[first].item()),
        )


def _differs(got: torch.Tensor, want: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    if got.is_complex():
        parts = _differs(torch.view_as_real(got), torch.view_as_real(want), tolerance)
        return parts.any(-1)
    if tolerance is not None and got.is_floating_point():
        mine, theirs = got.double(), want.double()
        return ~torch.isclose(mine, theirs, rtol=tolerance[0], atol=tolerance[1], equal_nan=True)
    integer = _INTEGERS[got.element_size()]
    differs = got.view(integer) != want.view(integer)
    if got.is_floating_point():
        differs &= ~(got.double().isnan() & want.double().isnan())
    return differs


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_quantized:  # its memory cannot be viewed as integers: some views of it end the process
        tensor = tensor.dequantize()
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def _layout_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
