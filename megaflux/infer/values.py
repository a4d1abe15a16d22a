"""One option's text -> its value: references, controls, sources and paths, and the limits of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.generation.job import MAX_SIDE, Input, JobControl, JobReference

MAX_SEED = 2**63 - 1


def option_of(name: str) -> str:
    """The option that sets a field of Job or Runtime: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def check_values(given: Mapping[str, Any]) -> None:
    """UserError, naming the option, for a number out of range or an invalid aspect. given: {field: value}."""
    for name, least in (("count", 1), ("steps", 1), ("batch_size", 1), ("downsample", 1), ("reference_tokens", 4)):
        if given.get(name, least) < least:
            raise UserError(f"{option_of(name)} {given[name]}: use at least {least}")
    for name in ("width", "height"):
        if name in given and not (16 <= given[name] <= MAX_SIDE and given[name] % 16 == 0):
            raise UserError(f"--{name} {given[name]}: use a positive multiple of 16, at most {MAX_SIDE}")
    if "guidance" in given and not (math.isfinite(given["guidance"]) and given["guidance"] >= 0):
        raise UserError(f"--guidance {given['guidance']}: use a number of at least 0")
    if "shift" in given and not (math.isfinite(given["shift"]) and given["shift"] > 0):
        raise UserError(f"--shift {given['shift']}: use a number above 0 (1 is none)")
    if "strength" in given and not 0 < given["strength"] <= 1:
        raise UserError(f"--strength {given['strength']}: use a number above 0 and at most 1")
    for name in ("control_start", "control_end"):
        if name in given and not 0 <= given[name] <= 1:
            raise UserError(f"{option_of(name)} {given[name]}: use a number from 0 to 1")
    if given.get("control_start", 0.0) >= given.get("control_end", 1.0):
        raise UserError("--control-start: is not before --control-end; give a smaller one")
    if "aspect" in given:
        from megaflux.data.buckets import make_buckets

        try:
            make_buckets([given["aspect"]], 1024)
        except UserError as error:
            raise UserError(f"--aspect: {error}") from None


def reference(text: str) -> JobReference:
    """--reference: IMG or IMG:STRENGTH. An existing file whose whole name is `text` takes precedence."""
    file, strength = with_number(text, "--reference")
    if not 0 < strength < math.inf:
        raise UserError(f"--reference {text}: strength {strength:g}; use a number above 0, or leave the picture out")
    return JobReference(file=absolute(file, "--reference"), strength=strength)


def control(text: str) -> JobControl:
    """--control: KIND or KIND:SCALE."""
    kind, scale = with_number(text, "--control", is_file=False)
    return JobControl(kind=known_kind(kind, "--control"), scale=check_scale(scale, f"--control {text}"))


def control_image(text: str) -> JobControl:
    """--control-image: KIND=IMG or KIND=IMG:SCALE."""
    kind, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"--control-image {text}: use KIND=IMG, as in depth=map.png")
    file, scale = with_number(rest, "--control-image")
    image = Input(file=absolute(file, "--control-image"))
    return JobControl(
        kind=known_kind(kind, "--control-image"), scale=check_scale(scale, f"--control-image {text}"), image=image
    )


def known_kind(kind: str, option: str) -> str:
    """The kind of a control map, as given. UserError for an unknown one."""
    from megaflux.generation.control.detectors import UNION_MODES

    if kind not in UNION_MODES:
        raise UserError(f"{option} {kind}: no such kind; use {', '.join(UNION_MODES)}")
    return kind


def check_scale(scale: float, where: str) -> float:
    """A control's scale, as given. UserError below 0 and for a number that is not finite."""
    if not 0 <= scale < math.inf:
        raise UserError(f"{where}: scale {scale:g}; use a number of at least 0")
    return scale


def controlnet(text: str) -> tuple[str, str]:
    """--controlnet: [KIND=]DIR -> (kind, source); the kind "" reads any map."""
    kind, equals, source = text.partition("=")
    kind, source = (known_kind(kind, "--controlnet"), source) if equals else ("", text)
    return kind, model_source(source, f"--controlnet {kind}".strip())


def model_source(text: str, option: str) -> str:
    """A model's folder as an absolute path; a text that is no path here may be a hub's OWNER/NAME and stays as it is."""
    return absolute(text, option) if exists(text) else text


def with_number(text: str, option: str, is_file: bool = True) -> tuple[str, float]:
    """`NAME:NUMBER` -> (NAME, NUMBER); NAME alone has the number 1.

    is_file: NAME is a file, whose own name may hold a colon; an existing file named `text` takes precedence. Otherwise UserError
    where the part after the colon is not a number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or (is_file and exists(text)):
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        if is_file:
            return text, 1.0
        raise UserError(f"{option} {text}: {number!r} is not a number; use NAME:NUMBER") from None


def absolute(file: str, option: str) -> str:
    """An absolute path, so that a stored job can be replayed from another folder. UserError for a name that is not UTF-8."""
    try:
        file.encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {ascii(file)}: the name is not valid UTF-8; rename the file") from None
    return str(Path(file).absolute())


def exists(path: str) -> bool:
    """Whether a path exists; False for one that no file system can hold."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False
