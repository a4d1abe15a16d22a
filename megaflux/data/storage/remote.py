"""Fetch a remote dataset's description and indexes, so that they are checked before streaming relies on them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming.base.storage import CloudDownloader

from megaflux.common.errors import UserError
from megaflux.data.storage.dataset import read_dataset_info, validation_bucket
from megaflux.data.storage.index import INDEX, read_index, stored_file
from megaflux.data.storage.unpack import own_folder


def fetch_indexes(remote: str, cache: Path, split: str) -> None:
    """Bring dataset.json and the split's index files from `remote` into the folder `cache`.

    Raises UserError if they cannot be fetched, or if the cache holds another dataset.
    """
    if "://" not in remote and os.path.abspath(remote) == os.path.abspath(cache):
        raise UserError(f"remote {remote} is the cache folder itself; give another cache folder, or no remote")
    _fetch(remote, "dataset.json", cache)
    info = read_dataset_info(cache)
    for bucket, _ in info.filled(split):
        _fetch(remote, f"{split}/{bucket.folder}/{INDEX}", cache)


def fetch_split(remote: str, cache: Path, split: str) -> None:
    """Bring the dataset's indexes and the shards of the split's squarest bucket, which validation reads without
    streaming, into the folder `cache`. Shards that are there already are kept.

    Raises UserError as fetch_indexes does.
    """
    fetch_indexes(remote, cache, split)
    bucket = validation_bucket(read_dataset_info(cache), split)
    folder = f"{split}/{bucket.folder}" if bucket else ""
    for shard in read_index(cache / folder, check_files=False) if bucket else []:
        file = stored_file(shard)
        target = cache / folder / file["basename"]
        if not target.is_file() or target.stat().st_size != file["bytes"]:
            target.unlink(missing_ok=True)
            _fetch(remote, f"{folder}/{file['basename']}", cache)


def _fetch(remote: str, name: str, cache: Path) -> None:
    target = cache / name
    try:
        # In own_folder, which the loader cleans up after killed runs. A file that is there already is only compared: the
        # cache may be read-only.
        with tempfile.TemporaryDirectory() if target.exists() else own_folder(cache) as own:
            arriving = Path(own) / "fetched"
            try:
                CloudDownloader.direct_download(f"{remote.rstrip('/')}/{name}", str(arriving))
            except Exception as error:
                raise UserError(f"{remote.rstrip('/')}/{name}: cannot be fetched ({str(error)[:200]})") from None
            if target.exists():
                if target.read_bytes() != arriving.read_bytes():
                    raise UserError(
                        f"{target}: differs from {remote}; the cache is of another dataset, give an empty folder"
                    )
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arriving, target)
    except OSError as error:
        raise UserError(f"data.path: {cache} cannot be written ({error.strerror}); give a folder that can be") from None
