"""The panel's page in Gradio: what lies where. What the inputs do is in panel_wiring.py."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from megaflux.data.buckets import ASPECT_RATIOS
from megaflux.generation.job import DETECTED
from megaflux.panel_state import AUTO, MATCH, MAX_COUNT, Session
from megaflux.panel_work import Made, Work

MODES = [
    ("variation: new pictures of what is in the reference", "variation"),
    ("text: from a prompt alone", "text"),
    ("img2img: begin at a picture", "img2img"),
    ("inpaint: paint a part of a picture anew", "inpaint"),
    ("controlnet: keep a picture's depth or lines", "controlnet"),
    ("controlnet-inpaint: both", "controlnet-inpaint"),
]
ASPECTS = [("as the start image, else square", AUTO), ("as the reference", MATCH),
           *dict.fromkeys([*ASPECT_RATIOS, "9:16", "4:3", "3:4", "3:2", "2:3"])]  # fmt: skip
SAID_OF_DOTS = (
    "<b>Click the picture to put a dot</b>: weight 2 makes the tokens around it count double, 0 leaves them out. "
    "Dots select tokens, and tokens have seen the whole image: it is not a crop."
)
CSS = """
.gradio-container {max-width: 1500px !important; padding: 10px 18px !important}
#title h1 {font-size: 1.15rem; margin: 0} #title p {margin: 0; opacity: .7; font-size: .85rem}
#results {position: sticky; top: 8px; align-self: flex-start}
.drop {height: 84px !important; min-height: 84px !important} .drop .wrap {font-size: .85rem !important; line-height: 1.25; padding: 4px}
.drop .wrap svg {height: 18px} .drop .icon-wrap {width: 18px; margin: 0}
.hint, .hint * {font-size: .84rem !important; line-height: 1.35; color: var(--body-text-color-subdued)}
.line {font-size: .9rem; padding: 6px 10px; border-radius: 6px; background: var(--background-fill-secondary);
       border-left: 3px solid var(--border-color-primary); overflow-wrap: anywhere}
