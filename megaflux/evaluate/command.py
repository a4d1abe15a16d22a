"""From a command line to a report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaflux import runs
from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.common.ranks import World, barrier, raise_first
from megaflux.evaluate import judge as judges
from megaflux.evaluate import judge_training, report
from megaflux.evaluate.evaluation import Subject, Task, check_judge, compute, plan, share
from megaflux.evaluate.judge import Judge
from megaflux.evaluate.making import PipelineMaker
from megaflux.evaluate.options import Request
from megaflux.evaluate.outside import Embedder
from megaflux.evaluate.report import Findings
from megaflux.evaluate.results import (
    Results,
    cells_section,
    loss_section,
    outside_section,
    pictures_section,
    true_cells,
    words_section,
)
from megaflux.evaluate.samples import HeldOut, fingerprint, load, load_judge_grid, train_rows
from megaflux.generation.layout import is_export
from megaflux.generation.outputs import check_out
from megaflux.generation.runtime import device_and_dtype
from megaflux.training import distributed

STATE = "evaluation.json"
BEGUN = f"{STATE}, {judges.NAME}, checkpoint/ and against/"
"""What is of an evaluation in its folder, beside reports."""
EXPORT_STEPS, EXPORT_LOSS_GUIDANCE = 28, 1.0
LESSON = 2048  # most training pictures that a judge without a grid sees
Load = Callable[[Request, str, int | None, World], Subject]


def run(request: Request, load_subject: Load | None = None) -> int:
    """Evaluate what the command line names and write the report. Returns the exit code.

    load_subject: (request, path, update, world) -> the checkpoint; for tests whose answer is known. UserError for bad input."""
    check_out(request.out)
    world = _world(request.device)
    with _attention_of_ranks(world):
        return _run(request, world, load_subject or load_checkpoint)


def _run(request: Request, world: World, load_subject: Load) -> int:
    settings, out = request.settings, Path(request.out)
    held_out = load(request.data, settings.samples, settings.cells, "grid" in settings.parts)
    if request.judge_data is not None and held_out.grid is None:
        raise UserError(
            f"--judge-data: {request.data} is taken as no grid, whose judge has no use for another; leave it out"
        )
    _say(world, f"{len(held_out.samples)} held-out samples of {request.data}" + _grid_line(held_out))
    # Before anything is computed: clear messages for folders that cannot be loaded.
    outside = _outside(request, world) if world.is_main else (None, None)
    first = load_subject(request, request.checkpoint, request.update, world)
    _begin(request, held_out, first, out, world)
    judge = _judge(request, held_out, first, out, world)
    findings: list[Findings] = []
    sheets: dict[str, torch.Tensor] = {}
    subject = first
    for label, path in (("checkpoint", request.checkpoint), ("against", request.against)):
        if path is None:
            continue
        if label == "against":
            subject.free()  # the first one's memory is needed
            subject = load_subject(request, path, None, world)
            _same_source(out, subject, world)
        task = plan(subject, held_out, settings)
        with _progress(label, share(task, world), world) as done:
            compute(subject, task, held_out, settings, out / label, world, done)
        if world.is_main:
            results = Results(
                held_out, out / label, task.pictures, len(task.loss_batches), settings.seeds, settings.references
            )
            findings.append(_findings(subject, task, results, judge, outside, settings.parts))
            sheets |= {
                c if label == "checkpoint" else f"Against: {c}": s for c, s in report.sheets(results, task).items()
            }
    if world.is_main:
        facts = {
            "settings": settings.to_json(),
            "data": {"path": request.data, "sha256": held_out.fingerprint, "samples": held_out.first},
            "judge": None if judge is None else judge.facts,
        }
        other = findings[1] if len(findings) > 1 else None
        content = report.content(findings[0], facts, other, settings.seeds[0])
        report.write(out, content, sheets)
        print("\n".join(report.lines(content)))
        print(f"\n{out / 'report.html'}")
    barrier(world)
    if world.size > 1:
        distributed.stop()
    return 0


def load_checkpoint(request: Request, path: str, update: int | None, world: World) -> Subject:
    """A run or an export. UserError for one that cannot be loaded."""
    from megaflux.infer.load import quiet_libraries

    quiet_libraries()
    settings = request.settings
    dtype = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
    folders = runs.Folders(**request.folders)
    steps, loss_guidance = EXPORT_STEPS, EXPORT_LOSS_GUIDANCE
    if not is_export(path):
        config = runs.find(path, update, folders, request.ema).config
        steps, loss_guidance = config.validation.steps, config.flow.middle_guidance
    folders = runs.Folders() if is_export(path) else folders
    pipeline = runs.load_pipeline(path, update, dtype, world.device, folders=folders, ema=request.ema)
    guidance = pipeline.settings.guidance if settings.guidance is None else settings.guidance
    maker = PipelineMaker(pipeline, settings.steps or steps, guidance, settings.cfg)
    modes = pipeline.settings.modes
    return Subject(path, pipeline.source, modes, pipeline.models, maker, loss_guidance)


def _findings(
    subject: Subject,
    task: Task,
    results: Results,
    judge: Judge | None,
    outside: tuple[Embedder | None, Embedder | None],
    parts: tuple[str, ...],
) -> Findings:
    sections: dict[str, Any] = {}
    grid = results.held_out.grid
    if "loss" in parts:
        sections["loss"] = loss_section(results)
    if "pictures" in parts:
        sections["pictures"] = pictures_section(results, judge)
    if grid is not None and judge is not None:
        sections["held_out_cells"] = cells_section(results, judge, grid, False)
        sections["held_out_contents"] = cells_section(results, judge, grid, True)
    if "words" in parts and judge is not None:
        sections["words"] = words_section(results, judge)
    if "pictures" in parts:
        sections["outside"] = outside_section(results, *outside)
    maker = subject.maker
    facts = {
        "path": subject.path,
        "source": subject.source,
        "condition": task.conditions.kind,
        "loss_guidance": subject.loss_guidance,
        **(
            {"steps": maker.steps, "guidance": maker.guidance, "cfg": maker.cfg}
            if isinstance(maker, PipelineMaker)
            else {}
        ),
    }
    return Findings(facts, {name: section for name, section in sections.items() if section})


def _world(device: str | None) -> World:
    """The ranks as torchrun, deepspeed or srun describe them; else this process alone."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    slurm = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if several or slurm:
        if device == "cpu" and torch.cuda.is_available():
            raise UserError("--device cpu: several ranks compute on the GPUs; start one process, or hide the GPUs")
        return distributed.start()
    return World(0, 1, device_and_dtype(device, None)[0])


