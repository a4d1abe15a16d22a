"""The weights of a checkpoint: each parameter in one file, divided among ranks; both layouts are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megaflux import export, runs
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.training.checkpoint import manifest
from megaflux.training.checkpoint.weights import any_float32, file_name, files_of, shares, write_share
from megaflux.training.checkpoint.write import writer_of


def divide(run: Path, ranks: int) -> None:
    """Write the weights of a run's newest checkpoint again, as this number of ranks saves them."""
    folder = list(manifest.listed(run).values())[-1]
    weights = load_file(folder / file_name(0, 1))
    (folder / file_name(0, 1)).unlink()
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    for rank, names in enumerate(shares(sizes, ranks)):
        write_share({n: weights[n] for n in names}, folder, World(rank, ranks, torch.device("cpu")))
    content = manifest.read(folder) | {"files": manifest.inventory(folder), "world_size": ranks}
    (folder / manifest.MANIFEST).write_text(json.dumps(manifest.sealed(content)))


def copied(run: Path, tmp_path: Path, ranks: int) -> Path:
    shutil.copytree(run, tmp_path / "run")
    divide(tmp_path / "run", ranks)
    return tmp_path / "run"


def parameters(models) -> dict[str, torch.Tensor]:
    return dict(models.trainable.named_parameters())


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 10**9), max_size=60), st.integers(1, 9))
def test_each_parameter_goes_to_one_rank_and_none_has_much_more_than_another(sizes, ranks):
    divided = shares(sizes, ranks)
    assert sorted(name for names in divided for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in divided]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
    assert shares(dict(reversed(sizes.items())), ranks) == divided  # whatever order a rank finds them in


@pytest.mark.parametrize("ranks", [2, 3])
def test_divided_weights_are_loaded_and_exported_as_those_in_one_file(run_folder, tmp_path, ranks):
    other = copied(run_folder, tmp_path, ranks)
    want, have = (parameters(runs.load(runs.find(run))) for run in (run_folder, other))
    assert want.keys() == have.keys() and all(torch.equal(want[name], have[name]) for name in want)
    assert runs.find(other).source["weights_sha256"] != runs.find(run_folder).source["weights_sha256"]
    assert len(runs.find(other).source["weights_sha256"]) == 64
    export.export(runs.find(other), tmp_path / "exported")
    (made,) = (tmp_path / "exported").glob("connector/*.safetensors")
    assert torch.equal(load_file(made)["weight"], want["connector.weight"])


def test_more_ranks_than_parameters_is_no_problem(tmp_path):
    for rank, names in enumerate(shares({"a": 2}, 3)):
        write_share({n: torch.ones(2) for n in names}, tmp_path, World(rank, 3, torch.device("cpu")))
    content = {"files": manifest.inventory(tmp_path)}
    assert files_of(content, tmp_path) == [file_name(rank, 3) for rank in range(3)]
    assert any_float32(content, tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        [],
        ["weights-00000-of-00002.safetensors"],
        ["weights-00001-of-00002.safetensors"],
        ["weights.safetensors", "weights-00000-of-00001.safetensors"],
    ],
)
def test_a_manifest_that_does_not_name_all_weights_is_refused(files, tmp_path):
    with pytest.raises(UserError, match="not complete"):
        files_of({"files": dict.fromkeys(files, {})}, tmp_path)


def test_a_damaged_part_of_the_weights_is_named(run_folder, tmp_path):
    run = copied(run_folder, tmp_path, 2)
    part = list(manifest.listed(run).values())[-1] / file_name(1, 2)
    kept = load_file(part)
    part.write_bytes(part.read_bytes()[:-1] + b"\x77")
    with pytest.raises(UserError, match="weights-00001-of-00002.safetensors: damaged"):
        runs.find(run)
    save_file({"strange": torch.ones(1)} | kept, part)
    content = manifest.read(part.parent) | {"files": manifest.inventory(part.parent)}
    (part.parent / manifest.MANIFEST).write_text(json.dumps(manifest.sealed(content)))
    with pytest.raises(UserError, match="weights-00001-of-00002.safetensors: strange does not fit"):
        runs.load(runs.find(run))


def test_a_file_that_another_rank_is_writing_is_nobody_s(tmp_path):
    """safetensors writes under a hidden name first; a rank that synced it would find it gone."""
    write_share({"a": torch.ones(2)}, tmp_path, World(0, 2, torch.device("cpu")))
    (tmp_path / ".tmpaxG4l0").write_bytes(b"half")
    assert [file.name for file in manifest.files_in(tmp_path)] == [file_name(0, 2)]


def test_each_rank_syncs_and_hashes_what_it_wrote():
    written = {
        "weights-00003-of-00008.safetensors": 3,
        "rng-rank0003.pt": 3,
        "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": 3,
        "zero_pp_rank_11_mp_rank_00_model_states.pt": 11,
        "weights.safetensors": 0,
        "mp_rank_00_model_states.pt": 0,
    }
    assert {name: writer_of(name) for name in written} == written
