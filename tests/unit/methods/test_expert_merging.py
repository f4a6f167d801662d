"""Expert Merging's anchor, and how ++ shares coefficients out among tensors, against numbers worked by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adamerge.bank import ParameterBank
from adamerge.errors import ConfigError
from adamerge.merging import Partition, merge
from adamerge.methods.learned import ExpertMerging
from adamerge.methods.learned.expert_merging import share_out

# Two tasks, three tensors; θ₀ = 0. ‖τ‖₁ by tensor: a 6 and 2, b 1 and 4, c 0 and 0.
EXPERTS = [
    {
        "visual.a": torch.tensor([[1.0, -2.0], [3.0, 0.0]]),
        "visual.b": torch.tensor([1.0, 0.0]),
        "visual.c": torch.zeros(3),
    },
    {
        "visual.a": torch.tensor([[0.0, -2.0], [0.0, 0.0]]),
        "visual.b": torch.tensor([-2.0, 2.0]),
        "visual.c": torch.zeros(3),
    },
]


@pytest.fixture
def bank(make_bank: Callable[..., ParameterBank]) -> ParameterBank:
    return make_bank({key: torch.zeros_like(tensor) for key, tensor in EXPERTS[0].items()}, EXPERTS)


def method(**options: Any) -> ExpertMerging:
    given = {"constraint": "identity", "init": 0.3, "anchor": 5.0, "budget": None, "exponent": 1.0}
    return ExpertMerging(**{**given, **options}, transform=None, coefficients=None)


# The anchor


def test_the_anchor_is_the_mean_distance_from_the_start() -> None:
    coefficients = torch.tensor([[0.3, 0.5, 0.1], [0.4, 0.3, 0.3]])
    # |0|, 0.2, 0.2, 0.1, 0, 0: their mean is 0.5 / 6
    found = method(anchor=3.0).penalty(coefficients, coefficients)
    torch.testing.assert_close(found, torch.tensor(3 * 0.5 / 6))


def test_every_task_has_its_own_start() -> None:
    coefficients = torch.tensor([[0.3, 0.5], [0.5, 0.1]])
    # from 0.3 by 0 and 0.2, from 0.1 by 0.4 and 0: 0.6 / 4
    found = method(init=[0.3, 0.1]).penalty(coefficients, coefficients)
    torch.testing.assert_close(found, torch.tensor(5 * 0.6 / 4))


def test_the_anchor_pulls_back_and_may_be_left_out() -> None:
    coefficients = torch.tensor([[0.5], [0.1]], requires_grad=True)
    penalty = method(anchor=2.0).penalty(coefficients, coefficients)
    assert penalty is not None
    (gradient,) = torch.autograd.grad(penalty, coefficients)
    torch.testing.assert_close(gradient, torch.tensor([[1.0], [-1.0]]))  # 2 / (K·G) by the sign
    assert method(anchor=0.0).penalty(coefficients, coefficients) is None


# Importance and shares


def test_importance_is_what_a_tensor_adds(bank: ParameterBank) -> None:
    coefficients = torch.tensor([[0.5, -1.0, 1.0], [0.25, 0.5, 1.0]])
    # a: 0.5·6 + 0.25·2 = 3.5; b: 1·1 + 0.5·4 = 3; c: 0
    found = method().importance(bank, coefficients)
    torch.testing.assert_close(found, torch.tensor([3.5, 3.0, 0.0], dtype=torch.float64) / 6.5)


def test_shares_name_every_tensor(bank: ParameterBank) -> None:
    coefficients = torch.full((2, 3), 0.5)
    # importance 4 : 2.5 : 0, of 4 · 3 chunks: 7.38, 4.6, 0; but a has 4 entries and b has 2
    shares = method(budget=4.0).shares(bank, coefficients)
    assert {key: count for key, (_, count) in shares.items()} == {"visual.a": 4, "visual.b": 2, "visual.c": 0}
    assert [weight for weight, _ in shares.values()] == pytest.approx([4 / 6.5, 2.5 / 6.5, 0])
    assert method(budget=None).shares(bank, coefficients) == {}


def test_nothing_is_shared_where_nothing_is_added(bank: ParameterBank) -> None:
    assert method(budget=1.0).shares(bank, torch.zeros(2, 3)) == {}
    assert method(budget=1.0).refine(1, bank, Partition.build("tensor", bank.shapes), torch.zeros(2, 3)) is None


@pytest.mark.parametrize(
    ("exponent", "counts"),
    [
        (0.0, [2, 2, 2]),  # 2 · 3 / 3 each
        (1.0, [3, 1, 1]),  # 6 · (0.5, 0.25, 0.25) = 3, 1.5, 1.5
        (2.0, [4, 1, 1]),  # 6 · (4, 1, 1) / 6
        (8.0, [5, 0, 0]),  # 6 · 256 / 258 = 5.95
    ],
)
def test_a_larger_exponent_concentrates(exponent: float, counts: list[int]) -> None:
    importance = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert share_out(importance, [100, 100, 100], budget=2.0, exponent=exponent) == counts


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=12),
    budget=st.floats(0.1, 20),
    exponent=st.floats(0, 3),
    size=st.integers(1, 50),
)
def test_no_more_is_shared_out_than_there_is(
    weights: Sequence[float], budget: float, exponent: float, size: int
) -> None:
    importance = torch.tensor(weights, dtype=torch.float64)
    counts = share_out(importance / importance.sum(), [size] * len(weights), budget=budget, exponent=exponent)
    assert sum(counts) <= budget * len(weights) + 1e-6
    assert all(0 <= count <= size for count in counts)
    order = sorted(range(len(weights)), key=weights.__getitem__)
    assert [counts[i] for i in order] == sorted(counts)


# The second stage


def test_the_second_stage_starts_anew_in_chunks(bank: ParameterBank) -> None:
    learner = method(budget=4.0)
    partition, coefficients = learner.prepare(bank)
    assert partition.groups == ("visual.a", "visual.b", "visual.c")
    refined = learner.refine(1, bank, partition, torch.full((2, 3), 0.5))
    assert refined is not None
    finer, fresh = refined
    assert finer.segments["visual.a"] == ((0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 3))
    assert finer.segments["visual.b"] == ((0, 1, 4), (1, 2, 5))
    assert finer.segments["visual.c"] == ((0, 3, 6),)
    torch.testing.assert_close(fresh(), torch.full((2, 7), 0.3))
    merged = merge(bank, fresh().detach(), finer)
    torch.testing.assert_close(merged, merge(bank, coefficients().detach(), partition))


def test_a_tensor_without_a_chunk_keeps_its_start(bank: ParameterBank) -> None:
    refined = method(budget=4.0).refine(1, bank, Partition.build("tensor", bank.shapes), torch.full((2, 3), 0.5))
    assert refined is not None
    fresh = refined[1]
    fresh().square().sum().backward()
    (raw,) = fresh.parameters()
    assert raw.grad is not None
    torch.optim.SGD([raw], lr=0.1).step()
    moved = (fresh() != 0.3).all(0).tolist()
    assert moved == [True] * 6 + [False]


def test_there_is_one_second_stage_and_only_with_a_budget(bank: ParameterBank) -> None:
    partition, learned = Partition.build("tensor", bank.shapes), torch.full((2, 3), 0.5)
    assert method(budget=None).refine(1, bank, partition, learned) is None
    assert method(budget=4.0).refine(2, bank, partition, learned) is None


def test_a_budget_that_leaves_nothing_is_refused(bank: ParameterBank) -> None:
    partition = Partition.build("tensor", bank.shapes)
    with pytest.raises(ConfigError, match=r"method\.budget=0\.1 leaves no tensor a coefficient"):
        method(budget=0.1).refine(1, bank, partition, torch.full((2, 3), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor": -1.0}, r"method\.anchor is at least 0, found -1\.0"),
        ({"budget": 0.0}, r"method\.budget is null or above 0, found 0\.0"),
        ({"exponent": -0.5}, r"method\.exponent is at least 0, found -0\.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options)
