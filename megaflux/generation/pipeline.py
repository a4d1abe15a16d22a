"""Qwen2VLFluxPipeline: reference pictures, a prompt, and mode-specific inputs -> pictures.

In diffusers' conventions: keyword names, `.images`, `generator`, `callback_on_step_end`, `output_type`, `to`,
`save_pretrained`. The arguments decide the mode, and so the pipeline of diffusers that samples (sampling.py):

    reference and/or prompt             variation (no reference: text)      FluxPipeline
    + image                             img2img                             FluxImg2ImgPipeline
    + image, mask_image                 inpaint                             FluxInpaintPipeline
    + control_image                     controlnet                          FluxControlNetPipeline
    + control_image, image              controlnet from that picture        FluxControlNetImg2ImgPipeline
    + control_image, image, mask_image  controlnet-inpaint                  FluxControlNetInpaintPipeline

A call checks its arguments (request.py), encodes references and prompt once (condition.py), and samples batch by batch.
The folder that `from_pretrained` reads is described in layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.data.images import upright, without_profile
from megaflux.generation import release
from megaflux.generation.condition import (
    Encoded,
    PromptEmbeds,
    attention_maps,
    caption_notes,
    encode,
    prompt_embeds,
    reference_condition,
    weight_maps,
)
from megaflux.generation.control import nets
from megaflux.generation.control.detectors import read_mask
from megaflux.generation.dots.attention_map import attention_mass
from megaflux.generation.dots.dots import NEUTRAL, Weighting
from megaflux.generation.inputs import canvas, reference_tensor
from megaflux.generation.layout import (
    CONNECTOR,
    POOLED,
    Settings,
    read_manifest,
    whole_folder,
    write_indexes,
    write_parts,
)
from megaflux.generation.limits import check_numbers
from megaflux.generation.request import (
    ConditionRequest,
    ControlMaps,
    Draws,
    Reference,
    as_control_maps,
    as_draws,
    as_references,
    check_negative,
    check_output_type,
    check_pictures,
    check_prompt,
    matched_size,
    pictures_at_once,
)
from megaflux.generation.runtime import Offload, device_and_dtype, offload_layers
from megaflux.generation.sampling import Control, SamplingRequest, Start, flux_pipeline, sample, scheduler_like
from megaflux.generation.true_cfg import TrueCfg, encode_negative
from megaflux.models import pretrained
from megaflux.models.pretrained import Models
from megaflux.models.reading import Target
from megaflux.models.strict import load_linear, read_tensors
from megaflux.models.vlm import Condition

if TYPE_CHECKING:  # an annotation alone needs it
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


@dataclass
class Qwen2VLFluxPipelineOutput:
    """The pictures of a call and what is known about them."""

    images: Any
    """By output_type: a list of PIL pictures (RGB), an array (N, H, W, 3), or a tensor (see SamplingRequest)."""
    notes: list[str] = field(default_factory=list)
    """What was done to the inputs, human-readable."""
    weights: list[list[np.ndarray]] = field(default_factory=list)
    """Per picture and reference: the tokens' weights (H, W), without the strength."""
    attention: list[list[np.ndarray]] = field(default_factory=list)
    """Per picture and reference, if asked for: the attention (H, W) that the reference's tokens got."""


