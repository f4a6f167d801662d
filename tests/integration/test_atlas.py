"""aTLAS from the command line: its files, merging again from them, and what its options do to a whole run."""

import json
from pathlib import Path

import pytest
import torch
from command import Run, on
from safetensors import safe_open
from safetensors.torch import load_file
from toy_suite import TASKS

EXACT = ["trainer.precision=32-true", "bank.dtype=float32"]
FEW = ["data.images_per_batch=8", "export.figures=false", *EXACT]
PARTITION = ["method=atlas_partition", "method.target=null", 'method.granularity="random(3)"', "trainer.max_steps=3"]


def coefficients_in(folder: Path) -> torch.Tensor:
    return load_file(folder / "coefficients.safetensors")["coefficients"]


def partition_in(folder: Path) -> dict:
    with safe_open(folder / "coefficients.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["partition"])


def merged_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "merged" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def addition(adamerge: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "addition"
    adamerge("method=atlas_addition", "trainer.max_steps=20", "optimizer.lr=0.05", *EXACT, *on(toy, folder))
    return folder


@pytest.fixture(scope="module")
def partitioned(adamerge: Run, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "partitioned"
    adamerge(*PARTITION, *FEW, *on(toy, folder))
    return folder


# Addition


def test_addition_leaves_what_every_learner_leaves(addition: Path) -> None:
    names = {file.relative_to(addition).as_posix() for file in addition.rglob("*") if file.is_file()}
    assert names >= {
        "coefficients.safetensors", "coefficients.csv", "results.json", "manifest.json", "figures/losses.png",
        "figures/coefficients.png", "checkpoints/last.ckpt", "merged/open_clip_model.safetensors",
    }  # fmt: skip
    results = json.loads((addition / "results.json").read_text())
    assert results["steps"] == 20
    assert set(results["tasks"]) == set(TASKS)


def test_the_merged_model_is_the_pretrained_one_plus_scaled_task_vectors(addition: Path, toy: Path) -> None:
    """One λ per tensor and task, all of which learned, from zero."""
    pretrained = load_file(toy / "weights" / "pretrained.safetensors")
    experts = [load_file(toy / "weights" / f"{task}.safetensors") for task in TASKS]
    coefficients, merged = coefficients_in(addition), merged_in(addition)
    groups = partition_in(addition)["groups"]
    assert set(groups) == set(experts[0])
    assert (coefficients != 0).all()
    for group, key in enumerate(groups):
        moved = sum(
            value * (expert[key] - pretrained[key])
            for value, expert in zip(coefficients[:, group], experts, strict=True)
        )
        torch.testing.assert_close(merged[key], pretrained[key] + moved, rtol=1e-5, atol=1e-6)


def test_labels_are_learned_from(addition: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    """The training loss falls, and another seed sees other views."""
    losses = torch.load(addition / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["losses"].sum(1)
    assert losses.isfinite().all()
    assert losses[-5:].mean() < losses[:5].mean()
    options = ["method=atlas_addition", "trainer.max_steps=20", "optimizer.lr=0.05", "export.figures=false", *EXACT]
    for seed in (0, 1):
        adamerge(*options, f"seed={seed}", *on(toy, tmp_path / str(seed)))
    assert torch.equal(coefficients_in(tmp_path / "0"), coefficients_in(addition))
    assert not torch.equal(coefficients_in(tmp_path / "1"), coefficients_in(addition))


def test_the_best_candidate_by_images_that_are_not_learned_from(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    options = ["method=atlas_addition", "method.select_every=2", "data.fraction=0.5", "trainer.max_steps=4"]
    adamerge(*options, *FEW, *on(toy, tmp_path))
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["best"].view(3, -1), coefficients_in(tmp_path))
    assert state["best_merit"] > 0


# Random groups


def test_random_groups_are_saved_with_the_coefficients(partitioned: Path, toy: Path) -> None:
    """Of every matrix three, of any other tensor one; saved are seed and size, not a map of entries."""
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(toy / "weights" / "colours.safetensors").items()}
    found = partition_in(partitioned)
    assert found["granularity"] == "matrices(3)"
    assert set(found["scattered"]) == {key for key, shape in shapes.items() if len(shape) == 2}
    assert set(found["segments"]) == {key for key, shape in shapes.items() if len(shape) != 2}
    for key, (size, _, count, seed) in found["scattered"].items():
        assert (size, count, seed) == (torch.Size(shapes[key]).numel(), 3, 0)
    coefficients = coefficients_in(partitioned)
    assert coefficients.shape == (3, 3 * len(found["scattered"]) + len(found["segments"]))
    assert (coefficients != 0).all()


def test_the_file_alone_merges_again_to_the_same_model(
    partitioned: Path, adamerge: Run, toy: Path, tmp_path: Path
) -> None:
    """Whatever the seed of the new run: that of the groups is in the file."""
    file = tmp_path / "kept.safetensors"
    file.write_bytes((partitioned / "coefficients.safetensors").read_bytes())
    given = [*PARTITION, f"method.coefficients={file}", "seed=5", *FEW]
    adamerge(*given, *on(toy, tmp_path / "again"))
    expected, found = merged_in(partitioned), merged_in(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["steps"] == 0
    assert partition_in(tmp_path / "again") == partition_in(partitioned)


def test_groups_of_another_seed_are_others(partitioned: Path, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge(*PARTITION, "method.seed=1", *FEW, *on(toy, tmp_path))  # the same images and views
    assert not torch.equal(coefficients_in(tmp_path), coefficients_in(partitioned))


@pytest.mark.parametrize("others", ["random", "none"])
def test_what_becomes_of_tensors_that_are_no_matrices(others: str, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge(*PARTITION, f"method.others={others}", *FEW, *on(toy, tmp_path))
    pretrained, merged = load_file(toy / "weights" / "pretrained.safetensors"), merged_in(tmp_path)
    tower = [key for key in merged if key.startswith("visual.")]
    moved = {key for key in tower if not torch.equal(merged[key], pretrained[key])}
    assert moved == {key for key in tower if others == "random" or merged[key].dim() == 2}


# A new task, with and without labels; and one to forget


@pytest.mark.parametrize("method", ["atlas_fewshot", "atlas_tta", "atlas_partition"])
def test_a_target_gets_nothing_of_its_own_vector(method: str, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    """Nor does the model depend on it: another expert in its place gives the same bits."""
    options = [f"method={method}", "method.target=halves", "trainer.max_steps=3", *FEW]
    adamerge(*options, *on(toy, tmp_path / "run"))
    names = list(TASKS)
    own, others = names.index("halves"), [row for row, name in enumerate(names) if name != "halves"]
    coefficients = coefficients_in(tmp_path / "run")
    assert (coefficients[own] == 0).all()
    assert (coefficients[others] != 0).any(dim=1).all()
    suite = tmp_path / "suite"
    suite.mkdir()
    for entry in toy.iterdir():
        if entry.name != "weights":
            (suite / entry.name).symlink_to(entry)
    (suite / "weights").mkdir()
    for name in ("pretrained", "colours", "sizes"):
        (suite / "weights" / f"{name}.safetensors").symlink_to(toy / "weights" / f"{name}.safetensors")
    (suite / "weights" / "halves.safetensors").symlink_to(toy / "weights" / "sizes.safetensors")
    adamerge(*options, *on(suite, tmp_path / "other"))
    expected, found = merged_in(tmp_path / "run"), merged_in(tmp_path / "other")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shots_are_so_many_images_of_every_class(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    """One shot of each of two classes: a batch of two, the same whatever larger batch is asked for."""
    options = ["method=atlas_fewshot", "method.target=halves", "data.shots=1", "trainer.max_steps=3", *EXACT]
    for size in (2, 128):
        adamerge(*options, f"data.images_per_batch={size}", "export.figures=false", *on(toy, tmp_path / str(size)))
    assert torch.equal(coefficients_in(tmp_path / "2"), coefficients_in(tmp_path / "128"))
    adamerge(*options, "data.shots=2", "export.figures=false", *on(toy, tmp_path / "more"))
    assert not torch.equal(coefficients_in(tmp_path / "more"), coefficients_in(tmp_path / "128"))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_test_time_adaptation_takes_batches_of_any_size(size: int, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    """A quarter of so small a batch is no image, and of so few images of so few classes all may be trusted."""
    options = ["method=atlas_tta", "method.target=halves", "trainer.max_steps=3", "export.figures=false"]
    adamerge(*options, f"data.images_per_batch={size}", *on(toy, tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 3


def test_negation_moves_along_one_vector_and_keeps_the_control(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    options = ["method=atlas_negation", "method.target=colours", "method.control=halves", "method.select_every=2"]
    adamerge(*options, "trainer.max_steps=10", "optimizer.lr=0.05", *FEW, *on(toy, tmp_path))
    coefficients = coefficients_in(tmp_path)
    own = list(TASKS).index("colours")
    assert (coefficients[[row for row in range(3) if row != own]] == 0).all()
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["best"].view(3, -1), coefficients)
    assert -1 <= state["best_merit"] <= 0


def test_a_budget_leaves_so_many_vectors_per_tensor(adamerge: Run, toy: Path, tmp_path: Path) -> None:
    adamerge("method=atlas_addition", "method.budget=1", "trainer.max_steps=2", *FEW, *on(toy, tmp_path))
    assert ((coefficients_in(tmp_path) != 0).sum(0) == 1).all()


@pytest.mark.parametrize("method", ["atlas_fewshot", "atlas_tta", "atlas_partition", "atlas_negation"])
def test_a_target_that_is_not_given_is_asked_for(method: str, adamerge: Run, toy: Path, tmp_path: Path) -> None:
    done = adamerge(f"method={method}", *on(toy, tmp_path), check=False)
    assert done.returncode == 1
    assert "unset" in done.stderr
    assert "method.target" in done.stderr
    assert "Traceback" not in done.stderr
