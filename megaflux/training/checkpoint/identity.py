"""What may change when a run is resumed: the fields that are refused, applied, and without effect on results. Imports no torch.

Weights and data are known by what they are, not by where they lie: a checkpoint's manifest holds a fingerprint of the base
weights (`base`) and of the data (in `data`), so that folders may be moved and renamed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaflux.config.schema import Config
from megaflux.training.checkpoint import saved
from megaflux.training.ds_config import sharding

REFUSED = (
    "preset",
    "run.seed",
    *(
        f"model.{name}"
        for name in ("flux_config", "vlm_config", "clip_config", "seeded", "latent_channels", "attention")
    ),
    *("model.vlm_max_tokens", "model.caption_max_tokens", "model.vlm_layers"),
    *("data.longest_side", "data.aspect_ratios", "data.condition", "data.caption_weights"),
    *("data.references", "data.reference_crop", "data.reference_flip"),
    *("train.global_batch_size", "train.drawn_per_rank", "train.stage_ends", "train.ended_at"),
    *(f"flow.{name}" for name in ("density", "logit_mean", "logit_std", "shift", "guidance")),
    "stages.*.share",
)
"""Fixed when a run begins. data.condition and data.references are all of their fields."""
OF_BEGUN_STAGES = tuple(f"stages.*.{name}" for name in ("name", "blocks", "components", "connector", "vlm_layers"))
"""Refused for stages that have begun, applied to those that have not."""
APPLIED = (
    "train.updates",  # more of them (extend.py); fewer are refused
    *("train.bad_updates", "train.stop_after", "data.sample_posterior"),
    *(
        f"optim.{name}"
        for name in ("lr", "betas", "eps", "weight_decay", "schedule", "warmup_fraction", "plateau_fraction")
    ),
    *("optim.spike_sigma", "optim.spike_window", "optim.max_grad_norm"),
    *("optim.large_gradient", "optim.large_gradient_share", "optim.ema_decay"),
    *("stages.*.lr", "stages.*.weight_decay"),
)
"""Take effect from the next update on."""
NO_EFFECT = (
    *("run.dir", "run.resume", "model.flux", "model.vlm", "model.vae", "model.init"),
    *("model.kernels", "model.activation_checkpointing", "train.deterministic", "train.micro_batch_size"),
    *("data.path", "data.remote", "data.cache_limit", "data.source", "data.cache", "data.num_workers"),
    *(
        f"train.{name}"
        for name in ("checkpoint_every", "keep_checkpoints", "keep_every", "hang_timeout", "leave_within")
    ),
    *(f"validation.{name}" for name in ("every", "samples", "panel_every", "panel_samples", "steps")),
    *(f"monitor.{name}" for name in ("every", "grad_norms_every", "peak_tflops", "label_blocks")),
)
"""Applied, and do not change what is learned, but for rounding (kernels, recomputation, cut of the batch): where to look, what
is written, and when. Other weights or data under these paths are refused by their fingerprints."""


def identity(config: Config) -> dict[str, Any]:
    """What a checkpoint stores of REFUSED and OF_BEGUN_STAGES, as plain data."""
    values = config.model_dump(mode="json")
    values["model"]["vlm_layers"] = config.vlm_layers
    fixed = [path for path in REFUSED if "*" not in path and path not in ("train.drawn_per_rank", *_ENDS)]
    kept = {path: saved.at(values, path) for path in fixed}
    return kept | {"stages": [{name: stage[name] for name in _STAGE} for stage in values["stages"]]}


def problem(
    path: Path, content: dict[str, Any], config: Config, ds_config: dict[str, Any], world_size: int
) -> str | None:
    """Why a run cannot be resumed from a checkpoint, one line with the remedy; None: it can. path: the checkpoint's folder;
    content: its manifest."""
    then, by_part = content["deepspeed"], content.get("groups_by_part", False)
    if "parameter_order" not in then:
        return (
            f"{path}: an earlier megaflux began this run, and its optimizer shards have another order; "
            "finish the run with that version, or give another --run.dir"
        )
    if then != sharding(ds_config):
        return f"--deepspeed: {path} was saved with {then}, this file says {sharding(ds_config)}; give the one the run began with"
    if content["world_size"] != world_size and then["zero_stage"] != 2:
        return (
            f"{path}: saved by {content['world_size']} ranks, this run has {world_size}, and ZeRO-3's shards "
            f"cannot be resharded; start it with {content['world_size']}"
        )
    if then["zero_stage"] == 3 and by_part != config.rates_by_part:
        rates = "as they were" if by_part else "one number each, not by part"
        return (
            f"optim: {path} was saved with {'rates by part' if by_part else 'one rate for all parts'}, and ZeRO-3's shards cannot "
            f"be grouped anew; leave lr and weight_decay in optim and in every stage {rates}, or begin a new run from this one "
            "(model.init)"
        )
    changes = changed(content, config)
    return refusal(config.run.dir, changes) if changes else None


def refusal(run_dir: str, fields: list[str]) -> str:
    """One line on a run that is resumed with other values of these fields."""
    return (
        f"run.dir: {run_dir} holds a run with other {', '.join(fields)}; restore the old values (they are in "
        f"{run_dir}/config.yaml) or give another --run.dir"
    )


_ENDS = ("train.stage_ends", "train.ended_at")  # extend.py
_STAGE = [path.rpartition(".")[2] for path in OF_BEGUN_STAGES]


def changed(manifest: dict[str, Any], config: Config) -> list[str]:
    """The fields in which a configuration differs from what a checkpoint's manifest says of its run, and may not."""
    now = identity(config)
    then = saved.completed(manifest["identity"], manifest["format"])
    differing = [path for path in now if path != "stages" and saved.at(then, path, now[path]) != now[path]]
    if "started_with" not in manifest and config.train.stage_ends is None:
        # Before format 3. `extended` compares these with config.yaml, which may be edited or lost; this cannot.
        if saved.at(then, "train.updates", config.train.updates) != config.train.updates:
            differing.append("train.updates")
        for i, (stage, now_stage) in enumerate(zip(then["stages"], config.stages)):
            if stage.get("share", now_stage.share) != now_stage.share:
                differing.append(f"stages.{i}.share")
    for i, stage in enumerate(then["stages"][: manifest["stage"] + 1]):
        if i >= len(now["stages"]):
            return [*differing, f"stages.{i} (it is missing)"]
        differing += [f"stages.{i}.{name}" for name in _STAGE if stage[name] != now["stages"][i][name]]
    return differing
