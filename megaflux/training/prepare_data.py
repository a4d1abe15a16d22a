"""The data that a run trains on: prepared from its source, or fetched, if not there yet."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.training.distributed import work_while_others_wait
from megaflux.training.planning.dataset_checks import dataset_notes, dataset_problems

log = logging.getLogger("megaflux")


def prepare_data(config: Config, world: World) -> None:
    """Make `data.path` ready on every rank: prepare it from `data.source` if it does not exist, or, with `data.remote`, fetch
    its description and the held-out pictures. UserError, the same on all ranks, if that fails or the data have another
    size than configured. Collective."""
    from megaflux.data.storage import remote
    from megaflux.data.storage.dataset import read_dataset_info
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.merge import TooManyBad
    from megaflux.data.writing.options import Options
    from megaflux.data.writing.sources import usual_options

    data = config.data

    def fetch(source: str) -> None:
        remote.fetch_split(source, Path(data.path), "held_out")

    def make(source: str) -> None:
        log.info("preparing %s from %s", data.path, source)
        sizes = {"longest_side": data.longest_side, "aspect_ratios": data.aspect_ratios}
        try:
            prepare(source, data.path, Options(**(usual_options(source) | sizes)))
        except TooManyBad as error:
            raise UserError(f"data.source: {error}") from None

    work = None
    if data.remote:
        work = partial(fetch, data.remote) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
    elif data.source and world.is_main and not (Path(data.path) / "dataset.json").exists():
        work = partial(make, data.source)
    work_while_others_wait(work, world)
    info = read_dataset_info(data.path)
    if info.longest_side != data.longest_side:
        raise UserError(
            f"data.longest_side: {data.longest_side}, but {data.path} was prepared with {info.longest_side}; "
            "use that or prepare the data again"
        )
    for problem in dataset_problems(data, info):
        raise UserError(problem, agreed=True)
    if world.is_main:
        for note in dataset_notes(data, info):
            log.warning("%s", note)
