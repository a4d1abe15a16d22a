"""Every image that comes from outside is decoded to what it shows, or refused with a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import file_bytes, picture
from PIL import Image, ImageFile, ImageOps

from megaflux.data.buckets import ASPECT_RATIOS, Bucket, make_buckets
from megaflux.data.images import MAX_PIXELS, BadImage, cover, crop_box, decode, encode, fit
from tests.icc_profiles import DISPLAY_P3, GREY_2_2, cmyk_profile, icc_profile


def png(width, height, depth, color_type, rows: bytes) -> bytes:
    """A PNG file written by hand: what Pillow cannot write, and headers that lie."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    return caught.value.reason


GOOD = file_bytes(picture(0), "JPEG", quality=95)


def test_plain_formats_decode_without_notes():
    for encoding in ("PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"):
        options = {"lossless": True} if encoding == "WEBP" else {}
        image, notes = decode(file_bytes(picture(1), encoding, **options))
        assert (image.mode, image.size, notes) == ("RGB", (80, 80), [])
        if encoding not in ("GIF", "JPEG"):
            assert np.array_equal(image, picture(1))


def test_zero_bytes():
    assert reason_of(b"") == "empty"


def test_html_named_jpg():
    assert reason_of(b"<!DOCTYPE html><html><body>404 Not Found</body></html>") == "not_an_image"


def test_a_phones_heic_is_named():
    with pytest.raises(BadImage, match="not_an_image: HEIC; convert it to JPEG"):
        decode(b"\0\0\0\x18ftypheic" + b"\0" * 100)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused(encoding):
    data = file_bytes(picture(2, (200, 200)), encoding)
    for kept in (0.3, 0.6, 0.9):
        assert reason_of(data[: int(len(data) * kept)]) in ("damaged", "not_an_image")


def test_truncated_files_are_refused_whatever_pillow_is_set_to(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason_of(GOOD[:-200]) == "damaged"


@pytest.mark.parametrize("side", [65500, 10_000, 14_000])
def test_bombs_are_refused_by_their_header(side):
    # 10,000^2 lies between Pillow's warning (89 megapixels) and its error (179)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(png(side, side, 1, 0, b"\0" * 1000)) == "too_many_pixels"


def test_pixel_limit_is_exact_and_movable():
    data = file_bytes(picture(3, (100, 50)))
    assert decode(data, max_pixels=5000)[0].size == (100, 50)
    assert reason_of(data, max_pixels=4999) == "too_many_pixels"
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # left as it was


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (401, 100)])
def test_extreme_ratio(size):
    assert reason_of(file_bytes(Image.new("RGB", size))) == "extreme_ratio"


def test_exif_orientation_is_applied():
    upright = picture(4, (60, 40))
    turned = {1: upright}
    for orientation, undo in {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.items():
        turned[orientation] = upright.transpose(undo)
    for orientation, stored in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image, notes = decode(file_bytes(stored, "PNG", exif=exif))
        assert np.array_equal(image, upright), orientation
        assert notes == ([] if orientation == 1 else ["rotated"])


def test_broken_exif_does_not_cost_the_picture():
    data = file_bytes(picture(4), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode(data)[0].size == (80, 80)


def test_cmyk():
    red = Image.new("RGB", (64, 64), (200, 30, 40))
    image, _ = decode(file_bytes(red.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(image, int) - (200, 30, 40)).max() <= 6


RAMP = np.linspace(0, 65535, 64 * 64).round().reshape(64, 64)


@pytest.mark.parametrize("encoding", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rescaled_not_clipped(encoding):
    image, notes = decode(file_bytes(Image.fromarray(RAMP.astype(np.uint16)), encoding))
    assert notes == ["rescaled"]
    assert np.abs(np.asarray(image)[..., 0] - RAMP / 257).max() <= 0.5


def test_sixteen_bit_colour():
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in RAMP)
    image, _ = decode(png(64, 64, 16, 2, rows))
    assert np.abs(np.asarray(image)[..., 1] - RAMP / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.int32), RAMP / 257),
        ((RAMP * 1000).astype(np.int32) - 5, RAMP / 257),
        ((RAMP / 65535).astype(np.float32), RAMP / 257),
        ((RAMP / 257).astype(np.float32), RAMP / 257),
        (RAMP.astype(np.float32), RAMP / 257),
        ((RAMP - 30000).astype(np.float32), RAMP / 257),
        (np.full((64, 64), -3, np.int32), np.zeros((64, 64))),
    ],
)
def test_integer_and_float_modes(values, expected):
    image, _ = decode(file_bytes(Image.fromarray(values), "TIFF"))
    assert np.abs(np.asarray(image)[..., 2] - expected).max() <= 1


