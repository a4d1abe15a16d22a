"""Staged training: which parameters a stage trains, and the hooks that keep all others frozen.

A parameter's name decides, by exactly one row of PATTERNS. A name that matches no row or several is an error, and so is a
stage that matches no parameter. Names are those of Qwen2VLFlux: transformer.* (diffusers' FLUX), connector.*, vlm.*
(Qwen2-VL's last layers and final norm).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from megaflux.common.errors import FrozenParameterError, UserError
from megaflux.training import components

if TYPE_CHECKING:  # needs pydantic, which benches do without
    from megaflux.config.recipe import Part


class Stage(Protocol):
    """What this file reads of `config.recipe.Stage`."""

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> tuple[int, ...] | Literal["all", "none"]: ...

    @property
    def components(self) -> str | tuple[str, ...]: ...

    @property
    def connector(self) -> bool: ...

    @property
    def vlm_layers(self) -> int: ...

    @property
    def trained(self) -> tuple[Any, ...]: ...

    def lists(self, block: int) -> bool: ...


@dataclass(frozen=True)
class PlainStage:
    """A Stage for benches of FLUX alone, on machines without pydantic."""

    blocks: tuple[int, ...] | Literal["all", "none"]
    components: str | tuple[str, ...]
    name: str = "bench"
    connector: bool = True
    vlm_layers: int = 0

    @property
    def trained(self) -> tuple[Any, ...]:
        return self.blocks, self.components, self.connector, self.vlm_layers

    def lists(self, block: int) -> bool:
        return self.blocks == "all" or (self.blocks != "none" and block in self.blocks)


# (part, pattern): the part a parameter belongs to. Ordered for the reader; the patterns are mutually exclusive.
PATTERNS: tuple[tuple[str, str], ...] = (
    ("vlm", r"vlm\.layers\.(?P<layer>\d+)\.(?P<component>.+)"),  # the last ones, as many as the stage says
    ("vlm_norm", r"vlm\.norm\.(?P<component>.+)"),  # never trains
    ("connector", r"connector\.(?P<component>.+)"),
    ("double", r"transformer\.transformer_blocks\.(?P<block>\d+)\.(?P<component>.+)"),
    ("single", r"transformer\.single_transformer_blocks\.(?P<block>\d+)\.(?P<component>.+)"),
    ("context_embedder", r"transformer\.(?P<component>context_embedder\..+)"),
    ("embedder", r"transformer\.(?P<component>(x_embedder|time_text_embed|norm_out|proj_out)\..+)"),  # set model only
)


@dataclass(frozen=True)
class Place:
    """The part and block that a parameter belongs to."""

    part: str
    """A row of PATTERNS."""
    component: str
    block: int | None
    """Index over all FLUX blocks, double ones first; None outside the blocks."""
    layer: int | None = None
    """Index over Qwen2-VL's layers in the module; None outside them."""

    @property
    def group(self) -> Part:
        """The part named in tables and TensorBoard, and by learning rates: flux, connector or vlm."""
        groups: dict[str, Part] = {"vlm": "vlm", "vlm_norm": "vlm", "connector": "connector"}
        return groups.get(self.part, "flux")


@cache  # a dry run of dev asks half a million times about 1,182 names
def locate(name: str, num_double: int) -> Place:
    """A parameter's place. num_double: number of FLUX's double blocks, which are numbered before the single ones. Raises
    ValueError for a name that does not match exactly one pattern."""
    found = [(part, match) for part, pattern in PATTERNS if (match := re.fullmatch(pattern, name))]
    if len(found) != 1:
        raise ValueError(f"parameter {name} matches {len(found)} freezing patterns; it must match exactly one")
    part, match = found[0]
    number, layer = (match.groupdict().get(name) for name in ("block", "layer"))
    block = None if number is None else int(number) + (num_double if part == "single" else 0)
    return Place(part, match["component"], block, None if layer is None else int(layer))


def count_double(module: nn.Module) -> int:
    """Number of FLUX's double blocks in a Qwen2VLFlux."""
    return len(_blocks(module, "transformer_blocks"))


def _blocks(module: nn.Module, name: str) -> nn.ModuleList:
    return cast(nn.ModuleList, module.get_submodule(f"transformer.{name}"))


def trains(place: Place, stage: Stage, layers: int) -> bool:
    """Whether a parameter trains in a stage. layers: how many of Qwen2-VL's layers are in the module."""
    if place.part == "connector":
        return stage.connector
    if place.layer is not None:
        return place.layer >= layers - stage.vlm_layers
    if place.part == "vlm_norm" or stage.blocks == "none":
        return False
    if place.part == "embedder":
        return stage.components == "model"
    if place.block is not None and not stage.lists(place.block):
        return False
    return components.holds(stage.components, cast(components.Kind, place.part), place.component)


