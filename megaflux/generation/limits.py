"""The numbers that the arguments of a request may have, and what messages call them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaflux.common.errors import UserError
from megaflux.data.buckets import MULTIPLE

MAX_SEED = 2**63 - 1
MAX_COUNT = 100_000  # pictures of a request
MAX_SIDE = 8192  # px of a picture: four times FLUX's largest trained side; a larger number is a typing error


@dataclass(frozen=True)
class Limits:
    """The finite numbers that an argument may have."""

    least: float
    most: float = math.inf
    above: bool = False
    """`least` itself is not allowed."""
    below: bool = False
    """`most` itself is not allowed."""
    multiple: int = 1
    note: str = ""
    """What messages add about a value."""

    def allow(self, value: float) -> bool:
        """Whether a number is within the limits; nan and infinity are not."""
        low = self.least < value if self.above else self.least <= value
        high = value < self.most if self.below or self.most == math.inf else value <= self.most
        return low and high and (self.multiple == 1 or value % self.multiple == 0)

    def check(self, name: str, value: float) -> None:
        """UserError, with the name to show, for a number outside of the limits."""
        if not self.allow(value):
            raise UserError(f"{name}: {value}; use {self}")

    def __str__(self) -> str:
        if self.multiple > 1:
            words = f"a positive multiple of {self.multiple}, at most {self.most}"
        elif self.most == math.inf:
            words = f"a number above {self.least}" if self.above else f"at least {self.least}"
        elif self.above:
            words = f"a number above {self.least} and at most {self.most}"
        else:
            words = f"{self.least} to {'below ' if self.below else ''}{self.most}"
        return words + self.note


SIDE = Limits(MULTIPLE, MAX_SIDE, multiple=MULTIPLE)
LIMITS: Mapping[str, Limits] = {
    "count": Limits(1, MAX_COUNT),
    "seed": Limits(0, MAX_SEED),
    "batch_size": Limits(1),
    "steps": Limits(1, 100_000),
    "height": SIDE,
    "width": SIDE,
    "guidance": Limits(0),
    "cfg": Limits(0, 100, note=" (1 is off)"),
    "shift": Limits(0, above=True, note=" (1 is none)"),
    "strength": Limits(0, 1, above=True),
    "reference_strength": Limits(0, above=True, note=", or leave it out"),
    "reference_tokens": Limits(4),
    "background": Limits(0, note=" (1 is neutral)"),
    "variety": Limits(0, 1, below=True),
    "downsample": Limits(1, note=" (1 is none)"),
    "control_scale": Limits(0),
    "control_start": Limits(0, 1),
    "control_end": Limits(0, 1),
}
"""By the name of a Job's field, or of what it is a part of."""


Names = Callable[[str], str]
"""What messages call an argument, as `plain_name` does."""


PLAIN_NAMES = {"cfg": "true CFG scale", "negative": "negative prompt"}


def plain_name(name: str) -> str:
    """What messages call an argument outside of the command line: batch size for batch_size."""
    return PLAIN_NAMES.get(name) or name.replace("_", " ")


def check_numbers(values: Mapping[str, Any], name_of: Names = plain_name) -> None:
    """UserError for a number that LIMITS excludes, and for control that ends before it starts.

    values: by the names of LIMITS; other names and None are ignored. name_of: what the message calls such a name.
    """
    for name, limits in LIMITS.items():
        if (value := values.get(name)) is not None:
            limits.check(name_of(name), value)
    start, end = values.get("control_start"), values.get("control_end")
    if start is not None and end is not None and start >= end:
        raise UserError(
            f"{name_of('control_start')}: {start} is not before {name_of('control_end')} {end}; give a smaller one"
        )
