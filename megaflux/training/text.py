"""Human-readable numbers, and reports as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError

UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def duration(seconds: float) -> str:
    """Seconds in the largest unit that fits, three digits: "1.33 minutes"."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "seconds")
    return f"{seconds / UNITS[unit]:.3g} {unit}"


def write_json_report(path: str, report: dict[str, Any]) -> None:
    """Write the file of an option `--json FILE`, in place, since FILE may be /dev/stdout. Raises UserError."""
    try:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; give a file in a folder that can be written") from None
