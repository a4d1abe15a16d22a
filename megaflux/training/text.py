"""Numbers as text for a person."""

from __future__ import annotations

UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def duration(seconds: float) -> str:
    """Seconds in the largest unit that fits, three digits: "1.33 minutes"."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "seconds")
    return f"{seconds / UNITS[unit]:.3g} {unit}"
