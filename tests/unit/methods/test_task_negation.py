"""Task negation: what is subtracted, and which factor a search takes by a table of accuracies."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import literals
from rich.console import Console
from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.cli.merging import merge_static
from adamerge.errors import ConfigError
from adamerge.methods import Context
from adamerge.methods.static import TaskNegation

KEY = "visual.proj"
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
# Accuracies at the factors of the grid. The pretrained model's on the control is 0.8: 95 % of it are 0.76.
TARGET = (0.6, 0.4, 0.3, 0.1, 0.0)
CONTROL = (0.8, 0.9, 0.76, 0.75, 0.2)


def method(**options: Any) -> TaskNegation:
    defaults = {"target": "a", "control": "b", "keep": 0.95, "scaling": "search", "grid": GRID, "transform": None}
    return TaskNegation(**(defaults | options))


@pytest.fixture
def bank(make_bank: Callable[..., ParameterBank]) -> ParameterBank:
    return make_bank(
        {KEY: torch.tensor(literals.PRETRAINED)}, [{KEY: torch.tensor(expert)} for expert in literals.EXPERTS]
    )


class Table:
    """Looks accuracies up by how far the weights went the way of -τ_a, as an evaluator would measure them."""

    device, precision, batch_size = torch.device("cpu"), "32-true", 8

    def __init__(self, bank: ParameterBank, target: tuple[float, ...], control: tuple[float, ...]) -> None:
        self.bank, self.rows = bank, dict(zip(GRID, zip(target, control, strict=True), strict=True))

    def __call__(self, weights: dict[str, Tensor], *, images: object, cached: bool = False) -> dict[str, float]:
        task_vector = self.bank.task_vectors[KEY][0]
        went = (self.bank.pretrained[KEY] - weights[KEY]).flatten() @ task_vector.flatten()
        return dict(zip("ab", self.rows[float(went / task_vector.square().sum())], strict=True))

    def experts(self, *, images: object) -> dict[str, float]:
        return {"a": 0.9, "b": 0.9}


def chosen(
    bank: ParameterBank, target: tuple[float, ...] = TARGET, control: tuple[float, ...] = CONTROL, **options: Any
) -> Tensor:
    problem: Any = SimpleNamespace(bank=bank, labelled=lambda: "the labelled split")
    evaluator: Any = Table(bank, target, control)
    return merge_static(method(**options), problem, evaluator, Console(quiet=True), Context())[KEY]


def at(bank: ParameterBank, factor: float) -> Tensor:
    return bank.pretrained[KEY] - factor * bank.task_vectors[KEY][0]


def test_subtracts_the_targets_task_vector(bank: ParameterBank) -> None:
    # θ₀ - τ₁ = 2 θ₀ - θ₁; θ₀ - τ₂/2
    assert torch.equal(method(scaling=1.0)(bank)[KEY], torch.tensor([[0.0, 2.0], [5.0, 4.0]]))
    other = method(target="b", control="a", scaling=0.5)(bank)[KEY]
    assert torch.equal(other, torch.tensor([[1.0, 3.0], [3.0, 2.0]]))


def test_takes_the_lowest_target_that_keeps_the_control(bank: ParameterBank) -> None:
    assert torch.equal(chosen(bank), at(bank, 0.5))


def test_how_much_is_kept_is_an_option(bank: ParameterBank) -> None:
    assert torch.equal(chosen(bank, keep=0.9), at(bank, 0.75))
    assert torch.equal(chosen(bank, keep=0.0), at(bank, 1.0))
    assert torch.equal(chosen(bank, keep=1.0), at(bank, 0.25))


def test_neither_the_largest_factor_nor_the_best_control_decides(bank: ParameterBank) -> None:
    assert torch.equal(
        chosen(bank, target=(0.6, 0.1, 0.5, 0.4, 0.3), control=(0.8, 0.77, 0.9, 0.9, 0.9)), at(bank, 0.25)
    )


def test_of_equals_the_first_is_taken(bank: ParameterBank) -> None:
    assert torch.equal(chosen(bank, target=(0.6, 0.2, 0.2, 0.2, 0.2), control=(0.8,) * 5), at(bank, 0.25))


def test_nothing_is_chosen_where_nothing_keeps_the_control(bank: ParameterBank) -> None:
    grid = (0.75, 1.0)
    with pytest.raises(ConfigError, match=r"no scaling of method\.grid will do"):
        chosen(bank, grid=grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "a"}, r"method\.target and method\.control are both 'a'\. Name two tasks"),
        ({"keep": 1.5}, r"method\.keep lies in \[0, 1\], found 1\.5"),
        ({"target": "z"}, r"method\.target=z is not among the tasks that are merged: a, b"),
        ({"control": "z"}, r"method\.control=z is not among the tasks that are merged: a, b"),
    ],
)
def test_unusable_options_are_refused(bank: ParameterBank, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(scaling=0.5, **options)(bank)
