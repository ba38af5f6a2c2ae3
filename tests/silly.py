"""Ops and models that the contract tests compile: small, deterministic, and with answers one can check by hand.

``calls`` counts the Python bodies of ops that must run eagerly; ``bodies`` those of ops that may be captured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from breakable_backend.drivers import tape

UNSAFE = (torch.Tag.cudagraph_unsafe,)

calls: Counter[str] = Counter()
"""Runs of each op that the tests mark."""
bodies: Counter[str] = Counter()
"""Runs of the Python body of each op that may be captured."""
watched: list[Tensor] = []
"""What :func:`look` reads through a closure."""
hooks: dict[str, Callable[..., Any]] = {}
"""What :func:`visit` calls, and what :func:`fragile` raises through."""

library = torch.library.Library("silly", "FRAGMENT")


# --- ops that break the graph ---------------------------------------------------------------------------------------------


@torch.library.custom_op("silly::attention", mutates_args=(), tags=UNSAFE)
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q + k + v``."""
    calls["attention"] += 1
    return q + k + v


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


library.define("double(Tensor x) -> Tensor")
library.define("triple(Tensor x) -> Tensor", tags=UNSAFE)
library.define("triple.scaled(Tensor x, float by) -> Tensor")


@torch.library.impl(library, "double", "CompositeExplicitAutograd")
def _double(x: Tensor) -> Tensor:
    calls["double"] += 1
    return x * 2


@torch.library.impl(library, "triple", "CompositeExplicitAutograd")
def _triple(x: Tensor) -> Tensor:
    calls["triple"] += 1
    return x * 3


@torch.library.impl(library, "triple.scaled", "CompositeExplicitAutograd")
def _triple_scaled(x: Tensor, by: float) -> Tensor:
    calls["triple.scaled"] += 1
    return x * 3 * by


@torch.library.register_fake("silly::double", lib=library)
@torch.library.register_fake("silly::triple", lib=library)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("silly::triple.scaled", lib=library)
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


double = torch.ops.silly.double
"""``2 x``; marked by nothing but its name, where a test marks it."""
triple = torch.ops.silly.triple
"""``3 x``; its default overload is tagged, its overload ``scaled`` is not."""


@torch.library.custom_op("silly::write_row", mutates_args=("cache",), tags=UNSAFE)
def write_row(cache: Tensor, row: Tensor, position: Tensor) -> None:
    """A KV-cache write: ``cache[position] = row``."""
    calls["write_row"] += 1
    cache.index_copy_(0, position, row)


library.define("add_into(Tensor(a!) target, Tensor x) -> ()", tags=UNSAFE)


@torch.library.impl(library, "add_into", "CompositeExplicitAutograd")
def _add_into(target: Tensor, x: Tensor) -> None:
    calls["add_into"] += 1
    target.add_(x)


@torch.library.register_fake("silly::add_into", lib=library)
def _(target: Tensor, x: Tensor) -> None:
    pass


add_into = torch.ops.silly.add_into
"""``target += x``, and no result."""


@torch.library.custom_op("silly::three", mutates_args=(), tags=UNSAFE)
def three(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x + 1``, the sum over rows of ``x``, and ``x > 0``."""
    calls["three"] += 1
    return x + 1, x.sum(0), x > 0


@three.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1:]), x.new_empty(x.shape, dtype=torch.bool)


@torch.library.custom_op("silly::pieces", mutates_args=(), tags=UNSAFE)
def pieces(x: Tensor, count: int) -> list[Tensor]:
    """``x + 0``, ``x + 1`` … as a list."""
    calls["pieces"] += 1
    return [x + number for number in range(count)]


@pieces.register_fake
def _(x: Tensor, count: int) -> list[Tensor]:
    return [torch.empty_like(x) for _ in range(count)]


@torch.library.custom_op("silly::notice", mutates_args=(), tags=UNSAFE)
def notice(x: Tensor) -> None:
    """Counts, returns nothing, writes nothing."""
    calls["notice"] += 1


@notice.register_fake
def _(x: Tensor) -> None:
    pass


@torch.library.custom_op("silly::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    """The positive elements: of a size that depends on the data, which a rule finds by itself."""
    calls["positive"] += 1
    return x[x > 0]


@positive.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.custom_op("silly::noise", mutates_args=(), tags=UNSAFE)
def noise(x: Tensor) -> Tensor:
    """``x`` plus a draw from the device's default generator."""
    calls["noise"] += 1
    return x + torch.rand_like(x)


@torch.library.custom_op("silly::look", mutates_args=(), tags=UNSAFE)
def look(x: Tensor) -> Tensor:
    """``x`` plus the sum of the tensor in :data:`watched`, which no graph knows of."""
    calls["look"] += 1
    return x + watched[0].sum()


@torch.library.custom_op("silly::ambient", mutates_args=(), tags=UNSAFE)
def ambient(x: Tensor) -> Tensor:
    """The state that the op runs in, as numbers; see :func:`state`."""
    calls["ambient"] += 1
    return x.new_tensor(state(x.device.type))


@ambient.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(4)


def state(device: str) -> list[float]:
    """Autocast on, autocast to bfloat16, grad mode, inference mode."""
    enabled = torch.is_autocast_enabled(device)
    return [
        float(enabled),
        float(enabled and torch.get_autocast_dtype(device) is torch.bfloat16),
        float(torch.is_grad_enabled()),
        float(torch.is_inference_mode_enabled()),
    ]


@torch.library.custom_op("silly::visit", mutates_args=(), tags=UNSAFE)
def visit(x: Tensor) -> Tensor:
    """``hooks["visit"](x)`` if there is one, as a tensor of its own; else ``x + 1``."""
    calls["visit"] += 1
    return hooks["visit"](x).clone() if "visit" in hooks else x + 1


@torch.library.custom_op("silly::fragile", mutates_args=(), tags=UNSAFE)
def fragile(x: Tensor) -> Tensor:
    """``x + 1``, unless ``hooks["fragile"]()`` raises."""
    calls["fragile"] += 1
    hooks.get("fragile", lambda: None)()
    return x + 1


@noise.register_fake
@look.register_fake
@visit.register_fake
@fragile.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("silly::liar", mutates_args=(), tags=UNSAFE)
def liar(x: Tensor) -> Tensor:
    """``x`` transposed in memory, which its fake implementation does not say."""
    calls["liar"] += 1
    return (x + 1).t().contiguous().t()


@liar.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("silly::marked_product", mutates_args=(), tags=UNSAFE)
def marked_product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w`` in whatever dtype autocast says, as float32."""
    calls["marked_product"] += 1
    return (x @ w).float().clone()


# --- ops that may be captured -------------------------------------------------------------------------------------------


@torch.library.custom_op("silly::product", mutates_args=())
def product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w`` in whatever dtype autocast says, as float32; no mark, no rule."""
    bodies["product"] += 1
    return (x @ w).float().clone()


@marked_product.register_fake
@product.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]), dtype=torch.float32)


