"""Pictures from the command line: `python -m megaflux.infer --checkpoint RUN --reference IMG --count 4 --seed 7`.

Read in this order: infer_options.py (options -> Job and Runtime), here (load, run, write), generation/job.py (what a
job does). Each picture is a function of its own seed and the settings, which it carries in its PNG.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaflux.common.errors import UserError
from megaflux.common.paths import expanded
from megaflux.generation.job import Job, Runtime
from megaflux.generation.outputs import batch_of, check_out, contact_sheet, read_settings, save, settings_of, stem_of
from megaflux.generation.run import Result, read_inputs, run, steps_taken
from megaflux.infer.dry_run import report, warn_of_memory
from megaflux.infer.options import build_parser, check_sources, is_there, to_job, with_number

if TYPE_CHECKING:  # torch and its friends take seconds to import: --help and bad input do not wait for them
    from megaflux.generation.control.detectors import Detectors
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline


PICTURE_LIKE = re.compile(r"(~|\.{0,2}/).*|.+\.[A-Za-z]{3,4}")
SAME_PICTURE = {"out", "no_metadata", "embed_inputs", "save_control", "checkpoint", "update", "seed", "count"}
"""Options beside --from-image that change no control map."""


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(build_parser().parse_args(argv))
    base, embedded, original = None, {}, None
    if "from_image" in given:
        file = given.pop("from_image")
        base, embedded, original = replayed(file)
    if given.pop("interactive", False):
        if given.get("dry_run"):
            raise UserError("--interactive with --dry-run: a dry run loads nothing to be kept; give one of them")
        return interactive(given, base, embedded, original)
    job, runtime, rest = to_job(given, base)
    out = rest.get("out", "outputs")
    check_out(out)
    if rest.get("dry_run"):
        return report(job, runtime, embedded)
    job, opened = read_inputs(job, embedded)
    warn_of_memory(job, runtime)
    only = None
    with memory_said():
        pipeline, detectors, runtime = load(runtime)
        if original is not None:
            same_weights(original, pipeline, given)
            only = original.get("seed") if not {"seed", "count"} & set(given) else None
            if not set(given) - SAME_PICTURE:
                rest["maps"] = original.get("maps")
        make(pipeline, detectors, job, runtime, opened, Path(out), rest, only)
    return 0


def replayed(file: str) -> tuple[tuple[Job, Runtime], dict[str, bytes], dict[str, Any]]:
    """((job, runtime), embedded files, settings) of a PNG. The job makes the batch that the picture was made in."""
    job, runtime, settings, embedded = read_settings(file)
    seed = settings.get("seed")
    if seed is not None:
        if seed not in job.seeds:
            raise UserError(f"--from-image {file}: settings: seed {seed} is not one of the job's")
        job = job.model_copy(update={"seeds": batch_of(job, seed)})
    return (job, runtime), embedded, settings


def same_weights(original: dict[str, Any], pipeline: Qwen2VLFluxPipeline, given: dict[str, Any]) -> None:
    """UserError where a replay would run on other weights than the picture's, unless they were asked for."""
    before, now = dict(original["source"]), dict(pipeline.source)
    nets_before, nets_now = before.pop("controlnet", None), now.pop("controlnet", None)
    if nets_before is not None and nets_before != nets_now and "controlnet" not in given:
        raise UserError(
            "--from-image: the ControlNet's folder now holds other weights than the picture's; give --controlnet DIR"
        )
    if before != now and not {"checkpoint", "update"} & set(given):
        raise UserError(
            f"--from-image: the picture was made with {said(before)}, the folder now holds {said(now)}; give "
            "--checkpoint DIR, and --update N for a run"
        )
    key = "weights_sha256"
    if before.get(key) != now.get(key):
        print(f"other weights than the picture's ({said(before)}): expect another picture")


def said(source: dict[str, Any]) -> str:
    digest = str(source.get("weights_sha256") or source.get("connector_sha256") or "unknown")[:12]
    update = f"update {source['update']}, " if "update" in source else ""
    return f"{update}weights {digest}"


