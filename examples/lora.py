"""LoRA adapters that are switched between calls: each has its own program, and switching back replays.

peft keeps all adapters in the model, and adds that one which is active. Which one it is, is a Python attribute that Dynamo
guards: the first call with an adapter compiles, later ones find what was compiled. It needs ``pip install peft``.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from breakable_backend import explain

ADAPTERS = ("formal", "brief")


def build(device: torch.device) -> torch.nn.Module:
    """A small Llama with random weights and two adapters, of which no two give the same result."""
    config = LlamaConfig(
        vocab_size=128, num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with device:
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora, adapter_name=ADAPTERS[0])
        model.add_adapter(ADAPTERS[1], lora)
    return model.to(device).eval()


@torch.no_grad()
def main() -> int:
    """Call with both adapters in turns, eagerly and compiled; 0 if all results are the same bits, and most were replayed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    model = build(device)
    tokens = torch.randint(128, (1, 8), device=device)
    want = {}
    for adapter in ADAPTERS:
        model.set_adapter(adapter)
        want[adapter] = model(input_ids=tokens, use_cache=False).logits
    if torch.equal(*want.values()):
        return 1

    compiled = torch.compile(model, backend="breakable_cg", options=options)
    for _ in range(4):
        for adapter in ADAPTERS:
            model.set_adapter(adapter)
            if not torch.equal(compiled(input_ids=tokens, use_cache=False).logits, want[adapter]):
                print(f"{adapter}: other bits than eager's")
                return 1
    report = explain(compiled)
    print(report)
    replays = sum(program.replays for program in report.programs)
    print(f"\n{len(report.programs)} programs for {len(ADAPTERS)} adapters, {replays} replays; same bits as eager")
    return 0 if replays >= 2 * len(ADAPTERS) else 1


if __name__ == "__main__":
    sys.exit(main())
