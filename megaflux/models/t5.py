"""The text path of the released weights: T5's tokens, a linear of their own, after the image tokens.

    prompt -> T5, padded to 256 tokens -> t5_embedder (4096 -> 3072) -> after the context-embedded image tokens

as in the released tool (`erwold/qwen2vl-flux`): padding takes part, CLIP gets the empty prompt. diffusers' FLUX applies
context_embedder to all of encoder_hidden_states; `split_context` has it do so to the image tokens alone.

Shapes: B batch, n image tokens, m T5 tokens, J joint_attention_dim (4096), W FLUX's width (3072).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MAX_TOKENS = 256  # the released tool pads to it, and cuts there


class T5Path:
    """tokenizer: of T5; encoder: T5EncoderModel; embedder: Linear(J, W). Not a module: nothing of it trains."""

    def __init__(self, tokenizer, encoder: nn.Module, embedder: nn.Linear):
        self.tokenizer = tokenizer
        self.encoder = encoder.requires_grad_(False).eval()
        self.embedder = embedder.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Last hidden states (B, 256, J) of B prompts, padding included, in the encoder's dtype."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        return self.encoder(input_ids=tokens["input_ids"].to(self.device)).last_hidden_state

    @property
    def device(self) -> torch.device:
        """Where input_ids go: the weights' device, or the one that accelerate brings them to."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.encoder.modules())
        found = next((h.execution_device for h in hooks if getattr(h, "execution_device", None) is not None), None)
        return next(self.encoder.parameters()).device if found is None else torch.device(found)

    def notes(self, prompt: str) -> list[str]:
        """What is done to a prompt, for people."""
        count = len(self.tokenizer(prompt)["input_ids"])
        return [f"prompt: {count} T5 tokens, cut to the first {MAX_TOKENS}"] if count > MAX_TOKENS else []

    def to(self, device: torch.device | str, dtype: torch.dtype) -> T5Path:
        self.encoder.to(device, dtype)
        self.embedder.to(device, dtype)
        return self


class SplitContextEmbedder(nn.Module):
    """FLUX's context_embedder for the first `num_image_tokens` tokens, T5's linear for the others."""

    def __init__(self, context_embedder: nn.Linear, t5_embedder: nn.Linear, num_image_tokens: int):
        super().__init__()
        self.context_embedder = context_embedder
        self.t5_embedder = t5_embedder
        self.num_image_tokens = num_image_tokens

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        """(B, n + m, J) -> (B, n + m, W)."""
        n = self.num_image_tokens
        image, text = encoder_hidden_states[:, :n], encoder_hidden_states[:, n:]
        return torch.cat([self.context_embedder(image), self.t5_embedder(text)], dim=1)


@contextmanager
def split_context(transformer: nn.Module, t5_embedder: nn.Linear, num_image_tokens: int) -> Iterator[None]:
    """While inside, the transformer embeds its first tokens by its own context_embedder and the others by T5's linear."""
    own = transformer.context_embedder
    transformer.context_embedder = SplitContextEmbedder(own, t5_embedder, num_image_tokens)
    try:
        yield
    finally:
        transformer.context_embedder = own


@contextmanager
def image_tokens_only(controlnet: nn.Module, num_image_tokens: int) -> Iterator[None]:
    """While inside, a FluxControlNetModel, or a FluxMultiControlNetModel, is given the first tokens alone: it was trained
    on them, and its own context_embedder cannot read T5's."""
    forward, n = controlnet.forward, num_image_tokens

    def sliced(*args, encoder_hidden_states: Tensor, txt_ids: Tensor, **kwargs):
        ids = txt_ids[:n] if txt_ids.ndim == 2 else txt_ids[:, :n]
        return forward(*args, encoder_hidden_states=encoder_hidden_states[:, :n], txt_ids=ids, **kwargs)

    patched = "forward" in vars(controlnet)
    controlnet.forward = sliced
    try:
        yield
    finally:
        if patched:
            controlnet.forward = forward
        else:
            del controlnet.forward
