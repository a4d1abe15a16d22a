"""--from-image: replaying the job that a PNG holds, and whether the replay really makes the same picture."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megaflux.common.errors import UserError
from megaflux.generation.job import Job, Runtime
from megaflux.generation.outputs import batch_of, read_settings
from megaflux.generation.run import Result

KEEP_MAPS = frozenset(
    {
        "out",
        "no_metadata",
        "embed_inputs",
        "save_control",
        "checkpoint",
        "update",
        "ema",
        "flux",
        "vlm",
        "vae",
        "seed",
        "count",
    }
)
"""Options beside --from-image that change no control map."""


@dataclass(frozen=True)
class Original:
    """The picture that is replayed."""

    job: Job
    """Of the batch that the picture was made in: a picture's last bits depend on the others in its batch."""
    runtime: Runtime
    settings: dict[str, Any]
    """All that its PNG holds."""
    embedded: dict[str, bytes]
    """Input files in the PNG, by SHA-256."""

    @property
    def base(self) -> tuple[Job, Runtime]:
        """What the other options of the command line change."""
        return self.job, self.runtime


def read_original(file: str) -> Original:
    """The settings in a PNG that megaflux wrote. UserError for any other file."""
    job, runtime, settings, embedded = read_settings(file)
    seed = settings.get("seed")
    if seed is not None:
        if seed not in job.seeds:
            raise UserError(f"--from-image {file}: settings: seed {seed} is not one of the job's")
        job = job.model_copy(update={"seeds": batch_of(job, seed)})
    return Original(job, runtime, settings, embedded)


def seed_to_write(original: Original, given: Collection[str]) -> int | None:
    """The one seed of the batch that is written; None: all, because the original is a sheet or seeds were given."""
    return None if {"seed", "count"} & set(given) else original.settings.get("seed")


def expected_maps(original: Original, given: Collection[str]) -> Mapping[str, str]:
    """{kind: SHA-256} of the control maps that the replay must have; {} where an option given may change them."""
    return {} if set(given) - KEEP_MAPS else original.settings.get("maps") or {}


def check_same_weights(original: Original, source: Mapping[str, Any], given: Collection[str]) -> None:
    """UserError where the loaded weights are not the picture's, unless an option asks for others.

    source: where the pipeline's weights come from; given: names of the options given. Prints a line where the weights were
    changed on purpose.
    """
    before, now = dict(original.settings["source"]), dict(source)
    for where in (before, now):
        where.pop("run", None)  # a run is known by its weights: its folder may have been moved, or named otherwise
    nets_before, nets_now = before.pop("controlnet", None), now.pop("controlnet", None)
    if nets_before is not None and nets_before != nets_now and "controlnet" not in given:
        raise UserError(
            "--from-image: the ControlNet's folder now holds other weights than the picture's; give --controlnet DIR"
        )
    if before != now and not {"checkpoint", "update", "ema"} & set(given):
        raise UserError(
            f"--from-image: the picture was made with {_describe(before)}, the folder now holds {_describe(now)}; give "
            "--checkpoint DIR, and --update N for a run"
        )
    if before.get("weights_sha256") != now.get("weights_sha256"):
        print(f"other weights than the picture's ({_describe(before)}): expect another picture")


def _describe(source: Mapping[str, Any]) -> str:
    digest = str(source.get("weights_sha256") or source.get("connector_sha256") or "unknown")[:12]
    update = f"update {source['update']}, " if "update" in source else ""
    return f"{update}weights {digest}"


def map_hashes(result: Result) -> dict[str, str]:
    """{kind: SHA-256 of the pixels} of each control map and of the mask: what the detectors made, with any weights."""
    pictures = result.control_maps | ({"mask": result.mask} if result.mask is not None else {})
    return {name: hashlib.sha256(picture.tobytes()).hexdigest() for name, picture in pictures.items()}


def check_same_maps(expected: Mapping[str, str], result: Result) -> None:
    """UserError where a control map or the mask of a replay is not the picture's. expected: {kind: SHA-256}."""
    now = map_hashes(result)
    for name, digest in expected.items():
        if now.get(name) != digest:
            raise UserError(
                f"--from-image: the {name} map is not the picture's, so the detector has changed; restore it, or give the "
                "map's file by an option"
            )
