"""Fixtures and options that every test shares."""

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shared", type=Path, default=None, help="folder that holds real8; without it those tests skip")
    for option, library in (("--peer-python", "FusionBench 0.2.33"), ("--mergekit-python", "mergekit 0.1.5")):
        text = f"Python of an environment with {library} to compare with; without it those tests skip"
        parser.addoption(option, type=Path, default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    cache = getattr(config, "cache", None)
    if cache and os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # with which every command compiles all its libraries
        os.environ["PYTHONPYCACHEPREFIX"] = str(cache.mkdir("bytecode"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    peers = config.getoption("--peer-python") or config.getoption("--mergekit-python")
    reasons = {
        "shared": None if config.getoption("--shared") else "needs --shared=DIR",
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "network": "needs a model hub; run with -m network",
        "peer": None if peers else "needs --peer-python=PATH or --mergekit-python=PATH",
    }
    chosen = config.getoption("-m") or ""
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker) and marker not in chosen:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def real8(request: pytest.FixtureRequest) -> Path:
    """The folder of the real suite; use with ``@pytest.mark.shared``."""
    shared = request.config.getoption("--shared")
    if shared is None:
        pytest.skip("needs --shared=DIR")
    return Path(shared).resolve() / "real8"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache; the session shares one of its own."""
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
