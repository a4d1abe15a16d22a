"""ICC profiles written by hand (ICC.1:2022, sections 7.2, 8.3 and 10): Pillow can only make sRGB's."""

from __future__ import annotations

import struct

P3 = ((0.51512, 0.29198, 0.1571), (0.2412, 0.69225, 0.0666), (-0.00105, 0.04189, 0.78407))  # RGB -> XYZ of D50


def icc_tag(values, kind=b"XYZ "):
    return kind + b"\0" * 4 + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc_profile(space: bytes, tags: dict[bytes, bytes], connection=b"XYZ ", device=b"mntr") -> bytes:
    tags = {b"wtpt": icc_tag((0.9642, 1, 0.8249)), **tags}
    table, body, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">IIBB2x", offset + len(body), 0, 2, 0x40) + device + space + connection
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + icc_tag((0.9642, 1, 0.8249))[8:]
    return header.ljust(128, b"\0") + table + body


GAMMA_2_2 = b"curv" + b"\0" * 4 + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
SRGB_CURVE = b"para" + struct.pack(
    ">4xHxx5i", 3, *(round(65536 * v) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
DISPLAY_P3 = icc_profile(
    b"RGB ",
    {name: icc_tag(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*P3))}
    | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), SRGB_CURVE),
)
GREY_2_2 = icc_profile(b"GRAY", {b"kTRC": GAMMA_2_2})


def cmyk_profile(ink: float) -> bytes:
    """A printer whose colours are those of 16 corners in Lab: paper white, and with any ink only the lightness `ink`."""
    corners = [(255, 128, 128) if n == 0 else (round(ink * 255), 128, 128) for n in range(16)]
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65536 * (n in (0, 4, 8))) for n in range(9))
    body = b"mft1" + b"\0" * 4 + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(sum(corners, ())) + ramp * 3
    return icc_profile(b"CMYK", {b"A2B0": body, b"A2B1": body}, b"Lab ", b"prtr")
