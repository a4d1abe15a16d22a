"""python cache_worker.py CONFIG: caches as a run does when it starts, on the ranks that the environment describes.

FAULT in the environment: slow:RANK: that rank takes half a second for each picture. hang:RANK: that rank ends no picture. crawl: every batch takes 0.7 s. full: a write of
more than a few bytes fails. LIMIT: seconds of a collective's time limit. Prints how much it has
encoded, and the folder that it trains from.
"""

import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import yaml

from megaflux.common.errors import exit_on_user_error
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.models import latents
from megaflux.models.pretrained import load_models
from megaflux.training import distributed
from megaflux.training.cache import cached_dataset

encoded: list[int] = []
kind, _, rank = os.environ.get("FAULT", "").partition(":")
if "LIMIT" in os.environ:
    distributed.PATIENCE = timedelta(seconds=float(os.environ["LIMIT"]))


def encode(*args, real=latents.encode):
    encoded.append(len(args[1]))
    if kind == "slow" and rank == os.environ["RANK"]:
        time.sleep(0.5 * len(args[1]))
    if kind == "hang" and rank == os.environ["RANK"]:
        time.sleep(1000)
    if kind == "crawl":
        time.sleep(0.7)
    return real(*args)


latents.encode = encode


def main() -> None:
    config = build_config(merge(tiny(), yaml.safe_load(Path(sys.argv[1]).read_text())))
    world = distributed.start()
    models = load_models(config, world.device, torch.float32)
    if kind == "full" and world.rank == int(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    root = cached_dataset(config, models, world)
    print(f"rank {world.rank} encoded {len(encoded)} batches, {sum(encoded)} images: {root}", flush=True)
    distributed.stop()


exit_on_user_error(main)
