"""Order statistics by counting, against sorting."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.methods.transforms.quantiles import kth_smallest

Draw = Callable[[torch.Generator], Tensor]

DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda generator: torch.randn(257, generator=generator),
    "many zeros": lambda generator: torch.randn(257, generator=generator).relu(),
    "zeros of both signs": lambda generator: (
        torch.randn(257, generator=generator).relu() * torch.randint(0, 2, (257,), generator=generator).mul(2).sub(1)
    ),
    "ties": lambda generator: torch.randint(-4, 5, (257,), generator=generator) / 4,
    "one bucket of 16 bits": lambda generator: 1 + torch.randint(0, 1 << 15, (257,), generator=generator) * 2.0**-23,
    "neighbours of a bucket's edge": lambda generator: torch.tensor(
        [0x3F80FFFF, 0x3F810000, 0x3F810001, 0x3F80FFFE] * 10, dtype=torch.int32
    ).view(torch.float32),
    "all magnitudes": lambda generator: (
        torch.randn(257, generator=generator) * 10.0 ** torch.randint(-38, 38, (257,), generator=generator)
    ),
    "subnormal": lambda generator: torch.randint(-50, 50, (257,), generator=generator).float() * 1e-45,
    "constant": lambda generator: torch.full((20,), -0.1),
    "one": lambda generator: torch.tensor([-3.0]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_rank_of_every_row(name: str) -> None:
    values = torch.stack([DISTRIBUTIONS[name](torch.Generator().manual_seed(seed)) for seed in range(2)])
    size = values.shape[1]
    tensors = [values[:, :3].unsqueeze(2), values[:, 3:10], values[:, 10:]] if size > 10 else [values.view(2)]
    ranks = range(1, size + 1)
    found = kth_smallest(lambda: iter(tensors), ranks)
    assert found.dtype == torch.float32
    assert torch.equal(found, values.sort(dim=1).values.T)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    zeros=st.integers(0, 5),
    data=st.data(),
)
def test_zeros_count_where_zero_stands(values: list[float], zeros: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(values) + zeros))
    found = kth_smallest(lambda: [torch.tensor([values])], [rank], zeros=zeros)
    assert found == torch.tensor(sorted([*values, *[0.0] * zeros])[rank - 1])


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_many_entries(density: float) -> None:
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(2)) * 1e-3
    rank = values.numel() - int(density * values.numel())
    parts = [part[None] for part in values.split([100_000, 1, 199_999])]
    assert kth_smallest(lambda: parts, [rank]) == values.kthvalue(rank).values


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_to_float32(dtype: torch.dtype) -> None:
    values = torch.randn(2, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    assert torch.equal(kth_smallest(lambda: [values], [7])[0], values.float().kthvalue(7).values)
