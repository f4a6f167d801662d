"""The weighted mean of experts, by hand and against Task Arithmetic's own sums."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from reference import literals
from unit.zoo import make_bank

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.methods.static import Average, WeightedAverage
from adamerge.methods.static.weighted_average import normalized

KEY = "visual.proj"
# θ₀ + 3/4 τ₁ + 1/4 τ₂ of the two experts there:
#   1 + 3/4         2 - 1/2    =  1.75  1.5
#   3 - 3/2         4 + 1         1.5   5
THREE_TO_ONE = torch.tensor([[1.75, 1.5], [1.5, 5.0]])


def merge(bank: ParameterBank, weights: Any, scaling: float = 1.0) -> torch.Tensor:
    return WeightedAverage(weights=weights, scaling=scaling, grid=(), transform=None)(bank)[KEY]


@pytest.fixture
def bank(make_bank: Callable[..., ParameterBank]) -> ParameterBank:
    return make_bank(
        {KEY: torch.tensor(literals.PRETRAINED)}, [{KEY: torch.tensor(expert)} for expert in literals.EXPERTS]
    )


@pytest.mark.parametrize(
    "weights",
    [
        [3, 1],
        (0.75, 0.25),
        {"b": 10, "a": 30},
        OmegaConf.create([3.0, 1.0]),
        OmegaConf.create({"b": 1, "a": 3}),
    ],
    ids=str,
)
def test_weights_by_task_or_in_order_up_to_a_factor(bank: ParameterBank, weights: Any) -> None:
    torch.testing.assert_close(merge(bank, weights), THREE_TO_ONE, rtol=1e-7, atol=0)
    twice = 2 * THREE_TO_ONE - bank.pretrained[KEY]
    torch.testing.assert_close(merge(bank, weights, scaling=2), twice, rtol=1e-7, atol=0)


def test_equal_weights_give_the_mean(bank: ParameterBank) -> None:
    average = Average(scaling=1, grid=(), transform=None)(bank)[KEY]
    for weights in (None, [2, 2], {"a": 0.1, "b": 0.1}):
        torch.testing.assert_close(merge(bank, weights), average, rtol=1e-7, atol=0)


def test_a_weight_of_zero_leaves_the_expert_out(bank: ParameterBank) -> None:
    for index, weights in enumerate(([5, 0], [0, 0.1])):
        assert torch.equal(merge(bank, weights), bank.expert(index)[KEY])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_weights_add_up_to_one(weights: list[float]) -> None:
    found = normalized(weights, "abcdefgh"[: len(weights)])
    assert sum(found) == pytest.approx(1)
    assert [weight / found[0] for weight in found] == pytest.approx([weight / weights[0] for weight in weights])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3, 2, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    task_vectors = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    bank = make_bank({KEY: torch.zeros(shape)}, [{KEY: vector} for vector in task_vectors])
    expected = 0.5 * task_vectors[0] + 0.3 * task_vectors[1] + 0.2 * task_vectors[2]
    torch.testing.assert_close(merge(bank, [5, 3, 2]), expected)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"method\.weights has 1 weights for 2 tasks"),
        ({"a": 1.0}, r"method\.weights has none for b\. Give every task one; 0 leaves it out"),
        ({"a": 1.0, "b": 1.0, "z": 1.0}, r"method\.weights names z, not among the tasks that are merged: a, b"),
        ([1.0, -1.0], r"at least 0, and one of them is above; found 1, -1"),
        ([0, 0], r"one of them is above; found 0, 0"),
        ([1.0, float("nan")], "found 1, nan"),
    ],
)
def test_unusable_weights_are_refused(bank: ParameterBank, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge(bank, weights)
