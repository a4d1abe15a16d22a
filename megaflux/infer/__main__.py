"""`python -m megaflux.infer`: generate pictures."""

from __future__ import annotations

from megaflux.common.errors import exit_on_user_error
from megaflux.infer.make import main

if __name__ == "__main__":
    exit_on_user_error(main)
