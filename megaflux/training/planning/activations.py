"""Bytes of activations at the peak of the backward pass: formulas, no measurement.

w bytes per value, W FLUX's width, r its MLP ratio (4), l image and T condition tokens.

What a block keeps follows from the gradients that it has (planning/gradients.py). In units of w W bytes per token of a stream:

- with kernels: the input of its first norm where the norm has a gradient or a weight that reads the norm trains (1); q, k, v
  and the output of attention where any of q, k, v has a gradient (4); in a double block the input of its second norm likewise
  (1); the MLP's pre-activation where the MLP's output has a gradient (r); the inputs of its gates where the modulations have
  one (1 each). A block with q/k norm weights near zero also keeps q, k and v before their norms (3). Policy mlp: r less.
  Statistics of 4 bytes each: 3 per head and 4 more, per token.
- without kernels (eager diffusers) also q and k before their norms (2), the norms' outputs where the modulations have a
  gradient, and the inputs of linears that train.
- policy full, with or without kernels: 1 per block.
- a block without a gradient keeps nothing.

So a block of T + l tokens keeps, where all of its input has a gradient, in units of w W (T + l):
      with kernels, double:     6 + r frozen   8 + r `attention` and `block`
      with kernels, single:     5 + r frozen   6 + r `attention` and `block`
      without kernels, double:  8 + r frozen   12 + r + l / (T + l) `attention`   14 + 2 r `block`
      without kernels, single:  7 + r frozen   10 + r               `attention`   11 + 2 r `block`

- added by the backward pass of one block, in the same units: what it recomputes (all but its input in policy full, r in
  mlp) and the gradients of its MLP, which are those of the residual stream, of the block's output and of the
  pre-activation (r, in place of that of proj_out's input); in a single block also that of attention's output (1) and
  space for those of q, k and v (3). In mlp the norm's output (1) is kept if the weights that read it train. Without
  kernels the gradients are those of the stream, of the block's output, of proj_out's input (r, and 1 in a single block),
  of the GELU and of the pre-activation. The peak is the maximum over blocks of this plus what the block and those before
  it keep; it is mostly at the last block, when everything is still kept.
- Each Qwen layer that trains: 11 D + 4 I per token of the turn (width D, MLP width I), and the connector's input and
  output; only the layers' inputs and the last one's output if they are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megaflux.models.flux import Policy
from megaflux.models.tokens import Tokens
from megaflux.training.planning.gradients import Block, Stream, flux_gradients
from megaflux.training.stages import Stage, locate, trains

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
    layers, inner = stage.vlm_layers, 11 * text.hidden_size + 4 * text.intermediate_size
    layer = layers * inner
    if "full" in policies and layers:
        layer = (layers + 1) * text.hidden_size
    read = text.hidden_size if stage.connector or layers else 0
    made = transformer.config.joint_attention_dim if _embeds(transformer, stage) else 0
    return round(blocks + width * (layer * tokens.turn * tokens.turns + tokens.condition * (read + made)))


def _embeds(transformer: Any, stage: Stage) -> bool:
    """Whether context_embedder's weight trains, so that its input is kept."""
    return trains(locate("transformer.context_embedder.weight", len(transformer.transformer_blocks)), stage, 0)


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
    blocks, share = _blocks(transformer, stage), _share(tokens)
    units = block_units(transformer, stage, tokens, fused, uneven)
    statistics = 4 * (3 * transformer.config.num_attention_heads + 4) / (width * transformer.inner_dim)
    kept_so_far = peak = 0.0
    for block, unit, less, policy in zip(
        blocks, units, saved_by_mlp(transformer, stage, tokens), policies, strict=True
    ):
        if not block.backward:
            continue
        kept_so_far += {"none": unit + statistics, "mlp": unit - less + statistics, "full": 1}[policy]
        peak = max(peak, kept_so_far + _backward_units(block, share, unit, policy, fused))
    return width * peak * (tokens.condition + tokens.image) * transformer.inner_dim


