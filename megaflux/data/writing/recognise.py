"""Which files are images: by their suffix, and where it says nothing by their content."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from megaflux.data.images import FORMATS, strict_pillow
from megaflux.data.writing import captions

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ico"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst"),
)
CAPTION_LIKE = (*captions.SUFFIXES, ".captions", ".text", ".prompt", ".tags", ".jsonl", ".csv", ".tsv", ".parquet")
"""Suffixes of files that may hold captions."""

# Files that are certainly not images, so that none of millions is opened to find out.
_OTHER = (
    *CAPTION_LIKE,
    *(".tar", ".gz", ".tgz", ".zip", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".bin", ".pkl", ".cls"),
    # Raw pictures are TIFF files whose first picture is a thumbnail; .thm is a camera's thumbnail of a video.
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25", ".kdc"),
    *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf"),
    *(".srw", ".x3f", ".thm"),
    *(".md", ".html", ".htm", ".xml", ".yaml", ".yml", ".log", ".py", ".mp4", ".mov", ".mp3", ".wav"),
)
# Formats that begin with a mark of their own; those left out (PPM, BMP, TGA) are recognised by their suffix only.
_MARKED = tuple(name for name in FORMATS if name not in ("PPM", "BMP", "TGA"))


@dataclass
class Tree:
    """What is in a folder. files: relative paths with "/", sorted. hidden: names left out because they begin with a dot.
    unreadable: folders that cannot be opened."""

    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def walk(root: Path) -> Tree:
    """All files of a folder and its subfolders. Links to folders are followed, each folder is visited once: under its own
    name if it is in the tree, else under the first link to it. Links to folders above `root` are circles."""
    tree = Tree()
    visited = {_identity(parent) for parent in root.resolve().parents}
    folders, links = deque([""]), deque[str]()
    while folders or links:
        prefix = folders.popleft() if folders else links.popleft()
        path = root / prefix
        try:
            identity = _identity(path)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            tree.unreadable.append(prefix)
            continue
        if identity in visited:
            continue
        visited.add(identity)
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                tree.hidden.append(name)
            elif not _is_folder(entry):
                tree.files.append(name)
            else:
                (links if entry.is_symlink() else folders).append(name + "/")
    tree.files.sort()
    return tree


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def has_image_suffix(name: str) -> bool:
    """Whether a file name has an image's suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def may_be_image(name: str) -> bool:
    """Whether a look at the content is needed: neither an image's suffix nor that of another known kind."""
    return not name.lower().endswith((*IMAGE_SUFFIXES, *_OTHER))


def starts_like_image(start: bytes) -> bool:
    """Whether a file that begins with these bytes (32 are enough) has the mark of an image format that is read here."""
    Image.init()
    for name in _MARKED:
        _, accept = Image.OPEN.get(name, (None, None))
        if accept is not None and accept(start) is True:
            return True
    return False


def is_image_file(path: Path) -> bool:
    """Whether Pillow reads the file's header as that of an image. False for one that cannot be opened."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
        if not starts_like_image(start):
            return False
        with strict_pillow(), Image.open(path, formats=_MARKED):
            return True
    except Exception:  # Pillow's plugins raise errors of any kind
        return False
