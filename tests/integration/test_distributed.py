"""Two processes learn what one learns."""

from pathlib import Path

import pytest
import torch
from command import FFG, Run, on
from safetensors.torch import load_file

from adamerge.tasks.datamodule import TaskImages


# Where a row's gradient is next to nothing, Adam makes a step of its rounding: 1e-4 is a hundredth of a step.
# The cosine alone needs the gradient of all weights over all processes.
@pytest.mark.parametrize(
    ("method", "size", "tolerance"),
    [
        ("adamerging_layerwise", 8, 1e-6),
        ("adamerge", 7, 1e-4),
        ("frank_wolfe_hard optimizer.oracle=cosine", 8, 1e-6),
    ],
)
def test_two_processes_equal_one_on_the_same_global_batch(
    method: str, size: int, tolerance: float, adamerge: Run, adamerge_process: Run, toy: Path, tmp_path: Path
) -> None:
    options = [
        *f"method={method}".split(),
        "trainer.precision=32-true",
        "trainer.max_steps=20",
        "optimizer.lr=0.01",
        f"data.images_per_batch={size}",
    ]
    adamerge(*options, *on(toy, tmp_path / "one"))
    adamerge_process(*options, "trainer.devices=2", "trainer.strategy=ddp", *on(toy, tmp_path / "two"))
    one, two = (load_file(tmp_path / name / "coefficients.safetensors")["coefficients"] for name in ("one", "two"))
    assert one.std() > 1e-3  # it has learned
    torch.testing.assert_close(two, one, rtol=1e-5, atol=tolerance)


def test_each_process_gathers_what_the_transform_asks_for(
    adamerge: Run, adamerge_process: Run, toy: Path, tmp_path: Path
) -> None:
    options = [
        "method=adamerging_layerwise",
        FFG,
        "trainer.precision=32-true",
        "trainer.max_steps=10",
        "optimizer.lr=0.01",
    ]
    two = ["trainer.devices=2", "trainer.strategy=ddp", f"paths.cache_dir={tmp_path / 'cache'}"]
    adamerge_process(*options, *two, *on(toy, tmp_path / "two"))
    adamerge(*options, *on(toy, tmp_path / "one"))
    found, expected = (
        load_file(tmp_path / name / "coefficients.safetensors")["coefficients"] for name in ("two", "one")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "two" / "statistics.json").is_file()


def test_ranks_see_disjoint_images_that_make_up_the_batch() -> None:
    images = {"a": torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)}
    data = TaskImages(images, {"a": torch.arange(50)}, images_per_batch=7, batches_per_step=2, seed=0)
    for step in range(5):
        whole = data.batch(step)
        parts = [data.batch(step, rank, 2) for rank in range(2)]
        seen = [set(part["images"]["a"].flatten().tolist()) for part in parts]
        assert not seen[0] & seen[1]
        assert seen[0] | seen[1] == set(whole["images"]["a"].flatten().tolist())
        weight = sum(part["weights"]["a"].sum() for part in parts)
        torch.testing.assert_close(weight, torch.tensor(2.0))
