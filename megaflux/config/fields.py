"""Types of fields: numbers within limits, and paths."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from megaflux.common.paths import expanded


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read true as 1
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


def _home(value: str | None) -> str | None:
    return None if value is None else expanded(value)


MOST = 2**53  # of a count: up to there a float holds every whole number
MOST_SHARE = 1e12

NUMBER = BeforeValidator(_not_bool)
Fraction = Annotated[float, NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, NUMBER, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, NUMBER, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, NUMBER, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, NUMBER, Field(ge=0, le=MOST)]
HOME = AfterValidator(_home)
"""Marks a field that holds a path (or a name that may stand in its place): a `~` at its beginning is expanded."""
HomePath = Annotated[str, HOME]
HomePathOrNone = Annotated[str | None, HOME]
