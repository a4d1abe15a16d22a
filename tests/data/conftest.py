"""Small pictures and datasets for the tests of megaflux.data."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options

RATIOS = ("1:1", "2:1", "1:2")  # 64x64, 64x32, 32x64: distinct at 64 px, unlike the usual five
SMALL = {"longest_side": 64, "aspect_ratios": RATIOS, "encoding": "png", "chunk": 16}


def picture(number: int, size: tuple[int, int] = (80, 80)) -> Image.Image:
    """An RGB picture that is different for each number and compresses well."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def file_bytes(image: Image.Image, encoding: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def write_folder(folder: Path, counts: dict[tuple[int, int], int]) -> Path:
    """Images of the given sizes, each with a caption: folder/000.png, folder/000.txt, ..."""
    folder.mkdir(parents=True)
    sizes = [size for size, count in counts.items() for _ in range(count)]
    for number, size in enumerate(sizes):
        picture(number, size).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}\n")
    return folder


def tree(root: Path) -> dict[str, str]:
    """Relative path -> hash of every file a dataset consists of (not streaming's unpacked shards)."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".mds"
    }


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    """37 square, 21 wide and 3 tall training images, no held-out ones; buckets of 64 px. Every third image has several
    captions."""
    folder = tmp_path_factory.mktemp("small")
    source = write_folder(folder / "source", {(70, 70): 37, (90, 45): 21, (40, 80): 3})
    for number in range(0, 61, 3):
        texts = [f"picture {number}, caption {n}" for n in range(2 + number % 4)]
        (source / f"{number:03}.txt").rename(source / f"{number:03}.json").write_text(json.dumps(texts))
    prepare(str(source), folder / "dataset", Options(**SMALL, held_out=0), workers=1, progress=False)
    return folder / "dataset"