@torch.library.custom_op("silly::wave", mutates_args=())
def wave(x: Tensor) -> Tensor:
    """``2 sin(x)``; can be captured, so that its Python body runs at capture only."""
    bodies["wave"] += 1
    return x.sin() * 2


def capturing() -> bool:
    """Whether a capture is under way here."""
    return tape._active.get() is not None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


@torch.library.custom_op("silly::stubborn", mutates_args=())
def stubborn(x: Tensor) -> Tensor:
    """``x`` plus its own maximum, read on the host, but only where that is not allowed: nothing tells before."""
    bodies["stubborn"] += 1
    if not capturing():
        return x + x.max()
    return x + x.max().item()


@wave.register_fake
@stubborn.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("silly::stubborn_into", mutates_args=("target",))
def stubborn_into(target: Tensor, x: Tensor) -> None:
    """``target += x``, a random draw, and then a host read: a capture fails when half of the work is done."""
    bodies["stubborn_into"] += 1
    target.add_(x)
    target.add_(torch.rand_like(target))
    if capturing():
        x.max().item()


@stubborn_into.register_fake
def _(target: Tensor, x: Tensor) -> None:
    pass


@torch.library.custom_op("silly::split", mutates_args=())
def split(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``x + 1``, and ``x + 2`` and ``x + 3`` in a list: a result in a result."""
    return x + 1, [x + 2, x + 3]


@split.register_fake
def _(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x), [torch.empty_like(x), torch.empty_like(x)]


# --- models -------------------------------------------------------------------------------------------------------------


class Silly(nn.Module):
    """``3 (3 (x + 3) - 3) + 1 = 9 x + 19``, with two eager calls of :func:`attention`."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x = x + 2
        x = attention(x, x, x)
        x = x - 2
        x = x - 1
        x = attention(x, x, x)
        return x + 1


class Block(nn.Module):
    """``y + attention(y, y, y)`` with ``y = gelu(linear(norm(x)))``: 4 times ``y``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.linear(self.norm(x)))
        return y + attention(y, y, y)


class Cache(nn.Module):
    """Writes ``x + 1`` to row ``position`` of its cache eagerly, and returns ``2 x`` plus the sum of the cache's rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(rows, width))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        row = (x + 1).reshape(1, -1)
        write_row(self.cache, row, position)
        return (self.cache * 1.0).sum(0) + 2 * x


class Counting(nn.Module):
    """Call ``n`` (from 1) returns ``x + 3 n - 2`` and leaves ``3 n``: 1 added by a graph, 2 added by an eager op after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(1)
        y = x + self.total
        add_into(self.total, torch.full_like(x, 2.0))
        return y


def mutating(x: Tensor) -> Tensor:
    """``x`` becomes ``8x + 3``, in two writes around an eager op, and the result is one more."""
    x.mul_(2)
    y = triple(x + 1)
    return x.add_(y) + 1


def aliasing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two results that share memory, and a view of the input of four elements."""
    y = triple(x.exp() + 1) * 2 + 1
    return y, y[1:], x.view(2, 2)
