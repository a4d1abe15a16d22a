"""A configuration with absolute paths, so that what a run saves means the same from any working directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import HUB, ICONIFY, SHIPPED_SOURCES, icon_paths
from megaflux.config.schema import Config


def located(config: Config) -> Config:
    """The configuration with absolute paths: the run's folder and the data's; what exists here of data.source and of the
    sources of weights. Names stay: the hub's, `tiny` and `tiny-icons`, `openmoji`, and addresses of remote data."""
    data: dict[str, Any] = {"path": _absolute(config.data.path)}
    source = config.data.source
    if source is not None and source not in ("openmoji", ICONIFY) and os.path.exists(source):
        data["source"] = _absolute(source)
    elif icons := _icon_paths(source):
        data["source"] = f"{ICONIFY}:{','.join(map(_absolute, icons))}"
    remote = config.data.remote
    if remote is not None and "://" not in remote:
        data["remote"] = _absolute(remote)
    model: dict[str, Any] = {}
    for field in ("flux", "vlm", "vae", "init"):
        source = getattr(config.model, field)
        named = source is None or source.startswith(HUB) or source in SHIPPED_SOURCES.get(field, ())
        if not named and os.path.isdir(source):
            model[field] = _absolute(source)
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": _absolute(config.run.dir)}),
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(update=model),
        }
    )


def _icon_paths(source: str | None) -> list[str]:
    """The paths of a source of icon sets, if any exists here."""
    try:
        paths = icon_paths(source or "") or []
    except ValueError as error:
        raise UserError(f"data.source: {error}") from None
    return paths if any(map(os.path.exists, paths)) else []


def _absolute(path: str) -> str:
    return str(Path(path).absolute())  # not resolved: a link may be meant to point elsewhere later
