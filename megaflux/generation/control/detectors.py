"""Control maps from a picture (depth, lines, Canny edges), and masks, painted or by points.

The detectors are third-party models (DepthAnything, Anyline, SAM 2); each is loaded when a map of it is first needed.
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
from megaflux.generation.request import DETECTED
from megaflux.models.loading_errors import named
from megaflux.models.safetensors_files import is_pointer
from megaflux.models.sources import DETECTOR, folder_problems, hub_name, opened, problem

if TYPE_CHECKING:  # torch is imported where a model runs: the command line's parser imports this module, too
    import torch

UNION_MODES = {"depth": 2, "line": 0, "canny": 0, "tile": 1, "blur": 3, "pose": 4, "gray": 5, "lq": 6}
"""control_mode of each kind of map in InstantX/FLUX.1-dev-Controlnet-Union, which reads lines as Canny edges."""
CANNY_THRESHOLDS = (100, 200)  # of the gradient, for hysteresis
MTEED = "MTEED.pth"  # Anyline's weights
# By detector: its option, the message where it is needed but not given, and its classes in transformers.
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
    """The detectors of `sources` on one device, each loaded on first use and then kept."""

    line_resolution = 1280
    """px: shorter side of the picture that Anyline sees; both sides are rounded to multiples of 64."""

    def __init__(self, sources: Sources, device: str | torch.device = "cpu"):
        self.sources = sources
        self.device = device
        self.notes: list[str] = []
        """What was not done as asked, human-readable."""
        self.loaded: dict[str, Any] = {}
        """The detectors in memory: "depth" and "sam" as (model, processor), "line" as Anyline's detector."""

    def map(self, kind: str, picture: Image.Image) -> Image.Image:
        """The control map of a picture: mode RGB, three equal channels in 0..255, of the picture's size.

        kind: one of DETECTED. UserError for another kind, a detector that is not given or broken, and a missing package.
        """
        picture = picture.convert("RGB")
        if kind == "depth":
            return self._depth(picture)
        if kind == "line" and self.sources.line is not None:
            return self._line(picture)
        if kind == "line":
            note = "line: no Anyline weights given, Canny is used"
            if note not in self.notes:
                self.notes.append(note)
        elif kind != "canny":
            raise UserError(
                f"--control {kind}: only {', '.join(DETECTED)} are made from a picture;"
                f" give a ready map with --control-image {kind}=FILE"
            )
        return canny(picture)

    def mask(self, picture: Image.Image, points: Sequence[tuple[float, float, int]]) -> Image.Image:
        """The mask of the object at the points: mode L, 255 inside and 0 outside, of the picture's size.

        points: (x, y, label); x and y in [0, 1] from the left and the top, label 1 in or 0 out. SAM 2's proposal of the
        highest predicted IoU is used. UserError for invalid points, if nothing is found there, and for a detector that
        is not given or broken.
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
        # (proposals, H, W) bool, of the only object in the only picture
        proposals = processor.post_process_masks(output.pred_masks.cpu(), inputs["original_sizes"])[0][0]
        best = proposals[int(output.iou_scores[0, 0].argmax())].numpy()
        if not best.any():
            raise UserError("--mask-point: nothing is found at these points; move them or give a mask with --mask FILE")
        return Image.fromarray(best.astype(np.uint8) * 255)

    def _depth(self, picture: Image.Image) -> Image.Image:
        model, processor = self._get("depth")
        import torch

        inputs = processor(images=picture, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            output = model(**inputs)
        width, height = picture.size
        (result,) = processor.post_process_depth_estimation(output, target_sizes=[(height, width)])
        depth = result["predicted_depth"].float().cpu().reshape(height, width)  # sides of 1 px were squeezed away
        if not depth.isfinite().all():
            raise UserError(f"--depth-model {self.sources.depth}: its depth of this picture is not finite; use another")
        low, high = depth.aminmax()
        if high - low <= 1e-5 * max(abs(low), abs(high)):  # constant, apart from rounding when it was resized
            high = low + math.inf
        depth = (depth - low) / (high - low) * 255
        return Image.fromarray(depth.numpy().astype(np.uint8)).convert("RGB")  # rounded down, as transformers does

    def _line(self, picture: Image.Image) -> Image.Image:
        detector = self._get("line")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a median of no lines on a plain picture; skimage's renamed arguments
            return detector(picture, self.line_resolution)  # resized back to the picture's size

    def _get(self, name: str) -> Any:
        """The detector `name`, loaded if necessary."""
        if name not in self.loaded:
            source = getattr(self.sources, name)
            if source is None:
                raise UserError(NEEDED[name])
            for line in [] if _would_be_fetched(source) else _lacking(name, source):
                raise UserError(line)
            import torch

            with torch.random.fork_rng(devices=[]):  # a class draws random weights before the file's replace them
                self.loaded[name] = (_load_line if name == "line" else _load_parts)(name, source, self.device)
        return self.loaded[name]


def canny(picture: Image.Image) -> Image.Image:
    """Canny edges: mode RGB, 255 on an edge and 0 elsewhere, of the picture's size. UserError if OpenCV is missing."""
    with _extra("canny"):
        import cv2
    edges = cv2.Canny(np.asarray(picture.convert("RGB")), *CANNY_THRESHOLDS)
    return Image.fromarray(edges).convert("RGB")


