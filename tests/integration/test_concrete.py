"""Concrete subspace learning from the command line: its files, merging again from them, and going on after a blow."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from command import COMMAND, Run, on
from safetensors import safe_open
from safetensors.torch import load_file
from toy_suite import TASKS

METHOD = "method=concrete_adamerging_layerwise"
EXACT = ["trainer.precision=32-true", "bank.dtype=float32"]
STEPS = 12


@pytest.fixture(scope="module")
def run_dir(adamerge: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "concrete"
    adamerge(METHOD, f"trainer.max_steps={STEPS}", "method.mask_lr=0.1", *EXACT, *on(toy, folder))
    return folder


def transform_of(folder: Path) -> dict:
    with safe_open(folder / "coefficients.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["transform"])


def merged_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "merged" / "open_clip_model.safetensors")


def test_the_folder_holds_the_mask_and_all_that_other_learners_leave(run_dir: Path) -> None:
    names = {file.relative_to(run_dir).as_posix() for file in run_dir.rglob("*") if file.is_file()}
    assert names >= {
        "mask.safetensors", "coefficients.safetensors", "coefficients.csv", "results.json", "manifest.json",
        "figures/losses.png", "figures/mean_coefficients.png", "figures/coefficients.png",
        "checkpoints/mask.ckpt", "checkpoints/last.ckpt", "merged/open_clip_model.safetensors",
    }  # fmt: skip
    assert not [name for name in names if Path(name).name.startswith(".")]
    assert json.loads((run_dir / "results.json").read_text())["steps"] == 2 * STEPS
    for key, values in load_file(run_dir / "mask.safetensors").items():
        assert values.mean().item() == pytest.approx(1, abs=1e-5), key
    record = transform_of(run_dir)
    assert record["name"] == "mask"
    assert len(record["sha256"]) == 64
    assert record["before"] is None


def test_merged_weights_are_those_of_the_mask_and_the_coefficients(run_dir: Path, toy: Path) -> None:
    pretrained = load_file(toy / "weights" / "pretrained.safetensors")
    experts = [load_file(toy / "weights" / f"{task}.safetensors") for task in TASKS]
    mask, merged = load_file(run_dir / "mask.safetensors"), merged_in(run_dir)
    coefficients = load_file(run_dir / "coefficients.safetensors")["coefficients"]  # (K, G), a group per tensor
    with safe_open(run_dir / "coefficients.safetensors", framework="pt") as file:
        groups = json.loads(file.metadata()["partition"])["groups"]
    assert set(groups) == mask.keys()
    for group, key in enumerate(groups):
        moved = sum(
            value * (expert[key] - pretrained[key])
            for value, expert in zip(coefficients[:, group], experts, strict=True)
        )
        torch.testing.assert_close(merged[key], pretrained[key] + mask[key] * moved, rtol=1e-5, atol=1e-6)
        assert not torch.equal(merged[key], pretrained[key])


def test_the_same_seed_gives_the_same_run_and_another_another_mask(
    run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    options = [METHOD, f"trainer.max_steps={STEPS}", "method.mask_lr=0.1", "export.figures=false", *EXACT]
    adamerge(*options, *on(toy, tmp_path / "again"))
    adamerge(*options, "seed=1", *on(toy, tmp_path / "other"))
    for name in ("mask.safetensors", "coefficients.safetensors"):
        expected, found = load_file(run_dir / name), load_file(tmp_path / "again" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    key = "visual.proj"
    assert not torch.equal(
        load_file(tmp_path / "other" / "mask.safetensors")[key], load_file(run_dir / "mask.safetensors")[key]
    )


def test_task_arithmetic_keeps_its_coefficients(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=concrete_task_arithmetic", f"trainer.max_steps={STEPS}", *EXACT, *on(toy, tmp_path))
    assert torch.equal(load_file(tmp_path / "coefficients.safetensors")["coefficients"], torch.full((3, 1), 0.3))
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == STEPS
    assert (tmp_path / "figures" / "losses.png").exists()
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


# Merging again


def copied(run_dir: Path, folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(run_dir / name, folder / name)
    return folder / "coefficients.safetensors"


def test_coefficients_and_mask_merge_again_to_the_same_model(
    run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    file = copied(run_dir, tmp_path / "kept", "coefficients.safetensors", "mask.safetensors")
    adamerge(METHOD, f"method.coefficients={file}", *EXACT, *on(toy, tmp_path / "again"))
    expected, found = merged_in(run_dir), merged_in(tmp_path / "again")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_transform_before_the_mask_is_part_of_the_record(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    given = {"density": 0.5, "thresholds": "global", "structural_zeros": 0}
    ties = ["+method.transform._target_=adamerge.methods.transforms.Ties"]
    ties += [f"+method.transform.{option}={value}" for option, value in given.items()]
    options = [METHOD, *ties, "export.figures=false", *EXACT]
    adamerge(*options, "trainer.max_steps=3", *on(toy, tmp_path / "run"))
    assert transform_of(tmp_path / "run")["before"] == {"name": "ties", **given}
    file = tmp_path / "run" / "coefficients.safetensors"
    adamerge(*options, f"method.coefficients={file}", *on(toy, tmp_path / "again"))
    expected, found = merged_in(tmp_path / "run"), merged_in(tmp_path / "again")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    done = adamerge(METHOD, f"method.coefficients={file}", *on(toy, tmp_path / "without"), check=False)
    assert done.returncode == 1
    assert "transformed by" in done.stderr


def test_without_its_mask_they_are_refused(run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    file = copied(run_dir, tmp_path / "kept", "coefficients.safetensors")
    done = adamerge(METHOD, f"method.coefficients={file}", *on(toy, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert f"there is no mask {file.with_name('mask.safetensors')}" in done.stderr
    assert "Traceback" not in done.stderr


def test_within_another_mask_they_are_refused(run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=concrete_task_arithmetic", "trainer.max_steps=1", "seed=1", *on(toy, tmp_path / "other"))
    file = copied(run_dir, tmp_path / "kept", "coefficients.safetensors")
    shutil.copy(tmp_path / "other" / "mask.safetensors", file.parent)
    done = adamerge(METHOD, f"method.coefficients={file}", *on(toy, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert "is not the mask within which" in done.stderr


def test_what_is_no_mask_is_refused(run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    file = copied(run_dir, tmp_path / "kept", "coefficients.safetensors")
    shutil.copy(run_dir / "heads.safetensors", file.with_name("mask.safetensors"))
    done = adamerge(METHOD, f"method.coefficients={file}", *on(toy, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert "is no mask of this version" in done.stderr


def test_with_other_methods_they_are_refused(run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    file = run_dir / "coefficients.safetensors"
    done = adamerge(
        "method=adamerging_layerwise", f"method.coefficients={file}", *on(toy, tmp_path / "run"), check=False
    )
    assert done.returncode == 1
    assert "Choose method=concrete_adamerging_layerwise" in done.stderr
    adamerge("method=adamerging_layerwise", "trainer.max_steps=1", *on(toy, tmp_path / "plain"))
    file = tmp_path / "plain" / "coefficients.safetensors"
    done = adamerge(METHOD, f"method.coefficients={file}", *on(toy, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert "was learned without a mask. Choose method=adamerging_layerwise" in done.stderr


def test_a_mask_that_cannot_be_learned_is_kept_with_the_initial_coefficients(
    adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    options = [METHOD, "method.init=1e30", "trainer.max_steps=3"]
    done = adamerge(*options, *on(toy, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert "not finite at step 0" in done.stderr
    assert f"method.coefficients={tmp_path / 'run' / 'coefficients.safetensors'}" in done.stderr
    assert "Traceback" not in done.stderr
    found = load_file(tmp_path / "run" / "coefficients.safetensors")["coefficients"]
    assert torch.equal(found, torch.full_like(found, 1e30))
    file = tmp_path / "run" / "coefficients.safetensors"
    adamerge(METHOD, f"method.coefficients={file}", "export.figures=false", *on(toy, tmp_path / "again"))


def test_images_that_come_to_be_trusted_are_refused(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    done = adamerge(METHOD, "objective=fixmatch", "trainer.max_steps=3", *on(toy, tmp_path), check=False)
    assert done.returncode == 1
    assert "a mask is not learned from images that come to be trusted" in done.stderr


@pytest.mark.parametrize("objective", ["alignment", "cross_entropy"])
def test_other_objectives_see_what_they_need_of_every_draw(
    objective: str, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    options = ["trainer.max_steps=3", "method.mask_steps=5", "data.images_per_batch=2", "export.figures=false"]
    adamerge(METHOD, f"objective={objective}", *options, *on(toy, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 8


# Interrupted and resumed


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_after(checkpoint: Path, process: subprocess.Popen) -> int:
    """Kill the process once the checkpoint exists; its step."""
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_killed_in_either_phase_it_resumes_to_the_same_result(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run
) -> None:
    steps = 150
    options = [METHOD, f"trainer.max_steps={steps}", "method.mask_lr=0.01", "export.figures=false"]
    adamerge(*options, *on(toy, tmp_path / "unbroken"))
    folder = tmp_path / "broken"
    checkpoints = folder / "checkpoints"
    process = start(environment, *options, *on(toy, folder))
    assert 0 < kill_after(checkpoints / "mask.ckpt", process) < steps
    assert not (folder / "mask.safetensors").exists()
    process = start(environment, f"resume={folder}")
    assert 0 < kill_after(checkpoints / "last.ckpt", process) < steps
    adamerge(f"resume={folder}")
    for name in ("mask.safetensors", "coefficients.safetensors", "merged/open_clip_model.safetensors"):
        expected, found = load_file(tmp_path / "unbroken" / name), load_file(folder / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert transform_of(folder) == transform_of(tmp_path / "unbroken")


def test_a_new_run_in_an_old_folder_starts_anew(
    toy: Path, tmp_path: Path, environment: dict[str, str], adamerge: Run
) -> None:
    """λ that another run had learned there is not resumed from."""
    options = [METHOD, "trainer.max_steps=150", "export.figures=false", "export.checkpoint=false"]
    adamerge(METHOD, "trainer.max_steps=20", "seed=1", *on(toy, tmp_path))
    (tmp_path / "checkpoints" / "mask.ckpt").unlink()
    process = start(environment, *options, *on(toy, tmp_path))
    kill_after(tmp_path / "checkpoints" / "mask.ckpt", process)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


# Several processes


def test_two_processes_learn_what_one_learns(adamerge: Run, adamerge_process: Run, toy: Path, tmp_path: Path) -> None:
    options = [METHOD, "trainer.max_steps=8", "method.inner_optimizer._target_=torch.optim.SGD", *EXACT]
    adamerge(*options, *on(toy, tmp_path / "one"))
    adamerge_process(*options, "trainer.devices=2", "trainer.strategy=ddp", *on(toy, tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "mask.safetensors") for name in ("one", "two"))
    # Adam's first steps are the sign of the gradient, which rounding decides where it is about 0.
    close = torch.cat([((two[key] - one[key]).abs() < 1e-3 * one[key].clamp(min=1)).flatten() for key in one])
    assert close.float().mean() > 0.98
    one, two = (load_file(tmp_path / name / "coefficients.safetensors")["coefficients"] for name in ("one", "two"))
    assert not torch.equal(one, torch.full_like(one, 0.3))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3)
