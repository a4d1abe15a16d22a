"""`~` and `~user` at the beginning of a path, wherever a person writes one: configuration, command lines.

A shell expands them in `--x ~/y`, but not in `--x=~/y` and not in a YAML file. Fields of the configuration have the types
`HomePath` and `HomePathOrNone` of megaflux.config.fields, options the argparse types `path_option` and `keyed_path_option`;
tests/test_paths.py holds every field and option to it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any

HUB = "hub:"
"""Begins the name of a source that is the hub's, whatever folders exist."""
SHIPPED, SHIPPED_ICONS = "tiny", "tiny-icons"
"""Sources of weights that come with the package (models/shipped.py)."""
SHIPPED_SOURCES = {"vlm": (SHIPPED,), "vae": (SHIPPED, SHIPPED_ICONS), "init": (SHIPPED,)}
"""By the field of `model`; a folder of such a name is ./tiny."""
ICONIFY = "iconify"
"""Alone, or before ":" and paths: data from icon sets."""
INSTALLED_ICONS = "node_modules/@iconify-json"
"""Where npm puts packages of icon sets, below the working directory."""


def expanded(text: str) -> str:
    """The path with `~` or `~user` at its beginning replaced by that home; any other text as it is.

    ValueError, one line with the remedy, where there is no such user or home, and where the home holds nothing of that name
    but a folder named "~" in the working directory does: earlier versions wrote there, and a run is never restarted silently.
    """
    if not text.startswith("~") or "\0" in text:
        return text
    name = text.partition("/")[0]
    try:
        home = os.path.expanduser(name)
    except UnicodeEncodeError:  # half a surrogate pair, in the user's name
        home = name
    if name == "~" and not os.environ.get("HOME", "unset"):
        home = name  # an empty HOME would make /y of ~/y
    if not os.path.isabs(home):
        who = "HOME names no folder" if name == "~" else f"there is no user {name[1:]!r} here"
        raise ValueError(f"{text[:200]!r}: {who}; write the whole path, or ./{name} for a folder of that name")
    path = home.rstrip("/") + text[len(name) :] or "/"
    if os.path.lexists(text) and not os.path.lexists(path):
        raise ValueError(
            f"{text[:200]!r}: means {path}, which is not there, but a folder named {name} here holds it (earlier versions "
            f"took {name} literally); write ./{text} to use it, or move it"
        )
    return path


def icon_paths(source: str) -> list[str] | None:
    """The paths that a source of data "iconify:PATH,PATH" names, each with `~` expanded; those of "iconify" alone; None for any
    other source. ValueError as `expanded`."""
    if source == ICONIFY:
        return [INSTALLED_ICONS]
    start, colon, rest = source.partition(":")
    if start != ICONIFY or not colon:
        return None
    whole = [rest] if os.path.lexists(rest) else rest.split(",")  # a folder's name may have a comma
    return [expanded(part.strip()) for part in whole if part.strip()]


def path_option(text: str) -> str:
    """argparse type: a path, `~` expanded."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def keyed_path_option(text: str) -> str:
    """argparse type: PATH or KEY=PATH, `~` expanded; after it may stand what belongs to the option (IMG:STRENGTH)."""
    key, equals, path = text.partition("=")
    return f"{key}={path_option(path)}" if equals and not key.startswith("~") else path_option(text)


def literal(values: Any, fields: Iterable[str]) -> Any:
    """Plain nested values of a saved configuration, changed in place: what begins with "~" was a folder of that name
    (written before `~` was expanded; what is saved now never begins so) and stays one. fields: dotted names."""
    for field in fields:
        *parents, last = field.split(".")
        section = values
        for key in parents:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(last), str) and section[last].startswith("~"):
            section[last] = f"./{section[last]}"
    return values
