"""FLUX ControlNets in diffusers' layout: loading them, choosing the net of each map, and what they ignore."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
# From its own module: to a type checker, the names in diffusers/__init__.py are its stand-ins for missing packages.
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel, FluxMultiControlNetModel

from megaflux.common.errors import UserError
from megaflux.generation.condition import Encoded
from megaflux.generation.control.detectors import UNION_MODES
from megaflux.generation.dots.dots import Weighting
from megaflux.generation.request import ControlMaps
from megaflux.generation.sampling import Control
from megaflux.models.pretrained import Models, move_to, weights_fingerprint
from megaflux.models.strict import load_strict


@dataclass
class ControlNets:
    """Loaded ControlNets."""

    nets: dict[str, FluxControlNetModel]
    """One net per kind of map, or under the key "" a single net: a union, or a net that takes any map."""

    @property
    def union(self) -> bool:
        """Whether the net is a union, which reads maps of several kinds and is told each one's."""
        return any(net.union for net in self.nets.values())

    def fingerprints(self) -> dict[str, str]:
        """A hash of each net's weights that does not depend on their current dtype."""
        return {kind: weights_fingerprint(net, dtype=torch.bfloat16) for kind, net in self.nets.items()}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move and cast all nets."""
        for net in self.nets.values():
            move_to(net, device, dtype)

    def control(self, maps: ControlMaps) -> Control:
        """The maps (RGB, of the output's size) with the nets that read them. UserError for a kind that is unknown or
        has no net, for a map without a kind, and for more maps than the net reads."""
        numbers = [_union_number(kind) for kind in maps.kinds]
        if "" in self.nets:
            nets = [self.nets[""]]
            if not self.union and len(maps.images) > 1:
                raise UserError(
                    "control: this ControlNet is not a union and reads one map; give one, or KIND=DIR for each"
                )
        else:
            nets = [self._net_for(kind) for kind in maps.kinds]
        if self.union:
            modes = [_checked_number(number, nets[0].config["num_mode"]) for number in numbers]
        else:  # such a net does not read the modes, but diffusers' pipelines count the maps by them
            modes = [0] * len(maps.images)
        return Control(FluxMultiControlNetModel(nets), maps.images, modes, maps.scales, maps.start, maps.end)

    def _net_for(self, kind: str | int | None) -> FluxControlNetModel:
        if not isinstance(kind, str) or kind not in self.nets:
            raise UserError(f"control {kind}: no ControlNet for it; loaded are {', '.join(self.nets)}")
        return self.nets[kind]


def _union_number(kind: str | int | None) -> int | None:
    """A union's number of a kind. UserError for an unknown name."""
    if kind is None or isinstance(kind, int):
        return kind
    if kind not in UNION_MODES:
        raise UserError(f"control: unknown kind {kind!r}; use {', '.join(UNION_MODES)}")
    return UNION_MODES[kind]


def _checked_number(number: int | None, count: int) -> int:
    """UserError unless the union has a kind of that number."""
    if number is None or not 0 <= number < count:
        raise UserError(f"control: kind {number} is not one of this union's {count}; name the map's kind")
    return number


def load(sources: str | dict[str, str], models: Models, device: torch.device, dtype: torch.dtype) -> ControlNets:
    """Load the nets of one folder or hub name, or of one per kind of map.

    UserError for a missing or unexpected key or file, and for a net whose sizes are not the transformer's.
    """
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
    """Notes about token weights that a ControlNet ignores: diffusers gives its blocks no attention bias."""
    weighted = any(((r.weights > 0) & (r.weights != 1)).any() or r.strength != 1 for r in encoded.references)
    weighted = weighted or (weighting.preserve_mass and weighting.variety > 0)
    note = "the ControlNet itself sees the tokens that are left without their weights; FLUX sees both"
    return [note] if weighted else []
