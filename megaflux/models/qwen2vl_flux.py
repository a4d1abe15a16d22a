"""Qwen2VLFlux: what trains, in one module: Qwen2-VL's last layer -> connector -> FLUX.

Shapes: B batch, S chat tokens, T condition tokens, L image tokens, C packed latent channels, D Qwen's width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaflux.models.vlm import Condition


class Qwen2VLFlux(nn.Module):
    """Conditions and noisy latents -> velocity.

    vlm: Qwen2VLTextModel of one layer and the final norm (`split_vlm`); connector: Linear; transformer: diffusers'
    FluxTransformer2DModel. Each is called once per forward, as ZeRO needs it (DeepSpeed #8224).
    """

    def __init__(self, vlm: nn.Module, connector: nn.Linear, transformer: nn.Module):
        super().__init__()
        self.vlm = vlm
        self.connector = connector
        self.transformer = transformer

    def enable_activation_checkpointing(self) -> None:
        self.transformer.enable_gradient_checkpointing()
        # Reentrant checkpointing gives no gradients where no input needs one, and the trunk's output needs none.
        self.vlm.gradient_checkpointing_enable({"use_reentrant": False})

    def encode_condition(self, condition: Condition) -> Tensor:
        """Trunk output -> FLUX's encoder_hidden_states (B, T, joint_attention_dim)."""
        hidden_states = self.vlm(
            inputs_embeds=condition.hidden_states, position_ids=condition.position_ids,
            attention_mask=condition.attention_mask, use_cache=False, return_dict=True,
        ).last_hidden_state  # fmt: skip
        index = condition.select[..., None].expand(-1, -1, hidden_states.shape[-1])
        return self.connector(hidden_states.gather(1, index))  # (B, S, D) -> (B, T, D) -> (B, T, joint)

    def forward(
        self, condition: Condition, hidden_states: Tensor, timestep: Tensor, img_ids: Tensor,
        pooled_projections: Tensor, guidance: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Velocity (B, L, C) of packed noisy latents.

        hidden_states: (B, L, C); timestep: (B,) in [0, 1], 1 is noise; img_ids: (L, 3); pooled_projections: (B, P);
        guidance: (B,) or None for a FLUX without guidance embedding.
        """
        encoder_hidden_states = self.encode_condition(condition)
        B, T, _ = encoder_hidden_states.shape
        return self.transformer(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            pooled_projections=pooled_projections,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=img_ids.new_zeros(T, 3),  # all zero: FLUX sees the condition as a set
            joint_attention_kwargs=attention_kwargs(condition.select_mask, hidden_states),
            return_dict=False,
        )[0]


def attention_kwargs(select_mask: Tensor | None, hidden_states: Tensor) -> dict[str, Tensor] | None:
    """diffusers' joint_attention_kwargs that hide the condition's padding: a bias (B, 1, 1, T + L), -inf at padding.

    select_mask: (B, T) bool, or None where nothing is padded (the common case keeps flash attention)."""
    if select_mask is None:
        return None
    visible = torch.cat([select_mask, select_mask.new_ones(hidden_states.shape[:2])], dim=1)
    bias = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    return {"attention_mask": bias.masked_fill(~visible, float("-inf"))[:, None, None, :]}
