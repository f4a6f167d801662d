"""Model Stock, against a second implementation pair by pair and numbers worked by hand."""

from math import cos, radians, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import model_stock as reference
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import ModelStock


def merge(pretrained: Any, task_vectors: Any, **options: Any) -> np.ndarray:
    """Of one tensor, in float64."""
    defaults = {"granularity": "tensor", "average": "cosine", "scaling": 1.0, "grid": (), "transform": None}
    vectors = torch.as_tensor(np.asarray(task_vectors, dtype=np.float64))
    base = torch.as_tensor(np.asarray(pretrained, dtype=np.float64))
    bank = ParameterBank({"w": base}, {"w": vectors}, tuple("abcdefgh"[: len(vectors)]))
    return ModelStock(**(defaults | options))(bank)["w"].numpy()


def drawn(num_tasks: int, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """θ₀, and task vectors that lean the same way."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    own = [rng.standard_normal(shape) * rng.uniform(0.5, 2) for _ in range(num_tasks)]
    return rng.standard_normal(shape), np.stack([common + vector for vector in own])


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
@pytest.mark.parametrize("average", ["cosine", "angle"])
def test_worked_example(granularity: str, average: str) -> None:
    found = merge(reference.WORKED_PRETRAINED, reference.WORKED_TASK_VECTORS, granularity=granularity, average=average)
    np.testing.assert_allclose(found, reference.WORKED_MERGED, rtol=1e-14)


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
@pytest.mark.parametrize("average", ["cosine", "angle"])
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_equals_the_reference(num_tasks: int, shape: tuple[int, ...], average: str, granularity: str) -> None:
    for seed in range(3):
        base, vectors = drawn(num_tasks, *shape, seed=seed)
        found = merge(base, vectors, granularity=granularity, average=average)
        expected = reference.merged(base, base + vectors, average, by_row=granularity == "filter")
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_right_angles_give_the_pretrained_model() -> None:
    base = np.arange(3.0)
    np.testing.assert_allclose(merge(base, 2 * np.eye(3)), base, rtol=0, atol=1e-15)


@pytest.mark.parametrize("angle", [10, 45, 60, 85])
@pytest.mark.parametrize("num_tasks", [2, 3, 6])
def test_equal_angles_and_lengths_give_the_point_nearest_to_the_centre(num_tasks: int, angle: float) -> None:
    """Vectors μ + ν_k about a centre μ, ν_k at right angles to it and to each other: of all t · mean the nearest to μ,
    t = ⟨μ, mean⟩ / ‖mean‖². With ‖μ‖² = c and ‖ν‖² = 1 - c all cosines are c."""
    cosine = cos(radians(angle))
    centre = np.zeros(num_tasks + 1)
    centre[-1] = sqrt(cosine)
    vectors = sqrt(1 - cosine) * np.eye(num_tasks, num_tasks + 1) + centre
    mean = vectors.mean(0)
    expected = (centre @ mean) / (mean @ mean) * mean
    for average in ("cosine", "angle"):
        np.testing.assert_allclose(merge(np.zeros_like(centre), vectors, average=average), expected, rtol=1e-12)


def test_the_mean_of_angles_is_not_that_of_cosines() -> None:
    """Pairs at 0°, 90° and 90°: the mean cosine is 1/3, t = 1 / (5/3) = 3/5; the mean angle 60°, t = 3/2 / 2 = 3/4."""
    vectors = np.array([[3.0, 0.0], [6.0, 0.0], [0.0, 9.0]])
    np.testing.assert_allclose(merge(np.zeros(2), vectors), (0.6 * 3, 0.6 * 3), rtol=1e-12)
    np.testing.assert_allclose(merge(np.zeros(2), vectors, average="angle"), (0.75 * 3, 0.75 * 3), rtol=1e-12)


def test_a_filter_is_a_row() -> None:
    """The first rows are parallel and keep their mean, the second stand at right angles and go; of the whole, c = ½ of
    (1, 0, 1, 0) and (1, 0, 0, 1), t = 2/3."""
    vectors = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    by_row = merge(np.zeros((2, 2)), vectors, granularity="filter")
    np.testing.assert_allclose(by_row, [[1, 0], [0, 0]], atol=1e-15)
    np.testing.assert_allclose(merge(np.zeros((2, 2)), vectors), 2 / 3 * vectors.mean(0), rtol=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "filter"])
@pytest.mark.parametrize("average", ["cosine", "angle"])
def test_one_expert_is_kept(granularity: str, average: str) -> None:
    base, vectors = drawn(1, 3, 4)
    found = merge(base, vectors, granularity=granularity, average=average)
    np.testing.assert_array_equal(found, base + vectors[0])


@given(st.integers(0, 1000), st.integers(2, 6), st.sampled_from(["cosine", "angle"]))
def test_lies_between_the_pretrained_model_and_the_mean(seed: int, num_tasks: int, average: str) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_tasks, 2))  # few directions: cosines of all signs
    found, mean = merge(np.zeros(2), vectors, average=average), vectors.mean(0)
    share = (found @ mean) / (mean @ mean)
    assert 0 <= share <= 1 + 1e-12
    np.testing.assert_allclose(found, share * mean, atol=1e-12)


def test_opposite_and_zero_vectors() -> None:
    base = np.array([1.0, 2.0])
    np.testing.assert_array_equal(merge(base, [[3.0, 0.0], [-1.0, 0.0]]), base)
    np.testing.assert_array_equal(merge(base, np.zeros((3, 2))), base)
    # Of three pairs, one parallel and two with a zero vector: c = 1/3, t = 3/5, and the mean is (4, 0).
    np.testing.assert_allclose(merge(base, [[6.0, 0.0], [6.0, 0.0], [0.0, 0.0]]), (1 + 2.4, 2), rtol=1e-14)


@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_the_size_of_vectors_is_of_no_account(size: float) -> None:
    vectors = np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 5.0]])
    bank = make_bank({"visual.w": torch.zeros(3)}, [{"visual.w": torch.tensor(size * row).float()} for row in vectors])
    method = ModelStock(granularity="tensor", average="cosine", scaling=1.0, grid=(), transform=None)
    np.testing.assert_allclose(method(bank)["visual.w"].double().numpy() / size, (4 / 3, 0, 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, r"method\.granularity is 'tensor' or 'filter', found 'row'"),
        ({"average": "median"}, r"method\.average is 'cosine' or 'angle', found 'median'"),
    ],
)
def test_unknown_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(np.zeros(2), np.eye(2), **options)
