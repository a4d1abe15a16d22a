"""What a manifest must hold for its checkpoint to be used, and what is done with the remains of a save."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflux.common.errors import UserError
from megaflux.training.checkpoint import manifest
from tests.training.test_manifest import CONTENT, newest, save, write_files

OLD = Path(__file__).parent.parent / "old_runs/a9a4819/small/checkpoints/update-0000002"
ENTRY = {"bytes": 1, "sha256": "0" * 64}


def written(folder: Path, sealed: bool = True, **changes) -> Path:
    """A checkpoint's folder of nothing but a manifest."""
    content = CONTENT | {"files": {}} | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "manifest.json").write_text(json.dumps(manifest.sealed(content) if sealed else content))
    return folder


def test_a_checkpoint_of_an_earlier_version_is_whole():
    """Its seal and hashes were made by that version: a change of how they are made would discard every run's updates."""
    assert manifest.listed(OLD.parents[1]) == {2: OLD}
    content = manifest.verify(OLD)
    assert (content["format"], content["update"], len(content["files"])) == (2, 2, 6)


def test_formats_before_the_seal_and_after_this_code(tmp_path):
    assert manifest.read(written(tmp_path, sealed=False, format=1))["format"] == 1
    for known in range(1, manifest.FORMAT + 1):
        assert manifest.read(written(tmp_path, format=known))["format"] == known
    for unsealed in (2, manifest.FORMAT, manifest.FORMAT + 1):
        with pytest.raises(UserError, match="does not match its own hash"):
            manifest.read(written(tmp_path, sealed=False, format=unsealed))
    with pytest.raises(manifest.NewerFormat, match="update megaflux"):
        manifest.read(written(tmp_path, format=manifest.FORMAT + 1))
    with pytest.raises(UserError, match="format 0 does not exist"):
        manifest.read(written(tmp_path, format=0))


@pytest.mark.parametrize(
    "changes",
    [
        *({key: ...} for key in sorted(manifest.KEYS - {"format"})),
        *({key: "1"} for key in ("update", "stage", "world_size")),
        *({key: [1]} for key in ("data", "identity", "deepspeed")),
        {"files": {"a": ENTRY | {"bytes": "1"}}},
        {"files": {"a": ENTRY | {"sha256": "0" * 62}}},
        {"files": {"a": ENTRY | {"sha256": "x" * 64}}},
        {"files": {"a": {"bytes": 1}}},
        {"files": ["a"]},
    ],
    ids=str,
)
def test_a_manifest_that_lacks_something_is_refused(tmp_path, changes):
    manifest.read(written(tmp_path))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        manifest.read(written(tmp_path, **changes))


def test_what_is_not_asked_for_is_not_read(tmp_path):
    """Generation reads weights, and a copied run may lack the optimizer's shards, its greater part."""
    save(tmp_path, 1)
    path = manifest.folder(tmp_path) / manifest.name_of(1)
    shutil.rmtree(path / "deepspeed")
    assert manifest.verify(path, only={"weights.safetensors"})["update"] == 1
    with pytest.raises(UserError, match="deepspeed/a_optim_states.pt: missing"):
        manifest.verify(path)
    (path / "weights.safetensors").write_bytes(bytes((path / "weights.safetensors").stat().st_size))
    with pytest.raises(UserError, match="weights.safetensors: damaged .*SHA-256"):
        manifest.verify(path, only={"weights.safetensors"})


