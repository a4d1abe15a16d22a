"""Qwen2VLFluxPipeline: reference pictures, perhaps a prompt, and what else a mode needs -> pictures.

In diffusers' conventions: keyword names, `.images`, `generator`, `callback_on_step_end`, `output_type`, `to`,
`save_pretrained`. What is given makes the mode:

    reference and/or prompt             variation (no reference: text)      FluxPipeline
    + image                             img2img                             FluxImg2ImgPipeline
    + image, mask_image                 inpaint                             FluxInpaintPipeline
    + control_image                     controlnet                          FluxControlNetPipeline
    + control_image, image              controlnet from that picture        FluxControlNetImg2ImgPipeline
    + control_image, image, mask_image  controlnet-inpaint                  FluxControlNetInpaintPipeline

The folder that `from_pretrained` reads is described in layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.generation import runtime
from megaflux.generation.arguments import (
    as_references,
    check_amount,
    check_pictures,
    check_shift,
    device_and_dtype,
    starts,
)
from megaflux.generation.condition import (
    Encoded,
    PromptEmbeds,
    Reference,
    encode,
    prompt_embeds,
    reference_condition,
    spread,
    token_weights,
)
from megaflux.generation.control import nets as controlnets
from megaflux.generation.control.detectors import UNION_MODES, read_mask
from megaflux.generation.dots.attention_map import attention_mass
from megaflux.generation.dots.dots import NEUTRAL, Dot, Weighting
from megaflux.generation.inputs import canvas, check_sampling, matched_size, output_size, reference_tensor
from megaflux.generation.layout import (
    CONNECTOR,
    FORMAT,
    MANIFEST,
    POOLED,
    Manifest,
    Settings,
    read_manifest,
    whole_folder,
    write_indexes,
    write_parts,
)
from megaflux.generation.prompt import check_prompt
from megaflux.generation.sampling import Control, Start, flux_pipeline, sample, scheduler_like
from megaflux.models import pretrained
from megaflux.models.pretrained import Models
from megaflux.models.reading import Target
from megaflux.models.strict import load_linear, read_tensors
from megaflux.models.vlm import Condition

__all__ = [
    "CONNECTOR",
    "FORMAT",
    "MANIFEST",
    "POOLED",
    "Dot",
    "Manifest",
    "Qwen2VLFluxPipeline",
    "Qwen2VLFluxPipelineOutput",
    "Reference",
    "Settings",
    "Weighting",
    "check_sampling",
    "device_and_dtype",
    "matched_size",
    "output_size",
    "read_manifest",
    "reference_tensor",
]


@dataclass
class Qwen2VLFluxPipelineOutput:
    """What a call made, and what there is to say of it."""

    images: Any
    """In the output_type asked for: a list of PIL pictures (mode RGB), an array (N, H, W, 3), or a tensor."""
    notes: list[str] = field(default_factory=list)
    """What was done to the input, for people."""
    weights: list[list[np.ndarray]] = field(default_factory=list)
    """Per picture and reference: the tokens' weights (H, W), strength left out."""
    attention: list[list[np.ndarray]] = field(default_factory=list)
    """Per picture and reference, if asked for: attention mass (H, W) on the reference's tokens."""