def test_a_dark_sixteen_bit_picture_stays_dark():
    image, _ = decode(file_bytes(Image.fromarray(np.ones((64, 64), np.uint16))))
    assert np.asarray(image).max() == 0


def test_float_with_nan_is_refused():
    assert reason_of(file_bytes(Image.fromarray(np.full((64, 64), np.nan, np.float32)), "TIFF")) == "damaged"


def test_transparency_is_composited_on_white():
    half = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 32, 64))
    half.paste((0, 0, 0, 128), (32, 32, 64, 64))
    for data in (file_bytes(half), file_bytes(half, "WEBP", lossless=True, exact=True)):
        image, notes = decode(data)
        assert notes == ["transparent"]
        assert image.getpixel((5, 5)) == (0, 0, 255)
        assert image.getpixel((60, 5)) == (255, 255, 255)
        assert image.getpixel((60, 60)) == (127, 127, 127)


def test_other_transparent_modes():
    grey = Image.new("LA", (64, 64), (0, 0))
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    keyed = file_bytes(Image.new("RGB", (64, 64), (9, 9, 9)), transparency=(9, 9, 9))
    for data in (
        file_bytes(grey),
        file_bytes(palette, transparency=0),
        file_bytes(palette, "GIF", transparency=0),
        keyed,
    ):
        assert decode(data)[0].getpixel((1, 1)) == (255, 255, 255)


def test_opaque_alpha_is_not_noted():
    assert decode(file_bytes(picture(5).convert("RGBA")))[1] == []


