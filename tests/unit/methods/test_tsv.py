"""TSV-Merge and R-TSVM against the published procedure in numpy, and a matrix worked by hand."""

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
from adamerge.methods.matrices import svd
from adamerge.methods.static import ReweightedTsvMerging, TsvMerging
from adamerge.methods.static.tsv import join


def tsv(exclude: Sequence[str] = (), *, split_in_proj: bool = False) -> TsvMerging:
    return TsvMerging(exclude=exclude, split_in_proj=split_in_proj, scaling=1, grid=(), transform=None)


def reweighted(deviations: float = 3, weight: float = 0.5, negligible: float = 0.1) -> ReweightedTsvMerging:
    return ReweightedTsvMerging(
        outlier_deviations=deviations,
        outlier_weight=weight,
        negligible=negligible,
        exclude=(),
        split_in_proj=False,
        scaling=1,
        grid=(),
        transform=None,
    )


def merged(method: TsvMerging | ReweightedTsvMerging, task_vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return vector_of(method, bank_of(task_vectors))


def test_worked_matrix() -> None:
    task_vectors = torch.tensor(spectral.TSV_TASK_VECTORS)
    bias = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    found = merged(tsv(), {"weight": task_vectors, "bias": bias})
    torch.testing.assert_close(found["weight"], torch.tensor(spectral.TSV_MERGED))
    assert found["bias"].tolist() == [2, 0]
    reference = spectral.tsv_merge([np.array(matrix) for matrix in spectral.TSV_TASK_VECTORS])
    np.testing.assert_allclose(reference, spectral.TSV_MERGED, rtol=1e-12)


def spectral_arrays(task_vectors: Tensor) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in task_vectors]


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 5, 9), (3, 12, 12), (4, 13, 30), (3, 2, 8)], ids=str)
def test_random_matrices(shape: tuple[int, int, int]) -> None:
    """Also where the tasks do not divide the smaller side, and where there are more of them."""
    task_vectors = random(*shape)
    found = merged(tsv(), {"weight": task_vectors})["weight"]
    expected = spectral.tsv_merge(spectral_arrays(task_vectors))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    wide = merged(tsv(), {"weight": task_vectors.double()})["weight"]
    np.testing.assert_allclose(wide.numpy(), expected, rtol=0, atol=1e-12)


def test_one_task_gives_its_matrix() -> None:
    for shape in [(4, 4), (3, 8), (9, 2), (1, 1)]:
        task_vectors = random(1, *shape)
        assert torch.equal(merged(tsv(), {"weight": task_vectors})["weight"], task_vectors[0])
        whole = join([svd(task_vectors[0])])  # without the short cut
        torch.testing.assert_close(whole, task_vectors[0], rtol=0, atol=1e-6)


def test_tasks_in_orthogonal_directions_are_summed() -> None:
    basis = torch.linalg.qr(random(6, 6)).Q
    first = 3 * basis[:, :1] @ basis[:, :1].mT
    second = 2 * basis[:, 1:3] @ basis[:, 3:5].mT
    found = merged(tsv(), {"weight": torch.stack([first, second])})["weight"]
    torch.testing.assert_close(found, first + second, rtol=0, atol=1e-6)


def test_equal_tasks_give_one_of_them_cut_down() -> None:
    """U has half the rank of its columns: no direction is made up for the other half."""
    matrix = random(1, 8, 6)
    found = merged(tsv(), {"weight": matrix.expand(2, 8, 6)})["weight"]
    expected = spectral.low_rank(matrix[0].double().numpy(), 3)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_a_task_that_left_a_matrix_alone_has_no_say() -> None:
    matrices = random(2, 9, 9)
    with_zero = torch.stack([matrices[0], torch.zeros(9, 9), matrices[1]])
    found = merged(tsv(), {"weight": with_zero})["weight"]
    expected = spectral.tsv_merge(spectral_arrays(matrices), [3, 3])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_other_tensors_are_the_mean() -> None:
    task_vectors = {
        "bias": random(3, 5),
        "scale": random(3),
        "conv.weight": random(3, 4, 2, 2, 2),
        "token": random(3, 1, 4, 5),
        "proj": random(3, 6, 6),
    }
    found = merged(tsv(["pro*"]), task_vectors)
    assert list(found) == list(task_vectors)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, task_vectors[key].mean(0))
    assert (merged(tsv(), task_vectors)["proj"] - found["proj"]).abs().max() > 0.1


def test_packed_projections() -> None:
    task_vectors = random(2, 12, 4)
    whole = merged(tsv(), {"attn.in_proj_weight": task_vectors})["attn.in_proj_weight"]
    parts = merged(tsv(split_in_proj=True), {"attn.in_proj_weight": task_vectors})["attn.in_proj_weight"]
    np.testing.assert_allclose(whole.numpy(), spectral.tsv_merge(spectral_arrays(task_vectors)), rtol=0, atol=1e-5)
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        expected = spectral.tsv_merge(spectral_arrays(task_vectors[:, rows]))
        np.testing.assert_allclose(parts[rows].numpy(), expected, rtol=0, atol=1e-5)


