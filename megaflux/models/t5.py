"""The text path of the released weights: T5's tokens, a linear of their own, after the image tokens.

    prompt -> T5, padded to 256 tokens -> t5_embedder (4096 -> 3072) -> after the context-embedded image tokens

as in the released tool (`erwold/qwen2vl-flux`): padding is attended to, CLIP gets the empty prompt. diffusers' FLUX
applies context_embedder to all of encoder_hidden_states; `split_context` restricts it to the image tokens. A ControlNet
has a context_embedder of its own; it is given the image tokens alone, or in the release T5's tokens as well.

Shapes: B batch, n image tokens, m T5 tokens, J joint_attention_dim (4096), W FLUX's width (3072).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from megaflux.models.replacing import forward_replaced

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from transformers import T5EncoderModel

MAX_TOKENS = 256  # the released tool pads and truncates to it


class T5Path:
    """tokenizer: of T5; encoder: T5EncoderModel; embedder: Linear(J, W). Not a module: nothing in it is trained."""

    def __init__(self, tokenizer: Any, encoder: T5EncoderModel, embedder: nn.Linear):
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
        """Where input_ids go: the weights' device, or the one to which accelerate moves them."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.encoder.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        found = next((device for device in devices if device is not None), None)
        return next(self.encoder.parameters()).device if found is None else torch.device(found)

    def notes(self, prompt: str) -> list[str]:
        """What is done to a prompt, human-readable; empty if it is used as it is."""
        count = len(self.tokenizer(prompt)["input_ids"])
        return [f"prompt: {count} T5 tokens, cut to the first {MAX_TOKENS}"] if count > MAX_TOKENS else []

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> T5Path:
        """Move, and cast unless dtype is None."""
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


class HasContextEmbedder(Protocol):
    """FLUX's transformer or a FluxControlNetModel."""

    context_embedder: Any


@contextmanager
def split_context(transformer: HasContextEmbedder, t5_embedder: nn.Linear, num_image_tokens: int) -> Iterator[None]:
    """Inside, the transformer embeds its first tokens by its own context_embedder and the others by T5's linear."""
    own = transformer.context_embedder
    split: Any = SplitContextEmbedder(own, t5_embedder, num_image_tokens)  # in a Linear's place
    transformer.context_embedder = split
    try:
        yield
    finally:
        transformer.context_embedder = own


@contextmanager
def image_tokens_only(controlnet: nn.Module, num_image_tokens: int) -> Iterator[None]:
    """Inside, a FluxControlNetModel or FluxMultiControlNetModel is given only the first tokens: it was trained on them,
    and its own context_embedder cannot read T5's."""
    n = num_image_tokens

    def sliced(tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return tokens[:, :n], ids[:n] if ids.ndim == 2 else ids[:, :n]

    with _other_text(controlnet, sliced):
        yield


@contextmanager
def text_of_its_own(
    controlnet: nn.Module, tokens: Tensor, num_image_tokens: int, t5_embedder: nn.Linear | None
) -> Iterator[None]:
    """Inside, a FluxMultiControlNetModel is given `tokens` (B, n + m, J) instead of FLUX's, the first n image tokens.

    Each net embeds those by its own context_embedder, and the m tokens of T5 by T5's linear. t5_embedder: only without
    tokens of T5 may it be None.
    """
    with ExitStack() as stack:
        stack.enter_context(_other_text(controlnet, lambda _, ids: (tokens, ids.new_zeros(tokens.shape[1], 3))))
        if t5_embedder is not None:
            for net in controlnet.nets:  # type: ignore[union-attr]  # a ModuleList
                stack.enter_context(split_context(net, t5_embedder, num_image_tokens))
        yield


@contextmanager
def _other_text(controlnet: nn.Module, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, the ControlNet's encoder_hidden_states and txt_ids are what `change` makes of those that it is given."""

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, encoder_hidden_states: Tensor, txt_ids: Tensor, **kwargs: Any) -> Any:
            tokens, ids = change(encoder_hidden_states, txt_ids)
            return forward(*args, encoder_hidden_states=tokens, txt_ids=ids, **kwargs)

        return changed

    with forward_replaced(controlnet, make):
        yield
