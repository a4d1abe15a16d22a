"""The configuration of a run from three layers: preset < --config file < command line.

A run that is resumed puts its own saved values in the preset's place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import expanded, path_option
from megaflux.config.located import located
from megaflux.config.parse import build_config, load_yaml, merge, nearest, set_dotted, shortened
from megaflux.config.presets import PRESETS
from megaflux.config.recipe import BY_PART
from megaflux.config.schema import Config, field_paths

INNER = ("--stages.", *(f"--optim.{field}." for field in BY_PART))
"""Beginnings of options for parts of a field."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --preset, --config and one dotted option for each field, with the field's help text."""
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
    """(parsed options, the configuration of the three layers).

    saved: returns the saved values of the run in a folder, or None where it holds no run. They replace the preset's unless
    the user names another preset than the run's; `args.kept` then holds those that differ from the preset's, as
    {dotted field: value}.

    Options such as --stages.1.share are accepted beside the declared ones. UserError for unknown options (with the nearest
    known one), options given twice, unknown presets and invalid values.
    """
    args, rest = parser.parse_known_args(_join_values(parser, sys.argv[1:] if argv is None else argv))
    overrides = {k: v for k, v in vars(args).items() if ("." in k or k == "stages") and v is not None}
    known = [option for action in parser._actions for option in action.option_strings]
    overrides |= _stage_overrides(rest, known)
    from_file = load_yaml(args.config, "--config") if args.config is not None else {}
    named = args.preset or from_file.get("preset")
    preset = _known_preset(named or "tiny")

    def resolved(base: dict[str, Any], resumed: bool = False) -> Config:
        values = merge(base, from_file) | {"preset": base["preset"]}
        for path, text in overrides.items():
            set_dotted(values, path, text)
        return build_config(values, resumed)

    args.kept = {}
    try:
        base = saved(expanded(_run_dir(overrides, from_file, preset)))
    except ValueError as error:
        raise UserError(f"run.dir: {error}") from None
    if base is None or named not in (None, base["preset"]):
        return args, resolved(PRESETS[preset]())
    config = resolved(base, resumed=True)
    if base["preset"] in PRESETS:  # it may have been renamed since
        with suppress(UserError):  # the options may not fit the preset: it may have fewer stages than the run
            args.kept = _differences(config, resolved(PRESETS[base["preset"]]()))
    return args, config


def _stage_overrides(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """{dotted field: text} of options such as --stages.1.share=2 or --optim.lr.vlm=1e-5. UserError for any other word."""
    overrides = {}
    for word in words:
        option, equals, value = word.partition("=")
        option = option if option.startswith(INNER) else shortened(option)
        if not option.startswith("-"):
            raise UserError(f"{option}: not expected here; every option has the form --name VALUE")
        if not option.startswith(INNER):
            raise UserError(f"{option}: unknown option, {nearest(option, known)}")
        if not equals:
            raise UserError(f"{option}: needs a value")
        overrides[option[2:]] = value
    return dict(sorted(overrides.items(), key=lambda one: one[0].count(".")))  # --stages.0.lr before --stages.0.lr.vlm


def _known_preset(name: Any) -> str:
    if not isinstance(name, str) or name not in PRESETS:
        name = shortened(str(name))
        raise UserError(f"--preset {name}: unknown preset, {nearest(name, list(PRESETS))}")
    return name


def _run_dir(overrides: dict[str, str], from_file: dict[str, Any], preset: str) -> str:
    """run.dir as given, before anything is validated."""
    section = from_file.get("run")
    given = overrides.get("run.dir") or (section.get("dir") if isinstance(section, dict) else None)
    return given if isinstance(given, str) else PRESETS[preset]()["run"]["dir"]


def _differences(config: Config, other: Config) -> dict[str, Any]:
    """{dotted field: value} of the fields in which a configuration differs from another one."""
    located_ones = located(config), located(other)  # what a run saves is absolute
    pairs = {path: [reduce(getattr, path.split("."), c) for c in located_ones] for path in field_paths()}
    return {path: mine for path, (mine, theirs) in pairs.items() if mine != theirs}


def _join_values(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The arguments with `--option value` joined to `--option=value`, so that -1e-5 and an empty text can be values.
    UserError for an option that is given twice."""
    valued = {o: a.dest for a in parser._actions for o in a.option_strings if o.startswith("--") and a.nargs is None}
    joined: list[str] = []
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, _ = word.partition("=")
        if option in valued or option.startswith(INNER):
            name = valued.get(option, option)
            if name in seen:
                raise UserError(f"{shortened(option)}: given twice; give it once")
            seen.add(name)
            if not equals and words and not words[0].startswith("--"):
                word = f"{word}={words.pop(0)}"
        joined.append(word)
    return joined
