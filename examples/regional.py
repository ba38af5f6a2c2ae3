"""Regional compilation of a diffusion transformer: each kind of block is compiled once, and all blocks run captured.

diffusers' ``compile_repeated_blocks`` compiles the blocks that a model repeats, instead of the whole model: compiling takes
seconds where the whole takes minutes. The weights are random. It needs ``pip install diffusers``.
"""

from __future__ import annotations

import sys

import torch
from diffusers import FluxTransformer2DModel

from breakable_backend import explain

STEPS = 6


def build(device: torch.device) -> FluxTransformer2DModel:
    """A small Flux: two blocks with two streams of tokens, and four with one."""
    with device:
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    return model.eval()


@torch.no_grad()
def main() -> int:
    """Denoise with the model before and after its blocks are compiled; 0 if both give the same bits."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    options = {} if device.type == "cuda" else {"driver": "tape"}
    model = build(device)
    latents, text = torch.randn(1, 16, 4, device=device), torch.randn(1, 8, 32, device=device)
    fixed = dict(
        encoder_hidden_states=text,
        pooled_projections=torch.randn(1, 32, device=device),
        img_ids=torch.zeros(16, 3, device=device),
        txt_ids=torch.zeros(8, 3, device=device),
        return_dict=False,
    )

    def denoise() -> torch.Tensor:
        x = latents
        for step in range(STEPS):
            when = torch.full((1,), 1 - step / STEPS, device=device)
            x = x - model(hidden_states=x, timestep=when, **fixed)[0] / STEPS
        return x

    want = denoise()
    model.compile_repeated_blocks(backend="breakable_cg", fullgraph=True, options=options)
    same = all(torch.equal(denoise(), want) for _ in range(2))
    report = explain(model)
    print(report)
    replays = sum(program.replays for program in report.programs)
    print(
        f"\n{len(report.programs)} programs for {2 + 4} blocks; results are {'the same bits' if same else 'different'}"
    )
    return 0 if same and replays >= 50 else 1


if __name__ == "__main__":
    sys.exit(main())
