"""Problems of a run that are found before anything is loaded: quick checks of values and folders. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from os.path import exists, isdir, isfile  # Path's own raise where a name is too long
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED, SHIPPED_SOURCES
from megaflux.config.fields import Section
from megaflux.config.recipe import BY_PART, PARTS
from megaflux.config.schema import Config
from megaflux.data.buckets import make_buckets, overdrawn
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.models.shipped import start_problem
from megaflux.models.sources import HUB, hub_name, model_problems
from megaflux.training.checkpoint import identity, init_folder, manifest, saved
from megaflux.training.components import NAMES, Kind, holds, list_problem
from megaflux.training.ds_config import batch_problem, batch_sizes, uses_kernels, zero_stage
from megaflux.training.planning.dataset_checks import dataset_notes, dataset_problems
from megaflux.training.schedule import left_of_beginning

STALE = 0.1  # of an average: more of what it began with than this, at a stage's end, is noted


def find_problems(config: Config, ds_config: dict[str, Any], world_size: int) -> list[str]:
    """Everything that would stop the run, one line each with the field and the remedy. Reads small files only."""
    return [
        *_batch(config, world_size),
        *_sharding(config, ds_config),
        *_sizes(config),
        *_stages(config),
        *_run_folder(config, ds_config, world_size),
        *_models(config),
        *_kernels(config, ds_config),
        *_data(config),
        *_validation(config),
    ]


def find_notes(config: Config, world_size: int) -> list[str]:
    """What the run will do that its user may not expect, one line each."""
    notes = []
    if _data_will_be_prepared(config):
        notes.append(f"data.path: {config.data.path} is not there yet; it is prepared from {config.data.source}")
    if info := _described(config.data.path):
        drawn = batch_sizes(config.for_world(world_size)).drawn
        notes += [f"data.path: {line}" for line in overdrawn(dict(info.filled("train")), drawn, world_size)]
        notes += dataset_notes(config.data, info)
    if config.model.init is not None and not saved.has_begun(config.run.dir):
        notes.append(f"model.init: the run begins with the weights of {config.model.init}")
    for i, stage in enumerate(config.stages):
        for field in BY_PART:
            rates = getattr(stage, field)
            for part in PARTS if isinstance(rates, Section) else ():
                if getattr(rates, part) is not None and part not in stage.parts:
                    notes.append(
                        f"stages.{i}.{field}.{part}: has no effect, because this stage trains nothing of {part}"
                    )
    notes += _average_notes(config)
    for field in ("flux", "vlm", "vae"):
        source = getattr(config.model, field)
        if source and source not in SHIPPED_SOURCES.get(field, ()) and (name := hub_name(source)):
            why = "hub: asks for it" if source.startswith(HUB) else f"no folder {name.partition('/')[0]} is here"
            notes.append(f"model.{field}: {name} is fetched from the hub ({why}); its files are not looked at before")
    return notes


def _average_notes(config: Config) -> Iterator[str]:
    decay, start = config.optim.ema_decay, 0
    for stage, end in zip(config.stages, config.stage_ends(), strict=True):
        if decay and (left := left_of_beginning(decay, start, end)) > STALE:
            yield (
                f"optim.ema_decay: after the {end - start} updates of stage {stage.name!r}, {left:.0%} of the average of what "
                f"begins to train in it is still its beginning; lower {decay:g}"
            )
        start = end


def _batch(config: Config, world_size: int) -> Iterator[str]:
    if saved.has_begun(config.run.dir):
        return  # a resumed run divides its batches among the ranks itself (checkpoint.elastic)
    problem = batch_problem(config, world_size)
    if problem:
        yield problem


def _sharding(config: Config, ds_config: dict[str, Any]) -> Iterator[str]:
    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload not in ("none", None) and zero_stage(ds_config) < 1:
        yield "--deepspeed: offload_optimizer needs zero_optimization.stage 1, 2 or 3"
    if offload == "nvme":
        yield "--deepspeed: offload_optimizer.device nvme keeps Adam's state where a change of stage cannot read it; use cpu"


def _sizes(config: Config) -> Iterator[str]:
    """Check the tables of sizes against each other and against the local folders that replace them."""
    model, flux = config.model, config.model.flux_config
    if model.flux is None:
        axes, head = flux.get("axes_dims_rope") or (), flux.get("attention_head_dim")
        if not isinstance(axes, list | tuple) or not all(isinstance(axis, int) for axis in axes):
            yield f"model.flux_config.axes_dims_rope: must be a list of whole numbers, got {str(axes)[:80]!r}"
        elif axes and head and sum(axes) != head:
            yield f"model.flux_config.axes_dims_rope: sum is {sum(axes)}; make it attention_head_dim, {head}"
        channels = flux.get("in_channels")
        if channels and channels != 4 * model.latent_channels:
            yield (
                f"model.flux_config.in_channels: {channels}, but latents of {model.latent_channels} channels pack "
                f"to {4 * model.latent_channels}; set it to that"
            )
    stored = _read_json(Path(model.flux) / "transformer/config.json") if model.flux else None
    if stored:
        names = ("num_layers", "num_single_layers")
        counts = [stored.get(name, 0) for name in names] if isinstance(stored, dict) else []
        if not counts or not all(isinstance(count, int) for count in counts):
            yield f"model.flux: {model.flux}/transformer/config.json gives no number of blocks; restore it"
            return
        blocks = sum(counts)
        for i, stage in enumerate(config.stages):
            out = [b for b in stage.blocks if b >= blocks] if isinstance(stage.blocks, tuple) else []
            if out:
                last = blocks - 1
                yield f"stages.{i}.blocks: {out[0]} is out of range; {model.flux} has blocks 0 to {last}"


def _stages(config: Config) -> Iterator[str]:
    """Names that a stage lists and FLUX's blocks have not, or have twice: found now, not when the stage begins."""
    model = config.model
    stored = _read_json(Path(model.flux) / "transformer/config.json") if model.flux else None
    counts = stored if isinstance(stored, dict) else model.flux_config  # a folder may hold a FLUX of other depth
    num_double, num_single = (counts.get(name) for name in ("num_layers", "num_single_layers"))
    if not isinstance(num_double, int) or not isinstance(num_single, int):
        return  # `_sizes` says so
    blocks = range(num_double + num_single)
    for i, stage in enumerate(config.stages):
        listed = [block for block in blocks if stage.lists(block)]
        kinds: dict[Kind, bool] = {
            "double": any(b < num_double for b in listed),
            "single": any(b >= num_double for b in listed),
        }
        there = [kind for kind, found in kinds.items() if found]
        if there and (problem := list_problem(stage.components, there)):
            yield f"stages.{i}.components: {problem}"
        elif isinstance(stage.blocks, tuple):
            for block in stage.blocks:
                kind: Kind = "double" if block < num_double else "single"
                if not any(holds(stage.components, kind, name) for name in NAMES[kind]):
                    yield f"stages.{i}.blocks: nothing of block {block}, a {kind} one, is in components; leave it out"
                    break


