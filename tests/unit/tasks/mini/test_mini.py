"""The embedded suite: its pictures, its files and its weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from adamerge.tasks.mini import ROOT, TASKS, materialize, render_task
from adamerge.tasks.mini import store as store_module
from adamerge.tasks.mini.registry import TEST_SEED, TRAIN_SEED

ARCHITECTURE = ROOT / "ViT-mini-16-32.json"
names = pytest.mark.parametrize("name", sorted(TASKS))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of a few images, so that writing them takes no time."""
    few = {split: (seed, 30) for split, (seed, _) in store_module.SPLITS.items()}
    monkeypatch.setattr(store_module, "SPLITS", few)


def test_eight_tasks_of_moderate_size() -> None:
    assert len(TASKS) == 8
    for task in TASKS.values():
        assert 4 <= len(task.classes) <= 30
        assert len(set(task.classes)) == len(task.classes)


@names
def test_same_seed_gives_same_pixels(name: str) -> None:
    images, labels = render_task(name, TEST_SEED, 40)
    again, same_labels = render_task(name, TEST_SEED, 40)
    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, same_labels)


@names
def test_no_picture_is_in_both_splits(name: str) -> None:
    train, _ = render_task(name, TRAIN_SEED, 200)
    test, _ = render_task(name, TEST_SEED, 200)
    seen = {image.tobytes() for image in train}
    unseen = {image.tobytes() for image in test}
    assert len(seen) == len(unseen) == 200
    assert not seen & unseen


def test_scans_of_the_test_seed_are_kept_apart() -> None:
    from adamerge.tasks.mini.digits import scans

    train = {mask.tobytes() for masks in scans(test=False) for mask in masks}
    test = {mask.tobytes() for masks in scans(test=True) for mask in masks}
    assert len(test) == 600
    assert not train & test


@names
def test_every_class_is_equally_often_there(name: str) -> None:
    classes = len(TASKS[name].classes)
    _, labels = render_task(name, TRAIN_SEED, 3 * classes)
    np.testing.assert_array_equal(np.bincount(labels), np.full(classes, 3))


@pytest.mark.usefixtures("small")
def test_parquet_round_trip_keeps_class_names(tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = materialize(tmp_path / "cache", splits=("test",))
    assert sorted(path.name for path in folder.iterdir()) == sorted(TASKS)
    assert not list(folder.rglob("*train*"))
    read = load_dataset(str(folder / "signs"), split="test", cache_dir=str(tmp_path / "hf"))
    assert read.features["label"].names == list(TASKS["signs"].classes)
    images, labels = render_task("signs", TEST_SEED, 30)
    assert read["label"][:] == labels.tolist()
    np.testing.assert_array_equal(np.asarray(read[7]["image"]), images[7])


@pytest.mark.usefixtures("small")
def test_only_what_is_missing_is_written(tmp_path: Path) -> None:
    folder = materialize(tmp_path)
    kept, lost = folder / "faces" / "test.parquet", folder / "land" / "train.parquet"
    content, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert materialize(tmp_path) == folder
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (folder / "land").iterdir()) == ["test.parquet", "train.parquet"]


def test_the_folder_changes_with_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store_module.rendering_hash()
    monkeypatch.setattr(store_module, "RENDERING", "another")
    assert store_module.rendering_hash() != before


def test_suite_names_every_task_and_its_files_exist() -> None:
    suite = yaml.safe_load((ROOT / "suite.yaml").read_text())
    assert suite["name"] == "mini"
    assert [task["name"] for task in suite["tasks"]] == list(TASKS)
    assert (ROOT / suite["model"]["arch"]) == ARCHITECTURE
    for task in suite["tasks"]:
        assert task["templates"] == list(TASKS[task["name"]].templates)
        assert (ROOT / task["expert"]).is_file()


def test_weights_are_small_and_of_one_shape() -> None:
    files = sorted((ROOT / "weights").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.stem for file in files} == {"pretrained", *TASKS}
    width = json.loads(ARCHITECTURE.read_text())["vision_cfg"]["width"]
    with safe_open(ROOT / "weights" / "pretrained.safetensors", "pt") as base:
        visual = {key: base.get_slice(key).get_shape() for key in base.keys() if key.startswith("visual.")}  # noqa: SIM118
        assert any(not key.startswith("visual.") for key in base.keys())  # noqa: SIM118
    assert visual["visual.class_embedding"] == [width]
    for name in TASKS:
        with safe_open(ROOT / "weights" / f"{name}.safetensors", "pt") as expert:
            found = {key: expert.get_slice(key).get_shape() for key in expert.keys()}  # noqa: SIM118
        assert found == visual


def test_import_is_light() -> None:
    code = (
        "import sys, adamerge.tasks.mini\n"
        "heavy = {'datasets', 'sklearn', 'matplotlib', 'open_clip', 'torch'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
