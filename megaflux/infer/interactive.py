"""--interactive: the model stays loaded, and each line of pictures, words and options is one job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from megaflux.common.errors import UserError, one_line
from megaflux.common.paths import expanded
from megaflux.generation.job import Runtime
from megaflux.generation.outputs import check_out
from megaflux.generation.run import read_inputs
from megaflux.infer.load import load
from megaflux.infer.make import explained_out_of_memory, make
from megaflux.infer.options import build_parser
from megaflux.infer.replay import Original, check_same_weights
from megaflux.infer.request import to_request
from megaflux.infer.values import exists, option_of, with_number

PICTURE_LIKE = re.compile(r"(~|\.{0,2}/).*|.+\.[A-Za-z]{3,4}")
NOT_SPACE = re.compile(r"\S+")
SHELL_WORD = re.compile(r"""(?:[^\s"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+(?=\s|$)""")
QUOTES = ("'", '"')
OPTION = "--[A-Za-z]"
SET_AT_START = frozenset(Runtime.model_fields) | {"dry_run", "from_image", "interactive"}
"""Options that a line must not give."""


def interactive(given: dict[str, Any], original: Original | None = None) -> int:
    """Load the model, then make each line's pictures until the input ends; returns the exit code.

    given: the options of the command line, which every line starts from. A line with an invalid option prints one `error:`
    line, and the next one is read.
    """
    base = None if original is None else original.base
    # Options are checked before the model is loaded; a prompt stands for what the lines will bring.
    placeholder = {} if base is not None or {"reference", "prompt", "image"} & set(given) else {"prompt": "x"}
    start = to_request(placeholder | given, base)
    check_out(str(start.output.folder))
    with explained_out_of_memory():
        loaded = load(start.runtime)
    if original is not None:
        check_same_weights(original, loaded.pipeline.source, given)
    print("ready: a line is pictures, then words, then options, as in  cat.png a red fox --count 2   (quit leaves)")
    for line in _lines():
        try:
            own = line_options(line)
            if fixed := sorted(SET_AT_START & set(own)):
                raise UserError(f"{option_of(fixed[0])}: is set at the start; leave it out of the line")
            request = to_request(of_line(given, own), base)
            check_out(str(request.output.folder))
            job, opened = read_inputs(request.job, None if original is None else original.embedded)
            with explained_out_of_memory():
                make(loaded, job, opened, request.output)
        except UserError as error:
            print(f"error: {one_line(error, None)}", flush=True)
        except Exception as error:  # one line must not cost the loaded model
            print(f"error: failed, {type(error).__name__}: {one_line(error, None)}", flush=True)
        except SystemExit:  # --help in a line
            continue
        except KeyboardInterrupt:
            print("stopped", flush=True)
    return 0


def of_line(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The options of a line, `own`, over those that every line starts from: --cfg 1 in a line turns its negative prompt off, too."""
    without = {"negative"} if own.get("cfg") == 1 else set()
    return {name: value for name, value in given.items() if name not in without} | own


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty, up to its end, `quit` or `exit`."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("quit", "exit"):
            return
        if line:
            yield line


def line_options(line: str) -> dict[str, Any]:
    """The options of a line such as `a.png b.png:0.4 a dog's hat --count 2`, as argparse returns them.

    Pictures come first, quoted as in a shell where their names hold spaces. Words are taken letter by letter: apostrophes,
    quotes and backslashes are theirs, except for quotes around all of them. Options begin at the first ` --NAME` and are
    quoted as in a shell. UserError for an open quote there, a missing picture and invalid options."""
    pictures, rest = _pictures(line.strip())
    words, options = _words(rest)
    try:
        argv = shlex.split(options)
    except ValueError as error:
        raise UserError(f"line: {options}: {error}; close the quote, or put quotes around all the words") from None
    for name, _ in _names(rest) if words else ():
        if PICTURE_LIKE.fullmatch(with_number(name, "line")[0]):
            raise UserError(f"{name}: no such picture; words that look like a file go into --prompt")
    given = [f"--reference={picture}" for picture in pictures] + ([f"--prompt={words}"] if words else [])
    own = vars(build_parser().parse_args([*given, *argv]))
    if words and own["prompt"] != words:
        raise UserError("--prompt: the line has words before it, which are the prompt; leave one of them out")
    return own


def _pictures(line: str) -> tuple[list[str], str]:
    """(the existing pictures that a line begins with, the rest of it)."""
    pictures = []
    while line:
        for name, end in _names(line):
            if name and exists(with_number(name, "line")[0]):
                pictures.append(name)
                line = line[end:].lstrip()
                break
        else:
            break
    return pictures, line


def _names(line: str) -> Iterator[tuple[str, int]]:
    """(name, end) of what a line begins with: as it stands up to the first space, and as a shell would read it."""
    raw = NOT_SPACE.match(line)
    if raw is None:
        return
    shell = SHELL_WORD.match(line)
    for name, found in ((raw[0], raw), (shlex.split(shell[0])[0] if shell else "", shell)):
        if found is not None:
            try:
                yield (expanded(name) if name.startswith("~/") else name), found.end()
            except ValueError as error:
                raise UserError(str(error)) from None


def _words(line: str) -> tuple[str, str]:
    """(words, options) of a line without its pictures."""
    if line.startswith(QUOTES):
        quote = line[0]
        # Closed by a quote before the options or the end, with none inside but after a backslash and within a word (cat's).
        inside = rf"(?:\\{quote}|[^{quote}]|(?<=\w){quote}(?=\w))*"
        if quoted := re.match(rf"{quote}({inside}){quote}(?=\s+{OPTION}|\s*$)", line):
            return quoted[1].replace("\\" + quote, quote), line[quoted.end() :].strip()
    option = re.search(rf"(?<!\S){OPTION}", line)
    end = option.start() if option else len(line)
    return line[:end].strip(), line[end:]
