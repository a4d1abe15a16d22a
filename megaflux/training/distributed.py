"""Ranks, devices and random numbers."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, detect_world, exchanged_until_done
from megaflux.training.determinism import make_deterministic
from megaflux.training.survival import rendezvous
from megaflux_kernels import cudnn

log = logging.getLogger("megaflux")
# How long a rank waits in a collective for the others: one of them may be sampling a panel or hashing a checkpoint.
PATIENCE = timedelta(hours=2)


def start(quiet: bool = True, deterministic: bool = False) -> World:
    """Join the process group that deepspeed, torchrun or srun describes in the environment, or form one of this process.

    Call it before opening any streaming dataset (mosaicml/streaming #307). quiet: only warnings of DeepSpeed's.
    deterministic: see `determinism`. Raises UserError where the ranks cannot meet at MASTER_ADDR and MASTER_PORT, or
    where the environment rules out `deterministic`.
    """
    if deterministic:
        make_deterministic()
    _describe_lone_process()
    if not dist.is_initialized():
        rendezvous.check()
    import deepspeed

    # DeepSpeed's CPU backend would compile a shared-memory all-reduce (25 s the first time, 66 MiB left in /dev/shm
    # per rank) that only its inference engine calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        deepspeed.init_distributed(verbose=not quiet, timeout=PATIENCE)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise rendezvous.in_words(error) from None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        # torch's fused attention on CPUs is slow in bf16 (backward 9 x the plain products' at 89 tokens of 4 x 32).
        torch.backends.cuda.enable_flash_sdp(False)
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that each take every core get in each other's way
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    world = detect_world(device)
    level = logging.INFO if world.is_main else logging.WARNING
    logging.basicConfig(format="%(message)s")
    log.setLevel(level)
    if warning := cudnn.leave_out_if_wrong():
        log.log(logging.WARNING if world.is_main else logging.DEBUG, warning)
    return world


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _describe_lone_process() -> None:
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
        # srun with a task per GPU: Slurm numbers the tasks, the job script exports MASTER_ADDR and MASTER_PORT.
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("SLURM_NTASKS_PER_NODE", "1")
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


T = TypeVar("T")


def from_main(value: T, world: World) -> T:
    """Rank 0's value on every rank, for decisions that must be the same, such as what a file system shows. Collective."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=world.device)
    return values[0]


def work_while_others_wait(work: Callable[[], None] | None, world: World) -> None:
    """Let some ranks do long work while the others wait; returns when all have finished. Collective.

    work: this rank's part, run in this thread; None: this rank only waits. The slowest rank may take
    longer than a collective's time limit, so the ranks exchange a sign of life every few seconds (exchanged_until_done).
    The first UserError of a rank is raised on all."""
    done = threading.Event()
    problems: list[str] = []
    failed: list[Exception] = []
    if work is None:
        done.set()

    def state() -> tuple[bool, str | None]:
        finished = done.is_set()
        return finished, problems[0] if finished and problems else None

    def signs_of_life() -> None:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # a thread begins with the first
        *_, found = exchanged_until_done(state, world)
        problems[:] = [f"rank {rank}: {line}" if rank else line for rank, (_, line) in enumerate(found) if line]

    if work is None:
        signs_of_life()
    else:

        def beside() -> None:
            try:
                signs_of_life()
            except Exception as error:
                failed.append(error)

        # A daemon: any other exception of `work` ends this rank, and with it the others' wait.
        others = threading.Thread(target=beside, daemon=True)
        others.start()
        try:
            work()
        except UserError as error:
            problems.append(str(error))
        done.set()
        others.join()
        if failed:
            raise failed[0]
    if problems:
        raise UserError(problems[0], agreed=True)


def sum_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Sum a tensor over all ranks in place, and return it. Collective."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_over_ranks(value: bool, world: World) -> bool:
    """Whether the value is true on any rank, the same on all ranks. Collective."""
    return min_over_ranks(int(not value), world) == 0


def min_over_ranks(value: int, world: World) -> int:
    """The smallest of the ranks' values, on every rank. Collective."""
    if world.size == 1:
        return value
    smallest = torch.full((), value, dtype=torch.int64, device=world.device)  # torch.tensor would wait for a copy
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return int(smallest)


def seed_everything(seed: int) -> None:
    """Seed the global generators. Training draws from `generator_for` instead; this is for what libraries draw."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor | list]:
    """Global random state of this rank, in types that `torch.load(weights_only=True)` accepts."""
    numpy = np.random.get_state(legacy=False)
    twister = numpy["state"]
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8),
        "numpy": [numpy["bit_generator"], twister["key"].tolist(), twister["pos"], numpy["has_gauss"], numpy["gauss"]],
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: dict) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator whose numbers are a function of the parts alone, on any machine.

    What is drawn for a sample depends on (seed, update, key) only, not on ranks, micro-batches, workers, devices or
    earlier draws. So resuming is exact without any state, and runs on different numbers of ranks are comparable.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
