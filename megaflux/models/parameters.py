"""Parameters of a run's models by names that do not depend on where Qwen2-VL is cut into trunk and tail; fingerprints.

A Qwen layer's name among a run's base weights is that of the published recipe, whose tail is the last layer: vlm.layers.0, and
language_model.layers.I for the others. In what a run begins from (checkpoint/init_folder.py) all are vlm.layers.I, from 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megaflux.models.reading import sampled

if TYPE_CHECKING:  # heavy to import
    from transformers import Qwen2VLModel

    from megaflux.models.qwen2vl_flux import Qwen2VLFlux

LAYERS = "language_model.layers."
"""How the trunk's names of decoder layers begin."""


def weights_fingerprint(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """`fingerprint` of every parameter of modules."""
    return fingerprint((pair for module in modules for pair in module.named_parameters()), dtype)


def fingerprint(
    named: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    samples: Mapping[nn.Parameter, Tensor] | None = None,
) -> str:
    """Hash of every tensor's name, shape and evenly spaced values: cheap at 12 B, and different for any two trainings.

    dtype: what values are rounded to first; bfloat16 gives one hash to weights loaded in any dtype. samples: `sampled`
    values of parameters that were cast since they were read."""
    digest, samples = hashlib.sha256(), samples or {}
    for name, tensor in named:
        values = samples[tensor] if isinstance(tensor, nn.Parameter) and tensor in samples else sampled(tensor)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def base_fingerprints(
    trainable: Qwen2VLFlux,
    trunk: Qwen2VLModel,
    vae: nn.Module,
    samples: Mapping[nn.Parameter, Tensor] | None = None,
    connector: nn.Linear | None = None,
) -> tuple[str, dict[str, str]]:
    """(fingerprint of all of a run's base weights, that of each part: vlm, connector, flux, vae), wherever Qwen2-VL is cut.

    samples: as for `fingerprint`. connector: to be taken in the place of the module's."""
    parts = list(_parts(trainable, trunk, vae, connector or trainable.connector))
    by_part: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for part, name, parameter in parts:
        by_part.setdefault(part, []).append((name, parameter))
    each = {part: fingerprint(named, samples=samples) for part, named in by_part.items()}
    return fingerprint(((name, parameter) for _, name, parameter in parts), samples=samples), each


def _parts(
    trainable: Qwen2VLFlux, trunk: Qwen2VLModel, vae: nn.Module, connector: nn.Linear
) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) in the order of a run whose tail is the last layer: what it trains, then its trunk and VAE."""
    layers = decoder_layers(trainable, trunk)

    def of(part: str, prefix: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
        return ((part, prefix + name, parameter) for name, parameter in module.named_parameters())

    yield from of("vlm", "vlm.layers.0.", layers[-1])
    yield from of("vlm", "vlm.norm.", trainable.vlm.norm)
    yield from of("connector", "connector.", connector)
    yield from of("flux", "transformer.", trainable.transformer)
    yield from (row for row in of("vlm", "", trunk) if not row[1].startswith(LAYERS))
    for i, layer in enumerate(layers[:-1]):
        yield from of("vlm", f"{LAYERS}{i}.", layer)
    yield from of("vae", "", vae)


def decoder_layers(trainable: Qwen2VLFlux, trunk: Qwen2VLModel) -> list[nn.Module]:
    """All of Qwen2-VL's decoder layers in order: the trunk's, then those that may train."""
    return [*trunk.language_model.layers, *trainable.vlm.layers]


def beginnings(trainable: Qwen2VLFlux, trunk: Qwen2VLModel) -> dict[str, nn.Parameter]:
    """What a run may begin with in the place of its base weights: transformer.*, connector.* and vlm.layers.I.*, I from 0 over
    all of Qwen2-VL's layers."""
    found = {name: p for name, p in trainable.named_parameters() if not name.startswith("vlm.")}
    for i, layer in enumerate(decoder_layers(trainable, trunk)):
        found |= {f"vlm.layers.{i}.{name}": parameter for name, parameter in layer.named_parameters()}
    return found
