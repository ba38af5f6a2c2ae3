"""Architectures from transformers, timm, torchvision and diffusers, with random weights: ``zoo.py`` runs them all.

Their configurations are small, and otherwise such as are used: no width and no part is left out that has code of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Any]]
"""Makes the arguments of a call: random ones, on the host."""


@dataclass(frozen=True)
class Entry:
    """One architecture."""

    name: str
    source: str
    """The library that it is from."""
    kind: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:
        return f"{self.source}/{self.name}"


zoo: dict[str, Entry] = {}
"""All entries, by ``source/name``."""


def add(entry: Entry) -> None:
    assert entry.key not in zoo
    zoo[entry.key] = entry


# --- inputs -----------------------------------------------------------------------------------------------------------


def ids(*shape: int, below: int = 512) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, below, shape)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def lengths(batch: int, length: int) -> Callable[[], Tensor]:
    """A mask of texts that are not all of one length."""
    return lambda: (torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1))).long()


def ones(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(shape, dtype=torch.int64)


def always(value: Any) -> Callable[[], Any]:
    return lambda: value


def each(**makers: Callable[[], Any]) -> Inputs:
    return lambda: {name: maker() for name, maker in makers.items()}


class By(nn.Module):
    """A model whose first arguments are given by position, as ``args``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...]) -> Any:
        return self.model(*args)


# --- transformers -----------------------------------------------------------------------------------------------------

WIDTHS: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}


