"""Before the first update: the run's folder and the data it trains on."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from megaflux.config import Config
from megaflux.errors import UserError
from megaflux.training.distributed import World, barrier

log = logging.getLogger("megaflux")


def prepare_run_folder(config: Config, ds_config: dict[str, Any], world: World) -> None:
    """Make the run's folder and save the resolved configuration in it. UserError where that cannot be written."""
    root = Path(config.run.dir)
    if world.is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / "config.yaml").write_text(config.to_yaml())
            (root / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
        except OSError as error:
            raise UserError(f"run.dir: {root}: {error.strerror}; give a folder that can be written") from None
    barrier(world)


def prepare_data(config: Config, world: World) -> None:
    """Have `data.path` ready on every rank: made from `data.source` if it is not there yet, or, with `data.remote`,
    its description and the held-out pictures fetched. UserError if that fails or does not fit."""
    from megaflux.data import remote
    from megaflux.data.merge import TooManyBad
    from megaflux.data.prepare import OPENMOJI_DEFAULTS, Options, prepare
    from megaflux.data.shards import read_dataset_info

    data = config.data
    if data.remote:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            remote.fetch_split(data.remote, Path(data.path), "held_out")
    elif data.source and world.is_main and not (Path(data.path) / "dataset.json").exists():
        log.info("preparing %s from %s", data.path, data.source)
        defaults = OPENMOJI_DEFAULTS if data.source == "openmoji" else {}
        sizes = {"longest_side": data.longest_side, "aspect_ratios": data.aspect_ratios}
        try:
            prepare(data.source, data.path, Options(**(defaults | sizes)))
        except TooManyBad as error:
            raise UserError(f"data.source: {error}") from None
    barrier(world)
    info = read_dataset_info(data.path)
    if info.longest_side != data.longest_side:
        raise UserError(
            f"data.longest_side: {data.longest_side}, but {data.path} was prepared with {info.longest_side}; "
            "use that or prepare the data again"
        )
