"""FLUX ControlNets in diffusers' layout: loading, what belongs to which map, what they cannot honour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from megaflux.common import compat  # noqa: F401  (before diffusers)
from diffusers import FluxControlNetModel, FluxMultiControlNetModel

from megaflux.common.errors import UserError
from megaflux.generation.condition import Encoded
from megaflux.generation.dots.griddot import Weighting
from megaflux.generation.sampling import Control
from megaflux.models.pretrained import Models, cast, weights_fingerprint
from megaflux.models.strict import load_strict


@dataclass
class ControlNets:
    """Loaded nets: {"": union or one net for any map} or {kind: net}."""

    nets: dict[str, FluxControlNetModel]

    @property
    def union(self) -> bool:
        return any(net.union for net in self.nets.values())

    def fingerprints(self) -> dict[str, str]:
        """A hash of each net's weights, in whatever dtype they are."""
        return {kind: weights_fingerprint(net, dtype=torch.bfloat16) for kind, net in self.nets.items()}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        for net in self.nets.values():
            cast(net, device, dtype)

    def control(
        self,
        images: list[Image.Image],
        kinds: list[str | int | None],
        modes: list[int | None],
        scales: list[float],
        start: float,
        end: float,
    ) -> Control:
        """The maps with the nets that read them. UserError for a kind without a net and a map without a kind."""
        if "" in self.nets:
            nets = [self.nets[""]]
            if not self.union and len(images) > 1:
                raise UserError(
                    "control: this ControlNet is no union and reads one map; give one, or KIND=DIR for each"
                )
        else:
            lacking = next((kind for kind in kinds if kind not in self.nets), None)
            if lacking is not None:
                raise UserError(f"control {lacking}: no ControlNet for it; loaded are {', '.join(self.nets)}")
            nets = [self.nets[kind] for kind in kinds]
        if self.union:
            most = nets[0].config.num_mode
            for mode in modes:
                if mode is None or not 0 <= mode < most:
                    raise UserError(f"control: kind {mode} is not one of this union's {most}; name the map's kind")
        # A net for one kind reads no mode, but diffusers' pipelines count the maps by them.
        numbers = list(modes) if self.union else [0] * len(images)
        return Control(FluxMultiControlNetModel(nets), images, numbers, scales, start, end)


def load(sources: str | dict[str, str], models: Models, device: torch.device, dtype: torch.dtype) -> ControlNets:
    """Load nets strictly. UserError where a file is missing or foreign, or a net's sizes are not the transformer's."""
    sources = {"": sources} if isinstance(sources, str) else sources
    flux = models.trainable.transformer.config
    nets = {}
    for kind, source in sources.items():
        net = load_strict(FluxControlNetModel, source, torch_dtype=dtype)
        for name in (
            "in_channels",
            "joint_attention_dim",
            "pooled_projection_dim",
            "num_attention_heads",
            "attention_head_dim",
        ):
            if net.config[name] != flux[name]:
                raise UserError(
                    f"{source}: {name} {net.config[name]}, the transformer has {flux[name]}; use another ControlNet"
                )
        nets[kind] = net.requires_grad_(False).eval()
    loaded = ControlNets(nets)
    loaded.to(device, dtype)
    return loaded


def not_honoured(encoded: Encoded, weighting: Weighting) -> list[str]:
    """What of the weights a ControlNet does not see: diffusers gives its blocks no attention bias."""
    weighted = any(((r.weights > 0) & (r.weights != 1)).any() or r.strength != 1 for r in encoded.references)
    weighted = weighted or (weighting.preserve_mass and weighting.variety > 0)
    note = "the ControlNet itself sees the tokens that are left without their weights; FLUX sees both"
    return [note] if weighted else []
