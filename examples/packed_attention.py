"""Attention over packed sequences with metadata from the host: flash or flex attention between captured segments.

Requests of all lengths lie one after the other in one row of tokens, as inference servers pack them. Before each step the
host works out where each begins and how long the longest is, once for all layers. The attention reads that as Python
numbers, which no CUDA graph can hold, so it is marked; all around it is captured. It needs nothing but this package.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import gelu, scaled_dot_product_attention

from breakable_backend import eager_on_graph, explain

TOKENS, WIDTH, HEADS, LAYERS = 256, 128, 2, 4
BATCHES = [(100, 28, 64, 64), (256,), (1, 2, 3, 250), (128, 128), (40,) * 6 + (16,), (7, 200, 49)]
"""The lengths of the requests of each step. They fill the row; a server would have a request of padding at its end."""


@dataclass(frozen=True)
class Packing:
    """Where the requests of one step are; made on the host, from lengths that the server knows without the GPU."""

    starts: tuple[int, ...]
    """Of each request the first token, and at last the number of tokens."""
    longest: int
    on_device: Tensor
    """``starts``, as int32 on the device."""
    mask: BlockMask
    """For flex attention: which blocks of 128 tokens see which."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        starts = (0, *itertools.accumulate(lengths))
        request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (request[query] == request[key]) & (query >= key)

        mask = create_block_mask(sees, None, None, TOKENS, TOKENS, device=device.type)
        return cls(starts, max(lengths), torch.tensor(starts, dtype=torch.int32, device=device), mask)


Kernel = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]
"""Queries, keys and values of shape (tokens, heads, size) to what each token reads: causal, inside of its request."""


def loop(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Request by request, on any device."""
    read = []
    for start, end in itertools.pairwise(packing.starts):
        part = (x[start:end].transpose(0, 1) for x in (q, k, v))
        read.append(scaled_dot_product_attention(*part, is_causal=True).transpose(0, 1))
    return torch.cat(read)


def flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """PyTorch's flash attention for packed sequences, which takes the longest length as a Python number."""
    from torch.nn.attention.varlen import varlen_attn

    places, longest = packing.on_device, packing.longest
    return varlen_attn(q, k, v, places, places, longest, longest, window_size=(-1, 0))  # type: ignore[return-value]


compiled_flex = torch.compile(flex_attention)
"""By Inductor: the kernel is compiled, and called from an eager step."""


def flex(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Flex attention with the mask of this step; on the CPU uncompiled."""
    kernel = compiled_flex if q.is_cuda else flex_attention
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return kernel(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=packing.mask)[0].transpose(0, 1)


class Step:
    """What the attention of all layers reads in this step. A server sets it before it calls the model."""

    kernel: Kernel = loop
    packing: Packing


@eager_on_graph
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain Python, on real tensors, in each call: it sees the packing of this step."""
    return Step.kernel(q, k, v, Step.packing).contiguous()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).unbind(1)
        x = x + self.out(attend(q, k, v).flatten(1))
        return x + self.down(gelu(self.up(self.between(x))))


def check(kernel: Kernel, device: torch.device) -> bool:
    """Steps with other requests each, eagerly and compiled; whether all bits are the same, and most steps were replayed."""
    torch.manual_seed(0)
    Step.kernel = staticmethod(kernel)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(
        device, torch.bfloat16 if device.type == "cuda" else None
    )
    options = {} if device.type == "cuda" else {"driver": "tape"}
    compiled = torch.compile(model.eval(), backend="breakable_cg", fullgraph=True, options=options)
    for lengths in BATCHES:
        Step.packing = Packing.of(lengths, device)
        x = torch.randn(TOKENS, WIDTH, device=device, dtype=next(model.parameters()).dtype)
        if not torch.equal(compiled(x), model(x)):
            print(f"{kernel.__name__}, requests of {lengths} tokens: other bits than eager's")
            return False
    report = explain(compiled)
    print(report)
    print(f"\n{kernel.__name__}: the same bits as eager in {len(BATCHES)} steps with other lengths each\n")
    program = report.programs[-1]
    torch.compiler.reset()
    return program.num_eager_segments == LAYERS and program.replays >= len(BATCHES) - 3


@torch.no_grad()
def main() -> int:
    """Flash, flex and a loop on a GPU; flex and a loop on the CPU. 0 if each has eager's bits and is replayed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = [loop, flex, flash] if device.type == "cuda" else [loop, flex]
    return 0 if all(check(kernel, device) for kernel in kernels) else 1


if __name__ == "__main__":
    sys.exit(main())
