"""Low-rank task vectors against a sum of outer products in numpy."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from reference import spectral
from torch import Tensor
from unit.methods.banks import bank_of, random

from adamerge.errors import ConfigError
from adamerge.methods.transforms import LowRank


def low_rank(
    rank_share: float | None = None,
    energy: float | None = None,
    exclude: Sequence[str] = (),
    *,
    split_in_proj: bool = False,
) -> LowRank:
    return LowRank(rank_share, energy, exclude, split_in_proj)


def transformed(transform: LowRank, task_vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    bank = bank_of(task_vectors)
    before = {key: tensor.clone() for key, tensor in bank.task_vectors.items()}
    found = dict(bank.transformed(transform.fit(bank)).task_vectors)
    for key, tensor in found.items():
        assert torch.equal(bank.task_vectors[key], before[key])
        assert tensor.data_ptr() != bank.task_vectors[key].data_ptr()
        assert tensor.dtype == before[key].dtype
        assert tensor.is_contiguous()
    return found


@pytest.mark.parametrize("shape", [(2, 9, 5), (3, 4, 12), (1, 6, 6), (2, 1, 1), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_a_share_of_the_rank(shape: tuple[int, int, int], share: float) -> None:
    task_vectors = random(*shape)
    found = transformed(low_rank(share), {"weight": task_vectors})["weight"]
    rank = max(1, int(share * min(shape[1:])))
    for matrix, own in zip(task_vectors, found, strict=True):
        np.testing.assert_allclose(own, spectral.low_rank(matrix.double().numpy(), rank), rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(own, rtol=1e-4) == rank


def test_worked_matrix() -> None:
    task_vectors = {"weight": torch.tensor([spectral.LOW_RANK_MATRIX])}
    for transform in (low_rank(0.5), low_rank(energy=25 / 26 - 1e-3)):
        found = transformed(transform, task_vectors)["weight"][0]
        torch.testing.assert_close(found, torch.tensor(spectral.LOW_RANK_KEPT), rtol=0, atol=1e-6)
    whole = transformed(low_rank(energy=25 / 26 + 1e-3), task_vectors)["weight"]
    torch.testing.assert_close(whole, task_vectors["weight"], rtol=0, atol=1e-6)


def test_a_share_is_not_cut_by_the_rounding_of_its_product() -> None:
    assert int(0.29 * 100) == 28
    found = transformed(low_rank(0.29), {"weight": random(1, 100, 100)})["weight"]
    assert torch.linalg.matrix_rank(found, rtol=1e-4).tolist() == [29]


def test_the_energy_decides_for_each_task() -> None:
    # Squares 16, 9, 4, 1 of 30: shares .53, .83, .97, 1; and 9 three times and 3 once: .3, .6, .9, 1.
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0**0.5]])
    task_vectors = {"weight": values.diag_embed()}
    for energy, ranks in [(0.5, (1, 2)), (0.55, (2, 2)), (0.84, (3, 3)), (0.96, (3, 4)), (0.99, (4, 4)), (1.0, (4, 4))]:
        found = transformed(low_rank(energy=energy), task_vectors)["weight"]
        assert torch.linalg.matrix_rank(found).tolist() == list(ranks), energy
        left = found.square().sum((1, 2)) / values.square().sum(1)
        assert (left >= energy - 1e-6).all()
    kept = transformed(low_rank(energy=0.55), task_vectors)["weight"][0]
    torch.testing.assert_close(kept, torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])), rtol=0, atol=1e-6)


def test_everything_is_kept_exactly() -> None:
    task_vectors = {"weight": random(2, 5, 4)}
    for transform in (low_rank(1.0), low_rank(energy=1.0)):
        assert torch.equal(transformed(transform, task_vectors)["weight"], task_vectors["weight"])


def test_what_is_not_a_matrix_stays() -> None:
    task_vectors = {
        "bias": random(2, 5),
        "scale": random(2),
        "conv": random(2, 3, 2, 2, 2),
        "proj": random(2, 4, 4),
        "w": random(2, 4, 4, seed=1),
    }
    found = transformed(low_rank(0.25, exclude=["pro*"]), task_vectors)
    for key in ("bias", "scale", "conv", "proj"):
        assert torch.equal(found[key], task_vectors[key])
    assert torch.linalg.matrix_rank(found["w"]).tolist() == [1, 1]
    with pytest.raises(ConfigError, match="'q' of exclude matches none"):
        transformed(low_rank(0.25, exclude=["q"]), task_vectors)


def test_packed_projections() -> None:
    task_vectors = {"attn.in_proj_weight": random(2, 12, 4)}
    found = transformed(low_rank(0.25, split_in_proj=True), task_vectors)["attn.in_proj_weight"]
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        alone = transformed(low_rank(0.25), {"w": task_vectors["attn.in_proj_weight"][:, rows]})["w"]
        torch.testing.assert_close(found[:, rows], alone)
    assert torch.linalg.matrix_rank(transformed(low_rank(0.25), task_vectors)["attn.in_proj_weight"]).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    task_vectors = random(2, 6, 5).to(dtype)
    found = transformed(low_rank(0.4), {"weight": task_vectors})["weight"]
    expected = spectral.low_rank(task_vectors[0].double().numpy(), 2)
    atol = 1e-12 if dtype == torch.float64 else 0.02
    np.testing.assert_allclose(found[0].double(), expected, rtol=0, atol=atol)


def test_zeros_stay_zeros() -> None:
    for transform in (low_rank(0.5), low_rank(energy=0.5)):
        assert not transformed(transform, {"weight": torch.zeros(2, 4, 3)})["weight"].any()


@pytest.mark.parametrize("given", [(None, None), (0.1, 0.9), (0, None), (1.1, None), (None, 0.0), (None, 1.5)])
def test_one_of_two_is_given(given: tuple[float | None, float | None]) -> None:
    with pytest.raises(ConfigError, match="by rank_share or by energy"):
        low_rank(*given)


def test_its_record_names_it_and_its_options() -> None:
    assert low_rank(0.1, exclude=("proj",)).to_json() == {
        "name": "low_rank",
        "rank_share": 0.1,
        "energy": None,
        "exclude": ["proj"],
        "split_in_proj": False,
    }
