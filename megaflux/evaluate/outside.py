"""CLIP-I, CLIP-T and DINO-I: how alike pictures are to networks that others have trained, given as folders.

CLIP-I  cosine of CLIP's image embeddings of a made picture and of its reference (Ruiz et al., DreamBooth, 2208.12242, section 4)
CLIP-T  cosine of CLIP's embeddings of a made picture and of its words
DINO-I  cosine of the class tokens of DINO (2104.14294) or DINOv2 of a made picture and of its reference
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.common import compat  # noqa: F401  (before transformers)

# isort: split
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from megaflux.common.errors import UserError, one_line

AT_ONCE = 32  # pictures


class Embedder:
    """A network that embeds pictures, and words where it is a CLIP."""

    def __init__(self, option: str, folder: str, device: torch.device):
        """option: --clip or --dino. UserError for a folder that cannot be loaded or is of another kind."""
        wanted = "clip" if option == "--clip" else "dino"
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"{option} {folder}: no folder of a {wanted.upper()} (no config.json)")
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            fits = kind == "clip" if wanted == "clip" else kind.startswith("dino") or kind == "vit"
            if not fits:
                raise UserError(f"{option} {folder}: holds a {kind}, not a {wanted.upper()}")
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=True)
            self.tokenizer: Any = (
                AutoTokenizer.from_pretrained(folder, local_files_only=True) if wanted == "clip" else None
            )
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(f"{option} {folder}: cannot be loaded ({one_line(error)})") from None
        self.model.to(device).eval()
        self.device = device

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Tensor]) -> Tensor:
        """uint8 (3, H, W) each -> unit vectors (N, D)."""
        parts = []
        for start in range(0, len(pictures), AT_ONCE):
            inputs = self.processor(images=list(pictures[start : start + AT_ONCE]), return_tensors="pt")
            pixels = inputs["pixel_values"].to(self.device)
            if self.tokenizer is not None:
                found = self.model.get_image_features(pixel_values=pixels)
                found = getattr(found, "pooler_output", found)  # transformers 5
            else:
                found = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            parts.append(found.float().cpu())
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def words(self, words: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of texts, cut to CLIP's length."""
        parts = []
        for start in range(0, len(words), AT_ONCE):
            texts = list(words[start : start + AT_ONCE])
            inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
            found = self.model.get_text_features(**inputs)
            parts.append(getattr(found, "pooler_output", found).float().cpu())
        return F.normalize(torch.cat(parts), dim=1)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """(N,) of unit vectors (N, D) twice."""
    return (first * second).sum(dim=1)
