"""The main job on the toy suite, as a user would run it."""

import csv
import json
from pathlib import Path

import pytest
import torch
from command import Run, on
from safetensors.torch import load_file
from toy_suite import TASKS, make_suite

STEPS = 12


EXACT = ["trainer.precision=32-true", "bank.dtype=float32"]


@pytest.fixture(scope="module")
def run_dir(adamerge_process: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "layerwise"
    adamerge_process("method=adamerging_layerwise", f"trainer.max_steps={STEPS}", *EXACT, *on(toy, folder))
    return folder


def test_results_follow_the_schema(run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results) == {
        "suite", "method", "seed", "steps", "data", "tasks", "average", "seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert results["suite"] == "toy"
    assert results["method"] == "adamerging_layerwise"
    assert results["steps"] == STEPS
    assert results["data"] == {"adapt": "all", "fraction": 1.0}
    assert list(results["tasks"]) == list(TASKS)
    columns = {"pretrained", "merged", "expert", "normalized"}
    assert all(set(row) == columns for row in (*results["tasks"].values(), results["average"]))
    assert set(results["seconds"]) == {"load", "adapt", "evaluate", "export"}
    mean = sum(row["merged"] for row in results["tasks"].values()) / len(TASKS)
    assert results["average"]["merged"] == pytest.approx(mean)


def test_everything_that_was_promised_is_there(run_dir: Path) -> None:
    names = {file.relative_to(run_dir).as_posix() for file in run_dir.rglob("*") if file.is_file()}
    assert names >= {
        "results.json", "manifest.json", "config.yaml", "heads.safetensors", "coefficients.safetensors",
        "coefficients.csv", "figures/coefficients.png", "figures/losses.png", "figures/mean_coefficients.png",
        "merged/open_clip_config.json", "merged/open_clip_model.safetensors", "checkpoints/last.ckpt",
    }  # fmt: skip
    assert not [name for name in names if Path(name).name.startswith(".")]


def test_only_the_image_tower_has_moved(run_dir: Path, toy: Path) -> None:
    merged = load_file(run_dir / "merged" / "open_clip_model.safetensors")
    pretrained = load_file(toy / "weights" / "pretrained.safetensors")
    assert merged.keys() == pretrained.keys()
    assert all(torch.equal(merged[k], v) for k, v in pretrained.items() if not k.startswith("visual."))
    assert not any(torch.equal(merged[k], v) for k, v in pretrained.items() if k.startswith("visual."))


def test_a_lightning_checkpoint_holds_no_model_weights(run_dir: Path) -> None:
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"coefficients.raw", "losses", "mean_coefficients", "failed_step", "average", "end"}


def test_coefficients_have_one_row_per_tensor(run_dir: Path) -> None:
    with (run_dir / "coefficients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(
        k.startswith("visual.") for k in load_file(run_dir / "merged" / "open_clip_model.safetensors")
    )
    assert set(TASKS) < set(rows[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_task_vectors_may_be_narrow_and_lie_on_disk(
    dtype: str, run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    options = [
        "trainer.precision=32-true",
        f"bank.dtype={dtype}",
        "bank.device=disk",
        f"paths.cache_dir={tmp_path / 'cache'}",
    ]
    adamerge(
        "method=adamerging_layerwise", f"trainer.max_steps={STEPS}", *options, *on(toy, tmp_path / "run"),
    )  # fmt: skip
    expected, found = (
        load_file(folder / "coefficients.safetensors")["coefficients"] for folder in (run_dir, tmp_path / "run")
    )
    assert not list((tmp_path / "cache" / "bank").iterdir())
    if dtype == "float32":
        assert torch.equal(found, expected)
    else:
        assert not torch.equal(found, expected)
        assert (found - expected).abs().mean() < 1e-4 * (10 if dtype == "int8" else 1)


def test_saved_coefficients_merge_without_learning(run_dir: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    file = run_dir / "coefficients.safetensors"
    adamerge("method=adamerging_layerwise", f"method.coefficients={file}", *EXACT, *on(toy, tmp_path / "again"))
    before = load_file(run_dir / "merged" / "open_clip_model.safetensors")
    after = load_file(tmp_path / "again" / "merged" / "open_clip_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["steps"] == 0


def test_a_new_run_in_an_old_folder_starts_anew(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    for rate in ("0.1", "0.0"):
        adamerge(
            "method=adamerging_layerwise", "trainer.max_steps=10", f"optimizer.lr={rate}", *on(toy, tmp_path / "run")
        )
    learned = load_file(tmp_path / "run" / "coefficients.safetensors")["coefficients"]
    assert torch.equal(learned, torch.full_like(learned, 0.3))


@pytest.mark.parametrize("adapt", ["all", "half"])
def test_few_images_that_are_not_those_scored_are_not_overfitted(
    adapt: str, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    # At this rate learning goes nowhere. Where half of the few images are held out, they tell.
    rate = ["optimizer.lr=20", "trainer.max_steps=10", "method.grid=[0.3]"]
    adamerge("method=adamerge", f"data.adapt={adapt}", *rate, *on(toy, tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    learned = load_file(tmp_path / "run" / "coefficients.safetensors")["coefficients"]
    assert ("best" in state) == (adapt == "half")
    assert adapt == "all" or torch.equal(learned, torch.full_like(learned, 0.3))


def test_saved_coefficients_refuse_another_base(run_dir: Path, adamerge: Run, tmp_path: Path) -> None:
    other = make_suite(tmp_path / "other", images=6, seed=5)
    file = run_dir / "coefficients.safetensors"
    done = adamerge(f"method.coefficients={file}", *on(other, tmp_path / "run"), check=False)
    assert done.returncode == 1
    assert "another pretrained model" in done.stderr


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_other_loggers_write_offline(logger: str, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    more = ["logger.offline=true"] if logger == "wandb" else []
    adamerge(f"logger={logger}", "trainer.max_steps=10", *more, *on(toy, tmp_path / "run"))
    pattern = "logs/**/events.out.tfevents*" if logger == "tensorboard" else "wandb/offline-run-*"
    assert list((tmp_path / "run").glob(pattern))


def test_data_without_labels_still_merges(adamerge: Run, tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite", images=6, labels=False)
    adamerge("trainer.max_steps=2", *on(suite, tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["average"].values()) == {None}
    assert (tmp_path / "run" / "merged" / "open_clip_model.safetensors").stat().st_size > 0


def test_a_subset_is_merged_in_the_given_order(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=average", "suite.tasks=[sizes,colours]", *on(toy, tmp_path / "run"))
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]) == ["sizes", "colours"]


def test_individual_is_scored_and_not_exported(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=individual", *on(toy, tmp_path / "run"))
    average = json.loads((tmp_path / "run" / "results.json").read_text())["average"]
    assert average["merged"] == average["expert"]
    assert not (tmp_path / "run" / "merged").exists()


def test_scaling_is_searched_on_the_labelled_split(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    done = adamerge(
        "method=task_arithmetic", "method.scaling=search", "method.grid=[0.0,0.4]", *on(toy, tmp_path / "run")
    )
    assert done.stdout.count("on the labelled split") == 2


def test_half_scores_the_images_it_did_not_adapt_on(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    options = ["data.adapt=half", "data.fraction=0.5", "trainer.max_steps=2"]
    adamerge(*options, *on(toy, tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == {"adapt": "half", "fraction": 0.5}
    # 24 images: 12 are scored, so accuracies are twelfths.
    assert all((12 * row["expert"]) % 1 == pytest.approx(0, abs=1e-6) for row in results["tasks"].values())


def test_a_sweep_gives_every_job_a_folder(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    options = ["-m", "seed=0,1", "trainer.max_steps=2", "suite=folder", f"suite.root={toy}", "trainer.accelerator=cpu"]
    adamerge(*options, f"paths.sweep_dir={tmp_path / 'sweep'}")
    seeds = [json.loads((tmp_path / "sweep" / job / "results.json").read_text())["seed"] for job in "01"]
    assert seeds == [0, 1]


def test_evaluate_gives_the_accuracy_of_the_run(run_dir: Path, adamerge: Run, toy: Path) -> None:
    done = adamerge(
        "evaluate", f"checkpoint={run_dir / 'merged'}", "suite=folder", f"suite.root={toy}", "trainer.accelerator=cpu"
    )
    merged = json.loads((run_dir / "results.json").read_text())["average"]["merged"]
    assert f"{100 * merged:.1f}" in done.stdout


def test_inspect_tells_what_a_file_holds(run_dir: Path, adamerge: Run) -> None:
    assert "visual block.1" in adamerge("inspect", str(run_dir / "merged")).stdout
    assert "32 groups" in adamerge("inspect", str(run_dir / "coefficients.safetensors")).stdout
    assert '"adamerging_layerwise"' in adamerge("inspect", str(run_dir)).stdout


def test_lists(adamerge: Run) -> None:
    assert "adamerging_layerwise_pp" in adamerge("methods").stdout
    assert "folder" in adamerge("suites").stdout


def test_finetune_makes_an_expert_that_merges(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "suite", images=48)
    expert = suite / "weights" / "colours.safetensors"
    model = [f"model.arch={suite}/toy-arch.json", f"model.pretrained={suite}/weights/pretrained.safetensors"]
    data = [f"data.root={suite}/data/colours", 'templates=["a photo of {}."]', "batch_size=16", "crop_scale=1"]
    recipe = ["trainer.max_epochs=40", "lr=0.01", "warmup_steps=5", "trainer.accelerator=cpu"]
    adamerge("finetune", *model, *data, *recipe, f"output={expert}")
    adamerge("method=average", "suite.tasks=[colours]", *on(suite, tmp_path / "run"))
    row = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]["colours"]
    assert row["expert"] > 0.9 > row["pretrained"]
    assert row["merged"] == row["expert"]
