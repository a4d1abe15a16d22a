"""`python -m megaflux.training.checkpoint`: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

from megaflux.common.errors import exit_on_user_error
from megaflux.training.checkpoint.tool import main

if __name__ == "__main__":
    exit_on_user_error(main)
