"""What the panel does with the loaded pipeline: heat-maps, pictures, settings. No Gradio."""

from __future__ import annotations

import io
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
from megaflux.data.reference_size import MAX_ASPECT
from megaflux.generation.condition import ReferenceTokens, t5_limits, token_weights
from megaflux.generation.dots import griddot
from megaflux.generation.dots.dots import Dot, Weighting
from megaflux.generation.dots.heat_map import heat_map
from megaflux.generation.request import check_weighting, reference_size
from megaflux.generation.run import Result, read_inputs, run, steps_taken
from megaflux.infer.load import Loaded
from megaflux.infer.make import Written, write
from megaflux.infer.request import Output
from megaflux.panel.files import keep
from megaflux.panel.request import job_of
from megaflux.panel.state import Form, Made, Session, Stored, parts_used

VIEW_SIDE = 512  # px: the longer side of pictures to click on; shown at about 300, where the numbers can be read
MASKED = (255, 60, 60)  # colour of what is repainted, on the start image


class Stopped(Exception):
    """The user pressed Stop."""


@dataclass(frozen=True)
class Work:
    """A loaded pipeline, and the folder for its pictures."""

    loaded: Loaded
    out: Path

    def grid(self, reference: Stored, form: Form) -> tuple[int, int]:
        """(rows, columns) of a reference's tokens before downsampling, as `condition.encode` makes them. UserError where the
        image processor refuses the size."""
        trunk, settings = self.loaded.pipeline.models.trunk, self.loaded.pipeline.settings
        width, height = reference_size(reference.size, settings.longest_side, form.release_compatible)
        reader = form.text_encoder or settings.text_encoders[0]
        limits = t5_limits(trunk) if reader == "t5" and form.prompt.strip() else None
        try:
            return trunk.grid(height, width, limits)
        except ValueError as error:
            raise UserError(f"{reference.name}: {error}; give another picture") from None

    def weights(self, reference: Stored, dots: Sequence[Dot], form: Form) -> np.ndarray:
        """(rows, columns) weights of the reference's tokens for the first seed. UserError where no token would be left."""
        weighting = Weighting(
            _number(form.background, 1.0),
            form.preserve_mass,
            _number(form.variety, 0.0),
            int(_number(form.downsample, 1)),
        )
        check_weighting(weighting)
        rows, columns = (-(-side // weighting.downsample) for side in self.grid(reference, form))
        # As encode does, the background's weight is ignored where there are no dots.
        of_dots = griddot.token_weights(dots, (rows, columns), weighting.background if dots else 1.0)
        griddot.check_weights(of_dots)
        tokens = ReferenceTokens(torch.empty(0), (rows, columns), of_dots, 1.0)
        return token_weights(tokens, weighting, int(_number(form.seed, 0))).view(rows, columns).numpy()

    def view(self, session: Session, form: Form) -> tuple[Image.Image | None, str, bool]:
        """(the reference under its tokens' weights, a line about it, whether the line tells of an error). Runs no model."""
        stored = session.reference
        if stored is None:
            return None, "", False
        picture, trouble = shrunk(stored.file, stored.sha256), ""
        try:
            weights = self.weights(stored, session.dots, form)
        except UserError as error:  # dots that leave no token are shown as well
            weights, trouble = np.zeros(self.grid(stored, form)), str(error)
        heat = heat_map(picture, weights, session.dots, side=VIEW_SIDE)
        if session.current is not None:
            ring(heat, session.dots[session.current])
        rows, columns = weights.shape
        low, high = float(weights.min()), float(weights.max())
        line = f"{stored.name}: {rows} rows × {columns} columns of tokens"
        line += f", weights {low:.2g} to {high:.2g}" if high - low > 1e-9 else f", each of weight {low:.2g}"
        return heat, trouble or line, bool(trouble)

    def view_size(self, stored: Stored) -> tuple[int, int]:
        """(width, height) px of a picture on the page, in which a click is counted."""
        return _scaled(shrunk(stored.file, stored.sha256).size, VIEW_SIDE)

    def begin_view(self, session: Session) -> Image.Image | None:
        """The start image with the repainted part in red, and its points."""
        if session.begin is None:
            return None
        picture = shrunk(session.begin.file, session.begin.sha256)
        picture = picture.resize(self.view_size(session.begin), Image.Resampling.LANCZOS)
        mask = disc_mask(session.discs, picture.size) if session.discs else None
        if session.mask is not None:
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
        """The state with its discs replaced by a mask's file of the start image's size, which a job can name."""
        if form.mask_by != "discs" or not parts_used(form.mode)["mask"] or not session.discs or session.begin is None:
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
        """Make and save the page's pictures.

        stop: ends the job after the current step. on_progress: called with (steps done, steps in all). Raises Stopped, and
        UserError for what cannot be made; then nothing is saved.
        """
        started = time.perf_counter()
        if parts_used(form.mode)["control"] and self.loaded.pipeline.controlnet is None:
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
        result = run(self.loaded.pipeline, job, opened, self.loaded.detectors, on_step)
        written = write(result, self.loaded, opened.data, Output(self.out))
        return self._made(result, written, time.perf_counter() - started)

    def _made(self, result: Result, written: Written, seconds: float) -> Made:
        job, count = result.job, len(written.pictures)
        maps = []
        for index, seed in enumerate(job.seeds):
            if files := written.attention_maps.get(seed):
                share = float(sum(mass.sum() for mass in result.output.attention[index]))
                maps.append((str(files[-1]), f"seed {seed}: {share:.1%}"))
        many = f"{count} pictures" if count > 1 else "1 picture"
        return Made(
            files=tuple(map(str, written.pictures.values())),
            seeds=tuple(written.pictures),
            maps=tuple(maps),
            line=f"{many} of {job.width} × {job.height} px in {seconds:.1f} s, saved in {short(self.out)}",
            notes=tuple(dict.fromkeys(result.notes)),
        )


def short(path: str | Path) -> str:
    """A path to show: relative to the working directory where it is below it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def settings_text(file: str) -> str:
    """The text of a picture's chunk `megaflux`. UserError where it cannot be read."""
    try:
        with strict_pillow(), Image.open(file, formats=("PNG",)) as picture:
            picture.load()  # the chunk may stand after the pixels
            return picture.info["megaflux"]
    except Exception:  # the file is gone or another one; Pillow's decoders raise all sorts of exceptions
        raise UserError(f"{file}: its settings cannot be read; generate again") from None


@lru_cache(maxsize=8)
def shrunk(file: str, sha256: str) -> Image.Image:
    """A stored picture of at most VIEW_SIDE px, cached, because dragging a slider must not decode 20 megapixels each time.
    sha256: tells a file that has changed from the cached one."""
    try:
        picture, _ = decode(Path(file).read_bytes(), max_aspect=MAX_ASPECT)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give it again") from None
    return picture.resize(_scaled(picture.size, min(VIEW_SIDE, max(picture.size))), Image.Resampling.LANCZOS)


def _scaled(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """(width, height) with the longer side scaled to `longest` px."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def disc_mask(discs: Sequence[tuple[float, float, float]], size: tuple[int, int]) -> Image.Image:
    """A mask of `size` (width, height) px, mode L, with 255 inside the discs (x, y in 0..1, radius as a fraction of the
    shorter side)."""
    mask = Image.new("L", size)
    draw, (width, height) = ImageDraw.Draw(mask), size
    for x, y, radius in discs:
        x, y, radius = x * width, y * height, radius * min(size)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return mask


def ring(picture: Image.Image, dot: Dot) -> None:
    """Draw a white ring around the dot that the sliders move."""
    x, y = dot.x * picture.width, dot.y * picture.height
    ImageDraw.Draw(picture).ellipse([x - 11, y - 11, x + 11, y + 11], outline="white", width=3)


def _number(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
