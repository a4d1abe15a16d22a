"""Where the frozen networks are while a run trains from a cache of their output (data.cache).

trunk: once the references and the cache are made nothing of it is needed but how tokens lie, so its weights (15.0 GB in
`dev`) are given up. latents: the VAE waits in the host's memory (0.17 GB) and comes to the device for a panel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megaflux.config.schema import Config
from megaflux.models.pretrained import Models
from megaflux.training.engine import release_memory

log = logging.getLogger("megaflux")
HOST = torch.device("cpu")


def send_away(config: Config, models: Models) -> None:
    """Take off the device what is cached. Call it when the cache is made and `validation.load_references` is done."""
    if "trunk" in config.data.cache:
        models.trunk.release()
        log.info("data.cache holds trunk: the trunk's weights are given up")
    if "latents" in config.data.cache:
        models.vae_visits = True
        models.vae.to(HOST)
        log.info("data.cache holds latents: the VAE is on the device for panels only")
    if config.data.cache:
        release_memory()


@contextmanager
def vae_at_hand(models: Models) -> Iterator[None]:
    """The VAE on the models' device inside, and back in the host's memory behind it where that is its place, whatever
    is raised inside."""
    try:
        if models.vae_visits:
            models.vae.to(models.pooled_projections.device)  # may run out of memory half way
        yield
    finally:
        if models.vae_visits:
            models.vae.to(HOST)
