"""The fields of a run's configuration, each with its unit and the meaning of None; the text under a field is its --help.

A Config is frozen and is saved beside the run. It holds everything that a run's result depends on, and nothing else.
Where its values come from: megaflux/config/command_line.py.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from megaflux.config import plain_yaml
from megaflux.config.data import Data
from megaflux.config.fields import (
    COMMAS,
    HOME,
    MOST,
    Count,
    CountOrZero,
    HomePath,
    HomePathOrNone,
    Named,
    NonNegative,
    Positive,
    Section,
)
from megaflux.config.recipe import Optim, Stage

GENERATION_GUIDANCE = 3.5
"""What FLUX's guidance embedding gets in generation unless told otherwise: the value that FLUX.1-dev is used with."""


def _policy(value: Any) -> Any:
    """activation_checkpointing as older configurations wrote it, true or false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class Run(Named):
    dir: HomePath
    """Folder of the run: configuration, TensorBoard events, checkpoints, samples."""
    seed: CountOrZero = 0
    """Seed of everything random: weights that are not loaded, shuffling, t, noise."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue if the run folder holds a checkpoint, else start; never: refuse a folder that holds one;
    must: refuse to start from nothing."""


class Model(Named):
    flux: HomePathOrNone = None
    """FLUX.1 in diffusers' layout (transformer, VAE, scheduler, CLIP): a folder, or a hub name: hub:owner/name always,
    owner/name where the working directory holds no folder owner (here and for vlm and vae). None: the
    transformer and CLIP are built from `flux_config` and `clip_config` with seeded random weights, the VAE is
    `vae`."""
    vlm: HomePathOrNone = None
    """Qwen2-VL: a folder, a hub name, or `tiny` for the shipped one, of the preset tiny's `vlm_config`. None: built from `vlm_config`
    with seeded random weights."""
    vae: HomePathOrNone = None
    """A VAE other than the one in `flux`: a folder, a hub name, or `tiny` or `tiny-icons` (shipped; the second was trained further
    on five icon sets). None: `flux`'s own."""
    flux_config: dict[str, Any]
    """Arguments of diffusers' FluxTransformer2DModel, for a model that is not loaded and for a dry run."""
    vlm_config: dict[str, Any]
    """`text_config` and `vision_config` of transformers' Qwen2VLConfig, used likewise."""
    clip_config: dict[str, Any]
    """Arguments of transformers' CLIPTextConfig, used likewise."""
    init: HomePathOrNone = None
    """What training begins from: an export, a converted release, a run (its newest whole checkpoint) or `tiny` (shipped: the
    tiny preset's with `vae` tiny-icons, which learned from pictures, from words, and from words beside pictures by the same
    hand), whose transformer, connector and Qwen layers replace those of the sources above; copied into the run's folder
    when it begins. None: the sources as they are, with a connector drawn from the seed."""
    vlm_layers: CountOrZero | None = None
    """How many of Qwen2-VL's last layers are apart from the frozen trunk, so that stages may train them; fixed when a run
    begins. None: the most that any stage trains."""
    seeded: Literal["portable", "torch"] = "portable"
    """How weights that are not loaded are drawn from the seed: portable, the same bits on every CPU (the connector's always
    are); torch, with torch's own kernels, whose last bits depend on the CPU's instruction set (runs that are older than this
    field)."""
    latent_channels: Count
    """Channels of the VAE's latents (8x smaller than the image); FLUX sees four times as many after
    packing."""
    kernels: Literal["on", "off"] = "on"
    """on: FLUX and the connector run on megaflux_kernels (Triton on a GPU, torch on a CPU; not under ZeRO-3, which
    gathers weights module by module); off: diffusers' own path."""
    activation_checkpointing: Annotated[Literal["auto", "none", "mlp", "full"], BeforeValidator(_policy)] = "auto"
    """What the backward pass recomputes instead of storing: none, mlp (the first product of the MLP in each FLUX block;
    needs kernels), full (each FLUX block, and the Qwen layer), auto (chosen per block from the GPU's memory). Gradients are
    the same. true and false are read as full and none."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of Qwen2-VL, as transformers names it; FLUX always uses scaled_dot_product_attention."""
    vlm_max_tokens: Count = 512
    """Most image tokens (28 x 28 px each) that a reference is encoded to; larger references are scaled
    down."""
    caption_max_tokens: Count = 256
    """Captions are cut after this many tokens."""


