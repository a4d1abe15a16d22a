"""Sections of a configuration, and types of fields: numbers within limits, and paths."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from megaflux.common.paths import expanded


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


def _home(value: str | None) -> str | None:
    return None if value is None else expanded(value)


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


MOST = 2**53  # of a count: up to there a float holds every whole number
MOST_SHARE = 1e12

NUMBER = BeforeValidator(_not_bool)
Fraction = Annotated[float, NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, NUMBER, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, NUMBER, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, NUMBER, Field(ge=0, le=MOST)]
COMMAS = BeforeValidator(_split)
"""Marks a field of several numbers, which a command line may write as 1,4."""
HOME = AfterValidator(_home)
"""Marks a field that holds a path (or a name that may stand in its place): a `~` at its beginning is expanded."""
HomePath = Annotated[str, HOME]
HomePathOrNone = Annotated[str | None, HOME]


class Section(BaseModel):
    """Frozen, and without unknown keys; a docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class Named(Section):
    """A section whose texts may be names of files: no NUL and no half of a surrogate pair in them."""

    @field_validator("*")
    @classmethod
    def _no_strange_characters(cls, value: Any) -> Any:
        if isinstance(value, str) and (bad := re.search("[\0\ud800-\udfff]", value)):
            what = "NUL" if bad[0] == "\0" else "half a surrogate pair, so not valid UTF-8"
            raise ValueError(f"character {bad.start() + 1} is {what}; take it out")
        return value
