"""Breadcrumbs against a second implementation by sorting and a matrix worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import breadcrumbs as reference
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.transforms import Breadcrumbs

WORKED = np.array(reference.WORKED).reshape(1, -1)
SHARES = st.sampled_from([0, 0.007, 0.1, 0.25, 0.4])


def kept(bank: ParameterBank, drop_low: float, drop_high: float, within: str = "tensor") -> np.ndarray:
    transform = Breadcrumbs(drop_low, drop_high, within)
    return flat(bank.transformed(transform.fit(bank)).task_vectors)


@pytest.mark.parametrize("within", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_worked_matrix(within: str, dtype: torch.dtype) -> None:
    bank = bank_of(WORKED, {"a": (2, 5)}, dtype)
    expected = np.array(reference.WORKED_WITHIN[within]).reshape(1, -1)
    np.testing.assert_array_equal(kept(bank, *reference.WORKED_SHARES, within), expected)
    worked = reference.breadcrumbs(np.array(reference.WORKED), *reference.WORKED_SHARES, by_row=within == "row")
    np.testing.assert_array_equal(worked.reshape(1, -1), expected)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 3).flatmap(
        lambda tasks: st.lists(
            st.lists(st.integers(-3, 3) | st.floats(-8, 8, width=16), min_size=24, max_size=24),
            min_size=tasks,
            max_size=tasks,
        )
    ),
    low=SHARES,
    high=SHARES,
    by_row=st.booleans(),
)
def test_random_matrices(rows: list[list[float]], low: float, high: float, by_row: bool) -> None:
    matrix = np.array(rows, dtype=float)
    shapes = {"a": (), "b": (3,), "c": (2, 5), "d": (1, 2, 5)}
    found = kept(bank_of(matrix, shapes), low, high, "row" if by_row else "tensor")
    for row, result in zip(matrix, found, strict=True):
        parts = zip(shapes.values(), np.split(row, [1, 4, 14]), strict=True)
        expected = [reference.breadcrumbs(part.reshape(shape), low, high, by_row=by_row) for shape, part in parts]
        np.testing.assert_array_equal(result, np.concatenate([part.ravel() for part in expected]))


def test_a_tensor_too_small_for_a_share_stays_whole() -> None:
    rows = np.arange(1.0, 11.0)[None]
    shapes = {"a": (), "b": (4,), "c": (5,)}
    np.testing.assert_array_equal(kept(bank_of(rows, shapes), 0.19, 0.19), rows)
    expected = [[1, 2, 3, 4, 5, 0, 7, 8, 9, 0]]  # only of five entries is a fifth one
    np.testing.assert_array_equal(kept(bank_of(rows, shapes), 0.2, 0.2), expected)


def test_large_tensors_keep_their_share() -> None:
    bank = bank_of(np.random.default_rng(0).normal(size=(2, 70_000)), {"a": (200, 300), "b": (10_000,)})
    for within in ("tensor", "row"):
        shares = (kept(bank, 0.85, 0.01, within) != 0).mean(axis=1)
        np.testing.assert_allclose(shares, 0.14, atol=1e-4)


def test_the_bank_stays() -> None:
    rows = np.random.default_rng(1).normal(size=(2, 10))
    bank = bank_of(rows, {"a": (2, 5)}, torch.float64)
    first = kept(bank, 0.3, 0.2)
    np.testing.assert_array_equal(flat(bank.task_vectors), rows)
    bank.transformed(Breadcrumbs(0.3, 0.2, "tensor").fit(bank), in_place=True)
    np.testing.assert_array_equal(flat(bank.task_vectors), first)


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0), (0, -0.1), (0.9, 0.1), (1, 0), (0.5, 99.3)])
def test_shares_out_of_range_are_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match=rf"together below 1\. Found {low} and {high}"):
        Breadcrumbs(low, high, "tensor")


def test_ranking_within_anything_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="a 'tensor' or a 'row', found 'model'"):
        Breadcrumbs(0.8, 0.01, "model")


def test_its_record_names_it_and_its_options() -> None:
    expected = {"name": "breadcrumbs", "drop_low": 0.85, "drop_high": 0.01, "within": "row"}
    assert Breadcrumbs(0.85, 0.01, "row").to_json() == expected
