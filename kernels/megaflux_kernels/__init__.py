"""Fused ops for FLUX conditioned by Qwen2-VL: Triton on a GPU, the same arithmetic in plain torch elsewhere.

One folder per op: the public function in __init__.py, reference.py (definition and torch path) and triton_kernels.py.
Imports nothing of megaflux. See megaflux_kernels.dispatch for MEGAFLUX_KERNELS.
"""

from megaflux_kernels.allocator import expand_segments

expand_segments()  # before anything of this package imports torch

OPS = ("rmsnorm_linear", "qk_norm_rope", "modulate", "gate_residual", "gelu_concat", "biased_attention")
