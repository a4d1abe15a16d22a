"""What a call of the pipeline may be given, brought to one form. UserError, naming the argument, for what cannot be."""

from __future__ import annotations

import logging
from operator import index

import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.generation.condition import Reference
from megaflux_kernels import cudnn

MAX_SEED = 2**63 - 1


def as_references(given) -> list[Reference]:
    """Pictures and References, one or several or none, as a list of References."""
    if given is None:
        return []
    given = list(given) if isinstance(given, list | tuple) else [given]
    references = [item if isinstance(item, Reference) else Reference(item) for item in given]
    check_pictures(reference=[item.image for item in references])
    return references


def check_pictures(**given) -> None:
    """UserError naming the argument that is, or holds, something else than a PIL picture (or None)."""
    for name, value in given.items():
        for picture in value if isinstance(value, list | tuple) else [value]:
            if picture is not None and not isinstance(picture, Image.Image):
                raise UserError(f"{name}: a {type(picture).__name__}; use a PIL picture, as PIL.Image.open gives it")


def starts(seed, generator, count: int) -> tuple[list[torch.Generator], list[int]]:
    """(a CPU generator per picture, a seed per picture). UserError for a seed that is none."""
    if generator is not None:
        generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        if not generators or (len(generators) > 1 and count not in (1, len(generators))):
            raise UserError(f"generator: {len(generators)} for {count} pictures; give one, or one for each")
        if len(generators) == 1 and count > 1:
            drawn = torch.randint(2**62, (count,), generator=generators[0], device=generators[0].device).tolist()
            return [torch.Generator().manual_seed(s) for s in drawn], drawn
        return generators, [g.initial_seed() for g in generators]
    if count < 1:
        raise UserError(f"num_images_per_prompt: {count}; use at least 1")
    first = 0 if seed is None else seed
    try:  # index(): numpy's whole numbers are as good
        several = isinstance(first, list | tuple | range)
        seeds = [index(s) for s in first] if several else [index(first) + i for i in range(count)]
    except TypeError:
        raise UserError(f"seed: {seed!r}; use whole numbers from 0 to {MAX_SEED}") from None
    if not seeds:
        raise UserError("seed: an empty list; give at least one")
    for s in seeds:
        if not 0 <= s <= MAX_SEED:
            raise UserError(f"seed: {s}; use whole numbers from 0 to {MAX_SEED}")
    return [torch.Generator().manual_seed(s) for s in seeds], seeds


def check_amount(name: str, value: float, least: float, most: float, above: bool = False) -> None:
    """UserError where a number is not in [least, most], or, with `above`, not above `least`."""
    if not (least < value <= most if above else least <= value <= most) or value == float("inf"):
        low = f"above {least:g}" if above else f"at least {least:g}"
        raise UserError(
            f"{name}: {value}; use a number {low}" + (f" and at most {most:g}" if most < float("inf") else "")
        )


def check_shift(shift: float | None) -> None:
    if shift is not None and not 0 < shift < float("inf"):
        raise UserError(f"shift: {shift}; use a number above 0 (1 is none)")


def device_and_dtype(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """The defaults: the GPU if there is one; bfloat16 there, float32 on the CPU. UserError: no such
    device."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"device: {device} cannot be used here ({line}); use cpu") from None
    if chosen.type == "cuda" and (said := cudnn.leave_out_if_wrong()):
        logging.getLogger("megaflux").warning(said)
    return chosen, dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)
