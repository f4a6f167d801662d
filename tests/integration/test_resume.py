"""Killed at any moment, a run resumes to the same coefficients, bit by bit."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from command import COMMAND, Run, on
from safetensors.torch import load_file

STEPS = 600
OPTIONS = ["method=adamerging_layerwise", f"trainer.max_steps={STEPS}"]


@pytest.fixture(scope="module")
def unbroken(adamerge: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("unbroken")
    adamerge(*OPTIONS, *on(toy, folder))
    return load_file(folder / "coefficients.safetensors")["coefficients"]


def _step(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def _start(environment: dict[str, str], *arguments: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    command = [*COMMAND, *arguments]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(path: Path, process: subprocess.Popen, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(2))
def test_sigkill_at_a_random_time(
    seed: int, toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run, unbroken: torch.Tensor
) -> None:
    folder, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    rng = random.Random(seed)
    process = _start(environment, *OPTIONS, *on(toy, folder))
    _wait_for(checkpoint, process)
    time.sleep(rng.uniform(0, 1.0))
    _kill(process)
    stopped = _step(checkpoint)
    assert 0 < stopped < STEPS
    process = _start(environment, f"resume={folder}")
    time.sleep(rng.uniform(0, 20.0))  # a second blow, at any moment of loading or learning, or none if it has finished
    _kill(process)
    assert _step(checkpoint) >= stopped
    adamerge(f"resume={folder}")
    assert torch.equal(load_file(folder / "coefficients.safetensors")["coefficients"], unbroken)


def test_sigkill_while_a_checkpoint_is_written(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run, unbroken: torch.Tensor
) -> None:
    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    process = _start(environment, *OPTIONS, *on(toy, folder))
    _wait_for(checkpoint, process)
    end = time.monotonic() + 60
    while not (partial := [p for p in checkpoint.parent.iterdir() if p.name.startswith(".last.ckpt")]):
        assert process.poll() is None
        assert time.monotonic() < end
    _kill(process)
    assert partial
    assert 0 < _step(checkpoint) < STEPS  # the file at its name is whole
    adamerge(f"resume={folder}")
    assert torch.equal(load_file(folder / "coefficients.safetensors")["coefficients"], unbroken)


def test_the_resumed_run_does_only_what_is_left(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run
) -> None:
    folder = tmp_path / "run"
    process = _start(environment, *OPTIONS, *on(toy, folder))
    _wait_for(folder / "checkpoints" / "last.ckpt", process)
    _kill(process)
    stopped = _step(folder / "checkpoints" / "last.ckpt")
    adamerge(f"resume={folder}")
    logged = sorted((folder / "logs").glob("version_*/metrics.csv"))[-1].read_text().splitlines()
    column = logged[0].split(",").index("step")
    first = int(logged[1].split(",")[column])
    assert 0 < stopped <= first < STEPS
    assert len(logged) - 1 < STEPS // 10  # one line per ten steps


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_resume(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run, unbroken: torch.Tensor
) -> None:
    folder = tmp_path / "run"
    process = _start(environment, *OPTIONS, *on(toy, folder), stderr=subprocess.PIPE)
    _wait_for(folder / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert f"adamerge resume={folder}" in errors
    assert "Traceback" not in errors
    adamerge(f"resume={folder}")
    assert torch.equal(load_file(folder / "coefficients.safetensors")["coefficients"], unbroken)


def test_killed_in_its_second_stage_it_resumes_there(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run
) -> None:
    options = ["method=expert_merging_pp", "trainer.max_steps=100", "export.figures=false"]
    adamerge(*options, *on(toy, tmp_path / "unbroken"))
    folder = tmp_path / "broken"
    process = _start(environment, *options, *on(toy, folder))
    second = folder / "checkpoints" / "stage-1.ckpt"
    _wait_for(second, process)
    _kill(process)
    assert 0 < _step(second) < 100
    adamerge(f"resume={folder}")
    for name in ("coefficients.safetensors", "merged/open_clip_model.safetensors"):
        expected, found = load_file(tmp_path / "unbroken" / name), load_file(folder / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_conflicting_options_are_refused(toy: Path, tmp_path: Path, adamerge: Run) -> None:
    folder = tmp_path / "run"
    adamerge("method=average", *on(toy, folder))
    before = (folder / "results.json").read_bytes()
    done = adamerge(f"resume={folder}", "seed=3", "method=ties", check=False)
    assert done.returncode == 1
    assert "seed=3" in done.stderr
    assert "method=ties" in done.stderr
    assert (folder / "results.json").read_bytes() == before
    adamerge(f"resume={folder}", "seed=0", "method=average")


def test_there_must_be_a_run_to_resume(tmp_path: Path, adamerge: Run) -> None:
    done = adamerge(f"resume={tmp_path}", check=False)
    assert done.returncode == 1
    assert "no run to resume" in done.stderr
