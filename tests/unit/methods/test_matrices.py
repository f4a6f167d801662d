"""Singular value decompositions against numpy's in float64, on matrices that are hard for them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adamerge.errors import CheckpointError, ConfigError
from adamerge.methods.matrices import blocks_of, check_patterns, nonzero, polar_factor, svd

SHAPES = [(1, 1), (1, 5), (5, 1), (6, 6), (7, 40), (40, 7), (64, 24), (33, 32)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(rows, columns, seed=seed, dtype=torch.float64)).Q


def of_condition(rows: int, columns: int, decades: float) -> Tensor:
    """float32, singular values from 1 down by so many decades."""
    size = min(rows, columns)
    values = torch.logspace(0, -decades, size, dtype=torch.float64)
    return ((orthogonal(rows, size, 1) * values) @ orthogonal(columns, size, 2).mT).float()


def assert_decomposes(matrix: Tensor, found: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    """Orthonormal, falling, and the matrix again; singular values as numpy has them in float64."""
    left, values, right = (part.double() for part in found)
    rank = min(matrix.shape)
    assert (left.shape, values.shape, right.shape) == ((len(matrix), rank), (rank,), (rank, matrix.shape[1]))
    largest = float(values[0])
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close(right @ right.mT, eye, rtol=0, atol=tolerance)
    torch.testing.assert_close((left * values) @ right, matrix.double(), rtol=0, atol=tolerance * max(largest, 1e-30))
    exact = torch.from_numpy(np.linalg.svd(matrix.double().numpy(), compute_uv=False))
    torch.testing.assert_close(values, exact, rtol=0, atol=tolerance * max(largest, 1e-30))
    assert (values.diff() <= tolerance * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(*shape, dtype=dtype)
    assert {part.dtype for part in svd(matrix)} == {dtype}
    assert_decomposes(matrix, svd(matrix), 1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e15])
def test_svd_at_any_scale(size: float) -> None:
    assert_decomposes(size * random(12, 8), svd(size * random(12, 8)), 1e-6)


@pytest.mark.parametrize("decades", [1, 3, 5, 7, 12])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)], ids=str)
def test_svd_of_ill_conditioned_matrices(shape: tuple[int, int], decades: int) -> None:
    matrix = of_condition(*shape, decades)
    assert_decomposes(matrix, svd(matrix), 1e-6)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_below_full_rank(rank: int, dtype: torch.dtype) -> None:
    matrix = random(30, rank, dtype=dtype) @ random(rank, 20, seed=1, dtype=dtype)
    found = svd(matrix)
    assert_decomposes(matrix, found, 1e-6)
    assert nonzero(found[1]).tolist() == [True] * rank + [False] * (20 - rank)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data())
def test_svd_of_small_whole_numbers(rows: int, columns: int, data: st.DataObject) -> None:
    """Where ranks fall and singular values tie all the time."""
    entries = data.draw(st.lists(st.integers(-2, 2), min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(entries, dtype=torch.float32).view(rows, columns)
    found = svd(matrix)
    assert_decomposes(matrix, found, 2e-6)
    assert int(nonzero(found[1]).sum()) == np.linalg.matrix_rank(matrix.double().numpy())


def test_svd_of_a_stack_is_that_of_each() -> None:
    stack = random(2, 3, 6, 4)
    stack[0, 1] = 0
    left, values, right = svd(stack)
    assert (left.shape, values.shape, right.shape) == ((2, 3, 6, 4), (2, 3, 4), (2, 3, 4, 4))
    for i in range(2):
        for j in range(3):
            for part, alone in zip((left, values, right), svd(stack[i, j]), strict=True):
                assert torch.equal(part[i, j], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 5, 20, 99])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_a_part_is_the_beginning_of_the_whole(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    matrix = random(*shape, dtype=dtype)
    kept = min(rank, 20)
    left, values, right = svd(matrix)
    found = svd(matrix, rank)
    assert [part.shape for part in found] == [(shape[0], kept), (kept,), (kept, shape[1])]
    torch.testing.assert_close(found[1], values[:kept])
    torch.testing.assert_close((found[0] * found[1]) @ found[2], (left[:, :kept] * values[:kept]) @ right[:kept])


@pytest.mark.parametrize("decades", [2, 4, 5])
def test_it_is_closer_to_the_truth_than_lapack_in_float32(decades: int) -> None:
    """U Vᵀ hangs on the smallest singular values: the reason for the Gram matrix in float64."""
    matrix = of_condition(96, 64, decades)
    exact = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    exact = torch.from_numpy(exact[0] @ exact[2]).float()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (polar_factor(matrix) - exact).norm() < 3e-7 * 8
    assert (left @ right - exact).norm() > 3e-7 * 8


def test_a_solver_that_does_not_converge_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = (of_condition(24, 16, 9)).double()

    def fail(*arguments: object, **options: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert_decomposes(matrix, svd(matrix), 1e-7)


def test_nan_is_refused() -> None:
    matrix = random(4, 3)
    matrix[1, 1] = float("nan")
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        svd(matrix)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (5, 5)], ids=str)
def test_the_polar_factor_is_orthonormal_and_leaves_a_symmetric_rest(shape: tuple[int, int]) -> None:
    matrix = random(3, *shape)
    factor = polar_factor(matrix)
    small = factor.mT @ factor if shape[0] >= shape[1] else factor @ factor.mT
    torch.testing.assert_close(small, torch.eye(5).expand(3, 5, 5), rtol=0, atol=1e-6)
    rest = factor.mT @ matrix  # of A = Q H
    torch.testing.assert_close(rest, rest.mT, rtol=0, atol=2e-5)
    assert (torch.linalg.eigvalsh(rest) > -1e-4).all()


def test_the_polar_factor_leaves_out_directions_that_the_matrix_has_not() -> None:
    matrix = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    torch.testing.assert_close(polar_factor(matrix), matrix.sign())
    assert polar_factor(torch.zeros(4, 2)).tolist() == torch.zeros(4, 2).tolist()


KEYS = {"attn.in_proj_weight": (6, 2), "attn.qkv.weight": (6, 2), "mlp.c_fc.weight": (6, 2), "proj": (2, 3)}


def test_which_tensors_are_matrices() -> None:
    plain = {"exclude": (), "split_in_proj": False}
    for key, shape in KEYS.items():
        tensor = random(4, *shape)
        (block,) = blocks_of(key, tensor, **plain)
        assert torch.equal(block, tensor)
    for shape in [(), (3,), (2, 3, 1, 1)]:
        assert blocks_of("proj", random(4, *shape), **plain) == ()
    assert blocks_of("proj", random(4, 2, 3), exclude=["pr*"], split_in_proj=False) == ()


def test_packed_projections_are_split_where_asked() -> None:
    tensor = random(4, 6, 2)
    for key in ("attn.in_proj_weight", "attn.qkv.weight"):
        blocks = blocks_of(key, tensor, exclude=(), split_in_proj=True)
        assert [tuple(block.shape) for block in blocks] == [(4, 2, 2)] * 3
        assert torch.equal(torch.cat(blocks, dim=1), tensor)
    assert len(blocks_of("mlp.c_fc.weight", tensor, exclude=(), split_in_proj=True)) == 1
    assert len(blocks_of("attn.in_proj_weight", random(4, 6, 3), exclude=(), split_in_proj=True)) == 1


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    check_patterns(["*.weight", "proj"], KEYS)
    with pytest.raises(ConfigError, match=r"'text_\*' of exclude matches none of the 4 merged tensors"):
        check_patterns(["proj", "text_*"], KEYS)
