"""Fused ops for FLUX conditioned by Qwen2-VL: Triton on a GPU, the same arithmetic in plain torch elsewhere.

One folder per op: reference.py (definition and torch path), triton_kernels.py, and the public function here. Imports
nothing of megaflux. See megaflux_kernels.dispatch for MEGAFLUX_KERNELS.
"""

import os

# Before torch is imported, as megaflux.allocator does it: segments that grow, where nobody chose otherwise.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

OPS = ("rmsnorm_linear", "qk_norm_rope", "modulate", "gate_residual", "gelu_concat", "biased_attention")
