"""One option's text -> its value: references, controls, sources and paths."""

from __future__ import annotations

from pathlib import Path

from megaflux.common.errors import UserError
from megaflux.generation.job import Input, JobControl, JobReference
from megaflux.generation.limits import LIMITS


def option_of(name: str) -> str:
    """The option that sets a field of Job or Runtime: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def reference(text: str) -> JobReference:
    """--reference: IMG or IMG:STRENGTH. An existing file whose whole name is `text` takes precedence."""
    file, strength = with_number(text, "--reference")
    LIMITS["reference_strength"].check(f"--reference {text}: strength", strength)
    return JobReference(file=absolute(file, "--reference"), strength=strength)


def control(text: str) -> JobControl:
    """--control: KIND or KIND:SCALE."""
    kind, scale = with_number(text, "--control", is_file=False)
    LIMITS["control_scale"].check(f"--control {text}: scale", scale)
    return JobControl(kind=known_kind(kind, "--control"), scale=scale)


def control_image(text: str) -> JobControl:
    """--control-image: KIND=IMG or KIND=IMG:SCALE."""
    kind, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"--control-image {text}: use KIND=IMG, as in depth=map.png")
    file, scale = with_number(rest, "--control-image")
    image = Input(file=absolute(file, "--control-image"))
    LIMITS["control_scale"].check(f"--control-image {text}: scale", scale)
    return JobControl(kind=known_kind(kind, "--control-image"), scale=scale, image=image)


def known_kind(kind: str, option: str) -> str:
    """The kind of a control map, as given. UserError for an unknown one."""
    from megaflux.generation.control.detectors import UNION_MODES

    if kind not in UNION_MODES:
        raise UserError(f"{option} {kind}: no such kind; use {', '.join(UNION_MODES)}")
    return kind


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
