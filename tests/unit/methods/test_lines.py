"""LiNeS: end points, numbers worked by hand, and the same schedule as a learner's start."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unit.methods.banks import bank_of, random, vector_of

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Partition, merge
from adamerge.methods.static import LinesMerging, TaskArithmetic, TiesMerging
from adamerge.methods.transforms import Dare, Lines

BLOCKS = [f"visual.transformer.resblocks.{block}.mlp.c_fc.bias" for block in range(3)]
FIRST, LAST = "visual.conv1.weight", "visual.proj"
TASK_ARITHMETIC = TaskArithmetic(scaling=1.0, grid=(), transform=None)
TIES = TiesMerging(
    density=0.5, thresholds="global", structural_zeros=0, aggregation="mean", scaling=7.0, grid=(), transform=None
)


def lines(**options: object) -> LinesMerging:
    options = {"merging": TASK_ARITHMETIC, "alpha": None, "embedding_depth": 0.0, "output_depth": 0.0, **options}
    return LinesMerging(**{"scaling": 0.5, "grid": (), "transform": None, **options})  # type: ignore[arg-type]


def bank(num_tasks: int = 2) -> ParameterBank:
    keys = [FIRST, *BLOCKS, LAST]
    return bank_of({key: random(num_tasks, 4, seed=seed) for seed, key in enumerate(keys)})


def summed(of: ParameterBank, key: str) -> Tensor:
    return of.task_vectors[key].sum(0)


def test_worked_by_hand() -> None:
    # Two tasks, α = 1/2 and β = 1/2: blocks 0, 1, 2 are scaled by 0.5, 0.75, 1, everything else by 0.5.
    given = {key: torch.tensor([[4.0], [8.0]]) for key in [FIRST, *BLOCKS, LAST]}
    found = vector_of(lines(), bank_of(given))
    assert {key: float(value) for key, value in found.items()} == {
        FIRST: 6.0, BLOCKS[0]: 6.0, BLOCKS[1]: 9.0, BLOCKS[2]: 12.0, LAST: 6.0,
    }  # fmt: skip


@given(st.integers(1, 4), st.floats(0, 2))
def test_end_points(num_tasks: int, beta: float) -> None:
    given = bank(num_tasks)
    found = vector_of(lines(scaling=beta), given)
    torch.testing.assert_close(found[BLOCKS[0]], summed(given, BLOCKS[0]) / num_tasks)
    torch.testing.assert_close(found[BLOCKS[2]], summed(given, BLOCKS[2]) * (1 / num_tasks + beta))
    mean = vector_of(lines(scaling=0.0), given)
    for key in mean:
        torch.testing.assert_close(mean[key], summed(given, key) / num_tasks)


def test_alpha_and_the_depths_outside_of_blocks_are_options() -> None:
    given = bank()
    found = vector_of(lines(alpha=0.2, embedding_depth=0.5, output_depth=1.0), given)
    for key, scale in ((FIRST, 0.2 + 0.25), (BLOCKS[0], 0.2), (BLOCKS[1], 0.45), (BLOCKS[2], 0.7), (LAST, 0.7)):
        torch.testing.assert_close(found[key], scale * summed(given, key))


def test_alpha_of_another_method_makes_the_first_block_as_large_as_the_mean_is() -> None:
    given = bank(3)
    plain = vector_of(TiesMerging(**{**vars(TIES), "scaling": 1.0}), given)
    sums = sum(float(summed(given, key).abs().sum()) for key in plain)
    alpha = sums / sum(float(tensor.abs().sum()) for tensor in plain.values()) / 3
    found = vector_of(lines(merging=TIES, scaling=0.4), given)  # whose own scaling takes no part
    for key, scale in ((FIRST, alpha), (BLOCKS[0], alpha), (BLOCKS[1], alpha + 0.2), (BLOCKS[2], alpha + 0.4)):
        torch.testing.assert_close(found[key], scale * plain[key])


def test_a_transform_may_be_of_either_method() -> None:
    given = bank()
    drop = Dare(drop=0.5, rescale=True, masks="own", matrices_only=False, seed=0)
    within = lines(merging=TaskArithmetic(scaling=1.0, grid=(), transform=drop))
    found, expected = vector_of(lines(transform=drop), given), vector_of(within, given)
    plain = vector_of(lines(), given)
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not all(torch.equal(found[key], plain[key]) for key in found)


def test_a_search_offers_every_beta_of_the_grid() -> None:
    given = bank()
    found = list(lines(scaling="search", grid=[0.1, 0.6]).candidates(given))
    assert [candidate.scaling for candidate, _ in found] == [0.1, 0.6]
    for candidate, merged in found:
        again = vector_of(lines(scaling=candidate.scaling), given)
        assert all(torch.equal(merged[key], again[key]) for key in again)
    with pytest.raises(ConfigError, match="not been searched"):
        lines(scaling="search", grid=[0.1])(given)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_before_a_learner_it_is_the_start_of_its_coefficients(alpha: float | None) -> None:
    given = bank(4)
    apply = Lines(alpha, 0.5, 0.0, 0.0).fit(given)
    transformed = given.transformed(apply)
    partition = Partition.build("tensor", given.shapes)
    base = 1 / 4 if alpha is None else alpha
    depth = {BLOCKS[1]: 0.5, BLOCKS[2]: 1.0}
    schedule = torch.stack([torch.full((4,), base + 0.5 * depth.get(key, 0.0)) for key in given.pretrained], dim=1)
    for bank_, coefficients in ((transformed, torch.ones(4, partition.num_groups)), (given, schedule)):
        out = merge(bank_, coefficients, partition)
        for key, merged in vector_of(lines(alpha=base), given).items():
            torch.testing.assert_close(out[key], merged)


def test_one_block_is_the_first() -> None:
    given = bank_of({BLOCKS[0]: random(2, 4)})
    torch.testing.assert_close(vector_of(lines(), given)[BLOCKS[0]], summed(given, BLOCKS[0]) / 2)


def test_nothing_merged_is_nothing() -> None:
    found = vector_of(lines(), bank_of({key: torch.zeros(2, 3) for key in BLOCKS}))
    assert not any(tensor.any() for tensor in found.values())


def test_a_bank_without_blocks_is_refused() -> None:
    for refused in (lines(), Lines(None, 0.5, 0.0, 0.0).fit):
        with pytest.raises(ConfigError, match="none of the 1 merged tensors belongs to a transformer block"):
            refused(bank_of({LAST: random(2, 4)}))


def test_its_record_names_it_and_its_options() -> None:
    expected = {"name": "lines", "alpha": None, "beta": 0.5, "embedding_depth": 0.0, "output_depth": 1.0}
    assert Lines(None, 0.5, 0.0, 1.0).to_json() == expected
