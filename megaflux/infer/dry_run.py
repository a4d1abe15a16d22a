"""--dry-run: what would be loaded and made, how much memory that takes, and what is missing. Loads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from megaflux.common.errors import UserError
from megaflux.generation.job import Job, Runtime
from megaflux.generation.request import EMPTY_UNSEEN, reference_size
from megaflux.generation.run import Opened, read_inputs, resolve_size, steps_taken
from megaflux.infer.memory import print_memory
from megaflux.infer.parts import Facts, extra_parts, facts_of


def report(job: Job, runtime: Runtime, embedded: Mapping[str, bytes] | None = None) -> int:
    """Print the report of a checked job; returns 0, or 2 where something is missing (one `problem:` line for each).

    embedded: input files by SHA-256, of the picture that is replayed.
    """
    from megaflux.generation.control.detectors import read_mask

    problems: list[str] = []
    opened = Opened({}, {}, [])
    try:
        job, opened = read_inputs(job, embedded)
        if job.mask is not None and job.image is not None:
            read_mask(opened.masks[job.mask.sha256], opened[job.image].size, opened.notes)
    except UserError as error:
        problems.append(str(error))
    facts = None
    try:
        facts = facts_of(runtime)
    except UserError as error:
        problems.append(str(error))
    extra, missing = extra_parts(job, runtime)
    problems += missing
    if facts is not None:
        wants_t5 = (job.prompt or job.negative) and (job.text_encoder or facts.settings.text_encoders[0]) == "t5"
        if wants_t5 and "t5" not in facts.settings.text_encoders:
            problems.append("--text-encoder t5: these weights have none; use qwen")
        try:
            describe(job, opened, facts)
        except UserError as error:
            problems.append(str(error))
        print_memory([*facts.parts, *extra], job, runtime, facts)
        if job.cfg != 1 and not job.negative.strip() and "none" not in facts.settings.modes:
            opened.notes.append(EMPTY_UNSEEN)
    for note in opened.notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"problem: {' '.join(problem.split())}")
    return 2 if problems else 0


def describe(job: Job, opened: Opened, facts: Facts) -> None:
    """Print the job's lines of the report. UserError where its size cannot be resolved."""
    print(f"mode        {job.mode}")
    if all(item.sha256 in opened.data for item in job.inputs()):
        job = resolve_size(job, opened, facts.settings.longest_side, facts.settings.sizes)
    picture_tokens = condition = 0
    if job.width is not None and job.height is not None:
        picture_tokens = (job.height // 16) * (job.width // 16)
        print(f"size        {job.width}x{job.height} px, {picture_tokens} tokens")
    print(f"pictures    {len(job.seeds)}, seeds {job.seeds[0]} to {job.seeds[-1]}, {job.batch_size} at a time")
    twice = f", FLUX twice in each (cfg {job.cfg:g})" if job.cfg != 1 else ""
    print(f"steps       {steps_taken(job)} in all{twice}")
    for reference in job.references:
        if reference.sha256 in opened.pictures:
            size = reference_size(
                opened[reference].size, facts.settings.longest_side, as_released=job.release_compatible
            )
            tokens = reference_tokens(size, facts, job.reference_tokens)
            condition += math.prod(-(-side // job.downsample) for side in tokens)
            print(
                f"reference   {Path(reference.file).name}: {tokens[0]}x{tokens[1]} = {math.prod(tokens)} tokens, strength "
                f"{reference.strength:g}, {len(reference.dots)} dots"
            )
    if job.prompt:
        print(f"prompt      {len(job.prompt)} characters, at most {facts.settings.caption_max_tokens} tokens")
    if job.cfg != 1:
        words = f"{len(job.negative)} characters" if job.negative.strip() else "the empty condition"
        print(f"negative    {words}")
    if picture_tokens:
        print(f"attention   over {condition + picture_tokens} tokens, the prompt's not counted")


def reference_tokens(size: tuple[int, int], facts: Facts, most: int | None) -> tuple[int, int]:
    """(rows, columns) of the tokens of a reference that goes to Qwen2-VL's image processor at `size` (width, height) px.

    most: --reference-tokens; None: as trained.
    """
    from megaflux.models.tokens import condition_grid

    width, height = size
    most = most or facts.settings.vlm_max_tokens
    return condition_grid(height, width, most, facts.cell, min(most, facts.settings.vlm_min_tokens))
