"""A batch as it was drawn -> the micro-batches that a rank can compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch

from megaflux.data.batches import Batch


def pieces(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, `size` at a time; a drawn batch is a multiple of it.

    What is drawn together is fixed when a run begins (ranks x micro-batch of one bucket), so that a run on other ranks
    sees the same global batches; what is computed together may be less."""
    for batch in batches:
        if len(batch.keys) == size:
            yield batch
            continue
        for start in range(0, len(batch.keys), size):
            part = {}
            for field in fields(batch):
                value = getattr(batch, field.name)
                if isinstance(value, torch.Tensor) or field.name in ("keys", "captions"):
                    part[field.name] = value[start : start + size]
            yield replace(batch, **part, **({"replaced": []} if start and hasattr(batch, "replaced") else {}))


def global_micro_batch(state: dict[str, Any]) -> int:
    """Samples drawn together over all ranks, of a loader's saved position."""
    return state["micro_batch_size"] * state["world_size"]


def position_for(state: dict[str, Any], world_size: int) -> dict[str, Any]:
    """A loader's saved position as a loader on `world_size` ranks would have saved it: the order of the samples is that
    of the global micro-batches, whoever takes them."""
    return state | {"micro_batch_size": global_micro_batch(state) // world_size, "world_size": world_size}
