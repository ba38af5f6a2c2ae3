"""A Llama decodes with a static cache: all of it in CUDA graphs but for the attention, which runs eagerly.

Generates the same tokens twice, once eagerly and once compiled, and fails if a single bit of any logits differs. The
weights are random and nothing is downloaded. Without a GPU the tape driver stands in for CUDA graphs: it captures
and replays by the same rules, but shows nothing of the speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, StaticCache

from breakable_backend import explain

PROMPT_TOKENS = 16
NEW_TOKENS = 32


# The mark is the tag: no graph holds this op. It stands for a kernel that cannot be captured, one that reads lengths
# on the host or is launched differently for each batch.
@torch.library.custom_op("quickstart::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, positions: Tensor, scale: float
) -> Tensor:
    """Causal attention of the tokens at ``positions`` over all of a static cache, filled or not."""
    if mask is None:  # transformers prepares none for an attention that it does not know
        mask = torch.arange(key.shape[2], device=key.device) <= positions[:, None, :, None]
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, positions: Tensor, scale: float) -> Tensor:
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width)  # the strides too have to be those of the real result


def attention_of_layer(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; it wants the attention weights as well, or ``None``."""
    return attention(query, key, value, attention_mask, position_ids, scaling), None


AttentionInterface.register("quickstart", attention_of_layer)


def build(device: torch.device) -> tuple[torch.nn.Module, LlamaConfig]:
    """A Llama with random weights: of a real model's width on a GPU, a toy on the CPU."""
    if device.type == "cuda":
        sizes = dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=5632, num_attention_heads=16)
        config, dtype = LlamaConfig(vocab_size=32000, **sizes), torch.bfloat16
    else:
        sizes = dict(num_hidden_layers=4, hidden_size=256, intermediate_size=688, num_attention_heads=4)
        config, dtype = LlamaConfig(vocab_size=1000, **sizes), torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="quickstart", dtype=dtype)
    return model.eval(), config


def empty_cache(model: torch.nn.Module, config: LlamaConfig, device: torch.device) -> StaticCache:
    """A static cache whose tensors exist, and are marked static, before anything is compiled."""
    cache = StaticCache(config, max_cache_len=64)
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
        device=device,
    )
    return cache


@torch.no_grad()
def generate(model: Callable[..., object], prompt: Tensor, cache: StaticCache) -> tuple[list[Tensor], list[float]]:
    """Decode greedily from an empty cache: the logits of each step, and its seconds."""
    cache.reset()
    tokens, positions = prompt, torch.arange(prompt.shape[1], device=prompt.device)[None]
    logits, seconds = [], []
    for _ in range(1 + NEW_TOKENS):
        start = time.perf_counter()
        step = model(input_ids=tokens, position_ids=positions, past_key_values=cache).logits[:, -1]
        if prompt.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        logits.append(step)
        tokens, positions = step.argmax(-1, keepdim=True), positions[:, -1:] + 1
    return logits, seconds[1:]  # the prompt is no decode step


def main() -> int:
    """Run both, compare, report; 0 if all is as it should be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {} if device.type == "cuda" else {"driver": "tape"}
    torch.manual_seed(0)
    model, config = build(device)
    prompt = torch.randint(config.vocab_size, (1, PROMPT_TOKENS), device=device)

    compiled = torch.compile(model, backend="breakable_cg", options=options)
    eager_cache, compiled_cache = empty_cache(model, config, device), empty_cache(model, config, device)
    generate(model, prompt, eager_cache)  # once before the clock counts
    expected, eager_seconds = generate(model, prompt, eager_cache)
    recorded, _ = generate(compiled, prompt, compiled_cache)  # compiles, warms up, records, replays
    replayed, compiled_seconds = generate(compiled, prompt, compiled_cache)  # replays from its first step

    report = explain(compiled)
    print(report)
    print(f"\n{config.num_hidden_layers} layers, {PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} decoded, on {device}")
    print(f"eager    {median(eager_seconds) * 1e6:9.0f} us a token")
    print(f"compiled {median(compiled_seconds) * 1e6:9.0f} us a token{' (tape: not a speed)' if options else ''}")

    wrong = []
    for run, logits in (("first", recorded), ("second", replayed)):
        for step, (got, want) in enumerate(zip(logits, expected, strict=True)):
            if got.argmax() != want.argmax():
                wrong.append(f"{run} run, step {step}: another token")
            if not torch.equal(got, want):
                wrong.append(f"{run} run, step {step}: logits differ by up to {(got - want).abs().max():.3g}")
    if len(report.programs) != 2:
        wrong.append(f"{len(report.programs)} programs where 2 are enough, one for the prompt and one for decoding")
    decode = max(report.programs, key=lambda program: program.calls)
    segments = config.num_hidden_layers + 1  # one before, between and after the attentions of all layers
    graphs = [recording.num_graphs for recording in decode.recordings]
    if decode.num_graph_segments != segments or graphs != [segments]:
        wrong.append(
            f"{decode.num_graph_segments} segments, recorded as {graphs} graphs, where {segments} are expected"
        )
    if decode.replays < NEW_TOKENS:
        wrong.append(f"{decode.replays} replays of the decode step, where the second run alone has {NEW_TOKENS}")
    print("\n".join(wrong) or "all logits and tokens are the same, bit for bit, in both compiled runs")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
