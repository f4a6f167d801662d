"""Fisher merging against an example worked by hand, loops over entries, and FusionBench's formula."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import fisher as reference
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods import Context
from adamerge.methods.static import Average, FisherMerging
from adamerge.statistics import Fisher

WORKED, TASK_VECTORS = np.array(reference.FISHER), np.array(reference.TASK_VECTORS)
PLAIN: dict[str, Any] = {
    "weights": None,
    "normalize": False,
    "floor": 0.0,
    "floor_unit": "mean",
    "floor_rule": "max",
    "floor_tasks": None,
}
SPLITS = [{"a": (4,)}, {"b": (3,), "a": (1,)}, {"b": (1, 2), "a": ()} | {"c": (1, 1)}]


def merging(**options: Any) -> FisherMerging:
    fisher = Fisher(form="exact", share=1, batch_size=1, images_per_task=None, seed=0)
    return FisherMerging(**({"fisher": fisher, "scaling": 1.0, "grid": (), "transform": None} | PLAIN | options))


def context_of(fisher: np.ndarray, bank: ParameterBank) -> Context:
    return Context(bank_of(fisher, bank.shapes).task_vectors)


def merged(
    fisher: np.ndarray, task_vectors: np.ndarray, shapes: Mapping[str, tuple[int, ...]] | None = None, **options: Any
) -> np.ndarray:
    bank = bank_of(task_vectors, shapes or {"a": task_vectors.shape[1:]})
    found = merging(**options)(bank, context_of(fisher, bank))
    return flat({key: tensor[None] for key, tensor in found.items()})[0]


@pytest.mark.parametrize("shapes", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "plain"),
        ({"weights": [3, 1]}, "weights"),
        ({"weights": {"task1": 1, "task0": 3}}, "weights"),
        ({"floor": 1, "floor_unit": "absolute"}, "max"),
        ({"floor": 1, "floor_unit": "absolute", "floor_rule": "add"}, "add"),
        ({"floor": 0.5}, "mean"),
        ({"floor": 1, "floor_unit": "absolute", "floor_tasks": ["task0"]}, "target"),
    ],
    ids=str,
)
def test_worked_example(shapes: Mapping[str, tuple[int, ...]], options: dict[str, Any], expected: str) -> None:
    found = merged(WORKED, TASK_VECTORS, shapes, **options)
    np.testing.assert_allclose(found, reference.FISHER_MERGED[expected], rtol=1e-6)


def test_scaling_and_theta_0() -> None:
    bank = bank_of(TASK_VECTORS, {"a": (4,)})
    shifted = ParameterBank({"a": torch.arange(4.0)}, bank.task_vectors, bank.task_names)
    found = merging(scaling=0.5)(shifted, context_of(WORKED, bank))["a"].numpy()
    np.testing.assert_allclose(found, np.arange(4) + 0.5 * np.array(reference.FISHER_MERGED["plain"]), rtol=1e-6)


def test_norms_are_of_all_tensors_together() -> None:
    # ‖F_a‖ = √10 and ‖F_b‖ = √6: entry 0 is (3/√10 - 1/√6) / (3/√10 + 1/√6), and entry 1 (2/√10) / (1/√10 + 1/√6).
    first, second = 10**-0.5, 6**-0.5
    expected = [(3 * first - second) / (3 * first + second), 2 * first / (first + second), 1, 6]
    for shapes in SPLITS:
        np.testing.assert_allclose(merged(WORKED, TASK_VECTORS, shapes, normalize=True), expected, rtol=1e-6)


numbers = st.sampled_from([0.0, 0.0, 1e-12, 0.25, 1.0, 3.0])


@given(
    fisher=st.lists(st.lists(numbers, min_size=5, max_size=5).filter(any), min_size=3, max_size=3).map(np.array),
    weights=st.lists(st.integers(0, 3), min_size=3, max_size=3).filter(any),
    normalize=st.booleans(),
    floor=st.sampled_from([0, 1e-6, 0.5]),
    unit=st.sampled_from(["mean", "absolute"]),
    rule=st.sampled_from(["max", "add"]),
    floored=st.sets(st.integers(0, 2)),
)
def test_all_options_together_are_the_loop_over_entries(
    fisher: np.ndarray, weights: list[int], normalize: bool, floor: float, unit: str, rule: str, floored: set[int]
) -> None:
    task_vectors = np.random.default_rng(0).normal(size=(3, 5))
    found = merged(
        fisher, task_vectors, {"b": (2, 1), "a": (3,)}, weights=weights, normalize=normalize, floor=floor,
        floor_unit=unit, floor_rule=rule, floor_tasks=[f"task{index}" for index in floored],
    )  # fmt: skip
    options = {"weights": weights, "normalize": normalize, "floor": floor, "unit": unit, "rule": rule}
    expected = reference.merge(fisher, task_vectors, floored=sorted(floored), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_fusion_benchs_merge_is_an_option() -> None:
    """But for the 1e-6 that it adds to norms, which are far larger here."""
    generator = np.random.default_rng(1)
    fisher, task_vectors = generator.gamma(0.3, size=(3, 200)), generator.normal(size=(3, 200))
    options = {"normalize": True, "floor": 1e-6, "floor_unit": "absolute", "floor_rule": "add"}
    found = merged(fisher, task_vectors, {"a": (10, 20)}, **options)
    np.testing.assert_allclose(found, reference.fusion_bench(fisher, task_vectors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_equal_information_gives_the_mean(size: float, normalize: bool) -> None:
    bank = bank_of(TASK_VECTORS, {"b": (2,), "a": (2,)})
    found = merging(normalize=normalize, floor=1e-6)(bank, context_of(np.full((2, 4), size), bank))
    mean = Average(scaling=1.0, grid=(), transform=None)(bank)
    for key, tensor in mean.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=0)


def test_an_expert_that_is_certain_of_everything_has_no_say() -> None:
    fisher = np.array([[0.0] * 4, [1.0, 2.0, 0.0, 1.0]])
    for normalize in (True, False):
        found = merged(fisher, TASK_VECTORS, normalize=normalize)
        np.testing.assert_allclose(found, [-1, 0, 2, 8], rtol=1e-6)  # and nobody has at entry 2: (3 + 1)/2


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [1e-36, 1e37])
def test_information_may_have_any_size(size: float, normalize: bool) -> None:
    found = merged(size * WORKED, TASK_VECTORS, normalize=normalize)
    np.testing.assert_allclose(found, merged(WORKED, TASK_VECTORS, normalize=normalize), rtol=1e-5)


def test_an_absolute_floor_makes_small_information_the_mean_and_a_relative_one_does_not() -> None:
    small = 1e-10 * WORKED
    absolute = merged(small, TASK_VECTORS, floor=1e-6, floor_unit="absolute")
    np.testing.assert_allclose(absolute, TASK_VECTORS.mean(0), rtol=1e-6)
    relative = merged(small, TASK_VECTORS, floor=1e-6)
    np.testing.assert_allclose(relative[:2], reference.FISHER_MERGED["plain"][:2], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    bank = bank_of(TASK_VECTORS, {"a": (4,)}, dtype)
    found = merging()(bank, context_of(WORKED, bank))["a"]
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.tensor(reference.FISHER_MERGED["plain"], dtype=dtype))


def test_in_float64_is_as_exact() -> None:
    generator = np.random.default_rng(4)
    fisher, task_vectors = generator.gamma(0.3, size=(3, 50)), generator.normal(size=(3, 50))
    bank = bank_of(task_vectors, {"a": (50,)}, torch.float64)
    found = merging()(bank, Context(bank_of(fisher, bank.shapes, torch.float64).task_vectors))["a"]
    np.testing.assert_allclose(found, (fisher * task_vectors).sum(0) / fisher.sum(0), rtol=1e-12, atol=1e-14)


def test_the_statistic_and_the_bank_stay_as_they_are() -> None:
    bank = bank_of(TASK_VECTORS, {"a": (4,)})
    context = context_of(WORKED, bank)
    merging(floor=1, normalize=True)(bank, context)
    np.testing.assert_array_equal(flat(context.statistics), WORKED)
    np.testing.assert_array_equal(flat(bank.task_vectors), TASK_VECTORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": -1}, "floor is at least 0, found -1"),
        ({"floor": float("nan")}, "floor is at least 0, found nan"),
        ({"floor_unit": "median"}, "'mean' or 'absolute', found 'median'"),
        ({"floor_rule": "min"}, "'max' or 'add', found 'min'"),
        ({"floor_tasks": ["mnist"]}, "floor_tasks names mnist, not among the tasks that are merged: task0, task1"),
        ({"weights": [1]}, "1 weights for 2 tasks"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(WORKED, TASK_VECTORS, **options)


def test_tensors_without_information_are_named() -> None:
    bank = bank_of(TASK_VECTORS, {"a": (2,), "b": (2,)})
    context = Context({"a": bank.task_vectors["a"].abs()})
    with pytest.raises(ConfigError, match="no Fisher information of b"):
        merging()(bank, context)
