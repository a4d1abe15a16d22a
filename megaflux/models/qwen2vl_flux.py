"""Qwen2VLFlux: what trains, in one module: Qwen2-VL's last layer -> connector -> FLUX.

Shapes: B batch, S chat tokens, T condition tokens, L image tokens, C packed latent channels, D Qwen's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers import FluxTransformer2DModel

from megaflux.models.connector import folded
from megaflux.models.flux import Policy, contiguous_attention_gradients, fuse, is_fused, unfuse
from megaflux.models.latents import text_ids
from megaflux.models.vlm import Condition, causal_mask, defer_norm
from megaflux_kernels.dispatch import describe
from megaflux_kernels.rmsnorm_linear import rmsnorm_linear


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
        if isinstance(transformer, FluxTransformer2DModel):
            contiguous_attention_gradients(transformer)

    @property
    def fused(self) -> bool:
        """Whether FLUX and the connector run on megaflux_kernels."""
        return is_fused(self.transformer)

    def configure(self, kernels: bool, policies: Policy | Sequence[Policy] = "none") -> None:
        """Choose the paths: megaflux_kernels or diffusers' own, and what each FLUX block computes again in the backward
        pass (see models.flux; one for all, or one per block). Without kernels: "none" or "full" for all blocks.

        The Qwen layer is computed again where any block is in full. ValueError for what cannot be.
        """
        chosen = {policies} if isinstance(policies, str) else set(policies)
        if kernels:
            fuse(self.transformer, policies)
            self.transformer.disable_gradient_checkpointing()  # diffusers' own
        else:
            if chosen not in ({"none"}, {"full"}):
                raise ValueError(f"activation policies {sorted(chosen)} need kernels; use none or full for all blocks")
            unfuse(self.transformer)
            switch = "enable" if chosen == {"full"} else "disable"
            getattr(self.transformer, f"{switch}_gradient_checkpointing")()
        defer_norm(self.vlm, kernels)
        if "full" in chosen:
            # Reentrant checkpointing gives no gradients where no input needs one, and the trunk's output needs none.
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.vlm.gradient_checkpointing_disable()

    def describe(self) -> str:
        """The path that FLUX and the connector take, for people."""
        if not self.fused:
            return "kernels off (diffusers' own path)"
        return f"kernels: {describe(self.connector.weight.device)}"

    def encode_condition(self, condition: Condition, embedded: bool = False) -> Tensor:
        """Trunk output -> FLUX's encoder_hidden_states (B, T, joint_attention_dim).

        embedded (with kernels, without gradients): past context_embedder too, (B, T, W), by one product that equals
        connector and context_embedder; the transformer is then told `context_embedded`.
        """
        hidden_states = self.vlm(
            inputs_embeds=condition.hidden_states,
            position_ids=condition.position_ids,
            attention_mask=causal_mask(condition.attention_mask, condition.hidden_states.dtype),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        index = condition.select[..., None].expand(-1, -1, hidden_states.shape[-1])
        hidden_states = hidden_states.gather(1, index)  # (B, S, D) -> (B, T, D)
        if not self.fused:
            return self.connector(hidden_states)
        weights = self.connector.weight, self.connector.bias
        if embedded:
            weights = folded(self.connector, self.transformer.context_embedder)
        return rmsnorm_linear(hidden_states, self.vlm.norm.weight, *weights, self.vlm.config.rms_norm_eps)

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
