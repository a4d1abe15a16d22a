"""What a run begins from (`model.init`), as weights: compared with the base weights, copied into the run's folder, and laid over
the base weights at every start. The folder is described in init_folder.py."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflux.common.errors import UserError, one_line
from megaflux.common.files import sync_folder
from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.models import reading
from megaflux.models.loading_errors import named
from megaflux.models.parameters import beginnings
from megaflux.models.pretrained import Models, move_to
from megaflux.models.writing import Entry, size_of, write_tensors
from megaflux.training.checkpoint import init_folder, manifest, weights
from megaflux.training.checkpoint.init_folder import Source
from megaflux.training.checkpoint.init_sources import Values, of_export, of_run, stored
from megaflux.training.checkpoint.space import NoRoom
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.distributed import from_main, work_while_others_wait
from megaflux.training.engine import release_memory

log = logging.getLogger("megaflux")
LoadModels = Callable[..., Models]
MOST_BYTES = 5_000_000_000
"""Of one file of RUN/init."""
APPEARING = 60.0  # s until a network file system shows what another machine has renamed
MARGIN = 1.01  # headers, rounding up to blocks


# --- at a start -----------------------------------------------------------------------------------------------------


def prepare(config: Config, resumed: Checkpoint | None, load: LoadModels, world: World) -> None:
    """Make RUN/init of a run that begins with `model.init`, or check that of a run that is resumed. Collective: rank 0 works,
    which takes minutes at the published sizes, and the others wait without a time limit.

    load: (config, device, dtype) -> the base weights. UserError, the same on all ranks: a source that is missing, does not fit
    or has other base weights, no room, and a RUN/init that is missing, damaged or another run's."""
    if config.model.init is None and expected(config, resumed) is None:
        problem = None
        if world.is_main:
            try:
                init_folder.clear(config.run.dir, everything=resumed is None)
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}; delete what an earlier start left there"
        if problem := from_main(problem, world):
            raise UserError(problem, agreed=True)
        return
    work_while_others_wait(partial(_prepare, config, resumed, load) if world.is_main else None, world)
    until = time.monotonic() + APPEARING
    while not (init_folder.folder(config.run.dir) / manifest.MANIFEST).is_file() and time.monotonic() < until:
        os.listdir(config.run.dir)  # network file systems look again
        time.sleep(0.5)


def expected(config: Config, resumed: Checkpoint | None) -> str | None:
    """Fingerprint of what a run began from, after `prepare`; None: its base weights."""
    if resumed is not None:
        return resumed.manifest.get("init")
    return None if config.model.init is None else init_folder.read(config.run.dir)["fingerprint"]


def _prepare(config: Config, resumed: Checkpoint | None, load: LoadModels) -> None:
    run_dir = config.run.dir
    try:
        if resumed is not None:
            init_folder.clear(run_dir)
            if (known := resumed.manifest.get("init")) is None:
                raise init_folder.began_without(config)
            init_folder.verify(run_dir, known)
            return
        assert config.model.init is not None
        if found := init_folder.in_the_way(run_dir):
            raise UserError(found)
        if copy := init_folder.kept(run_dir, config.model.init):
            log.warning("model.init: %s is gone; beginning from the copy of it in %s", config.model.init, run_dir)
            init_folder.verify(run_dir, copy["fingerprint"])
            return
        try:
            source = init_folder.find(config.model.init)
        except UserError as error:
            raise UserError(f"model.init: {error}") from None
        init_folder.clear(run_dir, everything=True)  # of a start that saved nothing, perhaps from something else
        for line in source.skipped:
            log.warning("%s; beginning from an older checkpoint", line)
        make(config, source, load)
        release_memory()  # of the base weights, which are loaded to their device next
    except OSError as error:
        raise UserError(f"{error.filename or init_folder.folder(run_dir)}: {error.strerror or error}") from None


def lay_over(models: Models, run_dir: str | Path, known: str | None) -> None:
    """Copy what a run began from over its base weights, tensor by tensor. known: its fingerprint; None: there is nothing.

    UserError where RUN/init is missing or another run's, or the base weights are others."""
    if known is None:
        return
    content, root = init_folder.read(run_dir, known), init_folder.folder(run_dir)
    weights.refuse_other_base(str(root), content, models)
    parameters = beginnings(models.trainable, models.trunk.vlm)
    for name in content["files"]:
        file = root / name
        with named(str(file)), torch.no_grad():
            for key, tensor in reading.tensors(file, reading.shapes(file)):
                parameters[key].copy_(tensor)
    models.init = known


def widen(models: Models, run_dir: str | Path, device: torch.device | str) -> None:
    """Cast to float32 what RUN/init holds in it, so that `lay_over` rounds nothing: all that may train, as for a checkpoint, and
    decoder layers of the trunk."""
    root, layers = init_folder.folder(run_dir), models.trunk.vlm.language_model.layers
    stored = {
        key: kind for name in init_folder.read(run_dir)["files"] for key, kind in reading.dtypes(root / name).items()
    }
    wide = {key for key, kind in stored.items() if kind == "F32"}
    for i, layer in enumerate(layers):
        inside = {key for key in wide if key.startswith(f"vlm.layers.{i}.")}
        if inside:
            move_to(layer, device, torch.float32)
        wide -= inside
    if wide:
        move_to(models.trainable, device, torch.float32)


# --- making it ------------------------------------------------------------------------------------------------------


def make(config: Config, source: Source, load: LoadModels) -> None:
    """Write RUN/init: what of the source differs from the run's base weights. UserError as for `prepare`."""
    base = load(config, torch.device("cpu"), None)  # published weights stay mapped from their files
    if source.kind == "shipped":
        values = stored(source, base.trainable, base.trunk.vlm)
    else:
        values = of_export(source, base) if source.kind == "export" else of_run(source, base, config)
    wanted = beginnings(base.trainable, base.trunk.vlm)
    entries = [(n, t.dtype, tuple(t.shape)) for n, t in values.each() if not _same(t, wanted[n])]
    run_dir, partial_folder = Path(config.run.dir), init_folder.partial_of(config.run.dir)
    _check_room(run_dir, entries)
    log.info("copying what %s changes into %s", config.model.init, init_folder.folder(run_dir))
    try:
        partial_folder.mkdir()
        files = _write(partial_folder, entries, values)
        content = {
            "format": init_folder.FORMAT,
            "source": source.identity,
            "base": base.base,
            "base_parts": base.base_parts,
            "fingerprint": init_folder.fingerprint(files),
            "files": files,
        }
        manifest.write_durably(partial_folder / manifest.MANIFEST, json.dumps(manifest.sealed(content), indent=1))
        sync_folder(partial_folder)
        partial_folder.rename(init_folder.folder(run_dir))
        sync_folder(run_dir)
    except OSError as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise NoRoom(
            f"run.dir: {init_folder.folder(run_dir)} cannot be written ({error.strerror or one_line(error)}); make room or "
            "give another --run.dir"
        ) from None


def _same(tensor: Tensor, base: Tensor) -> bool:
    """Whether two tensors are the same numbers, to the bit."""
    if tensor.dtype != base.dtype:
        return torch.equal(tensor.float().view(torch.int32), base.detach().float().view(torch.int32))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.dtype.itemsize]
    return torch.equal(tensor.view(bits), base.detach().view(bits))


def _write(folder: Path, entries: list[Entry], values: Values) -> dict[str, dict[str, Any]]:
    """Write these tensors into files of at most MOST_BYTES (or one tensor); returns {name: {bytes, sha256}}."""
    parts: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if size_of(entry) > room:
            parts.append([])
            room = MOST_BYTES
        parts[-1].append(entry)
        room -= size_of(entry)
    tensors = (tensor for _, tensor in values.each({entry[0] for entry in entries}))
    found = {}
    for number, part in enumerate(parts, 1):
        file = folder / f"init-{number:05d}-of-{len(parts):05d}.safetensors"
        digest = write_tensors(file, part, itertools.islice(tensors, len(part)))
        found[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def _check_room(run_dir: Path, entries: list[Entry]) -> None:
    disk = os.statvfs(run_dir)
    free, need = disk.f_bavail * disk.f_frsize, int(MARGIN * sum(map(size_of, entries)))
    if free < need:
        raise NoRoom(
            f"run.dir: {run_dir} has {free / 1e9:.1f} GB free, and the copy of what the run begins from (model.init) needs "
            f"{need / 1e9:.1f} GB; make room, or give another --run.dir"
        )
