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
            request = to_request(given | own, base)
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
    """The options of a line such as `a.png b.png:0.4 a red fox --count 2`, as argparse returns them. UserError for an open
    quote, a missing picture and invalid options."""
    try:
        tokens = shlex.split(line)
    except ValueError as error:
        raise UserError(f"line: {error}; close the quote") from None
    first = next((i for i, token in enumerate(tokens) if token.startswith("--")), len(tokens))
    bare, argv = tokens[:first], tokens[first:]
    try:
        bare = [expanded(token) if token.startswith("~/") else token for token in bare]
    except ValueError as error:
        raise UserError(str(error)) from None
    pictures = 0
    while pictures < len(bare) and exists(with_number(bare[pictures], "line")[0]):
        pictures += 1
    if bare[pictures:] and PICTURE_LIKE.fullmatch(bare[pictures]):
        raise UserError(f"{bare[pictures]}: no such picture; words that look like a file go into --prompt")
    words = " ".join(bare[pictures:])
    argv = [*(["--reference", *bare[:pictures]] if pictures else []), *(["--prompt", words] if words else []), *argv]
    return vars(build_parser().parse_args(argv))
