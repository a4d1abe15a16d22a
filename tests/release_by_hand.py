"""The released tool's formulas, written again from its description, on the parts of a release's folder in float64.

Only the shapes of what is compared come from megaflux; the tokens, the Euler steps, FLUX's and the ControlNet's text are
computed here, with transformers' and diffusers' classes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration, T5EncoderModel

from megaflux.models.scratch import tiny_processor

DOUBLE = torch.float64


def pack(z: torch.Tensor) -> torch.Tensor:
    """(B, C, 2 h, 2 w) -> (B, h w, 4 C), as FLUX packs latents."""
    return z.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@dataclass
class ByHand:
    """The parts of a release's folder."""

    root: Path

    def __post_init__(self) -> None:
        flux, qwen = self.root / "flux", self.root / "qwen2-vl"
        self.qwen = Qwen2VLForConditionalGeneration.from_pretrained(qwen, dtype=DOUBLE).eval()
        self.flux = FluxTransformer2DModel.from_pretrained(flux / "transformer", torch_dtype=DOUBLE).eval()
        self.vae = AutoencoderKL.from_pretrained(flux / "vae", torch_dtype=DOUBLE).eval()
        self.t5 = T5EncoderModel.from_pretrained(flux / "text_encoder_2", dtype=DOUBLE).eval()
        self.t5_tokenizer = AutoTokenizer.from_pretrained(flux / "tokenizer_2")
        self.connector = {k: v.to(DOUBLE) for k, v in torch.load(qwen / "connector.pt").items()}
        self.t5_embedder = {k: v.to(DOUBLE) for k, v in torch.load(qwen / "t5_embedder.pt").items()}

    @torch.no_grad()
    def image_tokens(self, picture: Image.Image, count: int) -> torch.Tensor:
        """(1, n, J): connector(last hidden states of the image tokens), the image at `count` x 28 x 28 pixels."""
        pixels = count * 28 * 28
        # the slow one, which resizes by Pillow
        process = AutoImageProcessor.from_pretrained(self.root / "qwen2-vl", use_fast=False)
        seen = process(images=[picture], return_tensors="pt", min_pixels=pixels, max_pixels=pixels)
        n = int(seen["image_grid_thw"].prod()) // 4
        processor = tiny_processor()
        turn = [{"type": "image"}, {"type": "text", "text": "Describe this image."}]
        text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        ids = processor.tokenizer(text.replace("<|image_pad|>", n * "<|image_pad|>"), return_tensors="pt")["input_ids"]
        is_image = ids[0] == self.qwen.config.image_token_id
        assert int(is_image.sum()) == n
        out = self.qwen.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=seen["pixel_values"].to(DOUBLE),
            image_grid_thw=seen["image_grid_thw"],
        )
        tokens = out.last_hidden_state[:, is_image]
        return F.linear(tokens, self.connector["linear.weight"], self.connector["linear.bias"])

    @torch.no_grad()
    def t5_tokens(self, prompt: str) -> torch.Tensor:
        """(1, 256, W): t5_embedder(T5's tokens), padding included; of no prompt, (1, 0, W)."""
        if not prompt:
            return torch.zeros(1, 0, len(self.t5_embedder["bias"]), dtype=DOUBLE)
        ids = self.t5_tokenizer([prompt], padding="max_length", max_length=256, truncation=True, return_tensors="pt")
        hidden = self.t5(input_ids=ids["input_ids"]).last_hidden_state
        return F.linear(hidden, self.t5_embedder["weight"], self.t5_embedder["bias"])

    @torch.no_grad()
    def sample(
        self,
        reference: Image.Image,
        prompt: str,
        image: Image.Image,
        maps: list[tuple[FluxControlNetModel, Image.Image, int, float]],
        strength: float,
        steps: int,
        seed: int,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """Packed latents (1, L, C) of controls beside an image (no maps: img2img), with the scheduler's shift 1.

        maps: net, map, the union's mode, scale. The image and the maps have the output's size.
        """
        count, draws = 256 if prompt else 512, torch.Generator().manual_seed(seed)
        own, of_image = self.image_tokens(reference, count), self.image_tokens(image, count)
        if maps:
            n = min(own.shape[1], of_image.shape[1])
            own, of_image = own[:, :n], of_image[:, :n]
        t5 = self.t5_tokens(prompt)
        conditions = [
            self.encode_picture(picture, draws) for _, picture, _, _ in maps
        ]  # drawn first, as diffusers does
        z, height, width = self.encode_picture(image, draws), image.height // 16, image.width // 16
        noise = pack(torch.randn(1, z.shape[2] // 4, 2 * height, 2 * width, generator=draws, dtype=DOUBLE))
        rows, columns = (
            side.flatten() for side in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        )
        img_ids = torch.stack([torch.zeros_like(rows), rows, columns], 1).to(DOUBLE)
        sigmas = [1 - i / steps for i in range(steps)] + [0.0]
        sigmas = sigmas[int(steps - steps * strength) :]
        x = sigmas[0] * noise + (1 - sigmas[0]) * z
        for now, then in zip(sigmas, sigmas[1:]):
            common = {
                "hidden_states": x,
                "timestep": torch.tensor([now], dtype=DOUBLE),
                "guidance": torch.tensor([3.5], dtype=DOUBLE),
                "pooled_projections": pooled,
                "img_ids": img_ids,
                "return_dict": False,
            }
            double, single = 0, 0
            for (net, _, mode, scale), condition in zip(maps, conditions):
                # net_text = [context_embedder_net(connector(image tokens)); t5_embedder(T5 tokens)]
                text = torch.cat([net.context_embedder(of_image), t5], 1)
                a, b = embedded(net, text, **common, controlnet_cond=condition, controlnet_mode=torch.tensor([[mode]]))
                double, single = double + scale * torch.stack(a), single + scale * torch.stack(b)
            added = {} if not maps else {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
            text = torch.cat([self.flux.context_embedder(own), t5], 1)
            x = x + (then - now) * embedded(self.flux, text, **common, **added)[0]
        return x

    def encode_picture(self, picture: Image.Image, draws: torch.Generator) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(DOUBLE) / 127.5 - 1
        z = self.vae.encode(pixels).latent_dist.sample(draws)
        return pack((z - self.vae.config.shift_factor) * self.vae.config.scaling_factor)


def embedded(model, text: torch.Tensor, **kwargs) -> tuple:
    """The model's output for a text that is past its context_embedder."""
    own, model.context_embedder = model.context_embedder, torch.nn.Identity()
    try:
        return model(encoder_hidden_states=text, txt_ids=torch.zeros(text.shape[1], 3, dtype=DOUBLE), **kwargs)
    finally:
        model.context_embedder = own
