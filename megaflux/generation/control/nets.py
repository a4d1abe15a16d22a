"""FLUX ControlNets in diffusers' layout: loading them, choosing the net of each map, and what they ignore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from megaflux.models.parameters import weights_fingerprint
from megaflux.models.pretrained import Models, move_to
from megaflux.models.strict import load_strict


class SummedControlNets(FluxMultiControlNetModel):
    """The sum of what ControlNets add to FLUX's blocks: one net for each map, or a single one for all maps.

    diffusers' class adds the nets' outputs pairwise: of nets of unequal depth, it drops the blocks that the shorter lacks and
    gives FLUX's blocks the wrong ones. Here each net's output is spread over FLUX's blocks first, as it is when it acts alone.
    """

    def __init__(self, nets: Sequence[FluxControlNetModel], num_blocks: tuple[int, int]):
        """num_blocks: FLUX's double and single blocks."""
        super().__init__(nets)
        self.num_blocks = num_blocks

    def forward(  # type: ignore[override]  # diffusers' pipelines give all by name
        self,
        *,
        controlnet_cond: Sequence[Tensor],
        controlnet_mode: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        guidance: Tensor | None = None,
        **common: Any,
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """(what is added to the double blocks, to the single blocks): (B, L, W) each; None for a kind of block that no net
        adds to.

        controlnet_cond, controlnet_mode, conditioning_scale: one for each map: (B, L, C), (B,), a factor. common: as
        FluxControlNetModel takes them. ValueError unless there is one of each for each map.
        """
        nets: list[Any] = [self.nets[0]] * len(controlnet_cond) if len(self.nets) == 1 else list(self.nets)
        outputs = []
        for net, image, mode, scale in zip(nets, controlnet_cond, controlnet_mode, conditioning_scale, strict=True):
            outputs.append(
                net(
                    controlnet_cond=image,
                    controlnet_mode=mode[:, None],
                    conditioning_scale=scale,
                    guidance=guidance if net.config.guidance_embeds else None,
                    **common,
                )
            )
        doubles, singles = zip(*outputs)
        repeat = nets[0].input_hint_block is not None  # as diffusers' pipelines tell FLUX to spread them
        return _sum(doubles, self.num_blocks[0], repeat), _sum(singles, self.num_blocks[1], False)


def _sum(outputs: Sequence[Sequence[Tensor] | None], num_blocks: int, repeat: bool) -> list[Tensor] | None:
    """The nets' outputs added; None: no net has any. Those of unequal length are spread over `num_blocks` first.

    repeat: whether FLUX takes them in turn, or each for several blocks in a row.
    """
    present = [list(output) for output in outputs if output is not None]
    if len({len(output) for output in present}) > 1:
        present = [_spread(output, num_blocks, repeat) for output in present]
    return [sum(block[1:], block[0]) for block in zip(*present, strict=True)] or None


def _spread(samples: list[Tensor], num_blocks: int, repeat: bool) -> list[Tensor]:
    """What FLUX adds to each of `num_blocks` blocks."""
    interval = -(-num_blocks // len(samples))
    return [samples[i % len(samples) if repeat else i // interval] for i in range(num_blocks)]


@dataclass
class ControlNets:
    """Loaded ControlNets."""

    nets: dict[str, FluxControlNetModel]
    """One net per kind of map, or under the key "" a single net: a union, or a net that takes any map."""
    num_blocks: tuple[int, int]
    """FLUX's double and single blocks."""

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
        readers = nets if len(nets) > 1 else nets * len(maps.images)
        # a net that is no union does not read the modes, but diffusers' pipelines count the maps by them
        modes = [
            _checked_number(number, net.config["num_mode"]) if net.union else 0 for net, number in zip(readers, numbers)
        ]
        if len({net.input_hint_block is None for net in nets}) > 1:
            raise UserError(
                "control: some of these ControlNets read pixels (XLabs') and others latents, which diffusers cannot "
                "prepare at once; give nets of one sort"
            )
        parts = list(zip(readers, maps.images, modes, maps.scales))
        # diffusers' pipelines pass the guidance on if the first net reads it
        parts.sort(key=lambda part: not part[0].config["guidance_embeds"])
        readers, images, modes, scales = (list(values) for values in zip(*parts))
        summed = SummedControlNets(readers if len(nets) > 1 else nets, self.num_blocks)
        return Control(summed, images, modes, scales, maps.start, maps.end)

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
    loaded = ControlNets(nets, (flux["num_layers"], flux["num_single_layers"]))
    loaded.to(device, dtype)
    return loaded


def not_honoured(encoded: Encoded, weighting: Weighting) -> list[str]:
    """Notes about token weights that a ControlNet ignores: diffusers gives its blocks no attention bias."""
    if encoded.control is not None:  # it is not given the references' tokens at all, as `encode` notes
        return []
    weighted = any(((r.weights > 0) & (r.weights != 1)).any() or r.strength != 1 for r in encoded.references)
    weighted = weighted or (weighting.preserve_mass and weighting.variety > 0)
    note = "the ControlNet itself sees the tokens that are left without their weights; FLUX sees both"
    return [note] if weighted else []
