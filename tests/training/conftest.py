"""One process group for all tests that run engines in this very process: DeepSpeed keeps groups of its first one."""

import os

import pytest


@pytest.fixture(scope="session")
def _group_environment():
    from megaflux.training import distributed

    found = dict(os.environ)
    distributed.start()
    described = dict(os.environ)
    _restore(found)
    yield described
    distributed.stop()


@pytest.fixture(scope="module")
def process_group(_group_environment):
    """This process is the one rank of a group."""
    found = dict(os.environ)
    os.environ.update(_group_environment)
    yield
    _restore(found)


def _restore(found: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(found)
