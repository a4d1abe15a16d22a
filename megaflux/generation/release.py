"""What the released tool of Qwen2VL-Flux does otherwise than megaflux, for `--release-compatible`.

    references   go to Qwen2-VL's grid in one step, by Pillow's bicubic filter; ours are shrunk to the longest side of
                 training first, and torchvision takes them to the grid
    ControlNet   reads the input image's tokens, and T5's after them, embedded by the T5 linear of FLUX; ours reads the
                 references' alone
    image        is its own reference where there is no other, also beside a prompt
    scheduler    shift 1 (without effect under dynamic shifting, which FLUX.1-dev has)

Its faults are not repeated: EXIF, transparency, and a controlnet mode that never sees its picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from megaflux.data.tensors import from_picture
from megaflux.generation.inputs import upright_rgb
from megaflux.generation.request import Reference
from megaflux.models.tokens import condition_grid
from megaflux.models.vlm import Trunk

if TYPE_CHECKING:  # the annotation alone needs it
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler


def reference_pixels(
    picture: Image.Image, trunk: Trunk, limits: tuple[int, int] | None, name: str
) -> tuple[Tensor, tuple[int, int], list[str]]:
    """(pixels: uint8 (1, 3, H, W) of exactly Qwen2-VL's grid, the limits under which its processor leaves them so, notes).

    As transformers' slow image processor resizes: bicubic, in uint8. limits: (fewest, most) image tokens; None: as the
    trunk was built. UserError for an extreme aspect ratio.
    """
    picture, notes = upright_rgb(picture, name)
    least, most = limits or (trunk.min_image_tokens, trunk.max_image_tokens)
    rows, columns = condition_grid(picture.height, picture.width, most, trunk.cell, least)
    picture = picture.resize((columns * trunk.cell, rows * trunk.cell), Image.Resampling.BICUBIC)
    return from_picture(picture)[None], (rows * columns, rows * columns), notes


def own_reference(references: Sequence[Reference], image: Image.Image | None) -> Sequence[Reference]:
    """The references; the image where there are none."""
    return references if references or image is None else [Reference(image)]


def without_shift(scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with shift 1; dynamic shifting, which ignores the shift, stays as it is."""
    changed: FlowMatchEulerDiscreteScheduler = type(scheduler).from_config(scheduler.config, shift=1.0)  # type: ignore[assignment]  # a tuple only on request
    return changed
