"""Images with several captions: all are stored, in order, whatever they came in; one caption is stored as it always was."""

from __future__ import annotations

import json
import logging
import math
import random

import pyarrow as arrow
import pytest
from conftest import RATIOS, SMALL, file_bytes, picture, tree, write_folder
from pyarrow import parquet
from test_sources import write_tar

from megaflux.common.errors import UserError
from megaflux.data import captions, verify
from megaflux.data import prepare as command
from megaflux.data.buckets import make_buckets
from megaflux.data.storage.caption_stats import CaptionStats, measured
from megaflux.data.storage.dataset import SPLITS, read_dataset_info
from megaflux.data.storage.shards import read_split
from megaflux.data.writing import caption_report
from megaflux.data.writing.build import prepare
from megaflux.data.writing.captions import CaptionReader
from megaflux.data.writing.options import Options
from megaflux.data.writing.tokens import open_counter
from megaflux.models.scratch import TINY, tiny_processor

OPTIONS = Options(**SMALL | {"chunk": 2}, held_out=0)
IMAGE = file_bytes(picture(1))
THREE = ["a cat", "a cat that sleeps", "a cat"]  # one of them twice: it stays, as places have weights
NUMBERED = {"caption_10": "last", "caption_2": " third ", "caption_1": "", "Caption_0": "second", "caption": "first"}


def stored(out) -> dict[str, list[str]]:
    """key -> captions of every image of a dataset, by its last part."""
    rows = [row for split in SPLITS for bucket in make_buckets(RATIOS, 64) for row in read_split(out, split, bucket)]
    return {row["key"].rpartition("/")[2]: list(captions.split(row["caption"])) for row in rows}


def prepared(source, out, **changes) -> dict[str, list[str]]:
    options = Options(**{**SMALL, "chunk": 2, "held_out": 0} | changes)
    prepare(str(source), out, options, workers=1, progress=False)
    return stored(out)


def test_columns_hold_any_captions():
    for texts in ([], ["one"], ["one", "two"], THREE, ["\n", "\u2028\x1f", "{}"]):
        assert captions.split(captions.join(texts)) == tuple(texts)
    assert captions.join(["one"]) == "one"
    for wrong in (["a", ""], ["a\0b", "c"]):
        with pytest.raises(ValueError, match="empty or holds NUL"):
            captions.join(wrong)


