"""The page: the components of view.py, and which handler each of them calls."""

from __future__ import annotations

import html
import random
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr
import torch

from megaflux.common.errors import UserError
from megaflux.panel.handlers import VALUES, Handlers
from megaflux.panel.state import cleared, removed, undone
from megaflux.panel.view import inputs, results, status_line
from megaflux.panel.work import Work, short


class Page(gr.Blocks):
    """The page, with its handlers."""

    handlers: Handlers

    def stop_all(self) -> None:
        """Stop all jobs and delete temporary files. Called before the page is closed."""
        for stop in list(self.handlers.stops.values()):
            stop.set()
        self.handlers.folder.cleanup()


def build(work: Work) -> Page:
    """The page of a loaded pipeline."""
    loaded = work.loaded
    with Page(title="megaflux", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        averaged = ", averaged weights" * bool(loaded.pipeline.source.get("ema"))  # of a run or in an export
        where = f"{short(loaded.runtime.checkpoint)}{averaged}, {loaded.pipeline.device}"
        gr.HTML(f"<h1>megaflux</h1><p>{html.escape(where)}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=440):
                c = inputs(loaded.runtime, loaded.pipeline.settings)
            with gr.Column(scale=6, min_width=480, elem_id="results"):
                c |= results()
        page.handlers = Handlers(work, c)
        connect(page.handlers)
    return page


def connect(h: Handlers) -> None:
    """Connect every component to its handler."""
    c = h.c
    values = [c[name] for name in VALUES] + [item for _, *pair in c["controls"] for item in pair]
    outputs = [item for name, item in c.items() if name not in ("controls", "map_files")]
    outputs += c["map_files"].values()

    def on(event: Callable, handler: Callable[..., dict], *first: Any, **options: Any) -> None:
        # One at a time, because an act reads the session that the one before it wrote. show_progress_on: Gradio's own errors
        # break the page if they are shown on a gr.Column among the outputs.
        event(
            guarded(h, handler),
            [*first, c["session"], *options.pop("dot", []), *values],
            outputs,
            concurrency_id="acts",
            show_progress="hidden",
            show_progress_on=c["status"],
            api_visibility="private",
            **options,
        )

    dot = {"dot": [c["radius"], c["weight"]]}
    on(c["reference_file"].upload, h.give_reference, c["reference_file"])
    on(c["drop_reference"].click, h.drop_reference)
    on(c["grid"].select, h.click, **dot)
    on(c["table"].input, h.edit, c["table"], **dot)
    on(c["table"].select, h.select_dot)
    for name in ("weight", "radius"):
        on(c[name].input, h.slide(name), c[name], trigger_mode="always_last")
    for name in ("background", "preserve_mass", "variety", "downsample", "text_encoder", "release_compatible"):
        on(c[name].input, h.show_reference, trigger_mode="always_last")
    for name in ("seed", "prompt"):  # the seed draws the variety; with a prompt T5 has fewer tokens for the picture
        on(c[name].change, h.show_reference, trigger_mode="always_last")
    for name, change in (("remove", removed), ("undo", undone), ("clear", cleared)):
        on(c[name].click, h.act(change))
    on(c["start_file"].upload, h.give_start, c["start_file"])
    on(c["mask_file"].upload, h.give_mask, c["mask_file"])
    on(c["drop_start"].click, h.drop_start)
    on(c["begin"].select, h.mask_at, c["disc"])
    on(c["unmask"].click, h.unmask)
    on(c["mode"].input, h.show_parts)
    on(c["mask_by"].input, h.show_parts)
    for kind, button in c["map_files"].items():
        on(button.upload, h.give_map(kind), button)
    on(c["use"].click, h.use, c["made"], c["chosen"])

    now = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    c["random"].click(lambda: random.randrange(2**31), None, c["seed"], **now)
    c["stop"].click(guarded(h, h.stopping), None, c["status"], **now).then(h.stop, None, None, **now)
    chosen = [c[name] for name in ("chosen", "chosen_line", "use", "settings")]
    c["gallery"].select(guarded(h, h.choose), c["made"], [*chosen, c["status"]], **now)
    c["generate"].click(guarded(h, h.arm), None, c["status"], **now).then(
        guarded(h, h.generate),
        [c["session"], *values],
        [c["made"], c["gallery"], c["attention"], c["attention_hint"], c["status"], *chosen],
        concurrency_id="model",
        concurrency_limit=1,
        show_progress_on=c["gallery"],
        api_visibility="private",
    )


def guarded(h: Handlers, handler: Callable[..., dict]) -> Callable[..., dict]:
    """The handler with its exceptions turned into a status line, so that the page stays usable."""

    @wraps(handler)  # Gradio reads the signature
    def call(*args: Any) -> dict:
        try:
            return handler(*args)
        except UserError as error:
            return h.trouble(error)
        except torch.OutOfMemoryError:
            line = "out of memory; take a smaller shape or fewer pictures at a time"
        except Exception as error:  # a bug: the terminal gets the traceback
            traceback.print_exc(file=sys.stderr)
            line = f"failed: {type(error).__name__}: {error}".splitlines()[0] + " (more in the terminal)"
        return {h.c["status"]: status_line(line, "trouble")}

    return call
