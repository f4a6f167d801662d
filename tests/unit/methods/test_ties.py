"""TIES, as a transform and as a merge, against a second implementation by sorting and a matrix worked by hand."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ties as reference
from torch import Tensor
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import TiesMerging
from adamerge.methods.transforms import Ties

AGGREGATIONS = ["sum", "mean", "max"]
WORKED = np.stack([reference.flatten(task_vectors) for task_vectors in reference.WORKED_TASK_VECTORS])


def survivors(bank: ParameterBank, density: float, thresholds: str = "global", zeros: int = 0) -> np.ndarray:
    return flat(bank.transformed(Ties(density, thresholds, zeros).fit(bank)).task_vectors)


def merging(
    density: float, how: str, scaling: float = 1.0, *, thresholds: str = "global", zeros: int = 0
) -> TiesMerging:
    return TiesMerging(
        scaling=scaling,
        grid=(),
        transform=None,
        density=density,
        thresholds=thresholds,
        structural_zeros=zeros,
        aggregation=how,
    )


def merged(bank: ParameterBank, density: float, how: str, scaling: float = 1.0, **options: object) -> np.ndarray:
    weights = merging(density, how, scaling, **options)(bank)
    return flat({key: tensor[None] for key, tensor in weights.items()})[0]


SPLITS = [
    {"a": (10,)},
    {"a": (2, 5)},
    {"b.weight": (2, 3), "a.bias": (4,)},
    {"c": (1, 3), "a": (3, 1, 2), "b": (1,)},
    {f"entry{i}": () for i in range(10)},
]


@pytest.mark.parametrize("shapes", SPLITS, ids=str)
def test_worked_matrix(shapes: Mapping[str, tuple[int, ...]]) -> None:
    bank = bank_of(WORKED, shapes)
    np.testing.assert_array_equal(survivors(bank, reference.WORKED_DENSITY), reference.WORKED_SELECTED)
    for how in AGGREGATIONS:
        np.testing.assert_array_equal(merged(bank, reference.WORKED_DENSITY, how), reference.WORKED_MERGED[how])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_worked_matrix_in_other_dtypes(dtype: torch.dtype) -> None:
    # Every number of the matrix is exact in eight bits.
    bank = bank_of(WORKED, {"b.weight": (2, 3), "a.bias": (4,)}, dtype)
    np.testing.assert_array_equal(survivors(bank, reference.WORKED_DENSITY), reference.WORKED_SELECTED)
    for how in AGGREGATIONS:
        np.testing.assert_array_equal(merged(bank, reference.WORKED_DENSITY, how), reference.WORKED_MERGED[how])


def test_mirrored_task_vectors_give_the_mirrored_merge() -> None:
    # The majority that takes the undecided coordinate 0 is then minus.
    bank = bank_of(-WORKED, {"a": (10,)})
    for how in AGGREGATIONS:
        found = merged(bank, reference.WORKED_DENSITY, how)
        np.testing.assert_array_equal(found, -np.array(reference.WORKED_MERGED[how], dtype=float))


def test_an_even_vote_of_coordinates_leaves_cancelled_ones_empty() -> None:
    # Signs 0, +, -: the majority is 0 too, and nothing agrees with it.
    rows = np.array([[5.0, 1.0, 0.0], [-5.0, 0.0, -1.0]])
    bank = bank_of(rows, {"a": (1,), "b": (2,)})
    np.testing.assert_array_equal(survivors(bank, 1.0), [[0, 1, 0], [0, 0, -1]])
    np.testing.assert_array_equal(reference.ties([{"a": row} for row in rows], 1.0, "sum")[0], [[0, 1, 0], [0, 0, -1]])


def test_theta_0_and_scaling() -> None:
    bank = bank_of(WORKED, {"b.weight": (2, 3), "a.bias": (4,)})
    base = {key: torch.arange(tensor.numel()).float().view_as(tensor) for key, tensor in bank.pretrained.items()}
    shifted = ParameterBank(base, bank.task_vectors, bank.task_names)
    start = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 5])
    expected = start + 0.5 * np.array(reference.WORKED_MERGED["sum"])
    np.testing.assert_array_equal(merged(shifted, reference.WORKED_DENSITY, "sum", scaling=0.5), expected)


# Random matrices

small_integers = st.integers(-3, 3).map(float)
halves = st.floats(-8, 8, width=16, allow_nan=False, allow_subnormal=False)
any_half = st.floats(width=16, allow_nan=False, allow_infinity=False)
densities = st.sampled_from([0.01, 0.05, 0.2, 0.25, 0.5, 0.9, 1.0])


@st.composite
def matrices(draw: st.DrawFn, values: st.SearchStrategy[float]) -> np.ndarray:
    tasks, size = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    return np.array(draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=tasks, max_size=tasks)))


def cut(size: int, first: int) -> dict[str, tuple[int, ...]]:
    """Two tensors, the first 1-D and the second 2-D, or one where the first is all there is."""
    return {"w": (1, size - first), "b": (first,)} if first < size else {"b": (size,)}


@given(
    rows=matrices(small_integers) | matrices(small_integers | halves) | matrices(any_half),
    density=densities,
    data=st.data(),
)
def test_random_matrices(rows: np.ndarray, density: float, data: st.DataObject) -> None:
    size = rows.shape[1]
    bank = bank_of(rows, cut(size, data.draw(st.integers(1, size))))
    experts = [{"all": row} for row in rows]
    found = survivors(bank, density)
    how = data.draw(st.sampled_from(AGGREGATIONS))
    selected, total = reference.ties(experts, density, how)
    np.testing.assert_array_equal(found, selected)
    np.testing.assert_allclose(merged(bank, density, how), total, rtol=1e-6, atol=0)


@given(rows=matrices(st.floats(width=32, min_value=-1e6, max_value=1e6)), density=densities, data=st.data())
def test_the_order_of_tasks_does_not_matter(rows: np.ndarray, density: float, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    shapes = {"a": (rows.shape[1],)}
    np.testing.assert_array_equal(
        survivors(bank_of(rows[list(order)], shapes), density), survivors(bank_of(rows, shapes), density)[list(order)]
    )


def test_sums_that_cancel_in_float32_keep_their_sign() -> None:
    # 2^25 + 1 - 2^25 is 1, but in float32 it is 0 from left to right; the same sum in another order is 1.
    for order in ([0, 1, 2], [0, 2, 1]):
        rows = np.array([[2.0**25, -7.0, -7.0], [1.0, 0.0, 0.0], [-(2.0**25), 0.0, 0.0]])[order]
        selected = reference.ties([{"a": row} for row in rows], 1.0, "sum")[0]
        np.testing.assert_array_equal(survivors(bank_of(rows, {"a": (3,)}), 1.0), selected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_majority_is_counted_exactly(dtype: torch.dtype) -> None:
    # 5001 coordinates are +, 5000 are -: coordinate 0 cancels and so becomes +. (bfloat16 holds neither number.)
    first = np.concatenate([[1.0], np.ones(5001), -np.ones(5000)])
    second = np.concatenate([[-1.0], np.zeros(10001)])
    shapes = {"a": (1,), "b": (5001,), "c": (5000,)}
    found = survivors(bank_of(np.stack([first, second]), shapes, dtype), 1.0)
    np.testing.assert_array_equal(found[:, 0], [1, 0])


def test_density_one_keeps_everything_that_agrees() -> None:
    rows = np.array([[0.0, 1.0, -2.0, 1e-30], [0.0, 3.0, 1.0, 0.0]])
    np.testing.assert_allclose(survivors(bank_of(rows, {"a": (4,)}), 1.0), [[0, 1, -2, 1e-30], [0, 3, 0, 0]], rtol=1e-6)


@given(row=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30, unique_by=abs), density=densities)
def test_one_task_keeps_a_little_more_than_its_density(row: list[float], density: float) -> None:
    found = survivors(bank_of(np.array([row]), {"a": (len(row),)}), density)[0]
    kept = min(len(row), int(density * len(row)) + 1)
    largest = sorted(map(abs, row), reverse=True)[:kept]
    assert sorted((abs(value) for value in found if value), reverse=True) == [value for value in largest if value]


def test_the_bank_stays_and_the_result_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 600, generator=generator).double().numpy()
    bank = bank_of(rows, {"b": (20, 25), "a": (100,)})
    before = flat(bank.task_vectors)
    first = survivors(bank, 0.2)
    np.testing.assert_array_equal(survivors(bank, 0.2), first)
    np.testing.assert_array_equal(flat(bank.task_vectors), before)
    assert 0 < (first != 0).sum() < 0.25 * rows.size

    apply = Ties(0.2, "global", 0).fit(bank)
    assert bank.transformed(apply, in_place=True) is bank
    np.testing.assert_array_equal(flat(bank.task_vectors), first)


# Thresholds per tensor, and zeros that are not merged


def test_thresholds_per_tensor() -> None:
    """By the worked matrix: in b.weight ⌊0.2·6⌋ = 1, so task 0's limit is 2 there, and in a.bias ⌊0.2·4⌋ = 0."""
    bank = bank_of(WORKED, {"b.weight": (2, 3), "a.bias": (4,)})
    found = survivors(bank, 0.2, "tensor")
    expected = np.hstack(
        [reference.select(*elected(reference.trim(part, 0.2))) for part in (WORKED[:, :4], WORKED[:, 4:])]
    )
    np.testing.assert_array_equal(found, expected)
    assert found[0, 6] == 2
    assert survivors(bank, 0.2)[0, 6] == 0
    for how in AGGREGATIONS:
        np.testing.assert_array_equal(merged(bank, 0.2, how, thresholds="tensor"), reference.aggregate(expected, how))


