"""The page's components and where they are. What they call is in handlers.py, which wiring.py connects to them."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from megaflux.data.buckets import ASPECT_RATIOS
from megaflux.generation.job import Runtime
from megaflux.generation.layout import Settings
from megaflux.generation.request import DETECTED
from megaflux.panel.state import AUTO, MATCH, Made, Session

MODES = [
    ("variation of the reference", "variation"),
    ("text: a prompt alone", "text"),
    ("img2img: begin at a picture", "img2img"),
    ("inpaint: a part made anew", "inpaint"),
    ("controlnet: keep depth or lines", "controlnet"),
    ("controlnet and inpaint", "controlnet-inpaint"),
]
ASPECTS: list[str | int | float | tuple[str, str | int | float]] = [
    ("auto", AUTO),
    ("as the reference", MATCH),
    *dict.fromkeys([*ASPECT_RATIOS, "9:16", "4:3", "3:4", "3:2", "2:3"]),
]
DOTS_HINT = (
    "<b>Click the picture to put a dot</b>: weight 2 makes the tokens around it count double, 0 leaves them out. "
    "Dots select tokens, and tokens have seen the whole image: it is not a crop."
)
MASK_HINTS = {
    "discs": "<b>Click the picture</b>: each click puts a disc that is made anew.",
    "points": "<b>Click the thing</b> that is to be made anew; SAM 2 finds its outline when you generate.",
}
CSS = """
.gradio-container {max-width: 1500px !important; overflow: visible !important; padding: 6px 14px !important}
.gradio-container .column {gap: 8px} .gradio-container .row {gap: 8px}
.gradio-container .gap {gap: 8px}
#title {padding: 0} #title h1 {display: inline; font-size: 1.05rem; font-weight: 650}
#title p {display: inline; margin-left: 10px; opacity: .65; font-size: .85rem}
#results > * {flex-shrink: 0}
#results {flex-wrap: nowrap; position: sticky; top: 6px; align-self: flex-start; max-height: calc(100vh - 12px); overflow-y: auto}
.drop {height: 58px !important; min-height: 58px !important; border-style: dashed !important}
.drop .wrap {flex-direction: row !important; gap: 8px; font-size: .85rem !important; padding: 18px 4px 0 !important; min-height: 0 !important}
.drop .icon-wrap {display: none}
.gradio-container main {padding: 6px 14px !important}
.hint, .hint p {font-size: .84rem !important; line-height: 1.35; color: var(--body-text-color) !important; padding: 2px 0 !important}
.gradio-container .html-container {padding: 0 !important}
.line {font-size: .88rem; padding: 5px 10px; border-radius: 4px; background: var(--background-fill-secondary);
       border-left: 3px solid var(--border-color-primary); overflow-wrap: anywhere}
