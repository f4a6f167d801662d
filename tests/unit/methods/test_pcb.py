"""PCB-Merging against a second implementation by sorting and a matrix worked by hand."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference import pcb as reference
from torch import Tensor
from unit.flat_bank import bank_of, flat

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import TaskArithmetic
from adamerge.methods.transforms import Pcb

AGREEMENTS = ["normalized", "raw", "pairwise"]
WORKED = np.array(reference.WORKED)
SHAPES = {"w": (10, 20), "b": (30,), "one": (), "conv": (3, 1, 3, 3)}  # 258 entries


def pcb(**options: Any) -> Pcb:
    return Pcb(**({"density": 0.05, "clip": 0.01, "agreement": "normalized", "structural_zeros": 0} | options))


def merged(bank: ParameterBank, **options: Any) -> np.ndarray:
    merging = TaskArithmetic(scaling=1.0, grid=(), transform=pcb(**options))
    return flat({key: tensor[None] for key, tensor in merging(bank).items()})[0]


def draw(tasks: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tasks, 258)) * 0.1


@pytest.mark.parametrize(
    "shapes", [{"a": (4,)}, {"b": (1, 2), "a": (2,)}, {f"entry{i}": () for i in range(4)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_worked_matrix(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    bank = bank_of(WORKED, shapes, dtype)
    for density, expected in ((0.75, reference.WORKED_MERGED), (0.5, reference.WORKED_HALF)):
        np.testing.assert_allclose(merged(bank, density=density, clip=0), expected, rtol=1e-6, atol=0)
        np.testing.assert_allclose(reference.pcb(WORKED, density, 0, "normalized"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_learners_scale_is_each_tasks_share(dtype: torch.dtype) -> None:
    bank = bank_of(WORKED, {"b": (1, 2), "a": (2,)}, dtype)
    shares = bank.transformed(pcb(density=0.75, clip=0).fit(bank)).task_vectors
    assert {tensor.dtype for tensor in shares.values()} == {dtype}
    np.testing.assert_allclose(flat(shares), reference.WORKED_SHARES, rtol=1e-6, atol=0)


@pytest.mark.parametrize("agreement", AGREEMENTS)
@pytest.mark.parametrize(("density", "clip"), [(0.05, 0.01), (0.3, 0.1), (1.0, 0.0), (0.1, 0.0001)])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_against_the_second_implementation(agreement: str, density: float, clip: float, tasks: int) -> None:
    rows = draw(tasks, seed=tasks)
    expected = reference.pcb(rows, density, clip, agreement)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):  # quantiles are in float32 in any case
        found = merged(bank_of(rows, SHAPES, dtype), density=density, clip=clip, agreement=agreement)
        np.testing.assert_array_equal(found != 0, expected != 0)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_structural_zeros_are_a_tensor_of_zeros(agreement: str) -> None:
    rows = draw()
    expected = reference.pcb(rows, 0.2, 0.05, agreement, zeros=75)
    found = merged(bank_of(rows, SHAPES), density=0.2, clip=0.05, agreement=agreement, structural_zeros=75)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=0)
    without = reference.pcb(rows, 0.2, 0.05, agreement)
    assert (expected != 0).sum() > (without != 0).sum()


def test_every_option_says_something() -> None:
    bank = bank_of(draw(), SHAPES)
    found = [
        merged(bank, **options)
        for options in (
            {},
            {"density": 0.1},
            {"clip": 0.1},
            {"agreement": "raw"},
            {"agreement": "pairwise"},
            {"structural_zeros": 100},
        )
    ]
    for index, one in enumerate(found):
        assert not any(np.allclose(one, other, rtol=1e-3) for other in found[:index]), index


def test_a_coordinate_of_one_task_is_its_own_in_full_and_only_the_best_move() -> None:
    """Two tasks that change different halves: where an entry counts, nobody shares its coordinate."""
    rows = draw(2)
    rows[0, :129] = 0
    rows[1, 129:] = 0
    found = merged(bank_of(rows, SHAPES, torch.float64), density=0.1, clip=0.0)
    moved = found != 0
    np.testing.assert_allclose(found[moved], rows.sum(axis=0)[moved], rtol=1e-6)
    # ⌊258·0.9⌋ = 232 and the one at the threshold do not count, of each task: 25 do. They are the largest.
    for half in (moved[:129], moved[129:]):
        assert half.sum() == 25
    assert np.abs(rows[1][:129][moved[:129]]).min() > np.abs(rows[1][:129][~moved[:129]]).max()


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_the_order_of_tasks_does_not_matter(order: Sequence[int], agreement: str) -> None:
    rows = draw(3, seed=5)
    expected = merged(bank_of(rows, SHAPES), density=0.2, agreement=agreement)
    found = merged(bank_of(rows[list(order)], SHAPES), density=0.2, agreement=agreement)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_the_order_of_keys_does_not_matter() -> None:
    rows = draw()
    shuffled = {key: SHAPES[key] for key in ("one", "conv", "w", "b")}
    np.testing.assert_array_equal(merged(bank_of(rows, shuffled)), merged(bank_of(rows, SHAPES)))


@pytest.mark.parametrize("agreement", AGREEMENTS)
@pytest.mark.parametrize(
    "rows",
    [np.zeros((3, 4)), np.ones((2, 4)), np.array([[1.0, -1, 1, -1], [0, 0, 0, 0]]), np.array([[2.0]]), np.eye(2)],
    ids=["zero", "equal", "equal magnitudes", "one entry", "one entry a task"],
)
def test_nothing_is_divided_by_zero(rows: np.ndarray, agreement: str) -> None:
    bank = bank_of(rows, {"a": (rows.shape[1],)})
    for density in (0.05, 1.0):
        for clip in (0.0, 0.4):
            found = merged(bank, density=density, clip=clip, agreement=agreement)
            np.testing.assert_allclose(found, reference.pcb(rows, density, clip, agreement), rtol=1e-6, atol=0)
            assert np.isfinite(found).all()


def test_a_hundred_tasks_do_not_overflow() -> None:
    """exp(100) is beyond float32, whose largest number is about exp(88.7)."""
    rows = draw(100)
    found = merged(bank_of(rows, SHAPES), density=0.2)
    np.testing.assert_allclose(found, reference.pcb(rows, 0.2, 0.01, "normalized"), rtol=2e-3, atol=1e-6)


def test_the_bank_is_read_five_times_and_stays() -> None:
    """Twice for each pair of quantiles, once to merge; never as a whole."""

    class Counted(Mapping[str, Tensor]):
        reads = 0

        def __getitem__(self, key: str) -> Tensor:
            Counted.reads += 1
            return source[key]

        def __iter__(self) -> Iterator[str]:
            return iter(source)

        def __len__(self) -> int:
            return len(source)

    rows = draw()
    bank = bank_of(rows, SHAPES, torch.float64)
    source = bank.task_vectors
    TaskArithmetic(scaling=1.2, grid=(), transform=pcb())(ParameterBank(bank.pretrained, Counted(), bank.task_names))
    assert Counted.reads == 5 * len(SHAPES)
    np.testing.assert_array_equal(flat(source), rows)


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"density": 0}, r"in \(0, 1\]; found 0"),
        ({"density": 5}, r"in \(0, 1\]; found 5"),
        ({"clip": 0.5}, r"in \[0, 0\.5\); found 0\.5"),
        ({"clip": -0.01}, r"found -0\.01"),
        ({"agreement": "sign"}, r"unknown agreement 'sign'\. Choose normalized, raw or pairwise"),
        ({"structural_zeros": -1}, r"a count, 0 or more; found -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            pcb(**options)