def test_a_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    files = {
        "list.json": json.dumps(THREE),
        "field.json": json.dumps({"caption": [*THREE, None, " "]}),
        "objects.json": json.dumps({"captions": [{"text": "a"}, {"text": "b"}]}),
        "numbered.json": json.dumps(NUMBERED),
        "lines.txt": " first \r\n\r\nsecond\u2028with its own break\nthird",
        "lines2.caption": "x\ny\rz",
        "unusable.json": json.dumps(["good", 3]),
        "blank.json": json.dumps({"caption": ["", " "], "text": "not hidden"}),
    }
    for name, text in files.items():
        (source / f"{name.partition('.')[0]}.png").write_bytes(IMAGE)
        (source / name).write_bytes(text.encode())
    expected = {
        "list.png": THREE,
        "field.png": THREE,
        "objects.png": ["a", "b"],
        "numbered.png": ["first", "second", "third", "last"],
        "lines.png": ["first", "second\u2028with its own break", "third"],
        "lines2.png": ["x", "y", "z"],
        "unusable.png": ["good"],
        "blank.png": ["not hidden"],
    }
    assert prepared(source, tmp_path / "lines", captions="lines") == expected
    (listed,) = (tmp_path / "lines" / "bad_captions.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"key": "unusable.png", "detail": "a int, not text"}
    whole = {"lines.png": [files["lines.txt"].strip()], "lines2.png": ["x\ny\rz"]}
    assert prepared(source, tmp_path / "all") == expected | whole


def test_tables(tmp_path):
    """Lists, numbered columns, and a row for each caption."""
    for folder in ("jsonl", "csv", "rows", "parquet"):
        (tmp_path / folder).mkdir()
        for name in ("a.png", "b.png"):
            (tmp_path / folder / name).write_bytes(IMAGE)
    rows = [{"file_name": "a.png", "text": THREE}, {"file_name": "b.png", "text": ["only"]}]
    (tmp_path / "jsonl/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "csv/metadata.csv").write_text(
        "file_name,caption_2,caption_0,caption_1\na.png,a cat,a cat,a cat that sleeps\nb.png,,,only\n"
    )
    (tmp_path / "rows/metadata.csv").write_text(
        "file_name,caption\na.png,a cat\nb.png,only\na.png,a cat that sleeps\na.png,a cat\n"
    )
    table = {"file_name": ["a.png", "b.png"], "captions": [THREE, ["only"]], "image_id": [1, 2]}
    parquet.write_table(arrow.table(table), tmp_path / "parquet/metadata.parquet")
    for folder in ("jsonl", "csv", "rows", "parquet"):
        found = prepared(tmp_path / folder, tmp_path / "out" / folder)
        assert found == {"a.png": THREE, "b.png": ["only"]}, folder


def test_parquet_and_tar(tmp_path):
    lists, numbered, tars = (tmp_path / name for name in ("lists", "numbered", "tars"))
    for folder in (lists, numbered, tars):
        folder.mkdir()
    texts = arrow.array([THREE, None, []], arrow.list_(arrow.string()))
    parquet.write_table(arrow.table({"image": [IMAGE] * 3, "caption": texts}), lists / "a.parquet")
    assert prepared(lists, tmp_path / "1") == {"a.parquet:0": THREE, "a.parquet:1": [], "a.parquet:2": []}
    columns = {f"caption_{n}": [f"number {n}", None] for n in (11, 0, 2)} | {"other_3": ["not one", ""]}
    parquet.write_table(arrow.table({"image": [IMAGE] * 2} | columns), numbered / "a.parquet")
    expected = {"a.parquet:0": ["number 0", "number 2", "number 11"], "a.parquet:1": []}
    assert prepared(numbered, tmp_path / "2") == expected
    assert prepared(numbered, tmp_path / "3", caption_column="other")["a.parquet:0"] == ["not one"]
    members = {"a.png": IMAGE, "a.json": json.dumps({"prompt": THREE}).encode(), "b.png": IMAGE, "b.txt": b"x\ny"}
    write_tar(tars / "t.tar", members.items())
    assert prepared(tars, tmp_path / "4", captions="lines") == {"t.tar:a": THREE, "t.tar:b": ["x", "y"]}


@pytest.mark.parametrize(
    ("names", "field", "expected"),
    [
        (["caption", "caption_0"], None, ["caption", "caption_0"]),
        (["caption", "caption_0"], "caption", ["caption"]),
        (["caption", "Caption_0"], "Caption", ["Caption_0"]),
        (["text_2", "text-10", "text1", "text_"], None, ["text1", "text_2", "text-10"]),
        (["captions_1", "captions_0"], None, ["captions_0", "captions_1"]),
        (["text", "caption_0"], None, ["caption_0"]),
        (["prompt", "caption_2024", "caption_a", "caption_1.5"], None, ["prompt"]),
        (["title"], None, []),
    ],
)
def test_fields_with_numbers(names, field, expected):
    assert CaptionReader(field).fields_of(names) == expected


def test_one_caption_is_stored_as_it_was(tmp_path):
    """The column holds the text itself, and earlier versions can read the dataset; with several, they say "update it"."""
    source = write_folder(tmp_path / "source", {(70, 70): 4})
    (source / "003.txt").write_text("two\nlines")
    assert prepared(source, tmp_path / "out") == {f"{n:03}.png": [f"picture {n}"] for n in range(3)} | {
        "003.png": ["two\nlines"]
    }
    rows = list(read_split(tmp_path / "out", "train", make_buckets(RATIOS, 64)[0]))
    assert [row["caption"] for row in rows] == ["picture 0", "picture 1", "picture 2", "two\nlines"]
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["format_version"] == 1  # earlier versions read it
    lines = prepared(source, tmp_path / "lines", captions="lines")
    assert lines["003.png"] == ["two", "lines"]
    assert json.loads((tmp_path / "lines" / "dataset.json").read_text())["format_version"] == 2  # and not this
    assert read_dataset_info(tmp_path / "lines").caption_stats.images == {1: 3, 2: 1}


# --- how many, and how long ---


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Nine images: one without a caption, five with one, three with up to four; captions of up to 40 words."""
    source = write_folder(tmp_path_factory.mktemp("several") / "source", {(70, 70): 9})
    words, rng = ["cat", "sleeping", "a", "curious", "\u732b"], random.Random(0)
    (source / "000.txt").unlink()
    for number, count in ((1, 2), (2, 4), (3, 3)):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(count)]
        (source / f"{number:03}.txt").write_text("\n".join(texts))
    return source


def by_hand(lengths: list[int]) -> tuple[int, ...]:
    """least, median, 95%, most: the nearest rank in the sorted lengths."""
    ranked = sorted(lengths)
    return tuple(ranked[max(0, math.ceil(share * len(ranked)) - 1)] for share in (0, 0.5, 0.95, 1))


def test_lengths_are_counted(source, tmp_path, capsys, monkeypatch):
    """By the command, in characters; in tokens when it is given a tokenizer, also afterwards, by parts and in workers;
    nothing else depends on it."""
    arguments = [str(source), str(tmp_path / "out"), "--longest-side", "64", "--aspect-ratios", "1:1,2:1,1:2"]
    arguments += ["--format", "png", "--chunk", "2", "--held-out", "0", "--captions", "lines", "--workers", "1"]
    assert command.main(arguments) == 0
    texts = [text for of_image in stored(tmp_path / "out").values() for text in of_image]
    assert len(texts) == 14
    least, median, most95, most = by_hand([len(text) for text in texts])
    said = capsys.readouterr().out
    assert (
        "captions an image: 1 images have 0, 5 images have 1, 1 images have 2, 1 images have 3, 1 images have 4" in said
    )
    assert f"in characters: {least} to {most}, median {median}, 95% have at most {most95}\n" in said
    assert "the same command with --tokenizer counts them" in said

    # ChatTurns.caption on these texts, counted here: byte-level BPE, no special tokens.
    tokenizer = tiny_processor().tokenizer
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    least, median, most95, most = by_hand(tokens)
    longer = sum(count > 9 for count in tokens)
    assert 0 < longer < len(tokens)
    line = (
        f"lengths of captions in tokens of {TINY / 'tokenizer'}: {least} to {most}, median {median}, 95% have at most {most95}; "
        f"{longer} of 14 are longer than 9 and would be cut in training"
    )
    shards = {name: digest for name, digest in tree(tmp_path / "out").items() if name != "dataset.json"}
    counting = ["--tokenizer", str(TINY / "tokenizer"), "--caption-max-tokens", "9"]
    assert command.main([*arguments, *counting]) == 0  # read again from the shards
    assert line in capsys.readouterr().out
    assert {name: digest for name, digest in tree(tmp_path / "out").items() if name != "dataset.json"} == shards
    before = tree(tmp_path / "out")
    assert command.main(arguments) == 0  # what was counted stays
    assert tree(tmp_path / "out") == before
    assert line in capsys.readouterr().out
    assert verify.main([str(tmp_path / "out")]) == 0
    assert line in capsys.readouterr().out

    arguments[1] = str(tmp_path / "parts")
    arguments[-1] = "2"
    for part in ("1/2", "2/2"):
        assert command.main([*arguments, *counting, "--part", part]) == 0
    monkeypatch.setattr(caption_report, "read_shard", None)  # nothing is read again
    assert command.main([*arguments, "--merge"]) == 0
    assert line in capsys.readouterr().out
    counted = {name: digest for name, digest in tree(tmp_path / "parts").items() if name.startswith("tokens/")}
    assert len(counted) == 5
    assert {name: digest for name, digest in tree(tmp_path / "parts").items() if name not in counted} == before


def test_of_many_chunks_some_are_counted(source, tmp_path, monkeypatch):
    prepared(source, tmp_path / "out", captions="lines")
    monkeypatch.setattr(caption_report, "READ_AGAIN", 2)
    counter = open_counter(str(TINY / "tokenizer"))
    options = Options(**SMALL | {"chunk": 2}, held_out=0, captions="lines")
    info = prepare(str(source), tmp_path / "out", options, workers=1, progress=False, counter=counter)
    lengths = info.caption_stats.lengths
    assert lengths.limit == 256 and lengths.captions < info.caption_stats.captions == 14
    assert info.caption_stats.describe()[-1].endswith(f" ({lengths.captions} of 14 captions)")


def test_nearest_ranks():
    assert measured({}, "tokens") is None
    rng = random.Random(1)
    for count in (1, 2, 3, 19, 20, 21, 100):
        lengths = [rng.randint(1, 9) for _ in range(count)]
        found = measured({n: lengths.count(n) for n in set(lengths)}, "tokens", limit=5)
        assert (found.least, found.median, found.most95, found.most) == by_hand(lengths)
        assert (found.captions, found.longer) == (count, sum(n > 5 for n in lengths))


@pytest.mark.parametrize("options", [["--caption-max-tokens", "9"], ["--tokenizer", ".", "--caption-max-tokens", "0"]])
def test_a_limit_without_a_tokenizer_is_refused(options):
    with pytest.raises((UserError, SystemExit)):
        command.parse_arguments(["source", "out", *options])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks tokenizer_config.json, tokenizer.json or vocab.json and merges.txt"):
        open_counter(str(tmp_path))


# --- earlier versions ---


def test_what_an_earlier_version_began_is_finished_as_it_was(tmp_path, caplog):
    """It stored the first of a list, and nothing of numbered fields; and kept no count of captions."""
    source = write_folder(tmp_path / "source", {(70, 70): 6})
    for number in (0, 5):
        (source / f"{number:03}.txt").unlink()
        (source / f"{number:03}.json").write_text(json.dumps(THREE))
    (source / "004.txt").unlink()
    (source / "004.json").write_text(json.dumps({"caption_0": "a", "caption_1": "b"}))
    first = Options(**SMALL | {"chunk": 2}, held_out=0, captions="first")
    prepare(str(source), tmp_path / "out", first, workers=1, progress=False, part=(1, 3))
    plan = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert plan["settings"].pop("captions") == "first"  # earlier versions had no such setting
    (tmp_path / "out" / "prepare.json").write_text(json.dumps(plan))
    report = tmp_path / "out" / "chunks" / "chunk-00000.json"
    content = json.loads(report.read_text())
    del content["images_by_captions"], content["characters"]
    report.write_text(json.dumps(content))
    with pytest.raises(UserError, match="which stored one caption an image; leave --captions out"):
        prepared(source, tmp_path / "out", captions="lines")
    caplog.set_level(logging.WARNING)
    assert prepared(source, tmp_path / "out") == {
        **{f"{n:03}.png": [f"picture {n}"] for n in range(1, 4)},
        "000.png": ["a cat"],
        "004.png": [],
        "005.png": ["a cat"],
    }
    assert "stored only the first of several captions; it stays so" in caplog.text
    assert "colour profiles" not in caplog.text  # which it knew
    info = read_dataset_info(tmp_path / "out")
    assert info.captioned == 5 and info.caption_stats is None and info.format_version == 1
    before = tree(tmp_path / "out")
    prepared(source, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_parts_of_two_versions_are_not_mixed(source, tmp_path):
    prepared(source, tmp_path / "out", captions="lines")
    report = tmp_path / "out" / "chunks" / "chunk-00004.json"
    content = json.loads(report.read_text())
    del content["images_by_captions"]
    report.write_text(json.dumps(content))
    with pytest.raises(UserError, match="some of its chunks are of an earlier version, which stored only the first"):
        prepared(source, tmp_path / "out", captions="lines")


@pytest.mark.parametrize(
    "content", [3, {}, {"images": {"x": 1}}, {"images": {"1": -1}}, {"images": {"1": 1}, "lengths": {"unit": "tokens"}}]
)
def test_statistics_that_are_none_are_refused(content):
    with pytest.raises(TypeError):
        CaptionStats.from_json(content)
