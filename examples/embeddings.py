"""Sentence embeddings: texts have all lengths, and graphs have one each. What replays, what does not, and why.

Three ways to call the same encoder. As it comes, Dynamo compiles once with a symbolic length, and each length is recorded
for itself: few calls replay at first. Padded to a multiple of 16 there are few lengths, and nearly all calls replay.
"""

from __future__ import annotations

import random
import sys

import torch
from transformers import AutoModel, BertConfig

from breakable_backend import explain, reset

CALLS, LONGEST, STEP = 60, 96, 16


def build(device: torch.device) -> torch.nn.Module:
    """A small encoder with random weights."""
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    with device:
        return AutoModel.from_config(config, attn_implementation="sdpa").eval()


def texts(device: torch.device) -> list[torch.Tensor]:
    """Texts of random lengths, as tokens of shape (1, length)."""
    lengths = random.Random(0)
    return [torch.randint(1, 512, (1, lengths.randrange(8, LONGEST + 1)), device=device) for _ in range(CALLS)]


def padded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens`` up to the next multiple of :data:`STEP`, and the mask that says which are real."""
    missing = -tokens.shape[1] % STEP
    mask = torch.ones_like(tokens)
    return tuple(torch.nn.functional.pad(tensor, (0, missing)) for tensor in (tokens, mask))  # type: ignore[return-value]


@torch.no_grad()
def main() -> int:
    """Encode all texts both ways, and say how many calls replayed; 0 if all is as the docstring says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    model = build(device)

    def embed(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)

    shares = {}
    for way in ("as they come", f"padded to multiples of {STEP}"):
        compiled = torch.compile(embed, backend="breakable_cg", dynamic=True, options=options)
        for tokens in texts(device):
            arguments = (tokens, torch.ones_like(tokens)) if way == "as they come" else padded(tokens)
            if not torch.equal(compiled(*arguments), embed(*arguments)):
                print(f"{way}: other bits than eager's")
                return 1
        report = explain(compiled)
        replays = sum(program.replays for program in report.programs)
        shares[way] = replays / CALLS
        print(f"{way}: {replays} of {CALLS} calls replayed, {sum(len(p.recordings) for p in report.programs)} lengths")
        reset(compiled)
    as_they_come, few_lengths = shares.values()
    return 0 if few_lengths > 0.7 > as_they_come else 1


if __name__ == "__main__":
    sys.exit(main())