class Train(Section):
    updates: Count
    """Optimizer steps of the whole run. More of them may be given to a run that is resumed: the running stage gets them, the
    last one if all are finished, or stages that are appended."""
    stage_ends: tuple[Count, ...] | None = None
    """Updates of the run at each stage's end. None: by the stages' shares. Set by a run that was given more updates."""
    ended_at: tuple[Count, ...] = ()
    """Updates at which the run had ended before it was given more; their checkpoints stay. Set by the run."""
    global_batch_size: Count
    """Images per update over all ranks; a multiple of what all ranks draw at a time."""
    drawn_per_rank: Count | None = None
    """Images of one aspect bucket that a rank draws at a time; all ranks draw from the same bucket. Fixed when a run
    begins; at most global_batch_size / ranks. None: micro_batch_size if that is a number."""
    micro_batch_size: Count | Literal["auto"] | None
    """Images per forward pass and rank: a divisor of drawn_per_rank, and at most that. auto: the divisor with the most
    images per second as predicted for each stage from the GPU's memory and speed; drawn_per_rank on a device of unknown
    speed (a CPU). None: drawn_per_rank, or global_batch_size / ranks where that is None too."""
    checkpoint_every: Count
    """Updates between checkpoints; one is written at each stage's end as well."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints kept; older ones are deleted (a stage's last one stays)."""
    keep_every: CountOrZero = 0
    """A checkpoint at a multiple of this many updates is never deleted, nor is a stage's last one; 0: only the latter."""
    hang_timeout: Positive = 1800.0
    """Seconds without an update, a validation batch or a step of a picture after which a rank dumps its stacks and exits
    with code 11. Must exceed the longest save and the longest change of stage; does not apply to the start."""
    leave_within: Positive | None = None
    """Seconds that the current update may still take after a signal that asks to stop; the save that follows is not
    counted. Both together must fit into the time that the queue or launcher grants. None: 25, or three times the longest
    update of this process if that is more."""
    bad_updates: Count = 10
    """Consecutive dropped updates after which the run rolls back to its last checkpoint and skips their data."""
    deterministic: bool = False
    """Bit-identical repetition on GPUs too: torch's deterministic algorithms, flash attention's ordered backward pass, no
    cuDNN attention. The cost in speed was not measured. A run on a CPU is always deterministic. May be changed on
    resuming."""
    stop_after: CountOrZero = 0
    """Save and exit after this many updates of the run, as if its time were up; 0: run to the end."""

    @property
    def given_micro_batch(self) -> int | None:
        """micro_batch_size if it is a number, else None."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


class Flow(Section):
    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Density of t in training."""
    logit_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    logit_std: Positive = 1.0
    shift: Literal["resolution", "none"] | Positive = "resolution"
    """Shift of t towards noise: resolution (FLUX's, by the number of image tokens), a factor, or none."""
    guidance: Annotated[NonNegative | tuple[NonNegative, NonNegative], COMMAS] = 1.0
    """Value fed to FLUX's guidance embedding in training, or two numbers: drawn uniformly between them for each sample."""

    @field_validator("guidance")
    @classmethod
    def _rises(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"{value[0]:g} is above {value[1]:g}; give the smaller number first")
        return value

    @property
    def middle_guidance(self) -> float:
        """The guidance value of training, or the middle of its range."""
        return sum(self.guidance) / 2 if isinstance(self.guidance, tuple) else self.guidance


class Validation(Section):
    every: CountOrZero
    """Updates between seeded validation losses; 0: only at the start and at each stage's end."""
    samples: Count = 64
    """Held-out references, square, drawn by hash; at most as many as there are."""
    panel_every: CountOrZero
    """Updates between panels of variations; 0: only at each stage's end."""
    panel_samples: Count = 4
    """References in the panel, and variations of each."""
    steps: Count = 28
    """Euler steps of a variation."""


class Monitor(Section):
    every: Count = 10
    """Updates between TensorBoard points."""
    grad_norms_every: CountOrZero = 100
    """Updates between gradient norms by part and block (an all-reduce per parameter); 0: never."""
    peak_tflops: Positive | None = None
    """Peak of one device for MFU, TFLOP/s. None: known by the GPU's name, or measured at the start with a matrix
    product."""
    label_blocks: bool = False
    """Name each FLUX block in torch.profiler's traces."""


