"""The ranks of a run: which one this process is, and what they tell one another."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megaflux.common.errors import UserError

CPU = torch.device("cpu")
HEARTBEAT = 2.0  # s between exchanges of ranks that wait for longer work; far below any collective's time limit
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank, size and device of this process.

    rank: 0 .. size - 1, numbered node by node. size: ranks of the run. device: the one that this rank computes on.
    local_rank, local_size: the same two within this node, a set of ranks that share /dev/shm.
    """

    rank: int
    size: int
    device: torch.device = CPU
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Nodes of the run, each with local_size ranks."""
        return self.size // self.local_size


def detect_world(device: torch.device = CPU) -> World:
    """The world as torch.distributed and the launcher's environment variables describe it. Collective.

    Raises RuntimeError where there are several ranks and torch.distributed is not initialized or contradicts the
    variables; UserError where the nodes have different numbers of ranks or the ranks are not numbered node by node.
    """
    if dist.is_available() and dist.is_initialized():
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group before detect_world")
    if (dist.get_rank(), dist.get_world_size()) != (rank, size):
        raise RuntimeError(f"RANK={rank}, WORLD_SIZE={size} contradict torch.distributed")
    machines: list[str] = [""] * size
    dist.all_gather_object(machines, _machine())
    local_size = machines.count(machines[rank])
    node = rank // local_size * local_size
    for start in range(0, size, local_size):
        if len(set(machines[start : start + local_size])) != 1 or machines.count(machines[start]) != local_size:
            raise UserError(
                "ranks: not numbered node by node, equally many on each; start them with deepspeed or torchrun",
                agreed=True,
            )
    return World(rank, size, device, rank - node, local_size)


def barrier(world: World) -> None:
    """Wait until every rank is here. Collective."""
    if world.size > 1:
        dist.barrier()


def gathered(value: Any, world: World) -> list[Any]:
    """Every rank's value in the order of ranks, on every rank. Collective."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def exchanged_until_done(state: Callable[[], tuple[bool, T]], world: World) -> Iterator[list[tuple[bool, T]]]:
    """Every rank's (done, value), exchanged until all ranks are done; the last exchange is yielded too. Collective.

    state: called before each exchange, for this rank's. For waits longer than a collective's time limit: the pause doubles
    from 0.05 s to HEARTBEAT."""
    pause = 0.05
    while True:
        found = gathered(state(), world)
        yield found
        if all(done for done, _ in found):
            return
        time.sleep(pause)
        pause = min(2 * pause, HEARTBEAT)


def raise_first(problem: str | None, world: World) -> None:
    """Raise a UserError, the same on all ranks, where any rank has a problem: the first one's. Collective."""
    problem = next((found for found in gathered(problem, world) if found), None)
    if problem:
        raise UserError(problem, agreed=True)


def first_problem(problem: str | None, world: World) -> str | None:
    """The first rank's problem, named by its rank unless that is 0, on every rank; None where no rank has one.

    problem: this rank's, or None. Collective."""
    found = enumerate(gathered(problem, world))
    return next((f"rank {rank}: {line}" if rank else line for rank, line in found if line is not None), None)


@contextlib.contextmanager
def as_streaming_sees(world: World) -> Iterator[None]:
    """Set the environment variables from which streaming reads its ranks while a dataset is opened.

    The launcher's own values may not do: DeepSpeed calls the local size LOCAL_SIZE, and two "nodes" on one machine, as
    in tests, would both create the same shared memory.
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
    """A text that is equal for two processes exactly if they share /dev/shm and the temporary folder."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text().strip() if boot.exists() else os.uname().nodename
    shared = os.stat("/dev/shm").st_dev if os.path.exists("/dev/shm") else 0
    return f"{identity} {shared} {tempfile.gettempdir()}"
