"""Magnitude pruning and MagMax, against the second TIES' trim and matrices worked by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import ties as reference
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.protocol import Transform
from adamerge.methods.static import TaskArithmetic
from adamerge.methods.transforms import MagMax, Magnitude

WORKED = np.stack([reference.flatten(task_vectors) for task_vectors in reference.WORKED_TASK_VECTORS])
SHAPES = {"b.weight": (2, 3), "a.bias": (4,)}


def transformed(bank: ParameterBank, transform: Transform) -> np.ndarray:
    return flat(bank.transformed(transform.fit(bank)).task_vectors)


# Magnitude pruning


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pruned_by_one_threshold_or_one_per_tensor(density: float, dtype: torch.dtype) -> None:
    bank = bank_of(WORKED, SHAPES, dtype)
    whole = reference.trim(WORKED, density)
    np.testing.assert_array_equal(transformed(bank, Magnitude(density, "global", 0)), whole)
    parts = np.hstack([reference.trim(WORKED[:, :4], density), reference.trim(WORKED[:, 4:], density)])
    np.testing.assert_array_equal(transformed(bank, Magnitude(density, "tensor", 0)), parts)
    assert (density == 1) == np.array_equal(whole, parts)


def test_structural_zeros_lower_the_threshold() -> None:
    rows = np.arange(1.0, 11.0)[None]
    for zeros, kept in ((0, 3), (5, 4), (10, 5), (90, 10)):  # ⌊0.2·(10 + zeros)⌋ + 1, all that there are
        assert (transformed(bank_of(rows, {"a": (10,)}), Magnitude(0.2, "global", zeros)) != 0).sum() == kept


def test_a_tensor_of_one_entry_keeps_it() -> None:
    bank = bank_of(np.array([[0.5, -2.0]]), {"a": (), "b": (1,)})
    np.testing.assert_array_equal(transformed(bank, Magnitude(0.1, "tensor", 0)), [[0.5, -2.0]])
    np.testing.assert_array_equal(transformed(bank, Magnitude(0.1, "global", 0)), [[0, -2.0]])


def test_its_record_names_it_and_its_options() -> None:
    expected = {"name": "magnitude", "density": 0.1, "thresholds": "tensor", "structural_zeros": 0}
    assert Magnitude(0.1, "tensor", 0).to_json() == expected
    with pytest.raises(ConfigError, match=r"in \(0, 1\]; found 20"):
        Magnitude(20, "global", 0)


# MagMax

#                  0   1   2   3   4   5
#   b              3  -1   0   2  -2   0.5
#   a             -2   1   0  -2  -2  -4
#   c              1  -1   0   1   2   4
# Largest in magnitude: b's 3; all three at 1, of which a's is first in the alphabet; nothing; a's -2 before b's 2; a's
# of three twos; a's -4 before c's 4.
ROWS = np.array([[3, -1, 0, 2, -2, 0.5], [-2, 1, 0, -2, -2, -4], [1, -1, 0, 1, 2, 4]])
NAMES = ("b", "a", "c")
LARGEST = np.array([[3, 0, 0, 0, 0, 0], [0, 1, 0, -2, -2, -4], [0, 0, 0, 0, 0, 0]], dtype=float)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_largest_survives_whatever_the_order(order: Sequence[int]) -> None:
    bank = replace(bank_of(ROWS[list(order)], {"w": (2, 2), "b": (2,)}), task_names=tuple(NAMES[k] for k in order))
    found = transformed(bank, MagMax())
    np.testing.assert_array_equal(found, LARGEST[list(order)])
    merged = TaskArithmetic(scaling=0.5, grid=(), transform=MagMax())(bank)
    np.testing.assert_array_equal(flat({key: value[None] for key, value in merged.items()})[0], LARGEST.sum(0) / 2)
    np.testing.assert_array_equal(flat(bank.task_vectors), ROWS[list(order)])


@given(st.lists(st.lists(st.floats(-8, 8, width=16), min_size=5, max_size=5), min_size=1, max_size=4))
def test_one_entry_a_coordinate_and_none_larger(rows: list[list[float]]) -> None:
    matrix = np.array(rows)
    found = transformed(bank_of(matrix, {"a": (5,)}), MagMax())
    assert ((found != 0).sum(axis=0) <= 1).all()
    np.testing.assert_array_equal(np.abs(found.sum(axis=0)), np.abs(matrix).max(axis=0))
    np.testing.assert_array_equal(found[found != 0], matrix[found != 0])


def test_magmax_has_no_options() -> None:
    assert MagMax().to_json() == {"name": "magmax"}
