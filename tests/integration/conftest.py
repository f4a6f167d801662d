"""Running the command line as a user would."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import COMMAND, Run
from toy_suite import make_suite

SERVER = Path(__file__).parents[1] / "command_server.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy suite; tests copy it before they break it."""
    return make_suite(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    return {**os.environ, "ADAMERGE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture(scope="session")
def adamerge_process(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``adamerge(*arguments)`` in a fresh process and folder; checks that it succeeded unless told not to."""

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        cwd = tmp_path_factory.mktemp("cwd")
        done = subprocess.run(
            [*COMMAND, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
        return _checked(done, check)

    return run


@pytest.fixture(scope="session")
def adamerge(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The same in a fork of a process that has everything imported: ten times faster."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    requests, answers = server.stdin, server.stdout

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        cwd, logs = tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("logs")
        out, err = logs / "stdout", logs / "stderr"
        request = {"arguments": arguments, "cwd": str(cwd), "stdout": str(out), "stderr": str(err)}
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        code = int(answers.readline())
        done = subprocess.CompletedProcess(["adamerge", *arguments], code, out.read_text(), err.read_text())
        return _checked(done, check)

    yield run
    requests.close()
    server.wait(timeout=30)
    answers.close()


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    if check:
        assert done.returncode == 0, done.stderr + done.stdout
    return done
