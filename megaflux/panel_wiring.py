"""Which act of panel_state and panel_work each input of the page calls, and what it shows of the outcome."""

from __future__ import annotations

import html
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import torch

from megaflux.errors import UserError
from megaflux.panel_state import (
    Form,
    Session,
    cleared,
    clicked,
    edited,
    place,
    plain,
    referred,
    removed,
    shown,
    slid,
    store,
    taken_up,
    undone,
    with_mask_by,
)
from megaflux.panel_view import inputs, results, said
from megaflux.panel_work import Made, Stopped, Work, settings_text

VALUES = tuple(f.name for f in fields(Form) if f.name != "controls")
"""The inputs that a Form is made of, in the order in which handlers get them; ticks and scales of controls follow."""


class Page(gr.Blocks):
    """The page, and the means to stop what runs when it closes."""

    stops: dict[str | None, Event]

    def stop_all(self) -> None:
        for stop in self.stops.values():
            stop.set()


def build(work: Work) -> Page:
    """The page of a loaded pipeline."""
    page = Page(title="megaflux", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400))
    page.stops = {}
    with page:
        where = f"{work.runtime.checkpoint}, {work.pipeline.device}"
        gr.HTML(f"<h1>megaflux</h1><p>{html.escape(where)}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=440):
                c = inputs(work)
            with gr.Column(scale=6, min_width=480, elem_id="results"):
                c |= results()
        Handlers(work, page, c).connect()
    return page


class Handlers:
    """What the page's inputs call. Each returns {component: value}; what is not named stays as it is."""

    def __init__(self, work: Work, page: Page, components: dict[str, Any]):
        self.work, self.page, self.c = work, page, components

    def guarded(self, handler: Callable[..., dict]) -> Callable[..., dict]:
        """Trouble becomes a line on the page, and the page stays usable."""

        @wraps(handler)  # Gradio reads the signature
        def call(*args: Any, **kwargs: Any) -> dict:
            status = self.c["status"]
            try:
                return handler(*args, **kwargs)
            except UserError as error:
                return {status: said(plain(str(error)), "trouble")}
            except torch.OutOfMemoryError:
                return {status: said("out of memory; take a smaller shape or fewer pictures at a time", "trouble")}
            except Exception as error:  # a fault of ours: the whole of it belongs in the terminal
                traceback.print_exc(file=sys.stderr)
                line = f"failed: {type(error).__name__}: {error}".splitlines()[0]
                return {status: said(f"{line} (more in the terminal)", "trouble")}

        return call

    def form(self, values: tuple) -> Form:
        """Of the inputs' values in the order of VALUES, then tick and scale of each control."""
        given, rest = dict(zip(VALUES, values)), values[len(VALUES) :]
        given = {name: int(v) if isinstance(v, float) and name in ("downsample", "steps", "count", "seed", "batch_size")
                 else v for name, v in given.items()}  # fmt: skip
        kinds = [kind for kind, _, _ in self.c.get("controls", [])]
        ticked = zip(kinds, rest[::2], rest[1::2])
        return Form(**given, controls=tuple((kind, scale) for kind, tick, scale in ticked if tick))

    # The reference and its dots

    def seen(self, session: Session, values: tuple, line: str = "") -> dict:
        """The reference's part of the page after an act."""
        c, there = self.c, session.reference is not None
        picture, about, trouble = self.work.view(session, self.form(values))
        if there and session.current is not None and not trouble:
            about += f". The sliders move dot {session.current + 1} of {len(session.dots)}."
        return {
            c["session"]: session,
            c["grid"]: gr.update(value=picture, visible=there),
            c["grid_line"]: gr.update(value=said(about, "trouble" if trouble else ""), visible=there),
            c["dots_part"]: gr.update(visible=there),
            c["table"]: [[d.x, d.y, d.radius, d.weight] for d in session.dots],
            c["status"]: said(line),
        }

    def with_sliders(self, session: Session, values: tuple) -> dict:
        """`seen`, and the sliders at the current dot's values."""
        changes = self.seen(session, values)
        if session.current is not None:
            dot = session.dots[session.current]
            changes |= {self.c["radius"]: dot.radius, self.c["weight"]: dot.weight}
        return changes

    def give_reference(self, file: str | None, session: Session, *values: Any) -> dict:
        c = self.c
        if file is None:
            return {}
        try:
            stored = store(file, self.work.out)
            changes = self.seen(referred(session, stored), values, f"Reference: {stored.name}.")
        except UserError as error:
            return {c["reference_file"]: None, c["status"]: said(plain(str(error)), "trouble")}
        return changes | {c["reference_file"]: None} | self.began(changes[c["session"]], values)

    def drop_reference(self, session: Session, *values: Any) -> dict:
        session = referred(session, None)
        return self.seen(session, values) | self.began(session, values)

    def click(self, event: gr.SelectData, session: Session, radius: float, weight: float, *values: Any) -> dict:
        x, y = place(event.index, self.work.seen_size(session.reference))
        return self.with_sliders(clicked(session, x, y, radius, weight), values)

    def slide(self, session: Session, radius: float, weight: float, *values: Any) -> dict:
        return self.seen(slid(session, radius, weight), values)

    def take_up(self, event: gr.SelectData, session: Session, *values: Any) -> dict:
        changes = self.with_sliders(taken_up(session, event.index[0]), values)
        del changes[self.c["table"]]  # it is being edited
        return changes

    def edit(self, rows: list, session: Session, radius: float, weight: float, *values: Any) -> dict:
        try:
            return self.with_sliders(edited(session, rows, radius, weight), values)
        except UserError as error:  # the table goes back to the dots as they are
            return self.seen(session, values) | {self.c["status"]: said(plain(str(error)), "trouble")}

    def act(self, change: Callable[[Session], Session]) -> Callable[..., dict]:
        return lambda session, *values: self.with_sliders(change(session), values)

    # Start image, mask, control maps

    def began(self, session: Session, values: tuple, line: str = "", anew: bool = True) -> dict:
        """The start image's part of the page after an act. anew: another picture, so what was painted is gone."""
        c = self.c
        picture = self.work.begin_view(with_mask_by(session, self.form(values).mask_by))
        changes = {c["session"]: session, c["begin"]: picture, c["status"]: said(line)}
        if anew:
            changes[c["editor"]] = None if picture is None else {"background": picture, "layers": [], "composite": None}
        return changes

    def give(self, part: str) -> Callable[..., dict]:
        """The handler of an uploaded start image or mask."""

        def call(file: str | None, session: Session, *values: Any) -> dict:
            box = self.c[f"{part}_file"]
            if file is None:
                return {}
            try:
                stored = store(file, self.work.out)
                changes = self.began(replace(session, **{part: stored}), values, f"{part.capitalize()}: {stored.name}.",
                                     part == "start")  # fmt: skip
            except UserError as error:
                return {box: None, self.c["status"]: said(plain(str(error)), "trouble")}
            return changes | {box: None}

        return call

    def drop_start(self, session: Session, *values: Any) -> dict:
        return self.began(replace(session, start=None, mask=None, points=()), values)

    def point(self, event: gr.SelectData, session: Session, *values: Any) -> dict:
        if self.form(values).mask_by != "click" or "inpaint" not in self.form(values).mode:
            return {}
        x, y = place(event.index, self.work.seen_size(session.begin))
        return self.began(replace(session, points=(*session.points, (x, y, 1))), values, anew=False)

    def give_map(self, kind: str) -> Callable[..., dict]:
        def call(file: str | None, session: Session) -> dict:
            stored = store(file, self.work.out)
            session = replace(session, maps={**session.maps, kind: stored})
            return {self.c["session"]: session, self.c["map_files"][kind]: gr.update(label=f"{kind}: {stored.name}"),
                    self.c["status"]: said(f"Map {kind}: {stored.name}.")}  # fmt: skip

        return call

    def lay_out(self, session: Session, *values: Any) -> dict:
        """Show the parts that the mode uses."""
        c, form = self.c, self.form(values)
        uses = shown(form.mode)
        painting = uses["mask"] and form.mask_by == "paint"
        picture = self.work.begin_view(with_mask_by(session, form.mask_by)) if uses["start"] else None
        return {
            c["reference_part"]: gr.update(visible=uses["reference"]),
            c["start_part"]: gr.update(visible=uses["start"]),
            c["mask_by"]: gr.update(visible=uses["mask"]),
            c["mask_file"]: gr.update(visible=uses["mask"] and form.mask_by == "file"),
            c["editor"]: gr.update(visible=painting and session.begin is not None),
            c["begin"]: gr.update(value=picture, visible=uses["start"] and not painting and session.begin is not None),
            c["control_part"]: gr.update(visible=uses["control"]),
        }

    # Pictures

    def arm(self, request: gr.Request) -> dict:
        """Before a job waits for its turn: from now on Stop means this one."""
        self.page.stops[request.session_hash] = Event()
        return {self.c["status"]: said("Waiting for the model ...")}

    def stop(self, request: gr.Request) -> dict:
        if (event := self.page.stops.get(request.session_hash)) is None:
            return {self.c["status"]: said("Nothing is running.")}
        event.set()
        return {self.c["status"]: said("Stopping after this step ...")}

    def generate(
        self, request: gr.Request, progress=gr.Progress(), session: Session = Session(), editor: Any = None, *values: Any
    ) -> dict:  # fmt: skip
        c, form = self.c, self.form(values)
        stop = self.page.stops.setdefault(request.session_hash, Event())
        if form.mask_by == "paint" and shown(form.mode)["mask"] and session.begin is not None:
            strokes = [layer for layer in (editor or {}).get("layers", []) if layer is not None]
            session, form = replace(session, mask=self.work.painted(session, strokes)), replace(form, mask_by="file")
        progress(0, desc="reading the reference")
        try:
            made = self.work.generate(session, form, stop, lambda done, total: progress((done, total), unit="steps"))
        except Stopped:
            return {c["status"]: said("Stopped; nothing was saved.")}
        finally:
            self.page.stops.pop(request.session_hash, None)
        pictures = [(file, f"seed {seed}") for file, seed in zip(made.files, made.seeds)]
        return {
            c["made"]: made,
            c["gallery"]: gr.update(value=pictures, selected_index=None),
            c["attention"]: gr.update(value=list(made.maps), visible=bool(made.maps)),
            c["status"]: said(" ".join([made.line + ".", *(f"{note}." for note in made.notes)]), "good"),
        } | self.chose(made, 0)

    def choose(self, event: gr.SelectData, made: Made) -> dict:
        return self.chose(made, event.index)

    def chose(self, made: Made, index: int) -> dict:
        """A picture is the one that the buttons below mean."""
        c, file = self.c, made.files[index]
        folder = Path(tempfile.mkdtemp(prefix="megaflux-panel-"))
        settings = folder / f"{Path(file).stem}.json"
        settings.write_text(settings_text(file))
        return {
            c["chosen"]: index,
            c["chosen_line"]: f"Chosen: <b>seed {made.seeds[index]}</b>, {html.escape(Path(file).name)}",
            c["use"]: gr.update(interactive=True),
            c["settings"]: gr.update(value=str(settings), interactive=True),
        }

    def use(self, made: Made, index: int, session: Session, *values: Any) -> dict:
        stored = store(made.files[index], self.work.out)
        session = referred(session, stored)
        line = f"Seed {made.seeds[index]} is the reference now."
        return self.began(session, values) | self.seen(session, values, line)

    def connect(self) -> None:
        """Every input to its handler. Acts on the session run one after another, in the order of the person's."""
        c, on = self.c, self.on
        session, dot = [c["session"]], [c["session"], c["radius"], c["weight"]]
        on(c["reference_file"].upload, self.give_reference, [c["reference_file"], *session])
        on(c["drop_reference"].click, self.drop_reference, session)
        on(c["grid"].select, self.click, dot)
        for name in ("weight", "radius"):
            on(c[name].input, self.slide, dot, trigger_mode="always_last")
        on(c["table"].input, self.edit, [c["table"], *dot])
        on(c["table"].select, self.take_up, session)
        for name, change in (("remove", removed), ("undo", undone), ("clear", cleared)):
            on(c[name].click, self.act(change), session)
        for name in ("background", "variety", "downsample", "preserve_mass"):
            on(c[name].input, self.seen_again, session, trigger_mode="always_last")
        for name in ("seed", "text_encoder", "prompt"):  # of variety, and of T5's own limit
            on(c[name].change, self.seen_again, session, trigger_mode="always_last")
        for part in ("start", "mask"):
            on(c[f"{part}_file"].upload, self.give(part), [c[f"{part}_file"], *session]).then(**self.layout())
        on(c["drop_start"].click, self.drop_start, session).then(**self.layout())
        on(c["begin"].select, self.point, session)
        for name in ("mode", "mask_by"):
            on(c[name].input, self.lay_out, session)
        for kind, button in c.get("map_files", {}).items():
            on(button.upload, self.give_map(kind), [button, *session], form=False)
        c["random"].click(lambda: random.randrange(2**31), None, c["seed"], queue=False, api_visibility="private")
