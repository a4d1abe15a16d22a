"""The configuration of a run, in three visible layers: preset defaults < --config file < command line.

The fields themselves are in megaflux.config.schema; whoever needs a configuration imports it from here.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megaflux.common.errors import UserError
from megaflux.common.paths import expanded, path_option
from megaflux.config import plain_yaml
from megaflux.config.schema import (
    ConditionModes,
    Config,
    Data,
    Flow,
    Model,
    Monitor,
    Optim,
    Run,
    Section,
    Stage,
    Train,
    Validation,
)

__all__ = [
    "ConditionModes",
    "Config",
    "Data",
    "Flow",
    "Model",
    "Monitor",
    "Optim",
    "Parser",
    "Run",
    "Section",
    "Stage",
    "Train",
    "Validation",
    "add_config_arguments",
    "build_config",
    "field_paths",
    "load_yaml",
    "merge",
    "nearest",
    "parse_config",
    "set_dotted",
]


def nearest(name: str, known: Sequence[str]) -> str:
    """ "did you mean X?" for the known name closest to `name`: one that ends alike (--lr, --optim.lr), else
    by letters. A short list of known names is given whole where none is close."""
    last = name.lstrip("-").rpartition(".")[2]
    alike = [option for option in known if option.lstrip("-").rpartition(".")[2] == last]
    few = len(known) <= 12
    match = alike or difflib.get_close_matches(name, known, n=1, cutoff=0.4 if few else 0.0)
    return f"did you mean {match[0]}?" if match else "known: " + ", ".join(known)


def _shown(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def field_paths(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted field of the configuration and its help text."""
    paths: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            paths |= field_paths(field.annotation, f"{prefix}{name}.")
        else:
            paths[prefix + name] = " ".join((field.description or "").split())
    return paths


def load_yaml(path: str) -> dict[str, Any]:
    """A YAML mapping as plain dicts. UserError, naming file and line, for anything else (tags that run code
    too)."""
    try:
        values = plain_yaml.load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {_shown(path, 400)}: {error.strerror}; give an existing YAML file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"--config {path}{line}: {problem}; write plain `key: value` lines") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: want `section: ...` lines at the top, found a {type(values).__name__}")
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; lists are replaced whole; a section left empty changes
    nothing."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict | None):
            merged[key] = merge(below, value or {})
        else:
            merged[key] = value
    return merged


def set_dotted(values: dict[str, Any], path: str, text: str) -> None:
    """Set `stages.1.share`-like paths in plain nested data. UserError: no such place, or text that is no
    YAML.

    The field's type decides how the text is read: words stay as typed, lists of words are split at commas
    (and may be empty), `none` is None where that is allowed; anything else is YAML.
    """
    *parents, last = path.split(".")
    at: Any = values
    for key in parents:
        at = _step(at, key, path)
    if isinstance(at, list):
        _step(at, last, path)
        at[int(last)] = _parse_text(path, text)
    elif isinstance(at, dict):
        at[last] = _parse_text(path, text)
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
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"--{path} {_shown(text)}: {problem}") from None


def _kinds(path: str) -> set[Any]:
    """What the field at a path may hold: types of its annotation, "words" for a tuple of words; empty if
    unknown."""
    section: Any = Config
    keys = path.split(".")
    if keys[0] == "stages" and len(keys) > 1:
        section, keys = Stage, keys[2:]
    for key in keys[:-1]:
        field = section.model_fields.get(key)
        section = field.annotation if field else None
        if not _is_section(section):
            return set()
    field = section.model_fields.get(keys[-1]) if keys else None
    if field is None:
        return set()
    options = get_args(field.annotation) if type(None) in get_args(field.annotation) else (field.annotation,)
    return {"words" if get_origin(o) is tuple and _of_words(get_args(o)[0]) else o for o in options}


def _of_words(annotation: Any) -> bool:
    return annotation is str or (get_origin(annotation) is Literal and isinstance(get_args(annotation)[0], str))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _step(at: Any, key: str, path: str) -> Any:
    if isinstance(at, list):
        if key not in map(str, range(len(at))):
            there = f"is not one of 0 to {len(at) - 1}" if at else "is not there, the list is empty"
            raise UserError(f"--{_shown(path)}: {_shown(key)!r} {there}")
        return at[int(key)]
    if isinstance(at, dict):
        return at.setdefault(key, {})
    raise UserError(f"--{path}: no such field")


def build_config(values: dict[str, Any]) -> Config:
    """Validate plain nested data. UserError, one line naming each wrong field, otherwise."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors():
            where, problem = _explain(item)
            found.setdefault(where, []).append(problem)
        # A union reports each alternative: an error inside the value makes the others beside the point.
        found = {where: v for where, v in found.items() if not any(w.startswith(f"{where}.") for w in found)}
        raise UserError("; ".join(f"{w}: {_either(v)}" if w else "; ".join(v) for w, v in found.items())) from None


_REWORDED = {
    "missing": "is missing; set it",
    "model_type": "must be a section of `key: value` lines",
    "dict_type": "must be a section of `key: value` lines",
    "tuple_type": "must be a list",
    "invalid_key": "must be a word, as every key",
}


def _explain(item: dict[str, Any]) -> tuple[str, str]:
    """(dotted field, what is wrong with it) of one of pydantic's errors."""
    where = ".".join(str(part) for part in item["loc"] if not _is_union_branch(part))
    if item["type"] == "extra_forbidden":
        return _shown(where), f"unknown key, {nearest(_shown(where), _siblings(item['loc']))}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    if item["type"] in ("too_long", "too_short"):
        message = "must have {} values".format(item["ctx"].get("max_length") or item["ctx"].get("min_length"))
    message = " ".join(_REWORDED.get(item["type"], message).split())
    if item["type"] in ("value_error", "missing"):
        return where, message
    return where, f"{message}, got {_shown(repr(item['input']))}"


