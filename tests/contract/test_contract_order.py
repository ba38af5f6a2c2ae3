"""Contract line 2: mutation, random draws and eager steps happen in program order, mutation at its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from checks import check


def watch(name: str) -> Any:
    """Have :func:`silly.look` read the buffer of that name of the side whose turn it is."""

    def prepare(module: nn.Module) -> None:
        silly.watched[:] = [getattr(module, name)]

    return prepare


class WriteThenLook(nn.Module):
    """A graph writes a buffer; an eager op then reads it through a closure."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return silly.look(x * 2) + 1


class LookThenWrite(WriteThenLook):
    """An eager op reads a buffer through a closure; a graph then writes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = silly.look(x * 2) + 1
        self.total.mul_(2).add_(x)
        return y * 3


class WriteLookWriteLook(WriteThenLook):
    """Each of two eager readers sees the writes before it and none after."""

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        y = silly.look(x * 2) + 1
        self.total.mul_(y)
        z = silly.look(y + 1) + self.total
        self.total.sub_(1)
        return z.cos()


@pytest.mark.parametrize(
    ("model", "captured", "looks"), [(WriteThenLook, 2, 1), (LookThenWrite, 2, 1), (WriteLookWriteLook, 3, 2)]
)
def test_eager_reader_through_a_closure(
    model: Any, captured: int, looks: int, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 2: an eager op that reads a buffer through a closure sees the writes before it, and none after it."""
    # captured = eager calls + 1; copies = x and the result of each eager call: the buffer has a fixed address
    check(
        model().to(device),
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=captured,
        eager=looks,
        copies=1 + looks,
        prepare=watch("total"),
    )


class EagerWriteThenGraph(WriteThenLook):
    """An eager op writes a buffer; a graph then reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        silly.add_into(self.total, y)
        return self.total * 2 + x


class GraphBetweenEagerWrites(WriteThenLook):
    """Two eager writes, with a captured write between them and captured reads after each."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        silly.add_into(self.total, x)
        a = self.total * 2
        self.total.mul_(3)
        silly.add_into(self.total, a)
        b = self.total + 1
        return a, b, self.total.sum() + 0


@pytest.mark.parametrize(
    ("model", "captured", "copies"),
    [
        (EagerWriteThenGraph, 2, 1),  # x
        (GraphBetweenEagerWrites, 2, 0),  # only eager ops read x
        (lambda width=4: silly.Counting(width), 2, 1),  # x
    ],
    ids=["write-read", "between", "counting"],
)
def test_buffer_written_by_eager_steps(
    model: Any, captured: int, copies: int, device: torch.device, options: dict[str, Any]
) -> None:
    """Line 2: a graph reads a buffer as the eager write before it left it, and both kinds of write may alternate."""
    program = check(
        model().to(device),
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        copies=copies,
    )
    assert program.num_graph_segments >= captured - 1


def test_write_between(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: a write between two readers is seen by the second only."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        before = silly.triple(y)
        y.mul_(5)
        after = silly.triple(y)
        return before + 1, after + 1

    # add | triple | mul_ | triple | two adds; copies = x and two results: y is the pool's own
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=2, copies=3)


def test_eager_write_to_an_intermediate(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: what an eager op writes into memory of the pool is what the graph after it reads."""

    def f(x: Tensor) -> Tensor:
        y = x + 1
        silly.add_into(y, x)
        return y * 2

    # add | add_into | mul; copies = x
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=2, eager=1, copies=1)


def test_eager_write_to_a_view(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: an eager op writes through a view of an intermediate."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        silly.add_into(y[1], x[0])
        silly.add_into(y.t()[0], x[:, 1])
        return y * 2, y[1] + 1

    check(
        f, lambda _: (torch.rand(3, 3, device=device),), device=device, options=options, captured=2, eager=1, copies=1
    )


def test_graph_writes_result_of_an_eager_step(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: a graph that writes the result of an eager step writes what later steps of both kinds read."""

    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = silly.triple(x + 1)
        y.mul_(2)
        z = silly.triple(y)
        return y, z, y + z

    # add | triple | mul_ | triple | add; copies = x, first result, second result
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=3, eager=2, copies=3)


def test_mutated_result_read_by_eager_view(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: an eager step after a captured write reads the written value, also through a view."""

    def f(x: Tensor) -> Tensor:
        y = silly.triple(x + 1)
        y[0].mul_(2)
        return silly.triple(y.t()) + y.t()

    check(
        f, lambda _: (torch.rand(4, 4, device=device),), device=device, options=options, captured=3, eager=2, copies=3
    )


def test_draws_in_order(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 2 and 6: captured and eager draws happen in the order of the program."""

    def f(x: Tensor) -> Tensor:
        y = x + torch.rand_like(x)
        y = silly.noise(y)
        return y * torch.rand_like(x)

    # rand-add | noise | rand-mul; copies = x and the result of noise
    check(f, lambda _: (torch.rand(4, device=device),), device=device, options=options, captured=2, eager=1, copies=2)


def test_buffers_of_batch_norm(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: buffers that a composite op writes, without its schema saying so, are those of eager after each call."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x) + 1
            y = silly.look(y)
            return self.norm(y) * 2

    check(
        Model().to(device).train(),
        lambda _: (torch.rand(5, 3, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
        prepare=lambda module: silly.watched.__setitem__(slice(None), [module.norm.running_mean]),
    )


def test_one_buffer_through_two_names(device: torch.device, options: dict[str, Any]) -> None:
    """Lines 2 and 5: a buffer and a view of it, registered side by side, are one storage."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.zeros(3, 4, device=device))
            self.register_buffer("part", self.whole[1])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.whole.add_(x)
            y = silly.triple(self.part) + self.part
            self.part.mul_(2)
            return y, self.whole.sum(1)

    check(Model(), lambda _: (torch.rand(4, device=device),), device=device, options=options)


def test_mutation_under_no_break(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: many writes to one buffer in one segment happen in order."""

    class Model(WriteThenLook):
        def forward(self, x: Tensor) -> Tensor:
            a = self.total + x
            self.total.copy_(a)
            b = self.total * 2
            self.total[1:].copy_(b[:-1])
            self.total.neg_()
            return self.total + b

    # one segment, no eager step; copies = x
    check(
        Model().to(device),
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=1,
        eager=0,
        copies=1,
    )


def test_setitem_and_slices(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: ``cache[:, position] = x``, with eager readers around."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 6))

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            before = silly.look(x)
            self.cache[:, position] = x[:, None]
            after = silly.look(x + 1)
            self.cache[0] += after[0]
            return before + after + self.cache.sum()

    check(
        Model().to(device),
        lambda call: (torch.rand(2, device=device), torch.tensor([call % 6], device=device)),
        device=device,
        options=options,
        prepare=watch("cache"),
    )


def test_eager_region_in_order(device: torch.device, options: dict[str, Any]) -> None:
    """Line 2: writes inside an eager region stay where they are."""

    class Model(WriteThenLook):
        def forward(self, x: Tensor) -> Tensor:
            self.total.add_(x)
            with breakable_backend.eager_region():
                self.total.mul_(2)
                y = self.total + x
            self.total.sub_(y)
            return self.total * y

    # add_ | mul_, add | sub_, mul; copies = x and y
    check(
        Model().to(device),
        lambda _: (torch.rand(4, device=device),),
        device=device,
        options=options,
        captured=2,
        eager=1,
        copies=2,
    )