class Config(Section):
    preset: str
    run: Run
    model: Model
    data: Data
    stages: tuple[Stage, ...]
    """List of stages, each with name, share, blocks, components, connector, vlm_layers, lr and weight_decay
    (docs/recipes.md)."""
    train: Train
    optim: Optim = Optim()
    flow: Flow = Flow()
    validation: Validation
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _stages_fit(self, info: ValidationInfo) -> Config:
        if not self.stages:
            raise ValueError("stages: no stage; list at least one")
        num_blocks = sum(self._number_of_blocks(name) for name in ("num_layers", "num_single_layers"))
        for i, stage in enumerate(self.stages):
            out = [b for b in stage.blocks if b >= num_blocks] if isinstance(stage.blocks, tuple) else []
            if out:
                raise ValueError(f"stages.{i}.blocks: {out[0]} is out of range; blocks are 0 to {num_blocks - 1}")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("stages: two stages have the same name; give each its own")
        if ends := self.train.stage_ends:
            in_order = all(start < end for start, end in pairwise(ends))
            if len(ends) != len(names) or ends[-1] != self.train.updates or not in_order:
                raise ValueError(
                    f"train.stage_ends: {list(ends)} must rise to train.updates ({self.train.updates}), one number for each "
                    f"of {len(names)} stages; leave it out, and the stages' shares count"
                )
        # Where a run that is resumed has its ends is decided later (training/checkpoint/extend.py).
        if min(self.stage_updates()) < 1 and not (info.context or {}).get("resumed"):
            shares = [stage.share for stage in self.stages]
            enough = math.fsum(shares) / min(shares)
            remedy = (
                f"use at least {math.ceil(enough)} or drop stages" if enough <= MOST else "raise the smallest share"
            )
            raise ValueError(f"train.updates: {self.train.updates} leaves a stage without updates; {remedy}")
        return self

    def _number_of_blocks(self, name: str) -> int:
        count = self.model.flux_config.get(name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"model.flux_config.{name}: must be a whole number of blocks, got {count!r}")
        return count

    @model_validator(mode="after")
    def _layers_fit(self) -> Config:
        most, text = max(stage.vlm_layers for stage in self.stages), self.model.vlm_config.get("text_config")
        if self.model.vlm_layers is not None and self.model.vlm_layers < most:
            raise ValueError(
                f"model.vlm_layers: {self.model.vlm_layers}, but a stage trains {most} of Qwen2-VL's last layers; raise it, "
                "or lower the stage's vlm_layers (a run that has begun keeps its model.vlm_layers)"
            )
        there = text.get("num_hidden_layers") if isinstance(text, dict) and self.model.vlm in (None, "tiny") else None
        if isinstance(there, int) and self.vlm_layers > there:  # a folder's number is looked at when it is opened
            over = [f"stages.{i}" for i, stage in enumerate(self.stages) if stage.vlm_layers > there] or ["model"]
            raise ValueError(f"{over[0]}.vlm_layers: {self.vlm_layers}, but Qwen2-VL has {there} layers; lower it")
        return self

    @model_validator(mode="after")
    def _cache_fits(self) -> Config:
        if "latents" in self.data.cache and self.data.sample_posterior:
            raise ValueError("data.cache: cached latents are the posterior's mean; set data.sample_posterior false")
        if "trunk" in self.data.cache and (self.data.reference_crop < 1 or self.data.reference_flip):
            raise ValueError(
                "data.cache: a cached trunk has seen the references as they are; set data.reference_crop 1 and reference_flip 0"
            )
        return self

    def for_world(self, world_size: int) -> Config:
        """The configuration with numbers for train.drawn_per_rank and train.micro_batch_size, which depend on the number of
        ranks. `auto` is drawn_per_rank here; training/planning/micro_batch.py chooses a better one later."""
        train, share = self.train, max(1, self.train.global_batch_size // world_size)
        wanted = train.given_micro_batch
        drawn = min(train.drawn_per_rank or wanted or share, share)
        return self.with_batches(drawn, min(wanted or drawn, drawn))

    def with_batches(self, drawn_per_rank: int, micro_batch_size: int) -> Config:
        """The configuration with these two in `train`."""
        sizes = {"drawn_per_rank": drawn_per_rank, "micro_batch_size": micro_batch_size}
        return self.model_copy(update={"train": self.train.model_copy(update=sizes)})

    @property
    def vlm_layers(self) -> int:
        """Number of Qwen2-VL's last layers that are apart from the frozen trunk."""
        most = max(stage.vlm_layers for stage in self.stages)
        return most if self.model.vlm_layers is None else self.model.vlm_layers

    @property
    def trunk_share(self) -> float:
        """The share of the updates that run the frozen trunk. Without a cached trunk 1, for simplicity with empty conditions too; with
        one the share of conditions with words, since a cache holds its output for pictures alone."""
        with_words = self.data.condition.image_text + self.data.condition.text
        return with_words if "trunk" in self.data.cache else 1.0

    @property
    def cache_keeps_pictures(self) -> bool:
        """Whether a cache holds the pictures' files too: what it does not hold is computed from them."""
        return len(self.data.cache) < 2 or self.data.condition.image_text > 0

    @property
    def rates_by_part(self) -> bool:
        """Whether the parts' learning rates or weight decays differ in any stage, so that each is a group of its own."""
        return any(len(set(self.optim.peaks(stage).values())) > 1 for stage in self.stages)

    def stage_ends(self) -> list[int]:
        """Updates of the run at each stage's end; the last is train.updates."""
        if self.train.stage_ends is not None:
            return list(self.train.stage_ends)
        total = math.fsum(stage.share for stage in self.stages)
        ends, reached = [], 0.0
        for stage in self.stages:
            reached += stage.share
            ends.append(round(self.train.updates * reached / total))
        return ends

    def stage_updates(self) -> list[int]:
        """Updates of each stage."""
        ends = self.stage_ends()
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def to_yaml(self) -> str:
        """The configuration as text that `--config` reads back equal."""
        return plain_yaml.dump(self.model_dump())  # mode="json" would turn .inf into null


PATHS = tuple(
    f"{name}.{field}"
    for name, section in (("run", Run), ("model", Model), ("data", Data))
    for field, info in section.model_fields.items()
    if HOME in info.metadata
)
"""Dotted names of the fields that hold a path."""


def field_paths(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """{dotted name: help text} of every field; `stages` is one field."""
    paths: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
        else:
            paths[prefix + name] = " ".join((field.description or "").split())
    return paths


def is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a field's annotation is a section of fields."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
