"""One rank of two: rank 0 works for longer than a collective may take; argv: what it does then (end, refuse, crash)."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.training.distributed import work_while_others_wait

LIMIT = 2.0  # s

dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
rank = int(os.environ["RANK"])


def work() -> None:
    time.sleep(2 * LIMIT)
    if sys.argv[1] == "refuse":
        raise UserError("the source is gone; give another")
    if sys.argv[1] == "crash":
        raise ZeroDivisionError


try:
    work_while_others_wait(work if rank == 0 else None, World(rank, 2, torch.device("cpu")))
    print("went on")
except UserError as error:
    print(f"refused: {error}, agreed {error.agreed}")
sys.stdout.flush()
os._exit(0)  # a normal exit under gloo's threads aborts now and then (exit code -6)