.line.trouble {border-color: #c62828; background: #fdecea; color: #8a1c1c}
.line.good {border-color: #2e7d32}
#grid img, #begin img {cursor: crosshair; image-rendering: auto}
"""


def launch_options() -> dict[str, Any]:
    """How the page looks: no font and no script from elsewhere."""
    theme = gr.themes.Default(
        primary_hue="orange", neutral_hue="slate", spacing_size="sm", radius_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return {"theme": theme, "css": CSS, "footer_links": []}


def inputs(work: Work) -> dict[str, Any]:
    """The left column: components by name. Those named as a field of Form hold its value."""
    c: dict[str, Any] = {"session": gr.State(Session())}
    settings = work.pipeline.settings
    c["mode"] = gr.Dropdown(MODES, value="variation", label="Mode", elem_id="mode")
    with gr.Group(elem_id="reference-part") as c["reference_part"]:
        c["reference_file"] = gr.File(label="Reference: what the pictures are to show", elem_id="reference",
                                      elem_classes="drop", height=84)  # fmt: skip
        c["grid"] = gr.Image(label="Reference and its tokens", interactive=False, format="jpeg", buttons=[], height=400,
                             elem_id="grid", visible=False)  # fmt: skip
        c["grid_line"] = gr.HTML(elem_id="grid-line", visible=False)
        with gr.Column(visible=False) as c["dots_part"]:
            gr.HTML(SAID_OF_DOTS, elem_classes="hint", padding=True)
            with gr.Row():
                c["weight"] = gr.Slider(0, 4, 2, step=0.1, label="Weight of the dot", elem_id="weight")
                c["radius"] = gr.Slider(0.05, 1, 0.3, step=0.01, label="Radius (of the shorter side)", elem_id="radius")
            with gr.Row():
                c["background"] = gr.Slider(0, 2, 1, step=0.05, label="Background: weight where no dot is",
                                            elem_id="background")  # fmt: skip
                c["preserve_mass"] = gr.Checkbox(
                    False, label="Preserve mass", info="rescale the weights to the mean 1", elem_id="mass"
                )
            with gr.Row():
                c["remove"] = gr.Button("Remove dot", size="sm", elem_id="remove")
                c["undo"] = gr.Button("Undo", size="sm", elem_id="undo")
                c["clear"] = gr.Button("Clear dots", size="sm", elem_id="clear")
                c["drop_reference"] = gr.Button("Remove picture", size="sm", elem_id="drop-reference")
            with gr.Accordion("Dots as numbers, and more about the reference", open=False):
                c["table"] = gr.Dataframe(headers=["x", "y", "radius", "weight"], datatype="number", type="array",
                                          value=[], label="Dots", interactive=True, max_height=180, elem_id="table")  # fmt: skip
                with gr.Row():
                    c["reference_strength"] = gr.Number(1, label="Strength", info="beside a prompt; 1 is as trained",
                                                        min_width=100)  # fmt: skip
                    c["variety"] = gr.Slider(0, 0.9, 0, step=0.05, label="Variety", min_width=140,
                                             info="share of tokens left out, others for each seed")  # fmt: skip
                    c["downsample"] = gr.Slider(1, 8, 1, step=1, label="Downsample", info="average K × K tokens",
                                                min_width=140)  # fmt: skip
    with gr.Group(visible=False, elem_id="start-part") as c["start_part"]:
        c["start_file"] = gr.File(label="Start image (none: the reference)", elem_id="start", elem_classes="drop",
                                  height=84)  # fmt: skip
        c["strength"] = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength", elem_id="strength",
                                  info="share of the steps that is done anew; 1 begins at noise")  # fmt: skip
        ways = [
            ("paint it", "paint"),
            ("a file", "file"),
            *([("click on the thing", "click")] if work.runtime.sam_model else []),
        ]
        c["mask_by"] = gr.Radio(
            ways, value="paint", label="Mask: what is painted anew", visible=False, elem_id="mask-by"
        )
        c["mask_file"] = gr.File(label="Mask: white is painted anew", elem_id="mask", elem_classes="drop", height=84,
                                 visible=False)  # fmt: skip
        c["editor"] = gr.ImageEditor(
            label="Paint over what is to be made anew", type="pil", sources=(), transforms=(), layers=False, height=420,
            brush=gr.Brush(default_size=40, colors=["#ff3c3c"], color_mode="fixed"), buttons=[], visible=False,
            elem_id="editor",
        )  # fmt: skip
        c["begin"] = gr.Image(label="Start image", interactive=False, format="jpeg", buttons=[], height=260, visible=False,
                              elem_id="begin")  # fmt: skip
    with gr.Group(visible=False, elem_id="control-part") as c["control_part"]:
        c["controls"] = control_rows(work, c)
    c["prompt"] = gr.Textbox(label="Prompt", placeholder="words beside the reference, or alone", lines=1, max_lines=4,
                             elem_id="prompt")  # fmt: skip
    with gr.Row():
        c["count"] = gr.Number(4, label=f"Pictures (to {MAX_COUNT})", precision=0, min_width=90, elem_id="count")
        c["seed"] = gr.Number(0, label="First seed", precision=0, min_width=120, elem_id="seed")
        c["random"] = gr.Button("Random seed", size="sm", min_width=90, elem_id="random")
        c["steps"] = gr.Number(28, label="Steps", precision=0, min_width=80, elem_id="steps")
    with gr.Accordion("Size, guidance and more", open=False):
        with gr.Row():
            c["aspect"] = gr.Dropdown(ASPECTS, value=AUTO, label="Shape (width:height)", elem_id="aspect")
            c["guidance"] = gr.Number(settings.guidance, label="Guidance", min_width=80)
            c["batch_size"] = gr.Number(1, label="Pictures at a time", precision=0, min_width=80)
        encoders = list(settings.text_encoders)
        c["text_encoder"] = gr.Dropdown(encoders, value=encoders[0], label="Prompt read by", visible=len(encoders) > 1)
        can = work.runtime.kernels == "on"
        c["attention_map"] = gr.Checkbox(
            False, label="Attention map", interactive=can, elem_id="attention",
            info="also show where each picture looked; slower" if can else "not with --kernels off",
        )  # fmt: skip
    return c


def control_rows(work: Work, c: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(kind, its tick, its scale) of each kind of map that the loaded ControlNets read."""
    nets = work.runtime.controlnet
    if not nets:
        gr.HTML("No ControlNet is loaded: start the panel with <code>--controlnet DIR</code> (and "
                "<code>--depth-model DIR</code> for depth maps).", elem_classes="hint", padding=True)  # fmt: skip
    rows, c["map_files"] = [], {}
    for kind in DETECTED if "" in nets else nets:
        made = kind in DETECTED and (kind != "depth" or work.runtime.depth_model)
        with gr.Row(equal_height=True):
            source = (
                "made from the start image" if made else "needs a ready map" + " or --depth-model" * (kind == "depth")
            )
            tick = gr.Checkbox(False, label=kind, info=source, min_width=150, elem_id=f"control-{kind}")
            scale = gr.Slider(0, 2, 0.5, step=0.05, label="Scale", min_width=140)
            c["map_files"][kind] = gr.UploadButton(f"Ready {kind} map", size="sm", min_width=120)
        rows.append((kind, tick, scale))
    return rows


def results() -> dict[str, Any]:
    """The right column: components by name."""
    c: dict[str, Any] = {"made": gr.State(Made((), ())), "chosen": gr.State(0)}
    with gr.Row():
        c["generate"] = gr.Button("Generate", variant="primary", scale=4, elem_id="generate")
        c["stop"] = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
    c["status"] = gr.HTML(
        said("Drop a picture, or choose mode text and write a prompt; then Generate."), elem_id="status"
    )
    c["gallery"] = gr.Gallery(label="Pictures", columns=2, height=500, object_fit="contain", interactive=False,
                              buttons=["download", "fullscreen"], allow_preview=False, elem_id="gallery")  # fmt: skip
    c["chosen_line"] = gr.HTML(elem_id="chosen", elem_classes="hint")
    with gr.Row():
        c["use"] = gr.Button("Use as reference", size="sm", interactive=False, elem_id="use")
        c["settings"] = gr.DownloadButton("Download settings", size="sm", interactive=False, elem_id="settings")
    c["attention"] = gr.Gallery(label="Where each picture looked", columns=4, height=220, object_fit="contain",
                                interactive=False, visible=False, buttons=[], elem_id="attention-maps")  # fmt: skip
    return c


def said(line: str, kind: str = "") -> str:
    """A line for people as HTML. kind: "" or good or trouble."""
    return f'<div class="line {kind}">{html.escape(line)}</div>' if line else ""