class Qwen2VLFluxPipeline:
    """Generation with finished models."""

    def __init__(
        self,
        models: Models,
        settings: Settings,
        source: dict[str, Any] | None = None,
        kernels: bool = True,
        attribution: str | None = None,
    ):
        """source: where the weights come from; it is stored with each picture. kernels: run FLUX and the connector on
        megaflux_kernels; False: on diffusers' own path. attribution: the credit that the training pictures ask for; it
        is stored in an export."""
        self.models = models
        self.settings = settings
        self.source = source or {}
        self.attribution = attribution
        self.controlnet: nets.ControlNets | None = None
        self.offload: Offload | None = None
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
        """Load an export folder; `megaflux.runs.load_pipeline` loads run folders as well.

        dtype (or torch_dtype, diffusers' name) None: bfloat16 on a GPU, float32 on the CPU; device None: the GPU if
        there is one. UserError for a missing or unexpected file or key and a wrong shape: no weight is left random.
        """
        root, (device, dtype) = Path(path), device_and_dtype(device, dtype or torch_dtype)
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
        """Write an export folder that `from_pretrained` reads, without lm_head and CLIP, which generation does not need.

        UserError if the folder exists.
        """
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
        """Where the weights are while nothing runs."""
        return self.models.pooled_projections.device

    @property
    def dtype(self) -> torch.dtype:
        return self.models.pooled_projections.dtype

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the weights in the host's memory, and one part at a time on the device.

        Saves most if the pipeline was loaded on the CPU. UserError if this machine has no such device.
        """
        self._offload("model", device)

    def enable_sequential_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the weights in the host's memory, and one layer at a time on the device: slowest, and least memory.

        For good, and on diffusers' own path. UserError if this machine has no such device.
        """
        self._offload("sequential", device)

    def _offload(self, kind: Literal["model", "sequential"], device: torch.device | str) -> None:
        used_on, _ = device_and_dtype(device, None)
        if self.device.type != "cpu":
            self.to("cpu")
        if kind == "sequential":
            offload_layers(self.models, self.controlnet.nets.values() if self.controlnet else (), used_on)
        self.offload = Offload(kind, used_on)

    def load_controlnet(self, sources: str | dict[str, str]) -> Qwen2VLFluxPipeline:
        """Load FLUX ControlNets in diffusers' layout: one folder or hub name (a union, or a net for one kind of map), or
        {kind: folder or hub name}. UserError if a net does not fit the transformer."""
        self.controlnet = nets.load(sources, self.models, self.device, self.dtype)
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
        release_compatible: bool = False,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = 1.0,
        return_dict: bool = True,
    ) -> Qwen2VLFluxPipelineOutput | tuple[Any]:
        """Make one picture per seed, or per generator, or num_images_per_prompt pictures of seeds 0, 1, ...

        reference: PIL pictures of any size, or References with strength and dots. prompt: read by text_encoder, qwen or
        t5 (None: the weights' default). image: the picture that img2img, inpaint and a ControlNet run start from, with
        strength, the fraction of steps taken (1: from noise); mask_image: white is repainted. control_image: ready
        maps, with control_mode, their kinds (`control.detectors.UNION_MODES`). height, width: px, multiples of 16;
        None: the image's size, or else square with the longest side of training. guidance_scale None: the weights'
        default. shift: a fixed timestep shift; None: the scheduler's own. batch_size: pictures made at once; a picture
        depends on its own seed alone, except for last bits that vary with the batch's size. attention_map: fill the
        output's `attention`, at the cost of a second softmax per block. release_compatible: prepare pictures, and a
        ControlNet's tokens, as the released tool does (release.py); without a reference, the image is one.
        true_cfg_scale: not 1: run FLUX a second time at each step, on the negative prompt, read by text_encoder, or
        else on the empty condition, and go this far from its velocity to the condition's (true_cfg.py). return_dict
        False: return (images,), as diffusers does. UserError for invalid arguments.
        """
        draws = as_draws(seed, generator, num_images_per_prompt)
        check_pictures(image=image, mask_image=mask_image, control_image=control_image)
        references = as_references(reference)
        condition = ConditionRequest(
            release.own_reference(references, image) if release_compatible else references,
            check_prompt(prompt),
            weighting,
            text_encoder or self.settings.text_encoders[0],
            reference_tokens,
            as_released=release_compatible,
            control_reads=image if release_compatible and control_image is not None else None,
        )
        true_cfg_scale = 1.0 if true_cfg_scale is None else true_cfg_scale
        negative = check_negative(negative_prompt, true_cfg_scale)
        maps = as_control_maps(
            control_image, control_mode, controlnet_conditioning_scale, control_guidance_start, control_guidance_end
        )
        height, width = self._size(height, width, image)
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        check_numbers(
            {
                "height": height,
                "width": width,
                "steps": num_inference_steps,
                "guidance": guidance,
                "cfg": true_cfg_scale,
                "strength": strength,
                "shift": shift,
                "batch_size": batch_size,
            }
        )
        check_output_type(output_type)
        notes: list[str] = []
        sampling = SamplingRequest(
            height,
            width,
            num_inference_steps,
            guidance,
            _start(image, mask_image, strength, (height, width), notes),
            self._control(maps, (height, width), notes),
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        with self._encoding():
            encoded = self._encode(condition, for_controlnet=maps is not None)
            notes += [*encoded.notes, *self._control_notes(encoded, weighting, sampling)]
            if true_cfg_scale != 1:
                away, found = encode_negative(
                    self.models, self.settings, negative, condition.text_encoder, encoded.embedded
                )
                sampling = replace(sampling, cfg=TrueCfg(true_cfg_scale, away))
                notes += found
        at_once = pictures_at_once(batch_size, maps is not None, image is not None)
        if at_once < batch_size:
            notes.append("batch size 1: diffusers' ControlNet pipelines that begin at a picture take one at a time")
        transformer, scheduler = self.models.trainable.transformer, self.models.scheduler
        scheduler = release.without_shift(scheduler) if release_compatible else scheduler
        scheduler = scheduler_like(scheduler, shift, transformer.dtype)
        output = self._sample(sampling, scheduler, encoded, weighting, draws, at_once, attention_map)
        output.notes = notes
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
        """The part of the condition that is the same for every seed. UserError as `condition.encode` raises it.

        On megaflux's own path the tokens are past context_embedder, but not for a ControlNet, which has its own.
        """
        encoder = text_encoder or self.settings.text_encoders[0]
        request = ConditionRequest(references, prompt, weighting, encoder, reference_tokens)
        with self._encoding():
            return self._encode(request, for_controlnet)

    @torch.no_grad()
    def encode(self, reference: Image.Image, prompt: str | None = None) -> tuple[Condition, list[str]]:
        """(the Condition of one reference and a prompt, exactly as training computes it; notes)."""
        pixel_values, notes = reference_tensor(reference, self.settings.longest_side)
        prompt = check_prompt(prompt)
        prompt = prompt if self.models.trunk.caption_tokens(prompt) else ""
        return reference_condition(self.models.trunk, pixel_values, prompt)[0], notes

    def _encode(self, request: ConditionRequest, for_controlnet: bool) -> Encoded:
        embedded = self.models.trainable.fused and not for_controlnet
        encoded = encode(self.models, self.settings.longest_side, request, embedded)
        encoded.notes.extend(caption_notes(encoded, self.settings.modes))
        return encoded

    def _encoding(self) -> AbstractContextManager[None]:
        """Inside, what encodes is on the device, also where the weights are kept off it."""
        return nullcontext() if self.offload is None else self.offload.encoding(self.models, self.dtype)

    def _size(self, height: int | None, width: int | None, image: Image.Image | None) -> tuple[int, int]:
        """(height, width) in px, with what is None taken from the image or the longest side of training."""
        side = self.settings.longest_side
        own = (side, side) if image is None else matched_size(upright(image), side)
        return own[0] if height is None else height, own[1] if width is None else width

    def _control(self, maps: ControlMaps | None, size: tuple[int, int], notes: list[str]) -> Control | None:
        """The maps brought to `size` (height, width), with their nets. Adds to `notes`."""
        if maps is None:
            return None
        if self.controlnet is None:
            raise UserError("control: no ControlNet is loaded; call load_controlnet, or give --controlnet DIR")
        fitted = []
        for picture in maps.images:
            on_canvas, changes = canvas(without_profile(picture), *size, "control map")
            notes += changes
            fitted.append(on_canvas)
        return self.controlnet.control(ControlMaps(fitted, maps.kinds, maps.scales, maps.start, maps.end))

    def _control_notes(self, encoded: Encoded, weighting: Weighting, sampling: SamplingRequest) -> list[str]:
        """What a ControlNet ignores. UserError for a condition that a union cannot read."""
        if sampling.control is None or self.controlnet is None:
            return []
        if self.controlnet.union and not (encoded.references or encoded.as_released) and encoded.text is None:
            raise UserError(
                "a union ControlNet reads Qwen2-VL's tokens, and a prompt read by T5 has none; give a "
                "reference, or the text encoder qwen"
            )
        return nets.not_honoured(encoded, weighting)

    def _sample(
        self,
        sampling: SamplingRequest,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoded: Encoded,
        weighting: Weighting,
        draws: Draws,
        at_once: int,
        attention_map: bool,
    ) -> Qwen2VLFluxPipelineOutput:
        """All pictures, `at_once` at a time."""
        models = self.models
        transformer, t5_embedder = models.trainable.transformer, models.t5.embedder if models.t5 is not None else None
        flux = flux_pipeline(transformer, models.vae, scheduler, sampling.start, sampling.control)
        # decode one at a time: it needs no memory for a batch, and no picture depends on the others
        models.vae.enable_slicing() if at_once > 1 else models.vae.disable_slicing()
        made, output = [], Qwen2VLFluxPipelineOutput([])
        offloaded = nullcontext() if self.offload is None else self.offload.sampling(flux, models, self.dtype)
        with offloaded:
            for batch in draws.batches(at_once):
                embeds = PromptEmbeds.cat([prompt_embeds(encoded, weighting, s, t5_embedder) for s in batch.seeds])
                if attention_map:
                    with attention_mass(transformer, embeds.prompt_embeds.shape[1]) as mass:
                        made.append(sample(flux, models, embeds, batch.generators, sampling))
                    output.attention += [
                        attention_maps(row, encoded, weighting, s) for s, row in zip(batch.seeds, mass.mean)
                    ]
                else:
                    made.append(sample(flux, models, embeds, batch.generators, sampling))
                output.weights += [weight_maps(encoded, weighting, s) for s in batch.seeds]
        output.images = _joined(made, sampling.output_type)
        return output


def _start(
    image: Image.Image | None, mask_image: Image.Image | None, strength: float, size: tuple[int, int], notes: list[str]
) -> Start | None:
    """Image and mask brought to `size` (height, width). Adds to `notes`. UserError for an unusable mask."""
    if image is None:
        if mask_image is not None:
            raise UserError("mask: without a picture to paint in; give image as well")
        return None
    height, width = size
    mask = None
    if mask_image is not None:
        # judged at the picture's own size, both as they are seen
        mask = read_mask(upright(mask_image), upright(image).size, notes)
        if mask.size != (width, height):
            mask = canvas(mask.convert("RGB"), height, width, "mask")[0].convert("L")
            mask = mask.point(lambda value: 255 if value >= 128 else 0)
    image, changes = canvas(image, height, width)
    notes += changes
    return Start(image, strength, mask)


def _joined(batches: list[Any], output_type: str) -> Any:
    """The batches' pictures as one list, array or tensor."""
    if output_type == "pil":
        return [picture for pictures in batches for picture in pictures]
    return np.concatenate(batches) if output_type == "np" else torch.cat(batches)
