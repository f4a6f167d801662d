"""The libraries that ours is compared with, each in a process that the session shares."""

from collections.abc import Iterator

import pytest
from peers.comparison import Peer


@pytest.fixture(scope="session")
def fusionbench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from _peer(request, tmp_path_factory, "--peer-python", "driver_fusionbench.py")


@pytest.fixture(scope="session")
def mergekit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from _peer(request, tmp_path_factory, "--mergekit-python", "driver_mergekit.py")


def _peer(request: pytest.FixtureRequest, folders: pytest.TempPathFactory, option: str, driver: str) -> Iterator[Peer]:
    python = request.config.getoption(option)
    if python is None:
        pytest.skip(f"needs {option}=PATH")
    peer = Peer(python.absolute(), driver, folders.mktemp("peer"))  # resolving would leave the environment
    yield peer
    peer.close()
