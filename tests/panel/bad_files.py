"""Files that a person may drop by mistake or malice, by name, with what the page must say of each."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image


def bomb() -> bytes:
    """A small PNG whose header claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "page.jpg": (b"<!DOCTYPE html><html><script>alert(1)</script></html>", "page.jpg: not an image in a known format"),
    "empty.png": (b"", "empty.png: the file has no bytes"),
    "thread.png": (png(1, 4000), "thread.png: too long and narrow (1x4000, at most 100:1 is taken)"),
    "bomb.png": (bomb(), "bomb.png: more pixels than the limit"),
    "cut.png": (png(300, 300)[:120], "cut.png: cut short or corrupted"),
}


def write(folder: Path) -> dict[Path, str]:
    """{file: what is said of it}."""
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    return {folder / name: line for name, (_, line) in BAD.items()}
