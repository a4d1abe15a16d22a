"""Control maps and masks from a picture: depth, lines, Canny edges; a mask painted, or pointed at.

Detectors are other people's models (DepthAnything, Anyline, SAM 2), loaded only when a map of theirs is asked for.
"""

from __future__ import annotations

import importlib
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.models.loading_errors import named
from megaflux.models.safetensors_files import is_pointer
from megaflux.models.sources import DETECTOR, folder_problems, hub_name, opened, problem

if TYPE_CHECKING:  # torch is imported where a model runs: the command line's parser reads this module too
    import torch

KINDS = ("depth", "line", "canny")
"""The maps that Detectors makes."""
UNION_MODES = {"depth": 2, "line": 0, "canny": 0, "tile": 1, "blur": 3, "pose": 4, "gray": 5, "lq": 6}
"""The control_mode of each kind in InstantX/FLUX.1-dev-Controlnet-Union, which reads lines as Canny edges."""
MTEED = "MTEED.pth"
OPTIONS = {"depth": "--depth-model", "line": "--line-model", "sam": "--sam-model"}
NEEDED = {
    "depth": "--control depth: needs a depth detector; give --depth-model DIR"
    " or a ready map with --control-image depth=FILE",
    "sam": "--mask-point: needs SAM 2; give --sam-model DIR or a mask with --mask FILE",
}
PARTS = {"depth": ("DepthAnythingForDepthEstimation", "AutoImageProcessor"), "sam": ("Sam2Model", "Sam2Processor")}


@dataclass(frozen=True)
class Sources:
    """Folder or hub name of each detector; None: not given."""

    depth: str | None = None
    """DepthAnythingForDepthEstimation and its image processor."""
    line: str | None = None
    """Anyline: a folder that holds MTEED.pth, or Anyline/MTEED.pth as TheMistoAI/MistoLine does."""
    sam: str | None = None
    """Sam2Model and its processor."""


