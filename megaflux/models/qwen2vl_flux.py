"""Qwen2VLFlux: all that is trained, in one module: Qwen2-VL's last layers -> connector -> FLUX.

Shapes: B batch, R chat turns of a sample (1 unless it has several references), S chat tokens, T condition tokens, L image tokens, C packed latent channels, D Qwen's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
from diffusers.models import FluxTransformer2DModel
from transformers import Qwen2VLTextModel

from megaflux.models.connector import folded
from megaflux.models.flux import Policy, contiguous_attention_gradients, fuse, is_fused, unfuse
from megaflux.models.latents import text_ids
from megaflux.models.positions import causal_mask
from megaflux.models.vlm import Condition
from megaflux.models.vlm_parts import defer_norm
from megaflux_kernels.dispatch import describe
from megaflux_kernels.rmsnorm_linear import rmsnorm_linear


class Qwen2VLFlux(nn.Module):
    """Conditions and noisy latents -> velocity. Each part is called once per forward, as ZeRO needs it (DeepSpeed #8224)."""

    vlm: Qwen2VLTextModel
    """Qwen2-VL's last layers, or none, and its final norm (`split_vlm`)."""
    connector: nn.Linear
    transformer: FluxTransformer2DModel

    def __init__(self, vlm: Qwen2VLTextModel, connector: nn.Linear, transformer: FluxTransformer2DModel):
        super().__init__()
        self.vlm = vlm
        self.connector = connector
        self.transformer = transformer
        contiguous_attention_gradients(transformer)

    @property
    def fused(self) -> bool:
        """Whether FLUX and the connector run on megaflux_kernels."""
        return is_fused(self.transformer)

    def configure(self, kernels: bool, policies: Policy | Sequence[Policy] = "none") -> None:
        """Choose the path, megaflux_kernels or diffusers' own, and the policy of each FLUX block: what its backward pass
        computes again (see models.flux; one for all blocks, or one per block).

        The Qwen layers are computed again where any block's policy is full. ValueError for invalid policies; without
        kernels that is all but "none" or "full" for all blocks.
        """
        chosen: set[str] = {policies} if isinstance(policies, str) else set(policies)
        if kernels:
            fuse(self.transformer, policies)
            self.transformer.disable_gradient_checkpointing()  # diffusers' own
        else:
            if chosen not in ({"none"}, {"full"}):
                raise ValueError(f"activation policies {sorted(chosen)} need kernels; use none or full for all blocks")
            unfuse(self.transformer)
            if chosen == {"full"}:
                self.transformer.enable_gradient_checkpointing()
            else:
                self.transformer.disable_gradient_checkpointing()
        defer_norm(self.vlm, kernels)
        if not self.vlm.layers:
            return
        if "full" in chosen:
            # Reentrant checkpointing gives no gradients where no input needs one, and the trunk's output needs none.
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.vlm.gradient_checkpointing_disable()

    def describe(self) -> str:
        """The path that FLUX and the connector take, human-readable."""
        if not self.fused:
            return "kernels off (diffusers' own path)"
        return f"kernels: {describe(self.connector.weight.device)}"

    def encode_condition(self, condition: Condition, embedded: bool = False) -> Tensor:
        """Trunk output -> FLUX's encoder_hidden_states (B, T, joint_attention_dim).

        embedded (with kernels, without gradients): with context_embedder applied too, (B, T, W), by one product that equals
        connector and context_embedder; pass the transformer `context_embedded` then.
        """
        hidden_states = self.vlm(
            inputs_embeds=condition.hidden_states,
            position_ids=condition.position_ids,
            attention_mask=causal_mask(condition.attention_mask, condition.hidden_states.dtype),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        if condition.turns > 1:
            hidden_states = hidden_states.unflatten(0, (-1, condition.turns)).flatten(
                1, 2
            )  # (B R, S, D) -> (B, R S, D)
        index = condition.select[..., None].expand(-1, -1, hidden_states.shape[-1])
        hidden_states = hidden_states.gather(1, index)  # (B, R S, D) -> (B, T, D)
        if not self.fused:
            return self.connector(hidden_states)
        weight: Tensor = self.connector.weight
        bias: Tensor = self.connector.bias
        if embedded:
            weight, bias = folded(self.connector, self.transformer.context_embedder)
        return rmsnorm_linear(hidden_states, self.vlm.norm.weight, weight, bias, self.vlm.config.rms_norm_eps)

    def forward(
        self,
        condition: Condition,
        hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        """Velocity (B, L, C) of packed noisy latents.

        hidden_states: (B, L, C); timestep: (B,) in [0, 1], 1 is noise; img_ids: (L, 3); pooled_projections: (B, P);
        guidance: (B,) or None for a FLUX without guidance embedding.
        """
        encoder_hidden_states = self.encode_condition(condition)
        T = encoder_hidden_states.shape[1]
        return self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            pooled_projections=pooled_projections,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=text_ids(T, img_ids.device),
            joint_attention_kwargs=attention_kwargs(condition, hidden_states),
            return_dict=False,
        )[0]


def attention_kwargs(condition: Condition, hidden_states: Tensor) -> dict[str, Tensor] | None:
    """diffusers' joint_attention_kwargs that weight the condition's tokens and hide its padding: a bias (B, 1, 1, T + L), the
    logarithms of the references' strengths, -inf at padding, 0 on the image's keys; None where all is 0, the common case, which
    keeps flash attention.

    hidden_states: (B, L, C), whose dtype and device the bias takes."""
    bias = condition.bias()
    if bias is None:
        return None
    return {"attention_mask": F.pad(bias.to(hidden_states.dtype), (0, hidden_states.shape[1]))[:, None, None, :]}
