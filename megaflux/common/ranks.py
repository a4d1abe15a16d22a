"""The ranks of the run, as the loader and streaming have to see them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megaflux.common.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run. A node is a set of ranks that share /dev/shm."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def nodes(self) -> int:
        """Nodes of the run, all of local_size ranks."""
        return self.size // self.local_size


def detect_world() -> World:
    """This process' place, from torch.distributed and the launcher's environment variables.

    Collective where there is more than one rank: all of them call it. Raises RuntimeError if
    torch.distributed is not initialised although there are several ranks, or contradicts the variables.
    """
    if dist.is_available() and dist.is_initialized():
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, 0, 1)
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group before build_loader")
    if (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise RuntimeError(f"RANK={rank}, WORLD_SIZE={size} contradict torch.distributed")
    machines: list[str] = [""] * size
    dist.all_gather_object(machines, _machine())
    local_size = machines.count(machines[rank])
    node = rank // local_size * local_size
    for start in range(0, size, local_size):
        if len(set(machines[start : start + local_size])) != 1 or machines.count(machines[start]) != local_size:
            raise RuntimeError("ranks must be numbered node by node, equally many on each")
    return World(rank, size, rank - node, local_size)


def barrier() -> None:
    """Wait for all ranks, where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def gathered(value: Any, world: World) -> list[Any]:
    """Every rank's value in the order of ranks, on every rank. Collective."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def raise_first(problem: str | None, world: World) -> None:
    """UserError, the same on all ranks, with the first problem that a rank has, if any. Collective."""
    problem = next((found for found in gathered(problem, world) if found), None)
    if problem:
        raise UserError(problem, agreed=True)


@contextlib.contextmanager
def as_streaming_sees(world: World) -> Iterator[None]:
    """Streaming reads its ranks from the environment while a dataset is made: set them to `world`.

    What the launcher says need not do: DeepSpeed's calls the local size LOCAL_SIZE, and two "nodes" on
    one machine, as in tests, would both create the same shared memory.
    """
    names = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _machine() -> str:
    """The same text for exactly those processes that share /dev/shm and the temporary folder."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text().strip() if boot.exists() else os.uname().nodename
    shared = os.stat("/dev/shm").st_dev if os.path.exists("/dev/shm") else 0
    return f"{identity} {shared} {tempfile.gettempdir()}"
