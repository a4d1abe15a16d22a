"""Bytes of activations at the peak of the backward pass: formulas, no measurement.

w bytes per value, W FLUX's width, r its MLP ratio (4), l image and T condition tokens.

- saved by autograd, in units of w W (T + l) bytes per image: with kernels a block keeps the inputs of its norms (1 each),
  q, k, v and the output of attention (4) and the MLP's pre-activation (r); if its modulations train, also the inputs of
  its gates (1 each):
      double block:  6 + r frozen   8 + r `attention` and `block`
      single block:  5 + r frozen   6 + r `attention` and `block`
  A block with q/k norm weights near zero also keeps q, k and v before their norms (3). Policy mlp: r less. Statistics
  of 4 bytes each: 3 per head and 4 more, per token.
- without kernels (eager diffusers) also q and k before their norms (2), and the inputs of linears that train:
      double block:  8 + r frozen   12 + r + l / (T + l) `attention`   14 + 2 r `block`
      single block:  7 + r frozen   10 + r               `attention`   11 + 2 r `block`
- policy full, with or without kernels: 1 per block.
- added by the backward pass of one block, in the same units: what it recomputes (all but its input in policy full, r in
  mlp) and the gradients of its MLP, which are those of the residual stream, of the block's output and of the
  pre-activation (r, in place of that of proj_out's input); in a single block also that of attention's output (1) and
  space for those of q, k and v (3). In mlp the norm's output (1) is kept if the weights that read it train. Without
  kernels the gradients are those of the stream, of the block's output, of proj_out's input (r, and 1 in a single block),
  of the GELU and of the pre-activation. The peak is the maximum over blocks of this plus what the block and those before
  it keep; it is mostly at the last block, when everything is still kept.
- Qwen's last layer: 11 D + 4 I per token of the turn (width D, MLP width I), and the connector's input and output; only
  the input and output of the layer if it is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megaflux.models.flux import Policy
from megaflux.models.tokens import Tokens
from megaflux.training.stages import Stage

MLP_RATIO = 4  # r: FluxSingleTransformerBlock's mlp_ratio and FeedForward's mult


def activation_bytes(
    module: Any,
    stage: Stage,
    tokens: Tokens,
    width: int,
    policies: Sequence[Policy],
    fused: bool = True,
    uneven: Sequence[bool] | None = None,
) -> int:
    """Bytes at the peak of the backward pass for one image of a micro-batch: what autograd keeps of FLUX's blocks, the Qwen
    layer and the connector, plus what the backward pass of one block adds.

    module: Qwen2VLFlux, on any device, meta included. width: bytes per value. policies: one per block. fused: with kernels.
    uneven: of each block, whether it also keeps its q, k, v product (`flux.uneven_norms`); None: none does."""
    transformer, text = module.transformer, module.vlm.config
    blocks = flux_bytes(transformer, stage, tokens, width, policies, fused, uneven)
    layer = 2 * text.hidden_size if "full" in policies else 11 * text.hidden_size + 4 * text.intermediate_size
    connector = tokens.condition * (text.hidden_size + transformer.config.joint_attention_dim)
    return round(blocks + width * (layer * tokens.turn + connector))


def flux_bytes(
    transformer: Any,
    stage: Stage,
    tokens: Tokens,
    width: int,
    policies: Sequence[Policy],
    fused: bool = True,
    uneven: Sequence[bool] | None = None,
) -> float:
    """The part of `activation_bytes` that FLUX's blocks take."""
    units = block_units(transformer, stage, tokens, fused, uneven)
    statistics = 4 * (3 * transformer.config.num_attention_heads + 4) / (width * transformer.inner_dim)
    kept_so_far = peak = 0.0
    for index, (unit, policy) in enumerate(zip(units, policies, strict=True)):
        kept_so_far += {"none": unit + statistics, "mlp": unit - MLP_RATIO + statistics, "full": 1}[policy]
        peak = max(peak, kept_so_far + _backward_units(transformer, stage, index, unit, policy, fused))
    return width * peak * (tokens.condition + tokens.image) * transformer.inner_dim


def _backward_units(transformer: Any, stage: Stage, index: int, unit: float, policy: Policy, fused: bool) -> float:
    """What the backward pass of a block adds to what is kept, in the units of `block_units`. unit: what the block keeps in
    policy none."""
    single = index >= len(transformer.transformer_blocks)
    trains = _components(stage, index)
    again = {"none": 0, "mlp": MLP_RATIO, "full": unit - 1}[policy]
    if not fused:
        added = 2 + single + 2 * MLP_RATIO + 2
        return again + added - {"frozen": 0, "attention": 2, "block": 4}[trains]  # kept for gates, and freed by then
    added = 2 + MLP_RATIO + 4 * single
    norm_output = policy == "mlp" and (trains == "block" or (single and trains == "attention"))
    freed = trains != "frozen"  # kept for a gate, and freed by then
    return again + added + norm_output - freed


def _components(stage: Stage, index: int) -> str:
    """What trains in a FLUX block: "frozen", "attention" or "block"; the set `model` counts as "block"."""
    if not stage.lists(index):
        return "frozen"
    return "attention" if stage.components == "attention" else "block"


def block_units(
    transformer: Any, stage: Stage, tokens: Tokens, fused: bool, uneven: Sequence[bool] | None = None
) -> list[float]:
    """What each FLUX block keeps without recomputation, in units of one hidden state of T + l tokens. Arguments as for
    `activation_bytes`."""
    num_double = len(transformer.transformer_blocks)
    ratio = MLP_RATIO
    share = tokens.image / (tokens.condition + tokens.image)
    kept: dict[str, dict[str, float]]
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
    units: list[float] = []
    for index in range(num_double + len(transformer.single_transformer_blocks)):
        units.append(kept["double" if index < num_double else "single"][_components(stage, index)])
    if uneven:
        units = [unit + 3 if keeps else unit for unit, keeps in zip(units, uneven, strict=True)]
    return units
