"""WIDEN, against literal loops and a matrix worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from reference import widen as reference
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import Widen


def method(**options: Any) -> Widen:
    return Widen(**({"ratio": 1.0, "calibration": 1.0, "scaling": 1.0, "grid": (), "transform": None} | options))


def merge(pretrained: Any, experts: Any, key: str = "visual.fc.weight", **options: Any) -> np.ndarray:
    """Of one tensor, in float64."""
    base = torch.as_tensor(np.asarray(pretrained, dtype=np.float64))
    vectors = torch.as_tensor(np.asarray(experts, dtype=np.float64)) - base
    bank = ParameterBank({key: base}, {key: vectors}, tuple("abcdefgh"[: len(vectors)]))
    return method(**options)(bank)[key].numpy()


def drawn(num_tasks: int, *shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, base + 0.3 * rng.standard_normal((num_tasks, *shape))


def test_worked_example() -> None:
    found = merge(reference.WORKED_PRETRAINED, reference.WORKED_EXPERTS)
    np.testing.assert_allclose(found, reference.WORKED_MERGED, rtol=1e-14, atol=1e-14)
    expected = reference.merged(np.array(reference.WORKED_PRETRAINED), np.array(reference.WORKED_EXPERTS), 1.0, 1.0)
    np.testing.assert_allclose(expected, reference.WORKED_MERGED, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (1.5, 1.0), (0.5, 0.7), (3.0, 1.0), (0.0, 2.0)])
@pytest.mark.parametrize("shape", [(5,), (1,), (6, 4), (3, 9), (5, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_equals_the_loops(num_tasks: int, shape: tuple[int, ...], ratio: float, calibration: float) -> None:
    base, experts = drawn(num_tasks, *shape, seed=len(shape) + num_tasks)
    found = merge(base, experts, ratio=ratio, calibration=calibration)
    np.testing.assert_allclose(found, reference.merged(base, experts, ratio, calibration), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("key", ["visual.proj", "visual.positional_embedding"])
def test_what_has_a_row_per_input_is_taken_transposed(key: str) -> None:
    base, experts = drawn(3, 5, 4)
    found = merge(base, experts, key)
    expected = reference.merged(base.T, experts.transpose(0, 2, 1), 1.0, 1.0).T
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    as_stored = merge(base, experts, "visual.attn.out_proj.weight")
    assert np.abs(found - as_stored).max() > 1e-2
    np.testing.assert_allclose(as_stored, reference.merged(base, experts, 1.0, 1.0), rtol=1e-10, atol=1e-12)


def test_a_convolution_has_a_column_per_input_and_place() -> None:
    base, experts = drawn(2, 6, 3, 2, 2)
    expected = reference.merged(base.reshape(6, 12), experts.reshape(2, 6, 12), 1.0, 1.0)
    np.testing.assert_allclose(merge(base, experts, "visual.conv1.weight").reshape(6, 12), expected, rtol=1e-10)


def test_columns_that_are_zero() -> None:
    """Column 0 is zero in all models, 1 in θ₀ alone, 2 in the first expert alone."""
    base, experts = drawn(2, 3, 5)
    base[:, :2] = 0
    experts[:, :, 0] = 0
    experts[0, :, 2] = 0
    found = merge(base, experts)
    np.testing.assert_allclose(found, reference.merged(base, experts, 1.0, 1.0), rtol=1e-10, atol=1e-12)
    assert np.isfinite(found).all()
    assert (found[:, 0] == 0).all()


def test_small_turns_keep_their_ranks() -> None:
    """Where 1 - cos would round to nothing: column j turns by j · 1e-6 and gets no longer, in float32; only the larger
    half of them is important."""
    count = 8
    base = torch.stack([torch.ones(count), torch.zeros(count)])
    turns = torch.arange(count) * 1e-6
    expert = torch.stack([torch.ones(count), turns])
    other = torch.stack([torch.ones(count), turns.flip(0)])
    bank = make_bank({"visual.fc.weight": base}, [{"visual.fc.weight": expert}, {"visual.fc.weight": other}])
    merged = method(ratio=1.0)(bank)["visual.fc.weight"][1].double().numpy()
    moved = np.stack([turns.numpy(), turns.flip(0).numpy()]).astype(float)
    ranks = np.stack([np.arange(count), np.arange(count)[::-1]]) / count
    scores = np.where(ranks > 7 / 16, 1, np.exp(ranks) / np.exp(ranks).sum(0))  # direction and magnitude alike
    np.testing.assert_allclose(merged, (scores * moved).sum(0), rtol=1e-6, atol=1e-15)


def test_scores_add_up_to_the_number_of_tasks_where_all_is_important() -> None:
    """With a ratio of 0 all but the first rank are."""
    base, experts = drawn(4, 6, 5)
    summed = base + (experts - base).sum(0)
    found = merge(base, experts, ratio=0.0)
    lowest = {int(np.argmin(values)) for expert in experts for values in reference.significance(base, expert)}
    for column in set(range(5)) - lowest:
        np.testing.assert_allclose(found[:, column], summed[:, column], rtol=1e-12)
    quarter = merge(base, experts, ratio=0.0, scaling=0.25)
    np.testing.assert_allclose(quarter, base + (found - base) / 4, rtol=1e-12)


def test_options_change_what_they_say() -> None:
    base, experts = drawn(2, 6, 7)
    ours = merge(base, experts)
    assert np.abs(ours - merge(base, experts, ratio=1.5)).max() > 1e-3
    assert np.abs(ours - merge(base, experts, calibration=0.5)).max() > 1e-3
    # No column ranks above seven times the mean: a softmax between e^0 and e^1 is left, and its scores add up to 1.
    soft = merge(base, np.stack([experts[0]] * 2), ratio=7.0)
    np.testing.assert_allclose(soft, experts[0], rtol=1e-12)


@pytest.mark.parametrize("options", [{"ratio": -1.0}, {"calibration": -0.5}, {"ratio": float("nan")}])
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match=r"method\.ratio and method\.calibration are at least 0, found"):
        method(**options)
