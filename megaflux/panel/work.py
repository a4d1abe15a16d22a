"""What the panel does with the loaded model: heat-maps, pictures, settings. No Gradio here: handlers can be tested alone."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from megaflux.common.errors import UserError
from megaflux.data.images import decode, strict_pillow
from megaflux.generation.condition import ReferenceTokens, t5_limits, token_weights
from megaflux.generation.dots import griddot
from megaflux.generation.dots.dots import Dot, Weighting, check_weighting
from megaflux.generation.dots.heat_map import heat_map
from megaflux.generation.job import Runtime
from megaflux.generation.outputs import stem_of
from megaflux.generation.pipeline import Qwen2VLFluxPipeline
from megaflux.generation.run import read_inputs, run, steps_taken
from megaflux.infer import make as infer
from megaflux.panel.state import Form, Session, Stored, job_of, keep, shown

VIEW_SIDE = 512  # px: the longer side of pictures to click on; shown at about 300, where the numbers can be read
MASKED = (255, 60, 60)  # what is painted anew, on the start image


class Stopped(Exception):
    """The person pressed Stop."""


@dataclass(frozen=True)
class Made:
    """The pictures of one press of Generate."""

    files: tuple[str, ...]
    seeds: tuple[int, ...]
    maps: tuple[tuple[str, str], ...] = ()
    """(file, caption) of each attention map."""
    line: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Work:
    """A loaded pipeline and where its pictures go."""

    pipeline: Qwen2VLFluxPipeline
    detectors: Any
    runtime: Runtime
    out: Path

    def grid(self, session: Session, form: Form) -> tuple[int, int]:
        """(rows, columns) of the reference's tokens, as `condition.encode` will have them before downsampling."""
        trunk, settings = self.pipeline.models.trunk, self.pipeline.settings
        width, height = session.reference.size
        scale = min(1.0, settings.longest_side / max(width, height))
        height, width = (max(1, round(side * scale)) for side in (height, width))
        reader = form.text_encoder or settings.text_encoders[0]
        limits = t5_limits(trunk) if reader == "t5" and form.prompt.strip() else None
        try:
            return trunk.grid(height, width, limits)
        except ValueError as error:  # the image processor's own limits
            raise UserError(f"{session.reference.name}: {error}; give another picture") from None

    def weights(self, session: Session, form: Form) -> np.ndarray:
        """(H, W): the weights that the first picture's tokens will have. UserError where nothing would be left."""
        weighting = Weighting(
            _number(form.background, 1.0),
            form.preserve_mass,
            _number(form.variety, 0.0),
            int(_number(form.downsample, 1)),
        )
        check_weighting(weighting)
        rows, columns = (-(-side // weighting.downsample) for side in self.grid(session, form))
        of_dots = griddot.token_weights(
            session.dots, (rows, columns), weighting.background if session.dots else 1.0
        )  # as encode does: a background alone is no dot
        griddot.check_weights(of_dots)
        tokens = ReferenceTokens(torch.empty(0), (rows, columns), of_dots, 1.0)
        return token_weights(tokens, weighting, int(_number(form.seed, 0))).view(rows, columns).numpy()

    def view(self, session: Session, form: Form) -> tuple[Image.Image | None, str, bool]:
        """(the reference under its tokens' weights, a line about it, whether the line is of trouble). Runs no model."""
        stored = session.reference
        if stored is None:
            return None, "", False
        picture, trouble = shrunk(stored.file, stored.sha256), ""
        try:
            weights = self.weights(session, form)
        except UserError as error:  # dots that leave nothing are to be seen, too
            weights, trouble = np.zeros(self.grid(session, form)), str(error)
        heat = heat_map(picture, weights, session.dots, side=VIEW_SIDE)
        if session.current is not None:
            ring(heat, session.dots[session.current])
        rows, columns = weights.shape
        low, high = float(weights.min()), float(weights.max())
        line = f"{stored.name}: {rows} rows × {columns} columns of tokens"
        line += f", weights {low:.2g} to {high:.2g}" if high - low > 1e-9 else f", each of weight {low:.2g}"
        return heat, trouble or line, bool(trouble)

    def seen_size(self, stored: Stored) -> tuple[int, int]:
        """(width, height) of the heat-map of a picture, px: what a click's pixels count in."""
        scale = VIEW_SIDE / max(shrunk(stored.file, stored.sha256).size)
        return tuple(max(1, round(side * scale)) for side in shrunk(stored.file, stored.sha256).size)

    def begin_view(self, session: Session) -> Image.Image | None:
        """The start image with what is made anew in red, and its points. UserError for a mask of another size."""
        if session.begin is None:
            return None
        picture = shrunk(session.begin.file, session.begin.sha256)
        picture = picture.resize(self.seen_size(session.begin), Image.Resampling.LANCZOS)
        mask = disc_mask(session.discs, picture.size) if session.discs else None
        if session.mask is not None:
            if session.mask.size != session.begin.size:
                raise UserError(
                    f"mask {session.mask.name}: {_by(session.mask.size)} px, the start image has "
                    f"{_by(session.begin.size)}; give a mask of the same size"
                )
            mask = shrunk(session.mask.file, session.mask.sha256).convert("L").resize(picture.size)
            mask = mask.point(lambda value: 255 if value >= 128 else 0)
        if mask is not None:
            red = Image.blend(picture, Image.new("RGB", picture.size, MASKED), 0.55)
            picture = Image.composite(red, picture, mask)
        draw = ImageDraw.Draw(picture)
        for x, y, _ in session.points:
            x, y = x * picture.width, y * picture.height
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], fill=MASKED, outline="white", width=2)
        return picture

    def with_mask(self, session: Session, form: Form) -> tuple[Session, Form]:
        """Discs made a mask's file of the start image's size: what a job can name."""
        if form.mask_by != "discs" or not shown(form.mode)["mask"] or not session.discs or session.begin is None:
            return session, form
        buffer = io.BytesIO()
        disc_mask(session.discs, session.begin.size).save(buffer, "PNG")
        mask = keep("mask.png", buffer.getvalue(), session.begin.size, self.out)
        return replace(session, mask=mask), replace(form, mask_by="file")

    def generate(
        self,
        session: Session,
        form: Form,
        stop: Event,
        on_progress: Callable[[int, int], Any] = lambda done, total: None,
    ) -> Made:
        """Make and save the page's pictures. on_progress(steps done, steps in all). UserError; Stopped: nothing is saved."""
        started = time.perf_counter()
        if shown(form.mode)["control"] and self.pipeline.controlnet is None:
            raise UserError(f"mode {form.mode} needs a ControlNet; start the panel with --controlnet DIR")
        job, opened = read_inputs(job_of(*self.with_mask(session, form)))
        total, done = steps_taken(job), 0

        def on_step() -> None:
            nonlocal done
            done += 1
            if stop.is_set():
                raise Stopped
            on_progress(done, total)

        if stop.is_set():
            raise Stopped
        result = run(self.pipeline, job, opened, self.detectors, on_step)
        written = infer.write(result, self.runtime, self.pipeline, opened.data, self.out, {})
        files, maps = sorted_files(written, stem_of(result.job))
        if result.output.attention:
            shares = {
                seed: float(sum(m.sum() for m in result.output.attention[i])) for i, seed in enumerate(result.job.seeds)
            }
            maps = {seed: (file, f"seed {seed}: {shares[seed]:.1%}") for seed, file in maps.items()}
        seconds = time.perf_counter() - started
        job = result.job
        many = f"{len(files)} pictures" if len(files) > 1 else "1 picture"
        line = f"{many} of {job.width} × {job.height} px in {seconds:.1f} s, saved in {short(self.out)}"
        return Made(
            tuple(map(str, files.values())),
            tuple(files),
            tuple(maps.values()),
            line,
            tuple(dict.fromkeys(result.notes)),
        )


