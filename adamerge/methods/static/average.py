"""Simple averaging of experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from adamerge.bank import ParameterBank
from adamerge.methods.static.task_arithmetic import TaskArithmetic


@dataclass(frozen=True)
class Average:
    """(1/K) Σ_k θ_k, which is Task Arithmetic at λ = 1/K.

    Source: Model soups, arXiv:2203.05482.
    """

    def __call__(self, bank: ParameterBank) -> dict[str, Tensor]:
        return TaskArithmetic(scaling=1 / bank.num_tasks, grid=())(bank)

    def candidates(self) -> Sequence[Self]:
        return [self]
