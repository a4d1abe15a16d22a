"""Samples with reference pictures: read from every source in the order that is written, stored as they are where they can be,
with the same care for bad ones as targets get."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import shutil

import numpy as np
import pyarrow as arrow
import pytest
from conftest import RATIOS, SMALL, file_bytes, picture, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from test_sources import open_source, remarks_of, write_tar

from megaflux.common.errors import UserError
from megaflux.common.ranks import detect_world
from megaflux.data import prepare as command
from megaflux.data import references, verify
from megaflux.data.buckets import make_buckets
from megaflux.data.images import BadImage
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.references import StoredReference, pack, unpack
from megaflux.data.storage.dataset import SPLITS, read_dataset_info
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_reference
from megaflux.data.writing import pairing
from megaflux.data.writing import references as writing
from megaflux.data.writing.build import prepare
from megaflux.data.writing.items import Loaded, Reference
from megaflux.data.writing.merge import merge
from megaflux.data.writing.options import Options
from megaflux.generation.inputs import reference_tensor

BUCKETS = make_buckets(RATIOS, 64)
TARGET = file_bytes(picture(0, (64, 64)))


def samples_of(out):
    """key, after the last "/" or ":" -> (caption, references) of every sample."""
    rows = [row for split in SPLITS for bucket in BUCKETS for row in read_split(out, split, bucket)]
    return {
        row["key"].replace(":", "/").rpartition("/")[2]: (row["caption"], unpack(row["references"])) for row in rows
    }


def prepared(source, out, **changes):
    options = Options(**SMALL | {"chunk": 4, "held_out": 0} | changes)
    prepare(str(source), out, options, workers=1, progress=False, max_bad=changes.pop("max_bad", 100))
    return samples_of(out)


def read(source):
    """key -> (caption, [(bytes or the problem, name, strength)]) of every usable item, which are the same twice."""
    items = source.list_items()
    assert items == source.list_items()
    usable = [item for item in items if item.problem is None]
    found = {}
    for item, loaded in zip(usable, source.read(usable), strict=True):
        assert isinstance(loaded, Loaded)
        each = [
            (str(one.image) if isinstance(one.image, BadImage) else one.image, one.name, one.strength)
            for one in loaded.references
        ]
        found[item.key] = (loaded.caption.stored, each)
    assert source.has_references == any(each for _, each in found.values())
    return found


# --- the column ---

one_reference = st.builds(
    StoredReference,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.binary(min_size=1, max_size=40),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)


@given(st.lists(one_reference, max_size=5))
def test_the_column_holds_any_references(some):
    assert unpack(pack(some)) == some


@settings(max_examples=300)
@given(st.lists(one_reference, min_size=1, max_size=3), st.data())
def test_damage_in_the_column_is_one_error(some, data):
    column = bytearray(pack(some))
    for _ in range(data.draw(st.integers(1, 3))):
        column[data.draw(st.integers(0, len(column) - 1))] = data.draw(st.integers(0, 255))
    column = column[: data.draw(st.integers(1, len(column)))]
    with contextlib.suppress(ValueError):
        for one in unpack(bytes(column)):
            assert isinstance(one.name, str) and 0 < one.strength < float("inf") and one.data


@pytest.mark.parametrize(
    "header", ['{"a": 1}', "[1]", "3", "[[1]]", '[{"name": 1, "strength": 1, "bytes": 1}]', "[" * 100_000]
    + [f'[{{"name": "", "strength": {strength}, "bytes": {size}}}]' for strength, size in
       (("-1", 1), ("0", 1), ("NaN", 1), ("Infinity", 1), ("1" * 400, 1), ('"x"', 1), (1, -1), (1, 0), (1, '"1"'), (1, 1.0), (1, 2))],
)  # fmt: skip
def test_a_column_that_is_none(header):
    with pytest.raises(ValueError, match="references"):
        unpack(len(header).to_bytes(4, "little") + header.encode() + b"x")


# --- names ---


@pytest.mark.parametrize(
    ("names", "targeted", "expected"),
    [
        (["reference_10", "reference_2", "Reference", "caption"], False, ["Reference", "reference_2", "reference_10"]),
        (["reference_images", "reference"], False, ["reference"]),
        (["references", "reference_0"], False, ["references"]),
        (["ref_image_1", "ref_image_0"], False, ["ref_image_0", "ref_image_1"]),
        (["source_image", "image"], False, []),
        (["source_image", "image"], True, ["source_image"]),
        (["source_image", "reference"], True, ["reference"]),
        (["input_file_name", "source", "input", "preferences", "reference_id"], True, ["input_file_name"]),
    ],
)
def test_names_of_references(names, targeted, expected):
    assert pairing.reference_names(names, targeted) == expected


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("x.ref0", ("x", 0)), ("22.05.ref12", ("22.05", 12)), ("d/x.Reference_3", ("d/x", 3)), ("x.REF-1", ("x", 1)),
        ("x.ref", ("x", -1)), ("x.ref0.jpg", None), ("x.prefix", None), ("xref0", None), (".ref0", None), ("x.refs0", None),
    ],
)  # fmt: skip
def test_names_of_files_of_references(stem, expected):
    assert pairing.reference_of(stem) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, 1.0), ("", 1.0), (2, 2.0), ("0.5", 0.5), (1e-9, 1e-9)]
    + [(bad, None) for bad in (0, -1, float("nan"), float("inf"), "x", True, [1], 10**400)],
)
def test_strengths_are_those_of_generation(value, expected):
    found = pairing.strength_of(value)
    assert found == expected or (
        expected is None and isinstance(found, BadImage) and "use a number above 0" in str(found)
    )


# --- files ---

FILES = {
    "x.jpg": b"X",
    "x.ref10.jpg": b"10",
    "x.REF2.PNG": b"2",
    "x.txt": b"x",
    "x.REF2.txt": b"of a reference",
    "22.05.png": b"22.05",
    "22.05.ref0.png": b"22.05 r",
    "22.06.png": b"22.06",
    "22.06.json": b'{"instruction": ["add a cat", "a cat, please"]}',
    "22.06.reference_1.webp": b"22.06 r1",
    "22.06.reference_0.webp": b"22.06 r0",
    "alone.ref0.png": b"alone",
    "z.png": b"Z",
    "z.ref0.png": b"Z r",
    "z.ref0.txt": b"of a reference",
    "y.png": b"Y",
    "y.json": b'{"instruction": "of no pair"}',
}  # fmt: skip


def expected_of(prefix, suffixes):
    def key(name):
        return prefix + (name if suffixes else name.rpartition(".")[0])

    return {
        key("22.05.png"): ("", [(b"22.05 r", "22.05.ref0.png", 1.0)]),
        key("22.06.png"): (
            "add a cat\0a cat, please",
            [(b"22.06 r0", "22.06.reference_0.webp", 1.0), (b"22.06 r1", "22.06.reference_1.webp", 1.0)],
        ),
        key("x.jpg"): ("x", [(b"2", "x.REF2.PNG", 1.0), (b"10", "x.ref10.jpg", 1.0)]),
        key("y.png"): ("", []),
        key("z.png"): ("", [(b"Z r", "z.ref0.png", 1.0)]),
    }


def test_folders(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    source = open_source(tmp_path)
    assert read(source) == expected_of("", True) | {"alone.ref0.png": ("", [])}
    assert remarks_of(tmp_path) == [
        "6 images are references of those beside them (.ref0, .ref1, ...)",
        "not used, though they may hold captions: 2 files (x.REF2.txt, z.ref0.txt)",
    ]
    assert read(open_source(tmp_path / "x.jpg")) == {"x.jpg": expected_of("", True)["x.jpg"]}
    plain = read(open_source(tmp_path, references="none"))  # as before there were references
    assert plain["x.REF2.PNG"] == ("of a reference", []) and len(plain) == 12
    assert not any(each for _, each in plain.values())
    assert list(read(open_source(tmp_path / "x.jpg", references="none"))) == ["x.jpg"]

    before = {item.key: item.size for item in source.list_items()}
    (tmp_path / "x.ref10.jpg").write_bytes(b"another")
    assert {item.key for item in source.list_items() if before[item.key] != item.size} == {"x.jpg"}


def test_tars(tmp_path):
    write_tar(tmp_path / "a.tar", FILES.items())
    source = open_source(tmp_path)
    assert read(source) == expected_of("a.tar:", False) | {"a.tar:alone": ("", [])}
    assert remarks_of(tmp_path) == [
        "1 images share their name up to the first dot, and its caption, with others; each is used",
        "4 images have 6 references (.ref0, .ref1, ...)",
        "not used, though they may hold captions: 2 files (a.tar:x.REF2.txt, a.tar:z.ref0.txt)",
    ]
    plain = open_source(tmp_path, references="none")
    assert [item.key for item in plain.list_items() if item.problem] == ["a.tar:x.ref10.jpg"]
    assert not any(each for _, each in read(plain).values())

    before = {item.key: item.size for item in source.list_items()}
    write_tar(tmp_path / "a.tar", (FILES | {"22.05.ref0.png": b"another one"}).items())
    assert {item.key for item in source.list_items() if before[item.key] != item.size} == {"a.tar:22.05"}

    write_tar(tmp_path / "a.tar", [("g.jpg", b"G"), ("g.png", b"again"), ("g.ref0.png", b"R" * 5000)])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:4000])
    ((_, (reference,)),) = read(source).values()
    assert reference == ("damaged", "g.ref0.png", 1.0)


# --- tables of pictures ---

LIST = arrow.list_(arrow.binary())
PICTURE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
STRONG = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string()), ("strength", arrow.float64())])
WRAPPED = arrow.list_(arrow.struct([("image", PICTURE), ("strength", arrow.float32())]))
SOURCE = {"bytes": b"S", "path": "s.png"}


@pytest.mark.parametrize(
    ("columns", "references_"),
    [
        ({"image": [b"T"], "references": arrow.array([[b"0", None, b"1"]], LIST)}, [(b"0", "", 1.0), (b"1", "", 1.0)]),
        ({"references": [b"R"], "target": [b"T"]}, [(b"R", "", 1.0)]),
        ({"reference": [b"R"], "photo": [TARGET]}, [(b"R", "", 1.0)]),
        ({"image": [b"-"], "target": [b"T"], "reference_images": arrow.array([[b"R"]], LIST)}, [(b"R", "", 1.0)]),
        (
            {"image": [b"T"], "references": arrow.array([[{"bytes": b"R", "path": "r.png", "strength": 0.25}]], arrow.list_(STRONG))},
            [(b"R", "r.png", 0.25)],
        ),
        (
            {"image": [b"T"], "references": arrow.array([[{"image": SOURCE, "strength": 2}, {"image": None}]], WRAPPED)},
            [(b"S", "s.png", 2.0)],
        ),
        (
            {"image": [b"T"], "reference_10": [b"10"], "reference_9": [b"9"], "Reference_0": arrow.array([None], arrow.binary())},
            [(b"9", "", 1.0), (b"10", "", 1.0)],
        ),
        ({"image": [b"T"], "references": arrow.array([[]], LIST)}, []),
        ({"image": [b"T"], "references": arrow.array([[b"R"]], arrow.large_list(arrow.large_binary()))}, [(b"R", "", 1.0)]),
        ({"image": [b"T"], "references": arrow.array([[b"R"]], arrow.list_(arrow.binary(), 1))}, [(b"R", "", 1.0)]),
        # columns of public sets: InstructPix2Pix, its samples, MagicBrush, UltraEdit, OmniEdit, HQ-Edit
        ({"original_prompt": ["-"], "original_image": [SOURCE], "edit_prompt": ["do it"], "edited_prompt": ["-"], "edited_image": [b"T"]},
         [(b"S", "s.png", 1.0)]),
        ({"input_image": [SOURCE], "edit_prompt": ["do it"], "edited_image": [b"T"]}, [(b"S", "s.png", 1.0)]),
        ({"source_img": [SOURCE], "mask_img": [b"M"], "instruction": ["do it"], "target_img": [b"T"]}, [(b"S", "s.png", 1.0)]),
        ({"source_caption": ["-"], "source_image": [SOURCE], "edited_image": [b"T"], "mask_image": [b"M"], "edit_prompt": ["do it"]},
         [(b"S", "s.png", 1.0)]),
        ({"src_img": [SOURCE], "edited_img": [b"T"], "edited_prompt_list": [["do it"]]}, [(b"S", "s.png", 1.0)]),
        ({"input": ["-"], "input_image": [SOURCE], "edit": ["do it"], "output": ["-"], "output_image": [b"T"]}, [(b"S", "s.png", 1.0)]),
    ],
)  # fmt: skip
def test_parquet(tmp_path, columns, references_):
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    (item,) = source.list_items()
    assert source.has_references
    (loaded,) = source.read([item])
    assert loaded.image in (b"T", TARGET)
    assert [(one.image, one.name, one.strength) for one in loaded.references] == references_
    captions = [name for name in columns if columns[name] in (["do it"], [["do it"]])]
    assert loaded.caption.texts == ("do it",) * len(captions)


@pytest.mark.parametrize(
    ("columns", "options", "told"),
    [
        ({"image": [b"T"], "source_image": [b"S"], "instruction": ["-"]}, {},
         "images from the column image, captions from none (not read: source_image) (columns: image, source_image, instruction)"),
        ({"image": [b"T"], "source_image": [b"S"], "instruction": ["i"]}, {"image_column": "image"},
         "images from the column image, captions from instruction, references from source_image"),
        ({"source_image": [b"T"], "target": [b"-"]}, {"image_column": "source_image"},
         "images from the column source_image, captions from none (not read: target) (columns: source_image, target)"),
        ({"original_image": [TARGET], "text": ["t"]}, {}, "images from the column original_image, captions from text"),
        ({"image": [b"T"], "references": [["Smith 2010"]], "text": ["t"]}, {}, "images from the column image, captions from text"),
        ({"image": [b"T"], "references": arrow.array([[b"R"]], LIST), "text": ["t"], "instruction": ["-"]}, {},
         "images from the column image, captions from text, references from references"),
        ({"image": [b"T"], "references": arrow.array([[b"R"]], LIST), "text": ["t"]}, {"references": "none"},
         "images from the column image, captions from text"),
    ],
)  # fmt: skip
def test_which_columns_are_targets_and_references_is_said(tmp_path, columns, options, told):
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert remarks_of(tmp_path, **options) == [f"1 of 1 tables: {told}"]
    source = open_source(tmp_path, **options)
    assert [loaded.image for loaded in source.read(source.list_items())] in ([b"T"], [TARGET])
    assert source.has_references == ("references from" in told)


@pytest.mark.parametrize("columns", [{"reference": [TARGET]}, {"input_image": [TARGET], "output_image": ["a.png"]}])
def test_a_reference_is_never_the_target(tmp_path, columns):
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of images, only .*; name it with --image-column"):
        open_source(tmp_path, kind="parquet").list_items()
    assert len(read(open_source(tmp_path, references="none"))) == 1  # as before there were references


# --- tables beside pictures ---


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".csv":
        lists = [{name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
        parquet_rows = arrow.Table.from_pylist(lists)
        from pyarrow import csv

        csv.write_csv(parquet_rows, path)
    else:
        objects = [row | {"references": [one if isinstance(one, dict) else {"file_name": one, "strength": None}
                                         for one in row["references"] or []]} for row in rows]  # fmt: skip
        parquet.write_table(arrow.Table.from_pylist(objects), path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_tables_name_references(tmp_path, name):
    folder = tmp_path / "deep"
    (folder / "refs").mkdir(parents=True)
    for file in ("a.png", "b.png", "c.png", "refs/caf\u00e9.png", "refs/1.png"):
        (folder / file).write_bytes(file.encode())
    (folder / "b.ref0.png").write_bytes(b"beside")
    (tmp_path / "secret.png").write_bytes(b"elsewhere")
    write_table(
        folder / name,
        [
            {"file_name": "a.png", "references": ["refs/cafe\u0301.png", {"file_name": "./refs\\1.png", "strength": 0.5}], "instruction": "do it"},
            {"file_name": "b.png", "references": ["refs/1.png"], "instruction": "-"},
            {"file_name": "c.png", "references": ["../secret.png", "gone.png", "a.png", "../../up.png", "/etc/passwd",
                                                  {"file_name": "a.png", "strength": -1.0}], "instruction": "of three"},
        ],
    )  # fmt: skip
    outside = "missing_image: leads out of the folder"
    expected = {
        "deep/a.png": (
            "do it",
            [("refs/caf\u00e9.png".encode(), "deep/refs/caf\u00e9.png", 1.0), (b"refs/1.png", "deep/refs/1.png", 0.5)],
        ),
        "deep/b.png": ("-", [(b"beside", "deep/b.ref0.png", 1.0)]),
        "deep/c.png": (
            "of three",
            [
                (b"elsewhere", "secret.png", 1.0),
                ("missing_image: not among the files of the folder", "deep/gone.png", 1.0),
                (b"a.png", "deep/a.png", 1.0),
                (outside, "../up.png", 1.0),
                (outside, "/etc/passwd", 1.0),
                ("bad_reference: strength '-1.0': use a number above 0, or leave it out", "deep/a.png", 1.0),
            ],
        ),
    }
    assert read(open_source(tmp_path)) == expected
    assert remarks_of(tmp_path) == [
        "1 images are references of those beside them (.ref0, .ref1, ...)",
        "3 images are named as references only, so they are not samples themselves",
        f"deep/{name}: 3 images have 9 references in references",
    ]
    assert set(read(open_source(tmp_path, references="none"))) >= {"secret.png", "deep/refs/1.png", "deep/b.ref0.png"}

    source = open_source(tmp_path)
    before = {item.key: item.size for item in source.list_items()}
    (folder / "refs/1.png").write_bytes(b"another one")
    assert {item.key for item in source.list_items() if before[item.key] != item.size} == {"deep/a.png"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"file_name": "t.png", "reference": "r.png"}, ["r.png"]),
        ({"file_name": "t.png", "reference_0": "r.png", "reference_1": "s.png"}, ["r.png", "s.png"]),
        ({"target": "t.png", "references": "['r.png', 's.png']"}, ["r.png", "s.png"]),  # as pandas writes a list
        ({"image": "s.png", "target": "t.png", "references": ["r.png"]}, ["r.png"]),
        ({"input_image": "r.png", "edited_image": "t.png", "edit_prompt": "do it"}, ["r.png"]),
        (
            {"input_images": ["r.png", "s.png"], "output_image": "t.png", "instruction": "do it"},
            ["r.png", "s.png"],
        ),  # X2I
        ({"input_file_name": "r.png", "output_file_name": "t.png"}, ["r.png"]),  # as ImageFolder has several pictures
        ({"file_name": "t.png", "references": {"path": "ROOT/r.png", "strength": "2"}}, ["r.png"]),
        ({"file_name": "t.png", "source_image": "r.png"}, []),
        ({"file_name": "t.png", "reference": "Smith 2010"}, []),
    ],
)
def test_rows_of_pairs(tmp_path, row, expected):
    for name in ("r.png", "s.png", "t.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row).replace("ROOT", str(tmp_path)))
    found = read(open_source(tmp_path))
    caption, each = found["t.png"]
    assert [name for _, name, _ in each] == expected
    assert set(found) == {"r.png", "s.png", "t.png"}.difference(expected)
    assert caption == ("do it" if "do it" in row.values() else "")
    if "Smith 2010" in row.values():
        assert "metadata.jsonl: reference names no pictures, so it is left aside" in remarks_of(tmp_path)


def test_rows_that_differ_of_one_image(tmp_path):
    for name in ("a.png", "r.png", "s.png"):
        (tmp_path / name).write_bytes(name.encode())
    rows = [{"file_name": "a.png", "reference": one, "text": one} for one in ("r.png", "s.png", "r.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(open_source(tmp_path))["a.png"] == ("r.png\0s.png\0r.png", [(b"r.png", "r.png", 1.0)])
    assert "1 rows name other references than an earlier row of the same image; the first are used" in str(
        remarks_of(tmp_path)
    )


# --- what is stored ---


def test_stored_as_it_is_or_as_generation_would_read_it(tmp_path):
    """Of a PNG dataset: pixels that are those of generation's reference_tensor on the same file."""
    frames = [picture(n, (90, 70)) for n in range(2)]
    clear = picture(6, (50, 40)).convert("RGBA")
    clear.putalpha(picture(7, (50, 40)).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    as_is = {
        "small.png": file_bytes(picture(1, (40, 30))),
        "photo.jpg": file_bytes(picture(2, (64, 20)), "JPEG"),
        "web.webp": file_bytes(picture(3, (33, 64)), "WEBP"),
    }
    changed = {
        "large.png": file_bytes(picture(4, (300, 101))),
        "grey.png": file_bytes(picture(5, (40, 30)).convert("L")),
        "clear.png": file_bytes(clear),
        "turned.jpg": file_bytes(picture(8, (60, 30)), "JPEG", exif=exif),
        "moves.gif": file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for number, data in enumerate((as_is | changed).values()):
        (tmp_path / f"x.ref{number}.png").write_bytes(data)  # the suffix says nothing of the format
    (tmp_path / "x.png").write_bytes(TARGET)
    (_, stored) = prepared(tmp_path, tmp_path / "out")["x.png"]
    assert [one.data for one in stored[: len(as_is)]] == list(as_is.values())
    for one, data in zip(stored, (as_is | changed).values(), strict=True):
        expected, _ = reference_tensor(Image.open(io.BytesIO(data)), 64)
        assert np.array_equal(from_reference(one.data), expected[0])


def test_a_picture_that_is_referred_to_often_is_decoded_once(monkeypatch):
    calls = []
    real = writing.decode
    monkeypatch.setattr(writing, "decode", lambda data, *more: calls.append(data) or real(data, *more))
    monkeypatch.setattr(writing, "_known", writing._Known())
    large, cut, small = (
        file_bytes(picture(1, (200, 90))),
        file_bytes(picture(2))[:-600],
        file_bytes(picture(3, (40, 40))),
    )
    options = Options(**SMALL)
    for _ in range(3):
        first = writing.stored(Reference(large), options)
        assert first == writing.stored(Reference(bytes(bytearray(large))), options)
        assert writing.stored(Reference(small), options).data == small
        with pytest.raises(BadImage, match="damaged"):
            writing.stored(Reference(cut), options)
    assert len(calls) == 3 and writing._known._bytes == len(first.data)
    assert writing.stored(Reference(large), Options(**SMALL | {"longest_side": 32})).data != first.data
    monkeypatch.setattr(writing._Known, "BYTES", len(first.data) - 1)
    writing.stored(Reference(large), Options(**SMALL | {"longest_side": 48}))
    assert writing._known._bytes == sum(map(writing._size, writing._known._files.values())) <= len(first.data)


BAD = {
    "damaged": (file_bytes(picture(9))[:-600], "damaged"),
    "text": (b"<html>404</html>", "not_an_image"),
    "empty": (b"", "empty"),
    "long": (file_bytes(Image.new("RGB", (1010, 10))), "extreme_ratio"),
    "tiny": (file_bytes(Image.new("RGB", (8, 8))), "too_small"),
}


def test_bad_references(tmp_path, capsys):
    """They cost their sample, or with --min-references only themselves where enough others are there."""
    source = tmp_path / "source"
    source.mkdir()
    good = file_bytes(picture(1, (40, 40)))
    for name, (data, _) in BAD.items():
        (source / f"{name}.png").write_bytes(TARGET)
        (source / f"{name}.ref0.png").write_bytes(data)
        (source / f"{name}.ref1.png").write_bytes(good)
    for name in ("good", "many", "named"):
        (source / f"{name}.png").write_bytes(TARGET)
    for number in range(17):
        (source / f"many.ref{number}.png").write_bytes(good)
    (source / "gone.ref0.png").symlink_to("nowhere")
    (source / "gone.png").write_bytes(TARGET)
    named = ["gone.png", {"path": "elsewhere.png"}, {"path": "good.png", "strength": 0}, {"strength": 1}]
    rows = [{"file_name": "named.png", "references": named}, {"file_name": "good.png"}, {"file_name": "gone.png"}]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert prepared(source, tmp_path / "strict") == {"good.png": ("", [])}
    listed = [json.loads(line) for line in (tmp_path / "strict/bad_images.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in listed} == {"bad_reference"}
    details = {entry["key"]: entry["detail"] for entry in listed}
    for name, (_, reason) in BAD.items():
        assert details[f"{name}.png"].startswith(f"{name}.ref0.png: {reason}")
    assert details["many.png"] == "17 references, at most 16 are taken"
    assert details["gone.png"] == "gone.ref0.png: unreadable: No such file or directory"
    assert details["named.png"] == (
        "elsewhere.png: missing_image: not among the files of the folder; "
        "good.png: bad_reference: strength '0': use a number above 0, or leave it out; "
        "reference 3: missing_image: neither a path nor an object with one"
    )
    assert read_dataset_info(tmp_path / "strict").bad == {"bad_reference": 8}

    arguments = ["--longest-side", "64", "--aspect-ratios", ",".join(RATIOS), "--format", "png", "--held-out", "0"]
    arguments += ["--workers", "1", "--max-bad", "3", "--min-references", "1"]
    assert command.main([str(source), str(tmp_path / "lenient"), *arguments]) == 0
    found = samples_of(tmp_path / "lenient")
    assert set(found) == {"named.png", *(f"{name}.png" for name in BAD)}
    assert [one.name for one in found["named.png"][1]] == ["gone.png"]
    assert all([one.data for one in found[f"{name}.png"][1]] == [good] for name in BAD)
    listed = [json.loads(line) for line in (tmp_path / "lenient/bad_references.jsonl").read_text().splitlines()]
    assert len(listed) == len(BAD) + 3 and {"key", "reference", "detail"} == set(listed[0])
    said = capsys.readouterr().out
    assert "8 references could not be used, listed in" in said and "references: 6 (6 images with 1)" in said
    assert not (tmp_path / "strict/bad_references.jsonl").exists()


# --- datasets with references ---

RNG = random.Random(0)
SIZES = {(number, place): (RNG.randint(20, 90), RNG.randint(20, 90)) for number in range(104) for place in range(3)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """104 square pictures with 0 to 3 references each, of other sizes."""
    folder = tmp_path_factory.mktemp("pairs") / "source"
    folder.mkdir()
    for number in range(104):
        picture(number, (64, 64)).save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"picture {number}")
        for place in range(number % 4):
            picture(1000 * place + number, SIZES[number, place]).save(folder / f"{number:03}.ref{place}.png")
    return folder


OPTIONS = Options(**SMALL | {"chunk": 26}, held_out=0.02)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs") / "out"
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    return out


def test_a_dataset_with_references(whole):
    """All references are there, of the pictures that were held out to make eight, too."""
    info = read_dataset_info(whole)
    assert info.format_version == 3 and info.has_references and info.most_references == 3
    assert info.settings["reference_stats"] == {str(n): 26 for n in range(4)}
    assert info.samples("held_out") >= 8
    for name, (caption, each) in samples_of(whole).items():
        number = int(name[:3])
        assert caption == f"picture {number}"
        assert [one.name for one in each] == [f"{number:03}.ref{place}.png" for place in range(number % 4)]
        for place, one in enumerate(each):
            with Image.open(io.BytesIO(one.data)) as image:
                original = picture(1000 * place + number, SIZES[number, place])
                assert np.array_equal(np.asarray(image), reference_tensor(original, 64)[0][0].permute(1, 2, 0))


def test_workers_parts_and_interruption_change_nothing(source, whole, tmp_path, monkeypatch):
    for name, workers, parts in (("workers", 2, [None]), ("parts", 1, [(2, 2), (1, 2)])):
        for part in parts:
            prepare(str(source), tmp_path / name, OPTIONS, workers=workers, part=part, progress=False)
        merge(tmp_path / name, progress=False)
        assert tree(tmp_path / name) == tree(whole)
    shutil.rmtree(tmp_path / "parts" / "train" / "1x1" / "chunk-00002")  # as if killed in the middle of a chunk
    (tmp_path / "parts" / "chunks" / "chunk-00002.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "held_out" / "1x1" / "chunk-00002", ignore_errors=True)
    (tmp_path / "parts" / "dataset.json").unlink()
    prepare(str(source), tmp_path / "parts", OPTIONS, workers=1, progress=False)
    assert tree(tmp_path / "parts") == tree(whole)


def test_all_sources_give_the_same(source, tmp_path):
    names = [
        f"{number:03}.{end}" for number in range(10, 18) for end in ("png", "txt", "ref0.png", "ref1.png", "ref2.png")
    ]
    files = {name: (source / name).read_bytes() for name in names if (source / name).exists()}
    for kind in ("folder", "tar", "table", "parquet"):
        (tmp_path / kind).mkdir()
    write_tar(tmp_path / "tar" / "a.tar", files.items())
    rows = []
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
        if not name.endswith("txt"):
            (tmp_path / "table" / name.replace(".ref", "-")).write_bytes(data)
    for key in sorted({name[:3] for name in files}):
        paths = [name for name in files if name.startswith(f"{key}.ref")]
        caption, pictures = files[f"{key}.txt"].decode(), [files[path] for path in paths]
        rows.append({"key": key, "instruction": caption, "target": files[f"{key}.png"], "references": pictures})
        row = {
            "target": f"{key}.png",
            "edit_prompt": caption,
            "references": [path.replace(".ref", "-") for path in paths],
        }
        with open(tmp_path / "table" / "metadata.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    # Edits without references have an instruction too: in a table of such columns it counts, alone in a row it does not.
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "parquet" / "a.parquet", row_group_size=3)
    found = {}
    for kind in ("folder", "tar", "table", "parquet"):
        samples = prepared(tmp_path / kind, tmp_path / "out" / kind)
        found[kind] = {
            key.removesuffix(".png"): (caption if each else "", [one.data for one in each])
            for key, (caption, each) in samples.items()
        }
    assert len(found["folder"]) == 8 and sum(len(each) for _, each in found["folder"].values()) == 12
    assert found["folder"] == found["tar"] == found["table"] == found["parquet"]


def test_a_changed_reference_is_another_source(source, whole, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "001.ref0.png").write_bytes(file_bytes(picture(1, (77, 77))))
    with pytest.raises(UserError, match="was begun from other images or settings"):
        prepare(str(tmp_path / "source"), whole, OPTIONS, workers=1, progress=False)


def test_what_an_earlier_version_began_stays_without_references(source, tmp_path):
    options = Options(**SMALL | {"chunk": 200}, held_out=0, references="none")
    prepare(str(source), tmp_path / "out", options, workers=1, part=(1, 3), progress=False)
    plan = json.loads((tmp_path / "out" / "prepare.json").read_text())
    for name in ("references", "min_references"):
        del plan["settings"][name]
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(plan))
    options = Options(**SMALL | {"chunk": 200}, held_out=0)
    prepare(str(source), tmp_path / "out", options, workers=1, max_bad=200, progress=False)
    info = read_dataset_info(tmp_path / "out")
    assert not info.has_references and info.samples("train") + sum(info.bad.values()) == 104 + 156
    assert info.format_version == 1


def test_damage_is_found_and_replaced(source, tmp_path):
    """By `verify`, from the shards' hashes; and while training, a column that cannot be read costs its sample."""
    out = tmp_path / "out"
    prepare(str(source), out, Options(**SMALL | {"encoding": "webp"}, held_out=0), workers=1, progress=False)

    def batches():
        loader = build_loader(
            out, LoaderOptions(batch_size=4, seed=0, max_replaced=1, replace_damaged=True), detect_world()
        )
        try:
            return list(itertools.islice(loader, 26))
        finally:
            loader.close()

    sound = batches()
    column = next(one for name, (_, one) in samples_of(out).items() if name == "003.png")
    assert len(column) == 3
    for batch in sound:
        for key, each in zip(batch.keys, batch.references, strict=True):
            expected = references.decoded(pack(samples_of(out)[key][1])) if key == "003.png" else []
            assert len(each) == int(key[:3]) % 4
            assert all(np.array_equal(a.pixel_values, b.pixel_values) for a, b in zip(expected, each, strict=False))
    header = b'[{"name":"003.ref0.png"'
    (path,) = [path for path in out.glob("train/1x1/*/*.mds") if header in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(header, b'[{"name";' + header[9:]))
    with pytest.raises(UserError, match="shard"):
        verify.main([str(out)])
    (out / ".verified.json").unlink(missing_ok=True)
    damaged = batches()
    assert all(len(batch.references) == 4 for batch in damaged)
    lines = [line for batch in damaged for line in batch.replaced]
    assert lines and all("column of references" in line and "stands in" in line for line in lines)
