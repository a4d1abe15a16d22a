"""Read ZeRO-2's optimizer shards by parameter name, to resume on another number of ranks.

Each rank's file holds, per parameter group, a slice of the flattened fp32 masters and of Adam's two moments, and where each
parameter lies in it (`param_slice_mappings`). A parameter at a boundary is split between two files. Files are memory-mapped:
a rank reads each parameter once, and the ranks of a machine share its page cache.

They are loaded without `weights_only`, as DeepSpeed stores its own classes in them; `resume.resolve` has compared every
file with the manifest's SHA-256 before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.training.engine import MOMENTS, Carried


class ByName(Mapping[str, dict[str, Tensor]]):
    """parameter name -> {"master", "exp_avg", "exp_avg_sq"}: float32 tensors, joined from the shards on access."""

    def __init__(self, shards: list[dict[str, Any]], shapes: Mapping[str, tuple[int, ...]]):
        self._shards, self._shapes = shards, shapes
        self._group = {
            name: i for shard in shards for i, group in enumerate(shard["param_slice_mappings"]) for name in group
        }

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        group, found = self._group[name], {}
        for key in ("master", *MOMENTS):
            parts = []
            for shard in self._shards:  # in rank order, which is the order in the flat buffer
                place = shard["param_slice_mappings"][group].get(name)
                if place is not None:
                    parts.append(_flat(shard, group, key)[place.start : place.start + place.numel])
            found[key] = torch.cat(parts).float().view(self._shapes[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def read(folder: Path, world_size: int, shapes: Mapping[str, tuple[int, ...]]) -> Carried:
    """The optimizer state of a checkpoint saved by `world_size` ranks, for an engine of the same stage.

    folder: DeepSpeed's part of the checkpoint. shapes: shape of each parameter that trains. Raises UserError if a parameter
    is missing or incomplete.
    """
    shards = optimizer_shards(folder, world_size)
    tensors = ByName(shards, shapes)
    for name, shape in shapes.items():
        have = sum(
            shard["param_slice_mappings"][tensors._group[name]][name].numel
            for shard in shards
            if name in tensors and name in shard["param_slice_mappings"][tensors._group[name]]
        )
        if have != torch.Size(shape).numel():
            raise UserError(f"{folder}: {name} has {have} of {torch.Size(shape).numel()} values; do not use it")
    inner = shards[0]["base_optimizer_state"]
    steps = {
        group["first_stage"]: inner["state"][i]["step"].clone()
        for i, group in enumerate(inner["param_groups"])
        if i in inner["state"]
    }
    return Carried(tensors if steps else {}, steps)


def optimizer_shards(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """DeepSpeed's optimizer states in a checkpoint, one per rank, memory-mapped. Raises UserError if one is missing."""
    files = []
    for rank in range(world_size):
        file = next(iter(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")), None)
        if file is None:
            raise UserError(f"{folder}: the optimizer shard of rank {rank} is missing")
        files.append(file)
    return [
        torch.load(file, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"] for file in files
    ]


def _flat(shard: dict[str, Any], group: int, key: str) -> Tensor:
    if key == "master":
        return shard["single_partition_of_fp32_groups"][group]
    return shard["base_optimizer_state"]["state"][group][key]
