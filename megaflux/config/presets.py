"""Presets: tables of values and no logic. `dev` is the published recipe, `tiny` the same recipe at a small size.

Sources: the write-up of Qwen2VL-Flux (2024-11) and the released code `erwold/qwen2vl-flux` for the stages and the
recipe; the published `config.json` files of black-forest-labs/FLUX.1-dev and Qwen/Qwen2-VL-7B-Instruct for the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Index over the 57 blocks of FLUX.1-dev: 0..18 double, 19..56 single. Blocks 16 and 56 train in stages 1 and 2;
# twelve blocks (10, 13, 17, 20, 22, 27, 31, 35, 38, 43, 47, 51) never train.
PUBLISHED_STAGES: dict[str, list[int]] = {
    "stage1": [1, 4, 7, 12, 16, 19, 24, 28, 32, 37, 40, 44, 48, 52, 56],
    "stage2": [0, 3, 6, 9, 14, 16, 21, 26, 30, 34, 39, 42, 46, 50, 54, 56],
    "stage3": [2, 5, 8, 11, 15, 18, 23, 25, 29, 33, 36, 41, 45, 49, 53, 55],
}


# config.json of black-forest-labs/FLUX.1-dev, vae/
FLUX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def dev() -> dict[str, Any]:
    """FLUX.1-dev + Qwen2-VL-7B on 8 GPUs of 80 GB: the published recipe.

    Chosen here because they were not published: how the updates are divided among the stages (a third each), the length of
    the warm-up and the density of t. The guidance value of training is the schema's default.
    """
    return {
        "preset": "dev",
        "run": {"dir": "runs/dev"},
        "model": {
            "flux": "black-forest-labs/FLUX.1-dev",
            "vlm": "Qwen/Qwen2-VL-7B-Instruct",
            "flux_config": {
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
                "guidance_embeds": True,
                "axes_dims_rope": [16, 56, 56],
            },
            "vlm_config": {
                "text_config": {
                    "vocab_size": 152064,
                    "hidden_size": 3584,
                    "intermediate_size": 18944,
                    "num_hidden_layers": 28,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "rms_norm_eps": 1e-6,
                    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
                },
                "vision_config": {
                    "depth": 32,
                    "embed_dim": 1280,
                    "hidden_size": 3584,
                    "num_heads": 16,
                    "mlp_ratio": 4,
                    "patch_size": 14,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
            },
            "clip_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "projection_dim": 768,
            },
            "latent_channels": 16,
        },
        "data": {"path": "data/train", "longest_side": 1024, "num_workers": 8},
        "stages": [
            {"name": name, "share": 1.0, "blocks": blocks, "components": "attention"}
            for name, blocks in PUBLISHED_STAGES.items()
        ],
        "train": {
            "updates": 100_000,
            "global_batch_size": 128,
            "drawn_per_rank": 8,
            "micro_batch_size": "auto",
            "checkpoint_every": 125,  # at most half an hour at 45% MFU on 8 A100
        },
        "optim": {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.1, "warmup_fraction": 0.01},
        "validation": {"every": 1000, "panel_every": 5000},
    }


def tiny() -> dict[str, Any]:
    """The same model classes with a few million parameters, trained on OpenMoji's pictures on a laptop's CPU.

    Nothing is downloaded: the weights of the VAE and Qwen2-VL are shipped, all others are built from the run's seed. As this FLUX is
    no pretrained one (`model.init: tiny` with `model.vae: tiny-icons` is), a stage `base` first trains all of it. Like the published lists, the stages share a
    block (3) and leave one out (4).
    """
    width = 128
    return {
        "preset": "tiny",
        "run": {"dir": "runs/tiny"},
        "model": {
            "vlm": "tiny",
            "vae": "tiny",
            "flux_config": {
                "patch_size": 1,
                "in_channels": 32,
                "num_layers": 2,
                "num_single_layers": 4,
                "attention_head_dim": 32,
                "num_attention_heads": width // 32,
                "joint_attention_dim": 160,
                "pooled_projection_dim": 32,
                "guidance_embeds": True,
                "axes_dims_rope": [8, 12, 12],
            },
            "vlm_config": {
                # The sizes of the shipped weights. Those began as random ones (which `vlm: null` still draws), and a random trunk
                # must tell the trainable layer what a token shows and where it is. These values were chosen with linear
                # probes on its 5 x 5 tokens of a picture: the colours of its cell are read with R2 0.9, its position among
                # the 25 cells is right in 94%, and 30% of the features' power differs between pictures. With Qwen2-VL-7B's
                # theta and no biases the position is right in 25% only: over so few tokens the row and column angles
                # hardly change. docs/tiny-assets.md has the same probes of the trained weights.
                "qk_bias_std": 3.0,
                "text_config": {
                    "hidden_size": 192,
                    "intermediate_size": 384,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 6,
                    "num_key_value_heads": 3,
                    "rms_norm_eps": 1e-6,
                    "rope_theta": 3.0,
                    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
                    "initializer_range": 0.04,
                },
                "vision_config": {
                    "depth": 2,
                    "embed_dim": 128,
                    "hidden_size": 192,
                    "num_heads": 4,
                    "mlp_ratio": 2,
                    "patch_size": 14,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                    "initializer_range": 0.04,
                },
            },
            "clip_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "projection_dim": 32,
            },
            "latent_channels": 8,
            "activation_checkpointing": "none",
            "vlm_max_tokens": 64,
        },
        "data": {"path": "data/openmoji", "source": "openmoji", "longest_side": 128, "cache": ["latents", "trunk"]},
        "stages": [
            {"name": "base", "share": 0.52, "blocks": "all", "components": "model"},
            {"name": "stage1", "share": 0.16, "blocks": [0, 3]},
            {"name": "stage2", "share": 0.16, "blocks": [1, 3]},
            {"name": "stage3", "share": 0.16, "blocks": [2, 5]},
        ],
        "train": {"updates": 1150, "global_batch_size": 32, "micro_batch_size": None, "checkpoint_every": 300},
        "optim": {"lr": 2e-3, "weight_decay": 0.1, "warmup_fraction": 0.03, "plateau_fraction": 0.5},
        "flow": {"density": "uniform", "shift": 3.0},  # towards noise, where the reference matters most
        "validation": {"every": 250, "panel_every": 0, "panel_samples": 8},
    }


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {"tiny": tiny, "dev": dev}
