"""OTA and FFG against an example worked by hand and loops over entries with sorting."""

import json
from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import fisher as reference
from unit.flat_bank import bank_of, flat

from adamerge.errors import ConfigError
from adamerge.methods import Context
from adamerge.methods.static import FisherMerging, TaskArithmetic
from adamerge.methods.transforms import Consensus, Ota
from adamerge.methods.transforms import ota as module
from adamerge.statistics import Moments

CURVATURE, TASK_VECTORS = np.array(reference.CURVATURE), np.array(reference.CURVED_TASK_VECTORS)
PLAIN: dict[str, Any] = {
    "exponent": 0.5,
    "epsilon": 0.0,
    "density": 0.4,
    "thresholds": None,
    "normalize": True,
    "masked": "base",
    "rank_one": False,
}
SPLITS = [{"a": (5,)}, {"b": (2, 2), "a": ()}, {"b": (1,), "a": (2, 1, 2)}]


def ota(**options: Any) -> Ota:
    return Ota(**({"curvature": Moments({})} | PLAIN | options))


def merged(
    curvature: np.ndarray, task_vectors: np.ndarray, shapes: Mapping[str, tuple[int, ...]] | None = None, **options: Any
) -> np.ndarray:
    bank = bank_of(task_vectors, shapes or {"a": task_vectors.shape[1:]})
    merging = TaskArithmetic(scaling=1.0, grid=(), transform=ota(**options))
    found = merging(bank, Context(bank_of(curvature, bank.shapes).task_vectors))
    return flat({key: tensor[None] for key, tensor in found.items()})[0]


@pytest.mark.parametrize("shapes", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "base"),
        ({"masked": "average"}, "average"),
        ({"exponent": 0}, "equal"),
        ({"density": 1}, "all"),
        ({"density": None, "thresholds": {"task0": 4, "task1": 4.1}}, "thresholds"),
        ({"density": None, "thresholds": 4}, "base"),
        ({"density": None, "thresholds": 0}, "all"),
    ],
    ids=str,
)
def test_worked_example(shapes: Mapping[str, tuple[int, ...]], options: dict[str, Any], expected: str) -> None:
    found = merged(CURVATURE, TASK_VECTORS, shapes, **options)
    np.testing.assert_allclose(found, reference.OTA_MERGED[expected], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shapes", SPLITS, ids=str)
def test_masks_alone_are_what_ffg_keeps(shapes: Mapping[str, tuple[int, ...]]) -> None:
    bank = bank_of(TASK_VECTORS, shapes)
    context = Context(bank_of(CURVATURE, shapes).task_vectors)
    transform = ota(exponent=0.0, normalize=False)
    found = flat(bank.transformed(transform.fit(bank, context)).task_vectors)
    saliency = CURVATURE * TASK_VECTORS**2
    kept = saliency >= np.sort(saliency, axis=1)[:, -2:-1]  # two of five of each task, as derived in the reference
    np.testing.assert_array_equal(found, (kept * TASK_VECTORS).astype(np.float32))


def test_shares_are_of_the_dtype_of_task_vectors_and_leave_them() -> None:
    bank = bank_of(TASK_VECTORS, {"a": (5,)}, torch.bfloat16)
    before = bank.task_vectors["a"].clone()
    apply = ota().fit(bank, Context({"a": torch.from_numpy(CURVATURE)}))
    assert apply("a", bank.task_vectors["a"]).dtype == torch.bfloat16
    assert torch.equal(bank.task_vectors["a"], before)


def test_a_run_gathers_one_statistic() -> None:
    transform = ota()
    options: dict[str, Any] = {"weights": None, "normalize": True, "floor": 0.0, "floor_unit": "mean"}
    options |= {"floor_rule": "max", "floor_tasks": None, "scaling": 1.0, "grid": ()}
    assert FisherMerging(fisher=Moments({}), transform=transform, **options).statistic == transform.statistic
    with pytest.raises(ConfigError, match="need to know different things"):
        FisherMerging(fisher=Moments({"a": "other"}), transform=transform, **options)
    consensus = Consensus(0.4, 2, transform)
    assert consensus.statistic == transform.curvature
    assert Consensus(0.4, 2, None).statistic is None
    assert TaskArithmetic(scaling=1.0, grid=(), transform=consensus).statistic == transform.curvature


def test_its_record_says_what_it_was_of() -> None:
    record = ota(density=None, thresholds={"task0": 1.0}).to_json()
    assert record == json.loads(json.dumps(record))
    assert record["curvature"]["name"] == "moments"
    assert record["thresholds"] == {"task0": 1.0}


numbers = st.sampled_from([0.0, 0.0, 1e-12, 0.25, 1.0, 4.0])


@given(
    curvature=st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=3, max_size=3).map(np.array),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    epsilon=st.sampled_from([0.0, 1e-8, 1.0]),
    density=st.sampled_from([0.01, 0.3, 0.5, 1.0]) | st.none(),
    masked=st.sampled_from(["base", "average"]),
    integers=st.booleans(),
)
def test_all_options_together_are_the_loop_over_entries(
    curvature: np.ndarray, exponent: float, epsilon: float, density: float | None, masked: str, integers: bool
) -> None:
    generator = np.random.default_rng(0)
    # Integers: many entries with the same v τ², where all of them are kept or none. 0 to a power of 0 is 1.
    task_vectors = generator.integers(-2, 3, size=(3, 6)).astype(float) if integers else generator.normal(size=(3, 6))
    thresholds = [0.2, 1.1, 0.0]
    found = merged(
        curvature, task_vectors, {"b": (2, 2), "a": (2,)}, exponent=exponent, epsilon=epsilon, density=density,
        thresholds={f"task{index}": value for index, value in enumerate(thresholds)} if density is None else None,
        masked=masked,
    )  # fmt: skip
    expected = reference.ota(
        curvature, task_vectors, exponent=exponent, epsilon=epsilon, kept=density and ceil(density * 6),
        thresholds=thresholds, masked=masked,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_masks_keep_the_density_of_each_task_over_all_tensors() -> None:
    # Disjoint entries tell which of them stay: with p = 0 the merge is τ where it is kept.
    generator = np.random.default_rng(2)
    task_vectors = np.zeros((2, 400))
    task_vectors[0, :200], task_vectors[1, 200:] = generator.normal(size=200), 1e-3 * generator.normal(size=200)
    curvature = generator.gamma(0.5, size=(2, 400)) + 1e-9
    found = merged(curvature, task_vectors, {"a": (10, 30), "b": (100,)}, exponent=0, density=0.1)
    assert (found[:200] != 0).sum() == (found[200:] != 0).sum() == 40
    saliency = (curvature * task_vectors**2)[0, :200]
    np.testing.assert_array_equal(found[:200] != 0, saliency >= np.sort(saliency)[-40])


def test_curvature_of_any_size_gives_the_same() -> None:
    # v τ² is below float32's least number here, and so would masks by it be of everything.
    for size in (1e-34, 1e34):
        np.testing.assert_allclose(
            merged(size * CURVATURE, 1e-4 * TASK_VECTORS), 1e-4 * merged(CURVATURE, TASK_VECTORS), rtol=1e-5, atol=1e-11
        )


def test_epsilon_far_above_curvature_weighs_all_alike() -> None:
    small = 1e-20 * CURVATURE
    np.testing.assert_allclose(merged(small, TASK_VECTORS, density=1, epsilon=1e-4), TASK_VECTORS.mean(0), rtol=1e-5)
    weighed = merged(small, TASK_VECTORS, density=1, epsilon=1e-26)
    np.testing.assert_allclose(weighed, reference.OTA_MERGED["all"], rtol=1e-5, atol=1e-6)


def test_zeros_give_zeros_and_no_nan() -> None:
    for masked in ("base", "average"):
        found = merged(np.zeros((2, 3)), np.array([[1.0, 0, 2], [3, 0, 0]]), masked=masked, density=1)
        np.testing.assert_allclose(found, [0, 0, 0] if masked == "base" else [2, 0, 1])


def test_rank_one_is_of_sums() -> None:
    context = Context({"a": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])})
    task_vectors = torch.ones(1, 2, 2)
    found = ota(rank_one=True)._curvature("a", task_vectors, context)
    torch.testing.assert_close(found, torch.tensor([reference.RANK_ONE]))
    assert torch.equal(ota()._curvature("a", task_vectors, context), context.statistics["a"])


