"""`python -m megaflux.panel`: a local page to generate with."""

from __future__ import annotations

from megaflux.common.errors import exit_on_user_error
from megaflux.panel.app import main

if __name__ == "__main__":
    exit_on_user_error(main)
