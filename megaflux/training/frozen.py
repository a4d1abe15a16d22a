"""Where the frozen networks are while a run trains from a cache of their outputs (data.cache).

trunk: once references and cache are computed only its token layout is needed, so its weights (15.0 GB in `dev`) are
discarded, unless words are trained on, of which no output is cached. latents: the VAE stays in the host's memory (0.17 GB)
and moves to the device for panels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megaflux.config.schema import Config
from megaflux.models.pretrained import Models
from megaflux.training.engine import release_memory

log = logging.getLogger("megaflux")
HOST = torch.device("cpu")


def send_away(config: Config, models: Models) -> None:
    """Free the device of networks whose outputs are cached. Call it after the cache is computed and
    `validation.load_references` is done."""
    if "trunk" in config.data.cache and not config.trunk_share:
        if "none" in config.data.condition.drawn:
            models.trunk.empty(1)  # kept from here on
        models.trunk.release()
        log.info("data.cache holds trunk: the trunk's weights are discarded")
    if "latents" in config.data.cache:
        models.vae_visits = True
        move(models.vae, HOST)
        log.info("data.cache holds latents: the VAE is on the device for panels only")
    if config.data.cache:
        release_memory()


def move(module: nn.Module, device: torch.device) -> None:
    """Module.to. As a function, for the types of diffusers' own `to` are lost in its decorator."""
    module.to(device)


@contextmanager
def vae_at_hand(models: Models) -> Iterator[None]:
    """Have the VAE on the models' device inside; afterwards, also after an exception, it returns to the host's memory if
    latents are cached."""
    try:
        if models.vae_visits:
            move(models.vae, models.pooled_projections.device)  # may run out of memory half way
        yield
    finally:
        if models.vae_visits:
            move(models.vae, HOST)