def test_rank_one_of_other_shapes_and_of_zeros() -> None:
    method = ota(rank_one=True)
    vector = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(method._curvature("a", vector, Context({"a": vector})), vector)  # (K, n): no matrix
    assert torch.equal(
        method._curvature("a", torch.ones(1, 2, 2), Context({"a": torch.zeros(1, 2, 2)})), torch.zeros(1, 2, 2)
    )
    kernel = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))  # (K, m, 2, 2): m against 4
    found = method._curvature("a", kernel, Context({"a": kernel}))
    for task, of_task in enumerate(kernel.double().flatten(2)):
        expected = np.outer(of_task.sum(1), of_task.sum(0)) / of_task.sum().item()
        np.testing.assert_allclose(found[task].flatten(1), expected, rtol=1e-5)


def test_rank_one_changes_masks_and_weights() -> None:
    generator = np.random.default_rng(3)
    curvature, task_vectors = generator.gamma(0.5, size=(2, 12)), generator.normal(size=(2, 12))
    for density in (0.4, 1):
        plain, changed = (
            merged(curvature, task_vectors, {"a": (3, 4)}, rank_one=rank_one, density=density)
            for rank_one in (False, True)
        )
        assert np.abs(plain - changed).max() > 0.1


def test_the_fraction_kept_is_counted_without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.07 of 100 is 7, and 7.000000000000001 in floating point, which would keep 8.
    ranks = []
    found = module.kth_smallest
    monkeypatch.setattr(module, "kth_smallest", lambda read, wanted: ranks.extend(wanted) or found(read, wanted))
    ones = np.arange(1, 101)[None] / 100
    merged(ones, ones, density=0.07)
    assert ranks == [94]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": 1.0}, "exclude each other. Give one"),
        ({"density": None}, "exclude each other. Give one"),
        ({"density": 0}, r"in \(0, 1\]; found 0"),
        ({"density": 1.5}, r"in \(0, 1\]; found 1.5"),
        ({"exponent": -1}, "at least 0, found -1 and 0"),
        ({"epsilon": float("nan")}, "at least 0, found 0.5 and nan"),
        ({"masked": "zero"}, "'base' or 'average', found 'zero'"),
        ({"density": None, "thresholds": {"task1": 1}}, "none for task0. Give every task one"),
        ({"density": None, "thresholds": -1}, "at least 0, found -1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(CURVATURE, TASK_VECTORS, **options)


def test_tensors_without_curvature_are_named() -> None:
    bank = bank_of(TASK_VECTORS, {"a": (2,), "b": (3,)})
    with pytest.raises(ConfigError, match="no curvature of b"):
        ota().fit(bank, Context({"a": bank.task_vectors["a"].abs()}))