@contextmanager
def _attention_of_ranks(world: World) -> Iterator[None]:
    """Inside, a CPU attends as `distributed.start` has it, which several ranks call: for figures of the same bits."""
    before = torch.backends.cuda.flash_sdp_enabled()
    if world.device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def _begin(request: Request, held_out: HeldOut, subject: Subject, out: Path, world: World) -> None:
    """Keep what OUT is of. UserError where it is begun with other settings, data or weights. Collective."""
    problem, wanted = None, _state(request, held_out, subject)
    if world.is_main:
        file = out / STATE
        try:
            out.mkdir(parents=True, exist_ok=True)
            there = json.loads(file.read_text()) if file.is_file() else None
            if there is None:
                write_json(file, wanted)
            else:
                problem = next(
                    (_differs(file, key, there, wanted) for key in wanted if there.get(key) != wanted[key]), None
                )
        except (OSError, ValueError) as error:
            problem = f"{file}: cannot be read or written ({error}); give another --out"
    raise_first(problem, world)


def _state(request: Request, held_out: HeldOut, subject: Subject) -> dict[str, Any]:
    facts = {f"settings.{name}": value for name, value in request.settings.to_json().items()}
    return {
        "format": report.FORMAT,
        "data": held_out.fingerprint,
        "checkpoint": json.loads(json.dumps(subject.source)),
        "against": request.against,
        "judge_steps": request.judge_steps,
        "judge_data": None if request.judge_data is None else fingerprint(request.judge_data),
        **json.loads(json.dumps(facts)),
    }


def _same_source(out: Path, subject: Subject, world: World) -> None:
    """UserError where what was begun with under `against` had other weights. Collective."""
    problem, file = None, out / "against" / "source.json"
    if world.is_main:
        wanted = json.loads(json.dumps(subject.source))
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
        elif json.loads(file.read_text()) != wanted:
            problem = f"{file}: was begun with other weights; give another --out"
    raise_first(problem, world)


