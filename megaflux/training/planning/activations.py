"""Bytes of activations at the peak of the backward pass; formulas, no measurement.

w bytes per number, W FLUX's width, r its MLP ratio (4), l image and T condition tokens.

- activations, in units of w W (T + l) bytes per image (saved by autograd). With kernels a block keeps the inputs of its
  norms (1 each), q, k, v and the output of attention (4) and the MLP's pre-activation (r); where its modulations train,
  what its gates scale as well (1 each):
      double block:  6 + r frozen   8 + r `attention` and `block`
      single block:  5 + r frozen   6 + r `attention` and `block`
  A block with q/k norm weights near zero keeps q, k and v before their norms too (3). Policy mlp: r less. Statistics,
  4 bytes each: 3 a head and 4 to a token.
- without kernels, eager diffusers: q and k before their norms too (2), and the inputs of linears that train:
      double block:  8 + r frozen   12 + r + l / (T + l) `attention`   14 + 2 r `block`
      single block:  7 + r frozen   10 + r               `attention`   11 + 2 r `block`
- policy full, either way: 1 per block.
- backward, in the same units: while a block is at it, what it computes again (all but its input in policy full, r in
  mlp) and the gradients of its MLP: of the stream, of the block's output and of the pre-activation (r, written over
  that of proj_out's input); in a single block also of attention's output (1) and room for those of q, k and v (3). The
  norm's output (1) stays in mlp where the weights that read it train. Without kernels: of the stream, of the block's
  output, of proj_out's input (r, and 1 in a single block), of the GELU and of the pre-activation. The peak is the
  largest sum, over blocks, of what it and the blocks before it keep and of this; mostly at the last block, where all is
  still kept.
- Qwen's last layer: 11 D + 4 I per token of the turn (width D, MLP width I), and the connector's input and output; of
  the layer only input and output if recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from megaflux.models.flux import Policy
from megaflux.models.tokens import Tokens

if TYPE_CHECKING:  # the benches name stages on machines that lack what reading a configuration needs
    from megaflux.config.schema import Stage

MLP_RATIO = 4  # r: FluxSingleTransformerBlock's mlp_ratio and FeedForward's mult


def activation_bytes(
    module: nn.Module,
    stage: Stage,
    tokens: Tokens,
    width: int,
    policies: Sequence[Policy],
    fused: bool = True,
    uneven: Sequence[bool] | None = None,
) -> int:
    """Bytes alive at the peak of the backward pass for one image of a micro-batch: what autograd keeps of FLUX's blocks,
    the Qwen layer and the connector, and what the block at work adds. module: Qwen2VLFlux, the meta device will do; width:
    bytes per number; policies: one per block; fused: with kernels."""
    transformer, text = module.transformer, module.vlm.config
    blocks = flux_bytes(transformer, stage, tokens, width, policies, fused, uneven)
    layer = 2 * text.hidden_size if "full" in policies else 11 * text.hidden_size + 4 * text.intermediate_size
    connector = tokens.condition * (text.hidden_size + transformer.config.joint_attention_dim)
    return round(blocks + width * (layer * tokens.turn + connector))


def flux_bytes(
    transformer: nn.Module,
    stage: Stage,
    tokens: Tokens,
    width: int,
    policies: Sequence[Policy],
    fused: bool = True,
    uneven: Sequence[bool] | None = None,
) -> float:
    """The part of FLUX's blocks in `activation_bytes`."""
    units = block_units(transformer, stage, tokens, fused, uneven)
    statistics = 4 * (3 * transformer.config.num_attention_heads + 4) / (width * transformer.inner_dim)
    kept_so_far = peak = 0.0
    for index, (unit, policy) in enumerate(zip(units, policies, strict=True)):
        kept_so_far += {"none": unit + statistics, "mlp": unit - MLP_RATIO + statistics, "full": 1}[policy]
        peak = max(peak, kept_so_far + _backward_units(transformer, stage, index, unit, policy, fused))
    return width * peak * (tokens.condition + tokens.image) * transformer.inner_dim


def _backward_units(
    transformer: nn.Module, stage: Stage, index: int, unit: float, policy: Policy, fused: bool
) -> float:
    """What a block adds to what is kept while its MLP's gradients are made, in the same units. unit: what it would keep
    in policy none."""
    single = index >= len(transformer.transformer_blocks)
    trains = _components(stage, index)
    again = {"none": 0, "mlp": MLP_RATIO, "full": unit - 1}[policy]
    if not fused:
        added = 2 + single + 2 * MLP_RATIO + 2
        return again + added - {"frozen": 0, "attention": 2, "block": 4}[trains]  # kept for gates, and gone by then
    added = 2 + MLP_RATIO + 4 * single
    held = policy == "mlp" and (trains == "block" or (single and trains == "attention"))  # the norm's output
    gone = trains != "frozen"  # kept for a gate
    return again + added + held - gone


def _components(stage: Stage, index: int) -> str:
    """frozen, attention or block (the set `model` counts as that): what trains of a FLUX block."""
    if stage.blocks != "all" and index not in stage.blocks:
        return "frozen"
    return "attention" if stage.components == "attention" else "block"


def block_units(
    transformer: nn.Module, stage: Stage, tokens: Tokens, fused: bool, uneven: Sequence[bool] | None = None
) -> list[float]:
    """What each FLUX block keeps without recomputation, in units of one hidden state of T + L tokens."""
    num_double = len(transformer.transformer_blocks)
    ratio = MLP_RATIO
    share = tokens.image / (tokens.condition + tokens.image)
    if fused:
        kept = {
            "double": {"frozen": 6 + ratio, "attention": 8 + ratio, "block": 8 + ratio},
            "single": {"frozen": 5 + ratio, "attention": 6 + ratio, "block": 6 + ratio},
        }
    else:
        kept = {
            "double": {"frozen": 8 + ratio, "attention": 12 + ratio + share, "block": 14 + 2 * ratio},
            "single": {"frozen": 7 + ratio, "attention": 10 + ratio, "block": 11 + 2 * ratio},
        }
    units = []
    for index in range(num_double + len(transformer.single_transformer_blocks)):
        units.append(kept["double" if index < num_double else "single"][_components(stage, index)])
    if uneven:
        units = [unit + 3 if keeps else unit for unit, keeps in zip(units, uneven, strict=True)]
    return units
