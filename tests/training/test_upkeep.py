"""What follows an update: which validations are there, also after a line that a kill tore."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.training.monitor import Monitor
from megaflux.training.upkeep import left_by_earlier_process, shown_after, validated_updates

ALONE = World(0, 1, torch.device("cpu"))


def configured(folder: Path, every: int = 4, panel_every: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        run=SimpleNamespace(dir=str(folder)),
        validation=SimpleNamespace(every=every, panel_every=panel_every),
        stage_ends=lambda: [10],
    )


@pytest.mark.parametrize(
    ("update", "shown"), [(3, (False, False)), (4, (True, False)), (6, (False, True)), (10, (True, True))]
)
def test_what_is_shown_after_an_update(tmp_path, update, shown):
    assert shown_after(configured(tmp_path, 4, 6), update) == shown


def test_a_torn_validation_is_made_again_and_kept(tmp_path):
    """Its line must not swallow the one that is written again, or every later start would owe it anew."""
    (tmp_path / "validation.jsonl").write_bytes(b'{"update": 4, "loss": 1.0}\n{"update": 8, "lo')
    assert validated_updates(tmp_path) == {4}
    assert left_by_earlier_process(configured(tmp_path), 8, ALONE) == (True, False)
    monitor = Monitor.__new__(Monitor)
    monitor.world, monitor.folder, monitor.warned = ALONE, tmp_path, False
    monitor.write_line("validation.jsonl", {"update": 8, "loss": 0.5})
    assert validated_updates(tmp_path) == {4, 8}
    assert left_by_earlier_process(configured(tmp_path), 8, ALONE) == (False, False)


def test_a_panel_is_owed_until_its_picture_is_there(tmp_path):
    config = configured(tmp_path, 0, 5)
    assert left_by_earlier_process(config, 5, ALONE) == (False, True)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "update-0000005.png").touch()
    assert left_by_earlier_process(config, 5, ALONE) == (False, False)