def _either(problems: list[str]) -> str:
    """The problems of one field; those that end in the same `got ...` are alternatives."""
    parts = [problem.rpartition(", got ") for problem in dict.fromkeys(problems)]
    if len(parts) > 1 and len({got for _, _, got in parts}) == 1 and all(mark for _, mark, _ in parts):
        wanted = [parts[0][0], *(text.removeprefix("must be ") for text, _, _ in parts[1:])]
        return f"{' or '.join(wanted)}, got {parts[0][2]}"
    return "; ".join(dict.fromkeys(problems))


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("constrained-float", "float", "str", "tuple"))


def _siblings(location: tuple[Any, ...]) -> list[str]:
    if len(location) > 1 and location[0] == "stages":
        return [f"stages.{location[1]}.{name}" for name in Stage.model_fields]
    return list(field_paths()) + [name for name in Config.model_fields if name not in field_paths()]


# --- command line -------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports bad input as a UserError of one line and accepts no shortened
    options."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "needs a value")
        raise UserError(f"{message}; --help lists the options")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--preset, --config and one dotted option per field, with its help text."""
    from megaflux.config.presets import PRESETS

    parser.add_argument("--preset", default=None, help=f"table of default values: {', '.join(PRESETS)} (default tiny)")
    parser.add_argument("--config", type=path_option, metavar="FILE.yaml", help="values over the preset's")
    group = parser.add_argument_group(
        "configuration", "each also as a nested key in --config; values are YAML; one stage's: --stages.0.share 2"
    )
    for path, text in field_paths().items():
        if path != "preset":
            group.add_argument(f"--{path}", default=None, metavar="VALUE", help=text.replace("%", "%%"))
    group.add_argument("--cache", dest="data.cache", default=None, metavar="VALUE", help="same as --data.cache")
    group.add_argument(
        "--kernels", dest="model.kernels", default=None, metavar="on|off", help="same as --model.kernels"
    )


def parse_config(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    saved: Callable[[str], dict[str, Any] | None] = lambda run_dir: None,
) -> tuple[argparse.Namespace, Config]:
    """Parse the command line and resolve the three layers.

    saved: gives the values of the run that a run.dir holds, which then stand in the preset's place (None: it holds
    none); `args.kept` lists those that differ from the preset's, dotted field -> value. Not where the user names another
    preset than the run's.

    Options of the form --stages.1.share are accepted beside the declared ones. Raises UserError for unknown
    options (with the nearest known one), options given twice, unknown presets and invalid values.
    """
    from megaflux.config.presets import PRESETS

    args, rest = parser.parse_known_args(_join_values(parser, sys.argv[1:] if argv is None else argv))
    overrides = {k: v for k, v in vars(args).items() if ("." in k or k == "stages") and v is not None}
    known = [option for action in parser._actions for option in action.option_strings]
    for text in rest:
        option, equals, value = text.partition("=")
        option = option if option.startswith("--stages.") else _shown(option)
        if not option.startswith("-"):
            raise UserError(f"{option}: not expected here; every option has the form --name VALUE")
        if not option.startswith("--stages."):
            raise UserError(f"{option}: unknown option, {nearest(option, known)}")
        if not equals:
            raise UserError(f"{option}: needs a value")
        overrides[option[2:]] = value
    from_file = load_yaml(args.config) if args.config is not None else {}
    asked = args.preset or from_file.get("preset")
    preset = asked or "tiny"
    if not isinstance(preset, str) or preset not in PRESETS:
        preset = _shown(str(preset))
        raise UserError(f"--preset {preset}: unknown preset, {nearest(preset, list(PRESETS))}")

    def resolved(below: dict[str, Any]) -> Config:
        values = merge(below, from_file) | {"preset": below["preset"]}
        for path, text in overrides.items():
            set_dotted(values, path, text)
        return build_config(values)

    given, args.kept = from_file.get("run"), {}
    run_dir = overrides.get("run.dir") or (given.get("dir") if isinstance(given, dict) else None)
    run_dir = run_dir if isinstance(run_dir, str) else PRESETS[preset]()["run"]["dir"]
    try:
        below = saved(expanded(run_dir))
    except ValueError as error:
        raise UserError(f"run.dir: {error}") from None
    if below is None or asked not in (None, below["preset"]):
        return args, resolved(PRESETS[preset]())
    config = resolved(below)
    if below["preset"] in PRESETS:  # it may have been renamed since
        with suppress(UserError):  # options for the run's own stages, say
            args.kept = _differences(config, resolved(PRESETS[below["preset"]]()))
    return args, config


def _differences(config: Config, other: Config) -> dict[str, Any]:
    """Dotted field -> value, where another configuration has another one."""
    pairs = {path: [reduce(getattr, path.split("."), c) for c in (config, other)] for path in field_paths()}
    return {path: mine for path, (mine, theirs) in pairs.items() if mine != theirs}


def _join_values(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """`--option value` as `--option=value`, so that -1e-5 and an empty text are values too. UserError: given
    twice."""
    valued = {o: a.dest for a in parser._actions for o in a.option_strings if o.startswith("--") and a.nargs is None}
    joined: list[str] = []
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, _ = word.partition("=")
        if option in valued or option.startswith("--stages."):
            name = valued.get(option, option)
            if name in seen:
                raise UserError(f"{_shown(option)}: given twice; give it once")
            seen.add(name)
            if not equals and words and not words[0].startswith("--"):
                word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined
