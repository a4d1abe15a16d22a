"""Models with the weights of a run's checkpoint or of an export, for inference and export."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaflux.common.errors import UserError
from megaflux.config.schema import Config
from megaflux.generation.layout import MANIFEST, Settings, is_export
from megaflux.generation.pipeline import Qwen2VLFluxPipeline
from megaflux.generation.runtime import device_and_dtype
from megaflux.models.pretrained import Models, load_models, move_to
from megaflux.models.sources import model_problems
from megaflux.training.checkpoint import identity, init_folder, init_weights, saved, weights
from megaflux.training.checkpoint import manifest as manifests


@dataclass(frozen=True)
class Folders:
    """Where a run's base weights are now, as folders or names of the hub; None: where they were when it was trained. Other
    weights than those are refused when they are loaded."""

    flux: str | None = None
    vlm: str | None = None
    vae: str | None = None


@dataclass(frozen=True)
class TrainedRun:
    """One complete checkpoint of a run, its weight files verified against the manifest; nothing is loaded."""

    config: Config
    """As saved, with the folders of today."""
    checkpoint: Path
    manifest: dict[str, Any]
    ema: bool = False
    """Whether its weights' averages are taken instead of the weights."""

    @property
    def folder(self) -> Path:
        """The run's own."""
        return self.checkpoint.parent.parent

    @property
    def source(self) -> dict[str, Any]:
        """Where the weights come from, as plain data that exports and pictures store."""
        init = self.manifest.get("init")
        return {
            "run": self.config.run.dir,
            "update": self.manifest["update"],
            "stage": self.manifest["stage_name"],
            "weights_sha256": weights.sha256(self.manifest, self.checkpoint, self.ema),
            **({} if init is None else {"init": init}),
            **({"ema": True} if self.ema else {}),
        }


def find(path: str | Path, update: int | None = None, folders: Folders = Folders(), ema: bool = False) -> TrainedRun:
    """A run's newest checkpoint, or the one after `update` updates. folders: of base weights that were moved. ema: take the
    averages of its weights.

    UserError, naming the file, where it is missing, not complete, without averages, or of another configuration than the run's:
    an older checkpoint is never used instead.
    """
    root = Path(path)
    if not os.path.isdir(root):  # Path.is_dir raises where a name is too long
        what = "not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{root}: {what}; give a run or an export")
    if any(root.glob("weights*.safetensors")) or (root / "manifest.json").is_file():
        at = root.name.removeprefix("update-").lstrip("0") or "0"
        raise UserError(f"{root}: one checkpoint of a run; give the run's folder and --update {at}")
    if not (root / "config.yaml").is_file():
        raise UserError(f"{root}: neither a run (no config.yaml) nor an export (no {MANIFEST})")
    config = _as_it_is_now(saved.load(root), root, folders)
    folder = manifests.folder(root)
    found = manifests.listed(root)
    if not found:
        raise UserError(f"{folder}: holds no complete checkpoint; train until the first one is written")
    number = max(found) if update is None else update
    if number not in found:
        known = ", ".join(map(str, found))
        raise UserError(f"{folder}/update-{number:07d}: no such checkpoint; the run has {known}")
    chosen = found[number]
    content = manifests.read(chosen)
    if ema and "average" not in content:
        raise UserError(
            f"{chosen}: holds no average of the weights; leave --ema out (give --no-ema with --from-image), or train with "
            "optim.ema_decay"
        )
    weight_files = weights.files_of(content, chosen) + (
        weights.files_of(content, chosen, weights.AVERAGE) if ema else []
    )
    manifest = manifests.verify(chosen, only=weight_files)  # the optimizer's shards are not needed
    if manifest.get("init") is not None:
        init_folder.verify(root, manifest["init"])
    if changed := identity.changed(manifest, config):
        raise UserError(
            f"{root}/config.yaml: {', '.join(changed)} is not what {chosen.name} was trained with; restore it"
        )
    return TrainedRun(config, chosen, manifest, ema)


def _as_it_is_now(config: Config, root: Path, folders: Folders) -> Config:
    moved = {name: value for name, value in asdict(folders).items() if value is not None}
    run = config.run.model_copy(update={"dir": str(root.absolute())})
    return config.model_copy(update={"run": run, "model": config.model.model_copy(update=moved)})


def check_sources(run: TrainedRun) -> None:
    """UserError for base weights that are missing or not complete, with the option to give where a folder was moved."""
    lines = list(model_problems(run.config.model, "--"))
    if lines:
        raise UserError("; ".join(lines))


def load(run: TrainedRun, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Models:
    """The run's models with the checkpoint's weights.

    dtype None: each part's own, and float32 for the trainable parts if the checkpoint holds float32. UserError where a
    trained weight is missing or does not fit.
    """
    check_sources(run)
    models = load_models(run.config, device, dtype)
    # Cast before loading: float32 weights would lose bits if copied into bfloat16 parameters.
    if dtype is None and weights.any_float32(run.manifest, run.checkpoint):
        move_to(models.trainable, device, torch.float32)
    if (began_from := run.manifest.get("init")) is not None:
        if dtype is None:
            init_weights.widen(models, run.folder, device)
        init_weights.lay_over(models, run.folder, began_from)
    weights.load_weights(run.checkpoint, run.manifest, run.config, models)
    if run.ema:
        weights.load_averages(run.checkpoint, run.manifest, models)
    return models


def load_pipeline(
    path: str | Path,
    update: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    kernels: bool = True,
    folders: Folders = Folders(),
    ema: bool = False,
) -> Qwen2VLFluxPipeline:
    """The pipeline of a run folder (its newest checkpoint, or the one after `update` updates) or an export folder.

    dtype None: bfloat16 on a GPU, float32 on the CPU; device None: the GPU if there is one. kernels False: diffusers'
    own path. folders: where the base weights of a run are now, if they were moved; an export holds its own. ema: a run's averaged
    weights. UserError for a folder that is neither, or not complete.
    """
    if is_export(path):
        if update is not None:
            raise UserError(f"--update {update}: {path} is an export and holds one set of weights; leave it out")
        if folders != Folders():
            raise UserError(f"folders: {path} is an export, which holds all its weights; leave them out")
        pipeline = Qwen2VLFluxPipeline.from_pretrained(path, dtype, device, kernels)
        if ema and not pipeline.source.get("ema"):
            raise UserError(f"--ema: {path} is an export of a run's weights; export the run again, with --ema")
        return pipeline
    run = find(path, update, folders, ema)
    device, dtype = device_and_dtype(device, dtype)
    return Qwen2VLFluxPipeline(
        load(run, device, dtype), Settings.of(run.config), run.source, kernels, attribution(run.config)
    )


def attribution(config: Config) -> str | None:
    """The credit that the run's training pictures ask for; None if they ask for none or their folder is missing."""
    try:
        return json.loads((Path(config.data.path) / "dataset.json").read_text()).get("attribution")
    except (OSError, ValueError, AttributeError):
        return None
