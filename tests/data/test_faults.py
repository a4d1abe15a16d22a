"""Bad data: all of it named before the first update; what goes bad later is replaced, named and counted."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import file_bytes, picture
from PIL import Image
from test_loader import all_keys, keys_of, prefixes_on, take

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, detect_world
from megaflux.data.buckets import make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.quarantine import stand_ins
from megaflux.data.storage import verdict
from megaflux.data.storage.dataset import DatasetInfo, write_dataset
from megaflux.data.storage.index import read_index
from megaflux.data.storage.shards import read_split
from megaflux.data.storage.verdict import VERDICT
from tests import forked
from tests.derived import write_bucket
from tests.training.runs import rank_environments

SEED = 3
BUCKETS = make_buckets(("1:1", "2:1"), 64)
COUNTS = {"1:1": 48, "2:1": 20}
BATCHES = 17  # of 4
NO_IMAGE = {  # key -> what its image column begins with; the rest is 0
    "1:1 02": b"",
    "1:1 30": b"<html>404</html>",
    "2:1 14": file_bytes(picture(14, (64, 32)))[:200],  # fails when it is loaded, not when it is opened
    "2:1 17": file_bytes(Image.new("RGB", (32, 64))),  # another bucket's size
}


def verify_shards(root, split, run=None):
    """Every problem of one split, found by one rank."""
    return list(map(str, verdict.verify_shards(root, [split], run, World(0, 1))))


@pytest.fixture(autouse=True)
def no_hang():
    def stop(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def opened(tmp_path):
    """build_loader with everything closed at the test's end, and nothing left in shared memory."""
    with contextlib.ExitStack() as stack:

        def build(path, **options):
            loader = build_loader(path, LoaderOptions(**{"batch_size": 4, "seed": SEED, **options}), detect_world())
            stack.callback(loader.close)
            return loader

        yield build
    assert not prefixes_on(tmp_path)


def write(root, images=None, counts=COUNTS, held_out=False):
    """A dataset of several shards in each bucket; `images`: those of some keys, instead of sound ones.

    All images have the length that sound ones have: streaming's order depends on what shards hold."""
    written, columns = {}, {}
    for bucket in BUCKETS:
        if count := counts.get(bucket.name):
            keys = [f"{bucket.name} {n:02}" for n in range(count)]
            samples = (
                {"key": key, "caption": "", "image": bad.ljust(len(image), b"\0") if bad is not None else image}
                for n, key in enumerate(keys)
                for bad, image in [((images or {}).get(key), sound(n, bucket))]
            )
            written[bucket.name], columns = write_bucket(root, "train", bucket, samples, shard_size=1 << 15)
    splits = {"train": written}
    if held_out:  # as much as there is to train on
        shutil.copytree(root / "train", root / "held_out")
        splits["held_out"] = written
    write_dataset(root, DatasetInfo(64, BUCKETS, splits, columns))
    return root


