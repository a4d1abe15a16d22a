"""Icon sets in IconifyJSON's format: finding their files, reading them, drawing an icon.

The format (iconify.design/docs/types/iconify-json.html): `prefix`, the set's name; `icons`, name -> {body, the inside of an
SVG element, with left, top, width, height of its view box, rotate in quarter turns, hFlip, vFlip, hidden}; the same numbers
beside `icons` are the icons' defaults; `aliases`, other names of the same pictures; `info`, or a file info.json beside it,
says who made the set and under which licence.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megaflux.common.errors import UserError
from megaflux.common.paths import ICONIFY, icon_paths
from megaflux.data.images import BadImage

FILE, INFO = "icons.json", "info.json"
SIDE = 16  # of an icon whose set does not say


@dataclass(frozen=True)
class IconSet:
    """An icon set as read. prefix: its name. icons: name -> icon as the file has it, without hidden ones. defaults: of the icons'
    numbers. hidden, aliases: how many were left aside. info: of its makers and licence, {} if unknown."""

    prefix: str
    file: Path
    icons: dict[str, dict[str, Any]]
    defaults: dict[str, Any]
    hidden: int
    aliases: int
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def has_licence(self) -> bool:
        """Whether the set says under which licence it is."""
        return bool(_words_of(self.info.get("license"), "title", "spdx"))

    @property
    def attribution(self) -> str:
        """Who made the set, and its licence: "Noto Emoji by Google Inc, URL. License: Apache 2.0 (Apache-2.0), URL"."""
        name, author, licence = (self.info.get(key) for key in ("name", "author", "license"))
        made = " by ".join(filter(None, [_text(name) or self.prefix, _words_of(author, "name", "url")]))
        spdx = _text(licence.get("spdx")) if isinstance(licence, dict) else ""
        title = _words_of(licence, "title") or spdx
        if spdx and title != spdx:
            title += f" ({spdx})"
        return f"{made}. License: {', '.join(filter(None, [title, _words_of(licence, 'url', plain=False)])) or 'not stated'}"


def _text(value: Any) -> str:
    return " ".join(value.split()) if isinstance(value, str) else ""


def _words_of(value: Any, *keys: str, plain: bool = True) -> str:
    """The texts of these fields of an object, joined. plain: where it is a text instead, as old files have it, that."""
    if isinstance(value, dict):
        return ", ".join(filter(None, (_text(value.get(key)) for key in keys)))
    return _text(value) if plain else ""


# Finding files


def paths_of(source: str) -> list[str] | None:
    """The paths that "iconify:PATH,PATH" names, those of "iconify" alone, or None for a source of another kind.

    Raises UserError for a path in an unknown home, and for none.
    """
    try:
        paths = icon_paths(source)
    except ValueError as error:
        raise UserError(f"source {source}: {error}") from None
    if paths == []:
        raise UserError(f"source {source}: no path; give {ICONIFY}:DIR with a folder of icon sets, or {ICONIFY}:{FILE}")
    return paths


def files_of(source: str, paths: Sequence[str]) -> list[Path]:
    """The icons.json of each set at these paths: a file, a folder that holds one, or a folder of such folders. Each once, sorted
    within a folder. Raises UserError where there is none."""
    found: dict[Path, Path] = {}
    for path in paths:
        here = list(files_at(Path(path)))
        if not here:
            what = "no such file or folder" if not os.path.exists(path) else f"no {FILE} and no folder with one"
            how = (
                f"npm install @iconify-json/noto makes it; or give {ICONIFY}:DIR"
                if source == ICONIFY
                else f"give {ICONIFY}:DIR"
            )
            raise UserError(f"source {source}: {path}: {what}; {how}, a folder of icon sets (DIR/SET/{FILE})")
        for file in here:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def files_at(path: Path) -> Iterator[Path]:
    """The file itself; or the icons.json in this folder; or those in its folders, by name."""
    if os.path.isfile(path):
        yield path
    elif os.path.isfile(path / FILE):
        yield path / FILE
    elif os.path.isdir(path):
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        yield from (path / name / FILE for name in names if os.path.isfile(path / name / FILE))


# Reading


def read_set(file: Path) -> IconSet:
    """Read an icon set. Raises UserError for a file that is not one."""
    content = _read_object(file)
    icons, aliases = content.get("icons"), content.get("aliases", {})
    info = content.get("info")
    if not isinstance(info, dict):
        info = _read_object(file.parent / INFO) if os.path.isfile(file.parent / INFO) else {}
    prefix = content.get("prefix") or info.get("prefix")
    if not isinstance(icons, dict) or not isinstance(prefix, str):
        raise UserError(f"{file}: not an icon set: IconifyJSON has a text `prefix` and an object `icons`")
    odd = next((name for name in (prefix, *icons) if not _is_name(name)), None)
    if odd is not None:
        raise UserError(f"{file}: {odd[:80]!r} is not a name of an icon or a set; rename it in the file")
    hidden = {name for name, icon in icons.items() if isinstance(icon, dict) and icon.get("hidden") is True}
    return IconSet(
        prefix,
        file,
        {name: icon for name, icon in icons.items() if name not in hidden},
        {key: value for key, value in content.items() if key not in ("prefix", "icons", "aliases", "info")},
        hidden=len(hidden),
        aliases=len(aliases) if isinstance(aliases, dict) else 0,
        info=info,
    )


def _is_name(text: str) -> bool:
    """Whether a text can be part of a key SET/NAME, and a caption."""
    return bool(text.strip()) and text.isprintable() and "/" not in text


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: cannot be read as JSON ({str(what)[:120]}); fetch the package again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; fetch the package again")
    return content


# Drawing


@dataclass(frozen=True)
class Icon:
    """One icon. body: inside of an SVG element. left, top, width, height: its view box. turns: clockwise quarter turns, after the
    flips."""

    body: str
    left: float
    top: float
    width: float
    height: float
    turns: int
    h_flip: bool
    v_flip: bool

    @property
    def shape(self) -> tuple[float, float]:
        """Width and height as drawn."""
        return (self.height, self.width) if self.turns % 2 else (self.width, self.height)

    @property
    def aspect(self) -> float:
        """Width over height, as drawn."""
        return self.shape[0] / self.shape[1]


def icon_of(icons: IconSet, name: str) -> Icon:
    """An icon of a set, with the set's defaults. Raises BadImage for values that are none of an icon."""
    given = icons.icons[name]
    if not isinstance(given, dict) or not isinstance(given.get("body"), str) or not given["body"].strip():
        raise BadImage("damaged", "no body")

    def number(key: str, usual: float) -> float:
        value = given.get(key, icons.defaults.get(key, usual))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadImage("damaged", f"{key} is {str(value)[:40]!r}, not a number")
        return value

    width, height = number("width", SIDE), number("height", SIDE)
    if not (0 < width <= 1e6 and 0 < height <= 1e6):
        raise BadImage("damaged", f"of size {width:g} x {height:g}")
    return Icon(
        given["body"],
        number("left", 0),
        number("top", 0),
        width,
        height,
        int(number("rotate", 0)) % 4,
        bool(given.get("hFlip", icons.defaults.get("hFlip"))),
        bool(given.get("vFlip", icons.defaults.get("vFlip"))),
    )