def transformers(
    name: str, kind: str, model: str, inputs: Inputs, dtype: torch.dtype = torch.float32, **config: Any
) -> None:
    """A class of transformers, with a configuration of its own class."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        found = getattr(library, model)
        implementations = {
            key: config[key] for key in ("attn_implementation", "experts_implementation") if key in config
        }
        widths = {key: value for key, value in config.items() if key not in implementations and value is not LEFT_OUT}
        made = found._from_config(found.config_class(**widths), **implementations)
        assert isinstance(made, nn.Module)
        return made

    add(Entry(name, "transformers", kind, make, inputs, dtype))


LEFT_OUT = object()
"""In place of a setting that a configuration is to choose."""

TEXT = each(input_ids=ids(2, 64), use_cache=always(False))
MASKED = each(input_ids=ids(2, 64), attention_mask=lengths(2, 64))


def decoder(name: str, model: str, kind: str = "decoder", inputs: Inputs = TEXT, **config: Any) -> None:
    transformers(name, kind, model, inputs, **{**WIDTHS, **config})


def encoder(name: str, model: str, inputs: Inputs = MASKED, **config: Any) -> None:
    transformers(name, "encoder", model, inputs, **{**WIDTHS, **config})


def mixture(name: str, model: str, **config: Any) -> None:
    decoder(name, model, "mixture of experts", **{"dtype": torch.bfloat16, **config})


def vision(name: str, model: str, kind: str = "vision", size: int = 64, **config: Any) -> None:
    transformers(name, kind, model, each(pixel_values=floats(2, 3, size, size)), **config)


GROUPED = {"num_key_value_heads": 2}

decoder("llama", "LlamaForCausalLM", **GROUPED)
decoder("mistral", "MistralForCausalLM", **GROUPED, sliding_window=32)
decoder("qwen3", "Qwen3ForCausalLM", **GROUPED, head_dim=32)
decoder("gemma2", "Gemma2ForCausalLM", **GROUPED, head_dim=32, sliding_window=32)
decoder("gemma3", "Gemma3ForCausalLM", **GROUPED, head_dim=32, sliding_window=32, layer_types=LEFT_OUT)
decoder("phi3", "Phi3ForCausalLM", **GROUPED)
decoder("gpt2", "GPT2LMHeadModel")
decoder("gpt-neox", "GPTNeoXForCausalLM")
decoder("gpt-j", "GPTJForCausalLM", n_embd=128, n_layer=4, n_head=4, rotary_dim=16, n_positions=256)
decoder("opt", "OPTForCausalLM", ffn_dim=256, word_embed_proj_dim=128)
decoder("bloom", "BloomForCausalLM")
decoder("falcon", "FalconForCausalLM")
decoder("mpt", "MptForCausalLM", d_model=128, n_heads=4, n_layers=4, max_seq_len=256)
decoder("olmo2", "Olmo2ForCausalLM", **GROUPED)
decoder("cohere", "CohereForCausalLM", **GROUPED)
decoder("starcoder2", "Starcoder2ForCausalLM", **GROUPED)
decoder("glm", "GlmForCausalLM", **GROUPED, head_dim=32)

mixture("mixtral", "MixtralForCausalLM", **GROUPED)
mixture("mixtral, experts in Python", "MixtralForCausalLM", **GROUPED, experts_implementation="eager")
mixture("mixtral, batched experts", "MixtralForCausalLM", **GROUPED, experts_implementation="batched_mm")
mixture("mixtral in float32", "MixtralForCausalLM", **GROUPED, dtype=torch.float32)
mixture(
    "qwen3-moe",
    "Qwen3MoeForCausalLM",
    **GROUPED,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)
mixture("olmoe", "OlmoeForCausalLM", num_experts=8, num_experts_per_tok=2)
mixture(
    "gpt-oss",
    "GptOssForCausalLM",
    **GROUPED,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=32,
)
mixture(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    num_key_value_heads=4,
    moe_intermediate_size=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=32,
    first_k_dense_replace=1,
)

STATES = "state space"
decoder("mamba", "MambaForCausalLM", STATES, state_size=16, num_attention_heads=LEFT_OUT)
decoder(
    "mamba2",
    "Mamba2ForCausalLM",
    STATES,
    state_size=16,
    num_heads=8,
    head_dim=32,
    n_groups=1,
    chunk_size=32,
    num_attention_heads=LEFT_OUT,
)
decoder("falcon-mamba", "FalconMambaForCausalLM", STATES, state_size=16, num_attention_heads=LEFT_OUT)
decoder("recurrent-gemma", "RecurrentGemmaForCausalLM", STATES, **GROUPED, lru_width=128, attention_window_size=32)
decoder("rwkv", "RwkvForCausalLM", STATES, attention_hidden_size=128, context_length=256)
decoder(
    "jamba",
    "JambaForCausalLM",
    STATES,
    **GROUPED,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    num_experts=4,
    use_mamba_kernels=False,
    dtype=torch.bfloat16,
)

encoder("bert", "BertForMaskedLM")
encoder("roberta", "RobertaForMaskedLM")
encoder("distilbert", "DistilBertForMaskedLM", dim=128, hidden_dim=256, n_layers=4, n_heads=4)
encoder("electra", "ElectraForPreTraining", embedding_size=128)
encoder("albert", "AlbertForMaskedLM", embedding_size=64)
encoder("deberta-v2", "DebertaV2ForMaskedLM", relative_attention=True, position_buckets=32, pos_att_type=["p2c", "c2p"])
encoder("modernbert", "ModernBertForMaskedLM", local_attention=32, cls_token_id=1, sep_token_id=2)
encoder("mpnet", "MPNetForMaskedLM")
encoder("longformer", "LongformerForMaskedLM", attention_window=16)
encoder(
    "big-bird", "BigBirdForMaskedLM", block_size=16, inputs=each(input_ids=ids(2, 192), attention_mask=lengths(2, 192))
)
encoder("fnet", "FNetForMaskedLM", inputs=each(input_ids=ids(2, 64)))

BOTH = each(input_ids=ids(2, 48), attention_mask=lengths(2, 48), decoder_input_ids=ids(2, 24), use_cache=always(False))
PAIR = {
    "encoder_layers": 3,
    "decoder_layers": 3,
    "d_model": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
}
transformers(
    "t5",
    "encoder and decoder",
    "T5ForConditionalGeneration",
    BOTH,
    vocab_size=512,
    d_model=128,
    d_ff=256,
    d_kv=32,
    num_layers=3,
    num_heads=4,
    decoder_start_token_id=0,
)
transformers(
    "bart",
    "encoder and decoder",
    "BartForConditionalGeneration",
    BOTH,
    **PAIR,
    vocab_size=512,
    max_position_embeddings=128,
)

SPEECH = "speech"
transformers(
    "whisper",
    SPEECH,
    "WhisperForConditionalGeneration",
    each(input_features=floats(2, 80, 100), decoder_input_ids=ids(2, 24), use_cache=always(False)),
    **PAIR,
    vocab_size=512,
    max_source_positions=50,
    max_target_positions=64,
    num_mel_bins=80,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
WAVE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [64] * 7,
    "vocab_size": 64,
}
transformers("wav2vec2", SPEECH, "Wav2Vec2ForCTC", each(input_values=floats(2, 8000)), **WAVE)
transformers("hubert", SPEECH, "HubertForCTC", each(input_values=floats(2, 8000)), **WAVE)
transformers("wavlm", SPEECH, "WavLMForCTC", each(input_values=floats(2, 8000)), **WAVE)
transformers(
    "moonshine",
    SPEECH,
    "MoonshineForConditionalGeneration",
    each(input_values=floats(2, 16000), decoder_input_ids=ids(2, 16), use_cache=always(False)),
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    encoder_num_hidden_layers=3,
    decoder_num_hidden_layers=3,
    encoder_num_attention_heads=4,
    decoder_num_attention_heads=4,
    encoder_num_key_value_heads=4,
    decoder_num_key_value_heads=4,
    pad_token_id=0,
)
transformers(
    "vits",
    SPEECH,
    "VitsModel",
    each(input_ids=ids(2, 24, below=38), attention_mask=ones(2, 24)),
    hidden_size=64,
    ffn_dim=128,
    num_hidden_layers=2,
    flow_size=64,
    spectrogram_bins=129,
    upsample_initial_channel=64,
)
transformers(
    "encodec",
    "audio",
    "EncodecModel",
    each(input_values=floats(2, 1, 8000)),
    num_filters=8,
    hidden_size=32,
    codebook_dim=32,
    codebook_size=64,
)
transformers(
    "ast",
    "audio",
    "ASTForAudioClassification",
    each(input_values=floats(2, 128, 64)),
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_length=128,
    num_mel_bins=64,
)

vision("vit", "ViTForImageClassification", **VISION)
vision(
    "swin",
    "SwinForImageClassification",
    image_size=64,
    patch_size=4,
    embed_dim=32,
    depths=[2, 2, 2],
    num_heads=[2, 4, 8],
    window_size=4,
)
vision(
    "dinov2",
    "Dinov2ForImageClassification",
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
)
vision(
    "segformer", "SegformerForSemanticSegmentation", "segmentation", depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 96]
)
vision(
    "dpt",
    "DPTForDepthEstimation",
    "depth",
    **VISION,
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[16, 32, 64, 64],
    fusion_hidden_size=32,
)
vision("yolos", "YolosForObjectDetection", "detection", **{**VISION, "image_size": [64, 64]})
vision(
    "vit-mae",
    "ViTMAEForPreTraining",
    **VISION,
    decoder_hidden_size=64,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=128,
)
transformers(
    "clip",
    "vision and text",
    "CLIPModel",
    each(input_ids=ids(2, 32), attention_mask=lengths(2, 32), pixel_values=floats(2, 3, 64, 64)),
    text_config=dict(WIDTHS),
    vision_config=dict(VISION),
    projection_dim=64,
)
transformers(
    "siglip",
    "vision and text",
    "SiglipModel",
    each(input_ids=ids(2, 64), pixel_values=floats(2, 3, 64, 64)),
    text_config=dict(WIDTHS),
    vision_config=dict(VISION),
)
transformers(
    "patch-tst",
    "time series",
    "PatchTSTForPrediction",
    each(past_values=floats(4, 64, 3)),
    num_input_channels=3,
    context_length=64,
    patch_length=8,
    patch_stride=8,
    d_model=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=128,
)

# --- timm -------------------------------------------------------------------------------------------------------------


def timm(model: str, kind: str = "vision", size: int = 0, **settings: Any) -> None:
    """A model of timm by its name; at its own size of images unless another is said."""

    def make() -> nn.Module:
        library = importlib.import_module("timm")
        more = {"img_size": size, **settings} if size and settings.pop("resizes", False) else settings
        made = library.create_model(model, pretrained=False, **more)
        assert isinstance(made, nn.Module)
        return made

    size = size or 224
    add(Entry(model, "timm", kind, make, each(x=floats(2, 3, size, size))))


for name in (
    "resnet18 efficientnet_b0 mobilenetv3_small_100 convnext_atto regnety_002 densenet121 ghostnet_100 dla34 "
    "repvgg_a0 mobilevit_xxs edgenext_xx_small poolformer_s12 fastvit_t8 efficientvit_b0 tf_mixnet_s hgnetv2_b0"
).split():
    timm(name, size=128)
for name in (
    "vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 levit_128s mixer_s32_224 coat_lite_tiny "
    "xcit_nano_12_p16_224 eva02_tiny_patch14_224 beit_base_patch16_224 maxvit_rmlp_pico_rw_256 hiera_tiny_224 "
    "gmlp_s16_224 resmlp_12_224 nf_resnet50 twins_svt_small cait_xxs24_224 pvt_v2_b0 efficientformer_l1"
).split():
    timm(name, size=256 if name.endswith("256") else 224)

# --- torchvision ------------------------------------------------------------------------------------------------------


def torchvision(model: str, kind: str = "vision", inputs: Inputs | None = None, **settings: Any) -> None:
    """A model of torchvision by its name."""

    def make() -> nn.Module:
        library = importlib.import_module("torchvision")
        made = library.models.get_model(model, weights=None, **settings)
        assert isinstance(made, nn.Module)
        return made

    add(Entry(model, "torchvision", kind, make, inputs or each(x=floats(2, 3, 128, 128))))


for name in (
    "resnet18 mobilenet_v2 shufflenet_v2_x0_5 squeezenet1_1 googlenet densenet121 efficientnet_v2_s convnext_tiny swin_v2_t regnet_x_400mf "
    "mnasnet0_5 vgg11"
).split():
    torchvision(name, **({"init_weights": False} if name == "googlenet" else {}))
torchvision("inception_v3", inputs=each(x=floats(2, 3, 299, 299)), init_weights=False)
torchvision("vit_b_32", image_size=128)
torchvision("maxvit_t", inputs=each(x=floats(1, 3, 224, 224)))
for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50"):
    first = "input" if name.startswith("lraspp") else "x"
    torchvision(name, "segmentation", each(**{first: floats(2, 3, 96, 96)}), weights_backbone=None)
IMAGES = each(images=lambda: [torch.rand(3, 160, 192), torch.rand(3, 176, 160)])
for name, settings in {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"num_classes": 21},
    "maskrcnn_resnet50_fpn": {"num_classes": 21, "min_size": 160, "max_size": 256, "box_detections_per_img": 4},
    "retinanet_resnet50_fpn": {"min_size": 160, "max_size": 256, "score_thresh": 0.0},
    "fcos_resnet50_fpn": {"min_size": 160, "max_size": 256, "score_thresh": 0.0},
    "ssdlite320_mobilenet_v3_large": {"num_classes": 21, "topk_candidates": 40},
}.items():
    torchvision(name, "detection", IMAGES, weights_backbone=None, **settings)
for name in ("r3d_18", "mvit_v1_b", "s3d", "swin3d_t"):
    side = 224 if name in ("mvit_v1_b", "s3d") else 64
    torchvision(name, "video", each(x=floats(1, 3, 16, side, side)))
torchvision(
    "raft_small",
    "optical flow",
    each(image1=floats(1, 3, 128, 128), image2=floats(1, 3, 128, 128), num_flow_updates=always(4)),
)

# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers(name: str, model: str, inputs: Inputs, kind: str = "diffusion", **config: Any) -> None:
    """A class of diffusers."""

    def make() -> nn.Module:
        library = importlib.import_module("diffusers")
        made = getattr(library, model)(**config)
        assert isinstance(made, nn.Module)
        return made

    add(Entry(name, "diffusers", kind, make, inputs))


def times(batch: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 1000, (batch,))


TUPLE = always(False)
BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
diffusers(
    "unet, unconditional",
    "UNet2DModel",
    each(sample=floats(2, 3, 32, 32), timestep=times(2), return_dict=TUPLE),
    **BLOCKS,
    sample_size=32,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=8,
)
diffusers(
    "unet of Stable Diffusion",
    "UNet2DConditionModel",
    each(sample=floats(2, 4, 32, 32), timestep=times(2), encoder_hidden_states=floats(2, 16, 64), return_dict=TUPLE),
    **BLOCKS,
    sample_size=32,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
    attention_head_dim=8,
)
diffusers(
    "unet of audio",
    "UNet1DModel",
    each(sample=floats(2, 14, 64), timestep=times(2), return_dict=TUPLE),
    sample_size=64,
    in_channels=14,
    out_channels=14,
    extra_in_channels=0,
    time_embedding_type="positional",
    use_timestep_embedding=True,
    flip_sin_to_cos=False,
    freq_shift=1.0,
    out_block_type="OutConv1DBlock",
    mid_block_type="MidResTemporalBlock1D",
    down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
    up_block_types=("UpResnetBlock1D",),
    act_fn="swish",
    block_out_channels=(32, 64),
    layers_per_block=1,
    downsample_each_block=False,
)
diffusers(
    "vae",
    "AutoencoderKL",
    each(sample=floats(2, 3, 32, 32), return_dict=TUPLE),
    "autoencoder",
    **BLOCKS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
diffusers(
    "tiny vae",
    "AutoencoderTiny",
    each(sample=floats(2, 3, 64, 64), return_dict=TUPLE),
    "autoencoder",
    encoder_block_out_channels=(32, 32),
    decoder_block_out_channels=(32, 32),
    num_encoder_blocks=(1, 2),
    num_decoder_blocks=(2, 1),
)
diffusers(
    "vq",
    "VQModel",
    each(sample=floats(2, 3, 32, 32), return_dict=TUPLE),
    "autoencoder",
    **BLOCKS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    num_vq_embeddings=64,
    latent_channels=3,
)
diffusers(
    "dit",
    "DiTTransformer2DModel",
    each(
        hidden_states=floats(2, 4, 16, 16),
        timestep=times(2),
        class_labels=lambda: torch.randint(0, 1000, (2,)),
        return_dict=TUPLE,
    ),
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=3,
    sample_size=16,
    patch_size=2,
)
diffusers(
    "pixart",
    "PixArtTransformer2DModel",
    each(
        hidden_states=floats(2, 4, 16, 16),
        timestep=times(2),
        encoder_hidden_states=floats(2, 8, 64),
        added_cond_kwargs=always({"resolution": None, "aspect_ratio": None}),
        return_dict=TUPLE,
    ),
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    sample_size=16,
    cross_attention_dim=64,
    caption_channels=64,
    use_additional_conditions=False,
)
diffusers(
    "sd3",
    "SD3Transformer2DModel",
    each(
        hidden_states=floats(2, 4, 16, 16),
        encoder_hidden_states=floats(2, 12, 64),
        pooled_projections=floats(2, 64),
        timestep=times(2),
        return_dict=TUPLE,
    ),
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=64,
    caption_projection_dim=64,
    pooled_projection_dim=64,
    pos_embed_max_size=32,
)


def flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.rand(2),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0)),
        "txt_ids": torch.zeros(12, 3),
        "return_dict": False,
    }


diffusers(
    "flux",
    "FluxTransformer2DModel",
    flux,
    patch_size=1,
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    axes_dims_rope=(4, 6, 6),
)
diffusers(
    "sana",
    "SanaTransformer2DModel",
    each(
        hidden_states=floats(2, 4, 16, 16), encoder_hidden_states=floats(2, 8, 64), timestep=times(2), return_dict=TUPLE
    ),
    in_channels=4,
    out_channels=4,
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=16,
    num_cross_attention_heads=4,
    cross_attention_head_dim=16,
    cross_attention_dim=64,
    caption_channels=64,
    sample_size=16,
    patch_size=1,
)
diffusers(
    "aura-flow",
    "AuraFlowTransformer2DModel",
    each(
        hidden_states=floats(2, 4, 16, 16),
        encoder_hidden_states=floats(2, 12, 64),
        timestep=lambda: torch.rand(2),
        return_dict=TUPLE,
    ),
    sample_size=16,
    patch_size=2,
    in_channels=4,
    num_mmdit_layers=2,
    num_single_dit_layers=2,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=64,
    caption_projection_dim=64,
    pos_embed_max_size=64,
)
diffusers(
    "wan",
    "WanTransformer3DModel",
    each(
        hidden_states=floats(1, 16, 2, 16, 16),
        timestep=times(1),
        encoder_hidden_states=floats(1, 12, 32),
        return_dict=TUPLE,
    ),
    "video diffusion",
    patch_size=(1, 2, 2),
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=64,
    ffn_dim=128,
    num_layers=3,
)
diffusers(
    "cogvideox",
    "CogVideoXTransformer3DModel",
    each(
        hidden_states=floats(1, 2, 4, 16, 16),
        encoder_hidden_states=floats(1, 8, 32),
        timestep=times(1),
        return_dict=TUPLE,
    ),
    "video diffusion",
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=32,
    text_embed_dim=32,
    num_layers=3,
    sample_width=16,
    sample_height=16,
    sample_frames=5,
    patch_size=2,
    temporal_compression_ratio=4,
    max_text_seq_length=8,
)
diffusers(
    "ltx-video",
    "LTXVideoTransformer3DModel",
    each(
        hidden_states=floats(1, 32, 16),
        encoder_hidden_states=floats(1, 8, 64),
        timestep=times(1),
        encoder_attention_mask=ones(1, 8),
        num_frames=always(2),
        height=always(4),
        width=always(4),
        return_dict=TUPLE,
    ),
    "video diffusion",
    in_channels=16,
    out_channels=16,
    num_attention_heads=4,
    attention_head_dim=16,
    cross_attention_dim=64,
    num_layers=3,
    caption_channels=64,
)
diffusers(
    "stable-audio",
    "StableAudioDiTModel",
    each(
        hidden_states=floats(2, 16, 32),
        timestep=times(2),
        encoder_hidden_states=floats(2, 8, 32),
        global_hidden_states=floats(2, 1, 64),
        return_dict=TUPLE,
    ),
    "audio diffusion",
    sample_size=32,
    in_channels=16,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    num_key_value_attention_heads=2,
    out_channels=16,
    cross_attention_dim=32,
    time_proj_dim=32,
    global_states_input_dim=64,
    cross_attention_input_dim=32,
)
diffusers(
    "prior",
    "PriorTransformer",
    each(
        hidden_states=floats(2, 64),
        timestep=times(2),
        proj_embedding=floats(2, 64),
        encoder_hidden_states=floats(2, 16, 64),
        return_dict=TUPLE,
    ),
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    embedding_dim=64,
    num_embeddings=16,
    additional_embeddings=4,
)
diffusers(
    "controlnet",
    "ControlNetModel",
    each(
        sample=floats(2, 4, 32, 32),
        timestep=times(2),
        encoder_hidden_states=floats(2, 16, 64),
        controlnet_cond=floats(2, 3, 64, 64),
        return_dict=TUPLE,
    ),
    **BLOCKS,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    cross_attention_dim=64,
    attention_head_dim=8,
    conditioning_embedding_out_channels=(16, 32),
)