class Detectors:
    """The detectors of `sources` on one device, each loaded when first asked for and then kept.

    notes: what was done otherwise than asked, for people.
    """

    line_resolution = 1280
    """px: Anyline looks at the picture with its shorter side resized to this, both sides in multiples of 64."""

    def __init__(self, sources: Sources, device: str | torch.device = "cpu"):
        self.sources = sources
        self.device = device
        self.notes: list[str] = []
        self._models: dict[str, Any] = {}

    def loaded(self) -> tuple[str, ...]:
        """The detectors in memory, of "depth", "line" and "sam", in the order of their loading."""
        return tuple(self._models)

    def map(self, kind: str, picture: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        """The control map of a picture: mode RGB, three equal channels of 0..255, of `size` (width, height) or else
        the picture's. kind: one of KINDS. UserError for another kind, no or a broken detector, a missing package."""
        picture = picture.convert("RGB")
        size = size or picture.size
        if kind == "depth":
            return self._depth(picture, size)
        if kind == "line" and self.sources.line is not None:
            return self._line(picture, size)
        if kind == "line":
            note = "line: no Anyline weights given, Canny is used"
            if note not in self.notes:
                self.notes.append(note)
        elif kind != "canny":
            raise UserError(
                f"--control {kind}: only {', '.join(KINDS)} are made from a picture;"
                f" give a ready map with --control-image {kind}=FILE"
            )
        # edges of the resized picture, not resized edges: those would be grey
        return canny(picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS))

    def mask(self, picture: Image.Image, points: Sequence[tuple[float, float, int]]) -> Image.Image:
        """The mask of what the points show: mode L, 255 inside and 0 outside, of the picture's size.

        points: x, y in [0, 1] from the left and the top, and a label: 1 in, 0 out. Of SAM 2's proposals the one it
        gives the best IoU is taken. UserError for bad points, nothing found, no or a broken detector.
        """
        points = check_points(points)
        model, processor = self._get("sam")
        import torch

        picture = picture.convert("RGB")
        inputs = processor(
            images=picture,
            input_points=[[[[x * picture.width, y * picture.height] for x, y, _ in points]]],
            input_labels=[[[label for _, _, label in points]]],
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model(
                **{name: inputs[name].to(self.device) for name in ("pixel_values", "input_points", "input_labels")},
                multimask_output=True,
            )
        # (proposals, H, W) bool of the one picture's one object
        proposals = processor.post_process_masks(output.pred_masks.cpu(), inputs["original_sizes"])[0][0]
        best = proposals[int(output.iou_scores[0, 0].argmax())].numpy()
        if not best.any():
            raise UserError("--mask-point: nothing is found at these points; move them or give a mask with --mask FILE")
        return Image.fromarray(best.astype(np.uint8) * 255)

    def _depth(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        model, processor = self._get("depth")
        import torch

        inputs = processor(images=picture, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            output = model(**inputs)
        width, height = size
        (result,) = processor.post_process_depth_estimation(output, target_sizes=[(height, width)])
        depth = result["predicted_depth"].float().cpu().reshape(height, width)  # sides of 1 px were squeezed away
        if not depth.isfinite().all():
            raise UserError(f"--depth-model {self.sources.depth}: its depth of this picture is not finite; use another")
        low, high = depth.aminmax()
        if high - low <= 1e-5 * max(abs(low), abs(high)):  # constant, but for what resizing rounded
            high = low + math.inf
        depth = (depth - low) / (high - low) * 255
        return Image.fromarray(depth.numpy().astype(np.uint8)).convert("RGB")  # rounded down, as transformers does

    def _line(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        detector = self._get("line")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the median of a plain picture's no lines; skimage's renamed arguments
            lines = detector(picture, self.line_resolution)  # and resized back
        return lines if lines.size == size else lines.resize(size, Image.Resampling.BILINEAR)

    def _get(self, name: str) -> Any:
        """The detector `name`, loaded if need be: (model, processor), or Anyline's."""
        if name not in self._models:
            source = getattr(self.sources, name)
            if source is None:
                raise UserError(NEEDED[name])
            for line in [] if _would_be_fetched(source) else _lacking(name, source):
                raise UserError(line)
            import torch

            with torch.random.fork_rng(devices=[]):  # classes draw first weights before the file's replace them
                self._models[name] = (_load_line if name == "line" else _load_parts)(name, source, self.device)
        return self._models[name]


def canny(picture: Image.Image, low: float = 100, high: float = 200) -> Image.Image:
    """Canny's edges: mode RGB, 255 on an edge and 0 elsewhere, of the picture's size.

    low, high: hysteresis thresholds of the gradient. UserError for thresholds out of order, or without OpenCV.
    """
    if not 0 <= low <= high < math.inf:
        raise UserError(f"canny: thresholds {low:g} and {high:g}; use 0 <= low <= high")
    with _extra("canny"):
        import cv2
    edges = cv2.Canny(np.asarray(picture.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")


def check_points(points: Sequence[tuple[float, float, int]]) -> tuple[tuple[float, float, int], ...]:
    """The points as (x, y, label). UserError for none, none inside, and for each value that is out of its range."""
    if not points:
        raise UserError("mask points: there is none; give at least one x,y inside what is to be repainted")
    checked = tuple(_point(point, "mask point") for point in points)
    if not any(label for _, _, label in checked):
        raise UserError("mask points: all have label 0 (out); give at least one x,y inside what is to be repainted")
    return checked


def parse_point(text: str) -> tuple[float, float, int]:
    """`x,y` or `x,y,label` -> (x, y, label); without a label the point is inside (1). UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise UserError(f"--mask-point {text}: use x,y or x,y,label in numbers, as in 0.5,0.4,1") from None
    return _point(values + [1] * (len(values) == 2), "--mask-point", text)


def _point(point: Sequence[float], where: str, text: str | None = None) -> tuple[float, float, int]:
    values = list(point) if isinstance(point, tuple | list) else [point]
    where = f"{where} {text if text is not None else ','.join(map(str, values))}"
    if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise UserError(f"{where}: use three numbers: x, y, and a label (1 in, 0 out)")
    for name, value in zip("xy", values):
        if not 0 <= value <= 1:
            raise UserError(f"{where}: {name} is {value:g}; use 0 (left, top) to 1 (right, bottom)")
    if values[2] not in (0, 1):
        raise UserError(f"{where}: the label is {values[2]:g}; use 1 (in) or 0 (out)")
    return float(values[0]), float(values[1]), int(values[2])


def read_mask(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture as a mask: mode L, 255 where it is white (from half of full brightness: repaint), else 0.

    size: (width, height) of the picture to be painted in. Transparent pixels count as black. UserError for another
    size, a mask that is black everywhere, and one that is one colour and has its shape in the alpha channel.
    """
    if picture.size != tuple(size):
        raise UserError(
            f"mask: {picture.width}x{picture.height} but the picture is {size[0]}x{size[1]};"
            " give a mask of the picture's size"
        )
    full = 255.0
    if picture.mode[0] in "IF":  # more than 8 bits; Pillow would cut them off at 255
        values = np.asarray(picture, np.float64)
        ranges = {"F": (1.0, 255.0), "I": (255.0,)}.get(picture.mode, ())
        full = next((top for top in ranges if values.max() <= top), 65535.0)
    else:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            colours, alpha = picture.convert("RGB"), picture.getchannel("A")
            if alpha.getextrema()[0] < 255 and all(low == high for low, high in colours.getextrema()):
                raise UserError(
                    "mask: one colour, its shape is in the alpha channel;"
                    " save it as black and white without alpha, white where it is to be repainted"
                )
            picture = Image.composite(colours, Image.new("RGB", picture.size), alpha)
        values = np.asarray(picture.convert("L"))
    white = values > full / 2
    if not white.any():
        brightest = f"its brightest value is {values.max():g} of {full:g}"
        raise UserError(f"mask: nothing to paint, {brightest}; make white what is to be repainted")
    return Image.fromarray(white.astype(np.uint8) * 255)


def lacking(sources: Sources) -> list[str]:
    """What the named sources that are folders lack, one line each. A hub's files are not looked at."""
    named = ((name, getattr(sources, name)) for name in OPTIONS)
    return [
        line for name, source in named if source and not _would_be_fetched(source) for line in _lacking(name, source)
    ]


def _would_be_fetched(source: str) -> bool:
    return hub_name(source) is not None


def _lacking(name: str, source: str) -> list[str]:
    """What a local source lacks, one line each."""
    folder, where = Path(source), f"{OPTIONS[name]} {source}"
    if why := problem(source):
        return [f"{where}: {why}"]
    if name == "line":
        file = _local_mteed(folder)
        if file is not None and is_pointer(file):
            return [f"{where}: holds a git-lfs pointer in the place of {MTEED}; fetch the file with `git lfs pull`"]
        return [] if file else [f"{where}: holds no {MTEED}; give Anyline's folder"]
    return [f"{OPTIONS[name]} {line}" for line in folder_problems(folder, {"": DETECTOR})]


def _local_mteed(folder: Path) -> Path | None:
    return next((file for file in (folder / MTEED, folder / "Anyline" / MTEED) if file.is_file()), None)


def _load_parts(name: str, source: str, device: Any) -> tuple[Any, Any]:
    import torch

    from megaflux.models.strict import load_strict  # imports compat before transformers

    model, processor = (getattr(importlib.import_module("transformers"), part) for part in PARTS[name])
    # depth: the slow processor resizes with Pillow, as the released maps were made
    kwargs = {"use_fast": False, "trust_remote_code": False} if name == "depth" else {}
    model = load_strict(model, source, dtype=torch.float32).eval().requires_grad_(False).to(device)
    place = opened(source, ("*.json",))
    with named(source):
        return model, processor.from_pretrained(place, **kwargs)


def _load_line(name: str, source: str, device: Any) -> Any:
    """Anyline's detector. Its own from_pretrained unpickles anything on an older torch, so the weights are read here,
    as plain tensors only."""
    import torch

    with _extra(name):
        from controlnet_aux.anyline import AnylineDetector
        from controlnet_aux.teed.ted import TED
        from transformers.utils import cached_file
    place = opened(source, (f"Anyline/{MTEED}",))
    with named(source):
        file = _local_mteed(Path(place)) or Path(cached_file(place, MTEED, subfolder="Anyline"))
    released = f"give Anyline's {MTEED}"
    with named(str(file)):
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: not a file of plain tensors, so it is not read; {released}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file}: holds no weights by name; {released}")
    network = TED()
    wanted = network.state_dict()
    for what, keys in {
        "missing key": wanted.keys() - tensors.keys(),
        "unexpected key": tensors.keys() - wanted.keys(),
        "wrong shape": {key for key in wanted.keys() & tensors.keys() if wanted[key].shape != tensors[key].shape},
    }.items():
        if keys:
            raise UserError(f"{file}: {what} {min(keys, key=str)} ({len(keys)} in all); {released}")
    network.load_state_dict(tensors)
    return AnylineDetector(network.eval().requires_grad_(False).to(device))


@contextmanager
def _extra(kind: str) -> Iterator[None]:
    """Imports of the optional packages: their warnings are hidden, their absence is a UserError."""
    from megaflux.common import compat  # noqa: F401  (controlnet_aux imports torchvision)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f"{kind}: needs controlnet_aux; pip install 'megaflux[control]'") from error