def _run_folder(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[str]:
    path = Path(config.run.dir)
    try:
        path.exists()
    except OSError as error:
        yield f"run.dir: {str(path)[:80]}: {error.strerror}; give another folder"
        return
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                yield f"run.dir: {place} is a file; give a folder"
            elif not os.access(place, os.W_OK | os.X_OK):
                yield f"run.dir: {place} cannot be written; give another folder or change its permissions"
            elif place == path:
                yield from _resuming(config, ds_config, world_size)
            return


def _resuming(config: Config, ds_config: dict[str, Any], world_size: int) -> Iterator[str]:
    """Why the run in the folder cannot be resumed, as far as its newest manifest tells: its files are looked at later."""
    folder, content = config.run.dir, saved.newest(config.run.dir)
    if content is not None and config.run.resume == "never":
        yield f"run.dir: {folder} holds checkpoints and run.resume is never; give another --run.dir"
    elif content is None and config.run.resume == "must":
        yield f"run.dir: {folder} holds no checkpoint and run.resume is must"
    if content is not None and "identity" in content:
        path = manifest.folder(folder) / manifest.name_of(content["update"])
        if problem := identity.problem(path, content, config, ds_config, world_size):
            yield problem


def _models(config: Config) -> Iterator[str]:
    model = config.model
    if model.flux is None and model.vae is None:
        yield "model.vae: a model built from nothing needs a VAE; set it to a folder, tiny or tiny-icons"
    begun = saved.has_begun(config.run.dir)
    yield from model_problems(model, "--model." if begun else None)
    if model.init == SHIPPED and not begun and (why := start_problem(model)):  # one that has begun has its own start
        yield why
    if wrong := init_folder.problem(config):
        yield wrong


def _kernels(config: Config, ds_config: dict[str, Any]) -> Iterator[str]:
    if config.model.activation_checkpointing == "mlp" and not uses_kernels(config, ds_config):
        why = "ZeRO-3 runs" if config.model.kernels == "on" else "model.kernels off means"
        yield f"model.activation_checkpointing: mlp needs kernels, but {why} diffusers' own path; use auto, none or full"


def _data(config: Config) -> Iterator[str]:
    data, root = config.data, Path(config.data.path)
    try:
        wanted = {(b.name, b.width, b.height) for b in make_buckets(data.aspect_ratios, data.longest_side)}
    except UserError as error:
        yield f"data.longest_side and data.aspect_ratios: {error}"
        return
    if data.remote and data.cache:
        yield "data.cache: only shards in data.path can be cached; empty it or drop data.remote"
    if data.cache_limit and not re.fullmatch(r"\d+(\.\d+)?\s*[kmgt]?b?", data.cache_limit, re.IGNORECASE):
        yield f"data.cache_limit: {data.cache_limit!r} is not a size; write it as 500gb"
    if exists(root) and not isdir(root):
        yield f"data.path: {root} is a file; give a folder"
        return
    description = root / "dataset.json"
    if not isfile(description):
        if not data.remote and not _data_will_be_prepared(config):
            what = "is not a prepared dataset (no dataset.json)" if exists(root) else "does not exist"
            mend = f"make it with python -m megaflux.data.prepare SOURCE {root}"
            if saved.has_begun(config.run.dir):
                mend = (
                    f"the run in {config.run.dir} was trained on it: give --data.path with the folder where it is now"
                )
            yield f"data.path: {root} {what}; {mend}"
        return
    stored = _read_json(description)
    try:
        side = stored["longest_side"]
        buckets = {(str(b["name"]), b["width"], b["height"]) for b in stored["buckets"]}
        names = ",".join(str(b["name"]) for b in stored["buckets"])
    except (TypeError, KeyError):
        yield f"data.path: {description} cannot be read; restore it or prepare the data again"
        return
    if side != data.longest_side:
        yield (
            f"data.longest_side: {data.longest_side}, but {root} was prepared with {side}; set it to {side} or "
            "prepare the data again"
        )
    elif buckets != wanted:
        yield (
            f"data.aspect_ratios: {','.join(data.aspect_ratios)}, but {root} was prepared with {names}; set them "
            "to those or prepare the data again"
        )
    if info := _described(data.path):
        yield from dataset_problems(data, info)


def _described(path: str) -> DatasetInfo | None:
    """The description of a dataset; None where there is none yet, or where it cannot be read, which is said elsewhere."""
    try:
        return read_dataset_info(path)
    except UserError:
        return None


def _validation(config: Config) -> Iterator[str]:
    panel, samples = config.validation.panel_samples, config.validation.samples
    if panel > samples:
        yield f"validation.panel_samples: {panel} is more than validation.samples, {samples}; lower it"


def _data_will_be_prepared(config: Config) -> bool:
    data = config.data
    return bool(data.source) and not data.remote and not exists(Path(data.path) / "dataset.json")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