def open_renderer() -> Any:
    """resvg's svg_to_bytes. Raises UserError where its package is missing."""
    try:
        return importlib.import_module("resvg_py").svg_to_bytes
    except ImportError as error:
        raise UserError(
            f"the source {ICONIFY} needs a package that is missing ({error.name}): pip install 'megaflux[demo]'"
        ) from None


def drawn(icon: Icon, size: tuple[int, int], render: Any) -> Image.Image:
    """The icon on white, as large as a canvas of `size` (width, height, px) lets its own shape be, in the middle of it; currentColor
    is black. Mode RGB. Raises BadImage where nothing can be seen, or the renderer refuses the body."""
    width, height = size
    scale = min(width, height * icon.aspect)
    shown = max(1, round(scale)), max(1, round(scale / icon.aspect))
    before = shown[::-1] if icon.turns % 2 else shown
    box = " ".join(f"{value:.10g}" for value in (icon.left, icon.top, icon.width, icon.height))
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'preserveAspectRatio="none" viewBox="{box}" width="{before[0]}" height="{before[1]}">'
    )
    try:
        png = render(svg_string=f"{head}{icon.body}</svg>", background="white", skip_system_fonts=True)
    except ValueError as error:
        raise BadImage("damaged", f"its SVG is refused ({' '.join(str(error).split())[:160]})") from None
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if icon.h_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if icon.v_flip:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if icon.turns:  # Pillow's turns are counterclockwise
        turn = (Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90)[icon.turns - 1]
        image = image.transpose(turn)
    if image.getextrema() == ((255, 255),) * 3:
        raise BadImage("empty", "nothing can be seen of it on white")
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
