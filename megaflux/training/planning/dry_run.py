"""`--dry-run`: what a configuration would do and cost, and everything wrong with it. No network is loaded or allocated."""

from __future__ import annotations

import logging
import os
from typing import Any

from megaflux.common.errors import UserError, one_line
from megaflux.common.paths import SHIPPED
from megaflux.config.schema import Config
from megaflux.models.sources import hub_name
from megaflux.training.checkpoint import init_folder, saved
from megaflux.training.ds_config import batch_sizes
from megaflux.training.planning.checks import find_notes, find_problems
from megaflux.training.planning.dry_run_text import print_estimate
from megaflux.training.planning.estimate import Estimate, estimate
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.sizes import Sizes
from megaflux.training.text import write_json_report


def dry_run(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    json_path: str | None = None,
    assumed: Assumed | None = None,
) -> int:
    """Print the resolved configuration, stage table, FLOPs, memory, speed and problems; returns the exit code, 0, or 2 with
    problems.

    json_path: a file for the same as JSON. assumed: what the user states about the GPUs; if they name none, stages, memory
    and days are for an A100 80 GB, and the table of micro-batches for all known GPUs. Raises UserError if the JSON file
    cannot be written.
    """
    wanted = config.train.micro_batch_size
    choose = wanted == "auto"
    config = config.for_world(world_size)
    drawn, micro = batch_sizes(config)
    shown = {"drawn_per_rank": drawn, "micro_batch_size": wanted or micro}
    print(config.model_copy(update={"train": config.train.model_copy(update=shown)}).to_yaml())
    problems = find_problems(config, ds_config, world_size)
    report: dict[str, Any] = {"stages": [], "flops_per_image": None, "memory_gb_per_gpu": None}
    try:
        found = _estimate(config, ds_config, world_size, assumed or Assumed(), choose)
        print_estimate(found, choose)
        problem = found.memory_problem(choose)
        problems += [problem] if problem else []
        report |= found.as_json()
        _check_turns(config)
        _check_init(config)
    except UserError as error:
        if not any(_says(problem, str(error)) for problem in problems):
            problems.append(str(error))
    notes = find_notes(config, world_size)
    for note in notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    if json_path:
        write_json_report(json_path, report | {"world_size": world_size, "notes": notes, "problems": problems})
    return 2 if problems else 0


def _says(problem: str, error: str) -> bool:
    """Whether an error repeats a problem that was found, under another name of the field."""
    said = problem.partition(": ")[2].replace(":", "")
    return bool(said) and said in error.replace(":", "")


def _check_init(config: Config) -> None:
    """UserError where the weights that a new run is to begin with have other names or shapes than its models."""
    run_dir, source = config.run.dir, config.model.init
    if source is None or saved.has_begun(run_dir) or not (source == SHIPPED or os.path.isdir(source)):
        return
    from megaflux.models.pretrained import meta_models  # here, because it imports transformers
    from megaflux.training.checkpoint import init_sources

    init_sources.stored(init_folder.find(source, whole=False), *meta_models(config))


def _check_turns(config: Config) -> None:
    """UserError where the chat template of a local Qwen2-VL folder does not make the turns that the run draws."""
    source = config.model.vlm
    if source and source != SHIPPED and hub_name(source) is None:
        from megaflux.models.vlm_folder import open_vlm  # here, because it imports transformers

        open_vlm(source).check_turns(config.data.condition.chat_modes)


def _estimate(config: Config, ds_config: dict[str, Any], world_size: int, assumed: Assumed, choose: bool) -> Estimate:
    """The costs of the configuration; UserError where its networks cannot be built."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        sizes = Sizes.of(config, ds_config, world_size)
    except UserError:
        raise
    except Exception as error:  # a library rejects the sizes, with a message of its own
        raise UserError(f"model: the networks cannot be built: {one_line(error)}") from error
    return estimate(sizes, assumed, choose)
