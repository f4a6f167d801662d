"""Both passes over τ by torch's own operations, against float64."""

import pytest
import torch
from torch import Tensor

from adamerge.bank.storage import DTYPES, Rows
from adamerge.merging import kernels
from adamerge.merging.kernels import add_task_vectors, contract_task_vectors
from adamerge.merging.partition import Scattered, Segments

SHAPES = [(11, 7, 200), (3, 40, 96)]
"""(K, R, C): more tasks than are taken at once, and fewer."""

SEGMENTS = {
    "one": lambda size: Segments([(0, size, 0)]),
    "rows": lambda size: Segments([(0, 3 * 200, 2), (3 * 200, size, 0)]),
    "any": lambda size: Segments([(0, 7, 1), (7, 811, 0), (811, 812, 2), (812, size, 1)]),
    "random": lambda size: Scattered(size, 0, 3, 0, "key"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 200)


def make_rows(dtype: str, shape: tuple[int, int, int]) -> tuple[Rows, Tensor]:
    """Task vectors as stored, and in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype == "int8":
        values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scales = torch.rand(shape[:2], generator=generator)
        return Rows(values, scales), values.double() * scales[..., None].double()
    values = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    return Rows(values, None), values.double()


def groups_of_entries(cuts: Segments | Scattered) -> Tensor:
    if isinstance(cuts, Scattered):
        return cuts.groups(0, cuts.size)
    return torch.cat([torch.full((stop - start,), group) for start, stop, group in cuts])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_sums_of_task_vectors(dtype: str, shape: tuple[int, int, int], segments: str) -> None:
    rows, exact = make_rows(dtype, shape)
    base = torch.randn(shape[1] * shape[2], generator=torch.Generator().manual_seed(1))
    weights = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(2))
    before, out = base.clone(), torch.full_like(base, torch.nan)
    cuts = SEGMENTS[segments](base.numel())
    add_task_vectors(out, base, rows, weights, cuts)
    groups = groups_of_entries(cuts)
    terms = weights.double()[:, groups] * exact.flatten(1)
    magnitude = base.double().abs() + terms.abs().sum(0)
    assert ((out - base.double() - terms.sum(0)).abs() <= 3e-7 * magnitude).all()
    assert torch.equal(base, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_inner_products_with_task_vectors(dtype: str, shape: tuple[int, int, int], segments: str) -> None:
    rows, exact = make_rows(dtype, shape)
    gradient = torch.randn(shape[1] * shape[2], generator=torch.Generator().manual_seed(3))
    found = torch.ones(3, shape[0], dtype=torch.float64)
    cuts = SEGMENTS[segments](gradient.numel())
    contract_task_vectors(rows, gradient, cuts, found)
    products = exact.flatten(1) * gradient.double()
    expected, size = torch.ones_like(found), torch.zeros_like(found)
    for group in range(3):
        mine = products[:, groups_of_entries(cuts) == group]
        expected[group] += mine.sum(1)
        size[group] += mine.abs().sum(1)
    assert ((found - expected).abs() <= 2e-7 * size).all()