def trainable_names(module: nn.Module, stage: Stage) -> list[str]:
    """Names of the parameters of a Qwen2VLFlux that a stage trains, in the module's order.

    Raises UserError if a listed block, or the whole list, matches no parameter, if `components` lists a name that is not
    there or a parameter twice, and if the module holds fewer of Qwen2-VL's layers than the stage trains.
    """
    num_double = count_double(module)
    places = {name: locate(name, num_double) for name, _ in module.named_parameters()}
    layers = len({place.layer for place in places.values()} - {None})
    if stage.vlm_layers > layers and hasattr(module, "vlm"):  # benches have FLUX alone
        raise UserError(
            f"stage {stage.name!r}: trains {stage.vlm_layers} of Qwen2-VL's last layers, and {layers} are apart from the "
            "frozen trunk; raise model.vlm_layers"
        )
    listed = {place.part for place in places.values() if place.block is not None and stage.lists(place.block)}
    kinds = [kind for kind in ("double", "single") if kind in listed]
    if kinds and (problem := components.list_problem(stage.components, cast(list[components.Kind], kinds))):
        raise UserError(f"stage {stage.name!r}: components: {problem}")
    names = [name for name, place in places.items() if trains(place, stage, layers)]
    matched = {places[name].block for name in names}
    if isinstance(stage.blocks, tuple) and (missing := [b for b in stage.blocks if b not in matched]):
        raise UserError(f"stage {stage.name!r}: block {missing[0]} matches no parameter")
    embeds = isinstance(stage.components, tuple) and any(places[name].part == "context_embedder" for name in names)
    if stage.blocks == "all" and matched <= {None} and not embeds:
        raise UserError(f"stage {stage.name!r}: block list matches no parameter")
    return names


def first_stages(module: nn.Module, stages: Iterable[Stage], upto: int) -> dict[str, int]:
    """For each parameter that stage `upto` (an index) trains: the first of the consecutive stages up to it that train it.

    Adam's moments are carried over exactly these stages, so parameters with the same value have taken the same number of
    steps. It depends on the configuration alone, so a resumed run groups parameters as the first one did.
    """
    sets = [set(trainable_names(module, stage)) for stage in list(stages)[:upto]]
    firsts = {}
    for name in trainable_names(module, list(stages)[upto]):
        first = upto
        while first > 0 and name in sets[first - 1]:
            first -= 1
        firsts[name] = first
    return firsts


class FreezingHooks:
    """Freezes every parameter of a module except the given ones.

    The mask is applied at once, before the first graph is built. A hook on every frozen parameter raises an error with its
    name if a gradient reaches it; with label_blocks, further hooks label each FLUX block for torch.profiler. `remove()`
    restores the module as it was.
    """

    def __init__(self, module: nn.Module, trainable: Iterable[str], label_blocks: bool = False):
        self.module = module
        self.trainable = frozenset(trainable)
        self.found = {name: p.requires_grad for name, p in module.named_parameters()}
        unknown = self.trainable - set(self.found)
        if unknown:
            raise ValueError(f"no parameter named {sorted(unknown)[0]}; freezing patterns must match parameters")
        self.handles: list[Any] = []
        for name, parameter in module.named_parameters():
            if name not in self.trainable:
                # PyTorch allows hooks only on tensors that require a gradient: register first, then freeze.
                parameter.requires_grad_(True)
                self.handles.append(parameter.register_hook(partial(_refuse_gradient, name)))
        if label_blocks:
            self._label_blocks()
        self.apply()

    def apply(self) -> None:
        """Set requires_grad of every parameter by the mask, and delete the gradients of frozen ones."""
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self.trainable)
            if name not in self.trainable:
                parameter.grad = None

    def check(self) -> None:
        """Call before each optimizer step: raises FrozenParameterError if a frozen parameter has a gradient."""
        for name, parameter in self.module.named_parameters():
            if name not in self.trainable and parameter.grad is not None:
                _refuse_gradient(name, parameter.grad)

    def remove(self) -> None:
        """Remove all hooks and restore every parameter's requires_grad."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.found[name])

    def _label_blocks(self) -> None:
        blocks = [*_blocks(self.module, "transformer_blocks"), *_blocks(self.module, "single_transformer_blocks")]
        for index, block in enumerate(blocks):
            running: list[torch.profiler.record_function] = []
            self.handles.append(block.register_forward_pre_hook(partial(_enter_label, f"flux.block{index}", running)))
            self.handles.append(block.register_forward_hook(partial(_leave_label, running), always_call=True))


def _refuse_gradient(name: str, gradient: Tensor) -> None:
    raise FrozenParameterError(f"a gradient reached {name}, which this stage keeps frozen; something unfroze it")


def _enter_label(label: str, running: list[Any], module: nn.Module, args: tuple[Any, ...]) -> None:
    running.append(torch.profiler.record_function(label).__enter__())


def _leave_label(running: list[Any], module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    if running:
        running.pop().__exit__(None, None, None)