def test_the_singular_values_of_the_merge_are_the_kept_ones() -> None:
    task_vectors = random(3, 12, 15)
    found = merged(tsv(), {"weight": task_vectors})["weight"]
    kept = torch.cat([torch.linalg.svdvals(matrix)[:4] for matrix in task_vectors]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(found), kept)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), data=st.data())
def test_it_is_finite_and_bounded_for_whole_numbers(shape: tuple[int, int, int], data: st.DataObject) -> None:
    size = shape[0] * shape[1] * shape[2]
    entries = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    task_vectors = torch.tensor(entries, dtype=torch.float32).view(shape)
    for method in (tsv(), reweighted()):
        found = merged(method, {"weight": task_vectors})["weight"]
        largest = torch.linalg.matrix_norm(task_vectors, ord=2).max()
        assert torch.linalg.matrix_norm(found, ord=2) <= largest * (1 + 1e-5)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'text_projection' of exclude matches none"):
        merged(tsv(["text_projection"]), {"weight": random(2, 3, 3)})


# R-TSVM


def test_worked_matrix_of_reweighted_tasks() -> None:
    task_vectors = torch.tensor(spectral.R_TSVM_TASK_VECTORS)
    found = merged(reweighted(*spectral.R_TSVM_OPTIONS), {"weight": task_vectors})["weight"]
    torch.testing.assert_close(found, torch.tensor(spectral.R_TSVM_MERGED), rtol=0, atol=2e-6)
    reference = spectral.reweighted_tsv_merge(
        [np.array(matrix) for matrix in spectral.R_TSVM_TASK_VECTORS], *spectral.R_TSVM_OPTIONS
    )
    np.testing.assert_allclose(reference, spectral.R_TSVM_MERGED, rtol=0, atol=1e-12)


def test_one_reweighted_task_keeps_its_matrix_but_for_outliers() -> None:
    matrix = torch.tensor([[[8.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]])
    found = merged(reweighted(deviations=1, weight=0.25), {"weight": matrix})["weight"]
    assert torch.equal(found, torch.diag(torch.tensor([2.0, 2.0, 2.0])))
    assert torch.equal(merged(reweighted(weight=1), {"weight": matrix})["weight"], matrix[0])


def test_a_task_that_left_a_matrix_alone_gets_no_rank() -> None:
    matrices = random(2, 9, 9)
    with_zero = torch.stack([matrices[0], torch.zeros(9, 9), matrices[1]])
    method = reweighted(weight=1, negligible=0)
    found = merged(method, {"weight": with_zero})["weight"]
    np.testing.assert_allclose(found.numpy(), spectral.tsv_merge(spectral_arrays(matrices), [4, 4]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("deviations", "weight", "negligible"), [(3, 0.5, 0.1), (1, 0, 0.5), (0, 2, 1)])
def test_reweighted(deviations: float, weight: float, negligible: float) -> None:
    task_vectors = random(3, 14, 12) * torch.tensor([1.0, 0.1, 10.0]).view(3, 1, 1)
    task_vectors[0] *= random(14, 12, seed=5).relu() > 0.5  # thinner than the others
    task_vectors[1, 3, 4] = 5
    found = merged(reweighted(deviations, weight, negligible), {"weight": task_vectors, "bias": random(3, 2)})
    expected = spectral.reweighted_tsv_merge(spectral_arrays(task_vectors), deviations, weight, negligible)
    np.testing.assert_allclose(found["weight"].numpy(), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(found["bias"], random(3, 2).mean(0))


def test_each_option_of_the_reweighted_merge_changes_it() -> None:
    task_vectors = random(2, 14, 12).pow(3)
    task_vectors[0, :, :6] *= 0.01
    task_vectors[0, :, 6:] += 1
    plain = merged(reweighted(), {"weight": task_vectors})["weight"]
    for options in [{"deviations": 1}, {"weight": 0.1}, {"negligible": 0.9}]:
        assert (merged(reweighted(**options), {"weight": task_vectors})["weight"] - plain).abs().max() > 1e-3


def test_dense_tasks_without_outliers_are_merged_as_by_tsv() -> None:
    task_vectors = random(3, 9, 7)
    found = merged(reweighted(weight=1, negligible=0), {"weight": task_vectors})["weight"]
    assert torch.equal(found, merged(tsv(), {"weight": task_vectors})["weight"])
    signs = 0.1 * random(3, 9, 7).sign()  # one magnitude: no outlier, whatever its rounding
    found = merged(reweighted(deviations=0), {"weight": signs})["weight"]
    assert torch.equal(found, merged(tsv(), {"weight": signs})["weight"])


def test_negative_options_are_refused() -> None:
    for option in ("deviations", "weight", "negligible"):
        with pytest.raises(ConfigError, match=rf"{option}.* is at least 0, found -1"):
            reweighted(**{option: -1})
