"""Plain nested values -> a checked Config: reading YAML, laying values over others, and one line per invalid field.

Where the values of a run come from, and in which order: megaflux/config/command_line.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from megaflux.common.errors import UserError, one_line
from megaflux.config import plain_yaml
from megaflux.config.recipe import BY_PART, PARTS, by_part
from megaflux.config.schema import Config, Stage, field_paths, is_section


def nearest(name: str, known: Sequence[str]) -> str:
    """ "did you mean X?" for the known name with the same last part (--lr, --optim.lr), or else the most similar spelling;
    otherwise lists the known names, if there are at most 12."""
    last = name.lstrip("-").rpartition(".")[2]
    same_last = [option for option in known if option.lstrip("-").rpartition(".")[2] == last]
    few = len(known) <= 12
    match = same_last or difflib.get_close_matches(name, known, n=1, cutoff=0.4 if few else 0.0)
    return f"did you mean {match[0]}?" if match else "known: " + ", ".join(known)


def shortened(text: str, most: int = 80) -> str:
    """At most so many characters of a text, for a message; a cut one ends in `...`."""
    return text if len(text) <= most else text[: most - 3] + "..."


def load_yaml(path: str, option: str = "") -> dict[str, Any]:
    """A YAML mapping as plain dicts, {} for an empty file.

    option: the command line option that named the file, for messages. UserError, naming file and line, for anything else,
    tags and aliases included.
    """
    where = f"{option} ".lstrip()
    try:
        values = plain_yaml.load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}{shortened(path, 400)}: {error.strerror}; give an existing YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = one_line(getattr(error, "problem", None) or error, None)
        raise UserError(f"{where}{path}{line}: {problem}; write plain `key: value` lines") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}{path}: want `section: ...` lines at the top, found a {type(values).__name__}")
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section: a list replaces the whole list, an empty section changes
    nothing, and values for some parts leave a number below them to the other parts. Neither argument is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if key in BY_PART and isinstance(value, dict):
            below = by_part(below)
        if isinstance(below, dict) and isinstance(value, dict | None):
            merged[key] = merge(below, value or {})
        else:
            merged[key] = value
    return merged


def set_dotted(values: dict[str, Any], path: str, text: str) -> None:
    """Set the field at a dotted path (`stages.1.share`) of nested values, in place.

    The field's type decides how the text is read: words stay as typed, lists of words are split at commas (and may be
    empty), `none` is None where that is allowed; anything else is YAML. UserError for an unknown path or invalid YAML.
    """
    *parents, last = path.split(".")
    at: Any = values
    for key in parents:
        at = _step(at, key, path)
    if isinstance(at, list):
        _step(at, last, path)
        at[int(last)] = _parse_text(path, text)
    elif isinstance(at, dict):
        value = _parse_text(path, text)
        if last in BY_PART and isinstance(value, dict):
            value = (by_part(at.get(last)) or {}) | value
        at[last] = value
    else:
        raise UserError(f"--{path}: no such field")


def _parse_text(path: str, text: str) -> Any:
    kinds = _kinds(path)
    nothing = text.strip().lower() in ("", "none", "null", "~")
    if type(None) in kinds and nothing:
        return None
    if str in kinds:
        return text
    if "words" in kinds and not text.lstrip().startswith("["):
        return [] if nothing else [word.strip() for word in text.split(",") if word.strip()]
    try:
        return plain_yaml.load(text)
    except yaml.YAMLError as error:
        problem = one_line(getattr(error, "problem", None) or error, None)
        raise UserError(f"--{path} {shortened(text)}: {problem}") from None


def _kinds(path: str) -> set[Any]:
    """The types that the field at a path may hold, with "words" for a tuple of words; empty for an unknown path."""
    section: Any = Config
    keys = path.split(".")
    if keys[0] == "stages" and len(keys) > 1:
        section, keys = Stage, keys[2:]
    if keys[:-1] and keys[-2] in BY_PART:
        return {type(None), float} if path.startswith("stages.") else {float}  # a stage may leave a part to optim
    for key in keys[:-1]:
        field = section.model_fields.get(key)
        section = field.annotation if field else None
        if not is_section(section):
            return set()
    field = section.model_fields.get(keys[-1]) if keys else None
    if field is None:
        return set()
    options = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
    return {"words" if get_origin(o) is tuple and _of_words(get_args(o)[0]) else o for o in options}


def _of_words(annotation: Any) -> bool:
    return annotation is str or (get_origin(annotation) is Literal and isinstance(get_args(annotation)[0], str))


def _step(at: Any, key: str, path: str) -> Any:
    if isinstance(at, list):
        if key not in map(str, range(len(at))):
            there = f"is not one of 0 to {len(at) - 1}" if at else "is not there, the list is empty"
            raise UserError(f"--{shortened(path)}: {shortened(key)!r} {there}")
        return at[int(key)]
    if isinstance(at, dict):
        if key in BY_PART:
            at[key] = by_part(at.get(key)) or {}
        return at.setdefault(key, {})
    raise UserError(f"--{path}: no such field")


def build_config(values: dict[str, Any], resumed: bool = False) -> Config:
    """The configuration of nested values. resumed: of a run that is resumed, whose stages' ends are looked at later. UserError,
    one line that names each invalid field."""
    try:
        return Config.model_validate(values, context={"resumed": resumed})
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors():
            where, problem = _explain(item)
            found.setdefault(where, []).append(problem)
        # pydantic reports each alternative of a union; where one has an error further inside, that one alone is shown.
        found = {where: v for where, v in found.items() if not any(w.startswith(f"{where}.") for w in found)}
        raise UserError("; ".join(f"{w}: {_either(v)}" if w else "; ".join(v) for w, v in found.items())) from None


_REWORDED = {
    "missing": "is missing; set it",
    "model_type": "must be a section of `key: value` lines",
    "dict_type": "must be a section of `key: value` lines",
    "tuple_type": "must be a list",
    "invalid_key": "must be a word, as every key",
}


def _explain(item: Mapping[str, Any]) -> tuple[str, str]:
    """(dotted field, what is wrong with it) from one of pydantic's error details."""
    where = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part))
    if item["type"] == "extra_forbidden":
        return shortened(where), f"unknown key, {nearest(shortened(where), _siblings(item['loc']))}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    if item["type"] in ("too_long", "too_short"):
        message = "must have {} values".format(item["ctx"].get("max_length") or item["ctx"].get("min_length"))
    message = " ".join(_REWORDED.get(item["type"], message).split())
    if item["type"] in ("value_error", "missing"):
        return where, message
    return where, f"{message}, got {shortened(repr(item['input']))}"


def _either(problems: list[str]) -> str:
    """The problems of one field as one text; those that end in the same `got ...` are joined by "or"."""
    parts = [problem.rpartition(", got ") for problem in dict.fromkeys(problems)]
    if len(parts) > 1 and len({got for _, _, got in parts}) == 1 and all(mark for _, mark, _ in parts):
        wanted = [parts[0][0], *(text.removeprefix("must be ") for text, _, _ in parts[1:])]
        return f"{' or '.join(wanted)}, got {parts[0][2]}"
    return "; ".join(dict.fromkeys(problems))


_UNION_BRANCHES = ("constrained-float", "float", "str", "tuple", "Rates", "Decays", "SomeRates", "SomeDecays")


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in _UNION_BRANCHES)


def _siblings(location: tuple[Any, ...]) -> list[str]:
    if (whole := [i for i, part in enumerate(location) if part in BY_PART]) and whole[0] < len(location) - 1:
        return [".".join(map(str, (*location[: whole[0] + 1], part))) for part in PARTS]
    if len(location) > 1 and location[0] == "stages":
        return [f"stages.{location[1]}.{name}" for name in Stage.model_fields]
    return list(field_paths()) + [name for name in Config.model_fields if name not in field_paths()]
