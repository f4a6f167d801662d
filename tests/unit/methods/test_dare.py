"""DARE: its masks against a second implementation of the draws, its mean over seeds, and what a mask depends on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import dare as reference
from torch import Tensor
from unit.flat_bank import bank_of

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.transforms import Dare

SHAPES = {"w": (4, 5), "b": (3,), "one": (), "conv": (2, 1, 3)}
ROWS = np.random.default_rng(0).normal(size=(3, 30))


def dare(**options: object) -> Dare:
    return Dare(**{"drop": 0.5, "rescale": True, "masks": "own", "matrices_only": False, "seed": 0, **options})


def dropped(bank: ParameterBank, **options: object) -> dict[str, Tensor]:
    return dict(bank.transformed(dare(**options).fit(bank)).task_vectors)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("masks", ["own", "shared"])
@pytest.mark.parametrize(("drop", "seed"), [(0.5, 0), (0.9, 3), (0.1, 2**40)])
def test_against_the_second_implementation(masks: str, drop: float, seed: int) -> None:
    bank = bank_of(ROWS, SHAPES, torch.float64)
    for key, found in dropped(bank, masks=masks, drop=drop, seed=seed).items():
        rows = bank.task_vectors[key].reshape(3, -1).numpy()
        expected = reference.dare(rows, bank.task_names, key, drop, seed, shared=masks == "shared")
        np.testing.assert_allclose(found.reshape(3, -1).numpy(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("drop", [0.5, 0.9])
def test_the_mean_over_seeds_is_the_identity(drop: float) -> None:
    """Within five standard errors: of τ·m/(1 - p) over n seeds |τ|·√(p / ((1 - p)·n))."""
    bank = bank_of(ROWS, {"w": (5, 6)}, torch.float64)
    seeds = 1500
    total = sum(dropped(bank, drop=drop, seed=seed)["w"] for seed in range(seeds))
    error = (total / seeds - bank.task_vectors["w"]).abs() / bank.task_vectors["w"].abs()
    assert error.max() < 5 * (drop / (1 - drop) / seeds) ** 0.5


def test_without_rescaling_entries_stay_as_they_are() -> None:
    bank = bank_of(ROWS, {"w": (5, 6)})
    found = dropped(bank, rescale=False)["w"]
    kept = found != 0
    assert torch.equal(found, bank.task_vectors["w"] * kept)
    assert torch.equal(dropped(bank)["w"], found * 2)
    assert 0.3 < kept.float().mean() < 0.7


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(drop: float) -> None:
    """Within four standard errors of a share of 200,000, in every task's own mask; two masks agree by chance alone."""
    bank = bank_of(np.ones((2, 100_000)), {"w": (100, 1000)})
    masks = dropped(bank, drop=drop)["w"] != 0
    assert abs(masks.float().mean() - (1 - drop)) < 4 * (drop * (1 - drop) / 200_000) ** 0.5
    agreement = 1 - 2 * drop * (1 - drop)
    assert abs((masks[0] == masks[1]).float().mean() - agreement) < 4 * (agreement * (1 - agreement) / 100_000) ** 0.5


def test_one_mask_for_all() -> None:
    masks = dropped(bank_of(np.ones((3, 30)), {"w": (5, 6)}), masks="shared")["w"] != 0
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert 0 < masks[0].sum() < 30


@pytest.mark.parametrize("masks", ["own", "shared"])
def test_a_mask_depends_on_seed_key_and_task_alone(masks: str) -> None:
    """Neither on the order of the tasks or the keys, nor on the others, nor on the dtype."""
    bank = bank_of(ROWS, SHAPES)
    expected = dropped(bank, masks=masks)

    order = [2, 0, 1]
    task_vectors = {key: bank.task_vectors[key][order] for key in reversed(list(SHAPES))}
    other = ParameterBank(bank.pretrained, task_vectors, tuple(bank.task_names[task] for task in order))
    assert_equal(dropped(other, masks=masks), {key: expected[key][order] for key in task_vectors})

    alone = ParameterBank(bank.pretrained, {"b": bank.task_vectors["b"][1:2]}, bank.task_names[1:2])
    assert_equal(dropped(alone, masks=masks), {"b": expected["b"][1:2]})

    wide = dropped(bank_of(ROWS, SHAPES, torch.float64), masks=masks)
    assert_equal({key: tensor != 0 for key, tensor in wide.items()}, {key: t != 0 for key, t in expected.items()})


def test_seeds_keys_and_tasks_have_masks_of_their_own() -> None:
    bank = bank_of(np.ones((2, 80)), {"a": (40,), "b": (40,)})
    first = dropped(bank)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"][0], first["a"][1])
    assert not torch.equal(first["a"], dropped(bank, seed=1)["a"])
    renamed = replace(bank, task_names=("task0", "another"))
    assert torch.equal(dropped(renamed)["a"][0], first["a"][0])
    assert not torch.equal(dropped(renamed)["a"][1], first["a"][1])


@pytest.mark.gpu
def test_masks_are_the_same_on_a_gpu() -> None:
    bank = bank_of(ROWS, SHAPES)
    found = {key: tensor.cpu() for key, tensor in dropped(bank.to("cuda")).items()}
    assert_equal(found, dropped(bank))


def test_matrices_only() -> None:
    bank = bank_of(ROWS, SHAPES)
    found, everywhere = dropped(bank, matrices_only=True), dropped(bank)
    assert_equal(found, {**dict(bank.task_vectors), "w": everywhere["w"]})
    assert not torch.equal(found["w"], bank.task_vectors["w"])


def test_nothing_dropped_is_the_identity() -> None:
    bank = bank_of(ROWS, SHAPES)
    assert_equal(dropped(bank, drop=0), dict(bank.task_vectors))


def test_the_bank_stays_unless_it_is_told_otherwise() -> None:
    bank = bank_of(ROWS, SHAPES, torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in bank.task_vectors.items()}
    found = dropped(bank)
    assert_equal(dict(bank.task_vectors), before)
    for tensor in dropped(bank, matrices_only=True).values():
        tensor.fill_(7)
    assert_equal(dict(bank.task_vectors), before)
    bank.transformed(dare().fit(bank), in_place=True)
    assert_equal(dict(bank.task_vectors), found)


def test_options_out_of_range_are_refused() -> None:
    for drop in (-0.1, 1, 90):
        with pytest.raises(ConfigError, match=rf"in \[0, 1\); found {drop}"):
            dare(drop=drop)
    with pytest.raises(ConfigError, match="'own' or 'shared' by all, found 'none'"):
        dare(masks="none")


def test_its_record_names_it_and_its_options() -> None:
    expected = {"drop": 0.5, "rescale": True, "masks": "own", "matrices_only": False, "seed": 4}
    assert dare(seed=4).to_json() == {"name": "dare", **expected}
