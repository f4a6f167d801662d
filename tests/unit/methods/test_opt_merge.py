"""OptMerge against a second implementation in numpy, the literal loss, and matrices worked by hand."""

import numpy as np
import pytest
import torch
from reference import wudi as reference
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of

from adamerge.errors import ConfigError
from adamerge.methods.static import OptMerge, WudiMerging

FULL = {"centered": True, "start": "sum", "optimizer": "adam", "lr": 0.01, "momentum": 0.9, "steps": 5}
LORA = {"centered": False, "start": "mean", "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "steps": 5}
WORKED = torch.tensor(reference.OPT_TASK_VECTORS)


def opt_merge(form: dict[str, object], **options: object) -> OptMerge:
    options = {"exclude": (), "split_in_proj": False, **form, **options}
    return OptMerge(scaling=1, grid=(), transform=None, **options)


def merged(task_vectors: Tensor, form: dict[str, object], **options: object) -> Tensor:
    return vector_of(opt_merge(form, **options), bank_of({"weight": task_vectors}))["weight"]


def arrays(task_vectors: Tensor) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in task_vectors]


def test_worked_matrices() -> None:
    """One step of SGD is the learning rate times the gradient."""
    cases = ((True, "sum", reference.OPT_SUM, reference.OPT_SUM_GRADIENT),)
    cases += ((False, "mean", reference.OPT_MEAN, reference.OPT_MEAN_GRADIENT),)
    for centered, start, before, gradient in cases:
        expected = np.array(before) - 0.1 * np.array(gradient)
        options = {**LORA, "centered": centered, "start": start, "lr": 0.1, "steps": 1}
        np.testing.assert_allclose(merged(WORKED, options), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(reference.opt_merge(arrays(WORKED), **options), expected, rtol=0, atol=1e-12)
    # Adam's is the learning rate against its sign.
    torch.testing.assert_close(merged(WORKED, FULL, steps=1), torch.tensor([[3.99, 0.0], [0.0, -4.01]]))


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 5, 9), (1, 6, 6), (3, 1, 4), (4, 12, 9)], ids=str)
def test_against_the_second_implementation(form: dict[str, object], shape: tuple[int, int, int]) -> None:
    task_vectors = random(*shape)
    expected = reference.opt_merge(arrays(task_vectors), **form)  # type: ignore[arg-type]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        np.testing.assert_allclose(merged(task_vectors.to(dtype), form), expected, rtol=0, atol=tolerance)


def test_its_step_follows_the_gradient_of_the_literal_loss() -> None:
    task_vectors = random(3, 8, 7).double()
    mean = task_vectors.mean(0)
    vector = task_vectors.sum(0).requires_grad_()

    def truncated(matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :2] @ values[:2].diag() @ right[:2], values[:2].diag() @ right[:2]

    loss = torch.zeros((), dtype=torch.float64)
    for matrix in task_vectors:
        target = truncated(matrix - mean)[0] + mean
        loss = loss + ((vector - target) @ truncated(matrix)[1].T).square().sum() / matrix.square().sum()
    loss.backward()
    assert vector.grad is not None
    found = merged(task_vectors, FULL, optimizer="sgd", lr=0.5, steps=1)
    torch.testing.assert_close(found, vector.detach() - 0.5 * vector.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "lora"])
def test_one_task_gives_its_vector(form: dict[str, object]) -> None:
    task_vectors = random(1, 6, 4)
    assert torch.equal(merged(task_vectors, form, steps=300), task_vectors[0])


def test_with_a_full_rank_and_targets_not_centred_it_is_wudi() -> None:
    """K zero tasks beside one: r = ⌊min/K⌋ of a matrix of rank 1 loses nothing."""
    task_vectors = random(3, 6, 1) @ random(3, 1, 9, seed=1)
    wudi = WudiMerging(
        solver="adam", lr=0.01, steps=5, ridge=0, exclude=(), split_in_proj=False, scaling=1, grid=(), transform=None
    )
    expected = vector_of(wudi, bank_of({"weight": task_vectors}))["weight"]
    torch.testing.assert_close(merged(task_vectors, FULL, centered=False), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "lora"])
def test_more_tasks_than_directions_stay_at_the_start(form: dict[str, object]) -> None:
    task_vectors = random(4, 3, 9)
    start = task_vectors.sum(0) if form is FULL else task_vectors.mean(0)
    torch.testing.assert_close(merged(task_vectors, form), start)


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "lora"])
def test_tasks_that_left_the_matrix_alone(form: dict[str, object]) -> None:
    task_vectors = random(3, 8, 9)
    task_vectors[1] = 0
    expected = reference.opt_merge(arrays(task_vectors), **form)  # type: ignore[arg-type]
    np.testing.assert_allclose(merged(task_vectors, form), expected, rtol=0, atol=1e-5)
    assert not merged(torch.zeros(3, 8, 9), form).any()


@pytest.mark.parametrize("form", [FULL, LORA], ids=["full", "lora"])
def test_the_order_of_tasks_does_not_matter(form: dict[str, object]) -> None:
    task_vectors = random(3, 8, 9).double()
    torch.testing.assert_close(merged(task_vectors[[2, 0, 1]], form), merged(task_vectors, form), rtol=0, atol=1e-11)


def test_other_tensors_take_the_mean_and_options_say_which_are_matrices() -> None:
    task_vectors = {"in_proj_weight": random(2, 9, 3), "proj": random(2, 4, 4), "bias": random(2, 4)}
    bank = bank_of(task_vectors)
    found = vector_of(opt_merge(FULL, exclude=["pro?"]), bank)
    for key in ("proj", "bias"):
        torch.testing.assert_close(found[key], task_vectors[key].mean(0))
    split = vector_of(opt_merge(FULL, split_in_proj=True), bank)["in_proj_weight"]
    thirds = [merged(part, FULL) for part in task_vectors["in_proj_weight"].split(3, dim=1)]
    torch.testing.assert_close(split, torch.cat(thirds))
    assert (split - found["in_proj_weight"]).abs().max() > 1e-4


def test_every_option_says_something() -> None:
    task_vectors = random(3, 7, 9)
    options = [
        {},
        {"centered": False},
        {"start": "mean"},
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.5},
        {"momentum": 0.5, "steps": 40},
        {"steps": 40},
        {"lr": 0.02},
    ]
    found = [merged(task_vectors, FULL, **option) for option in options]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 1e-4 for other in found[:index]), index


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"start": "zero"}, "'sum' or the 'mean' of task vectors, found 'zero'"),
        ({"optimizer": "lbfgs"}, "unknown optimizer 'lbfgs'. Choose adam or sgd"),
        ({"momentum": 1.0}, r"in \[0, 1\), found 1"),
        ({"lr": -1.0}, "lr is above 0, found -1"),
        ({"steps": -2}, "a count, 0 or more; found -2"),
    ):
        with pytest.raises(ConfigError, match=message):
            opt_merge(FULL, **options)
