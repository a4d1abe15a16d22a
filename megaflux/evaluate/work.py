"""What there is to make and to measure for one checkpoint, in batches whose results are files of OUT.

A batch is the same whatever the number of ranks and however often the command was killed, so the figures do not depend on them. Its
result is written when it is finished; batches whose files are there are not computed again.

    OUT/CHECKPOINT/losses/000.json          the losses of a batch
    OUT/CHECKPOINT/pictures/KIND/SEED/KEY.png   each picture that was made
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image
from torch import Tensor

from megaflux.common.errors import UserError, one_line
from megaflux.common.files import write_json
from megaflux.data.tensors import from_picture
from megaflux.evaluate.conditions import EMPTY, Conditions, Given, other_styles
from megaflux.evaluate.making import Maker
from megaflux.evaluate.samples import HeldOut, Sample
from megaflux.training.pictures import save_picture

MADE, EMPTY_MADE, OTHER_STYLE, ROUND_TRIP, WORDS = "made", "empty", "other_style", "vae", "words"
KINDS = {
    MADE: "made from the sample's own condition",
    EMPTY_MADE: "made from the empty condition",
    OTHER_STYLE: "made from its words and the reference of another style",
    ROUND_TRIP: "the true picture through the VAE",
    WORDS: "made from its words alone",
}


@dataclass(frozen=True)
class Asked:
    """A picture to make."""

    kind: str
    """One of KINDS, or sheet."""
    sample: Sample
    seed: int
    given: Given
    """What it is made from; nothing counts for the VAE's round trip."""

    def file(self, root: Path) -> Path:
        """Where it is kept in the checkpoint's folder."""
        name = quote(self.sample.key, safe="")
        if len(name) > 200:  # file systems take 255 bytes
            name = hashlib.sha256(self.sample.key.encode()).hexdigest()
        return root / "pictures" / self.kind / str(self.seed) / f"{name}.png"


def asked(held_out: HeldOut, conditions: Conditions, seeds: Sequence[int], words: bool) -> list[Asked]:
    """Every picture of an evaluation but the sheets'. seeds: the first one is used for all, the others for the first samples only.
    words: whether pictures are made from words alone as well."""
    samples, first = held_out.samples, held_out.samples[: held_out.first]
    found = [Asked(MADE, one, seeds[0], conditions.matched(one)) for one in samples]
    found += [Asked(MADE, one, seed, conditions.matched(one)) for seed in seeds[1:] for one in first]
    if words:
        found += [Asked(WORDS, one, seeds[0], Given((), one.caption)) for one in first if one.caption]
    in_grid = samples if held_out.grid is not None else first
    found += [Asked(EMPTY_MADE, one, seeds[0], EMPTY) for one in in_grid]
    if held_out.grid is not None:
        found += [Asked(ROUND_TRIP, one, seeds[0], EMPTY) for one in samples]
        for one, other in zip(samples, other_styles(samples), strict=True):
            if other is not None and conditions.kind != "text":
                theirs = samples[other].references[: conditions.references]
                given = Given(theirs, conditions.matched(one).words)
                found.append(Asked(OTHER_STYLE, one, seeds[0], given))
    return found


def in_batches(pictures: Sequence[Asked], maker: Maker, size: int) -> list[list[Asked]]:
    """Pictures of one kind, shape and number of tokens together, at most `size`, in an order of their own alone."""
    groups: dict[tuple[str, str, int], list[Asked]] = {}
    for one in pictures:
        length = 0 if one.kind == ROUND_TRIP else maker.length(one.given)
        groups.setdefault((one.kind, one.sample.bucket.name, length), []).append(one)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def is_made(batch: Sequence[Asked], root: Path) -> bool:
    """Whether all pictures of a batch are there."""
    return all(one.file(root).is_file() for one in batch)


def make(batch: Sequence[Asked], maker: Maker, root: Path) -> None:
    """Make the pictures of a batch and write them."""
    if batch[0].kind == ROUND_TRIP:
        pictures = maker.round_trip(torch.stack([one.sample.target for one in batch]))
    else:
        pictures = maker.make([one.given for one in batch], [one.seed for one in batch], batch[0].sample.bucket)
    for one, picture in zip(batch, pictures, strict=True):
        save_picture(picture, one.file(root))


def read(one: Asked, root: Path) -> Tensor:
    """A picture that was made: uint8 (3, H, W). FileNotFoundError where it was not; a damaged file is deleted, and is a UserError."""
    file = one.file(root)
    try:
        with Image.open(file) as image:
            return from_picture(image.convert("RGB")).contiguous()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:  # Pillow's: no picture, a truncated one, a broken PNG
        file.unlink(missing_ok=True)
        raise UserError(f"{file}: damaged ({one_line(error)}), and deleted; give the same command again") from None


def losses_file(root: Path, number: int) -> Path:
    """Where the losses of a batch are kept."""
    return root / "losses" / f"{number:03d}.json"


def write_losses(file: Path, keys: Sequence[str], losses: dict[str, Any]) -> None:
    """Keep the losses of a batch."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"keys": list(keys), "losses": losses}, indent=None)


def read_losses(root: Path, batches: int) -> dict[str, dict[str, list[float | None]]]:
    """name of a condition -> key of a sample -> its losses."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for number in range(batches):
        content = json.loads(losses_file(root, number).read_text())
        for name, rows in content["losses"].items():
            found.setdefault(name, {}).update(zip(content["keys"], rows, strict=True))
    return found