def _backward_units(block: Block, share: Share, unit: float, policy: Policy, fused: bool) -> float:
    """What the backward pass of a block adds to what is kept, in the units of `block_units`. unit: what the block keeps in
    policy none."""
    single = block.single
    again = {"none": 0, "mlp": _mean(block, share, lambda s: MLP_RATIO * s.mlp), "full": unit - 1}[policy]
    freed = _mean(block, share, lambda s: s.modulated)  # kept for a gate, and freed by then
    if not fused:
        added = 2 + single + 2 * MLP_RATIO + 2
        return again + added - 2 * freed - 2 * _mean(block, share, lambda s: s.mlp_out_trains)
    added = 2 + MLP_RATIO + 4 * single
    norm_output = policy == "mlp" and any(_reads_norm(block, stream) for stream in block.streams)
    return again + added + norm_output - freed


def block_units(
    transformer: Any, stage: Stage, tokens: Tokens, fused: bool, uneven: Sequence[bool] | None = None
) -> list[float]:
    """What each FLUX block keeps without recomputation, in units of one hidden state of T + l tokens. Arguments as for
    `activation_bytes`."""
    kept, units = _kept if fused else _kept_eager, []
    for index, block in enumerate(_blocks(transformer, stage)):
        unit = (4 if block.attention else block.attended_trains) + _mean(block, _share(tokens), partial(kept, block))
        units.append(unit + 3 if uneven and uneven[index] and block.attention else unit)
    return units


def _blocks(transformer: Any, stage: Stage) -> list[Block]:
    """Each block's gradients. Where the text stream enters with one, the image stream counts so too: in the first block it may
    have none, which makes the formula a little too large there."""
    blocks = []
    for block in flux_gradients(transformer, stage).blocks:
        if any(stream.enters for stream in block.streams):
            streams = (replace(stream, enters=True, queries=True, keys=True) for stream in block.streams)
            block = replace(block, streams=tuple(streams))
        blocks.append(block)
    return blocks


def saved_by_mlp(transformer: Any, stage: Stage, tokens: Tokens) -> list[float]:
    """By how much less each block keeps in policy mlp, in the units of `block_units`."""

    def less(block: Block, stream: Stream) -> int:  # the pre-activation; from what it is computed must be kept
        return stream.mlp * (MLP_RATIO - (not _keeps_middle(block, stream)))

    return [_mean(b, _share(tokens), partial(less, b)) for b in _blocks(transformer, stage)]


Share = tuple[int, int]
"""(T, l): tokens of the streams of a double block."""


def _share(tokens: Tokens) -> Share:
    return tokens.condition, tokens.image


def _mean(block: Block, share: Share, of: Callable[[Stream], int]) -> float:
    """A number of each stream, averaged over all tokens of the block."""
    if block.single:
        return float(of(block.streams[0]))
    return sum(count * of(stream) for count, stream in zip(share, block.streams, strict=True)) / sum(share)


def _reads_norm(block: Block, stream: Stream) -> bool:
    """Whether a weight that reads the same norm as the MLP trains."""
    return stream.mlp_in_trains or (block.single and stream.qkv_trains)


def _keeps_middle(block: Block, stream: Stream) -> bool:
    """Whether the input of the norm before the MLP is kept, with kernels and without policy mlp."""
    if block.single:
        return stream.enters or stream.modulated or stream.qkv_trains or stream.mlp_in_trains
    return stream.middle or stream.mlp_in_trains


def _kept(block: Block, stream: Stream) -> int:
    """What a stream keeps with kernels, beside attention's tensors."""
    first = stream.enters or stream.modulated or stream.qkv_trains
    if block.single:
        return _keeps_middle(block, stream) + MLP_RATIO * stream.mlp + stream.modulated
    return first + _keeps_middle(block, stream) + MLP_RATIO * stream.mlp + 2 * stream.modulated


def _kept_eager(block: Block, stream: Stream) -> int:
    """The same without kernels."""
    norms = stream.enters + stream.modulated + stream.queries + stream.keys
    mlp = MLP_RATIO * (stream.pre + stream.mlp_out_trains)
    gate = stream.modulated
    if block.single:
        reads = stream.qkv_trains or stream.mlp_in_trains
        return norms + reads + mlp + (block.attended_trains) + gate
    second = stream.middle + stream.modulated + stream.mlp_in_trains
    return norms + stream.qkv_trains + second + mlp + 2 * gate
