"""What was expected, to compare with what is measured. For one H100 (SXM, 989 TFLOP/s in bf16), FLUX.1-dev at 1024 px.

From an audit of the code by reading and arithmetic, made before any GPU had run (2026-11, commit a9a4819; the speeds of
cuDNN attention in it are others' measurements). Worked out here from its numbers: times of the VAE and of the trunk, and
attention's backward (the audit counts 2.5 times the forward's FLOPs, we count 2). Memory is predicted by a formula of the
code, and the step itself records that prediction; the formula was corrected after measurements on an H200.
"""

from __future__ import annotations

PREDICTED: dict[str, dict[str, float | str | bool]] = {
    "machine": {"copy, read and written": 3000.0, "product 8192x8192x8192, bf16": 700.0},
    "attention": {
        "chosen at S = 4580": "cudnn",
        "chosen at S = 2240": "cudnn",
        "cudnn at S = 4580, forward": 609.0,
        "cudnn at S = 4580, backward": 399.0,  # 499 by 2.5 times
    },
    "blocks": {
        "limit: matrix products and attention": 275.0,
        "ours-none": 318.0,
        "diffusers-eager": 399.0,
        "diffusers-eager-full": 565.0,
        "ours-none: MFU": 0.53,
        "diffusers-eager: MFU": 0.42,
        "diffusers-eager over ours-none": 1.35,
        "diffusers-eager-full over ours-mlp": 1.8,
        "share of the limit, ours-none": 0.92,
    },
    "compiled": {
        "diffusers-compile": 325.0,
        "diffusers-compile: MFU": 0.52,
        "diffusers-compile over ours-none": 1.06,
        "diffusers-compile-full over ours-mlp": 1.4,
    },
    "ops": {
        "qk_norm_rope image + text: share forward": 0.87,
        "qk_norm_rope image + text: share backward": 0.77,
        "modulate image: share forward": 0.75,
        "modulate image: share backward": 0.62,
        "gate_residual image: share backward": 0.70,
        "gelu_concat joint: share forward": 0.82,
        "biased_attention joint over attention without a bias: forward": 0.63,
        "biased_attention joint over attention without a bias: backward": 0.45,
    },
    "networks": {  # forward of 9.4 TFLOP a picture for the trunk, 4.9 for the VAE, at 45% of 989 TFLOP/s
        "trunk at 2": 42.0,
        "trunk at 8": 169.0,
        "VAE encode at 1": 11.0,
        "VAE encode at 2": 22.0,
        "VAE encode at 8": 88.0,
        "trunk: forced waits": 0,
    },
    "loop": {"memory before the first engine": 39.5},
    "continued": {"two continuations are bit-equal": False},
}


def of(step: str, fact: str) -> float | str | bool | None:
    """The prediction of a fact of FLUX.1-dev's sizes, or None."""
    return PREDICTED.get(step, {}).get(fact)