def sorted_files(written: Sequence[Path], stem: str) -> tuple[dict[int, Path], dict[int, str]]:
    """({seed: picture}, {seed: attention map}) among the files that infer.write made, whose names begin with `stem`."""
    pictures, maps = {}, {}
    for file in written:
        match = re.fullmatch(r"-seed(\d+)(-attention)?(-\d+)?", file.stem.removeprefix(stem))
        if match and match[2]:
            maps[int(match[1])] = str(file)
        elif match:
            pictures[int(match[1])] = file
    return pictures, maps


def short(path: str | Path) -> str:
    """A path for the eye: from the working directory where it lies in it, else whole."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def settings_text(file: str) -> str:
    """The settings in a picture's chunk `megaflux`, as they stand there. UserError where they are gone."""
    try:
        with strict_pillow(), Image.open(file, formats=("PNG",)) as picture:
            return picture.text["megaflux"]
    except Exception:  # another file under this name, or none; Pillow's decoders raise what they meet
        raise UserError(f"{file}: its settings cannot be read; generate again") from None


@lru_cache(maxsize=8)
def shrunk(file: str, sha256: str) -> Image.Image:
    """A stored picture at most VIEW_SIDE px long, for the page: dragging a slider must not decode 20 megapixels."""
    try:
        picture, _ = decode(Path(file).read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give it again") from None
    scale = min(1.0, VIEW_SIDE / max(picture.size))
    return picture.resize(tuple(max(1, round(side * scale)) for side in picture.size), Image.Resampling.LANCZOS)


def disc_mask(discs: Sequence[tuple[float, float, float]], size: tuple[int, int]) -> Image.Image:
    """Discs (x, y in 0..1, radius as a fraction of the shorter side) as a mask: mode L, 255 inside, of `size` px."""
    mask = Image.new("L", size)
    draw, (width, height) = ImageDraw.Draw(mask), size
    for x, y, radius in discs:
        x, y, radius = x * width, y * height, radius * min(size)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return mask


def ring(shown: Image.Image, dot: Dot) -> None:
    """A white ring around the dot that the sliders move."""
    x, y = dot.x * shown.width, dot.y * shown.height
    ImageDraw.Draw(shown).ellipse([x - 11, y - 11, x + 11, y + 11], outline="white", width=3)


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
