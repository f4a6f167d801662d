"""DOGE against a second implementation in numpy, the literal loss, and matrices worked by hand."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from reference import doge as reference
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of

from adamerge.errors import ConfigError
from adamerge.methods.static import Doge
from adamerge.methods.static.doge import shared_directions

OPTIONS = {"eta": 0.5, "density": 0.6, "shared_divisor": 3, "lr": 0.01, "steps": 4}
BLOCK = "visual.transformer.resblocks."
ONE = f"{BLOCK}0.mlp.c_fc.weight"


def doge(**options: object) -> Doge:
    options = {"exclude": (), "split_in_proj": False, **OPTIONS, **options}
    return Doge(scaling=1, grid=(), transform=None, **options)  # type: ignore[arg-type]


def merged(task_vectors: Tensor, **options: object) -> Tensor:
    return vector_of(doge(**options), bank_of({ONE: task_vectors}))[ONE]


def arrays(task_vectors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: tensor.double().numpy() for key, tensor in task_vectors.items()}


def test_worked_matrices() -> None:
    # All directions shared: nothing is corrected, and each task's share has the norm eta: 0.5 e₁e₁ᵀ + 0.5 e₂e₂ᵀ.
    apart = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    assert torch.equal(merged(apart, shared_divisor=1, density=1.0), 0.5 * torch.eye(2))
    # Of [[2]], λ = 0.5 / 2; ⌊1/2⌋ = 0 directions are shared. ∂L/∂Δ = -2 λ · 2 · 2 (2 - 0.25 · 2) < 0, and Adam's first
    # step is its rate: Δ = 0.01. The merge is 0.25 (2 + 0.01).
    torch.testing.assert_close(
        merged(torch.tensor([[[2.0]]]), shared_divisor=2, steps=1), torch.tensor([[0.5025]]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 6, 9), (1, 4, 4), (3, 4, 1), (2, 1, 6)], ids=str)
@pytest.mark.parametrize("divisor", [2, 3])
def test_against_the_second_implementation(shape: tuple[int, int, int], divisor: int) -> None:
    task_vectors = {ONE: random(*shape), f"{BLOCK}1.attn.out_proj.weight": random(shape[0], 5, 5, seed=1)}
    options = {**OPTIONS, "shared_divisor": divisor}
    if shape[0] == 1:  # all directions of one task weigh the same: P is the decomposition's choice
        options["shared_divisor"] = 100
    expected = reference.merge(arrays(task_vectors), **options)  # type: ignore[arg-type]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        found = vector_of(doge(**options), bank_of({key: t.to(dtype) for key, t in task_vectors.items()}))
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=0, atol=tolerance)


def test_its_first_step_follows_the_gradient_of_the_literal_loss() -> None:
    task_vectors = random(3, 6, 8).double()
    factors = 0.5 / torch.linalg.matrix_norm(task_vectors)
    moved = torch.einsum("k,kmn->mn", factors, task_vectors)
    correction = torch.zeros(6, 8, dtype=torch.float64, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64)
    for matrix in task_vectors:
        loss = loss + (matrix * (matrix - moved - factors.sum() * correction)).sum(1).square().sum()
    loss.backward()
    assert correction.grad is not None
    basis = shared_directions(task_vectors, 3)
    open_part = correction.grad - basis @ basis.T @ correction.grad
    assert basis.shape == (6, 2)
    expected = torch.einsum("k,kmn->mn", factors, task_vectors - 0.01 * open_part.sign())
    torch.testing.assert_close(merged(task_vectors, density=1.0, steps=1), expected, rtol=0, atol=1e-6)


def test_the_shared_directions_are_those_that_the_tasks_have_in_common() -> None:
    # Both tasks' leading direction is e₁; one of three is shared.
    common = torch.tensor([[[3.0, 0, 0], [0, 1, 0], [0, 0, 0.5]], [[3.0, 0, 0], [0, 0, 0], [0, 1, 0.2]]])
    found = shared_directions(common.double(), 3)
    torch.testing.assert_close(found.abs(), torch.tensor([[1.0], [0], [0]], dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_mask_counts_over_all_matrices_together() -> None:
    task_vectors = {ONE: random(2, 4, 5), f"{BLOCK}1.mlp.c_fc.weight": 10 * random(2, 4, 5, seed=1)}
    found = vector_of(doge(density=0.25, steps=0), bank_of(task_vectors))
    assert sum(int((tensor != 0).sum()) for tensor in found.values()) <= 2 * 11
    assert int((found[f"{BLOCK}1.mlp.c_fc.weight"] != 0).sum()) > 3 * int((found[ONE] != 0).sum())


def test_only_matrices_of_blocks_are_merged() -> None:
    shapes = {ONE: (6, 4), f"{BLOCK}0.ln_1.weight": (4,), "visual.proj": (4, 3), "visual.conv1.weight": (4, 3, 2, 2)}
    found = vector_of(doge(), bank_of({key: random(2, *shape) for key, shape in shapes.items()}))
    assert [key for key, tensor in found.items() if tensor.any()] == [ONE]


def test_packed_projections_are_three_matrices_where_asked() -> None:
    key = f"{BLOCK}0.attn.in_proj_weight"
    task_vectors = random(2, 12, 4)
    apart = {f"{BLOCK}{part}.mlp.c_fc.weight": task_vectors[:, 4 * part : 4 * part + 4] for part in range(3)}
    expected = torch.cat(list(vector_of(doge(), bank_of(apart)).values()))
    found = vector_of(doge(split_in_proj=True), bank_of({key: task_vectors}))[key]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(vector_of(doge(), bank_of({key: task_vectors}))[key], expected, atol=1e-3)


def test_a_task_that_left_a_matrix_alone_takes_no_part_in_it() -> None:
    task_vectors = torch.cat([random(2, 6, 5), torch.zeros(1, 6, 5)])
    found = merged(task_vectors, density=1.0, shared_divisor=100)
    torch.testing.assert_close(found, merged(task_vectors[:2], density=1.0, shared_divisor=100), rtol=0, atol=1e-6)
    assert not merged(torch.zeros(2, 3, 4)).any()


def test_the_order_of_tasks_does_not_matter() -> None:
    task_vectors = random(3, 6, 5)
    torch.testing.assert_close(merged(task_vectors[[2, 0, 1]]), merged(task_vectors), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "other", [{"eta": 0.6}, {"density": 0.2}, {"shared_divisor": 2}, {"lr": 0.02}, {"steps": 9}], ids=str
)
def test_every_option_says_something(other: dict[str, object]) -> None:
    task_vectors = random(2, 6, 5)
    assert not torch.allclose(merged(task_vectors, **other), merged(task_vectors), atol=1e-5)


def test_patterns_leave_matrices_alone() -> None:
    other = f"{BLOCK}1.mlp.c_fc.weight"
    bank = bank_of({ONE: random(2, 4, 5), other: random(2, 4, 5, seed=1)})
    found = vector_of(doge(exclude=("*.1.*",)), bank)
    assert found[ONE].any()
    assert not found[other].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "above 0"),
        ({"density": 0.0}, r"in \(0, 1\]"),
        ({"density": 1.5}, r"in \(0, 1\]"),
        ({"shared_divisor": 0.5}, "1 or more"),
        ({"steps": -1}, "steps"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doge(**options)


def test_a_bank_without_matrices_of_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="none among the 1 merged tensors"):
        doge()(bank_of({"visual.proj": random(2, 3, 4)}))
    with pytest.raises(ConfigError, match="matches"):
        doge(exclude=("nothing*",))(bank_of({ONE: random(2, 3, 4)}))
