"""A job -> pictures on the disk. Each picture depends on its own seed and the settings, which its PNG holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaflux.common.errors import UserError
from megaflux.generation.job import Job
from megaflux.generation.layout import versions
from megaflux.generation.outputs import contact_sheet, save, settings_of, stem_of
from megaflux.generation.run import Opened, Result, run, steps_taken
from megaflux.infer.load import Loaded
from megaflux.infer.replay import check_same_maps, map_hashes
from megaflux.infer.request import Output

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from PIL import Image

# What torch and libraries below it say of a CPU whose memory was not enough; there is no exception class for it.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough mem")


@dataclass
class Written:
    """The files of a job."""

    files: list[Path] = field(default_factory=list)
    """All of them, in the order of writing."""
    pictures: dict[int, Path] = field(default_factory=dict)
    """The picture of each seed."""
    attention_maps: dict[int, list[Path]] = field(default_factory=dict)
    """For each seed, one for each reference."""


def make(
    loaded: Loaded,
    job: Job,
    opened: Opened,
    output: Output,
    only: int | None = None,
    expected_maps: Mapping[str, str] | None = None,
) -> Written:
    """Run a checked job and write its pictures; prints notes and file names.

    only: the one seed of the batch to write, without a contact sheet. expected_maps: {kind: SHA-256} that control maps and
    mask must have. UserError where they differ, and where a picture cannot be made or written.
    """
    with _progress(steps_taken(job)) as bar:
        result = run(loaded.pipeline, job, opened, loaded.detectors, bar.update)
    check_same_maps(expected_maps or {}, result)
    for note in dict.fromkeys([*result.notes, loaded.pipeline.models.trainable.describe()]):
        print(note)
    written = write(result, loaded, opened.data, output, only)
    for file in written.files:
        print(file)
    return written


def write(
    result: Result, loaded: Loaded, inputs: Mapping[str, bytes], output: Output, only: int | None = None
) -> Written:
    """Write the pictures of a result, their heat-maps and attention maps, control maps and a contact sheet.

    inputs: the input files by SHA-256, for --embed-inputs. only: as for `make`.
    """
    job, stem, folder = result.job, stem_of(result.job), output.folder
    facts, written = _facts(result, loaded), Written()

    def save_with_settings(picture: Image.Image, name: str, seed: int | None = None) -> Path:
        settings = settings_of(job, loaded.runtime, loaded.pipeline.source, facts, seed) if output.metadata else None
        written.files.append(save(picture, folder, name, settings, inputs if output.embed_inputs else None))
        return written.files[-1]

    first = job.seeds[0] if only is None else only
    for index, seed in enumerate(job.seeds):
        if only is None or seed == only:
            written.pictures[seed] = save_with_settings(result.pictures[index], f"{stem}-seed{seed}", seed)
            _write_maps(result, index, folder, seed == first, written)
    maps = result.control_maps | ({"mask": result.mask} if result.mask is not None else {})
    if output.save_control:
        written.files += [save(picture, folder, f"{stem}-control-{kind}") for kind, picture in maps.items()]
    if only is None:
        save_with_settings(contact_sheet(_given(result), result.pictures), f"{stem}-sheet")
    return written


def _facts(result: Result, loaded: Loaded) -> dict[str, Any]:
    """What a picture depends on beside its job, runtime and weights."""
    trainable = loaded.pipeline.models.trainable
    return {
        "path": trainable.describe(),
        "dtype": str(trainable.transformer.dtype).removeprefix("torch."),
        "device": str(loaded.pipeline.device),
        "versions": versions(),
        "maps": map_hashes(result),
    }


def _write_maps(result: Result, index: int, folder: Path, is_first: bool, written: Written) -> None:
    """Write the heat-maps of the dots and the attention maps of one picture. Heat-maps that are the same for all seeds are
    written with the first picture only."""
    from megaflux.generation.dots.heat_map import attention_picture, heat_map

    job, stem, seed = result.job, stem_of(result.job), result.job.seeds[index]
    for k, reference in enumerate(job.references):
        number = f"-{k + 1}" if len(job.references) > 1 else ""
        if job.variety or (reference.dots and is_first):
            which = f"-seed{seed}" if job.variety else ""
            picture = heat_map(result.references[k], result.output.weights[index][k], reference.dots)
            written.files.append(save(picture, folder, f"{stem}{which}-dots{number}"))
        if job.attention_map:
            mass = result.output.attention[index][k]
            picture = attention_picture(result.references[k], mass)
            file = save(picture, folder, f"{stem}-seed{seed}-attention{number}")
            written.files.append(file)
            written.attention_maps.setdefault(seed, []).append(file)
            print(f"seed {seed}: {mass.sum():.1%} of the picture's attention went to reference {k + 1}")


def _given(result: Result) -> list[Image.Image]:
    """What the contact sheet shows before the pictures: references, image, mask, control maps."""
    job, given = result.job, list(result.references)
    if (
        result.image is not None
        and job.image is not None
        and job.image.sha256 not in {r.sha256 for r in job.references}
    ):
        given.append(result.image)
    return given + [picture for picture in (result.mask, *result.control_maps.values()) if picture is not None]


@contextmanager
def explained_out_of_memory() -> Iterator[None]:
    """Raises a UserError with the remedies where torch or Python runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        line = (str(error) or "MemoryError").splitlines()[0]
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(line):
            raise
        raise UserError(
            f"out of memory ({line[:160]}); make smaller or fewer pictures at a time (--batch-size 1), or on "
            "a GPU --offload model or --quantize fp8"
        ) from None


def _progress(total: int) -> Any:
    """A progress bar of `total` steps on a terminal, none elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, desc="generating", unit="step", leave=False, disable=None)
