"""`~` and `~user` at the beginning of a path that a user writes, in the configuration or on a command line.

A shell expands them in `--x ~/y`, but not in `--x=~/y` and not in a YAML file. Fields of the configuration have the types
`HomePath` and `HomePathOrNone` of megaflux.config.schema, options the argparse types `path_option` and `keyed_path_option`;
tests/test_paths.py checks every field and option.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any


def expanded(text: str) -> str:
    """The path with `~` or `~user` at its beginning replaced by that home folder; any other text unchanged.

    Raises ValueError, with one line that says how to fix it, where there is no such user or home. Also where the path
    exists in a folder named "~" of the working directory, but not in the home: earlier versions wrote there, and a run
    must not start anew unnoticed.
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


def path_option(text: str) -> str:
    """argparse type: a path, `~` expanded."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def keyed_path_option(text: str) -> str:
    """argparse type: PATH or KEY=PATH, `~` expanded. The path may have a suffix of the option's own (IMG:STRENGTH)."""
    key, equals, path = text.partition("=")
    return f"{key}={path_option(path)}" if equals and not key.startswith("~") else path_option(text)


def literal(values: Any, fields: Iterable[str]) -> Any:
    """Keep paths of a saved configuration that begin with "~" literal, by writing "./" before them.

    Versions that did not expand `~` saved such paths, and meant a folder of that name; none is saved now. values: nested
    dicts, changed in place and returned. fields: dotted names of the paths."""
    for field in fields:
        *parents, last = field.split(".")
        section = values
        for key in parents:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(last), str) and section[last].startswith("~"):
            section[last] = f"./{section[last]}"
    return values
