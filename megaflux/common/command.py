"""Command lines: the parser of all of megaflux's programs, and types of values that several of their options take.

Imports nothing heavy, so that --help and bad input are answered at once. For paths see megaflux/common/paths.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from megaflux.common.errors import UserError
from megaflux.common.paths import path_option


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports bad input as a UserError of one line, which ends with `hint`.

    Options must be spelled out unless allow_abbrev is True.
    """

    def __init__(self, *, hint: str = "--help lists the options", allow_abbrev: bool = False, **kwargs: Any):
        super().__init__(allow_abbrev=allow_abbrev, **kwargs)
        self.hint = hint

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "needs a value")
        raise UserError(f"{message}; {self.hint}")


EMA_HELP = "the averages of a run's weights instead of the weights (optim.ema_decay)"


def add_folder_options(add: Callable[..., Any]) -> None:
    """--flux, --vlm and --vae of programs that read a run. add: a parser's add_argument."""
    for name, what in (("flux", "FLUX.1"), ("vlm", "Qwen2-VL"), ("vae", "VAE")):
        add(
            f"--{name}",
            type=path_option,
            metavar="DIR",
            help=f"where the {what} folder that the run began with is now (default: where it was then)",
        )


def count(text: str) -> int:
    """argparse type: a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def share(text: str) -> float:
    """argparse type: a number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def whole_numbers(what: str) -> Callable[[str], list[int]]:
    """argparse type: whole numbers separated by commas. what: names and shows them, as in "block numbers as 1,5"."""

    def convert(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise argparse.ArgumentTypeError(f"want {what}, got {text!r}")
        return [int(part) for part in parts]

    return convert
