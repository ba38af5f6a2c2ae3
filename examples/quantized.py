"""A Llama whose weights torchao has quantised to eight bits, compiled: captured as it is, with the quantised model's bits.

torchao replaces weights by tensors of a class of its own, which hold integers and scales. PyTorch takes such tensors apart
before this backend sees the graph, so integers and scales are ordinary weights at fixed addresses. The weights are random.
On a GPU the model is larger, and the time of a call is told, in turns. It needs ``pip install torchao transformers``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, LlamaConfig

from breakable_backend import explain


def build(device: torch.device) -> torch.nn.Module:
    """A Llama with random weights."""
    layers, width = (16, 1024) if device.type == "cuda" else (2, 64)
    config = LlamaConfig(
        vocab_size=128, num_hidden_layers=layers, hidden_size=width, intermediate_size=2 * width, num_attention_heads=4
    )
    with device:
        model = AutoModelForCausalLM.from_config(config).eval()
    return model.bfloat16() if device.type == "cuda" else model


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights of the layers, integers and scales where they are quantised."""
    parts = []
    for weight in model.model.layers.parameters():
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
        parts += [getattr(weight, name) for name in names] or [weight]
    return sum(part.nbytes for part in parts)


def microseconds(calls: dict[str, Callable[[], object]], turns: int = 20) -> dict[str, float]:
    """The time of each call until the GPU is done: the median of turns of ten."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            taken[name].append((time.perf_counter() - start) * 1e5)
    return {name: median(times) for name, times in taken.items()}


@torch.no_grad()
def main() -> int:
    """Quantise, compare eager and compiled; 0 if all results are the same bits, and the model is one captured graph."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    model = build(device)
    tokens = torch.randint(128, (1, 8), device=device)
    before, full = weight_bytes(model), model(tokens, use_cache=False).logits
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    compiled = torch.compile(model, backend="breakable_cg", fullgraph=True, options=options)
    for number in range(6):
        tokens = torch.randint(128, (1, 8), device=device) if number else tokens
        got, want = compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits
        if not torch.equal(got, want):
            print(f"call {number}: other bits than the quantised model's in eager")
            return 1
        if number == 0:
            print(
                f"{weight_bytes(model)} bytes of weights in place of {before}; logits differ by {(got - full).abs().max():.2g}"
            )
    report = explain(compiled)
    print(report)
    (program,) = report.programs
    print("\nthe same bits as the quantised model in eager")
    if device.type == "cuda":
        calls = {"eager": model, "compiled": compiled}
        taken = microseconds({name: lambda f=f: f(tokens, use_cache=False) for name, f in calls.items()})  # type: ignore[misc]
        print(
            ", ".join(f"{name} {time:,.0f} us" for name, time in taken.items()),
            "a call on",
            torch.cuda.get_device_name(),
        )
    return 0 if (program.num_graph_segments, program.num_eager_segments) == (1, 0) and program.replays >= 4 else 1


if __name__ == "__main__":
    sys.exit(main())
