"""Writing the shipped assets, for the scripts that train them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A temporary folder, whose files take the place of those in `out` at the end. Readers see each file old or new, never half."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        yield Path(folder)
        for file in sorted(Path(folder).iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, out / file.name)