.line.trouble {border-color: #c62828; background: #fdecea; color: #8a1c1c}
.line.good {border-color: #2e7d32}
#grid img, #begin img {cursor: crosshair}
#gallery .thumbnail-lg {aspect-ratio: auto !important; height: 228px !important}
#gallery .gallery-item:only-child .thumbnail-lg {height: 458px !important}
#gallery .caption-label {font-size: .85rem}
#random, .map {align-self: end; height: 40px; margin-bottom: 10px; overflow: hidden; text-overflow: ellipsis}
"""


def _clamped(slider: gr.Slider, value: float | None) -> float:
    return slider.value if value is None else min(max(value, slider.minimum), slider.maximum)


# A number typed beyond a slider's range is set to the nearer end; Gradio's own method raises, with a traceback in the terminal.
# Replaced for the class: Gradio writes a .pyi file beside the source of a subclass, and builds objects again itself.
gr.Slider.preprocess = _clamped  # type: ignore[method-assign, assignment]  # Gradio has no other place for it


def launch_options() -> dict[str, Any]:
    """Gradio's launch options for the look of the page, without fonts and scripts from other servers."""
    theme = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="sm",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {"theme": theme, "css": CSS, "footer_links": []}


def inputs(runtime: Runtime, settings: Settings) -> dict[str, Any]:
    """The left column: components by name; one with the name of a Form's field holds its value.

    runtime: which networks are loaded; settings: of the weights.
    """
    c: dict[str, Any] = {"session": gr.State(Session())}
    with gr.Row():
        c["mode"] = gr.Dropdown(MODES, value="variation", label="Mode", elem_id="mode", min_width=200)
        c["prompt"] = gr.Textbox(
            label="Prompt", placeholder="words, if any", lines=1, max_lines=4, elem_id="prompt", min_width=200
        )
    with gr.Column() as c["reference_part"]:
        c |= reference()
    with gr.Column(visible=False) as c["start_part"]:
        c |= start(bool(runtime.sam_model))
    with gr.Column(visible=False) as c["control_part"]:
        c["controls"], c["map_files"] = control_rows(runtime)
    with gr.Accordion("Size, guidance and more", open=False):
        c |= more(settings, can_map=runtime.kernels == "on")
    return c


def picture(name: str) -> gr.Image:
    """A picture to click on, which shows our own drawings only. Users upload to a gr.File, because gr.Image fails on a file
    that is not a picture before any code of ours sees it."""
    return gr.Image(
        show_label=False, interactive=False, format="jpeg", buttons=[], height=300, visible=False, elem_id=name
    )


def drop(name: str, label: str, visible: bool = True) -> gr.File:
    """A box to drop a file on; its handler empties it again."""
    return gr.File(label=label, elem_id=name, elem_classes="drop", height=58, visible=visible)


def reference() -> dict[str, Any]:
    """The components of the reference and its dots."""
    c: dict[str, Any] = {"reference_file": drop("reference", "Reference: what the pictures are to show")}
    c["grid"] = picture("grid")
    c["grid_line"] = gr.HTML(elem_id="grid-line", visible=False)
    with gr.Column(visible=False) as c["dots_part"]:
        gr.HTML(DOTS_HINT, elem_classes="hint")
        with gr.Row():
            c["weight"] = gr.Slider(0, 4, 2, step=0.1, label="Weight of the dot", elem_id="weight")
            c["radius"] = gr.Slider(0.05, 1, 0.3, step=0.01, label="Radius of the dot", elem_id="radius")
        with gr.Row():
            c["background"] = gr.Slider(
                0, 2, 1, step=0.05, label="Background", info="where no dot is", elem_id="background"
            )
            c["preserve_mass"] = gr.Checkbox(
                False, label="Preserve mass", info="rescale the weights to the mean 1", elem_id="mass"
            )
        with gr.Row():
            for name, label in (
                ("remove", "Remove dot"),
                ("undo", "Undo"),
                ("clear", "Clear dots"),
                ("drop_reference", "Remove picture"),
            ):
                c[name] = gr.Button(label, size="sm", min_width=80, elem_id=name)
        with gr.Accordion("Dots as numbers, and more about the reference", open=False):
            c["table"] = gr.Dataframe(
                headers=["x", "y", "radius", "weight"],
                datatype="number",
                type="array",
                value=[],
                interactive=True,
                label="Dots (0 to 1 from the left and the top; radius of the shorter side)",
                max_height=180,
                buttons=[],
                elem_id="table",
            )
            with gr.Row():
                c["reference_strength"] = gr.Number(
                    1, label="Strength", info="beside a prompt; 1 is as trained", min_width=120
                )
                c["downsample"] = gr.Number(
                    1, label="Downsample", info="average K × K tokens", precision=0, min_width=120, elem_id="downsample"
                )
            c["variety"] = gr.Slider(
                0,
                0.9,
                0,
                step=0.05,
                label="Variety",
                info="share of the tokens left out, others for each seed",
                elem_id="variety",
            )
    return c


def start(points: bool) -> dict[str, Any]:
    """The components of the start image and its mask. points: whether SAM 2 is loaded."""
    c: dict[str, Any] = {"start_file": drop("start", "Start image (none: the reference)")}
    c["strength"] = gr.Slider(
        0.05,
        1,
        0.8,
        step=0.05,
        label="Strength",
        elem_id="strength",
        info="share of the steps that is done anew; 1 begins at noise",
    )
    ways = [("click discs", "discs"), ("a file", "file"), ("click on the thing (SAM 2)", "points")][
        : 3 if points else 2
    ]
    c["mask_by"] = gr.Radio(ways, value="discs", label="Mask: what is made anew", visible=False, elem_id="mask-by")
    c["mask_file"] = drop("mask", "Mask: white is made anew", visible=False)
    c["begin"] = picture("begin")
    c["begin_hint"] = gr.HTML(elem_classes="hint", visible=False)
    c["disc"] = gr.Slider(0.02, 0.6, 0.15, step=0.01, label="Radius of a disc", visible=False, elem_id="disc")
    with gr.Row():
        c["unmask"] = gr.Button("Undo mask", size="sm", visible=False, elem_id="unmask", min_width=80)
        c["drop_start"] = gr.Button("Remove start image", size="sm", visible=False, elem_id="drop_start", min_width=80)
    return c


def more(settings: Settings, can_map: bool) -> dict[str, Any]:
    """The components that are seldom changed. can_map: whether attention maps can be made."""
    c: dict[str, Any] = {}
    with gr.Row():
        c["aspect"] = gr.Dropdown(
            ASPECTS,
            value=AUTO,
            label="Shape, width:height",
            info="auto: as the start image, else square",
            scale=2,
            elem_id="aspect",
        )
        c["guidance"] = gr.Number(
            settings.guidance, label="Guidance", info=f"default: {settings.guidance:g}", min_width=80
        )
        c["batch_size"] = gr.Number(1, label="At a time", info="pictures", precision=0, min_width=80)
    with gr.Row():
        c["cfg"] = gr.Number(1, label="True CFG scale", info="1: off", min_width=150, scale=1, elem_id="cfg")
        c["negative"] = gr.Textbox(
            label="Negative prompt",
            info="with true CFG, which takes twice the time",
            placeholder="none: the empty condition",
            lines=1,
            max_lines=4,
            min_width=200,
            scale=2,
            elem_id="negative",
        )
    encoders: list[str | int | float | tuple[str, str | int | float]] = [*settings.text_encoders]
    c["text_encoder"] = gr.Dropdown(encoders, value=encoders[0], label="Prompts read by", visible=len(encoders) > 1)
    c["attention_map"] = gr.Checkbox(
        False,
        label="Attention map",
        interactive=can_map,
        elem_id="attention",
        info="also show where each picture looked; slower" if can_map else "not with --kernels off",
    )
    c["release_compatible"] = gr.Checkbox(
        False,
        label="Release compatible",
        info="pictures prepared as the released tool does",
        visible=settings.sizes == "release",  # as of converted weights
        elem_id="release",
    )
    return c


def control_rows(runtime: Runtime) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """([(kind, its checkbox, its scale)], {kind: upload button of a ready map}) for each kind that the ControlNets read."""
    nets = runtime.controlnet
    if not nets:
        gr.HTML(
            "No ControlNet is loaded: start the panel with <code>--controlnet DIR</code> (and "
            "<code>--depth-model DIR</code> for depth maps).",
            elem_classes="hint",
        )
    rows, files = [], {}
    for kind in DETECTED if "" in nets else nets:
        made = kind in DETECTED and (kind != "depth" or runtime.depth_model)
        with gr.Row():
            source = (
                "made from the start image" if made else "needs a ready map" + ", or --depth-model" * (kind == "depth")
            )
            tick = gr.Checkbox(False, label=kind, info=source, scale=3, min_width=190, elem_id=f"control-{kind}")
            scale = gr.Number(0.5, label="Scale", min_width=70, scale=1)
            files[kind] = gr.UploadButton("Ready map", size="sm", min_width=80, scale=1, elem_classes="map")
        rows.append((kind, tick, scale))
    return rows, files


def results() -> dict[str, Any]:
    """The right column, the number of pictures and the pictures: components by name."""
    c: dict[str, Any] = {"made": gr.State(Made()), "chosen": gr.State(0)}
    with gr.Row(equal_height=True):
        c["count"] = gr.Number(4, label="Pictures", precision=0, min_width=70, elem_id="count")
        c["steps"] = gr.Number(28, label="Steps", precision=0, min_width=70, elem_id="steps")
        c["seed"] = gr.Number(0, label="First seed", precision=0, min_width=110, elem_id="seed")
        c["random"] = gr.Button("Random", size="sm", min_width=70, elem_id="random")
    with gr.Row():
        c["generate"] = gr.Button("Generate", variant="primary", scale=4, elem_id="generate")
        c["stop"] = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    c["status"] = gr.HTML(
        status_line("Drop a picture, or choose mode text and write a prompt; then Generate."), elem_id="status"
    )
    c["gallery"] = gr.Gallery(
        show_label=False,
        columns=2,
        height=478,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        allow_preview=False,
        elem_id="gallery",
    )
    c["chosen_line"] = gr.HTML(elem_id="chosen", elem_classes="hint")
    with gr.Row():
        c["use"] = gr.Button("Use as reference", size="sm", interactive=False, elem_id="use")
        c["settings"] = gr.DownloadButton("Download settings", size="sm", interactive=False, elem_id="settings")
    c["attention_hint"] = gr.HTML(
        "<b>Where each picture looked</b>, and the share of its attention that the reference got",
        elem_classes="hint",
        visible=False,
    )
    c["attention"] = gr.Gallery(
        show_label=False,
        columns=4,
        height=180,
        object_fit="contain",
        interactive=False,
        visible=False,
        buttons=[],
        elem_id="attention-maps",
    )
    return c


def status_line(line: str, kind: str = "") -> str:
    """A line of text as HTML, escaped. kind: "", "good" or "trouble"."""
    return f'<div class="line {kind}">{html.escape(line)}</div>' if line else ""
