"""What trains and how fast: the stages, and the optimizer's rates by part."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megaflux.config.fields import (
    MOST_SHARE,
    NUMBER,
    Count,
    CountOrZero,
    Fraction,
    Named,
    NonNegative,
    Positive,
    Section,
)

Part = Literal["flux", "connector", "vlm"]
PARTS: tuple[Part, ...] = get_args(Part)
ComponentSet = Literal["attention", "block", "model", "image_branch", "norms"]


class Rates(Section):
    """A learning rate for each part."""

    flux: Positive
    connector: Positive
    vlm: Positive


class Decays(Section):
    """A weight decay for each part."""

    flux: NonNegative
    connector: NonNegative
    vlm: NonNegative


class SomeRates(Section):
    """Learning rates of a stage; None: those of `optim`."""

    flux: Positive | None = None
    connector: Positive | None = None
    vlm: Positive | None = None


class SomeDecays(Section):
    """Weight decays of a stage; None: those of `optim`."""

    flux: NonNegative | None = None
    connector: NonNegative | None = None
    vlm: NonNegative | None = None


class Peak(NamedTuple):
    """A part's values in a stage."""

    lr: float
    """Learning rate at the top of the trapezoid."""
    weight_decay: float


def _listed(value: Any) -> Any:
    """A text that is no set is a list, with commas between its names and expressions."""
    if isinstance(value, str) and value not in get_args(ComponentSet):
        return (value,) if "{" in value else tuple(part.strip() for part in value.split(","))
    return value


class Stage(Named):
    name: str
    """Name in logs and checkpoints."""
    share: Annotated[float, NUMBER, Field(gt=0, le=MOST_SHARE, allow_inf_nan=False)]
    """Part of the updates, relative to the other stages' shares; where the shares add up to train.updates, the number of
    updates."""
    blocks: tuple[CountOrZero, ...] | Literal["all", "none"]
    """FLUX blocks that train: double blocks first, then single ones, counted from 0; or all; or none: nothing of FLUX trains,
    context_embedder neither."""
    components: Annotated[ComponentSet | tuple[str, ...], BeforeValidator(_listed)] = "attention"
    """The trainable parts of a listed block: attention (the released code's list) or block (all of it), both with
    context_embedder; image_branch (the image stream's own weights of double blocks) or norms (q and k norms, and the
    modulations of adaptive norms), both without; or a list of names (attn.to_q) and regular expressions over the names of a
    block's parameters and context_embedder's. model: all of FLUX, embedders and proj_out included."""
    connector: bool = True
    """Whether the connector trains."""
    vlm_layers: CountOrZero = 1
    """How many of Qwen2-VL's last layers train; 0: it is frozen."""
    lr: Positive | SomeRates | None = None
    """Peak learning rate in this stage, a number or by part as in `optim`; None, also for a part: `optim`'s."""
    weight_decay: NonNegative | SomeDecays | None = None
    """Likewise."""

    @field_validator("components")
    @classmethod
    def _expressions(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            if not value:
                raise ValueError("lists nothing; list names, or set blocks to none")
            for i, expression in enumerate(value):
                if not expression or expression in value[:i]:
                    raise ValueError(
                        f"lists {expression!r} twice; list it once" if expression else "lists an empty name"
                    )
                try:
                    re.compile(f"(?:{expression})")  # as it is used: (?i) and the like may stand at the beginning only
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(f"{expression!r} is neither a name nor a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _blocks_are_a_set(self) -> Stage:
        if isinstance(self.blocks, tuple):
            if not self.blocks:
                raise ValueError(f"stage {self.name!r} lists no blocks; list some or say all or none")
            twice = sorted({b for b in self.blocks if self.blocks.count(b) > 1})
            if twice:
                raise ValueError(f"stage {self.name!r} lists block {twice[0]} twice; list it once")
        if self.components == "model" and isinstance(self.blocks, tuple):
            raise ValueError(f"stage {self.name!r}: components model trains all of FLUX; set blocks to all")
        if self.blocks == "none" and not self.connector and not self.vlm_layers:
            raise ValueError(f"stage {self.name!r} trains nothing; list blocks, or let connector or vlm_layers train")
        return self

    def lists(self, block: int) -> bool:
        """Whether anything of a FLUX block may train."""
        return self.blocks == "all" or (self.blocks != "none" and block in self.blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of which anything trains."""
        trains = {"flux": self.blocks != "none", "connector": self.connector, "vlm": self.vlm_layers > 0}
        return tuple(part for part in PARTS if trains[part])

    @property
    def trained(self) -> tuple[Any, ...]:
        """What decides which parameters train; equal for stages that train the same."""
        return self.blocks, self.components, self.connector, self.vlm_layers


class Optim(Section):
    lr: Positive | Rates = 1e-5
    """Peak learning rate, a number or by part: {flux: 1e-6, connector: 1e-3, vlm: 1e-5}. A stage may have its own."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative | Decays = 0.1
    """A number or by part, likewise."""
    schedule: Literal["run", "per_stage"] = "run"
    """run: one trapezoid of the learning rate over the whole run; per_stage: one over each stage."""
    warmup_fraction: Fraction = 0.01
    """Part of all updates (n; with schedule per_stage, of a stage's) over which the rate rises linearly from lr / n to lr."""
    plateau_fraction: Fraction = 0.0
    """Part of all updates at lr; the rate then falls linearly to 0 at the end of the run, across stages (with schedule
    per_stage, of the stage)."""
    spike_sigma: NonNegative = 6.0
    """An update is dropped on all ranks if its gradient norm is this many standard deviations above the mean of the
    previous norms; 0: never. An update whose norm is not finite is always dropped."""
    spike_window: Count = 128
    """Number of norms in that mean. It is used from 64 norms on, and is reset at each stage."""
    large_gradient: Positive = 1e-3
    """A gradient value that is larger than this, whatever its sign and before clipping, counts as large."""
    large_gradient_share: Annotated[float, NUMBER, Field(gt=0, le=1)] | None = None
    """An update is dropped on all ranks if more than this share of its gradient's values is large. None: never; the share is
    logged either way (train/large_gradient_share)."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    ema_decay: Annotated[float, NUMBER, Field(ge=0, lt=1)] = 0.0
    """An average of the weights is kept beside them (an exponential moving average): after the n-th update that was taken it
    moves by 1 - min(ema_decay, (1 + n) / (10 + n)) of the way to them. 0: none."""

    @model_validator(mode="after")
    def _fits(self) -> Optim:
        if self.warmup_fraction + self.plateau_fraction > 1:
            raise ValueError("warmup_fraction + plateau_fraction is over 1; the whole run is 1")
        return self

    def peaks(self, stage: Stage) -> dict[Part, Peak]:
        """Learning rate and weight decay of each part in a stage."""
        return {
            part: Peak(_of(part, stage.lr, self.lr), _of(part, stage.weight_decay, self.weight_decay)) for part in PARTS
        }


def _of(part: Part, *values: Any) -> float:
    """A part's value: the first that is given, of numbers and values by part."""
    found = (getattr(value, part) if isinstance(value, Section) else value for value in values)
    return next(value for value in found if value is not None)


BY_PART = ("lr", "weight_decay")
"""Names of the fields, in `optim` and in a stage, that hold a number or a value for each part."""


def by_part(value: Any) -> Any:
    """Plain data of such a field: a number as one value for each part."""
    return dict.fromkeys(PARTS, value) if isinstance(value, int | float) and not isinstance(value, bool) else value
