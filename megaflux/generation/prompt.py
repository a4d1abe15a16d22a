"""What a prompt may be. Imports nothing heavy, so that a command line can check before it loads anything."""

from __future__ import annotations

import re

from megaflux.errors import UserError


def check_prompt(prompt: str | None) -> str:
    """The prompt as text, "" for None. UserError, naming the place, for NUL and what is not valid Unicode."""
    if bad := re.search("[\0\ud800-\udfff]", prompt or ""):
        what = "NUL" if bad[0] == "\0" else "half a surrogate pair, so not valid UTF-8"
        raise UserError(f"prompt: character {bad.start() + 1} is {what}; take it out")
    return prompt or ""
