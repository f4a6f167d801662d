"""Merges that look at the experts, as a user would run them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import FFG, Run, on
from safetensors.torch import load_file, save_file
from toy_suite import TASKS, make_suite


def record(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "statistics.json").read_text())


def accuracies(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "results.json").read_text())["tasks"]


def test_a_second_run_uses_what_the_first_computed(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    for name in ("first", "second"):
        adamerge("method=fisher_merging", "method.fisher.images_per_task=6", cache, *on(toy, tmp_path / name))
    first = record(tmp_path / "first")
    assert first == record(tmp_path / "second")
    assert accuracies(tmp_path / "first") == accuracies(tmp_path / "second")
    assert first["statistic"]["name"] == "fisher"
    assert first["statistic"]["images_per_task"] == 6
    assert set(first["files"]) == set(TASKS)
    files = [Path(of_task["file"]) for of_task in first["files"].values()]
    assert sorted(files) == sorted((tmp_path / "cache" / "statistics").iterdir())
    adamerge("method=average", cache, *on(toy, tmp_path / "second"))
    assert not (tmp_path / "second" / "statistics.json").exists()


@pytest.fixture
def moments(toy: Path, tmp_path: Path) -> dict[str, Path]:
    """Second moments, all of which are 1, as files."""
    weights = load_file(toy / "weights" / "pretrained.safetensors")
    for task in TASKS:
        save_file({key: torch.ones_like(value) for key, value in weights.items()}, tmp_path / f"{task}.safetensors")
    return {task: tmp_path / f"{task}.safetensors" for task in TASKS}


def with_moments(files: dict[str, Path]) -> list[str]:
    """As conf/method/ota.yaml says."""
    named = ", ".join(f"{task}: {file}" for task, file in files.items())
    target = "{_target_: adamerge.statistics.Moments, files: {" + named + "}}"
    return ["method=ota", "~method.transform.curvature", f"+method.transform.curvature={target}"]


def test_moments_come_from_files(adamerge: Run, toy: Path, tmp_path: Path, moments: dict[str, Path]) -> None:
    merged = Path("merged") / "open_clip_model.safetensors"
    adamerge(*with_moments(moments), "method.transform.density=1", *on(toy, tmp_path / "run"))
    assert record(tmp_path / "run")["statistic"]["files"] == {task: str(file) for task, file in moments.items()}
    adamerge("method=average", *on(toy, tmp_path / "mean"))  # which equal curvature gives
    found, mean = (load_file(tmp_path / name / merged) for name in ("run", "mean"))
    for key, value in mean.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    changed = {key: 100 * value for key, value in load_file(moments["sizes"]).items()}
    save_file(changed, moments["sizes"])
    adamerge(*with_moments(moments), "method.transform.density=1", *on(toy, tmp_path / "changed"))
    other = load_file(tmp_path / "changed" / merged)
    assert any((other[key] - value).abs().max() > 1e-3 for key, value in mean.items())


def test_a_task_without_moments_is_said(adamerge: Run, toy: Path, tmp_path: Path, moments: dict[str, Path]) -> None:
    del moments["sizes"]
    done = adamerge(*with_moments(moments), *on(toy, tmp_path / "run"), check=False)
    assert done.returncode != 0
    assert "task 'sizes' has no file of second moments" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_learner_scales_what_curvature_keeps(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    learner = ["method=adamerging_layerwise", "trainer.max_steps=3", "bank.dtype=float32"]
    adamerge(*learner, FFG, *on(toy, tmp_path / "run"))
    fisher = {"form": "sampled", "share": 0.9, "batch_size": 4, "images_per_task": 4, "seed": 0}
    assert record(tmp_path / "run")["statistic"] == {"name": "fisher", **fisher}
    file = tmp_path / "run" / "coefficients.safetensors"
    adamerge(*learner, FFG, f"method.coefficients={file}", *on(toy, tmp_path / "again"))
    merged = Path("merged") / "open_clip_model.safetensors"
    found, again = (load_file(tmp_path / name / merged) for name in ("run", "again"))
    assert all(torch.equal(again[key], value) for key, value in found.items())
    pretrained = load_file(toy / "weights" / "pretrained.safetensors")
    apart = [value != pretrained[key] for key, value in found.items() if key.startswith("visual.")]
    moved = sum(int(one.sum()) for one in apart) / sum(one.numel() for one in apart)
    assert 0.3 <= moved <= 0.3 * len(TASKS)  # each task keeps 0.3 of its entries
    adamerge(*learner, *on(toy, tmp_path / "run"))
    assert not (tmp_path / "run" / "statistics.json").exists()


def test_scores_need_labels(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=metrics_weighted_averaging", *on(toy, tmp_path / "run"))
    assert record(tmp_path / "run")["statistic"] == {"name": "scores", "images_per_task": None}
    unlabelled = make_suite(tmp_path / "suite", images=6, labels=False)
    done = adamerge("method=metrics_weighted_averaging", *on(unlabelled, tmp_path / "without"), check=False)
    assert done.returncode != 0
    assert "has no label column" in " ".join(done.stderr.split())