def load(runtime: Runtime) -> tuple[Qwen2VLFluxPipeline, Detectors, Runtime]:
    """(the pipeline as the runtime wants it, its detectors, the runtime with the checkpoint's update filled in)."""
    import torch

    from megaflux.generation import runtime as fitting
    from megaflux.generation.control.detectors import Detectors, Sources
    from megaflux.runs import is_export, load_pipeline

    quiet_libraries()
    check_sources(runtime)
    device, default = fitting.device_and_dtype(runtime.device, None)
    if runtime.offload and device.type == "cpu":
        raise UserError("--offload: keeps weights off a GPU, and there is none here; leave it out")
    dtype = {"auto": default, "bfloat16": torch.bfloat16, "float32": torch.float32}[runtime.dtype]
    load_on = "cpu" if runtime.offload else device
    pipeline = load_pipeline(runtime.checkpoint, runtime.update, dtype, load_on, runtime.kernels == "on")
    if runtime.controlnet:
        nets = runtime.controlnet
        pipeline.load_controlnet(nets[""] if set(nets) == {""} else nets)
    if runtime.quantize:
        fitting.quantize_fp8(pipeline.models.trainable.transformer)
    if runtime.offload == "model":
        pipeline.enable_model_cpu_offload(device)
    elif runtime.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device)
    if runtime.compile:
        fitting.compile_blocks(pipeline.models.trainable.transformer)
    if not is_export(runtime.checkpoint):
        runtime = runtime.model_copy(update={"update": pipeline.source.get("update")})
    sources = Sources(runtime.depth_model, runtime.line_model, runtime.sam_model)
    return pipeline, Detectors(sources, device), runtime


def make(
    pipeline: Qwen2VLFluxPipeline,
    detectors: Detectors,
    job: Job,
    runtime: Runtime,
    opened,
    out: Path,
    options: dict[str, Any],
    only: int | None = None,
) -> list[Path]:
    """Run a job and write its pictures; prints notes and files. only: the one seed to write, and no sheet.

    options: out's (no_metadata, embed_inputs, save_control) and `maps`, the hashes that a replay must meet."""
    with progress(steps_taken(job)) as bar:
        result = run(pipeline, job, opened, detectors, bar.update)
    same_maps(options.get("maps"), result)
    for note in dict.fromkeys([*result.notes, pipeline.models.trainable.describe()]):
        print(note)
    files = write(result, runtime, pipeline, opened.data, out, options, only)
    for file in files:
        print(file)
    return files


def write(
    result: Result,
    runtime: Runtime,
    pipeline: Qwen2VLFluxPipeline,
    inputs: dict[str, bytes],
    out: Path,
    options: dict[str, Any],
    only: int | None = None,
) -> list[Path]:
    """All files of a job's result."""
    from megaflux.generation.dots.heat_map import attention_picture, heat_map

    job, stem = result.job, stem_of(result.job)
    transformer = pipeline.models.trainable.transformer
    facts = {
        "path": pipeline.models.trainable.describe(),
        "dtype": str(transformer.dtype).removeprefix("torch."),
        "device": str(pipeline.device),
        "versions": versions(),
        "maps": map_hashes(result),
    }

    def stored(picture, name: str, seed: int | None = None) -> Path:
        settings = None if options.get("no_metadata") else settings_of(job, runtime, pipeline.source, facts, seed)
        return save(picture, out, name, settings, inputs if options.get("embed_inputs") else None)

    files, first = [], only if only is not None else job.seeds[0]
    several = len(job.references) > 1
    for i, seed in enumerate(job.seeds):
        if only is not None and seed != only:
            continue
        files.append(stored(result.pictures[i], f"{stem}-seed{seed}", seed))
        for k, reference in enumerate(job.references):
            number = f"-{k + 1}" if several else ""
            if job.variety or (reference.dots and seed == first):
                which = f"-seed{seed}" if job.variety else ""
                picture = heat_map(result.references[k], result.output.weights[i][k], reference.dots)
                files.append(save(picture, out, f"{stem}{which}-dots{number}"))
            if job.attention_map:
                mass = result.output.attention[i][k]
                files.append(
                    save(attention_picture(result.references[k], mass), out, f"{stem}-seed{seed}-attention{number}")
                )
                print(f"seed {seed}: {mass.sum():.1%} of the picture's attention went to reference {k + 1}")
    if options.get("save_control"):
        kept = result.control_maps | ({"mask": result.mask} if result.mask is not None else {})
        files += [save(picture, out, f"{stem}-control-{kind}") for kind, picture in kept.items()]
    if only is not None:
        return files
    given = list(result.references)
    if result.image is not None and job.image.sha256 not in {r.sha256 for r in job.references}:
        given.append(result.image)
    given += [picture for picture in (result.mask, *result.control_maps.values()) if picture is not None]
    files.append(stored(contact_sheet(given, result.pictures), f"{stem}-sheet"))
    return files


