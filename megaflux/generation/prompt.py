"""What a prompt may be. Imports nothing heavy, so that a command line can check before it loads anything."""

from __future__ import annotations

import re

from megaflux.common.errors import UserError


def check_prompt(prompt: str | None) -> str:
    """The prompt as text, "" for None. UserError, naming the place, for NUL and what is not valid Unicode, or no text."""
    if not isinstance(prompt, str | None):
        raise UserError(f"prompt: a {type(prompt).__name__}; use one text, and num_images_per_prompt for more pictures")
    if bad := re.search("[\0\ud800-\udfff]", prompt or ""):
        what = "NUL" if bad[0] == "\0" else "half a surrogate pair, so not valid UTF-8"
        raise UserError(f"prompt: character {bad.start() + 1} is {what}; take it out")
    return prompt or ""