def elected(trimmed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trimmed vectors and signs that take the majority of the worked matrix, +, where they cancel."""
    signs = np.sign(trimmed.sum(axis=0))
    return trimmed, np.where(signs == 0, 1, signs)


@settings(max_examples=40)
@given(rows=matrices(small_integers | halves), density=densities, zeros=st.integers(1, 40), data=st.data())
def test_structural_zeros_are_a_tensor_of_zeros(
    rows: np.ndarray, density: float, zeros: int, data: st.DataObject
) -> None:
    shapes = cut(rows.shape[1], data.draw(st.integers(1, rows.shape[1])))
    padded = np.hstack([rows, np.zeros((len(rows), zeros))])
    expected, total = reference.ties([{"all": row} for row in padded], density, "sum")
    bank = bank_of(rows, shapes)
    np.testing.assert_array_equal(survivors(bank, density, zeros=zeros), expected[:, :-zeros])
    np.testing.assert_allclose(merged(bank, density, "sum", zeros=zeros), total[:-zeros], rtol=1e-6, atol=0)


def test_the_share_of_zeros_of_the_original_keeps_a_quarter_more() -> None:
    # 22.6 % zeros: 20 % of all entries are 25.8 % of the others (SPECS, section 0).
    rows = np.random.default_rng(0).normal(size=(1, 7744))
    bank = bank_of(rows, {"a": (88, 88)})
    assert (survivors(bank, 0.2, zeros=2256) != 0).sum() == 2001
    assert (survivors(bank, 0.2) != 0).sum() == 1549


def test_the_bank_is_read_three_times() -> None:
    """Twice for the thresholds of all tasks, once for the majority; never as a whole."""

    class Counted(Mapping[str, Tensor]):
        reads = 0

        def __getitem__(self, key: str) -> Tensor:
            Counted.reads += 1
            return source[key]

        def __iter__(self):
            return iter(source)

        def __len__(self) -> int:
            return len(source)

    bank = bank_of(WORKED, {"b.weight": (2, 3), "a.bias": (4,)})
    source = bank.task_vectors
    Ties(0.2, "global", 0).fit(ParameterBank(bank.pretrained, Counted(), bank.task_names))
    assert Counted.reads == 3 * len(source)


# Options


@pytest.mark.parametrize("density", [0.0, -0.1, 1.001, 20])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match=r"in \(0, 1\]; found"):
        Ties(density, "global", 0)
    with pytest.raises(ConfigError, match=r"in \(0, 1\]; found"):
        merging(density, "sum")


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown aggregation 'median'\. Choose sum, mean or max"):
        merging(0.2, "median")


def test_unknown_thresholds_and_zeros_that_no_threshold_sees_are_refused() -> None:
    with pytest.raises(ConfigError, match="'global' or per 'tensor', found 'layer'"):
        Ties(0.2, "layer", 0)
    with pytest.raises(ConfigError, match="is a count, 0 or more; found -1"):
        Ties(0.2, "global", -1)
    with pytest.raises(ConfigError, match="Set structural_zeros=0 or thresholds=global"):
        merging(0.2, "sum", thresholds="tensor", zeros=5)


def test_its_record_names_it_and_its_options() -> None:
    expected = {"name": "ties", "density": 0.2, "thresholds": "global", "structural_zeros": 7}
    assert Ties(0.2, "global", 7).to_json() == expected
