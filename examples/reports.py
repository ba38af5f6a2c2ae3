"""Reports of three real models, measured: does it pay, and what would help?

    python examples/reports.py                # prints them
    python examples/reports.py docs/reports   # and writes each as a page, as JSON and as text

A Llama that decodes, its attention an op that no graph may hold; a vision transformer whose answer is cut down to the
classes that are likely, by a mask; a Mixtral, whose routing is transformers' own Python, marked as it stands. Weights
are random, nothing is downloaded. Without a GPU the models are tiny and the tape driver stands in: such a report shows
what would be captured, and its times say nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, ViTConfig, ViTForImageClassification
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

sys.path.insert(0, str(Path(__file__).parent))
import quickstart

from breakable_backend import Report, eager_on_graph, explain


def llama(device: torch.device, options: dict[str, Any]) -> Report:
    """One decode step of the quick start's Llama."""
    model, config = quickstart.build(device)
    cache = quickstart.empty_cache(model, config, device)
    prompt = torch.randint(config.vocab_size, (1, quickstart.PROMPT_TOKENS), device=device)
    positions = torch.arange(quickstart.PROMPT_TOKENS, device=device)[None]
    model(input_ids=prompt, position_ids=positions, past_key_values=cache)  # the prompt is not compiled
    return explain(
        torch.compile(model, backend="breakable_cg", options=options),
        input_ids=prompt[:, -1:],
        position_ids=positions[:, -1:] + 1,
        past_key_values=cache,
        measure=True,
    )


def vision(device: torch.device, options: dict[str, Any]) -> Report:
    """A vision transformer, and the likely ones of its classes."""
    sizes = (
        {}
        if device.type == "cuda"
        else dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=128, image_size=32)
    )
    config = ViTConfig(num_labels=1000, **sizes)
    model = ViTForImageClassification(config).to(device).eval()

    def likely(image: Tensor) -> Tensor:
        probabilities = model(image).logits.softmax(-1)
        return probabilities[probabilities > 1e-3].sort(descending=True).values * 100

    image = torch.randn(1, 3, config.image_size, config.image_size, device=device)
    return explain(torch.compile(likely, backend="breakable_cg", options=options), image, measure=True)


def shapes(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts return, for a compiler that has no values to route by."""
    return torch.empty_like(hidden_states)


def mixture(device: torch.device, options: dict[str, Any]) -> Report:
    """A Mixtral on 16 tokens. Its experts loop over what the router chose: marked, not rewritten."""
    if device.type == "cuda":
        sizes = dict(
            num_hidden_layers=8,
            hidden_size=1024,
            intermediate_size=2048,
            num_attention_heads=16,
            num_key_value_heads=8,
            vocab_size=32000,
        )
    else:
        sizes = dict(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
    config = MixtralConfig(**sizes, num_local_experts=8, use_cache=False, experts_implementation="eager")
    model = MixtralForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    for module in model.modules():
        if isinstance(module, MixtralExperts):
            module.forward = eager_on_graph(fake=shapes)(module.forward)
    tokens = torch.randint(config.vocab_size, (1, 16), device=device)
    return explain(torch.compile(model, backend="breakable_cg", options=options), tokens, measure=True)


MODELS: dict[str, Callable[[torch.device, dict[str, Any]], Report]] = {
    "llama": llama,
    "vision": vision,
    "mixture": mixture,
}


@torch.no_grad()
def main(folder: Path | None = None) -> int:
    """Make all reports; 0 if each model was captured and measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = {} if device.type == "cuda" else {"driver": "tape"}
    failed = False
    for name, model in MODELS.items():
        torch.manual_seed(0)
        torch.compiler.reset()
        report = model(device, options)
        print(f"--- {name}\n{report}\n")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            report.to_html(folder / f"{name}.html")
            (folder / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
            (folder / f"{name}.txt").write_text(f"{report}\n", encoding="utf-8")
        failed |= not any(recording.measured for program in report.programs for recording in program.recordings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
