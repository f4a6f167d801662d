"""Iso-C and Iso-CTS against the published procedures in numpy, and matrices worked by hand."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import spectral
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of

from adamerge.errors import ConfigError
from adamerge.methods.static import IsoC, IsoCTS


def iso_c(exclude: Sequence[str] = (), *, split_in_proj: bool = False) -> IsoC:
    return IsoC(exclude=exclude, split_in_proj=split_in_proj, scaling=1, grid=(), transform=None)


def iso_cts(fraction: float = 0.8, exclude: Sequence[str] = (), *, split_in_proj: bool = False) -> IsoCTS:
    return IsoCTS(
        common_fraction=fraction, exclude=exclude, split_in_proj=split_in_proj, scaling=1, grid=(), transform=None
    )


def merged(method: IsoC | IsoCTS, task_vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return vector_of(method, bank_of(task_vectors))


def arrays(task_vectors: Tensor) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in task_vectors]


def test_worked_matrices() -> None:
    found = merged(iso_c(), {"weight": torch.tensor(spectral.ISO_TASK_VECTORS), "bias": torch.tensor([[1.0], [4.0]])})
    torch.testing.assert_close(found["weight"], torch.tensor(spectral.ISO_MERGED))
    assert found["bias"].tolist() == [2.5]
    reference = spectral.iso_c([np.array(matrix) for matrix in spectral.ISO_TASK_VECTORS])
    np.testing.assert_allclose(reference, spectral.ISO_MERGED, rtol=1e-12)


def test_worked_matrix_with_task_specific_directions() -> None:
    task_vectors = torch.tensor(spectral.ISO_CTS_DIAGONALS).diag_embed()
    found = merged(iso_cts(0.5), {"weight": task_vectors})["weight"]
    torch.testing.assert_close(found, spectral.ISO_CTS_VALUE * torch.eye(4))
    reference = spectral.iso_cts([np.diag(values) for values in spectral.ISO_CTS_DIAGONALS], 0.5)
    np.testing.assert_allclose(reference, spectral.ISO_CTS_VALUE * np.eye(4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 5, 9), (1, 6, 6), (4, 30, 20), (3, 1, 4)], ids=str)
def test_random_matrices(shape: tuple[int, int, int]) -> None:
    task_vectors = random(*shape)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        given = {"weight": task_vectors.to(dtype)}
        found = merged(iso_c(), given)["weight"]
        np.testing.assert_allclose(found, spectral.iso_c(arrays(task_vectors)), rtol=0, atol=tolerance)
        for fraction in (0.0, 0.3, 0.5, 0.8, 1.0):
            size, num_tasks = min(shape[1:]), shape[0]
            if round((size - int(size * fraction)) / num_tasks) * num_tasks > size:
                continue  # more directions than there are: the published code fails
            found = merged(iso_cts(fraction), given)["weight"]
            expected = spectral.iso_cts(arrays(task_vectors), fraction)
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), data=st.data())
def test_the_spectrum_is_flat(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """On as many directions as the sum has, with the same sum; small whole numbers are often below full rank."""
    size = shape[0] * shape[1] * shape[2]
    entries = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    task_vectors = torch.tensor(entries, dtype=torch.float32).view(shape)
    total = task_vectors.sum(0)
    rank = int(torch.linalg.matrix_rank(total.double()))
    found = torch.linalg.svdvals(merged(iso_c(), {"weight": task_vectors})["weight"])
    expected = torch.zeros_like(found)
    if rank:
        expected[:rank] = torch.linalg.svdvals(total).sum() / rank
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_flat_spectrum_of_common_and_specific_directions() -> None:
    task_vectors = random(3, 20, 30)
    found = merged(iso_cts(), {"weight": task_vectors})["weight"]
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, values[:1].expand(20))


def test_it_is_iso_c_with_nothing_specific_and_for_one_task() -> None:
    task_vectors = random(3, 8, 10)
    common = merged(iso_c(), {"weight": task_vectors})["weight"]
    torch.testing.assert_close(merged(iso_cts(1), {"weight": task_vectors})["weight"], common)
    alone = {"weight": task_vectors[:1]}
    for fraction in (0, 0.5):
        found = merged(iso_cts(fraction), alone)["weight"]
        torch.testing.assert_close(found, merged(iso_c(), alone)["weight"], rtol=0, atol=1e-5)
    assert (merged(iso_cts(0.2), {"weight": task_vectors})["weight"] - common).abs().max() > 0.1


def test_tasks_that_add_nothing_of_their_own_leave_the_common_directions() -> None:
    basis = torch.linalg.qr(random(6, 6)).Q
    matrix = basis[:, :2] @ torch.diag(torch.tensor([3.0, 1.0])) @ basis[:, 2:4].mT
    found = merged(iso_cts(0.5), {"weight": torch.stack([matrix, matrix, matrix])})["weight"]
    torch.testing.assert_close(found, 6 * basis[:, :2] @ basis[:, 2:4].mT, rtol=0, atol=1e-5)  # (9 + 3)/2


def test_more_specific_directions_than_there_are() -> None:
    """n = 5, K = 3, nothing common: round(5/3) = 2 each would be 6."""
    found = merged(iso_cts(0), {"weight": random(3, 5, 5)})["weight"]
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values, values[:1].expand(5))


@pytest.mark.parametrize("make", [iso_c, iso_cts])
def test_other_tensors_are_the_mean_and_packed_ones_are_split_where_asked(make: type) -> None:
    task_vectors = {
        "bias": random(2, 5),
        "conv.weight": random(2, 4, 2, 2, 2),
        "proj": random(2, 6, 6),
        "attn.in_proj_weight": random(2, 30, 10),
        "one": random(2, 1, 1),
    }
    found = merged(make(exclude=["proj"]), task_vectors)
    for key in ("bias", "conv.weight", "proj"):
        torch.testing.assert_close(found[key], task_vectors[key].mean(0))
    torch.testing.assert_close(found["one"], task_vectors["one"].sum(0))
    packed = task_vectors["attn.in_proj_weight"]
    parts = merged(make(split_in_proj=True), task_vectors)["attn.in_proj_weight"]
    for rows in (slice(0, 10), slice(10, 20), slice(20, 30)):
        alone = merged(make(), {"weight": packed[:, rows]})["weight"]
        torch.testing.assert_close(parts[rows], alone)
    assert (parts - found["attn.in_proj_weight"]).abs().max() > 0.1


def test_a_matrix_that_nobody_changed_stays() -> None:
    for method in (iso_c(), iso_cts()):
        assert not merged(method, {"weight": torch.zeros(2, 3, 4)})["weight"].any()


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"common_fraction is from 0 to 1, found {fraction}"):
        iso_cts(fraction)