@pytest.mark.parametrize("encoding", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_and_said_so(encoding):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if encoding == "WEBP" else {}
    data = file_bytes(frames[0], encoding, save_all=True, append_images=frames[1:], **options)
    image, notes = decode(data)
    assert notes == ["first_frame"]
    assert image.getpixel((5, 5)) == (255, 0, 0)


def test_bits_palette_and_grey():
    assert decode(file_bytes(Image.new("1", (64, 64), 1)))[0].getpixel((0, 0)) == (255, 255, 255)
    assert decode(file_bytes(Image.new("L", (64, 64), 77)))[0].getpixel((0, 0)) == (77, 77, 77)


def test_postscript_is_never_run():
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n") == "not_an_image"


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_flipped_bytes_are_decoded_or_refused(encoding):
    data = file_bytes(picture(6), encoding)
    rng = np.random.default_rng(0)
    for _ in range(120):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            broken[position] ^= int(rng.integers(1, 256))
        try:
            assert decode(bytes(broken), max_pixels=10**6)[0].mode == "RGB"
        except BadImage:
            pass


SQUARE, WIDE = Bucket("1:1", 64, 64), Bucket("2:1", 128, 64)


def test_fit_covers_and_crops_the_centre():
    stripes = Image.new("RGB", (300, 100), "red")
    stripes.paste("blue", (100, 0, 200, 100))
    image, notes = fit(stripes, SQUARE)
    assert (image.size, notes) == ((64, 64), [])
    assert np.abs(np.asarray(image, int)[:, 2:-2] - (0, 0, 255)).max() <= 1


def test_fit_is_the_usual_resampling():
    skimage = pytest.importorskip("skimage.data")
    for photo in (skimage.astronaut(), skimage.coffee()):
        source = Image.fromarray(photo)
        for bucket in (SQUARE, WIDE, Bucket("1:2", 64, 128)):
            expected = ImageOps.fit(source, bucket.size, Image.Resampling.LANCZOS)
            difference = np.asarray(fit(source, bucket)[0], int) - np.asarray(expected, int)
            assert np.abs(difference).max() <= 1


def test_the_crop_lies_within_pictures_of_every_size():
    """In floating point the crop of a 3:2 photo began at -1e-14, which Pillow refuses."""
    canvases = [bucket.size for side in (512, 1024) for bucket in make_buckets(ASPECT_RATIOS, side)]
    canvases += [(1344, 768), (768, 1344), (1536, 640), (896, 1152), (1024, 688), (688, 1024), (16, 8192)]
    sizes = [(w, h) for h in range(16, 4400, 97) for w in range(max(16, h // 4), 4 * h, 61)]
    sizes += [(a * k, b * k) for a, b in ((3, 2), (2, 3), (4, 3), (3, 4), (16, 9), (9, 16)) for k in range(8, 2001)]
    assert len(sizes) > 15_000
    outside = 0
    for width, height in sizes:
        for canvas in canvases:
            left, top, right, bottom = crop_box((width, height), canvas)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, (width, height, canvas)
            # the canvas's ratio, and one whole side
            assert abs((right - left) * canvas[1] - (bottom - top) * canvas[0]) < 1e-9 * width * height * canvas[0]
            assert right - left > width - 1e-9 or bottom - top > height - 1e-9
            scale = max(canvas[0] / width, canvas[1] / height)
            outside += min(width - canvas[0] / scale, height - canvas[1] / scale) < 0
    assert outside > 1000  # unclamped, that many would be refused
    for size in ((1500, 1000), (3000, 2000), (2000, 3000)):
        for canvas in canvases[:7]:
            assert cover(Image.new("RGB", size), canvas).size == canvas


def test_never_enlarged_silently():
    with pytest.raises(BadImage) as caught:
        fit(picture(7, (127, 200)), WIDE)
    assert caught.value.reason == "too_small"
    image, notes = fit(picture(7, (127, 200)), WIDE, allow_upscale=True)
    assert (image.size, notes) == ((128, 64), ["upscaled"])
    with pytest.raises(BadImage):
        fit(picture(7, (15, 15)), SQUARE, allow_upscale=True)


def test_exact_size_is_untouched():
    assert fit(picture(8, (64, 64)), SQUARE)[0] == picture(8, (64, 64))


@pytest.mark.parametrize(("encoding", "least_psnr"), [("png", np.inf), ("jpeg", 35), ("webp", 35)])
def test_encodings(encoding, least_psnr):
    data = encode(picture(9), encoding, 95)
    assert data == encode(picture(9), encoding, 95)
    decoded = Image.open(io.BytesIO(data))
    error = np.square(np.asarray(decoded, float) - np.asarray(picture(9), float)).mean()
    assert (np.inf if error == 0 else 10 * np.log10(255**2 / error)) >= least_psnr


# ICC profiles


def with_profile(image, encoding, profile):
    options = (
        {"quality": 100, "subsampling": 0} if encoding == "JPEG" else {"lossless": True} if encoding == "WEBP" else {}
    )
    return file_bytes(image, encoding, icc_profile=profile, **options)


PATCH = Image.new("RGB", (64, 64), (200, 80, 60))


@pytest.mark.parametrize("encoding", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_display_p3_becomes_srgb(encoding):
    image, notes = decode(with_profile(PATCH, encoding, DISPLAY_P3))
    assert np.abs(np.asarray(image, int) - (216, 69, 50)).max() <= 2
    assert notes == ["icc_profile"]
    assert "icc_profile" not in image.info
    assert b"iCCP" not in encode(image, "png", 0)


def test_transparency_and_palettes_are_kept_through_a_profile():
    layer = PATCH.convert("RGBA")
    layer.putalpha(128)
    image, notes = decode(with_profile(layer, "PNG", DISPLAY_P3))
    assert np.abs(np.asarray(image, int) - (235, 162, 152)).max() <= 2  # halfway between (216, 69, 50) and white
    assert sorted(notes) == ["icc_profile", "transparent"]
    image, _ = decode(with_profile(PATCH.quantize(4), "PNG", DISPLAY_P3))
    assert np.abs(np.asarray(image, int) - (216, 69, 50)).max() <= 3


def test_grey_profiles():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    linear = (np.arange(256) / 255) ** 2.2
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    image, notes = decode(with_profile(ramp, "PNG", GREY_2_2))
    assert (np.abs(np.asarray(image)[0, :, 0] - srgb).max() <= 1.5, notes) == (True, ["icc_profile"])
    image, notes = decode(with_profile(ramp, "PNG", DISPLAY_P3))  # grey is grey in a profile of colours, too
    assert (np.abs(np.asarray(image)[0, :, 1] - np.arange(256)).max() <= 1, notes) == (True, ["icc_profile"])
    image, notes = decode(file_bytes(Image.fromarray(RAMP.astype(np.uint16)), "PNG", icc_profile=GREY_2_2))
    assert notes == ["rescaled", "icc_profile"]


def test_black_stays_black():
    """A profile whose darkest grey reflects a tenth of the light, as paper's does: black point compensation."""
    curve = b"curv" + struct.pack(">4xIHH", 2, 6554, 65535)
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    image, notes = decode(with_profile(ramp, "PNG", icc_profile(b"GRAY", {b"kTRC": curve})))
    assert notes == ["icc_profile"]
    assert np.asarray(image)[0, 0].max() <= 3 and np.asarray(image)[0, 255].min() >= 253


@pytest.mark.parametrize("encoding", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile(encoding):
    red = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    image, notes = decode(with_profile(red, encoding, cmyk_profile(0.4)))
    assert np.abs(np.asarray(image, int) - 94).max() <= 3  # L* = 40 is sRGB 94: CIE 15, and the curve of sRGB
    assert notes == ["icc_profile"]
    white = Image.new("CMYK", (64, 64), 0)
    assert np.asarray(decode(with_profile(white, encoding, cmyk_profile(0.4)))[0]).min() >= 253


def test_the_profile_of_srgb_changes_nothing():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image, notes = decode(with_profile(picture(3), "PNG", profile))
    assert np.array_equal(image, picture(3))
    assert notes == []
    assert "icc_profile" not in image.info


@pytest.mark.parametrize("profile", [b"nonsense", DISPLAY_P3[:200], GREY_2_2, cmyk_profile(0.4), b"\0" * 128])
def test_a_profile_that_does_not_fit_is_ignored(profile):
    image, notes = decode(with_profile(picture(3), "PNG", profile))
    assert np.array_equal(image, picture(3))
    assert notes == ["icc_invalid"]


# PNG metadata


def chunk_of_png(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(chunk: bytes, at_end: bool = False) -> bytes:
    data = file_bytes(picture(6))
    place = len(data) - 12 if at_end else 33  # before IEND, or behind IHDR
    return data[:place] + chunk + data[place:]


TEXT = b"prompt\0\1\0\0\0" + zlib.compress(b"a" * 1_200_000)
BOMB = b"prompt\0\1\0\0\0" + zlib.compress(b"a" * 200_000_000, 9)
LARGE_PROFILE = b"ICC\0\0" + zlib.compress(np.random.default_rng(0).bytes(1_200_000))


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"iTXt", TEXT),
        (b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 1_200_000)),
        (b"iTXt", BOMB),
        (b"iCCP", LARGE_PROFILE),
        (b"acTL", b"damaged"),
    ],
)
def test_large_or_damaged_metadata_does_not_cost_the_picture(kind, body, at_end):
    image, notes = decode(with_chunk(chunk_of_png(kind, body), at_end))
    assert np.array_equal(image, picture(6))
    assert notes == ["metadata_dropped"]


def test_what_is_left_of_large_metadata_is_used():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = with_profile(PATCH, "PNG", DISPLAY_P3)
    data = data[:33] + chunk_of_png(b"iTXt", TEXT) + chunk_of_png(b"eXIf", exif.tobytes()[6:]) + data[33:]
    image, notes = decode(data)
    assert notes == ["metadata_dropped", "rotated", "icc_profile"]
    assert np.abs(np.asarray(image, int) - (216, 69, 50)).max() <= 2


def test_a_damaged_picture_stays_damaged_whatever_its_metadata():
    data = with_chunk(chunk_of_png(b"iTXt", TEXT))
    assert reason_of(data[:-300]) == "damaged"
    lying = png(30_000, 30_000, 1, 0, b"\0" * 1000)
    assert reason_of(lying[:33] + chunk_of_png(b"iTXt", TEXT) + lying[33:]) == "too_many_pixels"


def test_libtiff_writes_nothing_to_stderr(capfd):
    data = bytearray(file_bytes(picture(1), "TIFF", compression="tiff_lzw"))
    start = struct.unpack("<I", data[4:8])[0]
    place = data.index(struct.pack("<HHI", 259, 3, 1), start)  # the tag Compression
    data[place + 8 : place + 10] = struct.pack("<H", 50001)  # WebP: libtiff says that it cannot, three times
    assert reason_of(bytes(data)) == "damaged"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("body", [b"tEXtwrong checksum", b"gAMA\0"])
def test_png_with_a_damaged_chunk_before_its_pixels(body):
    data = file_bytes(picture(1))
    crc = zlib.crc32(body) if body.startswith(b"gAMA") else 0
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", crc)
    image, notes = decode(data[:33] + chunk + data[33:])
    assert (image.tobytes(), notes) == (decode(data)[0].tobytes(), ["metadata_dropped"])


def test_a_refused_tiff_is_refused_silently(caplog):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    place = data.index(struct.pack("<HHI", 277, 3, 1))  # samples per pixel
    data[place + 8 : place + 10] = struct.pack("<H", 9)
    with pytest.raises(BadImage, match="not_an_image"):
        decode(bytes(data))
    assert caplog.records == []
