"""make grid's icon sets: given as a folder, or fetched with npm, whole or not at all."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import stat
import tarfile
from pathlib import Path

import pytest

from megaflux.common.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch" / "grid.py"


@pytest.fixture(scope="module")
def grid():
    spec = importlib.util.spec_from_file_location("launch_grid", LAUNCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_sets(grid, folder: Path) -> Path:
    for name in grid.SETS:
        (folder / name).mkdir(parents=True)
        for file in grid.FILES:
            (folder / name / file).write_text("{}")
    return folder


def npm(folder: Path, script: str, monkeypatch) -> None:
    """A program of that name is the only one in PATH, beside the shell's."""
    folder.mkdir(exist_ok=True)
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_a_given_folder_is_taken_as_it_is_or_refused_by_what_it_lacks(grid, tmp_path):
    given = make_sets(grid, tmp_path / "given")
    assert grid.icon_sets(str(given), tmp_path / "unused") == given and not (tmp_path / "unused").exists()
    (given / "noto" / "info.json").unlink()
    with pytest.raises(UserError, match=r"no noto/info.json; GRID_SETS .* SET/icons.json"):
        grid.icon_sets(str(given), tmp_path / "unused")


def test_without_npm_it_says_what_to_do(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="with npm, which is not here; .* GRID_SETS=DIR"):
        grid.icon_sets(None, tmp_path / "sets")
    assert not (tmp_path / "sets" / "openmoji").exists()


def test_a_set_is_fetched_whole_or_not_at_all_and_once(grid, tmp_path, monkeypatch):
    packed = tmp_path / "packed.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        for file in (*grid.FILES, "index.js"):
            data = json.dumps({"file": file}).encode()
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    count = tmp_path / "count"
    npm(tmp_path / "bin", f'echo "$3" >> {count}; cp {packed} x.tgz; echo x.tgz', monkeypatch)
    sets = grid.icon_sets(None, tmp_path / "sets")
    assert sorted(path.name for path in sets.iterdir()) == sorted(grid.SETS)
    for name in grid.SETS:
        assert sorted(path.name for path in (sets / name).iterdir()) == sorted(grid.FILES)
        assert json.loads((sets / name / "info.json").read_text()) == {"file": "info.json"}
    asked = count.read_text().split()
    assert asked == [f"@iconify-json/{name}@{version}" for name, version in grid.SETS.items()]
    grid.icon_sets(None, tmp_path / "sets")
    assert count.read_text().split() == asked
    npm(tmp_path / "bin", "echo nothing like it >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match=r"npm pack @iconify-json/openmoji@[\d.]+ failed \(nothing like it\)"):
        grid.icon_sets(None, tmp_path / "others")
    assert not (tmp_path / "others" / "openmoji").exists()


def test_a_grid_of_other_contents_than_are_to_be_learned_is_refused(grid, tmp_path):
    part, whole = tmp_path / "part", tmp_path / "whole"
    for folder, names in ((part, 200), (whole, 1034)):
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps({"settings": {"source": {"names": names}}}))
    grid.check_contents(part, whole, 200)
    grid.check_contents(whole, whole, 2000)  # all there are
    for most in (199, 400):
        with pytest.raises(UserError, match=rf"holds 200 contents, not {most}; .* --most-contents 200"):
            grid.check_contents(part, whole, most)
