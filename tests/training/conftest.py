"""One process group for all tests that run engines in this very process: DeepSpeed keeps groups of its first one."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def _group_environment():
    from megaflux.training import distributed

    found, flash = dict(os.environ), torch.backends.cuda.flash_sdp_enabled()
    distributed.start()
    described = dict(os.environ)
    _restore(found)
    torch.backends.cuda.enable_flash_sdp(flash)
    yield described
    distributed.stop()


@pytest.fixture(scope="module")
def process_group(_group_environment):
    """This process is the one rank of a group, set up as `distributed.start` sets it up, and afterwards as it was: tests
    that count what attention keeps may come next."""
    found, flash = dict(os.environ), torch.backends.cuda.flash_sdp_enabled()
    os.environ.update(_group_environment)
    if not torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
    yield
    _restore(found)
    torch.backends.cuda.enable_flash_sdp(flash)


def _restore(found: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(found)
