"""Stored samples -> one micro-batch of tensors, and a drawn batch -> smaller ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megaflux.data.buckets import Bucket
from megaflux.data.reference_size import COLUMN
from megaflux.data.references import ReferencePicture
from megaflux.data.tensors import from_array


@dataclass(frozen=True)
class Batch:
    """Samples of one rank, all of one bucket. B: samples. Tensors that the shards do not hold are None."""

    keys: list[str]
    captions: list[str]
    bucket: Bucket
    pixel_values: torch.Tensor | None  # uint8 (B, 3, H, W), RGB
    latents: torch.Tensor | None  # (B, C, h, w), of cached shards
    hidden_states: torch.Tensor | None  # (B, S, D), the frozen trunk's output, of cached shards
    references: list[list[ReferencePicture]] | None = None  # of each sample, none or more; None: the data have none
    replaced: list[str] = field(default_factory=list)  # a line for each sample that replaces a damaged one

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; copies from pinned memory do not wait."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            pixel_values=moved(self.pixel_values),
            latents=moved(self.latents),
            hidden_states=moved(self.hidden_states),
            references=self.references and [[_to(one, device) for one in each] for each in self.references],
        )

    def rows(self, start: int, end: int) -> Batch:
        """Samples start .. end - 1, as views. `replaced`, which names no rows, stays with the first of them."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:end]

        return replace(
            self,
            keys=self.keys[start:end],
            captions=self.captions[start:end],
            pixel_values=cut(self.pixel_values),
            latents=cut(self.latents),
            hidden_states=cut(self.hidden_states),
            references=self.references and self.references[start:end],
            replaced=[] if start else self.replaced,
        )


def _to(reference: ReferencePicture, device: torch.device) -> ReferencePicture:
    return reference._replace(pixel_values=reference.pixel_values.to(device, non_blocking=True))


def pieces(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same samples in the same order, `size` at a time; a drawn batch is a multiple of it.

    How many samples are drawn together is fixed when a run begins (ranks x train.drawn_per_rank, of one bucket), so that
    a run on other ranks sees the same global batches. Fewer may be computed together."""
    for batch in batches:
        if len(batch.keys) == size:
            yield batch
            continue
        for start in range(0, len(batch.keys), size):
            yield batch.rows(start, start + size)


def collate(samples: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> dict[str, Any]:
    """Samples of one bucket -> the fields of a Batch, with the bucket's number in place of the bucket.

    samples: as BucketDataset yields them (megaflux.data.reading.quarantine). If one of them is a "failure", that is the
    only field. Raises RuntimeError for samples of different buckets.
    """
    for sample in samples:
        if "failure" in sample:
            return {"failure": sample["failure"]}
    numbers = {sample["bucket"] for sample in samples}
    if len(numbers) != 1:
        raise RuntimeError(f"a batch over several buckets: {[str(buckets[n]) for n in sorted(numbers)]}")
    fields: dict[str, Any] = {
        "keys": [sample["key"] for sample in samples],
        "captions": [sample["caption"] for sample in samples],
        "bucket": numbers.pop(),
        "pixel_values": None,
        "replaced": [sample["replaced"] for sample in samples if "replaced" in sample],
    }
    if COLUMN in samples[0]:
        fields["references"] = [sample[COLUMN] for sample in samples]
    if "pixel_values" in samples[0]:
        fields["pixel_values"] = torch.stack([sample["pixel_values"] for sample in samples])
    for name in ("latents", "hidden_states"):
        present = name in samples[0]
        fields[name] = torch.stack([from_array(sample[name]) for sample in samples]) if present else None
    return fields