def _differs(file: Path, key: str, there: dict[str, Any], wanted: dict[str, Any]) -> str:
    name = key.removeprefix("settings.")
    if name in ("data", "checkpoint", "format"):
        what = {"data": "other data", "checkpoint": "other weights", "format": "another version of megaflux"}[name]
        return f"{file}: was begun with {what}; give another --out, or delete {BEGUN} there"
    return f"{file}: was begun with {name} {there.get(key)}, not {wanted[key]}; give another --out, or delete {BEGUN} there"


def _judge(request: Request, held_out: HeldOut, subject: Subject, out: Path, world: World) -> Judge | None:
    """The judge of these data: the one given, the one of OUT, or a new one. Collective.

    None where nothing needs one."""
    parts, grid = request.settings.parts, held_out.grid
    if grid is None and not {"pictures", "words"} & set(parts):
        return None
    file = out / judges.NAME
    if request.judge is not None:
        given = Path(request.judge)
        file = given / judges.NAME if given.is_dir() else given
    steps = request.judge_steps or (judge_training.OTHER_STEPS if grid is None else judge_training.GRID_STEPS)
    if world.is_main and request.judge is None and file.is_file() and not Judge.is_current(file):
        _say(world, f"{file}: of another version of megaflux; training another judge in its place")
    # Rank 0 says whether: the others may look later, when it is there.
    if distributed.from_main(request.judge is None and not Judge.is_current(file), world):
        work = (lambda: _train_judge(request, held_out, subject, file, steps, world)) if world.is_main else None
        distributed.work_while_others_wait(work, world) if world.size > 1 else work and work()
    judge, problem = None, None
    try:
        judge = _read_judge(file, held_out, world) if world.is_main else None
    except UserError as error:
        problem = str(error)
    raise_first(problem, world)
    if judge is not None and "style" in judge.facts:
        shown = f"style {judge.facts['style']:.3f}, content {judge.facts['content']:.3f}"
        _say(world, f"judge: {shown} right on {judge.facts['cells']} real held-out cells (the ceiling)")
    return judge


def _read_judge(file: Path, held_out: HeldOut, world: World) -> Judge:
    judge = Judge.load(file, world.device)
    if judge.facts.get("data") != held_out.fingerprint:
        raise UserError(f"{file}: the judge of other data; leave --judge out, and one is trained for these")
    check_judge(judge, held_out)
    return judge


def _train_judge(request: Request, held_out: HeldOut, subject: Subject, file: Path, steps: int, world: World) -> None:
    facts: dict[str, Any] = {"version": judges.FORMAT, "data": held_out.fingerprint, "steps": steps}
    if held_out.grid is not None:
        known = held_out.grid
        if request.judge_data is not None:
            known = load_judge_grid(request.judge_data, held_out.grid)
            facts["judge_data"] = fingerprint(request.judge_data)
        lesson = judge_training.of_grid(
            known, lambda pictures, change: subject.maker.round_trip(pictures.to(world.device), change)
        )
    else:
        rows = train_rows(request.data, held_out.info, LESSON)
        lesson = judge_training.of_pictures([row["image"] for row in rows], [row["caption"] for row in rows])
    with _progress("judge", judge_training.updates(steps, held_out.grid is not None), world) as done:
        judge = judge_training.train(lesson, facts, steps, world.device, done)
    if held_out.grid is not None:
        judge = judge.of({cell.content for cell in held_out.grid.train})
        judge.facts |= true_cells(judge, held_out.grid)
    judge.save(file)


def _outside(request: Request, world: World) -> tuple[Embedder | None, Embedder | None]:
    clip = None if request.clip is None else Embedder("--clip", request.clip, world.device)
    return clip, None if request.dino is None else Embedder("--dino", request.dino, world.device)


@contextmanager
def _progress(what: str, total: int, world: World) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, on rank 0; none in a log file."""
    with tqdm(total=total, desc=what, disable=not (world.is_main and sys.stderr.isatty()), leave=False) as bar:
        yield bar.update


def _grid_line(held_out: HeldOut) -> str:
    grid = held_out.grid
    if grid is None:
        return ""
    return f": a grid of {len(grid.contents)} contents x {len(grid.styles)} styles, {len(grid.held_out)} cells held out"


def _say(world: World, line: str) -> None:
    if world.is_main:
        print(line, flush=True)