@pytest.mark.parametrize("name", ["forged.pt", "deepspeed/forged.pt"])
def test_a_pickle_that_no_save_wrote_is_refused(tmp_path, name):
    save(tmp_path, 1)
    (manifest.folder(tmp_path) / manifest.name_of(1) / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: not in the manifest"):
        manifest.verify(manifest.folder(tmp_path) / manifest.name_of(1))


def test_what_others_are_writing_or_hold_open_is_no_file_of_a_checkpoint(tmp_path):
    write_files(tmp_path, 0)
    for name in ("manifest.json", ".nfs0001", "deepspeed/.nfs0002", "deepspeed/.weights.tmp"):
        (tmp_path / name).write_bytes(b"x")
    names = ["deepspeed/a_optim_states.pt", "deepspeed/b_optim_states.pt", "rng-rank0000.pt", "weights.safetensors"]
    assert [str(file.relative_to(tmp_path)) for file in manifest.files_in(tmp_path)] == names
    assert list(manifest.inventory(tmp_path)) == names
    assert list(manifest.inventory(tmp_path, [tmp_path / names[2]])) == names[2:3]  # a rank's own


def test_every_remains_of_a_save_is_put_right_and_said(tmp_path):
    """Saves of several updates cut short, as after starts that each ended early: one whole but for its name, the others not."""
    for update in (1, 2, 3):
        save(tmp_path, update, keep=9)
    root = manifest.folder(tmp_path)
    for update in (2, 3):
        (root / manifest.name_of(update)).rename(manifest.partial_of(tmp_path, update))
    (manifest.partial_of(tmp_path, 3) / "weights.safetensors").unlink()
    shutil.copytree(
        root / manifest.name_of(1), manifest.partial_of(tmp_path, 1)
    )  # whole, and there is one of that name
    for leftover in (".update-0000007.old", ".update-0000008.deleting"):
        (root / leftover).mkdir()
    (root / "update-0000009.bad").mkdir()
    said: list[str] = []
    manifest.recover(tmp_path, said.append)
    assert {path.name for path in root.iterdir()} == {"update-0000001", "update-0000002", "update-0000009.bad"}
    partials = [f"{manifest.partial_of(tmp_path, update)}: a save that was cut short; deleted" for update in (1, 3)]
    whole = f"{root / 'update-0000002'}: was complete but not renamed yet; renamed"
    assert said == [partials[0], whole, partials[1]]
    manifest.recover(tmp_path / "no run", said.append)
    assert len(said) == 3 and manifest.listed(tmp_path / "no run") == {}


def test_a_save_takes_nothing_over_from_one_that_failed(tmp_path):
    partial = manifest.partial_of(tmp_path, 1)
    partial.mkdir(parents=True)
    (partial / "deepspeed-of-before.pt").write_bytes(b"x")
    save(tmp_path, 1)
    assert "deepspeed-of-before.pt" not in manifest.verify(manifest.folder(tmp_path) / manifest.name_of(1))["files"]
    save(tmp_path, 1)  # nor does the one of its name stay beside it
    assert [path.name for path in manifest.folder(tmp_path).iterdir()] == ["update-0000001"]


def test_files_that_cannot_be_deleted_yet_stop_no_run(tmp_path, monkeypatch):
    """NFS keeps files that some process has open, under names that cannot be deleted."""
    for update in (1, 2, 3):
        save(tmp_path, update, keep=9)
    root = manifest.folder(tmp_path)
    for leftover in (manifest.partial_of(tmp_path, 7).name, ".update-0000008.old", ".update-0000009.deleting"):
        shutil.copytree(root / manifest.name_of(1), root / leftover)
        (root / leftover / "manifest.json").unlink()
    (root / manifest.name_of(3) / "weights.safetensors").write_bytes(b"damaged")
    shutil.copytree(root / manifest.name_of(3), root / ".update-0000002.old")
    save(tmp_path, 2, keep=9)  # over one of its name, where another was put aside before

    def refuse(*args, **kwargs):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "unlink", refuse)
    assert newest(tmp_path) == 2
    save(tmp_path, 3, keep=1)  # over the damaged one, and the other two are to go
    assert newest(tmp_path) == 3 and list(manifest.listed(tmp_path)) == [3]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        json_values.map(lambda v: json.dumps(v).encode()),
        st.tuples(st.sampled_from(sorted(manifest.KEYS)), json_values).map(
            lambda change: json.dumps(manifest.sealed(CONTENT | {"files": {}} | {change[0]: change[1]})).encode()
        ),
        st.tuples(st.text(max_size=12), json_values).map(
            lambda entry: json.dumps(manifest.sealed(CONTENT | {"files": {entry[0]: entry[1]}})).encode()
        ),
    )
)
def test_no_manifest_whatsoever_raises_anything_but_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("m")
    (folder / "manifest.json").write_bytes(data)
    try:
        manifest.verify(folder)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "deepspeed/../../x"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    entry = {"bytes": 0, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.sealed(CONTENT | {"files": {name: entry}})))
    with pytest.raises(UserError, match="lies outside the checkpoint"):
        manifest.verify(tmp_path)
