"""How a dataset is read for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PREFETCH_FACTOR = 2  # batches that each loading process has waiting, unless told otherwise


@dataclass(frozen=True)
class LoaderOptions:
    """How build_loader reads a dataset. The order of the samples depends on batch_size x ranks, seed, split and
    shuffle only."""

    batch_size: int
    """Samples that each rank draws at a time, all of one bucket."""
    seed: int
    """Of the order."""
    num_workers: int = 0
    """Loading processes per rank. 0: load in the rank's own process."""
    remote: str | None = None
    """Where the dataset is: a path or URL that mosaicml-streaming reads (s3://, gs://, ...). The dataset's folder is
    then the local cache. None: the dataset is local."""
    cache_limit: str | None = None
    """Size of that cache, as "100gb". None: no limit."""
    split: str = "train"
    """train or held_out."""
    prefetch_factor: int = PREFETCH_FACTOR
    """Batches that each loading process loads ahead."""
    shuffle: bool = True
    """False: the stored order."""
    verify: bool = False
    """Compare every local shard of this split and the held-out one with its hash first (megaflux.data.storage.verdict)."""
    run_folder: str | Path | None = None
    """Keeps the outcome of that where the dataset's folder is read-only. None: it is then not kept."""
    max_replaced: float = 0.01
    """Share of an epoch's samples that may turn out damaged and be replaced (megaflux.data.reading.quarantine)."""
    replace_damaged: bool = False
    """Warn of local shards that are missing or damaged at the start and replace their samples, for a resumed run. False:
    refuse them with a UserError."""
    references: bool = True
    """Decode the samples' reference pictures. False: leave them out."""
    computed_from: str | Path | None = None
    """The dataset from which this one was computed sample by sample (megaflux.training.cache). Both are drawn in the same
    order, and a position in one is a position in the other. Only its indexes are read."""
