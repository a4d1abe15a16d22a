"""Before the first update: the run's folder and the data it trains on."""

from __future__ import annotations

import json
import logging
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
    """Make `data.path` from `data.source` if it is not there yet. UserError if that fails or does not fit."""
    from megaflux.data.prepare import OPENMOJI_DEFAULTS, Options, prepare
    from megaflux.data.shards import read_dataset_info

    missing = not (Path(config.data.path) / "dataset.json").exists()
    barrier(world)  # nobody writes before everybody has looked
    if missing and config.data.source and not config.data.remote and world.is_main:
        log.info("preparing %s from %s", config.data.path, config.data.source)
        defaults = OPENMOJI_DEFAULTS if config.data.source == "openmoji" else {}
        sizes = {"longest_side": config.data.longest_side, "aspect_ratios": config.data.aspect_ratios}
        prepare(config.data.source, config.data.path, Options(**(defaults | sizes)))
    barrier(world)
    if config.data.remote and missing:
        return
    info = read_dataset_info(config.data.path)
    if info.longest_side != config.data.longest_side:
        raise UserError(
            f"data.longest_side: {config.data.longest_side}, but {config.data.path} was prepared with "
            f"{info.longest_side}; use that or prepare the data again"
        )
