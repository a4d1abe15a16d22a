"""Where gradients flow in a stage: which linears need that of their input, and what each FLUX block computes and keeps for
its backward pass.

A tensor has a gradient if a trainable parameter is upstream of it: x_embedder -> image stream; Qwen2-VL's last layers ->
connector -> context_embedder -> text stream; time_text_embed -> modulations; a block -> all later ones. What has none has no
backward pass, and autograd keeps nothing for it. The names are diffusers'.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megaflux.training.stages import Stage, locate, trains


@dataclass(frozen=True)
class Stream:
    """One stream of a block: text or image in a double block, both joined in a single one. "has": has a gradient;
    "trains": a weight trains, so that its gradient needs the layer's input."""

    enters: bool
    """Has: the stream, at the block's input."""
    modulated: bool
    """Have: shift, scale and gate."""
    queries: bool
    """Have: the queries, before their norm, or the norm's weight."""
    keys: bool
    """Likewise."""
    qkv_trains: bool
    middle: bool
    """Has: the stream after attention. In a single block, whose MLP is beside attention, as `enters`."""
    mlp_in_trains: bool
    pre: bool
    """Has: the MLP's pre-activation."""
    mlp_out_trains: bool
    """In a single block: proj_out, which reads attention's output as well."""
    mlp: bool
    """Has: the MLP's output, so that its backward pass runs."""
    leaves: bool
    """Has: the stream, at the block's output."""


@dataclass(frozen=True)
class Block:
    """What gradients a FLUX block has."""

    streams: tuple[Stream, ...]
    """(text, image) of a double block, (joined,) of a single one."""
    attention: bool
    """Has: attention's q, k or v, so that its backward pass runs."""
    attended_trains: bool
    """Whether a weight that reads attention's output trains."""

    @property
    def single(self) -> bool:
        return len(self.streams) == 1

    @property
    def backward(self) -> bool:
        """Whether any of the block has a backward pass."""
        return any(stream.leaves for stream in self.streams)


@dataclass(frozen=True)
class Gradients:
    """Of FLUX in a stage."""

    blocks: Sequence[Block]
    """Double blocks first."""
    inputs: frozenset[str]
    """Names of the linears whose input has a gradient."""


def flux_gradients(transformer: nn.Module, stage: Stage) -> Gradients:
    """Gradients of FLUX in a stage, whose connector and Qwen layers are upstream of it. transformer: FluxTransformer2DModel,
    on any device. Cached per module, as planning asks for it hundreds of times."""
    known = _known.setdefault(transformer, {})
    if stage.trained not in known:
        known[stage.trained] = _Walk(transformer, stage).walk()
    return known[stage.trained]


_known: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Gradients]] = weakref.WeakKeyDictionary()

# (modulation, q, k, v, q norm, k norm, output, MLP) of the streams of a double block
_TEXT = (
    "norm1_context.linear",
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k"),
    *("attn.to_add_out", "ff_context"),
)
_IMAGE = (
    "norm1.linear",
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k"),
    *("attn.to_out.0", "ff"),
)


class _Walk:
    """A forward pass through the names of FLUX's layers."""

    def __init__(self, transformer: Any, stage: Stage):
        self.transformer = transformer
        double = len(transformer.transformer_blocks)
        self.trainable = {
            name
            for name, _ in transformer.named_parameters()
            if trains(locate(f"transformer.{name}", double), stage, 0)
        }
        self.conditioned = stage.connector or stage.vlm_layers > 0
        self.inputs: set[str] = set()

    def walk(self) -> Gradients:
        flux = self.transformer
        names = [name for name, module in flux.time_text_embed.named_children() if hasattr(module, "linear_2")]
        hidden = {name: self._through(f"time_text_embed.{name}.linear_1", False) for name in names}
        time = [self._through(f"time_text_embed.{name}.linear_2", hidden[name]) for name in names]
        temb = any(time)
        image, text = self._through("x_embedder", False), self._through("context_embedder", self.conditioned)
        blocks = []
        for i in range(len(flux.transformer_blocks)):
            block = self._double(f"transformer_blocks.{i}.", text, image, temb)
            text, image = (stream.leaves for stream in block.streams)
            blocks.append(block)
        joined = text or image
        for i in range(len(flux.single_transformer_blocks)):
            block = self._single(f"single_transformer_blocks.{i}.", joined, temb)
            joined = block.streams[0].leaves
            blocks.append(block)
        modulated = self._through("norm_out.linear", temb)
        self._through("proj_out", joined or modulated)
        return Gradients(blocks, frozenset(self.inputs))

    def _double(self, block: str, text: bool, image: bool, temb: bool) -> Block:
        streams = ((text, [block + name for name in _TEXT]), (image, [block + name for name in _IMAGE]))
        qkv, modulated = [], []
        for enters, (modulation, *names, _, _) in streams:
            modulated.append(self._through(modulation, temb))
            qkv.append(self._qkv(names, enters or modulated[-1]))
        attention = any(any(has) for has in qkv)
        found = []
        for (enters, names), has, gate in zip(streams, qkv, modulated, strict=True):
            *_, out, mlp = names
            middle = self._through(out, attention) or enters or gate
            pre = self._through(f"{mlp}.net.0.proj", middle)
            after = self._through(f"{mlp}.net.2", pre)
            found.append(
                Stream(
                    enters=enters,
                    modulated=gate,
                    queries=has[0],
                    keys=has[1],
                    qkv_trains=self._weight(*names[1:4]),
                    middle=middle,
                    mlp_in_trains=self._weight(f"{mlp}.net.0.proj"),
                    pre=pre,
                    mlp_out_trains=self._weight(f"{mlp}.net.2"),
                    mlp=after,
                    leaves=middle or after,
                )
            )
        return Block(tuple(found), attention, self._weight(*(names[-2] for _, names in streams)))

    def _single(self, block: str, enters: bool, temb: bool) -> Block:
        modulated = self._through(f"{block}norm.linear", temb)
        normed = enters or modulated
        names = [block + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.norm_q", "attn.norm_k")]
        has = self._qkv(names, normed)
        attention, pre = any(has), self._through(f"{block}proj_mlp", normed)
        after = self._through(f"{block}proj_out", attention or pre)
        stream = Stream(
            enters=enters,
            modulated=modulated,
            queries=has[0],
            keys=has[1],
            qkv_trains=self._weight(*names[:3]),
            middle=enters,
            mlp_in_trains=self._weight(f"{block}proj_mlp"),
            pre=pre,
            mlp_out_trains=self._weight(f"{block}proj_out"),
            mlp=after,
            leaves=normed or after,
        )
        return Block((stream,), attention, stream.mlp_out_trains)

    def _qkv(self, names: Sequence[str], normed: bool) -> tuple[bool, bool, bool]:
        """(q, k, v) of one stream with the weights of their norms. names: of q, k, v and the two norms."""
        q, k, v = (self._through(name, normed) for name in names[:3])
        return q or self._trains(names[3]), k or self._trains(names[4]), v

    def _through(self, linear: str, given: bool) -> bool:
        """Whether a linear's output has a gradient. given: whether its input has one."""
        if given:
            self.inputs.add(linear)
        return given or self._trains(linear)

    def _trains(self, layer: str) -> bool:
        return not self.trainable.isdisjoint((f"{layer}.weight", f"{layer}.bias"))

    def _weight(self, *layers: str) -> bool:
        return any(f"{layer}.weight" in self.trainable for layer in layers)