def map_hashes(result: Result) -> dict[str, str]:
    """SHA-256 of the pixels of each control map and of the mask: what detectors made, whichever weights they had."""
    pictures = result.control_maps | ({"mask": result.mask} if result.mask is not None else {})
    return {name: hashlib.sha256(picture.tobytes()).hexdigest() for name, picture in pictures.items()}


def same_maps(before: dict[str, str] | None, result: Result) -> None:
    """UserError where a replay's control maps or mask are not the picture's."""
    now = map_hashes(result)
    for name, digest in (before or {}).items():
        if now.get(name) != digest:
            raise UserError(
                f"--from-image: the {name} map comes out otherwise than the picture's, so the detector has "
                "changed; restore it, or give the map's file by an option"
            )


def interactive(
    given: dict[str, Any],
    base: tuple[Job, Runtime] | None,
    embedded: Mapping[str, bytes] | None = None,
    original: dict[str, Any] | None = None,
) -> int:
    """Read lines of pictures, words and options, and make each; the model stays loaded. A line that cannot be is one
    `error:` line, and the next is read."""
    fixed = set(Runtime.model_fields) | {"dry_run", "from_image", "interactive", "checkpoint"}
    placeholder = {"prompt": "x"} if base is None and not {"reference", "prompt", "image"} & set(given) else {}
    _, runtime, rest = to_job({**placeholder, **given}, base)
    check_out(rest.get("out", "outputs"))
    with memory_said():
        pipeline, detectors, runtime = load(runtime)
    if original is not None:
        same_weights(original, pipeline, given)
    print("ready: a line is pictures, then words, then options, as in  cat.png a red fox --count 2   (quit leaves)")
    for line in lines():
        try:
            own = line_options(line)
            if locked := sorted(fixed & set(own)):
                raise UserError(f"--{locked[0].replace('_', '-')}: is set at the start; leave it out of the line")
            job, _, options = to_job({**given, **own}, base)
            out = options.get("out", "outputs")
            check_out(out)
            job, opened = read_inputs(job, embedded)
            with memory_said():
                make(pipeline, detectors, job, runtime, opened, Path(out), options)
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", flush=True)
        except Exception as error:  # a warm model is worth more than one line
            print(f"error: failed, {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        except SystemExit:  # --help in a line
            continue
        except KeyboardInterrupt:
            print("stopped", flush=True)
    return 0


def lines():
    """Lines of a person or a pipe until the end, `quit` or `exit`."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("quit", "exit"):
            return
        if line:
            yield line


def line_options(line: str) -> dict[str, Any]:
    """`a.png b.png:0.4 a red fox --count 2` as options."""
    try:
        tokens = shlex.split(line)
    except ValueError as error:
        raise UserError(f"line: {error}; close the quote") from None
    first = next((i for i, token in enumerate(tokens) if token.startswith("--")), len(tokens))
    bare, argv = tokens[:first], tokens[first:]
    try:
        bare = [expanded(token) if token.startswith("~/") else token for token in bare]
    except ValueError as error:
        raise UserError(str(error)) from None
    pictures = 0
    while pictures < len(bare) and is_there(with_number(bare[pictures], "line")[0]):
        pictures += 1
    if bare[pictures:] and PICTURE_LIKE.fullmatch(bare[pictures]):
        raise UserError(f"{bare[pictures]}: no such picture; words that look like a file go into --prompt")
    words = " ".join(bare[pictures:])
    argv = [*(["--reference", *bare[:pictures]] if pictures else []), *(["--prompt", words] if words else []), *argv]
    return vars(build_parser().parse_args(argv))


@contextmanager
def memory_said() -> Iterator[None]:
    """Out of memory as a UserError that says what helps; torch's own kinds of it and Python's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; a CPU's has no class
        line = (str(error) or "MemoryError").splitlines()[0]
        if not isinstance(error, MemoryError) and not re.search(
            r"out of memory|can't allocate memory|not enough mem", line
        ):
            raise
        raise UserError(
            f"out of memory ({line[:160]}); make smaller or fewer pictures at a time (--batch-size 1), or on "
            "a GPU --offload model or --quantize fp8"
        ) from None


def versions() -> dict[str, str]:
    from megaflux.generation.layout import versions

    return versions()


def progress(total: int):
    from tqdm import tqdm

    # disable=None: no bar where the output is not a terminal
    return tqdm(total=total, desc="generating", unit="step", leave=False, disable=None)


def quiet_libraries() -> None:
    """No progress bars and hints of the libraries between our own lines."""
    import diffusers
    import transformers

    # diffusers' own ControlNet takes FluxPosEmbed from where it was
    warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