def check_points(points: Sequence[tuple[float, float, int]]) -> tuple[tuple[float, float, int], ...]:
    """The points as (x, y, label). UserError for no points, none with label 1, and a value out of range."""
    if not points:
        raise UserError("mask points: none given; give at least one x,y inside what is to be repainted")
    checked = tuple(_point(point, "mask point") for point in points)
    if not any(label for _, _, label in checked):
        raise UserError("mask points: all have label 0 (out); give at least one x,y inside what is to be repainted")
    return checked


def parse_point(text: str) -> tuple[float, float, int]:
    """`x,y` or `x,y,label` -> (x, y, label); the default label is 1 (in). UserError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise UserError(f"--mask-point {text}: use x,y or x,y,label in numbers, as in 0.5,0.4,1") from None
    return _point(values + [1] * (len(values) == 2), "--mask-point", text)


def _point(point: Any, where: str, text: str | None = None) -> tuple[float, float, int]:
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


def read_mask(picture: Image.Image, size: tuple[int, int], notes: list[str] | None = None) -> Image.Image:
    """A picture as a mask: mode L, 255 (repaint) where it is brighter than half of full brightness, else 0.

    size: (width, height) in px of the picture to repaint. A mask of another size is taken to show all of that picture: its
    brightness is resized (bilinear, so that a small mask has no stairs) before it is cut, and that is noted in `notes`.
    Transparent pixels count as black. UserError for a mask without white, and one whose shape is in the alpha channel alone.
    """
    values, full = _brightness(picture)
    brightest, where = values.max(), ""
    if picture.size != tuple(size):
        if notes is not None:
            notes.append(f"mask: {picture.width}x{picture.height} resized to the picture's {size[0]}x{size[1]}")
        resized = Image.fromarray(np.asarray(values, np.float32)).resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(resized)
        where = f", {values.max():.3g} once it is resized from {picture.width}x{picture.height} to {size[0]}x{size[1]}"
    white = values > full / 2
    if not white.any():
        found = f"its brightest value is {brightest:g} of {full:g}{where}"
        raise UserError(f"mask: nothing to paint, {found}; make white what is to be repainted")
    return Image.fromarray(white.astype(np.uint8) * 255)


def _brightness(picture: Image.Image) -> tuple[np.ndarray, float]:
    """((height, width) of brightness, the value of full brightness). UserError for a shape in the alpha channel alone."""
    if picture.mode[0] in "IF":  # more than 8 bits, which Pillow's conversion would clip at 255
        deep = np.asarray(picture, np.float64)
        ranges = {"F": (1.0, 255.0), "I": (255.0,)}.get(picture.mode, ())
        return deep, next((top for top in ranges if deep.max() <= top), 65535.0)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        colours, alpha = picture.convert("RGB"), picture.getchannel("A")
        if np.asarray(alpha).min() < 255 and len(colours.getcolors(maxcolors=1) or ()) == 1:
            raise UserError(
                "mask: one colour, its shape is in the alpha channel;"
                " save it as black and white without alpha, white where it is to be repainted"
            )
        picture = Image.composite(colours, Image.new("RGB", picture.size), alpha)
    return np.asarray(picture.convert("L")), 255.0


def lacking(sources: Sources) -> list[str]:
    """What is missing or broken in the sources that are local folders, one line each."""
    given = ((name, getattr(sources, name)) for name in OPTIONS)
    return [
        line for name, source in given if source and not _would_be_fetched(source) for line in _lacking(name, source)
    ]


def _would_be_fetched(source: str) -> bool:
    return hub_name(source) is not None


def _lacking(name: str, source: str) -> list[str]:
    """What is missing or broken in a local source, one line each."""
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
        loaded = processor.from_pretrained(place, **kwargs)
    return model, loaded


def _load_line(name: str, source: str, device: Any) -> Any:
    """Anyline's detector. The weights are read here, as plain tensors only: Anyline's own from_pretrained unpickles
    anything on an older torch."""
    import torch

    with _extra(name):
        from controlnet_aux.anyline import AnylineDetector
        from controlnet_aux.teed.ted import TED
        from transformers.utils import cached_file
    place = opened(source, (f"Anyline/{MTEED}",))
    file = _local_mteed(Path(place))
    if file is None:
        with named(source):
            fetched = cached_file(place, MTEED, subfolder="Anyline")
        if fetched is None:
            raise UserError(f"{source}: holds no {MTEED}; give Anyline's folder")
        file = Path(fetched)
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
    """Inside, optional packages are imported without their warnings; a missing one is a UserError."""
    from megaflux.common import compat  # noqa: F401  (controlnet_aux imports torchvision)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f"{kind}: needs controlnet_aux; pip install 'megaflux[control]'") from error
