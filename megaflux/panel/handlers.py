"""What the page's components call: each handler changes the state or makes pictures, and returns what the page then shows."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from threading import Event
from typing import Any, Literal

import gradio as gr

from megaflux.common.errors import UserError
from megaflux.panel.files import store
from megaflux.panel.request import in_page_words
from megaflux.panel.state import (
    Form,
    Made,
    Session,
    clicked,
    edited,
    masked_at,
    parts_used,
    place,
    selected,
    slid,
    unmasked,
    with_mask_by,
    with_reference,
    with_start,
)
from megaflux.panel.view import MASK_HINTS, status_line
from megaflux.panel.work import Stopped, Work, settings_text

VALUES = tuple(f.name for f in fields(Form) if f.name != "controls")
"""The inputs that make a Form, in the order in which handlers get them; the controls' checkboxes and scales follow."""
WHOLE = ("downsample", "steps", "count", "seed", "batch_size")  # whole numbers, which Gradio may send as 4.0
_NEW_SESSION = Session()
_BAR = gr.Progress()  # Gradio recognizes the parameter of a progress bar by this default


class Handlers:
    """The handlers of a page. Each takes the values of its components, those of VALUES last, and returns {component: value}
    for the components that change.

    A UserError that a handler raises becomes the status line (wiring.guarded).
    """

    def __init__(self, work: Work, components: dict[str, Any]):
        self.work, self.c = work, components
        self.stops: dict[str | None, Event] = {}
        """By browser session, for each job that runs or waits: set to stop it."""
        self.folder = tempfile.TemporaryDirectory(prefix="megaflux-panel-")

    def form(self, values: tuple) -> Form:
        """The Form of the values, in the order of VALUES, then the checkbox and scale of each control."""
        given, rest = dict(zip(VALUES, values)), values[len(VALUES) :]
        given |= {name: int(given[name]) for name in WHOLE if given[name] is not None}
        kinds = [kind for kind, _, _ in self.c["controls"]]
        ticked = zip(kinds, rest[::2], rest[1::2])
        return Form(**given, controls=tuple((kind, scale) for kind, tick, scale in ticked if tick))

    def trouble(self, error: UserError) -> dict:
        """The error as the status line."""
        return {self.c["status"]: status_line(in_page_words(str(error)), "trouble")}

    # The reference and its dots

    def show_reference(self, session: Session, *values: Any) -> dict:
        """The session, and the reference's part of the page."""
        c, there = self.c, session.reference is not None
        picture, about, trouble = self.work.view(session, self.form(values))
        if session.current is not None and not trouble:
            about += f"; the sliders move dot {session.current + 1} of {len(session.dots)}"
        return {
            c["session"]: session,
            c["grid"]: gr.update(value=picture, visible=there),
            c["grid_line"]: gr.update(value=status_line(about, "trouble" if trouble else ""), visible=there),
            c["dots_part"]: gr.update(visible=there),
            c["table"]: [[d.x, d.y, d.radius, d.weight] for d in session.dots],
        }

    def with_sliders(self, session: Session, *values: Any) -> dict:
        """`show_reference`, with the sliders at the current dot's values."""
        changes = self.show_reference(session, *values)
        if session.current is not None:
            dot = session.dots[session.current]
            for name in (
                "radius",
                "weight",
            ):  # numbers in the table may go beyond a slider's ends, which Gradio refuses
                slider = self.c[name]
                changes[slider] = min(max(getattr(dot, name), slider.minimum), slider.maximum)
        return changes

    def give_reference(self, file: str | None, session: Session, *values: Any) -> dict:
        box = self.c["reference_file"]
        if file is None:
            return {}
        try:
            stored = store(file, self.work.out)
            session = with_reference(session, stored)
            changes = self.show_reference(session, *values) | self.show_parts(session, *values)
        except UserError as error:
            return {box: None} | self.trouble(error)
        return changes | {box: None, self.c["status"]: status_line(f"Reference: {stored.name}.")}

    def drop_reference(self, session: Session, *values: Any) -> dict:
        session = with_reference(session, None)
        return self.show_reference(session, *values) | self.show_parts(session, *values)

    def click(self, event: gr.SelectData, session: Session, radius: float, weight: float, *values: Any) -> dict:
        if session.reference is None:
            return {}
        x, y = place(event.index, self.work.view_size(session.reference))
        return self.with_sliders(clicked(session, x, y, radius, weight), *values)

    def slide(self, name: str) -> Callable[..., dict]:
        return lambda value, session, *values: self.show_reference(slid(session, name, value), *values)

    def select_dot(self, event: gr.SelectData, session: Session, *values: Any) -> dict:
        changes = self.with_sliders(selected(session, event.index[0]), *values)
        del changes[self.c["table"]]  # it is being edited
        return changes

    def edit(self, rows: list, session: Session, radius: float, weight: float, *values: Any) -> dict:
        try:
            return self.with_sliders(edited(session, rows, radius, weight), *values)
        except UserError as error:  # the table shows the unchanged dots again
            return self.show_reference(session, *values) | self.trouble(error)

    def act(self, change: Callable[[Session], Session]) -> Callable[..., dict]:
        """A handler that makes a change of the dots without further input."""
        return lambda session, *values: self.with_sliders(change(session), *values)

    # Start image, mask, control maps

    def show_parts(self, session: Session, *values: Any) -> dict:
        """The session, and the parts of the page that the mode uses."""
        c, form = self.c, self.form(values)
        uses, there = parts_used(form.mode), session.begin is not None
        way = form.mask_by if uses["mask"] else ""
        clicks = there and way in ("discs", "points")
        picture = self.work.begin_view(with_mask_by(session, way)) if there else None
        return {
            c["session"]: session,
            c["reference_part"]: gr.update(visible=uses["reference"]),
            c["start_part"]: gr.update(visible=uses["start"]),
            c["mask_by"]: gr.update(visible=uses["mask"]),
            c["mask_file"]: gr.update(visible=way == "file"),
            c["disc"]: gr.update(visible=clicks and way == "discs"),
            c["begin"]: gr.update(value=picture, visible=uses["start"] and there),
            c["begin_hint"]: gr.update(value=MASK_HINTS.get(way, ""), visible=clicks),
            c["unmask"]: gr.update(visible=uses["mask"] and there),
            c["drop_start"]: gr.update(visible=session.start is not None),
            c["control_part"]: gr.update(visible=uses["control"]),
        }

    def give_start(self, file: str | None, session: Session, *values: Any) -> dict:
        return self._give("start", file, session, *values)

    def give_mask(self, file: str | None, session: Session, *values: Any) -> dict:
        return self._give("mask", file, session, *values)

    def _give(self, part: Literal["start", "mask"], file: str | None, session: Session, *values: Any) -> dict:
        box = self.c[f"{part}_file"]
        if file is None:
            return {}
        try:
            stored = store(file, self.work.out)
            session = with_start(session, stored) if part == "start" else replace(session, mask=stored)
            changes = self.show_parts(session, *values)
        except UserError as error:
            return {box: None} | self.trouble(error)
        resized = part == "mask" and session.begin is not None and stored.size != session.begin.size
        how = ", resized to the start image's size" if resized else ""
        line = status_line(f"{'Start image' if part == 'start' else 'Mask'}: {stored.name}{how}.")
        return changes | {box: None, self.c["status"]: line}

    def drop_start(self, session: Session, *values: Any) -> dict:
        return self.show_parts(with_start(session, None), *values)

    def mask_at(self, event: gr.SelectData, radius: float, session: Session, *values: Any) -> dict:
        form = self.form(values)
        if not parts_used(form.mode)["mask"] or session.begin is None:
            return {}
        x, y = place(event.index, self.work.view_size(session.begin))
        return self.show_parts(masked_at(session, form.mask_by, x, y, radius), *values)

    def unmask(self, session: Session, *values: Any) -> dict:
        return self.show_parts(unmasked(session, self.form(values).mask_by), *values)

    def give_map(self, kind: str) -> Callable[..., dict]:
        def call(file: str | None, session: Session, *_: Any) -> dict:
            if file is None:
                return {}
            stored = store(file, self.work.out)
            session = replace(session, maps={**session.maps, kind: stored})
            return {
                self.c["session"]: session,
                self.c["map_files"][kind]: gr.update(label=stored.name),
                self.c["status"]: status_line(f"Map for {kind}: {stored.name}."),
            }

        return call

    # Pictures

    def arm(self, request: gr.Request) -> dict:
        """Called before a job waits for its turn: from now on Stop ends this job."""
        self.stops[request.session_hash] = Event()
        return {self.c["status"]: status_line("Generating ...")}

    def stopping(self, request: gr.Request) -> dict:
        """The status line of Stop, returned before `stop` acts so that it cannot replace the job's own last line."""
        line = "Stopping after this step ..." if request.session_hash in self.stops else "Nothing is running."
        return {self.c["status"]: status_line(line)}

    def stop(self, request: gr.Request) -> None:
        """End the session's job after its current step."""
        if (event := self.stops.get(request.session_hash)) is not None:
            event.set()

    def generate(
        self, request: gr.Request, bar: gr.Progress = _BAR, session: Session = _NEW_SESSION, *values: Any
    ) -> dict:
        """Make the pictures that the page asks for."""
        c, form = self.c, self.form(values)
        stop = self.stops.setdefault(request.session_hash, Event())
        bar(0, desc="Reading what was given")
        try:
            made = self.work.generate(
                session, form, stop, lambda done, total: bar((done, total), desc="Generating", unit="steps")
            )
        except Stopped:
            return {c["status"]: status_line("Stopped; nothing was saved.")}
        finally:
            self.stops.pop(request.session_hash, None)
        pictures = [(file, f"seed {seed}") for file, seed in zip(made.files, made.seeds)]
        return {
            c["made"]: made,
            c["gallery"]: gr.update(
                value=pictures, columns=min(len(pictures), 2 if len(pictures) < 5 else 3), selected_index=0
            ),
            c["attention_hint"]: gr.update(visible=bool(made.maps)),
            c["attention"]: gr.update(value=list(made.maps), visible=bool(made.maps)),
            c["status"]: status_line(". ".join([made.line, *made.notes]) + ".", "good"),
        } | self._choice(made, 0)

    def choose(self, event: gr.SelectData, made: Made) -> dict:
        return self._choice(made, event.index)

    def _choice(self, made: Made, index: int) -> dict:
        """The picture that the buttons below the gallery act on."""
        c, file = self.c, Path(made.files[index])
        settings = Path(self.folder.name) / f"{file.stem}.json"
        settings.write_text(settings_text(str(file)))
        return {
            c["chosen"]: index,
            c["chosen_line"]: f"Chosen: <b>seed {made.seeds[index]}</b>, {html.escape(file.name)}",
            c["use"]: gr.update(interactive=True),
            c["settings"]: gr.update(value=str(settings), interactive=True),
        }

    def use(self, made: Made, index: int, session: Session, *values: Any) -> dict:
        """The chosen picture becomes the reference, without dots."""
        session = with_reference(session, store(made.files[index], self.work.out))
        line = status_line(f"Seed {made.seeds[index]} is the reference now.")
        return self.show_reference(session, *values) | self.show_parts(session, *values) | {self.c["status"]: line}