class Qwen2VLFluxPipeline:
    """Generation with finished models. `source` says where they come from; it is stored with each picture. `kernels`:
    FLUX and the connector run on megaflux_kernels; False: on diffusers' own path."""

    def __init__(
        self,
        models: Models,
        settings: Settings,
        source: dict[str, Any] | None = None,
        kernels: bool = True,
        attribution: str | None = None,
    ):
        self.models = models
        self.settings = settings
        self.source = source or {}
        self.attribution = attribution
        """The credit that the training pictures ask for; it goes into an export."""
        self.controlnet: controlnets.ControlNets | None = None
        self.offload: runtime.Offload | None = None
        models.trainable.requires_grad_(False).eval()
        models.trainable.configure(kernels)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        kernels: bool = True,
        *,
        torch_dtype: torch.dtype | None = None,
    ) -> Qwen2VLFluxPipeline:
        """Assemble an export folder; `megaflux.runs.load_pipeline` takes run folders as well.

        dtype (or torch_dtype, diffusers' name) None: bfloat16 on a GPU, float32 on the CPU; device None: the GPU if
        there is one. UserError where a file or a key is missing, left over or of a wrong shape: no weight is ever left random.
        """
        root, device, dtype = Path(path), *device_and_dtype(device, dtype or torch_dtype)
        manifest = read_manifest(root)
        settings = manifest.settings
        target = Target(device, dtype)
        transformer = pretrained.load_transformer(str(root), dtype, target)
        vlm, processor = pretrained.load_vlm(str(root / "text_encoder"), settings.attention, dtype, target)
        parts = pretrained.Parts(
            transformer,
            load_linear(root / CONNECTOR),
            vlm,
            processor,
            pretrained.load_vae(None, str(root)),
            pretrained.load_scheduler(str(root)),
            read_tensors(root / POOLED, {"pooled_prompt_embeds"})["pooled_prompt_embeds"],
        )
        models = pretrained.assemble(parts, settings.vlm_max_tokens, settings.caption_max_tokens)
        models.trunk.min_image_tokens = settings.vlm_min_tokens
        if "t5" in settings.text_encoders:
            models.t5 = pretrained.load_t5(root, dtype)
        return cls(models.to(device, dtype), settings, manifest.source, kernels, manifest.attribution)

    def save_pretrained(self, path: str | Path) -> None:
        """Write an export folder that `from_pretrained` reads; lm_head and CLIP, which no picture needs, are left out.

        UserError where the folder exists."""
        kernels = self.models.trainable.fused
        with whole_folder(Path(path)) as folder:
            write_parts(self.models, None, folder)
            self.models.trainable.configure(kernels)
            source = {key: value for key, value in self.source.items() if key != "controlnet"}
            write_indexes(folder, self.settings, source, self.attribution)

    def to(self, *args: Any, **kwargs: Any) -> Qwen2VLFluxPipeline:
        """Move and cast as torch's modules do: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", torch.bfloat16)`."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        self.models.to(device or self.device, dtype or self.dtype)
        if self.controlnet is not None:
            self.controlnet.to(device or self.device, dtype or self.dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.models.pooled_projections.device

    @property
    def dtype(self) -> torch.dtype:
        return self.models.pooled_projections.dtype

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep weights in the host's memory, one part at a time on the GPU. UserError where there is none."""
        runtime.offload(self, "model", device_and_dtype(device, None)[0])

    def enable_sequential_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """The same, one layer at a time: slowest, and least memory."""
        runtime.offload(self, "sequential", device_and_dtype(device, None)[0])

    def load_controlnet(self, sources: str | dict[str, str]) -> Qwen2VLFluxPipeline:
        """Load a FLUX ControlNet: a folder or hub name in diffusers' layout (a union, or a net for one kind of map), or
        {kind: folder}. UserError where it does not fit the transformer."""
        self.controlnet = controlnets.load(sources, self.models, self.device, self.dtype)
        self.source = self.source | {"controlnet": self.controlnet.fingerprints()}
        return self

    @torch.no_grad()
    def __call__(
        self,
        reference: Image.Image | Reference | Sequence[Image.Image | Reference] | None = None,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        num_images_per_prompt: int = 1,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        strength: float = 0.8,
        control_image: Image.Image | Sequence[Image.Image] | None = None,
        control_mode: str | int | Sequence[str | int] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        weighting: Weighting = NEUTRAL,
        reference_tokens: int | None = None,
        text_encoder: str | None = None,
        shift: float | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        attention_map: bool = False,
        return_dict: bool = True,
    ) -> Qwen2VLFluxPipelineOutput | tuple[Any]:
        """Pictures: one per seed, per generator (which then goes instead), or num_images_per_prompt of seeds 0, 1, ...

        reference: any PIL pictures, or References with strength and dots; their size is not the output's. prompt: read
        by text_encoder, qwen or t5 (None: the weights' default). image: where img2img, inpaint and a ControlNet run
        begin, strength the share of steps taken from there (1: from noise); mask_image: white is painted anew.
        control_image: ready maps, control_mode their kinds (`control.UNION_MODES`). height, width: px, multiples of
        16; None: the image's own size, else the longest side trained. guidance_scale None: the value of training.
        shift: a fixed timestep shift; None: the scheduler's own. batch_size: pictures at a time; a picture is a
        function of its own seed, but a batch of another size can change its last bits. attention_map: collect
        `attention` (a second softmax per block). return_dict False: (images,), as diffusers has it. UserError for values that cannot be.
        """
        references = as_references(reference)
        prompt, side = check_prompt(prompt), self.settings.longest_side
        generators, seeds = starts(seed, generator, num_images_per_prompt)
        check_pictures(image=image, mask_image=mask_image, control_image=control_image)
        default = (side, side) if image is None else matched_size(image, side)
        height, width = (own if given is None else given for given, own in zip((height, width), default))
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        check_sampling(height, width, num_inference_steps, guidance)
        check_amount("strength", strength, 0, 1, above=True)
        check_shift(shift)
        if batch_size < 1:
            raise UserError(f"batch size: {batch_size}; use at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output type: {output_type}; use pil, np, pt or latent")
        notes: list[str] = []
        start = self._start(image, mask_image, strength, height, width, notes)
        control = self._control(
            control_image,
            control_mode,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            height,
            width,
            notes,
        )
        encoded = self.encode_all(references, prompt, weighting, text_encoder, reference_tokens, control is not None)
        notes += encoded.notes
        if control is not None:
            if self.controlnet.union and not encoded.references and encoded.text is None:
                raise UserError(
                    "a union ControlNet reads Qwen2-VL's tokens, and a prompt read by T5 has none; give a "
                    "reference, or the text encoder qwen"
                )
            notes += controlnets.not_honoured(encoded, weighting)
            if start is not None and batch_size > 1:
                batch_size = 1
                notes.append("batch size 1: diffusers' ControlNet pipelines that begin at a picture take one at a time")

        models = self.models
        scheduler = scheduler_like(models.scheduler, shift, models.trainable.transformer.dtype)
        flux = flux_pipeline(models.trainable.transformer, models.vae, scheduler, start, control)
        t5_embedder = models.t5.embedder if models.t5 is not None else None
        made, output = [], Qwen2VLFluxPipelineOutput([], notes)
        # decode one at a time: no memory for a batch, and no picture that depends on its company
        models.vae.enable_slicing() if batch_size > 1 else models.vae.disable_slicing()
        with runtime.offloaded(self, flux):
            for first in range(0, len(seeds), batch_size):
                part = range(first, min(first + batch_size, len(seeds)))
                each = [prompt_embeds(encoded, weighting, seeds[i], t5_embedder) for i in part]
                embeds = PromptEmbeds.cat(each)
                arguments = (
                    flux,
                    models.trainable,
                    embeds,
                    models.pooled_projections,
                    [generators[i] for i in part],
                    height,
                    width,
                    num_inference_steps,
                    guidance,
                    start,
                    control,
                    t5_embedder,
                    output_type,
                    callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                )
                if attention_map:
                    with attention_mass(models.trainable.transformer, embeds.prompt_embeds.shape[1]) as mass:
                        made.append(sample(*arguments))
                    output.attention += [spread(row, encoded, weighting, seeds[i]) for i, row in zip(part, mass.mean)]
                else:
                    made.append(sample(*arguments))
                output.weights += [
                    [
                        token_weights(r, weighting, seeds[i], k).view(r.grid).numpy()
                        for k, r in enumerate(encoded.references)
                    ]
                    for i in part
                ]
        if output_type == "pil":
            output.images = [picture for pictures in made for picture in pictures]
        else:
            output.images = np.concatenate(made) if output_type == "np" else torch.cat(made)
        return output if return_dict else (output.images,)

    def encode_all(
        self,
        references: Sequence[Reference],
        prompt: str = "",
        weighting: Weighting = NEUTRAL,
        text_encoder: str | None = None,
        reference_tokens: int | None = None,
        for_controlnet: bool = False,
    ) -> Encoded:
        """References and prompt past Qwen2-VL, connector and, on our own path, context_embedder (a ControlNet has one of
        its own, so not for it)."""
        settings, encoder = self.settings, text_encoder or self.settings.text_encoders[0]
        if encoder not in ("qwen", "t5"):
            raise UserError(f"text encoder: {encoder}; use qwen or t5")
        embedded = self.models.trainable.fused and not for_controlnet
        with runtime.encoding(self):
            encoded = encode(
                self.models, settings.longest_side, references, prompt, encoder, weighting, embedded, reference_tokens
            )
        if encoded.text is not None:
            needed = "image_text" if references else "text"
            if needed not in settings.modes:
                encoded.notes.append("prompt: these weights were trained without captions, so it may do little or harm")
        return encoded

    @torch.no_grad()
    def encode(self, reference: Image.Image, prompt: str | None = None) -> tuple[Condition, list[str]]:
        """(the Condition of one reference, notes): just what training computes for a picture it is given."""
        pixel_values, notes = reference_tensor(reference, self.settings.longest_side)
        prompt = check_prompt(prompt)
        prompt = prompt if self.models.trunk.caption_tokens(prompt) else ""
        return reference_condition(self.models.trunk, pixel_values, prompt)[0], notes

    def _start(self, image, mask_image, strength: float, height: int, width: int, notes: list[str]) -> Start | None:
        if image is None:
            if mask_image is not None:
                raise UserError("mask: without a picture to paint in; give image as well")
            return None
        mask = None
        if mask_image is not None:
            mask = read_mask(mask_image, image.size)  # judged at the picture's own size
            if mask.size != (width, height):
                mask = canvas(mask.convert("RGB"), height, width, "mask")[0].convert("L")
                mask = mask.point(lambda value: 255 if value >= 128 else 0)
        image, said = canvas(image, height, width)
        notes += said
        return Start(image, strength, mask)

    def _control(
        self, images, modes, scales, start: float, end: float, height: int, width: int, notes: list[str]
    ) -> Control | None:
        if images is None:
            return None
        if self.controlnet is None:
            raise UserError("control: no ControlNet is loaded; call load_controlnet, or give --controlnet DIR")
        images = [images] if isinstance(images, Image.Image) else list(images)
        modes = list(modes) if isinstance(modes, list | tuple) else [modes] * len(images)
        scales = list(scales) if isinstance(scales, list | tuple) else [scales] * len(images)
        if not images or not len(images) == len(modes) == len(scales):
            raise UserError(f"control: {len(images)} maps, {len(modes)} modes, {len(scales)} scales; give one of each")
        check_amount("control start", start, 0, 1)
        check_amount("control end", end, 0, 1)
        if start >= end:
            raise UserError(f"control start {start} is not before control end {end}")
        for scale in scales:
            check_amount("control scale", scale, 0, float("inf"))
        numbers = [UNION_MODES.get(mode, mode) for mode in modes]
        unknown = next((m for m in numbers if m is not None and not isinstance(m, int)), None)
        if unknown is not None:
            raise UserError(f"control: unknown kind {unknown!r}; use {', '.join(UNION_MODES)}")
        fitted = []
        for map_image in images:
            fitted_map, said = canvas(map_image, height, width, "control map")
            notes += said
            fitted.append(fitted_map)
        return self.controlnet.control(fitted, modes, numbers, scales, start, end)
