"""The second TIES against the matrix worked by hand."""

import numpy as np
import pytest
from reference import ties


def rows() -> np.ndarray:
    return np.stack([ties.flatten(task_vectors) for task_vectors in ties.WORKED_TASK_VECTORS])


def test_thresholds_are_global_and_inclusive() -> None:
    for row, threshold, kept in zip(rows(), ties.WORKED_THRESHOLDS, ties.WORKED_KEPT, strict=True):
        trimmed = ties.trim(row[None], ties.WORKED_DENSITY)[0]
        assert (np.abs(row) >= threshold).sum() == kept
        np.testing.assert_array_equal(trimmed, np.where(np.abs(row) >= threshold, row, 0))


def test_kept_count_is_floor_plus_one_without_ties() -> None:
    row = np.arange(1.0, 11.0)[None]
    for density, kept in ((0.2, 3), (0.25, 3), (0.3, 4), (0.05, 1), (1.0, 10)):
        assert (ties.trim(row, density) != 0).sum() == kept


def test_density_above_one_is_a_percentage() -> None:
    np.testing.assert_array_equal(ties.trim(rows(), 20), ties.trim(rows(), 0.2))


def test_elected_signs() -> None:
    np.testing.assert_array_equal(ties.elect(ties.trim(rows(), ties.WORKED_DENSITY)), ties.WORKED_SIGNS)


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_merged(how: str) -> None:
    selected, merged = ties.ties(ties.WORKED_TASK_VECTORS, ties.WORKED_DENSITY, how)
    np.testing.assert_array_equal(selected, ties.WORKED_SELECTED)
    np.testing.assert_array_equal(merged, ties.WORKED_MERGED[how])


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_mirrored_task_vectors_give_the_mirrored_merge(how: str) -> None:
    # The majority is then minus, so coordinate 0 keeps task 0's -5.
    mirrored = [{key: -value for key, value in vectors.items()} for vectors in ties.WORKED_TASK_VECTORS]
    np.testing.assert_array_equal(ties.ties(mirrored, ties.WORKED_DENSITY, how)[1], -np.array(ties.WORKED_MERGED[how]))
