"""One rank of a run that is ended and resumed: python ledger_worker.py DATASET OUT GLOBAL SEED BATCHES BEYOND

Resumes at OUT/position.json, takes BATCHES micro-batches (0: to the epoch's end) and writes their numbers to
OUT/part-rank*.npy; then takes BEYOND more, as a run does between its last checkpoint and a kill, and dies.
"""

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.position import Position

dataset, out, together, seed, batches, beyond = sys.argv[1:]
out, batches = Path(out), int(batches)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
loader = build_loader(dataset, LoaderOptions(int(together) // world, int(seed)), detect_world())
position = out / "position.json"
state = json.loads(position.read_text()) if position.exists() else None
if state is not None:
    loader.load_state_dict(Position.from_state_dict(state).for_world(world).state_dict())
dist.barrier()  # all have read it
left = loader.batches_per_epoch - (state["batches"] if state else 0)
taken = batches or left
assert taken <= left
stream = iter(loader)
keys = [[int(key) for key in batch.keys] for batch in itertools.islice(stream, taken)]
np.save(out / f"part-rank{rank}.npy", np.array(keys, dtype=np.uint32))
if rank == 0:
    position.write_text(json.dumps(loader.state_dict() | {"repeats": sum(loader.repeats.values())}))
for _ in itertools.islice(stream, int(beyond)):
    pass
dist.barrier()
if int(beyond) and rank == 0:  # shared memory and all: the next start must cope
    os._exit(9)
loader.close()
os._exit(0)
