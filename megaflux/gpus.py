"""What the makers' data sheets say of GPUs. Imports nothing, so that every bench can."""

from __future__ import annotations

import re

# Dense bf16 peak, TFLOP/s, by what the GPU's name holds; from the makers' data sheets, without sparsity.
PEAK_TFLOPS = {
    "A10": 125, "A10G": 70, "A30": 165, "A40": 150, "A100": 312, "A800": 312, "H20": 148, "H100": 989,
    "H100 PCIe": 756, "H100 NVL": 835, "H800": 989, "H200": 989, "GH200": 989, "B200": 2250, "GB200": 2500,
    "L4": 121, "L40": 181, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165, "RTX A6000": 155, "MI250X": 383,
    "MI300X": 1307,
}  # fmt: skip


def peak_tflops_for(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by the longest known name in its name ("NVIDIA A100-SXM4-80GB" -> 312); None:
    unknown."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)]
    return float(PEAK_TFLOPS[max(found, key=len)]) if found else None
