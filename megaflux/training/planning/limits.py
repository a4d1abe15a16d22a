"""RUN/memory.json: how much memory each stage may plan with, after a GPU ran out.

{"bytes": {STAGE: BYTES}}    of memory.py's formula
"""

from __future__ import annotations

import json
from pathlib import Path

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.training import distributed
from megaflux.training.checkpoint import manifest

FILE = "memory.json"


def read(file: Path) -> dict[str, int]:
    """Stage -> bytes; {} if there is no file. Raises UserError if it cannot be read or is invalid."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        limits = content["bytes"]
        if not all(type(limit) is int and limit > 0 for limit in limits.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; delete it to plan the memory anew") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{file}: want {{"bytes": {{STAGE: BYTES}}}}; delete it to plan the memory anew') from None
    return limits


def read_for_all(file: Path, world: World) -> dict[str, int]:
    """`read` on rank 0, for all ranks; raises its UserError on all. Collective."""
    found: dict[str, int] | str = {}
    if world.is_main:
        try:
            found = read(file)
        except UserError as error:
            found = str(error)
    found = distributed.from_main(found, world)
    if isinstance(found, str):
        raise UserError(found, agreed=True)
    return found


def lower(file: Path, stage: str, limit: int, rank: int) -> None:
    """Write a stage's limit, unless a lower one is there. Durable on return. Raises OSError.

    Safe with concurrent writers: ranks share a plan, so the last write is not higher."""
    try:
        limits = read(file)
    except UserError:
        limits = {}
    limit = min(limit, limits.get(stage, limit))
    draft = file.with_name(f".{FILE}.{rank}")
    manifest.write_durably(draft, json.dumps({"bytes": limits | {stage: limit}}, indent=1) + "\n")
    draft.replace(file)
    manifest.sync(file.parent)
