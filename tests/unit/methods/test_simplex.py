"""Projection onto the simplex against bisection on its condition, and what it means to be the nearest point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adamerge.methods.learned.simplex import project_to_simplex

entries = st.floats(-3, 3, allow_nan=False, width=32)


@st.composite
def columns(draw: st.DrawFn) -> Tensor:
    """(n, m) float64, with ties and whole numbers among the entries."""
    rows, width = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    entry = st.one_of(entries, st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
    values = draw(st.lists(entry, min_size=rows * width, max_size=rows * width))
    return torch.tensor(values, dtype=torch.float64).view(rows, width)


def by_bisection(column: Tensor) -> Tensor:
    """max(v − c, 0) for the c at which it sums to 1; the sum falls as c grows."""
    low, high = float(column.min()) - 1, float(column.max())
    for _ in range(100):
        middle = (low + high) / 2
        if float((column - middle).clamp(min=0).sum()) > 1:
            low = middle
        else:
            high = middle
    return (column - low).clamp(min=0)


@settings(deadline=None)
@given(columns())
def test_is_the_root_that_bisection_finds(values: Tensor) -> None:
    expected = torch.stack([by_bisection(column) for column in values.T], dim=1)
    torch.testing.assert_close(project_to_simplex(values), expected, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(columns(), st.integers(0, 1000))
def test_lies_in_the_simplex_and_nothing_there_is_nearer(values: Tensor, seed: int) -> None:
    """w is nearest exactly if ⟨v − w, u − w⟩ ≤ 0 for every u of the simplex: its corners, and so all of it."""
    found = project_to_simplex(values)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(0), torch.ones(values.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)
    slopes = values - found
    assert (slopes.amax(0) - (slopes * found).sum(0) <= 1e-12).all()  # u = any corner
    other = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = other / other.sum(0)
    assert ((values - found).norm(dim=0) <= (values - other).norm(dim=0) + 1e-12).all()


@settings(deadline=None)
@given(columns(), entries)
def test_what_is_added_to_all_entries_does_not_matter_and_a_point_of_the_simplex_stays(
    values: Tensor, shift: float
) -> None:
    found = project_to_simplex(values)
    torch.testing.assert_close(project_to_simplex(values + shift), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(project_to_simplex(found), found, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """(1.2, 0.6, −1): with c = (1.2 + 0.6 − 1) / 2 = 0.4 it is (0.8, 0.2, 0); −1 lies below c.
    (3, 0, 0): c = 2. Three alike share: (⅓, ⅓, ⅓)."""
    values = torch.tensor([[1.2, 3.0, 7.0], [0.6, 0.0, 7.0], [-1.0, 0.0, 7.0]])
    expected = torch.tensor([[0.8, 1.0, 1 / 3], [0.2, 0.0, 1 / 3], [0.0, 0.0, 1 / 3]])
    torch.testing.assert_close(project_to_simplex(values), expected)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_any_number_of_columns(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = project_to_simplex(values)
    assert found.shape == shape
    torch.testing.assert_close(found.view(4, -1), project_to_simplex(values.view(4, -1)), rtol=0, atol=0)


def test_values_that_are_not_finite_raise_nothing_and_do_not_hide() -> None:
    """The learner's guard sees to them."""
    assert project_to_simplex(torch.full((3, 1), torch.nan)).isnan().all()
