"""Average, Task Arithmetic and the references, against numbers worked by hand."""

from collections.abc import Callable

import pytest
import torch
from reference import literals
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import Average, Individual, Pretrained, TaskArithmetic, TiesMerging

KEY = "visual.proj"


def arithmetic(scaling: float) -> TaskArithmetic:
    return TaskArithmetic(scaling=scaling, grid=(), transform=None)


def average() -> Average:
    return Average(scaling=1, grid=(), transform=None)


@pytest.fixture
def bank(make_bank: Callable[..., ParameterBank]) -> ParameterBank:
    return make_bank(
        {KEY: torch.tensor(literals.PRETRAINED)}, [{KEY: torch.tensor(expert)} for expert in literals.EXPERTS]
    )


def assert_equals(found: dict[str, Tensor], expected: tuple) -> None:
    assert list(found) == [KEY]
    torch.testing.assert_close(found[KEY], torch.tensor(expected), rtol=2e-7, atol=0)


def test_average(bank: ParameterBank) -> None:
    assert_equals(average()(bank), literals.AVERAGE)


def test_average_of_equal_experts_is_that_expert(make_bank: Callable[..., ParameterBank]) -> None:
    expert = {KEY: torch.tensor(literals.EXPERTS[0])}
    assert_equals(average()(make_bank({KEY: torch.tensor(literals.PRETRAINED)}, [expert] * 3)), literals.EXPERTS[0])


def test_task_arithmetic(bank: ParameterBank) -> None:
    assert_equals(arithmetic(0.3)(bank), literals.TASK_ARITHMETIC)
    assert_equals(arithmetic(0)(bank), literals.PRETRAINED)


def test_a_negative_scaling_forgets(make_bank: Callable[..., ParameterBank]) -> None:
    # θ₀ - τ₁ = 2 θ₀ - θ₁
    single = make_bank({KEY: torch.tensor(literals.PRETRAINED)}, [{KEY: torch.tensor(literals.EXPERTS[0])}])
    assert_equals(arithmetic(-1)(single), ((0.0, 2.0), (5.0, 4.0)))


def test_task_arithmetic_computes_in_the_banks_dtype(make_bank: Callable[..., ParameterBank]) -> None:
    wide = make_bank(
        {KEY: torch.tensor(literals.PRETRAINED, dtype=torch.float64)},
        [{KEY: torch.tensor(expert, dtype=torch.float64)} for expert in literals.EXPERTS],
        dtype=torch.float64,
    )
    expected = torch.tensor(literals.TASK_ARITHMETIC, dtype=torch.float64)
    torch.testing.assert_close(arithmetic(0.3)(wide)[KEY], expected, rtol=1e-15, atol=0)


def test_pretrained_and_individual(bank: ParameterBank) -> None:
    assert_equals(Pretrained()(bank), literals.PRETRAINED)
    for task, expert in zip("ab", literals.EXPERTS, strict=True):
        assert_equals(Individual()(bank, task), expert)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: TaskArithmetic(transform=None, **options),
        lambda **options: TiesMerging(
            density=0.2, thresholds="global", structural_zeros=0, aggregation="sum", transform=None, **options
        ),
    ],
    ids=["task_arithmetic", "ties"],
)
class TestScaling:
    """What the methods with one scaling share."""

    def test_a_number_leaves_nothing_to_choose(self, make: Callable[..., TaskArithmetic], bank: ParameterBank) -> None:
        method = make(scaling=0.3, grid=(0.1, 0.2))
        assert [candidate for candidate, _ in method.candidates(bank)] == [method]

    def test_a_search_offers_the_grid_in_order(self, make: Callable[..., TaskArithmetic], bank: ParameterBank) -> None:
        grid = (0.5, 0.1, 1.0)
        candidates = list(make(scaling="search", grid=grid).candidates(bank))
        assert [candidate for candidate, _ in candidates] == [make(scaling=factor, grid=grid) for factor in grid]
        for (_, merged), factor in zip(candidates, grid, strict=True):
            fixed = make(scaling=factor, grid=())
            torch.testing.assert_close(merged, fixed(bank), rtol=0, atol=0)

    def test_a_search_is_not_a_merge(self, make: Callable[..., TaskArithmetic], bank: ParameterBank) -> None:
        with pytest.raises(ConfigError, match="not been searched for yet"):
            make(scaling="search", grid=(0.1,))(bank)

    def test_another_word_is_refused(self, make: Callable[..., TaskArithmetic]) -> None:
        with pytest.raises(ConfigError, match="a number or 'search', found 'best'"):
            make(scaling="best", grid=(0.1,))

    def test_a_search_without_a_grid_is_refused(self, make: Callable[..., TaskArithmetic]) -> None:
        with pytest.raises(ConfigError, match=r"at least one factor in method\.grid"):
            make(scaling="search", grid=())
