"""Which machines of a run see the same folder, so that they can divide its files among them."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from megaflux.common.ranks import World, gathered

TOKEN = ".seen-by-"
FORGOTTEN = 3600.0  # s; a token older than this was left by a killed process


def share_of(folders: Sequence[Path], world: World) -> tuple[int, int]:
    """(this machine's number among those that see the same `folders`, how many they are). Collective.

    The first rank of each machine writes a file with a random name into each folder, and looks for the others' files.
    Two machines share the folders if each sees the other's file in all of them. Where nothing can be written, or in doubt
    (a copy, a stale view of network storage), a machine is alone: (0, 1).
    """
    if world.nodes == 1:
        return 0, 1
    node = world.rank // world.local_size
    token, written = f"{TOKEN}{secrets.token_hex(8)}", []
    if world.local_rank == 0:
        _remove_old(folders)
        with contextlib.suppress(OSError):
            for folder in folders:
                (folder / token).touch(exist_ok=False)
                written.append(folder / token)
    whole = bool(folders) and len(written) == len(folders)
    try:
        tokens = gathered(token if whole else None, world)[:: world.local_size]
        seen = [
            world.local_rank == 0 and other is not None and all((folder / other).exists() for folder in folders)
            for other in tokens
        ]
        views = gathered(seen, world)[:: world.local_size]  # also a barrier, after which the files may go
    finally:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()

    def mutual(a: int, b: int) -> bool:
        return views[a][b] and views[b][a]

    together = [other for other in range(world.nodes) if other == node or mutual(node, other)]
    # All of a group must agree on who is in it, or files would be left out.
    if any(mutual(a, b) != (b in together) for a in together for b in range(world.nodes) if a != b):
        return 0, 1
    return together.index(node), len(together)


def _remove_old(folders: Sequence[Path]) -> None:
    for folder in folders:
        for path in folder.glob(f"{TOKEN}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > FORGOTTEN:
                    path.unlink()
