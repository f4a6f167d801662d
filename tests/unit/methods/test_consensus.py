"""TALL masks and Consensus merging, against a second implementation and a matrix worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from reference import consensus as reference
from reference import ties
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Transform
from adamerge.methods.static import TaskArithmetic
from adamerge.methods.transforms import Consensus, TallMasks, Ties

WORKED = np.array(reference.WORKED)
SHAPES = {"w": (1, 3), "b": (2,)}
TIES = Ties(0.2, "global", 0)


def transformed(bank: ParameterBank, transform: Transform) -> np.ndarray:
    return flat(bank.transformed(transform.fit(bank)).task_vectors)


def merged(bank: ParameterBank, transform: Transform, scaling: float = 1.0) -> np.ndarray:
    weights = TaskArithmetic(scaling=scaling, grid=(), transform=transform)(bank)
    return flat({key: tensor[None] for key, tensor in weights.items()})[0]


@pytest.mark.parametrize(("threshold", "agreement"), reference.WORKED_MERGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_worked_matrix(threshold: float, agreement: int, dtype: torch.dtype) -> None:
    bank = bank_of(WORKED, SHAPES, dtype)
    expected = reference.WORKED_MERGED[threshold, agreement]
    np.testing.assert_array_equal(merged(bank, Consensus(threshold, agreement, None)), expected)
    worked = reference.consensus(WORKED, WORKED.sum(axis=0), [threshold] * 3, agreement)
    np.testing.assert_array_equal(worked, expected)


def test_what_is_kept_are_the_task_vectors_themselves() -> None:
    found = transformed(bank_of(WORKED, SHAPES), Consensus(0.5, 2, None))
    np.testing.assert_array_equal(found, WORKED * [1, 1, 0, 0, 1])


def test_tall_masks_reconstruct_each_task() -> None:
    bank = bank_of(WORKED, SHAPES)
    np.testing.assert_array_equal(transformed(bank, TallMasks(0.5, None)), reference.WORKED_TALL)
    np.testing.assert_array_equal(flat(bank.task_vectors), WORKED)


def test_one_threshold_per_task() -> None:
    bank = bank_of(WORKED, SHAPES)
    found = transformed(bank, TallMasks([1.0, 0.5, 0.1], None))
    expected = reference.tall_masks(WORKED, WORKED.sum(axis=0), [1.0, 0.5, 0.1]) * WORKED.sum(axis=0)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found[0], reference.WORKED_TALL[0])  # a threshold of its own
    from_configuration = TallMasks(OmegaConf.create([1.0, 0.5, 0.1]), None)
    np.testing.assert_array_equal(transformed(bank, from_configuration), expected)
    assert type(from_configuration.to_json()["threshold"]) is list


small = st.integers(-3, 3).map(float)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda tasks: st.lists(
            st.lists(small | st.floats(-8, 8, width=16), min_size=6, max_size=6), min_size=tasks, max_size=tasks
        )
    ),
    data=st.data(),
)
def test_random_matrices(rows: list[list[float]], data: st.DataObject) -> None:
    matrix = np.array(rows)
    thresholds = [data.draw(st.sampled_from([0, 0.25, 0.5, 1, 2])) for _ in rows]
    agreement = data.draw(st.integers(1, len(rows)))
    bank = bank_of(matrix, {"w": (2, 2), "b": (1,), "s": ()})
    expected = reference.consensus(matrix, matrix.sum(axis=0), thresholds, agreement)
    np.testing.assert_allclose(merged(bank, Consensus(thresholds, agreement, None)), expected, rtol=1e-6, atol=1e-6)

    elected, total = ties.ties([{"all": row} for row in matrix], TIES.density, "sum")
    expected = reference.consensus(matrix, total, thresholds, agreement)
    found = transformed(bank, Consensus(thresholds, agreement, TIES))
    np.testing.assert_allclose(found.sum(axis=0), expected, rtol=1e-6, atol=0)
    assert (found[found != 0] == elected[found != 0]).all()
    reconstructed = transformed(bank, TallMasks(thresholds, TIES))
    np.testing.assert_allclose(
        reconstructed, reference.tall_masks(matrix, total, thresholds) * total, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_the_order_of_tasks_does_not_matter(order: Sequence[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 1000)) * 1e-3
    thresholds = np.array([0.2, 0.6, 0.4])
    expected = transformed(bank_of(rows, {"a": (10, 100)}), Consensus(thresholds.tolist(), 2, TIES))
    permuted = bank_of(rows[list(order)], {"a": (10, 100)})
    found = transformed(permuted, Consensus(thresholds[list(order)].tolist(), 2, TIES))
    np.testing.assert_array_equal(found, expected[list(order)])


def test_one_task_claims_all_that_it_changed() -> None:
    rows = np.array([[0.0, 1.0, -2.0]])
    bank = bank_of(rows, {"a": (3,)})
    np.testing.assert_array_equal(transformed(bank, Consensus(0.4, 1, None)), rows)
    np.testing.assert_array_equal(transformed(bank, TallMasks(0.4, None)), rows)


def test_options_out_of_range_are_refused() -> None:
    for threshold in (-0.1, [0.4, -1], []):
        for make in (lambda value: Consensus(value, 2, None), lambda value: TallMasks(value, None)):
            with pytest.raises(ConfigError, match=r"one number, 0 or more, or one per task; found"):
                make(threshold)
    with pytest.raises(ConfigError, match="a number of tasks, 1 or more; found 0"):
        Consensus(0.4, 0, None)
    bank = bank_of(WORKED, SHAPES)
    with pytest.raises(ConfigError, match=r"agreement=4 of 3 tasks leaves nothing"):
        Consensus(0.4, 4, None).fit(bank)
    for transform in (Consensus([0.4, 0.5], 2, None), TallMasks([0.4, 0.5], None)):
        with pytest.raises(ConfigError, match=r"2 numbers for 3 tasks\. Give one, or one per task"):
            transform.fit(bank)


def test_their_records_name_them_and_their_options() -> None:
    assert TallMasks(0.4, None).to_json() == {"name": "tall_masks", "threshold": 0.4, "before": None}
    assert Consensus([0.2, 0.3], 2, TIES).to_json() == {
        "name": "consensus",
        "threshold": [0.2, 0.3],
        "agreement": 2,
        "before": TIES.to_json(),
    }
