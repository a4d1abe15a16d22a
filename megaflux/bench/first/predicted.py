"""What was expected before any GPU had run, to stand beside what is measured.

For one H100 (SXM, 989 TFLOP/s in bf16) and FLUX.1-dev at 1024 x 1024 px. Sources: an audit of the code by reading and
arithmetic (2026-11, commit a9a4819), and speeds of cuDNN attention that others have published. What a formula of the
code predicts (memory), the step itself puts beside its fact.
"""

from __future__ import annotations

PREDICTED: dict[str, dict[str, float | str | bool]] = {
    "machine": {
        "copy, read and written": 3000.0,
        "product 8192x8192x8192, bf16": 700.0,
    },
    "attention": {
        "chosen at S = 4580": "cudnn",
        "chosen at S = 2240": "cudnn",
        "cudnn at S = 4580, forward": 609.0,
        "cudnn at S = 4580, backward": 499.0,
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
    },
    "ops": {  # shares of a large copy's bytes per second, where 3.0 TB/s are such
        "qk_norm_rope image + text: share forward": 0.87,
        "qk_norm_rope image + text: share with backward": 0.80,
        "modulate image: share forward": 0.75,
        "modulate image: share with backward": 0.68,
        "gate_residual image: share with backward": 0.70,
        "gelu_concat joint: share forward": 0.82,
    },
    "networks": {  # forward of 9.4 TFLOP a picture for the trunk, 4.9 for the VAE, at 45% of 989 TFLOP/s
        "trunk at 2": 42.0,
        "trunk at 8": 169.0,
        "VAE encode at 1": 11.0,
        "VAE encode at 2": 22.0,
        "VAE encode at 8": 88.0,
        "trunk: forced waits": 0,
    },
    "continued": {
        "two continuations are bit-equal": False,
    },
}


def of(step: str, fact: str) -> float | str | bool | None:
    """The prediction of a fact of FLUX.1-dev's sizes, or None."""
    return PREDICTED.get(step, {}).get(fact)