def sound(number, bucket):
    return file_bytes(picture(number, (bucket.width, bucket.height)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def without_images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("without"), NO_IMAGE)


def stored(root, bucket=0, split="train"):
    """The compressed files of a bucket, in order."""
    folder = root / split / BUCKETS[bucket].folder
    return [folder / shard["zip_data"]["basename"] for shard in read_index(folder, check_files=False)]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def names_all(problems, *parts):
    return len(problems) == len(parts) and all(any(part in problem for problem in problems) for part in parts)


# The verdict before the first update


def test_every_fault_is_named_at_once(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    assert verify_shards(root, "train") == []
    assert verify_shards(root, "held_out") == []  # without samples
    flipped, short, empty, missing, *_ = stored(root)
    other = stored(root, 1)[0]
    flip(flipped), truncate(short), empty.write_bytes(b""), missing.unlink(), flip(other)
    problems = verify_shards(root, "train")
    assert names_all(
        problems,
        f"{flipped}: damaged, its xxh64",
        f"{short}: {short.stat().st_size} bytes, the index",
        f"{empty}: 0 bytes, the index",
        f"{missing}: missing",
        f"{other}: damaged",
    ), problems
    assert verify_shards(root, "train") == problems  # only sound files are taken on trust
    (root / "train" / "2x1" / "index.json").unlink()
    assert any("2x1/index.json: missing" in problem for problem in verify_shards(root, "train"))
    (root / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json: missing"):
        verify_shards(root, "train")


def change_unnoticed(path):
    """Other content, with the size, time and inode of before."""
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_second_call_reads_nothing_and_a_changed_file_again(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    assert verify_shards(root, "train") == []
    kept = json.loads((root / VERDICT).read_text())
    paths = [path for bucket in (0, 1) for path in stored(root, bucket)]
    assert set(kept["files"]) == {str(path.relative_to(root)) for path in paths}
    for path in paths:
        change_unnoticed(path)
    assert verify_shards(root, "train") == []  # so none was read
    os.utime(paths[1])
    assert names_all(verify_shards(root, "train"), f"{paths[1]}: damaged")
    os.replace(shutil.copy2(paths[0], tmp_path / "new"), paths[0])  # the same time, another inode
    assert names_all(verify_shards(root, "train"), f"{paths[0]}: damaged", f"{paths[1]}: damaged")
    left = json.loads((root / VERDICT).read_text())["files"]
    assert set(kept["files"]) - set(left) == {str(path.relative_to(root)) for path in paths[:2]}
    flip(paths[0]), flip(paths[1])
    assert verify_shards(root, "train") == []
    (root / VERDICT).write_text('{"version": 1, "files": {"tr')
    assert len(verify_shards(root, "train")) == len(paths) - 2


def test_what_streaming_has_unpacked_is_read_too(dataset, tmp_path, opened):
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    loader = opened(root, verify=True)
    take(loader, BATCHES)
    loader.close()
    raw = stored(root)[2].with_suffix("")
    flip(raw)
    assert names_all(verify_shards(root, "train"), f"{raw}: damaged")
    raw.unlink()
    assert verify_shards(root, "train") == []
    assert str(raw.relative_to(root)) + '"' not in (root / VERDICT).read_text()


def test_a_folder_that_cannot_be_written(dataset, tmp_path, caplog):
    """The run's folder keeps the verdict, and for that dataset only."""
    root, run = Path(shutil.copytree(dataset, tmp_path / "copy")), tmp_path / "run"
    (root / VERDICT).mkdir()  # nobody can write a file there, not even root
    run.mkdir()
    assert verify_shards(root, "train") == []
    assert "the verdict on the shards is not kept" in caplog.text
    assert verify_shards(root, "train", run) == []
    other = Path(shutil.copytree(root, tmp_path / "other"))
    for path in (*stored(root), *stored(other)):
        change_unnoticed(path)
    assert verify_shards(root, "train", run) == []
    assert len(verify_shards(other, "train", run)) == len(stored(other))


def test_without_a_terminal_one_line_is_logged(dataset, tmp_path, caplog, capfd):
    root = Path(shutil.copytree(dataset, tmp_path / "copy"))
    caplog.set_level(logging.INFO)
    verify_shards(root, "train")
    (line,) = caplog.messages
    assert f"{root}/train: {len(stored(root)) + len(stored(root, 1))} files" in line
    os.utime(stored(root)[0])
    verify_shards(root, "train")
    verify_shards(root, "train")
    assert "1 files" in caplog.messages[1]
    assert "files unchanged" in caplog.messages[2]
    assert "%|" not in capfd.readouterr().err


def test_a_loader_that_verifies(tmp_path, opened):
    """Both splits, before anything else is looked at; all that is wrong in one error that no rank needs to add to."""
    root = write(tmp_path / "both", held_out=True)
    opened(root, verify=True).close()
    listed = json.loads((root / VERDICT).read_text())["files"]
    assert {name.split("/")[0] for name in listed} == {"train", "held_out"}
    flip(stored(root)[0]), stored(root, 1)[0].unlink(), flip(stored(root, 1, "held_out")[0])
    with pytest.raises(UserError) as caught:
        opened(root, verify=True)
    assert caught.value.agreed
    *found, last = str(caught.value).split("; ")
    assert names_all(
        [*found, last],
        f"{stored(root)[0]}: damaged",
        f"{stored(root, 1)[0]}: missing",
        f"{stored(root, 1, 'held_out')[0]}: damaged",
    )
    assert "\n" not in str(caught.value)


# Faults while training


def keys_in(root, bucket=0):
    """The keys of each shard of a bucket, in order."""
    keys = iter([sample["key"] for sample in read_split(root, "train", BUCKETS[bucket])])
    shards = read_index(root / "train" / BUCKETS[bucket].folder, check_files=False)
    return [list(itertools.islice(keys, shard["samples"])) for shard in shards]


def stand_in(key, good):
    """The key that stands in for another: the first good one of its bucket in the sequence of (seed, sample)."""
    bucket, number = key.split()
    first = 0 if bucket == "1:1" else COUNTS["1:1"]
    for candidate in stand_ins(SEED, first + int(number), first, COUNTS[bucket]):
        name = f"{bucket} {candidate - first:02}"
        if name in good:
            return name
    raise AssertionError(key)


def damage(root):
    """Three shards, three ways; the keys they held and why they are gone."""
    deleted, flipped, short = stored(root)[1], stored(root)[3], stored(root, 1)[0]
    deleted.unlink(), flip(flipped), truncate(short)
    return {deleted: "missing", flipped: "Checksum failure", short: "bytes, the index says"}


def go_bad(build, origin, path, start, count, **options):
    """A loader over a copy of `origin` that is damaged once the loader stands, and the batches it gives."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(origin, path, ignore=shutil.ignore_patterns("*.mds"))
    loader = build(path, **options)
    if start:
        loader.load_state_dict(start)
    reasons = damage(path)
    batches = take(loader, count)
    state = loader.state_dict()
    loader.close()
    return batches, state, reasons


def test_a_run_that_goes_on_replaces_what_was_damaged_before_it_started(dataset, tmp_path, opened, caplog):
    for name in ("before", "meanwhile"):
        shutil.copytree(dataset, tmp_path / name, ignore=shutil.ignore_patterns("*.mds"))
    damage(tmp_path / "before")
    with pytest.raises(UserError, match="missing"):
        opened(tmp_path / "before", verify=True)
    loader = opened(tmp_path / "before", verify=True, replace_damaged=True)
    assert "resuming with damaged data" in caplog.text
    meanwhile = opened(tmp_path / "meanwhile", verify=True)
    damage(tmp_path / "meanwhile")
    assert keys_of(take(loader, BATCHES)) == keys_of(take(meanwhile, BATCHES))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unpacked_shard_that_was_flipped_is_not_read_by_a_run_that_goes_on(dataset, tmp_path, opened, num_workers):
    """Of the right size, so that only its hash tells: nothing in streaming looks at that."""
    shutil.copytree(dataset, tmp_path / "x", ignore=shutil.ignore_patterns("*.mds"))
    take(opened(tmp_path / "x"), BATCHES)  # unpacks all
    unpacked = sorted((tmp_path / "x" / "train").rglob("*.mds"))[0]
    lost = set(keys_in(dataset, 0)[0])
    flip(unpacked)
    loader = opened(tmp_path / "x", verify=True, replace_damaged=True, num_workers=num_workers)
    batches = take(loader, BATCHES)
    assert not lost & {key for batch in batches for key in batch.keys}
    texts = [text for batch in batches for text in batch.replaced]
    assert len(texts) >= len(lost) and all("damaged, its xxh64 is not the one in the index" in text for text in texts)


@pytest.mark.parametrize("num_workers", [0, 1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_goes_bad_is_replaced(dataset, without_images, tmp_path, opened, num_workers):
    """Three bad shards and four bad samples: full epochs, each stand-in foretold, named, and the same on resuming."""
    sound_loader = opened(dataset)
    assert sound_loader.batches_per_epoch == BATCHES
    drawn = take(sound_loader, 2 * BATCHES)
    lost = {key for bucket, shards in ((0, (1, 3)), (1, (0,))) for n in shards for key in keys_in(dataset, bucket)[n]}
    assert not lost & set(NO_IMAGE)
    good = all_keys(dataset) - lost - set(NO_IMAGE)
    expected = [[key if key in good else stand_in(key, good) for key in batch.keys] for batch in drawn]

    batches, _, reasons = go_bad(opened, without_images, tmp_path / "x", None, 2 * BATCHES, num_workers=num_workers)
    assert keys_of(batches) == expected
    for batch, before in zip(batches, drawn, strict=True):
        assert batch.bucket == before.bucket
        gone = [(key, new) for key, new in zip(before.keys, batch.keys, strict=True) if key not in good]
        assert len(batch.replaced) == len(gone)
        for text, (_, new) in zip(batch.replaced, gone, strict=True):
            assert f"{new!r} stands in" in text
            assert text.startswith(f"train/{batch.bucket.folder}/shard.")
            assert "\n" not in text
    texts = [text for batch in batches for text in batch.replaced]
    for path, reason in reasons.items():
        name = f"train/{path.parent.name}/{path.name.removesuffix('.zstd')} sample "
        whys = {text.partition("the shard is bad: ")[2].partition(";")[0] for text in texts if text.startswith(name)}
        assert len(whys) == 1
        assert reason in whys.pop()
    assert any("cannot identify image" in text for text in texts)
    assert any("an image of 32x64 in the bucket 2:1" in text for text in texts)

    replaced = [batch.replaced for batch in batches]
    again, state, _ = go_bad(opened, without_images, tmp_path / "x", None, 6, num_workers=num_workers)
    rest, _, _ = go_bad(opened, without_images, tmp_path / "x", state, 2 * BATCHES - 6, num_workers=num_workers)
    assert keys_of(again + rest) == expected
    assert [batch.replaced for batch in again + rest] == replaced
    for one, two in zip(batches, again + rest, strict=True):
        assert torch.equal(one.pixel_values, two.pixel_values)


def test_the_number_of_workers_changes_no_replacement(without_images, tmp_path, opened):
    found = [
        [(b.keys, b.replaced) for b in go_bad(opened, without_images, tmp_path / "x", None, BATCHES, num_workers=n)[0]]
        for n in (0, 2)
    ]
    assert found[0] == found[1]


def test_sound_data_replace_nothing(dataset, opened):
    assert not any(batch.replaced for batch in take(opened(dataset, num_workers=2), BATCHES))


def test_an_unpacked_shard_that_is_cut_short(dataset, tmp_path, opened):
    """Reading beyond a file's end gives less and no error: the key, which is stored last, would be cut."""
    root = Path(shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds")))
    batches = iter(opened(root))
    before = list(itertools.islice(batches, BATCHES))
    assert not any(batch.replaced for batch in before)
    raw = stored(root)[0].with_suffix("")
    os.truncate(raw, raw.stat().st_size - 1)
    after = list(itertools.islice(batches, BATCHES))
    gone = set(keys_in(dataset)[0])
    assert not gone & {key for batch in after for key in batch.keys}
    texts = [text for batch in after for text in batch.replaced]
    assert len(texts) >= len(gone)
    assert all(f"{raw.stat().st_size} bytes unpacked, the index says" in text for text in texts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_when_nothing_can_stand_in(tmp_path, opened, num_workers):
    root = write(tmp_path / "bad", {f"2:1 {n:02}": b"no picture" for n in range(20)})
    loader = opened(root, num_workers=num_workers)
    with pytest.raises(UserError, match=r"ended after \d+ of 17 .*of 64 other samples of train/2x1 none can be read"):
        take(loader, BATCHES)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many(tmp_path, opened, num_workers):
    counts = {"1:1": 300}
    root = write(tmp_path / "bad", {f"1:1 {n:02}": b"no picture" for n in range(0, 300, 2)}, counts)
    with pytest.raises(UserError, match=r"epoch 0: 1\d\d of \d+ samples .* 1\.00%: train/1x1/shard.*data\.verify"):
        take(opened(root, num_workers=num_workers), 75)
    batches = take(opened(root, num_workers=num_workers, max_replaced=0.6), 150)
    assert sum(len(batch.replaced) for batch in batches) == 2 * 150


def test_a_cache_fetches_again_what_is_damaged_in_it(dataset, tmp_path, opened):
    """A bad file in the cache is no loss; one that is bad in the remote is, and does not stay in the cache."""
    remote, cache = (
        shutil.copytree(dataset, tmp_path / "remote", ignore=shutil.ignore_patterns("*.mds")),
        tmp_path / "c",
    )
    loader = opened(cache, remote=str(remote))
    local, absent = stored(cache)[0], stored(remote)[1]
    shutil.copy(stored(remote)[0], local), flip(local), flip(absent)
    batches = take(loader, BATCHES)
    lost = [key for batch in batches for key in batch.replaced]
    assert len(lost) >= len(keys_in(dataset)[1])
    assert all("1x1/shard.00001" in text for text in lost)
    raw = cache / absent.relative_to(remote)
    assert not raw.exists()
    assert not raw.with_suffix("").exists()
    assert local.with_suffix("").exists()


NO_HANDLES = """
import itertools, resource, sys
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.common.errors import UserError
loader = build_loader(sys.argv[1], LoaderOptions(batch_size=4, seed=3), detect_world())
batches = iter(loader)
next(batches)
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
try:
    replaced = [text for batch in itertools.islice(batches, 16) for text in batch.replaced]
    print("REPLACED", replaced)
except UserError as error:
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    print("ENDED", error)
"""


def test_what_the_machine_lacks_is_not_the_datas_fault(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds"))
    command = [sys.executable, "-c", NO_HANDLES, str(root)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=80).stdout
    assert output.startswith("ENDED epoch 0 ended after"), output
    assert "Too many open files" in output


TWO_RANKS = """
import itertools, json, sys
import torch.distributed as dist
dist.init_process_group("gloo")
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_faults import damage
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.common.errors import UserError
rank, root, out = dist.get_rank(), Path(sys.argv[1]), Path(sys.argv[2])
loader = build_loader(root, LoaderOptions(batch_size=2, seed=3, num_workers=2, verify=True), detect_world())
if rank == 0:
    damage(root)
dist.barrier()
batches = [(batch.keys, batch.replaced) for batch in itertools.islice(iter(loader), 34)]
loader.close()
try:
    build_loader(root, LoaderOptions(batch_size=2, seed=3, verify=True), detect_world())
except UserError as error:
    (out / f"{rank}.json").write_text(json.dumps([batches, str(error), error.agreed]))
dist.barrier()
"""


def test_two_ranks(without_images, tmp_path, opened):
    """They replace what one rank of twice the batch does, and both learn what the one that reads has found."""
    alone, _, _ = go_bad(opened, without_images, tmp_path / "x", None, 2 * BATCHES)
    root = shutil.copytree(without_images, tmp_path / "y", ignore=shutil.ignore_patterns("*.mds"))
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    command = [str(tmp_path / "ranks.py"), str(root), str(tmp_path), str(Path(__file__).parent)]
    done = forked.run_ranks(command, rank_environments(2), timeout=80)
    assert done.returncode == 0, done.stderr
    (first, found, agreed), (second, *same) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert same == [found, agreed]
    assert agreed
    assert all(f"{path}: " in found for path in (stored(root)[1], stored(root)[3], stored(root, 1)[0]))
    for batch, (keys, replaced), (others, replaced_there) in zip(alone, first, second, strict=True):
        assert (keys, others) == (batch.keys[0::2], batch.keys[1::2])
        assert sorted(replaced + replaced_there) == sorted(batch.replaced)
